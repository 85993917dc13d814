//! Why an endpoint gave no answer, and whose fault that is: a moment's, the row's or the user's.

use std::error::Error;
use std::time::Duration;

use reqwest::{StatusCode, Url};
use serde_json::Value;

use crate::flow::EndpointSpec;
use crate::flow::model::Secret;
use crate::observe::shortened;

/// The most that a server's wish to be left alone is heeded.
const LONGEST_WAIT: Duration = Duration::from_secs(60);

/// One request without an answer.
#[derive(Debug, Clone, PartialEq)]
pub enum Fault {
    /// Another time or another address may do; the server may say when.
    Passing { reason: Reason, message: String, wait: Option<Duration> },
    /// The question can't be answered.
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
            Self::Row(_) => "refused",
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
            400 | 413 | 422 => Self::Row(told),
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

/// What lies at the bottom of an error.
pub fn innermost(error: &dyn Error) -> String {
    let mut inner = error;
    while let Some(source) = inner.source() {
        inner = source;
    }
    inner.to_string()
}

/// The header of that name, in seconds. Its other form, a date, is left to the back-off.
pub fn retry_after(value: &str) -> Option<Duration> {
    let seconds: f64 = value.trim().parse().ok()?;
    (seconds >= 0.0).then(|| Duration::from_secs_f64(seconds.min(LONGEST_WAIT.as_secs_f64())))
}

/// What the server says is wrong, in one line; a server may repeat the key that it was sent.
pub fn complaint(body: &[u8], key: Option<&Secret>) -> String {
    let text = String::from_utf8_lossy(body);
    let json = serde_json::from_slice::<Value>(body).ok();
    let found = json.as_ref().and_then(|json| {
        let error = json.get("error").or_else(|| json.get("detail")).unwrap_or(json);
        let message = error.get("message").unwrap_or(error);
        Some(message.as_str().map_or_else(|| message.to_string(), str::to_owned)).filter(|text| text != "null")
    });
    let text = found.unwrap_or_else(|| text.into_owned());
    let text = key.map_or(text.clone(), |key| text.replace(key.reveal(), "***"));
    shortened(&text)
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
            Fault::User(message) | Fault::Row(message) | Fault::Passing { message, .. } => message,
        };
        assert!(message(of(401, "hunter2")).ends_with("401 Unauthorized: no; the key in `api_key` is not accepted"));
        assert!(message(of(403, "")).contains("name a key with `api_key = \"${"));
        assert!(message(of(404, "")).contains("have a model \"m\"?"));
        assert!(matches!(of(429, ""), Fault::Passing { wait: Some(LONGEST_WAIT), .. }));
    }

    #[test]
    fn complaints_are_short_and_without_the_key() {
        let key = spec("hunter2").api_key;
        let of = |body: &str| complaint(body.as_bytes(), key.as_ref());
        assert_eq!(of(r#"{"error": {"message": "bad key hunter2"}}"#), "bad key ***");
        assert_eq!(of(r#"{"error": "too\nlong"}"#), "too long");
        assert_eq!(of(r#"{"detail": [{"loc": 1}]}"#), r#"[{"loc":1}]"#);
        assert_eq!(of("<html>\u{7}no</html>"), "<html> no</html>");
        assert_eq!(of(&"é".repeat(1000)).chars().count(), 303);
        assert_eq!(of(""), "");
    }

    #[test]
    fn a_servers_wish_is_heeded_in_bounds() {
        let seconds = |text| retry_after(text).map(|wait| wait.as_secs_f64());
        assert_eq!(
            ["2", "0.5", "1e9", "-1", "nan", "soon", "inf"].map(seconds),
            [Some(2.0), Some(0.5), Some(60.0), None, None, None, Some(60.0)]
        );
    }
}
