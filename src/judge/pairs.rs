//! Which answers become a pair that a trainer learns from.
//!
//! Self-Rewarding (Yuan et al. 2024, arXiv:2401.10020) takes the best and the worst of N answers and
//! drops ties; Meta-Rewarding (Wu et al. 2024, arXiv:2407.19594) controls length; Iterative RPO
//! (Pang et al. 2024, arXiv:2404.19733) takes several pairs a prompt; CREAM (Wang et al. 2024,
//! arXiv:2410.12735) softens the label where two models rank the answers differently.

use std::collections::HashSet;

use serde::{Deserialize, Serialize};

/// One answer with what the judge said of it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Scored<'a> {
    pub text: &'a str,
    /// Not finite: the judge gave nothing, and the answer is in no pair.
    pub score: f64,
    /// Of the judge's samples.
    pub variance: f64,
    /// Whether the answer came to its end.
    pub stopped: bool,
}

/// A pair as a pairwise judge saw it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Compared<'a> {
    pub chosen: Scored<'a>,
    pub rejected: Scored<'a>,
    /// Difference of the two probabilities.
    pub gap: f64,
    /// Probability that the chosen answer is the better one.
    pub probability: f64,
    /// The judge prefers neither.
    pub tie: bool,
}

/// `choose` of the stage `pairs`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Choose {
    /// The best against the worst, then the second best against the second worst, and so on.
    #[default]
    BestWorst,
    /// Every better against every worse, the widest gaps first.
    All,
}

/// What becomes of a prompt whose best and worst answer are too close.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Ties {
    #[default]
    Drop,
    /// One pair with the label 0.5.
    Soft,
}

/// How pairs are chosen.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Selection {
    pub choose: Choose,
    pub ties: Ties,
    /// The label is the probability that a judge who scores each answer once prefers the chosen one.
    pub soft: bool,
    /// Least difference of the scores.
    pub min_gap: f64,
    pub max_pairs: usize,
    /// Meta-Rewarding's rho: the chosen answer is the shortest within this share of the range below the
    /// best, the rejected one the longest within it above the worst.
    pub length_control: Option<f64>,
    /// Answers that were cut are in no pair.
    pub require_stop: bool,
    /// [`similarity`] from which two answers are too alike.
    pub near_duplicates: Option<f64>,
}

/// A pair, by the places of its answers.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Pick {
    pub chosen: usize,
    pub rejected: usize,
    /// Difference of the scores.
    pub gap: f64,
    /// Probability that the chosen answer is the better one.
    pub label: f64,
}

impl Selection {
    /// The pairs of one prompt, in the order they were chosen.
    pub fn select(&self, answers: &[Scored<'_>]) -> Vec<Pick> {
        let usable = |a: &Scored<'_>| a.score.is_finite() && (a.stopped || !self.require_stop);
        let left: Vec<usize> = (0..answers.len()).filter(|&i| usable(&answers[i])).collect();
        let mut picks = match self.choose {
            Choose::BestWorst => self.best_worst(answers, left.clone()),
            Choose::All => self.all(answers, &left),
        };
        picks.truncate(self.max_pairs);
        if picks.is_empty() && self.ties == Ties::Soft {
            picks.extend(self.tie(answers, &left));
        }
        picks
    }

    /// The pairs of a pairwise judge that are good enough. A verdict is one though it has no gap: a coin's, or that
    /// of a majority whose probabilities cancel out.
    pub fn filter(&self, pairs: &[Compared<'_>]) -> Vec<Pick> {
        let mut texts = HashSet::new();
        let mut picks = Vec::new();
        for (i, Compared { chosen, rejected, gap, probability, tie }) in pairs.iter().enumerate() {
            let cut = self.require_stop && !(chosen.stopped && rejected.stopped);
            let tie = *tie || *gap < self.min_gap;
            if cut || (tie && self.ties == Ties::Drop) || self.too_alike(chosen.text, rejected.text) {
                continue;
            }
            if !texts.insert((chosen.text, rejected.text)) {
                continue;
            }
            let label = match (tie, self.soft) {
                (true, _) => 0.5,
                (false, true) => *probability,
                (false, false) => 1.0,
            };
            picks.push(Pick { chosen: i, rejected: i, gap: *gap, label });
        }
        picks.sort_by(|a, b| b.gap.total_cmp(&a.gap));
        picks.truncate(self.max_pairs);
        picks
    }

    fn best_worst(&self, answers: &[Scored<'_>], mut left: Vec<usize>) -> Vec<Pick> {
        let mut picks: Vec<Pick> = Vec::new();
        while left.len() > 1 && picks.len() < self.max_pairs {
            let Some(chosen) = self.best(answers, &left) else { break };
            left.retain(|&i| i != chosen);
            let taken = |i: usize| picks.iter().any(|p| same_texts(answers, (p.chosen, p.rejected), (chosen, i)));
            let fits: Vec<usize> = left.iter().copied().filter(|&i| !taken(i)).collect();
            let fits = fits.into_iter().filter(|&i| self.makes_pair(answers, chosen, i)).collect::<Vec<_>>();
            if let Some(rejected) = self.worst(answers, &fits, &left, answers[chosen].score) {
                left.retain(|&i| i != rejected);
                picks.push(self.pick(answers, chosen, rejected));
            }
        }
        picks
    }

    fn all(&self, answers: &[Scored<'_>], left: &[usize]) -> Vec<Pick> {
        let mut picks: Vec<Pick> = Vec::new();
        for &chosen in left {
            for &rejected in left {
                let known = |p: &Pick| same_texts(answers, (p.chosen, p.rejected), (chosen, rejected));
                if self.makes_pair(answers, chosen, rejected) && !picks.iter().any(known) {
                    picks.push(self.pick(answers, chosen, rejected));
                }
            }
        }
        // A stable sort: equal gaps stay in the order of the answers.
        picks.sort_by(|a, b| b.gap.total_cmp(&a.gap));
        picks
    }

    /// The first two answers that differ, where no pair has a gap.
    fn tie(&self, answers: &[Scored<'_>], left: &[usize]) -> Option<Pick> {
        let best = self.best(answers, left)?;
        let other =
            left.iter().copied().find(|&i| i != best && !self.too_alike(answers[best].text, answers[i].text))?;
        let gap = answers[best].score - answers[other].score;
        (!self.is_gap(gap)).then_some(Pick { chosen: best, rejected: other, gap, label: 0.5 })
    }

    /// The highest score, of equal ones the surest; or the shortest near the top.
    fn best(&self, answers: &[Scored<'_>], left: &[usize]) -> Option<usize> {
        let (low, high) = range(answers, left)?;
        let Some(rho) = self.length_control else {
            let key = |&i: &usize| (-answers[i].score, answers[i].variance);
            return least(left, key);
        };
        let floor = (1.0 - rho) * high + rho * low;
        let near = |&&i: &&usize| answers[i].score >= floor;
        least(&left.iter().filter(near).copied().collect::<Vec<_>>(), |&i| (length(&answers[i]), answers[i].variance))
    }

    /// The lowest score of `fits`, of equal ones the surest; or the longest near the bottom of `left` and of
    /// `top`, the best score.
    fn worst(&self, answers: &[Scored<'_>], fits: &[usize], left: &[usize], top: f64) -> Option<usize> {
        let Some(rho) = self.length_control else {
            return least(fits, |&i| (answers[i].score, answers[i].variance));
        };
        let (low, high) = range(answers, left)?;
        let ceiling = (1.0 - rho) * low + rho * high.max(top);
        let near = |&&i: &&usize| answers[i].score <= ceiling;
        least(&fits.iter().filter(near).copied().collect::<Vec<_>>(), |&i| (-length(&answers[i]), answers[i].variance))
    }

    fn makes_pair(&self, answers: &[Scored<'_>], chosen: usize, rejected: usize) -> bool {
        chosen != rejected
            && self.is_gap(answers[chosen].score - answers[rejected].score)
            && !self.too_alike(answers[chosen].text, answers[rejected].text)
    }

    fn is_gap(&self, gap: f64) -> bool {
        gap > 0.0 && gap >= self.min_gap
    }

    fn too_alike(&self, a: &str, b: &str) -> bool {
        a.trim() == b.trim() || self.near_duplicates.is_some_and(|limit| similarity(a, b) >= limit)
    }

    fn pick(&self, answers: &[Scored<'_>], chosen: usize, rejected: usize) -> Pick {
        let (c, r) = (&answers[chosen], &answers[rejected]);
        let gap = c.score - r.score;
        let label = if self.soft { prefers(gap, c.variance + r.variance) } else { 1.0 };
        Pick { chosen, rejected, gap, label }
    }
}

fn same_texts(answers: &[Scored<'_>], a: (usize, usize), b: (usize, usize)) -> bool {
    answers[a.0].text == answers[b.0].text && answers[a.1].text == answers[b.1].text
}

fn range(answers: &[Scored<'_>], of: &[usize]) -> Option<(f64, f64)> {
    let scores = || of.iter().map(|&i| answers[i].score);
    (!of.is_empty()).then(|| (scores().fold(f64::INFINITY, f64::min), scores().fold(f64::NEG_INFINITY, f64::max)))
}

fn length(answer: &Scored<'_>) -> f64 {
    answer.text.chars().count() as f64
}

/// The place with the least key; of equal ones the first.
fn least(of: &[usize], key: impl Fn(&usize) -> (f64, f64)) -> Option<usize> {
    let order = |a: &(f64, f64), b: &(f64, f64)| a.0.total_cmp(&b.0).then(a.1.total_cmp(&b.1));
    of.iter().copied().min_by(|a, b| order(&key(a), &key(b)))
}

/// Probability that one normal draw exceeds another whose mean is `gap` lower; `variance` is the sum of both.
fn prefers(gap: f64, variance: f64) -> f64 {
    if variance > 0.0 { normal_cdf(gap / variance.sqrt()) } else { 1.0 }
}

/// Of the standard normal distribution; Abramowitz and Stegun 26.2.17, error below 7.5e-8.
fn normal_cdf(x: f64) -> f64 {
    let t = 1.0 / (1.0 + 0.231_641_9 * x.abs());
    let poly =
        t * (0.319_381_530 + t * (-0.356_563_782 + t * (1.781_477_937 + t * (-1.821_255_978 + t * 1.330_274_429))));
    let upper = poly * (-x * x / 2.0).exp() / (2.0 * std::f64::consts::PI).sqrt();
    if x >= 0.0 { 1.0 - upper } else { upper }
}

/// Share of the character trigrams of two texts that both have (Jaccard), lower case and without regard to
/// white space; 1 for texts that are equal so.
pub fn similarity(a: &str, b: &str) -> f64 {
    let (a, b) = (trigrams(a), trigrams(b));
    if a.is_empty() && b.is_empty() {
        return 1.0;
    }
    let shared = a.intersection(&b).count();
    shared as f64 / (a.len() + b.len() - shared) as f64
}

fn trigrams(text: &str) -> HashSet<String> {
    let plain: Vec<char> = text.to_lowercase().split_whitespace().collect::<Vec<_>>().join(" ").chars().collect();
    match plain.len() {
        0 => HashSet::new(),
        1 | 2 => HashSet::from([plain.iter().collect()]),
        _ => plain.windows(3).map(|w| w.iter().collect()).collect(),
    }
}

/// CREAM's consistency of two rankings of the same answers: `(tau + 1) / 2` with Kendall's tau-b, from 0 (reversed)
/// to 1 (equal). `None` where one of them ranks nothing.
pub fn consistency(one: &[f64], other: &[f64]) -> Option<f64> {
    kendall(one, other).map(|tau| (tau + 1.0) / 2.0)
}

/// Kendall's tau-b (Kendall 1945); pairs with a value that is not finite are left out. `None` where either side is constant.
pub fn kendall(one: &[f64], other: &[f64]) -> Option<f64> {
    let both: Vec<(f64, f64)> =
        one.iter().copied().zip(other.iter().copied()).filter(|(x, y)| x.is_finite() && y.is_finite()).collect();
    let (mut score, mut in_one, mut in_other) = (0.0, 0.0, 0.0);
    for (i, a) in both.iter().enumerate() {
        for b in &both[i + 1..] {
            let (x, y) = (sign(a.0 - b.0), sign(a.1 - b.1));
            score += x * y;
            in_one += x * x;
            in_other += y * y;
        }
    }
    (in_one > 0.0 && in_other > 0.0).then(|| score / (in_one * in_other).sqrt())
}

fn sign(x: f64) -> f64 {
    if x == 0.0 { 0.0 } else { x.signum() }
}

/// The label of a pair whose judge agrees with the one before to this degree: a pair is itself with probability
/// `consistency` and its mirror image otherwise (CREAM, equation 7).
pub fn soften(label: f64, consistency: f64) -> f64 {
    consistency * label + (1.0 - consistency) * (1.0 - label)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: Selection = Selection {
        choose: Choose::BestWorst,
        ties: Ties::Drop,
        soft: false,
        min_gap: 0.0,
        max_pairs: 1,
        length_control: None,
        require_stop: false,
        near_duplicates: None,
    };

    fn scored<'a>(of: &[(&'a str, f64)]) -> Vec<Scored<'a>> {
        of.iter().map(|&(text, score)| Scored { text, score, variance: 0.0, stopped: true }).collect()
    }

    fn places(picks: &[Pick]) -> Vec<(usize, usize)> {
        picks.iter().map(|p| (p.chosen, p.rejected)).collect()
    }

    #[test]
    fn best_against_worst_and_no_pair_of_equal_scores() {
        let answers = scored(&[("a", 3.0), ("b", 5.0), ("c", 1.0), ("d", f64::NAN)]);
        let picks = PLAIN.select(&answers);
        assert_eq!(picks, [Pick { chosen: 1, rejected: 2, gap: 4.0, label: 1.0 }]);
        assert!(PLAIN.select(&scored(&[("a", 2.0), ("b", 2.0)])).is_empty());
        assert!(PLAIN.select(&scored(&[("a", 2.0)])).is_empty());
        assert!(PLAIN.select(&[]).is_empty());
    }

    #[test]
    fn several_pairs_take_each_answer_once_and_no_pair_twice() {
        let several = Selection { max_pairs: 3, ..PLAIN };
        let answers = scored(&[("42", 1.0), ("42", 1.0), ("7", 0.0), ("8", 0.0), ("9", 0.0)]);
        assert_eq!(places(&several.select(&answers)), [(0, 2), (1, 3)]);
        let same = scored(&[("42", 1.0), ("42", 1.0), ("7", 0.0), ("7", 0.0)]);
        assert_eq!(places(&several.select(&same)), [(0, 2)], "the same two texts are one pair");
        let all = Selection { choose: Choose::All, max_pairs: 9, ..PLAIN };
        assert_eq!(places(&all.select(&answers)), [(0, 2), (0, 3), (0, 4)]);
        let ranked = scored(&[("a", 1.0), ("b", 2.0), ("c", 3.0)]);
        assert_eq!(places(&all.select(&ranked)), [(2, 0), (1, 0), (2, 1)], "the widest gap first");
    }

    #[test]
    fn gaps_ties_and_cut_answers() {
        let wide = Selection { min_gap: 1.0, ..PLAIN };
        assert!(wide.select(&scored(&[("a", 2.0), ("b", 1.5)])).is_empty());
        assert_eq!(wide.select(&scored(&[("a", 2.0), ("b", 1.0)])).len(), 1);
        let soft = Selection { ties: Ties::Soft, ..wide };
        let tie = soft.select(&scored(&[("a", 1.5), ("b", 2.0)]));
        assert_eq!(tie, [Pick { chosen: 1, rejected: 0, gap: 0.5, label: 0.5 }]);
        assert!(soft.select(&scored(&[("a", 1.0), (" a ", 1.0)])).is_empty(), "equal texts are no pair");
        let mut answers = scored(&[("a", 2.0), ("b", 1.0), ("c", 0.0)]);
        answers[0].stopped = false;
        let ended = Selection { require_stop: true, ..PLAIN };
        assert_eq!(places(&ended.select(&answers)), [(1, 2)]);
    }

    #[test]
    fn of_equal_scores_the_surer_one() {
        let mut answers = scored(&[("a", 2.0), ("b", 2.0), ("c", 0.0), ("d", 0.0)]);
        answers[0].variance = 1.0;
        answers[2].variance = 0.5;
        assert_eq!(places(&PLAIN.select(&answers)), [(1, 3)]);
    }

    #[test]
    fn length_control_takes_short_winners_and_long_losers() {
        // Scores 0 to 10, rho 0.3: chosen from 7 up, rejected up to 3.
        let answers = scored(&[("long winner", 10.0), ("short", 7.5), ("x", 6.0), ("no", 0.0), ("a long loser", 2.5)]);
        let control = Selection { length_control: Some(0.3), ..PLAIN };
        assert_eq!(places(&control.select(&answers)), [(1, 4)]);
        let none = Selection { length_control: Some(0.0), ..PLAIN };
        assert_eq!(places(&none.select(&answers)), [(0, 3)]);
    }

    #[test]
    fn near_duplicates_are_no_pair() {
        let careful = Selection { near_duplicates: Some(0.8), ..PLAIN };
        let answers =
            scored(&[("The sky is blue today.", 2.0), ("the sky is  blue today", 0.0), ("I don't know", 1.0)]);
        assert_eq!(places(&careful.select(&answers)), [(0, 2)]);
        assert_eq!(similarity("abc", "ABC "), 1.0);
        assert_eq!(similarity("abc", "xyz"), 0.0);
        assert_eq!(similarity("", " "), 1.0);
    }

    #[test]
    fn soft_labels_follow_the_spread_of_the_samples() {
        let soft = Selection { soft: true, ..PLAIN };
        let mut answers = scored(&[("a", 3.0), ("b", 2.0)]);
        assert_eq!(soft.select(&answers)[0].label, 1.0, "a judge that never wavers");
        answers[0].variance = 0.5;
        answers[1].variance = 0.5;
        // Phi(1)
        assert!((soft.select(&answers)[0].label - 0.841_344_746).abs() < 1e-6);
    }

    #[test]
    fn a_pairwise_judges_pairs_are_filtered() {
        let of = |text| Scored { text, score: f64::NAN, variance: 0.0, stopped: true };
        let compared = |chosen, rejected, probability: f64, tie| {
            let gap = if tie { 0.0 } else { 2.0 * probability - 1.0 };
            Compared { chosen: of(chosen), rejected: of(rejected), gap, probability, tie }
        };
        let pairs = [compared("a", "b", 0.6, false), compared("c", "d", 0.9, false), compared("e", "f", 0.5, true)];
        let best = Selection { soft: true, ..PLAIN }.filter(&pairs);
        assert_eq!((places(&best), best[0].label), (vec![(1, 1)], 0.9));
        let all = Selection { max_pairs: 9, ties: Ties::Soft, ..PLAIN }.filter(&pairs);
        assert_eq!(all.iter().map(|p| p.label).collect::<Vec<_>>(), [1.0, 1.0, 0.5]);
        // A coin prefers one, and knows of no probability.
        let coin = [compared("a", "b", 0.5, false)];
        assert_eq!(PLAIN.filter(&coin), [Pick { chosen: 0, rejected: 0, gap: 0.0, label: 1.0 }]);
        assert_eq!(Selection { soft: true, ..PLAIN }.filter(&coin)[0].label, 0.5);
        assert!(Selection { min_gap: 0.1, ..PLAIN }.filter(&coin).is_empty());
    }

    #[test]
    fn kendall_and_consistency() {
        assert_eq!(kendall(&[1.0, 2.0, 3.0], &[1.0, 2.0, 3.0]), Some(1.0));
        assert_eq!(consistency(&[1.0, 2.0, 3.0], &[3.0, 2.0, 1.0]), Some(0.0));
        // scipy.stats.kendalltau([1, 2, 2, 3], [1, 3, 2, 3]) = 0.7999999999999998
        assert!((kendall(&[1.0, 2.0, 2.0, 3.0], &[1.0, 3.0, 2.0, 3.0]).unwrap() - 0.8).abs() < 1e-12);
        assert_eq!(kendall(&[1.0, 1.0], &[1.0, 2.0]), None);
        assert_eq!(kendall(&[1.0, f64::NAN], &[1.0, 2.0]), None);
        assert_eq!(soften(1.0, 0.75), 0.75);
        assert_eq!(soften(0.5, 0.9), 0.5);
    }
}
