//! Rows that queries join and multiply: each arrives where it belongs, and only what belongs together is compared.

use serde_json::{Value, json};

use crate::support::{Case, tiny_model};

fn lines(rows: impl IntoIterator<Item = Value>) -> String {
    rows.into_iter().map(|row| format!("{row}\n")).collect()
}

fn read(case: &Case, file: &str) -> Vec<Value> {
    let text = std::fs::read_to_string(case.path("runs/tiny").join(file)).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

const ECHO: &str = r#"
import json, sys
for line in sys.stdin:
    row = json.loads(line)
    print(json.dumps({"_key": row["_key"], "n": len(row["generation"])}), flush=True)
"#;

/// Twenty answers in two groups, joined with their group's mean, in either order of the tables.
fn joined(from: &str, then: &str, sink: &str) -> Case {
    let flow = format!(
        r#"
        name = "tiny"
        [stages.rows]
        kind = "source"
        dataset = "rows.jsonl"
        [stages.judge]
        kind = "judge"
        input = "rows"
        method = "rule"
        rule = "length(generation)"
        [stages.stats]
        kind = "mapper"
        input = "judge"
        sql = "SELECT \"group\", avg(score) AS m FROM input GROUP BY \"group\""
        [stages.joined]
        kind = "mapper"
        input = ["stats", "judge"]
        sql = "SELECT judge.prompt, judge.generation, judge.score, stats.m FROM {from} ON judge.\"group\" = stats.\"group\""
        {then}
        [stages.out]
        kind = "sink"
        input = "{sink}"
        path = "out.jsonl"
        "#
    );
    let case = Case::new(0, &flow);
    let row = |i: usize| json!({"prompt": format!("p{i}"), "generation": "x".repeat(i + 1), "group": i % 2});
    std::fs::write(case.path("rows.jsonl"), lines((0..20).map(row))).unwrap();
    std::fs::write(case.path("echo.py"), ECHO).unwrap();
    case
}

const PROCESS: &str = r#"
        [stages.again]
        kind = "process"
        input = "joined"
        command = ["python3", "echo.py"]
        columns = { n = "f64" }
        files = ["echo.py"]
"#;

#[test]
fn a_join_completes_the_rows_that_come_out_of_it() {
    let case = joined("judge JOIN stats", PROCESS, "again");
    case.done(&["flow.toml"]);
    let rows = read(&case, "out.jsonl");
    assert_eq!(rows.len(), 20);
    for (i, row) in rows.iter().enumerate() {
        assert_eq!((row["prompt"].as_str(), row["n"].as_f64()), (Some(&*format!("p{i}")), Some((i + 1) as f64)));
    }
    assert_eq!((rows[0]["m"].as_f64(), rows[1]["m"].as_f64()), (Some(10.0), Some(11.0)));
}

#[test]
fn rows_that_a_join_makes_of_a_group_are_parts_of_it() {
    let case = joined("stats JOIN judge", PROCESS, "again");
    case.done(&["flow.toml"]);
    assert_eq!(read(&case, "out.jsonl").len(), 20);
}

#[test]
fn a_split_behind_a_join_knows_the_rows_of_its_source() {
    let split = r#"
        [stages.halves]
        kind = "split"
        input = "joined"
        outputs = { train = 0.75, validation = 0.25 }
        [stages.kept]
        kind = "sink"
        input = "halves.train"
        path = "kept.jsonl"
    "#;
    let case = joined("judge JOIN stats", split, "halves.validation");
    case.done(&["flow.toml"]);
    assert_eq!((read(&case, "kept.jsonl").len(), read(&case, "out.jsonl").len()), (15, 5));
    let held: Vec<_> = read(&case, "out.jsonl").iter().map(|row| row["_row"].as_u64().unwrap()).collect();
    assert_eq!(held, [3, 7, 11, 15, 19], "spread evenly over the source");
}

/// Two questions in each of four rows, by UNNEST or by a join, answered twice each.
fn asked(mapper: &str, then: &str) -> Case {
    let flow = format!(
        r#"
        name = "tiny"
        [models.policy]
        source = {:?}
        dtype = "f32"
        [stages.rows]
        kind = "source"
        dataset = "rows.jsonl"
        [stages.kinds]
        kind = "source"
        dataset = "kinds.jsonl"
        [stages.each]
        kind = "mapper"
        {mapper}
        [stages.sample]
        kind = "sampler"
        input = "each"
        model = "policy"
        candidates = 2
        max_new_tokens = 8
        {then}
        [stages.out]
        kind = "sink"
        input = "last"
        path = "out.jsonl"
        "#,
        tiny_model().display().to_string()
    );
    let case = Case::new(0, &flow);
    let row = |i: usize| json!({"topic": format!("t{i}"), "questions": [format!("a t{i}"), format!("b t{i}")]});
    std::fs::write(case.path("rows.jsonl"), lines((0..4).map(row))).unwrap();
    std::fs::write(case.path("kinds.jsonl"), lines([json!({"word": "a"}), json!({"word": "b"})])).unwrap();
    case
}

const UNNEST: &str = "input = \"rows\"\nsql = \"SELECT unnest(questions) AS prompt FROM input\"";
const CROSS: &str = "input = [\"rows\", \"kinds\"]\nsql = \"SELECT kinds.word || ' ' || rows.topic AS prompt FROM rows \
                     CROSS JOIN kinds\"";

/// The prompts of rows, each of which must be one of the eight questions.
fn prompts(rows: &[Value]) -> Vec<String> {
    let mut prompts: Vec<String> = rows.iter().map(|row| row["prompt"].as_str().unwrap().to_owned()).collect();
    prompts.sort();
    prompts
}

fn questions() -> Vec<String> {
    ["a", "b"].iter().flat_map(|word| (0..4).map(move |i| format!("{word} t{i}"))).collect()
}

#[test]
fn answers_are_compared_with_answers_to_the_same_prompt() {
    let judge = "[stages.last]\nkind = \"judge\"\ninput = \"sample\"\nmodel = \"policy\"";
    for mapper in [UNNEST, CROSS] {
        let case = asked(mapper, judge);
        case.done(&["flow.toml"]);
        let rows = read(&case, "out.jsonl");
        assert_eq!(prompts(&rows), questions(), "{mapper}: one pair a question");
        let sampled = case.texts(1, "sample/rows", "generation");
        let asked = case.texts(1, "sample/rows", "prompt");
        for row in &rows {
            let own: Vec<&str> =
                (0..sampled.len()).filter(|i| row["prompt"] == *asked[*i]).map(|i| &*sampled[i]).collect();
            assert_eq!([row["a"].as_str().unwrap(), row["b"].as_str().unwrap()], own.as_slice());
        }
        let mut keys: Vec<_> = rows.iter().map(|row| (row["_row"].as_u64(), row["_pair"].as_u64())).collect();
        keys.dedup();
        assert_eq!(keys.len(), 8, "pairs of a row have numbers of their own");
    }
}

#[test]
fn pairs_are_of_answers_to_the_same_prompt() {
    let pairs = r#"
        [stages.judge]
        kind = "judge"
        input = "sample"
        method = "rule"
        rule = "character_length(generation) + 100 * _candidate"
        [stages.last]
        kind = "pairs"
        input = "judge"
    "#;
    for mapper in [UNNEST, CROSS] {
        let case = asked(mapper, pairs);
        case.done(&["flow.toml"]);
        let rows = read(&case, "out.jsonl");
        assert_eq!(prompts(&rows), questions(), "{mapper}");
        let candidate = |row: &Value, side: &str| row[side].as_u64().unwrap();
        for row in &rows {
            let both = [candidate(row, "chosen_candidate"), candidate(row, "rejected_candidate")];
            assert_eq!(both[0] / 2, both[1] / 2, "candidates 0 and 1 answer the first question, 2 and 3 the second");
        }
    }
}
