//! The low watermark of a stage: below which row nothing more will come out of it.

use super::row_set::RowSet;

/// Follows the rows that came in and have not been completed, and what the inputs promise.
///
/// With it a stage says only which rows it finishes; the promise it can give downstream follows:
/// the lowest of its open rows and of its inputs' own watermarks.
#[derive(Debug, Clone)]
pub struct Watermark {
    inputs: Vec<u64>,
    open: RowSet,
}

impl Watermark {
    pub fn new(inputs: usize) -> Self {
        Self { inputs: vec![0; inputs], open: RowSet::default() }
    }

    /// Rows that a message of input `input` holds and completes, and its watermark after them.
    /// Watermarks never fall.
    pub fn received(&mut self, input: usize, rows: &[u64], completes: &[u64], watermark: u64) {
        match run(completes) {
            // Most messages complete what they hold, and that is a stretch of the source.
            Some((first, count)) => {
                self.open.insert_run(first, count);
                // Without a way out of the loop it runs over many rows at a time.
                if rows.iter().fold(false, |out, row| out | (row.wrapping_sub(first) >= count)) {
                    self.open.extend(rows.iter().copied());
                }
            }
            None => self.open.extend(rows.iter().chain(completes).copied()),
        }
        if let Some(low) = self.inputs.get_mut(input) {
            *low = watermark.max(*low);
        }
    }

    /// Input `input` has given its end-of-round mark.
    pub fn ended(&mut self, input: usize) {
        self.received(input, &[], &[], u64::MAX);
    }

    /// Rows that the stage has completed. Returns the first of them that was not open, if there is one.
    pub fn completed(&mut self, rows: &[u64]) -> Option<u64> {
        match run(rows) {
            Some((first, count)) => {
                let stranger = self.open.first_of_run(first, count, false);
                self.open.remove_run(first, count);
                stranger
            }
            None => rows.iter().fold(None, |stranger, row| {
                let open = self.open.remove(*row);
                stranger.or((!open).then_some(*row))
            }),
        }
    }

    /// The lowest row that came in and is not completed.
    pub fn open(&self) -> Option<u64> {
        self.open.first()
    }

    /// No row below this one will come any more; `u64::MAX` when all is done.
    pub fn low(&self) -> u64 {
        let inputs = self.inputs.iter().copied().min().unwrap_or(u64::MAX);
        self.open.first().unwrap_or(u64::MAX).min(inputs)
    }
}

/// First number and length, where the numbers are consecutive.
pub(super) fn run(rows: &[u64]) -> Option<(u64, u64)> {
    let (first, count) = (*rows.first()?, rows.len() as u64);
    if rows.last()?.wrapping_sub(first) != count - 1 {
        return None;
    }
    // Without a way out of the loop it runs over many rows at a time.
    let consecutive = rows.windows(2).fold(true, |all, pair| all & (pair[1] == pair[0].wrapping_add(1)));
    consecutive.then_some((first, count))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn holds_at_the_oldest_open_row_and_the_slowest_input() {
        let mut mark = Watermark::new(2);
        mark.received(0, &[4, 5, 6], &[], 7);
        assert_eq!(mark.low(), 0);
        mark.received(1, &[], &[], 6);
        mark.completed(&[5]);
        assert_eq!(mark.low(), 4);
        mark.completed(&[4, 6]);
        assert_eq!(mark.low(), 6);
        mark.ended(0);
        mark.ended(1);
        assert_eq!(mark.low(), u64::MAX);
    }

    proptest! {
        /// Rows come in order and are completed in any order: the mark never falls and never
        /// passes a row that is still to be completed.
        #[test]
        fn never_passes_an_open_row(order in Just((0u64..40).collect::<Vec<_>>()).prop_shuffle(), ahead in 1usize..40) {
            let mut mark = Watermark::new(1);
            let (mut done, mut last, mut came) = (BTreeSet::new(), 0, 0);
            for (i, row) in order.iter().enumerate() {
                while came < 40 && (came <= *row || (came as usize) < i + ahead) {
                    mark.received(0, &[came], &[], came + 1);
                    came += 1;
                }
                mark.completed(&[*row]);
                done.insert(*row);
                let low = mark.low();
                prop_assert!(low >= last);
                prop_assert!((0..low.min(40)).all(|r| done.contains(&r)));
                last = low;
            }
            mark.ended(0);
            prop_assert_eq!(mark.low(), u64::MAX);
        }
    }
}
