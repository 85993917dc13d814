//! Which output of a split a row goes to, from its place alone.
//!
//! A row's side must not depend on timing, on a random draw or on how many rows were filtered
//! before it, so it is a function of the row's ordinal `k` in its shard. With two outputs the
//! smaller one, of share `v`, takes the rows where `floor((k+1) v) > floor(k v)`: evenly spread,
//! and within one row of `v n` for the first `n` rows, whatever `n`. With more outputs the same
//! bound is kept by the schedule of earliest deadlines over windows `floor(j/f) .. ceil((j+1)/f)`
//! (proportionate fair scheduling, Baruah et al., Algorithmica 1996). Shares are exact: parsed from
//! their decimal text, never added as floats.

use datafusion::arrow::array::BooleanArray;
use datafusion::arrow::buffer::BooleanBuffer;
use datafusion::arrow::compute::filter_record_batch;
use datafusion::arrow::record_batch::RecordBatch;

use super::DataError;

/// Digits after the point that a share may have.
const DIGITS: usize = 12;

/// Longest schedule that is kept for three and more outputs.
const LONGEST_PERIOD: u128 = 1_000_000;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Deserialize, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum By {
    /// Evenly over the shard.
    #[default]
    Spread,
    /// The last rows of the shard go to the last output.
    Position,
}

/// A split of a shard's rows.
#[derive(Debug, Clone)]
pub struct Split {
    names: Vec<String>,
    /// Shares as `numerators / denominator`, which is their sum.
    numerators: Vec<u128>,
    denominator: u128,
    rule: Rule,
}

#[derive(Debug, Clone)]
enum Rule {
    One,
    /// Index of the smaller output.
    Two(usize),
    /// Output of each ordinal, repeated.
    Schedule(Vec<u8>),
    /// The first ordinal of each output but the first.
    Position,
}

impl Split {
    /// `shares` are names with their decimal text (`"0.9"`), in the flow's order.
    ///
    /// Errors where a share isn't above 0, or they don't sum to 1 within 1e-9.
    pub fn new(shares: &[(String, String)], by: By) -> Result<Self, DataError> {
        if shares.is_empty() {
            return Err(DataError::user("names no output; say { train = 0.9, validation = 0.1 }"));
        }
        let scale = 10u128.pow(DIGITS as u32);
        let mut numerators = Vec::with_capacity(shares.len());
        for (name, text) in shares {
            match decimal(text) {
                Some(value) if value > 0 && value <= scale => numerators.push(value),
                _ => {
                    return Err(DataError::user(format!(
                        "{name} = {text}: a share is above 0 and at most 1, with at most {DIGITS} digits"
                    )));
                }
            }
        }
        let sum: u128 = numerators.iter().sum();
        if sum.abs_diff(scale) > scale / 1_000_000_000 {
            let text = shares.iter().map(|(_, t)| t.as_str()).collect::<Vec<_>>().join(" + ");
            return Err(DataError::user(format!("shares must sum to 1, but {text} = {}", sum as f64 / scale as f64)));
        }
        let divisor = numerators.iter().copied().fold(sum, gcd);
        let numerators: Vec<u128> = numerators.iter().map(|n| n / divisor).collect();
        let denominator = sum / divisor;
        let rule = match (by, numerators.as_slice()) {
            (_, [_]) => Rule::One,
            (By::Position, _) => Rule::Position,
            (By::Spread, [first, second]) => Rule::Two(if first < second { 0 } else { 1 }),
            (By::Spread, _) => Rule::Schedule(schedule(&numerators, denominator)?),
        };
        Ok(Self { names: shares.iter().map(|(n, _)| n.clone()).collect(), numerators, denominator, rule })
    }

    pub fn names(&self) -> &[String] {
        &self.names
    }

    /// Index into [`Split::names`] of the output that the row of ordinal `k` of `n` goes to.
    pub fn side(&self, k: u64, n: u64) -> usize {
        match &self.rule {
            Rule::One => 0,
            Rule::Two(small) => {
                let (v, of) = (self.numerators[*small], self.denominator);
                let takes = match (u64::try_from(v), u64::try_from(of)) {
                    // Shares like 0.1 stay far from the end of 64 bits, where division is fast.
                    (Ok(v), Ok(of)) if k < u64::from(u32::MAX) && v < u64::from(u32::MAX) => {
                        (k + 1) * v / of > k * v / of
                    }
                    _ => (u128::from(k) + 1) * v / of > u128::from(k) * v / of,
                };
                if takes { *small } else { 1 - small }
            }
            Rule::Schedule(sides) => sides[(k % sides.len() as u64) as usize].into(),
            Rule::Position => self.by_position(u128::from(k), u128::from(n)),
        }
    }

    /// The rows of each output; none where an output gets none of this batch. `sides` is the output of
    /// each row.
    pub fn parts(&self, batch: &RecordBatch, sides: &[usize]) -> Result<Vec<Option<RecordBatch>>, DataError> {
        let part = |side: usize| -> Result<Option<RecordBatch>, DataError> {
            match sides.iter().filter(|s| **s == side).count() {
                0 => Ok(None),
                // Without a copy where nothing is taken out.
                all if all == sides.len() => Ok(Some(batch.clone())),
                _ => {
                    let own =
                        BooleanArray::new(BooleanBuffer::collect_bool(sides.len(), |row| sides[row] == side), None);
                    filter_record_batch(batch, &own).map(Some).map_err(|e| DataError::user(e.to_string()))
                }
            }
        };
        (0..self.names.len()).map(part).collect()
    }

    /// How many of `n` rows go to the output `side`.
    pub fn count(&self, side: usize, n: u64) -> u64 {
        match &self.rule {
            Rule::One => n,
            Rule::Two(small) => {
                let few = (u128::from(n) * self.numerators[*small] / self.denominator) as u64;
                if side == *small { few } else { n - few }
            }
            Rule::Schedule(sides) => {
                let period = sides.len() as u64;
                let of = |sides: &[u8]| sides.iter().filter(|s| usize::from(**s) == side).count() as u64;
                n / period * of(sides) + of(&sides[..(n % period) as usize])
            }
            Rule::Position => (self.begin(side + 1, u128::from(n)) - self.begin(side, u128::from(n))) as u64,
        }
    }

    fn by_position(&self, k: u128, n: u128) -> usize {
        (1..self.names.len()).rev().find(|side| k >= self.begin(*side, n)).unwrap_or(0)
    }

    /// From the end: each output but the first takes `ceil(share n)` rows, the first what is left.
    fn begin(&self, side: usize, n: u128) -> u128 {
        if side == 0 {
            return 0;
        }
        let taken = self.numerators.iter().skip(side).map(|v| (v * n).div_ceil(self.denominator)).sum();
        n.saturating_sub(taken)
    }
}

/// `"0.125"` or `"1e-3"` in units of 10^-DIGITS; none where it isn't such a number.
fn decimal(text: &str) -> Option<u128> {
    let (mantissa, exponent) = match text.split_once(['e', 'E']) {
        Some((m, e)) => (m, e.parse::<i32>().ok()?),
        None => (text, 0),
    };
    let (whole, part) = mantissa.split_once('.').unwrap_or((mantissa, ""));
    let digits = format!("{whole}{part}");
    if digits.is_empty() || digits.len() > 30 || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let value: u128 = digits.parse().ok()?;
    let shift = DIGITS as i32 + exponent - part.len() as i32;
    match shift.unsigned_abs() {
        power if power > 30 => None,
        power if shift >= 0 => value.checked_mul(10u128.pow(power)),
        power => value.is_multiple_of(10u128.pow(power)).then(|| value / 10u128.pow(power)),
    }
}

fn gcd(a: u128, b: u128) -> u128 {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// One period of outputs: at each step, of the outputs whose next window is open, the one whose
/// window closes first.
fn schedule(numerators: &[u128], denominator: u128) -> Result<Vec<u8>, DataError> {
    if denominator > LONGEST_PERIOD || numerators.len() > usize::from(u8::MAX) {
        return Err(DataError::user("three or more shares may have at most six digits after the point"));
    }
    let mut given = vec![0u128; numerators.len()];
    let mut sides = Vec::with_capacity(denominator as usize);
    for step in 0..denominator {
        let open = (0..numerators.len()).filter(|&i| given[i] * denominator / numerators[i] <= step);
        let next = open.min_by_key(|&i| ((given[i] + 1) * denominator).div_ceil(numerators[i])).unwrap_or(0);
        given[next] += 1;
        sides.push(next as u8);
    }
    Ok(sides)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn split(shares: &[&str], by: By) -> Split {
        let named: Vec<_> = shares.iter().enumerate().map(|(i, s)| (format!("o{i}"), (*s).to_owned())).collect();
        Split::new(&named, by).unwrap()
    }

    #[test]
    fn a_tenth_is_every_tenth_row() {
        for shares in [["0.9", "0.1"], ["0.1", "0.9"]] {
            let s = split(&shares, By::Spread);
            let small = usize::from(shares[1] == "0.1");
            let taken: Vec<u64> = (0..1_000_000).filter(|&k| s.side(k, 0) == small).take(100_000).collect();
            assert!(taken.iter().enumerate().all(|(i, &k)| k == 10 * i as u64 + 9));
        }
    }

    #[test]
    fn by_position_is_the_last_part_rounded_up() {
        let s = split(&["0.9", "0.1"], By::Position);
        for (n, validation) in [(10, 1), (27, 3), (100, 10), (1000, 100)] {
            let taken: Vec<u64> = (0..n).filter(|&k| s.side(k, n) == 1).collect();
            assert_eq!(taken, (n - validation..n).collect::<Vec<_>>());
        }
    }

    #[test]
    fn wrong_shares_are_refused_with_the_sum() {
        let shares = |a: &str, b: &str| Split::new(&[("a".into(), a.into()), ("b".into(), b.into())], By::Spread);
        assert_eq!(shares("0.9", "0.2").unwrap_err().message, "shares must sum to 1, but 0.9 + 0.2 = 1.1");
        for bad in ["0", "-0.1", "nan", "inf", "", "1.5"] {
            assert!(shares("0.9", bad).is_err(), "{bad}");
        }
        assert!(shares("0.9999999999", "1e-10").is_ok());
        assert!(split(&["0.333333333", "0.333333333", "0.333333333"], By::Spread).names().len() == 3);
    }

    proptest! {
        #[test]
        fn counts_are_those_of_the_sides(cuts in prop::collection::vec(1u32..60, 0..4), n in 0u64..700, position: bool) {
            let rest = 1000 - cuts.iter().sum::<u32>();
            let texts: Vec<String> = cuts.iter().chain([&rest]).map(|c| format!("{}", f64::from(*c) / 1000.0)).collect();
            let by = if position { By::Position } else { By::Spread };
            let s = split(&texts.iter().map(String::as_str).collect::<Vec<_>>(), by);
            for side in 0..texts.len() {
                prop_assert_eq!(s.count(side, n), (0..n).filter(|k| s.side(*k, n) == side).count() as u64);
            }
        }

        #[test]
        fn any_prefix_is_within_one_row_of_its_share(cuts in prop::collection::vec(1u32..60, 1..5), n in 1u64..3000) {
            let total: u32 = cuts.iter().sum();
            let mut parts: Vec<u32> = cuts.iter().map(|c| c * 1000 / total).filter(|&p| p > 0).collect();
            let rest = 1000 - parts.iter().sum::<u32>();
            parts[0] += rest;
            let texts: Vec<String> = parts.iter().map(|p| format!("{}", f64::from(*p) / 1000.0)).collect();
            let s = split(&texts.iter().map(String::as_str).collect::<Vec<_>>(), By::Spread);
            let mut counts = vec![0i64; parts.len()];
            for k in 0..n {
                counts[s.side(k, n)] += 1;
                for (count, part) in counts.iter().zip(&parts) {
                    let lag = count * 1000 - i64::from(*part) * (k as i64 + 1);
                    prop_assert!(lag.abs() < 1000 || parts.len() == 1, "{counts:?} of {parts:?} after {k}");
                }
            }
        }

        #[test]
        fn position_gives_each_row_one_side_in_order(n in 1u64..500, v in 1u32..999) {
            let (rest, v) = (format!("{}", f64::from(1000 - v) / 1000.0), format!("{}", f64::from(v) / 1000.0));
            let s = split(&[&rest, &v], By::Position);
            let sides: Vec<usize> = (0..n).map(|k| s.side(k, n)).collect();
            prop_assert!(sides.windows(2).all(|w| w[0] <= w[1]));
        }
    }
}
