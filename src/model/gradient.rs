//! The transformer's pass for training an adapter, with its backward by hand.
//!
//! The base is frozen, so its backward is one product a matrix; what is left is the adapter's narrow matrices and a
//! few operations of our own (`torch::gradient`). An activation is kept where it can't be had again for
//! less than it costs to keep; norms, gates and rotations are computed anew.
//!
//! A token's numbers don't depend on what it is packed with, so that a reference which was scored alone is the one
//! that is trained against. libtorch's autograd over [`Transformer::hidden`] gives the same gradients but for
//! rounding, which the tests hold it to.

use tch::{Kind, Tensor};

use super::inference::{Pass, Projections};
use super::lora::{Lora, Site};
use super::pack::Pack;
use super::transformer::{Layer, Transformer};
use crate::torch::{TorchError, gradient, ops, products};

/// What backward needs of a block's forward.
#[derive(Default)]
pub(super) struct Kept {
    pub keep: Keep,
    /// The stream as the block found it, and between its halves: `[tokens, hidden]` float32.
    pub entered: Option<Tensor>,
    pub between: Option<Tensor>,
    /// As it was projected, `[tokens, heads, head_dim]`.
    pub qkv: Option<Tensor>,
    pub attended: Option<Tensor>,
    pub gate_up: Option<Tensor>,
    /// What both halves add, before the norms that some families have there.
    pub added: [Option<Tensor>; 2],
}

/// What is kept of a forward.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Keep {
    /// No backward follows.
    #[default]
    Nothing,
    /// The stream at every block; backward computes the blocks again (gradient checkpointing).
    Streams,
    All,
}

/// A forward pass that can be gone back through.
pub struct Forward {
    /// Hidden states after the last norm, `[tokens, hidden]`.
    pub hidden: Tensor,
    /// The stream that the last norm read.
    left: Tensor,
    blocks: Vec<Kept>,
}

/// Log-probs of answers' tokens, and what they do to the hidden states.
pub struct Scored {
    /// `[answer tokens]`
    pub log_probs: Vec<f32>,
    /// Gradient of each log-probability by the hidden state that predicts it, `[answer tokens, hidden]` float32.
    pub slopes: Option<Tensor>,
}

impl Transformer {
    /// Whether the passes of this module can be made: on processors that multiply bf16, for models that cap no
    /// scores.
    pub fn learns_by_hand(&self) -> bool {
        let even = |tensor: &Tensor| tensor.size().iter().all(|n| n % 2 == 0);
        products::serves(self.kind(), self.device())
            && self.heads().served()
            && self.config.attention_softcap.is_none()
            && self.config.final_softcap.is_none()
            && even(&self.head)
            && self.layers.iter().all(|l| [&l.qkv, &l.o, &l.gate_up, &l.down].iter().all(|linear| even(&linear.weight)))
    }

    /// Hidden states of a pack under a stack of adapters.
    pub fn forward(&self, pack: &Pack, stack: &[&Lora], keep: Keep) -> Result<Forward, TorchError> {
        let x = self.embed(&pack.ids)?;
        let pass = self.pass(pack, stack)?;
        let (mut grown, mut blocks) = (None, Vec::new());
        for (i, layer) in self.layers.iter().enumerate() {
            let mut kept = Kept { keep, ..Kept::default() };
            grown = Some(self.infer_block(i, layer, &x, grown.as_ref(), &pass, &mut &*pack, &mut kept)?);
            if keep != Keep::Nothing {
                blocks.push(kept);
            }
        }
        let hidden = self.add_norm(&x, grown.as_ref(), &self.norm)?;
        Ok(Forward { hidden, left: x, blocks })
    }

    /// Adds the gradient of the last adapter's matrices to `to`, given that of the hidden states, `[tokens, hidden]`
    /// float32.
    pub fn backward(
        &self,
        pack: &Pack,
        stack: &[&Lora],
        forward: Forward,
        d_hidden: &Tensor,
        to: &Lora,
    ) -> Result<(), TorchError> {
        let d = d_hidden.f_zeros_like()?;
        gradient::norm_back(&forward.left, &self.norm, self.config.rms_norm_eps, d_hidden, &d)?;
        let pass = self.pass(pack, stack)?;
        for (i, (layer, kept)) in self.layers.iter().zip(forward.blocks).enumerate().rev() {
            let kept = self.computed_again(i, layer, kept, pack, &pass)?;
            self.block_back(i, layer, &Back { kept, pack, pass: &pass, stack, to }, &d)?;
        }
        Ok(())
    }

    /// Log-probs of the pack's targets, and with `slopes` what they do to the hidden states. Some rows go through the
    /// head at a time, so that logits of all tokens never exist at once.
    pub fn score(&self, pack: &Pack, hidden: &Tensor, slopes: bool) -> Result<Scored, TorchError> {
        let (mut log_probs, mut back) = (Vec::new(), Vec::new());
        let rows = hidden.f_index_select(0, &pack.predictors)?.f_split(Self::HEAD_ROWS, 0)?;
        for (rows, targets) in rows.iter().zip(pack.targets.f_split(Self::HEAD_ROWS, 0)?) {
            let logits = products::linear(rows, &self.head, None, true)?;
            let (values, d) = gradient::target_log_probs(&logits, &targets, slopes.then(|| self.kind()))?;
            log_probs.extend(Vec::<f32>::try_from(values)?);
            if let Some(d) = d {
                drop(logits);
                back.push(products::linear_back(&d, &self.head)?);
            }
        }
        let slopes = slopes.then(|| Tensor::f_cat(&back, 0)).transpose()?;
        Ok(Scored { log_probs, slopes })
    }

    fn pass<'a>(&self, pack: &Pack, stack: &'a [&'a Lora]) -> Result<Pass<'a>, TorchError> {
        Ok(Pass { angles: self.angles(&pack.positions)?, projections: Projections::Apart(stack) })
    }

    /// What was not kept of a block.
    fn computed_again(
        &self,
        index: usize,
        layer: &Layer,
        kept: Kept,
        pack: &Pack,
        pass: &Pass<'_>,
    ) -> Result<Kept, TorchError> {
        if kept.keep == Keep::All {
            return Ok(kept);
        }
        let x = some(&kept.entered)?.f_detach_copy()?;
        let mut again = Kept { keep: Keep::All, ..Kept::default() };
        let _ = self.infer_block(index, layer, &x, None, pass, &mut &*pack, &mut again)?;
        Ok(again)
    }

    /// From the gradient `d` of the stream after a block to that before it, in place.
    fn block_back(&self, index: usize, layer: &Layer, back: &Back<'_>, d: &Tensor) -> Result<(), TorchError> {
        let kept = &back.kept;
        let eps = self.config.rms_norm_eps;
        let (heads, kv_heads) = (self.config.heads as i64, self.config.kv_heads as i64);
        let (entered, between) = (some(&kept.entered)?, some(&kept.between)?);

        let gate_up = some(&kept.gate_up)?;
        let dy = self.added_back(d, layer.mlp_out_norm.as_ref(), &kept.added[1])?;
        let gated = ops::gate(gate_up, self.gelu())?;
        let d_gated = back.project((index, Site::Down), &layer.down.weight, &gated, &dy)?;
        let dy = gradient::gate_back(gate_up, &d_gated, self.gelu())?;
        let h = self.add_norm(between, None, &layer.mlp_norm)?;
        let d_h = back.project((index, Site::GateUp), &layer.gate_up.weight, &h, &dy)?;
        gradient::norm_back(between, &layer.mlp_norm, eps, &d_h, d)?;

        let dy = self.added_back(d, layer.attended_norm.as_ref(), &kept.added[0])?;
        let d_attended = back.project((index, Site::O), &layer.o.weight, some(&kept.attended)?, &dy)?;
        let (turn, qkv) = (self.turn(index, layer, &back.pass.angles), some(&kept.qkv)?);
        let turned = qkv.f_detach_copy()?;
        turn.apply(&turned, heads, kv_heads)?;
        let d_turned = back.pack.attend_back(self.layer_kind(index).local, &turned, &d_attended)?;
        let dy = gradient::turn_back(&turn, qkv, heads, kv_heads, &d_turned)?.f_flatten(1, 2)?;
        let h = self.add_norm(entered, None, &layer.input_norm)?;
        let d_h = back.project((index, Site::Qkv), &layer.qkv.weight, &h, &dy)?;
        gradient::norm_back(entered, &layer.input_norm, eps, &d_h, d)
    }

    /// The gradient of what a half of a block gave, in the model's dtype, for that of the stream.
    fn added_back(&self, d: &Tensor, norm: Option<&Tensor>, added: &Option<Tensor>) -> Result<Tensor, TorchError> {
        let Some(norm) = norm else { return Ok(d.f_to_kind(self.kind())?) };
        let before = d.f_zeros_like()?;
        gradient::norm_back(&some(added)?.f_to_kind(Kind::Float)?, norm, self.config.rms_norm_eps, d, &before)?;
        Ok(before.f_to_kind(self.kind())?)
    }
}

/// A block on the way back.
struct Back<'a> {
    kept: Kept,
    pack: &'a Pack,
    pass: &'a Pass<'a>,
    stack: &'a [&'a Lora],
    to: &'a Lora,
}

impl Back<'_> {
    /// The gradient of a projection's input `x` in float32 for that of its result, `dy`; those of the last adapter go
    /// to their place.
    fn project(&self, at: (usize, Site), weight: &Tensor, x: &Tensor, dy: &Tensor) -> Result<Tensor, TorchError> {
        let dx = products::linear_back(dy, weight)?;
        for (i, lora) in self.stack.iter().enumerate() {
            let last = i + 1 == self.stack.len();
            lora.back(at, x, dy, &dx, last.then_some(self.to))?;
        }
        Ok(dx)
    }
}

fn some(tensor: &Option<Tensor>) -> Result<&Tensor, TorchError> {
    tensor.as_ref().ok_or_else(|| TorchError::Operation("a block's forward was not kept".into()))
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::super::attention::Tree;
    use super::super::pack::Branches;
    use super::super::tests::{families, load};
    use super::super::{Adapters, LoraConfig};
    use super::*;
    use crate::torch::GradGuard;

    const PROMPT: &[u32] = &[3, 4, 5, 6, 7, 9, 11, 2, 3, 4, 5];
    const ANSWERS: [&[u32]; 2] = [&[7, 8, 9, 10, 3, 4, 5, 12, 8], &[6, 5, 2]];

    /// An adapter that changes something, with leaves to ask gradients for.
    fn adapter(model: &Transformer) -> (Lora, Vec<Tensor>) {
        let _no_grad = GradGuard::set(false);
        tch::manual_seed(0);
        let config = LoraConfig { r: 6, alpha: 12.0, ..LoraConfig::default() };
        let mut lora = Lora::fresh(config, &model.config, 1, Device::Cpu).unwrap();
        let random = |t: &Tensor| (Tensor::randn_like(t) * 0.1).set_requires_grad(true);
        let leaves: Vec<Tensor> = lora.named().map(|(_, t)| random(t)).collect();
        lora.replace(leaves.iter().map(Tensor::shallow_clone));
        (lora, leaves)
    }

    /// What autograd says: log-probs, and the gradient of their sum weighted by `weights`.
    fn expected(model: &Transformer, lora: &Lora, leaves: &[Tensor], weights: &Tensor) -> (Tensor, Vec<Tensor>) {
        let _grad = GradGuard::set(true);
        let mut tree = Tree::new(PROMPT, &ANSWERS, model.heads()).unwrap();
        let (ids, positions) = (tree.ids.shallow_clone(), tree.positions.shallow_clone());
        let (predictors, targets) = (tree.predictors.shallow_clone(), tree.targets.shallow_clone());
        let hidden = model.hidden(&ids, &positions, &mut tree, &Adapters::All(lora)).unwrap();
        let log_probs = model.log_probs(&hidden.index_select(0, &predictors), &targets).unwrap();
        let sum = (&log_probs * weights).sum(Kind::Float);
        (log_probs.detach(), Tensor::run_backward(&[sum], leaves, false, false))
    }

    /// The same by hand, packed with other trees before and behind.
    fn by_hand(model: &Transformer, lora: &Lora, weights: &Tensor, keep: Keep) -> (Vec<f32>, Vec<Tensor>) {
        let _no_grad = GradGuard::set(false);
        let tree = || Branches { prompt: PROMPT, answers: ANSWERS.to_vec() };
        let other = || Branches { prompt: &PROMPT[3..], answers: vec![&PROMPT[..1], &PROMPT[2..]] };
        let pack = Pack::new(&[other(), tree(), other()], model.heads()).unwrap();
        let gradient = lora.with(lora.named().map(|(_, t)| t.zeros_like()));
        let forward = model.forward(&pack, &[lora], keep).unwrap();
        let Scored { log_probs, slopes } = model.score(&pack, &forward.hidden, true).unwrap();
        let (first, count) = ((log_probs.len() as i64 - weights.numel() as i64) / 2, weights.numel() as i64);
        let all = Tensor::zeros([log_probs.len() as i64], (Kind::Float, Device::Cpu));
        all.narrow(0, first, count).copy_(weights);
        let spread = slopes.unwrap() * all.unsqueeze(1);
        let d = forward.hidden.to_kind(Kind::Float).zeros_like().index_add_(0, &pack.predictors, &spread);
        model.backward(&pack, &[lora], forward, &d, &gradient).unwrap();
        let own = log_probs[first as usize..(first + count) as usize].to_vec();
        (own, gradient.named().map(|(_, t)| t.shallow_clone()).collect())
    }

    fn cosine(a: &Tensor, b: &Tensor) -> f64 {
        let dot = (a * b).sum(Kind::Double).double_value(&[]);
        dot / (a.norm().double_value(&[]) * b.norm().double_value(&[])).max(1e-30)
    }

    #[test]
    fn autograd_finds_the_same_gradients() {
        let count = ANSWERS.iter().map(|a| a.len() as i64).sum::<i64>();
        let mut served = 0;
        for (dir, kind) in families().into_iter().flat_map(|dir| [(dir.clone(), Kind::Float), (dir, Kind::BFloat16)]) {
            let model = load(&dir, kind);
            if !model.learns_by_hand() {
                continue;
            }
            served += 1;
            let (lora, leaves) = adapter(&model);
            let weights = Tensor::randn([count], (Kind::Float, Device::Cpu));
            let (log_probs, gradients) = expected(&model, &lora, &leaves, &weights);
            let (found, by_hand) = by_hand(&model, &lora, &weights, Keep::All);
            let off = (Tensor::from_slice(&found) - log_probs).abs().max().double_value(&[]);
            let (close, alike) = if kind == Kind::Float { (1e-4, 0.99999) } else { (0.2, 0.99) };
            assert!(off < close, "{} {kind:?}: log-probs differ by {off}", dir.display());
            for ((name, _), (a, b)) in lora.named().zip(gradients.iter().zip(&by_hand)) {
                let cosine = cosine(a, b);
                assert!(cosine > alike, "{} {kind:?} {name}: cosine {cosine}", dir.display());
                let ratio = b.norm().double_value(&[]) / a.norm().double_value(&[]);
                assert!((ratio - 1.0).abs() < 10.0 * (1.0 - alike), "{} {name}: norm {ratio}", dir.display());
            }
        }
        assert!(served == 0 || served > 20, "{served}");
    }

    #[test]
    fn blocks_that_are_computed_again_give_the_same_bits() {
        let dir = families().remove(0);
        let model = load(&dir, Kind::BFloat16);
        if model.learns_by_hand() {
            let (lora, _) = adapter(&model);
            let weights = Tensor::ones([ANSWERS.iter().map(|a| a.len() as i64).sum()], (Kind::Float, Device::Cpu));
            assert_eq!(by_hand(&model, &lora, &weights, Keep::All), by_hand(&model, &lora, &weights, Keep::Streams));
        }
    }

    #[test]
    fn a_pair_is_scored_alike_in_any_company() {
        let dir = families().remove(0);
        let model = load(&dir, Kind::BFloat16);
        if !model.learns_by_hand() {
            return;
        }
        let _no_grad = GradGuard::set(false);
        let (lora, _) = adapter(&model);
        let score = |trees: &[&[u32]]| {
            let branches: Vec<_> = trees.iter().map(|p| Branches { prompt: p, answers: ANSWERS.to_vec() }).collect();
            let pack = Pack::new(&branches, model.heads()).unwrap();
            let forward = model.forward(&pack, &[&lora], Keep::Nothing).unwrap();
            model.score(&pack, &forward.hidden, false).unwrap().log_probs
        };
        let alone = score(&[PROMPT]);
        assert_eq!(score(&[&PROMPT[2..], PROMPT, &PROMPT[1..], PROMPT])[alone.len()..2 * alone.len()], alone);
    }
}
