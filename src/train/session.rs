//! Which pairs make which step: epochs, micro-batches and steps as data.

use super::schedule::Position;

/// Order of pairs after a first epoch that was streamed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Order {
    #[default]
    Shuffled,
    Sequential,
}

/// The shape of a training run, without its pairs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Session {
    pub epochs: u64,
    /// Pairs of a micro-batch.
    pub batch_size: usize,
    /// Micro-batches of a step.
    pub accumulation: usize,
    pub order: Order,
    /// The first epoch is in row order, because it trains while pairs arrive.
    pub streamed: bool,
    pub seed: u64,
    /// Tokens that go through the model at once, where several pairs can.
    pub pass_tokens: Option<usize>,
}

impl Session {
    pub fn pairs_per_step(&self) -> usize {
        self.batch_size * self.accumulation
    }

    /// Optimizer steps of one epoch over `pairs`: a short last group still steps.
    pub fn steps_per_epoch(&self, pairs: usize) -> u64 {
        pairs.div_ceil(self.batch_size.max(1)).div_ceil(self.accumulation.max(1)) as u64
    }

    pub fn steps(&self, pairs: usize) -> u64 {
        self.epochs.saturating_mul(self.steps_per_epoch(pairs))
    }

    /// The pairs of `epoch` (from 0) in their order. Depends on nothing but seed, epoch and count.
    pub fn order(&self, epoch: u64, pairs: usize) -> Vec<usize> {
        let mut order: Vec<usize> = (0..pairs).collect();
        if self.order == Order::Shuffled && !(self.streamed && epoch == 0) {
            order.sort_by_cached_key(|index| {
                let mut hasher = blake3::Hasher::new();
                hasher.update(b"order of pairs").update(&self.seed.to_le_bytes()).update(&epoch.to_le_bytes());
                hasher.update(&(*index as u64).to_le_bytes());
                *hasher.finalize().as_bytes()
            });
        }
        order
    }

    /// Where a step stands once the number of pairs is known; `step` counts from 0 over all epochs.
    pub fn exact(&self, step: u64, pairs: usize) -> Position {
        Position { done: step as f64, total: self.steps(pairs) as f64 }
    }

    /// Where a step of the streamed epoch stands: its first pair descends from source row `row` of
    /// `rows`. The run is taken to be as long as if every row gave one pair.
    pub fn streamed(&self, row: u64, rows: u64) -> Position {
        let epoch = self.steps_per_epoch(usize::try_from(rows).unwrap_or(usize::MAX)) as f64;
        Position { done: epoch * row.min(rows) as f64 / rows.max(1) as f64, total: epoch * self.epochs as f64 }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SESSION: Session = Session {
        epochs: 3,
        batch_size: 2,
        accumulation: 2,
        order: Order::Shuffled,
        streamed: true,
        seed: 1,
        pass_tokens: None,
    };

    #[test]
    fn a_short_last_group_steps() {
        assert_eq!([0, 1, 4, 5, 9].map(|n| SESSION.steps_per_epoch(n)), [0, 1, 1, 2, 3]);
        assert_eq!(SESSION.steps(9), 9);
    }

    #[test]
    fn only_the_streamed_epoch_is_in_row_order() {
        let rows: Vec<usize> = (0..50).collect();
        assert_eq!(SESSION.order(0, 50), rows);
        assert_ne!(SESSION.order(1, 50), rows);
        assert_ne!(SESSION.order(1, 50), SESSION.order(2, 50));
        assert_ne!(Session { streamed: false, ..SESSION }.order(0, 50), rows);
        assert_eq!(Session { order: Order::Sequential, ..SESSION }.order(1, 50), rows);
    }

    #[test]
    fn rows_that_all_give_a_pair_make_the_exact_schedule() {
        for step in 0..5 {
            let (streamed, exact) = (SESSION.streamed(step * 4, 20), SESSION.exact(step, 20));
            assert!((streamed.done - exact.done).abs() < 1e-12 && streamed.total == exact.total);
        }
    }

    proptest! {
        #[test]
        fn every_epoch_holds_every_pair_once(seed: u64, epoch in 0u64..5, pairs in 0usize..200) {
            let mut order = Session { seed, ..SESSION }.order(epoch, pairs);
            order.sort_unstable();
            prop_assert!(order.into_iter().eq(0..pairs));
        }
    }
}
