//! `kind = "sampler"`: several answers to each prompt.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use datafusion::arrow::array::{
    ArrayRef, Float32Builder, Float64Array, ListBuilder, StringArray, UInt32Array, UInt32Builder, UInt64Array,
};
use datafusion::arrow::compute::take;
use datafusion::arrow::datatypes::{DataType, Field, Schema, SchemaRef};
use datafusion::arrow::record_batch::RecordBatch;
use futures::future::BoxFuture;
use metrics::Histogram;
use serde::Deserialize;

use super::answerer::{Answer, Answerer, Answers, Ask, Prompting, Stops};
use super::rows::{RowError, each_row};
use super::trainer::Template;
use super::{chat, client, columns};
use crate::canonical_fields;
use crate::engine::{Runnable, Stage, StageContext, StageError};
use crate::flow::device::Devices;
use crate::flow::kind::{CheckContext, InputKey, ModelUse, ONE_INPUT, Port, RowBound, StageKind, StagePlan};
use crate::flow::{Canonical, FlowError, Form};
use crate::llm::{Finish, Models, Role, Sampling, Stream, stream_key};
use crate::model::Chat;
use crate::observe::Metrics;

/// Rows in flight, counted from the oldest unfinished one.
const WINDOW: usize = 64;

/// Columns that sampling adds, in order; `_candidate` beside them.
const ADDED: [&str; 6] =
    ["generation", "generation_ids", "finish_reason", "prompt_tokens", "generation_tokens", "logprob"];

/// The column that `logprobs = true` adds.
const LOGPROBS: &str = "generation_logprobs";

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Options {
    model: String,
    #[serde(default)]
    device: Devices,
    adapter: Option<String>,
    #[serde(default)]
    template: Template,
    add_bos: Option<bool>,
    #[serde(default = "two")]
    candidates: u32,
    #[serde(default = "default_tokens")]
    max_new_tokens: usize,
    #[serde(default = "one")]
    temperature: f64,
    #[serde(default = "one")]
    top_p: f64,
    top_k: Option<usize>,
    min_p: Option<f64>,
    #[serde(default = "one")]
    repetition_penalty: f64,
    #[serde(default)]
    presence_penalty: f64,
    #[serde(default)]
    stop: Vec<String>,
    #[serde(default)]
    stop_token_ids: Vec<u32>,
    #[serde(default)]
    logprobs: bool,
    max_prompt_tokens: Option<usize>,
}

fn two() -> u32 {
    2
}

fn default_tokens() -> usize {
    512
}

fn one() -> f64 {
    1.0
}

struct Checked {
    model: ModelUse,
    prompting: Prompting,
    candidates: u32,
    sampling: Sampling,
    /// Texts and tokens that end an answer, besides the model's own.
    stop: Vec<String>,
    stop_ids: Vec<u32>,
    /// Prompts with more tokens are left out.
    max_prompt_tokens: Option<usize>,
}

/// Template and begin-of-text setting of a planned sampler; `None` for other kinds.
pub fn prompting(plan: &StagePlan) -> Option<Prompting> {
    plan.options.downcast_ref::<Checked>().map(|checked| checked.prompting)
}

/// The most tokens of a prompt that a planned sampler answers.
pub fn max_prompt_tokens(plan: &StagePlan) -> Option<usize> {
    plan.options.downcast_ref::<Checked>()?.max_prompt_tokens
}

/// The most tokens of an answer of a planned sampler.
pub fn max_new_tokens(plan: &StagePlan) -> Option<usize> {
    plan.options.downcast_ref::<Checked>().map(|checked| checked.sampling.max_new_tokens)
}

/// The kind `sampler`.
pub struct SamplerKind {
    pub models: Arc<Models>,
}

impl StageKind for SamplerKind {
    fn name(&self) -> &'static str {
        "sampler"
    }

    /// 2: an assistant's turn at a prompt's end is gone on with. 3: an answer ends where the chat template ends a turn, and
    /// of a GGUF file at more tokens.
    fn results(&self) -> u32 {
        3
    }

    fn takes_plain_text(&self) -> bool {
        true
    }

    fn inputs(&self) -> &'static [InputKey] {
        ONE_INPUT
    }

    fn check<'a>(&'a self, cx: CheckContext<'a>) -> BoxFuture<'a, Result<StagePlan, FlowError>> {
        Box::pin(async move {
            let plan = check(&cx)?;
            self.check_stop_ids(&cx, &plan).await.map(|()| plan)
        })
    }
}

impl SamplerKind {
    /// # Errors
    /// A token that the model does not have.
    async fn check_stop_ids(&self, cx: &CheckContext<'_>, plan: &StagePlan) -> Result<(), FlowError> {
        let Some(checked) = plan.options.downcast_ref::<Checked>().filter(|checked| !checked.stop_ids.is_empty())
        else {
            return Ok(());
        };
        // A model that can't be opened is told elsewhere.
        let Ok(text) = self.models.text(&checked.model.model).await else { return Ok(()) };
        let vocabulary = text.pretrained().config.vocab_size;
        match checked.stop_ids.iter().find(|id| **id as usize >= vocabulary) {
            None => Ok(()),
            Some(id) => Err(cx
                .error(
                    "stop_token_ids",
                    format!("has {id}, and the last token of `{}` is {}", checked.model.model, vocabulary - 1),
                )
                .help("take it out or correct it")),
        }
    }
}

impl Runnable for SamplerKind {
    fn open(&self, _stage: &str, plan: &StagePlan) -> Result<Box<dyn Stage>, StageError> {
        let checked = client::options::<Checked>(plan)?;
        Ok(Box::new(SamplerStage { models: self.models.clone(), checked, fingerprint: plan.fingerprint.clone() }))
    }
}

fn check(cx: &CheckContext<'_>) -> Result<StagePlan, FlowError> {
    let options: Options = cx.options()?;
    in_range(cx, "candidates", f64::from(options.candidates), 1.0..=f64::MAX, "at least 1")?;
    in_range(cx, "max_new_tokens", options.max_new_tokens as f64, 1.0..=f64::MAX, "at least 1")?;
    in_range(cx, "temperature", options.temperature, 0.0..=f64::MAX, "0 (greedy) or more")?;
    in_range(cx, "top_p", options.top_p, f64::MIN_POSITIVE..=1.0, "above 0 and at most 1")?;
    in_range(cx, "top_k", options.top_k.unwrap_or(1) as f64, 1.0..=f64::MAX, "at least 1")?;
    in_range(cx, "max_prompt_tokens", options.max_prompt_tokens.unwrap_or(1) as f64, 1.0..=f64::MAX, "at least 1")?;
    in_range(cx, "min_p", options.min_p.unwrap_or(0.0), 0.0..=1.0, "from 0 to 1")?;
    in_range(cx, "repetition_penalty", options.repetition_penalty, 0.01..=100.0, "from 0.01 to 100 (1 is off)")?;
    in_range(cx, "presence_penalty", options.presence_penalty, -2.0..=2.0, "from -2 to 2 (0 is off)")?;
    check_stop(cx, &options.stop)?;
    options.template.check_bos(cx, &options.model, options.add_bos)?;
    let model = client::model_use(cx, &options.model, &options.device, options.adapter.as_deref())?;
    let model = ModelUse { chat: model.chat && options.template == Template::Chat, ..model };
    let sampling = Sampling {
        max_new_tokens: options.max_new_tokens,
        temperature: options.temperature,
        top_p: options.top_p,
        top_k: options.top_k,
        min_p: options.min_p,
        repetition_penalty: options.repetition_penalty,
        presence_penalty: options.presence_penalty,
        logprobs: options.logprobs,
        ignore_eos: false,
    };
    let input = cx.inputs.first().and_then(|i| i.schema.as_ref());
    let endpoint = cx.model(&options.model)?.endpoint.is_some();
    if endpoint {
        refuse_for_endpoint(cx, &options)?;
    }
    let schema = input.map(|s| out_schema(cx, s, options.logprobs, endpoint)).transpose()?;
    let candidates = u64::from(options.candidates);
    let rows = cx.inputs.first().and_then(|i| i.rows);
    let rows = rows.map(|rows| RowBound { each: rows.each.saturating_mul(candidates), ..rows });
    let tokens = |rows: u64| rows.saturating_mul(options.max_new_tokens as u64);
    let mut notes = vec![match rows {
        Some(rows) => format!("at most {} tokens a round", tokens(rows.total())),
        None => format!("at most {} tokens a prompt", tokens(candidates)),
    }];
    if options.temperature == 0.0 && options.candidates > 1 {
        notes.push("temperature = 0: the candidates of a prompt will be equal".into());
    }
    Ok(StagePlan {
        outputs: vec![Port { name: String::new(), schema, rows }],
        waits_for_round: false,
        new_rows: false,
        models: vec![model.clone()],
        trains: None,
        fingerprint: options.form(),
        notes,
        options: Arc::new(Checked {
            model,
            prompting: Prompting { template: options.template, add_bos: options.add_bos },
            candidates: options.candidates,
            sampling,
            stop: options.stop,
            stop_ids: options.stop_token_ids,
            max_prompt_tokens: options.max_prompt_tokens,
        }),
    })
}

// The model and its adapter have a place of their own in every key; devices decide no row.
canonical_fields!(Options {
    template, add_bos, candidates, max_new_tokens, temperature, top_p, top_k, min_p, repetition_penalty, presence_penalty, stop,
    stop_token_ids, logprobs, max_prompt_tokens,
} without { model, device, adapter });

/// Keys that no chat server of this protocol has to understand: one that left them unheeded would not say so.
fn refuse_for_endpoint(cx: &CheckContext<'_>, options: &Options) -> Result<(), FlowError> {
    let without = [
        ("top_k", options.top_k.is_some(), "use top_p"),
        ("min_p", options.min_p.is_some(), "use top_p"),
        ("repetition_penalty", options.repetition_penalty != 1.0, "use presence_penalty"),
        ("stop_token_ids", !options.stop_token_ids.is_empty(), "use stop, a list of strings"),
        ("logprobs", options.logprobs, "leave it out"),
        ("max_prompt_tokens", options.max_prompt_tokens.is_some(), "leave long prompts out in the source's sql"),
        ("template", options.template == Template::None, "leave it out"),
    ];
    match without.iter().find(|(_, asked, _)| *asked) {
        Some((key, _, remedy)) => Err(cx
            .error(key, format!("can't be asked of an endpoint, where `{}` answers", options.model))
            .help(format!("{remedy}, or name a model with a source"))),
        None => Ok(()),
    }
}

fn check_stop(cx: &CheckContext<'_>, stop: &[String]) -> Result<(), FlowError> {
    if stop.iter().any(String::is_empty) {
        return Err(cx
            .error("stop", "has an empty string, which ends every answer before it begins")
            .help("take it out; the model's own end of turn always ends an answer"));
    }
    Ok(())
}

fn in_range(
    cx: &CheckContext<'_>,
    key: &str,
    value: f64,
    range: std::ops::RangeInclusive<f64>,
    words: &str,
) -> Result<(), FlowError> {
    if range.contains(&value) { Ok(()) } else { Err(cx.error(key, format!("is {value}; it has to be {words}"))) }
}

fn out_schema(
    cx: &CheckContext<'_>,
    input: &SchemaRef,
    logprobs: bool,
    endpoint: bool,
) -> Result<SchemaRef, FlowError> {
    if input.column_with_name("prompt").is_none() {
        let there: Vec<_> = input.fields().iter().map(|f| f.name().as_str()).filter(|n| !n.starts_with('_')).collect();
        return Err(cx
            .error("input", format!("has no column \"prompt\"; its columns are {}", there.join(", ")))
            .help("name one of them prompt in the source: select = { prompt = \"COLUMN\", ... }, which keeps only what it names"));
    }
    chat::check_tools(input).map_err(|message| cx.error("input", message))?;
    if input.column_with_name("_candidate").is_some() {
        return Err(cx
            .error("input", "has rows that are answers already, several to a prompt")
            .help("give the sampler one row a prompt: a source, or a query that makes new rows, as SELECT DISTINCT prompt FROM input"));
    }
    let mut added = ADDED.iter().chain(logprobs.then_some(&LOGPROBS));
    if let Some(taken) = added.find(|name| input.column_with_name(name).is_some()) {
        return Err(cx
            .error("input", format!("already has a column {taken:?}, which the sampler adds"))
            .help("leave it out in the source's `select`, or give it another name there"));
    }
    Ok(sampled_schema(input, logprobs, endpoint))
}

/// What an endpoint need not tell is nullable there.
fn sampled_schema(input: &SchemaRef, logprobs: bool, endpoint: bool) -> SchemaRef {
    let mut fields: Vec<Field> = input.fields().iter().map(|f| f.as_ref().clone()).collect();
    fields.extend([
        Field::new("_candidate", DataType::UInt32, false),
        Field::new("generation", DataType::Utf8, false),
        Field::new("generation_ids", DataType::new_list(DataType::UInt32, true), endpoint),
        Field::new("finish_reason", DataType::Utf8, false),
        Field::new("prompt_tokens", DataType::UInt64, endpoint),
        Field::new("generation_tokens", DataType::UInt64, endpoint),
        Field::new("logprob", DataType::Float64, endpoint),
    ]);
    fields.extend(logprobs.then(|| Field::new(LOGPROBS, DataType::new_list(DataType::Float32, true), false)));
    Arc::new(Schema::new(fields))
}

struct SamplerStage {
    models: Arc<Models>,
    checked: Arc<Checked>,
    fingerprint: Form,
}

impl Stage for SamplerStage {
    fn run<'a>(&'a mut self, ctx: &'a mut StageContext) -> BoxFuture<'a, Result<(), StageError>> {
        Box::pin(async move {
            let answerer = Answerer::open(ctx, &self.models, &self.checked.model, Role::Sampler).await?;
            let answerer = answerer.asking(self.checked.prompting);
            let stops = answerer.stops(&self.checked.stop, &self.checked.stop_ids)?;
            ctx.open_journal(&answerer.content_key(ctx, &self.fingerprint))?;
            let window = answerer.window(WINDOW);
            let sampler = Arc::new(Sampler {
                answerer,
                stops,
                checked: self.checked.clone(),
                key: stream_key(ctx.seed, &ctx.stage, ctx.round),
                tokens: ctx.token_counter(),
                lengths: Lengths::new(ctx),
                left_out: AtomicU64::new(0),
            });
            let work = |row, rows| {
                let sampler = sampler.clone();
                async move { sampler.sample(row, rows).await }
            };
            let mut emptiness = Emptiness::default();
            each_row(ctx, window, work, |out| emptiness.count(out)).await?;
            let left_out = sampler.left_out.load(Ordering::Relaxed);
            if let Some(most) = self.checked.max_prompt_tokens.filter(|_| left_out > 0) {
                tracing::warn!(stage = ctx.stage, "{left_out} prompts with more than {most} tokens were left out");
            }
            if let Some(warning) = emptiness.warning() {
                tracing::warn!(stage = ctx.stage, "{warning}");
            }
            Ok(())
        })
    }
}

/// Everything that answering one source row needs; shared by the rows in flight.
struct Sampler {
    answerer: Answerer,
    stops: Stops,
    checked: Arc<Checked>,
    key: u64,
    tokens: crate::engine::TokenCounter,
    lengths: Lengths,
    /// Prompts that were too long.
    left_out: AtomicU64,
}

/// How many answers are empty, of an earlier run too.
#[derive(Debug, Default)]
struct Emptiness {
    answers: u64,
    empty: u64,
    /// Of them, those that were cut off.
    cut: u64,
}

impl Emptiness {
    fn count(&mut self, out: &RecordBatch) {
        // The stage made these rows; what can't be read in them is not counted.
        let columns = ["generation", "finish_reason"].map(|name| columns::strings(out, name));
        let [Ok(texts), Ok(reasons)] = columns else { return };
        for (text, reason) in texts.iter().zip(&reasons) {
            let empty = text.is_none_or(|text| text.trim().is_empty());
            self.answers += 1;
            self.empty += u64::from(empty);
            self.cut += u64::from(empty && reason != Some(Finish::Stop.as_str()));
        }
    }

    /// A line for the log where there is not one answer.
    fn warning(&self) -> Option<String> {
        let remedy = match self.cut {
            0 => "ask one by hand, or look at the prompt and the system prompt",
            _ => "they were cut off, as those of a model that reasons first are; raise max_new_tokens",
        };
        (self.answers > 0 && self.empty == self.answers)
            .then(|| format!("all {} answers are empty: {remedy}", self.answers))
    }
}

/// How long answers are and why they end, as metrics.
struct Lengths {
    metrics: Metrics,
    stage: String,
    tokens: Histogram,
}

impl Lengths {
    fn new(ctx: &StageContext) -> Self {
        let tokens = ctx.metrics.histogram("flowrun_generation_tokens", &[("stage", ctx.stage.as_str())]);
        Self { metrics: ctx.metrics.clone(), stage: ctx.stage.clone(), tokens }
    }

    fn count(&self, answers: &[Answer]) {
        for answer in answers {
            if let Some(tokens) = answer.tokens {
                self.tokens.record(tokens as f64);
            }
            let labels = [("stage", self.stage.as_str()), ("reason", answer.finish)];
            self.metrics.counter("flowrun_generations_total", &labels).increment(1);
        }
    }
}

impl Sampler {
    async fn sample(&self, row: u64, rows: RecordBatch) -> Result<Option<RecordBatch>, RowError> {
        let mut batches = Vec::with_capacity(rows.num_rows());
        let count = self.checked.candidates;
        for i in 0..rows.num_rows() {
            let chat = chat::prompt(&rows, i)?;
            if self.is_too_long(&chat)? {
                self.left_out.fetch_add(1, Ordering::Relaxed);
                continue;
            }
            // One row a source row is the rule; parts of an unnested one draw from streams of their own.
            let first = i as u32 * count;
            let streams = (first..first + count).map(|index| Stream { key: self.key, row, index }).collect();
            let ask =
                Ask { conversation: (&chat).into(), sampling: &self.checked.sampling, stops: &self.stops, streams };
            let made = self.answerer.answers(ask).await?;
            self.tokens.add(made.prompt_tokens.unwrap_or(0), made.generation_tokens.unwrap_or(0));
            self.lengths.count(&made.answers);
            batches.push(self.to_batch(&rows, i, first, &made)?);
        }
        if batches.is_empty() {
            return Ok(None);
        }
        super::rows::join(&batches).map(Some).map_err(RowError::from)
    }

    fn is_too_long(&self, chat: &Chat) -> Result<bool, RowError> {
        let (Some(most), Some(local)) = (self.checked.max_prompt_tokens, self.answerer.local()) else {
            return Ok(false);
        };
        Ok(local.prompt(chat.into())?.len() > most)
    }

    /// One row a candidate, in [`sampled_schema`]'s order.
    fn to_batch(&self, rows: &RecordBatch, i: usize, first: u32, made: &Answers) -> Result<RecordBatch, StageError> {
        let failed = |e: datafusion::arrow::error::ArrowError| StageError::internal(format!("answers: {e}"));
        let answers = &made.answers;
        let count = answers.len();
        let same = UInt32Array::from(vec![i as u32; count]);
        let mut out: Vec<ArrayRef> =
            rows.columns().iter().map(|c| take(c, &same, None)).collect::<Result<_, _>>().map_err(failed)?;
        let mut ids = ListBuilder::new(UInt32Builder::new());
        for answer in answers {
            ids.values().append_slice(answer.ids.as_deref().unwrap_or_default());
            ids.append(answer.ids.is_some());
        }
        out.extend([
            Arc::new(UInt32Array::from_iter_values(first..first + count as u32)) as ArrayRef,
            Arc::new(StringArray::from_iter_values(answers.iter().map(|a| a.text.as_str()))),
            Arc::new(ids.finish()),
            Arc::new(StringArray::from_iter_values(answers.iter().map(|a| a.finish))),
            Arc::new(UInt64Array::from(vec![made.prompt_tokens; count])),
            Arc::new(answers.iter().map(|a| a.tokens).collect::<UInt64Array>()),
            Arc::new(answers.iter().map(|a| a.logprob).collect::<Float64Array>()),
        ]);
        let logprobs = self.checked.sampling.logprobs;
        if logprobs {
            let mut each = ListBuilder::new(Float32Builder::new());
            for answer in answers {
                each.values().append_slice(&answer.logprobs);
                each.append(true);
            }
            out.push(Arc::new(each.finish()));
        }
        let endpoint = self.answerer.local().is_none();
        RecordBatch::try_new(sampled_schema(&rows.schema(), logprobs, endpoint), out).map_err(failed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_that_are_all_empty_are_told() {
        let batch = |texts: [&str; 2], reasons: [&str; 2]| {
            let column = |of: [&str; 2]| Arc::new(StringArray::from(of.to_vec())) as ArrayRef;
            RecordBatch::try_from_iter([("generation", column(texts)), ("finish_reason", column(reasons))]).unwrap()
        };
        let warning = |batches: &[RecordBatch]| {
            let mut emptiness = Emptiness::default();
            batches.iter().for_each(|batch| emptiness.count(batch));
            emptiness.warning()
        };
        assert_eq!(warning(&[]), None);
        let empty = batch(["", " \n"], ["stop", "stop"]);
        assert_eq!(warning(&[empty.clone(), batch(["", "yes"], ["stop", "stop"])]), None);
        assert!(warning(&[empty.clone(), empty]).unwrap().starts_with("all 4 answers are empty: ask one"));
        assert!(warning(&[batch(["", ""], ["length", "stop"])]).unwrap().contains("raise max_new_tokens"));
    }
}
