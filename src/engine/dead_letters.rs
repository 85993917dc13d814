//! Dead letters (rows that were given up) in the journal of their stage. They are not tried again until
//! `--retry-dead`.

use std::fmt;
use std::io;
use std::path::Path;

use super::journal::{self, Letter};
use super::{StageContext, StageError, names};
use crate::flow::{RoundPlan, plan};

impl StageContext {
    /// Writes the dead letter of a row to the journal under `key`; does nothing without a journal.
    pub(super) fn record_dead(&mut self, key: u64, letter: &Letter) -> Result<(), StageError> {
        let Some(journal) = &mut self.journal else { return Ok(()) };
        journal
            .append_dead(key, letter)
            .map_err(|e| StageError::external(format!("{}: {e}", self.dir.join(names::JOURNAL).display())))
    }

    /// Returns whether the journal has a dead letter under `key` for the same input, and if so reports it again.
    /// Returns false if it would exceed `max_dead_letters`: the row is then tried again, because the run would fail
    /// otherwise.
    pub(super) fn recall_dead(&mut self, key: u64, input_hash: u64) -> bool {
        let letter = self.journal.as_mut().and_then(|journal| journal.take_dead(key, input_hash));
        let Some(Letter { row, reason, input }) = letter else { return false };
        if !self.ledger.has_room_for_dead(self.round, row) {
            return false;
        }
        self.ledger.dead_letter(self.round, &self.stage, row, &reason, input);
        self.output.link.meter.dead_letter();
        self.output.link.meter.reused();
        true
    }
}

/// The rows that `--retry-dead` tries again, and the stages that depend on them.
pub(super) struct Retry {
    /// Round, stage and number of dead letters.
    asked: Vec<(u32, String, usize)>,
    /// Round and stage.
    follows: Vec<(u32, String)>,
}

impl Retry {
    /// Looks at the journals of the run directory `dir`.
    pub fn of(dir: &Path, rounds: &[RoundPlan]) -> io::Result<Self> {
        let mut asked = Vec::new();
        for (round, stage) in rounds.iter().flat_map(|r| r.stages.iter().map(|s| (r.round, &s.spec.name))) {
            let rows = journal::dead_rows(&journal_of(dir, round, stage))?;
            if rows > 0 {
                asked.push((round, stage.clone(), rows));
            }
        }
        let from: Vec<_> = asked.iter().map(|(round, stage, _)| (*round, stage.clone())).collect();
        Ok(Self { follows: plan::followers(rounds, &from), asked })
    }

    /// Removes the dead letters from the journals.
    pub fn forget(&self, dir: &Path) -> io::Result<()> {
        self.asked.iter().try_for_each(|(round, stage, _)| journal::forget_dead(&journal_of(dir, *round, stage)))
    }
}

fn journal_of(dir: &Path, round: u32, stage: &str) -> std::path::PathBuf {
    dir.join(names::round(round)).join(stage).join(names::JOURNAL)
}

impl fmt::Display for Retry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.asked.is_empty() {
            return f.write_str(
                "--retry-dead finds no row that was given up; what a source can't read is tried in every run",
            );
        }
        let asked: Vec<String> =
            self.asked.iter().map(|(round, stage, rows)| format!("{rows} of {stage} (round {round})")).collect();
        write!(f, "--retry-dead asks again for rows that were given up: {}", asked.join(", "))?;
        let follows: Vec<String> =
            self.follows.iter().map(|(round, stage)| format!("{stage} (round {round})")).collect();
        match follows.is_empty() {
            true => Ok(()),
            false => write!(f, "; where an answer comes, this is computed again with it: {}", follows.join(", ")),
        }
    }
}
