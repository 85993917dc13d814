//! Busy intervals of devices and stages, written as `trace.json` in Chrome's trace format.

use std::sync::Mutex;
use std::time::Instant;

use serde::Serialize;

/// One interval. Times are microseconds since the run began.
#[derive(Debug, Clone, Serialize)]
pub struct Interval {
    /// A device (`cpu:0`) or a stage (`judge`).
    pub track: String,
    /// `decode`, `prefill`, `score`, `train`, `optimizer`, `load`, ...
    pub name: String,
    /// The stage that the work was for, where one is known.
    pub stage: String,
    pub start_us: u64,
    pub end_us: u64,
}

/// Collects intervals from any thread. Neighbours of the same track, name and stage less than
/// 2 ms apart are joined, so that a trace of hours stays small.
pub struct Trace {
    origin: Instant,
    intervals: Mutex<Vec<Interval>>,
}

impl Default for Trace {
    fn default() -> Self {
        Self { origin: Instant::now(), intervals: Mutex::new(Vec::new()) }
    }
}

impl Trace {
    /// Records that `track` was busy with `name` from `start` until now.
    pub fn record(&self, track: &str, name: &str, stage: &str, start: Instant) {
        let start_us = start.saturating_duration_since(self.origin).as_micros() as u64;
        let end_us = self.origin.elapsed().as_micros() as u64;
        let mut intervals = self.intervals.lock().unwrap_or_else(|e| e.into_inner());
        let recent = intervals.iter_mut().rev().take(32);
        for last in recent {
            if last.track == track {
                if last.name == name && last.stage == stage && start_us.saturating_sub(last.end_us) < 2_000 {
                    last.end_us = end_us;
                    return;
                }
                break;
            }
        }
        intervals.push(Interval { track: track.into(), name: name.into(), stage: stage.into(), start_us, end_us });
    }

    pub fn intervals(&self) -> Vec<Interval> {
        self.intervals.lock().unwrap_or_else(|e| e.into_inner()).clone()
    }
}
