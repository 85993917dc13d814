//! The transformer's pass where no gradients are asked for: sampling and judging.
//!
//! Everything between the matrix products is a handful of operations of our own ([`crate::torch::ops`]),
//! and on a CPU products with few rows are too. The numbers are those of [`Transformer::hidden`] but for
//! rounding: what a trainer has to reproduce to the bit goes there.

use tch::{Device, Tensor};

use super::attention::Attend;
use super::config::Activation;
use super::gradient::{Keep, Kept};
use super::lora::{Adapters, Lora, Site};
use super::transformer::{Layer, Linear, PassAngles, Transformer};
use crate::torch::{TorchError, cpu, ops, products};

/// What all blocks of a pass have in common.
pub(super) struct Pass<'a> {
    pub angles: PassAngles,
    pub projections: Projections<'a>,
}

/// How a pass is multiplied by its weights.
pub(super) enum Projections<'a> {
    /// The fastest way for its rows; rows may be under different adapters.
    Fast(&'a Adapters<'a>),
    /// So that a row's numbers don't depend on the other rows; all rows are under the same adapters.
    Apart(&'a [&'a Lora]),
}

impl Projections<'_> {
    fn project(&self, layer: usize, site: Site, linear: &Linear, x: &Tensor) -> Result<Tensor, TorchError> {
        let bias = linear.bias.as_ref();
        Ok(match self {
            Self::Fast(adapters) => {
                let y = ops::linear(x, &linear.weight, bias)?;
                adapters.apply_in_place(layer, site, x, &y)?;
                y
            }
            Self::Apart(stack) => {
                let y = products::linear(x, &linear.weight, bias, false)?;
                stack.iter().try_for_each(|lora| lora.add_apart(layer, site, x, &y))?;
                y
            }
        })
    }
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
        let pass = Pass { angles: self.angles(positions)?, projections: Projections::Fast(adapters) };
        let mut grown = None;
        for (i, layer) in self.layers.iter().enumerate() {
            grown = Some(self.infer_block(i, layer, &x, grown.as_ref(), &pass, attention, &mut Kept::default())?);
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
    #[allow(clippy::too_many_arguments)]
    pub(super) fn infer_block(
        &self,
        index: usize,
        layer: &Layer,
        x: &Tensor,
        grown: Option<&Tensor>,
        pass: &Pass<'_>,
        attention: &mut dyn Attend,
        kept: &mut Kept,
    ) -> Result<Tensor, TorchError> {
        let c = &self.config;
        let (heads, kv_heads, d) = (c.heads as i64, c.kv_heads as i64, c.head_dim as i64);
        let project = |site, linear, x: &Tensor| pass.projections.project(index, site, linear, x);
        let all = kept.keep == Keep::All;

        let h = self.add_norm(x, grown, &layer.input_norm)?;
        kept.entered = (kept.keep != Keep::Nothing).then(|| x.f_detach_copy()).transpose()?;
        let qkv = project(Site::Qkv, &layer.qkv, &h)?.f_view([-1, heads + 2 * kv_heads, d])?;
        kept.qkv = all.then(|| qkv.f_detach_copy()).transpose()?;
        self.turn(index, layer, &pass.angles).apply(&qkv, heads, kv_heads)?;
        let part = |first, count| qkv.f_narrow(1, first, count);
        let (q, k, v) = (part(0, heads)?, part(heads, kv_heads)?, part(heads + kv_heads, kv_heads)?);
        let attended = attention.attend(index, self.layer_kind(index).local, &q, &k, &v)?;
        let out = project(Site::O, &layer.o, &attended)?;
        let added = self.optional_norm(out.shallow_clone(), layer.attended_norm.as_ref())?;

        let h = self.add_norm(x, Some(&added), &layer.mlp_norm)?;
        kept.between = all.then(|| x.f_detach_copy()).transpose()?;
        let gate_up = project(Site::GateUp, &layer.gate_up, &h)?;
        let gated = ops::gate(&gate_up, self.gelu())?;
        let down = project(Site::Down, &layer.down, &gated)?;
        let added = self.optional_norm(down.shallow_clone(), layer.mlp_out_norm.as_ref())?;
        if all {
            kept.attended = Some(attended);
            kept.gate_up = Some(gate_up);
            kept.added = [layer.attended_norm.is_some().then_some(out), layer.mlp_out_norm.is_some().then_some(down)];
        }
        Ok(added)
    }

    pub(super) fn gelu(&self) -> bool {
        self.config.activation == Activation::GeluTanh
    }

    pub(super) fn turn<'a>(&self, index: usize, layer: &'a Layer, angles: &'a PassAngles) -> ops::Turn<'a> {
        let kind = self.layer_kind(index);
        ops::Turn {
            norms: layer.q_norm.as_ref().zip(layer.k_norm.as_ref()),
            eps: self.config.rms_norm_eps,
            angles: kind.rope.then(|| angles.of(kind.local).tables()),
        }
    }

    pub(super) fn add_norm(&self, x: &Tensor, grown: Option<&Tensor>, weight: &Tensor) -> Result<Tensor, TorchError> {
        ops::add_norm(x, grown, weight, self.config.rms_norm_eps, self.kind())
    }

    /// Log-probabilities of `targets` (`[rows]`, i64) after hidden states `[rows, hidden]`: `[rows]`
    /// float32. [`Transformer::log_probs`] without gradients.
    pub fn infer_log_probs(&self, hidden: &Tensor, targets: &Tensor) -> Result<Tensor, TorchError> {
        // Some processors, and some shapes on all of them, round a wide product to the model's dtype after all.
        self.log_probs_among(&self.infer_logits(hidden)?, hidden, targets)
    }
}
