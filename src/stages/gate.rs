//! `kind = "gate"`: whether a round's adapter is better than what was there before.
//!
//! In every published loop the judge's score rises while independent measures may fall, so each round answers
//! held-out prompts with its adapter and without, and a judge or a rule compares them. A round that is not good
//! enough ends the run, or is left out of it.

use std::sync::Arc;

use datafusion::arrow::array::{Array, ArrayRef, AsArray, Float64Array, StringArray, UInt32Array};
use datafusion::arrow::compute::take;
use datafusion::arrow::datatypes::{DataType, Field, Float64Type, Schema, SchemaRef};
use datafusion::arrow::record_batch::RecordBatch;
use futures::future::{BoxFuture, try_join_all};
use serde::{Deserialize, Serialize};
use serde_json::json;
use tokio::sync::Mutex;

use super::judge::{Asking, Coins, Judging, Panel, rule};
use super::rows::{RowError, each_row, join};
use super::{chat, client, columns};
use crate::canonical_names;
use crate::data::Query;
use crate::engine::{Runnable, Stage, StageContext, StageError};
use crate::flow::device::Devices;
use crate::flow::kind::{AdapterChoice, CheckContext, InputKey, ModelUse, ONE_INPUT, Port, StageKind, StagePlan};
use crate::flow::{Canonical, FlowError, Form, StageSpec};
use crate::judge::interval::wilson;
use crate::llm::{Models, Sampling};

/// Rows in flight, counted from the oldest unfinished one.
const WINDOW: usize = 64;

/// Columns that a gate adds.
const ADDED: [&str; 6] = ["a", "b", "a_score", "b_score", "verdict", "win"];

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct Options {
    model: String,
    trainer: Option<String>,
    #[serde(default)]
    device: Devices,
    #[serde(default)]
    against: Against,
    judge: toml::Table,
    #[serde(default = "half")]
    threshold: f64,
    #[serde(default)]
    otherwise: Otherwise,
    #[serde(default = "default_tokens")]
    max_new_tokens: usize,
    #[serde(default)]
    temperature: f64,
}

fn half() -> f64 {
    0.5
}

fn default_tokens() -> usize {
    256
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Against {
    /// The model without an adapter.
    #[default]
    Base,
    /// The adapter that the round began with.
    Previous,
}

/// What becomes of a round that does not pass.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Otherwise {
    /// The run ends after it, as `stopped_by_gate`.
    #[default]
    Stop,
    /// The next round goes on from the adapter before.
    Keep,
}

canonical_names!(Against { Base = "base", Previous = "previous" });

canonical_names!(Otherwise { Stop = "stop", Keep = "keep" });

/// What a gate was configured to do, checked.
struct Checked {
    trainer: String,
    /// The round's adapter, and what it is compared with.
    players: [ModelUse; 2],
    sampling: Sampling,
    judging: Judging,
    threshold: f64,
    otherwise: Otherwise,
}

/// The kind `gate`.
pub struct GateKind {
    pub models: Arc<Models>,
}

impl StageKind for GateKind {
    fn name(&self) -> &'static str {
        "gate"
    }

    /// 2: an assistant turn at a prompt's end is continued; a verdict in text is read by a closed grammar. 3: answers
    /// end where the chat template ends a turn.
    fn results(&self) -> u32 {
        3
    }

    fn inputs(&self) -> &'static [InputKey] {
        ONE_INPUT
    }

    fn check<'a>(&'a self, cx: CheckContext<'a>) -> BoxFuture<'a, Result<StagePlan, FlowError>> {
        Box::pin(check(cx))
    }
}

impl Runnable for GateKind {
    fn open(&self, _stage: &str, plan: &StagePlan) -> Result<Box<dyn Stage>, StageError> {
        let checked = client::options::<Checked>(plan)?;
        Ok(Box::new(GateStage { models: self.models.clone(), checked, fingerprint: plan.fingerprint.clone() }))
    }
}

async fn check(cx: CheckContext<'_>) -> Result<StagePlan, FlowError> {
    let options: Options = cx.options()?;
    if !(0.0..=1.0).contains(&options.threshold) {
        return Err(cx.error("threshold", "is the share of prompts that have to be won, from 0 to 1"));
    }
    if options.max_new_tokens == 0 || !(options.temperature >= 0.0 && options.temperature.is_finite()) {
        return Err(cx.error("max_new_tokens", "has to be at least 1, and the temperature 0 (greedy) or more"));
    }
    let trainer = trainer(&cx, &options)?;
    client::refuse_endpoint(&cx, &options.model, "model", "has no adapters, so no round of it can be judged")?;
    let uses = |adapter| -> Result<ModelUse, FlowError> {
        Ok(ModelUse { model: options.model.clone(), devices: cx.devices(&options.device)?, adapter, chat: true })
    };
    let against = match options.against {
        Against::Base => AdapterChoice::Base,
        Against::Previous => AdapterChoice::Previous { trainer: trainer.clone() },
    };
    let players = [uses(AdapterChoice::Current { trainer: trainer.clone() })?, uses(against)?];
    let input = cx.inputs.first();
    let schema = input.and_then(|i| i.schema.as_ref()).map(|s| out_schema(&cx, s)).transpose()?;
    let played = input.and_then(|i| i.schema.as_ref()).map(played_schema);

    // The judge's keys stand in a table of their own, and its errors name it.
    let name = format!("{}.judge", cx.stage.name);
    let spec = StageSpec { name, options: options.judge.clone(), ..cx.stage.clone() };
    let judge_cx = CheckContext { flow: cx.flow, stage: &spec, inputs: cx.inputs, trainers: cx.trainers };
    let judging = Judging::check(&judge_cx, played.as_ref()).await?;

    let sampling = Sampling { temperature: options.temperature, ..Sampling::greedy(options.max_new_tokens) };
    let fingerprint = Form::table([
        ("judge", judging.fingerprint.clone()),
        ("sampling", sampling.form()),
        ("against", options.against.form()),
        ("trainer", trainer.form()),
        ("threshold", options.threshold.form()),
        ("otherwise", options.otherwise.form()),
    ]);
    let models = players.iter().chain(&judging.models).cloned().collect();
    let rows = input.and_then(|i| i.rows);
    let checked =
        Checked { trainer, players, sampling, judging, threshold: options.threshold, otherwise: options.otherwise };
    Ok(StagePlan {
        outputs: vec![Port { name: String::new(), schema, rows }],
        waits_for_round: false,
        new_rows: false,
        models,
        trains: None,
        fingerprint,
        notes: Vec::new(),
        options: Arc::new(checked),
    })
}

/// The trainer whose adapter is judged.
fn trainer(cx: &CheckContext<'_>, options: &Options) -> Result<String, FlowError> {
    cx.model(&options.model)?;
    let own = cx.trainers.get(&options.model).map_or(&[][..], Vec::as_slice);
    match (&options.trainer, own) {
        (None, [only]) => Ok(only.clone()),
        (Some(name), _) if own.contains(name) => Ok(name.clone()),
        (Some(name), _) => Err(cx.error("trainer", format!("no trainer `{name}` trains `{}`", options.model))),
        (None, []) => Err(cx.error("model", format!("nothing in this flow trains `{}`", options.model))),
        (None, several) => Err(cx
            .error("trainer", format!("has to be said: `{}` is trained by {}", options.model, several.join(", ")))
            .help(format!("trainer = \"{}\"", several[0]))),
    }
}

fn out_schema(cx: &CheckContext<'_>, input: &SchemaRef) -> Result<SchemaRef, FlowError> {
    if input.column_with_name("prompt").is_none() {
        return Err(cx.error("input", "has no column \"prompt\"; a gate reads held-out prompts"));
    }
    if input.column_with_name("generation").is_some() {
        return Err(cx
            .error("input", "has a column \"generation\"; a gate answers held-out prompts itself")
            .help("give it the rows of a source without `candidates`, or leave the column out in a mapper"));
    }
    if let Some(taken) = ADDED.iter().find(|name| input.column_with_name(name).is_some()) {
        return Err(cx
            .error("input", format!("already has a column {taken:?}, which the gate adds"))
            .help("leave it out in the source's `select`, or rename it there"));
    }
    Ok(gated_schema(input))
}

/// The input's columns, then both answers and what became of them.
fn gated_schema(input: &SchemaRef) -> SchemaRef {
    let mut fields: Vec<Field> = input.fields().iter().map(|f| f.as_ref().clone()).collect();
    fields.extend([
        Field::new("a", DataType::Utf8, false),
        Field::new("b", DataType::Utf8, false),
        Field::new("a_score", DataType::Float64, true),
        Field::new("b_score", DataType::Float64, true),
        // Of a comparison that the judge did not make, or not in words that can be read, there is neither.
        Field::new("verdict", DataType::Utf8, true),
        Field::new("win", DataType::Float64, true),
    ]);
    Arc::new(Schema::new(fields))
}

/// What the judge sees: the prompt's columns, then an answer's.
fn played_schema(input: &SchemaRef) -> SchemaRef {
    let mut fields: Vec<Field> = input.fields().iter().map(|f| f.as_ref().clone()).collect();
    fields.extend([Field::new("_candidate", DataType::UInt32, false), Field::new("generation", DataType::Utf8, false)]);
    Arc::new(Schema::new(fields))
}

struct GateStage {
    models: Arc<Models>,
    checked: Arc<Checked>,
    fingerprint: Form,
}

impl Stage for GateStage {
    fn run<'a>(&'a mut self, ctx: &'a mut StageContext) -> BoxFuture<'a, Result<(), StageError>> {
        Box::pin(async move {
            let checked = &self.checked;
            let players = Panel::open(ctx, &self.models, &checked.players, &self.fingerprint).await?;
            let judges = Panel::open(ctx, &self.models, &checked.judging.models, &self.fingerprint).await?;
            ctx.open_journal(&[&players.content_key, &judges.content_key].form().key())?;
            let gate = Arc::new(Gate {
                players,
                judges,
                coins: Coins::new(ctx.shard_of_rows()),
                checked: checked.clone(),
                rule: Mutex::default(),
            });
            let work = |row, rows| {
                let gate = gate.clone();
                async move { gate.compare(row, rows).await.map(Some) }
            };
            let mut tally = Tally::default();
            each_row(ctx, WINDOW, work, |out| tally.count(out)).await?;
            decide(ctx, checked, &tally)
        })
    }
}

/// Everything that comparing one prompt's answers needs; shared by the rows in flight.
struct Gate {
    players: Panel,
    judges: Panel,
    coins: Coins,
    checked: Arc<Checked>,
    /// The rule, planned over the first row.
    rule: Mutex<Option<Query>>,
}

impl Gate {
    /// Every prompt of one source row: several where a query made parts of it.
    async fn compare(&self, row: u64, rows: RecordBatch) -> Result<RecordBatch, RowError> {
        let compared = (0..rows.num_rows()).map(|part| self.compare_one(row, part as u32, rows.slice(part, 1)));
        Ok(join(&try_join_all(compared).await?)?)
    }

    async fn compare_one(&self, row: u64, part: u32, rows: RecordBatch) -> Result<RecordBatch, RowError> {
        let conversation = chat::prompt(&rows, 0)?;
        let sampling = &self.checked.sampling;
        let play = |player| self.players.write(player, row, (&conversation).into(), part..part + 1, sampling.clone());
        let answers = self.players.each(play).await?.into_iter().flatten().map(|answer| answer.text);
        let answers: Vec<String> = answers.collect();
        let [a, b] = answers.as_slice() else {
            return Err(StageError::internal("a gate asked two and was not answered by both").into());
        };
        let played = self.played(&rows, a, b)?;
        let outcome = self.judge(row, part, &played).await?;
        Ok(outcome.to_batch(&rows, a, b)?)
    }

    /// One row an answer, as the judge reads them.
    fn played(&self, rows: &RecordBatch, a: &str, b: &str) -> Result<RecordBatch, StageError> {
        let failed = |e: datafusion::arrow::error::ArrowError| StageError::internal(format!("gate: {e}"));
        let twice = UInt32Array::from(vec![0, 0]);
        let mut out: Vec<ArrayRef> =
            rows.columns().iter().map(|c| take(c, &twice, None)).collect::<Result<_, _>>().map_err(failed)?;
        out.push(Arc::new(UInt32Array::from(vec![0, 1])));
        out.push(Arc::new(StringArray::from(vec![a, b])));
        RecordBatch::try_new(played_schema(&rows.schema()), out).map_err(failed)
    }

    async fn judge(&self, row: u64, part: u32, played: &RecordBatch) -> Result<Outcome, RowError> {
        match &self.checked.judging.method {
            Asking::Pairwise(pairwise) => {
                let judged = pairwise.judge(&self.judges, &self.coins, row, part, played).await?;
                judged.as_ref().map_or(Ok(Outcome::UNREADABLE), Outcome::of_verdict)
            }
            // A score that can't be read says nothing of the answer.
            Asking::Score(scoring) => {
                let [a, b] = scores(&scoring.judge(&self.judges, row, 2 * part, played).await?)?;
                Ok(Outcome { scores: [a, b], win: a.zip(b).map(|(a, b)| win(a, b)) })
            }
            // By a rule an answer without a score loses against one with.
            Asking::Rule(text) => {
                let mut planned = self.rule.lock().await;
                let [a, b] = scores(&rule::scored(text, &mut planned, played).await?)?;
                let or_least = |score: Option<f64>| score.unwrap_or(f64::NEG_INFINITY);
                let known = a.is_some() || b.is_some();
                Ok(Outcome { scores: [a, b], win: known.then(|| win(or_least(a), or_least(b))) })
            }
        }
    }
}

/// What became of one prompt.
struct Outcome {
    scores: [Option<f64>; 2],
    /// 1 where the round's adapter won, half for a tie; `None` where the judge said nothing that can be read.
    win: Option<f64>,
}

impl Outcome {
    const UNREADABLE: Self = Self { scores: [None; 2], win: None };

    /// A coin that stands for a verdict is none.
    fn of_verdict(judged: &RecordBatch) -> Result<Self, RowError> {
        let verdicts = columns::strings(judged, "verdict")?;
        let parsed = judged.column_by_name("parsed").and_then(|c| c.as_boolean_opt());
        let read = parsed.is_some_and(|parsed| parsed.iter().next() == Some(Some(true)));
        let win = verdicts.iter().next().flatten().filter(|_| read).map(|verdict| match verdict {
            "a" => 1.0,
            "b" => 0.0,
            _ => 0.5,
        });
        Ok(Self { win, ..Self::UNREADABLE })
    }

    fn to_batch(&self, rows: &RecordBatch, a: &str, b: &str) -> Result<RecordBatch, StageError> {
        let verdict = self.win.map(|win| match win {
            win if win > 0.5 => "a",
            win if win < 0.5 => "b",
            _ => "tie",
        });
        let mut out = rows.columns().to_vec();
        out.extend([
            Arc::new(StringArray::from(vec![a])) as ArrayRef,
            Arc::new(StringArray::from(vec![b])),
            Arc::new(Float64Array::from(vec![self.scores[0]])),
            Arc::new(Float64Array::from(vec![self.scores[1]])),
            Arc::new(StringArray::from(vec![verdict])),
            Arc::new(Float64Array::from(vec![self.win])),
        ]);
        RecordBatch::try_new(gated_schema(&rows.schema()), out).map_err(|e| StageError::internal(format!("gate: {e}")))
    }
}

/// Of both answers, where they have one.
fn scores(judged: &RecordBatch) -> Result<[Option<f64>; 2], RowError> {
    let scores = judged.column_by_name("score").and_then(|c| c.as_primitive_opt::<Float64Type>());
    let scores = scores.filter(|s| s.len() == 2).ok_or_else(|| StageError::internal("a gate without scores"))?;
    Ok([0, 1].map(|i| scores.is_valid(i).then(|| scores.value(i)).filter(|s| s.is_finite())))
}

fn win(a: f64, b: f64) -> f64 {
    match a.total_cmp(&b) {
        std::cmp::Ordering::Greater => 1.0,
        std::cmp::Ordering::Equal => 0.5,
        std::cmp::Ordering::Less => 0.0,
    }
}

/// The outcomes of a round.
#[derive(Debug, Default)]
struct Tally {
    prompts: u64,
    /// Prompts whose comparison could not be read.
    unreadable: u64,
    wins: f64,
    ties: u64,
    scores: [f64; 2],
    scored: [u64; 2],
    empty: [u64; 2],
}

impl Tally {
    fn count(&mut self, out: &RecordBatch) {
        let number = |name: &str| out.column_by_name(name).and_then(|c| c.as_primitive_opt::<Float64Type>()).cloned();
        for win in number("win").iter().flatten() {
            self.prompts += 1;
            self.unreadable += u64::from(win.is_none());
            self.wins += win.unwrap_or(0.0);
            self.ties += u64::from(win == Some(0.5));
        }
        for (side, name) in ["a", "b"].into_iter().enumerate() {
            let texts = columns::strings(out, name).ok();
            self.empty[side] += texts.iter().flatten().flatten().filter(|t| t.trim().is_empty()).count() as u64;
            for score in number(&format!("{name}_score")).iter().flatten().flatten() {
                self.scores[side] += score;
                self.scored[side] += 1;
            }
        }
    }

    fn compared(&self) -> u64 {
        self.prompts - self.unreadable
    }

    /// The share of comparisons that the round's adapter won, where there are any.
    fn rate(&self) -> Option<f64> {
        (self.compared() > 0).then(|| self.wins / self.compared() as f64)
    }

    /// Why the adapter does not pass; `None` where it does.
    fn failure(&self, threshold: f64) -> Option<String> {
        let (compared, asked) = (self.compared(), threshold * 100.0);
        match self.rate() {
            Some(rate) if rate >= threshold => None,
            Some(rate) => Some(format!(
                "wins {:.0} % of {compared} held-out prompts, and {asked:.0} % are asked for",
                rate * 100.0
            )),
            None => Some(format!(
                "is not known to win: the judge said nothing that can be read of {} held-out prompts",
                self.prompts
            )),
        }
    }
}

/// Ends the run, leaves the adapter out, or lets it pass.
fn decide(ctx: &StageContext, checked: &Checked, tally: &Tally) -> Result<(), StageError> {
    if tally.prompts == 0 {
        return Err(StageError::user(format!(
            "{}: no held-out prompt arrived, so nothing can be said of the adapter",
            ctx.stage
        )));
    }
    let (rate, failure) = (tally.rate(), tally.failure(checked.threshold));
    let passed = failure.is_none();
    let mean = |side: usize| (tally.scored[side] > 0).then(|| tally.scores[side] / tally.scored[side] as f64);
    let [low, high] = wilson(tally.wins, tally.compared() as f64);
    let mut verdict = json!({
        "passed": passed, "win_rate_low": low, "win_rate_high": high,
        "threshold": checked.threshold, "prompts": tally.prompts, "unreadable": tally.unreadable,
        "ties": tally.ties,
        "score": mean(0), "score_against": mean(1),
        "empty": tally.empty[0], "empty_against": tally.empty[1],
        "otherwise": checked.otherwise,
    });
    let labels = [("stage", ctx.stage.as_str())];
    if let Some(rate) = rate {
        verdict["win_rate"] = json!(rate);
        ctx.metrics.gauge("flowrun_gate_win_ratio", &labels).set(rate);
    }
    ctx.metrics.gauge("flowrun_gate_passed", &labels).set(f64::from(u8::from(passed)));
    ctx.event("gate", verdict.clone());
    ctx.summary("gate", verdict);
    if tally.unreadable > 0 {
        let (unreadable, prompts) = (tally.unreadable, tally.prompts);
        tracing::warn!(
            stage = ctx.stage,
            "{unreadable} of {prompts} comparisons could not be read and don't count; give the judge more \
             max_new_tokens, another prompt, or read = \"logits\""
        );
    }
    let Some(failure) = failure else { return Ok(()) };
    let reason = format!("round {} of `{}` {failure}", ctx.round, checked.trainer);
    tracing::warn!(stage = ctx.stage, "{reason}");
    ctx.reject_adapter(&checked.trainer);
    if checked.otherwise == Otherwise::Stop {
        ctx.stop_after_round(reason);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_not_read_is_no_evidence() {
        let tally = |prompts, unreadable, wins| Tally { prompts, unreadable, wins, ..Tally::default() };
        assert_eq!(tally(4, 0, 2.0).rate(), Some(0.5));
        assert_eq!(tally(6, 2, 3.0).rate(), Some(0.75), "of those that were read");
        assert_eq!(tally(6, 6, 0.0).rate(), None);
        for (tally, threshold, passes) in [
            (tally(4, 0, 2.0), 0.5, true),
            (tally(4, 0, 1.5), 0.5, false),
            (tally(6, 2, 2.0), 0.5, true),
            (tally(6, 5, 1.0), 1.0, true),
            (tally(6, 6, 0.0), 0.5, false),
            (tally(6, 6, 0.0), 0.0, false),
        ] {
            assert_eq!(tally.failure(threshold).is_none(), passes, "{tally:?} {threshold}");
        }
    }
}
