//! A flow as the user wrote it, after overlays and environment, before validation.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use chrono::NaiveDate;
use toml::{Table, Value};

use super::device::DeviceSpec;
use super::document::Places;
use super::hub::HubLogin;
use super::masks::Masks;
use super::model::ModelSpec;
use super::options::{SECRETS, is_secret};

/// A flow: models, stages and the number of rounds. Made by [`Flow::load`]; what overrides a file
/// is a `--set` entry, not an edit of these fields.
#[derive(Debug, Clone)]
pub struct Flow {
    pub name: String,
    pub rounds: u32,
    pub seed: u64,
    pub deterministic: bool,
    /// Share of rows that may become dead letters before the run fails.
    pub max_dead_letters: f64,
    /// The date for chat templates that ask for it; `None` until the run's first start decides.
    pub date: Option<NaiveDate>,
    /// The contents that were opened before the plan.
    pub contents: Contents,
    pub models: BTreeMap<String, ModelSpec>,
    /// By name as `cpu:0` and `cuda:0`; those not named are as their default.
    pub devices: BTreeMap<String, DeviceSpec>,
    /// In file order.
    pub stages: Vec<StageSpec>,
    /// Directory of the first flow file; relative paths in the flow start here.
    pub base: PathBuf,
    /// `--device`: overrides every stage's device.
    pub device_override: Option<String>,
    /// Who asks the hub for its models and data sets.
    pub hub: HubLogin,
    /// Where each key was written.
    pub places: Arc<Places>,
    /// `[round.N...]`, by ascending `N`.
    pub overlays: Arc<Vec<RoundOverlay>>,
    /// The table that all of this was read from, with `${VAR}` as it is written.
    pub written: Arc<Table>,
    /// The values of those variables, which are never shown.
    pub masks: Arc<Masks>,
}

/// Contents of models and adapters, as far as they could be opened.
#[derive(Debug, Clone, Default)]
pub struct Contents {
    /// By model: the hash of all that its answers follow from.
    pub models: BTreeMap<String, String>,
    /// The models whose chat template asks for the date.
    pub dated: BTreeSet<String>,
    /// The models that have no chat template.
    pub plain: BTreeSet<String>,
    /// The models whose tokenizer has no begin-of-text token.
    pub without_bos: BTreeSet<String>,
    /// By trainer: the hash of its `init_adapter`.
    pub init_adapters: BTreeMap<String, String>,
}

/// The stages from one round on.
#[derive(Debug, Clone)]
pub struct RoundOverlay {
    pub from: u32,
    pub stages: Vec<StageSpec>,
    pub places: Arc<Places>,
}

impl Default for Flow {
    fn default() -> Self {
        Self {
            name: "flow".into(),
            rounds: 1,
            seed: 0,
            deterministic: false,
            max_dead_letters: 0.05,
            date: None,
            contents: Contents::default(),
            models: BTreeMap::new(),
            devices: BTreeMap::new(),
            stages: Vec::new(),
            base: PathBuf::from("."),
            device_override: None,
            hub: HubLogin::default(),
            places: Arc::default(),
            overlays: Arc::default(),
            written: Arc::default(),
            masks: Arc::default(),
        }
    }
}

impl Flow {
    /// The flow as it is in round `round` (from 1): every overlay up to there is laid on.
    pub fn for_round(&self, round: u32) -> Flow {
        let mut flow = self.clone();
        if let Some(overlay) = self.overlay(round) {
            flow.stages.clone_from(&overlay.stages);
            flow.places = overlay.places.clone();
        }
        flow
    }

    /// The last overlay that counts in `round`.
    pub fn overlay(&self, round: u32) -> Option<&RoundOverlay> {
        self.overlays.iter().rev().find(|overlay| overlay.from <= round)
    }

    pub fn stage(&self, name: &str) -> Option<&StageSpec> {
        self.stages.iter().find(|stage| stage.name == name)
    }

    /// The flow as TOML, with `${VAR}` as it is written and other secrets masked: what reads the run later needs the
    /// variables as the run did. Local model sources are absolute, so that it finds them from anywhere.
    pub fn to_toml(&self) -> String {
        let mut table = Table::clone(&self.written);
        mask(&mut table);
        if let Some(date) = self.date {
            table.insert("date".into(), date.to_string().into());
        }
        let models = table.get_mut("models").and_then(Value::as_table_mut);
        for (name, model) in models.into_iter().flat_map(Table::iter_mut) {
            let headers = model.get_mut(SECRETS).and_then(Value::as_table_mut);
            headers.into_iter().flat_map(Table::iter_mut).for_each(|(_, value)| hide(value));
            let relative = self.models.get(name).is_some_and(|model| is_relative(&model.source));
            if let (true, Some(Value::String(source))) = (relative, model.get_mut("source"))
                && let Ok(base) = std::path::absolute(&self.base)
            {
                let path = Path::new(&base.to_string_lossy().replace('$', "$$")).join(source.as_str());
                *source = std::path::absolute(&path).unwrap_or(path).to_string_lossy().into_owned();
            }
        }
        // A table that was parsed can be written; `Table` has no value that TOML lacks.
        toml::to_string_pretty(&table).unwrap_or_default()
    }
}

/// Returns whether a model's source is a relative path.
fn is_relative(source: &str) -> bool {
    !source.contains(':') && Path::new(source).is_relative()
}

fn mask(table: &mut Table) {
    for (name, value) in table.iter_mut() {
        match value {
            value if is_secret(name) => hide(value),
            Value::Table(inner) => mask(inner),
            Value::Array(list) => list.iter_mut().filter_map(Value::as_table_mut).for_each(mask),
            _ => {}
        }
    }
}

/// A secret, where it is written in the flow itself.
fn hide(value: &mut Value) {
    if !value.as_str().is_some_and(names_a_variable) {
        *value = Value::String("***".into());
    }
}

/// `${VAR}` and nothing else.
fn names_a_variable(text: &str) -> bool {
    let name = text.strip_prefix("${").and_then(|rest| rest.strip_suffix('}'));
    name.is_some_and(|name| !name.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_'))
}

/// `[stages.NAME]`
#[derive(Debug, Clone, PartialEq)]
pub struct StageSpec {
    pub name: String,
    pub kind: String,
    /// The input keys of its kind (`input`, `train`, ...) with the ports they name, in order.
    pub inputs: Vec<(String, InputRef)>,
    /// Rounds this stage runs in; `None` is all of them.
    pub in_rounds: Option<Vec<u32>>,
    /// False where the run directory is to hold no Parquet table of it.
    pub table: bool,
    /// Everything else in the table, read by the kind with [`crate::flow::CheckContext::options`].
    pub options: toml::Table,
}

impl StageSpec {
    pub fn runs_in(&self, round: u32) -> bool {
        self.in_rounds.as_ref().is_none_or(|rounds| rounds.contains(&round))
    }
}

/// `STAGE` or `STAGE.PORT`
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct InputRef {
    pub stage: String,
    /// Empty for the stage's only output.
    pub port: String,
}

impl fmt::Display for InputRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.stage)?;
        if self.port.is_empty() { Ok(()) } else { write!(f, ".{}", self.port) }
    }
}
