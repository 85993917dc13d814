//! What is wrong with a model, its files or an adapter.

use std::path::{Path, PathBuf};

use crate::torch::TorchError;

#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// A file that is missing, broken or of another model.
    #[error("{}: {message}", file.display())]
    File { file: PathBuf, message: String },
    #[error(transparent)]
    Torch(#[from] TorchError),
}

impl ModelError {
    pub fn file(file: impl AsRef<Path>, message: impl Into<String>) -> Self {
        Self::File { file: file.as_ref().to_owned(), message: message.into() }
    }
}
