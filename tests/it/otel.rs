//! Spans that an OpenTelemetry collector gets (`--features otel`).

use std::sync::{Arc, Mutex};

use axum::Router;
use axum::body::Bytes;
use axum::routing::post;

use crate::support::{Case, tiny_flow};

#[tokio::test(flavor = "multi_thread")]
async fn a_collector_gets_the_spans_of_run_rounds_and_stages() {
    let got: Arc<Mutex<Vec<u8>>> = Arc::default();
    let kept = got.clone();
    let take = move |body: Bytes| async move { kept.lock().unwrap().extend(body) };
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    let router = Router::new().route("/v1/traces", post(take));
    tokio::spawn(async move { axum::serve(listener, router).await });
    tokio::task::block_in_place(|| {
        let case = Case::new(24, &tiny_flow(2, ""));
        let output = case.command(&["flow.toml"]).env("OTEL_EXPORTER_OTLP_ENDPOINT", &endpoint).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        // A collector that is not there costs the run nothing.
        let output =
            case.command(&["flow.toml"]).env("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9").output().unwrap();
        assert!(output.status.success(), "{output:?}");
    });
    let bytes = got.lock().unwrap().clone();
    let count = |text: &str| bytes.windows(text.len()).filter(|w| *w == text.as_bytes()).count();
    // In protobuf a text stands as it is, after its length.
    assert!(count("service.name") > 0 && count("flowrun") > 0);
    assert_eq!((count("\u{3}run"), count("\u{5}round"), count("\u{5}stage")), (1, 4, 12), "names and keys");
    // The span's name and its stage, and of the judge its kind.
    assert_eq!((count("rows_out"), count("\u{5}judge"), count("\u{5}align")), (12, 6, 4));
}
