//! Conversion of a source's rows: prompts and answers by their form, then one row for each answer.

use datafusion::arrow::array::UInt32Array;
use datafusion::arrow::compute::{filter_record_batch, take_record_batch};
use datafusion::arrow::datatypes::{DataType, SchemaRef};
use datafusion::arrow::error::ArrowError;
use datafusion::arrow::record_batch::RecordBatch;

use super::batch::{self, ROW};
use super::candidates::{Candidates, CandidatesOption, grouped};
use super::form::{Reading, RowForm, recognise};
use super::{DataError, pool};

/// Steps that turn selected rows into the rows that a source sends.
#[derive(Debug, Clone)]
pub struct Conversion {
    /// The note about the form, for the plan.
    told: Option<String>,
    /// `None` if the form changes no column.
    reading: Option<Reading>,
    candidates: Option<Candidates>,
    /// Columns of the rows that are sent, `_row` last.
    schema: SchemaRef,
}

/// Consecutive rows of a shard.
#[derive(Debug, Clone)]
pub struct Read {
    /// The rows of each `_row` in `completes` that is not refused.
    pub batch: RecordBatch,
    pub completes: Vec<u64>,
    pub refused: Vec<Refused>,
}

/// A row that can't be converted.
#[derive(Debug, Clone)]
pub struct Refused {
    pub row: u64,
    pub reason: String,
    /// The row before conversion.
    pub input: RecordBatch,
}

impl Conversion {
    /// The conversion of rows with the columns `selected`, which have no `_row`.
    ///
    /// # Errors
    /// A column that the form or `candidates` needs is missing or has another type.
    pub fn of(
        form: Option<RowForm>,
        candidates: Option<&CandidatesOption>,
        selected: &SchemaRef,
    ) -> Result<Self, DataError> {
        let found = recognise(selected, form)?;
        let told = found.as_ref().map(Reading::told);
        let reading = found.filter(Reading::changes);
        let columns = reading.as_ref().map_or(selected, Reading::schema);
        let candidates = candidates.map(|how| Candidates::of(how, columns)).transpose()?;
        let columns = candidates.as_ref().map_or(columns, Candidates::schema);
        let schema = batch::schema_with(columns, ROW, DataType::UInt64);
        Ok(Self { told, reading, candidates, schema })
    }

    /// The note about the form that was detected or set; `None` if there is none.
    pub fn told(&self) -> Option<&str> {
        self.told.as_deref()
    }

    pub fn reading(&self) -> Option<&Reading> {
        self.reading.as_ref()
    }

    pub fn candidates(&self) -> Option<&Candidates> {
        self.candidates.as_ref()
    }

    /// Columns of the converted rows, `_row` (u64) last.
    pub fn schema(&self) -> &SchemaRef {
        &self.schema
    }

    /// Converts numbered rows, each of which has all answers to its prompt.
    ///
    /// # Errors
    /// A column is missing or has another type than at check.
    pub fn read(&self, rows: &RecordBatch) -> Result<Read, DataError> {
        let completes = batch::row_numbers(rows)?.values().to_vec();
        if self.reading.is_none() && self.candidates.is_none() {
            return Ok(Read { batch: rows.clone(), completes, refused: Vec::new() });
        }
        let (converted, faults) = self.formed(rows)?;
        self.answered(completes, &converted, rows, &faults)
    }

    /// Converts all rows of a data set and puts those of one prompt together, under one `_row`. `most` limits the number
    /// of prompts. Computes on a thread of its own.
    ///
    /// # Errors
    /// Those of [`Self::read`]; the values of `by` can't be compared.
    pub async fn groups(
        &self,
        columns: SchemaRef,
        rows: Vec<RecordBatch>,
        by: &str,
        most: Option<u64>,
    ) -> Result<Vec<Read>, DataError> {
        let (conversion, by) = (self.clone(), by.to_owned());
        pool::run(async move { conversion.group(&batch::concat(&columns, &rows)?, &by, most) }).await?
    }

    fn group(&self, whole: &RecordBatch, by: &str, most: Option<u64>) -> Result<Vec<Read>, DataError> {
        let (converted, faults) = self.formed(whole)?;
        let (sorted, order) = grouped(&converted, by, &faults)?;
        let faults: Vec<Option<String>> = order.iter().map(|row| faults[*row as usize].clone()).collect();
        let raw = take_record_batch(whole, &UInt32Array::from(order)).map_err(failed)?;
        let numbers = batch::row_numbers(&sorted)?.values().to_vec();
        let mut groups = Vec::new();
        let mut start = 0;
        for run in numbers.chunk_by(|a, b| a == b).take(most.map_or(usize::MAX, |most| most as usize)) {
            let end = start + run.len();
            let (batch, raw) = (sorted.slice(start, run.len()), raw.slice(start, run.len()));
            groups.push(self.answered(vec![run[0]], &batch, &raw, &faults[start..end])?);
            start = end;
        }
        Ok(groups)
    }

    /// Rows in the stages' form, and for each the reason why it can't be converted.
    fn formed(&self, rows: &RecordBatch) -> Result<(RecordBatch, Vec<Option<String>>), DataError> {
        match &self.reading {
            Some(reading) => reading.apply(rows),
            None => Ok((rows.clone(), vec![None; rows.num_rows()])),
        }
    }

    /// Makes rows of answers from the converted `rows`. Each `_row` of `completes` has rows in the result or is
    /// refused. `raw` are the rows before conversion.
    fn answered(
        &self,
        completes: Vec<u64>,
        rows: &RecordBatch,
        raw: &RecordBatch,
        faults: &[Option<String>],
    ) -> Result<Read, DataError> {
        let (batch, more) = match &self.candidates {
            Some(candidates) => candidates.explode(rows)?,
            None => (rows.clone(), vec![None; rows.num_rows()]),
        };
        let numbers = batch::row_numbers(rows)?.values();
        let mut refused: Vec<Refused> = Vec::new();
        for (i, row) in numbers.iter().enumerate() {
            let fault = faults[i].as_ref().or(more[i].as_ref());
            if let Some(reason) = fault.filter(|_| refused.last().is_none_or(|last| last.row != *row)) {
                refused.push(Refused { row: *row, reason: reason.clone(), input: raw.slice(i, 1) });
            }
        }
        let batch = batch::align(&batch, &self.schema)?;
        if refused.is_empty() {
            return Ok(Read { batch, completes, refused });
        }
        let own = batch::row_numbers(&batch)?;
        let kept = own.values().iter().map(|row| Some(refused.iter().all(|refused| refused.row != *row)));
        let batch = filter_record_batch(&batch, &kept.collect()).map_err(failed)?;
        Ok(Read { batch, completes, refused })
    }
}

fn failed(error: ArrowError) -> DataError {
    DataError::user(error.to_string())
}
