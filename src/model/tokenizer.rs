//! From text to token ids and back, as transformers would do it.
//!
//! A tokenizer.json is read as it is. A GGUF file has only a vocabulary, merges and the name of a
//! pre-tokeniser, of which `gguf_tokenizer` makes one.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::Value as Json;
use tokenizers::models::bpe::{BPE, Merges, Vocab};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::metaspace::PrependScheme;
use tokenizers::processors::template::TemplateProcessing;
use tokenizers::{
    AddedToken, Decoder, Model, NormalizerWrapper, OffsetType, PreTokenizer, PreTokenizerWrapper, normalizers,
    pre_tokenizers,
};

use super::ModelError;
use super::config::Config;
use super::gguf::{Gguf, Metadata};
use super::gguf_tokenizer::{self, DAMAGED};
use super::keys::{python_json, token_ids};

/// Special tokens: the names that chat templates have for them, and GGUF's keys.
const GGUF_SPECIAL: [(&str, &str); 4] = [
    ("bos_token", "bos_token_id"),
    ("eos_token", "eos_token_id"),
    ("unk_token", "unknown_token_id"),
    ("pad_token", "padding_token_id"),
];
/// Tokens that end a turn, by llama.cpp's keys.
pub(super) const GGUF_EOS: [&str; 3] = ["eos_token_id", "eot_token_id", "eom_token_id"];

/// Tokens of text, and the ids that mean something to a program: begin of text, end of a turn.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    frame: Frame,
    bos_id: Option<u32>,
    eos_ids: Vec<u32>,
    /// `bos_token`, `eos_token` and the like, as a chat template sees them.
    special: BTreeMap<String, String>,
    vocab_size: usize,
}

/// What `add_special` adds.
enum Frame {
    /// Whatever the post-processor of tokenizer.json says.
    PostProcessor,
    /// These ids before and after the text.
    Ids { before: Option<u32>, after: Option<u32> },
}

impl Tokenizer {
    /// Reads tokenizer.json of a Hugging Face directory, with tokenizer_config.json,
    /// special_tokens_map.json and generation_config.json where they are.
    ///
    /// # Errors
    /// Names the file that is missing or can't be read.
    pub fn from_dir(dir: &Path, config: &Config) -> Result<Self, ModelError> {
        let path = dir.join("tokenizer.json");
        let mut inner = read_tokenizer_json(&path)?;
        // Some files were saved with a training run's truncation or padding.
        let off = inner.with_truncation(None).map(|_| ());
        off.map_err(|e| ModelError::file(&path, format!("{e}; {DAMAGED}")))?;
        inner.with_padding(None);

        let settings = TokenizerConfig::read(dir)?;
        settings.apply(&mut inner).map_err(|e| ModelError::file(&path, format!("{e}; {DAMAGED}")))?;
        let generation = read_json(&dir.join("generation_config.json"))?.unwrap_or_default();
        let special = settings.named();
        let id = |key: &str| special.get(key).and_then(|token| inner.token_to_id(token));
        let (bos, eos) = (id("bos_token"), id("eos_token"));
        let listed = token_ids(generation.get("eos_token_id")).filter(|ids| !ids.is_empty());
        let eos_ids = unique(eos.into_iter().chain(listed.unwrap_or_else(|| config.eos_ids.clone())));
        let frame = settings.frame(bos, eos);
        let vocab_size = inner.get_vocab(true).values().max().map_or(0, |id| *id as usize + 1);
        Ok(Self { inner, frame, bos_id: bos.or(config.bos_id), eos_ids, special, vocab_size })
    }

    /// Builds the tokenizer that a GGUF file describes.
    ///
    /// # Errors
    /// Names the file and the metadata key that is missing, unknown or inconsistent.
    pub fn from_gguf(gguf: &Gguf) -> Result<Self, ModelError> {
        Self::from_metadata(gguf.metadata()).map_err(|message| ModelError::file(gguf.path(), message))
    }

    /// One token a byte, for a model of random weights that comes without a tokenizer. The rest of the vocabulary is
    /// written as `<300>`, so that what such a model samples is read as as many tokens.
    ///
    /// # Errors
    /// When the vocabulary has no room for the 256 bytes.
    pub fn bytes(config: &Config) -> Result<Self, ModelError> {
        let mut alphabet: Vec<char> = ByteLevel::alphabet().into_iter().collect();
        alphabet.sort_unstable();
        if config.vocab_size < alphabet.len() {
            let message = format!("a vocabulary of {} has no room for bytes; add a tokenizer.json", config.vocab_size);
            return Err(ModelError::Setting(message));
        }
        let vocab: Vocab = alphabet.iter().zip(0..).map(|(byte, id)| (byte.to_string(), id)).collect();
        let mut inner = tokenizers::Tokenizer::new(BPE::new(vocab, Merges::new()));
        inner.with_pre_tokenizer(Some(ByteLevel::new(false, false, false)));
        inner.with_decoder(Some(ByteLevel::default()));
        let more = (alphabet.len()..config.vocab_size).map(|id| AddedToken::from(format!("<{id}>"), false));
        inner.add_tokens(more).map_err(|e| ModelError::Setting(format!("a vocabulary of bytes: {e}")))?;
        Ok(Self {
            inner,
            frame: Frame::PostProcessor,
            bos_id: config.bos_id,
            eos_ids: config.eos_ids.clone(),
            special: BTreeMap::new(),
            vocab_size: config.vocab_size,
        })
    }

    fn from_metadata(metadata: &Metadata) -> Result<Self, String> {
        let tokens = metadata
            .texts("tokenizer.ggml.tokens")
            .ok_or_else(|| format!("has no list of strings tokenizer.ggml.tokens; {DAMAGED}"))?;
        let pieces = tokens.len();
        let inner = gguf_tokenizer::read(metadata, &tokens)?;
        let id = |key: &str| gguf_tokenizer::named_id(metadata, key);
        let (bos, eos) = (id("bos_token_id"), id("eos_token_id"));
        let adds_eos = metadata.bool("tokenizer.ggml.add_eos_token").unwrap_or(false);
        let frame =
            Frame::Ids { before: bos.filter(|_| gguf_tokenizer::adds_bos(metadata)), after: eos.filter(|_| adds_eos) };
        let text = |id: u32| tokens.get(id as usize).map(|token| (*token).to_owned());
        let named = GGUF_SPECIAL.iter();
        let special = named.filter_map(|(name, key)| Some(((*name).to_owned(), text(id(key)?)?))).collect();
        let eos_ids = unique(GGUF_EOS.iter().filter_map(|key| id(key)).chain(gguf_tokenizer::ends(&tokens)));
        Ok(Self { inner, frame, bos_id: bos, eos_ids, special, vocab_size: pieces })
    }

    /// The metadata of a GGUF file that gives this tokenizer back, for a model of `rows` embeddings.
    ///
    /// # Errors
    /// When the format has no form for this tokenizer. What is written is read again and held against
    /// this one on the text of every token.
    pub(super) fn metadata(&self, rows: usize) -> Result<Metadata, String> {
        let mut metadata = Metadata::default();
        gguf_tokenizer::write(&self.inner, rows, &mut metadata)?;
        let framed = self.encode("", true).map_err(|e| e.to_string())?;
        metadata.put("tokenizer.ggml.add_bos_token", self.add_bos());
        metadata
            .put("tokenizer.ggml.add_eos_token", framed.last().is_some_and(|last| self.eos_ids.first() == Some(last)));
        let ids =
            GGUF_SPECIAL.iter().filter_map(|(name, key)| Some((key, self.token_to_id(self.special.get(*name)?)?)));
        ids.chain(GGUF_EOS.iter().zip(self.eos_ids.iter().copied()))
            .chain(self.bos_id.map(|id| (&"bos_token_id", id)))
            .for_each(|(key, id)| metadata.put(format!("tokenizer.ggml.{key}"), id));
        self.compare(&Self::from_metadata(&metadata)?)?;
        Ok(metadata)
    }

    fn compare(&self, read: &Self) -> Result<(), String> {
        let added =
            self.inner.get_added_tokens_decoder().into_values().map(|token| format!("a{0}b {0} c", token.content));
        let alone = (0..self.vocab_size as u32).map(|id| self.decode(&[id], false).unwrap_or_default());
        for text in alone.chain(added) {
            let same = self.encode(&text, true).ok() == read.encode(&text, true).ok();
            if !same {
                return Err(format!("its rules for {text:?} have no form in GGUF"));
            }
        }
        let ids: Vec<u32> = (0..self.vocab_size as u32).collect();
        let all = self.decode(&ids, false).ok() == read.decode(&ids, false).ok();
        if all { Ok(()) } else { Err("its decoder has no form in GGUF".into()) }
    }

    /// Ids of `text`. Special tokens that are written out in it become their ids. `add_special` adds
    /// what the model wants around a whole text; leave it off for the text of a chat template.
    ///
    /// # Errors
    /// When the tokenizer's own rules fail on the text.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>, ModelError> {
        let own = add_special && matches!(self.frame, Frame::PostProcessor);
        let encoding = self.inner.encode_fast(text, own).map_err(|e| undecided(text, &e))?;
        let ids = encoding.get_ids();
        Ok(match &self.frame {
            Frame::Ids { before, after } if add_special => before.iter().chain(ids).chain(after).copied().collect(),
            _ => ids.to_vec(),
        })
    }

    /// Ids of `text`, with the token that begins texts before them or not; where it is not said, as
    /// [`Self::add_bos`] has it.
    ///
    /// # Errors
    /// As [`Self::encode`]; there is no such token.
    pub fn encode_text(&self, text: &str, add_bos: Option<bool>) -> Result<Vec<u32>, ModelError> {
        Ok(self.begins_with(add_bos)?.into_iter().chain(self.encode(text, false)?).collect())
    }

    /// The token that begins a text, if one does; where it is not said, as [`Self::add_bos`] has it.
    ///
    /// # Errors
    /// It is asked for, and there is no such token.
    pub fn begins_with(&self, add_bos: Option<bool>) -> Result<Option<u32>, ModelError> {
        let none = || ModelError::Setting("add_bos = true, and the tokenizer has no bos_token; leave it out".into());
        match add_bos {
            Some(false) => Ok(None),
            Some(true) => self.text_bos().map(Some).ok_or_else(none),
            None => Ok(self.bos_id.filter(|_| self.add_bos())),
        }
    }

    /// The token that can begin a text: the one that the tokenizer calls so, whatever config.json has.
    pub fn text_bos(&self) -> Option<u32> {
        let named = self.special.get("bos_token").and_then(|token| self.token_to_id(token));
        named.or_else(|| self.bos_id.filter(|_| self.add_bos()))
    }

    /// Ids of a text that is not the beginning of one: a tokenizer that marks the start of a text as the start of a
    /// word doesn't mark this one.
    ///
    /// # Errors
    /// As [`Self::encode`].
    pub fn encode_inside(&self, text: &str) -> Result<Vec<u32>, ModelError> {
        let ids = || -> tokenizers::Result<Vec<u32>> {
            let normalizer = self.inner.get_normalizer().and_then(unmarked);
            let added = self.inner.get_added_vocabulary();
            let mut pieces = added.extract_and_normalize(normalizer.as_ref(), text);
            if let Some(cut) = self.inner.get_pre_tokenizer() {
                unmarking(cut).pre_tokenize(&mut pieces)?;
            }
            pieces.tokenize(|piece| self.inner.get_model().tokenize(piece.get()))?;
            Ok(pieces.into_encoding(None, 0, OffsetType::None)?.get_ids().to_vec())
        };
        ids().map_err(|e| undecided(text, &e))
    }

    /// Text of `ids`, nothing stripped or tidied. Bytes that are no UTF-8 become U+FFFD, ids outside
    /// of the vocabulary nothing.
    ///
    /// # Errors
    /// When the tokenizer's decoder fails on the ids.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String, ModelError> {
        // The crate's own `decode` gives an added token in its normalized form (`▁</s>` for `</s>`),
        // which transformers doesn't, and in that form doesn't know it for a special one.
        let added = self.inner.get_added_vocabulary();
        let token = |id: &u32| match added.get_added_tokens_decoder().get(id) {
            Some(token) => Some(token.content.clone()).filter(|token| !skip_special || !added.is_special_token(token)),
            None => self.inner.get_model().id_to_token(*id),
        };
        let tokens: Vec<String> = ids.iter().filter_map(token).collect();
        let Some(decoder) = self.inner.get_decoder() else { return Ok(tokens.join(" ")) };
        decoder
            .decode(tokens)
            .map_err(|e| ModelError::Setting(format!("the tokenizer can't decode {} ids: {e}", ids.len())))
    }

    /// The id of a token written as in the vocabulary (byte-level tokens have `Ġ` for a space).
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// Returns whether a token is one that no text is made of.
    pub fn is_special(&self, id: u32) -> bool {
        let added = self.inner.get_added_vocabulary();
        added.get_added_tokens_decoder().get(&id).is_some_and(|token| token.special)
    }

    /// Tokens that end a turn. The first is the one that a finished answer ends with in training.
    pub fn eos_ids(&self) -> &[u32] {
        &self.eos_ids
    }

    pub fn bos_id(&self) -> Option<u32> {
        self.bos_id
    }

    /// Whether `encode` with `add_special` begins with [`Self::bos_id`].
    pub fn add_bos(&self) -> bool {
        match self.frame {
            Frame::Ids { before, .. } => before.is_some(),
            Frame::PostProcessor => {
                let empty = self.inner.encode_fast("", true);
                self.bos_id.is_some() && empty.is_ok_and(|e| e.get_ids().first().copied() == self.bos_id)
            }
        }
    }

    /// Writes tokenizer.json. What [`Tokenizer::encode`] adds around a text becomes its post-processor.
    ///
    /// # Errors
    /// When the file can't be written.
    pub fn save(&self, path: &Path) -> Result<(), ModelError> {
        let failed = |e: String| ModelError::file(path, format!("can't be written: {e}"));
        let mut inner = self.inner.clone();
        if let Frame::Ids { before, after } = &self.frame {
            let token = |id: &Option<u32>| id.and_then(|id| Some((self.inner.id_to_token(id)?, id)));
            let (before, after) = (token(before), token(after));
            let text = |token: &Option<(String, u32)>| token.as_ref().map(|(text, _)| text.clone());
            let pieces: Vec<_> = text(&before).into_iter().chain(["$A".to_owned()]).chain(text(&after)).collect();
            let special: Vec<_> = before.into_iter().chain(after).collect();
            let template = TemplateProcessing::builder()
                .try_single(pieces)
                .map(|builder| builder.special_tokens(special))
                .and_then(|builder| builder.build().map_err(|e| e.to_string()));
            inner.with_post_processor(Some(template.map_err(failed)?));
        }
        inner.save(path, false).map_err(|e| failed(e.to_string()))
    }

    /// The highest id and one; a model may have rows for more.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// `bos_token`, `eos_token` and the like with their texts.
    pub fn special_tokens(&self) -> &BTreeMap<String, String> {
        &self.special
    }
}

fn undecided(text: &str, error: &dyn std::fmt::Display) -> ModelError {
    ModelError::Setting(format!("the tokenizer can't encode a text of {} bytes: {error}", text.len()))
}

/// The normalizer without what puts a mark in front of a text; none if it does nothing else.
fn unmarked(normalizer: &NormalizerWrapper) -> Option<NormalizerWrapper> {
    match normalizer {
        NormalizerWrapper::Prepend(_) => None,
        NormalizerWrapper::Sequence(all) => {
            let left: Vec<_> = all.as_ref().iter().filter_map(unmarked).collect();
            Some(normalizers::Sequence::new(left).into())
        }
        other => Some(other.clone()),
    }
}

/// The pre-tokenizer without what puts a mark or a space in front of a text.
fn unmarking(cut: &PreTokenizerWrapper) -> PreTokenizerWrapper {
    match cut {
        PreTokenizerWrapper::Metaspace(marks) => {
            let mut marks = marks.clone();
            marks.set_prepend_scheme(PrependScheme::Never);
            marks.into()
        }
        PreTokenizerWrapper::ByteLevel(bytes) => bytes.add_prefix_space(false).into(),
        PreTokenizerWrapper::Sequence(all) => {
            pre_tokenizers::sequence::Sequence::new(all.as_ref().iter().map(unmarking).collect()).into()
        }
        other => other.clone(),
    }
}

pub(super) fn unique(ids: impl Iterator<Item = u32>) -> Vec<u32> {
    let mut seen = Vec::new();
    for id in ids {
        if !seen.contains(&id) {
            seen.push(id);
        }
    }
    seen
}

fn read_tokenizer_json(path: &Path) -> Result<tokenizers::Tokenizer, ModelError> {
    if !path.exists() {
        return Err(ModelError::file(
            path,
            "is missing; download it, or convert the model's tokenizer with transformers' save_pretrained",
        ));
    }
    let bytes = std::fs::read(path).map_err(ModelError::io(path))?;
    let fault = |e: &dyn std::fmt::Display| ModelError::file(path, format!("is no tokenizer ({e}); {DAMAGED}"));
    // The crate panics on a decoder that it can't read.
    let parts: Parts = serde_json::from_slice(&bytes).map_err(|e| fault(&e))?;
    if let Some(unknown) = parts.decoder.as_ref().and_then(unknown_decoder) {
        return Err(fault(&format!("its decoder {unknown} is unknown")));
    }
    tokenizers::Tokenizer::from_bytes(bytes).map_err(|e| fault(&e))
}

/// The part of tokenizer.json that is looked at before the crate reads the file.
#[derive(serde::Deserialize)]
struct Parts {
    decoder: Option<Json>,
}

/// The first decoder, this one or one of its sequence, that the crate doesn't know.
fn unknown_decoder(decoder: &Json) -> Option<&Json> {
    const KNOWN: [&str; 9] =
        ["BPEDecoder", "ByteLevel", "WordPiece", "Metaspace", "CTC", "Replace", "Fuse", "Strip", "ByteFallback"];
    let kind = decoder.get("type").and_then(Json::as_str).unwrap_or_default();
    match decoder.get("decoders").and_then(Json::as_array) {
        Some(sequence) if kind == "Sequence" => sequence.iter().find_map(unknown_decoder),
        _ => Some(decoder).filter(|_| !KNOWN.contains(&kind)),
    }
}

/// A JSON file that may be missing.
pub(super) fn read_json(path: &Path) -> Result<Option<Json>, ModelError> {
    if !path.exists() {
        return Ok(None);
    }
    let text = std::fs::read_to_string(path).map_err(ModelError::io(path))?;
    let json = python_json(&text);
    json.map(Some).map_err(|e| ModelError::file(path, format!("is no JSON ({e}); {DAMAGED}")))
}

/// What the files beside tokenizer.json say, as transformers puts them together: what its tokenizer
/// class presumes, then tokenizer_config.json, then special_tokens_map.json; the last is for older
/// directories and ignored where the second has an `added_tokens_decoder`.
struct TokenizerConfig {
    class: String,
    entries: serde_json::Map<String, Json>,
}

impl TokenizerConfig {
    fn read(dir: &Path) -> Result<Self, ModelError> {
        let object = |name: &str| -> Result<_, ModelError> {
            Ok(match read_json(&dir.join(name))? {
                Some(Json::Object(entries)) => entries,
                _ => serde_json::Map::new(),
            })
        };
        let (own, map) = (object("tokenizer_config.json")?, object("special_tokens_map.json")?);
        let class = own.get("tokenizer_class").and_then(Json::as_str).unwrap_or_default();
        let class = class.strip_suffix("Fast").unwrap_or(class).to_owned();
        let mut entries: serde_json::Map<_, _> =
            presumed(&class).iter().map(|(key, token)| ((*key).to_owned(), Json::from(*token))).collect();
        let map = if own.contains_key("added_tokens_decoder") { serde_json::Map::new() } else { map };
        entries.extend(own.into_iter().chain(map));
        Ok(Self { class, entries })
    }

    fn flag(&self, key: &str, default: bool) -> bool {
        self.entries.get(key).map_or(default, |value| value.as_bool().unwrap_or(false))
    }

    /// Keys that end in `_token`, whose value is a text or an object with a `content`.
    fn named(&self) -> BTreeMap<String, String> {
        let entries = self.entries.iter().filter(|(key, _)| key.ends_with("_token"));
        entries.filter_map(|(key, value)| Some((key.clone(), content(value)?.to_owned()))).collect()
    }

    /// All special tokens in transformers' order, in which those that are new get their ids.
    fn special_tokens(&self) -> impl Iterator<Item = &Json> {
        const ORDER: [&str; 7] =
            ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];
        let named = ORDER.iter().filter_map(|key| self.entries.get(*key));
        named.chain(self.entries.get("additional_special_tokens").and_then(Json::as_array).into_iter().flatten())
    }

    /// Makes the tokens that these files have tokens that are never cut, and takes the space in front
    /// of a text away where they don't ask for one.
    fn apply(&self, inner: &mut tokenizers::Tokenizer) -> tokenizers::Result<()> {
        let mut added: BTreeMap<u32, AddedToken> = inner.get_added_tokens_decoder().into_iter().collect();
        let listed = self.entries.get("added_tokens_decoder").and_then(Json::as_object).into_iter().flatten();
        added.extend(listed.filter_map(|(id, token)| Some((id.parse().ok()?, added_token(token, false)?))));
        let mut more: Vec<AddedToken> = Vec::new();
        let presumed = presumed(&self.class);
        for token in self.special_tokens().filter_map(|token| added_token(token, true)) {
            let known = added.values_mut().chain(&mut more).find(|known| known.content == token.content);
            if let Some(known) = known {
                known.special = true;
            // What a class presumes is no token of this model when its vocabulary doesn't have it.
            } else if inner.token_to_id(&token.content).is_some()
                || presumed.iter().all(|(_, name)| *name != token.content)
            {
                more.push(token);
            }
        }
        inner.add_tokens(added.into_values().chain(more))?;
        if let Some(PreTokenizerWrapper::ByteLevel(bytes)) = inner.get_pre_tokenizer() {
            let bytes = bytes.add_prefix_space(self.flag("add_prefix_space", false));
            inner.with_pre_tokenizer(Some(bytes));
        }
        Ok(())
    }

    /// transformers rebuilds the frame of its Llama-like tokenizer classes from tokenizer_config.json,
    /// whatever tokenizer.json says.
    fn frame(&self, bos: Option<u32>, eos: Option<u32>) -> Frame {
        if !matches!(self.class.as_str(), "LlamaTokenizer" | "CodeLlamaTokenizer" | "GemmaTokenizer") {
            return Frame::PostProcessor;
        }
        Frame::Ids {
            before: bos.filter(|_| self.flag("add_bos_token", true)),
            after: eos.filter(|_| self.flag("add_eos_token", false)),
        }
    }
}

/// Special tokens that a tokenizer class of transformers has where no file names others.
fn presumed(class: &str) -> &'static [(&'static str, &'static str)] {
    match class {
        "LlamaTokenizer" | "CodeLlamaTokenizer" => {
            &[("bos_token", "<s>"), ("eos_token", "</s>"), ("unk_token", "<unk>")]
        }
        "GemmaTokenizer" => {
            &[("bos_token", "<bos>"), ("eos_token", "<eos>"), ("unk_token", "<unk>"), ("pad_token", "<pad>")]
        }
        "GPT2Tokenizer" => {
            &[("bos_token", "<|endoftext|>"), ("eos_token", "<|endoftext|>"), ("unk_token", "<|endoftext|>")]
        }
        "Qwen2Tokenizer" => {
            &[("eos_token", "<|endoftext|>"), ("unk_token", "<|endoftext|>"), ("pad_token", "<|endoftext|>")]
        }
        _ => &[],
    }
}

/// The text of a token that is written as a text or as an object.
fn content(token: &Json) -> Option<&str> {
    token.as_str().or_else(|| token.get("content")?.as_str())
}

fn added_token(token: &Json, special: bool) -> Option<AddedToken> {
    let flag = |key: &str| token.get(key).and_then(Json::as_bool);
    let special = special || flag("special").unwrap_or(false);
    let added = AddedToken::from(content(token)?, special);
    let normalized = flag("normalized").unwrap_or(added.normalized);
    let (lstrip, rstrip) = (flag("lstrip").unwrap_or(false), flag("rstrip").unwrap_or(false));
    let added = added.normalized(normalized).lstrip(lstrip).rstrip(rstrip);
    Some(added.single_word(flag("single_word").unwrap_or(false)))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use proptest::sample::Index;
    use serde_json::json;

    use super::*;
    use crate::model::gguf::fixture::{self, Damage};
    use crate::model::source::builtin_path;

    fn ids(value: &Json) -> Vec<u32> {
        token_ids(Some(value)).unwrap()
    }

    /// `tests/oracle/tokenizer.py` writes what transformers gives.
    #[test]
    fn builtin_ids_as_transformers() {
        let gguf = Gguf::open(&builtin_path().unwrap_or_else(|e| panic!("{e}"))).unwrap();
        let tokenizer = Tokenizer::from_gguf(&gguf).unwrap();
        let fixture: Json = serde_json::from_str(include_str!("../../tests/fixtures/smollm2.json")).unwrap();
        let rows = fixture["tokenization"].as_array().unwrap();
        assert!(rows.len() > 60);
        for row in rows {
            let text = row["text"].as_str().unwrap();
            let found = tokenizer.encode(text, false).unwrap();
            assert_eq!(found, ids(&row["ids"]), "{text:?}");
            // add_bos_token = false is obeyed.
            assert_eq!(tokenizer.encode(text, true).unwrap(), found, "{text:?}");
            assert_eq!(tokenizer.decode(&found, false).unwrap(), row["decoded"].as_str().unwrap(), "{text:?}");
        }
        assert_eq!((tokenizer.bos_id(), tokenizer.add_bos()), (Some(1), false));
        // <|im_end|> by its key; <|endoftext|> and <reponame> by their text.
        assert_eq!(tokenizer.eos_ids(), [2, 0, 4]);
        assert_eq!((tokenizer.vocab_size(), tokenizer.token_to_id("<|im_end|>")), (49_152, Some(2)));
        let turn = tokenizer.encode("<|im_start|>user\nhi<|im_end|>", false).unwrap();
        assert_eq!(tokenizer.decode(&turn, true).unwrap(), "user\nhi");
    }

    fn gguf_tokenizer() -> fixture::Builder {
        fixture::small().text("tokenizer.ggml.model", "gpt2").text("tokenizer.ggml.pre", "smollm")
    }

    #[test]
    fn gguf_refusals_name_the_key() {
        let merges = |builder: fixture::Builder, merge: &str| builder.texts("tokenizer.ggml.merges", &[merge]);
        for (builder, part) in [
            (
                gguf_tokenizer().text("tokenizer.ggml.pre", "deepseek-llm"),
                "tokenizer.ggml.pre = deepseek-llm; supported",
            ),
            (gguf_tokenizer().text("tokenizer.ggml.model", "bert"), "tokenizer.ggml.model = bert; supported"),
            (gguf_tokenizer(), "no list of strings tokenizer.ggml.merges"),
            (merges(gguf_tokenizer(), "ab"), "which is no pair"),
            (merges(gguf_tokenizer(), "a ab"), "not all in the vocabulary"),
        ] {
            let (_dir, gguf) = builder.open();
            let message = Tokenizer::from_gguf(&gguf).err().unwrap().to_string();
            assert!(message.contains("small.gguf") && message.contains(part), "{message}");
        }
    }

    #[test]
    fn pre_tokenizers_cut_digits_their_way() {
        let tokens = ["1", "2", "3", "4", "12", "123", "1234", "Ġ"];
        let encode = |pre: &str, text: &str| {
            let builder = gguf_tokenizer()
                .text("tokenizer.ggml.pre", pre)
                .texts("tokenizer.ggml.tokens", &tokens)
                .texts("tokenizer.ggml.merges", &["1 2", "12 3", "123 4"]);
            let (_dir, gguf) = builder.open();
            Tokenizer::from_gguf(&gguf).unwrap().encode(text, false).unwrap()
        };
        assert_eq!(encode("smollm", "1234"), [0, 1, 2, 3]);
        assert_eq!(encode("llama-bpe", "1234"), [5, 3]);
        assert_eq!(encode("qwen2", " 1234"), [7, 0, 1, 2, 3]);
        for (alias, name) in [
            ("phi-2", "gpt-2"),
            ("command-r", "smollm"),
            ("pixtral", "llama-bpe"),
            ("deepseek-r1-qwen", "qwen2"),
            ("megrez", "qwen2"),
        ] {
            assert_eq!(encode(alias, " 1234"), encode(name, " 1234"), "{alias}");
        }
        // The whole word is a token and isn't merged for Llama 3; Smaug's pattern is the same, and it merges.
        assert_eq!((encode("llama-bpe", "12"), encode("smaug-bpe", "12")), (vec![4], vec![4]));
        assert_eq!(encode("smaug-bpe", "1234"), encode("llama-bpe", "1234"));
    }

    /// llama.cpp's defaults, and what a file says against them.
    #[test]
    fn a_gguf_text_begins_as_llama_cpp_begins_it() {
        let adds = |model: &str, pre: &str, flag: Option<bool>| {
            let builder = gguf_tokenizer()
                .text("tokenizer.ggml.model", model)
                .text("tokenizer.ggml.pre", pre)
                .texts("tokenizer.ggml.tokens", &["<unk>", "<s>", "</s>", "a"])
                .texts("tokenizer.ggml.merges", &[])
                .floats("tokenizer.ggml.scores", &[0.0; 4])
                .unsigned("tokenizer.ggml.bos_token_id", 1);
            let builder = flag.into_iter().fold(builder, |b, flag| b.bool("tokenizer.ggml.add_bos_token", flag));
            let (_dir, gguf) = builder.open();
            Tokenizer::from_gguf(&gguf).unwrap().add_bos()
        };
        for (model, pre, default) in [
            ("llama", "default", true),
            ("gpt2", "llama-bpe", true),
            ("gpt2", "falcon3", true),
            ("gpt2", "smaug-bpe", false),
            ("gpt2", "qwen2", false),
            ("gpt2", "deepseek-r1-qwen", false),
            ("gpt2", "gpt-2", false),
        ] {
            assert_eq!(adds(model, pre, None), default, "{model} {pre}");
            assert_eq!((adds(model, pre, Some(true)), adds(model, pre, Some(false))), (true, false), "{model} {pre}");
        }
    }

    #[test]
    fn a_gguf_turn_ends_at_tokens_of_known_text() {
        let read = |tokens: &[&str], keys: &[(&str, u32)]| {
            let types = vec![4; tokens.len()];
            let builder = gguf_tokenizer()
                .texts("tokenizer.ggml.tokens", tokens)
                .texts("tokenizer.ggml.merges", &[])
                .signed("tokenizer.ggml.token_type", &types);
            let builder = keys.iter().fold(builder, |b, (key, id)| b.unsigned(&format!("tokenizer.ggml.{key}"), *id));
            let (_dir, gguf) = builder.open();
            Tokenizer::from_gguf(&gguf).unwrap()
        };
        let tokens = ["a", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<｜end▁of▁sentence｜>"];
        let tokenizer = read(&tokens, &[("eos_token_id", 1), ("eom_token_id", 2)]);
        // Keys first: a finished answer is taught the first.
        assert_eq!(tokenizer.eos_ids(), [1, 2, 3, 4]);
        // As a user-defined token an end is no text.
        assert_eq!(tokenizer.encode("a<|im_end|>", false).unwrap(), [0, 3]);
        assert!(tokenizer.is_special(3) && !tokenizer.is_special(2));
        assert_eq!(read(&["<|return|>", "<|call|>", "<|end|>"], &[]).eos_ids(), [0, 1]);
        assert_eq!(read(&["<|return|>", "<|end|>"], &[]).eos_ids(), [0, 1]);
        assert_eq!(read(&["<|tool_response>", "</s>", "<turn|>"], &[]).eos_ids(), [0, 2]);
    }

    #[test]
    fn sentence_pieces_fall_back_to_bytes() {
        let bytes: Vec<String> = (0..256).map(|byte| format!("<0x{byte:02X}>")).collect();
        let mut tokens = vec!["<unk>", "<s>", "</s>"];
        tokens.extend(bytes.iter().map(String::as_str));
        tokens.extend(["▁", "a", "b", "ab", "▁ab", "▁a"]);
        let mut scores = vec![0.0; 259];
        scores.extend([-9.0, -8.0, -7.0, -3.0, -1.0, -5.0]);
        let mut types = vec![2, 3, 3];
        types.extend([6; 256]);
        types.extend([1; 6]);
        let (_dir, gguf) = fixture::small()
            .text("tokenizer.ggml.model", "llama")
            .texts("tokenizer.ggml.tokens", &tokens)
            .floats("tokenizer.ggml.scores", &scores)
            .signed("tokenizer.ggml.token_type", &types)
            .bool("tokenizer.ggml.add_eos_token", false)
            .open();
        let tokenizer = Tokenizer::from_gguf(&gguf).unwrap();
        // Where the file names none they are the usual ones.
        assert_eq!((tokenizer.bos_id(), tokenizer.eos_ids()), (Some(1), [2].as_slice()));
        let found = tokenizer.encode("ab a é</s>", true).unwrap();
        assert_eq!(found, [1, 263, 264, 259, 3 + 0xc3, 3 + 0xa9, 2]);
        assert!(tokenizer.add_bos());
        assert_eq!(tokenizer.decode(&found, true).unwrap(), "ab a é");
    }

    /// `tests/oracle/tokenizer_kinds.py` writes tokenizers of all kinds and what transformers gives.
    #[test]
    fn every_kind_of_directory_as_transformers() {
        let (_gguf_dir, gguf) = fixture::small().open();
        let config = Config::from_gguf(&gguf).unwrap();
        let kinds = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tokenizers");
        for kind in ["llama3", "qwen2", "llama2-legacy", "llama2", "gemma", "tokens-in-the-map", "tokens-in-the-config"]
        {
            let dir = kinds.join(kind);
            let tokenizer = Tokenizer::from_dir(&dir, &config).unwrap();
            let expected = read_json(&dir.join("expected.json")).unwrap().unwrap();
            let (before, after) = (ids(&expected["before"]), ids(&expected["after"]));
            assert_eq!(json!(tokenizer.special_tokens()), expected["special"], "{kind}");
            assert_eq!(json!(tokenizer.vocab_size()), expected["size"], "{kind}");
            assert_eq!(tokenizer.add_bos(), !before.is_empty(), "{kind}");
            let framed = |found: &[u32]| [before.as_slice(), found, &after].concat();
            compare(kind, &tokenizer, &expected, framed);
        }
    }

    fn compare(kind: &str, tokenizer: &Tokenizer, expected: &Json, framed: impl Fn(&[u32]) -> Vec<u32>) {
        for row in expected["rows"].as_array().unwrap() {
            let text = row["text"].as_str().unwrap();
            let found = tokenizer.encode(text, false).unwrap();
            assert_eq!(found, ids(&row["ids"]), "{kind} {text:?}");
            assert_eq!(tokenizer.encode(text, true).unwrap(), framed(&found), "{kind} {text:?}");
            assert_eq!(json!(tokenizer.decode(&found, false).unwrap()), row["decoded"], "{kind} {text:?}");
            assert_eq!(json!(tokenizer.decode(&found, true).unwrap()), row["skipped"], "{kind} {text:?}");
        }
    }

    /// The same tokenizers as llama.cpp's converter would write them: a vocabulary with types, and
    /// merges or scores.
    #[test]
    fn gguf_gives_the_ids_of_the_directory() {
        let kinds = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tokenizers");
        for (kind, model, pre) in [
            ("llama3", "gpt2", "llama-bpe"),
            ("qwen2", "gpt2", "qwen2"),
            ("llama2-legacy", "llama", "default"),
            ("gemma", "llama", "default"),
        ] {
            let read = |name: &str| read_json(&kinds.join(kind).join(name)).unwrap().unwrap();
            let (json, expected) = (read("tokenizer.json"), read("expected.json"));
            let mut tokens: BTreeMap<u64, (&str, i32)> = BTreeMap::new();
            for (token, id) in json["model"]["vocab"].as_object().unwrap() {
                let is_byte = model == "llama" && token.len() == 6 && token.starts_with("<0x");
                tokens.insert(id.as_u64().unwrap(), (token, if is_byte { 6 } else { 1 }));
            }
            for token in json["added_tokens"].as_array().unwrap() {
                let kind = if token["special"] == true { 3 } else { 4 };
                tokens.insert(token["id"].as_u64().unwrap(), (token["content"].as_str().unwrap(), kind));
            }
            let merges = json["model"]["merges"].as_array().unwrap().iter();
            let merges: Vec<String> =
                merges.map(|pair| format!("{} {}", pair[0].as_str().unwrap(), pair[1].as_str().unwrap())).collect();
            let (texts, types): (Vec<&str>, Vec<i32>) = tokens.values().copied().unzip();
            let scores: Vec<f32> = tokens.keys().map(|id| -(*id as f32)).collect();
            let bos = ids(&expected["before"]).first().copied();
            let builder = fixture::small()
                .text("tokenizer.ggml.model", model)
                .text("tokenizer.ggml.pre", pre)
                .texts("tokenizer.ggml.tokens", &texts)
                .signed("tokenizer.ggml.token_type", &types)
                .unsigned("tokenizer.ggml.bos_token_id", bos.unwrap_or(u32::MAX))
                .bool("tokenizer.ggml.add_bos_token", true)
                .bool("tokenizer.ggml.add_space_prefix", kind != "gemma");
            let (_dir, gguf) = match model {
                "gpt2" => {
                    builder.texts("tokenizer.ggml.merges", &merges.iter().map(String::as_str).collect::<Vec<_>>())
                }
                _ => builder.floats("tokenizer.ggml.scores", &scores),
            }
            .open();
            let tokenizer = Tokenizer::from_gguf(&gguf).unwrap();
            compare(kind, &tokenizer, &expected, |found| bos.iter().chain(found).copied().collect());
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(128))]

        /// Whatever vocabulary a GGUF file has: an error that names it, or ids that it has.
        #[test]
        fn any_gguf_vocabulary_is_survived(
            tokens in proptest::collection::vec("(<0x4[1-4]>|<unk>|[abĠ▁é]{0,2})", 0..12),
            types in proptest::collection::vec(-1_i32..8, 0..12),
            scores in proptest::collection::vec(any::<f32>(), 12),
            merges in proptest::collection::vec((any::<Index>(), any::<Index>()), 0..3),
            (unknown, bos) in any::<(u8, u8)>(),
            (byte_level, prefix) in any::<(bool, bool)>(),
            text in "[abBcé ▁<0x41>]{0,12}",
        ) {
            let texts: Vec<&str> = tokens.iter().map(String::as_str).collect();
            let merge = |(a, b): &(Index, Index)| Some(format!("{} {}", texts.get(a.index(12))?, texts.get(b.index(12))?));
            let merges: Vec<String> = merges.iter().filter_map(merge).collect();
            let (_dir, gguf) = fixture::small()
                .text("tokenizer.ggml.model", if byte_level { "gpt2" } else { "llama" })
                .text("tokenizer.ggml.pre", "qwen2")
                .texts("tokenizer.ggml.tokens", &texts)
                .texts("tokenizer.ggml.merges", &merges.iter().map(String::as_str).collect::<Vec<_>>())
                .signed("tokenizer.ggml.token_type", &types)
                .floats("tokenizer.ggml.scores", &scores[..tokens.len()])
                .unsigned("tokenizer.ggml.unknown_token_id", u32::from(unknown % 16))
                .unsigned("tokenizer.ggml.bos_token_id", u32::from(bos % 16))
                .bool("tokenizer.ggml.add_bos_token", true)
                .bool("tokenizer.ggml.add_space_prefix", prefix)
                .open();
            match Tokenizer::from_gguf(&gguf) {
                Ok(tokenizer) => {
                    if let Ok(ids) = tokenizer.encode(&text, true) {
                        prop_assert!(ids.iter().all(|id| (*id as usize) < tokenizer.vocab_size()), "{:?}", ids);
                        prop_assert!(tokenizer.decode(&ids, true).is_ok());
                    }
                }
                Err(error) => prop_assert!(error.to_string().contains("small.gguf"), "{}", error),
            }
        }

        /// A damaged file of a directory is named.
        #[test]
        fn damaged_directories_are_named(damage in Damage::strategy(), which in 0_usize..3) {
            let (_gguf_dir, gguf) = fixture::small().open();
            let config = Config::from_gguf(&gguf).unwrap();
            let kind = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tokenizers/tokens-in-the-map");
            let dir = tempfile::tempdir().unwrap();
            let names = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"];
            for (i, name) in names.into_iter().enumerate() {
                let good = std::fs::read(kind.join(name)).unwrap();
                let bytes = if i == which { Damage::all(&damage, good, usize::MAX) } else { good };
                std::fs::write(dir.path().join(name), bytes).unwrap();
            }
            match Tokenizer::from_dir(dir.path(), &config) {
                Ok(tokenizer) => drop(tokenizer.encode("Hello, </s>world!", true)),
                Err(error) => prop_assert!(error.to_string().contains(names[which]), "{}", error),
            }
        }
    }

    fn directory(class: &str) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, json: Json| std::fs::write(dir.path().join(name), json.to_string()).unwrap();
        let special = |id, content| {
            json!({"id": id, "content": content, "special": true, "normalized": false,
            "single_word": false, "lstrip": false, "rstrip": false})
        };
        write(
            "tokenizer.json",
            json!({
                "version": "1.0", "truncation": {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0},
                "padding": null, "added_tokens": [special(0, "<s>"), special(1, "</s>"), special(2, "<end>")],
                "normalizer": null, "pre_tokenizer": null, "decoder": null, "post_processor": null,
                "model": {"type": "BPE", "vocab": {"<s>": 0, "</s>": 1, "<end>": 2, "a": 3, "b": 4}, "merges": []}
            }),
        );
        write(
            "tokenizer_config.json",
            json!({"tokenizer_class": class, "bos_token": "<s>", "eos_token": {"content": "<end>"}}),
        );
        write("generation_config.json", json!({"eos_token_id": [1, 2]}));
        dir
    }

    #[test]
    fn directories_are_read_as_transformers_would() {
        let (_gguf_dir, gguf) = fixture::small().open();
        let config = Config::from_gguf(&gguf).unwrap();
        let dir = directory("LlamaTokenizerFast");
        let tokenizer = Tokenizer::from_dir(dir.path(), &config).unwrap();
        assert_eq!(tokenizer.encode("aabb", true).unwrap(), [0, 3, 3, 4, 4], "no truncation, one begin-of-text");
        assert_eq!(tokenizer.encode("<s>a<end>", false).unwrap(), [0, 3, 2]);
        assert_eq!(tokenizer.eos_ids(), [2, 1]);
        assert!(tokenizer.add_bos());
        assert_eq!(tokenizer.special_tokens()["eos_token"], "<end>");
        let dir = directory("PreTrainedTokenizerFast");
        let tokenizer = Tokenizer::from_dir(dir.path(), &config).unwrap();
        assert_eq!(tokenizer.encode("a", true).unwrap(), [3]);
        assert!(!tokenizer.add_bos());
        let text = std::fs::read_to_string(dir.path().join("tokenizer.json")).unwrap();
        let newer =
            text.replace("\"decoder\":null", "\"decoder\":{\"type\":\"Sequence\",\"decoders\":[{\"type\":\"New\"}]}");
        assert_ne!(text, newer);
        std::fs::write(dir.path().join("tokenizer.json"), newer).unwrap();
        let message = Tokenizer::from_dir(dir.path(), &config).err().unwrap().to_string();
        assert!(
            message.contains("tokenizer.json: is no tokenizer (its decoder {\"type\":\"New\"} is unknown)"),
            "{message}"
        );
        std::fs::remove_file(dir.path().join("tokenizer.json")).unwrap();
        let message = Tokenizer::from_dir(dir.path(), &config).err().unwrap().to_string();
        assert!(message.contains("tokenizer.json: is missing; download it"), "{message}");
    }
}
