//! The interface of the engine to a stage during one round.

use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};

use datafusion::arrow::array::{Array, UInt64Array};
use datafusion::arrow::datatypes::SchemaRef;
use datafusion::arrow::json::ArrayWriter as JsonWriter;
use datafusion::arrow::record_batch::RecordBatch;
use serde_json::Value;
use tokio_util::sync::CancellationToken;

use super::completion::{Breach, Completion};
use super::edge::{EdgeReceiver, EdgeSender, Received};
use super::journal::{Finished, Journal, Letter};
use super::ledger::Ledger;
use super::meter::StageMeter;
use super::pause::Pause;
use super::progress::Watermark;
use super::table::{self, TableWriter};
use super::{Message, StageError};
use crate::flow::{AdapterChoice, InputRef};
use crate::observe::{Metrics, Trace};

/// An adapter on disk, identified by a hash of its content.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AdapterRef {
    /// The PEFT directory.
    pub dir: PathBuf,
    /// Hash of the weights and the configuration, in hex.
    pub hash: String,
    pub round: u32,
}

/// Which rows of a source belong to a round.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shard {
    pub index: u64,
    pub count: u64,
    pub contiguous: bool,
    /// Number of rows of the source after `take`; `u64::MAX` if it is unknown.
    pub total: u64,
}

impl Shard {
    /// Number of rows of this shard; `None` if it is unknown.
    pub fn rows(&self) -> Option<u64> {
        let count = self.count.max(1);
        let rows = self.total / count + u64::from(self.index < self.total % count);
        (self.total < u64::MAX).then_some(rows)
    }
}

/// Gives the shard of a stage's rows; known once the first row has arrived.
#[derive(Clone)]
pub struct ShardOfRows {
    ledger: Arc<Ledger>,
    source: String,
    round: u32,
}

impl ShardOfRows {
    pub fn get(&self) -> Option<Shard> {
        self.ledger.shard(&self.source, self.round)
    }
}

pub struct StageContext {
    pub stage: String,
    pub flow: String,
    /// The round's number, from 1.
    pub round: u32,
    pub rounds: u32,
    pub seed: u64,
    pub deterministic: bool,
    /// The directory `RUN/round-R/STAGE`; it exists.
    pub dir: PathBuf,
    pub inputs: Vec<Input>,
    pub output: Output,
    pub trace: Arc<Trace>,
    pub metrics: Metrics,
    pub cancel: CancellationToken,
    pub(super) ledger: Arc<Ledger>,
    pub(super) journal: Option<Journal>,
    /// The source of this stage's rows; the stage itself if it is a source.
    pub(super) source: String,
}

impl StageContext {
    /// The first input under that key.
    ///
    /// # Panics
    /// Panics if the stage's kind declares no such key, or if the key is optional and absent from the flow. Look up
    /// optional keys in `inputs`.
    pub fn input(&mut self, key: &str) -> &mut Input {
        let stage = &self.stage;
        self.inputs.iter_mut().find(|i| i.key == key).unwrap_or_else(|| panic!("stage `{stage}` has no input `{key}`"))
    }

    /// Returns the adapter for `choice`; `None` is the base. [`AdapterChoice::Current`] waits until the trainer
    /// publishes an adapter or its round ends.
    pub async fn adapter(&self, choice: &AdapterChoice) -> Result<Option<AdapterRef>, StageError> {
        let (trainer, round, whatever_gates_say) = match choice {
            AdapterChoice::Base => return Ok(None),
            AdapterChoice::Previous { trainer } => (trainer, self.round - 1, false),
            AdapterChoice::Earlier { trainer, rounds } => (trainer, self.round.saturating_sub(*rounds), false),
            AdapterChoice::Current { trainer } => (trainer, self.round, true),
            AdapterChoice::Round { trainer, round } => (trainer, *round, true),
        };
        let adapters = &self.ledger.adapters;
        let found = async {
            if whatever_gates_say {
                adapters.get(trainer, round).await
            } else {
                adapters.accepted(trainer, round).await
            }
        };
        let _wait = self.output.link.meter.wait_for(format!("the adapter of {trainer}, round {round}").into());
        tokio::select! {
            biased;
            () = self.cancel.cancelled() => Err(StageError::cancelled()),
            adapter = found => Ok(adapter),
        }
    }

    /// Publishes the adapter that this trainer made; `adapter.round` is the current round.
    pub fn publish_adapter(&self, adapter: AdapterRef) {
        self.ledger.adapters.publish(&self.stage, adapter.round, adapter);
    }

    /// Rejects the adapter that `trainer` made in this round: later rounds use the adapter before it.
    pub fn reject_adapter(&self, trainer: &str) {
        self.ledger.adapters.reject(trainer, self.round);
    }

    /// Ends the run after this round, as `stopped_by_gate`.
    pub fn stop_after_round(&self, reason: String) {
        self.ledger.stop_after_round(reason);
    }

    /// The shard of this stage's source; known once the first message has arrived.
    pub fn shard(&self) -> Option<Shard> {
        self.ledger.shard(&self.source, self.round)
    }

    /// The shard of the source of input number `index`; known once its first message has arrived.
    pub fn shard_of_input(&self, index: usize) -> Option<Shard> {
        let input = self.inputs.get(index)?;
        self.ledger.shard(&input.source, input.round)
    }

    /// [`Self::shard`] as a handle, for tasks that have no context.
    pub fn shard_of_rows(&self) -> ShardOfRows {
        ShardOfRows { ledger: self.ledger.clone(), source: self.source.clone(), round: self.round }
    }

    /// Sets the shard. A source calls it before its first message; so does a stage that makes new rows.
    pub fn set_shard(&self, shard: Shard) {
        self.ledger.set_shard(&self.stage, self.round, shard);
    }

    /// Opens the stage's journal; call it before the first row. If the stage's directory was recorded under another
    /// key, it moves to `RUN/superseded`.
    pub fn open_journal(&mut self, content_key: &str) -> Result<(), StageError> {
        let path = self.dir.join("journal");
        let at = |e: io::Error| StageError::external(format!("{}: {e}", path.display()));
        if Journal::key(&path).map_err(at)?.is_some_and(|old| old != content_key) {
            self.ledger.dir.supersede_stage(self.round, &self.stage).map_err(at)?;
        }
        self.journal = Some(Journal::open(&path, content_key).map_err(at)?);
        self.output.dir = None;
        Ok(())
    }

    /// Returns `Some(rows)` if this row was finished before from the same input; `Some(None)` if it was filtered or
    /// is a dead letter. Send the result on with [`Self::replay`]. The entry is removed and counted as reused.
    pub fn recorded(&mut self, row: u64, input_hash: u64) -> Option<Option<RecordBatch>> {
        if self.recall_dead(row, input_hash) {
            return Some(None);
        }
        let rows = self.journal.as_mut()?.take(row, input_hash)?;
        self.output.link.meter.reused();
        Some(rows)
    }

    /// Records a finished row and sends its output rows on. `rows` is `None` if the row was filtered.
    pub async fn finish(&mut self, row: u64, input_hash: u64, rows: Option<RecordBatch>) -> Result<(), StageError> {
        if let Some(journal) = &mut self.journal {
            journal
                .append(row, input_hash, rows.as_ref())
                .map_err(|e| StageError::external(format!("{}: {e}", self.dir.join("journal").display())))?;
        }
        self.replay(row, rows).await
    }

    /// Records several finished rows and sends them on in one message. `rows` holds their output rows in the same
    /// order. This is much cheaper than [`Self::finish`] for each row.
    pub async fn finish_all(&mut self, finished: &[Finished], rows: Option<RecordBatch>) -> Result<(), StageError> {
        if let Some(journal) = &mut self.journal {
            journal
                .append_all(finished, rows.as_ref())
                .map_err(|e| StageError::external(format!("{}: {e}", self.dir.join("journal").display())))?;
        }
        let completes = finished.iter().map(|f| f.row).collect();
        let port = self.output.lanes.first().map(|l| l.name.clone()).unwrap_or_default();
        self.output.send(&port, Message { batch: rows, completes, watermark: 0 }).await
    }

    /// Sends a recorded result on.
    pub async fn replay(&mut self, row: u64, rows: Option<RecordBatch>) -> Result<(), StageError> {
        let port = self.output.lanes.first().map(|l| l.name.clone()).unwrap_or_default();
        self.output.send(&port, Message { batch: rows, completes: vec![row], watermark: 0 }).await
    }

    /// Makes a row a dead letter: stores it with the reason, and completes it without rows on every port. If the
    /// stage asks [`Self::recorded`] for the row, later runs do not try it again until `--retry-dead`.
    ///
    /// # Errors
    /// There are more dead letters than `max_dead_letters` allows; the run fails.
    pub async fn dead_letter(&mut self, row: u64, reason: &str, batch: &RecordBatch) -> Result<(), StageError> {
        self.dead_letter_under(row, row, reason, batch).await
    }

    /// [`Self::dead_letter`] for a row that is stored in the journal under `key`.
    pub async fn dead_letter_under(
        &mut self,
        key: u64,
        row: u64,
        reason: &str,
        batch: &RecordBatch,
    ) -> Result<(), StageError> {
        let letter = Letter { row, reason: self.ledger.told(reason), input: self.masked(&as_json(batch)) };
        self.record_dead(key, &letter)?;
        self.ledger.dead_letter(self.round, &self.stage, row, reason, letter.input);
        self.output.link.meter.dead_letter();
        if let Some(reason) = self.ledger.too_many_dead(self.round, false) {
            return Err(StageError::rows(reason));
        }
        let ports: Vec<String> = self.output.lanes.iter().map(|l| l.name.clone()).collect();
        for port in ports {
            self.output.send(&port, Message { batch: None, completes: vec![row], watermark: 0 }).await?;
        }
        Ok(())
    }

    /// Writes one line to `metrics.jsonl`, with time, round and stage.
    pub fn event(&self, kind: &str, fields: Value) {
        self.output.link.meter.beat();
        self.ledger.event(self.round, &self.stage, kind, fields);
    }

    /// Removes lines from `metrics.jsonl`: of this stage's lines of the round that have a `step`, only the first
    /// `lines` stay.
    pub fn forget_after(&self, lines: u64) -> Result<(), StageError> {
        let cut = self.ledger.forget_after(self.round, &self.stage, lines);
        cut.map_err(|e| StageError { domain: crate::engine::Domain::External, message: format!("metrics.jsonl: {e}") })
    }

    /// Adds `value` to `summary.json`, in this stage's part. The keys `train`, `judge` and `gate` go to the round's
    /// part, where objects with the same key are merged.
    pub fn summary(&self, key: &str, value: Value) {
        if matches!(key, "train" | "judge" | "gate") {
            self.ledger.round_summary(self.round, key, value);
        } else {
            self.output.link.meter.set(key, value);
        }
    }

    /// Waits while the run is paused. Inputs and outputs already wait; a stage that works long without using them
    /// calls this between its steps.
    pub async fn unpaused(&self) {
        self.output.link.unpaused().await;
    }

    /// Reports the share of the round's work that is done, from 0 to 1. It is for a stage whose row counts do not
    /// show it. The share of the first call counts as done before this execution.
    pub fn progress(&self, share: f64) {
        self.output.link.meter.set_share(share);
    }

    /// Reports that all rows have arrived and were looked at; for a stage that calls [`Self::progress`].
    pub fn rows_are_done(&self) {
        self.output.link.meter.completed_all();
    }

    /// Reports that the stage is alive; for a stage that works long without rows, tokens or device work.
    pub fn heartbeat(&self) {
        self.output.link.meter.beat();
    }

    /// Reports how many rows are in work, for a stage that waits for input at the same time. If such a stage makes no
    /// progress it is reported as stalled.
    pub fn works_on(&self, rows: usize) {
        self.output.link.meter.works_on(rows);
    }

    /// Returns a counter for tasks that have no context.
    pub fn token_counter(&self) -> TokenCounter {
        TokenCounter(self.output.link.meter.clone())
    }
}

/// Counts the tokens that a model read and produced for a stage.
#[derive(Clone)]
pub struct TokenCounter(Arc<StageMeter>);

impl TokenCounter {
    pub fn add(&self, tokens_in: u64, tokens_out: u64) {
        self.0.add_tokens(tokens_in, tokens_out);
    }
}

/// What the inputs and the output of one stage share.
pub(super) struct Link {
    pub meter: Arc<StageMeter>,
    pub pause: Arc<Pause>,
    pub cancel: CancellationToken,
    /// One watermark for each port: a row that is complete on one port may still be open on another.
    pub marks: Mutex<Vec<Watermark>>,
}

impl Link {
    /// Waits while the run is paused; returns at once if the round is cancelled.
    async fn unpaused(&self) {
        if !self.pause.is_on() {
            return;
        }
        let _wait = self.meter.wait_for("the run to be resumed".into());
        tokio::select! {
            () = self.cancel.cancelled() => {}
            () = self.pause.over() => {}
        }
    }

    fn marks(&self) -> MutexGuard<'_, Vec<Watermark>> {
        self.marks.lock().unwrap_or_else(|e| e.into_inner())
    }
}

/// One input of a stage.
pub struct Input {
    pub key: String,
    pub from: InputRef,
    pub schema: Option<SchemaRef>,
    pub(super) index: usize,
    /// The source of its rows, and the round in which they were made.
    pub(super) source: String,
    pub(super) round: u32,
    pub(super) edge: EdgeReceiver,
    pub(super) link: Arc<Link>,
    /// The text shown as "waits for" while the stage waits on this input.
    pub(super) wait: Arc<str>,
}

impl Input {
    /// Returns the next message; `None` at the end of the round; an error if the round is cancelled or the sender
    /// failed. Cancel safe.
    pub async fn recv(&mut self) -> Result<Option<Message>, StageError> {
        self.link.unpaused().await;
        let message = match self.edge.take() {
            Received::Message(message) => Some(message),
            Received::End => None,
            Received::Failed(error) => return Err(error),
            Received::Empty | Received::Broken => {
                let _wait = self.link.meter.wait_for(self.wait.clone());
                self.edge.recv().await?
            }
        };
        match &message {
            Some(message) => self.note(message),
            None => self.link.marks().iter_mut().for_each(|mark| mark.ended(self.index)),
        }
        Ok(message)
    }

    fn note(&self, message: &Message) {
        self.link.meter.received(message.rows());
        let rows = message.batch.as_ref().and_then(row_numbers);
        let rows = rows.map_or(&[][..], |rows| rows.values().as_ref());
        for mark in self.link.marks().iter_mut() {
            mark.received(self.index, rows, &message.completes, message.watermark);
        }
    }
}

/// The outputs of a stage.
///
/// If the stage opened no journal, its tables are written here while the rows are sent.
pub struct Output {
    pub(super) lanes: Vec<Lane>,
    pub(super) link: Arc<Link>,
    /// True if the watermark is computed from the inputs and the completed rows. False for a source, which sets its
    /// own, and for a stage that waits for the round and may renumber its rows.
    pub(super) follows: bool,
    /// False for a stage without outputs; its completed rows are not checked.
    pub(super) sends: bool,
    /// True if a table is written (`table = true`).
    pub(super) table: bool,
    /// Directory for tables; `None` if the table is made from a journal or no table is kept.
    pub(super) dir: Option<PathBuf>,
}

/// One port with its consumers.
pub(super) struct Lane {
    pub name: String,
    pub schema: Option<SchemaRef>,
    pub edges: Vec<EdgeSender>,
    pub table: Option<TableWriter>,
    pub watermark: u64,
    pub completion: Completion,
}

impl Output {
    /// Sends `message` to every consumer of the port; waits while an edge is full. Every row must be in `completes`
    /// exactly once in a round. `watermark` is used only for a stage without inputs.
    ///
    /// # Errors
    /// The round is cancelled, the table can't be written, the stage has no such port, or a row is not completed
    /// exactly once.
    pub async fn send(&mut self, port: &str, mut message: Message) -> Result<(), StageError> {
        let index = self.lanes.iter().position(|l| l.name == port);
        let lane = index.and_then(|i| self.lanes.get_mut(i).map(|l| (i, l)));
        let Some((index, lane)) = lane else {
            return Err(StageError::internal(format!("`{}` has no output `{port}`", self.link.meter.name)));
        };
        if index == 0 {
            self.link.meter.completed(message.completes.len());
        }
        if self.sends {
            let rows = message.batch.as_ref().and_then(row_numbers).map_or(&[][..], |rows| rows.values().as_ref());
            lane.completion.sent(rows, &message.completes).map_err(|e| broken(&self.link, e))?;
        }
        if let Some(mark) = self.link.marks().get_mut(index) {
            let stranger = mark.completed(&message.completes).filter(|_| self.follows && self.sends);
            if let Some(row) = stranger {
                let stage = &self.link.meter.name;
                return Err(StageError::internal(format!("`{stage}` completed row {row}, which did not come in")));
            }
            if self.follows {
                message.watermark = mark.low();
            }
        }
        lane.watermark = lane.watermark.max(message.watermark);
        message.watermark = lane.watermark;
        if let (Some(dir), Some(batch)) = (&self.dir, &message.batch) {
            lane.keep(dir, batch).map_err(|e| StageError::external(format!("{}: {e}", dir.display())))?;
        }
        self.link.meter.sent(message.rows());
        // An edge that spills never waits, and a task that never waits keeps its thread to itself.
        tokio::task::coop::consume_budget().await;
        self.link.unpaused().await;
        let Some((last, others)) = lane.edges.split_last_mut() else { return Ok(()) };
        for edge in others {
            pass(edge, message.clone(), &self.link.meter).await?;
        }
        pass(last, message, &self.link.meter).await
    }
}

fn broken(link: &Link, breach: Breach) -> StageError {
    StageError::internal(format!("`{}` {breach}", link.meter.name))
}

async fn pass(edge: &mut EdgeSender, message: Message, meter: &StageMeter) -> Result<(), StageError> {
    let Some(back) = edge.offer(message)? else { return Ok(()) };
    let _wait = meter.wait_for(edge.wait());
    edge.send(back).await
}

impl Lane {
    fn keep(&mut self, dir: &std::path::Path, batch: &RecordBatch) -> io::Result<()> {
        if self.table.is_none() {
            self.table = Some(TableWriter::create(&dir.join(table::file_name(&self.name)), batch.schema())?);
        }
        self.table.as_mut().map_or(Ok(()), |t| t.write(batch))
    }

    /// Ends the round on this port and completes its table. Without rows it writes an empty table if the schema is
    /// known, else it removes an old table. Blocks.
    fn seal(self, dir: Option<&PathBuf>) -> io::Result<()> {
        match (self.table, dir) {
            (Some(table), _) => table.finish(),
            (None, Some(dir)) => empty_table(&dir.join(table::file_name(&self.name)), self.schema),
            (None, None) => Ok(()),
        }
    }

    /// Removes a table of an earlier execution, for a stage that keeps none; it could be taken for a current one.
    fn forget(&self, dir: &std::path::Path) -> io::Result<()> {
        empty_table(&dir.join(table::file_name(&self.name)), None)
    }
}

fn empty_table(path: &std::path::Path, schema: Option<SchemaRef>) -> io::Result<()> {
    match schema {
        Some(schema) => TableWriter::create(path, schema)?.finish(),
        None => match std::fs::remove_file(path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
            _ => Ok(()),
        },
    }
}

impl StageContext {
    /// Checks that every received row was completed or given up, and that every sent row was completed.
    ///
    /// The check is skipped for a stage that waits for the round (received rows) and for a stage without outputs.
    fn check_rows(&self) -> Result<(), StageError> {
        if !self.output.sends {
            return Ok(());
        }
        for lane in &self.output.lanes {
            lane.completion.end().map_err(|breach| broken(&self.output.link, breach))?;
        }
        if !self.output.follows {
            return Ok(());
        }
        let stage = &self.stage;
        match self.output.link.marks().iter().find(|mark| mark.low() < u64::MAX) {
            None => Ok(()),
            Some(mark) => Err(StageError::internal(match mark.open() {
                Some(row) => {
                    format!("`{stage}` ended without row {row}: it came in, and was neither completed nor given up")
                }
                None => format!("`{stage}` ended before its inputs did"),
            })),
        }
    }

    /// Called when the stage has finished its round: ends every edge, then writes the tables.
    pub(super) async fn end_round(mut self) -> Result<(), StageError> {
        let dir = self.dir.clone();
        self.check_rows()?;
        for lane in &mut self.output.lanes {
            lane.edges.drain(..).for_each(EdgeSender::end);
        }
        let sealed = tokio::task::spawn_blocking(move || self.seal()).await;
        sealed
            .unwrap_or_else(|e| Err(io::Error::other(e)))
            .map_err(|e| StageError::external(format!("{}: the tables can't be written: {e}", dir.display())))
    }

    fn seal(self) -> io::Result<()> {
        let Self { output, journal, dir, .. } = self;
        let mut lanes = output.lanes.into_iter();
        if let Some(journal) = journal {
            let lane = lanes.next();
            let port = lane.as_ref().map_or("", |l| l.name.as_str());
            let path = dir.join(table::file_name(port));
            match (output.table, lane) {
                (true, lane) => {
                    if !journal.seal(&path)? {
                        empty_table(&path, lane.and_then(|l| l.schema))?;
                    }
                }
                (false, Some(lane)) => lane.forget(&dir)?,
                (false, None) => {}
            }
            return journal.close();
        }
        if output.dir.is_none() {
            return lanes.try_for_each(|lane| lane.forget(&dir));
        }
        lanes.try_for_each(|lane| lane.seal(output.dir.as_ref()))
    }

    /// Called when the stage did not finish: syncs its journal to disk.
    pub(super) async fn abandon(self) {
        let Some(journal) = self.journal else { return };
        let closed = tokio::task::spawn_blocking(move || journal.close()).await;
        if let Err(error) = closed.unwrap_or_else(|e| Err(io::Error::other(e))) {
            tracing::warn!(stage = self.stage, %error, "the journal could not be synced");
        }
    }
}

/// Returns the `_row` column.
fn row_numbers(batch: &RecordBatch) -> Option<&UInt64Array> {
    batch.column_by_name("_row")?.as_any().downcast_ref()
}

/// Returns the rows as a JSON array, or the writer's error message if JSON can't hold them.
fn as_json(batch: &RecordBatch) -> String {
    let mut writer = JsonWriter::new(Vec::new());
    match writer.write(batch).and_then(|()| writer.finish()) {
        Ok(()) => String::from_utf8_lossy(&writer.into_inner()).into_owned(),
        Err(error) => Value::from(error.to_string()).to_string(),
    }
}
