//! Reading a table into a struct, with errors that name the exact key.
//!
//! serde says what is wrong but not where. The table is therefore written as one inline TOML value
//! and read back: the parser then reports the span of what failed, and the span leads to the key,
//! however deep it lies.

use std::ops::Range;

use serde::de::DeserializeOwned;
use toml::de::{DeValue, ValueDeserializer};
use toml::{Spanned, Table, Value};

use super::FlowError;
use super::document::join;
use super::names;

/// `table` as `T`. `path` is the dotted key of the table, empty for the whole flow.
///
/// # Errors
/// Unknown key (where `T` says `deny_unknown_fields`), wrong type, unknown choice, missing key: the
/// dotted key, what was expected, and a "did you mean".
pub fn read<T: DeserializeOwned>(table: &Table, path: &str) -> Result<T, FlowError> {
    let text = Value::Table(table.clone()).to_string();
    ValueDeserializer::parse(&text).and_then(T::deserialize).map_err(|error| {
        let below = error.span().map_or_else(Vec::new, |span| key_at(&text, &span));
        describe(error.message(), path, &below)
    })
}

/// The keys, outermost first, that lead to what was written at `span`.
fn key_at(text: &str, span: &Range<usize>) -> Vec<String> {
    let mut path = Vec::new();
    if let Ok(root) = DeValue::parse(text) {
        descend(&root, span, &mut path);
    }
    path
}

fn descend(value: &Spanned<DeValue<'_>>, target: &Range<usize>, path: &mut Vec<String>) {
    let holds = |span: Range<usize>| span.start <= target.start && target.end <= span.end;
    match value.get_ref() {
        DeValue::Table(table) => {
            for (name, inner) in table {
                if holds(name.span()) || holds(inner.span()) {
                    path.push(name.get_ref().to_string());
                    return descend(inner, target, path);
                }
            }
        }
        DeValue::Array(list) => {
            if let Some((number, item)) = list.iter().enumerate().find(|(_, item)| holds(item.span())) {
                path.push(number.to_string());
                descend(item, target, path);
            }
        }
        _ => {}
    }
}

/// serde's message in the words of a flow file.
fn describe(message: &str, path: &str, below: &[String]) -> FlowError {
    let key = below.iter().fold(path.to_owned(), |key, part| join(&key, part));
    let mut quoted = message.split('`').skip(1).step_by(2);
    if message.starts_with("unknown field") {
        let name = quoted.next().unwrap_or_default();
        let table = match below.split_last() {
            Some((last, parents)) if last == name => parents,
            _ => below,
        };
        let table = table.iter().fold(path.to_owned(), |key, part| join(&key, part));
        return names::unknown_key(&table, name, &quoted.collect::<Vec<_>>());
    }
    if message.starts_with("missing field") {
        let name = quoted.next().unwrap_or_default();
        return FlowError::new(join(&key, name), "this key is required").help(format!("add `{name} = ...`"));
    }
    if below.last().is_some_and(|name| is_secret(name)) || below.iter().any(|name| name == SECRETS && below.len() > 1) {
        return FlowError::new(key, "must be a string");
    }
    if message.starts_with("unknown variant") {
        let name = quoted.next().unwrap_or_default();
        return FlowError::new(key, format!("`{name}` is not a choice here"))
            .help(names::suggest(name, &quoted.collect::<Vec<_>>()));
    }
    let invalid = message.strip_prefix("invalid type: ").or(message.strip_prefix("invalid value: "));
    if let Some((found, expected)) = invalid.and_then(|rest| rest.split_once(", expected ")) {
        return FlowError::new(key, format!("expected {}, not {}", plain_type(expected), plain_value(found)));
    }
    if message.starts_with("data did not match any variant") {
        return FlowError::new(key, "the value has none of the forms that this key may have");
    }
    FlowError::new(key, message.replace('\n', ", "))
}

fn plain_type(expected: &str) -> &str {
    match expected {
        "u8" | "u16" | "u32" | "u64" | "usize" => "a whole number from 0 up",
        "i8" | "i16" | "i32" | "i64" | "isize" => "a whole number",
        "f32" | "f64" => "a number",
        "a boolean" => "true or false",
        "a sequence" => "a list",
        "a map" => "a table",
        other if other.starts_with("struct ") => "a table",
        other if other.starts_with("nonzero ") || other.starts_with("a nonzero ") => "a whole number from 1 up",
        other => other,
    }
}

fn plain_value(found: &str) -> String {
    let found = found.replace("floating point", "the number").replace("integer", "the number");
    match found.as_str() {
        "sequence" => "a list".into(),
        "map" => "a table".into(),
        other => other.replace("string", "the string").replace("boolean", "the value"),
    }
}

/// The table of a model whose values are never shown or written, whatever their keys.
pub const SECRETS: &str = "headers";

/// Keys whose values are never shown or written.
pub fn is_secret(key: &str) -> bool {
    key == "api_key" || key.ends_with("_api_key")
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use serde::Deserialize;

    use super::*;

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    #[allow(dead_code)]
    struct Align {
        learning_rate: f64,
        epochs: Option<u32>,
        schedule: Option<Schedule>,
        lora: Option<Lora>,
        devices: Option<Vec<String>>,
        outputs: Option<BTreeMap<String, f64>>,
        api_key: Option<String>,
        steps: Option<Vec<Lora>>,
    }

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    #[allow(dead_code)]
    struct Lora {
        r: u32,
        alpha: Option<f64>,
    }

    #[derive(Debug, Deserialize)]
    #[serde(rename_all = "lowercase")]
    enum Schedule {
        Linear,
        Cosine,
    }

    fn error(text: &str) -> String {
        let table = toml::from_str(text).expect("valid TOML");
        read::<Align>(&table, "stages.align").expect_err("must fail").to_string()
    }

    #[test]
    fn a_good_table_is_read() {
        let table = toml::from_str("learning_rate = 1\nlora = { r = 8 }\nschedule = 'linear'").expect("valid TOML");
        let align: Align = read(&table, "stages.align").expect("valid");
        assert_eq!((align.learning_rate, align.lora.map(|lora| lora.r)), (1.0, Some(8)));
        assert!(matches!(align.schedule, Some(Schedule::Linear)));
    }

    #[test]
    fn errors_name_the_key_at_any_depth() {
        let cases = [
            (
                "learning_rate = 1\nlora = { r = 8, alhpa = 8 }",
                "stages.align.lora.alhpa: unknown key\n  help: did you mean `alpha`?",
            ),
            (
                "learning_rate = 1\n[lora]\nr = 'x'",
                "stages.align.lora.r: expected a whole number from 0 up, not the string \"x\"",
            ),
            (
                "learning_rate = 1\nlora = { alpha = 8 }",
                "stages.align.lora.r: this key is required\n  help: add `r = ...`",
            ),
            (
                "learning_rate = 1\nsteps = [{ r = 1 }, { r = -1 }]",
                "stages.align.steps.1.r: expected a whole number from 0 up, not the number `-1`",
            ),
            (
                "learning_rate = 1\noutputs = { train = 'x' }",
                "stages.align.outputs.train: expected a number, not the string \"x\"",
            ),
            ("learning_rate = 1\nlora = 3", "stages.align.lora: expected a table, not the number `3`"),
            ("learning_rate = 1\ndevices = ['a', 1]", "stages.align.devices.1: expected a string, not the number `1`"),
            (
                "learning_rate = 1\nschedule = 'cosin'",
                "stages.align.schedule: `cosin` is not a choice here\n  help: did you mean `cosine`?",
            ),
            (
                "learning_rate = 1\nlr = 1",
                "stages.align.lr: unknown key\n  help: did you mean `learning_rate`? That is what `lr` is called here",
            ),
            (
                "learning_rate = 1\nlora_r = 1",
                "stages.align.lora_r: unknown key\n  help: did you mean `lora.r`? That is what `lora_r` is called here",
            ),
            ("epochs = 1", "stages.align.learning_rate: this key is required\n  help: add `learning_rate = ...`"),
            ("learning_rate = 1\napi_key = ['hunter2']", "stages.align.api_key: must be a string"),
        ];
        for (text, expected) in cases {
            assert_eq!(error(text), expected, "{text}");
        }
    }
}
