//! Data: files and hub data sets, SQL over record batches, splits, Parquet. Nothing here knows of
//! actors or rounds; the stages that use it are in [`crate::stages`].

mod arrow_files;
pub mod batch;
pub mod candidates;
pub mod carry;
mod column_type;
pub mod conversion;
mod depth;
mod direct;
pub mod error;
pub mod files;
pub mod form;
mod functions;
pub mod hub;
mod parts;
mod pool;
pub mod query;
#[cfg(test)]
mod round_trip;
pub mod shard;
pub mod source;
pub mod split;
pub mod splits;
pub mod stored;
pub mod table;
mod text;

pub use column_type::ColumnType;
pub use error::DataError;
pub use query::Query;
pub use source::{Source, SourceSpec};
pub use split::Split;
