//! An adapter that a run writes is the same model in PEFT as it is here.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use flowrun::model::attention::Tree;
use flowrun::model::source::builtin_path;
use flowrun::model::{Adapters, ChatMessage, Lora, ModelOptions, Pretrained, Source, Transformer};
use serde_json::{Value, json};
use tch::{Device, Kind};

use crate::support::{Case, stderr, tiny_flow, tiny_model};

/// Prompts with completions. Numbers, because tokenizers cut them each in its own way.
const PROBES: [(&str, &str); 4] = [
    ("What is the capital of France?", "The capital of France is Paris."),
    ("tell me about thing number 12345", "It has 3 parts, and was built in 1987."),
    ("Write a line of code.", "fn main() { println!(\"{}\", 1 + 1); }"),
    ("Say nothing.", ""),
];

/// Scores the probes under the trainer's adapter and under the base.
const STAGES: &str = r#"
[stages.probes]
kind = "source"
dataset = "PROBES"
select = { prompt = "prompt", completion = "completion" }

[stages.score]
kind = "scorer"
input = "probes"
model = "policy"
device = "cpu:1"
adapter = "align"

[stages.trained]
kind = "sink"
input = "score"
path = "trained.jsonl"

[stages.score_base]
kind = "scorer"
input = "probes"
model = "policy"
device = "cpu:1"
adapter = "base"

[stages.base]
kind = "sink"
input = "score_base"
path = "base.jsonl"
"#;

/// The interpreter of `$FLOWRUN_ORACLE_PYTHON`, which then has to work, or python3; else why not.
fn python() -> Result<PathBuf, String> {
    let named = std::env::var_os("FLOWRUN_ORACLE_PYTHON").map(PathBuf::from);
    let python = named.clone().unwrap_or_else(|| "python3".into());
    let import = Command::new(&python).args(["-c", "import torch, transformers, peft"]).output();
    let reason = match import {
        Ok(output) if output.status.success() => return Ok(python),
        Ok(output) => stderr(&output).lines().last().unwrap_or("no reason given").to_owned(),
        Err(error) => error.to_string(),
    };
    assert!(named.is_none(), "FLOWRUN_ORACLE_PYTHON={}: {reason}", python.display());
    Err(format!("{}: {reason}", python.display()))
}

fn probes(case: &Case) -> String {
    let line = |(prompt, completion)| json!({ "prompt": prompt, "completion": completion }).to_string() + "\n";
    case.write("probes.jsonl", &PROBES.map(line).concat());
    STAGES.replace("PROBES", case.path("probes.jsonl").to_str().unwrap())
}

/// A run whose scores are compared.
struct Oracle {
    python: PathBuf,
    /// What transformers loads.
    model: PathBuf,
    run: PathBuf,
    opened: Pretrained,
    weights: Transformer,
}

impl Oracle {
    fn new(python: PathBuf, source: &Source, model: PathBuf, run: PathBuf) -> Self {
        let opened = Pretrained::open(source, &ModelOptions::default()).unwrap();
        let weights = Transformer::load(opened.config.clone(), &opened.weights, Kind::Float, Device::Cpu).unwrap();
        Self { python, model, run, opened, weights }
    }

    fn adapter(&self) -> PathBuf {
        self.run.join("round-1/align/adapter")
    }

    /// The scores of a sink, with the logits behind each of them added.
    fn scores(&self, file: &str, adapter: Option<&Path>) -> PathBuf {
        let lora = adapter.map(|dir| Lora::load(dir, &self.opened.config, Device::Cpu).unwrap());
        let text = std::fs::read_to_string(self.run.join(file)).unwrap();
        let mut rows: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(rows.len(), PROBES.len());
        for row in &mut rows {
            let logits = self.logits(row["prompt"].as_str().unwrap(), row["completion"].as_str().unwrap(), &lora);
            assert_eq!(row["logprob_tokens"], logits.len());
            row["logits"] = json!(logits);
        }
        let path = self.run.join(format!("with-logits-{file}"));
        std::fs::write(&path, rows.iter().map(|row| format!("{row}\n")).collect::<String>()).unwrap();
        path
    }

    /// What every token of a finished answer is drawn from, `[tokens][vocabulary]`.
    fn logits(&self, prompt: &str, completion: &str, lora: &Option<Lora>) -> Vec<Vec<f32>> {
        let prompt = self.opened.encode_chat(&[ChatMessage::new("user", prompt)], true).unwrap();
        let mut answer = self.opened.tokenizer.encode(completion, false).unwrap();
        answer.extend(self.opened.tokenizer.eos_ids().first());
        let mut tree = Tree::new(&prompt, &[&answer], self.weights.heads()).unwrap();
        let (ids, positions) = (tree.ids.shallow_clone(), tree.positions.shallow_clone());
        let adapters = Adapters::from(lora.as_ref());
        let hidden = tch::no_grad(|| self.weights.hidden(&ids, &positions, &mut tree, &adapters)).unwrap();
        let rows = self.weights.logits(&hidden.index_select(0, &tree.predictors)).unwrap();
        Vec::try_from(rows).unwrap()
    }

    fn compare(&self, scores: &Path, adapter: Option<&Path>) -> Output {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/oracle/adapter.py");
        let mut command = Command::new(&self.python);
        command.arg(script).arg("--model").arg(&self.model).arg("--scores").arg(scores);
        if let Some(adapter) = adapter {
            command.arg("--adapter").arg(adapter);
        }
        command.env("HF_HUB_OFFLINE", "1").output().unwrap()
    }

    /// Both scores agree, and each only with the model it is of.
    fn check(&self) {
        let adapter = self.adapter();
        let trained = self.scores("trained.jsonl", Some(&adapter));
        let base = self.scores("base.jsonl", None);
        for (scores, adapter) in [(&trained, Some(adapter.as_path())), (&base, None)] {
            let output = self.compare(scores, adapter);
            assert!(output.status.success(), "{}\n{}", String::from_utf8_lossy(&output.stdout), stderr(&output));
            print!("{}", String::from_utf8_lossy(&output.stdout));
        }
        let output = self.compare(&base, Some(&adapter));
        assert_eq!(output.status.code(), Some(1), "the base passes for the adapter");
        assert!(stderr(&output).contains("above the tolerance"), "{}", stderr(&output));
    }
}

#[test]
fn an_adapter_is_the_same_model_in_peft() {
    let case = Case::new(16, "");
    // A learning rate that changes the model for certain.
    let flow = tiny_flow(1, &probes(&case)).replace("learning_rate = 1e-3", "learning_rate = 1e-2");
    case.write("flow.toml", &flow);
    case.done(&["flow.toml"]);
    match python() {
        Ok(python) => {
            let source = Source::Directory(tiny_model());
            Oracle::new(python, &source, tiny_model(), case.path("runs/tiny")).check();
        }
        Err(reason) => eprintln!("skipped: no Python with torch, transformers and peft ({reason})"),
    }
}

#[test]
#[ignore = "minutes of work on the builtin model; run it by hand, with FLOWRUN_ORACLE_PYTHON"]
fn an_adapter_of_the_builtin_model_is_the_same_model_in_peft() {
    let python = python().expect("Python with torch, transformers and peft");
    let case = Case::new(0, "");
    case.write("probes.toml", &probes(&case));
    let flow = Path::new(env!("CARGO_MANIFEST_DIR")).join("flows/quickstart.toml");
    let f32 = "models.policy.dtype=\"f32\"";
    case.done(&[flow.to_str().unwrap(), "probes.toml", "--try", "8", "--set", f32, "--output", "out"]);
    Oracle::new(python, &Source::Builtin, builtin_path().unwrap(), case.path("out")).check();
}
