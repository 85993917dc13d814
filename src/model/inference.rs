//! The transformer's pass where no gradients are asked for: sampling and judging.
//!
//! Everything between the matrix products is a handful of operations of our own ([`crate::torch::ops`]),
//! and on a CPU products with few rows are too. The numbers are those of [`Transformer::hidden`] but for
//! rounding: what a trainer has to reproduce to the bit goes there.

use tch::{Device, Tensor};

use super::attention::Attend;
use super::config::Activation;
use super::lora::{Adapters, Site};
use super::transformer::{Layer, Linear, PassAngles, Transformer};
use crate::torch::{TorchError, cpu, ops};

/// What all blocks of a pass have in common.
struct Pass<'a> {
    angles: PassAngles,
    adapters: &'a Adapters<'a>,
}

impl Transformer {
    /// [`Transformer::hidden`] without gradients.
    pub fn infer(
        &self,
        ids: &Tensor,
        positions: &Tensor,
        attention: &mut dyn Attend,
        adapters: &Adapters<'_>,
    ) -> Result<Tensor, TorchError> {
        if !self.heads().served() {
            return self.hidden(ids, positions, attention, adapters);
        }
        let x = self.embed(ids)?;
        let pass = Pass { angles: self.angles(positions)?, adapters };
        let mut grown = None;
        for (i, layer) in self.layers.iter().enumerate() {
            grown = Some(self.infer_block(i, layer, &x, grown.as_ref(), &pass, attention)?);
        }
        self.add_norm(&x, grown.as_ref(), &self.norm)
    }

    /// Whether products of the model's dtype come out in float32 without a rounding between.
    fn widens(&self) -> bool {
        self.device() == Device::Cpu && self.heads().served()
    }

    /// [`Transformer::logits`] without gradients; float32 all the way where the device allows.
    pub fn infer_logits(&self, hidden: &Tensor) -> Result<Tensor, TorchError> {
        if !self.widens() {
            return self.logits(hidden);
        }
        self.cap(cpu::linear(hidden, &self.head, None, true)?)
    }

    /// What the block adds to the stream `x`, which gets what the block before it added.
    fn infer_block(
        &self,
        index: usize,
        layer: &Layer,
        x: &Tensor,
        grown: Option<&Tensor>,
        pass: &Pass<'_>,
        attention: &mut dyn Attend,
    ) -> Result<Tensor, TorchError> {
        let c = &self.config;
        let (heads, kv_heads, d) = (c.heads as i64, c.kv_heads as i64, c.head_dim as i64);
        let project = |site: Site, linear: &Linear, x: &Tensor| {
            let y = ops::linear(x, &linear.weight, linear.bias.as_ref())?;
            pass.adapters.apply_in_place(index, site, x, &y)?;
            Ok::<_, TorchError>(y)
        };

        let h = self.add_norm(x, grown, &layer.input_norm)?;
        let qkv = project(Site::Qkv, &layer.qkv, &h)?.f_view([-1, heads + 2 * kv_heads, d])?;
        let kind = self.layer_kind(index);
        let turn = ops::Turn {
            norms: layer.q_norm.as_ref().zip(layer.k_norm.as_ref()),
            eps: c.rms_norm_eps,
            angles: kind.rope.then(|| pass.angles.of(kind.local).tables()),
        };
        turn.apply(&qkv, heads, kv_heads)?;
        let part = |first, count| qkv.f_narrow(1, first, count);
        let (q, k, v) = (part(0, heads)?, part(heads, kv_heads)?, part(heads + kv_heads, kv_heads)?);
        let attended = attention.attend(index, kind.local, &q, &k, &v)?;
        let attended = self.optional_norm(project(Site::O, &layer.o, &attended)?, layer.attended_norm.as_ref())?;

        let h = self.add_norm(x, Some(&attended), &layer.mlp_norm)?;
        let gate_up = project(Site::GateUp, &layer.gate_up, &h)?;
        let gated = ops::gate(&gate_up, c.activation == Activation::GeluTanh)?;
        self.optional_norm(project(Site::Down, &layer.down, &gated)?, layer.mlp_out_norm.as_ref())
    }

    fn add_norm(&self, x: &Tensor, grown: Option<&Tensor>, weight: &Tensor) -> Result<Tensor, TorchError> {
        ops::add_norm(x, grown, weight, self.config.rms_norm_eps, self.kind())
    }

    /// Log-probabilities of `targets` (`[rows]`, i64) after hidden states `[rows, hidden]`: `[rows]`
    /// float32. [`Transformer::log_probs`] without gradients.
    pub fn infer_log_probs(&self, hidden: &Tensor, targets: &Tensor) -> Result<Tensor, TorchError> {
        if !self.widens() {
            return self.log_probs(hidden, targets);
        }
        let logits = self.infer_logits(hidden)?;
        let picked = logits.f_gather(1, &targets.f_unsqueeze(1)?, false)?.f_squeeze_dim(1)?;
        Ok(picked.f_sub(&logits.f_logsumexp([1], false)?)?)
    }
}
