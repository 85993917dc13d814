//! A service that runs the flows it is sent.
//!
//! `cargo run --example service -- 127.0.0.1:8080 runs data`, then
//!
//! ```text
//! curl --data-binary @flow.toml localhost:8080/runs           {"id":"1"}
//! curl localhost:8080/runs/1                                  what it does now
//! curl -N localhost:8080/runs/1/events                        events from the first on (SSE)
//! curl -X POST localhost:8080/runs/1/pause                    also resume, cancel
//! curl localhost:8080/runs/1/rounds                           figures, once it has ended
//! curl localhost:8080/runs/1/rounds/1/judge                   a stage's rows as JSON lines
//! ```
//!
//! Flows may read below the data directory and fetch from the hub, and nothing else.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use axum::extract::{Path, State};
use axum::http::{StatusCode, header};
use axum::response::sse::{Event, Sse};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use flowrun::arrow::json::LineDelimitedWriter;
use flowrun::embed::{Engine, Policy, RunOptions};
use flowrun::engine::{Domain, RunError, RunHandle};
use futures::{Stream, StreamExt};
use serde_json::json;

/// What the service knows: an engine, where things are, and the runs it started.
pub struct Service {
    engine: Engine,
    runs: PathBuf,
    data: PathBuf,
    started: Mutex<BTreeMap<String, RunHandle>>,
}

impl Service {
    pub fn new(runs: PathBuf, data: PathBuf) -> Self {
        let policy = Policy::nothing().read(&data).host("huggingface.co");
        Self { engine: Engine::new().with_policy(policy), runs, data, started: Mutex::default() }
    }

    pub fn router(self) -> Router {
        Router::new()
            .route("/runs", post(submit))
            .route("/runs/{id}", get(status))
            .route("/runs/{id}/events", get(events))
            .route("/runs/{id}/rounds", get(rounds))
            .route("/runs/{id}/rounds/{round}/{stage}", get(rows))
            .route("/runs/{id}/{order}", post(order))
            .with_state(Arc::new(self))
    }

    fn run(&self, id: &str) -> Result<RunHandle, Refusal> {
        let started = self.started.lock().unwrap_or_else(|e| e.into_inner());
        started.get(id).cloned().ok_or_else(|| Refusal(StatusCode::NOT_FOUND, format!("there is no run {id}")))
    }
}

/// An answer that is not what was asked for.
struct Refusal(StatusCode, String);

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        (self.0, Json(json!({ "error": self.1 }))).into_response()
    }
}

impl From<RunError> for Refusal {
    fn from(error: RunError) -> Self {
        let code = match error.domain {
            Domain::User => StatusCode::UNPROCESSABLE_ENTITY,
            _ => StatusCode::INTERNAL_SERVER_ERROR,
        };
        Self(code, error.to_string())
    }
}

type Known = State<Arc<Service>>;

/// Starts the flow in the body.
async fn submit(State(service): Known, text: String) -> Result<impl IntoResponse, Refusal> {
    let flow = service.engine.read(&text, &service.data).map_err(RunError::from)?;
    let id = {
        let started = service.started.lock().unwrap_or_else(|e| e.into_inner());
        (started.len() + 1).to_string()
    };
    let run = service.engine.start(&flow, RunOptions::new(service.runs.join(&id))).await?;
    service.started.lock().unwrap_or_else(|e| e.into_inner()).insert(id.clone(), run);
    Ok((StatusCode::CREATED, Json(json!({ "id": id }))))
}

async fn status(State(service): Known, Path(id): Path<String>) -> Result<impl IntoResponse, Refusal> {
    Ok(Json(service.run(&id)?.status()))
}

async fn events(
    State(service): Known,
    Path(id): Path<String>,
) -> Result<Sse<impl Stream<Item = Result<Event, Infallible>>>, Refusal> {
    let events = service.run(&id)?.events().stream();
    Ok(Sse::new(events.map(|event| Ok(Event::default().json_data(event).unwrap_or_default()))))
}

async fn order(State(service): Known, Path((id, order)): Path<(String, String)>) -> Result<impl IntoResponse, Refusal> {
    let run = service.run(&id)?;
    match order.as_str() {
        "pause" => run.pause(),
        "resume" => run.resume(),
        "cancel" => run.cancel(),
        _ => return Err(Refusal(StatusCode::NOT_FOUND, format!("{order} is not pause, resume or cancel"))),
    }
    Ok(StatusCode::NO_CONTENT)
}

/// The figures of all rounds; waits for the end of the run.
async fn rounds(State(service): Known, Path(id): Path<String>) -> Result<impl IntoResponse, Refusal> {
    Ok(Json(service.run(&id)?.wait().await.json))
}

async fn rows(
    State(service): Known,
    Path((id, round, stage)): Path<(String, u32, String)>,
) -> Result<impl IntoResponse, Refusal> {
    let (stage, port) = stage.split_once('.').unwrap_or((&stage, ""));
    let table = service.run(&id)?.wait().await.table(round, stage, port)?;
    let mut lines = LineDelimitedWriter::new(Vec::new());
    let written = lines.write_batches(&table.iter().collect::<Vec<_>>()).and_then(|()| lines.finish());
    written.map_err(|e| Refusal(StatusCode::INTERNAL_SERVER_ERROR, e.to_string()))?;
    Ok(([(header::CONTENT_TYPE, "application/x-ndjson")], lines.into_inner()))
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let mut next = |default: &str| arguments.next().unwrap_or_else(|| default.into());
    let listener = tokio::net::TcpListener::bind(next("127.0.0.1:8080")).await?;
    let service = Service::new(next("runs").into(), next("data").into());
    println!("http://{}", listener.local_addr()?);
    Ok(axum::serve(listener, service.router()).await?)
}
