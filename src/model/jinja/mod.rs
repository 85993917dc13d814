//! Jinja2 as transformers sets it up for chat templates.
//!
//! minijinja runs the templates; what it does in another way than Jinja2 and Python is made up for here: how the
//! source is read ([`source`]), the methods of strings ([`text`]), filters, tests and globals ([`filters`]), `tojson`
//! ([`json`]), and how values are written ([`repr`]).

mod filters;
mod json;
mod repr;
mod source;
mod text;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::ValueKind;
use minijinja::{Environment, Error, ErrorKind, escape_formatter};

/// Widths and lengths that a template may ask for: well above what stands in any text.
const LONGEST_PADDING: usize = 1 << 16;

/// Bytes of a template that any stack can parse.
const SHORT: usize = 4096;
/// Bytes of stack that a longer one is parsed with.
const STACK: usize = 1 << 30;
/// Bytes of the longest template.
const LONGEST: usize = 1 << 20;

/// An environment with the one template `name`.
///
/// # Errors
/// When the source is no Jinja; the message has its line.
pub fn environment(name: &'static str, source: &str) -> Result<Environment<'static>, Error> {
    let mut environment = Environment::new();
    environment.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
    environment.set_unknown_method_callback(text::method);
    environment.set_formatter(|out, state, value| match value.kind() {
        ValueKind::Seq | ValueKind::Map | ValueKind::Number => Ok(out.write_str(&repr::str(value)?)?),
        _ => escape_formatter(out, state, value),
    });
    filters::add_to(&mut environment);
    environment.add_filter("tojson", json::tojson);
    if source.len() > LONGEST {
        return Err(fault(format!("it is longer than {} MiB", LONGEST >> 20)));
    }
    let source = source::as_jinja2(source);
    if source.len() < SHORT {
        environment.add_template_owned(name, source)?;
        return Ok(environment);
    }
    // A template is parsed by recursion, and a stack that overflows ends the whole process.
    let roomy = std::thread::Builder::new().stack_size(STACK);
    std::thread::scope(|scope| {
        let compile = || environment.add_template_owned(name, source);
        let thread = roomy.spawn_scoped(scope, compile).map_err(|e| fault(format!("no thread to parse it: {e}")))?;
        thread.join().unwrap_or_else(|_| Err(fault("it can't be parsed")))
    })?;
    Ok(environment)
}

/// An error in a template's own doing.
fn fault(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidOperation, message.into())
}
