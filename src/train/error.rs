//! Why training stopped.

use std::path::{Path, PathBuf};

use crate::model::ModelError;
use crate::torch::TorchError;

#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    /// The first forward pass does not give the reference's numbers.
    #[error(
        "the reference is not the policy's start: pair of row {row} has log-ratios {chosen:.6} (chosen) and \
         {rejected:.6} (rejected) before the first step, both must be 0 within {tolerance:e}; the reference \
         log-probabilities belong to other rows, another adapter or another tokenisation"
    )]
    NotTheStart { row: u64, chosen: f64, rejected: f64, tolerance: f64 },
    #[error(
        "{skipped} steps in a row had a loss or gradient that is no finite number; lower learning_rate, or look at \
         the pairs and the adapter that training starts from"
    )]
    Diverged { skipped: u32 },
    #[error(
        "not one pair reached the trainer; look at the verdicts in the tables of the round (ties, equal answers), or give \
         the round more prompts"
    )]
    NoPairs,
    #[error("the validation part has no pairs; give it a larger share, or leave `validation` out")]
    NoValidation,
    #[error("{0}")]
    Device(String),
    /// A checkpoint that can't be written or read.
    #[error("{}: {message}", file.display())]
    File { file: PathBuf, message: String },
    #[error(transparent)]
    Model(#[from] ModelError),
    #[error(transparent)]
    Torch(#[from] TorchError),
}

impl TrainError {
    pub(super) fn file(file: &Path, message: impl ToString) -> Self {
        Self::File { file: file.to_owned(), message: message.to_string() }
    }
}

impl From<tch::TchError> for TrainError {
    fn from(error: tch::TchError) -> Self {
        Self::Torch(error.into())
    }
}

impl From<crate::torch::DeviceError> for TrainError {
    fn from(error: crate::torch::DeviceError) -> Self {
        Self::Device(error.to_string())
    }
}
