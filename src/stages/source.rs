//! `source`: the rows of a data set, one shard a round.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use datafusion::arrow::record_batch::RecordBatch;
use futures::future::BoxFuture;
use serde::Deserialize;

use crate::data::candidates::CandidatesOption;
use crate::data::error::Fault;
use crate::data::files::Format;
use crate::data::form::{Reading, RowForm};
use crate::data::shard::{Cut, Geometry, ShardOption};
use crate::data::source::{Read, Refused, Survey};
use crate::data::stored::Stored;
use crate::data::{ColumnType, DataError, Source, SourceSpec};
use crate::engine::context::Shard;
use crate::engine::{Message, Runnable, Stage, StageContext, StageError};
use crate::flow::kind::{Access, InputKey};
use crate::flow::{Canonical, CheckContext, FlowError, Form, Port, RowBound, StageKind, StagePlan};

pub struct SourceKind;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Options {
    dataset: String,
    config: Option<String>,
    split: Option<String>,
    #[serde(default)]
    types: BTreeMap<String, ColumnType>,
    separator: Option<char>,
    #[serde(default)]
    select: toml::Table,
    sql: Option<String>,
    take: Option<u64>,
    form: Option<RowForm>,
    candidates: Option<CandidatesOption>,
    shard: Option<ShardOption>,
}

struct Checked {
    spec: SourceSpec,
    /// As they were at check; none where the hub could not be asked then.
    stored: Option<Stored>,
    base: PathBuf,
    cut: Cut,
}

impl From<DataError> for StageError {
    fn from(e: DataError) -> Self {
        match e.fault {
            Fault::External => Self::external(e.message),
            Fault::User | Fault::Offline => Self::user(e.message),
        }
    }
}

impl From<Geometry> for Shard {
    fn from(g: Geometry) -> Self {
        Self { index: g.index, count: g.count, contiguous: g.contiguous, total: g.total }
    }
}

impl StageKind for SourceKind {
    fn name(&self) -> &'static str {
        "source"
    }

    fn inputs(&self) -> &'static [InputKey] {
        &[]
    }

    fn opens(&self, stage: &crate::flow::StageSpec) -> Vec<(&'static str, Access)> {
        let written = stage.options.get("dataset").and_then(toml::Value::as_str);
        written.map(|path| ("dataset", Access::of_source(path))).into_iter().collect()
    }

    fn check<'a>(&'a self, cx: CheckContext<'a>) -> BoxFuture<'a, Result<StagePlan, FlowError>> {
        Box::pin(check(cx))
    }
}

async fn check(cx: CheckContext<'_>) -> Result<StagePlan, FlowError> {
    let options: Options = cx.options()?;
    let cut = match &options.shard {
        Some(shard) => shard.cut(cx.flow.rounds).map_err(|e| cx.error("shard", e.message))?,
        None => Cut { count: 1, contiguous: false },
    };
    if options.shard.is_some() {
        rounds_fit(&cx, &cut)?;
    }
    let spec = spec(&cx, &options)?;
    let mut notes = Vec::new();
    if matches!(options.shard, Some(ShardOption::Named(_))) {
        notes.push("shard = \"round\": changing rounds recomputes; shard = { count = N } keeps finished rounds".into());
    }
    // Of a hub that can't be asked only what is written is known.
    let (mut stored, mut form) = (None, spec.form.form());
    let (schema, rows, content) = match Source::open(&spec, &cx.flow.base).await {
        Ok(source) => {
            let fault = |e: DataError| cx.error("dataset", e.message);
            let total = source.count().await.map_err(fault)?;
            rows_fit(&cx, &cut, total)?;
            notes.push(rows_note(&cut, total));
            notes.extend(source.revision().map(|commit| format!("revision {commit}")));
            notes.extend(files_notes(source.stored()));
            notes.extend(source.conversion().told().map(str::to_owned));
            form = source.conversion().reading().map(Reading::canonical).unwrap_or_default();
            let survey = source.survey().await.map_err(fault)?;
            notes.extend(refused_note(&cx, &options, &survey, total, &cut)?);
            if survey.rows > survey.refused && !survey.answered {
                notes.push(format!(
                    "none of the first {} conversations ends with an answer: `completion` is null",
                    survey.rows
                ));
            }
            let each = survey.each.unwrap_or(1);
            stored = Some(source.stored().clone());
            let shard = Geometry { index: 0, count: cut.count, contiguous: cut.contiguous, total };
            (
                Some(source.schema().clone()),
                Some(RowBound { each, ..RowBound::of_source(shard.rows()) }),
                source.content().map_err(fault)?,
            )
        }
        Err(e) if e.fault != Fault::User && spec.dataset.starts_with("hf://") => {
            notes.push(e.message);
            (None, None, spec.dataset.clone())
        }
        Err(e) => {
            let key = key_of(&spec, &e);
            let message = e.message.strip_prefix(&format!("{key}: ")).unwrap_or(&e.message);
            return Err(cx.error(key, message));
        }
    };
    let fingerprint = Form::table([
        ("content", content.form()),
        ("format", stored.as_ref().map(|stored| stored.format.to_string()).form()),
        ("config", spec.config.form()),
        ("split", spec.split.form()),
        ("types", spec.types.form()),
        ("separator", separator(&spec, stored.as_ref()).map(String::from).form()),
        ("select", spec.select.form()),
        ("sql", spec.sql.form()),
        ("take", spec.take.form()),
        ("form", form),
        ("candidates", spec.candidates.form()),
        ("shard", cut.form()),
    ]);
    Ok(StagePlan {
        outputs: vec![Port { name: String::new(), schema, rows }],
        waits_for_round: false,
        new_rows: false,
        models: Vec::new(),
        trains: None,
        fingerprint,
        notes,
        options: Arc::new(Checked { spec, stored, base: cx.flow.base.clone(), cut }),
    })
}

/// The separator, where it is not that of the format.
fn separator(spec: &SourceSpec, stored: Option<&Stored>) -> Option<char> {
    let own = stored.map(|stored| if stored.format == Format::Tsv { '\t' } else { ',' });
    spec.separator.filter(|separator| own != Some(*separator))
}

/// A note of rows that will be dead letters.
///
/// # Errors
/// No row can be read in its form.
fn refused_note(
    cx: &CheckContext<'_>,
    options: &Options,
    survey: &Survey,
    total: u64,
    cut: &Cut,
) -> Result<Option<String>, FlowError> {
    if let Some(column) = survey.turns_as_text.as_ref().filter(|_| options.form != Some(RowForm::None)) {
        let message = format!("column `{column}` is text, and its first value is a list of turns written as text");
        return Err(cx
            .error("dataset", message)
            .help("write turns as lists, in JSON lines or Parquet; form = \"none\" takes the text as it is"));
    }
    let Survey { rows, refused, .. } = *survey;
    let Some(reason) = survey.reason.as_ref().filter(|_| refused > 0) else { return Ok(None) };
    let key = if options.candidates.is_some() { "candidates" } else { "dataset" };
    if refused == rows {
        let message = format!("none of the first {rows} rows can be read: {reason}");
        let error = cx.error(key, message);
        return Err(if key == "dataset" { error.help("form = \"none\" takes the columns as they are") } else { error });
    }
    let most = cx.flow.max_dead_letters;
    let told = format!("{refused} of the first {rows} rows can't be read, such as: {reason}");
    // Of all rows in one shard, the end of the run is known.
    if rows == total && cut.count == 1 && refused as f64 > most * total as f64 {
        let help = format!("max_dead_letters = {most} allows fewer; leave such rows out in sql, or raise it");
        return Err(cx.error(key, told).help(help));
    }
    Ok(Some(format!("{told} (max_dead_letters = {most})")))
}

/// Notes of the files that are read, and of those beside them that are not.
fn files_notes(stored: &Stored) -> Vec<String> {
    let shown = |names: &[String]| {
        let more = names.len().saturating_sub(3);
        let first = names.iter().take(3).cloned().collect::<Vec<_>>().join(", ");
        if more == 0 { first } else { format!("{first} and {more} more") }
    };
    let name = |file: &PathBuf| file.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let mut notes = vec![format!("reads {}", shown(&stored.files.iter().map(name).collect::<Vec<_>>()))];
    if !stored.beside.is_empty() {
        notes.push(format!("does not read {}", shown(&stored.beside)));
    }
    if !stored.left_out().is_empty() {
        notes.push(format!("leaves out {}: always an object without keys", shown(stored.left_out())));
    }
    notes
}

fn spec(cx: &CheckContext<'_>, options: &Options) -> Result<SourceSpec, FlowError> {
    let mut select = Vec::with_capacity(options.select.len());
    for (name, value) in &options.select {
        let Some(expr) = value.as_str() else {
            return Err(cx.error(&format!("select.{name}"), "an expression is a string, such as \"question\""));
        };
        select.push((name.clone(), expr.to_owned()));
    }
    if options.take == Some(0) {
        return Err(cx.error("take", "must be at least 1; leave it out for all rows"));
    }
    Ok(SourceSpec {
        dataset: options.dataset.clone(),
        config: options.config.clone(),
        split: options.split.clone(),
        types: options.types.clone(),
        separator: options.separator,
        select,
        sql: options.sql.clone(),
        take: options.take,
        form: options.form,
        candidates: options.candidates.clone(),
        login: cx.flow.hub,
    })
}

/// The key an error is about: that of the query where its message begins with it.
fn key_of(spec: &SourceSpec, e: &DataError) -> &'static str {
    match (&spec.sql, e.message.split([':', '.']).next()) {
        (_, Some("types")) => "types",
        (_, Some("separator")) => "separator",
        (_, Some("form")) => "form",
        (_, Some("candidates")) => "candidates",
        (Some(_), Some("sql")) => "sql",
        (_, Some("select")) => "select",
        _ => "dataset",
    }
}

fn rounds_fit(cx: &CheckContext<'_>, cut: &Cut) -> Result<(), FlowError> {
    let last = match &cx.stage.in_rounds {
        Some(rounds) => rounds.iter().copied().max().unwrap_or(1),
        None => cx.flow.rounds,
    };
    if u64::from(last) > cut.count {
        let message = format!("round {last} has no shard: there are {}", cut.count);
        return Err(cx
            .error("shard", message)
            .help(format!("set shard = {{ count = {last} }}, or rounds = {}", cut.count)));
    }
    Ok(())
}

fn rows_fit(cx: &CheckContext<'_>, cut: &Cut, total: u64) -> Result<(), FlowError> {
    if total < cut.count {
        return Err(cx.error("shard", format!("{total} rows can't be cut into {} shards", cut.count)));
    }
    Ok(())
}

fn rows_note(cut: &Cut, total: u64) -> String {
    let rows = Geometry { index: 0, count: cut.count, contiguous: cut.contiguous, total }.rows();
    let how = if cut.contiguous { "contiguous" } else { "strided" };
    match cut.count {
        1 => format!("{total} rows a round"),
        n => format!("{rows} rows a round ({total} in {n} {how} shards)"),
    }
}

impl Runnable for SourceKind {
    fn open(&self, stage: &str, plan: &StagePlan) -> Result<Box<dyn Stage>, StageError> {
        let checked = plan.options.clone().downcast::<Checked>();
        let checked =
            checked.map_err(|_| StageError::internal(format!("{stage}: opened with another kind's options")))?;
        Ok(Box::new(SourceStage { checked }))
    }
}

/// Returns whether a plan is that of a source.
pub fn is_source(plan: &StagePlan) -> bool {
    plan.options.is::<Checked>()
}

/// The first rows of a planned source, `most` or a batch more; `None` if they can't be read.
pub async fn first_rows(plan: &StagePlan, most: usize) -> Option<Vec<RecordBatch>> {
    let checked = plan.options.downcast_ref::<Checked>()?;
    let source = Source::of(checked.stored.clone()?, &checked.spec).await.ok()?;
    let total = source.count().await.ok()?;
    let mut rows = source.rows(Geometry { index: 0, count: 1, contiguous: false, total }).await.ok()?;
    let mut read = Vec::new();
    while read.iter().map(RecordBatch::num_rows).sum::<usize>() < most {
        let Some(next) = rows.next().await.ok()? else { break };
        read.push(next.batch);
    }
    Some(read)
}

struct SourceStage {
    checked: Arc<Checked>,
}

impl Stage for SourceStage {
    fn run<'a>(&'a mut self, ctx: &'a mut StageContext) -> BoxFuture<'a, Result<(), StageError>> {
        Box::pin(run(&self.checked, ctx))
    }
}

async fn run(checked: &Checked, ctx: &mut StageContext) -> Result<(), StageError> {
    let source = match &checked.stored {
        Some(stored) => Source::of(stored.clone(), &checked.spec).await?,
        None => Source::open(&checked.spec, &checked.base).await?,
    };
    let cut = &checked.cut;
    let index = if cut.count == 1 { 0 } else { u64::from(ctx.round.saturating_sub(1)) };
    let shard = Geometry { index, count: cut.count, contiguous: cut.contiguous, total: source.count().await? };
    if shard.rows() == 0 || index >= cut.count {
        return Err(StageError::user(format!(
            "{}: round {} has no shard of {} rows in {}",
            ctx.stage, ctx.round, shard.total, cut.count
        )));
    }
    ctx.set_shard(shard.into());
    let mut rows = source.rows(shard).await?;
    while let Some(Read { batch, mut completes, refused }) = rows.next().await? {
        let watermark = completes.last().map_or(0, |row| row + 1);
        for Refused { row, reason, input } in &refused {
            ctx.dead_letter(*row, reason, input).await?;
        }
        completes.retain(|row| refused.iter().all(|refused| refused.row != *row));
        ctx.output.send("", Message { batch: Some(batch), completes, watermark }).await?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::path::Path;

    use super::*;
    use crate::flow::{Flow, StageSpec};

    async fn checked(base: &Path, rounds: u32, options: &str) -> Result<StagePlan, FlowError> {
        let stage = StageSpec {
            name: "prompts".into(),
            kind: "source".into(),
            inputs: Vec::new(),
            in_rounds: None,
            table: true,
            options: toml::from_str(options).unwrap(),
        };
        let flow = Flow { name: "test".into(), rounds, base: base.to_owned(), ..Flow::default() };
        SourceKind.check(CheckContext { flow: &flow, stage: &stage, inputs: &[], trainers: &BTreeMap::new() }).await
    }

    #[tokio::test]
    async fn a_check_says_rows_and_refuses_what_does_not_fit() {
        let dir = tempfile::tempdir().unwrap();
        let lines: String = (0..100).map(|i| format!("{{\"question\": \"q {i}\"}}\n")).collect();
        std::fs::write(dir.path().join("p.jsonl"), lines).unwrap();
        let select = "dataset = \"p.jsonl\"\nselect = { prompt = \"question\" }\n";

        let plan = checked(dir.path(), 3, &format!("{select}take = 10\nshard = {{ count = 3 }}")).await.unwrap();
        assert_eq!(plan.notes, ["4 rows a round (10 in 3 strided shards)", "reads p.jsonl"]);
        let columns = plan.outputs[0].schema.as_ref().unwrap();
        assert_eq!(columns.fields().iter().map(|f| f.name().as_str()).collect::<Vec<_>>(), ["prompt", "_row"]);

        for (rounds, more, key, message) in [
            (4, "shard = { count = 3 }", "stages.prompts.shard", "round 4 has no shard"),
            (3, "take = 2\nshard = \"round\"", "stages.prompts.shard", "2 rows can't be cut into 3 shards"),
            (1, "shard = \"rounds\"", "stages.prompts.shard", "say \"round\""),
            (1, "shard = { cont = 3 }", "stages.prompts", "shard is \"round\" or a table such as"),
            (1, "take = 0", "stages.prompts.take", "at least 1"),
        ] {
            let error = checked(dir.path(), rounds, &format!("{select}{more}")).await.unwrap_err();
            assert!(error.key.starts_with(key) && error.message.contains(message), "{error}");
        }
        let error = checked(dir.path(), 1, "dataset = \"p.jsonl\"\nsql = \"SELECT q FROM dataset\"").await.unwrap_err();
        assert!(error.key == "stages.prompts.sql" && error.message.contains("there is no column `q`"), "{error}");
    }

    #[tokio::test]
    async fn the_fingerprint_follows_the_content() {
        let dir = tempfile::tempdir().unwrap();
        let fingerprint = async |text: &str| {
            std::fs::write(dir.path().join("p.jsonl"), text).unwrap();
            checked(dir.path(), 1, "dataset = \"p.jsonl\"").await.unwrap().fingerprint
        };
        let first = fingerprint("{\"prompt\": \"a\"}\n").await;
        assert_eq!(first, fingerprint("{\"prompt\": \"a\"}\n").await);
        assert_ne!(first, fingerprint("{\"prompt\": \"b\"}\n").await);
    }
}
