//! [`Policy`]: limits on what an untrusted flow may open and how much its runs may use.
//!
//! A service that accepts flows runs input from untrusted users: a source may name `/etc/passwd`, a sink may
//! overwrite a file, a model may be on a user's host, a URL may contain `${TOKEN}`. The paths, hosts and commands of
//! a flow are checked before it is planned, because planning already reads files.

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
    /// Limits on what may be opened; `None` allows everything.
    limits: Option<Limits>,
    quotas: Quotas,
    /// Permits for simultaneous runs; `None` is no limit.
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
    /// Forbids every path, host, command and environment variable; built-in models stay allowed. If the hub's host is
    /// allowed, the hub is used without a token.
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

    /// Allows writing below this directory. This does not allow reading it.
    #[must_use]
    pub fn write(mut self, path: impl Into<PathBuf>) -> Self {
        self.limits().write.push(path.into());
        self
    }

    /// Allows this host, written as in URLs; for `hf://` it is `huggingface.co`.
    #[must_use]
    pub fn host(mut self, host: impl Into<String>) -> Self {
        self.limits().hosts.push(host.into());
        self
    }

    /// Allows this program; the name must be equal to the one in the flow.
    #[must_use]
    pub fn command(mut self, command: impl Into<String>) -> Self {
        self.limits().commands.push(command.into());
        self
    }

    /// Allows flows to pass this environment variable to a program. It does not allow `${VAR}`.
    #[must_use]
    pub fn variable(mut self, name: impl Into<String>) -> Self {
        self.limits().variables.push(name.into());
        self
    }

    /// Limits the rows that all stages of a run send together.
    #[must_use]
    pub fn rows(mut self, most: u64) -> Self {
        self.quotas.rows = Some(most);
        self
    }

    /// Limits the tokens that all models of a run read and write together.
    #[must_use]
    pub fn tokens(mut self, most: u64) -> Self {
        self.quotas.tokens = Some(most);
        self
    }

    /// Limits the bytes in a run's directory.
    #[must_use]
    pub fn bytes(mut self, most: u64) -> Self {
        self.quotas.bytes = Some(most);
        self
    }

    /// Limits the seconds that a run takes.
    #[must_use]
    pub fn seconds(mut self, most: u64) -> Self {
        self.quotas.seconds = Some(most);
        self
    }

    /// Limits the runs at one time, over all clones of this policy.
    #[must_use]
    pub fn runs(mut self, most: usize) -> Self {
        self.seats = Some(Arc::new(Semaphore::new(most.min(Semaphore::MAX_PERMITS))));
        self.quotas.runs = Some(most as u64);
        self
    }

    /// Returns the quotas of a run.
    pub(super) fn quotas(&self) -> Quotas {
        self.quotas
    }

    /// Reserves a place for a run until the permit is dropped; `None` if the number of runs is not limited.
    ///
    /// # Errors
    /// All places are taken.
    pub(super) fn seat(&self) -> Result<Option<OwnedSemaphorePermit>, RunError> {
        let Some(seats) = &self.seats else { return Ok(None) };
        let taken = seats.clone().try_acquire_owned();
        taken.map(Some).map_err(|_| Quota::Runs.exceeded(self.quotas.runs.unwrap_or_default()))
    }

    /// Whether `${VAR}` may read the program's environment: only where everything is allowed.
    pub fn allows_environment(&self) -> bool {
        self.limits.is_none()
    }

    /// Returns the login for the hub: anonymous under limits, so that flows can't use the program's token.
    pub(super) fn login(&self) -> HubLogin {
        match self.limits {
            None => HubLogin::Own,
            Some(_) => HubLogin::Anonymous,
        }
    }

    /// Checks everything that the flow's models and stages declare to open, in every round. If the run directory
    /// `run` is unknown, a relative path that leaves it can't be checked; it is then refused only if no path may be
    /// written at all.
    ///
    /// # Errors
    /// The first access that is not allowed, with its place in the flow.
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

/// Returns the accesses of a stage with their full keys, including those of tables with the keys of another kind.
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
    /// Returns a description of the access if it is not allowed.
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

    /// Returns whether a command may get this argument. An argument is a path if it leads out of the flow's folder or names
    /// an existing file in it. The result does not reveal which files exist outside the folder.
    fn may_be_given(&self, base: &Path, word: &str) -> bool {
        let is_path = leaves(word) || base.join(word).exists();
        !is_path || reads_within(base, word, &self.read)
    }

    /// Returns whether a file may be written: in the run directory, or below an allowed directory.
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

/// Returns whether a path may lead out of the directory that it starts in.
fn leaves(path: &str) -> bool {
    Path::new(path).components().any(|part| !matches!(part, Component::Normal(_) | Component::CurDir))
}
