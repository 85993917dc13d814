//! Detects a finished run directory in which the flow has nothing left to do.
//!
//! Running it again would give the same rows from the journals, but other figures, because all rows would count as
//! reused. So such a run ends at once with its old figures, and no file changes.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use datafusion::arrow::array::AsArray;
use datafusion::arrow::datatypes::UInt32Type;
use serde_json::Value;

use super::ledger::Ending;
use super::names::{self, BEGUN, DEAD_LETTERS, JOURNAL, SUMMARY};
use super::run_dir::RunDir;
use super::{journal, runs, table, written};
use crate::flow::{Fate, KindLookup, PlannedStage, RoundPlan};

/// Returns how the run in `dir` ended, and its figures. Returns `None` if something is left to do: the plan differs,
/// a dead letter is not in a journal, the directory is being set up, or a file of the run is missing.
pub(super) fn finished(dir: &Path, rounds: &[RoundPlan], kinds: &dyn KindLookup) -> Option<(Ending, Value)> {
    if dir.join(BEGUN).exists() {
        return None;
    }
    let plan = runs::plan_of(dir).ok()?;
    let figures: Value = serde_json::from_slice(&fs::read(dir.join(SUMMARY)).ok()?).ok()?;
    let ending = match figures["status"].as_str()? {
        "done" => Ending::Done,
        "stopped_by_gate" => Ending::StoppedByGate,
        _ => return None,
    };
    let same = plan.compare(rounds).iter().all(|change| change.fate == Fate::Same);
    let went = figures["rounds"].as_array()?.len();
    if !same || !asks_nothing_again(dir).unwrap_or_default() {
        return None;
    }
    let stages = rounds.iter().take(went).flat_map(|round| round.stages.iter().map(|stage| (round.round, stage)));
    if let Some(gone) = stages.filter_map(|(round, stage)| gone(dir, round, stage, kinds)).next() {
        tracing::warn!("{} is gone; what is missing of the finished run is made again", gone.display());
        return None;
    }
    Some((ending, figures))
}

/// Returns a file or directory that the stage wrote in the round and that is missing now.
fn gone(dir: &Path, round: u32, stage: &PlannedStage, kinds: &dyn KindLookup) -> Option<PathBuf> {
    let left = dir.join(names::round(round)).join(&stage.spec.name);
    let has_tables = stage.spec.table && !stage.inputs.is_empty();
    let tables = stage.plan.outputs.iter().map(|port| left.join(table::file_name(&port.name)));
    let written = written::files(kinds, dir, round, &stage.spec).into_iter().map(|(_, path)| path);
    let products = ["adapter", "model"].map(|product| left.join(product));
    let untrained = stage.plan.trains.is_some() && !products.iter().any(|product| product.is_dir());
    let files = tables.filter(|_| has_tables).chain(written).find(|file| !file.is_file());
    (!left.is_dir()).then(|| left.clone()).or(files).or_else(|| untrained.then(|| products[0].clone()))
}

/// Returns whether every dead letter is in the journal of its stage, so that no row is tried again.
fn asks_nothing_again(dir: &Path) -> io::Result<bool> {
    let mut letters: BTreeMap<(u32, String), usize> = BTreeMap::new();
    for batch in table::read(&dir.join(DEAD_LETTERS))? {
        let column = |name| batch.column_by_name(name).ok_or(io::ErrorKind::InvalidData);
        let (rounds, stages) = (column("round")?, column("stage")?);
        let rounds = rounds.as_primitive_opt::<UInt32Type>().ok_or(io::ErrorKind::InvalidData)?;
        let stages = stages.as_string_opt::<i32>().ok_or(io::ErrorKind::InvalidData)?;
        for (round, stage) in rounds.iter().zip(stages) {
            *letters.entry((round.unwrap_or_default(), stage.unwrap_or_default().to_owned())).or_default() += 1;
        }
    }
    for ((round, stage), told) in letters {
        let journal = dir.join(names::round(round)).join(stage).join(JOURNAL);
        if journal::dead_rows(&journal)? < told {
            return Ok(false);
        }
    }
    Ok(true)
}

impl RunDir {
    /// Locks the directory of a finished run and changes nothing in it.
    ///
    /// # Errors
    /// Another process holds the directory.
    pub fn of_finished(path: &Path) -> Result<Self, super::RunError> {
        Ok(Self::held(path, Self::hold(path)?))
    }
}
