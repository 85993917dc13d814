//! `flowrun FILE`: run a flow, or go on with it.

use std::net::SocketAddr;
use std::path::Path;

use super::log::LogFormat;
use super::out::say;
use super::plan::load;
use super::screen::Screen;
use super::watch::{Source, watch};
use super::{Failure, RunArgs};
use flowrun::embed::{Engine, RunOptions};
use flowrun::engine::{Domain, Ending, RunError, RunHandle, Summary};
use flowrun::observe::prometheus;
use flowrun::observe::server::Server;

pub async fn run(args: RunArgs, screen: &Screen) -> Result<(), Failure> {
    let engine = Engine::new();
    let flow = load(&args.flow, &engine)?;
    screen.mask(flow.masks.clone());
    let (metrics, rendered) =
        prometheus::recorder(&flow.masks.text(&flow.name)).map_err(|e| Failure::Failed(format!("metrics: {e}")))?;
    let server = match args.metrics_addr {
        Some(address) => Some(serve(address, screen).await?),
        None => None,
    };
    let dir = args.output.unwrap_or_else(|| Path::new("runs").join(&flow.name));
    let options = RunOptions::new(dir.clone()).fresh(args.fresh).recompute(args.recompute).metrics(metrics);
    let options = options.retry_dead(args.retry_dead);
    let options = match args.resume_from {
        Some(run) => options.fork_of(run),
        None => options,
    };
    let run = engine.start(&flow, options).await?;
    if let Some(server) = server {
        let run = run.clone();
        server.serve(rendered, move || run.status());
    }
    tokio::spawn(stop_on_signal(run.clone(), screen.clone()));
    if run.was_finished() && screen.format == LogFormat::Text {
        screen.say("the run is finished and nothing is left to do; its figures:");
        return ended(&run.wait().await);
    }
    let shown = tokio::spawn({
        let (source, screen) = (Source::Run(run.clone(), dir), screen.clone());
        async move { watch(&source, &screen).await }
    });
    let summary = run.wait().await;
    // It ends by itself once the run has.
    let _ = shown.await;
    ended(&summary)
}

/// Takes the address, so that one that can't be had is told before anything is loaded.
async fn serve(address: SocketAddr, screen: &Screen) -> Result<Server, Failure> {
    let wrong = |e: std::io::Error| Failure::Wrong(format!("--metrics-addr {address}: {e}"));
    let server = Server::bind(address).await.map_err(wrong)?;
    screen.say(&format!("metrics: http://{}/metrics", server.address().map_err(wrong)?));
    Ok(server)
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
async fn stop_on_signal(run: RunHandle, screen: Screen) {
    use tokio::signal::unix::{SignalKind, signal};
    let Ok(mut terminate) = signal(SignalKind::terminate()) else { return };
    for second in [false, true] {
        tokio::select! {
            _ = tokio::signal::ctrl_c() => {}
            _ = terminate.recv() => {}
        }
        if second {
            screen.close_keys();
            std::process::exit(130);
        }
        screen.say("stopping at the next durable point; once more to stop at once");
        run.cancel();
    }
}

fn ended(summary: &Summary) -> Result<(), Failure> {
    print_table(&summary.json, &summary.dir);
    match (summary.status, &summary.error) {
        (Ending::Done | Ending::StoppedByGate, _) => Ok(()),
        (Ending::Interrupted, _) => Err(Failure::Interrupted("interrupted; the same command goes on from here".into())),
        (Ending::Failed, Some(error)) => Err(error.clone().into()),
        (Ending::Failed, None) => Err(Failure::Failed("the run failed".into())),
    }
}

/// The figures of a run, a line a round and stage, on stdout.
fn print_table(summary: &serde_json::Value, dir: &Path) {
    let empty = Vec::new();
    say!(
        "{:<6} {:<12} {:>8} {:>8} {:>8} {:>9} {:>9}",
        "round",
        "stage",
        "rows in",
        "out",
        "reused",
        "tokens",
        "busy s"
    );
    for round in summary["rounds"].as_array().unwrap_or(&empty) {
        let stages = round["stages"].as_object();
        for (name, stage) in stages.into_iter().flatten() {
            let count = |key: &str| stage[key].as_u64().unwrap_or(0);
            say!(
                "{:<6} {name:<12} {:>8} {:>8} {:>8} {:>9} {:>9.1}",
                round["round"].as_u64().unwrap_or(0),
                count("rows_in"),
                count("rows_out"),
                count("reused_rows"),
                count("tokens_out"),
                stage["seconds_busy"].as_f64().unwrap_or(0.0),
            );
        }
        if let Some(dead) = round["dead_letters"].as_u64().filter(|dead| *dead > 0) {
            say!("       {dead} rows were given up: {}", dir.join("dead_letters.parquet").display());
        }
        print_training(round);
    }
    say!("{}: {}", summary["status"].as_str().unwrap_or("?"), dir.display());
}

fn print_training(round: &serde_json::Value) {
    let dropped = round["train"]["dropped"].as_object().into_iter().flatten();
    let dropped: Vec<String> = dropped.map(|(reason, times)| format!("{reason} ({times})")).collect();
    if !dropped.is_empty() {
        say!("       pairs that were left out: {}", dropped.join(", "));
    }
    let train = &round["train"];
    let Some(steps) = train["steps"].as_u64() else { return };
    let figure = |value: &serde_json::Value| value.as_f64().map_or("-".to_owned(), |v| format!("{v:.4}"));
    let eval = &train["eval"];
    let validation = match (&eval["eval_rewards/margins"], &eval["eval_loss"]) {
        (serde_json::Value::Null, serde_json::Value::Null) => String::new(),
        (serde_json::Value::Null, loss) => format!(", validation loss {}", figure(loss)),
        (margin, _) => {
            let accuracy = figure(&eval["eval_rewards/accuracies"]);
            format!(", validation margin {}, accuracy {accuracy}", figure(margin))
        }
    };
    let [first, last] = ["first_loss", "last_loss"].map(|key| figure(&train[key]));
    say!("       {steps} steps, loss {first} to {last}{validation}");
}
