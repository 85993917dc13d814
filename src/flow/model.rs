//! `[models.NAME]`: who answers, a model on a device here or a chat server somewhere.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::de::{self, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::{Map, Value};
use url::Url;

use super::document::join;
use super::kind::Access;
use super::{Canonical, FlowError, Form, names};
use crate::canonical_fields;

/// Requests of one model in flight.
const CONCURRENCY: usize = 16;
const TIMEOUT: Duration = Duration::from_secs(120);
/// A longer one is a typing error.
const LONGEST_TIMEOUT: f64 = 86_400.0;
const RETRIES: u32 = 4;
/// Of a header's value. What is shorter stands in too many texts to be taken out of them.
const SHORTEST_SECRET: usize = 4;

/// One model of a flow.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "ModelKeys", into = "ModelKeys")]
pub struct ModelSpec {
    /// `hf://owner/name[@revision]`, a directory, a `.gguf` file, or `builtin:smollm2-135m`. Empty where
    /// `endpoint` answers.
    pub source: String,
    /// The dtype of the weights; it has no meaning if `endpoint` answers.
    pub dtype: ModelDtype,
    /// Replaces the system turn that the chat template would add; the first turn of what an endpoint is
    /// asked.
    pub system_prompt: Option<String>,
    /// A Jinja template that replaces the model's own.
    pub chat_template: Option<String>,
    /// Other weights than the model's own.
    pub weights: Option<OtherWeights>,
    /// A chat server in place of all that is local.
    pub endpoint: Option<EndpointSpec>,
}

/// The dtype that a local model's weights are computed in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ModelDtype {
    F32,
    #[default]
    Bf16,
    F16,
}

impl ModelDtype {
    const ALL: [Self; 3] = [Self::F32, Self::Bf16, Self::F16];

    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::F16 => "f16",
        }
    }

    /// The one that torch, transformers and vLLM have another name for.
    fn elsewhere(name: &str) -> Option<Self> {
        match name.to_ascii_lowercase().trim_start_matches("torch.") {
            "float32" | "fp32" | "float" | "full" | "single" | "32" => Some(Self::F32),
            "bfloat16" | "bfp16" | "bf" => Some(Self::Bf16),
            "float16" | "fp16" | "half" | "16" => Some(Self::F16),
            other => Self::ALL.into_iter().find(|dtype| dtype.name() == other),
        }
    }
}

impl fmt::Display for ModelDtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The error is for a person: what is no dtype here, and which one was probably meant.
impl FromStr for ModelDtype {
    type Err = FlowError;

    fn from_str(text: &str) -> Result<Self, FlowError> {
        let names = Self::ALL.map(Self::name);
        if let Some(dtype) = Self::ALL.into_iter().find(|dtype| dtype.name() == text) {
            return Ok(dtype);
        }
        let help = match Self::elsewhere(text) {
            Some(dtype) => format!("did you mean `{dtype}`? That is what `{text}` is called here"),
            None => names::suggest(text, &names),
        };
        Err(FlowError::new("dtype", format!("`{text}` is not a choice here")).help(help))
    }
}

/// Weights that are not the model's own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OtherWeights {
    /// Random ones from a config.json alone, for benchmarks.
    Dummy,
}

impl OtherWeights {
    pub fn name(self) -> &'static str {
        match self {
            Self::Dummy => "dummy",
        }
    }
}

impl FromStr for OtherWeights {
    type Err = FlowError;

    fn from_str(text: &str) -> Result<Self, FlowError> {
        let dummy = Self::Dummy;
        if text == dummy.name() {
            return Ok(dummy);
        }
        let help = match names::closest(text, &[dummy.name()]) {
            Some(guess) => format!("did you mean `{guess}`?"),
            None => "leave it out for the model's own weights; \"dummy\" takes random ones".into(),
        };
        Err(FlowError::new("weights", format!("`{text}` is not a choice here")).help(help))
    }
}

/// A chat server that speaks OpenAI's protocol, at one address or several.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EndpointSpec {
    /// Base URLs, `/chat/completions` not included.
    pub addresses: Vec<Url>,
    /// The model's name at the server.
    pub name: String,
    pub api_key: Option<Secret>,
    /// Requests in flight, over all stages.
    pub concurrency: usize,
    /// Of one request.
    pub timeout: Duration,
    /// How often a request is made again.
    pub retries: u32,
    pub requests_per_minute: Option<u32>,
    /// Keys of every request, beside and before those of the stages.
    pub body: Map<String, Value>,
    /// Of every request.
    pub headers: Vec<(String, Secret)>,
}

/// A text that is never shown.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Secret(String);

impl Secret {
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

impl ModelSpec {
    /// A local model with defaults for all but its source.
    pub fn local(source: impl Into<String>) -> Self {
        Self {
            source: source.into(),
            dtype: ModelDtype::default(),
            system_prompt: None,
            chat_template: None,
            weights: None,
            endpoint: None,
        }
    }

    /// What it opens, with the key that says so.
    pub fn opens(&self) -> Vec<(&'static str, Access)> {
        match &self.endpoint {
            None if self.source.starts_with("builtin:") => Vec::new(),
            None => vec![("source", Access::of_source(&self.source))],
            Some(endpoint) => {
                let hosts = endpoint.addresses.iter().filter_map(Url::host_str);
                hosts.map(|host| ("endpoint", Access::Host(host.to_owned()))).collect()
            }
        }
    }
}

/// The settings that decide the model's answers and are known before it is opened.
impl Canonical for ModelSpec {
    fn form(&self) -> Form {
        let Self { source, dtype, system_prompt, chat_template, weights, endpoint } = self;
        Form::table([
            ("source", source.form()),
            // Keys of endpoints have had none of it since there are endpoints.
            ("dtype", if endpoint.is_some() { "" } else { dtype.name() }.form()),
            ("system_prompt", system_prompt.form()),
            ("chat_template", chat_template.form()),
            ("weights", weights.map(OtherWeights::name).form()),
            ("endpoint", endpoint.form()),
        ])
    }
}

// The key and the headers open the door, and the others say how hard it is knocked at.
canonical_fields!(EndpointSpec { addresses, name, body } without {
    api_key, headers, concurrency, timeout, retries, requests_per_minute,
});

impl Canonical for Url {
    fn form(&self) -> Form {
        self.as_str().form()
    }
}

/// In one line, for a person.
impl fmt::Display for ModelSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.endpoint {
            None => write!(f, "{} ({})", self.source, self.dtype),
            Some(endpoint) => write!(f, "{} at {}", endpoint.name, endpoint.shown()),
        }
    }
}

impl EndpointSpec {
    /// Its addresses in one line.
    pub fn shown(&self) -> String {
        self.addresses.iter().map(Url::as_str).collect::<Vec<_>>().join(", ")
    }

    /// What a message must not hold: the key, and the values of headers, of "Bearer KEY" the key too.
    pub fn secrets(&self) -> impl Iterator<Item = &str> {
        let long = |text: &&str| text.len() >= SHORTEST_SECRET;
        let parts =
            self.headers.iter().flat_map(|(_, value)| [Some(value.reveal()), value.reveal().rsplit(' ').next()]);
        self.api_key.iter().map(Secret::reveal).chain(parts.flatten().filter(long))
    }
}

/// The keys of the table as they are written.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelKeys {
    #[serde(skip_serializing_if = "Option::is_none")]
    source: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    dtype: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    system_prompt: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    chat_template: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    weights: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    endpoint: Option<Addresses>,
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    api_key: Option<Secret>,
    #[serde(skip_serializing_if = "Option::is_none")]
    concurrency: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    timeout: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    retries: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    requests_per_minute: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    body: Option<toml::Table>,
    #[serde(skip_serializing_if = "Option::is_none")]
    headers: Option<BTreeMap<String, Secret>>,
}

impl ModelKeys {
    /// The model that these keys of the table at `path` describe.
    ///
    /// # Errors
    /// Neither a source nor an endpoint, or both; a key of the other; a value that can't be.
    pub fn checked(self, path: &str) -> Result<ModelSpec, FlowError> {
        let error = |key: &str, message: &str| FlowError::new(join(path, key), message);
        match (&self.source, &self.endpoint) {
            (None, None) => Err(error("source", "this key is required")
                .help("add `source = ...` for a model that is loaded here, or `endpoint = ...` for a chat server")),
            (Some(_), Some(_)) => Err(error("endpoint", "a model has a source or an endpoint, not both")
                .help("take one of them out; two models may be two tables")),
            (Some(_), None) => self.local(path),
            (None, Some(_)) => self.remote(path),
        }
    }

    fn local(self, path: &str) -> Result<ModelSpec, FlowError> {
        let of_endpoints = [
            ("name", self.name.is_some()),
            ("api_key", self.api_key.is_some()),
            ("concurrency", self.concurrency.is_some()),
            ("timeout", self.timeout.is_some()),
            ("retries", self.retries.is_some()),
            ("requests_per_minute", self.requests_per_minute.is_some()),
            ("body", self.body.is_some()),
            ("headers", self.headers.is_some()),
        ];
        if let Some((key, _)) = of_endpoints.iter().find(|(_, written)| *written) {
            return Err(FlowError::new(join(path, key), "belongs to an endpoint, and this model has a source")
                .help("leave it out, or write `endpoint = ...` in place of `source`"));
        }
        let at = |e: FlowError| FlowError { key: join(path, &e.key), ..e };
        let spec = ModelSpec::local(self.source.unwrap_or_default());
        Ok(ModelSpec {
            dtype: self.dtype.as_deref().map_or(Ok(spec.dtype), str::parse).map_err(at)?,
            system_prompt: self.system_prompt,
            chat_template: self.chat_template,
            weights: self.weights.as_deref().map(str::parse).transpose().map_err(at)?,
            ..spec
        })
    }

    fn remote(self, path: &str) -> Result<ModelSpec, FlowError> {
        let error = |key: &str, message: &str| FlowError::new(join(path, key), message);
        let of_sources = [
            ("dtype", self.dtype.is_some()),
            ("chat_template", self.chat_template.is_some()),
            ("weights", self.weights.is_some()),
        ];
        if let Some((key, _)) = of_sources.iter().find(|(_, written)| *written) {
            return Err(error(key, "is the server's own affair where a model has an endpoint")
                .help("leave it out, or load the model here with `source = ...`"));
        }
        let Some(name) = self.name.filter(|name| !name.is_empty()) else {
            return Err(error("name", "an endpoint needs the model's name at the server")
                .help("add `name = ...`, one of those that the server lists at /models"));
        };
        let timeout = match self.timeout {
            None => TIMEOUT,
            Some(seconds) if seconds > 0.0 && seconds <= LONGEST_TIMEOUT => Duration::from_secs_f64(seconds),
            Some(_) => return Err(error("timeout", "is in seconds, above 0 and at most a day")),
        };
        if self.concurrency == Some(0) {
            return Err(error("concurrency", "is the number of requests in flight, at least 1"));
        }
        if self.requests_per_minute == Some(0) {
            return Err(error("requests_per_minute", "has to be at least 1").help("leave it out for no limit"));
        }
        let Addresses(written) = self.endpoint.unwrap_or_default();
        let endpoint = EndpointSpec {
            addresses: addresses(&written).map_err(|e| FlowError { key: join(path, &e.key), ..e })?,
            name,
            api_key: api_key(self.api_key).map_err(|message| error("api_key", message))?,
            concurrency: self.concurrency.unwrap_or(CONCURRENCY),
            timeout,
            retries: self.retries.unwrap_or(RETRIES),
            requests_per_minute: self.requests_per_minute,
            body: body(self.body).map_err(|(key, message)| error(&join("body", &key), &message))?,
            headers: headers(self.headers).map_err(|(name, message)| error(&join("headers", &name), message))?,
        };
        if endpoint.api_key.is_some() && endpoint.headers.iter().any(|(name, _)| name == "authorization") {
            return Err(error("headers.authorization", "is what `api_key` is sent as").help("leave one of them out"));
        }
        let system_prompt = self.system_prompt;
        Ok(ModelSpec { system_prompt, endpoint: Some(endpoint), ..ModelSpec::local("") })
    }
}

/// A server that wants no key is asked without one.
fn api_key(written: Option<Secret>) -> Result<Option<Secret>, &'static str> {
    let key = written.filter(|key| !key.reveal().is_empty());
    match &key {
        Some(key) if !key.reveal().bytes().all(|byte| byte.is_ascii_graphic()) => {
            Err("has a blank or a character that no key has")
        }
        _ => Ok(key),
    }
}

/// Keys of a request that the flow says elsewhere, and where.
const SAID_ELSEWHERE: [(&str, &str); 4] = [
    ("model", "is the model's `name`"),
    ("messages", "is what the stages ask"),
    ("n", "is `candidates` of a sampler or `samples` of a judge"),
    ("stream", "can't be asked for: answers are read as a whole"),
];

/// The table as JSON; an error has the key that it is about.
fn body(written: Option<toml::Table>) -> Result<Map<String, Value>, (String, String)> {
    let written = written.unwrap_or_default();
    if let Some((key, message)) = SAID_ELSEWHERE.iter().find(|(key, _)| written.contains_key(*key)) {
        return Err(((*key).to_owned(), format!("{message}; leave it out")));
    }
    written
        .into_iter()
        .map(|(key, value)| Ok((key.clone(), as_json(value).map_err(|message| (key, message))?)))
        .collect()
}

fn as_json(value: toml::Value) -> Result<Value, String> {
    Ok(match value {
        toml::Value::String(text) => text.into(),
        toml::Value::Integer(number) => number.into(),
        toml::Value::Float(number) if number.is_finite() => number.into(),
        toml::Value::Float(number) => return Err(format!("is {number}, which JSON lacks")),
        toml::Value::Boolean(truth) => truth.into(),
        toml::Value::Datetime(time) => return Err(format!("is a date, which JSON lacks; write \"{time}\"")),
        toml::Value::Array(list) => Value::Array(list.into_iter().map(as_json).collect::<Result<_, _>>()?),
        toml::Value::Table(table) => Value::Object(
            table.into_iter().map(|(key, value)| Ok((key, as_json(value)?))).collect::<Result<_, String>>()?,
        ),
    })
}

/// Names in lower case, as HTTP compares them; one without a value is not sent.
fn headers(written: Option<BTreeMap<String, Secret>>) -> Result<Vec<(String, Secret)>, (String, &'static str)> {
    let written = written.unwrap_or_default().into_iter();
    let all: Vec<_> = written.filter(|(_, value)| !value.reveal().is_empty()).collect();
    for (name, value) in &all {
        let of_name = |byte: u8| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte);
        let of_value = |byte: u8| byte == b' ' || byte.is_ascii_graphic();
        if name.is_empty() || !name.bytes().all(of_name) {
            return Err((name.clone(), "is not the name of a header: letters, digits and -"));
        }
        if matches!(
            name.to_ascii_lowercase().as_str(),
            "content-type" | "content-length" | "host" | "transfer-encoding"
        ) {
            return Err((name.clone(), "follows from the request; leave it out"));
        }
        if !value.reveal().bytes().all(of_value) || value.reveal().trim() != value.reveal() {
            return Err((name.clone(), "has a blank at an end or a character that no header has"));
        }
    }
    Ok(all.into_iter().map(|(name, value)| (name.to_ascii_lowercase(), value)).collect())
}

fn addresses(written: &[String]) -> Result<Vec<Url>, FlowError> {
    if written.is_empty() {
        return Err(FlowError::new("endpoint", "the list of addresses is empty").help(ADDRESS));
    }
    let mut urls = Vec::with_capacity(written.len());
    for (number, text) in written.iter().enumerate() {
        let key = if written.len() == 1 { "endpoint".to_owned() } else { format!("endpoint.{number}") };
        let url = address(text).map_err(|message| FlowError::new(&key, message).help(ADDRESS))?;
        if urls.contains(&url) {
            return Err(FlowError::new(&key, format!("`{url}` is there twice")));
        }
        urls.push(url);
    }
    Ok(urls)
}

/// The remedy for whatever is wrong with an address.
const ADDRESS: &str = "write the part before /chat/completions, as in \"http://host:8000/v1\"";

fn address(text: &str) -> Result<Url, String> {
    // What is wrong may hold a password, so it is not repeated before it is known to hold none.
    let url = Url::parse(text).map_err(|_| "is not an address that begins with http:// or https://".to_owned())?;
    if !url.username().is_empty() || url.password().is_some() {
        return Err("has a user or a password, which would be shown; a key goes into `api_key`".into());
    }
    if !matches!(url.scheme(), "http" | "https") || url.host_str().is_none() {
        return Err(format!("`{url}` is not the address of an HTTP server"));
    }
    if url.query().is_some() || url.fragment().is_some() {
        return Err(format!("`{url}` has more than a path"));
    }
    let path = url.path().trim_end_matches('/');
    if path.ends_with("/chat/completions") {
        return Err(format!("`{url}` is the address of one of the server's services"));
    }
    let path = path.to_owned();
    let mut url = url;
    url.set_path(&path);
    Ok(url)
}

/// One address or a list of them.
#[derive(Debug, Clone, Default, Serialize)]
#[serde(transparent)]
struct Addresses(Vec<String>);

impl<'de> Deserialize<'de> for Addresses {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(AddressesVisitor)
    }
}

struct AddressesVisitor;

impl<'de> Visitor<'de> for AddressesVisitor {
    type Value = Addresses;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an address or a list of them")
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<Addresses, E> {
        Ok(Addresses(vec![text.to_owned()]))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Addresses, A::Error> {
        let mut texts = Vec::new();
        while let Some(text) = list.next_element()? {
            texts.push(text);
        }
        Ok(Addresses(texts))
    }
}

/// For models that are not read from a flow file.
impl TryFrom<ModelKeys> for ModelSpec {
    type Error = FlowError;

    fn try_from(keys: ModelKeys) -> Result<Self, FlowError> {
        keys.checked("")
    }
}

impl From<ModelSpec> for ModelKeys {
    fn from(spec: ModelSpec) -> Self {
        let system_prompt = spec.system_prompt;
        match spec.endpoint {
            None => Self {
                source: Some(spec.source),
                dtype: Some(spec.dtype.name().to_owned()),
                system_prompt,
                chat_template: spec.chat_template,
                weights: spec.weights.map(|weights| weights.name().to_owned()),
                ..Self::default()
            },
            Some(endpoint) => Self {
                endpoint: Some(Addresses(endpoint.addresses.iter().map(ToString::to_string).collect())),
                name: Some(endpoint.name),
                api_key: endpoint.api_key,
                concurrency: Some(endpoint.concurrency),
                timeout: Some(endpoint.timeout.as_secs_f64()),
                retries: Some(endpoint.retries),
                requests_per_minute: endpoint.requests_per_minute,
                body: Some(endpoint.body).filter(|body| !body.is_empty()).map(as_toml),
                headers: Some(endpoint.headers).filter(|h| !h.is_empty()).map(|h| h.into_iter().collect()),
                system_prompt,
                ..Self::default()
            },
        }
    }
}

/// A body that was written in TOML, as it was.
fn as_toml(body: Map<String, Value>) -> toml::Table {
    toml::Table::try_from(body).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    const SERVER: &str = "endpoint = 'http://host:8000/v1/'\nname = 'm'\n";

    fn keys(text: &str) -> Result<ModelSpec, FlowError> {
        let table = toml::from_str(text).expect("valid TOML");
        super::super::options::read::<ModelKeys>(&table, "models.m")?.checked("models.m")
    }

    #[test]
    fn a_model_is_local_or_at_an_endpoint() {
        assert_eq!(keys("source = 'x'"), Ok(ModelSpec::local("x")));
        let spec = keys(&format!("{SERVER}api_key = 'hunter2'\ntimeout = 0.5\nsystem_prompt = 'Be brief.'")).unwrap();
        let endpoint = spec.endpoint.clone().unwrap();
        assert_eq!(endpoint.shown(), "http://host:8000/v1");
        assert_eq!((endpoint.concurrency, endpoint.retries, endpoint.timeout.as_millis()), (16, 4, 500));
        assert_eq!(endpoint.api_key.as_ref().map(Secret::reveal), Some("hunter2"));
        assert_eq!(spec.to_string(), "m at http://host:8000/v1");
        for shown in [format!("{spec:?}"), serde_json::to_string(&spec.form()).unwrap()] {
            assert!(!shown.contains("hunter2"), "{shown}");
        }
        let two = keys("endpoint = ['http://a/v1', 'https://b']\nname = 'm'\napi_key = ''").unwrap().endpoint.unwrap();
        assert_eq!((two.addresses.len(), two.api_key), (2, None));
    }

    #[test]
    fn a_model_written_by_a_program_is_the_same_when_it_is_read() {
        let extras = "body = { a = [1, 0.5], b = { c = true } }\nheaders = { X-Team = 'blue' }";
        for text in [
            SERVER.to_owned(),
            format!("{SERVER}retries = 0\napi_key = 'k'"),
            format!("{SERVER}{extras}"),
            "source = 'x'".to_owned(),
        ] {
            let spec = keys(&text).unwrap();
            let written = toml::to_string(&spec).unwrap();
            assert_eq!(toml::from_str::<ModelSpec>(&written).unwrap(), spec, "{written}");
        }
        let error = toml::from_str::<ModelSpec>("dtype = 'f32'").unwrap_err().to_string();
        assert!(error.contains("source: this key is required"), "{error}");
    }

    #[test]
    fn a_body_decides_answers_and_headers_are_secret() {
        let plain = keys(SERVER).unwrap();
        let spec =
            keys(&format!("{SERVER}body = {{ top_k = 5 }}\nheaders = {{ X-Key = 'hunter2', Empty = '' }}")).unwrap();
        assert_ne!(spec.form().key(), plain.form().key());
        let shown = serde_json::to_string(&spec.form()).unwrap();
        assert!(shown.contains(r#""body":{"top_k":5}"#), "{shown}");
        assert!(!shown.contains("hunter2") && !format!("{spec:?}").contains("hunter2"));
        let endpoint = spec.endpoint.unwrap();
        assert_eq!(endpoint.headers.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>(), ["x-key"]);
        let bearer =
            keys(&format!("{SERVER}headers = {{ Authorization = 'Bearer hunter2' }}")).unwrap().endpoint.unwrap();
        assert_eq!(bearer.secrets().collect::<Vec<_>>(), ["Bearer hunter2", "hunter2"]);
    }

    #[test]
    fn mistakes_name_their_key_and_remedy() {
        let server = |more: &str| format!("{SERVER}{more}");
        for (text, expected) in [
            ("dtype = 'f32'".into(), "models.m.source: this key is required"),
            (server("source = 'x'"), "models.m.endpoint: a model has a source or an endpoint"),
            (server("dtype = 'f32'"), "models.m.dtype: is the server's own affair"),
            (server("chat_template = 'x'"), "models.m.chat_template: is the server's"),
            (server("weights = 'dummy'"), "models.m.weights: is the server's"),
            ("source = 'x'\nname = 'm'".into(), "models.m.name: belongs to an endpoint"),
            ("source = 'x'\napi_key = 'hunter2'".into(), "models.m.api_key: belongs to an endpoint"),
            ("source = 'x'\nretries = 2".into(), "models.m.retries: belongs to an endpoint"),
            ("endpoint = 'http://a'".into(), "models.m.name: an endpoint needs"),
            ("endpoint = []\nname = 'm'".into(), "models.m.endpoint: the list of addresses is empty"),
            ("endpoint = ['http://a', 'b']\nname = 'm'".into(), "models.m.endpoint.1: is not an address"),
            ("endpoint = ['http://a', 'http://a/']\nname = 'm'".into(), "models.m.endpoint.1: `http://a/` is there"),
            ("endpoint = 3\nname = 'm'".into(), "models.m.endpoint: expected an address or a list of them"),
            ("endpoint = 'ftp://a'\nname = 'm'".into(), "models.m.endpoint: `ftp://a/` is not the address of an HTTP"),
            ("endpoint = 'http://u:hunter2@a'\nname = 'm'".into(), "models.m.endpoint: has a user or a password"),
            ("endpoint = 'http://a/v1?x=1'\nname = 'm'".into(), "models.m.endpoint: `http://a/v1?x=1` has more"),
            (
                "endpoint = 'http://a/v1/chat/completions'\nname = 'm'".into(),
                "models.m.endpoint: `http://a/v1/chat/com",
            ),
            (server("timeout = 0"), "models.m.timeout: is in seconds"),
            (server("timeout = nan"), "models.m.timeout: is in seconds"),
            (server("concurrency = 0"), "models.m.concurrency: is the number"),
            (server("requests_per_minute = 0"), "models.m.requests_per_minute: has to be"),
            (server("api_key = 'hunter2 '"), "models.m.api_key: has a blank"),
            (server("api_key = 3"), "models.m.api_key: must be a string"),
            (server("api_ky = 'hunter2'"), "models.m.api_ky: unknown key\n  help: did you mean `api_key`?"),
            ("source = 'x'\nbody = {}".into(), "models.m.body: belongs to an endpoint"),
            ("source = 'x'\nheaders = {}".into(), "models.m.headers: belongs to an endpoint"),
            (server("body = { model = 'x' }"), "models.m.body.model: is the model's `name`; leave it out"),
            (server("body = { n = 2 }"), "models.m.body.n: is `candidates`"),
            (server("body = { a = 1979-05-27 }"), "models.m.body.a: is a date, which JSON lacks"),
            (server("body = { a = nan }"), "models.m.body.a: is NaN"),
            (server("body = 3"), "models.m.body: expected a table"),
            (server("headers = { 'a b' = 'hunter2' }"), "models.m.headers.a b: is not the name of a header"),
            (server("headers = { a = 'hunter2 ' }"), "models.m.headers.a: has a blank"),
            (server("headers = { a = ['hunter2'] }"), "models.m.headers.a: must be a string"),
            (server("headers = { Host = 'hunter2' }"), "models.m.headers.Host: follows from the request"),
            (
                server("api_key = 'k'\nheaders = { Authorization = 'hunter2' }"),
                "models.m.headers.authorization: is what `api_key` is sent as",
            ),
            (server("extra_body = {}"), "models.m.extra_body: unknown key\n  help: did you mean `body`?"),
            (server("extra_headers = {}"), "models.m.extra_headers: unknown key\n  help: did you mean `headers`?"),
            (server("default_headers = {}"), "models.m.default_headers: unknown key\n  help: did you mean `headers`?"),
            (
                server("chat_template_kwargs = {}"),
                "models.m.chat_template_kwargs: unknown key\n  help: did you mean `body.chat_template_kwargs`?",
            ),
            (server("rpm = 3"), "models.m.rpm: unknown key\n  help: did you mean `requests_per_minute`?"),
            (
                "source = 'x'\ndtype = 'float32'".into(),
                "models.m.dtype: `float32` is not a choice here\n  help: did you mean `f32`?",
            ),
            (
                "source = 'x'\ndtype = 'fp16'".into(),
                "models.m.dtype: `fp16` is not a choice here\n  help: did you mean `f16`?",
            ),
            (
                "source = 'x'\ndtype = 'half'".into(),
                "models.m.dtype: `half` is not a choice here\n  help: did you mean `f16`?",
            ),
            (
                "source = 'x'\ndtype = 'torch.bfloat16'".into(),
                "models.m.dtype: `torch.bfloat16` is not a choice here\n  help: did you mean `bf16`?",
            ),
            ("source = 'x'\ndtype = 'int8'".into(), "models.m.dtype: `int8` is not a choice here\n  help: "),
            (
                "source = 'x'\nweights = 'dumy'".into(),
                "models.m.weights: `dumy` is not a choice here\n  help: did you mean `dummy`?",
            ),
            (
                "source = 'x'\nweights = 'model.safetensors'".into(),
                "models.m.weights: `model.safetensors` is not a choice here\n  help: leave it out for the model's own",
            ),
            ("base_url = 'http://a'".into(), "models.m.base_url: unknown key\n  help: did you mean `endpoint`?"),
        ] {
            let error = keys(&text).expect_err(&text).to_string();
            assert!(error.starts_with(expected), "{text}\n{error}");
            assert!(!error.contains("hunter2"), "{error}");
        }
    }
}
