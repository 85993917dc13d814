//! A tokenised prompt, after which an answer begins.
//!
//! The tokens of an answer depend on the text before it. SentencePiece marks the start of a word with `▁`, and most of
//! its tokenizers mark the start of a text too. After a prompt this mark is there only if the whole text has it.

use super::{ModelError, Tokenizer};

/// A prompt as text and as token ids.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Opened {
    text: String,
    ids: Vec<u32>,
    /// Number of tokens at the beginning that are not part of the text: 1 with `bos_token`, else 0.
    added: usize,
}

impl Opened {
    /// Tokenises the text of a chat template. No token is added.
    ///
    /// # Errors
    /// Those of [`Tokenizer::encode`].
    pub fn of_template(tokenizer: &Tokenizer, text: String) -> Result<Self, ModelError> {
        Ok(Self { ids: tokenizer.encode(&text, false)?, text, added: 0 })
    }

    /// Tokenises a text without chat template. `add_bos` has the meaning that it has in [`Tokenizer::encode_text`].
    ///
    /// # Errors
    /// Those of [`Tokenizer::encode_text`].
    pub fn of_text(tokenizer: &Tokenizer, text: String, add_bos: Option<bool>) -> Result<Self, ModelError> {
        let bos = tokenizer.begins_with(add_bos)?;
        let ids = bos.into_iter().chain(tokenizer.encode(&text, false)?).collect();
        Ok(Self { ids, text, added: usize::from(bos.is_some()) })
    }

    /// The text of the prompt.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// The token ids of the prompt.
    pub fn ids(&self) -> &[u32] {
        &self.ids
    }

    /// The token ids of the prompt, by value.
    pub fn into_ids(self) -> Vec<u32> {
        self.ids
    }

    /// Token ids of `text` after this prompt: the ids of both texts together, without those of the prompt. If the last
    /// token of the prompt would merge with `text`, the ids of `text` alone, without a mark at its start.
    ///
    /// # Errors
    /// Those of [`Tokenizer::encode`].
    pub fn behind(&self, tokenizer: &Tokenizer, text: &str) -> Result<Vec<u32>, ModelError> {
        let whole = tokenizer.encode(&format!("{}{text}", self.text), false)?;
        match whole.strip_prefix(&self.ids[self.added..]) {
            Some(ids) => Ok(ids.to_vec()),
            None => tokenizer.encode_inside(text),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::{Path, PathBuf};

    use chrono::NaiveDate;
    use serde_json::Value as Json;

    use super::*;
    use crate::model::config::Config;
    use crate::model::gguf::fixture;
    use crate::model::tokenizer::read_json;
    use crate::model::{ChatMessage, ChatTemplate};

    fn fixtures() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")
    }

    fn tokenizer(kind: &str) -> Tokenizer {
        let (_gguf_dir, gguf) = fixture::small().open();
        let of_kind = |under: &str| fixtures().join(under).join(kind);
        let dir = Some(of_kind("answers")).filter(|dir| dir.exists()).unwrap_or_else(|| of_kind("tokenizers"));
        Tokenizer::from_dir(&dir, &Config::from_gguf(&gguf).unwrap()).unwrap()
    }

    fn ids(json: &Json) -> Vec<u32> {
        json.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
    }

    /// `tests/oracle/answers.py` writes whole conversations as transformers' `apply_chat_template` tokenises them.
    #[test]
    fn an_answer_has_the_ids_that_it_has_in_the_whole_conversation() {
        let fixture = read_json(&fixtures().join("answers/expected.json")).unwrap().unwrap();
        let mut marked = 0;
        for case in fixture["cases"].as_array().unwrap() {
            let (kind, name) = (case["tokenizer"].as_str().unwrap(), case["template"].as_str().unwrap());
            let tokenizer = tokenizer(kind);
            let date = NaiveDate::from_ymd_opt(2026, 3, 9).unwrap();
            let source = fixture["templates"][name].as_str().unwrap();
            let template = ChatTemplate::new(source, None, date, &tokenizer).unwrap();
            for row in case["rows"].as_array().unwrap() {
                let prompt = [ChatMessage::new("user", row["prompt"].as_str().unwrap())];
                let answer = row["answer"].as_str().unwrap();
                let opened = template.opened(&tokenizer, &prompt).unwrap();
                assert_eq!(opened.ids(), ids(&row["prompt_ids"]), "{kind} {name} {row}");
                let found = template.encode_answer(&tokenizer, &prompt, &opened, answer).unwrap();
                assert_eq!(found, ids(&row["answer_ids"]), "{kind} {name} {row}");
                marked += usize::from(found != tokenizer.encode(answer, false).unwrap());
                let end = template.end_of_turn(&tokenizer).unwrap();
                assert!(ids(&row["behind"]).starts_with(&end), "{kind} {name} {row}: {end:?}");
            }
        }
        assert!(marked > 20, "{marked} answers differ from their text alone");
    }

    /// The same file has texts without template, cut in two.
    #[test]
    fn a_text_goes_on_as_the_whole_text_does() {
        let fixture = read_json(&fixtures().join("answers/expected.json")).unwrap().unwrap();
        let mut grown = 0;
        for case in fixture["texts"].as_array().unwrap() {
            let kind = case["tokenizer"].as_str().unwrap();
            let tokenizer = tokenizer(kind);
            for row in case["rows"].as_array().unwrap() {
                let (before, text) = (row["before"].as_str().unwrap(), row["text"].as_str().unwrap());
                let opened = Opened::of_text(&tokenizer, before.into(), Some(false)).unwrap();
                let found = opened.behind(&tokenizer, text).unwrap();
                let whole = ids(&row["ids"]);
                match whole.strip_prefix(opened.ids()) {
                    Some(rest) => assert_eq!(found, rest, "{kind} {row}"),
                    None => {
                        // The prompt's last token is longer in the whole text. What is read is the text all the same.
                        grown += 1;
                        let all = [opened.ids(), &found].concat();
                        let read = tokenizer.decode(&all, false).unwrap();
                        assert_eq!(read, tokenizer.decode(&whole, false).unwrap(), "{kind} {row}");
                    }
                }
            }
        }
        assert!(grown > 0, "no seam is tested");
    }

    #[test]
    fn a_begin_of_text_token_is_no_part_of_the_text() {
        let tokenizer = tokenizer("llama2");
        let [plain, begun] = [false, true].map(|bos| Opened::of_text(&tokenizer, "a b".into(), Some(bos)).unwrap());
        assert_eq!(begun.ids(), [&[1], plain.ids()].concat());
        assert_eq!(begun.behind(&tokenizer, " c").unwrap(), plain.behind(&tokenizer, " c").unwrap());
    }
}
