//! The `flowrun` program: parse, call, exit code.

// What is printed may hold texts of others: `cli::out` prints them without control characters.
#![deny(clippy::print_stdout, clippy::print_stderr)]

mod cli;

fn main() -> std::process::ExitCode {
    cli::main()
}
