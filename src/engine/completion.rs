//! Every row that a stage sends on a port is completed there exactly once.
//!
//! Later stages depend on it: a stage that collects all rows of a `_row` sends them on when the row is completed.
//! Rows that are never completed would be lost there.

use std::fmt;

use super::progress::run;
use super::row_set::RowSet;

/// The rows of one port of a stage, over a round.
#[derive(Debug, Default)]
pub struct Completion {
    /// Rows that were sent and are not completed yet.
    open: RowSet,
    completed: RowSet,
}

/// How a stage violated the rule of this module; each variant has the row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Breach {
    /// The row was sent after it had been completed.
    Late(u64),
    Twice(u64),
    Never(u64),
}

impl fmt::Display for Breach {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Late(row) => write!(f, "sent row {row} after it had completed it"),
            Self::Twice(row) => write!(f, "completed row {row} twice"),
            Self::Never(row) => write!(f, "sent row {row} and never completed it"),
        }
    }
}

impl Completion {
    /// Records a message that holds `rows` and completes `completes`.
    ///
    /// # Errors
    /// A row in the message had already been completed.
    pub fn sent(&mut self, rows: &[u64], completes: &[u64]) -> Result<(), Breach> {
        if let Some((first, count)) = run(completes) {
            // Most messages complete what they hold. Without a way out of the loop it runs over many rows at a time.
            let inside = rows.iter().fold(true, |all, row| all & (row.wrapping_sub(first) < count));
            if inside {
                if let Some(row) = self.completed.first_of_run(first, count, true) {
                    return Err(Breach::Twice(row));
                }
                self.completed.insert_run(first, count);
                if !self.open.is_empty() {
                    self.open.remove_run(first, count);
                }
                return Ok(());
            }
        }
        if let Some(row) = rows.iter().find(|row| self.completed.contains(**row)) {
            return Err(Breach::Late(*row));
        }
        self.open.extend(rows.iter().copied());
        for row in completes {
            if !self.completed.insert(*row) {
                return Err(Breach::Twice(*row));
            }
            self.open.remove(*row);
        }
        Ok(())
    }

    /// Checks, at the end of the round, that every row sent on this port was completed.
    ///
    /// # Errors
    /// A row was sent and not completed.
    pub fn end(&self) -> Result<(), Breach> {
        self.open.first().map_or(Ok(()), |row| Err(Breach::Never(row)))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Compares the result with a simple table of every row's state.
        #[test]
        fn a_row_is_completed_exactly_once(
            messages in prop::collection::vec(
                (prop::collection::vec(0u64..90, 0..6), 0u64..90, 0u64..70, prop::collection::vec(0u64..90, 0..3)), 1..12,
            ),
        ) {
            let (mut completion, mut done) = (Completion::default(), BTreeMap::<u64, bool>::new());
            for (rows, first, count, more) in messages {
                // A run, or some rows.
                let completes: Vec<u64> = if more.is_empty() { (first..first + count).collect() } else { more };
                let late = rows.iter().any(|row| done.get(row) == Some(&true));
                rows.iter().for_each(|row| { done.entry(*row).or_default(); });
                let mut twice = false;
                for row in &completes {
                    twice |= done.insert(*row, true) == Some(true);
                }
                let found = completion.sent(&rows, &completes);
                prop_assert_eq!(found.is_err(), late || twice, "{:?}", found);
                if found.is_err() {
                    return Ok(());
                }
            }
            let never = done.iter().find(|(_, done)| !**done).map(|(row, _)| Breach::Never(*row));
            prop_assert_eq!(completion.end().err(), never);
        }
    }
}
