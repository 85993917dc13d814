//! Whole runs of toy stages: a source of numbers, stages that double them, joins and a sink.

use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

use datafusion::arrow::array::{ArrayRef, UInt64Array};
use datafusion::arrow::record_batch::RecordBatch;
use futures::future::BoxFuture;
use serde_json::json;

use super::*;
use crate::engine::{Domain, Message, Runnable, Shard, Stage, StageContext, StageError, table};
use crate::flow::{
    AdapterChoice, CheckContext, FlowError, Form, InputKey, InputPlan, InputRef, ModelUse, PlannedInput, PlannedStage,
    Port, StageKind, StagePlan, StageSpec,
};

type Body = Arc<dyn for<'a> Fn(&'a mut StageContext) -> BoxFuture<'a, Result<(), StageError>> + Send + Sync>;

/// A kind whose stages run one function.
struct Toy(&'static str, Body);

impl StageKind for Toy {
    fn name(&self) -> &'static str {
        self.0
    }
    fn inputs(&self) -> &'static [InputKey] {
        &[]
    }
    fn check<'a>(&'a self, cx: CheckContext<'a>) -> BoxFuture<'a, Result<StagePlan, FlowError>> {
        Box::pin(async move { Err(cx.error("kind", "toys are not checked")) })
    }
}

impl Runnable for Toy {
    fn open(&self, _: &str, _: &StagePlan) -> Result<Box<dyn Stage>, StageError> {
        Ok(Box::new(ToyStage(self.1.clone())))
    }
}

struct ToyStage(Body);

impl Stage for ToyStage {
    fn run<'a>(&'a mut self, ctx: &'a mut StageContext) -> BoxFuture<'a, Result<(), StageError>> {
        (self.0)(ctx)
    }
}

fn batch(rows: &[u64], factor: u64) -> RecordBatch {
    let keys: ArrayRef = Arc::new(UInt64Array::from(rows.to_vec()));
    let values: ArrayRef = Arc::new(UInt64Array::from_iter_values(rows.iter().map(|r| r * factor)));
    RecordBatch::try_from_iter([("_row", keys), ("x", values)]).unwrap()
}

fn column(batch: &RecordBatch, name: &str) -> Vec<u64> {
    batch.column_by_name(name).unwrap().as_any().downcast_ref::<UInt64Array>().unwrap().values().to_vec()
}

/// Sends `count` numbers, ten a message.
fn numbers(count: u64) -> Toy {
    Toy(
        "numbers",
        Arc::new(move |ctx| {
            Box::pin(async move {
                ctx.set_shard(Shard { index: 0, count: 1, contiguous: false, total: count });
                for first in (0..count).step_by(10) {
                    let rows: Vec<u64> = (first..count.min(first + 10)).collect();
                    let watermark = first + rows.len() as u64;
                    let batch = Some(batch(&rows, 1));
                    ctx.output.send("", Message { batch, completes: rows, watermark }).await?;
                }
                Ok(())
            })
        }),
    )
}

/// Doubles each number under a journal; `before` is called ahead of each one that is computed.
fn double(
    before: impl for<'a> Fn(&'a mut StageContext, u64) -> BoxFuture<'a, Result<bool, StageError>> + Send + Sync + 'static,
) -> Toy {
    let before = Arc::new(before);
    Toy(
        "double",
        Arc::new(move |ctx| {
            let before = before.clone();
            Box::pin(async move {
                ctx.open_journal("double-1")?;
                while let Some(message) = ctx.input("input").recv().await? {
                    for row in message.completes {
                        if let Some(rows) = ctx.recorded(row, row) {
                            ctx.replay(row, rows).await?;
                        } else if before(ctx, row).await? {
                            ctx.finish(row, row, Some(batch(&[row], 2))).await?;
                        }
                    }
                }
                Ok(())
            })
        }),
    )
}

/// Passes on what comes in.
fn pass() -> Toy {
    Toy(
        "pass",
        Arc::new(|ctx| {
            Box::pin(async move {
                while let Some(message) = ctx.input("input").recv().await? {
                    ctx.output.send("", message).await?;
                }
                Ok(())
            })
        }),
    )
}

/// Reads its left input to the end before it looks at the right one.
fn join() -> Toy {
    Toy(
        "join",
        Arc::new(|ctx| {
            Box::pin(async move {
                for side in ["left", "right"] {
                    while let Some(message) = ctx.input(side).recv().await? {
                        let completes = if side == "left" { Vec::new() } else { message.completes };
                        ctx.output
                            .send("", Message { completes, ..Message { batch: message.batch, ..Message::default() } })
                            .await?;
                    }
                }
                Ok(())
            })
        }),
    )
}

type Seen = Arc<Mutex<Vec<(u64, u64)>>>;

fn sink(seen: &Seen) -> Toy {
    let seen = seen.clone();
    Toy(
        "sink",
        Arc::new(move |ctx| {
            let seen = seen.clone();
            Box::pin(async move {
                let mut low = 0;
                while let Some(message) = ctx.input("input").recv().await? {
                    assert!(message.watermark >= low, "a watermark fell");
                    if let Some(batch) = &message.batch {
                        let rows = column(batch, "_row");
                        assert!(rows.iter().all(|r| *r >= low), "a row came below the watermark");
                        seen.lock().unwrap().extend(rows.into_iter().zip(column(batch, "x")));
                    }
                    low = message.watermark;
                }
                Ok(())
            })
        }),
    )
}

fn stage(name: &str, kind: &str, inputs: &[(&str, &str)], key: &str) -> PlannedStage {
    let input = |(key, from): &(&str, &str)| PlannedInput {
        input: InputPlan {
            key: (*key).into(),
            from: InputRef { stage: (*from).into(), port: String::new() },
            schema: None,
            rows: None,
        },
        round: 0,
    };
    let outputs = match kind {
        "sink" | "trainer" | "sampler" | "gate" => Vec::new(),
        _ => vec![Port { name: String::new(), schema: None, rows: None }],
    };
    PlannedStage {
        spec: StageSpec {
            name: name.into(),
            kind: kind.into(),
            inputs: Vec::new(),
            in_rounds: None,
            table: true,
            options: toml::Table::new(),
        },
        inputs: inputs.iter().map(input).collect(),
        plan: StagePlan {
            outputs,
            waits_for_round: false,
            new_rows: false,
            models: Vec::new(),
            trains: None,
            fingerprint: Form::Unset,
            notes: Vec::new(),
            options: Arc::new(()),
        },
        source: "numbers".into(),
        key: key.into(),
        parts: Form::Unset,
    }
}

fn line(key: &str) -> Vec<PlannedStage> {
    vec![
        stage("numbers", "numbers", &[], "n"),
        stage("double", "double", &[("input", "numbers")], key),
        stage("sink", "sink", &[("input", "double")], "s"),
    ]
}

/// Every input reads the last round in which its stage runs.
fn plan_inputs(rounds: &mut [RoundPlan]) {
    let mut last = BTreeMap::new();
    for round in rounds {
        last.extend(round.stages.iter().map(|s| (s.spec.name.clone(), round.round)));
        for input in round.stages.iter_mut().flat_map(|s| &mut s.inputs) {
            input.round = last[&input.input.from.stage];
        }
    }
}

fn config(dir: &Path, rounds: Vec<Vec<PlannedStage>>, kinds: Vec<Toy>) -> RunConfig {
    let mut registry = StageRegistry::default();
    kinds.into_iter().for_each(|kind| registry.register(kind));
    let mut rounds: Vec<RoundPlan> = rounds
        .into_iter()
        .zip(1..)
        .map(|(stages, round)| RoundPlan { round, stages, consumers: BTreeMap::new() })
        .collect();
    plan_inputs(&mut rounds);
    RunConfig {
        rounds,
        flow_name: "toy".into(),
        flow_text: "name = \"toy\"\n".into(),
        dir: dir.join("run"),
        date: None,
        fresh: false,
        recompute: false,
        retry_dead: false,
        fork_of: None,
        registry,
        metrics: Metrics::default(),
        trace: Arc::default(),
        seed: 0,
        deterministic: false,
        max_dead_letters: 0.05,
        stall_after: Duration::from_millis(100),
        init_adapters: BTreeMap::new(),
        quotas: Quotas::default(),
        seat: None,
        masks: Arc::default(),
        open_ended: false,
    }
}

async fn finish(config: RunConfig) -> Summary {
    let run = Run::new(config).unwrap().start();
    tokio::time::timeout(Duration::from_secs(20), run.wait()).await.expect("the run stands still")
}

fn doubled(count: u64) -> Vec<(u64, u64)> {
    (0..count).map(|r| (r, 2 * r)).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_rounds_leave_tables_and_a_summary() {
    let dir = tempfile::tempdir().unwrap();
    let seen = Seen::default();
    let kinds = vec![numbers(95), double(|_, _| Box::pin(async { Ok(true) })), sink(&seen)];
    let summary = finish(config(dir.path(), vec![line("d"), line("d")], kinds)).await;
    assert_eq!(summary.status, Ending::Done, "{:?}", summary.error);
    let mut twice = [doubled(95), doubled(95)].concat();
    twice.sort_unstable();
    seen.lock().unwrap().sort_unstable();
    assert_eq!(*seen.lock().unwrap(), twice);
    let table = table::read(&summary.dir.join("round-2/double/rows.parquet")).unwrap();
    assert_eq!(
        table.iter().flat_map(|b| column(b, "x")).collect::<Vec<_>>(),
        (0..95).map(|r| 2 * r).collect::<Vec<_>>()
    );
    assert!(!summary.dir.join("round-1/numbers/rows.parquet").exists(), "a source's rows lie in its own files");
    let written: serde_json::Value =
        serde_json::from_slice(&std::fs::read(summary.dir.join("summary.json")).unwrap()).unwrap();
    assert_eq!(written["status"], "done");
    let part = &written["rounds"][1]["stages"]["double"];
    assert_eq!((&part["rows_in"], &part["rows_out"], &part["reused_rows"]), (&json!(95), &json!(95), &json!(0)));
    assert!(written["peak_rss_bytes"].as_u64().unwrap() > 0);
    for file in ["trace.json", "dead_letters.parquet", "metrics.jsonl", "flow.toml", "plan.json"] {
        assert!(summary.dir.join(file).exists(), "{file}");
    }
    for entry in std::fs::read_dir(&summary.dir).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        assert!(crate::engine::names::is_own(&name), "{name} is in no list of a run's names");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_interrupted_run_goes_on_without_computing_a_recorded_row_again() {
    let dir = tempfile::tempdir().unwrap();
    let work = Arc::new(AtomicUsize::new(0));
    let counting = |stop_at: usize| {
        let work = work.clone();
        double(move |ctx, _| {
            let stop = work.fetch_add(1, SeqCst) + 1 == stop_at;
            Box::pin(async move {
                if stop {
                    ctx.ledger.cancel.cancel();
                    ctx.cancel.cancelled().await;
                    return Err(StageError::cancelled());
                }
                Ok(true)
            })
        })
    };
    let seen = Seen::default();
    let summary = finish(config(dir.path(), vec![line("d")], vec![numbers(100), counting(43), sink(&seen)])).await;
    assert_eq!(summary.status, Ending::Interrupted);
    assert_eq!(work.swap(0, SeqCst), 43);
    seen.lock().unwrap().clear();
    let summary = finish(config(dir.path(), vec![line("d")], vec![numbers(100), counting(1000), sink(&seen)])).await;
    assert_eq!(summary.status, Ending::Done, "{:?}", summary.error);
    assert_eq!(work.load(SeqCst), 58, "42 rows were recorded");
    assert_eq!(summary.json["rounds"][0]["stages"]["double"]["reused_rows"], 42);
    assert_eq!(*seen.lock().unwrap(), doubled(100));
}

#[tokio::test]
async fn a_panic_starts_the_round_again_from_its_journals() {
    let dir = tempfile::tempdir().unwrap();
    let work = Arc::new(AtomicUsize::new(0));
    let counted = work.clone();
    let fragile = double(move |_, _| {
        assert!(counted.fetch_add(1, SeqCst) != 20, "the twenty-first row is too much");
        Box::pin(async { Ok(true) })
    });
    let seen = Seen::default();
    let run = Run::new(config(dir.path(), vec![line("d")], vec![numbers(50), fragile, sink(&seen)])).unwrap().start();
    let mut events = run.events();
    let summary = run.wait().await;
    assert_eq!(summary.status, Ending::Done, "{:?}", summary.error);
    assert_eq!(work.load(SeqCst), 51, "only the row that failed is tried twice");
    assert_eq!(summary.json["rounds"][0]["stages"]["double"]["reused_rows"], 20);
    let mut told = Vec::new();
    while let Some(event) = events.next().await {
        told.push(event);
    }
    let restarted = |e: &RunEvent| matches!(e, RunEvent::Restarted { stage, reason, .. } if stage == "double" && reason.contains("too much"));
    assert!(told.iter().any(restarted));
    assert!(matches!(told.first(), Some(RunEvent::RoundStarted { round: 1 })) && told.len() > 3, "{told:?}");
    assert!(run.status().ended);
}

#[tokio::test]
async fn what_a_failed_attempt_took_stays_counted() {
    let dir = tempfile::tempdir().unwrap();
    let tries = Arc::new(AtomicUsize::new(0));
    let slow_and_fragile = double(move |_, _| {
        let first = tries.fetch_add(1, SeqCst) == 0;
        Box::pin(async move {
            if first {
                tokio::time::sleep(Duration::from_millis(400)).await;
                return Err(StageError::external("not yet"));
            }
            Ok(true)
        })
    });
    let (metrics, handle) = crate::observe::prometheus::recorder("toy").unwrap();
    let kinds = vec![numbers(5), slow_and_fragile, sink(&Seen::default())];
    let summary = finish(RunConfig { metrics, ..config(dir.path(), vec![line("d")], kinds) }).await;
    assert_eq!(summary.status, Ending::Done, "{:?}", summary.error);
    let waited = || {
        let text = crate::observe::prometheus::render(&handle);
        let line = "flowrun_stage_wait_seconds_total{flow=\"toy\",stage=\"sink\"} ";
        text.lines().find_map(|l| l.strip_prefix(line)?.parse::<f64>().ok()).unwrap_or(0.0)
    };
    // The second attempt alone took no time; the figures are brought up to date once more after the end.
    for _ in 0..100 {
        if waited() >= 0.4 {
            return;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    panic!("{} s", waited());
}

#[tokio::test]
async fn the_first_error_is_kept_and_a_users_error_is_not_tried_again() {
    let dir = tempfile::tempdir().unwrap();
    let tries = Arc::new(AtomicUsize::new(0));
    let counted = tries.clone();
    let broken = double(move |_, row| {
        counted.fetch_add(1, SeqCst);
        Box::pin(async move { Err(StageError::user(format!("row {row} has no prompt"))) })
    });
    let summary = finish(config(dir.path(), vec![line("d")], vec![numbers(50), broken, sink(&Seen::default())])).await;
    let error = summary.error.unwrap();
    assert_eq!((summary.status, error.domain, error.stage.as_deref()), (Ending::Failed, Domain::User, Some("double")));
    assert_eq!(error.message, "row 0 has no prompt");
    assert_eq!(tries.load(SeqCst), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_diamond_does_not_deadlock() {
    let dir = tempfile::tempdir().unwrap();
    let stages = vec![
        stage("numbers", "numbers", &[], "n"),
        stage("left", "pass", &[("input", "numbers")], "l"),
        stage("right", "pass", &[("input", "numbers")], "r"),
        stage("join", "join", &[("left", "left"), ("right", "right")], "j"),
        stage("sink", "sink", &[("input", "join")], "s"),
    ];
    let seen = Seen::default();
    // Far more rows than an edge holds.
    let summary = finish(config(dir.path(), vec![stages], vec![numbers(9000), pass(), join(), sink(&seen)])).await;
    assert_eq!(summary.status, Ending::Done, "{:?}", summary.error);
    assert_eq!(seen.lock().unwrap().len(), 18_000);
    let rows: usize =
        table::read(&summary.dir.join("round-1/left/rows.parquet")).unwrap().iter().map(RecordBatch::num_rows).sum();
    assert_eq!(rows, 9000, "a stage without a journal has its table all the same");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stage_that_hangs_is_reported_and_one_that_waits_is_not() {
    let dir = tempfile::tempdir().unwrap();
    let hangs = double(|_, row| {
        Box::pin(async move {
            if row == 30 {
                tokio::time::sleep(Duration::from_millis(600)).await;
            }
            Ok(true)
        })
    });
    let run = Run::new(config(dir.path(), vec![line("d")], vec![numbers(50), hangs, sink(&Seen::default())]))
        .unwrap()
        .start();
    let mut events = run.events();
    assert_eq!(run.wait().await.status, Ending::Done);
    let mut stalled = Vec::new();
    while let Some(event) = events.next().await {
        if let RunEvent::Stalled { stage, seconds, .. } = event {
            stalled.push((stage, seconds >= 0.1));
        }
    }
    assert_eq!(stalled, [("double".to_owned(), true)], "once, and not the sink that waits for it");
}

#[tokio::test]
async fn dead_letters_are_kept_and_too_many_stop_the_run() {
    let giving_up_every = |n: u64| {
        double(move |ctx, row| {
            Box::pin(async move {
                if row % n == 0 {
                    ctx.dead_letter(row, "too long", &batch(&[row], 1)).await?;
                }
                Ok(row % n != 0)
            })
        })
    };
    let dir = tempfile::tempdir().unwrap();
    let seen = Seen::default();
    let summary =
        finish(config(dir.path(), vec![line("d")], vec![numbers(100), giving_up_every(25), sink(&seen)])).await;
    assert_eq!(summary.status, Ending::Done, "{:?}", summary.error);
    assert_eq!(seen.lock().unwrap().len(), 96);
    let dead = table::read(&summary.dir.join("dead_letters.parquet")).unwrap();
    assert_eq!(dead.iter().flat_map(|b| column(b, "_row")).collect::<Vec<_>>(), [0, 25, 50, 75]);

    let dir = tempfile::tempdir().unwrap();
    let summary =
        finish(config(dir.path(), vec![line("d")], vec![numbers(100), giving_up_every(10), sink(&seen)])).await;
    assert_eq!(summary.status, Ending::Failed);
    let message = summary.error.unwrap().message;
    assert!(message.contains("6 of 100 source rows") && message.contains("(6): too long"), "{message}");

    // Those that there is room for stay given up, and the sixth is asked for again; then nothing is left to do, and then
    // all are asked for.
    for (retry_dead, sent, rows) in [(false, 95, 95), (false, 0, 95), (true, 99, 99)] {
        seen.lock().unwrap().clear();
        let kinds = vec![numbers(100), giving_up_every(1000), sink(&seen)];
        let summary = finish(RunConfig { retry_dead, ..config(dir.path(), vec![line("d")], kinds) }).await;
        assert_eq!(summary.status, Ending::Done, "{:?}", summary.error);
        assert_eq!(seen.lock().unwrap().len(), sent);
        let dead = table::read(&summary.dir.join("dead_letters.parquet")).unwrap();
        assert_eq!(dead.iter().map(RecordBatch::num_rows).sum::<usize>(), 100 - rows);
    }
}

#[tokio::test]
async fn finished_work_under_another_plan_key_needs_a_word() {
    let dir = tempfile::tempdir().unwrap();
    let kinds = || vec![numbers(10), double(|_, _| Box::pin(async { Ok(true) })), sink(&Seen::default())];
    finish(config(dir.path(), vec![line("one")], kinds())).await;
    let error = Run::new(config(dir.path(), vec![line("two")], kinds())).err().unwrap();
    assert_eq!(error.domain, Domain::User);
    assert!(error.message.contains("double (round 1)") && error.message.contains("--recompute"), "{error}");
    let again = RunConfig { recompute: true, ..config(dir.path(), vec![line("two")], kinds()) };
    assert_eq!(
        finish(again).await.json["rounds"][0]["stages"]["double"]["reused_rows"],
        10,
        "the content key is the same"
    );
    let fresh = RunConfig { fresh: true, ..config(dir.path(), vec![line("two")], kinds()) };
    assert_eq!(finish(fresh).await.json["rounds"][0]["stages"]["double"]["reused_rows"], 0);
}

#[tokio::test]
async fn a_stage_that_sits_out_a_round_is_read_from_its_last_table() {
    let dir = tempfile::tempdir().unwrap();
    let seen = Seen::default();
    let second = vec![
        stage("double", "double", &[("input", "numbers")], "d"),
        stage("sink", "sink", &[("input", "double")], "s"),
    ];
    let kinds = vec![numbers(30), double(|_, _| Box::pin(async { Ok(true) })), sink(&seen)];
    let summary = finish(config(dir.path(), vec![line("d"), second], kinds)).await;
    assert_eq!(summary.status, Ending::Done, "{:?}", summary.error);
    assert_eq!(seen.lock().unwrap().len(), 60);
}

/// Trains nothing for a moment and publishes an adapter named after its round.
fn trainer() -> Toy {
    Toy(
        "trainer",
        Arc::new(|ctx| {
            Box::pin(async move {
                while ctx.input("input").recv().await?.is_some() {}
                tokio::time::sleep(Duration::from_millis(20)).await;
                let hash = format!("adapter {}", ctx.round);
                ctx.publish_adapter(AdapterRef { dir: ctx.dir.join("adapter"), hash, round: ctx.round });
                ctx.summary("train", json!({"steps": 1}));
                Ok(())
            })
        }),
    )
}

type Asked = Arc<Mutex<Vec<(String, u32, Option<String>)>>>;

/// Asks for the adapter its plan names, then reads its input to the end.
fn client(name: &'static str, choice: AdapterChoice, asked: &Asked) -> Toy {
    let asked = asked.clone();
    Toy(
        name,
        Arc::new(move |ctx| {
            let (asked, choice) = (asked.clone(), choice.clone());
            Box::pin(async move {
                let adapter = ctx.adapter(&choice).await?;
                asked.lock().unwrap().push((ctx.stage.clone(), ctx.round, adapter.map(|a| a.hash)));
                while ctx.input("input").recv().await?.is_some() {}
                Ok(())
            })
        }),
    )
}

#[tokio::test]
async fn round_two_has_the_adapter_of_round_one_and_a_round_without_training_keeps_it() {
    let (previous, current) =
        (AdapterChoice::Previous { trainer: "align".into() }, AdapterChoice::Current { trainer: "align".into() });
    let mut align = stage("align", "trainer", &[("input", "numbers")], "a");
    align.plan.trains = Some("policy".into());
    let mut gate = stage("gate", "gate", &[("input", "numbers")], "g");
    let uses = ModelUse { model: "policy".into(), devices: Vec::new(), adapter: current.clone(), chat: false };
    gate.plan.models = vec![uses];
    let sampler = stage("sample", "sampler", &[("input", "numbers")], "p");
    let trained = vec![stage("numbers", "numbers", &[], "n"), sampler, align, gate];
    let untrained = trained.iter().filter(|s| s.spec.name != "align").cloned().collect();
    let rounds = vec![trained.clone(), trained, untrained];
    let asked = Asked::default();
    let kinds = vec![numbers(5000), trainer(), client("sampler", previous, &asked), client("gate", current, &asked)];
    let dir = tempfile::tempdir().unwrap();
    let start = AdapterRef { dir: "init".into(), hash: "start".into(), round: 0 };
    let summary = finish(RunConfig {
        init_adapters: BTreeMap::from([("align".into(), start)]),
        ..config(dir.path(), rounds, kinds)
    })
    .await;
    assert_eq!(summary.status, Ending::Done, "{:?}", summary.error);
    assert_eq!(summary.json["rounds"][1]["train"]["steps"], 1);
    let mut asked = asked.lock().unwrap().clone();
    asked.sort();
    let expected = [
        ("gate", 1, "adapter 1"),
        ("gate", 2, "adapter 2"),
        ("gate", 3, "adapter 2"),
        ("sample", 1, "start"),
        ("sample", 2, "adapter 1"),
        ("sample", 3, "adapter 2"),
    ];
    assert_eq!(asked, expected.map(|(stage, round, hash)| (stage.to_owned(), round, Some(hash.to_owned()))));
}

/// The error of a run whose middle stage is `body`.
async fn broken_by(body: Body) -> String {
    let dir = tempfile::tempdir().unwrap();
    let kinds = vec![numbers(40), Toy("double", body), sink(&Seen::default())];
    let summary = finish(config(dir.path(), vec![line("d")], kinds)).await;
    assert_eq!(summary.status, Ending::Failed);
    let error = summary.error.unwrap();
    assert_eq!((error.domain, error.stage.as_deref()), (Domain::Internal, Some("double")));
    error.message
}

/// Sends what comes in on, after `change` had it.
fn changing(change: fn(&mut Message)) -> Body {
    Arc::new(move |ctx| {
        Box::pin(async move {
            while let Some(mut message) = ctx.input("input").recv().await? {
                change(&mut message);
                ctx.output.send("", message).await?;
            }
            Ok(())
        })
    })
}

#[tokio::test]
async fn a_stage_that_loses_a_row_or_names_one_twice_is_named_with_it() {
    let swallows: fn(&mut Message) = |message| {
        message.batch = None;
        message.completes.retain(|row| *row != 17);
    };
    let forgets: fn(&mut Message) = |message| message.completes.retain(|row| *row != 17);
    let repeats: fn(&mut Message) = |message| {
        if message.completes.contains(&20) {
            message.completes.push(3);
        }
    };
    let invents: fn(&mut Message) = |message| message.completes.push(message.completes[0] + 100);
    let stops: Body = Arc::new(|ctx| {
        Box::pin(async move {
            let Some(message) = ctx.input("input").recv().await? else { return Ok(()) };
            ctx.output.send("", message).await
        })
    });
    // Each is tried again some times; together that takes no longer.
    let bodies = [changing(swallows), changing(forgets), changing(repeats), changing(invents), stops];
    let errors = futures::future::join_all(bodies.map(broken_by)).await;
    for (error, part) in errors.iter().zip([
        "`double` ended without row 17",
        "`double` sent row 17 and never completed it",
        "`double` completed row 3 twice",
        "`double` completed row 100, which did not come in",
        "`double` ended before its inputs did",
    ]) {
        assert!(error.contains(part), "{error}");
    }
}

/// Reads all inputs to their ends, in their order, then sends the rows of the first.
fn collector() -> Toy {
    Toy(
        "collector",
        Arc::new(|ctx| {
            Box::pin(async move {
                let mut first = Vec::new();
                for (place, input) in ctx.inputs.iter_mut().enumerate() {
                    while let Some(message) = input.recv().await? {
                        if place == 0 {
                            first.push(message);
                        }
                    }
                }
                for message in first {
                    ctx.output.send("", message).await?;
                }
                Ok(())
            })
        }),
    )
}

/// Waits for the adapter that its plan names, then passes on what comes in.
fn waiter() -> Toy {
    Toy(
        "waiter",
        Arc::new(|ctx| {
            Box::pin(async move {
                // The trainer's name is part of the stage's: toys see no plan.
                let trainer = ctx.stage.split_once('_').map(|(_, trainer)| trainer.to_owned()).unwrap();
                ctx.adapter(&AdapterChoice::Round { trainer, round: 1 }).await?;
                while let Some(message) = ctx.input("input").recv().await? {
                    ctx.output.send("", message).await?;
                }
                Ok(())
            })
        }),
    )
}

/// A node of a random graph: its kind, and the nodes before it that it reads.
#[derive(Debug, Clone)]
enum Node {
    Numbers(u64),
    Pass(usize),
    Join(Vec<usize>),
    Trainer(usize),
    /// Reads a node and waits for the adapter of a trainer.
    Waiter(usize, usize),
    Sink(usize),
}

/// Any choice of numbers is an acyclic graph: each names nodes before its own.
fn graph(choices: &[(u8, usize, usize, u64)]) -> Vec<Node> {
    let mut nodes = vec![Node::Numbers(9000)];
    for (kind, a, b, rows) in choices {
        let senders: Vec<usize> =
            (0..nodes.len()).filter(|i| !matches!(nodes[*i], Node::Trainer(_) | Node::Sink(_))).collect();
        let trainers: Vec<usize> = (0..nodes.len()).filter(|i| matches!(nodes[*i], Node::Trainer(_))).collect();
        let (first, second) = (senders[a % senders.len()], senders[b % senders.len()]);
        nodes.push(match kind % 7 {
            0 => Node::Numbers(1 + rows % 12_000),
            1 => Node::Pass(first),
            2 | 3 if first != second => Node::Join(vec![first, second]),
            4 => Node::Trainer(first),
            5 if !trainers.is_empty() => Node::Waiter(first, trainers[b % trainers.len()]),
            _ => Node::Sink(first),
        });
    }
    let read: Vec<usize> = nodes.iter().flat_map(inputs_of).collect();
    let open: Vec<usize> = (0..nodes.len())
        .filter(|i| !read.contains(i) && !matches!(nodes[*i], Node::Trainer(_) | Node::Sink(_)))
        .collect();
    nodes.extend(open.into_iter().map(Node::Sink));
    nodes
}

fn inputs_of(node: &Node) -> Vec<usize> {
    match node {
        Node::Numbers(_) => Vec::new(),
        Node::Join(all) => all.clone(),
        Node::Pass(a) | Node::Trainer(a) | Node::Waiter(a, _) | Node::Sink(a) => vec![*a],
    }
}

/// Rows that come out of a node: those of its first input.
fn rows_of(nodes: &[Node], node: usize) -> u64 {
    match &nodes[node] {
        Node::Numbers(rows) => *rows,
        other => rows_of(nodes, inputs_of(other)[0]),
    }
}

fn name(nodes: &[Node], node: usize) -> String {
    match &nodes[node] {
        Node::Waiter(_, trainer) => format!("n{node}_{}", name(nodes, *trainer)),
        _ => format!("n{node}"),
    }
}

fn planned(nodes: &[Node], node: usize) -> PlannedStage {
    const KEYS: [&str; 2] = ["input", "other"];
    let names: Vec<String> = inputs_of(&nodes[node]).into_iter().map(|i| name(nodes, i)).collect();
    let inputs: Vec<(&str, &str)> = KEYS.into_iter().zip(names.iter().map(String::as_str)).collect();
    let kind = match &nodes[node] {
        Node::Numbers(_) => "counted",
        Node::Pass(_) => "pass",
        Node::Join(_) => "collector",
        Node::Trainer(_) => "trainer",
        Node::Waiter(..) => "waiter",
        Node::Sink(_) => "sink",
    };
    let mut stage = stage(&name(nodes, node), kind, &inputs, &format!("key {node}"));
    stage.plan.waits_for_round = matches!(nodes[node], Node::Join(_));
    if let Node::Numbers(rows) = nodes[node] {
        stage.spec.options.insert("rows".into(), toml::Value::Integer(rows as i64));
    }
    if let Node::Waiter(_, trainer) = nodes[node] {
        let adapter = AdapterChoice::Round { trainer: name(nodes, trainer), round: 1 };
        stage.plan.models = vec![ModelUse { model: "policy".into(), devices: Vec::new(), adapter, chat: false }];
    }
    stage
}

/// Sources of different lengths: each knows its own by its name.
fn counted(nodes: &[Node]) -> Toy {
    let counts: BTreeMap<String, u64> = (0..nodes.len()).map(|i| (name(nodes, i), rows_of(nodes, i))).collect();
    Toy(
        "counted",
        Arc::new(move |ctx| {
            let count = counts[&ctx.stage];
            Box::pin(async move {
                ctx.set_shard(Shard { index: 0, count: 1, contiguous: false, total: count });
                for first in (0..count).step_by(256) {
                    let rows: Vec<u64> = (first..count.min(first + 256)).collect();
                    let watermark = first + rows.len() as u64;
                    let batch = Some(batch(&rows, 1));
                    ctx.output.send("", Message { batch, completes: rows, watermark }).await?;
                }
                Ok(())
            })
        }),
    )
}

/// The rows that each sink saw.
type Sunk = Arc<Mutex<BTreeMap<String, Vec<u64>>>>;

fn sinking(sunk: &Sunk) -> Toy {
    let sunk = sunk.clone();
    Toy(
        "sink",
        Arc::new(move |ctx| {
            let sunk = sunk.clone();
            Box::pin(async move {
                while let Some(message) = ctx.input("input").recv().await? {
                    if let Some(batch) = &message.batch {
                        sunk.lock().unwrap().entry(ctx.stage.clone()).or_default().extend(column(batch, "_row"));
                    }
                }
                Ok(())
            })
        }),
    )
}

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig { cases: 48, max_shrink_iters: 64, ..Default::default() })]

    /// Joins, adapters of the round, several sources, and more rows than a blocking edge holds: every graph ends, with
    /// every row where it belongs.
    #[test]
    fn any_acyclic_graph_ends_with_every_row(
        choices in proptest::collection::vec((0u8..7, 0usize..9, 0usize..9, proptest::prelude::any::<u64>()), 1..9),
    ) {
        let nodes = graph(&choices);
        let stages: Vec<PlannedStage> = (0..nodes.len()).map(|i| planned(&nodes, i)).collect();
        let sunk = Sunk::default();
        let kinds = vec![counted(&nodes), pass(), collector(), trainer(), waiter(), sinking(&sunk)];
        let dir = tempfile::tempdir().unwrap();
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let summary = runtime.block_on(finish(config(dir.path(), vec![stages], kinds)));
        proptest::prop_assert_eq!(summary.status, Ending::Done, "{:?}", summary.error);
        for (i, node) in nodes.iter().enumerate() {
            let Node::Sink(from) = node else { continue };
            let rows = sunk.lock().unwrap().remove(&name(&nodes, i)).unwrap_or_default();
            proptest::prop_assert_eq!(rows, (0..rows_of(&nodes, *from)).collect::<Vec<_>>());
        }
    }
}

#[tokio::test]
async fn an_open_run_directory_refuses_a_second_run() {
    let dir = tempfile::tempdir().unwrap();
    let first = Run::new(config(dir.path(), Vec::new(), Vec::new())).unwrap();
    let error = Run::new(config(dir.path(), Vec::new(), Vec::new())).err().unwrap();
    assert!(error.message.contains("in use by another run") && error.message.contains("process"), "{error}");
    assert_eq!(first.start().wait().await.status, Ending::Done);
}
