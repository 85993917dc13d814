//! A data set as numbered rows: files or a hub data set, narrowed by `select` or `sql`, cut by
//! `take`, streamed shard by shard.
//!
//! Row numbers are keys that outlive a run, so the same files must always give the same order:
//! one partition, files in the order of their paths, and a sort where a query has lost that order.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use datafusion::arrow::array::{BooleanArray, UInt64Array};
use datafusion::arrow::compute::filter_record_batch;
use datafusion::arrow::datatypes::{DataType, Schema, SchemaRef};
use datafusion::arrow::json::ReaderBuilder;
use datafusion::arrow::record_batch::RecordBatch;
use datafusion::dataframe::DataFrame;
use datafusion::datasource::file_format::options::ArrowReadOptions;
use datafusion::error::DataFusionError;
use datafusion::execution::SendableRecordBatchStream;
use datafusion::logical_expr::{Expr, LogicalPlan, LogicalPlanBuilder};
use datafusion::prelude::{CsvReadOptions, JsonReadOptions, ParquetReadOptions, SessionContext};
use futures::StreamExt;

use super::batch::{self, ROW};
use super::files::{self, Format};
use super::hub::HubName;
use super::shard::Geometry;
use super::{DataError, carry, query};
use crate::flow::HubLogin;

/// Most rows of one batch.
pub const BATCH_ROWS: usize = 256;

/// Rows that a schema is inferred from where the file has none.
const INFERRED_ROWS: usize = 10_000;

/// The keys of a source that decide its rows.
#[derive(Debug, Clone, Default)]
pub struct SourceSpec {
    /// A file, a glob, a directory or `hf://owner/name[@revision]`.
    pub dataset: String,
    pub split: Option<String>,
    /// New columns and their expressions.
    pub select: Vec<(String, String)>,
    /// A query over the table `dataset`; instead of `select`.
    pub sql: Option<String>,
    pub take: Option<u64>,
    /// Who asks the hub.
    pub login: HubLogin,
}

/// An opened data set. Opening reads schemas, not rows.
pub struct Source {
    session: SessionContext,
    plan: LogicalPlan,
    schema: SchemaRef,
    files: Vec<PathBuf>,
    format: Format,
    /// Types of the files themselves.
    stored: SchemaRef,
    revision: Option<String>,
    dataset: String,
}

impl Source {
    /// `base` is where relative paths start.
    ///
    /// Errors name the file (and line, in JSON), the column that isn't there, or what is missing
    /// from the hub's cache.
    pub async fn open(spec: &SourceSpec, base: &Path) -> Result<Self, DataError> {
        let (files, format, revision) = match HubName::parse(&spec.dataset) {
            Some(name) => {
                let snapshot = name?.snapshot(spec.login, spec.split.as_deref()).await?;
                (snapshot.files, snapshot.format, Some(snapshot.revision))
            }
            None => {
                let (files, format) = files::local(&spec.dataset, spec.split.as_deref(), base)?;
                (files, format, None)
            }
        };
        let session = query::session();
        let stored = stored_schema(&session, &files, format).await?;
        let table =
            read(&session, &files, format, Some(&stored)).await.map_err(|e| DataError::from_datafusion(&e, &[]))?;
        let register = |e: DataFusionError| DataError::from_datafusion(&e, &[]);
        session.register_table("dataset", table.into_view()).map_err(register)?;
        let plan = planned(&session, spec, &stored).await?;
        let schema = checked_schema(&plan, &spec.dataset)?;
        Ok(Self { session, plan, schema, files, format, stored, revision, dataset: spec.dataset.clone() })
    }

    /// Columns of the rows, `_row` (u64) last.
    pub fn schema(&self) -> &SchemaRef {
        &self.schema
    }

    /// Commit of a hub data set.
    pub fn revision(&self) -> Option<&str> {
        self.revision.as_deref()
    }

    /// What the rows are of, for fingerprints: the commit, or the hash of the files' contents.
    pub fn content(&self) -> Result<String, DataError> {
        match &self.revision {
            Some(commit) => Ok(commit.clone()),
            None => files::content_hash(&self.files),
        }
    }

    /// Rows after `take`. Errors where there is none.
    pub async fn count(&self) -> Result<u64, DataError> {
        let frame = DataFrame::new(self.session.state(), self.plan.clone());
        match frame.count().await.map_err(|e| self.fault(&e))? {
            0 => Err(DataError::user(format!("{}: the data set has no rows", self.place()))),
            n => Ok(n as u64),
        }
    }

    /// The rows of one shard, in order.
    pub async fn rows(&self, shard: Geometry) -> Result<Rows<'_>, DataError> {
        let frame = DataFrame::new(self.session.state(), self.plan.clone());
        let stream = frame.execute_stream().await.map_err(|e| self.fault(&e))?;
        Ok(Rows { source: self, stream, shard, seen: 0, ready: None })
    }

    /// The plan that reads it, for `check --explain`.
    pub fn explain(&self) -> String {
        self.plan.display_indent().to_string()
    }

    fn place(&self) -> String {
        match self.files.as_slice() {
            [file] => file.display().to_string(),
            _ => self.dataset.clone(),
        }
    }

    fn fault(&self, error: &DataFusionError) -> DataError {
        if self.format == Format::JsonLines
            && let Some(found) = self.files.iter().find_map(|f| json_fault(f, Some(&self.stored)))
        {
            return found;
        }
        DataError::from_datafusion(error, &[]).at(self.place())
    }
}

/// Rows of a shard as a stream of batches.
pub struct Rows<'a> {
    source: &'a Source,
    stream: SendableRecordBatchStream,
    shard: Geometry,
    /// Rows of the data set that were read.
    seen: u64,
    /// What is left of a batch that was read.
    ready: Option<RecordBatch>,
}

impl Rows<'_> {
    /// The next 1 to 256 rows, with `_row`; none at the end.
    pub async fn next(&mut self) -> Result<Option<RecordBatch>, DataError> {
        loop {
            if let Some(ready) = self.ready.take().filter(|b| b.num_rows() > 0) {
                let size = ready.num_rows().min(BATCH_ROWS);
                self.ready = Some(ready.slice(size, ready.num_rows() - size));
                return Ok(Some(ready.slice(0, size)));
            }
            let Some(read) = self.stream.next().await else { return self.ended().map(|()| None) };
            self.ready = Some(self.of_shard(&read.map_err(|e| self.source.fault(&e))?)?);
        }
    }

    /// All rows came that were counted, which for Parquet is what its footer says.
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
        batch::align(&kept, &self.source.schema)
    }
}

/// Reads `files`, in the order given.
async fn read(
    session: &SessionContext,
    files: &[PathBuf],
    format: Format,
    schema: Option<&Schema>,
) -> Result<DataFrame, DataFusionError> {
    let urls: Vec<String> = files.iter().map(|f| file_url(f)).collect();
    match format {
        Format::Parquet => {
            let options = ParquetReadOptions { file_extension: "", schema, ..Default::default() };
            session.read_parquet(urls, options).await
        }
        Format::JsonLines => {
            let array = files.first().is_some_and(|f| files::is_json_array(f).unwrap_or(false));
            let options = JsonReadOptions {
                file_extension: "",
                schema,
                schema_infer_max_records: INFERRED_ROWS,
                newline_delimited: !array,
                ..Default::default()
            };
            session.read_json(urls, options).await
        }
        Format::Csv => {
            let options = CsvReadOptions {
                file_extension: "",
                schema,
                schema_infer_max_records: INFERRED_ROWS,
                newlines_in_values: true,
                ..Default::default()
            };
            session.read_csv(urls, options).await
        }
        Format::Arrow => {
            let options = ArrowReadOptions { file_extension: "", schema, ..Default::default() };
            session.read_arrow(urls, options).await
        }
    }
}

/// The columns of all files together. Errors name the file that is unreadable, empty, or of other types.
async fn stored_schema(session: &SessionContext, files: &[PathBuf], format: Format) -> Result<SchemaRef, DataError> {
    let mut merged = Schema::empty();
    for file in files {
        if std::fs::metadata(file).is_ok_and(|m| m.len() == 0) {
            return Err(DataError::user(format!("{}: the data set has no rows", file.display())));
        }
        let frame = read(session, std::slice::from_ref(file), format, None).await.map_err(|e| {
            let found = (format == Format::JsonLines).then(|| json_fault(file, None)).flatten();
            found.unwrap_or_else(|| DataError::from_datafusion(&e, &[]).at(file.display()))
        })?;
        let schema = frame.schema().as_arrow().clone().with_metadata(Default::default());
        merged = Schema::try_merge([merged, schema]).map_err(|e| {
            DataError::user(format!("{}: its columns differ from the files before it: {e}", file.display()))
        })?;
    }
    if merged.fields().is_empty() {
        let place = files.first().map(|f| f.display().to_string()).unwrap_or_default();
        return Err(DataError::user(format!("{place}: the data set has no rows")));
    }
    Ok(Arc::new(merged))
}

async fn planned(session: &SessionContext, spec: &SourceSpec, stored: &Schema) -> Result<LogicalPlan, DataError> {
    let columns: Vec<String> = stored.fields().iter().map(|f| f.name().clone()).collect();
    let fault = |e: DataFusionError| DataError::from_datafusion(&e, &columns);
    let plan = match (&spec.sql, spec.select.as_slice()) {
        (Some(_), [_, ..]) => return Err(DataError::user("select and sql can't be used together; say it all in sql")),
        (Some(sql), []) => query::logical_plan(session, sql).await.map_err(|e| fault(e).at("sql"))?,
        (None, []) => query::logical_plan(session, "SELECT * FROM dataset").await.map_err(fault)?,
        (None, select) => selected(session, select, &columns).await?,
    };
    let class = carry::classify(&plan).map_err(fault)?;
    if class.volatile {
        return Err(DataError::user(
            "a source can't use random() or now(): its rows must be the same each time they are read",
        ));
    }
    let ordered = if class.shuffles && !class.ordered {
        let all: Vec<_> = plan.schema().columns().into_iter().map(|c| Expr::Column(c).sort(true, true)).collect();
        LogicalPlanBuilder::from(plan).sort(all).and_then(LogicalPlanBuilder::build).map_err(fault)?
    } else {
        carry::break_ties(&plan).map_err(fault)?
    };
    match spec.take {
        Some(take) => LogicalPlanBuilder::from(ordered)
            .limit(0, Some(take as usize))
            .and_then(LogicalPlanBuilder::build)
            .map_err(fault),
        None => Ok(ordered),
    }
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

/// The schema on the edge, after refusing what later stages could not take.
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
        if name == "prompt" && !is_prompt(field.data_type()) {
            let remedy = "a prompt is a string or a list of {role, content}";
            return Err(DataError::user(format!("{dataset}: column `prompt` is {}; {remedy}", field.data_type())));
        }
    }
    Ok(batch::schema_with(&schema, ROW, DataType::UInt64))
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

/// `file://` address of a path; letters that would read as a pattern are escaped.
fn file_url(path: &Path) -> String {
    let absolute = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    let mut url = String::from("file://");
    for byte in absolute.as_os_str().as_encoded_bytes() {
        match byte {
            b'/' | b'.' | b'-' | b'_' | b'~' | b'=' => url.push(char::from(*byte)),
            b if b.is_ascii_alphanumeric() => url.push(char::from(*b)),
            b => url.push_str(&format!("%{b:02X}")),
        }
    }
    url
}

/// Finds the first line of a JSON file that can't be read; none where every line can.
///
/// Runs only after reading failed: the reader itself knows no lines.
fn json_fault(path: &Path, schema: Option<&SchemaRef>) -> Option<DataError> {
    let file = std::fs::File::open(path).ok()?;
    if files::is_json_array(path).ok()? {
        let parsed =
            serde_json::from_reader::<_, Vec<serde_json::Map<String, serde_json::Value>>>(BufReader::new(file));
        return parsed.err().map(|e| DataError::user(format!("{}:{}: {e}", path.display(), e.line())));
    }
    let mut decoder = schema.and_then(|s| ReaderBuilder::new(s.clone()).build_decoder().ok());
    for (number, line) in BufReader::new(file).split(b'\n').enumerate() {
        let line = line.ok()?;
        if line.trim_ascii().is_empty() {
            continue;
        }
        let reason = match serde_json::from_slice::<serde_json::Map<String, serde_json::Value>>(&line) {
            Err(e) => Some(format!("not a JSON object: {}", short(&e.to_string()))),
            Ok(_) => decoder.as_mut().and_then(|d| {
                let decoded = d.decode(&line).and_then(|_| d.flush());
                decoded.err().map(|e| e.to_string().trim_start_matches("Json error: ").to_owned())
            }),
        };
        if let Some(reason) = reason {
            return Some(DataError::user(format!("{}:{}: {reason}", path.display(), number + 1)));
        }
    }
    None
}

/// serde_json's place is of the one line, so it says `line 1`; the column is worth keeping.
fn short(message: &str) -> String {
    message.replace(" at line 1 column ", " at column ")
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use datafusion::arrow::array::{ArrayRef, AsArray, Int64Array, StringArray};
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
        while let Some(batch) = rows.next().await.unwrap() {
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
        assert_eq!(message, "c.jsonl: column `prompt` is Int64; a prompt is a string or a list of {role, content}");
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
            (spec("ragged.csv"), vec!["ragged.csv: "]),
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
