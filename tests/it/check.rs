//! `flowrun check` on the flows that ship.

use std::path::Path;

use crate::support::{Case, tiny_flow};

#[test]
fn every_shipped_flow_passes_offline() {
    let flows = Path::new(env!("CARGO_MANIFEST_DIR")).join("flows");
    let mut seen = 0;
    for entry in std::fs::read_dir(flows).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|e| e == "toml") {
            let case = Case::new(1, "");
            let output = case.done(&["check", path.to_str().unwrap()]);
            assert!(!output.stdout.is_empty());
            assert!(!case.path("runs").exists(), "check made a run directory");
            seen += 1;
        }
    }
    assert!(seen >= 2);
}

#[test]
fn a_hub_schema_that_can_not_be_seen_is_named() {
    let flow = Path::new(env!("CARGO_MANIFEST_DIR")).join("flows/self_reward.toml");
    let case = Case::new(1, "");
    let output = case.done(&["check", flow.to_str().unwrap()]);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(text.contains("not checked"), "{text}");
}

#[test]
fn a_model_that_fits_no_device_is_refused_with_the_bytes_it_needs() {
    let case = Case::new(4, &tiny_flow(1, ""));
    let config = std::fs::read_to_string(crate::support::tiny_model().join("config.json")).unwrap();
    let mut config: serde_json::Value = serde_json::from_str(&config).unwrap();
    config["hidden_size"] = 16384.into();
    config["intermediate_size"] = 65536.into();
    config["num_hidden_layers"] = 512.into();
    std::fs::create_dir(case.path("huge")).unwrap();
    case.write("huge/config.json", &config.to_string());
    for verb in ["check", "run"] {
        let sets = ["models.policy.source=\"huge\"", "models.policy.weights=\"dummy\""];
        let template = "models.policy.chat_template=\"{{ messages[0].content }}\"";
        let output = case.run(&[verb, "flow.toml", "--set", sets[0], "--set", sets[1], "--set", template]);
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(2), "{text}");
        assert!(text.contains("models.policy.source: model policy needs 6150.1 GiB on cpu:"), "{text}");
        assert!(text.contains("[devices.\"cpu:") && !case.path("runs").exists(), "{text}");
    }
    // A hundredth of a thousandth of this machine is too little for the tiny model too.
    let output = case.run(&["check", "flow.toml", "--set", "devices.cpu.memory=1e-9"]);
    assert_eq!(output.status.code(), Some(2), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn the_seeds_recipe_runs_on_local_data_and_a_local_model() {
    let flow = Path::new(env!("CARGO_MANIFEST_DIR")).join("flows/self_reward.toml");
    let case = Case::new(30, "");
    case.write(
        "questions.jsonl",
        &std::fs::read_to_string(case.path("prompts.jsonl")).unwrap().replace("\"prompt\"", "\"question\""),
    );
    let model = format!("models.policy.source={:?}", crate::support::tiny_model());
    let data = format!("stages.prompts.dataset={:?}", case.path("questions.jsonl"));
    case.done(&[
        flow.to_str().unwrap(),
        "--device",
        "cpu",
        "--try",
        "8",
        "--set",
        &model,
        "--set",
        &data,
        "--set",
        "stages.sample.max_new_tokens=16",
        "--output",
        "out",
    ]);
    assert_eq!(case.json("out/summary.json")["status"], "done");
}

#[test]
fn the_plan_shows_rows_tokens_and_memory() {
    let case = Case::new(8, &tiny_flow(2, ""));
    let output = case.done(&["check", "flow.toml"]);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    for word in ["sample", "judge", "align", "cpu:0", "cpu:1", "at most 96 tokens a round", "KiB"] {
        assert!(text.contains(word), "{word} is missing:\n{text}");
    }
}
