//! `flowrun check` on the flows that ship.

use std::io::ErrorKind;
use std::net::TcpListener;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::support::{Case, stderr, tiny_flow};

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

/// Two models and two data sets of the hub.
const OF_THE_HUB: &str = r#"
name = "tiny"

[models.policy]
source = "hf://owner/policy"

[models.other]
source = "hf://owner/other"

[stages.prompts]
kind = "source"
dataset = "hf://owner/prompts"

[stages.more]
kind = "source"
dataset = "hf://owner/more"

[stages.sample]
kind = "sampler"
input = "prompts"
model = "policy"

[stages.again]
kind = "sampler"
input = "more"
model = "other"
"#;

/// Far more than the 2.5 seconds that a hub has, on a busy machine too.
const PATIENCE: Duration = Duration::from_secs(20);

/// A verb on them, with a hub of this address and an empty cache. A hub that is asked again and again takes longer than
/// [`PATIENCE`].
fn asking(case: &Case, verb: &str, address: &str) -> std::process::Output {
    let mut command = case.command(&[verb, "flow.toml"]);
    command.env_remove("HF_HUB_OFFLINE").env("HF_ENDPOINT", address).env("HF_HOME", case.path("hub"));
    let start = Instant::now();
    let output = command.output().unwrap();
    assert!(start.elapsed() < PATIENCE, "{verb} took {:?}", start.elapsed());
    output
}

#[test]
fn a_hub_that_does_not_answer_is_asked_once_and_told_once() {
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    silent.set_nonblocking(true).unwrap();
    let silent_address = format!("http://{}", silent.local_addr().unwrap());
    for (address, cause) in [("http://127.0.0.1:9", "Connection refused"), (&*silent_address, "no answer in 2.5 s")] {
        let case = Case::new(1, OF_THE_HUB);
        let output = asking(&case, "check", address);
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success(), "{}", stderr(&output));
        assert_eq!(stderr(&output), "", "nothing is logged");
        assert_eq!((text.matches(cause).count(), text.matches(address).count()), (1, 1), "{text}");
        for line in [
            "hf://owner/prompts is not in the cache, and the hub can't be reached",
            "not checked: columns of more",
            "not checked: policy (hf://owner/policy@main is not in the hub's cache, and the hub can't be reached)",
            "not checked: other (hf://owner/other@main is not",
        ] {
            assert_eq!(text.matches(line).count(), 1, "{line}: {text}");
        }
    }
    assert!(silent.accept().is_ok(), "it was asked");
    assert_eq!(silent.accept().unwrap_err().kind(), ErrorKind::WouldBlock, "and not again");
    let case = Case::new(1, OF_THE_HUB);
    let output = asking(&case, "run", "http://127.0.0.1:9");
    assert_eq!(output.status.code(), Some(2));
    assert_eq!(stderr(&output).matches("127.0.0.1:9").count(), 1, "{}", stderr(&output));
    assert!(!case.path("runs").exists());
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
