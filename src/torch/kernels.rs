//! Kernels of our own on a GPU (`kernels.cu`), compiled for it when it is first used.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};

use libloading::os::unix::Library;

use super::cuda::open;
use super::{TorchError, nvrtc};

pub(super) const SOURCE: &str = include_str!("kernels.cu");

/// The kernels, in the order of their names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kernel {
    Norm,
    HeadNorm,
    Turn,
    Store,
    Gate,
    Shrink,
    Expand,
    Draw,
}

pub(super) const NAMES: [&CStr; 8] =
    [c"gpu_norm", c"gpu_head_norm", c"gpu_turn", c"gpu_store", c"gpu_gate", c"gpu_shrink", c"gpu_expand", c"gpu_draw"];

type Launch = unsafe extern "C" fn(
    function: *mut c_void,
    grid_x: c_uint,
    grid_y: c_uint,
    grid_z: c_uint,
    block_x: c_uint,
    block_y: c_uint,
    block_z: c_uint,
    shared: c_uint,
    stream: *mut c_void,
    args: *mut *mut c_void,
    extra: *mut *mut c_void,
) -> c_int;

/// Where kernels run.
pub enum Kernels {
    /// On the GPU that the thread works on.
    Gpu { functions: [*mut c_void; NAMES.len()], launch: Launch },
    /// On the host, thread by thread; the last block of a broken kernel is left out.
    #[cfg(test)]
    Host { broken: Option<Kernel> },
}

impl Kernels {
    /// Compiles them for GPU `device`, whose context must be the calling thread's. They stay for the life of
    /// the process.
    pub fn load(device: usize) -> Result<Self, TorchError> {
        let driver = Driver::open()?;
        let image = nvrtc::cubin(SOURCE, &driver.architecture(device)?)?;
        let mut module = std::ptr::null_mut();
        let load: unsafe extern "C" fn(*mut *mut c_void, *const c_void) -> c_int =
            driver.symbol(c"cuModuleLoadData")?;
        // SAFETY: `image` is a whole cubin for this GPU; the driver copies it.
        driver.check(unsafe { load(&mut module, image.as_ptr().cast()) }, "load the kernels")?;
        let find: unsafe extern "C" fn(*mut *mut c_void, *mut c_void, *const c_char) -> c_int =
            driver.symbol(c"cuModuleGetFunction")?;
        let mut functions = [std::ptr::null_mut(); NAMES.len()];
        for (function, name) in functions.iter_mut().zip(NAMES) {
            // SAFETY: the module was loaded above and is never unloaded.
            driver.check(unsafe { find(function, module, name.as_ptr()) }, "find a kernel")?;
        }
        let launch = driver.symbol(c"cuLaunchKernel")?;
        // libtorch holds the driver too; this keeps `launch` valid.
        std::mem::forget(driver.0);
        Ok(Self::Gpu { functions, launch })
    }

    /// Threads of a block where a GPU would have `wanted`.
    pub fn block(&self, wanted: u32) -> u32 {
        match self {
            Self::Gpu { .. } => wanted,
            // Each is one of the system's.
            #[cfg(test)]
            Self::Host { .. } => wanted.min(32),
        }
    }

    /// Runs a kernel on `stream`: `grid` blocks of `block` threads.
    ///
    /// # Safety
    /// `args` are addresses of the kernel's arguments, of its types and in its order; what they point to has
    /// the room that the kernel expects and outlives its run, which libtorch's allocator sees to for tensors
    /// used on one stream.
    pub unsafe fn launch(
        &self,
        kernel: Kernel,
        grid: (u32, u32),
        block: u32,
        stream: *mut c_void,
        args: &mut [*mut c_void],
    ) -> Result<(), TorchError> {
        if grid.0 == 0 || grid.1 == 0 {
            return Ok(());
        }
        match self {
            Self::Gpu { functions, launch } => {
                let (function, none) = (functions[kernel as usize], std::ptr::null_mut());
                // SAFETY: the function is loaded; the caller answers for the arguments.
                let code =
                    unsafe { launch(function, grid.0, grid.1, 1, block, 1, 1, 0, stream, args.as_mut_ptr(), none) };
                match code {
                    0 => Ok(()),
                    code => {
                        Err(TorchError::Operation(format!("kernel {kernel:?} can't be launched: CUDA error {code}")))
                    }
                }
            }
            #[cfg(test)]
            Self::Host { broken } => {
                let block = self.block(block);
                let grid = (grid.0 - u32::from(*broken == Some(kernel)), grid.1);
                // SAFETY: as above.
                unsafe { flowrun_host_launch(kernel as c_int, grid.0, grid.1, block, args.as_mut_ptr()) };
                Ok(())
            }
        }
    }
}

#[cfg(test)]
unsafe extern "C" {
    fn flowrun_host_launch(kernel: c_int, grid_x: c_uint, grid_y: c_uint, block: c_uint, args: *mut *mut c_void);
}

/// The CUDA driver.
struct Driver(Library);

impl Driver {
    fn open() -> Result<Self, TorchError> {
        open("libcuda.so.1").map(Self).ok_or_else(|| TorchError::Operation("there is no NVIDIA driver".into()))
    }

    fn symbol<T: Copy>(&self, name: &CStr) -> Result<T, TorchError> {
        symbol(&self.0, name)
    }

    fn check(&self, code: c_int, what: &str) -> Result<(), TorchError> {
        if code == 0 { Ok(()) } else { Err(TorchError::Operation(format!("can't {what}: CUDA error {code}"))) }
    }

    fn handle(&self, device: usize) -> Result<c_int, TorchError> {
        let get: unsafe extern "C" fn(*mut c_int, c_int) -> c_int = self.symbol(c"cuDeviceGet")?;
        let mut handle = 0;
        // SAFETY: the driver was initialised by libtorch; the call writes one number.
        self.check(unsafe { get(&mut handle, device as c_int) }, "find the GPU")?;
        Ok(handle)
    }

    /// As `sm_90`.
    fn architecture(&self, device: usize) -> Result<String, TorchError> {
        const MAJOR: c_int = 75;
        const MINOR: c_int = 76;
        let attribute: unsafe extern "C" fn(*mut c_int, c_int, c_int) -> c_int =
            self.symbol(c"cuDeviceGetAttribute")?;
        let (handle, mut major, mut minor) = (self.handle(device)?, 0, 0);
        // SAFETY: each call writes one number.
        unsafe {
            self.check(attribute(&mut major, MAJOR, handle), "ask the GPU")?;
            self.check(attribute(&mut minor, MINOR, handle), "ask the GPU")?;
        }
        Ok(format!("sm_{major}{minor}"))
    }

    /// As `NVIDIA H100 80GB HBM3`.
    fn name(&self, device: usize) -> Result<String, TorchError> {
        let get: unsafe extern "C" fn(*mut c_char, c_int, c_int) -> c_int = self.symbol(c"cuDeviceGetName")?;
        let (handle, mut name) = (self.handle(device)?, [0_u8; 128]);
        // SAFETY: the text has the room that is told.
        self.check(unsafe { get(name.as_mut_ptr().cast(), name.len() as c_int, handle) }, "ask the GPU")?;
        Ok(CStr::from_bytes_until_nul(&name).unwrap_or_default().to_string_lossy().into_owned())
    }

    /// The newest CUDA that the driver knows, as `13.0`.
    fn version(&self) -> Result<String, TorchError> {
        let get: unsafe extern "C" fn(*mut c_int) -> c_int = self.symbol(c"cuDriverGetVersion")?;
        let mut version = 0;
        // SAFETY: the call writes one number.
        self.check(unsafe { get(&mut version) }, "ask the driver")?;
        Ok(format!("{}.{}", version / 1000, version % 1000 / 10))
    }
}

/// Name, architecture and driver of a GPU, in words.
///
/// # Errors
/// When there is no driver, or no such GPU.
pub fn describe(device: usize) -> Result<Vec<(&'static str, String)>, TorchError> {
    let driver = Driver::open()?;
    let facts = vec![
        ("GPU", driver.name(device)?),
        ("architecture", driver.architecture(device)?),
        ("newest CUDA of the driver", driver.version()?),
    ];
    std::mem::forget(driver.0);
    Ok(facts)
}

fn symbol<T: Copy>(library: &Library, name: &CStr) -> Result<T, TorchError> {
    let missing = |e| TorchError::Operation(format!("{} is missing: {e}", name.to_string_lossy()));
    // SAFETY: the callers name the type that the library documents for this symbol.
    unsafe { library.get::<T>(name.to_bytes_with_nul()).map(|s| *s).map_err(missing) }
}
