//! `flowrun top`: look at a run of another process.

use std::net::SocketAddr;
use std::path::Path;

use super::screen::Screen;
use super::watch::{Source, watch};
use super::{Failure, TopArgs};
use flowrun::engine::runs;

/// Shows the run until it ends or is left.
pub async fn top(args: TopArgs, screen: &Screen) -> Result<(), Failure> {
    let source = source(&args.run)?;
    let first = source.status().await.map_err(|why| unreachable(&source, &why))?;
    if args.json {
        let text = serde_json::to_string(&first).map_err(|e| Failure::Failed(e.to_string()))?;
        println!("{text}");
        return Ok(());
    }
    let gone = |why: String| Failure::Failed(format!("the run can't be seen any more: {why}"));
    watch(&source, screen).await.map_err(gone)?;
    if let Source::Directory(dir) = &source {
        let info = runs::info(dir)?;
        eprintln!("{}: {}", info.status, dir.display());
    }
    Ok(())
}

/// `127.0.0.1:9464`, `http://127.0.0.1:9464` with or without a page, or a run directory.
fn source(run: &str) -> Result<Source, Failure> {
    let url = match run.parse::<SocketAddr>() {
        Ok(address) => format!("http://{address}/status"),
        Err(_) if run.starts_with("http://") || run.starts_with("https://") => run.to_owned(),
        Err(_) => return directory(run),
    };
    let mut url = reqwest::Url::parse(&url).map_err(|e| Failure::Wrong(format!("{run}: {e}")))?;
    url.set_path("/status");
    Ok(Source::Address(url))
}

fn directory(run: &str) -> Result<Source, Failure> {
    let dir = Path::new(run);
    if !dir.exists() {
        let help = "help: name a run directory, or the address that a run was given with --metrics-addr";
        return Err(Failure::Wrong(format!("there is no {run}\n  {help}")));
    }
    runs::plan_of(dir)?;
    Ok(Source::Directory(dir.into()))
}

fn unreachable(source: &Source, why: &str) -> Failure {
    let help = match source {
        Source::Address(_) => "\n  help: a run answers where its --metrics-addr says, while it goes on",
        _ => "",
    };
    Failure::Failed(format!("{why}{help}"))
}
