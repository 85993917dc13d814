//! Rotary position embedding (Su et al. 2021), in the half-split layout of Hugging Face's Llama.

use std::f64::consts::PI;

use tch::{Device, Kind, Tensor};

use crate::torch::TorchError;

/// Which angle a position has.
#[derive(Debug, Clone, PartialEq)]
pub struct RopeConfig {
    pub theta: f64,
    /// Dimensions of a head that are rotated: the first ones, all of them in most models.
    pub dims: usize,
    pub scaling: RopeScaling,
}

/// What is done to the rotary frequencies so that a model reaches past the context it was first
/// trained on.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    None,
    /// Every frequency is divided by the factor.
    Linear {
        factor: f64,
    },
    /// Llama 3.1: long wavelengths are divided, short ones kept, the ones between blended.
    Llama3 {
        factor: f64,
        low_freq_factor: f64,
        high_freq_factor: f64,
        original_max_position_embeddings: f64,
    },
    /// YaRN (Peng et al. 2023): as Llama 3.1's by the number of rotations, and cosines and sines are
    /// scaled.
    Yarn {
        factor: f64,
        /// Scale of cosines and sines.
        attention_factor: f64,
        beta_fast: f64,
        beta_slow: f64,
        original_max_position_embeddings: f64,
        /// Whether the blended range is widened to whole dimensions.
        truncate: bool,
    },
    /// Each frequency has a divisor of its own, as GGUF stores Llama 3.1's (`rope_freqs.weight`) and
    /// Phi-3's LongRoPE has them; cosines and sines are scaled.
    Divisors {
        divisors: Vec<f64>,
        attention_factor: f64,
    },
}

impl RopeConfig {
    /// Inverse frequencies (`dims / 2` of them) and the scale of cosines and sines.
    ///
    /// As transformers' `modeling_rope_utils`, in double precision.
    pub fn frequencies(&self) -> (Vec<f64>, f64) {
        let plain = (0..self.dims / 2).map(|i| self.theta.powf(-2.0 * i as f64 / self.dims as f64));
        match &self.scaling {
            RopeScaling::None => (plain.collect(), 1.0),
            RopeScaling::Linear { factor } => (plain.map(|f| f / factor).collect(), 1.0),
            RopeScaling::Llama3 {
                factor,
                low_freq_factor: low,
                high_freq_factor: high,
                original_max_position_embeddings: context,
            } => {
                let scaled = |f: f64| {
                    // 1 keeps the frequency, 0 divides it.
                    let kept = (context * f / (2.0 * PI) - low) / (high - low);
                    blend(f, *factor, kept.clamp(0.0, 1.0))
                };
                (plain.map(scaled).collect(), 1.0)
            }
            RopeScaling::Yarn { factor, attention_factor, .. } => {
                let (low, high) = self.yarn_range();
                let kept = |i: usize| 1.0 - ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
                (plain.enumerate().map(|(i, f)| blend(f, *factor, kept(i))).collect(), *attention_factor)
            }
            RopeScaling::Divisors { divisors, attention_factor } => {
                (plain.zip(divisors).map(|(f, d)| f / d).collect(), *attention_factor)
            }
        }
    }

    /// The dimensions between which YaRN goes over from keeping frequencies to dividing them.
    fn yarn_range(&self) -> (f64, f64) {
        let RopeScaling::Yarn { beta_fast, beta_slow, original_max_position_embeddings: context, truncate, .. } =
            self.scaling
        else {
            return (0.0, 1.0);
        };
        let dims = self.dims as f64;
        // The dimension that turns this often within the context.
        let dimension = |turns: f64| dims * (context / (turns * 2.0 * PI)).ln() / (2.0 * self.theta.ln());
        let (mut low, mut high) = (dimension(beta_fast), dimension(beta_slow));
        if truncate {
            (low, high) = (low.floor(), high.ceil());
        }
        let (low, high) = (low.max(0.0), high.min(dims - 1.0));
        (low, if low == high { high + 0.001 } else { high })
    }
}

fn blend(frequency: f64, factor: f64, kept: f64) -> f64 {
    (1.0 - kept) * frequency / factor + kept * frequency
}

/// Cosines and sines of every position of the context, in the model's dtype as transformers keeps
/// them: `[positions, dims]`.
pub struct Rope {
    cos: Tensor,
    /// Negated in its first half, so that a rotation is `x * cos + roll(x) * sin`.
    sin: Tensor,
}

/// Cosines and sines of the tokens of a pass, each `[tokens, 1, dims]`.
pub struct Angles {
    cos: Tensor,
    sin: Tensor,
}

impl Rope {
    pub fn new(config: &RopeConfig, positions: usize, kind: Kind, device: Device) -> Result<Self, TorchError> {
        let (frequencies, scale) = config.frequencies();
        // float32 as in transformers, whose angles are what the models were trained with
        let frequencies: Vec<f32> = frequencies.iter().map(|f| *f as f32).collect();
        let frequencies = Tensor::f_from_slice(&frequencies)?.f_unsqueeze(0)?;
        let positions = Tensor::f_arange(positions as i64, (Kind::Float, Device::Cpu))?.f_unsqueeze(1)?;
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

    /// The angles of `positions` (`[tokens]`, i64).
    pub fn at(&self, positions: &Tensor) -> Result<Angles, TorchError> {
        let pick =
            |table: &Tensor| -> Result<Tensor, TorchError> { Ok(table.f_index_select(0, positions)?.f_unsqueeze(1)?) };
        Ok(Angles { cos: pick(&self.cos)?, sin: pick(&self.sin)? })
    }
}

impl Angles {
    /// Cosines and sines, the first half of these negated, each `[tokens, 1, dims]`.
    pub fn tables(&self) -> (&Tensor, &Tensor) {
        (&self.cos, &self.sin)
    }

    /// Rotates `x`, `[tokens, heads, head_dim]`.
    pub fn rotate(&self, x: &Tensor) -> Result<Tensor, TorchError> {
        let (dims, head_dim) = (self.cos.size().last().copied().unwrap_or(0), x.size().last().copied().unwrap_or(0));
        if dims == head_dim {
            return self.rotate_all(x);
        }
        let rotated = self.rotate_all(&x.f_narrow(-1, 0, dims)?)?;
        Ok(Tensor::f_cat(&[rotated, x.f_narrow(-1, dims, head_dim - dims)?], -1)?)
    }

    fn rotate_all(&self, x: &Tensor) -> Result<Tensor, TorchError> {
        let half = x.size().last().copied().unwrap_or(0) / 2;
        let swapped = x.f_roll([half], [-1])?;
        Ok(x.f_mul(&self.cos)?.f_addcmul(&swapped, &self.sin)?)
    }
}
