//! One answer on its way, and the dense batch of those that are decoded.

use super::request::GenerateRequest;
use super::sampling::{Drawn, Seen};
use super::stop::{Cut, Tail};

/// One candidate of a request.
pub struct Sequence {
    /// The request it belongs to.
    pub group: u64,
    /// Its place among the request's candidates.
    pub candidate: usize,
    /// Sampled so far.
    pub ids: Vec<u32>,
    /// Sum of the sampled tokens' log-probs at temperature 1.
    pub logprob: f64,
    /// Tokens whose keys and values are in its slot. While it is decoded, all but the last of `ids`.
    pub cached: usize,
    /// Tokens of prompt and answer at its longest.
    pub reach: usize,
    /// Key of its adapter, 0 for the base.
    pub adapter: u64,
    /// What penalties need, where it has some.
    pub seen: Option<Seen>,
    /// Log-probs of `ids`, where somebody needs them one by one.
    pub logprobs: Option<Vec<f32>>,
    /// What stop strings are looked for in.
    pub tail: Tail,
    /// Bytes of text in front of the stop string that was found.
    pub text_end: Option<usize>,
}

impl Sequence {
    pub fn new(group: u64, candidate: usize, reach: usize) -> Self {
        Self {
            group,
            candidate,
            ids: Vec::new(),
            logprob: 0.0,
            cached: 0,
            reach,
            adapter: 0,
            seen: None,
            logprobs: None,
            tail: Tail::default(),
            text_end: None,
        }
    }

    /// Keeps what `request` asks for.
    pub fn keeping(self, request: &GenerateRequest) -> Self {
        // The tokens of a stop string are taken back out of the sum.
        let each = request.sampling.logprobs || request.stop_strings.is_some();
        Self { seen: Seen::new(&request.sampling, &request.prompt), logprobs: each.then(Vec::new), ..self }
    }

    pub fn push(&mut self, drawn: Drawn) {
        self.ids.push(drawn.token);
        self.logprob += f64::from(drawn.logprob);
        self.logprobs.iter_mut().for_each(|all| all.push(drawn.logprob));
        self.seen.iter_mut().for_each(|seen| seen.push(drawn.token));
    }

    /// Ends it in front of a stop string.
    pub fn cut(&mut self, cut: Cut) {
        self.ids.truncate(cut.tokens);
        self.text_end = Some(cut.bytes);
        if let Some(all) = &mut self.logprobs {
            all.truncate(cut.tokens);
            self.logprob = all.iter().map(|p| f64::from(*p)).sum();
        }
    }
}

/// Slot `from`, `tokens` long, is now slot `to`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Move {
    pub from: usize,
    pub to: usize,
    pub tokens: usize,
}

/// The sequences that are decoded; number `i` has slot `i` of the cache.
///
/// They lie side by side, those of one adapter together, so that a step works on the first slots as
/// they are and adds each adapter to one stretch of rows. Whoever joins or leaves moves at most one
/// sequence of each adapter.
#[derive(Default)]
pub struct Running {
    rows: Vec<Sequence>,
}

impl Running {
    pub fn rows(&self) -> &[Sequence] {
        &self.rows
    }

    pub fn rows_mut(&mut self) -> &mut [Sequence] {
        &mut self.rows
    }

    pub fn take(&mut self) -> Vec<Sequence> {
        std::mem::take(&mut self.rows)
    }

    /// Makes room: `sequence` has the slot that comes back, once the moves are made in their order.
    pub fn insert(&mut self, sequence: Sequence) -> (usize, Vec<Move>) {
        let key = sequence.adapter;
        let mut hole = self.rows.len();
        self.rows.push(sequence);
        let mut moves = Vec::new();
        // The first of every later stretch goes to its end.
        while let Some(later) = self.rows[..hole].last().map(|r| r.adapter).filter(|later| *later > key) {
            let first = self.rows[..hole].partition_point(|r| r.adapter < later);
            self.swap(first, hole, &mut moves);
            hole = first;
        }
        (hole, moves)
    }

    /// Takes the sequence of a slot out.
    pub fn remove(&mut self, slot: usize) -> Option<(Sequence, Vec<Move>)> {
        let mut key = self.rows.get(slot)?.adapter;
        let mut hole = slot;
        let mut moves = Vec::new();
        // The last of its own stretch and of every later one fills the hole before it.
        loop {
            let end = self.rows.partition_point(|r| r.adapter <= key);
            if end - 1 != hole {
                self.swap(end - 1, hole, &mut moves);
                hole = end - 1;
            }
            match self.rows.get(end) {
                Some(next) => key = next.adapter,
                None => break,
            }
        }
        self.rows.pop().map(|sequence| (sequence, moves))
    }

    /// The living row at `from` moves to the hole at `to`.
    fn swap(&mut self, from: usize, to: usize, moves: &mut Vec<Move>) {
        self.rows.swap(from, to);
        moves.push(Move { from, to, tokens: self.rows[to].cached });
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn sequence(id: u64, adapter: u64) -> Sequence {
        Sequence { adapter, cached: id as usize, ..Sequence::new(id, 0, 0) }
    }

    proptest! {
        /// Slots that only ever follow the moves hold what `Running` says, and adapters stay together.
        #[test]
        fn slots_follow_the_rows(steps in prop::collection::vec((any::<bool>(), 0..4_u64, any::<prop::sample::Index>()), 1..60)) {
            let mut running = Running::default();
            let mut slots: Vec<u64> = vec![u64::MAX; 64];
            for (id, (leaves, adapter, which)) in steps.into_iter().enumerate() {
                let apply = |slots: &mut Vec<u64>, moves: &[Move]| {
                    for m in moves {
                        assert_eq!(m.tokens as u64, slots[m.from]);
                        slots[m.to] = slots[m.from];
                    }
                };
                let most = running.rows().iter().fold([0; 4], |mut n, r| { n[r.adapter as usize] += 1; n });
                let adapters = most.iter().filter(|n| **n > 0).count();
                if leaves && !running.rows().is_empty() {
                    let (gone, moves) = running.remove(which.index(running.rows().len())).unwrap();
                    prop_assert!(moves.len() <= adapters);
                    apply(&mut slots, &moves);
                    prop_assert!(running.rows().iter().all(|r| r.group != gone.group));
                } else {
                    let (slot, moves) = running.insert(sequence(id as u64, adapter));
                    prop_assert!(moves.len() <= adapters);
                    apply(&mut slots, &moves);
                    slots[slot] = id as u64;
                }
                for (row, slot) in running.rows().iter().zip(&slots) {
                    prop_assert_eq!(row.group, *slot);
                }
                prop_assert!(running.rows().is_sorted_by_key(|r| r.adapter));
            }
        }
    }
}
