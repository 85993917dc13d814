//! A service that runs the flows it is sent.
//!
//! `cargo run --example service -- 127.0.0.1:8080 runs data`, then
//!
//! ```text
//! curl --data-binary @flow.toml localhost:8080/runs           {"id":"1"}
//! curl localhost:8080/runs/1                                  what it does now
//! curl -N localhost:8080/runs/1/events                        events from the first on (SSE)
//! curl -X POST localhost:8080/runs/1/pause                    also resume, cancel
//! curl localhost:8080/runs/1/rounds                           figures, as far as it is
//! curl localhost:8080/runs/1/rounds/1/judge                   a stage's rows as JSON lines, once it has ended the round
//! ```
//!
//! Flows may read below the data directory and fetch from the hub, and nothing else. A run is a folder, so what earlier
//! starts of the service left can be asked for too; a run that the end of the service cut short stays as it was.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::io::{self, ErrorKind};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};

use axum::extract::{Path, State};
use axum::http::{StatusCode, header};
use axum::response::sse::{Event, Sse};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use flowrun::arrow::json::LineDelimitedWriter;
use flowrun::embed::{Engine, Policy, RunOptions};
use flowrun::engine::error::for_clients;
use flowrun::engine::{Domain, Quota, RunError, RunHandle, runs};
use flowrun::flow::{Flow, FlowError};
use futures::{Stream, StreamExt};
use serde_json::{Value, json};

/// What the service knows: an engine, where things are, and the runs it started.
pub struct Service {
    engine: Engine,
    runs: PathBuf,
    data: PathBuf,
    started: Mutex<BTreeMap<u64, RunHandle>>,
}

impl Service {
    pub fn new(runs: PathBuf, data: PathBuf) -> Self {
        let policy = Policy::nothing().read(&data).host("huggingface.co");
        let policy = policy.rows(10_000_000).tokens(100_000_000).bytes(10 << 30).seconds(86_400).runs(8);
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

    fn started(&self) -> MutexGuard<'_, BTreeMap<u64, RunHandle>> {
        self.started.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// A run of this process or of an earlier one.
    fn known(&self, id: u64) -> Result<Known, Refusal> {
        if let Some(run) = self.started().get(&id) {
            return Ok(Known::Started(run.clone()));
        }
        let dir = self.dir(id);
        match runs::plan_of(&dir) {
            Ok(_) => Ok(Known::Left(dir)),
            Err(_) => Err(Refusal(StatusCode::NOT_FOUND, format!("there is no run {id}"))),
        }
    }

    fn run(&self, id: u64) -> Result<RunHandle, Refusal> {
        match self.known(id)? {
            Known::Started(run) => Ok(run),
            Known::Left(_) => {
                Err(Refusal(StatusCode::GONE, format!("run {id} ended with an earlier start of the service")))
            }
        }
    }

    fn dir(&self, id: u64) -> PathBuf {
        self.runs.join(id.to_string())
    }

    /// An id that no other request has and none had: whoever makes the directory has it.
    fn new_id(&self) -> io::Result<u64> {
        std::fs::create_dir_all(&self.runs)?;
        let mut id = 1;
        loop {
            match std::fs::create_dir(self.dir(id)) {
                Err(error) if error.kind() == ErrorKind::AlreadyExists => id += 1,
                made => return made.map(|()| id),
            }
        }
    }

    /// The id of a run that has been started. What is wrong with a flow is found before its directory is written to, so
    /// one that stayed empty is given back.
    async fn start(&self, flow: &Flow) -> Result<u64, Refusal> {
        let id = self.new_id()?;
        let started = self.engine.start(flow, RunOptions::new(self.dir(id))).await;
        let run = started.inspect_err(|_| drop(std::fs::remove_dir(self.dir(id))))?;
        self.started().insert(id, run);
        Ok(id)
    }
}

/// A run that is known.
enum Known {
    Started(RunHandle),
    /// The runs that an earlier process left.
    Left(PathBuf),
}

impl Known {
    fn dir(&self) -> PathBuf {
        match self {
            Self::Started(run) => run.dir(),
            Self::Left(dir) => dir.clone(),
        }
    }
}

/// An answer that is not what was asked for.
struct Refusal(StatusCode, String);

impl Refusal {
    /// A fault of the service is told to whoever keeps it, and of no use to a client.
    fn own(error: &dyn std::fmt::Display) -> Self {
        eprintln!("{error}");
        Self(StatusCode::INTERNAL_SERVER_ERROR, "the service could not do that".into())
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        (self.0, Json(json!({ "error": self.1 }))).into_response()
    }
}

impl From<FlowError> for Refusal {
    fn from(error: FlowError) -> Self {
        RunError::from(error).into()
    }
}

impl From<io::Error> for Refusal {
    fn from(error: io::Error) -> Self {
        Self::own(&error)
    }
}

impl From<RunError> for Refusal {
    fn from(error: RunError) -> Self {
        match error.domain {
            Domain::User => Self(StatusCode::UNPROCESSABLE_ENTITY, error.for_clients()),
            Domain::Quota(Quota::Runs) => Self(StatusCode::TOO_MANY_REQUESTS, error.for_clients()),
            _ => Self::own(&error),
        }
    }
}

type Shared = State<Arc<Service>>;

/// Starts the flow in the body. A client that goes away meanwhile leaves the run to itself.
async fn submit(State(service): Shared, text: String) -> Result<impl IntoResponse, Refusal> {
    let flow = service.engine.read(&text, &service.data)?;
    let started = tokio::spawn(async move { service.start(&flow).await }).await;
    let id = started.map_err(|e| Refusal::own(&e))??;
    Ok((StatusCode::CREATED, Json(json!({ "id": id.to_string() }))))
}

async fn status(State(service): Shared, Path(id): Path<u64>) -> Result<impl IntoResponse, Refusal> {
    match service.known(id)? {
        Known::Started(run) => Ok(Json(run.status())),
        Known::Left(dir) => {
            let left = runs::status(&dir)?.map(|(status, _)| status);
            let mut status = left.ok_or_else(|| Refusal(StatusCode::GONE, format!("run {id} never began")))?;
            status.ended = true;
            Ok(Json(status))
        }
    }
}

async fn events(
    State(service): Shared,
    Path(id): Path<u64>,
) -> Result<Sse<impl Stream<Item = Result<Event, Infallible>>>, Refusal> {
    let events = service.run(id)?.events().stream();
    Ok(Sse::new(events.map(|event| Ok(Event::default().json_data(event).unwrap_or_default()))))
}

async fn order(State(service): Shared, Path((id, order)): Path<(u64, String)>) -> Result<impl IntoResponse, Refusal> {
    let run = service.run(id)?;
    match order.as_str() {
        "pause" => run.pause(),
        "resume" => run.resume(),
        "cancel" => run.cancel(),
        _ => return Err(Refusal(StatusCode::NOT_FOUND, format!("{order} is not pause, resume or cancel"))),
    }
    Ok(StatusCode::NO_CONTENT)
}

/// The figures of all rounds that have begun.
async fn rounds(State(service): Shared, Path(id): Path<u64>) -> Result<impl IntoResponse, Refusal> {
    let mut figures = match service.known(id)? {
        Known::Started(run) => run.figures(),
        Known::Left(dir) => runs::figures(&dir)?,
    };
    if let Some(Value::String(error)) = figures.get_mut("error") {
        *error = for_clients(error);
    }
    Ok(Json(figures))
}

async fn rows(
    State(service): Shared,
    Path((id, round, stage)): Path<(u64, u32, String)>,
) -> Result<impl IntoResponse, Refusal> {
    let dir = service.known(id)?.dir();
    let (stage, port) = stage.split_once('.').unwrap_or((&stage, ""));
    let table = runs::table(&dir, round, stage, port)?.ok_or_else(|| {
        Refusal(StatusCode::NOT_FOUND, format!("run {id} has no rows of `{stage}` in round {round} yet"))
    })?;
    let mut lines = LineDelimitedWriter::new(Vec::new());
    let written = lines.write_batches(&table.iter().collect::<Vec<_>>()).and_then(|()| lines.finish());
    written.map_err(|e| Refusal::own(&e))?;
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
