//! What a stage kind promises before anything runs: the keys it reads, the columns it makes, the
//! models and adapters it will ask for. The running half is [`crate::engine::Runnable`].

use std::any::Any;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use datafusion::arrow::datatypes::SchemaRef;
use futures::future::BoxFuture;
use serde::de::DeserializeOwned;

use super::{DeviceName, Devices, Flow, FlowError, Form, InputRef, ModelSpec, StageSpec, names};

/// A key of a stage's table that names other stages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct InputKey {
    pub name: &'static str,
    pub required: bool,
    /// May be a list of stages.
    pub many: bool,
}

/// How many rows a port has in a round at most.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RowBound {
    /// Rows of the source.
    pub shard: u64,
    /// Of them, those that something comes from.
    pub sources: u64,
    /// Rows that come from one of them.
    pub each: u64,
}

impl RowBound {
    pub fn of_source(rows: u64) -> Self {
        Self { shard: rows, sources: rows, each: 1 }
    }

    pub fn total(&self) -> u64 {
        self.sources.saturating_mul(self.each)
    }
}

/// One output of a stage.
#[derive(Debug, Clone)]
pub struct Port {
    /// Empty where the stage has one output.
    pub name: String,
    /// `None` where it can't be known before the run (a hub data set, offline).
    pub schema: Option<SchemaRef>,
    /// `None` where it can't be known before the run.
    pub rows: Option<RowBound>,
}

/// One input of a stage, with what is known of its rows.
#[derive(Debug, Clone)]
pub struct InputPlan {
    /// The key that named it: `input`, `train`, ...
    pub key: String,
    pub from: InputRef,
    pub schema: Option<SchemaRef>,
    /// `None` where it can't be known before the run.
    pub rows: Option<RowBound>,
}

/// Which adapter a client of a model asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AdapterChoice {
    Base,
    /// The trainer's adapter of the round before (in round 1 its `init_adapter`, or the base).
    Previous {
        trainer: String,
    },
    /// The trainer's adapter of this many rounds before, from 2 on; as [`Self::Previous`] where there was none yet.
    Earlier {
        trainer: String,
        rounds: u32,
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
    /// The stage numbers its rows anew: what follows descends from it and no longer from its source.
    pub new_rows: bool,
    /// Models, devices and adapters it is a client of; several for an ensemble.
    pub models: Vec<ModelUse>,
    /// Model that it trains.
    pub trains: Option<String>,
    /// Everything in its keys that decides its rows; without device, batch limits, output, log. The plan puts the
    /// kind, its [`StageKind::results`] and the date that its templates ask for around it.
    pub fingerprint: Form,
    /// Lines for `check`.
    pub notes: Vec<String>,
    /// The kind's own validated options, handed back to it when the stage is opened.
    pub options: Arc<dyn Any + Send + Sync>,
}

impl std::fmt::Debug for StagePlan {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("StagePlan")
            .field("outputs", &self.outputs)
            .field("models", &self.models)
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
    /// True if its questions go through its chat template.
    pub chat: bool,
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

impl AdapterChoice {
    /// The trainer whose adapter is asked for.
    pub fn trainer(&self) -> Option<&String> {
        match self {
            Self::Base => None,
            Self::Previous { trainer }
            | Self::Earlier { trainer, .. }
            | Self::Current { trainer }
            | Self::Round { trainer, .. } => Some(trainer),
        }
    }

    /// The value of an `adapter` key: `base`, `previous`, `previous:N`, `round:N`, the name of a trainer,
    /// or `TRAINER.previous`. Absent, it is `previous` where the flow trains `model`, else `base`.
    ///
    /// # Errors
    /// The key is `adapter`; [`CheckContext::adapter`] puts the stage before it.
    pub fn parse(text: Option<&str>, model: &str, trainers: &BTreeMap<String, Vec<String>>) -> Result<Self, FlowError> {
        let own = trainers.get(model).map_or(&[][..], Vec::as_slice);
        let known: Vec<&str> = own.iter().map(String::as_str).collect();
        let known_trainer = |name: &str| {
            if own.iter().any(|trainer| trainer == name) {
                return Ok(name.to_owned());
            }
            let error = match trainers.iter().find(|(_, stages)| stages.iter().any(|stage| stage == name)) {
                Some((other, _)) => FlowError::new("adapter", format!("`{name}` trains `{other}`, not `{model}`")),
                None => FlowError::new("adapter", format!("no trainer `{name}` trains `{model}`")),
            };
            let choices = [&["base", "previous"], known.as_slice()].concat();
            Err(error.help(names::suggest(name, &choices)))
        };
        let only_trainer = || match own {
            [trainer] => Ok(trainer.clone()),
            [] => Err(FlowError::new("adapter", format!("nothing in this flow trains `{model}`"))
                .help("leave `adapter` out, or write \"base\"")),
            [first, ..] => Err(FlowError::new(
                "adapter",
                format!("`{model}` is trained by {}, so the adapter has to be named", names::list(&known)),
            )
            .help(format!("write adapter = \"{first}.previous\", adapter = \"{first}\" or adapter = \"base\""))),
        };
        match text {
            Some("base") => Ok(Self::Base),
            None if own.is_empty() => Ok(Self::Base),
            None | Some("previous") => Ok(Self::Previous { trainer: only_trainer()? }),
            Some(text) if text.starts_with("previous:") => match text["previous:".len()..].parse() {
                Ok(1) => Ok(Self::Previous { trainer: only_trainer()? }),
                Ok(rounds) if rounds > 1 => Ok(Self::Earlier { trainer: only_trainer()?, rounds }),
                _ => Err(FlowError::new("adapter", format!("`{text}` says no number of rounds"))
                    .help("previous:2 is the adapter of two rounds before")),
            },
            Some(text) => match (text.strip_prefix("round:"), text.strip_suffix(".previous")) {
                (Some(number), _) => match number.parse() {
                    Ok(round) if round > 0 => Ok(Self::Round { trainer: only_trainer()?, round }),
                    _ => Err(FlowError::new("adapter", format!("`{number}` is not the number of a round"))
                        .help("the first is round:1")),
                },
                (_, Some(trainer)) => Ok(Self::Previous { trainer: known_trainer(trainer)? }),
                _ => Ok(Self::Current { trainer: known_trainer(text)? }),
            },
        }
    }
}

impl CheckContext<'_> {
    /// The stage's own keys as `T`; unknown keys and wrong types are errors with their place.
    pub fn options<T: DeserializeOwned>(&self) -> Result<T, FlowError> {
        super::options::read(&self.stage.options, &format!("stages.{}", self.stage.name))
    }

    /// The model that the stage's key `model` names.
    pub fn model(&self, name: &str) -> Result<&ModelSpec, FlowError> {
        self.flow.models.get(name).ok_or_else(|| {
            let known: Vec<&str> = self.flow.models.keys().map(String::as_str).collect();
            self.error("model", format!("there is no model `{name}`")).help(names::suggest(name, &known))
        })
    }

    /// The stage's key `adapter` for a client of `model`.
    pub fn adapter(&self, text: Option<&str>, model: &str) -> Result<AdapterChoice, FlowError> {
        AdapterChoice::parse(text, model, self.trainers)
            .map_err(|error| FlowError { key: format!("stages.{}.{}", self.stage.name, error.key), ..error })
    }

    /// The stage's key `device` after `--device`, for [`ModelUse::devices`].
    ///
    /// # Errors
    /// `--device` names none.
    pub fn devices(&self, written: &Devices) -> Result<Vec<String>, FlowError> {
        match &self.flow.device_override {
            None => Ok(written.names().iter().map(ToString::to_string).collect()),
            Some(name) => {
                let name: DeviceName = name.parse().map_err(|message: String| FlowError {
                    place: Some((PathBuf::from("--device"), 0)),
                    ..FlowError::new("", message)
                })?;
                Ok(vec![name.to_string()])
            }
        }
    }

    /// An error about one of the stage's keys.
    pub fn error(&self, key: &str, message: impl Into<String>) -> FlowError {
        FlowError::new(format!("stages.{}.{key}", self.stage.name), message)
    }
}

/// What a stage or a model opens outside of the run directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Access {
    Nothing,
    /// A file, a directory or a glob, as it is written; relative to the flow.
    Read(String),
    /// A file, as it is written; relative to the run directory.
    Write(String),
    Host(String),
    Command(String),
    /// An argument of a command; it is read if it is a path.
    Argument(String),
    /// An environment variable.
    Variable(String),
}

impl Access {
    /// The access to a data set.
    pub fn of_source(source: &str) -> Self {
        match source.starts_with("hf://") {
            true => Self::Host("huggingface.co".into()),
            false => Self::Read(source.into()),
        }
    }
}

/// The contract of a stage kind: a name, the keys that are inputs, and a check.
pub trait StageKind: Send + Sync {
    fn name(&self) -> &'static str;

    fn inputs(&self) -> &'static [InputKey];

    /// Which results it gives: raised where the kind makes other rows of the same input and keys than it did before,
    /// so that rows of the older form are not taken for rows of the newer one.
    fn results(&self) -> u32 {
        1
    }

    /// Returns whether `template = "none"` is a key of it, for a model without chat template.
    fn takes_plain_text(&self) -> bool {
        false
    }

    /// What a stage of this kind opens, with the key that says so. Asked before the check, which may
    /// already open it. A table among the stage's keys that has the name of a kind, as a gate's `judge`,
    /// is asked of that kind.
    fn opens(&self, _stage: &StageSpec) -> Vec<(&'static str, Access)> {
        Vec::new()
    }

    /// Validates one stage. No model is loaded; files that must exist are looked at.
    fn check<'a>(&'a self, cx: CheckContext<'a>) -> BoxFuture<'a, Result<StagePlan, FlowError>>;
}

/// Stage kinds by name, as loading and planning need them.
pub trait KindLookup: Send + Sync {
    fn kind(&self, name: &str) -> Option<Arc<dyn StageKind>>;

    fn kind_names(&self) -> Vec<&'static str>;
}

/// The keys of a stage with one input.
pub const ONE_INPUT: &[InputKey] = &[InputKey { name: "input", required: true, many: false }];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn adapters() {
        let trainers = BTreeMap::from([
            ("policy".to_owned(), vec!["align".to_owned()]),
            ("both".to_owned(), vec!["warm".to_owned(), "tune".to_owned()]),
        ]);
        let parse = |text: Option<&str>, model: &str| AdapterChoice::parse(text, model, &trainers);
        let previous = |trainer: &str| Ok(AdapterChoice::Previous { trainer: trainer.into() });
        assert_eq!(parse(None, "policy"), previous("align"));
        assert_eq!(parse(None, "other"), Ok(AdapterChoice::Base));
        assert_eq!(parse(Some("previous"), "policy"), previous("align"));
        assert_eq!(parse(Some("base"), "both"), Ok(AdapterChoice::Base));
        assert_eq!(parse(Some("warm.previous"), "both"), previous("warm"));
        assert_eq!(parse(Some("align"), "policy"), Ok(AdapterChoice::Current { trainer: "align".into() }));
        let two_back = AdapterChoice::Earlier { trainer: "align".into(), rounds: 2 };
        assert_eq!(parse(Some("previous:2"), "policy"), Ok(two_back));
        assert_eq!(parse(Some("previous:1"), "policy"), previous("align"));
        assert_eq!(parse(Some("round:2"), "policy"), Ok(AdapterChoice::Round { trainer: "align".into(), round: 2 }));
        for (text, model, expected) in [
            (None, "both", "adapter: `both` is trained by `warm` and `tune`, so the adapter has to be named"),
            (Some("previous"), "other", "adapter: nothing in this flow trains `other`"),
            (Some("round:1"), "both", "adapter: `both` is trained by"),
            (Some("previous:0"), "policy", "adapter: `previous:0` says no number of rounds"),
            (Some("round:0"), "policy", "adapter: `0` is not the number of a round"),
            (Some("allign"), "policy", "adapter: no trainer `allign` trains `policy`\n  help: did you mean `align`?"),
            (Some("align"), "both", "adapter: `align` trains `policy`, not `both`"),
            (
                Some("previos"),
                "policy",
                "adapter: no trainer `previos` trains `policy`\n  help: did you mean `previous`?",
            ),
        ] {
            let error = parse(text, model).expect_err("must fail").to_string();
            assert!(error.starts_with(expected), "{error}");
        }
    }
}
