//! What can be seen of a run: metrics and their dashboard, the trace.

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Command, Stdio};

use crate::support::{Case, tiny_flow};

fn scrape(address: &str) -> Option<String> {
    let mut stream = TcpStream::connect(address).ok()?;
    stream.write_all(format!("GET /metrics HTTP/1.0\r\nHost: {address}\r\n\r\n").as_bytes()).ok()?;
    let mut text = String::new();
    stream.read_to_string(&mut text).ok()?;
    Some(text)
}

/// Names of the metrics that a dashboard's expressions ask for.
fn names(text: &str) -> BTreeSet<String> {
    let word = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let words = text.split(|c| !word(c)).filter(|w| w.starts_with("flowrun_"));
    words.map(str::to_owned).collect()
}

#[test]
fn a_run_serves_every_metric_of_the_dashboard() {
    let case = Case::new(24, &tiny_flow(2, ""));
    let mut child = case.start(&["flow.toml", "--metrics-addr", "127.0.0.1:0"]);
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
    let address = lines
        .by_ref()
        .map(Result::unwrap)
        .find_map(|l| l.split("http://").nth(1).map(|a| a.trim_end_matches("/metrics").to_owned()))
        .expect("the address is told on stderr");
    let drain = std::thread::spawn(move || lines.count());
    let mut seen = BTreeSet::new();
    let mut last = String::new();
    while let Some(text) = scrape(&address) {
        seen.extend(names(&text));
        last = text;
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    drain.join().unwrap();
    assert!(child.wait().unwrap().success());
    promtool(&["check", "metrics"], last.split_once("\r\n\r\n").unwrap().1);
    assert!(last.contains("_bucket{"), "histograms have buckets:\n{last}");
    assert!(!last.contains("quantile="), "summaries can't be aggregated:\n{last}");

    let dashboards = Path::new(env!("CARGO_MANIFEST_DIR")).join("monitoring/grafana/dashboards");
    let mut asked = BTreeSet::new();
    for entry in std::fs::read_dir(dashboards).unwrap() {
        let text = std::fs::read_to_string(entry.unwrap().path()).unwrap();
        let dashboard: serde_json::Value = serde_json::from_str(&text).unwrap();
        collect_expressions(&dashboard, &mut asked);
    }
    assert!(asked.len() > 10);
    let missing: Vec<_> = asked.difference(&seen).collect();
    assert!(missing.is_empty(), "not served: {missing:?}\nserved: {seen:?}");
}

/// Asks Prometheus' own checker; where there is none, that is said.
fn promtool(arguments: &[&str], input: &str) {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let child = Command::new("promtool").args(arguments).current_dir(root).stdin(Stdio::piped()).spawn();
    let Ok(mut child) = child else { return println!("skipped: there is no promtool here") };
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    assert!(child.wait().unwrap().success(), "promtool {arguments:?}");
}

#[test]
fn prometheus_takes_the_configuration_the_alerts_and_the_metrics() {
    promtool(&["check", "config", "monitoring/prometheus.yml"], "");
    promtool(&["check", "rules", "monitoring/alerts.yml"], "");
    promtool(&["test", "rules", "monitoring/alerts_test.yml"], "");
}

fn collect_expressions(value: &serde_json::Value, out: &mut BTreeSet<String>) {
    match value {
        serde_json::Value::Object(map) => {
            for (key, value) in map {
                match value.as_str() {
                    Some(text) if key == "expr" => out.extend(names(text)),
                    _ => collect_expressions(value, out),
                }
            }
        }
        serde_json::Value::Array(values) => values.iter().for_each(|v| collect_expressions(v, out)),
        _ => {}
    }
}

/// `(track, name, stage, start, end)` of every interval, microseconds.
fn intervals(case: &Case) -> Vec<(String, String, String, f64, f64)> {
    let trace = case.json("runs/tiny/trace.json");
    let events = trace.as_array().or_else(|| trace["traceEvents"].as_array()).unwrap();
    let text = |v: &serde_json::Value| v.as_str().unwrap_or_default().to_owned();
    let track = |tid: &serde_json::Value| {
        let named = events.iter().find(|e| e["name"] == "thread_name" && e["tid"] == *tid).unwrap();
        text(&named["args"]["name"])
    };
    let whole = events.iter().filter(|e| e["ph"] == "X");
    let interval = |e: &serde_json::Value| {
        let start = e["ts"].as_f64().unwrap();
        (track(&e["tid"]), text(&e["name"]), text(&e["args"]["stage"]), start, start + e["dur"].as_f64().unwrap())
    };
    whole.map(interval).collect()
}

#[test]
fn training_begins_while_the_sampler_and_the_judge_still_work() {
    let case = Case::new(96, &tiny_flow(1, "").replace("max_new_tokens = 12", "max_new_tokens = 64"));
    case.done(&["flow.toml"]);
    let all = intervals(&case);
    let of = |track: &str, name: &str| {
        all.iter().filter(|i| i.0 == track && i.1 == name).map(|i| (i.3, i.4)).collect::<Vec<_>>()
    };
    let first = |spans: &[(f64, f64)]| spans.iter().map(|s| s.0).fold(f64::INFINITY, f64::min);
    let last = |spans: &[(f64, f64)]| spans.iter().map(|s| s.1).fold(0.0, f64::max);
    let (decode, steps) = (of("cpu:0", "decode"), of("cpu:1", "optimizer"));
    let judged: Vec<_> = all.iter().filter(|i| i.1 == "score" && i.2 == "judge").map(|i| (i.3, i.4)).collect();
    assert!(first(&judged) < last(&decode), "the judge waited for the sampler");
    assert!(first(&steps) < last(&judged), "the trainer waited for the judge");
}
