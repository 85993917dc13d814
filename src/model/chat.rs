//! Chat templates: conversations as the text and the tokens that a model was trained on.
//!
//! Templates are rendered as by transformers (`apply_chat_template`), see `jinja`. A template comes with a downloaded
//! model, so its steps and its output are limited.

use std::io;

use chrono::{NaiveDate, NaiveTime};
use minijinja::value::Serde;
use minijinja::{Environment, Error, ErrorKind, Value, context};
use serde::Serialize;
use serde_json::{Map, Value as Json};

use super::jinja;
use super::{ModelError, Opened, Tokenizer};

/// Largest number of steps of a rendering: some hundred times that of the longest templates for a long conversation.
const FUEL: u64 = 5_000_000;
/// Largest number of bytes of a rendering, well above any context.
const MAX_OUTPUT: usize = 64 << 20;

/// One turn of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ChatMessage {
    /// `system`, `user`, `assistant`, or another role that the template supports.
    pub role: String,
    pub content: String,
    /// Other keys of the turn: `name`, `tool_calls`, `reasoning_content`. Templates and endpoints get them unchanged.
    #[serde(flatten)]
    pub more: Map<String, Json>,
}

impl ChatMessage {
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self { role: role.into(), content: content.into(), more: Map::new() }
    }

    fn is_assistant(&self) -> bool {
        self.role == ASSISTANT
    }
}

/// A conversation and the tools that the model may call in it, borrowed.
#[derive(Debug, Clone, Copy)]
pub struct Conversation<'a> {
    pub messages: &'a [ChatMessage],
    /// JSON list of tools, as in OpenAI's API and in transformers.
    pub tools: Option<&'a Json>,
}

impl<'a> Conversation<'a> {
    /// Other turns with the same tools.
    fn of(self, messages: &'a [ChatMessage]) -> Self {
        Self { messages, ..self }
    }
}

impl<'a> From<&'a [ChatMessage]> for Conversation<'a> {
    fn from(messages: &'a [ChatMessage]) -> Self {
        Self { messages, tools: None }
    }
}

impl<'a, const N: usize> From<&'a [ChatMessage; N]> for Conversation<'a> {
    fn from(messages: &'a [ChatMessage; N]) -> Self {
        messages.as_slice().into()
    }
}

impl<'a> From<&'a Vec<ChatMessage>> for Conversation<'a> {
    fn from(messages: &'a Vec<ChatMessage>) -> Self {
        messages.as_slice().into()
    }
}

/// A conversation and its tools, owned, as rows have them.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Chat {
    pub messages: Vec<ChatMessage>,
    pub tools: Option<Json>,
}

impl<'a> From<&'a Chat> for Conversation<'a> {
    fn from(chat: &'a Chat) -> Self {
        Self { messages: &chat.messages, tools: chat.tools.as_ref() }
    }
}

/// The role of the model's turns.
const ASSISTANT: &str = "assistant";

/// Tag that transformers appends to the content of a continued turn, to find where it ends.
const END_OF_MESSAGE: &str = "CONTINUE_FINAL_MESSAGE_TAG ";

/// Name of the template in its environment.
const NAME: &str = "chat_template";

/// Name of the function that returns the date.
const ASKS_FOR_DATE: &str = "strftime_now";

/// A model's chat template, compiled.
pub struct ChatTemplate {
    environment: Environment<'static>,
    system_prompt: Option<String>,
    /// `bos_token`, `eos_token` and the like.
    special: Value,
}

impl ChatTemplate {
    /// Compiles a template. `system_prompt` is the first turn of conversations that have no system turn. `date` is the
    /// date that `strftime_now` returns, so that a conversation always has the same text.
    ///
    /// # Errors
    /// The template is not valid Jinja; the message has the line.
    pub fn new(
        source: &str,
        system_prompt: Option<String>,
        date: NaiveDate,
        tokenizer: &Tokenizer,
    ) -> Result<Self, ModelError> {
        let mut environment = jinja::environment(NAME, source).map_err(|e| invalid(&e))?;
        environment.set_fuel(Some(FUEL));
        environment.add_function("raise_exception", raise_exception);
        environment.add_function(ASKS_FOR_DATE, move |format: &str| strftime(date, format));
        Ok(Self { environment, system_prompt, special: Value::from(Serde(tokenizer.special_tokens())) })
    }

    /// Checks for errors that would occur in every conversation.
    ///
    /// # Errors
    /// The template does not read `messages`, or uses an unknown filter, test, function or method.
    pub fn checked(self) -> Result<Self, ModelError> {
        let template = self.environment.get_template(NAME).map_err(|e| invalid(&e))?;
        if !template.undeclared_variables(false).contains("messages") {
            return Err(ModelError::Setting(
                "the chat template does not read `messages`, so every prompt would be the same text; chat_template is the text \
                 of a template, not a path"
                    .into(),
            ));
        }
        let conversation = [ChatMessage::new("user", "Hi")];
        let context = self.context(&conversation.iter().collect::<Vec<_>>(), None, true);
        match template.render(context) {
            // A template may refuse this conversation.
            Err(e) if is_unknown(e.kind()) => Err(invalid(&e)),
            _ => Ok(self),
        }
    }

    fn context(&self, messages: &[&ChatMessage], tools: Option<&Json>, add_generation_prompt: bool) -> Value {
        context! {
            messages => Value::from(Serde(messages)),
            add_generation_prompt,
            tools => tools.map_or(Value::from(()), |tools| Value::from(Serde(tools))),
            documents => (),
            ..self.special.clone()
        }
    }

    /// Returns whether the text may depend on the tools.
    pub fn reads_tools(&self) -> bool {
        let template = self.environment.get_template(NAME);
        template.is_ok_and(|template| template.undeclared_variables(false).contains("tools"))
    }

    /// Returns whether the text may depend on the date.
    pub fn asks_for_date(&self) -> bool {
        let template = self.environment.get_template(NAME);
        template.is_ok_and(|template| template.undeclared_variables(false).contains(ASKS_FOR_DATE))
    }

    /// The text of a conversation. `add_generation_prompt` opens the assistant's next turn.
    ///
    /// # Errors
    /// The template refuses the conversation (the message is the template's), fails, or exceeds a limit.
    pub fn render<'a>(
        &self,
        conversation: impl Into<Conversation<'a>>,
        add_generation_prompt: bool,
    ) -> Result<String, ModelError> {
        let Conversation { messages, tools } = conversation.into();
        let missing = messages.first().is_none_or(|message| message.role != "system");
        let system = self.system_prompt.as_ref().filter(|_| missing).map(|text| ChatMessage::new("system", text));
        let messages: Vec<&ChatMessage> = system.iter().chain(messages).collect();
        let template = self.environment.get_template(NAME).map_err(|e| invalid(&e))?;
        let context = self.context(&messages, tools, add_generation_prompt);
        let mut output = Limited { bytes: Vec::new() };
        template.render_captured_to(context, &mut output).map_err(|e| failed(&e))?;
        String::from_utf8(output.bytes).map_err(|_| ModelError::Setting("the chat template wrote no UTF-8".into()))
    }

    /// The text up to the place where the model's answer begins. If the conversation ends with an assistant turn, this
    /// turn is continued, as with transformers' `continue_final_message`; else the assistant's turn is opened.
    ///
    /// # Errors
    /// Those of [`Self::render`]; the template leaves out the last turn.
    pub fn prompt<'a>(&self, conversation: impl Into<Conversation<'a>>) -> Result<String, ModelError> {
        let conversation = conversation.into();
        let Some((last, before)) = conversation.messages.split_last().filter(|(last, _)| last.is_assistant()) else {
            return self.render(conversation, true);
        };
        let (text, _) = self.parted(conversation.of(before), last)?;
        Ok(text)
    }

    /// The text of a conversation up to the end of the last turn's content, and the text that the template writes after
    /// it.
    fn parted(&self, before: Conversation<'_>, last: &ChatMessage) -> Result<(String, String), ModelError> {
        let marked = ChatMessage { content: format!("{}{END_OF_MESSAGE}", last.content), ..last.clone() };
        let text = self.render(before.of(&[before.messages, &[marked]].concat()), false)?;
        let split = Self::split(&text).filter(|(head, _)| head.contains(last.content.trim()));
        split.map(|(head, tail)| (head.to_owned(), tail.to_owned())).ok_or_else(|| {
            ModelError::Setting(
                "the chat template leaves out the assistant's turn that the prompt ends with, so it can't be gone on \
                 with; take that turn out, or set chat_template"
                    .into(),
            )
        })
    }

    /// Splits a text at the last tag. If the template has stripped the turn, the space at the end of the tag is
    /// missing; the content is then stripped at its end too.
    fn split(text: &str) -> Option<(&str, &str)> {
        let (head, tail) = text.rsplit_once(END_OF_MESSAGE.trim_end())?;
        Some(tail.strip_prefix(' ').map_or((head.trim_end(), tail), |kept| (head, kept)))
    }

    /// Tokens that end an answer: those that the template writes after an assistant turn in any case, up to and with
    /// the tokenizer's `eos_token` if they have it. `None` if no special token is among them; only `eos_token` then
    /// ends an answer.
    pub fn end_of_turn(&self, tokenizer: &Tokenizer) -> Option<Vec<u32>> {
        let behind = |next: &[ChatMessage]| -> Option<Vec<u32>> {
            let (head, tail) = self.marked((&[ChatMessage::new("user", "Well?")]).into(), "Yes", next)?;
            Opened::of_template(tokenizer, head).ok()?.behind(tokenizer, &tail).ok()
        };
        let (mut end, more) = (behind(&[])?, behind(&[ChatMessage::new("user", "And now?")]));
        if let Some(more) = more {
            let same = end.iter().zip(&more).take_while(|(a, b)| a == b).count();
            end.truncate(same);
        }
        let eos = tokenizer.eos_ids().first();
        if let Some(at) = end.iter().position(|id| Some(id) == eos) {
            end.truncate(at + 1);
        }
        let special = |id: &u32| eos == Some(id) || tokenizer.is_special(*id);
        Some(end).filter(|end| end.iter().any(special))
    }

    /// Tokens of a conversation up to the place where the answer begins, see [`Self::prompt`]. No token is added to the
    /// template's text: `bos_token` is there only if the template writes it.
    ///
    /// # Errors
    /// Those of [`Self::prompt`] and [`Tokenizer::encode`].
    pub fn opened<'a>(
        &self,
        tokenizer: &Tokenizer,
        conversation: impl Into<Conversation<'a>>,
    ) -> Result<Opened, ModelError> {
        Opened::of_template(tokenizer, self.prompt(conversation)?)
    }

    /// Tokens of an answer, as they are in the tokens of the whole conversation. `opened` is the result of
    /// [`Self::opened`] for this conversation.
    ///
    /// # Errors
    /// Those of [`Tokenizer::encode`].
    pub fn encode_answer<'a>(
        &self,
        tokenizer: &Tokenizer,
        conversation: impl Into<Conversation<'a>>,
        opened: &Opened,
        answer: &str,
    ) -> Result<Vec<u32>, ModelError> {
        let written = self.written(conversation.into(), opened, answer);
        opened.behind(tokenizer, written.as_deref().unwrap_or(answer))
    }

    /// The text of an answer as the template writes it in the opened turn, with a space before it or with white space
    /// stripped. `None` if the template writes other text, or if the conversation ends with an assistant turn.
    fn written(&self, conversation: Conversation<'_>, opened: &Opened, answer: &str) -> Option<String> {
        if answer.trim().is_empty() || conversation.messages.last().is_some_and(ChatMessage::is_assistant) {
            return None;
        }
        let words = answer.trim_end();
        let (text, tail) = self.marked(conversation, words, &[])?;
        let said = text.strip_prefix(opened.text()).filter(|said| said.trim() == answer.trim())?;
        if words == answer {
            return Some(said.to_owned());
        }
        let turn = ChatMessage::new(ASSISTANT, answer);
        let whole = self.render(conversation.of(&[conversation.messages, &[turn]].concat()), false).ok()?;
        let kept = whole.strip_prefix(&text)?.strip_suffix(&tail).filter(|kept| kept.trim().is_empty())?;
        Some(format!("{said}{kept}"))
    }

    /// The text of a conversation up to the end of `words`, the content of an assistant turn, and the text after it.
    /// The turns `behind` follow. `None` if the template refuses the conversation or leaves out the turn.
    fn marked(&self, before: Conversation<'_>, words: &str, behind: &[ChatMessage]) -> Option<(String, String)> {
        let mark = END_OF_MESSAGE.trim_end();
        let turn = ChatMessage::new(ASSISTANT, format!("{words}{mark}"));
        let text = self.render(before.of(&[before.messages, &[turn], behind].concat()), false).ok()?;
        text.rsplit_once(mark).map(|(head, tail)| (head.to_owned(), tail.to_owned()))
    }

    /// Tokens of a conversation.
    ///
    /// # Errors
    /// Those of [`Self::render`] and [`Tokenizer::encode`].
    pub fn encode<'a>(
        &self,
        tokenizer: &Tokenizer,
        conversation: impl Into<Conversation<'a>>,
        add_generation_prompt: bool,
    ) -> Result<Vec<u32>, ModelError> {
        tokenizer.encode(&self.render(conversation, add_generation_prompt)?, false)
    }
}

fn invalid(error: &Error) -> ModelError {
    let message = error.detail().map_or_else(|| error.kind().to_string(), str::to_owned);
    let line = error.line().map(|line| format!(" (line {line})")).unwrap_or_default();
    ModelError::Setting(format!("the chat template can't be read: {message}{line}; set chat_template to one that can"))
}

fn is_unknown(kind: ErrorKind) -> bool {
    matches!(
        kind,
        ErrorKind::UnknownFilter | ErrorKind::UnknownTest | ErrorKind::UnknownFunction | ErrorKind::UnknownMethod
    )
}

fn failed(error: &Error) -> ModelError {
    let message = match error.kind() {
        ErrorKind::OutOfFuel => format!("ran past its budget of {FUEL} steps"),
        _ => format!("failed: {error}"),
    };
    ModelError::Setting(format!("the chat template {message}; change the messages, or set chat_template"))
}

fn raise_exception(message: String) -> Result<Value, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, message))
}

/// The first moment of a day, formatted as by Python's `datetime.strftime`.
fn strftime(date: NaiveDate, format: &str) -> Result<String, Error> {
    use std::fmt::Write;
    let mut text = String::new();
    write!(text, "{}", date.and_time(NaiveTime::MIN).and_utc().format(format))
        .map_err(|_| Error::new(ErrorKind::InvalidOperation, format!("{format:?} is no date format")))?;
    Ok(text)
}

/// Output with a limit on its bytes.
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

    fn config() -> Config {
        let (_dir, gguf) = fixture::small().open();
        Config { vocab_size: 256, ..Config::from_gguf(&gguf).unwrap() }
    }

    fn tokenizer() -> Tokenizer {
        Tokenizer::bytes(&config()).unwrap()
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
    fn a_template_that_nests_deep_ends_no_process() {
        // Parsed or refused, the test goes on.
        let _ = crate::model::jinja::environment("chat", &format!("{{{{ {}1 }}}}", "1+".repeat(50_000)));
        assert!(crate::model::jinja::environment("chat", &"x".repeat(2 << 20)).is_err());
    }

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
    fn tools_go_to_the_template() {
        let source = "{% for tool in tools or [] %}{{ tool.function.name }} {% endfor %}{{ messages[-1].content }}";
        let template = ChatTemplate::new(source, None, date(), &tokenizer()).unwrap().checked().unwrap();
        let messages = vec![ChatMessage::new("user", "Hi")];
        let tools = Some(serde_json::json!([{"type": "function", "function": {"name": "f"}}]));
        assert_eq!(template.prompt(&Chat { messages: messages.clone(), tools }).unwrap(), "f Hi");
        assert_eq!(template.prompt(&messages).unwrap(), "Hi");
        // An answer continued keeps them too.
        let turns = vec![ChatMessage::new("user", "Hi"), ChatMessage::new("assistant", "Yes")];
        let tools = Some(serde_json::json!([{"type": "function", "function": {"name": "f"}}]));
        assert_eq!(template.prompt(&Chat { messages: turns, tools }).unwrap(), "f Yes");
    }

    #[test]
    fn a_template_that_can_serve_no_conversation_is_refused() {
        for (source, told) in [
            ("./template.jinja", "does not read `messages`"),
            ("", "does not read `messages`"),
            ("{{ messages[0].content | shout }}", "shout"),
            ("{{ shout(messages) }}", "shout"),
            ("{% if messages[0].content is loud %}x{% endif %}", "loud"),
        ] {
            let checked = ChatTemplate::new(source, None, date(), &tokenizer()).and_then(ChatTemplate::checked);
            let message = checked.err().map(|e| e.to_string()).unwrap_or_default();
            assert!(message.contains(told), "{source}: {message}");
        }
        // It may refuse a conversation.
        let picky = "{{ raise_exception('no') if messages[0].role != 'system' }}";
        ChatTemplate::new(picky, None, date(), &tokenizer()).and_then(ChatTemplate::checked).unwrap();
    }

    /// `tests/oracle/chat_templates.py` writes what transformers gives: templates of families, and one an idiom.
    #[test]
    fn templates_as_transformers() {
        let (fixture, conversations, continued) = compared();
        for entry in fixture["templates"].as_array().unwrap() {
            let name = entry["name"].as_str().unwrap();
            let template = special_template(&fixture, entry["template"].as_str().unwrap());
            for case in entry["cases"].as_array().unwrap() {
                let messages = &conversations[case["conversation"].as_u64().unwrap() as usize];
                let found = template.render(messages, case["add_generation_prompt"].as_bool().unwrap());
                compare(name, messages, found, case);
            }
            for case in entry["continued"].as_array().unwrap() {
                let messages = &continued[case["conversation"].as_u64().unwrap() as usize];
                compare(name, messages, template.prompt(messages), case);
            }
        }
    }

    /// The fixture, its conversations and those that end with the assistant's turn.
    fn compared() -> (Json, Vec<Vec<ChatMessage>>, Vec<Vec<ChatMessage>>) {
        let fixture: Json = serde_json::from_str(include_str!("../../tests/fixtures/chat_templates.json")).unwrap();
        let message = |turn: &Json| {
            let mut keys = turn.as_object().unwrap().clone();
            let mut take = |key: &str| keys.shift_remove(key).unwrap().as_str().unwrap().to_owned();
            let (role, content) = (take("role"), take("content"));
            ChatMessage { role, content, more: keys }
        };
        let all = |key: &str| -> Vec<Vec<ChatMessage>> {
            let lists = fixture[key].as_array().unwrap().iter();
            lists.map(|turns| turns.as_array().unwrap().iter().map(message).collect()).collect()
        };
        let (conversations, continued) = (all("conversations"), all("continued"));
        (fixture, conversations, continued)
    }

    fn special_template(fixture: &Json, source: &str) -> ChatTemplate {
        let template = ChatTemplate::new(source, None, date(), &tokenizer()).unwrap();
        ChatTemplate { special: Value::from(Serde(fixture["special"].clone())), ..template }
    }

    fn compare(name: &str, messages: &[ChatMessage], found: Result<String, ModelError>, case: &Json) {
        match (found, case["text"].as_str()) {
            (Ok(found), Some(wanted)) => assert_eq!(found, wanted, "{name}: {messages:?}"),
            (Err(_), None) => {}
            (found, wanted) => panic!("{name}: {messages:?}: {found:?} and not {wanted:?}: {}", case["error"]),
        }
    }

    fn special(tokenizer: &Tokenizer, key: &str) -> String {
        tokenizer.special_tokens().get(key).cloned().unwrap_or_default()
    }

    #[test]
    fn an_answer_ends_as_the_template_ends_its_turns() {
        let (fixture, ..) = compared();
        let entry = |family: &str| {
            fixture["templates"].as_array().unwrap().iter().find(|entry| entry["name"] == family).unwrap()
        };
        let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tokenizers");
        let phi = tempfile::tempdir().unwrap();
        let vocabulary = std::fs::read(root.join("llama2/tokenizer.json")).unwrap();
        std::fs::write(phi.path().join("tokenizer.json"), vocabulary).unwrap();
        let named = r#"{"eos_token": "</s>", "additional_special_tokens": ["<|end|>", "<|user|>", "<|assistant|>"]}"#;
        std::fs::write(phi.path().join("tokenizer_config.json"), named).unwrap();
        for (family, files, end) in [
            // Neither is the tokenizer's end of text.
            ("gemma", "gemma", "<end_of_turn>\n"),
            ("phi", "phi", "<|end|>"),
            // These are, and what the template writes behind it ends no answer.
            ("chatml", "qwen2", "<|im_end|>"),
            ("zephyr", "llama2", "</s>"),
            ("llama 3", "llama3", "<|eot_id|>"),
        ] {
            let dir = if files == "phi" { phi.path().to_owned() } else { root.join(files) };
            let tokenizer = Tokenizer::from_dir(&dir, &config()).unwrap();
            let source = entry(family)["template"].as_str().unwrap();
            let template = ChatTemplate::new(source, None, date(), &tokenizer).unwrap();
            let found = template.end_of_turn(&tokenizer).map(|ids| tokenizer.decode(&ids, false).unwrap()).unwrap();
            assert_eq!(found, end, "{family}");
            // What transformers writes begins with it, whether another turn follows or not.
            for behind in entry(family)["behind"].as_array().unwrap() {
                let behind = behind.as_str().unwrap().replace("</s>", &special(&tokenizer, "eos_token"));
                assert!(behind.starts_with(end), "{family}: {behind:?}");
            }
        }
        let plain = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n\n{% endfor %}";
        let template = ChatTemplate::new(plain, None, date(), &tokenizer()).unwrap();
        assert_eq!(template.end_of_turn(&tokenizer()), None);
    }

    #[test]
    fn a_template_that_leaves_the_last_turn_out_says_so() {
        let source = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}";
        let template = ChatTemplate::new(source, None, date(), &tokenizer()).unwrap();
        let turns = [ChatMessage::new("user", "Hi"), ChatMessage::new("assistant", "Hel")];
        assert_eq!(template.prompt(&turns[..1]).unwrap(), "Hi");
        let message = template.prompt(&turns).unwrap_err().to_string();
        assert!(message.contains("can't be gone on with; take that turn out"), "{message}");
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
