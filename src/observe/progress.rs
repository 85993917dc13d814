//! What a person sees while a run goes on: a line a stage on a terminal, plain lines elsewhere.
//! Everything goes to stderr; stdout is for results.

use std::collections::HashMap;
use std::io::{IsTerminal, Write};
use std::time::Duration;

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use tokio::task::JoinHandle;

use super::{RunStatus, StageState, StageStatus};

const REDRAW_EVERY: Duration = Duration::from_millis(200);
const LINES_EVERY: Duration = Duration::from_secs(5);
const BAR_WIDTH: usize = 8;

/// Shows `status` until it says that the run has ended; await the handle to let it draw the end.
pub fn show(status: impl Fn() -> RunStatus + Send + 'static) -> JoinHandle<()> {
    if std::io::stderr().is_terminal() { tokio::spawn(draw(status)) } else { tokio::spawn(print(status)) }
}

async fn draw(status: impl Fn() -> RunStatus + Send) {
    let lines = MultiProgress::with_draw_target(ProgressDrawTarget::stderr());
    let style = ProgressStyle::with_template("{msg}").unwrap_or_else(|_| ProgressStyle::default_spinner());
    let (mut round, mut bars) = (0, HashMap::<String, ProgressBar>::new());
    loop {
        let now = status();
        if now.round != round {
            // The lines of the round before stay above, as they ended.
            bars.drain().for_each(|(_, bar)| bar.abandon());
            round = now.round;
            let head = lines.add(ProgressBar::new_spinner().with_style(style.clone()));
            head.abandon_with_message(format!("round {} of {}", now.round, now.rounds));
        }
        for stage in &now.stages {
            let fresh = || lines.add(ProgressBar::new_spinner().with_style(style.clone()));
            bars.entry(stage.name.clone()).or_insert_with(fresh).set_message(line(stage));
        }
        if now.ended {
            bars.drain().for_each(|(_, bar)| bar.abandon());
            return;
        }
        tokio::time::sleep(REDRAW_EVERY).await;
    }
}

async fn print(status: impl Fn() -> RunStatus + Send) {
    let mut shown: HashMap<String, String> = HashMap::new();
    let mut next = tokio::time::Instant::now() + LINES_EVERY;
    loop {
        let now = status();
        if now.ended || tokio::time::Instant::now() >= next {
            print_changes(&now, &mut shown);
            next = tokio::time::Instant::now() + LINES_EVERY;
        }
        if now.ended {
            return;
        }
        tokio::time::sleep(REDRAW_EVERY).await;
    }
}

/// A stage that stands where it stood is not printed again.
fn print_changes(now: &RunStatus, shown: &mut HashMap<String, String>) {
    for stage in &now.stages {
        let progress =
            format!("{} {:?} {} {} {}", now.round, stage.state, stage.rows_in, stage.rows_out, stage.tokens_out);
        if shown.insert(stage.name.clone(), progress.clone()).as_ref() != Some(&progress) {
            // Progress that can't be shown is no reason to stop.
            let _ = writeln!(std::io::stderr(), "round {}/{} {}", now.round, now.rounds, line(stage).trim_end());
        }
    }
}

/// `sample   running     96 rows    3.2/s    61 tok/s  [###-----] waits for rows of prompts`
fn line(stage: &StageStatus) -> String {
    let seconds = stage.seconds.max(1e-3);
    let rows = stage.rows_out.max(stage.rows_in);
    let state = match stage.state {
        StageState::Pending => "pending",
        StageState::Running => "running",
        StageState::Done => "done",
        StageState::Failed => "failed",
        StageState::Cancelled => "stopped",
    };
    let mut line = format!("{:<12} {state:<8} {rows:>7} rows {:>7.1}/s", stage.name, rows as f64 / seconds);
    match stage.tokens_out.max(stage.tokens_in) {
        0 => line.push_str(&" ".repeat(14)),
        tokens => line.push_str(&format!("{:>8.0} tok/s", tokens as f64 / seconds)),
    }
    line.push_str(&format!("  {:<10}", queue(stage)));
    let notes = [
        (stage.reused_rows > 0).then(|| format!("{} reused", stage.reused_rows)),
        (stage.dead_letters > 0).then(|| format!("{} dead letters", stage.dead_letters)),
        stage.waits_for.as_ref().map(|what| format!("waits for {what}")),
    ];
    line.push_str(&notes.into_iter().flatten().collect::<Vec<_>>().join(", "));
    line
}

/// How full the stage's inputs are; a number where they have no bound.
fn queue(stage: &StageStatus) -> String {
    match stage.queue_capacity_rows {
        Some(capacity) => {
            let filled = (stage.queue_rows as f64 / capacity.max(1) as f64 * BAR_WIDTH as f64).ceil() as usize;
            let filled = filled.min(BAR_WIDTH);
            format!("[{}{}]", "#".repeat(filled), "-".repeat(BAR_WIDTH - filled))
        }
        None if stage.queue_rows > 0 => format!("[{} rows]", stage.queue_rows),
        None => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stage() -> StageStatus {
        StageStatus {
            name: "judge".into(),
            kind: "judge".into(),
            state: StageState::Running,
            rows_in: 40,
            rows_out: 20,
            reused_rows: 3,
            dead_letters: 0,
            tokens_in: 0,
            tokens_out: 400,
            queue_rows: 512,
            queue_capacity_rows: Some(1024),
            waits_for: Some("rows of sample".into()),
            seconds: 10.0,
        }
    }

    #[test]
    fn a_line_says_rows_rate_tokens_queue_and_what_it_waits_for() {
        let text = line(&stage());
        for part in
            ["judge", "running", "40 rows", "4.0/s", "40 tok/s", "[####----]", "3 reused", "waits for rows of sample"]
        {
            assert!(text.contains(part), "{part} in {text}");
        }
    }

    #[test]
    fn an_edge_without_a_bound_shows_its_rows() {
        assert_eq!(queue(&StageStatus { queue_capacity_rows: None, ..stage() }), "[512 rows]");
    }
}
