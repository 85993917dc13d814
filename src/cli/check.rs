//! `flowrun check FILE`: the plan, before anything is loaded.

use std::collections::BTreeMap;
use std::fmt::Write;

use super::out;
use super::plan::load;
use super::{CheckArgs, Failure};
use flowrun::embed::engine::{role, unopened};
use flowrun::embed::{Engine, Planned, RunOptions};
use flowrun::flow::{FlowError, HubAnswer, Plan};
use flowrun::llm::{LlmError, Models};
use flowrun::model::lora::checked_hash;

pub async fn check(args: CheckArgs) -> Result<(), Failure> {
    HubAnswer::within(checked(args)).await
}

async fn checked(args: CheckArgs) -> Result<(), Failure> {
    let engine = Engine::new();
    let flow = load(&args.flow, &engine)?;
    let Planned { plan, models, .. } =
        engine.planned(&flow, RunOptions::new(args.diff.clone().unwrap_or_default())).await?;
    if let Some(run) = &args.diff {
        return super::runs::diff(run, &plan, args.json);
    }
    check_places(&plan, &models).await.map_err(|error| plan.flow.masks.error(error))?;
    out::print(&plan.explain());
    out::print(&flow.masks.text(&memory(&plan, &models).await));
    if let Some(silence) = HubAnswer::known() {
        out::print(&flow.masks.text(&format!("\nhub\n  not checked: {}\n", silence.message)));
    }
    Ok(())
}

/// Refuses models, devices and adapters that are not there. What only the hub has, and the hub can't be reached, is
/// not checked.
async fn check_places(plan: &Plan, models: &Models) -> Result<(), FlowError> {
    let flow = &plan.flow;
    let wrong = |key: String, message: String| flow.places.attach(FlowError::new(key, message));
    for (name, _) in flow.models.iter().filter(|(_, spec)| spec.endpoint.is_none()) {
        match models.text(name).await {
            Ok(_) | Err(LlmError::Unreachable(_)) => {}
            Err(error) => return Err(unopened(flow, name, &error)),
        }
    }
    for stage in plan.rounds.iter().flat_map(|r| &r.stages) {
        let key = |key: &str| format!("stages.{}.{key}", stage.spec.name);
        for device in stage.plan.models.iter().flat_map(|client| &client.devices) {
            models
                .check_device(device, role(&stage.spec.kind))
                .map_err(|error| wrong(key("device"), error.to_string()))?;
        }
        let init = stage.spec.options.get("init_adapter").and_then(toml::Value::as_str);
        if let (Some(dir), Some(model)) = (init, &stage.plan.trains)
            && let Ok(text) = models.text(model).await
        {
            checked_hash(&flow.base.join(dir), &text.pretrained().config)
                .map_err(|error| wrong(key("init_adapter"), error.to_string()))?;
        }
    }
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
