//! Attention over grouped heads, and the one pass that scores and trains.

use tch::{Device, Kind, Tensor};

use super::config::Config;
use super::pack::Branches;
use crate::torch::{TorchError, ops};

/// How the queries of one forward pass find their keys. The transformer hands over what it
/// projected; a KV cache, a packed block or a tree of answers decide what is attended to.
pub trait Attend {
    /// `q` is `[tokens, heads, head_dim]`, `k` and `v` are `[tokens, kv_heads, head_dim]`, all after
    /// the rotary embedding. A `local` layer sees the model's sliding window alone. Returns
    /// `[tokens, heads * head_dim]`.
    fn attend(&mut self, layer: usize, local: bool, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor, TorchError>;
}

/// What attention needs to know of a model.
#[derive(Debug, Clone, Copy)]
pub struct Heads {
    pub layers: usize,
    pub kv_heads: i64,
    /// Query heads of a kv head.
    pub group: i64,
    pub head_dim: i64,
    /// What products of queries and keys are multiplied by.
    pub scale: f64,
    /// `cap * tanh(score / cap)` (Gemma 2).
    pub softcap: Option<f64>,
    /// Tokens that a local layer sees, itself included.
    pub window: Option<i64>,
    pub kind: Kind,
    pub device: Device,
}

impl Heads {
    pub fn of(config: &Config, kind: Kind, device: Device) -> Self {
        Self {
            layers: config.layers,
            kv_heads: config.kv_heads as i64,
            group: (config.heads / config.kv_heads) as i64,
            head_dim: config.head_dim as i64,
            scale: config.attention_scale,
            softcap: config.attention_softcap,
            window: config.window.map(|n| n as i64),
            kind,
            device,
        }
    }

    /// Whether passes without gradients go through our own operations.
    pub fn served(&self) -> bool {
        ops::serves(self.kind, self.device, self.head_dim, self.group, self.softcap.is_some())
    }

    /// Attention with grouped heads, one sequence: `q` is `[tokens, heads, d]`, `k` and `v` are
    /// `[keys, kv_heads, d]`, `mask` is of [`Mask`]. Returns `[tokens, heads * d]`.
    pub fn attention(&self, q: &Tensor, k: &Tensor, v: &Tensor, mask: &Tensor) -> Result<Tensor, TorchError> {
        self.attention_of(1, q, k, v, mask)
    }

    /// [`Heads::attention`] of `count` sequences of one length that lie one after the other.
    fn attention_of(
        &self,
        count: i64,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        mask: &Tensor,
    ) -> Result<Tensor, TorchError> {
        let Self { kv_heads, group, head_dim, .. } = *self;
        let (tokens, keys) = (q.size3()?.0 / count, k.size3()?.0 / count);
        let q = q.f_view([count, tokens, kv_heads, group, head_dim])?.f_permute([0, 2, 3, 1, 4])?;
        let q = q.f_reshape([count, kv_heads, group * tokens, head_dim])?;
        let k = k.f_view([count, keys, kv_heads, head_dim])?.f_transpose(1, 2)?;
        let v = v.f_view([count, keys, kv_heads, head_dim])?.f_transpose(1, 2)?;
        let out = self.batched(&q, &k, &v, mask)?.f_view([count, kv_heads, group, tokens, head_dim])?;
        Ok(out.f_permute([0, 3, 1, 2, 4])?.f_reshape([count * tokens, kv_heads * group * head_dim])?)
    }

    /// Attention of a batch: `q` is `[batch, kv_heads, group * tokens, d]`, `k` and `v` are
    /// `[batch, kv_heads, keys, d]`, `mask` is additive in their dtype and of a shape that spreads to
    /// `[batch, kv_heads, group * tokens, keys]`.
    ///
    /// The query group is folded into the query length, because libtorch's fast kernels take a mask or
    /// grouped heads but not both.
    pub fn batched(&self, q: &Tensor, k: &Tensor, v: &Tensor, mask: &Tensor) -> Result<Tensor, TorchError> {
        let Some(cap) = self.softcap else {
            let scale = Some(self.scale);
            return Ok(Tensor::f_scaled_dot_product_attention(q, k, v, Some(mask), 0.0, false, scale, false)?);
        };
        // No fused kernel of libtorch caps scores; in float32, as the kernels compute inside.
        let wide = |t: &Tensor| t.f_to_kind(Kind::Float);
        let scores = wide(q)?.f_matmul(&wide(k)?.f_transpose(-2, -1)?)?.f_mul_scalar(self.scale)?;
        let scores = scores.f_div_scalar(cap)?.f_tanh()?.f_mul_scalar(cap)?.f_add(mask)?;
        Ok(scores.f_softmax(-1, Kind::Float)?.f_matmul(&wide(v)?)?.f_to_kind(q.kind())?)
    }
}

/// Additive masks of a pass over one sequence, for layers that see everything before them and for
/// local ones: 0 where a query may look, minus infinity elsewhere, in the model's dtype and repeated
/// for the query group, `[group * tokens, keys]`.
pub struct Mask {
    full: Tensor,
    /// None where the window holds all there is.
    local: Option<Tensor>,
}

impl Mask {
    /// `full` is `[tokens, keys]`; the positions of queries and keys, i64, say how far apart they are,
    /// and `last` is the highest.
    fn new(full: &Tensor, queries: &Tensor, keys: &Tensor, last: i64, heads: &Heads) -> Result<Self, TorchError> {
        let fold = |mask: &Tensor| mask.f_to_kind(heads.kind)?.f_repeat([heads.group, 1]);
        let local = match heads.window {
            Some(window) if last >= window => {
                let distance = queries.f_unsqueeze(1)?.f_sub(&keys.f_unsqueeze(0)?)?;
                Some(fold(&full.f_masked_fill(&distance.f_ge(window)?, f64::NEG_INFINITY)?)?)
            }
            _ => None,
        };
        Ok(Self { full: fold(full)?, local })
    }

    /// Of `tokens` that follow `before` others and see all of them.
    pub fn causal(before: i64, tokens: i64, heads: &Heads) -> Result<Self, TorchError> {
        let end = before + tokens;
        let keys = Tensor::f_arange(end, (Kind::Int64, heads.device))?;
        let full = Tensor::f_full([tokens, end], f64::NEG_INFINITY, (heads.kind, heads.device))?;
        Self::new(&full.f_triu(before + 1)?, &keys.f_narrow(0, before, tokens)?, &keys, end - 1, heads)
    }

    /// Those of several sequences of one length, `[sequences, 1, group * tokens, keys]`.
    fn stack(masks: Vec<Self>) -> Result<Self, TorchError> {
        let stacked = |local: bool| Tensor::f_stack(&masks.iter().map(|mask| mask.of(local)).collect::<Vec<_>>(), 0);
        let local = masks.iter().any(|mask| mask.local.is_some());
        let local = local.then(|| stacked(true)?.f_unsqueeze(1)).transpose()?;
        Ok(Self { full: stacked(false)?.f_unsqueeze(1)?, local })
    }

    pub fn of(&self, local: bool) -> &Tensor {
        self.local.as_ref().filter(|_| local).unwrap_or(&self.full)
    }
}

/// A prompt and the answers to it, laid out one after the other for a single pass:
/// `prompt, answer 0, answer 1, ..., padding`. Every answer sees the prompt and itself, so the
/// prompt's forward (and backward) pass is shared by all of them.
///
/// The padded length is [`Tree::bucket`] of the tokens alone. Scoring and training both go
/// through this layout, so on a CPU they compute the same numbers to the last bit, whatever else
/// is in flight. Where that is not asked for, several trees of one length share a pass ([`Tree::several`]).
pub struct Tree {
    /// `[padded]`, i64.
    pub ids: Tensor,
    /// `[padded]`, i64; every answer starts at its prompt's length.
    pub positions: Tensor,
    /// `[answer tokens]`, i64: the row whose hidden state predicts each answer token, in order.
    pub predictors: Tensor,
    /// `[answer tokens]`, i64: the answer tokens, in order.
    pub targets: Tensor,
    mask: Mask,
    heads: Heads,
    trees: i64,
}

impl Tree {
    /// Tokens of a pass are padded to the next multiple of this.
    pub const BUCKET: usize = 32;

    pub fn bucket(tokens: usize) -> usize {
        tokens.div_ceil(Self::BUCKET) * Self::BUCKET
    }

    /// An empty prompt has nothing to predict the first token from and is refused.
    pub fn new(prompt: &[u32], answers: &[&[u32]], heads: Heads) -> Result<Self, TorchError> {
        Self::several(&[Branches { prompt, answers: answers.to_vec() }], heads)
    }

    /// One tree after the other, each padded to the longest.
    pub fn several(trees: &[Branches<'_>], heads: Heads) -> Result<Self, TorchError> {
        if trees.iter().any(|tree| tree.prompt.is_empty()) {
            return Err(TorchError::Operation("a prompt without tokens can't be scored".into()));
        }
        let tokens = |tree: &Branches<'_>| tree.prompt.len() + tree.answers.iter().map(|a| a.len()).sum::<usize>();
        let padded = Self::bucket(trees.iter().map(tokens).max().unwrap_or_default());
        let (mut ids, mut positions): (Vec<i64>, Vec<i64>) = (Vec::new(), Vec::new());
        let (mut predictors, mut targets, mut masks) = (Vec::new(), Vec::new(), Vec::new());
        let index = |rows: &[i64]| Tensor::f_from_slice(rows)?.f_to_device(heads.device);
        for Branches { prompt, answers } in trees {
            let first = ids.len();
            ids.extend(prompt.iter().map(|&t| i64::from(t)));
            positions.extend(0..prompt.len() as i64);
            for answer in answers {
                let start = ids.len();
                for (i, &token) in answer.iter().enumerate() {
                    let before = if i == 0 { first + prompt.len() } else { start + i };
                    predictors.push(before as i64 - 1);
                    targets.push(i64::from(token));
                    ids.push(i64::from(token));
                    positions.push((prompt.len() + i) as i64);
                }
            }
            ids.resize(first + padded, 0);
            positions.resize(first + padded, 0);
            let lengths: Vec<usize> = answers.iter().map(|a| a.len()).collect();
            let mask = tree_mask(prompt.len(), &lengths, padded);
            let mask =
                Tensor::f_from_slice(&mask)?.f_view([padded as i64, padded as i64])?.f_to_device(heads.device)?;
            let own = index(&positions[first..])?;
            let last = positions[first..].iter().copied().max().unwrap_or(0);
            masks.push(Mask::new(&mask, &own, &own, last, &heads)?);
        }
        let mask = if masks.len() == 1 { masks.remove(0) } else { Mask::stack(masks)? };
        Ok(Self {
            ids: index(&ids)?,
            positions: index(&positions)?,
            predictors: index(&predictors)?,
            targets: index(&targets)?,
            mask,
            heads,
            trees: trees.len() as i64,
        })
    }
}

impl Attend for Tree {
    fn attend(&mut self, _layer: usize, local: bool, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor, TorchError> {
        self.heads.attention_of(self.trees, q, k, v, self.mask.of(local))
    }
}

/// Row-major additive mask, `[padded, padded]`: 0 where the row may look, minus infinity elsewhere.
/// Padding looks at itself, so that no row is empty (an empty row is NaN).
fn tree_mask(prompt: usize, lengths: &[usize], padded: usize) -> Vec<f32> {
    let mut mask = vec![f32::NEG_INFINITY; padded * padded];
    let mut open = |row: usize, from: usize, to: usize| mask[row * padded + from..row * padded + to].fill(0.0);
    for row in 0..prompt {
        open(row, 0, row + 1);
    }
    let mut start = prompt;
    for &length in lengths {
        for row in start..start + length {
            open(row, 0, prompt);
            open(row, start, row + 1);
        }
        start += length;
    }
    for row in start..padded {
        open(row, row, row + 1);
    }
    mask
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_see_the_prompt_and_themselves() {
        let mask = tree_mask(2, &[2, 1], 6);
        let seen: Vec<String> =
            mask.chunks(6).map(|row| row.iter().map(|v| if *v == 0.0 { '1' } else { '.' }).collect()).collect();
        assert_eq!(seen, ["1.....", "11....", "111...", "1111..", "11..1.", ".....1"]);
    }

    fn heads(softcap: Option<f64>, window: Option<i64>) -> Heads {
        let scale = 8_f64.powf(-0.5);
        let (kind, device) = (Kind::Float, Device::Cpu);
        Heads { layers: 1, kv_heads: 2, group: 3, head_dim: 8, scale, softcap, window, kind, device }
    }

    #[test]
    fn folded_groups_equal_repeated_heads() {
        tch::manual_seed(0);
        let (tokens, group, d) = (5, 3, 8);
        let random = |n: i64| Tensor::randn([tokens, n, d], (Kind::Float, Device::Cpu));
        let (q, k, v) = (random(2 * group), random(2), random(2));
        let mask = Mask::causal(0, tokens, &heads(None, None)).unwrap();
        let wide = |t: &Tensor| t.repeat_interleave_self_int(group, 1, None).transpose(0, 1);
        let repeated = Tensor::scaled_dot_product_attention(
            &q.transpose(0, 1),
            &wide(&k),
            &wide(&v),
            None::<Tensor>,
            0.0,
            true,
            None,
            false,
        );
        let repeated = repeated.transpose(0, 1).reshape([tokens, 2 * group * d]);
        // A cap far above every score changes nothing.
        for softcap in [None, Some(1e6)] {
            let folded = heads(softcap, None).attention(&q, &k, &v, mask.of(false)).unwrap();
            assert!((folded - &repeated).abs().max().double_value(&[]) < 1e-5, "{softcap:?}");
        }
    }

    #[test]
    fn local_layers_see_the_window() {
        let seen = |mask: &Tensor| -> Vec<String> {
            let rows = mask.narrow(0, 0, 2);
            (0..2)
                .map(|i| (0..5).map(|j| if rows.double_value(&[i, j]) == 0.0 { '1' } else { '.' }).collect())
                .collect()
        };
        let mask = Mask::causal(3, 2, &heads(None, Some(3))).unwrap();
        assert_eq!(seen(mask.of(false)), ["1111.", "11111"]);
        assert_eq!(seen(mask.of(true)), [".111.", "..111"]);
        let wide = Mask::causal(3, 2, &heads(None, Some(5))).unwrap();
        assert_eq!(seen(wide.of(true)), ["1111.", "11111"]);
    }
}
