//! Finds which of two labels a text names as the better one.

use regex::Regex;

use super::grammar::{Form, Grammar, Statement};
use super::names::{Names, word};
use super::plain::plain;
use super::reasons::Reasons;
use super::sentences::{Begin, Sentence, sentences};
use super::{End, Said, object};
use crate::judge::Verdict;

/// The labels of two answers, and the patterns that find them in a text.
#[derive(Debug, Clone)]
pub struct Labels {
    names: [String; 2],
    grammar: Grammar,
    reasons: Reasons,
}

/// A statement and the number of its sentence.
type Stated = (usize, Statement);

impl Labels {
    /// Compiles the patterns of two labels.
    pub fn new(names: [String; 2]) -> Result<Self, String> {
        let apart = || format!("{:?} and {:?} can't be told apart in an answer", names[0], names[1]);
        if names.iter().any(|name| name.trim().is_empty()) {
            return Err(apart());
        }
        for (name, other) in [(0, 1), (1, 0)] {
            let within = Regex::new(&format!("(?i){}", word(&names[name]))).map_err(|e| e.to_string())?;
            if within.is_match(&names[other]) {
                return Err(apart());
            }
        }
        Self::compile(&names).map_err(|e| format!("are too long: {e}"))
    }

    fn compile(names: &[String; 2]) -> Result<Self, regex::Error> {
        let forms = Names::of(names);
        Ok(Self { names: names.clone(), grammar: Grammar::new(&forms)?, reasons: Reasons::new(&forms)? })
    }

    pub fn names(&self) -> &[String; 2] {
        &self.names
    }

    /// Reads a judge's text; `None` if it has no clear verdict.
    pub fn read(&self, said: Said<'_>) -> Option<Verdict> {
        let said = said.conclusion()?;
        match object::in_text(said, |object| self.of_object(object)) {
            object::Found::Nothing => self.of_sentences(said),
            object::Found::Unclear => None,
            object::Found::Value { value, before, after } => {
                let earlier = self.of_sentences(Said::finished(before));
                let agrees = earlier.is_none_or(|earlier| earlier == value) && self.leads_to_object(before);
                (agrees && self.is_supported(after, value, said.end)).then_some(value)
            }
        }
    }

    /// Returns whether the text before an object leaves it a verdict.
    fn leads_to_object(&self, before: &str) -> bool {
        let text = plain(before);
        let all = sentences(&text);
        let last = all.last().is_none_or(|last| last.end != Some('?') && !self.reasons.turns(last));
        last && !all.iter().any(|sentence| self.reasons.ask_for_worse(sentence))
    }

    /// Reads as DataDreamer 0.46 does: exactly one label occurs, with the same upper and lower case.
    pub fn occurring(&self, text: &str) -> Option<Verdict> {
        match (text.contains(&self.names[0]), text.contains(&self.names[1])) {
            (true, false) => Some(Verdict::A),
            (false, true) => Some(Verdict::B),
            _ => None,
        }
    }

    /// Reads the last statement, unless an earlier one contradicts it or a later sentence may take it back.
    fn of_sentences(&self, said: Said<'_>) -> Option<Verdict> {
        let text = plain(said.text);
        let all = sentences(&text);
        let stated = self.statements(&all);
        let (at, last) = *stated.last()?;
        let cut = said.end == End::Cut && all.last().is_some_and(|sentence| sentence.end.is_none());
        if cut && at + 1 == all.len() && !self.is_whole(&all, &last) {
            return None;
        }
        // A label and a description may be the beginning of a review of both answers.
        if said.end == End::Cut && at + 1 < all.len() && last.form == Form::Label {
            return None;
        }
        let agrees = stated.iter().all(|(_, other)| outweighs(&last, other));
        (agrees && self.are_reasons(&all[at + 1..], last.verdict, cut)).then_some(last.verdict)
    }

    /// Returns what the sentences state, in their order.
    fn statements(&self, all: &[Sentence<'_>]) -> Vec<Stated> {
        let read = |at: usize| {
            let stated = self.grammar.read(&all[at])?;
            self.stands(all, at, &stated).map(|form| (at, Statement { form, ..stated }))
        };
        let is_heading =
            |(at, stated): &Stated| stated.form == Form::Label && *at > 0 && at + 1 < all.len() && !stated.concludes;
        let stated: Vec<Stated> = (0..all.len()).filter_map(read).collect();
        let fixed = stated.iter().any(|(_, stated)| stated.form == Form::Fixed);
        stated.into_iter().filter(|stated| !(fixed && is_heading(stated))).collect()
    }

    /// Returns the form of a statement if it stands by itself: no sentence before it leads into it.
    fn stands(&self, all: &[Sentence<'_>], at: usize, stated: &Statement) -> Option<Form> {
        let sentence = &all[at];
        let label = stated.form == Form::Label;
        let titles = sentence.end == Some(':') || (sentence.heading && at + 1 < all.len());
        if (label && titles) || (stated.chooses && all[..at].iter().any(|before| self.reasons.ask_for_worse(before))) {
            return None;
        }
        let answer = stated.chooses && sentence.text.to_ascii_lowercase().contains("answer");
        if answer && all[..at].iter().any(|before| self.reasons.quotes(before)) {
            return None;
        }
        let Some(before) = at.checked_sub(1).map(|before| &all[before]) else { return Some(stated.form) };
        if sentence.begin != Begin::Sentence && self.grammar.announces(before) {
            return Some(Form::Fixed);
        }
        let stands = match before.end {
            Some('?') => !stated.chooses || self.grammar.announces(before),
            Some(';') => !self.reasons.turns(before),
            Some('.' | '!') if label && !stated.concludes && sentence.begin == Begin::Sentence => {
                self.reasons.introduces(before)
            }
            Some('.' | '!') => !label || !self.reasons.turns(before),
            Some(_) => false,
            None if before.heading && stated.form == Form::Fixed => self.reasons.titles(before),
            None if stated.form == Form::Fixed => {
                (before.item && sentence.begin == Begin::Paragraph) || !self.reasons.turns(before)
            }
            None if before.item || before.heading => sentence.begin == Begin::Paragraph && !self.reasons.turns(before),
            None => !label && sentence.begin == Begin::Paragraph && self.reasons.titles(before),
        };
        stands.then_some(stated.form)
    }

    /// Returns whether a statement at the end of a text that was cut off can't go on to mean something else.
    fn is_whole(&self, all: &[Sentence<'_>], stated: &Statement) -> bool {
        let [name, other] = match stated.verdict {
            Verdict::A => [&self.names[0], &self.names[1]],
            Verdict::B => [&self.names[1], &self.names[0]],
            Verdict::Tie => return stated.reasoned,
        };
        let open = all.last().is_some_and(|last| last.text.contains("[[") && !last.text.contains("]]"));
        let grows = open || other.trim().to_lowercase().starts_with(&name.trim().to_lowercase());
        match stated.form {
            _ if stated.reasoned => true,
            Form::Label => all.len() == 1 && stated.bare && !grows,
            Form::Fixed => stated.bare && !grows,
            Form::Claim => false,
        }
    }

    /// Returns whether the text after a verdict only gives reasons for it.
    fn is_supported(&self, text: &str, verdict: Verdict, end: End) -> bool {
        let asked = text.trim_start_matches([' ', '\t']).starts_with(['?', '-', '–', '—']);
        let text = plain(text);
        !asked && self.are_reasons(&sentences(&text), verdict, end == End::Cut)
    }

    fn are_reasons(&self, rest: &[Sentence<'_>], verdict: Verdict, cut: bool) -> bool {
        let last = rest.len().saturating_sub(1);
        rest.iter().enumerate().all(|(at, sentence)| {
            let stated = || self.grammar.read(sentence).is_some_and(|stated| stated.verdict == verdict);
            self.reasons.support(sentence, verdict, cut && at == last) || stated()
        })
    }

    /// Reads an object of JSON: the fields that name the better answer, and those that name the worse one.
    fn of_object(&self, object: &object::Fields) -> object::Reading<Verdict> {
        const BETTER: [&str; 26] = [
            "winner",
            "verdict",
            "choice",
            "better",
            "best",
            "betterresponse",
            "bestresponse",
            "betteranswer",
            "bestanswer",
            "preferred",
            "preferredresponse",
            "chosen",
            "chosenresponse",
            "decision",
            "preference",
            "finalverdict",
            "finalanswer",
            "finaldecision",
            "answer",
            "selected",
            "selection",
            "pick",
            "judgment",
            "judgement",
            "overallwinner",
            "winningresponse",
        ];
        const WORSE: [&str; 8] = [
            "loser",
            "worse",
            "worst",
            "worseresponse",
            "worstresponse",
            "rejected",
            "rejectedresponse",
            "losingresponse",
        ];
        let better = object.fields(&BETTER).map(|value| self.of_value(value));
        let worse = object.fields(&WORSE).map(|value| Some(self.of_value(value)?.swapped()));
        let reading = object::agreed(better.chain(worse));
        // A label under another name may be a second verdict.
        let known = [&BETTER[..], &WORSE[..]].concat();
        let mut others = object.others(&known).filter_map(|value| self.of_value(value));
        match reading {
            object::Reading::Value(value) if others.any(|other| other != value) => object::Reading::Unclear,
            reading => reading,
        }
    }

    fn of_value(&self, value: &serde_json::Value) -> Option<Verdict> {
        let text = plain(value.as_str()?);
        let [sentence] = sentences(&text)[..] else { return None };
        self.grammar.read(&sentence).map(|stated| stated.verdict)
    }
}

/// Returns whether a statement counts although another one stands before it.
fn outweighs(last: &Statement, other: &Statement) -> bool {
    let concludes = last.concludes && !other.concludes;
    last.verdict == other.verdict
        || match (last.form, other.form) {
            (Form::Fixed, Form::Claim | Form::Label) => true,
            (_, Form::Fixed) => last.form == Form::Fixed && concludes,
            (Form::Claim | Form::Label, _) => concludes,
        }
}
