//! How answers are drawn and where they end, through the binary.

use flowrun::arrow::array::AsArray;
use flowrun::arrow::datatypes::{Float32Type, Float64Type, UInt32Type};

use crate::support::{Case, stderr, tiny_flow};

#[test]
fn answers_end_in_front_of_stop_strings_and_keep_their_log_probs() {
    let case = Case::new(12, &tiny_flow(1, ""));
    let keys = ["stop=[\"e\", \"an\"]", "logprobs=true", "repetition_penalty=1.3", "presence_penalty=0.5"];
    let sets: Vec<String> = keys.iter().map(|key| format!("stages.sample.{key}")).collect();
    let mut args = vec!["flow.toml"];
    sets.iter().for_each(|set| args.extend(["--set", set.as_str()]));
    case.done(&args);
    let (mut rows, mut stopped) = (0, 0);
    for batch in case.table(1, "sample/rows") {
        let texts = batch["generation"].as_string::<i32>();
        let ends = batch["finish_reason"].as_string::<i32>();
        let sums = batch["logprob"].as_primitive::<Float64Type>();
        for row in 0..batch.num_rows() {
            let text = texts.value(row);
            assert!(!text.contains('e') && !text.contains("an"), "{text:?}");
            let each = batch["generation_logprobs"].as_list::<i32>().value(row);
            let each = each.as_primitive::<Float32Type>();
            let ids = batch["generation_ids"].as_list::<i32>().value(row);
            assert_eq!(ids.as_primitive::<UInt32Type>().len(), each.len());
            let sum: f64 = each.values().iter().map(|p| f64::from(*p)).sum();
            assert!((sum - sums.value(row)).abs() < 1e-4 && each.values().iter().all(|p| *p <= 0.0));
            rows += 1;
            stopped += usize::from(ends.value(row) == "stop");
        }
    }
    assert_eq!(rows, 24);
    assert!(stopped > 0, "no answer met a stop string");
}

#[test]
fn settings_out_of_range_are_refused() {
    let case = Case::new(4, &tiny_flow(1, ""));
    for (set, part) in [
        ("repetition_penalty=0", "repetition_penalty"),
        ("presence_penalty=3", "from -2 to 2"),
        ("stop=[\"\"]", "has an empty string"),
    ] {
        let set = format!("stages.sample.{set}");
        let output = case.run(&["check", "flow.toml", "--set", &set]);
        assert_eq!(output.status.code(), Some(2), "{set}");
        assert!(stderr(&output).contains(part), "{part:?} is not in {}", stderr(&output));
    }
}
