//! NVRTC, NVIDIA's compiler at run time: `kernels.cu` to a cubin for the GPU at hand.
//!
//! It comes with libtorch's CUDA libraries, so that neither a build nor a user needs a CUDA toolkit.

use std::ffi::{CString, OsStr, c_char, c_int, c_void};
use std::path::{Path, PathBuf};

use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};

use super::TorchError;
use super::cuda::open;

/// Options of every compilation beside the architecture. ptxas then tells what each kernel takes.
const OPTIONS: [&str; 2] = ["--std=c++17", "--ptxas-options=-v"];

/// Names a folder in which compiled kernels are kept for later processes.
const CACHE: &str = "FLOWRUN_KERNEL_CACHE";

type Program = *mut c_void;

/// The opened compiler. It stays open for the life of the process, because libtorch uses it too.
pub struct Nvrtc(Library);

/// A compiled source.
pub struct Compiled {
    /// The cubin.
    pub image: Vec<u8>,
    /// Warnings, and ptxas' lines about every kernel.
    pub log: String,
}

impl Nvrtc {
    /// The one that libtorch uses.
    ///
    /// # Errors
    /// When libtorch's CUDA libraries are missing.
    pub fn open() -> Result<Self, TorchError> {
        let missing = || failed("NVRTC, which comes with libtorch's CUDA libraries, is missing");
        // It knows where NVRTC lies, which is then open and found by its name.
        std::mem::forget(open("libcaffe2_nvrtc.so").ok_or_else(missing)?);
        open("libnvrtc.so.13").map(Self).ok_or_else(missing)
    }

    /// The one at `path`.
    ///
    /// # Errors
    /// When it can't be opened.
    #[cfg(test)]
    pub fn at(path: &Path) -> Result<Self, TorchError> {
        open_at(path).map(Self)
    }

    /// Compiles `source` for `architecture`, such as `sm_90`.
    ///
    /// # Errors
    /// With NVRTC's log, where it has one.
    pub fn compile(&self, source: &str, architecture: &str) -> Result<Compiled, TorchError> {
        self.open_builtins();
        let create: unsafe extern "C" fn(
            *mut Program,
            *const c_char,
            *const c_char,
            c_int,
            *const *const c_char,
            *const *const c_char,
        ) -> c_int = self.symbol("nvrtcCreateProgram")?;
        let compile: unsafe extern "C" fn(Program, c_int, *const *const c_char) -> c_int =
            self.symbol("nvrtcCompileProgram")?;
        let destroy: unsafe extern "C" fn(*mut Program) -> c_int = self.symbol("nvrtcDestroyProgram")?;

        let source = c_string(source)?;
        let mut options = vec![c_string(&format!("--gpu-architecture={architecture}"))?];
        options.extend(OPTIONS.into_iter().map(c_string).collect::<Result<Vec<_>, _>>()?);
        let options: Vec<_> = options.iter().map(|option| option.as_ptr()).collect();
        let (none, mut program) = (std::ptr::null(), std::ptr::null_mut());
        // SAFETY: as NVRTC's documentation has it; all strings live until the program is destroyed.
        let (code, log, image) = unsafe {
            match create(&mut program, source.as_ptr(), c"kernels.cu".as_ptr(), 0, none, none) {
                0 => {}
                code => return Err(failed(format!("NVRTC can't begin a program: error {code}"))),
            }
            let code = compile(program, options.len() as c_int, options.as_ptr());
            let log = self.text(program, "nvrtcGetProgramLogSize", "nvrtcGetProgramLog");
            let image = self.text(program, "nvrtcGetCUBINSize", "nvrtcGetCUBIN");
            destroy(&mut program);
            (code, log, image)
        };
        let log = log.map(|bytes| String::from_utf8_lossy(&bytes).trim_end_matches(['\0', '\n']).to_owned());
        if code != 0 {
            let log = log.unwrap_or_else(|why| why.to_string());
            return Err(failed(format!("kernels.cu can't be compiled for {architecture}: NVRTC error {code}\n{log}")));
        }
        Ok(Compiled { image: image?, log: log? })
    }

    /// NVRTC opens its builtins by their name alone. A library of that name that is open already is the one it
    /// gets, so that the one beside it is found wherever the loader looks.
    fn open_builtins(&self) {
        let Some(folder) = loaded("libnvrtc.so.").and_then(|path| path.parent().map(Path::to_owned)) else { return };
        for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
            if entry.file_name().to_string_lossy().starts_with("libnvrtc-builtins.so.") {
                std::mem::forget(open_at(&entry.path()));
            }
        }
    }

    /// A text of `program`, whose length and bytes two functions give.
    ///
    /// # Safety
    /// `program` is alive, and the functions are NVRTC's of this kind.
    unsafe fn text(&self, program: Program, size: &str, get: &str) -> Result<Vec<u8>, TorchError> {
        let size: unsafe extern "C" fn(Program, *mut usize) -> c_int = self.symbol(size)?;
        let get: unsafe extern "C" fn(Program, *mut c_char) -> c_int = self.symbol(get)?;
        let mut bytes = 0;
        // SAFETY: the caller's; the text has the room that was asked for.
        unsafe {
            let code = size(program, &mut bytes);
            let mut text = vec![0_u8; bytes];
            match (code, get(program, text.as_mut_ptr().cast())) {
                (0, 0) => Ok(text),
                (first, second) => Err(failed(format!("NVRTC gives no result: errors {first} and {second}"))),
            }
        }
    }

    fn symbol<T: Copy>(&self, name: &str) -> Result<T, TorchError> {
        // SAFETY: the callers name the type that NVRTC documents for this symbol.
        unsafe { self.0.get::<T>(name.as_bytes()).map(|s| *s).map_err(|e| failed(format!("{name} is missing: {e}"))) }
    }
}

/// The cubin of `source` for `architecture`: from the folder of [`CACHE`] where one is named and has it, or compiled.
///
/// # Errors
/// As [`Nvrtc::compile`]. A folder that can't be written is no error.
pub fn cubin(source: &str, architecture: &str) -> Result<Vec<u8>, TorchError> {
    let folder = std::env::var_os(CACHE).map(PathBuf::from);
    kept(folder.as_deref(), source, architecture, || {
        let Compiled { image, log } = Nvrtc::open()?.compile(source, architecture)?;
        tracing::debug!(architecture, "kernels compiled\n{log}");
        Ok(image)
    })
}

fn kept(
    folder: Option<&Path>,
    source: &str,
    architecture: &str,
    compile: impl FnOnce() -> Result<Vec<u8>, TorchError>,
) -> Result<Vec<u8>, TorchError> {
    let hash = blake3::hash([source, &OPTIONS.concat()].concat().as_bytes()).to_hex();
    let path = folder.map(|folder| folder.join(format!("kernels-{architecture}-{}.cubin", &hash[..16])));
    if let Some(image) = path.as_ref().and_then(|path| std::fs::read(path).ok()) {
        return Ok(image);
    }
    let image = compile()?;
    if let Some(path) = &path {
        keep(path, &image);
    }
    Ok(image)
}

/// Writes under another name first, so that no process reads half a file.
fn keep(path: &Path, image: &[u8]) {
    let half = path.with_extension(format!("{}.tmp", std::process::id()));
    let folder = path.parent().unwrap_or(Path::new("."));
    let written = std::fs::create_dir_all(folder)
        .and_then(|()| std::fs::write(&half, image))
        .and_then(|()| std::fs::rename(&half, path));
    if let Err(error) = written {
        tracing::warn!("{}: compiled kernels are not kept: {error}", path.display());
    }
}

/// The path that a library was loaded from whose file begins with `name`.
fn loaded(name: &str) -> Option<PathBuf> {
    let maps = std::fs::read_to_string("/proc/self/maps").ok()?;
    let path = |line: &str| line.find('/').map(|at| PathBuf::from(&line[at..]));
    let named = |path: &PathBuf| path.file_name().is_some_and(|file| file.to_string_lossy().starts_with(name));
    maps.lines().filter_map(path).find(named)
}

fn open_at(path: &Path) -> Result<Library, TorchError> {
    // SAFETY: NVIDIA's initialisers are meant to be run by dlopen.
    let library = unsafe { Library::open(Some(OsStr::new(path)), RTLD_NOW | RTLD_GLOBAL) };
    library.map_err(|e| failed(format!("{}: {e}", path.display())))
}

fn c_string(text: &str) -> Result<CString, TorchError> {
    CString::new(text).map_err(|_| failed("a source for NVRTC holds a zero byte"))
}

fn failed(message: impl Into<String>) -> TorchError {
    TorchError::Operation(message.into())
}

#[cfg(test)]
mod tests {
    use super::super::kernels::{NAMES, SOURCE};
    use super::*;

    /// Resources of a kernel, as ptxas reports them.
    #[derive(Debug, Clone, PartialEq, Eq)]
    struct Usage {
        kernel: String,
        /// Registers of a thread.
        registers: u32,
        /// Bytes of shared memory of a block.
        shared: u32,
        /// Bytes of a thread that are stored to memory, because registers ran out.
        spilled: u32,
    }

    /// The resources of each kernel in a log of ptxas.
    fn usages(log: &str) -> Vec<Usage> {
        let before = |line: &str, unit: &str| -> u32 {
            let words: Vec<_> = line[..line.find(unit).unwrap_or(0)].split_whitespace().collect();
            words.last().and_then(|n| n.parse().ok()).unwrap_or(0)
        };
        let mut all: Vec<Usage> = Vec::new();
        for line in log.lines() {
            if let Some(name) = line.split("entry function '").nth(1).and_then(|rest| rest.split('\'').next()) {
                all.push(Usage { kernel: name.to_owned(), registers: 0, shared: 0, spilled: 0 });
            } else if let Some(usage) = all.last_mut() {
                if line.contains("bytes spill stores") {
                    usage.spilled = before(line, " bytes spill stores");
                } else if line.contains(" registers") {
                    usage.registers = before(line, " registers");
                    usage.shared = before(line, " bytes smem");
                }
            }
        }
        all
    }

    /// The log of ptxas of CUDA 13.0 for two kernels.
    const LOG: &str = "\
ptxas info    : 12 bytes gmem
ptxas info    : Compiling entry function 'gpu_draw' for 'sm_90'
ptxas info    : Function properties for gpu_draw
ptxas         .     0 bytes stack frame, 16 bytes spill stores, 24 bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers, 8448 bytes smem
ptxas info    : Compile time = 359.194 ms
ptxas info    : Compiling entry function 'gpu_expand' for 'sm_90'
ptxas info    : Function properties for gpu_expand
ptxas         .     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 30 registers, used 0 barriers, 548 bytes cmem[0], 8 bytes cmem[2]
";

    #[test]
    fn a_log_tells_what_kernels_take() {
        let usage =
            |kernel: &str, registers, shared, spilled| Usage { kernel: kernel.into(), registers, shared, spilled };
        assert_eq!(usages(LOG), [usage("gpu_draw", 32, 8448, 16), usage("gpu_expand", 30, 0, 0)]);
    }

    #[test]
    fn compiled_kernels_are_kept_by_source_and_architecture() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("new");
        let get = |folder: Option<&Path>, source: &str, architecture: &str, made: &[u8]| {
            let mut compiled = false;
            let image = kept(folder, source, architecture, || {
                compiled = true;
                Ok(made.to_vec())
            });
            (image.unwrap(), compiled)
        };
        assert_eq!(get(Some(&folder), "a", "sm_90", b"1"), (b"1".to_vec(), true));
        assert_eq!(get(Some(&folder), "a", "sm_90", b"2"), (b"1".to_vec(), false));
        assert_eq!(get(Some(&folder), "b", "sm_90", b"3"), (b"3".to_vec(), true));
        assert_eq!(get(Some(&folder), "a", "sm_80", b"4"), (b"4".to_vec(), true));
        assert_eq!(get(None, "a", "sm_90", b"5"), (b"5".to_vec(), true));
        // A folder that can't be made is no error.
        let file = folder.join("file");
        std::fs::write(&file, "").unwrap();
        assert_eq!(get(Some(&file), "a", "sm_90", b"6"), (b"6".to_vec(), true));
        assert!(kept(Some(&folder), "c", "sm_90", || Err(failed("no compiler"))).is_err());
        assert_eq!(std::fs::read_dir(&folder).unwrap().count(), 4, "nothing half-written is left");
    }

    /// `make kernels`: the real compiler, whose path FLOWRUN_NVRTC names.
    #[test]
    #[ignore = "needs NVRTC; `make kernels` fetches it"]
    fn kernels_compile() {
        let path = std::env::var_os("FLOWRUN_NVRTC").expect("FLOWRUN_NVRTC names libnvrtc.so.13");
        let nvrtc = Nvrtc::at(Path::new(&path)).unwrap();
        println!("{:8} {:14} {:>9} {:>14} {:>13}", "for", "kernel", "registers", "shared, bytes", "spills, bytes");
        for architecture in ["sm_80", "sm_90", "sm_100"] {
            let compiled = nvrtc.compile(SOURCE, architecture).unwrap_or_else(|e| panic!("{e}"));
            assert!(compiled.image.starts_with(b"\x7fELF"));
            let mut names: Vec<String> = NAMES.iter().map(|name| name.to_string_lossy().into_owned()).collect();
            let usages = usages(&compiled.log);
            for Usage { kernel, registers, shared, spilled } in &usages {
                println!("{architecture:8} {kernel:14} {registers:>9} {shared:>14} {spilled:>13}");
                // A multiprocessor has 65,536 registers, and blocks of up to 1024 threads are launched.
                assert!((1..=64).contains(registers) && *spilled == 0, "{kernel} on {architecture}");
            }
            let mut found: Vec<_> = usages.into_iter().map(|usage| usage.kernel).collect();
            names.sort();
            found.sort();
            assert_eq!(found, names, "{}", compiled.log);
            let warnings: Vec<_> = compiled.log.lines().filter(|line| !line.starts_with("ptxas")).collect();
            assert!(warnings.iter().all(|line| line.trim().is_empty()), "{warnings:?}");
        }
        let error =
            nvrtc.compile("extern \"C\" __global__ void f() { int x = y; }", "sm_90").err().unwrap().to_string();
        assert!(error.contains("identifier \"y\" is undefined"), "NVRTC's log is in the message: {error}");
    }
}
