//! The builtin model against transformers and PEFT (`tests/oracle/smollm2.py`).

use std::path::{Path, PathBuf};
use std::sync::Arc;

use tch::{Device, Kind, Tensor};
use tokio::sync::oneshot;

use super::cache::Prefill;
use super::scheduler::Limits;
use super::server::ModelServer;
use super::*;
use crate::model::attention::Tree;
use crate::model::{Adapters, Lora, ModelOptions, Pretrained, Source, Transformer};
use crate::observe::{Metrics, Trace};
use crate::torch::{GradGuard, Tenant, Turn};

fn dir() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/smollm2-parity")
}

fn load(kind: Kind) -> Transformer {
    let opened = Pretrained::open(&Source::Builtin, &ModelOptions::default()).unwrap_or_else(|e| panic!("{e}"));
    Transformer::load(opened.config, &opened.weights, kind, Device::Cpu).unwrap()
}

/// What transformers computed.
struct Expected(Vec<(String, Tensor)>);

impl Expected {
    fn read() -> Self {
        Self(Tensor::read_safetensors(dir().join("expected.safetensors")).unwrap())
    }

    fn get(&self, name: &str) -> &Tensor {
        self.0.iter().find(|(found, _)| found == name).map(|(_, tensor)| tensor).unwrap()
    }

    fn numbers(&self, name: &str) -> Vec<i64> {
        Vec::try_from(self.get(name)).unwrap()
    }

    /// Texts, each with the length of its prompt.
    fn texts(&self) -> Vec<(Vec<u32>, usize)> {
        let ids: Vec<u32> = self.numbers("ids").into_iter().map(|id| id as u32).collect();
        let mut start = 0;
        let cut = |(length, prompt): (i64, i64)| {
            start += length as usize;
            (ids[start - length as usize..start].to_vec(), prompt as usize)
        };
        self.numbers("lengths").into_iter().zip(self.numbers("prompts")).map(cut).collect()
    }
}

/// Log-probs of every token after the first, of several texts in one pass, each under its adapter.
fn log_probs(model: &Transformer, texts: &[&[u32]], adapters: &[Option<&Lora>]) -> Tensor {
    let _no_grad = GradGuard::set(false);
    let ids: Vec<i64> = texts.concat().into_iter().map(i64::from).collect();
    let positions: Vec<i64> = texts.iter().flat_map(|text| 0..text.len() as i64).collect();
    let rows: Vec<_> = texts.iter().zip(adapters).map(|(text, lora)| (text.len() as i64, *lora)).collect();
    let mut attention = Prefill::new(model.heads(), texts.iter().map(|text| (text.len(), None))).unwrap();
    let (ids, positions) = (Tensor::from_slice(&ids), Tensor::from_slice(&positions));
    let hidden = model.infer(&ids, &positions, &mut attention, &Adapters::Rows(&rows)).unwrap();
    let mut start = 0;
    let of = |text: &&[u32]| {
        let count = text.len() as i64 - 1;
        let found = model.infer_log_probs(&hidden.narrow(0, start, count), &ids.narrow(0, start + 1, count)).unwrap();
        start += count + 1;
        found
    };
    Tensor::cat(&texts.iter().map(of).collect::<Vec<_>>(), 0)
}

/// The same of one text in the pass that a trainer makes.
fn trainer_log_probs(model: &Transformer, text: &[u32], adapter: Option<&Lora>) -> Tensor {
    let _no_grad = GradGuard::set(false);
    let mut tree = Tree::new(&text[..1], &[&text[1..]], model.heads()).unwrap();
    let (ids, positions) = (tree.ids.shallow_clone(), tree.positions.shallow_clone());
    let hidden = model.hidden(&ids, &positions, &mut tree, &Adapters::from(adapter)).unwrap();
    model.log_probs(&hidden.index_select(0, &tree.predictors), &tree.targets).unwrap()
}

#[test]
fn greedy_answers_are_those_of_transformers() {
    let _no_grad = GradGuard::set(false);
    let limits = Limits { rows: 32, prefill_tokens: 512, cache_bytes: 1 << 30, graphs: false };
    let mut server =
        ModelServer::new(load(Kind::Float), "m", "cpu:0", limits, Arc::<Trace>::default(), &Metrics::default());
    let texts = Expected::read().texts();
    let ask = |(text, prompt): &(Vec<u32>, usize)| {
        let (reply, answer) = oneshot::channel();
        let request = GenerateRequest {
            prompt: text[..*prompt].to_vec(),
            streams: vec![Stream { key: 0, row: 0, index: 0 }],
            sampling: Sampling::greedy(32),
            stop: vec![2],
            stop_strings: None,
            alone: false,
            adapter: None,
            stage: "sample".into(),
        };
        server.submit_generate(request, reply);
        answer
    };
    let answers: Vec<_> = texts.iter().map(ask).collect();
    while server.turn() == Turn::Busy {}
    for ((text, prompt), mut answer) in texts.iter().zip(answers) {
        let found = answer.try_recv().unwrap().unwrap();
        assert_eq!(found.candidates[0].ids, text[*prompt..]);
    }
}

#[test]
fn log_probs_are_those_of_transformers() {
    let (expected, model) = (Expected::read(), load(Kind::Float));
    let texts = expected.texts();
    let inferred = |text: &[u32]| log_probs(&model, &[text], &[None]);
    let trained = |text: &[u32]| trainer_log_probs(&model, text, None);
    for pass in [&inferred as &dyn Fn(&[u32]) -> Tensor, &trained] {
        let found: Vec<_> = texts.iter().map(|(text, _)| pass(text)).collect();
        let apart = (Tensor::cat(&found, 0) - expected.get("base")).abs().max().double_value(&[]);
        println!("largest difference of log-probs in float32: {apart:.1e}");
        assert!(apart < 1e-3, "{apart}");
    }
}

/// The base and two adapters side by side in one pass, and alone in a trainer's, in bf16: no further from transformers in float32
/// than 1.2 times transformers' own bf16.
#[test]
fn bf16_is_as_exact_as_that_of_transformers() {
    let (expected, model) = (Expected::read(), load(Kind::BFloat16));
    let names = ["one", "two"];
    let adapters = names.map(|name| Lora::load(&dir().join(name), &model.config, Device::Cpu).unwrap());
    let under = [None, Some(&adapters[0]), Some(&adapters[1])];
    let mut found: [Vec<Tensor>; 6] = Default::default();
    for (text, _) in expected.texts() {
        let together = log_probs(&model, &[&text, &text, &text], &under).view([3, -1]);
        let parts = (0..3).map(|i| together.get(i)).chain(under.map(|lora| trainer_log_probs(&model, &text, lora)));
        found.iter_mut().zip(parts).for_each(|(found, part)| found.push(part));
    }
    let theirs: serde_json::Value =
        serde_json::from_str(&std::fs::read_to_string(dir().join("bf16.json")).unwrap()).unwrap();
    for (name, found) in ["base", "one", "two"].iter().cycle().zip(&found) {
        let error = (Tensor::cat(found, 0) - expected.get(name)).abs();
        let ours = [("mean", error.mean(Kind::Float)), ("p99", error.quantile_scalar(0.99, None, false, "linear"))];
        for (figure, ours) in ours {
            let (ours, theirs) = (ours.double_value(&[]), theirs[name][figure].as_f64().unwrap());
            println!("{name} {figure}: {ours:.4}, transformers {theirs:.4}");
            assert!(ours <= 1.2 * theirs, "{name} {figure}: {ours}, transformers {theirs}");
        }
    }
}
