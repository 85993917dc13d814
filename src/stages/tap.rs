//! `tap`: rows that the program which embeds flowrun takes out while the flow runs.

use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use datafusion::arrow::record_batch::RecordBatch;
use futures::Stream;
use futures::future::BoxFuture;
use serde::Deserialize;
use tokio::sync::{Mutex, mpsc};

use super::rows::{gather, join};
use crate::engine::{Runnable, Stage, StageContext, StageError};
use crate::flow::kind::{InputKey, ONE_INPUT};
use crate::flow::{CheckContext, FlowError, Form, StageKind, StagePlan};

/// Batches on their way to the program.
const AHEAD: usize = 1;

/// The rows of a stage of kind `tap`, as they arrive: all rows of one source row together, each
/// once, also where a round begins anew. A program that doesn't take them holds the flow up; one
/// that drops the tap lets it go on without.
pub struct Tap {
    receiver: mpsc::Receiver<(u32, RecordBatch)>,
}

impl Tap {
    /// The next rows with the round they are of; none once the run has ended.
    pub async fn next(&mut self) -> Option<(u32, RecordBatch)> {
        self.receiver.recv().await
    }
}

impl Stream for Tap {
    type Item = (u32, RecordBatch);

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.receiver.poll_recv(cx)
    }
}

/// The run's end of a tap.
#[derive(Clone)]
pub struct TapEnd {
    sender: mpsc::Sender<(u32, RecordBatch)>,
    /// By round, the source rows that the program has.
    delivered: Arc<Mutex<BTreeMap<u32, crate::engine::RowSet>>>,
}

/// Two ends of a tap.
pub fn tap() -> (TapEnd, Tap) {
    let (sender, receiver) = mpsc::channel(AHEAD);
    (TapEnd { sender, delivered: Arc::default() }, Tap { receiver })
}

/// The kind `tap`.
#[derive(Default)]
pub struct TapKind {
    /// By stage.
    pub taps: BTreeMap<String, TapEnd>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Options {}

impl StageKind for TapKind {
    fn name(&self) -> &'static str {
        "tap"
    }

    fn inputs(&self) -> &'static [InputKey] {
        ONE_INPUT
    }

    fn check<'a>(&'a self, cx: CheckContext<'a>) -> BoxFuture<'a, Result<StagePlan, FlowError>> {
        Box::pin(async move { check(&cx, &self.taps) })
    }
}

fn check(cx: &CheckContext<'_>, taps: &BTreeMap<String, TapEnd>) -> Result<StagePlan, FlowError> {
    let Options {} = cx.options()?;
    let end = taps.get(&cx.stage.name).ok_or_else(|| {
        cx.error("kind", "gives its rows to a program that embeds flowrun, and there is none")
            .help("write a file with kind = \"sink\"")
    })?;
    Ok(StagePlan {
        outputs: Vec::new(),
        waits_for_round: false,
        new_rows: false,
        models: Vec::new(),
        trains: None,
        fingerprint: Form::Unset,
        notes: vec!["rows go to the program".into()],
        options: Arc::new(end.clone()),
    })
}

impl Runnable for TapKind {
    fn open(&self, stage: &str, plan: &StagePlan) -> Result<Box<dyn Stage>, StageError> {
        let end = plan.options.clone().downcast::<TapEnd>();
        let end = end.map_err(|_| StageError::internal(format!("{stage}: opened with another kind's options")))?;
        Ok(Box::new(TapStage { end }))
    }
}

struct TapStage {
    end: Arc<TapEnd>,
}

impl Stage for TapStage {
    fn run<'a>(&'a mut self, ctx: &'a mut StageContext) -> BoxFuture<'a, Result<(), StageError>> {
        Box::pin(run(&self.end, ctx))
    }
}

async fn run(end: &TapEnd, ctx: &mut StageContext) -> Result<(), StageError> {
    let mut gathered = BTreeMap::new();
    let mut delivered = end.delivered.lock().await;
    let delivered = delivered.entry(ctx.round).or_default();
    while let Some(message) = ctx.input("input").recv().await? {
        let complete = gather(&mut gathered, message)?;
        let new: Vec<(u64, RecordBatch)> = complete
            .into_iter()
            .filter(|(row, _)| !delivered.contains(*row))
            .filter_map(|(row, rows)| Some((row, rows?)))
            .collect();
        if new.is_empty() {
            continue;
        }
        let batches: Vec<RecordBatch> = new.iter().map(|(_, rows)| rows.clone()).collect();
        let batch = join(&batches)?;
        let sent = tokio::select! {
            biased;
            () = ctx.cancel.cancelled() => return Err(StageError::cancelled()),
            sent = end.sender.send((ctx.round, batch)) => sent,
        };
        // A program that has enough has no place to put them; the flow goes on.
        if sent.is_ok() {
            delivered.extend(new.into_iter().map(|(row, _)| row));
        }
    }
    Ok(())
}
