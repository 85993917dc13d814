//! The rows that every kind makes of one flow, written down. A kind that comes to make something else of the same keys has to
//! raise its `StageKind::results`, or rows of its older form would be taken for rows of the newer one.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use datafusion::arrow::json::LineDelimitedWriter;
use flowrun::arrow::array::{ArrayRef, StringArray};
use flowrun::arrow::compute::concat_batches;
use flowrun::arrow::record_batch::RecordBatch;
use flowrun::embed::{Engine, RunOptions};
use flowrun::engine::{Ending, table};
use flowrun::flow::{Flow, KindLookup};
use flowrun::stages::feed::feed;
use serde_json::{Value, json};

use crate::every_kind::{OF_PROGRAMS, case};
use crate::support::Case;
use crate::whole::events;

/// Tolerance for the figures of a model: another processor adds in another order.
const TOLERANCE: f64 = 2e-3;

/// The places of each kind's rows in a run directory.
const MADE: &[(&str, &[&str])] = &[
    ("source", &["prompts-1.jsonl", "prompts-2.jsonl", "queried-1.jsonl"]),
    ("sampler", &["round-1/sample/rows.parquet", "round-2/sample/rows.parquet"]),
    (
        "judge",
        &[
            "round-1/pairwise/rows.parquet",
            "round-1/written/rows.parquet",
            "round-1/scored/rows.parquet",
            "round-1/ruled/rows.parquet",
        ],
    ),
    ("pairs", &["round-1/prefer/rows.parquet"]),
    ("mapper", &["round-1/completed/rows.parquet"]),
    ("scorer", &["round-1/likely/rows.parquet"]),
    ("process", &["round-1/rewarded/rows.parquet"]),
    ("sink", &["rewarded-1.jsonl"]),
    ("split", &["round-1/halves/train.parquet", "round-1/halves/validation.parquet"]),
    ("trainer", &["metrics.jsonl"]),
    ("gate", &["round-1/gate/rows.parquet"]),
];

/// The golden text of a kind.
struct Golden {
    path: PathBuf,
    results: u32,
    lines: Vec<Value>,
}

impl Golden {
    fn of(engine: &Engine, kind: &str, lines: Vec<Value>) -> Self {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/golden");
        assert!(!lines.is_empty(), "the kind {kind} has made nothing");
        let results = engine.kind(kind).unwrap_or_else(|| panic!("no kind {kind}")).results();
        Self { path: folder.join(format!("{kind}.jsonl")), results, lines }
    }

    fn written(&self) -> Option<(u32, Vec<Value>)> {
        let text = std::fs::read_to_string(&self.path).ok()?;
        let mut lines = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
        let results = lines.next()?["results"].as_u64()?;
        Some((results as u32, lines.collect()))
    }

    /// The first difference.
    fn fault(&self) -> Option<String> {
        let place = self.path.display();
        let Some((results, lines)) = self.written() else {
            return Some(format!("{place} is missing; FLOWRUN_GOLDEN=write writes it"));
        };
        let count = (lines.len() != self.lines.len()).then(|| format!("{} lines", self.lines.len()));
        let other = || lines.iter().zip(&self.lines).find(|(old, new)| !alike(old, new));
        let made = count.or_else(|| other().map(|(old, new)| format!("{new}\nin place of\n{old}")));
        match (made, results == self.results) {
            (None, true) => None,
            (Some(made), true) => Some(format!(
                "{place}: the kind makes something else of the same keys, and its `results` is still {results}: raise \
                 it, then write the file with FLOWRUN_GOLDEN=write. It makes {made}"
            )),
            (_, false) => Some(format!(
                "{place} is of results {results}, and the kind's are {}: write it with FLOWRUN_GOLDEN=write",
                self.results
            )),
        }
    }

    fn write(&self) {
        if let Some((results, _)) = self.written() {
            let forgotten = results == self.results && self.fault().is_some();
            assert!(!forgotten, "{}", self.fault().unwrap_or_default());
        }
        let lines = [json!({ "results": self.results })];
        let text: String = lines.iter().chain(&self.lines).map(|line| format!("{line}\n")).collect();
        std::fs::create_dir_all(self.path.parent().unwrap()).unwrap();
        std::fs::write(&self.path, text).unwrap();
    }
}

fn alike(old: &Value, new: &Value) -> bool {
    match (old, new) {
        (Value::Number(old), Value::Number(new)) if old.is_f64() || new.is_f64() => {
            let (old, new) = (old.as_f64().unwrap(), new.as_f64().unwrap());
            (old - new).abs() <= TOLERANCE * (1.0 + old.abs())
        }
        (Value::Array(old), Value::Array(new)) => {
            old.len() == new.len() && old.iter().zip(new).all(|(old, new)| alike(old, new))
        }
        (Value::Object(old), Value::Object(new)) => {
            old.len() == new.len() && old.iter().all(|(key, old)| new.get(key).is_some_and(|new| alike(old, new)))
        }
        (old, new) => old == new,
    }
}

/// The rows of a table, in the order of their keys.
fn rows(batches: &[RecordBatch]) -> Vec<Value> {
    let Some(first) = batches.first() else { return Vec::new() };
    let whole = table::sorted(concat_batches(&first.schema(), batches).unwrap()).unwrap();
    let mut writer = LineDelimitedWriter::new(Vec::new());
    writer.write(&whole).unwrap();
    writer.finish().unwrap();
    String::from_utf8(writer.into_inner()).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn made(run: &Path, file: &str) -> Vec<Value> {
    let path = run.join(file);
    if file == "metrics.jsonl" {
        let mut steps = events(run);
        for step in steps.iter_mut().filter_map(Value::as_object_mut) {
            step.retain(|key, _| {
                matches!(key.as_str(), "round" | "step" | "epoch" | "loss" | "learning_rate" | "grad_norm")
                    || key.contains("rewards/")
            });
        }
        return steps;
    }
    match path.extension().unwrap().to_str().unwrap() {
        "parquet" => rows(&table::read(&path).unwrap_or_else(|e| panic!("{file}: {e}"))),
        _ => {
            let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{file}: {e}"));
            text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
        }
    }
}

/// A program's rows, there and back.
async fn of_programs(engine: &Engine) -> Vec<Value> {
    let dir = tempfile::tempdir().unwrap();
    let flow = "name = \"through\"\n[stages.rows]\nkind = \"feed\"\n[stages.out]\nkind = \"tap\"\ninput = \"rows\"\n";
    let flow = Flow::from_toml(flow, dir.path(), &[], engine).unwrap();
    let text: ArrayRef = Arc::new(StringArray::from(vec!["a", "b", "c"]));
    let batch = RecordBatch::try_from_iter([("text", text)]).unwrap();
    let (feeder, end) = feed(batch.schema());
    let mut options = RunOptions::new(dir.path().join("run")).feed("rows", end);
    let mut tap = options.tap("out");
    let run = engine.start(&flow, options).await.unwrap();
    feeder.send(batch).await.unwrap();
    drop(feeder);
    let mut seen = Vec::new();
    while let Some((_, batch)) = tap.next().await {
        seen.extend(rows(&[batch]));
    }
    assert_eq!(run.wait().await.status, Ending::Done);
    seen
}

fn run() -> Case {
    let case = case();
    let sets = [
        "stages.seen={ kind = \"sink\", input = \"prompts\", path = \"prompts-{round}.jsonl\" }",
        "stages.asked={ kind = \"sink\", input = \"queried\", path = \"queried-{round}.jsonl\" }",
    ];
    case.done(&["flow.toml", "--device", "cpu", "--set", sets[0], "--set", sets[1]]);
    case
}

#[tokio::test(flavor = "multi_thread")]
async fn every_kind_makes_what_is_written_down_or_says_so() {
    let engine = Engine::new();
    let case = tokio::task::spawn_blocking(run).await.unwrap();
    let dir = case.path("runs/tiny");
    let through = of_programs(&engine).await;
    let all = engine.kind_names().into_iter().map(|kind| {
        let files = MADE.iter().find(|(of, _)| *of == kind).map(|(_, files)| *files);
        let lines = match files {
            Some(files) => files.iter().flat_map(|file| made(&dir, file)).collect(),
            None if OF_PROGRAMS.contains(&kind) => through.clone(),
            None => panic!("nothing is written down of the kind {kind}"),
        };
        Golden::of(&engine, kind, lines)
    });
    let all: Vec<Golden> = all.collect();
    if std::env::var("FLOWRUN_GOLDEN").is_ok_and(|wanted| wanted == "write") {
        return all.iter().for_each(Golden::write);
    }
    let faults: Vec<String> = all.iter().filter_map(Golden::fault).collect();
    assert!(faults.is_empty(), "{}", faults.join("\n\n"));
}
