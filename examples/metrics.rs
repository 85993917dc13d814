//! Prints the page of all metrics: `cargo run --example metrics > docs/metrics.md`.

fn main() {
    print!("{}", flowrun::observe::catalogue::page());
}
