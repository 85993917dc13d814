//! `flowrun doctor`: whether a device computes what a CPU does in float32.
//!
//! Everything that answers are made of is compared: scoring alone and in shared passes, decoding step by step
//! and as CUDA graphs, under adapters and without. In float32 the numbers are those of the CPU; in bf16 they are
//! no further off than the CPU's own bf16.

use std::path::PathBuf;

use serde::Serialize;
use tch::Device;

use super::models::{Client, Models};
use super::philox::Stream;
use super::request::{AdapterId, Company, GenerateRequest, LlmError, Sampling, ScoreRequest};
use crate::model::lora::content_hash;
use crate::model::{Lora, LoraConfig, ModelError};
use crate::torch::{Memory, TorchError, gpu, memory};

/// Names that [`examine`] opens its models under: one source in two dtypes.
pub const MODELS: [&str; 2] = ["f32", "bf16"];

/// Largest mean difference of log-probs in float32, nats.
const EXACT: f64 = 1e-3;
/// How much further off than the CPU's bf16 a device's may be.
const AS_GOOD: f64 = 1.5;

/// One comparison.
#[derive(Debug, Clone, Serialize)]
pub struct Finding {
    pub name: String,
    /// Mean difference; of log-probs in nats.
    pub mean: f64,
    pub largest: f64,
    /// What the mean may be.
    pub bound: f64,
    pub passes: bool,
}

/// What was found out about a device.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    pub device: String,
    /// Of a GPU.
    pub memory: Option<Memory>,
    pub findings: Vec<Finding>,
}

impl Report {
    pub fn passes(&self) -> bool {
        self.findings.iter().all(|f| f.passes)
    }
}

/// Log-probs of tokens.
struct Texts {
    prompts: Vec<Vec<u32>>,
    answers: Vec<Vec<Vec<u32>>>,
}

/// Compares `device` with the CPU. `models` has one source under [`MODELS`].
///
/// # Errors
/// When the model can't be opened, or the device answers nothing at all.
pub async fn examine(models: &Models, device: &str) -> Result<Report, LlmError> {
    let [wide, narrow] = MODELS;
    let reference = models.client(wide, "cpu:0").await?;
    let yardstick = models.client(narrow, "cpu:0").await?;
    let adapter = Scratch::new(&reference)?;
    let texts = Texts::new(&reference);
    let mut report = Report { device: device.to_owned(), memory: None, findings: Vec::new() };
    let clients = [models.client(wide, device).await?, models.client(narrow, device).await?];
    report.look_at_gpu(&clients[0]).await?;
    for adapter in [None, Some(adapter.id()?)] {
        let under = if adapter.is_some() { "adapter" } else { "base" };
        let expected = texts.scores(&reference, Company::Indifferent, adapter.as_ref()).await?;
        let rounded = apart(&texts.scores(&yardstick, Company::Indifferent, adapter.as_ref()).await?, &expected).0;
        for (client, dtype, bound) in [(&clients[0], wide, EXACT), (&clients[1], narrow, AS_GOOD * rounded + EXACT)] {
            for (way, company) in [("one by one", Company::Indifferent), ("shared passes", Company::Any)] {
                let found = texts.scores(client, company, adapter.as_ref()).await?;
                report.add(format!("score, {way}, {under}, {dtype}"), apart(&found, &expected), bound);
            }
            let ways: &[(bool, &str)] =
                if client.device().device().is_cuda() { &[(false, ""), (true, "graphs, ")] } else { &[(false, "")] };
            for (graphs, way) in ways {
                client.use_graphs(*graphs).await?;
                let (ids, found) = texts.decoded(client, std::slice::from_ref(&adapter)).await?;
                let expected = texts.after(&reference, ids, std::slice::from_ref(&adapter)).await?;
                report.add(format!("decode, {way}{under}, {dtype}"), apart(&found, &expected), bound);
            }
        }
    }
    for (client, dtype) in clients.iter().zip(MODELS) {
        let both = [None, Some(adapter.id()?)];
        let (ids, found) = texts.decoded(client, &both).await?;
        let expected = texts.after(&reference, ids.clone(), &both).await?;
        let rounded = apart(&texts.after(&yardstick, ids, &both).await?, &expected).0;
        let bound = if dtype == narrow { AS_GOOD * rounded + EXACT } else { EXACT };
        report.add(format!("decode, base and adapter side by side, {dtype}"), apart(&found, &expected), bound);
    }
    Ok(report)
}

impl Report {
    fn add(&mut self, name: String, (mean, largest): (f64, f64), bound: f64) {
        // NaN passes nothing.
        self.findings.push(Finding { name, mean, largest, bound, passes: mean <= bound });
    }

    /// Each of a GPU's own operations by itself.
    async fn look_at_gpu(&mut self, client: &Client) -> Result<(), LlmError> {
        let Device::Cuda(index) = client.device().device() else { return Ok(()) };
        self.memory = memory(index);
        let look = move |_: &mut crate::torch::Tenants| match gpu::of(Device::Cuda(index)) {
            Some(gpu) => gpu.check(),
            None => {
                Err(TorchError::Operation("flash attention and our kernels are not in use; the log says why".into()))
            }
        };
        let name = "operations of our own";
        match client.device().quantum("check", "doctor", look).await? {
            Ok(checks) => {
                checks.iter().for_each(|c| self.add(format!("{name}: {}", c.name), (c.error, c.error), c.bound));
            }
            Err(error) => self.add(format!("{name}: {error}"), (f64::INFINITY, f64::INFINITY), 0.0),
        }
        Ok(())
    }
}

/// Mean and largest difference.
fn apart(found: &[f32], expected: &[f32]) -> (f64, f64) {
    if found.len() != expected.len() || found.is_empty() {
        return (f64::NAN, f64::NAN);
    }
    let differences = found.iter().zip(expected).map(|(a, b)| f64::from((a - b).abs()));
    // `max` would hide what is no number.
    let largest = differences.clone().fold(0.0, |most: f64, d| if d > most || d.is_nan() { d } else { most });
    (differences.sum::<f64>() / found.len() as f64, largest)
}

impl Texts {
    /// Prompts of all lengths that begin alike, with two answers each.
    fn new(client: &Client) -> Self {
        let vocabulary = client.text().pretrained().config.vocab_size;
        let token = |seed: usize| ((seed * 7919 + 13) % vocabulary) as u32;
        let text = |from: usize, tokens: usize| (from..from + tokens).map(token).collect::<Vec<u32>>();
        let lengths = [1, 20, 13, 47, 70, 2];
        let prompts = lengths.iter().enumerate();
        Self {
            prompts: prompts.map(|(i, n)| [text(0, 20), text(1000 * (i + 1), *n)].concat()).collect(),
            answers: (0..lengths.len()).map(|i| vec![text(50 * i + 9, 5), text(70 * i + 3, 17)]).collect(),
        }
    }

    fn request(
        &self,
        row: usize,
        answers: Vec<Vec<u32>>,
        company: Company,
        adapter: Option<&AdapterId>,
    ) -> ScoreRequest {
        let (prompt, adapter) = (self.prompts[row].clone(), adapter.cloned());
        ScoreRequest { prompt, answers, adapter, company, stage: "doctor".into() }
    }

    async fn scores(
        &self,
        client: &Client,
        company: Company,
        adapter: Option<&AdapterId>,
    ) -> Result<Vec<f32>, LlmError> {
        let rows = 0..self.prompts.len();
        let ask = |row: usize| client.score(self.request(row, self.answers[row].clone(), company, adapter));
        let scores = futures::future::try_join_all(rows.map(ask)).await?;
        Ok(scores.into_iter().flat_map(|s| s.logprobs).flatten().collect())
    }

    /// Greedy answers, rows taking turns at `adapters`, and the log-probs of their tokens.
    async fn decoded(
        &self,
        client: &Client,
        adapters: &[Option<AdapterId>],
    ) -> Result<(Vec<Vec<u32>>, Vec<f32>), LlmError> {
        let ask = |row: usize| {
            client.generate(GenerateRequest {
                prompt: self.prompts[row].clone(),
                streams: vec![Stream { key: 1, row: row as u64, index: 0 }],
                sampling: Sampling { logprobs: true, ignore_eos: true, ..Sampling::greedy(24) },
                stop: Vec::new(),
                stop_strings: None,
                alone: false,
                adapter: adapters[row % adapters.len()].clone(),
                stage: "doctor".into(),
            })
        };
        let answers = futures::future::try_join_all((0..self.prompts.len()).map(ask)).await?;
        let candidates = answers.into_iter().flat_map(|a| a.candidates);
        let (ids, logprobs): (Vec<_>, Vec<_>) = candidates.map(|c| (c.ids, c.logprobs)).unzip();
        Ok((ids, logprobs.concat()))
    }

    /// Log-probs of those answers.
    async fn after(
        &self,
        client: &Client,
        ids: Vec<Vec<u32>>,
        adapters: &[Option<AdapterId>],
    ) -> Result<Vec<f32>, LlmError> {
        let ask = |(row, ids): (usize, Vec<u32>)| {
            client.score(self.request(row, vec![ids], Company::Indifferent, adapters[row % adapters.len()].as_ref()))
        };
        let scores = futures::future::try_join_all(ids.into_iter().enumerate().map(ask)).await?;
        Ok(scores.into_iter().flat_map(|s| s.logprobs).flatten().collect())
    }
}

/// A directory with an adapter that changes something, removed in the end.
struct Scratch(PathBuf);

impl Scratch {
    fn new(client: &Client) -> Result<Self, LlmError> {
        let dir = std::env::temp_dir().join(format!("flowrun-doctor-{}", std::process::id()));
        let failed = |e: std::io::Error| ModelError::file(&dir, format!("can't be made: {e}"));
        std::fs::create_dir_all(&dir).map_err(failed)?;
        let scratch = Self(dir);
        let model = &client.text().pretrained().config;
        let lora = Lora::fresh(LoraConfig::default(), model, 1, Device::Cpu)?;
        for (name, tensor) in lora.named() {
            if name.contains("lora_B") {
                let _ = tensor.shallow_clone().f_uniform_(-0.02, 0.02).map_err(TorchError::from)?;
            }
        }
        lora.save(&scratch.0, "doctor")?;
        Ok(scratch)
    }

    fn id(&self) -> Result<AdapterId, LlmError> {
        Ok(AdapterId { dir: self.0.clone(), hash: content_hash(&self.0)? })
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_number_passes_nothing() {
        let mut report = Report { device: "cpu:0".into(), memory: None, findings: Vec::new() };
        report.add("equal".into(), apart(&[1.0, -2.0], &[1.0, -2.0]), 0.0);
        assert!(report.passes());
        report.add("NaN".into(), apart(&[f32::NAN, 0.0], &[0.0, 0.0]), 1.0);
        report.add("missing".into(), apart(&[0.0], &[0.0, 0.0]), 1.0);
        report.add("off".into(), apart(&[0.5, 0.0], &[0.0, 0.0]), 0.2);
        assert_eq!(report.findings.iter().filter(|f| f.passes).count(), 1);
    }
}
