//! Operations of a pass without gradients on a GPU: our kernels and flash attention.
//!
//! Each is looked at beside libtorch's own when a GPU is first used ([`Gpu::check`]); where one differs, the
//! GPU is used without them and the log says so.

use std::cell::RefCell;
use std::collections::HashMap;
use std::ffi::c_void;
use std::rc::Rc;

use tch::{Device, Kind, Tensor};

use super::kernels::{Kernel, Kernels};
use super::ops::{LoraPair, Rows, Slots, Stretch, Turn};
use super::shim::{Sequences, Shim};
use super::{TorchError, cuda};

/// Threads of a block: of kernels that add up over it, as in `kernels.cu`, and of those that don't.
const BLOCK: u32 = 256;
/// Threads of a block that adds up over one head.
const HEAD_BLOCK: u32 = 64;
/// Threads of a block that draws, as in `kernels.cu`.
const DRAW_BLOCK: u32 = 1024;
/// Blocks of a grid in its second dimension, by CUDA.
const MAX_GRID_Y: i64 = 65_535;
/// Matrices of an adapter at one site, as in `kernels.cu`.
const MAX_LORAS: usize = 4;

/// What one thread computes with on its GPU.
pub struct Gpu {
    kernels: Kernels,
    /// `None` in tests on the host.
    shim: Option<&'static Shim>,
    device: Device,
}

/// An argument of a kernel.
enum Arg<'a> {
    Pointer(*mut c_void),
    Long(i64),
    Int(i32),
    Float(f32),
    Loras(&'a Loras),
}

impl Arg<'_> {
    fn address(&self) -> *mut c_void {
        match self {
            Self::Pointer(value) => std::ptr::from_ref(value).cast(),
            Self::Long(value) => std::ptr::from_ref(value).cast::<c_void>(),
            Self::Int(value) => std::ptr::from_ref(value).cast(),
            Self::Float(value) => std::ptr::from_ref(value).cast(),
            Self::Loras(value) => std::ptr::from_ref(*value).cast(),
        }
        .cast_mut()
    }
}

impl From<&Tensor> for Arg<'_> {
    fn from(tensor: &Tensor) -> Self {
        Self::Pointer(tensor.data_ptr())
    }
}

impl From<i64> for Arg<'_> {
    fn from(value: i64) -> Self {
        Self::Long(value)
    }
}

impl From<i32> for Arg<'_> {
    fn from(value: i32) -> Self {
        Self::Int(value)
    }
}

impl From<f64> for Arg<'_> {
    fn from(value: f64) -> Self {
        Self::Float(value as f32)
    }
}

/// The arguments of a launch.
macro_rules! args {
    ($($arg:expr),* $(,)?) => { &[$(Arg::from($arg)),*] };
}

/// The operations of `device` for the calling thread, which works on no other GPU; `None` where there are
/// none.
pub fn of(device: Device) -> Option<Rc<Gpu>> {
    thread_local! {
        static LOADED: RefCell<HashMap<usize, Option<Rc<Gpu>>>> = RefCell::default();
    }
    let Device::Cuda(index) = device else { return None };
    LOADED.with_borrow_mut(|loaded| {
        let gpu = loaded.entry(index).or_insert_with(|| {
            let opened = Gpu::open(index).inspect_err(|why| {
                tracing::warn!(device = format!("cuda:{index}"), "the GPU is used without its faster paths: {why}");
            });
            opened.ok().map(Rc::new)
        });
        gpu.clone()
    })
}

impl Gpu {
    fn open(index: usize) -> Result<Self, TorchError> {
        let shim = cuda::shim().ok_or_else(|| TorchError::Operation("libtorch's part of them is missing".into()))?;
        shim.use_device(index)?;
        let gpu = Self { kernels: Kernels::load(index)?, shim: Some(shim), device: Device::Cuda(index) };
        match gpu.check()?.into_iter().find(|c| !c.passes()) {
            None => Ok(gpu),
            Some(Check { name, error, bound }) => Err(TorchError::Operation(format!(
                "{name} is {error:.1e} from libtorch's own, more than {bound:.1e}; please report this GPU"
            ))),
        }
    }

    fn index(&self) -> usize {
        match self.device {
            Device::Cuda(index) => index,
            _ => 0,
        }
    }

    /// # Safety
    /// As [`Kernels::launch`].
    unsafe fn launch(&self, kernel: Kernel, grid: (i64, i64), block: u32, args: &[Arg<'_>]) -> Result<(), TorchError> {
        let stream = self.shim.map_or(Ok(std::ptr::null_mut()), |shim| shim.stream(self.index()))?;
        let fits = (0..=i64::from(i32::MAX)).contains(&grid.0) && (0..=MAX_GRID_Y).contains(&grid.1);
        if !fits {
            return Err(TorchError::Operation(format!("{kernel:?} can't take a grid of {grid:?}")));
        }
        let grid = (grid.0 as u32, grid.1 as u32);
        let mut addresses: Vec<_> = args.iter().map(Arg::address).collect();
        // SAFETY: the caller's.
        unsafe { self.kernels.launch(kernel, grid, block, stream, &mut addresses) }
    }

    /// Launches one thread a number; kernels of this kind look at their own bounds.
    ///
    /// # Safety
    /// As [`Kernels::launch`].
    unsafe fn each(&self, kernel: Kernel, count: i64, args: &[Arg<'_>]) -> Result<(), TorchError> {
        let block = self.kernels.block(BLOCK);
        if count > i64::from(u32::MAX) / 2 {
            return Err(TorchError::Operation(format!("{kernel:?} can't take {count} numbers at once")));
        }
        // SAFETY: the caller's.
        unsafe { self.launch(kernel, (blocks(count, block), 1), block, args) }
    }

    /// See [`super::ops::add_norm`].
    pub fn add_norm(&self, x: &Tensor, add: Option<&Tensor>, weight: &Tensor, eps: f64) -> Result<Tensor, TorchError> {
        let (rows, width) = x.size2()?;
        self.lies(x, Kind::Float, &[rows, width])?;
        self.lies(weight, Kind::Float, &[width])?;
        if let Some(add) = add {
            self.lies(add, Kind::BFloat16, &[rows, width])?;
        }
        let out = Tensor::f_empty([rows, width], (Kind::BFloat16, self.device))?;
        let add = add.map_or(Arg::Pointer(std::ptr::null_mut()), Arg::from);
        // SAFETY: shapes and types were looked at above.
        unsafe {
            let args = args![x, add, weight, eps, &out, width];
            self.launch(Kernel::Norm, (rows, 1), BLOCK, args)?;
        }
        Ok(out)
    }

    /// See [`Turn::apply`].
    pub fn turn(&self, turn: &Turn<'_>, qkv: &Tensor, queries: i64, keys: i64) -> Result<(), TorchError> {
        let (rows, heads, width) = qkv.size3()?;
        self.lies(qkv, Kind::BFloat16, &[rows, heads, width])?;
        let (stride, turned) = (heads * width, queries + keys);
        if let Some((q, k)) = turn.norms {
            self.lies(q, Kind::Float, &[width])?;
            self.lies(k, Kind::Float, &[width])?;
            self.rows_at_once(rows, |count, row| {
                let qkv = qkv.f_narrow(0, row, count)?;
                let args = args![&qkv, stride, queries as i32, width as i32, q, k, turn.eps];
                // SAFETY: shapes and types were looked at above; `turned` heads are part of a row.
                unsafe { self.launch(Kernel::HeadNorm, (turned, count), HEAD_BLOCK, args) }
            })?;
        }
        let Some((cos, sin)) = turn.angles else { return Ok(()) };
        let dims = cos.size().last().copied().unwrap_or(0);
        for table in [cos, sin] {
            self.lies(table, Kind::BFloat16, &[rows, 1, dims])?;
        }
        let args = args![qkv, stride, rows as i32, turned as i32, width as i32, cos, sin, dims as i32];
        // SAFETY: as above; `dims` is even and at most `width`, which the caller has looked at.
        unsafe { self.each(Kernel::Turn, rows * turned * dims / 2, args) }
    }

    /// See [`super::ops::gate`].
    pub fn gate(&self, gate_up: &Tensor, gelu: bool) -> Result<Tensor, TorchError> {
        let (rows, both) = gate_up.size2()?;
        self.lies(gate_up, Kind::BFloat16, &[rows, both])?;
        let (width, count) = (both / 2, rows * (both / 2));
        let out = Tensor::f_empty([rows, width], (Kind::BFloat16, self.device))?;
        let args = args![gate_up, &out, count, width, i32::from(gelu)];
        // SAFETY: shapes and types were looked at above.
        unsafe { self.each(Kernel::Gate, count, args)? };
        Ok(out)
    }

    /// Writes one token's keys and values a row (parts of one tensor, `[rows, kv_heads, head_dim]`) to `places`
    /// of the rows' slots, `[slots, length, kv_heads, head_dim]`.
    fn store(&self, k: &Tensor, v: &Tensor, slots: &Slots<'_>, places: &Places) -> Result<(), TorchError> {
        let (rows, kv_heads, dims) = k.size3()?;
        let (count, length, _, _) = slots.keys.size4()?;
        let stride = k.stride().first().copied().unwrap_or(0);
        let dense = |t: &Tensor| t.size() == [rows, kv_heads, dims] && t.stride() == [stride, dims, 1];
        for slots in [slots.keys, slots.values] {
            self.lies(slots, Kind::BFloat16, &[count, length, kv_heads, dims])?;
        }
        self.lies(&places.positions, Kind::Int64, &[rows])?;
        let same = [k, v].iter().all(|t| dense(t) && t.kind() == Kind::BFloat16 && t.device() == self.device);
        if !same || rows > count {
            return Err(TorchError::Operation(format!("{rows} rows of {kv_heads} heads don't fit {count} slots")));
        }
        let (rows_there, width) = (rows as i32, (kv_heads * dims) as i32);
        let args = args![k, v, stride, slots.keys, slots.values, &places.positions, length, rows_there, width];
        // SAFETY: shapes and types were looked at above; the kernel writes nothing outside of a slot.
        unsafe { self.each(Kernel::Store, rows * kv_heads * dims, args) }
    }

    /// See [`Slots::attend`].
    pub fn attend_slots(
        &self,
        slots: &Slots<'_>,
        places: &Places,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
    ) -> Result<Tensor, TorchError> {
        self.store(k, v, slots, places)?;
        let (count, length, kv_heads, dims) = slots.keys.size4()?;
        let flat = |t: &Tensor| t.f_view([count * length, kv_heads, dims]);
        let sequences = Sequences {
            starts_q: &places.starts_q,
            starts_k: &places.starts_k,
            used_k: Some(&places.used),
            longest_q: 1,
            longest_k: length,
            causal: false,
            window: slots.window,
            scale: slots.scale,
        };
        let out = self.shim()?.flash(q, &flat(slots.keys)?, &flat(slots.values)?, &sequences)?;
        Ok(out.f_flatten(1, 2)?)
    }

    /// See [`super::ops::Pass::attend`].
    pub fn attend_pass(
        &self,
        q: &Tensor,
        sources: &[(&Tensor, &Tensor)],
        layout: &Layout,
        window: Option<i64>,
        scale: f64,
    ) -> Result<Tensor, TorchError> {
        let all = |keys: bool| -> Result<Tensor, TorchError> {
            let parts: Vec<&Tensor> = sources.iter().map(|(k, v)| if keys { *k } else { *v }).collect();
            let all = if let [only] = parts.as_slice() { only.shallow_clone() } else { Tensor::f_cat(&parts, 0)? };
            Ok(match &layout.rows {
                Some(rows) => all.f_index_select(0, rows)?,
                None => all,
            })
        };
        let sequences = Sequences {
            starts_q: &layout.starts_q,
            starts_k: &layout.starts_k,
            used_k: None,
            longest_q: layout.longest_q,
            longest_k: layout.longest_k,
            causal: true,
            window,
            scale,
        };
        Ok(self.shim()?.flash(q, &all(true)?, &all(false)?, &sequences)?.f_flatten(1, 2)?)
    }

    fn shim(&self) -> Result<&'static Shim, TorchError> {
        self.shim.ok_or_else(|| TorchError::Operation("flash attention needs a GPU".into()))
    }

    /// See [`super::ops::add_lora`].
    pub fn add_lora(&self, x: &Tensor, pairs: &[LoraPair<'_>], scale: f64, out: &Tensor) -> Result<bool, TorchError> {
        let ((rows, inner), (_, outputs)) = (x.size2()?, out.size2()?);
        let flat = self.lies(x, Kind::BFloat16, &[rows, inner]).is_ok()
            && self.lies(out, Kind::BFloat16, &[rows, outputs]).is_ok();
        if !flat || pairs.len() > MAX_LORAS {
            return Ok(false);
        }
        let mut loras = Loras::default();
        let (mut ranks, mut widths) = (0, 0);
        for (m, LoraPair { a, b, first }) in pairs.iter().enumerate() {
            let (rank, width) = (a.size2()?.0, b.size2()?.0);
            let inside = *first >= 0 && first + width <= outputs;
            let flat =
                self.lies(a, Kind::Float, &[rank, inner]).is_ok() && self.lies(b, Kind::Float, &[width, rank]).is_ok();
            if !(inside && flat) {
                return Ok(false);
            }
            (loras.a[m], loras.b[m]) = (a.data_ptr(), b.data_ptr());
            (loras.rank[m], loras.width[m], loras.first[m]) = (rank as i32, width as i32, *first as i32);
            (loras.rank_before[m], loras.width_before[m]) = (ranks as i32, widths as i32);
            loras.count += 1;
            ranks += rank;
            widths += width;
        }
        let shrunk = Tensor::f_empty([rows, ranks], (Kind::Float, self.device))?;
        let block = self.kernels.block(BLOCK);
        self.rows_at_once(rows, |count, row| {
            let (x, shrunk) = (x.f_narrow(0, row, count)?, shrunk.f_narrow(0, row, count)?);
            let out = out.f_narrow(0, row, count)?;
            // SAFETY: shapes and types were looked at above, and the matrices live until the caller's pass has run.
            unsafe {
                let args = args![&x, inner, Arg::Loras(&loras), &shrunk];
                self.launch(Kernel::Shrink, (ranks, count), BLOCK, args)?;
                let args = args![&shrunk, ranks as i32, Arg::Loras(&loras), scale, &out, outputs, widths as i32];
                self.launch(Kernel::Expand, (blocks(widths, block), count), block, args)
            }
        })?;
        Ok(true)
    }

    /// Calls `f` with as many rows as a grid holds, and the first of them, until all had their turn.
    fn rows_at_once(&self, rows: i64, mut f: impl FnMut(i64, i64) -> Result<(), TorchError>) -> Result<(), TorchError> {
        (0..rows).step_by(MAX_GRID_Y as usize).try_for_each(|row| f(MAX_GRID_Y.min(rows - row), row))
    }

    /// Draws one token a row from `lowered`, with its log-probability by `logits` (both `[rows, vocabulary]`,
    /// float32, perhaps the same). `plan` (`[3, rows]`, i64) is of [`plan`]; [`drawn`] reads what comes back
    /// (`[rows]`, i64).
    pub fn draw(&self, logits: &Tensor, lowered: &Tensor, plan: &Tensor) -> Result<Tensor, TorchError> {
        let (rows, count) = logits.size2()?;
        self.lies(logits, Kind::Float, &[rows, count])?;
        self.lies(lowered, Kind::Float, &[rows, count])?;
        self.lies(plan, Kind::Int64, &[3, rows])?;
        let drawn = Tensor::f_empty([rows], (Kind::Int64, self.device))?;
        let args = args![logits, lowered, count as i32, plan, rows as i32, &drawn];
        // SAFETY: shapes and types were looked at above.
        unsafe { self.launch(Kernel::Draw, (rows, 1), DRAW_BLOCK, args)? };
        Ok(drawn)
    }

    /// A contiguous tensor on this device of this type and shape.
    fn lies(&self, tensor: &Tensor, kind: Kind, size: &[i64]) -> Result<(), TorchError> {
        if tensor.device() == self.device && tensor.kind() == kind && tensor.is_contiguous() && tensor.size() == size {
            return Ok(());
        }
        let found = (tensor.kind(), tensor.size(), tensor.device());
        Err(TorchError::Operation(format!("expected {kind:?} of {size:?} in one piece on the GPU, found {found:?}")))
    }
}

/// How many of `block` threads make `count`.
fn blocks(count: i64, block: u32) -> i64 {
    (count + i64::from(block) - 1) / i64::from(block)
}

/// As in `kernels.cu`.
#[repr(C)]
struct Loras {
    a: [*mut c_void; MAX_LORAS],
    b: [*mut c_void; MAX_LORAS],
    rank: [i32; MAX_LORAS],
    rank_before: [i32; MAX_LORAS],
    width: [i32; MAX_LORAS],
    width_before: [i32; MAX_LORAS],
    first: [i32; MAX_LORAS],
    count: i32,
}

impl Default for Loras {
    fn default() -> Self {
        let (none, zero) = ([std::ptr::null_mut(); MAX_LORAS], [0; MAX_LORAS]);
        Self { a: none, b: none, rank: zero, rank_before: zero, width: zero, width_before: zero, first: zero, count: 0 }
    }
}

/// Where the new tokens of a decode step go.
pub struct Places {
    /// `[rows]`, i64.
    positions: Tensor,
    /// Keys of each slot that are seen, the new one included: `[rows]`, int32.
    used: Tensor,
    /// Where rows and slots begin, `[rows + 1]`, int32.
    starts_q: Tensor,
    starts_k: Tensor,
}

impl Places {
    /// `positions` (`[rows]`, i64, on the GPU) of slots of `length` tokens.
    pub fn new(positions: Tensor, length: i64) -> Result<Self, TorchError> {
        let (rows, device) = (positions.size1()?, positions.device());
        let starts_q = Tensor::f_arange(rows + 1, (Kind::Int, device))?;
        let used = positions.f_add_scalar(1)?.f_to_kind(Kind::Int)?;
        Ok(Self { used, starts_k: starts_q.f_mul_scalar(length)?, starts_q, positions })
    }
}

/// Which keys the stretches of a pass see, on the GPU.
pub struct Layout {
    starts_q: Tensor,
    starts_k: Tensor,
    longest_q: i64,
    longest_k: i64,
    /// The keys of all stretches, one after the other, among those of all sources; `None` where that is what
    /// they are.
    rows: Option<Tensor>,
}

impl Layout {
    /// `lengths` are the rows of each source.
    pub fn new(stretches: &[Stretch], rows: &[Rows], lengths: &[i64], device: Device) -> Result<Self, TorchError> {
        let before: Vec<i64> = lengths.iter().scan(0, |sum, n| Some(std::mem::replace(sum, *sum + n))).collect();
        let mut seen: Vec<i64> = Vec::new();
        let (mut starts_q, mut starts_k) = (vec![0_i32], vec![0_i32]);
        let (mut longest_q, mut longest_k, mut tokens) = (0, 0, 0);
        let mut rows = rows.iter();
        for stretch in stretches {
            let start = seen.len();
            for part in rows.by_ref().take(stretch.rows as usize) {
                let first = before.get(part.source as usize).copied().unwrap_or(0) + part.first;
                seen.extend(first..first + part.count);
            }
            tokens += stretch.tokens;
            starts_q.push(tokens as i32);
            starts_k.push(seen.len() as i32);
            longest_q = longest_q.max(stretch.tokens);
            longest_k = longest_k.max((seen.len() - start) as i64);
        }
        let whole = seen.len() as i64 == lengths.iter().sum::<i64>() && seen.iter().zip(0..).all(|(a, b)| *a == b);
        let rows = if whole { None } else { Some(Tensor::f_from_slice(&seen)?.f_to_device(device)?) };
        let starts = |starts: &[i32]| Tensor::f_from_slice(starts)?.f_to_device(device);
        Ok(Self { starts_q: starts(&starts_q)?, starts_k: starts(&starts_k)?, longest_q, longest_k, rows })
    }
}

/// One operation beside the same in float32 by libtorch's own.
#[derive(Debug, Clone, Copy)]
pub struct Check {
    pub name: &'static str,
    /// Largest difference, as a share of the largest number where that is above 1.
    pub error: f64,
    pub bound: f64,
}

impl Check {
    pub fn passes(&self) -> bool {
        self.error <= self.bound
    }
}

/// What bf16 may be off by, some times its rounding.
const ROUNDED: f64 = 0.02;

impl Gpu {
    /// All operations on small random tensors, each beside libtorch's own.
    pub fn check(&self) -> Result<Vec<Check>, TorchError> {
        let mut checks = self.check_kernels()?;
        checks.push(Check { name: "attention of a decode step", error: self.check_slots(None)?, bound: ROUNDED });
        checks.push(Check { name: "attention within a window", error: self.check_slots(Some(5))?, bound: ROUNDED });
        checks.push(Check { name: "attention of a pass", error: self.check_pass()?, bound: ROUNDED });
        Ok(checks)
    }

    /// Without flash attention.
    fn check_kernels(&self) -> Result<Vec<Check>, TorchError> {
        let mut checks = Vec::new();
        let mut check = |name, found: &Tensor, expected: &Tensor, bound| {
            let error = apart(found, expected)?;
            checks.push(Check { name, error, bound });
            Ok::<_, TorchError>(())
        };
        let (x, add) = (self.random(&[5, 70], Kind::Float)?, self.random(&[5, 70], Kind::BFloat16)?);
        let weight = self.random(&[70], Kind::Float)?;
        let sum = x.f_add(&wide(&add)?)?;
        let normed = self.add_norm(&x, Some(&add), &weight, 1e-5)?;
        check("norm", &normed, &sum.f_rms_norm([70], Some(&weight), 1e-5)?, ROUNDED)?;
        check("the stream", &x, &sum, 1e-6)?;
        let gate_up = self.random(&[6, 80], Kind::BFloat16)?;
        let (gate, up) = (wide(&gate_up.f_narrow(1, 0, 40)?)?, wide(&gate_up.f_narrow(1, 40, 40)?)?);
        check("SiLU", &self.gate(&gate_up, false)?, &gate.f_silu()?.f_mul(&up)?, ROUNDED)?;
        check("GELU", &self.gate(&gate_up, true)?, &gate.f_gelu("tanh")?.f_mul(&up)?, ROUNDED)?;
        let (found, expected) = self.turned()?;
        check("rotary embedding", &found, &expected, ROUNDED)?;
        let (found, expected) = self.adapted()?;
        check("adapters", &found, &expected, ROUNDED)?;
        let (found, expected) = self.drawn()?;
        check("sampling", &found, &expected, 1e-6)?;
        let (found, expected) = self.filtered()?;
        check("top-k", &found, &expected, 0.0)?;
        Ok(checks)
    }

    /// Norms and rotations beside libtorch's.
    fn turned(&self) -> Result<(Tensor, Tensor), TorchError> {
        let qkv = self.random(&[3, 7, 16], Kind::BFloat16)?;
        let (cos, sin) = (self.random(&[3, 1, 8], Kind::BFloat16)?, self.random(&[3, 1, 8], Kind::BFloat16)?);
        let (q_norm, k_norm) = (self.random(&[16], Kind::Float)?, self.random(&[16], Kind::Float)?);
        let heads = |first, count| -> Result<Tensor, TorchError> { wide(&qkv.f_narrow(1, first, count)?) };
        let (q, k) = (heads(0, 4)?, heads(4, 2)?);
        let q = q.f_rms_norm([16], Some(&q_norm), 1e-6)?;
        let normed = Tensor::f_cat(&[q, k.f_rms_norm([16], Some(&k_norm), 1e-6)?], 1)?;
        let part = normed.f_narrow(2, 0, 8)?;
        let part = part.f_mul(&wide(&cos)?)?.f_add(&part.f_roll([4], [-1])?.f_mul(&wide(&sin)?)?)?;
        let expected = Tensor::f_cat(&[part, normed.f_narrow(2, 8, 8)?], 2)?;
        let expected = Tensor::f_cat(&[expected, heads(6, 1)?], 1)?;
        let turn = Turn { norms: Some((&q_norm, &k_norm)), eps: 1e-6, angles: Some((&cos, &sin)) };
        self.turn(&turn, &qkv, 4, 2)?;
        Ok((qkv, expected))
    }

    /// A row under adapters of different ranks beside libtorch's.
    fn adapted(&self) -> Result<(Tensor, Tensor), TorchError> {
        let (x, out) = (self.random(&[3, 40], Kind::BFloat16)?, self.random(&[3, 48], Kind::BFloat16)?);
        let mut expected = wide(&out)?;
        let mut matrices = Vec::new();
        for (rank, width, first) in [(8, 12, 0), (3, 20, 12), (24, 7, 36)] {
            let (a, b) = (self.random(&[rank, 40], Kind::Float)?, self.random(&[width, rank], Kind::Float)?);
            let change = wide(&x)?.f_linear(&a, None::<&Tensor>)?.f_linear(&b, None::<&Tensor>)?.f_mul_scalar(0.02)?;
            let mut columns = expected.f_narrow(1, first, width)?;
            let _ = columns.f_add_(&change)?;
            matrices.push((a, b, first));
        }
        expected = expected.f_detach_copy()?;
        let pairs: Vec<_> = matrices.iter().map(|(a, b, first)| LoraPair { a, b, first: *first }).collect();
        if !self.add_lora(&x, &pairs, 0.02, &out)? {
            return Err(TorchError::Operation("an adapter does not fit".into()));
        }
        Ok((out, expected))
    }

    /// Tokens and log-probabilities for uniforms in the middle of their tokens' share, beside libtorch's.
    fn drawn(&self) -> Result<(Tensor, Tensor), TorchError> {
        let logits = self.random(&[6, 1000], Kind::Float)?.f_mul_scalar(3.0)?;
        let temperatures = [0.0_f32, 1.0, 0.7, 1.5, 1.0, 0.3];
        // Likely ones: a float32 has to tell their shares apart.
        let ranks = Tensor::f_from_slice(&[0_i64, 1, 2, 3, 4, 1])?.f_unsqueeze(1)?.f_to_device(self.device)?;
        let wanted = logits.f_topk(5, 1, true, true)?.1.f_gather(1, &ranks, false)?;
        let heat = Tensor::f_from_slice(&temperatures.map(|t| if t > 0.0 { t } else { 1.0 }))?.f_unsqueeze(1)?;
        let shares = logits.f_div(&heat.f_to_device(self.device)?)?.f_softmax(-1, Kind::Double)?;
        let below = shares.f_cumsum(-1, Kind::Double)?.f_sub(&shares)?.f_gather(1, &wanted, false)?;
        let uniforms = below.f_add(&shares.f_gather(1, &wanted, false)?.f_mul_scalar(0.5)?)?.f_squeeze_dim(1)?;
        let uniforms: Vec<f64> = Vec::try_from(uniforms.f_to_device(Device::Cpu)?)?;
        let how = temperatures.iter().zip(uniforms);
        let how = how.map(|(t, u)| How { temperature: *t, uniform: u as f32, ..How::default() });
        let (tokens, logprobs): (Vec<f64>, Vec<f64>) = self.draws(&logits, how)?.into_iter().unzip();
        let expected = logits.f_log_softmax(-1, Kind::Double)?.f_gather(1, &wanted, false)?;
        let expected = Tensor::f_cat(&[wanted.f_to_kind(Kind::Double)?, expected], 1)?.f_to_device(Device::Cpu)?;
        Ok((Tensor::f_from_slice(&[tokens, logprobs].concat())?.f_view([2, -1])?.f_transpose(0, 1)?, expected))
    }

    /// Tokens and log-probabilities, on the host.
    fn draws(&self, logits: &Tensor, how: impl Iterator<Item = How>) -> Result<Vec<(f64, f64)>, TorchError> {
        let plan = Tensor::f_from_slice(&plan(how))?.f_view([3, -1])?.f_to_device(self.device)?;
        let found: Vec<i64> = Vec::try_from(self.draw(logits, logits, &plan)?.f_to_device(Device::Cpu)?)?;
        let both = |n: i64| {
            let (token, logprob) = drawn(n);
            (f64::from(token), f64::from(logprob))
        };
        Ok(found.into_iter().map(both).collect())
    }

    /// The first and the last of the likeliest five tokens beside libtorch's.
    fn filtered(&self) -> Result<(Tensor, Tensor), TorchError> {
        let logits = self.random(&[2, 1000], Kind::Float)?;
        let how = |uniform| How { temperature: 1.0, uniform, top_k: 5, ..How::default() };
        let found: Vec<f64> =
            self.draws(&logits, [how(0.0), how(0.999_999_9)].into_iter())?.iter().map(|d| d.0).collect();
        let (_, ids) = logits.f_topk(5, 1, true, true)?;
        let expected = Tensor::f_stack(&[ids.f_get(0)?.f_min()?, ids.f_get(1)?.f_max()?], 0)?;
        Ok((Tensor::f_from_slice(&found)?, expected.f_to_device(Device::Cpu)?))
    }

    fn check_slots(&self, window: Option<i64>) -> Result<f64, TorchError> {
        // Long enough for keys to be shared among blocks.
        let (rows, length, kv_heads, group, dims) = (5, 1024, 2, 3, 64);
        let cache = || self.random(&[rows + 1, length, kv_heads, dims], Kind::BFloat16);
        let (keys, values) = (cache()?, cache()?);
        let qkv = self.random(&[rows, kv_heads * (group + 2), dims], Kind::BFloat16)?;
        let part = |first, count| qkv.f_narrow(1, first * kv_heads, count * kv_heads);
        let (q, k, v) = (part(0, group)?, part(group, 1)?, part(group + 1, 1)?);
        let positions = [0_i64, 3, length - 1, 5, 700];
        let places = Places::new(Tensor::f_from_slice(&positions)?.f_to_device(self.device)?, length)?;
        let slots = Slots { keys: &keys, values: &values, window, scale: 0.125, softcap: None };
        let found = self.attend_slots(&slots, &places, &q, &k, &v)?;
        let mut most = 0.0_f64;
        for (row, position) in (0..).zip(positions) {
            let first = window.map_or(0, |w| (position + 1 - w).max(0));
            let seen = |t: &Tensor| t.f_get(row)?.f_narrow(0, first, position + 1 - first);
            most = most.max(apart(&keys.f_get(row)?.f_get(position)?, &k.f_get(row)?)?);
            let expected = attention(&q.f_get(row)?.f_unsqueeze(0)?, &seen(&keys)?, &seen(&values)?, None, 0.125)?;
            most = most.max(apart(&found.f_get(row)?, &expected.f_get(0)?)?);
        }
        Ok(most)
    }

    fn check_pass(&self) -> Result<f64, TorchError> {
        let (kv_heads, group, dims) = (2, 3, 64);
        let heads = |tokens: i64, heads: i64| self.random(&[tokens, heads, dims], Kind::BFloat16);
        let (past_k, past_v) = (heads(20, kv_heads)?, heads(20, kv_heads)?);
        let qkv = heads(30, kv_heads * (group + 2))?;
        let part = |first, count| qkv.f_narrow(1, first * kv_heads, count * kv_heads);
        let (q, k, v) = (part(0, group)?, part(group, 1)?, part(group + 1, 1)?);
        let rows = |source, first, count| Rows { source, first, count };
        let told = [
            (4, vec![rows(1, 0, 19), rows(0, 0, 4)]),
            (20, vec![rows(0, 4, 20)]),
            (6, vec![rows(1, 0, 20), rows(0, 0, 4), rows(0, 24, 6)]),
        ];
        let stretches: Vec<_> =
            told.iter().map(|(tokens, rows)| Stretch { tokens: *tokens, rows: rows.len() as i64 }).collect();
        let all: Vec<_> = told.iter().flat_map(|(_, rows)| rows.iter().copied()).collect();
        let layout = Layout::new(&stretches, &all, &[30, 20], self.device)?;
        let found = self.attend_pass(&q, &[(&k, &v), (&past_k, &past_v)], &layout, None, 0.125)?;
        let (mut most, mut row) = (0.0_f64, 0);
        for (tokens, rows) in told {
            let seen = |own: &Tensor, past: &Tensor| -> Result<Tensor, TorchError> {
                let of = |r: &Rows| if r.source == 0 { own } else { past }.f_narrow(0, r.first, r.count);
                Ok(Tensor::f_cat(&rows.iter().map(of).collect::<Result<Vec<_>, _>>()?, 0)?)
            };
            let (keys, values) = (seen(&k, &past_k)?, seen(&v, &past_v)?);
            let hidden = Tensor::f_ones([tokens, keys.size3()?.0], (Kind::Bool, self.device))?;
            let hidden = hidden.f_triu(keys.size3()?.0 - tokens + 1)?;
            let expected = attention(&q.f_narrow(0, row, tokens)?, &keys, &values, Some(&hidden), 0.125)?;
            most = most.max(apart(&found.f_narrow(0, row, tokens)?, &expected)?);
            row += tokens;
        }
        Ok(most)
    }

    fn random(&self, size: &[i64], kind: Kind) -> Result<Tensor, TorchError> {
        Ok(Tensor::f_randn(size, (Kind::Float, self.device))?.f_to_kind(kind)?)
    }
}

/// How a row is drawn. At temperature 0 the likeliest token is, whatever the rest.
#[derive(Debug, Clone, Copy)]
pub struct How {
    pub temperature: f32,
    /// In `[0, 1)`.
    pub uniform: f32,
    /// 0 is none.
    pub top_k: u32,
    pub top_p: f32,
    pub min_p: f32,
}

impl Default for How {
    fn default() -> Self {
        Self { temperature: 1.0, uniform: 0.0, top_k: 0, top_p: 1.0, min_p: 0.0 }
    }
}

/// The rows of a draw for [`Gpu::draw`]: `[3, rows]`.
pub fn plan(rows: impl Iterator<Item = How>) -> Vec<i64> {
    let rows: Vec<How> = rows.collect();
    let draws = rows.iter().map(|r| pack(r.temperature, r.uniform));
    let counts = rows.iter().map(|r| i64::from(r.top_k));
    draws.chain(counts).chain(rows.iter().map(|r| pack(r.top_p, r.min_p))).collect()
}

fn pack(high: f32, low: f32) -> i64 {
    (i64::from(high.to_bits()) << 32) | i64::from(low.to_bits())
}

/// Token and log-probability of a row of [`Gpu::draw`].
pub fn drawn(packed: i64) -> (u32, f32) {
    (packed as u32, f32::from_bits((packed >> 32) as u32))
}

fn wide(tensor: &Tensor) -> Result<Tensor, TorchError> {
    Ok(tensor.f_to_kind(Kind::Float)?)
}

/// The largest difference, as a share of the largest number of `b` where that is above 1.
fn apart(a: &Tensor, b: &Tensor) -> Result<f64, TorchError> {
    let most = |t: Tensor| -> Result<f64, TorchError> { Ok(t.f_abs()?.f_max()?.f_double_value(&[])?) };
    Ok(most(wide(a)?.f_sub(&wide(b)?)?)? / most(wide(b)?)?.max(1.0))
}

/// Attention in float32, operation by operation: `[tokens, heads, d]` and `[keys, kv_heads, d]` to
/// `[tokens, heads * d]`.
fn attention(q: &Tensor, k: &Tensor, v: &Tensor, hidden: Option<&Tensor>, scale: f64) -> Result<Tensor, TorchError> {
    let group = q.size3()?.1 / k.size3()?.1;
    let all = |t: &Tensor| wide(t)?.f_repeat_interleave_self_int(group, 1, None).map_err(TorchError::from);
    let (q, k, v) = (wide(q)?.f_transpose(0, 1)?, all(k)?.f_transpose(0, 1)?, all(v)?.f_transpose(0, 1)?);
    let mut scores = q.f_matmul(&k.f_transpose(1, 2)?)?.f_mul_scalar(scale)?;
    if let Some(hidden) = hidden {
        scores = scores.f_masked_fill(hidden, f64::NEG_INFINITY)?;
    }
    Ok(scores.f_softmax(-1, Kind::Float)?.f_matmul(&v)?.f_transpose(0, 1)?.f_flatten(1, 2)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host() -> Gpu {
        Gpu { kernels: Kernels::Host, shim: None, device: Device::Cpu }
    }

    #[test]
    fn kernels_compute_what_libtorch_does() {
        // Numbers of all kinds: a GPU is asked once, and must not fail by chance.
        for seed in 0..8 {
            tch::manual_seed(seed);
            for check in host().check_kernels().unwrap() {
                assert!(check.passes(), "{check:?}");
            }
        }
    }

    #[test]
    fn a_new_token_goes_to_its_place() {
        let random = |size: &[i64]| Tensor::randn(size, (Kind::BFloat16, Device::Cpu));
        let (keys, values) = (random(&[4, 8, 2, 16]), random(&[4, 8, 2, 16]));
        let before = keys.copy();
        let qkv = random(&[3, 10, 16]);
        let (k, v) = (qkv.narrow(1, 6, 2), qkv.narrow(1, 8, 2));
        let places = Places::new(Tensor::from_slice(&[0_i64, 7, 3]), 8).unwrap();
        let slots = Slots { keys: &keys, values: &values, window: None, scale: 1.0, softcap: None };
        host().store(&k, &v, &slots, &places).unwrap();
        for (row, position) in [(0, 0), (1, 7), (2, 3)] {
            assert_eq!(keys.get(row).get(position), k.get(row));
            assert_eq!(values.get(row).get(position), v.get(row));
        }
        assert_eq!(keys.get(0).narrow(0, 1, 7), before.get(0).narrow(0, 1, 7), "nothing else is written");
        assert_eq!(keys.get(3), before.get(3));
        assert!(host().store(&random(&[5, 2, 16]), &random(&[5, 2, 16]), &slots, &places).is_err());
    }

    #[test]
    fn a_layout_names_the_keys_of_every_stretch() {
        let stretches = [Stretch { tokens: 2, rows: 2 }, Stretch { tokens: 1, rows: 1 }];
        let rows = |source, first, count| Rows { source, first, count };
        let seen = [rows(1, 1, 2), rows(0, 0, 2), rows(0, 2, 1)];
        let layout = Layout::new(&stretches, &seen, &[3, 4], Device::Cpu).unwrap();
        assert_eq!(Vec::<i64>::try_from(layout.rows.unwrap()).unwrap(), [4, 5, 0, 1, 2]);
        assert_eq!(Vec::<i32>::try_from(layout.starts_q).unwrap(), [0, 2, 3]);
        assert_eq!(Vec::<i32>::try_from(layout.starts_k).unwrap(), [0, 4, 5]);
        assert_eq!((layout.longest_q, layout.longest_k), (2, 4));
        let own = [Stretch { tokens: 2, rows: 1 }, Stretch { tokens: 1, rows: 1 }];
        let layout = Layout::new(&own, &[rows(0, 0, 2), rows(0, 2, 1)], &[3], Device::Cpu).unwrap();
        assert!(layout.rows.is_none(), "nothing has to be gathered");
    }

    #[test]
    fn draws_are_packed_whole() {
        assert_eq!(drawn(pack(-1.5, f32::from_bits(0xffff_fff0))), (0xffff_fff0, -1.5));
        assert_eq!(drawn(pack(0.0, f32::from_bits(7))), (7, 0.0));
    }

    /// Weights of the tokens that stay, by the definition.
    fn stay(logits: &[f32], how: &How) -> Vec<(usize, f64)> {
        let most = logits.iter().copied().fold(f32::MIN, f32::max);
        let weight = |l: &f32| f64::from((l - most) / how.temperature).exp();
        let mut sorted: Vec<(usize, f64)> = logits.iter().map(weight).enumerate().collect();
        sorted.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        if how.top_k > 0 {
            let last = sorted[how.top_k as usize - 1].1;
            sorted.retain(|t| t.1 >= last);
        }
        let total: f64 = sorted.iter().map(|t| t.1).sum();
        let mut sum = 0.0;
        if how.top_p < 1.0
            && let Some(crossing) = sorted.iter().position(|t| {
                sum += t.1;
                sum >= f64::from(how.top_p) * total
            })
        {
            sorted.truncate(crossing + 1);
        }
        sorted.retain(|t| t.1 >= f64::from(how.min_p).min(1.0));
        sorted.sort_by_key(|t| t.0);
        sorted
    }

    #[test]
    fn filters_leave_what_they_should() {
        tch::manual_seed(3);
        let filters = [
            (0, 1.0, 0.0),
            (7, 1.0, 0.0),
            (0, 0.8, 0.0),
            (0, 1.0, 0.1),
            (20, 0.5, 0.02),
            (3, 0.99, 2.0),
            (0, 0.0, 0.0),
        ];
        for ((top_k, top_p, min_p), temperature) in filters.into_iter().zip([1.0, 0.7, 1.0, 1.5, 0.9, 1.0, 1.0]) {
            // Rounded, so that some are equally likely.
            let logits = (Tensor::randn([70], (Kind::Float, Device::Cpu)) * 4.0).round() / 2.0;
            let how = How { temperature, uniform: 0.0, top_k, top_p, min_p };
            let left = stay(&Vec::try_from(&logits).unwrap(), &how);
            let total: f64 = left.iter().map(|t| t.1).sum();
            let mut below = 0.0;
            let rows: Vec<How> = left
                .iter()
                .map(|(_, weight)| {
                    below += weight;
                    How { uniform: ((below - weight / 2.0) / total) as f32, ..how }
                })
                .collect();
            let all = logits.unsqueeze(0).repeat([rows.len() as i64, 1]);
            let found = host().draws(&all, rows.into_iter()).unwrap();
            let found: Vec<usize> = found.iter().map(|d| d.0 as usize).collect();
            assert_eq!(found, left.iter().map(|t| t.0).collect::<Vec<_>>(), "{how:?}");
        }
    }
}
