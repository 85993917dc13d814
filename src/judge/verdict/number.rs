//! Reads the number of a score, with a sum, a denominator or a scale.

use std::sync::LazyLock;

use regex::{Captures, Regex};

use super::pattern;

/// A number in digits or as a word.
const NUMBER: &str = r"(?:-?\d+(?:\.\d+|,(?:0|00|25|5|50|75))?|zero|one|two|three|four|five|six|seven|eight|nine|ten)";

const UNIT: &str = r"(?:\s*(?:points?|pts?|stars?)\b)";

/// Words and marks allowed before the number.
static OPEN: LazyLock<Regex> = LazyLock::new(|| {
    pattern(
        r"^(?:\s*(?:[\[({]+|(?:a|an|only|just|about|approximately|around|thus|therefore|clearly|solid|strong|good|clear|full)\s))*\s*",
    )
});

/// A number; what is added, taken away or multiplied; what that makes.
static VALUE: LazyLock<Regex> = LazyLock::new(|| {
    let note = r"(?:\s*\([^()\d]{0,60}\))?";
    pattern(&format!(
        r"^(?P<number>{NUMBER})(?P<half>\s*½|\s+1/2\b|\s+and\s+a\s+half\b)?{UNIT}?(?P<terms>(?:{note}\s*(?:\+|plus|minus|[-–]|\*|×|x)\s*\d+(?:\.\d+)?{UNIT}?)+{note})?(?:\s*=\s*(?P<total>\d+(?:\.\d+)?){UNIT}?)?"
    ))
});

/// A denominator, as in "4 out of 5" and "4 (of 5)".
static MOST: LazyLock<Regex> = LazyLock::new(|| {
    pattern(&format!(
        r"^\s*[\](}}]*\s*\(?\s*(?:/|(?:out\s+of|of|von|sur|de|sobre|su|auf)\b)\s*(?:a\s+(?:possible|maximum|max|total)\s+(?:of\s+)?)?(?P<most>{NUMBER})(?:\.0)?{UNIT}?"
    ))
});

/// A scale, as in "on a scale of 1 to 5" and "(scale 1-5)".
static SCALE: LazyLock<Regex> = LazyLock::new(|| {
    pattern(
        r"\bscale\b[^\d\n]{0,20}(?P<low>-?\d+)\s*(?:to|-|–|through|\.\.)\s*(?P<high>\d+)\b|\b(?P<points>\d+|five|ten)(?:-point\b|\s+point\s+scale)|\bout\s+of\s+(?P<most>\d+|ten)\b|\b(?:max(?:imum)?|highest|best|top)\b\.?(?:\s+(?:possible\s+)?(?:score|rating|points?|grade))?\s*(?:is|of|:|=)?\s*(?P<top>\d+|ten)\b|\b(?P<cap>\d+|ten)\s+(?:is\s+)?(?:the\s+)?(?:max(?:imum)?|highest|best)\b",
    )
});

/// Words and numbers that may stand between "Score" and its number.
static BETWEEN: LazyLock<Regex> = LazyLock::new(|| {
    pattern(&format!(
        r"^\s*(?:[(\[]\s*)?(?:(?:on|in|from|out\s+of|between|scale|range|points?|a|the|of|max(?:imum)?)\s*:?\s*)*(?:(?P<low>{NUMBER})\s*(?:to|-|–|through|and|\.\.)\s*)?(?P<high>{NUMBER}){UNIT}?\s*[)\]]?$"
    ))
});

/// A number as it was written.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Value {
    pub score: f64,
    /// True if a denominator was written.
    pub out_of: bool,
    /// True if it is a sum without its result.
    pub sum: bool,
    /// The place where the text goes on.
    pub end: usize,
}

/// The lowest and the highest score.
#[derive(Debug, Clone, Copy)]
pub struct Range {
    pub low: f64,
    pub high: f64,
}

impl Range {
    pub fn holds(&self, score: f64) -> bool {
        (self.low..=self.high).contains(&score)
    }

    /// Reads the number at the beginning of `text`; `None` if there is none, it is not clear or its denominator is
    /// that of another scale.
    pub fn value(&self, text: &str) -> Option<Value> {
        let start = OPEN.find(text).map_or(0, |open| open.end());
        let found = VALUE.captures(&text[start..])?;
        let score = of(&found)?;
        let mut end = start + found.get(0)?.end();
        let sum = found.name("terms").is_some() && found.name("total").is_none();
        let mut out_of = false;
        if let Some(most) = MOST.captures(&text[end..]) {
            if number(most.name("most")?.as_str())? != self.high {
                return None;
            }
            out_of = true;
            end += most.get(0)?.end();
        }
        let rest = &text[end..];
        end += rest.len() - rest.trim_start_matches([']', ')', '}', '>', ' ']).len();
        Some(Value { score, out_of, sum, end })
    }

    /// Returns whether a text that tells the scale tells this one.
    pub fn is_told(&self, text: &str) -> bool {
        SCALE.captures_iter(text).all(|scale| {
            let part = |name: &str| scale.name(name).and_then(|part| number(part.as_str()));
            let low = part("low").is_none_or(|low| low == self.low);
            low && ["high", "points", "most", "top", "cap"]
                .iter()
                .filter_map(|name| part(name))
                .all(|high| high == self.high)
        })
    }

    /// Returns whether the words between "Score" and its number tell this scale.
    pub fn is_between(&self, text: &str) -> bool {
        BETWEEN.captures(text).is_some_and(|found| {
            let part = |name: &str| found.name(name).and_then(|part| number(part.as_str()));
            part("low").is_none_or(|low| low == self.low) && part("high") == Some(self.high)
        })
    }
}

/// Returns the number that was found; `None` for a difference or a product without its result.
fn of(found: &Captures<'_>) -> Option<f64> {
    let part = |name: &str| found.name(name).map(|part| part.as_str());
    if let Some(total) = part("total") {
        return number(total);
    }
    let first = number(part("number")?)? + if part("half").is_some() { 0.5 } else { 0.0 };
    let Some(terms) = part("terms") else { return Some(first) };
    static TERM: LazyLock<Regex> = LazyLock::new(|| pattern(r"(\+|plus|minus|[-–]|\*|×|x)\s*(\d+(?:\.\d+)?)"));
    TERM.captures_iter(terms).try_fold(first, |sum, term| {
        let plus = term[1] == *"+" || term[1].eq_ignore_ascii_case("plus");
        Some(sum + number(&term[2]).filter(|_| plus)?)
    })
}

/// Returns the number of digits or a word.
fn number(text: &str) -> Option<f64> {
    const WORDS: [&str; 11] = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"];
    let word = WORDS.iter().position(|word| text.eq_ignore_ascii_case(word));
    word.map(|at| at as f64).or_else(|| text.replace(',', ".").parse().ok())
}
