//! Rotary position embedding (Su et al. 2021), in the half-split layout of Hugging Face's Llama.

use tch::{Device, Kind, Tensor};

use super::config::Config;
use crate::torch::TorchError;

/// Cosines and sines of every position of the context, in the model's dtype as transformers keeps
/// them: `[max_position, head_dim]`.
pub struct Rope {
    cos: Tensor,
    /// Negated in its first half, so that a rotation is `x * cos + roll(x) * sin`.
    sin: Tensor,
}

impl Rope {
    pub fn new(config: &Config, kind: Kind, device: Device) -> Result<Self, TorchError> {
        let (frequencies, scale) = config.rope_frequencies();
        // float32 as in transformers, whose angles are what the models were trained with
        let frequencies: Vec<f32> = frequencies.iter().map(|f| *f as f32).collect();
        let frequencies = Tensor::f_from_slice(&frequencies)?.f_unsqueeze(0)?;
        let positions =
            Tensor::f_arange(config.max_position_embeddings as i64, (Kind::Float, Device::Cpu))?.f_unsqueeze(1)?;
        let angles = positions.f_matmul(&frequencies)?;
        let cos = angles.f_cos()?.f_mul_scalar(scale)?;
        let sin = angles.f_sin()?.f_mul_scalar(scale)?;
        let wide = |left: &Tensor, right: &Tensor| -> Result<Tensor, TorchError> {
            Ok(Tensor::f_cat(&[left, right], 1)?.f_to_kind(kind)?.f_to_device(device)?)
        };
        Ok(Self { cos: wide(&cos, &cos)?, sin: wide(&sin.f_neg()?, &sin)? })
    }

    pub fn share(&self) -> Self {
        Self { cos: self.cos.shallow_clone(), sin: self.sin.shallow_clone() }
    }

    /// Cosines and sines for `positions` (`[tokens]`, i64), each `[tokens, 1, head_dim]`.
    pub fn at(&self, positions: &Tensor) -> Result<(Tensor, Tensor), TorchError> {
        let pick =
            |table: &Tensor| -> Result<Tensor, TorchError> { Ok(table.f_index_select(0, positions)?.f_unsqueeze(1)?) };
        Ok((pick(&self.cos)?, pick(&self.sin)?))
    }

    /// Rotates `x`, `[tokens, heads, head_dim]`.
    pub fn rotate(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor, TorchError> {
        let half = x.size().last().copied().unwrap_or(0) / 2;
        let swapped = x.f_roll([half], [-1])?;
        Ok(x.f_mul(cos)?.f_addcmul(&swapped, sin)?)
    }
}
