//! From rows to pairs: tokens, and the record of what the reference thinks of them.

use std::sync::Arc;

use datafusion::arrow::array::{
    Array, ArrayRef, AsArray, Float64Array, StringArray, StringBuilder, UInt32Array, UInt64Array,
};
use datafusion::arrow::compute::cast;
use datafusion::arrow::datatypes::{DataType, Float64Type, UInt32Type};
use datafusion::arrow::record_batch::RecordBatch;

use super::{Algorithm, Template, TrainerOptions};
use crate::engine::StageError;
use crate::llm::TextModel;
use crate::model::Pretrained;
use crate::stages::rows::RowError;
use crate::stages::{chat, columns};
use crate::train::Pair;
use crate::train::pair::{Answer, Encoded, Prompt, Tokens, Truncated};

/// By how much the judge scored the chosen answer higher, a column of the stage `pairs`.
pub const GAP: &str = "gap";

/// Which input a row came by.
pub const SIDES: [&str; 2] = ["train", "validation"];

/// The pairs of one source row.
#[derive(Debug, Default)]
pub struct RowPairs {
    pub pairs: Vec<Pair>,
    /// Why others were left out.
    pub dropped: Vec<&'static str>,
    /// Answers that lost their end to `max_length`.
    pub cut: u32,
}

/// Tokenises the rows of one source row; reference log-probs are still to be filled in.
pub fn of_rows(options: &TrainerOptions, text: &TextModel, row: u64, rows: &RecordBatch) -> Result<RowPairs, RowError> {
    let model = text.pretrained();
    let max_length = options.max_length.min(model.config.max_position_embeddings);
    let tokens = tokens(model, (options.template, options.add_bos), options.truncated, max_length)?;
    let sft = options.algorithm == Algorithm::Sft;
    let chosen = answers(rows, columns_of(options.algorithm)[0])?;
    // An answer that is learnt by itself has nothing beside it.
    let rejected = if sft { vec![Some(Answer::default()); chosen.len()] } else { answers(rows, "rejected")? };
    // A label compares two answers.
    let labels = if sft { None } else { numbers(rows, "label")? };
    let weights = numbers(rows, "weight")?;
    let gaps = options.odds_margin.map(|_| numbers(rows, GAP)).transpose()?.flatten();
    if options.odds_margin.is_some() && gaps.is_none() {
        let message = format!("odds_margin is a factor of the column {GAP:?}, which the pairs don't have");
        return Err(StageError::user(message).into());
    }
    let mut out = RowPairs::default();
    for (i, (chosen, rejected)) in chosen.into_iter().zip(rejected).enumerate() {
        let (Some(chosen), Some(rejected)) = (chosen, rejected) else {
            out.dropped.push("an answer is missing");
            continue;
        };
        let given = |of: &Option<Float64Array>| of.as_ref().filter(|c| c.is_valid(i)).map(|c| c.value(i));
        let (label, weight) = (given(&labels).unwrap_or(1.0), given(&weights).unwrap_or(1.0));
        let offset = match (options.odds_margin, given(&gaps)) {
            (Some(scale), Some(gap)) => scale * gap,
            (Some(_), None) => f64::NAN,
            (None, _) => 0.0,
        };
        if !offset.is_finite() {
            out.dropped.push("its gap is not a number");
            continue;
        }
        if !(0.0..=1.0).contains(&label) {
            out.dropped.push("its label is not a probability");
            continue;
        }
        if !(weight.is_finite() && weight >= 0.0) {
            out.dropped.push("its weight is not a number from 0 up");
            continue;
        }
        let prompt = prompt(rows, i)?;
        let encoded =
            if sft { tokens.encode_one(&prompt, &chosen) } else { tokens.encode(&prompt, &chosen, &rejected) };
        match encoded.map_err(|e| RowError::DeadLetter(e.to_string()))? {
            Encoded::Pair { prompt, chosen, rejected, cut } => {
                let known = [&prompt, &chosen, &rejected].into_iter().try_for_each(|ids| model.check_known(ids));
                known.map_err(|e| RowError::DeadLetter(e.to_string()))?;
                out.cut += cut;
                let reference = [f64::NAN; 2];
                let ordinal = i as u32;
                let pair = Pair { row, ordinal, prompt, chosen, rejected, reference, label, weight, offset };
                out.pairs.push(pair);
            }
            Encoded::Dropped(reason) => out.dropped.push(reason),
            Encoded::TooLong { prompt } => {
                let limit = tokens.max_length;
                return Err(RowError::DeadLetter(format!(
                    "the prompt alone has {prompt} tokens and max_length is {limit}"
                )));
            }
        }
    }
    Ok(out)
}

/// The columns with the answers; `sft` has one.
pub fn columns_of(algorithm: Algorithm) -> &'static [&'static str] {
    match algorithm {
        Algorithm::Dpo => &["chosen", "rejected"],
        Algorithm::Sft => &["completion"],
    }
}

/// A column of numbers, where it is there.
fn numbers(rows: &RecordBatch, name: &str) -> Result<Option<Float64Array>, StageError> {
    let Some(column) = rows.column_by_name(name) else { return Ok(None) };
    let numbers = cast(column, &DataType::Float64).ok().filter(|_| column.data_type().is_numeric());
    let numbers = numbers.and_then(|c| c.as_primitive_opt::<Float64Type>().cloned());
    let wrong = || StageError::user(format!("column {name:?} of the pairs is {}, not a number", column.data_type()));
    numbers.map(Some).ok_or_else(wrong)
}

/// The rules by which rows become tokens.
pub fn tokens(
    model: &Pretrained,
    (template, add_bos): (Template, Option<bool>),
    truncated: Truncated,
    max_length: usize,
) -> Result<Tokens<'_>, StageError> {
    let (template, end) = match template {
        Template::Chat => (Some(model.chat().map_err(|e| StageError::user(e.to_string()))?), model.turn_end()),
        Template::None => (None, model.end_of_text()),
    };
    Ok(Tokens { tokenizer: &model.tokenizer, template, end, stops: model.stop_ids(), add_bos, truncated, max_length })
}

/// The prompt of row `i`.
///
/// # Errors
/// A dead letter where it is null, or a turn of it lacks something.
pub fn prompt(rows: &RecordBatch, i: usize) -> Result<Prompt, RowError> {
    let is_list = rows.column_by_name("prompt").is_some_and(|c| c.as_list_opt::<i32>().is_some());
    if is_list || chat::tools(rows, i)?.is_some() {
        return Ok(Prompt::Chat(chat::prompt(rows, i)?));
    }
    let texts = columns::strings(rows, "prompt")?;
    match texts.is_null(i) {
        true => Err(RowError::DeadLetter("the prompt is empty".into())),
        false => Ok(Prompt::Text(texts.value(i).to_owned())),
    }
}

/// The answers in column `side`; `None` where the text is null. Ids and reason come along where the columns do.
pub fn answers(rows: &RecordBatch, side: &str) -> Result<Vec<Option<Answer>>, StageError> {
    let texts = columns::strings(rows, side)?;
    let is_there = |name: &String| rows.column_by_name(name).is_some();
    // The reason of an answer that is no side of a pair goes without its name.
    let reason = if side == "generation" { "finish_reason".to_owned() } else { format!("{side}_finish_reason") };
    let ids = Some(format!("{side}_ids")).filter(is_there).map(|name| columns::ids(rows, &name)).transpose()?;
    let reasons = Some(reason).filter(is_there).map(|name| columns::strings(rows, &name)).transpose()?;
    let answer = |i: usize| {
        let ids = ids.as_ref().filter(|l| l.is_valid(i)).map(|l| l.value(i));
        Answer {
            text: texts.value(i).to_owned(),
            ids: ids.and_then(|v| v.as_primitive_opt::<UInt32Type>().map(|v| v.values().to_vec())),
            finish_reason: reasons.as_ref().filter(|r| r.is_valid(i)).map(|r| r.value(i).to_owned()),
        }
    };
    Ok((0..rows.num_rows()).map(|i| texts.is_valid(i).then(|| answer(i))).collect())
}

/// The stage's table: one row a pair, with the reference's log-probs.
pub fn record(
    algorithm: Algorithm,
    side: usize,
    rows: &RecordBatch,
    pairs: &[Pair],
) -> Result<RecordBatch, StageError> {
    let failed = |e: datafusion::arrow::error::ArrowError| StageError::internal(format!("pairs: {e}"));
    let text = |name: &str| -> Result<ArrayRef, StageError> {
        let texts = columns::strings(rows, name)?;
        let mut out = StringBuilder::new();
        pairs.iter().for_each(|p| out.append_value(texts.value(p.ordinal as usize)));
        Ok(Arc::new(out.finish()))
    };
    let numbers = |f: fn(&Pair) -> f64| Arc::new(Float64Array::from_iter_values(pairs.iter().map(f))) as ArrayRef;
    let counts =
        |f: fn(&Pair) -> usize| Arc::new(UInt32Array::from_iter_values(pairs.iter().map(|p| f(p) as u32))) as ArrayRef;
    let mut table = vec![
        ("_row", Arc::new(UInt64Array::from_iter_values(pairs.iter().map(|p| p.row))) as ArrayRef),
        ("_pair", counts(|p| p.ordinal as usize)),
        ("part", Arc::new(StringArray::from_iter_values(pairs.iter().map(|_| SIDES[side]))) as ArrayRef),
    ];
    for name in columns_of(algorithm) {
        table.push((name, text(name)?));
    }
    table.extend([
        ("label", numbers(|p| p.label)),
        ("weight", numbers(|p| p.weight)),
        ("prompt_tokens", counts(|p| p.prompt.len())),
        ("chosen_tokens", counts(|p| p.chosen.len())),
        ("rejected_tokens", counts(|p| p.rejected.len())),
        ("reference_chosen_logps", numbers(|p| p.reference[0])),
        ("reference_rejected_logps", numbers(|p| p.reference[1])),
    ]);
    RecordBatch::try_from_iter(table).map_err(failed)
}

/// Fills in the reference's log-probs from a [`record`] of the same pairs.
pub fn recall(pairs: &mut [Pair], record: &RecordBatch) -> Result<(), StageError> {
    let column = |name: &str| {
        let column = record.column_by_name(name).and_then(|c| c.as_primitive_opt::<Float64Type>());
        column.filter(|c| c.len() == pairs.len()).cloned()
    };
    let (Some(chosen), Some(rejected)) = (column("reference_chosen_logps"), column("reference_rejected_logps")) else {
        return Err(StageError::internal("the record of the reference is of other pairs; start with --fresh"));
    };
    for (i, pair) in pairs.iter_mut().enumerate() {
        pair.reference = [chosen.value(i), rejected.value(i)];
    }
    Ok(())
}
