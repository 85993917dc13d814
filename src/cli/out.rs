//! The output of the program: the one place that writes to stdout, and to stderr outside of the log.
//!
//! Most of it holds text of others somewhere: a model's answer, a column's name, a flow's name in a run directory that
//! was copied from elsewhere. So all of it is printed without control characters.

#![allow(clippy::print_stdout, clippy::print_stderr)]

use flowrun::observe::text::printable;

/// To stdout, as it is but for control characters.
pub fn print(text: &str) {
    print!("{}", printable(text));
}

/// A line to stderr.
pub fn complain(text: &str) {
    eprintln!("{}", printable(text));
}

/// As `println!`, see [`print`].
macro_rules! say {
    ($($part:tt)*) => { $crate::cli::out::print(&(format!($($part)*) + "\n")) };
}

pub(super) use say;
