//! The files that stages write where the flow says, outside their own directories.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::names;
use crate::data::files::{glob, resolved};
use crate::flow::kind::Access;
use crate::flow::{FlowError, KindLookup, RoundPlan, StageSpec};

/// The placeholder for the number of the round in a path.
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

/// Refuses a file that is the run's own, that is written twice or that a stage reads, also where links lead to it.
/// `base` is the flow file's folder.
///
/// # Errors
/// The stage, its key and the file.
pub fn refuse_clashes(kinds: &dyn KindLookup, run: &Path, base: &Path, rounds: &[RoundPlan]) -> Result<(), FlowError> {
    let home = resolved(run);
    let stages: Vec<(u32, &StageSpec)> =
        rounds.iter().flat_map(|round| round.stages.iter().map(|stage| (round.round, &stage.spec))).collect();
    let mut writers: BTreeMap<PathBuf, &str> = BTreeMap::new();
    for (round, stage) in &stages {
        for (key, path) in files(kinds, run, *round, stage) {
            // A link to what is not there: the stage says what is wrong with it.
            let Some(path) = resolved(&path) else { continue };
            let own = home.as_ref().and_then(|home| names::own_of(path.strip_prefix(home).ok()?));
            let clash = |other: &Path| path.starts_with(other) || other.starts_with(&path);
            let why = if let Some(name) = own {
                format!("{} is `{name}` of the run directory, which is the run's own", path.display())
            } else if let Some((other, writer)) = writers.iter().find(|(other, _)| clash(other)) {
                match *other == path {
                    true => format!("{} is written by `{writer}` too", path.display()),
                    false => {
                        format!("{} can't lie beside {}, which `{writer}` writes", path.display(), other.display())
                    }
                }
            } else if let Some(reader) = stages.iter().find(|(_, stage)| reads(kinds, base, stage, &path)) {
                format!("{} is read by `{}`", path.display(), reader.1.name)
            } else {
                writers.insert(path, &stage.name);
                continue;
            };
            let help = "give the file or its folder another name";
            return Err(FlowError::new(format!("stages.{}.{key}", stage.name), why).help(help));
        }
    }
    Ok(())
}

/// Returns whether a stage reads the file, which is there: by its name, by a pattern, or as a file of a folder.
fn reads(kinds: &dyn KindLookup, base: &Path, stage: &StageSpec, file: &Path) -> bool {
    let opened = kinds.kind(&stage.kind).map(|kind| kind.opens(stage)).unwrap_or_default();
    let is_it = |written: &str| {
        let mut found = glob(written, base).unwrap_or_default();
        found.push(base.join(written));
        found
            .iter()
            .filter_map(|path| resolved(path))
            .any(|path| path == file || (path.is_dir() && file.starts_with(path)))
    };
    file.is_file() && opened.iter().any(|(_, access)| matches!(access, Access::Read(written) if is_it(written)))
}
