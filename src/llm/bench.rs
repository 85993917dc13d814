//! `flowrun bench generate`: how fast a model decodes.

use std::time::Instant;

use serde::Serialize;

use super::models::Client;
use super::philox::{Stream, stream_key};
use super::request::{GenerateRequest, LlmError, Sampling};

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
pub async fn generate(client: &Client, concurrency: usize, new_tokens: usize, prompt_tokens: usize) -> Result<Report, LlmError> {
    let vocabulary = client.text().pretrained().config.vocab_size as u64;
    let key = stream_key(0, "bench", 0);
    let request = |row: usize, new_tokens: usize| GenerateRequest {
        prompt: (0..prompt_tokens).map(|i| ((row * 7919 + i * 104_729) as u64 % vocabulary) as u32).collect(),
        streams: vec![Stream { key, row: row as u64, index: 0 }],
        sampling: Sampling { temperature: 1.0, ignore_eos: true, ..Sampling::greedy(new_tokens) },
        stop: Vec::new(),
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
    let steps = new_tokens.saturating_sub(1).max(1) as f64;
    Ok(Report {
        concurrency,
        new_tokens,
        prompt_tokens,
        seconds,
        tokens_per_second: (concurrency * new_tokens) as f64 / seconds,
        prefill_tokens_per_second: (concurrency * prompt_tokens) as f64 / prefill,
        step_ms_p50: (seconds - prefill).max(0.0) * 1e3 / steps,
    })
}
