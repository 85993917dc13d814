//! The loop: rounds, adapters, the figures of a run.

use crate::support::{Case, tiny_flow, tiny_model};

#[test]
fn two_rounds_end_with_tables_adapters_and_figures() {
    let case = Case::new(24, &tiny_flow(2, ""));
    case.done(&["flow.toml"]);

    let summary = case.summary();
    assert_eq!(summary["status"], "done");
    let rounds = summary["rounds"].as_array().unwrap();
    assert_eq!(rounds.len(), 2);
    for (round, figures) in (1..).zip(rounds) {
        let stage = |name: &str, key: &str| figures["stages"][name][key].as_u64().unwrap();
        assert_eq!(stage("prompts", "rows_out"), 12);
        assert_eq!((stage("sample", "rows_in"), stage("sample", "rows_out")), (12, 24));
        assert_eq!((stage("judge", "rows_in"), stage("judge", "rows_out")), (24, 12));
        assert_eq!(stage("prefer", "rows_out"), stage("halves", "rows_in"));
        assert!(stage("sample", "tokens_out") > 0);

        let train = &figures["train"];
        let first_loss = train["first_loss"].as_f64().unwrap();
        assert!((first_loss - 2f64.ln()).abs() < 1e-4, "the first loss is {first_loss}");
        assert!(train["steps"].as_u64().unwrap() >= 2);

        let adapter = format!("runs/tiny/round-{round}/align/adapter");
        assert_eq!(case.json(&format!("{adapter}/adapter_config.json"))["peft_type"], "LORA");
        assert!(case.path(&format!("{adapter}/adapter_model.safetensors")).exists());
        assert_eq!(case.texts(round, "sample/rows", "generation").len(), 24);
    }
    assert!(!case.events("rewards/margins").is_empty());
    let first = &case.events("rewards/margins")[0];
    assert!(first["rewards/margins"].as_f64().unwrap().abs() < 1e-4);
    assert!(case.path("runs/tiny/trace.json").exists());
}

#[test]
fn the_second_round_samples_with_the_adapter_of_the_first() {
    // A greedy stage beside the loop, the same prompts in every round, a learning rate that changes
    // the model for certain.
    let answers = |adapter: &str| {
        let probe = format!(
            "\n[stages.probe]\nkind = \"sampler\"\ninput = \"prompts\"\nmodel = \"policy\"\ndevice = \"cpu:0\"\n\
             candidates = 1\nmax_new_tokens = 12\ntemperature = 0.0\nadapter = \"{adapter}\"\n"
        );
        let flow = tiny_flow(2, &probe)
            .replace("shard = { count = 2 }\n", "")
            .replace("learning_rate = 1e-3", "learning_rate = 1e-1");
        let case = Case::new(16, &flow);
        case.done(&["flow.toml"]);
        (case.texts(1, "probe/rows", "generation"), case.texts(2, "probe/rows", "generation"))
    };
    let (first, second) = answers("previous");
    let (base_first, base_second) = answers("base");
    assert_eq!(first, base_first, "round 1 has no adapter yet");
    assert_eq!(base_first, base_second, "the base does not change");
    assert_ne!(first, second, "round 2 must sample with round 1's adapter");
}

#[test]
fn each_round_answers_a_prompt_from_anywhere() {
    let flow = tiny_flow(2, "").replace("learning_rate = 1e-3", "learning_rate = 1e-1");
    let case = Case::new(16, &flow);
    std::fs::create_dir(case.path("model")).unwrap();
    for entry in std::fs::read_dir(tiny_model()).unwrap() {
        let from = entry.unwrap().path();
        if from.is_file() {
            std::fs::copy(&from, case.path("model").join(from.file_name().unwrap())).unwrap();
        }
    }
    case.done(&["flow.toml", "--set", "models.policy.source=\"model\""]);
    let run = case.path("runs/tiny");
    let elsewhere = Case::new(1, "");
    let output = elsewhere.done(&["generate", run.to_str().unwrap(), "hello", "--max-new-tokens", "12"]);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let answer =
        |name: &str| text.split(&format!("[{name}]\n")).nth(1).unwrap().split("\n\n").next().unwrap().to_owned();
    assert_ne!(answer("base"), answer("round 1"), "{text}");
    assert_ne!(answer("round 1"), answer("round 2"), "{text}");
}

#[test]
fn each_round_may_put_a_fresh_adapter_on_those_before() {
    let case = Case::new(36, &tiny_flow(3, "").replace("\"continue\"", "\"fresh_on_merged\""));
    case.done(&["flow.toml"]);
    for round in [1, 2, 3] {
        let config = case.json(&format!("runs/tiny/round-{round}/align/adapter/adapter_config.json"));
        assert_eq!(config["r"], 4 * round, "ranks lie side by side");
        let train = &case.summary()["rounds"][round - 1]["train"];
        assert_eq!(train["first_margin"].as_f64(), Some(0.0), "round {round} starts at its reference: {train}");
    }
}

#[test]
fn the_reference_may_be_an_average_of_the_rounds() {
    let flow = tiny_flow(3, "ema_alpha = 0.5").replace("reference = \"previous\"", "reference = \"ema\"");
    let case = Case::new(36, &flow);
    case.done(&["flow.toml"]);
    let margin = |round: usize| case.summary()["rounds"][round - 1]["train"]["first_margin"].as_f64().unwrap();
    // The average of one round is its adapter, that of two is none of them.
    assert_eq!((margin(1), margin(2)), (0.0, 0.0));
    assert_ne!(margin(3), 0.0);
    let read = |round: u32, name: &str| {
        std::fs::read(case.path(&format!("runs/tiny/round-{round}/align/{name}/adapter_model.safetensors"))).unwrap()
    };
    assert_eq!(read(1, "adapter"), read(1, "average"));
    assert_ne!(read(2, "adapter"), read(2, "average"));
    // What is done is not done again.
    case.done(&["flow.toml"]);
    assert_eq!(case.summary()["status"], "done");
}
