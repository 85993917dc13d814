//! `mapper`: SQL over rows. Row by row where the query allows, else once over the whole round.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;

use datafusion::arrow::datatypes::SchemaRef;
use datafusion::arrow::record_batch::RecordBatch;
use futures::future::BoxFuture;
use serde::Deserialize;

use super::rows::{apply_or_give_up, without};
use crate::data::source::BATCH_ROWS;
use crate::data::table::{self, TableFormat};
use crate::data::{Query, batch};
use crate::engine::context::Shard;
use crate::engine::{Message, Runnable, Stage, StageContext, StageError};
use crate::flow::kind::InputKey;
use crate::flow::{Canonical, CheckContext, FlowError, Form, InputRef, Port, StageKind, StagePlan};

pub struct MapperKind;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Options {
    sql: String,
}

const INPUTS: &[InputKey] = &[InputKey { name: "input", required: true, many: true }];

impl StageKind for MapperKind {
    fn name(&self) -> &'static str {
        "mapper"
    }

    fn inputs(&self) -> &'static [InputKey] {
        INPUTS
    }

    fn check<'a>(&'a self, cx: CheckContext<'a>) -> BoxFuture<'a, Result<StagePlan, FlowError>> {
        Box::pin(check(cx))
    }
}

async fn check(cx: CheckContext<'_>) -> Result<StagePlan, FlowError> {
    let options: Options = cx.options()?;
    let tables = table_names(cx.inputs.iter().map(|i| &i.from));
    let known: Option<Vec<(&str, SchemaRef)>> =
        tables.iter().zip(cx.inputs).map(|(name, input)| Some((name.as_str(), input.schema.clone()?))).collect();
    let mut notes = Vec::new();
    let (schema, waits, new_rows, rows) = match known {
        None => {
            notes.push(format!("not checked: the query of {}", cx.stage.name));
            (None, cx.inputs.len() > 1, true, None)
        }
        Some(inputs) => {
            let query = Query::plan(&options.sql, &inputs).await.map_err(|e| cx.error("sql", e.message))?;
            if let Some((column, why)) = unwritable(&cx, query.schema()) {
                let message = format!("column `{column}` can't be written: {why}");
                return Err(cx.error("sql", message).help("leave it out, or cast it to another type"));
            }
            let waits = !query.row_wise() || inputs.len() > 1;
            if waits {
                notes.push("waits for the round".into());
            }
            if query.volatile() {
                notes.push("uses random() or now(): a resumed run makes other rows".into());
            }
            // Where it waits, rows of one source row may come together with those of others.
            let rows = (!waits && !query.unnests()).then(|| cx.inputs.first()?.rows).flatten();
            // Of several inputs, the stage says itself whose rows its own are.
            (Some(query.schema().clone()), waits, query.rows_of().is_none() || inputs.len() > 1, rows)
        }
    };
    Ok(StagePlan {
        outputs: vec![Port { name: String::new(), schema, rows }],
        waits_for_round: waits,
        new_rows,
        models: Vec::new(),
        trains: None,
        fingerprint: Form::table([("sql", options.sql.form()), ("tables", tables.form())]),
        notes,
        options: Arc::new(options.sql),
    })
}

/// A column that the stage's own table can't hold.
fn unwritable(cx: &CheckContext<'_>, schema: &SchemaRef) -> Option<(String, String)> {
    table::unwritable(TableFormat::Parquet, schema).filter(|_| cx.stage.table)
}

/// `input` where there is one, else the names of the stages (`halves_train` for a port).
fn table_names<'a>(inputs: impl ExactSizeIterator<Item = &'a InputRef>) -> Vec<String> {
    if inputs.len() == 1 {
        return vec!["input".into()];
    }
    let name = |i: &InputRef| if i.port.is_empty() { i.stage.clone() } else { format!("{}_{}", i.stage, i.port) };
    inputs.map(name).collect()
}

impl Runnable for MapperKind {
    fn open(&self, stage: &str, plan: &StagePlan) -> Result<Box<dyn Stage>, StageError> {
        let sql = plan.options.clone().downcast::<String>();
        let sql = sql.map_err(|_| StageError::internal(format!("{stage}: opened with another kind's options")))?;
        Ok(Box::new(MapperStage { sql }))
    }
}

struct MapperStage {
    sql: Arc<String>,
}

impl Stage for MapperStage {
    fn run<'a>(&'a mut self, ctx: &'a mut StageContext) -> BoxFuture<'a, Result<(), StageError>> {
        Box::pin(run(&self.sql, ctx))
    }
}

async fn run(sql: &str, ctx: &mut StageContext) -> Result<(), StageError> {
    let tables = table_names(ctx.inputs.iter().map(|i| &i.from));
    if tables.len() > 1 {
        return collect(sql, ctx, &tables, Vec::new()).await;
    }
    // The schema may be known only from the first rows; marks that came before them wait so long.
    let mut early = Vec::new();
    while let Some(message) = ctx.input("input").recv().await? {
        let first = message.batch.as_ref().filter(|b| b.num_rows() > 0).map(RecordBatch::schema);
        early.push(message);
        let Some(schema) = first else { continue };
        let query = Query::plan(sql, &[("input", schema)]).await?;
        return if query.row_wise() { each(query, ctx, early).await } else { collect(sql, ctx, &tables, early).await };
    }
    collect(sql, ctx, &tables, early).await
}

/// Batch in, batch out.
async fn each(mut query: Query, ctx: &mut StageContext, early: Vec<Message>) -> Result<(), StageError> {
    descends_from(ctx, 0);
    let mut dead = HashSet::new();
    for message in early {
        send_mapped(&mut query, ctx, &mut dead, message).await?;
    }
    while let Some(message) = ctx.input("input").recv().await? {
        send_mapped(&mut query, ctx, &mut dead, message).await?;
    }
    Ok(())
}

/// Sends the rows that a query makes of a message. Source rows for which it can't be computed are dead letters.
async fn send_mapped(
    query: &mut Query,
    ctx: &mut StageContext,
    dead: &mut HashSet<u64>,
    message: Message,
) -> Result<(), StageError> {
    let Message { batch, mut completes, watermark } = message;
    let read = match batch.filter(|b| b.num_rows() > 0) {
        Some(batch) => Some(without(&batch, dead)?).filter(|b| b.num_rows() > 0),
        None => None,
    };
    let made = match &read {
        None => None,
        Some(read) => Some(apply_or_give_up(ctx, query, "query", read, dead).await?),
    };
    completes.retain(|row| !dead.contains(row));
    ctx.output.send("", Message { batch: made.filter(|b| b.num_rows() > 0), completes, watermark }).await
}

/// Rows are those of input number `index`, and of its source.
fn descends_from(ctx: &StageContext, index: usize) {
    if let Some(shard) = ctx.shard_of_input(index) {
        ctx.set_shard(shard);
    }
}

/// Reads every input to its end, then runs the query once.
async fn collect(sql: &str, ctx: &mut StageContext, tables: &[String], early: Vec<Message>) -> Result<(), StageError> {
    // Of every input, because only the query says whose rows come out.
    let mut completes: Vec<Vec<u64>> = vec![early.iter().flat_map(|m| m.completes.iter().copied()).collect()];
    let mut read: Vec<Vec<RecordBatch>> = vec![early.into_iter().filter_map(|m| m.batch).collect()];
    completes.resize_with(tables.len(), Vec::new);
    read.resize_with(tables.len(), Vec::new);
    for (input, (batches, completes)) in ctx.inputs.iter_mut().zip(read.iter_mut().zip(&mut completes)) {
        while let Some(message) = input.recv().await? {
            batches.extend(message.batch);
            completes.extend(message.completes);
        }
    }
    let mut planned = Vec::with_capacity(tables.len());
    for ((table, input), batches) in tables.iter().zip(&ctx.inputs).zip(&read) {
        match batches.first().map(RecordBatch::schema).or_else(|| input.schema.clone()) {
            Some(schema) => planned.push((table.as_str(), schema)),
            None if read.iter().all(Vec::is_empty) => {
                descends_from(ctx, 0);
                return send(ctx, Vec::new(), completes.swap_remove(0)).await;
            }
            None => {
                return Err(StageError::user(format!(
                    "{}: `{table}` gave no row, and its columns are not known",
                    ctx.stage
                )));
            }
        }
    }
    let mut query = Query::plan(sql, &planned).await?;
    let made = tokio::select! {
        () = ctx.cancel.cancelled() => return Err(StageError::cancelled()),
        made = query.collect(tables.iter().map(String::as_str).zip(read).collect()) => made?,
    };
    let completes = match query.rows_of().and_then(|table| tables.iter().position(|name| name == table)) {
        Some(index) => {
            descends_from(ctx, index);
            completes.swap_remove(index)
        }
        None => {
            let total = made.iter().map(|b| b.num_rows() as u64).sum();
            ctx.set_shard(Shard { index: 0, count: 1, contiguous: false, total });
            (0..total).collect()
        }
    };
    send(ctx, made, completes).await
}

async fn send(ctx: &mut StageContext, made: Vec<RecordBatch>, completes: Vec<u64>) -> Result<(), StageError> {
    for message in released(&made, completes)? {
        ctx.output.send("", message).await?;
    }
    Ok(())
}

/// Cuts a finished table into messages. Rows may be in any order: each is completed by the last
/// message that holds it, and those without a row by the first message.
fn released(made: &[RecordBatch], completes: Vec<u64>) -> Result<Vec<Message>, StageError> {
    let mut chunks = Vec::new();
    for whole in made {
        for start in (0..whole.num_rows()).step_by(BATCH_ROWS) {
            chunks.push(whole.slice(start, BATCH_ROWS.min(whole.num_rows() - start)));
        }
    }
    let mut last: BTreeMap<u64, usize> = completes.iter().map(|&row| (row, 0)).collect();
    for (place, chunk) in chunks.iter().enumerate() {
        for &row in batch::row_numbers(chunk)?.values() {
            last.insert(row, place);
        }
    }
    let named: HashSet<u64> = completes.into_iter().collect();
    let mut messages: Vec<Message> =
        chunks.into_iter().map(|batch| Message { batch: Some(batch), ..Message::default() }).collect();
    if messages.is_empty() && !named.is_empty() {
        messages.push(Message::default());
    }
    for (&row, &place) in &last {
        if named.contains(&row) {
            messages[place].completes.push(row);
        }
    }
    let mut open = vec![u64::MAX; messages.len()];
    for (&row, &place) in &last {
        open[place] = open[place].min(row);
    }
    let mut lowest = u64::MAX;
    for (message, own) in messages.iter_mut().zip(&open).rev() {
        message.watermark = lowest;
        lowest = lowest.min(*own);
    }
    Ok(messages)
}

#[cfg(test)]
mod tests {
    use datafusion::arrow::array::UInt64Array;

    use super::*;

    #[test]
    fn every_row_is_completed_once_and_never_below_the_watermark() {
        let rows: Vec<u64> = (0..1000u64).map(|i| (i * 7919) % 500 * 2).collect();
        let column: datafusion::arrow::array::ArrayRef = Arc::new(UInt64Array::from(rows.clone()));
        let made = RecordBatch::try_from_iter([("_row", column)]).unwrap();
        let messages = released(&[made], (0..1100).collect()).unwrap();
        let mut done = HashSet::new();
        let mut low = 0;
        for message in &messages {
            for row in batch::row_numbers(message.batch.as_ref().unwrap()).unwrap().values() {
                assert!(*row >= low && !done.contains(row));
            }
            for &row in &message.completes {
                assert!(row >= low && done.insert(row));
            }
            low = message.watermark;
        }
        assert_eq!(done.len(), 1100);
        assert_eq!(low, u64::MAX);
        assert!(released(&[], vec![3]).unwrap()[0].completes == [3]);
        assert!(released(&[], vec![]).unwrap().is_empty());
    }
}
