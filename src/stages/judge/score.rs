//! `method = "score"`: every answer by itself.

use std::sync::Arc;

use datafusion::arrow::array::{ArrayRef, Float64Array, ListBuilder, StringBuilder, UInt32Array};
use datafusion::arrow::datatypes::{DataType, Field, Schema, SchemaRef};
use datafusion::arrow::record_batch::RecordBatch;

use super::panel::Panel;
use crate::engine::StageError;
use crate::judge::score::{self, Scale, Score};
use crate::llm::Sampling;
use crate::model::chat::ChatMessage;
use crate::stages::answerer::Answer;
use crate::stages::rows::RowError;
use crate::stages::{chat, columns};

/// How a judge with `method = "score"` asks.
#[derive(Debug)]
pub struct Scoring {
    pub scale: Scale,
    /// `None` reads the expected score in the probabilities.
    pub written: Option<Written>,
}

/// A judge that writes its score, several times where it draws.
#[derive(Debug)]
pub struct Written {
    pub samples: u32,
    pub sampling: Sampling,
}

/// The input's columns, then the score's.
pub fn scored_schema(input: &SchemaRef) -> SchemaRef {
    let mut fields: Vec<Field> = input.fields().iter().map(|f| f.as_ref().clone()).collect();
    fields.extend([
        Field::new("score", DataType::Float64, true),
        Field::new("score_variance", DataType::Float64, true),
        Field::new("score_samples", DataType::UInt32, true),
        Field::new("judge_generations", DataType::new_list(DataType::Utf8, true), true),
        Field::new("judge_finish_reasons", DataType::new_list(DataType::Utf8, true), true),
    ]);
    Arc::new(Schema::new(fields))
}

/// What one answer came to, with what the judges wrote.
pub type Given = (Option<Score>, Vec<Answer>);

impl Scoring {
    /// Answers to one prompt with their scores. Their places among the row's answers begin at `first`.
    pub async fn judge(
        &self,
        panel: &Panel,
        row: u64,
        first: u32,
        rows: &RecordBatch,
    ) -> Result<RecordBatch, RowError> {
        let prompt = chat::as_text(&chat::prompt(rows, 0)?.messages);
        let answers = columns::strings(rows, "generation")?;
        let asked = (0..rows.num_rows()).map(|i| self.score(panel, row, first + i as u32, &prompt, answers.value(i)));
        let given = futures::future::try_join_all(asked).await?;
        Ok(to_batch(rows, &given)?)
    }

    /// Answer number `place` of a row.
    pub async fn score(
        &self,
        panel: &Panel,
        row: u64,
        place: u32,
        prompt: &str,
        answer: &str,
    ) -> Result<Given, RowError> {
        let question = &self.scale.ask(prompt, answer);
        let Some(Written { samples, sampling }) = &self.written else {
            let labels = &self.scale.labels();
            let given = panel.each(|judge| panel.weigh(judge, &question.text, labels)).await?;
            let scores: Vec<_> = given.iter().map(|logprobs| self.scale.expected(logprobs)).collect();
            return Ok((score::mean_of(&scores), Vec::new()));
        };
        let first = place * samples;
        let conversation = &[ChatMessage::new("user", question.text.as_str())];
        let ask = |judge| panel.write(judge, row, conversation.into(), first..first + samples, sampling.clone());
        let answers = panel.each(ask).await?;
        let of_judge = |answers: &Vec<Answer>| {
            let read: Vec<_> = answers.iter().map(|answer| self.scale.read(question, answer.said())).collect();
            score::of_samples(&read)
        };
        let scores: Vec<_> = answers.iter().map(of_judge).collect();
        Ok((score::mean_of(&scores), answers.into_iter().flatten().collect()))
    }
}

/// The rows with their scores, in [`scored_schema`]'s order; no score where nothing could be read.
fn to_batch(rows: &RecordBatch, given: &[Given]) -> Result<RecordBatch, StageError> {
    let each = |of: fn(&Answer) -> &str| {
        let mut lists = ListBuilder::new(StringBuilder::new());
        for (_, answers) in given {
            answers.iter().for_each(|answer| lists.values().append_value(of(answer)));
            lists.append(!answers.is_empty());
        }
        Arc::new(lists.finish())
    };
    let scores = || given.iter().map(|(score, _)| *score);
    let mut out = rows.columns().to_vec();
    out.extend([
        Arc::new(scores().map(|s| s.map(|s| s.mean)).collect::<Float64Array>()) as ArrayRef,
        Arc::new(scores().map(|s| s.map(|s| s.variance)).collect::<Float64Array>()),
        Arc::new(UInt32Array::from_iter_values(scores().map(|s| s.map_or(0, |s| s.samples)))),
        each(|answer| &answer.text),
        each(|answer| answer.finish),
    ]);
    RecordBatch::try_new(scored_schema(&rows.schema()), out).map_err(|e| StageError::internal(format!("scores: {e}")))
}
