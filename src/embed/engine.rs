//! What plans and starts flows.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use chrono::NaiveDate;

use super::policy::Policy;
use crate::engine::written::refuse_clashes;
use crate::engine::{
    AdapterRef, Quota, Quotas, Run, RunConfig, RunError, RunHandle, Runnable, StageError, StageRegistry, runs,
};
use crate::flow::{Contents, Flow, FlowError, HubAnswer, KindLookup, Plan, Silence, StageKind};
use crate::llm::{LlmError, Models, Role};
use crate::model::source::today;
use crate::model::{ModelError, lora};
use crate::observe::{Metrics, Trace};
use crate::stages::feed::{Feed, FeedKind};
use crate::stages::tap::{Tap, TapEnd, TapKind, tap};
use crate::stages::{self, prompt_notes};

/// How long a stage may be busy without a sign of life before it is reported.
const STALL: Duration = Duration::from_secs(120);

/// Target of the line that says what date templates are told.
const DATE: &str = "flowrun::date";

/// Plans and starts flows. Any number of runs may go on at one time, each with models, metrics and
/// a directory of its own.
#[derive(Clone)]
pub struct Engine {
    /// Kinds that the program brings.
    own: StageRegistry,
    policy: Policy,
    builtin: StageRegistry,
}

impl Default for Engine {
    fn default() -> Self {
        Self::new()
    }
}

impl Engine {
    pub fn new() -> Self {
        // Before any other tensor call: libtorch asks for CUDA once.
        crate::torch::init();
        let builtin = registry(Arc::new(Models::none()), BTreeMap::new(), BTreeMap::new(), &StageRegistry::default());
        Self { own: StageRegistry::default(), policy: Policy::default(), builtin }
    }

    /// Adds a kind of stage. A built-in kind of the same name is replaced.
    #[must_use]
    pub fn with_kind(mut self, kind: impl Runnable + 'static) -> Self {
        self.own.register(kind);
        self
    }

    /// Limits what flows may open; without it they may open anything.
    #[must_use]
    pub fn with_policy(mut self, policy: Policy) -> Self {
        self.policy = policy;
        self
    }

    /// Reads a flow that someone sent: what the policy forbids, and the program's environment
    /// where there is a policy, are out of its reach. `base` is where its relative paths start.
    ///
    /// # Errors
    /// The first mistake, with its place.
    pub fn read(&self, text: &str, base: &Path) -> Result<Flow, FlowError> {
        let environment = |name: &str| std::env::var(name).ok().filter(|_| self.policy.allows_environment());
        let flow = Flow::from_toml_with(text, base, &[], self, &environment)?;
        self.policy.check(&flow, self, None)?;
        Ok(flow)
    }

    /// Checks a flow: the plan, before anything is loaded. Stages of the kinds `feed` and `tap` are
    /// refused here; [`Engine::start`] knows their ends.
    ///
    /// # Errors
    /// The first mistake, or the first thing that the policy forbids.
    pub async fn plan(&self, flow: &Flow) -> Result<Plan, FlowError> {
        Ok(self.planned(flow, RunOptions::new("")).await?.plan)
    }

    /// Plans a flow with all that its stages are opened with.
    ///
    /// # Errors
    /// As [`Engine::plan`].
    pub async fn planned(&self, flow: &Flow, options: RunOptions) -> Result<Planned, FlowError> {
        let planned = HubAnswer::within(self.plan_unmasked(flow, options)).await;
        let mut planned = planned.map_err(|error| flow.masks.error(error))?;
        mask(&mut planned.plan);
        Ok(planned)
    }

    async fn plan_unmasked(&self, flow: &Flow, options: RunOptions) -> Result<Planned, FlowError> {
        let flow = &Flow { hub: self.policy.login(), ..flow.clone() };
        let date = flow.date.unwrap_or_else(|| options.date());
        let RunOptions { dir, feeds, taps, metrics, trace, .. } = options;
        self.policy.check(flow, self, Some(&*dir).filter(|dir| !dir.as_os_str().is_empty()))?;
        unknown_ends(flow, &feeds, &taps)?;
        let models = Models::new(flow.models.clone(), flow.base.clone(), trace, metrics);
        let models = models.with_devices(flow.devices.clone()).with_date(Some(date)).with_login(flow.hub);
        let models = Arc::new(models);
        let registry = registry(models.clone(), feeds, taps, &self.own);
        let flow = Flow { date: Some(date), contents: contents(&models, flow).await, ..flow.clone() };
        let mut plan = Plan::new(&flow, &registry).await?;
        let uses = uses(&plan, &models);
        let cpus: BTreeSet<_> = uses.iter().map(|u| &u.1).filter(|d| d.starts_with("cpu")).collect();
        models.share_cores(cpus.len());
        models.check_room(&uses).await.map_err(|(model, why)| {
            flow.places.attach(FlowError::new(format!("models.{model}.source"), format!("model {model} {why}")))
        })?;
        prompt_notes::note(&mut plan, &models).await;
        Ok(Planned { plan, models, registry })
    }

    /// Starts a run, or goes on with the one in the directory, on the current tokio runtime.
    ///
    /// Everything that can be wrong with the flow and its models' files is found before the run
    /// directory is touched.
    ///
    /// # Errors
    /// As many runs go on as may (domain `Quota`); the flow or a model's files (`User`); the directory, see
    /// [`Run::new`].
    pub async fn start(&self, flow: &Flow, options: RunOptions) -> Result<RunHandle, RunError> {
        let seat = self.policy.seat()?;
        let quotas = self.policy.quotas();
        let config = self.config(flow, options);
        let config = match quotas.seconds {
            Some(seconds) => tokio::time::timeout(Duration::from_secs(seconds), config)
                .await
                .map_err(|_| Quota::Seconds.exceeded(seconds))??,
            None => config.await?,
        };
        let config = RunConfig { seat, quotas, ..config };
        Ok(Run::new(config)?.start())
    }

    async fn config(&self, flow: &Flow, options: RunOptions) -> Result<RunConfig, RunError> {
        let (dir, fresh, recompute) = (options.dir.clone(), options.fresh, options.recompute);
        let fork_of = options.fork_of.clone();
        let open_ended = !(options.feeds.is_empty() && options.taps.is_empty());
        let (metrics, trace, stall_after) = (options.metrics.clone(), options.trace.clone(), options.stall_after);
        let retry_dead = options.retry_dead;
        let hub = Arc::<HubAnswer>::default();
        let Planned { plan, models, registry } = hub.clone().scope(self.planned(flow, options)).await?;
        let flow = &plan.flow;
        refuse_clashes(&registry, &dir, &flow.base, &plan.rounds)
            .map_err(|error| flow.masks.error(flow.places.attach(error)))?;
        open_models(&models, flow, hub).await.map_err(|error| flow.masks.error(error))?;
        let init_adapters = init_adapters(&models, flow).await;
        let masked = |e: RunError| RunError { message: flow.masks.text(&e.message), ..e };
        let init_adapters = init_adapters.map_err(masked)?;
        if let (Some(date), false) = (flow.date, flow.contents.dated.is_empty()) {
            let models = flow.contents.dated.iter().map(String::as_str).collect::<Vec<_>>().join(", ");
            tracing::info!(target: DATE, %date, models, "chat templates ask for the date, and are told this one in all of the run");
        }
        Ok(RunConfig {
            flow_name: flow.masks.text(&flow.name),
            flow_text: flow.to_toml(),
            date: flow.date,
            dir,
            fresh,
            recompute,
            retry_dead,
            fork_of,
            registry,
            metrics,
            trace,
            seed: flow.seed,
            deterministic: flow.deterministic,
            max_dead_letters: flow.max_dead_letters,
            stall_after,
            init_adapters,
            quotas: Quotas::default(),
            seat: None,
            masks: flow.masks.clone(),
            open_ended,
            rounds: plan.rounds,
        })
    }
}

/// What reading a flow file needs of the kinds.
impl KindLookup for Engine {
    fn kind(&self, name: &str) -> Option<Arc<dyn StageKind>> {
        self.own.kind(name).or_else(|| self.builtin.kind(name))
    }

    fn kind_names(&self) -> Vec<&'static str> {
        let mut names: Vec<_> = self.own.names().chain(self.builtin.names()).collect();
        names.sort_unstable();
        names.dedup();
        names
    }
}

/// A planned flow, and what its stages are opened with.
pub struct Planned {
    pub plan: Plan,
    pub models: Arc<Models>,
    pub registry: StageRegistry,
}

/// Where and how a run runs.
pub struct RunOptions {
    dir: PathBuf,
    fresh: bool,
    recompute: bool,
    retry_dead: bool,
    fork_of: Option<PathBuf>,
    metrics: Metrics,
    trace: Arc<Trace>,
    stall_after: Duration,
    feeds: BTreeMap<String, Feed>,
    taps: BTreeMap<String, TapEnd>,
}

impl RunOptions {
    /// A run in the directory `dir`, new or to be resumed.
    pub fn new(dir: impl Into<PathBuf>) -> Self {
        Self {
            dir: dir.into(),
            fresh: false,
            recompute: false,
            retry_dead: false,
            fork_of: None,
            metrics: Metrics::default(),
            trace: Arc::default(),
            stall_after: STALL,
            feeds: BTreeMap::new(),
            taps: BTreeMap::new(),
        }
    }

    /// Moves what the directory holds to its `superseded/` and starts anew.
    #[must_use]
    pub fn fresh(self, fresh: bool) -> Self {
        Self { fresh, ..self }
    }

    /// Goes on although an edit of the flow makes finished work be computed again.
    #[must_use]
    pub fn recompute(self, recompute: bool) -> Self {
        Self { recompute, ..self }
    }

    /// Asks again for rows that were given up; without it they stay given up.
    #[must_use]
    pub fn retry_dead(self, retry_dead: bool) -> Self {
        Self { retry_dead, ..self }
    }

    /// The date of the run that is gone on with, or that is forked; else today.
    fn date(&self) -> NaiveDate {
        let own = Some(&self.dir).filter(|dir| !self.fresh && !dir.as_os_str().is_empty());
        let recorded = own.into_iter().chain(&self.fork_of).find_map(|dir| runs::date_of(dir));
        recorded.unwrap_or_else(today)
    }

    /// A new directory begins with what the run in `dir` has done of the same plan. That run must not
    /// be under way, and stays as it is.
    #[must_use]
    pub fn fork_of(self, dir: impl Into<PathBuf>) -> Self {
        Self { fork_of: Some(dir.into()), ..self }
    }

    /// Where the run's metrics go; without it nowhere.
    #[must_use]
    pub fn metrics(self, metrics: Metrics) -> Self {
        Self { metrics, ..self }
    }

    /// How long a stage may be busy without a sign of life before it is reported
    /// ([`RunEvent::Stalled`](crate::engine::RunEvent)); two minutes by default.
    #[must_use]
    pub fn stall_after(self, stall_after: Duration) -> Self {
        Self { stall_after, ..self }
    }

    /// The stage `stage`, of kind `feed`, takes its rows from `feed`.
    #[must_use]
    pub fn feed(mut self, stage: &str, feed: Feed) -> Self {
        self.feeds.insert(stage.into(), feed);
        self
    }

    /// Takes the rows of the stage `stage`, of kind `tap`.
    pub fn tap(&mut self, stage: &str) -> Tap {
        let (end, rows) = tap();
        self.taps.insert(stage.into(), end);
        rows
    }
}

fn registry(
    models: Arc<Models>,
    feeds: BTreeMap<String, Feed>,
    taps: BTreeMap<String, TapEnd>,
    own: &StageRegistry,
) -> StageRegistry {
    let mut registry = stages::registry(models);
    registry.register(FeedKind { feeds });
    registry.register(TapKind { taps });
    registry.extend(own);
    registry
}

/// Values of the environment decide keys, which are made by now, and stand in nothing that is shown or recorded.
fn mask(plan: &mut Plan) {
    let masks = plan.flow.masks.clone();
    for stage in plan.rounds.iter_mut().flat_map(|round| &mut round.stages) {
        masks.marked_form(&mut stage.parts);
        stage.plan.notes.iter_mut().for_each(|note| *note = masks.text(note));
    }
}

/// A feed or a tap for a stage that the flow doesn't have would wait forever.
fn unknown_ends(flow: &Flow, feeds: &BTreeMap<String, Feed>, taps: &BTreeMap<String, TapEnd>) -> Result<(), FlowError> {
    let names = feeds.keys().map(|name| ("feed", name)).chain(taps.keys().map(|name| ("tap", name)));
    for (kind, name) in names {
        if flow.stage(name).is_none_or(|stage| stage.kind != kind) {
            let message = format!("the program has a {kind} for `{name}`, and the flow has no such stage of that kind");
            return Err(FlowError::new(format!("stages.{name}"), message));
        }
    }
    Ok(())
}

/// Which models the plan's stages use on which devices.
fn uses(plan: &Plan, models: &Models) -> Vec<(String, String)> {
    let stages = plan.rounds.iter().flat_map(|r| &r.stages);
    let uses = stages.flat_map(|s| s.plan.models.iter().map(|m| (&s.spec.kind, m))).flat_map(|(kind, model)| {
        let role = role(kind);
        model.devices.iter().map(move |d| (model.model.clone(), models.place(d, role)))
    });
    uses.collect::<BTreeSet<_>>().into_iter().collect()
}

/// What a stage of this kind asks a model for.
pub fn role(kind: &str) -> Role {
    match kind {
        "sampler" => Role::Sampler,
        "trainer" => Role::Trainer,
        _ => Role::Judge,
    }
}

/// Opens the models and looks at the adapters; what can't be opened is told where it is needed.
async fn contents(models: &Models, flow: &Flow) -> Contents {
    let mut contents = Contents::default();
    for (name, _) in flow.models.iter().filter(|(_, spec)| spec.endpoint.is_none()) {
        let Ok(text) = models.text(name).await else { continue };
        contents.models.insert(name.clone(), text.hash.clone());
        if text.pretrained().asks_for_date() {
            contents.dated.insert(name.clone());
        }
        if !text.pretrained().has_chat() {
            contents.plain.insert(name.clone());
        }
        if text.pretrained().tokenizer.text_bos().is_none() {
            contents.without_bos.insert(name.clone());
        }
    }
    for stage in &flow.stages {
        let Some(dir) = stage.options.get("init_adapter").and_then(toml::Value::as_str) else { continue };
        if let Ok(hash) = lora::content_hash(&flow.base.join(dir)) {
            contents.init_adapters.insert(stage.name.clone(), hash);
        }
    }
    contents
}

/// The error about a model that can't be opened, at the key that is to blame.
pub fn unopened(flow: &Flow, model: &str, error: &LlmError) -> FlowError {
    let message = error.to_string();
    let written = flow.models.get(model).is_some_and(|spec| spec.chat_template.is_some());
    let key = if written && message.contains("the chat template") { "chat_template" } else { "source" };
    flow.places.attach(FlowError::new(format!("models.{model}.{key}"), message))
}

/// Opens what has to be there before a run begins. A hub that was slow in the plan is waited for; one that refused is not
/// asked again.
async fn open_models(models: &Models, flow: &Flow, hub: Arc<HubAnswer>) -> Result<(), FlowError> {
    let Some(silence) = hub.silence().filter(|silence| !silence.slow) else { return open_each(models, flow).await };
    let of_hub = |error: &FlowError| error.message.contains(Silence::SHORT);
    let opened = hub.scope(open_each(models, flow)).await;
    opened.map_err(|error| if of_hub(&error) { error.help(silence.message) } else { error })
}

async fn open_each(models: &Models, flow: &Flow) -> Result<(), FlowError> {
    for name in flow.models.keys() {
        let wrong =
            |key: &str, e: LlmError| flow.places.attach(FlowError::new(format!("models.{name}.{key}"), e.to_string()));
        if models.endpoint(name).map_err(|e| wrong("endpoint", e))?.is_none() {
            models.text(name).await.map_err(|e| unopened(flow, name, &e))?;
        }
    }
    Ok(())
}

/// The adapters that trainers start from, checked against their models.
async fn init_adapters(models: &Models, flow: &Flow) -> Result<BTreeMap<String, AdapterRef>, RunError> {
    let mut adapters = BTreeMap::new();
    for stage in flow.stages.iter().filter(|s| s.kind == "trainer") {
        let text = |key: &str| stage.options.get(key).and_then(toml::Value::as_str);
        let (Some(dir), Some(model)) = (text("init_adapter"), text("model")) else { continue };
        let dir = flow.base.join(dir);
        let wrong = |message: String| {
            flow.places.attach(FlowError::new(format!("stages.{}.init_adapter", stage.name), message))
        };
        let config = models.text(model).await.map_err(|e| wrong(e.to_string()))?.pretrained().config.clone();
        let read = move || -> Result<AdapterRef, ModelError> {
            Ok(AdapterRef { hash: lora::checked_hash(&dir, &config)?, dir, round: 0 })
        };
        let adapter = tokio::task::spawn_blocking(read).await;
        let adapter = adapter.map_err(|e| RunError::of_stage(&stage.name, StageError::internal(e.to_string())))?;
        adapters.insert(stage.name.clone(), adapter.map_err(|e| wrong(e.to_string()))?);
    }
    Ok(adapters)
}
