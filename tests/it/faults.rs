//! Stages that fail on the way: of every kind, in every manner, at points that a seed chooses.

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use flowrun::embed::{Engine, RunOptions};
use flowrun::engine::{Domain, Ending, Runnable, Stage, StageContext, StageError, StageRegistry, Summary};
use flowrun::flow::kind::Access;
use flowrun::flow::{CheckContext, Flow, FlowError, InputKey, StageKind, StagePlan, StageSpec};
use flowrun::llm::Models;
use flowrun::observe::Metrics;
use flowrun::stages;
use futures::future::BoxFuture;
use metrics::{Counter, Gauge, Histogram, Key, KeyName, Metadata, Recorder, SharedString, Unit};

use crate::support::Case;
use crate::whole::{Found, Random, Size, assert_once, journals, recorded};

const STAGES: [&str; 10] =
    ["prompts", "clean", "sample", "judge", "prefer", "likely", "ranked", "kept", "halves", "align"];

#[derive(Debug, Clone, Copy, PartialEq)]
enum Manner {
    Panic,
    Internal,
    External,
    User,
}

/// A stage fails once it has seen so many rows in and out in this attempt, or at its end.
#[derive(Debug, Clone, Copy)]
struct Fault {
    round: u32,
    stage: &'static str,
    rows: u64,
    manner: Manner,
}

/// Faults that are still to happen, one after the other, and the rows that stages have counted.
#[derive(Default)]
struct Faults {
    next: Mutex<VecDeque<Fault>>,
    happened: AtomicU64,
    rows: Mutex<BTreeMap<String, Arc<AtomicU64>>>,
}

impl Faults {
    fn due(&self, ctx: (&str, u32)) -> Option<Fault> {
        self.next.lock().unwrap().front().copied().filter(|fault| (fault.stage, fault.round) == ctx)
    }

    fn rows(&self, stage: &str) -> u64 {
        self.rows.lock().unwrap().get(stage).map_or(0, |rows| rows.load(SeqCst))
    }

    /// Waits until this stage is to fail.
    async fn wait(&self, stage: &str, round: u32) {
        let first = self.rows(stage);
        while self.due((stage, round)).is_none_or(|fault| self.rows(stage) < first + fault.rows) {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    /// Fails in the manner of the fault that is due, if one is.
    fn strike(&self, stage: &str, round: u32) -> Result<(), StageError> {
        let Some(fault) = self.due((stage, round)) else { return Ok(()) };
        self.next.lock().unwrap().pop_front();
        let text = format!("fault {} in {stage}", self.happened.fetch_add(1, SeqCst) + 1);
        match fault.manner {
            Manner::Panic => panic!("{text}"),
            Manner::Internal => Err(StageError::internal(text)),
            Manner::External => Err(StageError::external(text)),
            Manner::User => Err(StageError::user(text)),
        }
    }
}

/// A recorder that keeps what stages count of their rows.
struct Rows(Arc<Faults>);

impl Recorder for Rows {
    fn describe_counter(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}
    fn describe_gauge(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}
    fn describe_histogram(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}
    fn register_counter(&self, key: &Key, _: &Metadata<'_>) -> Counter {
        let stage = key.labels().find(|label| label.key() == "stage").map(|label| label.value().to_owned());
        match stage.filter(|_| key.name().starts_with("flowrun_stage_rows")) {
            Some(stage) => Counter::from_arc(self.0.rows.lock().unwrap().entry(stage).or_default().clone()),
            None => Counter::noop(),
        }
    }
    fn register_gauge(&self, _: &Key, _: &Metadata<'_>) -> Gauge {
        Gauge::noop()
    }
    fn register_histogram(&self, _: &Key, _: &Metadata<'_>) -> Histogram {
        Histogram::noop()
    }
}

/// A kind whose stages do what they always do, until they fail.
#[derive(Clone)]
struct Failing {
    inner: Arc<dyn Runnable>,
    faults: Arc<Faults>,
}

impl StageKind for Failing {
    fn name(&self) -> &'static str {
        self.inner.name()
    }
    fn inputs(&self) -> &'static [InputKey] {
        self.inner.inputs()
    }
    fn opens(&self, stage: &StageSpec) -> Vec<(&'static str, Access)> {
        self.inner.opens(stage)
    }
    fn check<'a>(&'a self, cx: CheckContext<'a>) -> BoxFuture<'a, Result<StagePlan, FlowError>> {
        self.inner.check(cx)
    }
}

impl Runnable for Failing {
    fn open(&self, stage: &str, plan: &StagePlan) -> Result<Box<dyn Stage>, StageError> {
        Ok(Box::new(FailingStage { inner: self.inner.open(stage, plan)?, faults: self.faults.clone() }))
    }
}

struct FailingStage {
    inner: Box<dyn Stage>,
    faults: Arc<Faults>,
}

impl Stage for FailingStage {
    fn run<'a>(&'a mut self, ctx: &'a mut StageContext) -> BoxFuture<'a, Result<(), StageError>> {
        Box::pin(async move {
            let (stage, round) = (ctx.stage.clone(), ctx.round);
            tokio::select! {
                biased;
                () = self.faults.wait(&stage, round) => {}
                ended = self.inner.run(ctx) => ended?,
            }
            self.faults.strike(&stage, round)
        })
    }
}

/// Runs the flow of `case` in its usual place while `faults` happen.
async fn run(case: &Case, faults: Arc<Faults>) -> Summary {
    hush();
    let text = std::fs::read_to_string(case.path("flow.toml")).unwrap();
    let flow: Flow = Engine::new().read(&text, case.dir.path()).unwrap();
    let metrics = Metrics::new(Arc::new(Rows(faults.clone())));
    let models = Models::new(flow.models.clone(), flow.base.clone(), Arc::default(), metrics.clone());
    let builtin: StageRegistry = stages::registry(Arc::new(models.with_devices(flow.devices.clone())));
    let mut engine = Engine::new();
    for name in builtin.names() {
        engine = engine.with_kind(Failing { inner: builtin.get(name).unwrap(), faults: faults.clone() });
    }
    let options = RunOptions::new(case.path("runs/tiny")).metrics(metrics);
    engine.start(&flow, options).await.unwrap().wait().await
}

/// Panics that are meant don't print where they came from.
fn hush() {
    static ONCE: std::sync::Once = std::sync::Once::new();
    ONCE.call_once(|| {
        let usual = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            let meant = panic.payload_as_str().is_some_and(|text| text.starts_with("fault "));
            if !meant {
                usual(panic);
            }
        }));
    });
}

fn faults(all: impl IntoIterator<Item = Fault>) -> Arc<Faults> {
    Arc::new(Faults { next: Mutex::new(all.into_iter().collect()), ..Faults::default() })
}

/// A run that nothing disturbs.
async fn undisturbed() -> Found {
    let case = Size::TINY.case();
    let summary = run(&case, Arc::default()).await;
    assert_eq!(summary.status, Ending::Done, "{:?}", summary.error);
    Found::of(&case.path("runs/tiny"))
}

fn assert_same(case: &Case, whole: &Found, after: &str) {
    let run = case.path("runs/tiny");
    recorded(&run).iter().for_each(|(path, rows)| assert_once(rows, &path.display().to_string()));
    assert_eq!(recorded(&run).len(), journals().count());
    Found::of(&run).assert_equals(whole, after);
}

#[tokio::test]
async fn a_stage_of_any_kind_may_panic_or_fail_and_the_run_ends_as_if_it_never_had() {
    let mut random = Random::seeded("FLOWRUN_FAULT_SEED");
    let whole = undisturbed().await;
    let mut all = Vec::new();
    let mut fault = |round, stage, manner| all.push(Fault { round, stage, rows: random.below(60), manner });
    for (number, stage) in STAGES.into_iter().enumerate() {
        fault(1, stage, Manner::Panic);
        fault(2, stage, if number.is_multiple_of(2) { Manner::External } else { Manner::Internal });
        // Twice in a round.
        if ["sample", "judge", "align"].contains(&stage) {
            fault(2, stage, Manner::Panic);
        }
    }
    all.sort_by_key(|fault| fault.round);
    let (case, number) = (Size::TINY.case(), all.len() as u64);
    let faults = faults(all);
    let summary = run(&case, faults.clone()).await;
    assert_eq!(summary.status, Ending::Done, "{:?}", summary.error);
    assert_eq!(faults.happened.load(SeqCst), number, "not done: {:?}", faults.next.lock().unwrap());
    assert_same(&case, &whole, "after faults in every stage");
}

#[tokio::test]
async fn a_stage_that_keeps_failing_ends_the_run_with_the_first_error_and_a_later_run_goes_on() {
    let whole = undisturbed().await;
    let case = Size::TINY.case();
    let always = |manner| Fault { round: 2, stage: "judge", rows: 20, manner };
    let spent = faults([Manner::External, Manner::Panic, Manner::Internal, Manner::Panic].map(always));
    let summary = run(&case, spent.clone()).await;
    assert_eq!((summary.status, spent.happened.load(SeqCst)), (Ending::Failed, 4), "three restarts and no more");
    let error = summary.error.unwrap();
    assert_eq!((error.stage.as_deref(), error.domain), (Some("judge"), Domain::External));
    assert!(error.message.contains("fault 1 in judge") && error.message.contains("goes on"), "{error}");
    assert_eq!(run(&case, Arc::default()).await.status, Ending::Done);
    assert_same(&case, &whole, "after a run that failed");
}

#[tokio::test]
async fn what_the_user_has_to_change_is_not_tried_again() {
    let whole = undisturbed().await;
    let case = Size::TINY.case();
    let wrong = faults([Fault { round: 1, stage: "likely", rows: 20, manner: Manner::User }]);
    let summary = run(&case, wrong.clone()).await;
    assert_eq!((summary.status, wrong.happened.load(SeqCst)), (Ending::Failed, 1));
    let error = summary.error.unwrap();
    assert_eq!((error.domain, error.to_string()), (Domain::User, "stage `likely`: fault 1 in likely".into()));
    assert_eq!(run(&case, Arc::default()).await.status, Ending::Done);
    assert_same(&case, &whole, "after a mistake was put right");
}
