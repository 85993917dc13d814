//! Typed access to the keys of a config.json.

use serde_json::Value as Json;

/// JSON as Python writes it: `NaN`, `Infinity` and `-Infinity` too, which become texts. A key that nobody reads may have
/// them, and of one that is read the text is told as what it is.
pub fn python_json(text: &str) -> serde_json::Result<Json> {
    serde_json::from_str(text).or_else(|error| {
        let quoted = with_quoted_words(text);
        if quoted == text { Err(error) } else { serde_json::from_str(&quoted) }
    })
}

/// The three words in quotes, where they stand outside of strings.
fn with_quoted_words(text: &str) -> String {
    let (mut out, mut rest, mut inside) = (String::with_capacity(text.len()), text, false);
    while let Some(c) = rest.chars().next() {
        let word = ["NaN", "-Infinity", "Infinity"].into_iter().find(|word| !inside && rest.starts_with(word));
        let length = match (word, c) {
            (Some(word), _) => {
                out.extend(["\"", word, "\""]);
                rest = rest.get(word.len()..).unwrap_or_default();
                continue;
            }
            (None, '\\') if inside => 1 + rest.chars().nth(1).map_or(0, char::len_utf8),
            (None, '"') => {
                inside = !inside;
                1
            }
            (None, c) => c.len_utf8(),
        };
        let (taken, after) = rest.split_at(length);
        out.push_str(taken);
        rest = after;
    }
    out
}

/// An object of a config.json; a key that is null counts as absent.
#[derive(Clone, Copy)]
pub struct Keys<'a>(pub &'a Json);

impl<'a> Keys<'a> {
    pub fn get(&self, key: &str) -> Option<&'a Json> {
        self.0.get(key).filter(|value| !value.is_null())
    }

    pub fn optional_size(&self, key: &str) -> Result<Option<usize>, String> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let size = value.as_u64().and_then(|n| usize::try_from(n).ok()).filter(|n| *n > 0);
        size.map(Some).ok_or_else(|| format!("has {key} = {value}; it must be a positive whole number"))
    }

    pub fn size(&self, key: &str) -> Result<usize, String> {
        self.optional_size(key)?.ok_or_else(|| format!("has no {key}; is it the config.json of a language model?"))
    }

    pub fn number(&self, key: &str) -> Result<Option<f64>, String> {
        let Some(value) = self.get(key) else { return Ok(None) };
        value.as_f64().map(Some).ok_or_else(|| format!("has {key} = {value}; it must be a number"))
    }

    pub fn positive(&self, key: &str) -> Result<Option<f64>, String> {
        match self.number(key)? {
            Some(n) if !(n.is_finite() && n > 0.0) => Err(format!("has {key} = {n}; it must be a positive number")),
            number => Ok(number),
        }
    }

    pub fn numbers(&self, key: &str) -> Result<Option<Vec<f64>>, String> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let list = value.as_array().and_then(|list| list.iter().map(Json::as_f64).collect());
        list.map(Some).ok_or_else(|| format!("has a {key} that is no list of numbers"))
    }

    pub fn texts(&self, key: &str) -> Result<Option<Vec<&'a str>>, String> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let list = value.as_array().and_then(|list| list.iter().map(Json::as_str).collect());
        list.map(Some).ok_or_else(|| format!("has a {key} that is no list of texts"))
    }

    pub fn flag(&self, key: &str) -> Result<Option<bool>, String> {
        let Some(value) = self.get(key) else { return Ok(None) };
        value.as_bool().map(Some).ok_or_else(|| format!("has {key} = {value}; it must be true or false"))
    }

    /// A token id, or a list of them.
    pub fn ids(&self, key: &str) -> Result<Vec<u32>, String> {
        token_ids(self.get(key)).ok_or_else(|| format!("has a {key} that is no token id and no list of them"))
    }
}

/// A token id or a list of them, as `eos_token_id` is written; nothing is an empty list.
pub fn token_ids(value: Option<&Json>) -> Option<Vec<u32>> {
    let id = |value: &Json| value.as_u64().and_then(|n| u32::try_from(n).ok());
    match value {
        None | Some(Json::Null) => Some(Vec::new()),
        Some(Json::Array(list)) => list.iter().map(id).collect(),
        Some(one) => id(one).map(|id| vec![id]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_python_writes_is_read() {
        let json = python_json(r#"{"a": [NaN, -Infinity, 1e5], "b": "Infinity \" NaN", "c": Infinity}"#).unwrap();
        let wanted = r#"{"a": ["NaN", "-Infinity", 1e5], "b": "Infinity \" NaN", "c": "Infinity"}"#;
        assert_eq!(json, serde_json::from_str::<Json>(wanted).unwrap());
        assert!(python_json("{\"a\": nan}").is_err() && python_json("{NaN").is_err());
        let message = Keys(&json).number("c").unwrap_err();
        assert!(message.contains("has c = \"Infinity\"; it must be a number"), "{message}");
    }
}
