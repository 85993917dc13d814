//! What clients ask of a model server, and what they get: plain data.

use std::path::PathBuf;
use std::sync::Arc;

use super::philox::Stream;
use super::stop::StopStrings;
use crate::model::ModelError;
use crate::torch::{DeviceError, TorchError};

/// A LoRA adapter on disk. Two with the same hash are the same adapter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AdapterId {
    /// PEFT directory.
    pub dir: PathBuf,
    /// Hash of its content.
    pub hash: String,
}

/// How tokens are drawn. All applies in transformers' order: repetition penalty, presence penalty,
/// temperature, top-k, top-p, min-p.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampling {
    pub max_new_tokens: usize,
    /// 0 takes the likeliest token.
    pub temperature: f64,
    /// Smallest set of likeliest tokens with this much probability; 1 keeps all.
    pub top_p: f64,
    pub top_k: Option<usize>,
    /// Keeps tokens with at least this share of the likeliest token's probability.
    pub min_p: Option<f64>,
    /// Divides the logits of the prompt's and the answer's tokens that are above 0 and multiplies those
    /// below (CTRL, arXiv:1909.05858; transformers' RepetitionPenaltyLogitsProcessor); 1 is off.
    pub repetition_penalty: f64,
    /// Subtracted from the logits of tokens that the answer has already, however often (OpenAI, vLLM);
    /// 0 is off.
    pub presence_penalty: f64,
    /// Keeps the log-prob of every sampled token.
    pub logprobs: bool,
    /// Goes on past the end of the turn; for benchmarks.
    pub ignore_eos: bool,
}

impl Sampling {
    pub(super) const GREEDY: Self = Self {
        max_new_tokens: 1,
        temperature: 0.0,
        top_p: 1.0,
        top_k: None,
        min_p: None,
        repetition_penalty: 1.0,
        presence_penalty: 0.0,
        logprobs: false,
        ignore_eos: false,
    };

    pub fn greedy(max_new_tokens: usize) -> Self {
        Self { max_new_tokens, ..Self::GREEDY }
    }
}

/// Answers to one prompt. The prompt is computed once, whatever the number of candidates.
#[derive(Debug, Clone)]
pub struct GenerateRequest {
    pub prompt: Vec<u32>,
    /// The random stream of each candidate.
    pub streams: Vec<Stream>,
    pub sampling: Sampling,
    /// Tokens that end an answer.
    pub stop: Vec<u32>,
    /// Whether the prompt is computed in passes of its own, so that nothing depends on what else is asked.
    pub alone: bool,
    /// Texts that end an answer.
    pub stop_strings: Option<Arc<StopStrings>>,
    pub adapter: Option<AdapterId>,
    /// Who asks; for the trace.
    pub stage: String,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Generation {
    pub prompt_tokens: usize,
    /// In the order of the request's streams.
    pub candidates: Vec<Candidate>,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Candidate {
    /// With the token that ended it, where one did; the tokens of a stop string are not there, but for
    /// one that begins in front of it.
    pub ids: Vec<u32>,
    pub finish: Finish,
    /// Bytes of the text of `ids` that are in front of the stop string that ended it.
    pub text_end: Option<usize>,
    /// Sum of the log-probs of `ids`, nats: at temperature 1, before penalties and filters.
    pub logprob: f64,
    /// What `logprob` is the sum of, where [`Sampling::logprobs`] asks for it.
    pub logprobs: Vec<f32>,
}

/// Why an answer ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Finish {
    /// A stop token or a stop string was sampled.
    Stop,
    /// `max_new_tokens` were sampled.
    Length,
    /// The model's context is full.
    Context,
}

impl Finish {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
            Self::Context => "context",
        }
    }
}

/// How a [`ScoreRequest`] goes through the model. In bf16 each way rounds otherwise.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Company {
    /// It may share a pass with others of its stage, which compute what they begin with in common once. Fastest, but
    /// the last bits depend on the company.
    Any,
    /// What is computed depends on nothing else in flight. A trainer of an adapter computes the same numbers.
    Indifferent,
    /// A pass of its own. A trainer of a whole model computes the same numbers.
    Alone,
}

/// Log-probs of given answers after a prompt.
#[derive(Debug, Clone)]
pub struct ScoreRequest {
    pub prompt: Vec<u32>,
    pub answers: Vec<Vec<u32>>,
    pub adapter: Option<AdapterId>,
    pub company: Company,
    pub stage: String,
}

impl ScoreRequest {
    /// Of the prompt and all answers.
    pub fn tokens(&self) -> usize {
        self.prompt.len() + self.answers.iter().map(Vec::len).sum::<usize>()
    }

    /// Whether both may be computed in one pass.
    pub fn shares_with(&self, other: &Self) -> bool {
        self.company == other.company && self.stage == other.stage && self.adapter == other.adapter
    }
}

#[derive(Debug, Clone, PartialEq)]
pub struct Scores {
    /// Log-prob of every token of every answer, nats, float32.
    pub logprobs: Vec<Vec<f32>>,
}

/// Why a request has no answer.
#[derive(Debug, Clone, thiserror::Error)]
pub enum LlmError {
    /// The request's own fault.
    #[error("{tokens} tokens do not fit the model's context of {limit}")]
    TooLong { tokens: usize, limit: usize },
    #[error("the prompt has no tokens")]
    Empty,
    /// Not even alone.
    #[error("{tokens} tokens do not fit the memory of the device")]
    OutOfMemory { tokens: usize },
    /// The model or an adapter can't be used.
    #[error("{0}")]
    Model(String),
    #[error("{0}")]
    Device(String),
    /// An endpoint will not answer this request, however often it is asked.
    #[error("{0}")]
    Refused(String),
    /// An endpoint gives no answers now, or the hub no model.
    #[error("{0}")]
    Unreachable(String),
    #[error("the model server was stopped")]
    Cancelled,
}

impl From<ModelError> for LlmError {
    fn from(error: ModelError) -> Self {
        match error {
            ModelError::Torch(error) => error.into(),
            ModelError::Network(message) => Self::Unreachable(message),
            other => Self::Model(other.to_string()),
        }
    }
}

impl From<TorchError> for LlmError {
    fn from(error: TorchError) -> Self {
        Self::Device(error.to_string())
    }
}

impl From<DeviceError> for LlmError {
    fn from(error: DeviceError) -> Self {
        Self::Device(error.to_string())
    }
}
