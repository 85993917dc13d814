//! One file a kind of stage: the glue between the engine and the rooms below.

pub mod mapper;
pub mod sink;
pub mod source;
pub mod split;
