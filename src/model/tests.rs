//! Every family against what transformers and PEFT compute (`tests/oracle/families.py`), in float32.

use std::path::{Path, PathBuf};

use tch::{Device, Kind, Tensor};

use super::attention::Tree;
use super::safetensors::Safetensors;
use super::{Adapters, Config, Lora, Transformer, Weights};
use crate::torch::GradGuard;

pub fn families() -> Vec<PathBuf> {
    let all = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/families");
    let mut dirs: Vec<_> = std::fs::read_dir(all).unwrap().map(|entry| entry.unwrap().path()).collect();
    dirs.sort();
    assert!(dirs.len() >= 17);
    dirs
}

pub fn load(dir: &Path, kind: Kind) -> Transformer {
    let config = Config::from_json(&dir.join("config.json")).unwrap();
    let weights = Weights::Safetensors(Safetensors::open(dir).unwrap());
    Transformer::load(config, &weights, kind, Device::Cpu).unwrap()
}

/// What transformers computed.
pub struct Expected(Vec<(String, Tensor)>);

impl Expected {
    pub fn read(dir: &Path) -> Self {
        Self(Tensor::read_safetensors(dir.join("expected.safetensors")).unwrap())
    }

    pub fn get(&self, name: &str) -> &Tensor {
        self.0.iter().find(|(found, _)| found == name).map(|(_, tensor)| tensor).unwrap()
    }

    pub fn ids(&self, name: &str) -> Vec<u32> {
        Vec::<i64>::try_from(self.get(name).flatten(0, -1)).unwrap().into_iter().map(|id| id as u32).collect()
    }

    /// The texts whose logits are there.
    pub fn texts(&self) -> Vec<Vec<u32>> {
        let width = self.get("ids").size()[1] as usize;
        self.ids("ids").chunks(width).map(<[u32]>::to_vec).collect()
    }
}

fn logits(model: &Transformer, ids: &[u32], adapters: &Adapters<'_>) -> Tensor {
    let _no_grad = GradGuard::set(false);
    let mut tree = Tree::new(ids, &[], model.heads()).unwrap();
    let (all, positions) = (tree.ids.shallow_clone(), tree.positions.shallow_clone());
    let hidden = model.hidden(&all, &positions, &mut tree, adapters).unwrap();
    model.logits(&hidden.narrow(0, 0, ids.len() as i64)).unwrap()
}

fn largest(difference: Tensor) -> f64 {
    difference.abs().max().double_value(&[])
}

#[test]
fn logits_are_those_of_transformers() {
    for dir in families() {
        let (model, expected) = (load(&dir, Kind::Float), Expected::read(&dir));
        for (row, ids) in expected.texts().iter().enumerate() {
            let (found, wanted) = (logits(&model, ids, &Adapters::Base), expected.get("logits").get(row as i64));
            let apart = largest(&found - &wanted);
            let log_probs = largest(found.log_softmax(-1, Kind::Float) - wanted.log_softmax(-1, Kind::Float));
            println!("{} text {row}: logits {apart:.1e}, log-probs {log_probs:.1e}", dir.display());
            assert!(apart < 1e-4 && log_probs < 1e-4, "{}: {apart} and {log_probs}", dir.display());
        }
    }
}

/// Adapters of all linear layers, and of some by a pattern with a rank-stabilised scale, alone and
/// side by side in one pass.
#[test]
fn adapters_are_those_of_peft() {
    for (family, names) in [("llama3", ["one", "two"].as_slice()), ("phi3", &["one"])] {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/families").join(family);
        let (model, expected) = (load(&dir, Kind::Float), Expected::read(&dir));
        for name in names {
            let lora = Lora::load(&dir.join(name), &model.config, Device::Cpu).unwrap();
            for (row, ids) in expected.texts().iter().enumerate() {
                let wanted = expected.get(&format!("logits {name}")).get(row as i64);
                let apart = largest(logits(&model, ids, &Adapters::All(&lora)) - &wanted);
                let base = largest(logits(&model, ids, &Adapters::Base) - &wanted);
                assert!(apart < 1e-4, "{family} {name}: {apart}");
                assert!(base > 0.1, "{family} {name} changes nothing");
            }
        }
    }
}

#[test]
fn an_adapter_is_written_as_it_was_read() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/families/llama3");
    let model = load(&dir, Kind::Float);
    for name in ["one", "two"] {
        let read = Lora::load(&dir.join(name), &model.config, Device::Cpu).unwrap();
        let copy = tempfile::tempdir().unwrap();
        read.save(copy.path(), "base").unwrap();
        let again = Lora::load(copy.path(), &model.config, Device::Cpu).unwrap();
        assert_eq!(read.named().count(), again.named().count());
        for ((name, tensor), (same, copy)) in read.named().zip(again.named()) {
            assert!(name == same && tensor.equal(copy), "{name}");
        }
        assert_eq!(read.config.scale(), again.config.scale());
    }
}

/// What a judge compares: two labels after the same words. Above some number of rows, and for some sizes of the
/// vocabulary, a processor's product of bf16 comes out in bf16.
#[test]
fn the_odds_of_two_tokens_are_float32_whatever_multiplied_them() {
    let _no_grad = GradGuard::set(false);
    tch::manual_seed(5);
    for dir in families() {
        for kind in [Kind::BFloat16, Kind::Float] {
            let model = load(&dir, kind);
            let (vocabulary, width) = model.head.size2().unwrap();
            for rows in [3, 300] {
                let hidden = (Tensor::randn([rows, width], (Kind::Float, Device::Cpu)) * 20.0).to_kind(kind);
                let tokens = [0, 1].map(|_| Tensor::randint(vocabulary, [rows], (Kind::Int64, Device::Cpu)));
                let [one, other] = tokens.each_ref().map(|t| model.infer_log_probs(&hidden, t).unwrap());
                let [a, b] = tokens.each_ref().map(|t| {
                    let head = model.head.index_select(0, t).to_kind(Kind::Double);
                    let logits = (hidden.to_kind(Kind::Double) * head).sum_dim_intlist(1_i64, false, Kind::Double);
                    model.cap(logits).unwrap()
                });
                let off = ((one - other).to_kind(Kind::Double) - (a - b)).abs().max().double_value(&[]);
                assert!(off < 1e-3, "{} {kind:?} {rows} rows: {off}", dir.display());
            }
        }
    }
}
