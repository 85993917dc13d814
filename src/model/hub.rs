//! Models on the Hugging Face hub, through its cache.
//!
//! A snapshot is pinned: what comes back is a directory and the commit it holds, so a run can name
//! what it used. Only configuration, tokenizer and safetensors are asked for; pickle files never are.
//! `HF_TOKEN`, `HF_HOME`, `HF_HUB_CACHE` and `HF_ENDPOINT` are honoured by the client,
//! `HF_HUB_OFFLINE` here. A download that broke off is continued by the next call.

use std::path::{Path, PathBuf};

use hf_hub::{HFClientBuilder, HFClientSync, HFError, HFRepositorySync};

use super::ModelError;
use super::safetensors::{INDEX, SINGLE, shards_of_index};

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
}

impl Hub {
    /// A client as the environment says.
    ///
    /// # Errors
    /// When the client can't be set up, as with an endpoint that is no URL.
    pub fn from_env() -> Result<Self, ModelError> {
        let offline = std::env::var("HF_HUB_OFFLINE").is_ok_and(|value| is_on(&value));
        Self::build(HFClientBuilder::new(), offline)
    }

    fn build(builder: HFClientBuilder, offline: bool) -> Result<Self, ModelError> {
        let client = builder.build_sync();
        let client =
            client.map_err(|e| ModelError::Setting(format!("the hub's client can't start: {e}; check HF_ENDPOINT")))?;
        Ok(Self { client, offline })
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
                .send()
        };
        match download(self.offline) {
            Ok(dir) => Ok(dir),
            // Without a network the cache serves, as with huggingface_hub.
            Err(error @ HFError::Request { .. }) => {
                download(true).map_err(|_| explain(&error, &repository.repo_path(), revision))
            }
            Err(error) => Err(explain(&error, &repository.repo_path(), revision)),
        }
    }
}

/// As huggingface_hub reads its switches.
fn is_on(value: &str) -> bool {
    matches!(value.to_ascii_lowercase().as_str(), "1" | "on" | "yes" | "true")
}

fn explain(error: &HFError, repository: &str, revision: &str) -> ModelError {
    let place = format!("hf://{repository}@{revision}");
    match error {
        HFError::LocalEntryNotFound { .. } => ModelError::Setting(format!(
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
    use super::*;

    const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

    fn offline(cache: &Path) -> Hub {
        Hub::build(HFClientBuilder::new().cache_dir(cache), true).unwrap()
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
    fn what_is_not_cached_says_so() {
        let cache = tempfile::tempdir().unwrap();
        let message = offline(cache.path()).model("owner", "name", Some("v1"), true).unwrap_err().to_string();
        assert!(
            message.contains("hf://owner/name@v1 is not in the hub's cache, and HF_HUB_OFFLINE is set"),
            "{message}"
        );
    }
}
