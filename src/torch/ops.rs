//! Operations of a pass without gradients, on the device of its tensors: the CPU's or the GPU's own.
//!
//! Where neither serves ([`serves`]), such a pass is made of libtorch's operations. They also stand in for a path of
//! a GPU that is switched off.

use std::cell::OnceCell;
use std::rc::Rc;

use tch::{Device, Kind, Tensor};

use super::gpu::{self, Gpu, Path};
use super::{TorchError, cpu, plain};

/// Who computes.
enum By {
    Cpu,
    Gpu(Rc<Gpu>),
    /// libtorch's operations, on a GPU whose path is switched off.
    Plain,
}

impl By {
    fn of(device: Device, path: Path) -> Self {
        match (device, gpu::of(device)) {
            (Device::Cpu, _) => Self::Cpu,
            (_, Some(gpu)) if gpu.uses(path) => Self::Gpu(gpu),
            _ => Self::Plain,
        }
    }
}

/// Whether tensors of `kind` on `device` with heads of `head_dim`, `group` of them a kv head, go through
/// here; `softcap` is whether scores are capped.
pub fn serves(kind: Kind, device: Device, head_dim: i64, group: i64, softcap: bool) -> bool {
    match device {
        Device::Cpu => cpu::serves(kind, head_dim, group),
        // What flash attention takes.
        _ => {
            kind == Kind::BFloat16
                && !softcap
                && head_dim % 8 == 0
                && head_dim <= 256
                && gpu::of(device).is_some_and(|gpu| gpu.serves())
        }
    }
}

/// `x W^T + bias`: `x` is `[rows, inner]`, `weight` `[outputs, inner]`, `bias` `[outputs]`; the result
/// `[rows, outputs]` in their dtype.
///
/// # Errors
/// When libtorch's operation fails.
pub fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor, TorchError> {
    match x.device() {
        Device::Cpu => cpu::linear(x, weight, bias, false),
        _ => Ok(x.f_linear(weight, bias)?),
    }
}

/// Adds `add` (`[rows, width]`, of `kind`) to the float32 stream `x` in place, and returns the root mean
/// square norm of the sum times `weight` (float32), rounded to `kind`.
///
/// # Errors
/// When a tensor has another shape or type.
pub fn add_norm(x: &Tensor, add: Option<&Tensor>, weight: &Tensor, eps: f64, kind: Kind) -> Result<Tensor, TorchError> {
    match By::of(x.device(), Path::Norm) {
        By::Cpu => cpu::add_norm(x, add, weight, eps, kind),
        By::Gpu(gpu) => gpu.add_norm(x, add, weight, eps),
        By::Plain => plain::add_norm(x, add, weight, eps, kind),
    }
}

/// Norms and rotations of queries and keys.
pub struct Turn<'a> {
    /// Weights of the norms, `[head_dim]` float32.
    pub norms: Option<(&'a Tensor, &'a Tensor)>,
    pub eps: f64,
    /// Cosines and sines, `[rows, 1, dims]` in the model's dtype, the first half of the sines negated.
    pub angles: Option<(&'a Tensor, &'a Tensor)>,
}

impl Turn<'_> {
    /// Norms and turns the first `queries + keys` heads of `qkv` (`[rows, heads, head_dim]`) in place.
    ///
    /// # Errors
    /// When a tensor has another shape or type.
    pub fn apply(&self, qkv: &Tensor, queries: i64, keys: i64) -> Result<(), TorchError> {
        let (_, heads, width) = qkv.size3()?;
        let dims = self.angles.map_or(0, |(cos, _)| cos.size().last().copied().unwrap_or(0));
        if queries + keys > heads || dims > width || dims % 2 != 0 {
            return Err(TorchError::Operation(format!("{heads} heads of {width} can't be turned")));
        }
        match By::of(qkv.device(), Path::Rotary) {
            By::Cpu => cpu::turn(self, qkv, queries, keys),
            By::Gpu(gpu) => gpu.turn(self, qkv, queries, keys),
            By::Plain => plain::turn(self, qkv, queries, keys),
        }
    }
}

/// `act(gate) * up` of `[rows, 2 * width]`, SiLU or the tanh form of GELU: `[rows, width]`.
///
/// # Errors
/// When the tensor has holes.
pub fn gate(gate_up: &Tensor, gelu: bool) -> Result<Tensor, TorchError> {
    match By::of(gate_up.device(), Path::Gate) {
        By::Cpu => cpu::gate(gate_up, gelu),
        By::Gpu(gpu) => gpu.gate(gate_up, gelu),
        By::Plain => plain::gate(gate_up, gelu),
    }
}

/// Where the new tokens of a decode step go, in the slots of their rows.
pub enum Places {
    Host(Vec<i64>),
    Gpu(gpu::Places),
}

impl Places {
    /// `positions` are `[rows]`, i64, on the device; slots have `length` tokens.
    ///
    /// # Errors
    /// When the device has no memory left.
    pub fn new(positions: &Tensor, length: i64) -> Result<Self, TorchError> {
        Ok(match positions.device() {
            Device::Cpu => Self::Host(Vec::try_from(positions)?),
            _ => Self::Gpu(gpu::Places::new(positions.shallow_clone(), length)?),
        })
    }
}

/// Keys and values of the slots of a KV cache, and how they are looked at.
pub struct Slots<'a> {
    /// `[slots, length, kv_heads, head_dim]`.
    pub keys: &'a Tensor,
    pub values: &'a Tensor,
    /// Tokens that are seen, the new one included.
    pub window: Option<i64>,
    pub scale: f64,
    pub softcap: Option<f64>,
}

impl Slots<'_> {
    /// Writes one token's keys and values a row, and attends: `q` is `[rows, heads, head_dim]`, `k` and
    /// `v` are `[rows, kv_heads, head_dim]`, parts of one tensor. Returns `[rows, heads * head_dim]`.
    ///
    /// # Errors
    /// When a tensor has another shape or type, or a position is outside of its slot.
    pub fn attend(&self, q: &Tensor, k: &Tensor, v: &Tensor, places: &Places) -> Result<Tensor, TorchError> {
        let places = match places {
            Places::Host(positions) => return cpu::attend_slots(self, positions, q, k, v),
            Places::Gpu(places) => places,
        };
        match By::of(q.device(), Path::KvStore) {
            By::Gpu(gpu) => gpu.store(k, v, self, places)?,
            _ => plain::store(k, v, self, places)?,
        }
        match By::of(q.device(), Path::Flash) {
            By::Gpu(gpu) => gpu.attend_slots(self, places, q),
            _ => plain::attend_slots(self, places, q),
        }
    }
}

/// Tokens that follow each other in a pass, and how many of the [`Rows`] they see. The last keys of these are
/// their own: each token sees all before them, and of them those up to itself.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct Stretch {
    pub tokens: i64,
    pub rows: i64,
}

/// Some keys and values of a source.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct Rows {
    pub source: i64,
    pub first: i64,
    pub count: i64,
}

/// The attention of a pass: who sees which keys.
#[derive(Default)]
pub struct Pass {
    stretches: Vec<Stretch>,
    rows: Vec<Rows>,
    /// The same on the GPU, from the first layer on.
    layout: OnceCell<gpu::Layout>,
}

impl Pass {
    /// The next tokens of the pass, which see `rows` in this order; the last are their own.
    pub fn push(&mut self, tokens: i64, rows: impl IntoIterator<Item = Rows>) {
        let before = self.rows.len();
        self.rows.extend(rows);
        self.stretches.push(Stretch { tokens, rows: (self.rows.len() - before) as i64 });
    }

    /// The stretches and what they see, one after the other.
    pub(super) fn layout(&self) -> (&[Stretch], &[Rows]) {
        (&self.stretches, &self.rows)
    }

    /// `q` is `[tokens, heads, head_dim]`; `sources` are keys and values, `[rows, kv_heads, head_dim]`, of the
    /// same lengths in every layer. A token sees the last `window` of its keys. Returns
    /// `[tokens, heads * head_dim]`.
    ///
    /// # Errors
    /// When a tensor has another shape or type, or has no such rows.
    pub fn attend(
        &self,
        q: &Tensor,
        sources: &[(&Tensor, &Tensor)],
        window: Option<i64>,
        scale: f64,
        softcap: Option<f64>,
    ) -> Result<Tensor, TorchError> {
        let (tokens, heads, _) = q.size3()?;
        if !self.fits(tokens, sources) {
            return Err(TorchError::Operation(format!("{tokens} tokens of {heads} heads don't fit their keys")));
        }
        let layout = (self.stretches.as_slice(), self.rows.as_slice());
        let gpu = match By::of(q.device(), Path::Flash) {
            By::Cpu => return cpu::attend_pass(layout, q, sources, window, scale, softcap),
            By::Plain => return plain::attend_pass(layout, q, sources, window, scale),
            By::Gpu(gpu) => gpu,
        };
        let layout = match self.layout.get() {
            Some(layout) => layout,
            None => {
                let lengths: Vec<i64> = sources.iter().map(|(k, _)| k.size()[0]).collect();
                let layout = gpu::Layout::new(&self.stretches, &self.rows, &lengths, q.device())?;
                self.layout.get_or_init(|| layout)
            }
        };
        gpu.attend_pass(q, sources, layout, window, scale)
    }

    /// Whether the stretches are `tokens` together, and see rows that are there.
    fn fits(&self, tokens: i64, sources: &[(&Tensor, &Tensor)]) -> bool {
        let length =
            |source: i64| -> Option<i64> { sources.get(usize::try_from(source).ok()?)?.0.size().first().copied() };
        let inside = |rows: &Rows| {
            let end = rows.first.checked_add(rows.count);
            rows.first >= 0 && rows.count >= 0 && end.is_some_and(|end| length(rows.source).is_some_and(|n| end <= n))
        };
        let mut rows = self.rows.iter();
        let own = self.stretches.iter().all(|s| {
            let seen: i64 = rows.by_ref().take(s.rows as usize).map(|rows| rows.count).sum();
            s.tokens > 0 && seen >= s.tokens
        });
        own && self.rows.iter().all(inside) && self.stretches.iter().map(|s| s.tokens).sum::<i64>() == tokens
    }
}

/// An adapter's matrices at a module whose outputs begin at column `first`: `a` is `[rank, inner]`, `b`
/// `[width, rank]`, both float32.
pub struct LoraPair<'a> {
    pub a: &'a Tensor,
    pub b: &'a Tensor,
    pub first: i64,
}

/// Adds `scale * x A^T B^T` of every pair to its columns of `out` (`[rows, outputs]`) in place; `x` is
/// `[rows, inner]`. Returns `false`, and does nothing, where the processor or the shapes are not for it.
///
/// # Errors
/// When the device has no memory left.
pub fn add_lora(x: &Tensor, pairs: &[LoraPair<'_>], scale: f64, out: &Tensor) -> Result<bool, TorchError> {
    match By::of(x.device(), Path::Lora) {
        By::Cpu => cpu::add_lora(x, pairs, scale, out),
        By::Gpu(gpu) => gpu.add_lora(x, pairs, scale, out),
        By::Plain => Ok(false),
    }
}
