//! The tiny Llama of the tests, with an adapter.

use std::path::{Path, PathBuf};

use tch::{Device, Kind};

use super::request::AdapterId;
use crate::model::{ModelOptions, Pretrained, Source, Transformer};

fn dir() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tiny-llama")
}

/// In float32; 512 tokens of context.
pub fn model() -> Transformer {
    model_in(Kind::Float)
}

pub fn model_in(kind: Kind) -> Transformer {
    let opened = Pretrained::open(&Source::Directory(dir()), &ModelOptions::default()).unwrap();
    Transformer::load(opened.config, &opened.weights, kind, Device::Cpu).unwrap()
}

pub fn adapter() -> AdapterId {
    AdapterId { dir: dir().join("adapter"), hash: "adapter".into() }
}
