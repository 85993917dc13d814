//! `split`: rows to several outputs, each row and all that descends from it to one.

use std::sync::Arc;

use futures::future::BoxFuture;
use serde::Deserialize;

use crate::data::shard::Geometry;
use crate::data::split::By;
use crate::data::{Split, batch};
use crate::engine::context::Shard;
use crate::engine::{Message, Runnable, Stage, StageContext, StageError};
use crate::flow::kind::{InputKey, ONE_INPUT};
use crate::flow::{Canonical, CheckContext, FlowError, Form, Port, RowBound, StageKind, StagePlan};

pub struct SplitKind;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Options {
    outputs: toml::Table,
    #[serde(default)]
    by: By,
}

impl From<Shard> for Geometry {
    fn from(s: Shard) -> Self {
        Self { index: s.index, count: s.count, contiguous: s.contiguous, total: s.total }
    }
}

impl StageKind for SplitKind {
    fn name(&self) -> &'static str {
        "split"
    }

    fn inputs(&self) -> &'static [InputKey] {
        ONE_INPUT
    }

    fn check<'a>(&'a self, cx: CheckContext<'a>) -> BoxFuture<'a, Result<StagePlan, FlowError>> {
        Box::pin(async move { check(&cx) })
    }
}

fn check(cx: &CheckContext<'_>) -> Result<StagePlan, FlowError> {
    let options: Options = cx.options()?;
    let shares: Vec<(String, String)> = options.outputs.iter().map(|(name, v)| (name.clone(), v.to_string())).collect();
    if let Some((name, _)) = shares.iter().find(|(name, _)| !is_name(name)) {
        return Err(cx.error("outputs", format!("\"{name}\" is no name for an output; use a-z, 0-9 and _")));
    }
    let split = Split::new(&shares, options.by).map_err(|e| cx.error("outputs", e.message))?;
    let (schema, rows) = cx.inputs.first().map(|i| (i.schema.clone(), i.rows)).unwrap_or_default();
    let port = |(name, side): (&String, usize)| {
        let share = |rows: RowBound| RowBound { sources: rows.sources.min(split.count(side, rows.shard)), ..rows };
        Port { name: name.clone(), schema: schema.clone(), rows: rows.map(share) }
    };
    let outputs: Vec<Port> = split.names().iter().zip(0..).map(port).collect();
    if let Some((port, rows)) =
        outputs.iter().find_map(|p| p.rows.filter(|rows| rows.sources == 0).map(|rows| (p, rows)))
    {
        let message = format!("no row of a round's {} goes to `{}`", rows.shard, port.name);
        return Err(cx.error("outputs", message).help("give it a larger share, or more rows to the round"));
    }
    Ok(StagePlan {
        outputs,
        waits_for_round: false,
        new_rows: false,
        models: Vec::new(),
        trains: None,
        fingerprint: Form::table([("outputs", shares.form()), ("by", options.by.form())]),
        notes: Vec::new(),
        options: Arc::new(split),
    })
}

fn is_name(text: &str) -> bool {
    text.starts_with(|c: char| c.is_ascii_lowercase())
        && text.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_')
}

/// Returns whether a plan is that of a split, whose rows are those of its input.
pub fn is_split(plan: &StagePlan) -> bool {
    plan.options.is::<Split>()
}

impl Runnable for SplitKind {
    fn open(&self, stage: &str, plan: &StagePlan) -> Result<Box<dyn Stage>, StageError> {
        let split = plan.options.clone().downcast::<Split>();
        let split = split.map_err(|_| StageError::internal(format!("{stage}: opened with another kind's options")))?;
        Ok(Box::new(SplitStage { split }))
    }
}

struct SplitStage {
    split: Arc<Split>,
}

impl Stage for SplitStage {
    fn run<'a>(&'a mut self, ctx: &'a mut StageContext) -> BoxFuture<'a, Result<(), StageError>> {
        Box::pin(run(&self.split, ctx))
    }
}

async fn run(split: &Split, ctx: &mut StageContext) -> Result<(), StageError> {
    let mut rows = vec![0; split.names().len()];
    while let Some(message) = ctx.input("input").recv().await? {
        let shard = ctx.shard().map(Geometry::from);
        let parts = parted(split, shard, &message)?;
        for ((name, part), count) in split.names().iter().zip(parts).zip(&mut rows) {
            *count += part.rows();
            ctx.output.send(name, part).await?;
        }
    }
    let total: usize = rows.iter().sum();
    match split.names().iter().zip(&rows).find(|(_, count)| **count == 0) {
        Some((name, _)) => Err(StageError::user(format!(
            "{}: no row went to `{name}` ({total} rows in); give it a larger share, or more rows to the round",
            ctx.stage
        ))),
        None => Ok(()),
    }
}

/// One message for every output: its own rows, and what all of them may know as complete.
fn parted(split: &Split, shard: Option<Geometry>, message: &Message) -> Result<Vec<Message>, StageError> {
    let marks = || Message { batch: None, completes: message.completes.clone(), watermark: message.watermark };
    let mut parts: Vec<Message> = split.names().iter().map(|_| marks()).collect();
    let Some(batch) = message.batch.as_ref().filter(|b| b.num_rows() > 0) else { return Ok(parts) };
    let shard =
        shard.ok_or_else(|| StageError::internal("rows came before their source said which shard they are of"))?;
    let mut sides = Vec::with_capacity(batch.num_rows());
    for &row in batch::row_numbers(batch)?.values() {
        let k = shard
            .ordinal(row)
            .ok_or_else(|| StageError::internal(format!("row {row} is not of this round's shard")))?;
        sides.push(split.side(k, shard.rows()));
    }
    for (part, rows) in parts.iter_mut().zip(split.parts(batch, &sides)?) {
        part.batch = rows;
    }
    Ok(parts)
}

#[cfg(test)]
mod tests {
    use datafusion::arrow::array::{ArrayRef, UInt64Array};
    use datafusion::arrow::record_batch::RecordBatch;

    use super::*;

    #[test]
    fn rows_of_one_source_row_stay_together_and_all_are_completed() {
        let shares = [("train".into(), "0.9".into()), ("validation".into(), "0.1".into())];
        let split = Split::new(&shares, By::Spread).unwrap();
        // Round 2 of 3 over 90 rows; two pairs of each row.
        let shard = Geometry { index: 1, count: 3, contiguous: false, total: 90 };
        let rows: Vec<u64> = (0..30).flat_map(|k| [3 * k + 1, 3 * k + 1]).collect();
        let column: ArrayRef = Arc::new(UInt64Array::from(rows.clone()));
        let batch = RecordBatch::try_from_iter([("_row", column)]).unwrap();
        let message = Message { batch: Some(batch), completes: rows.clone(), watermark: 89 };
        let parts = parted(&split, Some(shard), &message).unwrap();
        let own = |i: usize| batch::row_numbers(parts[i].batch.as_ref().unwrap()).unwrap().values().to_vec();
        assert_eq!(own(1), [28, 28, 58, 58, 88, 88]);
        assert_eq!(own(0).len(), 54);
        assert!(parts.iter().all(|p| p.completes == rows && p.watermark == 89));
    }
}
