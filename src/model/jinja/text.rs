//! Methods of Python's strings, lists and dictionaries.

use minijinja::formatting::FormatStyle;
use minijinja::value::{Kwargs, Tuple, ValueKind, from_args};
use minijinja::{Error, State, Value};
use minijinja_contrib::pycompat::unknown_method_callback;

use super::filters::formatted;
use super::{LONGEST_PADDING, fault};

/// Calls a method of Python that minijinja does not have.
pub fn method(state: &mut State<'_, '_>, value: &Value, name: &str, args: &[Value]) -> Result<Value, Error> {
    let found = match value.kind() {
        ValueKind::String => of_text(value.as_str().unwrap_or_default(), name, args),
        ValueKind::Seq => of_list(value, name, args),
        ValueKind::Map if name == "copy" && args.is_empty() => Ok(Some(value.clone())),
        _ => Ok(None),
    }?;
    match found {
        Some(found) => Ok(found),
        None => unknown_method_callback(state, value, name, args),
    }
}

fn of_list(list: &Value, name: &str, args: &[Value]) -> Result<Option<Value>, Error> {
    match name {
        "index" => {
            let (wanted,): (&Value,) = from_args(args)?;
            let place = list.try_iter()?.position(|item| item == *wanted);
            place.map(|at| Some(Value::from(at))).ok_or_else(|| fault(format!("{wanted} is not in the list")))
        }
        "copy" if args.is_empty() => Ok(Some(list.clone())),
        _ => Ok(None),
    }
}

fn of_text(text: &str, name: &str, args: &[Value]) -> Result<Option<Value>, Error> {
    let none_found = || fault(format!("{name}: substring not found"));
    Ok(Some(match name {
        "strip" | "lstrip" | "rstrip" => stripped(text, name, args)?,
        "removeprefix" => {
            let (prefix,): (&str,) = from_args(args)?;
            Value::from(text.strip_prefix(prefix).unwrap_or(text))
        }
        "removesuffix" => {
            let (suffix,): (&str,) = from_args(args)?;
            Value::from(text.strip_suffix(suffix).unwrap_or(text))
        }
        "partition" | "rpartition" => partition(text, name, args)?,
        "split" => list(split(text, args)?),
        "rsplit" => list(rsplit(text, args)?),
        "splitlines" => list(splitlines(text, args)?),
        "find" => Value::from(found(text, args, false)?.map_or(-1, |at| at as i64)),
        "rfind" => Value::from(found(text, args, true)?.map_or(-1, |at| at as i64)),
        "index" => Value::from(found(text, args, false)?.ok_or_else(none_found)?),
        "rindex" => Value::from(found(text, args, true)?.ok_or_else(none_found)?),
        "count" => {
            let (part, within, _) = searched(text, args)?;
            Value::from(if part.is_empty() { within.chars().count() + 1 } else { within.matches(part).count() })
        }
        "startswith" | "endswith" => begins_or_ends(text, name, args)?,
        "zfill" => {
            let (width,): (usize,) = from_args(args)?;
            let sign = usize::from(text.starts_with(['+', '-']));
            let (sign, digits) = text.split_at(sign);
            Value::from(format!("{sign}{}{digits}", missing(text, width, '0')?))
        }
        "ljust" | "rjust" | "center" => justified(text, name, args)?,
        "title" => {
            let () = from_args(args)?;
            Value::from(title(text))
        }
        "capitalize" => {
            let () = from_args(args)?;
            let mut chars = text.chars();
            let first = chars.next().map(|c| c.to_uppercase().collect::<String>()).unwrap_or_default();
            Value::from(first + &chars.as_str().to_lowercase())
        }
        "swapcase" => {
            let () = from_args(args)?;
            let swapped =
                |c: char| if c.is_uppercase() { c.to_lowercase().to_string() } else { c.to_uppercase().to_string() };
            Value::from(text.chars().map(swapped).collect::<String>())
        }
        "isspace" => {
            let () = from_args(args)?;
            Value::from(!text.is_empty() && text.chars().all(is_space))
        }
        "format" => Value::from(formatted(FormatStyle::StrFormat, text, args)?),
        _ => return Ok(None),
    }))
}

/// White space as Python's `str.isspace` has it: the four separators of ASCII too.
fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c)
}

fn list(parts: Vec<&str>) -> Value {
    parts.into_iter().map(Value::from).collect()
}

fn stripped(text: &str, name: &str, args: &[Value]) -> Result<Value, Error> {
    let (chars,): (Option<&str>,) = from_args(args)?;
    let drop = |c: char| chars.map_or_else(|| is_space(c), |chars| chars.contains(c));
    Ok(Value::from(match name {
        "lstrip" => text.trim_start_matches(drop),
        "rstrip" => text.trim_end_matches(drop),
        _ => text.trim_matches(drop),
    }))
}

fn partition(text: &str, name: &str, args: &[Value]) -> Result<Value, Error> {
    let (separator,): (&str,) = from_args(args)?;
    if separator.is_empty() {
        return Err(fault(format!("{name}: empty separator")));
    }
    let parts = match name {
        "partition" => text.split_once(separator).map_or([text, "", ""], |(a, b)| [a, separator, b]),
        _ => text.rsplit_once(separator).map_or(["", "", text], |(a, b)| [a, separator, b]),
    };
    Ok(Value::from(Tuple::from(parts.map(Value::from))))
}

/// `(sep=None, maxsplit=-1)`: at white space without a separator, and how often at most.
fn splits(args: &[Value]) -> Result<(Option<String>, Option<usize>), Error> {
    let (separator, most, options): (Option<String>, Option<i64>, Kwargs) = from_args(args)?;
    let separator = if separator.is_some() { separator } else { options.get("sep")? };
    let most = if most.is_some() { most } else { options.get("maxsplit")? };
    options.assert_all_used()?;
    if separator.as_deref() == Some("") {
        return Err(fault("split: empty separator"));
    }
    Ok((separator, most.and_then(|most| usize::try_from(most).ok())))
}

fn split<'a>(text: &'a str, args: &[Value]) -> Result<Vec<&'a str>, Error> {
    let (separator, most) = splits(args)?;
    let most = most.unwrap_or(usize::MAX);
    if let Some(separator) = separator {
        return Ok(text.splitn(most.saturating_add(1), separator.as_str()).collect());
    }
    let (mut rest, mut parts) = (text.trim_start_matches(is_space), Vec::new());
    while !rest.is_empty() {
        let end = rest.find(is_space).filter(|_| parts.len() < most).unwrap_or(rest.len());
        let (part, after) = rest.split_at(end);
        parts.push(part);
        rest = after.trim_start_matches(is_space);
    }
    Ok(parts)
}

fn rsplit<'a>(text: &'a str, args: &[Value]) -> Result<Vec<&'a str>, Error> {
    let (separator, most) = splits(args)?;
    let most = most.unwrap_or(usize::MAX);
    let mut parts: Vec<&str> = Vec::new();
    if let Some(separator) = separator {
        parts.extend(text.rsplitn(most.saturating_add(1), separator.as_str()));
    } else {
        let mut rest = text.trim_end_matches(is_space);
        while !rest.is_empty() {
            let last = rest.char_indices().rev().find(|(_, c)| is_space(*c)).filter(|_| parts.len() < most);
            let (before, part) = rest.split_at(last.map_or(0, |(at, c)| at + c.len_utf8()));
            parts.push(part);
            rest = before.trim_end_matches(is_space);
        }
    }
    parts.reverse();
    Ok(parts)
}

/// Returns whether a character ends a line for `str.splitlines`.
pub fn ends_line(c: char) -> bool {
    matches!(c, '\n' | '\r' | '\u{b}' | '\u{c}' | '\u{1c}'..='\u{1e}' | '\u{85}' | '\u{2028}' | '\u{2029}')
}

fn splitlines<'a>(text: &'a str, args: &[Value]) -> Result<Vec<&'a str>, Error> {
    let (keep, options): (Option<Value>, Kwargs) = from_args(args)?;
    let keep = if keep.is_some() { keep } else { options.get("keepends")? };
    options.assert_all_used()?;
    let keep = keep.is_some_and(|keep| keep.is_true());
    Ok(lines(text, keep))
}

/// Lines as `str.splitlines` parts them, with their ends or without.
pub fn lines(text: &str, keep: bool) -> Vec<&str> {
    let (mut rest, mut parts) = (text, Vec::new());
    while !rest.is_empty() {
        let (at, width) = match rest.char_indices().find(|(_, c)| ends_line(*c)) {
            Some((at, '\r')) if rest.get(at + 1..).is_some_and(|after| after.starts_with('\n')) => (at, 2),
            Some((at, c)) => (at, c.len_utf8()),
            None => (rest.len(), 0),
        };
        parts.push(rest.get(..if keep { at + width } else { at }).unwrap_or_default());
        rest = rest.get(at + width..).unwrap_or_default();
    }
    parts
}

/// `(part, start=0, end=len)`: what is looked for, where, and the characters before that place.
fn searched<'a, 'b>(text: &'a str, args: &'b [Value]) -> Result<(&'b str, &'a str, usize), Error> {
    let (part, start, end): (&str, Option<i64>, Option<i64>) = from_args(args)?;
    let (within, before) = slice(text, start, end);
    Ok((part, within, before))
}

/// `text[start:end]` by characters, and how many are before it.
fn slice(text: &str, start: Option<i64>, end: Option<i64>) -> (&str, usize) {
    let count = text.chars().count();
    let place = |at: i64| {
        let at = if at < 0 { at.saturating_add(count as i64).max(0) } else { at };
        usize::try_from(at).unwrap_or(0)
    };
    let (start, end) = (start.map_or(0, place), end.map_or(count, place).min(count));
    let byte = |at: usize| text.char_indices().nth(at).map_or(text.len(), |(byte, _)| byte);
    if start > end { ("", start) } else { (text.get(byte(start)..byte(end)).unwrap_or_default(), start) }
}

/// The place of a part in characters.
fn found(text: &str, args: &[Value], last: bool) -> Result<Option<usize>, Error> {
    let (part, within, before) = searched(text, args)?;
    let at = if last { within.rfind(part) } else { within.find(part) };
    Ok(at.map(|at| before + within.get(..at).unwrap_or_default().chars().count()))
}

fn begins_or_ends(text: &str, name: &str, args: &[Value]) -> Result<Value, Error> {
    let (parts, start, end): (&Value, Option<i64>, Option<i64>) = from_args(args)?;
    let (within, _) = slice(text, start, end);
    let holds = |part: &str| if name == "startswith" { within.starts_with(part) } else { within.ends_with(part) };
    if let Some(part) = parts.as_str() {
        return Ok(Value::from(holds(part)));
    }
    let wrong = || fault(format!("{name} takes a text or a tuple of texts, not {}", parts.kind()));
    if parts.kind() != ValueKind::Seq {
        return Err(wrong());
    }
    let mut any = false;
    for part in parts.try_iter()? {
        any |= holds(part.as_str().ok_or_else(wrong)?);
    }
    Ok(Value::from(any))
}

/// The number of characters that `text` lacks to be `width` long.
fn missing(text: &str, width: usize, fill: char) -> Result<String, Error> {
    if width > LONGEST_PADDING {
        return Err(fault(format!("a width of {width} is more than {LONGEST_PADDING}")));
    }
    Ok(fill.to_string().repeat(width.saturating_sub(text.chars().count())))
}

fn justified(text: &str, name: &str, args: &[Value]) -> Result<Value, Error> {
    let (width, fill): (i64, Option<char>) = from_args(args)?;
    let width = usize::try_from(width).unwrap_or(0);
    let padding = missing(text, width, fill.unwrap_or(' '))?;
    Ok(Value::from(match name {
        "ljust" => format!("{text}{padding}"),
        "rjust" => format!("{padding}{text}"),
        _ => sides(text, &padding, width),
    }))
}

/// `str.center` with spaces.
pub fn centered(text: &str, width: i64) -> Result<String, Error> {
    let width = usize::try_from(width).unwrap_or(0);
    Ok(sides(text, &missing(text, width, ' ')?, width))
}

/// A text between two parts of a padding: Python puts the odd one to the left where the width is odd.
fn sides(text: &str, padding: &str, width: usize) -> String {
    let count = padding.chars().count();
    let left = count / 2 + (count & width & 1);
    let (before, after): (String, String) =
        (padding.chars().take(left).collect(), padding.chars().skip(left).collect());
    format!("{before}{text}{after}")
}

/// Every letter that no letter stands before in upper case, the others in lower case.
fn title(text: &str) -> String {
    let mut inside = false;
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        if inside {
            out.extend(c.to_lowercase())
        } else {
            out.extend(c.to_uppercase())
        }
        inside = c.is_lowercase() || c.is_uppercase();
    }
    out
}
