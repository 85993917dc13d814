//! Conversion of published data sets to prompts and answers.
//!
//! In all stages `prompt` is text or a list of `{role, content}`, and answers (`chosen`, `rejected`, `completion`) are
//! text. The other forms are detected from their columns: TRL's preference, prompt-completion and unpaired preference
//! data, OpenAI's messages, ShareGPT and Alpaca. See TRL's "Dataset formats" and LLaMA-Factory's `data/README.md`.

mod instruction;
mod reading;
mod turns;

use std::sync::Arc;

use datafusion::arrow::datatypes::{DataType, Field, Schema, SchemaRef};
use serde::Deserialize;

use self::instruction::Instruction;
pub use self::reading::Reading;
use self::turns::Spelling;
use super::DataError;
use super::batch;
use crate::canonical_names;

/// Form of a data set's rows: the columns of the prompt and of the answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RowForm {
    /// No conversion.
    None,
    /// `prompt`: text or turns.
    Prompt,
    /// `prompt` and `completion`: text or turns.
    PromptCompletion,
    /// `chosen` and `rejected`: text or turns. The prompt is in a column, or in the turns with which both begin.
    Preference,
    /// `prompt`, `completion` and the boolean `label`, which is true if the completion is good.
    UnpairedPreference,
    /// `messages`: a list of turns.
    Messages,
    /// `conversations`: a list of turns.
    Sharegpt,
    /// `instruction`, `output` and optionally `input`: text.
    Alpaca,
}

canonical_names!(RowForm {
    None = "none",
    Prompt = "prompt",
    PromptCompletion = "prompt_completion",
    Preference = "preference",
    UnpairedPreference = "unpaired_preference",
    Messages = "messages",
    Sharegpt = "sharegpt",
    Alpaca = "alpaca",
});

impl RowForm {
    fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Prompt => "prompt",
            Self::PromptCompletion => "prompt_completion",
            Self::Preference => "preference",
            Self::UnpairedPreference => "unpaired_preference",
            Self::Messages => "messages",
            Self::Sharegpt => "sharegpt",
            Self::Alpaca => "alpaca",
        }
    }

    fn title(self) -> &'static str {
        match self {
            Self::None | Self::Prompt => "prompts",
            Self::PromptCompletion => "TRL prompt-completion",
            Self::Preference => "TRL preference",
            Self::UnpairedPreference => "TRL unpaired preference (KTO)",
            Self::Messages => "OpenAI messages",
            Self::Sharegpt => "ShareGPT",
            Self::Alpaca => "Alpaca",
        }
    }
}

/// Source of the prompt.
#[derive(Debug, Clone, PartialEq)]
enum PromptOf {
    /// The rows have no prompt.
    Nowhere,
    /// The column `prompt`, unchanged.
    Itself,
    /// The column `prompt`: turns to be converted.
    Turns(Spelling),
    /// The turns with which `chosen` and `rejected` begin. If there are none and `beside` is true, the column `prompt`.
    Common { beside: bool },
    /// A column of conversations: all turns, or with `answered` the turns before an answer at the end. With `system`
    /// the text column `system` becomes the first turn.
    Conversation { column: String, spelling: Spelling, system: bool, answered: bool },
    /// `instruction` and the columns beside it.
    Instruction(Instruction),
}

/// Source of an answer.
#[derive(Debug, Clone, PartialEq)]
enum AnswerOf {
    /// Its own column of turns: the turn after those of the prompt.
    Turns { column: String, spelling: Spelling },
    /// The last turn of the conversation that has the prompt.
    LastTurn,
    /// Another column, of text.
    Text { column: String },
}

/// The columns of a data set.
struct Columns<'a>(&'a Schema);

impl Columns<'_> {
    fn kind(&self, name: &str) -> Option<&DataType> {
        self.0.field_with_name(name).ok().map(Field::data_type)
    }

    fn has(&self, name: &str) -> bool {
        self.kind(name).is_some()
    }

    fn is_text(&self, name: &str) -> bool {
        self.kind(name) == Some(&DataType::Utf8)
    }

    fn turns(&self, name: &str) -> Option<Spelling> {
        self.kind(name).and_then(Spelling::of)
    }

    /// Spelling of the turns in a column of lists of turns; `None` if the column has another type.
    fn conversation(&self, name: &str) -> Option<Spelling> {
        self.turns(name).filter(|_| matches!(self.kind(name), Some(DataType::List(_))))
    }

    fn is_answer(&self, name: &str) -> bool {
        self.is_text(name) || self.turns(name).is_some()
    }
}

/// Detects the form of rows with these columns, or checks the `wanted` form. Returns `None` if no form is detected, and
/// for [`RowForm::None`].
///
/// # Errors
/// The `wanted` form lacks a column, or a column has a type that this form does not take.
pub fn recognise(schema: &SchemaRef, wanted: Option<RowForm>) -> Result<Option<Reading>, DataError> {
    let columns = Columns(schema);
    let Some(form) = wanted.or_else(|| by_columns(&columns)).filter(|form| *form != RowForm::None) else {
        return Ok(None);
    };
    let (prompt, answers) = parts(&columns, form).map_err(|missing| {
        let there = batch::visible(schema).join(", ");
        let form = form.name();
        DataError::user(format!("form: form = \"{form}\" needs {missing}; the columns are {there}"))
    })?;
    Reading::new(form, prompt, answers, schema).map(Some)
}

/// Detects the form of the columns. `None` if there is none, or only a `prompt` that needs no conversion.
fn by_columns(columns: &Columns<'_>) -> Option<RowForm> {
    let has_prompt = columns.has("prompt");
    if columns.is_answer("chosen") && columns.is_answer("rejected") {
        let implicit = columns.turns("chosen").is_some() && columns.turns("rejected").is_some();
        let found = has_prompt || implicit || parts(columns, RowForm::Preference).is_ok();
        return found.then_some(RowForm::Preference);
    }
    if has_prompt {
        let completed = columns.is_answer("completion");
        return match columns.kind("label") {
            Some(DataType::Boolean) if completed => Some(RowForm::UnpairedPreference),
            _ if completed => Some(RowForm::PromptCompletion),
            _ if own_prompt(columns).is_ok_and(|prompt| prompt != PromptOf::Itself) => Some(RowForm::Prompt),
            _ => None,
        };
    }
    let conversation = |name: &str| columns.conversation(name).is_some();
    if conversation("messages") {
        Some(RowForm::Messages)
    } else if conversation("conversations") {
        Some(RowForm::Sharegpt)
    } else {
        (columns.is_text("instruction") && columns.is_text("output")).then_some(RowForm::Alpaca)
    }
}

type Parts = (PromptOf, Vec<(&'static str, AnswerOf)>);

/// Sources of the prompt and of the answers in a form.
///
/// # Errors
/// The message names the missing column.
fn parts(columns: &Columns<'_>, form: RowForm) -> Result<Parts, String> {
    match form {
        RowForm::None => Ok((PromptOf::Nowhere, Vec::new())),
        RowForm::Prompt => Ok((own_prompt(columns)?, Vec::new())),
        RowForm::PromptCompletion => Ok((own_prompt(columns)?, turned(columns, &["completion"])?)),
        RowForm::UnpairedPreference => {
            if columns.kind("label") != Some(&DataType::Boolean) {
                return Err("a column `label` of true and false".into());
            }
            Ok((own_prompt(columns)?, turned(columns, &["completion"])?))
        }
        RowForm::Preference => {
            let answers = turned(columns, &["chosen", "rejected"])?;
            Ok((preference_prompt(columns, answers.len() == 2)?, answers))
        }
        RowForm::Messages => Ok((conversation(columns, "messages", true)?, vec![("completion", AnswerOf::LastTurn)])),
        RowForm::Sharegpt => {
            Ok((conversation(columns, "conversations", true)?, vec![("completion", AnswerOf::LastTurn)]))
        }
        RowForm::Alpaca => {
            let prompt = PromptOf::Instruction(Instruction::of(columns)?);
            if !columns.is_text("output") {
                return Err("a column `output` of text".into());
            }
            Ok((prompt, vec![("completion", AnswerOf::Text { column: "output".into() })]))
        }
    }
}

fn own_prompt(columns: &Columns<'_>) -> Result<PromptOf, String> {
    match columns.kind("prompt") {
        Some(kind) if *kind == DataType::Utf8 || turns::is_plain(kind) => Ok(PromptOf::Itself),
        Some(_) => {
            columns.conversation("prompt").map(PromptOf::Turns).ok_or_else(|| "a `prompt` of text or turns".into())
        }
        None => Err("a column `prompt`".into()),
    }
}

/// Source of the prompt of preferences: the answers' turns, the column `prompt`, or the columns of another form.
fn preference_prompt(columns: &Columns<'_>, conversational: bool) -> Result<PromptOf, String> {
    let beside = columns.has("prompt");
    if columns.conversation("conversations").is_some() && !beside {
        return conversation(columns, "conversations", false);
    }
    if conversational && columns.conversation("chosen").is_some() {
        if beside {
            own_prompt(columns)?;
        }
        return Ok(PromptOf::Common { beside });
    }
    if beside {
        return own_prompt(columns);
    }
    if columns.is_text("instruction") {
        return Instruction::of(columns).map(PromptOf::Instruction);
    }
    let both = ["chosen", "rejected"].iter().all(|name| columns.is_text(name));
    Err(match both {
        true => "a column `prompt`, because `chosen` and `rejected` are text".into(),
        false => "a column `prompt`, or turns in both `chosen` and `rejected`".to_owned(),
    })
}

/// Sources of the answers among `names` that are turns. Answers that are text need no conversion.
fn turned(columns: &Columns<'_>, names: &[&'static str]) -> Result<Vec<(&'static str, AnswerOf)>, String> {
    let mut found = Vec::new();
    for name in names {
        match columns.turns(name) {
            Some(spelling) => found.push((*name, AnswerOf::Turns { column: (*name).to_owned(), spelling })),
            None if columns.is_text(name) => {}
            None => return Err(format!("a column `{name}` of text or turns")),
        }
    }
    Ok(found)
}

fn conversation(columns: &Columns<'_>, name: &str, answered: bool) -> Result<PromptOf, String> {
    let spelling = columns.conversation(name).ok_or_else(|| match columns.has(name) {
        true => format!("a column `{name}` of lists of {{role, content}} or {{from, value}}"),
        false => format!("a column `{name}`"),
    })?;
    Ok(PromptOf::Conversation { column: name.to_owned(), spelling, system: columns.is_text("system"), answered })
}

/// The schema after conversion. `prompt` and the answers replace columns of the same name; new columns come first.
fn read_schema(schema: &Schema, prompt: Option<DataType>, answers: &[&str]) -> SchemaRef {
    let made = prompt.map(|kind| ("prompt", kind)).into_iter();
    let made: Vec<(&str, DataType)> = made.chain(answers.iter().map(|name| (*name, DataType::Utf8))).collect();
    let new = made.iter().filter(|(name, _)| schema.column_with_name(name).is_none());
    let new = new.map(|(name, kind)| Arc::new(Field::new(*name, kind.clone(), true)));
    let kept = schema.fields().iter().map(|field| {
        let replaced = made.iter().find(|(name, _)| name == field.name());
        replaced.map_or_else(|| field.clone(), |(name, kind)| Arc::new(Field::new(*name, kind.clone(), true)))
    });
    Arc::new(Schema::new(new.chain(kept).collect::<Vec<_>>()))
}

#[cfg(test)]
mod tests;
