//! Figures of a step or an evaluation, under TRL's names.

use serde::{Deserialize, Serialize};

use super::loss::{PairLoss, Scores};

/// Means over pairs.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct Stats {
    pub loss: f64,
    #[serde(rename = "rewards/chosen")]
    pub chosen: f64,
    #[serde(rename = "rewards/rejected")]
    pub rejected: f64,
    #[serde(rename = "rewards/margins")]
    pub margins: f64,
    #[serde(rename = "rewards/accuracies")]
    pub accuracies: f64,
    #[serde(rename = "logps/chosen")]
    pub logps_chosen: f64,
    #[serde(rename = "logps/rejected")]
    pub logps_rejected: f64,
}

impl Stats {
    /// Of one pair. A reward is `beta` times the log-ratio of policy and reference.
    pub fn of(scores: &Scores, loss: &PairLoss, beta: f64) -> Self {
        let [chosen, rejected] = scores.ratios().map(|ratio| beta * ratio);
        Self {
            loss: loss.value,
            chosen,
            rejected,
            margins: chosen - rejected,
            accuracies: f64::from(u8::from(chosen > rejected)),
            logps_chosen: scores.policy[0],
            logps_rejected: scores.policy[1],
        }
    }

    fn each(&mut self) -> [&mut f64; 7] {
        [
            &mut self.loss,
            &mut self.chosen,
            &mut self.rejected,
            &mut self.margins,
            &mut self.accuracies,
            &mut self.logps_chosen,
            &mut self.logps_rejected,
        ]
    }
}

/// Which figure of an evaluation says what adapter is the best.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Metric {
    #[serde(rename = "loss")]
    Loss,
    #[serde(rename = "rewards/margins")]
    Margins,
    #[serde(rename = "rewards/accuracies")]
    Accuracies,
}

impl Metric {
    /// The figure, such that more is better.
    pub fn of(self, stats: &Stats) -> f64 {
        match self {
            Self::Loss => -stats.loss,
            Self::Margins => stats.margins,
            Self::Accuracies => stats.accuracies,
        }
    }
}

/// A weighted mean in the making.
#[derive(Debug, Clone, Copy, Default)]
pub struct Tally {
    sum: Stats,
    weight: f64,
}

impl Tally {
    pub fn add(&mut self, mut stats: Stats, weight: f64) {
        for (sum, value) in self.sum.each().into_iter().zip(stats.each()) {
            *sum += *value * weight;
        }
        self.weight += weight;
    }

    pub fn merge(&mut self, mut other: Tally) {
        for (sum, value) in self.sum.each().into_iter().zip(other.sum.each()) {
            *sum += *value;
        }
        self.weight += other.weight;
    }

    /// What was added, in total weight: micro-batches of a step, pairs of an evaluation.
    pub fn weight(&self) -> f64 {
        self.weight
    }

    /// `None` where nothing was added.
    pub fn mean(&self) -> Option<Stats> {
        if self.weight <= 0.0 {
            return None;
        }
        let mut mean = self.sum;
        mean.each().into_iter().for_each(|value| *value /= self.weight);
        Some(mean)
    }
}
