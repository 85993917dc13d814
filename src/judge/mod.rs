//! Judging as pure functions: what a judge is asked, how its answer is read, what follows from it.
//! Nothing here calls a model.

pub mod interval;
pub mod pairs;
pub mod pairwise;
pub mod score;
pub mod template;
pub mod verdict;

pub use pairwise::{Combine, Order, PairwisePrompt, Reading, Verdict};
pub use score::{Scale, Score};
pub use template::Question;
