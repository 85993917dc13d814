//! Whether the hub answers, asked once while a plan is made.
//!
//! A plan asks the hub for every model and every data set. A client of the hub repeats what fails, each time for some
//! seconds. So before the first question the host is asked for anything at all. If it doesn't answer, nothing more is
//! asked, and the cache serves. Downloads of a run are not a part of a plan: they wait as long as the client does.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::OnceCell;

/// Time to answer. A hub that needs more is told apart from one that refuses.
const LIMIT: Duration = Duration::from_millis(2500);

/// The host, unless `HF_ENDPOINT` names another.
const HOST: &str = "https://huggingface.co";

tokio::task_local! {
    static PLAN: Arc<HubAnswer>;
}

/// What is known of the hub in one plan.
#[derive(Debug, Default)]
pub struct HubAnswer {
    silence: OnceCell<Option<Silence>>,
}

/// Why the hub is not asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Silence {
    /// The host and what it did, with a remedy.
    pub message: String,
    /// Whether it let the time pass. It may be there all the same.
    pub slow: bool,
}

impl Silence {
    /// In a few words, for what is not there.
    pub const SHORT: &str = "the hub can't be reached";
}

impl HubAnswer {
    /// Makes a plan, or a part of one that is being made: then that one's answer is this one's.
    pub async fn within<T>(plan: impl Future<Output = T>) -> T {
        match Self::current() {
            Some(_) => plan.await,
            None => Arc::<Self>::default().scope(plan).await,
        }
    }

    /// Makes a part of the plan that this is the answer of.
    pub async fn scope<T>(self: Arc<Self>, part: impl Future<Output = T>) -> T {
        PLAN.scope(self, part).await
    }

    /// As [`Self::scope`] on a thread that may block.
    pub fn block<T>(plan: Option<Arc<Self>>, part: impl FnOnce() -> T) -> T {
        match plan {
            Some(plan) => PLAN.sync_scope(plan, part),
            None => part(),
        }
    }

    /// The answer of the plan that is being made.
    pub fn current() -> Option<Arc<Self>> {
        PLAN.try_with(Arc::clone).ok()
    }

    /// Asks the host, once. None where it answers, whatever it says, or where no plan is made.
    pub async fn ask() -> Option<Silence> {
        let plan = Self::current()?;
        let endpoint = std::env::var("HF_ENDPOINT").unwrap_or_else(|_| HOST.into());
        plan.silence.get_or_init(|| knock(&endpoint)).await.clone()
    }

    /// What [`Self::ask`] found; none before it.
    pub fn silence(&self) -> Option<Silence> {
        self.silence.get().cloned().flatten()
    }

    /// What [`Self::ask`] found in the plan that is being made.
    pub fn known() -> Option<Silence> {
        Self::current()?.silence()
    }
}

/// Any answer will do. What is wrong with the address itself, the hub's client tells.
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
        // Connections wait in its queue.
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
