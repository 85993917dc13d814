//! `kind = "judge"`: which of two answers is better.

use std::sync::Arc;

use datafusion::arrow::array::{Array, ArrayRef, AsArray, BooleanArray, Float64Array, StringArray, UInt32Array};
use datafusion::arrow::compute::take;
use datafusion::arrow::datatypes::{DataType, Field, Schema, SchemaRef};
use datafusion::arrow::record_batch::RecordBatch;
use futures::future::BoxFuture;
use metrics::Counter;
use serde::Deserialize;
use serde_json::json;

use super::answerer::{Answerer, Ask, Stops};
use super::client;
use super::rows::{RowError, each_row};
use super::{chat, columns};
use crate::engine::{Runnable, Stage, StageContext, StageError};
use crate::flow::FlowError;
use crate::flow::device::Devices;
use crate::flow::kind::{CheckContext, InputKey, ModelUse, ONE_INPUT, Port, RowBound, StageKind, StagePlan};
use crate::judge::pairwise::{self, Order, PairwisePrompt, Reading, Verdict};
use crate::llm::{Company, Models, Role, Sampling, ScoreRequest, Stream, stream_key};
use crate::model::ModelError;
use crate::model::chat::ChatMessage;

/// Rows judged at once, counted from the oldest unfinished one.
const WINDOW: usize = 32;

/// Columns of a sampled row that belong to one answer and not to the prompt.
const PER_ANSWER: [&str; 8] = [
    "generation",
    "generation_ids",
    "finish_reason",
    "prompt_tokens",
    "generation_tokens",
    "logprob",
    "generation_logprobs",
    "_candidate",
];

/// Columns that a verdict adds.
const ADDED: [&str; 13] = [
    "a",
    "b",
    "chosen",
    "rejected",
    "verdict",
    "probability",
    "swapped",
    "parsed",
    "judge_generation",
    "chosen_ids",
    "rejected_ids",
    "chosen_finish_reason",
    "rejected_finish_reason",
];

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct Options {
    model: String,
    #[serde(default)]
    device: Devices,
    adapter: Option<String>,
    #[serde(default)]
    method: Method,
    #[serde(default)]
    read: Read,
    order: Option<Order>,
    prompt: Option<String>,
    labels: Option<[String; 2]>,
    #[serde(default)]
    min_gap: f64,
    max_new_tokens: Option<usize>,
    #[serde(default)]
    compare: Compare,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Method {
    #[default]
    Pairwise,
}

/// Where the verdict is read.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Read {
    /// In the probabilities of the two labels: no decode, never unreadable.
    #[default]
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

/// What a judge was configured to do, checked.
struct Checked {
    prompt: PairwisePrompt,
    read: Read,
    order: Order,
    min_gap: f64,
    max_new_tokens: usize,
    all_pairs: bool,
    model: ModelUse,
}

/// The kind `judge`.
pub struct JudgeKind {
    pub models: Arc<Models>,
}

impl StageKind for JudgeKind {
    fn name(&self) -> &'static str {
        "judge"
    }

    fn inputs(&self) -> &'static [InputKey] {
        ONE_INPUT
    }

    fn check<'a>(&'a self, cx: CheckContext<'a>) -> BoxFuture<'a, Result<StagePlan, FlowError>> {
        Box::pin(async move { check(&cx) })
    }
}

impl Runnable for JudgeKind {
    fn open(&self, _stage: &str, plan: &StagePlan) -> Result<Box<dyn Stage>, StageError> {
        let checked = client::options::<Checked>(plan)?;
        Ok(Box::new(JudgeStage { models: self.models.clone(), checked, fingerprint: plan.fingerprint.clone() }))
    }
}

fn check(cx: &CheckContext<'_>) -> Result<StagePlan, FlowError> {
    let options: Options = cx.options()?;
    let Method::Pairwise = options.method;
    let prompt = PairwisePrompt::new(options.prompt, options.labels).map_err(|e| cx.error("prompt", e))?;
    if !(options.min_gap >= 0.0 && options.min_gap.is_finite()) {
        return Err(cx.error("min_gap", "is the log-odds within which a pair is a tie; it is 0 or more"));
    }
    if options.max_new_tokens.is_some() && options.read == Read::Logits {
        return Err(cx
            .error("max_new_tokens", "has no effect with read = \"logits\", which decodes nothing")
            .help("leave it out, or use read = \"text\""));
    }
    if cx.model(&options.model)?.endpoint.is_some() && options.read == Read::Logits {
        return Err(cx
            .error("read", format!("\"logits\" needs a model here, and `{}` answers at an endpoint", options.model))
            .help("use read = \"text\""));
    }
    // In one order a small model's label probabilities tell the slot, not the answer.
    let order = options.order.unwrap_or(if options.read == Read::Logits { Order::Both } else { Order::Random });
    let model = client::model_use(cx, &options.model, &options.device, options.adapter.as_deref())?;
    let all_pairs = options.compare == Compare::All;
    let fingerprint = json!({
        "method": "pairwise",
        "read": format!("{:?}", options.read),
        "order": format!("{order:?}"),
        "prompt": prompt.template(),
        "labels": prompt.labels(),
        "min_gap": options.min_gap,
        "max_new_tokens": options.max_new_tokens,
        "all_pairs": all_pairs,
    });
    let schema = cx.inputs.first().and_then(|i| i.schema.as_ref()).map(|s| out_schema(cx, s)).transpose()?;
    let rows = cx.inputs.first().and_then(|i| i.rows);
    let rows = rows.map(|rows| RowBound { each: pairwise::count(rows.each, all_pairs), ..rows });
    Ok(StagePlan {
        outputs: vec![Port { name: String::new(), schema, rows }],
        waits_for_round: false,
        new_rows: false,
        model: Some(model.clone()),
        trains: None,
        fingerprint,
        notes: Vec::new(),
        options: Arc::new(Checked {
            prompt,
            read: options.read,
            order,
            min_gap: options.min_gap,
            max_new_tokens: options.max_new_tokens.unwrap_or(8),
            all_pairs,
            model,
        }),
    })
}

fn out_schema(cx: &CheckContext<'_>, input: &SchemaRef) -> Result<SchemaRef, FlowError> {
    for needed in ["prompt", "generation", "_candidate"] {
        if input.column_with_name(needed).is_none() {
            return Err(cx.error("input", format!("has no column {needed:?}; a judge reads the rows of a sampler")));
        }
    }
    if let Some(taken) = ADDED.iter().find(|name| input.column_with_name(name).is_some()) {
        return Err(cx
            .error("input", format!("already has a column {taken:?}, which the judge adds"))
            .help("leave it out in the source's `select`, or rename it there"));
    }
    Ok(judged_schema(input))
}

/// The input's columns without those of one answer, then the verdict's.
fn judged_schema(input: &SchemaRef) -> SchemaRef {
    let mut fields: Vec<Field> = input
        .fields()
        .iter()
        .filter(|f| !PER_ANSWER.contains(&f.name().as_str()))
        .map(|f| f.as_ref().clone())
        .collect();
    let text = |name: &str, nullable| Field::new(name, DataType::Utf8, nullable);
    let ids = |name: &str| Field::new(name, DataType::new_list(DataType::UInt32, true), true);
    fields.extend([
        Field::new("_pair", DataType::UInt32, false),
        Field::new("a_candidate", DataType::UInt32, false),
        Field::new("b_candidate", DataType::UInt32, false),
        text("a", false),
        text("b", false),
        text("chosen", true),
        text("rejected", true),
        text("verdict", false),
        Field::new("probability", DataType::Float64, false),
        Field::new("swapped", DataType::Boolean, false),
        Field::new("parsed", DataType::Boolean, false),
        text("judge_generation", true),
        ids("chosen_ids"),
        ids("rejected_ids"),
        text("chosen_finish_reason", true),
        text("rejected_finish_reason", true),
    ]);
    Arc::new(Schema::new(fields))
}

struct JudgeStage {
    models: Arc<Models>,
    checked: Arc<Checked>,
    fingerprint: serde_json::Value,
}

impl Stage for JudgeStage {
    fn run<'a>(&'a mut self, ctx: &'a mut StageContext) -> BoxFuture<'a, Result<(), StageError>> {
        Box::pin(async move {
            let answerer = Answerer::open(ctx, &self.models, &self.checked.model, Role::Judge).await?;
            ctx.open_journal(&answerer.content_key(ctx, &self.fingerprint))?;
            let window = answerer.window(WINDOW);
            let judge = Arc::new(Judge {
                stops: answerer.stops(&[], &[])?,
                answerer,
                checked: self.checked.clone(),
                key: stream_key(ctx.seed, &ctx.stage, ctx.round),
                stage: ctx.stage.clone(),
            });
            let mut health = Health::new(ctx, self.checked.order);
            each_row(
                ctx,
                window,
                |row, rows| {
                    let judge = judge.clone();
                    async move { judge.judge(row, rows).await }
                },
                |out| health.count(out),
            )
            .await?;
            ctx.summary("judge", health.summary());
            Ok(())
        })
    }
}

/// Everything the verdict on one source row needs; shared by the rows in flight.
struct Judge {
    answerer: Answerer,
    stops: Stops,
    checked: Arc<Checked>,
    /// Names the random streams of this stage in this round.
    key: u64,
    stage: String,
}

/// One pair before it becomes a row.
struct Judged {
    pair: u32,
    a: usize,
    b: usize,
    reading: Reading,
    swapped: bool,
    said: Option<String>,
}

impl Judge {
    /// One row a pair of the candidates in `rows`; nothing where there is no second candidate.
    async fn judge(&self, row: u64, rows: RecordBatch) -> Result<Option<RecordBatch>, RowError> {
        let prompt = chat::as_text(&chat::messages(&rows, "prompt", 0)?);
        let answers = columns::strings(&rows, "generation")?;
        let pairs = pairwise::pairs(rows.num_rows(), self.checked.all_pairs);
        let mut judged = Vec::with_capacity(pairs.len());
        for (pair, (a, b)) in pairs.into_iter().enumerate() {
            let pair = pair as u32;
            let (first, second) = (answers.value(a), answers.value(b));
            let (reading, swapped, said) = if first == second {
                (Reading::EQUAL, false, None)
            } else {
                self.ask(row, pair, &prompt, first, second).await?
            };
            judged.push(Judged { pair, a, b, reading, swapped, said });
        }
        if judged.is_empty() { Ok(None) } else { Ok(Some(to_batch(&rows, &answers, &judged)?)) }
    }

    async fn ask(
        &self,
        row: u64,
        pair: u32,
        prompt: &str,
        a: &str,
        b: &str,
    ) -> Result<(Reading, bool, Option<String>), RowError> {
        let swapped = match self.checked.order {
            Order::Random => pairwise::swap(self.key, row, pair),
            Order::Both => false,
        };
        let orders: &[bool] = match self.checked.order {
            Order::Random => &[swapped],
            Order::Both => &[false, true],
        };
        match self.checked.read {
            Read::Logits => {
                let asked = orders.iter().map(|&s| self.log_odds(prompt, a, b, s));
                let log_odds = futures::future::try_join_all(asked).await?;
                Ok((pairwise::from_log_odds(&log_odds, self.checked.min_gap), swapped, None))
            }
            Read::Text => {
                let asked = orders.iter().map(|&s| self.verdict(row, pair, prompt, a, b, s));
                let answers = futures::future::try_join_all(asked).await?;
                let verdicts: Vec<_> = answers.iter().map(|(verdict, _)| *verdict).collect();
                let said = answers.into_iter().map(|(_, text)| text).collect::<Vec<_>>().join("\n");
                Ok((pairwise::from_texts(&verdicts), swapped, Some(said)))
            }
        }
    }

    fn question(&self, prompt: &str, a: &str, b: &str, swapped: bool) -> [ChatMessage; 1] {
        let (first, second) = if swapped { (b, a) } else { (a, b) };
        [ChatMessage::new("user", self.checked.prompt.render(prompt, first, second))]
    }

    /// Log-odds that a is better, from the labels' probabilities as the judge's first words.
    async fn log_odds(&self, prompt: &str, a: &str, b: &str, swapped: bool) -> Result<f64, RowError> {
        let local = self.answerer.local().ok_or_else(|| StageError::internal("an endpoint has no logits"))?;
        let dead = |e: ModelError| RowError::DeadLetter(e.to_string());
        let labels = self.checked.prompt.labels();
        let answers: Result<Vec<_>, _> = labels.iter().map(|label| local.text.encode(label)).collect();
        let request = ScoreRequest {
            prompt: local.text.encode_chat(&self.question(prompt, a, b, swapped)).map_err(dead)?,
            answers: answers.map_err(dead)?,
            adapter: local.adapter.clone(),
            // Verdicts may be read in shared passes.
            company: if local.alone { Company::Indifferent } else { Company::Any },
            stage: self.stage.clone(),
        };
        let scores = local.client.get().await?.score(request).await.map_err(client::row_error)?;
        let sum = |i: usize| scores.logprobs.get(i).map_or(f64::NAN, |l| l.iter().map(|p| f64::from(*p)).sum());
        let odds: f64 = sum(0) - sum(1);
        Ok(if swapped { -odds } else { odds })
    }

    /// The verdict in the judge's own words, greedy.
    async fn verdict(
        &self,
        row: u64,
        pair: u32,
        prompt: &str,
        a: &str,
        b: &str,
        swapped: bool,
    ) -> Result<(Option<Verdict>, String), RowError> {
        let ask = Ask {
            messages: &self.question(prompt, a, b, swapped),
            sampling: &Sampling::greedy(self.checked.max_new_tokens),
            stops: &self.stops,
            streams: vec![Stream { key: self.key, row, index: pair * 2 + u32::from(swapped) }],
        };
        let text = self.answerer.answers(ask).await?.answers.into_iter().next().map(|a| a.text).unwrap_or_default();
        let verdict = self.checked.prompt.read(&text);
        Ok((verdict.map(|v| if swapped { v.swapped() } else { v }), text))
    }
}

/// One row a judged pair, in [`judged_schema`]'s order.
fn to_batch(rows: &RecordBatch, answers: &StringArray, judged: &[Judged]) -> Result<RecordBatch, StageError> {
    let failed = |e: datafusion::arrow::error::ArrowError| StageError::internal(format!("verdicts: {e}"));
    let schema = judged_schema(&rows.schema());
    let candidates = columns::u32s(rows, "_candidate")?;
    // Columns of the prompt are the same in every candidate's row.
    let first = UInt32Array::from(vec![0; judged.len()]);
    let kept = rows.schema();
    let kept = kept.fields().iter().zip(rows.columns()).filter(|(f, _)| !PER_ANSWER.contains(&f.name().as_str()));
    let mut out: Vec<ArrayRef> = kept.map(|(_, c)| take(c, &first, None)).collect::<Result<_, _>>().map_err(failed)?;

    let winner = |j: &Judged| match j.reading.verdict {
        Verdict::A => Some((j.a, j.b)),
        Verdict::B => Some((j.b, j.a)),
        Verdict::Tie => None,
    };
    let chosen: UInt32Array = judged.iter().map(|j| winner(j).map(|(c, _)| c as u32)).collect();
    let rejected: UInt32Array = judged.iter().map(|j| winner(j).map(|(_, r)| r as u32)).collect();
    let of = |f: fn(&Judged) -> usize| StringArray::from_iter_values(judged.iter().map(|j| answers.value(f(j))));
    let picked = |column: &dyn Array, which: &UInt32Array| take(column, which, None).map_err(failed);
    out.push(Arc::new(UInt32Array::from_iter_values(judged.iter().map(|j| j.pair))));
    out.push(Arc::new(UInt32Array::from_iter_values(judged.iter().map(|j| candidates.value(j.a)))));
    out.push(Arc::new(UInt32Array::from_iter_values(judged.iter().map(|j| candidates.value(j.b)))));
    out.push(Arc::new(of(|j| j.a)));
    out.push(Arc::new(of(|j| j.b)));
    out.push(picked(answers, &chosen)?);
    out.push(picked(answers, &rejected)?);
    out.push(Arc::new(StringArray::from_iter_values(judged.iter().map(|j| j.reading.verdict.as_str()))));
    out.push(Arc::new(Float64Array::from_iter_values(judged.iter().map(|j| j.reading.probability))));
    out.push(Arc::new(BooleanArray::from_iter(judged.iter().map(|j| Some(j.swapped)))));
    out.push(Arc::new(BooleanArray::from_iter(judged.iter().map(|j| Some(j.reading.parsed)))));
    out.push(Arc::new(judged.iter().map(|j| j.said.as_deref()).collect::<StringArray>()));
    let ids = columns::ids(rows, "generation_ids")?;
    out.push(picked(&ids, &chosen)?);
    out.push(picked(&ids, &rejected)?);
    let reasons = columns::strings(rows, "finish_reason")?;
    out.push(picked(&reasons, &chosen)?);
    out.push(picked(&reasons, &rejected)?);
    RecordBatch::try_new(schema, out).map_err(failed)
}

/// What a round's verdicts say about the judge.
struct Health {
    verdicts: [(Verdict, u64, Counter); 3],
    unreadable: (u64, Counter),
    order: Order,
    /// Verdicts for the answer shown first; with one order asked they show the judge's taste for it.
    first_slot: u64,
}

impl Health {
    fn new(ctx: &StageContext, order: Order) -> Self {
        let counter = |verdict: Verdict| {
            let labels = [("stage", ctx.stage.as_str()), ("verdict", verdict.as_str())];
            (verdict, 0, ctx.metrics.counter("flowrun_judge_verdicts_total", &labels))
        };
        let unreadable = ctx.metrics.counter("flowrun_judge_unreadable_total", &[("stage", &ctx.stage)]);
        Self {
            verdicts: [Verdict::A, Verdict::B, Verdict::Tie].map(counter),
            unreadable: (0, unreadable),
            order,
            first_slot: 0,
        }
    }

    fn count(&mut self, out: &RecordBatch) {
        let column = |name: &str| out.column_by_name(name).cloned();
        let (Ok(verdicts), Some(parsed), Some(swapped)) =
            (columns::strings(out, "verdict"), column("parsed"), column("swapped"))
        else {
            return;
        };
        let (parsed, swapped) = (parsed.as_boolean(), swapped.as_boolean());
        for i in 0..out.num_rows() {
            for (verdict, count, counter) in &mut self.verdicts {
                if verdict.as_str() == verdicts.value(i) {
                    *count += 1;
                    counter.increment(1);
                }
            }
            if !parsed.value(i) {
                self.unreadable.0 += 1;
                self.unreadable.1.increment(1);
            }
            if verdicts.value(i) != "tie" {
                self.first_slot += u64::from((verdicts.value(i) == "a") != swapped.value(i));
            }
        }
    }

    fn summary(&self) -> serde_json::Value {
        let count = |wanted: Verdict| self.verdicts.iter().find(|(v, ..)| *v == wanted).map_or(0, |(_, n, _)| *n);
        let pairs: u64 = self.verdicts.iter().map(|(_, n, _)| n).sum();
        let share = |n: u64, of: u64| if of == 0 { json!(null) } else { json!(n as f64 / of as f64) };
        json!({
            "pairs": pairs,
            "verdict_a": count(Verdict::A),
            "verdict_b": count(Verdict::B),
            "ties": count(Verdict::Tie),
            "tie_rate": share(count(Verdict::Tie), pairs),
            "unreadable": self.unreadable.0,
            "unreadable_rate": share(self.unreadable.0, pairs),
            "first_slot_rate": match self.order {
                Order::Random => share(self.first_slot, pairs - count(Verdict::Tie)),
                Order::Both => json!(null),
            },
        })
    }
}
