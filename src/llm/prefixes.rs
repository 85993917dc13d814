//! What the prompts of a stage begin with: the chat template's head, a judge's instruction. It is computed once
//! an adapter and kept from one pass to the next.

use std::collections::HashMap;

use super::cache::Past;
use super::forest::common_prefix;
use crate::torch::TorchError;

/// A beginning is kept from this many tokens on; computing fewer again costs less than keeping.
const KEPT_FROM: usize = 16;

/// The beginnings that are kept, by stage.
#[derive(Default)]
pub struct Prefixes {
    known: HashMap<String, Prefix>,
    /// The latest prompt of stages without a beginning, with its adapter's key.
    latest: HashMap<String, (u64, Vec<u32>)>,
}

struct Prefix {
    adapter: u64,
    tokens: Vec<u32>,
    past: Past,
}

impl Prefixes {
    #[cfg(test)]
    pub fn tokens(&self) -> usize {
        self.known.values().map(|prefix| prefix.tokens.len()).sum()
    }

    /// What all of `prompts` begin with; cuts what is kept to that, and forgets it where that is little.
    pub fn of_all<'a>(
        &mut self,
        stage: &str,
        adapter: u64,
        prompts: impl Iterator<Item = &'a [u32]>,
    ) -> Result<Option<&Past>, TorchError> {
        let Some(mut prefix) = self.known.remove(stage).filter(|p| p.adapter == adapter) else { return Ok(None) };
        let shared = prompts.map(|prompt| shared(&prefix.tokens, prompt)).min().unwrap_or(0);
        if shared < KEPT_FROM {
            return Ok(None);
        }
        if shared < prefix.tokens.len() {
            prefix.tokens.truncate(shared);
            prefix.past = prefix.past.first(shared as i64)?;
        }
        Ok(Some(&self.known.entry(stage.to_owned()).or_insert(prefix).past))
    }

    /// What `prompt` begins with, where enough of it is kept.
    pub fn of(&self, stage: &str, adapter: u64, prompt: &[u32]) -> Result<Option<Past>, TorchError> {
        let Some(prefix) = self.known.get(stage).filter(|p| p.adapter == adapter) else { return Ok(None) };
        let shared = shared(&prefix.tokens, prompt);
        if shared < KEPT_FROM { Ok(None) } else { Ok(Some(prefix.past.first(shared as i64)?)) }
    }

    /// `tokens` are what all of a stage's prompts began with so far, and `past` was computed of them alone.
    pub fn keep(&mut self, stage: &str, adapter: u64, tokens: Vec<u32>, past: Past) {
        if tokens.len() >= KEPT_FROM {
            self.known.insert(stage.to_owned(), Prefix { adapter, tokens, past });
        }
    }

    /// `past` was computed of a stage's `prompt`: what it begins with in common with the one before is kept.
    pub fn learn(&mut self, stage: &str, adapter: u64, prompt: &[u32], past: &Past) -> Result<(), TorchError> {
        if self.of_all(stage, adapter, std::iter::once(prompt))?.is_some() {
            return Ok(());
        }
        let latest = self.latest.insert(stage.to_owned(), (adapter, prompt.to_vec()));
        let common = latest.filter(|(key, _)| *key == adapter).map_or(0, |(_, tokens)| shared(&tokens, prompt));
        if common >= KEPT_FROM {
            // Copied, or it would hold the memory of the whole prompt.
            let past = past.first(common as i64)?.copied()?;
            self.keep(stage, adapter, prompt[..common].to_vec(), past);
            self.latest.remove(stage);
        }
        Ok(())
    }
}

/// Tokens of `known` that `prompt` begins with, but for its last, which is always computed: what comes after the
/// prompt is predicted from it.
fn shared(known: &[u32], prompt: &[u32]) -> usize {
    common_prefix(known, prompt).min(prompt.len().saturating_sub(1))
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind, Tensor};

    use super::super::cache::KeysValues;
    use super::*;

    fn past(tokens: i64) -> Past {
        let rows = || Tensor::arange(tokens, (Kind::Float, Device::Cpu)).view([tokens, 1, 1]);
        Past::new(vec![KeysValues { keys: rows(), values: rows() }])
    }

    fn prompt(common: u32, own: u32) -> Vec<u32> {
        (0..common).chain([1000 + own, 1001 + own]).collect()
    }

    #[test]
    fn what_two_prompts_share_is_kept_and_cut_to_what_all_share() {
        let mut prefixes = Prefixes::default();
        let known = |p: &Prefixes, adapter, prompt: &[u32]| p.of("s", adapter, prompt).unwrap().map(|p| p.tokens());
        prefixes.learn("s", 0, &prompt(40, 0), &past(42)).unwrap();
        assert_eq!(known(&prefixes, 0, &prompt(40, 9)), None, "one prompt shares nothing");
        prefixes.learn("s", 0, &prompt(40, 5), &past(42)).unwrap();
        assert_eq!(known(&prefixes, 0, &prompt(40, 9)), Some(40));
        assert_eq!(known(&prefixes, 1, &prompt(40, 9)), None, "of another adapter");
        assert_eq!(known(&prefixes, 0, &prompt(20, 9)), Some(20));
        assert_eq!(known(&prefixes, 0, &(0..30).collect::<Vec<_>>()), Some(29), "the last is always computed");
        assert_eq!(known(&prefixes, 0, &prompt(10, 9)), None, "too few");
        prefixes.learn("s", 0, &prompt(20, 7), &past(22)).unwrap();
        assert_eq!(prefixes.tokens(), 20);
        prefixes.learn("s", 1, &prompt(40, 0), &past(42)).unwrap();
        assert_eq!(prefixes.tokens(), 0, "another adapter starts anew");
    }
}
