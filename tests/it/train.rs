//! Training as a stream, in steps that a kill can't change, and looked at while it goes on.

use std::time::{Duration, Instant};

use serde_json::Value;

use crate::support::{Case, stderr, tiny_flow, tiny_model};

/// Twenty-four pairs of texts to train on, every third to validate.
fn flow(keys: &str) -> String {
    let model = tiny_model();
    format!(
        r#"
name = "tiny"
seed = 1
[models.policy]
source = {model:?}
dtype = "bf16"
[stages.data]
kind = "source"
dataset = "data.jsonl"
[stages.halves]
kind = "split"
input = "data"
outputs = {{ train = 0.7, validation = 0.3 }}
[stages.align]
kind = "trainer"
train = "halves.train"
validation = "halves.validation"
model = "policy"
device = "cpu:0"
template = "none"
learning_rate = 5e-3
gradient_accumulation_steps = 2
lora = {{ r = 4, alpha = 8 }}
{keys}
"#
    )
}

fn case(rows: usize, keys: &str) -> Case {
    let case = Case::new(0, &flow(keys));
    let words = ["sleeps", "walks", "sings", "waits", "looks", "runs"];
    let line = |i: usize| {
        let (a, b) = (words[i % 6], words[(i / 6 + i + 1) % 6]);
        format!("{{\"prompt\": \"the cat number {i}\", \"chosen\": \" {a} and {a}\", \"rejected\": \" {b} not\"}}\n")
    };
    case.write("data.jsonl", &(0..rows).map(line).collect::<String>());
    case
}

fn adapter(case: &Case) -> Vec<u8> {
    std::fs::read(case.path("runs/tiny/round-1/align/adapter/adapter_model.safetensors")).unwrap()
}

/// Events of the trainer without what time decides.
fn curve(case: &Case) -> Vec<Value> {
    let mut events = case.events("step");
    for event in events.iter_mut().filter_map(Value::as_object_mut) {
        for key in ["time", "tokens_per_second", "seconds"] {
            event.remove(key);
        }
    }
    events
}

fn evaluations(case: &Case, name: &str) -> Vec<f64> {
    case.events(name).iter().map(|event| event[name].as_f64().unwrap()).collect()
}

#[test]
fn the_first_epoch_is_trained_while_the_judge_works() {
    let flow = tiny_flow(1, "").replace("max_new_tokens = 12", "max_new_tokens = 32");
    let streamed = Case::new(96, &flow);
    streamed.done(&["flow.toml"]);
    let trace = streamed.json("runs/tiny/trace.json");
    let times = |name: &str, stage: &str| -> Vec<f64> {
        let events = trace["traceEvents"].as_array().unwrap();
        let of = events.iter().filter(|e| e["name"] == name && e["args"]["stage"] == stage);
        of.map(|e| e["ts"].as_f64().unwrap()).collect()
    };
    let (steps, verdicts) = (times("optimizer", "align"), times("score", "judge"));
    let last = verdicts.iter().copied().fold(0.0, f64::max);
    assert!(steps.iter().any(|step| *step < last), "{} steps, none before the judge's last pass", steps.len());

    // The order of rows is that of the source, so collecting them first comes to the same.
    let collected = Case::new(96, &(flow + "consume = \"collect\"\norder = \"sequential\"\nschedule = \"constant\"\n"));
    collected.done(&["flow.toml"]);
    streamed.done(&["flow.toml", "--fresh", "--set", "stages.align.schedule=\"constant\""]);
    assert_eq!(adapter(&streamed), adapter(&collected));
}

#[test]
fn validation_is_looked_at_from_the_start_and_the_best_adapter_is_kept() {
    let case =
        case(24, "epochs = 4\nschedule = \"constant\"\nconsume = \"collect\"\neval_steps = 3\nbest_metric = \"loss\"");
    let lowest = |losses: &[f64]| losses[1..].iter().copied().fold(f64::INFINITY, f64::min);
    // What is validated contradicts what is trained on, so the last adapter is the worst.
    let contrary = "[stages.contrary]\nkind = \"mapper\"\ninput = \"halves.validation\"\n\
                    sql = \"SELECT prompt, rejected AS chosen, chosen AS rejected FROM input\"\n";
    let flow = std::fs::read_to_string(case.path("flow.toml")).unwrap();
    case.write(
        "flow.toml",
        &flow
            .replace("\"halves.validation\"", "\"contrary\"")
            .replace("[stages.align]", &format!("{contrary}[stages.align]")),
    );
    case.done(&["flow.toml"]);
    let losses = evaluations(&case, "eval_loss");
    assert!((losses[0] - std::f64::consts::LN_2).abs() < 1e-9, "{losses:?}");
    assert_eq!(evaluations(&case, "eval_rewards/margins")[0], 0.0);
    let steps: Vec<u64> = case.events("eval_loss").iter().map(|e| e["step"].as_u64().unwrap()).collect();
    assert_eq!(steps[..3], [0, 3, 6]);
    let train = &case.summary()["rounds"][0]["train"];
    assert_eq!(train["eval"]["eval_loss"].as_f64(), Some(lowest(&losses)), "{losses:?}");
    assert!(losses.last().unwrap() > &lowest(&losses), "{losses:?}");

    case.done(&[
        "flow.toml",
        "--fresh",
        "--set",
        "stages.align.early_stopping_patience=2",
        "--set",
        "stages.align.epochs=40",
    ]);
    let train = &case.summary()["rounds"][0]["train"];
    assert_eq!(train["stopped_early"], true, "{train}");
    assert!(train["steps"].as_u64().unwrap() < 40 * 9, "{train}");
}

#[test]
fn what_a_stream_validates_starts_at_the_reference() {
    let case = case(12, "epochs = 2");
    case.done(&["flow.toml"]);
    let steps: Vec<(u64, f64)> = case
        .events("eval_loss")
        .iter()
        .map(|e| (e["step"].as_u64().unwrap(), e["eval_rewards/margins"].as_f64().unwrap()))
        .collect();
    assert_eq!(steps.iter().map(|(step, _)| *step).collect::<Vec<_>>(), [0, 5, 10], "{steps:?}");
    assert_eq!(steps[0].1, 0.0);
}

#[test]
fn killed_at_checkpoints_and_between_it_learns_the_same() {
    let keys = "epochs = 12\nbest_metric = \"rewards/margins\"";
    let whole = case(60, keys);
    let began = Instant::now();
    whole.done(&["flow.toml"]);
    let took = began.elapsed();
    let (expected, steps) = (curve(&whole), whole.summary()["rounds"][0]["train"]["steps"].as_u64().unwrap());
    assert!(steps > 200, "{steps}");

    let mut resumed = 0;
    // Right after a checkpoint was written, and some time later.
    for (at, later) in [(1, 0.0), (2, 0.03), (4, 0.0), (5, 0.05), (8, 0.01)] {
        let case = case(60, keys);
        let mut child = case.start(&["flow.toml"]);
        let file = case.path("runs/tiny/round-1/align/checkpoint/state.safetensors");
        let (mut seen, mut last, started) = (0, None, Instant::now());
        while seen < at && started.elapsed() < took + Duration::from_secs(60) && child.try_wait().unwrap().is_none() {
            let now = std::fs::metadata(&file).and_then(|m| m.modified()).ok();
            if now.is_some() && now != last {
                (seen, last) = (seen + 1, now);
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        std::thread::sleep(took.mul_f64(later));
        child.kill().unwrap();
        child.wait().unwrap();
        // On a busy machine it may not have begun.
        let before = if case.path("runs/tiny/metrics.jsonl").exists() { case.events("step").len() } else { 0 };
        case.done(&["flow.toml"]);
        resumed += usize::from(before > 0 && before < expected.len());
        assert_eq!(curve(&case), expected, "killed at checkpoint {at}, {later} later");
        assert_eq!(adapter(&case), adapter(&whole), "killed at checkpoint {at}, {later} later");
    }
    assert!(resumed > 0, "no kill was in time");
}

#[test]
fn two_devices_learn_what_one_learns() {
    let keys = "epochs = 3\nconsume = \"collect\"\nbatch_size = 2";
    let [one, two] = [case(30, keys), case(30, keys)];
    let losses =
        |case: &Case| -> Vec<f64> { case.events("loss").iter().map(|e| e["loss"].as_f64().unwrap()).collect() };
    let set = ["flow.toml", "--set", "models.policy.dtype=\"f32\"", "--set"];
    one.done(&[&set[..], &["stages.align.gradient_accumulation_steps=4"]].concat());
    two.done(&[&set[..], &["stages.align.device=[\"cpu:0\", \"cpu:1\"]"]].concat());
    let (expected, found) = (losses(&one), losses(&two));
    assert_eq!(expected.len(), found.len());
    for (a, b) in expected.iter().zip(&found) {
        assert!((a - b).abs() < 1e-4 * a.abs(), "{expected:?}\n{found:?}");
    }
    let trace = two.json("runs/tiny/trace.json");
    let events = trace["traceEvents"].as_array().unwrap();
    let trained_on = |device: &str| events.iter().any(|e| e["name"] == "train" && e["args"]["track"] == device);
    assert!(trained_on("cpu:0") && trained_on("cpu:1"));
    // pairs_per_step counts all devices' pairs
    let set = ["flow.toml", "--fresh", "--set", "stages.align.device=[\"cpu:0\", \"cpu:1\"]", "--set"];
    let three = case(30, &keys.replace("batch_size = 2", "pairs_per_step = 8"));
    three.write(
        "flow.toml",
        &flow(&keys.replace("batch_size = 2", "pairs_per_step = 8")).replace("gradient_accumulation_steps = 2\n", ""),
    );
    three.done(&set[..4]);
    assert_eq!(three.summary()["rounds"][0]["train"]["steps"], one.summary()["rounds"][0]["train"]["steps"]);
}

#[test]
fn keys_that_look_at_nothing_are_refused() {
    let case = case(6, "early_stopping_patience = 2");
    let told = stderr(&case.run(&["check", "flow.toml"]));
    assert!(told.contains("early_stopping_patience") && told.contains("best_metric"), "{told}");
}

#[test]
fn nothing_need_be_validated() {
    let case = case(24, "epochs = 2");
    let flow = std::fs::read_to_string(case.path("flow.toml")).unwrap();
    case.write("flow.toml", &flow.replace("validation = \"halves.validation\"\n", ""));
    case.done(&["flow.toml"]);
    let train = &case.summary()["rounds"][0]["train"];
    assert_eq!(train["steps"], 18);
    assert!(evaluations(&case, "eval_loss").is_empty());
}

#[test]
fn check_says_how_many_steps_there_will_be() {
    let case = case(24, "epochs = 2");
    let told = String::from_utf8(case.done(&["check", "flow.toml"]).stdout).unwrap();
    case.done(&["flow.toml"]);
    let steps = case.summary()["rounds"][0]["train"]["steps"].as_u64().unwrap();
    assert!(told.contains(&format!("2 pairs a step, 2 epochs, at most {steps} steps a round")), "{told}");
    let told = stderr(&case.run(&[
        "check",
        "flow.toml",
        "--set",
        "stages.halves.outputs={ train = 0.99, validation = 0.01 }",
    ]));
    assert!(told.contains("goes to `validation`") && told.contains("larger share"), "{told}");
}

/// The reference of round 1 is what sampled: its log-probs are the sampler's own.
#[test]
fn what_is_trained_are_the_tokens_that_were_sampled() {
    let case = Case::new(24, &tiny_flow(1, ""));
    case.done(&["flow.toml"]);
    let number = |text: &String| text.parse::<f64>().unwrap();
    let column = |file: &str, name: &str| case.texts(1, file, name);
    let sampled: Vec<(String, String, f64, String)> = column("sample/rows", "_row")
        .into_iter()
        .zip(column("sample/rows", "generation"))
        .zip(column("sample/rows", "logprob").iter().map(number))
        .zip(column("sample/rows", "generation_tokens"))
        .map(|(((row, text), logprob), tokens)| (row, text, logprob, tokens))
        .collect();
    let mut compared = 0;
    for side in ["chosen", "rejected"] {
        let rows = column("align/rows", "_row").into_iter().zip(column("align/rows", side));
        let log_probs = column("align/rows", &format!("reference_{side}_logps"));
        let counts = column("align/rows", &format!("{side}_tokens"));
        for ((row, log_prob), count) in rows.zip(log_probs.iter().map(number)).zip(counts) {
            let same = |(r, text, _, _): &&(String, String, f64, String)| (r, text) == (&row.0, &row.1);
            let (.., expected, tokens) = sampled.iter().find(same).unwrap();
            assert!((log_prob - expected).abs() < 1e-3, "row {}: {log_prob} {expected}", row.0);
            // A cut answer has no end that was not sampled.
            assert_eq!(&count, tokens);
            compared += 1;
        }
    }
    assert!(compared > 20, "{compared}");
}

#[test]
fn a_model_trained_whole_is_the_source_of_the_next_flow() {
    let whole = |keys: &str| flow(keys).replace("lora = { r = 4, alpha = 8 }", "lora = false").replace("5e-3", "5e-4");
    for dtype in ["f32", "bf16"] {
        let case = case(24, "");
        case.write("flow.toml", &whole("consume = \"collect\"\nepochs = 2\nloss = \"cpo\"").replace("bf16", dtype));
        case.done(&["flow.toml"]);
        let losses = evaluations(&case, "eval_loss");
        assert!(losses[2] < losses[0] - 0.01, "{dtype}: {losses:?}");
        let source = format!("models.policy.source={:?}", case.path("runs/tiny/round-1/align/model"));
        case.done(&["flow.toml", "--set", &source, "--set", "name=\"next\""]);
        let next = std::fs::read_to_string(case.path("runs/next/metrics.jsonl")).unwrap();
        let next: Vec<Value> = next.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        let began = next.iter().find_map(|event| event["eval_loss"].as_f64()).unwrap();
        assert!((began - losses[2]).abs() < 1e-6, "{dtype}: {began} after {losses:?}");

        let asked = case.done(&["generate", "runs/tiny", "the cat", "--max-new-tokens", "4"]);
        let told = String::from_utf8(asked.stdout).unwrap();
        assert!(told.contains("[base]") && told.contains("[round 1]"), "{told}");
        let told = stderr(&case.run(&["export", "runs/tiny", "--out", "out"]));
        assert!(told.contains("round-1/align/model is the export"), "{told}");
    }
    // DPO begins at its own reference, to the bit.
    let case = case(24, "");
    case.write("flow.toml", &whole(""));
    case.done(&["flow.toml"]);
    assert_eq!(evaluations(&case, "eval_rewards/margins")[0], 0.0);
    let first = case.events("grad_norm")[0]["loss"].as_f64().unwrap();
    assert!((first - std::f64::consts::LN_2).abs() < 1e-9, "{first}");
}
