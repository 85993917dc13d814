//! Comparison of each [`Path`] with float32 on the CPU.

use tch::{Device, Kind, Tensor};

use super::super::ops::{LoraPair, Rows, Slots, Stretch, Turn};
use super::super::{TorchError, plain};
use super::{Gpu, How, Layout, Path, Places, drawn, plan};

/// Largest error of a bf16 result: some times its rounding.
const ROUNDED: f64 = 0.02;

/// Largest error of a sum in float32.
const SUMMED: f64 = 1e-5;

/// One result beside the same in float32 on the CPU.
#[derive(Debug, Clone)]
pub struct Check {
    pub name: String,
    /// Largest difference, as a share of the largest number where that is above 1.
    pub error: f64,
    pub bound: f64,
}

impl Check {
    pub fn passes(&self) -> bool {
        // NaN passes nothing.
        self.error <= self.bound
    }
}

/// The operations that compute.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// The path itself.
    Own,
    /// libtorch's operations, which stand in for it.
    Libtorch,
}

/// Shapes of the tensors that are compared.
#[derive(Debug, Clone, Copy)]
pub struct Sizes {
    rows: i64,
    /// Width of the residual stream.
    width: i64,
    heads: i64,
    kv_heads: i64,
    head_dim: i64,
    vocabulary: i64,
    /// Tokens of a slot of the KV cache.
    slot: i64,
}

impl Sizes {
    /// Compared whenever a GPU is first used; odd, so that no block is full.
    pub const SMALL: Self =
        Self { rows: 5, width: 70, heads: 6, kv_heads: 2, head_dim: 64, vocabulary: 1000, slot: 1024 };
    /// Those of a model of some billion parameters.
    pub const LARGE: Self =
        Self { rows: 33, width: 4096, heads: 32, kv_heads: 8, head_dim: 128, vocabulary: 128_256, slot: 1024 };
}

impl Gpu {
    /// Computes what `path` is for on random tensors, in one way or the other, and compares it. Where nothing stands
    /// in for a path, nothing is compared the other way.
    ///
    /// # Errors
    /// When the path can't be taken at all.
    pub fn check(&self, path: Path, way: Way, sizes: &Sizes) -> Result<Vec<Check>, TorchError> {
        let mut look = Look { gpu: self, way, sizes, random: Random(0), checks: Vec::new() };
        match path {
            Path::Norm => look.norm()?,
            Path::Rotary => look.rotary()?,
            Path::KvStore => look.store()?,
            Path::Gate => look.gate()?,
            Path::Flash => look.flash()?,
            Path::Lora if way == Way::Own => look.lora()?,
            Path::Sampling if way == Way::Own => look.sampling()?,
            Path::Lora | Path::Sampling => {}
        }
        Ok(look.checks)
    }
}

/// A comparison under way.
struct Look<'a> {
    gpu: &'a Gpu,
    way: Way,
    sizes: &'a Sizes,
    random: Random,
    checks: Vec<Check>,
}

/// Random numbers on the device, and the same in float32 on the CPU.
struct Numbers {
    there: Tensor,
    here: Tensor,
}

impl Look<'_> {
    fn numbers(&mut self, size: &[i64], kind: Kind) -> Result<Numbers, TorchError> {
        let drawn = self.random.normal(size.iter().product::<i64>() as usize);
        let rounded = Tensor::f_from_slice(&drawn)?.f_view(size)?.f_to_kind(kind)?;
        // A copy, because operations in place would change what lies on the CPU itself.
        Ok(Numbers { there: rounded.f_to_device(self.gpu.device)?, here: wide(&rounded.f_detach_copy()?)? })
    }

    fn compare(&mut self, name: &str, found: &Tensor, expected: &Tensor, bound: f64) -> Result<(), TorchError> {
        self.told(name, apart(found, expected)?, bound);
        Ok(())
    }

    fn told(&mut self, name: &str, error: f64, bound: f64) {
        let stands_in = if self.way == Way::Libtorch { ", libtorch's" } else { "" };
        let size = if self.sizes.width > Sizes::SMALL.width { ", large" } else { "" };
        self.checks.push(Check { name: format!("{name}{stands_in}{size}"), error, bound });
    }

    fn norm(&mut self) -> Result<(), TorchError> {
        let (rows, width) = (self.sizes.rows, self.sizes.width);
        let (x, add) = (self.numbers(&[rows, width], Kind::Float)?, self.numbers(&[rows, width], Kind::BFloat16)?);
        let weight = self.numbers(&[width], Kind::Float)?;
        let norm = |add: Option<&Tensor>| match self.way {
            Way::Own => self.gpu.add_norm(&x.there, add, &weight.there, 1e-5),
            Way::Libtorch => plain::add_norm(&x.there, add, &weight.there, 1e-5, Kind::BFloat16),
        };
        let (alone, summed) = (norm(None)?, norm(Some(&add.there))?);
        let sum = x.here.f_add(&add.here)?;
        let expected = |x: &Tensor| x.f_rms_norm([width], Some(&weight.here), 1e-5);
        self.compare("norm", &alone, &expected(&x.here)?, ROUNDED)?;
        self.compare("norm of a sum", &summed, &expected(&sum)?, ROUNDED)?;
        self.compare("the sum", &x.there, &sum, 1e-6)
    }

    fn gate(&mut self) -> Result<(), TorchError> {
        let (rows, width) = (self.sizes.rows, self.sizes.width);
        let both = self.numbers(&[rows, 2 * width], Kind::BFloat16)?;
        let (gate, up) = (both.here.f_narrow(1, 0, width)?, both.here.f_narrow(1, width, width)?);
        for (name, gelu) in [("SiLU", false), ("GELU", true)] {
            let found = match self.way {
                Way::Own => self.gpu.gate(&both.there, gelu)?,
                Way::Libtorch => plain::gate(&both.there, gelu)?,
            };
            let active = if gelu { gate.f_gelu("tanh")? } else { gate.f_silu()? };
            self.compare(name, &found, &active.f_mul(&up)?, ROUNDED)?;
        }
        Ok(())
    }

    /// Norms and rotations of queries and keys, each alone and together.
    fn rotary(&mut self) -> Result<(), TorchError> {
        let Sizes { rows, heads, kv_heads, head_dim, .. } = *self.sizes;
        // Some families turn a part of each head.
        for (name, normed, dims) in [
            ("norms of heads", true, None),
            ("rotary embedding", false, Some(head_dim)),
            ("norms, part turned", true, Some(head_dim / 2)),
        ] {
            let qkv = self.numbers(&[rows, heads + 2 * kv_heads, head_dim], Kind::BFloat16)?;
            let (q_norm, k_norm) = (self.numbers(&[head_dim], Kind::Float)?, self.numbers(&[head_dim], Kind::Float)?);
            let table = [rows, 1, dims.unwrap_or(head_dim)];
            let (cos, sin) = (self.numbers(&table, Kind::BFloat16)?, self.numbers(&table, Kind::BFloat16)?);
            let turn = Turn {
                norms: normed.then_some((&q_norm.there, &k_norm.there)),
                eps: 1e-6,
                angles: dims.map(|_| (&cos.there, &sin.there)),
            };
            let here = Turn {
                norms: normed.then_some((&q_norm.here, &k_norm.here)),
                eps: 1e-6,
                angles: dims.map(|_| (&cos.here, &sin.here)),
            };
            match self.way {
                Way::Own => self.gpu.turn(&turn, &qkv.there, heads, kv_heads)?,
                Way::Libtorch => plain::turn(&turn, &qkv.there, heads, kv_heads)?,
            }
            self.compare(name, &qkv.there, &turned(&here, &qkv.here, heads, kv_heads)?, ROUNDED)?;
        }
        Ok(())
    }

    /// A row under adapters of different ranks.
    fn lora(&mut self) -> Result<(), TorchError> {
        let Sizes { rows, width, .. } = *self.sizes;
        let outputs = width + 8;
        let (x, out) = (self.numbers(&[rows, width], Kind::BFloat16)?, self.numbers(&[rows, outputs], Kind::BFloat16)?);
        let expected = out.here.f_detach_copy()?;
        let mut matrices = Vec::new();
        // The rows between the second and the third are nobody's.
        for (rank, columns, first) in [(8, width / 4, 0), (3, width / 2, width / 4), (24, 7, width)] {
            let (a, b) = (self.numbers(&[rank, width], Kind::Float)?, self.numbers(&[columns, rank], Kind::Float)?);
            let change = x.here.f_linear(&a.here, None::<&Tensor>)?.f_linear(&b.here, None::<&Tensor>)?;
            let _ = expected.f_narrow(1, first, columns)?.f_add_(&change.f_mul_scalar(0.02)?)?;
            matrices.push((a.there, b.there, first));
        }
        let pairs: Vec<_> = matrices.iter().map(|(a, b, first)| LoraPair { a, b, first: *first }).collect();
        if !self.gpu.add_lora(&x.there, &pairs, 0.02, &out.there)? {
            return Err(TorchError::Operation("an adapter does not fit".into()));
        }
        self.compare("adapters", &out.there, &expected, ROUNDED)
    }

    fn sampling(&mut self) -> Result<(), TorchError> {
        let vocabulary = self.sizes.vocabulary;
        let logits = self.numbers(&[6, vocabulary], Kind::Float)?.here.f_mul_scalar(3.0)?;
        let temperatures = [0.0_f32, 1.0, 0.7, 1.5, 1.0, 0.3];
        // Likely ones: a float32 has to tell their shares apart.
        let ranks = Tensor::f_from_slice(&[0_i64, 1, 2, 3, 4, 1])?.f_unsqueeze(1)?;
        let wanted = logits.f_topk(5, 1, true, true)?.1.f_gather(1, &ranks, false)?;
        let heat = Tensor::f_from_slice(&temperatures.map(|t| if t > 0.0 { t } else { 1.0 }))?.f_unsqueeze(1)?;
        let shares = logits.f_div(&heat)?.f_softmax(-1, Kind::Double)?;
        let below = shares.f_cumsum(-1, Kind::Double)?.f_sub(&shares)?.f_gather(1, &wanted, false)?;
        let middle = below.f_add(&shares.f_gather(1, &wanted, false)?.f_mul_scalar(0.5)?)?.f_squeeze_dim(1)?;
        let how = temperatures.iter().zip(Vec::<f64>::try_from(middle)?);
        let how = how.map(|(t, u)| How { temperature: *t, uniform: u as f32, ..How::default() });
        let (tokens, logprobs) = self.draws(&logits, how)?;
        self.compare("sampled tokens", &tokens, &wanted.f_squeeze_dim(1)?, 0.0)?;
        let expected = logits.f_log_softmax(-1, Kind::Double)?.f_gather(1, &wanted, false)?.f_squeeze_dim(1)?;
        self.compare("their log-probs", &logprobs, &expected, SUMMED)?;
        self.filters()
    }

    /// Tokens that top-k, top-p and min-p leave.
    fn filters(&mut self) -> Result<(), TorchError> {
        const FILTERS: [(u32, f32, f32, f32); 7] = [
            (0, 1.0, 0.0, 1.0),
            (7, 1.0, 0.0, 0.7),
            (0, 0.8, 0.0, 1.0),
            (0, 1.0, 0.1, 1.5),
            (20, 0.5, 0.02, 0.9),
            (3, 0.99, 2.0, 1.0),
            (0, 0.0, 0.0, 1.0),
        ];
        for (top_k, top_p, min_p, temperature) in FILTERS {
            // Rounded, so that some are equally likely; few, so that a float32 tells every token's share.
            let logits = self.random.normal(70);
            let logits: Vec<f32> = logits.iter().map(|n| (n * 4.0).round() / 2.0).collect();
            let how = How { temperature, uniform: 0.0, top_k, top_p, min_p };
            let left = stay(&logits, &how);
            let (total, mut below) = (left.iter().map(|t| t.1).sum::<f64>(), 0.0);
            let rows = left.iter().map(|(_, weight)| {
                below += weight;
                How { uniform: ((below - weight / 2.0) / total) as f32, ..how }
            });
            let rows: Vec<_> = rows.collect();
            let all = Tensor::f_from_slice(&logits)?.f_unsqueeze(0)?.f_repeat([rows.len() as i64, 1])?;
            let (tokens, _) = self.draws(&all, rows.into_iter())?;
            let expected: Vec<i64> = left.iter().map(|t| t.0 as i64).collect();
            let name = format!("top-k {top_k}, top-p {top_p}, min-p {min_p}");
            self.compare(&name, &tokens, &Tensor::f_from_slice(&expected)?, 0.0)?;
        }
        Ok(())
    }

    /// Tokens and log-probs that the device draws, one a row.
    fn draws(&self, logits: &Tensor, how: impl Iterator<Item = How>) -> Result<(Tensor, Tensor), TorchError> {
        let device = self.gpu.device;
        let (logits, plan) = (logits.f_to_device(device)?, Tensor::f_from_slice(&plan(how))?.f_view([3, -1])?);
        let found = self.gpu.draw(&logits, &logits, &plan.f_to_device(device)?)?;
        let found: Vec<i64> = Vec::try_from(found.f_to_device(Device::Cpu)?)?;
        let (tokens, logprobs): (Vec<i64>, Vec<f32>) =
            found.into_iter().map(drawn).map(|(t, l)| (i64::from(t), l)).unzip();
        Ok((Tensor::f_from_slice(&tokens)?, Tensor::f_from_slice(&logprobs)?))
    }

    /// Slots, and a step's queries, keys and values for some of them, with their positions.
    fn step(&mut self) -> Result<([Numbers; 3], Vec<i64>), TorchError> {
        let Sizes { rows, heads, kv_heads, head_dim, slot, .. } = *self.sizes;
        let rows = rows.min(8);
        let cache = [rows + 1, slot, kv_heads, head_dim];
        let keys = self.numbers(&cache, Kind::BFloat16)?;
        let values = self.numbers(&cache, Kind::BFloat16)?;
        let qkv = self.numbers(&[rows, heads + 2 * kv_heads, head_dim], Kind::BFloat16)?;
        // The first place, the last, and some between.
        let positions = (0..rows).map(|row| [0, 3, slot - 1, 5, slot * 2 / 3][row as usize % 5]).collect();
        Ok(([keys, values, qkv], positions))
    }

    fn places(&self, positions: &[i64]) -> Result<Places, TorchError> {
        Places::new(Tensor::f_from_slice(positions)?.f_to_device(self.gpu.device)?, self.sizes.slot)
    }

    fn store(&mut self) -> Result<(), TorchError> {
        let ([keys, values, qkv], positions) = self.step()?;
        let Sizes { heads, kv_heads, .. } = *self.sizes;
        let slots = Slots { keys: &keys.there, values: &values.there, window: None, scale: 1.0, softcap: None };
        let part = |qkv: &Tensor, first| qkv.f_narrow(1, first, kv_heads);
        let (k, v) = (part(&qkv.there, heads)?, part(&qkv.there, heads + kv_heads)?);
        match self.way {
            Way::Own => self.gpu.store(&k, &v, &slots, &self.places(&positions)?)?,
            Way::Libtorch => plain::store(&k, &v, &slots, &self.places(&positions)?)?,
        }
        for (name, found, first) in [("stored keys", &keys, heads), ("stored values", &values, heads + kv_heads)] {
            for (row, position) in (0..).zip(&positions) {
                let mut place = found.here.f_get(row)?.f_get(*position)?;
                place.f_copy_(&part(&qkv.here, first)?.f_get(row)?)?;
            }
            self.compare(name, &found.there, &found.here, 0.0)?;
        }
        Ok(())
    }

    fn flash(&mut self) -> Result<(), TorchError> {
        for (name, window) in [("attention of a decode step", None), ("attention within a window", Some(5))] {
            let ([keys, values, qkv], positions) = self.step()?;
            let slots = Slots { keys: &keys.there, values: &values.there, window, scale: 0.125, softcap: None };
            let q = qkv.there.f_narrow(1, 0, self.sizes.heads)?;
            let places = self.places(&positions)?;
            let found = match self.way {
                Way::Own => self.gpu.attend_slots(&slots, &places, &q)?,
                Way::Libtorch => plain::attend_slots(&slots, &places, &q)?,
            };
            let mut most = 0.0_f64;
            for (row, position) in (0..).zip(positions) {
                let first = window.map_or(0, |w: i64| (position + 1 - w).max(0));
                let seen = |t: &Tensor| t.f_get(row)?.f_narrow(0, first, position + 1 - first);
                let q = qkv.here.f_get(row)?.f_narrow(0, 0, self.sizes.heads)?.f_unsqueeze(0)?;
                let expected = attention(&q, &seen(&keys.here)?, &seen(&values.here)?, 0.125)?;
                most = worse(most, apart(&found.f_get(row)?, &expected.f_get(0)?)?);
            }
            self.told(name, most, ROUNDED);
        }
        self.pass()
    }

    /// Stretches of a pass that see keys before them, and their own up to themselves.
    fn pass(&mut self) -> Result<(), TorchError> {
        let Sizes { heads, kv_heads, head_dim, .. } = *self.sizes;
        let past = [self.numbers(&[20, kv_heads, head_dim], Kind::BFloat16)?, {
            self.numbers(&[20, kv_heads, head_dim], Kind::BFloat16)?
        }];
        let qkv = self.numbers(&[30, heads + 2 * kv_heads, head_dim], Kind::BFloat16)?;
        let cut = |qkv: &Tensor| -> Result<[Tensor; 3], TorchError> {
            let part = |first, count| qkv.f_narrow(1, first, count);
            Ok([part(0, heads)?, part(heads, kv_heads)?, part(heads + kv_heads, kv_heads)?])
        };
        let ([q, k, v], [q_here, k_here, v_here]) = (cut(&qkv.there)?, cut(&qkv.here)?);
        let rows = |source, first, count| Rows { source, first, count };
        let told = [
            (4, vec![rows(1, 0, 19), rows(0, 0, 4)]),
            (20, vec![rows(0, 4, 20)]),
            (6, vec![rows(1, 0, 20), rows(0, 0, 4), rows(0, 24, 6)]),
        ];
        let stretches: Vec<_> =
            told.iter().map(|(tokens, rows)| Stretch { tokens: *tokens, rows: rows.len() as i64 }).collect();
        let all: Vec<_> = told.iter().flat_map(|(_, rows)| rows.iter().copied()).collect();
        let sources = [(&k, &v), (&past[0].there, &past[1].there)];
        let found = match self.way {
            Way::Own => {
                let layout = Layout::new(&stretches, &all, &[30, 20], self.gpu.device)?;
                self.gpu.attend_pass(&q, &sources, &layout, None, 0.125)?
            }
            Way::Libtorch => plain::attend_pass((&stretches, &all), &q, &sources, None, 0.125)?,
        };
        let (mut most, mut row) = (0.0_f64, 0);
        for (tokens, rows) in told {
            let seen = |own: &Tensor, past: &Tensor| -> Result<Tensor, TorchError> {
                let of = |r: &Rows| if r.source == 0 { own } else { past }.f_narrow(0, r.first, r.count);
                Ok(Tensor::f_cat(&rows.iter().map(of).collect::<Result<Vec<_>, _>>()?, 0)?)
            };
            let (keys, values) = (seen(&k_here, &past[0].here)?, seen(&v_here, &past[1].here)?);
            let expected = attention(&q_here.f_narrow(0, row, tokens)?, &keys, &values, 0.125)?;
            most = worse(most, apart(&found.f_narrow(0, row, tokens)?, &expected)?);
            row += tokens;
        }
        self.told("attention of a pass", most, ROUNDED);
        Ok(())
    }
}

/// Random numbers that are the same everywhere: a GPU is asked at every start, and must not fail by chance.
struct Random(u64);

impl Random {
    /// Sums of four uniform numbers, as good as normal and of variance 1.
    fn normal(&mut self, count: usize) -> Vec<f32> {
        let deviation = (4.0 / 12.0_f32).sqrt() * f32::from(u16::MAX);
        (0..count)
            .map(|_| {
                // splitmix64 (Steele, Lea and Flood 2014)
                self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
                let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
                let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
                let z = z ^ (z >> 31);
                let sum: i32 = (0..4).map(|i| i32::from((z >> (16 * i)) as u16)).sum();
                (sum - 2 * i32::from(u16::MAX)) as f32 / deviation
            })
            .collect()
    }
}

/// [`Turn::apply`] in float32, by the definition.
fn turned(turn: &Turn<'_>, qkv: &Tensor, queries: i64, keys: i64) -> Result<Tensor, TorchError> {
    let (_, heads, width) = qkv.size3()?;
    let part = |first, count| qkv.f_narrow(1, first, count);
    let (mut q, mut k, v) = (part(0, queries)?, part(queries, keys)?, part(queries + keys, heads - queries - keys)?);
    if let Some((q_norm, k_norm)) = turn.norms {
        q = q.f_rms_norm([width], Some(q_norm), turn.eps)?;
        k = k.f_rms_norm([width], Some(k_norm), turn.eps)?;
    }
    let mut both = Tensor::f_cat(&[q, k], 1)?;
    if let Some((cos, sin)) = turn.angles {
        let dims = cos.size().last().copied().unwrap_or(0);
        let x = both.f_narrow(2, 0, dims)?;
        let x = x.f_mul(cos)?.f_add(&x.f_roll([dims / 2], [-1])?.f_mul(sin)?)?;
        both = Tensor::f_cat(&[x, both.f_narrow(2, dims, width - dims)?], 2)?;
    }
    Ok(Tensor::f_cat(&[both, v], 1)?)
}

/// Attention in float32, operation by operation, of tokens whose own keys are the last: `[tokens, heads, d]` and
/// `[keys, kv_heads, d]` to `[tokens, heads * d]`.
fn attention(q: &Tensor, k: &Tensor, v: &Tensor, scale: f64) -> Result<Tensor, TorchError> {
    let ((tokens, heads, _), (keys, kv_heads, _)) = (q.size3()?, k.size3()?);
    let all = |t: &Tensor| t.f_repeat_interleave_self_int(heads / kv_heads, 1, None)?.f_transpose(0, 1);
    let (q, k, v) = (q.f_transpose(0, 1)?, all(k)?, all(v)?);
    let hidden = Tensor::f_ones([tokens, keys], (Kind::Bool, q.device()))?.f_triu(keys - tokens + 1)?;
    let scores = q.f_matmul(&k.f_transpose(1, 2)?)?.f_mul_scalar(scale)?;
    let scores = scores.f_masked_fill(&hidden, f64::NEG_INFINITY)?;
    Ok(scores.f_softmax(-1, Kind::Float)?.f_matmul(&v)?.f_transpose(0, 1)?.f_flatten(1, 2)?)
}

/// Weights of the tokens that stay after transformers' filters, by their definition, in the order of the tokens.
fn stay(logits: &[f32], how: &How) -> Vec<(usize, f64)> {
    let most = logits.iter().copied().fold(f32::MIN, f32::max);
    let weight = |l: &f32| f64::from((l - most) / how.temperature).exp();
    let mut sorted: Vec<(usize, f64)> = logits.iter().map(weight).enumerate().collect();
    sorted.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    if let Some((_, last)) = how.top_k.checked_sub(1).and_then(|k| sorted.get(k as usize).copied()) {
        sorted.retain(|t| t.1 >= last);
    }
    let total: f64 = sorted.iter().map(|t| t.1).sum();
    let mut sum = 0.0;
    if how.top_p < 1.0
        && let Some(crossing) = sorted.iter().position(|t| {
            sum += t.1;
            sum >= f64::from(how.top_p) * total
        })
    {
        sorted.truncate(crossing + 1);
    }
    sorted.retain(|t| t.1 >= f64::from(how.min_p).min(1.0));
    sorted.sort_by_key(|t| t.0);
    sorted
}

fn wide(tensor: &Tensor) -> Result<Tensor, TorchError> {
    Ok(tensor.f_to_device(Device::Cpu)?.f_to_kind(Kind::Float)?)
}

/// The larger difference; what is no number is larger than all.
fn worse(a: f64, b: f64) -> f64 {
    if a > b || a.is_nan() { a } else { b }
}

/// The largest difference, as a share of the largest number of `expected` where that is above 1.
fn apart(found: &Tensor, expected: &Tensor) -> Result<f64, TorchError> {
    // libtorch's maximum is NaN where a number is.
    let most = |t: Tensor| -> Result<f64, TorchError> { Ok(t.f_abs()?.f_max()?.f_double_value(&[])?) };
    let (found, expected) = (wide(found)?, wide(expected)?);
    Ok(most(found.f_sub(&expected)?)? / most(expected)?.max(1.0))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::super::super::kernels::Kernels;
    use super::*;

    fn host() -> Gpu {
        Gpu { kernels: Ok(Kernels::Host { broken: None }), shim: None, device: Device::Cpu, off: BTreeMap::new() }
    }

    #[test]
    fn kernels_compute_what_the_cpu_does() {
        for path in Path::ALL.into_iter().filter(|path| path.is_kernel()) {
            let checks = host().check(path, Way::Own, &Sizes::SMALL).unwrap();
            assert!(!checks.is_empty());
            for check in checks {
                assert!(check.passes(), "{check:?}");
            }
        }
    }

    #[test]
    fn what_stands_in_computes_the_same() {
        let mut names = Vec::new();
        for path in Path::ALL {
            for check in host().check(path, Way::Libtorch, &Sizes::SMALL).unwrap() {
                assert!(check.passes(), "{check:?}");
                names.push(check.name);
            }
        }
        assert_eq!(names.len(), 13, "{names:?}");
    }

    #[test]
    fn what_is_no_number_passes_nothing() {
        let check = |error| Check { name: String::new(), error, bound: 1.0 }.passes();
        assert!(check(1.0) && !check(1.1) && !check(f64::NAN));
        assert!(worse(f64::NAN, 0.0).is_nan() && worse(0.0, f64::NAN).is_nan());
        let nan = Tensor::from_slice(&[f32::NAN, 0.0]);
        assert!(apart(&nan, &Tensor::from_slice(&[0.0_f32, 0.0])).unwrap().is_nan());
    }

    #[test]
    fn random_numbers_are_as_good_as_normal() {
        let numbers = Random(7).normal(100_000);
        let mean = numbers.iter().sum::<f32>() / 1e5;
        let variance = numbers.iter().map(|n| n * n).sum::<f32>() / 1e5;
        assert!(mean.abs() < 0.02 && (variance - 1.0).abs() < 0.02, "{mean} {variance}");
    }
}
