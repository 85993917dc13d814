//! Busy intervals of devices and stages, written as `trace.json` in Chrome's trace format.

use std::sync::Mutex;
use std::time::Instant;

use serde::Serialize;
use serde_json::json;

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
        self.record_span(track, name, stage, start, Instant::now());
    }

    /// Records that `track` was busy with `name` from `start` to `end`.
    pub fn record_span(&self, track: &str, name: &str, stage: &str, start: Instant, end: Instant) {
        let start_us = start.saturating_duration_since(self.origin).as_micros() as u64;
        let end_us = end.saturating_duration_since(self.origin).as_micros() as u64;
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

    /// The end of the last work for `stage`, on the clock of the intervals; 0 where there is none
    /// among the recent ones.
    pub fn last_of(&self, stage: &str) -> u64 {
        let intervals = self.intervals.lock().unwrap_or_else(|e| e.into_inner());
        intervals.iter().rev().take(1024).filter(|i| i.stage == stage).map(|i| i.end_us).max().unwrap_or(0)
    }

    /// Now, on the clock of the intervals.
    pub fn now_us(&self) -> u64 {
        self.origin.elapsed().as_micros() as u64
    }

    pub fn intervals(&self) -> Vec<Interval> {
        self.intervals.lock().unwrap_or_else(|e| e.into_inner()).clone()
    }
}

/// The intervals as complete events (`"ph": "X"`) of Chrome's trace format, one thread a track.
/// Load the file in `chrome://tracing` or <https://ui.perfetto.dev>.
pub fn chrome_json(intervals: &[Interval]) -> serde_json::Value {
    let mut tracks: Vec<&str> = intervals.iter().map(|i| i.track.as_str()).collect();
    tracks.sort_unstable();
    tracks.dedup();
    let names = tracks
        .iter()
        .enumerate()
        .map(|(tid, track)| json!({"ph": "M", "name": "thread_name", "pid": 1, "tid": tid, "args": {"name": track}}));
    let events = intervals.iter().map(|i| {
        let tid = tracks.binary_search(&i.track.as_str()).unwrap_or_default();
        let duration = i.end_us.saturating_sub(i.start_us);
        json!({"ph": "X", "name": i.name, "cat": i.stage, "pid": 1, "tid": tid, "ts": i.start_us, "dur": duration,
               "args": {"stage": i.stage, "track": i.track}})
    });
    json!({"displayTimeUnit": "ms", "traceEvents": names.chain(events).collect::<Vec<_>>()})
}

/// Microseconds covered by at least one of the intervals.
pub fn covered_us<'a>(intervals: impl Iterator<Item = &'a Interval>) -> u64 {
    let mut spans: Vec<(u64, u64)> = intervals.map(|i| (i.start_us, i.end_us)).collect();
    spans.sort_unstable();
    let (mut total, mut reached) = (0, 0);
    for (start, end) in spans {
        total += end.saturating_sub(start.max(reached));
        reached = reached.max(end);
    }
    total
}

#[cfg(test)]
mod tests {
    use super::*;

    fn interval(track: &str, start_us: u64, end_us: u64) -> Interval {
        Interval { track: track.into(), name: "work".into(), stage: "s".into(), start_us, end_us }
    }

    #[test]
    fn overlapping_intervals_count_once() {
        let spans = [interval("a", 0, 10), interval("b", 5, 15), interval("a", 20, 30), interval("b", 22, 25)];
        assert_eq!(covered_us(spans.iter()), 25);
    }

    #[test]
    fn chrome_events_name_their_track() {
        let json = chrome_json(&[interval("cpu:1", 3, 8), interval("cpu:0", 1, 2)]);
        let events = json["traceEvents"].as_array().unwrap();
        assert_eq!(events[0]["args"]["name"], "cpu:0");
        assert_eq!((&events[2]["tid"], &events[2]["dur"]), (&serde_json::json!(1), &serde_json::json!(5)));
    }
}
