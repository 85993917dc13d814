//! Tells the linker where libtorch lies, and programs that embed the library too
//! (`DEP_FLOWRUN_LIBTORCH_LIB` in their build script, see docs/embedding.md).

fn main() {
    println!("cargo:rerun-if-env-changed=LIBTORCH");
    // Known because torch-sys is a direct dependency with `links = "tch"`.
    let Ok(lib) = std::env::var("DEP_TCH_LIBTORCH_LIB") else {
        panic!("libtorch was not found; `make setup` unpacks it into .libtorch/");
    };
    cpu_operations(&lib);
    cuda_operations(&lib);
    println!("cargo:libtorch_lib={lib}");
    println!("cargo:rustc-link-arg=-Wl,-rpath,{lib}");
}

/// What `src/torch/{cpu,products,gradient}.rs` call. Its threads are those of libtorch's OpenMP: a second runtime's would wait
/// beside them and take their cores.
fn cpu_operations(lib: &str) {
    let files = ["cpu.cpp", "products.cpp", "gradient.cpp"].map(|name| format!("src/torch/{name}"));
    for file in
        files.iter().map(String::as_str).chain(["src/torch/cpu.h", "src/torch/tiles.h", "src/torch/attention.h"])
    {
        println!("cargo:rerun-if-changed={file}");
    }
    cc::Build::new()
        .cpp(true)
        .std("c++17")
        .files(&files)
        .opt_level(3)
        .flag("-fopenmp")
        // Sums in any order, so that they vectorise; infinities and NaN stay what they are.
        .flags(["-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math"])
        // GCC 12 warns of its own intrinsics.
        .flag_if_supported("-Wno-maybe-uninitialized")
        .flag_if_supported("-Wno-uninitialized")
        .compile("flowrun_cpu");
    println!("cargo:rustc-link-search=native={lib}");
    println!("cargo:rustc-link-lib=dylib:+verbatim=libgomp.so.1");
}

/// What `src/torch/shim.rs` carries in itself: linked to nothing, because libtorch_cuda is opened at run time
/// and only where there is a GPU. Empty where CUDA's headers are missing.
fn cuda_operations(lib: &str) {
    println!("cargo:rerun-if-changed=src/torch/cuda_shim.cpp");
    println!("cargo:rerun-if-changed=src/torch/kernels.cu");
    println!("cargo:rerun-if-changed=src/torch/kernels_host.cpp");
    let torch = std::path::Path::new(lib).join("..");
    // Beside libtorch, as wheels lie.
    let cuda = torch.join("../nvidia/cu13/include");
    let out = std::path::PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo names OUT_DIR"));
    let library = out.join("flowrun_cuda.so");
    if cuda.join("crt/host_config.h").is_file() {
        let mut compiler = cc::Build::new();
        compiler.cpp(true).std("c++17").opt_level(1).debug(false).pic(true).warnings(false).include(cuda);
        compiler.includes([torch.join("include"), torch.join("include/torch/csrc/api/include")]);
        let mut command = compiler.get_compiler().to_command();
        command.args(["-D_GLIBCXX_USE_CXX11_ABI=1", "-shared", "-s", "-o"]).arg(&library);
        let built = command.arg("src/torch/cuda_shim.cpp").status();
        assert!(built.is_ok_and(|status| status.success()), "{command:?} failed");
    } else {
        println!(
            "cargo:warning=CUDA's headers are missing: a GPU will be used without its faster paths; `make setup` adds them"
        );
        std::fs::write(&library, []).expect("OUT_DIR can be written");
    }
    // The kernels on the host, which only tests call; release builds go without.
    if std::env::var("PROFILE").is_ok_and(|profile| profile == "debug") {
        let mut host = cc::Build::new();
        host.cpp(true).std("c++20").opt_level(1).file("src/torch/kernels_host.cpp").compile("flowrun_kernels");
    }
}
