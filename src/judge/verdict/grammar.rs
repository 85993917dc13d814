//! The sentences that state a choice between two labels.
//!
//! A sentence is read as a whole: words that lead in, a core that names a label, words that lead out. A sentence with
//! anything else in it states nothing, so a negation, a condition or a comparison that is not known is never skipped.

use std::sync::LazyLock;

use regex::{Captures, Regex};

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
const HEADING: &str = r"(?:(?:here\s+is|here's)\s+)?(?:(?:my|the|our|final|overall|better|best|preferred|winning|chosen|superior|stronger)[\s_-]+){0,4}(?:verdict|winner|answer|decision|choice|judge?ment|conclusion|preference|pick|selection|result|outcome|better|best|preferred|chosen|winning|response|output|favou?rite|vote)(?:[\s_-]+(?:label|id|response|answer|assistant|model|output|option|candidate|completion|one)){0,2}(?:\s+(?:is|goes\s+to))?(?:\s+as\s+follows)?";

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

/// Adverbs allowed before a comparison. None of them denies it.
const ADVERBS: &str = r"(?:\s+(?:the|a|a\s+(?:bit|lot|little)|by\s+far|clearly|much|far|slightly|somewhat|overall|definitely|generally|considerably|significantly|marginally|substantially|noticeably|easily|strongly|certainly|undoubtedly|obviously|ultimately|probably|likely|therefore|thus|then|simply|still)){0,3}";

/// What is judged, as the object of a sentence.
const TASK: &str = r"(?:it|this|that|(?:the|this|my|your)\s+(?:user's\s+)?(?:question|prompt|request|task|instructions?|query|problem|user))";

/// Adjectives that prefer an answer as a whole.
const MORE: &str = "(?:helpful|useful|accurate|correct|relevant|informative|complete|convincing|suitable|appropriate)";

/// Verbs that choose.
const CHOOSE: &str = r"(?:choose|chose|pick|picked|prefer|select|selected|favou?r|go\s+(?:with|for)|vote\s+for|voted\s+for|opt\s+for|opted\s+for|lean\s+towards?|recommend|say)";

/// What a sentence states.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Statement {
    pub verdict: Verdict,
    pub form: Form,
    /// Whether it is marked as a conclusion.
    pub concludes: bool,
    /// Whether a reason follows, so that the statement has ended.
    pub reasoned: bool,
    /// Whether it is a label and nothing else, with a heading or without.
    pub bare: bool,
    /// Whether it chooses an answer and does not say for what: "I choose A", "Verdict: A".
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

/// A pattern at the beginning of a sentence that names a verdict.
#[derive(Debug, Clone)]
struct Core {
    pattern: Regex,
    /// Whether the label that it names is the worse one.
    worse: bool,
}

/// What leads in a statement.
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
    /// What may follow a core that names a, b or a tie.
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
            claims: claims(names, &build)?,
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

    /// Whether the sentence is a heading of a verdict, without the verdict.
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
        label().or_else(|| self.claim(text))
    }

    fn label(&self, text: &str) -> Option<Statement> {
        let found = self.label.captures(text)?;
        let form = if found.get(0)?.as_str().trim_start().starts_with("[[") { Form::Fixed } else { Form::Label };
        self.ended(text, &found, verdict(&found)?, form)
    }

    fn claim(&self, text: &str) -> Option<Statement> {
        self.claims.iter().find_map(|core| {
            let found = core.pattern.captures(text)?;
            let named = verdict(&found)?;
            let fixed = found.get(0)?.as_str().contains("[[");
            let stated = self.ended(text, &found, named, if fixed { Form::Fixed } else { Form::Claim })?;
            let verdict = if core.worse { named.swapped() } else { named };
            let chooses = found.get(0).is_some_and(|core| CHOICE.is_match(core.as_str()) && !prefers(core.as_str()));
            Some(Statement { verdict, chooses, ..stated })
        })
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

/// Whether the words say that the chosen answer is the better one.
fn prefers(words: &str) -> bool {
    let words = words.to_ascii_lowercase();
    ["win", "better", "best", "prefer", "superior", "stronger", "favo"].iter().any(|word| words.contains(word))
}

/// Whether a heading marks the last word on the matter.
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
        r"^{than}(?:,?\s+(?:overall|by\s+far|in\s+(?:every\s+way|every\s+respect|all\s+respects|general|this\s+case|my\s+(?:opinion|view))|on\s+(?:all\s+counts|the\s+whole)|here|of\s+the\s+two|for\s+this\s+(?:prompt|question|task)|as\s+(?:the|my)\s+(?:better|best|winner|winning|preferred|choice|pick)(?:\s+{NOUN}|\s+one)?))*[.!]*\s*[✅✔🏆🥇👍]*(?P<reason>\s*\(\s*{reason}[^()]*\)|,?\s+{reason}.*)?$"
    ))
}

/// Compiles a pattern that ignores case.
type Build<'a> = dyn Fn(String) -> Result<Regex, regex::Error> + 'a;

/// The sentences that prefer an answer.
fn claims(names: &[Names; 2], build: &Build<'_>) -> Result<Vec<Core>, regex::Error> {
    let either = |of: &dyn Fn(&Names) -> String| format!("(?:(?P<a>{})|(?P<b>{}))", of(&names[0]), of(&names[1]));
    let (value, noun) = (either(&Names::value), either(&Names::noun));
    let [a, b] = names.each_ref().map(Names::noun);
    let against = |middle: &str, end: &str| format!("^(?:(?P<a>{a}){middle}{b}{end}|(?P<b>{b}){middle}{a}{end})");
    let subject = format!(r"{noun}(?:'s\s+(?:explanation|{NOUN}))?\s+");
    let is = format!(r"(?:is|seems|appears|was){ADVERBS}\s+");
    let the_one = format!(r"(?:\s+(?:{NOUN}|one)(?:\s+to\s+{TASK})?)?\b");
    let better = [
        format!(
            r"^{subject}{is}(?:better|best|superior|preferable|preferred|stronger|(?:winner|favou?rite)\b){the_one}"
        ),
        format!(r"^{subject}(?:clearly\s+|easily\s+|therefore\s+|thus\s+)?(?:wins|won)\b"),
        against(r"\s+(?:clearly\s+|easily\s+|far\s+)?(?:beats|outperforms|surpasses|outdoes)\s+", ""),
        against(&format!(r"\s+{is}more\s+{MORE}(?:(?:,|,?\s+and)\s+(?:more\s+)?{MORE}){{0,3}}\s+than\s+"), ""),
        against(&format!(r"\s+{is}preferable\s+to\s+"), ""),
        format!(r"^(?:\[\[\s*)?(?:(?P<a>{a})\s*[>≻]+\s*{b}|(?P<b>{b})\s*[>≻]+\s*{a})(?:\s*\]\])?$"),
        against(r"\s+over\s+", "$"),
        format!(
            r"^{noun}\s+(?:answers|addresses|handles|explains|fulfil+s|satisfies|follows|serves|meets)\s+{TASK}(?:\s+(?:much|far|clearly|slightly))?\s+(?:better|best)\b"
        ),
        format!(
            r"^{noun}\s+does\s+(?:a|the)\s+(?:(?:much|far|clearly|slightly)\s+)?(?:better|best)\s+job(?:\s+(?:of|at|with)\s+(?:{TASK}|(?:answering|addressing|explaining|following)\s+{TASK}))?"
        ),
        format!(
            r"^(?:i|we)(?:'d|'ll)?\s+(?:(?:would|will|must|have\s+to|do|clearly|strongly|therefore|thus|still|slightly)\s+){{0,2}}{CHOOSE}\s+{value}"
        ),
        format!(r"^i(?:'m|\s+am)\s+(?:going\s+(?:with|for)|leaning\s+towards?)\s+{value}"),
        format!(
            r"^(?:(?:my|the|our|final|overall|clear)\s+)*(?:verdict|winner|choice|decision|preference|pick|vote|conclusion|favou?rite|(?:better|best|preferred|winning|superior|stronger)(?:\s+{NOUN}|\s+one)?(?:\s+of\s+the\s+two)?|final\s+answer|answer),?(?:\s+(?:though|then|therefore|however|overall),?)?\s+(?:is|goes\s+to|must\s+be|would\s+be|was)(?:\s+(?:clearly|therefore|thus|then|that|for))?\s*:?\s*{value}"
        ),
        format!(r"^(?:it's|it\s+is|that\s+is|that's)\s+{value}"),
        format!(
            r"^{noun}\s+better\s+(?:answers|addresses|handles|explains|fulfil+s|satisfies|follows|serves|meets)\s+{TASK}\b"
        ),
        format!(
            r"^the\s+(?:one|{NOUN})\s+that\s+(?:answers|addresses|handles|explains|fulfil+s|satisfies|follows|serves|meets)\s+{TASK}\s+(?:better|best)\s+is\s+{value}"
        ),
        format!(r"^{noun}\s+it\s+is\b"),
    ];
    let worse = [
        format!(r"^{subject}{is}(?:worse|worst|inferior|weaker|(?:loser)\b){the_one}"),
        format!(r"^{subject}loses\b"),
        against(&format!(r"\s+{is}less\s+{MORE}\s+than\s+"), ""),
        against(r"\s+(?:is\s+not|isn't)\s+(?:as|so|nearly\s+as)\s+(?:good|helpful|useful)\s+as\s+", ""),
        against(r"\s+is\s+(?:clearly\s+)?(?:outperformed|beaten|surpassed|outdone)\s+by\s+", ""),
        against(r"\s+falls\s+short\s+of\s+", "$"),
        format!(r"^(?:\[\[\s*)?(?:(?P<a>{a})\s*[<≺]+\s*{b}|(?P<b>{b})\s*[<≺]+\s*{a})(?:\s*\]\])?$"),
    ];
    let both = format!(
        r"(?:both|they|both\s+(?:{NOUN}s|are)|both\s+of\s+them|the\s+(?:two\s+)?{NOUN}s|{a}\s+and\s+{b}|{b}\s+and\s+{a})"
    );
    let neither = format!(r"(?:one|{NOUN}|of\s+(?:them|the\s+two)|{a}\s+nor\s+{b}|{b}\s+nor\s+{a})");
    let tie = format!(
        r"^(?P<tie>(?:it's|it\s+is|this\s+is)\s+a\s+(?:tie|draw)\b|{both}(?:\s+are)?(?:\s+both)?\s+(?:tied?\b|equal\b|equally\s+\w+)|neither\s+(?:{neither}\s+)?is\s+(?:the\s+)?better\b|(?:\[\[\s*)?(?:{a}\s*[=≈]+\s*{b}|{b}\s*[=≈]+\s*{a})(?:\s*\]\])?$)"
    );
    let core = |worse: bool| move |text: String| Ok(Core { pattern: build(text)?, worse });
    let all = better.into_iter().map(core(false)).chain(worse.into_iter().map(core(true)));
    all.chain([Ok(Core { pattern: build(tie)?, worse: false })]).collect()
}

pub fn verdict(found: &Captures<'_>) -> Option<Verdict> {
    let of = [("a", Verdict::A), ("b", Verdict::B), ("tie", Verdict::Tie)];
    of.into_iter().find(|(name, _)| found.name(name).is_some()).map(|(_, verdict)| verdict)
}
