//! Preference losses as pure functions of summed log-probabilities.
//!
//! A training step needs no more of a loss than its value and its derivative with respect to the
//! two log-probabilities of a pair; both are computed here in f64, and the tensors of the backward
//! pass only carry the result. Definitions follow TRL's `dpo_trainer.py`; each is tested by value
//! and by finite differences.

use std::str::FromStr;

use super::pair::Pair;
use super::stats::{Stats, Tally};

/// A term of the training loss. `a` and `c` are the log-ratios of policy to reference of the chosen and the
/// rejected answer, `d = a - c`, `s` is the logistic function.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Loss {
    /// DPO (Rafailov et al. 2023): `-ln s(beta d)`; with a soft label, conservative DPO (Mitchell 2023).
    Sigmoid,
    /// The same with log-ratios averaged over tokens (Tulu 3, Lambert et al. 2024).
    SigmoidNorm,
    /// SLiC (Zhao et al. 2023) on DPO's margin.
    Hinge,
    /// IPO (Azar et al. 2023) on log-ratios averaged over tokens.
    Ipo,
    /// DPO unbiased under flipped labels (Chowdhury et al. 2024).
    Robust,
    /// EXO (Ji et al. 2024), the reverse KL divergence from labels smoothed by `label_smoothing`, or 0.001.
    ExoPair,
    /// NCA (Chen et al. 2024): `-ln s(beta a) - ln s(-beta a) / 2 - ln s(-beta c) / 2`.
    NcaPair,
    /// BCO (Jung et al. 2024) without its shift of rewards: `-ln s(beta a) - ln s(-beta c)`.
    BcoPair,
    /// SPPO (Wu et al. 2024) with hard labels: `(a - 1 / 2 beta)^2 + (c + 1 / 2 beta)^2`.
    SppoHard,
    /// SPPO with the pair's label `q`: `(a - (q - 1/2) / beta)^2 + (c - (1/2 - q) / beta)^2`.
    Sppo,
    /// APO-zero (D'Oosterlinck et al. 2024), for chosen answers better than the model's: `1 - s(beta a) + s(beta c)`.
    ApoZero,
    /// APO-down, for a model better than the chosen answers: `s(beta a) + 1 - s(beta d)`.
    ApoDown,
    /// DiscoPOP (Lu et al. 2024) with its temperature 0.05.
    Discopop,
    /// SimPO (Meng et al. 2024): log-probs averaged over tokens against the margin `gamma`, without a reference.
    Simpo,
    /// The preference term of CPO (Xu et al. 2024): DPO without a reference. CPO adds `sft`.
    Cpo,
    /// The odds-ratio term of ORPO (Hong et al. 2024), times `beta`. ORPO adds `sft`.
    Orpo,
    /// What TRL once called so and DataDreamer trains by default: KTO (Ethayarajh et al. 2024) on pairs, each side
    /// against the mean log-ratio of the other side in its micro-batch, at least 0, through which gradients flow.
    /// It looks at no soft label.
    KtoPair,
    /// KTO (Ethayarajh et al. 2024), each pair a desirable and an undesirable answer of weight 1:
    /// `(1 - s(beta (a - z)) + 1 - s(beta (z - c))) / 2`, where z is the mean log-ratio of answers to other prompts of
    /// the micro-batch, at least 0, through which no gradient flows.
    Kto,
    /// Negative log-likelihood of the chosen answer, a mean over the tokens of a micro-batch.
    Sft,
}

/// Of DiscoPOP.
const MODULATION: f64 = 0.05;
/// EXO's labels can't be hard.
const EXO_SMOOTHING: f64 = 1e-3;

/// What a loss is computed of.
#[derive(Debug, Clone, Copy)]
struct Sides {
    /// Log-ratios of policy to reference of the better and the worse answer; of a loss without a reference,
    /// log-probabilities.
    ratios: [f64; 2],
    lengths: [f64; 2],
    /// What the better answer has to be ahead.
    offset: f64,
    /// Mean log-ratio of answers to other prompts.
    elsewhere: f64,
}

impl Sides {
    fn swapped(self) -> Self {
        let swap = |[a, b]: [f64; 2]| [b, a];
        Self { ratios: swap(self.ratios), lengths: swap(self.lengths), offset: -self.offset, ..self }
    }
}

impl Loss {
    pub const ALL: [(&'static str, Self); 19] = [
        ("sigmoid", Self::Sigmoid),
        ("sigmoid_norm", Self::SigmoidNorm),
        ("hinge", Self::Hinge),
        ("ipo", Self::Ipo),
        ("robust", Self::Robust),
        ("exo_pair", Self::ExoPair),
        ("nca_pair", Self::NcaPair),
        ("bco_pair", Self::BcoPair),
        ("sppo_hard", Self::SppoHard),
        ("sppo", Self::Sppo),
        ("apo_zero", Self::ApoZero),
        ("apo_down", Self::ApoDown),
        ("discopop", Self::Discopop),
        ("simpo", Self::Simpo),
        ("cpo", Self::Cpo),
        ("orpo", Self::Orpo),
        ("kto_pair", Self::KtoPair),
        ("kto", Self::Kto),
        ("sft", Self::Sft),
    ];

    pub fn name(self) -> &'static str {
        Self::ALL.iter().find(|(_, loss)| *loss == self).map_or("", |(name, _)| name)
    }

    /// Whether `label_smoothing` means anything to it.
    pub fn smooths(self) -> bool {
        matches!(self, Self::Sigmoid | Self::SigmoidNorm | Self::Robust | Self::ExoPair)
    }

    /// Whether `gamma` means anything to it.
    pub fn has_margin(self) -> bool {
        self == Self::Simpo
    }

    /// Whether a margin between the judge's scores means anything to it.
    pub fn has_offset(self) -> bool {
        matches!(self, Self::Sigmoid | Self::SigmoidNorm)
    }

    /// Whether it compares the policy with a reference.
    fn has_reference(self) -> bool {
        !matches!(self, Self::Simpo | Self::Cpo | Self::Orpo | Self::Sft)
    }

    /// Whether it is of log-ratios averaged over tokens.
    fn averages(self) -> bool {
        matches!(self, Self::Ipo | Self::SigmoidNorm | Self::Simpo | Self::Orpo)
    }

    /// Value, and slopes by the two entries of `ratios`.
    fn of_sides(self, sides: Sides, o: &Objective) -> (f64, [f64; 2]) {
        let per = if self.averages() { sides.lengths } else { [1.0, 1.0] };
        let [a, c] = [sides.ratios[0] / per[0], sides.ratios[1] / per[1]];
        let (value, [by_a, by_c]) = match self {
            Self::NcaPair | Self::BcoPair | Self::SppoHard | Self::ApoZero | Self::ApoDown | Self::Orpo => {
                self.of_both(a, c, o.beta)
            }
            Self::Kto => kto(a - sides.elsewhere, sides.elsewhere - c, o.beta),
            _ => {
                let (value, slope) = self.of_margin(a - c, sides.offset, o);
                (value, [slope, -slope])
            }
        };
        (value, [by_a / per[0], by_c / per[1]])
    }

    /// Value and slope for a margin, the difference of the two log-ratios.
    fn of_margin(self, delta: f64, offset: f64, o: &Objective) -> (f64, f64) {
        let (beta, smoothing, x) = (o.beta, o.label_smoothing, o.beta * delta);
        match self {
            Self::Sigmoid | Self::SigmoidNorm => {
                let (value, slope) = mixed(x - offset, 1.0 - smoothing);
                (value, beta * slope)
            }
            Self::Cpo => (-log_sigmoid(x), -beta * sigmoid(-x)),
            Self::Simpo => (-log_sigmoid(x - o.gamma), -beta * sigmoid(o.gamma - x)),
            Self::Robust => {
                let (keep, flip) = (1.0 - smoothing, smoothing);
                let value = (-keep * log_sigmoid(x) + flip * log_sigmoid(-x)) / (1.0 - 2.0 * flip);
                let slope = (-keep * sigmoid(-x) - flip * sigmoid(x)) / (1.0 - 2.0 * flip);
                (value, beta * slope)
            }
            Self::ExoPair => {
                let flip = if smoothing > 0.0 { smoothing } else { EXO_SMOOTHING };
                let (keep, p) = (1.0 - flip, sigmoid(x));
                let better = log_sigmoid(x) - keep.ln();
                let worse = log_sigmoid(-x) - flip.ln();
                (p * better + (1.0 - p) * worse, beta * p * (1.0 - p) * (better - worse))
            }
            Self::Discopop => {
                let m = sigmoid(x / MODULATION);
                let (logistic, exponential) = (-log_sigmoid(x), (-x).exp());
                let turn = m * (1.0 - m) / MODULATION;
                let slope = turn * (exponential - logistic) - (1.0 - m) * sigmoid(-x) - m * exponential;
                ((1.0 - m) * logistic + m * exponential, beta * slope)
            }
            Self::Hinge => ((1.0 - x).max(0.0), if x < 1.0 { -beta } else { 0.0 }),
            Self::Ipo => {
                let error = delta - 0.5 / beta;
                (error * error, 2.0 * error)
            }
            _ => (0.0, 0.0),
        }
    }

    /// Value and slopes where the two log-ratios count by themselves.
    fn of_both(self, a: f64, c: f64, beta: f64) -> (f64, [f64; 2]) {
        let (x, y) = (beta * a, beta * c);
        // the slope of s(beta r) by r
        let rise = |x: f64| beta * sigmoid(x) * sigmoid(-x);
        match self {
            Self::NcaPair => {
                let value = -log_sigmoid(x) - 0.5 * log_sigmoid(-x) - 0.5 * log_sigmoid(-y);
                (value, [beta * (0.5 * sigmoid(x) - sigmoid(-x)), 0.5 * beta * sigmoid(y)])
            }
            Self::BcoPair => (-log_sigmoid(x) - log_sigmoid(-y), [-beta * sigmoid(-x), beta * sigmoid(y)]),
            Self::SppoHard => sppo(a, c, 1.0, beta),
            Self::ApoZero => (1.0 - sigmoid(x) + sigmoid(y), [-rise(x), rise(y)]),
            Self::ApoDown => {
                let apart = rise(x - y);
                (sigmoid(x) + 1.0 - sigmoid(x - y), [rise(x) - apart, apart])
            }
            Self::Orpo => {
                // log-odds of the geometric mean probabilities, which are below 1 but for rounding
                let [a, c] = [a.min(-1e-9), c.min(-1e-9)];
                let odds = (a - c) - ((-a.exp_m1()).ln() - (-c.exp_m1()).ln());
                let slope = -beta * sigmoid(-odds);
                (-beta * log_sigmoid(odds), [slope / -a.exp_m1(), -slope / -c.exp_m1()])
            }
            _ => (0.0, [0.0, 0.0]),
        }
    }
}

/// Half of `1 - s(beta x)` and half of `1 - s(beta y)`; y falls with the second log-ratio.
fn kto(x: f64, y: f64, beta: f64) -> (f64, [f64; 2]) {
    let fall = |x: f64| 0.5 * beta * sigmoid(beta * x) * sigmoid(-beta * x);
    (0.5 * (sigmoid(-beta * x) + sigmoid(-beta * y)), [-fall(x), fall(y)])
}

/// SPPO with the probability `q` that the first answer is the better one.
fn sppo(a: f64, c: f64, q: f64, beta: f64) -> (f64, [f64; 2]) {
    let [a, c] = [a - (q - 0.5) / beta, c + (q - 0.5) / beta];
    (a * a + c * c, [2.0 * a, 2.0 * c])
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
        // The paper's loss goes by the name that TRL gives it.
        let guess = if name.eq_ignore_ascii_case("dpo") { Some(&"sigmoid") } else { guess };
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
    /// What the chosen answer has to be ahead, in nats of `beta` times the margin (ODPO, Amini et al. 2024).
    pub offset: f64,
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
    /// The margin that `simpo` asks for.
    pub gamma: f64,
    /// What tokens count that the longer answer has beyond the length of the shorter: 1 is all, 0 cuts them off.
    pub ld_alpha: f64,
}

/// What the pairs of a micro-batch have in common.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Shared {
    /// Mean length of the chosen answers, so that the mean of `sft` over pairs is a mean over tokens.
    mean_tokens: f64,
    /// Mean log-ratios of the chosen and the rejected answers, at least 0.
    divergence: [f64; 2],
    /// Mean log-ratio of answers to other prompts, at least 0.
    elsewhere: f64,
    /// What the micro-batch's loss changes by each log-ratio by way of these, times the number of pairs.
    pull: [f64; 2],
}

impl Shared {
    /// With the log-ratios of answers to other prompts.
    pub fn with_elsewhere(self, scores: &[Scores]) -> Self {
        let sum: f64 = scores.iter().flat_map(Scores::ratios).sum();
        Self { elsewhere: (sum / (2 * scores.len()).max(1) as f64).max(0.0), ..self }
    }
}

/// The pairs of a micro-batch, each with the answers of the next one: what KTO takes its divergence of, as TRL does.
pub(super) fn mismatched(pairs: &[Pair]) -> Vec<Pair> {
    let next = pairs.iter().cycle().skip(1);
    let mix = |(pair, next): (&Pair, &Pair)| Pair {
        chosen: next.chosen.clone(),
        rejected: next.rejected.clone(),
        reference: [f64::NAN; 2],
        ..pair.clone()
    };
    pairs.iter().zip(next).map(mix).collect()
}

impl Objective {
    /// Whether a pair's loss depends on the others of its micro-batch.
    pub fn couples(&self) -> bool {
        self.terms.iter().any(|(loss, _)| *loss == Loss::KtoPair)
    }

    /// Whether it needs log-ratios of answers to other prompts (`mismatched`).
    pub fn looks_elsewhere(&self) -> bool {
        self.terms.iter().any(|(loss, _)| *loss == Loss::Kto)
    }

    /// Of a micro-batch whose chosen answers have `mean_tokens` tokens on average; `scores` are of all its pairs where
    /// the objective [`couples`](Self::couples) them.
    pub fn shared(&self, mean_tokens: f64, scores: &[Scores]) -> Shared {
        let mut shared = Shared { mean_tokens, ..Shared::default() };
        let weight: f64 = self.terms.iter().filter(|(loss, _)| *loss == Loss::KtoPair).map(|(_, weight)| weight).sum();
        if weight == 0.0 || scores.is_empty() {
            return shared;
        }
        let count = scores.len() as f64;
        let mean = |f: &dyn Fn(&Scores) -> f64| scores.iter().map(f).sum::<f64>() / count;
        let means = [0, 1].map(|side| mean(&|s| s.ratios()[side]));
        shared.divergence = means.map(|m| m.max(0.0));
        for side in [0, 1] {
            if means[side] > 0.0 {
                shared.pull[side] = weight * mean(&|s| s.weight * self.kto_pair(s, shared.divergence).2[side]);
            }
        }
        shared
    }

    /// Loss of one pair.
    pub fn pair(&self, scores: &Scores, shared: &Shared) -> PairLoss {
        let mut sum = PairLoss { value: 0.0, slope: shared.pull };
        for &(loss, weight) in &self.terms {
            let per_token = 1.0 / shared.mean_tokens;
            let term = match loss {
                Loss::Sft => PairLoss { value: -scores.policy[0] * per_token, slope: [-per_token, 0.0] },
                Loss::KtoPair => {
                    let (value, slope, _) = self.kto_pair(scores, shared.divergence);
                    PairLoss { value, slope }
                }
                _ => self.preference(loss, scores, shared.elsewhere),
            };
            let weight = weight * scores.weight;
            sum.value += weight * term.value;
            sum.slope[0] += weight * term.slope[0];
            sum.slope[1] += weight * term.slope[1];
        }
        sum
    }

    /// Value, and slopes by the pair's log-ratios and by the divergences.
    fn kto_pair(&self, scores: &Scores, divergence: [f64; 2]) -> (f64, [f64; 2], [f64; 2]) {
        let [a, c] = scores.ratios();
        let (value, slope) = kto(a - divergence[1], divergence[0] - c, self.beta);
        (value, slope, [-slope[1], -slope[0]])
    }

    /// Losses of a micro-batch, its pairs' scores given, and those of answers to other prompts where they are looked at.
    pub fn tally(&self, pairs: &[Pair], scores: &[Scores], elsewhere: &[Scores]) -> Tally {
        let shared = self.shared(mean_chosen_tokens(pairs), scores).with_elsewhere(elsewhere);
        let mut tally = Tally::default();
        scores.iter().for_each(|s| tally.add(Stats::of(s, &self.pair(s, &shared), self.beta), 1.0));
        tally
    }

    /// The expected loss under the pair's label: a pair that is preferred with probability q counts
    /// as q of itself and 1 - q of its mirror image. `sppo` has the label in itself.
    fn preference(&self, loss: Loss, scores: &Scores, elsewhere: f64) -> PairLoss {
        let ratios = if loss.has_reference() { scores.ratios() } else { scores.policy };
        let lengths = scores.lengths.map(|n| n.max(1) as f64);
        let sides = Sides { ratios, lengths, offset: scores.offset, elsewhere };
        let q = scores.label;
        if loss == Loss::Sppo {
            let (value, slope) = sppo(ratios[0], ratios[1], q, self.beta);
            return PairLoss { value, slope };
        }
        let (value, slope) = loss.of_sides(sides, self);
        let (mirror, turned) = loss.of_sides(sides.swapped(), self);
        PairLoss {
            value: q * value + (1.0 - q) * mirror,
            slope: [q * slope[0] + (1.0 - q) * turned[1], q * slope[1] + (1.0 - q) * turned[0]],
        }
    }

    /// What the preference terms of every pair are where policy and reference are the same, where
    /// that is one number: ln 2 for `sigmoid`, `sigmoid_norm` and `robust`.
    pub fn at_start(&self) -> Option<f64> {
        match self.terms.as_slice() {
            [(Loss::Sigmoid | Loss::SigmoidNorm | Loss::Robust, weight)] => Some(weight * std::f64::consts::LN_2),
            _ => None,
        }
    }
}

/// Mean length of the chosen answers of a micro-batch.
pub(super) fn mean_chosen_tokens(pairs: &[Pair]) -> f64 {
    let tokens: usize = pairs.iter().map(|p| p.chosen.len()).sum();
    tokens as f64 / pairs.len().max(1) as f64
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
        Scores {
            policy: [-20.0, -26.0],
            reference: [-21.0, -24.0],
            lengths: [10, 16],
            label: 1.0,
            weight: 1.0,
            offset: 0.0,
        }
    }

    fn of_tokens(mean_tokens: f64) -> Shared {
        Shared { mean_tokens, ..Shared::default() }
    }

    fn objective(loss: Loss, label_smoothing: f64) -> Objective {
        Objective { terms: vec![(loss, 1.0)], beta: 0.1, label_smoothing, gamma: 0.5, ld_alpha: 1.0 }
    }

    #[test]
    fn values_of_the_example() {
        let value = |loss, smoothing| objective(loss, smoothing).pair(&example(), &of_tokens(10.0)).value;
        let close = |value: f64, expected: f64| assert!((value - expected).abs() < 1e-6, "{value} {expected}");
        close(value(Loss::Sigmoid, 0.0), 0.554355);
        close(value(Loss::Sigmoid, 0.1), 0.584355);
        close(value(Loss::Hinge, 0.0), 0.7);
        close(value(Loss::Ipo, 0.0), 22.800625);
        close(value(Loss::Robust, 0.1), 0.516855);
        close(value(Loss::Sft, 0.0), 2.0);
        close(value(Loss::SigmoidNorm, 0.0), 0.681960);
        close(value(Loss::ExoPair, 0.0), 2.258199);
        close(value(Loss::NcaPair, 0.0), 1.315664);
        close(value(Loss::BcoPair, 0.0), 1.242536);
        close(value(Loss::SppoHard, 0.0), 25.0);
        close(value(Loss::Sppo, 0.0), 25.0);
        close(value(Loss::ApoZero, 0.0), 0.925187);
        close(value(Loss::ApoDown, 0.0), 0.950537);
        close(value(Loss::Discopop, 0.0), 0.740357);
        // -ln s(0.1 * (-20 + 26))
        close(value(Loss::Cpo, 0.0), 0.437488);
        let orpo = Objective { terms: vec![(Loss::Orpo, 1.0), (Loss::Sft, 1.0)], ..objective(Loss::Orpo, 0.0) };
        close(orpo.pair(&example(), &of_tokens(10.0)).value, 2.094256);
        let simpo = Objective { beta: 2.5, gamma: 1.375, ..objective(Loss::Simpo, 0.0) };
        close(simpo.pair(&example(), &of_tokens(10.0)).value, 2.406913);
        let soft = Scores { label: 0.9, ..example() };
        close(objective(Loss::Sigmoid, 0.0).pair(&soft, &of_tokens(10.0)).value, 0.584355);
        // (1 - 4)^2 + (-2 + 4)^2
        close(objective(Loss::Sppo, 0.0).pair(&soft, &of_tokens(10.0)).value, 13.0);
    }

    #[test]
    fn a_judges_margin_moves_the_logistic_loss() {
        // -ln s(0.1 * 3 - 0.5)
        let scores = Scores { offset: 0.5, ..example() };
        let value = objective(Loss::Sigmoid, 0.0).pair(&scores, &of_tokens(10.0)).value;
        assert!((value - (0.2f64.exp().ln_1p())).abs() < 1e-12, "{value}");
        // the other way round it is the mirror image
        let flipped = Scores { policy: [-26.0, -20.0], reference: [-24.0, -21.0], label: 0.0, offset: -0.5, ..scores };
        let other = objective(Loss::Sigmoid, 0.0).pair(&flipped, &of_tokens(10.0)).value;
        assert!((value - other).abs() < 1e-12);
    }

    fn kto(pairs: &[[f64; 4]]) -> (Vec<Scores>, f64, Vec<[f64; 2]>) {
        let scores = |[a, c, ra, rc]: &[f64; 4]| Scores { policy: [*a, *c], reference: [*ra, *rc], ..example() };
        let all: Vec<Scores> = pairs.iter().map(scores).collect();
        let (kto, count) = (objective(Loss::KtoPair, 0.0), pairs.len() as f64);
        let shared = kto.shared(10.0, &all);
        let losses: Vec<PairLoss> = all.iter().map(|s| kto.pair(s, &shared)).collect();
        let mean = losses.iter().map(|l| l.value).sum::<f64>() / count;
        (all, mean, losses.iter().map(|l| l.slope.map(|s| s / count)).collect())
    }

    /// Values of `datadreamer/trainers/_vendored/dpo_trainer.py` in float64.
    #[test]
    fn kto_pair_is_that_of_datadreamer() {
        let close = |value: f64, expected: f64| assert!((value - expected).abs() < 1e-8, "{value} {expected}");
        let (_, value, slopes) = kto(&[[-45.0, -66.0, -50.0, -60.0]]);
        close(value, 0.31364028);
        close(slopes[0][0], -0.02111868);
        close(slopes[0][1], 0.00936849);
        close(kto(&[[-55.0, -52.0, -50.0, -60.0]]).1, 0.73790473);
        close(kto(&[[-45.0, -66.0, -50.0, -60.0], [-80.0, -70.0, -79.0, -75.0]]).1, 0.44674697);
        close(kto(&[[-50.0, -60.0, -50.0, -60.0]]).1, 0.5);
    }

    #[test]
    fn kto_is_that_of_the_published_table() {
        let elsewhere = Scores { policy: [-20.0, -30.0], reference: [-20.1, -30.0], ..example() };
        let shared = of_tokens(10.0).with_elsewhere(&[elsewhere]);
        let value = objective(Loss::Kto, 0.0).pair(&example(), &shared).value;
        assert!((value - 0.462598).abs() < 1e-6, "{value}");
        // a negative divergence is none
        let shared = of_tokens(10.0).with_elsewhere(&[Scores { reference: [-10.0, -30.0], ..elsewhere }]);
        let none = objective(Loss::Kto, 0.0).pair(&example(), &shared).value;
        assert_eq!(none, objective(Loss::Kto, 0.0).pair(&example(), &of_tokens(10.0)).value);
    }

    #[test]
    fn slopes_through_the_divergence_are_finite_differences() {
        let pairs = [[-45.0, -59.0, -50.0, -60.0], [-80.0, -70.0, -79.0, -75.0], [-30.0, -31.0, -30.5, -30.0]];
        let (_, _, slopes) = kto(&pairs);
        for (i, side) in (0..3).flat_map(|i| [(i, 0), (i, 1)]) {
            let at = |step: f64| {
                let mut moved = pairs;
                moved[i][side] += step;
                kto(&moved).1
            };
            let measured = (at(1e-5) - at(-1e-5)) / 2e-5;
            assert!((slopes[i][side] - measured).abs() < 1e-8, "{i} {side}: {} {measured}", slopes[i][side]);
        }
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
        for loss in [Loss::Sigmoid, Loss::SigmoidNorm, Loss::Robust] {
            let objective = objective(loss, 0.1);
            let value = objective.pair(&scores, &of_tokens(10.0)).value;
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
            offset in -2.0..2.0f64,
        ) {
            let scores = Scores { policy, reference, lengths, label, weight, offset };
            for (_, loss) in Loss::ALL {
                let objective =
                    Objective { terms: vec![(loss, 0.7), (Loss::Sft, 0.3)], beta, label_smoothing: smoothing, gamma: 0.4, ld_alpha: 1.0 };
                // a hinge has no derivative at its corner
                let corner = (1.0 - beta * (scores.ratios()[0] - scores.ratios()[1]).abs()).abs() < 1e-3;
                if loss == Loss::Hinge && corner {
                    continue;
                }
                let slope = objective.pair(&scores, &of_tokens(12.0)).slope;
                for (side, slope) in slope.into_iter().enumerate() {
                    let at = |step: f64| {
                        let mut moved = scores;
                        moved.policy[side] += step;
                        objective.pair(&moved, &of_tokens(12.0)).value
                    };
                    let measured = (at(1e-5) - at(-1e-5)) / 2e-5;
                    let scale = 1.0 + measured.abs();
                    prop_assert!((slope - measured).abs() / scale < 1e-4, "{loss:?} {side}");
                }
            }
        }
    }
}
