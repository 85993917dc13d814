//! Filters, tests and globals of Jinja2 where minijinja has others or none.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use minijinja::formatting::{FormatStyle, format};
use minijinja::value::{Kwargs, Object, ObjectRepr, Rest, ValueKind, from_args};
use minijinja::{Environment, Error, ErrorKind, State, Value};

use super::{LONGEST_PADDING, fault, repr, text};

/// The filter that stands for Python's `%`.
pub const PERCENT: &str = "__mod__";

/// Python writes whole numbers of any size; these are the largest that a float gives back as they are.
const WHOLE: f64 = 9_007_199_254_740_992.0;

pub fn add_to(environment: &mut Environment<'_>) {
    environment.add_filter(PERCENT, percent);
    environment.add_filter("default", default);
    environment.add_filter("d", default);
    environment.add_filter("int", int);
    environment.add_filter("float", float);
    environment.add_filter("string", |value: &Value| {
        if value.as_str().is_some() { Ok(value.clone()) } else { repr::str(value).map(Value::from) }
    });
    environment.add_filter("escape", escape);
    environment.add_filter("e", escape);
    environment.add_filter("indent", indent);
    environment.add_filter("center", |text: &Value, width: Option<i64>| {
        text::centered(&text.to_string(), width.unwrap_or(80))
    });
    environment.add_filter("truncate", truncate);
    environment.add_filter("wordcount", |text: &Value| {
        text.to_string().split(|c: char| !(c.is_alphanumeric() || c == '_')).filter(|word| !word.is_empty()).count()
    });
    environment.add_test("iterable", |value: &Value| value.is_undefined() || (!value.is_none() && iterates(value)));
    environment.add_test("sequence", is_sequence);
    environment.add_test("callable", is_callable);
    environment.add_function("cycler", |items: Rest<Value>| match items.0.as_slice() {
        [] => Err(fault("cycler needs at least one item")),
        _ => Ok(Value::from_object(Cycler { items: items.0, at: AtomicUsize::new(0) })),
    });
    environment.add_function("joiner", |sep: Option<Value>, options: Kwargs| {
        let sep = if sep.is_some() { sep } else { options.get("sep")? };
        options.assert_all_used()?;
        let sep = sep.unwrap_or_else(|| Value::from(", "));
        Ok::<_, Error>(Value::from_object(Joiner { sep, used: AtomicBool::new(false) }))
    });
}

fn iterates(value: &Value) -> bool {
    value.try_iter().is_ok()
}

/// Values that have a length and subscripts in Python.
fn is_sequence(value: &Value) -> bool {
    value.is_undefined() || matches!(value.kind(), ValueKind::String | ValueKind::Seq | ValueKind::Map)
}

/// Functions and macros; an undefined value is one in Jinja2 too.
fn is_callable(value: &Value) -> bool {
    let is_macro = || value.as_object().is_some_and(|object| object.type_name().ends_with("::Macro"));
    value.is_undefined() || value.kind() == ValueKind::Plain || is_macro()
}

/// `default(value, default_value="", boolean=False)`.
fn default(
    value: &Value,
    default_value: Option<Value>,
    boolean: Option<Value>,
    options: Kwargs,
) -> Result<Value, Error> {
    let default_value = if default_value.is_some() { default_value } else { options.get("default_value")? };
    let boolean = if boolean.is_some() { boolean } else { options.get("boolean")? };
    options.assert_all_used()?;
    let wanted = value.is_undefined() || (boolean.is_some_and(|flag| flag.is_true()) && !value.is_true());
    Ok(if wanted { default_value.unwrap_or_else(|| Value::from("")) } else { value.clone() })
}

/// `int(value, default=0, base=10)`: what is no number is the default.
fn int(value: &Value, default: Option<Value>, base: Option<u32>, options: Kwargs) -> Result<Value, Error> {
    let default = if default.is_some() { default } else { options.get("default")? };
    let base = if base.is_some() { base } else { options.get("base")? }.unwrap_or(10);
    options.assert_all_used()?;
    let whole = |x: f64| (x.is_finite() && x.abs() <= WHOLE).then(|| Value::from(x.trunc() as i64));
    let found = match value.kind() {
        ValueKind::Bool => Some(Value::from(i64::from(value.is_true()))),
        ValueKind::Number if value.is_integer() => Some(value.clone()),
        ValueKind::Number => f64::try_from(value.clone()).ok().and_then(whole),
        ValueKind::String => {
            let text = value.as_str().unwrap_or_default();
            whole_number(text, base).map(Value::from).or_else(|| number(text).and_then(whole))
        }
        _ => None,
    };
    Ok(found.or(default).unwrap_or_else(|| Value::from(0)))
}

/// Python's `int(text, base)`.
fn whole_number(text: &str, base: u32) -> Option<i128> {
    let text = text.trim();
    let (negative, digits) = match text.strip_prefix('-') {
        Some(digits) => (true, digits),
        None => (false, text.strip_prefix('+').unwrap_or(text)),
    };
    let prefixes = [(2, ["0b", "0B"]), (8, ["0o", "0O"]), (16, ["0x", "0X"])];
    let named = prefixes.iter().find(|(_, names)| names.iter().any(|name| digits.starts_with(name)));
    let (base, digits) = match named {
        Some((found, _)) if base == *found || base == 0 => (*found, digits.get(2..)?),
        _ => (if base == 0 { 10 } else { base }, digits),
    };
    let plain = digits.replace('_', "");
    let good = (2..=36).contains(&base) && plain.starts_with(|c: char| c.is_ascii_alphanumeric());
    let misplaced = digits.starts_with('_') || digits.ends_with('_') || digits.contains("__");
    let number = i128::from_str_radix(&plain, base).ok().filter(|_| good && !misplaced)?;
    Some(if negative { -number } else { number })
}

/// Python's `float(text)`.
fn number(text: &str) -> Option<f64> {
    text.trim().replace('_', "").parse().ok()
}

/// `float(value, default=0.0)`.
fn float(value: &Value, default: Option<Value>, options: Kwargs) -> Result<Value, Error> {
    let default = if default.is_some() { default } else { options.get("default")? };
    options.assert_all_used()?;
    let found = match value.kind() {
        ValueKind::Bool => Some(if value.is_true() { 1.0 } else { 0.0 }),
        ValueKind::Number => f64::try_from(value.clone()).ok(),
        ValueKind::String => number(value.as_str().unwrap_or_default()),
        _ => None,
    };
    Ok(found.map(Value::from).or(default).unwrap_or_else(|| Value::from(0.0)))
}

/// MarkupSafe's `escape`.
fn escape(value: &Value) -> Result<String, Error> {
    let text = repr::str(value)?;
    let signs = [("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ("'", "&#39;"), ("\"", "&#34;")];
    Ok(signs.iter().fold(text, |text, (sign, written)| text.replace(sign, written)))
}

/// `indent(text, width=4, first=False, blank=False)`; the width may be the indentation itself.
fn indent(
    text: &Value,
    width: Option<Value>,
    first: Option<Value>,
    blank: Option<Value>,
    options: Kwargs,
) -> Result<String, Error> {
    let or_named = |name: &str, given: Option<Value>| if given.is_some() { Ok(given) } else { options.get(name) };
    let (width, first, blank) = (or_named("width", width)?, or_named("first", first)?, or_named("blank", blank)?);
    options.assert_all_used()?;
    let step = match width {
        Some(step) if step.as_str().is_some() => step.to_string(),
        Some(width) => " ".repeat(usize::try_from(width).unwrap_or(0).min(LONGEST_PADDING)),
        None => " ".repeat(4),
    };
    let holds = |flag: Option<Value>| flag.is_some_and(|flag| flag.is_true());
    let (first, blank) = (holds(first), holds(blank));
    let text = text.to_string();
    // Jinja2 ends the text with a line of its own, so that its last line end stays.
    let mut lines = text::lines(&text, false);
    if text.is_empty() || text.ends_with(text::ends_line) {
        lines.push("");
    }
    let mut out = String::new();
    for (i, line) in lines.iter().enumerate() {
        let indented = if i == 0 { first } else { blank || !line.is_empty() };
        out.extend([if i > 0 { "\n" } else { "" }, if indented { &step } else { "" }, line]);
    }
    Ok(out)
}

/// `truncate(text, length=255, killwords=False, end="...", leeway=5)`.
fn truncate(
    text: &Value,
    length: Option<usize>,
    killwords: Option<Value>,
    end: Option<String>,
    options: Kwargs,
) -> Result<String, Error> {
    let length = if length.is_some() { length } else { options.get("length")? }.unwrap_or(255);
    let killwords = if killwords.is_some() { killwords } else { options.get("killwords")? };
    let end = if end.is_some() { end } else { options.get("end")? }.unwrap_or_else(|| "...".into());
    let leeway = options.get::<Option<usize>>("leeway")?.unwrap_or(5);
    options.assert_all_used()?;
    let text = text.to_string();
    if text.chars().count() <= length.saturating_add(leeway) {
        return Ok(text);
    }
    let kept: String = text.chars().take(length.saturating_sub(end.chars().count())).collect();
    let whole = if killwords.is_some_and(|flag| flag.is_true()) {
        &kept
    } else {
        kept.rsplit_once(' ').map_or(kept.as_str(), |(words, _)| words)
    };
    Ok(format!("{whole}{end}"))
}

/// Python's `left % right`: what is put into a text, or the rest of a division.
fn percent(left: &Value, right: Value) -> Result<Value, Error> {
    if let Some(text) = left.as_str() {
        let arguments = if right.is_tuple() { right.try_iter()?.collect() } else { vec![right] };
        return formatted(FormatStyle::Printf, text, &arguments).map(Value::from);
    }
    let both_whole = left.is_integer() && right.is_integer();
    let wrong = || fault(format!("% between {} and {}", left.kind(), right.kind()));
    if !(left.is_number() && right.is_number()) {
        return Err(wrong());
    }
    if both_whole {
        let (a, b) = (i128::try_from(left.clone())?, i128::try_from(right.clone())?);
        let rest = a.checked_rem(b).ok_or_else(wrong)?;
        return Ok(Value::from(if rest != 0 && (rest < 0) != (b < 0) { rest + b } else { rest }));
    }
    let (a, b) = (f64::try_from(left.clone())?, f64::try_from(right.clone())?);
    let rest = a % b;
    Ok(Value::from(if rest != 0.0 && (rest < 0.0) != (b < 0.0) { rest + b } else { rest }))
}

/// A format with what is put into it, of widths that are bounded.
pub fn formatted(style: FormatStyle, text: &str, arguments: &[Value]) -> Result<String, Error> {
    let widths = text.split(|c: char| !c.is_ascii_digit()).filter(|digits| !digits.is_empty());
    let wide = |digits: &str| digits.parse::<usize>().map_or(true, |width| width > LONGEST_PADDING);
    let given = |value: &Value| value.as_usize().is_some_and(|width| width > LONGEST_PADDING);
    // A width may stand in the text or, for `*` and `{:{}}`, among the arguments.
    let nested = text.contains('*') || text.contains(":{");
    if widths.filter(|digits| digits.len() > 4).any(wide) || (nested && arguments.iter().any(given)) {
        return Err(fault(format!("a format is wider than {LONGEST_PADDING}")));
    }
    format(style, text, arguments)
}

/// `cycler("a", "b")`: one after the other with `next()`.
#[derive(Debug)]
struct Cycler {
    items: Vec<Value>,
    at: AtomicUsize,
}

impl Cycler {
    fn current(&self) -> Value {
        self.items.get(self.at.load(Ordering::Relaxed)).cloned().unwrap_or_default()
    }
}

impl Object for Cycler {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Plain
    }

    fn get_value(self: &Arc<Self>, key: &Value) -> Option<Value> {
        (key.as_str() == Some("current")).then(|| self.current())
    }

    fn call_method(self: &Arc<Self>, _: &mut State<'_, '_>, method: &str, args: &[Value]) -> Result<Value, Error> {
        let () = from_args(args)?;
        match method {
            "next" => {
                let now = self.current();
                let next = (self.at.load(Ordering::Relaxed) + 1) % self.items.len();
                self.at.store(next, Ordering::Relaxed);
                Ok(now)
            }
            "reset" => {
                self.at.store(0, Ordering::Relaxed);
                Ok(Value::from(()))
            }
            _ => Err(Error::from(ErrorKind::UnknownMethod)),
        }
    }
}

/// `joiner(", ")`: nothing when it is called first, the separator from then on.
#[derive(Debug)]
struct Joiner {
    sep: Value,
    used: AtomicBool,
}

impl Object for Joiner {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Plain
    }

    fn call(self: &Arc<Self>, _: &mut State<'_, '_>, args: &[Value]) -> Result<Value, Error> {
        let () = from_args(args)?;
        Ok(if self.used.swap(true, Ordering::Relaxed) { self.sep.clone() } else { Value::from("") })
    }
}
