//! The judges of a stage: one model, or several that are asked the same.

use std::sync::Arc;

use crate::engine::{StageContext, StageError, TokenCounter};
use crate::flow::kind::ModelUse;
use crate::flow::{Canonical, Form};
use crate::llm::{Company, Models, Role, Sampling, ScoreRequest, Stream, stream_key};
use crate::model::ModelError;
use crate::model::chat::{ChatMessage, Conversation};
use crate::stages::answerer::{Answer, Answerer, Ask, Stops};
use crate::stages::client;
use crate::stages::rows::RowError;
use futures::future::try_join_all;

/// Questions that one judge is asked about one row draw from this many random streams at most.
const STREAMS: u32 = 1 << 16;

/// Everything that questions need; shared by the rows in flight.
pub struct Panel {
    judges: Vec<Judge>,
    /// Names the random streams of the stage in the round.
    pub key: u64,
    stage: String,
    tokens: TokenCounter,
    /// What the answers follow from, hashed.
    pub content_key: String,
}

struct Judge {
    answerer: Answerer,
    stops: Stops,
}

impl Panel {
    /// Waits for the adapters; loads no weights.
    pub async fn open(
        ctx: &StageContext,
        models: &Arc<Models>,
        members: &[ModelUse],
        fingerprint: &Form,
    ) -> Result<Self, StageError> {
        let mut judges = Vec::with_capacity(members.len());
        for member in members {
            let answerer = Answerer::open(ctx, models, member, Role::Judge).await?;
            judges.push(Judge { stops: answerer.stops(&[], &[])?, answerer });
        }
        let keys: Vec<String> = judges.iter().map(|j| j.answerer.content_key(ctx, fingerprint)).collect();
        let content_key = match keys.as_slice() {
            [only] => only.clone(),
            several => several.form().key(),
        };
        Ok(Self {
            judges,
            key: stream_key(ctx.seed, &ctx.stage, ctx.round),
            stage: ctx.stage.clone(),
            tokens: ctx.token_counter(),
            content_key,
        })
    }

    pub fn len(&self) -> u32 {
        self.judges.len() as u32
    }

    /// As many source rows in flight as keep all of them busy.
    pub fn window(&self, usual: usize) -> usize {
        self.judges.iter().map(|j| j.answerer.window(usual)).max().unwrap_or(usual)
    }

    /// What judge number `judge` answers to a conversation, once for every one of `samples`, which are places among
    /// the row's questions.
    pub async fn write(
        &self,
        judge: u32,
        row: u64,
        conversation: Conversation<'_>,
        samples: std::ops::Range<u32>,
        sampling: Sampling,
    ) -> Result<Vec<Answer>, RowError> {
        let Judge { answerer, stops } = self.judge(judge)?;
        let ask = Ask {
            conversation,
            sampling: &sampling,
            stops,
            streams: samples.map(|index| Stream { key: self.key, row, index: judge * STREAMS + index }).collect(),
        };
        let made = answerer.answers(ask).await?;
        self.tokens.add(made.prompt_tokens.unwrap_or(0), made.generation_tokens.unwrap_or(0));
        Ok(made.answers)
    }

    /// Log-probs of `labels` as what judge number `judge` answers, nats.
    pub async fn weigh(&self, judge: u32, question: &str, labels: &[String]) -> Result<Vec<f64>, RowError> {
        let local = self.judge(judge)?.answerer.local();
        let local = local.ok_or_else(|| StageError::internal("an endpoint has no logits"))?;
        let dead = |e: ModelError| RowError::DeadLetter(e.to_string());
        let question = [ChatMessage::new("user", question)];
        let (prompt, answers) = local.text.encode_answers(&question, labels).map_err(dead)?;
        let request = ScoreRequest {
            prompt,
            answers: told_apart(answers, local.text.stop_ids()),
            adapter: local.adapter.clone(),
            // Verdicts may be read in shared passes.
            company: if local.alone { Company::Indifferent } else { Company::Any },
            stage: self.stage.clone(),
        };
        let read = request.tokens() as u64;
        let scores = local.client.get().await?.score(request).await.map_err(client::row_error)?;
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

/// Labels as tokens. Where one begins another, as "1" begins "10", all go on to the end of the answer: the probability
/// of the tokens of "1" is that of "10" too.
fn told_apart(labels: Vec<Vec<u32>>, stop_ids: &[u32]) -> Vec<Vec<u32>> {
    let begins =
        |i: usize, label: &[u32]| labels.iter().enumerate().any(|(j, other)| i != j && other.starts_with(label));
    let one_begins_another = labels.iter().enumerate().any(|(i, label)| begins(i, label));
    let end = stop_ids.first().filter(|_| one_begins_another);
    labels.into_iter().map(|label| label.into_iter().chain(end.copied()).collect()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_label_that_begins_another_is_scored_to_its_end() {
        let told = |labels: &[&[u32]]| told_apart(labels.iter().map(|l| l.to_vec()).collect(), &[9, 8]);
        assert_eq!(told(&[&[1], &[1, 0], &[2]]), [vec![1, 9], vec![1, 0, 9], vec![2, 9]]);
        assert_eq!(told(&[&[5, 1], &[5, 2]]), [vec![5, 1], vec![5, 2]]);
        assert_eq!(told(&[&[7], &[10]]), [vec![7], vec![10]], "\"1\" and \"10\" of one token each");
    }
}
