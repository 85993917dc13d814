//! Kernels of our own on a GPU, compiled when it is first used (`kernels.cu`).
//!
//! NVRTC comes with libtorch's CUDA libraries, so that neither a build nor a user needs a CUDA toolkit, and
//! the code is always for the GPU at hand.

use std::ffi::{CStr, CString, c_char, c_int, c_uint, c_void};

use libloading::os::unix::Library;

use super::TorchError;
use super::cuda::open;

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

const NAMES: [&CStr; 8] =
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
    /// On the host, thread by thread.
    #[cfg(test)]
    Host,
}

impl Kernels {
    /// Compiles them for GPU `device`, whose context must be the calling thread's. They stay for the life of
    /// the process.
    pub fn load(device: usize) -> Result<Self, TorchError> {
        let driver = Driver::open()?;
        let image = compile(&driver.architecture(device)?)?;
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
            Self::Host => wanted.min(32),
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
            Self::Host => {
                let block = self.block(block);
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

    /// As `sm_90`.
    fn architecture(&self, device: usize) -> Result<String, TorchError> {
        const MAJOR: c_int = 75;
        const MINOR: c_int = 76;
        let get: unsafe extern "C" fn(*mut c_int, c_int) -> c_int = self.symbol(c"cuDeviceGet")?;
        let attribute: unsafe extern "C" fn(*mut c_int, c_int, c_int) -> c_int =
            self.symbol(c"cuDeviceGetAttribute")?;
        let (mut handle, mut major, mut minor) = (0, 0, 0);
        // SAFETY: the driver was initialised by libtorch; each call writes one number.
        unsafe {
            self.check(get(&mut handle, device as c_int), "find the GPU")?;
            self.check(attribute(&mut major, MAJOR, handle), "ask the GPU")?;
            self.check(attribute(&mut minor, MINOR, handle), "ask the GPU")?;
        }
        Ok(format!("sm_{major}{minor}"))
    }
}

fn symbol<T: Copy>(library: &Library, name: &CStr) -> Result<T, TorchError> {
    let missing = |e| TorchError::Operation(format!("{} is missing: {e}", name.to_string_lossy()));
    // SAFETY: the callers name the type that the library documents for this symbol.
    unsafe { library.get::<T>(name.to_bytes_with_nul()).map(|s| *s).map_err(missing) }
}

/// A cubin of `kernels.cu`.
fn compile(architecture: &str) -> Result<Vec<u8>, TorchError> {
    let missing = || TorchError::Operation("NVRTC, which comes with libtorch's CUDA libraries, is missing".into());
    // It knows where NVRTC lies, which is then open and found by its name.
    let opener = open("libcaffe2_nvrtc.so").ok_or_else(missing)?;
    let nvrtc = open("libnvrtc.so.13").ok_or_else(missing)?;
    let create: unsafe extern "C" fn(
        *mut *mut c_void,
        *const c_char,
        *const c_char,
        c_int,
        *const *const c_char,
        *const *const c_char,
    ) -> c_int = symbol(&nvrtc, c"nvrtcCreateProgram")?;
    let compile: unsafe extern "C" fn(*mut c_void, c_int, *const *const c_char) -> c_int =
        symbol(&nvrtc, c"nvrtcCompileProgram")?;
    let size_of: unsafe extern "C" fn(*mut c_void, *mut usize) -> c_int = symbol(&nvrtc, c"nvrtcGetCUBINSize")?;
    let get: unsafe extern "C" fn(*mut c_void, *mut c_char) -> c_int = symbol(&nvrtc, c"nvrtcGetCUBIN")?;
    let destroy: unsafe extern "C" fn(*mut *mut c_void) -> c_int = symbol(&nvrtc, c"nvrtcDestroyProgram")?;

    let failed = |code| TorchError::Operation(format!("the GPU's kernels can't be compiled: NVRTC error {code}"));
    let check = |code: c_int| if code == 0 { Ok(()) } else { Err(failed(code)) };
    let source = CString::new(include_str!("kernels.cu")).map_err(|_| failed(-1))?;
    let architecture = CString::new(format!("--gpu-architecture={architecture}")).map_err(|_| failed(-1))?;
    let options = [architecture.as_ptr(), c"--std=c++17".as_ptr()];
    let none = std::ptr::null();
    let (mut program, mut size) = (std::ptr::null_mut(), 0);
    // SAFETY: as NVRTC's documentation has it; all strings live until the program is destroyed, and the image
    // has the size that was asked for.
    let image = unsafe {
        check(create(&mut program, source.as_ptr(), c"kernels.cu".as_ptr(), 0, none, none))?;
        let image = check(compile(program, options.len() as c_int, options.as_ptr()))
            .and_then(|()| check(size_of(program, &mut size)))
            .and_then(|()| {
                let mut image = vec![0_u8; size];
                check(get(program, image.as_mut_ptr().cast())).map(|()| image)
            });
        destroy(&mut program);
        image
    };
    // libtorch uses both.
    std::mem::forget((opener, nvrtc));
    image
}
