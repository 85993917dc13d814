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
    std::fs::create_dir(case.path("list")).unwrap();
    case.write("list/adapter_config.json", "[1, 2]");
    refused(&["export", "list", "--model", &tiny, "--out", "x"], "list/adapter_config.json: is no JSON object");
    refused(&["export", "nothing", "--out", "x"], "name a run or a PEFT directory");
    refused(&["export", &adapter, "--format", "gguf", "--out", "x"], "add --merge");
    refused(&["export", &adapter, "--model", "builtin:smollm2-135m", "--merge", "--out", "x"], "another model");
    refused(&["export", &adapter, "--model", &tiny, "--merge", "--out", "."], "is not empty");
    case.write("file", "mine");
    refused(&["export", &adapter, "--model", &tiny, "--merge", "--out", "file"], "file: is a file");
    std::fs::create_dir(case.path("x.partial")).unwrap();
    case.write("x.partial/note", "mine");
    refused(&["export", &adapter, "--model", &tiny, "--merge", "--out", "x"], "x.partial: is there already");
    assert_eq!(std::fs::read_to_string(case.path("x.partial/note")).unwrap(), "mine");
    assert!(!case.path("x").exists());
}

#[test]
fn a_run_takes_its_template_along_and_dummy_weights_stay() {
    let case = Case::new(12, &tiny_flow(1, ""));
    let template = "models.policy.chat_template=\"{{ messages[0].content }}\"";
    case.done(&["flow.toml", "--set", template]);
    case.done(&["export", "runs/tiny", "--merge", "--out", "merged"]);
    assert_eq!(std::fs::read_to_string(case.path("merged/chat_template.jinja")).unwrap(), "{{ messages[0].content }}");
    let flow = std::fs::read_to_string(case.path("runs/tiny/flow.toml")).unwrap();
    case.write("runs/tiny/flow.toml", &flow.replace("[models.policy]", "[models.policy]\nweights = \"dummy\""));
    let output = case.run(&["export", "runs/tiny", "--merge", "--out", "other"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("dummy weights"), "{}", stderr(&output));
}
