//! The ways of computing on a GPU beyond libtorch's own, each of which can be switched off by itself.

use std::fmt;

/// An operation, or a few that go together, for which libtorch's own operations can stand in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Path {
    /// Our kernel of the root mean square norm, with the sum before it.
    Norm,
    /// Our kernels of the norms of queries and keys, and of the rotary embedding.
    Rotary,
    /// Our kernel that writes new keys and values to the KV cache.
    KvStore,
    /// Our kernel of the gated activation.
    Gate,
    /// Our kernels of adapters.
    Lora,
    /// Our kernel that draws tokens.
    Sampling,
    /// libtorch's flash attention over sequences of different lengths.
    Flash,
}

impl Path {
    pub const ALL: [Self; 7] =
        [Self::Norm, Self::Rotary, Self::KvStore, Self::Gate, Self::Lora, Self::Sampling, Self::Flash];

    /// True where it is made of kernels of our own.
    pub fn is_kernel(self) -> bool {
        self != Self::Flash
    }
}

impl fmt::Display for Path {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Norm => "norm",
            Self::Rotary => "rotary embedding",
            Self::KvStore => "KV store",
            Self::Gate => "gated activation",
            Self::Lora => "adapters",
            Self::Sampling => "sampling",
            Self::Flash => "flash attention",
        })
    }
}

/// Which paths of a GPU may be used; `[devices."cuda:0"]` in a flow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Switches {
    pub kernels: bool,
    pub flash: bool,
}

impl Default for Switches {
    fn default() -> Self {
        Self { kernels: true, flash: true }
    }
}

impl Switches {
    /// Why `path` is off by hand, if it is.
    pub(super) fn off(self, path: Path) -> Option<&'static str> {
        match path {
            Path::Flash if !self.flash => Some("switched off: flash = false"),
            path if path.is_kernel() && !self.kernels => Some("switched off: kernels = false"),
            _ => None,
        }
    }
}
