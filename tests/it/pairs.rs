//! Training on a data set of one's own: pairs as they are, and completions.

use crate::support::{Case, tiny_model};

/// A flow of a source and a trainer; `select` names the columns, `keys` are the trainer's.
fn flow(select: &str, keys: &str) -> String {
    let model = tiny_model();
    format!(
        r#"
name = "tiny"
seed = 1
[models.policy]
source = {model:?}
dtype = "f32"
[stages.data]
kind = "source"
dataset = "data.jsonl"
select = {{ {select} }}
[stages.align]
kind = "trainer"
train = "data"
validation = "data"
model = "policy"
device = "cpu:0"
learning_rate = 5e-3
batch_size = 2
lora = {{ r = 4, alpha = 8 }}
{keys}
"#
    )
}

const PAIR: &str = "prompt = \"prompt\", chosen = \"chosen\", rejected = \"rejected\"";

fn row(prompt: &str, chosen: &str, rejected: &str, rest: &str) -> String {
    format!("{{\"prompt\": {prompt:?}, \"chosen\": {chosen:?}, \"rejected\": {rejected:?}, {rest}}}\n")
}

#[test]
fn rows_that_teach_nothing_are_counted_by_reason() {
    let select = format!("{PAIR}, label = \"label\", weight = \"weight\"");
    let case = Case::new(0, &flow(&select, "template = \"none\"\nmax_length = 24"));
    let fine = "\"label\": 0.9, \"weight\": 2.0";
    let long = "the cat walks over the cold river and ".repeat(9);
    let mut data = String::new();
    for i in 0..4 {
        data += &row(&format!("the cat {i}"), " sleeps", " sings", fine);
    }
    data += &row("equal", " sleeps", " sleeps", fine);
    data += &row("empty", "", " sings", fine);
    data += &row("no probability", " sleeps", " sings", "\"label\": 1.5, \"weight\": 1.0");
    data += &row("no weight", " sleeps", " sings", "\"label\": 1.0, \"weight\": -1.0");
    data += &row("long answer", &long, " sings", fine);
    data += &row(&long, " sleeps", " sings", fine);
    case.write("data.jsonl", &data);
    case.done(&["flow.toml", "--set", "max_dead_letters=0.5"]);
    let train = &case.summary()["rounds"][0]["train"];
    // Both inputs read the same rows.
    let counted = |reason: &str| train["dropped"][reason].as_u64();
    assert_eq!(counted("the answers are equal"), Some(2), "{train}");
    assert_eq!(counted("an answer is empty"), Some(2), "{train}");
    assert_eq!(counted("its label is not a probability"), Some(2), "{train}");
    assert_eq!(counted("its weight is not a number from 0 up"), Some(2), "{train}");
    assert_eq!((train["pairs"].as_u64(), train["cut_answers"].as_u64()), (Some(5), Some(2)), "{train}");
    assert!(train["last_loss"].as_f64().unwrap() < train["first_loss"].as_f64().unwrap(), "{train}");
    let letters = case.texts(1, "../dead_letters", "reason");
    assert_eq!(letters.len(), 2, "{letters:?}");
    assert!(letters[0].contains("the prompt alone has") && letters[0].contains("max_length is 24"), "{letters:?}");
    assert_eq!(case.texts(1, "align/rows", "weight")[0], "2.0");
}

#[test]
fn every_loss_lowers_itself() {
    let case = Case::new(0, &flow(PAIR, "epochs = 4"));
    let data: String = (0..4).map(|i| row(&format!("the cat {i}"), " sleeps under", " sings", "\"n\": 1")).collect();
    case.write("data.jsonl", &data);
    for loss in ["sigmoid_norm", "apo_zero", "sppo", "simpo", "orpo"] {
        let set = format!("stages.align.loss={loss:?}");
        case.done(&["flow.toml", "--fresh", "--set", &set]);
        let train = &case.summary()["rounds"][0]["train"];
        assert!(train["last_loss"].as_f64().unwrap() < train["first_loss"].as_f64().unwrap(), "{loss}: {train}");
    }
}

#[test]
fn completions_are_learnt_and_nothing_is_rewarded() {
    let keys = "algorithm = \"sft\"\nepochs = 6";
    let case = Case::new(0, &flow("prompt = \"prompt\", completion = \"chosen\"", keys));
    let data: String = (0..6).map(|i| row(&format!("the dog {i}"), " walks over", "", "\"n\": 1")).collect();
    case.write("data.jsonl", &data);
    let output = case.done(&["flow.toml"]);
    let printed = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(printed.contains("validation loss") && !printed.contains("margin"), "{printed}");
    let train = &case.summary()["rounds"][0]["train"];
    let (first, last) = (train["first_loss"].as_f64().unwrap(), train["last_loss"].as_f64().unwrap());
    assert!(last < 0.8 * first, "{train}");
    assert!(train["eval"]["eval_loss"].as_f64().unwrap() < first, "{train}");
    assert!(train["first_margin"].is_null() && train["eval"].get("eval_rewards/margins").is_none(), "{train}");
    assert!(case.events("rewards/margins").is_empty() && !case.events("loss").is_empty());
    // What was learnt is an adapter as any other.
    assert!(case.path("runs/tiny/round-1/align/adapter/adapter_model.safetensors").exists());
    let card = std::fs::read_to_string(case.path("runs/tiny/round-1/align/adapter/README.md")).unwrap();
    assert!(card.contains("library_name: peft") && card.contains("| learning_rate | `0.005` |"), "{card}");
}
