//! Tables in Arrow IPC files, in the file format or as a stream, as `save_to_disk` of datasets writes them.

use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use datafusion::arrow::array::RecordBatchReader;
use datafusion::arrow::datatypes::{Schema, SchemaRef};
use datafusion::arrow::ipc::reader::{FileReader, StreamReader};
use datafusion::arrow::record_batch::RecordBatch;
use datafusion::execution::{SendableRecordBatchStream, TaskContext};
use datafusion::physical_plan::streaming::PartitionStream;

use super::error::reader_words;
use super::{DataError, batch, pool};

/// The first bytes of the file format.
const MAGIC: &[u8; 6] = b"ARROW1";

/// Arrow files that are one table.
#[derive(Debug, Clone)]
pub struct ArrowTable {
    pub files: Vec<PathBuf>,
    /// The columns of all files together.
    pub schema: SchemaRef,
}

/// The columns of a file.
///
/// # Errors
/// The file can't be read.
pub fn schema_of(path: &Path) -> Result<Schema, DataError> {
    Ok(open(path)?.schema().as_ref().clone())
}

fn open(path: &Path) -> Result<Box<dyn RecordBatchReader + Send>, DataError> {
    let external = |e: std::io::Error| DataError::external(format!("{}: {e}", path.display()));
    let fault =
        |e: datafusion::arrow::error::ArrowError| DataError::user(format!("{}: {}", path.display(), reader_words(&e)));
    let mut file = BufReader::new(File::open(path).map_err(external)?);
    let mut head = [0; MAGIC.len()];
    let read = file.read(&mut head).map_err(external)?;
    file.seek(SeekFrom::Start(0)).map_err(external)?;
    Ok(match &head[..read] == MAGIC {
        true => Box::new(FileReader::try_new(file, None).map_err(fault)?),
        false => Box::new(StreamReader::try_new(file, None).map_err(fault)?),
    })
}

impl ArrowTable {
    fn read(&self, send: &dyn Fn(RecordBatch) -> bool) -> Result<(), DataError> {
        for file in &self.files {
            for batch in open(file)? {
                let batch = batch.map_err(|e| DataError::user(format!("{}: {}", file.display(), reader_words(&e))))?;
                if !send(batch::widen(&batch, &self.schema).map_err(|e| e.at(file.display()))?) {
                    return Ok(());
                }
            }
        }
        Ok(())
    }
}

impl PartitionStream for ArrowTable {
    fn schema(&self) -> &SchemaRef {
        &self.schema
    }

    fn execute(&self, _task: Arc<TaskContext>) -> SendableRecordBatchStream {
        let table = self.clone();
        pool::read(self.schema.clone(), move |send| table.read(send))
    }
}
