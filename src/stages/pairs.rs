//! `kind = "pairs"`: from judged answers to the pairs that a trainer learns from.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use datafusion::arrow::array::{Array, ArrayRef, AsArray, Float64Array, StringArray, UInt32Array, new_null_array};
use datafusion::arrow::compute::{cast, take};
use datafusion::arrow::datatypes::{DataType, Field, Float64Type, Schema, SchemaRef};
use datafusion::arrow::error::ArrowError;
use datafusion::arrow::record_batch::RecordBatch;
use futures::future::BoxFuture;
use serde::Deserialize;
use serde_json::json;

use super::client;
use super::columns::{self, PER_ANSWER, SCORES};
use super::rows::{RowError, each_row, groups, join, shared};
use crate::data::batch::type_name;
use crate::engine::{Runnable, Stage, StageContext, StageError};
use crate::flow::kind::{CheckContext, InputKey, ONE_INPUT, Port, RowBound, StageKind, StagePlan};
use crate::flow::{Canonical, FlowError, Form};
use crate::judge::pairs::{self, Choose, Compared, Pick, Scored, Selection, Ties};

/// Rows in flight; nothing waits here.
const WINDOW: usize = 64;

/// What an answer has that its pair has twice: column, name of the chosen one's, of the rejected one's.
const SIDES: [(&str, &str, &str); 5] = [
    ("_candidate", "chosen_candidate", "rejected_candidate"),
    ("generation", "chosen", "rejected"),
    ("generation_ids", "chosen_ids", "rejected_ids"),
    ("finish_reason", "chosen_finish_reason", "rejected_finish_reason"),
    ("score", "chosen_score", "rejected_score"),
];

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Options {
    #[serde(default)]
    choose: Choose,
    #[serde(default)]
    ties: Ties,
    #[serde(default)]
    labels: Labels,
    #[serde(default)]
    min_gap: f64,
    max_pairs: Option<usize>,
    length_control: Option<f64>,
    #[serde(default)]
    require_stop: bool,
    near_duplicates: Option<f64>,
    consistency: Option<String>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Labels {
    #[default]
    Hard,
    Soft,
}

/// What a pairs stage was configured to do, checked.
#[derive(Debug)]
struct Checked {
    selection: Selection,
    /// The column with the scores of another judge, for CREAM's weight.
    consistency: Option<String>,
}

/// The kind `pairs`.
pub struct PairsKind;

impl StageKind for PairsKind {
    fn name(&self) -> &'static str {
        "pairs"
    }

    /// 2: a column whose values differ between the answers to a prompt is null in their pairs.
    fn results(&self) -> u32 {
        2
    }

    fn inputs(&self) -> &'static [InputKey] {
        ONE_INPUT
    }

    fn check<'a>(&'a self, cx: CheckContext<'a>) -> BoxFuture<'a, Result<StagePlan, FlowError>> {
        Box::pin(async move { check(&cx) })
    }
}

impl Runnable for PairsKind {
    fn open(&self, _stage: &str, plan: &StagePlan) -> Result<Box<dyn Stage>, StageError> {
        Ok(Box::new(PairsStage { checked: client::options::<Checked>(plan)? }))
    }
}

fn check(cx: &CheckContext<'_>) -> Result<StagePlan, FlowError> {
    let options: Options = cx.options()?;
    if !(options.min_gap >= 0.0 && options.min_gap.is_finite()) {
        return Err(cx.error("min_gap", "is the least difference of two scores; it is 0 or more"));
    }
    if options.length_control.is_some_and(|rho| !(0.0..0.5).contains(&rho)) {
        return Err(cx
            .error("length_control", "is the share of the range of scores that counts as best, from 0 to below 0.5")
            .help("Meta-Rewarding used 0.32 to 0.4"));
    }
    if options.near_duplicates.is_some_and(|limit| !(limit > 0.0 && limit <= 1.0)) {
        return Err(cx.error("near_duplicates", "is a share of trigrams in common, above 0 and at most 1"));
    }
    if options.max_pairs == Some(0) {
        return Err(cx.error("max_pairs", "is 0, which leaves nothing to train on"));
    }
    if options.length_control.is_some() && options.choose == Choose::All {
        return Err(cx
            .error("length_control", "means nothing to choose = \"all\", which takes every pair")
            .help("leave it out, or use choose = \"best_worst\""));
    }
    let most = if options.choose == Choose::All { usize::MAX } else { 1 };
    let selection = Selection {
        choose: options.choose,
        ties: options.ties,
        soft: options.labels == Labels::Soft,
        min_gap: options.min_gap,
        max_pairs: options.max_pairs.unwrap_or(most),
        length_control: options.length_control,
        require_stop: options.require_stop,
        near_duplicates: options.near_duplicates,
    };
    let input = cx.inputs.first();
    let schema = input.and_then(|i| i.schema.as_ref());
    if let Some(schema) = schema {
        check_columns(cx, schema, options.consistency.as_deref())?;
    }
    let bound = input.and_then(|i| i.rows);
    if schema.is_some_and(|schema| !is_verdicts(schema)) && bound.is_some_and(|rows| rows.each <= 1) {
        return Err(cx
            .error("input", "gives one answer to each prompt, and a pair needs two")
            .help("write candidates = 2 in the sampler, or name several answers to a prompt in the source"));
    }
    let rows = bound.map(|rows| RowBound { each: most_pairs(&selection, rows.each), ..rows });
    Ok(StagePlan {
        outputs: vec![Port { name: String::new(), schema: schema.map(paired_schema), rows }],
        waits_for_round: false,
        new_rows: false,
        models: Vec::new(),
        trains: None,
        fingerprint: Form::table([("selection", selection.form()), ("consistency", options.consistency.form())]),
        notes: Vec::new(),
        options: Arc::new(Checked { selection, consistency: options.consistency }),
    })
}

/// Pairs that `answers` rows of a prompt may give.
fn most_pairs(selection: &Selection, answers: u64) -> u64 {
    let most = match selection.choose {
        Choose::BestWorst => answers / 2,
        Choose::All => answers.saturating_mul(answers.saturating_sub(1)) / 2,
    };
    most.max(1).min(selection.max_pairs as u64)
}

fn is_verdicts(schema: &Schema) -> bool {
    schema.column_with_name("verdict").is_some()
}

fn check_columns(cx: &CheckContext<'_>, schema: &SchemaRef, consistency: Option<&str>) -> Result<(), FlowError> {
    let needed: &[&str] = if is_verdicts(schema) {
        &["prompt", "a", "b", "probability"]
    } else {
        &["prompt", "generation", "score", "_candidate"]
    };
    if let Some(missing) = needed.iter().find(|name| schema.column_with_name(name).is_none()) {
        return Err(cx
            .error("input", format!("has no column {missing:?}"))
            .help("pairs reads the rows of a judge: one an answer with a score, or one a pair with a verdict"));
    }
    if let Ok(score) = schema.field_with_name("score")
        && !is_verdicts(schema)
        && !score.data_type().is_numeric()
    {
        let kind = type_name(score.data_type());
        return Err(cx
            .error("input", format!("column \"score\" is {kind}, not a number"))
            .help("cast it in a mapper or the source"));
    }
    let sides = SIDES.iter().flat_map(|(_, chosen, rejected)| [*chosen, *rejected]).filter(|_| !is_verdicts(schema));
    if let Some(taken) = sides.chain(["gap", "label"]).find(|name| schema.column_with_name(name).is_some()) {
        return Err(cx
            .error("input", format!("already has a column {taken:?}, which pairs adds"))
            .help("leave it out in the source's `select`, or rename it there"));
    }
    match consistency {
        Some(_) if is_verdicts(schema) => Err(cx
            .error("consistency", "compares two rankings of the answers, and verdicts on pairs rank none")
            .help("use a judge with method = \"score\" or \"rule\"")),
        Some(name) if schema.column_with_name(name).is_none() => {
            Err(cx.error("consistency", format!("there is no column {name:?} in the input")))
        }
        _ => Ok(()),
    }
}

/// The prompt's columns, then the pair's.
fn paired_schema(input: &SchemaRef) -> SchemaRef {
    let verdicts = is_verdicts(input);
    let kept = |f: &&Arc<Field>| verdicts || !is_one_answers(f.name());
    let mut fields: Vec<Field> = input.fields().iter().filter(kept).map(|f| f.as_ref().clone()).collect();
    if verdicts {
        // A tie has no winner; here it may be a pair with an even label.
        fields.retain(|f| !matches!(f.name().as_str(), "chosen" | "rejected"));
        fields.extend(["chosen", "rejected"].map(|name| Field::new(name, DataType::Utf8, false)));
    } else {
        fields.push(Field::new("_pair", DataType::UInt32, false));
        for (column, chosen, rejected) in SIDES {
            if let Ok(field) = input.field_with_name(column) {
                fields.extend([chosen, rejected].map(|name| {
                    let nullable = field.is_nullable();
                    Field::new(name, plain(field.data_type()), nullable)
                }));
            }
        }
    }
    fields.extend(["gap", "label"].map(|name| Field::new(name, DataType::Float64, false)));
    Arc::new(Schema::new(fields))
}

/// Whichever string type came in, one goes out.
fn plain(kind: &DataType) -> DataType {
    if matches!(kind, DataType::LargeUtf8 | DataType::Utf8View) { DataType::Utf8 } else { kind.clone() }
}

fn is_one_answers(name: &str) -> bool {
    PER_ANSWER.contains(&name) || SCORES.contains(&name)
}

struct PairsStage {
    checked: Arc<Checked>,
}

impl Stage for PairsStage {
    fn run<'a>(&'a mut self, ctx: &'a mut StageContext) -> BoxFuture<'a, Result<(), StageError>> {
        Box::pin(async move {
            let checked = self.checked.clone();
            let mut tally = Tally::default();
            let prompts = AtomicU64::new(0);
            let work = |_, rows: RecordBatch| {
                prompts.fetch_add(1, Ordering::Relaxed);
                let checked = checked.clone();
                async move { pair_up(&checked, &rows) }
            };
            each_row(ctx, WINDOW, work, |out| tally.count(out)).await?;
            let health = tally.summary(prompts.into_inner());
            let labels = [("stage", ctx.stage.as_str())];
            for (figure, name) in [
                ("pair_yield", "flowrun_judge_pair_yield_ratio"),
                ("mean_gap", "flowrun_judge_gap_mean"),
                ("chosen_characters", "flowrun_judge_chosen_characters"),
                ("rejected_characters", "flowrun_judge_rejected_characters"),
            ] {
                if let Some(value) = health[figure].as_f64() {
                    ctx.metrics.gauge(name, &labels).set(value);
                }
            }
            ctx.summary("health", health.clone());
            ctx.summary("judge", health);
            Ok(())
        })
    }
}

/// The pairs of one source row's answers, of each part by themselves; `None` where there is none.
fn pair_up(checked: &Checked, rows: &RecordBatch) -> Result<Option<RecordBatch>, RowError> {
    let mut made: Vec<RecordBatch> = Vec::new();
    for group in groups(rows)? {
        let first = made.iter().map(RecordBatch::num_rows).sum::<usize>() as u32;
        made.extend(of_group(checked, &group, first)?);
    }
    if made.is_empty() { Ok(None) } else { Ok(Some(join(&made)?)) }
}

/// The pairs of answers to one prompt, numbered from `first` on.
fn of_group(checked: &Checked, rows: &RecordBatch, first: u32) -> Result<Option<RecordBatch>, StageError> {
    if is_verdicts(rows.schema_ref()) {
        return of_verdicts(&checked.selection, rows);
    }
    let consistency = checked.consistency.as_deref();
    let rows = &shared(rows, |name| is_one_answers(name) || consistency == Some(name))?;
    let texts = columns::strings(rows, "generation")?;
    let scores = numbers(rows, "score")?;
    let variances = if rows.column_by_name("score_variance").is_some() {
        numbers(rows, "score_variance")?
    } else {
        vec![0.0; scores.len()]
    };
    let stopped = stopped(rows, "finish_reason")?;
    let answers: Vec<Scored<'_>> = (0..rows.num_rows())
        .map(|i| Scored {
            text: texts.value(i),
            score: scores[i],
            variance: if variances[i].is_finite() { variances[i] } else { 0.0 },
            stopped: stopped[i],
        })
        .collect();
    let mut picks = checked.selection.select(&answers);
    if let Some(column) = &checked.consistency {
        // Two judges of which one ranks nothing agree in nothing that could be measured.
        let agreement = pairs::consistency(&scores, &numbers(rows, column)?).unwrap_or(0.5);
        picks.iter_mut().for_each(|p| p.label = pairs::soften(p.label, agreement));
    }
    if picks.is_empty() { Ok(None) } else { to_batch(rows, &picks, first).map(Some) }
}

/// The rows of a pairwise judge, those that are good enough.
fn of_verdicts(selection: &Selection, rows: &RecordBatch) -> Result<Option<RecordBatch>, StageError> {
    let (a, b) = (columns::strings(rows, "a")?, columns::strings(rows, "b")?);
    let probabilities = numbers(rows, "probability")?;
    let verdicts = columns::strings(rows, "verdict")?;
    let (chosen_ended, rejected_ended) =
        (stopped(rows, "chosen_finish_reason")?, stopped(rows, "rejected_finish_reason")?);
    let of = |text, stopped| Scored { text, score: f64::NAN, variance: 0.0, stopped };
    let made: Vec<_> = (0..rows.num_rows())
        .map(|i| {
            let (first, second, p) = match verdicts.value(i) {
                "b" => (b.value(i), a.value(i), 1.0 - probabilities[i]),
                _ => (a.value(i), b.value(i), probabilities[i]),
            };
            let tie = verdicts.value(i) == "tie";
            let gap = if tie { 0.0 } else { (2.0 * p - 1.0).abs() };
            let (chosen, rejected) = (of(first, chosen_ended[i]), of(second, rejected_ended[i]));
            Compared { chosen, rejected, gap, probability: p, tie }
        })
        .collect();
    let picks = selection.filter(&made);
    if picks.is_empty() {
        return Ok(None);
    }
    let schema = paired_schema(&rows.schema());
    let places = UInt32Array::from_iter_values(picks.iter().map(|p| p.chosen as u32));
    let side = |f: fn(&Compared<'_>) -> String| -> ArrayRef {
        Arc::new(StringArray::from_iter_values(picks.iter().map(|p| f(&made[p.chosen]))))
    };
    let column = |field: &Arc<Field>| match field.name().as_str() {
        "chosen" => Ok(side(|m| m.chosen.text.to_owned())),
        "rejected" => Ok(side(|m| m.rejected.text.to_owned())),
        name => picked_or_made(rows, name, &places, &picks, 0),
    };
    let out = schema.fields().iter().map(column).collect::<Result<Vec<_>, _>>()?;
    RecordBatch::try_new(schema, out).map(Some).map_err(failed)
}

fn picked_or_made(
    rows: &RecordBatch,
    name: &str,
    places: &UInt32Array,
    picks: &[Pick],
    first: u32,
) -> Result<ArrayRef, StageError> {
    match (name, rows.column_by_name(name)) {
        ("gap", _) => Ok(Arc::new(Float64Array::from_iter_values(picks.iter().map(|p| p.gap)))),
        ("label", _) => Ok(Arc::new(Float64Array::from_iter_values(picks.iter().map(|p| p.label)))),
        ("_pair", None) => Ok(Arc::new(UInt32Array::from_iter_values(first..first + picks.len() as u32))),
        (_, Some(column)) => take(column, places, None).map_err(failed),
        (_, None) => Ok(new_null_array(&DataType::Null, picks.len())),
    }
}

/// One row a pair, in [`paired_schema`]'s order; what is of neither answer alone is the chosen one's.
fn to_batch(rows: &RecordBatch, picks: &[Pick], first: u32) -> Result<RecordBatch, StageError> {
    let schema = paired_schema(&rows.schema());
    let chosen = UInt32Array::from_iter_values(picks.iter().map(|p| p.chosen as u32));
    let rejected = UInt32Array::from_iter_values(picks.iter().map(|p| p.rejected as u32));
    let column = |field: &Arc<Field>| {
        let name = field.name().as_str();
        let of_side = SIDES.iter().find_map(|(column, c, r)| match name {
            _ if name == *c => Some((*column, &chosen)),
            _ if name == *r => Some((*column, &rejected)),
            _ => None,
        });
        let Some((column, places)) = of_side else { return picked_or_made(rows, name, &chosen, picks, first) };
        let values = rows.column_by_name(column).ok_or_else(|| StageError::internal(format!("no column {column}")))?;
        cast(values, field.data_type()).and_then(|values| take(&values, places, None)).map_err(failed)
    };
    let out = schema.fields().iter().map(column).collect::<Result<Vec<_>, _>>()?;
    RecordBatch::try_new(schema, out).map_err(failed)
}

fn failed(error: ArrowError) -> StageError {
    StageError::internal(format!("pairs: {error}"))
}

/// A column of numbers; NaN where there is none.
fn numbers(rows: &RecordBatch, name: &str) -> Result<Vec<f64>, StageError> {
    let column = rows
        .column_by_name(name)
        .ok_or_else(|| StageError::user(format!("there is no column {name:?}, which pairs are chosen by")))?;
    let numeric = column.data_type().is_numeric() || *column.data_type() == DataType::Boolean;
    let numbers = cast(column, &DataType::Float64).ok().filter(|_| numeric);
    let numbers = numbers.as_ref().and_then(|c| c.as_primitive_opt::<Float64Type>());
    let numbers = numbers
        .ok_or_else(|| StageError::user(format!("column {name:?} has type {}, not a number", column.data_type())))?;
    Ok(numbers.iter().map(|n| n.unwrap_or(f64::NAN)).collect())
}

/// Whether each answer came to its end; one of unknown end did.
fn stopped(rows: &RecordBatch, name: &str) -> Result<Vec<bool>, StageError> {
    if rows.column_by_name(name).is_none() {
        return Ok(vec![true; rows.num_rows()]);
    }
    let reasons = columns::strings(rows, name)?;
    Ok((0..rows.num_rows()).map(|i| reasons.is_null(i) || reasons.value(i) == "stop").collect())
}

/// What a round's pairs say about its judge.
#[derive(Debug, Default)]
struct Tally {
    prompts: u64,
    pairs: u64,
    gap: f64,
    label: f64,
    characters: [u64; 2],
}

impl Tally {
    fn count(&mut self, out: &RecordBatch) {
        self.prompts += 1;
        self.pairs += out.num_rows() as u64;
        for (name, sum) in [("gap", &mut self.gap), ("label", &mut self.label)] {
            *sum += numbers(out, name).map_or(0.0, |all| all.iter().sum());
        }
        for (name, sum) in ["chosen", "rejected"].into_iter().zip(&mut self.characters) {
            let texts = columns::strings(out, name).unwrap_or_else(|_| StringArray::from(Vec::<&str>::new()));
            *sum += texts.iter().flatten().map(|t| t.chars().count() as u64).sum::<u64>();
        }
    }

    fn summary(&self, prompts: u64) -> serde_json::Value {
        let mean = |sum: f64, of: u64| if of == 0 { json!(null) } else { json!(sum / of as f64) };
        json!({
            "paired": self.pairs,
            "pair_yield": mean(self.prompts as f64, prompts),
            "mean_gap": mean(self.gap, self.pairs),
            "mean_label": mean(self.label, self.pairs),
            "chosen_characters": mean(self.characters[0] as f64, self.pairs),
            "rejected_characters": mean(self.characters[1] as f64, self.pairs),
        })
    }
}
