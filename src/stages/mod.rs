//! Stage kinds, one file each: the glue between the engine and the rooms below.

mod chat;
mod client;
mod columns;
pub mod judge;
mod rows;
