//! Run directories from outside: what is in them, who holds them, what of them is garbage.

use std::fs::{self, File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use chrono::NaiveDate;
use datafusion::arrow::record_batch::RecordBatch;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::error::RunError;
use super::journal;
use super::names::{self, BEGUN, FLOW, LOCK, PLAN, STATUS, SUMMARY, SUPERSEDED};
use super::run_dir::RunDir;
use super::{samples, table};
use crate::flow::names::is_name;
use crate::flow::record::FORMAT;
use crate::flow::{PlanHead, PlanRecord};
use crate::observe::RunStatus;
use crate::observe::view::Sample;

/// A run directory at a glance.
#[derive(Debug, Clone, Serialize)]
pub struct RunInfo {
    pub path: PathBuf,
    pub flow: String,
    /// `done`, `failed`, `interrupted`, `running`, or `unfinished` where it was killed.
    pub status: String,
    /// Who holds it, while it runs.
    pub owner: Option<String>,
    pub rounds_done: usize,
    pub rounds: usize,
    /// Seconds since 1970 of the last change.
    pub changed: u64,
    pub seconds_wall: Option<f64>,
    pub bytes: u64,
}

/// The head of the plan in a run directory of any format.
///
/// # Errors
/// The directory is no run's, or can't be read (domain `User`).
pub fn head_of(path: &Path) -> Result<PlanHead, RunError> {
    parsed(path, &plan_text(path)?)
}

/// The plan that a run directory remembers.
///
/// # Errors
/// The directory is no run's, can't be read, or is of a format that is not compared with (domain `User`).
pub fn plan_of(path: &Path) -> Result<PlanRecord, RunError> {
    let text = plan_text(path)?;
    refuse_other_format(path, &parsed(path, &text)?)?;
    parsed(path, &text)
}

/// The date for chat templates in the run at `path`: its plan says it, and so does its flow. A directory that is being
/// made anew has no date yet.
pub fn date_of(path: &Path) -> Option<NaiveDate> {
    if path.join(BEGUN).exists() {
        return None;
    }
    let of_flow = || {
        let table: toml::Table = fs::read_to_string(path.join(FLOW)).ok()?.parse().ok()?;
        table.get("date")?.as_str()?.parse().ok()
    };
    plan_of(path).ok().and_then(|plan| plan.date).or_else(of_flow)
}

fn plan_text(path: &Path) -> Result<Vec<u8>, RunError> {
    let file = path.join(PLAN);
    fs::read(&file).map_err(|e| match e.kind() {
        io::ErrorKind::NotFound => RunError::user(format!(
            "{} is not a run directory: it has no {PLAN}\n  help: `flowrun runs DIR` lists those below a directory",
            path.display()
        )),
        _ => RunError::user(format!("{}: {e}", file.display())),
    })
}

fn parsed<T: DeserializeOwned>(path: &Path, text: &[u8]) -> Result<T, RunError> {
    serde_json::from_slice(text).map_err(|e| RunError::user(format!("{}: {e}", path.join(PLAN).display())))
}

/// A directory of another format is read, and nothing is taken over from it.
fn refuse_other_format(path: &Path, head: &PlanHead) -> Result<(), RunError> {
    let age = match head.format.cmp(&FORMAT) {
        std::cmp::Ordering::Equal => return Ok(()),
        std::cmp::Ordering::Less => "an older",
        std::cmp::Ordering::Greater => "a newer",
    };
    Err(RunError::user(format!(
        "{dir} is of {age} format of run directories, that of flowrun {version}: its rows are not taken over and it is \
         not gone on with\n  help: --output DIR runs the flow beside it, --fresh moves what it holds to its \
         {SUPERSEDED}/ and starts anew; `flowrun report`, `generate`, `export` and `runs` read it as it is",
        dir = path.display(),
        version = head.version,
    )))
}

/// The run directories directly below `dir`, the last changed first.
///
/// # Errors
/// The directory can't be read.
pub fn list(dir: &Path) -> Result<Vec<RunInfo>, RunError> {
    let at = |e: io::Error| RunError::user(format!("{}: {e}", dir.display()));
    let mut runs = Vec::new();
    for entry in fs::read_dir(dir).map_err(at)? {
        let path = entry.map_err(at)?.path();
        runs.extend(head_of(&path).ok().map(|plan| inspect(path, &plan)));
    }
    runs.sort_by(|a, b| b.changed.cmp(&a.changed).then_with(|| a.path.cmp(&b.path)));
    Ok(runs)
}

/// A run directory at a glance.
///
/// # Errors
/// The directory is no run's, or can't be read (domain `User`).
pub fn info(path: &Path) -> Result<RunInfo, RunError> {
    Ok(inspect(path.into(), &head_of(path)?))
}

fn inspect(path: PathBuf, plan: &PlanHead) -> RunInfo {
    let summary: Option<Value> = fs::read(path.join(SUMMARY)).ok().and_then(|text| serde_json::from_slice(&text).ok());
    let written = |key: &str| summary.as_ref().and_then(|s| s.get(key));
    let owner = owner(&path);
    let status = match (&owner, written("status").and_then(Value::as_str)) {
        (Some(_), _) => "running",
        // What a killed run leaves: the summary of the round before, or none.
        (None, None | Some("running")) => "unfinished",
        (None, Some(status)) => status,
    };
    let rounds = written("rounds").and_then(Value::as_array).map_or(0, Vec::len);
    // The last round of a summary is done only where the run is, or went on after it.
    let whole = matches!(written("status").and_then(Value::as_str), Some("done" | "running"));
    let (bytes, changed) = weigh(&path);
    RunInfo {
        flow: plan.flow.clone(),
        status: status.into(),
        owner,
        rounds_done: if whole { rounds } else { rounds.saturating_sub(1) },
        rounds: plan.rounds(),
        changed,
        seconds_wall: written("seconds_wall").and_then(Value::as_f64),
        bytes,
        path,
    }
}

/// What a run does now, or did last, and when it told so: its `status.json`; none before its first second.
///
/// # Errors
/// The directory is no run's, or the file can't be read (domain `User`).
pub fn status(path: &Path) -> Result<Option<(RunStatus, SystemTime)>, RunError> {
    head_of(path)?;
    let file = path.join(STATUS);
    let wrong = |e: io::Error| RunError::user(format!("{}: {e}", file.display()));
    match fs::read(&file) {
        Ok(text) => {
            let at = file.metadata().and_then(|meta| meta.modified()).map_err(wrong)?;
            serde_json::from_slice(&text).map(|status| Some((status, at))).map_err(|e| wrong(e.into()))
        }
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(wrong(e)),
    }
}

/// The figures of a run, as `summary.json` has them; of one that was cut short in its first round, only its flow.
///
/// # Errors
/// The directory is no run's, or the file can't be read (domain `User`).
pub fn figures(path: &Path) -> Result<Value, RunError> {
    let info = info(path)?;
    let file = path.join(SUMMARY);
    let wrong = |e: io::Error| RunError::user(format!("{}: {e}", file.display()));
    let mut figures = match fs::read(&file) {
        Ok(text) => serde_json::from_slice(&text).map_err(|e| wrong(e.into()))?,
        Err(e) if e.kind() == io::ErrorKind::NotFound => json!({ "flow": info.flow, "rounds": [] }),
        Err(e) => return Err(wrong(e)),
    };
    figures["status"] = json!(info.status);
    Ok(figures)
}

/// The rows of a stage's output in one round, complete; none where the stage has not ended the round, or keeps no table.
/// `port` is empty where it has one output.
///
/// # Errors
/// `stage` or `port` is not a name (domain `User`); the file can't be read (`External`).
pub fn table(path: &Path, round: u32, stage: &str, port: &str) -> Result<Option<Vec<RecordBatch>>, RunError> {
    // Names become parts of a path, and may come from anyone.
    if let Some(wrong) = [stage, port].into_iter().find(|name| !name.is_empty() && !is_name(name)) {
        return Err(RunError::user(format!("`{wrong}` is not the name of a stage or of an output")));
    }
    let file = path.join(names::round(round)).join(stage).join(table::file_name(port));
    match table::read(&file) {
        Ok(rows) => Ok(Some(rows)),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(RunError::external(format!("{}: {e}", file.display()))),
    }
}

/// The rows that a run finished last, most `most`: pairs where there are some, or else answers.
pub fn latest_samples(path: &Path, most: usize) -> Vec<Sample> {
    samples::latest(path, most)
}

/// Who holds the directory's lock, where someone does.
pub fn owner(path: &Path) -> Option<String> {
    let file = File::open(path.join(LOCK)).ok()?;
    match file.try_lock_shared() {
        Err(TryLockError::WouldBlock) => {
            Some(fs::read_to_string(path.join(LOCK)).unwrap_or_default().trim().to_owned())
        }
        _ => None,
    }
}

/// Bytes of all files below.
pub(super) fn bytes_below(path: &Path) -> u64 {
    weigh(path).0
}

/// Bytes of all files below, and when the last of them changed.
fn weigh(path: &Path) -> (u64, u64) {
    let mut sum = (0, 0);
    each_file(path, &mut |file, meta| {
        let changed = meta.modified().ok().and_then(|t| t.duration_since(SystemTime::UNIX_EPOCH).ok());
        // To look whether a run is done takes its lock, and changes nothing.
        let changed = changed.filter(|_| file.file_name().is_none_or(|name| name != LOCK));
        sum = (sum.0 + meta.len(), sum.1.max(changed.map_or(0, |t| t.as_secs())));
    });
    sum
}

/// What can't be read has nothing to tell.
fn each_file(path: &Path, see: &mut impl FnMut(&Path, &fs::Metadata)) {
    for entry in fs::read_dir(path).into_iter().flatten().flatten() {
        match entry.metadata() {
            Ok(meta) if meta.is_dir() => each_file(&entry.path(), see),
            Ok(meta) => see(&entry.path(), &meta),
            Err(_) => {}
        }
    }
}

/// Input rows that a stage has recorded in a round; none where it keeps no journal.
pub fn recorded_rows(run: &Path, round: u32, stage: &str) -> Option<usize> {
    let bytes = fs::read(run.join(names::round(round)).join(stage).join(names::JOURNAL)).ok()?;
    let mut rows = journal::finished(&bytes);
    rows.sort_unstable();
    rows.dedup();
    Some(rows.len())
}

/// Files that no run needs: what was superseded, and what writing left when it was cut short.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Garbage {
    pub files: Vec<PathBuf>,
    pub bytes: u64,
}

/// Finds a run's garbage and, unless `dry`, deletes it.
///
/// # Errors
/// The directory is no run's, is in use, or can't be changed.
pub fn collect_garbage(path: &Path, dry: bool) -> Result<Garbage, RunError> {
    head_of(path)?;
    let held = RunDir::hold(path)?;
    let mut garbage = Garbage::default();
    let superseded = path.join(SUPERSEDED);
    each_file(path, &mut |file, meta| {
        if file.starts_with(&superseded) || file.extension().is_some_and(|e| e == "tmp") {
            garbage.files.push(file.into());
            garbage.bytes += meta.len();
        }
    });
    if !dry {
        let at = |file: &Path, e: io::Error| RunError::external(format!("{}: {e}", file.display()));
        for file in garbage.files.iter().filter(|f| !f.starts_with(&superseded)) {
            fs::remove_file(file).map_err(|e| at(file, e))?;
        }
        if superseded.exists() {
            fs::remove_dir_all(&superseded).map_err(|e| at(&superseded, e))?;
        }
    }
    drop(held);
    Ok(garbage)
}
