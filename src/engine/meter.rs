//! What one stage did in one round: counted while it runs, read by the progress view, the metrics
//! and `summary.json`.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use metrics::{Counter, Gauge};
use serde_json::{Map, Value, json};

use super::{Domain, locked};
use crate::flow::PlannedStage;
use crate::observe::trace::DeviceSeconds;
use crate::observe::{Metrics, StageState, StageStatus, Trace};

struct Clock {
    state: StageState,
    began: Option<Instant>,
    ended: Option<Instant>,
    waiting: Duration,
    /// What devices worked for it, once it has ended.
    device_seconds: Option<DeviceSeconds>,
    /// Waits under way; a stage may wait for several things at once.
    waits: usize,
    /// When the last wait began or ended.
    turned: Instant,
    /// When the stretch of work under way began; shorter waits than [`BREAK`] don't end it.
    works_since: Instant,
    /// What the stage stands still for; of several things, the last.
    waits_for: Option<Arc<str>>,
}

/// A stage whose rows come one by one waits after each of them; only a wait of some length is a gap
/// in its track of the trace.
const BREAK: Duration = Duration::from_millis(2);

pub struct StageMeter {
    pub name: String,
    pub kind: String,
    /// The source that its rows descend from, or itself.
    pub source: String,
    /// Its work is that of devices, which the trace counts.
    on_devices: bool,
    rows_in: AtomicU64,
    rows_out: AtomicU64,
    reused: AtomicU64,
    dead: AtomicU64,
    tokens_in: AtomicU64,
    tokens_out: AtomicU64,
    clock: Mutex<Clock>,
    /// The stage's own keys in `summary.json`.
    extra: Mutex<Map<String, Value>>,
    /// Source rows that are finished.
    completed: AtomicU64,
    /// Share of the work that was done at first and is done now, for a stage whose rows don't tell.
    shares: Mutex<Option<(f64, f64)>>,
    /// The last step and the last evaluation that it told.
    latest: Mutex<BTreeMap<String, Value>>,
    /// Rows that the stage works on while it waits for more.
    in_flight: AtomicU64,
    /// Signs of life so far; counted, because a clock costs more than what it would time.
    beats: AtomicU64,
    trace: Arc<Trace>,
    /// What devices had worked for it before.
    device_seconds_before: DeviceSeconds,
    counters: Counters,
}

struct Counters {
    rows_in: Counter,
    rows_out: Counter,
    reused: Counter,
    dead: Counter,
    running: Gauge,
}

impl StageMeter {
    pub fn new(stage: &PlannedStage, metrics: &Metrics, trace: &Arc<Trace>) -> Self {
        let (name, kind) = (stage.spec.name.as_str(), stage.spec.kind.as_str());
        let labels = [("stage", name)];
        // A series that begins with its first event hides that event from whoever asks for an increase.
        metrics.gauge("flowrun_stage_stalled", &labels).set(0.0);
        metrics.counter("flowrun_stage_restarts_total", &labels).increment(0);
        for domain in Domain::FAILURES {
            let labels = [("stage", name), ("domain", domain.as_str())];
            metrics.counter("flowrun_stage_errors_total", &labels).increment(0);
        }
        Self {
            name: name.into(),
            kind: kind.into(),
            source: stage.source.clone(),
            on_devices: stage.plan.models.iter().any(|model| !model.devices.is_empty()),
            rows_in: AtomicU64::new(0),
            rows_out: AtomicU64::new(0),
            reused: AtomicU64::new(0),
            dead: AtomicU64::new(0),
            tokens_in: AtomicU64::new(0),
            tokens_out: AtomicU64::new(0),
            clock: Mutex::new(Clock {
                state: StageState::Pending,
                began: None,
                ended: None,
                waiting: Duration::ZERO,
                device_seconds: None,
                waits: 0,
                turned: Instant::now(),
                works_since: Instant::now(),
                waits_for: None,
            }),
            extra: Mutex::default(),
            completed: AtomicU64::new(0),
            shares: Mutex::default(),
            latest: Mutex::default(),
            in_flight: AtomicU64::new(0),
            beats: AtomicU64::new(0),
            trace: trace.clone(),
            device_seconds_before: trace.device_seconds(name),
            counters: Counters {
                rows_in: metrics.counter("flowrun_stage_rows_in_total", &labels),
                rows_out: metrics.counter("flowrun_stage_rows_out_total", &labels),
                reused: metrics.counter("flowrun_stage_reused_rows_total", &labels),
                dead: metrics.counter("flowrun_dead_letters_total", &labels),
                running: metrics.gauge("flowrun_stage_running", &labels),
            },
        }
    }

    fn clock(&self) -> MutexGuard<'_, Clock> {
        locked(&self.clock)
    }

    /// A sign of life.
    pub fn beat(&self) {
        self.beats.fetch_add(1, Relaxed);
    }

    /// How many rows the stage works on, however it waits for others meanwhile.
    pub fn works_on(&self, rows: usize) {
        self.in_flight.store(rows as u64, Relaxed);
    }

    /// A number that changes with every sign of life of a busy stage; none where it isn't busy. Work
    /// of a device for it is one, down to a single decode step.
    pub fn pulse(&self) -> Option<u64> {
        let clock = self.clock();
        let busy = clock.state == StageState::Running && (clock.waits == 0 || self.in_flight.load(Relaxed) > 0);
        drop(clock);
        busy.then(|| self.beats.load(Relaxed).wrapping_add(self.trace.last_of(&self.name)))
    }

    pub fn received(&self, rows: usize) {
        self.beat();
        self.rows_in.fetch_add(rows as u64, Relaxed);
        self.counters.rows_in.increment(rows as u64);
    }

    pub fn sent(&self, rows: usize) {
        self.beat();
        self.rows_out.fetch_add(rows as u64, Relaxed);
        self.counters.rows_out.increment(rows as u64);
    }

    pub fn reused(&self) {
        self.reused.fetch_add(1, Relaxed);
        self.counters.reused.increment(1);
    }

    pub fn completed(&self, rows: usize) {
        self.completed.fetch_add(rows as u64, Relaxed);
    }

    /// All rows that will come are finished, however many of them were left out on the way.
    pub fn completed_all(&self) {
        self.completed.store(u64::MAX / 2, Relaxed);
    }

    /// Share of the work that is done; what the first call says was there already.
    pub fn set_share(&self, share: f64) {
        let mut shares = locked(&self.shares);
        let first = shares.map_or(share, |(first, _)| first);
        *shares = Some((first, share));
    }

    /// Share of the work that was done at first, and that is done now; `rows` is how many source rows there are.
    fn shares(&self, rows: Option<u64>) -> Option<(f64, f64)> {
        locked(&self.shares).or_else(|| self.counted_shares(rows))
    }

    /// The same by the rows alone.
    fn counted_shares(&self, rows: Option<u64>) -> Option<(f64, f64)> {
        let of = |count: u64| Some((count as f64 / rows.filter(|rows| *rows > 0)? as f64).min(1.0));
        Some((of(self.reused.load(Relaxed))?, of(self.completed.load(Relaxed))?))
    }

    /// What the stage told of a step or an evaluation.
    pub fn told(&self, event: &str, line: &Value) {
        locked(&self.latest).insert(event.into(), line.clone());
    }

    pub fn dead_letter(&self) {
        self.dead.fetch_add(1, Relaxed);
        self.counters.dead.increment(1);
    }

    pub fn add_tokens(&self, tokens_in: u64, tokens_out: u64) {
        self.beat();
        self.tokens_in.fetch_add(tokens_in, Relaxed);
        self.tokens_out.fetch_add(tokens_out, Relaxed);
    }

    pub fn rows_out(&self) -> u64 {
        self.rows_out.load(Relaxed)
    }

    /// Read and written by models.
    pub fn tokens(&self) -> u64 {
        self.tokens_in.load(Relaxed) + self.tokens_out.load(Relaxed)
    }

    pub fn set(&self, key: &str, value: Value) {
        locked(&self.extra).insert(key.into(), value);
    }

    pub fn begin(&self) {
        self.beat();
        let mut clock = self.clock();
        clock.state = StageState::Running;
        clock.turned = Instant::now();
        clock.works_since = clock.turned;
        clock.began = Some(clock.turned);
        self.counters.running.set(1.0);
    }

    pub fn end(&self, state: StageState) {
        let mut clock = self.clock();
        self.worked(&clock, if clock.waits == 0 { Instant::now() } else { clock.turned });
        clock.state = state;
        clock.ended = Some(Instant::now());
        clock.device_seconds = Some(self.device_seconds_now());
        clock.waits_for = None;
        drop(clock);
        self.counters.running.set(0.0);
    }

    /// Puts what the stage did on its span.
    pub fn tell_span(&self, span: &tracing::Span) {
        span.record("rows_in", self.rows_in.load(Relaxed)).record("rows_out", self.rows_out.load(Relaxed));
        span.record("state", self.clock().state.as_str());
    }

    /// Notes that the stage stands still until the guard is dropped.
    pub fn wait_for(&self, what: Arc<str>) -> Wait<'_> {
        let mut clock = self.clock();
        clock.waits_for = Some(what);
        if clock.waits == 0 {
            clock.turned = Instant::now();
        }
        clock.waits += 1;
        Wait { meter: self }
    }

    /// The stage's own track in the trace: what it did between two waits.
    fn worked(&self, clock: &Clock, until: Instant) {
        self.trace.record_span(&self.name, "work", &self.name, clock.works_since, until);
    }

    fn wall(&self) -> Duration {
        let clock = self.clock();
        let end = clock.ended.unwrap_or_else(Instant::now);
        clock.began.map_or(Duration::ZERO, |b| end.saturating_duration_since(b))
    }

    fn device_seconds_now(&self) -> DeviceSeconds {
        let mut device_seconds = self.trace.device_seconds(&self.name);
        for (key, before) in &self.device_seconds_before {
            device_seconds.entry(key.clone()).and_modify(|seconds| *seconds -= before);
        }
        device_seconds.retain(|_, seconds| *seconds > 0.0);
        device_seconds
    }

    /// How long each device worked for the stage in its round, and at what.
    fn device_seconds(&self) -> DeviceSeconds {
        let ended = self.clock().device_seconds.clone();
        ended.unwrap_or_else(|| self.device_seconds_now())
    }

    /// What is left for each device, or where the stage needs none for the stage itself, at the pace so far: work that
    /// is done says how long the rest takes. `None` before there is any.
    fn rest_seconds(&self, rows: Option<u64>) -> Option<BTreeMap<String, f64>> {
        let rest_per_done = |(first, now): (f64, f64)| (now - first > 0.01).then(|| (1.0 - now) / (now - first));
        let own = rest_per_done(self.shares(rows)?)?;
        // A trainer scores the reference of each row once, and trains on it later and more often.
        let once = self.counted_shares(rows).and_then(rest_per_done).unwrap_or(own);
        let mut rest = BTreeMap::<String, f64>::new();
        for ((device, name), seconds) in self.device_seconds() {
            let times = match name.as_ref() {
                "load" => 0.0,
                "score" => once,
                _ => own,
            };
            *rest.entry(device.to_string()).or_default() += seconds * times;
        }
        if rest.is_empty() {
            rest.insert(self.name.clone(), self.wall().as_secs_f64() * own);
        }
        Some(rest)
    }

    /// Seconds that the stage was busy and that it waited for others, so far: the time of a device for it, of several
    /// that of the busiest, or where it needs none the time between its waits.
    pub fn seconds(&self) -> (f64, f64) {
        let mut devices = BTreeMap::<Arc<str>, f64>::new();
        for ((device, _), seconds) in self.device_seconds() {
            *devices.entry(device).or_default() += seconds;
        }
        let device = devices.into_values().fold(0.0, f64::max);
        let clock = self.clock();
        let now = clock.ended.unwrap_or_else(Instant::now);
        let wall = clock.began.map_or(Duration::ZERO, |began| now.saturating_duration_since(began));
        let waits = if clock.waits > 0 { now.saturating_duration_since(clock.turned) } else { Duration::ZERO };
        let waited = clock.waiting + waits;
        (if self.on_devices { device } else { wall.saturating_sub(waited).as_secs_f64() }, waited.as_secs_f64())
    }

    /// This stage's part of `summary.json`.
    pub fn summary(&self) -> Value {
        let mut part = json!({
            "kind": self.kind,
            "rows_in": self.rows_in.load(Relaxed),
            "rows_out": self.rows_out.load(Relaxed),
            "reused_rows": self.reused.load(Relaxed),
            "seconds_busy": self.seconds().0,
            "seconds_wall": self.wall().as_secs_f64(),
            "tokens_in": self.tokens_in.load(Relaxed),
            "tokens_out": self.tokens_out.load(Relaxed),
        });
        if let Value::Object(part) = &mut part {
            part.extend(locked(&self.extra).clone());
        }
        part
    }

    /// `rows` is how many source rows there are, where that is known.
    pub fn status(&self, rows: Option<u64>) -> StageStatus {
        let shares = self.shares(rows);
        let rest_seconds = self.rest_seconds(rows);
        let seconds = self.wall().as_secs_f64();
        let clock = self.clock();
        StageStatus {
            name: self.name.clone(),
            kind: self.kind.clone(),
            state: clock.state,
            rows_in: self.rows_in.load(Relaxed),
            rows_out: self.rows_out.load(Relaxed),
            reused_rows: self.reused.load(Relaxed),
            dead_letters: self.dead.load(Relaxed),
            tokens_in: self.tokens_in.load(Relaxed),
            tokens_out: self.tokens_out.load(Relaxed),
            queue_rows: 0,
            queue_share: None,
            waits_for: clock.waits_for.as_deref().map(str::to_owned),
            seconds,
            progress: if clock.state == StageState::Done { Some(1.0) } else { shares.map(|(_, now)| now) },
            progress_reused: shares.map_or(0.0, |(first, _)| first),
            rest_seconds,
            latest: locked(&self.latest).values().cloned().collect(),
        }
    }
}

/// A stage stands still while this lives.
pub struct Wait<'a> {
    meter: &'a StageMeter,
}

impl Drop for Wait<'_> {
    fn drop(&mut self) {
        let mut clock = self.meter.clock();
        clock.waits -= 1;
        if clock.waits == 0 {
            self.meter.beat();
            clock.waits_for = None;
            let (from, waited) = (clock.turned, clock.turned.elapsed());
            clock.waiting += waited;
            clock.turned += waited;
            if waited >= BREAK {
                self.meter.worked(&clock, from);
                clock.works_since = clock.turned;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flow::{AdapterChoice, ModelUse, StagePlan, StageSpec};

    fn trainer() -> PlannedStage {
        let (inputs, parts) = Default::default();
        let spec = StageSpec {
            name: "align".into(),
            kind: "trainer".into(),
            inputs: Vec::new(),
            in_rounds: None,
            table: true,
            options: toml::Table::new(),
        };
        let model =
            ModelUse { model: "m".into(), devices: vec!["cpu:1".into()], adapter: AdapterChoice::Base, chat: true };
        let plan = StagePlan {
            outputs: Vec::new(),
            waits_for_round: false,
            new_rows: false,
            models: vec![model],
            trains: None,
            fingerprint: crate::flow::Form::Unset,
            notes: Vec::new(),
            options: Arc::new(()),
        };
        PlannedStage { spec, inputs, plan, source: "prompts".into(), key: String::new(), parts }
    }

    #[test]
    fn what_was_done_says_how_long_the_rest_takes() {
        let trace = Arc::new(Trace::default());
        let work = |name: &str, from: u64, seconds: u64| {
            let at = |s: u64| Instant::now() + Duration::from_secs(s);
            trace.record_span("cpu:1", name, "align", at(from), at(from + seconds));
        };
        // Of an earlier round.
        work("train", 0, 100);
        let meter = StageMeter::new(&trainer(), &Metrics::default(), &trace);
        meter.begin();
        assert_eq!(meter.rest_seconds(Some(40)), None, "nothing is done");
        work("load", 100, 5);
        work("score", 105, 10);
        work("train", 115, 20);
        meter.completed(20);
        meter.set_share(0.0);
        meter.set_share(0.25);
        // Half of the rows have a reference, a quarter of the training is done; it is loaded once.
        let rest = meter.rest_seconds(Some(40)).unwrap();
        assert!((rest["cpu:1"] - (10.0 + 3.0 * 20.0)).abs() < 0.01, "{rest:?}");
        assert_eq!(meter.status(Some(40)).progress, Some(0.25));
        meter.completed_all();
        let rest = meter.rest_seconds(Some(40)).unwrap();
        assert!((rest["cpu:1"] - 60.0).abs() < 0.01, "no reference is to come: {rest:?}");
        assert!((meter.seconds().0 - 35.0).abs() < 0.01);
        meter.end(StageState::Done);
        work("train", 135, 50);
        assert!((meter.seconds().0 - 35.0).abs() < 0.01, "a later round's work is not this one's");
    }
}
