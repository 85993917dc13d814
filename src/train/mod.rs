//! Training on preferences: losses, the optimizer, the schedule, the step and its checkpoints.
//!
//! Losses, schedule and the order of pairs are plain functions of plain data. Tensors are in
//! [`Trainer`] and below it, which live on a device thread.

pub mod card;
pub mod checkpoint;
mod error;
pub mod loss;
pub mod optimizer;
pub mod pair;
mod pass;
pub mod run;
pub mod schedule;
pub mod session;
pub mod stats;
pub mod trainer;

#[cfg(test)]
mod tests;

pub use error::TrainError;
pub use loss::{Loss, Objective};
pub use optimizer::AdamW;
pub use pair::Pair;
pub use pass::pass_tokens;
pub use run::{Average, Evaluations, Event, Opened, Outcome, Placed, Product, Training};
pub use schedule::{Decay, Position, Schedule};
pub use session::{Order, Session};
pub use stats::{Metric, Stats, Tally};
pub use trainer::{Part, Step, Subject, Trainer, Work};
