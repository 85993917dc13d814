//! The judges of a stage: one model, or several that are asked the same.

use std::sync::Arc;

use futures::future::try_join_all;
use serde_json::json;

use crate::engine::{StageContext, StageError, TokenCounter};
use crate::flow::kind::ModelUse;
use crate::llm::{
    AdapterId, Company, GenerateRequest, Models, Role, Sampling, ScoreRequest, Stream, TextModel, stream_key,
};
use crate::model::chat::ChatMessage;
use crate::stages::client::{self, LazyClient};
use crate::stages::rows::RowError;

/// Questions that one judge is asked about one row draw from this many random streams at most.
const STREAMS: u32 = 1 << 16;

/// Everything that questions need; shared by the rows in flight.
pub struct Panel {
    judges: Vec<Judge>,
    /// Answers don't depend on what else is asked.
    apart: bool,
    /// Names the random streams of the stage in the round.
    pub key: u64,
    stage: String,
    tokens: TokenCounter,
    /// What the answers follow from, hashed.
    pub content_key: String,
}

struct Judge {
    client: LazyClient,
    text: Arc<TextModel>,
    adapter: Option<AdapterId>,
}

impl Panel {
    /// Waits for the adapters; loads no weights.
    pub async fn open(
        ctx: &StageContext,
        models: &Arc<Models>,
        members: &[ModelUse],
        fingerprint: &serde_json::Value,
    ) -> Result<Self, StageError> {
        let mut judges = Vec::with_capacity(members.len());
        let mut keys = Vec::with_capacity(members.len());
        for member in members {
            let adapter = ctx.adapter(&member.adapter).await?;
            let text = client::text(models, member).await?;
            keys.push(client::content_key(ctx, fingerprint, &text, adapter.as_ref()));
            let client = LazyClient::new(models.clone(), member, Role::Judge);
            if ctx.deterministic {
                client.warn_if_not_deterministic(&ctx.stage);
            }
            judges.push(Judge { client, text, adapter: adapter.map(client::adapter_id) });
        }
        let content_key = match keys.as_slice() {
            [only] => only.clone(),
            several => blake3::hash(json!(several).to_string().as_bytes()).to_hex().to_string(),
        };
        Ok(Self {
            judges,
            apart: ctx.deterministic,
            key: stream_key(ctx.seed, &ctx.stage, ctx.round),
            stage: ctx.stage.clone(),
            tokens: ctx.token_counter(),
            content_key,
        })
    }

    pub fn len(&self) -> u32 {
        self.judges.len() as u32
    }

    /// What judge number `judge` answers to a conversation, once for every one of `samples`, which are places among
    /// the row's questions.
    pub async fn write(
        &self,
        judge: u32,
        row: u64,
        conversation: &[ChatMessage],
        samples: std::ops::Range<u32>,
        sampling: Sampling,
    ) -> Result<Vec<String>, RowError> {
        let Judge { client, text, adapter } = self.judge(judge)?;
        let request = GenerateRequest {
            prompt: encode(text, conversation)?,
            streams: samples.map(|index| Stream { key: self.key, row, index: judge * STREAMS + index }).collect(),
            sampling,
            stop: text.stop_ids().to_vec(),
            stop_strings: None,
            alone: self.apart,
            adapter: adapter.clone(),
            stage: self.stage.clone(),
        };
        let made = client.get().await?.generate(request).await.map_err(client::row_error)?;
        let written = made.candidates.iter().map(|c| c.ids.len() as u64).sum();
        self.tokens.add(made.prompt_tokens as u64, written);
        let decode = |ids: &[u32]| text.decode(ids).map_err(|e| RowError::DeadLetter(e.to_string()));
        made.candidates.iter().map(|c| decode(&c.ids)).collect()
    }

    /// Log-probs of `labels` as what judge number `judge` answers, nats.
    pub async fn weigh(&self, judge: u32, question: &str, labels: &[String]) -> Result<Vec<f64>, RowError> {
        let Judge { client, text, adapter } = self.judge(judge)?;
        let answers: Result<Vec<_>, _> = labels.iter().map(|label| text.encode(label)).collect();
        let request = ScoreRequest {
            prompt: encode(text, &[ChatMessage::new("user", question)])?,
            answers: answers.map_err(|e| RowError::DeadLetter(e.to_string()))?,
            adapter: adapter.clone(),
            company: if self.apart { Company::Indifferent } else { Company::Any },
            stage: self.stage.clone(),
        };
        let read = request.tokens() as u64;
        let scores = client.get().await?.score(request).await.map_err(client::row_error)?;
        self.tokens.add(read, 0);
        let sum = |i: usize| scores.logprobs.get(i).map_or(f64::NAN, |l| l.iter().map(|p| f64::from(*p)).sum());
        Ok((0..labels.len()).map(sum).collect())
    }

    /// What `ask` gives of every judge, in their order.
    pub async fn each<T, F: Future<Output = Result<T, RowError>>>(
        &self,
        ask: impl FnMut(u32) -> F,
    ) -> Result<Vec<T>, RowError> {
        try_join_all((0..self.len()).map(ask)).await
    }

    fn judge(&self, index: u32) -> Result<&Judge, RowError> {
        let judge = self.judges.get(index as usize);
        judge.ok_or_else(|| RowError::Stage(StageError::internal("a judge that is not there was asked")))
    }
}

fn encode(text: &TextModel, conversation: &[ChatMessage]) -> Result<Vec<u32>, RowError> {
    text.encode_chat(conversation).map_err(|e| RowError::DeadLetter(e.to_string()))
}
