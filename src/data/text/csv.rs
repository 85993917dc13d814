//! Rows of a CSV file. Quoted values may contain line breaks.

use std::io::{self, BufRead, Read};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use csv::{ErrorKind, Reader, ReaderBuilder, StringRecord};
use datafusion::arrow::array::{ArrayRef, BooleanArray, Float64Array, Int64Array, StringArray};
use datafusion::arrow::datatypes::DataType;

use super::bytes;
use crate::data::DataError;
use crate::data::batch::EXACT;

/// The rows of one file, in order.
pub struct Records<'a> {
    path: &'a Path,
    reader: Reader<Counted>,
    header: Vec<String>,
    quotes: Arc<AtomicU64>,
    /// First and last line of the last row.
    last: (u64, u64),
}

/// Reader that counts quotes. After an odd number of them a quote is open.
struct Counted {
    inner: Box<dyn BufRead + Send>,
    quotes: Arc<AtomicU64>,
}

impl Read for Counted {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let read = self.inner.read(out)?;
        let quotes = out[..read].iter().filter(|byte| **byte == b'"').count();
        self.quotes.fetch_add(quotes as u64, Ordering::Relaxed);
        Ok(read)
    }
}

impl<'a> Records<'a> {
    /// Opens a file and reads its header.
    ///
    /// # Errors
    /// Those of [`bytes::open`]; the header has a name twice, or is one column that contains another separator.
    pub fn open(path: &'a Path, separator: u8) -> Result<Self, DataError> {
        let quotes = Arc::new(AtomicU64::new(0));
        let counted = Counted { inner: bytes::open(path)?, quotes: quotes.clone() };
        let reader = ReaderBuilder::new().delimiter(separator).from_reader(counted);
        let mut records = Self { path, reader, header: Vec::new(), quotes, last: (1, 1) };
        let header = records.reader.headers().map(|names| names.iter().map(str::to_owned).collect::<Vec<_>>());
        records.header = header.map_err(|e| records.fault(&e))?;
        if let ([only], true) = (records.header.as_slice(), separator == b',')
            && let Some(other) = [';', '\t', '|'].into_iter().find(|other| only.contains(*other))
        {
            return Err(DataError::user(format!(
                "{}:1: the header is one column, {only:?}; write separator = {:?} if that is what stands between the values",
                path.display(),
                other.to_string()
            )));
        }
        for (place, name) in records.header.iter().enumerate() {
            if !name.is_empty() && records.header[..place].contains(name) {
                return Err(DataError::user(format!(
                    "{}:1: two columns are called `{name}`; rename one in the file",
                    path.display()
                )));
            }
        }
        // DataFusion gives these names to columns without a name.
        for (place, name) in records.header.iter_mut().enumerate() {
            if name.is_empty() {
                *name = format!("column_{}", place + 1);
            }
        }
        Ok(records)
    }

    /// Names of the columns.
    pub fn header(&self) -> &[String] {
        &self.header
    }

    /// Reads the next row into `row`. Returns the line in which it begins; `None` at the end.
    ///
    /// # Errors
    /// A row has more or fewer values than the header, is not UTF-8, or has a quote that is not closed. The message has
    /// file and line.
    pub fn next(&mut self, row: &mut StringRecord) -> Result<Option<u64>, DataError> {
        match self.reader.read_record(row) {
            Ok(true) => {
                let line = row.position().map_or(0, csv::Position::line);
                self.last = (line, self.reader.position().line());
                Ok(Some(line))
            }
            // A stray quote inside a value does not open one; an open quote swallows lines.
            Ok(false) if self.is_open() && self.last.1 > self.last.0 + 1 => Err(self.not_closed(self.last.0)),
            Ok(false) => Ok(None),
            Err(error) => Err(self.fault(&error)),
        }
    }

    /// Returns whether the text read so far has an odd number of quotes.
    fn is_open(&self) -> bool {
        self.quotes.load(Ordering::Relaxed) % 2 == 1
    }

    fn not_closed(&self, line: u64) -> DataError {
        DataError::user(format!("{}:{line}: a quote that opens in this row is not closed", self.path.display()))
    }

    fn fault(&self, error: &csv::Error) -> DataError {
        let line = error.position().map_or(1, csv::Position::line);
        match error.kind() {
            ErrorKind::Io(error) => bytes::fault(self.path, error),
            ErrorKind::Utf8 { .. } => bytes::not_utf8(self.path, line),
            ErrorKind::UnequalLengths { .. } if self.is_open() => self.not_closed(line),
            ErrorKind::UnequalLengths { expected_len, len, .. } => DataError::user(format!(
                "{}:{line}: the row has {len} values, and the header has {expected_len}; a value with the separator or a line \
                 break in it stands in quotes",
                self.path.display()
            )),
            _ => DataError::user(format!("{}:{line}: {error}", self.path.display())),
        }
    }
}

/// Type to which all values of a column can be converted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Found {
    /// Every value is missing.
    #[default]
    Empty,
    Bool,
    Whole,
    /// Integers, one of which has no f64 of its own.
    Large,
    Number,
    Text,
}

impl Found {
    /// Adds a value; an empty one changes nothing. `007` and `+49` are text, because numbers would lose characters.
    pub fn see(self, value: &str) -> Self {
        match (self, value) {
            (Self::Text, _) => Self::Text,
            (found, "") => found,
            (Self::Empty | Self::Bool, value) if truth(value).is_some() => Self::Bool,
            (Self::Empty | Self::Whole | Self::Large, value) if whole(value).is_some() => {
                let large = self == Self::Large || whole(value).is_some_and(|n| n.unsigned_abs() > EXACT);
                if large { Self::Large } else { Self::Whole }
            }
            (Self::Empty | Self::Whole | Self::Number, value) if number(value).is_some() => Self::Number,
            _ => Self::Text,
        }
    }

    /// The Arrow type of the column; text if all values are missing.
    pub fn data_type(self) -> DataType {
        match self {
            Self::Bool => DataType::Boolean,
            Self::Whole | Self::Large => DataType::Int64,
            Self::Number => DataType::Float64,
            Self::Empty | Self::Text => DataType::Utf8,
        }
    }
}

fn truth(value: &str) -> Option<bool> {
    match value {
        _ if value.eq_ignore_ascii_case("true") => Some(true),
        _ if value.eq_ignore_ascii_case("false") => Some(false),
        _ => None,
    }
}

fn whole(value: &str) -> Option<i64> {
    let digits = value.strip_prefix('-').unwrap_or(value);
    let plain = digits == "0" || (!digits.starts_with('0') && digits.bytes().all(|byte| byte.is_ascii_digit()));
    if plain && value != "-0" { value.parse().ok() } else { None }
}

/// Parses a number in plain notation. `None` for integers of more than 15 digits.
fn number(value: &str) -> Option<f64> {
    let digits = value.strip_prefix('-').unwrap_or(value);
    let whole_part = digits.split(['.', 'e', 'E']).next()?;
    let is_plain = whole_part == "0" || !whole_part.starts_with('0');
    let letters = digits.bytes().all(|byte| byte.is_ascii_digit() || matches!(byte, b'.' | b'e' | b'E' | b'-' | b'+'));
    let has_digits = digits.starts_with(|c: char| c.is_ascii_digit() || c == '.');
    if !(is_plain && letters && has_digits) || (whole_part.len() > 15 && whole_part.len() == digits.len()) {
        return None;
    }
    value.parse().ok().filter(|number: &f64| number.is_finite())
}

/// Converts values to a column; missing ones are null.
///
/// # Errors
/// The index of the first value that is not of the type.
pub fn array(values: &[Option<String>], data_type: &DataType) -> Result<ArrayRef, usize> {
    fn each<T>(values: &[Option<String>], read: impl Fn(&str) -> Option<T>) -> Result<Vec<Option<T>>, usize> {
        let cell = |(place, value): (usize, &Option<String>)| match value {
            None => Ok(None),
            Some(value) => read(value).map(Some).ok_or(place),
        };
        values.iter().enumerate().map(cell).collect()
    }
    Ok(match data_type {
        DataType::Boolean => Arc::new(BooleanArray::from(each(values, truth)?)),
        DataType::Int64 => Arc::new(Int64Array::from(each(values, |value| value.parse().ok())?)),
        DataType::Float64 => Arc::new(Float64Array::from(each(values, |value| value.trim().parse().ok())?)),
        _ => Arc::new(StringArray::from(values.iter().map(Option::as_deref).collect::<Vec<_>>())),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_is_a_number_only_where_no_letter_of_it_is_lost() {
        for (values, found) in [
            (&["1", "-2", ""][..], Found::Whole),
            (&["1", "2.5", "-1e-3", ".5", "5."], Found::Number),
            (&["0", "-0"], Found::Number),
            (&["true", "FALSE"], Found::Bool),
            (&["true", "1"], Found::Text),
            (&["007"], Found::Text),
            (&["00.5"], Found::Text),
            (&["+49"], Found::Text),
            (&["1", "x"], Found::Text),
            (&["nan"], Found::Text),
            (&["inf"], Found::Text),
            (&["1e999"], Found::Text),
            (&["-"], Found::Text),
            (&["e5"], Found::Text),
            (&["12345678901234567890"], Found::Text),
            (&["9223372036854775807"], Found::Large),
            (&["9007199254740993", "1"], Found::Large),
            (&["9007199254740993", "0.5"], Found::Text),
            (&["0.5", "9007199254740993"], Found::Text),
            (&["2024-01-05"], Found::Text),
            (&["1 "], Found::Text),
            (&["", ""], Found::Empty),
        ] {
            let seen = values.iter().fold(Found::default(), |found, value| found.see(value));
            assert_eq!(seen, found, "{values:?}");
        }
    }
}
