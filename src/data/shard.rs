//! Which rows of a data set a round reads.

use super::DataError;

/// One round's part of a source: strided (round r of `count` reads rows with `_row % count = r-1`)
/// or a contiguous block (the first `total % count` blocks are one row longer, as in Hugging Face
/// datasets).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Geometry {
    pub index: u64,
    pub count: u64,
    pub contiguous: bool,
    /// Rows of the source after `take`.
    pub total: u64,
}

impl Geometry {
    /// First row of a contiguous block.
    fn start(&self) -> u64 {
        let (size, longer) = (self.total / self.count.max(1), self.total % self.count.max(1));
        self.index * size + self.index.min(longer)
    }

    /// Rows in this shard.
    pub fn rows(&self) -> u64 {
        let (size, longer) = (self.total / self.count.max(1), self.total % self.count.max(1));
        size + u64::from(self.index < longer)
    }

    /// Place of a row in the shard; none where the row is of another one.
    pub fn ordinal(&self, row: u64) -> Option<u64> {
        let count = self.count.max(1);
        if row >= self.total {
            return None;
        }
        if self.contiguous {
            return row.checked_sub(self.start()).filter(|k| *k < self.rows());
        }
        (row % count == self.index).then_some(row / count)
    }
}

/// `shard = { count = 3, contiguous = false }`, or `shard = "round"`: as many as there are rounds.
#[derive(Debug, Clone, PartialEq, Eq, serde::Deserialize)]
#[serde(untagged, expecting = "shard is \"round\" or a table such as { count = 3, contiguous = false }")]
pub enum ShardOption {
    Named(String),
    Cut(Cut),
}

#[derive(Debug, Clone, PartialEq, Eq, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cut {
    pub count: u64,
    #[serde(default)]
    pub contiguous: bool,
}

impl ShardOption {
    /// Errors on a name other than `round` and on a count of 0.
    pub fn cut(&self, rounds: u32) -> Result<Cut, DataError> {
        match self {
            Self::Named(name) if name == "round" => Ok(Cut { count: u64::from(rounds), contiguous: false }),
            Self::Named(name) => {
                Err(DataError::user(format!("\"{name}\" is unknown; say \"round\" or {{ count = 3 }}")))
            }
            Self::Cut(cut) if cut.count == 0 => Err(DataError::user("count must be at least 1")),
            Self::Cut(cut) => Ok(cut.clone()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(n: u64, index: u64, count: u64, contiguous: bool) -> Vec<u64> {
        let shard = Geometry { index, count, contiguous, total: n };
        let rows: Vec<u64> = (0..n).filter(|&r| shard.ordinal(r).is_some()).collect();
        assert_eq!(rows.len() as u64, shard.rows());
        assert!(rows.iter().enumerate().all(|(k, &r)| shard.ordinal(r) == Some(k as u64)));
        rows
    }

    #[test]
    fn strided_shards_are_every_nth_row() {
        for n in [10, 27, 100, 1000] {
            for count in [1, 3, 4, 7] {
                for index in 0..count {
                    let expected: Vec<u64> = (index..n).step_by(count as usize).collect();
                    assert_eq!(rows(n, index, count, false), expected, "{n} {index}/{count}");
                }
            }
        }
    }

    #[test]
    fn the_first_blocks_are_longer() {
        assert_eq!(rows(10, 0, 3, true), [0, 1, 2, 3]);
        assert_eq!(rows(10, 1, 3, true), [4, 5, 6]);
        assert_eq!(rows(10, 2, 3, true), [7, 8, 9]);
        for n in [10, 27, 100, 1000] {
            let all: Vec<u64> = (0..7).flat_map(|i| rows(n, i, 7, true)).collect();
            assert_eq!(all, (0..n).collect::<Vec<_>>());
        }
    }
}
