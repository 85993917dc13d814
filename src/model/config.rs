//! Configuration of a decoder-only transformer.

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
    pub max_position_embeddings: usize,
    pub tie_word_embeddings: bool,
    pub qkv_bias: bool,
    pub o_bias: bool,
    pub mlp_bias: bool,
    pub qk_norm: bool,
}

impl Config {
    /// Inverse frequencies (`head_dim / 2` of them) and the scale of cosines and sines.
    pub fn rope_frequencies(&self) -> (Vec<f64>, f64) {
        (Vec::new(), 1.0)
    }
}
