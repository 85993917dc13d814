//! Data sets of the Hugging Face hub, through its cache.
//!
//! A name is pinned to a commit before a file is read, so that two files are never of two
//! revisions and the fingerprint says what was read.

use std::path::{Path, PathBuf};

use hf_hub::repository::RepoTypeDataset;
use hf_hub::{HFClientBuilder, HFError, HFRepository};

use super::DataError;
use super::error::Fault;
use super::files::{self, Format};
use super::splits::{self, Wanted};
use crate::flow::hub::{is_name, is_offline};
use crate::flow::{HubAnswer, HubLogin, Silence};

/// Where the hub keeps its own Parquet copy of a data set.
const PARQUET_REVISION: &str = "refs/convert/parquet";

/// `hf://owner/name[@revision]`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HubName {
    pub owner: String,
    pub name: String,
    pub revision: String,
}

/// Files of a data set at one commit.
#[derive(Debug, Clone)]
pub struct Snapshot {
    pub files: Vec<PathBuf>,
    pub format: Format,
    /// Files of a data format that are not read.
    pub beside: Vec<String>,
    /// Commit that the files are of.
    pub revision: String,
}

impl HubName {
    /// None where `text` isn't an `hf://` address; an error where it is a wrong one.
    pub fn parse(text: &str) -> Option<Result<Self, DataError>> {
        let rest = text.strip_prefix("hf://")?;
        let rest = rest.strip_prefix("datasets/").unwrap_or(rest);
        let (id, revision) = rest.split_once('@').unwrap_or((rest, "main"));
        Some(match id.split('/').collect::<Vec<_>>().as_slice() {
            [owner, name] if is_name(owner) && is_name(name) && is_name(revision) => {
                Ok(Self { owner: (*owner).into(), name: (*name).into(), revision: revision.into() })
            }
            _ => Err(DataError::user(format!("{text}: a hub data set is hf://owner/name or hf://owner/name@revision"))),
        })
    }

    fn id(&self) -> String {
        format!("{}/{}", self.owner, self.name)
    }

    /// The wanted files, from the network or, offline, from the cache.
    pub async fn snapshot(&self, login: HubLogin, wanted: Wanted<'_>) -> Result<Snapshot, DataError> {
        let builder = HFClientBuilder::new();
        let builder = match login.token() {
            Some(token) => builder.token(token),
            None => builder,
        };
        let client = builder.build().map_err(|e| DataError::external(format!("hf://{}: {e}", self.id())))?;
        let cache = client.cache_dir().join(format!("datasets--{}--{}", self.owner, self.name));
        if is_offline() {
            let hint = "HF_HUB_OFFLINE is set; unset it, or fetch the data set where there is a network";
            return self.cached(&cache, wanted).unwrap_or_else(|| {
                Err(DataError::offline(format!(
                    "hf://{} at {} is not in the cache {}: {hint}",
                    self.id(),
                    self.revision,
                    cache.display()
                )))
            });
        }
        if HubAnswer::ask().await.is_some() {
            return self.cached(&cache, wanted).unwrap_or_else(|| {
                Err(DataError::external(format!("hf://{} is not in the cache, and {}", self.id(), Silence::SHORT)))
            });
        }
        let repository = client.dataset(&self.owner, &self.name);
        match self.online(&repository, &cache, wanted).await {
            Err(e) if e.fault == Fault::External => self.cached(&cache, wanted).unwrap_or(Err(e)),
            done => done,
        }
    }

    async fn online(
        &self,
        repository: &HFRepository<RepoTypeDataset>,
        cache: &Path,
        wanted: Wanted<'_>,
    ) -> Result<Snapshot, DataError> {
        let (commit, names) = self.listing(repository, &self.revision).await?;
        let readme = match names.iter().any(|name| name == "README.md") {
            true => self.text(repository, "README.md", &commit).await?,
            false => None,
        };
        let (revision, commit, chosen) = match splits::choose(names, readme.as_deref(), wanted) {
            Ok(chosen) => (self.revision.as_str(), commit, chosen),
            Err(reason) => match self.listing(repository, PARQUET_REVISION).await {
                Ok((commit, names)) => {
                    let chosen = splits::choose(names, None, wanted);
                    (PARQUET_REVISION, commit, chosen.map_err(|_| reason.at(format!("hf://{}", self.id())))?)
                }
                Err(_) => return Err(reason.at(format!("hf://{}", self.id()))),
            },
        };
        let names = chosen.names;
        let mut paths = Vec::with_capacity(names.len());
        for name in names {
            let download = repository.download_file().filename(name).revision(commit.clone());
            paths.push(download.send().await.map_err(|e| self.fault(&e))?);
        }
        remember(cache, revision, &commit);
        Ok(Snapshot { files: paths, format: chosen.format, beside: chosen.beside, revision: commit })
    }

    /// The text of a small file; none where it is not UTF-8.
    async fn text(
        &self,
        repository: &HFRepository<RepoTypeDataset>,
        name: &str,
        commit: &str,
    ) -> Result<Option<String>, DataError> {
        let download = repository.download_file().filename(name.to_owned()).revision(commit.to_owned());
        let path = download.send().await.map_err(|e| self.fault(&e))?;
        Ok(std::fs::read_to_string(path).ok())
    }

    /// Commit and file names at a revision.
    async fn listing(
        &self,
        repository: &HFRepository<RepoTypeDataset>,
        revision: &str,
    ) -> Result<(String, Vec<String>), DataError> {
        let info = repository.info().revision(revision).send().await.map_err(|e| self.fault(&e))?;
        let commit =
            info.sha.ok_or_else(|| DataError::external(format!("hf://{}: the hub names no commit", self.id())))?;
        Ok((commit, info.siblings.unwrap_or_default().into_iter().map(|s| s.rfilename).collect()))
    }

    /// Files from the cache; none where the revision was never fetched.
    fn cached(&self, cache: &Path, wanted: Wanted<'_>) -> Option<Result<Snapshot, DataError>> {
        let mut found = None;
        for revision in [self.revision.as_str(), PARQUET_REVISION] {
            let commit = std::fs::read_to_string(cache.join("refs").join(revision)).unwrap_or_else(|_| revision.into());
            let root = cache.join("snapshots").join(commit.trim());
            let mut names = Vec::new();
            if !root.is_dir() || files::walk(&root, Path::new(""), &mut names).is_err() {
                continue;
            }
            let readme = std::fs::read_to_string(root.join("README.md")).ok();
            let snapshot = splits::choose(names, readme.as_deref(), wanted).map(|chosen| Snapshot {
                files: chosen.names.into_iter().map(|name| root.join(name)).collect(),
                format: chosen.format,
                beside: chosen.beside,
                revision: commit.trim().to_owned(),
            });
            match snapshot {
                Ok(snapshot) => return Some(Ok(snapshot)),
                Err(e) => found = found.or(Some(Err(e.at(format!("hf://{} in {}", self.id(), root.display()))))),
            }
        }
        found
    }

    fn fault(&self, error: &HFError) -> DataError {
        let id = self.id();
        match error {
            HFError::RepoNotFound { .. } | HFError::AuthRequired { .. } | HFError::Forbidden { .. } => DataError::user(
                format!("hf://{id}: there is no such data set, or it needs a token; check the name, or set HF_TOKEN"),
            ),
            HFError::RevisionNotFound { revision, .. } => {
                DataError::user(format!("hf://{id}: there is no revision {revision}"))
            }
            other => DataError::external(format!("hf://{id}: {other}")),
        }
    }
}

/// Files are fetched by commit, which leaves no trace of the name; an offline run looks it up here.
/// A cache that can't be written only costs that later run its name.
fn remember(cache: &Path, revision: &str, commit: &str) {
    let reference = cache.join("refs").join(revision);
    if revision == commit || std::fs::read_to_string(&reference).is_ok_and(|c| c.trim() == commit) {
        return;
    }
    if let Some(parent) = reference.parent() {
        let written = std::fs::create_dir_all(parent).and_then(|()| std::fs::write(&reference, commit));
        if let Err(e) = written {
            tracing::debug!("{}: {e}", reference.display());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses() {
        let parsed = HubName::parse("hf://Intel/orca_dpo_pairs").unwrap().unwrap();
        assert_eq!((parsed.id().as_str(), parsed.revision.as_str()), ("Intel/orca_dpo_pairs", "main"));
        assert_eq!(HubName::parse("hf://a/b@v1").unwrap().unwrap().revision, "v1");
        assert!(HubName::parse("hf://only").unwrap().is_err());
        assert!(HubName::parse("data/x.jsonl").is_none());
        for out in ["hf://a/b@/srv/private", "hf://a/b@../../..", "hf://../..", "hf://a/..", "hf://a/b@x/../y"] {
            assert!(HubName::parse(out).unwrap().is_err(), "{out}");
        }
    }

    #[test]
    fn the_cache_answers_for_a_revision_it_has() {
        let dir = tempfile::tempdir().unwrap();
        let cache = dir.path().join("datasets--a--b");
        for (path, text) in
            [("refs/main", "abc123\n"), ("snapshots/abc123/data/train.jsonl", "{}"), ("snapshots/abc123/README.md", "")]
        {
            std::fs::create_dir_all(cache.join(path).parent().unwrap()).unwrap();
            std::fs::write(cache.join(path), text).unwrap();
        }
        let name = HubName::parse("hf://a/b").unwrap().unwrap();
        let snapshot = name.cached(&cache, Wanted { split: Some("train"), config: None }).unwrap().unwrap();
        assert_eq!(snapshot.revision, "abc123");
        assert!(snapshot.files[0].ends_with("snapshots/abc123/data/train.jsonl"));
        assert!(
            name.cached(&cache, Wanted { split: Some("test"), config: None })
                .unwrap()
                .unwrap_err()
                .message
                .contains("no split `test`")
        );
        assert!(HubName::parse("hf://a/b@v9").unwrap().unwrap().cached(&cache, Wanted::default()).is_none());
    }
}
