//! The directory of a run: one owner at a time, one flow, nothing half-written that is trusted.
//!
//! `plan.json` is written last when a directory is made, and atomically, so its presence says
//! that the directory is whole. Work found without it moves to `superseded/TIME`, as does what
//! `--fresh` and a changed content key leave behind; nothing is ever deleted.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use datafusion::arrow::temporal_conversions::timestamp_ms_to_datetime;
use serde_json::Value;

use super::error::RunError;
use super::ledger::STATUS;
use super::table::{create_dir, sync_parent, write_atomically};
use crate::flow::{Change, Fate, PlanRecord, RoundPlan};

pub(super) const LOCK: &str = "lock";
pub(super) const SUPERSEDED: &str = "superseded";
pub(super) const PLAN: &str = "plan.json";
const LOG: &str = "metrics.jsonl";
const FILES: [&str; 9] =
    [LOCK, SUPERSEDED, PLAN, "flow.toml", "summary.json", LOG, "dead_letters.parquet", "trace.json", STATUS];

/// What is asked of a directory when it is opened.
pub struct Opening<'a> {
    pub rounds: &'a [RoundPlan],
    pub flow_name: &'a str,
    pub flow_text: &'a str,
    pub fresh: bool,
    pub recompute: bool,
    /// A run whose work a new directory begins with, as far as it is of the same plan.
    pub fork_of: Option<&'a Path>,
}

/// An open run directory; holds its lock.
pub struct RunDir {
    path: PathBuf,
    /// Where this run puts what it supersedes.
    superseded: PathBuf,
    lock: File,
}

impl RunDir {
    pub fn open(path: &Path, opening: &Opening) -> Result<Self, RunError> {
        let at = |e: io::Error| {
            let help = "\n  help: free space there or make it writable, or name another directory with --output";
            RunError::external(format!("run directory {}: {e}{help}", path.display()))
        };
        create_dir(path).map_err(at)?;
        refuse_foreign(path)?;
        let dir = Self::held(path, lock(path)?);
        let old = fs::read(path.join(PLAN)).ok().and_then(|text| serde_json::from_slice::<PlanRecord>(&text).ok());
        match old {
            Some(old) if !opening.fresh => {
                if !opening.recompute {
                    dir.refuse_changed(&old.compare(opening.rounds))?;
                }
            }
            _ => {
                dir.supersede_all().map_err(at)?;
                if let Some(from) = opening.fork_of {
                    dir.fork(from, opening.rounds)?;
                }
            }
        }
        write_atomically(&path.join("flow.toml"), opening.flow_text.as_bytes()).map_err(at)?;
        let new = PlanRecord::of(opening.rounds, opening.flow_name);
        let text = serde_json::to_vec_pretty(&new).map_err(|e| at(e.into()))?;
        write_atomically(&path.join(PLAN), &text).map_err(at)?;
        Ok(dir)
    }

    pub(super) fn held(path: &Path, lock: File) -> Self {
        Self { path: path.into(), superseded: path.join(SUPERSEDED).join(now()), lock }
    }

    /// Lets another run in, while handles of this one may live on.
    pub fn release(&self) {
        // Who held it is no matter any more, and would make each start of the same run leave another file.
        if let Err(error) = self.lock.set_len(0) {
            tracing::debug!(%error, "the run directory's lock still names this process");
        }
        if let Err(error) = self.lock.unlock() {
            tracing::warn!(%error, "the run directory's lock is held until the program ends");
        }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn stage(&self, round: u32, stage: &str) -> PathBuf {
        self.path.join(format!("round-{round}")).join(stage)
    }

    /// Moves the record of a stage out of the way and leaves an empty directory in its place.
    pub fn supersede_stage(&self, round: u32, stage: &str) -> io::Result<()> {
        let from = self.stage(round, stage);
        let to = unused(self.superseded.join(format!("round-{round}")).join(stage));
        move_to(&from, &to)?;
        tracing::warn!(round, stage, to = %to.display(), "inputs or settings changed; the stage's record is superseded");
        create_dir(&from)
    }

    fn supersede_all(&self) -> io::Result<()> {
        let target = unused(self.superseded.clone());
        for entry in fs::read_dir(&self.path)? {
            let entry = entry?;
            let name = entry.file_name();
            if name != LOCK && name != SUPERSEDED {
                move_to(&entry.path(), &target.join(name))?;
            }
        }
        Ok(())
    }

    /// Stages with recorded work whose plan key is another now would be computed again.
    fn refuse_changed(&self, changes: &[Change]) -> Result<(), RunError> {
        let lost = |c: &&Change| !matches!(c.fate, Fate::Same | Fate::New | Fate::Gone);
        let changed: Vec<&Change> =
            changes.iter().filter(lost).filter(|c| has_work(&self.stage(c.round, &c.stage))).collect();
        let Some(first) = changed.iter().find(|c| c.fate == Fate::Recompute).or(changed.first()) else {
            return Ok(());
        };
        let causes = if first.causes.is_empty() { String::new() } else { format!(": {}", first.causes.join(", ")) };
        let names: Vec<String> = changed.iter().map(|c| format!("{} (round {})", c.stage, c.round)).collect();
        Err(RunError::user(format!(
            "{dir} holds finished work of another form of this flow, which would be computed again: {}\n  \
             `{}` changed{causes}\n  \
             help: `flowrun check --diff {dir} FILE` tells all; --recompute goes on, --fresh starts anew (both keep the \
             old work under superseded/), --output DIR uses another directory",
            names.join(", "),
            first.stage,
            dir = self.path.display(),
        )))
    }

    /// Takes over what another run has done of the same plan. That run stays as it is.
    fn fork(&self, from: &Path, rounds: &[RoundPlan]) -> Result<(), RunError> {
        let plan = super::runs::plan_of(from)?;
        let held = Self::hold(from)?;
        let changes = plan.compare(rounds);
        let at = |e: io::Error| RunError::external(format!("{} can't be copied: {e}", from.display()));
        let reusable = |c: &&Change| !matches!(c.fate, Fate::Recompute | Fate::New | Fate::Gone);
        let mut taken = Vec::new();
        for change in changes.iter().filter(reusable) {
            let theirs = from.join(format!("round-{}", change.round)).join(&change.stage);
            if theirs.is_dir() {
                copy_dir(&theirs, &self.stage(change.round, &change.stage)).map_err(at)?;
                taken.push((change.round, change.stage.as_str()));
            }
        }
        let log = fs::read_to_string(from.join(LOG)).unwrap_or_default();
        let ours = |line: &&str| {
            let event: Value = serde_json::from_str(line).unwrap_or_default();
            taken.iter().any(|(round, stage)| event["round"] == *round && event["stage"] == *stage)
        };
        let lines: String = log.lines().filter(ours).flat_map(|line| [line, "\n"]).collect();
        write_atomically(&self.path.join(LOG), lines.as_bytes()).map_err(at)?;
        drop(held);
        Ok(())
    }

    /// Keeps every run out of a directory until the file is dropped.
    pub fn hold(path: &Path) -> Result<File, RunError> {
        lock(path)
    }
}

/// Copies files, each durable under its name.
fn copy_dir(from: &Path, to: &Path) -> io::Result<()> {
    create_dir(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let target = to.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            copy_dir(&entry.path(), &target)?;
        } else {
            fs::copy(entry.path(), &target)?;
            File::open(&target)?.sync_all()?;
        }
    }
    File::open(to)?.sync_all()
}

/// A directory with files that no run wrote is someone else's.
fn refuse_foreign(path: &Path) -> Result<(), RunError> {
    if path.join(PLAN).exists() {
        return Ok(());
    }
    let entries = fs::read_dir(path).map_err(|e| RunError::external(format!("{}: {e}", path.display())))?;
    for entry in entries.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let known = FILES.contains(&name.as_str()) || name.starts_with("round-") || name.ends_with(".tmp");
        if !known {
            return Err(RunError::user(format!(
                "{} is not a run directory: it holds `{name}`\n  help: name an empty or a new directory with --output",
                path.display()
            )));
        }
    }
    Ok(())
}

fn lock(path: &Path) -> Result<File, RunError> {
    let file = path.join(LOCK);
    let at = |e: io::Error| {
        let help = "\n  help: make the directory writable, or name another with --output";
        RunError::external(format!("{}: {e}{help}", file.display()))
    };
    let mut lock = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&file).map_err(at)?;
    match lock.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            let owner = fs::read_to_string(&file).unwrap_or_default();
            return Err(RunError::user(format!(
                "{} is in use by another run\n  help: {} has it: wait for that run or stop it, or use another directory \
                 with --output",
                path.display(),
                owner.trim()
            )));
        }
        Err(TryLockError::Error(e)) => return Err(at(e)),
    }
    let host = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_else(|_| "unknown".into());
    lock.set_len(0).map_err(at)?;
    writeln!(lock, "process {} on host {}", std::process::id(), host.trim()).map_err(at)?;
    Ok(lock)
}

fn has_work(stage: &Path) -> bool {
    fs::read_dir(stage).is_ok_and(|mut entries| entries.next().is_some())
}

fn move_to(from: &Path, to: &Path) -> io::Result<()> {
    if let Some(parent) = to.parent() {
        create_dir(parent)?;
    }
    fs::rename(from, to)?;
    // Where it has gone first: a machine that stops in between must not have lost it.
    sync_parent(to).and_then(|()| sync_parent(from))
}

/// The path itself, or with the first number that makes it new.
fn unused(path: PathBuf) -> PathBuf {
    if !path.exists() {
        return path;
    }
    let numbered = |n: u32| {
        let mut name = path.as_os_str().to_owned();
        name.push(format!("-{n}"));
        PathBuf::from(name)
    };
    (2..).map(numbered).find(|p| !p.exists()).unwrap_or(path)
}

/// UTC, to the second, in a form that sorts.
fn now() -> String {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    timestamp_ms_to_datetime(since.as_millis() as i64)
        .map_or_else(|| since.as_secs().to_string(), |t| t.format("%Y%m%dT%H%M%SZ").to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::Domain;

    fn open(path: &Path, fresh: bool) -> Result<RunDir, RunError> {
        RunDir::open(
            path,
            &Opening { rounds: &[], flow_name: "f", flow_text: "", fresh, recompute: false, fork_of: None },
        )
    }

    #[test]
    fn a_second_owner_is_told_who_the_first_is() {
        let dir = tempfile::tempdir().unwrap();
        let first = open(dir.path(), false).unwrap();
        let error = open(dir.path(), false).err().unwrap();
        assert_eq!(error.domain, Domain::User);
        assert!(error.message.contains(&format!("process {}", std::process::id())), "{error}");
        drop(first);
        open(dir.path(), false).unwrap();
    }

    #[test]
    fn half_a_directory_and_a_fresh_start_move_what_was_there() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("round-1/a")).unwrap();
        drop(open(dir.path(), false).unwrap());
        assert!(!dir.path().join("round-1").exists(), "without plan.json nothing is trusted");
        fs::create_dir_all(dir.path().join("round-1/b")).unwrap();
        drop(open(dir.path(), false).unwrap());
        assert!(dir.path().join("round-1/b").exists());
        drop(open(dir.path(), true).unwrap());
        assert!(!dir.path().join("round-1").exists());
        assert!(fs::read_dir(dir.path().join(SUPERSEDED)).unwrap().count() >= 2);
    }

    #[test]
    fn a_directory_of_something_else_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("thesis.tex"), "").unwrap();
        assert!(open(dir.path(), true).err().unwrap().message.contains("thesis.tex"));
    }
}
