//! A run directory whose run is done, and which the same flow has nothing left to do in.
//!
//! To go through it again would give the same rows from the journals, and other figures: what was sampled and trained
//! would be told as reused. So such a run is done at once, with the figures that it had, and no file changes.

use std::fs;
use std::path::Path;

use serde_json::Value;

use super::ledger::Ending;
use super::run_dir::{PLAN, RunDir};
use super::table;
use crate::flow::{Fate, PlanRecord, PlannedStage, RoundPlan};

/// How the run in `dir` ended and its figures; none where something of `rounds` is still to be done: the plan is
/// another one, a row was given up, or a file that the run left is gone.
pub(super) fn finished(dir: &Path, rounds: &[RoundPlan]) -> Option<(Ending, Value)> {
    let plan: PlanRecord = serde_json::from_slice(&fs::read(dir.join(PLAN)).ok()?).ok()?;
    let figures: Value = serde_json::from_slice(&fs::read(dir.join("summary.json")).ok()?).ok()?;
    let ending = match figures["status"].as_str()? {
        "done" => Ending::Done,
        "stopped_by_gate" => Ending::StoppedByGate,
        _ => return None,
    };
    let same = plan.compare(rounds).iter().all(|change| change.fate == Fate::Same);
    let went = figures["rounds"].as_array()?.len();
    let whole =
        rounds.iter().take(went).all(|round| round.stages.iter().all(|stage| is_whole(dir, round.round, stage)));
    (same && whole && gave_up_nothing(dir)).then_some((ending, figures))
}

/// Whether all is there that the stage left of the round.
fn is_whole(dir: &Path, round: u32, stage: &PlannedStage) -> bool {
    let left = dir.join(format!("round-{round}")).join(&stage.spec.name);
    let trained = ["adapter", "model"].iter().any(|product| left.join(product).is_dir());
    let has_tables = stage.spec.table && !stage.inputs.is_empty();
    left.is_dir()
        && (stage.plan.trains.is_none() || trained)
        && (!has_tables || stage.plan.outputs.iter().all(|port| left.join(table::file_name(&port.name)).is_file()))
}

fn gave_up_nothing(dir: &Path) -> bool {
    let letters = table::read(&dir.join("dead_letters.parquet"));
    letters.is_ok_and(|batches| batches.iter().all(|batch| batch.num_rows() == 0))
}

impl RunDir {
    /// The directory of a run that is done, held and left as it is.
    ///
    /// # Errors
    /// Another run holds it.
    pub fn of_finished(path: &Path) -> Result<Self, super::RunError> {
        Ok(Self::held(path, Self::hold(path)?))
    }
}
