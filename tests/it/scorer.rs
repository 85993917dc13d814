//! Scores of sampled answers, against what the sampler itself saw.

use flowrun::arrow::array::AsArray;
use flowrun::arrow::datatypes::{Float64Type, UInt64Type};

use crate::support::{Case, stderr, tiny_flow};

/// `key` has lines for the scorer.
fn with_scorer(key: &str) -> String {
    let stages = format!(
        r#"
[stages.answers]
kind = "mapper"
input = "sample"
sql = """
SELECT prompt, generation AS completion, generation_ids AS completion_ids,
       finish_reason AS completion_finish_reason, logprob AS sampled, generation_tokens
FROM input"""

[stages.score]
kind = "scorer"
input = "answers"
model = "policy"
device = "cpu:1"
{key}
"#
    );
    tiny_flow(1, &stages)
}

/// Log-probs by the sampler and by the scorer, tokens by the sampler and by the scorer.
fn scores(case: &Case) -> Vec<([f64; 2], [u64; 2])> {
    let rows = case.table(1, "score/rows");
    let rows = rows.iter().flat_map(|batch| {
        let [sampled, scored] = ["sampled", "logprob"].map(|name| batch[name].as_primitive::<Float64Type>().clone());
        let [all, counted] =
            ["generation_tokens", "logprob_tokens"].map(|name| batch[name].as_primitive::<UInt64Type>().clone());
        (0..batch.num_rows())
            .map(move |i| ([sampled.value(i), scored.value(i)], [all.value(i), counted.value(i)]))
            .collect::<Vec<_>>()
    });
    rows.collect()
}

#[test]
fn an_answer_is_as_probable_as_when_it_was_sampled() {
    let case = Case::new(12, &with_scorer(""));
    case.done(&["flow.toml"]);
    let rows = scores(&case);
    assert_eq!(rows.len(), 24);
    for ([sampled, scored], [all, counted]) in &rows {
        assert_eq!(all, counted);
        assert!((sampled - scored).abs() < 1e-3, "sampled at {sampled}, scored {scored}");
    }

    let again = case.done(&["flow.toml", "--recompute"]);
    assert_eq!(case.summary()["rounds"][0]["stages"]["score"]["reused_rows"], 12, "{}", stderr(&again));
    assert_eq!(scores(&case), rows);
}

#[test]
fn the_trained_adapter_scores_otherwise() {
    let case = Case::new(12, &with_scorer("adapter = \"align\""));
    case.done(&["flow.toml", "--set", "stages.align.learning_rate=1e-2"]);
    assert!(scores(&case).iter().any(|([sampled, scored], _)| (sampled - scored).abs() > 1e-2));
}
