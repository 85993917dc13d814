//! PEFT's adapter_config.json, read and written.
//!
//! What is set there and not supported is refused: an adapter that is applied in part gives answers
//! that nobody trained.

use std::path::Path;

use serde::Deserialize;
use serde_json::Value as Json;

use super::ModelError;
use super::config::Config;
use super::lora::{LoraConfig, Target, modules};

/// Keys of other ways to adapt a model; null, false or empty is not to use them.
const UNSUPPORTED: [&str; 17] = [
    "alora_invocation_tokens",
    "alpha_pattern",
    "arrow_config",
    "corda_config",
    "eva_config",
    "exclude_modules",
    "fan_in_fan_out",
    "kasa_config",
    "layer_replication",
    "layers_to_transform",
    "lora_bias",
    "modules_to_save",
    "rank_pattern",
    "target_parameters",
    "trainable_token_indices",
    "use_dora",
    "use_qalora",
];

/// What is read of an adapter_config.json.
#[derive(Deserialize)]
struct PeftConfig {
    peft_type: String,
    r: usize,
    lora_alpha: f64,
    #[serde(default)]
    lora_dropout: f64,
    target_modules: TargetModules,
    #[serde(default)]
    use_rslora: bool,
    #[serde(default)]
    bias: Option<String>,
    #[serde(flatten)]
    rest: serde_json::Map<String, Json>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum TargetModules {
    Names(Vec<String>),
    Pattern(String),
}

/// Reads the configuration of an adapter to `model`.
///
/// # Errors
/// Names the file and the key that can't be.
pub fn read(file: &Path, model: &Config) -> Result<LoraConfig, ModelError> {
    let error = |message: String| ModelError::file(file, message);
    let text = std::fs::read_to_string(file)
        .map_err(|e| error(format!("can't be read: {e}; an adapter is a PEFT directory")))?;
    let peft: PeftConfig = serde_json::from_str(&text).map_err(|e| error(format!("is no PEFT configuration: {e}")))?;
    if peft.peft_type != "LORA" {
        return Err(error(format!("peft_type is {}; only LORA is supported", peft.peft_type)));
    }
    if let Some(bias) = peft.bias.filter(|bias| bias != "none") {
        return Err(error(format!("bias is {bias:?}; only \"none\" is supported")));
    }
    if let Some(key) = UNSUPPORTED.into_iter().find(|key| peft.rest.get(*key).is_some_and(is_set)) {
        return Err(error(format!("{key} is set, which is not supported; train with LoRA on linear layers alone")));
    }
    if peft.r == 0 {
        return Err(error("r is 0; it must be 1 or more".into()));
    }
    let targets = match peft.target_modules {
        TargetModules::Names(names) => names,
        TargetModules::Pattern(pattern) if pattern == LoraConfig::ALL => vec![pattern],
        TargetModules::Pattern(pattern) => matching(&pattern, model).map_err(error)?,
    };
    let config =
        LoraConfig { r: peft.r, alpha: peft.lora_alpha, dropout: peft.lora_dropout, targets, rslora: peft.use_rslora };
    config.check(model).map_err(error)?;
    Ok(config)
}

fn is_set(value: &Json) -> bool {
    match value {
        Json::Null | Json::Bool(false) => false,
        Json::Array(list) => !list.is_empty(),
        Json::Object(map) => !map.is_empty(),
        _ => true,
    }
}

/// PEFT matches a pattern against whole module names.
fn matching(pattern: &str, model: &Config) -> Result<Vec<String>, String> {
    let pattern =
        regex::Regex::new(&format!("^(?:{pattern})$")).map_err(|e| format!("target_modules is no pattern: {e}"))?;
    let found: Vec<String> = modules(model).filter(|name| pattern.is_match(name)).collect();
    if found.is_empty() { Err("target_modules matches no linear layer of this model".into()) } else { Ok(found) }
}

/// The configuration of an adapter to the model `base` whose projections are `targets`.
pub fn json(config: &LoraConfig, targets: &[Target], base: &str) -> Json {
    let all = config.targets.iter().any(|target| target == LoraConfig::ALL);
    let names = if all { targets.iter().map(|t| t.name.to_owned()).collect() } else { config.targets.clone() };
    serde_json::json!({
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": config.r,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": names,
        "use_rslora": config.rslora,
        "use_dora": false,
        "bias": "none",
        "fan_in_fan_out": false,
        "init_lora_weights": true,
        "inference_mode": true,
        "modules_to_save": null,
        "layers_to_transform": null,
        "rank_pattern": {},
        "alpha_pattern": {},
    })
}
