//! Configuration of a decoder-only transformer.
//!
//! A model family is one mapping here, from config.json or from GGUF metadata; the transformer
//! itself is driven by the result and knows no family.

use std::f64::consts::PI;
use std::path::Path;

use serde_json::Value as Json;

use super::ModelError;
use super::gguf::{Gguf, Value};

/// Families that are read, by the name that config.json has for them.
const SUPPORTED: &str = "LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM";

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
    pub rope_theta: f64,
    pub rope_scaling: RopeScaling,
    /// Tokens of context. A model with a sliding window has no more than the window: up to there it
    /// sees all that came before, as every other model.
    pub max_position_embeddings: usize,
    pub tie_word_embeddings: bool,
    pub qkv_bias: bool,
    pub o_bias: bool,
    pub mlp_bias: bool,
    /// Queries and keys pass a norm of their own before they are rotated (Qwen3).
    pub qk_norm: bool,
    pub bos_id: Option<u32>,
    /// Tokens that end a text, as the configuration has them.
    pub eos_ids: Vec<u32>,
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
    /// Each frequency has a divisor of its own, as GGUF stores Llama 3.1's (`rope_freqs.weight`).
    Divisors(Vec<f64>),
}

impl Config {
    /// Reads a config.json.
    ///
    /// # Errors
    /// Names the file, the key and, for an unknown architecture, the supported ones.
    pub fn from_json(path: &Path) -> Result<Self, ModelError> {
        let text = std::fs::read_to_string(path).map_err(ModelError::io(path))?;
        let json: Json = serde_json::from_str(&text)
            .map_err(|e| ModelError::file(path, format!("is no JSON ({e}); download the model again")))?;
        Self::from_json_value(&json).map_err(|message| ModelError::file(path, message))
    }

    fn from_json_value(json: &Json) -> Result<Self, String> {
        let keys = Keys(json);
        let architecture = keys.architecture()?;
        let family = Family::of(&architecture)?;
        let hidden_size = keys.size("hidden_size")?;
        let heads = keys.size("num_attention_heads")?;
        let attention_bias = keys.flag("attention_bias")?.unwrap_or(false);
        let config = Self {
            vocab_size: keys.size("vocab_size")?,
            hidden_size,
            intermediate_size: keys.size("intermediate_size")?,
            layers: keys.size("num_hidden_layers")?,
            heads,
            kv_heads: keys.optional_size("num_key_value_heads")?.unwrap_or(heads),
            head_dim: keys.optional_size("head_dim")?.unwrap_or(match family {
                Family::Qwen3 => 128,
                _ => hidden_size / heads,
            }),
            rms_norm_eps: keys.number("rms_norm_eps")?.unwrap_or(1e-6),
            rope_theta: keys.rope_theta()?,
            rope_scaling: keys.rope_scaling()?,
            max_position_embeddings: within(keys.size("max_position_embeddings")?, keys.sliding_window(family)?),
            tie_word_embeddings: keys.flag("tie_word_embeddings")?.unwrap_or(false),
            qkv_bias: attention_bias || family == Family::Qwen2,
            o_bias: attention_bias && family != Family::Qwen2,
            mlp_bias: keys.flag("mlp_bias")?.unwrap_or(false),
            qk_norm: family == Family::Qwen3,
            bos_id: keys.ids("bos_token_id")?.first().copied(),
            eos_ids: keys.ids("eos_token_id")?,
            architecture,
        };
        keys.refuse_other_activations()?;
        config.checked()
    }

    /// Reads the metadata of a GGUF file.
    ///
    /// # Errors
    /// Names the file, the key and, for an unknown architecture, the supported ones.
    pub fn from_gguf(gguf: &Gguf) -> Result<Self, ModelError> {
        Self::read_gguf(gguf).map_err(|message| ModelError::file(gguf.path(), message))
    }

    fn read_gguf(gguf: &Gguf) -> Result<Self, String> {
        let name = gguf.text("general.architecture").ok_or("has no general.architecture; download it again")?;
        let architecture = match name {
            // llama.cpp stores Mistral as llama too.
            "llama" => "LlamaForCausalLM",
            "qwen2" => "Qwen2ForCausalLM",
            "qwen3" => "Qwen3ForCausalLM",
            _ => return Err(format!("has architecture {name}; supported are llama, qwen2, qwen3")),
        };
        let family = Family::of(architecture)?;
        let optional = |key: &str| gguf.unsigned(&format!("{name}.{key}")).map(|n| n as usize);
        let size = |key: &str| optional(key).ok_or_else(|| format!("has no number {name}.{key}; download it again"));
        let hidden_size = size("embedding_length")?;
        let heads = size("attention.head_count")?.max(1);
        let head_dim = optional("attention.key_length").unwrap_or(hidden_size / heads);
        if let Some(rotated) = optional("rope.dimension_count")
            && rotated != head_dim
        {
            return Err(format!("rotates {rotated} of {head_dim} dimensions of a head; supported is all of them"));
        }
        let has = |tensor: &str| gguf.tensor(tensor).is_some();
        let embedding = gguf.tensor("token_embd.weight").ok_or("has no tensor token_embd.weight; download it again")?;
        let id = |key: &str| gguf.unsigned(&format!("tokenizer.ggml.{key}")).and_then(|n| u32::try_from(n).ok());
        let mut eos_ids: Vec<u32> = ["eos_token_id", "eot_token_id"].iter().filter_map(|key| id(key)).collect();
        eos_ids.dedup();
        Self {
            architecture: architecture.to_owned(),
            vocab_size: embedding.rows(),
            hidden_size,
            intermediate_size: size("feed_forward_length")?,
            layers: size("block_count")?,
            heads,
            kv_heads: optional("attention.head_count_kv").unwrap_or(heads),
            head_dim,
            rms_norm_eps: gguf
                .float(&format!("{name}.attention.layer_norm_rms_epsilon"))
                .map(f32_digits)
                .ok_or_else(|| format!("has no {name}.attention.layer_norm_rms_epsilon; download it again"))?,
            rope_theta: gguf.float(&format!("{name}.rope.freq_base")).unwrap_or(10_000.0),
            rope_scaling: gguf_rope_scaling(gguf, name)?,
            max_position_embeddings: within(size("context_length")?, optional("attention.sliding_window")),
            tie_word_embeddings: !has("output.weight"),
            qkv_bias: has("blk.0.attn_q.bias"),
            o_bias: has("blk.0.attn_output.bias"),
            mlp_bias: has("blk.0.ffn_down.bias"),
            qk_norm: family == Family::Qwen3,
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
        if !self.head_dim.is_multiple_of(2) {
            return Err(format!("has head_dim = {}; rotary embedding needs an even one", self.head_dim));
        }
        if !(self.rope_theta.is_finite() && self.rope_theta > 0.0) {
            return Err(format!("has rope_theta = {}; it must be a positive number", self.rope_theta));
        }
        if !(self.rms_norm_eps.is_finite() && self.rms_norm_eps >= 0.0) {
            return Err(format!("has rms_norm_eps = {}; it must be a small positive number", self.rms_norm_eps));
        }
        if let RopeScaling::Divisors(divisors) = &self.rope_scaling
            && (divisors.len() != self.head_dim / 2 || divisors.iter().any(|d| !d.is_normal()))
        {
            return Err(format!(
                "has {} rotary divisors for heads of {}, or some that are 0; download it again",
                divisors.len(),
                self.head_dim
            ));
        }
        Ok(self)
    }

    /// Inverse frequencies (`head_dim / 2` of them) and the scale of cosines and sines.
    ///
    /// As transformers' `modeling_rope_utils`, in double precision.
    pub fn rope_frequencies(&self) -> (Vec<f64>, f64) {
        let plain = (0..self.head_dim / 2).map(|i| self.rope_theta.powf(-2.0 * i as f64 / self.head_dim as f64));
        let frequencies = match &self.rope_scaling {
            RopeScaling::None => plain.collect(),
            RopeScaling::Linear { factor } => plain.map(|f| f / factor).collect(),
            RopeScaling::Llama3 {
                factor,
                low_freq_factor: low,
                high_freq_factor: high,
                original_max_position_embeddings: context,
            } => plain
                .map(|f| {
                    // 1 keeps the frequency, 0 divides it.
                    let kept = (context * f / (2.0 * PI) - low) / (high - low);
                    let kept = kept.clamp(0.0, 1.0);
                    (1.0 - kept) * f / factor + kept * f
                })
                .collect(),
            RopeScaling::Divisors(divisors) => plain.zip(divisors).map(|(f, d)| f / d).collect(),
        };
        (frequencies, 1.0)
    }

    /// Weights in the model, the embedding counted once where it is tied.
    pub fn parameters(&self) -> u64 {
        // Sizes of up to 2^24 multiply past 64 bits.
        let [v, h, i, l] = [self.vocab_size, self.hidden_size, self.intermediate_size, self.layers].map(|n| n as u128);
        let [heads, kv_heads, d] = [self.heads, self.kv_heads, self.head_dim].map(|n| n as u128);
        let (q, kv) = (heads * d, kv_heads * d);
        let when = |flag: bool, n: u128| if flag { n } else { 0 };
        let biases = when(self.qkv_bias, q + 2 * kv) + when(self.o_bias, h) + when(self.mlp_bias, 2 * i + h);
        let block = 2 * h * q + 2 * h * kv + 3 * h * i + 2 * h + biases + when(self.qk_norm, 2 * d);
        let all = v * h + when(!self.tie_word_embeddings, v * h) + l * block + h;
        u64::try_from(all).unwrap_or(u64::MAX)
    }
}

/// The largest size that is taken at its word; the product of two still fits 63 bits.
const MAX_SIZE: usize = 1 << 24;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Family {
    Llama,
    Mistral,
    Qwen2,
    Qwen3,
}

impl Family {
    fn of(architecture: &str) -> Result<Self, String> {
        Ok(match architecture {
            "LlamaForCausalLM" => Self::Llama,
            "MistralForCausalLM" => Self::Mistral,
            "Qwen2ForCausalLM" => Self::Qwen2,
            "Qwen3ForCausalLM" => Self::Qwen3,
            other => return Err(format!("has architecture {other}; supported are {SUPPORTED}")),
        })
    }
}

fn within(context: usize, window: Option<usize>) -> usize {
    window.map_or(context, |window| context.min(window))
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
        return Ok(RopeScaling::Divisors(divisors.into_iter().map(f64::from).collect()));
    }
    let key = |key: &str| format!("{name}.rope.scaling.{key}");
    match gguf.get(&key("type")) {
        None => Ok(RopeScaling::None),
        Some(Value::Text(kind)) if kind == "none" => Ok(RopeScaling::None),
        Some(Value::Text(kind)) if kind == "linear" => {
            let factor = gguf.float(&key("factor")).filter(|f| *f > 0.0);
            let factor = factor.ok_or_else(|| format!("has no positive {}; download it again", key("factor")))?;
            Ok(RopeScaling::Linear { factor })
        }
        Some(other) => Err(format!("has rope scaling {other:?}; supported are none and linear")),
    }
}

/// The object of a config.json; a key that is null counts as absent.
struct Keys<'a>(&'a Json);

impl Keys<'_> {
    fn get(&self, key: &str) -> Option<&Json> {
        self.0.get(key).filter(|value| !value.is_null())
    }

    fn architecture(&self) -> Result<String, String> {
        let name = self.0.get("architectures").and_then(|list| list.get(0)).and_then(Json::as_str);
        name.map(str::to_owned).ok_or_else(|| format!("names no architecture; supported are {SUPPORTED}"))
    }

    fn optional_size(&self, key: &str) -> Result<Option<usize>, String> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let size = value.as_u64().and_then(|n| usize::try_from(n).ok()).filter(|n| *n > 0);
        size.map(Some).ok_or_else(|| format!("has {key} = {value}; it must be a positive whole number"))
    }

    fn size(&self, key: &str) -> Result<usize, String> {
        self.optional_size(key)?.ok_or_else(|| format!("has no {key}; is it the config.json of a language model?"))
    }

    fn number(&self, key: &str) -> Result<Option<f64>, String> {
        let Some(value) = self.get(key) else { return Ok(None) };
        value.as_f64().map(Some).ok_or_else(|| format!("has {key} = {value}; it must be a number"))
    }

    fn flag(&self, key: &str) -> Result<Option<bool>, String> {
        let Some(value) = self.get(key) else { return Ok(None) };
        value.as_bool().map(Some).ok_or_else(|| format!("has {key} = {value}; it must be true or false"))
    }

    /// A token id, or a list of them.
    fn ids(&self, key: &str) -> Result<Vec<u32>, String> {
        token_ids(self.get(key)).ok_or_else(|| format!("has a {key} that is no token id and no list of them"))
    }

    fn rope_theta(&self) -> Result<f64, String> {
        match self.get("rope_parameters") {
            // transformers 5 keeps all of rotary embedding in one object.
            Some(rope) => Ok(Keys(rope).number("rope_theta")?.unwrap_or(10_000.0)),
            None => Ok(self.number("rope_theta")?.unwrap_or(10_000.0)),
        }
    }

    fn rope_scaling(&self) -> Result<RopeScaling, String> {
        let Some(scaling) = self.get("rope_scaling").or_else(|| self.get("rope_parameters")) else {
            return Ok(RopeScaling::None);
        };
        let keys = Keys(scaling);
        let number = |key: &str| {
            keys.number(key)?.filter(|n| *n > 0.0).ok_or_else(|| format!("has a rope_scaling without a positive {key}"))
        };
        match keys.get("rope_type").or_else(|| keys.get("type")).and_then(Json::as_str) {
            Some("default") => Ok(RopeScaling::None),
            Some("linear") => Ok(RopeScaling::Linear { factor: number("factor")? }),
            Some("llama3") => {
                let (low, high) = (number("low_freq_factor")?, number("high_freq_factor")?);
                if high <= low {
                    return Err(format!("has high_freq_factor = {high}, which must exceed low_freq_factor = {low}"));
                }
                Ok(RopeScaling::Llama3 {
                    factor: number("factor")?,
                    low_freq_factor: low,
                    high_freq_factor: high,
                    original_max_position_embeddings: number("original_max_position_embeddings")?,
                })
            }
            _ => Err(format!("has rope_scaling = {scaling}; supported types are linear and llama3")),
        }
    }

    fn sliding_window(&self, family: Family) -> Result<Option<usize>, String> {
        let window = self.optional_size("sliding_window")?;
        Ok(match family {
            Family::Llama => None,
            // MistralConfig's default where the key is absent; null is no window.
            Family::Mistral if self.0.get("sliding_window").is_none() => Some(4096),
            Family::Mistral => window,
            Family::Qwen2 | Family::Qwen3 => {
                window.filter(|_| self.get("use_sliding_window") == Some(&Json::Bool(true)))
            }
        })
    }

    fn refuse_other_activations(&self) -> Result<(), String> {
        match self.get("hidden_act").and_then(Json::as_str) {
            None | Some("silu" | "swish") => Ok(()),
            Some(other) => Err(format!("has hidden_act = {other}; supported is silu")),
        }
    }
}

/// A token id or a list of them, as `eos_token_id` is written; nothing is an empty list.
pub(super) fn token_ids(value: Option<&Json>) -> Option<Vec<u32>> {
    let id = |value: &Json| value.as_u64().and_then(|n| u32::try_from(n).ok());
    match value {
        None | Some(Json::Null) => Some(Vec::new()),
        Some(Json::Array(list)) => list.iter().map(id).collect(),
        Some(one) => id(one).map(|id| vec![id]),
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
        assert_eq!((config.qkv_bias, config.o_bias, config.max_position_embeddings), (true, false, 8192));
        let config = read(json!({"architectures": ["Qwen3ForCausalLM"]})).unwrap();
        assert_eq!((config.qk_norm, config.head_dim), (true, 128));
        let config = read(json!({"attention_bias": true})).unwrap();
        assert!(config.qkv_bias && config.o_bias);
    }

    #[test]
    fn a_sliding_window_bounds_the_context() {
        let mistral = |window: Json| read(json!({"architectures": ["MistralForCausalLM"], "sliding_window": window}));
        assert_eq!(mistral(json!(1024)).unwrap().max_position_embeddings, 1024);
        assert_eq!(mistral(Json::Null).unwrap().max_position_embeddings, 8192);
        assert_eq!(read(json!({"architectures": ["MistralForCausalLM"]})).unwrap().max_position_embeddings, 4096);
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
            (json!({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}), "supported types are linear and llama3"),
            (json!({"hidden_act": "gelu"}), "supported is silu"),
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
            read(changes).unwrap().rope_frequencies().0
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
