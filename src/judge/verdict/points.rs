//! Reads the score from a judge's text.

use regex::{Captures, Regex};

use super::{CLOSE, End, OPEN, Said, lines, sentence_before};

/// A number with what may follow it: a sum, a denominator, a range or a percent sign.
const NUMBER: &str = concat!(
    r"(?P<number>[-−]?\d+(?:[.,]\d+)?)\b",
    r"(?P<sum>(?:\s*\+\s*\d+(?:\.\d+)?)+(?:\s*=\s*(?P<total>\d+(?:\.\d+)?)\b)?)?",
    r#"(?:[\s*_`"'\])}>]*(?:/|\bout\s+of\b)\s*[*_`]*(?P<most>\d+(?:\.\d+)?)\b)?"#,
    r"(?P<vague>\s*(?:%|[-–—]\s*\d|\b(?:to|or|percent)\s+\d|\bpercent\b))?",
);

/// Words for a score.
const SCORE: &str = r"(?:\b|_)(?:score|rating|grade)\b";

/// Words for a score that count only at the beginning of a line or a sentence; elsewhere they describe the answer.
const HEADING: &str = r#"(?:^|[\n.!?;{,<>|"'`*#_(])[\s*_`#"'>-]*(?:(?:the|my|final|overall)\s+)*(?:total(?:\s+points)?|overall|mark|verdict|answer)\b"#;

/// Text allowed between that word and the number: the scale, and what is scored.
const SCALE: &str = r#"["'*_`\]}]*(?:\s*[(\[][^()\[\]\n]{0,60}[)\]])?(?:\s+(?:on|from|out\s+of|in|for|of|given|awarded)\b[^\n:=.]{0,60}?)?["'*_`]*"#;

/// The scale, and the patterns that find a score on it in a text.
#[derive(Debug, Clone)]
pub struct Points {
    low: f64,
    high: f64,
    /// Scores in a fixed form: `Score: 4`, `[[4]]`, `\boxed{4}`, `"score": 4`.
    formal: [Regex; 3],
    /// A whole line that is nothing but a number.
    alone: Regex,
    /// Sentences: `I would give it a 4`, `4 out of 5`, `a score of 4`.
    told: [Regex; 3],
    /// Words before (`supposed`) or after (`supposes`) a number that mark it as hypothetical.
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

    /// Reads a judge's text; `None` if it has no score on the scale.
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

    /// Reads a text that is only a score, such as a match of the user's `parse`.
    pub fn of_line(&self, line: &str) -> Option<f64> {
        self.value(&self.alone.captures(line.trim())?)
    }

    /// Returns the number that was found; `None` if it is not on the scale.
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

    /// Whether the sentence states the score, and not a hypothetical one.
    fn is_given(&self, text: &str, found: &Captures<'_>) -> bool {
        let Some(all) = found.get(0) else { return false };
        !self.supposed.is_match(sentence_before(text, all.start())) && !self.supposes.is_match(&text[all.end()..])
    }

    /// Whether the text was cut off directly after the score, so that another digit could follow.
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
