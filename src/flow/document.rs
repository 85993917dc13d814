//! TOML texts laid over each other, with the place every key was written at.
//!
//! Tables merge, everything else is replaced, and the last text that wrote a key owns its place.
//! One exception: a stage that is given another `kind` is replaced as a whole, because the keys of
//! its old kind would only be unknown keys of the new one.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use toml::de::{DeTable, DeValue};
use toml::{Spanned, Table, Value};

use super::FlowError;

/// File and 1-based line.
pub type Place = (PathBuf, usize);

/// The pseudo file of `--set` entries; their line is the number of the entry.
pub const SET: &str = "--set";

/// A merged table and where its keys came from.
#[derive(Debug, Clone, Default)]
pub struct Document {
    pub table: Table,
    pub places: Places,
}

/// Places by dotted key; the elements of a list are numbered from 0.
#[derive(Debug, Clone, Default)]
pub struct Places {
    map: BTreeMap<String, Place>,
}

impl Places {
    /// Where `key` was written, or the table it is missing from.
    pub fn find(&self, key: &str) -> Option<&Place> {
        let mut key = key;
        loop {
            if let Some(place) = self.map.get(key) {
                return Some(place);
            }
            key = if key.is_empty() { return None } else { key.rsplit_once('.').map_or("", |(parent, _)| parent) };
        }
    }

    /// The error with its place, where it has none yet.
    pub fn attach(&self, mut error: FlowError) -> FlowError {
        error.place = error.place.or_else(|| self.find(&error.key).cloned());
        error
    }

    fn remove(&mut self, key: &str) {
        let below = format!("{key}.");
        self.map.retain(|known, _| known != key && !known.starts_with(&below));
    }
}

/// The deepest nesting of tables and lists.
const DEEPEST: usize = 64;
/// Bytes of stack that a text is parsed with.
const STACK: usize = 256 << 20;

/// How deep tables and lists nest.
fn depth(table: &Table) -> usize {
    fn of(value: &Value) -> usize {
        match value {
            Value::Table(table) => depth(table),
            Value::Array(list) => 1 + list.iter().map(of).max().unwrap_or(0),
            _ => 0,
        }
    }
    1 + table.values().map(of).max().unwrap_or(0)
}

/// The parser's message, with what was probably meant.
fn in_plain_words(message: &str) -> String {
    if message.starts_with("missing escaped value") {
        return "a backslash in double quotes begins an escape; write the text in single quotes".into();
    }
    if message.starts_with("invalid float") && message.contains("`nan`") {
        return "this is no value; text stands in quotes, and a key without a value is left out".into();
    }
    if message.starts_with("invalid type: integer") && message.contains("i128") {
        return "an integer past 64 bits".into();
    }
    message.replace('\n', ", ")
}

impl Document {
    /// Parses one text. `file` is only named in messages.
    ///
    /// # Errors
    /// Malformed TOML: file, line and what the parser says.
    pub fn parse(text: &str, file: &Path) -> Result<Self, FlowError> {
        // Tables are read and dropped by recursion, and a stack that overflows ends the whole process.
        let roomy = std::thread::Builder::new().stack_size(STACK);
        let parsed = std::thread::scope(|scope| {
            roomy.spawn_scoped(scope, || Self::parse_here(text, file)).map(|thread| thread.join())
        });
        match parsed {
            Ok(Ok(document)) => document,
            _ => Err(FlowError::new("", format!("{}: the flow could not be read", file.display()))),
        }
    }

    fn parse_here(text: &str, file: &Path) -> Result<Self, FlowError> {
        let lines = Lines::new(text);
        let malformed = |error: toml::de::Error| {
            let line = error.span().map_or(1, |span| lines.of(span.start));
            FlowError {
                place: Some((file.to_owned(), line)),
                ..FlowError::new("", format!("not valid TOML: {}", in_plain_words(error.message())))
            }
        };
        let table: Table = toml::from_str(text).map_err(malformed)?;
        if depth(&table) > DEEPEST {
            return Err(FlowError::new("", format!("{}: tables nest more than {DEEPEST} deep", file.display())));
        }
        let spans = DeTable::parse(text).map_err(malformed)?;
        let mut map = BTreeMap::from([(String::new(), (file.to_owned(), 1))]);
        for_each_key(spans.get_ref(), "", &mut |key, offset| {
            map.insert(key, (file.to_owned(), lines.of(offset)));
        });
        Ok(Self { table, places: Places { map } })
    }

    /// Parses `a.b=VALUE`. A value that isn't TOML is taken as a string, so that `=cuda:0` needs no
    /// quotes; one that begins like a list, table or quoted string has to be whole.
    pub fn parse_set(entry: &str, number: usize) -> Result<Self, FlowError> {
        let place = (PathBuf::from(SET), number);
        let wrong = |message: String| {
            FlowError { place: Some(place.clone()), ..FlowError::new("", message) }
                .help("write it as --set stages.sample.candidates=4")
        };
        let Some((key, value)) = entry.split_once('=') else {
            return Err(wrong(format!("`{entry}` has no `=`")));
        };
        let (key, value) = (key.trim(), value.trim());
        let path = key_path(key).ok_or_else(|| wrong(format!("`{key}` is not a dotted key")))?;
        let value = match value.parse::<Value>() {
            Ok(value) => value,
            Err(error) if value.starts_with(['[', '{', '"', '\'']) => {
                return Err(wrong(format!("`{value}` is not a TOML value: {}", error.message())));
            }
            Err(_) => Value::String(value.to_owned()),
        };
        let mut places = Places::default();
        for end in 1..=path.len() {
            places.map.insert(path.iter().take(end).cloned().collect::<Vec<_>>().join("."), place.clone());
        }
        let nested = path.into_iter().rev().fold(value, |inner, name| Value::Table(Table::from_iter([(name, inner)])));
        match nested {
            Value::Table(table) => Ok(Self { table, places }),
            _ => Err(wrong("the key is empty".into())),
        }
    }

    /// Lays `over` on top.
    pub fn overlay(&mut self, over: Document) {
        merge(&mut self.table, over.table, "", &mut self.places);
        for (key, place) in over.places.map {
            // A table keeps the place of its first header; a line inside it says more than a second one.
            self.places
                .map
                .entry(key.clone())
                .and_modify(|old| {
                    if !matches!(at(&self.table, &key), Some(Value::Table(_)) | None) {
                        *old = place.clone();
                    }
                })
                .or_insert(place);
        }
    }

    /// The document of rounds from `round` on: its `[round.N]` tables up to there laid over the
    /// rest, places included. `round` itself is gone from the result.
    pub fn for_round(&self, rounds: &[u32]) -> Document {
        let mut result = self.clone();
        let overlays = result.table.remove("round");
        for round in rounds {
            let Some(Value::Table(table)) = overlays.as_ref().and_then(|all| all.get(round.to_string())) else {
                continue;
            };
            let prefix = format!("round.{round}.");
            let map = self
                .places
                .map
                .iter()
                .filter_map(|(key, place)| Some((key.strip_prefix(&prefix)?.to_owned(), place.clone())));
            result.overlay(Document { table: table.clone(), places: Places { map: map.collect() } });
        }
        result
    }
}

/// The value at a dotted key.
fn at<'a>(table: &'a Table, key: &str) -> Option<&'a Value> {
    let mut parts = key.split('.');
    let first = table.get(parts.next()?)?;
    parts.try_fold(first, |value, part| match value {
        Value::Array(list) => list.get(part.parse::<usize>().ok()?),
        other => other.get(part),
    })
}

fn merge(base: &mut Table, over: Table, path: &str, places: &mut Places) {
    for (name, value) in over {
        let key = join(path, &name);
        match (base.get_mut(&name), value) {
            (Some(Value::Table(old)), Value::Table(new)) if !(path == "stages" && changes_kind(old, &new)) => {
                merge(old, new, &key, places);
            }
            (_, value) => {
                places.remove(&key);
                base.insert(name, value);
            }
        }
    }
}

fn changes_kind(old: &Table, new: &Table) -> bool {
    matches!((old.get("kind"), new.get("kind")), (Some(old), Some(new)) if old != new)
}

/// `path.name`, or `name` at the top.
pub fn join(path: &str, name: &str) -> String {
    if path.is_empty() { name.to_owned() } else { format!("{path}.{name}") }
}

/// The parts of a dotted key, quotes understood.
fn key_path(key: &str) -> Option<Vec<String>> {
    if key.contains('\n') {
        return None;
    }
    let mut table: Table = toml::from_str(&format!("{key} = 0")).ok()?;
    let mut path = Vec::new();
    loop {
        let mut entries = table.into_iter();
        let (name, value) = entries.next()?;
        if entries.next().is_some() {
            return None;
        }
        path.push(name);
        match value {
            Value::Table(inner) => table = inner,
            Value::Integer(0) => return Some(path),
            _ => return None,
        }
    }
}

/// Calls `visit` with every dotted key and the byte where it is written.
fn for_each_key(table: &DeTable<'_>, path: &str, visit: &mut impl FnMut(String, usize)) {
    for (name, value) in table {
        let key = join(path, name.get_ref());
        visit(key.clone(), name.span().start);
        for_each_key_below(value, &key, visit);
    }
}

fn for_each_key_below(value: &Spanned<DeValue<'_>>, path: &str, visit: &mut impl FnMut(String, usize)) {
    match value.get_ref() {
        DeValue::Table(table) => for_each_key(table, path, visit),
        DeValue::Array(list) => {
            for (number, item) in list.iter().enumerate() {
                let key = join(path, &number.to_string());
                visit(key.clone(), item.span().start);
                for_each_key_below(item, &key, visit);
            }
        }
        _ => {}
    }
}

/// Line numbers of byte offsets.
struct Lines {
    starts: Vec<usize>,
}

impl Lines {
    fn new(text: &str) -> Self {
        Self { starts: text.match_indices('\n').map(|(at, _)| at + 1).collect() }
    }

    fn of(&self, offset: usize) -> usize {
        self.starts.partition_point(|start| *start <= offset) + 1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Document {
        Document::parse(text, Path::new("a.toml")).expect("valid")
    }

    #[test]
    fn tables_that_nest_too_deep_are_refused() {
        for depth in [100, 1000, 20_000] {
            let tables = format!("x = {}1{}", "{a=".repeat(depth), "}".repeat(depth));
            let dots = format!("{}a = 1", "a.".repeat(depth));
            let lists = format!("x = {}1{}", "[".repeat(depth), "]".repeat(depth));
            for text in [tables, dots, lists] {
                let error = Document::parse(&text, Path::new("a.toml")).expect_err("too deep").to_string();
                assert!(error.contains("deep") || error.contains("recursion"), "{depth}: {error}");
            }
        }
    }

    #[test]
    fn keys_know_their_lines() {
        let doc = parse("name = 'x'\n\n[stages.a]\nkind = 'source'\nlist = [\n  { b = 1 },\n]\n");
        let line = |key: &str| doc.places.find(key).map(|place| place.1);
        assert_eq!(line("name"), Some(1));
        assert_eq!(line("stages.a"), Some(3));
        assert_eq!(line("stages.a.kind"), Some(4));
        assert_eq!(line("stages.a.list.0.b"), Some(6));
        assert_eq!(line("stages.a.absent.deep"), Some(3), "a missing key is at its table");
        assert_eq!(line("nowhere"), Some(1));
    }

    #[test]
    fn malformed_toml_names_file_and_line() {
        let error = Document::parse("name = 'x'\nrounds = = 2\n", Path::new("a.toml")).expect_err("malformed");
        assert!(error.to_string().starts_with("a.toml:2: not valid TOML: "), "{error}");
        let error = Document::parse("a = 1\na = 2\n", Path::new("a.toml")).expect_err("malformed");
        assert!(error.to_string().starts_with("a.toml:2: "), "{error}");
        let error = Document::parse("a = 99999999999999999999\n", Path::new("a.toml")).expect_err("too large");
        assert!(error.to_string().starts_with("a.toml:1: "), "{error}");
    }

    #[test]
    fn tables_merge_and_the_last_writer_owns_the_place() {
        let mut doc = parse("[stages.a]\nkind = 'k'\nx = 1\ny = [1, 2]\n");
        doc.overlay(Document::parse("\n[stages.a]\nx = 2\ny = [3]\n", Path::new("b.toml")).expect("valid"));
        assert_eq!(doc.table["stages"]["a"]["kind"].as_str(), Some("k"));
        assert_eq!(doc.table["stages"]["a"]["x"].as_integer(), Some(2));
        assert_eq!(doc.table["stages"]["a"]["y"].as_array().map(Vec::len), Some(1));
        assert_eq!(doc.places.find("stages.a.x"), Some(&(PathBuf::from("b.toml"), 3)));
        assert_eq!(doc.places.find("stages.a.kind"), Some(&(PathBuf::from("a.toml"), 2)));
        assert_eq!(doc.places.find("stages.a.y.1"), Some(&(PathBuf::from("b.toml"), 4)), "the old item is gone");
    }

    #[test]
    fn deep_nesting_is_an_error_and_no_overflow() {
        for text in [
            "a.".repeat(100_000) + "a = 1",
            "a = ".to_owned() + &"[".repeat(100_000),
            "a = ".to_owned() + &"{ a = ".repeat(100_000),
        ] {
            assert!(Document::parse(&text, Path::new("a.toml")).is_err());
            assert!(Document::parse_set(&text, 1).is_err());
        }
        let table: Table = toml::from_str(&format!("[{}a]\nb = {}{}", "a.".repeat(70), "[".repeat(70), "]".repeat(70)))
            .expect("valid");
        assert!(super::super::options::read::<std::collections::BTreeMap<String, i64>>(&table, "t").is_err());
    }

    #[test]
    fn another_kind_replaces_the_stage() {
        let mut doc = parse("[stages.prefer]\nkind = 'mapper'\nsql = 'SELECT 1'\n");
        doc.overlay(parse("[stages.prefer]\nkind = 'pairs'\n"));
        assert_eq!(doc.table["stages"]["prefer"].as_table().map(Table::len), Some(1));
    }

    #[test]
    fn set_reads_toml_and_bare_words() {
        let value = |entry: &str| Document::parse_set(entry, 1).map(|doc| at(&doc.table, "a.b").cloned());
        assert_eq!(value("a.b=4"), Ok(Some(Value::Integer(4))));
        assert_eq!(value("a.b = true"), Ok(Some(Value::Boolean(true))));
        assert_eq!(value("a.b=cuda:0"), Ok(Some(Value::String("cuda:0".into()))));
        assert_eq!(value("a.b=hf://x/y?z=1"), Ok(Some(Value::String("hf://x/y?z=1".into()))));
        assert_eq!(value("a.\"b\"=[1]"), Ok(Some(Value::Array(vec![Value::Integer(1)]))));
        assert_eq!(value("a.b="), Ok(Some(Value::String(String::new()))));
        assert_eq!(value("a.b=1\nc=2"), Ok(Some(Value::String("1\nc=2".into()))), "no second key is smuggled in");
        for bad in ["a.b", "=1", "a b=1", "a.b=[1", "a.b='x", "[t]\na=1", ""] {
            let error = Document::parse_set(bad, 3).expect_err(bad).to_string();
            assert!(error.starts_with("--set 3: "), "{error}");
        }
    }
}
