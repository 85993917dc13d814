//! Environment variables in a flow: `${VAR}`, `${VAR:-default}`, `${VAR:?message}`, `$$` for a `$`.
//!
//! They are read after TOML, in string values alone, so a variable can never add a key or a line.
//! And only in paths, URLs, keys and names: SQL, prompts and patterns have a `$` of their own.

use toml::{Table, Value};

use super::document::join;
use super::options::SECRETS;
use super::{FlowError, Masks};

/// Keys whose text may name variables, in any table.
const KEYS: &[&str] = &[
    "name",
    "source",
    "endpoint",
    "api_key",
    "dataset",
    "files",
    "path",
    "url",
    "command",
    "init_adapter",
    "directory",
    "output",
    "revision",
    "token",
];
/// The same by ending, for kinds that an embedding program registers.
const ENDINGS: &[&str] = &["_path", "_file", "_dir", "_url", "_key", "_token"];
/// Tables whose keys are the user's words (columns, labels), whatever they are called.
const NEVER_INSIDE: &[&str] = &["sql", "prompt", "parse", "select", "as", "outputs", "labels", "body"];

/// Replaces variables in place, and keeps every value in `masks`. `lookup` is `std::env::var` outside of tests.
///
/// # Errors
/// A variable that is not set and has no default, a value with a line break, an unclosed `${`.
pub fn substitute(
    table: &mut Table,
    masks: &mut Masks,
    lookup: &dyn Fn(&str) -> Option<String>,
) -> Result<(), FlowError> {
    let seen = std::cell::RefCell::new(masks);
    let kept = |name: &str| lookup(name).inspect(|value| seen.borrow_mut().add(name, value));
    in_table(table, "", &kept)
}

fn in_table(table: &mut Table, path: &str, lookup: &dyn Fn(&str) -> Option<String>) -> Result<(), FlowError> {
    for (name, value) in table.iter_mut() {
        in_value(value, &join(path, name), name, lookup)?;
    }
    Ok(())
}

fn in_value(
    value: &mut Value,
    path: &str,
    name: &str,
    lookup: &dyn Fn(&str) -> Option<String>,
) -> Result<(), FlowError> {
    match value {
        Value::String(text) if may_name_variables(name) => {
            *text = expand(text, lookup).map_err(|message| FlowError::new(path, message))?;
        }
        Value::Array(list) => {
            for (number, item) in list.iter_mut().enumerate() {
                in_value(item, &join(path, &number.to_string()), name, lookup)?;
            }
        }
        // Keys of a service may stand in headers of any name.
        Value::Table(headers) if name == SECRETS && path.starts_with("models.") => {
            for (name, value) in headers.iter_mut() {
                in_value(value, &join(path, name), "api_key", lookup)?;
            }
        }
        // `[stages.select]` is a stage with a common word for a name.
        Value::Table(table) if path.rsplit('.').nth(1) == Some("stages") || !NEVER_INSIDE.contains(&name) => {
            in_table(table, path, lookup)?;
        }
        _ => {}
    }
    Ok(())
}

fn may_name_variables(key: &str) -> bool {
    KEYS.contains(&key) || ENDINGS.iter().any(|ending| key.ends_with(ending))
}

fn expand(text: &str, lookup: &dyn Fn(&str) -> Option<String>) -> Result<String, String> {
    let mut result = String::with_capacity(text.len());
    let mut rest = text;
    while let Some((before, after)) = rest.split_once('$') {
        result.push_str(before);
        if let Some(after) = after.strip_prefix('$') {
            result.push('$');
            rest = after;
        } else if let Some(after) = after.strip_prefix('{') {
            let (inside, after) = after.split_once('}').ok_or("`${` without `}`; write `$$` for a plain `$`")?;
            result.push_str(&variable(inside, lookup)?);
            rest = after;
        } else {
            result.push('$');
            rest = after;
        }
    }
    result.push_str(rest);
    Ok(result)
}

fn variable(inside: &str, lookup: &dyn Fn(&str) -> Option<String>) -> Result<String, String> {
    let end = inside.find(|c: char| !(c.is_ascii_alphanumeric() || c == '_')).unwrap_or(inside.len());
    let (name, rest) = inside.split_at(end);
    if name.is_empty() || name.starts_with(|c: char| c.is_ascii_digit()) {
        return Err(format!("`${{{inside}}}` names no variable; write ${{NAME}}, or `$$` for a plain `$`"));
    }
    // As in a shell: the forms with a colon take an empty variable for one that is not set.
    let value = lookup(name).filter(|value| rest.is_empty() || !value.is_empty());
    let value = match (value, rest) {
        (value, "") => value.ok_or(format!("the environment variable {name} is not set"))?,
        (value, rest) => match (rest.strip_prefix(":-"), rest.strip_prefix(":?")) {
            (Some(default), _) => value.unwrap_or_else(|| default.to_owned()),
            (_, Some(message)) => value.ok_or(format!("the environment variable {name} is not set: {message}"))?,
            _ => return Err(format!("`${{{inside}}}`: after the name come `:-default`, `:?message` or nothing")),
        },
    };
    if value.contains(['\n', '\r']) {
        return Err(format!("the environment variable {name} holds a line break"));
    }
    Ok(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lookup(name: &str) -> Option<String> {
        match name {
            "HOME" => Some("/home/a".into()),
            "EMPTY" => Some(String::new()),
            "LINES" => Some("a\nb".into()),
            _ => None,
        }
    }

    #[test]
    fn the_forms() {
        let ok = |text: &str| expand(text, &lookup);
        assert_eq!(ok("${HOME}/m").as_deref(), Ok("/home/a/m"));
        assert_eq!(ok("${NONE:-x/y}${HOME:-z}").as_deref(), Ok("x/y/home/a"));
        assert_eq!(ok("${EMPTY:-x}${EMPTY}").as_deref(), Ok("x"));
        assert_eq!(ok("$${HOME} costs 5$ $").as_deref(), Ok("${HOME} costs 5$ $"));
        assert_eq!(
            ok("${NONE:?set it to the model}").unwrap_err(),
            "the environment variable NONE is not set: set it to the model"
        );
        assert_eq!(ok("${NONE}").unwrap_err(), "the environment variable NONE is not set");
        for bad in ["${HOME", "${}", "${1A}", "${HOME:+x}", "${A B}", "${LINES}"] {
            assert!(ok(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn only_where_it_belongs() {
        let mut table: Table = toml::from_str(
            r#"
            [models.policy]
            source = "${HOME}/m"
            system_prompt = "${HOME}"
            headers = { X-Home = "Bearer ${HOME}" }
            body = { path = "${NONE}" }
            [stages.sql]
            command = ["run", "${HOME}"]
            sql = "SELECT '${NONE}'"
            prompt = "${NONE}"
            parse = "${NONE}$"
            select = { name = "${NONE}" }
            "#,
        )
        .expect("valid");
        let mut masks = Masks::default();
        substitute(&mut table, &mut masks, &lookup).expect("every variable is set");
        assert_eq!(table["models"]["policy"]["source"].as_str(), Some("/home/a/m"));
        assert_eq!(table["models"]["policy"]["system_prompt"].as_str(), Some("${HOME}"));
        assert_eq!(table["models"]["policy"]["headers"]["X-Home"].as_str(), Some("Bearer /home/a"));
        assert_eq!(table["models"]["policy"]["body"]["path"].as_str(), Some("${NONE}"));
        assert_eq!(table["stages"]["sql"]["command"][1].as_str(), Some("/home/a"));
        assert_eq!(table["stages"]["sql"]["select"]["name"].as_str(), Some("${NONE}"));
        assert_eq!(table["stages"]["sql"]["parse"].as_str(), Some("${NONE}$"));

        table.insert("name".into(), "${NONE}".into());
        assert_eq!(substitute(&mut table, &mut masks, &lookup).unwrap_err().key, "name");
        assert_eq!(masks.text("in /home/a/m"), "in ${HOME}/m");
    }
}
