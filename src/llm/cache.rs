//! The KV cache: one slot a running sequence, grown in buckets.

use tch::{Kind, Tensor};

use super::sequence::Move;
use crate::model::attention::{Attend, Heads, Mask};
use crate::torch::TorchError;
use crate::torch::ops::{self, Places};

/// Slot lengths are multiples of this.
const BUCKET: usize = 64;

/// Keys and values of the running sequences, by layer: `[slots, length, kv_heads, head_dim]` in the
/// model's dtype. A step works on the first slots only.
pub struct KvCache {
    layers: Vec<KeysValues>,
    slots: usize,
    length: usize,
    /// Counts how often the slots got other addresses.
    version: u64,
    heads: Heads,
}

pub struct KeysValues {
    pub keys: Tensor,
    pub values: Tensor,
}

/// Bytes of a slot that holds `tokens`.
pub fn slot_bytes(heads: &Heads, tokens: usize) -> usize {
    let token = heads.kv_heads as usize * heads.head_dim as usize * heads.kind.elt_size_in_bytes();
    2 * heads.layers * token * bucket(tokens)
}

fn bucket(tokens: usize) -> usize {
    tokens.div_ceil(BUCKET) * BUCKET
}

impl KvCache {
    pub fn new(heads: Heads) -> Self {
        Self { layers: Vec::new(), slots: 0, length: 0, version: 0, heads }
    }

    pub fn heads(&self) -> Heads {
        self.heads
    }

    pub fn slots(&self) -> usize {
        self.slots
    }

    /// Tokens that a slot holds.
    pub fn length(&self) -> usize {
        self.length
    }

    /// Another number whenever the slots have other addresses.
    pub fn version(&self) -> u64 {
        self.version
    }

    /// Room for `rows` sequences of `tokens` tokens, in at most `bytes` where that is possible; what
    /// the first `live` slots hold stays.
    pub fn reserve(&mut self, live: usize, rows: usize, tokens: usize, bytes: usize) -> Result<(), TorchError> {
        let affordable = |length: usize| bytes / slot_bytes(&self.heads, length).max(1);
        // A long sequence that has left is forgotten only when its length is in the way.
        let kept = bucket(tokens).max(self.length);
        let length = if rows <= affordable(kept) { kept } else { bucket(tokens) };
        if rows <= self.slots && length == self.length {
            return Ok(());
        }
        // Twice as many at a time: a queue is admitted one prompt after the other.
        let wanted = if rows > self.slots { rows.max(2 * self.slots) } else { self.slots };
        self.resize(live, wanted.min(affordable(length)).max(rows), length)
    }

    fn resize(&mut self, live: usize, slots: usize, length: usize) -> Result<(), TorchError> {
        let (heads, kept) = (self.heads, self.length.min(length) as i64);
        self.version += 1;
        let sizes = [slots as i64, length as i64, heads.kv_heads, heads.head_dim];
        let grown = |old: Option<&Tensor>| -> Result<Tensor, TorchError> {
            // Zeros, because what is masked must not be NaN.
            let new = Tensor::f_zeros(sizes, (heads.kind, heads.device))?;
            if let Some(old) = old {
                let live = |t: &Tensor| t.f_narrow(0, 0, live as i64).and_then(|t| t.f_narrow(1, 0, kept));
                live(&new)?.f_copy_(&live(old)?)?;
            }
            Ok(new)
        };
        // Layer by layer, so that only one is there twice.
        for layer in 0..heads.layers {
            let old = self.layers.get(layer);
            let new = KeysValues { keys: grown(old.map(|l| &l.keys))?, values: grown(old.map(|l| &l.values))? };
            match self.layers.get_mut(layer) {
                Some(old) => *old = new,
                None => self.layers.push(new),
            }
        }
        (self.slots, self.length) = (slots, length);
        Ok(())
    }

    /// Gives everything back.
    pub fn clear(&mut self) {
        self.layers.clear();
        self.version += 1;
        (self.slots, self.length) = (0, 0);
    }

    /// Makes moves in their order.
    pub fn apply(&self, moves: &[Move]) -> Result<(), TorchError> {
        for m in moves {
            for tensor in self.layers.iter().flat_map(|l| [&l.keys, &l.values]) {
                let slot = |slot: usize| tensor.f_select(0, slot as i64)?.f_narrow(0, 0, m.tokens as i64);
                slot(m.to)?.f_copy_(&slot(m.from)?)?;
            }
        }
        Ok(())
    }

    /// Writes a computed prompt to the beginning of a slot.
    pub fn write(&self, slot: usize, prompt: &Past) -> Result<(), TorchError> {
        for (layer, new) in self.layers.iter().zip(&prompt.layers) {
            for (tensor, new) in [(&layer.keys, &new.keys), (&layer.values, &new.values)] {
                tensor.f_select(0, slot as i64)?.f_narrow(0, 0, new.size3()?.0)?.f_copy_(new)?;
            }
        }
        Ok(())
    }

    /// One token for each of the first slots; `positions` (`[rows]`, i64, on the device) is where it goes, and
    /// `longest` the highest of them.
    pub fn decode(&self, positions: &Tensor, longest: usize) -> Result<Decode<'_>, TorchError> {
        let seen = if self.heads.served() {
            Seen::Places(Places::new(positions, self.length as i64)?)
        } else {
            Seen::Masked(self.masked(positions, longest)?)
        };
        Ok(Decode { cache: self, positions: positions.shallow_clone(), seen })
    }

    fn masked(&self, positions: &Tensor, longest: usize) -> Result<Masked, TorchError> {
        let Heads { kind, device, window, .. } = self.heads;
        let rows = positions.size1()?;
        let longest = longest + 1;
        let length = bucket(longest).min(self.length) as i64;
        let columns = Tensor::f_arange(length, (Kind::Int64, device))?;
        let distance = positions.f_unsqueeze(1)?.f_sub(&columns.f_unsqueeze(0)?)?;
        let mask = |hidden: Tensor| -> Result<Tensor, TorchError> {
            let mut mask = Tensor::f_zeros([rows, length], (kind, device))?;
            Ok(mask.f_masked_fill_(&hidden, f64::NEG_INFINITY)?.f_view([rows, 1, 1, length])?)
        };
        let later = distance.f_lt(0)?;
        let local = match window.filter(|window| longest as i64 > *window) {
            Some(window) => Some(mask(later.f_logical_or(&distance.f_ge(window)?)?)?),
            None => None,
        };
        let slots = Tensor::f_arange(rows, (Kind::Int64, device))?;
        Ok(Masked { slots, full: mask(later)?, local, length })
    }
}

/// Keys and values of the beginning of a prompt, by layer: `[tokens, kv_heads, head_dim]`.
pub struct Past {
    layers: Vec<KeysValues>,
}

impl Past {
    pub fn new(layers: Vec<KeysValues>) -> Self {
        Self { layers }
    }

    pub fn tokens(&self) -> i64 {
        self.layers.first().and_then(|l| l.keys.size().first().copied()).unwrap_or(0)
    }

    pub fn layer(&self, layer: usize) -> Option<&KeysValues> {
        self.layers.get(layer)
    }

    /// The same in memory of its own.
    pub fn copied(&self) -> Result<Self, TorchError> {
        let layers = self
            .layers
            .iter()
            .map(|l| Ok(KeysValues { keys: l.keys.f_detach_copy()?, values: l.values.f_detach_copy()? }));
        Ok(Self { layers: layers.collect::<Result<_, TorchError>>()? })
    }

    /// The first `tokens` of it.
    pub fn first(&self, tokens: i64) -> Result<Self, TorchError> {
        let first = |t: &Tensor| t.f_narrow(0, 0, tokens);
        let layers = self.layers.iter().map(|l| Ok(KeysValues { keys: first(&l.keys)?, values: first(&l.values)? }));
        Ok(Self { layers: layers.collect::<Result<_, TorchError>>()? })
    }
}

/// The attention of a pass over several prompts, or the next part of long ones, side by side.
pub struct Prefill<'a> {
    parts: Vec<Part<'a>>,
    /// Who sees what, where our own operations attend.
    pass: Option<ops::Pass>,
    heads: Heads,
}

struct Part<'a> {
    tokens: i64,
    before: Option<&'a Past>,
    /// `None` where our own operations do without.
    mask: Option<Mask>,
    layers: Vec<KeysValues>,
}

impl<'a> Prefill<'a> {
    /// `parts` are the number of new tokens and what was computed before them, in the order of the pass.
    pub fn new(heads: Heads, parts: impl Iterator<Item = (usize, Option<&'a Past>)>) -> Result<Self, TorchError> {
        let part = |(tokens, before): (usize, Option<&'a Past>)| -> Result<Part<'a>, TorchError> {
            let tokens = tokens as i64;
            let past = before.map_or(0, Past::tokens);
            let mask = if heads.served() { None } else { Some(Mask::causal(past, tokens, &heads)?) };
            Ok(Part { tokens, before, mask, layers: Vec::with_capacity(heads.layers) })
        };
        let parts = parts.map(part).collect::<Result<Vec<_>, _>>()?;
        let pass = heads.served().then(|| pass(&parts));
        Ok(Self { parts, pass, heads })
    }

    /// What has been computed of each prompt, in the order of the pass.
    pub fn into_pasts(self) -> Vec<Past> {
        self.parts.into_iter().map(|part| Past { layers: part.layers }).collect()
    }

    /// Keeps keys and values of a layer, each part's with what came before.
    fn keep(&mut self, layer: usize, k: &Tensor, v: &Tensor) -> Result<(), TorchError> {
        let mut start = 0;
        for part in &mut self.parts {
            let own = |t: &Tensor| t.f_narrow(0, start, part.tokens);
            part.layers.push(match part.before.and_then(|p| p.layer(layer)) {
                Some(past) => KeysValues {
                    keys: Tensor::f_cat(&[&past.keys, &own(k)?], 0)?,
                    values: Tensor::f_cat(&[&past.values, &own(v)?], 0)?,
                },
                None => KeysValues { keys: own(k)?, values: own(v)? },
            });
            start += part.tokens;
        }
        Ok(())
    }
}

/// Every part sees what came before it, which is a source of its own, and itself.
fn pass(parts: &[Part<'_>]) -> ops::Pass {
    let mut pass = ops::Pass::default();
    let (mut first, mut source) = (0, 0);
    for part in parts {
        let before = part.before.map(|past| {
            source += 1;
            ops::Rows { source, first: 0, count: past.tokens() }
        });
        pass.push(part.tokens, before.into_iter().chain([ops::Rows { source: 0, first, count: part.tokens }]));
        first += part.tokens;
    }
    pass
}

impl Attend for Prefill<'_> {
    fn attend(&mut self, layer: usize, local: bool, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor, TorchError> {
        if let Some(pass) = &self.pass {
            let pasts = self.parts.iter().filter_map(|part| part.before?.layer(layer));
            let sources: Vec<_> = [(k, v)].into_iter().chain(pasts.map(|past| (&past.keys, &past.values))).collect();
            let Heads { window, scale, softcap, .. } = self.heads;
            let out = pass.attend(q, &sources, window.filter(|_| local), scale, softcap)?;
            // Copied, or they would hold the memory of the whole pass.
            self.keep(layer, &k.f_contiguous()?, &v.f_contiguous()?)?;
            return Ok(out);
        }
        self.keep(layer, k, v)?;
        let mut start = 0;
        let mut out = Vec::with_capacity(self.parts.len());
        for part in &self.parts {
            let (Some(kept), Some(mask)) = (part.layers.last(), &part.mask) else { continue };
            let own = q.f_narrow(0, start, part.tokens)?;
            out.push(self.heads.attention(&own, &kept.keys, &kept.values, mask.of(local))?);
            start += part.tokens;
        }
        if out.len() == 1 { Ok(out.swap_remove(0)) } else { Ok(Tensor::f_cat(&out, 0)?) }
    }
}

/// The attention of a decode step.
pub struct Decode<'a> {
    cache: &'a KvCache,
    positions: Tensor,
    seen: Seen,
}

/// What a decode step sees of the slots.
enum Seen {
    /// By our own operations.
    Places(Places),
    Masked(Masked),
}

/// What libtorch's attention needs for a decode step.
struct Masked {
    slots: Tensor,
    /// Additive masks, `[rows, 1, 1, length]`, for layers that see everything and for local ones; one
    /// serves both where the window holds all there is.
    full: Tensor,
    local: Option<Tensor>,
    length: i64,
}

impl Attend for Decode<'_> {
    fn attend(&mut self, layer: usize, local: bool, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor, TorchError> {
        let heads = self.cache.heads;
        let Some(KeysValues { keys, values }) = self.cache.layers.get(layer) else {
            return Err(TorchError::Operation(format!("the cache has no layer {layer}")));
        };
        let masked = match &self.seen {
            Seen::Masked(masked) => masked,
            Seen::Places(places) => {
                let window = heads.window.filter(|_| local);
                let Heads { scale, softcap, .. } = heads;
                return ops::Slots { keys, values, window, scale, softcap }.attend(q, k, v, places);
            }
        };
        let Heads { kv_heads, group, head_dim, .. } = heads;
        let rows = q.size3()?.0;
        let index = [Some(&masked.slots), Some(&self.positions)];
        // In place; what comes back is another handle to the cache.
        let _ = keys.shallow_clone().f_index_put_(&index, k, false)?;
        let _ = values.shallow_clone().f_index_put_(&index, v, false)?;
        let seen = |t: &Tensor| t.f_narrow(0, 0, rows)?.f_narrow(1, 0, masked.length)?.f_transpose(1, 2);
        let q = q.f_reshape([rows, kv_heads, group, head_dim])?;
        let mask = masked.local.as_ref().filter(|_| local).unwrap_or(&masked.full);
        let out = heads.batched(&q, &seen(keys)?, &seen(values)?, mask)?;
        Ok(out.f_reshape([rows, kv_heads * group * head_dim])?)
    }
}
