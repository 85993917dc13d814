//! Operations of a pass without gradients on a GPU: our kernels and flash attention.
//!
//! They are grouped in [`Path`]s. When a GPU is first used, each path is compared with float32 on the CPU
//! ([`Gpu::check`]). One that differs or fails is switched off by itself, which the log says, and libtorch's operations
//! stand in for it (`torch::plain`).

use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};
use std::ffi::c_void;
use std::rc::Rc;

use tch::{Device, Kind, Tensor};

use super::kernels::{Kernel, Kernels};
use super::ops::{LoraPair, Rows, Slots, Stretch, Turn};
use super::shim::{Sequences, Shim};
use super::{TorchError, cuda};

mod capture;
mod check;
mod path;

pub use capture::check_capture;
pub use check::{Check, Sizes, Way};
pub use path::{Path, Switches};

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
    /// Or why there are none.
    kernels: Result<Kernels, TorchError>,
    /// `None` in tests on the host.
    shim: Option<&'static Shim>,
    device: Device,
    /// Paths that are not used, and why.
    off: BTreeMap<Path, String>,
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

thread_local! {
    static LOADED: RefCell<HashMap<usize, Option<Rc<Gpu>>>> = RefCell::default();
    static SWITCHES: RefCell<HashMap<usize, Switches>> = RefCell::default();
}

/// Which paths of GPU `index` the calling thread may use; to be told before it first works there.
pub fn switch(index: usize, switches: Switches) {
    SWITCHES.with_borrow_mut(|all| all.insert(index, switches));
}

/// The operations of `device` for the calling thread, which works on no other GPU; `None` where there are
/// none.
pub fn of(device: Device) -> Option<Rc<Gpu>> {
    let Device::Cuda(index) = device else { return None };
    LOADED.with_borrow_mut(|loaded| {
        let gpu = loaded.entry(index).or_insert_with(|| {
            let switches = SWITCHES.with_borrow(|all| all.get(&index).copied().unwrap_or_default());
            let opened = Gpu::open(index, switches).inspect_err(|why| {
                tracing::warn!(device = format!("cuda:{index}"), "the GPU is used without its faster paths: {why}");
            });
            opened.ok().map(Rc::new)
        });
        gpu.clone()
    })
}

impl Gpu {
    fn open(index: usize, switches: Switches) -> Result<Self, TorchError> {
        let shim = cuda::shim().ok_or_else(|| TorchError::Operation("libtorch's part of them is missing".into()))?;
        shim.use_device(index)?;
        let kernels = if switches.kernels {
            Kernels::load(index)
        } else {
            Err(TorchError::Operation("our kernels are switched off".into()))
        };
        let off = Path::ALL.into_iter().filter_map(|path| Some((path, switches.off(path)?.to_owned()))).collect();
        let mut gpu = Self { kernels, shim: Some(shim), device: Device::Cuda(index), off };
        gpu.switch_off_what_fails();
        Ok(gpu)
    }

    /// Compares every path that is on with float32 on the CPU.
    fn switch_off_what_fails(&mut self) {
        for path in Path::ALL.into_iter().filter(|path| self.uses(*path)).collect::<Vec<_>>() {
            let why = match self.check(path, Way::Own, &Sizes::SMALL) {
                Ok(checks) => match checks.into_iter().find(|check| !check.passes()) {
                    None => continue,
                    Some(Check { name, error, bound }) => {
                        format!("{name} is {error:.1e} from float32 on the CPU, more than {bound:.1e}")
                    }
                },
                Err(error) => error.to_string(),
            };
            let device = format!("cuda:{}", self.index());
            tracing::warn!(device, "{path} is switched off, libtorch's operations stand in: {why}");
            self.off.insert(path, why);
        }
    }

    /// True where `path` is on.
    pub fn uses(&self, path: Path) -> bool {
        !self.off.contains_key(&path)
    }

    /// True where passes gain from going through [`super::ops`].
    pub fn serves(&self) -> bool {
        Path::ALL.into_iter().any(|path| path != Path::Sampling && self.uses(path))
    }

    /// Paths that are off, and why.
    pub fn off(&self) -> &BTreeMap<Path, String> {
        &self.off
    }

    /// Our kernels.
    fn kernels(&self) -> Result<&Kernels, TorchError> {
        self.kernels.as_ref().map_err(Clone::clone)
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
        unsafe { self.kernels()?.launch(kernel, grid, block, stream, &mut addresses) }
    }

    /// Launches one thread a number; kernels of this kind look at their own bounds.
    ///
    /// # Safety
    /// As [`Kernels::launch`].
    unsafe fn each(&self, kernel: Kernel, count: i64, args: &[Arg<'_>]) -> Result<(), TorchError> {
        let block = self.kernels()?.block(BLOCK);
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
    pub fn store(&self, k: &Tensor, v: &Tensor, slots: &Slots<'_>, places: &Places) -> Result<(), TorchError> {
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

    /// The attention of [`Slots::attend`] over keys and values that are stored already.
    pub fn attend_slots(&self, slots: &Slots<'_>, places: &Places, q: &Tensor) -> Result<Tensor, TorchError> {
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
        let block = self.kernels()?.block(BLOCK);
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
    pub(super) positions: Tensor,
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

#[cfg(test)]
mod tests {
    use super::*;

    fn host() -> Gpu {
        with_broken(None)
    }

    fn with_broken(broken: Option<Kernel>) -> Gpu {
        Gpu { kernels: Ok(Kernels::Host { broken }), shim: None, device: Device::Cpu, off: BTreeMap::new() }
    }

    #[test]
    fn a_path_that_fails_is_switched_off_alone() {
        let paths = [
            (Kernel::Norm, Path::Norm),
            (Kernel::HeadNorm, Path::Rotary),
            (Kernel::Turn, Path::Rotary),
            (Kernel::Store, Path::KvStore),
            (Kernel::Gate, Path::Gate),
            (Kernel::Shrink, Path::Lora),
            (Kernel::Expand, Path::Lora),
            (Kernel::Draw, Path::Sampling),
        ];
        for (kernel, path) in paths {
            let mut gpu = with_broken(Some(kernel));
            gpu.switch_off_what_fails();
            // There is no flash attention on the host.
            let off: Vec<_> = gpu.off().keys().copied().filter(|path| *path != Path::Flash).collect();
            assert_eq!(off, [path], "{kernel:?}");
            assert!(gpu.off()[&path].contains("from float32 on the CPU, more than"), "{:?}", gpu.off());
        }
        let mut gpu = host();
        gpu.switch_off_what_fails();
        assert_eq!(gpu.off().keys().copied().collect::<Vec<_>>(), [Path::Flash]);
        assert!(gpu.off()[&Path::Flash].contains("flash attention needs a GPU"));
    }

    #[test]
    fn kernels_that_do_not_compile_leave_flash_attention_on() {
        let kernels = Err(TorchError::Operation("NVRTC error 6".into()));
        let gpu = Gpu { kernels, shim: None, device: Device::Cpu, off: BTreeMap::new() };
        for path in Path::ALL {
            let error = gpu.check(path, Way::Own, &Sizes::SMALL).unwrap_err().to_string();
            assert_eq!(error.contains("NVRTC error 6"), path.is_kernel(), "{path}: {error}");
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
}
