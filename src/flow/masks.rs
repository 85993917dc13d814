//! Masks values from the environment: text shows `${NAME}` in their place.
//!
//! Any variable may hold a secret: a key, a server address with a password, a folder with a customer's name. So all
//! values are masked in files of a run (except rows), events, messages and the log.

use std::fmt;

use serde_json::Value;

use super::{FlowError, Form};

/// A value shorter than this is masked only as a whole word, because its letters also occur inside other words.
const SHORT: usize = 4;

/// The values to mask and their replacements.
#[derive(Clone, Default)]
pub struct Masks {
    /// Pairs of a value and its replacement, the longest value first.
    values: Vec<(String, String)>,
}

/// Shows only the names, not the values.
impl fmt::Debug for Masks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.values.iter().map(|(_, shown)| shown)).finish()
    }
}

impl Masks {
    /// Adds the value of the variable `name`, also without a trailing `/` and in escaped form.
    pub fn add(&mut self, name: &str, value: &str) {
        let percent: String = url::form_urlencoded::byte_serialize(value.as_bytes()).collect();
        let forms = [
            value.to_owned(),
            value.trim_end_matches('/').to_owned(),
            value.escape_debug().to_string(),
            Value::from(value).to_string().trim_matches('"').to_owned(),
            percent.replace('+', "%20"),
            percent,
        ];
        for form in forms {
            if !form.is_empty() && self.values.iter().all(|(known, _)| *known != form) {
                self.values.push((form, format!("${{{name}}}")));
            }
        }
        self.values.sort_by_key(|(value, _)| std::cmp::Reverse(value.len()));
    }

    /// Returns the text with every value masked.
    pub fn text(&self, text: &str) -> String {
        self.replace(text, |_, shown| shown.to_owned())
    }

    /// As [`Self::text`], with the first digits of the value's hash added, so that different values can be told apart
    /// in a later comparison.
    pub fn marked(&self, text: &str) -> String {
        self.replace(text, |value, shown| format!("{shown}#{}", &blake3::hash(value.as_bytes()).to_hex()[..8]))
    }

    fn replace(&self, text: &str, shown: impl Fn(&str, &str) -> String) -> String {
        let mut masked = String::with_capacity(text.len());
        let mut at = 0;
        while let Some(next) = text[at..].chars().next() {
            match self.values.iter().find(|(value, _)| stands_at(text, at, value)) {
                Some((value, name)) => {
                    masked.push_str(&shown(value, name));
                    at += value.len();
                }
                None => {
                    masked.push(next);
                    at += next.len_utf8();
                }
            }
        }
        masked
    }

    /// Masks every string in the value. Keys are not masked, because they are names from the flow.
    pub fn json(&self, value: &mut Value) {
        each_text(value, &|text| self.text(text));
    }

    /// Masks every text in the form with [`Self::marked`].
    pub fn marked_form(&self, form: &mut Form) {
        match form {
            Form::Text(text) => *text = self.marked(text),
            Form::List(list) => list.iter_mut().for_each(|form| self.marked_form(form)),
            Form::Table(table) => table.values_mut().for_each(|form| self.marked_form(form)),
            _ => {}
        }
    }

    /// Returns the error with message and help masked.
    pub fn error(&self, error: FlowError) -> FlowError {
        FlowError { message: self.text(&error.message), help: error.help.map(|help| self.text(&help)), ..error }
    }
}

fn stands_at(text: &str, at: usize, value: &str) -> bool {
    let is_word = |c: Option<char>| c.is_some_and(char::is_alphanumeric);
    text[at..].starts_with(value)
        && (value.len() >= SHORT
            || !(is_word(text[..at].chars().next_back()) || is_word(text[at + value.len()..].chars().next())))
}

fn each_text(value: &mut Value, change: &dyn Fn(&str) -> String) {
    match value {
        Value::String(text) => *text = change(text),
        Value::Array(list) => list.iter_mut().for_each(|value| each_text(value, change)),
        Value::Object(map) => map.values_mut().for_each(|value| each_text(value, change)),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn masks() -> Masks {
        let mut masks = Masks::default();
        for (name, value) in [("KEY", "hunter2"), ("LONG", "hunter2-and-more"), ("PIN", "42"), ("DIR", "/srv/a \"b\"/")]
        {
            masks.add(name, value);
        }
        masks
    }

    #[test]
    fn values_are_masked_wherever_they_stand() {
        let masks = masks();
        for (text, shown) in [
            ("key hunter2!", "key ${KEY}!"),
            ("xhunter2x hunter2-and-more", "x${KEY}x ${LONG}"),
            ("pin 42, not 142 or 42nd", "pin ${PIN}, not 142 or 42nd"),
            ("/srv/a \"b\"/x and /srv/a \"b\"", "${DIR}x and ${DIR}"),
            ("says \"/srv/a \\\"b\\\"/x\"", "says \"${DIR}x\""),
            ("é", "é"),
        ] {
            assert_eq!(masks.text(text), shown, "{text}");
        }
        let mut value = json!({ "hunter2": ["a hunter2", 42, { "b": "hunter2" }] });
        masks.json(&mut value);
        assert_eq!(value, json!({ "hunter2": ["a ${KEY}", 42, { "b": "${KEY}" }] }));
        assert_eq!(masks.marked("hunter2"), masks.marked("hunter2"));
        assert!(!format!("{masks:?}{}", masks.marked("hunter2 42")).contains("hunter2"));
        assert_ne!(masks.marked("hunter2"), masks.marked("hunter2-and-more"));
        assert_eq!(Masks::default().text("hunter2"), "hunter2");
    }
}
