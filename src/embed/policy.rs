//! What a flow of someone else's may open.
//!
//! A service that accepts flows runs what strangers wrote: a source that names `/etc/passwd`, a
//! sink that overwrites a file, a model on a host of theirs, `${TOKEN}` in a URL. A policy is
//! checked before the flow is planned, and planning already looks at files.

use std::path::{Component, Path, PathBuf};

use crate::flow::{Flow, FlowError, KindLookup};

pub use crate::flow::kind::Access;

/// Limits on what flows may open. The default allows everything.
///
/// ```
/// use flowrun::embed::Policy;
/// let policy = Policy::nothing().read("/srv/data").write("runs").host("huggingface.co");
/// ```
#[derive(Debug, Clone, Default)]
pub struct Policy {
    /// `None` allows everything.
    limits: Option<Limits>,
}

#[derive(Debug, Clone, Default)]
struct Limits {
    read: Vec<PathBuf>,
    write: Vec<PathBuf>,
    hosts: Vec<String>,
    commands: Vec<String>,
}

impl Policy {
    /// Forbids every path, host and command; built-in models are always there.
    pub fn nothing() -> Self {
        Self { limits: Some(Limits::default()) }
    }

    fn limits(&mut self) -> &mut Limits {
        self.limits.get_or_insert_default()
    }

    /// Allows reading below this directory, or this file.
    #[must_use]
    pub fn read(mut self, path: impl Into<PathBuf>) -> Self {
        self.limits().read.push(path.into());
        self
    }

    /// Allows writing below this directory. What a flow may write it may not therefore read.
    #[must_use]
    pub fn write(mut self, path: impl Into<PathBuf>) -> Self {
        self.limits().write.push(path.into());
        self
    }

    /// Allows this host, as it is written in URLs; `huggingface.co` for `hf://`.
    #[must_use]
    pub fn host(mut self, host: impl Into<String>) -> Self {
        self.limits().hosts.push(host.into());
        self
    }

    /// Allows this program, as flows write it.
    #[must_use]
    pub fn command(mut self, command: impl Into<String>) -> Self {
        self.limits().commands.push(command.into());
        self
    }

    /// Whether `${VAR}` may read the program's environment: only where everything is allowed.
    pub fn allows_environment(&self) -> bool {
        self.limits.is_none()
    }

    /// Looks at everything that the flow's models and stages say they open, in every round.
    ///
    /// # Errors
    /// The first that is not allowed, with its place.
    pub fn check(&self, flow: &Flow, kinds: &dyn KindLookup) -> Result<(), FlowError> {
        let Some(limits) = &self.limits else { return Ok(()) };
        for (name, model) in &flow.models {
            for (key, access) in model.opens() {
                let key = format!("models.{name}.{key}");
                limits.check(&flow.base, &access, &key).map_err(|e| flow.places.attach(e))?;
            }
        }
        let rounds = std::iter::once(1).chain(flow.overlays.iter().map(|overlay| overlay.from));
        for view in rounds.map(|round| flow.for_round(round)) {
            for stage in &view.stages {
                let opens = kinds.kind(&stage.kind).map(|kind| kind.opens(stage)).unwrap_or_default();
                for (key, access) in opens {
                    let key = format!("stages.{}.{key}", stage.name);
                    limits.check(&flow.base, &access, &key).map_err(|e| view.places.attach(e))?;
                }
            }
        }
        Ok(())
    }
}

impl Limits {
    fn check(&self, base: &Path, access: &Access, key: &str) -> Result<(), FlowError> {
        let (allowed, what) = match access {
            Access::Nothing => return Ok(()),
            Access::Read(path) => (below(&super::engine::placed(base, path), &self.read), format!("read {path}")),
            Access::Write(path) => (below(&super::engine::placed(base, path), &self.write), format!("write {path}")),
            Access::Host(host) => (self.hosts.contains(host), format!("reach {host}")),
            Access::Command(command) => (self.commands.contains(command), format!("start {command}")),
            // As with `${VAR}`: the environment is the service's.
            Access::Variable(name) => (false, format!("read the environment variable {name}")),
        };
        match allowed {
            true => Ok(()),
            false => Err(FlowError::new(key, format!("this service does not allow a flow to {what}"))),
        }
    }
}

/// Whether the path, links and `..` resolved as far as it exists, lies at or below one of `roots`.
fn below(path: &Path, roots: &[PathBuf]) -> bool {
    let Some(path) = resolved(path) else { return false };
    roots.iter().filter_map(|root| resolved(root)).any(|root| path.starts_with(root))
}

/// The path as the system would find it; of a glob, the part before the first pattern. None where
/// it leaves what exists upwards: what `..` would mean there is anyone's guess.
fn resolved(path: &Path) -> Option<PathBuf> {
    let path = std::path::absolute(path).ok()?;
    let is_pattern = |part: &Component| part.as_os_str().to_string_lossy().contains(['*', '?', '[', '{']);
    let parts: Vec<Component> = path.components().take_while(|part| !is_pattern(part)).collect();
    let after_pattern = path.components().skip(parts.len());
    if after_pattern.clone().any(|part| part == Component::ParentDir) {
        return None;
    }
    for known in (1..=parts.len()).rev() {
        let (there, rest) = parts.split_at(known);
        if let Ok(there) = there.iter().collect::<PathBuf>().canonicalize() {
            let up = rest.contains(&Component::ParentDir);
            return (!up).then(|| rest.iter().fold(there, |path, part| path.join(part)));
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_where_they_lead() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("data");
        std::fs::create_dir_all(root.join("in")).unwrap();
        std::fs::write(root.join("in/a.jsonl"), "").unwrap();
        std::fs::write(dir.path().join("secret"), "").unwrap();
        std::os::unix::fs::symlink(dir.path(), root.join("out")).unwrap();
        let roots = [root.clone()];
        for (path, allowed) in [
            ("in/a.jsonl", true),
            ("in/new.jsonl", true),
            ("in/*.jsonl", true),
            ("in/../in/a.jsonl", true),
            ("../secret", false),
            ("in/../../secret", false),
            ("out/secret", false),
            ("out/*", false),
            ("in/*/../../../secret", false),
            ("new/../../secret", false),
            ("/etc/passwd", false),
        ] {
            assert_eq!(below(&root.join(path), &roots), allowed, "{path}");
        }
        assert!(!below(&dir.path().join("data2"), &roots));
    }
}
