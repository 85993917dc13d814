//! Any acyclic graph is a flow: the shipped ones with more than one path, on the tiny model.

use std::path::Path;

use serde_json::Value;

use crate::support::{Case, stderr, tiny_model};

/// Runs a shipped flow on the tiny model over its own data; the lines of its sink.
fn run(case: &Case, name: &str, sink: &str, sets: &[&str]) -> Vec<Value> {
    let flow = Path::new(env!("CARGO_MANIFEST_DIR")).join("flows/graphs").join(format!("{name}.toml"));
    let source = format!("models.policy.source={:?}", tiny_model().display().to_string());
    let mut args = vec![flow.to_str().unwrap(), "--set", &source, "--set", "models.policy.dtype=\"f32\""];
    args.extend(["--output", "runs/tiny"]);
    args.extend(sets.iter().flat_map(|set| ["--set", set]));
    case.done(&args);
    let text = std::fs::read_to_string(case.path("runs/tiny").join(sink)).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn column<'a>(rows: &'a [Value], name: &str) -> Vec<&'a Value> {
    rows.iter().map(|row| &row[name]).collect()
}

#[test]
fn what_went_two_ways_meets_again() {
    let case = Case::new(0, "");
    let rows = run(&case, "diamond", "judged.jsonl", &[]);
    assert_eq!(rows.len(), 24, "one pair a prompt, on both ways");
    let verdicts = case.texts(1, "judge/rows", "verdict");
    assert_eq!(
        column(&rows, "verdict"),
        verdicts.iter().map(|v| v.as_str()).map(Value::from).collect::<Vec<_>>().iter().collect::<Vec<_>>()
    );
    let tokens = case.texts(1, "sample/rows", "generation_tokens");
    let first: Vec<Value> = tokens.iter().step_by(2).map(|n| n.parse::<u64>().unwrap().into()).collect();
    assert_eq!(column(&rows, "first_tokens"), first.iter().collect::<Vec<_>>());
}

#[test]
fn two_sources_join_on_what_their_columns_say() {
    let case = Case::new(0, "");
    let rows = run(&case, "join", "answers.jsonl", &[]);
    assert_eq!(rows.len(), 24);
    let prompt = |row: &Value| row["prompt"].as_str().unwrap().to_owned();
    let wished = rows.iter().filter(|row| row["topic"] == "history").map(prompt).collect::<Vec<_>>();
    assert!(!wished.is_empty() && wished.iter().all(|p| p.ends_with("Name the years.")), "{wished:?}");
    assert!(rows.iter().any(|row| prompt(row).ends_with('?')), "a topic without a wish");
}

#[test]
fn judges_of_an_ensemble_decide_together() {
    let case = Case::new(0, "");
    let rows = run(&case, "ensemble", "pairs.jsonl", &["stages.prompts.take=8"]);
    let verdicts = ["helpful", "brief"].map(|judge| case.texts(1, &format!("{judge}/rows"), "verdict"));
    assert_eq!(verdicts[0].len(), 24, "three pairs of three answers");
    let agreed = verdicts[0].iter().zip(&verdicts[1]).filter(|(a, b)| a == b && *a != "tie").count();
    assert_eq!(rows.len(), agreed);
    assert!(agreed > 0 && agreed < 24, "{agreed} of 24");
    assert!(rows.iter().all(|row| row["chosen"] != row["rejected"]));
}

#[test]
fn a_cycle_is_refused_by_name() {
    let stage = |name: &str, input: &str| {
        format!("[stages.{name}]\nkind = \"mapper\"\ninput = {input:?}\nsql = \"SELECT * FROM input\"\n")
    };
    let case = Case::new(1, &[stage("a", "c"), stage("b", "a"), stage("c", "b")].concat());
    let output = case.run(&["check", "flow.toml"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("the stages form a cycle: a -> b -> c -> a"), "{}", stderr(&output));
}
