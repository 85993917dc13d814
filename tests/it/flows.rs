//! The shipped recipes, on the tiny model; a judge that writes is a scripted chat server.

use std::path::{Path, PathBuf};

use flowrun::model::{ModelOptions, Pretrained, Source};
use serde_json::Value;

use crate::chat_server::{Said, Server};
use crate::support::{Case, tiny_model};

fn shipped(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("flows").join(format!("{name}.toml"))
}

/// Runs `flows/NAME.toml` on the tiny model over the case's prompts, with `sets` and, where there is one, the
/// server as the model `scripted`.
fn run(case: &Case, name: &str, source: &str, server: Option<&Server>, sets: &[String]) -> Value {
    let flow = shipped(name);
    let prompts = case.path("prompts.jsonl");
    let mut all = vec![
        format!("models.policy.source={:?}", tiny_model().display().to_string()),
        "models.policy.dtype=\"f32\"".to_owned(),
        format!("stages.{source}.dataset={:?}", prompts.display().to_string()),
        "stages.sample.max_new_tokens=8".to_owned(),
        "stages.align.learning_rate=1e-3".to_owned(),
    ];
    if let Some(server) = server {
        all.push(format!("models.scripted={{ endpoint = {:?}, name = \"scripted\" }}", server.address));
    }
    all.extend_from_slice(sets);
    let mut args =
        vec![flow.display().to_string(), "--output".into(), "runs/tiny".into(), "--device".into(), "cpu".into()];
    args.extend(all.into_iter().flat_map(|set| ["--set".to_owned(), set]));
    case.done(&args.iter().map(String::as_str).collect::<Vec<_>>());
    case.summary()
}

fn sets(of: &[&str]) -> Vec<String> {
    of.iter().map(ToString::to_string).collect()
}

/// Every round trained, and the last one begins where the reference is.
fn trained(summary: &Value, rounds: usize) {
    assert_eq!(summary["status"], "done", "{summary}");
    let all = summary["rounds"].as_array().unwrap();
    assert_eq!(all.len(), rounds);
    for round in all {
        assert!(round["train"]["steps"].as_u64().unwrap() > 0, "{round}");
        assert!(round["train"]["adapter"].is_string(), "{round}");
    }
}

/// A score from 0 to 5 that follows from the question.
fn score(question: &str) -> String {
    let sum: u64 = question.bytes().map(u64::from).sum();
    format!("It was about what was asked.\nScore: {}", sum % 6)
}

fn question(request: &Value) -> String {
    request["messages"].as_array().unwrap().last().unwrap()["content"].as_str().unwrap().to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_paper_of_self_rewarding() {
    let server = Server::start(|_, request| {
        let count = request["n"].as_u64().unwrap_or(1);
        let said = score(&question(request));
        Said::texts(&vec![said.as_str(); count as usize])
    })
    .await;
    tokio::task::block_in_place(|| {
        let case = Case::new(8, "");
        let to_server = sets(&["stages.judge.model=\"scripted\""]);
        // A chat server has no device.
        let summary = run(&case, "self_rewarding_paper", "prompts", Some(&server), &to_server);
        trained(&summary, 2);
        let judge = &summary["rounds"][0]["judge"];
        assert_eq!((&judge["judged"], &judge["unreadable"]), (&Value::from(16), &Value::from(0)));
        let scores = case.texts(1, "judge/rows", "score");
        let samples = case.texts(1, "judge/rows", "score_samples");
        assert!(scores.iter().all(|s| (0.0..=5.0).contains(&s.parse::<f64>().unwrap())));
        assert!(samples.iter().all(|n| n == "3"), "three samples a score: {samples:?}");
    });
    let asked = server.asked();
    assert!(asked.iter().all(|r| question(r).contains("=== ")), "answers are fenced");
}

#[tokio::test(flavor = "multi_thread")]
async fn judges_whose_judgements_are_judged() {
    let server = Server::start(|number, request| {
        let asked = question(request);
        if asked.contains("Which judgement is more accurate") {
            // The judgement that says 5, wherever it stands.
            let first = asked.split("Judgement A:").nth(1).unwrap().split("Judgement B:").next().unwrap();
            return Said::text(if first.contains("Score: 5") { "Judgement A" } else { "Judgement B" });
        }
        let count = request["n"].as_u64().unwrap_or(1);
        let said: Vec<String> =
            (0..count).map(|i| format!("Reason {i}.\nScore: {}", (i + number as u64) % 6)).collect();
        Said::texts(&said.iter().map(String::as_str).collect::<Vec<_>>())
    })
    .await;
    tokio::task::block_in_place(|| {
        let case = Case::new(8, "");
        let few = [
            "rounds=2",
            "stages.prompts.shard={ count = 2 }",
            "stages.sample.candidates=3",
            "stages.judge.samples=3",
            "stages.judge.model=\"scripted\"",
            "stages.meta.model=\"scripted\"",
        ];
        let summary = run(&case, "meta_rewarding", "prompts", Some(&server), &sets(&few));
        trained(&summary, 2);
        let (actor, judge) = (case.texts(1, "prefer/rows", "prompt"), case.texts(1, "judge_prefer/rows", "prompt"));
        assert!(!judge.is_empty() && judge.iter().all(|p| p.starts_with("Judge how well")), "{judge:?}");
        assert!(case.texts(1, "judge_prefer/rows", "chosen").iter().all(|c| c.contains("Score: ")));
        let both = case.texts(1, "both/rows", "prompt");
        assert_eq!(both.len(), actor.len() + judge.len());
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn what_datadreamer_does() {
    // The first question as DataDreamer's format_prompt puts it together, its parts and their order aside.
    let server = Server::start(|number, request| {
        let asked = question(request);
        let end = "\n\nInstruction: Which response is better? Respond with 'Response A' or 'Response B'.";
        let parts = ["Prompt: ", "\n\nResponse A: ", "\n\nResponse B: "].map(|part| asked.find(part).unwrap());
        assert!(parts.is_sorted() && parts[0] == 0 && asked.ends_with(end), "{asked:?}");
        Said::text(["Response A", "Response B", "neither"][number % 3])
    })
    .await;
    tokio::task::block_in_place(|| {
        let case = Case::new(30, "");
        let small = [
            "stages.prompts.split=\"train\"",
            "stages.prompts.select={ prompt = \"prompt\" }",
            "stages.prompts.take=30",
            "stages.judge.model=\"scripted\"",
            "stages.align.gradient_accumulation_steps=3",
            "stages.align.epochs=2",
        ];
        let summary = run(&case, "datadreamer_compat", "prompts", Some(&server), &sets(&small));
        trained(&summary, 3);
        // Row r of round 1 is the shard's row r / 3; the coins are those of Python's Random(1).
        let rows = case.texts(1, "judge/rows", "_row");
        let swapped = case.texts(1, "judge/rows", "swapped");
        let coins = [0, 0, 1, 0, 1, 1, 1, 1, 0, 0];
        for (row, swapped) in rows.iter().zip(&swapped) {
            let place = row.parse::<usize>().unwrap() / 3;
            assert_eq!(swapped == "true", coins[place] == 1, "row {row}");
        }
        // What could not be read is drawn by lot, and said to be unreadable.
        let verdicts = case.texts(1, "judge/rows", "verdict");
        let parsed = case.texts(1, "judge/rows", "parsed");
        for (verdict, parsed) in verdicts.iter().zip(&parsed) {
            assert!(parsed == "true" || verdict != "tie");
        }
        assert!(parsed.iter().any(|p| p == "false"));
        // The sampler's prompts begin with the begin-of-text token, and the trainer's don't.
        let model = Pretrained::open(&Source::Directory(tiny_model()), &ModelOptions::default()).unwrap();
        let turns = case.texts(1, "prefer/rows", "prompt");
        let ids = model.tokenizer.encode(&turns[0], false).unwrap();
        assert!(turns[0].starts_with("<|system|>\nYou are a helpful assistant.</s>\n<|user|>\n"), "{}", turns[0]);
        assert!(turns[0].ends_with("</s>\n<|assistant|>\n"), "{}", turns[0]);
        let row = &case.texts(1, "prefer/rows", "_row")[0];
        let at = case.texts(1, "sample/rows", "_row").iter().position(|sampled| sampled == row).unwrap();
        assert_eq!(case.texts(1, "sample/rows", "prompt_tokens")[at], (ids.len() + 1).to_string());
        // The last tenth of a round is its validation.
        assert_eq!(case.texts(1, "halves/validation", "_row"), ["27"]);
        let first = case.events("loss")[0]["loss"].as_f64().unwrap();
        assert!((first - 0.5).abs() < 1e-6, "kto_pair begins at a half: {first}");
    });
}

#[test]
fn iterative_reasoning_preference_optimization() {
    let case = Case::new(0, "");
    let lines = |count: usize| {
        (0..count)
            .map(|i| format!("{{\"task\": \"t\", \"prompt\": \"thing {i}\", \"answer\": \"x\"}}\n"))
            .collect::<String>()
    };
    case.write("prompts.jsonl", &lines(12));
    let held_out = case.path("prompts.jsonl").display().to_string();
    let small = vec![
        format!("stages.held_out.dataset={held_out:?}"),
        format!("stages.few.dataset={held_out:?}"),
        "stages.few.take=4".into(),
        "stages.answers.max_new_tokens=8".into(),
        "stages.gate.max_new_tokens=8".into(),
        // The tiny model says no answer; what it says has a length.
        "stages.correct.rule=\"length(generation) % 2\"".into(),
        "stages.measured.rule=\"length(generation) % 2\"".into(),
        "stages.gate.judge.rule=\"length(generation) % 2\"".into(),
        "stages.gate.threshold=0.0".into(),
    ];
    let summary = run(&case, "iterative_rpo", "questions", None, &small);
    trained(&summary, 3);
    let first = &summary["rounds"][0];
    assert_eq!(first["gate"]["passed"], true);
    assert_eq!(first["stages"]["measured"]["rows_out"], 12);
    let gaps = case.texts(1, "prefer/rows", "gap");
    assert!(!gaps.is_empty() && gaps.iter().all(|gap| gap == "1.0"));
}

#[test]
fn the_seeds_recipe() {
    let case = Case::new(12, "");
    let small = [
        "stages.prompts.split=\"train\"",
        "stages.prompts.select={ prompt = \"prompt\" }",
        "stages.prompts.take=12",
        "stages.halves.outputs={ train = 0.75, validation = 0.25 }",
        "stages.align.gradient_accumulation_steps=2",
        "stages.align.epochs=1",
    ];
    let summary = run(&case, "self_reward", "prompts", None, &sets(&small));
    trained(&summary, 3);
    let judge = &summary["rounds"][0]["judge"];
    assert_eq!((&judge["pairs"], &judge["unreadable"]), (&Value::from(4), &Value::from(0)));
}

#[test]
fn one_judge_asked_four_ways() {
    let case = Case::new(6, "");
    let model = tiny_model().display().to_string();
    let prompts = case.path("prompts.jsonl").display().to_string();
    let flow = shipped("position_bias").display().to_string();
    let mut args = vec![flow, "--output".to_owned(), "runs/tiny".to_owned(), "--device".to_owned(), "cpu".to_owned()];
    for set in [
        format!("models.policy.source={model:?}"),
        format!("models.judge.source={model:?}"),
        format!("stages.prompts.dataset={prompts:?}"),
        "stages.sample.max_new_tokens=8".into(),
    ] {
        args.extend(["--set".to_owned(), set]);
    }
    case.done(&args.iter().map(String::as_str).collect::<Vec<_>>());
    let stages = &case.summary()["rounds"][0]["stages"];
    for (stage, both) in [("logits_random", false), ("logits_both", true), ("text_random", false), ("text_both", true)]
    {
        let health = &stages[stage]["health"];
        assert_eq!(health["pairs"], 6, "{stage}");
        assert_eq!(health["swap_consistency"].is_null(), !both || stage == "text_both" && health["unreadable"] == 6);
    }
}

#[test]
fn answers_of_a_data_set_are_judged() {
    let case = Case::new(0, "");
    let set = format!("models.judge.source={:?}", tiny_model().display().to_string());
    let flow = shipped("judge_a_dataset").display().to_string();
    case.done(&[&flow, "--output", "runs/tiny", "--device", "cpu", "--set", &set]);
    let health = case.summary()["rounds"][0]["stages"]["verdicts"]["health"].clone();
    assert_eq!((&health["pairs"], &health["unreadable"]), (&Value::from(64), &Value::from(0)));
    let lines = |file: &str| -> Vec<Value> {
        let text = std::fs::read_to_string(case.path("runs/tiny").join(file)).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    };
    let agreement = lines("agreement.jsonl");
    assert_eq!(agreement.iter().map(|row| row["pairs"].as_u64().unwrap()).sum::<u64>(), 64);
    let preferences = lines("preferences.jsonl");
    assert!(!preferences.is_empty() && preferences.len() <= 64);
    assert!(preferences.iter().all(|row| row["chosen"] != row["rejected"] && row["prompt"].is_string()));
}
