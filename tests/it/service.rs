//! The example of a service: a flow is sent over HTTP, its events stream back, its rows are there.

use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::support::{tiny_flow, tiny_model};

#[allow(dead_code)]
#[path = "../../examples/service.rs"]
mod example;

async fn serve(runs: &Path, data: &Path) -> String {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let router = example::Service::new(runs.into(), data.into()).router();
    tokio::spawn(async move { axum::serve(listener, router).await });
    address
}

/// Status code and body; a stream is read to its end.
async fn ask(address: &str, method: &str, path: &str, body: &str) -> (u16, String) {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let length = body.len();
    // HTTP/1.0 bodies come whole, not in chunks.
    let request = format!("{method} {path} HTTP/1.0\r\nHost: x\r\nContent-Length: {length}\r\n\r\n{body}");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).await.unwrap();
    let (head, body) = text.split_once("\r\n\r\n").unwrap();
    (head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_owned())
}

/// Fills the data directory; the loop over it in so many rounds.
fn filled(data: &Path, rounds: u32) -> String {
    let lines: String = (0..8).map(|i| format!("{{\"prompt\": \"number {i}\"}}\n")).collect();
    std::fs::write(data.join("prompts.jsonl"), lines).unwrap();
    // A service serves what lies in its data directory; a model may be a link to elsewhere only where
    // that is allowed too, so it is copied.
    let model = data.join("model");
    std::fs::create_dir(&model).unwrap();
    for file in std::fs::read_dir(tiny_model()).unwrap().flatten().filter(|f| f.path().is_file()) {
        std::fs::copy(file.path(), model.join(file.file_name())).unwrap();
    }
    tiny_flow(rounds, "").replace(&format!("{:?}", tiny_model()), "\"model\"")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flow_is_sent_followed_and_read() {
    let dir = TempDir::new().unwrap();
    let data = dir.path().join("data");
    std::fs::create_dir(&data).unwrap();
    let flow = filled(&data, 1);
    let address = serve(&dir.path().join("runs"), &data).await;

    let (code, body) = ask(&address, "POST", "/runs", &flow).await;
    assert_eq!((code, body.as_str()), (201, "{\"id\":\"1\"}"));
    let (code, body) = ask(&address, "GET", "/runs/1/events", "").await;
    let events: Vec<Value> =
        body.lines().filter_map(|l| l.strip_prefix("data: ")).map(|l| serde_json::from_str(l).unwrap()).collect();
    assert_eq!((code, events[0]["event"].as_str()), (200, Some("round_started")));
    assert!(events.iter().any(|e| e["event"] == "logged" && e["fields"]["loss"].is_f64()), "{events:?}");
    assert_eq!(events.last().unwrap()["status"], "done");

    let (_, body) = ask(&address, "GET", "/runs/1", "").await;
    assert_eq!(serde_json::from_str::<Value>(&body).unwrap()["ended"], true);
    let (_, body) = ask(&address, "GET", "/runs/1/rounds", "").await;
    let summary: Value = serde_json::from_str(&body).unwrap();
    assert_eq!(summary["rounds"][0]["stages"]["sample"]["rows_out"], 16);
    let (code, body) = ask(&address, "GET", "/runs/1/rounds/1/halves.train", "").await;
    assert!(code == 200 && body.lines().all(|l| serde_json::from_str::<Value>(l).unwrap()["chosen"].is_string()));

    for (method, path, sent, code, says) in [
        ("GET", "/runs/2", "", 404, "there is no run 2"),
        ("POST", "/runs/1/stop", "", 404, "is not pause"),
        ("POST", "/runs", "rounds = 1", 422, "no stage"),
        (
            "POST",
            "/runs",
            "[stages.a]\nkind = \"source\"\ndataset = \"/etc/hosts\"\n",
            422,
            "does not allow a flow to read /etc/hosts",
        ),
    ] {
        let (found, body) = ask(&address, method, path, sent).await;
        assert!(found == code && body.contains(says), "{method} {path}: {found} {body}");
    }
}

/// A flow that is over at once.
const SHORT: &str = "[stages.rows]\nkind = \"source\"\ndataset = \"prompts.jsonl\"\n\
                     [stages.few]\nkind = \"mapper\"\ninput = \"rows\"\nsql = \"SELECT * FROM input\"\n";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_run_has_an_id_of_its_own_also_after_a_restart() {
    let dir = TempDir::new().unwrap();
    let (runs, data) = (dir.path().join("runs"), dir.path().join("data"));
    std::fs::create_dir(&data).unwrap();
    filled(&data, 1);
    let submit = async |address: String, flow: &'static str| {
        let (code, body) = ask(&address, "POST", "/runs", flow).await;
        assert_eq!(code, 201, "{body}");
        serde_json::from_str::<Value>(&body).unwrap()["id"].as_str().unwrap().parse::<u64>().unwrap()
    };
    let address = serve(&runs, &data).await;
    // What is found when the flow is planned, with the directory's name taken already.
    let broken = SHORT.replace("SELECT *", "SELECT nothing");
    for _ in 0..2 {
        let (code, body) = ask(&address, "POST", "/runs", &broken).await;
        assert!(code == 422 && body.contains("nothing"), "{code} {body}");
    }
    assert_eq!(std::fs::read_dir(&runs).unwrap().count(), 0, "a run that did not start left something");
    let together = futures::future::join_all((0..4).map(|_| submit(address.clone(), SHORT))).await;
    let mut ids = together.clone();
    ids.sort_unstable();
    assert_eq!(ids, [1, 2, 3, 4], "{together:?}");
    for id in ids {
        let (_, events) = ask(&address, "GET", &format!("/runs/{id}/events"), "").await;
        assert!(events.contains("done"), "{events}");
    }
    let figures = ask(&address, "GET", "/runs/2/rounds", "").await;
    let rows = ask(&address, "GET", "/runs/2/rounds/1/few", "").await;
    assert!(rows.0 == 200 && rows.1.lines().count() == 8, "{rows:?}");

    std::fs::create_dir(runs.join("5")).unwrap();
    let address = serve(&runs, &data).await;
    assert_eq!(submit(address.clone(), SHORT).await, 6);
    assert_eq!(ask(&address, "GET", "/runs/2/rounds", "").await, figures);
    assert_eq!(ask(&address, "GET", "/runs/2/rounds/1/few", "").await, rows);
    let (code, status) = ask(&address, "GET", "/runs/2", "").await;
    assert!(code == 200 && serde_json::from_str::<Value>(&status).unwrap()["ended"] == true, "{status}");
    for (method, path, code) in [
        ("GET", "/runs/2/events", 410),
        ("POST", "/runs/2/cancel", 410),
        ("GET", "/runs/5", 404),
        ("GET", "/runs/..%2Fdata", 400),
        ("GET", "/runs/2/rounds/1/..%2F..%2F1%2Fround-1%2Ffew", 422),
        ("GET", "/runs/2/rounds/2/few", 404),
    ] {
        let (found, body) = ask(&address, method, path, "").await;
        assert_eq!(found, code, "{path}: {body}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn results_are_there_while_a_run_goes_on() {
    let dir = TempDir::new().unwrap();
    let data = dir.path().join("data");
    std::fs::create_dir(&data).unwrap();
    let flow = filled(&data, 2).replace("max_new_tokens = 12", "max_new_tokens = 64");
    let address = serve(&dir.path().join("runs"), &data).await;
    let (code, body) = ask(&address, "POST", "/runs", &flow).await;
    assert_eq!(code, 201, "{body}");
    let began = Instant::now();
    let status = async || serde_json::from_str::<Value>(&ask(&address, "GET", "/runs/1", "").await.1).unwrap();
    while status().await["round"] != 2 {
        assert!(began.elapsed() < Duration::from_secs(60));
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert_eq!(ask(&address, "POST", "/runs/1/pause", "").await.0, 204);
    let (code, figures) = ask(&address, "GET", "/runs/1/rounds", "").await;
    let figures: Value = serde_json::from_str(&figures).unwrap();
    assert_eq!((code, figures["status"].as_str()), (200, Some("running")), "{figures}");
    assert_eq!(figures["rounds"][0]["stages"]["sample"]["rows_out"], 8);
    let (code, rows) = ask(&address, "GET", "/runs/1/rounds/1/judge", "").await;
    assert!(code == 200 && rows.lines().count() == 4, "{rows}");
    let (code, body) = ask(&address, "GET", "/runs/1/rounds/2/align", "").await;
    assert!(code == 404 && body.contains("no rows of `align` in round 2 yet"), "{code} {body}");
    assert_eq!(status().await["ended"], false, "the run was over before it was looked at");
    assert_eq!(ask(&address, "POST", "/runs/1/resume", "").await.0, 204);
    assert!(ask(&address, "GET", "/runs/1/events", "").await.1.contains("\"status\":\"done\""));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_client_is_told_is_for_a_client() {
    let dir = TempDir::new().unwrap();
    let (runs, data) = (dir.path().join("runs"), dir.path().join("data"));
    std::fs::create_dir(&data).unwrap();
    filled(&data, 1);
    let address = serve(&runs, &data).await;
    let own = |body: &str| {
        let words = ["--", "process", "host", "`flowrun", "make setup", &std::process::id().to_string()];
        words.iter().find(|word| body.contains(**word)).map(|word| format!("{word} in {body}"))
    };
    let typo = SHORT.replace("dataset =", "datset =");
    let late = SHORT.replace("SELECT *", "SELECT 1 / (length(prompt) - 8)");
    for (flow, code, says) in [
        (typo.as_str(), 422, "did you mean `dataset`?"),
        ("rounds = [", 422, "flow.toml:1: not valid TOML"),
        (&SHORT.replace("prompts.jsonl", "gone.jsonl"), 422, "gone.jsonl"),
        (&SHORT.replace("prompts.jsonl", "${HOME}/x.jsonl"), 422, "HOME is not set"),
        (late.as_str(), 201, "id"),
    ] {
        let (found, body) = ask(&address, "POST", "/runs", flow).await;
        assert!(found == code && body.contains(says), "{found} {body}");
        assert_eq!(own(&body), None);
    }
    ask(&address, "GET", "/runs/1/events", "").await;
    let (_, figures) = ask(&address, "GET", "/runs/1/rounds", "").await;
    let figures: Value = serde_json::from_str(&figures).unwrap();
    assert_eq!(figures["status"], "failed", "{figures}");
    let error = figures["error"].as_str().unwrap();
    assert!(error.contains("few") && own(error).is_none(), "{error}");

    // A fault of the service's own is none of the client's business.
    std::fs::remove_dir_all(&runs).unwrap();
    std::fs::write(&runs, "in the way").unwrap();
    let (code, body) = ask(&address, "POST", "/runs", SHORT).await;
    assert_eq!((code, body.as_str()), (500, "{\"error\":\"the service could not do that\"}"));
}
