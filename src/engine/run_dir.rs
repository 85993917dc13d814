//! The directory of a run: one owner at a time, one flow, nothing half-written that is trusted.
//!
//! While a directory is made, or made anew, the file `begun` says so: whoever finds it begins again, and
//! what lies there moves to `superseded/TIME`. Without it a `plan.json` has to be there that can be read;
//! where it isn't, nobody knows what the work in the directory is of, and the run stops. What is moved was
//! meant to be: by `--fresh`, by `--recompute`, or as the consequence of an adapter that came out
//! differently. Nothing is ever deleted.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use chrono::NaiveDate;
use datafusion::arrow::temporal_conversions::timestamp_ms_to_datetime;
use serde_json::Value;

use super::dead_letters::Retry;
use super::error::RunError;
use super::names::{self, BEGUN, FLOW, LOCK, LOG, PLAN, SUMMARY, SUPERSEDED};
use super::table::{create_dir, sync_parent, write_atomically};
use crate::flow::record::FORMAT;
use crate::flow::{Change, Fate, PlanRecord, RoundPlan};

/// What is asked of a directory when it is opened.
pub struct Opening<'a> {
    pub rounds: &'a [RoundPlan],
    pub flow_name: &'a str,
    pub flow_text: &'a str,
    /// The date for chat templates.
    pub date: Option<NaiveDate>,
    pub fresh: bool,
    pub recompute: bool,
    /// Rows that were given up are asked for again.
    pub retry_dead: bool,
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
        match dir.found(opening)? {
            Found::Run(old) if !opening.recompute => dir.refuse_changed(&old.compare(opening.rounds))?,
            Found::Run(_) | Found::Work => {}
            Found::Nothing => dir.begin(opening)?,
        }
        dir.goes_on().map_err(at)?;
        if opening.retry_dead {
            let retry = Retry::of(path, opening.rounds).map_err(at)?;
            tracing::warn!("{retry}");
            retry.forget(path).map_err(at)?;
        }
        dir.write_plan(opening).map_err(at)?;
        dir.has_begun().map_err(at)?;
        Ok(dir)
    }

    pub(super) fn held(path: &Path, lock: File) -> Self {
        Self { path: path.into(), superseded: path.join(SUPERSEDED).join(now()), lock }
    }

    /// The work in the directory that the run continues.
    ///
    /// # Errors
    /// Work that nobody knows the plan of, or that is of another format.
    fn found(&self, opening: &Opening) -> Result<Found, RunError> {
        if opening.fresh || self.path.join(BEGUN).exists() {
            return Ok(Found::Nothing);
        }
        if !self.path.join(PLAN).exists() {
            return match holds_work(&self.path) {
                false => Ok(Found::Nothing),
                true if opening.recompute => Ok(Found::Work),
                true => Err(self.unread("it has none")),
            };
        }
        // One that says another format is readable, whatever else it says.
        let head = super::runs::head_of(&self.path);
        match super::runs::plan_of(&self.path) {
            Ok(old) => Ok(Found::Run(old)),
            Err(error) if head.is_ok_and(|head| head.format != FORMAT) => Err(error),
            Err(_) if opening.recompute => Ok(Found::Work),
            Err(error) => Err(self.unread(&error.message)),
        }
    }

    fn unread(&self, why: &str) -> RunError {
        RunError::user(format!(
            "{dir} holds work, and its {PLAN} can't be read ({why}), so nobody knows what of it is of this flow\n  help: \
             put the file back; or --recompute goes on with the rows that are of this flow, --fresh starts anew (both \
             keep the rest under {SUPERSEDED}/), --output DIR uses another directory",
            dir = self.path.display(),
        ))
    }

    /// Makes the directory, or makes it anew.
    fn begin(&self, opening: &Opening) -> Result<(), RunError> {
        let at = |e: io::Error| RunError::external(format!("run directory {}: {e}", self.path.display()));
        let asked = opening.fresh || self.path.join(BEGUN).exists();
        write_atomically(&self.path.join(BEGUN), b"this run directory is being made\n").map_err(at)?;
        if asked {
            self.supersede_all().map_err(at)?;
        }
        match opening.fork_of {
            Some(from) => self.fork(from, opening.rounds),
            None => Ok(()),
        }
    }

    /// Takes back that the run is done, durably, before anything is changed: a kill from here on leaves a run that is
    /// gone on with.
    fn goes_on(&self) -> io::Result<()> {
        let summary = self.path.join(SUMMARY);
        match fs::remove_file(&summary) {
            Ok(()) => sync_parent(&summary),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(e) => Err(e),
        }
    }

    fn write_plan(&self, opening: &Opening) -> io::Result<()> {
        write_atomically(&self.path.join(FLOW), opening.flow_text.as_bytes())?;
        let plan = PlanRecord::of(opening.rounds, opening.flow_name, opening.date);
        write_atomically(&self.path.join(PLAN), &serde_json::to_vec_pretty(&plan)?)
    }

    /// The directory is whole. On disk before any work is: what is done from here on must not be moved away.
    fn has_begun(&self) -> io::Result<()> {
        let begun = self.path.join(BEGUN);
        match fs::remove_file(&begun) {
            Ok(()) => sync_parent(&begun),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(e) => Err(e),
        }
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
        self.path.join(names::round(round)).join(stage)
    }

    /// Moves the record of a stage out of the way and leaves an empty directory in its place.
    pub fn supersede_stage(&self, round: u32, stage: &str) -> io::Result<()> {
        let from = self.stage(round, stage);
        let to = unused(self.superseded.join(names::round(round)).join(stage));
        move_to(&from, &to)?;
        tracing::warn!(round, stage, to = %to.display(), "inputs or settings changed; the stage's record is superseded");
        create_dir(&from)
    }

    fn supersede_all(&self) -> io::Result<()> {
        let target = unused(self.superseded.clone());
        for entry in fs::read_dir(&self.path)? {
            let entry = entry?;
            let name = entry.file_name();
            if name != LOCK && name != SUPERSEDED && name != BEGUN {
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
            let theirs = from.join(names::round(change.round)).join(&change.stage);
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

/// The content of a run directory.
enum Found {
    /// Nothing that is gone on with.
    Nothing,
    Run(PlanRecord),
    /// Work without a plan, which `--recompute` goes on with: journals know themselves what they are of.
    Work,
}

/// Returns whether a stage left anything.
fn holds_work(run: &Path) -> bool {
    let rounds = fs::read_dir(run).into_iter().flatten().flatten();
    let rounds = rounds.filter(|entry| names::is_round(&entry.file_name().to_string_lossy()));
    let stages = rounds.flat_map(|round| fs::read_dir(round.path()).into_iter().flatten().flatten());
    stages.into_iter().any(|stage| has_work(&stage.path()))
}

/// A directory with files that no run wrote is someone else's.
fn refuse_foreign(path: &Path) -> Result<(), RunError> {
    if [PLAN, BEGUN].iter().any(|name| path.join(name).exists()) || holds_work(path) {
        return Ok(());
    }
    let entries = fs::read_dir(path).map_err(|e| RunError::external(format!("{}: {e}", path.display())))?;
    for entry in entries.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if !names::is_own(&name) {
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

/// Returns whether a stage's directory holds anything that would be lost. A journal without a finished row does not.
fn has_work(stage: &Path) -> bool {
    let Ok(entries) = fs::read_dir(stage) else { return false };
    let journal = stage.join(names::JOURNAL);
    let is_work = |path: &Path| *path != *journal || super::journal::has_finished(path).unwrap_or(true);
    entries.flatten().any(|entry| is_work(&entry.path()))
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
            &Opening {
                rounds: &[],
                flow_name: "f",
                flow_text: "",
                date: None,
                fresh,
                recompute: false,
                retry_dead: false,
                fork_of: None,
            },
        )
    }

    fn message(path: &Path) -> String {
        open(path, false).err().unwrap().message
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
    fn nothing_moves_that_was_not_meant_to() {
        let dir = tempfile::tempdir().unwrap();
        let work = dir.path().join("round-1/a/journal");
        drop(open(dir.path(), false).unwrap());
        fs::create_dir_all(work.parent().unwrap()).unwrap();
        fs::write(&work, "rows").unwrap();
        drop(open(dir.path(), false).unwrap());
        for text in [Some("half of a pl"), Some("{}"), None] {
            match text {
                Some(text) => fs::write(dir.path().join(PLAN), text).unwrap(),
                None => fs::remove_file(dir.path().join(PLAN)).unwrap(),
            }
            let told = message(dir.path());
            assert!(told.contains("plan.json can't be read") && told.contains("--fresh"), "{told}");
            assert!(work.exists() && !dir.path().join(SUPERSEDED).exists());
        }
        drop(open(dir.path(), true).unwrap());
        assert!(!work.exists());
        assert_eq!(fs::read_dir(dir.path().join(SUPERSEDED)).unwrap().count(), 1);
    }

    /// All that a run writes, a sink's file, and a kill after each of the moves that `--fresh` makes.
    #[test]
    fn a_fresh_start_that_was_killed_is_begun_again() {
        let made = |moved: usize| {
            let dir = tempfile::tempdir().unwrap();
            drop(open(dir.path(), false).unwrap());
            for name in [names::SUMMARY, LOG, names::REPORT, names::TENSORBOARD, "pairs.jsonl", "round-1/a/journal"] {
                let file = dir.path().join(name);
                fs::create_dir_all(file.parent().unwrap()).unwrap();
                fs::write(file, "").unwrap();
            }
            fs::write(dir.path().join(BEGUN), "").unwrap();
            let mut entries: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
            entries.retain(|name| name != LOCK && name != BEGUN);
            entries.sort();
            let there = entries.len();
            for name in entries.iter().take(moved) {
                move_to(&dir.path().join(name), &dir.path().join(SUPERSEDED).join("then").join(name)).unwrap();
            }
            (dir, there)
        };
        let (_, there) = made(0);
        for moved in 0..=there {
            let (dir, _) = made(moved);
            drop(open(dir.path(), false).unwrap());
            let left = fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
            let mut left: Vec<String> = left.collect();
            left.sort();
            assert_eq!(left, [FLOW, LOCK, PLAN, SUPERSEDED], "killed after {moved} moves");
            drop(open(dir.path(), false).unwrap());
        }
    }

    #[test]
    fn a_directory_of_an_older_format_is_not_gone_on_with() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join(PLAN), r#"{"flow":"f","version":"0.1.0","rounds":{"1":{"a":"key"}}}"#).unwrap();
        let told = message(dir.path());
        assert!(told.contains("older format") && told.contains("flowrun report"), "{told}");
        assert_eq!(super::super::runs::info(dir.path()).unwrap().rounds, 1);
        drop(open(dir.path(), true).unwrap());
        drop(open(dir.path(), false).unwrap());
    }

    #[test]
    fn a_directory_of_something_else_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("thesis.tex"), "").unwrap();
        assert!(open(dir.path(), true).err().unwrap().message.contains("thesis.tex"));
    }
}
