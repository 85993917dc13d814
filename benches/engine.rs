//! How fast the engine moves rows when its stages do next to nothing.

fn main() {
    divan::main();
}
