use std::path::Path;

use datafusion::arrow::json::LineDelimitedWriter;
use serde_json::{Value, json};

use crate::data::candidates::CandidatesOption;
use crate::data::form::RowForm;
use crate::data::shard::Geometry;
use crate::data::{DataError, Source, SourceSpec};

/// A data set as stages get it.
#[derive(Debug)]
struct Seen {
    told: Option<String>,
    /// The columns that are asked for, by row.
    rows: Vec<Value>,
    refused: Vec<(u64, String)>,
}

async fn read(spec: SourceSpec, columns: &[&str]) -> Result<Seen, DataError> {
    let source = Source::open(&spec, Path::new("/")).await?;
    let total = source.count().await?;
    let mut rows = source.rows(Geometry { index: 0, count: 1, contiguous: false, total }).await?;
    let mut seen = Seen { told: source.conversion().told().map(str::to_owned), rows: Vec::new(), refused: Vec::new() };
    let mut completed = Vec::new();
    while let Some(read) = rows.next().await? {
        assert_eq!(read.batch.schema_ref(), source.schema());
        completed.extend(read.completes);
        seen.refused.extend(read.refused.into_iter().map(|refused| (refused.row, refused.reason)));
        let mut text = Vec::new();
        let mut writer = LineDelimitedWriter::new(&mut text);
        writer.write(&read.batch).unwrap();
        writer.finish().unwrap();
        for line in String::from_utf8(text).unwrap().lines() {
            let row: Value = serde_json::from_str(line).unwrap();
            seen.rows.push(columns.iter().map(|name| row[name].clone()).collect());
        }
    }
    assert_eq!(completed, (0..total).collect::<Vec<_>>(), "every row is completed once");
    Ok(seen)
}

async fn seen_with(
    rows: &[Value],
    form: Option<RowForm>,
    candidates: Option<&str>,
    columns: &[&str],
) -> Result<Seen, DataError> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("data.jsonl");
    std::fs::write(&path, rows.iter().map(|row| format!("{row}\n")).collect::<String>()).unwrap();
    let option = |text: &str| -> CandidatesOption {
        toml::from_str::<toml::Table>(&format!("key = {text}")).unwrap()["key"].clone().try_into().unwrap()
    };
    let dataset = path.display().to_string();
    read(SourceSpec { dataset, form, candidates: candidates.map(option), ..SourceSpec::default() }, columns).await
}

async fn seen(rows: &[Value], columns: &[&str]) -> Seen {
    seen_with(rows, None, None, columns).await.unwrap()
}

fn turn(role: &str, content: &str) -> Value {
    json!({"role": role, "content": content})
}

#[tokio::test]
async fn preferences_of_trl() {
    let (ask, good, bad) = (turn("user", "q"), turn("assistant", "good"), turn("assistant", "bad"));
    let columns = ["prompt", "chosen", "rejected"];
    let asked = json!([[ask.clone()], "good", "bad"]);
    // UltraFeedback repeats the prompt in the answers.
    let both = json!({"prompt": "q", "chosen": [ask, good], "rejected": [ask, bad]});
    let found = seen(std::slice::from_ref(&both), &columns).await;
    assert_eq!(found.rows, std::slice::from_ref(&asked));
    assert_eq!(found.told.unwrap(), "read as TRL preference, explicit prompt (form = \"preference\")");

    let mut implicit = both.clone();
    implicit.as_object_mut().unwrap().remove("prompt");
    let found = seen(&[implicit], &columns).await;
    assert_eq!(found.rows, std::slice::from_ref(&asked));
    assert!(found.told.unwrap().starts_with("read as TRL preference, implicit prompt"));

    let answers = json!({"prompt": [ask], "chosen": [good], "rejected": [bad]});
    assert_eq!(seen(&[answers], &columns).await.rows, std::slice::from_ref(&asked));
    let text = json!({"prompt": "q", "chosen": [good], "rejected": [bad]});
    assert_eq!(seen(&[text], &columns).await.rows, [asked]);
    let plain = json!({"prompt": "q", "chosen": "good", "rejected": "bad"});
    let found = seen(&[plain], &columns).await;
    assert_eq!(found.rows, [json!(["q", "good", "bad"])]);
    // The prompt's turns keep their keys, also those that the answers' turns do not have.
    let named = json!({"role": "user", "content": "q", "name": "ann", "n": 1});
    let rows =
        [json!({"prompt": [named], "chosen": [{"role": "assistant", "content": "good", "n": 0.5}], "rejected": [bad]})];
    let found = seen(&rows, &["prompt"]).await;
    assert_eq!(found.rows, [json!([[{"role": "user", "content": "q", "name": "ann", "n": 1.0}]])]);
    // Turns that call other tools are not the same turn, whatever their text.
    let calls = |name: &str| json!({"role": "assistant", "content": "", "tool_calls": [{"name": name}]});
    let row = json!({"chosen": [ask, calls("f"), good], "rejected": [ask, calls("g"), bad]});
    let found = seen(&[row], &columns).await;
    assert_eq!(found.refused[0].1, "`chosen` has 2 turns where an answer is one");
    // Equal answers are no turns of the prompt.
    let equal = json!({"chosen": [ask, good], "rejected": [ask, good]});
    assert_eq!(seen(&[equal], &columns).await.rows, [json!([[ask], "good", "good"])]);
}

#[tokio::test]
async fn preferences_that_can_t_be_read_are_refused_one_by_one() {
    let (ask, good, bad) = (turn("user", "q"), turn("assistant", "good"), turn("assistant", "bad"));
    let other = turn("user", "r");
    let row = |chosen: Value, rejected: Value| json!({"prompt": "q", "chosen": chosen, "rejected": rejected});
    let found = seen(
        &[
            row(json!([ask, good]), json!([ask, bad])),
            row(json!([ask, good, ask, good]), json!([ask, bad, ask, bad])),
            row(json!([ask, good]), json!([ask, other])),
            row(json!([other, good]), json!([other, bad])),
            row(json!([ask, {"role": "assistant", "content": null}]), json!([ask, bad])),
            row(json!([ask, good]), json!(null)),
        ],
        &["chosen", "rejected"],
    )
    .await;
    assert_eq!(found.rows, [json!(["good", "bad"])]);
    let words: Vec<_> = found.refused.iter().map(|(row, reason)| (*row, reason.as_str())).collect();
    assert_eq!(
        words,
        [
            (1, "`chosen` has 3 turns where an answer is one"),
            (2, "`rejected` ends with a turn of the role \"user\", not of the assistant"),
            (3, "`prompt` is not among the turns before the answers; leave it out in `select` to take those turns"),
            (4, "`chosen` ends with a turn without content"),
            (5, "`rejected` has no turns"),
        ]
    );
}

#[tokio::test]
async fn messages_and_sharegpt() {
    let columns = ["prompt", "completion"];
    let parts = json!({"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]});
    let image = json!({"role": "user", "content": [{"type": "image_url", "text": null}]});
    let talk = |turns: &[Value]| json!({"messages": turns});
    let found = seen(&[talk(std::slice::from_ref(&parts)), talk(std::slice::from_ref(&image))], &columns).await;
    assert_eq!(found.rows, [json!([[turn("user", "a\nb")], null])]);
    assert_eq!(
        found.refused[0].1,
        "turn 1 of `messages` has a part of type \"image_url\"; only parts of text are read"
    );
    assert!(found.told.unwrap().starts_with("read as OpenAI messages: `prompt` is the turns before"));

    // Text in some turns, parts of text in others.
    let mixed = [talk(&[turn("user", "q")]), talk(&[parts]), talk(&[turn("user", "r")])];
    let found = seen(&mixed, &["prompt"]).await;
    assert_eq!(found.rows, ["q", "a\nb", "r"].map(|text| json!([[turn("user", text)]])));
    let error = seen_with(&[talk(&[turn("user", "q")]), talk(&[image])], None, None, &[]).await.unwrap_err();
    assert!(error.message.contains("column `messages[].content` has a list here and text in line 1"), "{error:?}");

    let (system, ask, good) = (turn("system", "s"), turn("user", "q"), turn("assistant", "good"));
    let tool = json!({"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]});
    let found = seen(&[talk(&[system.clone(), ask.clone(), good.clone()]), talk(&[ask.clone(), tool])], &columns).await;
    assert_eq!(found.rows, [json!([[system, ask], "good"])]);
    assert_eq!(found.refused[0].1, "`messages` ends with a turn that has `tool_calls`, and an answer is text");

    let from = |from: &str, value: &str| json!({"from": from, "value": value});
    let found = seen(
        &[
            json!({"system": "s", "conversations": [from("human", "q"), from("gpt", "good")]}),
            json!({"system": "", "conversations": [from("human", "q"), from("stranger", "?")]}),
        ],
        &columns,
    )
    .await;
    assert_eq!(found.rows, [json!([[turn("system", "s"), turn("user", "q")], "good"])]);
    assert_eq!(found.refused[0].1, "turn 2 of `conversations` is from \"stranger\", which is no role");
    // Preferences of LLaMA-Factory.
    let row =
        json!({"conversations": [from("human", "q")], "chosen": from("gpt", "good"), "rejected": from("gpt", "bad")});
    let found = seen(&[row], &["prompt", "chosen", "rejected"]).await;
    assert_eq!(found.rows, [json!([[turn("user", "q")], "good", "bad"])]);
}

#[tokio::test]
async fn alpaca_and_kto() {
    let found = seen(
        &[
            json!({"instruction": "i", "input": "x", "output": "o"}),
            json!({"instruction": "i", "input": "", "output": "o"}),
            json!({"instruction": "", "input": "", "output": "o"}),
        ],
        &["prompt", "completion", "output"],
    )
    .await;
    assert_eq!(found.rows, [json!(["i\nx", "o", "o"]), json!(["i", "o", "o"])]);
    assert_eq!(found.refused, [(2, "`instruction` is empty".into())]);
    let history = json!({"instruction": "i", "output": "o", "system": "s", "history": [["a", "b"]]});
    let found = seen(&[history], &["prompt"]).await;
    let turns = [turn("system", "s"), turn("user", "a"), turn("assistant", "b"), turn("user", "i")];
    assert_eq!(found.rows, [json!([turns])]);

    let row = |prompt: &str, answer: &str, label| json!({"prompt": prompt, "completion": answer, "label": label});
    let rows = [row("p", "good", true), row("r", "only", true), row("p", "bad", false)];
    let found = seen(&rows, &["completion", "label"]).await;
    assert_eq!(found.rows.len(), 3);
    assert_eq!(found.told.unwrap(), "read as TRL unpaired preference (KTO) (form = \"unpaired_preference\")");
    let columns = ["_row", "_candidate", "prompt", "generation", "score"];
    let found = seen_with(&rows, None, Some("{ by = \"prompt\" }"), &columns).await.unwrap();
    let expected = [json!([0, 0, "p", "good", 1.0]), json!([0, 1, "p", "bad", 0.0]), json!([1, 0, "r", "only", 1.0])];
    assert_eq!(found.rows, expected);
}

#[tokio::test]
async fn answers_that_a_data_set_brings() {
    let columns = ["_row", "_candidate", "generation", "n"];
    let rows =
        [json!({"prompt": "p", "n": 1, "a": "x", "b": "y"}), json!({"prompt": "q", "n": 2, "a": "z", "b": null})];
    let found = seen_with(&rows, None, Some("[\"a\", \"b\"]"), &columns).await.unwrap();
    assert_eq!(found.rows, [json!([0, 0, "x", 1]), json!([0, 1, "y", 1])]);
    assert_eq!(found.refused, [(1, "its answer in `b` is null".into())]);

    let rows = [json!({"prompt": "p", "n": 1, "r": ["x", "y", "z"]}), json!({"prompt": "q", "n": 2, "r": []})];
    let found = seen_with(&rows, None, Some("\"r\""), &columns).await.unwrap();
    assert_eq!(found.rows, [json!([0, 0, "x", 1]), json!([0, 1, "y", 1]), json!([0, 2, "z", 1])]);
    assert_eq!(found.refused, [(1, "`r` has no answer".into())]);

    let rows = [json!({"prompt": "p", "r": [{"text": "x", "score": 2.5}, {"text": "y", "score": 1.0}]})];
    let how = Some("{ list = \"r\", text = \"text\" }");
    let found = seen_with(&rows, None, how, &["generation", "score"]).await.unwrap();
    assert_eq!(found.rows, [json!(["x", 2.5]), json!(["y", 1.0])]);

    for (candidates, told) in [
        ("\"r\"", "candidates: column `r` is a list of objects; say which key"),
        ("\"s\"", "candidates: there is no column `s`"),
        ("[\"prompt\"]", "candidates: names fewer than two columns"),
        ("{ by = \"prompt\" }", "candidates: a row has its answer in a column of text `generation` or `completion`"),
        ("{ list = \"r\", text = \"score\" }", "candidates: `score` is no key of text in `r`; it has text, score"),
    ] {
        let error = seen_with(&rows, None, Some(candidates), &[]).await.unwrap_err();
        assert!(error.message.starts_with(told), "{}", error.message);
    }
}

#[tokio::test]
async fn a_form_that_is_asked_for_says_what_is_missing() {
    let rows = [json!({"question": "q", "chosen": "a", "rejected": "b"})];
    for (form, told) in [
        (
            RowForm::Preference,
            "form: form = \"preference\" needs a column `prompt`, because `chosen` and `rejected` are text",
        ),
        (RowForm::Messages, "form: form = \"messages\" needs a column `messages`; the columns are question"),
        (RowForm::Sharegpt, "form: form = \"sharegpt\" needs a column `conversations`"),
        (RowForm::Alpaca, "form: form = \"alpaca\" needs a column `instruction` of text"),
        (RowForm::UnpairedPreference, "form: form = \"unpaired_preference\" needs a column `label` of true and false"),
        (RowForm::PromptCompletion, "form: form = \"prompt_completion\" needs a column `prompt`"),
        (RowForm::Prompt, "form: form = \"prompt\" needs a column `prompt`"),
    ] {
        let error = seen_with(&rows, Some(form), None, &[]).await.unwrap_err();
        assert!(error.message.starts_with(told), "{}", error.message);
    }
    let found = seen_with(&rows, Some(RowForm::None), None, &["question"]).await.unwrap();
    assert!(found.told.is_none());
    // Without a prompt, text is left as it is.
    assert!(seen(&rows, &["chosen"]).await.told.is_none());
}

#[tokio::test]
async fn roles_of_both_spellings() {
    let columns = ["prompt", "completion"];
    let talk = |role: &str, from: &str| json!({"messages": [{"role": role, "content": "q"}, {"role": from, "content": "good"}]});
    for (user, assistant) in [("human", "gpt"), ("User", "Assistant"), ("user", "assistant")] {
        let found = seen(&[talk(user, assistant)], &columns).await;
        assert_eq!(found.rows, [json!([[turn("user", "q")], "good"])]);
    }
    // Rows of one file in different spellings.
    let from = |from: &str, value: &str| json!({"from": from, "value": value});
    let rows = [
        json!({"conversations": [turn("user", "q"), turn("assistant", "good")]}),
        json!({"conversations": [from("human", "q"), from("gpt", "good")]}),
    ];
    let found = seen(&rows, &columns).await;
    assert_eq!(found.rows, [json!([[turn("user", "q")], "good"]), json!([[turn("user", "q")], "good"])]);
    // An answer that is not to be trained on, and a conversation that holds the answer already.
    let weights =
        json!({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": 0}]});
    let found = seen(&[weights], &columns).await;
    assert_eq!(found.refused[0].1, "`messages` ends with a turn of weight 0, which is not to be trained on");
    let row = json!({"conversations": [from("human", "q"), from("gpt", "a")], "chosen": from("gpt", "a"), "rejected": from("gpt", "b")});
    let found = seen(&[row], &columns).await;
    assert!(found.refused[0].1.starts_with("`conversations` ends with an answer, and the answers are in"), "{found:?}");
}

#[tokio::test]
async fn take_counts_the_prompts_of_answers_that_are_grouped() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("data.jsonl");
    let row = |i: usize| json!({"prompt": format!("p{}", i % 3), "completion": format!("a{i}")});
    std::fs::write(&path, (0..9).map(|i| format!("{}\n", row(i))).collect::<String>()).unwrap();
    let by: CandidatesOption =
        toml::from_str::<toml::Table>("k = { by = \"prompt\" }").unwrap()["k"].clone().try_into().unwrap();
    let dataset = path.display().to_string();
    let spec = SourceSpec { dataset, take: Some(2), candidates: Some(by), ..SourceSpec::default() };
    let found = read(spec, &["_row", "generation"]).await.unwrap();
    let all = ["a0", "a3", "a6"].map(|a| json!([0, a])).into_iter().chain(["a1", "a4", "a7"].map(|a| json!([1, a])));
    assert_eq!(found.rows, all.collect::<Vec<_>>());
}
