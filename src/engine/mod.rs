//! The engine: edges, stage contexts, supervision, runs and journals. It moves Arrow record
//! batches and plain data; it knows no tensor and no model.

pub mod context;
pub mod error;
pub mod message;
pub mod stage;

pub use context::StageContext;
pub use error::{Domain, StageError};
pub use message::Message;
pub use stage::{Runnable, Stage, StageRegistry};
