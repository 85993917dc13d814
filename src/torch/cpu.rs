//! Operations of a pass without gradients on a CPU, in C++ beside this file (cpu.cpp).
//!
//! libtorch computes such a pass in some thirty small operations a layer, each of which reads and writes
//! memory; and its bf16 products pack their weights anew at every call, which with few rows costs as
//! much as the product. These read bf16 or float32, compute in float32 and round once, so they are
//! closer to a pass in float32 than libtorch's own. None of them has a gradient.

use std::ffi::c_void;
use std::sync::OnceLock;

use tch::{Device, Kind, Tensor};

use super::TorchError;
use super::ops::{LoraPair, Rows, Slots, Stretch, Turn};

/// Rows from which libtorch's bf16 product, weights packed at every call, is the faster one.
const PRODUCT_ROWS: i64 = 224;
/// The same in float32, whose weights need no packing.
const WIDE_PRODUCT_ROWS: i64 = 65;
/// What cpu.cpp has room for on its stack.
const MAX_HEAD_DIM: i64 = 256;
const MAX_GROUP: i64 = 16;
const MAX_RANK: i64 = 256;

unsafe extern "C" {
    fn flowrun_has_bf16_products() -> bool;
    fn flowrun_product_bf16(
        x: *const c_void,
        w: *const c_void,
        bias: *const f32,
        rows: i64,
        inner: i64,
        outputs: i64,
        y: *mut c_void,
        wide: bool,
    );
    fn flowrun_product_f32(
        x: *const f32,
        w: *const f32,
        bias: *const f32,
        rows: i64,
        inner: i64,
        outputs: i64,
        y: *mut f32,
    );
    fn flowrun_draw(
        logits: *const f32,
        rows: i64,
        count: i64,
        temperatures: *const f32,
        uniforms: *const f32,
        tokens: *mut i64,
        logprobs: *mut f32,
    );
}

macro_rules! both_kinds {
    ($(fn $bf16:ident, $f32:ident ( $($name:ident : $type:ty),* );)*) => {
        unsafe extern "C" { $( fn $bf16($($name: $type),*); fn $f32($($name: $type),*); )* }
    };
}

both_kinds! {
    fn flowrun_norm_bf16, flowrun_norm_f32(
        x: *mut f32, add: *const c_void, weight: *const f32, eps: f32, out: *mut c_void, rows: i64, width: i64
    );
    fn flowrun_turn_bf16, flowrun_turn_f32(
        x: *mut c_void, rows: i64, stride: i64, heads: i64, queries: i64, width: i64, q_norm: *const f32,
        k_norm: *const f32, eps: f32, cos: *const c_void, sin: *const c_void, dims: i64
    );
    fn flowrun_gate_bf16, flowrun_gate_f32(
        gate_up: *const c_void, out: *mut c_void, rows: i64, width: i64, gelu: bool
    );
    fn flowrun_decode_bf16, flowrun_decode_f32(
        q: *const c_void, k: *const c_void, v: *const c_void, stride: i64, keys: *mut c_void, values: *mut c_void,
        slot: i64, kv_heads: i64, positions: *const i64, window: i64, rows: i64, group: i64, dims: i64, scale: f32,
        softcap: f32, out: *mut c_void
    );
    fn flowrun_attend_bf16, flowrun_attend_f32(
        q: *const c_void, stride: i64, sources: *const Source, stretches: *const Stretch, count: i64,
        rows: *const Rows, window: i64, kv_heads: i64, group: i64, dims: i64, scale: f32, softcap: f32,
        out: *mut c_void
    );
    fn flowrun_adapt_bf16, flowrun_adapt_f32(
        x: *const c_void, rows: i64, inner: i64, loras: *const Matrices, count: i64, scale: f32, out: *mut c_void,
        outputs: i64
    );
}

/// Whether there is room for heads of `head_dim`, `group` of them a kv head.
pub fn serves(kind: Kind, head_dim: i64, group: i64) -> bool {
    matches!(kind, Kind::BFloat16 | Kind::Float) && head_dim <= MAX_HEAD_DIM && group <= MAX_GROUP
}

/// Whether the processor multiplies bf16.
pub(super) fn has_products() -> bool {
    static PRODUCTS: OnceLock<bool> = OnceLock::new();
    // SAFETY: asks the processor.
    *PRODUCTS.get_or_init(|| unsafe { flowrun_has_bf16_products() })
}

/// The processor, and how it multiplies bf16, in words.
pub fn processor() -> String {
    let told = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = told.lines().find_map(|line| line.strip_prefix("model name")?.split(':').nth(1));
    let products = if has_products() { "bf16 products of our own" } else { "libtorch's bf16 products" };
    format!("{}, {products}", name.map_or("unknown", str::trim))
}

/// Whether what is computed of a row does not depend on the rows beside it, up to the rows of a decode step.
pub fn keeps_rows_apart() -> bool {
    has_products()
}

/// `x W^T + bias`: `x` is `[rows, inner]`, `weight` `[outputs, inner]`, `bias` `[outputs]`; the result
/// `[rows, outputs]` in their dtype, or in float32 with `wide`.
///
/// # Errors
/// When libtorch's operation fails.
pub fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>, wide: bool) -> Result<Tensor, TorchError> {
    let (rows, inner) = x.size2()?;
    let outputs = weight.size2()?.0;
    let kind = x.kind();
    let most = match kind {
        Kind::BFloat16 => PRODUCT_ROWS,
        Kind::Float => WIDE_PRODUCT_ROWS,
        _ => 0,
    };
    let flat = lies(x, kind, &[rows, inner]).is_ok() && lies(weight, kind, &[outputs, inner]).is_ok();
    if !(has_products() && flat && outputs % 4 == 0 && (1..most).contains(&rows)) {
        let y = x.f_linear(weight, bias)?;
        return Ok(if wide { y.f_to_kind(Kind::Float)? } else { y });
    }
    let bias = bias.map(|bias| bias.f_to_kind(Kind::Float)).transpose()?;
    if let Some(bias) = &bias {
        lies(bias, Kind::Float, &[outputs])?;
    }
    let y = Tensor::f_empty([rows, outputs], (if wide { Kind::Float } else { kind }, Device::Cpu))?;
    let (x, w, bias, y_at) = (x.data_ptr(), weight.data_ptr(), pointer(bias.as_ref()).cast(), y.data_ptr());
    // SAFETY: contiguous tensors on the CPU of the shapes and types that the functions read and write,
    // which live until they return; `outputs` is a multiple of their tile.
    unsafe {
        match kind {
            Kind::Float => flowrun_product_f32(x.cast(), w.cast(), bias, rows, inner, outputs, y_at.cast()),
            _ => flowrun_product_bf16(x, w, bias, rows, inner, outputs, y_at, wide),
        }
    }
    Ok(y)
}

/// See [`super::ops::add_norm`].
pub fn add_norm(x: &Tensor, add: Option<&Tensor>, weight: &Tensor, eps: f64, kind: Kind) -> Result<Tensor, TorchError> {
    let (rows, width) = x.size2()?;
    lies(x, Kind::Float, &[rows, width])?;
    lies(weight, Kind::Float, &[width])?;
    if let Some(add) = add {
        lies(add, kind, &[rows, width])?;
    }
    let out = Tensor::f_empty([rows, width], (kind, Device::Cpu))?;
    let norm = if kind == Kind::Float { flowrun_norm_f32 } else { flowrun_norm_bf16 };
    // SAFETY: shapes and types were looked at above; the tensors live until it returns.
    unsafe {
        norm(x.data_ptr().cast(), pointer(add), weight.data_ptr().cast(), eps as f32, out.data_ptr(), rows, width);
    }
    Ok(out)
}

/// See [`Turn::apply`].
pub fn turn(turn: &Turn<'_>, qkv: &Tensor, queries: i64, keys: i64) -> Result<(), TorchError> {
    let (rows, heads, width) = qkv.size3()?;
    let kind = qkv.kind();
    lies(qkv, kind, &[rows, heads, width])?;
    let dims = turn.angles.map_or(0, |(cos, _)| cos.size().last().copied().unwrap_or(0));
    if let Some((cos, sin)) = turn.angles {
        lies(cos, kind, &[rows, 1, dims])?;
        lies(sin, kind, &[rows, 1, dims])?;
    }
    if let Some((q, k)) = turn.norms {
        lies(q, Kind::Float, &[width])?;
        lies(k, Kind::Float, &[width])?;
    }
    if queries + keys > heads || dims > width || dims % 2 != 0 || width > MAX_HEAD_DIM {
        return Err(TorchError::Operation(format!("{heads} heads of {width} can't be turned")));
    }
    let (q_norm, k_norm) = (turn.norms.map(|n| n.0), turn.norms.map(|n| n.1));
    let (cos, sin) = (turn.angles.map(|a| a.0), turn.angles.map(|a| a.1));
    let apply = if kind == Kind::Float { flowrun_turn_f32 } else { flowrun_turn_bf16 };
    // SAFETY: shapes and types were looked at above; the tensors live until it returns.
    unsafe {
        apply(
            qkv.data_ptr(),
            rows,
            heads * width,
            queries + keys,
            queries,
            width,
            pointer(q_norm).cast(),
            pointer(k_norm).cast(),
            turn.eps as f32,
            pointer(cos),
            pointer(sin),
            dims,
        );
    }
    Ok(())
}

/// See [`super::ops::gate`].
pub fn gate(gate_up: &Tensor, gelu: bool) -> Result<Tensor, TorchError> {
    let (rows, both) = gate_up.size2()?;
    let kind = gate_up.kind();
    lies(gate_up, kind, &[rows, both])?;
    let out = Tensor::f_empty([rows, both / 2], (kind, Device::Cpu))?;
    let gate = if kind == Kind::Float { flowrun_gate_f32 } else { flowrun_gate_bf16 };
    // SAFETY: both are contiguous, of the same type, and live until it returns.
    unsafe { gate(gate_up.data_ptr(), out.data_ptr(), rows, both / 2, gelu) };
    Ok(out)
}

/// See [`Slots::attend`].
pub fn attend_slots(
    slots: &Slots<'_>,
    positions: &[i64],
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
) -> Result<Tensor, TorchError> {
    let (rows, heads, dims) = q.size3()?;
    let (count, length, kv_heads, _) = slots.keys.size4()?;
    let kind = q.kind();
    for cached in [slots.keys, slots.values] {
        lies(cached, kind, &[count, length, kv_heads, dims])?;
    }
    let stride = q.stride().first().copied().unwrap_or(0);
    let dense =
        |t: &Tensor, heads: i64| t.size() == [rows, heads, dims] && t.kind() == kind && t.stride() == [stride, dims, 1];
    let parts = dense(q, heads) && dense(k, kv_heads) && dense(v, kv_heads) && q.device() == Device::Cpu;
    let inside = positions.len() as i64 == rows && rows <= count && positions.iter().all(|p| (0..length).contains(p));
    if !(parts && inside && heads % kv_heads == 0 && serves(kind, dims, heads / kv_heads)) {
        return Err(TorchError::Operation(format!("{rows} rows of {heads} heads don't fit their slots")));
    }
    let out = Tensor::f_empty([rows, heads * dims], (kind, Device::Cpu))?;
    let decode = if kind == Kind::Float { flowrun_decode_f32 } else { flowrun_decode_bf16 };
    // SAFETY: shapes, strides, types and positions were looked at above. The cache is written through a
    // shared handle as libtorch's own in-place operations do; the thread of its device owns it.
    unsafe {
        decode(
            q.data_ptr(),
            k.data_ptr(),
            v.data_ptr(),
            stride,
            slots.keys.data_ptr(),
            slots.values.data_ptr(),
            length * kv_heads * dims,
            kv_heads,
            positions.as_ptr(),
            slots.window.unwrap_or(i64::MAX),
            rows,
            heads / kv_heads,
            dims,
            slots.scale as f32,
            slots.softcap.unwrap_or(0.0) as f32,
            out.data_ptr(),
        );
    }
    Ok(out)
}

#[repr(C)]
struct Source {
    keys: *const c_void,
    values: *const c_void,
    stride: i64,
}

/// See [`super::ops::Pass::attend`], which has looked at the stretches and rows.
pub fn attend_pass(
    (stretches, rows): (&[Stretch], &[Rows]),
    q: &Tensor,
    sources: &[(&Tensor, &Tensor)],
    window: Option<i64>,
    scale: f64,
    softcap: Option<f64>,
) -> Result<Tensor, TorchError> {
    let (tokens, heads, dims) = q.size3()?;
    let kind = q.kind();
    let kv_heads = sources.first().map_or(0, |(k, _)| k.size().get(1).copied().unwrap_or(0)).max(1);
    let stride = |t: &Tensor| t.stride().first().copied().unwrap_or(0);
    let dense = |t: &Tensor, heads: i64| {
        t.device() == Device::Cpu
            && t.kind() == kind
            && t.size().get(1..) == Some(&[heads, dims])
            && t.stride().get(1..) == Some(&[dims, 1])
    };
    let both = |(k, v): &(&Tensor, &Tensor)| {
        dense(k, kv_heads) && dense(v, kv_heads) && stride(k) == stride(v) && k.size() == v.size()
    };
    let fits = dense(q, heads) && sources.iter().all(both);
    if !(fits && heads % kv_heads == 0 && serves(kind, dims, heads / kv_heads)) {
        return Err(TorchError::Operation(format!("{tokens} tokens of {heads} heads don't fit their keys")));
    }
    let sources: Vec<Source> =
        sources.iter().map(|(k, v)| Source { keys: k.data_ptr(), values: v.data_ptr(), stride: stride(k) }).collect();
    let out = Tensor::f_empty([tokens, heads * dims], (kind, Device::Cpu))?;
    let attend = if kind == Kind::Float { flowrun_attend_f32 } else { flowrun_attend_bf16 };
    // SAFETY: shapes, strides, types and rows were looked at above; the tensors live until it returns.
    unsafe {
        attend(
            q.data_ptr(),
            stride(q),
            sources.as_ptr(),
            stretches.as_ptr(),
            stretches.len() as i64,
            rows.as_ptr(),
            window.unwrap_or(i64::MAX),
            kv_heads,
            heads / kv_heads,
            dims,
            scale as f32,
            softcap.unwrap_or(0.0) as f32,
            out.data_ptr(),
        );
    }
    Ok(out)
}

/// Draws one token a row of `logits` (`[rows, vocabulary]`, float32): by inverse of the cumulative
/// distribution at the row's temperature, or the first of the largest where it is 0. With each token comes
/// its log-probability at temperature 1.
///
/// # Errors
/// When the logits have another type, or there is not one temperature and uniform a row.
pub fn draw(logits: &Tensor, temperatures: &[f32], uniforms: &[f32]) -> Result<Vec<(i64, f32)>, TorchError> {
    let (rows, count) = logits.size2()?;
    lies(logits, Kind::Float, &[rows, count])?;
    let (mut tokens, mut logprobs) = (vec![0_i64; rows as usize], vec![0_f32; rows as usize]);
    if count == 0 || temperatures.len() != tokens.len() || uniforms.len() != tokens.len() {
        return Err(TorchError::Operation(format!("{rows} rows of {count} logits can't be drawn from")));
    }
    // SAFETY: `logits` is contiguous float32 of this shape, and all slices have an entry a row.
    unsafe {
        flowrun_draw(
            logits.data_ptr().cast(),
            rows,
            count,
            temperatures.as_ptr(),
            uniforms.as_ptr(),
            tokens.as_mut_ptr(),
            logprobs.as_mut_ptr(),
        );
    }
    Ok(tokens.into_iter().zip(logprobs).collect())
}

#[repr(C)]
struct Matrices {
    a: *const f32,
    b: *const f32,
    rank: i64,
    first: i64,
    width: i64,
}

/// See [`super::ops::add_lora`].
pub fn add_lora(x: &Tensor, pairs: &[LoraPair<'_>], scale: f64, out: &Tensor) -> Result<bool, TorchError> {
    let ((rows, inner), (_, outputs)) = (x.size2()?, out.size2()?);
    let kind = x.kind();
    let flat = lies(x, kind, &[rows, inner]).is_ok() && lies(out, kind, &[rows, outputs]).is_ok();
    if !(has_products() && flat && matches!(kind, Kind::BFloat16 | Kind::Float)) {
        return Ok(false);
    }
    let mut matrices = Vec::with_capacity(pairs.len());
    for LoraPair { a, b, first } in pairs {
        let (rank, width) = (a.size2()?.0, b.size2()?.0);
        let inside = *first >= 0 && first + width <= outputs && (1..=MAX_RANK).contains(&rank);
        let whole = rank % 4 == 0;
        let flat = lies(a, Kind::Float, &[rank, inner]).is_ok() && lies(b, Kind::Float, &[width, rank]).is_ok();
        if !(inside && whole && flat) {
            return Ok(false);
        }
        matrices.push(Matrices { a: a.data_ptr().cast(), b: b.data_ptr().cast(), rank, first: *first, width });
    }
    let adapt = if kind == Kind::Float { flowrun_adapt_f32 } else { flowrun_adapt_bf16 };
    // SAFETY: shapes and types were looked at above; the tensors live until it returns.
    unsafe {
        let count = matrices.len() as i64;
        adapt(x.data_ptr(), rows, inner, matrices.as_ptr(), count, scale as f32, out.data_ptr(), outputs);
    }
    Ok(true)
}

pub(super) fn pointer(tensor: Option<&Tensor>) -> *const c_void {
    tensor.map_or(std::ptr::null(), |tensor| tensor.data_ptr().cast_const())
}

/// A contiguous tensor on the CPU of this type and shape.
pub(super) fn lies(tensor: &Tensor, kind: Kind, size: &[i64]) -> Result<(), TorchError> {
    if tensor.device() == Device::Cpu && tensor.kind() == kind && tensor.is_contiguous() && tensor.size() == size {
        return Ok(());
    }
    let found = (tensor.kind(), tensor.size(), tensor.device());
    Err(TorchError::Operation(format!("expected {kind:?} of {size:?} in one piece on the CPU, found {found:?}")))
}

#[cfg(test)]
mod tests {
    use super::super::ops::{Pass, Places};
    use super::*;

    fn random(size: &[i64], kind: Kind) -> Tensor {
        Tensor::randn(size, (Kind::Float, Device::Cpu)).to_kind(kind)
    }

    fn wide(t: &Tensor) -> Tensor {
        t.to_kind(Kind::Float)
    }

    /// Largest difference to what float32 gives, as a share of the largest value.
    fn off(found: &Tensor, expected: &Tensor) -> f64 {
        let largest = expected.abs().max().double_value(&[]);
        (wide(found) - expected).abs().max().double_value(&[]) / largest
    }

    /// What rounding once to a dtype costs, and some for another order of sums.
    fn bound(kind: Kind) -> f64 {
        if kind == Kind::Float { 1e-5 } else { 1.0 / 256.0 }
    }

    const KINDS: [Kind; 2] = [Kind::BFloat16, Kind::Float];

    #[test]
    fn a_norm_of_a_sum_has_the_bits_of_that_of_the_summed() {
        tch::manual_seed(0);
        for (kind, width) in KINDS.into_iter().flat_map(|kind| [31, 64, 576, 2048].map(|width| (kind, width))) {
            let (x, add, weight) =
                (random(&[4000, width], Kind::Float), random(&[4000, width], kind), random(&[width], Kind::Float));
            let at_once = add_norm(&x, Some(&add), &weight, 1e-5, kind).unwrap();
            assert_eq!(at_once, add_norm(&x, None, &weight, 1e-5, kind).unwrap(), "{kind:?} {width}");
        }
    }

    #[test]
    fn products_of_every_shape() {
        tch::manual_seed(0);
        for kind in KINDS {
            for (rows, inner, outputs) in
                [(1, 32, 4), (2, 64, 8), (3, 31, 12), (4, 40, 64), (7, 576, 960), (33, 100, 36)]
            {
                let (x, w) = (random(&[rows, inner], kind), random(&[outputs, inner], kind));
                let bias = random(&[outputs], kind);
                let expected = wide(&x).matmul(&wide(&w).transpose(0, 1));
                assert!(
                    off(&linear(&x, &w, None, false).unwrap(), &expected) < bound(kind),
                    "{rows} {inner} {outputs}"
                );
                assert!(off(&linear(&x, &w, None, true).unwrap(), &expected) < bound(kind));
                let expected = expected + wide(&bias);
                assert!(off(&linear(&x, &w, Some(&bias), false).unwrap(), &expected) < bound(kind));
            }
            // A shape that is libtorch's.
            let (x, w) = (random(&[3, 16], kind), random(&[5, 16], kind));
            assert!(off(&linear(&x, &w, None, true).unwrap(), &wide(&x).matmul(&wide(&w).transpose(0, 1))) < 0.02);
        }
    }

    #[test]
    fn norms_add_first() {
        tch::manual_seed(1);
        for kind in KINDS {
            let (x, add, weight) = (random(&[5, 70], Kind::Float), random(&[5, 70], kind), random(&[70], Kind::Float));
            let sum = &x + wide(&add);
            let expected = sum.rms_norm([70], Some(&weight), 1e-5);
            let found = add_norm(&x, Some(&add), &weight, 1e-5, kind).unwrap();
            assert!(off(&found, &expected) < bound(kind));
            assert!(off(&x, &sum) < 1e-6, "the stream has grown");
            assert!(off(&add_norm(&x, None, &weight, 1e-5, kind).unwrap(), &expected) < bound(kind));
            assert!(add_norm(&x, Some(&add.transpose(0, 1)), &weight, 1e-5, kind).is_err());
        }
    }

    #[test]
    fn gates_and_turns() {
        tch::manual_seed(2);
        for kind in KINDS {
            let gate_up = random(&[6, 80], kind) * 4.0;
            let (left, up) = (wide(&gate_up.narrow(1, 0, 40)), wide(&gate_up.narrow(1, 40, 40)));
            assert!(off(&gate(&gate_up, false).unwrap(), &(left.silu() * &up)) < bound(kind));
            assert!(off(&gate(&gate_up, true).unwrap(), &(left.gelu("tanh") * &up)) < bound(kind));

            let qkv = random(&[3, 7, 16], kind);
            let (cos, sin) = (random(&[3, 1, 8], kind), random(&[3, 1, 8], kind));
            let (q_norm, k_norm) = (random(&[16], Kind::Float), random(&[16], Kind::Float));
            let normed = Tensor::cat(
                &[
                    wide(&qkv.narrow(1, 0, 4)).rms_norm([16], Some(&q_norm), 1e-6),
                    wide(&qkv.narrow(1, 4, 2)).rms_norm([16], Some(&k_norm), 1e-6),
                ],
                1,
            );
            let turned = normed.narrow(2, 0, 8);
            let turned = &turned * wide(&cos) + turned.roll([4], [-1]) * wide(&sin);
            let expected = Tensor::cat(&[turned, normed.narrow(2, 8, 8)], 2);
            let values = wide(&qkv.narrow(1, 6, 1));
            let turn = Turn { norms: Some((&q_norm, &k_norm)), eps: 1e-6, angles: Some((&cos, &sin)) };
            turn.apply(&qkv, 4, 2).unwrap();
            assert!(off(&qkv.narrow(1, 0, 6), &expected) < bound(kind));
            assert_eq!(wide(&qkv.narrow(1, 6, 1)), values, "values stay");
            assert!(turn.apply(&qkv, 6, 2).is_err());
        }
    }

    #[test]
    fn a_decode_step_attends_as_libtorch() {
        tch::manual_seed(3);
        for kind in KINDS {
            for (group, dims, length) in [(3, 16, 12), (3, 64, 40), (5, 128, 40)] {
                for (window, softcap) in [(None, None), (Some(4), None), (None, Some(2.0))] {
                    attends(kind, group, dims, length, window, softcap);
                }
            }
        }
    }

    fn attends(kind: Kind, group: i64, dims: i64, length: i64, window: Option<i64>, softcap: Option<f64>) {
        let (rows, kv_heads) = (5, 2);
        let cache = || random(&[rows + 1, length, kv_heads, dims], kind);
        let (keys, values) = (cache(), cache());
        let qkv = random(&[rows, kv_heads * (group + 2), dims], kind);
        let part = |first, heads| qkv.narrow(1, first * kv_heads, heads * kv_heads);
        let (q, k, v) = (part(0, group), part(group, 1), part(group + 1, 1));
        let positions = [0, 3, length - 1, 5, 7];
        let slots = Slots { keys: &keys, values: &values, window, scale: 0.3, softcap };
        let found = slots.attend(&q, &k, &v, &Places::Host(positions.to_vec())).unwrap();
        for (row, position) in positions.iter().enumerate() {
            let row = row as i64;
            assert_eq!(keys.get(row).get(*position), k.get(row), "the new key is in its place");
            let first = window.map_or(0, |w| (position + 1 - w).max(0));
            let seen = |t: &Tensor| wide(&t.get(row).narrow(0, first, position + 1 - first)).transpose(0, 1);
            let q = wide(&q.get(row)).view([kv_heads, group, dims]);
            let mut scores = q.matmul(&seen(&keys).transpose(1, 2)) * 0.3;
            if let Some(cap) = softcap {
                scores = (scores / cap).tanh() * cap;
            }
            let expected = scores.softmax(-1, Kind::Float).matmul(&seen(&values)).flatten(0, -1);
            let off = off(&found.get(row), &expected);
            assert!(off < bound(kind), "{kind:?} {group} x {dims} {window:?} {softcap:?} row {row}: {off}");
        }
        let outside = Places::Host(vec![0, 3, length, 5, 7]);
        assert!(slots.attend(&q, &k, &v, &outside).is_err());
    }

    /// Longer than what one thread takes at a time; and a stretch has the same numbers in other company.
    #[test]
    fn a_long_stretch_attends_as_libtorch() {
        tch::manual_seed(5);
        let (kv_heads, group, past, own) = (2, 3, 45, 300);
        let rows = |source, first, count| Rows { source, first, count };
        for (kind, dims) in KINDS.into_iter().flat_map(|kind| [(kind, 64), (kind, 20)]) {
            let heads = |tokens: i64, heads: i64| random(&[tokens, heads, dims], kind);
            let (past_k, past_v) = (heads(past, kv_heads), heads(past, kv_heads));
            let (q, k, v) = (heads(own, kv_heads * group), heads(own, kv_heads), heads(own, kv_heads));
            for window in [None, Some(7), Some(100)] {
                let mut pass = Pass::default();
                pass.push(own, [rows(1, 0, past), rows(0, 0, own)]);
                let found = pass.attend(&q, &[(&k, &v), (&past_k, &past_v)], window, 0.2, None).unwrap();
                let all = |a: &Tensor, b: &Tensor| {
                    wide(&Tensor::cat(&[a, b], 0)).repeat_interleave_self_int(group, 1, None).transpose(0, 1)
                };
                let mask = Tensor::ones([own, past + own], (Kind::Bool, Device::Cpu)).tril(past);
                let mask =
                    window.map_or(mask.shallow_clone(), |w| mask.logical_and(&mask.tril(past - w).logical_not()));
                let scores = wide(&q).transpose(0, 1).matmul(&all(&past_k, &k).transpose(1, 2)) * 0.2;
                let scores = scores.masked_fill(&mask.logical_not(), f64::NEG_INFINITY);
                let expected = scores.softmax(-1, Kind::Float).matmul(&all(&past_v, &v));
                let expected = expected.transpose(0, 1).reshape([own, -1]);
                let off = off(&found, &expected);
                assert!(off < bound(kind), "{kind:?} {dims} {window:?}: {off}");

                let mut pass = Pass::default();
                pass.push(9, [rows(0, 0, 9)]);
                pass.push(own, [rows(1, 0, past), rows(0, 9, own)]);
                let behind = |t: &Tensor| Tensor::cat(&[&t.narrow(0, 0, 9), t], 0);
                let sources = [(&behind(&k), &behind(&v)), (&past_k, &past_v)];
                let again = pass.attend(&behind(&q), &sources, window, 0.2, None).unwrap();
                assert_eq!(again.narrow(0, 9, own), found, "{kind:?} {dims} {window:?}");
            }
        }
    }

    #[test]
    fn a_pass_sees_what_it_is_told() {
        tch::manual_seed(4);
        let (kv_heads, group) = (2, 3);
        for kind in KINDS {
            for (dims, window) in [(16, None), (64, None), (64, Some(5)), (16, Some(2))] {
                let heads = |tokens: i64, heads: i64| random(&[tokens, heads, dims], kind);
                let (past_k, past_v) = (heads(20, kv_heads), heads(20, kv_heads));
                let qkv = heads(30, kv_heads * (group + 2));
                let part = |first, count| qkv.narrow(1, first * kv_heads, count * kv_heads);
                let (q, k, v) = (part(0, group), part(group, 1), part(group + 1, 1));
                // A stretch that sees the past, one on its own, one that sees the past and the first.
                let rows = |source, first, count| Rows { source, first, count };
                let told = [
                    (4, vec![rows(1, 0, 19), rows(0, 0, 4)]),
                    (20, vec![rows(0, 4, 20)]),
                    (6, vec![rows(1, 0, 20), rows(0, 0, 4), rows(0, 24, 6)]),
                ];
                let mut pass = Pass::default();
                told.iter().for_each(|(tokens, rows)| pass.push(*tokens, rows.iter().copied()));
                let sources = [(&k, &v), (&past_k, &past_v)];
                let found = pass.attend(&q, &sources, window, 0.3, None).unwrap();
                let mut row = 0;
                for (tokens, rows) in &told {
                    let all = |keys: bool| {
                        let of = |r: &Rows| {
                            let (k, v) = sources[r.source as usize];
                            wide(&(if keys { k } else { v }).narrow(0, r.first, r.count))
                        };
                        Tensor::cat(&rows.iter().map(of).collect::<Vec<_>>(), 0).transpose(0, 1)
                    };
                    let (keys, values) = (all(true), all(false));
                    for token in 0..*tokens {
                        let seen = keys.size()[1] - tokens + token + 1;
                        let first = window.map_or(0, |w| (seen - w).max(0));
                        let of = |t: &Tensor| t.narrow(1, first, seen - first);
                        let q = wide(&q.get(row)).view([kv_heads, group, dims]);
                        let scores = q.matmul(&of(&keys).transpose(1, 2)) * 0.3;
                        let expected = scores.softmax(-1, Kind::Float).matmul(&of(&values)).flatten(0, -1);
                        assert!(off(&found.get(row), &expected) < bound(kind), "{kind:?} {dims} {window:?} row {row}");
                        row += 1;
                    }
                }
                let wrong = |tokens, r| {
                    let mut pass = Pass::default();
                    pass.push(tokens, [r]);
                    pass.attend(&q, &sources, None, 0.3, None).is_err()
                };
                assert!(wrong(30, rows(0, 1, 30)) && wrong(30, rows(2, 0, 30)) && wrong(29, rows(0, 0, 30)));
                assert!(wrong(30, rows(0, 0, 29)) && !wrong(30, rows(0, 0, 30)));
            }
        }
    }

    #[test]
    fn adapters_change_their_columns() {
        tch::manual_seed(5);
        for kind in KINDS {
            for rows in [1, 3, 4, 6, 9, 70] {
                let x = random(&[rows, 40], kind);
                let pairs = [(8, 11, 0), (4, 20, 12), (24, 8, 36)].map(|(rank, width, first)| {
                    (random(&[rank, 40], Kind::Float), random(&[width, rank], Kind::Float), first)
                });
                let out = random(&[rows, 48], kind);
                let expected = wide(&out);
                for (a, b, first) in &pairs {
                    let change = wide(&x).matmul(&a.transpose(0, 1)).matmul(&b.transpose(0, 1)) * 0.5;
                    let mut columns = expected.narrow(1, *first, change.size()[1]);
                    columns += change;
                }
                let given = pairs.each_ref().map(|(a, b, first)| LoraPair { a, b, first: *first });
                if add_lora(&x, &given, 0.5, &out).unwrap() {
                    assert!(off(&out, &expected) < bound(kind), "{kind:?} {rows}");
                } else {
                    assert!(!has_products());
                }
                let odd = random(&[3, 40], Kind::Float);
                let (b, outside) = (random(&[8, 3], Kind::Float), random(&[48, 8], Kind::Float));
                assert!(!add_lora(&x, &[LoraPair { a: &odd, b: &b, first: 0 }], 0.5, &out).unwrap());
                assert!(!add_lora(&x, &[LoraPair { a: &pairs[0].0, b: &outside, first: 4 }], 0.5, &out).unwrap());
            }
        }
    }
}
