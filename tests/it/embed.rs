//! flowrun inside another program.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::time::Duration;

use flowrun::arrow::array::{ArrayRef, AsArray, StringArray, StringViewArray};
use flowrun::arrow::datatypes::SchemaRef;
use flowrun::arrow::record_batch::RecordBatch;
use flowrun::embed::{Engine, Feeder, FlowBuilder, Policy, RunOptions, Tap, feed};
use flowrun::engine::{Ending, RunEvent, RunHandle, Runnable, Stage, StageContext, StageError};
use flowrun::flow::kind::ONE_INPUT;
use flowrun::flow::{CheckContext, Flow, FlowError, Form, InputKey, Port, StageKind, StagePlan};
use flowrun::observe::prometheus;
use flowrun::stages::rows::each_row;
use futures::future::BoxFuture;
use serde_json::json;
use tempfile::TempDir;

use crate::support::tiny_flow;

const PATIENCE: Duration = Duration::from_secs(60);

fn texts(range: std::ops::Range<usize>) -> RecordBatch {
    let column: ArrayRef = Arc::new(StringViewArray::from_iter_values(range.map(|i| format!("text {i}"))));
    RecordBatch::try_from_iter([("prompt", column)]).unwrap()
}

fn schema() -> SchemaRef {
    texts(0..0).schema()
}

fn read(batch: &RecordBatch, column: &str) -> Vec<String> {
    let column: StringArray = batch.column_by_name(column).unwrap().as_string::<i32>().clone();
    column.iter().map(|text| text.unwrap().to_owned()).collect()
}

/// A kind of the program's own: upper case, one row at a time, under a journal.
#[derive(Clone, Default)]
struct Upper {
    calls: Arc<AtomicUsize>,
    /// Panics at this call, once.
    panics_at: usize,
}

impl StageKind for Upper {
    fn name(&self) -> &'static str {
        "upper"
    }
    fn inputs(&self) -> &'static [InputKey] {
        ONE_INPUT
    }
    fn check<'a>(&'a self, cx: CheckContext<'a>) -> BoxFuture<'a, Result<StagePlan, FlowError>> {
        let schema = cx.inputs.first().and_then(|input| input.schema.clone());
        Box::pin(async move {
            Ok(StagePlan {
                outputs: vec![Port { name: String::new(), schema, rows: None }],
                waits_for_round: false,
                new_rows: false,
                models: Vec::new(),
                trains: None,
                fingerprint: Form::Unset,
                notes: Vec::new(),
                options: Arc::new(()),
            })
        })
    }
}

impl Runnable for Upper {
    fn open(&self, _: &str, _: &StagePlan) -> Result<Box<dyn Stage>, StageError> {
        Ok(Box::new(self.clone()))
    }
}

impl Stage for Upper {
    fn run<'a>(&'a mut self, ctx: &'a mut StageContext) -> BoxFuture<'a, Result<(), StageError>> {
        Box::pin(async move {
            ctx.open_journal("upper 1")?;
            let work = |_row, rows: RecordBatch| {
                let call = self.calls.fetch_add(1, SeqCst) + 1;
                assert!(call != self.panics_at, "call {call} is too much");
                async move {
                    let upper: ArrayRef =
                        Arc::new(StringArray::from_iter_values(read(&rows, "prompt").iter().map(|t| t.to_uppercase())));
                    let at = rows.schema().index_of("prompt").unwrap();
                    let mut columns = rows.columns().to_vec();
                    columns[at] = upper;
                    Ok(Some(RecordBatch::try_new(rows.schema(), columns).unwrap()))
                }
            };
            each_row(ctx, 16, work, |_| ()).await
        })
    }
}

/// Rows in, upper case, rows out.
fn through(engine: &Engine) -> Flow {
    FlowBuilder::new("through")
        .stage("rows", "feed", json!({}))
        .stage("loud", "upper", json!({ "input": "rows" }))
        .stage("out", "tap", json!({ "input": "loud" }))
        .build(".", engine)
        .unwrap()
}

async fn start(engine: &Engine, dir: &TempDir) -> (RunHandle, Feeder, Tap) {
    let (feeder, rows) = feed(schema());
    let mut options = RunOptions::new(dir.path().join("run")).feed("rows", rows);
    let tap = options.tap("out");
    (engine.start(&through(engine), options).await.unwrap(), feeder, tap)
}

/// Sends `count` rows, 25 at a time.
fn send(feeder: Feeder, count: usize) -> tokio::task::JoinHandle<()> {
    tokio::spawn(async move {
        for first in (0..count).step_by(25) {
            feeder.send(texts(first..count.min(first + 25))).await.unwrap();
        }
    })
}

async fn all(tap: &mut Tap) -> Vec<String> {
    let mut rows = Vec::new();
    while let Some((round, batch)) = tap.next().await {
        assert_eq!(round, 1);
        rows.extend(read(&batch, "prompt"));
    }
    rows
}

fn loud(count: usize) -> Vec<String> {
    (0..count).map(|i| format!("TEXT {i}")).collect()
}

async fn ended(run: &RunHandle) -> flowrun::engine::Summary {
    tokio::time::timeout(PATIENCE, run.wait()).await.expect("the run stands still")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rows_that_are_fed_in_come_out_and_a_second_run_reuses_them() {
    let dir = TempDir::new().unwrap();
    let kind = Upper::default();
    let engine = Engine::new().with_kind(kind.clone());
    let (run, feeder, mut tap) = start(&engine, &dir).await;
    send(feeder, 110).await.unwrap();
    assert_eq!(all(&mut tap).await, loud(110));
    let summary = ended(&run).await;
    assert_eq!(summary.status, Ending::Done);
    let rounds = summary.rounds().unwrap();
    assert_eq!((rounds[0].stages["loud"].rows_in, rounds[0].stages["loud"].reused_rows), (110, 0));
    let kept: usize = summary.table(1, "loud", "").unwrap().iter().map(RecordBatch::num_rows).sum();
    assert_eq!((kept, kind.calls.load(SeqCst)), (110, 110));
    assert!(summary.table(1, "nothing", "").unwrap_err().message.contains("nothing"));

    let (run, feeder, mut tap) = start(&engine, &dir).await;
    send(feeder, 130).await.unwrap();
    assert_eq!(all(&mut tap).await, loud(130));
    let rounds = ended(&run).await.rounds().unwrap();
    assert_eq!((rounds[0].stages["rows"].reused_rows, rounds[0].stages["loud"].reused_rows), (110, 110));
    assert_eq!(kind.calls.load(SeqCst), 130);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_round_that_begins_anew_gives_each_row_once() {
    let dir = TempDir::new().unwrap();
    let engine = Engine::new().with_kind(Upper { panics_at: 70, ..Upper::default() });
    let (run, feeder, mut tap) = start(&engine, &dir).await;
    let mut events = run.events();
    let sender = send(feeder, 200);
    assert_eq!(all(&mut tap).await, loud(200));
    sender.await.unwrap();
    assert_eq!(ended(&run).await.status, Ending::Done);
    let mut told = Vec::new();
    while let Some(event) = events.next().await {
        told.push(event);
    }
    assert!(told.iter().any(|e| matches!(e, RunEvent::Restarted { stage, .. } if stage == "loud")), "{told:?}");
    assert!(matches!(told.last(), Some(RunEvent::Ended { status: Ending::Done })));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_program_that_does_not_take_rows_holds_the_feed_up() {
    let dir = TempDir::new().unwrap();
    let engine = Engine::new().with_kind(Upper::default());
    let (run, feeder, mut tap) = start(&engine, &dir).await;
    // More than the edges of the flow hold.
    let mut accepted = 0;
    let wide = || texts(0..4000);
    while tokio::time::timeout(Duration::from_secs(3), feeder.send(wide())).await.is_ok() {
        accepted += 1;
        assert!(accepted < 20, "nothing held the feed up");
    }
    drop(feeder);
    let rows = all(&mut tap).await.len();
    assert!(rows == accepted * 4000 || rows == (accepted + 1) * 4000, "{rows} of {accepted} batches");
    assert_eq!(ended(&run).await.status, Ending::Done);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_paused_run_stands_still_and_goes_on() {
    let dir = TempDir::new().unwrap();
    let engine = Engine::new().with_kind(Upper::default());
    let (run, feeder, mut tap) = start(&engine, &dir).await;
    feeder.send(texts(0..5)).await.unwrap();
    let mut before = tap.next().await.unwrap().1.num_rows();
    run.pause();
    assert!(run.is_paused());
    let sender = send(feeder, 500);
    while let Ok(Some((_, batch))) = tokio::time::timeout(Duration::from_millis(500), tap.next()).await {
        before += batch.num_rows();
    }
    assert!(before < 500, "all rows came while the run was paused");
    run.resume();
    assert_eq!(before + all(&mut tap).await.len(), 505);
    sender.await.unwrap();
    assert_eq!(ended(&run).await.status, Ending::Done);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_runs_in_one_process_keep_apart() {
    let dirs = [TempDir::new().unwrap(), TempDir::new().unwrap()];
    let engine = Engine::new();
    let mut runs = Vec::new();
    for (dir, name) in dirs.iter().zip(["one", "two"]) {
        let lines: String = (0..10).map(|i| format!("{{\"prompt\": \"{name} {i}\"}}\n")).collect();
        std::fs::write(dir.path().join("prompts.jsonl"), lines).unwrap();
        let text = tiny_flow(1, "").replace("\"tiny\"", &format!("{name:?}"));
        let flow = engine.read(&text, dir.path()).unwrap();
        let (metrics, rendered) = prometheus::recorder(name).unwrap();
        let options = RunOptions::new(dir.path().join("run")).metrics(metrics);
        runs.push((name, engine.start(&flow, options).await.unwrap(), rendered));
    }
    for (name, run, rendered) in runs {
        let summary = ended(&run).await;
        assert_eq!(summary.status, Ending::Done, "{:?}", summary.error);
        let rounds = summary.rounds().unwrap();
        let train = rounds[0].train.as_ref().unwrap();
        assert!(train.steps > 0 && train.adapter.is_some() && train.last_loss.is_some(), "{train:?}");
        assert_eq!(rounds[0].stages["sample"].rows_out, 20);
        assert!(read(&summary.table(1, "sample", "").unwrap()[0], "prompt").iter().all(|p| p.starts_with(name)));
        let text = rendered.render();
        assert!(
            text.contains(&format!("flowrun_stage_rows_out_total{{flow=\"{name}\",stage=\"sample\"}} 20")),
            "{text}"
        );
    }
}

#[tokio::test]
async fn a_policy_limits_what_a_flow_may_open() {
    let dir = TempDir::new().unwrap();
    std::fs::write(dir.path().join("prompts.jsonl"), "{\"prompt\": \"a\"}\n").unwrap();
    let source = |dataset: &str| format!("[stages.rows]\nkind = \"source\"\ndataset = {dataset:?}\n");
    let engine = Engine::new().with_policy(Policy::nothing().read(dir.path()).host("huggingface.co"));
    let refused = |text: &str| engine.read(text, dir.path()).err().map(|e| e.to_string());
    assert_eq!(refused(&source("prompts.jsonl")), None);
    assert_eq!(refused(&source("hf://owner/name")), None);
    for (text, place, what) in [
        (source("/etc/passwd"), "flow.toml:3: stages.rows.dataset", "read /etc/passwd"),
        (source("../*/x.jsonl"), "flow.toml:3: stages.rows.dataset", "read ../*/x.jsonl"),
        (source("${HOME}/x.jsonl"), "flow.toml:3: stages.rows.dataset", "HOME"),
        (
            format!("{}[models.m]\nsource = \"/models/m\"\n", source("prompts.jsonl")),
            "models.m.source",
            "read /models/m",
        ),
        (
            format!(
                "{}[stages.out]\nkind = \"sink\"\ninput = \"rows\"\npath = \"/tmp/x.jsonl\"\n",
                source("prompts.jsonl")
            ),
            "stages.out.path",
            "write /tmp/x.jsonl",
        ),
    ] {
        let message = refused(&text).unwrap_or_else(|| panic!("allowed: {text}"));
        assert!(message.contains(place) && message.contains(what), "{message}");
    }
    let strict = Engine::new().with_policy(Policy::nothing());
    let flow = Flow::from_toml(&source("prompts.jsonl"), dir.path(), &[], &strict).unwrap();
    assert!(strict.plan(&flow).await.is_err(), "however the flow was read");
}

#[tokio::test]
async fn what_a_program_forgot_is_told() {
    let engine = Engine::new().with_kind(Upper::default());
    let flow = through(&engine);
    let error = engine.plan(&flow).await.unwrap_err().to_string();
    assert!(error.contains("stages.rows") && error.contains("program that embeds"), "{error}");
    let (_feeder, rows) = feed(schema());
    let options = RunOptions::new("unused").feed("row", rows);
    let error = engine.start(&flow, options).await.err().unwrap().to_string();
    assert!(error.contains("`row`"), "{error}");
}
