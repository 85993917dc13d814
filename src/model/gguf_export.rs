//! A model written as one GGUF file for llama.cpp, with an adapter merged into its weights.
//!
//! A base that is a GGUF file itself keeps its metadata and tokenizer as they are; from a Hugging Face
//! directory they are made, as llama.cpp's `convert_hf_to_gguf.py` makes them. Weights are not
//! quantised, vectors stay in float32.

use std::path::Path;

use tch::{Kind, Tensor};

use super::ModelError;
use super::config::{Activation, Config};
use super::export::{Entry, Export, Output, finish, partial};
use super::gguf::{Gguf, Metadata};
use super::rope::{RopeConfig, RopeScaling};
use super::weights::{Weights, gguf_name, interleaved};
use crate::torch::TorchError;

/// How most of the tensors are stored.
const FILE_TYPE: &str = "general.file_type";
const TEMPLATE: &str = "tokenizer.chat_template";
const DEFAULT_ALIGNMENT: u64 = 32;
/// Divisors of the rotary frequencies.
const ROPE_FREQS: &str = "rope_freqs.weight";

/// All of the file that is no weight under Hugging Face's names.
struct Head {
    /// The number of metadata entries, and all of them.
    metadata: (u64, Vec<u8>),
    /// Tensors without a counterpart in Hugging Face's names, in float32.
    extra: Vec<(String, Tensor)>,
    alignment: u64,
    /// Whether rows of q and k are stored interleaved, as for llama.
    interleaved: bool,
}

impl Export<'_> {
    /// Writes one GGUF file, weights not quantised, vectors in float32.
    ///
    /// # Errors
    /// When the model or its tokenizer has no form in GGUF, `path` is there, or the disk is full.
    pub fn gguf(&self, path: &Path) -> Result<(), ModelError> {
        if path.exists() {
            return Err(ModelError::file(path, "is there already; name a new file"));
        }
        let head = match &self.base.weights {
            Weights::Gguf(base) => self.head_of_gguf(base.file())?,
            _ => self.head_of_directory()?,
        };
        let partial = partial(path)?;
        let written = self.write_gguf(&head, &partial).and_then(|()| self.check(&partial));
        finish(&partial, path, written)
    }

    fn head_of_gguf(&self, base: &Gguf) -> Result<Head, ModelError> {
        if base.metadata().text(TEMPLATE) != self.base.template() {
            return Err(ModelError::Setting(
                "a GGUF file keeps its own chat template, and the run has another; export a directory".into(),
            ));
        }
        let known: Vec<_> = self.entries()?.iter().filter_map(|entry| gguf_name(&entry.name)).collect();
        let mut extra: Vec<&str> =
            base.tensor_names().filter(|name| !known.iter().any(|known| known == name)).collect();
        extra.sort_unstable();
        let read = |name: &str| {
            let mut values = Vec::new();
            let info = base.tensor(name);
            base.read_rows(name, 0, info.map_or(0, |info| info.rows()), &mut values)?;
            let shape: Vec<i64> = info.map(|info| info.shape.iter().map(|n| *n as i64).collect()).unwrap_or_default();
            let tensor = Tensor::f_from_slice(&values).and_then(|tensor| tensor.f_view(shape.as_slice()));
            Ok((name.to_owned(), tensor.map_err(TorchError::from)?))
        };
        let extra = extra.into_iter().map(read).collect::<Result<_, ModelError>>()?;
        let (count, mut bytes) = base.raw_metadata()?;
        set_file_type(&mut bytes, self.kind);
        Ok(Head {
            metadata: (count, bytes),
            extra,
            alignment: base.metadata().unsigned("general.alignment").unwrap_or(DEFAULT_ALIGNMENT),
            interleaved: base.metadata().text("general.architecture") == Some("llama"),
        })
    }

    fn head_of_directory(&self) -> Result<Head, ModelError> {
        let refused = |what: String| {
            let message = format!("{}: no GGUF file can be made: {what}; export a directory", self.base.source);
            ModelError::Setting(message)
        };
        let config = &self.base.config;
        let name = architecture(config).map_err(refused)?;
        let mut metadata = self
            .base
            .tokenizer
            .metadata(config.vocab_size)
            .map_err(|what| refused(format!("its tokenizer can't be expressed ({what})")))?;
        sizes(config, name, &mut metadata).map_err(refused)?;
        metadata.put(FILE_TYPE, gguf_types(self.kind).1);
        if let Some(template) = self.base.template() {
            metadata.put(TEMPLATE, template);
        }
        Ok(Head {
            metadata: metadata.bytes(),
            extra: rope_freqs(&config.rope)?.into_iter().map(|tensor| (ROPE_FREQS.to_owned(), tensor)).collect(),
            alignment: DEFAULT_ALIGNMENT,
            interleaved: name == "llama",
        })
    }

    fn write_gguf(&self, head: &Head, path: &Path) -> Result<(), ModelError> {
        // Buffers that old directories have beside their weights stay behind.
        let mut entries = self.entries()?;
        entries.retain(|entry| gguf_name(&entry.name).is_some());
        let mut out = Output::new(path)?;
        out.write(&self.head_bytes(head, &entries))?;
        for entry in &entries {
            let mut weight = self.merged(entry)?;
            if head.interleaved && is_rotated(&entry.name) {
                weight = interleaved(&weight, self.base.config.head_dim)?;
            }
            out.align(head.alignment)?;
            out.tensor(&entry.name, &weight, self.gguf_kind(entry))?;
        }
        for (name, tensor) in &head.extra {
            out.align(head.alignment)?;
            out.tensor(name, tensor, Kind::Float)?;
        }
        out.finish()
    }

    fn head_bytes(&self, head: &Head, entries: &[Entry]) -> Vec<u8> {
        let (count, metadata) = &head.metadata;
        let mut infos = Vec::new();
        let mut offset = 0;
        let mut push = |name: &str, shape: &[usize], kind: Kind| {
            push_info(&mut infos, name, shape, kind, offset);
            let bytes = shape.iter().product::<usize>() * kind.elt_size_in_bytes();
            offset = (offset + bytes as u64).next_multiple_of(head.alignment);
        };
        for entry in entries {
            push(&gguf_name(&entry.name).unwrap_or_default(), &entry.shape, self.gguf_kind(entry));
        }
        for (name, tensor) in &head.extra {
            let shape: Vec<usize> = tensor.size().iter().map(|n| *n as usize).collect();
            push(name, &shape, Kind::Float);
        }
        [
            b"GGUF".as_slice(),
            &3_u32.to_le_bytes(),
            &((entries.len() + head.extra.len()) as u64).to_le_bytes(),
            &count.to_le_bytes(),
            metadata,
            &infos,
        ]
        .concat()
    }

    /// llama.cpp keeps vectors in float32.
    fn gguf_kind(&self, entry: &Entry) -> Kind {
        if entry.shape.len() < 2 { Kind::Float } else { self.kind }
    }

    /// What was written is the model that it was made of, as far as its header tells.
    fn check(&self, path: &Path) -> Result<(), ModelError> {
        let read = Config::from_gguf(&Gguf::open(path)?)?;
        let base = &self.base.config;
        let rope = base.rope.clone();
        let eos_ids = base.eos_ids.clone();
        let comparable =
            Config { architecture: base.architecture.clone(), bos_id: base.bos_id, eos_ids, rope, ..read.clone() };
        let (expected, found) = (base.rope.frequencies(), read.rope.frequencies());
        let turns = expected.0.iter().zip(&found.0).all(|(a, b)| (a - b).abs() <= 1e-6 * a.abs());
        if comparable == *base && turns && expected.1 == found.1 {
            return Ok(());
        }
        let message = format!("{}: its configuration has no form in GGUF; export a directory", self.base.source);
        Err(ModelError::Setting(message))
    }
}

/// The name that llama.cpp has for the family.
fn architecture(config: &Config) -> Result<&'static str, String> {
    match config.architecture.as_str() {
        // llama.cpp stores Mistral as llama too.
        "LlamaForCausalLM" | "MistralForCausalLM" => Ok("llama"),
        "Qwen2ForCausalLM" => Ok("qwen2"),
        "Qwen3ForCausalLM" => Ok("qwen3"),
        other => Err(format!("{other} is not among the families that are written (llama, mistral, qwen2, qwen3)")),
    }
}

fn sizes(config: &Config, name: &str, metadata: &mut Metadata) -> Result<(), String> {
    metadata.put("general.architecture", name);
    let window = config.window.filter(|_| config.layer_kinds.iter().any(|kind| kind.local));
    if config.activation != Activation::Silu {
        return Err("its activation is not SiLU".into());
    }
    let numbers = [
        ("vocab_size", Some(config.vocab_size)),
        ("block_count", Some(config.layers)),
        ("context_length", Some(config.max_position_embeddings)),
        ("embedding_length", Some(config.hidden_size)),
        ("feed_forward_length", Some(config.intermediate_size)),
        ("attention.head_count", Some(config.heads)),
        ("attention.head_count_kv", Some(config.kv_heads)),
        ("attention.key_length", Some(config.head_dim)),
        ("attention.value_length", Some(config.head_dim)),
        ("attention.sliding_window", window),
        ("rope.dimension_count", Some(config.head_dim)),
    ];
    for (key, number) in numbers {
        let Some(number) = number else { continue };
        let number = u32::try_from(number).map_err(|_| format!("{key} is {number}"))?;
        metadata.put(format!("{name}.{key}"), number);
    }
    metadata.put(format!("{name}.attention.layer_norm_rms_epsilon"), config.rms_norm_eps as f32);
    metadata.put(format!("{name}.rope.freq_base"), config.rope.theta as f32);
    match config.rope.scaling {
        RopeScaling::None | RopeScaling::Llama3 { .. } => Ok(()),
        RopeScaling::Linear { factor } => {
            metadata.put(format!("{name}.rope.scaling.type"), "linear");
            metadata.put(format!("{name}.rope.scaling.factor"), factor as f32);
            Ok(())
        }
        _ => Err("its rotary frequencies are scaled neither as Llama 3's nor linearly".into()),
    }
}

/// Llama 3's scaling as a divisor for each frequency.
fn rope_freqs(rope: &RopeConfig) -> Result<Option<Tensor>, TorchError> {
    let RopeScaling::Llama3 { .. } = rope.scaling else { return Ok(None) };
    let (plain, _) = RopeConfig { scaling: RopeScaling::None, ..rope.clone() }.frequencies();
    let (scaled, _) = rope.frequencies();
    let divisors: Vec<f32> = plain.iter().zip(scaled).map(|(plain, scaled)| (plain / scaled) as f32).collect();
    Ok(Some(Tensor::f_from_slice(&divisors)?))
}

/// q and k, whose rows llama.cpp keeps in another order.
fn is_rotated(name: &str) -> bool {
    name.contains("self_attn.q_proj.") || name.contains("self_attn.k_proj.")
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

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use serde_json::{Value as Json, json};

    use super::*;
    use crate::model::export::tests::{logits, open, same};

    fn fixtures() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")
    }

    fn read(path: &Path) -> Json {
        serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
    }

    /// A model of a family's fixture with another fixture's tokenizer, and more embeddings than tokens.
    fn directory(family: &str, tokenizer: &str, at: &Path) {
        std::fs::create_dir(at).unwrap();
        let (family, tokenizer) =
            (fixtures().join("families").join(family), fixtures().join("tokenizers").join(tokenizer));
        for name in ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"] {
            if tokenizer.join(name).exists() {
                std::fs::copy(tokenizer.join(name), at.join(name)).unwrap();
            }
        }
        let rows = read(&tokenizer.join("expected.json"))["size"].as_i64().unwrap() + 5;
        let mut config = read(&family.join("config.json"));
        config["vocab_size"] = json!(rows);
        std::fs::write(at.join("config.json"), config.to_string()).unwrap();
        let mut tensors = Tensor::read_safetensors(family.join("model.safetensors")).unwrap();
        for (name, tensor) in &mut tensors {
            if name.contains("embed_tokens") || name.contains("lm_head") {
                let of_row = |row: i64| tensor.get(row % tensor.size()[0]) * (1.0 + row as f64 / 1e3);
                *tensor = Tensor::stack(&(0..rows).map(of_row).collect::<Vec<_>>(), 0);
            }
        }
        Tensor::write_safetensors(&tensors, at.join("model.safetensors")).unwrap();
    }

    /// Families, their scaling and biases, and tokenizers of every kind, to a file and back.
    #[test]
    fn a_directory_becomes_a_file_that_answers_the_same() {
        for (family, tokenizer) in [
            ("llama3", "llama3"),
            ("qwen2", "qwen2"),
            ("qwen3", "qwen2"),
            ("mistral", "llama2-legacy"),
            ("llama-linear", "gemma"),
            ("llama-biases", "llama3"),
        ] {
            let dir = tempfile::tempdir().unwrap();
            let (tree, file) = (dir.path().join("base"), dir.path().join("x.gguf"));
            directory(family, tokenizer, &tree);
            let base = open(&tree.display().to_string());
            let export = Export { base: &base, change: None, kind: Kind::Float };
            export.gguf(&file).unwrap_or_else(|e| panic!("{family} {tokenizer}: {e}"));
            let written = open(&file.display().to_string());
            assert!(same(&logits(&written, None), &logits(&base, None)), "{family}");
            // A file has more ends: those of known text.
            assert!(written.tokenizer.eos_ids().starts_with(base.tokenizer.eos_ids()), "{family}");
            assert_eq!(written.template(), base.template());
            let expected = read(&fixtures().join("tokenizers").join(tokenizer).join("expected.json"));
            for row in expected["rows"].as_array().unwrap() {
                let text = row["text"].as_str().unwrap();
                for framed in [true, false] {
                    let ids = base.tokenizer.encode(text, framed).unwrap();
                    assert_eq!(written.tokenizer.encode(text, framed).unwrap(), ids, "{tokenizer} {text:?}");
                    let decode = |of: &crate::model::Tokenizer| of.decode(&ids, true).unwrap();
                    assert_eq!(decode(&written.tokenizer), decode(&base.tokenizer), "{tokenizer} {text:?}");
                }
            }
        }
    }

    #[test]
    fn what_has_no_form_is_refused() {
        for (family, tokenizer, part) in [
            ("gemma2", "gemma", "Gemma2ForCausalLM is not among the families"),
            ("llama-yarn", "llama3", "its rotary frequencies are scaled"),
            ("qwen2", "llama2", "a word's start is marked"),
            ("llama3", "tokens-in-the-map", "its rules for \"a<mask>b <mask> c\""),
            ("qwen2-window", "qwen2", "its configuration has no form"),
        ] {
            let dir = tempfile::tempdir().unwrap();
            let (tree, file) = (dir.path().join("base"), dir.path().join("x.gguf"));
            directory(family, tokenizer, &tree);
            let base = open(&tree.display().to_string());
            let message = Export { base: &base, change: None, kind: Kind::Float }.gguf(&file).unwrap_err().to_string();
            assert!(message.contains(part) && message.contains("export a directory"), "{message}");
            assert_eq!(dir.path().read_dir().unwrap().count(), 1, "nothing half-written stays");
        }
    }
}
