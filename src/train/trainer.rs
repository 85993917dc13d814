//! One adapter, or a whole model, in training: micro-batches, steps, evaluation.
//!
//! Everything here is tensors and runs on a device thread, a quantum at a time. How pairs go through the
//! model and back is in `train::pass`.

use std::time::Instant;

use tch::{Kind, Tensor};

use super::error::TrainError;
use super::loss::{Objective, PairLoss, Scores, Shared, mean_chosen_tokens, mismatched};
use super::optimizer::{AdamW, Flat};
use super::pair::Pair;
use super::pass::{self, Gradients, Way};
use super::stats::{Stats, Tally};
use crate::model::gradient::Keep;
use crate::model::{Lora, Transformer};
use crate::torch::{GradGuard, Tenant, TorchError, Turn};

/// Largest log-ratio of an answer before the first step where policy and reference are the same, and were computed
/// alike.
pub const START_TOLERANCE: f64 = 1e-4;

/// The same where they were computed in passes of other shapes, whose products round otherwise: by the square root of
/// the answer's tokens, in float32 and in 16 bits.
const ROUNDED_TOLERANCE: [f64; 2] = [1e-3, 0.25];

/// Steps in a row that may be skipped for a loss or gradient that is not finite.
const MAX_SKIPPED: u32 = 3;

/// What is trained.
#[expect(clippy::large_enum_variant, reason = "there is one a trainer")]
pub enum Subject {
    /// An adapter, on top of one that stays as it is or of the base alone.
    Adapter { lora: Lora, frozen: Option<Lora> },
    /// Every weight of the model.
    Model,
}

/// The subject with its gradient.
#[expect(clippy::large_enum_variant, reason = "there is one a trainer")]
enum Learner {
    Adapter {
        lora: Lora,
        frozen: Option<Lora>,
        /// Views of the flat gradient in the adapter's shape.
        gradient: Lora,
    },
    Model {
        shapes: Vec<Vec<i64>>,
        /// Views of the flat gradient in the weights' shapes.
        gradient: Vec<Tensor>,
    },
}

/// What is trained, its optimizer and the step under way.
pub struct Trainer {
    pub(super) model: Transformer,
    learner: Learner,
    pub(super) way: Way,
    /// Most tokens of a pass, after some were too many for the memory.
    fits: usize,
    /// What answers to other prompts are compared with: an adapter, or the base.
    reference: Option<Lora>,
    /// What autograd knows: the adapter's matrices, which share the storage of `flat`; or the model's weights, which do
    /// where the model is float32 and else are rounded copies.
    leaves: Vec<Tensor>,
    pub(super) flat: Flat,
    objective: Objective,
    optimizer: AdamW,
    keep: Keep,
    /// Micro-batches since the last step.
    tally: Tally,
    work: Work,
    /// Policy and reference are the same until the first step.
    starts_at_reference: bool,
    skipped_in_row: u32,
    pub(super) skipped: u64,
    /// The parameters that were evaluated best, where they are kept.
    pub(super) best: Option<Tensor>,
}

/// An optimizer step that was made, or skipped.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Step {
    pub stats: Stats,
    /// Of all parameters together, before clipping.
    pub grad_norm: f64,
    pub learning_rate: f64,
    /// Loss or gradient was no finite number, so nothing moved.
    pub skipped: bool,
    pub work: Work,
}

/// What a step took.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Work {
    /// Of prompts and answers.
    pub tokens: u64,
    /// Tokens that went through the model and were padding.
    pub padding: u64,
    pub pairs: u64,
    pub forward_seconds: f64,
    pub backward_seconds: f64,
    pub optimizer_seconds: f64,
}

/// What micro-batches came to on one of several devices, as plain data.
#[derive(Debug, Default)]
pub struct Part {
    gradient: Vec<f32>,
    tally: Tally,
    work: Work,
}

impl Part {
    /// Sums of the micro-batches' gradients, in the order of the adapter's matrices.
    pub fn gradient(&self) -> &[f32] {
        &self.gradient
    }

    /// Means over the pairs.
    pub fn stats(&self) -> Option<Stats> {
        self.tally.mean()
    }

    /// Adds another device's; sums are made in the order of calls.
    pub fn add(&mut self, other: &Self) {
        self.gradient.resize(self.gradient.len().max(other.gradient.len()), 0.0);
        self.gradient.iter_mut().zip(&other.gradient).for_each(|(sum, more)| *sum += more);
        self.tally.merge(other.tally);
        self.work.add(&other.work);
    }
}

impl Work {
    fn add(&mut self, other: &Self) {
        self.tokens += other.tokens;
        self.padding += other.padding;
        self.pairs += other.pairs;
        self.forward_seconds += other.forward_seconds;
        self.backward_seconds += other.backward_seconds;
    }
}

/// Driven by quanta alone: it has no turns of its own.
impl Tenant for Trainer {
    fn turn(&mut self) -> Turn {
        Turn::Idle
    }
}

impl Trainer {
    /// `subject` is what training starts from; its numbers move into a flat buffer in float32. The weights of `model`
    /// stay as they are, whoever shares them. `starts_at_reference` says that the reference log-probabilities were
    /// computed with exactly these weights; the first step then checks it.
    pub fn new(
        model: Transformer,
        subject: Subject,
        objective: Objective,
        optimizer: AdamW,
        starts_at_reference: bool,
    ) -> Result<Self, TrainError> {
        let _no_grad = GradGuard::set(false);
        let shapes = |tensors: &[&Tensor]| tensors.iter().map(|t| t.size()).collect::<Vec<_>>();
        let (model, learner, leaves, flat) = match subject {
            Subject::Adapter { mut lora, frozen } => {
                let tensors: Vec<&Tensor> = lora.named().map(|(_, tensor)| tensor).collect();
                let (shapes, flat) = (shapes(&tensors), Flat::of(&tensors, model.device())?);
                let leaves = flat.leaves(&shapes)?;
                lora.replace(leaves.iter().map(Tensor::shallow_clone));
                let gradient = lora.with(flat.gradients(&shapes)?);
                (model, Learner::Adapter { lora, frozen, gradient }, leaves, flat)
            }
            Subject::Model => {
                let weights = model.parameters();
                let weights: Vec<&Tensor> = weights.iter().collect();
                let (shapes, flat) = (shapes(&weights), Flat::of(&weights, model.device())?);
                let leaf = |(view, weight): (Tensor, &&Tensor)| match model.kind() {
                    Kind::Float => Ok(view),
                    _ => weight.f_detach_copy()?.f_set_requires_grad(true),
                };
                let leaves = flat.leaves(&shapes)?.into_iter().zip(&weights).map(leaf);
                let leaves = leaves.collect::<Result<Vec<_>, _>>().map_err(TorchError::from)?;
                let mut next = leaves.iter();
                let model = model.map(|weight| next.next().unwrap_or(weight).shallow_clone());
                let gradient = flat.gradients(&shapes)?;
                (model, Learner::Model { shapes, gradient }, leaves, flat)
            }
        };
        let way = match learner {
            Learner::Adapter { .. } if model.learns_by_hand() => Way::ByHand,
            _ if model.device().is_cuda() => Way::Padded,
            _ => Way::Graph,
        };
        Ok(Self {
            model,
            learner,
            way,
            fits: usize::MAX,
            reference: None,
            leaves,
            flat,
            objective,
            optimizer,
            keep: Keep::All,
            tally: Tally::default(),
            work: Work::default(),
            starts_at_reference,
            skipped_in_row: 0,
            skipped: 0,
            best: None,
        })
    }

    /// Keeps less of a forward pass and computes it again on the way back (gradient checkpointing), where passes are
    /// gone back through by hand.
    pub fn keep_streams_alone(&mut self) {
        self.keep = Keep::Streams;
    }

    /// The adapter that references are scored under, where it is not the base: for losses that look at answers to
    /// other prompts.
    pub fn set_reference(&mut self, reference: Option<Lora>) {
        self.reference = reference;
    }

    #[cfg(test)]
    pub fn lora(&self) -> &Lora {
        self.stack().pop().expect("an adapter is trained")
    }

    fn stack(&self) -> Vec<&Lora> {
        match &self.learner {
            Learner::Adapter { lora, frozen, .. } => frozen.iter().chain([lora]).collect(),
            Learner::Model { .. } => Vec::new(),
        }
    }

    /// The adapter that training has come to, what is frozen below it included.
    ///
    /// # Errors
    /// Where the whole model is trained.
    pub fn result(&self) -> Result<Lora, TorchError> {
        match &self.learner {
            Learner::Adapter { lora, frozen: None, .. } => Ok(lora.with(lora.named().map(|(_, t)| t.shallow_clone()))),
            Learner::Adapter { lora, frozen: Some(frozen), .. } => Lora::concat(&[(frozen, 1.0), (lora, 1.0)]),
            Learner::Model { .. } => Err(TorchError::Operation("a whole model is no adapter".into())),
        }
    }

    /// Rounds the parameters to the copies that passes read, after they moved. Norms are float32 in any model and are
    /// rounded all the same, as they are stored: what is evaluated is then the model that is written.
    pub(super) fn refresh(&mut self) -> Result<(), TorchError> {
        let Learner::Model { shapes, .. } = &self.learner else { return Ok(()) };
        let kind = self.model.kind();
        if kind == Kind::Float {
            return Ok(());
        }
        let offset = f64::from(u8::from(self.model.config.norm_offset));
        for (leaf, view) in self.leaves.iter_mut().zip(self.flat.leaves(shapes)?) {
            if leaf.kind() == kind {
                leaf.f_copy_(&view)?;
            } else {
                leaf.f_copy_(&view.f_sub_scalar(offset)?.f_to_kind(kind)?)?;
                let _ = leaf.f_add_scalar_(offset)?;
            }
        }
        Ok(())
    }

    /// Optimizer steps made, without skipped ones.
    pub fn steps(&self) -> u64 {
        self.flat.steps
    }

    /// Adds micro-batches to the step under way, each the gradient of the mean loss of its pairs. They share passes of
    /// at most `tokens` tokens where the model can do so; a pair with more is a pass of its own.
    ///
    /// # Errors
    /// [`TrainError::NotTheStart`] before the first step; out of memory.
    pub fn accumulate(&mut self, micro_batches: &[Vec<Pair>], tokens: usize) -> Result<(), TrainError> {
        let places = micro_batches.iter().enumerate().flat_map(|(i, m)| Place::of_pairs(i, m));
        let mut placed: Vec<(&Pair, Place)> = micro_batches.iter().flatten().zip(places).collect();
        if self.way == Way::Padded && !self.objective.couples() && !self.objective.looks_elsewhere() {
            // Of about one length they need little padding; the longest first, so that memory ends early or not at all.
            placed.sort_by_key(|(pair, _)| std::cmp::Reverse(pair.tokens()));
        }
        let (pairs, places): (Vec<Pair>, Vec<Place>) = placed.into_iter().map(|(pair, at)| (pair.clone(), at)).unzip();
        let split = pass::fitting(self.way, &pairs, tokens) < pairs.len();
        // Losses of pairs that are coupled need all log-probs of a micro-batch before the first slope.
        let known = if self.objective.looks_elsewhere() || (self.objective.couples() && split) {
            let mut shared = self.shared(&places, &self.scores(&pairs, tokens, &self.stack())?);
            let elsewhere = micro_batches.iter().map(|pairs| self.elsewhere(pairs, tokens));
            let elsewhere = elsewhere.collect::<Result<Vec<_>, _>>()?;
            for (shared, place) in shared.iter_mut().zip(&places) {
                *shared = shared.with_elsewhere(&elsewhere[place.micro_batch]);
            }
            Some(shared)
        } else {
            None
        };
        let mut losses = Vec::with_capacity(pairs.len());
        while losses.len() < pairs.len() {
            let first = losses.len();
            let tokens = tokens.min(self.fits);
            let range = first..first + pass::fitting(self.way, &pairs[first..], tokens);
            let (known, count) = (known.as_ref().map(|known| &known[range.clone()]), range.len());
            match self.pass(&pairs[range.clone()], &places[range], known) {
                Ok(made) => losses.extend(made),
                // Nothing was added to the gradient yet.
                Err(TrainError::Torch(e)) if e.is_out_of_memory() && self.way == Way::Padded && count > 1 => {
                    self.fits = tokens / 2;
                }
                Err(error) => return Err(error),
            }
        }
        let mut tallies = vec![Tally::default(); micro_batches.len()];
        for ((scores, loss), place) in losses.iter().zip(&places) {
            tallies[place.micro_batch].add(Stats::of(scores, loss, self.objective.beta), 1.0);
        }
        tallies.iter().filter_map(Tally::mean).for_each(|mean| self.tally.add(mean, 1.0));
        Ok(())
    }

    /// Forward and backward of some pairs.
    fn pass(
        &mut self,
        pairs: &[Pair],
        places: &[Place],
        known: Option<&[Shared]>,
    ) -> Result<Vec<(Scores, PairLoss)>, TrainError> {
        let start = Instant::now();
        let (log_probs, pass) = pass::forward(self.way, &self.model, &self.stack(), pairs, self.keep)?;
        let scores = self.scores_of(pairs, &log_probs);
        self.work.tokens += pairs.iter().map(|p| p.tokens() as u64).sum::<u64>();
        self.work.padding += pass.padding();
        self.work.pairs += pairs.len() as u64;
        self.work.forward_seconds += start.elapsed().as_secs_f64();
        if self.starts_at_reference && self.flat.steps == 0 && self.skipped == 0 {
            let alike = self.way != Way::Padded;
            pairs
                .iter()
                .zip(&scores)
                .try_for_each(|(pair, scores)| check_start(pair, scores, alike, self.model.kind()))?;
        }
        let shared = known.map_or_else(|| self.shared(places, &scores), <[Shared]>::to_vec);
        let losses: Vec<_> = scores.iter().zip(&shared).map(|(s, shared)| self.objective.pair(s, shared)).collect();
        let slopes = pairs.iter().zip(places).zip(&losses).flat_map(|((pair, place), loss)| {
            pair.spread(loss.slope.map(|s| s / place.pairs as f64), self.objective.ld_alpha)
        });
        let slopes: Vec<f32> = slopes.collect();
        let start = Instant::now();
        let to = match &self.learner {
            Learner::Adapter { gradient, .. } if self.way == Way::ByHand => Gradients::Views(gradient),
            Learner::Adapter { .. } => Gradients::Leaves(&self.leaves, None),
            Learner::Model { .. } => Gradients::Leaves(&self.leaves, Some(self.model.head_place())),
        };
        if let Some(gradients) = pass.backward(&self.model, &self.stack(), &slopes, &to)? {
            let _no_grad = GradGuard::set(false);
            match &self.learner {
                Learner::Adapter { .. } => self.flat.accumulate(&gradients)?,
                Learner::Model { gradient, .. } => Flat::accumulate_each(gradient, &gradients)?,
            }
        }
        self.work.backward_seconds += start.elapsed().as_secs_f64();
        Ok(scores.into_iter().zip(losses).collect())
    }

    /// What each pair shares with its micro-batch, whose pairs are all here or are not coupled.
    fn shared(&self, places: &[Place], scores: &[Scores]) -> Vec<Shared> {
        let mut all = Vec::with_capacity(places.len());
        let mut rest = scores;
        for group in places.chunk_by(|a, b| a.micro_batch == b.micro_batch) {
            let (own, others) = rest.split_at(group.len());
            rest = others;
            all.resize(all.len() + group.len(), self.objective.shared(group[0].mean_tokens, own));
        }
        all
    }

    /// Scores of the answers of a micro-batch to other prompts of it, where the objective looks at them.
    fn elsewhere(&self, pairs: &[Pair], tokens: usize) -> Result<Vec<Scores>, TrainError> {
        if !self.objective.looks_elsewhere() {
            return Ok(Vec::new());
        }
        let pairs = mismatched(pairs);
        let reference: Vec<&Lora> = self.reference.iter().collect();
        let mut scores = self.scores(&pairs, tokens, &self.stack())?;
        for (scores, reference) in scores.iter_mut().zip(self.scores(&pairs, tokens, &reference)?) {
            scores.reference = reference.policy;
        }
        Ok(scores)
    }

    /// Scores of pairs under a stack of adapters without a way back.
    fn scores(&self, pairs: &[Pair], tokens: usize, stack: &[&Lora]) -> Result<Vec<Scores>, TrainError> {
        let mut all = Vec::with_capacity(pairs.len());
        while all.len() < pairs.len() {
            let rest = &pairs[all.len()..];
            let some = &rest[..pass::fitting(self.way, rest, tokens.min(self.fits))];
            all.extend(self.scores_of(some, &pass::log_probs(self.way, &self.model, stack, some)?));
        }
        Ok(all)
    }

    /// What pairs give to their losses; `log_probs` are of their answers' tokens, in order.
    fn scores_of(&self, pairs: &[Pair], log_probs: &[f32]) -> Vec<Scores> {
        let mut left = log_probs;
        let scores = |pair: &Pair| {
            let (own, rest) = left.split_at((pair.chosen.len() + pair.rejected.len()).min(left.len()));
            left = rest;
            pair.scores(pair.sums(own, self.objective.ld_alpha))
        };
        pairs.iter().map(scores).collect()
    }

    /// Moves what was added to the step under way out of this trainer.
    pub fn take_part(&mut self) -> Result<Part, TrainError> {
        let _no_grad = GradGuard::set(false);
        let (tally, work) = (std::mem::take(&mut self.tally), std::mem::take(&mut self.work));
        Ok(Part { gradient: self.flat.take_gradient()?, tally, work })
    }

    /// Puts the sum of all devices' parts in the place of what was added.
    pub fn put_part(&mut self, part: &Part) -> Result<(), TrainError> {
        let _no_grad = GradGuard::set(false);
        (self.tally, self.work) = (part.tally, part.work);
        Ok(self.flat.put_gradient(&part.gradient)?)
    }

    /// Ends the step under way: averages its micro-batches and moves the adapter. `None` where no
    /// micro-batch was added.
    ///
    /// # Errors
    /// [`TrainError::Diverged`] after too many skipped steps in a row.
    pub fn step(&mut self, learning_rate: f64) -> Result<Option<Step>, TrainError> {
        let _no_grad = GradGuard::set(false);
        let start = Instant::now();
        let tally = std::mem::take(&mut self.tally);
        let mut work = std::mem::take(&mut self.work);
        let Some(stats) = tally.mean() else { return Ok(None) };
        // A loss that is not finite makes its gradient so, and the optimizer then leaves all as is.
        let scale = if stats.loss.is_finite() { 1.0 / tally.weight() } else { f64::NAN };
        let grad_norm = self.flat.step(&self.optimizer, learning_rate, scale)?;
        self.refresh()?;
        let skipped = !grad_norm.is_finite();
        if skipped {
            self.skipped += 1;
            self.skipped_in_row += 1;
        } else {
            self.skipped_in_row = 0;
        }
        if self.skipped_in_row > MAX_SKIPPED {
            return Err(TrainError::Diverged { skipped: self.skipped_in_row });
        }
        work.optimizer_seconds = start.elapsed().as_secs_f64();
        Ok(Some(Step { stats, grad_norm, learning_rate, skipped, work }))
    }

    /// Remembers the parameters as they are.
    pub fn keep_as_best(&mut self) -> Result<(), TrainError> {
        let _no_grad = GradGuard::set(false);
        self.best = Some(self.flat.parameters.f_detach_copy()?);
        Ok(())
    }

    /// Goes back to the parameters that were remembered, where some were.
    pub fn back_to_best(&mut self) -> Result<(), TrainError> {
        let _no_grad = GradGuard::set(false);
        if let Some(best) = &self.best {
            self.flat.parameters.f_copy_(best)?;
        }
        Ok(self.refresh()?)
    }

    /// Losses of micro-batches of `batch_size` pairs under the adapter as it is, without a step; passes are as in
    /// [`Trainer::accumulate`].
    pub fn evaluate(&self, pairs: &[Pair], batch_size: usize, tokens: usize) -> Result<Tally, TrainError> {
        let scores = self.scores(pairs, tokens, &self.stack())?;
        let mut tally = Tally::default();
        for (pairs, scores) in pairs.chunks(batch_size).zip(scores.chunks(batch_size)) {
            tally.merge(self.objective.tally(pairs, scores, &self.elsewhere(pairs, tokens)?));
        }
        Ok(tally)
    }
}

/// Where a pair stands.
#[derive(Debug, Clone, Copy)]
struct Place {
    micro_batch: usize,
    /// Of its micro-batch.
    pairs: usize,
    mean_tokens: f64,
}

impl Place {
    fn of_pairs(micro_batch: usize, pairs: &[Pair]) -> impl Iterator<Item = Self> {
        let place = Self { micro_batch, pairs: pairs.len(), mean_tokens: mean_chosen_tokens(pairs) };
        std::iter::repeat_n(place, pairs.len())
    }
}

/// Both log-ratios have to be 0, not only their difference: a fault that moves both answers alike
/// must not pass.
fn check_start(pair: &Pair, scores: &Scores, alike: bool, kind: Kind) -> Result<(), TrainError> {
    let [chosen, rejected] = scores.ratios();
    let tokens = pair.chosen.len().max(pair.rejected.len()) as f64;
    let rounded = ROUNDED_TOLERANCE[usize::from(kind != Kind::Float)] * tokens.sqrt();
    let tolerance = if alike { START_TOLERANCE } else { rounded };
    if chosen.abs() <= tolerance && rejected.abs() <= tolerance {
        return Ok(());
    }
    Err(TrainError::NotTheStart { row: pair.row, chosen, rejected, tolerance })
}
