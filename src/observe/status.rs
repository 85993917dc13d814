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

impl EdgeStatus {
    /// How full the edge is, by rows or by bytes; `None` where it never blocks its sender.
    pub fn share(&self) -> Option<f64> {
        let of = |used: u64, room: u64| used as f64 / room.max(1) as f64;
        let share = of(self.rows, self.capacity_rows?).max(of(self.bytes, self.capacity_bytes?));
        Some(share.min(1.0))
    }
}

impl StageState {
    /// As in JSON.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Running => "running",
            Self::Done => "done",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
        }
    }
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
    /// How full the fullest of those edges is, by rows or by bytes, from 0 to 1; `None` where none of them ever blocks
    /// its sender.
    pub queue_share: Option<f64>,
    /// What the stage stands still for, where it does.
    pub waits_for: Option<String>,
    /// Since the stage began this round, up to its end.
    pub seconds: f64,
    /// Share of the round's work that is done, from 0 to 1: of source rows, for a trainer of its epochs. `None` where
    /// nobody knows how much there is.
    pub progress: Option<f64>,
    /// The part of it that was there when the stage began: from journals, or a checkpoint.
    pub progress_reused: f64,
    /// How long each device, or where the stage needs none the stage itself, still has to work in this round, at the
    /// pace so far; `None` before there is one.
    pub rest_seconds: Option<BTreeMap<String, f64>>,
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
    pub capacity_bytes: Option<u64>,
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
    /// Stages that share a device take turns, and all else goes on side by side, so the track with the most to do counts.
    /// The first rows say little, so where a round before tells how long one takes, this one's pace counts by the part of
    /// it that is done, and alone once it takes longer.
    pub fn remaining(&self) -> Option<f64> {
        if self.ended {
            return Some(0.0);
        }
        let here = self.stages.iter().map(|stage| stage.seconds).fold(0.0, f64::max);
        let past = self.finished.iter().rev().find(|round| !round.reused).map(|round| round.seconds);
        let as_before = past.map(|past| past - here).filter(|left| *left > 0.0);
        let rest = match (as_before, self.rest_of_round()) {
            (Some(as_before), Some((done, rest))) => {
                let weight = f64::max(done, here / (here + as_before));
                weight * rest + (1.0 - weight) * as_before
            }
            (Some(as_before), None) => as_before,
            (None, Some((_, rest))) => rest,
            (None, None) => return None,
        };
        let rounds_after = f64::from(self.rounds.saturating_sub(self.round));
        if rounds_after == 0.0 {
            return Some(rest);
        }
        // What came from journals or a checkpoint took no time in this round, and will in the next.
        let reused = self.stages.iter().map(|stage| stage.progress_reused).fold(0.0, f64::max);
        let whole = past.or_else(|| (reused < 0.95).then(|| (here + rest) / (1.0 - reused)))?;
        Some(rest + rounds_after * whole)
    }

    /// The share of the round that is done, by the stage that has done least, and the seconds that are left at the pace
    /// so far; `None` before every stage has one.
    fn rest_of_round(&self) -> Option<(f64, f64)> {
        let (mut done, mut tracks) = (1.0, BTreeMap::<&str, f64>::new());
        for stage in self.stages.iter().filter(|stage| stage.state != StageState::Done) {
            done = f64::min(done, stage.progress?);
            for (track, seconds) in stage.rest_seconds.as_ref()? {
                *tracks.entry(track).or_default() += seconds;
            }
        }
        (!self.stages.is_empty()).then(|| (done, tracks.into_values().fold(0.0, f64::max)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stage(state: StageState, seconds: f64, rest: &[(&str, f64)]) -> StageStatus {
        let rest: BTreeMap<_, _> = rest.iter().map(|(track, seconds)| ((*track).to_owned(), *seconds)).collect();
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
            queue_share: None,
            waits_for: None,
            seconds,
            progress: (!rest.is_empty()).then_some(0.5),
            progress_reused: 0.0,
            rest_seconds: (!rest.is_empty()).then_some(rest),
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
    fn the_track_with_most_to_do_decides_and_rounds_to_come_take_as_long() {
        use StageState::{Done, Running};
        // Two stages take turns on one device.
        let stages = || {
            vec![
                stage(Done, 5.0, &[("cpu:0", 90.0)]),
                stage(Running, 20.0, &[("cpu:0", 12.0)]),
                stage(Running, 20.0, &[("cpu:0", 8.0), ("cpu:1", 1.0)]),
                stage(Running, 20.0, &[("mapper", 5.0)]),
            ]
        };
        // 20 s are left of a round of 40 s, and two rounds more.
        assert_eq!(run(1, stages(), Vec::new()), Some(20.0 + 2.0 * 40.0));
        // By the round before there would be 10, and two thirds of its time are over.
        let both = run(2, stages(), past(30.0, false)).unwrap();
        assert!((both - (20.0 * 2.0 / 3.0 + 10.0 / 3.0 + 30.0)).abs() < 1e-9, "{both}");
        // A round that takes longer than the one before is on its own.
        assert_eq!(run(2, stages(), past(15.0, false)), Some(20.0 + 15.0));
        // A round that came from journals says nothing of the next.
        assert_eq!(run(2, stages(), past(0.1, true)), Some(20.0 + 40.0));
    }

    #[test]
    fn rounds_to_come_take_as_long_as_one_of_which_nothing_was_reused() {
        let resumed = StageStatus { progress_reused: 0.9, ..stage(StageState::Running, 2.0, &[("cpu:0", 4.0)]) };
        let left = run(1, vec![resumed.clone()], Vec::new()).unwrap();
        assert!((left - (4.0 + 2.0 * 60.0)).abs() < 1e-6, "{left}");
        let all = StageStatus { progress_reused: 0.99, ..resumed };
        assert_eq!((run(1, vec![all.clone()], Vec::new()), run(3, vec![all], Vec::new())), (None, Some(4.0)));
    }

    #[test]
    fn before_a_stage_has_done_something_the_round_before_tells() {
        let stages =
            || vec![stage(StageState::Running, 10.0, &[("cpu:0", 9.0)]), stage(StageState::Running, 10.0, &[])];
        assert_eq!(run(1, stages(), Vec::new()), None);
        assert_eq!(run(2, stages(), past(50.0, false)), Some(40.0 + 50.0));
        assert_eq!(run(3, stages(), past(5.0, false)), None, "longer than before, and nobody knows how much");
        assert_eq!(run(0, Vec::new(), Vec::new()), None);
    }

    #[test]
    fn an_edge_is_as_full_as_its_fuller_measure() {
        let edge = |rows, bytes, capacity: Option<u64>| EdgeStatus {
            from: "a".into(),
            to: "b".into(),
            messages: 1,
            rows,
            bytes,
            spilled_bytes: 0,
            capacity_rows: capacity,
            capacity_bytes: capacity.map(|rows| rows * 10),
            blocked_seconds: 0.0,
            rows_total: rows,
        };
        assert_eq!(edge(50, 900, Some(100)).share(), Some(0.9));
        assert_eq!(edge(50, 0, Some(100)).share(), Some(0.5));
        assert_eq!(edge(50, 900, None).share(), None);
    }
}
