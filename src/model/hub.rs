//! Models on the Hugging Face hub, through its cache.
//!
//! A snapshot is pinned: what comes back is a directory and the commit it holds, so a run can name
//! what it used. Only configuration, tokenizer and safetensors are asked for; pickle files never are.
//! `HF_TOKEN`, `HF_HOME`, `HF_HUB_CACHE` and `HF_ENDPOINT` are honoured by the client,
//! `HF_HUB_OFFLINE` here. A download that broke off is continued by the next call.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use hf_hub::progress::{DownloadEvent, ProgressEvent, ProgressHandler};
use hf_hub::{HFClientBuilder, HFClientSync, HFError, HFRepositorySync};

use super::ModelError;
use super::safetensors::{INDEX, SINGLE, shards_of_index};
use crate::flow::hub::is_offline;
use crate::flow::{HubAnswer, HubLogin, Silence};

/// What says what a model is; some hundred kilobytes to some megabytes.
const DESCRIPTION: [&str; 7] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    INDEX,
];

/// A revision of a repository on the disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    pub dir: PathBuf,
    /// The commit's hash.
    pub revision: String,
}

/// A client of the hub.
pub struct Hub {
    client: HFClientSync,
    offline: bool,
    /// True if the hub is known not to answer.
    silent: bool,
}

impl Hub {
    /// A client as the environment says.
    ///
    /// # Errors
    /// When the client can't be set up, as with an endpoint that is no URL.
    pub fn from_env(login: HubLogin) -> Result<Self, ModelError> {
        Self::build(HFClientBuilder::new(), login, is_offline())
    }

    fn build(builder: HFClientBuilder, login: HubLogin, offline: bool) -> Result<Self, ModelError> {
        let builder = match login.token() {
            Some(token) => builder.token(token),
            None => builder,
        };
        let client = builder.build_sync();
        let client =
            client.map_err(|e| ModelError::Setting(format!("the hub's client can't start: {e}; check HF_ENDPOINT")))?;
        Ok(Self { client, offline, silent: HubAnswer::known().is_some() })
    }

    /// The files of a model at a revision (a branch, tag or commit; `main` by default), downloaded
    /// where the cache hasn't got them. `weights` is off where a configuration is enough.
    ///
    /// # Errors
    /// [`ModelError::Network`] when the hub can't be reached and the cache hasn't got the model,
    /// [`ModelError::Setting`] when the hub refuses.
    pub fn model(
        &self,
        owner: &str,
        name: &str,
        revision: Option<&str>,
        weights: bool,
    ) -> Result<Snapshot, ModelError> {
        let repository = self.client.model(owner, name);
        let fetch = |revision: &str, files: Vec<String>| self.fetch(&repository, revision, files);
        let revision = revision.unwrap_or("main");
        let dir = fetch(revision, DESCRIPTION.map(str::to_owned).to_vec())?;
        // The snapshot's directory is named after its commit.
        let commit = dir.file_name().and_then(|name| name.to_str()).unwrap_or(revision).to_owned();
        if weights {
            let index = dir.join(INDEX);
            let shards =
                if index.exists() { shards_of_index(&index)?.into_iter().collect() } else { vec![SINGLE.to_owned()] };
            if let Some(missing) = self.missing(&dir, &shards) {
                fetch(&commit, shards.clone())?;
                if self.missing(&dir, &shards).is_some() {
                    return Err(ModelError::Setting(format!(
                        "hf://{owner}/{name} has no {missing}; flowrun reads safetensors: convert the model, or \
                         download it to a directory"
                    )));
                }
            }
        }
        Ok(Snapshot { dir, revision: commit })
    }

    fn missing(&self, dir: &Path, files: &[String]) -> Option<String> {
        files.iter().find(|file| !dir.join(file).exists()).cloned()
    }

    fn fetch(
        &self,
        repository: &HFRepositorySync<hf_hub::repository::RepoTypeModel>,
        revision: &str,
        files: Vec<String>,
    ) -> Result<PathBuf, ModelError> {
        let download = |offline: bool| {
            repository
                .snapshot_download()
                .revision(revision)
                .allow_patterns(files.clone())
                .local_files_only(offline)
                .progress(Log::of(&repository.repo_path()))
                .send()
        };
        let place = format!("hf://{}@{revision}", repository.repo_path());
        match download(self.offline || self.silent) {
            Ok(dir) => Ok(dir),
            Err(HFError::LocalEntryNotFound { .. }) if self.silent => {
                Err(ModelError::Network(format!("{place} is not in the hub's cache, and {}", Silence::SHORT)))
            }
            // Without a network the cache serves, as with huggingface_hub.
            Err(error @ HFError::Request { .. }) => {
                download(true).map_err(|_| explain(&error, &repository.repo_path(), revision))
            }
            Err(error) => Err(explain(&error, &repository.repo_path(), revision)),
        }
    }
}

/// Tells how far a download is in the log, target `flowrun::download`: its size, then every tenth.
struct Log {
    repository: String,
    state: Mutex<Downloaded>,
}

#[derive(Default)]
struct Downloaded {
    total: u64,
    by_file: HashMap<String, u64>,
    tenths: u64,
}

impl Log {
    fn of(repository: &str) -> Self {
        Self { repository: repository.to_owned(), state: Mutex::default() }
    }

    fn tell(&self, state: &mut Downloaded, done: u64) {
        let tenths = (10 * done).checked_div(state.total).unwrap_or(10);
        if tenths > state.tenths {
            state.tenths = tenths;
            let (repository, mib) = (&self.repository, state.total >> 20);
            tracing::info!(target: "flowrun::download", "hf://{repository}: {}0 % of {mib} MiB", tenths.min(10));
        }
    }
}

impl ProgressHandler for Log {
    fn on_progress(&self, event: &ProgressEvent) {
        let ProgressEvent::Download(event) = event else { return };
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        match event {
            // Small files are there at once.
            DownloadEvent::Start { total_bytes, .. } if *total_bytes < 1 << 24 => {}
            DownloadEvent::Start { total_files, total_bytes } => {
                state.total = *total_bytes;
                let (repository, mib) = (&self.repository, total_bytes >> 20);
                tracing::info!(target: "flowrun::download", "hf://{repository}: {total_files} files, {mib} MiB");
            }
            _ if state.total == 0 => {}
            DownloadEvent::Progress { files } => {
                state.by_file.extend(files.iter().map(|file| (file.filename.clone(), file.bytes_completed)));
                let done = state.by_file.values().sum();
                self.tell(&mut state, done);
            }
            DownloadEvent::AggregateProgress { bytes_completed, .. } => self.tell(&mut state, *bytes_completed),
            DownloadEvent::Complete => {}
        }
    }
}

fn explain(error: &HFError, repository: &str, revision: &str) -> ModelError {
    let place = format!("hf://{repository}@{revision}");
    match error {
        HFError::LocalEntryNotFound { .. } => ModelError::Network(format!(
            "{place} is not in the hub's cache, and HF_HUB_OFFLINE is set; unset it, or name a directory that holds the model"
        )),
        HFError::RepoNotFound { .. } => ModelError::Setting(format!(
            "{place} does not exist, or is private; check the name, and set HF_TOKEN if it needs one"
        )),
        HFError::RevisionNotFound { .. } => {
            ModelError::Setting(format!("{place} has no such revision; name a branch, tag or commit after the @"))
        }
        HFError::AuthRequired { .. } | HFError::Forbidden { .. } => ModelError::Setting(format!(
            "{place} needs a permission; accept its terms on huggingface.co and set HF_TOKEN to a token that may read it"
        )),
        other => ModelError::Network(format!(
            "{place} can't be downloaded ({other}); check the network, or name a directory that holds the model"
        )),
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader, Write};
    use std::net::{TcpListener, TcpStream};
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

    use super::*;

    const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

    fn offline(cache: &Path) -> Hub {
        Hub::build(HFClientBuilder::new().cache_dir(cache), HubLogin::Own, true).unwrap()
    }

    #[test]
    fn the_cache_serves_without_a_network() {
        let cache = tempfile::tempdir().unwrap();
        let repository = cache.path().join("models--owner--name");
        let snapshot = repository.join("snapshots").join(COMMIT);
        std::fs::create_dir_all(&snapshot).unwrap();
        std::fs::create_dir_all(repository.join("refs")).unwrap();
        std::fs::write(repository.join("refs/main"), COMMIT).unwrap();
        let hub = offline(cache.path());
        let message = hub.model("owner", "name", None, true).unwrap_err().to_string();
        assert!(message.contains("hf://owner/name has no model.safetensors"), "{message}");
        std::fs::write(snapshot.join("model.safetensors"), "").unwrap();
        let expected = Snapshot { dir: snapshot, revision: COMMIT.into() };
        assert_eq!(hub.model("owner", "name", None, true).unwrap(), expected);
        assert_eq!(hub.model("owner", "name", Some(COMMIT), true).unwrap(), expected);
    }

    #[test]
    fn nobody_shows_no_token() {
        let (hub, address) = FakeHub::serve(repository(), false);
        let cache = tempfile::tempdir().unwrap();
        // As where the environment has one.
        let builder = HFClientBuilder::new().endpoint(&address).token("secret").cache_dir(cache.path());
        let nobody = Hub::build(builder, HubLogin::Anonymous, false).unwrap();
        assert!(nobody.model("owner", "name", None, true).is_err());
        assert_eq!(hub.tokens.load(Ordering::Relaxed), 0);
        assert!(!hub.asked.lock().unwrap().is_empty());
        online(&address, cache.path(), "secret").model("owner", "name", None, true).unwrap();
        assert!(hub.tokens.load(Ordering::Relaxed) > 0);
    }

    /// The part of the hub's interface that a download needs, for one repository.
    struct FakeHub {
        files: HashMap<String, Vec<u8>>,
        /// Breaks off the first answer with weights in its middle.
        breaks: AtomicBool,
        asked: Mutex<Vec<String>>,
        /// Requests that showed one, whatever it was.
        tokens: AtomicUsize,
    }

    impl FakeHub {
        fn serve(files: HashMap<String, Vec<u8>>, breaks: bool) -> (Arc<Self>, String) {
            let hub =
                Arc::new(Self { files, breaks: breaks.into(), asked: Mutex::default(), tokens: AtomicUsize::new(0) });
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let address = format!("http://{}", listener.local_addr().unwrap());
            let served = hub.clone();
            std::thread::spawn(move || {
                for stream in listener.incoming().flatten() {
                    let hub = served.clone();
                    std::thread::spawn(move || hub.answer(stream));
                }
            });
            (hub, address)
        }

        fn answer(&self, mut stream: TcpStream) -> Option<()> {
            let mut lines = BufReader::new(stream.try_clone().ok()?).lines().map_while(Result::ok);
            let request = lines.next()?;
            let headers: Vec<String> = lines.take_while(|line| !line.is_empty()).collect();
            self.asked.lock().unwrap().push(request.clone());
            let shown = headers.iter().any(|header| header.to_ascii_lowercase().starts_with("authorization:"));
            self.tokens.fetch_add(usize::from(shown), Ordering::Relaxed);
            let (method, path) = (request.split(' ').next()?, request.split(' ').nth(1)?);
            let token = headers.iter().any(|header| header.eq_ignore_ascii_case("authorization: Bearer secret"));
            let body = if path.starts_with("/api/models/owner/name/tree/") {
                let files = self.files.iter().map(
                    |(name, bytes)| serde_json::json!({"type": "file", "oid": name, "size": bytes.len(), "path": name}),
                );
                Some(serde_json::Value::Array(files.collect()).to_string().into_bytes())
            } else if path.starts_with("/api/models/owner/name") {
                Some(serde_json::json!({"sha": COMMIT, "id": "owner/name"}).to_string().into_bytes())
            } else {
                path.strip_prefix(&format!("/owner/name/resolve/{COMMIT}/"))
                    .and_then(|name| self.files.get(name).cloned())
            };
            let status = if !token {
                "401 Unauthorized"
            } else if body.is_some() {
                "200 OK"
            } else {
                "404 Not Found"
            };
            let body = body.filter(|_| token).unwrap_or_default();
            let head = format!(
                "HTTP/1.1 {status}\r\nContent-Length: {}\r\nETag: \"{}\"\r\nX-Repo-Commit: {COMMIT}\r\nConnection: close\r\n\r\n",
                body.len(),
                path.len()
            );
            stream.write_all(head.as_bytes()).ok()?;
            let weights = method == "GET" && path.ends_with(".safetensors");
            if weights && self.breaks.swap(false, Ordering::Relaxed) {
                return stream.write_all(&body[..body.len() / 2]).ok();
            }
            if method == "GET" { stream.write_all(&body).ok() } else { Some(()) }
        }
    }

    fn repository() -> HashMap<String, Vec<u8>> {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tiny-llama");
        let names = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"];
        let read = |name: &str| (name.to_owned(), std::fs::read(dir.join(name)).unwrap());
        let pickle = ("pytorch_model.bin".to_owned(), b"never".to_vec());
        names.map(read).into_iter().chain([pickle]).collect()
    }

    fn online(address: &str, cache: &Path, token: &str) -> Hub {
        let builder = HFClientBuilder::new().endpoint(address).token(token).cache_dir(cache);
        Hub::build(builder, HubLogin::Own, false).unwrap()
    }

    #[test]
    fn a_model_is_downloaded_pinned_and_kept() {
        let files = repository();
        let (hub, address) = FakeHub::serve(files.clone(), true);
        let cache = tempfile::tempdir().unwrap();
        // The connection breaks off in the middle of the weights: the client or the next call goes on.
        let first = online(&address, cache.path(), "secret").model("owner", "name", None, true);
        let found =
            first.or_else(|_| online(&address, cache.path(), "secret").model("owner", "name", None, true)).unwrap();
        assert!(!hub.breaks.load(Ordering::Relaxed), "nothing broke off");
        assert_eq!(found.revision, COMMIT);
        for name in ["config.json", "model.safetensors", "tokenizer.json"] {
            assert_eq!(std::fs::read(found.dir.join(name)).unwrap(), files[name], "{name}");
        }
        assert!(hub.asked.lock().unwrap().iter().all(|request| !request.contains(".bin")));
        // Now the cache serves, with the network gone or not asked.
        assert_eq!(
            online("http://127.0.0.1:9", cache.path(), "secret").model("owner", "name", Some(COMMIT), true).unwrap(),
            found
        );
        assert_eq!(offline(cache.path()).model("owner", "name", None, true).unwrap(), found);
    }

    #[test]
    fn refusals_of_the_hub_say_what_to_do() {
        let (_hub, address) = FakeHub::serve(repository(), false);
        let cache = tempfile::tempdir().unwrap();
        let message =
            online(&address, cache.path(), "wrong").model("owner", "name", None, true).unwrap_err().to_string();
        assert!(message.contains("hf://owner/name@main") && message.contains("HF_TOKEN"), "{message}");
        let message =
            online(&address, cache.path(), "secret").model("owner", "other", None, true).unwrap_err().to_string();
        assert!(message.contains("hf://owner/other@main"), "{message}");
    }

    #[test]
    fn what_is_not_cached_says_so() {
        let cache = tempfile::tempdir().unwrap();
        let message = offline(cache.path()).model("owner", "name", Some("v1"), true).unwrap_err().to_string();
        assert!(
            message.contains("hf://owner/name@v1 is not in the hub's cache, and HF_HUB_OFFLINE is set"),
            "{message}"
        );
    }
}
