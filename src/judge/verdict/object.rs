//! Finds JSON objects in a text.

use serde_json::{Map, Value};

use super::{End, Said};

/// Largest number of places where an object may begin.
const PLACES: usize = 1000;

/// The fields of an object.
pub struct Fields {
    map: Map<String, Value>,
    /// True if the text was cut off in the object, so that its last field may not be whole.
    cut: bool,
}

/// The value of one object.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Reading<T> {
    /// No field is about the verdict.
    Nothing,
    Unclear,
    Value(T),
}

/// The value of a text's objects.
pub enum Found<'a, T> {
    Nothing,
    Unclear,
    /// A value, and the text before and after the last object with it.
    Value {
        value: T,
        before: &'a str,
        after: &'a str,
    },
}

impl Fields {
    /// Returns the values of the fields with one of `names`, which are in lower case and without separators.
    pub fn fields<'f>(&'f self, names: &'f [&str]) -> impl Iterator<Item = &'f Value> {
        self.whole().filter(|(key, _)| names.contains(&plain_key(key).as_str())).map(|(_, value)| value)
    }

    /// Returns the values of the fields with none of `names`.
    pub fn others<'f>(&'f self, names: &'f [&str]) -> impl Iterator<Item = &'f Value> {
        self.whole().filter(|(key, _)| !names.contains(&plain_key(key).as_str())).map(|(_, value)| value)
    }

    /// Returns whether a key contains one of `words`.
    pub fn mentions(&self, words: &[&str]) -> bool {
        self.whole().any(|(key, _)| words.iter().any(|word| plain_key(key).contains(word)))
    }

    fn whole(&self) -> impl Iterator<Item = (&String, &Value)> {
        self.map.iter().take(if self.cut { self.map.len().saturating_sub(1) } else { self.map.len() })
    }
}

/// Returns a key in lower case and without separators.
fn plain_key(key: &str) -> String {
    key.chars().filter(|c| c.is_alphanumeric()).flat_map(char::to_lowercase).collect()
}

/// Returns the common value of all fields.
pub fn agreed<T: PartialEq>(values: impl Iterator<Item = Option<T>>) -> Reading<T> {
    let mut reading = Reading::Nothing;
    for value in values {
        reading = match (value, reading) {
            (Some(value), Reading::Nothing) => Reading::Value(value),
            (Some(value), Reading::Value(other)) if value == other => Reading::Value(value),
            _ => return Reading::Unclear,
        };
    }
    reading
}

/// Reads the objects of a text with `read`. All that have a value must have the same.
pub fn in_text<'a, T: PartialEq>(said: Said<'a>, read: impl Fn(&Fields) -> Reading<T>) -> Found<'a, T> {
    let mut found = Found::Nothing;
    let mut last = 0;
    for (fields, start, end) in objects(said) {
        let (before, after) = (&said.text[..start], &said.text[end..]);
        let alone = is_alone(&said.text[last..start]);
        last = end;
        let reading = match read(&fields) {
            Reading::Value(_) if !alone => Reading::Unclear,
            reading => reading,
        };
        found = match (reading, found) {
            (Reading::Nothing, found) => found,
            (Reading::Value(value), Found::Nothing) => Found::Value { value, before, after },
            (Reading::Value(value), Found::Value { value: other, before, .. }) if value == other => {
                Found::Value { value, before, after }
            }
            _ => return Found::Unclear,
        };
    }
    found
}

/// Returns whether an object after `before` begins its line or follows another one. In a sentence it may be denied.
fn is_alone(before: &str) -> bool {
    let line = before.rsplit('\n').next().unwrap_or_default();
    line.trim_matches(|c: char| c.is_whitespace() || "[,`>*".contains(c)).is_empty() || line.trim() == "json"
}

/// Returns the outermost objects with where they begin and end.
fn objects(said: Said<'_>) -> Vec<(Fields, usize, usize)> {
    let text = said.text;
    let mut all = Vec::new();
    let mut from = 0;
    for _ in 0..PLACES {
        let Some(start) = text[from..].find('{').map(|at| from + at) else { break };
        match object(&text[start..]) {
            Some((map, length)) => {
                all.push((Fields { map, cut: false }, start, start + length));
                from = start + length;
            }
            None => from = start + 1,
        }
    }
    if all.is_empty() && said.end == End::Cut {
        all.extend(unfinished(text));
    }
    all
}

/// Reads the object at the beginning of `text`, also one with single quotes as Python writes it.
fn object(text: &str) -> Option<(Map<String, Value>, usize)> {
    let mut stream = serde_json::Deserializer::from_str(text).into_iter::<Map<String, Value>>();
    if let Some(Ok(map)) = stream.next() {
        return Some((map, stream.byte_offset()));
    }
    let end = text.find('}')? + 1;
    let quoted = text[..end].contains('\'') && !text[..end].contains('"');
    let map = quoted.then(|| serde_json::from_str(&text[..end].replace('\'', "\"")).ok())??;
    Some((map, end))
}

/// Reads an object that was cut off in its reasons. One that was cut off elsewhere may have held another verdict.
fn unfinished(text: &str) -> Option<(Fields, usize, usize)> {
    const REASONS: [&str; 9] = [
        "reason",
        "reasons",
        "reasoning",
        "explanation",
        "rationale",
        "justification",
        "comment",
        "comments",
        "feedback",
    ];
    let start = text.find('{')?;
    let map: Map<String, Value> = serde_json::from_str(&format!("{}\"}}", &text[start..])).ok()?;
    let last = map.keys().next_back().is_some_and(|key| REASONS.contains(&plain_key(key).as_str()));
    last.then(|| (Fields { map, cut: true }, start, text.len()))
}
