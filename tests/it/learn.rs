//! The tasks of `flows/iterative_rpo.toml`: what is held out is never trained on.

use std::collections::{BTreeSet, HashSet};
use std::path::Path;

use serde_json::Value;

#[allow(dead_code)]
#[path = "../../examples/learn/tasks.rs"]
mod tasks;

use tasks::{OTHERS, TASKS, Task, World, make};

fn read(name: &str) -> Vec<Value> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("flows/data").join(name);
    std::fs::read_to_string(path).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// What a question asks about, whatever the order: its numbers, or each of its words.
fn subjects(rows: &[Value]) -> HashSet<BTreeSet<String>> {
    let mut all = HashSet::new();
    for row in rows {
        let prompt = row["prompt"].as_str().unwrap();
        let numbers: BTreeSet<String> =
            prompt.split(|c: char| !c.is_ascii_digit()).filter(|n| !n.is_empty()).map(str::to_owned).collect();
        if !numbers.is_empty() {
            all.insert(numbers);
            continue;
        }
        let list = prompt.split(": ").nth(1).unwrap().split('?').next().unwrap();
        all.extend(list.split(", ").map(|word| BTreeSet::from([word.to_owned()])));
    }
    all
}

#[test]
fn nothing_that_is_held_out_is_trained_on() {
    let trained = subjects(&read("tasks.jsonl"));
    for held_out in ["tasks_held_out.jsonl", "tasks_other.jsonl"] {
        let held_out = subjects(&read(held_out));
        assert!(held_out.len() > 100);
        assert_eq!(trained.intersection(&held_out).collect::<Vec<_>>(), Vec::<&BTreeSet<String>>::new());
    }
}

#[test]
fn the_files_are_what_the_generator_makes_and_the_answers_are_right() {
    let same = |name: &str, made: Vec<Task>| {
        let made: Vec<Value> = made.iter().map(|task| serde_json::to_value(task).unwrap()).collect();
        assert_eq!(read(name), made, "{name}: cargo run --example learn -- tasks flows/data");
        made
    };
    let trained = same("tasks.jsonl", make(World::Training, &TASKS, 96, 1));
    let held_out = same("tasks_held_out.jsonl", make(World::HeldOut, &TASKS, 300, 2));
    same("tasks_other.jsonl", make(World::HeldOut, &OTHERS, 100, 3));
    for row in trained.iter().chain(&held_out) {
        let (prompt, answer) = (row["prompt"].as_str().unwrap(), row["answer"].as_str().unwrap());
        let numbers: Vec<u64> = prompt.split(|c: char| !c.is_ascii_digit()).filter_map(|n| n.parse().ok()).collect();
        let right = match row["task"].as_str().unwrap() {
            "sum" => numbers.iter().sum::<u64>().to_string(),
            "largest" => numbers.iter().max().unwrap().to_string(),
            _ => prompt.split('?').next().unwrap().rsplit(", ").next().unwrap().to_owned(),
        };
        assert_eq!(answer, right, "{prompt}");
    }
    let count = |rows: &[Value], task: &str| rows.iter().filter(|row| row["task"] == task).count();
    assert!(TASKS.iter().all(|task| count(&trained, task) == 96 && count(&held_out, task) == 300));
}
