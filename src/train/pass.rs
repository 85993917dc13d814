//! Pairs through the model and back.
//!
//! There are two ways. Adapters on processors that multiply bf16: several pairs go through in one pass with its
//! backward by hand ([`crate::model::gradient`]). All else: a padded pass ([`Tree`]) through libtorch's autograd, whose
//! backward is cut at the last hidden states; of one pair on a CPU, where its numbers are then those of the reference,
//! of pairs of about one length on a GPU, which one pair would leave idle. Either way the head goes over the answers'
//! tokens alone, in chunks, so that logits of all tokens never exist at once.

use tch::{Device, Kind, Tensor};

use super::error::TrainError;
use super::pair::Pair;
use crate::model::attention::Tree;
use crate::model::gradient::{Forward, Keep, Scored};
use crate::model::pack::{Branches, Pack};
use crate::model::{Adapters, Lora, Transformer};
use crate::torch::{GradGuard, TorchError};

/// A forward pass that can be gone back through.
pub(super) enum Pass {
    ByHand { pack: Box<Pack>, forward: Forward, slopes: Tensor },
    Graph { hidden: Tensor, answers: Answers, last: Option<Chunk> },
}

/// How pairs go through.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Way {
    ByHand,
    /// Through autograd, a pair at a time.
    Graph,
    /// Through autograd, pairs padded to the longest of a pass.
    Padded,
}

/// Tokens of a pass where a flow names no other number: a CPU is busy with few, a GPU is not.
pub fn pass_tokens(device: Device) -> usize {
    if device.is_cuda() { 8192 } else { 1024 }
}

/// Where gradients go.
pub(super) enum Gradients<'a> {
    /// By hand: views of the flat gradient in the adapter's shape.
    Views(&'a Lora),
    /// What autograd knows, and the place of the output head where it is among them.
    Leaves(&'a [Tensor], Option<usize>),
}

/// Pairs of `pairs` that go through in one pass of at most `tokens`; at least one.
pub(super) fn fitting(way: Way, pairs: &[Pair], tokens: usize) -> usize {
    let (mut count, mut sum, mut longest) = (0, 0, 0);
    let fits = pairs.iter().take_while(|pair| {
        count += 1;
        sum += pair.tokens();
        longest = longest.max(Tree::bucket(pair.tokens()));
        match way {
            Way::ByHand => sum <= tokens,
            Way::Graph => count == 1,
            Way::Padded => count * longest <= tokens,
        }
    });
    fits.count().max(1)
}

/// Log-probabilities of the answers' tokens without a way back.
pub(super) fn log_probs(
    way: Way,
    model: &Transformer,
    stack: &[&Lora],
    pairs: &[Pair],
) -> Result<Vec<f32>, TrainError> {
    let _no_grad = GradGuard::set(false);
    if way == Way::ByHand {
        let pack = pack(model, pairs)?;
        let forward = model.forward(&pack, stack, Keep::Nothing)?;
        return Ok(model.score(&pack, &forward.hidden, false)?.log_probs);
    }
    let (tree, answers) = tree(model, pairs)?;
    Ok(head(model, &graph(model, stack, tree)?, &answers)?.0)
}

/// Log-probabilities of the answers' tokens of pairs that are [`fitting`], and the way back.
pub(super) fn forward(
    way: Way,
    model: &Transformer,
    stack: &[&Lora],
    pairs: &[Pair],
    keep: Keep,
) -> Result<(Vec<f32>, Pass), TrainError> {
    if way == Way::ByHand {
        let _no_grad = GradGuard::set(false);
        let pack = pack(model, pairs)?;
        let forward = model.forward(&pack, stack, keep)?;
        let Scored { log_probs, slopes } = model.score(&pack, &forward.hidden, true)?;
        let slopes = slopes.ok_or_else(|| TorchError::Operation("the head gave no slopes".into()))?;
        return Ok((log_probs, Pass::ByHand { pack: Box::new(pack), forward, slopes }));
    }
    let _grad = GradGuard::set(true);
    let (tree, answers) = tree(model, pairs)?;
    let hidden = graph(model, stack, tree)?;
    let (log_probs, last) = head(model, &hidden, &answers)?;
    Ok((log_probs, Pass::Graph { hidden, answers, last }))
}

impl Pass {
    /// Tokens that went through the model for nothing.
    pub fn padding(&self) -> u64 {
        match self {
            Self::ByHand { .. } => 0,
            Self::Graph { answers, .. } => answers.padding,
        }
    }

    /// Gradients of a loss whose derivatives by the log-probabilities are `slope`, in their order. By hand they are
    /// added to their place; autograd's are returned.
    pub fn backward(
        self,
        model: &Transformer,
        stack: &[&Lora],
        slope: &[f32],
        to: &Gradients<'_>,
    ) -> Result<Option<Vec<Tensor>>, TrainError> {
        let slope = Tensor::f_from_slice(slope)?.f_to_device(model.device())?;
        match (self, to) {
            (Self::ByHand { pack, forward, slopes }, Gradients::Views(to)) => {
                let _no_grad = GradGuard::set(false);
                let by_row = slopes.f_mul(&slope.f_unsqueeze(1)?)?;
                let rows = forward.hidden.size();
                let d = Tensor::f_zeros(rows, (Kind::Float, model.device()))?;
                // a prompt's last row predicts the first token of both answers
                let d = d.f_index_add(0, &pack.predictors, &by_row)?;
                model.backward(&pack, stack, forward, &d, to)?;
                Ok(None)
            }
            (Self::Graph { hidden, answers, last }, Gradients::Leaves(leaves, head)) => {
                let _grad = GradGuard::set(true);
                let weight = head.map(|place| &leaves[place]);
                let (gradient, of_head) = head_gradient(model, &hidden, &answers, last, &slope, weight)?;
                // the derivative of this number with respect to `hidden` is `gradient`
                let carrier = hidden.f_mul(&gradient)?.f_sum(Kind::Float)?;
                let mut gradients = Tensor::f_run_backward(&[carrier], leaves, false, false)?;
                if let (Some(place), Some(more)) = (*head, of_head) {
                    let _no_grad = GradGuard::set(false);
                    // a head that is not the embedding too is met here alone
                    let all = if gradients[place].defined() { more.f_add(&gradients[place])? } else { more };
                    gradients[place] = all;
                }
                Ok(Some(gradients))
            }
            _ => Err(TorchError::Operation("a pass has no way back to such gradients".into()).into()),
        }
    }
}

fn branches(pairs: &[Pair]) -> Vec<Branches<'_>> {
    pairs.iter().map(|p| Branches { prompt: &p.prompt, answers: vec![&p.chosen, &p.rejected] }).collect()
}

fn pack(model: &Transformer, pairs: &[Pair]) -> Result<Pack, TorchError> {
    Pack::new(&branches(pairs), model.heads())
}

fn tree(model: &Transformer, pairs: &[Pair]) -> Result<(Tree, Answers), TorchError> {
    let tree = Tree::several(&branches(pairs), model.heads())?;
    let (predictors, targets) = (tree.predictors.shallow_clone(), tree.targets.shallow_clone());
    let padding = (tree.ids.numel() - pairs.iter().map(Pair::tokens).sum::<usize>()) as u64;
    let answers = Answers { predictors, targets, padding };
    Ok((tree, answers))
}

fn graph(model: &Transformer, stack: &[&Lora], mut tree: Tree) -> Result<Tensor, TorchError> {
    let (ids, positions) = (tree.ids.shallow_clone(), tree.positions.shallow_clone());
    model.hidden(&ids, &positions, &mut tree, &Adapters::Stack(stack))
}

/// Log-probabilities of the answers' tokens, and the graph of the last chunk: a pair that fits
/// in one chunk goes through the head once.
fn head(model: &Transformer, hidden: &Tensor, answers: &Answers) -> Result<(Vec<f32>, Option<Chunk>), TrainError> {
    let mut values = Vec::new();
    let mut last = None;
    for (rows, targets) in answers.chunks(&hidden.f_detach()?)? {
        drop(last.take());
        let chunk = Chunk::new(model, rows, &targets)?;
        values.extend(Vec::<f32>::try_from(chunk.log_probs.f_detach()?)?);
        last = Some(chunk);
    }
    Ok((values, last))
}

/// Gradient of the loss with respect to `hidden`, and by way of the head alone with respect to its `weight` (float32),
/// given its derivative with respect to each log-probability.
fn head_gradient(
    model: &Transformer,
    hidden: &Tensor,
    answers: &Answers,
    mut last: Option<Chunk>,
    slope: &Tensor,
    weight: Option<&Tensor>,
) -> Result<(Tensor, Option<Tensor>), TorchError> {
    let chunks = answers.chunks(&hidden.f_detach()?)?;
    let mut gradients = Vec::with_capacity(chunks.len());
    let mut of_weight: Option<Tensor> = None;
    let mut end = slope.size1()?;
    for (rows, targets) in chunks.into_iter().rev() {
        let count = targets.size1()?;
        end -= count;
        let chunk = match last.take() {
            Some(chunk) => chunk,
            None => Chunk::new(model, rows, &targets)?,
        };
        let weighted = chunk.log_probs.f_mul(&slope.f_narrow(0, end, count)?)?.f_sum(Kind::Float)?;
        let inputs: Vec<&Tensor> = [&chunk.rows].into_iter().chain(weight).collect();
        let mut found = Tensor::f_run_backward(&[weighted], &inputs, false, false)?.into_iter();
        gradients.extend(found.next());
        if let Some(more) = found.next() {
            let _no_grad = GradGuard::set(false);
            of_weight = Some(match of_weight.take() {
                Some(mut sum) => sum.f_add_(&more)?,
                None => more.f_to_kind(Kind::Float)?,
            });
        }
    }
    gradients.reverse();
    let _no_grad = GradGuard::set(false);
    // the prompt's last row predicts the first token of both answers
    let all = Tensor::f_cat(&gradients, 0)?;
    Ok((hidden.f_detach()?.f_zeros_like()?.f_index_add_(0, &answers.predictors, &all)?, of_weight))
}

/// The answers' tokens of a padded pass.
pub(super) struct Answers {
    predictors: Tensor,
    targets: Tensor,
    padding: u64,
}

impl Answers {
    /// `(hidden states, targets)` by [`Transformer::HEAD_ROWS`] tokens.
    fn chunks(&self, hidden: &Tensor) -> Result<Vec<(Tensor, Tensor)>, TorchError> {
        let rows = hidden.f_index_select(0, &self.predictors)?.f_split(Transformer::HEAD_ROWS, 0)?;
        Ok(rows.into_iter().zip(self.targets.f_split(Transformer::HEAD_ROWS, 0)?).collect())
    }
}

/// Some tokens' way through the head.
pub(super) struct Chunk {
    rows: Tensor,
    log_probs: Tensor,
}

impl Chunk {
    fn new(model: &Transformer, rows: Tensor, targets: &Tensor) -> Result<Self, TorchError> {
        let rows = rows.f_set_requires_grad(true)?;
        Ok(Self { log_probs: model.log_probs(&rows, targets)?, rows })
    }
}
