//! A flow written in Rust.

use std::path::Path;

use serde::Serialize;
use toml::{Table, Value};

use crate::flow::{Flow, FlowError, KindLookup, ModelSpec};

/// Builds the table that a flow file would be, so that both forms mean the same and are checked by
/// the same rules.
///
/// ```
/// use flowrun::embed::{Engine, FlowBuilder};
/// use serde_json::json;
///
/// let flow = FlowBuilder::new("twice")
///     .seed(7)
///     .stage("prompts", "source", json!({ "dataset": "prompts.jsonl" }))
///     .stage("long", "mapper", json!({ "input": "prompts", "sql": "SELECT * FROM input WHERE length(prompt) > 10" }))
///     .build(".", &Engine::new())?;
/// assert_eq!(flow.stages.len(), 2);
/// # Ok::<(), flowrun::flow::FlowError>(())
/// ```
#[derive(Debug, Clone, Default)]
pub struct FlowBuilder {
    table: Table,
    /// What could not be written as TOML, told by [`FlowBuilder::build`].
    unwritable: Option<FlowError>,
}

impl FlowBuilder {
    pub fn new(name: &str) -> Self {
        Self::default().set("name", name)
    }

    fn set(mut self, key: &str, value: impl Into<Value>) -> Self {
        self.table.insert(key.into(), value.into());
        self
    }

    #[must_use]
    pub fn rounds(self, rounds: u32) -> Self {
        self.set("rounds", i64::from(rounds))
    }

    #[must_use]
    pub fn seed(self, seed: u32) -> Self {
        self.set("seed", i64::from(seed))
    }

    #[must_use]
    pub fn deterministic(self) -> Self {
        self.set("deterministic", true)
    }

    #[must_use]
    pub fn max_dead_letters(self, share: f64) -> Self {
        self.set("max_dead_letters", share)
    }

    #[must_use]
    pub fn model(self, name: &str, model: &ModelSpec) -> Self {
        self.entry(&["models", name], None, model)
    }

    /// A stage; `keys` are those of its kind, inputs among them, as a map or a struct.
    #[must_use]
    pub fn stage(self, name: &str, kind: &str, keys: impl Serialize) -> Self {
        self.entry(&["stages", name], Some(kind), &keys)
    }

    /// Changes a stage from `round` on.
    #[must_use]
    pub fn from_round(self, round: u32, stage: &str, keys: impl Serialize) -> Self {
        self.entry(&["round", &round.to_string(), "stages", stage], None, &keys)
    }

    fn entry(mut self, path: &[&str], kind: Option<&str>, value: &impl Serialize) -> Self {
        let mut written = match Table::try_from(value) {
            Ok(table) => table,
            Err(e) => {
                self.unwritable.get_or_insert(FlowError::new(path.join("."), e.to_string()));
                return self;
            }
        };
        if let Some(kind) = kind {
            written.insert("kind".into(), kind.into());
        }
        let mut table = &mut self.table;
        for name in path {
            let inner = table.entry(*name).or_insert_with(|| Table::new().into());
            let Value::Table(inner) = inner else { return self };
            table = inner;
        }
        *table = written;
        self
    }

    /// The flow; `base` is where its relative paths start.
    ///
    /// # Errors
    /// As [`Flow::from_toml`]; places are those of the text that the builder wrote.
    pub fn build(self, base: impl AsRef<Path>, kinds: &dyn KindLookup) -> Result<Flow, FlowError> {
        if let Some(error) = self.unwritable {
            return Err(error);
        }
        let text = toml::to_string(&self.table).map_err(|e| FlowError::new("", e.to_string()))?;
        Flow::from_toml(&text, base.as_ref(), &[], kinds)
    }
}
