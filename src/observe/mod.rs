//! Metrics, trace and progress. Plain: imports no other room.

pub mod catalogue;
pub mod metrics;
pub mod process;
pub mod progress;
pub mod prometheus;
pub mod queues;
pub mod report;
pub mod status;
pub mod tensorboard;
pub mod text;
pub mod trace;

pub use metrics::Metrics;
pub use status::{EdgeStatus, RunStatus, StageState, StageStatus};
pub use text::shortened;
pub use trace::Trace;
