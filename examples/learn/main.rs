//! Whether the loop learns: tasks with known answers, trained over three rounds, measured on questions that were
//! never trained on.
//!
//! `cargo run --example learn -- tasks flows/data` writes the questions of `flows/iterative_rpo.toml`.

mod tasks;

use std::error::Error;
use std::fs;
use std::path::Path;

use tasks::{OTHERS, TASKS, Task, World, make};

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match args.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        ["tasks", folder] => write_tasks(Path::new(folder)),
        _ => Err("usage: learn tasks FOLDER".into()),
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
