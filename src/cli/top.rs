//! `flowrun top`: look at a run of another process.

use std::path::{Path, PathBuf};

use super::out::say;
use super::screen::Screen;
use super::watch::{Source, watch};
use super::{Failure, TopArgs};
use flowrun::engine::runs;

/// Where runs are looked for when none is named.
const RUNS: &str = "runs";

/// Shows the run until it ends or is left.
pub async fn top(args: TopArgs, screen: &Screen) -> Result<(), Failure> {
    let source = match &args.run {
        Some(run) => source(run)?,
        None => Source::Directory(under_way(Path::new(RUNS))?),
    };
    let first = source.status().await.map_err(|why| unreachable(&source, &why))?;
    if args.json {
        let text = serde_json::to_string(&first.status).map_err(|e| Failure::Failed(e.to_string()))?;
        say!("{text}");
        return Ok(());
    }
    let watched = watch(&source, screen).await;
    match (&source, watched) {
        (Source::Directory(dir), Ok(())) => {
            let status = runs::info(dir)?.status;
            screen.say(&format!("{status}: {}", dir.display()));
            Ok(())
        }
        // An address is there as long as its process.
        (Source::Address(..), Err(_)) => {
            screen.say("the run has ended, or its process is gone; its directory tells how");
            Ok(())
        }
        (_, watched) => watched.map_err(Failure::Failed),
    }
}

/// `127.0.0.1:9464` or `host:9464`, `http://127.0.0.1:9464` with or without a page, or a run directory.
fn source(run: &str) -> Result<Source, Failure> {
    let with_port = run.rsplit_once(':').is_some_and(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok());
    let url = match () {
        () if run.starts_with("http://") || run.starts_with("https://") => run.to_owned(),
        () if with_port && !Path::new(run).exists() => format!("http://{run}"),
        () => return Ok(Source::Directory(directory(run)?)),
    };
    let mut url = reqwest::Url::parse(&url).map_err(|e| Failure::Wrong(format!("{run}: {e}")))?;
    url.set_path("/status");
    Source::address(url).map_err(Failure::Failed)
}

fn directory(run: &str) -> Result<PathBuf, Failure> {
    let dir = Path::new(run);
    if !dir.exists() {
        let help = "help: name a run directory, or the address that a run was given with --metrics-addr";
        return Err(Failure::Wrong(format!("there is no {run}\n  {help}")));
    }
    runs::head_of(dir)?;
    Ok(dir.into())
}

/// The run below `dir` that someone works on; of several the last that changed.
fn under_way(dir: &Path) -> Result<PathBuf, Failure> {
    let found = if dir.is_dir() { runs::list(dir)? } else { Vec::new() };
    let run = found.into_iter().find(|run| run.owner.is_some()).map(|run| run.path);
    run.ok_or_else(|| {
        let help = "help: name a run directory, or the address that a run was given with --metrics-addr";
        Failure::Wrong(format!("no run is under way below {}\n  {help}", dir.display()))
    })
}

fn unreachable(source: &Source, why: &str) -> Failure {
    let help = match source {
        Source::Address(..) => "\n  help: a run answers where its --metrics-addr says, while it goes on",
        _ => "",
    };
    Failure::Failed(format!("{why}{help}"))
}
