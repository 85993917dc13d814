//! `kind = "judge"`: which answers are better.

mod health;
mod labelled;
mod pairwise;
mod panel;
pub(super) mod rule;
mod score;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use datafusion::arrow::datatypes::{DataType, SchemaRef};
use datafusion::arrow::record_batch::RecordBatch;
use futures::future::{BoxFuture, try_join_all};
use serde::Deserialize;

use self::health::Health;
use self::labelled::Labelled;
pub(super) use self::pairwise::Coins;
use self::pairwise::Pairwise;
pub(super) use self::panel::Panel;
use self::score::{Scoring, Written};
use super::client;
use super::columns::SCORES;
use super::rows::{RowError, each_row_with, groups, join};
use crate::canonical_names;
use crate::data::batch::{self, ROW};
use crate::data::candidates::{Candidates, CandidatesOption};
use crate::engine::{Runnable, Stage, StageContext, StageError};
use crate::flow::device::Devices;
use crate::flow::kind::{Access, CheckContext, InputKey, ModelUse, ONE_INPUT, Port, RowBound, StageKind, StagePlan};
use crate::flow::{Canonical, FlowError, Form, StageSpec};
use crate::judge::pairwise::{Combine, FENCED, Order, PairwisePrompt, Reader, TEMPLATE, count};
use crate::judge::score::{RUBRIC, RUBRIC_LOGITS, Scale};
use crate::llm::{Models, Sampling};

/// Rows judged at once, counted from the oldest unfinished one.
const WINDOW: usize = 32;

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct Options {
    model: Option<OneOrMany>,
    #[serde(default)]
    device: Devices,
    adapter: Option<String>,
    #[serde(default)]
    method: Method,
    read: Option<Read>,
    order: Option<Order>,
    prompt: Option<String>,
    #[serde(default, deserialize_with = "two")]
    labels: Option<[String; 2]>,
    parse: Option<String>,
    #[serde(default, deserialize_with = "two")]
    scale: Option<[i64; 2]>,
    rule: Option<String>,
    combine: Option<Combine>,
    min_gap: Option<f64>,
    compare: Option<Compare>,
    unreadable: Option<Unreadable>,
    samples: Option<u32>,
    temperature: Option<f64>,
    top_p: Option<f64>,
    max_new_tokens: Option<usize>,
    labelled: Option<String>,
    candidates: Option<Vec<String>>,
}

/// One model or several.
#[derive(Debug, Clone, Deserialize)]
#[serde(untagged, expecting = "model is a name or a list of names")]
enum OneOrMany {
    One(String),
    Many(Vec<String>),
}

impl OneOrMany {
    fn names(&self) -> &[String] {
        match self {
            Self::One(name) => std::slice::from_ref(name),
            Self::Many(names) => names,
        }
    }
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Method {
    /// Two answers side by side.
    #[default]
    Pairwise,
    /// Every answer by itself.
    Score,
    /// An expression over the row.
    Rule,
}

/// Where the verdict is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Read {
    /// In the probabilities of the labels or scores: no decode, never unreadable.
    Logits,
    /// In the text the judge writes.
    Text,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Compare {
    #[default]
    Adjacent,
    All,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Unreadable {
    #[default]
    Tie,
    Coin,
}

/// Exactly two values; serde takes the first two of more without a word.
fn two<'de, T: Deserialize<'de>, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Option<[T; 2]>, D::Error> {
    let values = Vec::deserialize(deserializer)?;
    let count = values.len();
    let two = values.try_into().map_err(|_| serde::de::Error::custom(format!("has {count} values; it takes two")))?;
    Ok(Some(two))
}

canonical_names!(Method { Pairwise = "pairwise", Score = "score", Rule = "rule" });

canonical_names!(Read { Logits = "logits", Text = "text" });

/// What a judge was configured to do, checked.
pub(super) struct Judging {
    pub method: Asking,
    /// Who is asked; nobody by a rule.
    pub models: Vec<ModelUse>,
    /// What decides the verdicts, beside the models.
    pub fingerprint: Form,
    /// The columns of judged rows.
    schema: Option<SchemaRef>,
    /// What it is measured on in every round.
    labelled: Option<Labelled>,
    /// The columns that are the answers, where each has a column of its own.
    candidates: Option<Candidates>,
}

pub(super) enum Asking {
    Pairwise(Box<Pairwise>),
    Score(Scoring),
    Rule(String),
}

impl Judging {
    /// From the keys of a judge, over rows of these columns.
    pub async fn check(cx: &CheckContext<'_>, input: Option<&SchemaRef>) -> Result<Self, FlowError> {
        let options: Options = cx.options()?;
        refuse_of_other_methods(cx, &options)?;
        let models = members(cx, &options)?;
        let (method, fingerprint) = match options.method {
            Method::Pairwise => pairwise_method(cx, &options)?,
            Method::Score => score_method(cx, &options)?,
            Method::Rule => rule_method(cx, &options)?,
        };
        let columns = options.candidates.clone().map(CandidatesOption::Columns);
        let candidates = match (&columns, input) {
            (Some(how), Some(input)) => {
                let found = Candidates::of(how, &batch::without(input, ROW));
                Some(found.map_err(|e| cx.error("candidates", e.message.trim_start_matches("candidates: ")))?)
            }
            _ => None,
        };
        let answers = candidates.as_ref().map(|found| batch::schema_with(found.schema(), ROW, DataType::UInt64));
        let schema = match answers.as_ref().or(input) {
            None => None,
            Some(input) => Some(out_schema(cx, &method, input).await?),
        };
        let fingerprint = match &columns {
            None => fingerprint,
            Some(columns) => fingerprint.with("candidates", columns.form()),
        };
        let labelled = match &options.labelled {
            None => None,
            Some(_) if options.order == Some(Order::DataDreamer) => {
                return Err(cx
                    .error(
                        "labelled",
                        "can't be asked with order = \"datadreamer\", whose coins are of the round's rows",
                    )
                    .help("use order = \"random\" or \"both\""));
            }
            Some(file) => {
                let checked = Labelled::check(file, cx.flow, &method).await;
                Some(checked.map_err(|message| cx.error("labelled", message))?)
            }
        };
        Ok(Self { method, models, fingerprint, schema, labelled, candidates })
    }
}

impl Judging {
    /// Judges one source row's answers, those of each part by themselves.
    async fn judge(
        &self,
        panel: &Panel,
        coins: &Coins,
        row: u64,
        rows: &RecordBatch,
    ) -> Result<Option<RecordBatch>, RowError> {
        let groups = groups(&self.answers(rows)?)?;
        // Pairs and answers are numbered over all parts: their numbers name the streams that judges draw from.
        let number = |group: &RecordBatch| match &self.method {
            Asking::Pairwise(pairwise) => count(group.num_rows() as u64, pairwise.all_pairs) as u32,
            _ => group.num_rows() as u32,
        };
        let first = groups.iter().scan(0, |next, group| Some(std::mem::replace(next, *next + number(group))));
        let asked = groups.iter().zip(first).map(|(group, first)| async move {
            match &self.method {
                Asking::Pairwise(pairwise) => pairwise.judge(panel, coins, row, first, group).await,
                Asking::Score(scoring) => scoring.judge(panel, row, first, group).await.map(Some),
                // Answered without a panel.
                Asking::Rule(_) => Ok(None),
            }
        });
        let judged: Vec<_> = try_join_all(asked).await?.into_iter().flatten().collect();
        if judged.is_empty() { Ok(None) } else { Ok(Some(join(&judged)?)) }
    }
}

impl Judging {
    /// One row an answer.
    fn answers(&self, rows: &RecordBatch) -> Result<RecordBatch, RowError> {
        let Some(candidates) = &self.candidates else { return Ok(rows.clone()) };
        let (answers, faults) = candidates.explode(rows).map_err(StageError::from)?;
        match faults.into_iter().flatten().next() {
            Some(fault) => Err(RowError::DeadLetter(fault)),
            None => Ok(answers),
        }
    }
}

/// The kind `judge`.
pub struct JudgeKind {
    pub models: Arc<Models>,
}

impl StageKind for JudgeKind {
    fn name(&self) -> &'static str {
        "judge"
    }

    /// 2: why a verdict in text ended stands beside it. 3: a verdict in text is read by a closed grammar. 4:
    /// labels have the tokens that they have behind the question, and answers end where the chat template ends a turn.
    fn results(&self) -> u32 {
        4
    }

    fn inputs(&self) -> &'static [InputKey] {
        ONE_INPUT
    }

    fn opens(&self, stage: &StageSpec) -> Vec<(&'static str, Access)> {
        let written = stage.options.get("labelled").and_then(toml::Value::as_str);
        written.map(|file| ("labelled", Access::of_source(file))).into_iter().collect()
    }

    fn check<'a>(&'a self, cx: CheckContext<'a>) -> BoxFuture<'a, Result<StagePlan, FlowError>> {
        Box::pin(check(cx))
    }
}

impl Runnable for JudgeKind {
    fn open(&self, _stage: &str, plan: &StagePlan) -> Result<Box<dyn Stage>, StageError> {
        let checked = client::options::<Judging>(plan)?;
        Ok(Box::new(JudgeStage { models: self.models.clone(), checked }))
    }
}

async fn check(cx: CheckContext<'_>) -> Result<StagePlan, FlowError> {
    let judging = Judging::check(&cx, cx.inputs.first().and_then(|i| i.schema.as_ref())).await?;
    let answers = judging.candidates.as_ref().and_then(Candidates::each);
    let answered = |rows: RowBound| RowBound { each: rows.each * answers.unwrap_or(1), ..rows };
    let each = |rows: RowBound| match &judging.method {
        Asking::Pairwise(pairwise) => RowBound { each: count(rows.each, pairwise.all_pairs), ..rows },
        _ => rows,
    };
    let notes = match &judging.method {
        Asking::Pairwise(_) if judging.candidates.is_none() => candidates_to_compare(&cx)?,
        _ => Vec::new(),
    };
    let rows = cx.inputs.first().and_then(|i| i.rows).map(answered).map(each);
    Ok(StagePlan {
        outputs: vec![Port { name: String::new(), schema: judging.schema.clone(), rows }],
        waits_for_round: false,
        new_rows: false,
        models: judging.models.clone(),
        trains: None,
        // The labelled set decides no row, and so is not in the key of recorded rows.
        fingerprint: match &judging.labelled {
            None => judging.fingerprint.clone(),
            Some(labelled) => judging.fingerprint.clone().with("labelled", labelled.content.form()),
        },
        notes,
        options: Arc::new(judging),
    })
}

/// A note where the answers of a prompt will be equal.
///
/// # Errors
/// There is one answer a prompt.
fn candidates_to_compare(cx: &CheckContext<'_>) -> Result<Vec<String>, FlowError> {
    let Some(input) = cx.inputs.first() else { return Ok(Vec::new()) };
    let sampler = sampler_of(cx);
    let number = |key: &str| sampler.and_then(|s| s.options.get(key)).and_then(toml::Value::as_integer);
    let name = sampler.map_or(input.from.stage.as_str(), |sampler| sampler.name.as_str());
    // Where the rows can't be known yet, what the sampler says is.
    if input.rows.map_or(number("candidates") == Some(1), |rows| rows.each <= 1) {
        return Err(cx
            .error("input", format!("`{name}` gives one answer to each prompt, and a pairwise judge compares two"))
            .help(match sampler {
                Some(_) => format!("write candidates = 2 in stages.{name}, or judge with method = \"score\""),
                None => "name the answers in the source, as candidates = { by = \"prompt\" }, or judge with method = \"score\"".into(),
            }));
    }
    let temperature = sampler.and_then(|s| s.options.get("temperature"));
    let greedy = temperature.is_some_and(|t| t.as_float() == Some(0.0) || t.as_integer() == Some(0));
    let equal = format!(
        "the answers to compare will be equal, and every pair a tie: temperature = 0 in stages.{name}; give it a \
         temperature"
    );
    Ok(if greedy { vec![equal] } else { Vec::new() })
}

/// The sampler whose answers are judged, where stages between them only change columns.
fn sampler_of<'a>(cx: &CheckContext<'a>) -> Option<&'a StageSpec> {
    let mut stage = cx.stage;
    for _ in 0..cx.flow.stages.len() {
        let [(_, input)] = stage.inputs.as_slice() else { return None };
        stage = cx.flow.stage(&input.stage)?;
        match stage.kind.as_str() {
            "sampler" => return Some(stage),
            "mapper" | "process" | "split" => {}
            _ => return None,
        }
    }
    None
}

/// Keys that mean something to another method only.
fn refuse_of_other_methods(cx: &CheckContext<'_>, options: &Options) -> Result<(), FlowError> {
    let method = options.method;
    let asks = method != Method::Rule;
    let keys = [
        ("model", options.model.is_some(), asks),
        ("adapter", options.adapter.is_some(), asks),
        ("read", options.read.is_some(), asks),
        ("prompt", options.prompt.is_some(), asks),
        ("parse", options.parse.is_some(), asks),
        ("temperature", options.temperature.is_some(), asks),
        ("top_p", options.top_p.is_some(), asks),
        ("max_new_tokens", options.max_new_tokens.is_some(), asks),
        ("combine", options.combine.is_some(), asks),
        ("order", options.order.is_some(), method == Method::Pairwise),
        ("labels", options.labels.is_some(), method == Method::Pairwise),
        ("compare", options.compare.is_some(), method == Method::Pairwise),
        ("min_gap", options.min_gap.is_some(), method == Method::Pairwise),
        ("unreadable", options.unreadable.is_some(), method == Method::Pairwise),
        ("samples", options.samples.is_some(), method == Method::Score),
        ("scale", options.scale.is_some(), method == Method::Score),
        ("labelled", options.labelled.is_some(), asks),
        ("rule", options.rule.is_some(), method == Method::Rule),
        ("candidates", options.candidates.is_some(), asks),
    ];
    match keys.iter().find(|(_, set, known)| *set && !known) {
        None => Ok(()),
        Some((key, ..)) => {
            let name = format!("{method:?}").to_lowercase();
            Err(cx.error(key, format!("means nothing to method = \"{name}\"")).help("leave it out"))
        }
    }
}

/// The models that are asked, each with its adapter.
fn members(cx: &CheckContext<'_>, options: &Options) -> Result<Vec<ModelUse>, FlowError> {
    if options.method == Method::Rule {
        return Ok(Vec::new());
    }
    let names = options.model.as_ref().map_or(&[][..], OneOrMany::names);
    if names.is_empty() {
        let known: Vec<&str> = cx.flow.models.keys().map(String::as_str).collect();
        let help = format!("write model = \"NAME\"; this flow's models are {}", known.join(", "));
        return Err(cx.error("model", "is missing: somebody has to be asked").help(help));
    }
    let member = |name: &String| client::model_use(cx, name, &options.device, options.adapter.as_deref());
    names.iter().map(member).collect()
}

fn pairwise_method(cx: &CheckContext<'_>, options: &Options) -> Result<(Asking, Form), FlowError> {
    let read = options.read.unwrap_or(Read::Logits);
    refuse_of_logits(cx, options, read)?;
    let default = if read == Read::Logits { TEMPLATE } else { FENCED };
    // In one order a small model's label probabilities tell the slot, not the answer.
    let order = options.order.unwrap_or(if read == Read::Logits { Order::Both } else { Order::Random });
    let reader = if order == Order::DataDreamer { Reader::DataDreamer } else { Reader::Words };
    let (labels, parse) = (options.labels.clone(), options.parse.as_deref());
    let prompt = PairwisePrompt::new(options.prompt.clone(), default, labels, parse, reader)
        .map_err(|(key, message)| cx.error(key, message))?;
    let min_gap = options.min_gap.unwrap_or(0.0);
    if !(min_gap >= 0.0 && min_gap.is_finite()) {
        return Err(cx.error("min_gap", "is the log-odds within which a pair is a tie; it is 0 or more"));
    }
    let all_pairs = options.compare.unwrap_or_default() == Compare::All;
    let coin = options.unreadable.unwrap_or_default() == Unreadable::Coin;
    let written = (read == Read::Text).then(|| sampling(cx, options, 8, 0.0)).transpose()?;
    let combine = options.combine.unwrap_or(if read == Read::Logits { Combine::Mean } else { Combine::Majority });
    let fingerprint = Form::table([
        ("method", options.method.form()),
        ("read", read.form()),
        ("order", order.form()),
        ("prompt", prompt.template().form()),
        ("labels", prompt.labels().form()),
        ("parse", prompt.pattern().form()),
        ("min_gap", min_gap.form()),
        ("all_pairs", all_pairs.form()),
        ("coin", coin.form()),
        ("combine", combine.form()),
        ("sampling", written.form()),
    ]);
    let pairwise = Pairwise { prompt, written, order, combine, min_gap, all_pairs, coin };
    Ok((Asking::Pairwise(Box::new(pairwise)), fingerprint))
}

fn score_method(cx: &CheckContext<'_>, options: &Options) -> Result<(Asking, Form), FlowError> {
    let read = options.read.unwrap_or(Read::Text);
    refuse_of_logits(cx, options, read)?;
    if options.combine == Some(Combine::Majority) {
        return Err(cx.error("combine", "is for verdicts; the scores of several judges are averaged"));
    }
    let default = if read == Read::Text { RUBRIC } else { RUBRIC_LOGITS };
    let range = options.scale.unwrap_or([0, 5]);
    let scale = Scale::new(options.prompt.clone(), default, options.parse.clone(), range)
        .map_err(|(key, message)| cx.error(key, message))?;
    let samples = options.samples.unwrap_or(1);
    if !(1..=64).contains(&samples) {
        return Err(cx.error("samples", format!("is {samples}; it is from 1 to 64")));
    }
    let written = match read {
        Read::Logits if samples > 1 => {
            return Err(cx
                .error("samples", "has no effect with read = \"logits\", which reads every score's probability")
                .help("leave it out, or use read = \"text\""));
        }
        Read::Logits => None,
        Read::Text => {
            let sampling = sampling(cx, options, 256, if samples > 1 { 1.0 } else { 0.0 })?;
            if samples > 1 && sampling.temperature == 0.0 {
                return Err(cx
                    .error("temperature", "is 0, and so all samples would be equal")
                    .help("give it a temperature, or leave `samples` out"));
            }
            Some(Written { samples, sampling })
        }
    };
    let fingerprint = Form::table([
        ("method", options.method.form()),
        ("read", read.form()),
        ("prompt", scale.template().form()),
        ("parse", scale.pattern().form()),
        ("scale", scale.range().form()),
        ("samples", samples.form()),
        ("sampling", written.as_ref().map(|written| &written.sampling).form()),
    ]);
    Ok((Asking::Score(Scoring { scale, written }), fingerprint))
}

fn rule_method(cx: &CheckContext<'_>, options: &Options) -> Result<(Asking, Form), FlowError> {
    let Some(rule) = options.rule.clone().filter(|rule| !rule.trim().is_empty()) else {
        return Err(cx
            .error("rule", "is missing: the expression over a row that is its score")
            .help("rule = \"trim(generation) = answer\""));
    };
    let fingerprint = Form::table([("method", options.method.form()), ("rule", rule.form())]);
    Ok((Asking::Rule(rule), fingerprint))
}

/// Keys that say how a judge writes mean nothing to one that doesn't.
fn refuse_of_logits(cx: &CheckContext<'_>, options: &Options, read: Read) -> Result<(), FlowError> {
    let keys = [
        ("max_new_tokens", options.max_new_tokens.is_some()),
        ("temperature", options.temperature.is_some()),
        ("top_p", options.top_p.is_some()),
        ("parse", options.parse.is_some()),
    ];
    for name in options.model.iter().flat_map(OneOrMany::names) {
        if read == Read::Logits {
            client::refuse_endpoint(cx, name, "read", "tells no probabilities; use read = \"text\"")?;
        }
    }
    match keys.iter().find(|(_, set)| *set && read == Read::Logits) {
        None => Ok(()),
        Some((key, _)) => Err(cx
            .error(key, "has no effect with read = \"logits\", which decodes nothing")
            .help("leave it out, or use read = \"text\"")),
    }
}

fn sampling(cx: &CheckContext<'_>, options: &Options, tokens: usize, warm: f64) -> Result<Sampling, FlowError> {
    let (temperature, top_p) = (options.temperature.unwrap_or(warm), options.top_p.unwrap_or(1.0));
    if !(temperature >= 0.0 && temperature.is_finite()) {
        return Err(cx.error("temperature", format!("is {temperature}; it has to be 0 (greedy) or more")));
    }
    if !(top_p > 0.0 && top_p <= 1.0) {
        return Err(cx.error("top_p", format!("is {top_p}; it has to be above 0 and at most 1")));
    }
    let max_new_tokens = options.max_new_tokens.unwrap_or(tokens);
    if max_new_tokens == 0 {
        return Err(cx.error("max_new_tokens", "is 0; a judge that says nothing can't be read"));
    }
    Ok(Sampling { temperature, top_p, ..Sampling::greedy(max_new_tokens) })
}

async fn out_schema(cx: &CheckContext<'_>, method: &Asking, input: &SchemaRef) -> Result<SchemaRef, FlowError> {
    let needed: &[&str] = match method {
        Asking::Rule(_) => &[],
        _ => &["prompt", "generation", "_candidate"],
    };
    if let Some(missing) = needed.iter().find(|name| input.column_with_name(name).is_none()) {
        let there = batch::visible(input).join(", ");
        let error = cx.error("input", format!("has no column {missing:?}; its columns are {there}"));
        return Err(error.help(match *missing {
            "prompt" => "name one of them prompt in the source: select = { prompt = \"COLUMN\", ... }, which keeps only what it names",
            _ => {
                "a judge reads the rows of a sampler; answers that exist already are named by candidates: a list column, \
                 [\"a\", \"b\"] or { by = \"prompt\" } in the source, or candidates = [\"a\", \"b\"] here"
            }
        }));
    }
    let added: &[&str] = match method {
        Asking::Pairwise(_) => &pairwise::ADDED,
        _ => &SCORES,
    };
    if let Some(taken) = added.iter().find(|name| input.column_with_name(name).is_some()) {
        return Err(cx
            .error("input", format!("already has a column {taken:?}, which the judge adds"))
            .help("leave it out in the source's `select`, or rename it there"));
    }
    match method {
        Asking::Pairwise(_) => Ok(pairwise::judged_schema(input)),
        Asking::Score(_) => Ok(score::scored_schema(input)),
        Asking::Rule(rule) => {
            let query = rule::plan(rule, input.clone()).await.map_err(|e| cx.error("rule", e.message))?;
            Ok(query.schema().clone())
        }
    }
}

struct JudgeStage {
    models: Arc<Models>,
    checked: Arc<Judging>,
}

impl Stage for JudgeStage {
    fn run<'a>(&'a mut self, ctx: &'a mut StageContext) -> BoxFuture<'a, Result<(), StageError>> {
        Box::pin(async move {
            let range = match &self.checked.method {
                Asking::Score(scoring) => Some(scoring.scale.range().map(|v| v as f64)),
                _ => None,
            };
            let mut health = Health::new(ctx, range);
            match &self.checked.method {
                Asking::Rule(rule) => rule::run(rule, ctx, &mut health).await?,
                _ => self.ask(ctx, &mut health).await?,
            }
            health.warn(&ctx.stage);
            ctx.summary("health", health.summary());
            ctx.summary("judge", health.summary());
            Ok(())
        })
    }
}

impl JudgeStage {
    async fn ask(&self, ctx: &mut StageContext, health: &mut Health) -> Result<(), StageError> {
        let panel = Panel::open(ctx, &self.models, &self.checked.models, &self.checked.fingerprint).await?;
        ctx.open_journal(&panel.content_key)?;
        let window = panel.window(WINDOW);
        let judge = Arc::new((panel, Coins::new(ctx.shard_of_rows()), self.checked.clone()));
        let alone = Arc::new(AtomicU64::new(0));
        let work = |row, rows| {
            let (judge, alone) = (judge.clone(), alone.clone());
            async move {
                let (panel, coins, checked) = &*judge;
                let judged = checked.judge(panel, coins, row, &rows).await?;
                alone.fetch_add(u64::from(judged.is_none()), Ordering::Relaxed);
                Ok(judged)
            }
        };
        let key = |row, hash| match &judge.2.method {
            Asking::Pairwise(pairwise) if pairwise.order == Order::DataDreamer => judge.1.key(row, hash),
            _ => Ok(hash),
        };
        each_row_with(ctx, window, key, work, |out| health.count(out)).await?;
        let alone = alone.load(Ordering::Relaxed);
        if alone > 0 {
            tracing::warn!(stage = ctx.stage, "{alone} prompts have one answer each, which is compared with none");
        }
        if let Some(labelled) = &self.checked.labelled {
            let (panel, coins, judging) = &*judge;
            health.agreement(labelled.agreement(ctx, panel, coins, judging).await?);
        }
        Ok(())
    }
}
