//! The operations of [`super::ops`] made of libtorch's, for a GPU whose own path is switched off.
//!
//! They may be captured in a CUDA graph: nothing here waits for the GPU.

use tch::{Device, Kind, Tensor};

use super::TorchError;
use super::gpu::Places;
use super::ops::{Rows, Slots, Stretch, Turn};

fn wide(tensor: &Tensor) -> Result<Tensor, TorchError> {
    Ok(tensor.f_to_kind(Kind::Float)?)
}

/// See [`super::ops::add_norm`].
pub fn add_norm(x: &Tensor, add: Option<&Tensor>, weight: &Tensor, eps: f64, kind: Kind) -> Result<Tensor, TorchError> {
    if let Some(add) = add {
        let _ = x.shallow_clone().f_add_(&wide(add)?)?;
    }
    Ok(x.f_rms_norm([x.size2()?.1], Some(weight), eps)?.f_to_kind(kind)?)
}

/// See [`Turn::apply`].
pub fn turn(turn: &Turn<'_>, qkv: &Tensor, queries: i64, keys: i64) -> Result<(), TorchError> {
    let width = qkv.size3()?.2;
    if let Some((q, k)) = turn.norms {
        for (first, count, weight) in [(0, queries, q), (queries, keys, k)] {
            let mut heads = qkv.f_narrow(1, first, count)?;
            heads.f_copy_(&wide(&heads)?.f_rms_norm([width], Some(weight), turn.eps)?)?;
        }
    }
    let Some((cos, sin)) = turn.angles else { return Ok(()) };
    let dims = cos.size().last().copied().unwrap_or(0);
    let mut part = qkv.f_narrow(1, 0, queries + keys)?.f_narrow(2, 0, dims)?;
    let x = wide(&part)?;
    // The first half of the sines is negated: halves that change places are all that is left to do.
    let turned = x.f_mul(&wide(cos)?)?.f_add(&x.f_roll([dims / 2], [-1])?.f_mul(&wide(sin)?)?)?;
    Ok(part.f_copy_(&turned)?)
}

/// See [`super::ops::gate`].
pub fn gate(gate_up: &Tensor, gelu: bool) -> Result<Tensor, TorchError> {
    let width = gate_up.size2()?.1 / 2;
    let part = |first| wide(&gate_up.f_narrow(1, first, width)?);
    let (gate, up) = (part(0)?, part(width)?);
    let active = if gelu { gate.f_gelu("tanh")? } else { gate.f_silu()? };
    Ok(active.f_mul(&up)?.f_to_kind(gate_up.kind())?)
}

/// Writes one token's keys and values a row, `[rows, kv_heads, head_dim]`, to its place in the row's slot.
pub fn store(k: &Tensor, v: &Tensor, slots: &Slots<'_>, places: &Places) -> Result<(), TorchError> {
    let rows = Tensor::f_arange(k.size3()?.0, (Kind::Int64, k.device()))?;
    for (slots, new) in [(slots.keys, k), (slots.values, v)] {
        let at = [Some(&rows), Some(&places.positions)];
        let _ = slots.shallow_clone().f_index_put_(&at, new, false)?;
    }
    Ok(())
}

/// The attention of [`Slots::attend`] over keys and values that are stored already.
pub fn attend_slots(slots: &Slots<'_>, places: &Places, q: &Tensor) -> Result<Tensor, TorchError> {
    let (rows, heads, dims) = q.size3()?;
    let (_, length, kv_heads, _) = slots.keys.size4()?;
    let columns = Tensor::f_arange(length, (Kind::Int64, q.device()))?;
    let distance = places.positions.f_unsqueeze(1)?.f_sub(&columns.f_unsqueeze(0)?)?;
    let mask = mask(&distance, slots.window, q.kind())?.f_view([rows, 1, 1, length])?;
    let q = q.f_reshape([rows, kv_heads, heads / kv_heads, dims])?;
    let seen = |slots: &Tensor| slots.f_narrow(0, 0, rows)?.f_transpose(1, 2);
    let (keys, values) = (seen(slots.keys)?, seen(slots.values)?);
    let (mask, scale) = (Some(&mask), Some(slots.scale));
    let out = Tensor::f_scaled_dot_product_attention(&q, &keys, &values, mask, 0.0, false, scale, false)?;
    Ok(out.f_reshape([rows, heads * dims])?)
}

/// See [`super::ops::Pass::attend`].
pub fn attend_pass(
    (stretches, rows): (&[Stretch], &[Rows]),
    q: &Tensor,
    sources: &[(&Tensor, &Tensor)],
    window: Option<i64>,
    scale: f64,
) -> Result<Tensor, TorchError> {
    let (mut rows, mut first, mut all) = (rows.iter(), 0, Vec::new());
    for stretch in stretches {
        let seen: Vec<&Rows> = rows.by_ref().take(stretch.rows as usize).collect();
        let part = |keys: bool| -> Result<Tensor, TorchError> {
            let of = |rows: &&Rows| {
                let (k, v) = sources[rows.source as usize];
                if keys { k } else { v }.f_narrow(0, rows.first, rows.count)
            };
            Ok(Tensor::f_cat(&seen.iter().map(of).collect::<Result<Vec<_>, _>>()?, 0)?)
        };
        let queries = q.f_narrow(0, first, stretch.tokens)?;
        all.push(attend(&queries, &part(true)?, &part(false)?, window, scale)?);
        first += stretch.tokens;
    }
    Ok(Tensor::f_cat(&all, 0)?)
}

/// Attention of tokens whose own keys are the last: `[tokens, heads, d]` and `[keys, kv_heads, d]` to
/// `[tokens, heads * d]`.
pub fn attend(q: &Tensor, k: &Tensor, v: &Tensor, window: Option<i64>, scale: f64) -> Result<Tensor, TorchError> {
    let ((tokens, heads, dims), (keys, kv_heads, _)) = (q.size3()?, k.size3()?);
    let group = heads / kv_heads;
    let place = |count| Tensor::f_arange(count, (Kind::Int64, q.device()));
    let distance = place(tokens)?.f_add_scalar(keys - tokens)?.f_unsqueeze(1)?.f_sub(&place(keys)?.f_unsqueeze(0)?)?;
    // The query group is folded into the queries: libtorch's fast kernels take a mask or grouped heads, not both.
    let mask = mask(&distance, window, q.kind())?.f_repeat([group, 1])?;
    let q = q.f_view([tokens, kv_heads, group, dims])?.f_permute([1, 2, 0, 3])?;
    let q = q.f_reshape([1, kv_heads, group * tokens, dims])?;
    let all = |t: &Tensor| t.f_transpose(0, 1)?.f_unsqueeze(0);
    let (k, v) = (all(k)?, all(v)?);
    let out = Tensor::f_scaled_dot_product_attention(&q, &k, &v, Some(&mask), 0.0, false, Some(scale), false)?;
    let out = out.f_view([kv_heads, group, tokens, dims])?.f_permute([2, 0, 1, 3])?;
    Ok(out.f_reshape([tokens, heads * dims])?)
}

/// 0 where a key is `distance` before its query and is seen, minus infinity elsewhere.
fn mask(distance: &Tensor, window: Option<i64>, kind: Kind) -> Result<Tensor, TorchError> {
    let later = distance.f_lt(0)?;
    let hidden = match window {
        Some(window) => later.f_logical_or(&distance.f_ge(window)?)?,
        None => later,
    };
    let device: Device = distance.device();
    Ok(Tensor::f_zeros(distance.size(), (kind, device))?.f_masked_fill(&hidden, f64::NEG_INFINITY)?)
}
