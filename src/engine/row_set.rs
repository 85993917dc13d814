//! A set of row numbers that is cheap where they come in runs.
//!
//! A stage follows every row that came in until it is completed, a million times a second where
//! its work is small. Row numbers are places in a source, so those that are open at one time lie
//! close together: a bit for each number from the lowest on is faster and smaller than a tree.

use std::collections::{BTreeSet, VecDeque};

/// Numbers further than this from the lowest one are kept in a tree: 2^28 bits are 32 MiB.
const SPAN: u64 = 1 << 28;

#[derive(Debug, Clone, Default)]
pub struct RowSet {
    /// Number of the first bit of the first word; a multiple of 64.
    base: u64,
    words: VecDeque<u64>,
    /// Numbers in `words`.
    near: usize,
    far: BTreeSet<u64>,
}

impl RowSet {
    /// False where it was there already.
    pub fn insert(&mut self, row: u64) -> bool {
        // The span may have moved to where it is since.
        if !self.far.is_empty() && self.far.contains(&row) {
            return false;
        }
        let Some(word) = self.word_for(row) else {
            return self.far.insert(row);
        };
        let bit = 1 << (row % 64);
        let new = *word & bit == 0;
        *word |= bit;
        self.near += usize::from(new);
        new
    }

    /// False where it wasn't there.
    pub fn remove(&mut self, row: u64) -> bool {
        let word = row.checked_sub(self.base).and_then(|at| self.words.get_mut(usize::try_from(at / 64).ok()?));
        let Some(word) = word else {
            return !self.far.is_empty() && self.far.remove(&row);
        };
        let bit = 1 << (row % 64);
        let there = *word & bit != 0;
        *word &= !bit;
        if !there {
            return !self.far.is_empty() && self.far.remove(&row);
        }
        self.near -= 1;
        self.shrink();
        true
    }

    /// Inserts `first` and the `count - 1` numbers after it.
    pub fn insert_run(&mut self, first: u64, count: u64) {
        let mut row = first;
        let end = first.saturating_add(count);
        while row < end {
            // A whole word where its 64 numbers are all in the run.
            if row.is_multiple_of(64)
                && end - row >= 64
                && self.far.is_empty()
                && let Some(word) = self.word_for(row)
            {
                let before = std::mem::replace(word, u64::MAX);
                self.near += before.count_zeros() as usize;
                row += 64;
                continue;
            }
            self.insert(row);
            row += 1;
        }
    }

    /// Removes `first` and the `count - 1` numbers after it.
    pub fn remove_run(&mut self, first: u64, count: u64) {
        let mut row = first;
        let end = first.saturating_add(count);
        while row < end {
            if row.is_multiple_of(64) && end - row >= 64 && self.far.is_empty() && row >= self.base {
                let Some(word) = self.words.get_mut(((row - self.base) / 64) as usize) else { return };
                self.near -= std::mem::take(word).count_ones() as usize;
                row += 64;
                continue;
            }
            self.remove(row);
            row += 1;
        }
        self.shrink();
    }

    pub fn contains(&self, row: u64) -> bool {
        let word = row.checked_sub(self.base).and_then(|at| self.words.get(usize::try_from(at / 64).ok()?));
        word.is_some_and(|word| word & (1 << (row % 64)) != 0) || self.far.contains(&row)
    }

    /// The lowest of `first` and the `count - 1` numbers after it that is there, or with `there` false that is not.
    pub fn first_of_run(&self, first: u64, count: u64, there: bool) -> Option<u64> {
        let (mut row, end) = (first, first.saturating_add(count));
        let whole = if there { 0 } else { u64::MAX };
        while row < end {
            // A whole word at a time while none of its 64 numbers is what is looked for.
            let word =
                row.checked_sub(self.base).map_or(0, |at| self.words.get((at / 64) as usize).copied().unwrap_or(0));
            if row.is_multiple_of(64) && end - row >= 64 && self.far.is_empty() && word == whole {
                row += 64;
            } else if self.contains(row) == there {
                return Some(row);
            } else {
                row += 1;
            }
        }
        None
    }

    pub fn is_empty(&self) -> bool {
        self.near == 0 && self.far.is_empty()
    }

    pub fn first(&self) -> Option<u64> {
        let near = self.words.iter().zip(0u64..).find(|(word, _)| **word != 0);
        let near = near.map(|(word, at)| self.base + 64 * at + u64::from(word.trailing_zeros()));
        near.into_iter().chain(self.far.first().copied()).min()
    }

    /// The word that holds `row`, the span grown to it; none where it is too far away.
    fn word_for(&mut self, row: u64) -> Option<&mut u64> {
        if self.near == 0 {
            self.words.clear();
            self.base = row / 64 * 64;
        }
        if row < self.base {
            let more = (self.base - row).div_ceil(64);
            if more + self.words.len() as u64 > SPAN / 64 {
                return None;
            }
            (0..more).for_each(|_| self.words.push_front(0));
            self.base -= 64 * more;
        }
        let at = (row - self.base) / 64;
        if at >= SPAN / 64 {
            return None;
        }
        let at = at as usize;
        if at >= self.words.len() {
            self.words.resize(at + 1, 0);
        }
        self.words.get_mut(at)
    }

    fn shrink(&mut self) {
        while self.words.front() == Some(&0) {
            self.words.pop_front();
            // An empty span is placed anew by the next row.
            self.base = self.base.wrapping_add(64);
        }
    }
}

impl Extend<u64> for RowSet {
    fn extend<T: IntoIterator<Item = u64>>(&mut self, rows: T) {
        for row in rows {
            self.insert(row);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn runs_are_their_rows(steps in prop::collection::vec((any::<bool>(), 0u64..600, 0u64..200, prop_oneof![Just(0u64), Just(1 << 40)]), 1..60)) {
            let (mut runs, mut single) = (RowSet::default(), BTreeSet::new());
            for (insert, first, count, far) in steps {
                let first = first + far;
                if insert {
                    runs.insert_run(first, count);
                    single.extend(first..first + count);
                } else {
                    runs.remove_run(first, count);
                    single.retain(|row| !(first..first + count).contains(row));
                }
                for there in [true, false] {
                    let run = first.saturating_sub(70)..first + count;
                    let found = runs.first_of_run(run.start, run.end - run.start, there);
                    prop_assert_eq!(found, run.clone().find(|row| single.contains(row) == there));
                }
                prop_assert_eq!(runs.is_empty(), single.is_empty());
                prop_assert_eq!(runs.first(), single.first().copied());
                prop_assert_eq!(runs.near + runs.far.len(), single.len());
                prop_assert!(single.iter().all(|row| runs.contains(*row)));
            }
        }

        #[test]
        fn is_a_set(steps in prop::collection::vec((any::<bool>(), prop_oneof![0u64..400, (1u64 << 40)..(1 << 40) + 90, Just(u64::MAX)]), 1..300)) {
            let (mut rows, mut model) = (RowSet::default(), BTreeSet::new());
            for (insert, row) in steps {
                if insert {
                    prop_assert_eq!(rows.insert(row), model.insert(row));
                } else {
                    prop_assert_eq!(rows.remove(row), model.remove(&row));
                }
                prop_assert_eq!(rows.first(), model.first().copied());
                prop_assert_eq!(rows.contains(row), model.contains(&row));
            }
        }
    }
}
