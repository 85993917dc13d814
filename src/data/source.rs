//! A data set as numbered rows: files or a hub data set, reduced by `select` or `sql` and by `take`, and streamed by
//! shard.
//!
//! Row numbers are keys that outlive a run, so the same files must always give the same order: one partition, files in
//! the order of their paths, and a sort if a query has lost this order.

use std::collections::{BTreeMap, VecDeque};
use std::path::Path;
use std::sync::Arc;

use datafusion::arrow::array::{AsArray, BooleanArray, UInt64Array};
use datafusion::arrow::compute::filter_record_batch;
use datafusion::arrow::datatypes::{DataType, Schema, SchemaRef};
use datafusion::arrow::record_batch::RecordBatch;
use datafusion::dataframe::DataFrame;
use datafusion::error::DataFusionError;
use datafusion::execution::SendableRecordBatchStream;
use datafusion::logical_expr::{Expr, LogicalPlan, LogicalPlanBuilder};
use datafusion::prelude::SessionContext;
use futures::StreamExt;
use tokio::sync::OnceCell;

use super::batch::{self, ROW};
use super::candidates::{Candidates, CandidatesOption};
use super::conversion::Conversion;
pub use super::conversion::{Read, Refused};
use super::form::RowForm;
use super::shard::Geometry;
use super::stored::Stored;
use super::table::{self, TableFormat};
use super::{ColumnType, DataError, carry, files, pool, query};
use crate::flow::HubLogin;

/// Largest number of rows in a batch.
pub const BATCH_ROWS: usize = 256;
/// Number of rows that a check reads to find rows that can't be converted.
const SURVEYED: u64 = 256;

/// The keys of a source that decide its rows.
#[derive(Debug, Clone, Default)]
pub struct SourceSpec {
    /// A file, a glob, a directory or `hf://owner/name[@revision]`.
    pub dataset: String,
    /// Configuration of a data set that has several.
    pub config: Option<String>,
    pub split: Option<String>,
    /// Types of JSON and CSV columns that the flow sets.
    pub types: BTreeMap<String, ColumnType>,
    /// Separator of CSV values; `None`: a comma, in TSV files a tab.
    pub separator: Option<char>,
    /// Names of the new columns and their expressions; the rows have only these columns.
    pub select: Vec<(String, String)>,
    /// Query over the table `dataset`, instead of `select`.
    pub sql: Option<String>,
    pub take: Option<u64>,
    /// Form of prompts and answers; `None`: detected from the columns.
    pub form: Option<RowForm>,
    /// Columns or rows that hold existing answers.
    pub candidates: Option<CandidatesOption>,
    /// Login at the hub.
    pub login: HubLogin,
}

/// An opened data set.
pub struct Source {
    session: SessionContext,
    plan: LogicalPlan,
    /// Columns after `select` or `sql`, `_row` last.
    selected: SchemaRef,
    conversion: Conversion,
    /// Most prompts, if rows are grouped by prompt.
    prompts: Option<u64>,
    /// Rows by prompt, once they were read.
    groups: OnceCell<Vec<Read>>,
    stored: Stored,
    dataset: String,
    /// Number of rows, if it is known without reading them.
    rows: Option<u64>,
}

impl Source {
    /// Opens a data set. Relative paths start at `base`.
    ///
    /// # Errors
    /// Those of [`Stored::open`] and [`Source::of`].
    pub async fn open(spec: &SourceSpec, base: &Path) -> Result<Self, DataError> {
        Self::of(Stored::open(spec, base).await?, spec).await
    }

    /// Opens a data set whose files are known.
    ///
    /// # Errors
    /// A column that `select`, `sql`, the form or `candidates` needs is missing or has another type; a column can't be
    /// written or has a name that is reserved.
    pub async fn of(stored: Stored, spec: &SourceSpec) -> Result<Self, DataError> {
        let session = query::session();
        let fault = |e: DataFusionError| DataError::from_datafusion(&e, &[]);
        let table = stored.table(&session).await.map_err(fault)?;
        session.register_table("dataset", table).map_err(fault)?;
        // Answers to one prompt are taken together.
        let by = matches!(spec.candidates, Some(CandidatesOption::By(_)));
        let limit = spec.take.filter(|_| !by);
        let (plan, one_for_one) = planned(&session, spec, limit, &stored.schema).await?;
        let selected = checked_schema(&plan, &spec.dataset)?;
        let conversion = Conversion::of(spec.form, spec.candidates.as_ref(), &batch::without(&selected, ROW))?;
        check_prompt(conversion.schema(), &spec.dataset)?;
        let rows = stored.rows().filter(|_| one_for_one).map(|rows| rows.min(limit.unwrap_or(u64::MAX)));
        let (prompts, dataset) = (spec.take.filter(|_| by), spec.dataset.clone());
        Ok(Self { session, plan, selected, conversion, prompts, groups: OnceCell::new(), stored, dataset, rows })
    }

    /// Conversion of the selected rows.
    pub fn conversion(&self) -> &Conversion {
        &self.conversion
    }

    /// Columns of the rows, `_row` (u64) last.
    pub fn schema(&self) -> &SchemaRef {
        self.conversion.schema()
    }

    /// Commit of a hub data set.
    pub fn revision(&self) -> Option<&str> {
        self.stored.revision.as_deref()
    }

    /// Identity of the data for fingerprints: the commit, or the hash of the files' contents.
    ///
    /// # Errors
    /// A file can't be read.
    pub fn content(&self) -> Result<String, DataError> {
        match &self.stored.revision {
            Some(commit) => Ok(commit.clone()),
            None => files::content_hash(&self.stored.files),
        }
    }

    /// The files that are read.
    pub fn stored(&self) -> &Stored {
        &self.stored
    }

    /// Number of rows after `take`, or of prompts if `candidates` has `by`.
    ///
    /// # Errors
    /// There are no rows, or they can't be read.
    pub async fn count(&self) -> Result<u64, DataError> {
        let rows = match self.by() {
            Some(by) => self.grouped(by).await?.len() as u64,
            None => self.stored_rows().await?,
        };
        match rows {
            0 => Err(DataError::user(format!("{}: the data set has no rows", self.place()))),
            rows => Ok(rows),
        }
    }

    async fn stored_rows(&self) -> Result<u64, DataError> {
        let frame = DataFrame::new(self.session.state(), self.plan.clone());
        match self.rows {
            Some(rows) => Ok(rows),
            None => Ok(pool::run(frame.count()).await?.map_err(|e| self.fault(&e))? as u64),
        }
    }

    /// Column that groups rows by prompt.
    fn by(&self) -> Option<&str> {
        self.conversion.candidates().and_then(Candidates::by)
    }

    /// The rows of one shard, in order.
    ///
    /// # Errors
    /// The query can't be started; with `by`, the rows can't be read.
    pub async fn rows(&self, shard: Geometry) -> Result<Rows<'_>, DataError> {
        let (stream, ready) = match self.by() {
            Some(by) => (None, self.grouped(by).await?.to_vec().into()),
            None => (Some(self.stream().await?), VecDeque::new()),
        };
        Ok(Rows { source: self, stream, shard, seen: 0, ready })
    }

    async fn stream(&self) -> Result<SendableRecordBatchStream, DataError> {
        let frame = DataFrame::new(self.session.state(), self.plan.clone());
        let stream = pool::run(frame.execute_stream()).await?.map_err(|e| self.fault(&e))?;
        pool::stream(stream.schema(), stream)
    }

    /// All rows, those of one prompt under one `_row`. They are read once and held in memory.
    async fn grouped(&self, by: &str) -> Result<&[Read], DataError> {
        let groups = self.groups.get_or_try_init(|| async {
            let columns = batch::without(&self.selected, ROW);
            let mut stream = self.stream().await?;
            let mut read = Vec::new();
            while let Some(batch) = stream.next().await {
                read.push(batch::align(&batch.map_err(|e| self.fault(&e))?, &columns)?);
            }
            self.conversion.groups(columns, read, by, self.prompts).await
        });
        groups.await.map(Vec::as_slice)
    }

    /// Reads rows to find those that can't be converted, and the number of answers to a prompt. Reads the first 256
    /// rows, or all rows if `candidates` is a list or has `by`; no rows if there is nothing to convert.
    ///
    /// # Errors
    /// A row can't be read.
    pub async fn survey(&self) -> Result<Survey, DataError> {
        let candidates = self.conversion.candidates();
        let mut survey = Survey { each: candidates.and_then(Candidates::each), ..Survey::default() };
        if self.conversion.told().is_none() && candidates.is_none() {
            return Ok(survey);
        }
        let total = self.count().await?;
        let mut rows = self.rows(Geometry { index: 0, count: 1, contiguous: false, total }).await?;
        let all = candidates.is_some() && survey.each.is_none();
        while let Some(read) = rows.next().await? {
            survey.rows += read.completes.len() as u64;
            survey.refused += read.refused.len() as u64;
            survey.reason = survey.reason.or_else(|| read.refused.first().map(|refused| refused.reason.clone()));
            let completion = read.batch.column_by_name("completion");
            survey.answered |= completion.is_none_or(|column| column.null_count() < column.len());
            survey.turns_as_text = survey.turns_as_text.or_else(|| turns_as_text(&read.batch));
            if all {
                let most = most_of_one(batch::row_numbers(&read.batch)?.values());
                survey.each = Some(survey.each.unwrap_or_default().max(most));
            } else if survey.rows >= SURVEYED {
                break;
            }
        }
        Ok(survey)
    }

    /// The logical plan of the query, for `check --explain`.
    pub fn explain(&self) -> String {
        self.plan.display_indent().to_string()
    }

    fn place(&self) -> String {
        match self.stored.files.as_slice() {
            [file] => file.display().to_string(),
            _ => self.dataset.clone(),
        }
    }

    fn fault(&self, error: &DataFusionError) -> DataError {
        // Errors of text readers have their place.
        if let DataFusionError::External(inner) = error.find_root()
            && let Some(found) = inner.downcast_ref::<DataError>()
        {
            return found.clone();
        }
        DataError::from_datafusion(error, &[]).at(self.place())
    }
}

/// Result of [`Source::survey`].
#[derive(Debug, Clone, Default)]
pub struct Survey {
    /// Number of rows that were read, or of prompts if `candidates` has `by`.
    pub rows: u64,
    /// Number of these that can't be converted.
    pub refused: u64,
    /// The reason for the first of them.
    pub reason: Option<String>,
    /// Largest number of answers to a prompt; `None` without `candidates`.
    pub each: Option<u64>,
    /// True if a row has an answer in `completion`, or there is no such column.
    pub answered: bool,
    /// A column of text whose first value is a list of turns, in JSON or in Python's notation.
    pub turns_as_text: Option<String>,
}

/// Stream of a shard's rows in batches.
pub struct Rows<'a> {
    source: &'a Source,
    /// `None` if all rows are in `ready`.
    stream: Option<SendableRecordBatchStream>,
    shard: Geometry,
    /// Number of rows read from the data set.
    seen: u64,
    /// Rows that are read and not returned yet.
    ready: VecDeque<Read>,
}

impl Rows<'_> {
    /// The next rows: up to 256, or those of one prompt. `None` at the end.
    ///
    /// # Errors
    /// The data set can't be read, or has another number of rows than were counted.
    pub async fn next(&mut self) -> Result<Option<Read>, DataError> {
        loop {
            if let Some(ready) = self.ready.pop_front() {
                let grouped = self.stream.is_none();
                self.seen += u64::from(grouped);
                if grouped && ready.completes.iter().all(|row| self.shard.ordinal(*row).is_none()) {
                    continue;
                }
                return Ok(Some(ready));
            }
            let Some(stream) = &mut self.stream else { return self.ended().map(|()| None) };
            let Some(read) = stream.next().await else { return self.ended().map(|()| None) };
            let read = self.of_shard(&read.map_err(|e| self.source.fault(&e))?)?;
            for start in (0..read.num_rows()).step_by(BATCH_ROWS) {
                let rows = read.slice(start, BATCH_ROWS.min(read.num_rows() - start));
                self.ready.push_back(self.source.conversion.read(&rows)?);
            }
        }
    }

    /// Checks that as many rows came as were counted. For Parquet the count is that of the footer.
    fn ended(&self) -> Result<(), DataError> {
        if self.seen == self.shard.total {
            return Ok(());
        }
        let (place, promised, read) = (self.source.place(), self.shard.total, self.seen);
        Err(DataError::user(format!(
            "{place}: {promised} rows were counted and {read} were read; the file is damaged, changes while it is read, or \
             its query gives other rows each time"
        )))
    }

    fn of_shard(&mut self, read: &RecordBatch) -> Result<RecordBatch, DataError> {
        let numbers = self.seen..self.seen + read.num_rows() as u64;
        self.seen = numbers.end;
        let wanted: BooleanArray = numbers.clone().map(|row| Some(self.shard.ordinal(row).is_some())).collect();
        let numbered = batch::with_column(read, ROW, Arc::new(UInt64Array::from_iter_values(numbers)))?;
        let kept = filter_record_batch(&numbered, &wanted).map_err(|e| DataError::user(e.to_string()))?;
        batch::align(&kept, &self.source.selected)
    }
}

/// The column of prompts or answers whose first text is a list of turns.
fn turns_as_text(batch: &RecordBatch) -> Option<String> {
    let is_turns = |text: &str| {
        let begins = text.trim_start().strip_prefix('[').is_some_and(|rest| rest.trim_start().starts_with('{'));
        begins
            && ["role", "from"]
                .iter()
                .any(|key| text.contains(&format!("\"{key}\"")) || text.contains(&format!("'{key}'")))
    };
    let looks = |name: &&&str| {
        let texts = batch.column_by_name(name).and_then(|column| column.as_string_opt::<i32>());
        texts.and_then(|texts| texts.iter().flatten().next()).is_some_and(is_turns)
    };
    ["prompt", "chosen", "rejected", "completion"].iter().find(looks).map(|name| (*name).to_owned())
}

/// Length of the longest run of equal numbers.
fn most_of_one(rows: &[u64]) -> u64 {
    rows.chunk_by(|a, b| a == b).map(|run| run.len() as u64).max().unwrap_or(0)
}

/// The logical plan, and whether each row of the files gives one row (before `take`).
async fn planned(
    session: &SessionContext,
    spec: &SourceSpec,
    take: Option<u64>,
    stored: &Schema,
) -> Result<(LogicalPlan, bool), DataError> {
    let columns: Vec<String> = stored.fields().iter().map(|f| f.name().clone()).collect();
    let fault = |e: DataFusionError| DataError::from_datafusion(&e, &columns);
    let plan = match (&spec.sql, spec.select.as_slice()) {
        (Some(_), [_, ..]) => {
            return Err(DataError::user("can't be used together with select; say it all in sql").at("sql"));
        }
        (Some(sql), []) => query::logical_plan(session, sql).await.map_err(|e| fault(e).at("sql"))?,
        (None, []) => query::logical_plan(session, "SELECT * FROM dataset").await.map_err(fault)?,
        (None, select) => selected(session, select, &columns).await?,
    };
    let class = carry::classify(&plan).map_err(fault)?;
    if class.volatile {
        let key = if spec.sql.is_some() { "sql" } else { "select" };
        let message = "a source can't use random() or now(): its rows must be the same each time they are read";
        return Err(DataError::user(message).at(key));
    }
    let one_for_one = spec.sql.is_none() && class.row_wise && !class.unnests;
    let ordered = if class.shuffles && !class.ordered {
        let all: Vec<_> = plan.schema().columns().into_iter().map(|c| Expr::Column(c).sort(true, true)).collect();
        LogicalPlanBuilder::from(plan).sort(all).and_then(LogicalPlanBuilder::build).map_err(fault)?
    } else {
        carry::break_ties(&plan).map_err(fault)?
    };
    let taken = match take {
        Some(take) => LogicalPlanBuilder::from(ordered)
            .limit(0, Some(take as usize))
            .and_then(LogicalPlanBuilder::build)
            .map_err(fault)?,
        None => ordered,
    };
    Ok((taken, one_for_one))
}

async fn selected(
    session: &SessionContext,
    select: &[(String, String)],
    columns: &[String],
) -> Result<LogicalPlan, DataError> {
    let item = |(name, expr): &(String, String)| format!("{expr} AS {}", query::quoted(name));
    let all = format!("SELECT {} FROM dataset", select.iter().map(item).collect::<Vec<_>>().join(", "));
    match query::logical_plan(session, &all).await {
        Ok(plan) if plan.schema().fields().len() == select.len() => Ok(plan),
        outcome => {
            for one in select {
                let alone = query::logical_plan(session, &format!("SELECT {} FROM dataset", item(one))).await;
                let place = format!("select.{}", one.0);
                match alone {
                    Err(e) => return Err(DataError::from_datafusion(&e, columns).at(place)),
                    Ok(plan) if plan.schema().fields().len() != 1 => {
                        return Err(DataError::user("one expression gives one column").at(place));
                    }
                    Ok(_) => {}
                }
            }
            outcome.map_err(|e| DataError::from_datafusion(&e, columns).at("select"))
        }
    }
}

/// The schema of the rows.
///
/// # Errors
/// A name begins with `_` or occurs twice, or a type can't be written.
fn checked_schema(plan: &LogicalPlan, dataset: &str) -> Result<SchemaRef, DataError> {
    let schema = batch::plain_schema(plan.schema().as_arrow());
    for (i, field) in schema.fields().iter().enumerate() {
        let name = field.name();
        if name.starts_with('_') {
            let remedy = "names that begin with _ are the engine's; name the columns you need in select";
            return Err(DataError::user(format!("{dataset}: column `{name}`: {remedy}")));
        }
        if schema.fields().iter().take(i).any(|f| f.name() == name) {
            return Err(DataError::user(format!("{dataset}: two columns are called `{name}`; rename one with AS")));
        }
    }
    if let Some((column, why)) = table::unwritable(TableFormat::Parquet, &schema) {
        return Err(DataError::user(format!(
            "{dataset}: column `{column}` can't be written: {why}; leave it out in select"
        )));
    }
    Ok(batch::schema_with(&schema, ROW, DataType::UInt64))
}

/// Checks the type of `prompt`.
///
/// # Errors
/// `prompt` is neither text nor turns.
fn check_prompt(schema: &Schema, dataset: &str) -> Result<(), DataError> {
    let Ok(field) = schema.field_with_name("prompt") else { return Ok(()) };
    let kind = field.data_type();
    if is_prompt(kind) {
        return Ok(());
    }
    let types = match kind.is_numeric() || *kind == DataType::Boolean {
        true => "; types = { prompt = \"string\" } reads it as text in a JSON or CSV file",
        false => "",
    };
    let remedy = "a prompt is text or a list of {role, content}";
    let kind = batch::type_name(kind);
    Err(DataError::user(format!("{dataset}: column `prompt` is {kind}; {remedy}{types}")))
}

fn is_prompt(data_type: &DataType) -> bool {
    match data_type {
        DataType::Utf8 => true,
        DataType::List(turn) => match turn.data_type() {
            DataType::Struct(fields) => ["role", "content"]
                .iter()
                .all(|name| fields.iter().any(|f| f.name() == name && *f.data_type() == DataType::Utf8)),
            _ => false,
        },
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use datafusion::arrow::array::{Array, ArrayRef, AsArray, Float64Array, Int64Array, LargeStringArray, StringArray};
    use datafusion::arrow::ipc::writer::{FileWriter, StreamWriter};
    use datafusion::parquet::arrow::ArrowWriter;
    use datafusion::parquet::file::properties::WriterProperties;

    use super::*;

    fn table(numbers: std::ops::Range<i64>) -> RecordBatch {
        let question: ArrayRef =
            Arc::new(StringArray::from_iter_values(numbers.clone().map(|i| format!("Question, \"{i}\"\n?"))));
        RecordBatch::try_from_iter([
            ("question", question),
            ("n", Arc::new(Int64Array::from_iter_values(numbers)) as ArrayRef),
        ])
        .unwrap()
    }

    fn write_parquet(path: &Path, numbers: std::ops::Range<i64>, group: usize) {
        let properties = WriterProperties::builder().set_max_row_group_row_count(Some(group)).build();
        let batch = table(numbers);
        let mut writer = ArrowWriter::try_new(File::create(path).unwrap(), batch.schema(), Some(properties)).unwrap();
        writer.write(&batch).unwrap();
        writer.close().unwrap();
    }

    fn write_lines(path: &Path, numbers: std::ops::Range<i64>) {
        super::super::table::write(path, &table(0..0).schema(), &[table(numbers)]).unwrap();
    }

    fn spec(dataset: &str) -> SourceSpec {
        SourceSpec { dataset: dataset.into(), ..SourceSpec::default() }
    }

    fn selecting(dataset: &str, select: &[(&str, &str)]) -> SourceSpec {
        let select = select.iter().map(|(n, e)| ((*n).to_owned(), (*e).to_owned())).collect();
        SourceSpec { select, ..spec(dataset) }
    }

    /// (`_row`, `n`) of each row of a shard.
    async fn read_all(source: &Source, shard: Option<Geometry>) -> Vec<(u64, i64)> {
        let total = source.count().await.unwrap();
        let shard = shard.unwrap_or(Geometry { index: 0, count: 1, contiguous: false, total });
        let mut rows = source.rows(shard).await.unwrap();
        let mut read = Vec::new();
        while let Some(Read { batch, .. }) = rows.next().await.unwrap() {
            assert!((1..=BATCH_ROWS).contains(&batch.num_rows()));
            assert_eq!(batch.schema_ref(), source.schema());
            let n =
                batch.column_by_name("n").unwrap().as_primitive::<datafusion::arrow::datatypes::Int64Type>().clone();
            read.extend(batch::row_numbers(&batch).unwrap().values().iter().copied().zip(n.values().iter().copied()));
        }
        read
    }

    fn in_order(numbers: std::ops::Range<i64>) -> Vec<(u64, i64)> {
        numbers.enumerate().map(|(row, n)| (row as u64, n)).collect()
    }

    async fn failure(spec: SourceSpec, base: &Path) -> String {
        match Source::open(&spec, base).await {
            Err(e) => e.message,
            Ok(source) => match source.count().await {
                Err(e) => e.message,
                Ok(total) => {
                    let mut rows =
                        source.rows(Geometry { index: 0, count: 1, contiguous: false, total }).await.unwrap();
                    loop {
                        match rows.next().await {
                            Err(e) => break e.message,
                            Ok(None) => panic!("{spec:?} passed"),
                            Ok(Some(_)) => {}
                        }
                    }
                }
            },
        }
    }

    #[tokio::test]
    async fn twenty_row_groups_keep_their_order() {
        let dir = tempfile::tempdir().unwrap();
        write_parquet(&dir.path().join("many.parquet"), 0..10_000, 500);
        let source = Source::open(&spec("many.parquet"), dir.path()).await.unwrap();
        for _ in 0..2 {
            assert_eq!(read_all(&source, None).await, in_order(0..10_000));
        }
    }

    #[tokio::test]
    async fn every_format_gives_the_same_rows() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        write_parquet(&at("t.parquet"), 0..300, 64);
        write_lines(&at("t.jsonl"), 0..300);
        let lines = std::fs::read_to_string(at("t.jsonl")).unwrap();
        std::fs::write(at("t.json"), format!("[{}]", lines.trim().lines().collect::<Vec<_>>().join(",\n"))).unwrap();
        let csv: String = (0..300).map(|i| format!("\"Question, \"\"{i}\"\"\n?\",{i}\n")).collect();
        std::fs::write(at("t.csv"), format!("question,n\n{csv}")).unwrap();
        let mut file = FileWriter::try_new(File::create(at("t.arrow")).unwrap(), &table(0..0).schema()).unwrap();
        file.write(&table(0..300)).unwrap();
        file.finish().unwrap();
        let mut stream =
            StreamWriter::try_new(File::create(at("stream [1] %.arrow")).unwrap(), &table(0..0).schema()).unwrap();
        stream.write(&table(0..300)).unwrap();
        stream.finish().unwrap();
        for name in ["t.parquet", "t.jsonl", "t.json", "t.csv", "t.arrow", "stream [1] %.arrow"] {
            let source =
                Source::open(&selecting(name, &[("prompt", "question"), ("n", "n")]), dir.path()).await.unwrap();
            assert_eq!(read_all(&source, None).await, in_order(0..300), "{name}");
            assert_eq!(
                source.schema().fields().iter().map(|f| f.name().as_str()).collect::<Vec<_>>(),
                ["prompt", "n", "_row"]
            );
            assert_eq!(source.content().unwrap().len(), 64);
        }
    }

    #[tokio::test]
    async fn several_files_come_in_the_order_of_their_paths() {
        let dir = tempfile::tempdir().unwrap();
        write_parquet(&dir.path().join("b.parquet"), 10..20, 4);
        write_parquet(&dir.path().join("a.parquet"), 0..10, 4);
        for dataset in ["*.parquet", "."] {
            let source = Source::open(&spec(dataset), dir.path()).await.unwrap();
            assert_eq!(read_all(&source, None).await, in_order(0..20));
        }
    }

    fn write_arrow(path: &Path, columns: Vec<(&str, ArrayRef)>) {
        let batch = RecordBatch::try_from_iter(columns).unwrap();
        let mut writer = StreamWriter::try_new(File::create(path).unwrap(), &batch.schema()).unwrap();
        writer.write(&batch).unwrap();
        writer.finish().unwrap();
    }

    fn write_table(path: &Path, columns: Vec<(&str, ArrayRef)>) {
        let fields: Vec<_> = columns
            .iter()
            .map(|(name, array)| datafusion::arrow::datatypes::Field::new(*name, array.data_type().clone(), true))
            .collect();
        let schema = Arc::new(Schema::new(fields));
        let arrays = columns.into_iter().map(|(_, array)| array).collect();
        let batch = RecordBatch::try_new(schema.clone(), arrays).unwrap();
        let mut writer = ArrowWriter::try_new(File::create(path).unwrap(), schema, None).unwrap();
        writer.write(&batch).unwrap();
        writer.close().unwrap();
    }

    #[tokio::test]
    async fn files_that_differ_a_little_are_read_as_the_wider_type() {
        let whole = || -> ArrayRef { Arc::new(Int64Array::from(vec![1, 2])) };
        let half = || -> ArrayRef { Arc::new(Float64Array::from(vec![0.5, 1.5])) };
        let text = || -> ArrayRef { Arc::new(StringArray::from(vec!["a", "b"])) };
        let large = || -> ArrayRef { Arc::new(LargeStringArray::from(vec!["c", "d"])) };
        for (extension, write) in [("parquet", write_table as fn(&Path, Vec<(&str, ArrayRef)>)), ("arrow", write_arrow)]
        {
            let dir = tempfile::tempdir().unwrap();
            let at = |name: &str| dir.path().join(format!("{name}.{extension}"));
            write(&at("a"), vec![("x", whole()), ("t", text())]);
            write(&at("b"), vec![("t", large()), ("x", half()), ("more", whole())]);
            let source = Source::open(&spec(&format!("*.{extension}")), dir.path()).await.unwrap();
            let total = source.count().await.unwrap();
            let mut rows = source.rows(Geometry { index: 0, count: 1, contiguous: false, total }).await.unwrap();
            let (mut x, mut t, mut more) = (Vec::new(), Vec::new(), 0);
            while let Some(batch) = rows.next().await.unwrap() {
                let column = |name: &str| batch.batch.column_by_name(name).unwrap().clone();
                x.extend(column("x").as_primitive::<datafusion::arrow::datatypes::Float64Type>().values().to_vec());
                t.extend(column("t").as_string::<i32>().iter().map(|t| t.unwrap().to_owned()));
                more += column("more").null_count();
            }
            assert_eq!((x, t, more), (vec![1.0, 2.0, 0.5, 1.5], ["a", "b", "c", "d"].map(str::to_owned).to_vec(), 2));
            write(&at("a"), vec![("x", Arc::new(Int64Array::from(vec![1, (1 << 53) + 1])) as ArrayRef)]);
            let told = match Source::open(&spec(&format!("*.{extension}")), dir.path()).await {
                Err(error) => error.message,
                Ok(source) => {
                    let mut rows =
                        source.rows(Geometry { index: 0, count: 1, contiguous: false, total }).await.unwrap();
                    rows.next().await.unwrap_err().message
                }
            };
            assert!(told.contains("column `x`") && told.contains("would lose digits") && told.contains("a."), "{told}");
            write(&at("c"), vec![("x", text())]);
            let told = failure(spec(&format!("*.{extension}")), dir.path()).await;
            assert!(told.contains("column `x` is text here and") && told.contains("c."), "{told}");
            write(&at("d"), vec![("x", whole()), ("x", half())]);
            let told = failure(spec(&format!("d.{extension}")), dir.path()).await;
            assert!(told.contains("two columns are called `x`"), "{told}");
        }
    }

    #[tokio::test]
    async fn take_then_shard() {
        let dir = tempfile::tempdir().unwrap();
        write_lines(&dir.path().join("t.jsonl"), 0..1200);
        for n in [10, 27, 100, 1000] {
            let source = Source::open(&SourceSpec { take: Some(n), ..spec("t.jsonl") }, dir.path()).await.unwrap();
            assert_eq!(source.count().await.unwrap(), n);
            for index in 0..7 {
                let shard = Geometry { index, count: 7, contiguous: false, total: n };
                let expected: Vec<(u64, i64)> = (index..n).step_by(7).map(|r| (r, r as i64)).collect();
                assert_eq!(read_all(&source, Some(shard)).await, expected);
            }
        }
    }

    #[tokio::test]
    async fn sql_over_the_data_set() {
        let dir = tempfile::tempdir().unwrap();
        write_lines(&dir.path().join("t.jsonl"), 0..100);
        for (sql, expected) in [
            (
                "SELECT question AS prompt, n FROM dataset WHERE n % 10 = 3",
                in_order(0..10).iter().map(|(r, n)| (*r, n * 10 + 3)).collect::<Vec<_>>(),
            ),
            ("SELECT n FROM dataset ORDER BY n DESC LIMIT 3", vec![(0, 99), (1, 98), (2, 97)]),
            ("SELECT n % 4 AS n, count(*) AS c FROM dataset GROUP BY 1", in_order(0..4)),
        ] {
            let source =
                Source::open(&SourceSpec { sql: Some(sql.into()), ..spec("t.jsonl") }, dir.path()).await.unwrap();
            assert_eq!(read_all(&source, None).await, expected, "{sql}");
        }
    }

    #[tokio::test]
    async fn conversations_are_prompts_and_numbers_are_not() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(
            dir.path().join("c.jsonl"),
            "{\"prompt\": [{\"role\": \"user\", \"content\": \"hi\"}], \"k\": 1}\n",
        )
        .unwrap();
        Source::open(&spec("c.jsonl"), dir.path()).await.unwrap();
        let message = failure(selecting("c.jsonl", &[("prompt", "k")]), dir.path()).await;
        assert_eq!(
            message,
            "c.jsonl: column `prompt` is an integer; a prompt is text or a list of {role, content}; types = { prompt = \
             \"string\" } reads it as text in a JSON or CSV file"
        );
    }

    #[tokio::test]
    async fn faults_name_their_place() {
        let dir = tempfile::tempdir().unwrap();
        let base = dir.path();
        std::fs::write(base.join("bad.jsonl"), "{\"a\": \"x\"}\n\n{\"a\": \"y\"\n").unwrap();
        std::fs::write(base.join("list.jsonl"), "{\"a\": \"x\"}\n[1]\n").unwrap();
        let long: String = (0..11_000).map(|i| format!("{{\"a\": {i}}}\n")).collect();
        std::fs::write(base.join("late.jsonl"), format!("{long}{{\"a\": \"text\"}}\n")).unwrap();
        std::fs::write(base.join("array.json"), "[{\"a\": 1},\n{\"a\": }]").unwrap();
        std::fs::write(base.join("empty.jsonl"), "").unwrap();
        std::fs::write(base.join("head.csv"), "question,n\n").unwrap();
        std::fs::write(base.join("ragged.csv"), "a,b\n1,2\n1,2,3\n").unwrap();
        std::fs::write(base.join("broken.parquet"), "PAR1 not really").unwrap();
        std::fs::write(base.join("under.jsonl"), "{\"_id\": 1, \"q\": \"x\"}\n").unwrap();
        write_lines(&base.join("t.jsonl"), 0..5);
        for (spec, expected) in [
            (spec("bad.jsonl"), vec!["bad.jsonl:3: not a JSON object"]),
            (spec("list.jsonl"), vec!["list.jsonl:2: not a JSON object"]),
            (spec("late.jsonl"), vec!["late.jsonl:11001: "]),
            (spec("array.json"), vec!["array.json:2: "]),
            (spec("empty.jsonl"), vec!["empty.jsonl: the data set has no rows"]),
            (spec("head.csv"), vec!["head.csv: the data set has no rows"]),
            (spec("ragged.csv"), vec!["ragged.csv:3: the row has 3 values"]),
            (spec("broken.parquet"), vec!["broken.parquet: "]),
            (spec("under.jsonl"), vec!["under.jsonl: column `_id`: names that begin with _"]),
            (spec("gone.jsonl"), vec!["gone.jsonl: no such file or directory"]),
            (
                selecting("t.jsonl", &[("n", "n"), ("prompt", "qestion")]),
                vec!["select.prompt: there is no column `qestion`; did you mean `question`? There are: ", "question"],
            ),
            (
                selecting("t.jsonl", &[("prompt", "question, n")]),
                vec!["select.prompt: one expression gives one column"],
            ),
            (
                SourceSpec { sql: Some("SELECT n FROM dataset WHERE n > 10".into()), ..spec("t.jsonl") },
                vec!["t.jsonl: the data set has no rows"],
            ),
            (
                SourceSpec { sql: Some("SELECT uuid() AS u FROM dataset".into()), ..spec("t.jsonl") },
                vec!["can't use random() or now()"],
            ),
        ] {
            let shown = format!("{spec:?}");
            let message = failure(spec, base).await;
            for part in expected {
                assert!(message.contains(part), "{shown}: {message}");
            }
            assert!(!message.contains('\n'), "{message}");
        }
    }
}
