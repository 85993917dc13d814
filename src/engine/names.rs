//! The names in a run directory, all of them: what is not here is someone else's.

pub const LOCK: &str = "lock";
/// There while a directory is made or made anew. What lies beside it is moved away by whoever finds it.
pub const BEGUN: &str = "begun";
pub const SUPERSEDED: &str = "superseded";
pub const PLAN: &str = "plan.json";
pub const FLOW: &str = "flow.toml";
pub const SUMMARY: &str = "summary.json";
pub const LOG: &str = "metrics.jsonl";
/// A [`crate::observe::RunStatus`], a second old at most while the run goes on.
pub const STATUS: &str = "status.json";
pub const DEAD_LETTERS: &str = "dead_letters.parquet";
pub const TRACE: &str = "trace.json";
pub const REPORT: &str = "report.html";
pub const TENSORBOARD: &str = "tensorboard";
/// Before the number of a round.
const ROUND: &str = "round-";
/// In a stage's directory.
pub const JOURNAL: &str = "journal";

const ALL: [&str; 12] =
    [LOCK, BEGUN, SUPERSEDED, PLAN, FLOW, SUMMARY, LOG, STATUS, DEAD_LETTERS, TRACE, REPORT, TENSORBOARD];

pub fn round(round: impl std::fmt::Display) -> String {
    format!("{ROUND}{round}")
}

pub fn is_round(name: &str) -> bool {
    name.strip_prefix(ROUND).is_some_and(|number| number.parse::<u32>().is_ok())
}

/// The run's own name that a path in its directory begins with.
pub fn own_of(path: &std::path::Path) -> Option<String> {
    let first = path.components().next()?.as_os_str().to_str()?;
    is_own(first).then(|| first.to_owned())
}

/// Whether a run, and not someone else, has put this at the top of its directory. A sink's file is the flow's.
pub fn is_own(name: &str) -> bool {
    ALL.contains(&name) || is_round(name) || name.ends_with(".tmp")
}
