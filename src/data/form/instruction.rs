//! Conversion of Alpaca's columns to a prompt.

use std::sync::Arc;

use datafusion::arrow::array::{Array, ArrayRef, AsArray, StringArray};
use datafusion::arrow::datatypes::DataType;
use datafusion::arrow::error::ArrowError;
use datafusion::arrow::record_batch::RecordBatch;

use super::Columns;
use super::turns::{ASSISTANT, USER, gather, single, text_fields};

/// Optional columns beside `instruction` that the data has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Instruction {
    input: bool,
    system: bool,
    /// Earlier turns: pairs of question and answer.
    history: bool,
}

impl Instruction {
    /// Finds the optional columns.
    ///
    /// # Errors
    /// The message names the column that is missing or has another type.
    pub fn of(columns: &Columns<'_>) -> Result<Self, String> {
        if !columns.is_text("instruction") {
            return Err("a column `instruction` of text".into());
        }
        if columns.has("input") && !columns.is_text("input") {
            return Err("an `input` of text".into());
        }
        let history = match columns.kind("history") {
            Some(DataType::List(pair)) => {
                matches!(pair.data_type(), DataType::List(text) if *text.data_type() == DataType::Utf8)
            }
            _ => false,
        };
        Ok(Self { input: columns.has("input"), system: columns.is_text("system"), history })
    }

    pub fn has_system(self) -> bool {
        self.system
    }

    /// Returns whether the prompt is a list of turns; if not, it is text.
    pub fn is_turns(self) -> bool {
        self.system || self.history
    }

    /// Prompts of a batch, and for each row the reason why it can't be converted. A prompt is instruction and input,
    /// joined by a line break as in LLaMA-Factory.
    ///
    /// # Errors
    /// Arrow can't build the column.
    pub fn read(self, batch: &RecordBatch) -> Result<(ArrayRef, Vec<Option<String>>), ArrowError> {
        let text = |name: &str| batch.column_by_name(name).and_then(|c| c.as_string_opt::<i32>().cloned());
        let (instruction, input) = (text("instruction"), text("input").filter(|_| self.input));
        let at = |column: &Option<StringArray>, row: usize| {
            column.as_ref().filter(|c| c.is_valid(row)).map(|c| c.value(row).to_owned()).filter(|text| !text.is_empty())
        };
        let ask = |row: usize| match (at(&instruction, row), at(&input, row)) {
            (Some(instruction), Some(input)) => Some(format!("{instruction}\n{input}")),
            (instruction, input) => instruction.or(input),
        };
        let asked: StringArray = (0..batch.num_rows()).map(ask).collect();
        let fault = |row: usize| asked.is_null(row).then(|| "`instruction` is empty".to_owned());
        let faults = (0..batch.num_rows()).map(fault).collect();
        if !self.is_turns() {
            return Ok((Arc::new(asked), faults));
        }
        let systems = text("system").filter(|_| self.system);
        let (before, pairs) = if self.history { history(batch) } else { (StringArray::new_null(0), Vec::new()) };
        let none = StringArray::new_null(batch.num_rows());
        let fields = text_fields();
        let sources = [
            single("system", systems.as_ref().unwrap_or(&none), &fields)?,
            single(USER, &before, &fields)?,
            single(ASSISTANT, &before, &fields)?,
            single(USER, &asked, &fields)?,
        ];
        let turns = |row: usize| {
            let mut turns = Vec::new();
            turns.extend(at(&systems, row).map(|_| (0, row)));
            for (place, end) in pairs.get(row).into_iter().flatten() {
                turns.push((if *end { 2 } else { 1 }, *place));
            }
            turns.push((3, row));
            asked.is_valid(row).then_some(turns)
        };
        let rows: Vec<_> = (0..batch.num_rows()).map(turns).collect();
        Ok((Arc::new(gather(&sources, &rows, &fields)?), faults))
    }
}

/// Texts of all histories, and for each row the places of its texts. `true` marks an answer.
fn history(batch: &RecordBatch) -> (StringArray, Vec<Vec<(usize, bool)>>) {
    let Some(rows) = batch.column_by_name("history").and_then(|c| c.as_list_opt::<i32>()) else {
        return (StringArray::new_null(0), Vec::new());
    };
    let pairs = rows.values().as_list::<i32>();
    let texts = pairs.values().as_string::<i32>().clone();
    let of = |row: usize| {
        let range = rows.value_offsets()[row] as usize..rows.value_offsets()[row + 1] as usize;
        let range = if rows.is_null(row) { 0..0 } else { range };
        let places = |pair: usize| {
            let (start, end) = (pairs.value_offsets()[pair] as usize, pairs.value_offsets()[pair + 1] as usize);
            (start..end).map(move |place| (place, (place - start) % 2 == 1))
        };
        range.flat_map(places).collect()
    };
    (texts, (0..rows.len()).map(of).collect())
}
