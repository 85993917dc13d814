//! What is wrong with a model, its files or an adapter.

use std::path::{Path, PathBuf};

use crate::torch::TorchError;

/// One sentence that names the place and says what to do.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// A file that is missing, broken or of another model.
    #[error("{}: {message}", file.display())]
    File { file: PathBuf, message: String },
    /// Something the user asked for that can't be had.
    #[error("{0}")]
    Setting(String),
    /// The hub could not be reached: the same call may succeed later.
    #[error("{0}")]
    Network(String),
    #[error(transparent)]
    Torch(#[from] TorchError),
}

impl From<tch::TchError> for ModelError {
    fn from(error: tch::TchError) -> Self {
        Self::Torch(error.into())
    }
}

impl ModelError {
    pub fn file(file: impl AsRef<Path>, message: impl Into<String>) -> Self {
        Self::File { file: file.as_ref().to_owned(), message: message.into() }
    }

    /// A tensor of a file that is missing or is not what the configuration asks for.
    pub fn tensor(file: impl AsRef<Path>, tensor: &str, message: impl AsRef<str>) -> Self {
        Self::file(file, format!("tensor {tensor}: {}", message.as_ref()))
    }

    pub(crate) fn io(file: &Path) -> impl FnOnce(std::io::Error) -> Self {
        move |error| {
            Self::file(
                file,
                match error.kind() {
                    std::io::ErrorKind::NotFound => "is not there; paths start at the flow file's folder".to_owned(),
                    _ => format!("can't be read: {error}"),
                },
            )
        }
    }
}
