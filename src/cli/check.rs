//! `flowrun check FILE`: the plan, before anything is loaded.

use std::collections::BTreeMap;
use std::fmt::Write;

use super::out;
use super::plan::load;
use super::{CheckArgs, Failure};
use flowrun::embed::engine::role;
use flowrun::embed::{Engine, Planned, RunOptions};
use flowrun::flow::Plan;
use flowrun::llm::Models;

pub async fn check(args: CheckArgs) -> Result<(), Failure> {
    let engine = Engine::new();
    let flow = load(&args.flow, &engine)?;
    let Planned { plan, models, .. } =
        engine.planned(&flow, RunOptions::new(args.diff.clone().unwrap_or_default())).await?;
    if let Some(run) = &args.diff {
        return super::runs::diff(run, &plan, args.json);
    }
    out::print(&plan.explain());
    out::print(&flow.masks.text(&memory(&plan, &models).await));
    Ok(())
}

/// Weights and KV cache a device, from the models' headers.
async fn memory(plan: &Plan, models: &Models) -> String {
    let mut devices: BTreeMap<String, Vec<&str>> = BTreeMap::new();
    for stage in plan.rounds.iter().flat_map(|r| &r.stages) {
        for client in &stage.plan.models {
            for device in &client.devices {
                let names = devices.entry(models.place(device, role(&stage.spec.kind))).or_default();
                if !names.contains(&client.model.as_str()) {
                    names.push(&client.model);
                }
            }
        }
    }
    // All models may be at endpoints.
    let mut text = String::from(if devices.is_empty() { "" } else { "\ndevices\n" });
    for (device, names) in devices {
        for name in names {
            let line = match models.text(name).await {
                Ok(model) => {
                    let config = &model.pretrained().config;
                    let size = model.kind.elt_size_in_bytes();
                    let weights = config.parameters().saturating_mul(size as u64);
                    let token = config.kv_bytes(1, size) as u64;
                    format!("{name}, weights {}, KV cache {} a token", bytes(weights), bytes(token))
                }
                Err(error) => format!("not checked: {name} ({error})"),
            };
            // Writing to a string can't fail.
            let _ = writeln!(text, "  {device}: {line}");
        }
    }
    text
}

fn bytes(count: u64) -> String {
    const MIB: f64 = 1024.0 * 1024.0;
    let mib = count as f64 / MIB;
    if mib >= 1.0 { format!("{mib:.0} MiB") } else { format!("{:.1} KiB", mib * 1024.0) }
}
