//! The engine: edges, stage contexts, supervision, runs and journals. It moves Arrow record
//! batches and plain data; it knows no tensor and no model.
//!
//! | file | noun |
//! |---|---|
//! | [`edge`] | the bounded channel between two stages |
//! | [`progress`] | the low watermark |
//! | `spill` | messages that wait on disk |
//! | `row_set` | a set of row numbers |
//! | [`journal`] | the durable rows of a stage |
//! | [`table`] | Parquet tables of a round |
//! | [`context`] | what a stage sees |
//! | `dead_letters` | rows that were given up, in the record of their stage |
//! | `meter` | what a stage did |
//! | [`adapters`] | which adapter a client gets |
//! | `round` | one attempt at a round |
//! | `supervisor` | actors, restarts, rounds in turn |
//! | `names` | what lies in a run directory |
//! | [`written`] | files that stages write elsewhere |
//! | `run_dir`, `ledger` | the run directory and what is written beside the tables |
//! | `finished` | a run directory in which nothing is left to do |
//! | `pause` | whether stages stand still |
//! | `quota` | what a run may use |
//! | `results` | what a finished run left, typed |
//! | [`runs`] | run directories from outside |
//! | [`run`] | the face of it all |

pub mod adapters;
mod completion;
pub mod context;
mod dead_letters;
pub mod edge;
pub mod error;
mod finished;
pub mod journal;
mod ledger;
pub mod message;
mod meter;
pub(crate) mod names;
mod pause;
pub mod progress;
mod quota;
pub mod report;
mod results;
mod round;
mod row_set;
pub mod run;
mod run_dir;
pub mod runs;
mod samples;
mod spill;
pub mod stage;
mod supervisor;
pub mod table;
pub mod written;

pub use context::{AdapterRef, Shard, StageContext, TokenCounter};
pub use error::{Domain, RunError, StageError};
pub use journal::Finished;
pub use ledger::{Ending, Events, RunEvent};
pub use message::Message;
pub use quota::{Quota, Quotas};
pub use results::{RoundReport, StageReport, TrainReport};
pub use row_set::RowSet;
pub use run::{Run, RunConfig, RunHandle, Summary};
pub use stage::{Runnable, Stage, StageRegistry};

use std::sync::{Mutex, MutexGuard};

/// A lock whose holder panicked guards figures that are still good.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}
