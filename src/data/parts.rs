//! The column `_part` (u32): which of the rows that a query made of one row.
//!
//! Rows that UNNEST or a join made of one row share its keys. (`_row`, `_part`) names what later stages look at
//! together: a prompt, and then its answers, their verdicts and pairs.

use std::collections::HashMap;
use std::sync::Arc;

use datafusion::arrow::array::{Array, ArrayRef, AsArray, UInt32Array};
use datafusion::arrow::datatypes::UInt32Type;
use datafusion::arrow::record_batch::RecordBatch;
use datafusion::arrow::row::{RowConverter, SortField};

use super::DataError;
use super::batch::{self, PART};

/// Parts of a part that can be told apart.
const OF_A_PART: u32 = 1 << 16;

/// Parts of a batch that holds all that became of each of its input rows. Where those were parts already, part `n` of
/// part `m` is `65536 m + n`.
///
/// # Errors
/// More parts than there are numbers.
pub fn within(made: &RecordBatch) -> Result<RecordBatch, DataError> {
    let places = places(made, &batch::key_indices(made.schema_ref()))?;
    let parts = match before(made) {
        None => places,
        Some(before) => {
            let both = |(place, part): (u32, u32)| {
                let fits = place < OF_A_PART && part < OF_A_PART;
                fits.then(|| part * OF_A_PART + place).ok_or_else(|| {
                    DataError::user(format!("a row that was unnested before became more than {OF_A_PART} rows"))
                })
            };
            places.into_iter().zip(before.values().iter().copied()).map(both).collect::<Result<_, _>>()?
        }
    };
    batch::with_column(made, PART, Arc::new(UInt32Array::from(parts)))
}

/// Parts of a whole result: those that the rows have, where they tell all rows apart, or else their places among the
/// rows of equal keys.
pub fn among(made: &RecordBatch) -> Result<RecordBatch, DataError> {
    let keys = batch::key_indices(made.schema_ref());
    if before(made).is_some() && places(made, &keys)?.iter().all(|place| *place == 0) {
        return Ok(made.clone());
    }
    let keys: Vec<usize> = keys.into_iter().filter(|i| made.schema_ref().field(*i).name() != PART).collect();
    batch::with_column(made, PART, Arc::new(UInt32Array::from(places(made, &keys)?)))
}

/// The parts that rows came with; none where a part is missing.
fn before(made: &RecordBatch) -> Option<&UInt32Array> {
    let parts = made.column_by_name(PART)?.as_primitive_opt::<UInt32Type>()?;
    (parts.null_count() == 0).then_some(parts)
}

/// The place of each row among those with equal values in `columns`.
fn places(rows: &RecordBatch, columns: &[usize]) -> Result<Vec<u32>, DataError> {
    let fault = |e: datafusion::arrow::error::ArrowError| DataError::user(format!("parts can't be numbered: {e}"));
    let columns: Vec<ArrayRef> = columns.iter().map(|i| rows.column(*i).clone()).collect();
    let fields = columns.iter().map(|c| SortField::new(c.data_type().clone())).collect();
    let keys = RowConverter::new(fields).and_then(|converter| converter.convert_columns(&columns)).map_err(fault)?;
    let mut seen: HashMap<&[u8], u32> = HashMap::new();
    let place = |i: usize| {
        let next = seen.entry(keys.row(i).data()).or_default();
        let place = *next;
        *next += 1;
        place
    };
    Ok((0..rows.num_rows()).map(place).collect())
}

#[cfg(test)]
mod tests {
    use datafusion::arrow::array::UInt64Array;

    use super::*;

    fn rows(rows: &[u64], parts: Option<&[u32]>) -> RecordBatch {
        let row: ArrayRef = Arc::new(UInt64Array::from(rows.to_vec()));
        let part = parts.map(|parts| (PART, Arc::new(UInt32Array::from(parts.to_vec())) as ArrayRef));
        RecordBatch::try_from_iter([("_row", row)].into_iter().chain(part)).unwrap()
    }

    fn parts(made: &RecordBatch) -> Vec<u32> {
        before(made).unwrap().values().to_vec()
    }

    #[test]
    fn parts_tell_rows_of_one_row_apart() {
        assert_eq!(parts(&within(&rows(&[3, 3, 4, 3], None)).unwrap()), [0, 1, 0, 2]);
        assert_eq!(parts(&among(&rows(&[3, 3, 4, 3], None)).unwrap()), [0, 1, 0, 2]);
        // Parts that still tell all apart stay as they are.
        assert_eq!(parts(&among(&rows(&[3, 3, 4], Some(&[2, 5, 1]))).unwrap()), [2, 5, 1]);
        assert_eq!(parts(&among(&rows(&[3, 3, 4], Some(&[2, 2, 1]))).unwrap()), [0, 1, 0]);
        let twice = within(&rows(&[3, 3, 3, 4], Some(&[0, 0, 2, 1]))).unwrap();
        assert_eq!(parts(&twice), [0, 1, 2 << 16, 1 << 16]);
        assert!(within(&rows(&[3], Some(&[1 << 16]))).unwrap_err().message.contains("more than 65536"));
        assert!(within(&rows(&[], None)).unwrap().num_rows() == 0);
    }
}
