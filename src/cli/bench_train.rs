//! `flowrun bench train`: pairs trained a second, their reference scored first.

use std::time::Instant;

use serde::Serialize;

use super::Failure;
use flowrun::llm::bench::{Ceilings, prompt};
use flowrun::llm::{Client, Company, ScoreRequest};
use flowrun::model::{Config, Lora, LoraConfig};
use flowrun::observe::process;
use flowrun::torch::Tenants;
use flowrun::train::{AdamW, Loss, Objective, Pair, Subject, TrainError, Trainer, pass_tokens};

/// Pairs of an optimizer step; four times as many on a GPU, whose passes hold more.
const STEP: usize = 8;
const TENANT: &str = "bench train";

/// What training measured.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    pub pairs: usize,
    pub prompt_tokens: usize,
    pub answer_tokens: usize,
    pub reference_seconds: f64,
    pub train_seconds: f64,
    /// Reference included.
    pub pairs_per_second: f64,
    /// Tokens of prompts and answers trained a second, the reference not counted.
    pub train_tokens_per_second: f64,
    pub ceilings: Ceilings,
    /// Operations of forward and backward through the frozen matrices a second, for every token of prompts and
    /// answers, as a share of the arithmetic ceiling.
    pub train_arithmetic_share: f64,
    pub peak_rss_bytes: u64,
}

/// Scores and trains `count` distinct pairs once: rank 8 on all linear layers, [`STEP`] pairs a step, at most
/// `pass_tokens` tokens a pass.
pub async fn train(
    client: &Client,
    count: usize,
    prompt_tokens: usize,
    answer_tokens: usize,
    tokens: Option<usize>,
) -> Result<Report, Failure> {
    let wrong = |e: &dyn std::fmt::Display| Failure::Wrong(e.to_string());
    let pair = |row: usize| Pair {
        row: row as u64,
        ordinal: 0,
        prompt: prompt(client, row, prompt_tokens),
        chosen: prompt(client, 3 * row + 1, answer_tokens),
        rejected: prompt(client, 3 * row + 2, answer_tokens),
        reference: [0.0; 2],
        label: 1.0,
        weight: 1.0,
        offset: 0.0,
    };
    let (device, config) = (client.device(), client.text().pretrained().config.clone());
    let gpu = device.device().is_cuda();
    let company = if gpu { Company::Any } else { Company::Indifferent };
    let (step, pass_tokens) =
        (if gpu { 4 * STEP } else { STEP }, tokens.unwrap_or_else(|| pass_tokens(device.device())));
    let (model, shape) = (client.transformer().await.map_err(|e| wrong(&e))?, config.clone());
    let build = move |tenants: &mut Tenants| -> Result<(), TrainError> {
        let lora = Lora::fresh(LoraConfig::default(), &shape, 0, model.device())?;
        let terms = vec![(Loss::Sigmoid, 1.0)];
        let objective = Objective { terms, beta: 0.1, label_smoothing: 0.0, gamma: 0.0, ld_alpha: 1.0 };
        let optimizer = AdamW { weight_decay: 0.0, max_grad_norm: 1.0 };
        tenants.insert(
            TENANT.to_owned(),
            Trainer::new(model, Subject::Adapter { lora, frozen: None }, objective, optimizer, true)?,
        );
        Ok(())
    };
    device.quantum("load", TENANT, build).await.map_err(|e| wrong(&e))?.map_err(|e| wrong(&e))?;

    let reference = async |mut pairs: Vec<Pair>| {
        let request = |pair: &Pair| ScoreRequest {
            prompt: pair.prompt.clone(),
            answers: vec![pair.chosen.clone(), pair.rejected.clone()],
            adapter: None,
            company,
            stage: "bench".into(),
        };
        let scores = futures::future::try_join_all(pairs.iter().map(|pair| client.score(request(pair)))).await;
        for (pair, scores) in pairs.iter_mut().zip(scores.map_err(|e| wrong(&e))?) {
            pair.reference = pair.sums(&scores.logprobs.concat(), 1.0);
        }
        Ok::<_, Failure>(pairs)
    };
    let learn = async |pairs: Vec<Pair>, rate: f64| {
        for step in pairs.chunks(step) {
            let micro_batches: Vec<Vec<Pair>> = step.iter().map(|pair| vec![pair.clone()]).collect();
            let run = move |tenants: &mut Tenants| match tenants.get::<Trainer>(TENANT) {
                Some(trainer) => trainer.accumulate(&micro_batches, pass_tokens).and_then(|()| trainer.step(rate)),
                None => Err(TrainError::Device("the trainer is not on its device any more".into())),
            };
            let made = device.quantum("train", TENANT, run).await.map_err(|e| wrong(&e))?;
            made.map_err(|e| wrong(&e))?;
        }
        Ok::<_, Failure>(())
    };
    // Warm: the first pass of a shape pays for its kernels.
    let warm = reference((0..step.min(count)).map(pair).collect()).await?;
    learn(warm, 0.0).await?;
    let start = Instant::now();
    let pairs = reference((0..count).map(pair).collect()).await?;
    let reference_seconds = start.elapsed().as_secs_f64();
    let start = Instant::now();
    learn(pairs, 1e-4).await?;
    let train_seconds = start.elapsed().as_secs_f64();
    device.call(|tenants| tenants.remove(TENANT)).await.map_err(|e| wrong(&e))?;

    let kind = client.text().kind;
    let measure = move |tenants: &mut Tenants| Ceilings::measure(kind, tenants.device());
    let ceilings = device.quantum("measure", TENANT, measure).await.map_err(|e| wrong(&e))?.map_err(|e| wrong(&e))?;
    let tokens = (count * (prompt_tokens + 2 * answer_tokens)) as f64;
    Ok(Report {
        pairs: count,
        prompt_tokens,
        answer_tokens,
        reference_seconds,
        train_seconds,
        pairs_per_second: count as f64 / (reference_seconds + train_seconds),
        train_tokens_per_second: tokens / train_seconds,
        ceilings,
        train_arithmetic_share: tokens * operations(&config) / train_seconds / (ceilings.gigaflops * 1e9),
        peak_rss_bytes: process::memory("VmHWM:"),
    })
}

/// Operations of a token's forward and backward through frozen matrices, the head's among them: two each for a
/// multiplication and an addition.
fn operations(config: &Config) -> f64 {
    let embeddings = if config.tie_word_embeddings { 0 } else { (config.vocab_size * config.hidden_size) as u64 };
    4.0 * (config.parameters() - embeddings) as f64
}
