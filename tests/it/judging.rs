//! Judges that score, rules, pairs from several answers, gates: through the program, on the tiny model.

use serde_json::Value;

use crate::chat_server::{Said, Server};
use crate::support::{Case, gate, stderr, tiny_model};

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
    case.done(&["flow.toml", "--recompute"]);
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
{}
"#,
        gate(threshold, keys)
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
    case.done(&["flow.toml", "--recompute"]);
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

/// The flow with a judge at `server`, and `keys` of it.
fn at_server(server: &Server, keys: &str) -> Case {
    let model = format!("[models.scripted]\nendpoint = {:?}\nname = \"scripted\"\n", server.address);
    let judge = format!("[stages.judge]\nkind = \"judge\"\ninput = \"sample\"\nmodel = \"scripted\"\n{keys}\n");
    Case::new(4, &flow(1, &format!("{model}{judge}")))
}

/// What stands between the fences after `label`.
fn shown<'a>(question: &'a str, label: &str) -> &'a str {
    let fence = question.lines().next().unwrap().split("the lines ").nth(1).unwrap();
    let fence = &fence[..fence.find(" is material").unwrap()];
    question.split(label).nth(1).unwrap().split(fence).nth(1).unwrap().trim()
}

fn asked_of(request: &Value) -> String {
    request["messages"].as_array().unwrap().last().unwrap()["content"].as_str().unwrap().to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn known_verdicts_are_found_whatever_the_order() {
    // It likes the longer answer, and of equally long ones the later in the alphabet.
    let server = Server::start(|_, request| {
        let asked = asked_of(request);
        let [a, b] = ["Response A:", "Response B:"].map(|label| shown(&asked, label));
        Said::text(if (a.len(), a) > (b.len(), b) { "I say Response A." } else { "Response B" })
    })
    .await;
    tokio::task::block_in_place(|| {
        for order in ["both", "random"] {
            let case = at_server(&server, &format!("read = \"text\"\norder = \"{order}\"\ncompare = \"all\""));
            case.done(&["flow.toml"]);
            let column = |name: &str| case.texts(1, "judge/rows", name);
            let (a, b, verdicts) = (column("a"), column("b"), column("verdict"));
            assert_eq!(verdicts.len(), 24, "six pairs of four answers");
            for ((a, b), verdict) in a.iter().zip(&b).zip(&verdicts) {
                let [x, y] = [a, b].map(|text| (text.trim().len(), text.trim()));
                let wanted = if x > y { "a" } else { "b" };
                assert!(a == b && verdict == "tie" || x == y || verdict == wanted, "{order}: {a:?} {b:?} {verdict}");
            }
            let health = &case.summary()["rounds"][0]["judge"];
            assert_eq!(health["unreadable"], 0);
            let consistency = if order == "both" { Value::from(1.0) } else { Value::Null };
            assert_eq!(health["swap_consistency"], consistency);
            assert!(health["longer_wins_rate"].as_f64().unwrap() > 0.5);
        }
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn a_judge_that_sees_places_is_found_out() {
    let server = Server::start(|_, _| Said::text("Response A")).await;
    tokio::task::block_in_place(|| {
        let both = at_server(&server, "read = \"text\"\norder = \"both\"\ncompare = \"all\"");
        let output = both.done(&["flow.toml"]);
        let health = both.summary()["rounds"][0]["judge"].clone();
        assert_eq!((&health["tie_rate"], &health["swap_consistency"]), (&Value::from(1.0), &Value::from(0.0)));
        assert_eq!(health["first_slot_rate"], 1.0);
        assert!(stderr(&output).contains("the judge has a position bias"), "{}", stderr(&output));
        let random = at_server(&server, "read = \"text\"\norder = \"random\"\ncompare = \"all\"");
        random.done(&["flow.toml"]);
        let health = random.summary()["rounds"][0]["judge"].clone();
        assert_eq!((&health["first_slot_rate"], &health["tie_rate"]), (&Value::from(1.0), &Value::from(0.0)));
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn what_can_not_be_read_is_a_tie_and_counted() {
    let junk = ["", "Die erste Antwort ist besser.", "Response A and Response B", "響應甲", "{\"winner\": 1}"];
    let server = Server::start(move |number, _| Said::text(junk[number % junk.len()])).await;
    let never = Server::start(|_, _| Said::text("Response A")).await;
    tokio::task::block_in_place(|| {
        let parse = "read = \"text\"\nparse = 'Verdict: (.*)'";
        for (server, keys) in [(&server, "read = \"text\""), (&never, parse)] {
            let case = at_server(server, keys);
            let output = case.done(&["flow.toml"]);
            let health = case.summary()["rounds"][0]["judge"].clone();
            assert_eq!((&health["unreadable_rate"], &health["tie_rate"]), (&Value::from(1.0), &Value::from(1.0)));
            assert!(case.texts(1, "judge/rows", "chosen").iter().all(String::is_empty));
            assert!(stderr(&output).contains("could not be read"), "{}", stderr(&output));
        }
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn a_judge_is_measured_on_a_labelled_set_once() {
    let server = Server::start(|_, request| {
        let good = shown(&asked_of(request), "Response A:").contains("good");
        Said::text(if good { "Response A" } else { "Response B" })
    })
    .await;
    tokio::task::block_in_place(|| {
        let case = at_server(&server, "read = \"text\"\norder = \"both\"\nlabelled = \"labelled.jsonl\"");
        let line = |a: &str, b: &str, verdict: &str| {
            format!("{{\"prompt\": \"p\", \"a\": {a:?}, \"b\": {b:?}, \"verdict\": {verdict:?}}}\n")
        };
        let lines =
            [line("good", "bad", "a"), line("bad", "good", "b"), line("bad", "good", "a"), line("bad", "worse", "tie")];
        case.write("labelled.jsonl", &lines.concat());
        case.done(&["flow.toml"]);
        let labelled = case.summary()["rounds"][0]["judge"]["labelled"].clone();
        // "bad" against "worse": it says B in both orders, which is a tie.
        assert_eq!(
            (&labelled["examples"], &labelled["agreement"]),
            (&Value::from(4), &Value::from(0.75)),
            "{labelled}"
        );
        let asked = server.asked().len();
        case.done(&["flow.toml"]);
        assert_eq!(case.summary()["rounds"][0]["judge"]["labelled"], labelled);
        assert_eq!(server.asked().len(), asked, "nobody is asked again");

        case.write("labelled.jsonl", "{\"prompt\": \"p\"}\n");
        let message = stderr(&case.run(&["check", "flow.toml"]));
        assert!(message.contains("stages.judge.labelled: labelled.jsonl has no column \"a\""), "{message}");
    });
}

#[test]
fn judges_that_rank_alike_keep_their_labels_and_others_soften_them() {
    let judge = |name: &str, rule: &str| {
        format!("[stages.{name}]\nkind = \"judge\"\ninput = \"sample\"\nmethod = \"rule\"\nrule = \"{rule}\"\n")
    };
    let joined = r#"
[stages.ranked]
kind = "mapper"
input = ["now", "before"]
sql = "SELECT now.*, before.score AS score_before FROM now JOIN before ON now._row = before._row AND now._candidate = before._candidate"
[stages.prefer]
kind = "pairs"
input = "ranked"
consistency = "score_before"
"#;
    let labels = |before: &str| {
        let stages = format!("{}{}{joined}", judge("now", "length(generation)"), judge("before", before));
        let case = Case::new(6, &flow(1, &stages));
        case.done(&["flow.toml"]);
        numbers(&case, "prefer/rows", "label")
    };
    let same = labels("length(generation) * 2");
    assert!(!same.is_empty() && same.iter().all(|label| *label == 1.0), "{same:?}");
    let reversed = labels("-length(generation)");
    assert!(reversed.iter().all(|label| *label == 0.0), "{reversed:?}");
    let constant = labels("1");
    assert!(constant.iter().all(|label| *label == 0.5), "{constant:?}");
}

/// A flow whose trainer learns from the rule's pairs, and whose gate asks the server.
fn gate_at_server(server: &Server, judge: &str, keys: &str) -> Case {
    let model = format!("[models.scripted]\nendpoint = {:?}\nname = \"scripted\"\n", server.address);
    let keys = format!("judge = {{ model = \"scripted\", read = \"text\", {judge} }}\n{keys}");
    Case::new(
        8,
        &flow(1, &format!("{model}{}", gated(0.5, &keys)))
            .replace("max_new_tokens = 8\nthreshold", "max_new_tokens = 8\ntemperature = 1.0\nthreshold"),
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gate_does_not_pass_on_what_can_not_be_read() {
    let silent = Server::start(|_, _| Said::text("I'd rather not grade these two.")).await;
    // Of every second prompt it says something.
    let halting = Server::start(|_, request| {
        let even = asked_of(request).contains("number 0") || asked_of(request).contains("number 2");
        Said::text(if even { "Score: 4" } else { "Hm." })
    })
    .await;
    tokio::task::block_in_place(|| {
        for judge in ["method = \"pairwise\"", "method = \"pairwise\", unreadable = \"coin\"", "method = \"score\""] {
            let case = gate_at_server(&silent, judge, "");
            let output = case.done(&["flow.toml"]);
            assert_eq!(case.summary()["status"], "stopped_by_gate", "{judge}");
            let gate = case.summary()["rounds"][0]["gate"].clone();
            assert_eq!((&gate["passed"], &gate["win_rate"]), (&Value::Bool(false), &Value::Null), "{judge}");
            assert_eq!((&gate["prompts"], &gate["unreadable"]), (&Value::from(4), &Value::from(4)), "{judge}");
            assert!(stderr(&output).contains("could not be read and don't count"), "{}", stderr(&output));
            assert!(case.texts(1, "gate/rows", "win").iter().all(String::is_empty));
        }
        let case = gate_at_server(&halting, "method = \"score\"", "");
        case.done(&["flow.toml"]);
        let gate = case.summary()["rounds"][0]["gate"].clone();
        assert_eq!((&gate["win_rate"], &gate["unreadable"]), (&Value::from(0.5), &Value::from(2)), "{gate}");
        assert_eq!((&gate["passed"], &gate["ties"]), (&Value::Bool(true), &Value::from(2)), "{gate}");
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn reasoning_is_no_verdict_and_a_cut_answer_names_its_remedy() {
    let server = Server::start(|_, request| match asked_of(request) {
        asked if asked.contains("number 0") => Said::cut("<think>Start low: Score: 1 so far. Now the"),
        asked if asked.contains("number 1") => Said::cut("It covers what was asked, and"),
        asked if asked.contains("number 2") => Said::text("<think>Score: 1? No.</think>\n**Score**: 4/5"),
        _ => Said::text("Score: 3. It would score 5 with one example more."),
    })
    .await;
    tokio::task::block_in_place(|| {
        let case = at_server(&server, "method = \"score\"\nmax_new_tokens = 64");
        let output = case.done(&["flow.toml"]);
        let rows = case.texts(1, "judge/rows", "_row").into_iter().zip(case.texts(1, "judge/rows", "score"));
        for (row, score) in rows {
            assert_eq!(score, ["", "", "4.0", "3.0"][row.parse::<usize>().unwrap()], "row {row}");
        }
        let health = case.summary()["rounds"][0]["judge"].clone();
        assert_eq!((&health["unreadable"], &health["unreadable_cut"]), (&Value::from(8), &Value::from(8)));
        assert!(
            stderr(&output).contains("8 of the judge's answers were cut off before a verdict; raise max_new_tokens")
        );
        // It says so of rows that it finds in the journal too.
        assert!(stderr(&case.done(&["flow.toml", "--recompute"])).contains("raise max_new_tokens"));
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn a_coin_for_what_can_not_be_read_makes_a_pair() {
    let server = Server::start(|_, _| Said::text("Hm.")).await;
    tokio::task::block_in_place(|| {
        for (unreadable, pairs) in [("coin", true), ("tie", false)] {
            let keys = format!(
                "read = \"text\"\nunreadable = \"{unreadable}\"\n[stages.prefer]\nkind = \"pairs\"\ninput = \"judge\""
            );
            let case = at_server(&server, &keys);
            case.done(&["flow.toml"]);
            let health = case.summary()["rounds"][0]["judge"].clone();
            assert_eq!((health["paired"] == 4, &health["unreadable_rate"]), (pairs, &Value::from(1.0)), "{health}");
        }
    });
}

#[test]
fn datadreamers_coin_of_a_row_decides_its_verdict() {
    let judge = "[stages.judge]\nkind = \"judge\"\ninput = \"sample\"\nmodel = \"policy\"\nread = \"text\"\norder = \"datadreamer\"\n";
    let case = || Case::new(16, &flow(1, judge));
    let sharded = ["flow.toml", "--set", "stages.prompts.shard={ count = 2 }", "--recompute"];
    let (edited, fresh) = (case(), case());
    edited.done(&["flow.toml"]);
    edited.done(&sharded);
    fresh.done(&sharded);
    // Of every second row's place, another coin is drawn for some and the same for others.
    let reused = edited.summary()["rounds"][0]["stages"]["judge"]["reused_rows"].as_u64().unwrap();
    assert!(0 < reused && reused < 8, "{reused} of 8 rows");
    assert_eq!(edited.table(1, "judge/rows"), fresh.table(1, "judge/rows"));
}

#[test]
fn a_rule_that_fails_on_a_row_gives_up_that_row_alone() {
    let pairs = "[stages.prefer]\nkind = \"pairs\"\ninput = \"judge\"\n";
    for rule in [
        "length(generation) / (n - 2)",
        "CAST(CASE WHEN n = 2 THEN 'x' ELSE '1' END AS INT) + length(generation)",
        "regexp_like(generation, CASE WHEN n = 2 THEN '[' ELSE 'a' END)",
    ] {
        let text = flow(1, &format!("{RULE}{pairs}")).replace("length(generation) % 3", rule);
        let case = Case::new(6, &text);
        case.done(&["flow.toml", "--set", "max_dead_letters=0.5"]);
        let rows = case.texts(1, "judge/rows", "_row");
        assert_eq!((rows.len(), rows.contains(&"2".to_owned())), (20, false), "{rule}");
        let reasons = case.texts(1, "../dead_letters", "reason");
        assert!(reasons.len() == 1 && reasons[0].contains("the rule can't be computed"), "{reasons:?}");
    }
}

#[test]
fn what_can_not_give_a_verdict_is_told_at_check() {
    let check = |text: String| {
        let output = Case::new(2, &text).run(&["check", "flow.toml"]);
        (output.status.code(), format!("{}{}", stderr(&output), String::from_utf8_lossy(&output.stdout)))
    };
    let judge = "[stages.judge]\nkind = \"judge\"\ninput = \"sample\"\nmodel = \"policy\"\n";
    let (code, told) = check(flow(1, judge).replace("candidates = 4", "candidates = 1"));
    assert!(code == Some(2) && told.contains("a pairwise judge compares two"), "{told}");
    let (code, told) = check(flow(1, judge).replace("candidates = 4", "candidates = 4\ntemperature = 0"));
    assert!(code == Some(0) && told.contains("every pair a tie: temperature = 0 in stages.sample"), "{told}");
    let pairs = "[stages.prefer]\nkind = \"pairs\"\ninput = \"judge\"\n";
    let (code, told) = check(flow(1, &format!("{RULE}{pairs}")).replace("candidates = 4", "candidates = 1"));
    assert!(code == Some(2) && told.contains("a pair needs two"), "{told}");
    let (code, told) = check(flow(1, RULE).replace("length(generation) % 3", "trim(generation) = n"));
    assert!(code == Some(2) && told.contains("stages.judge.rule: compares the text"), "{told}");
    assert!(told.contains("CAST(n AS STRING)"), "{told}");
}
