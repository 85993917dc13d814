//! Property test: random tables are written in each format and read back. They are equal, or the error names its place.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use datafusion::arrow::datatypes::{DataType, Field, Fields, Schema, SchemaRef};
use datafusion::arrow::ipc::writer::{FileWriter, StreamWriter};
use datafusion::arrow::json::{ReaderBuilder, WriterBuilder, writer::LineDelimited};
use datafusion::arrow::record_batch::RecordBatch;
use proptest::collection::vec;
use proptest::prelude::*;
use serde_json::{Map, Value, json};

use super::shard::Geometry;
use super::{DataError, Source, SourceSpec, table};

/// The kind of a column's values.
#[derive(Debug, Clone)]
enum Kind {
    Bool,
    Whole,
    Number,
    Text,
    /// Integers before this row, fractions from this row on.
    Late(usize),
    /// Null before this row.
    Sparse(usize, Box<Kind>),
    List(Box<Kind>),
    Object(Vec<Kind>),
}

impl Kind {
    fn data_type(&self) -> DataType {
        match self {
            Self::Bool => DataType::Boolean,
            Self::Whole => DataType::Int64,
            Self::Number | Self::Late(_) => DataType::Float64,
            Self::Text => DataType::Utf8,
            Self::Sparse(_, kind) => kind.data_type(),
            Self::List(kind) => DataType::List(Arc::new(Field::new("item", kind.data_type(), true))),
            Self::Object(kinds) => {
                let field = |(i, kind): (usize, &Kind)| Field::new(format!("k{i}"), kind.data_type(), true);
                DataType::Struct(kinds.iter().enumerate().map(field).collect::<Fields>())
            }
        }
    }

    fn is_flat(&self) -> bool {
        match self {
            Self::List(_) | Self::Object(_) => false,
            Self::Sparse(_, kind) => kind.is_flat(),
            _ => true,
        }
    }

    /// A random value for row `row`; one in eight is null.
    fn value(&self, row: usize, random: &mut impl FnMut() -> u64) -> Value {
        if random().is_multiple_of(8) {
            return Value::Null;
        }
        match self {
            Self::Bool => json!(random().is_multiple_of(2)),
            Self::Whole => json!([0, 1, -7, 10_001, i64::MAX, i64::MIN, 1 << 53][(random() % 7) as usize]),
            Self::Number => json!([0.5, -1.25, 1e300, 2.0, 1e-7, 123_456.789][(random() % 6) as usize]),
            Self::Late(from) if row < *from => json!((random() % 100) as i64),
            Self::Late(_) => json!((random() % 100) as f64 + 0.5),
            Self::Text => json!(TEXTS[(random() % TEXTS.len() as u64) as usize]),
            Self::Sparse(from, _) if row < *from => Value::Null,
            Self::Sparse(_, kind) => kind.value(row, random),
            Self::List(kind) => (0..random() % 3).map(|_| kind.value(row, random)).collect(),
            Self::Object(kinds) => {
                let entry = |(i, kind): (usize, &Kind)| (format!("k{i}"), kind.value(row, random));
                Value::Object(kinds.iter().enumerate().map(entry).collect::<Map<_, _>>())
            }
        }
    }
}

const TEXTS: [&str; 12] = [
    "plain",
    "two\nlines",
    "\"quoted\"",
    "a,b;c\td",
    "007",
    "1.50",
    "2026-11-28",
    "true",
    "ünïcödé 🙂",
    " spaces ",
    "{}",
    "\\n",
];

fn kinds() -> impl Strategy<Value = Kind> {
    let leaf = prop_oneof![
        Just(Kind::Bool),
        Just(Kind::Whole),
        Just(Kind::Number),
        Just(Kind::Text),
        (1..40_usize).prop_map(Kind::Late),
    ];
    leaf.prop_recursive(2, 6, 3, |inner| {
        prop_oneof![
            inner.clone().prop_map(|kind| Kind::List(Box::new(kind))),
            vec(inner.clone(), 1..3).prop_map(Kind::Object),
            (1..40_usize, inner).prop_map(|(from, kind)| Kind::Sparse(from, Box::new(kind))),
        ]
    })
}

/// A table as rows and as a batch.
struct Table {
    rows: Vec<Map<String, Value>>,
    batch: RecordBatch,
    flat: bool,
}

impl Table {
    fn of(kinds: &[Kind], count: usize, seed: u64) -> Self {
        let mut state = seed | 1;
        let mut random = move || {
            // xorshift64
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state
        };
        let names: Vec<String> = (0..kinds.len()).map(|i| format!("c{i}")).collect();
        let mut row = |row: usize| -> Map<String, Value> {
            // The first column has a value in each row, so no row is empty.
            let first = ("id".to_owned(), json!(row));
            let others = names.iter().zip(kinds).map(|(name, kind)| (name.clone(), kind.value(row, &mut random)));
            [first].into_iter().chain(others).collect()
        };
        let rows: Vec<_> = (0..count).map(&mut row).collect();
        let field = |(name, kind): (&String, &Kind)| Field::new(name, kind.data_type(), true);
        let fields = [Field::new("id", DataType::Int64, true)].into_iter().chain(names.iter().zip(kinds).map(field));
        let schema: SchemaRef = Arc::new(Schema::new(fields.collect::<Fields>()));
        let mut decoder = ReaderBuilder::new(schema).build_decoder().unwrap();
        decoder.serialize(&rows).unwrap();
        Self { batch: decoder.flush().unwrap().unwrap(), rows, flat: kinds.iter().all(Kind::is_flat) }
    }

    /// Writes the table in the named format; `None` if the format can't hold it.
    fn write(&self, dir: &Path, format: &str) -> Option<PathBuf> {
        let path = dir.join(format!("table.{format}"));
        let schema = self.batch.schema();
        match format {
            "parquet" | "jsonl" => table::write(&path, &schema, std::slice::from_ref(&self.batch)).unwrap(),
            "arrow" => {
                let mut writer = FileWriter::try_new(File::create(&path).unwrap(), &schema).unwrap();
                writer.write(&self.batch).unwrap();
                writer.finish().unwrap();
            }
            "stream.arrow" => {
                let mut writer = StreamWriter::try_new(File::create(&path).unwrap(), &schema).unwrap();
                writer.write(&self.batch).unwrap();
                writer.finish().unwrap();
            }
            "json" => std::fs::write(&path, serde_json::to_string_pretty(&self.rows).unwrap()).unwrap(),
            "late.jsonl" => {
                // Null keys are left out, as many programs do.
                let line = |row: &Map<String, Value>| {
                    let set: Map<_, _> =
                        row.iter().filter(|(_, v)| !v.is_null()).map(|(k, v)| (k.clone(), v.clone())).collect();
                    format!("{}\r\n", Value::Object(set))
                };
                std::fs::write(&path, self.rows.iter().map(line).collect::<String>()).unwrap();
            }
            "jsonl.gz" => {
                let mut writer =
                    flate2::write::GzEncoder::new(File::create(&path).unwrap(), flate2::Compression::fast());
                self.rows.iter().for_each(|row| writeln!(writer, "{}", Value::Object(row.clone())).unwrap());
                writer.finish().unwrap();
            }
            "csv" | "tsv" if self.flat => {
                let separator = if format == "csv" { b',' } else { b'\t' };
                let mut writer = ::csv::WriterBuilder::new().delimiter(separator).from_path(&path).unwrap();
                writer.write_record(self.rows[0].keys()).unwrap();
                for row in &self.rows {
                    let text = |value: &Value| match value {
                        Value::Null => String::new(),
                        Value::String(text) => text.clone(),
                        other => other.to_string(),
                    };
                    writer.write_record(row.values().map(text)).unwrap();
                }
                writer.flush().unwrap();
            }
            _ => return None,
        }
        Some(path)
    }
}

async fn read(path: &Path) -> Result<Vec<Map<String, Value>>, DataError> {
    let spec = SourceSpec { dataset: path.display().to_string(), ..SourceSpec::default() };
    let source = Source::open(&spec, Path::new("/")).await?;
    let total = source.count().await?;
    let mut rows = source.rows(Geometry { index: 0, count: 1, contiguous: false, total }).await?;
    let mut bytes = Vec::new();
    let mut writer = WriterBuilder::new().with_explicit_nulls(true).build::<_, LineDelimited>(&mut bytes);
    while let Some(read) = rows.next().await? {
        writer.write(&read.batch).unwrap();
    }
    writer.finish().unwrap();
    drop(writer);
    let text = String::from_utf8(bytes).unwrap();
    Ok(text.lines().map(|line| serde_json::from_str(line).unwrap()).collect())
}

/// Returns whether two values are equal. An integer and a fraction of the same value are equal, and a null key equals a
/// missing one.
fn same(written: &Value, read: &Value) -> bool {
    match (written, read) {
        (Value::Number(a), Value::Number(b)) => a == b || a.as_f64() == b.as_f64() && a.is_f64() != b.is_f64(),
        (Value::Array(a), Value::Array(b)) => a.len() == b.len() && a.iter().zip(b).all(|(a, b)| same(a, b)),
        (Value::Object(a), Value::Object(b)) => a
            .keys()
            .chain(b.keys())
            .all(|key| same(a.get(key).unwrap_or(&Value::Null), b.get(key).unwrap_or(&Value::Null))),
        // An object with null keys only can't be distinguished from null if nulls are not written.
        (Value::Object(a), Value::Null) => a.values().all(Value::is_null),
        (a, b) => a == b,
    }
}

/// Returns whether two values are equal in a CSV file: as [`same`], or with the same text or number. Null is an empty
/// text.
fn same_text(written: &Value, read: &Value) -> bool {
    let text = |value: &Value| match value {
        Value::Null => String::new(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    };
    same(written, read)
        || text(written) == text(read)
        || matches!((written.as_f64(), text(read).parse::<f64>()), (Some(a), Ok(b)) if a == b)
        || matches!((text(written).parse::<f64>(), read.as_f64()), (Ok(a), Some(b)) if a == b && text(written) != "007")
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn tables_are_read_back_as_they_were_written(
        kinds in vec(kinds(), 1..4),
        count in 1..300_usize,
        seed in any::<u64>(),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let dir = tempfile::tempdir().unwrap();
        let table = Table::of(&kinds, count, seed);
        for format in ["parquet", "jsonl", "arrow", "stream.arrow", "json", "late.jsonl", "jsonl.gz", "csv", "tsv"] {
            let Some(path) = table.write(dir.path(), format) else { continue };
            match runtime.block_on(read(&path)) {
                Ok(rows) => {
                    prop_assert_eq!(rows.len(), table.rows.len(), "{}", format);
                    for (i, (written, read)) in table.rows.iter().zip(&rows).enumerate() {
                        for (name, value) in written {
                            let found = read.get(name).unwrap_or(&Value::Null);
                            let is_text = matches!(format, "csv" | "tsv");
                            let equal = if is_text { same_text(value, found) } else { same(value, found) };
                            prop_assert!(equal, "{format}, row {i}, {name}: {value} was read as {found}");
                        }
                    }
                }
                Err(error) => {
                    let told = error.message.contains("column `") && error.message.contains("table.");
                    prop_assert!(told, "{format}: {error}");
                }
            }
        }
    }
}
