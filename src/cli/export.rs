//! `flowrun export SOURCE --out PATH`: an adapter, or base and adapter as one model, for other programs.

use std::path::{Path, PathBuf};

use serde_json::{Value as Json, json};
use tch::{Device, Kind};

use super::out::say;
use super::{ExportArgs, Failure, generate};
use flowrun::embed::Engine;
use flowrun::flow::Flow;
use flowrun::model::export::{self, Change, Export};
use flowrun::model::{Lora, ModelError, ModelOptions, Pretrained, Source};

/// Ranks that vLLM makes room for.
const VLLM_RANKS: [u64; 6] = [8, 16, 32, 64, 128, 256];

impl From<ModelError> for Failure {
    fn from(error: ModelError) -> Self {
        Self::Wrong(error.to_string())
    }
}

pub async fn export(args: ExportArgs) -> Result<(), Failure> {
    let work = move || if args.merge { merge(&args) } else { copy(&args) };
    let printed = tokio::task::spawn_blocking(work).await.map_err(|e| Failure::Failed(e.to_string()))??;
    say!("{printed}");
    Ok(())
}

/// The adapter that is exported, and the source of its base.
struct Adapter {
    dir: PathBuf,
    base: String,
    /// Where a relative source begins.
    root: PathBuf,
    /// The template that the run was made with, where it is not the base's own.
    chat_template: Option<String>,
}

impl Adapter {
    fn find(args: &ExportArgs) -> Result<Self, Failure> {
        let here = std::env::current_dir().unwrap_or_default();
        let found = if args.source.join("flow.toml").is_file() {
            Self::of_run(&args.source, args.round)?
        } else {
            let config = read_config(&args.source)?;
            let named = config.get("base_model_name_or_path").and_then(Json::as_str).unwrap_or_default();
            Self { dir: args.source.clone(), base: as_source(named, &here), root: here.clone(), chat_template: None }
        };
        match &args.model {
            Some(model) => Ok(Self { base: model.clone(), root: here, ..found }),
            None if found.base.is_empty() => {
                Err(Failure::Wrong(format!("{} names no base model; add --model", args.source.display())))
            }
            None => Ok(found),
        }
    }

    fn of_run(run: &Path, round: Option<u32>) -> Result<Self, Failure> {
        let flow = Flow::load(&[run.join("flow.toml")], &[], &Engine::new())?;
        let none = || Failure::Wrong(format!("{}: its flow has no trainer, so there is no adapter", run.display()));
        let (trainer, model) = generate::trained(&flow).ok_or_else(none)?;
        if let Some(dir) = generate::whole_model(run, &trainer) {
            let message =
                format!("{}: the run trained the whole model; {} is the export", run.display(), dir.display());
            return Err(Failure::Wrong(message));
        }
        let adapters = generate::adapters(run, &trainer, flow.rounds)?;
        let rounds: Vec<u32> = adapters.iter().map(|adapter| adapter.round).collect();
        let wanted = round.or(rounds.last().copied()).unwrap_or_default();
        let found = adapters.into_iter().find(|adapter| adapter.round == wanted);
        let rounds = rounds.iter().map(u32::to_string).collect::<Vec<_>>().join(", ");
        let dir = found
            .ok_or_else(|| {
                Failure::Wrong(format!("{} has no adapter of round {wanted}; it has those of {rounds}", run.display()))
            })?
            .dir;
        let spec = flow.models.get(&model);
        if spec.is_some_and(|spec| spec.weights.is_some()) {
            let message = format!("{}: the run has dummy weights, which no other program can load", run.display());
            return Err(Failure::Wrong(message));
        }
        let base = spec.map(|spec| spec.source.clone()).unwrap_or_default();
        let chat_template = spec.and_then(|spec| spec.chat_template.clone());
        Ok(Self { dir, base, root: flow.base, chat_template })
    }

    fn source(&self) -> Result<Source, Failure> {
        Ok(Source::parse(&self.base, &self.root)?)
    }

    /// The base as vLLM and transformers name it.
    fn base_name(&self) -> Result<String, Failure> {
        Ok(match self.source()? {
            Source::Hub { owner, name, .. } => format!("{owner}/{name}"),
            Source::Builtin => flowrun::model::source::builtin_path()?.display().to_string(),
            Source::Gguf(path) | Source::Directory(path) => {
                std::path::absolute(&path).unwrap_or(path).display().to_string()
            }
        })
    }
}

/// The source that PEFT's `base_model_name_or_path` stands for: a path that is there, else a name of the hub.
fn as_source(named: &str, here: &Path) -> String {
    let of_hub = named.matches('/').count() == 1 && !named.starts_with(['/', '.']) && !here.join(named).exists();
    if of_hub { format!("hf://{named}") } else { named.to_owned() }
}

/// The adapter alone, with the name of its base.
fn copy(args: &ExportArgs) -> Result<String, Failure> {
    if args.format == "gguf" {
        return Err(Failure::Wrong("--format gguf is for a whole model; add --merge".into()));
    }
    let adapter = Adapter::find(args)?;
    flowrun::model::lora::check_file(&adapter.dir)?;
    let mut config = read_config(&adapter.dir)?;
    let base = adapter.base_name()?;
    config.insert("base_model_name_or_path".into(), json!(base));
    let rank = config.get("r").and_then(Json::as_u64).unwrap_or(0);
    let text = serde_json::to_string_pretty(&config).unwrap_or_default();
    export::new_directory(&args.out, |dir| {
        let [weights, config] = ["adapter_model.safetensors", "adapter_config.json"].map(|name| dir.join(name));
        std::fs::copy(adapter.dir.join("adapter_model.safetensors"), &weights).map_err(export::unwritable(&weights))?;
        std::fs::write(&config, text).map_err(export::unwritable(&config))
    })?;
    let name = args.out.file_name().unwrap_or_default().display();
    let room = VLLM_RANKS.into_iter().find(|room| *room >= rank).unwrap_or(rank);
    let out = args.out.display();
    Ok(format!(
        "adapter of rank {rank}: {out}\nvllm serve {base} --enable-lora --lora-modules {name}={out} --max-lora-rank {room}"
    ))
}

/// Base and adapter as one model.
fn merge(args: &ExportArgs) -> Result<String, Failure> {
    let adapter = Adapter::find(args)?;
    let base = Pretrained::open(
        &adapter.source()?,
        &ModelOptions { chat_template: adapter.chat_template.clone(), ..ModelOptions::default() },
    )?;
    let lora = Lora::load(&adapter.dir, &base.config, Device::Cpu)?;
    let kind = match args.dtype.as_str() {
        "f32" => Kind::Float,
        "f16" => Kind::Half,
        _ => Kind::BFloat16,
    };
    let export = Export { base: &base, change: Some(Change::Adapter(&lora)), kind };
    let out = args.out.display();
    if args.format == "gguf" {
        export.gguf(&args.out)?;
        return Ok(format!("merged model: {out}\nllama-server -m {out}"));
    }
    export.directory(&args.out)?;
    Ok(format!("merged model: {out}\nvllm serve {out}"))
}

fn read_config(dir: &Path) -> Result<serde_json::Map<String, Json>, Failure> {
    let file = dir.join("adapter_config.json");
    let wrong = |what: String| Failure::Wrong(format!("{}: {what}; name a run or a PEFT directory", file.display()));
    let text = std::fs::read_to_string(&file).map_err(|e| wrong(format!("can't be read ({e})")))?;
    serde_json::from_str(&text).map_err(|e| wrong(format!("is no JSON object ({e})")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bases_are_paths_or_names_of_the_hub() {
        let here = Path::new(env!("CARGO_MANIFEST_DIR"));
        for (named, source) in [
            ("HuggingFaceTB/SmolLM2-135M-Instruct", "hf://HuggingFaceTB/SmolLM2-135M-Instruct"),
            ("tests/fixtures", "tests/fixtures"),
            ("/models/base", "/models/base"),
            ("./base", "./base"),
            ("a/b/c", "a/b/c"),
        ] {
            assert_eq!(as_source(named, here), source);
        }
    }
}
