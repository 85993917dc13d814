//! Penalties, stop strings and log-probs of a sampler, by the columns it writes.

use flowrun::arrow::array::AsArray;
use flowrun::arrow::datatypes::{Float32Type, Float64Type, UInt32Type, UInt64Type};
use flowrun::model::{Config, Tokenizer};

use crate::support::{Case, stderr, tiny_flow, tiny_model};

fn with_keys(keys: &str) -> String {
    tiny_flow(1, "").replace("max_new_tokens = 12", &format!("max_new_tokens = 40\n{keys}"))
}

fn sampled(keys: &str) -> Case {
    let case = Case::new(12, &with_keys(keys));
    case.done(&["flow.toml"]);
    case
}

/// Text, why it ended, ids, and the sum of the log-probs and each, of every answer.
type Answer = (String, String, Vec<u32>, f64, Option<Vec<f32>>);

fn answers(case: &Case) -> Vec<Answer> {
    let texts = case.texts(1, "sample/rows", "generation").into_iter();
    let reasons = case.texts(1, "sample/rows", "finish_reason").into_iter();
    let numbers = case.table(1, "sample/rows").into_iter().flat_map(|batch| {
        let (ids, sums) = (batch["generation_ids"].as_list::<i32>(), batch["logprob"].as_primitive::<Float64Type>());
        let counts = batch["generation_tokens"].as_primitive::<UInt64Type>();
        let each = batch.column_by_name("generation_logprobs").map(|c| c.as_list::<i32>());
        let row = |i: usize| {
            let ids = ids.value(i).as_primitive::<UInt32Type>().values().to_vec();
            assert_eq!(counts.value(i), ids.len() as u64);
            (ids, sums.value(i), each.map(|e| e.value(i).as_primitive::<Float32Type>().values().to_vec()))
        };
        (0..batch.num_rows()).map(row).collect::<Vec<_>>()
    });
    texts.zip(reasons).zip(numbers).map(|((text, reason), (ids, sum, each))| (text, reason, ids, sum, each)).collect()
}

#[test]
fn stop_strings_penalties_and_log_probs() {
    let keys = "repetition_penalty = 1.1\npresence_penalty = 0.3\nlogprobs = true";
    let free = answers(&sampled(keys));
    let stopped = answers(&sampled(&format!("{keys}\nstop = [\"e\", \"tr\"]")));
    let dir = tiny_model();
    let config = Config::from_json(&dir.join("config.json")).unwrap();
    let tokenizer = Tokenizer::from_dir(&dir, &config).unwrap();
    assert_eq!(free.len(), 24);
    let mut cut = 0;
    for ((whole, _, all, ..), (text, reason, ids, sum, each)) in free.iter().zip(&stopped) {
        let place = ["e", "tr"].iter().filter_map(|stop| whole.find(stop)).min();
        assert_eq!(text, &whole[..place.unwrap_or(whole.len())]);
        assert!(all.starts_with(ids), "the same tokens, or fewer");
        assert!(tokenizer.decode(ids, true).unwrap().starts_with(text.as_str()));
        let each = each.as_ref().unwrap();
        assert_eq!(each.len(), ids.len());
        assert!((each.iter().map(|p| f64::from(*p)).sum::<f64>() - sum).abs() < 1e-9);
        if place.is_some() {
            cut += 1;
            assert_eq!(reason, "stop");
            // without its last token the text would lack something
            let fewer = ids.split_last().map(|(_, fewer)| tokenizer.decode(fewer, true).unwrap());
            assert!(fewer.is_none_or(|fewer| !fewer.starts_with(text.as_str())), "{text:?} {ids:?}");
        }
    }
    assert!(cut > 3, "{cut} answers have a stop string");
}

#[test]
fn a_stop_token_stays() {
    let free = answers(&sampled(""));
    let token = free[0].2[3];
    let stopped = answers(&sampled(&format!("stop_token_ids = [{token}]")));
    for ((_, _, all, ..), (_, reason, ids, _, each)) in free.iter().zip(&stopped) {
        let end = all.iter().position(|id| *id == token).map_or(all.len(), |place| place + 1);
        assert_eq!(ids, &all[..end]);
        assert!(end == all.len() || reason == "stop");
        assert!(each.is_none(), "nobody asked");
    }
}

#[test]
fn wrong_keys_say_what_is_possible() {
    let wrong = |keys: &str, words: &str| {
        let output = Case::new(24, &with_keys(keys)).run(&["flow.toml"]);
        assert_eq!(output.status.code(), Some(2), "{}", stderr(&output));
        assert!(stderr(&output).contains(words), "{words:?} is not in:\n{}", stderr(&output));
    };
    wrong("repetition_penalty = 0.0", "repetition_penalty: is 0; it has to be from 0.01 to 100 (1 is off)");
    wrong("presence_penalty = 2.5", "presence_penalty: is 2.5; it has to be from -2 to 2 (0 is off)");
    wrong("stop = [\"\"]", "stop: has an empty string");
    wrong("stop_token_ids = [5000]", "stop_token_ids: has 5000, and the last token of `policy` is 319");
}
