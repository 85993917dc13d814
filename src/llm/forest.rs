//! The attention of scoring requests that share a pass: what they begin with in common is computed once.

use tch::Tensor;

use super::cache::{KeysValues, Past};
use crate::model::attention::{Attend, Heads, Mask};
use crate::torch::{TorchError, ops};

/// Token sequences as a trie. Every node is a stretch of tokens that is computed once, whoever goes
/// through it; it sees its ancestors and itself.
///
/// All sequences may go on from one `before`, which was computed in an earlier pass.
pub struct Forest<'a> {
    heads: Heads,
    before: Option<&'a Past>,
    /// The first is the root; it has no tokens.
    nodes: Vec<Node>,
    /// In the order of the pass. Empty until [`Forest::layout`].
    stretches: Vec<Stretch>,
    /// Who sees what, where our own operations attend.
    pass: Option<ops::Pass>,
    /// Keys and values of the root's only child, by layer.
    trunk: Vec<KeysValues>,
}

#[derive(Default)]
struct Node {
    tokens: Vec<u32>,
    children: Vec<usize>,
    /// Row of its first token in the pass.
    row: usize,
}

/// A node in the pass.
struct Stretch {
    tokens: i64,
    /// `(first row, rows)` of its ancestors and itself; neighbours are one.
    seen: Vec<(i64, i64)>,
    row: i64,
    /// `None` where our own operations do without.
    mask: Option<Mask>,
}

/// What a pass computes: `ids` and `positions`, both `[tokens]` i64.
pub struct Layout {
    pub ids: Tensor,
    pub positions: Tensor,
}

impl<'a> Forest<'a> {
    pub fn new(heads: Heads, before: Option<&'a Past>) -> Self {
        let pass = heads.served().then(ops::Pass::default);
        Self { heads, before, nodes: vec![Node::default()], stretches: Vec::new(), pass, trunk: Vec::new() }
    }

    /// Adds a sequence, which goes on from what was computed before.
    pub fn insert(&mut self, mut tokens: &[u32]) {
        let mut at = 0;
        while let Some(first) = tokens.first() {
            let Some(next) = self.child(at, *first) else {
                let node = Node { tokens: tokens.to_vec(), ..Node::default() };
                self.nodes.push(node);
                let new = self.nodes.len() - 1;
                self.nodes[at].children.push(new);
                return;
            };
            let common = common_prefix(&self.nodes[next].tokens, tokens);
            self.split(next, common);
            tokens = &tokens[common..];
            at = next;
        }
    }

    fn child(&self, node: usize, first: u32) -> Option<usize> {
        self.nodes[node].children.iter().copied().find(|c| self.nodes[*c].tokens.first() == Some(&first))
    }

    /// Cuts a node after `keep` of its tokens; the rest becomes its only child.
    fn split(&mut self, node: usize, keep: usize) {
        if keep == self.nodes[node].tokens.len() {
            return;
        }
        let tokens = self.nodes[node].tokens.split_off(keep);
        let new = self.nodes.len();
        let children = std::mem::replace(&mut self.nodes[node].children, vec![new]);
        self.nodes.push(Node { tokens, children, row: 0 });
    }

    /// Puts the nodes in a row, parents before children.
    pub fn layout(&mut self) -> Result<Layout, TorchError> {
        let device = self.heads.device;
        let past = self.before.map_or(0, Past::tokens);
        let (mut ids, mut positions) = (Vec::new(), Vec::new());
        let mut open: Vec<(usize, Vec<(i64, i64)>)> = vec![(0, Vec::new())];
        while let Some((node, above)) = open.pop() {
            let (row, tokens) = (ids.len() as i64, self.nodes[node].tokens.len() as i64);
            let depth = past + above.iter().map(|(_, rows)| rows).sum::<i64>();
            self.nodes[node].row = ids.len();
            ids.extend(self.nodes[node].tokens.iter().map(|t| i64::from(*t)));
            positions.extend(depth..depth + tokens);
            let seen = extend(above, row, tokens);
            // The last comes off first: a node's first child follows it.
            open.extend(self.nodes[node].children.iter().rev().map(|child| (*child, seen.clone())));
            if tokens > 0 {
                let mask = match &mut self.pass {
                    Some(pass) => {
                        let before = self.before.map(|past| ops::Rows { source: 1, first: 0, count: past.tokens() });
                        let own = seen.iter().map(|&(first, count)| ops::Rows { source: 0, first, count });
                        pass.push(tokens, before.into_iter().chain(own));
                        None
                    }
                    None => Some(Mask::causal(depth, tokens, &self.heads)?),
                };
                self.stretches.push(Stretch { tokens, seen, row, mask });
            }
        }
        Ok(Layout {
            ids: Tensor::f_from_slice(&ids)?.f_to_device(device)?,
            positions: Tensor::f_from_slice(&positions)?.f_to_device(device)?,
        })
    }

    /// Rows of a sequence's tokens in the pass. It must have been inserted.
    pub fn rows(&self, mut tokens: &[u32]) -> Vec<i64> {
        let mut rows = Vec::with_capacity(tokens.len());
        let mut at = 0;
        while let Some(next) = tokens.first().and_then(|first| self.child(at, *first)) {
            let node = &self.nodes[next];
            let count = node.tokens.len().min(tokens.len());
            rows.extend((node.row..node.row + count).map(|row| row as i64));
            tokens = &tokens[count..];
            at = next;
        }
        rows
    }

    /// The tokens that all sequences begin with after `before`.
    fn trunk(&self) -> &[u32] {
        match self.nodes[0].children.as_slice() {
            [only] => &self.nodes[*only].tokens,
            _ => &[],
        }
    }

    /// The tokens that all sequences begin with and what was computed of them, unless there is a
    /// `before`.
    pub fn into_trunk(self) -> Option<(Vec<u32>, Past)> {
        let tokens = self.trunk().to_vec();
        (!self.trunk.is_empty()).then(|| (tokens, Past::new(self.trunk)))
    }
}

impl Attend for Forest<'_> {
    fn attend(&mut self, layer: usize, local: bool, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor, TorchError> {
        let before = self.before.and_then(|past| past.layer(layer));
        if before.is_none()
            && let trunk @ 1.. = self.trunk().len() as i64
        {
            // Copied, or it would hold the memory of the whole pass.
            let copy = |t: &Tensor| t.f_narrow(0, 0, trunk)?.f_detach_copy();
            self.trunk.push(KeysValues { keys: copy(k)?, values: copy(v)? });
        }
        if let Some(pass) = &self.pass {
            let past = before.map(|past| (&past.keys, &past.values));
            let sources: Vec<_> = [(k, v)].into_iter().chain(past).collect();
            let Heads { window, scale, softcap, .. } = self.heads;
            return pass.attend(q, &sources, window.filter(|_| local), scale, softcap);
        }
        let mut out = Vec::with_capacity(self.stretches.len());
        for stretch in &self.stretches {
            let all = |past: Option<&Tensor>, new: &Tensor| -> Result<Tensor, TorchError> {
                let seen = stretch.seen.iter().map(|(row, rows)| new.f_narrow(0, *row, *rows));
                let mut parts = seen.collect::<Result<Vec<_>, _>>()?;
                if let Some(past) = past {
                    parts.insert(0, past.shallow_clone());
                }
                Ok(if parts.len() == 1 { parts.swap_remove(0) } else { Tensor::f_cat(&parts, 0)? })
            };
            let (keys, values) = (all(before.map(|b| &b.keys), k)?, all(before.map(|b| &b.values), v)?);
            let own = q.f_narrow(0, stretch.row, stretch.tokens)?;
            let Some(mask) = &stretch.mask else { continue };
            out.push(self.heads.attention(&own, &keys, &values, mask.of(local))?);
        }
        if out.len() == 1 { Ok(out.swap_remove(0)) } else { Ok(Tensor::f_cat(&out, 0)?) }
    }
}

/// `seen` and the rows of one node more.
fn extend(mut seen: Vec<(i64, i64)>, row: i64, rows: i64) -> Vec<(i64, i64)> {
    match seen.last_mut() {
        _ if rows == 0 => {}
        Some((first, count)) if *first + *count == row => *count += rows,
        _ => seen.push((row, rows)),
    }
    seen
}

/// Tokens that both begin with.
pub fn common_prefix(a: &[u32], b: &[u32]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use tch::{Device, Kind};

    use super::*;

    fn forest(sequences: &[Vec<u32>]) -> (Forest<'static>, Layout) {
        let mut forest = Forest::new(Heads::of(&crate::llm::fixture::model().config, Kind::Float, Device::Cpu), None);
        sequences.iter().for_each(|s| forest.insert(s));
        let layout = forest.layout().unwrap();
        (forest, layout)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        /// Every sequence finds its own tokens at its own positions, sees exactly them, and nothing is
        /// computed twice.
        #[test]
        fn sequences_find_their_tokens(sequences in prop::collection::vec(prop::collection::vec(0..3_u32, 1..8), 1..7)) {
            let (forest, layout) = forest(&sequences);
            let ids = Vec::<i64>::try_from(&layout.ids).unwrap();
            let positions = Vec::<i64>::try_from(&layout.positions).unwrap();
            for sequence in &sequences {
                let rows = forest.rows(sequence);
                let found: Vec<u32> = rows.iter().map(|row| ids[*row as usize] as u32).collect();
                prop_assert_eq!(&found, sequence);
                let at: Vec<i64> = rows.iter().map(|row| positions[*row as usize]).collect();
                prop_assert_eq!(at, (0..sequence.len() as i64).collect::<Vec<_>>());
                let last = rows[rows.len() - 1];
                let stretch = forest.stretches.iter().find(|s| (s.row..s.row + s.tokens).contains(&last)).unwrap();
                let seen: Vec<i64> = stretch.seen.iter().flat_map(|(row, rows)| *row..row + rows).collect();
                prop_assert_eq!(&seen[..rows.len()], &rows[..]);
            }
            let distinct: std::collections::BTreeSet<_> =
                sequences.iter().flat_map(|s| (1..=s.len()).map(|n| s[..n].to_vec())).collect();
            prop_assert_eq!(ids.len(), distinct.len());
        }
    }

    #[test]
    fn the_trunk_is_what_all_begin_with() {
        assert_eq!(forest(&[vec![1, 2, 3], vec![1, 2], vec![1, 2, 4, 5]]).0.trunk(), [1, 2]);
        assert!(forest(&[vec![1, 2], vec![2]]).0.trunk().is_empty());
    }
}
