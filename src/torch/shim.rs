//! What libtorch has on a GPU and tch does not reach (`cuda_shim.cpp`).

use std::ffi::{CStr, c_char, c_int, c_void};
use std::fs::File;
use std::io::Write;
use std::os::fd::{AsRawFd, FromRawFd};
use std::sync::OnceLock;

use libloading::os::unix::{Library, RTLD_LOCAL, RTLD_NOW};
use tch::Tensor;
use torch_sys::C_tensor;

use super::TorchError;

/// The shared library as build.rs made it; empty where CUDA's headers were missing.
static LIBRARY: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/flowrun_cuda.so"));

macro_rules! functions {
    ($($name:ident($($arg:ident: $type:ty),*) $(-> $result:ty)?;)*) => {
        /// The library's functions.
        #[allow(clippy::type_complexity)]
        struct Functions { $($name: unsafe extern "C" fn($($type),*) $(-> $result)?,)* }

        impl Functions {
            fn of(library: &Library) -> Result<Self, String> {
                // SAFETY: cuda_shim.cpp defines them with these types.
                unsafe { Ok(Self { $($name: find(library, concat!("flowrun_", stringify!($name), "\0"))?,)* }) }
            }
        }
    };
}

functions! {
    error() -> *const c_char;
    set_up() -> c_int;
    use_device(device: i64) -> c_int;
    memory(device: i64, figures: *mut i64) -> c_int;
    limit_memory(device: i64, share: f64) -> c_int;
    empty_cache() -> c_int;
    synchronize(device: i64) -> c_int;
    stream(device: i64, stream: *mut *mut c_void) -> c_int;
    flash(
        q: *const C_tensor, k: *const C_tensor, v: *const C_tensor, starts_q: *const C_tensor,
        starts_k: *const C_tensor, used_k: *const C_tensor, longest_q: i64, longest_k: i64, causal: bool, scale: f64,
        left: i64, right: i64, out: *mut *mut C_tensor
    ) -> c_int;
    pool_new(device: i64, pool: *mut *mut c_void) -> c_int;
    pool_free(pool: *mut c_void);
    capture_new(pool: *mut c_void, capture: *mut *mut c_void) -> c_int;
    capture_begin(capture: *mut c_void) -> c_int;
    capture_end(capture: *mut c_void, graph: *mut *mut c_void) -> c_int;
    capture_free(capture: *mut c_void);
    graph_replay(graph: *mut c_void) -> c_int;
    graph_free(graph: *mut c_void);
}

unsafe fn find<T: Copy>(library: &Library, name: &str) -> Result<T, String> {
    // SAFETY: the caller names the symbol's type.
    unsafe { library.get::<T>(name.as_bytes()).map(|symbol| *symbol).map_err(|e| e.to_string()) }
}

/// The opened library.
pub struct Shim(Functions);

/// Memory of a GPU in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
pub struct Memory {
    /// What nobody uses.
    pub free: u64,
    pub total: u64,
    /// Held in this process' tensors.
    pub allocated: u64,
    /// Taken by this process for tensors.
    pub reserved: u64,
}

/// Sequences side by side, for attention.
pub struct Sequences<'a> {
    /// Where each begins among the queries, and the end of the last: int32.
    pub starts_q: &'a Tensor,
    pub starts_k: &'a Tensor,
    /// Keys that are seen of each, int32; all where not given.
    pub used_k: Option<&'a Tensor>,
    pub longest_q: i64,
    pub longest_k: i64,
    /// Queries see the keys up to their own; the last query's is the last key.
    pub causal: bool,
    pub window: Option<i64>,
    pub scale: f64,
}

impl Shim {
    /// The library, opened once; `None` where it can't be, which the log says. To be asked for only after
    /// libtorch_cuda is open.
    pub fn get() -> Option<&'static Self> {
        static SHIM: OnceLock<Option<Shim>> = OnceLock::new();
        let shim = SHIM.get_or_init(|| {
            let opened = Self::open();
            opened.inspect_err(|why| tracing::warn!("the GPU is used without its faster paths: {why}")).ok()
        });
        shim.as_ref()
    }

    fn open() -> Result<Self, String> {
        if LIBRARY.is_empty() {
            return Err("this program was built without CUDA's headers; `make setup` adds them".into());
        }
        // A file without a name: nothing to install beside the program, nothing to clean up.
        // SAFETY: a plain system call, whose result is looked at; the descriptor is nobody else's.
        let mut file = unsafe {
            match libc::memfd_create(c"flowrun_cuda".as_ptr(), libc::MFD_CLOEXEC) {
                -1 => return Err(std::io::Error::last_os_error().to_string()),
                fd => File::from_raw_fd(fd),
            }
        };
        file.write_all(LIBRARY).map_err(|e| e.to_string())?;
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        // SAFETY: our own library; what it needs of libtorch is open and global.
        let library = unsafe { Library::open(Some(path), RTLD_NOW | RTLD_LOCAL) }.map_err(|e| e.to_string())?;
        let shim = Self(Functions::of(&library)?);
        std::mem::forget(library);
        // SAFETY: no arguments.
        shim.check(unsafe { (shim.0.set_up)() }).map_err(|e| e.to_string())?;
        Ok(shim)
    }

    fn check(&self, code: c_int) -> Result<(), TorchError> {
        if code == 0 {
            return Ok(());
        }
        // SAFETY: a string of this thread's, until its next call.
        let text = unsafe { CStr::from_ptr((self.0.error)()) }.to_string_lossy();
        let first = text.lines().next().unwrap_or_default().to_owned();
        Err(if code == 1 { TorchError::OutOfMemory(first) } else { TorchError::Operation(first) })
    }

    /// This thread works on GPU `device` from here on.
    pub fn use_device(&self, device: usize) -> Result<(), TorchError> {
        // SAFETY: a number.
        self.check(unsafe { (self.0.use_device)(device as i64) })
    }

    pub fn memory(&self, device: usize) -> Result<Memory, TorchError> {
        let mut figures = [0; 4];
        // SAFETY: writes four numbers.
        self.check(unsafe { (self.0.memory)(device as i64, figures.as_mut_ptr()) })?;
        let [free, total, allocated, reserved] = figures.map(|n| u64::try_from(n).unwrap_or(0));
        Ok(Memory { free, total, allocated, reserved })
    }

    /// Tensors of this process take at most `share` of the GPU's memory.
    pub fn limit_memory(&self, device: usize, share: f64) -> Result<(), TorchError> {
        // SAFETY: numbers.
        self.check(unsafe { (self.0.limit_memory)(device as i64, share) })
    }

    /// Gives memory that no tensor holds back to the GPUs.
    pub fn empty_cache(&self) -> Result<(), TorchError> {
        // SAFETY: no arguments.
        self.check(unsafe { (self.0.empty_cache)() })
    }

    /// Waits for all work on the GPU.
    pub fn synchronize(&self, device: usize) -> Result<(), TorchError> {
        // SAFETY: a number.
        self.check(unsafe { (self.0.synchronize)(device as i64) })
    }

    /// The CUDA stream that this thread's work goes to.
    pub fn stream(&self, device: usize) -> Result<*mut c_void, TorchError> {
        let mut stream = std::ptr::null_mut();
        // SAFETY: writes one pointer.
        self.check(unsafe { (self.0.stream)(device as i64, &mut stream) })?;
        Ok(stream)
    }

    /// Flash attention (Dao 2023): `q` is `[tokens, heads, d]`, `k` and `v` are `[keys, kv_heads, d]`, bf16 on
    /// a GPU. Returns `[tokens, heads, d]`.
    pub fn flash(&self, q: &Tensor, k: &Tensor, v: &Tensor, s: &Sequences<'_>) -> Result<Tensor, TorchError> {
        let (left, right) = s.window.map_or((-1, -1), |window| (window - 1, 0));
        let at = Tensor::as_ptr;
        let mut out = std::ptr::null_mut();
        // SAFETY: live tensors; libtorch checks their shapes and types. `out` is a new tensor, ours to drop.
        unsafe {
            self.check((self.0.flash)(
                at(q),
                at(k),
                at(v),
                at(s.starts_q),
                at(s.starts_k),
                s.used_k.map_or(std::ptr::null(), at),
                s.longest_q,
                s.longest_k,
                s.causal,
                s.scale,
                left,
                right,
                &mut out,
            ))?;
            Ok(Tensor::from_ptr(out))
        }
    }
}

/// Memory that the graphs of one device thread share.
pub struct GraphPool {
    shim: &'static Shim,
    pool: *mut c_void,
    device: usize,
}

/// Work that was recorded once and is launched as a whole.
pub struct Graph {
    shim: &'static Shim,
    graph: *mut c_void,
}

impl GraphPool {
    pub fn new(shim: &'static Shim, device: usize) -> Result<Self, TorchError> {
        let mut pool = std::ptr::null_mut();
        // SAFETY: writes one pointer, freed when this is dropped.
        shim.check(unsafe { (shim.0.pool_new)(device as i64, &mut pool) })?;
        Ok(Self { shim, pool, device })
    }

    /// Runs `work` once as it is, then records it, and returns the graph with what the recorded run returned:
    /// tensors that hold results after each replay. `work` must not wait for the GPU nor read from it.
    pub fn capture<R>(&self, mut work: impl FnMut() -> Result<R, TorchError>) -> Result<(Graph, R), TorchError> {
        let shim = self.shim;
        let mut capture = Capture { shim, capture: std::ptr::null_mut() };
        // SAFETY: the pool lives; the capture is freed on every way out, which ends it and returns the thread
        // to its own stream.
        unsafe { shim.check((shim.0.capture_new)(self.pool, &mut capture.capture))? };
        // Libraries set themselves up in their first run, which can't be recorded.
        work()?;
        shim.synchronize(self.device)?;
        // SAFETY: as above.
        unsafe { shim.check((shim.0.capture_begin)(capture.capture))? };
        let result = work()?;
        let mut graph = std::ptr::null_mut();
        // SAFETY: as above; the graph is freed when it is dropped.
        unsafe { shim.check((shim.0.capture_end)(capture.capture, &mut graph))? };
        Ok((Graph { shim, graph }, result))
    }
}

impl Drop for GraphPool {
    fn drop(&mut self) {
        // SAFETY: made in `new`, freed once.
        unsafe { (self.shim.0.pool_free)(self.pool) }
    }
}

struct Capture {
    shim: &'static Shim,
    capture: *mut c_void,
}

impl Drop for Capture {
    fn drop(&mut self) {
        if !self.capture.is_null() {
            // SAFETY: made in `capture_new`, freed once.
            unsafe { (self.shim.0.capture_free)(self.capture) }
        }
    }
}

impl Graph {
    /// Launches the recorded work on this thread's stream.
    pub fn replay(&self) -> Result<(), TorchError> {
        // SAFETY: the graph lives.
        self.shim.check(unsafe { (self.shim.0.graph_replay)(self.graph) })
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: made in `capture_end`, freed once.
        unsafe { (self.shim.0.graph_free)(self.graph) }
    }
}
