//! The files that stages write where the flow says, outside their own directories.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::{RunError, names};
use crate::data::files::resolved;
use crate::flow::kind::Access;
use crate::flow::{KindLookup, RoundPlan, StageSpec};

/// What stands for the number of the round in a path.
pub const ROUND: &str = "{round}";

/// The place of a written path in a round. A relative path starts at the run directory.
pub fn placed(path: &str, run: &Path, round: u32) -> PathBuf {
    run.join(path.replace(ROUND, &round.to_string()))
}

/// The files that a stage writes in a round, with the keys that name them.
pub(super) fn files(kinds: &dyn KindLookup, run: &Path, round: u32, stage: &StageSpec) -> Vec<(&'static str, PathBuf)> {
    let opened = kinds.kind(&stage.kind).map(|kind| kind.opens(stage)).unwrap_or_default();
    let written = |(key, access)| match access {
        Access::Write(path) => Some((key, placed(&path, run, round))),
        _ => None,
    };
    opened.into_iter().filter_map(written).collect()
}

/// Refuses a file that is the run's own, and one that is written twice, also where links lead to it.
///
/// # Errors
/// The stage, its key and the file (domain `User`).
pub(super) fn refuse_clashes(kinds: &dyn KindLookup, run: &Path, rounds: &[RoundPlan]) -> Result<(), RunError> {
    let home = resolved(run);
    let mut writers: BTreeMap<PathBuf, &str> = BTreeMap::new();
    for (round, stage) in rounds.iter().flat_map(|round| round.stages.iter().map(|stage| (round.round, &stage.spec))) {
        for (key, path) in files(kinds, run, round, stage) {
            let refused = |why: String| {
                let help = "give the file or its folder another name";
                RunError::user(format!("stages.{}.{key}: {why}\n  help: {help}", stage.name))
            };
            // A link to what is not there: the stage says what is wrong with it.
            let Some(path) = resolved(&path) else { continue };
            let own = home.as_ref().and_then(|home| names::own_of(path.strip_prefix(home).ok()?));
            if let Some(name) = own {
                return Err(refused(format!(
                    "{} is `{name}` of the run directory, which is the run's own",
                    path.display()
                )));
            }
            if let Some(other) = writers.insert(path.clone(), &stage.name) {
                return Err(refused(format!("{} is written by `{other}` too", path.display())));
            }
        }
    }
    Ok(())
}
