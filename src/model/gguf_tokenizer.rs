//! The tokenizer in the metadata of a GGUF file: a vocabulary with types, merges or scores, and the
//! name of a pre-tokeniser.
//!
//! What such a name means stands in `PreTokenizer`, after llama.cpp's table (`llama-vocab.cpp`). A name
//! that isn't there is an error: a guess would give ids that are right for most texts and wrong for
//! numbers, which nobody notices. A tokenizer is written only where a name for it is known.

use std::collections::{BTreeMap, HashMap};

use serde_json::{Value as Json, json};
use tokenizers::decoders::byte_fallback::ByteFallback;
use tokenizers::decoders::fuse::Fuse;
use tokenizers::decoders::sequence::Sequence as DecoderSequence;
use tokenizers::decoders::strip::Strip;
use tokenizers::models::bpe::{BPE, Merges, Vocab};
use tokenizers::normalizers::{NFC, Prepend, Replace, Sequence as NormalizerSequence};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{AddedToken, ModelWrapper, NormalizerWrapper, PreTokenizerWrapper, SplitDelimiterBehavior, Tokenizer};

use super::gguf::{Metadata, Value};

/// What a user does about a damaged file.
pub(super) const DAMAGED: &str = "download the model again";

/// Types of tokens in `tokenizer.ggml.token_type`.
const NORMAL: i32 = 1;
const UNKNOWN: i32 = 2;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;
const UNUSED: i32 = 5;
const BYTE: i32 = 6;

/// The tokenizer that `tokens` and the rest of the metadata describe.
///
/// # Errors
/// Names the key that is missing, unknown or inconsistent.
pub(super) fn read(metadata: &Metadata, tokens: &[&str]) -> Result<Tokenizer, String> {
    let mut inner = match metadata.text("tokenizer.ggml.model") {
        Some("gpt2") => byte_level(metadata, tokens)?,
        Some("llama") => sentence_piece(metadata, tokens)?,
        other => {
            return Err(format!(
                "has tokenizer.ggml.model = {}; supported are gpt2 and llama",
                other.unwrap_or("nothing")
            ));
        }
    };
    inner.add_tokens(added_tokens(metadata, tokens)).map_err(|e| format!("{e}; {DAMAGED}"))?;
    Ok(inner)
}

/// Puts the tokenizer into `metadata`, with `rows` tokens: as many as the model has embeddings, which
/// llama.cpp asks for.
///
/// # Errors
/// When the format has no form for this tokenizer.
pub(super) fn write(inner: &Tokenizer, rows: usize, metadata: &mut Metadata) -> Result<(), String> {
    let ModelWrapper::BPE(bpe) = inner.get_model() else { return Err("it is no BPE tokenizer".into()) };
    let bpe = json!(bpe);
    let merges: Vec<(&str, &str)> = serde_merges(&bpe).ok_or("its merges are no pairs")?;
    let tokens = typed_tokens(inner, rows)?;
    if bpe["byte_fallback"] == true {
        let prefix = space_prefix(inner).ok_or("a word's start is marked in a way that GGUF has no key for")?;
        let ranks: HashMap<String, usize> =
            merges.iter().enumerate().rev().map(|(rank, (a, b))| (format!("{a}{b}"), rank)).collect();
        // The order is all that matters. Bytes and single characters never compete.
        let score = |(token, _): &(String, i32)| ranks.get(token).map_or(0.0, |rank| -(*rank as f32));
        metadata.put("tokenizer.ggml.model", "llama");
        metadata.put("tokenizer.ggml.pre", "default");
        metadata.put("tokenizer.ggml.scores", tokens.iter().map(score).collect::<Value>());
        metadata.put("tokenizer.ggml.add_space_prefix", prefix);
    } else {
        let name = PreTokenizer::recognise(inner, bpe["ignore_merges"] == true)
            .ok_or("text is cut in a way that has no known name in GGUF")?;
        let merges = merges.iter().map(|(a, b)| Value::Text(format!("{a} {b}")));
        metadata.put("tokenizer.ggml.model", "gpt2");
        metadata.put("tokenizer.ggml.pre", name);
        metadata.put("tokenizer.ggml.merges", merges.collect::<Value>());
    }
    metadata.put("tokenizer.ggml.tokens", tokens.iter().map(|(token, _)| token.as_str()).collect::<Value>());
    metadata.put("tokenizer.ggml.token_type", tokens.iter().map(|(_, kind)| *kind).collect::<Value>());
    Ok(())
}

fn serde_merges(bpe: &Json) -> Option<Vec<(&str, &str)>> {
    let pairs = bpe.get("merges")?.as_array()?.iter();
    pairs.map(|pair| Some((pair.get(0)?.as_str()?, pair.get(1)?.as_str()?))).collect()
}

/// The token of every row with its type; rows without a token get a name as llama.cpp's converter has it.
fn typed_tokens(inner: &Tokenizer, rows: usize) -> Result<Vec<(String, i32)>, String> {
    let model = json!(inner.get_model());
    let unknown = model["unk_token"].as_str();
    let fallback = model["byte_fallback"] == true;
    let kind = |token: &str| match token {
        _ if Some(token) == unknown => UNKNOWN,
        _ if fallback && token.len() == 6 && token.starts_with("<0x") => BYTE,
        _ => NORMAL,
    };
    let mut typed: BTreeMap<u32, (String, i32)> = BTreeMap::new();
    for (token, id) in inner.get_vocab(false) {
        let kind = kind(&token);
        typed.insert(id, (token, kind));
    }
    for (id, token) in inner.get_added_tokens_decoder() {
        let kind = if token.special { CONTROL } else { USER_DEFINED };
        if Some(token.content.as_str()) != unknown {
            typed.insert(id, (token.content, kind));
        }
    }
    if let Some((id, (token, _))) = typed.last_key_value().filter(|(id, _)| **id as usize >= rows) {
        return Err(format!("token {token:?} has id {id}, and the model has {rows} embeddings"));
    }
    Ok((0..rows as u32).map(|id| typed.remove(&id).unwrap_or_else(|| (format!("[PAD{id}]"), UNUSED))).collect())
}

/// Whether a text begins with the mark of a word's start; `None` for rules that GGUF doesn't have.
fn space_prefix(inner: &Tokenizer) -> Option<bool> {
    let mark = |prefix| normalizer(prefix).ok().map(|normalizer| json!(normalizer));
    let found = json!(inner.get_normalizer());
    // Gemma's one rule stands alone, and cuts at spaces that are no longer there.
    let alone = json!({"type": "Sequence", "normalizers": [found]});
    let cut = json!(inner.get_pre_tokenizer());
    let harmless = cut.is_null() || (cut["type"] == "Split" && cut["pattern"]["String"] == " ");
    let is = |prefix| mark(prefix).is_some_and(|mark| mark == found || mark == alone);
    if !harmless { None } else { [true, false].into_iter().find(|prefix| is(*prefix)) }
}

/// Meaning of a name of `tokenizer.ggml.pre`, from llama.cpp's table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct PreTokenizer {
    cut: Cut,
    /// True if a word that is in the vocabulary is not merged.
    ignores_merges: bool,
    /// True if text is normalised to NFC first, as the models' own tokenizers do; llama.cpp does not.
    composes: bool,
    /// True if texts begin with the begin-of-text token unless the file says otherwise.
    adds_bos: bool,
}

/// Pre-tokenizer of a byte-level tokenizer: the rule that splits text before merging.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Cut {
    /// GPT-2's pattern alone.
    Gpt2,
    /// Digits one by one, then GPT-2's pattern.
    Digits,
    /// Llama 3's pattern: digits by threes.
    Llama3,
    /// Llama 3's pattern with digits one by one.
    Qwen2,
}

impl PreTokenizer {
    /// Names that files are written with.
    const WRITTEN: [&str; 4] = ["gpt-2", "smollm", "llama-bpe", "qwen2"];

    fn of(name: &str) -> Option<Self> {
        let plain = |cut| Self { cut, ignores_merges: false, composes: false, adds_bos: false };
        Some(match name {
            "gpt-2" | "phi-2" | "gigachat" | "a.x-4.0" | "mellum" | "mpt" | "olmo" | "jais" | "trillion"
            | "granite-docling" | "exaone4" => plain(Cut::Gpt2),
            "smollm" | "starcoder" | "refact" | "command-r" | "codeshell" | "exaone" | "minerva-7b" | "mellum2" => {
                plain(Cut::Digits)
            }
            "llama-bpe" | "llama3" | "llama-v3" | "falcon3" | "falcon-h1" | "pixtral" | "midm-2.0" | "lfm2" => {
                Self { ignores_merges: true, adds_bos: true, ..plain(Cut::Llama3) }
            }
            "dbrx" | "smaug-bpe" | "glm4" | "chatglm-bpe" => plain(Cut::Llama3),
            "qwen2" | "deepseek-r1-qwen" | "megrez" | "kormo" => Self { composes: true, ..plain(Cut::Qwen2) },
            "stablelm2" | "hunyuan" | "solar-open" | "grok-2" => plain(Cut::Qwen2),
            _ => return None,
        })
    }

    /// The name of the rules that `inner` has.
    fn recognise(inner: &Tokenizer, ignores_merges: bool) -> Option<&'static str> {
        let found = plain(json!(inner.get_pre_tokenizer()));
        let composes = match json!(inner.get_normalizer()) {
            Json::Null => false,
            other if other == json!(NFC) => true,
            _ => return None,
        };
        Self::WRITTEN.into_iter().find(|name| {
            Self::of(name).is_some_and(|kind| {
                let same = kind.cut.build().is_ok_and(|cut| plain(json!(cut)) == found);
                same && composes == kind.composes && ignores_merges == kind.ignores_merges
            })
        })
    }
}

impl Cut {
    fn build(self) -> tokenizers::Result<PreTokenizerWrapper> {
        let pattern = |digits: &str| {
            format!(
                r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
            )
        };
        let cut: PreTokenizerWrapper = match self {
            Self::Gpt2 => return Ok(ByteLevel::new(false, false, true).into()),
            Self::Digits => Digits::new(true).into(),
            Self::Llama3 => isolate(pattern(r"\p{N}{1,3}"))?.into(),
            Self::Qwen2 => isolate(pattern(r"\p{N}"))?.into(),
        };
        let bytes = ByteLevel::new(false, false, self == Self::Digits);
        Ok(Sequence::new(vec![cut, bytes.into()]).into())
    }
}

/// Tokens that end a turn whatever the file's keys say, by their text, after llama.cpp's list.
const ENDS: [&str; 33] = [
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<|flush|>",
    "<|calls|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "</s>",
    "<|eom_id|>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "[EOS]",
    "<|end_of_text|>",
    "<end_of_utterance>",
    "<eos>",
    "<turn|>",
    "<|tool_response>",
    "<｜end▁of▁sentence｜>",
    "[e~[",
    // Of files that are read in parts: padding, the next file, the next repository.
    "<|fim_pad|>",
    "<fim-pad>",
    "<fim_pad>",
    "<PAD>",
    "[PAD]",
    "<|fim_repo|>",
    "<|repo_name|>",
    "<fim-repo>",
    "<REPO>",
    "<reponame>",
    "<|file_sep|>",
];

/// The ids of [`ENDS`] that the vocabulary has. Some are no ends beside others.
pub(super) fn ends(tokens: &[&str]) -> Vec<u32> {
    let found: Vec<(&str, u32)> =
        tokens.iter().zip(0..).filter(|(token, _)| ENDS.contains(token)).map(|(token, id)| (*token, id)).collect();
    let has = |token: &str| found.iter().any(|(found, _)| *found == token);
    let calls = has("<|call|>") || has("<|calls|>");
    let part = |token: &str| match token {
        "<|end|>" => calls && (has("<|return|>") || has("<|flush|>")),
        "</s>" => has("<|tool_response>"),
        _ => false,
    };
    found.iter().filter(|(token, _)| !part(token)).map(|(_, id)| *id).collect()
}

/// The id that a key of `tokenizer.ggml` names; of Llama 2's kind, where it names none of the vocabulary, the usual one.
pub(super) fn named_id(metadata: &Metadata, key: &str) -> Option<u32> {
    let within = |id: &u64| metadata.array("tokenizer.ggml.tokens").is_some_and(|all| (*id as usize) < all.len());
    let usual = match (metadata.text("tokenizer.ggml.model"), key) {
        (Some("llama"), "unknown_token_id") => Some(0),
        (Some("llama"), "bos_token_id") => Some(1),
        (Some("llama"), "eos_token_id") => Some(2),
        _ => None,
    };
    let named = metadata.unsigned(&format!("tokenizer.ggml.{key}")).filter(within);
    named.or(usual.filter(within)).and_then(|id| u32::try_from(id).ok())
}

/// Returns whether texts begin with the begin-of-text token: the file's setting, or llama.cpp's default for its kind.
pub(super) fn adds_bos(metadata: &Metadata) -> bool {
    let by_kind = || match metadata.text("tokenizer.ggml.model") {
        Some("llama") => true,
        _ => metadata.text("tokenizer.ggml.pre").and_then(PreTokenizer::of).is_some_and(|kind| kind.adds_bos),
    };
    metadata.bool("tokenizer.ggml.add_bos_token").unwrap_or_else(by_kind)
}

/// Without what only concerns offsets.
fn plain(mut rules: Json) -> Json {
    match &mut rules {
        Json::Object(object) => {
            object.remove("trim_offsets");
            object.values_mut().for_each(|value| *value = plain(value.take()));
        }
        Json::Array(array) => array.iter_mut().for_each(|value| *value = plain(value.take())),
        _ => {}
    }
    rules
}

fn isolate(pattern: String) -> tokenizers::Result<Split> {
    Split::new(SplitPattern::Regex(pattern), SplitDelimiterBehavior::Isolated, false)
}

/// GPT-2's kind of tokenizer: merges over a printable alphabet of bytes.
fn byte_level(metadata: &Metadata, tokens: &[&str]) -> Result<Tokenizer, String> {
    let name = metadata.text("tokenizer.ggml.pre").unwrap_or("nothing");
    let kind = PreTokenizer::of(name)
        .ok_or_else(|| format!("has tokenizer.ggml.pre = {name}; supported are gpt-2, smollm, llama-bpe, qwen2 and what llama.cpp reads as they are"))?;
    let merges = metadata
        .texts("tokenizer.ggml.merges")
        .ok_or_else(|| format!("has no list of strings tokenizer.ggml.merges; {DAMAGED}"))?;
    let pairs = merges.iter().map(|merge| {
        let pair = merge.split_once(' ').map(|(left, right)| (left.to_owned(), right.to_owned()));
        pair.ok_or_else(|| format!("has the merge {merge:?}, which is no pair; {DAMAGED}"))
    });
    let merges = pairs.collect::<Result<Merges, _>>()?;
    let vocab = vocabulary(tokens);
    check_merges(&vocab, &merges)?;
    let model = BPE::builder()
        .vocab_and_merges(vocab, merges)
        .ignore_merges(kind.ignores_merges)
        .build()
        .map_err(|e| format!("{e}; {DAMAGED}"))?;
    let mut inner = Tokenizer::new(model);
    inner.with_pre_tokenizer(Some(kind.cut.build().map_err(|e| e.to_string())?));
    inner.with_decoder(Some(ByteLevel::default()));
    if kind.composes {
        inner.with_normalizer(Some(NFC)).map_err(|e| e.to_string())?;
    }
    Ok(inner)
}

/// Llama 2's kind of tokenizer: pieces with scores, `▁` for a space, bytes for what is missing.
fn sentence_piece(metadata: &Metadata, tokens: &[&str]) -> Result<Tokenizer, String> {
    let scores = metadata.array("tokenizer.ggml.scores").filter(|scores| scores.len() == tokens.len());
    let scores = scores.ok_or_else(|| format!("has no tokenizer.ggml.scores, one a token; {DAMAGED}"))?;
    let score = |value: &Value| if let Value::Float(score) = value { *score } else { f64::NEG_INFINITY };
    let scores: Vec<f64> = scores.iter().map(score).collect();
    let vocab = vocabulary(tokens);
    let merges = merges_of_scores(tokens, &scores, &vocab);
    let unknown = named_id(metadata, "unknown_token_id").and_then(|id| tokens.get(id as usize));
    let model = BPE::builder()
        .vocab_and_merges(vocab, merges)
        .unk_token((*unknown.unwrap_or(&"<unk>")).to_owned())
        .fuse_unk(true)
        .byte_fallback(true)
        .build()
        .map_err(|e| format!("{e}; {DAMAGED}"))?;
    let mut inner = Tokenizer::new(model);
    let prefix = metadata.bool("tokenizer.ggml.add_space_prefix").unwrap_or(true);
    let spaces = Replace::new("▁".to_owned(), " ").map_err(|e| e.to_string())?;
    let mut decoders = vec![spaces.into(), ByteFallback::new().into(), Fuse::new().into()];
    if prefix {
        decoders.push(Strip::new(' ', 1, 0).into());
    }
    let normalizer = normalizer(prefix).map_err(|e| e.to_string())?;
    inner.with_normalizer(Some(normalizer)).map_err(|e| e.to_string())?;
    inner.with_decoder(Some(DecoderSequence::new(decoders)));
    Ok(inner)
}

/// Marks the start of words, of the first one too with `prefix`.
fn normalizer(prefix: bool) -> tokenizers::Result<NormalizerSequence> {
    let first: Option<NormalizerWrapper> = prefix.then(|| Prepend::new("▁".into()).into());
    let spaces = Replace::new(" ".to_owned(), "▁")?;
    Ok(NormalizerSequence::new(first.into_iter().chain([spaces.into()]).collect()))
}

/// SentencePiece joins the two neighbours whose joint piece scores best; as merges, every way to cut
/// a piece into two pieces, best score first.
fn merges_of_scores(tokens: &[&str], scores: &[f64], vocab: &Vocab) -> Merges {
    let mut ranked = Vec::new();
    for (token, score) in tokens.iter().zip(scores) {
        let cuts = token.char_indices().skip(1).map(|(at, _)| token.split_at(at));
        let mut local: Vec<_> =
            cuts.filter_map(|(left, right)| Some((*vocab.get(left)?, *vocab.get(right)?, left, right))).collect();
        local.sort_unstable();
        ranked.extend(local.into_iter().map(|(.., left, right)| (*score, left, right)));
    }
    ranked.sort_by(|a, b| b.0.total_cmp(&a.0));
    ranked.into_iter().map(|(_, left, right)| (left.to_owned(), right.to_owned())).collect()
}

fn vocabulary(tokens: &[&str]) -> Vocab {
    tokens.iter().zip(0..).map(|(token, id)| ((*token).to_owned(), id)).collect()
}

/// The tokenizers crate takes it for granted that both halves and the whole are in the vocabulary.
fn check_merges(vocab: &Vocab, merges: &Merges) -> Result<(), String> {
    let known = |token: &str| vocab.contains_key(token);
    match merges.iter().find(|(a, b)| !(known(a) && known(b) && known(&format!("{a}{b}")))) {
        None => Ok(()),
        Some((a, b)) => {
            Err(format!("has the merge {a:?} {b:?}, whose tokens are not all in the vocabulary; {DAMAGED}"))
        }
    }
}

/// Control tokens (type 3) and the unknown one (2) are special. User-defined ones (4) are plain text that is never cut,
/// unless they end a turn.
fn added_tokens(metadata: &Metadata, tokens: &[&str]) -> Vec<AddedToken> {
    let types = metadata.array("tokenizer.ggml.token_type").unwrap_or_default();
    let ends = ends(tokens);
    let added = tokens.iter().zip(types).zip(0..).filter_map(|((token, kind), id)| {
        let special = match kind {
            Value::Signed(2 | 3) | Value::Unsigned(2 | 3) => true,
            Value::Signed(4) | Value::Unsigned(4) => ends.contains(&id),
            _ => return None,
        };
        Some(AddedToken::from(*token, special).normalized(false))
    });
    added.collect()
}
