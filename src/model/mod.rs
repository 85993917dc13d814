//! Models: configuration, weights, tokenizer, chat template, the transformer and its adapters.
//!
//! A model is named by a [`Source`] and opened as a [`Pretrained`]. What is inside carries Hugging
//! Face's names whether the file was safetensors or GGUF, so nothing above this room knows the
//! difference.

pub mod attention;
pub mod chat;
pub mod config;
mod error;
pub mod export;
pub mod family;
pub mod file;
pub mod gguf;
mod gguf_export;
mod gguf_tokenizer;
pub mod gradient;
pub mod hub;
mod inference;
pub mod inspect;
mod jinja;
mod keys;
pub mod lora;
mod opened;
pub mod pack;
pub mod parameters;
mod peft;
pub mod quant;
pub mod rope;
pub mod safetensors;
pub mod source;
#[cfg(test)]
pub(crate) mod tests;
pub mod tokenizer;
pub mod transformer;
pub mod weights;

pub use chat::{Chat, ChatMessage, ChatTemplate, Conversation};
pub use config::Config;
pub use error::ModelError;
pub use lora::{Adapters, Lora, LoraConfig};
pub use opened::Opened;
pub use source::{ModelOptions, Pretrained, Source};
pub use tokenizer::Tokenizer;
pub use transformer::Transformer;
pub use weights::Weights;
