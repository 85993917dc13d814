//! Tells the linker where libtorch lies, and programs that embed the library too
//! (`DEP_FLOWRUN_LIBTORCH_LIB` in their build script, see docs/embedding.md).

fn main() {
    println!("cargo:rerun-if-env-changed=LIBTORCH");
    // Known because torch-sys is a direct dependency with `links = "tch"`.
    let Ok(lib) = std::env::var("DEP_TCH_LIBTORCH_LIB") else {
        panic!("libtorch was not found; `make setup` unpacks it into .libtorch/");
    };
    cpu_operations(&lib);
    println!("cargo:libtorch_lib={lib}");
    println!("cargo:rustc-link-arg=-Wl,-rpath,{lib}");
}

/// What `src/torch/cpu.rs` calls. Its threads are those of libtorch's OpenMP: a second runtime's would wait
/// beside them and take their cores.
fn cpu_operations(lib: &str) {
    println!("cargo:rerun-if-changed=src/torch/cpu.cpp");
    cc::Build::new()
        .cpp(true)
        .std("c++17")
        .file("src/torch/cpu.cpp")
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
