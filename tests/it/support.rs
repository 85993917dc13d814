//! A flow on the tiny fixture model in a directory of its own, and the program run on it.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use flowrun::arrow::array::{Array, AsArray};
use flowrun::arrow::record_batch::RecordBatch;
use serde_json::Value;
use tempfile::TempDir;

/// The fixture model, a random Llama of two layers.
pub fn tiny_model() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tiny-llama")
}

pub struct Case {
    pub dir: TempDir,
}

impl Case {
    /// A directory with `prompts.jsonl` (`prompts` rows) and `flow.toml`.
    pub fn new(prompts: usize, flow: &str) -> Self {
        let case = Self { dir: TempDir::new().unwrap() };
        let lines: Vec<String> =
            (0..prompts).map(|i| format!("{{\"prompt\": \"tell me about thing number {i}\", \"n\": {i}}}")).collect();
        case.write("prompts.jsonl", &(lines.join("\n") + "\n"));
        case.write("flow.toml", flow);
        case
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn write(&self, name: &str, text: &str) {
        std::fs::write(self.path(name), text).unwrap();
    }

    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_flowrun"));
        command.args(args).current_dir(self.dir.path()).stdin(Stdio::null());
        // What the developer's shell sets must not decide a test.
        command.env_remove("FLOWRUN_LOG").env("HF_HUB_OFFLINE", "1").env("RUST_BACKTRACE", "0");
        command
    }

    pub fn run(&self, args: &[&str]) -> Output {
        self.command(args).output().unwrap()
    }

    /// Runs to the end and fails with the program's own words otherwise.
    pub fn done(&self, args: &[&str]) -> Output {
        let output = self.run(args);
        assert!(output.status.success(), "flowrun {args:?}: {}\n{}", output.status, stderr(&output));
        output
    }

    pub fn start(&self, args: &[&str]) -> Child {
        self.command(args).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
    }

    pub fn summary(&self) -> Value {
        self.json("runs/tiny/summary.json")
    }

    pub fn json(&self, name: &str) -> Value {
        serde_json::from_str(&std::fs::read_to_string(self.path(name)).unwrap()).unwrap()
    }

    /// The events of metrics.jsonl that have `key`.
    pub fn events(&self, key: &str) -> Vec<Value> {
        let text = std::fs::read_to_string(self.path("runs/tiny/metrics.jsonl")).unwrap();
        let lines = text.lines().map(|l| serde_json::from_str::<Value>(l).unwrap());
        lines.filter(|v| v.get(key).is_some()).collect()
    }

    /// A stage's table.
    pub fn table(&self, round: u32, file: &str) -> Vec<RecordBatch> {
        let path = self.path(&format!("runs/tiny/round-{round}/{file}.parquet"));
        let file = std::fs::File::open(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        let reader = datafusion::parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder::try_new(file).unwrap();
        reader.build().unwrap().map(Result::unwrap).collect()
    }

    pub fn texts(&self, round: u32, file: &str, column: &str) -> Vec<String> {
        let column_of = |b: &RecordBatch| {
            let column = b.column_by_name(column).unwrap_or_else(|| panic!("no column {column}"));
            flowrun::arrow::compute::cast(column, &flowrun::arrow::datatypes::DataType::Utf8).unwrap()
        };
        let columns: Vec<_> = self.table(round, file).iter().map(column_of).collect();
        let values = columns.iter().flat_map(|c| {
            let strings = c.as_string::<i32>();
            (0..strings.len()).map(|i| if strings.is_null(i) { String::new() } else { strings.value(i).to_owned() })
        });
        values.collect()
    }
}

pub fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// The seed's loop on the tiny model, with `extra` appended.
pub fn tiny_flow(rounds: u32, extra: &str) -> String {
    let model = tiny_model();
    format!(
        r#"
name = "tiny"
rounds = {rounds}
seed = 1

[models.policy]
source = {model:?}
dtype = "f32"

[stages.prompts]
kind = "source"
dataset = "prompts.jsonl"
select = {{ prompt = "prompt" }}
shard = {{ count = {rounds} }}

[stages.sample]
kind = "sampler"
input = "prompts"
model = "policy"
device = "cpu:0"
candidates = 2
max_new_tokens = 12

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
sql = "SELECT prompt, chosen, rejected FROM input WHERE verdict <> 'tie'"

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
algorithm = "dpo"
start = "continue"
reference = "previous"
epochs = 1
batch_size = 1
gradient_accumulation_steps = 2
learning_rate = 1e-3
lora = {{ r = 4, alpha = 8 }}
{extra}
"#
    )
}

/// A gate over four of the prompts, by what the model `policy` answers.
pub fn gate(threshold: f64, keys: &str) -> String {
    format!(
        r#"
[stages.held_out]
kind = "source"
dataset = "prompts.jsonl"
take = 4
[stages.gate]
kind = "gate"
input = "held_out"
model = "policy"
device = "cpu:0"
max_new_tokens = 8
threshold = {threshold}
{keys}
"#
    )
}
