//! A snapshot of a run: what the terminal shows, `GET /status` serves, `RUN/status.json` keeps and an embedding
//! program polls.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StageState {
    Pending,
    Running,
    Done,
    Failed,
    Cancelled,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct StageStatus {
    pub name: String,
    pub kind: String,
    pub state: StageState,
    pub rows_in: u64,
    pub rows_out: u64,
    /// Input rows whose result came from the journal.
    pub reused_rows: u64,
    pub dead_letters: u64,
    pub tokens_in: u64,
    pub tokens_out: u64,
    /// Rows on the stage's input edges.
    pub queue_rows: u64,
    /// Rows those edges hold at most; `None` where one of them never blocks its sender.
    pub queue_capacity_rows: Option<u64>,
    /// What the stage stands still for, where it does.
    pub waits_for: Option<String>,
    /// Since the stage began this round, up to its end.
    pub seconds: f64,
    /// Share of the round's work that is done, from 0 to 1: of source rows, for a trainer of its epochs. `None` where
    /// nobody knows how much there is.
    pub progress: Option<f64>,
    /// The part of it that was there when the stage began: from journals, or a checkpoint.
    pub progress_reused: f64,
    /// How long each device worked for the stage in this round.
    pub device_seconds: BTreeMap<String, f64>,
    /// The last evaluation and the last step that the stage wrote to `metrics.jsonl`.
    pub latest: Vec<Value>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct EdgeStatus {
    /// `STAGE` or `STAGE.PORT`.
    pub from: String,
    pub to: String,
    pub messages: u64,
    pub rows: u64,
    /// In memory.
    pub bytes: u64,
    /// On disk, where the edge must not block its sender.
    pub spilled_bytes: u64,
    /// `None` where the edge never blocks its sender.
    pub capacity_rows: Option<u64>,
    /// How long the sender has waited for room, in all.
    pub blocked_seconds: f64,
    pub rows_total: u64,
}

/// A round that is over.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RoundStatus {
    pub round: u32,
    pub seconds: f64,
    /// Some of it came from journals or a checkpoint, so the time says little of the next round.
    pub reused: bool,
    /// The last evaluation and the last step of each trainer.
    pub latest: Vec<Value>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct RunStatus {
    pub flow: String,
    /// From 1; 0 before the first round.
    pub round: u32,
    pub rounds: u32,
    pub seconds: f64,
    /// An estimate of the time until the end; `None` while there is nothing to make it of.
    pub remaining_seconds: Option<f64>,
    /// Rounds that this process has finished.
    pub finished: Vec<RoundStatus>,
    /// Of the round under way, in topological order.
    pub stages: Vec<StageStatus>,
    pub edges: Vec<EdgeStatus>,
    /// The run has ended.
    pub ended: bool,
}

impl RunStatus {
    /// What is left of the round under way, and the rounds after it at the pace of the last that was computed.
    ///
    /// A stage that has done a part of its work needs each device as long again for the rest, and stages that share a
    /// device take turns; one that needs no device takes as long as so far. All that goes on side by side, so the
    /// longest counts. A stage that has not begun counts as in the round before.
    pub fn remaining(&self) -> Option<f64> {
        if self.ended {
            return Some(0.0);
        }
        let past = self.finished.iter().rev().find(|round| !round.reused).map(|round| round.seconds);
        let here = self.stages.iter().map(|stage| stage.seconds).fold(0.0, f64::max);
        let begun = !self.stages.is_empty();
        let (mut rest, mut devices) = (0.0, BTreeMap::<&str, f64>::new());
        for stage in self.stages.iter().filter(|stage| stage.state != StageState::Done) {
            match stage.rest_per_done() {
                None => rest = f64::max(rest, past? - here),
                Some(times) if stage.device_seconds.is_empty() => rest = f64::max(rest, stage.seconds * times),
                Some(times) => {
                    for (device, seconds) in &stage.device_seconds {
                        *devices.entry(device).or_default() += seconds * times;
                    }
                }
            }
        }
        let rest = devices.into_values().fold(rest, f64::max);
        let rounds_after = f64::from(self.rounds.saturating_sub(self.round));
        begun.then_some(rest + rounds_after * past.unwrap_or(here + rest))
    }
}

impl StageStatus {
    /// How many times the work that was done in this run is still to be done in this round; `None` before there is any.
    fn rest_per_done(&self) -> Option<f64> {
        let progress = self.progress?;
        let computed = progress - self.progress_reused;
        (computed > 0.01).then(|| (1.0 - progress) / computed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stage(state: StageState, seconds: f64, progress: Option<f64>) -> StageStatus {
        StageStatus {
            name: "s".into(),
            kind: "sampler".into(),
            state,
            rows_in: 0,
            rows_out: 0,
            reused_rows: 0,
            dead_letters: 0,
            tokens_in: 0,
            tokens_out: 0,
            queue_rows: 0,
            queue_capacity_rows: None,
            waits_for: None,
            seconds,
            progress,
            progress_reused: 0.0,
            device_seconds: BTreeMap::new(),
            latest: Vec::new(),
        }
    }

    fn run(round: u32, stages: Vec<StageStatus>, finished: Vec<RoundStatus>) -> Option<f64> {
        let (seconds, edges) = (0.0, Vec::new());
        let flow = String::new();
        RunStatus { flow, round, rounds: 3, seconds, remaining_seconds: None, finished, stages, edges, ended: false }
            .remaining()
    }

    fn past(seconds: f64, reused: bool) -> Vec<RoundStatus> {
        vec![RoundStatus { round: 1, seconds, reused, latest: Vec::new() }]
    }

    #[test]
    fn the_slowest_stage_decides_and_rounds_to_come_take_as_long() {
        let stages = || {
            vec![
                stage(StageState::Done, 5.0, Some(1.0)),
                stage(StageState::Running, 20.0, Some(0.5)),
                stage(StageState::Running, 20.0, Some(0.8)),
            ]
        };
        // 20 s are left of a round of 40 s, and two rounds more.
        assert_eq!(run(1, stages(), Vec::new()), Some(20.0 + 2.0 * 40.0));
        assert_eq!(run(2, stages(), past(30.0, false)), Some(20.0 + 30.0));
        // A round that came from journals says nothing of the next.
        assert_eq!(run(2, stages(), past(0.1, true)), Some(20.0 + 40.0));
    }

    #[test]
    fn stages_on_one_device_take_turns() {
        let on = |device: &str, busy: f64, share: f64| StageStatus {
            device_seconds: BTreeMap::from([(device.to_owned(), busy)]),
            ..stage(StageState::Running, 100.0, Some(share))
        };
        // However long they waited for others: 6 s and 3 s of the first device, 8 s of the second.
        let stages = vec![on("cpu:0", 2.0, 0.25), on("cpu:0", 3.0, 0.5), on("cpu:1", 2.0, 0.2)];
        assert_eq!(run(3, stages, Vec::new()), Some(9.0));
    }

    #[test]
    fn a_stage_that_has_done_nothing_counts_as_in_the_round_before() {
        let stages = || vec![stage(StageState::Running, 10.0, Some(0.5)), stage(StageState::Running, 10.0, Some(0.0))];
        assert_eq!(run(1, stages(), Vec::new()), None);
        assert_eq!(run(2, stages(), past(50.0, false)), Some(40.0 + 50.0));
        assert_eq!(run(0, Vec::new(), Vec::new()), None);
    }

    #[test]
    fn what_was_reused_took_no_time() {
        let half_from_a_journal = StageStatus { progress_reused: 0.5, ..stage(StageState::Running, 10.0, Some(0.75)) };
        assert_eq!(run(3, vec![half_from_a_journal], Vec::new()), Some(10.0));
    }
}
