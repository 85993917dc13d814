//! A run as it goes on: the view on a terminal, lines where changed figures are logged, events in JSON logs.

use std::path::PathBuf;
use std::time::Duration;

use flowrun::engine::{RunHandle, runs};
use flowrun::observe::view::{self, Changes, Pace, Sample};
use flowrun::observe::{RoundStatus, RunStatus, StageStatus, shortened};
use futures::FutureExt;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::log::{LogFormat, PROGRESS};
use super::screen::Screen;

const REDRAW_EVERY: Duration = Duration::from_millis(200);
const LINES_EVERY: Duration = Duration::from_secs(5);
const SAMPLES_EVERY: Duration = Duration::from_secs(2);
const SAMPLES: usize = 2;

/// How long a run of another process may be silent before it is taken for gone.
const PATIENCE: Duration = Duration::from_secs(5);
/// What is told of a run is old after that.
const OLD: Duration = Duration::from_secs(10);
const STATUS_BYTES: usize = 64 << 20;

/// The run that is shown.
#[derive(Clone)]
pub enum Source {
    /// Of this process, and its directory.
    Run(RunHandle, PathBuf),
    /// Of another process: where it serves its status.
    Address(reqwest::Client, reqwest::Url),
    /// Of another process, or of none any more.
    Directory(PathBuf),
}

/// What is known of a run, and how long ago it was told.
pub struct Told {
    pub status: RunStatus,
    age: Duration,
}

impl Source {
    /// # Errors
    /// The address can't be asked.
    pub fn address(url: reqwest::Url) -> Result<Self, String> {
        // A proxy's own address is another machine's; a page that leads elsewhere is no run's.
        let client = reqwest::Client::builder().no_proxy().redirect(reqwest::redirect::Policy::none());
        let client = client.timeout(PATIENCE).build().map_err(|e| e.to_string())?;
        Ok(Self::Address(client, url))
    }

    /// # Errors
    /// Nobody answers, or there is no status to read.
    pub async fn status(&self) -> Result<Told, String> {
        let told = match self {
            Self::Run(run, _) => Ok(Told { status: run.status(), age: Duration::ZERO }),
            Self::Address(client, url) => fetch(client, url).await.map(|status| Told { status, age: Duration::ZERO }),
            Self::Directory(dir) => read(dir.clone()).await,
        };
        // Whoever wrote it may have written anything.
        told.map_err(|why| shortened(&why))
    }

    /// Rows that were finished last. An address tells figures only.
    async fn samples(self) -> Vec<Sample> {
        let (Self::Run(_, dir) | Self::Directory(dir)) = self else { return Vec::new() };
        let read = tokio::task::spawn_blocking(move || runs::latest_samples(&dir, SAMPLES));
        read.await.unwrap_or_default()
    }

    fn has_samples(&self) -> bool {
        !matches!(self, Self::Address(..))
    }

    /// A run of another process goes on when nobody looks any more.
    fn may_be_left(&self) -> bool {
        !matches!(self, Self::Run(..))
    }
}

async fn fetch(client: &reqwest::Client, url: &reqwest::Url) -> Result<RunStatus, String> {
    let wrong = |e: reqwest::Error| format!("{url}: {}", e.without_url());
    let mut answer = client.get(url.clone()).send().await.map_err(wrong)?.error_for_status().map_err(wrong)?;
    let mut text = Vec::new();
    while let Some(part) = answer.chunk().await.map_err(wrong)? {
        text.extend(part);
        if text.len() > STATUS_BYTES {
            return Err(format!("{url}: that is no status of a run"));
        }
    }
    serde_json::from_slice(&text).map_err(|e| format!("{url}: that is no status of a run: {e}"))
}

async fn read(dir: PathBuf) -> Result<Told, String> {
    let shown = dir.display().to_string();
    let read = tokio::task::spawn_blocking(move || {
        // First who works on it: a run that ends in between has then told its end.
        let works = runs::owner(&dir).is_some();
        let told = runs::status(&dir).map_err(|e| e.to_string())?;
        let (mut status, at) = told.ok_or_else(|| format!("{shown}: the run has told nothing yet"))?;
        status.ended |= !works;
        status.remaining_seconds = status.remaining();
        let age = if status.ended { Duration::ZERO } else { at.elapsed().unwrap_or_default() };
        Ok(Told { status, age })
    });
    read.await.map_err(|e| e.to_string())?
}

/// The status of a run, with patience for one that does not answer at once.
struct Look<'a> {
    source: &'a Source,
    last: Option<(Instant, RunStatus)>,
}

impl Look<'_> {
    async fn next(&mut self) -> Result<Told, String> {
        match self.source.status().await {
            Ok(told) => {
                self.last = Some((Instant::now(), told.status.clone()));
                Ok(told)
            }
            Err(why) => match &self.last {
                Some((at, status)) if at.elapsed() < PATIENCE => Ok(Told { status: status.clone(), age: at.elapsed() }),
                _ => Err(why),
            },
        }
    }
}

/// Shows the run until it has ended, or a key or a signal leaves it.
///
/// # Errors
/// Its status can't be had any more.
pub async fn watch(source: &Source, screen: &Screen) -> Result<(), String> {
    let look = Look { source, last: None };
    match screen.format {
        LogFormat::Json => print(look, log, log_round).await,
        LogFormat::Text if screen.is_live() => draw(look, screen).await,
        LogFormat::Text => {
            let stage = |status: &RunStatus, stage: &StageStatus, pace: &Pace| {
                screen.say(&view::log_line(status, stage, pace));
            };
            print(look, stage, |status, round| screen.say(&view::round_line(status, round))).await
        }
    }
}

/// Gives the terminal back, also where drawing panics.
struct Leave<'a>(&'a Screen);

impl Drop for Leave<'_> {
    fn drop(&mut self) {
        self.0.leave();
    }
}

async fn draw(look: Look<'_>, screen: &Screen) -> Result<(), String> {
    let _leave = Leave(screen);
    let may_be_left = look.source.may_be_left();
    let signal = async {
        use tokio::signal::unix::{SignalKind, signal};
        let [Ok(mut quit), Ok(mut end), Ok(mut interrupt)] =
            [SignalKind::quit(), SignalKind::terminate(), SignalKind::interrupt()].map(signal)
        else {
            return std::future::pending().await;
        };
        tokio::select! { _ = quit.recv() => {}, _ = end.recv() => {}, _ = interrupt.recv() => {} }
    };
    tokio::select! {
        result = drawn(look, screen) => result,
        () = signal, if may_be_left => Ok(()),
    }
}

async fn drawn(mut look: Look<'_>, screen: &Screen) -> Result<(), String> {
    let (has_samples, may_be_left) = (look.source.has_samples(), look.source.may_be_left());
    let (mut pace, mut rounds) = (Pace::default(), 0);
    let mut samples = Samples::default();
    loop {
        let Told { status, age } = look.next().await?;
        pace.look(&status);
        for round in status.finished.iter().skip(rounds) {
            screen.say(&view::round_line(&status, round));
        }
        rounds = status.finished.len();
        samples.turn(look.source);
        let hint = match (status.ended, age > OLD, screen.open_keys(), has_samples, may_be_left) {
            (true, ..) => String::new(),
            (_, true, ..) => format!("told {} ago", view::span(age.as_secs_f64())),
            (_, _, false, ..) | (_, _, _, false, false) => String::new(),
            (_, _, _, true, false) => "s: samples".into(),
            (_, _, _, true, true) => "s: samples  q: leave".into(),
            (_, _, _, false, true) => "q: leave".into(),
        };
        let visible = if status.ended { &[] } else { samples.visible() };
        let (width, height) = Screen::size();
        screen.draw(&view::frame(&status, &pace, visible, &hint, width, height));
        if status.ended {
            return Ok(());
        }
        tokio::time::sleep(REDRAW_EVERY).await;
        while let Some(key) = screen.key() {
            match key {
                b's' if has_samples => samples.shown = !samples.shown,
                b'q' if may_be_left => return Ok(()),
                _ => {}
            }
        }
    }
}

/// The rows that were finished last, read beside the drawing: journals may be large.
#[derive(Default)]
struct Samples {
    shown: bool,
    rows: Vec<Sample>,
    reading: Option<JoinHandle<Vec<Sample>>>,
    read: Option<Instant>,
}

impl Samples {
    fn turn(&mut self, source: &Source) {
        if self.reading.as_ref().is_some_and(JoinHandle::is_finished)
            && let Some(rows) = self.reading.take().and_then(FutureExt::now_or_never)
        {
            (self.rows, self.read) = (rows.unwrap_or_default(), Some(Instant::now()));
        }
        let due = self.read.is_none_or(|at| at.elapsed() >= SAMPLES_EVERY);
        if self.shown && due && self.reading.is_none() {
            self.reading = Some(tokio::spawn(source.clone().samples()));
        }
    }

    fn visible(&self) -> &[Sample] {
        if self.shown { &self.rows } else { &[] }
    }
}

/// Every few seconds the stages that moved, and each round that is over.
async fn print(
    mut look: Look<'_>,
    tell: impl Fn(&RunStatus, &StageStatus, &Pace),
    tell_round: impl Fn(&RunStatus, &RoundStatus),
) -> Result<(), String> {
    let (mut changes, mut pace, mut rounds) = (Changes::default(), Pace::default(), 0);
    let mut next = Instant::now() + LINES_EVERY;
    loop {
        let status = look.next().await?.status;
        pace.look(&status);
        if status.ended || Instant::now() >= next {
            changes.of(&status).into_iter().for_each(|stage| tell(&status, stage, &pace));
            next = Instant::now() + LINES_EVERY;
        }
        status.finished.iter().skip(rounds).for_each(|round| tell_round(&status, round));
        rounds = status.finished.len();
        if status.ended {
            return Ok(());
        }
        tokio::time::sleep(REDRAW_EVERY).await;
    }
}

fn log(status: &RunStatus, stage: &StageStatus, _: &Pace) {
    tracing::info!(
        target: PROGRESS,
        flow = status.flow,
        round = status.round,
        rounds = status.rounds,
        stage = stage.name,
        state = stage.state.as_str(),
        rows_in = stage.rows_in,
        rows_out = stage.rows_out,
        reused_rows = stage.reused_rows,
        dead_letters = stage.dead_letters,
        tokens_in = stage.tokens_in,
        tokens_out = stage.tokens_out,
        queue_rows = stage.queue_rows,
        progress = stage.progress,
        seconds = stage.seconds,
        waits_for = stage.waits_for,
        remaining_seconds = status.remaining_seconds,
        "progress"
    );
}

fn log_round(status: &RunStatus, round: &RoundStatus) {
    let (flow, latest) = (&status.flow, serde_json::Value::from(round.latest.clone()).to_string());
    let (round, seconds, reused) = (round.round, round.seconds, round.reused);
    tracing::info!(target: PROGRESS, flow, round, rounds = status.rounds, seconds, reused, latest, "round over");
}
