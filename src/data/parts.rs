//! The column `_part` (u32): the number of a row among those that a query made from one row.
//!
//! Rows that UNNEST or a join makes from one row have the same keys. `_row` and `_part` together identify a prompt,
//! and later its answers, verdicts and pairs.

use std::collections::HashMap;
use std::sync::Arc;

use datafusion::arrow::array::{Array, ArrayRef, AsArray, UInt32Array};
use datafusion::arrow::datatypes::UInt32Type;
use datafusion::arrow::record_batch::RecordBatch;
use datafusion::arrow::row::{RowConverter, SortField};

use super::DataError;
use super::batch::{self, PART};

/// Largest number of parts that a part can be split into.
const OF_A_PART: u32 = 1 << 16;

/// Adds `_part` to a batch that holds all rows made from each of its input rows. If the input rows were parts
/// already, part `n` of part `m` gets the number `65536 m + n`.
///
/// # Errors
/// A row has more parts than can be numbered.
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

/// Adds `_part` to a complete result. Existing parts are kept if they distinguish all rows; else rows with equal keys
/// are numbered from 0.
pub fn among(made: &RecordBatch) -> Result<RecordBatch, DataError> {
    let keys = batch::key_indices(made.schema_ref());
    if before(made).is_some() && places(made, &keys)?.iter().all(|place| *place == 0) {
        return Ok(made.clone());
    }
    let keys: Vec<usize> = keys.into_iter().filter(|i| made.schema_ref().field(*i).name() != PART).collect();
    batch::with_column(made, PART, Arc::new(UInt32Array::from(places(made, &keys)?)))
}

/// Returns the existing `_part` column; `None` if a value is missing.
fn before(made: &RecordBatch) -> Option<&UInt32Array> {
    let parts = made.column_by_name(PART)?.as_primitive_opt::<UInt32Type>()?;
    (parts.null_count() == 0).then_some(parts)
}

/// Returns the number of each row among the rows with equal values in `columns`, from 0.
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
