//! Which of two labels a text names as the better one.

use regex::{Captures, Regex};

use super::{CLOSE, End, OPEN, Said, before, lines, sentence_before};
use crate::judge::Verdict;

/// Words for an answer. A judge that was asked about "Response A" may write "Output A".
const NOUN: &str = "(?:response|answer|assistant|output|option|model|candidate|completion|choice|solution|reply|text)";

/// What a judge calls its verdict.
const VERDICT: &str = "(?:verdict|winner|answer|decision|choice|judge?ment|conclusion|preference|pick|selection|result\
    |outcome|better|best|preferred|chosen|winning|response|output)";

/// What may stand before and behind that word.
const BEFORE: &str = r"(?:(?:so|thus|therefore|hence|overall|finally|ultimately|in conclusion|in summary)\b[,:]?\s+)?(?:(?:my|the|our|your|final|overall|better|best|preferred|winning|chosen|superior|correct)[\s_-]+){0,3}";
const BEHIND: &str = r"(?:[\s_-]+(?:label|id|response|answer|assistant|model|output|option|candidate|completion)){0,2}";

/// No answer is better.
const TIE: &str = r"(?:it(?:'|’)?s\s+)?(?:a\s+)?(?:tie|tied|draw|equal)\b";

/// Words between "is" and "better".
const ADVERBS: &str = r"(?:\s+(?:the|a|an|also|still|clearly|much|far|slightly|somewhat|overall|definitely|generally|considerably|significantly|marginally|therefore|thus|bit|to|be|\w+ly)){0,4}";

/// The labels of two answers, and how a text may name them.
#[derive(Debug, Clone)]
pub struct Labels {
    names: [String; 2],
    /// Verdicts in a form made for them, as `[[A]]`, `Verdict: A`, `A > B`.
    formal: Vec<Regex>,
    /// A whole line that is nothing but a label.
    alone: Regex,
    /// The label with which a line begins that is about one answer.
    heading: Regex,
    /// The label with which a text begins, as a sentence of its own or with a reason.
    lead: Regex,
    /// Sentences that prefer an answer; those that call one worse.
    better: Vec<Regex>,
    worse: Regex,
    bold: Regex,
    mention: Regex,
    phrases: Phrases,
}

/// Words around a verdict that change what it says.
#[derive(Debug, Clone)]
struct Phrases {
    /// At the beginning of what stands behind a label: the label is no verdict.
    denied: Regex,
    /// At the end of what stands before a sentence: the sentence is no claim.
    doubted: Regex,
    /// In the sentence of the last of several claims: it is the conclusion.
    concluded: Regex,
    /// In a sentence that only mentions an answer: the mention is no praise.
    blamed: Regex,
}

/// Mentions that are looked at.
const MENTIONS: usize = 20;

/// A verdict and where it begins.
type Found = (usize, Verdict);

impl Labels {
    /// A message says why the two can't be told apart in a text.
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
        let forms = Form::of(names);
        let either = |of: &dyn Fn(&Form) -> String| format!("(?P<a>{})|(?P<b>{})", of(&forms[0]), of(&forms[1]));
        let build = |pattern: String| Regex::new(&format!("(?i){pattern}"));
        let value = format!("{OPEN}(?:{}|(?P<tie>{TIE}))", either(&Form::value));
        let (named, marked) = (either(&Form::named), either(&Form::marked));
        let versus = |sign: &str, turned: &str, one: usize, other: usize| {
            let (one, other) = (forms[one].any(), forms[other].any());
            format!(r"{one}\s*{sign}\s*{other}|{other}\s*{turned}\s*{one}")
        };
        Ok(Self {
            names: names.clone(),
            formal: vec![
                build(format!(r"\[\[\s*(?:{}|(?P<tie>{TIE}|c))\s*\]\]", either(&Form::any)))?,
                build(format!(
                    "(?P<a>{})|(?P<b>{})|(?P<tie>{})",
                    versus("[>≻]+", "[<≺]+", 0, 1),
                    versus("[>≻]+", "[<≺]+", 1, 0),
                    versus("[=≈]+", "[=≈]+", 0, 1)
                ))?,
                build(format!(r"\\boxed\s*\{{{value}"))?,
                build(format!(
                    r#"(?:^|[\n.!?;{{,<>|"'`*#_(])[\s*_`#"'>-]*{BEFORE}{VERDICT}{BEHIND}(?:\s+is)?["'“”’*_`)\]}}\s]*(?:[:：=>→]|->|\n|\s[-–—]\s){value}"#
                ))?,
            ],
            alone: build(format!(r"^{OPEN}(?:{}|(?P<tie>{TIE})){CLOSE}[.!]?{CLOSE}$", either(&Form::any)))?,
            heading: build(format!("^{OPEN}(?:{named}){CLOSE}(?:[.:]|[-–—]|$)"))?,
            lead: build(format!(r"^{OPEN}(?:{named}){CLOSE}(?:[.!](?:\s|$)|,?\s*(?:because|since|as|due)\b)"))?,
            better: vec![
                build(format!(
                    r"(?:{marked})(?:['’]s(?:\s+\w+){{1,3}})?\s+(?:is|was|seems|appears){ADVERBS}\s+(?:better|best|superior|preferable|preferred|stronger|winner|favou?rite)\b"
                ))?,
                build(format!(
                    r"(?:{marked})(?:['’]s(?:\s+\w+){{1,3}})?\s+(?:\w+ly\s+)?(?:wins|won|beats|outperforms|surpasses)\b"
                ))?,
                build(format!(
                    r"\b(?:choose|chose|pick|picked|prefer|select|selected|favou?r|go(?:ing)? with|go(?:ing)? for|vote for|opt for|lean(?:ing)? towards?|recommend|say)\s+{value}"
                ))?,
                build(format!(
                    r"\b(?:verdict|winner|choice|decision|preference|pick|conclusion|(?:better|best|preferred|winning|superior|stronger)(?:\s+{NOUN}|\s+one)?|final\s+answer)\s+(?:is|was|must be|goes to|would be)(?:\s+(?:clearly|therefore|thus|that|for))?\s*:?{value}"
                ))?,
                build(format!(
                    r"(?:^|[.!?,;:\n]\s*|\b(?:so|my|the|final|better|best)\s+)answer\s+is\s*:?{value}"
                ))?,
                build(format!(
                    r"(?P<a>{})|(?P<b>{})",
                    forms[0].above(&forms[1]),
                    forms[1].above(&forms[0])
                ))?,
                build(
                    r"(?P<tie>\bit(?:'|’|\si)s\s+a\s+(?:tie|draw)\b|\bare\s+(?:both\s+)?equally\s+\w+|\bneither\s+(?:\w+\s+)?is\s+better\b)"
                        .into(),
                )?,
            ],
            worse: build(format!(
                r"(?:{marked})(?:['’]s(?:\s+\w+){{1,3}})?\s+(?:(?:is|was|seems|appears){ADVERBS}\s+(?:worse|worst|inferior|weaker)|loses)\b"
            ))?,
            bold: build(format!(r"\*\*\s*(?:{})\s*[.:]?\s*\*\*", either(&Form::any)))?,
            mention: build(either(&Form::mentioned))?,
            phrases: Phrases::new()?,
        })
    }

    pub fn names(&self) -> &[String; 2] {
        &self.names
    }

    /// Reads what a judge wrote; `None` where no verdict can be made out.
    pub fn read(&self, said: Said<'_>) -> Option<Verdict> {
        let Said { text, end } = said.conclusion()?;
        if let Some(formal) = last(self.formal.iter().flat_map(|form| self.undenied(form, text))) {
            return Some(formal);
        }
        if let Some(line) = self.of_a_line(text) {
            return Some(line);
        }
        let claims = self.claims(text);
        match claims.as_slice() {
            [] => {}
            [first, rest @ ..] if rest.iter().all(|claim| claim.1 == first.1) => return Some(first.1),
            [.., (at, verdict)] => {
                let sentence = [sentence_before(text, *at), &text[*at..]].concat();
                return self.phrases.concluded.is_match(&sentence).then_some(*verdict);
            }
        }
        // What was cut off may name the other answer next.
        if end == End::Cut {
            return None;
        }
        only(self.bold.captures_iter(text)).or_else(|| self.mentioned(text))
    }

    /// As DataDreamer 0.46 reads: exactly one label occurs, letter by letter.
    pub fn occurring(&self, text: &str) -> Option<Verdict> {
        match (text.contains(&self.names[0]), text.contains(&self.names[1])) {
            (true, false) => Some(Verdict::A),
            (false, true) => Some(Verdict::B),
            _ => None,
        }
    }

    /// A last line that is a label; or a first line or sentence, where lines are not about one label each.
    fn of_a_line(&self, text: &str) -> Option<Verdict> {
        let label = |line: &str| self.alone.captures(line.trim()).and_then(|found| verdict(&found));
        if let Some(last) = lines(text).next_back().and_then(label) {
            return Some(last);
        }
        let headings: Vec<Verdict> = lines(text).filter_map(|line| verdict(&self.heading.captures(line)?)).collect();
        if headings.contains(&Verdict::A) && headings.contains(&Verdict::B) {
            return None;
        }
        let lead = || verdict(&self.lead.captures(text)?);
        lines(text).next().and_then(label).or_else(lead)
    }

    /// The only answer that is mentioned, unless wherever it is something is wrong with it.
    fn mentioned(&self, text: &str) -> Option<Verdict> {
        let sentence = |at: usize| [sentence_before(text, at), &text[at..]].concat();
        let blamed =
            |found: &Captures<'_>| found.get(0).is_none_or(|all| self.phrases.blamed.is_match(&sentence(all.start())));
        let mentions = || self.mention.captures_iter(text);
        only(mentions()).filter(|_| mentions().take(MENTIONS).any(|found| !blamed(&found)))
    }

    /// The sentences that say which answer is better, in their order.
    fn claims(&self, text: &str) -> Vec<Found> {
        let better = self.better.iter().flat_map(|form| self.undenied(form, text));
        let worse = self.undenied(&self.worse, text).map(|(at, verdict)| (at, verdict.swapped()));
        let mut claims: Vec<Found> = better.chain(worse).collect();
        claims.retain(|(at, _)| !self.phrases.doubted.is_match(before(text, *at)));
        claims.sort_by_key(|(at, _)| *at);
        claims
    }

    fn undenied<'a>(&'a self, form: &'a Regex, text: &'a str) -> impl Iterator<Item = Found> + 'a {
        form.captures_iter(text).filter_map(|found| {
            let all = found.get(0)?;
            let denied = self.phrases.denied.is_match(&text[all.end()..]);
            verdict(&found).filter(|_| !denied).map(|verdict| (all.start(), verdict))
        })
    }
}

impl Phrases {
    fn new() -> Result<Self, regex::Error> {
        Ok(Self {
            denied: Regex::new(
                r"(?i)^[\s*_`]*(?:is|was|does|did|has|would|could|can)?(?:\s+\w+){0,2}?\s*(?:n['’]t|\bnot|\bworse|\binferior|\bweaker|\bloses)\b",
            )?,
            doubted: Regex::new(
                r"(?i)(?:\b(?:whether|if|or|unless|while|although|though)|(?:n['’]t|\bnot|\bnever)(?:\s+\w+){0,2})\s+(?:the\s+)?$",
            )?,
            concluded: Regex::new(
                r"(?i)^[^.!?\n]*\b(?:overall|therefore|thus|so|hence|finally|ultimately|in conclusion|in summary|in the end|conclude|i\s+(?:\w+\s+){0,2}(?:choose|pick|prefer|select|go|vote|opt|lean|say))\b",
            )?,
            blamed: Regex::new(
                r"(?i)^[^.!?\n]*(?:\b(?:whether|not|never|neither|nor|worse|wrong|incorrect|inferior|weaker|fails?|lacks?|bad|poor)\b|n['’]t\b)",
            )?,
        })
    }
}

/// How one of the labels may be written.
struct Form {
    /// The label, unless it is a letter or two that a text may hold by chance.
    full: Option<String>,
    /// What tells it from the other: "A" of "Response A".
    short: Option<String>,
}

impl Form {
    fn of(names: &[String; 2]) -> [Self; 2] {
        let words = names.each_ref().map(|name| name.split_whitespace().collect::<Vec<_>>());
        let same = |(one, other): &(&&str, &&str)| one.eq_ignore_ascii_case(other);
        let first = words[0].iter().zip(&words[1]).take_while(same).count();
        let last = words[0].iter().rev().zip(words[1].iter().rev()).take_while(same).count();
        [0, 1].map(|i| {
            let brief = names[i].trim().chars().count() <= 2;
            let own = words[i].get(first..words[i].len().saturating_sub(last)).unwrap_or_default().join(" ");
            let own = own.trim_matches(|c: char| !c.is_alphanumeric());
            Self {
                full: (!brief).then(|| word(&names[i])),
                short: if brief {
                    Some(word(&names[i]))
                } else {
                    Some(own).filter(|own| first + last > 0 && !own.is_empty()).map(word)
                },
            }
        })
    }

    /// In any of its forms, short ones too.
    fn any(&self) -> String {
        either(self.full.clone(), self.short.as_ref().map(|short| format!(r"(?:{}|{short})\)?", with_noun(short))))
    }

    /// In a form that nothing else has: with a noun where it is short.
    fn named(&self) -> String {
        let short = self.short.as_ref().map(|short| format!(r"{}\)?", with_noun(&format!("(?-i:{short})"))));
        either(self.full.clone(), short)
    }

    /// Where a sentence speaks of it: a short one as it is written in the question.
    fn marked(&self) -> String {
        either(Some(self.named()), self.short.as_ref().map(|short| format!("(?-i:{short}){CLOSE_MARKS}")))
    }

    /// Wherever a text speaks of it: also behind the other, as in "Response A or B".
    fn mentioned(&self) -> String {
        let beside = |short: &String| format!(r"\b(?:or|and|vs\.?|versus|than|over)\s+(?-i:{short})");
        either(Some(self.named()), self.short.as_ref().map(beside))
    }

    /// A sentence that sets it above `other`.
    fn above(&self, other: &Self) -> String {
        let (this, other) = (self.marked(), other.marked());
        format!(
            r"{this}(?:\s[^.!?\n]{{0,60}}?\b(?:better|superior|stronger|preferable|more\s+(?:helpful|useful|accurate|correct|relevant|informative|complete|convincing))\b[^.!?\n]{{0,60}}?\b(?:than|to)|\s+over)\s+(?:the\s+|that\s+of\s+)?{other}"
        )
    }

    /// Where a verdict is expected: a short one is no article of the sentence that goes on.
    fn value(&self) -> String {
        let after = r#"(?:['’]s\b|[\s*_`"'“”’)\]}<>$.,;:!]*(?:$|\n)|[*_`"'“”’)\]}<>$.,;:!]|\s+(?:is|was|wins|won|because|since|as|over|due|for|by|and|with)\b|\s*[>(–—-])"#;
        let short = self.short.as_ref().map(|short| format!(r"(?:the\s+)?(?:{}|{short}){after}", with_noun(short)));
        either(self.full.as_ref().map(|full| format!(r"(?:the\s+)?{full}")), short)
    }
}

/// Emphasis that is closed behind a label.
const CLOSE_MARKS: &str = "[*_`\"'”)]*";

/// A short label behind a word for an answer; the border between them may be a `_`.
fn with_noun(short: &str) -> String {
    format!(r"\b{NOUN}[\s(\[*_#-]+{}", short.replacen(r"\b", "", 1))
}

fn either(one: Option<String>, other: Option<String>) -> String {
    let forms: Vec<String> = one.into_iter().chain(other).collect();
    format!("(?:{})", forms.join("|"))
}

/// A text at borders of words, whatever white space it has.
fn word(text: &str) -> String {
    let text = text.trim();
    let border = |c: Option<char>| if c.is_some_and(|c| c.is_alphanumeric() || c == '_') { r"\b" } else { "" };
    let words: Vec<String> = text.split_whitespace().map(regex::escape).collect();
    format!("{}{}{}", border(text.chars().next()), words.join(r"[\s_-]+"), border(text.chars().next_back()))
}

fn verdict(found: &Captures<'_>) -> Option<Verdict> {
    let of = [("a", Verdict::A), ("b", Verdict::B), ("tie", Verdict::Tie)];
    of.into_iter().find(|(name, _)| found.name(name).is_some()).map(|(_, verdict)| verdict)
}

fn last(found: impl Iterator<Item = Found>) -> Option<Verdict> {
    found.max_by_key(|(at, _)| *at).map(|(_, verdict)| verdict)
}

/// The verdict that all of them are.
fn only<'t>(mut found: impl Iterator<Item = Captures<'t>>) -> Option<Verdict> {
    let first = verdict(&found.next()?)?;
    found.all(|other| verdict(&other) == Some(first)).then_some(first)
}
