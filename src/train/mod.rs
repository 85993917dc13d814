//! Training on preferences: losses, the optimizer, the schedule, the step and its checkpoints.

pub mod loss;
pub mod optimizer;
pub mod schedule;
