//! Supervision: one actor a stage, and the run's actor above them.
//!
//! Actors carry control only. A handler can't be interrupted except by killing its actor, so a
//! stage's loop is a task of its own and its end, error or panic comes back as a message; data
//! travels on edges, whose senders wait (an actor's mailbox never does).
//!
//! When a stage fails by no fault of the user, the stages of the round begin again, each from its
//! journal: recorded rows are replayed and nothing recorded is computed twice. That is coarser than
//! restarting the one stage, whose edges would have to be replayed from its neighbours' journals,
//! but it is the path that a resumed run takes too. A stage may fail three times a round.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use ractor::{Actor, ActorProcessingErr, ActorRef, SupervisionEvent};
use tokio::sync::{OwnedSemaphorePermit, watch};
use tokio_util::sync::CancellationToken;
use tracing::field::Empty;
use tracing::{Instrument, Span};

use super::error::RunError;
use super::ledger::{Ending, Ledger, RunEvent};
use super::round::{Attempt, FirstFailure, StageTask};
use super::run::Summary;
use super::{Domain, StageError, StageRegistry};
use crate::flow::RoundPlan;

/// Wait before the first, second and third restart that a stage causes in a round.
const BACK_OFF: [Duration; 3] = [Duration::from_millis(500), Duration::from_secs(1), Duration::from_secs(2)];

/// Target of the spans of a run, its rounds and their stages.
pub(super) const SPAN: &str = "flowrun::span";

/// What the stage did is put on it at its end. A tracing system shows it under the stage's own name.
fn stage_span(round: &Span, stage: &str, kind: &str) -> Span {
    let (rows_in, rows_out, state) = (Empty, Empty, Empty);
    tracing::info_span!(target: SPAN, parent: round, "stage", otel.name = stage, stage, kind, rows_in, rows_out, state)
}

/// Runs one stage's tasks, one attempt after the other.
pub(super) struct StageActor;

pub(super) enum StageMsg {
    /// The span is the task's, for logs and traces.
    Start(Box<StageTask>, Span),
    /// The task is over; what went wrong is in the attempt's first failure.
    Ended,
}

impl Actor for StageActor {
    type Msg = StageMsg;
    type State = ActorRef<RunMsg>;
    type Arguments = ActorRef<RunMsg>;

    async fn pre_start(&self, _: ActorRef<StageMsg>, run: ActorRef<RunMsg>) -> Result<Self::State, ActorProcessingErr> {
        Ok(run)
    }

    async fn handle(
        &self,
        myself: ActorRef<StageMsg>,
        message: StageMsg,
        run: &mut Self::State,
    ) -> Result<(), ActorProcessingErr> {
        match message {
            StageMsg::Start(task, span) => {
                tokio::spawn(async move {
                    // The error is kept as the attempt's first failure, where it is one.
                    let _ = task.run().instrument(span).await;
                    let _ = myself.send_message(StageMsg::Ended);
                });
            }
            StageMsg::Ended => run.send_message(RunMsg::StageEnded)?,
        }
        Ok(())
    }
}

/// Takes the rounds in turn.
pub(super) struct RunActor;

pub(super) enum RunMsg {
    /// Opens the round under way, for the first time or again.
    Begin,
    StageEnded,
}

pub(super) struct RunArgs {
    pub rounds: Vec<RoundPlan>,
    pub kinds: StageRegistry,
    pub ledger: Arc<Ledger>,
    pub done: watch::Sender<Option<Arc<Summary>>>,
    pub seat: Option<OwnedSemaphorePermit>,
    /// Around all spans of the run.
    pub span: Span,
}

pub(super) struct RunState {
    args: RunArgs,
    /// Index into the rounds.
    turn: usize,
    actors: HashMap<String, ActorRef<StageMsg>>,
    running: usize,
    /// Cancels the attempt under way, and at its end whoever watches over it.
    attempt: CancellationToken,
    first: FirstFailure,
    /// Around the attempt's stages.
    span: Span,
    /// Restarts that each stage caused in this round, and the error of the first.
    restarts: HashMap<String, (usize, StageError)>,
}

impl Actor for RunActor {
    type Msg = RunMsg;
    type State = RunState;
    type Arguments = RunArgs;

    async fn pre_start(&self, myself: ActorRef<RunMsg>, args: RunArgs) -> Result<RunState, ActorProcessingErr> {
        myself.send_message(RunMsg::Begin)?;
        let (actors, attempt, first, restarts) = Default::default();
        Ok(RunState { args, turn: 0, actors, running: 0, attempt, first, span: Span::none(), restarts })
    }

    async fn handle(
        &self,
        myself: ActorRef<RunMsg>,
        message: RunMsg,
        state: &mut RunState,
    ) -> Result<(), ActorProcessingErr> {
        match message {
            RunMsg::Begin => state.begin(&myself).await,
            RunMsg::StageEnded => {
                state.running = state.running.saturating_sub(1);
                if state.running == 0 {
                    state.round_ended(&myself).await;
                }
            }
        }
        Ok(())
    }

    /// A stage's actor only passes messages on; should one die, the run can't be trusted to end.
    async fn handle_supervisor_evt(
        &self,
        myself: ActorRef<RunMsg>,
        event: SupervisionEvent,
        state: &mut RunState,
    ) -> Result<(), ActorProcessingErr> {
        if let SupervisionEvent::ActorFailed(_, error) = event {
            state.args.ledger.cancel.cancel();
            let error = StageError::internal(format!("a stage's actor failed: {error}"));
            state.finish(&myself, Ending::Failed, Some(RunError::of_stage("engine", error))).await;
        }
        Ok(())
    }
}

impl RunState {
    async fn begin(&mut self, myself: &ActorRef<RunMsg>) {
        let Some(round) = self.args.rounds.get(self.turn) else {
            return self.finish(myself, Ending::Done, None).await;
        };
        if self.args.ledger.cancel.is_cancelled() {
            return self.stopped(myself).await;
        }
        self.settle_adapters(round.round, false);
        self.span = tracing::info_span!(target: SPAN, parent: &self.args.span, "round", round = round.round);
        match Attempt::open(&self.args.rounds, round, &self.args.kinds, &self.args.ledger) {
            Ok(attempt) => {
                self.attempt = attempt.cancel.clone();
                if let Err(error) = self.start(myself, attempt).await {
                    self.attempt.cancel();
                    self.finish(myself, Ending::Failed, Some(RunError::of_stage("engine", error))).await;
                }
            }
            Err(error) => {
                let error = RunError { domain: error.domain, message: error.message, stage: None };
                self.finish(myself, Ending::Failed, Some(error)).await;
            }
        }
    }

    async fn start(&mut self, myself: &ActorRef<RunMsg>, attempt: Attempt) -> Result<(), StageError> {
        self.first = attempt.first;
        self.running = attempt.tasks.len();
        for (stage, task) in attempt.tasks {
            let span = stage_span(&self.span, &stage, task.kind_name());
            let actor = match self.actors.get(&stage) {
                Some(actor) => actor.clone(),
                None => {
                    let linked = Actor::spawn_linked(None, StageActor, myself.clone(), myself.get_cell()).await;
                    let (actor, _) =
                        linked.map_err(|e| StageError::internal(format!("no actor for `{stage}`: {e}")))?;
                    self.actors.insert(stage, actor.clone());
                    actor
                }
            };
            let sent = actor.send_message(StageMsg::Start(Box::new(task), span));
            sent.map_err(|_| StageError::internal("a stage's actor is gone"))?;
        }
        if self.running == 0 {
            let _ = myself.send_message(RunMsg::StageEnded);
        }
        Ok(())
    }

    /// All stages of the attempt are over: what comes next.
    async fn round_ended(&mut self, myself: &ActorRef<RunMsg>) {
        let ledger = self.args.ledger.clone();
        self.attempt.cancel();
        let failure = self.first.lock().unwrap_or_else(|e| e.into_inner()).take();
        let Some(round) = self.args.rounds.get(self.turn).map(|r| r.round) else {
            return;
        };
        match failure {
            // A stop is a stop, also where a stage stumbled over it.
            _ if ledger.cancel.is_cancelled() => self.stopped(myself).await,
            Some((stage, error)) => self.stage_failed(myself, round, &stage, error).await,
            None if ledger.overspent().await.is_some() => self.stopped(myself).await,
            None => match ledger.too_many_dead(round, true) {
                Some(reason) => self.finish(myself, Ending::Failed, Some(RunError::rows(reason))).await,
                None => {
                    self.settle_adapters(round, true);
                    self.turn += 1;
                    self.restarts.clear();
                    ledger.end_round(round);
                    if let Some(reason) = ledger.stops() {
                        tracing::warn!(round, reason, "a gate ends the run");
                        return self.finish(myself, Ending::StoppedByGate, None).await;
                    }
                    if self.turn < self.args.rounds.len() {
                        write(&ledger, ledger.summary("running", None)).await;
                    }
                    let _ = myself.send_message(RunMsg::Begin);
                }
            },
        }
    }

    async fn stage_failed(&mut self, myself: &ActorRef<RunMsg>, round: u32, stage: &str, error: StageError) {
        let ledger = self.args.ledger.clone();
        let error = StageError { message: ledger.told(&error.message), ..error };
        let domain = error.domain.as_str();
        ledger.metrics.counter("flowrun_stage_errors_total", &[("stage", stage), ("domain", domain)]).increment(1);
        let (used, first) = self.restarts.entry(stage.into()).or_insert_with(|| (0, error.clone()));
        let retried = matches!(error.domain, Domain::External | Domain::Internal);
        let wait = BACK_OFF.get(*used).filter(|_| retried);
        let Some(wait) = wait.copied() else {
            // Those after the first may be what it led to.
            let error = if retried { first.clone() } else { error };
            return self.finish(myself, Ending::Failed, Some(RunError::of_stage(stage, error))).await;
        };
        *used += 1;
        tracing::warn!(stage, round, %error, "a stage failed; the round begins again from its journals");
        ledger.metrics.counter("flowrun_stage_restarts_total", &[("stage", stage)]).increment(1);
        ledger.tell(RunEvent::Restarted { round, stage: stage.into(), reason: error.message });
        let myself = myself.clone();
        tokio::spawn(async move {
            // A cancelled run doesn't wait for its back-off; it ends at the beginning of the round.
            let _ = tokio::time::timeout(wait, ledger.cancel.cancelled()).await;
            let _ = myself.send_message(RunMsg::Begin);
        });
    }

    /// Before a round: trainers that don't run in it keep what they have. After it: all do.
    fn settle_adapters(&self, round: u32, after: bool) {
        for planned in &self.args.rounds {
            for stage in planned.stages.iter().filter(|s| s.plan.trains.is_some()) {
                let runs = self
                    .args
                    .rounds
                    .get(self.turn)
                    .is_some_and(|r| r.stages.iter().any(|s| s.spec.name == stage.spec.name));
                let settled = if after || !runs { round } else { round.saturating_sub(1) };
                self.args.ledger.adapters.settle(&stage.spec.name, settled);
            }
        }
    }

    /// The run ends before it is done: on request, or because it used more than it may.
    async fn stopped(&mut self, myself: &ActorRef<RunMsg>) {
        match self.args.ledger.overspent().await {
            Some(error) => self.finish(myself, Ending::Failed, Some(error)).await,
            None => self.finish(myself, Ending::Interrupted, None).await,
        }
    }

    async fn finish(&mut self, myself: &ActorRef<RunMsg>, status: Ending, error: Option<RunError>) {
        if self.args.done.borrow().is_some() {
            return;
        }
        let ledger = self.args.ledger.clone();
        let error = error.map(|error| RunError { message: ledger.told(&error.message), ..error });
        let name = match status {
            Ending::Done => "done",
            Ending::Failed => "failed",
            Ending::Interrupted => "interrupted",
            Ending::StoppedByGate => "stopped_by_gate",
        };
        let json = ledger.summary(name, error.as_ref().map(ToString::to_string));
        write(&ledger, json.clone()).await;
        if self.running == 0 {
            ledger.dir.release();
        }
        ledger.tell(RunEvent::Ended { status });
        // Whoever waits for the run may end the process next: what it tells of spans must be whole by then.
        (self.span, self.args.span) = (Span::none(), Span::none());
        let dir = ledger.dir.path().to_path_buf();
        // Whoever waits for the run may start the next one.
        drop(self.args.seat.take());
        self.args.done.send_replace(Some(Arc::new(Summary { status, error, dir, json })));
        for actor in self.actors.values() {
            actor.stop(None);
        }
        myself.stop(None);
    }
}

async fn write(ledger: &Arc<Ledger>, summary: serde_json::Value) {
    let theirs = ledger.clone();
    let written = tokio::task::spawn_blocking(move || theirs.write(&summary)).await;
    if let Err(error) = written.map_err(std::io::Error::other).flatten() {
        tracing::error!(dir = %ledger.dir.path().display(), %error, "the run's summary can't be written");
    }
}
