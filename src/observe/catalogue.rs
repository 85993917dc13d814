//! Every metric of a run: what it counts, its labels, its buckets. `docs/metrics.md` is made of this.

use std::fmt::Write;

pub enum Kind {
    Counter,
    Gauge,
    /// With its buckets: one without would be rendered as a summary, which no query can add up over devices or runs.
    Histogram(&'static [f64]),
}

pub struct Metric {
    pub name: &'static str,
    pub kind: Kind,
    /// Beside `flow`, which every sample carries. What they can be is bounded by the flow: names of its stages and
    /// devices, never a prompt.
    pub labels: &'static str,
    pub help: &'static str,
}

const fn counter(name: &'static str, labels: &'static str, help: &'static str) -> Metric {
    Metric { name, kind: Kind::Counter, labels, help }
}

/// Also for seconds that add up: counters of the façade are whole numbers. `prometheus::render` makes counters of them.
const fn gauge(name: &'static str, labels: &'static str, help: &'static str) -> Metric {
    Metric { name, kind: Kind::Gauge, labels, help }
}

const fn histogram(name: &'static str, buckets: &'static [f64], labels: &'static str, help: &'static str) -> Metric {
    Metric { name, kind: Kind::Histogram(buckets), labels, help }
}

const SECONDS: &[f64] =
    &[0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0];
const SCORES: &[f64] = &[0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0, 10.0, 100.0];
const ROWS: &[f64] = &[1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0];
const TOKENS: &[f64] =
    &[8.0, 16.0, 32.0, 64.0, 96.0, 128.0, 192.0, 256.0, 384.0, 512.0, 768.0, 1024.0, 2048.0, 4096.0, 8192.0];

pub const METRICS: &[Metric] = &[
    gauge("flowrun_run_info", "version", "1, with the version of the program"),
    gauge("flowrun_run_round", "", "The round under way"),
    gauge("flowrun_run_rounds", "", "Rounds that the flow has"),
    gauge("flowrun_run_seconds", "", "Seconds since the run began, or went on"),
    gauge(
        "flowrun_run_remaining_seconds",
        "",
        "Seconds until the end of the run, estimated from its pace; absent before there is one",
    ),
    counter("flowrun_stage_rows_in_total", "stage", "Rows a stage received"),
    counter("flowrun_stage_rows_out_total", "stage", "Rows a stage sent"),
    counter("flowrun_stage_reused_rows_total", "stage", "Input rows whose result came from the journal"),
    gauge(
        "flowrun_stage_busy_seconds_total",
        "stage",
        "Seconds a device worked for a stage, of several the busiest; where it needs none, those it did not wait",
    ),
    counter("flowrun_stage_restarts_total", "stage", "Restarts a stage caused"),
    counter("flowrun_stage_errors_total", "stage domain", "Failures of a stage, by whose they are"),
    gauge("flowrun_stage_progress_ratio", "stage", "Share of the round's work that the stage has done"),
    gauge("flowrun_stage_stalled", "stage", "1 while the stage is busy without a sign of life"),
    gauge("flowrun_stage_running", "stage", "1 while the stage runs"),
    gauge(
        "flowrun_stage_wait_seconds_total",
        "stage",
        "Seconds a stage stood still for others: for rows, for room, for an adapter",
    ),
    counter("flowrun_dead_letters_total", "stage", "Rows a stage gave up"),
    gauge("flowrun_edge_rows", "edge", "Rows on an edge"),
    gauge("flowrun_edge_bytes", "edge", "Bytes on an edge"),
    gauge("flowrun_edge_capacity_rows", "edge", "Rows an edge holds before its sender waits; +Inf where it never does"),
    counter("flowrun_edge_rows_total", "edge", "Rows sent over an edge"),
    gauge("flowrun_edge_blocked_seconds_total", "edge", "Seconds the sender of an edge waited for room"),
    gauge("flowrun_edge_spilled_bytes", "edge", "Bytes that wait on disk because the edge must not block its sender"),
    counter("flowrun_edge_bytes_total", "edge", "Bytes sent over an edge"),
    gauge(
        "flowrun_edge_capacity_bytes",
        "edge",
        "Bytes an edge holds before its sender waits; +Inf where it never does",
    ),
    histogram("flowrun_generation_tokens", TOKENS, "stage", "Tokens of an answer"),
    counter("flowrun_generations_total", "stage reason", "Answers, by why they ended: stop, length, context"),
    counter("flowrun_llm_tokens_total", "device model phase", "Tokens a model server processed, by phase and device"),
    histogram("flowrun_llm_batch_rows", ROWS, "device model", "Sequences in a model step"),
    histogram("flowrun_llm_step_seconds", SECONDS, "device model", "Duration of a model step"),
    gauge("flowrun_llm_slots_used", "device model", "KV slots in use"),
    gauge("flowrun_llm_queue_requests", "device model", "Requests waiting for a slot"),
    histogram("flowrun_llm_queue_seconds", SECONDS, "device model", "How long a request waited for a slot"),
    gauge("flowrun_llm_slots", "device model", "KV slots there are"),
    gauge("flowrun_llm_kv_tokens", "device model", "Tokens whose keys and values are held for running sequences"),
    gauge("flowrun_llm_adapters", "device model", "Adapters that are loaded"),
    gauge("flowrun_device_busy_seconds_total", "device stage", "Seconds a device worked for a stage"),
    gauge(
        "flowrun_device_memory_bytes",
        "device model kind",
        "Memory by kind: weights, kv, adapters; on a GPU also allocated (in tensors of this process), reserved and total",
    ),
    counter("flowrun_endpoint_requests_total", "model outcome", "Requests to an endpoint, by what came of them"),
    histogram("flowrun_endpoint_request_seconds", SECONDS, "model", "Duration of a request to an endpoint"),
    counter("flowrun_endpoint_retries_total", "model reason", "Requests to an endpoint that are made again, by why"),
    gauge("flowrun_train_loss", "stage", "Loss of the last optimizer step"),
    gauge("flowrun_train_reward_margin", "stage", "Mean reward margin of the last optimizer step"),
    gauge("flowrun_train_reward_accuracy", "stage", "Share of pairs with a positive margin in the last optimizer step"),
    gauge("flowrun_train_grad_norm", "stage", "Gradient norm of the last optimizer step, before clipping"),
    gauge("flowrun_train_learning_rate", "stage", "Learning rate of the last optimizer step"),
    counter("flowrun_train_steps_total", "stage", "Optimizer steps"),
    counter("flowrun_train_tokens_total", "stage", "Tokens trained on"),
    counter("flowrun_train_padding_tokens_total", "stage", "Tokens that went through the model as padding"),
    gauge(
        "flowrun_train_seconds_total",
        "stage part",
        "Seconds of optimizer steps, by part: forward, backward, optimizer, wait",
    ),
    histogram("flowrun_train_step_seconds", SECONDS, "stage", "Duration of an optimizer step with its micro-batches"),
    gauge("flowrun_train_rewards", "stage side", "Mean reward of the last optimizer step, in nats times beta"),
    gauge("flowrun_train_logps", "stage side", "Mean log-prob of the answers of the last optimizer step, in nats"),
    gauge("flowrun_train_epoch", "stage", "Epochs done, with the part of the one under way"),
    counter("flowrun_train_pairs_total", "stage", "Pairs trained on, once an epoch"),
    gauge("flowrun_train_eval_loss", "stage", "Loss of the last evaluation"),
    gauge("flowrun_train_eval_reward_margin", "stage", "Mean reward margin of the last evaluation"),
    gauge(
        "flowrun_train_eval_reward_accuracy",
        "stage",
        "Share of pairs with a positive margin in the last evaluation",
    ),
    counter("flowrun_judge_verdicts_total", "stage verdict", "Verdicts of a judge"),
    counter("flowrun_judge_unreadable_total", "stage", "Answers of a judge that could not be read"),
    gauge("flowrun_judge_unreadable_ratio", "stage", "Share of a round's questions whose answer could not be read"),
    gauge("flowrun_judge_tie_ratio", "stage", "Share of a round's pairs that are ties"),
    gauge("flowrun_judge_first_slot_ratio", "stage", "Share of verdicts for the answer shown first; 0.5 is fair"),
    gauge("flowrun_judge_swap_consistency_ratio", "stage", "Share of pairs where both orders name the same answer"),
    gauge("flowrun_judge_longer_wins_ratio", "stage", "Share of pairs won by the longer answer"),
    gauge("flowrun_judge_length_correlation", "stage", "Pearson's correlation of scores and lengths of answers"),
    histogram("flowrun_judge_score", SCORES, "stage", "Scores of answers"),
    gauge("flowrun_judge_score_mean", "stage", "Mean score of a round's answers"),
    gauge("flowrun_judge_score_saturation_ratio", "stage", "Share of a round's scores at the top of the scale"),
    gauge(
        "flowrun_judge_labelled_agreement",
        "stage",
        "Agreement with the labelled set: share of verdicts, or Kendall's tau",
    ),
    gauge("flowrun_judge_pair_yield_ratio", "stage", "Share of a round's prompts that a pair came of"),
    gauge("flowrun_judge_gap_mean", "stage", "Mean difference of the scores in a round's pairs"),
    gauge("flowrun_judge_chosen_characters", "stage", "Mean length of a round's chosen answers"),
    gauge("flowrun_judge_rejected_characters", "stage", "Mean length of a round's rejected answers"),
    gauge(
        "flowrun_gate_win_ratio",
        "stage",
        "Share of held-out prompts that the round's adapter won, of those whose verdict was read; ties count half",
    ),
    gauge("flowrun_gate_passed", "stage", "1 where the round's adapter passed its gate"),
    gauge("flowrun_process_resident_bytes", "", "Resident memory of the process"),
    gauge("flowrun_process_cpu_seconds_total", "", "Processor time of the process, of all its threads"),
    gauge("flowrun_process_threads", "", "Threads of the process"),
    gauge("flowrun_process_open_fds", "", "Files and sockets that the process has open"),
    gauge("flowrun_process_start_time_seconds", "", "When the process began, in seconds since 1970"),
    gauge("flowrun_disk_free_bytes", "", "Bytes that may still be written where the run directory is"),
];

/// What the subsystems are, by the second word of a name.
const SUBSYSTEMS: &[(&str, &str)] = &[
    ("run", "The run"),
    ("stage", "Stages"),
    ("edge", "Edges"),
    ("generation", "Answers"),
    ("llm", "Model servers"),
    ("device", "Devices"),
    ("endpoint", "Endpoints"),
    ("train", "Training"),
    ("judge", "Judges and pairs"),
    ("gate", "Gates"),
    ("process", "The process and its disk"),
];

impl Metric {
    /// What Prometheus is told that it is.
    pub fn kind_name(&self) -> &'static str {
        match self.kind {
            Kind::Counter => "counter",
            Kind::Gauge if self.name.ends_with("_total") => "counter",
            Kind::Gauge => "gauge",
            Kind::Histogram(_) => "histogram",
        }
    }
}

fn subsystem(metric: &Metric) -> &'static str {
    let word = metric.name.split('_').nth(1).unwrap_or_default();
    match word {
        "dead" => "stage",
        "generations" => "generation",
        "disk" => "process",
        word => SUBSYSTEMS.iter().find(|(key, _)| *key == word).map_or("run", |(key, _)| key),
    }
}

/// `docs/metrics.md`.
pub fn page() -> String {
    let mut page = String::from(HEAD);
    for (key, title) in SUBSYSTEMS {
        // Writing to a String does not fail.
        let _ = write!(page, "\n## {title}\n| metric | kind | labels | what it is |\n|---|---|---|---|\n");
        for metric in METRICS.iter().filter(|m| subsystem(m) == *key) {
            let kind = metric.kind_name();
            let labels: Vec<String> = metric.labels.split_whitespace().map(|l| format!("`{l}`")).collect();
            let _ = writeln!(page, "| `{}` | {kind} | {} | {} |", metric.name, labels.join(" "), metric.help);
        }
    }
    page
}

const HEAD: &str = "\
# Metrics
<!-- made by `cargo run --example metrics > docs/metrics.md` from src/observe/catalogue.rs -->
`flowrun FILE --metrics-addr 127.0.0.1:9464` serves these at `/metrics`; see [monitoring](../monitoring/README.md) for
Prometheus, Grafana and alerts. Every sample has the label `flow`, the name of the flow; in one process, two runs have
each their own. Units are base units: seconds, bytes, shares of 1. Histograms have buckets.
";

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn names_are_of_one_pattern_and_each_is_there_once() {
        let mut seen = HashSet::new();
        for metric in METRICS {
            let name = metric.name;
            assert!(seen.insert(name), "{name} twice");
            assert!(
                name.starts_with("flowrun_") && name.bytes().all(|b| b.is_ascii_lowercase() || b == b'_'),
                "{name}"
            );
            assert_eq!(
                matches!(metric.kind, Kind::Counter),
                name.ends_with("_total") && !name.ends_with("_seconds_total"),
                "{name}"
            );
            assert!(!metric.help.is_empty() && !metric.help.ends_with('.') && !metric.help.contains('|'), "{name}");
        }
    }

    #[test]
    fn the_page_in_docs_is_this_one() {
        let there = include_str!("../../docs/metrics.md");
        assert!(there == page(), "cargo run --example metrics > docs/metrics.md");
    }
}
