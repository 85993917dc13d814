//! One attempt at a round: edges between its stages, and a task for each stage.

use std::collections::HashMap;
use std::panic::AssertUnwindSafe;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use datafusion::arrow::array::UInt64Array;
use futures::FutureExt;
use tokio_util::sync::CancellationToken;

use super::completion::Completion;
use super::context::{Input, Lane, Link, Output};
use super::edge::{EdgeMeter, EdgeSender, Full, Limit, edge};
use super::ledger::{Ledger, RoundView};
use super::meter::StageMeter;
use super::progress::Watermark;
use super::{Domain, Message, Runnable, StageContext, StageError, StageRegistry, table};
use crate::flow::{AdapterChoice, InputRef, PlannedInput, PlannedStage, Port, RoundPlan, StagePlan};
use crate::observe::StageState;

/// How long a stage that was cancelled may take to notice before its task is dropped.
const GRACE: Duration = Duration::from_secs(10);

/// The first stage that failed in this attempt; later failures are its consequences.
pub(super) type FirstFailure = Arc<Mutex<Option<(String, StageError)>>>;

/// A stage ready to run once.
pub(super) struct StageTask {
    kind: Arc<dyn Runnable>,
    plan: StagePlan,
    context: StageContext,
    meter: Arc<StageMeter>,
    ledger: Arc<Ledger>,
    first: FirstFailure,
}

/// The stages of one attempt, and what stops them all.
pub(super) struct Attempt {
    pub tasks: Vec<(String, StageTask)>,
    pub cancel: CancellationToken,
    pub first: FirstFailure,
}

impl Attempt {
    /// Connects the stages of a round and starts its books anew.
    pub fn open(
        rounds: &[RoundPlan],
        round: &RoundPlan,
        kinds: &StageRegistry,
        ledger: &Arc<Ledger>,
    ) -> Result<Self, StageError> {
        let cancel = ledger.cancel.child_token();
        let first = FirstFailure::default();
        let mut view = RoundView::default();
        let mut senders: HashMap<InputRef, Vec<EdgeSender>> = HashMap::new();
        let mut half = Vec::new();
        for stage in &round.stages {
            let meter = Arc::new(StageMeter::new(stage, &ledger.metrics, &ledger.trace));
            let link = Arc::new(Link {
                meter: meter.clone(),
                pause: ledger.pause.clone(),
                cancel: cancel.clone(),
                marks: Mutex::new(marks(stage)),
            });
            let inputs = connect(rounds, round.round, stage, &link, ledger, &cancel, &mut senders, &mut view);
            if inputs.is_empty() {
                view.sources.push(stage.spec.name.clone());
            }
            view.stages.push(meter.clone());
            half.push((stage, meter, link, inputs));
        }
        let mut tasks = Vec::new();
        for (stage, meter, link, inputs) in half {
            let kind = kinds.get(&stage.spec.kind).ok_or_else(|| {
                StageError::user(format!("stage `{}`: no kind `{}` is registered", stage.spec.name, stage.spec.kind))
            })?;
            let output = output(rounds, round, stage, link, ledger, &mut senders);
            let context = context(round.round, stage, inputs, output, ledger, &cancel)?;
            let (ledger, first, plan) = (ledger.clone(), first.clone(), stage.plan.clone());
            tasks.push((stage.spec.name.clone(), StageTask { kind, plan, context, meter, ledger, first }));
        }
        // Rows that are on disk in a directory that isn't would be lost with it.
        let dir = ledger.dir.stage(round.round, "");
        let at = |e: std::io::Error| StageError::external(format!("{}: {e}", dir.display()));
        table::sync_parent(&dir.join("stage")).and_then(|()| table::sync_parent(&dir)).map_err(at)?;
        let (edges, cancelled) = (view.edges.clone(), cancel.clone());
        tokio::spawn(async move {
            cancelled.cancelled().await;
            edges.iter().for_each(EdgeMeter::cancel);
        });
        ledger.begin_round(round.round, view);
        Ok(Self { tasks, cancel, first })
    }
}

fn ports(stage: &PlannedStage) -> Vec<Port> {
    match stage.plan.outputs.as_slice() {
        // A sink sends to nobody, but it completes rows all the same.
        [] => vec![Port { name: String::new(), schema: None, rows: None }],
        outputs => outputs.to_vec(),
    }
}

fn marks(stage: &PlannedStage) -> Vec<Watermark> {
    vec![Watermark::new(stage.inputs.len()); ports(stage).len()]
}

/// An edge that must never block its sender holds so much in memory; the rest waits on disk.
const BEFORE_DISK: Limit = Limit { rows: usize::MAX, bytes: 64 << 20 };

/// A stage of several inputs, one that needs the whole round before its first row, and one that
/// waits for an adapter made of the same rows would each stop a branch that the other side needs.
fn bound(round: u32, stage: &PlannedStage, ledger: &Ledger) -> (Limit, Full) {
    let of_this_round = |adapter: &AdapterChoice| match adapter {
        AdapterChoice::Current { .. } => true,
        AdapterChoice::Round { round: made, .. } => *made == round,
        AdapterChoice::Base | AdapterChoice::Previous { .. } | AdapterChoice::Earlier { .. } => false,
    };
    let waits_for_adapter = stage.plan.models.iter().any(|m| of_this_round(&m.adapter));
    if stage.inputs.len() == 1 && !stage.plan.waits_for_round && !waits_for_adapter {
        return (Limit::default(), Full::Block);
    }
    (BEFORE_DISK, Full::Spill(ledger.dir.stage(round, &stage.spec.name)))
}

/// Edges into one stage. An input whose stage doesn't run in this round is fed from its last table.
#[allow(clippy::too_many_arguments)]
fn connect(
    rounds: &[RoundPlan],
    round: u32,
    stage: &PlannedStage,
    link: &Arc<Link>,
    ledger: &Arc<Ledger>,
    cancel: &CancellationToken,
    senders: &mut HashMap<InputRef, Vec<EdgeSender>>,
    view: &mut RoundView,
) -> Vec<Input> {
    let mut inputs = Vec::new();
    for (index, planned) in stage.inputs.iter().enumerate() {
        let (input, from) = (&planned.input, &planned.input.from);
        let name = if from.port.is_empty() { from.stage.clone() } else { format!("{}.{}", from.stage, from.port) };
        let (limit, full) = bound(round, stage, ledger);
        let (sender, receiver) = edge(&name, &stage.spec.name, limit, full, &ledger.metrics, cancel);
        view.edges.push(sender.meter());
        if planned.round == round {
            senders.entry(from.clone()).or_default().push(sender);
        } else {
            let path = ledger.dir.stage(planned.round, &from.stage).join(table::file_name(&from.port));
            tokio::spawn(feed(path, sender));
        }
        let made = rounds.iter().find(|plan| plan.round == planned.round).and_then(|plan| plan.stage(&from.stage));
        inputs.push(Input {
            key: input.key.clone(),
            from: from.clone(),
            schema: input.schema.clone(),
            index,
            source: made.map_or_else(|| from.stage.clone(), |producer| producer.source.clone()),
            round: planned.round,
            edge: receiver,
            link: link.clone(),
            wait: format!("rows of {}", from.stage).into(),
        });
    }
    inputs
}

/// Sends a finished table; every row is complete with the last message.
async fn feed(path: std::path::PathBuf, mut sender: EdgeSender) {
    let result = tokio::task::spawn_blocking({
        let path = path.clone();
        move || table::read(Path::new(&path))
    });
    let batches = match result.await.map_err(std::io::Error::other).flatten() {
        Ok(batches) => batches,
        // The receiver sees a sender that went away; this line says why.
        Err(error) => {
            return tracing::error!(path = %path.display(), %error, "an earlier round's table can't be read");
        }
    };
    let mut completes: Vec<u64> = batches
        .iter()
        .filter_map(|b| b.column_by_name("_row")?.as_any().downcast_ref::<UInt64Array>())
        .flat_map(|rows| rows.values().to_vec())
        .collect();
    completes.sort_unstable();
    completes.dedup();
    for batch in batches {
        if sender.send(Message { batch: Some(batch), ..Message::default() }).await.is_err() {
            return;
        }
    }
    if sender.send(Message { batch: None, completes, watermark: u64::MAX }).await.is_ok() {
        sender.end();
    }
}

fn output(
    rounds: &[RoundPlan],
    round: &RoundPlan,
    stage: &PlannedStage,
    link: Arc<Link>,
    ledger: &Ledger,
    senders: &mut HashMap<InputRef, Vec<EdgeSender>>,
) -> Output {
    let lane = |port: Port| Lane {
        edges: senders
            .remove(&InputRef { stage: stage.spec.name.clone(), port: port.name.clone() })
            .unwrap_or_default(),
        name: port.name,
        schema: port.schema,
        table: None,
        watermark: 0,
        completion: Completion::default(),
    };
    // A source's rows lie in its own files; they are kept only where a later round reads them.
    let later = rounds.iter().filter(|r| r.round > round.round).flat_map(|r| &r.stages).flat_map(|s| &s.inputs);
    let reads_this = |i: &PlannedInput| i.round == round.round && i.input.from.stage == stage.spec.name;
    let keep = !stage.inputs.is_empty() || later.into_iter().any(reads_this);
    Output {
        lanes: ports(stage).into_iter().map(lane).collect(),
        link,
        follows: !stage.inputs.is_empty() && !stage.plan.waits_for_round,
        sends: !stage.plan.outputs.is_empty(),
        table: stage.spec.table,
        dir: (keep && stage.spec.table && !stage.plan.outputs.is_empty())
            .then(|| ledger.dir.stage(round.round, &stage.spec.name)),
    }
}

fn context(
    round: u32,
    stage: &PlannedStage,
    inputs: Vec<Input>,
    output: Output,
    ledger: &Arc<Ledger>,
    cancel: &CancellationToken,
) -> Result<StageContext, StageError> {
    let dir = ledger.dir.stage(round, &stage.spec.name);
    std::fs::create_dir_all(&dir).map_err(|e| StageError::external(format!("{}: {e}", dir.display())))?;
    Ok(StageContext {
        stage: stage.spec.name.clone(),
        flow: ledger.flow.clone(),
        round,
        rounds: ledger.rounds,
        seed: ledger.seed,
        deterministic: ledger.deterministic,
        dir,
        inputs,
        output,
        trace: ledger.trace.clone(),
        metrics: ledger.metrics.clone(),
        cancel: cancel.clone(),
        ledger: ledger.clone(),
        journal: None,
        source: stage.source.clone(),
    })
}

impl StageTask {
    /// Of the stage.
    pub fn kind_name(&self) -> &str {
        &self.meter.kind
    }

    /// Runs the stage to its end. On a failure the round is cancelled before the stage's edges
    /// are dropped, so the stages around it see a cancelled round, not a broken edge.
    pub async fn run(self) -> Result<(), StageError> {
        let Self { kind, plan, mut context, meter, ledger, first } = self;
        let (stage, round, cancel) = (context.stage.clone(), context.round, context.cancel.clone());
        meter.begin();
        let ran = run_stage(kind.as_ref(), &plan, &mut context).await;
        let result = match ran {
            Ok(()) => context.end_round().await.inspect_err(|e| note_failure(&first, &cancel, &stage, e)),
            Err(error) => {
                note_failure(&first, &cancel, &stage, &error);
                context.abandon().await;
                Err(error)
            }
        };
        let state = match &result {
            Ok(()) => StageState::Done,
            Err(e) if e.domain == Domain::Cancelled => StageState::Cancelled,
            Err(_) => StageState::Failed,
        };
        meter.end(state);
        meter.tell_span(&tracing::Span::current());
        ledger.tell(super::RunEvent::StageEnded { round, stage, state });
        result
    }
}

fn note_failure(first: &FirstFailure, cancel: &CancellationToken, stage: &str, error: &StageError) {
    if error.domain != Domain::Cancelled {
        first.lock().unwrap_or_else(|e| e.into_inner()).get_or_insert_with(|| (stage.into(), error.clone()));
    }
    cancel.cancel();
}

/// The stage's loop, with panics as errors and an end to a stage that doesn't hear a cancellation.
async fn run_stage(kind: &dyn Runnable, plan: &StagePlan, context: &mut StageContext) -> Result<(), StageError> {
    let mut stage = kind.open(&context.stage, plan)?;
    let cancel = context.cancel.clone();
    let out_of_patience = async {
        cancel.cancelled().await;
        tokio::time::sleep(GRACE).await;
    };
    let ran = async { AssertUnwindSafe(stage.run(context)).catch_unwind().await };
    tokio::select! {
        biased;
        result = ran => result.unwrap_or_else(|panic| Err(StageError::internal(panic_text(panic.as_ref())))),
        () = out_of_patience => Err(StageError::cancelled()),
    }
}

fn panic_text(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().copied().or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    format!("panicked: {}", text.unwrap_or("no message"))
}
