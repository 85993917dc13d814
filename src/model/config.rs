//! Configuration of a decoder-only transformer.
//!
//! A model family is one mapping here, from config.json or from GGUF metadata; the transformer
//! itself is driven by the result and knows no family.

use std::path::Path;

use serde_json::Value as Json;

use super::ModelError;
use super::family::{Family, LayerKind};
use super::gguf::{Gguf, Value};
use super::keys::{Keys, python_json};
use super::rope::{RopeConfig, RopeScaling};
use super::tokenizer::GGUF_EOS;

/// Shapes and constants of a model, from config.json or GGUF metadata.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    pub architecture: String,
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub layers: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub rms_norm_eps: f64,
    pub activation: Activation,
    pub rope: RopeConfig,
    /// Of the local layers, where they have their own (Gemma 3).
    pub local_rope: Option<RopeConfig>,
    /// Tokens that a local layer sees, itself included.
    pub window: Option<usize>,
    /// One a layer.
    pub layer_kinds: Vec<LayerKind>,
    /// Tokens of context.
    pub max_position_embeddings: usize,
    pub tie_word_embeddings: bool,
    pub qkv_bias: bool,
    pub o_bias: bool,
    pub mlp_bias: bool,
    /// Queries and keys pass a norm of their own before they are rotated (Qwen3, Gemma 3).
    pub qk_norm: bool,
    /// Attention and MLP pass a norm before they are added to the stream too (Gemma).
    pub post_norms: bool,
    /// Norms are stored less one, and computed in float32 (Gemma).
    pub norm_offset: bool,
    /// What embeddings are multiplied by (Gemma).
    pub embedding_scale: Option<f64>,
    /// What the products of queries and keys are multiplied by.
    pub attention_scale: f64,
    /// `cap * tanh(x / cap)` of attention scores, and of the logits (Gemma 2).
    pub attention_softcap: Option<f64>,
    pub final_softcap: Option<f64>,
    /// Weights are stored as `qkv_proj` and `gate_up_proj` (Phi-3); adapters name them so.
    pub fused: bool,
    pub bos_id: Option<u32>,
    /// Tokens that end a text, as the configuration has them.
    pub eos_ids: Vec<u32>,
}

/// The non-linearity of the MLP.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    Silu,
    /// GELU in its tanh form.
    GeluTanh,
}

impl Config {
    /// Reads a config.json.
    ///
    /// # Errors
    /// Names the file, the key and, for an unknown architecture, the supported ones.
    pub fn from_json(path: &Path) -> Result<Self, ModelError> {
        let text = std::fs::read_to_string(path).map_err(ModelError::io(path))?;
        let json = python_json(&text)
            .map_err(|e| ModelError::file(path, format!("is no JSON ({e}); download the model again")))?;
        Self::from_json_value(&json).map_err(|message| ModelError::file(path, message))
    }

    fn from_json_value(json: &Json) -> Result<Self, String> {
        let keys = Keys(json);
        let architecture = architecture(&keys)?;
        let unknown = || format!("has architecture {architecture}; supported are {}", Family::supported());
        let family = Family::of(&architecture).ok_or_else(unknown)?;
        check_quantization(&keys)?;
        let hidden_size = keys.size("hidden_size")?;
        let heads = keys.size("num_attention_heads")?;
        let layers = keys.size("num_hidden_layers")?;
        let head_dim = keys.optional_size("head_dim")?.or(family.head_dim()).unwrap_or(hidden_size / heads);
        let attention_bias = keys.flag("attention_bias")?.unwrap_or(false);
        let window = family.window(&keys)?;
        let rope = Rotary { keys, family, head_dim };
        let gemma = family.is_gemma();
        let softcap = |key: &str| if family == Family::Gemma2 { keys.positive(key) } else { Ok(None) };
        Self {
            vocab_size: keys.size("vocab_size")?,
            hidden_size,
            intermediate_size: keys.size("intermediate_size")?,
            layers,
            heads,
            kv_heads: keys.optional_size("num_key_value_heads")?.unwrap_or(heads),
            head_dim,
            rms_norm_eps: keys.number("rms_norm_eps")?.unwrap_or(family.rms_norm_eps()),
            activation: activation(&keys, family)?,
            rope: rope.read()?,
            local_rope: rope.read_local()?,
            window,
            layer_kinds: family.layers(&keys, checked_layers(layers)?, window.is_some())?,
            max_position_embeddings: rope.context()?,
            tie_word_embeddings: keys.flag("tie_word_embeddings")?.unwrap_or(family.ties_embeddings()),
            qkv_bias: attention_bias || family == Family::Qwen2,
            o_bias: attention_bias && family != Family::Qwen2,
            mlp_bias: keys.flag("mlp_bias")?.unwrap_or(false),
            qk_norm: family.has_qk_norm(),
            post_norms: gemma,
            norm_offset: gemma,
            embedding_scale: gemma.then(|| (hidden_size as f64).sqrt()),
            attention_scale: attention_scale(&keys, family, head_dim)?,
            attention_softcap: softcap("attn_logit_softcapping")?,
            final_softcap: softcap("final_logit_softcapping")?,
            fused: family == Family::Phi3,
            bos_id: keys.ids("bos_token_id")?.first().copied(),
            eos_ids: keys.ids("eos_token_id")?,
            architecture,
        }
        .checked()
    }

    /// Reads the metadata of a GGUF file.
    ///
    /// # Errors
    /// Names the file, the key and, for an unknown architecture, the supported ones.
    pub fn from_gguf(gguf: &Gguf) -> Result<Self, ModelError> {
        Self::read_gguf(gguf).map_err(|message| ModelError::file(gguf.path(), message))
    }

    fn read_gguf(gguf: &Gguf) -> Result<Self, String> {
        let metadata = gguf.metadata();
        let name = metadata.text("general.architecture").ok_or("has no general.architecture; download it again")?;
        let architecture = match name {
            // llama.cpp stores Mistral as llama too.
            "llama" => "LlamaForCausalLM",
            "qwen2" => "Qwen2ForCausalLM",
            "qwen3" => "Qwen3ForCausalLM",
            _ => return Err(format!("has architecture {name}; supported are llama, qwen2, qwen3")),
        };
        let optional = |key: &str| metadata.unsigned(&format!("{name}.{key}")).map(|n| n as usize);
        let size = |key: &str| optional(key).ok_or_else(|| format!("has no number {name}.{key}; download it again"));
        let hidden_size = size("embedding_length")?;
        let heads = size("attention.head_count")?.max(1);
        let head_dim = optional("attention.key_length").unwrap_or(hidden_size / heads);
        if let Some(rotated) = optional("rope.dimension_count")
            && rotated != head_dim
        {
            return Err(format!("rotates {rotated} of {head_dim} dimensions of a head; supported is all of them"));
        }
        let window = optional("attention.sliding_window");
        let layers = size("block_count")?;
        let has = |tensor: &str| gguf.tensor(tensor).is_some();
        let embedding = gguf.tensor("token_embd.weight").ok_or("has no tensor token_embd.weight; download it again")?;
        let id = |key: &str| metadata.unsigned(&format!("tokenizer.ggml.{key}")).and_then(|n| u32::try_from(n).ok());
        let mut eos_ids: Vec<u32> = GGUF_EOS.iter().filter_map(|key| id(key)).collect();
        eos_ids.dedup();
        Self {
            architecture: architecture.to_owned(),
            vocab_size: embedding.rows(),
            hidden_size,
            intermediate_size: size("feed_forward_length")?,
            layers,
            heads,
            kv_heads: optional("attention.head_count_kv").unwrap_or(heads),
            head_dim,
            rms_norm_eps: metadata
                .float(&format!("{name}.attention.layer_norm_rms_epsilon"))
                .map(f32_digits)
                .ok_or_else(|| format!("has no {name}.attention.layer_norm_rms_epsilon; download it again"))?,
            activation: Activation::Silu,
            rope: RopeConfig {
                theta: metadata.float(&format!("{name}.rope.freq_base")).unwrap_or(10_000.0),
                dims: head_dim,
                scaling: gguf_rope_scaling(gguf, name)?,
            },
            local_rope: None,
            window,
            layer_kinds: vec![LayerKind { local: window.is_some(), rope: true }; checked_layers(layers)?],
            max_position_embeddings: size("context_length")?,
            tie_word_embeddings: !has("output.weight"),
            qkv_bias: has("blk.0.attn_q.bias"),
            o_bias: has("blk.0.attn_output.bias"),
            mlp_bias: has("blk.0.ffn_down.bias"),
            qk_norm: has("blk.0.attn_q_norm.weight"),
            post_norms: false,
            norm_offset: false,
            embedding_scale: None,
            attention_scale: (head_dim as f64).powf(-0.5),
            attention_softcap: None,
            final_softcap: None,
            fused: false,
            bos_id: id("bos_token_id"),
            eos_ids,
        }
        .checked()
    }

    fn checked(self) -> Result<Self, String> {
        let sizes = [
            ("vocab_size", self.vocab_size),
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size),
            ("num_hidden_layers", self.layers),
            ("num_attention_heads", self.heads),
            ("num_key_value_heads", self.kv_heads),
            ("head_dim", self.head_dim),
            ("max_position_embeddings", self.max_position_embeddings),
        ];
        if let Some((key, n)) = sizes.iter().find(|(_, n)| *n == 0 || *n > MAX_SIZE) {
            return Err(format!("has {key} = {n}; no such model is supported"));
        }
        if !self.heads.is_multiple_of(self.kv_heads) {
            return Err(format!(
                "has {} attention heads in {} key-value groups; the first must be a multiple of the second",
                self.heads, self.kv_heads
            ));
        }
        let ropes = [Some(&self.rope), self.local_rope.as_ref()];
        for rope in ropes.into_iter().flatten() {
            checked_rope(rope, self.head_dim)?;
        }
        if !(self.rms_norm_eps.is_finite() && self.rms_norm_eps >= 0.0) {
            return Err(format!("has rms_norm_eps = {}; it must be a small positive number", self.rms_norm_eps));
        }
        Ok(self)
    }

    /// Bytes that keys and values of `tokens` take, at `bytes` a number.
    pub fn kv_bytes(&self, tokens: usize, bytes: usize) -> usize {
        // A configuration may claim anything.
        let factors = [self.layers, self.kv_heads, self.head_dim, tokens, bytes];
        factors.into_iter().fold(2, usize::saturating_mul)
    }

    /// Weights in the model, the embedding counted once where it is tied.
    pub fn parameters(&self) -> u64 {
        // Sizes of up to 2^24 multiply past 64 bits.
        let [v, h, i, l] = [self.vocab_size, self.hidden_size, self.intermediate_size, self.layers].map(|n| n as u128);
        let [heads, kv_heads, d] = [self.heads, self.kv_heads, self.head_dim].map(|n| n as u128);
        let (q, kv) = (heads * d, kv_heads * d);
        let when = |flag: bool, n: u128| if flag { n } else { 0 };
        let biases = when(self.qkv_bias, q + 2 * kv) + when(self.o_bias, h) + when(self.mlp_bias, 2 * i + h);
        let norms = when(self.post_norms, 2 * h) + 2 * h + when(self.qk_norm, 2 * d);
        let block = 2 * h * q + 2 * h * kv + 3 * h * i + norms + biases;
        let all = v * h + when(!self.tie_word_embeddings, v * h) + l * block + h;
        u64::try_from(all).unwrap_or(u64::MAX)
    }
}

/// The largest size that is taken at its word; the product of two still fits 63 bits.
const MAX_SIZE: usize = 1 << 24;

/// A layer is some bytes of memory here before any weight is seen.
fn checked_layers(layers: usize) -> Result<usize, String> {
    if layers > 4096 { Err(format!("has {layers} layers; no such model is supported")) } else { Ok(layers) }
}

fn checked_rope(rope: &RopeConfig, head_dim: usize) -> Result<(), String> {
    if rope.dims == 0 || rope.dims > head_dim || !rope.dims.is_multiple_of(2) {
        return Err(format!(
            "rotates {} of head_dim = {head_dim} dimensions of a head; rotary embedding needs an even number of them",
            rope.dims
        ));
    }
    if !(rope.theta.is_finite() && rope.theta > 0.0) {
        return Err(format!("has rope_theta = {}; it must be a positive number", rope.theta));
    }
    if let RopeScaling::Divisors { divisors, .. } = &rope.scaling
        && (divisors.len() != rope.dims / 2 || divisors.iter().any(|d| !d.is_normal()))
    {
        let (found, wanted) = (divisors.len(), rope.dims / 2);
        return Err(format!("has {found} rotary divisors where {wanted} are needed, or some that are 0"));
    }
    Ok(())
}

fn architecture(keys: &Keys<'_>) -> Result<String, String> {
    let name = keys.0.get("architectures").and_then(|list| list.get(0)).and_then(Json::as_str);
    name.map(str::to_owned).ok_or_else(|| format!("names no architecture; supported are {}", Family::supported()))
}

/// Refuses weights that are stored in a quantizer's own format.
fn check_quantization(keys: &Keys<'_>) -> Result<(), String> {
    let Some(settings) = keys.get("quantization_config").map(Keys) else { return Ok(()) };
    let is_on = |key: &str| settings.get(key).is_some_and(|flag| flag == true);
    let method = match settings.get("quant_method").and_then(Json::as_str) {
        Some(method) => method,
        None if is_on("load_in_4bit") || is_on("load_in_8bit") => "bitsandbytes",
        None => "unknown",
    };
    Err(format!(
        "has a quantization_config of the method {method}, and weights that are quantized so are not read; take the \
         model that it was made from, or a GGUF file of it"
    ))
}

fn activation(keys: &Keys<'_>, family: Family) -> Result<Activation, String> {
    let (key, default) =
        if family.is_gemma() { ("hidden_activation", Activation::GeluTanh) } else { ("hidden_act", Activation::Silu) };
    match keys.get(key).and_then(Json::as_str) {
        None => Ok(default),
        Some("silu" | "swish") => Ok(Activation::Silu),
        Some("gelu_pytorch_tanh" | "gelu_new") => Ok(Activation::GeluTanh),
        Some(other) => Err(format!("has {key} = {other}; supported are silu and gelu_pytorch_tanh")),
    }
}

fn attention_scale(keys: &Keys<'_>, family: Family, head_dim: usize) -> Result<f64, String> {
    let scalar = if family.is_gemma() { keys.positive("query_pre_attn_scalar")?.or(Some(256.0)) } else { None };
    Ok(scalar.unwrap_or(head_dim as f64).powf(-0.5))
}

/// The rotary embedding of a config.json.
struct Rotary<'a> {
    keys: Keys<'a>,
    family: Family,
    head_dim: usize,
}

impl<'a> Rotary<'a> {
    /// transformers 5 keeps all of rotary embedding in one object, or one a kind of layer.
    fn parameters(&self, kind: &str) -> Option<Keys<'a>> {
        let all = self.keys.get("rope_parameters")?;
        Some(Keys(Keys(all).get(kind).unwrap_or(all)))
    }

    fn read(&self) -> Result<RopeConfig, String> {
        let parameters = self.parameters("full_attention");
        let theta = parameters.unwrap_or(self.keys).number("rope_theta")?;
        let scaling = self.keys.get("rope_scaling").map(Keys).or(parameters);
        Ok(RopeConfig {
            theta: theta.unwrap_or(self.family.rope_theta()),
            dims: self.dims()?,
            scaling: scaling.map_or(Ok(RopeScaling::None), |keys| self.scaling(&keys))?,
        })
    }

    fn read_local(&self) -> Result<Option<RopeConfig>, String> {
        if self.family != Family::Gemma3 {
            return Ok(None);
        }
        let theta = match self.parameters("sliding_attention") {
            Some(parameters) => parameters.number("rope_theta")?,
            None => self.keys.number("rope_local_base_freq")?,
        };
        Ok(Some(RopeConfig { theta: theta.unwrap_or(10_000.0), dims: self.dims()?, scaling: RopeScaling::None }))
    }

    fn dims(&self) -> Result<usize, String> {
        let share = match self.parameters("full_attention").map(|keys| keys.positive("partial_rotary_factor")) {
            Some(share) => share?,
            None => self.keys.positive("partial_rotary_factor")?,
        };
        Ok((self.head_dim as f64 * share.unwrap_or(1.0)) as usize)
    }

    /// Tokens of context. LongRoPE has other frequencies for longer texts, and a text that grows past
    /// its short context would have to be computed again: it ends there.
    fn context(&self) -> Result<usize, String> {
        let context = self.keys.size("max_position_embeddings")?;
        let long = matches!(self.read()?.scaling, RopeScaling::Divisors { .. });
        Ok(if long { self.original_context()?.map_or(context, |n| n.min(context)) } else { context })
    }

    fn original_context(&self) -> Result<Option<usize>, String> {
        let key = "original_max_position_embeddings";
        match self.keys.optional_size(key)? {
            Some(n) => Ok(Some(n)),
            None => self.parameters("full_attention").map_or(Ok(None), |keys| keys.optional_size(key)),
        }
    }

    fn scaling(&self, keys: &Keys<'_>) -> Result<RopeScaling, String> {
        let needed =
            |key: &str| keys.positive(key)?.ok_or_else(|| format!("has a rope_scaling without a positive {key}"));
        match keys.get("rope_type").or_else(|| keys.get("type")).and_then(Json::as_str) {
            // Dynamic scaling begins past the context, and texts end there.
            Some("default" | "dynamic") => Ok(RopeScaling::None),
            Some("linear") => Ok(RopeScaling::Linear { factor: needed("factor")? }),
            Some("llama3") => {
                let (low, high) = (needed("low_freq_factor")?, needed("high_freq_factor")?);
                if high <= low {
                    return Err(format!("has high_freq_factor = {high}, which must exceed low_freq_factor = {low}"));
                }
                Ok(RopeScaling::Llama3 {
                    factor: needed("factor")?,
                    low_freq_factor: low,
                    high_freq_factor: high,
                    original_max_position_embeddings: needed("original_max_position_embeddings")?,
                })
            }
            Some("yarn") => self.yarn(keys, needed("factor")?),
            Some("longrope" | "su") => self.long(keys),
            _ => Err(format!(
                "has rope_scaling = {}; supported types are linear, dynamic, llama3, yarn and longrope",
                keys.0
            )),
        }
    }

    fn yarn(&self, keys: &Keys<'_>, factor: f64) -> Result<RopeScaling, String> {
        let context = match keys.positive("original_max_position_embeddings")? {
            Some(context) => context,
            None => self.keys.size("max_position_embeddings")? as f64,
        };
        let (scale, scale_all) = (keys.positive("mscale")?, keys.positive("mscale_all_dim")?);
        let magnitude = |scale: f64| if factor <= 1.0 { 1.0 } else { 0.1 * scale * factor.ln() + 1.0 };
        let inferred = match (scale, scale_all) {
            (Some(scale), Some(all)) => magnitude(scale) / magnitude(all),
            _ => magnitude(1.0),
        };
        Ok(RopeScaling::Yarn {
            factor,
            attention_factor: keys.positive("attention_factor")?.unwrap_or(inferred),
            beta_fast: keys.positive("beta_fast")?.unwrap_or(32.0),
            beta_slow: keys.positive("beta_slow")?.unwrap_or(1.0),
            original_max_position_embeddings: context,
            truncate: keys.flag("truncate")?.unwrap_or(true),
        })
    }

    fn long(&self, keys: &Keys<'_>) -> Result<RopeScaling, String> {
        let divisors = keys.numbers("short_factor")?.ok_or("has a rope_scaling without short_factor")?;
        let context = self.keys.size("max_position_embeddings")? as f64;
        let (factor, original) = match self.original_context()? {
            Some(original) => (context / original as f64, original as f64),
            None => (keys.positive("factor")?.unwrap_or(1.0), context),
        };
        let inferred = if factor <= 1.0 { 1.0 } else { (1.0 + factor.ln() / original.ln()).sqrt() };
        let attention_factor = keys.positive("attention_factor")?.unwrap_or(inferred);
        Ok(RopeScaling::Divisors { divisors, attention_factor })
    }
}

/// GGUF keeps some constants in f32 that config.json writes in decimal: 1e-5 comes as 9.99999974e-6.
/// The shortest decimal of the f32 is what was written.
fn f32_digits(x: f64) -> f64 {
    (x as f32).to_string().parse().unwrap_or(x)
}

fn gguf_rope_scaling(gguf: &Gguf, name: &str) -> Result<RopeScaling, String> {
    let tensor = "rope_freqs.weight";
    if gguf.tensor(tensor).is_some() {
        let mut divisors = Vec::new();
        gguf.read_rows(tensor, 0, 1, &mut divisors).map_err(|e| e.to_string())?;
        let divisors = divisors.into_iter().map(f64::from).collect();
        return Ok(RopeScaling::Divisors { divisors, attention_factor: 1.0 });
    }
    let key = |key: &str| format!("{name}.rope.scaling.{key}");
    match gguf.metadata().get(&key("type")) {
        None => Ok(RopeScaling::None),
        Some(Value::Text(kind)) if kind == "none" => Ok(RopeScaling::None),
        Some(Value::Text(kind)) if kind == "linear" => {
            let factor = gguf.metadata().float(&key("factor")).filter(|f| *f > 0.0);
            let factor = factor.ok_or_else(|| format!("has no positive {}; download it again", key("factor")))?;
            Ok(RopeScaling::Linear { factor })
        }
        Some(other) => Err(format!("has rope scaling {other:?}; supported are none and linear")),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::model::gguf::fixture;

    fn llama(changes: Json) -> Json {
        let mut json = json!({
            "architectures": ["LlamaForCausalLM"], "vocab_size": 100, "hidden_size": 64, "intermediate_size": 96,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5,
            "max_position_embeddings": 8192, "hidden_act": "silu", "eos_token_id": [2, 5], "bos_token_id": 1
        });
        for (key, value) in changes.as_object().unwrap() {
            json[key] = value.clone();
        }
        json
    }

    fn read(changes: Json) -> Result<Config, String> {
        Config::from_json_value(&llama(changes))
    }

    #[test]
    fn families_differ_by_their_mapping() {
        let config = read(json!({})).unwrap();
        assert_eq!((config.head_dim, config.kv_heads, config.qkv_bias, config.qk_norm), (16, 2, false, false));
        assert_eq!((config.bos_id, config.eos_ids.as_slice()), (Some(1), [2, 5].as_slice()));
        let config = read(json!({"architectures": ["Qwen2ForCausalLM"], "sliding_window": 16})).unwrap();
        assert_eq!((config.qkv_bias, config.o_bias, config.window), (true, false, None));
        let config = read(json!({"architectures": ["Qwen3ForCausalLM"]})).unwrap();
        assert_eq!((config.qk_norm, config.head_dim), (true, 128));
        let config = read(json!({"attention_bias": true})).unwrap();
        assert!(config.qkv_bias && config.o_bias);
    }

    #[test]
    fn layers_have_their_kinds() {
        let local = |changes: Json| {
            let config = read(changes).unwrap();
            (config.window, config.layer_kinds.iter().map(|kind| kind.local).collect::<Vec<_>>())
        };
        let mistral = |window: Json| local(json!({"architectures": ["MistralForCausalLM"], "sliding_window": window}));
        assert_eq!(mistral(json!(1024)), (Some(1024), vec![true, true]));
        assert_eq!(mistral(Json::Null), (None, vec![false, false]));
        assert_eq!(local(json!({"architectures": ["MistralForCausalLM"]})).0, Some(4096));
        assert_eq!(local(json!({"architectures": ["Gemma2ForCausalLM"]})).1, [true, false]);
        let types = json!(["full_attention", "sliding_attention"]);
        assert_eq!(local(json!({"architectures": ["Gemma3ForCausalLM"], "layer_types": types})).1, [false, true]);
        let qwen = json!({"architectures": ["Qwen2ForCausalLM"], "sliding_window": 8, "use_sliding_window": true,
            "max_window_layers": 1});
        assert_eq!(local(qwen).1, [false, true]);
        let config = read(json!({"architectures": ["SmolLM3ForCausalLM"], "num_hidden_layers": 8})).unwrap();
        let roped: Vec<_> = config.layer_kinds.iter().map(|kind| kind.rope).collect();
        assert_eq!(roped, [true, true, true, false, true, true, true, false]);
        assert!(config.tie_word_embeddings);
    }

    #[test]
    fn a_long_context_of_other_frequencies_is_left_out() {
        let scaling = json!({"type": "longrope", "short_factor": vec![1.0; 8], "long_factor": vec![2.0; 8]});
        let config = read(json!({"architectures": ["Phi3ForCausalLM"], "rope_scaling": scaling,
            "original_max_position_embeddings": 4096}))
        .unwrap();
        assert_eq!((config.max_position_embeddings, config.fused), (4096, true));
        let (_, scale) = config.rope.frequencies();
        assert!((scale - (1.0 + 2_f64.ln() / 4096_f64.ln()).sqrt()).abs() < 1e-12);
    }

    #[test]
    fn refusals_name_the_key() {
        for (changes, part) in [
            (json!({"architectures": ["MambaForCausalLM"]}), "has architecture MambaForCausalLM; supported are Llama"),
            (json!({"num_key_value_heads": 3}), "4 attention heads in 3"),
            (json!({"head_dim": 15}), "head_dim = 15"),
            (json!({"hidden_size": null}), "no hidden_size"),
            (json!({"hidden_size": -1}), "hidden_size = -1"),
            (json!({"num_attention_heads": 0}), "num_attention_heads = 0"),
            (json!({"vocab_size": 1_u64 << 40}), "vocab_size"),
            (json!({"rope_scaling": {"rope_type": "ntk", "factor": 2.0}}), "supported types are linear, dynamic"),
            (json!({"rope_scaling": {"rope_type": "yarn"}}), "rope_scaling without a positive factor"),
            (json!({"num_hidden_layers": 5000}), "5000 layers"),
            (json!({"quantization_config": {"quant_method": "fp8"}}), "a quantization_config of the method fp8, and"),
            (json!({"quantization_config": {"quant_method": "awq", "bits": 4}}), "of the method awq"),
            (json!({"quantization_config": {"load_in_4bit": true}}), "of the method bitsandbytes"),
            (json!({"rope_theta": "Infinity"}), "rope_theta = \"Infinity\"; it must be a number"),
            (json!({"architectures": ["Gemma3ForCausalLM"], "layer_types": ["full_attention"]}), "1 layer_types for 2"),
            (json!({"partial_rotary_factor": 2.0}), "rotates 32 of head_dim = 16"),
            (json!({"hidden_act": "gelu"}), "supported are silu and gelu_pytorch_tanh"),
            (json!({"eos_token_id": "two"}), "eos_token_id"),
        ] {
            let message = read(changes.clone()).unwrap_err();
            assert!(message.contains(part), "{changes}: {message}");
        }
    }

    /// Values of transformers 4.57, `ROPE_INIT_FUNCTIONS`, in f32.
    #[test]
    fn rope_scaling_as_transformers() {
        let shape = json!({"head_dim": 16, "rope_theta": 500_000.0, "max_position_embeddings": 131_072});
        let scaled = |scaling: Json| {
            let mut changes = shape.clone();
            changes["rope_scaling"] = scaling;
            read(changes).unwrap().rope.frequencies().0
        };
        let llama3 = scaled(json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}));
        let linear = scaled(json!({"type": "linear", "factor": 4.0}));
        close(&llama3, &LLAMA3);
        close(&linear, &LINEAR);
    }

    fn close(found: &[f64], wanted: &[f64]) {
        assert_eq!(found.len(), wanted.len());
        for (a, b) in found.iter().zip(wanted) {
            assert!((a / b - 1.0).abs() < 1e-5, "{a} against {b}");
        }
    }

    const LLAMA3: [f64; 8] = [
        1.0,
        0.193922758102417,
        0.03760603070259094,
        0.00729266507551074,
        0.0005248460220173001,
        3.428102354519069e-05,
        6.647869668086059e-06,
        1.289173155782919e-06,
    ];
    const LINEAR: [f64; 8] = [
        0.25,
        0.04848068952560425,
        0.009401507675647736,
        0.001823166268877685,
        0.0003535533614922315,
        6.856204709038138e-05,
        1.3295739336172119e-05,
        2.578346311565838e-06,
    ];

    #[test]
    fn gguf_metadata_gives_a_config() {
        let (_dir, gguf) = fixture::small().open();
        let config = Config::from_gguf(&gguf).unwrap();
        assert_eq!(
            (config.hidden_size, config.layers, config.heads, config.kv_heads, config.head_dim),
            (64, 1, 4, 2, 16)
        );
        assert_eq!(config.rms_norm_eps, 1e-5);
        assert!(config.tie_word_embeddings);
        let (_dir, gguf) = fixture::small().text("general.architecture", "mamba").open();
        let message = Config::from_gguf(&gguf).unwrap_err().to_string();
        assert!(message.contains("has architecture mamba; supported are llama"), "{message}");
    }
}
