//! What a flow of someone else's may open, and what a run of it may use.
//!
//! A service that accepts flows runs what strangers wrote: a source that names `/etc/passwd`, a
//! sink that overwrites a file, a model on a host of theirs, `${TOKEN}` in a URL. What a flow opens is
//! checked before it is planned, and planning already looks at files.

use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::reach::{reads_within, writes_within};
use crate::engine::written::{self, ROUND};
use crate::engine::{Quota, Quotas, RunError};
use crate::flow::{Flow, FlowError, HubLogin, KindLookup, StageSpec};

pub use crate::flow::kind::Access;

/// Limits on what flows may open and what their runs may use. The default allows everything.
///
/// ```
/// use flowrun::embed::Policy;
/// let policy = Policy::nothing().read("/srv/data").write("runs").host("huggingface.co").rows(100_000).runs(4);
/// ```
#[derive(Debug, Clone, Default)]
pub struct Policy {
    /// `None` allows everything.
    limits: Option<Limits>,
    quotas: Quotas,
    /// Of runs that go on at one time.
    seats: Option<Arc<Semaphore>>,
}

#[derive(Debug, Clone, Default)]
struct Limits {
    read: Vec<PathBuf>,
    write: Vec<PathBuf>,
    hosts: Vec<String>,
    commands: Vec<String>,
    variables: Vec<String>,
}

impl Policy {
    /// Forbids every path, host, command and environment variable; built-in models are always there. The hub, where its
    /// host is allowed, is asked without a token.
    pub fn nothing() -> Self {
        Self { limits: Some(Limits::default()), ..Self::default() }
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

    /// Allows a program to be given this environment variable; `${VAR}` sees none.
    #[must_use]
    pub fn variable(mut self, name: impl Into<String>) -> Self {
        self.limits().variables.push(name.into());
        self
    }

    /// So many rows may the stages of a run send, all together.
    #[must_use]
    pub fn rows(mut self, most: u64) -> Self {
        self.quotas.rows = Some(most);
        self
    }

    /// So many tokens may the models of a run read and write, all together.
    #[must_use]
    pub fn tokens(mut self, most: u64) -> Self {
        self.quotas.tokens = Some(most);
        self
    }

    /// So many bytes may a run's directory hold.
    #[must_use]
    pub fn bytes(mut self, most: u64) -> Self {
        self.quotas.bytes = Some(most);
        self
    }

    /// So many seconds may a run go on.
    #[must_use]
    pub fn seconds(mut self, most: u64) -> Self {
        self.quotas.seconds = Some(most);
        self
    }

    /// So many runs may go on at one time, over all clones of this policy.
    #[must_use]
    pub fn runs(mut self, most: usize) -> Self {
        self.seats = Some(Arc::new(Semaphore::new(most.min(Semaphore::MAX_PERMITS))));
        self.quotas.runs = Some(most as u64);
        self
    }

    /// What a run may use.
    pub(super) fn quotas(&self) -> Quotas {
        self.quotas
    }

    /// A place among the runs that may go on, until it is dropped; none where their number is free.
    ///
    /// # Errors
    /// All are taken.
    pub(super) fn seat(&self) -> Result<Option<OwnedSemaphorePermit>, RunError> {
        let Some(seats) = &self.seats else { return Ok(None) };
        let taken = seats.clone().try_acquire_owned();
        taken.map(Some).map_err(|_| Quota::Runs.exceeded(self.quotas.runs.unwrap_or_default()))
    }

    /// Whether `${VAR}` may read the program's environment: only where everything is allowed.
    pub fn allows_environment(&self) -> bool {
        self.limits.is_none()
    }

    /// Who asks the hub: a host that is allowed does not lend out the program's own token.
    pub(super) fn login(&self) -> HubLogin {
        match self.limits {
            None => HubLogin::Own,
            Some(_) => HubLogin::Anonymous,
        }
    }

    /// Looks at everything that the flow's models and stages say they open, in every round. Without the run directory,
    /// `run`, a path that is relative to it and leaves it can't be judged; it is then refused where no path may be
    /// written at all.
    ///
    /// # Errors
    /// The first that is not allowed, with its place.
    pub fn check(&self, flow: &Flow, kinds: &dyn KindLookup, run: Option<&Path>) -> Result<(), FlowError> {
        let Some(limits) = &self.limits else { return Ok(()) };
        let check = |access: &Access, key: String| {
            limits.refusal(flow, run, access).map_or(Ok(()), |what| {
                Err(FlowError::new(key, format!("this service does not allow a flow to {what}")))
            })
        };
        for (name, model) in &flow.models {
            for (key, access) in model.opens() {
                check(&access, format!("models.{name}.{key}")).map_err(|e| flow.places.attach(e))?;
            }
        }
        let rounds = std::iter::once(1).chain(flow.overlays.iter().map(|overlay| overlay.from));
        for view in rounds.map(|round| flow.for_round(round)) {
            for stage in &view.stages {
                for (key, access) in opened(stage, &format!("stages.{}", stage.name), kinds) {
                    check(&access, key).map_err(|e| view.places.attach(e))?;
                }
            }
        }
        Ok(())
    }
}

/// What a stage opens, with the whole key, and what tables open that hold the keys of another kind.
fn opened(stage: &StageSpec, path: &str, kinds: &dyn KindLookup) -> Vec<(String, Access)> {
    let own = kinds.kind(&stage.kind).map(|kind| kind.opens(stage)).unwrap_or_default();
    let mut all: Vec<_> = own.into_iter().map(|(key, access)| (format!("{path}.{key}"), access)).collect();
    for (name, value) in &stage.options {
        let (Some(options), Some(_)) = (value.as_table(), kinds.kind(name)) else { continue };
        let nested = StageSpec { kind: name.clone(), options: options.clone(), ..stage.clone() };
        all.extend(opened(&nested, &format!("{path}.{name}"), kinds));
    }
    all
}

impl Limits {
    /// What of this is not allowed.
    fn refusal(&self, flow: &Flow, run: Option<&Path>, access: &Access) -> Option<String> {
        let (allowed, what) = match access {
            Access::Nothing => return None,
            Access::Read(path) => (reads_within(&flow.base, path, &self.read), format!("read {path}")),
            Access::Write(path) => (self.may_write(path, run, flow.rounds), format!("write {path}")),
            Access::Host(host) => (self.hosts.contains(host), format!("reach {host}")),
            Access::Command(command) => (self.commands.contains(command), format!("start {command}")),
            Access::Argument(word) => (self.may_be_given(&flow.base, word), format!("read {word}")),
            Access::Variable(name) => (self.variables.contains(name), format!("read the environment variable {name}")),
        };
        (!allowed).then_some(what)
    }

    /// A word is a path where it leads out of the flow's folder, or to something that is there. Whether anything is
    /// outside is not told.
    fn may_be_given(&self, base: &Path, word: &str) -> bool {
        let is_path = leaves(word) || base.join(word).exists();
        !is_path || reads_within(base, word, &self.read)
    }

    /// A file lies where it will be written: in the run directory, or below what may be written.
    fn may_write(&self, path: &str, run: Option<&Path>, rounds: u32) -> bool {
        let (start, roots) = match run {
            Some(run) => (run, [&self.write[..], &[run.to_owned()]].concat()),
            None if Path::new(path).is_relative() => return !leaves(path) || !self.write.is_empty(),
            None => (Path::new(""), self.write.clone()),
        };
        // No plan has more rounds than these.
        let rounds = if path.contains(ROUND) { rounds.min(10_000) } else { 1 };
        (1..=rounds).all(|round| writes_within(&written::placed(path, start, round), &roots))
    }
}

/// Whether a relative path names anything outside of where it starts.
fn leaves(path: &str) -> bool {
    Path::new(path).components().any(|part| !matches!(part, Component::Normal(_) | Component::CurDir))
}
