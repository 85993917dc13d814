//! The flow of a command line: what `run` and `check` share.

use super::FlowArgs;
use flowrun::embed::Engine;
use flowrun::flow::{Flow, FlowError};

/// The flow of a command line: files, `--set`, `--try` and `--device`.
pub fn load(args: &FlowArgs, engine: &Engine) -> Result<Flow, FlowError> {
    let mut sets = args.sets.clone();
    let mut flow = Flow::load(&args.files, &sets, engine)?;
    if let Some(rows) = args.trial {
        sets.extend(shorten(&flow, rows));
        flow = Flow::load(&args.files, &sets, engine)?;
    }
    flow.device_override.clone_from(&args.device);
    Ok(flow)
}

/// `--try N` as `--set` entries: one round of `rows` prompts, short answers, one epoch, a run
/// directory of its own.
fn shorten(flow: &Flow, rows: u32) -> Vec<String> {
    const SHORT_ANSWER: i64 = 64;
    let mut sets = vec!["rounds=1".to_owned(), format!("name={:?}", format!("{}-try", flow.name))];
    for stage in &flow.stages {
        let key = |name: &str| format!("stages.{}.{name}", stage.name);
        let number = |name: &str| stage.options.get(name).and_then(toml::Value::as_integer);
        match stage.kind.as_str() {
            // A strided shard takes every count-th row, so that round 1 still sees `rows`.
            "source" => {
                sets.push(format!("{}={}", key("take"), i64::from(rows) * shards(stage.options.get("shard"), flow)))
            }
            "sampler" if number("max_new_tokens").is_none_or(|n| n > SHORT_ANSWER) => {
                sets.push(format!("{}={SHORT_ANSWER}", key("max_new_tokens")));
            }
            "trainer" if number("epochs").is_some_and(|n| n > 1) => sets.push(format!("{}=1", key("epochs"))),
            // A tenth of a few rows is nothing, and a part without rows is an error.
            "split" if small_part(&stage.options, rows) => {
                let parts = stage.options.get("outputs").and_then(toml::Value::as_table);
                let parts = parts.map(|p| p.keys().collect::<Vec<_>>()).unwrap_or_default();
                let small = 1.0 / 4.0 / (parts.len().max(2) - 1) as f64;
                for (i, part) in parts.iter().enumerate() {
                    let share = if i == 0 { 0.75 } else { small };
                    sets.push(format!("{}={share}", key(&format!("outputs.{part}"))));
                }
            }
            _ => {}
        }
    }
    sets
}

fn shards(shard: Option<&toml::Value>, flow: &Flow) -> i64 {
    match shard {
        Some(toml::Value::Table(table)) => table.get("count").and_then(toml::Value::as_integer).unwrap_or(1),
        // one shard a round, and there will be one round
        Some(_) => 1,
        None => i64::from(flow.rounds.min(1)),
    }
}

fn small_part(options: &toml::Table, rows: u32) -> bool {
    let parts = options.get("outputs").and_then(toml::Value::as_table);
    parts.is_some_and(|p| p.values().any(|share| share.as_float().is_some_and(|s| s * f64::from(rows) < 2.0)))
}
