//! Where a model comes from, and a model opened: everything but the transformer.

use std::fmt;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use chrono::NaiveDate;

use super::ModelError;
use super::chat::{ChatMessage, ChatTemplate, Conversation};
use super::config::Config;
use super::gguf::Gguf;
use super::hub::Hub;
use super::safetensors::Safetensors;
use super::tokenizer::{Tokenizer, read_json, unique};
use super::weights::{Dummy, GgufWeights, Weights};
use crate::flow::HubLogin;
use crate::flow::hub::is_name;

/// The model that `make setup` fetches.
const BUILTIN: (&str, &str) = ("smollm2-135m", "SmolLM2-135M-Instruct.Q4_1.gguf");

/// Files beside the weights of a Hugging Face directory that change what the model does.
const DESCRIPTION: [&str; 6] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
];

/// A model by name, as a flow's `source` has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// `builtin:smollm2-135m`
    Builtin,
    /// A `.gguf` file.
    Gguf(PathBuf),
    /// A directory with config.json, tokenizer.json and safetensors.
    Directory(PathBuf),
    /// `hf://owner/name`, with `@revision` where one is pinned.
    Hub { owner: String, name: String, revision: Option<String> },
}

/// What a flow says about a model beside its source.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ModelOptions {
    /// Takes the place of the template's default system turn.
    pub system_prompt: Option<String>,
    /// The text of a template, in place of the model's own.
    pub chat_template: Option<String>,
    /// Random weights with this seed instead of the model's: config.json is enough then.
    pub dummy_weights: Option<u64>,
    /// The date for a chat template that asks for it; today if none is given.
    pub date: Option<NaiveDate>,
}

impl ModelOptions {
    /// All but the date, which matters to those alone whose template asks for it: each with its length.
    fn update(&self, hasher: &mut blake3::Hasher) {
        let Self { system_prompt, chat_template, dummy_weights, date: _ } = self;
        let mut add = |value: Option<&[u8]>| {
            let length = value.map_or(u64::MAX, |bytes| bytes.len() as u64);
            hasher.update(&length.to_le_bytes()).update(value.unwrap_or_default());
        };
        add(system_prompt.as_ref().map(String::as_bytes));
        add(chat_template.as_ref().map(String::as_bytes));
        add(dummy_weights.map(u64::to_le_bytes).as_ref().map(<[u8; 8]>::as_slice));
    }
}

/// A model opened: its headers are read and checked, its weights are on the disk.
pub struct Pretrained {
    pub source: Source,
    pub config: Config,
    pub weights: Weights,
    pub tokenizer: Tokenizer,
    /// The hub's commit, where the model comes from there.
    pub revision: Option<String>,
    chat: Option<ChatTemplate>,
    /// As the template has it, once it was asked for.
    turn_end: OnceLock<Vec<u32>>,
    stop_ids: OnceLock<Vec<u32>>,
    template: Option<String>,
    options: ModelOptions,
    /// All that was read, in the order in which it is hashed.
    files: Vec<PathBuf>,
}

impl Source {
    /// Reads a source; relative paths are under `base`.
    ///
    /// # Errors
    /// When the text is none of the forms above.
    pub fn parse(text: &str, base: &Path) -> Result<Self, ModelError> {
        if let Some(name) = text.strip_prefix("builtin:") {
            if name != BUILTIN.0 {
                let message = format!("there is no builtin model {name:?}; there is builtin:{}", BUILTIN.0);
                return Err(ModelError::Setting(message));
            }
            return Ok(Self::Builtin);
        }
        if let Some(path) = text.strip_prefix("hf://") {
            return Self::parse_hub(path).ok_or_else(|| {
                ModelError::Setting(format!(
                    "{text:?} names no model; write hf://owner/name or hf://owner/name@revision"
                ))
            });
        }
        let path = base.join(text);
        let is_gguf = path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("gguf"));
        if !is_gguf && !path.exists() && Self::parse_hub(text).is_some() {
            return Err(ModelError::Setting(format!(
                "there is no folder {}; for the model of that name on the hub write source = \"hf://{text}\"",
                path.display()
            )));
        }
        Ok(if is_gguf { Self::Gguf(path) } else { Self::Directory(path) })
    }

    fn parse_hub(path: &str) -> Option<Self> {
        let (path, revision) = match path.split_once('@') {
            Some((path, revision)) => (path, Some(revision)),
            None => (path, None),
        };
        let (owner, name) = path.split_once('/')?;
        let good = |part: &str| is_name(part) && !part.contains('/');
        if !good(owner) || !good(name) || revision.is_some_and(|revision| !is_name(revision)) {
            return None;
        }
        Some(Self::Hub { owner: owner.into(), name: name.into(), revision: revision.map(str::to_owned) })
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Builtin => write!(f, "builtin:{}", BUILTIN.0),
            Self::Gguf(path) | Self::Directory(path) => path.display().fmt(f),
            Self::Hub { owner, name, revision: None } => write!(f, "hf://{owner}/{name}"),
            Self::Hub { owner, name, revision: Some(revision) } => write!(f, "hf://{owner}/{name}@{revision}"),
        }
    }
}

/// The file of the builtin model: in `$FLOWRUN_MODELS`, `./models`, or the project's `models`.
///
/// # Errors
/// Says `make setup` when it is in none of them.
pub fn builtin_path() -> Result<PathBuf, ModelError> {
    let project = Path::new(env!("CARGO_MANIFEST_DIR")).join("models");
    let named = std::env::var_os("FLOWRUN_MODELS").map(PathBuf::from);
    let places = named.into_iter().chain([PathBuf::from("models"), project]);
    places.map(|place| place.join(BUILTIN.1)).find(|path| path.is_file()).ok_or_else(|| {
        ModelError::Setting(format!(
            "builtin:{} is not there: no models/{}; run `make setup`, or set FLOWRUN_MODELS to the directory that has it",
            BUILTIN.0, BUILTIN.1
        ))
    })
}

impl Pretrained {
    /// Opens a model: reads configuration, tokenizer, template and the headers of the weights.
    ///
    /// # Errors
    /// Names the file and what is missing or wrong in it.
    pub fn open(source: &Source, options: &ModelOptions) -> Result<Self, ModelError> {
        Self::open_as(HubLogin::Own, source, options)
    }

    /// As [`Self::open`], where another asks the hub.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn open_as(login: HubLogin, source: &Source, options: &ModelOptions) -> Result<Self, ModelError> {
        match source {
            Source::Builtin => Self::open_gguf(source, &builtin_path()?, options),
            Source::Gguf(path) => Self::open_gguf(source, path, options),
            Source::Directory(dir) => Self::open_dir(source, dir, options),
            Source::Hub { owner, name, revision } => {
                let weights = options.dummy_weights.is_none();
                let snapshot = Hub::from_env(login)?.model(owner, name, revision.as_deref(), weights)?;
                let opened = Self::open_dir(source, &snapshot.dir, options)?;
                Ok(Self { revision: Some(snapshot.revision), ..opened })
            }
        }
    }

    fn open_gguf(source: &Source, path: &Path, options: &ModelOptions) -> Result<Self, ModelError> {
        let gguf = Gguf::open(path)?;
        let config = Config::from_gguf(&gguf)?;
        let tokenizer = Tokenizer::from_gguf(&gguf)?;
        let template = gguf.metadata().text("tokenizer.chat_template").map(str::to_owned);
        let weights = match options.dummy_weights {
            Some(seed) => Weights::Dummy(Dummy::new(seed)),
            None => Weights::Gguf(Box::new(GgufWeights::new(gguf, &config))),
        };
        Self::assemble(source, config, weights, tokenizer, template, options, vec![path.to_owned()])
    }

    fn open_dir(source: &Source, dir: &Path, options: &ModelOptions) -> Result<Self, ModelError> {
        if dir.is_file() {
            return Err(ModelError::file(dir, "is a file; name the folder that it is in, or a .gguf file"));
        }
        let config_file = dir.join("config.json");
        if !config_file.exists() {
            let message =
                "is missing; a model is a .gguf file or a directory with config.json, tokenizer.json and *.safetensors";
            return Err(ModelError::file(config_file, message));
        }
        let config = Config::from_json(&config_file)?;
        let tokenizer = match options.dummy_weights {
            Some(_) if !dir.join("tokenizer.json").exists() => Tokenizer::bytes(&config)?,
            _ => Tokenizer::from_dir(dir, &config)?,
        };
        let weights = match options.dummy_weights {
            Some(seed) => Weights::Dummy(Dummy::new(seed)),
            None => Weights::Safetensors(Safetensors::open(dir)?),
        };
        let mut files: Vec<PathBuf> =
            DESCRIPTION.iter().map(|name| dir.join(name)).filter(|path| path.exists()).collect();
        files.extend(weights.paths());
        Self::assemble(source, config, weights, tokenizer, template_of_dir(dir)?, options, files)
    }

    fn assemble(
        source: &Source,
        config: Config,
        weights: Weights,
        tokenizer: Tokenizer,
        template: Option<String>,
        options: &ModelOptions,
        files: Vec<PathBuf>,
    ) -> Result<Self, ModelError> {
        let template = options.chat_template.clone().or(template);
        let date = options.date.unwrap_or_else(today);
        weights.check(&config)?;
        let compile = |text: &String| {
            ChatTemplate::new(text, options.system_prompt.clone(), date, &tokenizer).and_then(ChatTemplate::checked)
        };
        let chat = template.as_ref().map(compile).transpose()?;
        Ok(Self {
            source: source.clone(),
            config,
            weights,
            tokenizer,
            revision: None,
            chat,
            turn_end: OnceLock::new(),
            stop_ids: OnceLock::new(),
            template,
            options: options.clone(),
            files,
        })
    }

    /// The files that were read: description, then weights.
    pub fn files(&self) -> &[PathBuf] {
        &self.files
    }

    /// The text of the chat template, where there is one.
    pub fn template(&self) -> Option<&str> {
        self.template.as_deref()
    }

    /// The model's chat template.
    ///
    /// # Errors
    /// When it has none: a base model takes plain text.
    pub fn chat(&self) -> Result<&ChatTemplate, ModelError> {
        self.chat.as_ref().ok_or_else(|| {
            ModelError::Setting(format!(
                "{} has no chat template; set chat_template on the model, or template = \"none\" on a sampler, a scorer \
                 or a trainer",
                self.source
            ))
        })
    }

    /// Returns whether there is a chat template.
    pub fn has_chat(&self) -> bool {
        self.chat.is_some()
    }

    /// Returns whether the chat template, where there is one, asks for the date.
    pub fn asks_for_date(&self) -> bool {
        self.chat.as_ref().is_some_and(ChatTemplate::asks_for_date)
    }

    /// The tokens of a conversation up to where the answer begins, see [`ChatTemplate::prompt`].
    ///
    /// # Errors
    /// As [`Self::chat`] and [`ChatTemplate::prompt`].
    pub fn encode_prompt<'a>(&self, conversation: impl Into<Conversation<'a>>) -> Result<Vec<u32>, ModelError> {
        Ok(self.chat()?.opened(&self.tokenizer, conversation)?.into_ids())
    }

    /// Refuses tokens that the model has no embedding of: its tokenizer may know more.
    ///
    /// # Errors
    /// Names the first of them.
    pub fn check_known(&self, ids: &[u32]) -> Result<(), ModelError> {
        let rows = self.config.vocab_size;
        let Some(past) = ids.iter().find(|id| **id as usize >= rows) else { return Ok(()) };
        let text = self.tokenizer.decode(&[*past], false).unwrap_or_default();
        Err(ModelError::Setting(format!(
            "the token {text:?} has the id {past}, and the model has embeddings of {rows}; take it out of the text, or \
             use the tokenizer that the model was trained with"
        )))
    }

    /// The tokens of a conversation, by the chat template and without a second begin-of-text.
    ///
    /// # Errors
    /// As [`Self::chat`] and [`ChatTemplate::render`].
    pub fn encode_chat(&self, messages: &[ChatMessage], add_generation_prompt: bool) -> Result<Vec<u32>, ModelError> {
        self.chat()?.encode(&self.tokenizer, messages, add_generation_prompt)
    }

    /// Tokens that end an answer to a conversation while it is sampled: what the chat template ends a turn with, then
    /// those that the model's files name.
    pub fn stop_ids(&self) -> &[u32] {
        self.stop_ids.get_or_init(|| {
            let ends = |id: &&u32| self.tokenizer.is_special(**id) || self.tokenizer.eos_ids().contains(id);
            let of_turn = self.turn_end().iter().rev().find(ends);
            unique(of_turn.into_iter().chain(self.tokenizer.eos_ids()).copied())
        })
    }

    /// The end of a finished answer of a conversation in training, see [`ChatTemplate::end_of_turn`]; without a
    /// template, or where that ends no turn with a token of its own, the tokenizer's end of text.
    pub fn turn_end(&self) -> &[u32] {
        self.turn_end.get_or_init(|| {
            let of_template = self.chat.as_ref().and_then(|chat| chat.end_of_turn(&self.tokenizer));
            of_template.unwrap_or_else(|| self.end_of_text().to_vec())
        })
    }

    /// The end of a text without chat template in training.
    pub fn end_of_text(&self) -> &[u32] {
        self.tokenizer.eos_ids().get(..1).unwrap_or_default()
    }

    /// A hash of everything the model's answers depend on: all files by name and content, and the
    /// options. It reads every byte.
    ///
    /// # Errors
    /// When a file can't be read any more.
    pub fn content_hash(&self) -> Result<blake3::Hash, ModelError> {
        let mut hasher = blake3::Hasher::new();
        self.options.update(&mut hasher);
        for path in &self.files {
            let name = path.file_name().unwrap_or_default().as_encoded_bytes();
            let mut file = blake3::Hasher::new();
            file.update_reader(File::open(path).map_err(ModelError::io(path))?).map_err(ModelError::io(path))?;
            hasher.update(&(name.len() as u64).to_le_bytes()).update(name).update(file.finalize().as_bytes());
        }
        Ok(hasher.finalize())
    }

    /// Bytes of all files.
    ///
    /// # Errors
    /// When a file is gone.
    pub fn total_bytes(&self) -> Result<u64, ModelError> {
        self.files.iter().map(|path| Ok(std::fs::metadata(path).map_err(ModelError::io(path))?.len())).sum()
    }
}

/// The local date.
pub fn today() -> NaiveDate {
    chrono::Local::now().date_naive()
}

/// chat_template.jinja, or the default template in tokenizer_config.json.
pub(super) fn template_of_dir(dir: &Path) -> Result<Option<String>, ModelError> {
    let path = dir.join("chat_template.jinja");
    if path.exists() {
        return std::fs::read_to_string(&path).map(Some).map_err(ModelError::io(&path));
    }
    let settings = read_json(&dir.join("tokenizer_config.json"))?.unwrap_or_default();
    let template = settings.get("chat_template");
    let named = template.and_then(|list| list.as_array()).into_iter().flatten();
    let default = named.into_iter().find(|entry| entry.get("name").is_some_and(|name| name == "default"));
    let template = default.map_or(template, |entry| entry.get("template"));
    Ok(template.and_then(|text| text.as_str()).map(str::to_owned))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Source, String> {
        Source::parse(text, Path::new("/flows")).map_err(|e| e.to_string())
    }

    #[test]
    fn sources_are_told_apart() {
        assert_eq!(parse("builtin:smollm2-135m"), Ok(Source::Builtin));
        assert_eq!(parse("m/x.GGUF"), Ok(Source::Gguf("/flows/m/x.GGUF".into())));
        assert_eq!(parse("/models/llama"), Ok(Source::Directory("/models/llama".into())));
        for text in ["hf://a/b", "hf://a/b@v1.0"] {
            assert_eq!(parse(text).unwrap().to_string(), text);
        }
        for text in ["hf://a", "hf://a/b/c", "hf://a/", "hf://a/b@", "hf://../b", "builtin:gpt"] {
            assert!(parse(text).is_err(), "{text}");
        }
    }

    const CONFIG: &str = r#"{"architectures": ["LlamaForCausalLM"], "vocab_size": 300, "hidden_size": 64,
        "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4, "max_position_embeddings": 64,
        "eos_token_id": 299}"#;

    #[test]
    fn dummy_weights_need_a_configuration_alone() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("config.json"), CONFIG).unwrap();
        let source = Source::Directory(dir.path().into());
        let options = ModelOptions { dummy_weights: Some(7), ..ModelOptions::default() };
        let model = Pretrained::open(&source, &options).unwrap();
        let ids = model.tokenizer.encode("héllo", true).unwrap();
        assert_eq!((ids.len(), model.tokenizer.decode(&ids, true).unwrap()), (6, "héllo".to_owned()));
        assert_eq!(model.tokenizer.decode(&[290, 65, 257], true).unwrap().matches('<').count(), 2);
        let text = model.tokenizer.decode(&[290, 257, 280], true).unwrap();
        assert_eq!(model.tokenizer.encode(&text, false).unwrap(), [290, 257, 280], "{text}");
        assert_eq!(model.stop_ids(), [299]);
        assert!(model.chat().err().unwrap().to_string().contains("set chat_template on the model"));
        let again = Pretrained::open(&source, &options).unwrap();
        assert_eq!(model.content_hash().unwrap(), again.content_hash().unwrap());
        let other = ModelOptions { dummy_weights: Some(8), ..ModelOptions::default() };
        let other = Pretrained::open(&source, &other).unwrap();
        assert_ne!(model.content_hash().unwrap(), other.content_hash().unwrap());
        let message = Pretrained::open(&source, &ModelOptions::default()).err().unwrap().to_string();
        assert!(message.contains("tokenizer.json: is missing"), "{message}");
    }

    #[test]
    fn a_name_of_the_hub_that_is_no_folder_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let parse = |text: &str| Source::parse(text, dir.path()).map_err(|e| e.to_string());
        for text in ["meta-llama/Llama-3.2-1B", "Qwen/Qwen3-0.6B@main"] {
            let message = parse(text).unwrap_err();
            assert!(message.contains(&format!("write source = \"hf://{text}\"")), "{message}");
        }
        std::fs::create_dir_all(dir.path().join("models/llama")).unwrap();
        for text in ["models/llama", "./models/other", "llama", "a/b/c"] {
            assert!(matches!(parse(text), Ok(Source::Directory(_))), "{text}");
        }
    }

    #[test]
    fn a_tokenizer_that_knows_more_than_the_model_is_told_where_it_matters() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("config.json"), CONFIG).unwrap();
        let other = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tokenizers/llama3/tokenizer.json");
        std::fs::copy(other, dir.path().join("tokenizer.json")).unwrap();
        let options = ModelOptions { dummy_weights: Some(7), ..ModelOptions::default() };
        let model = Pretrained::open(&Source::Directory(dir.path().into()), &options).unwrap();
        assert!(model.tokenizer.vocab_size() > model.config.vocab_size);
        let past = model.tokenizer.token_to_id("<|eot_id|>").unwrap();
        assert!(model.check_known(&[0, 299]).is_ok());
        let message = model.check_known(&[7, past]).unwrap_err().to_string();
        let wanted =
            format!("the token \"<|eot_id|>\" has the id {past}, and the model has embeddings of 300; take it out");
        assert!(message.contains(&wanted), "{message}");
    }

    /// Gemma's template with files that name no end but `<eos>`.
    #[test]
    fn what_a_template_ends_turns_with_ends_answers() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("config.json"), CONFIG.replace("300", "600").replace("299", "1")).unwrap();
        let gemma = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tokenizers/gemma");
        for name in ["tokenizer.json", "tokenizer_config.json"] {
            std::fs::copy(gemma.join(name), dir.path().join(name)).unwrap();
        }
        let open = |template: Option<&str>| {
            let chat_template = template.map(str::to_owned);
            let options = ModelOptions { dummy_weights: Some(7), chat_template, ..ModelOptions::default() };
            Pretrained::open(&Source::Directory(dir.path().into()), &options).unwrap()
        };
        let turns = "{% for m in messages %}<start_of_turn>{{ m.role }}\n{{ m.content }}<end_of_turn>\n{% endfor %}";
        let model = open(Some(turns));
        let id = |token: &str| model.tokenizer.token_to_id(token).unwrap();
        assert_eq!(model.tokenizer.eos_ids(), [id("<eos>")]);
        let line = model.tokenizer.encode("\n", false).unwrap();
        assert_eq!(model.turn_end(), [vec![id("<end_of_turn>")], line].concat());
        assert_eq!(model.stop_ids(), [id("<end_of_turn>"), id("<eos>")]);
        // Without a template, and with one that has no such token, as the files say.
        for template in [None, Some("{% for m in messages %}{{ m.role }}: {{ m.content }}\n\n{% endfor %}")] {
            assert_eq!(open(template).stop_ids(), [id("<eos>")]);
        }
    }

    #[test]
    fn a_directory_that_is_none_says_what_a_model_is() {
        let dir = tempfile::tempdir().unwrap();
        for path in [dir.path().into(), dir.path().join("absent")] {
            let message =
                Pretrained::open(&Source::Directory(path), &ModelOptions::default()).err().unwrap().to_string();
            assert!(message.contains("config.json: is missing; a model is a .gguf file or a directory"), "{message}");
        }
    }
}
