//! What a stage kind promises before anything runs: the keys it reads, the columns it makes, the
//! models and adapters it will ask for. The running half is [`crate::engine::Runnable`].

use std::any::Any;
use std::collections::BTreeMap;
use std::sync::Arc;

use datafusion::arrow::datatypes::SchemaRef;
use futures::future::BoxFuture;
use serde::de::DeserializeOwned;

use super::{Flow, FlowError, InputRef, StageSpec};

/// A key of a stage's table that names other stages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct InputKey {
    pub name: &'static str,
    pub required: bool,
    /// May be a list of stages.
    pub many: bool,
}

/// One output of a stage.
#[derive(Debug, Clone)]
pub struct Port {
    /// Empty where the stage has one output.
    pub name: String,
    /// `None` where it can't be known before the run (a hub data set, offline).
    pub schema: Option<SchemaRef>,
}

/// One input of a stage, with what is known of its rows.
#[derive(Debug, Clone)]
pub struct InputPlan {
    /// The key that named it: `input`, `train`, ...
    pub key: String,
    pub from: InputRef,
    pub schema: Option<SchemaRef>,
}

/// Which adapter a client of a model asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AdapterChoice {
    Base,
    /// The trainer's adapter of the round before (in round 1 its `init_adapter`, or the base).
    Previous {
        trainer: String,
    },
    /// The trainer's adapter of this round; the stage waits for it.
    Current {
        trainer: String,
    },
    /// The trainer's adapter of a fixed round.
    Round {
        trainer: String,
        round: u32,
    },
}

/// A stage after validation.
#[derive(Clone)]
pub struct StagePlan {
    pub outputs: Vec<Port>,
    /// The stage needs its complete input before its first row (`check` says so).
    pub waits_for_round: bool,
    /// Model, device and adapter it is a client of.
    pub model: Option<ModelUse>,
    /// Model that it trains.
    pub trains: Option<String>,
    /// Everything that decides its rows, canonical; without device, batch limits, output, log.
    pub fingerprint: serde_json::Value,
    /// Lines for `check`.
    pub notes: Vec<String>,
    /// The kind's own validated options, handed back to it when the stage is opened.
    pub options: Arc<dyn Any + Send + Sync>,
}

impl std::fmt::Debug for StagePlan {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("StagePlan")
            .field("outputs", &self.outputs)
            .field("model", &self.model)
            .field("trains", &self.trains)
            .field("fingerprint", &self.fingerprint)
            .finish_non_exhaustive()
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelUse {
    pub model: String,
    /// As written: `auto`, `cpu`, `cpu:1`, `cuda:0`; several for a data-parallel trainer.
    pub devices: Vec<String>,
    pub adapter: AdapterChoice,
}

/// What a kind sees while it checks one stage.
pub struct CheckContext<'a> {
    pub flow: &'a Flow,
    pub stage: &'a StageSpec,
    /// In the order of the stage's input keys.
    pub inputs: &'a [InputPlan],
    /// For every model, the names of the stages that train it (known from their `model` key before any check).
    pub trainers: &'a BTreeMap<String, Vec<String>>,
}

impl CheckContext<'_> {
    /// The stage's own keys as `T`; unknown keys and wrong types are errors with their place.
    pub fn options<T: DeserializeOwned>(&self) -> Result<T, FlowError> {
        super::options::read(&self.stage.options, &format!("stages.{}", self.stage.name))
    }

    /// An error about one of the stage's keys.
    pub fn error(&self, key: &str, message: impl Into<String>) -> FlowError {
        FlowError::new(format!("stages.{}.{key}", self.stage.name), message)
    }
}

/// The contract of a stage kind: a name, the keys that are inputs, and a check.
pub trait StageKind: Send + Sync {
    fn name(&self) -> &'static str;

    fn inputs(&self) -> &'static [InputKey];

    /// Validates one stage. No model is loaded; files that must exist are looked at.
    fn check<'a>(&'a self, cx: CheckContext<'a>) -> BoxFuture<'a, Result<StagePlan, FlowError>>;
}

/// The keys of a stage with one input.
pub const ONE_INPUT: &[InputKey] = &[InputKey { name: "input", required: true, many: false }];
