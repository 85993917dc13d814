//! One adapter in training: micro-batches, steps, evaluation.
//!
//! Everything here is tensors and runs on a device thread, a quantum at a time. A pair is one pass
//! over [`Tree`], the same pass that scored its reference. Its backward is cut at the last hidden
//! states: the head goes over the answers' tokens alone, in chunks, so that logits of all tokens
//! never exist at once.

use tch::{Kind, Tensor};

use super::error::TrainError;
use super::loss::{Objective, PairLoss, Scores};
use super::optimizer::{AdamW, Flat};
use super::pair::Pair;
use super::stats::{Stats, Tally};
use crate::model::attention::Tree;
use crate::model::{Adapters, Lora, Transformer};
use crate::torch::{GradGuard, Tenant, TorchError, Turn};

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
    objective: Objective,
    optimizer: AdamW,
    /// Micro-batches since the last step.
    tally: Tally,
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
        Ok(Self {
            model,
            lora,
            leaves,
            flat,
            objective,
            optimizer,
            tally: Tally::default(),
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

    /// Adds one micro-batch to the step under way: the gradient of the mean loss of its pairs.
    ///
    /// # Errors
    /// [`TrainError::NotTheStart`] before the first step; out of memory.
    pub fn accumulate(&mut self, pairs: &[Pair]) -> Result<(), TrainError> {
        let mut tally = Tally::default();
        let mean_tokens = mean_chosen_tokens(pairs);
        for pair in pairs {
            let (scores, loss) = self.train_pair(pair, 1.0 / pairs.len() as f64, mean_tokens)?;
            if self.starts_at_reference && self.flat.steps == 0 && self.skipped == 0 {
                check_start(pair, &scores)?;
            }
            tally.add(Stats::of(&scores, &loss, self.objective.beta), 1.0);
        }
        if let Some(mean) = tally.mean() {
            self.tally.add(mean, 1.0);
        }
        Ok(())
    }

    /// Ends the step under way: averages its micro-batches and moves the adapter. `None` where no
    /// micro-batch was added.
    ///
    /// # Errors
    /// [`TrainError::Diverged`] after too many skipped steps in a row.
    pub fn step(&mut self, learning_rate: f64) -> Result<Option<Step>, TrainError> {
        let _no_grad = GradGuard::set(false);
        let tally = std::mem::take(&mut self.tally);
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
        Ok(Some(Step { stats, grad_norm, learning_rate, skipped }))
    }

    /// Losses of pairs under the adapter as it is, without a step.
    pub fn evaluate(&self, pairs: &[Pair]) -> Result<Tally, TrainError> {
        let _no_grad = GradGuard::set(false);
        let mean_tokens = mean_chosen_tokens(pairs);
        let mut tally = Tally::default();
        for pair in pairs {
            let (tree, answers) = self.tree(pair)?;
            let (log_probs, _) = self.head(&self.hidden(tree)?, &answers)?;
            let scores = pair.scores(pair.sums(&log_probs, self.objective.ld_alpha));
            tally.add(Stats::of(&scores, &self.objective.pair(&scores, mean_tokens), self.objective.beta), 1.0);
        }
        Ok(tally)
    }

    /// Forward and backward of one pair; its gradient counts `share`.
    fn train_pair(&mut self, pair: &Pair, share: f64, mean_tokens: f64) -> Result<(Scores, PairLoss), TrainError> {
        let _grad = GradGuard::set(true);
        let (tree, answers) = self.tree(pair)?;
        let hidden = self.hidden(tree)?;
        let (log_probs, last) = self.head(&hidden, &answers)?;
        let scores = pair.scores(pair.sums(&log_probs, self.objective.ld_alpha));
        let loss = self.objective.pair(&scores, mean_tokens);
        let gradient = self.head_gradient(&hidden, &answers, last, loss.slope.map(|s| s * share))?;
        // the derivative of this number with respect to `hidden` is `gradient`
        let carrier = hidden.f_mul(&gradient)?.f_sum(Kind::Float)?;
        let gradients = Tensor::f_run_backward(&[carrier], &self.leaves, false, false)?;
        let _no_grad = GradGuard::set(false);
        self.flat.accumulate(&gradients)?;
        Ok((scores, loss))
    }

    fn tree(&self, pair: &Pair) -> Result<(Tree, Answers), TorchError> {
        let sides: [&[u32]; 2] = [&pair.chosen, &pair.rejected];
        let tree = Tree::new(&pair.prompt, &sides, self.model.heads())?;
        let answers = Answers {
            predictors: tree.predictors.shallow_clone(),
            targets: tree.targets.shallow_clone(),
            lengths: [pair.chosen.len() as i64, pair.rejected.len() as i64],
            common: pair.common() as i64,
        };
        Ok((tree, answers))
    }

    fn hidden(&self, mut tree: Tree) -> Result<Tensor, TorchError> {
        let (ids, positions) = (tree.ids.shallow_clone(), tree.positions.shallow_clone());
        self.model.hidden(&ids, &positions, &mut tree, &Adapters::All(&self.lora))
    }

    /// Log-probabilities of the answers' tokens, and the graph of the last chunk: a pair that fits
    /// in one chunk goes through the head once.
    fn head(&self, hidden: &Tensor, answers: &Answers) -> Result<(Vec<f32>, Option<Chunk>), TrainError> {
        let mut values = Vec::new();
        let mut last = None;
        for (rows, targets) in answers.chunks(&hidden.f_detach()?)? {
            drop(last.take());
            let chunk = self.chunk(rows, &targets)?;
            values.extend(Vec::<f32>::try_from(chunk.log_probs.f_detach()?)?);
            last = Some(chunk);
        }
        Ok((values, last))
    }

    fn chunk(&self, rows: Tensor, targets: &Tensor) -> Result<Chunk, TorchError> {
        let rows = rows.f_set_requires_grad(true)?;
        Ok(Chunk { log_probs: self.model.log_probs(&rows, targets)?, rows })
    }

    /// Gradient of the loss with respect to `hidden`, given its derivative with respect to the
    /// log-probability of each answer.
    fn head_gradient(
        &self,
        hidden: &Tensor,
        answers: &Answers,
        mut last: Option<Chunk>,
        slope: [f64; 2],
    ) -> Result<Tensor, TorchError> {
        let coefficients = answers.spread(slope, self.objective.ld_alpha, hidden)?;
        let chunks = answers.chunks(&hidden.f_detach()?)?;
        let mut gradients = Vec::with_capacity(chunks.len());
        let mut end = coefficients.size1()?;
        for (rows, targets) in chunks.into_iter().rev() {
            let count = targets.size1()?;
            end -= count;
            let chunk = match last.take() {
                Some(chunk) => chunk,
                None => self.chunk(rows, &targets)?,
            };
            let weighted = chunk.log_probs.f_mul(&coefficients.f_narrow(0, end, count)?)?.f_sum(Kind::Float)?;
            gradients.extend(Tensor::f_run_backward(&[weighted], &[&chunk.rows], false, false)?);
        }
        gradients.reverse();
        let _no_grad = GradGuard::set(false);
        // the prompt's last row predicts the first token of both answers
        Ok(hidden.f_detach()?.f_zeros_like()?.f_index_add_(0, &answers.predictors, &Tensor::f_cat(&gradients, 0)?)?)
    }
}

/// The answers' tokens of one pass.
struct Answers {
    predictors: Tensor,
    targets: Tensor,
    lengths: [i64; 2],
    /// The shorter of them.
    common: i64,
}

impl Answers {
    /// `(hidden states, targets)` by [`Transformer::HEAD_ROWS`] tokens.
    fn chunks(&self, hidden: &Tensor) -> Result<Vec<(Tensor, Tensor)>, TorchError> {
        let rows = hidden.f_index_select(0, &self.predictors)?.f_split(Transformer::HEAD_ROWS, 0)?;
        Ok(rows.into_iter().zip(self.targets.f_split(Transformer::HEAD_ROWS, 0)?).collect())
    }

    /// The factor of each token's log-probability, `[answer tokens]` float32.
    fn spread(&self, slope: [f64; 2], ld_alpha: f64, like: &Tensor) -> Result<Tensor, TorchError> {
        let part = |tokens: i64, slope: f64| Tensor::f_full([tokens], slope, (Kind::Float, like.device()));
        let [chosen, rejected] = self.lengths.map(|length| length - self.common);
        let parts = [
            part(self.common, slope[0])?,
            part(chosen, ld_alpha * slope[0])?,
            part(self.common, slope[1])?,
            part(rejected, ld_alpha * slope[1])?,
        ];
        Ok(Tensor::f_cat(&parts, 0)?)
    }
}

/// Some tokens' way through the head.
struct Chunk {
    rows: Tensor,
    log_probs: Tensor,
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
