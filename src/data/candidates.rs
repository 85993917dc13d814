//! Existing answers of a data set: one row an answer, with `_candidate` and `generation`, as a sampler writes them.

use std::sync::Arc;

use datafusion::arrow::array::{Array, ArrayRef, AsArray, StringArray, UInt32Array, UInt64Array};
use datafusion::arrow::compute::{cast, interleave, take, take_record_batch};
use datafusion::arrow::datatypes::{DataType, Field, Fields, Schema, SchemaRef};
use datafusion::arrow::error::ArrowError;
use datafusion::arrow::record_batch::RecordBatch;
use datafusion::arrow::row::{RowConverter, SortField};
use serde::Deserialize;

use super::DataError;
use super::batch::{self, ROW};
use super::error::unknown;
use crate::canonical_fields;
use crate::flow::{Canonical, Form};

/// Column with the number of an answer among those to its prompt (u32, from 0).
const CANDIDATE: &str = "_candidate";
/// Column with the text of an answer.
const GENERATION: &str = "generation";
/// Columns that may hold the answer if each answer has a row of its own.
const ANSWERS: [&str; 2] = [GENERATION, "completion"];
/// KTO's boolean column, and the column that it becomes.
const LABEL: [&str; 2] = ["label", "score"];

/// `candidates = "responses"`, `["a", "b"]`, `{ by = "prompt" }` or `{ list = "completions", text = "response" }`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(
    untagged,
    expecting = "candidates is a list column such as \"responses\", columns such as [\"a\", \"b\"], { by = \"prompt\" }, or \
                 { list = \"completions\", text = \"response\" }"
)]
pub enum CandidatesOption {
    List(String),
    Columns(Vec<String>),
    By(By),
    Items(Items),
}

/// Rows with the same value in the column `by` are answers to one prompt.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct By {
    by: String,
}

/// The column `list` has lists of objects. The key `text` is the answer; the other keys become columns.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Items {
    list: String,
    text: String,
}

canonical_fields!(By { by } without {});
canonical_fields!(Items { list, text } without {});

impl Canonical for CandidatesOption {
    fn form(&self) -> Form {
        match self {
            Self::List(column) => column.form(),
            Self::Columns(columns) => columns.form(),
            Self::By(by) => by.form(),
            Self::Items(items) => items.form(),
        }
    }
}

/// The key `candidates`, checked against the columns.
#[derive(Debug, Clone)]
pub struct Candidates {
    how: CandidatesOption,
    /// Column with the answer if each answer has a row of its own; else empty.
    answer: String,
    schema: SchemaRef,
}

/// Columns that hold answers.
#[derive(Default)]
struct Places {
    /// Columns that the answers replace.
    consumed: Vec<String>,
    /// Column with the answer if each answer has a row of its own; else empty.
    answer: String,
    /// Other keys of the objects that hold the answers.
    beside: Vec<Arc<Field>>,
}

impl Places {
    /// Finds the columns of the answers.
    ///
    /// # Errors
    /// The message says what is wrong with a column.
    fn of(how: &CandidatesOption, input: &SchemaRef) -> Result<Self, String> {
        let kind = |name: &str| {
            let field = input.field_with_name(name).map(Field::data_type);
            field.map_err(|_| unknown("column", name, &batch::visible(input)))
        };
        match how {
            CandidatesOption::List(name) => {
                is_list_of_text(name, kind(name)?)?;
                Ok(Self { consumed: vec![name.clone()], ..Self::default() })
            }
            CandidatesOption::Columns(names) if names.len() < 2 => {
                Err("names fewer than two columns; a list column is named without brackets".into())
            }
            CandidatesOption::Columns(names) => {
                let twice = names.iter().enumerate().find(|(i, name)| names[..*i].contains(name));
                if let Some((_, name)) = twice {
                    return Err(format!("names `{name}` twice"));
                }
                for name in names {
                    if *kind(name)? != DataType::Utf8 {
                        return Err(format!("column `{name}` is {}, not text", batch::type_name(kind(name)?)));
                    }
                }
                Ok(Self { consumed: names.clone(), ..Self::default() })
            }
            CandidatesOption::Items(Items { list, text }) => {
                let fields =
                    items_of(kind(list)?).ok_or_else(|| format!("column `{list}` is not a list of objects"))?;
                let key = fields.iter().find(|field| field.name() == text);
                if key.is_none_or(|field| *field.data_type() != DataType::Utf8) {
                    let keys: Vec<_> = fields.iter().map(|field| field.name().as_str()).collect();
                    return Err(format!("`{text}` is no key of text in `{list}`; it has {}", keys.join(", ")));
                }
                let beside: Vec<_> = fields.iter().filter(|field| field.name() != text).cloned().collect();
                let taken = |name: &str| name.starts_with('_') || name == GENERATION || name == list;
                if let Some(field) = beside.iter().find(|field| taken(field.name())) {
                    let key = field.name();
                    return Err(format!(
                        "the key `{key}` of `{list}` can't be a column of that name; take it out of the data"
                    ));
                }
                Ok(Self { consumed: vec![list.clone()], beside, ..Self::default() })
            }
            CandidatesOption::By(By { by }) => {
                kind(by)?;
                let text = |name: &&&str| kind(name).is_ok_and(|kind| *kind == DataType::Utf8);
                let Some(answer) = ANSWERS.iter().find(text).map(|name| (*name).to_owned()) else {
                    let there = batch::visible(input).join(", ");
                    return Err(format!(
                        "a row has its answer in a column of text `generation` or `completion`; the columns are {there}; name \
                         the answer in select: {{ {by} = \"{by}\", generation = \"COLUMN\", ... }}"
                    ));
                };
                Ok(Self { consumed: vec![answer.clone()], answer, beside: Vec::new() })
            }
        }
    }
}

fn is_list_of_text(name: &str, kind: &DataType) -> Result<(), String> {
    match kind {
        DataType::List(item) if *item.data_type() == DataType::Utf8 => Ok(()),
        other if items_of(other).is_some() => Err(format!(
            "column `{name}` is a list of objects; say which key is the answer: candidates = {{ list = \"{name}\", text = \
             \"KEY\" }}"
        )),
        other => Err(format!("column `{name}` is {}, not a list of text", batch::type_name(other))),
    }
}

fn items_of(kind: &DataType) -> Option<&Fields> {
    match kind {
        DataType::List(item) => match item.data_type() {
            DataType::Struct(fields) => Some(fields),
            _ => None,
        },
        _ => None,
    }
}

/// Rows of answers, and for each input row the reason why it has none (`None` if it has).
pub type Answered = (RecordBatch, Vec<Option<String>>);

impl Candidates {
    /// Checks `how` against the columns `input`.
    ///
    /// # Errors
    /// A column is missing or has another type; a column has the name of one that the answers add.
    pub fn of(how: &CandidatesOption, input: &SchemaRef) -> Result<Self, DataError> {
        let fault = |message: String| DataError::user(format!("candidates: {message}"));
        let found = Places::of(how, input).map_err(fault)?;
        let kept: Vec<_> = input.fields().iter().filter(|f| !found.consumed.contains(f.name())).cloned().collect();
        let made = [GENERATION].into_iter().chain(found.beside.iter().map(|field| field.name().as_str()));
        if let Some(name) = made.into_iter().find(|name| kept.iter().any(|field| field.name() == name)) {
            return Err(fault(format!("there is a column `{name}` already; rename it in select")));
        }
        let mut fields = if found.answer.is_empty() { kept } else { scored(kept) };
        fields.extend(found.beside.iter().cloned());
        fields.push(Arc::new(Field::new(GENERATION, DataType::Utf8, true)));
        fields.push(Arc::new(Field::new(CANDIDATE, DataType::UInt32, true)));
        Ok(Self { how: how.clone(), answer: found.answer, schema: Arc::new(Schema::new(fields)) })
    }

    /// Columns of the answers' rows, without `_row`.
    pub fn schema(&self) -> &SchemaRef {
        &self.schema
    }

    /// Number of answers to each prompt; `None` if prompts may have different numbers.
    pub fn each(&self) -> Option<u64> {
        match &self.how {
            CandidatesOption::Columns(names) => Some(names.len() as u64),
            _ => None,
        }
    }

    /// Column that groups rows by prompt; `None` if one row has all answers to its prompt.
    pub fn by(&self) -> Option<&str> {
        match &self.how {
            CandidatesOption::By(By { by }) => Some(by),
            _ => None,
        }
    }

    /// Makes one row for each answer. Each input row has all answers to its prompt; with `by` the input is the result
    /// of [`grouped`].
    ///
    /// # Errors
    /// A column is missing.
    pub fn explode(&self, rows: &RecordBatch) -> Result<Answered, DataError> {
        self.answers(rows).map_err(|e| DataError::user(format!("candidates: {e}")))
    }

    fn answers(&self, rows: &RecordBatch) -> Result<Answered, ArrowError> {
        let count = rows.num_rows();
        let missing = |name: &str| ArrowError::SchemaError(format!("column `{name}` is missing"));
        let column = |name: &str| rows.column_by_name(name).ok_or_else(|| missing(name));
        // Row, array and place of each answer. A row with a fault has none.
        let mut faults = vec![None; count];
        let mut places: Vec<(usize, usize, usize)> = Vec::new();
        let texts: Vec<StringArray>;
        let mut elements = None;
        match &self.how {
            CandidatesOption::Columns(names) => {
                let columns = names.iter().map(|name| column(name).map(|c| c.as_string::<i32>().clone()));
                texts = columns.collect::<Result<_, _>>()?;
                for (row, fault) in faults.iter_mut().enumerate() {
                    match texts.iter().position(|column| column.is_null(row)) {
                        Some(empty) => *fault = Some(format!("its answer in `{}` is null", names[empty])),
                        None => places.extend((0..texts.len()).map(|which| (row, which, row))),
                    }
                }
            }
            CandidatesOption::List(name) | CandidatesOption::Items(Items { list: name, .. }) => {
                let list = column(name)?.as_list::<i32>().clone();
                let values = match &self.how {
                    CandidatesOption::Items(Items { text, .. }) => {
                        let items = list.values().as_struct();
                        elements = Some(items.clone());
                        items.column_by_name(text).ok_or_else(|| missing(text))?.clone()
                    }
                    _ => list.values().clone(),
                };
                texts = vec![values.as_string::<i32>().clone()];
                for (row, fault) in faults.iter_mut().enumerate() {
                    let range = list.value_offsets()[row] as usize..list.value_offsets()[row + 1] as usize;
                    let range = if list.is_null(row) { 0..0 } else { range };
                    let empty = range.clone().position(|place| texts[0].is_null(place));
                    match empty {
                        _ if range.is_empty() => *fault = Some(format!("`{name}` has no answer")),
                        Some(empty) => *fault = Some(format!("answer {} of `{name}` is null", empty + 1)),
                        None => places.extend(range.map(|place| (row, 0, place))),
                    }
                }
            }
            // With `by`, each row is an answer.
            CandidatesOption::By(_) => return self.numbered(rows),
        }
        let from = UInt64Array::from_iter_values(places.iter().map(|(row, ..)| *row as u64));
        let arrays: Vec<&dyn Array> = texts.iter().map(|array| array as &dyn Array).collect();
        let picked: Vec<(usize, usize)> = places.iter().map(|(_, array, place)| (*array, *place)).collect();
        let said: ArrayRef = match picked.is_empty() {
            true => Arc::new(StringArray::new_null(0)),
            false => interleave(&arrays, &picked)?,
        };
        let numbers = UInt32Array::from(numbers(places.iter().map(|(row, ..)| *row)));
        let inner = UInt64Array::from_iter_values(places.iter().map(|(.., place)| *place as u64));
        let made = |name: &str| -> Result<ArrayRef, ArrowError> {
            match name {
                GENERATION => Ok(said.clone()),
                CANDIDATE => Ok(Arc::new(numbers.clone())),
                name => match elements.as_ref().and_then(|items| items.column_by_name(name)) {
                    Some(key) if rows.column_by_name(name).is_none() => take(key, &inner, None),
                    _ => take(column(name)?, &from, None),
                },
            }
        };
        self.assemble(rows, made).map(|batch| (batch, faults))
    }

    /// Numbers answers that have one row each. The rows of one prompt are adjacent and share `_row`.
    fn numbered(&self, rows: &RecordBatch) -> Result<Answered, ArrowError> {
        let row =
            rows.column_by_name(ROW).and_then(|c| c.as_primitive_opt::<datafusion::arrow::datatypes::UInt64Type>());
        let row = row.ok_or_else(|| ArrowError::SchemaError("rows without numbers".into()))?;
        let numbers = UInt32Array::from(numbers(row.values().iter().map(|row| *row as usize)));
        let label = rows.column_by_name(LABEL[0]).filter(|_| rows.column_by_name(LABEL[1]).is_none());
        let made = |name: &str| -> Result<ArrayRef, ArrowError> {
            let from = match name {
                GENERATION => &self.answer,
                CANDIDATE => return Ok(Arc::new(numbers.clone())),
                name => name,
            };
            if let Some(label) = label.filter(|_| name == LABEL[1]) {
                return cast(label, &DataType::Float64);
            }
            let missing = || ArrowError::SchemaError(format!("column `{from}` is missing"));
            rows.column_by_name(from).cloned().ok_or_else(missing)
        };
        let batch = self.assemble(rows, made)?;
        let said = rows.column_by_name(&self.answer).map(|column| column.as_string::<i32>().clone());
        let fault = |row: usize| {
            let empty = said.as_ref().is_none_or(|said| said.is_null(row));
            empty.then(|| format!("answer {} to its prompt is null", numbers.value(row) + 1))
        };
        let faults = (0..rows.num_rows()).map(fault).collect();
        Ok((batch, faults))
    }

    /// Builds the columns of [`Self::schema`], and `_row`.
    fn assemble(
        &self,
        rows: &RecordBatch,
        made: impl Fn(&str) -> Result<ArrayRef, ArrowError>,
    ) -> Result<RecordBatch, ArrowError> {
        let mut fields = self.schema.fields().to_vec();
        if let Ok(field) = rows.schema_ref().field_with_name(ROW) {
            fields.push(Arc::new(field.clone()));
        }
        let columns = fields.iter().map(|field| made(field.name())).collect::<Result<Vec<_>, _>>()?;
        RecordBatch::try_new(Arc::new(Schema::new(fields)), columns)
    }
}

/// Columns beside an answer. KTO's boolean `label` becomes `score` (f64) if there is no column `score`.
fn scored(columns: Vec<Arc<Field>>) -> Vec<Arc<Field>> {
    let [label, score] = LABEL;
    let has_score = columns.iter().any(|field| field.name() == score);
    let is_label = |field: &Arc<Field>| field.name() == label && *field.data_type() == DataType::Boolean;
    let rename = |field: Arc<Field>| match !has_score && is_label(&field) {
        true => Arc::new(Field::new(score, DataType::Float64, true)),
        false => field,
    };
    columns.into_iter().map(rename).collect()
}

/// Numbers from 0 within each run of equal values.
fn numbers(rows: impl Iterator<Item = usize>) -> Vec<u32> {
    let mut last = None;
    let mut next = 0;
    let number = |row| {
        next = if last == Some(row) { next + 1 } else { 0 };
        last = Some(row);
        next
    };
    rows.map(number).collect()
}

/// Groups rows by their value in a column. The rows of a group are adjacent and share `_row`; groups are in the order
/// of their first rows. A row with a fault or a null is a group of its own. Returns the rows, and the former place of
/// each.
///
/// # Errors
/// The column is missing, or its values can't be compared.
pub fn grouped(rows: &RecordBatch, by: &str, faults: &[Option<String>]) -> Result<(RecordBatch, Vec<u32>), DataError> {
    let fault = |e: ArrowError| DataError::user(format!("candidates: column `{by}`: {e}"));
    let missing = || DataError::user(format!("candidates: there is no column `{by}`"));
    let column = rows.column_by_name(by).ok_or_else(missing)?;
    let converter = RowConverter::new(vec![SortField::new(column.data_type().clone())]).map_err(fault)?;
    let keys = converter.convert_columns(std::slice::from_ref(column)).map_err(fault)?;
    let mut known = std::collections::HashMap::new();
    let mut next = 0_u64;
    let mut group = |row: usize| {
        let new = next;
        let alone = faults.get(row).is_some_and(Option::is_some) || column.is_null(row);
        let found = if alone { new } else { *known.entry(keys.row(row).owned()).or_insert(new) };
        next += u64::from(found == new);
        found
    };
    let groups: Vec<u64> = (0..rows.num_rows()).map(&mut group).collect();
    let mut order: Vec<u32> = (0..rows.num_rows() as u32).collect();
    order.sort_by_key(|row| groups[*row as usize]);
    let numbered = batch::with_column(rows, ROW, Arc::new(UInt64Array::from(groups)))?;
    let sorted = take_record_batch(&numbered, &UInt32Array::from(order.clone())).map_err(fault)?;
    Ok((sorted, order))
}
