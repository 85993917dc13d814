//! Parquet tables of a round: written beside their final name, then renamed, so that a table that
//! exists is complete.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use datafusion::arrow::compute::{SortColumn, concat_batches, lexsort_to_indices, take_record_batch};
use datafusion::arrow::datatypes::{Schema, SchemaRef};
use datafusion::arrow::record_batch::RecordBatch;
use datafusion::parquet::arrow::ArrowWriter;
use datafusion::parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;

/// The columns that identify a row, in sorting order.
const KEYS: [&str; 3] = ["_row", "_candidate", "_pair"];

/// File name of a port's table.
pub fn file_name(port: &str) -> String {
    if port.is_empty() { "rows.parquet".into() } else { format!("{port}.parquet") }
}

/// Streams batches of one schema into a table.
pub struct TableWriter {
    /// Never locked: the mutex makes the writer, and with it a stage's context, shareable.
    writer: Mutex<ArrowWriter<File>>,
    tmp: PathBuf,
    path: PathBuf,
}

impl TableWriter {
    pub fn create(path: &Path, schema: SchemaRef) -> io::Result<Self> {
        let tmp = path.with_extension("parquet.tmp");
        let writer = ArrowWriter::try_new(File::create(&tmp)?, schema, None)?;
        Ok(Self { writer: Mutex::new(writer), tmp, path: path.into() })
    }

    pub fn write(&mut self, batch: &RecordBatch) -> io::Result<()> {
        let writer = self.writer.get_mut().unwrap_or_else(|e| e.into_inner());
        Ok(writer.write(batch)?)
    }

    /// Makes the table durable under its name.
    pub fn finish(self) -> io::Result<()> {
        let mut writer = self.writer.into_inner().unwrap_or_else(|e| e.into_inner());
        writer.finish()?;
        writer.inner().sync_all()?;
        rename(&self.tmp, &self.path)
    }
}

/// One table from batches whose schemas may differ in nullability, sorted by the key columns.
pub fn write_sorted(path: &Path, batches: &[RecordBatch]) -> io::Result<()> {
    let schemas = batches.iter().map(|b| b.schema().as_ref().clone());
    let schema = Arc::new(Schema::try_merge(schemas).map_err(io::Error::other)?);
    let all = concat_batches(&schema, batches).map_err(io::Error::other)?;
    let mut writer = TableWriter::create(path, schema)?;
    writer.write(&sorted(all)?)?;
    writer.finish()
}

/// Rows in the order of their key columns.
pub fn sorted(rows: RecordBatch) -> io::Result<RecordBatch> {
    let keys: Vec<SortColumn> = KEYS
        .iter()
        .filter_map(|k| rows.column_by_name(k))
        .map(|c| SortColumn { values: c.clone(), options: None })
        .collect();
    if keys.is_empty() {
        return Ok(rows);
    }
    let order = lexsort_to_indices(&keys, None).map_err(io::Error::other)?;
    take_record_batch(&rows, &order).map_err(io::Error::other)
}

/// Batches of a table, as [`TableWriter`] left it.
pub fn read(path: &Path) -> io::Result<Vec<RecordBatch>> {
    let builder = ParquetRecordBatchReaderBuilder::try_new(File::open(path)?)?;
    let promised = builder.metadata().file_metadata().num_rows();
    let batches = builder.build()?.map(|b| b.map_err(io::Error::other)).collect::<io::Result<Vec<_>>>()?;
    let read: usize = batches.iter().map(RecordBatch::num_rows).sum();
    if read as i64 != promised {
        return Err(io::Error::other(format!("its footer promises {promised} rows, and {read} were read")));
    }
    Ok(batches)
}

/// Writes a small file so that its name never holds half of it.
pub fn write_atomically(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".tmp");
    let tmp = path.with_file_name(name);
    let mut file = File::create(&tmp)?;
    io::Write::write_all(&mut file, bytes)?;
    file.sync_all()?;
    rename(&tmp, path)
}

/// Renames and makes the new directory entry durable.
fn rename(from: &Path, to: &Path) -> io::Result<()> {
    std::fs::rename(from, to)?;
    sync_parent(to)
}

/// Makes the directory entry of `path` durable.
pub fn sync_parent(path: &Path) -> io::Result<()> {
    let Some(dir) = path.parent() else { return Ok(()) };
    File::open(if dir.as_os_str().is_empty() { Path::new(".") } else { dir })?.sync_all()
}

/// Makes a directory and those above it that are missing, each of them durable.
pub fn create_dir(path: &Path) -> io::Result<()> {
    let new: Vec<&Path> = path.ancestors().take_while(|p| !p.as_os_str().is_empty() && !p.exists()).collect();
    std::fs::create_dir_all(path)?;
    new.into_iter().rev().try_for_each(sync_parent)
}
