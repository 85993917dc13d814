//! `flowrun bench`: how fast a model decodes and scores.

use std::time::Instant;

use serde::Serialize;
use tch::{Device, Kind, Tensor};

use super::models::Client;
use super::philox::{Stream, stream_key};
use super::request::{AdapterId, Company, GenerateRequest, LlmError, Sampling, ScoreRequest};
use crate::torch::TorchError;

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
    /// Sampled tokens a second of the median decode step.
    pub decode_tokens_per_second: f64,
    pub step_ms_p50: f64,
    pub step_ms_p90: f64,
    pub step_ms_p99: f64,
    /// What of the time of the last steps was between them: the server's own work.
    pub between_steps_share: f64,
    pub kv_bytes_per_sequence: usize,
    pub ceilings: Ceilings,
    /// Bytes that a median step has to read (weights, KV cache) a second, as a share of the bandwidth.
    pub decode_bandwidth_share: f64,
    /// Operations of a median step's products a second, as a share of the arithmetic ceiling.
    pub decode_arithmetic_share: f64,
    pub prefill_arithmetic_share: f64,
}

/// What the device reaches with nothing else to do, measured on the spot.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Ceilings {
    /// Reading a tensor much larger than the caches.
    pub gigabytes_per_second: f64,
    /// A square matrix product in the model's dtype.
    pub gigaflops: f64,
}

impl Ceilings {
    /// Best of some tries each.
    pub fn measure(kind: Kind, device: Device) -> Result<Self, TorchError> {
        // Nanoseconds on a GPU are worth large matrices.
        let (side, bytes) = if device == Device::Cpu { (1024, 256 << 20) } else { (8192, 4 << 30) };
        let square = Tensor::f_ones([side, side], (kind, device))?.f_div_scalar(side as f64)?;
        let long = Tensor::f_ones([bytes / 4], (Kind::Float, device))?;
        let best = |work: &dyn Fn() -> Result<Tensor, TorchError>| -> Result<f64, TorchError> {
            let mut best = f64::INFINITY;
            for _ in 0..8 {
                let start = Instant::now();
                // One number read is all work awaited.
                work()?.f_flatten(0, -1)?.f_narrow(0, 0, 1)?.f_to_kind(Kind::Float)?.f_double_value(&[0])?;
                best = best.min(start.elapsed().as_secs_f64());
            }
            Ok(best)
        };
        let product = best(&|| Ok(square.f_matmul(&square)?))?;
        let sum = best(&|| Ok(long.f_sum(Kind::Float)?.f_view([1])?))?;
        Ok(Self {
            gigabytes_per_second: bytes as f64 / sum / 1e9,
            gigaflops: 2.0 * (side as f64).powi(3) / product / 1e9,
        })
    }
}

/// Decodes `concurrency` distinct prompts at once, `new_tokens` each, past every end of turn. The
/// prompts take turns at `adapters`, where there are any.
pub async fn generate(
    client: &Client,
    concurrency: usize,
    new_tokens: usize,
    prompt_tokens: usize,
    adapters: &[AdapterId],
) -> Result<Report, LlmError> {
    client.allow_rows(concurrency).await?;
    let key = stream_key(0, "bench", 0);
    let request = |row: usize, new_tokens: usize| GenerateRequest {
        prompt: prompt(client, row, prompt_tokens),
        streams: vec![Stream { key, row: row as u64, index: 0 }],
        sampling: Sampling { temperature: 1.0, ignore_eos: true, ..Sampling::greedy(new_tokens) },
        stop: Vec::new(),
        stop_strings: None,
        alone: false,
        adapter: (!adapters.is_empty()).then(|| adapters[row % adapters.len()].clone()),
        stage: "bench".into(),
    };
    let all = |new_tokens: usize| {
        futures::future::try_join_all((0..concurrency).map(move |row| client.generate(request(row, new_tokens))))
    };
    // Warm: the first pass of a shape pays for its kernels, and the fourth step of a GPU for its graph.
    all(if client.device().device().is_cuda() { 8 } else { 2 }).await?;
    let start = Instant::now();
    all(1).await?;
    let prefill = start.elapsed().as_secs_f64();
    let start = Instant::now();
    all(new_tokens).await?;
    let seconds = start.elapsed().as_secs_f64();
    let mut steps = client.steps().await?;
    // The last half: nothing but steps with all rows.
    steps.drain(..steps.len().saturating_sub(new_tokens.div_ceil(2)));
    let between = between(&steps);
    let mut steps: Vec<f64> = steps.into_iter().map(|(_, seconds)| seconds).collect();
    steps.sort_by(f64::total_cmp);
    let at = |share: f64| steps.get(((steps.len() as f64 * share) as usize).min(steps.len().saturating_sub(1)));
    let percentile = |share: f64| at(share).copied().unwrap_or(0.0);
    let p50 = percentile(0.5);

    let config = &client.text().pretrained().config;
    let (kind, tokens) = (client.text().kind, prompt_tokens + new_tokens / 2);
    let device = client.device();
    let ceilings = device.quantum("measure", "bench", move |t| Ceilings::measure(kind, t.device())).await??;
    let kv = config.kv_bytes(tokens, kind.elt_size_in_bytes());
    let embeddings = if config.tie_word_embeddings { 0 } else { (config.vocab_size * config.hidden_size) as u64 };
    let weights = (config.parameters() - embeddings) as f64;
    let head = (config.vocab_size * config.hidden_size) as f64;
    let bytes = weights * kind.elt_size_in_bytes() as f64 + (concurrency * kv) as f64;
    let share = |work: f64, seconds: f64, ceiling: f64| work / seconds.max(1e-9) / (ceiling * 1e9);
    let prompts = (concurrency * prompt_tokens) as f64;
    Ok(Report {
        concurrency,
        new_tokens,
        prompt_tokens,
        seconds,
        tokens_per_second: (concurrency * new_tokens) as f64 / seconds,
        prefill_tokens_per_second: prompts / prefill,
        decode_tokens_per_second: if p50 > 0.0 { concurrency as f64 / p50 } else { 0.0 },
        step_ms_p50: p50 * 1e3,
        step_ms_p90: percentile(0.9) * 1e3,
        step_ms_p99: percentile(0.99) * 1e3,
        between_steps_share: between,
        kv_bytes_per_sequence: config.kv_bytes(prompt_tokens + new_tokens, kind.elt_size_in_bytes()),
        ceilings,
        decode_bandwidth_share: share(bytes, p50, ceilings.gigabytes_per_second),
        decode_arithmetic_share: share(2.0 * weights * concurrency as f64, p50, ceilings.gigaflops),
        // The head is for the last token of a prompt only.
        prefill_arithmetic_share: share(
            2.0 * ((weights - head) * prompts + head * concurrency as f64),
            prefill,
            ceilings.gigaflops,
        ),
    })
}

/// The share of the time from the first step's begin to the last one's that was in none of them.
fn between(steps: &[(Instant, f64)]) -> f64 {
    let (Some(((first, _), rest)), Some((last, _))) = (steps.split_first().map(|(f, r)| (*f, r)), steps.last()) else {
        return 0.0;
    };
    let all = last.duration_since(first).as_secs_f64();
    let inside: f64 = steps.iter().take(rest.len()).map(|(_, seconds)| seconds).sum();
    if all > 0.0 { ((all - inside) / all).max(0.0) } else { 0.0 }
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
    pub ceilings: Ceilings,
    /// Operations that every token would need by itself a second, as a share of the arithmetic ceiling: above
    /// what was computed where requests share a beginning.
    pub arithmetic_share: f64,
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
        company: Company::Any,
        stage: "bench".into(),
    };
    // Warm: the first pass of a shape pays for its kernels.
    client.score(request(requests)).await?;
    let start = Instant::now();
    futures::future::try_join_all((0..requests).map(|row| client.score(request(row)))).await?;
    let seconds = start.elapsed().as_secs_f64();
    let (config, kind) = (&client.text().pretrained().config, client.text().kind);
    let device = client.device();
    let ceilings = device.quantum("measure", "bench", move |t| Ceilings::measure(kind, t.device())).await??;
    let tokens = (requests * (prompt_tokens + 2 * answer_tokens)) as f64;
    let head = (config.vocab_size * config.hidden_size) as f64;
    let blocks = config.parameters() as f64 - if config.tie_word_embeddings { head } else { 2.0 * head };
    let operations = 2.0 * (blocks * tokens + head * (requests * 2 * answer_tokens) as f64);
    Ok(ScoreReport {
        requests,
        prompt_tokens,
        answer_tokens,
        seconds,
        requests_per_second: requests as f64 / seconds,
        tokens_per_second: tokens / seconds,
        ceilings,
        arithmetic_share: operations / seconds / (ceilings.gigaflops * 1e9),
    })
}

/// Tokens that no other row has in the same order.
pub fn prompt(client: &Client, row: usize, tokens: usize) -> Vec<u32> {
    let vocabulary = client.text().pretrained().config.vocab_size as u64;
    (0..tokens).map(|i| ((row * 7919 + i * 104_729) as u64 % vocabulary) as u32).collect()
}
