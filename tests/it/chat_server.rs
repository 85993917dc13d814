//! A chat server on this machine that says what a test wants it to say.

use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::Router;
use axum::body::Bytes;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use serde_json::{Value, json};
use tokio::net::TcpListener;

/// What the server says to a request.
pub struct Said {
    pub after: Duration,
    pub status: u16,
    pub headers: Vec<(header::HeaderName, String)>,
    pub body: Vec<u8>,
}

impl Said {
    pub fn new(status: u16, body: impl Into<Vec<u8>>) -> Self {
        Self { after: Duration::ZERO, status, headers: Vec::new(), body: body.into() }
    }

    pub fn error(status: u16, message: &str) -> Self {
        Self::new(status, json!({ "error": { "message": message } }).to_string())
    }

    pub fn text(text: &str) -> Self {
        Self::texts(&[text])
    }

    /// An answer that reached the limit of tokens.
    pub fn cut(text: &str) -> Self {
        let choice = json!({ "message": { "content": text }, "finish_reason": "length" });
        Self::new(200, json!({ "choices": [choice] }).to_string())
    }

    pub fn texts(texts: &[&str]) -> Self {
        let choice = |(index, text): (usize, &&str)| json!({ "index": index, "message": { "role": "assistant", "content": text }, "finish_reason": "stop" });
        let choices: Vec<Value> = texts.iter().enumerate().map(choice).collect();
        let usage = json!({ "prompt_tokens": 11, "completion_tokens": 3 * texts.len(), "total_tokens": 0 });
        Self::new(200, json!({ "id": "x", "choices": choices, "usage": usage }).to_string())
    }
}

pub type Script = dyn Fn(usize, &Value) -> Said + Send + Sync;

#[derive(Clone)]
pub struct Server {
    pub address: String,
    /// Every request's body, with its key under `authorization` and its header X-Team under `team`.
    pub asked: Arc<Mutex<Vec<Value>>>,
    pub in_flight: Arc<AtomicUsize>,
    pub most_in_flight: Arc<AtomicUsize>,
    pub script: Arc<Script>,
}

impl Server {
    /// Answers the requests, which are counted from 0, as `script` says.
    pub async fn start(script: impl Fn(usize, &Value) -> Said + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let server = Self {
            address: format!("http://{}/v1", listener.local_addr().unwrap()),
            asked: Arc::default(),
            in_flight: Arc::default(),
            most_in_flight: Arc::default(),
            script: Arc::new(script),
        };
        let router = Router::new().route("/v1/chat/completions", post(answer)).with_state(server.clone());
        tokio::spawn(async move { axum::serve(listener, router).await });
        server
    }

    pub fn asked(&self) -> Vec<Value> {
        self.asked.lock().unwrap().clone()
    }
}

async fn answer(State(server): State<Server>, headers: HeaderMap, body: Bytes) -> Response {
    let now = server.in_flight.fetch_add(1, SeqCst) + 1;
    server.most_in_flight.fetch_max(now, SeqCst);
    let mut request: Value = serde_json::from_slice(&body).unwrap();
    request["authorization"] = headers.get(header::AUTHORIZATION).map(|key| key.to_str().unwrap()).into();
    if let Some(team) = headers.get("x-team") {
        request["team"] = team.to_str().unwrap().into();
    }
    let number = {
        let mut asked = server.asked.lock().unwrap();
        asked.push(request.clone());
        asked.len() - 1
    };
    let said = (server.script)(number, &request);
    tokio::time::sleep(said.after).await;
    server.in_flight.fetch_sub(1, SeqCst);
    let mut response = (StatusCode::from_u16(said.status).unwrap(), said.body).into_response();
    response.headers_mut().extend(said.headers.into_iter().map(|(name, value)| (name, value.parse().unwrap())));
    response
}
