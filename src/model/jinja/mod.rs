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
    environment.add_template_owned(name, source::as_jinja2(source))?;
    Ok(environment)
}

/// An error in a template's own doing.
fn fault(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidOperation, message.into())
}
