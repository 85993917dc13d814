//! Errors of running stages, and who can do something about them.

use std::{fmt, io};

use super::Quota;

/// Who an error belongs to; decides whether a stage is started again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Domain {
    /// A bad column, an unreadable file, a wrong setting: not retried, exit code 2.
    User,
    /// More rows were given up than the flow allows: not retried.
    Rows,
    /// The run used more than it may: not retried.
    Quota(Quota),
    /// A network, a disk, a device: retried with back-off.
    External,
    /// A fault of the program: retried, then the run fails.
    Internal,
    /// The run was asked to stop.
    Cancelled,
}

impl Domain {
    /// Those of failures; to be stopped is none.
    pub const FAILURES: [Self; 4] = [Self::User, Self::Rows, Self::External, Self::Internal];

    pub fn as_str(self) -> &'static str {
        match self {
            Self::User => "user",
            Self::Rows => "rows",
            Self::Quota(_) => "quota",
            Self::External => "external",
            Self::Internal => "internal",
            Self::Cancelled => "cancelled",
        }
    }
}

#[derive(Debug, Clone)]
pub struct StageError {
    pub domain: Domain,
    pub message: String,
}

impl StageError {
    pub fn user(message: impl Into<String>) -> Self {
        Self { domain: Domain::User, message: message.into() }
    }
    pub fn rows(message: impl Into<String>) -> Self {
        Self { domain: Domain::Rows, message: message.into() }
    }
    pub fn external(message: impl Into<String>) -> Self {
        Self { domain: Domain::External, message: message.into() }
    }
    pub fn internal(message: impl Into<String>) -> Self {
        Self { domain: Domain::Internal, message: message.into() }
    }
    pub fn cancelled() -> Self {
        Self { domain: Domain::Cancelled, message: "cancelled".into() }
    }
}

impl fmt::Display for StageError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for StageError {}

/// Why a run could not start or did not finish.
#[derive(Debug, Clone)]
pub struct RunError {
    pub domain: Domain,
    pub message: String,
    /// The stage that failed, where it was one.
    pub stage: Option<String>,
}

impl RunError {
    pub fn user(message: impl Into<String>) -> Self {
        Self { domain: Domain::User, message: message.into(), stage: None }
    }

    pub fn rows(message: impl Into<String>) -> Self {
        Self { domain: Domain::Rows, message: message.into(), stage: None }
    }

    pub fn external(message: impl Into<String>) -> Self {
        Self { domain: Domain::External, message: message.into(), stage: None }
    }

    pub fn of_stage(stage: &str, error: StageError) -> Self {
        let message = match error.domain {
            Domain::External => format!(
                "{}\n  help: what is finished is kept; once this is put right, the same command goes on from there",
                error.message
            ),
            _ => error.message,
        };
        Self { domain: error.domain, message, stage: Some(stage.into()) }
    }
}

impl RunError {
    /// The error for someone who is not at the command line, see [`for_clients`].
    pub fn for_clients(&self) -> String {
        for_clients(&self.to_string())
    }
}

/// A message without a remedy that is for the command line: flags, commands, who holds a directory. A remedy that is
/// for the author of the flow stays.
pub fn for_clients(message: &str) -> String {
    let (told, help) = message.split_once(HELP).unwrap_or((message, ""));
    let of_commands = OF_COMMANDS.iter().any(|word| help.contains(word));
    if of_commands { told.to_owned() } else { message.to_owned() }
}

/// The beginning of a remedy.
const HELP: &str = "\n  help: ";
/// Words that only a remedy for the command line contains.
const OF_COMMANDS: [&str; 5] = ["--", "`flowrun", "`make", "the same command", "process "];

impl From<crate::flow::FlowError> for RunError {
    fn from(error: crate::flow::FlowError) -> Self {
        Self::user(error.to_string())
    }
}

impl From<io::Error> for RunError {
    fn from(error: io::Error) -> Self {
        Self::external(error.to_string())
    }
}

impl fmt::Display for RunError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(stage) = &self.stage {
            write!(f, "stage `{stage}`: ")?;
        }
        f.write_str(&self.message)
    }
}

impl std::error::Error for RunError {}
