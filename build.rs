//! Tells the linker where libtorch lies, and programs that embed the library too
//! (`DEP_FLOWRUN_LIBTORCH_LIB` in their build script, see docs/embedding.md).

fn main() {
    println!("cargo:rerun-if-env-changed=LIBTORCH");
    // Known because torch-sys is a direct dependency with `links = "tch"`.
    let Ok(lib) = std::env::var("DEP_TCH_LIBTORCH_LIB") else {
        panic!("libtorch was not found; `make setup` unpacks it into .libtorch/");
    };
    println!("cargo:libtorch_lib={lib}");
    println!("cargo:rustc-link-arg=-Wl,-rpath,{lib}");
}
