//! Weights of a model on disk, under Hugging Face's names.
//!
//! A tensor goes from the disk to its dtype and device a few megabytes at a time: what is held beside
//! the model itself is one such piece.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use safetensors::Dtype;
use tch::{Device, Kind, Tensor};

use super::ModelError;
use super::config::Config;
use super::gguf::Gguf;
use super::parameters::shapes;
use super::safetensors::Safetensors;
use crate::torch::{TorchError, bytes_mut};

/// Bytes that are filled at a time: small enough for a core's cache, and that no temporary of a piece is
/// so large that glibc's malloc maps it. The first mapping that is freed raises its threshold, and the
/// weights that follow would be cut from a heap with a fifth of slack.
const PIECE: usize = 1 << 15;
/// Threads that read one tensor; more do not make memory faster.
const MAX_THREADS: usize = 4;

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

    /// Compares the headers of the files with the configuration.
    ///
    /// # Errors
    /// A tensor is missing or has another shape; there are more layers than the configuration has.
    pub fn check(&self, config: &Config) -> Result<(), ModelError> {
        if let Self::Dummy(_) = self {
            return Ok(());
        }
        let path = self.paths().first().cloned().unwrap_or_default();
        for (name, shape) in shapes(config) {
            check_shape(&path, &name, self.shape(&name).as_deref(), &shape)?;
        }
        let layer = |name: &str| name.strip_prefix("model.layers.")?.split('.').next()?.parse::<usize>().ok();
        match self.names().iter().find(|name| layer(name).is_some_and(|layer| layer >= config.layers)) {
            Some(name) => {
                let message =
                    format!("is there, and the configuration has {} layers; are they of one model?", config.layers);
                Err(ModelError::tensor(&path, name, message))
            }
            None => Ok(()),
        }
    }

    /// The tensor `name`, which must have `shape`, converted to `kind` on `device`.
    ///
    /// # Errors
    /// As [`Weights::read`].
    pub fn tensor(&self, name: &str, shape: &[usize], kind: Kind, device: Device) -> Result<Tensor, ModelError> {
        let size: Vec<i64> = shape.iter().map(|n| *n as i64).collect();
        let tensor = Tensor::f_empty(size, (kind, self.read_on(device))).map_err(TorchError::from)?;
        self.read(name, shape, &tensor)?;
        Ok(tensor.f_to_device(device).map_err(TorchError::from)?)
    }

    /// Where tensors for `device` are read: files on the CPU, random numbers where they are used.
    pub fn read_on(&self, device: Device) -> Device {
        if let Self::Dummy(_) = self { device } else { Device::Cpu }
    }

    /// Reads the tensor `name`, which must have `shape`, into the memory of `into`: a contiguous tensor
    /// of that shape on the device of [`Weights::read_on`], whose dtype the values are converted to.
    ///
    /// # Errors
    /// Names file and tensor when it is missing, has another shape, or holds a number that is not
    /// finite.
    pub fn read(&self, name: &str, shape: &[usize], into: &Tensor) -> Result<(), ModelError> {
        match self {
            Self::Safetensors(files) => {
                let path = files.path_of(name).or_else(|| files.paths().next()).unwrap_or(Path::new(""));
                check_shape(path, name, files.info(name).map(|(shape, _)| shape), shape)?;
                read_safetensors(files, path, name, into)
            }
            Self::Gguf(gguf) => gguf.read_tensor(name, shape, into),
            Self::Dummy(dummy) => Ok(dummy.fill(name, into)?),
        }
    }

    /// How many tensors are stored in which way.
    pub fn stored(&self) -> BTreeMap<String, usize> {
        let mut counts = BTreeMap::new();
        let mut count = |kind: String| *counts.entry(kind).or_default() += 1;
        match self {
            Self::Safetensors(files) => {
                files.names().filter_map(|name| files.info(name)).for_each(|(_, dtype)| count(format!("{dtype:?}")));
            }
            Self::Gguf(gguf) => {
                let infos = gguf.file.tensor_names().filter_map(|name| gguf.file.tensor(name));
                infos.for_each(|info| count(format!("{:?}", info.encoding)));
            }
            Self::Dummy(_) => {}
        }
        counts
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

/// Fills `[rows, width]` by some threads, each a stretch of rows and [`PIECE`] bytes at a time: the
/// memory is touched for the first time here, which costs more than reading it from the page cache.
/// `copy` gets the first row and a piece to fill.
fn fill(
    path: &Path,
    name: &str,
    into: &Tensor,
    copy: impl Fn(i64, &Tensor) -> Result<(), ModelError> + Sync,
) -> Result<(), ModelError> {
    let (rows, width) = into.size2().map_err(TorchError::from)?;
    let row_bytes = (width.max(1) as usize) * into.kind().elt_size_in_bytes();
    let piece = (PIECE / row_bytes).max(1) as i64;
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get().min(MAX_THREADS)) as i64;
    let stretch = rows.div_euclid(threads).max(piece).max(1);
    let run = |first: i64, rows: Tensor| -> Result<bool, ModelError> {
        let mut finite = true;
        for start in (0..rows.size2().map_err(TorchError::from)?.0).step_by(piece as usize) {
            let part = rows.f_narrow(0, start, piece.min(rows.size()[0] - start)).map_err(TorchError::from)?;
            copy(first + start, &part)?;
            // A sum is finite unless a term isn't: cheaper than a mask.
            let sum = part.f_sum(Kind::Float).and_then(|sum| sum.f_double_value(&[]));
            finite &= sum.map_err(TorchError::from)?.is_finite();
        }
        Ok(finite)
    };
    let finite = std::thread::scope(|scope| {
        let run = &run;
        let mut running = Vec::new();
        let mut first = 0;
        while first + stretch < rows {
            let part = into.f_narrow(0, first, stretch).map_err(TorchError::from)?;
            running.push(scope.spawn(move || {
                tch::set_num_threads(1);
                run(first, part)
            }));
            first += stretch;
        }
        let last = into.f_narrow(0, first, rows - first).map_err(TorchError::from)?;
        // Pieces are too small to be shared by libtorch's own threads, which would wait for each other.
        let own_threads = tch::get_num_threads();
        tch::set_num_threads(1);
        let last = run(first, last);
        tch::set_num_threads(own_threads);
        let ended = running.into_iter().map(|thread| thread.join());
        let ended = ended.map(|result| result.unwrap_or_else(|_| Err(ModelError::tensor(path, name, "can't be read"))));
        ended.chain([last]).try_fold(true, |all, finite| Ok::<_, ModelError>(all & finite?))
    })?;
    if finite { Ok(()) } else { Err(ModelError::tensor(path, name, "holds NaN or infinity; download the model again")) }
}

fn read_safetensors(files: &Safetensors, path: &Path, name: &str, into: &Tensor) -> Result<(), ModelError> {
    let (shape, dtype) = files.info(name).unwrap_or((&[], Dtype::F32));
    let stored = match dtype {
        Dtype::F32 => Kind::Float,
        Dtype::F16 => Kind::Half,
        Dtype::BF16 => Kind::BFloat16,
        other => {
            let message = format!("has type {other:?}; supported are F32, F16 and BF16");
            return Err(ModelError::tensor(path, name, message));
        }
    };
    let width = shape.last().copied().unwrap_or(1) as i64;
    let row_bytes = width as u64 * stored.elt_size_in_bytes() as u64;
    fill(path, name, &into.f_view([-1, width]).map_err(TorchError::from)?, |first, rows| {
        let offset = first as u64 * row_bytes;
        if rows.kind() == stored {
            return bytes_mut(rows, |bytes| files.read(name, offset, bytes))?;
        }
        let mut bytes = vec![0; rows.size().first().map_or(0, |n| *n as usize) * row_bytes as usize];
        files.read(name, offset, &mut bytes)?;
        let read = Tensor::f_from_data_size(&bytes, &rows.size(), stored).map_err(TorchError::from)?;
        Ok(rows.shallow_clone().f_copy_(&read).map_err(TorchError::from)?)
    })
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
        let interleaved = file.metadata().text("general.architecture") == Some("llama");
        Self { file, interleaved_head: interleaved.then_some(config.head_dim) }
    }

    pub fn file(&self) -> &Gguf {
        &self.file
    }

    fn read_tensor(&self, name: &str, shape: &[usize], into: &Tensor) -> Result<(), ModelError> {
        let missing = || ModelError::tensor(self.file.path(), name, "is missing; download the model again");
        let stored = gguf_name(name).ok_or_else(missing)?;
        let info = self.file.tensor(&stored).ok_or_else(missing)?;
        check_shape(self.file.path(), name, Some(&info.shape), shape)?;
        let width = info.shape.last().copied().unwrap_or(1) as i64;
        let rows = into.f_view([-1, width]).map_err(TorchError::from)?;
        fill(self.file.path(), &stored, &rows, |first, rows| {
            let mut values = Vec::new();
            let count = rows.size().first().map_or(0, |n| *n as usize);
            self.file.read_rows(&stored, first as usize, count, &mut values)?;
            let read = Tensor::f_from_slice(&values).and_then(|read| read.f_view(rows.size().as_slice()));
            Ok(rows.shallow_clone().f_copy_(&read.map_err(TorchError::from)?).map_err(TorchError::from)?)
        })?;
        match self.interleaved_head {
            Some(head) if stored.contains("attn_q.") || stored.contains("attn_k.") => {
                let ordered = halves(into, head)?;
                Ok(into.shallow_clone().f_copy_(&ordered).map_err(TorchError::from)?)
            }
            _ => Ok(()),
        }
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

/// The other way: from Hugging Face's order of rows to llama.cpp's.
pub(super) fn interleaved(tensor: &Tensor, head: usize) -> Result<Tensor, TorchError> {
    let size = tensor.size();
    let half = (head / 2) as i64;
    let width: i64 = size.iter().skip(1).product();
    Ok(tensor.f_view([-1, 2, half, width])?.f_transpose(1, 2)?.f_reshape(&size)?)
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

    fn fill(&self, name: &str, into: &Tensor) -> Result<(), TorchError> {
        let mut into = into.f_flatten(0, -1)?;
        if name.ends_with("norm.weight") {
            let _ = into.f_fill_(1.0)?;
            return Ok(());
        }
        if name.ends_with(".bias") {
            let _ = into.f_zero_()?;
            return Ok(());
        }
        let hash = blake3::hash(name.as_bytes());
        let place = hash.as_bytes().first_chunk().map_or(0, |bytes| u32::from_le_bytes(*bytes) as usize);
        let stretch = Tensor::f_from_slice(&self.values)?.f_to_device(into.device())?;
        let stretch = stretch.f_roll([-((place % Self::LENGTH) as i64)], [0])?;
        let count = into.numel();
        for done in (0..count).step_by(Self::LENGTH) {
            let numbers = stretch.f_narrow(0, 0, Self::LENGTH.min(count - done) as i64)?;
            into.f_narrow(0, done as i64, numbers.numel() as i64)?.f_copy_(&numbers)?;
        }
        Ok(())
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
pub(super) fn gguf_name(name: &str) -> Option<String> {
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
