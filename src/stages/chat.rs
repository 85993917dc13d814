//! Prompts in rows: one user turn as a string, or a conversation as a list of `{role, content}`.

use datafusion::arrow::array::{Array, AsArray};
use datafusion::arrow::datatypes::{DataType, Field, Schema};
use datafusion::arrow::json::WriterBuilder;
use datafusion::arrow::json::writer::JsonArray;
use datafusion::arrow::record_batch::RecordBatch;
use serde_json::{Map, Value as Json};

use super::columns;
use super::rows::RowError;
use crate::data::batch::type_name;
use crate::engine::StageError;
use crate::model::chat::{Chat, ChatMessage};

/// The conversation in column `prompt` of row `row`.
///
/// # Errors
/// A dead letter where the prompt, a turn, its role or its content is null, or no turn is there.
pub fn prompt(batch: &RecordBatch, row: usize) -> Result<Chat, RowError> {
    match messages(batch, "prompt", row)? {
        turns if turns.is_empty() => Err(RowError::DeadLetter("the prompt is empty".into())),
        messages => Ok(Chat { messages, tools: tools(batch, row)? }),
    }
}

/// # Errors
/// The column `tools` is neither a list nor text.
pub fn check_tools(schema: &Schema) -> Result<(), String> {
    match schema.field_with_name("tools").map(Field::data_type) {
        Ok(kind) if !matches!(kind, DataType::Utf8 | DataType::List(_)) => Err(format!(
            "column `tools` is {}; it is the list of tools that goes to the chat template, so rename it or leave it out in the \
             source's select",
            type_name(kind)
        )),
        _ => Ok(()),
    }
}

/// The tools in column `tools` of row `row`: a list, or the JSON text of one. None where there are none.
///
/// # Errors
/// A dead letter where the text is no JSON list.
pub fn tools(batch: &RecordBatch, row: usize) -> Result<Option<Json>, RowError> {
    let Ok(place) = batch.schema_ref().index_of("tools") else { return Ok(None) };
    let column = batch.column(place);
    let tools = match column.as_string_opt::<i32>() {
        _ if column.is_null(row) => return Ok(None),
        Some(texts) if ["", "null"].contains(&texts.value(row).trim()) => return Ok(None),
        Some(texts) => serde_json::from_str(texts.value(row)).ok().filter(Json::is_array),
        None => {
            let alone = batch.project(&[place]).map(|column| column.slice(row, 1));
            let alone = alone.map_err(|e| StageError::internal(format!("the column `tools`: {e}")))?;
            objects(&alone)?.into_iter().next().and_then(|mut row| row.remove("tools")).filter(Json::is_array)
        }
    };
    match tools {
        Some(Json::Array(none)) if none.is_empty() => Ok(None),
        Some(tools) => Ok(Some(tools)),
        None => Err(RowError::DeadLetter("`tools` is no list, nor the JSON text of one".into())),
    }
}

/// The conversation in column `name` of row `row`; none where it is null.
///
/// # Errors
/// A dead letter where a turn, its role or its content is null.
fn messages(batch: &RecordBatch, name: &str, row: usize) -> Result<Vec<ChatMessage>, RowError> {
    let Some(list) = batch.column_by_name(name).and_then(|c| c.as_list_opt::<i32>()) else {
        let text = columns::strings(batch, name)?;
        return Ok(if text.is_null(row) { Vec::new() } else { vec![ChatMessage::new("user", text.value(row))] });
    };
    if list.is_null(row) {
        return Ok(Vec::new());
    }
    let turns = list.value(row);
    let Some(turns) = turns.as_struct_opt() else {
        let kind = turns.data_type();
        return Err(StageError::user(format!("column {name:?} is a list of {kind}, not of {{role, content}}")).into());
    };
    let missing = |turn: usize, what: &str| RowError::DeadLetter(format!("turn {} of the {name} {what}", turn + 1));
    if let Some(turn) = (0..turns.len()).find(|turn| turns.is_null(*turn)) {
        return Err(missing(turn, "is null"));
    }
    let turns = RecordBatch::from(turns);
    let (roles, contents) = (columns::strings(&turns, "role")?, columns::strings(&turns, "content")?);
    let others = others(&turns)?;
    if let Some(turn) = (0..turns.num_rows()).find(|turn| roles.is_null(*turn)) {
        return Err(missing(turn, "has no role"));
    }
    // A turn that calls tools says nothing else.
    let silent = |turn: &usize| contents.is_null(*turn) && !others[*turn].contains_key("tool_calls");
    if let Some(turn) = (0..turns.num_rows()).find(silent) {
        return Err(missing(turn, "has no content"));
    }
    let content = |i: usize| if contents.is_null(i) { "" } else { contents.value(i) };
    let messages = (0..turns.num_rows()).map(|i| ChatMessage::new(roles.value(i), content(i)));
    Ok(messages.zip(others).map(|(message, more)| ChatMessage { more, ..message }).collect())
}

/// The keys of turns beside role and content. A value that is null is left out, also deep inside: a column has the keys of all
/// its turns, and a turn that never had a key has a null there.
fn others(turns: &RecordBatch) -> Result<Vec<Map<String, Json>>, StageError> {
    let schema = turns.schema();
    let more: Vec<usize> = (0..schema.fields().len())
        .filter(|i| !["role", "content"].contains(&schema.field(*i).name().as_str()))
        .collect();
    if more.is_empty() {
        return Ok(vec![Map::new(); turns.num_rows()]);
    }
    let more = turns.project(&more).map_err(|e| StageError::internal(format!("turns of a conversation: {e}")))?;
    objects(&more)
}

/// Rows as JSON objects. A value that is null is left out, also deep inside.
fn objects(rows: &RecordBatch) -> Result<Vec<Map<String, Json>>, StageError> {
    let failed = |e: &dyn std::fmt::Display| StageError::internal(format!("turns of a conversation: {e}"));
    let mut bytes = Vec::new();
    let mut writer = WriterBuilder::new().with_explicit_nulls(false).build::<_, JsonArray>(&mut bytes);
    writer.write(rows).and_then(|()| writer.finish()).map_err(|e| failed(&e))?;
    drop(writer);
    serde_json::from_slice(&bytes).map_err(|e| failed(&e))
}

/// A conversation as plain text, for a judge to read: a single user turn is its text alone.
pub fn as_text(messages: &[ChatMessage]) -> String {
    match messages {
        [only] if only.role == "user" => only.content.clone(),
        turns => turns.iter().map(|m| format!("{}: {}", m.role, m.content)).collect::<Vec<_>>().join("\n\n"),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use datafusion::arrow::array::{ArrayRef, ListArray, StringArray, StructArray};
    use datafusion::arrow::buffer::OffsetBuffer;
    use datafusion::arrow::datatypes::{DataType, Field};
    use datafusion::arrow::json::ReaderBuilder;
    use datafusion::arrow::json::reader::infer_json_schema;
    use serde_json::json;

    use super::*;

    #[test]
    fn strings_and_conversations() {
        let texts: ArrayRef = Arc::new(StringArray::from(vec![Some("hi"), None]));
        let fields = vec![Field::new("role", DataType::Utf8, true), Field::new("content", DataType::Utf8, true)];
        let column = |v: Vec<&str>| Arc::new(StringArray::from(v)) as ArrayRef;
        let turns = StructArray::new(
            fields.clone().into(),
            vec![column(vec!["system", "user", "user"]), column(vec!["be brief", "hi", "yo"])],
            None,
        );
        let item = Arc::new(Field::new("item", DataType::Struct(fields.into()), true));
        let list: ArrayRef = Arc::new(ListArray::new(item, OffsetBuffer::from_lengths([2, 1]), Arc::new(turns), None));
        let batch = RecordBatch::try_from_iter([("text", texts), ("list", list)]).unwrap();

        assert_eq!(as_text(&messages(&batch, "text", 0).unwrap()), "hi");
        assert!(messages(&batch, "text", 1).unwrap().is_empty());
        assert_eq!(as_text(&messages(&batch, "list", 0).unwrap()), "system: be brief\n\nuser: hi");
        assert_eq!(as_text(&messages(&batch, "list", 1).unwrap()), "yo");
        let RowError::Stage(error) = messages(&batch, "none", 0).unwrap_err() else { panic!("a dead letter") };
        assert!(error.message.contains("text, list"), "{error:?}");
    }

    #[test]
    fn what_is_null_in_a_conversation_costs_its_row() {
        let rows = r#"{"prompt": [{"role": null, "content": "a"}]}
            {"prompt": [{"role": "user", "content": "a"}, {"role": "user"}]}
            {"prompt": null}
            {"prompt": []}
            {"prompt": [{"role": "assistant", "content": null, "tool_calls": [{"name": "f"}]}]}"#;
        let (schema, _) = infer_json_schema(rows.as_bytes(), None).unwrap();
        let mut reader = ReaderBuilder::new(Arc::new(schema)).build(rows.as_bytes()).unwrap();
        let batch = reader.next().unwrap().unwrap();
        for (row, told) in [
            (0, "turn 1 of the prompt has no role"),
            (1, "turn 2 of the prompt has no content"),
            (2, "the prompt is empty"),
            (3, "the prompt is empty"),
        ] {
            let RowError::DeadLetter(reason) = prompt(&batch, row).unwrap_err() else { panic!("{row}") };
            assert_eq!(reason, told);
        }
        assert_eq!(prompt(&batch, 4).unwrap().messages[0].content, "");
    }

    #[test]
    fn tools_are_a_list_or_the_text_of_one() {
        let f = json!([{"type": "function", "function": {"name": "f"}}]);
        let read = |rows: &[Json]| {
            let text: String = rows.iter().map(|row| format!("{row}\n")).collect();
            let (schema, _) = infer_json_schema(text.as_bytes(), None).unwrap();
            ReaderBuilder::new(Arc::new(schema)).build(text.as_bytes()).unwrap().next().unwrap().unwrap()
        };
        let lists =
            read(&[json!({"prompt": "a", "tools": f}), json!({"prompt": "b"}), json!({"prompt": "c", "tools": []})]);
        let texts = read(&[
            json!({"prompt": "a", "tools": f.to_string()}),
            json!({"prompt": "b"}),
            json!({"prompt": "c", "tools": " "}),
        ]);
        for batch in [lists, texts] {
            let tools: Vec<_> = (0..3).map(|row| prompt(&batch, row).unwrap().tools).collect();
            assert_eq!(tools, [Some(f.clone()), None, None]);
        }
        let wrong = read(&[json!({"prompt": "a", "tools": "f()"}), json!({"prompt": "b", "tools": "{}"})]);
        for row in 0..2 {
            let RowError::DeadLetter(reason) = prompt(&wrong, row).unwrap_err() else { panic!("{row}") };
            assert_eq!(reason, "`tools` is no list, nor the JSON text of one");
        }
    }

    #[test]
    fn turns_keep_every_key_that_they_have() {
        let calls = r#"{"talk": [{"role": "assistant", "content": "", "tool_calls": [{"name": "f", "days": 3},
            {"name": "g"}]}, {"role": "tool", "content": "7", "name": "f"}]}"#;
        let calls = calls.replace('\n', " ");
        let (schema, _) = infer_json_schema(calls.as_bytes(), None).unwrap();
        let mut reader = ReaderBuilder::new(Arc::new(schema)).build(calls.as_bytes()).unwrap();
        let batch = reader.next().unwrap().unwrap();
        let turns = messages(&batch, "talk", 0).unwrap();
        let more: Vec<_> = turns.iter().map(|turn| Json::from(turn.more.clone())).collect();
        assert_eq!(more, [json!({"tool_calls": [{"name": "f", "days": 3}, {"name": "g"}]}), json!({"name": "f"})]);
    }
}
