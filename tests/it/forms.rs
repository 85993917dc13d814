//! Conversations and answers as data sets publish them, through the program.

use serde_json::{Value, json};

use crate::support::{Case, stderr, tiny_model};

fn told(case: &Case) -> String {
    String::from_utf8(case.done(&["check", "flow.toml"]).stdout).unwrap()
}

fn refused(case: &Case) -> String {
    let checked = case.run(&["check", "flow.toml"]);
    assert_eq!(checked.status.code(), Some(2), "{}", stderr(&checked));
    stderr(&checked)
}

fn rows_of(case: &Case, file: &str) -> Vec<Value> {
    let text = std::fs::read_to_string(case.path(file)).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn write(case: &Case, file: &str, rows: &[Value]) {
    case.write(file, &rows.iter().map(|row| format!("{row}\n")).collect::<String>());
}

/// A flow of one source, and stages behind it.
fn flow(source: &str, more: &str) -> String {
    let model = tiny_model().display().to_string();
    format!(
        "name = \"tiny\"\nseed = 3\n[models.policy]\nsource = {model:?}\ndtype = \"f32\"\n[stages.rows]\nkind = \"source\"\n\
         dataset = \"rows.jsonl\"\n{source}\n{more}"
    )
}

const TRAINED: &str = "[stages.align]\nkind = \"trainer\"\ntrain = \"rows\"\nmodel = \"policy\"\nlearning_rate = 1e-3\n\
                       device = \"cpu\"\nlora = { r = 2 }\n";

fn turn(role: &str, content: &str) -> Value {
    json!({"role": role, "content": content})
}

#[test]
fn preferences_are_trained_on_in_each_of_their_forms() {
    let pair = |i: usize| [format!("Name a use of {i}."), format!("It keeps door {i} open."), format!("No idea {i}.")];
    type Form = fn([String; 3]) -> Value;
    let forms: [(&str, Form); 3] = [
        ("explicit prompt", |[p, c, r]| json!({"prompt": p, "chosen": c, "rejected": r})),
        ("explicit prompt", |[p, c, r]| {
            let turns = |text: &str| json!([turn("user", &p), turn("assistant", text)]);
            json!({"prompt": p, "chosen": turns(&c), "rejected": turns(&r)})
        }),
        ("implicit prompt", |[p, c, r]| {
            let turns = |text: &str| json!([turn("user", &p), turn("assistant", text)]);
            json!({"chosen": turns(&c), "rejected": turns(&r)})
        }),
    ];
    let mut losses = Vec::new();
    for (name, form) in forms {
        let case = Case::new(0, &flow("", TRAINED));
        write(&case, "rows.jsonl", &(0..6).map(|i| form(pair(i))).collect::<Vec<_>>());
        let plan = told(&case);
        assert!(plan.contains(&format!("read as TRL preference, {name}")), "{plan}");
        case.done(&["flow.toml"]);
        let train = case.summary()["rounds"][0]["train"].clone();
        assert_eq!(train["pairs"], 6, "{train}");
        losses.push(train["last_loss"].clone());
    }
    assert!(losses[0].is_number() && losses.iter().all(|loss| *loss == losses[0]), "{losses:?}");

    let case = Case::new(0, &flow("", TRAINED));
    write(&case, "rows.jsonl", &[json!({"chosen": "a", "rejected": "b"}), json!({"chosen": "c", "rejected": "d"})]);
    let message = refused(&case);
    assert!(message.contains("`rows` has no column `prompt`"), "{message}");
    case.write("flow.toml", &flow("form = \"preference\"", TRAINED));
    let message = refused(&case);
    assert!(message.contains("stages.rows.form: form = \"preference\" needs a column `prompt`"), "{message}");
    case.write("flow.toml", &flow("form = \"preferences\"", TRAINED));
    let message = refused(&case);
    assert!(message.contains("preference"), "{message}");
}

#[test]
fn a_row_that_is_not_in_its_form_is_a_dead_letter_of_the_source() {
    let sink = "[stages.out]\nkind = \"sink\"\ninput = \"rows\"\npath = \"out-{round}.jsonl\"\n";
    let case = Case::new(0, &format!("max_dead_letters = 0.1\nrounds = 2\n{}", flow("", sink)));
    let talk = |i: usize| {
        let end =
            if i == 7 { json!([{"type": "image_url", "url": "x"}]) } else { json!([{"type": "text", "text": "a"}]) };
        json!({"messages": [{"role": "user", "content": end}, {"role": "assistant", "content": [{"type": "text", "text": format!("{i}")}]}]})
    };
    write(&case, "rows.jsonl", &(0..20).map(talk).collect::<Vec<_>>());
    let plan = told(&case);
    assert!(plan.contains("read as OpenAI messages"), "{plan}");
    assert!(plan.contains("1 of the first 20 rows can't be read, such as: turn 1 of `messages` has a part"), "{plan}");
    for _ in 0..2 {
        case.done(&["flow.toml"]);
        let rows = rows_of(&case, "runs/tiny/out-2.jsonl");
        assert_eq!(rows.len(), 19);
        assert_eq!(rows[0]["completion"], "0");
        assert_eq!(rows[0]["prompt"], json!([turn("user", "a")]));
        let rounds = case.summary()["rounds"].clone();
        assert!((0..2).all(|i| rounds[i]["dead_letters"] == 1), "{rounds}");
    }
    // Where none can be read, the check says so.
    write(&case, "rows.jsonl", &(0..3).map(|_| talk(7)).collect::<Vec<_>>());
    let message = refused(&case);
    assert!(message.contains("none of the first 3 rows can be read: turn 1 of `messages`"), "{message}");
}

#[test]
fn prompts_that_are_too_long_are_told_before_anything_is_computed() {
    let long = "word ".repeat(300);
    let sampler = "[stages.sample]\nkind = \"sampler\"\ninput = \"rows\"\nmodel = \"policy\"\ndevice = \"cpu\"\nmax_new_tokens = 4\n";
    let sink = "[stages.out]\nkind = \"sink\"\ninput = \"sample\"\npath = \"out.jsonl\"\n";
    let case = Case::new(0, &flow("", &format!("{sampler}{sink}")));
    let rows: Vec<Value> = (0..6).map(|i| json!({"prompt": if i == 2 { long.as_str() } else { "short" }})).collect();
    write(&case, "rows.jsonl", &rows);
    let plan = told(&case);
    assert!(plan.contains("1 of the first 6 prompts have more than 511 tokens"), "{plan}");
    case.write("flow.toml", &flow("", &format!("{sampler}max_prompt_tokens = 100\n{sink}")));
    let done = case.done(&["flow.toml"]);
    assert!(stderr(&done).contains("1 prompts with more than 100 tokens were left out"), "{}", stderr(&done));
    assert_eq!(rows_of(&case, "runs/tiny/out.jsonl").len(), 10);

    let case = Case::new(0, &flow("", &format!("{TRAINED}max_length = 64\n")));
    let rows: Vec<Value> = (0..6)
        .map(|i| json!({"prompt": if i == 2 { long.as_str() } else { "short" }, "chosen": "a", "rejected": "b"}))
        .collect();
    write(&case, "rows.jsonl", &rows);
    let plan = told(&case);
    assert!(plan.contains("1 of the first 6 prompts have more than 63 tokens"), "{plan}");
    // Pairs that are left out are told with their reason.
    let rows: Vec<Value> = (0..6)
        .map(|i| json!({"prompt": "p", "chosen": if i == 2 { json!(null) } else { json!("a") }, "rejected": "b"}))
        .collect();
    write(&case, "rows.jsonl", &rows);
    let done = case.done(&["flow.toml"]);
    let shown = String::from_utf8_lossy(&done.stdout).into_owned() + &stderr(&done);
    assert!(shown.contains("pairs that were left out: an answer is missing (1)"), "{shown}");
}

#[test]
fn answers_that_exist_already_are_judged_and_paired() {
    let sink = "[stages.pairs]\nkind = \"pairs\"\ninput = \"rows\"\n[stages.out]\nkind = \"sink\"\ninput = \"pairs\"\npath = \
                \"out.jsonl\"\n";
    let case = Case::new(0, &flow("candidates = { by = \"prompt\" }", sink));
    let row = |prompt: &str, answer: &str, label: bool| json!({"prompt": prompt, "completion": answer, "label": label});
    // Answers to one prompt need not stand together.
    write(
        &case,
        "rows.jsonl",
        &[row("p", "bad", false), row("q", "fine", true), row("p", "good", true), row("q", "poor", false)],
    );
    assert!(told(&case).contains("2 rows a round"));
    case.done(&["flow.toml"]);
    let rows = rows_of(&case, "runs/tiny/out.jsonl");
    let pairs: Vec<_> = rows.iter().map(|row| (&row["prompt"], &row["chosen"], &row["rejected"])).collect();
    assert_eq!(pairs, [(&json!("p"), &json!("good"), &json!("bad")), (&json!("q"), &json!("fine"), &json!("poor"))]);

    // Two columns, named where they are judged.
    let judge = "[stages.both]\nkind = \"mapper\"\ninput = \"rows\"\nsql = \"SELECT prompt, x AS a, y AS b FROM input\"\n\
                 [stages.verdicts]\nkind = \"judge\"\ninput = \"both\"\nmodel = \"policy\"\ndevice = \"cpu\"\n";
    let sink = "[stages.out]\nkind = \"sink\"\ninput = \"verdicts\"\npath = \"out.jsonl\"\n";
    let case = Case::new(0, &flow("", &format!("{judge}{sink}")));
    write(
        &case,
        "rows.jsonl",
        &[json!({"prompt": "p", "x": "one", "y": "two"}), json!({"prompt": "q", "x": "b", "y": "c"})],
    );
    let message = refused(&case);
    assert!(
        message.contains("has no column \"generation\"") && message.contains("candidates = [\"a\", \"b\"]"),
        "{message}"
    );
    case.write("flow.toml", &flow("", &format!("{judge}candidates = [\"a\", \"b\"]\n{sink}")));
    case.done(&["flow.toml"]);
    let rows = rows_of(&case, "runs/tiny/out.jsonl");
    assert_eq!(rows.len(), 2);
    assert_eq!((&rows[0]["a"], &rows[0]["b"], &rows[0]["b_candidate"]), (&json!("one"), &json!("two"), &json!(1)));
    assert!(["a", "b", "tie"].contains(&rows[0]["verdict"].as_str().unwrap()), "{rows:?}");
}
