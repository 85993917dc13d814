//! The `flowrun` program: parse, call, exit code.

fn main() -> std::process::ExitCode {
    flowrun::cli::main()
}
