//! A chat server that speaks OpenAI's protocol, as a model that answers.
//!
//! | file | noun |
//! |---|---|
//! | [`protocol`] | what is sent and what comes back |
//! | [`addresses`] | where to ask: the addresses of one server, and which of them rest |
//! | [`fault`] | why there is no answer, and whose fault it is |
//!
//! One [`Endpoint`] serves all stages of a run that ask its model, so that the limits on requests in flight
//! and on requests a minute are the model's and not a stage's.

pub mod addresses;
pub mod fault;
pub mod protocol;

use std::time::{Duration, Instant};

use metrics::{Counter, Histogram};
use reqwest::header::RETRY_AFTER;
use reqwest::{Client, Response, redirect};
use tokio::sync::{Mutex, Semaphore};

use self::addresses::Addresses;
use self::fault::Fault;
use self::protocol::{Body, Reply};
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
            let reply = self.reply(&self.body(ask, missing)).await?;
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

    fn body<'a>(&'a self, ask: ChatRequest<'a>, missing: &[Stream]) -> Body<'a> {
        let brings_none = ask.messages.first().is_none_or(|message| message.role != "system");
        let system = self.system.as_ref().filter(|_| brings_none);
        // Greedy answers are all the same, and servers refuse to give several.
        let count = if ask.sampling.temperature == 0.0 { 1 } else { missing.len() };
        Body {
            model: &self.spec.name,
            messages: system.into_iter().chain(ask.messages).collect(),
            max_tokens: ask.sampling.max_new_tokens,
            temperature: ask.sampling.temperature,
            top_p: Some(ask.sampling.top_p).filter(|p| *p != 1.0),
            presence_penalty: Some(ask.sampling.presence_penalty).filter(|penalty| *penalty != 0.0),
            stop: Some(ask.stop).filter(|stop| !stop.is_empty()),
            n: Some(count).filter(|count| *count > 1),
            seed: missing.first().map_or(0, |stream| stream.seed()),
        }
    }

    /// One reply, asked for until there is one or the retries are spent.
    async fn reply(&self, body: &Body<'_>) -> Result<Reply, LlmError> {
        let body = serde_json::to_vec(body).map_err(|e| LlmError::Refused(format!("can't be asked: {e}")))?;
        let _permit = self.permits.acquire().await.map_err(|_| LlmError::Cancelled)?;
        let mut retries = 0..self.spec.retries;
        loop {
            let address = self.addresses.take().await;
            self.turn().await;
            let began = Instant::now();
            let asked = self.ask(address.url(), body.clone()).await;
            self.seconds.record(began.elapsed().as_secs_f64());
            self.count(asked.as_ref().map_or_else(Fault::outcome, |_| "ok"));
            match asked {
                Ok(reply) => {
                    address.succeeded();
                    return Ok(reply);
                }
                Err(Fault::Row(message)) => {
                    address.succeeded();
                    return Err(LlmError::Refused(message));
                }
                Err(Fault::User(message)) => return Err(LlmError::Model(format!("model {}: {message}", self.model))),
                Err(Fault::Passing { reason, message, wait }) => {
                    address.failed(wait);
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
            return protocol::parse(&bytes).map_err(|e| e.at(url));
        }
        let status = response.status();
        let wait =
            response.headers().get(RETRY_AFTER).and_then(|value| value.to_str().ok()).and_then(fault::retry_after);
        // A complaint that breaks off is still one.
        let bytes = read(response, LONGEST_COMPLAINT).await.ok().flatten().unwrap_or_default();
        let complaint = fault::complaint(&bytes, self.spec.api_key.as_ref());
        Err(Fault::of_status(url, status, &self.spec, &complaint, wait))
    }
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
