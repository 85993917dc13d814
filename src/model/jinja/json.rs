//! `tojson`, as transformers gives it to templates: Python's `json.dumps`, HTML left as it is.

use std::fmt::Write;

use minijinja::value::{Kwargs, ValueKind};
use minijinja::{Error, Value};

use super::repr::{DEEPEST, float};
use super::{LONGEST_PADDING, fault};

/// `tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False)`.
pub fn tojson(
    value: Value,
    ensure_ascii: Option<Value>,
    indent: Option<Value>,
    separators: Option<Value>,
    options: Kwargs,
) -> Result<String, Error> {
    let argument = |name: &str, given: Option<Value>| -> Result<Option<Value>, Error> {
        let value = if given.is_some() { given } else { options.get(name)? };
        Ok(value.filter(|value| !value.is_none() && !value.is_undefined()))
    };
    let is_true = |value: Option<Value>| value.is_some_and(|value| value.is_true());
    let ascii = is_true(argument("ensure_ascii", ensure_ascii)?);
    let indent = argument("indent", indent)?.map(|value| indentation(&value)).transpose()?;
    let separators = argument("separators", separators)?;
    let sorted = is_true(argument("sort_keys", None)?);
    options.assert_all_used()?;
    let (item, key) = match separators {
        Some(pair) => separated(&pair)?,
        None => (if indent.is_some() { "," } else { ", " }.to_owned(), ": ".to_owned()),
    };
    let mut writer = Writer { out: String::new(), style: Style { ascii, sorted, indent, item, key } };
    writer.value(&value, 0)?;
    Ok(writer.out)
}

/// One step of an indentation: that many spaces, or a text.
fn indentation(value: &Value) -> Result<String, Error> {
    if let Some(text) = value.as_str() {
        return Ok(text.to_owned());
    }
    let width = i64::try_from(value.clone())?;
    Ok(" ".repeat(usize::try_from(width).unwrap_or(0).min(LONGEST_PADDING)))
}

fn separated(pair: &Value) -> Result<(String, String), Error> {
    let parts: Vec<Value> = pair.try_iter()?.collect();
    match parts.as_slice() {
        [item, key] => Ok((item.to_string(), key.to_string())),
        _ => Err(fault("separators of tojson are a pair of texts")),
    }
}

struct Style {
    ascii: bool,
    sorted: bool,
    indent: Option<String>,
    item: String,
    key: String,
}

struct Writer {
    out: String,
    style: Style,
}

impl Writer {
    fn value(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        if depth > DEEPEST {
            return Err(fault(format!("tojson of a value that is nested more than {DEEPEST} times")));
        }
        match value.kind() {
            ValueKind::None => self.out.push_str("null"),
            ValueKind::Bool => self.out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => self.out.push_str(&number(value)?),
            ValueKind::String => self.text(value.as_str().unwrap_or_default()),
            ValueKind::Seq | ValueKind::Iterable => self.list(value, depth)?,
            ValueKind::Map => self.map(value, depth)?,
            other => return Err(fault(format!("tojson of {other}, which JSON lacks"))),
        }
        Ok(())
    }

    fn list(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        let items: Vec<Value> = value.try_iter()?.collect();
        self.out.push('[');
        for (i, item) in items.iter().enumerate() {
            self.between(i, depth + 1);
            self.value(item, depth + 1)?;
        }
        self.end(items.is_empty(), depth);
        self.out.push(']');
        Ok(())
    }

    fn map(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        let mut entries = Vec::new();
        for key in value.try_iter()? {
            entries.push((name(&key)?, value.get_item(&key)?));
        }
        if self.style.sorted {
            entries.sort_by(|(a, _), (b, _)| a.cmp(b));
        }
        self.out.push('{');
        for (i, (key, value)) in entries.iter().enumerate() {
            self.between(i, depth + 1);
            self.text(key);
            let colon = self.style.key.clone();
            self.out.push_str(&colon);
            self.value(value, depth + 1)?;
        }
        self.end(entries.is_empty(), depth);
        self.out.push('}');
        Ok(())
    }

    /// The text in front of the item of this number.
    fn between(&mut self, number: usize, depth: usize) {
        if number > 0 {
            self.out.push_str(&self.style.item);
        }
        self.line(depth);
    }

    fn end(&mut self, empty: bool, depth: usize) {
        if !empty {
            self.line(depth);
        }
    }

    fn line(&mut self, depth: usize) {
        if let Some(step) = &self.style.indent {
            self.out.push('\n');
            self.out.push_str(&step.repeat(depth));
        }
    }

    fn text(&mut self, text: &str) {
        self.out.push('"');
        for c in text.chars() {
            match c {
                '"' => self.out.push_str("\\\""),
                '\\' => self.out.push_str("\\\\"),
                '\n' => self.out.push_str("\\n"),
                '\r' => self.out.push_str("\\r"),
                '\t' => self.out.push_str("\\t"),
                '\u{8}' => self.out.push_str("\\b"),
                '\u{c}' => self.out.push_str("\\f"),
                c if c < ' ' || (self.style.ascii && !(' '..='~').contains(&c)) => {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        // Writing to a string can't fail.
                        let _ = write!(self.out, "\\u{unit:04x}");
                    }
                }
                c => self.out.push(c),
            }
        }
        self.out.push('"');
    }
}

/// A key as `json.dumps` makes it a text.
fn name(key: &Value) -> Result<String, Error> {
    match key.kind() {
        ValueKind::String => Ok(key.as_str().unwrap_or_default().to_owned()),
        ValueKind::None => Ok("null".into()),
        ValueKind::Bool => Ok(if key.is_true() { "true" } else { "false" }.into()),
        ValueKind::Number => number(key),
        other => Err(fault(format!("tojson of a map with the key {key}, which is {other}"))),
    }
}

fn number(value: &Value) -> Result<String, Error> {
    if value.is_integer() {
        return Ok(value.to_string());
    }
    let x = f64::try_from(value.clone())?;
    Ok(match x {
        _ if x.is_nan() => "NaN".into(),
        f64::INFINITY => "Infinity".into(),
        f64::NEG_INFINITY => "-Infinity".into(),
        _ => float(x),
    })
}
