//! Who answers a stage's questions: a model on a device here, or a chat server.

use std::sync::Arc;

use super::client::{self, LazyClient};
use super::rows::RowError;
use super::trainer::Template;
use crate::engine::{StageContext, StageError};
use crate::flow::kind::ModelUse;
use crate::flow::{Canonical, Form};
use crate::judge::verdict::{End, Said};
use crate::llm::endpoint::{ChatAnswer, ChatRequest};
use crate::llm::{
    AdapterId, Candidate, Endpoint, Finish, GenerateRequest, Models, Role, Sampling, StopStrings, Stream, TextModel,
};
use crate::model::Conversation;

/// The model of a stage, with the adapter of its round.
pub enum Answerer {
    Local(Box<Local>),
    Endpoint {
        server: Arc<Endpoint>,
        /// What its answers are known by: the server tells no content.
        identity: Form,
    },
}

/// How a prompt becomes tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Prompting {
    pub template: Template,
    /// Sets if a prompt without template begins with the begin-of-text token; `None` leaves it to the tokenizer.
    pub add_bos: Option<bool>,
}

/// A model that is loaded here.
pub struct Local {
    pub client: LazyClient,
    pub text: Arc<TextModel>,
    pub adapter: Option<AdapterId>,
    /// How prompts become tokens: by the chat template unless [`Answerer::asking`] says another way.
    prompting: Prompting,
    /// Whether what is asked goes through the model by itself (`deterministic = true`).
    pub alone: bool,
    stage: String,
}

/// Where answers end beside the model's own end of turn.
pub struct Stops {
    strings: Vec<String>,
    /// Of a local model: all tokens that end an answer.
    ids: Vec<u32>,
    /// The strings with the decoder of a local model.
    found: Option<Arc<StopStrings>>,
}

/// A conversation that is to be answered, once for each stream.
pub struct Ask<'a> {
    pub conversation: Conversation<'a>,
    pub sampling: &'a Sampling,
    pub stops: &'a Stops,
    pub streams: Vec<Stream>,
}

/// What is not known of an endpoint's answer is none.
pub struct Answers {
    pub prompt_tokens: Option<u64>,
    /// Of all answers.
    pub generation_tokens: Option<u64>,
    /// In the order of the streams.
    pub answers: Vec<Answer>,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Answer {
    /// Without special tokens, and without the stop string that ended it.
    pub text: String,
    pub ids: Option<Vec<u32>>,
    pub finish: &'static str,
    pub tokens: Option<u64>,
    pub logprob: Option<f64>,
    /// Where they were asked for.
    pub logprobs: Vec<f32>,
}

impl Answer {
    /// As what a judge wrote.
    pub fn said(&self) -> Said<'_> {
        let end = if self.finish == Finish::Stop.as_str() { End::Finished } else { End::Cut };
        Said { text: &self.text, end }
    }
}

impl Answerer {
    /// The model that `model` names, not loaded yet, with its adapter, which may have to be waited for.
    /// `role` breaks ties of `device = "auto"`.
    pub async fn open(
        ctx: &StageContext,
        models: &Arc<Models>,
        model: &ModelUse,
        role: Role,
    ) -> Result<Self, StageError> {
        if let Some(server) = models.endpoint(&model.model).map_err(client::stage_error)? {
            if ctx.deterministic {
                tracing::warn!(stage = ctx.stage, "an endpoint's answers may change, deterministic or not");
            }
            let identity = models.form(&model.model);
            return Ok(Self::Endpoint { server, identity });
        }
        let adapter = ctx.adapter(&model.adapter).await?.map(client::adapter_id);
        let text = client::text(models, model).await?;
        let client = LazyClient::new(models.clone(), model, role);
        if ctx.deterministic {
            client.warn_if_not_deterministic(&ctx.stage);
        }
        let (prompting, alone, stage) = (Prompting::default(), ctx.deterministic, ctx.stage.clone());
        Ok(Self::Local(Box::new(Local { client, text, adapter, prompting, alone, stage })))
    }

    /// The same, asked in another way; an endpoint has its own.
    #[must_use]
    pub fn asking(self, prompting: Prompting) -> Self {
        match self {
            Self::Local(local) => Self::Local(Box::new(Local { prompting, ..*local })),
            endpoint => endpoint,
        }
    }

    /// The parts of a local model, for what an endpoint can't be asked.
    pub fn local(&self) -> Option<&Local> {
        match self {
            Self::Local(local) => Some(local),
            Self::Endpoint { .. } => None,
        }
    }

    /// [`client::content_key`] of a stage that asks this model.
    pub fn content_key(&self, ctx: &StageContext, fingerprint: &Form) -> String {
        match self {
            Self::Local(local) => {
                client::key_of(ctx, fingerprint, local.text.hash.form(), local.adapter.as_ref().map(|a| &a.hash))
            }
            Self::Endpoint { identity, .. } => client::key_of(ctx, fingerprint, identity.clone(), None),
        }
    }

    /// As many source rows in flight as keep the model busy: `usual` for one that is here.
    pub fn window(&self, usual: usize) -> usize {
        match self {
            Self::Local(_) => usual,
            Self::Endpoint { server, .. } => usual.max(server.concurrency().saturating_mul(2)),
        }
    }

    /// Ends of answers: `strings`, and `ids` of a local model's vocabulary.
    ///
    /// # Errors
    /// A token that the model does not have.
    pub fn stops(&self, strings: &[String], ids: &[u32]) -> Result<Stops, StageError> {
        let strings = strings.to_vec();
        let Self::Local(local) = self else { return Ok(Stops { strings, ids: Vec::new(), found: None }) };
        let vocabulary = local.text.pretrained().config.vocab_size;
        if let Some(id) = ids.iter().find(|id| **id as usize >= vocabulary) {
            return Err(StageError::user(format!(
                "stop_token_ids has {id}, and the model's vocabulary ends at {}; take it out or correct it",
                vocabulary.saturating_sub(1)
            )));
        }
        let text = local.text.clone();
        // What can't be decoded fails where the answer is.
        let decode = move |ids: &[u32]| text.decode(ids).unwrap_or_default();
        let found = (!strings.is_empty()).then(|| Arc::new(StopStrings::new(strings.clone(), decode)));
        let own = match local.prompting.template {
            Template::Chat => local.text.stop_ids(),
            Template::None => local.text.text_stop_ids(),
        };
        let ids = own.iter().chain(ids).copied().collect();
        Ok(Stops { strings, ids, found })
    }

    /// An answer for each stream.
    pub async fn answers(&self, ask: Ask<'_>) -> Result<Answers, RowError> {
        match self {
            Self::Local(local) => local.answers(ask).await,
            Self::Endpoint { server, .. } => {
                let Ask { conversation: Conversation { messages, tools }, sampling, stops, streams } = ask;
                let request = ChatRequest { messages, tools, streams: &streams, sampling, stop: &stops.strings };
                let reply = server.answers(request).await.map_err(client::row_error)?;
                Ok(Answers {
                    prompt_tokens: reply.prompt_tokens,
                    generation_tokens: reply.generation_tokens,
                    answers: reply.answers.into_iter().map(Answer::from).collect(),
                })
            }
        }
    }
}

impl Local {
    async fn answers(&self, ask: Ask<'_>) -> Result<Answers, RowError> {
        let prompt = self.prompt(ask.conversation)?;
        let request = GenerateRequest {
            prompt,
            streams: ask.streams,
            sampling: ask.sampling.clone(),
            stop: ask.stops.ids.clone(),
            stop_strings: ask.stops.found.clone(),
            alone: self.alone,
            adapter: self.adapter.clone(),
            stage: self.stage.clone(),
        };
        let made = self.client.get().await?.generate(request).await.map_err(client::row_error)?;
        let answers = made.candidates.into_iter().map(|c| self.answer(c)).collect::<Result<Vec<_>, _>>()?;
        Ok(Answers {
            prompt_tokens: Some(made.prompt_tokens as u64),
            generation_tokens: Some(answers.iter().filter_map(|a| a.tokens).sum()),
            answers,
        })
    }

    /// The tokens of a prompt.
    ///
    /// # Errors
    /// A dead letter where the template refuses it.
    pub fn prompt(&self, conversation: Conversation<'_>) -> Result<Vec<u32>, RowError> {
        encode(&self.text, self.prompting, conversation)
    }

    fn answer(&self, made: Candidate) -> Result<Answer, RowError> {
        let mut text = self.text.decode(&made.ids).map_err(|e| RowError::DeadLetter(e.to_string()))?;
        if let Some(end) = made.text_end.filter(|end| text.is_char_boundary(*end)) {
            text.truncate(end);
        }
        Ok(Answer {
            text,
            tokens: Some(made.ids.len() as u64),
            ids: Some(made.ids),
            finish: made.finish.as_str(),
            logprob: Some(made.logprob),
            logprobs: made.logprobs,
        })
    }
}

/// The tokens of a prompt to a model.
///
/// # Errors
/// A dead letter where the template refuses it, or is none and the prompt has several turns.
pub fn encode(text: &TextModel, prompting: Prompting, conversation: Conversation<'_>) -> Result<Vec<u32>, RowError> {
    let encoded = match (prompting.template, conversation.messages) {
        (Template::Chat, _) => text.encode_chat(conversation),
        (Template::None, [only]) if only.role == "user" => text.encode_text(&only.content, prompting.add_bos),
        (Template::None, _) => {
            let message = "the prompt is a conversation, which template = \"none\" can't render; leave `template` out";
            return Err(RowError::DeadLetter(message.into()));
        }
    };
    encoded.map_err(|e| RowError::DeadLetter(e.to_string()))
}

impl From<ChatAnswer> for Answer {
    fn from(answer: ChatAnswer) -> Self {
        Self {
            text: answer.text,
            ids: None,
            finish: answer.finish.as_str(),
            tokens: answer.tokens,
            logprob: None,
            logprobs: Vec::new(),
        }
    }
}
