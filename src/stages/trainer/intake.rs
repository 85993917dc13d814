//! The running half: rows become pairs with reference log-probs, in row order, while training goes on.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use datafusion::arrow::record_batch::RecordBatch;
use futures::StreamExt;
use futures::future::BoxFuture;
use futures::stream::FuturesUnordered;
use serde_json::{Value, json};
use tokio::sync::{mpsc, oneshot};

use super::pairs::{self, RowPairs, SIDES};
use super::{Algorithm, Reference, Start, TrainerOptions};
use crate::data::shard::Geometry;
use crate::engine::context::Input;
use crate::engine::{AdapterRef, Domain, Message, Stage, StageContext, StageError};
use crate::flow::kind::ModelUse;
use crate::flow::{AdapterChoice, Canonical, Form};
use crate::llm::{AdapterId, Company, Models, Role, ScoreRequest, TextModel, stream_key};
use crate::model::lora::content_hash;
use crate::stages::client::{self, LazyClient};
use crate::stages::rows::{RowError, gather, input_hash};
use crate::train::card::About;
use crate::train::{Average, Event, Outcome, Pair, Placed, Product, Stats, TrainError, Training};

pub struct TrainerStage {
    pub models: Arc<Models>,
    pub options: Arc<TrainerOptions>,
    pub model: ModelUse,
    pub fingerprint: Form,
}

impl Stage for TrainerStage {
    fn run<'a>(&'a mut self, ctx: &'a mut StageContext) -> BoxFuture<'a, Result<(), StageError>> {
        Box::pin(self.train(ctx))
    }
}

impl TrainerStage {
    async fn train(&self, ctx: &mut StageContext) -> Result<(), StageError> {
        let previous = ctx.adapter(&AdapterChoice::Previous { trainer: ctx.stage.clone() }).await?;
        let start = previous.clone().filter(|_| self.options.start == Start::Continue);
        let frozen = previous.clone().filter(|_| self.options.start == Start::FreshOnMerged);
        let reference = match self.options.reference {
            Reference::Base => None,
            Reference::Previous => previous.clone(),
            Reference::Ema => previous.as_ref().map(average).transpose()?,
        };
        let text = client::text(&self.models, &self.model).await?;
        let hash = |adapter: &Option<AdapterRef>| adapter.as_ref().map(|a| &a.hash).form();
        let content = Form::List(vec![self.fingerprint.clone(), hash(&start), hash(&frozen)]);
        let key = client::content_key(ctx, &content, &text, reference.as_ref());
        ctx.open_journal(&key)?;

        let clients = self.clients();
        let client = clients.first().cloned().ok_or_else(|| StageError::internal("a trainer without a device"))?;
        let (pairs, released) = mpsc::unbounded_channel();
        let validated = ctx.inputs.iter().any(|input| input.key == SIDES[1]);
        let (held_out, validation) = validated.then(oneshot::channel).unzip();
        let (tell, mut events) = mpsc::unbounded_channel();
        let mut training = std::pin::pin!(
            self.training(ctx, &text, clients, key, Adapters { start, frozen, reference: reference.clone() })
                .run(released, validation, tell)
        );
        let scorer = Scorer {
            client,
            text,
            options: self.options.clone(),
            reference: reference.map(client::adapter_id),
            stage: ctx.stage.clone(),
        };
        let mut intake = Intake::new(ctx, scorer, pairs, held_out);
        let outcome = loop {
            // While it isn't polled, training goes no further than the step it is in.
            ctx.unpaused().await;
            tokio::select! {
                // What is ready is taken before more is trained, so that the stream stays ahead.
                biased;
                Some(event) = events.recv() => report(ctx, &self.options, event).await?,
                more = intake.turn(ctx), if intake.working() => {
                    more?;
                    if !intake.working() {
                        ctx.rows_are_done();
                    }
                }
                outcome = &mut training => break outcome.map_err(|error| intake.explained(error))?,
            }
        };
        while let Ok(event) = events.try_recv() {
            report(ctx, &self.options, event).await?;
        }
        conclude(ctx, &intake, &outcome);
        Ok(())
    }

    /// One for each device that trains; the reference is on the first.
    fn clients(&self) -> Vec<Arc<LazyClient>> {
        let on =
            |device: &String| Arc::new(LazyClient::on(self.models.clone(), &self.model.model, device, Role::Trainer));
        self.model.devices.iter().map(on).collect()
    }

    fn training(
        &self,
        ctx: &StageContext,
        text: &TextModel,
        clients: Vec<Arc<LazyClient>>,
        key: String,
        adapters: Adapters,
    ) -> Training {
        let options = &self.options;
        let Adapters { start, frozen, reference } = adapters;
        let hash = |adapter: &Option<AdapterRef>| adapter.as_ref().map(|a| a.hash.clone());
        let below = if start.is_some() { hash(&start) } else { hash(&frozen) };
        let starts_at_reference = below == hash(&reference);
        let average = (options.reference == Reference::Ema)
            .then(|| Average { alpha: options.ema_alpha, before: reference.as_ref().map(|a| a.dir.clone()) });
        let open = move || -> BoxFuture<'static, _> {
            Box::pin(async move {
                let mut opened = Vec::with_capacity(clients.len());
                for client in clients {
                    let client = client.get().await.map_err(|e| TrainError::Device(e.to_string()))?;
                    let model = client.transformer().await.map_err(|e| TrainError::Device(e.to_string()))?;
                    opened.push((client.device().clone(), model));
                }
                Ok(opened)
            })
        };
        Training {
            open: Box::new(open),
            stage: ctx.stage.clone(),
            start: start.as_ref().map(|a| a.dir.clone()),
            frozen: frozen.map(|a| a.dir),
            reference: reference.map(|a| a.dir),
            average,
            seed: stream_key(ctx.seed, &ctx.stage, ctx.round),
            lora: options.lora.clone(),
            pretrained: text.pretrained().clone(),
            objective: options.objective.clone(),
            optimizer: options.optimizer,
            schedule: options.schedule,
            session: options.session,
            evaluation: options.evaluation,
            gradient_checkpointing: options.gradient_checkpointing,
            // A fresh adapter changes nothing yet: it is what lies below it.
            starts_at_reference: options.algorithm == Algorithm::Dpo && starts_at_reference,
            key,
            dir: ctx.dir.clone(),
            about: About {
                base: ctx.masked(&text.pretrained().source.to_string()),
                flow: ctx.flow.clone(),
                stage: ctx.stage.clone(),
                round: ctx.round,
                start: below,
                keys: ctx.masked_json(serde_json::to_value(self.fingerprint.get("keys")).unwrap_or_default()),
            },
        }
    }
}

/// What a round's training begins with.
struct Adapters {
    start: Option<AdapterRef>,
    frozen: Option<AdapterRef>,
    reference: Option<AdapterRef>,
}

/// The average of the rounds' adapters that the trainer of `adapter` left beside it; the adapter itself where no
/// trainer did.
fn average(adapter: &AdapterRef) -> Result<AdapterRef, StageError> {
    let dir = adapter.dir.with_file_name("average");
    if !dir.exists() {
        return Ok(adapter.clone());
    }
    let hash = content_hash(&dir).map_err(|e| StageError::user(e.to_string()))?;
    Ok(AdapterRef { dir, hash, round: adapter.round })
}

/// Asks the reference.
struct Scorer {
    client: Arc<LazyClient>,
    text: Arc<TextModel>,
    options: Arc<TrainerOptions>,
    reference: Option<AdapterId>,
    stage: String,
}

impl Scorer {
    /// The pairs with the sums of their answers' reference log-probs, computed the way the trainer computes.
    async fn score(&self, mut pairs: Vec<Pair>) -> Result<Vec<Pair>, RowError> {
        if self.options.algorithm == Algorithm::Sft {
            pairs.iter_mut().for_each(|pair| pair.reference = [0.0; 2]);
            return Ok(pairs);
        }
        let client = self.client.get().await?;
        let company = match (client.device().device().is_cuda(), &self.options.lora) {
            // Passes that are filled up come first there, and round as they are filled.
            (true, _) => Company::Any,
            // The numbers of the trainer itself.
            (false, Some(_)) => Company::Indifferent,
            (false, None) => Company::Alone,
        };
        for pair in &mut pairs {
            let request = ScoreRequest {
                prompt: pair.prompt.clone(),
                answers: vec![pair.chosen.clone(), pair.rejected.clone()],
                adapter: self.reference.clone(),
                company,
                stage: self.stage.clone(),
            };
            let scores = client.score(request).await.map_err(client::row_error)?;
            pair.reference = pair.sums(&scores.logprobs.concat(), self.options.objective.ld_alpha);
            if !pair.reference.iter().all(|r| r.is_finite()) {
                return Err(RowError::DeadLetter("the reference's log-probability is no finite number".into()));
            }
        }
        Ok(pairs)
    }
}

/// A row that is being scored.
type Scored = (usize, u64, Result<Vec<Pair>, RowError>);

/// Both inputs, from rows to pairs in row order.
struct Intake {
    scorer: Arc<Scorer>,
    sides: [Side; 2],
    running: FuturesUnordered<BoxFuture<'static, Scored>>,
    /// Hash and rows of what is running.
    inputs: BTreeMap<(usize, u64), (u64, RecordBatch)>,
    pairs: Option<mpsc::UnboundedSender<Placed>>,
    held_out: Option<oneshot::Sender<Vec<Pair>>>,
    dropped: BTreeMap<&'static str, u64>,
    cut: u64,
}

/// One input.
#[derive(Default)]
struct Side {
    open: bool,
    gathered: BTreeMap<u64, Vec<RecordBatch>>,
    watermark: u64,
    scoring: BTreeSet<u64>,
    ready: BTreeMap<u64, Vec<Pair>>,
}

impl Side {
    /// Rows below this are complete and scored.
    fn settled(&self) -> u64 {
        self.scoring.first().map_or(self.watermark, |oldest| self.watermark.min(*oldest))
    }

    fn release(&mut self) -> Vec<Pair> {
        let later = self.ready.split_off(&self.settled());
        std::mem::replace(&mut self.ready, later).into_values().flatten().collect()
    }
}

impl Intake {
    fn new(
        ctx: &StageContext,
        scorer: Scorer,
        pairs: mpsc::UnboundedSender<Placed>,
        held_out: Option<oneshot::Sender<Vec<Pair>>>,
    ) -> Self {
        let side = |name: &str| Side { open: ctx.inputs.iter().any(|i| i.key == name), ..Side::default() };
        let sides = SIDES.map(side);
        Self {
            scorer: Arc::new(scorer),
            sides,
            running: FuturesUnordered::new(),
            inputs: BTreeMap::new(),
            pairs: Some(pairs),
            held_out,
            dropped: BTreeMap::new(),
            cut: 0,
        }
    }

    /// An error of training; of one that got no pairs, why they were left out.
    fn explained(&self, error: TrainError) -> StageError {
        let dropped: Vec<String> = self.dropped.iter().map(|(reason, times)| format!("{reason} ({times})")).collect();
        match error {
            TrainError::NoPairs if !dropped.is_empty() => {
                let reasons = dropped.join(", ");
                StageError::user(format!(
                    "not one pair can be trained on: {reasons}; look at the rows that the trainer reads"
                ))
            }
            error => stage_error(error),
        }
    }

    fn working(&self) -> bool {
        self.sides.iter().any(|s| s.open) || !self.running.is_empty()
    }

    /// One message or one scored row.
    async fn turn(&mut self, ctx: &mut StageContext) -> Result<(), StageError> {
        let open = [self.sides[0].open, self.sides[1].open];
        tokio::select! {
            Some(scored) = self.running.next() => self.scored(ctx, scored).await?,
            (side, message) = recv(&mut ctx.inputs, open), if open != [false, false] => match message? {
                Some(message) => self.received(ctx, side, message).await?,
                None => {
                    self.sides[side].open = false;
                    self.sides[side].watermark = u64::MAX;
                }
            },
        }
        self.release(ctx);
        Ok(())
    }

    async fn received(&mut self, ctx: &mut StageContext, side: usize, message: Message) -> Result<(), StageError> {
        let watermark = message.watermark;
        for (row, rows) in gather(&mut self.sides[side].gathered, message)? {
            // Filtered, or of the other part.
            let Some(rows) = rows else { continue };
            match pairs::of_rows(&self.scorer.options, &self.scorer.text, row, &rows) {
                Ok(made) => self.ask(ctx, side, row, rows, made).await?,
                Err(RowError::DeadLetter(reason)) => {
                    ctx.dead_letter_under(key(side, row), row, &reason, &rows).await?;
                }
                Err(RowError::Stage(error)) => return Err(error),
            }
        }
        self.sides[side].watermark = self.sides[side].watermark.max(watermark);
        Ok(())
    }

    /// Recalls the reference's log-probs or asks for them.
    async fn ask(
        &mut self,
        ctx: &mut StageContext,
        side: usize,
        row: u64,
        rows: RecordBatch,
        made: RowPairs,
    ) -> Result<(), StageError> {
        self.cut += u64::from(made.cut);
        for reason in made.dropped {
            *self.dropped.entry(reason).or_default() += 1;
        }
        let mut pairs = made.pairs;
        if pairs.is_empty() {
            return Ok(());
        }
        let hash = input_hash(&rows)?;
        if let Some(record) = ctx.recorded(key(side, row), hash) {
            // A row without one was given up.
            if let Some(record) = &record {
                pairs::recall(&mut pairs, record)?;
                self.sides[side].ready.insert(row, pairs);
            }
            return ctx.replay(key(side, row), record).await;
        }
        self.sides[side].scoring.insert(row);
        self.inputs.insert((side, row), (hash, rows));
        let scorer = self.scorer.clone();
        self.running.push(Box::pin(async move { (side, row, scorer.score(pairs).await) }));
        Ok(())
    }

    async fn scored(&mut self, ctx: &mut StageContext, (side, row, result): Scored) -> Result<(), StageError> {
        self.sides[side].scoring.remove(&row);
        let Some((hash, rows)) = self.inputs.remove(&(side, row)) else { return Ok(()) };
        match result {
            Ok(pairs) => {
                let record = pairs::record(self.scorer.options.algorithm, side, &rows, &pairs)?;
                ctx.finish(key(side, row), hash, Some(record)).await?;
                self.sides[side].ready.insert(row, pairs);
                Ok(())
            }
            Err(RowError::DeadLetter(reason)) => ctx.dead_letter_under(key(side, row), row, &reason, &rows).await,
            Err(RowError::Stage(error)) => Err(error),
        }
    }

    /// Hands over what is settled; closes a side that has ended.
    fn release(&mut self, ctx: &StageContext) {
        let [train, validation] = &mut self.sides;
        let shard = ctx.shard();
        let geometry =
            shard.map(|s| Geometry { index: s.index, count: s.count, contiguous: s.contiguous, total: s.total });
        if let Some(sender) = &self.pairs {
            for pair in train.release() {
                let n = geometry.map_or(1, |g| g.rows());
                let k = geometry.and_then(|g| g.ordinal(pair.row)).unwrap_or(0);
                // Training that failed tells so itself.
                let _ = sender.send(Placed { pair, k, n });
            }
        }
        if !train.open && train.scoring.is_empty() {
            self.pairs = None;
        }
        if !validation.open
            && validation.scoring.is_empty()
            && let Some(sender) = self.held_out.take()
        {
            let _ = sender.send(validation.release());
        }
    }
}

/// Where a row of a side is kept in the journal: two sides may hold rows of two sources.
fn key(side: usize, row: u64) -> u64 {
    row * 2 + side as u64
}

/// The next message of any input that is still open, with the side it is for.
async fn recv(inputs: &mut [Input], open: [bool; 2]) -> (usize, Result<Option<Message>, StageError>) {
    let next = inputs.iter_mut().filter_map(|input| {
        let side = SIDES.iter().position(|name| *name == input.key)?;
        open[side].then(|| Box::pin(async move { (side, input.recv().await) }))
    });
    futures::future::select_all(next).await.0
}

fn stage_error(error: TrainError) -> StageError {
    let message = error.to_string();
    let domain = match error {
        TrainError::File { .. } | TrainError::Device(_) => Domain::External,
        TrainError::Torch(_) => Domain::Internal,
        _ => Domain::User,
    };
    StageError { domain, message }
}

async fn report(ctx: &StageContext, options: &TrainerOptions, event: Event) -> Result<(), StageError> {
    let algorithm = options.algorithm;
    let share = |epoch: f64| epoch / options.session.epochs.max(1) as f64;
    let labels = [("stage", ctx.stage.as_str())];
    let gauge = |name, value| ctx.metrics.gauge(name, &labels).set(value);
    match event {
        Event::Step { step, epoch, made, waited, seconds } => {
            let work = made.work;
            gauge("flowrun_train_loss", made.stats.loss);
            if algorithm == Algorithm::Dpo {
                gauge("flowrun_train_reward_margin", made.stats.margins);
                gauge("flowrun_train_reward_accuracy", made.stats.accuracies);
                sides(ctx, "flowrun_train_rewards", made.stats.chosen, made.stats.rejected);
                sides(ctx, "flowrun_train_logps", made.stats.logps_chosen, made.stats.logps_rejected);
            }
            gauge("flowrun_train_epoch", epoch);
            ctx.progress(share(epoch));
            gauge("flowrun_train_grad_norm", made.grad_norm);
            gauge("flowrun_train_learning_rate", made.learning_rate);
            ctx.metrics.counter("flowrun_train_steps_total", &labels).increment(1);
            ctx.metrics.counter("flowrun_train_tokens_total", &labels).increment(work.tokens);
            ctx.metrics.counter("flowrun_train_pairs_total", &labels).increment(work.pairs);
            ctx.metrics.counter("flowrun_train_padding_tokens_total", &labels).increment(work.padding);
            ctx.metrics.histogram("flowrun_train_step_seconds", &labels).record(seconds);
            let parts = [
                ("forward", work.forward_seconds),
                ("backward", work.backward_seconds),
                ("optimizer", work.optimizer_seconds),
                ("wait", waited),
            ];
            for (part, taken) in parts {
                let labels = [("stage", ctx.stage.as_str()), ("part", part)];
                ctx.metrics.gauge("flowrun_train_seconds_total", &labels).increment(taken);
            }
            let mut fields = json!({
                "step": step, "epoch": epoch, "grad_norm": made.grad_norm, "learning_rate": made.learning_rate,
                "num_tokens": work.tokens, "skipped": made.skipped,
                "tokens_per_second": work.tokens as f64 / f64::max(seconds, 1e-9),
                "padding": work.padding as f64 / (work.tokens + work.padding).max(1) as f64,
                "seconds": parts.map(|(part, taken)| (part.to_owned(), json!(taken))).into_iter().collect::<Value>(),
            });
            merge(&mut fields, algorithm, made.stats, "");
            ctx.event("step", fields);
            ctx.token_counter().add(work.tokens, 0);
        }
        Event::Evaluation { step, epoch, stats } => {
            gauge("flowrun_train_eval_loss", stats.loss);
            if algorithm == Algorithm::Dpo {
                gauge("flowrun_train_eval_reward_margin", stats.margins);
                gauge("flowrun_train_eval_reward_accuracy", stats.accuracies);
            }
            let mut fields = json!({ "step": step, "epoch": epoch });
            merge(&mut fields, algorithm, stats, "eval_");
            ctx.event("evaluation", fields);
        }
        Event::Begun { told, epoch } => {
            ctx.forget_after(told)?;
            ctx.progress(share(epoch));
        }
        Event::Keep { kept } => {
            ctx.keep_events().await?;
            // Training that has ended meanwhile doesn't wait.
            let _ = kept.send(());
        }
    }
    Ok(())
}

fn sides(ctx: &StageContext, name: &'static str, chosen: f64, rejected: f64) {
    for (side, value) in [("chosen", chosen), ("rejected", rejected)] {
        ctx.metrics.gauge(name, &[("stage", ctx.stage.as_str()), ("side", side)]).set(value);
    }
}

fn merge(fields: &mut Value, algorithm: Algorithm, stats: crate::train::Stats, prefix: &str) {
    let named = serde_json::to_value(stats).unwrap_or_default();
    // Without a rejected answer nothing is rewarded.
    let told = |name: &str| algorithm == Algorithm::Dpo || ["loss", "logps/chosen"].contains(&name);
    for (name, value) in named.as_object().into_iter().flatten().filter(|(name, _)| told(name)) {
        fields[format!("{prefix}{name}")] = value.clone();
    }
}

/// Nats by which the chosen answers became less likely than under the reference, where it is more than one and
/// they are preferred nevertheless: the loss then falls although the model gets worse at both.
fn chosen_fall(beta: f64, outcome: &Outcome) -> Option<f64> {
    let stats = outcome.evaluation.or(outcome.last)?;
    let fall = -stats.chosen / beta;
    (stats.margins > 0.0 && fall > 1.0).then_some(fall)
}

/// Publishes an adapter and puts the round's figures into the summary.
fn conclude(ctx: &StageContext, intake: &Intake, outcome: &Outcome) {
    let product = if intake.scorer.options.lora.is_some() { Product::Adapter } else { Product::Model };
    let dir = ctx.dir.join(product.name());
    if product == Product::Adapter {
        ctx.publish_adapter(AdapterRef { dir: dir.clone(), hash: outcome.adapter.clone(), round: ctx.round });
    }
    let algorithm = intake.scorer.options.algorithm;
    if let Some(fall) =
        chosen_fall(intake.scorer.options.objective.beta, outcome).filter(|_| algorithm == Algorithm::Dpo)
    {
        tracing::warn!(
            stage = ctx.stage,
            round = ctx.round,
            "chosen answers became less likely by {fall:.1} nats on average while the margin rose; \
             loss = [\"sigmoid\", \"sft\"] holds them up, and so does a lower learning rate"
        );
    }
    let mut evaluation = json!({});
    if let Some(stats) = outcome.evaluation {
        merge(&mut evaluation, algorithm, stats, "eval_");
    }
    let margin = |stats: Option<Stats>| stats.filter(|_| algorithm == Algorithm::Dpo).map(|s| s.margins);
    let mut figures = json!({
        "steps": outcome.steps,
        "skipped_steps": outcome.skipped,
        "pairs": outcome.pairs,
        "validation_pairs": outcome.validation_pairs,
        "first_loss": outcome.first.map(|s| s.loss),
        "first_margin": margin(outcome.first),
        "last_loss": outcome.last.map(|s| s.loss),
        "last_margin": margin(outcome.last),
        "eval": evaluation,
        "dropped": intake.dropped,
        "cut_answers": intake.cut,
        "stopped_early": outcome.stopped_early,
    });
    figures[product.name()] = json!(dir.display().to_string());
    figures[format!("{}_hash", product.name())] = json!(outcome.adapter);
    ctx.summary("train", figures);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_that_fall_while_margins_rise_are_told() {
        let outcome = |chosen, margins| Outcome {
            steps: 1,
            skipped: 0,
            pairs: 1,
            validation_pairs: 0,
            first: None,
            last: Some(Stats { chosen, margins, ..Stats::default() }),
            evaluation: None,
            stopped_early: false,
            adapter: String::new(),
        };
        assert_eq!(chosen_fall(0.1, &outcome(-0.5, 0.3)), Some(5.0));
        assert_eq!(chosen_fall(0.1, &outcome(0.5, 0.3)), None, "they rise");
        assert_eq!(chosen_fall(0.1, &outcome(-0.05, 0.3)), None, "by half a nat");
        assert_eq!(chosen_fall(0.1, &outcome(-0.5, -0.3)), None, "that is no success anyway");
    }
}
