//! A file of weights, read by position.
//!
//! Weights are read where they are needed and by several threads, so there is no cursor. Positional
//! reads serve from the page cache just as a memory map would, but a file that is cut short or
//! replaced while it is read is an error here and not a SIGBUS, and no `unsafe` is needed.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::ModelError;

/// An open file whose length was taken once.
#[derive(Debug)]
pub struct WeightFile {
    path: PathBuf,
    file: File,
    len: u64,
}

impl WeightFile {
    /// Opens a regular file for reading.
    ///
    /// # Errors
    /// When it can't be opened or is a directory.
    pub fn open(path: &Path) -> Result<Self, ModelError> {
        let file = File::open(path).map_err(ModelError::io(path))?;
        let metadata = file.metadata().map_err(ModelError::io(path))?;
        if !metadata.is_file() {
            return Err(ModelError::file(path, "is no regular file; name a file of weights"));
        }
        Ok(Self { path: path.to_owned(), file, len: metadata.len() })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Bytes in the file when it was opened.
    pub fn len(&self) -> u64 {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Fills `buffer` from `offset` on.
    ///
    /// # Errors
    /// When the file ends before the buffer is full.
    pub fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), ModelError> {
        self.file.read_exact_at(buffer, offset).map_err(ModelError::io(&self.path))
    }
}
