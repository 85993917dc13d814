//! Judges that score, rules, pairs from several answers, gates: through the program, on the tiny model.

use serde_json::Value;

use crate::support::{Case, stderr, tiny_model};

/// A source, a sampler of four answers, and whatever comes after it.
fn flow(rounds: u32, stages: &str) -> String {
    let model = tiny_model();
    format!(
        r#"
name = "tiny"
rounds = {rounds}
seed = 1
[models.policy]
source = {model:?}
dtype = "f32"
[stages.prompts]
kind = "source"
dataset = "prompts.jsonl"
[stages.sample]
kind = "sampler"
input = "prompts"
model = "policy"
device = "cpu:0"
candidates = 4
max_new_tokens = 8
{stages}
"#
    )
}

fn numbers(case: &Case, file: &str, column: &str) -> Vec<f64> {
    case.texts(1, file, column).iter().map(|n| n.parse().unwrap_or(f64::NAN)).collect()
}

const RULE: &str = r#"
[stages.judge]
kind = "judge"
input = "sample"
method = "rule"
rule = "length(generation) % 3"
"#;

#[test]
fn a_rule_scores_and_pairs_are_best_against_worst() {
    let pairs = "[stages.prefer]\nkind = \"pairs\"\ninput = \"judge\"\nmax_pairs = 2\n";
    let case = Case::new(6, &flow(1, &format!("{RULE}{pairs}")));
    case.done(&["flow.toml"]);
    let answers = case.texts(1, "judge/rows", "generation");
    let scores = numbers(&case, "judge/rows", "score");
    assert_eq!(answers.len(), 24);
    for (answer, score) in answers.iter().zip(&scores) {
        assert_eq!((answer.chars().count() % 3) as f64, *score, "{answer}");
    }
    let judged = case.texts(1, "judge/rows", "_row");
    let candidates = case.texts(1, "judge/rows", "_candidate");
    let place = |row: &str, candidate: &str| {
        (0..24).find(|&i| judged[i] == row && candidates[i] == candidate).expect("a pair of answers that were judged")
    };
    let column = |name: &str| case.texts(1, "prefer/rows", name);
    let (rows, pairs, chosen, rejected) = (column("_row"), column("_pair"), column("chosen"), column("rejected"));
    let (winners, losers) = (column("chosen_candidate"), column("rejected_candidate"));
    assert!(!rows.is_empty());
    for (i, row) in rows.iter().enumerate() {
        let (better, worse) = (place(row, &winners[i]), place(row, &losers[i]));
        assert_eq!((&answers[better], &answers[worse]), (&chosen[i], &rejected[i]));
        assert!(scores[better] > scores[worse]);
        if pairs[i] == "0" {
            let of_row = || (0..24).filter(|&k| judged[k] == *row).map(|k| scores[k]);
            assert_eq!(scores[better], of_row().fold(f64::MIN, f64::max));
            assert_eq!(scores[worse], of_row().fold(f64::MAX, f64::min));
        }
    }
    let health = &case.summary()["rounds"][0]["judge"];
    assert_eq!(health["judged"], 24);
    assert_eq!(health["paired"].as_u64(), Some(rows.len() as u64));
    assert!(health["pair_yield"].as_f64().unwrap() > 0.0);
}

#[test]
fn a_rule_that_is_no_expression_over_a_row_is_refused() {
    for (rule, wanted) in [
        ("avg(length(generation))", "stages.judge.rule: is no expression over one row"),
        ("lenght(generation)", "stages.judge.rule:"),
        ("nothing = 1", "stages.judge.rule:"),
    ] {
        let case = Case::new(2, &flow(1, &RULE.replace("length(generation) % 3", rule)));
        let output = case.run(&["check", "flow.toml"]);
        assert_eq!(output.status.code(), Some(2));
        assert!(stderr(&output).contains(wanted), "{}", stderr(&output));
    }
    let case = Case::new(2, &flow(1, &format!("{RULE}order = \"both\"\n")));
    let message = stderr(&case.run(&["check", "flow.toml"]));
    assert!(message.contains("stages.judge.order: means nothing to method = \"rule\""), "{message}");
}

/// A judge that scores with the tiny model; `keys` in addition.
fn scored(keys: &str) -> String {
    format!(
        "[stages.judge]\nkind = \"judge\"\ninput = \"sample\"\nmodel = \"policy\"\ndevice = \"cpu:1\"\nmethod = \"score\"\n{keys}\n"
    )
}

#[test]
fn expected_scores_are_on_the_scale_and_the_same_again() {
    let keys = "read = \"logits\"\nscale = [1, 3]\nprompt = \"{prompt} {answer}\"";
    let case = Case::new(4, &flow(1, &scored(keys)));
    case.done(&["flow.toml"]);
    let scores = numbers(&case, "judge/rows", "score");
    assert!(scores.len() == 16 && scores.iter().all(|s| (1.0..=3.0).contains(s)), "{scores:?}");
    let variances = numbers(&case, "judge/rows", "score_variance");
    assert!(variances.iter().all(|v| *v > 0.0 && *v <= 1.0), "{variances:?}");
    let health = case.summary()["rounds"][0]["judge"].clone();
    assert_eq!(health["unreadable"], 0);
    assert_eq!(health["score"]["histogram"].as_array().unwrap().iter().filter_map(Value::as_u64).sum::<u64>(), 16);
    case.done(&["flow.toml"]);
    assert_eq!(numbers(&case, "judge/rows", "score"), scores);
    assert_eq!(case.summary()["rounds"][0]["stages"]["judge"]["reused_rows"], 4);
}

#[test]
fn written_scores_are_averaged_over_samples_and_what_can_not_be_read_is_counted() {
    // The tiny model writes letters: any of the words it may say counts 2, and the rest is unreadable.
    let keys = "samples = 3\nmax_new_tokens = 6\nscale = [0, 9]\nparse = '(\\d)'\nprompt = \"{prompt} {answer}\"";
    let case = Case::new(4, &flow(1, &scored(keys)));
    let output = case.done(&["flow.toml"]);
    let said = case.texts(1, "judge/rows", "judge_generations");
    assert_eq!(said.len(), 16);
    let (scores, samples) = (case.texts(1, "judge/rows", "score"), case.texts(1, "judge/rows", "score_samples"));
    for (score, samples) in scores.iter().zip(&samples) {
        assert_eq!(score.is_empty(), samples == "0", "no sample that can be read, no score");
        assert!(samples.parse::<u32>().unwrap() <= 3);
    }
    let unreadable = scores.iter().filter(|s| s.is_empty()).count();
    let health = &case.summary()["rounds"][0]["judge"];
    assert_eq!(health["unreadable"].as_u64(), Some(unreadable as u64));
    assert!(unreadable <= 8 || stderr(&output).contains("could not be read"), "{}", stderr(&output));
}

#[test]
fn several_models_judge_together() {
    let model = tiny_model();
    let second = format!("[models.second]\nsource = {model:?}\ndtype = \"f32\"\nsystem_prompt = \"judge with care\"\n");
    let judge = |model: &str, combine: &str| {
        format!(
            "[stages.judge]\nkind = \"judge\"\ninput = \"sample\"\nmodel = {model}\ndevice = \"cpu:1\"\n{combine}\n"
        )
    };
    let run = |model: &str, combine: &str| {
        let case = Case::new(4, &flow(1, &format!("{second}{}", judge(model, combine))));
        case.done(&["flow.toml"]);
        numbers(&case, "judge/rows", "probability")
    };
    let (one, two) = (run("\"policy\"", ""), run("\"second\"", ""));
    let both = run("[\"policy\", \"second\"]", "combine = \"mean\"");
    assert_eq!(both.len(), 12);
    for ((one, two), both) in one.iter().zip(&two).zip(&both) {
        assert!(((one + two) / 2.0 - both).abs() < 1e-6, "{one} {two} {both}");
    }
}

/// A trainer on the rule's pairs, and a gate over the same prompts.
fn gated(threshold: f64, keys: &str) -> String {
    format!(
        r#"{RULE}
[stages.prefer]
kind = "pairs"
input = "judge"
[stages.align]
kind = "trainer"
train = "prefer"
model = "policy"
device = "cpu:0"
learning_rate = 1e-3
batch_size = 2
start = "continue"
reference = "previous"
lora = {{ r = 4, alpha = 8 }}
[stages.held_out]
kind = "source"
dataset = "prompts.jsonl"
take = 4
[stages.gate]
kind = "gate"
input = "held_out"
model = "policy"
device = "cpu:0"
max_new_tokens = 8
threshold = {threshold}
{keys}
"#
    )
}

const BY_RULE: &str = "judge = { method = \"rule\", rule = \"length(generation) % 3\" }";

#[test]
fn a_round_below_the_threshold_ends_the_run() {
    let case = Case::new(8, &flow(3, &gated(1.0, BY_RULE)));
    let output = case.done(&["flow.toml"]);
    let summary = case.summary();
    assert_eq!(summary["status"], "stopped_by_gate");
    assert_eq!(summary["rounds"].as_array().unwrap().len(), 1);
    let gate = &summary["rounds"][0]["gate"];
    assert_eq!((&gate["passed"], &gate["prompts"]), (&Value::Bool(false), &Value::from(4)));
    let wins: f64 = numbers(&case, "gate/rows", "win").iter().sum();
    assert_eq!(gate["win_rate"], wins / 4.0);
    assert!(stderr(&output).contains("held-out prompts"), "{}", stderr(&output));
    // It says the same when it is asked again, and asks no model for it.
    case.done(&["flow.toml"]);
    assert_eq!(case.summary()["status"], "stopped_by_gate");
    assert_eq!(case.summary()["rounds"][0]["stages"]["gate"]["reused_rows"], 4);
}

#[test]
fn a_round_that_is_left_out_keeps_the_adapter_before() {
    let kept = format!("{BY_RULE}\notherwise = \"keep\"");
    let case = Case::new(8, &flow(2, &gated(1.0, &kept)));
    case.done(&["flow.toml"]);
    assert_eq!(case.summary()["status"], "done");
    // Round 2 samples as round 1 did, up to the round's own random numbers: with the base.
    let scores = |rounds: u32, threshold: f64| {
        let case = Case::new(8, &flow(rounds, &gated(threshold, &kept)));
        case.done(&["flow.toml"]);
        case.texts(2, "sample/rows", "generation")
    };
    let left_out = case.texts(2, "sample/rows", "generation");
    assert_ne!(scores(2, 0.0), left_out, "a round that passes is what the next one samples with");
    let train = &case.summary()["rounds"][1]["train"];
    assert!(train["steps"].as_u64().unwrap() > 0, "{train}");
}

#[test]
fn a_gates_judge_is_checked_with_its_place() {
    for (judge, wanted) in [
        ("judge = { method = \"rule\" }", "stages.gate.judge.rule: is missing"),
        ("judge = { method = \"rule\", rule = \"x\" }", "stages.gate.judge.rule:"),
        ("judge = { model = \"polcy\" }", "did you mean `policy`?"),
        ("judge = { ordre = \"both\" }", "stages.gate.judge.ordre"),
        ("judge = { model = \"policy\" }\nthreshold = 2.0", "duplicate key"),
        ("", "judge"),
    ] {
        let case = Case::new(2, &flow(2, &gated(0.5, judge)));
        let output = case.run(&["check", "flow.toml"]);
        assert_eq!(output.status.code(), Some(2), "{judge}");
        assert!(stderr(&output).contains(wanted), "{wanted}: {}", stderr(&output));
    }
}

#[test]
fn a_gate_judges_both_orders_by_default() {
    let keys = "judge = { model = \"policy\", device = \"cpu:1\", adapter = \"base\" }\notherwise = \"keep\"";
    let case = Case::new(8, &flow(1, &gated(0.0, keys)));
    case.done(&["flow.toml"]);
    let gate = &case.summary()["rounds"][0]["gate"];
    assert_eq!(gate["passed"], true);
    assert!(gate["score"].is_null() && gate["win_rate"].as_f64().unwrap() >= 0.0);
}
