//! Models and adapters as users have them: what is refused before anything runs, and what is done with them.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::support::{Case, stderr, tiny_flow, tiny_model};

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")
}

/// One answer of one token to each row of `prompts.jsonl`, with more keys of the model and the sampler.
fn one_token(model: &str, sampler: &str) -> String {
    format!(
        r#"
name = "tiny"
seed = 1

[models.policy]
{model}

[stages.prompts]
kind = "source"
dataset = "prompts.jsonl"

[stages.sample]
kind = "sampler"
input = "prompts"
model = "policy"
device = "cpu:0"
candidates = 1
max_new_tokens = 1
temperature = 0.0
{sampler}

[stages.out]
kind = "sink"
input = "sample"
path = "out.jsonl"
"#
    )
}

fn tiny() -> String {
    format!("source = {:?}\ndtype = \"f32\"", tiny_model())
}

/// The rows of the sink, in the order of their prompts.
fn rows(case: &Case) -> Vec<Value> {
    let text = std::fs::read_to_string(case.path("runs/tiny/out.jsonl")).unwrap();
    let mut rows: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    rows.sort_by_key(|row| row["_row"].as_u64());
    rows
}

/// A directory with a model's configuration, changed, and a tokenizer of the fixtures, without chat template.
fn base_model(case: &Case, tokenizer: &str, changes: Value) {
    let config = std::fs::read_to_string(tiny_model().join("config.json")).unwrap();
    let mut config: Value = serde_json::from_str(&config).unwrap();
    changes.as_object().unwrap().iter().for_each(|(key, value)| config[key] = value.clone());
    std::fs::create_dir_all(case.path("base")).unwrap();
    case.write("base/config.json", &config.to_string());
    for name in ["tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(fixtures().join("tokenizers").join(tokenizer).join(name), case.path("base").join(name)).unwrap();
    }
}

const DUMMY: &str = "source = \"base\"\nweights = \"dummy\"\ndtype = \"f32\"";

#[track_caller]
fn refused(case: &Case, args: &[&str], parts: &[&str]) {
    let output = case.run(args);
    let text = stderr(&output);
    assert_eq!(output.status.code(), Some(2), "{args:?}: {text}");
    for part in parts {
        assert!(text.contains(part), "{args:?}: {part:?} is not in: {text}");
    }
}

#[test]
fn a_prompt_that_ends_with_the_assistants_words_is_gone_on_with() {
    let case = Case::new(0, &one_token(&tiny(), ""));
    let user = json!({"role": "user", "content": "Reply in JSON."});
    let asked = json!({"prompt": [user]});
    let begun = json!({"prompt": [user, {"role": "assistant", "content": "{\"a\":"}]});
    case.write("prompts.jsonl", &format!("{asked}\n{begun}\n"));
    case.done(&["flow.toml"]);
    let tokens: Vec<u64> = rows(&case).iter().map(|row| row["prompt_tokens"].as_u64().unwrap()).collect();
    // As many as the words have: the turn is open before them and after them.
    assert_eq!(tokens[1], tokens[0] + 5, "{tokens:?}");
}

#[test]
fn a_model_without_chat_template_is_told_before_it_is_asked() {
    let case = Case::new(2, &one_token(DUMMY, ""));
    base_model(&case, "gemma", json!({"vocab_size": 512}));
    for verb in ["check", "run"] {
        let parts = [
            "stages.sample.model: the model `policy` has no chat template",
            "set chat_template on `policy`",
            "or set template = \"none\" on this stage",
        ];
        refused(&case, &[verb, "flow.toml"], &parts);
    }
    assert!(!case.path("runs").exists());
    // Both ways that it names work.
    let template = "models.policy.chat_template=\"{% for m in messages %}{{ m.content }}{% endfor %}\"";
    case.done(&["check", "flow.toml", "--set", template]);
    case.done(&["flow.toml", "--set", "stages.sample.template=\"none\""]);
    assert_eq!(rows(&case).len(), 2);
}

#[test]
fn plain_text_begins_as_the_tokenizer_begins_texts_or_as_it_is_told() {
    let tokens = |set: &[&str]| {
        let case = Case::new(1, &one_token(DUMMY, "template = \"none\""));
        base_model(&case, "gemma", json!({"vocab_size": 512}));
        case.done(&[&["flow.toml"], set].concat());
        rows(&case)[0]["prompt_tokens"].as_u64().unwrap()
    };
    let framed = tokens(&[]);
    assert_eq!(tokens(&["--set", "stages.sample.add_bos=true"]), framed);
    assert_eq!(tokens(&["--set", "stages.sample.add_bos=false"]), framed - 1);
    let case = Case::new(1, &one_token(&tiny(), "add_bos = false"));
    refused(&case, &["check", "flow.toml"], &["stages.sample.add_bos: means nothing beside a chat template"]);
    // A tokenizer without such a token is told before a row is read.
    let case = Case::new(1, &one_token(DUMMY, "template = \"none\"\nadd_bos = true"));
    base_model(&case, "qwen2", json!({"vocab_size": 512}));
    let wanted = ["stages.sample.add_bos: asks for a begin-of-text token, and the tokenizer of `policy` has none"];
    refused(&case, &["check", "flow.toml"], &wanted);
    case.done(&["check", "flow.toml", "--set", "stages.sample.add_bos=false"]);
}

#[test]
fn a_token_past_the_embedding_costs_its_row_alone() {
    let case =
        Case::new(0, &one_token(DUMMY, "template = \"none\"").replace("seed = 1", "seed = 1\nmax_dead_letters = 0.6"));
    // The two tokens of turns come behind the 480 of the vocabulary.
    base_model(&case, "gemma", json!({"vocab_size": 480}));
    let prompts = ["hello", "<start_of_turn>user"].map(|prompt| json!({"prompt": prompt}).to_string());
    case.write("prompts.jsonl", &(prompts.join("\n") + "\n"));
    case.done(&["flow.toml"]);
    assert_eq!(rows(&case).len(), 1);
    let dead = case.texts(1, "../dead_letters", "reason");
    assert_eq!(dead.len(), 1);
    assert!(dead[0].contains("the token \"<start_of_turn>\" has the id 480"), "{dead:?}");
}

#[test]
fn what_is_not_there_or_not_meant_is_an_error_of_check() {
    let case = Case::new(4, &tiny_flow(1, ""));
    let set = |assignment: &str, parts: &[&str]| refused(&case, &["check", "flow.toml", "--set", assignment], parts);
    set("models.policy.source=\"./nowhere\"", &["models.policy.source: ", "config.json: is missing"]);
    set(
        "models.policy.source=\"meta-llama/Llama-3.2-1B\"",
        &["models.policy.source: there is no folder", "write source = \"hf://meta-llama/Llama-3.2-1B\""],
    );
    set(
        "models.policy.dtype=\"float32\"",
        &["models.policy.dtype: `float32` is not a choice here", "did you mean `f32`?"],
    );
    set("models.policy.weights=\"dumy\"", &["models.policy.weights: `dumy`", "did you mean `dummy`?"]);
    set("stages.sample.device=\"cuda:77\"", &["stages.sample.device: ", "cuda:77"]);
    base_model(&case, "gemma", json!({"quantization_config": {"quant_method": "gptq", "bits": 4}}));
    set("models.policy.source=\"base\"", &["models.policy.source: ", "a quantization_config of the method gptq"]);
    let start = "stages.align.start=\"continue\"";
    let with_adapter = |sets: &[&str], parts: &[&str]| {
        let sets = sets.iter().flat_map(|set| ["--set", set]);
        refused(&case, &["check", "flow.toml", "--set", start].into_iter().chain(sets).collect::<Vec<_>>(), parts);
    };
    with_adapter(
        &["stages.align.init_adapter=\"gone\""],
        &["stages.align.init_adapter: ", "an adapter is a directory that PEFT wrote"],
    );
    let adapter = format!("stages.align.init_adapter={:?}", tiny_model().join("adapter"));
    with_adapter(
        &[&adapter, "stages.align.lora={ r = 3 }"],
        &["stages.align.lora.r: is 3, and the adapter", "leave `lora` out"],
    );
    case.done(&["check", "flow.toml", "--set", start, "--set", &adapter]);
}

/// A copy of the fixture's adapter with other settings.
fn adapter(case: &Case, name: &str, changes: &Value) {
    std::fs::create_dir_all(case.path(name)).unwrap();
    let own = tiny_model().join("adapter");
    std::fs::copy(own.join("adapter_model.safetensors"), case.path(name).join("adapter_model.safetensors")).unwrap();
    let config = std::fs::read_to_string(own.join("adapter_config.json")).unwrap();
    let mut config: Value = serde_json::from_str(&config).unwrap();
    changes.as_object().unwrap().iter().for_each(|(key, value)| config[key] = value.clone());
    case.write(&format!("{name}/adapter_config.json"), &config.to_string());
}

#[test]
fn adapters_that_would_be_applied_wrongly_are_refused_and_patterns_are_pythons() {
    let case = Case::new(1, "");
    let model = tiny_model();
    let export = |name: &str| {
        let out = format!("out-{name}");
        ["export", name, "--out", &out, "--merge", "--model", model.to_str().unwrap(), "--dtype", "f32"]
            .map(str::to_owned)
    };
    for init in ["pissa", "pissa_niter_16", "olora", "corda", "loftq"] {
        adapter(&case, init, &json!({"init_lora_weights": init}));
        let args = export(init);
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        refused(&case, &args, &["adapter_config.json: init_lora_weights is", init, "with PEFT"]);
        assert!(!case.path(&format!("out-{init}")).exists());
    }
    let pattern = r"model\.layers\.\d+\.(?!vision).*(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)";
    adapter(&case, "lookahead", &json!({"target_modules": pattern}));
    let args = export("lookahead");
    case.done(&args.iter().map(String::as_str).collect::<Vec<_>>());
}
