//! A form of rows, and the conversion of batches from it.

use std::sync::Arc;

use datafusion::arrow::array::{Array, ArrayRef, AsArray, StringArray};
use datafusion::arrow::compute::cast;
use datafusion::arrow::datatypes::{DataType, Fields, SchemaRef};
use datafusion::arrow::error::ArrowError;
use datafusion::arrow::record_batch::RecordBatch;

use super::turns::{self, ASSISTANT, Turns, USER, gather, list_type, plain_fields, single};
use super::{AnswerOf, PromptOf, RowForm, Spelling, read_schema};
use crate::data::{DataError, batch};
use crate::flow::{Canonical, Form};

/// A converted batch, and for each row the reason why it can't be converted (`None` if it can).
pub type Read = (RecordBatch, Vec<Option<String>>);

/// Conversion of rows from one form.
#[derive(Debug, Clone)]
pub struct Reading {
    form: RowForm,
    prompt: PromptOf,
    answers: Vec<(&'static str, AnswerOf)>,
    schema: SchemaRef,
    /// Fields of the prompt's turns; `None` if the prompt is text or unchanged.
    fields: Option<Fields>,
}

/// Answers of a batch that are turns, with their column's name.
type Answers = Vec<(&'static str, Turns)>;

/// A batch that is being converted, with the faults found so far.
struct Rows<'a> {
    batch: &'a RecordBatch,
    faults: Vec<Option<String>>,
}

impl Rows<'_> {
    fn fault(&mut self, row: usize, words: String) {
        self.faults[row].get_or_insert(words);
    }

    fn column(&self, name: &str) -> Result<&ArrayRef, ArrowError> {
        let missing = || ArrowError::SchemaError(format!("column `{name}` is missing"));
        self.batch.column_by_name(name).ok_or_else(missing)
    }

    fn turns(&mut self, name: &str, spelling: Spelling) -> Result<Turns, ArrowError> {
        let turns = Turns::read(name, self.column(name)?, spelling)?;
        for row in 0..self.batch.num_rows() {
            if let Some(fault) = turns.fault(row) {
                self.fault(row, fault.clone());
            }
        }
        Ok(turns)
    }
}

impl Reading {
    pub(super) fn new(
        form: RowForm,
        prompt: PromptOf,
        answers: Vec<(&'static str, AnswerOf)>,
        schema: &SchemaRef,
    ) -> Result<Self, DataError> {
        let kind = |name: &str| schema.field_with_name(name).map(|field| field.data_type().clone()).ok();
        let turned = |name: &str, spelling| kind(name).map(|kind| plain_fields(&kind, spelling));
        let spelled = |name: &str| kind(name).and_then(|kind| Spelling::of(&kind));
        let fields = match &prompt {
            PromptOf::Nowhere | PromptOf::Itself => None,
            PromptOf::Turns(spelling) => turned("prompt", *spelling),
            PromptOf::Common { beside } => {
                let of = |name: &str| spelled(name).and_then(|spelling| turned(name, spelling));
                let own = of("prompt").filter(|_| *beside).unwrap_or_default();
                let together = of("chosen").map(|chosen| turns::together(&chosen, &own)).transpose();
                together.map_err(|key| {
                    DataError::user(format!(
                        "form: the key `{key}` of turns has one type in `prompt` and another in `chosen`; write one type"
                    ))
                })?
            }
            PromptOf::Conversation { column, spelling, .. } => turned(column, *spelling),
            PromptOf::Instruction(instruction) => instruction.is_turns().then(turns::text_fields),
        };
        let made = match &prompt {
            PromptOf::Nowhere | PromptOf::Itself => None,
            _ => Some(fields.as_ref().map_or(DataType::Utf8, list_type)),
        };
        let names: Vec<&str> = answers.iter().map(|(name, _)| *name).collect();
        let schema = read_schema(schema, made, &names);
        Ok(Self { form, prompt, answers, schema, fields })
    }

    /// Columns of the converted rows.
    pub fn schema(&self) -> &SchemaRef {
        &self.schema
    }

    /// Returns whether conversion changes a column.
    pub fn changes(&self) -> bool {
        !self.answers.is_empty() || !matches!(self.prompt, PromptOf::Nowhere | PromptOf::Itself)
    }

    /// The name of the form, for the keys of rows.
    pub fn canonical(&self) -> Form {
        self.form.form()
    }

    /// The note about the form in the plan that `check` prints.
    pub fn told(&self) -> String {
        let prompt = match (&self.prompt, self.form) {
            (PromptOf::Common { beside: false }, _) => {
                ", implicit prompt: the turns that `chosen` and `rejected` share"
            }
            (PromptOf::Common { beside: true }, _) => ", explicit prompt",
            (PromptOf::Conversation { answered: true, .. }, _) => {
                ": `prompt` is the turns before an answer at the end, `completion` that answer"
            }
            (PromptOf::Conversation { column, .. }, _) => &format!(", prompt in `{column}`"),
            (PromptOf::Instruction(_), RowForm::Alpaca) => {
                ": `prompt` is `instruction` and `input`, `completion` is `output`"
            }
            (PromptOf::Instruction(_), _) => ", prompt in `instruction`",
            (PromptOf::Itself | PromptOf::Turns(_), RowForm::Preference) => ", explicit prompt",
            _ => "",
        };
        let system = match &self.prompt {
            PromptOf::Conversation { system: true, .. } => "; `system` is the first turn",
            PromptOf::Instruction(instruction) if instruction.has_system() => "; `system` is the first turn",
            _ if self.schema.column_with_name("system").is_some() => "; `system` is not read",
            _ => "",
        };
        format!("read as {}{prompt}{system} (form = \"{}\")", self.form.title(), self.form.name())
    }

    /// Converts a batch. The converted columns of a row with a fault have no meaning.
    ///
    /// # Errors
    /// A column is missing or has another type than at check.
    pub fn apply(&self, batch: &RecordBatch) -> Result<Read, DataError> {
        self.read(batch).map_err(|e| DataError::user(format!("form = \"{}\": {e}", self.form.name())))
    }

    fn read(&self, batch: &RecordBatch) -> Result<Read, ArrowError> {
        let mut rows = Rows { batch, faults: vec![None; batch.num_rows()] };
        let mut made: Vec<(&str, ArrayRef)> = Vec::new();
        let mut turned: Answers = Vec::new();
        for (name, answer) in &self.answers {
            match answer {
                AnswerOf::Turns { column, spelling } => turned.push((name, rows.turns(column, *spelling)?)),
                AnswerOf::Text { column } => made.push((name, rows.column(column)?.clone())),
                AnswerOf::LastTurn => {}
            }
        }
        // Number of turns before the answers, by row.
        let mut before = vec![0; batch.num_rows()];
        match &self.prompt {
            PromptOf::Nowhere | PromptOf::Itself => {}
            PromptOf::Turns(spelling) => {
                made.push(("prompt", Arc::new(rows.turns("prompt", *spelling)?.list().clone())))
            }
            PromptOf::Common { beside } => {
                before = shared(&mut rows, &turned);
                made.push(("prompt", self.common(&mut rows, &turned, &before, *beside)?));
            }
            PromptOf::Conversation { column, spelling, system, answered } => {
                let talk = rows.turns(column, *spelling)?;
                let ends = ends(&mut rows, column, &talk, *answered);
                made.push(("prompt", self.conversation(&rows, &talk, &ends, *system)?));
                if *answered {
                    made.push(("completion", Arc::new(last_turns(&mut rows, column, &talk, &ends))));
                }
            }
            PromptOf::Instruction(instruction) => {
                let (prompt, faults) = instruction.read(batch)?;
                faults.into_iter().enumerate().for_each(|(row, fault)| {
                    if let Some(fault) = fault {
                        rows.fault(row, fault);
                    }
                });
                made.push(("prompt", prompt));
            }
        }
        for (name, turns) in &turned {
            made.push((name, Arc::new(last_answers(&mut rows, name, turns, &before))));
        }
        self.assemble(batch, made, rows.faults)
    }

    fn assemble(
        &self,
        read: &RecordBatch,
        made: Vec<(&str, ArrayRef)>,
        faults: Vec<Option<String>>,
    ) -> Result<Read, ArrowError> {
        let column = |field: &Arc<datafusion::arrow::datatypes::Field>| {
            let found = made.iter().find(|(name, _)| name == field.name()).map(|(_, array)| array);
            let missing = || ArrowError::SchemaError(format!("column `{}` is missing", field.name()));
            let array = found.or_else(|| read.column_by_name(field.name())).ok_or_else(missing)?;
            if array.data_type() == field.data_type() { Ok(array.clone()) } else { cast(array, field.data_type()) }
        };
        let mut columns = self.schema.fields().iter().map(column).collect::<Result<Vec<_>, _>>()?;
        let mut fields = self.schema.fields().to_vec();
        // The engine's columns, such as `_row`, are kept.
        for (field, array) in read.schema_ref().fields().iter().zip(read.columns()) {
            if batch::KEYS.contains(&field.name().as_str()) && self.schema.column_with_name(field.name()).is_none() {
                fields.push(field.clone());
                columns.push(array.clone());
            }
        }
        let schema = Arc::new(datafusion::arrow::datatypes::Schema::new(fields));
        RecordBatch::try_new(schema, columns).map(|batch| (batch, faults))
    }

    /// The turns with which both answers begin. For a row that has none, the turns or the text of `prompt`.
    fn common(
        &self,
        rows: &mut Rows<'_>,
        answers: &Answers,
        before: &[usize],
        beside: bool,
    ) -> Result<ArrayRef, ArrowError> {
        let (Some((_, chosen)), Some(fields)) = (answers.first(), &self.fields) else {
            return Err(ArrowError::SchemaError("preferences without turns".into()));
        };
        let own = if beside { Own::read(rows, fields)? } else { Own::None };
        let mut sources = vec![turns::with_fields(chosen.values(), fields)?];
        sources.extend(own.values().cloned());
        let mut picked = Vec::with_capacity(before.len());
        for (row, count) in before.iter().enumerate() {
            let start = chosen.places(row).start;
            let turns: Vec<(usize, usize)> = (start..start + count).map(|place| (0, place)).collect();
            let own_turns: Vec<(usize, usize)> = own.places(row).map(|place| (1, place)).collect();
            if turns.is_empty() && own_turns.is_empty() {
                rows.fault(row, "`chosen` and `rejected` have no turns before their answers".into());
            } else if !turns.is_empty() && !own_turns.is_empty() && !own.is_in(row, chosen, *count) {
                rows.fault(
                    row,
                    "`prompt` is not among the turns before the answers; leave it out in `select` to take those turns"
                        .into(),
                );
            }
            let taken = if turns.is_empty() { own_turns } else { turns };
            picked.push(Some(taken).filter(|taken| !taken.is_empty()));
        }
        Ok(Arc::new(gather(&sources, &picked, fields)?))
    }

    /// The turns before `ends`. The text of `system` comes first if the conversation does not begin with a system turn.
    fn conversation(
        &self,
        rows: &Rows<'_>,
        talk: &Turns,
        ends: &[usize],
        system: bool,
    ) -> Result<ArrayRef, ArrowError> {
        let Some(fields) = &self.fields else {
            return Err(ArrowError::SchemaError("a conversation without turns".into()));
        };
        let texts = match system {
            true => rows.column("system")?.as_string::<i32>().clone(),
            false => StringArray::new_null(rows.batch.num_rows()),
        };
        let sources = [talk.values().clone(), single("system", &texts, fields)?];
        let pick = |(row, end): (usize, &usize)| {
            let places = talk.places(row).start..*end;
            let brought = places.clone().next().is_some_and(|first| talk.role(first) == Some("system"));
            let said = texts.is_valid(row) && !texts.value(row).is_empty() && !brought;
            let turns: Vec<_> = said.then_some((1, row)).into_iter().chain(places.map(|place| (0, place))).collect();
            (!turns.is_empty()).then_some(turns)
        };
        let picked: Vec<_> = ends.iter().enumerate().map(pick).collect();
        Ok(Arc::new(gather(&sources, &picked, fields)?))
    }
}

/// The column `prompt` beside answers that are turns.
enum Own {
    None,
    Text { texts: StringArray, values: ArrayRef },
    Turns(Box<Turns>, ArrayRef),
}

impl Own {
    fn read(rows: &mut Rows<'_>, fields: &Fields) -> Result<Self, ArrowError> {
        let column = rows.column("prompt")?.clone();
        if let Some(texts) = column.as_string_opt::<i32>() {
            return Ok(Self::Text { texts: texts.clone(), values: single(USER, texts, fields)? });
        }
        let Some(spelling) = Spelling::of(column.data_type()) else { return Ok(Self::None) };
        let turns = rows.turns("prompt", spelling)?;
        let values = turns::with_fields(turns.values(), fields)?;
        Ok(Self::Turns(Box::new(turns), values))
    }

    fn values(&self) -> Option<&ArrayRef> {
        match self {
            Self::None => None,
            Self::Text { values, .. } | Self::Turns(_, values) => Some(values),
        }
    }

    fn places(&self, row: usize) -> std::ops::Range<usize> {
        match self {
            Self::Text { texts, .. } if texts.is_valid(row) => row..row + 1,
            Self::Turns(turns, _) => turns.places(row),
            _ => 0..0,
        }
    }

    /// Returns whether the first `count` turns of an answer contain this prompt.
    fn is_in(&self, row: usize, answer: &Turns, count: usize) -> bool {
        let start = answer.places(row).start;
        let said: Vec<_> = (start..start + count).map(|place| (answer.role(place), answer.content(place))).collect();
        match self {
            Self::None => true,
            Self::Text { texts, .. } => said.iter().any(|(role, content)| {
                *role == Some(USER) && content.is_some_and(|text| text.trim() == texts.value(row).trim())
            }),
            Self::Turns(turns, _) => {
                let own: Vec<_> = turns.places(row).map(|place| (turns.role(place), turns.content(place))).collect();
                said.ends_with(&own)
            }
        }
    }
}

/// Number of turns, by row, with which both answers begin. The last turn of an answer does not count.
fn shared(rows: &mut Rows<'_>, answers: &Answers) -> Vec<usize> {
    let [(_, chosen), (_, rejected)] = answers.as_slice() else { return vec![0; rows.batch.num_rows()] };
    let same = |(a, b): &(usize, usize)| chosen.is_same(*a, rejected, *b);
    for (name, turns) in answers {
        for row in (0..rows.batch.num_rows()).filter(|row| turns.places(*row).is_empty()) {
            rows.fault(row, format!("`{name}` has no turns"));
        }
    }
    let of = |row: usize| {
        let (a, b) = (chosen.places(row), rejected.places(row));
        let most = a.len().min(b.len()).saturating_sub(1);
        a.zip(b).take(most).take_while(same).count()
    };
    (0..rows.batch.num_rows()).map(of).collect()
}

/// Texts of answers that are turns: the single turn after those of the prompt; null if there is none.
fn last_answers(rows: &mut Rows<'_>, name: &str, answers: &Turns, before: &[usize]) -> StringArray {
    let text = |(row, before): (usize, &usize)| {
        let mut places = answers.places(row).skip(*before);
        let (first, more) = (places.next(), places.count());
        let said = match first {
            None => return None,
            Some(_) if more > 0 => Err(format!("has {} turns where an answer is one", more + 1)),
            Some(place) => answers.answer(place).map(str::to_owned),
        };
        said.map_err(|words| rows.fault(row, format!("`{name}` {words}"))).ok()
    };
    before.iter().enumerate().map(text).collect()
}

/// Place at which the prompt of each conversation ends: before an answer at its end, or after all turns.
fn ends(rows: &mut Rows<'_>, name: &str, talk: &Turns, answered: bool) -> Vec<usize> {
    let mut ends = Vec::with_capacity(rows.batch.num_rows());
    for row in 0..rows.batch.num_rows() {
        let places = talk.places(row);
        let last = places.clone().next_back().filter(|last| talk.role(*last) == Some(ASSISTANT));
        if last.is_some() && !answered {
            rows.fault(row, format!("`{name}` ends with an answer, and the answers are in `chosen` and `rejected`"));
        }
        let last = last.filter(|_| answered);
        if last.is_some() && places.len() == 1 {
            rows.fault(row, format!("`{name}` is an answer without a turn before it"));
        }
        ends.push(last.unwrap_or(places.end));
    }
    ends
}

/// Texts of the answers at `ends`; null if a conversation ends with a turn that is not the assistant's.
fn last_turns(rows: &mut Rows<'_>, name: &str, talk: &Turns, ends: &[usize]) -> StringArray {
    let text = |(row, end): (usize, &usize)| {
        let place = Some(*end).filter(|end| talk.places(row).contains(end))?;
        let said = talk.answer(place).map(str::to_owned);
        said.map_err(|words| rows.fault(row, format!("`{name}` {words}"))).ok()
    };
    ends.iter().enumerate().map(text).collect()
}
