//! Errors of tensor operations.

use tch::TchError;

/// What a tensor operation came back with.
#[derive(Debug, Clone, thiserror::Error)]
pub enum TorchError {
    /// The device has no memory left for the operation; a smaller batch may fit.
    #[error("out of memory on the device: {0}")]
    OutOfMemory(String),
    #[error("tensor operation failed: {0}")]
    Operation(String),
}

impl From<TchError> for TorchError {
    fn from(error: TchError) -> Self {
        let text = error.to_string();
        // libtorch appends its C++ stack; the first line says what happened.
        let first = text.lines().next().unwrap_or_default().to_owned();
        // The type of the C++ exception does not survive tch, its text does.
        if text.contains("out of memory") || text.contains("can't allocate memory") {
            Self::OutOfMemory(first)
        } else {
            Self::Operation(first)
        }
    }
}

impl TorchError {
    pub fn is_out_of_memory(&self) -> bool {
        matches!(self, Self::OutOfMemory(_))
    }
}
