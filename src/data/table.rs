//! Tables as files: written whole or not at all.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use datafusion::arrow::array::new_null_array;
use datafusion::arrow::datatypes::{Schema, SchemaRef};
use datafusion::arrow::ipc::reader::FileReader;
use datafusion::arrow::json::WriterBuilder;
use datafusion::arrow::json::writer::LineDelimited;
use datafusion::arrow::record_batch::RecordBatch;
use datafusion::parquet::arrow::ArrowWriter;
use datafusion::parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use datafusion::parquet::basic::{Compression, ZstdLevel};
use datafusion::parquet::file::properties::WriterProperties;

use super::DataError;

/// What a table is written as, by the extension of its path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TableFormat {
    Parquet,
    JsonLines,
}

impl TableFormat {
    /// Errors on any other extension than `.parquet` and `.jsonl`.
    pub fn of(path: &Path) -> Result<Self, DataError> {
        match path.extension().and_then(|e| e.to_str()) {
            Some("parquet") => Ok(Self::Parquet),
            Some("jsonl") => Ok(Self::JsonLines),
            _ => Err(DataError::user(format!("{}: the path must end in .parquet or .jsonl", path.display()))),
        }
    }
}

/// Writes `batches` (all of `schema`) to `path`: beside it first, synced, then renamed over it, so
/// that a reader never sees half a table.
pub fn write(path: &Path, schema: &SchemaRef, batches: &[RecordBatch]) -> Result<(), DataError> {
    let format = TableFormat::of(path)?;
    let fault = |e: String| DataError::external(format!("{}: {e}", path.display()));
    let dir = path.parent().filter(|d| !d.as_os_str().is_empty()).unwrap_or(Path::new("."));
    std::fs::create_dir_all(dir).map_err(|e| fault(e.to_string()))?;
    let beside = beside(path);
    let file = File::create(&beside).map_err(|e| fault(e.to_string()))?;
    let written = match format {
        TableFormat::Parquet => parquet(file, schema, batches),
        TableFormat::JsonLines => json_lines(file, batches),
    };
    let done = written.and_then(|file| file.sync_all().map_err(|e| e.to_string()));
    if let Err(e) = done {
        // The message is about the first fault; what is left over is overwritten by the next try.
        let _ = std::fs::remove_file(&beside);
        return Err(fault(e));
    }
    let named = std::fs::rename(&beside, path).and_then(|()| File::open(dir)?.sync_all());
    named.map_err(|e| fault(e.to_string()))
}

fn beside(path: &Path) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".tmp");
    path.with_file_name(name)
}

fn parquet<W: Write + Send>(file: W, schema: &SchemaRef, batches: &[RecordBatch]) -> Result<W, String> {
    let zstd = ZstdLevel::try_new(3).map_err(|e| e.to_string())?;
    let properties = WriterProperties::builder().set_compression(Compression::ZSTD(zstd)).build();
    let mut writer = ArrowWriter::try_new(file, schema.clone(), Some(properties)).map_err(|e| e.to_string())?;
    for batch in batches {
        writer.write(batch).map_err(|e| e.to_string())?;
    }
    writer.into_inner().map_err(|e| e.to_string())
}

/// The first column that files of the format can't hold, and why.
pub fn unwritable(format: TableFormat, schema: &Schema) -> Option<(String, String)> {
    schema.fields().iter().find_map(|field| {
        let alone = Arc::new(Schema::new(vec![field.as_ref().clone().with_nullable(true)]));
        // Writers look at a type only once a value of it comes.
        let rows = RecordBatch::try_new(alone.clone(), vec![new_null_array(field.data_type(), 1)]);
        let written = rows.map_err(|e| e.to_string()).and_then(|rows| match format {
            TableFormat::Parquet => parquet(Vec::new(), &alone, &[rows]).map(drop),
            TableFormat::JsonLines => json_lines(Vec::new(), &[rows]).map(drop),
        });
        written.err().map(|why| (field.name().clone(), why))
    })
}

/// Every row has all columns, also those that are null.
fn json_lines<W: Write>(file: W, batches: &[RecordBatch]) -> Result<W, String> {
    let mut writer = WriterBuilder::new().with_explicit_nulls(true).build::<_, LineDelimited>(BufWriter::new(file));
    for batch in batches {
        writer.write(batch).map_err(|e| e.to_string())?;
    }
    writer.finish().map_err(|e| e.to_string())?;
    let mut buffer = writer.into_inner();
    buffer.flush().map_err(|e| e.to_string())?;
    buffer.into_inner().map_err(|e| e.error().to_string())
}

/// Schema and rows of a `.parquet` or `.arrow` (IPC file) table.
pub fn read(path: &Path) -> Result<(SchemaRef, Vec<RecordBatch>), DataError> {
    let fault = |e: String| DataError::user(format!("{}: {e}", path.display()));
    let file = File::open(path).map_err(|e| DataError::external(format!("{}: {e}", path.display())))?;
    if path.extension().is_some_and(|e| e == "arrow") {
        let reader = FileReader::try_new(file, None).map_err(|e| fault(e.to_string()))?;
        let schema = reader.schema();
        let batches = reader.collect::<Result<Vec<_>, _>>().map_err(|e| fault(e.to_string()))?;
        return Ok((schema, batches));
    }
    let builder = ParquetRecordBatchReaderBuilder::try_new(file).map_err(|e| fault(e.to_string()))?;
    let schema = builder.schema().clone();
    let reader = builder.build().map_err(|e| fault(e.to_string()))?;
    let batches = reader.collect::<Result<Vec<_>, _>>().map_err(|e| fault(e.to_string()))?;
    Ok((schema, batches))
}

#[cfg(test)]
mod tests {
    use datafusion::arrow::array::{StringArray, UInt64Array};
    use datafusion::arrow::datatypes::{DataType, Field, Fields};

    use super::*;

    fn batch() -> RecordBatch {
        let fields = vec![Field::new("_row", DataType::UInt64, false), Field::new("text", DataType::Utf8, true)];
        let text = StringArray::from(vec![Some("one\ntwo"), None]);
        RecordBatch::try_new(
            Arc::new(Schema::new(fields)),
            vec![Arc::new(UInt64Array::from(vec![0, 1])), Arc::new(text)],
        )
        .unwrap()
    }

    #[test]
    fn what_is_written_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("new/out.parquet");
        for _ in 0..2 {
            write(&path, &batch().schema(), &[batch(), batch()]).unwrap();
        }
        let (_, read) = read(&path).unwrap();
        assert_eq!(read.iter().map(RecordBatch::num_rows).sum::<usize>(), 4);
        assert_eq!(read[0].slice(0, 2), batch());
        assert_eq!(std::fs::read_dir(dir.path().join("new")).unwrap().count(), 1);
    }

    #[test]
    fn columns_that_no_file_can_hold_are_named() {
        let entries = |key: DataType| {
            let fields = vec![Field::new("keys", key, false), Field::new("values", DataType::Utf8, true)];
            DataType::Map(Arc::new(Field::new("entries", DataType::Struct(fields.into()), false)), false)
        };
        for (data_type, parquet, json) in [
            (DataType::Struct(Fields::empty()), true, false),
            (entries(DataType::Int64), false, true),
            (entries(DataType::Utf8), false, false),
            (DataType::Null, false, false),
            (DataType::Float64, false, false),
        ] {
            let schema = Schema::new(vec![Field::new("n", DataType::Int64, true), Field::new("x", data_type, true)]);
            for (format, refused) in [(TableFormat::Parquet, parquet), (TableFormat::JsonLines, json)] {
                let found = unwritable(format, &schema).map(|(name, _)| name);
                assert_eq!(found, refused.then(|| "x".to_owned()), "{format:?} {schema:?}");
            }
        }
    }

    #[test]
    fn lines_of_json() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("out.jsonl");
        write(&path, &batch().schema(), &[batch()]).unwrap();
        assert_eq!(
            std::fs::read_to_string(&path).unwrap(),
            "{\"_row\":0,\"text\":\"one\\ntwo\"}\n{\"_row\":1,\"text\":null}\n"
        );
        assert!(
            write(&dir.path().join("out.txt"), &batch().schema(), &[])
                .unwrap_err()
                .message
                .contains(".parquet or .jsonl")
        );
    }
}
