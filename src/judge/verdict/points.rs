//! Reads the score from a judge's text.

use std::sync::LazyLock;

use regex::Regex;

use super::number::{Range, Value};
use super::plain::plain;
use super::sentences::{Begin, Sentence, sentences};
use super::{End, Said, object, pattern};

/// Nouns for what is scored.
const IT: &str = r"(?:(?:this|the|its)\s+(?:response|answer|output|completion|reply|text|assistant's\s+(?:response|answer))|it|this)";

/// Words that lead in a conclusion.
const LEAD: &str = r"(?:(?:overall|therefore|thus|so|hence|finally|in\s+(?:conclusion|summary|total|the\s+end)|all\s+in\s+all|to\s+(?:conclude|sum\s+up)|based\s+on\s+(?:this|these|the\s+(?:above|criteria|rubric))\b[^,.;:?!\d]{0,60}|(?:i\s+(?:think|believe|would\s+say)|i'd\s+say))\b[,:]?\s+){0,3}(?:on\s+a\s+scale\s+(?:of|from)\s+\S+\s*(?:to|-|–)\s*\S+?,\s+)?";

/// A heading of a score, as in "Final score (0 to 5):".
static HEADING: LazyLock<Regex> = LazyLock::new(|| {
    pattern(&format!(
        r"^{LEAD}(?P<name>(?:(?:the|my|our|a|final|overall|total)[\s_-]+)*(?:score|rating|grade|mark|points|total(?:[\s_-]+points)?|overall|verdict|answer|final))(?:\s+for\s+{IT}|\s+of\s+{IT})?(?:(?P<scale>\s*[(\[][^()\[\]\n]{{0,60}}[)\]]|\s+(?:on|from|out\s+of|in|between)\b[^\n:=.]{{0,60}}?)?\s*(?:(?:is|was|equals|comes\s+to|would\s+be|of)\b\s*:?|[:=→]|->|=>|\s[-–—]\s)\s*|(?P<space>\s+))"
    ))
});

/// A sentence that gives a score, as in "I would give it a 4".
static TOLD: LazyLock<Regex> = LazyLock::new(|| {
    pattern(&format!(
        r"^{LEAD}(?:(?:i|we)(?:'d|'ll|\s+would|\s+will)?\s+(?:therefore\s+|thus\s+)?(?:give|rate|score|assign|award|grade)\s+(?:{IT}\s+)?(?:with\s+|at\s+|as\s+)?|{IT}\s+(?:earns|deserves|gets|receives|merits|warrants|scores)\s+|(?P<is>{IT}\s+is\s+))(?:(?:a|an|the)\s+)?(?:(?:final\s+|overall\s+|total\s+)?(?:score|rating|grade|mark|total)\s+of\s+)?"
    ))
});

/// The end of a sentence that adds points up.
static ADDED: LazyLock<Regex> = LazyLock::new(|| {
    pattern(&format!(
        r"^(?:(?:i|we)\s+(?:give|award|assign)|{IT}\s+(?:earns|gets|receives|scores))\b.*\bpoints?\b.*\bfor\s+a\s+total\s+(?:score\s+)?of\s+"
    ))
});

/// A line that announces the score of the next one.
static ANNOUNCES: LazyLock<Regex> = LazyLock::new(|| {
    pattern(&format!(
        r"^{LEAD}(?:(?:the|my|our|final|overall|total)\s+)*(?:score|rating|grade|mark|points|total(?:\s+points)?|answer|verdict)(?:\s+for\s+{IT})?(?:\s+is)?$"
    ))
});

/// Words that may follow a score in its sentence: a unit, a remark, a reason.
static TAIL: LazyLock<Regex> = LazyLock::new(|| {
    pattern(
        r"^[\s\])}>]*(?:(?:points?|stars?)\b)?[\s\])}>]*(?:overall\b)?[\s\])}>]*(?P<remark>\(\s*(?:(?:(?:very|quite|fairly|pretty|mostly|rather)\s+)?(?:good|excellent|perfect|fair|poor|bad|average|adequate|acceptable|ok(?:ay)?|strong|weak|decent|solid|satisfactory|great|outstanding|correct|useful|helpful|complete|incomplete|useless|irrelevant|relevant|points?|stars?)\s*\)|(?:because|since|as|it|its|the\s+(?:response|answer|reference)|reference|lacks|missing|could|would|maximum|max|highest)\b[^()]*\))|\s?[-–—]\s+[^\d].*|,?\s*(?:because|since|due\s+to|given\s+that|as\s+(?:it|its|the|one|there|this|some)|with)\b.*)?$",
    )
});

/// Remarks whose numbers are not the score.
static ASIDE: LazyLock<Regex> = LazyLock::new(|| {
    pattern(
        r"^\(\s*(?:(?:it\s+)?(?:could|would)\s+(?:be|have\s+been|get|score)\b.*\b(?:with|if)\b|(?:the\s+)?(?:reference|maximum|max|highest|perfect|previous|confidence|average|mean)\b)",
    )
});

/// Words with which a score is taken back, denied or changed.
static TAKES_BACK: LazyLock<Regex> = LazyLock::new(|| {
    pattern(
        r"\b(?:wait|actually|hm+|no[,.:?!]|no$|nope|second\s+thoughts?|reflection|corrections?|corrected|instead|rather|revis\w+|retract\w*|withdraw\w*|scratch|strike|oops|sorry|apolog\w+|mistak\w+|chang\w+|reconsider\w*|re-?evaluat\w*|adjust\w*|deduct\w*|subtract\w*|minus|penal\w+|lower\w*|rais\w+|downgrad\w+|upgrad\w+|reduc\w+|increas\w+|cut\s+(?:it|that)|too\s+(?:high|low|generous|harsh|lenient|strict|kind)|should\s+(?:be|have\s+been|get|have\s+got)\s+(?:an?\s+)?(?:\d|lower|higher|more|less|closer|at\b|zero|one|two|three|four|five)|ought|settl\w+|mak\w+\s+(?:it|that)|tak\w+\s+(?:it|that|this)?\s*back|go\s+with|going\s+with|contrary|kidding|jok\w+|not\s+(?:warranted|justified|deserved|correct|right|fair|final|the\s+score)|new|updat\w+|amend\w*|drop\w*|bump\w*|forget|ignore\s+(?:that|this|the\s+above)|unless|provided|false|untrue|test)\b|→|->|~~",
    )
});

/// Sentences whose numbers are not the score: they tell what another score or text is.
static OTHERS: LazyLock<Regex> = LazyLock::new(|| {
    pattern(
        r"\b(?:would|could|it'd)\b.*\b(?:with|needs?|need|more|if|requires?|had|without)\b|\b(?:with|if|had)\b.*\b(?:would|could|it'd)\b|\b(?:perfect|ideal|better|complete)\s+(?:answer|response|score|one|output)\b|\b(?:maximum|max|highest|lowest|minimum|possible|top|full)\s+(?:score|rating|points|marks?|grade)\b|\bcorrect\s+(?:answer|result|value|number)\b|\breference\b|^(?:-\s*)?(?:initial|previous|first|confidence|baseline|average|human|relevance|clarity|accuracy|style|tone|grammar|coverage|completeness|helpfulness|correctness|usefulness|depth|detail|coherence|conciseness|fluency|creativity|safety|factuality|structure|readability|quality|length)(?:\s+(?:score|rating|grade))?(?:\s*[:=]|\s+-\s|\s+is\b)|\bpoints?\s+\d+\s*[-–]\s*\d+",
    )
});

/// The beginning of a sentence that may follow a score: it is about the response, or it is a heading or an item.
static REMARK: LazyLock<Regex> = LazyLock::new(|| {
    pattern(
        r"^(?:(?:however|also|although|while|in\s+addition|additionally|furthermore|moreover),?\s+)?(?:it\b|this\s+(?:response|answer|output|completion|reply|text)\b|its\b|it's\b|the\s+(?:\w+\s+)?(?:response|answer|output|author|writer|text|reply|model|assistant|explanation|structure|tone|style|language|content|facts?|information|details?|examples?|points|total|user|prompt|question|maximum|highest|reference|correct|other|first|second|last|main)\b|this\s+is\s+because\b|an?\s|with\b|because\b|since\b|there\b|both\b|also\b|overall,|note\b|(?:brief\s+)?(?:reason\w*|explanation|justification|rationale|breakdown|feedback|comments?|remarks?|strengths?|weaknesses|pros|cons|notes?)\b|(?:some|several|many|most|all|minor|part)\b|(?:very\s+|quite\s+)?(?:excellent|good|great|perfect|poor|weak|well\s+done|solid|decent)(?:\s+(?:response|answer|work|job))?$)",
    )
});

/// Words for the score itself. A sentence with one of them may be about the score that stands before it.
static SCORE: LazyLock<Regex> = LazyLock::new(|| {
    pattern(
        r"\b(?:scor\w+|rating|rated|grade|verdict|number|mark|point\s+off|points\s+off|off\s+for|above|opposite|other\s+way|los(?:es?|ing|t)|earns?|deserves?|gains?|(?:one|two|three|point)\s+(?:less|more))\b",
    )
});

/// Numbers that a sentence after the score may hold: they count something, or name a range or a part.
static COUNTED: LazyLock<Regex> = LazyLock::new(|| {
    pattern(
        r"\b(?:points?|steps?|parts?|items?|lines?|rules?|criteri(?:on|a)|questions?|sections?|paragraphs?|examples?)\s+\d+\b|\b\d+(?:\.\d+)?\s*(?:%|[a-z]+)|\b\d+(?:st|nd|rd|th)\b",
    )
});
static UNIT: LazyLock<Regex> =
    LazyLock::new(|| pattern(r"\d\s*(?:points?|stars?|pts?|out\s+of|of|is|was|and|or|it|for|as|instead)\b"));
static DIGITS: LazyLock<Regex> = LazyLock::new(|| pattern(r"-?\d+(?:\.\d+)?"));
/// A number as a word that counts nothing.
static WORDED: LazyLock<Regex> = LazyLock::new(|| {
    pattern(
        r"\b(?:say|said|is|be|been|was|an?|it|to|give|gave|make|made|at|or|than)\s+(?:zero|one|two|three|four|five|six|seven|eight|nine|ten)\b(?:$|[,.;:)]|\s+(?:points?|stars?|instead|it|is)\b)",
    )
});

/// A question about a score.
static ASKED: LazyLock<Regex> = LazyLock::new(|| pattern(r"\b(?:scor\w+|rate|rating|grade|points)\b"));

/// Things that a total may count.
static ERRORS: LazyLock<Regex> =
    LazyLock::new(|| pattern(r"\b(?:errors?|mistakes?|words?|facts?|issues?|flaws?|faults?|sentences|examples)\b"));

/// The scale on which scores are read.
#[derive(Debug, Clone)]
pub struct Points {
    range: Range,
}

/// A score that a sentence gives.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Given {
    score: f64,
    form: Form,
    /// True if it is marked as the final one.
    last: bool,
    /// True if more than the number follows it in its sentence.
    ended: bool,
    /// True if it is a sum that may go on.
    sum: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Form {
    /// A heading and a number, or a number in double brackets.
    Fixed,
    /// A number alone on its line.
    Alone,
    /// A sentence.
    Told,
}

impl Points {
    pub fn new([low, high]: [i64; 2]) -> Self {
        Self { range: Range { low: low as f64, high: high as f64 } }
    }

    /// Reads a judge's text; `None` if it has no clear score on the scale.
    pub fn read(&self, said: Said<'_>) -> Option<f64> {
        let said = said.conclusion()?;
        match object::in_text(said, |object| self.of_object(object)) {
            object::Found::Nothing => self.of_sentences(said),
            object::Found::Unclear => None,
            object::Found::Value { value, before, after } => {
                let earlier = self.of_sentences(Said::finished(before));
                let agrees = earlier.is_none_or(|earlier| earlier == value) && !DENIED.is_match(before);
                let text = plain(after);
                let agrees =
                    agrees && !after.trim_start_matches([' ', '\t']).starts_with(['?', '%', '/', '-', '–', '—']);
                (agrees && sentences(&text).iter().all(|rest| self.is_remark(rest))).then_some(value)
            }
        }
    }

    /// Reads a text that is only a score, such as a match of the user's `parse`.
    pub fn of_line(&self, said: Said<'_>) -> Option<f64> {
        let text = plain(said.text);
        let given = self.alone(text.trim().trim_end_matches(['.', '!']))?;
        let open = said.end == End::Cut && !given.ended && self.grows(given.score);
        Some(given.score).filter(|_| !open)
    }

    fn of_sentences(&self, said: Said<'_>) -> Option<f64> {
        let text = plain(said.text);
        let all = sentences(&text);
        let given: Vec<(usize, Given)> = (0..all.len()).filter_map(|at| Some((at, self.given(&all, at)?))).collect();
        let decided = given.iter().rfind(|(_, given)| given.last);
        let (at, last) = *decided.or_else(|| given.last())?;
        let agrees = given.iter().all(|(_, other)| outweighs(&last, other));
        let whole = said.end == End::Finished || self.is_whole(&text, &all, at, &last);
        let told = all.iter().all(|sentence| self.range.is_told(sentence.text));
        // "I would give it a 4. However, ..." may not give it.
        let turned = last.form == Form::Told && all[at + 1..].iter().any(|rest| CONTRAST.is_match(rest.text));
        let settled = !turned && agrees && whole && told && all[at + 1..].iter().all(|rest| self.is_remark(rest));
        settled.then_some(last.score)
    }

    /// Returns the score that a sentence gives.
    fn given(&self, all: &[Sentence<'_>], at: usize) -> Option<Given> {
        let sentence = all[at];
        if sentence.is_long() || sentence.end == Some('?') {
            return None;
        }
        let text = sentence.text;
        let before = at.checked_sub(1).map(|before| &all[before]);
        let headed = self.headed(text).filter(|_| follows(before, &sentence));
        let given = headed.or_else(|| self.told(text).filter(|_| !sentence.item));
        let alone = || self.alone(text).filter(|_| !sentence.item && self.is_line(before, &sentence, all.get(at + 1)));
        given.or_else(alone).filter(|given| self.range.holds(given.score))
    }

    /// Reads a heading and its number.
    fn headed(&self, text: &str) -> Option<Given> {
        let found = HEADING.captures(text)?;
        let name = found.name("name")?.as_str().to_ascii_lowercase();
        let scored = ["score", "rating", "grade", "total"].iter().any(|word| name.contains(word));
        let colon = found.get(0)?.as_str().trim_end().ends_with([':', '=', '>', '→', '-', '–', '—']);
        if found.name("space").is_some() && !["score", "rating", "grade"].contains(&name.as_str()) || !scored && !colon
        {
            return None;
        }
        if found.name("scale").is_some_and(|scale| !self.range.is_between(scale.as_str())) {
            return None;
        }
        let last = ["final", "overall", "total"].iter().any(|word| name.contains(word));
        Some(Given { form: Form::Fixed, last, ..self.number(&text[found.get(0)?.end()..])?.0 })
    }

    /// Reads a sentence that gives a score.
    fn told(&self, text: &str) -> Option<Given> {
        if let Some(found) = TOLD.captures(text) {
            let (given, value) = self.number(&text[found.get(0)?.end()..])?;
            let clear = found.name("is").is_none() || value.out_of;
            return clear.then_some(given);
        }
        let added = ADDED.find(text)?;
        Some(self.number(&text[added.end()..])?.0)
    }

    /// Reads a text that is nothing but a number, or the stars of a score.
    fn alone(&self, text: &str) -> Option<Given> {
        let inner = text.trim_start_matches(['[', '<', '(', '{', ' ']);
        let score = |score| Given { score, form: Form::Alone, last: false, ended: false, sum: false };
        if let Some(stars) = self.stars(inner) {
            return Some(score(stars));
        }
        let value = self.range.value(inner)?;
        let bare = inner[value.end..].trim_matches([']', '>', ')', '}', ' ']);
        let bare =
            bare.is_empty() || ["point", "points", "star", "stars"].contains(&bare.to_ascii_lowercase().as_str());
        let form = if text.starts_with("[[") { Form::Fixed } else { Form::Alone };
        let digits = inner.starts_with(|c: char| c.is_ascii_digit() || c == '-');
        let ended = value.out_of || !inner.ends_with(|c: char| c.is_ascii_digit());
        (bare && digits && self.range.holds(value.score)).then_some(Given { form, ended, ..score(value.score) })
    }

    /// Counts stars; the empty ones must fill the scale up.
    fn stars(&self, text: &str) -> Option<f64> {
        let of = |marks: &[char]| text.chars().filter(|c| marks.contains(c)).count();
        let (full, empty) = (of(&['★', '⭐']), of(&['☆']));
        let only = full > 0 && text.chars().count() == full + empty;
        let fits = full as f64 <= self.range.high && (empty == 0 || (full + empty) as f64 == self.range.high);
        (only && fits && self.range.high == 5.0).then_some(full as f64)
    }

    /// Reads a number and what may follow it.
    fn number(&self, text: &str) -> Option<(Given, Value)> {
        let (open, value) = (text.trim_start(), self.range.value(text.trim_start_matches(['<', ' ']))?);
        let bracket = open.starts_with('<');
        let rest = &text.trim_start_matches(['<', ' '])[value.end..];
        if bracket && !(text.trim_end().ends_with('>')) {
            return None;
        }
        let tail = TAIL.captures(rest)?;
        let remark = tail.name("remark").map(|remark| remark.as_str());
        if remark.is_some_and(|remark| !self.is_aside(remark)) {
            return None;
        }
        let ended = value.out_of || !rest.trim().is_empty() || !text.ends_with(|c: char| c.is_ascii_digit());
        Some((Given { score: value.score, form: Form::Told, last: false, ended, sum: value.sum }, value))
    }

    /// Returns whether a remark leaves the score before it as it is.
    fn is_aside(&self, remark: &str) -> bool {
        let changes = TAKES_BACK.is_match(remark) || !self.range.is_told(remark);
        let dash = remark.trim_start().strip_prefix(['-', '–', '—']).map(str::trim_start);
        if dash.is_some_and(|text| !REMARK.is_match(text)) {
            return false;
        }
        let hypothetical = ASIDE.is_match(remark);
        let turned = !hypothetical && (remark.contains(|c: char| c.is_ascii_digit()) || CONDITION.is_match(remark));
        !changes && !turned && !remark.contains('?')
    }

    /// Returns whether a number stands alone on its line, and the lines around do not make it a number of something else.
    fn is_line(&self, before: Option<&Sentence<'_>>, sentence: &Sentence<'_>, after: Option<&Sentence<'_>>) -> bool {
        let begins = match before {
            None => true,
            Some(_) if sentence.begin == Begin::Sentence => false,
            Some(before) => {
                ANNOUNCES.is_match(before.text)
                    || (matches!(before.end, Some('.' | '!')) && self.alone(before.text).is_none())
                    || (before.item && sentence.begin == Begin::Paragraph && before.end != Some(':'))
            }
        };
        begins && after.is_none_or(|after| after.begin != Begin::Sentence && self.alone(after.text).is_none())
    }

    /// Returns whether a sentence after the score leaves it as it is.
    fn is_remark(&self, sentence: &Sentence<'_>) -> bool {
        let text = sentence.text;
        if self.headed(text).is_some_and(|given| !self.range.holds(given.score)) && text.starts_with("Score") {
            return false;
        }
        let asked = sentence.end == Some('?');
        if sentence.is_long() || asked || TAKES_BACK.is_match(text) {
            return false;
        }
        let other = OTHERS.is_match(text);
        let item = sentence.item && !text.starts_with(|c: char| c.is_ascii_digit());
        other || ((item || REMARK.is_match(text)) && !SCORE.is_match(text) && !self.has_score(text))
    }

    /// Returns whether a sentence has a number on the scale that does not count something.
    fn has_score(&self, text: &str) -> bool {
        let rest = if UNIT.is_match(text) { text.to_owned() } else { COUNTED.replace_all(text, "").into_owned() };
        let digits =
            || DIGITS.find_iter(&rest).any(|digits| digits.as_str().parse().is_ok_and(|score| self.range.holds(score)));
        WORDED.is_match(text) || digits()
    }

    /// Returns whether a text that was cut off could not have gone on to change the score.
    fn is_whole(&self, text: &str, all: &[Sentence<'_>], at: usize, given: &Given) -> bool {
        let at_end = at + 1 == all.len() && all[at].end.is_none() && !text.ends_with('\n');
        match given.form {
            Form::Told => false,
            Form::Alone if at > 0 => false,
            _ if !at_end => true,
            _ if given.sum => false,
            _ => (given.ended || !self.grows(given.score)) && !text.ends_with(['(', '-', ',']),
        }
    }

    fn grows(&self, score: f64) -> bool {
        score >= 1.0 && score * 10.0 <= self.range.high
    }

    /// Reads an object of JSON: a field for the whole score, else one for a score.
    fn of_object(&self, object: &object::Fields) -> object::Reading<f64> {
        const WHOLE: [&str; 12] = [
            "overallscore",
            "finalscore",
            "totalscore",
            "overallrating",
            "finalrating",
            "totalpoints",
            "overall",
            "total",
            "overallgrade",
            "finalgrade",
            "final",
            "totalrating",
        ];
        const SCORE: [&str; 6] = ["score", "rating", "grade", "points", "mark", "stars"];
        const MOST: [&str; 9] =
            ["maxscore", "maximum", "maximumscore", "max", "outof", "maxpoints", "scale", "scalemax", "denominator"];
        let other = |value: &serde_json::Value| self.field(value) != Some(self.range.high);
        const CHANGED: [&str; 10] =
            ["adjust", "revis", "correct", "new", "after", "updat", "actual", "deduct", "penal", "minus"];
        let scores = object.fields(&WHOLE).chain(object.fields(&SCORE)).next().is_some();
        if object.fields(&MOST).any(other) || (scores && object.mentions(&CHANGED)) {
            return object::Reading::Unclear;
        }
        let read = |names| object::agreed(object.fields(names).map(|value| self.field(value)));
        match read(&WHOLE) {
            object::Reading::Nothing => read(&SCORE),
            whole => whole,
        }
    }

    fn field(&self, value: &serde_json::Value) -> Option<f64> {
        match value {
            serde_json::Value::Number(number) => number.as_f64().filter(|score| self.range.holds(*score)),
            serde_json::Value::String(text) => self.of_line(Said::finished(text)),
            serde_json::Value::Object(inner) if inner.len() == 1 => {
                self.field(inner.get("value").or_else(|| inner.get("score"))?)
            }
            _ => None,
        }
    }
}

/// A line before an object that denies it or asks for it.
static DENIED: LazyLock<Regex> = LazyLock::new(|| {
    pattern(r"(?:\?|\b(?:not|never|wrong|false|doubt|format|example|instead\s+of|would)\b[^\n]*)[\s:`]*(?:json\s*)?$")
});

static CONTRAST: LazyLock<Regex> = LazyLock::new(|| pattern(r"^(?:however|but|although|while)\b"));

/// Words in a remark that put the score under a condition.
static CONDITION: LazyLock<Regex> = LazyLock::new(|| {
    pattern(
        r"\b(?:if|unless|or|maybe|perhaps|but|yet|although|though|except|otherwise|would|could|should|might|may|only\s+for|off|points?|marks?)\b",
    )
});

/// Returns whether the sentence before a heading leaves it a heading of a score.
fn follows(before: Option<&Sentence<'_>>, sentence: &Sentence<'_>) -> bool {
    static ANSWER: LazyLock<Regex> =
        LazyLock::new(|| pattern(r"^(?:the\s+|my\s+)?(?:answer|verdict|mark|points|total)\b"));
    let Some(before) = before else { return true };
    let counts = ANSWER.is_match(sentence.text) && ERRORS.is_match(before.text);
    let answers = before.end == Some('?') && !ASKED.is_match(before.text);
    let answer = sentence.text.get(..6).is_some_and(|word| word.eq_ignore_ascii_case("answer"));
    !counts && !answers && !answer
}

/// Returns whether a score counts although another one is given.
fn outweighs(last: &Given, other: &Given) -> bool {
    last.score == other.score || (last.last && !other.last) || (last.form == Form::Fixed && other.form == Form::Told)
}
