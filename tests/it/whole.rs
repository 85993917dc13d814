//! A flow with a stage of every kind, and what its user has at the end: the things that nothing on
//! the way may change.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use flowrun::arrow::array::AsArray;
use flowrun::arrow::compute::concat_batches;
use flowrun::arrow::datatypes::UInt64Type;
use flowrun::arrow::record_batch::RecordBatch;
use flowrun::engine::{journal, table};
use serde_json::Value;

use crate::support::{Case, tiny_model};

/// Stages that keep a journal.
pub const JOURNALED: [&str; 4] = ["sample", "judge", "likely", "align"];

/// Rounds read every tenth row of the source.
const SHARDS: usize = 10;

/// How long the flow takes.
#[derive(Clone, Copy)]
pub struct Size {
    /// In a round.
    pub prompts: usize,
    pub new_tokens: usize,
    pub epochs: u32,
}

impl Size {
    /// Half a minute on two cores.
    pub const LONG: Self = Self { prompts: 600, new_tokens: 48, epochs: 6 };
    /// Some seconds.
    pub const SHORT: Self = Self { prompts: 240, new_tokens: 48, epochs: 2 };
    pub const TINY: Self = Self { prompts: 24, new_tokens: 16, epochs: 1 };

    /// A directory with the flow; its source is long, so that reading it takes some time too.
    pub fn case(self) -> Case {
        Case::new(self.prompts * SHARDS, &self.flow())
    }

    fn flow(self) -> String {
        let (model, Self { new_tokens, epochs, .. }) = (tiny_model(), self);
        format!(
            r#"
name = "tiny"
rounds = 2
seed = 1
deterministic = true

[models.policy]
source = {model:?}
dtype = "f32"

[stages.prompts]
kind = "source"
dataset = "prompts.jsonl"
select = {{ prompt = "prompt" }}
shard = {{ count = {SHARDS} }}

[stages.clean]
kind = "mapper"
input = "prompts"
sql = "SELECT prompt FROM input WHERE length(prompt) > 0"

[stages.sample]
kind = "sampler"
input = "clean"
model = "policy"
device = "cpu:0"
candidates = 2
max_new_tokens = {new_tokens}

[stages.judge]
kind = "judge"
input = "sample"
model = "policy"
device = "cpu:1"
method = "pairwise"
read = "logits"
order = "both"

[stages.prefer]
kind = "mapper"
input = "judge"
sql = "SELECT prompt, chosen, rejected, chosen AS completion FROM input WHERE verdict <> 'tie'"

[stages.likely]
kind = "scorer"
input = "prefer"
model = "policy"
device = "cpu:1"

[stages.ranked]
kind = "mapper"
input = "likely"
sql = "SELECT prompt, logprob FROM input ORDER BY logprob"

[stages.kept]
kind = "sink"
input = "ranked"
path = "ranked-{{round}}.parquet"

[stages.halves]
kind = "split"
input = "prefer"
outputs = {{ train = 0.75, validation = 0.25 }}

[stages.align]
kind = "trainer"
train = "halves.train"
validation = "halves.validation"
model = "policy"
device = "cpu:1"
start = "continue"
reference = "previous"
epochs = {epochs}
gradient_accumulation_steps = 2
learning_rate = 1e-3
best_metric = "rewards/margins"
lora = {{ r = 4, alpha = 8 }}
"#
        )
    }
}

/// What a user has: every table, every adapter, the curve of training.
pub struct Found {
    tables: BTreeMap<String, RecordBatch>,
    adapters: BTreeMap<String, Vec<u8>>,
    curve: Vec<Value>,
}

impl Found {
    pub fn of(run: &Path) -> Self {
        let mut found = Self { tables: BTreeMap::new(), adapters: BTreeMap::new(), curve: curve(run) };
        for path in files(run) {
            let name = path.strip_prefix(run).unwrap().display().to_string();
            if name.ends_with(".parquet") {
                let batches = table::read(&path).unwrap_or_else(|e| panic!("{name}: {e}"));
                // The rows of a table that is written as they pass are in the order of a race.
                let whole = batches.first().map(|b| concat_batches(&b.schema(), &batches).unwrap());
                found.tables.extend(whole.map(|rows| (name, table::sorted(rows).unwrap())));
            } else if name.ends_with("adapter_model.safetensors") {
                found.adapters.insert(name, std::fs::read(&path).unwrap());
            }
        }
        found
    }

    /// Fails at the first thing that is not as in `whole`, the run that nothing disturbed.
    pub fn assert_equals(&self, whole: &Self, after: &str) {
        assert!(whole.tables.len() > 15 && whole.adapters.len() == 2, "{:?}", whole.tables.keys());
        assert!(self.tables.keys().eq(whole.tables.keys()), "{after}: {:?}", self.tables.keys());
        for (name, rows) in &whole.tables {
            assert!(&self.tables[name] == rows, "{name} {after}:\n{:?}\n{rows:?}", self.tables[name]);
        }
        for (line, (found, expected)) in self.curve.iter().zip(&whole.curve).enumerate() {
            assert_eq!(found, expected, "line {line} of the curve {after}");
        }
        assert_eq!(self.curve.len(), whole.curve.len(), "lines of the curve {after}");
        assert!(self.adapters == whole.adapters, "the adapters differ {after}");
    }
}

/// Steps and evaluations without what time decides, one round after the other.
fn curve(run: &Path) -> Vec<Value> {
    let mut events = events(run);
    for event in events.iter_mut().filter_map(Value::as_object_mut) {
        for key in ["time", "tokens_per_second", "seconds"] {
            event.remove(key);
        }
    }
    events
}

/// The lines of metrics.jsonl that are of a step; one that a kill cut off is none.
pub fn events(run: &Path) -> Vec<Value> {
    let text = std::fs::read(run.join("metrics.jsonl")).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let lines = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    lines.filter(|event| event["step"].is_u64()).collect()
}

/// All files of a run but those that it set aside.
fn files(run: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut dirs = vec![run.to_path_buf()];
    while let Some(dir) = dirs.pop() {
        for entry in std::fs::read_dir(&dir).unwrap().map(Result::unwrap) {
            let name = entry.file_name().to_string_lossy().into_owned();
            match entry.file_type().unwrap().is_dir() {
                true if !name.starts_with('.') && name != "superseded" => dirs.push(entry.path()),
                true => {}
                false => found.push(entry.path()),
            }
        }
    }
    found
}

/// Rounds and stages that keep a journal, with where it lies in the run directory.
pub fn journals() -> impl Iterator<Item = (usize, &'static str, PathBuf)> {
    let of = |round: usize| move |stage| (round, stage, PathBuf::from(format!("round-{round}/{stage}/journal")));
    (1..=2).flat_map(move |round| JOURNALED.into_iter().map(of(round)))
}

/// By journal: its finished rows, in the order they were appended.
pub type Recorded = BTreeMap<PathBuf, Vec<u64>>;

pub fn recorded(run: &Path) -> Recorded {
    let rows = |path: &Path| journal::finished(&std::fs::read(run.join(path)).unwrap_or_default());
    journals().map(|(.., path)| (path.clone(), rows(&path))).collect()
}

/// Returns whether the run had ended and said so: started again, it says what it said then.
pub fn is_done(run: &Path) -> bool {
    let summary = std::fs::read(run.join("summary.json")).unwrap_or_default();
    serde_json::from_slice::<Value>(&summary).is_ok_and(|summary| summary["status"] == "done")
}

/// What a run that went on from `before` says of itself: all that was recorded is reused, and
/// nothing of it was made again.
pub fn assert_reused(run: &Path, before: &Recorded, after: &str) {
    let summary: Value = serde_json::from_slice(&std::fs::read(run.join("summary.json")).unwrap()).unwrap();
    let now = recorded(run);
    for (round, stage, path) in journals() {
        let said = &summary["rounds"][round - 1]["stages"][stage];
        let kept: BTreeSet<u64> = before[&path].iter().copied().collect();
        let place = format!("{stage}, round {round}, {after}");
        assert_eq!(said["reused_rows"], kept.len(), "reused rows of {place}");
        assert_once(&now[&path], &place);
        if stage == "sample" {
            assert_eq!(said["tokens_out"], tokens_of_others(run, round, &kept), "tokens of {place}");
        }
    }
}

/// Every row was worked out once, however many processes worked on them.
pub fn assert_once(rows: &[u64], place: &str) {
    let mut once = BTreeSet::new();
    let twice: Vec<_> = rows.iter().filter(|row| !once.insert(**row)).collect();
    assert!(twice.is_empty(), "{place}: {twice:?} were recorded and made again");
}

/// Tokens that were sampled for rows that are not among these.
fn tokens_of_others(run: &Path, round: usize, kept: &BTreeSet<u64>) -> u64 {
    let batches = table::read(&run.join(format!("round-{round}/sample/rows.parquet"))).unwrap();
    let column = |batch: &RecordBatch, name: &str| {
        batch.column_by_name(name).unwrap().as_primitive::<UInt64Type>().values().to_vec()
    };
    let pairs = batches.iter().flat_map(|b| column(b, "_row").into_iter().zip(column(b, "generation_tokens")));
    pairs.filter(|(row, _)| !kept.contains(row)).map(|(_, tokens)| tokens).sum()
}

/// Random numbers that a seed repeats (splitmix64).
pub struct Random(u64);

impl Random {
    /// The seed of an environment variable, or a new one; it is told, so that what it decides can be had again.
    pub fn seeded(variable: &str) -> Self {
        let given = std::env::var(variable).ok().map(|text| text.parse().expect("a seed is a number"));
        let new = || std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap().as_micros() as u64 % 1_000_000;
        let seed = given.unwrap_or_else(new);
        println!("{variable}={seed} does this again");
        Self(seed)
    }

    pub fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % limit.max(1)
    }

    /// From 0 to 1.
    pub fn share(&mut self) -> f64 {
        self.below(1 << 32) as f64 / (1u64 << 32) as f64
    }
}
