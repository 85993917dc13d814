//! Verbs over run directories: `runs`, `gc`, and what `check --diff` prints.

use std::path::Path;

use super::out::{self, say};
use super::{Failure, GcArgs, RunsArgs};
use flowrun::arrow::temporal_conversions::timestamp_s_to_datetime;
use flowrun::engine::runs;
use flowrun::flow::{Change, Plan};
use serde_json::json;

/// A line a run directory, the last changed first.
pub fn runs(args: &RunsArgs) -> Result<(), Failure> {
    let found = runs::list(&args.dir)?;
    if args.json {
        found.iter().for_each(|run| say!("{}", json!(run)));
        return Ok(());
    }
    if found.is_empty() {
        out::complain(&format!("no run below {}", args.dir.display()));
        return Ok(());
    }
    say!("{:<24} {:<15} {:>7} {:>17} {:>9} {:>10}", "run", "status", "rounds", "changed (UTC)", "wall s", "size");
    for run in found {
        let changed = timestamp_s_to_datetime(run.changed as i64);
        let changed = changed.map(|t| t.format("%Y-%m-%d %H:%M").to_string()).unwrap_or_default();
        let wall = run.seconds_wall.map_or("-".into(), |s| format!("{s:.1}"));
        let name = run.path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        let rounds = format!("{}/{}", run.rounds_done, run.rounds);
        say!("{name:<24} {:<15} {rounds:>7} {changed:>17} {wall:>9} {:>10}", run.status, size(run.bytes));
    }
    Ok(())
}

pub fn gc(args: &GcArgs) -> Result<(), Failure> {
    for run in &args.runs {
        let garbage = runs::collect_garbage(run, args.dry_run)?;
        let what = if args.dry_run { "would delete" } else { "deleted" };
        say!("{}: {what} {} files, {}", run.display(), garbage.files.len(), size(garbage.bytes));
        if args.dry_run {
            garbage.files.iter().for_each(|file| say!("  {}", file.display()));
        }
    }
    Ok(())
}

/// What a run of `plan` would find in the directory `run`.
pub fn diff(run: &Path, plan: &Plan, json: bool) -> Result<(), Failure> {
    let changes = runs::plan_of(run)?.compare(&plan.rounds);
    for change in &changes {
        let rows = runs::recorded_rows(run, change.round, &change.stage);
        if json {
            let mut line = json!(change);
            line["recorded_rows"] = json!(rows);
            say!("{line}");
        } else {
            say!("{}", told(change, rows));
        }
    }
    Ok(())
}

fn told(change: &Change, rows: Option<usize>) -> String {
    let Change { round, stage, fate, causes } = change;
    let rows = rows.map(|rows| format!(" ({rows} rows recorded)")).unwrap_or_default();
    let causes = if causes.is_empty() { String::new() } else { format!(": {}", causes.join(", ")) };
    format!("round {round}  {stage:<12} {fate}{causes}{rows}")
}

fn size(bytes: u64) -> String {
    const MIB: f64 = 1024.0 * 1024.0;
    let mib = bytes as f64 / MIB;
    if mib >= 1.0 { format!("{mib:.1} MiB") } else { format!("{:.1} KiB", mib * 1024.0) }
}
