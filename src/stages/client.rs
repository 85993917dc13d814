//! What the stages share that ask a model: the keys that name it, the device it is on, errors.

use std::any::Any;
use std::sync::Arc;

use tokio::sync::OnceCell;

use super::rows::RowError;
use crate::canonical_fields;
use crate::engine::{AdapterRef, StageContext, StageError};
use crate::flow::device::Devices;
use crate::flow::kind::{AdapterChoice, CheckContext, ModelUse, StagePlan};
use crate::flow::{Canonical, FlowError, Form};
use crate::llm::{AdapterId, Client, LlmError, Models, TextModel, keeps_requests_apart};

/// The model, device and adapter of a client stage, checked. An endpoint has neither device nor adapter.
pub fn model_use(
    cx: &CheckContext<'_>,
    model: &str,
    devices: &Devices,
    adapter: Option<&str>,
) -> Result<ModelUse, FlowError> {
    if cx.model(model)?.endpoint.is_some() {
        if let Some(key) = ["device", "adapter"].into_iter().find(|key| cx.stage.options.contains_key(*key)) {
            let message = format!("means nothing here: `{model}` answers at an endpoint");
            return Err(cx.error(key, message).help("leave it out, or name a model with a source"));
        }
        return Ok(ModelUse {
            model: model.to_owned(),
            devices: Vec::new(),
            adapter: AdapterChoice::Base,
            chat: false,
        });
    }
    let (devices, adapter) = (cx.devices(devices)?, cx.adapter(adapter, model)?);
    Ok(ModelUse { model: model.to_owned(), devices, adapter, chat: true })
}

/// Refuses a model at an endpoint; `why` completes "a chat server ...".
pub fn refuse_endpoint(cx: &CheckContext<'_>, model: &str, key: &str, why: &str) -> Result<(), FlowError> {
    match &cx.model(model)?.endpoint {
        None => Ok(()),
        Some(_) => Err(cx
            .error(key, format!("`{model}` answers at an endpoint, and a chat server {why}"))
            .help("name a model with a source, which is loaded here")),
    }
}

/// The options that a kind put into its plan.
pub fn options<T: Any + Send + Sync>(plan: &StagePlan) -> Result<Arc<T>, StageError> {
    plan.options.clone().downcast().map_err(|_| StageError::internal("a stage was opened with another kind's plan"))
}

/// A model that is loaded when it is first asked, so that a stage whose rows are all in its journal
/// loads nothing.
pub struct LazyClient {
    models: Arc<Models>,
    model: String,
    device: String,
    client: OnceCell<Client>,
}

impl LazyClient {
    /// Says so where `deterministic = true` can't be kept to the bit.
    pub fn warn_if_not_deterministic(&self, stage: &str) {
        if !keeps_requests_apart(&self.device) {
            let device = &self.device;
            tracing::warn!(
                stage,
                "answers on {device} may change with what is asked beside them, deterministic or not"
            );
        }
    }

    /// `role` breaks ties of `device = "auto"`; see [`Models::place`].
    pub fn new(models: Arc<Models>, model: &ModelUse, role: crate::llm::Role) -> Self {
        let wanted = model.devices.first().map_or("auto", String::as_str);
        Self::on(models, &model.model, wanted, role)
    }

    /// On one device of several.
    pub fn on(models: Arc<Models>, model: &str, device: &str, role: crate::llm::Role) -> Self {
        let device = models.place(device, role);
        Self { models, model: model.to_owned(), device, client: OnceCell::new() }
    }

    pub async fn get(&self) -> Result<&Client, StageError> {
        self.client.get_or_try_init(|| self.models.client(&self.model, &self.device)).await.map_err(stage_error)
    }
}

/// Tokenizer, template and content hash of a model, without its weights.
pub async fn text(models: &Models, model: &ModelUse) -> Result<Arc<TextModel>, StageError> {
    models.text(&model.model).await.map_err(stage_error)
}

/// Everything that decides the rows of a client stage beside its input: same key, same rows.
pub struct Content<'a> {
    /// As the plan has it.
    pub fingerprint: &'a Form,
    pub stage: &'a str,
    pub round: u32,
    pub seed: u64,
    pub deterministic: bool,
    /// The identity of the model.
    pub model: Form,
    /// The hash of the adapter's content.
    pub adapter: Option<&'a String>,
}

canonical_fields!(Content<'_> { fingerprint, stage, round, seed, deterministic, model, adapter } without {});

/// The key of [`Content`].
pub fn content_key(ctx: &StageContext, fingerprint: &Form, model: &TextModel, adapter: Option<&AdapterRef>) -> String {
    key_of(ctx, fingerprint, model.hash.form(), adapter.map(|a| &a.hash))
}

/// [`content_key`] of a model and an adapter that are known by these.
pub fn key_of(ctx: &StageContext, fingerprint: &Form, model: Form, adapter: Option<&String>) -> String {
    let (stage, round, seed, deterministic) = (ctx.stage.as_str(), ctx.round, ctx.seed, ctx.deterministic);
    Content { fingerprint, stage, round, seed, deterministic, model, adapter }.form().key()
}

pub fn adapter_id(adapter: AdapterRef) -> AdapterId {
    AdapterId { dir: adapter.dir, hash: adapter.hash }
}

/// What a model could not do for a stage.
pub fn stage_error(error: LlmError) -> StageError {
    match error {
        LlmError::Model(message) => StageError::user(message),
        LlmError::Cancelled => StageError::cancelled(),
        other => StageError::external(other.to_string()),
    }
}

/// What a model could not do for one row.
pub fn row_error(error: LlmError) -> RowError {
    match error {
        LlmError::TooLong { .. } | LlmError::Empty | LlmError::OutOfMemory { .. } | LlmError::Refused(_) => {
            RowError::DeadLetter(error.to_string())
        }
        other => RowError::Stage(stage_error(other)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_part_of_the_content_is_in_its_key() {
        let (plain, other) = (Form::table([("keys", 1_u32.form())]), Form::table([("keys", 2_u32.form())]));
        let hash = "hash".to_owned();
        let content = || Content {
            fingerprint: &plain,
            stage: "sample",
            round: 1,
            seed: 7,
            deterministic: false,
            model: "model".form(),
            adapter: None,
        };
        let changed = [
            content(),
            Content { fingerprint: &other, ..content() },
            Content { stage: "judge", ..content() },
            Content { round: 2, ..content() },
            Content { seed: 8, ..content() },
            Content { deterministic: true, ..content() },
            Content { model: "other".form(), ..content() },
            Content { adapter: Some(&hash), ..content() },
        ];
        let keys: std::collections::BTreeSet<String> = changed.iter().map(|content| content.form().key()).collect();
        assert_eq!(keys.len(), changed.len());
    }
}
