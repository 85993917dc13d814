//! The sentences that state a choice between two labels.
//!
//! A sentence is read as a whole: words that lead in, a core that names a label, words that lead out. A sentence with
//! anything else in it states nothing, so a negation, a condition or a comparison that is not known is never skipped.

use std::sync::LazyLock;

use regex::{Captures, Regex};

use super::claims::{self, Build, Core};
use super::names::{NOUN, Names};
use super::pattern;
use super::sentences::Sentence;
use crate::judge::Verdict;

/// Words that lead in a conclusion.
static CONCLUDES: LazyLock<Regex> = LazyLock::new(|| {
    pattern(
        r"^(?:(?:so|and|but)\s+)?(?:(?:overall|therefore|thus|so|hence|finally|ultimately|consequently|accordingly|in\s+(?:conclusion|summary|short|sum|the\s+end)|to\s+(?:conclude|sum\s+up|summari[sz]e)|all\s+in\s+all|all\s+things\s+considered|on\s+balance|taken\s+together|as\s+a\s+result|on\s+(?:second\s+thought|reflection)|for\s+(?:this|these|that|those)\s+reasons?|i\s+(?:(?:therefore|thus|hence|must|would|can|have\s+to)\s+)?conclude(?:\s+that)?|(?:(?:the|my|final)\s+)+(?:verdict|conclusion|decision)\s+is\s+that)\b[,:]?|after\s+(?:(?:careful|further|thorough|some)\s+)?(?:consideration|review|reviewing|comparison|comparing|evaluating|considering|weighing|analysis|analy[sz]ing)\b[^,.;:?!]{0,60},|(?:based\s+on|given|considering)\s+(?:this|that|these|those|the\s+above|all\s+this|my\s+analysis)\b[^,.;:?!]{0,60},)\s+",
    )
});

/// Words that lead in a statement.
static STATES: LazyLock<Regex> = LazyLock::new(|| {
    pattern(
        r"^(?:(?:i\s+(?:would\s+|will\s+)?|i'd\s+|i'll\s+)(?:think|believe|feel|find|say|judge)(?:\s+that)?|in\s+my\s+(?:opinion|view|judge?ment)|to\s+me|clearly|definitely|certainly|undoubtedly|probably|most\s+likely|well|okay|ok|sure|then)\b[,:]?\s+|^(?:of|between)\s+the\s+two(?:\s+\w+s)?,\s+",
    )
});

/// A heading of a verdict, as in "Final verdict: A".
const HEADING: &str = r"(?:(?:here\s+is|here's)\s+)?(?:(?:my|the|our|final|overall|better|best|preferred|winning|chosen|selected|superior|stronger)[\s_-]+){0,4}(?:verdict|winner|answer|reply|decision|choice|judge?ment|conclusion|preference|pick|selection|result|outcome|better|best|preferred|chosen|winning|response|output|favou?rite|vote)(?:[\s_-]+(?:label|id|response|answer|assistant|model|output|option|candidate|completion|one)){0,2}(?:\s+(?:is|goes\s+to))?(?:\s+as\s+follows)?";

/// A heading of the answer that is not chosen.
const LOSER: &str = r"(?:the\s+)?(?:loser|losing|rejected|worse|worst|weaker|inferior|less\s+preferred)(?:[\s_-]+(?:response|answer|assistant|model|output|option|candidate|completion|one))?(?:\s+is)?";

/// The mark between a heading and its verdict.
const COLON: &str = r"\s*(?:[:=→]|->|=>|\s[-–—]\s)\s*";

/// A line that announces the verdict of the next one.
static ANNOUNCES: LazyLock<Regex> = LazyLock::new(|| {
    pattern(&format!(
        r"^(?:{HEADING}|(?:(?:here\s+is|here's)\s+)?my\s+(?:evaluation|assessment)|(?:evaluation|assessment)|i\s+(?:would\s+)?(?:choose|pick|prefer|select)|which\s+(?:response|answer|output|one|is|of\s+the\s+two)\s+(?:is\s+)?(?:the\s+)?(?:answers\s+(?:it|the\s+prompt|the\s+question)\s+)?(?:better|best)(?:\s+{NOUN})?)$"
    ))
});

/// The statement of a sentence.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Statement {
    pub verdict: Verdict,
    pub form: Form,
    /// True if it is marked as a conclusion.
    pub concludes: bool,
    /// True if a reason follows, so that the statement has ended.
    pub reasoned: bool,
    /// True if it is a label and nothing else, with a heading or without.
    pub bare: bool,
    /// True if it chooses an answer and does not say for what: "I choose A", "Verdict: A".
    pub chooses: bool,
}

/// The form of a statement.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// A label or a tie, and nothing else.
    Label,
    /// A verdict in a fixed form: a heading and a label, or a label in double brackets.
    Fixed,
    /// A sentence that prefers one answer.
    Claim,
}

/// Words that lead in a statement.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Lead {
    None,
    /// Words for a conclusion.
    Conclusion,
    /// A clause that the statement outweighs.
    Clause,
}

/// Returns the sentence without the words that lead in.
fn without_words(text: &str) -> (&str, Lead) {
    let (mut rest, mut lead) = (text, Lead::None);
    for _ in 0..4 {
        let conclusion = CONCLUDES.find(rest);
        let Some(words) = conclusion.or_else(|| STATES.find(rest)) else { break };
        lead = if conclusion.is_some() { Lead::Conclusion } else { lead };
        rest = &rest[words.end()..];
    }
    (rest, lead)
}

/// The patterns of two labels.
#[derive(Debug, Clone)]
pub struct Grammar {
    label: Regex,
    heading: Regex,
    loser: Regex,
    claims: Vec<Core>,
    /// A comparison that counts as a conclusion only, as in "Overall, A is more helpful".
    summary: Core,
    /// Words that may follow a core that names a, b or a tie.
    tails: [Regex; 3],
    /// A clause before a comma that the main clause outweighs.
    concedes: Regex,
    turns: Regex,
    /// A first thought that is taken back in the same sentence.
    first: Regex,
}

impl Grammar {
    pub fn new(names: &[Names; 2]) -> Result<Self, regex::Error> {
        let build = |pattern: String| Regex::new(&format!("(?i){pattern}"));
        let [a, b] = names.each_ref().map(Names::noun);
        let either = |of: &dyn Fn(&Names) -> String| format!("(?:(?P<a>{})|(?P<b>{}))", of(&names[0]), of(&names[1]));
        let tie = r"(?P<tie>(?:(?:it's|it\s+is)\s+)?(?:a\s+)?(?:tie|draw)\b|tied\b|equal\b|neither\b|\[\[\s*c\s*\]\])";
        Ok(Self {
            label: build(format!("^(?:{}|{tie})", either(&Names::value)))?,
            heading: build(format!("^{HEADING}{COLON}"))?,
            loser: build(format!("^{LOSER}{COLON}{}$", either(&Names::value)))?,
            claims: claims::all(names, &build)?,
            summary: claims::summary(names, &build)?,
            tails: [tail(&build, names, Some(1))?, tail(&build, names, Some(0))?, tail(&build, names, None)?],
            concedes: build(format!(
                r"^(?:although|though|even\s+though|while|whereas)\s+(?:{a}|{b}|it|both)\b[^,.;:?!]{{0,200}},\s+"
            ))?,
            first: build(format!(
                r"^(?:at\s+)?first,?\s+(?:{}|{}),?\s+(?:but\s+|then\s+)?(on\s+(?:second\s+thought|reflection))",
                names[0].value(),
                names[1].value()
            ))?,
            turns: build(format!(
                r"^(?:{a}|{b}|both\s+{NOUN}s)\b[^,.;:?!]{{0,200}}?(?:,\s*(?:but|yet|so|hence|thus|therefore)|\s+but)\s+"
            ))?,
        })
    }

    /// Reads a sentence; `None` if it states nothing.
    pub fn read(&self, sentence: &Sentence<'_>) -> Option<Statement> {
        if sentence.is_long() || sentence.end == Some('?') {
            return None;
        }
        let (text, lead) = self.without_lead(sentence.text);
        let concludes = lead != Lead::None;
        if let Some(loser) = self.loser.captures(text) {
            let verdict = verdict(&loser)?.swapped();
            return Some(Statement {
                verdict,
                form: Form::Fixed,
                concludes,
                reasoned: false,
                bare: false,
                chooses: false,
            });
        }
        let led = text.len() < sentence.text.len();
        let read = match self.heading.find(text) {
            Some(heading) => {
                let behind = &text[heading.end()..];
                let (rest, lead) = self.without_lead(behind);
                let stated = self.core(rest, lead)?;
                let bare = stated.bare && !led && rest.len() == behind.len();
                let concludes = concludes || is_final(heading.as_str());
                let chooses = stated.chooses && !prefers(heading.as_str());
                Statement { form: Form::Fixed, concludes, bare, chooses, ..stated }
            }
            None => self.core(text, lead).map(|stated| Statement { concludes, bare: stated.bare && !led, ..stated })?,
        };
        (!sentence.item || read.form == Form::Fixed).then_some(read)
    }

    /// Returns whether the sentence is a heading of a verdict, without the verdict.
    pub fn announces(&self, sentence: &Sentence<'_>) -> bool {
        !sentence.is_long() && ANNOUNCES.is_match(self.without_lead(sentence.text).0)
    }

    /// Returns the sentence without what leads in, and what that was.
    fn without_lead<'t>(&self, text: &'t str) -> (&'t str, Lead) {
        let second = self.first.captures(text).and_then(|found| found.get(1));
        let (rest, lead) = without_words(second.map_or(text, |second| &text[second.start()..]));
        match self.concedes.find(rest).or_else(|| self.turns.find(rest)) {
            Some(clause) => (without_words(&rest[clause.end()..]).0, Lead::Clause),
            None => (rest, lead),
        }
    }

    /// Reads what follows the lead. After a clause only a sentence of its own counts: "all but A" names no winner.
    fn core(&self, text: &str, lead: Lead) -> Option<Statement> {
        let label = || self.label(text).filter(|_| lead != Lead::Clause);
        let summary = || self.claim_of(&self.summary, text).filter(|_| lead == Lead::Conclusion);
        label().or_else(|| self.claims.iter().find_map(|core| self.claim_of(core, text))).or_else(summary)
    }

    fn label(&self, text: &str) -> Option<Statement> {
        let found = self.label.captures(text)?;
        let form = if found.get(0)?.as_str().trim_start().starts_with("[[") { Form::Fixed } else { Form::Label };
        self.ended(text, &found, verdict(&found)?, form)
    }

    fn claim_of(&self, core: &Core, text: &str) -> Option<Statement> {
        let found = core.pattern.captures(text)?;
        let (words, named) = (found.get(0)?.as_str(), verdict(&found)?);
        let form = if words.contains("[[") { Form::Fixed } else { Form::Claim };
        let stated = self.ended(text, &found, named, form)?;
        let verdict = if core.worse { named.swapped() } else { named };
        Some(Statement { verdict, chooses: CHOICE.is_match(words) && !prefers(words), ..stated })
    }

    /// Returns the statement if what follows the core is known.
    fn ended(&self, text: &str, core: &Captures<'_>, named: Verdict, form: Form) -> Option<Statement> {
        let rest = &text[core.get(0)?.end()..];
        let tail = match named {
            Verdict::A => &self.tails[0],
            Verdict::B => &self.tails[1],
            Verdict::Tie => &self.tails[2],
        };
        let tail = tail.captures(rest)?;
        let reason = tail.name("reason").map(|reason| reason.as_str());
        if reason.is_some_and(|reason| TURNED.is_match(reason)) {
            return None;
        }
        Some(Statement {
            verdict: named,
            form,
            concludes: false,
            reasoned: reason.is_some(),
            bare: form != Form::Claim && rest.is_empty(),
            chooses: form != Form::Claim,
        })
    }
}

/// Words in a reason that may turn the statement before it.
static TURNED: LazyLock<Regex> = LazyLock::new(|| {
    pattern(
        r"\b(?:but|however|yet|although|though|unless|if|whether|wait|actually|hm+|instead|except|otherwise|or\s+(?:so|is)|no[,.!:]|nope|would|could|should|might|may|wrongly|mistakenly|supposed(?:ly)?|allegedly|apparently|not\s+(?:really|true|so)|wors[et]|los(?:er|es|ing)|reject\w*|least|told\s+to|asked\s+to|wait)\b|\?|\[\[",
    )
});

/// A sentence that chooses an answer.
static CHOICE: LazyLock<Regex> = LazyLock::new(|| {
    pattern(
        r"^(?:i|we|it|that)\b|\b(?:verdict|choice|decision|pick|vote|conclusion|answer)[,\w\s]*?\s(?:is|goes|must|would|was)\b|\bit\s+is$",
    )
});

/// Returns whether the words say that the chosen answer is the better one.
fn prefers(words: &str) -> bool {
    let words = words.to_ascii_lowercase();
    ["win", "better", "best", "prefer", "superior", "stronger", "favo"].iter().any(|word| words.contains(word))
}

/// Returns whether a heading marks the last word on the matter.
fn is_final(heading: &str) -> bool {
    let heading = heading.to_ascii_lowercase();
    ["final", "overall"].iter().any(|word| heading.contains(word))
}

/// Matches what may follow a core: the other label, words without weight, a reason.
fn tail(build: &Build<'_>, names: &[Names; 2], other: Option<usize>) -> Result<Regex, regex::Error> {
    let than = other.map_or(String::new(), |other| {
        let (noun, value) = (names[other].noun(), names[other].value());
        format!(
            r"(?:,?\s*(?:\(\s*)?(?:than|over|to|rather\s+than|instead\s+of|(?:and\s+)?not)\s+(?:that\s+of\s+)?(?:{noun}|{value})(?:\s+(?:does|is|did|was))?\)?)?"
        )
    });
    let subject = format!(
        r"(?:it|its|it's|they|both|this|the\s+(?:other|first|second|explanation|answer|response)|{}|{})\b",
        names[0].noun(),
        names[1].noun()
    );
    let reason = format!(r"(?:because(?:\s+of)?|due\s+to|thanks\s+to|since|as|given\s+that)\s+{subject}");
    build(format!(
        r"^{than}(?:,?\s+(?:overall|by\s+far|in\s+(?:every\s+way|every\s+respect|all\s+respects|general|this\s+case|my\s+(?:opinion|view))|on\s+(?:all\s+counts|the\s+whole)|here|of\s+the\s+two|for\s+this\s+(?:prompt|question|task)|as\s+(?:the|my)\s+(?:better|best|winner|winning|preferred|choice|pick)(?:\s+{NOUN}|\s+one)?))*[.!]*\s*[✅✔🏆🥇👍]*(?P<reason>\s*\(\s*{reason}[^()]*\)|,?\s+{reason}.*|,?\s+(?:because|for\s+(?:the\s+following|these|several|two|three)\s+reasons?)$)?$"
    ))
}

pub fn verdict(found: &Captures<'_>) -> Option<Verdict> {
    let of = [("a", Verdict::A), ("b", Verdict::B), ("tie", Verdict::Tie)];
    of.into_iter().find(|(name, _)| found.name(name).is_some()).map(|(_, verdict)| verdict)
}
