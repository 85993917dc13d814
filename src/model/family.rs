//! What tells the families of decoder-only transformers apart, beyond what config.json says outright.
//!
//! Constants are the defaults of transformers' configuration classes: a config.json leaves out what
//! equals them.

use serde_json::Value as Json;

use super::keys::Keys;

/// A family, by the architecture that config.json names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    Llama,
    Mistral,
    Qwen2,
    Qwen3,
    SmolLm3,
    Gemma2,
    Gemma3,
    Phi3,
}

const NAMES: [(&str, Family); 8] = [
    ("LlamaForCausalLM", Family::Llama),
    ("MistralForCausalLM", Family::Mistral),
    ("Qwen2ForCausalLM", Family::Qwen2),
    ("Qwen3ForCausalLM", Family::Qwen3),
    ("SmolLM3ForCausalLM", Family::SmolLm3),
    ("Gemma2ForCausalLM", Family::Gemma2),
    ("Gemma3ForCausalLM", Family::Gemma3),
    ("Phi3ForCausalLM", Family::Phi3),
];

/// How a layer differs from its neighbours.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayerKind {
    /// Sees the sliding window alone.
    pub local: bool,
    /// Rotates queries and keys.
    pub rope: bool,
}

impl Family {
    pub fn of(architecture: &str) -> Option<Self> {
        NAMES.iter().find(|(name, _)| *name == architecture).map(|(_, family)| *family)
    }

    /// Architectures that are read.
    pub fn supported() -> String {
        NAMES.map(|(name, _)| name).join(", ")
    }

    /// Norms around both halves of a block and weights of norms stored less one, a scaled embedding,
    /// tanh-GELU: what Google's models have in common.
    pub fn is_gemma(self) -> bool {
        matches!(self, Self::Gemma2 | Self::Gemma3)
    }

    /// Queries and keys pass a norm of their own before they are rotated.
    pub fn has_qk_norm(self) -> bool {
        matches!(self, Self::Qwen3 | Self::Gemma3)
    }

    pub fn head_dim(self) -> Option<usize> {
        match self {
            Self::Qwen3 => Some(128),
            Self::Gemma2 | Self::Gemma3 => Some(256),
            _ => None,
        }
    }

    pub fn ties_embeddings(self) -> bool {
        self.is_gemma() || self == Self::SmolLm3
    }

    pub fn rms_norm_eps(self) -> f64 {
        if self == Self::Phi3 { 1e-5 } else { 1e-6 }
    }

    pub fn rope_theta(self) -> f64 {
        match self {
            Self::Gemma3 => 1e6,
            Self::SmolLm3 => 2e6,
            _ => 1e4,
        }
    }

    /// Tokens that a local layer sees, itself included.
    pub(super) fn window(self, keys: &Keys<'_>) -> Result<Option<usize>, String> {
        let window = keys.optional_size("sliding_window")?;
        let absent = keys.0.get("sliding_window").is_none();
        Ok(match self {
            Self::Llama => None,
            // The class's default; null is no window.
            Self::Mistral | Self::Gemma2 | Self::Gemma3 if absent => Some(4096),
            Self::Mistral | Self::Gemma2 | Self::Gemma3 | Self::Phi3 => window,
            Self::Qwen2 | Self::Qwen3 | Self::SmolLm3 => {
                window.filter(|_| keys.0.get("use_sliding_window") == Some(&Json::Bool(true)))
            }
        })
    }

    pub(super) fn layers(self, keys: &Keys<'_>, layers: usize, windowed: bool) -> Result<Vec<LayerKind>, String> {
        let ropes = self.roped_layers(keys, layers)?;
        let types = keys.texts("layer_types")?.filter(|_| !matches!(self, Self::Mistral | Self::Phi3));
        if let Some(types) = &types
            && types.len() != layers
        {
            return Err(format!("has {} layer_types for {layers} layers", types.len()));
        }
        let first_local = keys.number("max_window_layers")?.unwrap_or(28.0);
        let period = keys.optional_size("sliding_window_pattern")?.unwrap_or(6);
        let local = |i: usize, rope: bool| match types.as_ref().and_then(|types| types.get(i)) {
            Some(kind) => *kind == "sliding_attention",
            None => match self {
                Self::Llama => false,
                Self::Mistral | Self::Phi3 => true,
                Self::Qwen2 | Self::Qwen3 => i as f64 >= first_local,
                Self::SmolLm3 => !rope,
                Self::Gemma2 => !(i + 1).is_multiple_of(2),
                Self::Gemma3 => !(i + 1).is_multiple_of(period),
            },
        };
        let kind = |(i, rope): (usize, bool)| LayerKind { local: windowed && local(i, rope), rope };
        Ok(ropes.into_iter().enumerate().map(kind).collect())
    }

    /// SmolLM3 leaves every fourth layer without positions.
    fn roped_layers(self, keys: &Keys<'_>, layers: usize) -> Result<Vec<bool>, String> {
        if self != Self::SmolLm3 {
            return Ok(vec![true; layers]);
        }
        let Some(list) = keys.get("no_rope_layers") else {
            let period = keys.optional_size("no_rope_layer_interval")?.unwrap_or(4);
            return Ok((1..=layers).map(|i| !i.is_multiple_of(period)).collect());
        };
        // 1 is a layer with positions, whatever the key's name says.
        let flags = list.as_array().into_iter().flatten().map(|flag| flag.as_u64().map(|n| n != 0));
        flags
            .collect::<Option<Vec<_>>>()
            .filter(|flags| flags.len() == layers)
            .ok_or_else(|| format!("has no_rope_layers = {list}; it must be {layers} times 0 or 1"))
    }
}
