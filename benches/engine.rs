//! How fast the engine moves rows when its stages do next to nothing: a source, an SQL filter, a
//! split and two counting sinks, over rows of a u64 and a 200-byte string.
//!
//! `cargo bench --bench engine` times it beside plain tokio channels with the same operators;
//! `cargo bench --bench engine -- memory` sends 50 million rows through and prints what is resident.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use divan::counter::ItemsCount;
use divan::{Bencher, black_box};
use flowrun::arrow::array::{ArrayRef, StringArray, UInt64Array};
use flowrun::arrow::datatypes::{DataType, Field, Schema, SchemaRef};
use flowrun::arrow::record_batch::RecordBatch;
use flowrun::data::shard::Geometry;
use flowrun::data::split::By;
use flowrun::data::{Query, Split};
use flowrun::embed::{Engine, FlowBuilder, RunOptions};
use flowrun::engine::{Ending, Finished, Message, Runnable, Shard, Stage, StageContext, StageError};
use flowrun::flow::kind::ONE_INPUT;
use flowrun::flow::{CheckContext, FlowError, Form, InputKey, Port, StageKind, StagePlan};
use flowrun::stages::rows::input_hashes;
use futures::future::BoxFuture;
use serde_json::json;
use tokio::runtime::Runtime;
use tokio::sync::mpsc;

const SQL: &str = "SELECT n, text FROM input WHERE n <> 7";
const SHARES: [(&str, &str); 2] = [("train", "0.9"), ("validation", "0.1")];

fn main() {
    if std::env::args().any(|arg| arg == "memory") {
        return memory();
    }
    divan::main();
}

fn schema() -> SchemaRef {
    let field = |name, data_type| Field::new(name, data_type, false);
    let text = field("text", DataType::Utf8);
    Arc::new(Schema::new(vec![field("_row", DataType::UInt64), field("n", DataType::UInt64), text]))
}

/// Batches of `size` rows; the texts of all are one array.
#[derive(Clone)]
struct Rows {
    count: u64,
    size: u64,
    text: ArrayRef,
    schema: SchemaRef,
}

impl Rows {
    fn new(count: u64, size: u64) -> Self {
        let text = Arc::new(StringArray::from(vec!["x".repeat(200); size as usize]));
        Self { count, size, text, schema: schema() }
    }

    fn batches(&self) -> impl Iterator<Item = (Vec<u64>, RecordBatch)> + Send + '_ {
        (0..self.count).step_by(self.size as usize).map(|first| {
            let rows: Vec<u64> = (first..self.count.min(first + self.size)).collect();
            let row: ArrayRef = Arc::new(UInt64Array::from(rows.clone()));
            let n: ArrayRef = Arc::new(UInt64Array::from_iter_values(rows.iter().map(|row| row % 10)));
            let columns = vec![row, n, self.text.slice(0, rows.len())];
            (rows, RecordBatch::try_new(self.schema.clone(), columns).unwrap())
        })
    }
}

type Body = Arc<dyn for<'a> Fn(&'a mut StageContext) -> BoxFuture<'a, Result<(), StageError>> + Send + Sync>;

/// A kind whose stages run one function.
struct Bare {
    name: &'static str,
    source: bool,
    body: Body,
}

impl StageKind for Bare {
    fn name(&self) -> &'static str {
        self.name
    }
    fn inputs(&self) -> &'static [InputKey] {
        if self.source { &[] } else { ONE_INPUT }
    }
    fn check<'a>(&'a self, cx: CheckContext<'a>) -> BoxFuture<'a, Result<StagePlan, FlowError>> {
        let port = |schema| vec![Port { name: String::new(), schema, rows: None }];
        let outputs = match (self.source, cx.inputs.first()) {
            (true, _) => port(Some(schema())),
            (false, Some(input)) if self.name == "record" => port(input.schema.clone()),
            _ => Vec::new(),
        };
        Box::pin(async move {
            Ok(StagePlan {
                outputs,
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

impl Runnable for Bare {
    fn open(&self, _: &str, _: &StagePlan) -> Result<Box<dyn Stage>, StageError> {
        Ok(Box::new(BareStage(self.body.clone())))
    }
}

struct BareStage(Body);

impl Stage for BareStage {
    fn run<'a>(&'a mut self, ctx: &'a mut StageContext) -> BoxFuture<'a, Result<(), StageError>> {
        (self.0)(ctx)
    }
}

fn source(rows: &Rows) -> Bare {
    let rows = rows.clone();
    let body: Body = Arc::new(move |ctx| {
        let rows = rows.clone();
        Box::pin(async move {
            ctx.set_shard(Shard { index: 0, count: 1, contiguous: false, total: rows.count });
            for (completes, batch) in rows.batches() {
                let watermark = completes.last().map_or(0, |row| row + 1);
                ctx.output.send("", Message { batch: Some(batch), completes, watermark }).await?;
            }
            Ok(())
        })
    });
    Bare { name: "numbers", source: true, body }
}

fn sink(counted: &Arc<AtomicU64>) -> Bare {
    let counted = counted.clone();
    let body: Body = Arc::new(move |ctx| {
        let counted = counted.clone();
        Box::pin(async move {
            while let Some(message) = ctx.input("input").recv().await? {
                counted.fetch_add(message.rows() as u64, Relaxed);
            }
            Ok(())
        })
    });
    Bare { name: "count", source: false, body }
}

/// Records every row with the hash of its input, as a stage does whose work is worth keeping.
fn record() -> Bare {
    let body: Body = Arc::new(|ctx| {
        Box::pin(async move {
            ctx.open_journal("bench")?;
            while let Some(message) = ctx.input("input").recv().await? {
                let Some(batch) = message.batch else { continue };
                let hashes = input_hashes(&batch)?;
                let finished: Vec<Finished> = message
                    .completes
                    .iter()
                    .zip(hashes)
                    .map(|(row, input_hash)| Finished { row: *row, input_hash, rows: 1 })
                    .collect();
                ctx.finish_all(&finished, Some(batch)).await?;
            }
            Ok(())
        })
    });
    Bare { name: "record", source: false, body }
}

async fn run(flow: FlowBuilder, kinds: Vec<Bare>, dir: &Path) {
    let engine = kinds.into_iter().fold(Engine::new(), Engine::with_kind);
    let flow = flow.build(dir, &engine).unwrap();
    let run = engine.start(&flow, RunOptions::new(dir.join("run"))).await.unwrap();
    let summary = run.wait().await;
    assert_eq!(summary.status, Ending::Done, "{:?}", summary.error);
}

/// Source, filter, split, two sinks on the engine; how many rows arrived.
async fn pipeline(rows: &Rows, dir: &Path) -> u64 {
    let counted = Arc::<AtomicU64>::default();
    let flow = FlowBuilder::new("bench")
        .stage("numbers", "numbers", json!({}))
        .stage("some", "mapper", json!({ "input": "numbers", "sql": SQL, "table": false }))
        .stage(
            "halves",
            "split",
            json!({ "input": "some", "outputs": { "train": 0.9, "validation": 0.1 }, "table": false }),
        )
        .stage("train", "count", json!({ "input": "halves.train" }))
        .stage("validation", "count", json!({ "input": "halves.validation" }));
    run(flow, vec![source(rows), sink(&counted)], dir).await;
    counted.load(Relaxed)
}

/// The same operators between plain channels that hold as many rows as the engine's edges.
async fn channels(rows: &Rows) -> u64 {
    let room = (8192 / rows.size) as usize;
    let (to_filter, mut filter) = mpsc::channel::<RecordBatch>(room);
    let (to_split, mut split) = mpsc::channel::<RecordBatch>(room);
    let (to_train, mut train) = mpsc::channel::<RecordBatch>(room);
    let (to_validation, mut validation) = mpsc::channel::<RecordBatch>(room);
    let source = rows.clone();
    tokio::spawn(async move {
        for (_, batch) in source.batches() {
            to_filter.send(batch).await.unwrap();
        }
    });
    tokio::spawn(async move {
        let mut query = Query::plan(SQL, &[("input", schema())]).await.unwrap();
        while let Some(batch) = filter.recv().await {
            let made = query.apply(&batch).await.unwrap();
            if made.num_rows() > 0 {
                to_split.send(made).await.unwrap();
            }
        }
    });
    let total = rows.count;
    tokio::spawn(async move {
        let shares = SHARES.map(|(name, share)| (name.to_owned(), share.to_owned()));
        let shares = Split::new(&shares, By::Spread).unwrap();
        let shard = Geometry { index: 0, count: 1, contiguous: false, total };
        while let Some(batch) = split.recv().await {
            let numbers = flowrun::data::batch::row_numbers(&batch).unwrap();
            let sides: Vec<usize> =
                numbers.values().iter().map(|row| shares.side(shard.ordinal(*row).unwrap(), total)).collect();
            for (part, to) in shares.parts(&batch, &sides).unwrap().into_iter().zip([&to_train, &to_validation]) {
                if let Some(part) = part {
                    to.send(part).await.unwrap();
                }
            }
        }
    });
    let count = async |receiver: &mut mpsc::Receiver<RecordBatch>| {
        let mut rows = 0;
        while let Some(batch) = receiver.recv().await {
            rows += batch.num_rows() as u64;
        }
        rows
    };
    let train = tokio::spawn(async move { count(&mut train).await });
    let mut rows = 0;
    while let Some(batch) = validation.recv().await {
        rows += batch.num_rows() as u64;
    }
    rows + train.await.unwrap()
}

fn runtime() -> Runtime {
    tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap()
}

#[divan::bench(args = [1024, 1], sample_count = 5, sample_size = 1)]
fn engine(bencher: Bencher, size: u64) {
    let (rows, runtime) = (Rows::new(if size == 1 { 1_000_000 } else { 20_000_000 }, size), runtime());
    bencher.counter(ItemsCount::new(rows.count)).with_inputs(|| tempfile::tempdir().unwrap()).bench_local_values(
        |dir| {
            assert_eq!(runtime.block_on(pipeline(&rows, dir.path())), rows.count / 10 * 9);
            dir
        },
    );
}

#[divan::bench(args = [1024, 1], sample_count = 5, sample_size = 1)]
fn tokio_channels(bencher: Bencher, size: u64) {
    let (rows, runtime) = (Rows::new(if size == 1 { 1_000_000 } else { 20_000_000 }, size), runtime());
    bencher.counter(ItemsCount::new(rows.count)).bench_local(|| {
        assert_eq!(black_box(runtime.block_on(channels(&rows))), rows.count / 10 * 9);
    });
}

#[divan::bench(args = [1024], sample_count = 5, sample_size = 1)]
fn journal(bencher: Bencher, size: u64) {
    let (rows, runtime) = (Rows::new(2_000_000, size), runtime());
    bencher.counter(ItemsCount::new(rows.count)).with_inputs(|| tempfile::tempdir().unwrap()).bench_local_values(
        |dir| {
            let counted = Arc::<AtomicU64>::default();
            let flow = FlowBuilder::new("bench")
                .stage("numbers", "numbers", json!({}))
                .stage("record", "record", json!({ "input": "numbers", "table": false }))
                .stage("count", "count", json!({ "input": "record" }));
            runtime.block_on(run(flow, vec![source(&rows), record(), sink(&counted)], dir.path()));
            assert_eq!(counted.load(Relaxed), rows.count);
            dir
        },
    );
}

fn memory() {
    const ROWS: u64 = 50_000_000;
    let (rows, dir) = (Rows::new(ROWS, 1024), tempfile::tempdir().unwrap());
    runtime().block_on(async {
        let watch = tokio::spawn(async {
            loop {
                tokio::time::sleep(std::time::Duration::from_millis(500)).await;
                println!("{} MiB resident", flowrun::observe::process::memory("VmRSS:") >> 20);
            }
        });
        let began = std::time::Instant::now();
        assert_eq!(pipeline(&rows, dir.path()).await, ROWS / 10 * 9);
        watch.abort();
        let seconds = began.elapsed().as_secs_f64();
        let peak = flowrun::observe::process::memory("VmHWM:") >> 20;
        println!("{ROWS} rows in {seconds:.1} s, {:.1} million rows/s, peak {peak} MiB", ROWS as f64 / seconds / 1e6);
    });
}
