//! The learning rate over a run.

use serde::{Deserialize, Serialize};

/// How the learning rate falls after the warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Decay {
    #[default]
    Linear,
    Cosine,
    Constant,
}

/// Where a step stands in the run. `done` counts optimizer steps before it and may be a fraction
/// where the run's length is only known in source rows.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Position {
    pub done: f64,
    pub total: f64,
}

/// Warm-up and decay, as transformers' `get_scheduler` defines them.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Schedule {
    pub decay: Decay,
    pub learning_rate: f64,
    pub warmup_steps: u64,
}

impl Schedule {
    /// The learning rate of the step at `position`.
    pub fn rate(&self, position: Position) -> f64 {
        let warmup = self.warmup_steps as f64;
        if position.done < warmup {
            return self.learning_rate * position.done / warmup.max(1.0);
        }
        let share = ((position.done - warmup) / (position.total - warmup).max(1.0)).clamp(0.0, 1.0);
        let factor = match self.decay {
            Decay::Linear => 1.0 - share,
            Decay::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * share).cos()),
            Decay::Constant => 1.0,
        };
        self.learning_rate * factor
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rates(decay: Decay, warmup_steps: u64, total: u64) -> Vec<f64> {
        let schedule = Schedule { decay, learning_rate: 1.0, warmup_steps };
        (0..total).map(|s| schedule.rate(Position { done: s as f64, total: total as f64 })).collect()
    }

    #[test]
    fn decays() {
        assert_eq!(rates(Decay::Linear, 0, 4), [1.0, 0.75, 0.5, 0.25]);
        assert_eq!(rates(Decay::Linear, 2, 4), [0.0, 0.5, 1.0, 0.5]);
        assert_eq!(rates(Decay::Constant, 2, 4), [0.0, 0.5, 1.0, 1.0]);
        let cosine = rates(Decay::Cosine, 0, 4);
        assert!((cosine[2] - 0.5).abs() < 1e-12 && cosine[1] > 0.75, "{cosine:?}");
    }

    #[test]
    fn a_warm_up_longer_than_the_run_never_exceeds_the_rate() {
        assert!(rates(Decay::Linear, 10, 4).iter().all(|r| (0.0..=1.0).contains(r)));
    }
}
