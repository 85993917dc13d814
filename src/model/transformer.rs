//! The one decoder-only transformer, driven by a [`Config`].
//!
//! Tokens of all sequences lie side by side in one dimension: `[tokens, hidden]`. There is no batch
//! dimension and no padding of its own; positions come with the tokens and an [`Attend`] decides
//! who sees whom. Decoding, prefill, scoring and training are the same pass.
//!
//! Matrix products run in the model's dtype. The stream that every block adds to, and the norms that
//! read it, are float32: in bf16 a stream of 30 blocks is rounded 60 times, and log-probs come out a
//! third further from float32 than they need to (docs/models.md has the figures).

use tch::{Device, Kind, Tensor};

use super::ModelError;
use super::attention::{Attend, Heads};
use super::config::{Activation, Config};
use super::family::LayerKind;
use super::lora::{Adapters, Site};
use super::parameters::{BlockNames, EMBED, HEAD, NORM};
use super::rope::{Angles, Rope};
use super::weights::Weights;
use crate::torch::TorchError;

/// Weights on one device. Cloning shares storage: device threads of one physical device hold one
/// read-only copy.
pub struct Transformer {
    pub config: Config,
    pub(super) embed: Tensor,
    pub(super) layers: Vec<Layer>,
    pub(super) norm: Tensor,
    pub(super) head: Tensor,
    pub(super) rope: Rope,
    pub(super) local_rope: Option<Rope>,
}

/// One block. Projections that read the same input are one matrix.
pub(super) struct Layer {
    pub input_norm: Tensor,
    /// `[(heads + 2 * kv_heads) * head_dim, hidden]`: q, k and v.
    pub qkv: Linear,
    pub q_norm: Option<Tensor>,
    pub k_norm: Option<Tensor>,
    pub o: Linear,
    /// Of what attention adds.
    pub attended_norm: Option<Tensor>,
    pub mlp_norm: Tensor,
    /// `[2 * intermediate, hidden]`: gate and up.
    pub gate_up: Linear,
    pub down: Linear,
    /// Of what the MLP adds.
    pub mlp_out_norm: Option<Tensor>,
}

/// The angles of a pass, of layers that see everything and of local ones.
pub(super) struct PassAngles {
    all: Angles,
    local: Option<Angles>,
}

pub(super) struct Linear {
    pub weight: Tensor,
    pub bias: Option<Tensor>,
}

impl PassAngles {
    pub fn of(&self, local: bool) -> &Angles {
        self.local.as_ref().filter(|_| local).unwrap_or(&self.all)
    }
}

impl Linear {
    fn forward(&self, x: &Tensor) -> Result<Tensor, TorchError> {
        Ok(x.f_linear(&self.weight, self.bias.as_ref())?)
    }
}

impl Transformer {
    /// Reads `weights` straight to `kind` on `device`, one layer at a time.
    pub fn load(config: Config, weights: &Weights, kind: Kind, device: Device) -> Result<Self, ModelError> {
        let loader = Loader { weights, kind, device };
        let embed = loader.tensor(EMBED, &[config.vocab_size, config.hidden_size])?;
        let layers = (0..config.layers).map(|i| loader.layer(&config, i)).collect::<Result<Vec<_>, _>>()?;
        let norm = loader.norm(&config, NORM, config.hidden_size)?;
        let head = if config.tie_word_embeddings {
            embed.shallow_clone()
        } else {
            loader.tensor(HEAD, &[config.vocab_size, config.hidden_size])?
        };
        let rope = |rope| Rope::new(rope, config.max_position_embeddings, kind, device);
        let (rope, local_rope) = (rope(&config.rope)?, config.local_rope.as_ref().map(rope).transpose()?);
        Ok(Self { config, embed, layers, norm, head, rope, local_rope })
    }

    /// Another handle to the same weights.
    pub fn share(&self) -> Self {
        self.map(Tensor::shallow_clone)
    }

    pub fn kind(&self) -> Kind {
        self.embed.kind()
    }

    pub fn device(&self) -> Device {
        self.embed.device()
    }

    pub fn heads(&self) -> Heads {
        Heads::of(&self.config, self.kind(), self.device())
    }

    /// Hidden states after the last norm, `[tokens, hidden]`, for `ids` and `positions`, both
    /// `[tokens]` i64.
    pub fn hidden(
        &self,
        ids: &Tensor,
        positions: &Tensor,
        attention: &mut dyn Attend,
        adapters: &Adapters<'_>,
    ) -> Result<Tensor, TorchError> {
        let mut x = self.embed(ids)?;
        let angles = self.angles(positions)?;
        for (i, layer) in self.layers.iter().enumerate() {
            x = self.block(i, layer, x, &angles, attention, adapters)?;
        }
        self.rms_norm(&x, &self.norm)
    }

    /// The stream that blocks add to, float32 whatever the model's dtype: see the module.
    pub(super) fn embed(&self, ids: &Tensor) -> Result<Tensor, TorchError> {
        let mut x = Tensor::f_embedding(&self.embed, ids, -1, false, false)?;
        if let Some(scale) = self.config.embedding_scale {
            // transformers rounds the scale to the model's dtype too
            x = x.f_mul(&Tensor::from(scale as f32).f_to_kind(self.kind())?)?;
        }
        Ok(x.f_to_kind(Kind::Float)?)
    }

    pub(super) fn angles(&self, positions: &Tensor) -> Result<PassAngles, TorchError> {
        let local = self.local_rope.as_ref().map(|rope| rope.at(positions)).transpose()?;
        Ok(PassAngles { all: self.rope.at(positions)?, local })
    }

    pub(super) fn layer_kind(&self, index: usize) -> LayerKind {
        self.config.layer_kinds.get(index).copied().unwrap_or(LayerKind { local: false, rope: true })
    }

    /// Next-token logits of hidden states, `[rows, vocabulary]` in float32.
    pub fn logits(&self, hidden: &Tensor) -> Result<Tensor, TorchError> {
        self.cap(hidden.f_linear(&self.head, None::<&Tensor>)?.f_to_kind(Kind::Float)?)
    }

    pub(super) fn cap(&self, logits: Tensor) -> Result<Tensor, TorchError> {
        Ok(match self.config.final_softcap {
            Some(cap) => logits.f_div_scalar(cap)?.f_tanh()?.f_mul_scalar(cap)?,
            None => logits,
        })
    }

    /// Rows that go through the head at once where only log-probabilities are wanted. Scoring and
    /// training cut at the same rows, because a matrix product in bf16 rounds by its shape.
    pub const HEAD_ROWS: i64 = 256;

    /// Log-probabilities of `targets` (`[rows]`, i64) after hidden states `[rows, hidden]`: `[rows]`
    /// float32, whatever the model's dtype.
    ///
    /// In bf16 a logit of 20 is known to 0.06 at best, which is more than what a judge's two labels
    /// often differ by. The targets' own logits are therefore computed again in float32; the errors of
    /// all others average out in the sum over the vocabulary.
    pub fn log_probs(&self, hidden: &Tensor, targets: &Tensor) -> Result<Tensor, TorchError> {
        self.log_probs_among(&self.logits(hidden)?, hidden, targets)
    }

    /// [`Self::log_probs`], with the logits however they were computed.
    pub(super) fn log_probs_among(
        &self,
        logits: &Tensor,
        hidden: &Tensor,
        targets: &Tensor,
    ) -> Result<Tensor, TorchError> {
        let picked = if self.kind() == Kind::Float {
            logits.f_gather(1, &targets.f_unsqueeze(1)?, false)?.f_squeeze_dim(1)?
        } else {
            let rows = self.head.f_index_select(0, targets)?.f_to_kind(Kind::Float)?;
            self.cap(hidden.f_to_kind(Kind::Float)?.f_mul(&rows)?.f_sum_dim_intlist(1_i64, false, Kind::Float)?)?
        };
        Ok(picked.f_sub(&logits.f_logsumexp([1], false)?)?)
    }

    fn block(
        &self,
        index: usize,
        layer: &Layer,
        x: Tensor,
        angles: &PassAngles,
        attention: &mut dyn Attend,
        adapters: &Adapters<'_>,
    ) -> Result<Tensor, TorchError> {
        let c = &self.config;
        let (heads, kv_heads, d) = (c.heads as i64, c.kv_heads as i64, c.head_dim as i64);

        let kind = self.layer_kind(index);

        let h = self.rms_norm(&x, &layer.input_norm)?;
        let qkv = adapters.apply(index, Site::Qkv, &h, layer.qkv.forward(&h)?)?;
        let qkv = qkv.f_view([-1, heads + 2 * kv_heads, d])?;
        let v = qkv.f_narrow(1, heads + kv_heads, kv_heads)?;
        let qk = match (&layer.q_norm, &layer.k_norm) {
            (Some(q_norm), Some(k_norm)) => Tensor::f_cat(
                &[
                    self.rms_norm(&qkv.f_narrow(1, 0, heads)?, q_norm)?,
                    self.rms_norm(&qkv.f_narrow(1, heads, kv_heads)?, k_norm)?,
                ],
                1,
            )?,
            _ => qkv.f_narrow(1, 0, heads + kv_heads)?,
        };
        // q and k turn by the same angles, so they are rotated together.
        let qk = if kind.rope { angles.of(kind.local).rotate(&qk)? } else { qk };
        let (q, k) = (qk.f_narrow(1, 0, heads)?, qk.f_narrow(1, heads, kv_heads)?);
        let attended = attention.attend(index, kind.local, &q, &k, &v)?;
        let attended = adapters.apply(index, Site::O, &attended, layer.o.forward(&attended)?)?;
        let x = x.f_add(&self.optional_norm(attended, layer.attended_norm.as_ref())?)?;

        let h = self.rms_norm(&x, &layer.mlp_norm)?;
        let gate_up = adapters.apply(index, Site::GateUp, &h, layer.gate_up.forward(&h)?)?;
        let width = c.intermediate_size as i64;
        let gate = gate_up.f_narrow(1, 0, width)?;
        let gate = match c.activation {
            Activation::Silu => gate.f_silu()?,
            Activation::GeluTanh => gate.f_gelu("tanh")?,
        };
        let gated = gate.f_mul(&gate_up.f_narrow(1, width, width)?)?;
        let out = adapters.apply(index, Site::Down, &gated, layer.down.forward(&gated)?)?;
        Ok(x.f_add(&self.optional_norm(out, layer.mlp_out_norm.as_ref())?)?)
    }

    /// Root mean square norm (Zhang and Sennrich 2019) over the last dimension, computed in float32 and
    /// rounded once.
    fn rms_norm(&self, x: &Tensor, weight: &Tensor) -> Result<Tensor, TorchError> {
        let wide = x.f_to_kind(Kind::Float)?;
        let normed = wide.f_rms_norm(weight.size(), Some(weight), self.config.rms_norm_eps)?;
        Ok(normed.f_to_kind(self.kind())?)
    }

    pub(super) fn optional_norm(&self, x: Tensor, weight: Option<&Tensor>) -> Result<Tensor, TorchError> {
        weight.map_or(Ok(x.shallow_clone()), |weight| self.rms_norm(&x, weight))
    }
}

/// Names, shapes and fusing of the tensors of a model.
struct Loader<'a> {
    weights: &'a Weights,
    kind: Kind,
    device: Device,
}

impl Loader<'_> {
    fn tensor(&self, name: &str, shape: &[usize]) -> Result<Tensor, ModelError> {
        self.weights.tensor(name, shape, self.kind, self.device)
    }

    fn norm(&self, c: &Config, name: &str, width: usize) -> Result<Tensor, ModelError> {
        let stored = self.weights.tensor(name, &[width], Kind::Float, self.device)?;
        Ok(if c.norm_offset { stored.f_add_scalar(1.0).map_err(TorchError::from)? } else { stored })
    }

    fn layer(&self, c: &Config, i: usize) -> Result<Layer, ModelError> {
        let names = BlockNames::of(c, i);
        let norm = |name: Option<String>, width| name.map(|name| self.norm(c, &name, width)).transpose();
        Ok(Layer {
            input_norm: self.norm(c, &names.input_norm, c.hidden_size)?,
            qkv: self.linear(&names.qkv, c.hidden_size, c.qkv_bias)?,
            q_norm: norm(names.q_norm, c.head_dim)?,
            k_norm: norm(names.k_norm, c.head_dim)?,
            o: self.linear(&names.o, c.heads * c.head_dim, c.o_bias)?,
            attended_norm: norm(names.attended_norm, c.hidden_size)?,
            mlp_norm: self.norm(c, &names.mlp_norm, c.hidden_size)?,
            gate_up: self.linear(&names.gate_up, c.hidden_size, c.mlp_bias)?,
            down: self.linear(&names.down, c.intermediate_size, c.mlp_bias)?,
            mlp_out_norm: norm(names.mlp_out_norm, c.hidden_size)?,
        })
    }

    /// One linear out of several that read the same input.
    fn linear(&self, parts: &[(String, usize)], input: usize, bias: bool) -> Result<Linear, ModelError> {
        let weight = self.joined(parts, "weight", &[input])?;
        let bias = bias.then(|| self.joined(parts, "bias", &[])).transpose()?;
        Ok(Linear { weight, bias })
    }

    /// Tensors one above the other, each read to its place; `rest` is their inner shape.
    fn joined(&self, parts: &[(String, usize)], what: &str, rest: &[usize]) -> Result<Tensor, ModelError> {
        let rows = parts.iter().map(|(_, out)| *out).sum();
        let size: Vec<i64> = [&[rows], rest].concat().iter().map(|n| *n as i64).collect();
        let all = Tensor::f_empty(size, (self.kind, self.weights.read_on(self.device))).map_err(TorchError::from)?;
        let mut start = 0;
        for (name, out) in parts {
            let part = all.f_narrow(0, start, *out as i64).map_err(TorchError::from)?;
            self.weights.read(&format!("{name}.{what}"), &[&[*out], rest].concat(), &part)?;
            start += *out as i64;
        }
        Ok(all.f_to_device(self.device).map_err(TorchError::from)?)
    }
}
