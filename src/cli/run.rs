//! `flowrun FILE`: run a flow, or go on with it.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use super::plan::{Planned, load, plan};
use super::{Failure, RunArgs};
use flowrun::engine::{AdapterRef, Domain, Ending, Run, RunConfig, RunError, RunHandle, Summary};
use flowrun::flow::{Flow, FlowError};
use flowrun::llm::Models;
use flowrun::model::{Lora, lora};
use flowrun::observe::{Trace, progress, prometheus};

pub async fn run(args: RunArgs) -> Result<(), Failure> {
    let trace = Arc::new(Trace::default());
    let flow = load(&args.flow)?;
    let (metrics, rendered) = prometheus::recorder(&flow.name).map_err(|e| Failure::Failed(format!("metrics: {e}")))?;
    let Planned { plan, models, registry } = plan(&flow, metrics.clone(), trace.clone()).await?;
    // Everything that can be wrong with a model's files is found before the run directory is touched.
    open_models(&models, &flow).await?;
    let init_adapters = init_adapters(&models, &flow).await?;
    if let Some(address) = args.metrics_addr {
        let bound = prometheus::serve(address, rendered).await;
        let bound = bound.map_err(|e| Failure::Wrong(format!("--metrics-addr {address}: {e}")))?;
        eprintln!("metrics: http://{bound}/metrics");
    }

    let dir = args.output.unwrap_or_else(|| Path::new("runs").join(&flow.name));
    let config = RunConfig {
        rounds: plan.rounds,
        flow_name: flow.name.clone(),
        flow_text: flow.to_toml(),
        dir,
        fresh: args.fresh,
        recompute: args.recompute,
        registry,
        metrics,
        trace,
        seed: flow.seed,
        deterministic: flow.deterministic,
        max_dead_letters: flow.max_dead_letters,
        init_adapters,
    };
    let run = Run::new(config)?.start();
    let shown = progress::show({
        let run = run.clone();
        move || run.status()
    });
    tokio::spawn(stop_on_signal(run.clone()));
    let summary = run.wait().await;
    // It ends by itself once the run has.
    let _ = shown.await;
    ended(&summary)
}

impl From<RunError> for Failure {
    fn from(error: RunError) -> Self {
        match error.domain {
            Domain::User => Self::Wrong(error.to_string()),
            _ => Self::Failed(error.to_string()),
        }
    }
}

/// The first Ctrl-C or SIGTERM drains to the next durable point, the second ends at once; both
/// leave a run that can be resumed.
async fn stop_on_signal(run: RunHandle) {
    use tokio::signal::unix::{SignalKind, signal};
    let Ok(mut terminate) = signal(SignalKind::terminate()) else { return };
    for second in [false, true] {
        tokio::select! {
            _ = tokio::signal::ctrl_c() => {}
            _ = terminate.recv() => {}
        }
        if second {
            std::process::exit(130);
        }
        eprintln!("stopping at the next durable point; once more to stop at once");
        run.cancel();
    }
}

async fn open_models(models: &Models, flow: &Flow) -> Result<(), Failure> {
    for name in flow.models.keys() {
        let opened = models.text(name).await;
        opened.map_err(|e| flow.places.attach(FlowError::new(format!("models.{name}.source"), e.to_string())))?;
    }
    Ok(())
}

/// The adapters that trainers start from, checked against their models.
async fn init_adapters(models: &Models, flow: &Flow) -> Result<BTreeMap<String, AdapterRef>, Failure> {
    let mut adapters = BTreeMap::new();
    for stage in flow.stages.iter().filter(|s| s.kind == "trainer") {
        let text = |key: &str| stage.options.get(key).and_then(toml::Value::as_str);
        let (Some(dir), Some(model)) = (text("init_adapter"), text("model")) else { continue };
        let dir = flow.base.join(dir);
        let wrong = |message: String| {
            flow.places.attach(FlowError::new(format!("stages.{}.init_adapter", stage.name), message))
        };
        let config = models.text(model).await.map_err(|e| wrong(e.to_string()))?.pretrained().config.clone();
        let read = move || -> Result<AdapterRef, flowrun::model::ModelError> {
            Lora::load(&dir, &config, tch::Device::Cpu)?;
            Ok(AdapterRef { hash: lora::content_hash(&dir)?, dir, round: 0 })
        };
        let adapter = tokio::task::spawn_blocking(read).await.map_err(|e| Failure::Failed(e.to_string()))?;
        adapters.insert(stage.name.clone(), adapter.map_err(|e| wrong(e.to_string()))?);
    }
    Ok(adapters)
}

fn ended(summary: &Summary) -> Result<(), Failure> {
    print_table(&summary.json, &summary.dir);
    match (summary.status, &summary.error) {
        (Ending::Done, _) => Ok(()),
        (Ending::Interrupted, _) => Err(Failure::Interrupted("interrupted; the same command goes on from here".into())),
        (Ending::Failed, Some(error)) => Err(error.clone().into()),
        (Ending::Failed, None) => Err(Failure::Failed("the run failed".into())),
    }
}

/// The figures of a run, a line a round and stage, on stdout.
fn print_table(summary: &serde_json::Value, dir: &Path) {
    let empty = Vec::new();
    println!(
        "{:<6} {:<12} {:>8} {:>8} {:>8} {:>9} {:>9}",
        "round", "stage", "rows in", "out", "reused", "tokens", "busy s"
    );
    for round in summary["rounds"].as_array().unwrap_or(&empty) {
        let stages = round["stages"].as_object();
        for (name, stage) in stages.into_iter().flatten() {
            let count = |key: &str| stage[key].as_u64().unwrap_or(0);
            println!(
                "{:<6} {name:<12} {:>8} {:>8} {:>8} {:>9} {:>9.1}",
                round["round"].as_u64().unwrap_or(0),
                count("rows_in"),
                count("rows_out"),
                count("reused_rows"),
                count("tokens_out"),
                stage["seconds_busy"].as_f64().unwrap_or(0.0),
            );
        }
        print_training(round);
    }
    println!("{}: {}", summary["status"].as_str().unwrap_or("?"), dir.display());
}

fn print_training(round: &serde_json::Value) {
    let train = &round["train"];
    let Some(steps) = train["steps"].as_u64() else { return };
    let figure = |value: &serde_json::Value| value.as_f64().map_or("-".to_owned(), |v| format!("{v:.4}"));
    let eval = &train["eval"];
    let validation = match &eval["eval_rewards/margins"] {
        serde_json::Value::Null => format!("loss {}", figure(&eval["eval_loss"])),
        margin => format!("margin {}, accuracy {}", figure(margin), figure(&eval["eval_rewards/accuracies"])),
    };
    let [first, last] = ["first_loss", "last_loss"].map(|key| figure(&train[key]));
    println!("       {steps} steps, loss {first} to {last}, validation {validation}");
}
