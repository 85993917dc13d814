//! A round's training: pairs as they arrive, epochs, steps, evaluations, checkpoints, the adapter.
//!
//! The loop is plain data on the caller's side; every touch of a tensor is a quantum of the device
//! thread, so a sampler or a judge on the same device keeps moving.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use futures::future::BoxFuture;
use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, oneshot};

use super::card::{About, card};
use super::checkpoint::{Progress, progress, put, recover};
use super::error::TrainError;
use super::{
    AdamW, Metric, Objective, Pair, Part, Schedule, Session, Stats, Step, Subject, Tally, Trainer, pass_tokens,
};
use crate::model::{Lora, LoraConfig, ModelError, Pretrained, Transformer, export, lora};
use crate::torch::{DeviceThread, Tenants};

/// Steps between two checkpoints.
const CHECKPOINT_STEPS: u64 = 20;
/// Pairs evaluated in one quantum.
const EVALUATED_AT_ONCE: usize = 8;

/// A device thread and the weights to train on it.
pub type Opened = (Arc<DeviceThread>, Transformer);

/// What is trained, how, and where its files go.
pub struct Training {
    /// Gives a device thread and the base on it for every replica; called only when there is something to compute.
    pub open: Box<dyn FnOnce() -> BoxFuture<'static, Result<Vec<Opened>, TrainError>> + Send>,
    pub stage: String,
    /// PEFT directory to go on from; a fresh adapter where there is none.
    pub start: Option<PathBuf>,
    /// PEFT directory that stays as it is below what is trained.
    pub frozen: Option<PathBuf>,
    /// PEFT directory that references are scored under; the base where there is none.
    pub reference: Option<PathBuf>,
    /// Keeps an average of the rounds' adapters in `average/`.
    pub average: Option<Average>,
    /// Of a fresh adapter.
    pub seed: u64,
    /// Of a fresh adapter; `None` trains every weight of the model.
    pub lora: Option<LoraConfig>,
    pub pretrained: Arc<Pretrained>,
    pub objective: Objective,
    pub optimizer: AdamW,
    pub schedule: Schedule,
    pub session: Session,
    pub evaluation: Evaluations,
    pub gradient_checkpointing: bool,
    /// The reference log-probs were computed with the very weights that training starts from.
    pub starts_at_reference: bool,
    /// Hash of all of the above and of base, start and reference by content.
    pub key: String,
    /// Holds `adapter/` (or `model/`), `checkpoint/` and `finished.json`.
    pub dir: PathBuf,
    /// For PEFT's configuration and the model card.
    pub about: About,
}

/// An exponential moving average over rounds.
#[derive(Debug, Clone)]
pub struct Average {
    /// What this round's adapter counts.
    pub alpha: f64,
    /// The average of the rounds before.
    pub before: Option<PathBuf>,
}

/// When validation pairs are looked at beside the end of every epoch, and what for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Evaluations {
    /// Also every so many steps. Not in a streamed epoch: when validation pairs are all there is a matter of chance.
    pub steps: Option<u64>,
    /// The adapter that is best by it is the result.
    pub best: Option<Metric>,
    /// Evaluations in a row that may be no better than the best before training ends.
    pub patience: Option<u64>,
}

/// A training pair and the place of its source row: row `k` of the `n` of the round.
#[derive(Debug, Clone)]
pub struct Placed {
    pub pair: Pair,
    pub k: u64,
    pub n: u64,
}

impl Placed {
    /// [`Pair::chain`] with the place, which the learning rate of a streamed epoch follows from.
    pub(super) fn chain(&self, before: [u8; 32]) -> [u8; 32] {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&self.pair.chain(before)).update(&self.k.to_le_bytes()).update(&self.n.to_le_bytes());
        *hasher.finalize().as_bytes()
    }
}

/// What happened, for metrics and logs.
#[derive(Debug)]
pub enum Event {
    /// `waited` seconds went by before its pairs were there, `seconds` from the end of the step before.
    Step {
        step: u64,
        epoch: f64,
        made: Step,
        waited: f64,
        seconds: f64,
    },
    Evaluation {
        step: u64,
        epoch: f64,
        stats: Stats,
    },
    /// Training begins, or goes on from a checkpoint: what is told after the `told` steps and evaluations before it is
    /// told again.
    Begun {
        told: u64,
        epoch: f64,
    },
    /// What was told before this is to be made durable; `kept` says that it is. A checkpoint or a result that was on
    /// disk before it could tell of steps that nothing else knows of.
    Keep {
        kept: oneshot::Sender<()>,
    },
}

/// What came of it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Outcome {
    pub steps: u64,
    pub skipped: u64,
    pub pairs: usize,
    pub validation_pairs: usize,
    pub first: Option<Stats>,
    pub last: Option<Stats>,
    /// Of the adapter that is the result.
    pub evaluation: Option<Stats>,
    /// Training ended because it got no better.
    #[serde(default)]
    pub stopped_early: bool,
    /// Content of the adapter (or the model), hex.
    pub adapter: String,
}

/// `finished.json`: an adapter that needs no training again.
#[derive(Serialize, Deserialize)]
struct Finished {
    key: String,
    chain: String,
    outcome: Outcome,
}

/// What training leaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Product {
    Adapter,
    Model,
}

impl Product {
    /// Its directory in that of the stage.
    pub fn name(self) -> &'static str {
        match self {
            Self::Adapter => "adapter",
            Self::Model => "model",
        }
    }

    fn content_hash(self, dir: &Path) -> Result<String, ModelError> {
        match self {
            Self::Adapter => lora::content_hash(dir),
            Self::Model => export::content_hash(dir),
        }
    }
}

impl Training {
    fn product(&self) -> Product {
        if self.lora.is_some() { Product::Adapter } else { Product::Model }
    }

    /// Trains on `pairs`, which come in row order, and evaluates on `validation`, where there is to be one.
    ///
    /// # Errors
    /// See [`TrainError`]; the state on disk is then that of the last checkpoint.
    pub async fn run(
        self,
        pairs: mpsc::UnboundedReceiver<Placed>,
        validation: Option<oneshot::Receiver<Vec<Pair>>>,
        events: mpsc::UnboundedSender<Event>,
    ) -> Result<Outcome, TrainError> {
        for name in [Product::Adapter.name(), Product::Model.name(), "average", "checkpoint"] {
            recover(&self.dir.join(name)).map_err(|e| TrainError::file(&self.dir.join(name), e))?;
        }
        let mut feed = Feed { incoming: Some(pairs), validation, ..Feed::default() };
        if let Some(outcome) = finished(&self.key, self.product(), &self.dir, &mut feed).await {
            return Ok(outcome);
        }
        Loop::start(self, feed, events).await?.run().await
    }
}

/// The outcome of an earlier run over the same pairs, whose product is still there.
async fn finished(key: &str, product: Product, dir: &Path, feed: &mut Feed) -> Option<Outcome> {
    let text = std::fs::read(dir.join("finished.json")).ok()?;
    let finished: Finished = serde_json::from_slice(&text).ok().filter(|f: &Finished| f.key == key)?;
    if product.content_hash(&dir.join(product.name())).ok()? != finished.outcome.adapter {
        return None;
    }
    feed.wait_for(usize::MAX).await;
    feed.wait_for_validation().await;
    (feed.chain_of_all() == finished.chain).then_some(finished.outcome)
}

/// Pairs received so far.
#[derive(Default)]
struct Feed {
    incoming: Option<mpsc::UnboundedReceiver<Placed>>,
    validation: Option<oneshot::Receiver<Vec<Pair>>>,
    pairs: Vec<Placed>,
    /// [`Pair::chain`] up to and with each pair.
    chains: Vec<[u8; 32]>,
    held_out: Vec<Pair>,
}

impl Feed {
    /// Waits until `count` pairs are here or no more come.
    async fn wait_for(&mut self, count: usize) {
        while self.pairs.len() < count {
            let Some(incoming) = &mut self.incoming else { return };
            match incoming.recv().await {
                Some(placed) => {
                    self.chains.push(placed.chain(self.chains.last().copied().unwrap_or_default()));
                    self.pairs.push(placed);
                }
                None => self.incoming = None,
            }
        }
    }

    async fn wait_for_validation(&mut self) {
        if let Some(validation) = self.validation.take() {
            self.held_out = validation.await.unwrap_or_default();
        }
    }

    fn chain(&self, count: usize) -> String {
        let last = count.checked_sub(1).and_then(|i| self.chains.get(i)).copied().unwrap_or_default();
        blake3::Hash::from_bytes(last).to_hex().to_string()
    }

    /// Over the training pairs and then the validation pairs.
    fn chain_of_all(&self) -> String {
        let last = self.chains.last().copied().unwrap_or_default();
        let all = self.held_out.iter().fold(last, |before, pair| pair.chain(before));
        blake3::Hash::from_bytes(all).to_hex().to_string()
    }
}

/// Training under way.
struct Loop {
    training: Parts,
    /// They hold the same adapter, and each takes its turn at micro-batches.
    replicas: Vec<Replica>,
    /// At most, of a pass.
    pass_tokens: usize,
    feed: Feed,
    events: mpsc::UnboundedSender<Event>,
    steps: u64,
    /// Where to go on: epoch, and pairs of it that are done.
    epoch: u64,
    done: usize,
    first: Option<Stats>,
    last: Option<Stats>,
    evaluation: Option<Stats>,
    /// The step of the last evaluation.
    evaluated: Option<u64>,
    best: Option<Stats>,
    since_best: u64,
    told: u64,
}

/// A trainer on a device thread.
#[derive(Clone)]
struct Replica {
    device: Arc<DeviceThread>,
    tenant: String,
    stage: String,
}

/// [`Training`] without what was used up by opening it.
struct Parts {
    product: Product,
    pretrained: Arc<Pretrained>,
    stage: String,
    schedule: Schedule,
    session: Session,
    evaluation: Evaluations,
    /// Reference and policy are the same before the first step.
    starts_at_reference: bool,
    objective: Objective,
    average: Option<Average>,
    key: String,
    dir: PathBuf,
    about: About,
}

impl Loop {
    /// Puts the trainer on the device thread, at its start or where a checkpoint of the same pairs is.
    async fn start(t: Training, feed: Feed, events: mpsc::UnboundedSender<Event>) -> Result<Self, TrainError> {
        let (product, mut replicas) = (t.product(), Vec::new());
        for (device, model) in (t.open)().await? {
            let replica = Replica { device, tenant: format!("trainer {}", t.stage), stage: t.stage.clone() };
            let name = replica.tenant.clone();
            let (start, frozen, lora, seed) = (t.start.clone(), t.frozen.clone(), t.lora.clone(), t.seed);
            let reference = t.reference.clone().filter(|_| t.objective.looks_elsewhere());
            let (objective, optimizer, checked) = (t.objective.clone(), t.optimizer, t.starts_at_reference);
            let build = move |tenants: &mut Tenants| -> Result<(), TrainError> {
                let load = |dir: &PathBuf| Lora::load(dir, &model.config, model.device());
                let (frozen, reference) =
                    (frozen.as_ref().map(load).transpose()?, reference.as_ref().map(load).transpose()?);
                let subject = match (&start, lora) {
                    (_, None) => Subject::Model,
                    (Some(dir), Some(_)) => Subject::Adapter { lora: load(dir)?, frozen },
                    (None, Some(lora)) => {
                        Subject::Adapter { lora: Lora::fresh(lora, &model.config, seed, model.device())?, frozen }
                    }
                };
                let mut trainer = Trainer::new(model, subject, objective, optimizer, checked)?;
                trainer.set_reference(reference);
                if t.gradient_checkpointing {
                    trainer.keep_streams_alone();
                }
                tenants.insert(name, trainer);
                Ok(())
            };
            replica.device.quantum("load", &t.stage, build).await??;
            replicas.push(replica);
        }
        let training = Parts {
            product,
            pretrained: t.pretrained,
            stage: t.stage,
            schedule: t.schedule,
            session: t.session,
            evaluation: t.evaluation,
            starts_at_reference: t.starts_at_reference,
            objective: t.objective,
            average: t.average,
            key: t.key,
            dir: t.dir,
            about: t.about,
        };
        let device = replicas.first().map_or(tch::Device::Cpu, |replica| replica.device.device());
        let mut this = Self {
            pass_tokens: training.session.pass_tokens.unwrap_or_else(|| pass_tokens(device)),
            training,
            replicas,
            feed,
            events,
            steps: 0,
            epoch: 0,
            done: 0,
            first: None,
            last: None,
            evaluation: None,
            evaluated: None,
            best: None,
            since_best: 0,
            told: 0,
        };
        this.resume().await?;
        let _ = this.events.send(Event::Begun { told: this.told, epoch: this.passed() });
        Ok(this)
    }

    /// Goes on from the checkpoint where it is of this training and of the pairs that came.
    async fn resume(&mut self) -> Result<(), TrainError> {
        let dir = self.training.dir.join("checkpoint");
        let Ok(Some(found)) = progress(&dir) else { return Ok(()) };
        if found.key != self.training.key {
            return Ok(());
        }
        let consumed = usize::try_from(found.pairs).unwrap_or(usize::MAX);
        let streaming = found.epoch == 0 && self.training.session.streamed;
        self.feed.wait_for(if streaming { consumed } else { usize::MAX }).await;
        let seen = if streaming { consumed } else { self.feed.pairs.len() };
        if self.feed.pairs.len() < seen || self.feed.chain(seen) != found.chain {
            tracing::warn!(stage = self.training.stage, "the checkpoint is of other pairs; training starts anew");
            return Ok(());
        }
        for replica in &self.replicas {
            let dir = dir.clone();
            replica.with("load", move |trainer| trainer.load_checkpoint(&dir).map(|_| ())).await?;
        }
        (self.steps, self.epoch, self.done, self.first) = (found.steps, found.epoch, consumed, found.first);
        (self.evaluation, self.best, self.since_best) = (found.evaluation, found.best, found.since_best);
        (self.evaluated, self.told) = (found.evaluated, found.told);
        Ok(())
    }

    async fn run(mut self) -> Result<Outcome, TrainError> {
        let result = self.epochs().await;
        for Replica { device, tenant, .. } in self.replicas {
            device.call(move |tenants| tenants.remove(&tenant)).await?;
        }
        result
    }

    async fn epochs(&mut self) -> Result<Outcome, TrainError> {
        if self.steps == 0 && !self.training.session.streamed {
            self.evaluate_start().await?;
        }
        while self.epoch < self.training.session.epochs && !self.stopped() {
            self.one_epoch().await?;
            if self.stopped() {
                break;
            }
            if self.evaluated.is_none_or(|at| at < self.steps) {
                self.evaluate().await?;
            }
            (self.epoch, self.done) = (self.epoch + 1, 0);
            self.checkpoint().await?;
        }
        self.finish().await
    }

    /// Whether it has not got better for long enough.
    fn stopped(&self) -> bool {
        self.training.evaluation.patience.is_some_and(|patience| self.since_best >= patience.max(1))
    }

    async fn one_epoch(&mut self) -> Result<(), TrainError> {
        let session = self.training.session;
        let streamed = session.streamed && self.epoch == 0;
        if !streamed {
            self.feed.wait_for(usize::MAX).await;
        }
        // In the streamed epoch the count grows, and the order is that of the rows.
        let order = session.order(self.epoch, if streamed { 0 } else { self.feed.pairs.len() });
        let place = |i: usize| if streamed { i } else { order[i] };
        loop {
            let (before, start) = (self.done, Instant::now());
            let waited = self.micro_batches(streamed, place).await?;
            if self.done == before {
                break;
            }
            self.step(streamed, before, waited, start).await?;
            if self.stopped() {
                break;
            }
        }
        if self.feed.pairs.is_empty() { Err(TrainError::NoPairs) } else { Ok(()) }
    }

    /// The micro-batches of one step, as many in a quantum as go through the model at once. Which these are depends on
    /// the pairs alone, not on when they come: gradients are summed in the same order then. Returns the seconds that
    /// pairs were waited for.
    async fn micro_batches(&mut self, streamed: bool, place: impl Fn(usize) -> usize) -> Result<f64, TrainError> {
        let session = self.training.session;
        let mut groups = vec![Group::default(); self.replicas.len()];
        let (mut running, mut waited) = (Vec::new(), 0.0);
        for i in 0..session.accumulation {
            if streamed {
                let start = Instant::now();
                self.feed.wait_for(self.done + session.batch_size).await;
                waited += start.elapsed().as_secs_f64();
            }
            let end = (self.done + session.batch_size).min(self.feed.pairs.len());
            let micro: Vec<Pair> = (self.done..end).map(|i| self.feed.pairs[place(i)].pair.clone()).collect();
            if micro.is_empty() {
                break;
            }
            self.done = end;
            let turn = i % groups.len();
            if let Some(full) = groups[turn].push(micro, self.pass_tokens) {
                running.push(self.accumulate(turn, full));
            }
        }
        for (turn, group) in groups.into_iter().enumerate().filter(|(_, group)| !group.micro_batches.is_empty()) {
            running.push(self.accumulate(turn, group));
        }
        for made in running {
            made.await.map_err(|e| TrainError::Device(e.to_string()))??;
        }
        Ok(waited)
    }

    /// Lets a replica work on micro-batches, after those that it was given before.
    fn accumulate(&self, turn: usize, group: Group) -> tokio::task::JoinHandle<Result<(), TrainError>> {
        let (replica, tokens) = (self.replicas[turn].clone(), self.pass_tokens);
        let work = move |trainer: &mut Trainer| trainer.accumulate(&group.micro_batches, tokens);
        tokio::spawn(async move { replica.with("train", work).await })
    }

    /// Ends an optimizer step whose first pair is `first` of the epoch.
    async fn step(&mut self, streamed: bool, first: usize, waited: f64, start: Instant) -> Result<(), TrainError> {
        let session = self.training.session;
        let position = match self.feed.pairs.get(first) {
            Some(placed) if streamed => session.streamed(placed.k, placed.n),
            _ => session.exact(self.steps, self.feed.pairs.len()),
        };
        let rate = self.training.schedule.rate(position);
        let Some(made) = self.optimize(rate).await? else { return Ok(()) };
        self.steps += 1;
        self.first.get_or_insert(made.stats);
        self.last = Some(made.stats);
        let seconds = start.elapsed().as_secs_f64();
        self.tell(Event::Step { step: self.steps, epoch: self.passed(), made, waited, seconds });
        if !streamed && self.training.evaluation.steps.is_some_and(|every| self.steps.is_multiple_of(every)) {
            self.evaluate().await?;
        }
        if self.steps.is_multiple_of(CHECKPOINT_STEPS) {
            self.checkpoint().await?;
        }
        Ok(())
    }

    /// One optimizer step: every replica makes the same, from the sum of all replicas' gradients in their order.
    async fn optimize(&self, rate: f64) -> Result<Option<Step>, TrainError> {
        let [only] = self.replicas.as_slice() else {
            let mut sum = Part::default();
            for replica in &self.replicas {
                sum.add(&replica.with("reduce", Trainer::take_part).await?);
            }
            let sum = Arc::new(sum);
            let steps = self.replicas.iter().map(|replica| {
                let sum = sum.clone();
                let step = move |trainer: &mut Trainer| trainer.put_part(&sum).and_then(|()| trainer.step(rate));
                replica.with("optimizer", step)
            });
            return Ok(futures::future::try_join_all(steps).await?.into_iter().flatten().next());
        };
        only.with("optimizer", move |trainer| trainer.step(rate)).await
    }

    /// Epochs passed, with a fraction; in a streamed epoch of source rows.
    fn passed(&self) -> f64 {
        let (done, total) = match self.done.checked_sub(1).and_then(|i| self.feed.pairs.get(i)) {
            Some(last) if self.feed.incoming.is_some() => (last.k + 1, last.n),
            _ => (self.done as u64, self.feed.pairs.len() as u64),
        };
        self.epoch as f64 + done as f64 / total.max(1) as f64
    }

    /// What validation pairs say before the first step. While pairs stream in that is only known where the reference
    /// is what training starts from.
    async fn evaluate_start(&mut self) -> Result<(), TrainError> {
        self.validation().await?;
        let stats = if self.training.starts_at_reference {
            let mut tally = Tally::default();
            for pairs in self.feed.held_out.chunks(self.training.session.batch_size) {
                let scores: Vec<_> = pairs.iter().map(|pair| pair.scores(pair.reference)).collect();
                // answers to other prompts are as likely as under the reference too
                tally.merge(self.training.objective.tally(pairs, &scores, &[]));
            }
            tally.mean()
        } else {
            self.tally_of_validation().await?.mean()
        };
        if let Some(stats) = stats {
            self.tell(Event::Evaluation { step: 0, epoch: 0.0, stats });
        }
        Ok(())
    }

    async fn evaluate(&mut self) -> Result<(), TrainError> {
        let waits = self.feed.validation.is_some();
        self.validation().await?;
        if waits && self.training.session.streamed && self.training.starts_at_reference && self.epoch == 0 {
            self.evaluate_start().await?;
        }
        self.evaluated = Some(self.steps);
        let Some(stats) = self.tally_of_validation().await?.mean() else { return Ok(()) };
        self.evaluation = Some(stats);
        self.tell(Event::Evaluation { step: self.steps, epoch: self.passed(), stats });
        let Some(metric) = self.training.evaluation.best else { return Ok(()) };
        if self.best.is_none_or(|best| metric.of(&stats) > metric.of(&best)) {
            self.with("checkpoint", Trainer::keep_as_best).await?;
            (self.best, self.since_best) = (Some(stats), 0);
        } else {
            self.since_best += 1;
        }
        Ok(())
    }

    /// Waits for the validation pairs, where there are to be any.
    async fn validation(&mut self) -> Result<(), TrainError> {
        if self.feed.validation.is_some() {
            self.feed.wait_for_validation().await;
            if self.feed.held_out.is_empty() {
                return Err(TrainError::NoValidation);
            }
        }
        Ok(())
    }

    /// Losses are those of micro-batches as in training.
    async fn tally_of_validation(&self) -> Result<Tally, TrainError> {
        let session = self.training.session;
        let mut tally = Tally::default();
        for pairs in self.feed.held_out.chunks(session.batch_size * EVALUATED_AT_ONCE.div_ceil(session.batch_size)) {
            let (pairs, tokens) = (pairs.to_vec(), self.pass_tokens);
            let some = self.with("evaluate", move |trainer| trainer.evaluate(&pairs, session.batch_size, tokens));
            tally.merge(some.await?);
        }
        Ok(tally)
    }

    async fn checkpoint(&self) -> Result<(), TrainError> {
        self.keep_told().await;
        let streaming = self.epoch == 0 && self.training.session.streamed;
        let seen = if streaming { self.done } else { self.feed.pairs.len() };
        let progress = Progress {
            key: self.training.key.clone(),
            epoch: self.epoch,
            pairs: self.done as u64,
            chain: self.feed.chain(seen),
            steps: self.steps,
            updates: 0,
            skipped: 0,
            first: self.first,
            evaluation: self.evaluation,
            evaluated: self.evaluated,
            best: self.best,
            since_best: self.since_best,
            told: self.told,
        };
        let dir = self.training.dir.join("checkpoint");
        self.with("checkpoint", move |trainer| {
            let (updates, skipped) = trainer.counters();
            trainer.save_checkpoint(&dir, &Progress { updates, skipped, ..progress })
        })
        .await
    }

    /// Writes the product, its card, and then that it is finished.
    async fn finish(&self) -> Result<Outcome, TrainError> {
        let (product, pretrained) = (self.training.product, self.training.pretrained.clone());
        let (dir, base) = (self.training.dir.join(product.name()), self.training.about.base.clone());
        let (saved, average) = (dir.clone(), self.training.average.clone());
        let averaged = self.training.dir.join("average");
        let skipped = self
            .with("checkpoint", move |trainer| {
                trainer.back_to_best()?;
                match product {
                    Product::Adapter => trainer.save_adapter(&saved, &base)?,
                    Product::Model => trainer.save_model(&saved, &pretrained)?,
                }
                if let Some(Average { alpha, before }) = average {
                    trainer.save_average(&averaged, before.as_deref(), alpha, &base)?;
                }
                Ok(trainer.counters().1)
            })
            .await?;
        let outcome = Outcome {
            steps: self.steps,
            skipped,
            pairs: self.feed.pairs.len(),
            validation_pairs: self.feed.held_out.len(),
            first: self.first,
            last: self.last,
            evaluation: self.best.or(self.evaluation),
            stopped_early: self.stopped(),
            adapter: product.content_hash(&dir)?,
        };
        put(&dir.join("README.md"), card(&self.training.about, &outcome).as_bytes())?;
        let finished =
            Finished { key: self.training.key.clone(), chain: self.feed.chain_of_all(), outcome: outcome.clone() };
        let file = self.training.dir.join("finished.json");
        let text = serde_json::to_vec_pretty(&finished).map_err(|e| TrainError::file(&file, e))?;
        self.keep_told().await;
        put(&file, &text)?;
        Ok(outcome)
    }

    /// Waits until what was told is durable. Who has stopped listening wants nothing kept.
    async fn keep_told(&self) {
        let (kept, told) = oneshot::channel();
        if self.events.send(Event::Keep { kept }).is_ok() {
            let _ = told.await;
        }
    }

    /// A step or an evaluation.
    fn tell(&mut self, event: Event) {
        self.told += 1;
        // Nobody may be listening.
        let _ = self.events.send(event);
    }

    /// One quantum with the first replica, which stands for all.
    async fn with<R, F>(&self, name: &'static str, f: F) -> Result<R, TrainError>
    where
        R: Send + 'static,
        F: FnOnce(&mut Trainer) -> Result<R, TrainError> + Send + 'static,
    {
        let first = self.replicas.first().ok_or_else(|| TrainError::Device("there is no device to train on".into()))?;
        first.with(name, f).await
    }
}

impl Replica {
    /// One quantum with the trainer.
    async fn with<R, F>(&self, name: &'static str, f: F) -> Result<R, TrainError>
    where
        R: Send + 'static,
        F: FnOnce(&mut Trainer) -> Result<R, TrainError> + Send + 'static,
    {
        let tenant = self.tenant.clone();
        let run = move |tenants: &mut Tenants| match tenants.get::<Trainer>(&tenant) {
            Some(trainer) => f(trainer),
            None => Err(TrainError::Device("the trainer is not on its device any more".into())),
        };
        self.device.quantum(name, &self.stage, run).await?
    }
}

/// Micro-batches that go through the model at once.
#[derive(Debug, Clone, Default)]
struct Group {
    micro_batches: Vec<Vec<Pair>>,
    tokens: usize,
}

impl Group {
    /// Adds a micro-batch; gives the group before it back where both are too much for one pass.
    fn push(&mut self, micro: Vec<Pair>, pass_tokens: usize) -> Option<Self> {
        let more = micro.iter().map(Pair::tokens).sum::<usize>();
        let full = !self.micro_batches.is_empty() && self.tokens + more > pass_tokens;
        let before = full.then(|| std::mem::take(self));
        self.micro_batches.push(micro);
        self.tokens += more;
        before
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The same pairs of a longer round are trained at other rates.
    #[test]
    fn the_place_of_a_pair_is_in_the_chain() {
        let pair = Pair {
            row: 3,
            ordinal: 0,
            prompt: vec![1],
            chosen: vec![2],
            rejected: vec![3],
            reference: [0.0; 2],
            label: 1.0,
            weight: 1.0,
            offset: 0.0,
        };
        let chain = |k, n| Placed { pair: pair.clone(), k, n }.chain([0; 32]);
        assert_eq!(chain(3, 8), chain(3, 8));
        assert_ne!(chain(3, 8), chain(3, 9));
        assert_ne!(chain(3, 8), chain(2, 8));
    }
}
