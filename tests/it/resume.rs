//! A run that is killed goes on where it was.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::support::{Case, gate, stderr, tiny_flow};

/// Rows of a stage that the run took from its journal, over all rounds.
fn reused(case: &Case, stage: &str) -> u64 {
    let summary = case.summary();
    let rounds = summary["rounds"].as_array().unwrap();
    rounds.iter().filter_map(|r| r["stages"][stage]["reused_rows"].as_u64()).sum()
}

/// Every file below, with the hash of what is in it.
fn contents(dir: &Path) -> BTreeMap<PathBuf, String> {
    let mut files = BTreeMap::new();
    for entry in std::fs::read_dir(dir).unwrap().flatten() {
        match entry.file_type().unwrap().is_dir() {
            true => files.extend(contents(&entry.path())),
            false => {
                let hash = blake3::hash(&std::fs::read(entry.path()).unwrap()).to_hex().to_string();
                files.insert(entry.path(), hash);
            }
        }
    }
    files
}

#[test]
fn a_finished_run_is_done_at_once_and_fresh_starts_anew() {
    let sink = "[stages.kept]\nkind = \"sink\"\ninput = \"prefer\"\npath = \"kept-{round}.jsonl\"\n";
    let case = Case::new(
        8,
        &tiny_flow(
            2,
            &format!("{}{sink}", gate(0.0, "judge = { method = \"rule\", rule = \"length(generation) % 3\" }")),
        ),
    );
    let told = case.done(&["flow.toml"]).stdout;
    let files = contents(&case.path("runs/tiny"));
    assert!(files.len() > 20 && files.contains_key(&case.path("runs/tiny/kept-2.jsonl")), "{:?}", files.keys());
    for _ in 0..2 {
        assert_eq!(case.done(&["flow.toml"]).stdout, told, "the figures are told again");
        let now = contents(&case.path("runs/tiny"));
        let changed: Vec<_> = now.iter().filter(|(path, bytes)| files.get(*path) != Some(bytes)).collect();
        assert!(changed.is_empty() && now.len() == files.len(), "{changed:?}");
    }
    // What is gone is made again, of what is left.
    std::fs::remove_file(case.path("runs/tiny/round-2/judge/rows.parquet")).unwrap();
    case.done(&["flow.toml"]);
    assert_eq!((reused(&case, "sample"), reused(&case, "judge")), (8, 8));
    assert!(case.path("runs/tiny/round-2/judge/rows.parquet").exists());
    let kept = std::fs::read(case.path("runs/tiny/kept-1.jsonl")).unwrap();
    std::fs::remove_file(case.path("runs/tiny/kept-1.jsonl")).unwrap();
    let told = stderr(&case.done(&["flow.toml"]));
    assert!(told.contains("kept-1.jsonl is gone"), "{told}");
    assert_eq!(std::fs::read(case.path("runs/tiny/kept-1.jsonl")).unwrap(), kept);
    case.done(&["flow.toml", "--fresh"]);
    assert_eq!(reused(&case, "sample"), 0);
    assert!(case.path("runs/tiny/superseded").exists());
}

#[test]
fn killed_at_any_moment_it_ends_with_the_same_rows() {
    let flow = tiny_flow(2, "").replace("max_new_tokens = 12", "max_new_tokens = 48");
    let whole = Case::new(32, &flow);
    let began = Instant::now();
    whole.done(&["flow.toml"]);
    let took = began.elapsed();

    let mut kept = 0;
    for share in [0.25, 0.45, 0.65, 0.85] {
        let case = Case::new(32, &flow);
        let mut child = case.start(&["flow.toml"]);
        std::thread::sleep(took.mul_f64(share).max(Duration::from_millis(300)));
        child.kill().unwrap();
        child.wait().unwrap();
        case.done(&["flow.toml"]);
        kept += reused(&case, "sample");
        assert_eq!(case.summary()["status"], "done");
        for round in [1, 2] {
            for (file, column) in [("sample/rows", "generation"), ("judge/rows", "verdict")] {
                let (ours, theirs) = (case.texts(round, file, column), whole.texts(round, file, column));
                assert_eq!(ours.len(), theirs.len(), "round {round} {file} after a kill at {share}");
            }
        }
    }
    assert!(kept > 0, "no kill left a durable row behind");
}

#[test]
fn an_edit_that_would_recompute_finished_work_is_told_first() {
    let case = Case::new(8, &tiny_flow(1, ""));
    case.done(&["flow.toml"]);
    let edit = ["flow.toml", "--set", "stages.sample.max_new_tokens=10"];
    let refused = case.run(&edit);
    assert_eq!(refused.status.code(), Some(2));
    let message = crate::support::stderr(&refused);
    assert!(message.contains("sample") && message.contains("--recompute"), "{message}");
    case.done(&[&edit[..], &["--recompute"]].concat());
    assert_eq!(reused(&case, "sample"), 0);
}

#[test]
fn an_interrupt_ends_with_130_and_is_gone_on_from() {
    let flow = tiny_flow(1, "").replace("max_new_tokens = 12", "max_new_tokens = 64");
    let case = Case::new(160, &flow);
    let mut child = case.start(&["flow.toml"]);
    let table = case.path("runs/tiny/round-1/sample/journal");
    let began = Instant::now();
    while std::fs::metadata(&table).map_or(0, |m| m.len()) < 20_000 && began.elapsed() < Duration::from_secs(60) {
        std::thread::sleep(Duration::from_millis(5));
    }
    std::process::Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(130));
    assert_eq!(case.summary()["status"], "interrupted");
    case.done(&["flow.toml"]);
    assert!(reused(&case, "sample") > 0);
    assert_eq!(case.texts(1, "sample/rows", "generation").len(), 320);
}
