//! What a model is and what it needs, without its weights.

use std::collections::BTreeMap;

use serde::Serialize;
use tch::Kind;

use super::lora::LoraConfig;
use super::source::Pretrained;

/// Tokens of the sequence whose KV cache is given as an example.
const SEQUENCE: u64 = 2048;

/// The figures of a model; scripts rely on the names.
#[derive(Debug, Clone, Serialize)]
pub struct Inspection {
    pub source: String,
    /// The hub's commit.
    pub revision: Option<String>,
    pub architecture: String,
    pub parameters: u64,
    pub layers: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub vocab_size: usize,
    pub context: usize,
    pub sliding_window: Option<usize>,
    pub tied_embeddings: bool,
    /// Tensors by how they are stored.
    pub stored: BTreeMap<String, usize>,
    pub file_bytes: u64,
    /// Bytes of the chat template.
    pub chat_template_bytes: Option<usize>,
    /// `bos_token` and the like, with their texts.
    pub special_tokens: BTreeMap<String, String>,
    pub bos_id: Option<u32>,
    /// Whether a begin-of-text token is put before plain text.
    pub adds_bos: bool,
    /// Tokens that end a turn.
    pub end_ids: Vec<u32>,
    pub memory: Memory,
}

/// Bytes.
#[derive(Debug, Clone, Serialize)]
pub struct Memory {
    pub weights_bf16: u64,
    pub weights_f32: u64,
    pub kv_token_bf16: u64,
    pub kv_sequence_bf16: u64,
    pub kv_sequence_tokens: u64,
    pub lora_rank: usize,
    pub lora_parameters: u64,
    /// Adapter, gradient and both moments of AdamW, float32.
    pub lora_training: u64,
}

impl Inspection {
    pub fn of(model: &Pretrained) -> Result<Self, super::ModelError> {
        let (c, tokenizer) = (&model.config, &model.tokenizer);
        Ok(Self {
            source: model.source.to_string(),
            revision: model.revision.clone(),
            architecture: c.architecture.clone(),
            parameters: c.parameters(),
            layers: c.layers,
            heads: c.heads,
            kv_heads: c.kv_heads,
            head_dim: c.head_dim,
            hidden_size: c.hidden_size,
            intermediate_size: c.intermediate_size,
            vocab_size: c.vocab_size,
            context: c.max_position_embeddings,
            sliding_window: c.window.filter(|_| c.layer_kinds.iter().any(|kind| kind.local)),
            tied_embeddings: c.tie_word_embeddings,
            stored: model.weights.stored(),
            file_bytes: model.total_bytes()?,
            chat_template_bytes: model.template().map(str::len),
            special_tokens: tokenizer.special_tokens().clone(),
            bos_id: tokenizer.bos_id(),
            adds_bos: tokenizer.add_bos(),
            end_ids: tokenizer.eos_ids().to_vec(),
            memory: Memory::of(model),
        })
    }
}

impl Memory {
    fn of(model: &Pretrained) -> Self {
        let c = &model.config;
        let bytes = |kind: Kind| kind.elt_size_in_bytes() as u64;
        let token = (2 * c.layers * c.kv_heads * c.head_dim) as u64 * bytes(Kind::BFloat16);
        let lora = LoraConfig::default();
        let adapter = lora.parameters(c);
        Self {
            weights_bf16: c.parameters().saturating_mul(bytes(Kind::BFloat16)),
            weights_f32: c.parameters().saturating_mul(bytes(Kind::Float)),
            kv_token_bf16: token,
            kv_sequence_bf16: token * SEQUENCE,
            kv_sequence_tokens: SEQUENCE,
            lora_rank: lora.r,
            lora_parameters: adapter,
            lora_training: 4 * adapter * bytes(Kind::Float),
        }
    }
}
