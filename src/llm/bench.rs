//! `flowrun bench`: how fast a model decodes and scores.

use std::time::Instant;

use serde::Serialize;

use super::models::Client;
use super::philox::{Stream, stream_key};
use super::request::{GenerateRequest, LlmError, Sampling, ScoreRequest};

/// What a run of the benchmark measured.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    pub concurrency: usize,
    pub new_tokens: usize,
    pub prompt_tokens: usize,
    pub seconds: f64,
    /// Sampled tokens a second, prefill counted, load not.
    pub tokens_per_second: f64,
    pub prefill_tokens_per_second: f64,
    pub step_ms_p50: f64,
}

/// Decodes `concurrency` distinct prompts at once, `new_tokens` each, past every end of turn.
pub async fn generate(
    client: &Client,
    concurrency: usize,
    new_tokens: usize,
    prompt_tokens: usize,
) -> Result<Report, LlmError> {
    let key = stream_key(0, "bench", 0);
    let request = |row: usize, new_tokens: usize| GenerateRequest {
        prompt: prompt(client, row, prompt_tokens),
        streams: vec![Stream { key, row: row as u64, index: 0 }],
        sampling: Sampling { temperature: 1.0, ignore_eos: true, ..Sampling::greedy(new_tokens) },
        stop: Vec::new(),
        stop_strings: None,
        adapter: None,
        stage: "bench".into(),
    };
    let all = |new_tokens: usize| {
        futures::future::try_join_all((0..concurrency).map(move |row| client.generate(request(row, new_tokens))))
    };
    // Warm: the first pass of a shape pays for its kernels.
    all(2).await?;
    let start = Instant::now();
    all(1).await?;
    let prefill = start.elapsed().as_secs_f64();
    let start = Instant::now();
    all(new_tokens).await?;
    let seconds = start.elapsed().as_secs_f64();
    let mut steps = client.step_seconds().await?;
    steps.drain(..steps.len().saturating_sub(new_tokens.saturating_sub(1)));
    steps.sort_by(f64::total_cmp);
    let p50 = steps.get(steps.len() / 2).copied().unwrap_or(0.0);
    Ok(Report {
        concurrency,
        new_tokens,
        prompt_tokens,
        seconds,
        tokens_per_second: (concurrency * new_tokens) as f64 / seconds,
        prefill_tokens_per_second: (concurrency * prompt_tokens) as f64 / prefill,
        step_ms_p50: p50 * 1e3,
    })
}

/// What scoring measured.
#[derive(Debug, Clone, Serialize)]
pub struct ScoreReport {
    pub requests: usize,
    pub prompt_tokens: usize,
    pub answer_tokens: usize,
    pub seconds: f64,
    pub requests_per_second: f64,
    /// Tokens of prompts and answers.
    pub tokens_per_second: f64,
}

/// Scores two answers of `answer_tokens` to each of `requests` distinct prompts.
pub async fn score(
    client: &Client,
    requests: usize,
    prompt_tokens: usize,
    answer_tokens: usize,
) -> Result<ScoreReport, LlmError> {
    let request = |row: usize| ScoreRequest {
        prompt: prompt(client, row, prompt_tokens),
        answers: vec![prompt(client, row + 1, answer_tokens), prompt(client, row + 2, answer_tokens)],
        adapter: None,
        packed: true,
        stage: "bench".into(),
    };
    // Warm: the first pass of a shape pays for its kernels.
    client.score(request(requests)).await?;
    let start = Instant::now();
    futures::future::try_join_all((0..requests).map(|row| client.score(request(row)))).await?;
    let seconds = start.elapsed().as_secs_f64();
    Ok(ScoreReport {
        requests,
        prompt_tokens,
        answer_tokens,
        seconds,
        requests_per_second: requests as f64 / seconds,
        tokens_per_second: (requests * (prompt_tokens + 2 * answer_tokens)) as f64 / seconds,
    })
}

/// Tokens that no other row has in the same order.
fn prompt(client: &Client, row: usize, tokens: usize) -> Vec<u32> {
    let vocabulary = client.text().pretrained().config.vocab_size as u64;
    (0..tokens).map(|i| ((row * 7919 + i * 104_729) as u64 % vocabulary) as u32).collect()
}
