//! Finds which of two labels a text names as the better one.

use regex::{Captures, Regex};

use super::{CLOSE, End, OPEN, Said, before, lines, sentence_before};
use crate::judge::Verdict;

/// Nouns for an answer. A judge that was asked about "Response A" may write "Output A".
const NOUN: &str = "(?:response|answer|assistant|output|option|model|candidate|completion|choice|solution|reply|text)";

/// Words that introduce a verdict, as in "Verdict: A".
const VERDICT: &str = "(?:verdict|winner|answer|decision|choice|judge?ment|conclusion|preference|pick|selection|result\
    |outcome|better|best|preferred|chosen|winning|response|output)";

/// Words allowed before and after a word of [`VERDICT`].
const BEFORE: &str = r"(?:(?:so|thus|therefore|hence|overall|finally|ultimately|in conclusion|in summary)\b[,:]?\s+)?(?:(?:my|the|our|your|final|overall|better|best|preferred|winning|chosen|superior|correct)[\s_-]+){0,3}";
const BEHIND: &str = r"(?:[\s_-]+(?:label|id|response|answer|assistant|model|output|option|candidate|completion)){0,2}";

/// Phrases for a tie.
const TIE: &str = r"(?:it(?:'|’)?s\s+)?(?:a\s+)?(?:tie|tied|draw|equal)\b";

/// Adverbs allowed between "is" and "better".
const ADVERBS: &str = r"(?:\s+(?:the|a|an|also|still|clearly|much|far|slightly|somewhat|overall|definitely|generally|considerably|significantly|marginally|therefore|thus|bit|to|be|\w+ly)){0,4}";

/// The labels of two answers, and the patterns that find them in a text.
#[derive(Debug, Clone)]
pub struct Labels {
    names: [String; 2],
    /// Verdicts in a fixed form: `[[A]]`, `Verdict: A`, `A > B`.
    formal: Vec<Regex>,
    /// A whole line that is nothing but a label.
    alone: Regex,
    /// A label at the beginning of a line that is about one answer.
    heading: Regex,
    /// A label at the beginning of the text, as a sentence of its own or followed by a reason.
    lead: Regex,
    /// Sentences that prefer an answer; `worse` has sentences that call an answer worse.
    better: Vec<Regex>,
    worse: Regex,
    bold: Regex,
    mention: Regex,
    phrases: Phrases,
}

/// Words near a verdict that change its meaning.
#[derive(Debug, Clone)]
struct Phrases {
    /// Directly after a label: the label is not a verdict.
    denied: Regex,
    /// Directly before a sentence: the sentence is not a claim.
    doubted: Regex,
    /// In the last of several claims: this claim is the conclusion.
    concluded: Regex,
    /// In a sentence that only mentions an answer: the mention does not favour it.
    blamed: Regex,
}

/// Largest number of mentions that are examined.
const MENTIONS: usize = 20;

/// A verdict and the byte position where it begins.
type Found = (usize, Verdict);

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

    /// Reads a judge's text; `None` if it has no clear verdict.
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

    /// Reads as DataDreamer 0.46 does: exactly one label occurs, with the same upper and lower case.
    pub fn occurring(&self, text: &str) -> Option<Verdict> {
        match (text.contains(&self.names[0]), text.contains(&self.names[1])) {
            (true, false) => Some(Verdict::A),
            (false, true) => Some(Verdict::B),
            _ => None,
        }
    }

    /// Reads a last line that is a label; else a first line or sentence that is one, unless the text has headings for
    /// both labels.
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

    /// Returns the only answer that is mentioned, unless every mention is in a sentence with a negative word.
    fn mentioned(&self, text: &str) -> Option<Verdict> {
        let sentence = |at: usize| [sentence_before(text, at), &text[at..]].concat();
        let blamed =
            |found: &Captures<'_>| found.get(0).is_none_or(|all| self.phrases.blamed.is_match(&sentence(all.start())));
        let mentions = || self.mention.captures_iter(text);
        only(mentions()).filter(|_| mentions().take(MENTIONS).any(|found| !blamed(&found)))
    }

    /// Returns the claims (sentences that say which answer is better), in the order of the text.
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

/// Patterns for the ways to write one label.
struct Form {
    /// The whole label; `None` if it has only one or two characters, which may occur by chance.
    full: Option<String>,
    /// The part that differs from the other label: "A" of "Response A".
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

    /// Matches every form, including the short one alone.
    fn any(&self) -> String {
        either(self.full.clone(), self.short.as_ref().map(|short| format!(r"(?:{}|{short})\)?", with_noun(short))))
    }

    /// Matches unambiguous forms only: the short form needs a noun before it.
    fn named(&self) -> String {
        let short = self.short.as_ref().map(|short| format!(r"{}\)?", with_noun(&format!("(?-i:{short})"))));
        either(self.full.clone(), short)
    }

    /// Matches the label as the subject of a sentence; the short form must have the same case as in the question.
    fn marked(&self) -> String {
        either(Some(self.named()), self.short.as_ref().map(|short| format!("(?-i:{short}){CLOSE_MARKS}")))
    }

    /// Matches any mention of the label, also after the other label, as in "Response A or B".
    fn mentioned(&self) -> String {
        let beside = |short: &String| format!(r"\b(?:or|and|vs\.?|versus|than|over)\s+(?-i:{short})");
        either(Some(self.named()), self.short.as_ref().map(beside))
    }

    /// Matches a sentence that prefers this label to `other`.
    fn above(&self, other: &Self) -> String {
        let (this, other) = (self.marked(), other.marked());
        format!(
            r"{this}(?:\s[^.!?\n]{{0,60}}?\b(?:better|superior|stronger|preferable|more\s+(?:helpful|useful|accurate|correct|relevant|informative|complete|convincing))\b[^.!?\n]{{0,60}}?\b(?:than|to)|\s+over)\s+(?:the\s+|that\s+of\s+)?{other}"
        )
    }

    /// Matches the label where a verdict is expected. After the short form the phrase must end, so that the article
    /// "a" is not read as label A.
    fn value(&self) -> String {
        let after = r#"(?:['’]s\b|[\s*_`"'“”’)\]}<>$.,;:!]*(?:$|\n)|[*_`"'“”’)\]}<>$.,;:!]|\s+(?:is|was|wins|won|because|since|as|over|due|for|by|and|with)\b|\s*[>(–—-])"#;
        let short = self.short.as_ref().map(|short| format!(r"(?:the\s+)?(?:{}|{short}){after}", with_noun(short)));
        either(self.full.as_ref().map(|full| format!(r"(?:the\s+)?{full}")), short)
    }
}

/// Closing marks allowed after a label.
const CLOSE_MARKS: &str = "[*_`\"'”)]*";

/// Matches a noun for an answer and then the short label; they may be separated by `_`.
fn with_noun(short: &str) -> String {
    format!(r"\b{NOUN}[\s(\[*_#-]+{}", short.replacen(r"\b", "", 1))
}

fn either(one: Option<String>, other: Option<String>) -> String {
    let forms: Vec<String> = one.into_iter().chain(other).collect();
    format!("(?:{})", forms.join("|"))
}

/// Matches `text` as whole words, with any white space, `_` or `-` between them.
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

/// Returns the common verdict of all matches; `None` if they differ or there is none.
fn only<'t>(mut found: impl Iterator<Item = Captures<'t>>) -> Option<Verdict> {
    let first = verdict(&found.next()?)?;
    found.all(|other| verdict(&other) == Some(first)).then_some(first)
}
