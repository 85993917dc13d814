//! `feed`: rows that the program which embeds flowrun sends in while the flow runs.
//!
//! The feed's rows go into a journal, because nobody can ask a program for a row again: a round
//! that begins anew takes them from there. In a run that is resumed by another process, the
//! program sends its rows from the first one on, as a file would be read again; those that are the
//! same as recorded are reused.

use std::collections::BTreeMap;
use std::sync::Arc;

use datafusion::arrow::array::UInt64Array;
use datafusion::arrow::datatypes::SchemaRef;
use datafusion::arrow::record_batch::RecordBatch;
use futures::future::BoxFuture;
use serde::Deserialize;
use tokio::sync::{Mutex, mpsc};

use super::rows::input_hashes;
use crate::data::batch::{self, ROW};
use crate::engine::{Finished, Runnable, Shard, Stage, StageContext, StageError};
use crate::flow::kind::InputKey;
use crate::flow::{Canonical, CheckContext, FlowError, Form, Port, StageKind, StagePlan};

/// Batches on their way from the program to its stage; the flow's own edges hold the rest.
const AHEAD: usize = 1;

/// Two ends of a feed of rows of this schema. The first is the program's; the second goes into
/// [`RunOptions::feed`](crate::embed::RunOptions::feed).
///
/// Column names don't begin with an underscore; strings of any Arrow type arrive as `Utf8`.
pub fn feed(schema: SchemaRef) -> (Feeder, Feed) {
    let (sender, receiver) = mpsc::channel(AHEAD);
    let inner = Inner { receiver, sent: Vec::new() };
    (Feeder { sender }, Feed { schema, inner: Arc::new(Mutex::new(inner)) })
}

/// Sends rows into a run. Dropping it ends the feed.
pub struct Feeder {
    sender: mpsc::Sender<RecordBatch>,
}

impl Feeder {
    /// Waits while the run has no room for more rows.
    ///
    /// # Errors
    /// Gives the batch back where the run is over, or doesn't want more.
    pub async fn send(&self, batch: RecordBatch) -> Result<(), RecordBatch> {
        self.sender.send(batch).await.map_err(|e| e.0)
    }
}

/// The run's end of a feed.
#[derive(Clone)]
pub struct Feed {
    schema: SchemaRef,
    inner: Arc<Mutex<Inner>>,
}

struct Inner {
    receiver: mpsc::Receiver<RecordBatch>,
    /// Hash of every row that came through, for a round that begins anew.
    sent: Vec<u64>,
}

/// The kind `feed`.
#[derive(Default)]
pub struct FeedKind {
    /// By stage.
    pub feeds: BTreeMap<String, Feed>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Options {}

impl StageKind for FeedKind {
    fn name(&self) -> &'static str {
        "feed"
    }

    fn inputs(&self) -> &'static [InputKey] {
        &[]
    }

    fn check<'a>(&'a self, cx: CheckContext<'a>) -> BoxFuture<'a, Result<StagePlan, FlowError>> {
        Box::pin(async move { check(&cx, &self.feeds) })
    }
}

fn check(cx: &CheckContext<'_>, feeds: &BTreeMap<String, Feed>) -> Result<StagePlan, FlowError> {
    let Options {} = cx.options()?;
    let feed = feeds.get(&cx.stage.name).ok_or_else(|| {
        cx.error("kind", "takes its rows from a program that embeds flowrun, and there is none")
            .help("read a file with kind = \"source\"")
    })?;
    if cx.flow.rounds > 1 && cx.stage.in_rounds.as_deref() != Some(&[1]) {
        return Err(cx.error("in_rounds", "a feed gives its rows once").help("write in_rounds = [1]"));
    }
    if let Some(name) = feed.schema.fields().iter().map(|f| f.name()).find(|name| name.starts_with('_')) {
        return Err(cx.error("kind", format!("its column `{name}` begins with _, which is the engine's")));
    }
    let schema = batch::schema_with(&batch::plain_schema(&feed.schema), ROW, arrow_u64());
    Ok(StagePlan {
        outputs: vec![Port { name: String::new(), schema: Some(schema), rows: None }],
        waits_for_round: false,
        new_rows: false,
        models: Vec::new(),
        trains: None,
        fingerprint: Form::Unset,
        notes: vec!["rows come from the program".into()],
        options: Arc::new(feed.clone()),
    })
}

fn arrow_u64() -> datafusion::arrow::datatypes::DataType {
    datafusion::arrow::datatypes::DataType::UInt64
}

impl Runnable for FeedKind {
    fn open(&self, stage: &str, plan: &StagePlan) -> Result<Box<dyn Stage>, StageError> {
        let feed = plan.options.clone().downcast::<Feed>();
        let feed = feed.map_err(|_| StageError::internal(format!("{stage}: opened with another kind's options")))?;
        Ok(Box::new(FeedStage { feed, fingerprint: plan.fingerprint.clone() }))
    }
}

struct FeedStage {
    feed: Arc<Feed>,
    fingerprint: Form,
}

impl Stage for FeedStage {
    fn run<'a>(&'a mut self, ctx: &'a mut StageContext) -> BoxFuture<'a, Result<(), StageError>> {
        Box::pin(run(&self.feed, &self.fingerprint, ctx))
    }
}

async fn run(feed: &Feed, fingerprint: &Form, ctx: &mut StageContext) -> Result<(), StageError> {
    let mut inner = feed.inner.lock().await;
    let parts = [("fingerprint", fingerprint.clone()), ("stage", ctx.stage.form()), ("round", ctx.round.form())];
    ctx.open_journal(&Form::table(parts).key())?;
    // How many there will be is known when the program drops its end.
    ctx.set_shard(Shard { index: 0, count: 1, contiguous: false, total: u64::MAX });
    for (row, hash) in inner.sent.iter().zip(0u64..).map(|(hash, row)| (row, *hash)) {
        let recorded = ctx.recorded(row, hash);
        let rows = recorded.ok_or_else(|| StageError::user(format!("row {row} of the feed is not in its journal")))?;
        ctx.replay(row, rows).await?;
    }
    loop {
        let batch = tokio::select! {
            biased;
            () = ctx.cancel.cancelled() => return Err(StageError::cancelled()),
            batch = inner.receiver.recv() => batch,
        };
        let Some(batch) = batch.filter(|b| b.num_rows() > 0) else {
            if inner.receiver.is_closed() && inner.receiver.is_empty() { return Ok(()) } else { continue }
        };
        take(feed, &mut inner.sent, ctx, &batch).await?;
    }
}

/// Numbers the rows of a batch and sends them on; those that are recorded as they are count as reused.
async fn take(feed: &Feed, sent: &mut Vec<u64>, ctx: &mut StageContext, rows: &RecordBatch) -> Result<(), StageError> {
    let first = sent.len() as u64;
    let rows = batch::align(rows, &batch::plain_schema(&feed.schema))?;
    let hashes = input_hashes(&rows)?;
    let numbers = UInt64Array::from_iter_values(first..first + rows.num_rows() as u64);
    let rows = batch::with_column(&rows, ROW, Arc::new(numbers))?;
    let known: Vec<bool> = (first..).zip(&hashes).map(|(row, hash)| ctx.recorded(row, *hash).is_some()).collect();
    sent.extend(&hashes);
    // Batches are recorded whole, so what is known of one is its beginning or all of it.
    let known = known.iter().take_while(|known| **known).count();
    for at in 0..known {
        ctx.replay(first + at as u64, Some(rows.slice(at, 1))).await?;
    }
    if known == rows.num_rows() {
        return Ok(());
    }
    let finished: Vec<Finished> =
        (first..).zip(&hashes).skip(known).map(|(row, hash)| Finished { row, input_hash: *hash, rows: 1 }).collect();
    ctx.finish_all(&finished, Some(rows.slice(known, rows.num_rows() - known))).await
}
