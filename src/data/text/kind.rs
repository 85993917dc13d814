//! Kinds of the values in JSON columns, found from all rows.

use std::sync::Arc;

use datafusion::arrow::datatypes::{DataType, Field, Fields};
use indexmap::IndexMap;
use serde_json::{Number, Value};

/// Largest number of different keys in the objects of a column.
const MOST_FIELDS: usize = 2000;
/// Integers up to this one are exact as f64.
const EXACT: u64 = 1 << 53;

/// Key of a turn's content, which is text or parts such as `{"type": "text", "text": ...}`.
const CONTENT: &str = "content";

/// Joins the texts of a content by line breaks. `None` if the content is not a list of text parts.
pub fn joined(content: &Value) -> Option<String> {
    let text = |part: &Value| -> Option<String> {
        let object =
            part.as_object().filter(|object| object.len() == 2 && object.get("type").is_some_and(|t| t == "text"))?;
        object.get("text")?.as_str().map(str::to_owned)
    };
    let texts: Option<Vec<String>> = content.as_array()?.iter().map(text).collect();
    texts.map(|texts| texts.join("\n"))
}

/// Joins the text parts of contents, in columns of turns whose content is text.
///
/// # Errors
/// A content has parts that are not text.
pub fn join_parts(value: &mut Value, data_type: &DataType) -> Result<(), String> {
    match (value, data_type) {
        (Value::Array(items), DataType::List(item)) => {
            items.iter_mut().try_for_each(|value| join_parts(value, item.data_type()))
        }
        (Value::Object(entries), DataType::Struct(fields)) => fields.iter().try_for_each(|field| {
            let Some(value) = entries.get_mut(field.name()) else { return Ok(()) };
            if field.name() != CONTENT || *field.data_type() != DataType::Utf8 || !value.is_array() {
                return join_parts(value, field.data_type());
            }
            let text = joined(value).ok_or("`content` has parts that are no text, and is text in other turns")?;
            *value = text.into();
            Ok(())
        }),
        _ => Ok(()),
    }
}

/// Place of a value in the files.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct At {
    /// Index of the file in the data set, from 0.
    pub file: usize,
    /// Line of the file, from 1.
    pub line: u64,
}

/// Kind of the values seen so far, and the place of the first that is not null.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Found {
    kind: Kind,
    at: At,
}

#[derive(Debug, Clone, Default, PartialEq)]
enum Kind {
    /// Only nulls so far.
    #[default]
    Null,
    Bool,
    /// Integers: the smallest negative one and the largest other one.
    Whole {
        low: i64,
        high: u64,
    },
    Number,
    Text,
    List(Box<Found>),
    Struct(IndexMap<String, Found>),
}

/// Two values of one column that have no common type.
#[derive(Debug, Clone, PartialEq)]
pub struct Clash {
    /// Path from the column to the values, of `.name` and `[]`.
    pub path: String,
    pub first: String,
    pub first_at: At,
    pub second: String,
    pub second_at: At,
}

impl Clash {
    fn within(mut self, part: &str) -> Self {
        self.path.insert_str(0, part);
        self
    }
}

/// Name of a value's kind, with its article.
pub fn name_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "true or false",
        Value::Number(number) if number.is_f64() => "a number",
        Value::Number(_) => "an integer",
        Value::String(_) => "text",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

impl Found {
    /// Adds a value.
    ///
    /// # Errors
    /// The value and one before it have no common type.
    pub fn see(&mut self, value: &Value, at: At) -> Result<(), Clash> {
        if matches!(self.kind, Kind::Null) && !value.is_null() {
            *self = Self { kind: Kind::begun_by(value), at };
        }
        match (&mut self.kind, value) {
            (_, Value::Null) | (Kind::Bool, Value::Bool(_)) | (Kind::Text, Value::String(_)) => Ok(()),
            (Kind::Whole { .. } | Kind::Number, Value::Number(number)) => self.see_number(number, at),
            (Kind::List(items), Value::Array(values)) => {
                values.iter().try_for_each(|value| items.see(value, at).map_err(|clash| clash.within("[]")))
            }
            (Kind::Struct(fields), Value::Object(entries)) => {
                for (name, value) in entries {
                    if !fields.contains_key(name) {
                        fields.insert(name.clone(), Self::default());
                    }
                    if let Some(field) = fields.get_mut(name) {
                        let seen = if name == CONTENT { field.see_content(value, at) } else { field.see(value, at) };
                        seen.map_err(|clash| clash.within(&format!(".{name}")))?;
                    }
                }
                let many = fields.len() > MOST_FIELDS;
                if many {
                    Err(self.clash(format!("an object, one of {MOST_FIELDS} different keys or more"), at))
                } else {
                    Ok(())
                }
            }
            _ => Err(self.clash(name_of(value).to_owned(), at)),
        }
    }

    /// Adds the content of a turn. Text in some turns and text parts in others are text together.
    fn see_content(&mut self, value: &Value, at: At) -> Result<(), Clash> {
        match (&self.kind, value) {
            (Kind::Text, Value::Array(_)) if joined(value).is_some() => Ok(()),
            (Kind::List(items), Value::String(_)) if items.is_text_part() => {
                self.kind = Kind::Text;
                Ok(())
            }
            _ => self.see(value, at),
        }
    }

    /// Returns whether the values are objects with the keys `type` and `text` only.
    fn is_text_part(&self) -> bool {
        let Kind::Struct(fields) = &self.kind else { return false };
        fields.len() == 2 && ["type", "text"].iter().all(|name| fields.get(*name).is_some_and(|f| f.kind == Kind::Text))
    }

    fn see_number(&mut self, number: &Number, at: At) -> Result<(), Clash> {
        match &mut self.kind {
            Kind::Whole { low, high } => {
                let (was_low, was_high) = (*low, *high);
                if let Some(negative) = number.as_i64().filter(|n| *n < 0) {
                    *low = was_low.min(negative);
                } else if let Some(positive) = number.as_u64() {
                    *high = was_high.max(positive);
                } else if was_low.unsigned_abs().max(was_high) > EXACT {
                    return Err(self.clash(format!("{number}"), at));
                } else {
                    self.kind = Kind::Number;
                    return Ok(());
                }
                let mixed = *low < 0 && *high > i64::MAX as u64;
                if mixed { Err(self.clash(format!("{number}"), at)) } else { Ok(()) }
            }
            _ if number.is_f64() => Ok(()),
            _ => {
                let size = number.as_i64().map(i64::unsigned_abs).or(number.as_u64()).unwrap_or_default();
                if size > EXACT { Err(self.clash(format!("{number}"), at)) } else { Ok(()) }
            }
        }
    }

    fn clash(&self, second: String, second_at: At) -> Clash {
        let first = match &self.kind {
            Kind::Null => "null".to_owned(),
            Kind::Bool => "true or false".to_owned(),
            Kind::Whole { high, .. } if *high > EXACT => format!("the integer {high}"),
            Kind::Whole { .. } => "an integer".to_owned(),
            Kind::Number => "a number".to_owned(),
            Kind::Text => "text".to_owned(),
            Kind::List(_) => "a list".to_owned(),
            Kind::Struct(_) => "an object".to_owned(),
        };
        Clash { path: String::new(), first, first_at: self.at, second, second_at }
    }

    /// The type of the column. `None` for objects without keys, which no output format can hold. A column of nulls is
    /// text.
    pub fn data_type(&self) -> Option<DataType> {
        Some(match &self.kind {
            Kind::Null | Kind::Text => DataType::Utf8,
            Kind::Bool => DataType::Boolean,
            Kind::Whole { high, .. } if *high > i64::MAX as u64 => DataType::UInt64,
            Kind::Whole { .. } => DataType::Int64,
            Kind::Number => DataType::Float64,
            Kind::List(items) => DataType::List(Arc::new(Field::new("item", items.data_type()?, true))),
            Kind::Struct(fields) => {
                let field = |(name, found): (&String, &Self)| Some(Field::new(name, found.data_type()?, true));
                let fields: Fields = fields.iter().filter_map(field).collect();
                if fields.is_empty() {
                    return None;
                }
                DataType::Struct(fields)
            }
        })
    }
}

impl Kind {
    /// The kind of a first value, before the value itself is added.
    fn begun_by(value: &Value) -> Self {
        match value {
            Value::Null => Self::Null,
            Value::Bool(_) => Self::Bool,
            Value::Number(number) if number.is_f64() => Self::Number,
            Value::Number(_) => Self::Whole { low: 0, high: 0 },
            Value::String(_) => Self::Text,
            Value::Array(_) => Self::List(Box::default()),
            Value::Object(_) => Self::Struct(IndexMap::new()),
        }
    }
}
