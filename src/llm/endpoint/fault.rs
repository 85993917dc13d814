//! Why an endpoint gave no answer, and whose fault that is: a moment's, the row's or the user's.

use std::error::Error;
use std::time::Duration;

use chrono::{DateTime, Utc};
use reqwest::{StatusCode, Url};
use serde_json::Value;

use crate::flow::EndpointSpec;
use crate::observe::shortened;

/// The most that a server's wish to be left alone is heeded.
const LONGEST_WAIT: Duration = Duration::from_secs(60);

/// One request without an answer.
#[derive(Debug, Clone, PartialEq)]
pub enum Fault {
    /// Another time or another address may do; the server may say when.
    Passing { reason: Reason, message: String, wait: Option<Duration> },
    /// The request can't be answered: as a rule for what the row says, but a server that does not know a parameter
    /// says so to every request.
    Refused(String),
    /// It has the limit on tokens under the name that OpenAI's newer models refuse.
    MaxTokens(String),
    /// The row's answer can't be used.
    Row(String),
    /// No question can, before the flow or the server is put right.
    User(String),
}

/// Why a request is made again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    Connection,
    Timeout,
    /// 429: too many requests.
    Busy,
    /// 5xx, 408, 409.
    Server,
    /// An answer that is none.
    Malformed,
}

impl Reason {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Connection => "connection",
            Self::Timeout => "timeout",
            Self::Busy => "busy",
            Self::Server => "server",
            Self::Malformed => "malformed",
        }
    }
}

impl Fault {
    pub(super) fn passing(reason: Reason, message: String) -> Self {
        Self::Passing { reason, message, wait: None }
    }

    /// For the metric.
    pub fn outcome(&self) -> &'static str {
        match self {
            Self::Passing { reason, .. } => reason.as_str(),
            Self::Refused(_) | Self::MaxTokens(_) | Self::Row(_) => "refused",
            Self::User(_) => "wrong",
        }
    }

    /// The server could not be asked, or its answer did not arrive.
    pub fn of_connection(url: &Url, error: &reqwest::Error, timeout: Duration) -> Self {
        let cause = innermost(error);
        if error.is_timeout() && !error.is_connect() {
            let seconds = timeout.as_secs_f64();
            return Self::passing(Reason::Timeout, format!("{url} gave no answer within {seconds} s"));
        }
        // rustls names its errors in words alone here: their type is not this crate's to know.
        if cause.contains("certificate") {
            return Self::User(format!(
                "{url} can't be trusted: {cause}; use the address that its certificate is for, or let SSL_CERT_FILE \
                 name the certificate of its authority"
            ));
        }
        if cause.contains("InvalidContentType") {
            return Self::User(format!("{url} does not speak TLS; write its address with http://"));
        }
        if error.is_builder() {
            return Self::User(format!("{url} can't be asked: {cause}"));
        }
        Self::passing(Reason::Connection, format!("{url}: {cause}"))
    }

    /// The server answered with an error.
    pub fn of_status(
        url: &Url,
        status: StatusCode,
        spec: &EndpointSpec,
        complaint: &str,
        wait: Option<Duration>,
    ) -> Self {
        let says = if complaint.is_empty() { String::new() } else { format!(": {complaint}") };
        let told = format!("{url} answered {status}{says}");
        match status.as_u16() {
            400 | 422 if refuses_max_tokens(complaint) => Self::MaxTokens(told),
            400 | 422 => Self::Refused(told),
            413 => Self::Row(told),
            401 | 403 => Self::User(match &spec.api_key {
                Some(_) => format!("{told}; the key in `api_key` is not accepted"),
                None => format!("{told}; name a key with `api_key = \"${{NAME_OF_A_VARIABLE}}\"`"),
            }),
            404 => {
                Self::User(format!("{told}; is the address right, and does the server have a model {:?}?", spec.name))
            }
            429 => Self::Passing { reason: Reason::Busy, message: told, wait },
            408 | 409 | 500.. => Self::Passing { reason: Reason::Server, message: told, wait },
            300..=399 => Self::User(format!("{told}; write the address that the server points to")),
            _ => Self::User(told),
        }
    }
}

/// Whether a server doesn't want the parameter, and not only its value.
fn refuses_max_tokens(complaint: &str) -> bool {
    const NOT_WANTED: [&str; 10] = [
        "not supported",
        "unsupported",
        "unrecognized",
        "unknown",
        "not allowed",
        "not permitted",
        "deprecated",
        "extra inputs",
        "unexpected",
        "instead",
    ];
    let complaint = complaint.to_lowercase();
    complaint.contains("max_tokens")
        && (NOT_WANTED.iter().any(|words| complaint.contains(words)))
        && !complaint.contains("too large")
}

/// Returns whether a complaint is about several answers to one request.
pub fn refuses_n(complaint: &str) -> bool {
    let complaint = complaint.to_lowercase();
    let words: Vec<&str> = complaint.split(|c: char| !c.is_alphanumeric() && c != '_').collect();
    let about = words.contains(&"n")
        || ["num_completions", "number of completions", "best_of"].iter().any(|w| complaint.contains(w));
    let refused = [
        "not support",
        "unsupported",
        "only",
        "must be 1",
        "not permitted",
        "not allowed",
        "extra inputs",
        "unexpected",
        "unrecognized",
        "unknown",
        "invalid",
        "less than or equal to 1",
        "greater than 1",
        "> 1",
    ];
    about && refused.iter().any(|words| complaint.contains(words))
}

/// What lies at the bottom of an error.
pub fn innermost(error: &dyn Error) -> String {
    let mut inner = error;
    while let Some(source) = inner.source() {
        inner = source;
    }
    inner.to_string()
}

/// The header of that name, in seconds or as a date (RFC 9110, 10.2.3); `now` is the client's time.
pub fn retry_after(value: &str, now: DateTime<Utc>) -> Option<Duration> {
    let seconds: f64 = match value.trim().parse() {
        Ok(seconds) => seconds,
        Err(_) => {
            let date = DateTime::parse_from_rfc2822(value.trim()).ok()?;
            (date.to_utc() - now).num_milliseconds().max(0) as f64 / 1000.0
        }
    };
    (seconds >= 0.0).then(|| Duration::from_secs_f64(seconds.min(LONGEST_WAIT.as_secs_f64())))
}

/// What the server says is wrong, in one line; a server may repeat the secrets that it was sent.
pub fn complaint<'a>(body: &[u8], secrets: impl Iterator<Item = &'a str>) -> String {
    let text = String::from_utf8_lossy(body);
    let json = serde_json::from_slice::<Value>(body).ok();
    let found = json.as_ref().and_then(|json| {
        let error = json.get("error").or_else(|| json.get("detail")).unwrap_or(json);
        let message = error.get("message").unwrap_or(error);
        Some(message.as_str().map_or_else(|| message.to_string(), str::to_owned)).filter(|text| text != "null")
    });
    let text = found.unwrap_or_else(|| text.into_owned());
    shortened(&without(&text, secrets))
}

/// A text without these secrets, also as JSON and as an address would write them; the longest are taken out first.
pub fn without<'a>(text: &str, secrets: impl Iterator<Item = &'a str>) -> String {
    let mut forms: Vec<String> = secrets
        .filter(|secret| !secret.is_empty())
        .flat_map(|secret| {
            let json = Value::from(secret).to_string();
            let percent: String = url::form_urlencoded::byte_serialize(secret.as_bytes()).collect();
            let blanks = percent.replace('+', "%20");
            [secret.to_owned(), json.trim_matches('"').to_owned(), percent, blanks]
        })
        .collect();
    forms.sort_by_key(|form| std::cmp::Reverse(form.len()));
    forms.iter().fold(text.to_owned(), |text, form| text.replace(form.as_str(), "***"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(key: &str) -> EndpointSpec {
        let text = format!("endpoint = 'http://a/v1'\nname = 'm'\napi_key = '{key}'");
        toml::from_str::<crate::flow::ModelSpec>(&text).unwrap().endpoint.unwrap()
    }

    #[test]
    fn a_status_says_whose_fault_it_is() {
        let url = Url::parse("http://a/v1/chat/completions").unwrap();
        let of = |code: u16, key: &str| {
            Fault::of_status(&url, StatusCode::from_u16(code).unwrap(), &spec(key), "no", Some(LONGEST_WAIT))
        };
        for (code, outcome) in [
            (400, "refused"),
            (401, "wrong"),
            (403, "wrong"),
            (404, "wrong"),
            (405, "wrong"),
            (302, "wrong"),
            (408, "server"),
            (409, "server"),
            (413, "refused"),
            (422, "refused"),
            (429, "busy"),
            (500, "server"),
            (503, "server"),
        ] {
            assert_eq!(of(code, "k").outcome(), outcome, "{code}");
        }
        let message = |fault: Fault| match fault {
            Fault::User(message) | Fault::Refused(message) | Fault::Passing { message, .. } => message,
            Fault::Row(message) | Fault::MaxTokens(message) => message,
        };
        assert!(message(of(401, "hunter2")).ends_with("401 Unauthorized: no; the key in `api_key` is not accepted"));
        assert!(message(of(403, "")).contains("name a key with `api_key = \"${"));
        assert!(message(of(404, "")).contains("have a model \"m\"?"));
        assert!(matches!(of(429, ""), Fault::Passing { wait: Some(LONGEST_WAIT), .. }));
    }

    #[test]
    fn a_parameter_that_is_not_wanted_is_told_from_its_value() {
        for (complaint, refused) in [
            (
                "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead.",
                true,
            ),
            (
                "the parameter 'max_tokens' is not supported with this model; 'max_completion_tokens' takes its place",
                true,
            ),
            ("Unrecognized request argument supplied: max_tokens", true),
            (
                r#"[{"type":"extra_forbidden","loc":["body","max_tokens"],"msg":"Extra inputs are not permitted"}]"#,
                true,
            ),
            ("max_tokens is too large: 5000. This model supports at most 4096 completion tokens.", false),
            (
                "'max_tokens' or 'max_completion_tokens' is too large: 5000. This model's maximum context length is 4096",
                false,
            ),
            ("Unsupported value: 'temperature' does not support 0 with this model.", false),
            ("max_tokens must be at least 1", false),
        ] {
            assert_eq!(refuses_max_tokens(complaint), refused, "{complaint}");
        }
    }

    #[test]
    fn complaints_are_short_and_without_the_key() {
        let spec = spec("hunter2");
        let of = |body: &str| complaint(body.as_bytes(), spec.secrets());
        assert_eq!(of(r#"{"error": {"message": "bad key hunter2"}}"#), "bad key ***");
        assert_eq!(of(r#"{"error": "too\nlong"}"#), "too long");
        assert_eq!(of(r#"{"detail": [{"loc": 1}]}"#), r#"[{"loc":1}]"#);
        assert_eq!(of("<html>\u{7}no</html>"), "<html> no</html>");
        assert_eq!(of(&"é".repeat(1000)).chars().count(), 303);
        assert_eq!(of(""), "");
    }

    #[test]
    fn secrets_are_in_no_form_in_a_complaint() {
        let secrets = ["sk/a+b c", "Bearer \"q\" sk", "sk"];
        for text in ["key sk/a+b c!", "key sk%2Fa%2Bb+c!", "key sk%2Fa%2Bb%20c!", r#"key Bearer \"q\" sk!"#, "key sk!"]
        {
            assert_eq!(without(text, secrets.into_iter()), "key ***!", "{text}");
        }
    }

    #[test]
    fn a_server_that_gives_one_answer_is_known_by_its_words() {
        for words in [
            "n > 1 is not supported",
            "Only one completion choice is allowed: n must be 1",
            "`n`: Extra inputs are not permitted",
        ] {
            assert!(refuses_n(words), "{words}");
        }
        for words in ["temperature must be below 2", "invalid model name", "unknown key top_n"] {
            assert!(!refuses_n(words), "{words}");
        }
    }

    #[test]
    fn a_servers_wish_is_heeded_in_bounds() {
        let now = DateTime::parse_from_rfc3339("2026-10-21T07:28:00.5Z").unwrap().to_utc();
        let seconds = |text| retry_after(text, now).map(|wait| wait.as_secs_f64());
        assert_eq!(
            ["2", "0.5", "1e9", "-1", "nan", "soon", "inf"].map(seconds),
            [Some(2.0), Some(0.5), Some(60.0), None, None, None, Some(60.0)]
        );
        assert_eq!(
            [
                "Wed, 21 Oct 2026 07:28:10 GMT",
                "Wed, 21 Oct 2026 07:00:00 GMT",
                "Thu, 22 Oct 2026 07:28:00 GMT",
                "Wed, 21 Oct",
            ]
            .map(seconds),
            [Some(9.5), Some(0.0), Some(60.0), None]
        );
    }
}
