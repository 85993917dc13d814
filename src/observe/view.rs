//! A run as lines of text: for a terminal one steady view with a line a stage, elsewhere a line for what changed.

use std::collections::{HashMap, VecDeque};

use console::{measure_text_width, pad_str, strip_ansi_codes, style, truncate_str};
use serde_json::Value;

use super::text::plain;
use super::{RoundStatus, RunStatus, StageState, StageStatus};

const BAR_WIDTH: usize = 8;
/// Rates are those of so many seconds.
const WINDOW: f64 = 10.0;
/// A name that is longer is cut.
const NAME_WIDTH: usize = 20;
/// Lines of one text of a sample.
const TEXT_LINES: usize = 4;

/// A row that a stage finished lately.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sample {
    /// Such as `judge, round 1, row 12`.
    pub place: String,
    /// Label and text: the prompt, what was chosen and rejected.
    pub texts: Vec<(&'static str, String)>,
}

/// How many rows and tokens a second go through each stage of late.
#[derive(Debug, Default)]
pub struct Pace {
    /// By round and stage.
    looks: HashMap<(u32, String), VecDeque<Look>>,
}

#[derive(Debug, Clone, Copy)]
struct Look {
    seconds: f64,
    /// In and out.
    rows: [u64; 2],
    tokens: [u64; 2],
}

impl Pace {
    /// Takes note of where the stages are.
    pub fn look(&mut self, status: &RunStatus) {
        self.looks.retain(|(round, _), _| *round == status.round);
        for stage in &status.stages {
            let looks = self.looks.entry((status.round, stage.name.clone())).or_default();
            // A run that stands still, or tells nothing new, is no slower for being looked at often.
            if looks.back().is_some_and(|last| last.seconds >= status.seconds) {
                continue;
            }
            let (rows, tokens) = ([stage.rows_in, stage.rows_out], [stage.tokens_in, stage.tokens_out]);
            looks.push_back(Look { seconds: status.seconds, rows, tokens });
            // The first look may be older than the window, or there would be none at its beginning.
            while looks.get(1).is_some_and(|second| status.seconds - second.seconds > WINDOW) {
                looks.pop_front();
            }
        }
    }

    /// Rows and tokens a second: lately while the stage runs, on average once it has ended.
    fn of(&self, round: u32, stage: &StageStatus) -> (f64, f64) {
        let looks = self.looks.get(&(round, stage.name.clone())).filter(|_| stage.state == StageState::Running);
        let (first, last) = (looks.and_then(VecDeque::front), looks.and_then(VecDeque::back));
        match first.zip(last) {
            Some((first, last)) if last.seconds - first.seconds >= 1.0 => {
                let rate = |from: [u64; 2], to: [u64; 2]| {
                    let side = usize::from(to[1] > 0);
                    to[side].saturating_sub(from[side]) as f64 / (last.seconds - first.seconds)
                };
                (rate(first.rows, last.rows), rate(first.tokens, last.tokens))
            }
            _ => {
                let seconds = stage.seconds.max(1e-3);
                (rows(stage) as f64 / seconds, tokens(stage) as f64 / seconds)
            }
        }
    }
}

/// Rows that are done: what came out, or went in where nothing comes out.
fn rows(stage: &StageStatus) -> u64 {
    if stage.rows_out > 0 { stage.rows_out } else { stage.rows_in }
}

/// Tokens that were generated, or where none are those that were read.
fn tokens(stage: &StageStatus) -> u64 {
    if stage.tokens_out > 0 { stage.tokens_out } else { stage.tokens_in }
}

/// The whole view: a line for the run with the keys that there are, one a stage, and below them the samples. No line is
/// wider than `width`, and there are at most `height`.
pub fn frame(
    status: &RunStatus,
    pace: &Pace,
    samples: &[Sample],
    keys: &str,
    width: usize,
    height: usize,
) -> Vec<String> {
    let mut lines = vec![head(status, keys)];
    let names = name_width(status);
    lines.extend(status.stages.iter().map(|stage| {
        let line = format!("  {}", stage_line(status.round, stage, pace, names));
        if stage.state == StageState::Running { line } else { style(line).for_stderr().dim().to_string() }
    }));
    if lines.len() > height.max(2) {
        let hidden = lines.len() - height.max(2) + 1;
        lines.truncate(height.max(2) - 1);
        lines.push(format!("  … {hidden} more stages"));
    }
    lines.extend(samples.iter().flat_map(|sample| sample_lines(sample, width)));
    lines.truncate(height.max(2));
    lines.iter().map(|line| truncate_str(line, width, "…").into_owned()).collect()
}

/// `self-reward  round 1 of 3  4 min 12 s  about 2 h 5 min left`
fn head(status: &RunStatus, keys: &str) -> String {
    let round =
        if status.round == 0 { "starting".to_owned() } else { format!("round {} of {}", status.round, status.rounds) };
    let left = match (status.ended, status.remaining_seconds) {
        (true, _) => "ended".to_owned(),
        (false, Some(seconds)) => format!("about {} left", span(seconds)),
        (false, None) => String::new(),
    };
    let parts = [style(plain(&status.flow)).for_stderr().bold().to_string(), round, span(status.seconds), left];
    let keys = if keys.is_empty() { String::new() } else { style(format!("({keys})")).for_stderr().dim().to_string() };
    parts.into_iter().chain([keys]).filter(|part| !part.is_empty()).collect::<Vec<_>>().join("  ")
}

fn name_width(status: &RunStatus) -> usize {
    status.stages.iter().map(|stage| measure_text_width(&plain(&stage.name))).max().unwrap_or(0).clamp(8, NAME_WIDTH)
}

/// `sample   running     56 → 96        3.2/s    61 tok/s   12 %  [###-----]  waits for rows of prompts`
fn stage_line(round: u32, stage: &StageStatus, pace: &Pace, names: usize) -> String {
    let state = match stage.state {
        StageState::Pending => "pending",
        StageState::Running => "running",
        StageState::Done => "done",
        StageState::Failed => "failed",
        StageState::Cancelled => "stopped",
    };
    let (rows_rate, tokens_rate) = pace.of(round, stage);
    let name = plain(&stage.name);
    let name = pad_str(&name, names, console::Alignment::Left, Some("…"));
    let tokens = if tokens(stage) == 0 { String::new() } else { format!("{tokens_rate:.0} tok/s") };
    let share = stage.progress.map_or(String::new(), |share| format!("{:.0} %", (share * 100.0).floor()));
    let (rows_in, rows_out) = (stage.rows_in, stage.rows_out);
    let columns = format!("{name} {state:<8}{rows_in:>7} → {rows_out:<7}{rows_rate:>7.1}/s {tokens:>12} {share:>6}");
    format!("{columns}  {:<10}  {}", queue(stage), notes(stage)).trim_end().to_owned()
}

/// How full the fullest of the stage's inputs is, by rows or by bytes; a number where they have no bound.
fn queue(stage: &StageStatus) -> String {
    match stage.queue_share {
        Some(share) => {
            let filled = ((share * BAR_WIDTH as f64).ceil() as usize).min(BAR_WIDTH);
            format!("[{}{}]", "#".repeat(filled), "-".repeat(BAR_WIDTH - filled))
        }
        None if stage.queue_rows > 0 => format!("[{} rows]", stage.queue_rows),
        None => String::new(),
    }
}

fn notes(stage: &StageStatus) -> String {
    let dead = style(format!("{} dead letters", stage.dead_letters)).for_stderr().yellow().to_string();
    let figures = figures(&stage.latest);
    let notes = [
        (!figures.is_empty()).then_some(figures),
        (stage.reused_rows > 0).then(|| format!("{} reused", stage.reused_rows)),
        (stage.dead_letters > 0).then_some(dead),
        stage.waits_for.as_ref().map(|what| format!("waits for {}", plain(what))),
    ];
    notes.into_iter().flatten().collect::<Vec<_>>().join(", ")
}

/// Figures of lines of `metrics.jsonl` that a person looks at first.
const FIGURES: [(&str, &str); 8] = [
    ("step", "step"),
    ("loss", "loss"),
    ("rewards/margins", "margin"),
    ("rewards/accuracies", "accuracy"),
    ("eval_loss", "validation loss"),
    ("eval_rewards/margins", "validation margin"),
    ("eval_rewards/accuracies", "validation accuracy"),
    ("win_rate", "win rate"),
];

/// `step 12, loss 0.6871, margin 0.0213, accuracy 0.7500`
fn figures(latest: &[Value]) -> String {
    let figure = |(key, name): &(&str, &str)| {
        // An evaluation has a step too, which may be an earlier one.
        let value = latest.iter().rev().find_map(|line| line.get(key))?;
        Some(match value.as_f64() {
            Some(value) if *key == "step" => format!("{name} {value}"),
            Some(value) => format!("{name} {value:.4}"),
            // JSON has no other number for it.
            None => style(format!("{name} not finite")).for_stderr().red().to_string(),
        })
    };
    FIGURES.iter().filter_map(figure).collect::<Vec<_>>().join(", ")
}

/// What stays above the view when a round is over.
pub fn round_line(flow: &RunStatus, round: &RoundStatus) -> String {
    let figures = figures(&round.latest);
    let figures = if figures.is_empty() { figures } else { format!(": {figures}") };
    format!("round {} of {} took {}{figures}", round.round, flow.rounds, span(round.seconds))
}

fn sample_lines(sample: &Sample, width: usize) -> Vec<String> {
    let mut lines = vec![" ".to_owned(), format!("  {}", style(plain(&sample.place)).for_stderr().bold())];
    for (label, text) in &sample.texts {
        let room = width.saturating_sub(14).max(20);
        let mut wrapped = wrap(text, room);
        if wrapped.len() > TEXT_LINES {
            wrapped.truncate(TEXT_LINES);
            if let Some(last) = wrapped.last_mut() {
                *last = format!("{} …", truncate_str(last, room - 2, ""));
            }
        }
        for (i, line) in wrapped.iter().enumerate() {
            let label = if i == 0 { label } else { "" };
            lines.push(format!("    {} {line}", style(format!("{label:<9}")).for_stderr().dim()));
        }
    }
    lines
}

/// Words on lines of `width` columns.
fn wrap(text: &str, width: usize) -> Vec<String> {
    let mut lines = vec![String::new()];
    for word in plain(text).split(' ') {
        let word = truncate_str(word, width, "…");
        if let Some(line) = lines.last_mut() {
            match measure_text_width(line) {
                0 => line.push_str(&word),
                used if used + 1 + measure_text_width(&word) <= width => {
                    line.push(' ');
                    line.push_str(&word);
                }
                _ => lines.push(word.into_owned()),
            }
        }
    }
    lines
}

/// `42 s`, `4 min 12 s`, `2 h 5 min`, `3 d 4 h`.
pub fn span(seconds: f64) -> String {
    let whole = seconds.max(0.0).round() as u64;
    match (whole / 86_400, whole / 3600 % 24, whole / 60 % 60, whole % 60) {
        (0, 0, 0, s) => format!("{s} s"),
        (0, 0, min, s) => format!("{min} min {s} s"),
        (0, h, min, _) => format!("{h} h {min} min"),
        (d, h, ..) => format!("{d} d {h} h"),
    }
}

/// Lines for a log: each stage whose figures are others than when it was told last.
#[derive(Debug, Default)]
pub struct Changes {
    told: HashMap<String, String>,
}

impl Changes {
    /// The stages that have changed.
    pub fn of<'a>(&mut self, status: &'a RunStatus) -> Vec<&'a StageStatus> {
        let changed = |stage: &&StageStatus| {
            let StageStatus { state, rows_in, rows_out, tokens_out, latest, .. } = stage;
            let now = format!("{} {state:?} {rows_in} {rows_out} {tokens_out} {}", status.round, figures(latest));
            self.told.insert(stage.name.clone(), now.clone()).as_ref() != Some(&now)
        };
        status.stages.iter().filter(changed).collect()
    }
}

/// `round 1/3 sample   running     56 → 96 ...`, without colours.
pub fn log_line(status: &RunStatus, stage: &StageStatus, pace: &Pace) -> String {
    let line = stage_line(status.round, stage, pace, name_width(status));
    format!("round {}/{} {}", status.round, status.rounds, strip_ansi_codes(&line))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

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
            queue_share: Some(0.5),
            waits_for: Some("rows of sample".into()),
            seconds: 10.0,
            progress: Some(0.257),
            progress_reused: 0.0,
            rest_seconds: None,
            latest: Vec::new(),
        }
    }

    fn run(seconds: f64, stages: Vec<StageStatus>) -> RunStatus {
        let (finished, edges, flow) = (Vec::new(), Vec::new(), "tiny".to_owned());
        let remaining_seconds = Some(7500.0);
        RunStatus { flow, round: 1, rounds: 3, seconds, remaining_seconds, finished, stages, edges, ended: false }
    }

    fn plain_text(lines: &[String]) -> String {
        strip_ansi_codes(&lines.join("\n")).into_owned()
    }

    #[test]
    fn a_line_says_rows_rate_tokens_share_queue_and_what_it_waits_for() {
        let text = plain_text(&frame(&run(252.0, vec![stage()]), &Pace::default(), &[], "", 200, 50));
        for part in
            ["tiny  round 1 of 3  4 min 12 s  about 2 h 5 min left", "judge", "running", "40 → 20", "2.0/s", "40 tok/s"]
                .into_iter()
                .chain(["25 %", "[####----]", "3 reused", "waits for rows of sample"])
        {
            assert!(text.contains(part), "{part} in {text}");
        }
    }

    #[test]
    fn an_edge_without_a_bound_shows_its_rows() {
        assert_eq!(queue(&StageStatus { queue_share: None, ..stage() }), "[512 rows]");
    }

    #[test]
    fn rates_are_those_of_the_last_seconds() {
        let mut pace = Pace::default();
        // Nothing for 100 seconds, then 5 rows and 50 tokens a second.
        for second in 0..=130 {
            let done = 5 * (second.max(100) - 100);
            let at =
                StageStatus { rows_in: 1, rows_out: done, tokens_out: 10 * done, seconds: second as f64, ..stage() };
            pace.look(&run(second as f64, vec![at.clone()]));
            if second == 130 {
                assert_eq!(pace.of(1, &at), (5.0, 50.0));
                assert!(pace.looks.values().all(|looks| looks.len() < 15));
                let ended = StageStatus { state: StageState::Done, ..at };
                assert!((pace.of(1, &ended).0 - 150.0 / 130.0).abs() < 1e-9);
            }
        }
    }

    #[test]
    fn training_shows_the_last_step_beside_the_last_evaluation() {
        let evaluation = json!({"event": "evaluation", "step": 8, "eval_loss": 0.69, "eval_rewards/margins": 0.02});
        let step = json!({"event": "step", "step": 9, "loss": 0.5, "rewards/margins": 0.25});
        let text = figures(&[evaluation, step]);
        assert_eq!(text, "step 9, loss 0.5000, margin 0.2500, validation loss 0.6900, validation margin 0.0200");
    }

    #[test]
    fn no_line_is_wider_and_no_view_higher_than_the_terminal() {
        let hostile_name = "\u{1b}]52;c;eA==\u{7}\u{1b}[2J\u{202e}\r\n";
        let hostile = "\u{1b}[2J\u{7}once\r\nupon a time ".repeat(50);
        let sample = Sample {
            place: "judge, row 1".into(),
            texts: vec![("prompt", hostile), ("chosen", "日本語".repeat(90))],
        };
        let samples = [sample.clone(), sample];
        let name = format!("a_very_long_name_of_a_stage{hostile_name}");
        let waits_for = Some(hostile_name.to_owned());
        let mut status = run(5.0, vec![StageStatus { name, waits_for, ..stage() }]);
        status.flow = hostile_name.into();
        for (width, height) in [(40, 6), (80, 24), (200, 10)] {
            let lines = frame(&status, &Pace::default(), &samples, "s: samples", width, height);
            assert!(lines.len() <= height && lines.len() > 2);
            assert!(lines.iter().all(|line| measure_text_width(line) <= width), "{}", plain_text(&lines));
            assert!(!plain_text(&lines).contains(['\u{7}', '\r', '\u{1b}', '\u{202e}']));
        }
    }

    #[test]
    fn a_low_terminal_says_how_many_stages_it_hides() {
        let text = plain_text(&frame(&run(5.0, vec![stage(); 9]), &Pace::default(), &[], "", 100, 5));
        assert!(text.contains("… 6 more stages"), "{text}");
    }

    #[test]
    fn a_loss_that_is_no_number_is_told() {
        let text = strip_ansi_codes(&figures(&[json!({"step": 3, "loss": null})])).into_owned();
        assert_eq!(text, "step 3, loss not finite");
    }

    #[test]
    fn what_stands_still_is_not_told_again() {
        let mut changes = Changes::default();
        assert_eq!(changes.of(&run(1.0, vec![stage()])).len(), 1);
        assert_eq!(changes.of(&run(2.0, vec![stage()])).len(), 0);
        assert_eq!(changes.of(&run(3.0, vec![StageStatus { rows_out: 21, ..stage() }])).len(), 1);
    }

    #[test]
    fn times_are_for_people() {
        assert_eq!(
            [0.4, 42.0, 252.0, 7500.0, 275_000.0].map(span),
            ["0 s", "42 s", "4 min 12 s", "2 h 5 min", "3 d 4 h"]
        );
    }
}
