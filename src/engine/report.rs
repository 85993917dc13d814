//! What `report.html` shows of a run: collected from its directory, and while it goes on from its books.

use std::fs;
use std::io::{self, BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use datafusion::arrow::array::AsArray;
use datafusion::arrow::datatypes::{UInt32Type, UInt64Type};
use serde_json::{Map, Value, json};

use super::error::RunError;
use super::names::{self, LOG};
use super::samples::{Sampled, Shows, Tables};
use super::{runs, table};
use crate::observe::queues::Queue;
use crate::observe::report;
use crate::observe::trace::{Interval, coarse, from_chrome_json};

/// Rows that can be read in it, of all rounds together.
const ROWS: usize = 600;
/// Of each table at least.
const LEAST_ROWS: usize = 20;
const INTERVALS: usize = 4000;
const STEPS: usize = 2000;
const DEAD_LETTERS: usize = 200;

/// The parts of a report that are not read from the run's directory.
pub(super) struct Books<'a> {
    /// As in `summary.json`.
    pub summary: &'a Value,
    pub rounds_planned: u32,
    pub intervals: &'a [Interval],
    pub queues: &'a [Queue],
}

/// Writes `RUN/report.html`.
pub(super) fn write(dir: &Path, books: &Books<'_>, tables: &mut Tables) -> io::Result<()> {
    table::write_atomically(&dir.join(names::REPORT), report::page(&[collect(dir, books, tables)]).as_bytes())
}

/// Writes the report of a run that nobody works on; for one that goes on, `RUN/report.html` is kept up to date by it.
///
/// # Errors
/// The directory is no run's (domain `User`), or it can't be written (`External`).
pub fn write_report(dir: &Path) -> Result<PathBuf, RunError> {
    let path = dir.join(names::REPORT);
    let kept_by_its_run = runs::owner(dir).is_some() && path.exists();
    if !kept_by_its_run {
        let page = report::page(&[read(dir)?]);
        table::write_atomically(&path, page.as_bytes()).map_err(|e| failed(&path, &e))?;
    }
    Ok(path)
}

/// Writes one page of all these runs; several are shown side by side.
///
/// # Errors
/// A directory is no run's (domain `User`), or the page can't be written (`External`).
pub fn write_pages(dirs: &[PathBuf], to: &Path) -> Result<(), RunError> {
    let runs = dirs.iter().map(|dir| read(dir)).collect::<Result<Vec<_>, _>>()?;
    table::write_atomically(to, report::page(&runs).as_bytes()).map_err(|e| failed(to, &e))
}

fn failed(path: &Path, error: &io::Error) -> RunError {
    RunError::external(format!("{}: {error}", path.display()))
}

/// The figures of a run directory.
fn read(dir: &Path) -> Result<Value, RunError> {
    let info = runs::info(dir)?;
    let mut summary = json_of(&dir.join(names::SUMMARY));
    if !summary.is_object() {
        summary = json!({ "flow": info.flow, "rounds": [] });
    }
    summary["status"] = json!(info.status);
    let (intervals, queues) = from_chrome_json(&json_of(&dir.join(names::TRACE)));
    let rounds_planned = u32::try_from(info.rounds).unwrap_or(u32::MAX);
    let books = Books { summary: &summary, rounds_planned, intervals: &intervals, queues: &queues };
    Ok(collect(dir, &books, &mut Tables::default()))
}

/// What isn't there, or is half-written, has nothing to tell.
fn json_of(path: &Path) -> Value {
    fs::read(path).ok().and_then(|text| serde_json::from_slice(&text).ok()).unwrap_or_default()
}

fn collect(dir: &Path, books: &Books<'_>, tables: &mut Tables) -> Value {
    let log = log(dir);
    let (samples, histograms) = rows(dir, books.summary, tables);
    let mut run = json!({
        "name": name(dir),
        "written": SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs_f64(),
        "rounds_planned": books.rounds_planned,
        "gates": log.iter().filter(|line| line["event"] == "gate").map(gate).collect::<Vec<_>>(),
        "log": log,
        "timeline": timeline(books.intervals),
        "queues": books.queues.iter().map(queue).collect::<Vec<_>>(),
        "samples": samples,
        "histograms": histograms,
        "dead_letters": dead_letters(dir).unwrap_or_default(),
        "config": fs::read_to_string(dir.join(names::FLOW)).unwrap_or_default(),
    });
    for key in ["flow", "status", "error", "version", "seconds_wall", "peak_rss_bytes", "rounds"] {
        run[key] = books.summary[key].clone();
    }
    run
}

fn name(dir: &Path) -> String {
    let whole = dir.canonicalize().unwrap_or_else(|_| dir.into());
    whole.file_name().unwrap_or(whole.as_os_str()).to_string_lossy().into_owned()
}

/// The lines of the log: at most so many steps, evenly, and everything else whole. Read twice and never held: a run of
/// weeks has millions of steps.
fn log(dir: &Path) -> Vec<Value> {
    let lines = || {
        let file = fs::File::open(dir.join(LOG)).ok();
        file.into_iter().flat_map(|file| BufReader::new(file).lines().map_while(Result::ok))
    };
    thinned(lines(), lines()).filter_map(|line| serde_json::from_str(&line).ok()).collect()
}

fn thinned(counted: impl Iterator<Item = String>, lines: impl Iterator<Item = String>) -> impl Iterator<Item = String> {
    let is_step = |line: &String| line.contains("\"event\":\"step\"");
    let steps = counted.filter(is_step).count();
    let stride = steps.div_ceil(STEPS).max(1);
    let mut step = 0;
    lines.filter(move |line| {
        if !is_step(line) {
            return true;
        }
        step += 1;
        step == 1 || step == steps || step.is_multiple_of(stride)
    })
}

fn gate(line: &Value) -> Value {
    json!({
        "round": line["round"], "stage": line["stage"], "passed": line["passed"], "win_rate": line["win_rate"],
        "low": line["win_rate_low"], "high": line["win_rate_high"], "threshold": line["threshold"],
        "prompts": line["prompts"],
    })
}

fn timeline(intervals: &[Interval]) -> Value {
    let seconds = |us: u64| us as f64 / 1e6;
    let shown = coarse(intervals, INTERVALS);
    let shown = shown.iter().map(|i| {
        let share = i.busy_us as f64 / i.end_us.saturating_sub(i.start_us).max(1) as f64;
        json!({ "track": i.track.as_ref(), "name": i.name.as_ref(), "stage": i.stage.as_ref(), "start": seconds(i.start_us),
                "end": seconds(i.end_us), "share": (share * 1000.0).round() / 1000.0 })
    });
    let end = intervals.iter().map(|i| i.end_us).max().unwrap_or(0);
    json!({ "end": seconds(end), "intervals": shown.collect::<Vec<_>>() })
}

fn queue(queue: &Queue) -> Value {
    let points = queue.moments.iter().map(|(us, rows)| json!([*us as f64 / 1e6, rows]));
    json!({ "edge": queue.edge, "capacity": queue.capacity, "points": points.collect::<Vec<_>>() })
}

/// The stages that have rows on disk, by round, in the order of the summary.
fn stages(dir: &Path, summary: &Value) -> Vec<(u64, String)> {
    let mut stages = Vec::new();
    for round in 1.. {
        let Ok(entries) = fs::read_dir(dir.join(names::round(round))) else { break };
        let mut names: Vec<String> =
            entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
        let known = summary["rounds"].as_array().into_iter().flatten().find(|r| r["round"] == round);
        let order: Vec<&String> = known.and_then(|r| r["stages"].as_object()).into_iter().flat_map(Map::keys).collect();
        names.sort();
        names.sort_by_key(|name| order.iter().position(|known| *known == name).unwrap_or(usize::MAX));
        stages.extend(names.into_iter().map(|name| (round, name)));
    }
    stages
}

/// Rows to read and how figures are spread: of each round the pairs, or where there are none the answers.
fn rows(dir: &Path, summary: &Value, tables: &mut Tables) -> (Value, Vec<Value>) {
    let stages = stages(dir, summary);
    let each = (ROWS / stages.len().max(1)).max(LEAST_ROWS);
    let read: Vec<(u64, String, Sampled)> = stages
        .into_iter()
        .map(|(round, stage)| {
            let sampled = tables.of(&dir.join(names::round(round)).join(&stage), each);
            (round, stage, sampled)
        })
        .collect();
    let (mut rows, mut total, mut histograms) = (Vec::new(), 0, Vec::new());
    for (round, stage, sampled) in &read {
        let about = |mut value: Value| {
            value["round"] = json!(round);
            value["stage"] = json!(stage);
            value
        };
        histograms.extend(sampled.histograms().map(about));
        let most = read.iter().filter(|(r, ..)| r == round).map(|(_, _, s)| s.shows()).max().unwrap_or_default();
        if sampled.shows() == most && most != Shows::Nothing {
            total += sampled.total;
            rows.extend(sampled.rows.iter().map(|row| about(Value::Object(row.clone()))));
        }
    }
    (json!({ "shown": rows.len(), "total": total, "rows": rows }), histograms)
}

fn dead_letters(dir: &Path) -> Option<Value> {
    let (mut rows, mut total) = (Vec::new(), 0);
    for batch in table::read(&dir.join(names::DEAD_LETTERS)).ok()? {
        let text = |name: &str| batch.column_by_name(name).and_then(|c| c.as_string_opt::<i32>().cloned());
        let (stages, reasons, inputs) = (text("stage")?, text("reason")?, text("input")?);
        let row = batch.column_by_name("_row")?.as_primitive_opt::<UInt64Type>()?;
        let round = batch.column_by_name("round")?.as_primitive_opt::<UInt32Type>()?;
        total += batch.num_rows();
        rows.extend((0..batch.num_rows()).map(|i| {
            let input: String = inputs.value(i).chars().take(1000).collect();
            json!({ "round": round.value(i), "stage": stages.value(i), "row": row.value(i),
                    "reason": reasons.value(i), "input": input })
        }));
        rows.truncate(DEAD_LETTERS);
    }
    Some(json!({ "total": total, "rows": rows }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_of_many_steps_stay_and_all_else_does() {
        let line = |event: &str, step: usize| json!({ "event": event, "step": step }).to_string();
        let mut log: Vec<String> = (1..=10_000).map(|step| line("step", step)).collect();
        log.push(line("evaluation", 10_000));
        let thin = thinned(log.iter().cloned(), log.iter().cloned());
        let thin: Vec<Value> = thin.map(|line| serde_json::from_str(&line).unwrap()).collect();
        assert!((1000..=STEPS + 3).contains(&thin.len()), "{}", thin.len());
        assert_eq!((&thin[0]["step"], &thin[thin.len() - 2]["step"]), (&json!(1), &json!(10_000)));
        assert_eq!(thin.last().unwrap()["event"], "evaluation");
    }
}
