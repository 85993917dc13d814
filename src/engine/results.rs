//! What a finished run left, typed: the figures of `summary.json` and the tables of its stages.

use std::collections::BTreeMap;
use std::path::PathBuf;

use datafusion::arrow::record_batch::RecordBatch;
use serde::Deserialize;
use serde_json::{Map, Value};

use super::error::RunError;
use super::run::Summary;
use super::table;

/// One round of a run.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct RoundReport {
    /// From 1.
    pub round: u32,
    pub stages: BTreeMap<String, StageReport>,
    /// Where a trainer ran.
    pub train: Option<TrainReport>,
    /// Health of the judge, where one ran.
    #[serde(default)]
    pub judge: Map<String, Value>,
}

/// What one stage did in one round.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct StageReport {
    pub kind: String,
    pub rows_in: u64,
    pub rows_out: u64,
    /// Input rows whose result was recorded by an earlier run.
    pub reused_rows: u64,
    /// On a device, or else not waiting.
    pub seconds_busy: f64,
    pub seconds_wall: f64,
    pub tokens_in: u64,
    pub tokens_out: u64,
    /// What the kind adds.
    #[serde(flatten)]
    pub more: Map<String, Value>,
}

/// A round's training.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct TrainReport {
    pub steps: u64,
    pub first_loss: Option<f64>,
    pub last_loss: Option<f64>,
    /// The last evaluation, under TRL's names.
    #[serde(default)]
    pub eval: Option<Map<String, Value>>,
    /// PEFT directory, relative to the run directory.
    pub adapter: Option<PathBuf>,
    #[serde(flatten)]
    pub more: Map<String, Value>,
}

impl Summary {
    /// The figures of every round that began.
    ///
    /// # Errors
    /// They are not as this version writes them.
    pub fn rounds(&self) -> Result<Vec<RoundReport>, RunError> {
        let rounds = self.json.get("rounds").cloned().unwrap_or_default();
        serde_json::from_value(rounds).map_err(|e| RunError::external(format!("the run's summary: {e}")))
    }

    /// The rows of a stage's output in one round; `port` is empty where it has one output.
    ///
    /// # Errors
    /// The stage keeps no table, did not finish that round, or its file can't be read.
    pub fn table(&self, round: u32, stage: &str, port: &str) -> Result<Vec<RecordBatch>, RunError> {
        let path = self.dir.join(super::names::round(round)).join(stage).join(table::file_name(port));
        table::read(&path).map_err(|e| RunError::external(format!("{}: {e}", path.display())))
    }
}
