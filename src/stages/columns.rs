//! Reading columns of a batch by name and type.

use datafusion::arrow::array::{Array, AsArray, ListArray, StringArray, UInt32Array, UInt64Array};
use datafusion::arrow::datatypes::{DataType, UInt32Type, UInt64Type};
use datafusion::arrow::record_batch::RecordBatch;

use crate::engine::StageError;

/// Columns of a sampled row that belong to one answer and not to the prompt.
pub const PER_ANSWER: [&str; 8] = [
    "generation",
    "generation_ids",
    "finish_reason",
    "prompt_tokens",
    "generation_tokens",
    "logprob",
    "generation_logprobs",
    "_candidate",
];

/// Columns that a judge adds to a row of one answer.
pub const SCORES: [&str; 5] = ["score", "score_variance", "score_samples", "judge_generations", "judge_finish_reasons"];

fn column<'a>(batch: &'a RecordBatch, name: &str) -> Result<&'a dyn Array, StageError> {
    batch.column_by_name(name).map(|c| c.as_ref()).ok_or_else(|| {
        let there: Vec<_> = batch.schema().fields().iter().map(|f| f.name().clone()).collect();
        StageError::user(format!("there is no column {name:?}; the columns are {}", there.join(", ")))
    })
}

fn wrong(name: &str, found: &DataType, wanted: &str) -> StageError {
    StageError::user(format!("column {name:?} has type {found}, not {wanted}"))
}

pub fn u64s<'a>(batch: &'a RecordBatch, name: &str) -> Result<&'a UInt64Array, StageError> {
    let array = column(batch, name)?;
    array.as_primitive_opt::<UInt64Type>().ok_or_else(|| wrong(name, array.data_type(), "UInt64"))
}

pub fn u32s<'a>(batch: &'a RecordBatch, name: &str) -> Result<&'a UInt32Array, StageError> {
    let array = column(batch, name)?;
    array.as_primitive_opt::<UInt32Type>().ok_or_else(|| wrong(name, array.data_type(), "UInt32"))
}

/// Strings, whichever of Arrow's string types the column came in.
pub fn strings(batch: &RecordBatch, name: &str) -> Result<StringArray, StageError> {
    let array = column(batch, name)?;
    if !matches!(array.data_type(), DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View) {
        return Err(wrong(name, array.data_type(), "a string"));
    }
    let cast = datafusion::arrow::compute::cast(array, &DataType::Utf8)
        .map_err(|e| StageError::internal(format!("column {name:?}: {e}")))?;
    Ok(cast.as_string::<i32>().clone())
}

/// Lists of token ids.
pub fn ids(batch: &RecordBatch, name: &str) -> Result<ListArray, StageError> {
    let array = column(batch, name)?;
    let list = array.as_list_opt::<i32>().filter(|l| l.value_type() == DataType::UInt32);
    list.cloned().ok_or_else(|| wrong(name, array.data_type(), "a list of UInt32"))
}
