//! Two answers side by side.
//!
//! Judges favour a position: GPT-4 keeps its verdict after a swap in 65 % of pairs, small models
//! hand most of them to one slot (Zheng et al. 2023, table 2). So the order is random by row, or both
//! orders are asked and a verdict needs both.

use serde::{Deserialize, Serialize};

/// Which of the two answers is better.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    A,
    B,
    Tie,
}

impl Verdict {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::A => "a",
            Self::B => "b",
            Self::Tie => "tie",
        }
    }

    /// The verdict on (b, a) as one on (a, b).
    pub fn swapped(self) -> Self {
        match self {
            Self::A => Self::B,
            Self::B => Self::A,
            Self::Tie => Self::Tie,
        }
    }
}

/// `order` of a pairwise judge.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Order {
    /// One question; a coin keyed by the row decides who comes first.
    #[default]
    Random,
    /// Two questions, one in each order.
    Both,
}

/// What a pair came to.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Reading {
    pub verdict: Verdict,
    /// That a is better: 0.5 where the judge gave nothing to go by.
    pub probability: f64,
    /// False where an answer of the judge could not be read; the verdict is then a tie.
    pub parsed: bool,
}

impl Reading {
    pub const UNREADABLE: Self = Self { verdict: Verdict::Tie, probability: 0.5, parsed: false };

    /// Two equal answers need no judge.
    pub const EQUAL: Self = Self { verdict: Verdict::Tie, probability: 0.5, parsed: true };
}

/// The question put to a pairwise judge.
#[derive(Debug, Clone, PartialEq)]
pub struct PairwisePrompt {
    /// With the placeholders `{prompt}`, `{first}`, `{second}`, `{label_first}`, `{label_second}`.
    template: String,
    labels: [String; 2],
}

/// The question asked unless the flow brings its own.
pub const TEMPLATE: &str = "\
Prompt: {prompt}

{label_first}: {first}

{label_second}: {second}

Instruction: Which response answers the prompt better? Reply with \"{label_first}\" or \"{label_second}\" and nothing else.";

/// The labels of the two answers unless the flow brings its own.
pub const LABELS: [&str; 2] = ["Response A", "Response B"];

impl PairwisePrompt {
    /// A message says which placeholder is missing or which label can't be told apart.
    pub fn new(template: Option<String>, labels: Option<[String; 2]>) -> Result<Self, String> {
        let template = template.unwrap_or_else(|| TEMPLATE.to_owned());
        if let Some(missing) = ["{prompt}", "{first}", "{second}"].into_iter().find(|p| !template.contains(p)) {
            return Err(format!("has no {missing}; the judge would not see it"));
        }
        let labels = labels.unwrap_or_else(|| LABELS.map(str::to_owned));
        if labels.iter().any(|l| l.trim().is_empty())
            || labels[0].contains(&labels[1])
            || labels[1].contains(&labels[0])
        {
            return Err(format!("{:?} and {:?} can't be told apart in an answer", labels[0], labels[1]));
        }
        Ok(Self { template, labels })
    }

    pub fn labels(&self) -> &[String; 2] {
        &self.labels
    }

    pub fn template(&self) -> &str {
        &self.template
    }

    /// The question about `first` and `second`. What is filled in is not searched for placeholders.
    pub fn render(&self, prompt: &str, first: &str, second: &str) -> String {
        let fill = |name: &str| match name {
            "prompt" => Some(prompt),
            "first" => Some(first),
            "second" => Some(second),
            "label_first" => Some(self.labels[0].as_str()),
            "label_second" => Some(self.labels[1].as_str()),
            _ => None,
        };
        let mut out = String::with_capacity(self.template.len() + prompt.len() + first.len() + second.len());
        let mut rest = self.template.as_str();
        while let Some(open) = rest.find('{') {
            let (before, from) = rest.split_at(open);
            out.push_str(before);
            match from.find('}').and_then(|close| Some((close, fill(&from[1..close])?))) {
                Some((close, text)) => {
                    out.push_str(text);
                    rest = &from[close + 1..];
                }
                None => {
                    out.push('{');
                    rest = &from[1..];
                }
            }
        }
        out.push_str(rest);
        out
    }

    /// Reads the judge's text about (first, second): exactly one label must occur.
    pub fn read(&self, answer: &str) -> Option<Verdict> {
        match (answer.contains(&self.labels[0]), answer.contains(&self.labels[1])) {
            (true, false) => Some(Verdict::A),
            (false, true) => Some(Verdict::B),
            _ => None,
        }
    }
}

/// Whether the pair is shown as (b, a) under [`Order::Random`]. `key` is the stage's stream key.
pub fn swap(key: u64, row: u64, pair: u32) -> bool {
    let mut hasher = blake3::Hasher::new();
    hasher.update(b"flowrun judge order");
    hasher.update(&key.to_le_bytes()).update(&row.to_le_bytes()).update(&pair.to_le_bytes());
    hasher.finalize().as_bytes()[0] & 1 == 1
}

/// From the verdicts read in text, each already turned to (a, b); `None` could not be read.
pub fn from_texts(verdicts: &[Option<Verdict>]) -> Reading {
    let Some(read) = verdicts.iter().copied().collect::<Option<Vec<_>>>().filter(|v| !v.is_empty()) else {
        return Reading::UNREADABLE;
    };
    let for_a = read.iter().map(|v| match v {
        Verdict::A => 1.0,
        Verdict::B => 0.0,
        Verdict::Tie => 0.5,
    });
    let probability = for_a.sum::<f64>() / read.len() as f64;
    let agreed = read.iter().all(|v| *v == read[0]);
    Reading { verdict: if agreed { read[0] } else { Verdict::Tie }, probability, parsed: true }
}

/// From log-odds that a is better, one an order asked. Their mean cancels the judge's taste for a
/// position: in log-odds it is the same offset in both orders. A tie only within `min_gap` of it.
pub fn from_log_odds(log_odds: &[f64], min_gap: f64) -> Reading {
    if log_odds.is_empty() || log_odds.iter().any(|l| !l.is_finite()) {
        return Reading::UNREADABLE;
    }
    let mean = log_odds.iter().sum::<f64>() / log_odds.len() as f64;
    let verdict = if mean.abs() <= min_gap {
        Verdict::Tie
    } else if mean > 0.0 {
        Verdict::A
    } else {
        Verdict::B
    };
    Reading { verdict, probability: 1.0 / (1.0 + (-mean).exp()), parsed: true }
}

/// The pairs `(a, b)` of `candidates` answers: every two neighbours, or every two.
pub fn pairs(candidates: usize, all: bool) -> Vec<(usize, usize)> {
    if all {
        (0..candidates).flat_map(|a| (a + 1..candidates).map(move |b| (a, b))).collect()
    } else {
        (1..candidates).map(|b| (b - 1, b)).collect()
    }
}

/// How many [`pairs`] there are.
pub fn count(candidates: u64, all: bool) -> u64 {
    let others = candidates.saturating_sub(1);
    if all { candidates.saturating_mul(others) / 2 } else { others }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_is_read_only_when_it_names_one_label() {
        let prompt = PairwisePrompt::new(None, None).unwrap();
        assert_eq!(prompt.read("Response A"), Some(Verdict::A));
        assert_eq!(prompt.read("I prefer Response B."), Some(Verdict::B));
        assert_eq!(prompt.read("Response A beats Response B"), None);
        assert_eq!(prompt.read("response a"), None);
        assert_eq!(prompt.read(""), None);
    }

    #[test]
    fn placeholders_inside_answers_stay_as_they_are() {
        let prompt = PairwisePrompt::new(Some("{prompt}|{first}|{second}|{x}{".into()), None).unwrap();
        assert_eq!(prompt.render("p {second}", "{prompt}", "b"), "p {second}|{prompt}|b|{x}{");
    }

    #[test]
    fn a_template_must_show_both_answers_and_labels_must_differ() {
        assert!(PairwisePrompt::new(Some("{prompt} {first}".into()), None).unwrap_err().contains("{second}"));
        assert!(PairwisePrompt::new(None, Some(["A".into(), "A1".into()])).is_err());
        assert!(PairwisePrompt::new(None, Some(["A".into(), " ".into()])).is_err());
    }

    #[test]
    fn orders_that_disagree_are_a_tie_and_unreadable_is_flagged() {
        let both = |x, y| from_texts(&[x, y]);
        assert_eq!(both(Some(Verdict::A), Some(Verdict::A)).verdict, Verdict::A);
        let split = both(Some(Verdict::A), Some(Verdict::B));
        assert_eq!((split.verdict, split.probability, split.parsed), (Verdict::Tie, 0.5, true));
        assert_eq!(both(Some(Verdict::A), None), Reading::UNREADABLE);
        assert_eq!(from_texts(&[]), Reading::UNREADABLE);
    }

    #[test]
    fn a_taste_for_the_first_slot_cancels_in_log_odds() {
        let (bias, truth) = (3.0, -0.4);
        // shown as (a, b): truth + bias; shown as (b, a) and turned round: truth - bias
        let reading = from_log_odds(&[truth + bias, truth - bias], 0.0);
        assert_eq!(reading.verdict, Verdict::B);
        assert!((reading.probability - 1.0 / (1.0 + 0.4f64.exp())).abs() < 1e-12);
        assert_eq!(from_log_odds(&[0.01, 0.01], 0.05).verdict, Verdict::Tie);
        assert_eq!(from_log_odds(&[f64::NAN], 0.0), Reading::UNREADABLE);
    }

    #[test]
    fn the_coin_is_fair_and_keyed() {
        let swapped = (0..10_000).filter(|row| swap(7, *row, 0)).count();
        assert!((4_800..5_200).contains(&swapped), "{swapped}");
        assert_ne!(
            (0..64).map(|r| swap(7, r, 0)).collect::<Vec<_>>(),
            (0..64).map(|r| swap(8, r, 0)).collect::<Vec<_>>()
        );
    }

    #[test]
    fn pairs_of_candidates() {
        assert_eq!(pairs(3, false), [(0, 1), (1, 2)]);
        assert_eq!(pairs(3, true), [(0, 1), (0, 2), (1, 2)]);
        assert!(pairs(1, true).is_empty());
    }
}
