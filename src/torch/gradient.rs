//! Backward of what a pass computes between its products on a CPU, in C++ beside this file (gradient.cpp).
//!
//! Gradients of activations are float32; where one goes on into a product it is rounded to the model's dtype.

use std::ffi::c_void;

use tch::{Device, Kind, Tensor};

use super::TorchError;
use super::cpu::{lies, pointer};
use super::ops::{Pass, Rows, Stretch, Turn};
use super::products::serves;

unsafe extern "C" {
    fn flowrun_norm_back(
        x: *const f32,
        weight: *const f32,
        eps: f32,
        dy: *const f32,
        dx: *mut f32,
        rows: i64,
        width: i64,
    );
}

macro_rules! both_kinds {
    ($(fn $bf16:ident, $f32:ident ( $($name:ident : $type:ty),* );)*) => {
        unsafe extern "C" { $( fn $bf16($($name: $type),*); fn $f32($($name: $type),*); )* }
    };
}

both_kinds! {
    fn flowrun_gate_back_bf16, flowrun_gate_back_f32(
        gate_up: *const c_void, dy: *const f32, d: *mut c_void, rows: i64, width: i64, gelu: bool
    );
    fn flowrun_turn_back_bf16, flowrun_turn_back_f32(
        qkv: *const c_void, rows: i64, heads: i64, queries: i64, keys: i64, width: i64, q_norm: *const f32,
        k_norm: *const f32, eps: f32, cos: *const c_void, sin: *const c_void, dims: i64, after: *const f32,
        before: *mut c_void
    );
    fn flowrun_targets_bf16, flowrun_targets_f32(
        logits: *const f32, targets: *const i64, rows: i64, count: i64, log_probs: *mut f32, d: *mut c_void
    );
    fn flowrun_attend_back_bf16, flowrun_attend_back_f32(
        qkv: *const c_void, d_out: *const f32, stretches_of: *const i64, trees: i64, stretches: *const Stretch,
        rows: *const Rows, window: i64, kv_heads: i64, group: i64, dims: i64, scale: f32, d_qkv: *mut f32
    );
}

/// Of [`super::ops::add_norm`]: adds to `dx` what `dy` does to `x`; all are `[rows, width]` float32.
///
/// # Errors
/// When a tensor has another shape or type.
pub fn norm_back(x: &Tensor, weight: &Tensor, eps: f64, dy: &Tensor, dx: &Tensor) -> Result<(), TorchError> {
    let (rows, width) = x.size2()?;
    for tensor in [x, dy, dx] {
        lies(tensor, Kind::Float, &[rows, width])?;
    }
    lies(weight, Kind::Float, &[width])?;
    // SAFETY: shapes and types were looked at above; the tensors live until it returns.
    unsafe {
        let (x, weight, dy) = (x.data_ptr().cast(), weight.data_ptr().cast(), dy.data_ptr().cast());
        flowrun_norm_back(x, weight, eps as f32, dy, dx.data_ptr().cast(), rows, width);
    }
    Ok(())
}

/// Of [`super::ops::gate`]: the gradient of `gate_up` (`[rows, 2 * width]`), in its dtype, for that of the result,
/// `[rows, width]` float32.
///
/// # Errors
/// When a tensor has another shape or type.
pub fn gate_back(gate_up: &Tensor, dy: &Tensor, gelu: bool) -> Result<Tensor, TorchError> {
    let (rows, width) = dy.size2()?;
    let kind = served(gate_up)?;
    lies(gate_up, kind, &[rows, 2 * width])?;
    lies(dy, Kind::Float, &[rows, width])?;
    let d = gate_up.f_empty_like()?;
    let run = if kind == Kind::Float { flowrun_gate_back_f32 } else { flowrun_gate_back_bf16 };
    // SAFETY: shapes and types were looked at above; the tensors live until it returns.
    unsafe { run(gate_up.data_ptr(), dy.data_ptr().cast(), d.data_ptr(), rows, width, gelu) };
    Ok(d)
}

/// Of [`Turn::apply`]: from the gradient after it, float32, to that of `qkv` (`[rows, heads, head_dim]`) as it was
/// before, in its dtype.
///
/// # Errors
/// When a tensor has another shape or type.
pub fn turn_back(turn: &Turn<'_>, qkv: &Tensor, queries: i64, keys: i64, after: &Tensor) -> Result<Tensor, TorchError> {
    let (rows, heads, width) = qkv.size3()?;
    let kind = served(qkv)?;
    lies(qkv, kind, &[rows, heads, width])?;
    lies(after, Kind::Float, &[rows, heads, width])?;
    let dims = turn.angles.map_or(0, |(cos, _)| cos.size().last().copied().unwrap_or(0));
    if let Some((cos, sin)) = turn.angles {
        lies(cos, kind, &[rows, 1, dims])?;
        lies(sin, kind, &[rows, 1, dims])?;
    }
    if let Some((q, k)) = turn.norms {
        lies(q, Kind::Float, &[width])?;
        lies(k, Kind::Float, &[width])?;
    }
    if queries + keys > heads || dims > width || dims % 2 != 0 || width > 256 {
        return Err(TorchError::Operation(format!("{heads} heads of {width} can't be turned")));
    }
    let before = qkv.f_empty_like()?;
    let run = if kind == Kind::Float { flowrun_turn_back_f32 } else { flowrun_turn_back_bf16 };
    // SAFETY: shapes and types were looked at above; the tensors live until it returns.
    unsafe {
        run(
            qkv.data_ptr(),
            rows,
            heads,
            queries,
            keys,
            width,
            pointer(turn.norms.map(|n| n.0)).cast(),
            pointer(turn.norms.map(|n| n.1)).cast(),
            turn.eps as f32,
            pointer(turn.angles.map(|a| a.0)),
            pointer(turn.angles.map(|a| a.1)),
            dims,
            after.data_ptr().cast(),
            before.data_ptr(),
        );
    }
    Ok(before)
}

/// Log-probabilities of `targets` (`[rows]`, i64) among `logits` (`[rows, count]`, float32): `[rows]` float32. With
/// `gradient`, a dtype, also their gradients by the logits in it.
///
/// # Errors
/// When a tensor has another shape or type, or a target is not among the logits.
pub fn target_log_probs(
    logits: &Tensor,
    targets: &Tensor,
    gradient: Option<Kind>,
) -> Result<(Tensor, Option<Tensor>), TorchError> {
    let (rows, count) = logits.size2()?;
    lies(logits, Kind::Float, &[rows, count])?;
    lies(targets, Kind::Int64, &[rows])?;
    let wanted: Vec<i64> = Vec::try_from(targets)?;
    if !wanted.iter().all(|target| (0..count).contains(target)) {
        return Err(TorchError::Operation(format!("a token is not among the {count} of the vocabulary")));
    }
    let log_probs = Tensor::f_empty([rows], (Kind::Float, Device::Cpu))?;
    let d = gradient.map(|kind| Tensor::f_empty([rows, count], (kind, Device::Cpu))).transpose()?;
    let kind = d.as_ref().map(served).transpose()?;
    let run = if kind == Some(Kind::BFloat16) { flowrun_targets_bf16 } else { flowrun_targets_f32 };
    let to = d.as_ref().map_or(std::ptr::null_mut(), Tensor::data_ptr);
    // SAFETY: shapes, types and targets were looked at above; the tensors live until it returns.
    unsafe { run(logits.data_ptr().cast(), wanted.as_ptr(), rows, count, log_probs.data_ptr().cast(), to) };
    Ok((log_probs, d))
}

/// How attention looks at a pass.
#[derive(Debug, Clone, Copy)]
pub struct Attention {
    pub kv_heads: i64,
    pub group: i64,
    pub window: Option<i64>,
    pub scale: f64,
}

/// Of [`Pass::attend`] where all keys are of the pass itself: `qkv` (`[tokens, heads, head_dim]`) holds queries and
/// keys as they were attended to, and values; `d_out` is the result's gradient, `[tokens, query heads * head_dim]`
/// float32. `stretches_of` says how many stretches each tree has: these share keys with each other and with no
/// others. Returns the gradient of `qkv` in float32.
///
/// # Errors
/// When a tensor has another shape or type, or a stretch sees rows of another tree.
pub fn attend_back(
    pass: &Pass,
    stretches_of: &[i64],
    how: Attention,
    qkv: &Tensor,
    d_out: &Tensor,
) -> Result<Tensor, TorchError> {
    let (tokens, heads, dims) = qkv.size3()?;
    let Attention { kv_heads, group, window, scale } = how;
    let kind = served(qkv)?;
    lies(qkv, kind, &[tokens, heads, dims])?;
    lies(d_out, Kind::Float, &[tokens, kv_heads * group * dims])?;
    let (stretches, rows) = pass.layout();
    let fits = heads == kv_heads * (group + 2) && dims <= 256 && apart(stretches_of, stretches, rows, tokens);
    if !fits {
        return Err(TorchError::Operation(format!("{tokens} tokens of {heads} heads don't fit their trees")));
    }
    let d = Tensor::f_empty([tokens, heads, dims], (Kind::Float, Device::Cpu))?;
    let run = if kind == Kind::Float { flowrun_attend_back_f32 } else { flowrun_attend_back_bf16 };
    // SAFETY: shapes, types and rows were looked at above; the tensors live until it returns, which writes every
    // number of `d`.
    unsafe {
        run(
            qkv.data_ptr(),
            d_out.data_ptr().cast(),
            stretches_of.as_ptr(),
            stretches_of.len() as i64,
            stretches.as_ptr(),
            rows.as_ptr(),
            window.unwrap_or(i64::MAX),
            kv_heads,
            group,
            dims,
            scale as f32,
            d.data_ptr().cast(),
        );
    }
    Ok(d)
}

/// Whether the trees are `tokens` together and each sees rows of its own alone.
fn apart(stretches_of: &[i64], stretches: &[Stretch], rows: &[Rows], tokens: i64) -> bool {
    let (mut stretches, mut rows, mut first) = (stretches.iter(), rows.iter(), 0);
    for &count in stretches_of {
        let of_tree: Vec<&Stretch> = stretches.by_ref().take(usize::try_from(count).unwrap_or(0)).collect();
        let end = first + of_tree.iter().map(|s| s.tokens).sum::<i64>();
        for stretch in of_tree {
            let seen: Vec<&Rows> = rows.by_ref().take(usize::try_from(stretch.rows).unwrap_or(0)).collect();
            let inside = |r: &&Rows| r.source == 0 && r.count >= 0 && r.first >= first && r.first + r.count <= end;
            if !seen.iter().all(inside) || seen.iter().map(|r| r.count).sum::<i64>() < stretch.tokens {
                return false;
            }
        }
        first = end;
    }
    first == tokens && stretches.next().is_none() && rows.next().is_none()
}

/// The dtype of a tensor that is for these operations.
fn served(tensor: &Tensor) -> Result<Kind, TorchError> {
    let kind = tensor.kind();
    if serves(kind, tensor.device()) {
        return Ok(kind);
    }
    Err(TorchError::Operation(format!("{kind:?} on {:?} has no gradient here", tensor.device())))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::torch::GradGuard;

    const KINDS: [Kind; 2] = [Kind::BFloat16, Kind::Float];

    fn random(size: &[i64], kind: Kind) -> Tensor {
        Tensor::randn(size, (Kind::Float, Device::Cpu)).to_kind(kind)
    }

    fn wide(t: &Tensor) -> Tensor {
        t.to_kind(Kind::Float)
    }

    fn off(found: &Tensor, expected: &Tensor) -> f64 {
        let largest = expected.abs().max().double_value(&[]);
        (wide(found) - expected).abs().max().double_value(&[]) / largest
    }

    fn bound(kind: Kind) -> f64 {
        if kind == Kind::Float { 1e-5 } else { 1.0 / 256.0 }
    }

    fn kinds() -> impl Iterator<Item = Kind> {
        KINDS.into_iter().filter(|kind| serves(*kind, Device::Cpu))
    }

    /// The gradient of the sum of `f(x) * dy` by `x`, in float32.
    fn autograd(x: &Tensor, dy: &Tensor, f: impl Fn(&Tensor) -> Tensor) -> Tensor {
        let _grad = GradGuard::set(true);
        let x = wide(x).detach().set_requires_grad(true);
        let sum = (f(&x) * wide(dy)).sum(Kind::Float);
        Tensor::run_backward(&[sum], &[&x], false, false).remove(0)
    }

    #[test]
    fn norms() {
        tch::manual_seed(0);
        let (x, dy, weight) =
            (random(&[5, 70], Kind::Float), random(&[5, 70], Kind::Float), random(&[70], Kind::Float));
        let dx = random(&[5, 70], Kind::Float);
        let expected = &dx + autograd(&x, &dy, |x| x.rms_norm([70], Some(&weight), 1e-5));
        norm_back(&x, &weight, 1e-5, &dy, &dx).unwrap();
        assert!(off(&dx, &expected) < 1e-5);
    }

    #[test]
    fn gates() {
        tch::manual_seed(1);
        for kind in kinds() {
            let (x, dy) = (random(&[6, 80], kind) * 3.0, random(&[6, 40], Kind::Float));
            for gelu in [false, true] {
                let expected = autograd(&x, &dy, |x| {
                    let (gate, up) = (x.narrow(1, 0, 40), x.narrow(1, 40, 40));
                    if gelu { gate.gelu("tanh") * up } else { gate.silu() * up }
                });
                assert!(off(&gate_back(&x, &dy, gelu).unwrap(), &expected) < bound(kind));
            }
        }
    }

    #[test]
    fn turns_with_and_without_norms() {
        tch::manual_seed(2);
        for kind in kinds() {
            let (x, d) = (random(&[4, 5, 24], kind), random(&[4, 5, 24], Kind::Float));
            let (q, k) = (random(&[24], Kind::Float), random(&[24], Kind::Float));
            let (cos, sin) = (random(&[4, 1, 16], kind), random(&[4, 1, 16], kind));
            for norms in [None, Some((&q, &k))] {
                let turn = Turn { norms, eps: 1e-5, angles: Some((&cos, &sin)) };
                let expected = autograd(&x, &d, |x| {
                    let normed = |first, count, w: &Tensor| {
                        let part = x.narrow(1, first, count);
                        if norms.is_some() { part.rms_norm([24], Some(w), 1e-5) } else { part }
                    };
                    let qk = Tensor::cat(&[normed(0, 3, &q), normed(3, 1, &k)], 1);
                    let (turned, rest) = (qk.narrow(2, 0, 16), qk.narrow(2, 16, 8));
                    let turned = &turned * wide(&cos) + turned.roll([8], [-1]) * wide(&sin);
                    Tensor::cat(&[Tensor::cat(&[turned, rest], 2), x.narrow(1, 4, 1)], 1)
                });
                assert!(off(&turn_back(&turn, &x, 3, 1, &d).unwrap(), &expected) < bound(kind));
            }
        }
    }

    #[test]
    fn log_probs_and_their_gradients() {
        tch::manual_seed(3);
        let (logits, targets) =
            (random(&[7, 1300], Kind::Float) * 5.0, Tensor::from_slice(&[0_i64, 5, 7, 9, 1, 1299, 3]));
        let picked = |x: &Tensor| x.log_softmax(-1, Kind::Float).gather(1, &targets.unsqueeze(1), false);
        let expected = autograd(&logits, &Tensor::ones([7, 1], (Kind::Float, Device::Cpu)), picked);
        for kind in kinds() {
            let (log_probs, d) = target_log_probs(&logits, &targets, Some(kind)).unwrap();
            assert!(off(&log_probs, &picked(&logits).squeeze_dim(1)) < 1e-5);
            assert!(off(&d.unwrap(), &expected) < bound(kind));
        }
        assert!(target_log_probs(&logits, &(targets + 1), None).is_err());
    }

    /// Trees of a prompt and its answers, some longer than what goes together in the kernel.
    #[test]
    fn attention_of_trees() {
        tch::manual_seed(4);
        let (kv_heads, group, scale) = (2, 3, 0.3);
        for trees in [[(3, vec![4, 2]), (5, vec![20])], [(40, vec![70, 45]), (33, vec![64, 1])]] {
            let (mut pass, mut stretches_of, mut seen) = (Pass::default(), Vec::new(), Vec::new());
            let rows = |first, count| Rows { source: 0, first, count };
            let mut end = 0;
            for (prompt, answers) in &trees {
                let first = end;
                stretches_of.push(1 + answers.len() as i64);
                pass.push(*prompt, [rows(first, *prompt)]);
                seen.push((0..0, first..first + prompt));
                end += prompt;
                for answer in answers {
                    pass.push(*answer, [rows(first, *prompt), rows(end, *answer)]);
                    seen.push((first..first + prompt, end..end + answer));
                    end += answer;
                }
            }
            for (kind, dims) in kinds().flat_map(|kind| [(kind, 64), (kind, 20)]) {
                let (qkv, d_out) = (random(&[end, 10, dims], kind), random(&[end, 6 * dims], Kind::Float));
                for window in [None, Some(4), Some(50)] {
                    let mask = vec![f32::NEG_INFINITY; (end * end) as usize];
                    let mask = seen.iter().fold(mask, |mut mask, (prompt, own)| {
                        for row in own.clone() {
                            let keys: Vec<i64> = prompt.clone().chain(own.start..=row).collect();
                            let skip = window.map_or(0, |w: i64| (keys.len() as i64 - w).max(0)) as usize;
                            keys[skip..].iter().for_each(|key| mask[(row * end + key) as usize] = 0.0);
                        }
                        mask
                    });
                    let mask = Tensor::from_slice(&mask).view([end, end]);
                    let expected = autograd(&qkv, &d_out, |qkv| {
                        let heads = |first, count, times| {
                            qkv.narrow(1, first, count).repeat_interleave_self_int(times, 1, None).transpose(0, 1)
                        };
                        let scores = heads(0, 6, 1).matmul(&heads(6, 2, group).transpose(1, 2)) * scale + &mask;
                        scores.softmax(-1, Kind::Float).matmul(&heads(8, 2, group)).transpose(0, 1).reshape([end, -1])
                    });
                    let how = Attention { kv_heads, group, window, scale };
                    let found = attend_back(&pass, &stretches_of, how, &qkv, &d_out).unwrap();
                    let off = off(&found, &expected);
                    assert!(off < if kind == Kind::Float { 1e-5 } else { 1e-2 }, "{kind:?} {dims} {window:?}: {off}");
                }
            }
            let how = Attention { kv_heads, group, window: None, scale };
            let (qkv, d_out) = (random(&[end, 10, 8], Kind::Float), random(&[end, 48], Kind::Float));
            stretches_of.reverse();
            if stretches_of[0] != stretches_of[1] {
                assert!(attend_back(&pass, &stretches_of, how, &qkv, &d_out).is_err(), "trees that share rows");
            }
        }
    }
}
