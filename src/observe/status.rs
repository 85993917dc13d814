//! A snapshot of a run: what the progress view draws and an embedding program polls.

use serde::Serialize;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum StageState {
    Pending,
    Running,
    Done,
    Failed,
    Cancelled,
}

#[derive(Debug, Clone, Serialize)]
pub struct StageStatus {
    pub name: String,
    pub kind: String,
    pub state: StageState,
    pub rows_in: u64,
    pub rows_out: u64,
    /// Input rows whose result came from the journal.
    pub reused_rows: u64,
    pub dead_letters: u64,
    pub tokens_in: u64,
    pub tokens_out: u64,
    /// Rows on the stage's input edges.
    pub queue_rows: u64,
    /// Rows those edges hold at most; `None` where one of them never blocks its sender.
    pub queue_capacity_rows: Option<u64>,
    /// What the stage stands still for, where it does.
    pub waits_for: Option<String>,
    /// Since the stage began this round, up to its end.
    pub seconds: f64,
}

#[derive(Debug, Clone, Serialize)]
pub struct EdgeStatus {
    /// `STAGE` or `STAGE.PORT`.
    pub from: String,
    pub to: String,
    pub messages: u64,
    pub rows: u64,
    /// In memory.
    pub bytes: u64,
    /// On disk, where the edge must not block its sender.
    pub spilled_bytes: u64,
    /// `None` where the edge never blocks its sender.
    pub capacity_rows: Option<u64>,
    /// How long the sender has waited for room, in all.
    pub blocked_seconds: f64,
    pub rows_total: u64,
}

#[derive(Debug, Clone, Serialize)]
pub struct RunStatus {
    pub flow: String,
    /// From 1; 0 before the first round.
    pub round: u32,
    pub rounds: u32,
    pub seconds: f64,
    /// Of the round under way, in topological order.
    pub stages: Vec<StageStatus>,
    pub edges: Vec<EdgeStatus>,
    /// The run has ended.
    pub ended: bool,
}
