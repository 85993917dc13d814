//! Weights of a model on disk, under Hugging Face's names.

use tch::{Device, Kind, Tensor};

use super::ModelError;

pub struct Weights;

impl Weights {
    /// The tensor `name`, which must have `shape`, converted to `kind` on `device`.
    pub fn tensor(&self, _name: &str, _shape: &[usize], _kind: Kind, _device: Device) -> Result<Tensor, ModelError> {
        Err(ModelError::file("", "contract"))
    }
}
