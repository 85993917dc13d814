//! What was trained leaves for other programs, and models tell what they are.

use serde_json::Value;

use crate::support::{Case, stderr, tiny_flow, tiny_model};

#[test]
fn a_run_is_exported_and_sampled_from_again() {
    let case = Case::new(12, &tiny_flow(1, ""));
    case.done(&["flow.toml"]);
    let said = case.done(&["export", "runs/tiny", "--out", "adapter"]);
    let said = String::from_utf8(said.stdout).unwrap();
    assert!(said.contains("vllm serve") && said.contains("--lora-modules adapter=adapter"), "{said}");
    let config = case.json("adapter/adapter_config.json");
    assert_eq!(config["base_model_name_or_path"], tiny_model().display().to_string());

    case.done(&["export", "adapter", "--merge", "--dtype", "f32", "--out", "merged"]);
    let found: Value =
        serde_json::from_slice(&case.done(&["inspect", "merged", "--json"]).stdout).expect("one JSON object");
    let base: Value =
        serde_json::from_slice(&case.done(&["inspect", &tiny_model().display().to_string(), "--json"]).stdout).unwrap();
    assert_eq!(found["parameters"], base["parameters"]);
    assert_eq!(found["stored"].as_object().unwrap().keys().collect::<Vec<_>>(), ["F32"]);
    assert!(found["memory"]["kv_token_bf16"].as_u64() > Some(0));
    // What was written is a model like any other.
    case.done(&["flow.toml", "--set", "models.policy.source=merged", "--output", "again"]);
}

#[test]
fn refusals_name_place_and_remedy() {
    let case = Case::new(4, &tiny_flow(1, ""));
    let adapter = tiny_model().join("adapter").display().to_string();
    let tiny = tiny_model().display().to_string();
    let refused = |args: &[&str], part: &str| {
        let output = case.run(args);
        assert_eq!(output.status.code(), Some(2), "{args:?}");
        assert!(stderr(&output).contains(part), "{part:?} is not in {}", stderr(&output));
    };
    refused(&["inspect", "nothing"], "nothing/config.json: is missing; a model is");
    refused(&["export", "nothing", "--out", "x"], "name a run or a PEFT directory");
    refused(&["export", &adapter, "--format", "gguf", "--out", "x"], "add --merge");
    refused(&["export", &adapter, "--model", &tiny, "--merge", "--format", "gguf", "--out", "x"], "a GGUF base");
    refused(&["export", &adapter, "--model", "builtin:smollm2-135m", "--merge", "--out", "x"], "another model");
    refused(&["export", &adapter, "--model", &tiny, "--merge", "--out", "."], "is not empty");
    assert!(!case.path("x").exists());
}
