//! Preference losses as pure functions of summed log-probabilities.
//!
//! A training step needs no more of a loss than its value and its derivative with respect to the
//! two log-probabilities of a pair; both are computed here in f64, and the tensors of the backward
//! pass only carry the result. Definitions follow TRL's `dpo_trainer.py`; each is tested by value
//! and by finite differences.

use std::str::FromStr;

/// A term of the training loss.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Loss {
    /// DPO (Rafailov et al. 2023); with a soft label, conservative DPO (Mitchell 2023).
    Sigmoid,
    /// SLiC (Zhao et al. 2023) on DPO's margin.
    Hinge,
    /// IPO (Azar et al. 2023) on log-ratios averaged over tokens.
    Ipo,
    /// DPO unbiased under flipped labels (Chowdhury et al. 2024).
    Robust,
    /// Negative log-likelihood of the chosen answer, a mean over the tokens of a micro-batch.
    Sft,
}

impl Loss {
    pub const ALL: [(&'static str, Self); 5] = [
        ("sigmoid", Self::Sigmoid),
        ("hinge", Self::Hinge),
        ("ipo", Self::Ipo),
        ("robust", Self::Robust),
        ("sft", Self::Sft),
    ];

    pub fn name(self) -> &'static str {
        Self::ALL.iter().find(|(_, loss)| *loss == self).map_or("", |(name, _)| name)
    }

    /// Whether `label_smoothing` means anything to it.
    pub fn smooths(self) -> bool {
        matches!(self, Self::Sigmoid | Self::Robust)
    }

    /// Value and slope for a margin, the difference of the two log-ratios.
    fn of_margin(self, delta: f64, beta: f64, smoothing: f64) -> (f64, f64) {
        let x = beta * delta;
        match self {
            Self::Sigmoid => {
                let (value, slope) = mixed(x, 1.0 - smoothing);
                (value, beta * slope)
            }
            Self::Robust => {
                let (keep, flip) = (1.0 - smoothing, smoothing);
                let value = (-keep * log_sigmoid(x) + flip * log_sigmoid(-x)) / (1.0 - 2.0 * flip);
                let slope = (-keep * sigmoid(-x) - flip * sigmoid(x)) / (1.0 - 2.0 * flip);
                (value, beta * slope)
            }
            Self::Hinge => ((1.0 - x).max(0.0), if x < 1.0 { -beta } else { 0.0 }),
            Self::Ipo => {
                let error = delta - 0.5 / beta;
                (error * error, 2.0 * error)
            }
            Self::Sft => (0.0, 0.0),
        }
    }
}

/// A name that no loss has; the message suggests the nearest.
impl FromStr for Loss {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        if let Some((_, loss)) = Self::ALL.iter().find(|(known, _)| *known == name) {
            return Ok(*loss);
        }
        let names = Self::ALL.map(|(known, _)| known);
        let nearest = names.iter().max_by(|a, b| {
            let near = |known: &str| strsim::jaro_winkler(known, name);
            near(a).total_cmp(&near(b))
        });
        let guess = nearest.filter(|known| strsim::jaro_winkler(known, name) > 0.75);
        let guess = guess.map(|known| format!("; did you mean {known:?}?")).unwrap_or_default();
        Err(format!("no loss is called {name:?}{guess} (there are {})", names.join(", ")))
    }
}

/// What a pair gives to its loss.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Scores {
    /// Summed log-probabilities of the chosen and the rejected answer.
    pub policy: [f64; 2],
    pub reference: [f64; 2],
    /// Tokens of the chosen and the rejected answer.
    pub lengths: [usize; 2],
    /// Probability that the chosen answer is the better one.
    pub label: f64,
    /// Weight of the pair in the mean.
    pub weight: f64,
}

impl Scores {
    /// How much more the policy likes each answer than the reference does.
    pub fn ratios(&self) -> [f64; 2] {
        [self.policy[0] - self.reference[0], self.policy[1] - self.reference[1]]
    }
}

/// The loss of a pair and its derivative with respect to `policy`.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct PairLoss {
    pub value: f64,
    pub slope: [f64; 2],
}

/// A weighted sum of losses.
#[derive(Debug, Clone, PartialEq)]
pub struct Objective {
    pub terms: Vec<(Loss, f64)>,
    pub beta: f64,
    /// Share of labels taken to be flipped, below 0.5.
    pub label_smoothing: f64,
}

impl Objective {
    /// Loss of one pair. `mean_tokens` is the mean length of the chosen answers of its micro-batch,
    /// so that the mean of `sft` over pairs is a mean over tokens.
    pub fn pair(&self, scores: &Scores, mean_tokens: f64) -> PairLoss {
        let mut sum = PairLoss::default();
        for &(loss, weight) in &self.terms {
            let term = match loss {
                Loss::Sft => PairLoss { value: -scores.policy[0] / mean_tokens, slope: [-1.0 / mean_tokens, 0.0] },
                _ => self.preference(loss, scores),
            };
            let weight = weight * scores.weight;
            sum.value += weight * term.value;
            sum.slope[0] += weight * term.slope[0];
            sum.slope[1] += weight * term.slope[1];
        }
        sum
    }

    /// The expected loss under the pair's label: a pair that is preferred with probability q counts
    /// as q of itself and 1 - q of its mirror image.
    fn preference(&self, loss: Loss, scores: &Scores) -> PairLoss {
        let per = if loss == Loss::Ipo { scores.lengths.map(|n| n.max(1) as f64) } else { [1.0, 1.0] };
        let [chosen, rejected] = scores.ratios();
        let delta = chosen / per[0] - rejected / per[1];
        let (value, slope) = loss.of_margin(delta, self.beta, self.label_smoothing);
        let (mirror, mirror_slope) = loss.of_margin(-delta, self.beta, self.label_smoothing);
        let q = scores.label;
        let slope = q * slope - (1.0 - q) * mirror_slope;
        PairLoss { value: q * value + (1.0 - q) * mirror, slope: [slope / per[0], -slope / per[1]] }
    }

    /// What the preference terms of every pair are where policy and reference are the same, where
    /// that is one number: ln 2 for `sigmoid` and `robust`.
    pub fn at_start(&self) -> Option<f64> {
        match self.terms.as_slice() {
            [(Loss::Sigmoid | Loss::Robust, weight)] => Some(weight * std::f64::consts::LN_2),
            _ => None,
        }
    }
}

/// Value and slope of `-q log sigmoid(x) - (1 - q) log sigmoid(-x)`.
fn mixed(x: f64, q: f64) -> (f64, f64) {
    (-q * log_sigmoid(x) - (1.0 - q) * log_sigmoid(-x), -q * sigmoid(-x) + (1.0 - q) * sigmoid(x))
}

pub(super) fn log_sigmoid(x: f64) -> f64 {
    x.min(0.0) - (-x.abs()).exp().ln_1p()
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The example of the published tables: a = 1, c = -2.
    fn example() -> Scores {
        Scores { policy: [-20.0, -26.0], reference: [-21.0, -24.0], lengths: [10, 16], label: 1.0, weight: 1.0 }
    }

    fn objective(loss: Loss, label_smoothing: f64) -> Objective {
        Objective { terms: vec![(loss, 1.0)], beta: 0.1, label_smoothing }
    }

    #[test]
    fn values_of_the_example() {
        let value = |loss, smoothing| objective(loss, smoothing).pair(&example(), 10.0).value;
        let close = |value: f64, expected: f64| assert!((value - expected).abs() < 1e-6, "{value} {expected}");
        close(value(Loss::Sigmoid, 0.0), 0.554355);
        close(value(Loss::Sigmoid, 0.1), 0.584355);
        close(value(Loss::Hinge, 0.0), 0.7);
        close(value(Loss::Ipo, 0.0), 22.800625);
        close(value(Loss::Robust, 0.1), 0.516855);
        close(value(Loss::Sft, 0.0), 2.0);
        let soft = Scores { label: 0.9, ..example() };
        close(objective(Loss::Sigmoid, 0.0).pair(&soft, 10.0).value, 0.584355);
    }

    #[test]
    fn a_misspelt_name_is_answered_with_the_nearest() {
        let told = "sigmod".parse::<Loss>().unwrap_err();
        assert!(told.contains("did you mean \"sigmoid\""), "{told}");
        assert!(!"xyz".parse::<Loss>().unwrap_err().contains("did you mean"));
    }

    #[test]
    fn equal_models_lose_ln_2() {
        let scores = Scores { reference: [-20.0, -26.0], ..example() };
        for loss in [Loss::Sigmoid, Loss::Robust] {
            let objective = objective(loss, 0.1);
            let value = objective.pair(&scores, 10.0).value;
            assert!((value - objective.at_start().unwrap()).abs() < 1e-12, "{loss:?}");
        }
    }

    proptest! {
        #[test]
        fn slopes_are_finite_differences(
            policy in prop::array::uniform2(-80.0..-1.0f64),
            reference in prop::array::uniform2(-80.0..-1.0f64),
            lengths in prop::array::uniform2(1usize..40),
            label in 0.0..1.0f64,
            weight in 0.1..3.0f64,
            beta in 0.01..1.0f64,
            smoothing in 0.0..0.4f64,
        ) {
            let scores = Scores { policy, reference, lengths, label, weight };
            for (_, loss) in Loss::ALL {
                let objective =
                    Objective { terms: vec![(loss, 0.7), (Loss::Sft, 0.3)], beta, label_smoothing: smoothing };
                // a hinge has no derivative at its corner
                let corner = (1.0 - beta * (scores.ratios()[0] - scores.ratios()[1]).abs()).abs() < 1e-3;
                if loss == Loss::Hinge && corner {
                    continue;
                }
                let slope = objective.pair(&scores, 12.0).slope;
                for (side, slope) in slope.into_iter().enumerate() {
                    let at = |step: f64| {
                        let mut moved = scores;
                        moved.policy[side] += step;
                        objective.pair(&moved, 12.0).value
                    };
                    let measured = (at(1e-5) - at(-1e-5)) / 2e-5;
                    let scale = 1.0 + measured.abs();
                    prop_assert!((slope - measured).abs() / scale < 1e-4, "{loss:?} {side}");
                }
            }
        }
    }
}
