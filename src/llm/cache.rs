//! The KV cache: one slot a running sequence, grown in buckets.

use tch::{Device, Kind, Tensor};

use crate::model::Config;
use crate::model::attention::{Attend, fold_mask, grouped_attention};
use crate::torch::TorchError;

/// Slot lengths are multiples of this.
const BUCKET: i64 = 64;

/// Keys and values of the running sequences, by layer: `[slots, length, kv_heads, head_dim]` in the
/// model's dtype. Sequence `i` of the server is slot `i`; a step works on the first slots only.
pub struct KvCache {
    keys: Vec<Tensor>,
    values: Vec<Tensor>,
    slots: i64,
    length: i64,
    shape: Shape,
}

#[derive(Clone, Copy)]
struct Shape {
    layers: usize,
    kv_heads: i64,
    group: i64,
    head_dim: i64,
    kind: Kind,
    device: Device,
}

pub fn bucket(tokens: usize) -> i64 {
    (tokens as i64 + BUCKET - 1) / BUCKET * BUCKET
}

/// Bytes that one token takes in all layers.
pub fn bytes_per_token(config: &Config, kind: Kind) -> usize {
    2 * config.layers * config.kv_heads * config.head_dim * kind.elt_size_in_bytes()
}

impl KvCache {
    pub fn new(config: &Config, kind: Kind, device: Device) -> Self {
        let shape = Shape {
            layers: config.layers,
            kv_heads: config.kv_heads as i64,
            group: (config.heads / config.kv_heads) as i64,
            head_dim: config.head_dim as i64,
            kind,
            device,
        };
        Self { keys: Vec::new(), values: Vec::new(), slots: 0, length: 0, shape }
    }

    /// Room for `slots` sequences of `tokens` tokens; what is there stays.
    pub fn reserve(&mut self, slots: usize, tokens: usize) -> Result<(), TorchError> {
        let (slots, length) = ((slots as i64).max(self.slots), bucket(tokens).max(self.length));
        if slots == self.slots && length == self.length {
            return Ok(());
        }
        let (old_slots, old_length, shape) = (self.slots, self.length, self.shape);
        let grow = |old: Option<&Tensor>| -> Result<Tensor, TorchError> {
            let new = Tensor::f_zeros([slots, length, shape.kv_heads, shape.head_dim], (shape.kind, shape.device))?;
            if let Some(old) = old {
                new.f_narrow(0, 0, old_slots)?.f_narrow(1, 0, old_length)?.f_copy_(old)?;
            }
            Ok(new)
        };
        // Layer by layer, so that only one is there twice.
        for layer in 0..shape.layers {
            for tensors in [&mut self.keys, &mut self.values] {
                let new = grow(tensors.get(layer))?;
                if layer < tensors.len() {
                    tensors[layer] = new;
                } else {
                    tensors.push(new);
                }
            }
        }
        (self.slots, self.length) = (slots, length);
        Ok(())
    }

    /// Gives everything back.
    pub fn clear(&mut self) {
        self.keys.clear();
        self.values.clear();
        (self.slots, self.length) = (0, 0);
    }

    /// Slot `from`, `tokens` long, takes the place of slot `to`.
    pub fn move_slot(&mut self, from: usize, to: usize, tokens: usize) -> Result<(), TorchError> {
        for tensor in self.keys.iter().chain(&self.values) {
            let source = tensor.f_select(0, from as i64)?.f_narrow(0, 0, tokens as i64)?;
            tensor.f_select(0, to as i64)?.f_narrow(0, 0, tokens as i64)?.f_copy_(&source)?;
        }
        Ok(())
    }

    /// One prompt, its keys and values written to `count` slots from `first`.
    pub fn prefill(&mut self, first: usize, count: usize, tokens: usize) -> Result<Prefill<'_>, TorchError> {
        let tokens = tokens as i64;
        let options = (self.shape.kind, self.shape.device);
        let mask = Tensor::f_full([tokens, tokens], f64::NEG_INFINITY, options)?.f_triu(1)?;
        let mask = fold_mask(&mask, self.shape.group)?;
        Ok(Prefill { cache: self, first: first as i64, count: count as i64, mask })
    }

    /// One token for each of the first slots; `positions` is where it goes.
    pub fn decode(&mut self, positions: &[i64]) -> Result<Decode<'_>, TorchError> {
        let rows = positions.len() as i64;
        let longest = positions.iter().max().map_or(0, |p| *p + 1);
        let length = bucket(longest as usize).min(self.length);
        let device = self.shape.device;
        let positions = Tensor::f_from_slice(positions)?.f_to_device(device)?;
        let columns = Tensor::f_arange(length, (Kind::Int64, device))?;
        let hidden = columns.f_unsqueeze(0)?.f_gt_tensor(&positions.f_unsqueeze(1)?)?;
        let mask = Tensor::f_zeros([rows, length], (self.shape.kind, device))?;
        let mask = mask.f_masked_fill(&hidden, f64::NEG_INFINITY)?.f_view([rows, 1, 1, length])?;
        let slots = Tensor::f_arange(rows, (Kind::Int64, device))?;
        Ok(Decode { cache: self, slots, positions, mask, length })
    }
}

/// The attention of a prompt's pass.
pub struct Prefill<'a> {
    cache: &'a mut KvCache,
    first: i64,
    count: i64,
    mask: Tensor,
}

impl Attend for Prefill<'_> {
    fn attend(&mut self, layer: usize, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor, TorchError> {
        let tokens = q.size3()?.0;
        for (tensor, new) in [(&self.cache.keys[layer], k), (&self.cache.values[layer], v)] {
            let place = tensor.f_narrow(0, self.first, self.count)?.f_narrow(1, 0, tokens)?;
            let mut place = place;
            place.f_copy_(&new.f_unsqueeze(0)?.f_expand_as(&place)?)?;
        }
        grouped_attention(q, k, v, &self.mask)
    }
}

/// The attention of a decode step.
pub struct Decode<'a> {
    cache: &'a mut KvCache,
    slots: Tensor,
    pub positions: Tensor,
    /// `[rows, 1, 1, length]`, additive.
    mask: Tensor,
    length: i64,
}

impl Attend for Decode<'_> {
    fn attend(&mut self, layer: usize, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor, TorchError> {
        let Shape { kv_heads, group, head_dim, .. } = self.cache.shape;
        let rows = q.size3()?.0;
        let index = [Some(&self.slots), Some(&self.positions)];
        // In place; what comes back is another handle to the cache.
        let _ = self.cache.keys[layer].f_index_put_(&index, k, false)?;
        let _ = self.cache.values[layer].f_index_put_(&index, v, false)?;
        let seen = |tensor: &Tensor| -> Result<Tensor, TorchError> {
            Ok(tensor.f_narrow(0, 0, rows)?.f_narrow(1, 0, self.length)?.f_transpose(1, 2)?)
        };
        // The query group is folded into the query length, as in `grouped_attention`.
        let q = q.f_reshape([rows, kv_heads, group, head_dim])?;
        let (k, v) = (seen(&self.cache.keys[layer])?, seen(&self.cache.values[layer])?);
        let out = Tensor::f_scaled_dot_product_attention(&q, &k, &v, Some(&self.mask), 0.0, false, None, false)?;
        Ok(out.f_reshape([rows, kv_heads * group * head_dim])?)
    }
}
