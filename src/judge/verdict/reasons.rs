//! The sentences after a verdict that only give reasons for it.
//!
//! A sentence after a verdict may take it back in words that no list holds. So a sentence counts as a reason only if it is
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
        r"\b(?:no|not|never|none|nothing|neither|nor|nobody|cannot|without|wrong\w*|incorrect\w*|wors[et]|inferior|weak\w*|bad\w*|poor\w*|fail\w*|lack\w*|flaw\w*|err\w*|los(?:e|es|er|ers|ing|t)|reject\w*|eliminat\w+|discard\w*|least|less|miss\w*|hallucinat\w+|invent\w*|off-topic|too|problem\w*|issues?|avoid\w*|remov\w+|drop\w*|false|second|other|irrelevant\w*|useless|unhelpful|wordy|verbose|vague|dull|generic|confus\w*|mislead\w*|repetitive|rambl\w*|nonsense|myths?)\b|n't\b|❌|👎",
    )
});

/// Words that speak for an answer.
static FOR: LazyLock<Regex> = LazyLock::new(|| {
    pattern(
        r"\b(?:better|best|good|great|right\w*|correct\w*|superior|excellent\w*|perfect\w*|ideal\w*|true|truth\w*|fully|exact\w*|accurate\w*|more|most|well|stronger|strong|favou?r\w*|helpful\w*|useful\w*|ahead|deserves?|asked|clear\w*|all|everything|complete\w*|first|✅|👍)\b",
    )
});

/// Faults that turn into their opposite if what they lack is a fault.
static WANTS: LazyLock<Regex> = LazyLock::new(|| {
    pattern(
        r"\b(?:no|not|none|nothing|less|fewer|only|just|lacks|misses|ignores|omits|overlooks|fails|merely|restates|repeats)\b|n't",
    )
});

static ONLY: LazyLock<Regex> = LazyLock::new(|| pattern(r"\b(?:only|just|merely|restates|repeats)\b"));

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
    /// A comparison with the answer, or with "the other one".
    than: [Regex; 2],
    /// The content of an answer, if it may be an option of the question: "Response A says B".
    quotes: Regex,
}

/// A subject that is the chosen answer, or both.
static IT: LazyLock<Regex> = LazyLock::new(|| {
    pattern(&format!(r"^(?:its?|it's|this\s+(?:one|{NOUN})|both(?:\s+{NOUN}s)?(?:\s+are|\s+have)?|they)\b"))
});

/// Predicates for the chosen answer, after its subject.
static MERIT: LazyLock<Regex> = LazyLock::new(|| {
    pattern(
        r"^(?:\s*,)?\s*(?:(?:\w+ly|also|both|even|simply)\s+)?(?:(?:is|are|was|were)\s+(?:(?:a|an|the|also|both|very|quite|much|far|slightly|clearly|bit|\w+ly)\s+)*(?:more|most|better|clear(?:er|est)?|concise|short(?:er)?|brief|detailed|helpful|useful|direct|relevant|well|easy|easier|thorough|factual|polite|complete|correct|accurate|right|informative|specific|practical|engaging|natural|structured|organi[sz]ed|readable|precise|to\s+the\s+point|good|great|excellent|strong(?:er)?|focused|balanced|comprehensive|consistent|on\s+topic|simpler?|friendly|creative|logical|coherent|safe|honest|equally|similar|comparable|fine|fair)|has|have|gives?|names?|explains?|answers?|covers?|provides?|offers?|uses?|addresses|includes?|contains?|shows?|follows?|mentions?|states?|describes?|stays?|keeps?|makes?|presents?|lists?|cites?|solves?|meets?|captures?|focuses|demonstrates?|reads|sounds|remains|identifies|understands|respects|acknowledges|clarifies|supports|handles|delivers|conveys)\b",
    )
});

/// The other answer in a second clause, as in "It has an example, while Response B has none".
static CLAUSE: LazyLock<Regex> = LazyLock::new(|| pattern(r",?\s+(?:while|whereas|and|but)\s+"));

/// Questions and announcements that ask for the worse answer.
static ASKS: LazyLock<Regex> = LazyLock::new(|| {
    pattern(
        r"\b(?:which|who|what|name|named|pick|choose|select|identify|find|label|mark|task|must|should|have\s+to|asked|let\s+me|i\s+will|i'll|here\s+is|looking\s+for|say|is|one)\b.*\b(?:worse|worst|weak(?:er|est)|los(?:er|es|ing)|reject\w*|eliminat\w*|discard\w*|remov\w*|drop\w*|least|inferior|dismiss\w*|exclud\w*)\b|\b(?:worse|worst|weak(?:er|est)|loser|rejected|least|inferior)\b.*\bis\b",
    )
});

/// A judge that will not judge.
static DISCLAIMS: LazyLock<Regex> = LazyLock::new(|| {
    pattern(r"^as\s+an\s+ai\b.*\b(?:can't|cannot|can\s+not|don't|do\s+not)\s+(?:judge|have|hold|give)\b")
});

/// A line that shows how a verdict is written.
static EXAMPLE: LazyLock<Regex> = LazyLock::new(|| {
    pattern(r"^(?:(?:an?|the|for|output|answer|verdict)\s+)*(?:example|format|template|sample|e\.g)\b")
});

/// A title before a verdict.
static TITLE: LazyLock<Regex> = LazyLock::new(|| {
    pattern(
        r"^(?:(?:my|the|final|overall)\s+)*(?:analysis|evaluation|assessment|comparison|summary|conclusion|reasoning|explanation|overview|judge?ment|review|discussion)$",
    )
});

static SHORT: LazyLock<Regex> = LazyLock::new(|| pattern(r"^it's\b"));

/// A subject that is the other answer.
static OTHER: LazyLock<Regex> = LazyLock::new(|| pattern(&format!(r"^the\s+other(?:\s+(?:one|{NOUN}))?\b")));

/// Words between the other answer and what is said about it.
static ASIDE: LazyLock<Regex> = LazyLock::new(|| {
    pattern(r"^(?:,?\s*(?:on\s+the\s+other\s+hand|however|in\s+contrast|by\s+contrast|meanwhile),?)?\s+")
});

/// Predicates for the other answer: a fault, or that it is not as good.
static FAULT: LazyLock<Regex> = LazyLock::new(|| {
    pattern(
        r"^(?:only\s+|also\s+|simply\s+)?(?:(?:is|was)\s+(?:(?:also|very|rather|quite|a\s+bit|somewhat)\s+)?(?:too|wordy|wrong|vague|short|long|dull|generic|incomplete|incorrect|inaccurate|unclear|off[ -]topic|irrelevant|less|worse|repetitive|verbose|confusing|unhelpful|misleading|flawed|weaker|inferior|not\s+(?:as|very))|(?:is|does|has|gives)(?:n't|\s+not)\s+(?:as|very|answer|address|explain|mention|give|have|provide|name|follow|cover|any|an?)|(?:lacks|misses|ignores|omits|rambles|restates|(?:only|merely|just)\s+(?:restates|repeats)|(?:incorrectly|wrongly|falsely)\s+(?:says|states|claims|names|gives|identifies|answers|describes|assumes)|repeats|hallucinates|overlooks|misstates|misleads|loses\s+points)|fails\s+to|(?:has|contains|makes)\s+(?:no|an?\s+error|errors|mistakes|several\s+errors|many\s+errors|faults|things\s+up)|(?:gives|names|provides|mentions|offers|cites|lists|uses|includes|contains)\s+(?:(?:an?|some|many|several)\s+)?(?:no|none|nothing|less|fewer|(?:only|just)\s+(?:one|an?|two|half|part|some)|irrelevant|wrong|incorrect|vague|generic|false|outdated|unnecessary|confusing|errors|mistakes|error|mistake))\b",
    )
});

/// Matches a comparison at the end of a sentence.
fn than(names: &Names) -> String {
    format!(r"\s+than\s+(?:the\s+other(?:\s+(?:one|{NOUN}))?|{})$", names.noun())
}

impl Reasons {
    pub fn new(names: &[Names; 2]) -> Result<Self, regex::Error> {
        let build = |pattern: String| Regex::new(&format!("(?i){pattern}"));
        let [a, b] = names;
        Ok(Self {
            mentions: [build(a.mention())?, build(b.mention())?],
            subjects: [build(format!(r"^{}(?:'s\s+\w+)?", a.noun()))?, build(format!(r"^{}(?:'s\s+\w+)?", b.noun()))?],
            than: [build(than(a))?, build(than(b))?],
            quotes: build(format!(
                r"(?:{}|{})(?:'s\s+\w+)?\s*(?::|=|says?|said|gives?|gave|chooses?|chose|picks?|picked|selects?|selected|answers?|answered|states?|claims?|concludes?)\s*(?:option\s+|answer\s+)?\(?(?-i:[A-E])\b|\b(?:key|ground\s+truth|gold|reference|correct\s+(?:answer|option|choice))\b",
                a.noun(),
                b.noun()
            ))?,
        })
    }

    /// Returns whether the sentence only gives a reason for `verdict`. `cut` says that the sentence has no end.
    pub fn support(&self, sentence: &Sentence<'_>, verdict: Verdict, cut: bool) -> bool {
        if sentence.is_long() || sentence.end == Some('?') {
            return false;
        }
        let text = sentence.text;
        let text = HEADED.find(text).map_or(text, |heading| &text[heading.end()..]);
        let text = &SHORT.replace(text, "it is");
        if text.is_empty() {
            return true;
        }
        let (chosen, other) = match verdict {
            Verdict::A => (0, 1),
            Verdict::B => (1, 0),
            Verdict::Tie => return self.of_both(text),
        };
        if let Some(subject) = OTHER.find(text).or_else(|| self.subjects[other].find(text)) {
            return self.blame(&text[subject.end()..], cut);
        }
        let clauses = CLAUSE.find_iter(text).find_map(|and| {
            let rest = &text[and.end()..];
            let subject = OTHER.find(rest).or_else(|| self.subjects[other].find(rest))?;
            Some((&text[..and.start()], &rest[subject.end()..]))
        });
        match clauses {
            Some((merit, fault)) => self.praised(merit, chosen) && self.blame(fault, cut),
            None => self.praised(text, chosen),
        }
    }

    /// Returns whether a sentence is about the chosen answer and speaks for it.
    fn praised(&self, text: &str, chosen: usize) -> bool {
        let Some(subject) = IT.find(text).or_else(|| self.subjects[chosen].find(text)) else { return false };
        let said = self.than[1 - chosen].replace(&text[subject.end()..], "");
        let merit = said.trim().is_empty() || MERIT.is_match(&said);
        merit && !self.mentions[1 - chosen].is_match(&said) && !TAKES_BACK.is_match(&said) && !AGAINST.is_match(&said)
    }

    /// Returns whether what is said about the other answer speaks against it.
    fn blame(&self, rest: &str, cut: bool) -> bool {
        let said = ASIDE.find(rest).map_or(rest, |aside| &rest[aside.end()..]);
        if said.trim().is_empty() {
            return cut;
        }
        let Some(fault) = FAULT.find(said) else { return false };
        let rest = &said[fault.end()..];
        let turned = match (WANTS.is_match(fault.as_str()), ONLY.is_match(fault.as_str())) {
            (true, false) => AGAINST.is_match(rest),
            (true, true) => AGAINST.is_match(rest) || FOR.is_match(rest),
            (false, _) => FOR.is_match(rest),
        };
        !turned && !TAKES_BACK.is_match(rest)
    }

    /// Returns whether a sentence is about both answers, without a word for or against one.
    fn of_both(&self, text: &str) -> bool {
        let about = IT.find(text).is_some_and(|subject| MERIT.is_match(&text[subject.end()..]));
        let named = self.mentions.iter().any(|mention| mention.is_match(text));
        about && !named && !TAKES_BACK.is_match(text) && !AGAINST.is_match(text) && !text.contains("better")
    }

    /// Returns whether the sentence before a label may be about something other than the better answer, as in "The loser is
    /// clear. Response A".
    pub fn turns(&self, sentence: &Sentence<'_>) -> bool {
        let text = sentence.text;
        EXAMPLE.is_match(text) || (AGAINST.is_match(text) && !self.is_about(text) && !DISCLAIMS.is_match(text))
    }

    /// Returns whether a sentence may stand before a label in its line.
    pub fn introduces(&self, sentence: &Sentence<'_>) -> bool {
        let text = sentence.text;
        let whole = text.split_whitespace().count() > 3 && !text.ends_with(|c: char| c.is_ascii_digit());
        whole && (self.is_about(text) || DISCLAIMS.is_match(text))
    }

    /// Returns whether a sentence tells which option of the question is right or was chosen, so that "Answer: A" may be one.
    pub fn quotes(&self, sentence: &Sentence<'_>) -> bool {
        self.quotes.is_match(sentence.text)
    }

    /// Returns whether a sentence asks for the worse answer.
    pub fn ask_for_worse(&self, sentence: &Sentence<'_>) -> bool {
        ASKS.is_match(sentence.text) && !self.is_about(sentence.text)
    }

    /// Returns whether a sentence is a title that a verdict may follow.
    pub fn titles(&self, sentence: &Sentence<'_>) -> bool {
        TITLE.is_match(sentence.text)
    }

    fn is_about(&self, text: &str) -> bool {
        self.subjects.iter().any(|subject| subject.is_match(text)) || IT.is_match(text)
    }
}
