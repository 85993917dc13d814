//! What can be seen of a run: metrics, trace, status, report. Plain: imports no other room.

pub mod catalogue;
pub mod metrics;
pub mod process;
pub mod prometheus;
pub mod queues;
pub mod report;
pub mod server;
pub mod status;
pub mod tensorboard;
pub mod text;
pub mod trace;
pub mod view;

pub use metrics::Metrics;
pub use status::{EdgeStatus, RoundStatus, RunStatus, StageState, StageStatus};
pub use text::shortened;
pub use trace::Trace;
