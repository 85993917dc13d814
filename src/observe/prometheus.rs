//! Prometheus text over HTTP.
//!
//! A histogram without buckets would be rendered as a summary, which no query can add up over
//! devices or runs, so every histogram has its buckets here. Seconds that add up are gauges:
//! counters of the façade are whole numbers.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use metrics::{KeyName, Recorder, Unit};
use metrics_exporter_prometheus::{BuildError, Matcher, PrometheusBuilder, PrometheusHandle};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use super::Metrics;

const UPKEEP_EVERY: Duration = Duration::from_secs(5);
const REQUEST_TIME: Duration = Duration::from_secs(10);
const REQUEST_BYTES: usize = 16 << 10;

enum Kind {
    Counter,
    Gauge,
    Histogram(&'static [f64]),
}
use Kind::{Counter, Gauge, Histogram};

const SECONDS: &[f64] =
    &[0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0];
const SCORES: &[f64] = &[0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0, 10.0, 100.0];
const ROWS: &[f64] = &[1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0];

/// Every metric of a run: name, kind, help.
const METRICS: &[(&str, Kind, &str)] = &[
    ("flowrun_edge_rows", Gauge, "Rows on an edge"),
    ("flowrun_edge_bytes", Gauge, "Bytes on an edge"),
    ("flowrun_edge_capacity_rows", Gauge, "Rows an edge holds before its sender waits; +Inf where it never does"),
    ("flowrun_edge_rows_total", Counter, "Rows sent over an edge"),
    ("flowrun_edge_blocked_seconds_total", Gauge, "Seconds the sender of an edge waited for room"),
    ("flowrun_stage_rows_in_total", Counter, "Rows a stage received"),
    ("flowrun_stage_rows_out_total", Counter, "Rows a stage sent"),
    ("flowrun_stage_reused_rows_total", Counter, "Input rows whose result came from the journal"),
    ("flowrun_stage_busy_seconds_total", Gauge, "Seconds a stage was busy, counted at the end of its round"),
    ("flowrun_stage_restarts_total", Counter, "Restarts a stage caused"),
    ("flowrun_stage_errors_total", Counter, "Failures of a stage, by whose they are"),
    ("flowrun_dead_letters_total", Counter, "Rows a stage gave up"),
    ("flowrun_run_info", Gauge, "1, with the version of the program"),
    ("flowrun_run_round", Gauge, "The round under way"),
    ("flowrun_llm_tokens_total", Counter, "Tokens a model server processed, by phase and device"),
    ("flowrun_llm_batch_rows", Histogram(ROWS), "Sequences in a model step"),
    ("flowrun_llm_step_seconds", Histogram(SECONDS), "Duration of a model step"),
    ("flowrun_llm_slots_used", Gauge, "KV slots in use"),
    ("flowrun_llm_queue_requests", Gauge, "Requests waiting for a slot"),
    ("flowrun_llm_queue_seconds", Histogram(SECONDS), "How long a request waited for a slot"),
    ("flowrun_endpoint_requests_total", Counter, "Requests to an endpoint, by what came of them"),
    ("flowrun_endpoint_request_seconds", Histogram(SECONDS), "Duration of a request to an endpoint"),
    ("flowrun_endpoint_retries_total", Counter, "Requests to an endpoint that are made again, by why"),
    ("flowrun_stage_stalled", Gauge, "1 while the stage is busy without a sign of life"),
    ("flowrun_edge_spilled_bytes", Gauge, "Bytes that wait on disk because the edge must not block its sender"),
    ("flowrun_train_loss", Gauge, "Loss of the last optimizer step"),
    ("flowrun_train_reward_margin", Gauge, "Mean reward margin of the last optimizer step"),
    ("flowrun_train_reward_accuracy", Gauge, "Share of pairs with a positive margin in the last optimizer step"),
    ("flowrun_train_grad_norm", Gauge, "Gradient norm of the last optimizer step, before clipping"),
    ("flowrun_train_learning_rate", Gauge, "Learning rate of the last optimizer step"),
    ("flowrun_train_steps_total", Counter, "Optimizer steps"),
    ("flowrun_train_tokens_total", Counter, "Tokens trained on"),
    ("flowrun_train_padding_tokens_total", Counter, "Tokens that went through the model as padding"),
    ("flowrun_train_seconds_total", Gauge, "Seconds of optimizer steps, by part: forward, backward, optimizer, wait"),
    ("flowrun_train_step_seconds", Histogram(SECONDS), "Duration of an optimizer step with its micro-batches"),
    ("flowrun_judge_verdicts_total", Counter, "Verdicts of a judge"),
    ("flowrun_judge_unreadable_total", Counter, "Answers of a judge that could not be read"),
    ("flowrun_judge_unreadable_ratio", Gauge, "Share of a round's questions whose answer could not be read"),
    ("flowrun_judge_tie_ratio", Gauge, "Share of a round's pairs that are ties"),
    ("flowrun_judge_first_slot_ratio", Gauge, "Share of verdicts for the answer shown first; 0.5 is fair"),
    ("flowrun_judge_swap_consistency_ratio", Gauge, "Share of pairs where both orders name the same answer"),
    ("flowrun_judge_longer_wins_ratio", Gauge, "Share of pairs won by the longer answer"),
    ("flowrun_judge_length_correlation", Gauge, "Pearson's correlation of scores and lengths of answers"),
    ("flowrun_judge_score", Histogram(SCORES), "Scores of answers"),
    ("flowrun_judge_score_mean", Gauge, "Mean score of a round's answers"),
    ("flowrun_judge_score_saturation_ratio", Gauge, "Share of a round's scores at the top of the scale"),
    ("flowrun_judge_labelled_agreement", Gauge, "Agreement with the labelled set: share of verdicts, or Kendall's tau"),
    ("flowrun_judge_pair_yield_ratio", Gauge, "Share of a round's prompts that a pair came of"),
    ("flowrun_judge_gap_mean", Gauge, "Mean difference of the scores in a round's pairs"),
    ("flowrun_judge_chosen_characters", Gauge, "Mean length of a round's chosen answers"),
    ("flowrun_judge_rejected_characters", Gauge, "Mean length of a round's rejected answers"),
    ("flowrun_gate_win_ratio", Gauge, "Share of held-out prompts that the round's adapter won; ties count half"),
    ("flowrun_gate_passed", Gauge, "1 where the round's adapter passed its gate"),
    ("flowrun_process_resident_bytes", Gauge, "Resident memory of the process"),
    ("flowrun_disk_free_bytes", Gauge, "Bytes that may still be written where the run directory is"),
];

/// A recorder of one run's metrics and the handle that renders them; every sample carries the
/// label `flow`.
pub fn recorder(flow: &str) -> Result<(Metrics, PrometheusHandle), BuildError> {
    let mut builder = PrometheusBuilder::new().add_global_label("flow", flow);
    for (name, kind, _) in METRICS {
        if let Histogram(buckets) = kind {
            builder = builder.set_buckets_for_metric(Matcher::Full((*name).into()), buckets)?;
        }
    }
    let recorder = builder.build_recorder();
    let handle = recorder.handle();
    for (name, kind, help) in METRICS {
        let (key, help) = (KeyName::from_const_str(name), (*help).into());
        match kind {
            Counter => recorder.describe_counter(key, None, help),
            Gauge => recorder.describe_gauge(key, None, help),
            Histogram(_) => recorder.describe_histogram(key, None::<Unit>, help),
        }
    }
    Ok((Metrics::new(Arc::new(recorder)), handle))
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
        Some("/metrics") => ("200 OK", handle.render()),
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
        metrics.histogram("flowrun_llm_step_seconds", &[("device", "cpu:0")]).record(0.02);
        let address = serve("127.0.0.1:0".parse().unwrap(), handle).await.unwrap();
        let text = get(address, "/metrics").await;
        assert!(text.starts_with("HTTP/1.1 200 OK"), "{text}");
        assert!(text.contains("flowrun_stage_rows_in_total{flow=\"loop\",stage=\"judge\"} 3"), "{text}");
        assert!(text.contains("# TYPE flowrun_llm_step_seconds histogram"), "{text}");
        assert!(text.contains("# HELP flowrun_llm_step_seconds"), "{text}");
        assert!(get(address, "/").await.starts_with("HTTP/1.1 404"));
    }
}
