//! A stage kind of your own, with rows that come from the program and go back to it.
//!
//! `words` counts the words of each prompt under a journal: run it twice with the same directory
//! and the second time nothing is counted.
//!
//! `cargo run --example custom_stage -- /tmp/words "a prompt" "another, longer prompt"`

use std::error::Error;
use std::sync::Arc;

use flowrun::arrow::array::{ArrayRef, AsArray, StringArray, UInt64Array};
use flowrun::arrow::datatypes::{DataType, Field, Schema, SchemaRef};
use flowrun::arrow::record_batch::RecordBatch;
use flowrun::embed::{Engine, FlowBuilder, RunOptions, feed};
use flowrun::engine::{Runnable, Stage, StageContext, StageError};
use flowrun::flow::kind::ONE_INPUT;
use flowrun::flow::{CheckContext, FlowError, Form, InputKey, Port, StageKind, StagePlan};
use flowrun::stages::rows::{RowError, each_row};
use futures::future::BoxFuture;
use serde_json::json;

/// The kind: its name, its inputs, and what can be known of a stage before it runs.
struct Words;

impl StageKind for Words {
    fn name(&self) -> &'static str {
        "words"
    }

    fn inputs(&self) -> &'static [InputKey] {
        ONE_INPUT
    }

    fn check<'a>(&'a self, cx: CheckContext<'a>) -> BoxFuture<'a, Result<StagePlan, FlowError>> {
        Box::pin(async move {
            let input = cx.inputs.first().and_then(|input| input.schema.as_ref());
            if input.is_some_and(|schema| schema.column_with_name("prompt").is_none()) {
                return Err(cx.error("input", "has no column `prompt`, whose words are counted"));
            }
            Ok(StagePlan {
                outputs: vec![Port { name: String::new(), schema: input.map(with_words), rows: None }],
                waits_for_round: false,
                new_rows: false,
                models: Vec::new(),
                trains: None,
                // Every key that decides the rows, and this kind has none: `Form::table([("key", value.form())])`.
                // Where the code itself comes to make other rows, `StageKind::results` is raised.
                fingerprint: Form::Unset,
                notes: Vec::new(),
                options: Arc::new(()),
            })
        })
    }
}

fn with_words(schema: &SchemaRef) -> SchemaRef {
    let count = Arc::new(Field::new("words", DataType::UInt64, false));
    Arc::new(Schema::new(schema.fields().iter().cloned().chain([count]).collect::<Vec<_>>()))
}

impl Runnable for Words {
    fn open(&self, _stage: &str, _plan: &StagePlan) -> Result<Box<dyn Stage>, StageError> {
        Ok(Box::new(WordsStage))
    }
}

/// One stage in one round.
struct WordsStage;

impl Stage for WordsStage {
    fn run<'a>(&'a mut self, ctx: &'a mut StageContext) -> BoxFuture<'a, Result<(), StageError>> {
        Box::pin(async move {
            // Rows that were recorded under this key are sent again; `count` sees only the others.
            ctx.open_journal("words 1")?;
            each_row(ctx, 64, |_row, rows| count(rows), |_| ()).await
        })
    }
}

/// All rows of one source row. An error of [`RowError::DeadLetter`] gives up that row alone.
async fn count(rows: RecordBatch) -> Result<Option<RecordBatch>, RowError> {
    let Some(prompts) = rows.column_by_name("prompt").and_then(|c| c.as_string_opt::<i32>()) else {
        return Err(RowError::DeadLetter("prompt is no text".into()));
    };
    let words = prompts.iter().map(|prompt| prompt.unwrap_or_default().split_whitespace().count() as u64);
    let words: ArrayRef = Arc::new(UInt64Array::from_iter_values(words));
    let columns = rows.columns().iter().cloned().chain([words]).collect();
    let made = RecordBatch::try_new(with_words(&rows.schema()), columns);
    made.map(Some).map_err(|e| RowError::Stage(StageError::internal(e.to_string())))
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let dir = arguments.next().ok_or("name a run directory, then prompts")?;
    let prompts: ArrayRef = Arc::new(StringArray::from_iter_values(arguments));
    let prompts = RecordBatch::try_from_iter([("prompt", prompts)])?;

    let engine = Engine::new().with_kind(Words);
    let flow = FlowBuilder::new("words")
        .stage("prompts", "feed", json!({}))
        .stage("counted", "words", json!({ "input": "prompts" }))
        .stage(
            "long",
            "mapper",
            json!({ "input": "counted", "sql": "SELECT prompt, words FROM input WHERE words > 1" }),
        )
        .stage("out", "tap", json!({ "input": "long" }))
        .build(".", &engine)?;
    let (feeder, rows) = feed(prompts.schema());
    let mut options = RunOptions::new(dir).feed("prompts", rows);
    let mut out = options.tap("out");
    let run = engine.start(&flow, options).await?;

    feeder.send(prompts).await.map_err(|_| "the run wants no rows")?;
    drop(feeder);
    while let Some((_round, batch)) = out.next().await {
        println!("{}", flowrun::arrow::util::pretty::pretty_format_batches(&[batch])?);
    }
    let summary = run.wait().await;
    let counted = &summary.rounds()?[0].stages["counted"];
    println!("{} prompts, {} of them counted before", counted.rows_in, counted.reused_rows);
    Ok(())
}
