//! Prompts with their answers side by side in one pass, without padding.

use tch::Tensor;

use super::attention::{Attend, Heads};
use crate::torch::TorchError;
use crate::torch::gradient::{Attention, attend_back};
use crate::torch::ops::{Pass, Rows};

/// Trees of several prompts laid out one after the other: `prompt, answer 0, answer 1, ..., prompt, ...`. Every
/// answer sees its prompt and itself, so a prompt's pass is shared by its answers. The last token of an answer
/// predicts nothing and is left out.
///
/// For our own operations alone: libtorch's attention would compute all that a mask hides.
pub struct Pack {
    /// `[tokens]`, i64.
    pub ids: Tensor,
    /// `[tokens]`, i64; every answer starts at its prompt's length.
    pub positions: Tensor,
    /// `[answer tokens]`, i64: the row whose hidden state predicts each answer token, in order.
    pub predictors: Tensor,
    /// `[answer tokens]`, i64: the answer tokens, in order.
    pub targets: Tensor,
    pass: Pass,
    /// Stretches of each tree.
    stretches: Vec<i64>,
    heads: Heads,
}

/// A prompt and the answers to it.
pub struct Branches<'a> {
    pub prompt: &'a [u32],
    pub answers: Vec<&'a [u32]>,
}

impl Branches<'_> {
    /// Tokens that go through the model.
    pub fn tokens(&self) -> usize {
        self.prompt.len() + self.answers.iter().map(|a| a.len().saturating_sub(1)).sum::<usize>()
    }
}

impl Pack {
    /// # Errors
    /// A prompt without tokens has nothing to predict the first token from.
    pub fn new(trees: &[Branches<'_>], heads: Heads) -> Result<Self, TorchError> {
        let (mut ids, mut positions) = (Vec::new(), Vec::new());
        let (mut predictors, mut targets) = (Vec::new(), Vec::new());
        let (mut pass, mut stretches) = (Pass::default(), Vec::new());
        for Branches { prompt, answers } in trees {
            if prompt.is_empty() {
                return Err(TorchError::Operation("a prompt without tokens can't be scored".into()));
            }
            let shared = Rows { source: 0, first: ids.len() as i64, count: prompt.len() as i64 };
            ids.extend(prompt.iter().map(|t| i64::from(*t)));
            positions.extend(0..shared.count);
            pass.push(shared.count, [shared]);
            let mut count = 1;
            for answer in answers {
                let own = Rows { source: 0, first: ids.len() as i64, count: answer.len() as i64 - 1 };
                let last_of_prompt = shared.first + shared.count - 1;
                predictors
                    .extend((0..answer.len() as i64).map(|i| if i == 0 { last_of_prompt } else { own.first + i - 1 }));
                targets.extend(answer.iter().map(|t| i64::from(*t)));
                if own.count > 0 {
                    ids.extend(answer[..answer.len() - 1].iter().map(|t| i64::from(*t)));
                    positions.extend(shared.count..shared.count + own.count);
                    pass.push(own.count, [shared, own]);
                    count += 1;
                }
            }
            stretches.push(count);
        }
        let index = |rows: &[i64]| Tensor::f_from_slice(rows)?.f_to_device(heads.device);
        Ok(Self {
            ids: index(&ids)?,
            positions: index(&positions)?,
            predictors: index(&predictors)?,
            targets: index(&targets)?,
            pass,
            stretches,
            heads,
        })
    }

    /// From the gradient of what attention gave, `[tokens, heads * head_dim]` float32, to that of `qkv`, which holds
    /// what it was given: `[tokens, heads + 2 * kv_heads, head_dim]`.
    pub fn attend_back(&self, local: bool, qkv: &Tensor, d_out: &Tensor) -> Result<Tensor, TorchError> {
        let Heads { kv_heads, group, scale, .. } = self.heads;
        let how = Attention { kv_heads, group, window: self.window(local), scale };
        attend_back(&self.pass, &self.stretches, how, qkv, d_out)
    }

    fn window(&self, local: bool) -> Option<i64> {
        self.heads.window.filter(|_| local)
    }
}

impl Attend for &Pack {
    fn attend(&mut self, _layer: usize, local: bool, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor, TorchError> {
        self.pass.attend(q, &[(k, v)], self.window(local), self.heads.scale, self.heads.softcap)
    }
}
