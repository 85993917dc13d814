//! The sentences after a verdict that only give reasons for it.
//!
//! What follows a verdict may take it back in words that no list holds. So a sentence counts as a reason only if it is
//! about one of the answers and fits the verdict; any other sentence makes the text unreadable.

use std::sync::LazyLock;

use regex::Regex;

use super::names::{NOUN, Names};
use super::pattern;
use super::sentences::Sentence;
use crate::judge::Verdict;

/// Words with which a verdict is taken back, denied or put under a condition.
static TAKES_BACK: LazyLock<Regex> = LazyLock::new(|| {
    pattern(
        r"\b(?:wait|actually|hm+|however|but|yet|although|though|instead|rather|unless|if|except|otherwise|reconsider\w*|thoughts?|reflection|corrections?|corrected|revis\w+|retract\w*|withdraw\w*|tak\w+\s+(?:it|that|this)?\s*back|scratch|strike|oops|sorry|apolog\w+|mistak\w+|chang\w+|contrary|opposite|revers\w+|swap\w*|kidding|jok\w+|sarcas\w+|ironic\w*|false|untrue|no[,.:!]|no$|nope|would|could|should|might|may|must|seem\w*|suppos\w+|pretend\w*|imagin\w+|first\s+(?:thought|impression|sight|glance)|initial\w*|second\s+look|winner|wins|loser|loses|best|preferr?\w*|choose|pick|verdict|forget|ignore\s+(?:that|this|the\s+above)|test)\b|\?|\[\[",
    )
});

/// Words that speak against an answer.
static AGAINST: LazyLock<Regex> = LazyLock::new(|| {
    pattern(
        r"\b(?:no|not|never|none|nothing|neither|nor|nobody|cannot|without|wrong\w*|incorrect\w*|wors[et]|inferior|weak\w*|bad\w*|poor\w*|fail\w*|lack\w*|flaw\w*|err\w*|los(?:e|es|er|ers|ing|t)|reject\w*|eliminat\w+|discard\w*|least|less|miss\w*|hallucinat\w+|invent\w*|off-topic|too|problem\w*|issues?|avoid\w*|remov\w+|drop\w*|false|second|other|irrelevant\w*|useless|unhelpful)\b|n't\b|❌|👎",
    )
});

/// Words that speak for an answer.
static FOR: LazyLock<Regex> = LazyLock::new(|| {
    pattern(
        r"\b(?:better|best|good|great|right\w*|correct\w*|superior|excellent\w*|perfect\w*|ideal\w*|true|truth\w*|fully|exact\w*|accurate\w*|more|most|well|stronger|strong|favou?r\w*|helpful\w*|useful\w*|ahead|deserves?|asked|clear\w*|all|everything|complete\w*|first|✅|👍)\b",
    )
});

/// Headings of reasons, and the words that lead in a reason.
static HEADED: LazyLock<Regex> = LazyLock::new(|| {
    pattern(
        r"^(?:(?:brief\s+|short\s+)?(?:reason|reasons|reasoning|explanation|rationale|justification)\s*(?:[:=-]\s*|$)|here(?:'s|\s+is)\s+(?:why|my\s+reasoning)\s*:?\s*|(?:this\s+is\s+)?(?:because|since)\s+|in\s+contrast,?\s+|by\s+contrast,?\s+|meanwhile,?\s+|also,?\s+|and\s+)+",
    )
});

/// The patterns of two labels.
#[derive(Debug, Clone)]
pub struct Reasons {
    mentions: [Regex; 2],
    /// The answer as the subject of a sentence.
    subjects: [Regex; 2],
}

/// A subject that is the chosen answer, or both.
static IT: LazyLock<Regex> = LazyLock::new(|| {
    pattern(&format!(r"^(?:its?|it's|this\s+(?:one|{NOUN})|both(?:\s+{NOUN}s)?(?:\s+are|\s+have)?|they)\b"))
});

/// A subject that is the other answer.
static OTHER: LazyLock<Regex> = LazyLock::new(|| pattern(&format!(r"^the\s+other(?:\s+(?:one|{NOUN}))?\b")));

/// Words between the other answer and what is said about it.
static ASIDE: LazyLock<Regex> = LazyLock::new(|| {
    pattern(r"^(?:,?\s*(?:on\s+the\s+other\s+hand|however|in\s+contrast|by\s+contrast|meanwhile),?)?\s+")
});

/// What may be said about the other answer: a fault, or that it is not as good.
static FAULT: LazyLock<Regex> = LazyLock::new(|| {
    pattern(
        r"^(?:only\s+|also\s+|simply\s+)?(?:(?:is|was)\s+(?:(?:also|very|rather|quite|a\s+bit|somewhat)\s+)?(?:too|wordy|wrong|vague|short|long|dull|generic|incomplete|incorrect|inaccurate|unclear|off[ -]topic|irrelevant|less|worse|repetitive|verbose|confusing|unhelpful|misleading|flawed|weaker|inferior|not\s+(?:as|so|very))|(?:is|does|has|gives)(?:n't|\s+not)\s+(?:as|so|very|answer|address|explain|mention|give|have|provide|name|follow|cover|any|an?)|(?:lacks|misses|ignores|omits|rambles|repeats|hallucinates|overlooks|contradicts|misstates|misleads|loses\s+points)|fails\s+to|(?:has|contains|makes)\s+(?:no|an?\s+error|errors|mistakes|several\s+errors|many\s+errors|faults|things\s+up)|(?:gives|names|provides|mentions|offers|says|cites|lists)\s+(?:no|none|nothing|only|less|fewer|just))\b",
    )
});

impl Reasons {
    pub fn new(names: &[Names; 2]) -> Result<Self, regex::Error> {
        let build = |pattern: String| Regex::new(&format!("(?i){pattern}"));
        let [a, b] = names;
        Ok(Self {
            mentions: [build(a.mention())?, build(b.mention())?],
            subjects: [build(format!(r"^{}(?:'s\s+\w+)?", a.noun()))?, build(format!(r"^{}(?:'s\s+\w+)?", b.noun()))?],
        })
    }

    /// Whether the sentence only gives a reason for `verdict`. `cut` says that the sentence has no end.
    pub fn support(&self, sentence: &Sentence<'_>, verdict: Verdict, cut: bool) -> bool {
        if sentence.is_long() || sentence.end == Some('?') {
            return false;
        }
        let text = sentence.text;
        let text = HEADED.find(text).map_or(text, |heading| &text[heading.end()..]);
        if text.is_empty() {
            return true;
        }
        let (chosen, other) = match verdict {
            Verdict::A => (0, 1),
            Verdict::B => (1, 0),
            Verdict::Tie => return self.of_both(text),
        };
        let subject = OTHER.find(text).or_else(|| self.subjects[other].find(text));
        if let Some(subject) = subject {
            return self.blame(&text[subject.end()..], cut);
        }
        let about = IT.is_match(text) || self.subjects[chosen].is_match(text);
        about && !self.mentions[other].is_match(text) && !TAKES_BACK.is_match(text) && !AGAINST.is_match(text)
    }

    /// Whether what is said about the other answer speaks against it.
    fn blame(&self, rest: &str, cut: bool) -> bool {
        let said = ASIDE.find(rest).map_or(rest, |aside| &rest[aside.end()..]);
        if said.trim().is_empty() {
            return cut;
        }
        let Some(fault) = FAULT.find(said) else { return false };
        let denied = fault.as_str().contains("no") || fault.as_str().contains("n't");
        let rest = &said[fault.end()..];
        !TAKES_BACK.is_match(rest)
            && !(denied && AGAINST.is_match(rest))
            && !(!denied && self.praise(fault.as_str(), rest))
    }

    /// Whether the rest of a fault speaks for the answer, as in "is too good".
    fn praise(&self, fault: &str, rest: &str) -> bool {
        let comparison = fault.contains("less") || fault.contains("fewer") || fault.contains("fails");
        !comparison && FOR.is_match(rest)
    }

    /// Whether a sentence is about both answers, or about one without a word for or against it.
    fn of_both(&self, text: &str) -> bool {
        let about = IT.is_match(text) || self.subjects.iter().any(|subject| subject.is_match(text));
        about && !TAKES_BACK.is_match(text) && !AGAINST.is_match(text) && !text.contains("better")
    }

    /// Whether the sentence before a label may be about something other than the better answer, as in "The loser is
    /// clear. Response A".
    pub fn turns(&self, sentence: &Sentence<'_>) -> bool {
        let text = sentence.text;
        let about = self.subjects.iter().any(|subject| subject.is_match(text)) || text.starts_with("As an AI");
        AGAINST.is_match(text) && !about
    }

    /// Whether the sentence has a word against an answer.
    pub fn blames(&self, sentence: &Sentence<'_>) -> bool {
        sentence.is_long() || AGAINST.is_match(sentence.text) || TAKES_BACK.is_match(sentence.text)
    }
}
