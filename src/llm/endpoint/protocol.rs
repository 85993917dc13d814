//! OpenAI's chat completions as servers speak them: what is sent, and what comes back.
//!
//! Servers differ in what they leave out, so of a reply only the answers themselves have to be there.

use reqwest::Url;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::fault::{Fault, Reason};
use crate::llm::Finish;
use crate::model::ChatMessage;
use crate::observe::shortened;

/// A request.
#[derive(Debug, Serialize)]
pub struct Body<'a> {
    pub model: &'a str,
    pub messages: Vec<&'a ChatMessage>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tools: Option<&'a Value>,
    #[serde(flatten)]
    pub limit: TokenLimit,
    pub temperature: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub top_p: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub presence_penalty: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stop: Option<&'a [String]>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub n: Option<usize>,
    pub seed: i64,
}

/// The most tokens of an answer, under one of its names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum TokenLimit {
    /// As all servers but the newest know it.
    MaxTokens(usize),
    /// As OpenAI's models that reason want it.
    MaxCompletionTokens(usize),
}

/// A reply with at least one choice.
#[derive(Debug, Clone, PartialEq)]
pub struct Reply {
    pub choices: Vec<Choice>,
    pub prompt_tokens: Option<u64>,
    /// Of all choices.
    pub completion_tokens: Option<u64>,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Choice {
    pub text: String,
    pub finish: Finish,
}

/// Why a reply can't be used.
#[derive(Debug, Clone, PartialEq)]
pub enum Unusable {
    /// It is no chat completion.
    Malformed(String),
    /// The server keeps the answer to itself.
    Withheld,
}

impl Unusable {
    /// The fault of the server at `url`; none of `secrets` is in it, which a server may have repeated.
    pub fn at<'a>(self, url: &Url, secrets: impl Iterator<Item = &'a str>) -> Fault {
        match self {
            Self::Malformed(what) => Fault::passing(
                Reason::Malformed,
                format!(
                    "{url} answered with no chat completion: {}",
                    shortened(&super::fault::without(&what, secrets))
                ),
            ),
            Self::Withheld => Fault::Row(format!("{url} withheld the answer (content_filter)")),
        }
    }
}

#[derive(Deserialize)]
struct Completion {
    choices: Vec<RawChoice>,
    #[serde(default)]
    usage: Value,
}

#[derive(Deserialize)]
struct RawChoice {
    #[serde(default)]
    index: Option<u64>,
    message: RawMessage,
    #[serde(default)]
    finish_reason: Option<String>,
    /// OpenRouter's, of a provider behind it that failed.
    #[serde(default)]
    error: Value,
}

#[derive(Deserialize)]
struct RawMessage {
    #[serde(default)]
    content: Value,
    #[serde(default)]
    refusal: Value,
}

/// Reads a reply.
pub fn parse(bytes: &[u8]) -> Result<Reply, Unusable> {
    let Completion { mut choices, usage } =
        serde_json::from_slice(bytes).map_err(|e| Unusable::Malformed(e.to_string()))?;
    choices.sort_by_key(|choice| choice.index);
    let choices = choices.into_iter().map(RawChoice::read).collect::<Result<Vec<_>, _>>()?;
    if choices.is_empty() {
        return Err(Unusable::Malformed("no choices".into()));
    }
    let count = |key: &str| usage.get(key).and_then(Value::as_u64);
    Ok(Reply { choices, prompt_tokens: count("prompt_tokens"), completion_tokens: count("completion_tokens") })
}

impl RawChoice {
    fn read(self) -> Result<Choice, Unusable> {
        if !self.error.is_null() {
            return Err(Unusable::Malformed(format!("an answer is an error: {}", self.error)));
        }
        let finish = match self.finish_reason.as_deref() {
            Some("length" | "max_tokens") => Finish::Length,
            Some("content_filter") => return Err(Unusable::Withheld),
            Some(reason @ ("error" | "abort")) => {
                return Err(Unusable::Malformed(format!("an answer ended with {reason}")));
            }
            _ => Finish::Stop,
        };
        let text = match (text(self.message.content)?, self.message.refusal) {
            (None, Value::String(refusal)) => refusal,
            (found, _) => found.unwrap_or_default(),
        };
        Ok(Choice { text, finish })
    }
}

/// A text, or a list of parts of which some are text.
fn text(content: Value) -> Result<Option<String>, Unusable> {
    match content {
        Value::Null => Ok(None),
        Value::String(text) => Ok(Some(text)),
        Value::Array(parts) => {
            // Thoughts are parts of another type.
            let is_text = |part: &&Value| part.get("type").is_none_or(|kind| kind == "text" || kind == "output_text");
            let texts = parts.iter().filter(is_text).filter_map(|part| part.get("text").and_then(Value::as_str));
            Ok(Some(texts.collect()))
        }
        _ => Err(Unusable::Malformed("a content that is no text".into())),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn replies_in_the_dialects_of_servers() {
        let one = |message: &str, reason: &str| {
            let body = format!(r#"{{"choices": [{{"message": {message}, "finish_reason": {reason}}}]}}"#);
            parse(body.as_bytes())
                .map(|reply| reply.choices.into_iter().map(|c| (c.text, c.finish.as_str())).collect::<Vec<_>>())
        };
        let is = |text: &str, finish| Ok(vec![(text.to_owned(), finish)]);
        assert_eq!(one(r#"{"content": "Grüß dich, 你好 👋"}"#, "\"stop\""), is("Grüß dich, 你好 👋", "stop"));
        assert_eq!(one(r#"{"content": ""}"#, "\"length\""), is("", "length"));
        assert_eq!(one(r#"{"content": null}"#, "null"), is("", "stop"));
        assert_eq!(one(r#"{"content": null, "refusal": "No."}"#, "\"stop\""), is("No.", "stop"));
        assert_eq!(one(r#"{"content": [{"type": "text", "text": "a"}, {"text": "b"}]}"#, "\"eos\""), is("ab", "stop"));
        let thought = r#"{"content": [{"type": "reasoning", "text": "hm"}, {"type": "text", "text": "a"}]}"#;
        assert_eq!(one(thought, "\"stop\""), is("a", "stop"));
        let failed = br#"{"choices": [{"message": {"content": ""}, "error": {"code": 502, "message": "upstream"}}]}"#;
        assert!(matches!(parse(failed), Err(Unusable::Malformed(what)) if what.contains("upstream")));
        assert_eq!(one(r#"{"content": "a"}"#, "\"content_filter\""), Err(Unusable::Withheld));
        for (message, reason) in [(r#"{"content": 3}"#, "null"), ("null", "null"), (r#"{"content": "a"}"#, "\"error\"")]
        {
            assert!(matches!(one(message, reason), Err(Unusable::Malformed(_))), "{message}");
        }
        for body in ["", "{", "[]", "{}", r#"{"choices": []}"#, "<html>", "\u{0}"] {
            assert!(matches!(parse(body.as_bytes()), Err(Unusable::Malformed(_))), "{body}");
        }
    }

    #[test]
    fn choices_come_in_their_order_with_what_is_counted() {
        let body =
            br#"{"choices": [{"index": 1, "message": {"content": "b"}}, {"index": 0, "message": {"content": "a"}}],
            "usage": {"prompt_tokens": 7, "completion_tokens": 5, "more": {}}}"#;
        let reply = parse(body).unwrap();
        assert_eq!(reply.choices.iter().map(|c| c.text.as_str()).collect::<Vec<_>>(), ["a", "b"]);
        assert_eq!((reply.prompt_tokens, reply.completion_tokens), (Some(7), Some(5)));
    }

    proptest! {
        #[test]
        fn nothing_that_comes_panics(bytes in prop::collection::vec(any::<u8>(), 0..200), text in any::<String>()) {
            let _ = parse(&bytes);
            let body = serde_json::json!({ "choices": [{ "message": { "content": text } }] }).to_string();
            prop_assert_eq!(&parse(body.as_bytes()).unwrap().choices[0].text, &text);
            let _ = parse(&body.as_bytes()[..body.len() / 2]);
        }
    }
}
