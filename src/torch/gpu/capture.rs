//! Whether CUDA graphs can be captured, replayed, and given up.

use tch::{Device, Kind, Tensor};

use super::super::shim::GraphPool;
use super::super::{TorchError, cuda};

/// Captures a graph and replays it; lets a capture fail; then captures again. A failed capture must leave no memory
/// behind and the thread able to go on.
///
/// # Errors
/// With what went wrong.
pub fn check_capture(index: usize) -> Result<(), TorchError> {
    let shim = cuda::shim().ok_or_else(|| failed("libtorch's part of CUDA graphs is missing"))?;
    shim.use_device(index)?;
    replays(&GraphPool::new(shim, index)?, index)?;
    shim.empty_cache()?;
    let before = shim.memory(index)?.reserved;
    let pool = GraphPool::new(shim, index)?;
    let large = Tensor::f_ones([1 << 24], (Kind::Float, Device::Cuda(index)))?;
    // Reading a number waits for the GPU, which a capture forbids.
    if pool.capture(|| Ok(large.f_mul_scalar(2.0)?.f_sum(Kind::Float)?.f_double_value(&[])?)).is_ok() {
        return Err(failed("a capture that waits for the GPU did not fail"));
    }
    drop((pool, large));
    shim.empty_cache()?;
    let left = shim.memory(index)?.reserved.saturating_sub(before);
    if left > 0 {
        return Err(failed(format!("a capture that failed left {left} bytes behind")));
    }
    replays(&GraphPool::new(shim, index)?, index)
}

/// Captures `2 x + 1` and replays it with other numbers.
fn replays(pool: &GraphPool, index: usize) -> Result<(), TorchError> {
    let mut x = Tensor::f_ones([1 << 16], (Kind::Float, Device::Cuda(index)))?;
    let (graph, y) = pool.capture(|| Ok(x.f_mul_scalar(2.0)?.f_add_scalar(1.0)?))?;
    for value in [3.0, 5.0] {
        let _ = x.f_fill_(value)?;
        graph.replay()?;
        let wrong = y.f_ne(2.0 * value + 1.0)?.f_sum(Kind::Int64)?.f_int64_value(&[])?;
        if wrong > 0 {
            return Err(failed(format!("a replayed graph gave {wrong} wrong numbers")));
        }
    }
    Ok(())
}

fn failed(message: impl Into<String>) -> TorchError {
    TorchError::Operation(message.into())
}
