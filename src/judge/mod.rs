//! Judging as pure functions: what a judge is asked, how its answer is read, what follows from it.
//! Nothing here calls a model.

pub mod pairwise;

pub use pairwise::{Order, PairwisePrompt, Reading, Verdict};
