//! "Did you mean": names that resemble each other, and what other tools call our keys.

use super::FlowError;
use super::document::join;

/// What TRL, PEFT, transformers, vLLM and DataDreamer call a key, and what it is called here. A
/// name on the right with a dot lies in a table; several lines for one name serve several kinds.
const ELSEWHERE: &[(&str, &str)] = &[
    ("num_generations", "candidates"),
    ("num_return_sequences", "candidates"),
    ("n", "candidates"),
    ("max_completion_length", "max_new_tokens"),
    ("max_completion_tokens", "max_new_tokens"),
    ("max_tokens", "max_new_tokens"),
    ("max_new_length", "max_new_tokens"),
    ("max_seq_length", "max_length"),
    ("max_prompt_length", "max_length"),
    ("model_max_length", "max_length"),
    ("cutoff_len", "max_length"),
    ("model_name_or_path", "source"),
    ("model_name", "source"),
    ("model_path", "source"),
    ("pretrained_model_name_or_path", "source"),
    ("path", "source"),
    ("path", "dataset"),
    ("format", "form"),
    ("formatting", "form"),
    ("answers", "candidates"),
    ("responses", "candidates"),
    ("torch_dtype", "dtype"),
    ("precision", "dtype"),
    ("gpu_memory_utilization", "memory"),
    ("enforce_eager", "graphs"),
    ("flash_attention", "flash"),
    ("base_url", "endpoint"),
    ("api_base", "endpoint"),
    ("url", "endpoint"),
    ("model", "name"),
    ("max_concurrency", "concurrency"),
    ("max_retries", "retries"),
    ("request_timeout", "timeout"),
    ("rpm", "requests_per_minute"),
    ("max_requests_per_minute", "requests_per_minute"),
    ("extra_body", "body"),
    ("model_kwargs", "body"),
    ("generation_kwargs", "body"),
    ("chat_template_kwargs", "body.chat_template_kwargs"),
    ("reasoning_effort", "body.reasoning_effort"),
    ("extra_headers", "headers"),
    ("default_headers", "headers"),
    ("http_headers", "headers"),
    ("llm", "model"),
    ("policy", "model"),
    ("dataset_name", "dataset"),
    ("dataset_path", "dataset"),
    ("data_files", "dataset"),
    ("train_dataset", "train"),
    ("eval_dataset", "validation"),
    ("validation_dataset", "validation"),
    ("dataset_split", "split"),
    ("max_samples", "take"),
    ("num_samples", "take"),
    ("limit", "take"),
    ("num_shards", "shard.count"),
    ("shards", "shard.count"),
    ("loss_type", "loss"),
    ("label_smoothing_factor", "label_smoothing"),
    ("dpo_beta", "beta"),
    ("num_train_epochs", "epochs"),
    ("num_epochs", "epochs"),
    ("per_device_train_batch_size", "batch_size"),
    ("train_batch_size", "batch_size"),
    ("global_batch_size", "pairs_per_step"),
    ("effective_batch_size", "pairs_per_step"),
    ("gradient_accumulation", "gradient_accumulation_steps"),
    ("accumulate_grad_batches", "gradient_accumulation_steps"),
    ("lr", "learning_rate"),
    ("lr_scheduler_type", "schedule"),
    ("lr_scheduler", "schedule"),
    ("optimizer_lr", "learning_rate"),
    ("num_warmup_steps", "warmup_steps"),
    ("max_gradient_norm", "max_grad_norm"),
    ("gradient_clipping", "max_grad_norm"),
    ("ref_model", "reference"),
    ("ref_adapter_name", "reference"),
    ("adapter_path", "init_adapter"),
    ("resume_adapter", "init_adapter"),
    ("metric_for_best_model", "best_metric"),
    ("evaluation_steps", "eval_steps"),
    ("peft_config", "lora"),
    ("lora_r", "lora.r"),
    ("lora_rank", "lora.r"),
    ("rank", "r"),
    ("lora_alpha", "lora.alpha"),
    ("lora_alpha", "alpha"),
    ("lora_dropout", "lora.dropout"),
    ("lora_dropout", "dropout"),
    ("lora_target_modules", "lora.targets"),
    ("target_modules", "lora.targets"),
    ("target_modules", "targets"),
    ("use_rslora", "lora.rslora"),
    ("use_rslora", "rslora"),
    ("iterations", "rounds"),
    ("num_iterations", "rounds"),
    ("num_rounds", "rounds"),
    ("random_seed", "seed"),
    ("steps", "stages"),
    ("devices", "device"),
    ("query", "sql"),
    ("type", "kind"),
    ("inputs", "input"),
    ("judge_prompt", "prompt"),
    ("instruction", "prompt"),
];

/// The candidate that `name` was probably meant to be.
///
/// ```
/// assert_eq!(flowrun::flow::names::closest("candiates", &["candidates", "temperature"]), Some("candidates"));
/// assert_eq!(flowrun::flow::names::closest("zebra", &["candidates", "temperature"]), None);
/// ```
pub fn closest<'a>(name: &str, candidates: &[&'a str]) -> Option<&'a str> {
    let lower = name.to_lowercase();
    let scored = candidates.iter().map(|candidate| {
        let edits = strsim::damerau_levenshtein(&lower, candidate);
        (edits, strsim::jaro_winkler(&lower, candidate), *candidate)
    });
    scored
        .filter(|(edits, alike, candidate)| *edits <= candidate.len().max(3) / 3 && *alike > 0.7)
        .min_by(|a, b| a.0.cmp(&b.0).then(b.1.total_cmp(&a.1)))
        .map(|(_, _, candidate)| candidate)
}

/// The help line for a name that is none of `candidates`: a guess where there is one, else all.
pub fn suggest(name: &str, candidates: &[&str]) -> String {
    match closest(name, candidates) {
        Some(guess) => format!("did you mean `{guess}`?"),
        None if candidates.is_empty() => "there is none".into(),
        None => format!("there is {}", list(candidates)),
    }
}

/// An unknown key of the table at `path`, which knows the keys `known`.
pub fn unknown_key(path: &str, name: &str, known: &[&str]) -> FlowError {
    let error = FlowError::new(join(path, name), UNKNOWN);
    // One letter more or less is a slip, whatever the name means elsewhere.
    if let Some(slip) = known.iter().find(|ours| ours.len() > 3 && strsim::damerau_levenshtein(ours, name) == 1) {
        return error.help(format!("did you mean `{slip}`?"));
    }
    if let Some(ours) = elsewhere(name, known) {
        return error.help(format!("did you mean `{ours}`? That is what `{name}` is called here"));
    }
    match closest(name, known) {
        Some(guess) => error.help(format!("did you mean `{guess}`?")),
        None if known.is_empty() => error.help("no key belongs here"),
        None => error.help(format!("the keys here are {}", list(known))),
    }
}

/// The message of [`unknown_key`].
pub const UNKNOWN: &str = "unknown key";

fn elsewhere(name: &str, known: &[&str]) -> Option<&'static str> {
    let lower = name.to_lowercase();
    let fits = |ours: &str| known.contains(&ours.split('.').next().unwrap_or(ours));
    ELSEWHERE.iter().find(|(theirs, ours)| *theirs == lower && fits(ours)).map(|(_, ours)| *ours)
}

/// `a`, `b` and `c`
pub fn list(names: &[&str]) -> String {
    let quoted: Vec<String> = names.iter().map(|name| format!("`{name}`")).collect();
    match quoted.split_last() {
        Some((last, [])) => last.clone(),
        Some((last, rest)) => format!("{} and {last}", rest.join(", ")),
        None => String::new(),
    }
}

/// Names of stages and models: `[a-z][a-z0-9_]*`.
pub fn is_name(name: &str) -> bool {
    name.starts_with(|c: char| c.is_ascii_lowercase())
        && name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_from_other_tools_are_known_where_they_fit() {
        let help = |name: &str, known: &[&str]| unknown_key("stages.s", name, known).help.unwrap_or_default();
        assert!(help("num_generations", &["candidates", "model"]).starts_with("did you mean `candidates`?"));
        assert!(help("lora_alpha", &["lora", "epochs"]).starts_with("did you mean `lora.alpha`?"));
        assert!(help("lora_alpha", &["r", "alpha"]).starts_with("did you mean `alpha`?"));
        assert!(help("alhpa", &["r", "alpha"]).starts_with("did you mean `alpha`?"));
        assert_eq!(help("num_generations", &["dataset"]), "the keys here are `dataset`");
        assert_eq!(help("zzz", &["a", "b", "c"]), "the keys here are `a`, `b` and `c`");
    }

    #[test]
    fn names_of_stages() {
        for good in ["a", "sample_2"] {
            assert!(is_name(good));
        }
        for bad in ["", "A", "2a", "_a", "a-b", "a.b", "é"] {
            assert!(!is_name(bad), "{bad}");
        }
    }
}
