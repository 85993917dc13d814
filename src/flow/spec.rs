//! A flow as the user wrote it, after overlays and environment, before validation.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// A flow: models, stages and the number of rounds.
#[derive(Debug, Clone)]
pub struct Flow {
    pub name: String,
    pub rounds: u32,
    pub seed: u64,
    pub deterministic: bool,
    /// Share of rows that may become dead letters before the run fails.
    pub max_dead_letters: f64,
    pub models: BTreeMap<String, ModelSpec>,
    /// In file order.
    pub stages: Vec<StageSpec>,
    /// Directory of the first flow file; relative paths in the flow start here.
    pub base: PathBuf,
    /// `--device`: overrides every stage's device.
    pub device_override: Option<String>,
}

/// `[models.NAME]`
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelSpec {
    /// `hf://owner/name[@revision]`, a directory, a `.gguf` file, or `builtin:smollm2-135m`.
    pub source: String,
    /// `f32`, `bf16` or `f16`; the default is `bf16`.
    #[serde(default = "default_dtype")]
    pub dtype: String,
    /// Replaces the system turn that the chat template would add.
    #[serde(default)]
    pub system_prompt: Option<String>,
    /// A Jinja template that replaces the model's own.
    #[serde(default)]
    pub chat_template: Option<String>,
    /// `dummy`: random weights from a config.json alone, for benchmarks.
    #[serde(default)]
    pub weights: Option<String>,
}

fn default_dtype() -> String {
    "bf16".into()
}

/// `[stages.NAME]`
#[derive(Debug, Clone)]
pub struct StageSpec {
    pub name: String,
    pub kind: String,
    /// The input keys of its kind (`input`, `train`, ...) with the ports they name, in order.
    pub inputs: Vec<(String, InputRef)>,
    /// Rounds this stage runs in; `None` is all of them.
    pub in_rounds: Option<Vec<u32>>,
    /// Everything else in the table, read by the kind with [`crate::flow::CheckContext::options`].
    pub options: toml::Table,
}

/// `STAGE` or `STAGE.PORT`
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct InputRef {
    pub stage: String,
    /// Empty for the stage's only output.
    pub port: String,
}
