//! One adapter in training: micro-batches, steps, evaluation.
//!
//! Everything here is tensors and runs on a device thread, a quantum at a time. How pairs go through the
//! model and back is in [`super::pass`].

use std::time::Instant;

use tch::Tensor;

use super::error::TrainError;
use super::loss::{Objective, Scores};
use super::optimizer::{AdamW, Flat};
use super::pair::Pair;
use super::pass::{self, Gradients};
use super::stats::{Stats, Tally};
use crate::model::gradient::Keep;
use crate::model::{Lora, Transformer};
use crate::torch::{GradGuard, Tenant, Turn};

/// Largest log-ratio of a pair before the first step where policy and reference are the same.
pub const START_TOLERANCE: f64 = 1e-4;

/// Steps in a row that may be skipped for a loss or gradient that is not finite.
const MAX_SKIPPED: u32 = 3;

/// An adapter, its optimizer and the step under way.
pub struct Trainer {
    pub(super) model: Transformer,
    pub(super) lora: Lora,
    /// The adapter's matrices, leaves that share the storage of `flat`.
    leaves: Vec<Tensor>,
    pub(super) flat: Flat,
    /// Views of the flat gradient in the adapter's shape.
    gradient: Lora,
    objective: Objective,
    optimizer: AdamW,
    /// Micro-batches since the last step.
    tally: Tally,
    work: Work,
    /// Policy and reference are the same until the first step.
    starts_at_reference: bool,
    skipped_in_row: u32,
    pub(super) skipped: u64,
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
    pub forward_seconds: f64,
    pub backward_seconds: f64,
    pub optimizer_seconds: f64,
}

/// Driven by quanta alone: it has no turns of its own.
impl Tenant for Trainer {
    fn turn(&mut self) -> Turn {
        Turn::Idle
    }
}

impl Trainer {
    /// `lora` is what training starts from; its matrices move into a flat buffer.
    /// `starts_at_reference` says that the reference log-probabilities were computed with exactly
    /// this adapter (or the base, where it is fresh); the first step then checks it.
    pub fn new(
        model: Transformer,
        mut lora: Lora,
        objective: Objective,
        optimizer: AdamW,
        starts_at_reference: bool,
    ) -> Result<Self, TrainError> {
        let _no_grad = GradGuard::set(false);
        let (shapes, flat) = {
            let tensors: Vec<&Tensor> = lora.named().map(|(_, tensor)| tensor).collect();
            (tensors.iter().map(|t| t.size()).collect::<Vec<_>>(), Flat::of(&tensors, model.device())?)
        };
        let leaves = flat.leaves(&shapes)?;
        lora.replace(leaves.iter().map(Tensor::shallow_clone));
        let gradient = lora.with(flat.gradients(&shapes)?);
        Ok(Self {
            model,
            lora,
            leaves,
            gradient,
            flat,
            objective,
            optimizer,
            tally: Tally::default(),
            work: Work::default(),
            starts_at_reference,
            skipped_in_row: 0,
            skipped: 0,
        })
    }

    pub fn lora(&self) -> &Lora {
        &self.lora
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
        let pairs: Vec<Pair> = micro_batches.iter().flatten().cloned().collect();
        // Of each pair: its part of its micro-batch's mean, and what that mean is over.
        let places: Vec<(usize, f64, f64)> = micro_batches
            .iter()
            .enumerate()
            .flat_map(|(i, m)| m.iter().map(move |_| (i, 1.0 / m.len() as f64, mean_chosen_tokens(m))))
            .collect();
        let mut tallies = vec![Tally::default(); micro_batches.len()];
        let mut first = 0;
        while first < pairs.len() {
            let count = pass::fitting(&self.model, &pairs[first..], tokens);
            let range = first..first + count;
            self.pass(&pairs[range.clone()], &places[range], &mut tallies)?;
            first += count;
        }
        for mean in tallies.iter().filter_map(Tally::mean) {
            self.tally.add(mean, 1.0);
        }
        Ok(())
    }

    /// Forward and backward of some pairs.
    fn pass(&mut self, pairs: &[Pair], places: &[(usize, f64, f64)], tallies: &mut [Tally]) -> Result<(), TrainError> {
        let start = Instant::now();
        let (log_probs, pass) = pass::forward(&self.model, &self.lora, pairs, Keep::All)?;
        self.work.tokens += pairs.iter().map(|p| p.tokens() as u64).sum::<u64>();
        self.work.padding += pass.padding();
        self.work.forward_seconds += start.elapsed().as_secs_f64();
        let mut left = log_probs.as_slice();
        let mut slopes = Vec::with_capacity(log_probs.len());
        for (pair, &(micro_batch, share, mean_tokens)) in pairs.iter().zip(places) {
            let scores = self.take_scores(pair, &mut left);
            if self.starts_at_reference && self.flat.steps == 0 && self.skipped == 0 {
                check_start(pair, &scores)?;
            }
            let loss = self.objective.pair(&scores, mean_tokens);
            slopes.extend(pair.spread(loss.slope.map(|s| s * share), self.objective.ld_alpha));
            tallies[micro_batch].add(Stats::of(&scores, &loss, self.objective.beta), 1.0);
        }
        let start = Instant::now();
        let to = Gradients { views: &self.gradient, leaves: &self.leaves };
        if let Some(gradients) = pass.backward(&self.model, &self.lora, &slopes, &to)? {
            let _no_grad = GradGuard::set(false);
            self.flat.accumulate(&gradients)?;
        }
        self.work.backward_seconds += start.elapsed().as_secs_f64();
        Ok(())
    }

    /// What a pair gives to its loss; its tokens' log-probs are the first of `left`, which loses them.
    fn take_scores(&self, pair: &Pair, left: &mut &[f32]) -> Scores {
        let (own, rest) = left.split_at((pair.chosen.len() + pair.rejected.len()).min(left.len()));
        *left = rest;
        pair.scores(pair.sums(own, self.objective.ld_alpha))
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

    /// Losses of pairs under the adapter as it is, without a step; passes are as in [`Trainer::accumulate`].
    pub fn evaluate(&self, pairs: &[Pair], tokens: usize) -> Result<Tally, TrainError> {
        let mean_tokens = mean_chosen_tokens(pairs);
        let (mut tally, mut rest) = (Tally::default(), pairs);
        while !rest.is_empty() {
            let (some, others) = rest.split_at(pass::fitting(&self.model, rest, tokens));
            rest = others;
            let log_probs = pass::log_probs(&self.model, &self.lora, some)?;
            let mut left = log_probs.as_slice();
            for pair in some {
                let scores = self.take_scores(pair, &mut left);
                let loss = self.objective.pair(&scores, mean_tokens);
                tally.add(Stats::of(&scores, &loss, self.objective.beta), 1.0);
            }
        }
        Ok(tally)
    }
}

fn mean_chosen_tokens(pairs: &[Pair]) -> f64 {
    let tokens: usize = pairs.iter().map(|p| p.chosen.len()).sum();
    tokens as f64 / pairs.len().max(1) as f64
}

/// Both log-ratios have to be 0, not only their difference: a fault that moves both answers alike
/// must not pass.
fn check_start(pair: &Pair, scores: &Scores) -> Result<(), TrainError> {
    let [chosen, rejected] = scores.ratios();
    if chosen.abs() <= START_TOLERANCE && rejected.abs() <= START_TOLERANCE {
        return Ok(());
    }
    Err(TrainError::NotTheStart { row: pair.row, chosen, rejected, tolerance: START_TOLERANCE })
}
