//! A run: one execution of a plan in a run directory.

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use chrono::NaiveDate;
use ractor::Actor;
use tokio::sync::{OwnedSemaphorePermit, watch};

use super::StageRegistry;
use super::context::AdapterRef;
use super::error::RunError;
use super::finished::finished;
use super::ledger::{Ending, Events, Ledger, RunEvent, Terms};
use super::quota::Quotas;
use super::run_dir::{Opening, RunDir};
use super::supervisor::{RunActor, RunArgs, SPAN};
use crate::flow::{Masks, RoundPlan};
use crate::observe::{Metrics, RunStatus, Trace, process};

/// The process, its devices and its disk.
const PROCESS_EVERY: Duration = Duration::from_secs(1);

const LOOK_EVERY: Duration = Duration::from_secs(1);
const QUOTAS_EVERY: Duration = Duration::from_millis(100);
/// The first report of a run that goes on, and those after it.
const FIRST_REPORT: Duration = Duration::from_secs(2);
const REPORT_EVERY: Duration = Duration::from_secs(15);
/// Writing reports may take one part in so many of the time.
const REPORT_SHARE: u32 = 400;

/// Everything a run needs to know.
pub struct RunConfig {
    /// Of the plan.
    pub rounds: Vec<RoundPlan>,
    pub flow_name: String,
    /// The resolved flow, secrets masked; becomes `RUN/flow.toml`.
    pub flow_text: String,
    pub dir: PathBuf,
    /// The date for chat templates that ask for it.
    pub date: Option<NaiveDate>,
    /// Moves what the directory holds to `RUN/superseded` and starts anew.
    pub fresh: bool,
    /// Goes on where plan keys changed; what is computed again supersedes what was.
    pub recompute: bool,
    /// Asks again for rows that were given up.
    pub retry_dead: bool,
    /// A run whose work a new directory begins with, as far as it is of the same plan. A directory
    /// that holds a run already is gone on with.
    pub fork_of: Option<PathBuf>,
    pub registry: StageRegistry,
    pub metrics: Metrics,
    /// Shared with the device threads.
    pub trace: Arc<Trace>,
    pub seed: u64,
    pub deterministic: bool,
    pub max_dead_letters: f64,
    /// How long a stage may be busy without a sign of life before it is reported.
    pub stall_after: Duration,
    /// By trainer: the adapter that its clients see in round 1.
    pub init_adapters: BTreeMap<String, AdapterRef>,
    /// Limits of the run.
    pub quotas: Quotas,
    /// Kept until the run has ended: its place among the runs that may go on at one time.
    pub seat: Option<OwnedSemaphorePermit>,
    /// Values that no file, event or message of the run shows.
    pub masks: Arc<Masks>,
    /// Rows come from the program or go to it: a run that is done is gone through again.
    pub open_ended: bool,
}

/// How a run went.
#[derive(Debug, Clone)]
pub struct Summary {
    pub status: Ending,
    /// The first error, where the run failed.
    pub error: Option<RunError>,
    pub dir: PathBuf,
    /// What `summary.json` holds.
    pub json: serde_json::Value,
}

/// A run that has its directory and its lock, and has not begun.
///
/// ```no_run
/// # async fn example(config: flowrun::engine::RunConfig) -> Result<(), flowrun::engine::RunError> {
/// let run = flowrun::engine::Run::new(config)?.start();
/// let summary = run.wait().await;
/// println!("{}", summary.json);
/// # Ok(()) }
/// ```
pub struct Run {
    rounds: Vec<RoundPlan>,
    registry: StageRegistry,
    ledger: Arc<Ledger>,
    stall_after: Duration,
    seat: Option<OwnedSemaphorePermit>,
    /// How the run in the directory ended, and its figures, where nothing is left to do.
    finished: Option<(Ending, serde_json::Value)>,
}

impl Run {
    /// Opens the run directory, new or to be resumed.
    ///
    /// # Errors
    /// The directory is another run's or no run's, or it holds finished work that the flow as it
    /// is now would compute again (domain `User`); it can't be written (`External`).
    pub fn new(config: RunConfig) -> Result<Self, RunError> {
        let opening = Opening {
            rounds: &config.rounds,
            flow_name: &config.flow_name,
            flow_text: &config.flow_text,
            date: config.date,
            fresh: config.fresh,
            recompute: config.recompute,
            retry_dead: config.retry_dead,
            fork_of: config.fork_of.as_deref(),
        };
        let again = config.fresh || config.recompute || config.retry_dead || config.open_ended;
        let finished = if again { None } else { finished(&config.dir, &config.rounds, &config.registry) };
        let dir = match finished {
            Some(_) => RunDir::of_finished(&config.dir)?,
            None => RunDir::open(&config.dir, &opening)?,
        };
        let terms = Terms {
            flow: config.flow_name,
            rounds: config.rounds.len() as u32,
            seed: config.seed,
            deterministic: config.deterministic,
            max_dead_letters: config.max_dead_letters,
            metrics: config.metrics,
            trace: config.trace,
            quotas: config.quotas,
            masks: config.masks,
        };
        let ledger = Ledger::open(dir, terms)
            .map_err(|e| RunError::external(format!("run directory {}: {e}", config.dir.display())))?;
        for (trainer, adapter) in config.init_adapters {
            ledger.adapters.publish(&trainer, 0, adapter);
        }
        let (stall_after, seat) = (config.stall_after, config.seat);
        Ok(Self {
            rounds: config.rounds,
            registry: config.registry,
            ledger: Arc::new(ledger),
            stall_after,
            seat,
            finished,
        })
    }

    /// Starts the run on the current tokio runtime.
    pub fn start(self) -> RunHandle {
        let (done, ended) = watch::channel(None);
        let ledger = self.ledger.clone();
        ledger.metrics.gauge("flowrun_run_info", &[("version", env!("CARGO_PKG_VERSION"))]).set(1.0);
        ledger.metrics.gauge("flowrun_run_rounds", &[]).set(f64::from(ledger.rounds));
        if let Some((status, json)) = self.finished {
            let summary = Summary { status, error: None, dir: ledger.dir.path().into(), json };
            ledger.dir.release();
            ledger.tell(RunEvent::Ended { status });
            let recorded = super::runs::status(&summary.dir).ok().flatten();
            let recorded = recorded.map(|(status, _)| Arc::new(RunStatus { ended: true, ..status }));
            done.send_replace(Some(Arc::new(summary)));
            return RunHandle { ledger, recorded, ended };
        }
        tokio::spawn(watch_process(ledger.clone(), ended.clone()));
        tokio::spawn(keep_status(ledger.clone(), ended.clone()));
        tokio::spawn(keep_report(ledger.clone(), ended.clone()));
        tokio::spawn(watch_stalls(ledger.clone(), self.stall_after, ended.clone()));
        let span = tracing::info_span!(target: SPAN, "run", flow = ledger.flow, rounds = ledger.rounds);
        tokio::spawn(keep_quotas(ledger.clone(), ended.clone()));
        let args =
            RunArgs { rounds: self.rounds, kinds: self.registry, ledger: self.ledger, done, span, seat: self.seat };
        // A run actor that can't start drops `done`, which ends `wait`.
        tokio::spawn(Actor::spawn(None, RunActor, args));
        RunHandle { ledger, recorded: None, ended }
    }
}

/// A run under way. Dropping it leaves the run alone.
#[derive(Clone)]
pub struct RunHandle {
    ledger: Arc<Ledger>,
    /// The last status of a run that had ended before.
    recorded: Option<Arc<RunStatus>>,
    ended: watch::Receiver<Option<Arc<Summary>>>,
}

impl RunHandle {
    pub fn status(&self) -> RunStatus {
        if let Some(recorded) = &self.recorded {
            return recorded.as_ref().clone();
        }
        // A supervisor that is lost ends its run without a word.
        self.ledger.status(self.ended.borrow().is_some() || self.ended.has_changed().is_err())
    }

    /// Returns whether the run had ended before, with nothing left to do.
    pub fn was_finished(&self) -> bool {
        self.recorded.is_some()
    }

    /// The figures of all rounds that have begun, as `summary.json` will have them.
    pub fn figures(&self) -> serde_json::Value {
        let ended = self.ended.borrow().clone();
        ended.map_or_else(|| self.ledger.summary("running", None), |summary| summary.json.clone())
    }

    /// The run directory; [`runs::table`](super::runs::table) reads the rows of stages that have ended a round.
    pub fn dir(&self) -> PathBuf {
        self.ledger.dir.path().into()
    }

    /// What happened so far, as far as it is kept, and what will happen.
    pub fn events(&self) -> Events {
        self.ledger.listen()
    }

    /// Stages take and send no more rows until [`Self::resume`]. What a device has in work is
    /// finished; a trainer stops after its step.
    pub fn pause(&self) {
        self.ledger.pause.set(true);
    }

    pub fn resume(&self) {
        self.ledger.pause.set(false);
    }

    pub fn is_paused(&self) -> bool {
        self.ledger.pause.is_on()
    }

    /// Asks the run to stop: stages see `Cancelled`, journals are synced, the run ends as
    /// `interrupted` and can be resumed.
    pub fn cancel(&self) {
        self.ledger.cancel.cancel();
    }

    /// Waits for the end. May be called any number of times.
    pub async fn wait(&self) -> Summary {
        let mut ended = self.ended.clone();
        let summary = ended.wait_for(Option::is_some).await.ok().and_then(|s| s.clone());
        summary.map_or_else(|| self.lost(), |s| s.as_ref().clone())
    }

    /// The run's actor went away without a word.
    fn lost(&self) -> Summary {
        let error = RunError::external("the run's supervisor ended without a result");
        let json = self.ledger.summary("failed", Some(error.message.clone()));
        Summary { status: Ending::Failed, error: Some(error), dir: self.ledger.dir.path().into(), json }
    }
}

async fn watch_process(ledger: Arc<Ledger>, mut ended: watch::Receiver<Option<Arc<Summary>>>) {
    let gauge = |name| ledger.metrics.gauge(name, &[]);
    let (resident, free) = (gauge("flowrun_process_resident_bytes"), gauge("flowrun_disk_free_bytes"));
    let (cpu, threads) = (gauge("flowrun_process_cpu_seconds_total"), gauge("flowrun_process_threads"));
    let (files, seconds) = (gauge("flowrun_process_open_fds"), gauge("flowrun_run_seconds"));
    gauge("flowrun_process_start_time_seconds").set(process::start_time());
    let mut progress = Progress::default();
    let mut over = false;
    // Once more after the end, for the last scrape.
    loop {
        resident.set(process::memory("VmRSS:") as f64);
        if let Some(bytes) = process::disk_free(ledger.dir.path()) {
            free.set(bytes as f64);
        }
        cpu.set(process::cpu_seconds());
        threads.set(process::threads() as f64);
        files.set(process::open_files() as f64);
        seconds.set(ledger.seconds());
        ledger.count_seconds();
        progress.tell(&ledger, over);
        for ((device, stage), busy) in ledger.trace.seconds() {
            // What no stage asked for is the device's own: a model is loaded.
            let stage_track = device == stage;
            if !stage_track {
                let labels = [("device", device.as_ref()), ("stage", stage.as_ref())];
                ledger.metrics.gauge("flowrun_device_busy_seconds_total", &labels).set(busy);
            }
        }
        if over {
            return;
        }
        over = tokio::time::timeout(PROCESS_EVERY, ended.wait_for(Option::is_some)).await.is_ok();
    }
}

/// How far the run is, as far as that is known.
#[derive(Default)]
struct Progress {
    remaining: Option<metrics::Gauge>,
}

impl Progress {
    fn tell(&mut self, ledger: &Ledger, over: bool) {
        let status = ledger.status(over);
        if status.remaining_seconds.is_some() {
            self.remaining.get_or_insert_with(|| ledger.metrics.gauge("flowrun_run_remaining_seconds", &[]));
        }
        if let Some(gauge) = &self.remaining {
            // An estimate that is gone is no number.
            gauge.set(status.remaining_seconds.unwrap_or(f64::NAN));
        }
        for stage in status.stages {
            if let Some(share) = stage.progress {
                ledger.metrics.gauge("flowrun_stage_progress_ratio", &[("stage", &stage.name)]).set(share);
            }
        }
    }
}

/// Looks at the queues, and keeps `status.json` up to date while the run goes on.
async fn keep_status(ledger: Arc<Ledger>, mut ended: watch::Receiver<Option<Arc<Summary>>>) {
    loop {
        ledger.look_at_queues();
        let theirs = ledger.clone();
        let written = tokio::task::spawn_blocking(move || theirs.write_interim_status()).await;
        if let Err(error) = written.map_err(std::io::Error::other).flatten() {
            tracing::debug!(%error, "status.json can't be written");
        }
        if tokio::time::timeout(LOOK_EVERY, ended.wait_for(Option::is_some)).await.is_ok() {
            return;
        }
    }
}

/// Stops a run that uses more than it may.
async fn keep_quotas(ledger: Arc<Ledger>, mut ended: watch::Receiver<Option<Arc<Summary>>>) {
    if ledger.quotas == Quotas::default() {
        return;
    }
    while tokio::time::timeout(QUOTAS_EVERY, ended.wait_for(Option::is_some)).await.is_err() {
        if ledger.overspent().await.is_some() {
            return ledger.cancel.cancel();
        }
    }
}

/// Keeps `report.html` up to date while the run goes on.
async fn keep_report(ledger: Arc<Ledger>, mut ended: watch::Receiver<Option<Arc<Summary>>>) {
    let mut wait = FIRST_REPORT;
    while tokio::time::timeout(wait, ended.wait_for(Option::is_some)).await.is_err() {
        let (began, theirs) = (Instant::now(), ledger.clone());
        let written = tokio::task::spawn_blocking(move || theirs.write_interim_report()).await;
        if let Err(error) = written.map_err(std::io::Error::other).flatten() {
            tracing::warn!(%error, "report.html can't be written");
        }
        wait = REPORT_EVERY.max(began.elapsed() * REPORT_SHARE);
    }
}

/// What was last seen of a stage.
struct Pulse {
    pulse: Option<u64>,
    since: Instant,
    reported: bool,
}

/// Reports every stage that is busy and goes silent, once until it moves again.
async fn watch_stalls(ledger: Arc<Ledger>, limit: Duration, mut ended: watch::Receiver<Option<Arc<Summary>>>) {
    let every = (limit / 4).clamp(Duration::from_millis(10), Duration::from_secs(5));
    let mut seen: HashMap<(u32, String), Pulse> = HashMap::new();
    loop {
        if tokio::time::timeout(every, ended.wait_for(Option::is_some)).await.is_ok() {
            return;
        }
        let Some((round, stages)) = ledger.stages() else { continue };
        // Stages of a round that is over; their successors' meters begin with 0.
        seen.retain(|(of, _), _| *of == round);
        for meter in stages {
            let pulse = meter.pulse();
            let fresh = || Pulse { pulse, since: Instant::now(), reported: false };
            let last = seen.entry((round, meter.name.clone())).or_insert_with(fresh);
            let gauge = || ledger.metrics.gauge("flowrun_stage_stalled", &[("stage", &meter.name)]);
            if pulse.is_none() || pulse != last.pulse {
                if last.reported {
                    gauge().set(0.0);
                }
                *last = fresh();
            } else if !last.reported && last.since.elapsed() >= limit {
                last.reported = true;
                gauge().set(1.0);
                let seconds = last.since.elapsed().as_secs_f64();
                tracing::warn!(stage = meter.name, round, seconds, "the stage is busy and gives no sign of life");
                ledger.tell(RunEvent::Stalled { round, stage: meter.name.clone(), seconds });
            }
        }
    }
}

#[cfg(test)]
#[path = "run_tests.rs"]
mod tests;
