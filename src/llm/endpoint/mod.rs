//! A chat server that speaks OpenAI's protocol, as a model that answers.
//!
//! | file | noun |
//! |---|---|
//! | [`protocol`] | what is sent and what comes back |
//! | [`addresses`] | where to ask: the addresses of one server, and which of them rest |
//! | [`fault`] | why there is no answer, and whose fault it is |
//! | `refusals` | refusals that are the same for every row |
//!
//! One [`Endpoint`] serves all stages of a run that ask its model, so that the limits on requests in flight
//! and on requests a minute are the model's and not a stage's.

pub mod addresses;
pub mod fault;
pub mod protocol;
mod refusals;

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use chrono::Utc;
use metrics::{Counter, Histogram};
use reqwest::header::{HeaderValue, RETRY_AFTER};
use reqwest::{Client, Response, redirect};
use tokio::sync::{Mutex, Semaphore};

use serde_json::{Map, Value};

use self::addresses::{Addresses, Rest};
use self::fault::{Fault, Reason};
use self::protocol::{Body, Reply, TokenLimit};
use self::refusals::Refusals;
use super::Stream;
use super::request::{Finish, LlmError, Sampling};
use crate::flow::EndpointSpec;
use crate::model::ChatMessage;
use crate::observe::Metrics;

/// Bytes of an answer: far above any context.
const LONGEST_REPLY: usize = 16 << 20;
/// Bytes that are read of what comes with an error.
const LONGEST_COMPLAINT: usize = 16 << 10;
/// A host that takes longer is not there, however long answers may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Servers close a connection that was idle for five seconds or more, and one that is used at that moment
/// fails.
const IDLE_TIMEOUT: Duration = Duration::from_secs(4);

/// A question to an endpoint.
#[derive(Debug, Clone, Copy)]
pub struct ChatRequest<'a> {
    pub messages: &'a [ChatMessage],
    pub tools: Option<&'a Value>,
    /// One an answer; they name the seeds.
    pub streams: &'a [Stream],
    /// `top_k`, `min_p`, `repetition_penalty` and what asks for log-probs are not sent.
    pub sampling: &'a Sampling,
    /// Texts that end an answer.
    pub stop: &'a [String],
}

/// What an endpoint answered; tokens where it says how many there are.
#[derive(Debug, Clone, PartialEq)]
pub struct ChatReply {
    pub prompt_tokens: Option<u64>,
    /// Of all answers.
    pub generation_tokens: Option<u64>,
    /// One a stream.
    pub answers: Vec<ChatAnswer>,
}

#[derive(Debug, Clone, PartialEq)]
pub struct ChatAnswer {
    pub text: String,
    pub finish: Finish,
    pub tokens: Option<u64>,
}

/// A model at a server.
pub struct Endpoint {
    /// The model's name in the flow.
    model: String,
    spec: EndpointSpec,
    system: Option<ChatMessage>,
    client: Client,
    addresses: Addresses,
    permits: Semaphore,
    refusals: Refusals,
    /// The server refused `max_tokens`.
    completion_tokens: AtomicBool,
    /// The server refused `n`: it gives one answer a request.
    one_by_one: AtomicBool,
    /// When the next request may be sent, where there is a limit on requests a minute.
    pace: Option<(Duration, Mutex<Instant>)>,
    metrics: Metrics,
    seconds: Histogram,
}

impl Endpoint {
    /// Opens no connection.
    ///
    /// # Errors
    /// The system's certificates can't be read.
    pub fn new(
        model: &str,
        spec: EndpointSpec,
        system_prompt: Option<&str>,
        metrics: Metrics,
    ) -> Result<Self, LlmError> {
        let client = Client::builder()
            .user_agent(concat!("flowrun/", env!("CARGO_PKG_VERSION")))
            // Whoever allowed this host allowed no other.
            .redirect(redirect::Policy::none())
            .connect_timeout(CONNECT_TIMEOUT)
            .pool_idle_timeout(IDLE_TIMEOUT)
            .timeout(spec.timeout)
            .build()
            .map_err(|e| LlmError::Model(format!("no connection can be made: {}", fault::innermost(&e))))?;
        let gap = spec.requests_per_minute.map(|requests| Duration::from_secs(60) / requests.max(1));
        Ok(Self {
            model: model.to_owned(),
            system: system_prompt.map(|text| ChatMessage::new("system", text)),
            client,
            addresses: Addresses::new(&spec.addresses),
            permits: Semaphore::new(spec.concurrency),
            refusals: Refusals::default(),
            completion_tokens: AtomicBool::new(false),
            one_by_one: AtomicBool::new(false),
            pace: gap.map(|gap| (gap, Mutex::new(Instant::now()))),
            seconds: metrics.histogram("flowrun_endpoint_request_seconds", &[("model", model)]),
            metrics,
            spec,
        })
    }

    /// Requests that may be in flight.
    pub fn concurrency(&self) -> usize {
        self.spec.concurrency
    }

    /// As many answers as there are streams. A server that gives fewer is asked again for the others.
    pub async fn answers(&self, ask: ChatRequest<'_>) -> Result<ChatReply, LlmError> {
        let mut all = ChatReply { prompt_tokens: None, generation_tokens: Some(0), answers: Vec::new() };
        while let Some(missing) = ask.streams.get(all.answers.len()..).filter(|missing| !missing.is_empty()) {
            let reply = self.reply(ask, missing).await?;
            let counted = reply.completion_tokens;
            all.prompt_tokens = all.prompt_tokens.or(reply.prompt_tokens);
            all.generation_tokens = all.generation_tokens.zip(counted).map(|(sum, more)| sum.saturating_add(more));
            // What the server counted is the sum over what it gave.
            let tokens = counted.filter(|_| reply.choices.len() == 1);
            let answers = reply.choices.into_iter().take(missing.len());
            all.answers.extend(answers.map(|c| ChatAnswer { text: c.text, finish: c.finish, tokens }));
        }
        Ok(all)
    }

    /// What is sent: the stage's keys, and over them those of the flow's `body`.
    fn body(&self, ask: ChatRequest<'_>, missing: &[Stream]) -> Result<Map<String, Value>, LlmError> {
        let brings_none = ask.messages.first().is_none_or(|message| message.role != "system");
        let system = self.system.as_ref().filter(|_| brings_none);
        // Greedy answers are all the same, and servers refuse to give several.
        let one = ask.sampling.temperature == 0.0 || self.one_by_one.load(Ordering::Relaxed);
        let count = if one { 1 } else { missing.len() };
        let limit = match self.completion_tokens.load(Ordering::Relaxed) {
            false => TokenLimit::MaxTokens(ask.sampling.max_new_tokens),
            true => TokenLimit::MaxCompletionTokens(ask.sampling.max_new_tokens),
        };
        let body = Body {
            model: &self.spec.name,
            messages: system.into_iter().chain(ask.messages).collect(),
            tools: ask.tools,
            limit,
            temperature: ask.sampling.temperature,
            top_p: Some(ask.sampling.top_p).filter(|p| *p != 1.0),
            presence_penalty: Some(ask.sampling.presence_penalty).filter(|penalty| *penalty != 0.0),
            stop: Some(ask.stop).filter(|stop| !stop.is_empty()),
            n: Some(count).filter(|count| *count > 1),
            seed: missing.first().map_or(0, |stream| stream.seed()),
        };
        let mut all = match serde_json::to_value(body) {
            Ok(Value::Object(all)) => all,
            other => return Err(LlmError::Refused(format!("can't be asked: {other:?}"))),
        };
        let own = &self.spec.body;
        if ["max_tokens", "max_completion_tokens"].iter().any(|key| own.contains_key(*key)) {
            all.retain(|key, _| !key.starts_with("max_"));
        }
        all.extend(own.clone());
        Ok(all)
    }

    /// One reply, asked for until there is one or the retries are spent.
    async fn reply(&self, ask: ChatRequest<'_>, missing: &[Stream]) -> Result<Reply, LlmError> {
        let _permit = self.permits.acquire().await.map_err(|_| LlmError::Cancelled)?;
        let mut retries = 0..self.spec.retries;
        loop {
            let address = self.addresses.take().await;
            self.turn().await;
            let body = self.body(ask, missing)?;
            let settings = settings(&body);
            let began = Instant::now();
            let asked = self.ask(address.url(), Value::Object(body.clone()).to_string().into_bytes()).await;
            self.seconds.record(began.elapsed().as_secs_f64());
            self.count(asked.as_ref().map_or_else(Fault::outcome, |_| "ok"));
            match asked {
                Ok(reply) => {
                    address.succeeded();
                    self.refusals.answered(&settings);
                    return Ok(reply);
                }
                Err(Fault::MaxTokens(message))
                    if body.contains_key("max_tokens") && !self.spec.body.contains_key("max_tokens") =>
                {
                    address.succeeded();
                    tracing::debug!(model = self.model, message, "asked again with max_completion_tokens");
                    self.completion_tokens.store(true, Ordering::Relaxed);
                }
                Err(Fault::Refused(message)) if body.contains_key("n") && fault::refuses_n(&message) => {
                    address.succeeded();
                    tracing::debug!(model = self.model, message, "asked again for one answer a request");
                    self.one_by_one.store(true, Ordering::Relaxed);
                }
                Err(Fault::Refused(message) | Fault::MaxTokens(message)) => {
                    address.succeeded();
                    return Err(match self.refusals.refused(&settings, &message) {
                        true => LlmError::Model(format!(
                            "model {}: {message}; it says so to every row: `body` of the model and the keys of the \
                             stage are what is sent",
                            self.model
                        )),
                        false => LlmError::Refused(message),
                    });
                }
                Err(Fault::Row(message)) => {
                    address.succeeded();
                    return Err(LlmError::Refused(message));
                }
                Err(Fault::User(message)) => return Err(LlmError::Model(format!("model {}: {message}", self.model))),
                Err(Fault::Passing { reason, message, wait }) => {
                    address.failed(match (wait, reason) {
                        (Some(wait), _) => Rest::Asked(wait),
                        (None, Reason::Busy) => Rest::Busy,
                        (None, _) => Rest::Any,
                    });
                    if retries.next().is_none() {
                        return Err(self.given_up(&message));
                    }
                    tracing::debug!(model = self.model, reason = reason.as_str(), message, "asked again");
                    let labels = [("model", self.model.as_str()), ("reason", reason.as_str())];
                    self.metrics.counter("flowrun_endpoint_retries_total", &labels).increment(1);
                }
            }
        }
    }

    fn given_up(&self, last: &str) -> LlmError {
        let times = match self.spec.retries {
            0 => "once".to_owned(),
            retries => format!("{} times", u64::from(retries) + 1),
        };
        LlmError::Unreachable(format!("model {}: asked {times} without an answer; the last time {last}", self.model))
    }

    fn count(&self, outcome: &str) {
        let labels = [("model", self.model.as_str()), ("outcome", outcome)];
        let requests: Counter = self.metrics.counter("flowrun_endpoint_requests_total", &labels);
        requests.increment(1);
    }

    /// Waits until the limit on requests a minute allows one more.
    async fn turn(&self) {
        let Some((gap, next)) = &self.pace else { return };
        let at = {
            let mut next = next.lock().await;
            let at = (*next).max(Instant::now());
            *next = at + *gap;
            at
        };
        tokio::time::sleep_until(at.into()).await;
    }

    async fn ask(&self, url: &reqwest::Url, body: Vec<u8>) -> Result<Reply, Fault> {
        let request = self.client.post(url.clone()).header("content-type", "application/json").body(body);
        let request = self.spec.headers.iter().fold(request, |request, (name, value)| {
            let mut value = HeaderValue::from_str(value.reveal()).unwrap_or(HeaderValue::from_static(""));
            value.set_sensitive(true);
            request.header(name, value)
        });
        let request = match &self.spec.api_key {
            Some(key) => request.bearer_auth(key.reveal()),
            None => request,
        };
        let failed = |e: reqwest::Error| Fault::of_connection(url, &e, self.spec.timeout);
        let response = request.send().await.map_err(failed)?;
        if response.status().is_success() {
            let bytes = read(response, LONGEST_REPLY).await.map_err(failed)?;
            let bytes = bytes
                .ok_or_else(|| Fault::Row(format!("the answer of {url} is longer than {} MiB", LONGEST_REPLY >> 20)))?;
            return protocol::parse(&bytes).map_err(|e| e.at(url, self.spec.secrets()));
        }
        let status = response.status();
        let wait = response
            .headers()
            .get(RETRY_AFTER)
            .and_then(|value| value.to_str().ok())
            .and_then(|value| fault::retry_after(value, Utc::now()));
        // A complaint that breaks off is still one.
        let bytes = read(response, LONGEST_COMPLAINT).await.ok().flatten().unwrap_or_default();
        let complaint = fault::complaint(&bytes, self.spec.secrets());
        Err(Fault::of_status(url, status, &self.spec, &complaint, wait))
    }
}

/// What of a request is the same for every row.
fn settings(body: &Map<String, Value>) -> String {
    let same = body.iter().filter(|(key, _)| !matches!(key.as_str(), "messages" | "seed"));
    same.map(|(key, value)| format!("{key}={value} ")).collect()
}

/// The body, where it has at most `most` bytes.
async fn read(mut response: Response, most: usize) -> Result<Option<Vec<u8>>, reqwest::Error> {
    let mut bytes = Vec::new();
    while let Some(chunk) = response.chunk().await? {
        if bytes.len() + chunk.len() > most {
            return Ok(None);
        }
        bytes.extend_from_slice(&chunk);
    }
    Ok(Some(bytes))
}
