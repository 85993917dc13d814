//! Data as people have it: splits, folders, kinds and conversations, through the program.

use std::fs::{File, create_dir_all};
use std::sync::Arc;

use flowrun::arrow::array::{ArrayRef, Int64Array};
use flowrun::arrow::ipc::writer::StreamWriter;
use flowrun::arrow::record_batch::RecordBatch;

use crate::support::{Case, stderr, tiny_model};

/// Rows of a data set as a file.
fn rows(keys: &str) -> String {
    format!(
        "name = \"tiny\"\n[stages.rows]\nkind = \"source\"\n{keys}\n[stages.out]\nkind = \"sink\"\ninput = \"rows\"\n\
         path = \"out.jsonl\"\n"
    )
}

fn lines(case: &Case) -> Vec<String> {
    let text = std::fs::read_to_string(case.path("runs/tiny/out.jsonl")).unwrap();
    text.lines().map(str::to_owned).collect()
}

/// The message of `check`, which ends with 2.
fn refused(case: &Case) -> String {
    let checked = case.run(&["check", "flow.toml"]);
    assert_eq!(checked.status.code(), Some(2), "{}", stderr(&checked));
    stderr(&checked)
}

#[test]
fn a_split_is_the_one_that_was_asked_for() {
    let case = Case::new(0, &rows("dataset = \"set\"\nsplit = \"train_prefs\""));
    create_dir_all(case.path("set/data")).unwrap();
    for (split, n) in [("train_prefs", 3), ("train_sft", 4), ("test_prefs", 5)] {
        let text: String = (0..n).map(|i| format!("{{\"n\": {i}}}\n")).collect();
        case.write(&format!("set/data/{split}-00000-of-00001.jsonl"), &text);
    }
    let told = String::from_utf8(case.done(&["check", "flow.toml"]).stdout).unwrap();
    assert!(told.contains("reads train_prefs-00000-of-00001.jsonl"), "{told}");
    assert!(told.contains("does not read data/test_prefs-00000-of-00001.jsonl"), "{told}");
    case.done(&["flow.toml"]);
    assert_eq!(lines(&case).len(), 3);
    for split in ["split = \"train\"", "split = \"prefs\"", ""] {
        case.write("flow.toml", &rows(&format!("dataset = \"set\"\n{split}")));
        let told = refused(&case);
        assert!(["train_prefs", "train_sft", "test_prefs"].iter().all(|name| told.contains(name)), "{told}");
    }
    case.write("set/README.md", "---\nconfigs:\n- config_name: all\n  data_files: data/*.jsonl\n- config_name: prefs\n  data_files: data/*_prefs-*\n---\n");
    case.write("flow.toml", &rows("dataset = \"set\"\nconfig = \"prefs\""));
    case.done(&["flow.toml", "--fresh"]);
    assert_eq!(lines(&case).len(), 8);
    case.write("flow.toml", &rows("dataset = \"set\""));
    assert!(refused(&case).contains("has the configurations all, prefs; choose one with config = \"all\""));
}

#[test]
fn a_saved_data_set_is_what_its_state_names() {
    let case = Case::new(0, &rows("dataset = \"saved\""));
    create_dir_all(case.path("saved")).unwrap();
    for (name, numbers) in [("data-00000-of-00001.arrow", 0..5_i64), ("cache-1f0c2d3e.arrow", 0..9)] {
        let column: ArrayRef = Arc::new(Int64Array::from_iter_values(numbers));
        let batch = RecordBatch::try_from_iter([("n", column)]).unwrap();
        let file = File::create(case.path("saved").join(name)).unwrap();
        let mut writer = StreamWriter::try_new(file, &batch.schema()).unwrap();
        writer.write(&batch).unwrap();
        writer.finish().unwrap();
    }
    case.write(
        "saved/state.json",
        "{\"_data_files\": [{\"filename\": \"data-00000-of-00001.arrow\"}], \"_split\": \"train\"}",
    );
    case.write("saved/dataset_info.json", "{}");
    case.done(&["flow.toml"]);
    assert_eq!(lines(&case).len(), 5);
}

#[test]
fn kinds_are_those_of_all_rows() {
    let late: String = (0..10_001).map(|i| format!("{{\"n\": {i}}}\n")).collect();
    let case = Case::new(0, &rows("dataset = \"late.jsonl\""));
    case.write("late.jsonl", &format!("{late}{{\"n\": 0.5, \"late\": [true], \"none\": {{}}}}\n"));
    let told = String::from_utf8(case.done(&["check", "flow.toml"]).stdout).unwrap();
    assert!(told.contains("leaves out none: always an object without keys"), "{told}");
    case.done(&["flow.toml"]);
    let read = lines(&case);
    assert_eq!((read.len(), read[10_001].as_str()), (10_002, "{\"n\":0.5,\"late\":[true],\"_row\":10001}"));
    assert_eq!(read[7], "{\"n\":7.0,\"late\":null,\"_row\":7}");

    case.write("late.jsonl", &format!("{late}{{\"n\": \"x\"}}\n"));
    let told = refused(&case);
    assert!(told.contains("late.jsonl:10002: column `n` has text here and an integer in line 1"), "{told}");
    case.write("flow.toml", &rows("dataset = \"late.jsonl\"\ntypes = { n = \"string\" }"));
    case.done(&["flow.toml", "--fresh"]);
    assert_eq!(lines(&case)[10_001], "{\"n\":\"x\",\"_row\":10001}");
    case.write("flow.toml", &rows("dataset = \"late.jsonl\"\ntypes = { m = \"string\" }"));
    case.write("late.jsonl", "{\"n\": 1}\n");
    assert!(refused(&case).contains("stages.rows.types: there is no column `m`"), "{}", refused(&case));
}

#[test]
fn what_is_null_in_a_conversation_is_a_dead_letter_in_every_stage() {
    let model = tiny_model();
    let flow = |rest: &str| {
        format!(
            "name = \"tiny\"\nmax_dead_letters = 0.9\n[models.policy]\nsource = {model:?}\ndtype = \"f32\"\n[stages.rows]\n\
             kind = \"source\"\ndataset = \"talks.jsonl\"\n{rest}"
        )
    };
    let sampler = "[stages.sample]\nkind = \"sampler\"\ninput = \"rows\"\nmodel = \"policy\"\ndevice = \"cpu:0\"\n\
                   candidates = 2\nmax_new_tokens = 2\n";
    let trainer = "[stages.align]\nkind = \"trainer\"\ntrain = \"rows\"\nalgorithm = \"dpo\"\nmodel = \"policy\"\n\
                   device = \"cpu:0\"\nlearning_rate = 0.001\nlora = { r = 2 }\n";
    let turn = |turns: &str| format!("{{\"prompt\": {turns}, \"chosen\": \"yes\", \"rejected\": \"no\"}}\n");
    let talks = [
        turn("[{\"role\": \"user\", \"content\": \"Hello\"}]"),
        turn("[{\"role\": \"user\", \"content\": \"Hello\"}, null]"),
        turn("[{\"role\": null, \"content\": \"Hello\"}]"),
        turn("[{\"role\": \"user\", \"content\": null}]"),
        turn("null"),
        turn("[{\"role\": \"user\", \"content\": \"You\"}]"),
    ]
    .concat();
    for rest in [sampler, trainer] {
        let case = Case::new(0, &flow(rest));
        case.write("talks.jsonl", &talks);
        case.done(&["flow.toml"]);
        let mut dead = case.texts(1, "../dead_letters", "reason");
        dead.sort();
        let told = [
            "the prompt is empty",
            "turn 1 of the prompt has no content",
            "turn 1 of the prompt has no role",
            "turn 2 of the prompt is null",
        ];
        assert_eq!(dead, told);
    }
}

#[test]
fn a_trainers_columns_are_looked_at_first() {
    let model = tiny_model();
    let flow = |keys: &str| {
        format!(
            "name = \"tiny\"\n[models.policy]\nsource = {model:?}\ndtype = \"f32\"\n[stages.rows]\nkind = \"source\"\n\
             dataset = \"pairs.jsonl\"\n{keys}\n[stages.align]\nkind = \"trainer\"\ntrain = \"rows\"\nalgorithm = \"dpo\"\n\
             model = \"policy\"\ndevice = \"cpu:0\"\nlearning_rate = 0.001\nlora = {{ r = 2 }}\n"
        )
    };
    let turns = |answer: &str| {
        format!(
            "[{{\"role\": \"user\", \"content\": \"Why?\"}}, {{\"role\": \"assistant\", \"content\": \"{answer}\"}}]"
        )
    };
    let chat = format!("\"chosen\": {}, \"rejected\": {}", turns("yes"), turns("no"));
    let plain = "\"prompt\": \"Why?\", \"chosen\": \"yes\", \"rejected\": \"no\"";
    let case = Case::new(0, &flow(""));
    let write = |row: &str| case.write("pairs.jsonl", &format!("{{{row}}}\n").repeat(4));
    for (row, words) in [
        ("\"prompt\": \"Why?\", \"chosen\": \"yes\"", "`rows` has no column `rejected`; it has prompt, chosen"),
        ("\"prompt\": \"Why?\", \"chosen\": 2, \"rejected\": 3", "types = { chosen = \"string\" }"),
        (&format!("{plain}, \"label\": true"), "column `label` of `rows` is true or false"),
        (&format!("{plain}, \"label\": \"chosen\""), "column `label` of `rows` is text"),
    ] {
        write(row);
        let told = refused(&case);
        assert!(told.contains("stages.align.train") && told.contains(words), "{row}: {told}");
    }
    // Turns as they are can't be learned; what the message says works.
    write(&chat);
    case.write("flow.toml", &flow("form = \"none\""));
    let told = refused(&case);
    assert!(
        told.contains("select = { prompt = \"array_pop_back(chosen)\", chosen = \"chosen[-1]['content']\""),
        "{told}"
    );
    case.write(
        "flow.toml",
        &flow(
            "select = { prompt = \"array_pop_back(chosen)\", chosen = \"chosen[-1]['content']\", rejected = \
             \"rejected[-1]['content']\" }",
        ),
    );
    case.done(&["flow.toml"]);
    case.write("flow.toml", &flow(""));
    write(&format!("{plain}, \"label\": 1"));
    let told = String::from_utf8(case.done(&["check", "flow.toml"]).stdout).unwrap();
    assert!(told.contains("`label` of `rows` weighs its pairs"), "{told}");
}
