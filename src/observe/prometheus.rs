//! Prometheus text over HTTP.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use metrics::{KeyName, Recorder, Unit};
use metrics_exporter_prometheus::{BuildError, Matcher, PrometheusBuilder, PrometheusHandle};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use super::Metrics;
use super::catalogue::{Kind, METRICS};

const UPKEEP_EVERY: Duration = Duration::from_secs(5);
const REQUEST_TIME: Duration = Duration::from_secs(10);
const REQUEST_BYTES: usize = 16 << 10;

/// A recorder of one run's metrics and the handle that renders them; every sample carries the
/// label `flow`.
pub fn recorder(flow: &str) -> Result<(Metrics, PrometheusHandle), BuildError> {
    let mut builder = PrometheusBuilder::new().add_global_label("flow", flow);
    for metric in METRICS {
        if let Kind::Histogram(buckets) = metric.kind {
            builder = builder.set_buckets_for_metric(Matcher::Full(metric.name.into()), buckets)?;
        }
    }
    let recorder = builder.build_recorder();
    let handle = recorder.handle();
    for metric in METRICS {
        let (key, help) = (KeyName::from_const_str(metric.name), metric.help.into());
        match metric.kind {
            Kind::Counter => recorder.describe_counter(key, None, help),
            Kind::Gauge => recorder.describe_gauge(key, None, help),
            Kind::Histogram(_) => recorder.describe_histogram(key, None::<Unit>, help),
        }
    }
    Ok((Metrics::new(Arc::new(recorder)), handle))
}

/// The metrics as Prometheus reads them. Seconds that add up are gauges of the façade and counters here.
pub fn render(handle: &PrometheusHandle) -> String {
    let mut text = handle.render();
    for metric in METRICS.iter().filter(|m| matches!(m.kind, Kind::Gauge) && m.kind_name() == "counter") {
        text = text.replace(&format!("# TYPE {} gauge", metric.name), &format!("# TYPE {} counter", metric.name));
    }
    text
}

/// Serves `GET /metrics` on `address` until the runtime ends; returns the bound address, so port 0
/// works. Nothing but the address keeps others out: the default of a caller should be loopback.
pub async fn serve(address: SocketAddr, handle: PrometheusHandle) -> std::io::Result<SocketAddr> {
    let listener = TcpListener::bind(address).await?;
    let bound = listener.local_addr()?;
    let upkeep = handle.clone();
    tokio::spawn(async move {
        loop {
            tokio::time::sleep(UPKEEP_EVERY).await;
            upkeep.run_upkeep();
        }
    });
    tokio::spawn(async move {
        loop {
            match listener.accept().await {
                Ok((stream, _)) => drop(tokio::spawn(answer(stream, handle.clone()))),
                Err(error) => {
                    tracing::warn!(%error, "a scrape could not be accepted");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
    });
    Ok(bound)
}

/// One request a connection; the crate's own listener does not tell the port that it bound.
async fn answer(mut stream: TcpStream, handle: PrometheusHandle) {
    let Ok(Some(path)) = tokio::time::timeout(REQUEST_TIME, request_path(&mut stream)).await else {
        return;
    };
    let (status, body) = match path.split('?').next() {
        Some("/metrics") => ("200 OK", render(&handle)),
        _ => ("404 Not Found", "metrics are at /metrics\n".into()),
    };
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Type: text/plain; version=0.0.4; charset=utf-8\r\n\
         Content-Length: {}\r\nConnection: close\r\n\r\n",
        body.len()
    );
    // A scraper that hangs up has no one to tell.
    let _ = stream.write_all(head.as_bytes()).await;
    let _ = stream.write_all(body.as_bytes()).await;
    let _ = stream.shutdown().await;
}

/// The target of a GET; `None` for anything else.
async fn request_path(stream: &mut TcpStream) -> Option<String> {
    let mut bytes = Vec::new();
    while !bytes.windows(4).any(|w| w == b"\r\n\r\n") {
        if bytes.len() > REQUEST_BYTES || stream.read_buf(&mut bytes).await.ok()? == 0 {
            return None;
        }
    }
    let text = String::from_utf8_lossy(&bytes);
    text.strip_prefix("GET ")?.split_whitespace().next().map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn get(address: SocketAddr, path: &str) -> String {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(format!("GET {path} HTTP/1.1\r\nHost: x\r\n\r\n").as_bytes()).await.unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).await.unwrap();
        text
    }

    #[tokio::test]
    async fn a_scrape_finds_what_was_counted() {
        let (metrics, handle) = recorder("loop").unwrap();
        metrics.counter("flowrun_stage_rows_in_total", &[("stage", "judge")]).increment(3);
        metrics.gauge("flowrun_train_seconds_total", &[("stage", "align")]).increment(0.5);
        metrics.histogram("flowrun_llm_step_seconds", &[("device", "cpu:0")]).record(0.02);
        let address = serve("127.0.0.1:0".parse().unwrap(), handle).await.unwrap();
        let text = get(address, "/metrics").await;
        assert!(text.starts_with("HTTP/1.1 200 OK"), "{text}");
        assert!(text.contains("flowrun_stage_rows_in_total{flow=\"loop\",stage=\"judge\"} 3"), "{text}");
        assert!(text.contains("# TYPE flowrun_llm_step_seconds histogram"), "{text}");
        assert!(text.contains("# HELP flowrun_llm_step_seconds"), "{text}");
        assert!(text.contains("# TYPE flowrun_train_seconds_total counter"), "{text}");
        assert!(get(address, "/").await.starts_with("HTTP/1.1 404"));
    }
}
