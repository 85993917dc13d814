//! Columns of conversations, converted to lists of `{role, content, ...}`.

use std::sync::Arc;

use datafusion::arrow::array::{
    Array, ArrayRef, AsArray, ListArray, StringArray, StructArray, make_array, new_null_array,
};
use datafusion::arrow::buffer::OffsetBuffer;
use datafusion::arrow::compute::{cast, interleave};
use datafusion::arrow::datatypes::{DataType, Field, FieldRef, Fields, Float64Type, Schema};
use datafusion::arrow::error::ArrowError;

use crate::data::batch;

/// The role of a prompt that is text.
pub const USER: &str = "user";
/// The role of the model's turns.
pub const ASSISTANT: &str = "assistant";
/// Keys of an answer that has more than text.
const BEYOND_TEXT: [&str; 5] = ["tool_calls", "function_call", "reasoning_content", "reasoning", "thinking"];

/// Names of the keys of a turn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Spelling {
    /// `role` and `content` (OpenAI, TRL).
    Role,
    /// `from` and `value` (ShareGPT).
    From,
}

impl Spelling {
    fn keys(self) -> [&'static str; 2] {
        match self {
            Self::Role => ["role", "content"],
            Self::From => ["from", "value"],
        }
    }

    /// The spelling of a column of conversations or of single turns; `None` if the column has another type.
    pub fn of(data_type: &DataType) -> Option<Self> {
        let fields = fields_of(data_type)?;
        let kind = |name: &str| fields.iter().find(|f| f.name() == name).map(|f| f.data_type());
        let is_content = |kind: &DataType| *kind == DataType::Utf8 || parts(kind).is_some();
        let spelled = |spelling: &Self| {
            let [role, content] = spelling.keys();
            kind(role) == Some(&DataType::Utf8) && kind(content).is_some_and(is_content)
        };
        [Self::Role, Self::From].into_iter().find(spelled)
    }

    /// The role by OpenAI's name; `None` if it is unknown.
    fn role(self, written: &str) -> Option<&str> {
        match (written.to_ascii_lowercase().as_str(), self) {
            ("human" | "user", _) => Some(USER),
            ("gpt" | "assistant" | "chatgpt" | "bot" | "model", _) => Some(ASSISTANT),
            ("system", _) => Some("system"),
            ("tool" | "observation", _) => Some("tool"),
            // A template may know more roles.
            (_, Self::Role) => Some(written),
            (_, Self::From) => None,
        }
    }

    fn other(self) -> Self {
        match self {
            Self::Role => Self::From,
            Self::From => Self::Role,
        }
    }
}

/// Fields of the turns in a column of lists of structs, or of structs.
fn fields_of(data_type: &DataType) -> Option<&Fields> {
    match data_type {
        DataType::Struct(fields) => Some(fields),
        DataType::List(item) => match item.data_type() {
            DataType::Struct(fields) => Some(fields),
            _ => None,
        },
        _ => None,
    }
}

/// Fields of the parts of a content that is a list of `{type, text}`.
fn parts(content: &DataType) -> Option<&Fields> {
    let fields = if let DataType::List(_) = content { fields_of(content)? } else { return None };
    fields.iter().any(|f| f.name() == "text" && *f.data_type() == DataType::Utf8).then_some(fields)
}

/// Returns whether a column needs no conversion: it is a list of `{role, content}` of text.
pub fn is_plain(data_type: &DataType) -> bool {
    let text = |name: &str| {
        fields_of(data_type)
            .is_some_and(|fields| fields.iter().any(|f| f.name() == name && *f.data_type() == DataType::Utf8))
    };
    matches!(data_type, DataType::List(_)) && text("role") && text("content")
}

/// Fields of converted turns: `role` and `content` as text, then the other keys.
pub fn plain_fields(data_type: &DataType, spelling: Spelling) -> Fields {
    let fields = fields_of(data_type).into_iter().flatten();
    let has = |name: &str| fields_of(data_type).is_some_and(|fields| fields.iter().any(|f| f.name() == name));
    let both = spelling.other().keys().iter().all(|name| has(name));
    let is_other = |name: &str| (both || spelling == Spelling::From) && spelling.other().keys().contains(&name);
    let others = fields.filter(|f| !spelling.keys().contains(&f.name().as_str()) && !is_other(f.name())).cloned();
    text_fields().iter().cloned().chain(others).collect()
}

/// Fields of turns that have only `role` and `content`.
pub fn text_fields() -> Fields {
    Spelling::Role.keys().iter().map(|name| Field::new(*name, DataType::Utf8, true)).collect()
}

/// Type of a column of conversations whose turns have these fields.
pub fn list_type(fields: &Fields) -> DataType {
    DataType::List(item(fields))
}

fn item(fields: &Fields) -> FieldRef {
    Arc::new(Field::new("item", DataType::Struct(fields.clone()), true))
}

/// A column of conversations, converted: `role` and `content` are text.
pub struct Turns {
    list: ListArray,
    roles: StringArray,
    contents: StringArray,
    /// The reason why a row can't be converted, by row.
    faults: Vec<Option<String>>,
}

impl Turns {
    /// Converts the column `name`. A row gets a fault if a role is unknown or a content has parts that are not text.
    ///
    /// # Errors
    /// The type of the column is not that of the spelling.
    pub fn read(name: &str, column: &ArrayRef, spelling: Spelling) -> Result<Self, ArrowError> {
        let list = as_list(column);
        let turns = list.values().as_struct();
        let mut faults = Faults { name, list: &list, found: vec![None; list.len()] };
        let [mut roles, mut contents] = spelled(turns, spelling, &mut faults)?;
        // The turns of some rows may have the other keys.
        if spelling.other().keys().iter().all(|key| turns.column_by_name(key).is_some_and(|c| is_text(c.data_type()))) {
            let [more, texts] = spelled(turns, spelling.other(), &mut faults)?;
            [roles, contents] = [either(&roles, &more), either(&contents, &texts)];
        }
        let faults = faults.found;

        let fields = plain_fields(column.data_type(), spelling);
        let others = fields.iter().skip(2).map(|f| turns.column_by_name(f.name()).cloned());
        let others = others.map(|column| column.ok_or_else(|| ArrowError::SchemaError("a turn's key is gone".into())));
        let mut columns: Vec<ArrayRef> = vec![Arc::new(roles.clone()), Arc::new(contents.clone())];
        columns.extend(others.collect::<Result<Vec<_>, _>>()?);
        let turns = StructArray::try_new(fields.clone(), columns, turns.nulls().cloned())?;
        let nulls = list.nulls().cloned();
        let list = ListArray::try_new(item(&fields), list.offsets().clone(), Arc::new(turns), nulls)?;
        Ok(Self { list, roles, contents, faults })
    }

    /// The converted conversations.
    pub fn list(&self) -> &ListArray {
        &self.list
    }

    /// The turns of all rows, one after another.
    pub fn values(&self) -> &ArrayRef {
        self.list.values()
    }

    /// The reason why a row can't be converted; `None` if it can.
    pub fn fault(&self, row: usize) -> Option<&String> {
        self.faults.get(row).and_then(Option::as_ref)
    }

    /// Places of a row's turns in [`Self::values`]; empty for a null.
    pub fn places(&self, row: usize) -> std::ops::Range<usize> {
        let offsets = self.list.value_offsets();
        if self.list.is_null(row) { 0..0 } else { offsets[row] as usize..offsets[row + 1] as usize }
    }

    /// The role of the turn at `place`; `None` if it is null or unknown.
    pub fn role(&self, place: usize) -> Option<&str> {
        self.roles.is_valid(place).then(|| self.roles.value(place))
    }

    /// The content of the turn at `place`; `None` if it is null.
    pub fn content(&self, place: usize) -> Option<&str> {
        self.contents.is_valid(place).then(|| self.contents.value(place))
    }

    /// Returns whether two turns are equal in all their keys. A key that is null equals one that is missing.
    pub fn is_same(&self, place: usize, other: &Self, at: usize) -> bool {
        let (own, theirs) = (self.values().as_struct(), other.values().as_struct());
        let key = |turns: &StructArray, name: &str, place: usize| {
            turns.column_by_name(name).filter(|column| column.is_valid(place)).map(|column| column.slice(place, 1))
        };
        let names = own.fields().iter().chain(theirs.fields()).map(|field| field.name());
        names.into_iter().all(|name| key(own, name, place) == key(theirs, name, at))
    }

    /// The text of the answer at `place`.
    ///
    /// # Errors
    /// The turn is not the assistant's, has more than text, or has no content. The message follows the name of the
    /// column.
    pub fn answer(&self, place: usize) -> Result<&str, String> {
        match self.role(place) {
            Some(ASSISTANT) => {}
            Some(role) => return Err(format!("ends with a turn of the role {role:?}, not of the assistant")),
            None => return Err("ends with a turn without role".into()),
        }
        let turns = self.list.values().as_struct();
        let says = |key: &&str| turns.column_by_name(key).is_some_and(|column| is_said(column, place));
        if let Some(key) = BEYOND_TEXT.iter().find(|key| says(key)) {
            return Err(format!("ends with a turn that has `{key}`, and an answer is text"));
        }
        // OpenAI's fine-tuning format.
        let weight = turns.column_by_name("weight").and_then(|column| cast(column, &DataType::Float64).ok());
        let weight = weight.filter(|column| column.is_valid(place));
        if weight.is_some_and(|column| column.as_primitive::<Float64Type>().value(place) == 0.0) {
            return Err("ends with a turn of weight 0, which is not to be trained on".into());
        }
        self.content(place).ok_or_else(|| "ends with a turn without content".into())
    }
}

/// Returns whether a value is neither null nor empty.
fn is_said(column: &ArrayRef, place: usize) -> bool {
    match column.data_type() {
        _ if column.is_null(place) => false,
        DataType::Utf8 => !["", "[]", "{}", "null"].contains(&column.as_string::<i32>().value(place).trim()),
        DataType::Struct(_) => column.as_struct().columns().iter().any(|key| is_said(key, place)),
        DataType::List(_) => !column.as_list::<i32>().value(place).is_empty(),
        _ => true,
    }
}

/// Converts a column of single turns to conversations of one turn.
fn as_list(column: &ArrayRef) -> ListArray {
    match column.as_list_opt::<i32>() {
        Some(list) => list.clone(),
        None => {
            let field = Arc::new(Field::new("item", column.data_type().clone(), true));
            let offsets = OffsetBuffer::from_lengths(std::iter::repeat_n(1, column.len()));
            // A null turn becomes a null conversation.
            ListArray::new(field, offsets, column.clone(), column.nulls().cloned())
        }
    }
}

/// Faults of rows, found turn by turn.
struct Faults<'a> {
    name: &'a str,
    list: &'a ListArray,
    found: Vec<Option<String>>,
}

impl Faults<'_> {
    /// Adds a fault to the row of the turn at `place`. A row keeps its first fault; a turn of no row adds none.
    fn add(&mut self, place: usize, words: &str) {
        let offsets = self.list.value_offsets();
        let row = offsets.partition_point(|start| *start as usize <= place).saturating_sub(1);
        if row < self.found.len() && self.list.is_valid(row) && self.found[row].is_none() {
            let turn = place - offsets[row] as usize + 1;
            self.found[row] = Some(format!("turn {turn} of `{}` {words}", self.name));
        }
    }
}

/// Roles and contents by the keys of one spelling.
fn spelled(turns: &StructArray, spelling: Spelling, faults: &mut Faults<'_>) -> Result<[StringArray; 2], ArrowError> {
    let [role, content] = spelling.keys().map(|key| turns.column_by_name(key).cloned());
    let none = || new_null_array(&DataType::Utf8, turns.len());
    let roles = roles(&role.unwrap_or_else(none), spelling, faults);
    Ok([roles, contents(&content.unwrap_or_else(none), faults)?])
}

fn is_text(data_type: &DataType) -> bool {
    *data_type == DataType::Utf8
}

/// Values of `a`, and those of `b` where it has none.
fn either(a: &StringArray, b: &StringArray) -> StringArray {
    a.iter().zip(b).map(|(a, b)| a.or(b)).collect()
}

fn roles(column: &ArrayRef, spelling: Spelling, faults: &mut Faults<'_>) -> StringArray {
    let written = column.as_string::<i32>();
    let role = |(place, written): (usize, Option<&str>)| {
        let known = spelling.role(written?).map(str::to_owned);
        if known.is_none() {
            faults.add(place, &format!("is from {:?}, which is no role", written.unwrap_or_default()));
        }
        known
    };
    written.iter().enumerate().map(role).collect()
}

/// Contents as text. The parts of a content are joined by line breaks, as in vLLM for templates that take text.
fn contents(column: &ArrayRef, faults: &mut Faults<'_>) -> Result<StringArray, ArrowError> {
    if let Some(texts) = column.as_string_opt::<i32>() {
        return Ok(texts.clone());
    }
    let list = column.as_list::<i32>();
    let parts = list.values().as_struct();
    let texts = parts.column_by_name("text").map(|column| cast(column, &DataType::Utf8)).transpose()?;
    let kinds = parts.column_by_name("type").map(|column| cast(column, &DataType::Utf8)).transpose()?;
    let of = |column: &Option<ArrayRef>, i: usize| {
        column.as_ref().filter(|c| c.is_valid(i)).map(|c| c.as_string::<i32>().value(i).to_owned())
    };
    let offsets = list.value_offsets();
    let content = |place: usize| {
        if list.is_null(place) {
            return None;
        }
        let mut said = Vec::new();
        for part in offsets[place] as usize..offsets[place + 1] as usize {
            match (of(&kinds, part).as_deref(), of(&texts, part)) {
                (None | Some("text" | "input_text" | "output_text"), Some(text)) => said.push(text),
                (kind, _) => {
                    let kind = kind.unwrap_or("null");
                    faults.add(place, &format!("has a part of type {kind:?}; only parts of text are read"));
                    return None;
                }
            }
        }
        Some(said.join("\n"))
    };
    Ok((0..list.len()).map(content).collect())
}

/// Fields of turns from two columns. A key of both has the wider type of the two.
///
/// # Errors
/// The name of a key whose two types have no wider one.
pub fn together(a: &Fields, b: &Fields) -> Result<Fields, String> {
    let wide = |field: &FieldRef| match b.iter().find(|other| other.name() == field.name()) {
        Some(other) => {
            let kind = batch::wider(field.data_type(), other.data_type()).ok_or_else(|| field.name().clone())?;
            Ok(Arc::new(Field::new(field.name(), kind, true)))
        }
        None => Ok(field.clone()),
    };
    let more = b.iter().filter(|field| a.iter().all(|known| known.name() != field.name())).cloned();
    Ok(a.iter().map(wide).collect::<Result<Vec<_>, String>>()?.into_iter().chain(more).collect())
}

/// Turns with more fields, which are null, and with wider types.
///
/// # Errors
/// A value can't be cast.
pub fn with_fields(turns: &ArrayRef, fields: &Fields) -> Result<ArrayRef, ArrowError> {
    let turns = turns.as_struct();
    let failed = |e: crate::data::DataError| ArrowError::CastError(e.message);
    let own = Arc::new(Schema::new(turns.fields().clone()));
    let rows = batch::assemble(own, turns.columns().to_vec(), turns.len()).map_err(failed)?;
    let wide = batch::widen(&rows, &Arc::new(Schema::new(fields.clone()))).map_err(failed)?;
    let (fields, columns, nulls) = (fields.clone(), wide.columns().to_vec(), turns.nulls().cloned());
    Ok(Arc::new(StructArray::try_new_with_length(fields, columns, nulls, turns.len())?))
}

/// Turns of one role with the given texts. Fields other than `role` and `content` are null.
pub fn single(role: &str, texts: &StringArray, fields: &Fields) -> Result<ArrayRef, ArrowError> {
    let roles: StringArray = std::iter::repeat_n(Some(role), texts.len()).collect();
    let mut columns: Vec<ArrayRef> = vec![Arc::new(roles), Arc::new(texts.clone())];
    columns.extend(fields.iter().skip(2).map(|f| new_null_array(f.data_type(), texts.len())));
    Ok(Arc::new(StructArray::try_new(fields.clone(), columns, None)?))
}

/// Conversations of turns from several arrays. A turn is given by the index of its array and its place there. `None`
/// becomes a null row.
pub fn gather(
    sources: &[ArrayRef],
    rows: &[Option<Vec<(usize, usize)>>],
    fields: &Fields,
) -> Result<ListArray, ArrowError> {
    let places: Vec<(usize, usize)> = rows.iter().flatten().flatten().copied().collect();
    let arrays: Vec<&dyn Array> = sources.iter().map(AsRef::as_ref).collect();
    let values = match places.is_empty() {
        true => make_array(StructArray::new_null(fields.clone(), 0).into()),
        false => interleave(&arrays, &places)?,
    };
    let offsets = OffsetBuffer::from_lengths(rows.iter().map(|row| row.as_ref().map_or(0, Vec::len)));
    let nulls = rows.iter().map(Option::is_some).collect::<Vec<bool>>().into();
    ListArray::try_new(item(fields), offsets, values, Some(nulls))
}
