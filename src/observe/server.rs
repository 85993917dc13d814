//! What a run tells over HTTP: `/metrics` for Prometheus, `/status` as JSON for `flowrun top` and scripts. Figures only,
//! no prompt and no answer.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use metrics_exporter_prometheus::PrometheusHandle;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;

use super::RunStatus;
use super::prometheus::render;

const UPKEEP_EVERY: Duration = Duration::from_secs(5);
const REQUEST_TIME: Duration = Duration::from_secs(10);
const REQUEST_BYTES: usize = 16 << 10;
/// Requests that are answered at a time; others wait. Sockets must not use up the files that a run needs.
const CONNECTIONS: usize = 32;

/// An address that is taken. Whoever asks before [`Server::serve`] waits.
pub struct Server {
    listener: TcpListener,
}

struct Pages {
    metrics: PrometheusHandle,
    status: Box<dyn Fn() -> RunStatus + Send + Sync>,
}

impl Server {
    /// Nothing but the address keeps others out: the default of a caller should be loopback.
    ///
    /// # Errors
    /// The address can't be taken.
    pub async fn bind(address: SocketAddr) -> std::io::Result<Self> {
        Ok(Self { listener: TcpListener::bind(address).await? })
    }

    /// Where it is; of port 0, the port that it became.
    ///
    /// # Errors
    /// The system's.
    pub fn address(&self) -> std::io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Answers until the runtime ends.
    pub fn serve(self, metrics: PrometheusHandle, status: impl Fn() -> RunStatus + Send + Sync + 'static) {
        let upkeep = metrics.clone();
        tokio::spawn(async move {
            loop {
                tokio::time::sleep(UPKEEP_EVERY).await;
                upkeep.run_upkeep();
            }
        });
        let pages = Arc::new(Pages { metrics, status: Box::new(status) });
        let room = Arc::new(Semaphore::new(CONNECTIONS));
        tokio::spawn(async move {
            loop {
                // It is never closed.
                let Ok(permit) = room.clone().acquire_owned().await else { return };
                match self.listener.accept().await {
                    Ok((stream, _)) => {
                        let pages = pages.clone();
                        tokio::spawn(async move {
                            answer(stream, pages).await;
                            drop(permit);
                        });
                    }
                    Err(error) => {
                        tracing::warn!(%error, "a request could not be accepted");
                        tokio::time::sleep(Duration::from_millis(100)).await;
                    }
                }
            }
        });
    }
}

impl Pages {
    /// Status line, type and text of a page.
    fn page(&self, path: &str) -> (&'static str, &'static str, String) {
        match path {
            "/metrics" => ("200 OK", "text/plain; version=0.0.4; charset=utf-8", render(&self.metrics)),
            "/status" => match serde_json::to_string(&(self.status)()) {
                Ok(text) => ("200 OK", "application/json", text),
                Err(error) => ("500 Internal Server Error", "text/plain; charset=utf-8", error.to_string()),
            },
            _ => ("404 Not Found", "text/plain; charset=utf-8", "there are /metrics and /status\n".into()),
        }
    }
}

/// One request a connection; the recorder's own listener does not tell the port that it bound.
async fn answer(mut stream: TcpStream, pages: Arc<Pages>) {
    let Ok(Some(target)) = tokio::time::timeout(REQUEST_TIME, request_target(&mut stream)).await else {
        return;
    };
    let (status, kind, body) = match &target {
        Some(target) => pages.page(target.split('?').next().unwrap_or_default()),
        None => ("405 Method Not Allowed", "text/plain; charset=utf-8", "only GET is answered\n".into()),
    };
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        body.len()
    );
    let told = async {
        stream.write_all(head.as_bytes()).await?;
        stream.write_all(body.as_bytes()).await?;
        stream.shutdown().await
    };
    // A reader that hangs up, or that does not read, has no one to tell.
    let _ = tokio::time::timeout(REQUEST_TIME, told).await;
}

/// The target of a GET, `Some(None)` for another method; `None` where it is no request.
async fn request_target(stream: &mut TcpStream) -> Option<Option<String>> {
    let mut bytes = Vec::new();
    while !bytes.windows(4).any(|w| w == b"\r\n\r\n") {
        if bytes.len() > REQUEST_BYTES || stream.read_buf(&mut bytes).await.ok()? == 0 {
            return None;
        }
    }
    let text = String::from_utf8_lossy(&bytes);
    let target = text.strip_prefix("GET ").map(|rest| rest.split_whitespace().next().map(str::to_owned));
    target.map_or(Some(None), |target| target.map(Some))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::observe::prometheus::recorder;

    async fn get(address: SocketAddr, path: &str) -> String {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(format!("{path} HTTP/1.1\r\nHost: x\r\n\r\n").as_bytes()).await.unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).await.unwrap();
        text
    }

    fn status() -> RunStatus {
        let (stages, edges, finished) = Default::default();
        let (flow, remaining_seconds) = ("loop".to_owned(), None);
        RunStatus { flow, round: 2, rounds: 3, seconds: 1.5, remaining_seconds, finished, stages, edges, ended: false }
    }

    #[tokio::test]
    async fn metrics_and_status_are_served_and_nothing_else() {
        let (metrics, handle) = recorder("loop").unwrap();
        metrics.counter("flowrun_stage_rows_in_total", &[("stage", "judge")]).increment(3);
        let server = Server::bind("127.0.0.1:0".parse().unwrap()).await.unwrap();
        let address = server.address().unwrap();
        server.serve(handle, status);
        let text = get(address, "GET /metrics").await;
        assert!(text.starts_with("HTTP/1.1 200 OK"), "{text}");
        assert!(text.contains("flowrun_stage_rows_in_total{flow=\"loop\",stage=\"judge\"} 3"), "{text}");
        let text = get(address, "GET /status?pretty").await;
        let told: RunStatus = serde_json::from_str(text.split_once("\r\n\r\n").unwrap().1).unwrap();
        assert_eq!((told.flow.as_str(), told.round, told.rounds), ("loop", 2, 3));
        assert!(get(address, "GET /").await.starts_with("HTTP/1.1 404"));
        assert!(get(address, "POST /metrics").await.starts_with("HTTP/1.1 405"));
    }

    #[tokio::test]
    async fn silent_connections_are_few_and_do_not_last() {
        let (_, handle) = recorder("loop").unwrap();
        let server = Server::bind("127.0.0.1:0".parse().unwrap()).await.unwrap();
        let address = server.address().unwrap();
        server.serve(handle, status);
        let silent: Vec<_> = futures::future::join_all((0..CONNECTIONS).map(|_| TcpStream::connect(address))).await;
        let asked = tokio::time::timeout(Duration::from_millis(300), get(address, "GET /metrics")).await;
        assert!(asked.is_err(), "it waits for room");
        drop(silent);
        assert!(get(address, "GET /metrics").await.starts_with("HTTP/1.1 200"));
    }
}
