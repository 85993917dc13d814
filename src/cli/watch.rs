//! A run as it goes on: the view on a terminal, lines where changed figures are logged, events in JSON logs.

use std::path::PathBuf;
use std::time::Duration;

use flowrun::engine::{RunHandle, runs};
use flowrun::observe::view::{self, Changes, Pace, Sample};
use flowrun::observe::{RunStatus, StageStatus};
use tokio::time::Instant;

use super::log::{LogFormat, PROGRESS};
use super::screen::Screen;

const REDRAW_EVERY: Duration = Duration::from_millis(200);
const LINES_EVERY: Duration = Duration::from_secs(5);
const SAMPLES_EVERY: Duration = Duration::from_secs(2);
const SAMPLES: usize = 2;

/// The run that is shown.
pub enum Source {
    /// Of this process, and its directory.
    Run(RunHandle, PathBuf),
    /// Of another process: where it serves its status.
    Address(reqwest::Url),
    /// Of another process, or of none any more.
    Directory(PathBuf),
}

impl Source {
    /// # Errors
    /// Nobody answers, or there is no status to read.
    pub async fn status(&self) -> Result<RunStatus, String> {
        match self {
            Self::Run(run, _) => Ok(run.status()),
            Self::Address(url) => fetch(url).await,
            Self::Directory(dir) => read(dir.clone()).await,
        }
    }

    /// Rows that were finished last. An address tells figures only.
    async fn samples(&self) -> Vec<Sample> {
        let (Self::Run(_, dir) | Self::Directory(dir)) = self else { return Vec::new() };
        let dir = dir.clone();
        let read = tokio::task::spawn_blocking(move || runs::latest_samples(&dir, SAMPLES));
        read.await.unwrap_or_default()
    }

    fn has_samples(&self) -> bool {
        !matches!(self, Self::Address(_))
    }

    /// A run of another process goes on when nobody looks any more.
    fn may_be_left(&self) -> bool {
        !matches!(self, Self::Run(..))
    }
}

async fn fetch(url: &reqwest::Url) -> Result<RunStatus, String> {
    let wrong = |e: reqwest::Error| format!("{url}: {}", flowrun::observe::shortened(&e.without_url().to_string()));
    let answer = reqwest::Client::new().get(url.clone()).timeout(Duration::from_secs(5)).send().await;
    answer.map_err(wrong)?.error_for_status().map_err(wrong)?.json().await.map_err(wrong)
}

async fn read(dir: PathBuf) -> Result<RunStatus, String> {
    let shown = dir.display().to_string();
    let read = tokio::task::spawn_blocking(move || {
        let status = runs::status(&dir).map_err(|e| e.to_string())?;
        let status = status.map(|status| RunStatus { ended: runs::owner(&dir).is_none(), ..status });
        status.ok_or_else(|| format!("{shown}: the run has told nothing yet"))
    });
    read.await.map_err(|e| e.to_string())?
}

/// Shows the run until it has ended, or a key or Ctrl-C leaves it.
///
/// # Errors
/// Its status can't be had any more.
pub async fn watch(source: &Source, screen: &Screen) -> Result<(), String> {
    match screen.format {
        LogFormat::Json => print(source, log).await,
        LogFormat::Text if screen.is_live() => draw(source, screen).await,
        LogFormat::Text => print(source, |status, stage, pace| screen.say(&view::log_line(status, stage, pace))).await,
    }
}

async fn draw(source: &Source, screen: &Screen) -> Result<(), String> {
    let hint = match (screen.open_keys(), source.has_samples(), source.may_be_left()) {
        (false, ..) | (true, false, false) => "",
        (true, true, false) => "s: samples",
        (true, true, true) => "s: samples  q: leave",
        (true, false, true) => "q: leave",
    };
    let result = drawn(source, screen, hint).await;
    screen.leave();
    result
}

async fn drawn(source: &Source, screen: &Screen, hint: &str) -> Result<(), String> {
    let (mut pace, mut rounds) = (Pace::default(), 0);
    let (mut shown, mut samples, mut due) = (false, Vec::new(), Instant::now());
    loop {
        let status = source.status().await?;
        pace.look(&status);
        for round in status.finished.iter().skip(rounds) {
            screen.say(&view::round_line(&status, round));
        }
        rounds = status.finished.len();
        if shown && Instant::now() >= due {
            samples = source.samples().await;
            due = Instant::now() + SAMPLES_EVERY;
        }
        let visible = if shown && !status.ended { samples.as_slice() } else { &[] };
        let (width, height) = Screen::size();
        screen.draw(&view::frame(&status, &pace, visible, if status.ended { "" } else { hint }, width, height));
        if status.ended {
            return Ok(());
        }
        tokio::select! {
            () = tokio::time::sleep(REDRAW_EVERY) => {}
            _ = tokio::signal::ctrl_c(), if source.may_be_left() => return Ok(()),
        }
        while let Some(key) = screen.key() {
            match key {
                b's' if source.has_samples() => (shown, due) = (!shown, Instant::now()),
                b'q' if source.may_be_left() => return Ok(()),
                _ => {}
            }
        }
    }
}

/// Every few seconds the stages that moved.
async fn print(source: &Source, tell: impl Fn(&RunStatus, &StageStatus, &Pace)) -> Result<(), String> {
    let (mut changes, mut pace) = (Changes::default(), Pace::default());
    let mut next = Instant::now() + LINES_EVERY;
    loop {
        let status = source.status().await?;
        pace.look(&status);
        if status.ended || Instant::now() >= next {
            changes.of(&status).into_iter().for_each(|stage| tell(&status, stage, &pace));
            next = Instant::now() + LINES_EVERY;
        }
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
        state = ?stage.state,
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
