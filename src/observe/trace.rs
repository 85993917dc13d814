//! Busy intervals of devices and stages, written as `trace.json` in Chrome's trace format.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Instant;

use serde_json::{Value, json};

use super::queues::Queue;

/// One interval. Times are microseconds since the run began.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Interval {
    /// A device (`cpu:0`) or a stage (`judge`).
    pub track: Arc<str>,
    /// `decode`, `prefill`, `score`, `train`, `optimizer`, `load`, ...
    pub name: Arc<str>,
    /// The stage that the work was for, where one is known.
    pub stage: Arc<str>,
    pub start_us: u64,
    pub end_us: u64,
    /// How much of it was work; less than its length where stretches were joined over gaps.
    pub busy_us: u64,
}

/// Seconds by device and what it did.
pub type DeviceSeconds = BTreeMap<(Arc<str>, Arc<str>), f64>;

/// Collects intervals from any thread. Neighbours of the same track, name and stage less than 2 ms apart are joined, and
/// when there are 65,536 all of them become coarser, so a trace of days takes as much room as one of an hour.
pub struct Trace {
    origin: Instant,
    intervals: Mutex<Intervals>,
}

/// Intervals that are kept at most.
const MOST: usize = 1 << 16;

#[derive(Default)]
struct Intervals {
    all: Vec<Interval>,
    /// The few words that there are, so that an interval holds no text of its own.
    words: Vec<Arc<str>>,
    /// Microseconds by track, stage and name, so that nobody who asks every second has to add them up.
    sums: BTreeMap<[Arc<str>; 3], u64>,
}

impl Intervals {
    fn add_up(&mut self, track: &str, stage: &str, name: &str, us: u64) {
        // Most often it is there; a key is made only where it isn't.
        let is = |key: &[Arc<str>; 3]| key[0].as_ref() == track && key[1].as_ref() == stage && key[2].as_ref() == name;
        match self.sums.iter_mut().find(|(key, _)| is(key)) {
            Some((_, sum)) => *sum += us,
            None => {
                let key = [track, stage, name].map(|text| self.word(text));
                self.sums.insert(key, us);
            }
        }
    }

    fn word(&mut self, text: &str) -> Arc<str> {
        if let Some(word) = self.words.iter().find(|word| word.as_ref() == text) {
            return word.clone();
        }
        let word: Arc<str> = text.into();
        self.words.push(word.clone());
        word
    }
}

impl Default for Trace {
    fn default() -> Self {
        Self { origin: Instant::now(), intervals: Mutex::default() }
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
        let busy_us = end_us.saturating_sub(start_us);
        let mut intervals = self.locked();
        intervals.add_up(track, stage, name, busy_us);
        let recent = intervals.all.iter_mut().rev().take(32);
        for last in recent {
            if last.track.as_ref() == track {
                if last.name.as_ref() == name
                    && last.stage.as_ref() == stage
                    && start_us.saturating_sub(last.end_us) < 2_000
                {
                    last.end_us = end_us;
                    last.busy_us += busy_us;
                    return;
                }
                break;
            }
        }
        let [track, name, stage] = [track, name, stage].map(|text| intervals.word(text));
        intervals.all.push(Interval { track, name, stage, start_us, end_us, busy_us });
        if intervals.all.len() >= MOST {
            intervals.all = coarse(&intervals.all, MOST / 2);
        }
    }

    /// The end of the last work for `stage`, on the clock of the intervals; 0 where there is none
    /// among the recent ones.
    pub fn last_of(&self, stage: &str) -> u64 {
        self.locked()
            .all
            .iter()
            .rev()
            .take(1024)
            .filter(|i| i.stage.as_ref() == stage)
            .map(|i| i.end_us)
            .max()
            .unwrap_or(0)
    }

    /// Now, on the clock of the intervals.
    pub fn now_us(&self) -> u64 {
        self.origin.elapsed().as_micros() as u64
    }

    pub fn intervals(&self) -> Vec<Interval> {
        self.locked().all.clone()
    }

    /// Seconds of work so far, by track and stage.
    pub fn seconds(&self) -> BTreeMap<(Arc<str>, Arc<str>), f64> {
        let mut seconds = BTreeMap::new();
        for ([track, stage, _], us) in &self.locked().sums {
            *seconds.entry((track.clone(), stage.clone())).or_default() += *us as f64 / 1e6;
        }
        seconds
    }

    /// Seconds that devices worked for a stage so far, by device and what they did.
    pub fn device_seconds(&self, stage: &str) -> DeviceSeconds {
        let locked = self.locked();
        // A stage's own track tells when it worked, with a device or without.
        let of = locked.sums.iter().filter(|([track, of, _], _)| of.as_ref() == stage && track.as_ref() != stage);
        of.map(|([track, _, name], us)| ((track.clone(), name.clone()), *us as f64 / 1e6)).collect()
    }

    fn locked(&self) -> MutexGuard<'_, Intervals> {
        self.intervals.lock().unwrap_or_else(|e| e.into_inner())
    }
}

/// The intervals as complete events (`"ph": "X"`) of Chrome's trace format, one thread a track, and the rows on edges as
/// counters (`"ph": "C"`). Load the file in `chrome://tracing` or <https://ui.perfetto.dev>.
pub fn chrome_json(intervals: &[Interval], queues: &[Queue]) -> Value {
    let mut tracks: Vec<&str> = intervals.iter().map(|i| i.track.as_ref()).collect();
    tracks.sort_unstable();
    tracks.dedup();
    let names = tracks
        .iter()
        .enumerate()
        .map(|(tid, track)| json!({"ph": "M", "name": "thread_name", "pid": 1, "tid": tid, "args": {"name": track}}));
    let events = intervals.iter().map(|i| {
        let tid = tracks.binary_search(&i.track.as_ref()).unwrap_or_default();
        let duration = i.end_us.saturating_sub(i.start_us);
        json!({"ph": "X", "name": i.name.as_ref(), "cat": i.stage.as_ref(), "pid": 1, "tid": tid, "ts": i.start_us, "dur": duration,
               "args": {"stage": i.stage.as_ref(), "track": i.track.as_ref(), "busy_us": i.busy_us}})
    });
    let counters = queues.iter().flat_map(|queue| {
        let args = |rows: &u64| match queue.capacity {
            Some(capacity) => json!({"rows": rows, "capacity": capacity}),
            None => json!({"rows": rows}),
        };
        let moments = queue.moments.iter();
        moments.map(move |(us, rows)| json!({"ph": "C", "name": queue.edge, "pid": 1, "ts": us, "args": args(rows)}))
    });
    json!({"displayTimeUnit": "ms", "traceEvents": names.chain(events).chain(counters).collect::<Vec<_>>()})
}

/// Reads what [`chrome_json`] made; events of other kinds are left out.
pub fn from_chrome_json(trace: &Value) -> (Vec<Interval>, Vec<Queue>) {
    let (mut intervals, mut queues) = (Vec::new(), BTreeMap::<String, Queue>::new());
    for event in trace["traceEvents"].as_array().into_iter().flatten() {
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let Some(start_us) = event["ts"].as_u64() else { continue };
        match event["ph"].as_str() {
            Some("X") => intervals.push(Interval {
                track: text(&event["args"]["track"]).into(),
                name: text(&event["name"]).into(),
                stage: text(&event["args"]["stage"]).into(),
                start_us,
                end_us: start_us.saturating_add(event["dur"].as_u64().unwrap_or(0)),
                busy_us: event["args"]["busy_us"].as_u64().or(event["dur"].as_u64()).unwrap_or(0),
            }),
            Some("C") => {
                let capacity = event["args"]["capacity"].as_u64();
                let edge = text(&event["name"]);
                let fresh = || Queue { edge: edge.clone(), capacity, moments: Vec::new() };
                let queue = queues.entry(edge.clone()).or_insert_with(fresh);
                queue.moments.push((start_us, event["args"]["rows"].as_u64().unwrap_or(0)));
            }
            _ => {}
        }
    }
    (intervals, queues.into_values().collect())
}

/// About `most` intervals that show the same: neighbours of one track, name and stage are joined over longer and longer
/// gaps, and where that is not enough the shortest are left out.
pub fn coarse(intervals: &[Interval], most: usize) -> Vec<Interval> {
    let end = intervals.iter().map(|i| i.end_us).max().unwrap_or(0);
    let mut gap = 2_000;
    let mut joined = intervals.to_vec();
    while joined.len() > most && gap < end / 100 {
        gap *= 2;
        joined = join(intervals, gap);
    }
    if joined.len() > most {
        joined.sort_by_key(|i| std::cmp::Reverse(i.end_us.saturating_sub(i.start_us)));
        joined.truncate(most);
        joined.sort_by_key(|i| i.start_us);
    }
    joined
}

fn join(intervals: &[Interval], gap: u64) -> Vec<Interval> {
    let mut joined: Vec<Interval> = Vec::new();
    let mut last: HashMap<(&str, &str, &str), usize> = HashMap::new();
    for interval in intervals {
        let key = (interval.track.as_ref(), interval.name.as_ref(), interval.stage.as_ref());
        let before = last.get(&key).and_then(|place| joined.get_mut(*place));
        match before {
            Some(before) if interval.start_us <= before.end_us.saturating_add(gap) => {
                before.end_us = before.end_us.max(interval.end_us);
                before.busy_us += interval.busy_us;
            }
            _ => {
                last.insert(key, joined.len());
                joined.push(interval.clone());
            }
        }
    }
    joined
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn interval(track: &str, start_us: u64, end_us: u64) -> Interval {
        Interval {
            track: track.into(),
            name: "work".into(),
            stage: "s".into(),
            start_us,
            end_us,
            busy_us: end_us - start_us,
        }
    }

    #[test]
    fn a_trace_of_days_takes_as_much_room_as_one_of_an_hour() {
        let trace = Trace::default();
        // Two tenants of one device in turns, too far apart to be joined.
        for step in 0..200_000_u64 {
            let at = |us: u64| trace.origin + Duration::from_micros(step * 10_000 + us);
            trace.record_span("cpu:0", "decode", ["sample", "judge"][step as usize % 2], at(0), at(6_000));
        }
        let intervals = trace.intervals();
        assert!((1..MOST).contains(&intervals.len()), "{}", intervals.len());
        assert_eq!(intervals.iter().map(|i| i.start_us).min(), Some(0));
        assert_eq!(intervals.last().map(|i| (i.start_us, i.end_us)), Some((1_999_990_000, 1_999_996_000)));
        // What was worked is known exactly, however coarse the picture is.
        assert_eq!(trace.device_seconds("judge")[&("cpu:0".into(), "decode".into())], 600.0);
        assert_eq!(intervals.iter().map(|i| i.busy_us).sum::<u64>(), 1_200_000_000);
    }

    #[test]
    fn chrome_events_name_their_track() {
        let json = chrome_json(&[interval("cpu:1", 3, 8), interval("cpu:0", 1, 2)], &[]);
        let events = json["traceEvents"].as_array().unwrap();
        assert_eq!(events[0]["args"]["name"], "cpu:0");
        assert_eq!((&events[2]["tid"], &events[2]["dur"]), (&serde_json::json!(1), &serde_json::json!(5)));
    }

    #[test]
    fn what_was_written_is_read_again() {
        let intervals = [interval("cpu:0", 1, 2), interval("cpu:1", 3, 8)];
        let queue = |edge: &str, capacity| Queue { edge: edge.into(), capacity, moments: vec![(5, 7), (9, 0)] };
        let queues = [queue("a->b", Some(8)), queue("b.train->c", None)];
        let (read, read_queues) = from_chrome_json(&chrome_json(&intervals, &queues));
        assert_eq!(format!("{read:?}"), format!("{intervals:?}"));
        assert_eq!(read_queues, queues);
    }

    #[test]
    fn a_long_trace_becomes_coarse_and_covers_the_same() {
        let many: Vec<Interval> = (0..10_000).map(|i| interval("a", i * 10_000, i * 10_000 + 7_000)).collect();
        assert_eq!(coarse(&many[..50], 100).len(), 50);
        let few = coarse(&many, 100);
        assert!((1..=100).contains(&few.len()));
        assert_eq!((few[0].start_us, few.last().unwrap().end_us), (0, 99_997_000));
        assert_eq!(few.iter().map(|i| i.busy_us).sum::<u64>(), 70_000_000);
        let apart: Vec<Interval> = (0..1000).map(|i| interval(&i.to_string(), i, i + 1)).collect();
        assert_eq!(coarse(&apart, 100).len(), 100);
    }
}
