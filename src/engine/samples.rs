//! What a report shows of the tables of a round: rows to read, and how figures are spread.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use datafusion::arrow::array::{Array, ArrayRef, AsArray};
use datafusion::arrow::compute::cast;
use datafusion::arrow::datatypes::{DataType, Float64Type, Schema};
use datafusion::arrow::record_batch::RecordBatch;
use datafusion::parquet::arrow::ProjectionMask;
use datafusion::parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use serde_json::{Map, Value, json};

use super::{journal, names, table};
use crate::observe::view::Sample;

/// Columns of a row that is shown, and its keys in the report.
const TEXTS: [(&str, &str); 8] = [
    ("prompt", "prompt"),
    ("generation", "generation"),
    ("chosen", "chosen"),
    ("rejected", "rejected"),
    ("a", "a"),
    ("b", "b"),
    ("verdict", "verdict"),
    ("judge_generation", "judge"),
];
const NUMBERS: [(&str, &str); 7] = [
    ("_row", "row"),
    ("_candidate", "candidate"),
    ("probability", "probability"),
    ("gap", "gap"),
    ("score", "score"),
    ("chosen_score", "chosen_score"),
    ("rejected_score", "rejected_score"),
];
const FLAGS: [&str; 3] = ["swapped", "consistent", "parsed"];
/// Figures whose spread is shown.
const SPREADS: [&str; 6] = ["generation_tokens", "score", "probability", "gap", "chosen_tokens", "rejected_tokens"];

/// Characters of a text that are shown.
const CHARACTERS: usize = 4000;
const BINS: usize = 24;
/// Journals of a round under way are read up to this size.
const JOURNAL_BYTES: u64 = 64 << 20;

/// What is taken of one table.
#[derive(Debug, Clone, Default)]
pub(super) struct Sampled {
    /// Rows of the table.
    pub total: usize,
    /// Evenly from all of them.
    pub rows: Vec<Map<String, Value>>,
    spreads: BTreeMap<&'static str, Spread>,
    shows: Shows,
}

/// What the rows of a table tell, by its columns.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Shows {
    #[default]
    Nothing,
    Answers,
    ScoredAnswers,
    Pairs,
}

impl Shows {
    fn of(schema: &Schema) -> Self {
        let has = |name: &str| schema.column_with_name(name).is_some();
        match () {
            () if !has("prompt") => Self::Nothing,
            () if has("chosen") && has("rejected") => Self::Pairs,
            () if has("generation") && has("score") => Self::ScoredAnswers,
            () if has("generation") => Self::Answers,
            () => Self::Nothing,
        }
    }
}

impl Sampled {
    pub fn shows(&self) -> Shows {
        self.shows
    }

    /// `{"what", "edges", "counts"}` of every figure there is.
    pub fn histograms(&self) -> impl Iterator<Item = Value> {
        self.spreads.iter().filter_map(|(what, spread)| spread.histogram(what))
    }

    fn add(&mut self, batch: &RecordBatch, stride: usize, first: usize) {
        for (what, values) in SPREADS.iter().filter_map(|name| Some((*name, numbers(batch, name)?))) {
            // A column that a later stage only passes on is shown where it was made.
            let passed_on = what == "generation_tokens" && self.shows > Shows::Answers
                || what == "score" && batch.column_by_name("score_samples").is_none();
            if !passed_on {
                self.spreads.entry(what).or_default().values.extend(values.into_iter().flatten());
            }
        }
        let wanted = (0..batch.num_rows()).filter(|i| (first + i).is_multiple_of(stride));
        let wanted: Vec<usize> = wanted.collect();
        let mut rows = vec![Map::new(); wanted.len()];
        for (name, key) in TEXTS {
            let Some(column) = batch.column_by_name(name) else { continue };
            for (row, i) in rows.iter_mut().zip(&wanted) {
                row.insert(key.into(), json!(text(column, *i)));
            }
        }
        for (name, key) in NUMBERS {
            let Some(values) = numbers(batch, name) else { continue };
            for (row, i) in rows.iter_mut().zip(&wanted) {
                row.insert(key.into(), json!(values[*i]));
            }
        }
        for name in FLAGS {
            let Some(column) = batch.column_by_name(name).and_then(|c| c.as_boolean_opt()) else { continue };
            for (row, i) in rows.iter_mut().zip(&wanted) {
                row.insert(name.into(), json!(column.is_valid(*i).then(|| column.value(*i))));
            }
        }
        self.rows.extend(rows);
    }
}

#[derive(Debug, Clone, Default)]
struct Spread {
    values: Vec<f64>,
}

impl Spread {
    fn histogram(&self, what: &str) -> Option<Value> {
        let finite = || self.values.iter().copied().filter(|v| v.is_finite());
        let (low, high) = (finite().fold(f64::INFINITY, f64::min), finite().fold(f64::NEG_INFINITY, f64::max));
        if low > high {
            return None;
        }
        let whole = finite().all(|v| v.fract() == 0.0);
        // Whole numbers have bins of whole width, or some would hold twice as many as their neighbours.
        let width = match (high - low) / BINS as f64 {
            width if whole => width.ceil().max(1.0),
            width => width.max(f64::MIN_POSITIVE),
        };
        let bins = (((high - low) / width) as usize + 1).min(BINS + 1);
        let mut counts = vec![0_u64; bins];
        finite().for_each(|v| counts[(((v - low) / width) as usize).min(bins - 1)] += 1);
        if !whole && bins > BINS {
            // The highest value alone is no bin of its own.
            let last = counts.pop().unwrap_or(0);
            counts.last_mut().into_iter().for_each(|count| *count += last);
        }
        let edges: Vec<f64> = (0..=counts.len()).map(|i| low + i as f64 * width).collect();
        Some(json!({ "what": what, "edges": edges, "counts": counts }))
    }
}

/// A column as numbers; none where it is something else.
fn numbers(batch: &RecordBatch, name: &str) -> Option<Vec<Option<f64>>> {
    let column = batch.column_by_name(name).filter(|c| c.data_type().is_numeric())?;
    let column = cast(column, &DataType::Float64).ok()?;
    let column = column.as_primitive_opt::<Float64Type>()?;
    Some(column.iter().collect())
}

/// A text, or the messages of a conversation, one after the other.
fn text(column: &ArrayRef, i: usize) -> Option<String> {
    if column.is_null(i) {
        return None;
    }
    let whole = match column.data_type() {
        DataType::Utf8 => column.as_string::<i32>().value(i).to_owned(),
        DataType::LargeUtf8 => column.as_string::<i64>().value(i).to_owned(),
        DataType::Utf8View => column.as_string_view().value(i).to_owned(),
        DataType::List(_) => conversation(&column.as_list::<i32>().value(i))?,
        _ => return None,
    };
    Some(match whole.char_indices().nth(CHARACTERS) {
        Some((end, _)) => format!("{}…", &whole[..end]),
        None => whole,
    })
}

fn conversation(messages: &ArrayRef) -> Option<String> {
    let messages = messages.as_struct_opt()?;
    let part = |name: &str| messages.column_by_name(name).cloned();
    let (roles, contents) = (part("role")?, part("content")?);
    let line = |i| Some(format!("{}: {}", text(&roles, i)?, text(&contents, i)?));
    Some((0..messages.len()).filter_map(line).collect::<Vec<_>>().join("\n"))
}

/// The tables that were read; one that has not changed since is not read again.
#[derive(Default)]
pub(super) struct Tables {
    read: HashMap<(PathBuf, usize), (SystemTime, u64, Sampled)>,
}

impl Tables {
    /// Some `most` rows of a stage: of its table, or while it works of the journal.
    pub fn of(&mut self, stage: &Path, most: usize) -> Sampled {
        let (table, journal) = (stage.join(table::file_name("")), stage.join("journal"));
        let (path, read): (_, fn(&Path, usize) -> io::Result<Sampled>) = match table.exists() {
            true => (table, of_table),
            false => (journal, of_journal),
        };
        let Ok(meta) = path.metadata() else { return Sampled::default() };
        let (changed, length) = (meta.modified().unwrap_or(SystemTime::UNIX_EPOCH), meta.len());
        let key = (path, most);
        if let Some((at, bytes, sampled)) = self.read.get(&key)
            && (*at, *bytes) == (changed, length)
        {
            return sampled.clone();
        }
        // A table that can't be read is for the stage to complain about.
        let sampled = read(&key.0, most).unwrap_or_default();
        self.read.insert(key, (changed, length, sampled.clone()));
        sampled
    }
}

fn of_table(path: &Path, most: usize) -> io::Result<Sampled> {
    let builder = ParquetRecordBatchReaderBuilder::try_new(File::open(path)?)?;
    let total = usize::try_from(builder.metadata().file_metadata().num_rows()).unwrap_or(0);
    let wanted = |name: &str| {
        let texts = TEXTS.iter().chain(&NUMBERS).any(|(column, _)| *column == name);
        texts || FLAGS.contains(&name) || SPREADS.contains(&name) || name == "score_samples"
    };
    let fields = builder.schema().fields();
    let roots = fields.iter().enumerate().filter(|(_, field)| wanted(field.name())).map(|(i, _)| i);
    let mask = ProjectionMask::roots(builder.parquet_schema(), roots);
    let mut sampled = Sampled { total, shows: Shows::of(builder.schema()), ..Sampled::default() };
    let stride = total.div_ceil(most.max(1)).max(1);
    let mut first = 0;
    for batch in builder.with_projection(mask).build()? {
        let batch = batch.map_err(io::Error::other)?;
        sampled.add(&batch, stride, first);
        first += batch.num_rows();
    }
    Ok(sampled)
}

fn of_journal(path: &Path, most: usize) -> io::Result<Sampled> {
    if path.metadata()?.len() > JOURNAL_BYTES {
        return Ok(Sampled::default());
    }
    let batches = journal::rows(path)?;
    let total = batches.iter().map(RecordBatch::num_rows).sum();
    let shows = batches.first().map_or(Shows::Nothing, |batch| Shows::of(&batch.schema()));
    let mut sampled = Sampled { total, shows, ..Sampled::default() };
    let stride = total.div_ceil(most.max(1)).max(1);
    let mut first = 0;
    for batch in &batches {
        sampled.add(batch, stride, first);
        first += batch.num_rows();
    }
    Ok(sampled)
}

/// The last `most` rows of the stage that tells most in the last round that has rows: pairs, or else answers.
pub(super) fn latest(run: &Path, most: usize) -> Vec<Sample> {
    let rounds = (1..).take_while(|round| round_dir(run, *round).is_dir()).collect::<Vec<u32>>();
    let of_round = |round: &u32| {
        let stages = std::fs::read_dir(round_dir(run, *round)).ok()?.flatten();
        let read = stages.filter_map(|stage| {
            let sampled = latest_of(&stage.path(), most).ok()?;
            Some((sampled, stage.file_name().to_string_lossy().into_owned()))
        });
        let told = read.filter(|(sampled, _)| sampled.shows > Shows::Nothing && !sampled.rows.is_empty());
        let (sampled, stage) = told.max_by(|a, b| (a.0.shows, &b.1).cmp(&(b.0.shows, &a.1)))?;
        let first = sampled.rows.len().saturating_sub(most);
        let rows = sampled.rows.get(first..).unwrap_or_default();
        Some(rows.iter().map(|row| sample(row, &format!("{stage}, round {round}"))).collect())
    };
    rounds.iter().rev().find_map(of_round).unwrap_or_default()
}

fn round_dir(run: &Path, round: u32) -> PathBuf {
    run.join(names::round(round))
}

fn latest_of(stage: &Path, most: usize) -> io::Result<Sampled> {
    let (path, journal) = (stage.join(table::file_name("")), stage.join("journal"));
    let batches = if path.exists() {
        let builder = ParquetRecordBatchReaderBuilder::try_new(File::open(path)?)?;
        let total = usize::try_from(builder.metadata().file_metadata().num_rows()).unwrap_or(0);
        let last = builder.with_offset(total.saturating_sub(most)).build()?;
        last.collect::<Result<Vec<_>, _>>().map_err(io::Error::other)?
    } else {
        journal::last_rows(&journal, most)?
    };
    let shows = batches.first().map_or(Shows::Nothing, |batch| Shows::of(&batch.schema()));
    let mut sampled = Sampled { shows, ..Sampled::default() };
    batches.iter().for_each(|batch| sampled.add(batch, 1, 0));
    Ok(sampled)
}

fn sample(row: &Map<String, Value>, place: &str) -> Sample {
    let number = row.get("row").and_then(Value::as_f64).map(|row| format!(", row {row}"));
    let shown = ["prompt", "generation", "chosen", "rejected"];
    let text = |label: &'static str| Some((label, row.get(label)?.as_str()?.to_owned()));
    Sample {
        place: format!("{place}{}", number.unwrap_or_default()),
        texts: shown.into_iter().filter_map(text).collect(),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use datafusion::arrow::array::{Float64Array, StringArray, UInt64Array};

    use super::*;

    fn batch(rows: u64) -> RecordBatch {
        let texts = |name: &str| (0..rows).map(|i| Some(format!("{name} {i}"))).collect::<StringArray>();
        let columns: [(&str, ArrayRef); 5] = [
            ("_row", Arc::new((0..rows).collect::<UInt64Array>())),
            ("prompt", Arc::new(texts("prompt"))),
            ("chosen", Arc::new(texts("chosen"))),
            ("rejected", Arc::new(StringArray::from_iter((0..rows).map(|i| (i > 0).then(|| "x".repeat(5000)))))),
            ("gap", Arc::new((0..rows).map(|i| i as f64 / 2.0).collect::<Float64Array>())),
        ];
        RecordBatch::try_from_iter(columns).unwrap()
    }

    #[test]
    fn rows_come_from_all_over_a_table_and_texts_are_cut() {
        let dir = tempfile::tempdir().unwrap();
        table::write_sorted(&dir.path().join("rows.parquet"), &[batch(100)]).unwrap();
        let mut tables = Tables::default();
        let sampled = tables.of(dir.path(), 10);
        assert_eq!((sampled.total, sampled.rows.len(), sampled.shows()), (100, 10, Shows::Pairs));
        assert_eq!(sampled.rows[9]["prompt"], "prompt 90");
        assert_eq!((&sampled.rows[0]["rejected"], &sampled.rows[3]["row"]), (&Value::Null, &json!(30.0)));
        assert_eq!(sampled.rows[1]["rejected"].as_str().unwrap().chars().count(), CHARACTERS + 1);
        let [gap] = sampled.histograms().collect::<Vec<_>>().try_into().unwrap();
        assert_eq!(gap["what"], "gap");
        let counts = |h: &Value| h["counts"].as_array().unwrap().iter().map(|c| c.as_u64().unwrap()).sum::<u64>();
        assert_eq!(counts(&gap), 100);
        assert_eq!(gap["edges"].as_array().unwrap().len(), gap["counts"].as_array().unwrap().len() + 1);
    }

    #[test]
    fn the_latest_rows_are_the_last_of_what_tells_most() {
        let run = tempfile::tempdir().unwrap();
        assert_eq!(latest(run.path(), 2), []);
        for (round, stage, columns) in [(1, "judge", 5), (1, "sample", 2), (2, "prompts", 1)] {
            let stage = run.path().join(format!("round-{round}/{stage}"));
            std::fs::create_dir_all(&stage).unwrap();
            let rows = batch(30).project(&(0..columns).collect::<Vec<_>>()).unwrap();
            table::write_sorted(&stage.join("rows.parquet"), &[rows]).unwrap();
        }
        let [one, two] = latest(run.path(), 2).try_into().unwrap();
        assert_eq!((one.place.as_str(), two.place.as_str()), ("judge, round 1, row 28", "judge, round 1, row 29"));
        assert_eq!(two.texts[..2], [("prompt", "prompt 29".to_owned()), ("chosen", "chosen 29".to_owned())]);
    }

    #[test]
    fn a_stage_without_rows_shows_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let sampled = Tables::default().of(dir.path(), 10);
        assert_eq!((sampled.total, sampled.shows(), sampled.histograms().count()), (0, Shows::Nothing, 0));
    }

    #[test]
    fn bins_hold_every_value_once() {
        let of = |values: &[f64]| Spread { values: values.into() }.histogram("x").unwrap();
        let one = of(&[3.0]);
        assert_eq!((&one["counts"], &one["edges"]), (&json!([1]), &json!([3.0, 4.0])));
        let counts = of(&(0..100).map(f64::from).collect::<Vec<_>>());
        assert!(counts["counts"].as_array().unwrap().iter().rev().skip(1).all(|c| *c == 5), "{counts}");
        assert_eq!(of(&[0.25, 0.25])["counts"].as_array().unwrap().iter().filter(|c| **c == 2).count(), 1);
        assert!(Spread { values: vec![f64::NAN] }.histogram("x").is_none());
    }
}
