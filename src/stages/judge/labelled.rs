//! A fixed set of labelled examples that a judge is measured on, once a round.
//!
//! Its own score may rise while it gets worse; how often it says what people said of the same answers can't.

use std::path::{Path, PathBuf};

use datafusion::arrow::array::{Array, AsArray};
use datafusion::arrow::compute::cast;
use datafusion::arrow::datatypes::{DataType, Float64Type};
use datafusion::arrow::record_batch::RecordBatch;
use serde_json::{Value, json};

use super::pairwise::Coins;
use super::panel::Panel;
use super::{Asking, Judging};
use crate::data::batch::visible;
use crate::data::shard::Geometry;
use crate::data::source::Read;
use crate::data::{DataError, Source, SourceSpec};
use crate::engine::{StageContext, StageError};
use crate::flow::Flow;
use crate::judge::interval::wilson;
use crate::judge::pairs::kendall;
use crate::stages::rows::RowError;
use crate::stages::{chat, columns};

/// Examples that are judged at once.
const WINDOW: usize = 16;

/// The file in the stage's directory that keeps the outcome.
const KEPT: &str = "labelled.json";

/// Where the examples are.
#[derive(Debug)]
pub struct Labelled {
    /// The hash of its rows.
    pub content: String,
    spec: SourceSpec,
    base: PathBuf,
}

impl Labelled {
    /// Looks at the file; an error's message is for the user.
    pub async fn check(dataset: &str, flow: &Flow, method: &Asking) -> Result<Self, String> {
        let spec = SourceSpec { dataset: dataset.to_owned(), login: flow.hub, ..SourceSpec::default() };
        let source = Source::open(&spec, &flow.base).await.map_err(|e| e.message)?;
        let needed = match method {
            Asking::Pairwise(_) => &["prompt", "a", "b", "verdict"][..],
            _ => &["prompt", "generation", "score"],
        };
        match needed.iter().find(|name| source.schema().column_with_name(name).is_none()) {
            Some(missing) => {
                let there = visible(source.schema()).join(", ");
                let needed = needed.join(", ");
                Err(format!("{dataset} has no column {missing:?}; it has {there}, and a labelled row has {needed}"))
            }
            None => Ok(Self { content: source.content().map_err(|e| e.message)?, spec, base: flow.base.clone() }),
        }
    }

    /// How far the judge agrees with the labels. Kept in the stage's directory, so that a run that is gone on with
    /// does not ask again.
    pub async fn agreement(
        &self,
        ctx: &StageContext,
        panel: &Panel,
        coins: &Coins,
        judging: &Judging,
    ) -> Result<Value, StageError> {
        let source = Source::open(&self.spec, &self.base).await?;
        let key = format!("{} {}", panel.content_key, source.content()?);
        let file = ctx.dir.join(KEPT);
        if let Some(kept) = kept(&file, &key) {
            return Ok(kept);
        }
        let examples = read(&source).await?;
        let mut given = Vec::with_capacity(examples.len());
        for (number, chunk) in examples.chunks(WINDOW).enumerate() {
            let asked = chunk.iter().zip(number * WINDOW..).map(|(example, i)| ask(panel, coins, judging, i, example));
            given.extend(futures::future::join_all(asked).await);
        }
        let mut pairs = Vec::with_capacity(given.len());
        for outcome in given {
            match outcome {
                Ok(pair) => pairs.push(pair),
                // An example that can't be judged says nothing of the judge.
                Err(RowError::DeadLetter(reason)) => tracing::warn!(stage = ctx.stage, reason, "a labelled example"),
                Err(RowError::Stage(error)) => return Err(error),
            }
        }
        let outcome = match &judging.method {
            Asking::Pairwise(_) => of_verdicts(&pairs),
            _ => of_scores(&pairs),
        };
        let text = json!({ "key": key, "agreement": outcome }).to_string();
        std::fs::write(&file, text).map_err(|e| StageError::external(format!("{}: {e}", file.display())))?;
        Ok(outcome)
    }
}

fn kept(file: &Path, key: &str) -> Option<Value> {
    let kept: Value = serde_json::from_slice(&std::fs::read(file).ok()?).ok()?;
    (kept["key"] == key).then(|| kept["agreement"].clone())
}

async fn read(source: &Source) -> Result<Vec<RecordBatch>, DataError> {
    let total = source.count().await?;
    let mut rows = source.rows(Geometry { index: 0, count: 1, contiguous: false, total }).await?;
    let mut examples = Vec::new();
    while let Some(Read { batch, refused, .. }) = rows.next().await? {
        for refused in refused {
            tracing::warn!(row = refused.row, reason = refused.reason, "a labelled example");
        }
        examples.extend((0..batch.num_rows()).map(|i| batch.slice(i, 1)));
    }
    Ok(examples)
}

/// The label and what the judge says, as numbers: 1, 0 and one half for a, b and a tie.
async fn ask(
    panel: &Panel,
    coins: &Coins,
    judging: &Judging,
    place: usize,
    example: &RecordBatch,
) -> Result<(f64, Option<f64>), RowError> {
    let prompt = chat::as_text(&chat::prompt(example, 0)?.messages);
    // Numbers that no source has: examples draw from streams of their own.
    let row = u64::MAX - place as u64;
    match &judging.method {
        Asking::Pairwise(pairwise) => {
            let [a, b, label] = ["a", "b", "verdict"].map(|name| columns::strings(example, name));
            let (a, b, label) = (a?, b?, label?);
            let label = match label.value(0) {
                "a" => 1.0,
                "b" => 0.0,
                "tie" => 0.5,
                other => return Err(RowError::DeadLetter(format!("its verdict is {other:?}, not a, b or tie"))),
            };
            let asked = pairwise.ask(panel, coins, row, 0, &prompt, a.value(0), b.value(0)).await?;
            Ok((label, asked.reading.parsed.then(|| asked.reading.verdict.for_a())))
        }
        Asking::Score(scoring) => {
            let label = number(example, "score")?;
            let answer = columns::strings(example, "generation")?;
            let (score, _) = scoring.score(panel, row, 0, &prompt, answer.value(0)).await?;
            Ok((label, score.map(|s| s.mean)))
        }
        Asking::Rule(_) => Err(StageError::internal("a rule has no labelled set").into()),
    }
}

fn number(example: &RecordBatch, name: &str) -> Result<f64, RowError> {
    let column = example.column_by_name(name).and_then(|c| cast(c, &DataType::Float64).ok());
    let value = column.as_ref().and_then(|c| c.as_primitive_opt::<Float64Type>()).filter(|c| c.is_valid(0));
    value.map(|c| c.value(0)).ok_or_else(|| RowError::DeadLetter(format!("its {name} is no number")))
}

/// The share of examples with the label's verdict.
fn of_verdicts(pairs: &[(f64, Option<f64>)]) -> Value {
    let n = pairs.len() as f64;
    let agreed = pairs.iter().filter(|(label, said)| *said == Some(*label)).count() as f64;
    let [low, high] = wilson(agreed, n);
    json!({
        "examples": pairs.len(),
        "unreadable": pairs.iter().filter(|(_, said)| said.is_none()).count(),
        "agreement": (n > 0.0).then(|| agreed / n),
        "agreement_low": low,
        "agreement_high": high,
    })
}

/// How alike both rank the examples, and how far apart their scores are.
fn of_scores(pairs: &[(f64, Option<f64>)]) -> Value {
    let read: Vec<(f64, f64)> = pairs.iter().filter_map(|(label, said)| Some((*label, (*said)?))).collect();
    let (labels, said): (Vec<f64>, Vec<f64>) = read.iter().copied().unzip();
    let error = read.iter().map(|(label, said)| (label - said).abs()).sum::<f64>() / read.len() as f64;
    json!({
        "examples": pairs.len(),
        "unreadable": pairs.len() - read.len(),
        "kendall": kendall(&labels, &said),
        "mean_error": error.is_finite().then_some(error),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn agreement_is_of_all_examples_and_a_rank_correlation_of_those_that_were_read() {
        let verdicts = of_verdicts(&[(1.0, Some(1.0)), (0.0, Some(1.0)), (0.5, Some(0.5)), (1.0, None)]);
        assert_eq!((&verdicts["agreement"], &verdicts["unreadable"]), (&json!(0.5), &json!(1)));
        let scores = of_scores(&[(1.0, Some(2.0)), (3.0, Some(3.0)), (5.0, Some(4.0)), (2.0, None)]);
        assert_eq!((&scores["kendall"], &scores["unreadable"]), (&json!(1.0), &json!(1)));
        assert!((scores["mean_error"].as_f64().unwrap() - 2.0 / 3.0).abs() < 1e-12);
        assert!(of_scores(&[])["mean_error"].is_null());
    }
}
