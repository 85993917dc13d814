//! flowrun runs self-improvement loops for language models as a streaming dataflow: sample several
//! answers to each prompt, let a judge prefer one, train on those preferences, repeat with the new
//! adapter.
//!
//! A flow is a TOML file. Every stage in it is a supervised actor; Arrow record batches travel
//! between stages through bounded channels; generation, judging and training overlap on the
//! devices they are given; a run can be killed at any moment and resumed.
//!
//! The rooms of the house, each importing only what stands below it:
//!
//! | room | what it holds |
//! |---|---|
//! | [`embed`] | the library's face: plan and start flows, feed rows in, take rows out |
//! | [`stages`] | one file a stage kind: the glue between engine and the rooms below |
//! | [`engine`] | edges, stage contexts, supervision, runs, journals; no tensors |
//! | [`judge`] | prompts, parsing of verdicts, pair selection; pure functions |
//! | [`data`] | sources, DataFusion queries, Parquet; no tensors |
//! | [`llm`] | the model server: scheduler, sequences, sampling, KV cache |
//! | [`train`] | preference losses, optimizer, schedule, checkpoints |
//! | [`model`] | configuration, transformer, LoRA, weights, tokenizer, chat template |
//! | [`torch`] | device threads and everything unsafe |
//! | [`flow`] | flow files: specification, validation, plan, the contract of stage kinds |
//! | [`observe`] | metrics, trace, status, report |

pub mod data;
pub mod embed;
pub mod engine;
pub mod flow;
pub mod judge;
pub mod llm;
pub mod model;
pub mod observe;
pub mod stages;
pub mod torch;
pub mod train;

/// The Arrow that record batches on edges are made of (the one DataFusion uses).
pub use datafusion::arrow;
