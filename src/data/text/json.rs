//! The objects of a JSON text: lines, objects one after another, or one array of them, in any layout.

use std::cell::Cell;
use std::fmt;
use std::io::BufRead;
use std::path::Path;

use serde::de::{DeserializeSeed, Error as _, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};

use super::bytes;
use crate::data::DataError;

/// An object that is longer does not end: a bracket is missing.
const LONGEST: usize = 256 << 20;

/// An object, with the line that it begins in.
pub type Record = (u64, Map<String, Value>);

/// The objects of one file, in order, each with the line that it begins in.
pub struct Records<'a> {
    path: &'a Path,
    reader: Box<dyn BufRead + Send>,
    /// The line that is read next, from 1.
    line: u64,
    /// The bytes of one value.
    buffer: Vec<u8>,
    layout: Layout,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Layout {
    /// Nothing was read yet.
    Unknown,
    Objects,
    /// In an array that begins in this line; a value or its end comes next.
    Array {
        since: u64,
        after: After,
    },
    /// After the array.
    Closed,
}

/// The last token of an array.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum After {
    Bracket,
    Value,
    Comma,
}

/// How far a value goes.
#[derive(Debug, Default)]
struct Scan {
    begun: bool,
    depth: usize,
    in_text: bool,
    escaped: bool,
}

enum Step {
    /// The byte is of the value.
    Inside,
    /// The byte is the last one of the value.
    Last,
    /// The value has ended before the byte.
    Before,
}

impl Scan {
    fn step(&mut self, byte: u8) -> Step {
        self.begun = true;
        if self.in_text {
            match byte {
                _ if self.escaped => self.escaped = false,
                b'\\' => self.escaped = true,
                b'"' => {
                    self.in_text = false;
                    return if self.depth == 0 { Step::Last } else { Step::Inside };
                }
                _ => {}
            }
            return Step::Inside;
        }
        match byte {
            b'"' => self.in_text = true,
            b'{' | b'[' => self.depth += 1,
            b'}' | b']' if self.depth > 1 => self.depth -= 1,
            b'}' | b']' if self.depth == 1 => return Step::Last,
            b',' | b']' | b'}' | b' ' | b'\t' | b'\r' | b'\n' if self.depth == 0 => return Step::Before,
            _ => {}
        }
        Step::Inside
    }
}

impl<'a> Records<'a> {
    /// # Errors
    /// The file can't be opened; see [`bytes::open`].
    pub fn open(path: &'a Path) -> Result<Self, DataError> {
        Ok(Self { path, reader: bytes::open(path)?, line: 1, buffer: Vec::new(), layout: Layout::Unknown })
    }

    /// The next object, with the line that it begins in; none at the end.
    ///
    /// # Errors
    /// The file and line of what is no object.
    pub fn next(&mut self) -> Result<Option<Record>, DataError> {
        let Some(line) = self.take()? else { return Ok(None) };
        let whole = Cell::new(false);
        let parsed = parse(&self.buffer, &whole);
        match parsed {
            Ok(Value::Object(_)) if whole.get() => match past_64_bits(&self.buffer) {
                Some(digits) => Err(self.fault(line, format!("{digits} is an integer past 64 bits; write it as text"))),
                None => Ok(object(parsed).map(|object| (line, object))),
            },
            Ok(Value::Object(_)) => Ok(object(parsed).map(|object| (line, object))),
            Ok(other) => Err(self.fault(line, format!("not a JSON object: it is {}", super::kind::name_of(&other)))),
            Err(error) => Err(self.parse_fault(line, &error)),
        }
    }

    fn fault(&self, line: u64, message: String) -> DataError {
        DataError::user(format!("{}:{line}: {message}", self.path.display()))
    }

    /// Reads the bytes of the next value into `buffer`; the line that it begins in.
    fn take(&mut self) -> Result<Option<u64>, DataError> {
        self.buffer.clear();
        let mut scan = Scan::default();
        let mut first = self.line;
        loop {
            let chunk = self.reader.fill_buf().map_err(|e| bytes::fault(self.path, &e))?;
            if chunk.is_empty() {
                return self.at_end(&scan, first);
            }
            let (mut used, mut from, mut ended) = (0, 0, false);
            let mut problem = None;
            while used < chunk.len() && !ended && problem.is_none() {
                let byte = chunk[used];
                if !scan.begun {
                    match self.layout.before_value(byte, self.line) {
                        Ok(true) => (first, from) = (self.line, used),
                        Ok(false) => {
                            self.line += u64::from(byte == b'\n');
                            used += 1;
                            continue;
                        }
                        Err(message) => {
                            problem = Some(message);
                            continue;
                        }
                    }
                }
                match scan.step(byte) {
                    Step::Before => {
                        ended = true;
                        continue;
                    }
                    Step::Last => ended = true,
                    Step::Inside => {}
                }
                self.line += u64::from(byte == b'\n');
                used += 1;
            }
            if scan.begun {
                self.buffer.extend_from_slice(&chunk[from..used]);
            }
            self.reader.consume(used);
            if let Some(message) = problem {
                return Err(self.fault(self.line, message.to_owned()));
            }
            if ended {
                return Ok(Some(first));
            }
            if self.buffer.len() > LONGEST {
                return Err(self.unfinished(first));
            }
        }
    }

    fn at_end(&mut self, scan: &Scan, first: u64) -> Result<Option<u64>, DataError> {
        if scan.begun {
            // A word or a number at the very end.
            let is_whole = scan.depth == 0 && !scan.in_text;
            return if is_whole { Ok(Some(first)) } else { Err(self.unfinished(first)) };
        }
        match self.layout {
            Layout::Array { since, .. } => Err(self.fault(since, "the array that begins here does not end".to_owned())),
            _ => Ok(None),
        }
    }

    /// A value whose end is missing.
    fn unfinished(&self, first: u64) -> DataError {
        match parse(&self.buffer, &Cell::new(false)) {
            Err(error) => self.parse_fault(first, &error),
            Ok(_) => self.fault(first, "not a JSON object: its end is missing".to_owned()),
        }
    }

    /// Names the line of the mistake in `buffer`, whose first line is `first`.
    fn parse_fault(&self, first: u64, error: &serde_json::Error) -> DataError {
        if let Err(error) = std::str::from_utf8(&self.buffer) {
            let lines = self.buffer[..error.valid_up_to()].iter().filter(|byte| **byte == b'\n').count();
            return bytes::not_utf8(self.path, first + lines as u64);
        }
        let mut lines = self.buffer.split(|byte| *byte == b'\n');
        let (head, second) = (lines.next().unwrap_or_default(), lines.next().unwrap_or_default());
        // Of lines of objects, the one that does not end swallows those after it.
        let swallows = self.layout == Layout::Objects && second.trim_ascii_start().starts_with(b"{");
        let alone = parse(head, &Cell::new(false)).err().filter(|alone| swallows || !alone.is_eof());
        let error = alone.as_ref().unwrap_or(error);
        let line = self.buffer.split(|byte| *byte == b'\n').nth(error.line().saturating_sub(1)).unwrap_or_default();
        let place = if error.is_eof() { first } else { first + (error.line() as u64).saturating_sub(1) };
        for word in ["NaN", "-Infinity", "Infinity"] {
            if line[error.column().saturating_sub(1).min(line.len())..]
                .starts_with(word.trim_start_matches('-').as_bytes())
            {
                return self.fault(place, format!("{word} is not JSON; write null"));
            }
        }
        // serde_json's line is of the value.
        let told = error.to_string();
        let told = told.rsplit_once(" at line ").map_or(told.as_str(), |(told, _)| told);
        let column = if error.is_eof() { String::new() } else { format!(" at column {}", error.column()) };
        self.fault(place, format!("not a JSON object: {told}{column}"))
    }
}

impl Layout {
    /// Takes a byte between values; true where a value begins with it.
    fn before_value(&mut self, byte: u8, line: u64) -> Result<bool, &'static str> {
        match (byte, &mut *self) {
            (b' ' | b'\t' | b'\r' | b'\n', _) => Ok(false),
            (b'[', Self::Unknown) => {
                *self = Self::Array { since: line, after: After::Bracket };
                Ok(false)
            }
            (b']', Self::Array { after: After::Comma, .. }) => Err("not JSON: a comma stands before the array's end"),
            (b']', Self::Array { .. }) => {
                *self = Self::Closed;
                Ok(false)
            }
            (b',', Self::Array { after, .. }) if *after == After::Value => {
                *after = After::Comma;
                Ok(false)
            }
            (b',', Self::Array { .. }) => Err("not JSON: a comma without a value before it"),
            (_, Self::Array { after: After::Value, .. }) => Err("not JSON: a comma is missing between two values"),
            (_, Self::Array { after, .. }) => {
                *after = After::Value;
                Ok(true)
            }
            (_, Self::Closed) => Err("not JSON: text after the array's end"),
            (_, layout) => {
                *layout = Self::Objects;
                Ok(true)
            }
        }
    }
}

fn object(parsed: Result<Value, serde_json::Error>) -> Option<Map<String, Value>> {
    match parsed {
        Ok(Value::Object(object)) => Some(object),
        _ => None,
    }
}

/// Parses one value. `wide` tells of an integer that an f64 was made of.
fn parse(text: &[u8], wide: &Cell<bool>) -> Result<Value, serde_json::Error> {
    let mut parser = serde_json::Deserializer::from_slice(text);
    let value = Strict { wide }.deserialize(&mut parser)?;
    parser.end()?;
    Ok(value)
}

/// The first integer of a text that no 64 bits hold.
fn past_64_bits(text: &[u8]) -> Option<String> {
    let is_wide = |word: &str| {
        let digits = word.trim_start_matches('-');
        digits.len() > 18
            && digits.bytes().all(|byte| byte.is_ascii_digit())
            && word.parse::<i64>().is_err()
            && word.parse::<u64>().is_err()
    };
    let (mut in_text, mut escaped, mut word) = (false, false, String::new());
    for &byte in text.iter().chain(b" ") {
        if in_text {
            match byte {
                _ if escaped => escaped = false,
                b'\\' => escaped = true,
                b'"' => in_text = false,
                _ => {}
            }
        } else if byte.is_ascii_digit() || b"-+.eE".contains(&byte) {
            word.push(char::from(byte));
        } else {
            if is_wide(&word) {
                return Some(word);
            }
            word.clear();
            in_text = byte == b'"';
        }
    }
    None
}

/// A value none of whose objects has a key twice.
#[derive(Clone, Copy)]
struct Strict<'a> {
    wide: &'a Cell<bool>,
}

impl<'de> DeserializeSeed<'de> for Strict<'_> {
    type Value = Value;

    fn deserialize<D: serde::Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Strict<'_> {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        // serde_json reads an integer past 64 bits as a float.
        if value.abs() >= 9.0e18 && value.fract() == 0.0 {
            self.wide.set(true);
        }
        Ok(Number::from_f64(value).map_or(Value::Null, Value::Number))
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_string<E>(self, value: String) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
        let mut list = Vec::new();
        while let Some(item) = items.next_element_seed(self)? {
            list.push(item);
        }
        Ok(Value::Array(list))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Value, A::Error> {
        let mut map = Map::new();
        while let Some(name) = entries.next_key::<String>()? {
            let value = entries.next_value_seed(self)?;
            if map.contains_key(&name) {
                return Err(A::Error::custom(format!("the key {name:?} stands twice in one object")));
            }
            map.insert(name, value);
        }
        Ok(Value::Object(map))
    }
}
