//! flowrun in a program of your own: plan and start flows, bring stage kinds, feed rows in and
//! take rows out.
//!
//! ```no_run
//! # async fn example() -> Result<(), flowrun::engine::RunError> {
//! use std::path::Path;
//! use flowrun::embed::{Engine, RunOptions};
//! use flowrun::flow::Flow;
//!
//! let engine = Engine::new();
//! let flow = Flow::from_toml(include_str!("../../flows/quickstart.toml"), Path::new("flows"), &[], &engine)?;
//! let run = engine.start(&flow, RunOptions::new("runs/quickstart")).await?;
//! let mut events = run.events();
//! while let Some(event) = events.next().await {
//!     println!("{event:?}");
//! }
//! let summary = run.wait().await;
//! let judged = summary.table(1, "judge", "")?;
//! # Ok(()) }
//! ```
//!
//! | file | noun |
//! |---|---|
//! | [`engine`] | what plans and starts flows |
//! | [`builder`] | a flow written in Rust |
//! | [`policy`] | what a flow of someone else's may open and use |
//! | `reach` | where the paths of a flow lead |
//!
//! Rows go in and out through the stage kinds [`feed`](crate::stages::feed) and
//! [`tap`](crate::stages::tap). A kind of your own implements [`StageKind`](crate::flow::StageKind)
//! and [`Runnable`](crate::engine::Runnable); `examples/custom_stage.rs` is one.

pub mod builder;
pub mod engine;
pub mod policy;
mod reach;

pub use builder::FlowBuilder;
pub use engine::{Engine, Planned, RunOptions};
pub use policy::{Access, Policy};

pub use crate::stages::feed::{Feeder, feed};
pub use crate::stages::tap::Tap;
