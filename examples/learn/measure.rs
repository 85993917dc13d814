//! What is read of a finished run: accuracies, and how far a judge agrees with the rule.

use std::collections::BTreeMap;
use std::error::Error;

use flowrun::arrow::array::{Array, AsArray, StringArray};
use flowrun::arrow::datatypes::{DataType, Float64Type, UInt32Type, UInt64Type};
use flowrun::arrow::record_batch::RecordBatch;
use flowrun::engine::Summary;
use regex::Regex;

/// Right answers of a task.
#[derive(Debug, Clone, Copy, Default)]
pub struct Accuracy {
    pub questions: usize,
    /// The last word is the answer.
    pub right: usize,
    /// The answer stands anywhere.
    pub lenient: usize,
    /// Nothing else was said.
    pub bare: usize,
}

impl Accuracy {
    pub fn share(&self) -> f64 {
        self.right as f64 / self.questions as f64
    }

    pub fn lenient_share(&self) -> f64 {
        self.lenient as f64 / self.questions as f64
    }
}

/// By task, from the answers that a stage keeps.
pub fn accuracies(run: &Summary, round: u32, stage: &str) -> Result<BTreeMap<String, Accuracy>, Box<dyn Error>> {
    let mut tasks: BTreeMap<String, Accuracy> = BTreeMap::new();
    for batch in run.table(round, stage, "")? {
        let [task, answer, said] = ["task", "answer", "generation"].map(|name| strings(&batch, name));
        let (task, answer, said) = (task?, answer?, said?);
        for i in 0..batch.num_rows() {
            let word = regex::escape(answer.value(i));
            let found = |pattern: String| Regex::new(&pattern).map(|regex| regex.is_match(said.value(i)));
            let of_task = tasks.entry(task.value(i).to_owned()).or_default();
            of_task.questions += 1;
            of_task.right += usize::from(found(format!(r"(?i)\b{word}\W*$"))?);
            of_task.lenient += usize::from(found(format!(r"(?i)\b{word}\b"))?);
            of_task.bare += usize::from(said.value(i).trim() == answer.value(i));
        }
    }
    Ok(tasks)
}

/// The mean over tasks.
pub fn mean(tasks: &BTreeMap<String, Accuracy>, of: impl Fn(&Accuracy) -> f64) -> f64 {
    tasks.values().map(of).sum::<f64>() / tasks.len() as f64
}

/// Of the pairs that the rule tells apart: how many the judge does, and how many as the rule does.
#[derive(Debug, Clone, Copy, Default)]
pub struct Agreement {
    pub pairs: usize,
    pub ties: usize,
    pub agreed: usize,
}

/// Verdicts of the stage `judge` against the scores of the stage `correct`.
pub fn agreement(run: &Summary, round: u32) -> Result<Agreement, Box<dyn Error>> {
    let mut scores: BTreeMap<(u64, u32), f64> = BTreeMap::new();
    for batch in run.table(round, "correct", "")? {
        let rows = column(&batch, "_row", &DataType::UInt64)?;
        let candidates = column(&batch, "_candidate", &DataType::UInt32)?;
        let values = column(&batch, "score", &DataType::Float64)?;
        let (rows, candidates) = (rows.as_primitive::<UInt64Type>(), candidates.as_primitive::<UInt32Type>());
        for i in 0..batch.num_rows() {
            scores.insert((rows.value(i), candidates.value(i)), values.as_primitive::<Float64Type>().value(i));
        }
    }
    let mut found = Agreement::default();
    for batch in run.table(round, "judge", "")? {
        let rows = column(&batch, "_row", &DataType::UInt64)?;
        let [a, b] = ["a_candidate", "b_candidate"].map(|name| column(&batch, name, &DataType::UInt32));
        let (a, b, verdicts) = (a?, b?, strings(&batch, "verdict")?);
        for i in 0..batch.num_rows() {
            let row = rows.as_primitive::<UInt64Type>().value(i);
            let score = |side: &dyn Array| scores.get(&(row, side.as_primitive::<UInt32Type>().value(i)));
            let (Some(a), Some(b)) = (score(a.as_ref()), score(b.as_ref())) else { continue };
            if a == b {
                continue;
            }
            found.pairs += 1;
            match verdicts.value(i) {
                "tie" => found.ties += 1,
                verdict => found.agreed += usize::from((verdict == "a") == (a > b)),
            }
        }
    }
    Ok(found)
}

fn column(batch: &RecordBatch, name: &str, kind: &DataType) -> Result<std::sync::Arc<dyn Array>, Box<dyn Error>> {
    let column = batch.column_by_name(name).ok_or_else(|| format!("no column {name}"))?;
    Ok(flowrun::arrow::compute::cast(column, kind)?)
}

fn strings(batch: &RecordBatch, name: &str) -> Result<StringArray, Box<dyn Error>> {
    Ok(column(batch, name, &DataType::Utf8)?.as_string::<i32>().clone())
}
