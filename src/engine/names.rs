//! All names that flowrun uses in a run directory; any other file belongs to the user.

pub const LOCK: &str = "lock";
/// Exists while a run directory is set up, new or with `--fresh`. A process that finds it moves the other files to
/// `superseded`.
pub const BEGUN: &str = "begun";
pub const SUPERSEDED: &str = "superseded";
pub const PLAN: &str = "plan.json";
pub const FLOW: &str = "flow.toml";
pub const SUMMARY: &str = "summary.json";
pub const LOG: &str = "metrics.jsonl";
/// A [`crate::observe::RunStatus`], rewritten every second while the run goes on.
pub const STATUS: &str = "status.json";
pub const DEAD_LETTERS: &str = "dead_letters.parquet";
pub const TRACE: &str = "trace.json";
pub const REPORT: &str = "report.html";
pub const TENSORBOARD: &str = "tensorboard";
/// Prefix of the directory of a round.
const ROUND: &str = "round-";
/// Name of the journal in a stage's directory.
pub const JOURNAL: &str = "journal";

const ALL: [&str; 12] =
    [LOCK, BEGUN, SUPERSEDED, PLAN, FLOW, SUMMARY, LOG, STATUS, DEAD_LETTERS, TRACE, REPORT, TENSORBOARD];

pub fn round(round: impl std::fmt::Display) -> String {
    format!("{ROUND}{round}")
}

pub fn is_round(name: &str) -> bool {
    name.strip_prefix(ROUND).is_some_and(|number| number.parse::<u32>().is_ok())
}

/// Returns the first part of `path` if it is one of flowrun's own names.
pub fn own_of(path: &std::path::Path) -> Option<String> {
    let first = path.components().next()?.as_os_str().to_str()?;
    is_own(first).then(|| first.to_owned())
}

/// Returns whether `name`, at the top of a run directory, is one of flowrun's own names. A sink's file is not.
pub fn is_own(name: &str) -> bool {
    ALL.contains(&name) || is_round(name) || name.ends_with(".tmp")
}
