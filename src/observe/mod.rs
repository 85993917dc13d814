//! Metrics, trace and progress. Plain: imports no other room.

pub mod metrics;
pub mod trace;

pub use metrics::Metrics;
pub use trace::Trace;
