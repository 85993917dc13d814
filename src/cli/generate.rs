//! `flowrun generate RUN "prompt"`: the base's and each round's answer, side by side.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::out::say;
use super::{Failure, GenerateArgs};
use flowrun::embed::Engine;
use flowrun::engine::{AdapterRef, runs};
use flowrun::flow::{Flow, ModelSpec};
use flowrun::llm::{GenerateRequest, LlmError, Models, Role, Sampling, Stream, stream_key};
use flowrun::model::chat::ChatMessage;
use flowrun::observe::{Metrics, Trace};
use flowrun::stages;

pub async fn generate(args: GenerateArgs) -> Result<(), Failure> {
    // Says that the directory is no run's, where it is none.
    runs::head_of(&args.run)?;
    let mut flow = Flow::load(&[args.run.join("flow.toml")], &[], &Engine::new())?;
    let (trainer, model) =
        trained(&flow).ok_or_else(|| wrong(&args.run, "its flow has no trainer, so there is one model to ask"))?;
    let whole = whole_model(&args.run, &trainer);
    let mut asked = vec![("base".to_owned(), model.clone(), None)];
    if let Some((dir, base)) = whole.as_ref().zip(flow.models.get(&model)) {
        let name = format!("{model}, trained");
        let spec = ModelSpec { source: dir.display().to_string(), ..base.clone() };
        flow.models.insert(name.clone(), spec);
        asked.push(("round 1".to_owned(), name, None));
    } else {
        let adapters = adapters(&args.run, &trainer, flow.rounds)?;
        asked.extend(adapters.into_iter().map(|a| (format!("round {}", a.round), model.clone(), Some(a))));
    }

    let models = Models::new(flow.models.clone(), flow.base.clone(), Arc::new(Trace::default()), Metrics::default());
    let models = Arc::new(models.with_devices(flow.devices.clone()).with_date(flow.date));
    let device = models.place(&args.device, Role::Sampler);
    let failed = |e: LlmError| Failure::Failed(e.to_string());

    say!("> {}", args.prompt);
    for (name, model, adapter) in asked {
        let client = models.client(&model, &device).await.map_err(failed)?;
        let text = client.text();
        let message = ChatMessage::new("user", args.prompt.as_str());
        let prompt = text.encode_chat(&[message]).map_err(|e| Failure::Failed(e.to_string()))?;
        let request = GenerateRequest {
            prompt,
            // The same uniforms for all, so that only the adapter makes a difference.
            streams: vec![Stream { key: stream_key(flow.seed, "generate", 0), row: 0, index: 0 }],
            sampling: Sampling { temperature: args.temperature, ..Sampling::greedy(args.max_new_tokens) },
            stop: text.stop_ids().to_vec(),
            stop_strings: None,
            alone: false,
            adapter: adapter.map(stages::adapter_id),
            stage: "generate".into(),
        };
        let answer = client.generate(request).await.map_err(failed)?;
        let ids = answer.candidates.first().map(|c| c.ids.as_slice()).unwrap_or_default();
        let answer = text.decode(ids).map_err(|e| Failure::Failed(e.to_string()))?;
        say!("\n[{name}]\n{}", answer.trim());
    }
    Ok(())
}

fn wrong(run: &Path, message: &str) -> Failure {
    Failure::Wrong(format!("{}: {message}", run.display()))
}

/// The first trainer of a flow, and its model.
pub(super) fn trained(flow: &Flow) -> Option<(String, String)> {
    let stage = flow.stages.iter().find(|s| s.kind == "trainer")?;
    let model = stage.options.get("model")?.as_str()?;
    Some((stage.name.clone(), model.to_owned()))
}

/// The model that a run left whose trainer trains every weight.
pub(super) fn whole_model(run: &Path, trainer: &str) -> Option<PathBuf> {
    let dir = std::path::absolute(run.join("round-1").join(trainer).join("model")).ok()?;
    dir.is_dir().then_some(dir)
}

/// The adapters that a run's rounds left, first round first.
pub(super) fn adapters(run: &Path, trainer: &str, rounds: u32) -> Result<Vec<AdapterRef>, Failure> {
    let dirs = (1..=rounds).map(|round| (round, run.join(format!("round-{round}")).join(trainer).join("adapter")));
    let found: Vec<(u32, PathBuf)> = dirs.filter(|(_, dir)| dir.is_dir()).collect();
    if found.is_empty() {
        return Err(wrong(run, "no round has an adapter yet"));
    }
    let refer = |(round, dir): (u32, PathBuf)| {
        let hash = flowrun::model::lora::content_hash(&dir).map_err(|e| Failure::Failed(e.to_string()))?;
        Ok(AdapterRef { dir, hash, round })
    };
    found.into_iter().map(refer).collect()
}
