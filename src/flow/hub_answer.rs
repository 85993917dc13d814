//! Availability of the hub, checked once for each plan.
//!
//! A plan sends requests to the hub for every model and every data set. The hub's client repeats failed requests, each
//! for some seconds. So one HEAD request is sent to the host first. If there is no answer, the plan sends no other
//! request and uses the cache. The downloads of a run are not part of a plan; they wait as long as the client does.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::OnceCell;

/// Time limit of the request.
const LIMIT: Duration = Duration::from_millis(2500);

/// The host if `HF_ENDPOINT` is not set.
const HOST: &str = "https://huggingface.co";

tokio::task_local! {
    static PLAN: Arc<HubAnswer>;
}

/// Result of the request to the hub in one plan.
#[derive(Debug, Default)]
pub struct HubAnswer {
    silence: OnceCell<Option<Silence>>,
}

/// The reason why no requests are sent to the hub.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Silence {
    /// The host and its failure, with a remedy.
    pub message: String,
    /// True if the request timed out. The hub may be available nevertheless.
    pub slow: bool,
}

impl Silence {
    /// Short message, for models and data sets that are not in the cache.
    pub const SHORT: &str = "the hub can't be reached";
}

impl HubAnswer {
    /// Runs `plan` with a new result, or with that of the plan around it.
    pub async fn within<T>(plan: impl Future<Output = T>) -> T {
        match Self::current() {
            Some(_) => plan.await,
            None => Arc::<Self>::default().scope(plan).await,
        }
    }

    /// Runs `part` with this result.
    pub async fn scope<T>(self: Arc<Self>, part: impl Future<Output = T>) -> T {
        PLAN.scope(self, part).await
    }

    /// Runs `part` with the result `plan`, on a thread that may block.
    pub fn block<T>(plan: Option<Arc<Self>>, part: impl FnOnce() -> T) -> T {
        match plan {
            Some(plan) => PLAN.sync_scope(plan, part),
            None => part(),
        }
    }

    /// The result of the current plan; `None` outside a plan.
    pub fn current() -> Option<Arc<Self>> {
        PLAN.try_with(Arc::clone).ok()
    }

    /// Sends the request if this plan has not sent it. Returns `None` if the hub answers, with any status, and outside
    /// a plan.
    pub async fn ask() -> Option<Silence> {
        let plan = Self::current()?;
        let endpoint = std::env::var("HF_ENDPOINT").unwrap_or_else(|_| HOST.into());
        plan.silence.get_or_init(|| knock(&endpoint)).await.clone()
    }

    /// The result of [`Self::ask`]; `None` before it.
    pub fn silence(&self) -> Option<Silence> {
        self.silence.get().cloned().flatten()
    }

    /// [`Self::silence`] of the current plan; `None` outside a plan.
    pub fn known() -> Option<Silence> {
        Self::current()?.silence()
    }
}

/// Sends a HEAD request; any answer counts. An error of the address itself is left to the hub's client.
async fn knock(endpoint: &str) -> Option<Silence> {
    let client = reqwest::Client::builder().timeout(LIMIT).redirect(reqwest::redirect::Policy::none()).build().ok()?;
    let error = client.head(endpoint).send().await.err().filter(|error| !error.is_builder())?;
    let slow = error.is_timeout();
    let cause = if slow { format!("no answer in {} s", LIMIT.as_secs_f64()) } else { innermost(&error) };
    Some(Silence {
        message: format!(
            "the hub at {endpoint} can't be reached ({cause}); check the network and HF_ENDPOINT, or name files and \
             directories that are here"
        ),
        slow,
    })
}

fn innermost(error: &dyn std::error::Error) -> String {
    let mut error = error;
    while let Some(source) = error.source() {
        error = source;
    }
    error.to_string()
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::TcpListener;
    use std::time::Instant;

    use super::*;

    #[tokio::test]
    async fn any_answer_is_one_and_silence_has_its_limit() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let server = std::thread::spawn(move || {
            let mut stream = listener.accept().unwrap().0;
            let read = stream.read(&mut [0; 1024]).unwrap();
            assert!(read > 0);
            stream.write_all(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n").unwrap();
            listener
        });
        assert_eq!(knock(&address).await, None);
        let listener = server.join().unwrap();
        // Connections wait in the listener's queue.
        let start = Instant::now();
        let silence = knock(&address).await.unwrap();
        assert!(silence.slow && silence.message.contains("no answer in 2.5 s"), "{silence:?}");
        assert!(start.elapsed() < LIMIT + Duration::from_millis(300));
        drop(listener);
        let silence = knock(&address).await.unwrap();
        assert!(!silence.slow && silence.message.contains("Connection refused"), "{silence:?}");
        assert_eq!(knock("no address").await, None);
    }

    #[tokio::test]
    async fn a_plan_within_a_plan_has_its_answer() {
        assert_eq!((HubAnswer::ask().await, HubAnswer::known()), (None, None));
        let silence = Silence { message: "asked before".into(), slow: false };
        let plan = Arc::new(HubAnswer { silence: OnceCell::new_with(Some(Some(silence.clone()))) });
        let inner = HubAnswer::within(async { (HubAnswer::ask().await, HubAnswer::known()) });
        let (asked, known) = plan.clone().scope(inner).await;
        assert_eq!((asked.as_ref(), known.as_ref()), (Some(&silence), Some(&silence)));
        let blocked =
            tokio::task::spawn_blocking(move || HubAnswer::block(Some(plan), HubAnswer::known)).await.unwrap();
        assert_eq!(blocked, Some(silence));
    }
}
