//! Finding CUDA at run time.
//!
//! libtorch_cuda is never linked, so that one binary serves machines with and without a GPU and
//! CPU users need a third of the download. It registers its kernels when it is opened; libtorch
//! asks once, at the first call that needs CUDA hooks, so [`init`] has to run before any other
//! tensor call of the process.

use std::ffi::OsStr;
use std::sync::OnceLock;

use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};

use super::shim::{Memory, Shim};

/// Opens libtorch_cuda where an NVIDIA driver and the library exist. Returns whether GPUs can be
/// used. Safe to call often; only the first call does anything.
pub fn init() -> bool {
    static CUDA: OnceLock<bool> = OnceLock::new();
    *CUDA.get_or_init(|| {
        if std::env::var_os("PYTORCH_CUDA_ALLOC_CONF").is_none() {
            // Variable lengths and training in one process fragment the default allocator.
            // SAFETY: first call of the process, before device threads exist.
            unsafe { std::env::set_var("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True") };
        }
        if open("libcuda.so.1").is_none() {
            return false;
        }
        let Some(library) = open("libtorch_cuda.so") else {
            tracing::warn!(
                "an NVIDIA driver is here but libtorch_cuda.so is not; run `FLOWRUN_CUDA=1 make setup` to use the GPU"
            );
            return false;
        };
        // Kernels stay registered for the life of the process.
        std::mem::forget(library);
        tch::Cuda::is_available()
    })
}

/// Number of GPUs that can be used.
pub fn cuda_devices() -> usize {
    if init() { usize::try_from(tch::Cuda::device_count()).unwrap_or(0) } else { 0 }
}

/// Memory of a GPU; `None` where there is no such GPU, or it can't be asked.
pub fn memory(index: usize) -> Option<Memory> {
    if index < cuda_devices() { shim()?.memory(index).ok() } else { None }
}

/// Tensors of this process take at most `share` of the GPU's memory.
pub fn limit_memory(index: usize, share: f64) {
    if let Some(Err(error)) = shim().map(|shim| shim.limit_memory(index, share)) {
        tracing::warn!(device = format!("cuda:{index}"), "its memory is not bounded: {error}");
    }
}

/// What tch does not reach; `None` where there is no GPU, or it can't be opened.
pub(crate) fn shim() -> Option<&'static Shim> {
    if init() { Shim::get() } else { None }
}

pub(super) fn open(name: &str) -> Option<Library> {
    // SAFETY: the driver's and libtorch's initialisers are meant to be run by dlopen.
    unsafe { Library::open(Some(OsStr::new(name)), RTLD_NOW | RTLD_GLOBAL) }.ok()
}
