//! What is wrong with a flow: one message, its place, and a remedy.

use std::fmt;
use std::path::{Path, PathBuf};

use super::document::SET;

/// An error of the user's making, found while a flow is read, checked or planned (exit code 2).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FlowError {
    /// Dotted key the message is about (`stages.sample.candidates`), empty for the whole file.
    pub key: String,
    /// What is wrong.
    pub message: String,
    /// What to do about it.
    pub help: Option<String>,
    /// File and 1-based line, once known; for a `--set` entry `--set` and its number; 0 for a whole
    /// file or flag.
    pub place: Option<(PathBuf, usize)>,
}

impl FlowError {
    pub fn new(key: impl Into<String>, message: impl Into<String>) -> Self {
        Self { key: key.into(), message: message.into(), help: None, place: None }
    }

    pub fn help(mut self, help: impl Into<String>) -> Self {
        self.help = Some(help.into());
        self
    }
}

impl fmt::Display for FlowError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.place {
            Some((file, number)) if file == Path::new(SET) => write!(f, "{SET} {number}: ")?,
            Some((file, 0)) => write!(f, "{}: ", file.display())?,
            Some((file, line)) => write!(f, "{}:{line}: ", file.display())?,
            None => {}
        }
        if !self.key.is_empty() {
            write!(f, "{}: ", self.key)?;
        }
        f.write_str(&self.message)?;
        if let Some(help) = &self.help {
            write!(f, "\n  help: {help}")?;
        }
        Ok(())
    }
}

impl std::error::Error for FlowError {}
