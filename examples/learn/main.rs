//! Whether the loop learns: tasks with known answers, trained over three rounds, measured on questions that are
//! never trained on.
//!
//! `cargo run --example learn -- tasks flows/data` writes the questions of `flows/iterative_rpo.toml`;
//! `cargo run --example learn -- page docs/learning.md` runs it for three seeds and once with the model as its own
//! judge, below `runs/learn`, and writes the page with the figures. A run that is there is not run again.

mod measure;
mod page;
mod tasks;

use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use flowrun::embed::{Engine, RunOptions};
use flowrun::engine::{RunEvent, Summary};
use flowrun::flow::Flow;
use tasks::{OTHERS, TASKS, Task, World, make};

const SEEDS: [u64; 3] = [0, 1, 2];

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match args.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        ["tasks", folder] => write_tasks(Path::new(folder)),
        ["page", file] => write_page(Path::new(file)).await,
        _ => Err("usage: learn tasks FOLDER | learn page FILE".into()),
    }
}

/// The training questions of three rounds, and the held-out ones of the trained and of other tasks.
fn write_tasks(folder: &Path) -> Result<(), Box<dyn Error>> {
    write(&folder.join("tasks.jsonl"), &make(World::Training, &TASKS, 96, 1))?;
    write(&folder.join("tasks_held_out.jsonl"), &make(World::HeldOut, &TASKS, 300, 2))?;
    write(&folder.join("tasks_other.jsonl"), &make(World::HeldOut, &OTHERS, 100, 3))
}

fn write(path: &Path, tasks: &[Task]) -> Result<(), Box<dyn Error>> {
    let lines = tasks.iter().map(serde_json::to_string).collect::<Result<Vec<_>, _>>()?;
    fs::write(path, lines.join("\n") + "\n")?;
    Ok(())
}

async fn write_page(file: &Path) -> Result<(), Box<dyn Error>> {
    // Before any other tensor call: libtorch asks for CUDA once.
    flowrun::torch::init();
    let mut runs = Vec::new();
    for seed in SEEDS {
        runs.push(run(&format!("rule-{seed}"), seed, &["measure"], &[]).await?);
    }
    // A judge that says nothing of use would be stopped after its first round; here it is to be seen.
    let look = ["stages.gate.otherwise=\"keep\"", "stages.gate.threshold=0.0"];
    let own = run("own-judge", 0, &["measure", "own_judge"], &look).await?;
    fs::write(file.with_file_name("learning-rounds.svg"), page::plot(&runs)?)?;
    fs::write(file, page::page(&runs, &own)?)?;
    Ok(())
}

/// `flows/iterative_rpo.toml` with these overlays, run to its end below `runs/learn`.
async fn run(name: &str, seed: u64, overlays: &[&str], sets: &[&str]) -> Result<Summary, Box<dyn Error>> {
    let engine = Engine::new();
    let overlays = overlays.iter().map(|overlay| PathBuf::from(format!("examples/learn/{overlay}.toml")));
    let files: Vec<PathBuf> = [PathBuf::from("flows/iterative_rpo.toml")].into_iter().chain(overlays).collect();
    let mut sets: Vec<String> = sets.iter().map(ToString::to_string).collect();
    sets.push(format!("seed={seed}"));
    let flow = Flow::load(&files, &sets, &engine)?;
    let run = engine.start(&flow, RunOptions::new(Path::new("runs/learn").join(name))).await?;
    let mut events = run.events();
    while let Some(event) = events.next().await {
        if let RunEvent::RoundEnded { round } = event {
            eprintln!("{name}: round {round} of {}", flow.rounds);
        }
    }
    let summary = run.wait().await;
    // The run's last words are on disk before its directory is read.
    tokio::time::sleep(Duration::from_millis(50)).await;
    match &summary.error {
        Some(error) => Err(error.to_string().into()),
        None => Ok(summary),
    }
}
