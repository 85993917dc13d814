//! Errors of data sets and queries: one sentence each, with a remedy.

use std::fmt;

use datafusion::common::{Column, SchemaError};
use datafusion::error::DataFusionError;

/// Cause of an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// The user has to change the data or the flow.
    User,
    /// A network or a disk failed; a retry may help.
    External,
    /// The user has disabled the network and the cache lacks the data, so a check can't read it.
    Offline,
}

/// An error of a data set or a query.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DataError {
    pub message: String,
    pub fault: Fault,
}

impl DataError {
    pub fn user(message: impl Into<String>) -> Self {
        Self { message: message.into(), fault: Fault::User }
    }

    pub fn external(message: impl Into<String>) -> Self {
        Self { message: message.into(), fault: Fault::External }
    }

    pub fn offline(message: impl Into<String>) -> Self {
        Self { message: message.into(), fault: Fault::Offline }
    }

    /// Puts the place (a file, a key) in front.
    pub fn at(mut self, place: impl fmt::Display) -> Self {
        self.message = format!("{place}: {}", self.message);
        self
    }

    /// Converts an error of DataFusion to one plain sentence. `columns` are the columns that the query could use.
    pub fn from_datafusion(error: &DataFusionError, columns: &[String]) -> Self {
        if let DataFusionError::IoError(io) = error.find_root() {
            return Self::external(io.to_string());
        }
        Self::user(match error.find_root() {
            DataFusionError::SchemaError(schema, _) => schema_sentence(schema, columns),
            other => plain(&other.message()),
        })
    }
}

impl fmt::Display for DataError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for DataError {}

/// `there is no X; did you mean Y? There are: ...`
pub fn unknown(what: &str, name: &str, known: &[String]) -> String {
    let nearest = known
        .iter()
        .map(|k| (strsim::damerau_levenshtein(&k.to_lowercase(), &name.to_lowercase()), k))
        .filter(|(distance, k)| *distance <= 1 + k.len().max(name.len()) / 4)
        .min();
    let guess = nearest.map(|(_, k)| format!("; did you mean `{k}`?")).unwrap_or_else(|| ".".into());
    format!("there is no {what} `{name}`{guess} There are: {}", known.join(", "))
}

fn schema_sentence(error: &SchemaError, columns: &[String]) -> String {
    match error {
        SchemaError::FieldNotFound { field, valid_fields } => {
            let seen: Vec<String> = valid_fields.iter().map(|c: &Column| c.name.clone()).collect();
            let mut known = if seen.is_empty() { columns.to_vec() } else { seen };
            known.retain(|name| !name.starts_with('_') || field.name.starts_with('_'));
            known.dedup();
            unknown("column", &field.name, &known)
        }
        SchemaError::AmbiguousReference { field } => {
            format!(
                "`{}` could be any of several columns; rename one with AS, or write its table before it",
                field.name
            )
        }
        SchemaError::DuplicateUnqualifiedField { name } | SchemaError::DuplicateQualifiedField { name, .. } => {
            format!("two columns are called `{name}`; rename one with AS")
        }
    }
}

/// The message of a file reader, in plain words.
pub fn reader_words(error: &impl fmt::Display) -> String {
    plain(&error.to_string())
}

/// One line, without DataFusion's prefixes of table names and its back-traces.
fn plain(message: &str) -> String {
    let first = message.split("\n\nbacktrace").next().unwrap_or(message);
    let line = first.split_whitespace().collect::<Vec<_>>().join(" ");
    let line = line.replace("datafusion.public.", "").replace("'datafusion'.'public'.", "");
    in_plain_words(&line).unwrap_or(line)
}

/// The text between two others; `None` if one of them is missing.
fn between<'a>(line: &'a str, before: &str, after: &str) -> Option<&'a str> {
    let rest = &line[line.find(before)? + before.len()..];
    Some(&rest[..rest.find(after)?])
}

/// Frequent messages of DataFusion in the words of a flow file; `None` for others.
fn in_plain_words(line: &str) -> Option<String> {
    if let Some(fault) = between(line, "ParserError(\"", "\")") {
        return Some(format!("it can't be read as SQL: {}", fault.replace("\\\"", "\"")));
    }
    if line.contains("only supports a single SQL statement") {
        return Some("it has several statements; write one SELECT".into());
    }
    if line.starts_with("DDL not supported")
        || line.starts_with("DML not supported")
        || line.starts_with("Statement not supported")
    {
        return Some("it changes something; write one SELECT".into());
    }
    if let Some(table) = between(line, "table '", "' not found") {
        return Some(format!(
            "there is no table `{table}`; a source's table is `dataset`, that of a stage with one input `input`, and those of a \
             stage with several inputs have the names of these"
        ));
    }
    if line.starts_with("The table ") && line.ends_with("already exists") {
        return Some(format!("{line}; each input is named once"));
    }
    if let Some(name) = between(line, "Invalid function '", "'") {
        let nearest = between(line, "Did you mean '", "'");
        let meant = if name.eq_ignore_ascii_case("len") { Some("length") } else { nearest };
        let guess = meant.map(|meant| format!("; did you mean `{meant}`?")).unwrap_or_default();
        return Some(format!("there is no function `{name}`{guess}"));
    }
    if line.starts_with("Projections require unique expression names") {
        let name = between(line, "expression \"", "\"").unwrap_or("one name");
        let name = name.rsplit('.').next().unwrap_or(name);
        return Some(format!("two columns are called `{name}`; rename one with AS"));
    }
    if let Some(column) = between(line, "column \"", "\" must appear in the GROUP BY") {
        let column = column.rsplit('.').next().unwrap_or(column);
        return Some(format!(
            "column `{column}` stands beside an aggregate; put it into GROUP BY, or into an aggregate"
        ));
    }
    if let (Some(value), Some(kind)) =
        (between(line, "Cannot cast string '", "' to value"), between(line, "value of ", " type"))
    {
        return Some(format!("'{value}' can't be cast to {kind}; try_cast gives null in its place"));
    }
    if line.contains("Divide by zero") {
        return Some("it divides by zero; nullif(x, 0) as the divisor gives null in its place".into());
    }
    if line.contains("Invalid Parquet file") || line.contains("Parquet file must end with") || line.contains("EOF: ") {
        return Some("it is no Parquet file, or a part of it is missing; copy or download it again".into());
    }
    line.contains("failed to fill whole buffer")
        .then(|| "a part of the file is missing; copy or download it again".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_near_miss_is_named() {
        let known = vec!["question".to_owned(), "chosen".to_owned()];
        let text = unknown("column", "qestion", &known);
        assert_eq!(text, "there is no column `qestion`; did you mean `question`? There are: question, chosen");
        assert!(unknown("column", "zzz", &known).starts_with("there is no column `zzz`. There are:"));
    }
}
