//! The example of a service: a flow is sent over HTTP, its events stream back, its rows are there.

use std::path::Path;

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

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flow_is_sent_followed_and_read() {
    let dir = TempDir::new().unwrap();
    let data = dir.path().join("data");
    std::fs::create_dir(&data).unwrap();
    let lines: String = (0..8).map(|i| format!("{{\"prompt\": \"number {i}\"}}\n")).collect();
    std::fs::write(data.join("prompts.jsonl"), lines).unwrap();
    // A service serves what lies in its data directory; a model may be a link to elsewhere only where
    // that is allowed too, so it is copied.
    let model = data.join("model");
    std::fs::create_dir(&model).unwrap();
    for file in std::fs::read_dir(tiny_model()).unwrap().flatten().filter(|f| f.path().is_file()) {
        std::fs::copy(file.path(), model.join(file.file_name())).unwrap();
    }
    let flow = tiny_flow(1, "").replace(&format!("{:?}", tiny_model()), "\"model\"");
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
