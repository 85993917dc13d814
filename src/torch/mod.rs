//! libtorch, kept at arm's length: device threads, errors, and everything unsafe.
//!
//! Tensors never cross an actor. One OS thread a device ([`DeviceThread`]) owns the model, the KV
//! cache, adapters and optimizer; everybody else sends it plain data and awaits plain data.

pub(crate) mod cpu;
mod cuda;
mod device;
mod error;
pub(crate) mod gpu;
mod grad;
pub(crate) mod gradient;
mod kernels;
mod memory;
mod nvrtc;
pub(crate) mod ops;
mod plain;
pub(crate) mod products;
mod shim;

pub use cpu::processor;
pub use cuda::{cuda_devices, init};
pub(crate) use cuda::{limit_memory, memory, shim};
pub use device::{DeviceError, DeviceThread, Tenant, Tenants, Turn};
pub use error::TorchError;
pub use grad::GradGuard;
pub(crate) use kernels::describe;
pub(crate) use memory::bytes_mut;
pub use shim::Memory;
pub(crate) use shim::{Graph, GraphPool};
