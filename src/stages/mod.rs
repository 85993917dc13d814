//! Stage kinds: the glue between engine and the rooms below, one file a kind.

pub mod trainer;
