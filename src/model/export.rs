//! A model written out for other programs: a Hugging Face directory, or a GGUF file, with an adapter
//! merged into its weights.
//!
//! A weight is `W + scale * B A` in float32 and rounded once, one tensor at a time. What is written has a
//! temporary name until it is whole.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use serde_json::{Value as Json, json};
use tch::{Device, Kind, Tensor};

use super::config::Config;
use super::gguf::Gguf;
use super::rope::RopeScaling;
use super::source::Pretrained;
use super::weights::{Weights, gguf_name, interleaved};
use super::{Lora, ModelError};
use crate::torch::{TorchError, bytes_mut};

/// Bytes of a shard, as transformers cuts them.
const SHARD: u64 = 5_000_000_000;
/// Where GGUF files keep how most of their tensors are stored.
const FILE_TYPE: &str = "general.file_type";
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

/// A base with an adapter, on its way out.
pub struct Export<'a> {
    pub base: &'a Pretrained,
    pub lora: Option<&'a Lora>,
    /// bf16, f16 or f32.
    pub kind: Kind,
}

/// A tensor that will be written.
#[derive(Clone)]
struct Entry {
    name: String,
    shape: Vec<usize>,
    bytes: u64,
}

impl Export<'_> {
    /// Writes a directory that transformers, vLLM and flowrun load.
    ///
    /// # Errors
    /// When `dir` is there and not empty, the model can't be expressed, or the disk is full.
    pub fn directory(&self, dir: &Path) -> Result<(), ModelError> {
        if dir.read_dir().is_ok_and(|mut entries| entries.next().is_some()) {
            return Err(ModelError::file(dir, "is not empty; name a new directory"));
        }
        let partial = partial(dir);
        let written = self.write_directory(&partial);
        finish(&partial, dir, written)
    }

    fn write_directory(&self, dir: &Path) -> Result<(), ModelError> {
        std::fs::create_dir_all(dir).map_err(ModelError::io(dir))?;
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
    fn entries(&self) -> Result<Vec<Entry>, ModelError> {
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

    /// The weight in float32, the adapter merged.
    fn merged(&self, entry: &Entry) -> Result<Tensor, ModelError> {
        let weight = self.base.weights.tensor(&entry.name, &entry.shape, Kind::Float, Device::Cpu)?;
        let module = entry.name.strip_suffix(".weight").unwrap_or(&entry.name);
        Ok(match self.lora.map(|lora| lora.change(module)).transpose()?.flatten() {
            Some(change) => weight.f_add(&change).map_err(TorchError::from)?,
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
        let mut out = BufWriter::new(File::create(path).map_err(ModelError::io(path))?);
        out.write_all(&(header.len() as u64).to_le_bytes()).map_err(ModelError::io(path))?;
        out.write_all(header.as_bytes()).map_err(ModelError::io(path))?;
        for entry in entries {
            write_tensor(&mut out, &self.merged(entry)?, self.kind, path)?;
        }
        out.into_inner().map_err(|e| ModelError::io(path)(e.into_error()))?.sync_all().map_err(ModelError::io(path))
    }

    fn write_texts(&self, dir: &Path) -> Result<(), ModelError> {
        let Weights::Gguf(_) = &self.base.weights else {
            let from = self.base.files().first().and_then(|file| file.parent()).unwrap_or(Path::new(""));
            for name in TEXTS.iter().filter(|name| from.join(name).is_file()) {
                std::fs::copy(from.join(name), dir.join(name)).map_err(ModelError::io(&from.join(name)))?;
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
        let scaling = match &c.rope.scaling {
            RopeScaling::None => json!(null),
            RopeScaling::Linear { factor } => json!({"rope_type": "linear", "factor": factor}),
            _ => {
                let message = "rotary frequencies of this GGUF file have no form in config.json; export --format gguf";
                return Err(ModelError::Setting(message.into()));
            }
        };
        Ok(json!({
            "architectures": [c.architecture],
            "model_type": model_type(c),
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
            "tie_word_embeddings": c.tie_word_embeddings,
            "attention_bias": c.qkv_bias && c.o_bias,
            "mlp_bias": c.mlp_bias,
            "bos_token_id": c.bos_id,
            "eos_token_id": c.eos_ids.first(),
            "torch_dtype": self.dtype_name(),
        }))
    }

    /// Writes one GGUF file from a base that is one: its metadata and tokenizer as they are, weights not
    /// quantised, norms in float32.
    ///
    /// # Errors
    /// When the base is no GGUF file, `path` is there, or the disk is full.
    pub fn gguf(&self, path: &Path) -> Result<(), ModelError> {
        let Weights::Gguf(base) = &self.base.weights else {
            let message = "a GGUF file is made from a GGUF base; export a directory, and convert_hf_to_gguf.py of \
                           llama.cpp makes one of it";
            return Err(ModelError::Setting(message.into()));
        };
        if path.exists() {
            return Err(ModelError::file(path, "is there already; name a new file"));
        }
        let partial = partial(path);
        let written = self.write_gguf(base.file(), &partial);
        finish(&partial, path, written)
    }

    fn write_gguf(&self, base: &Gguf, path: &Path) -> Result<(), ModelError> {
        let entries = self.entries()?;
        // What has no counterpart in Hugging Face's names (rotary divisors) is copied.
        let mut extra: Vec<&str> = base
            .tensor_names()
            .filter(|name| !entries.iter().any(|e| gguf_name(&e.name).as_deref() == Some(name)))
            .collect();
        extra.sort_unstable();
        let (count, mut metadata) = base.raw_metadata()?;
        set_file_type(&mut metadata, self.kind);
        let alignment = base.unsigned("general.alignment").unwrap_or(32);
        let mut infos = Vec::new();
        let mut offset = 0;
        for entry in &entries {
            let kind = self.gguf_kind(entry);
            let name = gguf_name(&entry.name).unwrap_or_default();
            push_info(&mut infos, &name, &entry.shape, kind, offset);
            offset += (entry.shape.iter().product::<usize>() * kind.elt_size_in_bytes()) as u64;
            offset = offset.next_multiple_of(alignment);
        }
        for name in &extra {
            let Some(info) = base.tensor(name) else { continue };
            push_info(&mut infos, name, &info.shape, Kind::Float, offset);
            offset = (offset + 4 * info.shape.iter().product::<usize>() as u64).next_multiple_of(alignment);
        }
        let head = [
            b"GGUF".as_slice(),
            &3_u32.to_le_bytes(),
            &((entries.len() + extra.len()) as u64).to_le_bytes(),
            &count.to_le_bytes(),
            &metadata,
            &infos,
        ]
        .concat();
        let out = BufWriter::new(File::create(path).map_err(ModelError::io(path))?);
        let mut out = Aligned { out, position: 0, alignment };
        out.write(&head).map_err(ModelError::io(path))?;
        for entry in &entries {
            let mut weight = self.merged(entry)?;
            if base.text("general.architecture") == Some("llama") && is_rotated(&entry.name) {
                weight = interleaved(&weight, self.base.config.head_dim)?;
            }
            let bytes = to_bytes(&weight, self.gguf_kind(entry))?;
            out.write(&bytes).map_err(ModelError::io(path))?;
        }
        for name in &extra {
            let mut values = Vec::new();
            let rows = base.tensor(name).map_or(0, |info| info.rows());
            base.read_rows(name, 0, rows, &mut values)?;
            let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
            out.write(&bytes).map_err(ModelError::io(path))?;
        }
        let file = out.out.into_inner().map_err(|e| ModelError::io(path)(e.into_error()))?;
        file.sync_all().map_err(ModelError::io(path))
    }

    /// llama.cpp keeps vectors in float32.
    fn gguf_kind(&self, entry: &Entry) -> Kind {
        if entry.shape.len() < 2 { Kind::Float } else { self.kind }
    }
}

fn model_type(config: &Config) -> &'static str {
    match config.architecture.as_str() {
        "Qwen2ForCausalLM" => "qwen2",
        "Qwen3ForCausalLM" => "qwen3",
        _ => "llama",
    }
}

/// q and k, whose rows llama.cpp keeps in another order.
fn is_rotated(name: &str) -> bool {
    name.contains("self_attn.q_proj.") || name.contains("self_attn.k_proj.")
}

/// The name a file or directory has until it is whole.
fn partial(path: &Path) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".partial");
    path.with_file_name(name)
}

/// Gives what was written its name, or takes it away again.
fn finish(partial: &Path, path: &Path, written: Result<(), ModelError>) -> Result<(), ModelError> {
    let named = written.and_then(|()| std::fs::rename(partial, path).map_err(ModelError::io(path)));
    if named.is_err() {
        let _ = if partial.is_dir() { std::fs::remove_dir_all(partial) } else { std::fs::remove_file(partial) };
    }
    named
}

fn write_json(path: &Path, json: &Json) -> Result<(), ModelError> {
    let text = serde_json::to_string_pretty(json).unwrap_or_default();
    std::fs::write(path, text + "\n").map_err(ModelError::io(path))
}

fn to_bytes(tensor: &Tensor, kind: Kind) -> Result<Vec<u8>, ModelError> {
    let stored = tensor.f_to_kind(kind).and_then(|t| t.f_contiguous()).map_err(TorchError::from)?;
    Ok(bytes_mut(&stored, |bytes| bytes.to_vec())?)
}

fn write_tensor(out: &mut impl Write, tensor: &Tensor, kind: Kind, path: &Path) -> Result<(), ModelError> {
    out.write_all(&to_bytes(tensor, kind)?).map_err(ModelError::io(path))
}

/// A tensor of a GGUF header: name, innermost dimension first, type, place.
fn push_info(infos: &mut Vec<u8>, name: &str, shape: &[usize], kind: Kind, offset: u64) {
    infos.extend((name.len() as u64).to_le_bytes());
    infos.extend(name.as_bytes());
    infos.extend((shape.len() as u32).to_le_bytes());
    shape.iter().rev().for_each(|n| infos.extend((*n as u64).to_le_bytes()));
    let (id, _) = gguf_types(kind);
    infos.extend(id.to_le_bytes());
    infos.extend(offset.to_le_bytes());
}

/// The ids of a tensor's and of a whole file's type.
fn gguf_types(kind: Kind) -> (u32, u32) {
    match kind {
        Kind::Float => (0, 0),
        Kind::Half => (1, 1),
        _ => (30, 32),
    }
}

/// Changes the value of `general.file_type` where it stands: a u32.
fn set_file_type(metadata: &mut [u8], kind: Kind) {
    let key = [&(FILE_TYPE.len() as u64).to_le_bytes(), FILE_TYPE.as_bytes(), &4_u32.to_le_bytes()].concat();
    let place = metadata.windows(key.len()).position(|window| window == key).map(|at| at + key.len());
    if let Some(value) = place.and_then(|at| metadata.get_mut(at..at + 4)) {
        value.copy_from_slice(&gguf_types(kind).1.to_le_bytes());
    }
}

/// A file in which everything begins at a multiple of the alignment.
struct Aligned {
    out: BufWriter<File>,
    position: u64,
    alignment: u64,
}

impl Aligned {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        let gap = self.position.next_multiple_of(self.alignment) - self.position;
        self.out.write_all(&vec![0; gap as usize])?;
        self.position += gap + bytes.len() as u64;
        self.out.write_all(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::attention::Tree;
    use crate::model::{Adapters, ModelOptions, Source, Transformer};
    use crate::torch::GradGuard;

    fn open(source: &str) -> Pretrained {
        let base = Path::new(env!("CARGO_MANIFEST_DIR"));
        Pretrained::open(&Source::parse(source, base).unwrap(), &ModelOptions::default()).unwrap()
    }

    fn logits(model: &Pretrained, lora: Option<&Lora>) -> Tensor {
        let _no_grad = GradGuard::set(false);
        let transformer = Transformer::load(model.config.clone(), &model.weights, Kind::Float, Device::Cpu).unwrap();
        let mut tree = Tree::new(&[3, 1, 4, 1, 5, 9, 2, 6], &[], transformer.heads()).unwrap();
        let (ids, positions) = (tree.ids.shallow_clone(), tree.positions.shallow_clone());
        let hidden = transformer.hidden(&ids, &positions, &mut tree, &Adapters::from(lora)).unwrap();
        transformer.logits(&hidden.narrow(0, 0, 8)).unwrap()
    }

    fn same(a: &Tensor, b: &Tensor) -> bool {
        (a - b).abs().max().double_value(&[]) < 1e-5
    }

    #[test]
    fn a_merged_directory_answers_as_base_and_adapter() {
        let base = open("tests/fixtures/tiny-llama");
        let adapter = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tiny-llama/adapter");
        let lora = Lora::load(&adapter, &base.config, Device::Cpu).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("merged");
        let export = Export { base: &base, lora: Some(&lora), kind: Kind::Float };
        export.directory(&out).unwrap();
        let expected = logits(&base, Some(&lora));
        assert!(same(&logits(&open(&out.display().to_string()), None), &expected));
        assert!(!same(&logits(&base, None), &expected));
        let message = export.directory(&out).unwrap_err().to_string();
        assert!(message.contains("is not empty"), "{message}");
        let message = export.gguf(&dir.path().join("x.gguf")).unwrap_err().to_string();
        assert!(message.contains("is made from a GGUF base"), "{message}");
        assert_eq!(dir.path().read_dir().unwrap().count(), 1, "nothing half-written stays");
    }

    /// From GGUF to a directory and to another GGUF file, and both back.
    #[test]
    fn a_gguf_base_is_written_in_both_forms() {
        let base = open("builtin:smollm2-135m");
        let dir = tempfile::tempdir().unwrap();
        let (tree, file) = (dir.path().join("merged"), dir.path().join("merged.gguf"));
        let export = Export { base: &base, lora: None, kind: Kind::Float };
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
