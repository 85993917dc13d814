//! Weights of a model on disk, under Hugging Face's names.
//!
//! A tensor goes from the disk to its dtype and device a few megabytes at a time: what is held beside
//! the model itself is one such piece.

use std::path::{Path, PathBuf};

use safetensors::Dtype;
use tch::{Device, Kind, Tensor};

use super::ModelError;
use super::config::Config;
use super::gguf::Gguf;
use super::safetensors::Safetensors;
use crate::torch::TorchError;

/// Bytes that are read at a time: large enough for the disk, small enough for the cache.
const PIECE: usize = 4 << 20;

/// Where the weights of a model come from.
#[derive(Debug)]
pub enum Weights {
    Safetensors(Safetensors),
    Gguf(Box<GgufWeights>),
    /// Random numbers instead of a download, for trying out how fast and how large a model is.
    Dummy(Dummy),
}

impl Weights {
    /// Names of all tensors, unordered.
    pub fn names(&self) -> Vec<String> {
        match self {
            Self::Safetensors(files) => files.names().map(str::to_owned).collect(),
            Self::Gguf(gguf) => gguf.file.tensor_names().filter_map(hugging_face_name).collect(),
            Self::Dummy(_) => Vec::new(),
        }
    }

    /// The shape that the file has for a tensor; dummy weights have any.
    pub fn shape(&self, name: &str) -> Option<Vec<usize>> {
        match self {
            Self::Safetensors(files) => files.info(name).map(|(shape, _)| shape.to_vec()),
            Self::Gguf(gguf) => gguf.file.tensor(&gguf_name(name)?).map(|info| info.shape.clone()),
            Self::Dummy(_) => None,
        }
    }

    /// The tensor `name`, which must have `shape`, converted to `kind` on `device`.
    ///
    /// # Errors
    /// Names file and tensor when it is missing, has another shape, or holds a number that is not
    /// finite.
    pub fn tensor(&self, name: &str, shape: &[usize], kind: Kind, device: Device) -> Result<Tensor, ModelError> {
        match self {
            Self::Safetensors(files) => {
                let path = files.path_of(name).or_else(|| files.paths().next()).unwrap_or(Path::new(""));
                check_shape(path, name, files.info(name).map(|(shape, _)| shape), shape)?;
                read_safetensors(files, path, name, kind, device)
            }
            Self::Gguf(gguf) => gguf.tensor(name, shape, kind, device),
            Self::Dummy(dummy) => Ok(dummy.tensor(name, shape, kind, device)?),
        }
    }

    /// The files that hold the weights.
    pub fn paths(&self) -> Vec<PathBuf> {
        match self {
            Self::Safetensors(files) => files.paths().map(Path::to_owned).collect(),
            Self::Gguf(gguf) => vec![gguf.file.path().to_owned()],
            Self::Dummy(_) => Vec::new(),
        }
    }
}

fn check_shape(path: &Path, name: &str, found: Option<&[usize]>, wanted: &[usize]) -> Result<(), ModelError> {
    match found {
        None => Err(ModelError::tensor(path, name, "is missing; the weights are of another model than config.json")),
        Some(found) if found != wanted => Err(ModelError::tensor(
            path,
            name,
            format!("has shape {found:?}, and the configuration asks for {wanted:?}; are they of one model?"),
        )),
        Some(_) => Ok(()),
    }
}

/// A tensor that is filled row by row.
struct Filling {
    tensor: Tensor,
    /// The same memory as `[rows, width]`.
    rows: Tensor,
    filled: i64,
    finite: bool,
}

impl Filling {
    fn new(shape: &[usize], width: usize, kind: Kind, device: Device) -> Result<Self, TorchError> {
        let size: Vec<i64> = shape.iter().map(|n| *n as i64).collect();
        let tensor = Tensor::f_empty(size, (kind, device))?;
        let rows = tensor.f_view([-1, width as i64])?;
        Ok(Self { tensor, rows, filled: 0, finite: true })
    }

    fn push(&mut self, rows: &Tensor) -> Result<(), TorchError> {
        let count = rows.size().first().copied().unwrap_or(0);
        self.rows.f_narrow(0, self.filled, count)?.f_copy_(rows)?;
        self.filled += count;
        // A sum is finite unless a term isn't: cheaper than a mask.
        self.finite &= rows.f_sum(Kind::Float)?.f_double_value(&[])?.is_finite();
        Ok(())
    }

    fn finish(self, path: &Path, name: &str) -> Result<Tensor, ModelError> {
        if !self.finite {
            return Err(ModelError::tensor(path, name, "holds NaN or infinity; download the model again"));
        }
        Ok(self.tensor)
    }
}

fn read_safetensors(
    files: &Safetensors,
    path: &Path,
    name: &str,
    kind: Kind,
    device: Device,
) -> Result<Tensor, ModelError> {
    let (shape, dtype) = files.info(name).unwrap_or((&[], Dtype::F32));
    let (stored, bytes) = match dtype {
        Dtype::F32 => (Kind::Float, 4),
        Dtype::F16 => (Kind::Half, 2),
        Dtype::BF16 => (Kind::BFloat16, 2),
        other => {
            let message = format!("has type {other:?}; supported are F32, F16 and BF16");
            return Err(ModelError::tensor(path, name, message));
        }
    };
    let width = shape.last().copied().unwrap_or(1);
    let row_bytes = width * bytes;
    let total: usize = shape.iter().product::<usize>() * bytes;
    let mut filling = Filling::new(shape, width, kind, device)?;
    let mut buffer = vec![0; (PIECE / row_bytes.max(1)).max(1).saturating_mul(row_bytes).min(total)];
    let mut offset = 0;
    while offset < total {
        let piece = buffer.len().min(total - offset);
        let bytes = buffer.get_mut(..piece).unwrap_or_default();
        files.read(name, offset as u64, bytes)?;
        let size = [(piece / row_bytes) as i64, width as i64];
        filling.push(&Tensor::f_from_data_size(bytes, &size, stored)?)?;
        offset += piece;
    }
    filling.finish(path, name)
}

/// A GGUF file and what is needed to undo llama.cpp's order of rows.
#[derive(Debug)]
pub struct GgufWeights {
    file: Gguf,
    /// Rows of a head of q and k where those are stored interleaved, as for llama; else `None`.
    interleaved_head: Option<usize>,
}

impl GgufWeights {
    pub fn new(file: Gguf, config: &Config) -> Self {
        let interleaved = file.text("general.architecture") == Some("llama");
        Self { file, interleaved_head: interleaved.then_some(config.head_dim) }
    }

    fn tensor(&self, name: &str, shape: &[usize], kind: Kind, device: Device) -> Result<Tensor, ModelError> {
        let missing = || ModelError::tensor(self.file.path(), name, "is missing; download the model again");
        let stored = gguf_name(name).ok_or_else(missing)?;
        let info = self.file.tensor(&stored).ok_or_else(missing)?;
        check_shape(self.file.path(), name, Some(&info.shape), shape)?;
        let tensor = self.read(&stored, kind, device)?;
        match self.interleaved_head {
            Some(head) if stored.contains("attn_q.") || stored.contains("attn_k.") => Ok(halves(&tensor, head)?),
            _ => Ok(tensor),
        }
    }

    fn read(&self, stored: &str, kind: Kind, device: Device) -> Result<Tensor, ModelError> {
        let info =
            self.file.tensor(stored).ok_or_else(|| ModelError::tensor(self.file.path(), stored, "is missing"))?;
        let width = info.shape.last().copied().unwrap_or(1);
        let count = (PIECE / 4 / width.max(1)).max(1);
        let mut filling = Filling::new(&info.shape, width, kind, device)?;
        let mut values = Vec::new();
        for first in (0..info.rows()).step_by(count) {
            values.clear();
            self.file.read_rows(stored, first, count.min(info.rows() - first), &mut values)?;
            let rows = Tensor::f_from_slice(&values).and_then(|rows| rows.f_view([-1, width as i64]));
            filling.push(&rows?)?;
        }
        filling.finish(self.file.path(), stored)
    }
}

/// llama.cpp stores the rows of q and k so that the two numbers a rotation mixes are neighbours
/// (`0, d/2, 1, d/2 + 1, ...`); Hugging Face has the first halves of a head, then the second.
fn halves(tensor: &Tensor, head: usize) -> Result<Tensor, TorchError> {
    let size = tensor.size();
    let half = (head / 2) as i64;
    let width: i64 = size.iter().skip(1).product();
    Ok(tensor.f_view([-1, half, 2, width])?.f_transpose(1, 2)?.f_reshape(&size)?)
}

/// Random weights: normal with standard deviation 0.02, norms 1, biases 0; the same for a name and a
/// seed everywhere. One stretch of numbers serves all tensors, each from a place of its own, so that a
/// model of any size is there at once; libtorch's generator is shared by all threads and not used.
#[derive(Debug)]
pub struct Dummy {
    values: Vec<f32>,
}

impl Dummy {
    /// A prime, so that rows of a matrix don't repeat.
    const LENGTH: usize = 1_000_003;

    pub fn new(seed: u64) -> Self {
        let mut bytes = vec![0; Self::LENGTH * 8];
        blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut bytes);
        let uniform = |bytes: &[u8; 4]| (f64::from(u32::from_le_bytes(*bytes)) + 0.5) / 4_294_967_296.0;
        let values = bytes.as_chunks().0.as_chunks().0.iter().map(|[a, b]| {
            // Box and Muller 1958
            let normal = (-2.0 * uniform(a).ln()).sqrt() * (std::f64::consts::TAU * uniform(b)).cos();
            (0.02 * normal) as f32
        });
        Self { values: values.collect() }
    }

    fn tensor(&self, name: &str, shape: &[usize], kind: Kind, device: Device) -> Result<Tensor, TorchError> {
        let size: Vec<i64> = shape.iter().map(|n| *n as i64).collect();
        if name.ends_with("norm.weight") {
            return Ok(Tensor::f_ones(size, (kind, device))?);
        }
        if name.ends_with(".bias") {
            return Ok(Tensor::f_zeros(size, (kind, device))?);
        }
        let hash = blake3::hash(name.as_bytes());
        let mut at =
            hash.as_bytes().first_chunk().map_or(0, |bytes| u32::from_le_bytes(*bytes) as usize) % Self::LENGTH;
        let mut left: usize = shape.iter().product();
        let mut filling = Filling::new(shape, 1, kind, device)?;
        while left > 0 {
            let stretch = self.values.get(at..).unwrap_or_default();
            let stretch = stretch.get(..left).unwrap_or(stretch);
            filling.push(&Tensor::f_from_slice(stretch)?.f_view([-1, 1])?)?;
            left -= stretch.len();
            at = 0;
        }
        Ok(filling.tensor)
    }
}

/// Parts of a block: Hugging Face's name and GGUF's.
const BLOCK_NAMES: [(&str, &str); 11] = [
    ("input_layernorm", "attn_norm"),
    ("self_attn.q_proj", "attn_q"),
    ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"),
    ("self_attn.o_proj", "attn_output"),
    ("self_attn.q_norm", "attn_q_norm"),
    ("self_attn.k_norm", "attn_k_norm"),
    ("post_attention_layernorm", "ffn_norm"),
    ("mlp.gate_proj", "ffn_gate"),
    ("mlp.up_proj", "ffn_up"),
    ("mlp.down_proj", "ffn_down"),
];

const OUTER_NAMES: [(&str, &str); 3] =
    [("model.embed_tokens", "token_embd"), ("model.norm", "output_norm"), ("lm_head", "output")];

/// `model.layers.0.self_attn.q_proj.weight` is `blk.0.attn_q.weight`.
fn gguf_name(name: &str) -> Option<String> {
    let (stem, suffix) = name.rsplit_once('.')?;
    if let Some(rest) = stem.strip_prefix("model.layers.") {
        let (layer, part) = rest.split_once('.')?;
        let (_, stored) = BLOCK_NAMES.iter().find(|(theirs, _)| *theirs == part)?;
        return Some(format!("blk.{layer}.{stored}.{suffix}"));
    }
    let (_, stored) = OUTER_NAMES.iter().find(|(theirs, _)| *theirs == stem)?;
    Some(format!("{stored}.{suffix}"))
}

/// The other way; `None` for what is no weight of the model (`rope_freqs.weight`).
fn hugging_face_name(stored: &str) -> Option<String> {
    let (stem, suffix) = stored.rsplit_once('.')?;
    if let Some(rest) = stem.strip_prefix("blk.") {
        let (layer, part) = rest.split_once('.')?;
        let (theirs, _) = BLOCK_NAMES.iter().find(|(_, stored)| *stored == part)?;
        return Some(format!("model.layers.{layer}.{theirs}.{suffix}"));
    }
    let (theirs, _) = OUTER_NAMES.iter().find(|(_, stored)| *stored == stem)?;
    Some(format!("{theirs}.{suffix}"))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use safetensors::tensor::{TensorView, serialize};
    use serde_json::Value as Json;

    use super::*;
    use crate::model::gguf::fixture;
    use crate::model::source::builtin_path;

    fn builtin() -> (Config, Weights) {
        let gguf = Gguf::open(&builtin_path().unwrap_or_else(|e| panic!("{e}"))).unwrap();
        let config = Config::from_gguf(&gguf).unwrap();
        let weights = GgufWeights::new(gguf, &config);
        (config, Weights::Gguf(Box::new(weights)))
    }

    fn values(tensor: &Tensor) -> Vec<f32> {
        Vec::try_from(tensor.to_kind(Kind::Float).flatten(0, -1)).unwrap()
    }

    fn compare(tensor: &Tensor, name: &str, expected: &Json) {
        let rows = tensor.size()[0];
        let exact = tensor.to_kind(Kind::Double);
        let weighted = exact.view([rows, -1]).sum_dim_intlist(1, false, None::<Kind>)
            * Tensor::arange(rows, (Kind::Double, Device::Cpu)).f_add_scalar(1.0).unwrap();
        let found = [
            ("sum", exact.sum(Kind::Double)),
            ("abs_sum", exact.abs().sum(Kind::Double)),
            ("row_weighted", weighted.sum(Kind::Double)),
        ];
        for (key, found) in found {
            let (found, wanted) = (found.double_value(&[]), expected[key].as_f64().unwrap());
            let scale = expected["abs_sum"].as_f64().unwrap() * if key == "row_weighted" { rows as f64 } else { 1.0 };
            assert!((found - wanted).abs() <= 1e-10 * scale, "{name} {key}: {found}, transformers has {wanted}");
        }
        let first: Vec<f32> =
            expected["first"].as_array().unwrap().iter().map(|x| x.as_f64().unwrap() as f32).collect();
        assert_eq!(values(tensor).get(..8).unwrap(), first, "{name}");
    }

    /// `tests/oracle/tokenizer.py` writes what transformers' GGUF loader gives; equal to the last bit.
    #[test]
    fn builtin_weights_as_transformers() {
        let fixture: Json = serde_json::from_str(include_str!("../../tests/fixtures/smollm2.json")).unwrap();
        let (config, weights) = builtin();
        assert_eq!(weights.names().len(), 272);
        for (key, kind) in [("weights", Kind::Float), ("weights_bf16", Kind::BFloat16)] {
            for (name, expected) in fixture[key].as_object().unwrap() {
                let shape = weights.shape(name).unwrap();
                compare(&weights.tensor(name, &shape, kind, Device::Cpu).unwrap(), name, expected);
            }
        }
        let elements: usize =
            weights.names().iter().map(|name| weights.shape(name).unwrap().iter().product::<usize>()).sum();
        assert_eq!(config.parameters(), elements as u64);
    }

    #[test]
    fn interleaved_rows_become_halves() {
        let rows: Vec<f32> = vec![0.0, 2.0, 1.0, 3.0, 4.0, 6.0, 5.0, 7.0];
        let stored = Tensor::from_slice(&rows).view([8, 1]);
        assert_eq!(values(&halves(&stored, 4).unwrap()), [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]);
        assert_eq!(values(&halves(&stored.view([8]), 4).unwrap()), [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]);
    }

    fn write_shard(dir: &Path, file: &str, tensors: &[(&str, &[usize], Vec<f32>)]) {
        let bytes: Vec<Vec<u8>> =
            tensors.iter().map(|(.., values)| values.iter().flat_map(|x| x.to_le_bytes()).collect()).collect();
        let views: BTreeMap<&str, TensorView> = tensors
            .iter()
            .zip(&bytes)
            .map(|((name, shape, _), bytes)| (*name, TensorView::new(Dtype::F32, shape.to_vec(), bytes).unwrap()))
            .collect();
        std::fs::write(dir.join(file), serialize(views, None).unwrap()).unwrap();
    }

    fn sharded() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        write_shard(dir.path(), "one.safetensors", &[("a.weight", &[2, 3], vec![1.0, 2.0, 3.0, 4.0, 5.0, 6.0])]);
        write_shard(dir.path(), "two.safetensors", &[("b.weight", &[2], vec![7.0, f32::NAN])]);
        let index = r#"{"weight_map": {"a.weight": "one.safetensors", "b.weight": "two.safetensors"}}"#;
        std::fs::write(dir.path().join("model.safetensors.index.json"), index).unwrap();
        dir
    }

    #[test]
    fn shards_are_one_model() {
        let dir = sharded();
        let weights = Weights::Safetensors(Safetensors::open(dir.path()).unwrap());
        let get = |name: &str, shape: &[usize]| weights.tensor(name, shape, Kind::BFloat16, Device::Cpu);
        let tensor = get("a.weight", &[2, 3]).unwrap();
        assert_eq!((tensor.kind(), tensor.size()), (Kind::BFloat16, vec![2, 3]));
        assert_eq!(values(&tensor), [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
        for (name, shape, file, part) in [
            (
                "a.weight",
                [3, 2].as_slice(),
                "one.safetensors",
                "has shape [2, 3], and the configuration asks for [3, 2]",
            ),
            ("b.weight", &[2], "two.safetensors", "holds NaN or infinity"),
            ("c.weight", &[2], "one.safetensors", "is missing"),
        ] {
            let message = get(name, shape).unwrap_err().to_string();
            assert!(message.contains(file) && message.contains(name) && message.contains(part), "{message}");
        }
    }

    #[test]
    fn broken_files_are_named() {
        let fails = |dir: &Path, part: &str| {
            let message = Safetensors::open(dir).unwrap_err().to_string();
            assert!(message.contains(part), "{message}");
        };
        let dir = sharded();
        std::fs::remove_file(dir.path().join("two.safetensors")).unwrap();
        fails(dir.path(), "two.safetensors: is missing, and model.safetensors.index.json lists it");
        let dir = sharded();
        let shard = std::fs::OpenOptions::new().write(true).open(dir.path().join("two.safetensors")).unwrap();
        shard.set_len(shard.metadata().unwrap().len() - 3).unwrap();
        fails(
            dir.path(),
            "two.safetensors: has 5 bytes of weights where its header says 8, so tensor b.weight is cut off",
        );
        let dir = tempfile::tempdir().unwrap();
        fails(dir.path(), "has no weights: neither model.safetensors nor");
        write_shard(dir.path(), "model.safetensors", &[("a", &[2], vec![1.0, 2.0])]);
        let file = dir.path().join("model.safetensors");
        let good = std::fs::read(&file).unwrap();
        std::fs::write(&file, &good[..good.len() - 1]).unwrap();
        fails(dir.path(), "has 7 bytes of weights where its header says 8, so tensor a is cut off");
        std::fs::write(&file, [&u64::MAX.to_le_bytes()[..], &good[8..]].concat()).unwrap();
        fails(dir.path(), "claims a header of 18446744073709551615 bytes");
        std::fs::write(&file, b"pickle").unwrap();
        fails(dir.path(), "too short");
        std::fs::write(dir.path().join("model.safetensors.index.json"), r#"{"weight_map": {"a": "../x.safetensors"}}"#)
            .unwrap();
        fails(dir.path(), "names the shard \"../x.safetensors\"");
    }

    #[test]
    fn gguf_names_are_translated() {
        let (_dir, gguf) = fixture::small().open();
        let config = Config::from_gguf(&gguf).unwrap();
        let weights = Weights::Gguf(Box::new(GgufWeights::new(gguf, &config)));
        let mut names = weights.names();
        names.sort();
        assert_eq!(names, ["model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight", "model.norm.weight"]);
        for name in &names {
            assert!(weights.shape(name).is_some());
        }
    }

    #[test]
    fn gguf_numbers_that_are_none_are_named() {
        let infinite_scale = [[0x00, 0x7c].to_vec(), vec![1; 32]].concat();
        let builder = fixture::small()
            .f32("blk.0.attn_norm.weight", &[64], (0..64).map(|i| if i == 63 { f32::NAN } else { 1.0 }))
            .raw("output.weight", &[1, 32], 8, infinite_scale);
        let (_dir, gguf) = builder.open();
        let config = Config::from_gguf(&gguf).unwrap();
        let weights = Weights::Gguf(Box::new(GgufWeights::new(gguf, &config)));
        for (name, shape, stored) in [
            ("model.layers.0.input_layernorm.weight", [64].as_slice(), "blk.0.attn_norm.weight"),
            ("lm_head.weight", &[1, 32], "output.weight"),
        ] {
            let message = weights.tensor(name, shape, Kind::Float, Device::Cpu).unwrap_err().to_string();
            assert!(message.contains(&format!("small.gguf: tensor {stored}: holds NaN or infinity")), "{message}");
        }
    }

    #[test]
    fn dummy_weights_depend_on_name_and_seed() {
        let get = |seed, name: &str| {
            let weights = Weights::Dummy(Dummy::new(seed));
            values(&weights.tensor(name, &[50, 40], Kind::Float, Device::Cpu).unwrap())
        };
        assert_eq!(get(1, "a.weight"), get(1, "a.weight"));
        assert_ne!(get(1, "a.weight"), get(2, "a.weight"));
        assert_ne!(get(1, "a.weight"), get(1, "b.weight"));
        let mean_square = get(1, "a.weight").iter().map(|x| x * x).sum::<f32>() / 2000.0;
        assert!((mean_square.sqrt() - 0.02).abs() < 0.002, "{mean_square}");
        assert_eq!(get(1, "model.norm.weight"), [1.0; 2000]);
        let weights = Weights::Dummy(Dummy::new(1));
        let long = values(&weights.tensor("a.weight", &[3, Dummy::LENGTH], Kind::Float, Device::Cpu).unwrap());
        assert_eq!((long[Dummy::LENGTH], long[1]), (long[0], long[2 * Dummy::LENGTH + 1]), "wraps around");
    }
}
