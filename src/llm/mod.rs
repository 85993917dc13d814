//! The model server: continuous batching of everything that asks one model on one device.
//!
//! Samplers, judges and reference scoring are clients of the same [`server::ModelServer`], each request with
//! an adapter of its own, so that one frozen copy of the base serves them all. The server lives on a
//! [`crate::torch::DeviceThread`]; a [`Client`] sends it plain data and awaits plain data.

mod adapters;
pub mod bench;
mod cache;
pub mod doctor;
pub mod endpoint;
#[cfg(test)]
mod fixture;
mod forest;
mod graphs;
mod models;
#[cfg(test)]
mod parity;
pub mod philox;
mod prefixes;
mod request;
mod sampling;
mod scheduler;
mod scoring;
mod sequence;
pub mod server;
mod stop;
#[cfg(test)]
mod tests;

pub use endpoint::Endpoint;
pub use models::{Client, Models, Role, TextModel, keeps_requests_apart};
pub use philox::{Stream, stream_key};
pub use request::{
    AdapterId, Candidate, Company, Finish, GenerateRequest, Generation, LlmError, Sampling, ScoreRequest, Scores,
};
pub use stop::StopStrings;
