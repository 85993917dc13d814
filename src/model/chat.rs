//! From a conversation to the text and the tokens a model was trained on, through the model's own
//! template.
//!
//! Templates are Jinja as transformers runs it (`apply_chat_template`): blocks trimmed, loop controls,
//! Python's string methods, `raise_exception`, `strftime_now`, and a `tojson` that writes what
//! Python's `json.dumps` does. A template comes with a downloaded model, so it runs on a budget of
//! steps and of output.

use std::io;

use chrono::{NaiveDate, NaiveTime};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde};
use minijinja::{Environment, Error, ErrorKind, Value, context};
use regex::Regex;
use serde::Serialize;
use serde_json::Value as Json;

use super::{ModelError, Tokenizer};

/// Steps of a rendering: some hundred times what the longest templates need for a long conversation.
const FUEL: u64 = 5_000_000;
/// Bytes of a rendering: well above any context.
const MAX_OUTPUT: usize = 64 << 20;

/// One turn of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ChatMessage {
    /// `system`, `user` or `assistant`, and whatever else the template knows.
    pub role: String,
    pub content: String,
}

impl ChatMessage {
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self { role: role.into(), content: content.into() }
    }
}

/// What a template calls for the date.
const ASKS_FOR_DATE: &str = "strftime_now";

/// A model's chat template, compiled.
pub struct ChatTemplate {
    environment: Environment<'static>,
    system_prompt: Option<String>,
    /// `bos_token`, `eos_token` and the like.
    special: Value,
}

impl ChatTemplate {
    /// Compiles a template. `system_prompt` takes the place of the template's default system turn: a
    /// conversation that brings none begins with it. `date` is what a template that asks for it is told, at any time of
    /// any day: the same conversation is the same text.
    ///
    /// # Errors
    /// When the template is no Jinja; the message has its line.
    pub fn new(
        source: &str,
        system_prompt: Option<String>,
        date: NaiveDate,
        tokenizer: &Tokenizer,
    ) -> Result<Self, ModelError> {
        let mut environment = Environment::new();
        environment.set_syntax(syntax().map_err(|e| invalid(&e))?);
        environment.set_fuel(Some(FUEL));
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", raise_exception);
        environment.add_function(ASKS_FOR_DATE, move |format: &str| strftime(date, format));
        environment.add_filter("tojson", tojson);
        environment.add_template_owned("chat_template", without_generation_tags(source)).map_err(|e| invalid(&e))?;
        Ok(Self { environment, system_prompt, special: Value::from(Serde(tokenizer.special_tokens())) })
    }

    /// Whether its text may depend on the date.
    pub fn asks_for_date(&self) -> bool {
        let template = self.environment.get_template("chat_template");
        template.is_ok_and(|template| template.undeclared_variables(false).contains(ASKS_FOR_DATE))
    }

    /// The text of a conversation; `add_generation_prompt` opens the assistant's next turn.
    ///
    /// # Errors
    /// When the template refuses the conversation (the message is its own), fails, or runs past its
    /// budget.
    pub fn render(&self, messages: &[ChatMessage], add_generation_prompt: bool) -> Result<String, ModelError> {
        let missing = messages.first().is_none_or(|message| message.role != "system");
        let system = self.system_prompt.as_ref().filter(|_| missing).map(|text| ChatMessage::new("system", text));
        let messages: Vec<&ChatMessage> = system.iter().chain(messages).collect();
        let template = self.environment.get_template("chat_template").map_err(|e| invalid(&e))?;
        let context = context! {
            messages => Value::from(Serde(&messages)),
            add_generation_prompt,
            tools => (),
            documents => (),
            ..self.special.clone()
        };
        let mut output = Limited { bytes: Vec::new() };
        template.render_captured_to(context, &mut output).map_err(|e| failed(&e))?;
        String::from_utf8(output.bytes).map_err(|_| ModelError::Setting("the chat template wrote no UTF-8".into()))
    }

    /// The tokens of a conversation. The template's text is the whole text, so nothing is added to
    /// it: a begin-of-text token is there exactly when the template writes it.
    ///
    /// # Errors
    /// As [`Self::render`] and [`Tokenizer::encode`].
    pub fn encode(
        &self,
        tokenizer: &Tokenizer,
        messages: &[ChatMessage],
        add_generation_prompt: bool,
    ) -> Result<Vec<u32>, ModelError> {
        tokenizer.encode(&self.render(messages, add_generation_prompt)?, false)
    }
}

fn invalid(error: &Error) -> ModelError {
    ModelError::Setting(format!("the chat template can't be read: {error:#}; set chat_template to one that can"))
}

fn failed(error: &Error) -> ModelError {
    let message = match error.kind() {
        ErrorKind::OutOfFuel => format!("ran past its budget of {FUEL} steps"),
        _ => format!("failed: {error}"),
    };
    ModelError::Setting(format!("the chat template {message}; change the messages, or set chat_template"))
}

/// Jinja as transformers sets it up.
fn syntax() -> Result<SyntaxConfig, Error> {
    SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()
}

/// `{% generation %}` marks the assistant's part for transformers' loss masks and writes nothing.
fn without_generation_tags(source: &str) -> String {
    let tag = |name: &str| Regex::new(&format!(r"(\{{%[-+]?\s*){name}(\s*[-+]?%\}})"));
    match (tag("generation"), tag("endgeneration")) {
        (Ok(open), Ok(close)) => {
            let opened = open.replace_all(source, "${1}if true${2}");
            close.replace_all(&opened, "${1}endif${2}").into_owned()
        }
        _ => source.to_owned(),
    }
}

fn raise_exception(message: String) -> Result<Value, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, message))
}

/// The beginning of the day as Python's `datetime.strftime`.
fn strftime(date: NaiveDate, format: &str) -> Result<String, Error> {
    use std::fmt::Write;
    let mut text = String::new();
    write!(text, "{}", date.and_time(NaiveTime::MIN).and_utc().format(format))
        .map_err(|_| Error::new(ErrorKind::InvalidOperation, format!("{format:?} is no date format")))?;
    Ok(text)
}

/// Python's `json.dumps(value, ensure_ascii=False, indent=indent)`: minijinja's own escapes HTML.
fn tojson(value: Value, options: Kwargs) -> Result<String, Error> {
    let indent: Option<usize> = options.get("indent")?;
    // transformers passes these on to json.dumps; what templates set is what is done anyway.
    let _: (Option<bool>, Option<Value>, Option<bool>) =
        (options.get("ensure_ascii")?, options.get("separators")?, options.get("sort_keys")?);
    options.assert_all_used()?;
    let fault = |e: serde_json::Error| Error::new(ErrorKind::InvalidOperation, e.to_string());
    let json: Json = serde_json::to_value(&value).map_err(fault)?;
    let mut bytes = Vec::new();
    match indent {
        Some(width) => {
            let indent = vec![b' '; width.min(16)];
            let formatter = serde_json::ser::PrettyFormatter::with_indent(&indent);
            json.serialize(&mut serde_json::Serializer::with_formatter(&mut bytes, formatter)).map_err(fault)?;
        }
        None => json.serialize(&mut serde_json::Serializer::with_formatter(&mut bytes, Spaced)).map_err(fault)?,
    }
    String::from_utf8(bytes).map_err(|e| Error::new(ErrorKind::InvalidOperation, e.to_string()))
}

/// JSON on one line with Python's spaces after commas and colons.
struct Spaced;

impl serde_json::ser::Formatter for Spaced {
    fn begin_array_value<W: ?Sized + io::Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + io::Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        writer.write_all(b": ")
    }
}

/// Output that stops growing.
struct Limited {
    bytes: Vec<u8>,
}

impl io::Write for Limited {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.bytes.len() + bytes.len() > MAX_OUTPUT {
            return Err(io::Error::other(format!("more than {MAX_OUTPUT} bytes of output")));
        }
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::config::Config;
    use crate::model::gguf::{Gguf, fixture};
    use crate::model::source::{ModelOptions, Pretrained, Source, builtin_path};

    fn tokenizer() -> Tokenizer {
        let (_dir, gguf) = fixture::small().open();
        let config = Config { vocab_size: 256, ..Config::from_gguf(&gguf).unwrap() };
        Tokenizer::bytes(&config).unwrap()
    }

    fn date() -> NaiveDate {
        NaiveDate::from_ymd_opt(2026, 3, 9).unwrap()
    }

    fn render(source: &str) -> Result<String, String> {
        let template = ChatTemplate::new(source, None, date(), &tokenizer()).map_err(|e| e.to_string())?;
        template.render(&[ChatMessage::new("user", " A <b> & \"c\" ")], true).map_err(|e| e.to_string())
    }

    /// `tests/oracle/tokenizer.py` writes what transformers gives.
    #[test]
    fn builtin_prompts_as_transformers() {
        builtin_path().unwrap_or_else(|e| panic!("{e}"));
        let model = Pretrained::open(&Source::Builtin, &ModelOptions::default()).unwrap();
        let fixture: Json = serde_json::from_str(include_str!("../../tests/fixtures/smollm2.json")).unwrap();
        for case in fixture["chats"].as_array().unwrap() {
            let text = |value: &Json| value.as_str().unwrap().to_owned();
            let messages: Vec<_> = case["messages"]
                .as_array()
                .unwrap()
                .iter()
                .map(|message| ChatMessage::new(text(&message["role"]), text(&message["content"])))
                .collect();
            let open = case["add_generation_prompt"].as_bool().unwrap();
            assert_eq!(model.chat().unwrap().render(&messages, open).unwrap(), text(&case["text"]));
            let ids: Vec<u32> = case["ids"].as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect();
            assert_eq!(model.encode_chat(&messages, open).unwrap(), ids);
        }
    }

    #[test]
    fn a_system_prompt_takes_the_place_of_the_default() {
        let gguf = Gguf::open(&builtin_path().unwrap_or_else(|e| panic!("{e}"))).unwrap();
        let source = gguf.metadata().text("tokenizer.chat_template").unwrap();
        let template = ChatTemplate::new(source, Some("Be brief.".into()), date(), &tokenizer()).unwrap();
        let own = template.render(&[ChatMessage::new("user", "Hi")], false).unwrap();
        assert_eq!(own, "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n");
        let brought = [ChatMessage::new("system", "Be long."), ChatMessage::new("user", "Hi")];
        assert!(template.render(&brought, false).unwrap().starts_with("<|im_start|>system\nBe long.<|im_end|>"));
    }

    #[test]
    fn templates_run_as_in_transformers() {
        for (source, expected) in [
            (
                "{% for m in messages %}\n  {% if true %}\n{{ m.content.strip() }}\n  {% endif %}\n{% endfor %}\n",
                "A <b> & \"c\"\n",
            ),
            ("{{ messages[0] | tojson }}", r#"{"role": "user", "content": " A <b> & \"c\" "}"#),
            ("{{ [1, {'a': none}] | tojson(indent=2) }}", "[\n  1,\n  {\n    \"a\": null\n  }\n]"),
            ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
            (
                "{% set ns = namespace(n=0) %}{% for i in range(3) %}{% set ns.n = ns.n + i %}{% endfor %}{{ ns.n }}",
                "3",
            ),
            ("{%- generation -%} x {%- endgeneration %}", "x"),
            ("{{ tools is none }}{{ bos_token is defined }}{{ add_generation_prompt }}", "TrueFalseTrue"),
            ("{{ strftime_now('%d %b %Y') }}", "09 Mar 2026"),
            ("{{ strftime_now('%Y-%m-%dT%H:%M:%S') }}", "2026-03-09T00:00:00"),
        ] {
            assert_eq!(render(source).as_deref(), Ok(expected), "{source}");
        }
    }

    #[test]
    fn a_template_that_asks_for_the_date_is_known() {
        for (source, asks) in [
            ("{{ strftime_now('%Y') }}", true),
            (
                "{% if date_string is not defined and strftime_now is defined %}{{ strftime_now('%d') }}{% endif %}",
                true,
            ),
            ("{%- macro today() %}{{ strftime_now('%Y') }}{% endmacro %}{{ today() }}", true),
            ("{% for m in messages %}{% set now = strftime_now %}{{ now('%Y') }}{% endfor %}", true),
            ("{{ 'strftime_now' }}{# strftime_now() #}", false),
            ("{% for m in messages %}{{ m.content }}{% endfor %}", false),
        ] {
            let template = ChatTemplate::new(source, None, date(), &tokenizer()).unwrap();
            assert_eq!(template.asks_for_date(), asks, "{source}");
        }
    }

    #[test]
    fn templates_are_bounded_and_refuse_in_their_own_words() {
        for (source, part) in [
            ("{{ raise_exception('only users, please') }}", "only users, please"),
            ("{% for a in range(9000) %}{% for b in range(9000) %}{{ b }}{% endfor %}{% endfor %}", "past its budget"),
            ("{{ 'x' * 10000000000 }}", "the chat template"),
            ("{% if %}", "can't be read"),
            ("{{ strftime_now('%!') }}", "is no date format"),
        ] {
            let message = render(source).unwrap_err();
            assert!(message.contains(part), "{source}: {message}");
        }
    }
}
