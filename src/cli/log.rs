//! What is logged, and where to.

use std::io::IsTerminal;
use std::time::SystemTime;

use clap::ValueEnum;
use flowrun::arrow::temporal_conversions::timestamp_ms_to_datetime;
use serde_json::json;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer, fmt};

use super::screen::Screen;

/// How lines on stderr are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// For people: a view on a terminal, plain lines elsewhere
    Text,
    /// For programs: one JSON object a line, progress too
    Json,
}

/// The log lines of the hub's client about its attempts are left out: the message of the failure has the cause. Warnings, downloads and the date of chat templates are for everyone; a program also reads progress, and which stage and round a line is of.
const TEXT: &str = "warn,hf_hub=off,flowrun::download=info,flowrun::date=info";
const JSON: &str =
    "warn,hf_hub=off,flowrun::download=info,flowrun::date=info,flowrun::progress=info,flowrun::span=info";
/// What a run does, for programs.
pub const PROGRESS: &str = "flowrun::progress";

/// The log of this process.
pub struct Log {
    #[cfg(feature = "otel")]
    spans: Option<otel::Spans>,
}

/// Why the program ends, as a line of a JSON log.
pub fn last_line(code: u8, message: &str) -> String {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let now = timestamp_ms_to_datetime(now.as_millis() as i64).unwrap_or_default();
    let level = if code == 130 { "WARN" } else { "ERROR" };
    let timestamp = now.format("%Y-%m-%dT%H:%M:%S%.6fZ").to_string();
    json!({ "timestamp": timestamp, "level": level, "message": message, "code": code, "target": "flowrun" }).to_string()
}

/// Begins to log; `FLOWRUN_LOG=debug`, or `flowrun::llm=debug`, shows more than what is shown anyway.
pub fn begin(screen: &Screen) -> Log {
    let default = if screen.format == LogFormat::Json { JSON } else { TEXT };
    let wanted = std::env::var("FLOWRUN_LOG").unwrap_or_default();
    let filter = EnvFilter::try_new(format!("{default},{wanted}"));
    let unreadable = filter.as_ref().err().map(ToString::to_string);
    let filter = filter.unwrap_or_else(|_| EnvFilter::new(default));
    let plain = !std::io::stderr().is_terminal() || std::env::var_os("NO_COLOR").is_some_and(|set| !set.is_empty());
    let lines = fmt::layer().with_writer(screen.clone()).with_ansi(!plain);
    let lines = match screen.format {
        LogFormat::Text => lines.boxed(),
        LogFormat::Json => lines.json().flatten_event(true).with_current_span(false).boxed(),
    };
    let log = tracing_subscriber::registry().with(lines.with_filter(filter));
    #[cfg(feature = "otel")]
    let spans = otel::begin();
    #[cfg(feature = "otel")]
    let log = log.with(spans.as_ref().map(otel::Spans::layer));
    // Nobody has begun before.
    let _ = log.try_init();
    if let Some(error) = unreadable {
        tracing::warn!(
            error,
            "FLOWRUN_LOG={wanted:?} can't be read and is left out; it is like debug, or flowrun::llm=debug"
        );
    }
    Log {
        #[cfg(feature = "otel")]
        spans,
    }
}

impl Log {
    /// Hands over what is not written yet.
    pub async fn end(self) {
        #[cfg(feature = "otel")]
        if let Some(spans) = self.spans {
            spans.end().await;
        }
    }
}

/// Spans of runs, rounds and stages for an OpenTelemetry collector, where the environment names one.
#[cfg(feature = "otel")]
mod otel {
    use opentelemetry::trace::TracerProvider;
    use opentelemetry_otlp::SpanExporter;
    use opentelemetry_sdk::Resource;
    use opentelemetry_sdk::trace::SdkTracerProvider;
    use tracing::Subscriber;
    use tracing_subscriber::registry::LookupSpan;
    use tracing_subscriber::{EnvFilter, Layer};

    /// Warnings become events of the span that they are in.
    const TOLD: &str = "warn,flowrun::span=info";
    const ENDPOINTS: [&str; 2] = ["OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"];

    pub struct Spans(SdkTracerProvider);

    /// As the environment says, see <https://opentelemetry.io/docs/specs/otel/protocol/exporter/>; OTLP over HTTP.
    pub fn begin() -> Option<Spans> {
        let named = |key: &&str| std::env::var_os(key).is_some_and(|value| !value.is_empty());
        ENDPOINTS.iter().find(|key| named(key))?;
        let exporter = SpanExporter::builder().with_http().build();
        // The log has not begun, and a run is worth more than its trace.
        let exporter = exporter
            .inspect_err(|error| crate::cli::out::complain(&format!("warning: spans are not exported: {error}")))
            .ok()?;
        let resource = Resource::builder();
        let resource = if named(&"OTEL_SERVICE_NAME") { resource } else { resource.with_service_name("flowrun") };
        Some(Spans(SdkTracerProvider::builder().with_batch_exporter(exporter).with_resource(resource.build()).build()))
    }

    impl Spans {
        pub fn layer<S: Subscriber + for<'a> LookupSpan<'a>>(&self) -> impl Layer<S> + use<S> {
            tracing_opentelemetry::layer().with_tracer(self.0.tracer("flowrun")).with_filter(EnvFilter::new(TOLD))
        }

        pub async fn end(self) {
            // It blocks until the last spans are there, or told that they can't be.
            let ended = tokio::task::spawn_blocking(move || self.0.shutdown()).await;
            if let Ok(Err(error)) = ended {
                tracing::warn!(%error, "the last spans were not exported");
            }
        }
    }
}
