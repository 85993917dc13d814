//! Tables in text files: JSON and CSV, plain or compressed.
//!
//! A column's type is found from all rows of all files. So a table is read twice: first for the types, then as record
//! batches of these types.
//!
//! | file | noun |
//! |---|---|
//! | `bytes` | the bytes of a file, decompressed |
//! | `json` | the objects of a JSON text |
//! | `csv` | the rows of a CSV file |
//! | `kind` | the kinds of a JSON column's values |

pub mod bytes;
mod csv;
mod json;
mod kind;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use datafusion::arrow::array::ArrayRef;
use datafusion::arrow::datatypes::{Field, Fields, Schema, SchemaRef};
use datafusion::arrow::json::ReaderBuilder;
use datafusion::arrow::record_batch::RecordBatch;
use datafusion::execution::{SendableRecordBatchStream, TaskContext};
use datafusion::physical_plan::streaming::PartitionStream;
use indexmap::IndexMap;
use serde_json::{Map, Value};

use self::kind::{At, Clash, Found, join_parts, name_of};
use super::{ColumnType, DataError, batch, pool};

/// Number of rows in a batch.
const BATCH_ROWS: usize = 1024;

/// Layout of the rows in a text file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    Json,
    Csv { separator: u8 },
}

/// Text files that form one table.
#[derive(Debug, Clone)]
pub struct TextTable {
    files: Vec<PathBuf>,
    layout: Layout,
    /// Types of columns that the flow sets.
    types: BTreeMap<String, ColumnType>,
    schema: SchemaRef,
    rows: u64,
    left_out: Vec<String>,
}

impl TextTable {
    /// Reads all rows of `files` to find the types of their columns.
    ///
    /// # Errors
    /// A row can't be read; the values of a column have no common type; a file has no column in common with those
    /// before it; `types` names a missing column. Messages have file and line, where there are lines.
    pub fn open(files: &[PathBuf], layout: Layout, types: &BTreeMap<String, ColumnType>) -> Result<Self, DataError> {
        let mut table = Self {
            files: files.to_vec(),
            layout,
            types: types.clone(),
            schema: Arc::new(Schema::empty()),
            rows: 0,
            left_out: Vec::new(),
        };
        let fields = match layout {
            Layout::Json => table.fields_of_json()?,
            Layout::Csv { separator } => table.fields_of_csv(separator)?,
        };
        if let Some(unknown) = types.keys().find(|name| fields.iter().all(|field| field.name() != *name)) {
            let known: Vec<String> = fields.iter().map(|field| field.name().clone()).collect();
            return Err(DataError::user(super::error::unknown("column", unknown, &known)).at("types"));
        }
        table.schema = Arc::new(Schema::new(fields));
        Ok(table)
    }

    /// Columns of the table.
    pub fn schema(&self) -> &SchemaRef {
        &self.schema
    }

    /// Number of rows of the table.
    pub fn rows(&self) -> u64 {
        self.rows
    }

    /// Columns that are left out, because their values are objects without keys.
    pub fn left_out(&self) -> &[String] {
        &self.left_out
    }

    fn fields_of_json(&mut self) -> Result<Fields, DataError> {
        let mut columns: IndexMap<String, Found> = IndexMap::new();
        for (number, file) in self.files.iter().enumerate() {
            let before = columns.len();
            let mut shared = before == 0;
            let mut records = json::Records::open(file)?;
            while let Some((line, mut object)) = records.next()? {
                self.rows += 1;
                let at = At { file: number, line };
                self.cast(&mut object).map_err(|message| self.fault(at, &message))?;
                for (name, value) in &object {
                    shared |= columns.get_index_of(name).is_some_and(|place| place < before);
                    if !columns.contains_key(name) {
                        columns.insert(name.clone(), Found::default());
                    }
                    if let Some(found) = columns.get_mut(name) {
                        found.see(value, at).map_err(|clash| self.clash(name, &clash))?;
                    }
                }
            }
            if !shared {
                return Err(self.is_odd(number));
            }
        }
        let mut fields = Vec::with_capacity(columns.len());
        for (name, found) in columns {
            let given = self.types.get(&name).map(|given| given.data_type());
            match given.or_else(|| found.data_type()) {
                Some(data_type) => fields.push(Field::new(name, data_type, true)),
                None => self.left_out.push(name),
            }
        }
        Ok(fields.into())
    }

    fn fields_of_csv(&mut self, separator: u8) -> Result<Fields, DataError> {
        let mut columns: IndexMap<String, csv::Found> = IndexMap::new();
        let mut row = ::csv::StringRecord::new();
        for (number, file) in self.files.iter().enumerate() {
            let mut records = csv::Records::open(file, separator)?;
            if number > 0 && records.header().iter().all(|name| !columns.contains_key(name)) {
                return Err(self.is_odd(number));
            }
            let places: Vec<usize> = records
                .header()
                .iter()
                .map(|name| {
                    let entry = columns.entry(name.clone());
                    let place = entry.index();
                    entry.or_default();
                    place
                })
                .collect();
            while let Some(line) = records.next(&mut row)? {
                self.rows += 1;
                for (value, place) in row.iter().zip(&places) {
                    columns[*place] = columns[*place].see(value);
                }
                self.check_types(&row, records.header())
                    .map_err(|message| self.fault(At { file: number, line }, &message))?;
            }
        }
        let field = |(name, found): (String, csv::Found)| {
            let given = self.types.get(&name).map(|given| given.data_type());
            Field::new(name, given.unwrap_or_else(|| found.data_type()), true)
        };
        Ok(columns.into_iter().map(field).collect())
    }

    /// # Errors
    /// A value is not of the type that the flow sets for its column.
    fn check_types(&self, row: &::csv::StringRecord, header: &[String]) -> Result<(), String> {
        for (name, given) in &self.types {
            let Some(place) = header.iter().position(|column| column == name) else { continue };
            let value = row.get(place).filter(|value| !value.is_empty()).map(str::to_owned);
            if csv::array(std::slice::from_ref(&value), &given.data_type()).is_err() {
                let value = value.unwrap_or_default();
                return Err(format!(
                    "column `{name}` is {} here, which can't be read as {}",
                    crate::observe::shortened(&value),
                    given.name()
                ));
            }
        }
        Ok(())
    }

    /// Converts the values of columns whose type the flow sets.
    ///
    /// # Errors
    /// A value can't be converted.
    fn cast(&self, object: &mut Map<String, Value>) -> Result<(), String> {
        for (name, given) in &self.types {
            if let Some(value) = object.get_mut(name).filter(|value| !value.is_null()) {
                let cast = cast(value, *given);
                *value = cast.ok_or_else(|| {
                    format!("column `{name}` is {} here, which can't be read as {}", name_of(value), given.name())
                })?;
            }
        }
        Ok(())
    }

    fn fault(&self, at: At, message: &str) -> DataError {
        DataError::user(format!("{}:{}: {message}", self.place(at.file), at.line))
    }

    fn place(&self, file: usize) -> String {
        self.files.get(file).map(|file| file.display().to_string()).unwrap_or_default()
    }

    /// The error for a file that has no column in common with those before it, such as a report beside the data.
    fn is_odd(&self, file: usize) -> DataError {
        DataError::user(format!(
            "{}: none of its columns is in {}; if it is no data, name the data by a pattern or a path",
            self.place(file),
            self.place(file.saturating_sub(1))
        ))
    }

    fn clash(&self, column: &str, clash: &Clash) -> DataError {
        let Clash { path, first, first_at, second, second_at } = clash;
        let before = match first_at.file == second_at.file {
            true => format!("line {}", first_at.line),
            false => format!("{}:{}", self.place(first_at.file), first_at.line),
        };
        self.fault(
            *second_at,
            &format!("column `{column}{path}` has {second} here and {first} in {before}; {}", remedy(column, path)),
        )
    }

    /// Sends the table's rows in batches, until `send` returns false.
    fn read(&self, send: &dyn Fn(RecordBatch) -> bool) -> Result<(), DataError> {
        match self.layout {
            Layout::Json => self.read_json(send),
            Layout::Csv { separator } => self.read_csv(separator, send),
        }
    }

    fn read_json(&self, send: &dyn Fn(RecordBatch) -> bool) -> Result<(), DataError> {
        let failed = |e: datafusion::arrow::error::ArrowError| DataError::user(e.to_string());
        let mut decoder = ReaderBuilder::new(self.schema.clone()).build_decoder().map_err(failed)?;
        for (number, file) in self.files.iter().enumerate() {
            let mut records = json::Records::open(file)?;
            let mut objects = Vec::with_capacity(BATCH_ROWS);
            loop {
                let next = records.next()?;
                let ended = next.is_none();
                if let Some((line, mut object)) = next {
                    self.cast(&mut object).map_err(|message| self.fault(At { file: number, line }, &message))?;
                    for (name, value) in &mut object {
                        if let Ok(field) = self.schema.field_with_name(name) {
                            let joined = join_parts(value, field.data_type());
                            joined.map_err(|message| self.fault(At { file: number, line }, &message))?;
                        }
                    }
                    objects.push(Value::Object(object));
                }
                if objects.len() == BATCH_ROWS || (ended && !objects.is_empty()) {
                    decoder.serialize(&objects).map_err(|e| failed(e).at(file.display()))?;
                    objects.clear();
                    let batch = decoder.flush().map_err(|e| failed(e).at(file.display()))?;
                    if !batch.is_none_or(send) {
                        return Ok(());
                    }
                }
                if ended {
                    break;
                }
            }
        }
        Ok(())
    }

    fn read_csv(&self, separator: u8, send: &dyn Fn(RecordBatch) -> bool) -> Result<(), DataError> {
        let mut row = ::csv::StringRecord::new();
        for (number, file) in self.files.iter().enumerate() {
            let mut records = csv::Records::open(file, separator)?;
            let places: Vec<usize> =
                records.header().iter().filter_map(|name| self.schema.index_of(name).ok()).collect();
            let mut columns = vec![Vec::with_capacity(BATCH_ROWS); self.schema.fields().len()];
            let mut lines = Vec::with_capacity(BATCH_ROWS);
            loop {
                let next = records.next(&mut row)?;
                if let Some(line) = next {
                    lines.push(line);
                    for (value, place) in row.iter().zip(&places) {
                        columns[*place].push((!value.is_empty()).then(|| value.to_owned()));
                    }
                    columns.iter_mut().for_each(|column| column.resize(lines.len(), None));
                }
                if lines.len() == BATCH_ROWS || (next.is_none() && !lines.is_empty()) {
                    let batch = self.csv_batch(&columns, number, &lines)?;
                    columns.iter_mut().for_each(Vec::clear);
                    lines.clear();
                    if !send(batch) {
                        return Ok(());
                    }
                }
                if next.is_none() {
                    break;
                }
            }
        }
        Ok(())
    }

    fn csv_batch(&self, columns: &[Vec<Option<String>>], file: usize, lines: &[u64]) -> Result<RecordBatch, DataError> {
        let array = |(values, field): (&Vec<Option<String>>, &Arc<Field>)| -> Result<ArrayRef, DataError> {
            csv::array(values, field.data_type()).map_err(|row| {
                let value = values[row].as_deref().unwrap_or_default();
                let given = self.types.get(field.name()).map_or("its type", |given| given.name());
                let message = format!(
                    "column `{}` is {} here, which can't be read as {given}",
                    field.name(),
                    crate::observe::shortened(value)
                );
                self.fault(At { file, line: lines[row] }, &message)
            })
        };
        let arrays = columns.iter().zip(self.schema.fields()).map(array).collect::<Result<Vec<_>, _>>()?;
        batch::assemble(self.schema.clone(), arrays, lines.len())
    }
}

/// The remedy for two kinds of values in a column.
fn remedy(column: &str, path: &str) -> String {
    if path.ends_with(".content") || path.ends_with(".value") {
        return "write the content of every turn as text".into();
    }
    if ["prompt", "chosen", "rejected", "completion"].contains(&column) {
        return "write all as text, or all as lists of {role, content}".into();
    }
    format!("write one kind, or types = {{ {column} = \"string\" }} to read the column as text")
}

/// Converts a value to another type without loss; `None` if that is impossible.
fn cast(value: &Value, given: ColumnType) -> Option<Value> {
    let text = value.as_str();
    match given {
        ColumnType::String => Some(text.map_or_else(|| value.to_string(), str::to_owned).into()),
        ColumnType::Bool => match text {
            None => value.as_bool().map(Value::from),
            Some(text) => text.to_ascii_lowercase().parse::<bool>().ok().map(Value::from),
        },
        ColumnType::I64 => {
            let whole = |number: f64| (number.fract() == 0.0 && number.abs() < 9.0e15).then_some(number as i64);
            let number = value.as_i64().or_else(|| value.as_f64().and_then(whole));
            number.or_else(|| text?.trim().parse().ok()).map(Value::from)
        }
        ColumnType::F64 => value.as_f64().or_else(|| text?.trim().parse().ok()).and_then(|number: f64| {
            // As an f64, because `5` would be an integer again.
            serde_json::Number::from_f64(number).map(Value::Number)
        }),
    }
}

impl PartitionStream for TextTable {
    fn schema(&self) -> &SchemaRef {
        &self.schema
    }

    fn execute(&self, _task: Arc<TaskContext>) -> SendableRecordBatchStream {
        let table = self.clone();
        pool::read(self.schema.clone(), move |send| table.read(send))
    }
}

#[cfg(test)]
mod tests;
