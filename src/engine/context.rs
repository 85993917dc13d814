//! What a stage sees of the engine while it runs one round. (Contract; the engine fills it in.)

use std::path::PathBuf;
use std::sync::Arc;

use datafusion::arrow::record_batch::RecordBatch;
use tokio_util::sync::CancellationToken;

use super::{Message, StageError};
use crate::flow::AdapterChoice;
use crate::observe::{Metrics, Trace};

/// An adapter on disk, known by its content.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AdapterRef {
    /// PEFT directory.
    pub dir: PathBuf,
    /// Hash of its weights and configuration, hex.
    pub hash: String,
    pub round: u32,
}

/// Where the rows of a round stand in their source.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shard {
    pub index: u64,
    pub count: u64,
    pub contiguous: bool,
    /// Rows of the source after `take`.
    pub total: u64,
}

pub struct StageContext {
    pub stage: String,
    pub flow: String,
    /// From 1.
    pub round: u32,
    pub rounds: u32,
    pub seed: u64,
    pub deterministic: bool,
    /// `RUN/round-R/STAGE`, exists.
    pub dir: PathBuf,
    pub inputs: Vec<Input>,
    pub output: Output,
    pub trace: Arc<Trace>,
    pub metrics: Metrics,
    pub cancel: CancellationToken,
}
// ---- the rest of this file is the contract in words; see below ----
// impl StageContext:
//   fn input(&mut self, key: &str) -> &mut Input            the first input under that key
//   async fn adapter(&self, choice: &AdapterChoice) -> Result<Option<AdapterRef>, StageError>   None = base; waits for Current
//   fn publish_adapter(&self, adapter: AdapterRef)          a trainer's product of this round
//   fn shard(&self) -> Option<Shard>                        of the source this stage descends from
//   fn set_shard(&self, shard: Shard)                       called by a source before its first message
//   fn open_journal(&mut self, content_key: &str) -> Result<(), StageError>   loads what is recorded under the same key; a record under another key moves to RUN/superseded
//   fn recorded(&mut self, row: u64, input_hash: u64) -> Option<Option<RecordBatch>>  Some(rows) where this input row was finished before (counted in reused_rows); consumes the entry
//   async fn finish(&mut self, row: u64, input_hash: u64, rows: Option<RecordBatch>) -> Result<(), StageError>  append to the journal, then send downstream with `completes = [row]`; watermark is kept by the context
//   async fn replay(&mut self, row: u64, rows: Option<RecordBatch>)   send a recorded result
//   async fn dead_letter(&mut self, row: u64, reason: &str, batch: &RecordBatch) -> Result<(), StageError>   records, completes the row; fails the run past max_dead_letters
//   fn event(&self, kind: &str, fields: serde_json::Value)  one line of metrics.jsonl
//   fn summary(&self, key: &str, value: serde_json::Value)  goes into this stage's (or with "train"/"judge" this round's) part of summary.json
//   fn heartbeat / add_tokens(&self, in: u64, out: u64)
// Input:  key: String, from: InputRef, schema: Option<SchemaRef>; async fn recv(&mut self) -> Result<Option<Message>, StageError>  (None = end of round; Err = cancelled)
// Output: async fn send(&mut self, port: &str, message: Message) -> Result<(), StageError>  (waits when an edge is full)
pub struct Input;
pub struct Output;
