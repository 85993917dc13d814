//! The score that a text gives.

use regex::{Captures, Regex};

use super::{CLOSE, End, OPEN, Said, lines, sentence_before};

/// A number, and what behind it says how it is meant: a denominator, a sum, a range, a share.
const NUMBER: &str = concat!(
    r"(?P<number>[-−]?\d+(?:[.,]\d+)?)\b",
    r"(?P<sum>(?:\s*\+\s*\d+(?:\.\d+)?)+(?:\s*=\s*(?P<total>\d+(?:\.\d+)?)\b)?)?",
    r#"(?:[\s*_`"'\])}>]*(?:/|\bout\s+of\b)\s*[*_`]*(?P<most>\d+(?:\.\d+)?)\b)?"#,
    r"(?P<vague>\s*(?:%|[-–—]\s*\d|\b(?:to|or|percent)\s+\d|\bpercent\b))?",
);

/// What a judge calls its score.
const SCORE: &str = r"(?:\b|_)(?:score|rating|grade)\b";

/// What it may call it too, where a line or a sentence begins so: elsewhere these words are about the answer.
const HEADING: &str = r#"(?:^|[\n.!?;{,<>|"'`*#_(])[\s*_`#"'>-]*(?:(?:the|my|final|overall)\s+)*(?:total(?:\s+points)?|overall|mark|verdict|answer)\b"#;

/// What may stand between that word and the number: the scale, and what is scored.
const SCALE: &str = r#"["'*_`\]}]*(?:\s*[(\[][^()\[\]\n]{0,60}[)\]])?(?:\s+(?:on|from|out\s+of|in|for|of|given|awarded)\b[^\n:=.]{0,60}?)?["'*_`]*"#;

/// The scale and the ways in which a text gives a score on it.
#[derive(Debug, Clone)]
pub struct Points {
    low: f64,
    high: f64,
    /// In a form made for it: `Score: 4`, `[[4]]`, `\boxed{4}`, `"score": 4`.
    formal: [Regex; 3],
    /// A whole line that is nothing but a number.
    alone: Regex,
    /// Sentences: `I would give it a 4`, `4 out of 5`, `a score of 4`.
    told: [Regex; 3],
    /// In a sentence before a number, or behind it: it is not what is given.
    supposed: Regex,
    supposes: Regex,
}

impl Points {
    pub fn new([low, high]: [i64; 2]) -> Self {
        let build = |pattern: String| Regex::new(&format!("(?i){pattern}")).expect("a pattern of this module");
        let is = r#"\s*(?:(?:is|was|equals|comes\s+to)\b\s*:?|[:：=>→]|->|\n|\s[-–—]\s)\s*(?:(?:thus|therefore|clearly|a|an|only|just)\s+){0,2}"#;
        Self {
            low: low as f64,
            high: high as f64,
            formal: [
                build(format!("{SCORE}{SCALE}{is}{OPEN}{NUMBER}")),
                build(format!("{HEADING}{SCALE}\\s*[:：=>]{OPEN}{NUMBER}")),
                build(format!(r"(?:\[\[|\\boxed\s*\{{){OPEN}{NUMBER}")),
            ],
            alone: build(format!(r"^{OPEN}{NUMBER}{CLOSE}(?:points?|stars?)?{CLOSE}[.!]?{CLOSE}$")),
            told: [
                build(format!(
                    r"\b(?:(?:i|we)(?:['’]d|['’]ll|\s+would|\s+will)?\s+(?:\w+\s+)?(?:give|rate|score|assign|award|grade)|deserves|scores|earns|gets|receives|merits|warrants)\b[^.\n\d]{{0,60}}?{OPEN}{NUMBER}"
                )),
                build(NUMBER.to_owned()),
                build(format!(r"\b(?:score|rating|grade|total|points?)d?(?:\s+(?:of|at|is|would\s+be)|\s*[:=])?\s+{OPEN}{NUMBER}")),
            ],
            supposed: build(
                r"\b(?:max|maximum|highest|perfect|full|possible|top|lowest|minimum|would|could|might|if|instead\s+of)\b"
                    .into(),
            ),
            supposes: build(r"^[\s*_`]*(?:would|could|might|if|only\s+if|requires|means)\b".into()),
        }
    }

    /// Reads what a judge wrote; `None` where there is no score, or one that is off the scale.
    pub fn read(&self, said: Said<'_>) -> Option<f64> {
        let Said { text, end } = said.conclusion()?;
        let formal = || self.formal.iter().flat_map(|form| form.captures_iter(text));
        if let Some(found) = last(formal().filter(|found| self.is_given(text, found))) {
            return self.value(&found).filter(|score| !self.goes_on(text, end, &found, *score));
        }
        let alone = |line: &str| self.of_line(line);
        if end == End::Cut {
            let mut all = lines(text);
            return all.next().and_then(alone).filter(|_| all.next().is_none()).filter(|score| !self.grows(*score));
        }
        if let Some(score) = lines(text).next_back().and_then(alone).or_else(|| lines(text).next().and_then(alone)) {
            return Some(score);
        }
        let [given, out_of, scored] = &self.told;
        let found = last(given.captures_iter(text))
            .or_else(|| {
                let given = |found: &Captures<'_>| found.name("most").is_some() && self.is_given(text, found);
                last(out_of.captures_iter(text).filter(given))
            })
            .or_else(|| last(formal()))
            .or_else(|| last(scored.captures_iter(text)))?;
        self.value(&found)
    }

    /// The score that a short text is, as a pattern of the user's finds it.
    pub fn of_line(&self, line: &str) -> Option<f64> {
        self.value(&self.alone.captures(line.trim())?)
    }

    /// The number that was found, where it is one on the scale.
    fn value(&self, found: &Captures<'_>) -> Option<f64> {
        let part = |name: &str| found.name(name).map(|part| part.as_str());
        let number = |text: &str| text.replace(',', ".").replace('−', "-").parse::<f64>().ok();
        let another_scale = part("most").and_then(number).is_some_and(|most| most != self.high);
        if part("vague").is_some() || another_scale {
            return None;
        }
        let score = match (part("sum"), part("total")) {
            (Some(_), total) => number(total?)?,
            (None, _) => number(part("number")?)?,
        };
        (self.low..=self.high).contains(&score).then_some(score)
    }

    /// Whether the sentence gives the score and does not suppose one.
    fn is_given(&self, text: &str, found: &Captures<'_>) -> bool {
        let Some(all) = found.get(0) else { return false };
        !self.supposed.is_match(sentence_before(text, all.start())) && !self.supposes.is_match(&text[all.end()..])
    }

    /// Whether a text that was cut off behind its score may have been about to write another digit.
    fn goes_on(&self, text: &str, end: End, found: &Captures<'_>, score: f64) -> bool {
        let at_end = found.get(0).is_some_and(|all| all.end() == text.len());
        end == End::Cut && at_end && self.grows(score)
    }

    fn grows(&self, score: f64) -> bool {
        score >= 1.0 && score * 10.0 <= self.high
    }
}

fn last<'t>(found: impl Iterator<Item = Captures<'t>>) -> Option<Captures<'t>> {
    found.max_by_key(|found| found.get(0).map(|all| all.end()))
}
