//! Stage kinds, one file each: the glue between the engine and the rooms below.

mod answerer;
mod canonical;
mod chat;
mod client;
mod columns;
pub mod feed;
pub mod gate;
pub mod judge;
pub mod mapper;
pub mod pairs;
pub mod process;
pub mod prompt_notes;
pub mod rows;
pub mod sampler;
pub mod scorer;
pub mod sink;
pub mod source;
pub mod split;
pub mod tap;
pub mod trainer;

use std::sync::Arc;

use crate::engine::StageRegistry;
use crate::llm::Models;

pub use client::adapter_id;

/// All kinds of stages; those that ask a model ask `models`.
pub fn registry(models: Arc<Models>) -> StageRegistry {
    let mut registry = StageRegistry::default();
    registry.register(source::SourceKind);
    registry.register(mapper::MapperKind);
    registry.register(process::ProcessKind);
    registry.register(split::SplitKind);
    registry.register(sink::SinkKind);
    registry.register(sampler::SamplerKind { models: models.clone() });
    registry.register(scorer::ScorerKind { models: models.clone() });
    registry.register(pairs::PairsKind);
    registry.register(gate::GateKind { models: models.clone() });
    registry.register(judge::JudgeKind { models: models.clone() });
    registry.register(trainer::TrainerKind { models });
    registry
}
