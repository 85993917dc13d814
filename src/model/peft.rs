//! PEFT's adapter_config.json, read and written.
//!
//! What is set there and not supported is refused: an adapter that is applied in part gives answers
//! that nobody trained.

use std::collections::BTreeMap;
use std::path::Path;

use onig::{Regex, RegexOptions, Syntax};
use serde::Deserialize;
use serde_json::{Map, Value as Json};

use super::ModelError;
use super::config::Config;
use super::lora::{LoraConfig, Target, modules};

const MERGE: &str =
    "merge it into its base with PEFT (merge_and_unload, then save_pretrained) and name the merged model";
const TRAIN_AGAIN: &str = "train it again with LoRA on the linear layers of the blocks alone";
const CONVERT: &str = "convert it with PEFT: save_pretrained(path_initial_model_for_weight_conversion=...), with the \
                       adapter as it was before training";

/// Keys of other ways to adapt a model, and what to do; null, false or empty is not to use them.
const UNSUPPORTED: [(&str, &str); 17] = [
    ("alora_invocation_tokens", TRAIN_AGAIN),
    ("arrow_config", TRAIN_AGAIN),
    ("corda_config", CONVERT),
    ("eva_config", "remove the key: it is of no use after training"),
    ("fan_in_fan_out", "the layers of this model are not stored that way; check which model it was trained on"),
    ("kasa_config", MERGE),
    ("layer_replication", MERGE),
    ("lora_bias", MERGE),
    ("lora_ga_config", CONVERT),
    ("modules_to_save", MERGE),
    ("monteclora_config", MERGE),
    ("target_parameters", MERGE),
    ("trainable_token_indices", MERGE),
    ("use_bdlora", MERGE),
    ("use_dora", MERGE),
    ("use_qalora", MERGE),
    ("velora_config", TRAIN_AGAIN),
];

/// What is read of an adapter_config.json.
#[derive(Deserialize)]
struct PeftConfig {
    r: usize,
    lora_alpha: f64,
    #[serde(default)]
    lora_dropout: f64,
    target_modules: Option<Names>,
    exclude_modules: Option<Names>,
    layers_to_transform: Option<Layers>,
    layers_pattern: Option<Names>,
    rank_pattern: Option<Map<String, Json>>,
    alpha_pattern: Option<Map<String, Json>>,
    #[serde(default)]
    use_rslora: bool,
    bias: Option<String>,
    #[serde(default)]
    init_lora_weights: Json,
    #[serde(flatten)]
    rest: Map<String, Json>,
}

/// A list of names, or a pattern.
#[derive(Deserialize)]
#[serde(untagged)]
enum Names {
    List(Vec<String>),
    Pattern(String),
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Layers {
    One(usize),
    Several(Vec<usize>),
}

/// An adapter's configuration, and where a module differs from it.
#[derive(Debug, Clone, PartialEq)]
pub struct AdapterConfig {
    /// The largest rank of all modules.
    pub config: LoraConfig,
    /// By module: its own rank, and its own scale over that of `config`.
    pub own: BTreeMap<String, (usize, f64)>,
}

impl AdapterConfig {
    /// The rank of a module in the file, and its scale over that of the configuration.
    pub fn of(&self, module: &str) -> (usize, f64) {
        self.own.get(module).copied().unwrap_or((self.config.r, 1.0))
    }
}

/// The reason why a file of an adapter can't be read, for messages.
pub(super) fn unreadable_adapter(error: &std::io::Error) -> String {
    match error.kind() {
        std::io::ErrorKind::NotFound => "is not there; an adapter is a directory that PEFT wrote".into(),
        _ => format!("can't be read: {error}"),
    }
}

/// Reads the configuration of an adapter to `model`.
///
/// # Errors
/// Names the file and the key that can't be.
pub fn read(file: &Path, model: &Config) -> Result<AdapterConfig, ModelError> {
    let text = std::fs::read_to_string(file).map_err(|e| ModelError::file(file, unreadable_adapter(&e)))?;
    parse(&text, model).map_err(|message| ModelError::file(file, message))
}

fn parse(text: &str, model: &Config) -> Result<AdapterConfig, String> {
    let json: Json = serde_json::from_str(text)
        .map_err(|e| format!("is no PEFT configuration: {e}; write the adapter again with save_pretrained"))?;
    check_type(&json)?;
    let peft: PeftConfig = serde_json::from_value(json)
        .map_err(|e| format!("is no PEFT configuration: {e}; write the adapter again with save_pretrained"))?;
    if let Some(bias) = peft.bias.as_ref().filter(|bias| *bias != "none") {
        return Err(format!("bias is {bias:?}; only \"none\" is supported; {MERGE}"));
    }
    check_init(&peft.init_lora_weights)?;
    let set = |key: &str| peft.rest.get(key).is_some_and(is_set);
    if let Some((key, remedy)) = UNSUPPORTED.into_iter().find(|(key, _)| set(key)) {
        return Err(format!("{key} is set, which is not supported; {remedy}"));
    }
    if peft.r == 0 {
        return Err("r is 0; it must be 1 or more".into());
    }
    let targets = peft.targets(model)?;
    let scale = |alpha: f64, r: usize| alpha / if peft.use_rslora { (r as f64).sqrt() } else { r as f64 };
    let usual = scale(peft.lora_alpha, peft.r);
    let mut config =
        LoraConfig { r: peft.r, alpha: peft.lora_alpha, dropout: peft.lora_dropout, targets, rslora: peft.use_rslora };
    let mut own = BTreeMap::new();
    if peft.rank_pattern.iter().chain(&peft.alpha_pattern).any(|pattern| !pattern.is_empty()) {
        for module in modules(model).filter(|module| config.adapts(module)) {
            let (r, alpha) = (peft.rank(&module)?, peft.alpha(&module)?);
            own.insert(module, (r, scale(alpha, r) / usual));
        }
        config.r = own.values().map(|(r, _)| *r).max().unwrap_or(peft.r);
        // The scale of modules without a pattern stays what it is.
        config.alpha = usual / scale(1.0, config.r);
    }
    Ok(AdapterConfig { config, own })
}

impl PeftConfig {
    /// The names of `target_modules`, or where that is not all there is to it the modules themselves.
    fn targets(&self, model: &Config) -> Result<Vec<String>, String> {
        let missing = "target_modules is missing; write \"all-linear\" or a list of names";
        let targets = self.target_modules.as_ref().ok_or(missing)?;
        let excludes = self.exclude_modules.as_ref().is_some_and(|names| match names {
            Names::List(list) => !list.is_empty(),
            Names::Pattern(pattern) => !pattern.is_empty(),
        });
        let layers = match &self.layers_to_transform {
            Some(Layers::Several(list)) => !list.is_empty(),
            one => one.is_some(),
        };
        match targets {
            Names::Pattern(all) if all == LoraConfig::ALL && !excludes => return Ok(vec![all.clone()]),
            Names::List(names) if !excludes && !layers => return Ok(names.clone()),
            _ => {}
        }
        let mut found = Vec::new();
        for module in modules(model) {
            if self.names(targets, &module, layers)? && !(excludes && self.excluded(&module)?) {
                found.push(module);
            }
        }
        if found.is_empty() { Err("target_modules matches no linear layer of this model".into()) } else { Ok(found) }
    }

    fn names(&self, targets: &Names, module: &str, layers: bool) -> Result<bool, String> {
        match targets {
            Names::Pattern(all) if all == LoraConfig::ALL => Ok(true),
            Names::Pattern(pattern) => matches("target_modules", pattern, module),
            Names::List(names) if names.iter().any(|name| name == module) => Ok(true),
            Names::List(names) => Ok(named(names, module) && (!layers || self.transforms(module)?)),
        }
    }

    fn excluded(&self, module: &str) -> Result<bool, String> {
        match &self.exclude_modules {
            None => Ok(false),
            Some(Names::Pattern(pattern)) => matches("exclude_modules", pattern, module),
            Some(Names::List(names)) => Ok(named(names, module)),
        }
    }

    /// Returns whether a module lies in one of `layers_to_transform`.
    fn transforms(&self, module: &str) -> Result<bool, String> {
        let before = |pattern: &String| format!(r"(?:^|.*?\.){pattern}");
        let patterns = match &self.layers_pattern {
            Some(Names::List(list)) if !list.is_empty() => list.iter().map(before).collect(),
            Some(Names::Pattern(one)) if !one.is_empty() => vec![before(one)],
            _ => vec![r".*?\.[^.]*".to_owned()],
        };
        for pattern in patterns {
            let regex = python("layers_pattern", &format!(r"\A(?:{pattern}\.(?P<idx>\d+)\.)"))?;
            let Some(found) = regex.captures(module) else { continue };
            let mut layer = None;
            regex.foreach_name(|name, groups| {
                let group = groups.iter().find_map(|group| found.at(*group as usize));
                layer = layer.or(group.filter(|_| name == "idx").and_then(|text| text.parse::<usize>().ok()));
                true
            });
            return Ok(layer.is_some_and(|layer| match &self.layers_to_transform {
                Some(Layers::One(one)) => layer == *one,
                Some(Layers::Several(several)) => several.contains(&layer),
                None => true,
            }));
        }
        Ok(false)
    }

    fn rank(&self, module: &str) -> Result<usize, String> {
        match of_pattern("rank_pattern", self.rank_pattern.as_ref(), module)? {
            None => Ok(self.r),
            Some(value) => match value.as_u64() {
                Some(r) if r > 0 => Ok(r as usize),
                _ => Err(format!("rank_pattern has {value}; a rank is a whole number from 1 up")),
            },
        }
    }

    fn alpha(&self, module: &str) -> Result<f64, String> {
        match of_pattern("alpha_pattern", self.alpha_pattern.as_ref(), module)? {
            None => Ok(self.lora_alpha),
            Some(value) => value.as_f64().ok_or_else(|| format!("alpha_pattern has {value}, which is no number")),
        }
    }
}

/// Refuses all but LoRA, with what can be done.
fn check_type(json: &Json) -> Result<(), String> {
    let kind =
        json.get("peft_type").and_then(Json::as_str).ok_or("has no peft_type; an adapter is a PEFT directory")?;
    let prompts = ["PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "ADAPTION_PROMPT", "CPT"];
    match kind {
        "LORA" => Ok(()),
        _ if prompts.contains(&kind) => Err(format!(
            "peft_type is {kind}, which adds tokens and no weights; only LORA is supported; train a LoRA adapter instead"
        )),
        _ => Err(format!("peft_type is {kind}; only LORA is supported; {MERGE}")),
    }
}

/// Refuses adapters that belong on a base with other weights than its own: what they began with was taken off it.
fn check_init(init: &Json) -> Result<(), String> {
    let name = match init {
        Json::Null | Json::Bool(_) => return Ok(()),
        Json::String(name) => name.to_lowercase(),
        other => return Err(format!("init_lora_weights is {other}; it is true, false or a name")),
    };
    let taken_off =
        "so what it began with was taken off the base's weights, and on the base itself it would be applied twice";
    match name.as_str() {
        "gaussian" | "eva" | "orthogonal" | "mica" => Ok(()),
        "olora" | "lora_ga" => Err(format!("init_lora_weights is {init}, {taken_off}; {CONVERT}")),
        _ if name.starts_with("pissa") || name.starts_with("corda") => {
            Err(format!("init_lora_weights is {init}, {taken_off}; {CONVERT}"))
        }
        "loftq" => Err(format!(
            "init_lora_weights is {init}, so it belongs on the quantized base that was made with it and on no other; \
             {MERGE}"
        )),
        _ => Err(format!("init_lora_weights is {init}, which is not known here; {MERGE}")),
    }
}

fn is_set(value: &Json) -> bool {
    match value {
        Json::Null | Json::Bool(false) => false,
        Json::Array(list) => !list.is_empty(),
        Json::Object(map) => !map.is_empty(),
        _ => true,
    }
}

/// Returns whether a list has the module's name or the end of it.
fn named(names: &[String], module: &str) -> bool {
    names
        .iter()
        .any(|name| module.strip_suffix(name.as_str()).is_some_and(|head| head.is_empty() || head.ends_with('.')))
}

/// Python's `re.fullmatch`.
fn matches(key: &str, pattern: &str, module: &str) -> Result<bool, String> {
    Ok(python(key, &format!(r"\A(?:{pattern})$"))?.find(module).is_some())
}

/// The value of the first pattern that the module's name ends with, as PEFT's `get_pattern_key`.
fn of_pattern<'a>(
    key: &str,
    patterns: Option<&'a Map<String, Json>>,
    module: &str,
) -> Result<Option<&'a Json>, String> {
    for (pattern, value) in patterns.into_iter().flatten() {
        if python(key, &format!(r"\A(?:.*\.)?(?:{pattern})$"))?.find(module).is_some() {
            return Ok(Some(value));
        }
    }
    Ok(None)
}

/// A pattern in Python's syntax.
fn python(key: &str, pattern: &str) -> Result<Regex, String> {
    Regex::with_options(pattern, RegexOptions::REGEX_OPTION_NONE, Syntax::python()).map_err(|e| {
        format!("{key} is no regular expression: {}; list the modules' names in its place", e.description())
    })
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

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use serde_json::json;

    use super::*;

    fn model() -> Config {
        let dir = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tiny-llama");
        Config::from_json(&dir.join("config.json")).unwrap()
    }

    /// `tests/oracle/adapter_patterns.py` writes what PEFT picks.
    #[test]
    fn modules_ranks_and_scales_as_peft() {
        let cases: Json = serde_json::from_str(include_str!("../../tests/fixtures/adapter_patterns.json")).unwrap();
        for case in cases.as_array().unwrap() {
            let expected = case["modules"].as_object().unwrap();
            let read = parse(&case["config"].to_string(), &model());
            if expected.is_empty() {
                assert!(read.unwrap_err().contains("matches no linear layer"), "{}", case["config"]);
                continue;
            }
            let read = read.unwrap_or_else(|e| panic!("{}: {e}", case["config"]));
            let found: Vec<String> = modules(&model()).filter(|module| read.config.adapts(module)).collect();
            assert_eq!(found.iter().collect::<Vec<_>>(), expected.keys().collect::<Vec<_>>(), "{}", case["config"]);
            for (module, expected) in expected {
                let (r, over) = read.of(module);
                assert_eq!(json!(r), expected["r"], "{module}: {}", case["config"]);
                let scale = over * read.config.scale();
                assert!((scale - expected["scale"].as_f64().unwrap()).abs() < 1e-12, "{module}: {}", case["config"]);
            }
        }
    }

    #[test]
    fn what_would_be_applied_in_part_or_twice_is_refused_with_the_remedy() {
        let twice = "would be applied twice; convert it with PEFT: save_pretrained(path_initial_model_for_weight_conve";
        for (key, value, part) in [
            ("init_lora_weights", json!("pissa"), twice),
            ("init_lora_weights", json!("pissa_niter_16"), twice),
            ("init_lora_weights", json!("olora"), twice),
            ("init_lora_weights", json!("corda"), twice),
            ("init_lora_weights", json!("lora_ga"), twice),
            ("init_lora_weights", json!("loftq"), "on the quantized base that was made with it and on no other; merge"),
            ("init_lora_weights", json!("milora"), "which is not known here"),
            ("use_dora", json!(true), "use_dora is set, which is not supported; merge it into its base with PEFT"),
            ("modules_to_save", json!(["lm_head"]), "modules_to_save is set"),
            ("bias", json!("all"), "only \"none\" is supported; merge"),
            ("peft_type", json!("PROMPT_TUNING"), "peft_type is PROMPT_TUNING, which adds tokens and no weights"),
            ("peft_type", json!("IA3"), "only LORA is supported; merge it into its base"),
            ("target_modules", json!("(q_proj"), "target_modules is no regular expression"),
            ("target_modules", json!("nothing"), "matches no linear layer"),
            ("target_modules", json!(null), "target_modules is missing"),
            ("rank_pattern", json!({"q_proj": 0}), "a rank is a whole number from 1 up"),
            ("r", json!(0), "r is 0"),
        ] {
            let mut config = json!({"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]});
            config[key] = value;
            let message = parse(&config.to_string(), &model()).unwrap_err();
            assert!(message.contains(part), "{config}: {message}");
        }
        for value in [json!(true), json!(false), json!("gaussian"), json!("orthogonal"), Json::Null] {
            let config = json!({"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"],
                "init_lora_weights": value, "layers_pattern": null, "corda_config": {}});
            assert!(parse(&config.to_string(), &model()).is_ok(), "{config}");
        }
    }
}
