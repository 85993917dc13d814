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
/// seed on every machine with this libtorch.
#[derive(Debug, Clone, Copy)]
pub struct Dummy {
    pub seed: u64,
}

impl Dummy {
    fn tensor(self, name: &str, shape: &[usize], kind: Kind, device: Device) -> Result<Tensor, TorchError> {
        let size: Vec<i64> = shape.iter().map(|n| *n as i64).collect();
        let options = (kind, device);
        if name.ends_with("norm.weight") {
            return Ok(Tensor::f_ones(size, options)?);
        }
        if name.ends_with(".bias") {
            return Ok(Tensor::f_zeros(size, options)?);
        }
        let hash = blake3::hash(format!("{} {name}", self.seed).as_bytes());
        let seed = hash.as_bytes().first_chunk().map_or(0, |bytes| i64::from_le_bytes(*bytes));
        // One named tensor after another, so that neither order nor threads choose the numbers.
        tch::manual_seed(seed);
        Ok(Tensor::f_empty(size, options)?.f_normal_(0.0, 0.02)?)
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
