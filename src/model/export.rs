//! A model written out for other programs, with an adapter merged into its weights: a Hugging Face
//! directory here, a GGUF file in `gguf_export`.
//!
//! A weight is `W + scale * B A` in float32 and rounded once, one tensor at a time. What is written has a
//! temporary name until it is whole, and nothing that is there already is touched.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use serde_json::{Value as Json, json};
use tch::{Device, Kind, Tensor};

use super::rope::{RopeConfig, RopeScaling};
use super::source::{Pretrained, template_of_dir};
use super::weights::Weights;
use super::{Lora, ModelError};
use crate::torch::{TorchError, bytes_mut};

/// Bytes of a shard, as transformers cuts them.
const SHARD: u64 = 5_000_000_000;
/// Numbers that are rounded and written at a time.
const PIECE: i64 = 1 << 20;
/// Files of a Hugging Face directory that are no weights.
const TEXTS: [&str; 11] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "LICENSE",
];

/// What makes the model another than its base.
#[derive(Clone, Copy)]
pub enum Change<'a> {
    Adapter(&'a Lora),
    /// Tensors in the place of those of the same names.
    Weights(&'a BTreeMap<String, Tensor>),
}

/// A base with what changes it, on its way out.
pub struct Export<'a> {
    pub base: &'a Pretrained,
    pub change: Option<Change<'a>>,
    /// bf16, f16 or f32.
    pub kind: Kind,
}

/// A tensor that will be written.
#[derive(Clone)]
pub(super) struct Entry {
    pub name: String,
    pub shape: Vec<usize>,
    bytes: u64,
}

impl Export<'_> {
    /// Writes a directory that transformers, vLLM and flowrun load.
    ///
    /// # Errors
    /// When `dir` is there and not empty, the model can't be expressed, or the disk is full.
    pub fn directory(&self, dir: &Path) -> Result<(), ModelError> {
        new_directory(dir, |partial| self.write_directory(partial))
    }

    fn write_directory(&self, dir: &Path) -> Result<(), ModelError> {
        self.write_texts(dir)?;
        let mut shards: Vec<Vec<Entry>> = vec![Vec::new()];
        let mut size = 0;
        for entry in self.entries()? {
            if size + entry.bytes > SHARD && size > 0 {
                shards.push(Vec::new());
                size = 0;
            }
            size += entry.bytes;
            shards.last_mut().into_iter().for_each(|shard| shard.push(entry.clone()));
        }
        if let [only] = shards.as_slice() {
            return self.write_shard(&dir.join("model.safetensors"), only);
        }
        let (count, mut map, mut total) = (shards.len(), serde_json::Map::new(), 0);
        for (i, shard) in shards.iter().enumerate() {
            let file = format!("model-{:05}-of-{count:05}.safetensors", i + 1);
            self.write_shard(&dir.join(&file), shard)?;
            total += shard.iter().map(|entry| entry.bytes).sum::<u64>();
            map.extend(shard.iter().map(|entry| (entry.name.clone(), json!(file))));
        }
        write_json(
            &dir.join("model.safetensors.index.json"),
            &json!({"metadata": {"total_size": total}, "weight_map": map}),
        )
    }

    /// Tensors under Hugging Face's names, sorted.
    pub(super) fn entries(&self) -> Result<Vec<Entry>, ModelError> {
        let mut names = self.base.weights.names();
        names.sort();
        let entry = |name: String| {
            let shape = self.base.weights.shape(&name).unwrap_or_default();
            let bytes = (shape.iter().product::<usize>() * self.kind.elt_size_in_bytes()) as u64;
            Entry { name, shape, bytes }
        };
        if names.is_empty() {
            return Err(ModelError::Setting("the model has no stored weights to export".into()));
        }
        Ok(names.into_iter().map(entry).collect())
    }

    /// The weight in float32, changed.
    pub(super) fn merged(&self, entry: &Entry) -> Result<Tensor, ModelError> {
        if let Some(Change::Weights(weights)) = self.change
            && let Some(weight) = weights.get(&entry.name)
        {
            let wide = weight.f_to_device(Device::Cpu).and_then(|w| w.f_to_kind(Kind::Float));
            return Ok(wide.map_err(TorchError::from)?);
        }
        let weight = self.base.weights.tensor(&entry.name, &entry.shape, Kind::Float, Device::Cpu)?;
        let module = entry.name.strip_suffix(".weight").unwrap_or(&entry.name);
        let Some(Change::Adapter(lora)) = self.change else { return Ok(weight) };
        Ok(match lora.change(module)? {
            Some(change) => weight.shallow_clone().f_add_(&change).map_err(TorchError::from)?,
            None => weight,
        })
    }

    fn write_shard(&self, path: &Path, entries: &[Entry]) -> Result<(), ModelError> {
        let dtype = match self.kind {
            Kind::Float => "F32",
            Kind::Half => "F16",
            _ => "BF16",
        };
        let mut header = serde_json::Map::from_iter([("__metadata__".to_owned(), json!({"format": "pt"}))]);
        let mut offset = 0;
        for entry in entries {
            let range = [offset, offset + entry.bytes];
            header.insert(entry.name.clone(), json!({"dtype": dtype, "shape": entry.shape, "data_offsets": range}));
            offset += entry.bytes;
        }
        let mut header = Json::Object(header).to_string();
        header.push_str(&" ".repeat(header.len().next_multiple_of(8) - header.len()));
        let mut out = Output::new(path)?;
        out.write(&(header.len() as u64).to_le_bytes())?;
        out.write(header.as_bytes())?;
        for entry in entries {
            out.tensor(&entry.name, &self.merged(entry)?, self.kind)?;
        }
        out.finish()
    }

    fn write_texts(&self, dir: &Path) -> Result<(), ModelError> {
        let Weights::Gguf(_) = &self.base.weights else {
            let from = self.base.files().first().and_then(|file| file.parent()).unwrap_or(Path::new(""));
            for name in TEXTS.iter().filter(|name| from.join(name).is_file()) {
                std::fs::copy(from.join(name), dir.join(name)).map_err(unwritable(&dir.join(name)))?;
            }
            // A template of the user's own takes the place of the model's, as it did in training.
            if let Some(template) = self.base.template()
                && template_of_dir(from)?.as_deref() != Some(template)
            {
                let path = dir.join("chat_template.jinja");
                std::fs::write(&path, template).map_err(unwritable(&path))?;
            }
            return self.set_dtype(&dir.join("config.json"));
        };
        write_json(&dir.join("config.json"), &self.config_json()?)?;
        self.base.tokenizer.save(&dir.join("tokenizer.json"))?;
        let tokenizer = &self.base.tokenizer;
        let mut settings = json!({
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": false,
            "model_max_length": self.base.config.max_position_embeddings,
        });
        for (name, text) in tokenizer.special_tokens() {
            settings[name] = json!(text);
        }
        if let Some(template) = self.base.template() {
            settings["chat_template"] = json!(template);
        }
        write_json(&dir.join("tokenizer_config.json"), &settings)?;
        let generation = json!({"bos_token_id": tokenizer.bos_id(), "eos_token_id": tokenizer.eos_ids()});
        write_json(&dir.join("generation_config.json"), &generation)
    }

    fn dtype_name(&self) -> &'static str {
        match self.kind {
            Kind::Float => "float32",
            Kind::Half => "float16",
            _ => "bfloat16",
        }
    }

    fn set_dtype(&self, path: &Path) -> Result<(), ModelError> {
        let text = std::fs::read_to_string(path).map_err(ModelError::io(path))?;
        let mut config: Json =
            serde_json::from_str(&text).map_err(|e| ModelError::file(path, format!("is no JSON: {e}")))?;
        let key = if config.get("dtype").is_some() { "dtype" } else { "torch_dtype" };
        config[key] = json!(self.dtype_name());
        write_json(path, &config)
    }

    /// The config.json of a model that came as GGUF.
    fn config_json(&self) -> Result<Json, ModelError> {
        let c = &self.base.config;
        let refused = |what: &str| {
            let message = format!(
                "{}: {what} of this GGUF file have no form in config.json; add --format gguf",
                self.base.source
            );
            ModelError::Setting(message)
        };
        let (architecture, model_type) = match (c.architecture.as_str(), c.window) {
            ("Qwen2ForCausalLM", _) => ("Qwen2ForCausalLM", "qwen2"),
            ("Qwen3ForCausalLM", _) => ("Qwen3ForCausalLM", "qwen3"),
            // llama.cpp stores Mistral as llama; the window is what tells them apart.
            (_, Some(_)) => ("MistralForCausalLM", "mistral"),
            (_, None) => ("LlamaForCausalLM", "llama"),
        };
        // Qwen2's biases are a matter of course, Mistral has none, and the others have all or none.
        let biases = (c.qkv_bias, c.o_bias, c.mlp_bias);
        let known = match model_type {
            "qwen2" => biases == (true, false, false),
            "mistral" => biases == (false, false, false),
            _ => c.qkv_bias == c.o_bias && (model_type == "llama" || !c.mlp_bias),
        };
        if !known || c.qk_norm != (model_type == "qwen3") {
            return Err(refused("biases or norms"));
        }
        let scaling = scaling_json(&c.rope).ok_or_else(|| refused("rotary frequencies"))?;
        Ok(json!({
            "architectures": [architecture],
            "model_type": model_type,
            "vocab_size": c.vocab_size,
            "hidden_size": c.hidden_size,
            "intermediate_size": c.intermediate_size,
            "num_hidden_layers": c.layers,
            "num_attention_heads": c.heads,
            "num_key_value_heads": c.kv_heads,
            "head_dim": c.head_dim,
            "hidden_act": "silu",
            "rms_norm_eps": c.rms_norm_eps,
            "rope_theta": c.rope.theta,
            "rope_scaling": scaling,
            "max_position_embeddings": c.max_position_embeddings,
            "sliding_window": c.window,
            "use_sliding_window": c.window.is_some(),
            "max_window_layers": 0,
            "tie_word_embeddings": c.tie_word_embeddings,
            "attention_bias": c.qkv_bias && c.o_bias,
            "mlp_bias": c.mlp_bias,
            "bos_token_id": c.bos_id,
            "eos_token_id": c.eos_ids.first(),
            "torch_dtype": self.dtype_name(),
        }))
    }
}

/// Hash of an exported directory's files by name and content, hex. Its card is left out.
///
/// # Errors
/// When a file can't be read.
pub fn content_hash(dir: &Path) -> Result<String, ModelError> {
    let entries = std::fs::read_dir(dir).and_then(Iterator::collect::<std::io::Result<Vec<_>>>);
    let mut files: Vec<PathBuf> = entries.map_err(ModelError::io(dir))?.into_iter().map(|entry| entry.path()).collect();
    files.retain(|file| file.file_name() != Some("README.md".as_ref()));
    files.sort();
    let mut hasher = blake3::Hasher::new();
    for file in files {
        let open = File::open(&file).map_err(ModelError::io(&file))?;
        let size = open.metadata().map_err(ModelError::io(&file))?.len();
        hasher.update(file.file_name().unwrap_or_default().as_encoded_bytes()).update(&size.to_le_bytes());
        hasher.update_reader(open).map_err(ModelError::io(&file))?;
    }
    Ok(hasher.finalize().to_hex().to_string())
}

/// `rope_scaling` of config.json; `None` where it has no form there.
///
/// GGUF has Llama 3.1's scaling as a divisor for each frequency. All of Meta's models have the same
/// constants but for the factor, which is the largest divisor; that they are these is checked.
fn scaling_json(rope: &RopeConfig) -> Option<Json> {
    let RopeScaling::Divisors { divisors, attention_factor } = &rope.scaling else {
        return match rope.scaling {
            RopeScaling::None => Some(Json::Null),
            RopeScaling::Linear { factor } => Some(json!({"rope_type": "linear", "factor": factor})),
            _ => None,
        };
    };
    let factor = divisors.iter().copied().fold(1.0, f64::max);
    let (low_freq_factor, high_freq_factor, original_max_position_embeddings) = (1.0, 4.0, 8192.0);
    let llama3 = RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings };
    let (expected, _) = RopeConfig { scaling: llama3, ..rope.clone() }.frequencies();
    let (found, _) = rope.frequencies();
    let same = expected.iter().zip(&found).all(|(a, b)| (a - b).abs() <= 1e-5 * a.abs());
    (same && *attention_factor == 1.0).then(|| {
        json!({
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": low_freq_factor,
            "high_freq_factor": high_freq_factor,
            "original_max_position_embeddings": original_max_position_embeddings as u64,
        })
    })
}

/// The name that `path` has until it is whole.
pub(super) fn partial(path: &Path) -> Result<PathBuf, ModelError> {
    let name = path.file_name().ok_or_else(|| ModelError::file(path, "is no name for an export; name a new path"))?;
    let mut name = name.to_owned();
    name.push(".partial");
    let partial = path.with_file_name(name);
    if partial.exists() {
        let message = "is there already, perhaps from an export that was cut short; remove it, or name another --out";
        return Err(ModelError::file(partial, message));
    }
    let parent = path.parent().unwrap_or(path);
    std::fs::create_dir_all(parent).map_err(unwritable(parent))?;
    Ok(partial)
}

/// What could not be written, and what to do.
pub fn unwritable(path: &Path) -> impl FnOnce(std::io::Error) -> ModelError {
    move |e| ModelError::file(path, format!("can't be written: {e}; check the disk's space and permissions"))
}

/// A new directory with what `write` puts into it; it has its name once it is whole.
///
/// # Errors
/// When `dir` is there and not empty, or `write` fails.
pub fn new_directory(dir: &Path, write: impl FnOnce(&Path) -> Result<(), ModelError>) -> Result<(), ModelError> {
    if dir.exists() && !dir.is_dir() {
        return Err(ModelError::file(dir, "is a file; name a new directory"));
    }
    if dir.read_dir().is_ok_and(|mut entries| entries.next().is_some()) {
        return Err(ModelError::file(dir, "is not empty; name a new directory"));
    }
    let partial = partial(dir)?;
    let written = std::fs::create_dir(&partial).map_err(unwritable(&partial)).and_then(|()| write(&partial));
    finish(&partial, dir, written)
}

/// Gives what was written its name, or takes it away again.
pub(super) fn finish(partial: &Path, path: &Path, written: Result<(), ModelError>) -> Result<(), ModelError> {
    let named = written.and_then(|()| std::fs::rename(partial, path).map_err(unwritable(path)));
    if named.is_err() {
        let _ = if partial.is_dir() { std::fs::remove_dir_all(partial) } else { std::fs::remove_file(partial) };
    }
    named
}

fn write_json(path: &Path, json: &Json) -> Result<(), ModelError> {
    let text = serde_json::to_string_pretty(json).unwrap_or_default();
    std::fs::write(path, text + "\n").map_err(unwritable(path))
}

/// The file that is written.
pub(super) struct Output<'a> {
    path: &'a Path,
    out: BufWriter<File>,
    position: u64,
}

impl<'a> Output<'a> {
    pub fn new(path: &'a Path) -> Result<Self, ModelError> {
        let file = File::create_new(path).map_err(unwritable(path))?;
        Ok(Self { path, out: BufWriter::new(file), position: 0 })
    }

    pub fn write(&mut self, bytes: &[u8]) -> Result<(), ModelError> {
        self.position += bytes.len() as u64;
        self.out.write_all(bytes).map_err(unwritable(self.path))
    }

    pub fn align(&mut self, alignment: u64) -> Result<(), ModelError> {
        self.write(&vec![0; (self.position.next_multiple_of(alignment) - self.position) as usize])
    }

    /// Rounds a float32 tensor to `kind`, piece by piece.
    pub fn tensor(&mut self, name: &str, tensor: &Tensor, kind: Kind) -> Result<(), ModelError> {
        let flat = tensor.f_contiguous().and_then(|t| t.f_view([-1])).map_err(TorchError::from)?;
        let count = flat.numel() as i64;
        for first in (0..count).step_by(PIECE as usize) {
            let piece = flat.f_narrow(0, first, PIECE.min(count - first)).and_then(|piece| piece.f_to_kind(kind));
            let piece = piece.map_err(TorchError::from)?;
            let sum = piece.f_sum(Kind::Double).and_then(|sum| sum.f_double_value(&[])).map_err(TorchError::from)?;
            if !sum.is_finite() {
                let message = format!("has numbers that {kind:?} can't hold; export with --dtype bf16 or f32");
                return Err(ModelError::tensor(self.path, name, message));
            }
            bytes_mut(&piece, |bytes| self.write(bytes))??;
        }
        Ok(())
    }

    pub fn finish(self) -> Result<(), ModelError> {
        let file = self.out.into_inner().map_err(|e| unwritable(self.path)(e.into_error()))?;
        file.sync_all().map_err(unwritable(self.path))
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::model::attention::Tree;
    use crate::model::{Adapters, ModelOptions, Source, Transformer};
    use crate::torch::GradGuard;

    pub fn open(source: &str) -> Pretrained {
        let base = Path::new(env!("CARGO_MANIFEST_DIR"));
        Pretrained::open(&Source::parse(source, base).unwrap(), &ModelOptions::default()).unwrap()
    }

    pub fn logits(model: &Pretrained, lora: Option<&Lora>) -> Tensor {
        let _no_grad = GradGuard::set(false);
        let transformer = Transformer::load(model.config.clone(), &model.weights, Kind::Float, Device::Cpu).unwrap();
        let mut tree = Tree::new(&[3, 1, 4, 1, 5, 9, 2, 6], &[], transformer.heads()).unwrap();
        let (ids, positions) = (tree.ids.shallow_clone(), tree.positions.shallow_clone());
        let hidden = transformer.hidden(&ids, &positions, &mut tree, &Adapters::from(lora)).unwrap();
        transformer.logits(&hidden.narrow(0, 0, 8)).unwrap()
    }

    pub fn same(a: &Tensor, b: &Tensor) -> bool {
        (a - b).abs().max().double_value(&[]) < 1e-5
    }

    #[test]
    fn a_merged_directory_answers_as_base_and_adapter() {
        let (base, lora) = tiny();
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("merged");
        let export = Export { base: &base, change: Some(Change::Adapter(&lora)), kind: Kind::Float };
        export.directory(&out).unwrap();
        let expected = logits(&base, Some(&lora));
        assert!(same(&logits(&open(&out.display().to_string()), None), &expected));
        assert!(!same(&logits(&base, None), &expected));
        let message = export.directory(&out).unwrap_err().to_string();
        assert!(message.contains("is not empty"), "{message}");
        let file = dir.path().join("merged.gguf");
        export.gguf(&file).unwrap();
        assert!(same(&logits(&open(&file.display().to_string()), None), &expected));
        std::fs::remove_file(file).unwrap();
        assert_eq!(dir.path().read_dir().unwrap().count(), 1, "nothing half-written stays");
    }

    fn tiny() -> (Pretrained, Lora) {
        let base = open("tests/fixtures/tiny-llama");
        let adapter = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tiny-llama/adapter");
        let lora = Lora::load(&adapter, &base.config, Device::Cpu).unwrap();
        (base, lora)
    }

    #[test]
    fn what_is_there_is_never_touched() {
        let (base, lora) = tiny();
        let export = Export { base: &base, change: Some(Change::Adapter(&lora)), kind: Kind::Float };
        let dir = tempfile::tempdir().unwrap();
        let note = dir.path().join("x.partial/note");
        std::fs::create_dir(dir.path().join("x.partial")).unwrap();
        std::fs::write(&note, "mine").unwrap();
        let message = export.directory(&dir.path().join("x")).unwrap_err().to_string();
        assert!(message.contains("x.partial: is there already"), "{message}");
        let message = export.directory(&note).unwrap_err().to_string();
        assert!(message.contains("note: is a file"), "{message}");
        assert_eq!(std::fs::read_to_string(&note).unwrap(), "mine");
        assert!(!dir.path().join("x").exists());
        export.directory(&dir.path().join("new/parent/y")).unwrap();
    }

    #[test]
    fn numbers_beyond_the_dtype_are_refused() {
        let (base, mut lora) = tiny();
        let large: Vec<Tensor> = lora.named().map(|(_, tensor)| tensor * 1e5).collect();
        lora.replace(large);
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("x");
        let export = |kind| Export { base: &base, change: Some(Change::Adapter(&lora)), kind }.directory(&out);
        let message = export(Kind::Half).unwrap_err().to_string();
        assert!(message.contains("tensor model.layers.0.") && message.contains("--dtype bf16 or f32"), "{message}");
        assert_eq!(dir.path().read_dir().unwrap().count(), 0, "nothing half-written stays");
        export(Kind::BFloat16).unwrap();
    }

    #[test]
    fn a_template_of_the_runs_own_goes_along() {
        let source = Source::Directory(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tiny-llama"));
        let options = ModelOptions { chat_template: Some("{{ messages[0].content }}".into()), ..Default::default() };
        let base = Pretrained::open(&source, &options).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("x");
        Export { base: &base, change: None, kind: Kind::BFloat16 }.directory(&out).unwrap();
        assert_eq!(open(&out.display().to_string()).template(), Some("{{ messages[0].content }}"));
    }

    #[test]
    fn the_divisors_of_llama_3_become_its_scaling_again() {
        let scaling = RopeScaling::Llama3 {
            factor: 32.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position_embeddings: 8192.0,
        };
        let llama = RopeConfig { theta: 5e5, dims: 64, scaling };
        let plain = RopeConfig { scaling: RopeScaling::None, ..llama.clone() };
        // As GGUF has them, in float32.
        let divisors: Vec<f64> =
            plain.frequencies().0.iter().zip(llama.frequencies().0).map(|(p, f)| f64::from((p / f) as f32)).collect();
        let stored = |divisors| RopeConfig {
            scaling: RopeScaling::Divisors { divisors, attention_factor: 1.0 },
            ..llama.clone()
        };
        let json = scaling_json(&stored(divisors.clone())).unwrap();
        assert_eq!((&json["rope_type"], &json["factor"]), (&json!("llama3"), &json!(32.0)));
        let mut other = divisors;
        other[20] *= 1.01;
        assert_eq!(scaling_json(&stored(other)), None);
    }

    /// From GGUF to a directory and to another GGUF file, and both back.
    #[test]
    fn a_gguf_base_is_written_in_both_forms() {
        let base = open("builtin:smollm2-135m");
        let dir = tempfile::tempdir().unwrap();
        let (tree, file) = (dir.path().join("merged"), dir.path().join("merged.gguf"));
        let export = Export { base: &base, change: None, kind: Kind::Float };
        export.directory(&tree).unwrap();
        export.gguf(&file).unwrap();
        let expected = logits(&base, None);
        for written in [&tree, &file] {
            let model = open(&written.display().to_string());
            assert_eq!(model.config.eos_ids, base.config.eos_ids);
            assert_eq!(model.template(), base.template());
            let text = "Hello 42 <|im_start|>user\nnaïve <|im_end|>";
            let ids = |model: &Pretrained| model.tokenizer.encode(text, true).unwrap();
            assert_eq!(ids(&model), ids(&base));
            assert!(same(&logits(&model, None), &expected), "{}", written.display());
        }
        assert_eq!(open(&file.display().to_string()).weights.stored().len(), 1);
    }
}
