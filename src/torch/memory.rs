//! The memory behind a tensor.

use tch::{Device, Tensor};

use super::TorchError;

/// Calls `f` with the bytes of a contiguous tensor on the CPU, so that a file is read to where it
/// belongs and not by way of a buffer.
///
/// # Errors
/// When the tensor is on another device or has holes.
pub(crate) fn bytes_mut<R>(tensor: &Tensor, f: impl FnOnce(&mut [u8]) -> R) -> Result<R, TorchError> {
    if tensor.device() != Device::Cpu || !tensor.is_contiguous() {
        return Err(TorchError::Operation("only contiguous tensors on the CPU lie open".into()));
    }
    let bytes = tensor.numel() * tensor.kind().elt_size_in_bytes();
    if bytes == 0 {
        return Ok(f(&mut []));
    }
    // SAFETY: the memory of a contiguous tensor is one block of `bytes` bytes from `data_ptr` on, it lives
    // as long as the borrowed handle, and every bit pattern is a number. Only fresh tensors come here,
    // each stretch of rows on one thread, so nobody else reads or writes them meanwhile.
    let bytes = unsafe { std::slice::from_raw_parts_mut(tensor.data_ptr().cast::<u8>(), bytes) };
    Ok(f(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_in_the_tensor() {
        let tensor = Tensor::zeros([2, 2], (tch::Kind::Float, Device::Cpu));
        let row = tensor.narrow(0, 1, 1);
        bytes_mut(&row, |bytes| bytes.copy_from_slice(&[1_f32, 2.0].map(f32::to_le_bytes).concat())).unwrap();
        assert_eq!(Vec::<f32>::try_from(tensor.flatten(0, -1)).unwrap(), [0.0, 0.0, 1.0, 2.0]);
        assert!(bytes_mut(&tensor.narrow(1, 0, 1), |_| ()).is_err());
    }
}
