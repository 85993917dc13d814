//! Rows on their way to a program and back: JSON lines, or an Arrow IPC stream.
//!
//! Every row carries `_key`, a number that no other row in flight has; an answer names it, so answers may come in
//! any order. Token ids stay here: they mean something to one model only.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::sync::Arc;

use datafusion::arrow::array::{
    Array, ArrayRef, AsArray, BooleanArray, Float64Array, Int64Array, StringArray, UInt64Array,
};
use datafusion::arrow::compute::cast;
use datafusion::arrow::datatypes::{DataType, Field, Float64Type, Int64Type, Schema, UInt64Type};
use datafusion::arrow::ipc::reader::StreamReader;
use datafusion::arrow::ipc::writer::StreamWriter;
use datafusion::arrow::json::WriterBuilder;
use datafusion::arrow::json::writer::LineDelimited;
use datafusion::arrow::record_batch::RecordBatch;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::data::ColumnType;
use crate::observe::shortened;

/// Names a row while it is in flight.
const KEY: &str = "_key";
/// Says why the program gives a row up.
pub const ERROR: &str = "error";
/// Bytes of an answer in JSON.
pub const LONGEST_LINE: u64 = 16 << 20;

/// How rows are written.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// One JSON object a line.
    #[default]
    Jsonl,
    /// One IPC stream in each direction.
    Arrow,
}

/// A column that the program adds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Column {
    pub name: String,
    pub kind: ColumnType,
}

/// One value of an answer.
#[derive(Debug, Clone, PartialEq)]
pub enum Cell {
    Null,
    F64(f64),
    I64(i64),
    Bool(bool),
    String(String),
}

/// What a program says of a row: its cells in the order of the columns, or why there are none.
pub type Answer = (u64, Result<Vec<Cell>, String>);

impl ColumnType {
    /// Column `index` of `rows`.
    pub fn array(self, rows: &[Vec<Cell>], index: usize) -> ArrayRef {
        let cells = rows.iter().map(|cells| cells.get(index));
        match self {
            Self::F64 => Arc::new(
                cells.map(|c| if let Some(Cell::F64(v)) = c { Some(*v) } else { None }).collect::<Float64Array>(),
            ),
            Self::I64 => Arc::new(
                cells.map(|c| if let Some(Cell::I64(v)) = c { Some(*v) } else { None }).collect::<Int64Array>(),
            ),
            Self::Bool => Arc::new(
                cells.map(|c| if let Some(Cell::Bool(v)) = c { Some(*v) } else { None }).collect::<BooleanArray>(),
            ),
            Self::String => Arc::new(
                cells
                    .map(|c| if let Some(Cell::String(v)) = c { Some(v.as_str()) } else { None })
                    .collect::<StringArray>(),
            ),
        }
    }

    fn of_json(self, value: Value) -> Result<Cell, String> {
        let cell = match (self, &value) {
            (_, Value::Null) => Some(Cell::Null),
            (Self::F64, Value::Number(number)) => number.as_f64().map(Cell::F64),
            (Self::I64, Value::Number(number)) => number.as_i64().map(Cell::I64),
            (Self::Bool, Value::Bool(flag)) => Some(Cell::Bool(*flag)),
            (Self::String, Value::String(text)) => Some(Cell::String(text.clone())),
            _ => None,
        };
        cell.ok_or_else(|| format!("is {}, not of type {}", shortened(&value.to_string()), self.name()))
    }

    /// A column of the program's as one of this type, where every value of its type is one of this.
    fn of_arrow(self, column: &ArrayRef) -> Result<ArrayRef, String> {
        let found = column.data_type();
        let fits = match self {
            Self::F64 => found.is_numeric(),
            Self::I64 => found.is_integer() && *found != DataType::UInt64,
            Self::Bool => *found == DataType::Boolean,
            Self::String => matches!(found, DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View),
        };
        let wrong = || format!("has type {found}, not {}", self.name());
        if fits { cast(column, &self.data_type()).map_err(|_| wrong()) } else { Err(wrong()) }
    }

    fn cell(self, column: &ArrayRef, row: usize) -> Cell {
        if column.is_null(row) {
            return Cell::Null;
        }
        let found = match self {
            Self::F64 => column.as_primitive_opt::<Float64Type>().map(|c| Cell::F64(c.value(row))),
            Self::I64 => column.as_primitive_opt::<Int64Type>().map(|c| Cell::I64(c.value(row))),
            Self::Bool => column.as_boolean_opt().map(|c| Cell::Bool(c.value(row))),
            Self::String => column.as_string_opt::<i32>().map(|c| Cell::String(c.value(row).to_owned())),
        };
        found.unwrap_or(Cell::Null)
    }
}

/// One row as it is sent: its key first, no token ids.
pub fn keyed(row: &RecordBatch, key: u64) -> Result<RecordBatch, String> {
    let schema = row.schema();
    let sent = schema.fields().iter().zip(row.columns()).filter(|(field, _)| !field.name().ends_with("_ids"));
    let (fields, columns): (Vec<_>, Vec<_>) = sent.map(|(field, column)| (field.clone(), column.clone())).unzip();
    let first = Arc::new(Field::new(KEY, DataType::UInt64, false));
    let keys: ArrayRef = Arc::new(UInt64Array::from(vec![key; row.num_rows()]));
    let fields = std::iter::once(first).chain(fields).collect::<Vec<_>>();
    RecordBatch::try_new(Arc::new(Schema::new(fields)), std::iter::once(keys).chain(columns).collect())
        .map_err(|e| e.to_string())
}

/// Writes keyed rows to a program.
pub enum RowWriter<W: Write> {
    Jsonl(W),
    /// None before the first row, whose schema the stream begins with.
    Arrow(Option<W>, Option<Box<StreamWriter<W>>>),
}

impl<W: Write> RowWriter<W> {
    pub fn new(to: W, format: Format) -> Self {
        match format {
            Format::Jsonl => Self::Jsonl(to),
            Format::Arrow => Self::Arrow(Some(to), None),
        }
    }

    pub fn write(&mut self, row: &RecordBatch) -> io::Result<()> {
        match self {
            Self::Jsonl(to) => {
                // A null that is left out would look like a column that is not there.
                let mut writer = WriterBuilder::new().with_explicit_nulls(true).build::<_, LineDelimited>(Vec::new());
                writer.write(row).map_err(io::Error::other)?;
                writer.finish().map_err(io::Error::other)?;
                to.write_all(&writer.into_inner())?;
                to.flush()
            }
            Self::Arrow(to, stream) => {
                if let Some(to) = to.take() {
                    *stream = Some(Box::new(StreamWriter::try_new(to, &row.schema()).map_err(io::Error::other)?));
                }
                let Some(stream) = stream else { return Ok(()) };
                stream.write(row).map_err(io::Error::other)?;
                stream.get_mut().flush()
            }
        }
    }

    pub fn finish(self) -> io::Result<()> {
        match self {
            Self::Arrow(_, Some(mut stream)) => stream.finish().map_err(io::Error::other),
            _ => Ok(()),
        }
    }
}

/// Reads what a program writes until its end, or until it can't be understood, which is the error.
pub fn read_answers(
    from: impl Read,
    format: Format,
    columns: &[Column],
    mut each: impl FnMut(Answer) -> Result<(), String>,
) -> Result<(), String> {
    match format {
        Format::Jsonl => {
            let mut from = BufReader::new(from);
            while let Some(line) = next_line(&mut from, LONGEST_LINE).map_err(|e| e.to_string())? {
                if line.len() as u64 > LONGEST_LINE {
                    return Err(format!("wrote a line of more than {} MiB", LONGEST_LINE >> 20));
                }
                if !line.trim_ascii().is_empty() {
                    each(parse_line(&line, columns)?)?;
                }
            }
            Ok(())
        }
        Format::Arrow => read_arrow(from, columns, &mut each),
    }
}

/// The next line without its end; of a line that is longer, `most` bytes and one more.
pub fn next_line(from: &mut impl BufRead, most: u64) -> io::Result<Option<Vec<u8>>> {
    let mut line = Vec::new();
    if from.take(most + 1).read_until(b'\n', &mut line)? == 0 {
        return Ok(None);
    }
    if line.last() == Some(&b'\n') {
        line.pop();
    }
    Ok(Some(line))
}

fn parse_line(line: &[u8], columns: &[Column]) -> Result<Answer, String> {
    let shown = || shortened(&String::from_utf8_lossy(line));
    let object = match serde_json::from_slice(line) {
        Ok(Value::Object(object)) => Some(object),
        _ => None,
    };
    let mut object = object.ok_or_else(|| format!("wrote a line that is not a JSON object: {}", shown()))?;
    let key = object.get(KEY).and_then(Value::as_u64);
    let key = key.ok_or_else(|| format!("wrote a line without the `{KEY}` of a row: {}", shown()))?;
    if let Some(error) = object.remove(ERROR).filter(|error| !error.is_null()) {
        let text = error.as_str().map_or_else(|| error.to_string(), str::to_owned);
        return Ok((key, Err(format!("the program gives the row up: {}", shortened(&text)))));
    }
    let cell = |column: &Column| {
        let name = &column.name;
        let value = object.remove(name).ok_or_else(|| format!("the program's answer has no {name:?}: {}", shown()))?;
        column.kind.of_json(value).map_err(|what| format!("the program's {name:?} {what}"))
    };
    Ok((key, columns.iter().map(cell).collect()))
}

fn read_arrow(
    mut from: impl Read,
    columns: &[Column],
    each: &mut impl FnMut(Answer) -> Result<(), String>,
) -> Result<(), String> {
    // Anything else would be taken for the length of a message, however large.
    let mut mark = [0; 4];
    match from.read_exact(&mut mark) {
        Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
        read => read.map_err(|e| e.to_string())?,
    }
    if mark != [0xff; 4] {
        return Err(format!(
            "wrote something that is no Arrow stream; it begins with {:?}",
            String::from_utf8_lossy(&mark)
        ));
    }
    let broken = |e: datafusion::arrow::error::ArrowError| {
        format!("wrote an Arrow stream that can't be read: {}", shortened(&e.to_string()))
    };
    let stream = StreamReader::try_new(BufReader::new(mark.chain(from)), None).map_err(broken)?;
    for batch in stream {
        let batch = batch.map_err(broken)?;
        for answer in of_batch(&batch, columns)? {
            each(answer)?;
        }
    }
    Ok(())
}

fn of_batch(batch: &RecordBatch, columns: &[Column]) -> Result<Vec<Answer>, String> {
    let no_key = || format!("wrote a batch without whole numbers in a column `{KEY}`");
    let keys = batch.column_by_name(KEY).filter(|c| c.data_type().is_integer()).ok_or_else(no_key)?;
    let keys = cast(keys, &DataType::UInt64).map_err(|_| no_key())?;
    let keys = keys.as_primitive_opt::<UInt64Type>().filter(|keys| keys.null_count() == 0).ok_or_else(no_key)?;
    let errors = batch.column_by_name(ERROR).and_then(|c| cast(c, &DataType::Utf8).ok());
    let errors = errors.as_ref().and_then(|c| c.as_string_opt::<i32>());
    let typed = columns.iter().map(|column| {
        let found = batch.column_by_name(&column.name);
        let found = found.ok_or_else(|| format!("the program's answer has no {:?}", column.name))?;
        column.kind.of_arrow(found).map_err(|what| format!("the program's {:?} {what}", column.name))
    });
    let typed: Result<Vec<ArrayRef>, String> = typed.collect();
    let answer = |row: usize| match errors.filter(|errors| errors.is_valid(row)) {
        Some(errors) => Err(format!("the program gives the row up: {}", shortened(errors.value(row)))),
        None => {
            let typed = typed.as_ref().map_err(String::clone)?;
            Ok(columns.iter().zip(typed).map(|(column, values)| column.kind.cell(values, row)).collect())
        }
    };
    Ok((0..batch.num_rows()).map(|row| (keys.value(row), answer(row))).collect())
}

#[cfg(test)]
mod tests {
    use datafusion::arrow::array::Float32Array;
    use proptest::prelude::*;

    use super::*;

    fn columns() -> Vec<Column> {
        let column = |name: &str, kind| Column { name: name.into(), kind };
        vec![column("score", ColumnType::F64), column("good", ColumnType::Bool)]
    }

    #[test]
    fn lines() {
        let of = |line: &str| parse_line(line.as_bytes(), &columns());
        let cells = |score, good| Ok(vec![score, good]);
        assert_eq!(
            of(r#"{"_key": 3, "score": 1, "good": true, "more": []}"#),
            Ok((3, cells(Cell::F64(1.0), Cell::Bool(true))))
        );
        assert_eq!(of(r#"{"_key": 3, "score": null, "good": null}"#), Ok((3, cells(Cell::Null, Cell::Null))));
        assert_eq!(
            of(r#"{"_key": 3, "error": "no\nway"}"#),
            Ok((3, Err("the program gives the row up: no way".into())))
        );
        let row = |line: &str| of(line).unwrap().1.unwrap_err();
        assert!(row(r#"{"_key": 3, "score": 1}"#).contains("has no \"good\""));
        assert!(row(r#"{"_key": 3, "score": "1", "good": true}"#).contains("\"score\" is \"1\", not of type f64"));
        for broken in ["", "3", "{", "[1]", r#"{"score": 1}"#, r#"{"_key": -1}"#, r#"{"_key": "1"}"#, "NaN"] {
            assert!(of(broken).is_err(), "{broken}");
        }
        assert_eq!(ColumnType::I64.of_json(Value::from(3)), Ok(Cell::I64(3)));
        assert!(ColumnType::I64.of_json(Value::from(3.5)).is_err());
    }

    #[test]
    fn what_is_sent_has_a_key_and_no_ids() {
        let text: ArrayRef = Arc::new(StringArray::from(vec![None::<&str>]));
        let ids: ArrayRef = Arc::new(UInt64Array::from(vec![1]));
        let row = RecordBatch::try_from_iter_with_nullable([("text", text, true), ("chosen_ids", ids, true)]).unwrap();
        let mut sent = Vec::new();
        RowWriter::new(&mut sent, Format::Jsonl).write(&keyed(&row, 7).unwrap()).unwrap();
        assert_eq!(String::from_utf8(sent).unwrap(), "{\"_key\":7,\"text\":null}\n");
    }

    #[test]
    fn arrow_answers_are_widened_and_checked() {
        let keys: ArrayRef = Arc::new(Int64Array::from(vec![4, 5]));
        let scores: ArrayRef = Arc::new(Float32Array::from(vec![Some(0.5), None]));
        let good: ArrayRef = Arc::new(BooleanArray::from(vec![true, false]));
        let errors: ArrayRef = Arc::new(StringArray::from(vec![None, Some("bad")]));
        let batch = RecordBatch::try_from_iter_with_nullable([
            (KEY, keys.clone(), false),
            ("score", scores, true),
            ("good", good, true),
            (ERROR, errors, true),
        ]);
        let mut stream = RowWriter::new(Vec::new(), Format::Arrow);
        stream.write(&batch.unwrap()).unwrap();
        let RowWriter::Arrow(_, Some(stream)) = stream else { unreachable!() };
        let bytes = stream.into_inner().unwrap();
        let read = |bytes: &[u8]| {
            let mut answers = Vec::new();
            read_answers(bytes, Format::Arrow, &columns(), |answer| {
                answers.push(answer);
                Ok(())
            })
            .map(|()| answers)
        };
        let answers = read(&bytes).unwrap();
        assert_eq!(answers[0], (4, Ok(vec![Cell::F64(0.5), Cell::Bool(true)])));
        assert_eq!(answers[1], (5, Err("the program gives the row up: bad".into())));
        assert_eq!(read(b""), Ok(vec![]));
        assert!(read(b"hello, world").unwrap_err().contains("no Arrow stream"));
        assert!(read(&bytes[..40]).is_err());
        let lone = RecordBatch::try_from_iter([(KEY, keys)]).unwrap();
        assert!(of_batch(&lone, &columns()).unwrap()[0].1.as_ref().unwrap_err().contains("has no \"score\""));
    }

    proptest! {
        #[test]
        fn no_line_panics(line in ".*", most in 1..40_u64) {
            let _ = parse_line(line.as_bytes(), &columns());
            let mut from = line.as_bytes();
            while let Some(part) = next_line(&mut from, most).unwrap() {
                prop_assert!(part.len() as u64 <= most + 1);
            }
        }
    }
}
