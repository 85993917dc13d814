//! The sentences that prefer an answer, as patterns.

use regex::Regex;

use super::names::{NOUN, Names};

/// Adverbs allowed before a comparison. None of them denies it.
const ADVERBS: &str = r"(?:\s+(?:the|a|a\s+(?:bit|lot|little)|by\s+far|clearly|much|far|slightly|somewhat|overall|definitely|generally|considerably|significantly|marginally|substantially|noticeably|easily|strongly|certainly|undoubtedly|obviously|ultimately|probably|likely|therefore|thus|then|simply|still)){0,3}";

/// Nouns for the answers, as the object of a sentence.
const TASK: &str = r"(?:it|this|that|(?:the|this|my|your)\s+(?:user's\s+)?(?:question|prompt|request|task|instructions?|query|problem|user))";

/// Adjectives that prefer an answer as a whole.
const MORE: &str = "(?:helpful|useful|accurate|correct|relevant|informative|complete|convincing|suitable|appropriate)";

/// Verbs that choose.
const CHOOSE: &str = r"(?:choose|chose|pick|picked|prefer|select|selected|favou?r|go\s+(?:with|for)|vote\s+for|voted\s+for|opt\s+for|opted\s+for|lean\s+towards?|recommend|say)";

/// Verbs for an answer that does what was asked.
const DOES: &str = "(?:answers|addresses|handles|explains|fulfil+s|satisfies|follows|serves|meets)";

/// Compiles a pattern that ignores case.
pub type Build<'a> = dyn Fn(String) -> Result<Regex, regex::Error> + 'a;

/// A pattern at the beginning of a sentence that names a verdict.
#[derive(Debug, Clone)]
pub struct Core {
    pub pattern: Regex,
    /// True if the label that it names is the worse one.
    pub worse: bool,
}

/// Parts of the patterns: the labels as words of a sentence.
struct Parts {
    /// Either label in a sentence, and where only a label can stand.
    noun: String,
    value: String,
    a: String,
    b: String,
    /// An answer, or its explanation, as the subject.
    subject: String,
    is: String,
}

impl Parts {
    fn of(names: &[Names; 2]) -> Self {
        let either = |of: &dyn Fn(&Names) -> String| format!("(?:(?P<a>{})|(?P<b>{}))", of(&names[0]), of(&names[1]));
        let noun = either(&Names::noun);
        Self {
            value: either(&Names::value),
            a: names[0].noun(),
            b: names[1].noun(),
            subject: format!(r"{noun}(?:'s\s+(?:explanation|{NOUN}))?\s+"),
            is: format!(r"(?:is|seems|appears|was){ADVERBS}\s+"),
            noun,
        }
    }

    /// Matches one label, `middle` and the other label.
    fn against(&self, middle: &str, end: &str) -> String {
        let Self { a, b, .. } = self;
        format!("^(?:(?P<a>{a}){middle}{b}{end}|(?P<b>{b}){middle}{a}{end})")
    }

    /// Matches two labels with a sign between them, in double brackets or not.
    fn compared(&self, sign: &str) -> String {
        let Self { a, b, .. } = self;
        format!(r"^(?:\[\[\s*)?(?:(?P<a>{a})\s*{sign}\s*{b}|(?P<b>{b})\s*{sign}\s*{a})(?:\s*\]\])?$")
    }
}

/// Returns the patterns of all sentences that prefer an answer or neither.
pub fn all(names: &[Names; 2], build: &Build<'_>) -> Result<Vec<Core>, regex::Error> {
    let parts = Parts::of(names);
    let core = |worse: bool| move |text: String| Ok(Core { pattern: build(text)?, worse });
    let better = better(&parts).into_iter().chain(chosen(&parts)).chain([tie(&parts)]).map(core(false));
    better.chain(worse(&parts).into_iter().map(core(true))).collect()
}

/// Returns a comparison that counts as a conclusion only, as in "Overall, A is more helpful".
pub fn summary(names: &[Names; 2], build: &Build<'_>) -> Result<Core, regex::Error> {
    let Parts { noun, .. } = Parts::of(names);
    let text = format!(r"^{noun}\s+is{ADVERBS}\s+(?:the\s+)?more\s+{MORE}\b(?:\s+(?:{NOUN}|one))?");
    Ok(Core { pattern: build(text)?, worse: false })
}

/// Sentences that say which answer is better.
fn better(parts: &Parts) -> Vec<String> {
    let Parts { noun, value, subject, is, .. } = parts;
    let which = format!(r"(?:\s+(?:{NOUN}|one)(?:\s+to\s+{TASK})?)?\b");
    let more = format!(r"more\s+{MORE}(?:(?:,|,?\s+and)\s+(?:more\s+)?{MORE}){{0,3}}");
    vec![
        format!(r"^{subject}{is}(?:better|best|superior|preferable|preferred|stronger|winner\b|favou?rite\b){which}"),
        format!(r"^{subject}(?:clearly\s+|easily\s+|therefore\s+|thus\s+)?(?:wins|won)\b"),
        parts.against(r"\s+(?:clearly\s+|easily\s+|far\s+)?(?:beats|outperforms|surpasses|outdoes)\s+", ""),
        parts.against(&format!(r"\s+{is}{more}\s+than\s+"), ""),
        parts.against(&format!(r"\s+{is}preferable\s+to\s+"), ""),
        parts.compared("[>≻]+"),
        parts.against(r"\s+over\s+", "$"),
        format!(r"^{noun}\s+{DOES}\s+{TASK}(?:\s+(?:much|far|clearly|slightly))?\s+(?:better|best)\b"),
        format!(r"^{noun}\s+better\s+{DOES}\s+{TASK}\b"),
        format!(r"^the\s+(?:one|{NOUN})\s+that\s+{DOES}\s+{TASK}\s+(?:better|best)\s+is\s+{value}"),
        format!(
            r"^{noun}\s+does\s+(?:a|the)\s+(?:(?:much|far|clearly|slightly)\s+)?(?:better|best)\s+job(?:\s+(?:of|at|with)\s+(?:(?:answering|addressing|explaining|following)\s+)?{TASK})?"
        ),
    ]
}

/// Sentences that choose an answer.
fn chosen(Parts { noun, value, .. }: &Parts) -> Vec<String> {
    let would = r"(?:(?:would|will|must|have\s+to|do|clearly|strongly|therefore|thus|still|slightly)\s+){0,2}";
    let choice = format!(
        r"(?:verdict|winner|choice|decision|preference|pick|vote|conclusion|favou?rite|(?:better|best|preferred|winning|superior|stronger)(?:\s+{NOUN}|\s+one)?(?:\s+of\s+the\s+two)?|final\s+answer|answer),?(?:\s+(?:though|then|therefore|however|overall),?)?"
    );
    vec![
        format!(r"^(?:i|we)(?:'d|'ll)?\s+{would}{CHOOSE}\s+{value}"),
        format!(r"^i(?:'m|\s+am)\s+(?:going\s+(?:with|for)|leaning\s+towards?)\s+{value}"),
        format!(
            r"^(?:(?:my|the|our|final|overall|clear)\s+)*{choice}\s+(?:is|goes\s+to|must\s+be|would\s+be|was)(?:\s+(?:clearly|therefore|thus|then|that|for))?\s*:?\s*{value}"
        ),
        format!(r"^(?:it's|it\s+is|that\s+is|that's)\s+{value}"),
        format!(r"^{noun}\s+it\s+is\b"),
    ]
}

/// Sentences that say which answer is worse.
fn worse(parts: &Parts) -> Vec<String> {
    let Parts { subject, is, .. } = parts;
    vec![
        format!(r"^{subject}{is}(?:worse|worst|inferior|weaker|loser\b)(?:\s+(?:{NOUN}|one))?\b"),
        format!(r"^{subject}loses\b"),
        parts.against(&format!(r"\s+{is}less\s+{MORE}\s+than\s+"), ""),
        parts.against(r"\s+(?:is\s+not|isn't)\s+(?:as|so|nearly\s+as)\s+(?:good|helpful|useful)\s+as\s+", ""),
        parts.against(r"\s+is\s+(?:clearly\s+)?(?:outperformed|beaten|surpassed|outdone)\s+by\s+", ""),
        parts.against(r"\s+falls\s+short\s+of\s+", "$"),
        parts.compared("[<≺]+"),
    ]
}

/// Sentences that prefer neither answer.
fn tie(Parts { a, b, .. }: &Parts) -> String {
    let both = format!(
        r"(?:both|they|both\s+(?:{NOUN}s|are)|both\s+of\s+them|the\s+(?:two\s+)?{NOUN}s|{a}\s+and\s+{b}|{b}\s+and\s+{a})"
    );
    let neither = format!(r"(?:one|{NOUN}|of\s+(?:them|the\s+two)|{a}\s+nor\s+{b}|{b}\s+nor\s+{a})");
    let equal = format!(r"(?:\[\[\s*)?(?:{a}\s*[=≈]+\s*{b}|{b}\s*[=≈]+\s*{a})(?:\s*\]\])?$");
    format!(
        r"^(?P<tie>(?:it's|it\s+is|this\s+is)\s+a\s+(?:tie|draw)\b|{both}(?:\s+are)?(?:\s+both)?\s+(?:tied?\b|equal\b|equally\s+\w+)|neither\s+(?:{neither}\s+)?is\s+(?:the\s+)?better\b|{equal})"
    )
}
