//! The columns that a trainer reads, looked at before anything is computed.

use datafusion::arrow::datatypes::{DataType, Schema};

use super::pairs::{GAP, columns_of};
use super::{Algorithm, Template};
use crate::data::batch::type_name;
use crate::flow::kind::InputPlan;
use crate::flow::{CheckContext, FlowError};
use crate::stages::chat;

/// The column that `pairs` adds beside its own label.
const OF_PAIRS: &str = "_pair";

/// Notes about columns that the data brought and that change what is trained.
///
/// # Errors
/// A column that is missing, or of a type that can't be trained on, with what to write.
pub fn check(
    cx: &CheckContext<'_>,
    algorithm: Algorithm,
    template: Template,
    odds_margin: bool,
) -> Result<Vec<String>, FlowError> {
    let mut notes = Vec::new();
    for input in cx.inputs {
        let Some(schema) = &input.schema else { continue };
        let missing = |name: &str| schema.column_with_name(name).is_none();
        for name in ["prompt"].iter().chain(columns_of(algorithm)) {
            if missing(name) {
                return Err(lacks(cx, input, schema, name));
            }
            text_of(cx, input, schema, name)?;
        }
        let is_list =
            |name: &str| schema.field_with_name(name).is_ok_and(|f| matches!(f.data_type(), DataType::List(_)));
        if template == Template::None && is_list("prompt") {
            let message = format!("\"none\" can't render the turns that are the prompts of `{}`", input.from.stage);
            return Err(cx.error("template", message).help("leave it out, or write the prompts as text in the source"));
        }
        chat::check_tools(schema).map_err(|message| cx.error(&input.key, message))?;
        notes.extend(label(cx, input, schema, algorithm)?);
        number(cx, input, schema, "weight", "a number from 0 up by which the loss of its pair is multiplied")?;
        notes.extend(weight(input, schema));
        for name in columns_of(algorithm) {
            notes.extend(ids(cx, input, schema, name)?);
        }
        if odds_margin {
            if missing(GAP) {
                let message = format!("is a factor of the column `{GAP}`, which `{}` does not have", input.from.stage);
                return Err(cx.error("odds_margin", message).help("leave it out; `pairs` makes that column of scores"));
            }
            number(cx, input, schema, GAP, "a number by which the chosen answer is better")?;
        }
    }
    notes.dedup();
    Ok(notes)
}

fn lacks(cx: &CheckContext<'_>, input: &InputPlan, schema: &Schema, name: &str) -> FlowError {
    let from = &input.from.stage;
    let there = crate::data::batch::visible(schema).join(", ");
    let error = cx.error(&input.key, format!("`{from}` has no column `{name}`; it has {there}"));
    let is_turns =
        |column: &str| schema.field_with_name(column).is_ok_and(|field| matches!(field.data_type(), DataType::List(_)));
    error.help(match name {
        // TRL's conversational preference with an implicit prompt.
        "prompt" if is_turns("chosen") => {
            "write in the source: select = { prompt = \"array_pop_back(chosen)\", chosen = \"chosen[-1]['content']\", \
             rejected = \"rejected[-1]['content']\" }"
                .to_owned()
        }
        "completion" if is_turns("messages") => "write form = \"messages\" in the source".to_owned(),
        "completion" if is_turns("conversations") => "write form = \"sharegpt\" in the source".to_owned(),
        name => {
            format!("name it in the source: select = {{ {name} = \"COLUMN\", ... }}, which keeps only what it names")
        }
    })
}

/// The prompt is text or turns, and answers are text.
fn text_of(cx: &CheckContext<'_>, input: &InputPlan, schema: &Schema, name: &str) -> Result<(), FlowError> {
    let Ok(field) = schema.field_with_name(name) else { return Ok(()) };
    let is_list = matches!(field.data_type(), DataType::List(_));
    if matches!(field.data_type(), DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View)
        || (is_list && name == "prompt")
    {
        return Ok(());
    }
    let kind = type_name(field.data_type());
    let error =
        cx.error(&input.key, format!("column `{name}` of `{}` is {kind}, and has to be text", input.from.stage));
    Err(error.help(match is_list {
        true => format!("take the text of its last turn in the source: select = {{ {name} = \"{name}[-1]['content']\", ... }}"),
        false => format!(
            "write types = {{ {name} = \"string\" }} in a source of JSON or CSV, or select = {{ {name} = \"CAST({name} AS STRING)\", ... }}"
        ),
    }))
}

/// A column that is a number, where it is there; `meaning` says what it is.
fn number(
    cx: &CheckContext<'_>,
    input: &InputPlan,
    schema: &Schema,
    name: &str,
    meaning: &str,
) -> Result<(), FlowError> {
    match schema.field_with_name(name) {
        Ok(field) if !field.data_type().is_numeric() => {
            let kind = type_name(field.data_type());
            let message = format!("column `{name}` of `{}` is {kind}; it is {meaning}", input.from.stage);
            Err(cx.error(&input.key, message).help("leave it out in the source's select, or cast it there"))
        }
        _ => Ok(()),
    }
}

/// A label that the data brought is a probability that weighs its pair.
///
/// # Errors
/// It is no number; in supervised fine-tuning, it says which answers are good.
fn label(
    cx: &CheckContext<'_>,
    input: &InputPlan,
    schema: &Schema,
    algorithm: Algorithm,
) -> Result<Option<String>, FlowError> {
    let Ok(field) = schema.field_with_name("label") else { return Ok(None) };
    let from = &input.from.stage;
    if algorithm == Algorithm::Sft {
        if *field.data_type() != DataType::Boolean {
            return Ok(None);
        }
        let message = format!("column `label` of `{from}` is true or false, and sft would learn all completions alike");
        let help = "take the good ones in the source: sql = \"SELECT prompt, completion FROM dataset WHERE label\"";
        return Err(cx.error(&input.key, message).help(help));
    }
    if !field.data_type().is_numeric() {
        let message = format!(
            "column `label` of `{from}` is {}; a label is the probability that `chosen` is better, a number from 0 to 1",
            type_name(field.data_type())
        );
        let condition = if *field.data_type() == DataType::Boolean { "label" } else { "label = 'VALUE'" };
        return Err(cx.error(&input.key, message).help(format!(
            "leave it out in the source's select, or make a number of it: label = \"CASE WHEN {condition} THEN 1.0 ELSE 0.0 END\"",
        )));
    }
    let of_pairs = schema.column_with_name(OF_PAIRS).is_some();
    Ok((!of_pairs).then(|| {
        format!("`label` of `{from}` weighs its pairs: 1 as they are, 0 with chosen and rejected swapped, 0.5 a tie")
    }))
}

/// A weight that the data brought.
fn weight(input: &InputPlan, schema: &Schema) -> Option<String> {
    schema.column_with_name("weight").filter(|_| schema.column_with_name(OF_PAIRS).is_none())?;
    Some(format!("`weight` of `{}` multiplies the loss of its rows", input.from.stage))
}

/// Token ids that the data brought are trained in place of the text.
///
/// # Errors
/// They have another type than those that a sampler makes.
fn ids(cx: &CheckContext<'_>, input: &InputPlan, schema: &Schema, name: &str) -> Result<Option<String>, FlowError> {
    let column = format!("{name}_ids");
    let Ok(field) = schema.field_with_name(&column) else { return Ok(None) };
    let from = &input.from.stage;
    if *field.data_type() != DataType::new_list(DataType::UInt32, true) {
        let message = format!("column `{column}` of `{from}` is not a list of token ids of a sampler (u32)");
        return Err(cx.error(&input.key, message).help("leave it out, or rename it, in the source"));
    }
    let of_sampler = ["_pair", "finish_reason"].iter().any(|name| schema.column_with_name(name).is_some())
        || schema.column_with_name(&format!("{name}_finish_reason")).is_some();
    Ok((!of_sampler).then(|| format!("`{column}` of `{from}` is trained in place of the text in `{name}`")))
}
