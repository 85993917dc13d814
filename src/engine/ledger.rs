//! What the stages of one run share, and what a run writes beside its tables: `metrics.jsonl`,
//! `dead_letters.parquet`, `summary.json` and `trace.json`.

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Instant, SystemTime};

use datafusion::arrow::array::{ArrayRef, StringArray, UInt32Array, UInt64Array};
use datafusion::arrow::record_batch::RecordBatch;
use serde::Serialize;
use serde_json::{Map, Value, json};
use tokio::sync::broadcast;
use tokio_util::sync::CancellationToken;

use super::StageError;
use super::adapters::AdapterBook;
use super::context::{Shard, StageContext};
use super::edge::EdgeMeter;
use super::error::RunError;
use super::locked;
use super::meter::StageMeter;
use super::names::{self, LOG, STATUS};
use super::pause::Pause;
use super::quota::{Quotas, Usage};
use super::report::{self, Books};
use super::run_dir::RunDir;
use super::samples::Tables;
use super::table::{self, write_atomically};
use crate::flow::Masks;
use crate::observe::queues::QueueHistory;
use crate::observe::text::printable;
use crate::observe::trace::chrome_json;
use crate::observe::{EdgeStatus, Metrics, RoundStatus, RunStatus, StageState, Trace, process, tensorboard};

/// What happened in a run, for whoever listens; a slow listener misses events, never delays them.
#[derive(Debug, Clone, Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum RunEvent {
    RoundStarted {
        round: u32,
    },
    StageEnded {
        round: u32,
        stage: String,
        state: StageState,
    },
    /// The stages of the round begin again from their journals.
    Restarted {
        round: u32,
        stage: String,
        reason: String,
    },
    /// The stage is busy and has given no sign of life for so long.
    Stalled {
        round: u32,
        stage: String,
        seconds: f64,
    },
    /// A line of `metrics.jsonl`: a step, an evaluation.
    Logged {
        round: u32,
        stage: String,
        kind: String,
        fields: Value,
    },
    /// The listener was slower than the run; so many events are lost to it.
    Missed {
        count: u64,
    },
    DeadLetter {
        round: u32,
        stage: String,
        row: u64,
        reason: String,
    },
    RoundEnded {
        round: u32,
    },
    Ended {
        status: Ending,
    },
}

/// Events that are kept for a listener that comes late or is slow.
const EVENTS: usize = 1024;

/// The events of a run, from the first that is still known to the last.
pub struct Events {
    told: VecDeque<RunEvent>,
    live: broadcast::Receiver<RunEvent>,
    ended: bool,
}

impl Events {
    /// The next event; none after [`RunEvent::Ended`].
    pub async fn next(&mut self) -> Option<RunEvent> {
        if self.ended {
            return None;
        }
        let event = match self.told.pop_front() {
            Some(event) => event,
            None => match self.live.recv().await {
                Ok(event) => event,
                Err(broadcast::error::RecvError::Lagged(count)) => RunEvent::Missed { count },
                Err(broadcast::error::RecvError::Closed) => return None,
            },
        };
        self.ended = matches!(event, RunEvent::Ended { .. });
        Some(event)
    }

    /// As a stream.
    pub fn stream(self) -> impl futures::Stream<Item = RunEvent> + Send {
        futures::stream::unfold(self, |mut events| async { Some((events.next().await?, events)) })
    }
}

/// How a run ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Ending {
    Done,
    Failed,
    /// Stopped on request; the same command goes on.
    Interrupted,
    /// A gate ended it after a round that was not good enough.
    StoppedByGate,
}

struct DeadLetter {
    row: u64,
    stage: String,
    round: u32,
    reason: String,
    input: String,
}

/// One attempt at one round.
#[derive(Clone, Default)]
pub(super) struct RoundView {
    pub stages: Vec<Arc<StageMeter>>,
    pub edges: Vec<EdgeMeter>,
    /// Stages without inputs: their rows are what the round began with.
    pub sources: Vec<String>,
    /// `train` and `judge`.
    extra: Map<String, Value>,
    /// Once all its stages have ended well.
    over: Option<RoundStatus>,
}

impl RoundView {
    fn finished(&self, round: u32) -> RoundStatus {
        let stages: Vec<_> = self.stages.iter().map(|m| m.status(None)).collect();
        RoundStatus {
            round,
            seconds: stages.iter().map(|stage| stage.seconds).fold(0.0, f64::max),
            reused: stages.iter().any(|stage| stage.reused_rows > 0 || stage.progress_reused > 0.0),
            latest: stages.into_iter().flat_map(|stage| stage.latest).collect(),
        }
    }
}

/// What stages and edges took, over rounds and attempts.
#[derive(Clone, Default)]
struct Seconds {
    /// Busy, and waiting.
    stages: BTreeMap<String, (f64, f64)>,
    edges: BTreeMap<String, f64>,
}

impl Seconds {
    fn add(&mut self, stages: &[Arc<StageMeter>], edges: &[EdgeMeter]) {
        for meter in stages {
            let (busy, waited) = meter.seconds();
            let sums = self.stages.entry(meter.name.clone()).or_default();
            *sums = (sums.0 + busy, sums.1 + waited);
        }
        for edge in edges.iter().map(EdgeMeter::status) {
            *self.edges.entry(format!("{}->{}", edge.from, edge.to)).or_default() += edge.blocked_seconds;
        }
    }
}

pub(super) struct Ledger {
    pub flow: String,
    pub rounds: u32,
    pub seed: u64,
    pub deterministic: bool,
    pub max_dead_letters: f64,
    pub dir: RunDir,
    pub metrics: Metrics,
    pub trace: Arc<Trace>,
    pub quotas: Quotas,
    pub masks: Arc<Masks>,
    pub cancel: CancellationToken,
    /// True while stages neither take nor send rows.
    pub pause: Arc<Pause>,
    pub adapters: AdapterBook,
    events: broadcast::Sender<RunEvent>,
    /// The last events, for listeners that come later.
    told: Mutex<VecDeque<RunEvent>>,
    began: Instant,
    log: Mutex<Log>,
    shards: Mutex<HashMap<String, BTreeMap<u32, Shard>>>,
    dead: Mutex<Vec<DeadLetter>>,
    views: Mutex<BTreeMap<u32, RoundView>>,
    /// Of attempts at rounds that failed.
    replaced: Mutex<Seconds>,
    /// Why the run ends after the round under way.
    stop: Mutex<Option<String>>,
    /// The quota that was exceeded first.
    overspent: Mutex<Option<RunError>>,
    queues: Mutex<QueueHistory>,
    reporter: Mutex<Reporter>,
    events_told: Mutex<EventsTold>,
}

/// How far the files of TensorBoard are.
#[derive(Default)]
struct EventsTold {
    /// Bytes of the log that are in them.
    read: u64,
    /// Those that this process began.
    files: HashSet<String>,
}

/// Who writes `report.html`.
#[derive(Default)]
struct Reporter {
    tables: Tables,
    /// The report says how the run ended; nothing is written after it.
    closed: bool,
}

/// What the caller decides about a run, as far as stages see it.
pub(super) struct Terms {
    pub flow: String,
    pub rounds: u32,
    pub seed: u64,
    pub deterministic: bool,
    pub max_dead_letters: f64,
    pub metrics: Metrics,
    pub trace: Arc<Trace>,
    pub quotas: Quotas,
    pub masks: Arc<Masks>,
}

/// `metrics.jsonl`, open at its end.
struct Log {
    file: File,
    /// Of the first line that could not be written.
    failed: Option<String>,
}

impl Log {
    /// A line that a stopped machine left half-written is cut off: the next one would be glued to it.
    fn open(path: &Path) -> io::Result<Self> {
        let file = OpenOptions::new().append(true).create(true).open(path)?;
        let bytes = std::fs::read(path)?;
        let whole = bytes.iter().rposition(|byte| *byte == b'\n').map_or(0, |end| end + 1);
        if whole < bytes.len() {
            file.set_len(whole as u64)?;
        }
        table::sync_parent(path)?;
        Ok(Self { file, failed: None })
    }

    /// A line that can't be written fails the next checkpoint that relies on it, and nothing before.
    fn write(&mut self, line: &[u8]) {
        if let Err(error) = self.file.write_all(line) {
            tracing::warn!(%error, "metrics.jsonl can't be written");
            self.failed.get_or_insert(error.to_string());
        }
    }
}

impl StageContext {
    /// The text without values of the environment, for a file that the stage writes.
    pub fn masked(&self, text: &str) -> String {
        self.ledger.masks.text(text)
    }

    /// Every text in the value as by [`Self::masked`].
    pub fn masked_json(&self, mut value: Value) -> Value {
        self.ledger.masks.json(&mut value);
        value
    }

    /// Waits until the events of this stage are on disk.
    pub async fn keep_events(&self) -> Result<(), StageError> {
        let ledger = self.ledger.clone();
        let synced = tokio::task::spawn_blocking(move || ledger.sync_log()).await;
        synced.unwrap_or_else(|e| Err(io::Error::other(e))).map_err(|e| {
            let path = self.ledger.dir.path().join(LOG);
            StageError::external(format!("{}: {e}", path.display()))
        })
    }
}

impl Ledger {
    pub fn open(dir: RunDir, terms: Terms) -> io::Result<Self> {
        let log = Log::open(&dir.path().join(LOG))?;
        let Terms { flow, rounds, seed, deterministic, max_dead_letters, metrics, trace, quotas, masks } = terms;
        Ok(Self {
            flow,
            rounds,
            seed,
            deterministic,
            max_dead_letters,
            dir,
            metrics,
            trace,
            quotas,
            masks,
            overspent: Mutex::default(),
            cancel: CancellationToken::new(),
            pause: Arc::default(),
            adapters: AdapterBook::default(),
            events: broadcast::channel(EVENTS).0,
            told: Mutex::default(),
            began: Instant::now(),
            log: Mutex::new(log),
            shards: Mutex::default(),
            dead: Mutex::default(),
            views: Mutex::default(),
            replaced: Mutex::default(),
            stop: Mutex::default(),
            queues: Mutex::default(),
            reporter: Mutex::default(),
            events_told: Mutex::default(),
        })
    }

    /// Since the run began, or went on.
    pub fn seconds(&self) -> f64 {
        self.began.elapsed().as_secs_f64()
    }

    pub fn tell(&self, event: RunEvent) {
        let mut told = locked(&self.told);
        if told.len() == EVENTS {
            told.pop_front();
        }
        told.push_back(event.clone());
        // Nobody listening is no error.
        let _ = self.events.send(event);
    }

    /// What was told and what will be.
    pub fn listen(&self) -> Events {
        // Under the lock, or an event could be in both or in neither.
        let told = locked(&self.told);
        Events { told: told.clone(), live: self.events.subscribe(), ended: false }
    }

    /// The round under way and its stages.
    pub fn stages(&self) -> Option<(u32, Vec<Arc<StageMeter>>)> {
        locked(&self.views).last_key_value().map(|(round, view)| (*round, view.stages.clone()))
    }

    /// Begins an attempt at a round; what an earlier attempt counted is forgotten.
    pub fn begin_round(&self, round: u32, view: RoundView) {
        locked(&self.dead).retain(|d| d.round != round);
        let mut views = locked(&self.views);
        if let Some(before) = views.insert(round, view) {
            // Its stages have ended; a counter must not fall when a round begins again.
            locked(&self.replaced).add(&before.stages, &before.edges);
        }
        drop(views);
        self.metrics.gauge("flowrun_run_round", &[]).set(f64::from(round));
        self.tell(RunEvent::RoundStarted { round });
    }

    /// All stages of the round have ended well.
    pub fn end_round(&self, round: u32) {
        if let Some(view) = locked(&self.views).get_mut(&round) {
            view.over = Some(view.finished(round));
        }
        self.tell(RunEvent::RoundEnded { round });
    }

    /// One line of `metrics.jsonl`.
    pub fn event(&self, round: u32, stage: &str, kind: &str, mut fields: Value) {
        self.masks.json(&mut fields);
        self.tell(RunEvent::Logged { round, stage: stage.into(), kind: kind.into(), fields: fields.clone() });
        let time = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs_f64();
        let mut line = json!({"time": time, "event": kind, "round": round, "stage": stage});
        match (&mut line, fields) {
            (Value::Object(line), Value::Object(fields)) => line.extend(fields),
            (_, Value::Null) => {}
            (line, value) => line["value"] = value,
        }
        if matches!(kind, "step" | "evaluation" | "gate") {
            let views = locked(&self.views);
            let meters = views.get(&round).into_iter().flat_map(|view| &view.stages);
            meters.filter(|meter| meter.name == stage).for_each(|meter| meter.told(kind, &line));
        }
        let mut text = line.to_string();
        text.push('\n');
        locked(&self.log).write(text.as_bytes());
    }

    /// Takes all but the first `lines` of this round's lines of `stage` that have a `step` out of `metrics.jsonl`: a
    /// training that goes on from a checkpoint makes those steps again.
    pub fn forget_after(&self, round: u32, stage: &str, lines: u64) -> io::Result<()> {
        let path = self.dir.path().join(LOG);
        let mut log = locked(&self.log);
        let bytes = std::fs::read(&path)?;
        let text = String::from_utf8_lossy(&bytes);
        let mut own = 0;
        let stays = |line: &&str| {
            let Ok(event) = serde_json::from_str::<Value>(line) else { return false };
            let counts = event["round"] == round && event["stage"] == stage && event["step"].is_u64();
            own += u64::from(counts);
            !counts || own <= lines
        };
        let kept: String = text.lines().filter(stays).flat_map(|line| [line, "\n"]).collect();
        if kept.len() < bytes.len() {
            write_atomically(&path, kept.as_bytes())?;
        }
        *log = Log::open(&path)?;
        // Their files hold steps that will be made again.
        *locked(&self.events_told) = EventsTold::default();
        Ok(())
    }

    /// Makes the lines of `metrics.jsonl` so far durable. Blocks.
    fn sync_log(&self) -> io::Result<()> {
        let log = locked(&self.log);
        let (file, failed) = (log.file.try_clone()?, log.failed.clone());
        // An fsync under the lock would hold up every stage that tells something.
        drop(log);
        failed.map_or(Ok(()), |error| Err(io::Error::other(error)))?;
        file.sync_data()
    }

    /// A part of the round's summary that is not one stage's own; objects are merged.
    pub fn round_summary(&self, round: u32, key: &str, value: Value) {
        let mut views = locked(&self.views);
        let extra = &mut views.entry(round).or_default().extra;
        match (extra.get_mut(key), value) {
            // The first stage to say a figure is the one that the round turns on.
            (Some(Value::Object(old)), Value::Object(new)) if key == "judge" => {
                for (name, value) in new {
                    old.entry(name).or_insert(value);
                }
            }
            (Some(Value::Object(old)), Value::Object(new)) => old.extend(new),
            (_, value) => drop(extra.insert(key.into(), value)),
        }
    }

    /// Ends the run after the round under way.
    pub fn stop_after_round(&self, reason: String) {
        locked(&self.stop).get_or_insert(reason);
    }

    /// Why the run ends after the round under way, where it does.
    pub fn stops(&self) -> Option<String> {
        locked(&self.stop).clone()
    }

    /// A message as others may see it: without values of the environment, and without control characters, which come
    /// with texts of models, data and servers.
    pub fn told(&self, message: &str) -> String {
        printable(&self.masks.text(message))
    }

    /// Why the run has used more than it may, where it has: once and for all.
    pub async fn overspent(self: &Arc<Self>) -> Option<RunError> {
        let known = locked(&self.overspent).clone();
        if known.is_some() || self.quotas == Quotas::default() {
            return known;
        }
        let ledger = self.clone();
        let usage = tokio::task::spawn_blocking(move || ledger.usage()).await.unwrap_or_default();
        let mut overspent = locked(&self.overspent);
        if overspent.is_none() {
            *overspent = self.quotas.exceeded(&usage);
        }
        overspent.clone()
    }

    /// The resources that the run has used; bytes are not counted where nobody limits them.
    fn usage(&self) -> Usage {
        let views = locked(&self.views);
        let meters: Vec<_> = views.values().flat_map(|view| view.stages.iter().cloned()).collect();
        drop(views);
        Usage {
            rows: meters.iter().map(|meter| meter.rows_out()).sum(),
            tokens: meters.iter().map(|meter| meter.tokens()).sum(),
            bytes: self.quotas.bytes.map_or(0, |_| super::runs::bytes_below(self.dir.path())),
            seconds: self.seconds() as u64,
        }
    }

    pub fn set_shard(&self, source: &str, round: u32, shard: Shard) {
        locked(&self.shards).entry(source.into()).or_default().insert(round, shard);
    }

    /// The shard of a source in this round, or in the last one it ran in.
    pub fn shard(&self, source: &str, round: u32) -> Option<Shard> {
        let shards = locked(&self.shards);
        shards.get(source)?.range(..=round).next_back().map(|(_, shard)| *shard)
    }

    pub fn dead_letter(&self, round: u32, stage: &str, row: u64, reason: &str, input: String) {
        let (reason, input) = (self.told(reason), self.masks.text(&input));
        let letter = DeadLetter { row, stage: stage.into(), round, reason: reason.clone(), input };
        locked(&self.dead).push(letter);
        self.tell(RunEvent::DeadLetter { round, stage: stage.into(), row, reason });
    }

    /// Returns whether one dead letter more, that of `row`, is as many as the round may have, as far as that is known.
    pub fn has_room_for_dead(&self, round: u32, row: u64) -> bool {
        let mut rows: HashSet<u64> = locked(&self.dead).iter().filter(|d| d.round == round).map(|d| d.row).collect();
        rows.insert(row);
        self.source_rows(round, false).is_none_or(|seen| rows.len() as f64 <= self.max_dead_letters * seen as f64)
    }

    /// Why the round has too many dead letters, where it has: their share of the source rows seen.
    /// While the round runs, rows that are still to come count as seen where their number is known,
    /// and nothing is decided where it isn't.
    pub fn too_many_dead(&self, round: u32, round_is_over: bool) -> Option<String> {
        let dead = locked(&self.dead);
        let rows: HashSet<u64> = dead.iter().filter(|d| d.round == round).map(|d| d.row).collect();
        if rows.is_empty() {
            return None;
        }
        let seen = self.source_rows(round, round_is_over)?;
        if rows.len() as f64 <= self.max_dead_letters * seen as f64 {
            return None;
        }
        let mut reasons: HashMap<&str, usize> = HashMap::new();
        dead.iter().filter(|d| d.round == round).for_each(|d| *reasons.entry(&d.reason).or_default() += 1);
        let (reason, times) = reasons.into_iter().max_by_key(|(reason, times)| (*times, std::cmp::Reverse(*reason)))?;
        Some(format!(
            "{} of {seen} source rows became dead letters in round {round}, more than max_dead_letters = {} allows; \
             the commonest reason ({times}): {reason}\n  help: dead_letters.parquet holds each \
             row with its reason; a higher max_dead_letters goes on without them, and --retry-dead asks for all of \
             them again once the reason is put right",
            rows.len(),
            self.max_dead_letters
        ))
    }

    fn source_rows(&self, round: u32, round_is_over: bool) -> Option<u64> {
        let views = locked(&self.views);
        let view = views.get(&round)?;
        let sent = |name: &str| view.stages.iter().find(|m| m.name == name).map_or(0, |m| m.rows_out());
        let mut rows = view.sources.iter().map(|source| {
            // A row of a source may be sent as several, or not be sent because it is a dead letter.
            match self.shard(source, round).and_then(|shard| shard.rows()) {
                Some(rows) => Some(rows),
                None if round_is_over => Some(sent(source)),
                None => self.shard(source, round).map(|_| u64::MAX),
            }
        });
        rows.try_fold(0_u64, |sum, rows| Some(sum.saturating_add(rows?)))
    }

    pub fn status(&self, ended: bool) -> RunStatus {
        let views = locked(&self.views);
        let finished = views.values().filter_map(|view| view.over.clone()).collect();
        let last = views.last_key_value().map(|(round, view)| (*round, view.stages.clone(), view.edges.clone()));
        drop(views);
        let (round, meters, edges) = last.unwrap_or_default();
        let edges: Vec<_> = edges.iter().map(EdgeMeter::status).collect();
        let rows_of = |source: &str| self.shard(source, round).and_then(|shard| shard.rows());
        let mut stages: Vec<_> = meters.iter().map(|m| m.status(rows_of(&m.source))).collect();
        for stage in &mut stages {
            let incoming = || edges.iter().filter(|e| e.to == stage.name);
            stage.queue_rows = incoming().map(|e| e.rows).sum();
            stage.queue_share = incoming().filter_map(EdgeStatus::share).reduce(f64::max);
        }
        let (flow, rounds, seconds) = (self.flow.clone(), self.rounds, self.seconds());
        let mut status =
            RunStatus { flow, round, rounds, seconds, remaining_seconds: None, finished, stages, edges, ended };
        status.remaining_seconds = status.remaining();
        status
    }

    /// Brings the counters of seconds up to now.
    pub fn count_seconds(&self) {
        let views = locked(&self.views);
        let rounds: Vec<_> = views.values().map(|view| (view.stages.clone(), view.edges.clone())).collect();
        let mut seconds = locked(&self.replaced).clone();
        drop(views);
        rounds.iter().for_each(|(stages, edges)| seconds.add(stages, edges));
        for (stage, (busy, waited)) in &seconds.stages {
            let labels = [("stage", stage.as_str())];
            self.metrics.gauge("flowrun_stage_busy_seconds_total", &labels).set(*busy);
            self.metrics.gauge("flowrun_stage_wait_seconds_total", &labels).set(*waited);
        }
        for (edge, blocked) in &seconds.edges {
            self.metrics.gauge("flowrun_edge_blocked_seconds_total", &[("edge", edge)]).set(*blocked);
        }
    }

    /// `summary.json` as it stands; `status` is `running` between rounds.
    pub fn summary(&self, status: &str, error: Option<String>) -> Value {
        let dead: Vec<u32> = locked(&self.dead).iter().map(|letter| letter.round).collect();
        let views = locked(&self.views);
        let rounds: Vec<Value> = views
            .iter()
            .map(|(round, view)| {
                let stages: Map<String, Value> = view.stages.iter().map(|m| (m.name.clone(), m.summary())).collect();
                let dead = dead.iter().filter(|of| *of == round).count();
                let mut part = Map::from_iter([
                    ("round".into(), json!(round)),
                    ("stages".into(), stages.into()),
                    ("dead_letters".into(), json!(dead)),
                ]);
                part.extend(view.extra.clone());
                part.into()
            })
            .collect();
        let mut summary = json!({
            "status": status,
            "flow": self.flow,
            "version": env!("CARGO_PKG_VERSION"),
            "rounds": rounds,
            "seconds_wall": self.seconds(),
            "peak_rss_bytes": process::memory("VmHWM:"),
        });
        if let Some(error) = error {
            summary["error"] = error.into();
        }
        self.masks.json(&mut summary["rounds"]);
        summary
    }

    /// Writes everything that stands beside the tables. Blocks.
    pub fn write(&self, summary: &Value) -> io::Result<()> {
        let path = self.dir.path();
        self.write_dead_letters()?;
        let trace = chrome_json(&self.trace.intervals(), &locked(&self.queues).queues());
        write_atomically(&path.join(names::TRACE), &serde_json::to_vec(&trace)?)?;
        self.sync_log()?;
        self.keep_tensorboard();
        if let Err(error) = self.write_report(summary) {
            tracing::warn!(%error, "report.html can't be written");
        }
        // Last: where it says that the run is done, nothing of it is still to be written.
        write_atomically(&path.join(names::SUMMARY), &serde_json::to_vec_pretty(summary)?)
    }

    /// Notes how many rows are on the edges now, for the trace and the report.
    pub fn look_at_queues(&self) {
        let view = locked(&self.views).last_key_value().map(|(_, view)| view.edges.clone());
        let edges: Vec<_> = view.unwrap_or_default().iter().map(EdgeMeter::status).collect();
        locked(&self.queues).look(self.trace.now_us(), &edges);
    }

    /// Writes `status.json` as things stand while the run goes on. Blocks.
    pub fn write_interim_status(&self) -> io::Result<()> {
        let reporter = locked(&self.reporter);
        if reporter.closed { Ok(()) } else { self.write_status(&self.status(false)) }
    }

    /// Not synced: it is for whoever looks now.
    fn write_status(&self, status: &RunStatus) -> io::Result<()> {
        let path = self.dir.path().join(STATUS);
        let tmp = path.with_extension("json.tmp");
        std::fs::write(&tmp, serde_json::to_vec(status)?)?;
        std::fs::rename(tmp, path)
    }

    /// Writes `report.html`, and the files of TensorBoard, as things stand while the run goes on. Blocks.
    pub fn write_interim_report(&self) -> io::Result<()> {
        self.write_dead_letters()?;
        self.keep_tensorboard();
        self.write_report(&self.summary("running", None))
    }

    fn write_report(&self, summary: &Value) -> io::Result<()> {
        let mut reporter = locked(&self.reporter);
        if reporter.closed {
            return Ok(());
        }
        reporter.closed = summary["status"] != "running";
        if reporter.closed {
            self.write_status(&self.status(true))?;
        }
        let (intervals, queues) = (self.trace.intervals(), locked(&self.queues).queues());
        let books = Books { summary, rounds_planned: self.rounds, intervals: &intervals, queues: &queues };
        report::write(self.dir.path(), &books, &mut reporter.tables)
    }

    /// Brings the files of TensorBoard up to date; nothing else waits for them.
    fn keep_tensorboard(&self) {
        let mut events = locked(&self.events_told);
        if let Err(error) = self.write_tensorboard(&mut events) {
            tracing::warn!(%error, "the files for TensorBoard can't be written");
            // One may hold half of what was to be added.
            *events = EventsTold::default();
        }
    }

    /// Adds what was logged since the last call; begins the files anew at first, and where lines were taken back.
    fn write_tensorboard(&self, events: &mut EventsTold) -> io::Result<()> {
        let mut log = File::open(self.dir.path().join(LOG))?;
        log.seek(SeekFrom::Start(events.read))?;
        let mut text = Vec::new();
        log.read_to_end(&mut text)?;
        text.truncate(text.iter().rposition(|byte| *byte == b'\n').map_or(0, |end| end + 1));
        let lines = text.split(|byte| *byte == b'\n').filter_map(|line| serde_json::from_slice(line).ok());
        let new = tensorboard::records(lines);
        for (name, records) in new {
            let file = self.dir.path().join(names::TENSORBOARD).join(&name);
            if let Some(folder) = file.parent() {
                std::fs::create_dir_all(folder)?;
            }
            let begun = events.files.contains(&name);
            let mut file = OpenOptions::new().create(true).append(begun).write(true).truncate(!begun).open(&file)?;
            if !begun {
                file.write_all(&records.head())?;
            }
            file.write_all(&records.bytes)?;
            events.files.insert(name);
        }
        events.read += text.len() as u64;
        Ok(())
    }

    fn write_dead_letters(&self) -> io::Result<()> {
        let dead = locked(&self.dead);
        let text = |field: fn(&DeadLetter) -> &str| -> ArrayRef {
            Arc::new(dead.iter().map(|d| Some(field(d))).collect::<StringArray>())
        };
        let columns: [(&str, ArrayRef); 5] = [
            ("_row", Arc::new(dead.iter().map(|d| d.row).collect::<UInt64Array>())),
            ("stage", text(|d| &d.stage)),
            ("round", Arc::new(dead.iter().map(|d| d.round).collect::<UInt32Array>())),
            ("reason", text(|d| &d.reason)),
            ("input", text(|d| &d.input)),
        ];
        let batch = RecordBatch::try_from_iter(columns).map_err(io::Error::other)?;
        table::write_sorted(&self.dir.path().join(names::DEAD_LETTERS), &[batch])
    }
}
