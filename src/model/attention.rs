//! Attention over grouped heads, and the one pass that scores and trains.

use tch::{Device, Kind, Tensor};

use crate::torch::TorchError;

/// How the queries of one forward pass find their keys. The transformer hands over what it
/// projected; a KV cache, a packed block or a tree of answers decide what is attended to.
pub trait Attend {
    /// `q` is `[tokens, heads, head_dim]`, `k` and `v` are `[tokens, kv_heads, head_dim]`, all after
    /// the rotary embedding. Returns `[tokens, heads * head_dim]`.
    fn attend(&mut self, layer: usize, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor, TorchError>;
}

/// Scaled dot-product attention with grouped heads, one sequence.
///
/// `q` is `[tokens, heads, d]`; `k` and `v` are `[keys, kv_heads, d]`; `mask` is additive, in `q`'s
/// dtype, `[heads / kv_heads * tokens, keys]` (see [`fold_mask`]). The query group is folded into
/// the query length: libtorch's fast kernels take a mask or grouped heads but not both.
pub fn grouped_attention(q: &Tensor, k: &Tensor, v: &Tensor, mask: &Tensor) -> Result<Tensor, TorchError> {
    let (tokens, heads, d) = q.size3()?;
    let (_, kv_heads, _) = k.size3()?;
    let group = heads / kv_heads;
    let q =
        q.f_view([tokens, kv_heads, group, d])?.f_permute([1, 2, 0, 3])?.f_reshape([1, kv_heads, group * tokens, d])?;
    let k = k.f_transpose(0, 1)?.f_unsqueeze(0)?;
    let v = v.f_transpose(0, 1)?.f_unsqueeze(0)?;
    let out = Tensor::f_scaled_dot_product_attention(&q, &k, &v, Some(mask), 0.0, false, None, false)?;
    Ok(out.f_view([kv_heads, group, tokens, d])?.f_permute([2, 0, 1, 3])?.f_reshape([tokens, heads * d])?)
}

/// Repeats a `[tokens, keys]` mask for the folded query group of [`grouped_attention`].
pub fn fold_mask(mask: &Tensor, group: i64) -> Result<Tensor, TorchError> {
    Ok(mask.f_repeat([group, 1])?)
}

/// A prompt and the answers to it, laid out one after the other for a single pass:
/// `prompt, answer 0, answer 1, ..., padding`. Every answer sees the prompt and itself, so the
/// prompt's forward (and backward) pass is shared by all of them.
///
/// The padded length is [`Tree::bucket`] of the tokens alone. Scoring and training both go
/// through this layout, so on a CPU they compute the same numbers to the last bit, whatever else
/// is in flight.
pub struct Tree {
    /// `[padded]`, i64.
    pub ids: Tensor,
    /// `[padded]`, i64; every answer starts at the prompt's length.
    pub positions: Tensor,
    /// `[answer tokens]`, i64: the row whose hidden state predicts each answer token, in order.
    pub predictors: Tensor,
    /// `[answer tokens]`, i64: the answer tokens, in order.
    pub targets: Tensor,
    /// Length of each answer.
    pub lengths: Vec<i64>,
    mask: Tensor,
}

impl Tree {
    /// Tokens of a pass are padded to the next multiple of this.
    pub const BUCKET: usize = 32;

    pub fn bucket(tokens: usize) -> usize {
        tokens.div_ceil(Self::BUCKET) * Self::BUCKET
    }

    /// `group` is query heads per kv head, `kind` the dtype of the transformer. An empty prompt has
    /// nothing to predict the first token from and is refused.
    pub fn new(prompt: &[u32], answers: &[&[u32]], group: i64, kind: Kind, device: Device) -> Result<Self, TorchError> {
        if prompt.is_empty() {
            return Err(TorchError::Operation("a prompt without tokens can't be scored".into()));
        }
        let tokens = prompt.len() + answers.iter().map(|a| a.len()).sum::<usize>();
        let padded = Self::bucket(tokens);
        let mut ids: Vec<i64> = Vec::with_capacity(padded);
        let mut positions: Vec<i64> = Vec::with_capacity(padded);
        let (mut predictors, mut targets, mut lengths) = (Vec::new(), Vec::new(), Vec::new());
        ids.extend(prompt.iter().map(|&t| i64::from(t)));
        positions.extend(0..prompt.len() as i64);
        for answer in answers {
            let start = ids.len() as i64;
            for (i, &token) in answer.iter().enumerate() {
                predictors.push(if i == 0 { prompt.len() as i64 - 1 } else { start + i as i64 - 1 });
                targets.push(i64::from(token));
                ids.push(i64::from(token));
                positions.push((prompt.len() + i) as i64);
            }
            lengths.push(answer.len() as i64);
        }
        ids.resize(padded, 0);
        positions.resize(padded, 0);
        let mask = tree_mask(prompt.len(), &lengths, padded);
        let mask = Tensor::f_from_slice(&mask)?.f_view([padded as i64, padded as i64])?.f_to_kind(kind)?;
        Ok(Self {
            ids: Tensor::f_from_slice(&ids)?.f_to_device(device)?,
            positions: Tensor::f_from_slice(&positions)?.f_to_device(device)?,
            predictors: Tensor::f_from_slice(&predictors)?.f_to_device(device)?,
            targets: Tensor::f_from_slice(&targets)?.f_to_device(device)?,
            lengths,
            mask: fold_mask(&mask.f_to_device(device)?, group)?,
        })
    }
}

impl Attend for Tree {
    fn attend(&mut self, _layer: usize, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor, TorchError> {
        grouped_attention(q, k, v, &self.mask)
    }
}

/// Row-major additive mask, `[padded, padded]`: 0 where the row may look, minus infinity elsewhere.
/// Padding looks at itself, so that no row is empty (an empty row is NaN).
fn tree_mask(prompt: usize, lengths: &[i64], padded: usize) -> Vec<f32> {
    let mut mask = vec![f32::NEG_INFINITY; padded * padded];
    let mut open = |row: usize, from: usize, to: usize| mask[row * padded + from..row * padded + to].fill(0.0);
    for row in 0..prompt {
        open(row, 0, row + 1);
    }
    let mut start = prompt;
    for &length in lengths {
        for row in start..start + length as usize {
            open(row, 0, prompt);
            open(row, start, row + 1);
        }
        start += length as usize;
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

    #[test]
    fn folded_groups_equal_repeated_heads() {
        tch::manual_seed(0);
        let (tokens, heads, kv_heads, d) = (5, 6, 2, 8);
        let q = Tensor::randn([tokens, heads, d], (Kind::Float, Device::Cpu));
        let k = Tensor::randn([tokens, kv_heads, d], (Kind::Float, Device::Cpu));
        let v = Tensor::randn([tokens, kv_heads, d], (Kind::Float, Device::Cpu));
        let causal = Tensor::full([tokens, tokens], f64::NEG_INFINITY, (Kind::Float, Device::Cpu)).triu(1);
        let folded = grouped_attention(&q, &k, &v, &fold_mask(&causal, heads / kv_heads).unwrap()).unwrap();
        let wide = |t: &Tensor| t.repeat_interleave_self_int(heads / kv_heads, 1, None).transpose(0, 1);
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
        let repeated = repeated.transpose(0, 1).reshape([tokens, heads * d]);
        assert!((folded - repeated).abs().max().double_value(&[]) < 1e-6);
    }
}
