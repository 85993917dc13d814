//! Products with many rows for passes that train on a CPU, in C++ beside this file (products.cpp).
//!
//! What comes out of a row depends on that row alone, not on how many there are: a pair's log-probs are the
//! same bits whatever it is packed with. libtorch's bf16 products round by their shape.

use std::ffi::c_void;

use tch::{Device, Kind, Tensor};

use super::TorchError;
use super::cpu::{has_products, lies, pointer};

macro_rules! both_kinds {
    ($(fn $bf16:ident, $f32:ident ( $($name:ident : $type:ty),* );)*) => {
        unsafe extern "C" { $( fn $bf16($($name: $type),*); fn $f32($($name: $type),*); )* }
    };
}

both_kinds! {
    fn flowrun_multiply_bf16, flowrun_multiply_f32(
        x: *const c_void, w: *const c_void, bias: *const f32, rows: i64, inner: i64, outputs: i64, turned: bool,
        wide: bool, y: *mut c_void
    );
    fn flowrun_shrink_bf16, flowrun_shrink_f32(
        x: *const c_void, stride: i64, a: *const f32, rows: i64, inner: i64, rank: i64, low: *mut f32
    );
    fn flowrun_expand_bf16, flowrun_expand_f32(
        low: *const f32, b: *const f32, rows: i64, rank: i64, width: i64, scale: f32, out: *mut c_void, stride: i64
    );
    fn flowrun_outer_bf16, flowrun_outer_f32(
        low: *const f32, x: *const c_void, stride: i64, rows: i64, rank: i64, width: i64, scale: f32, to: *mut f32
    );
}

/// Whether the processor and the dtype are for it; inner dimensions of bf16 must be even too.
pub fn serves(kind: Kind, device: Device) -> bool {
    device == Device::Cpu && has_products() && matches!(kind, Kind::BFloat16 | Kind::Float)
}

/// `x W^T + bias`: `x` is `[rows, inner]`, `weight` `[outputs, inner]`, `bias` `[outputs]`; the result
/// `[rows, outputs]` in their dtype, or in float32 with `wide`.
///
/// # Errors
/// When a tensor has another shape or type.
pub fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>, wide: bool) -> Result<Tensor, TorchError> {
    let outputs = weight.size2()?.0;
    let bias = bias.map(|bias| bias.f_to_kind(Kind::Float)).transpose()?;
    if let Some(bias) = &bias {
        lies(bias, Kind::Float, &[outputs])?;
    }
    multiply(x, weight, bias.as_ref(), false, wide)
}

/// `dy W`, the gradient of [`linear`] by `x`: `dy` is `[rows, outputs]`, the result `[rows, inner]` in float32.
///
/// # Errors
/// When a tensor has another shape or type.
pub fn linear_back(dy: &Tensor, weight: &Tensor) -> Result<Tensor, TorchError> {
    multiply(dy, weight, None, true, true)
}

fn multiply(x: &Tensor, w: &Tensor, bias: Option<&Tensor>, turned: bool, wide: bool) -> Result<Tensor, TorchError> {
    let ((rows, inner), size) = (x.size2()?, w.size2()?);
    let outputs = if turned { size.1 } else { size.0 };
    let kind = x.kind();
    lies(x, kind, &[rows, inner])?;
    lies(w, kind, &if turned { [inner, outputs] } else { [outputs, inner] })?;
    if !serves(kind, x.device()) || (kind == Kind::BFloat16 && inner % 2 != 0) {
        return Err(TorchError::Operation(format!("{kind:?} of {rows} by {inner} can't be multiplied here")));
    }
    let y = Tensor::f_empty([rows, outputs], (if wide { Kind::Float } else { kind }, Device::Cpu))?;
    let run = if kind == Kind::Float { flowrun_multiply_f32 } else { flowrun_multiply_bf16 };
    if rows > 0 {
        // SAFETY: contiguous tensors on the CPU of the shapes and types that it reads and writes, which live
        // until it returns.
        unsafe {
            let bias = pointer(bias).cast();
            run(x.data_ptr(), w.data_ptr(), bias, rows, inner, outputs, turned, wide, y.data_ptr());
        }
    }
    Ok(y)
}

/// `x A^T`: `x` is `[rows, inner]`, whose rows may lie apart, `a` `[rank, inner]` float32; the result
/// `[rows, rank]` in float32.
///
/// # Errors
/// When a tensor has another shape or type.
pub fn shrink(x: &Tensor, a: &Tensor) -> Result<Tensor, TorchError> {
    let ((rows, inner), rank) = (x.size2()?, a.size2()?.0);
    let stride = strided(x, inner)?;
    lies(a, Kind::Float, &[rank, inner])?;
    let low = Tensor::f_empty([rows, rank], (Kind::Float, Device::Cpu))?;
    let run = if x.kind() == Kind::Float { flowrun_shrink_f32 } else { flowrun_shrink_bf16 };
    // SAFETY: shapes, strides and types were looked at above; the tensors live until it returns.
    unsafe { run(x.data_ptr(), stride, a.data_ptr().cast(), rows, inner, rank, low.data_ptr().cast()) };
    Ok(low)
}

/// Adds `scale * low B` to `out` in place: `low` is `[rows, rank]`, `b` `[rank, width]`, both float32, `out`
/// `[rows, width]`, whose rows may lie apart.
///
/// # Errors
/// When a tensor has another shape or type.
pub fn expand(low: &Tensor, b: &Tensor, scale: f64, out: &Tensor) -> Result<(), TorchError> {
    let ((rows, width), rank) = (out.size2()?, b.size2()?.0);
    let stride = strided(out, width)?;
    lies(low, Kind::Float, &[rows, rank])?;
    lies(b, Kind::Float, &[rank, width])?;
    let run = if out.kind() == Kind::Float { flowrun_expand_f32 } else { flowrun_expand_bf16 };
    let (low, b) = (low.data_ptr().cast_const().cast(), b.data_ptr().cast_const().cast());
    // SAFETY: shapes, strides and types were looked at above; the tensors live until it returns. `out` is written
    // through a shared handle as libtorch's own in-place operations do.
    unsafe { run(low, b, rows, rank, width, scale as f32, out.data_ptr(), stride) };
    Ok(())
}

/// Adds `scale * low^T x` to `to` in place: `low` is `[rows, rank]` float32, `x` `[rows, width]`, whose rows may
/// lie apart, `to` `[rank, width]` float32.
///
/// # Errors
/// When a tensor has another shape or type.
pub fn add_outer(low: &Tensor, x: &Tensor, scale: f64, to: &Tensor) -> Result<(), TorchError> {
    let ((rows, width), rank) = (x.size2()?, to.size2()?.0);
    let stride = strided(x, width)?;
    lies(low, Kind::Float, &[rows, rank])?;
    lies(to, Kind::Float, &[rank, width])?;
    let run = if x.kind() == Kind::Float { flowrun_outer_f32 } else { flowrun_outer_bf16 };
    // SAFETY: as in `expand`.
    unsafe {
        let low = low.data_ptr().cast_const().cast();
        run(low, x.data_ptr(), stride, rows, rank, width, scale as f32, to.data_ptr().cast());
    }
    Ok(())
}

/// How far apart the rows of a matrix on the CPU lie, whose rows are in one piece.
fn strided(x: &Tensor, width: i64) -> Result<i64, TorchError> {
    let stride = x.stride();
    if serves(x.kind(), x.device()) && stride.get(1) == Some(&1) && stride.first() >= Some(&width) {
        return Ok(stride[0]);
    }
    let found = (x.kind(), x.size(), stride, x.device());
    Err(TorchError::Operation(format!("expected rows in one piece on the CPU, found {found:?}")))
}

#[cfg(test)]
mod tests {
    use super::*;

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

    fn here(kind: Kind) -> bool {
        serves(kind, Device::Cpu)
    }

    #[test]
    fn products_of_every_shape() {
        tch::manual_seed(0);
        for kind in KINDS.into_iter().filter(|kind| here(*kind)) {
            let bound = if kind == Kind::Float { 1e-5 } else { 1.0 / 256.0 };
            for (rows, inner, outputs) in [(1, 2, 1), (13, 34, 33), (40, 576, 96), (257, 2500, 50), (500, 64, 64)] {
                let (x, w, bias) =
                    (random(&[rows, inner], kind), random(&[outputs, inner], kind), random(&[outputs], kind));
                let expected = wide(&x).matmul(&wide(&w).tr());
                let shape = (kind, rows, inner, outputs);
                assert!(off(&linear(&x, &w, None, true).unwrap(), &expected) < 1e-5, "{shape:?}");
                let expected = expected + wide(&bias);
                assert!(off(&linear(&x, &w, Some(&bias), false).unwrap(), &expected) < bound, "{shape:?}");
                if kind == Kind::Float || outputs % 2 == 0 {
                    let dy = random(&[rows, outputs], kind);
                    let back = linear_back(&dy, &w).unwrap();
                    assert!(off(&back, &wide(&dy).matmul(&wide(&w))) < 1e-5, "{shape:?}");
                }
            }
        }
    }

    #[test]
    fn a_row_is_the_same_in_any_company() {
        tch::manual_seed(1);
        for kind in KINDS.into_iter().filter(|kind| here(*kind)) {
            let (x, w) = (random(&[700, 2500], kind), random(&[100, 2500], kind));
            let a = random(&[6, 2500], Kind::Float);
            let all = linear(&x, &w, None, true).unwrap();
            let low = shrink(&x, &a).unwrap();
            for (first, rows) in [(0, 1), (5, 12), (31, 200), (699, 1)] {
                let some = x.narrow(0, first, rows);
                assert_eq!(linear(&some, &w, None, true).unwrap(), all.narrow(0, first, rows));
                assert_eq!(shrink(&some, &a).unwrap(), low.narrow(0, first, rows));
            }
        }
    }

    #[test]
    fn narrow_matrices() {
        tch::manual_seed(2);
        for kind in KINDS.into_iter().filter(|kind| here(*kind)) {
            for (rows, inner, rank, width) in [(1, 8, 1, 3), (70, 100, 8, 40), (131, 576, 10, 96)] {
                let (x, a) = (random(&[rows, inner + 4], kind), random(&[rank, inner], Kind::Float));
                let x = x.narrow(1, 2, inner);
                let low = shrink(&x, &a).unwrap();
                assert!(off(&low, &wide(&x).matmul(&a.tr())) < 1e-5, "{rows} {inner} {rank}");
                let (b, out) = (random(&[rank, width], Kind::Float), random(&[rows, width + 3], Kind::Float));
                let expected = out.narrow(1, 1, width) + low.matmul(&b) * 0.5;
                expand(&low, &b, 0.5, &out.narrow(1, 1, width)).unwrap();
                assert!(off(&out.narrow(1, 1, width), &expected) < 1e-5);
                let to = random(&[rank, inner], Kind::Float);
                let expected = &to + low.tr().matmul(&wide(&x)) * 2.0;
                add_outer(&low, &x, 2.0, &to).unwrap();
                assert!(off(&to, &expected) < 1e-5);
            }
        }
    }

    #[test]
    fn other_shapes_are_refused() {
        let x = random(&[4, 8], Kind::Float);
        assert!(linear(&x, &random(&[3, 7], Kind::Float), None, true).is_err());
        assert!(linear(&x.tr(), &random(&[3, 4], Kind::Float), None, true).is_err());
        assert!(shrink(&x.tr(), &random(&[2, 4], Kind::Float)).is_err());
        assert!(expand(&x, &random(&[7, 2], Kind::Float), 1.0, &random(&[4, 2], Kind::Float)).is_err());
    }
}
