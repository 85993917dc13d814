//! The metrics of a run, as a real Prometheus collects them and the dashboards ask for them.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use flowrun::observe::catalogue::METRICS;
use serde_json::Value;

use crate::chat_server::{Said, Server};
use crate::support::{Case, gate, tiny_flow};

/// A file of the project's folder `monitoring`.
fn monitoring(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("monitoring").join(name)
}

/// Every kind of stage that has figures of its own: judges of two methods, one of them at an endpoint and one with a
/// labelled set, pairs, a trainer with validation, a gate.
fn flow_of_all_kinds(endpoint: &str) -> String {
    let stages = format!(
        r#"
[models.scripted]
endpoint = "{endpoint}"
name = "scripted"
concurrency = 1

[stages.second]
kind = "judge"
input = "sample"
model = "scripted"
read = "text"

[stages.score]
kind = "judge"
input = "sample"
model = "policy"
device = "cpu:1"
method = "score"
read = "logits"
scale = [1, 3]
prompt = "{{prompt}} {{answer}}"

[stages.best]
kind = "pairs"
input = "score"
"#
    );
    let gate = gate(0.0, "judge = { model = \"policy\", device = \"cpu:1\" }");
    tiny_flow(2, &(stages + &gate)).replace("order = \"both\"", "order = \"both\"\nlabelled = \"labelled.jsonl\"")
}

/// One HTTP GET; the body.
fn get(address: &str, target: &str) -> Option<String> {
    let mut stream = TcpStream::connect(address).ok()?;
    stream.write_all(format!("GET {target} HTTP/1.0\r\nHost: {address}\r\n\r\n").as_bytes()).ok()?;
    let mut text = String::new();
    stream.read_to_string(&mut text).ok()?;
    let (head, body) = text.split_once("\r\n\r\n")?;
    head.starts_with("HTTP/1.").then(|| body.to_owned())
}

/// Debian's Prometheus on a port of its own.
struct Prometheus {
    child: Child,
    address: String,
    began: Instant,
}

impl Prometheus {
    /// Collects from `target` four times a second, with the project's rules; none where it is not installed.
    fn start(case: &Case, target: &str) -> Option<Self> {
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let config = format!(
            "global: {{ scrape_interval: 250ms, evaluation_interval: 1s }}\nrule_files: [{:?}]\n\
             scrape_configs: [{{ job_name: flowrun, static_configs: [{{ targets: [\"{target}\"] }}] }}]\n",
            monitoring("alerts.yml").display().to_string()
        );
        case.write("prometheus.yml", &config);
        let address = format!("127.0.0.1:{port}");
        let child = Command::new("prometheus")
            .arg(format!("--config.file={}", case.path("prometheus.yml").display()))
            .arg(format!("--storage.tsdb.path={}", case.path("prometheus").display()))
            .arg(format!("--web.listen-address={address}"))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
        let Ok(child) = child else {
            println!("skipped: there is no prometheus here");
            return None;
        };
        let prometheus = Self { child, address, began: Instant::now() };
        let deadline = Instant::now() + Duration::from_secs(60);
        while !get(&prometheus.address, "/-/ready").is_some_and(|text| text.contains("Ready")) {
            assert!(Instant::now() < deadline, "Prometheus does not become ready");
            std::thread::sleep(Duration::from_millis(50));
        }
        Some(prometheus)
    }

    fn ask(&self, path: &str, query: &[(&str, &str)]) -> Value {
        let mut url = url::Url::parse(&format!("http://{}{path}", self.address)).unwrap();
        url.query_pairs_mut().extend_pairs(query);
        let text = get(&self.address, &url[url::Position::BeforePath..]).unwrap();
        let answer: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(answer["status"], "success", "{query:?}: {answer}");
        answer["data"].clone()
    }

    /// Whether the expression had a number at any moment since it began.
    fn knows(&self, expression: &str) -> bool {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs_f64();
        let start = now - self.began.elapsed().as_secs_f64();
        let (start, end) = (start.to_string(), now.to_string());
        let query = [("query", expression), ("start", &start), ("end", &end), ("step", "0.25")];
        let data = self.ask("/api/v1/query_range", &query);
        let values = data["result"].as_array().unwrap().iter().flat_map(|series| series["values"].as_array().unwrap());
        values.into_iter().any(|value| value[1].as_str().is_some_and(|v| v.parse::<f64>().is_ok_and(f64::is_finite)))
    }
}

impl Drop for Prometheus {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Dashboard and panel of every expression.
fn expressions() -> BTreeMap<String, Vec<(String, String)>> {
    let mut found = BTreeMap::new();
    for entry in std::fs::read_dir(monitoring("grafana/dashboards")).unwrap() {
        let path = entry.unwrap().path();
        let dashboard: Value = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
        let mut of_dashboard = Vec::new();
        collect(&dashboard, "", &mut of_dashboard);
        found.insert(path.file_stem().unwrap().to_string_lossy().into_owned(), of_dashboard);
    }
    found
}

fn collect(value: &Value, place: &str, found: &mut Vec<(String, String)>) {
    match value {
        Value::Object(map) => {
            let place = map.get("title").or(map.get("name")).and_then(Value::as_str).unwrap_or(place);
            for (key, value) in map {
                match value.as_str() {
                    Some(text) if key == "expr" => found.push((place.into(), text.into())),
                    _ => collect(value, place, found),
                }
            }
        }
        Value::Array(values) => values.iter().for_each(|value| collect(value, place, found)),
        _ => {}
    }
}

/// What Grafana fills in.
fn filled_in(expression: &str) -> String {
    let text = expression.replace("$__rate_interval", "15s").replace("$flow", ".*");
    assert!(!text.contains('$'), "{text}");
    text
}

/// Names of metrics in a text.
fn names(text: &str) -> BTreeSet<String> {
    let word = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let words = text.split(|c| !word(c)).filter(|w| w.starts_with("flowrun_"));
    words.map(str::to_owned).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn prometheus_collects_every_metric_and_every_panel_of_the_dashboards_has_data() {
    // Its answers take their time, so that there is some to collect in; one of them fails at first.
    let server = Server::start(|number, _| match number {
        2 => Said::error(503, "busy"),
        _ => Said { after: Duration::from_millis(250), ..Said::text(["Response A", "Response B"][number % 2]) },
    })
    .await;
    tokio::task::block_in_place(|| watched(&server.address));
}

fn watched(endpoint: &str) {
    let case = Case::new(48, &flow_of_all_kinds(endpoint));
    let labelled = ["a", "b", "a", "b"].map(|verdict| {
        format!("{{\"prompt\": \"p\", \"a\": \"one\", \"b\": \"another one\", \"verdict\": {verdict:?}}}\n")
    });
    case.write("labelled.jsonl", &labelled.concat());
    let mut child = case.start(&["flow.toml", "--metrics-addr", "127.0.0.1:0"]);
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines().map(Result::unwrap);
    let address = lines
        .by_ref()
        .find_map(|l| l.split("http://").nth(1).map(|a| a.trim_end_matches("/metrics").to_owned()))
        .expect("the address is told on stderr");
    let rest = std::thread::spawn(move || lines.collect::<Vec<_>>());
    let prometheus = Prometheus::start(&case, &address);
    let (mut seen, mut last) = (BTreeSet::new(), String::new());
    while let Some(text) = get(&address, "/metrics") {
        seen.extend(names(&text));
        last = text;
        std::thread::sleep(Duration::from_millis(20));
    }
    let told = rest.join().unwrap();
    assert!(child.wait().unwrap().success(), "{told:?}");
    promtool(&["check", "metrics"], &last);
    assert!(last.contains("_bucket{"), "histograms have buckets:\n{last}");
    assert!(!last.contains("quantile="), "summaries can't be aggregated:\n{last}");
    let missing: Vec<_> =
        METRICS.iter().map(|m| m.name).filter(|name| !seen.iter().any(|s| s.starts_with(name))).collect();
    assert!(missing.is_empty(), "in the catalogue and never served: {missing:?}");
    if let Some(prometheus) = prometheus {
        panels_have_data(&prometheus);
        rules_are_in_order(&prometheus);
    }
}

fn panels_have_data(prometheus: &Prometheus) {
    let all = expressions();
    assert_eq!(all.keys().collect::<Vec<_>>(), ["dataflow", "judge", "model-server", "overview", "training"]);
    let empty: Vec<_> = all
        .iter()
        .flat_map(|(dashboard, panels)| panels.iter().map(move |(panel, text)| (dashboard, panel, text)))
        .filter(|(.., text)| !prometheus.knows(&filled_in(text)))
        .collect();
    assert!(empty.is_empty(), "no data for {empty:#?}");
}

fn rules_are_in_order(prometheus: &Prometheus) {
    let rules = prometheus.ask("/api/v1/rules", &[]);
    let rules: Vec<_> =
        rules["groups"].as_array().unwrap().iter().flat_map(|g| g["rules"].as_array().unwrap()).collect();
    assert!(rules.len() >= 7);
    for rule in rules {
        assert_eq!(rule["health"], "ok", "{rule}");
        // Some figures of a random model are bad; but it stands still nowhere, and gives nothing up.
        for name in ["FlowrunStageStalled", "FlowrunDeadLetters", "FlowrunLossNotFinite", "FlowrunDiskFull"] {
            assert!(rule["name"] != name || rule["state"] == "inactive", "{rule}");
        }
    }
}

#[test]
fn every_metric_is_on_a_dashboard_and_every_dashboard_can_be_loaded() {
    let asked: BTreeSet<String> =
        expressions().values().flatten().flat_map(|(_, expression)| names(expression)).collect();
    let plain = |name: &str| {
        ["_bucket", "_sum", "_count"].iter().find_map(|end| name.strip_suffix(end)).unwrap_or(name).to_owned()
    };
    let known: BTreeSet<String> = METRICS.iter().map(|m| m.name.to_owned()).collect();
    let asked: BTreeSet<String> =
        asked.into_iter().map(|name| if known.contains(&name) { name } else { plain(&name) }).collect();
    assert_eq!(asked, known);

    let mut uids = BTreeSet::new();
    for entry in std::fs::read_dir(monitoring("grafana/dashboards")).unwrap() {
        let dashboard: Value = serde_json::from_str(&std::fs::read_to_string(entry.unwrap().path()).unwrap()).unwrap();
        assert!(uids.insert(dashboard["uid"].as_str().unwrap().to_owned()));
        let panels = dashboard["panels"].as_array().unwrap();
        let ids: BTreeSet<_> = panels.iter().map(|panel| panel["id"].as_u64().unwrap()).collect();
        assert_eq!(ids.len(), panels.len(), "{}", dashboard["title"]);
        for panel in panels.iter().filter(|panel| panel["type"] != "row") {
            let told = panel["description"].as_str().unwrap_or_default();
            assert!(!told.is_empty(), "{} says nothing of itself", panel["title"]);
            let target = &panel["targets"][0];
            assert!(target["datasource"]["uid"] == "${datasource}" || panel["datasource"]["uid"] == "${datasource}");
        }
    }
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
fn prometheus_takes_the_configuration_and_the_alerts() {
    promtool(&["check", "config", "monitoring/prometheus.yml"], "");
    promtool(&["check", "rules", "monitoring/alerts.yml"], "");
    promtool(&["test", "rules", "monitoring/alerts_test.yml"], "");
}
