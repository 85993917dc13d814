//! `method = "pairwise"`: two answers side by side.

use std::sync::{Arc, OnceLock};

use datafusion::arrow::array::{Array, ArrayRef, BooleanArray, Float64Array, StringArray, UInt32Array};
use datafusion::arrow::compute::take;
use datafusion::arrow::datatypes::{DataType, Field, Schema, SchemaRef};
use datafusion::arrow::record_batch::RecordBatch;

use super::panel::Panel;
use crate::data::shard::Geometry;
use crate::engine::StageError;
use crate::engine::context::ShardOfRows;
use crate::judge::pairwise::{self, Combine, Order, PairwisePrompt, Reading, Verdict};
use crate::judge::verdict::End;
use crate::llm::Sampling;
use crate::model::chat::ChatMessage;
use crate::stages::answerer::Answer;
use crate::stages::chat;
use crate::stages::columns::{self, PER_ANSWER};
use crate::stages::rows::{RowError, shared};

/// Columns that a verdict adds.
pub const ADDED: [&str; 16] = [
    "a",
    "b",
    "chosen",
    "rejected",
    "verdict",
    "probability",
    "swapped",
    "parsed",
    "judge_generation",
    "judge_finish_reason",
    "consistent",
    "first_slot",
    "chosen_ids",
    "rejected_ids",
    "chosen_finish_reason",
    "rejected_finish_reason",
];

/// How a judge with `method = "pairwise"` asks.
#[derive(Debug)]
pub struct Pairwise {
    pub prompt: PairwisePrompt,
    /// How it writes; `None` reads the probabilities of the labels.
    pub written: Option<Sampling>,
    pub order: Order,
    pub combine: Combine,
    pub min_gap: f64,
    /// Every two answers, not only neighbours.
    pub all_pairs: bool,
    /// What can't be read is drawn by lot; else it is a tie.
    pub coin: bool,
}

/// Who is shown first, where DataDreamer's coins say so.
pub struct Coins {
    shard: ShardOfRows,
    swaps: OnceLock<Vec<bool>>,
}

impl Coins {
    pub fn new(shard: ShardOfRows) -> Self {
        Self { shard, swaps: OnceLock::new() }
    }

    /// The hash by which the journal knows a row: the content of its answers, of this hash, and which of them is shown first,
    /// which depends on the row's place in the round and on nothing in the row.
    pub fn key(&self, row: u64, hash: u64) -> Result<u64, StageError> {
        Ok(hash ^ (1 + u64::from(self.datadreamer(row)?)))
    }

    /// DataDreamer draws once a row of the round, in order.
    fn datadreamer(&self, row: u64) -> Result<bool, StageError> {
        let shard = self.shard.get().map(Geometry::from);
        let shard = shard.ok_or_else(|| StageError::internal("rows came before their source said their shard"))?;
        let swaps = self.swaps.get_or_init(|| pairwise::datadreamer_swaps(shard.rows() as usize));
        let place = shard.ordinal(row).and_then(|k| swaps.get(k as usize).copied());
        place.ok_or_else(|| StageError::internal(format!("row {row} is not of this round's shard")))
    }
}

/// One pair before it becomes a row.
struct Judged {
    pair: u32,
    a: usize,
    b: usize,
    reading: Reading,
    swapped: bool,
    wrote: Option<Wrote>,
}

/// What the judges made of a pair, and what they wrote.
pub struct Asked {
    pub reading: Reading,
    pub swapped: bool,
    pub wrote: Option<Wrote>,
}

/// All that was written about a pair.
pub struct Wrote {
    text: String,
    /// Of the first text that was cut off, else `stop`.
    finish: &'static str,
}

impl Wrote {
    fn of(answers: &[Answer]) -> Option<Self> {
        let texts: Vec<&str> = answers.iter().map(|answer| answer.text.as_str()).collect();
        let cut = answers.iter().find(|answer| answer.said().end == End::Cut);
        let finish = cut.or(answers.first())?.finish;
        Some(Self { text: texts.join("\n"), finish })
    }
}

impl Pairwise {
    /// One row a pair of the candidates in `rows`, numbered from `first` on; nothing where there is no second
    /// candidate.
    pub async fn judge(
        &self,
        panel: &Panel,
        coins: &Coins,
        row: u64,
        first: u32,
        rows: &RecordBatch,
    ) -> Result<Option<RecordBatch>, RowError> {
        let rows = &shared(rows, |name| PER_ANSWER.contains(&name))?;
        let prompt = chat::as_text(&chat::prompt(rows, 0)?.messages);
        let answers = columns::strings(rows, "generation")?;
        let pairs = pairwise::pairs(rows.num_rows(), self.all_pairs);
        let ask = |(pair, (a, b)): (usize, (usize, usize))| {
            let (prompt, pair, answers) = (&prompt, first + pair as u32, &answers);
            async move {
                let asked = self.ask(panel, coins, row, pair, prompt, answers.value(a), answers.value(b)).await?;
                let Asked { reading, swapped, wrote } = asked;
                Ok::<_, RowError>(Judged { pair, a, b, reading, swapped, wrote })
            }
        };
        let judged = futures::future::try_join_all(pairs.into_iter().enumerate().map(ask)).await?;
        if judged.is_empty() { Ok(None) } else { Ok(Some(to_batch(rows, &answers, &judged)?)) }
    }

    /// The judges' verdict on one pair.
    #[allow(clippy::too_many_arguments)]
    pub async fn ask(
        &self,
        panel: &Panel,
        coins: &Coins,
        row: u64,
        pair: u32,
        prompt: &str,
        a: &str,
        b: &str,
    ) -> Result<Asked, RowError> {
        if a == b {
            return Ok(Asked { reading: Reading::EQUAL, swapped: false, wrote: None });
        }
        let swapped = match self.order {
            Order::Random => pairwise::swap(panel.key, row, pair),
            Order::DataDreamer => coins.datadreamer(row)?,
            Order::Both => false,
        };
        let orders: &[bool] = if self.order == Order::Both { &[false, true] } else { &[swapped] };
        let asked = panel.each(|judge| self.ask_one(panel, judge, row, pair, prompt, [a, b], orders)).await?;
        let (readings, answers): (Vec<_>, Vec<_>) = asked.into_iter().unzip();
        let mut reading = pairwise::combine(&readings, self.combine, self.min_gap);
        if !reading.parsed && self.coin {
            // Of the pair that was shown, not of (a, b): a coin of its own.
            let heads = pairwise::swap(!panel.key, row, pair);
            reading.verdict = if heads { Verdict::A } else { Verdict::B };
        }
        Ok(Asked { reading, swapped, wrote: Wrote::of(&answers.concat()) })
    }

    /// One judge, in each of `orders`.
    #[allow(clippy::too_many_arguments)]
    async fn ask_one(
        &self,
        panel: &Panel,
        judge: u32,
        row: u64,
        pair: u32,
        prompt: &str,
        [a, b]: [&str; 2],
        orders: &[bool],
    ) -> Result<(Reading, Vec<Answer>), RowError> {
        let shown = orders.iter().map(|&swapped| {
            let (first, second) = if swapped { (b, a) } else { (a, b) };
            (swapped, self.prompt.ask(prompt, first, second))
        });
        let Some(sampling) = &self.written else {
            let weigh = |(swapped, question): (bool, crate::judge::Question)| async move {
                let odds = panel.weigh(judge, &question.text, self.prompt.labels()).await?;
                Ok::<_, RowError>((swapped, odds.iter().copied().reduce(|first, second| first - second)))
            };
            let odds = futures::future::try_join_all(shown.map(weigh)).await?;
            let odds: Vec<(bool, f64)> = odds.into_iter().map(|(s, odds)| (s, odds.unwrap_or(f64::NAN))).collect();
            return Ok((pairwise::from_log_odds(&odds, self.min_gap), Vec::new()));
        };
        let write = |(swapped, question): (bool, crate::judge::Question)| async move {
            let place = pair * 2 + u32::from(swapped);
            let conversation = [ChatMessage::new("user", question.text.as_str())];
            let mut answers =
                panel.write(judge, row, (&conversation).into(), place..place + 1, sampling.clone()).await?;
            let answer = answers.pop().ok_or_else(|| StageError::internal("a judge gave no answer"))?;
            Ok::<_, RowError>(((swapped, self.prompt.read(&question, answer.said())), answer))
        };
        let read = futures::future::try_join_all(shown.map(write)).await?;
        let (verdicts, answers): (Vec<_>, Vec<_>) = read.into_iter().unzip();
        Ok((pairwise::from_texts(&verdicts), answers))
    }
}

/// The input's columns without those of one answer, then the verdict's.
pub fn judged_schema(input: &SchemaRef) -> SchemaRef {
    let mut fields: Vec<Field> = input
        .fields()
        .iter()
        .filter(|f| !PER_ANSWER.contains(&f.name().as_str()))
        .map(|f| f.as_ref().clone())
        .collect();
    let text = |name: &str, nullable| Field::new(name, DataType::Utf8, nullable);
    let ids = |name: &str| Field::new(name, DataType::new_list(DataType::UInt32, true), true);
    let has_ids = input.column_with_name("generation_ids").is_some();
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
        text("judge_finish_reason", true),
        Field::new("consistent", DataType::Boolean, true),
        Field::new("first_slot", DataType::Float64, true),
    ]);
    fields.extend(has_ids.then(|| ["chosen_ids", "rejected_ids"].map(ids)).into_iter().flatten());
    let has_reason = input.column_with_name("finish_reason").is_some();
    let reasons = || ["chosen_finish_reason", "rejected_finish_reason"].map(|name| text(name, true));
    fields.extend(has_reason.then(reasons).into_iter().flatten());
    Arc::new(Schema::new(fields))
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
    let wrote = |f: fn(&Wrote) -> &str| judged.iter().map(|j| j.wrote.as_ref().map(f)).collect::<StringArray>();
    out.push(Arc::new(wrote(|w| &w.text)));
    out.push(Arc::new(wrote(|w| w.finish)));
    out.push(Arc::new(judged.iter().map(|j| j.reading.consistent).collect::<BooleanArray>()));
    out.push(Arc::new(judged.iter().map(|j| j.reading.first_slot).collect::<Float64Array>()));
    if rows.column_by_name("generation_ids").is_some() {
        let ids = columns::ids(rows, "generation_ids")?;
        out.extend([picked(&ids, &chosen)?, picked(&ids, &rejected)?]);
    }
    if rows.column_by_name("finish_reason").is_some() {
        let reasons = columns::strings(rows, "finish_reason")?;
        out.extend([picked(&reasons, &chosen)?, picked(&reasons, &rejected)?]);
    }
    RecordBatch::try_new(schema, out).map_err(failed)
}
