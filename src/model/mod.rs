//! Models: configuration, weights, tokenizer, chat template, the transformer and its adapters.

pub mod attention;
pub mod config;
mod error;
pub mod lora;
mod rope;
pub mod transformer;
pub mod weights;

pub use config::Config;
pub use error::ModelError;
pub use lora::{Adapters, Lora, LoraConfig};
pub use transformer::Transformer;
