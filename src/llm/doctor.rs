//! `flowrun doctor`: whether a device computes what a CPU does in float32.
//!
//! The comparisons come in [`Part`]s, each of which stands alone. In float32 a device's numbers are those of the
//! CPU; in bf16 they are no further off than the CPU's own bf16.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Instant;

use serde::Serialize;
use tch::Device;

use super::models::{Client, Models};
use super::philox::Stream;
use super::request::{AdapterId, Company, GenerateRequest, LlmError, Sampling, ScoreRequest};
use crate::model::lora::content_hash;
use crate::model::{Lora, LoraConfig, ModelError};
use crate::torch::gpu::{self, Path, Sizes, Way};
use crate::torch::{Memory, Tenants, TorchError, describe, memory, processor};

/// Names that [`examine`] opens its models under: one source in two dtypes.
pub const MODELS: [&str; 2] = ["f32", "bf16"];

/// Largest mean difference of log-probs in float32, nats.
pub const EXACT: f64 = 1e-3;
/// How much further off than the CPU's bf16 a device's may be.
pub const AS_GOOD: f64 = 1.5;

/// A group of comparisons that can be made by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// The libraries open; driver and device are named.
    Libraries,
    /// Each of our kernels on a GPU, but for those of other parts.
    Kernels,
    Flash,
    /// Decoding as CUDA graphs.
    Graphs,
    Sampling,
    /// Scoring and decoding under an adapter.
    Adapters,
    /// Scoring alone and in shared passes.
    Scoring,
    /// Decoding step by step.
    Decoding,
    /// A training step.
    Training,
}

impl Part {
    pub const ALL: [Self; 9] = [
        Self::Libraries,
        Self::Kernels,
        Self::Flash,
        Self::Graphs,
        Self::Sampling,
        Self::Adapters,
        Self::Scoring,
        Self::Decoding,
        Self::Training,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Self::Libraries => "libraries",
            Self::Kernels => "kernels",
            Self::Flash => "flash",
            Self::Graphs => "graphs",
            Self::Sampling => "sampling",
            Self::Adapters => "adapters",
            Self::Scoring => "scoring",
            Self::Decoding => "decoding",
            Self::Training => "training",
        }
    }

    /// Paths of a GPU that are compared in this part, each by itself.
    fn paths(self) -> &'static [Path] {
        match self {
            Self::Kernels => &[Path::Norm, Path::Rotary, Path::KvStore, Path::Gate],
            Self::Flash => &[Path::Flash],
            Self::Sampling => &[Path::Sampling],
            Self::Adapters => &[Path::Lora],
            _ => &[],
        }
    }

    /// True where a model is needed.
    fn asks_model(self) -> bool {
        matches!(self, Self::Graphs | Self::Adapters | Self::Scoring | Self::Decoding)
    }
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Part {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let names = || Self::ALL.map(Self::name).join(", ");
        Self::ALL.into_iter().find(|part| part.name() == text).ok_or_else(|| format!("the parts are {}", names()))
    }
}

/// One comparison.
#[derive(Debug, Clone, Serialize)]
pub struct Finding {
    pub part: &'static str,
    pub name: String,
    /// Mean difference; of log-probs in nats.
    #[serde(serialize_with = "number")]
    pub mean: f64,
    #[serde(serialize_with = "number")]
    pub largest: f64,
    /// What the mean may be.
    pub bound: f64,
    pub passes: bool,
}

/// JSON has no NaN and no infinity.
fn number<S: serde::Serializer>(value: &f64, serializer: S) -> Result<S::Ok, S::Error> {
    if value.is_finite() { serializer.serialize_f64(*value) } else { serializer.collect_str(value) }
}

/// What was found out about a device.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Report {
    pub device: String,
    /// Names and versions, in words.
    pub facts: BTreeMap<&'static str, String>,
    /// Paths of a GPU that are not used, and why.
    pub off: BTreeMap<String, String>,
    pub findings: Vec<Finding>,
}

impl Report {
    pub fn new(device: &str) -> Self {
        Self { device: device.to_owned(), ..Self::default() }
    }

    pub fn passes(&self) -> bool {
        self.findings.iter().all(|f| f.passes)
    }

    /// Adds a comparison: mean and largest difference, and what the mean may be.
    pub fn add(&mut self, part: Part, name: impl Into<String>, (mean, largest): (f64, f64), bound: f64) {
        // NaN passes nothing.
        self.findings.push(Finding {
            part: part.name(),
            name: name.into(),
            mean,
            largest,
            bound,
            passes: mean <= bound,
        });
    }

    /// Adds what can't be compared because it fails.
    pub fn fail(&mut self, part: Part, name: impl fmt::Display, why: impl fmt::Display) {
        self.add(part, format!("{name}: {why}"), (f64::INFINITY, f64::INFINITY), 0.0);
    }
}

/// Compares `parts` of `device` with the CPU. `models` has one source under [`MODELS`]. Of [`Part::Training`] nothing
/// is known here.
///
/// # Errors
/// When the model can't be opened, or the device answers nothing at all.
pub async fn examine(models: &Models, device: &str, parts: &[Part]) -> Result<Report, LlmError> {
    let mut report = Report::new(device);
    for part in parts {
        report.look_at_paths(models, *part).await?;
    }
    if parts.iter().any(|part| part.asks_model()) {
        let subject = Subject::open(models, device).await?;
        for part in parts {
            match part {
                Part::Scoring => subject.scoring(&mut report, *part, None).await?,
                Part::Decoding => subject.decoding(&mut report, *part, None, false).await?,
                Part::Adapters => subject.adapters(&mut report, *part).await?,
                Part::Graphs => subject.graphs(&mut report, *part).await?,
                _ => {}
            }
        }
    }
    Ok(report)
}

impl Report {
    /// Compares the paths of a GPU that belong to a part.
    async fn look_at_paths(&mut self, models: &Models, part: Part) -> Result<(), LlmError> {
        let thread = models.thread(&self.device).await?;
        let Device::Cuda(index) = thread.device() else {
            if part == Part::Libraries {
                self.facts.insert("processor", processor());
            }
            return Ok(());
        };
        if part == Part::Libraries {
            self.look_at_libraries(index);
        }
        let look = move |_: &mut Tenants| {
            let start = Instant::now();
            let gpu = gpu::of(Device::Cuda(index))?;
            let opened = start.elapsed();
            let mut told = Vec::new();
            for path in part.paths() {
                for (way, sizes) in [(Way::Own, Sizes::SMALL), (Way::Own, Sizes::LARGE), (Way::Libtorch, Sizes::SMALL)]
                {
                    told.push((*path, gpu.check(*path, way, &sizes)));
                }
            }
            Some((told, gpu.off().clone(), opened))
        };
        let Some((told, off, opened)) = thread.quantum("check", "doctor", look).await? else {
            let why = "libtorch's part of the GPU's operations is missing; the log says why";
            self.fail(part, "paths", why);
            return Ok(());
        };
        if part == Part::Libraries {
            self.facts.insert("kernels", format!("compiled and compared in {:.1} s", opened.as_secs_f64()));
        }
        self.off.extend(off.into_iter().map(|(path, why)| (path.to_string(), why)));
        for (path, checks) in told {
            match checks {
                Ok(checks) => checks.into_iter().for_each(|c| self.add(part, c.name, (c.error, c.error), c.bound)),
                Err(why) => self.fail(part, path, why),
            }
        }
        Ok(())
    }

    fn look_at_libraries(&mut self, index: usize) {
        match describe(index) {
            Ok(facts) => self.facts.extend(facts),
            Err(why) => self.fail(Part::Libraries, "driver", why),
        }
        match memory(index) {
            Some(Memory { free, total, .. }) => {
                let gib = |bytes: u64| bytes as f64 / f64::from(1 << 30);
                self.facts.insert("memory", format!("{:.1} GiB, {:.1} free", gib(total), gib(free)));
            }
            None => self.fail(Part::Libraries, "memory", "libtorch's part of CUDA can't be opened; the log says why"),
        }
    }
}

/// Prompts, and answers to them.
struct Texts {
    prompts: Vec<Vec<u32>>,
    answers: Vec<Vec<Vec<u32>>>,
}

/// A model on the device that is looked at, and on the CPU.
struct Subject {
    /// Float32 on the CPU.
    reference: Client,
    /// The same in bf16: how far off rounding alone is.
    yardstick: Client,
    /// In the order of [`MODELS`].
    clients: [Client; 2],
    adapter: Scratch,
    texts: Texts,
}

impl Subject {
    async fn open(models: &Models, device: &str) -> Result<Self, LlmError> {
        let [wide, narrow] = MODELS;
        let reference = models.client(wide, "cpu:0").await?;
        let yardstick = models.client(narrow, "cpu:0").await?;
        let (adapter, texts) = (Scratch::new(&reference)?, Texts::new(&reference));
        let clients = [models.client(wide, device).await?, models.client(narrow, device).await?];
        Ok(Self { reference, yardstick, clients, adapter, texts })
    }

    /// Largest mean difference of a client's log-probs, given how far off the CPU's bf16 is.
    fn bound(dtype: &str, rounded: f64) -> f64 {
        if dtype == MODELS[0] { EXACT } else { AS_GOOD * rounded + EXACT }
    }

    async fn scoring(&self, report: &mut Report, part: Part, adapter: Option<&AdapterId>) -> Result<(), LlmError> {
        let texts = &self.texts;
        let expected = texts.scores(&self.reference, Company::Indifferent, adapter).await?;
        let rounded = apart(&texts.scores(&self.yardstick, Company::Indifferent, adapter).await?, &expected).0;
        for (client, dtype) in self.clients.iter().zip(MODELS) {
            for (way, company) in [("one by one", Company::Indifferent), ("shared passes", Company::Any)] {
                let found = texts.scores(client, company, adapter).await?;
                report.add(
                    part,
                    format!("score, {way}, {dtype}"),
                    apart(&found, &expected),
                    Self::bound(dtype, rounded),
                );
            }
        }
        Ok(())
    }

    async fn decoding(
        &self,
        report: &mut Report,
        part: Part,
        adapter: Option<&AdapterId>,
        graphs: bool,
    ) -> Result<(), LlmError> {
        let (texts, adapter) = (&self.texts, [adapter.cloned()]);
        for (client, dtype) in self.clients.iter().zip(MODELS) {
            client.use_graphs(graphs).await?;
            let (ids, found) = texts.decoded(client, &adapter).await?;
            let expected = texts.after(&self.reference, ids.clone(), &adapter).await?;
            let rounded = apart(&texts.after(&self.yardstick, ids, &adapter).await?, &expected).0;
            let under = if adapter[0].is_some() { "adapter, " } else { "" };
            report.add(part, format!("decode, {under}{dtype}"), apart(&found, &expected), Self::bound(dtype, rounded));
        }
        Ok(())
    }

    async fn adapters(&self, report: &mut Report, part: Part) -> Result<(), LlmError> {
        let id = self.adapter.id()?;
        self.scoring(report, part, Some(&id)).await?;
        self.decoding(report, part, Some(&id), false).await?;
        let (texts, both) = (&self.texts, [None, Some(id)]);
        for (client, dtype) in self.clients.iter().zip(MODELS) {
            let (ids, found) = texts.decoded(client, &both).await?;
            let expected = texts.after(&self.reference, ids.clone(), &both).await?;
            let rounded = apart(&texts.after(&self.yardstick, ids, &both).await?, &expected).0;
            let name = format!("decode, base and adapter side by side, {dtype}");
            report.add(part, name, apart(&found, &expected), Self::bound(dtype, rounded));
        }
        Ok(())
    }

    /// Decoding as graphs, of which some have to be used.
    async fn graphs(&self, report: &mut Report, part: Part) -> Result<(), LlmError> {
        let [_, narrow] = &self.clients;
        let Device::Cuda(index) = narrow.device().device() else { return Ok(()) };
        let check = move |_: &mut Tenants| gpu::check_capture(index);
        match narrow.device().quantum("check", "doctor", check).await? {
            Ok(()) => report.add(part, "capture, replay, and a capture that fails", (0.0, 0.0), 0.0),
            Err(why) => report.fail(part, "capture", why),
        }
        for adapter in [None, Some(self.adapter.id()?)] {
            self.decoding(report, part, adapter.as_ref(), true).await?;
            // Float32 goes through libtorch's operations alone, step by step.
            let (replayed, why) = narrow.graphs_used().await?;
            match (replayed, why) {
                (0, why) => report.fail(part, "no step was a graph", why.unwrap_or_default()),
                (_, Some(why)) => report.fail(part, "a graph could not be captured", why),
                (_, None) => {}
            }
        }
        Ok(())
    }
}

/// Mean and largest difference.
pub fn apart(found: &[f32], expected: &[f32]) -> (f64, f64) {
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
pub struct Scratch(PathBuf);

impl Scratch {
    /// # Errors
    /// When it can't be written.
    pub fn new(client: &Client) -> Result<Self, LlmError> {
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

    pub fn dir(&self) -> &std::path::Path {
        &self.0
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
        let mut report = Report::new("cpu:0");
        report.add(Part::Scoring, "equal", apart(&[1.0, -2.0], &[1.0, -2.0]), 0.0);
        assert!(report.passes());
        report.add(Part::Scoring, "NaN", apart(&[f32::NAN, 0.0], &[0.0, 0.0]), 1.0);
        report.add(Part::Scoring, "missing", apart(&[0.0], &[0.0, 0.0]), 1.0);
        report.add(Part::Scoring, "off", apart(&[0.5, 0.0], &[0.0, 0.0]), 0.2);
        report.fail(Part::Kernels, "norm", "NVRTC error 6");
        assert_eq!(report.findings.iter().filter(|f| f.passes).count(), 1);
        let json = serde_json::to_value(&report).unwrap();
        assert_eq!(json["findings"][1]["mean"], "NaN");
        assert_eq!(json["findings"][4]["name"], "norm: NVRTC error 6");
    }
}
