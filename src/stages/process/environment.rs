//! The environment variables that a program sees.
//!
//! A variable that nobody named could decide rows without a trace, and differ on the next machine. So a program sees
//! what any program needs, what the flow names with `env`, whose values are in the stage's key, and what it names with
//! `secrets`, whose values are in no key and in no file.

use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt;
use std::process::Command;

use crate::flow::{Canonical, Form};

/// Variables that any program needs, to be found, to find its own files and to write texts.
const ALWAYS: [&str; 4] = ["PATH", "HOME", "LANG", "TMPDIR"];

/// Variables with their values; those that are not set are not here. Values are never shown.
pub struct Environment(Vec<(String, OsString)>);

impl Environment {
    /// Reads the variables that are always seen, and these.
    pub fn read(env: &[String], secrets: &[String]) -> Self {
        let names = ALWAYS.into_iter().chain(env.iter().chain(secrets).map(String::as_str));
        Self(names.filter_map(|name| Some((name.to_owned(), std::env::var_os(name)?))).collect())
    }

    /// Nothing else is passed on.
    pub fn give_to(&self, command: &mut Command) {
        command.env_clear().envs(self.0.iter().map(|(name, value)| (name, value)));
    }

    /// These variables with the hashes of their values; one that is not set has none.
    pub fn form(&self, names: &[String]) -> Form {
        let value = |name: &String| self.0.iter().find(|(known, _)| known == name).map(|(_, value)| value);
        let hash = |value: &OsString| blake3::hash(value.as_bytes()).to_hex().to_string();
        Form::List(names.iter().map(|name| (name, value(name).map(hash)).form()).collect())
    }
}

/// The fault in the name of a variable.
pub fn fault(name: &str) -> Option<&'static str> {
    let impossible = name.is_empty() || name.contains(['=', '\0']);
    impossible.then_some("is a list of the names of environment variables")
}
