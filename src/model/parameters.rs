//! All weights of a transformer, in one order: to train them, and to write them under Hugging Face's names.

use tch::Tensor;

use super::config::Config;
use super::transformer::{Layer, Linear, Transformer};
use crate::torch::TorchError;

/// Stored tensors that lie in one of ours, one above the other: Hugging Face's name and its rows.
pub(super) type Parts = Vec<(String, usize)>;

/// Names of the stored tensors of a block; linears without `.weight` or `.bias`.
pub(super) struct BlockNames {
    pub input_norm: String,
    pub qkv: Parts,
    pub q_norm: Option<String>,
    pub k_norm: Option<String>,
    pub o: Parts,
    pub attended_norm: Option<String>,
    pub mlp_norm: String,
    pub gate_up: Parts,
    pub down: Parts,
    pub mlp_out_norm: Option<String>,
}

pub(super) const EMBED: &str = "model.embed_tokens.weight";
pub(super) const NORM: &str = "model.norm.weight";
pub(super) const HEAD: &str = "lm_head.weight";

impl BlockNames {
    pub fn of(c: &Config, index: usize) -> Self {
        let (q, kv) = (c.heads * c.head_dim, c.kv_heads * c.head_dim);
        let name = |part: &str| format!("model.layers.{index}.{part}");
        let norm = |part: &str| name(&format!("{part}.weight"));
        let (qkv, gate_up) = if c.fused {
            (vec![(name("self_attn.qkv_proj"), q + 2 * kv)], vec![(name("mlp.gate_up_proj"), 2 * c.intermediate_size)])
        } else {
            (
                vec![(name("self_attn.q_proj"), q), (name("self_attn.k_proj"), kv), (name("self_attn.v_proj"), kv)],
                vec![(name("mlp.gate_proj"), c.intermediate_size), (name("mlp.up_proj"), c.intermediate_size)],
            )
        };
        Self {
            input_norm: norm("input_layernorm"),
            qkv,
            q_norm: c.qk_norm.then(|| norm("self_attn.q_norm")),
            k_norm: c.qk_norm.then(|| norm("self_attn.k_norm")),
            o: vec![(name("self_attn.o_proj"), c.hidden_size)],
            // With norms on both sides of a half, Hugging Face's names move by one.
            attended_norm: c.post_norms.then(|| norm("post_attention_layernorm")),
            mlp_norm: norm(if c.post_norms { "pre_feedforward_layernorm" } else { "post_attention_layernorm" }),
            gate_up,
            down: vec![(name("mlp.down_proj"), c.hidden_size)],
            mlp_out_norm: c.post_norms.then(|| norm("post_feedforward_layernorm")),
        }
    }
}

/// Every tensor of a model that has to be stored, under Hugging Face's names, with its shape.
pub(super) fn shapes(c: &Config) -> Vec<(String, Vec<usize>)> {
    let mut all = vec![(EMBED.to_owned(), vec![c.vocab_size, c.hidden_size]), (NORM.to_owned(), vec![c.hidden_size])];
    if !c.tie_word_embeddings {
        all.push((HEAD.to_owned(), vec![c.vocab_size, c.hidden_size]));
    }
    for layer in 0..c.layers {
        let names = BlockNames::of(c, layer);
        let linears = [
            (names.qkv, c.hidden_size, c.qkv_bias),
            (names.o, c.heads * c.head_dim, c.o_bias),
            (names.gate_up, c.hidden_size, c.mlp_bias),
            (names.down, c.intermediate_size, c.mlp_bias),
        ];
        for (parts, input, bias) in linears {
            all.extend(parts.iter().map(|(name, rows)| (format!("{name}.weight"), vec![*rows, input])));
            let biases = parts.iter().filter(|_| bias);
            all.extend(biases.map(|(name, rows)| (format!("{name}.bias"), vec![*rows])));
        }
        let norms = [
            (Some(names.input_norm), c.hidden_size),
            (names.q_norm, c.head_dim),
            (names.k_norm, c.head_dim),
            (names.attended_norm, c.hidden_size),
            (Some(names.mlp_norm), c.hidden_size),
            (names.mlp_out_norm, c.hidden_size),
        ];
        all.extend(norms.into_iter().filter_map(|(name, width)| Some((name?, vec![width]))));
    }
    all
}

impl Transformer {
    /// The same model with other tensors. `f` sees each of the model's once, always in the same order; where embedding
    /// and head are one tensor, it sees the embedding.
    pub fn map(&self, mut f: impl FnMut(&Tensor) -> Tensor) -> Self {
        let embed = f(&self.embed);
        let layers = self.layers.iter().map(|layer| layer.map(&mut f)).collect();
        let norm = f(&self.norm);
        let head = if self.config.tie_word_embeddings { embed.shallow_clone() } else { f(&self.head) };
        let (rope, local_rope) = (self.rope.share(), self.local_rope.as_ref().map(super::rope::Rope::share));
        Self { config: self.config.clone(), embed, layers, norm, head, rope, local_rope }
    }

    /// All weights, in the order of [`Transformer::map`].
    pub fn parameters(&self) -> Vec<Tensor> {
        let mut all = Vec::new();
        drop(self.map(|tensor| {
            all.push(tensor.shallow_clone());
            tensor.shallow_clone()
        }));
        all
    }

    /// The place of the output head among [`Transformer::parameters`].
    pub fn head_place(&self) -> usize {
        if self.config.tie_word_embeddings { 0 } else { self.parameters().len() - 1 }
    }

    /// All weights under Hugging Face's names, as they are stored: views, but for norms that are stored with an offset.
    pub fn stored(&self) -> Result<Vec<(String, Tensor)>, TorchError> {
        let c = &self.config;
        let mut all = vec![(EMBED.to_owned(), self.embed.shallow_clone())];
        let norm = |name: String, tensor: &Tensor| -> Result<(String, Tensor), TorchError> {
            Ok((name, if c.norm_offset { tensor.f_sub_scalar(1.0)? } else { tensor.shallow_clone() }))
        };
        for (i, layer) in self.layers.iter().enumerate() {
            let names = BlockNames::of(c, i);
            let linears = [
                (names.qkv, &layer.qkv),
                (names.o, &layer.o),
                (names.gate_up, &layer.gate_up),
                (names.down, &layer.down),
            ];
            for (parts, linear) in linears {
                all.extend(linear.stored(&parts)?);
            }
            let norms = [
                (Some(names.input_norm), Some(&layer.input_norm)),
                (names.q_norm, layer.q_norm.as_ref()),
                (names.k_norm, layer.k_norm.as_ref()),
                (names.attended_norm, layer.attended_norm.as_ref()),
                (Some(names.mlp_norm), Some(&layer.mlp_norm)),
                (names.mlp_out_norm, layer.mlp_out_norm.as_ref()),
            ];
            for (name, tensor) in norms.into_iter().filter_map(|(name, tensor)| name.zip(tensor)) {
                all.push(norm(name, tensor)?);
            }
        }
        all.push(norm(NORM.to_owned(), &self.norm)?);
        // A tied head may be stored as well.
        all.push((HEAD.to_owned(), self.head.shallow_clone()));
        Ok(all)
    }
}

impl Layer {
    fn map(&self, f: &mut impl FnMut(&Tensor) -> Tensor) -> Self {
        Self {
            input_norm: f(&self.input_norm),
            qkv: self.qkv.map(f),
            q_norm: self.q_norm.as_ref().map(&mut *f),
            k_norm: self.k_norm.as_ref().map(&mut *f),
            o: self.o.map(f),
            attended_norm: self.attended_norm.as_ref().map(&mut *f),
            mlp_norm: f(&self.mlp_norm),
            gate_up: self.gate_up.map(f),
            down: self.down.map(f),
            mlp_out_norm: self.mlp_out_norm.as_ref().map(&mut *f),
        }
    }
}

impl Linear {
    fn map(&self, f: &mut impl FnMut(&Tensor) -> Tensor) -> Self {
        Self { weight: f(&self.weight), bias: self.bias.as_ref().map(f) }
    }

    fn stored(&self, parts: &Parts) -> Result<Vec<(String, Tensor)>, TorchError> {
        let (mut all, mut start) = (Vec::new(), 0);
        for (name, rows) in parts {
            let rows = *rows as i64;
            all.push((format!("{name}.weight"), self.weight.f_narrow(0, start, rows)?));
            if let Some(bias) = &self.bias {
                all.push((format!("{name}.bias"), bias.f_narrow(0, start, rows)?));
            }
            start += rows;
        }
        Ok(all)
    }
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind};

    use super::super::safetensors::Safetensors;
    use super::super::tests::{families, load};
    use super::super::weights::Weights;
    use crate::torch::GradGuard;

    #[test]
    fn every_stored_tensor_is_there_under_its_name() {
        let _no_grad = GradGuard::set(false);
        for dir in families() {
            let model = load(&dir, Kind::Float);
            let weights = Weights::Safetensors(Safetensors::open(&dir).unwrap());
            let stored = model.stored().unwrap();
            for name in weights.names() {
                let (_, found) = stored.iter().find(|(n, _)| *n == name).unwrap_or_else(|| panic!("{dir:?} {name}"));
                let shape = weights.shape(&name).unwrap();
                let there = weights.tensor(&name, &shape, Kind::Float, Device::Cpu).unwrap();
                let off = (found - there).abs().max().double_value(&[]);
                assert!(off < 1e-6, "{dir:?} {name}: {off}");
            }
            assert_eq!(model.parameters()[model.head_place()].data_ptr(), model.head.data_ptr());
        }
    }
}
