//! Reading a kind's keys out of a stage's table.

use serde::de::DeserializeOwned;

use super::FlowError;

/// `table` as `T`; `path` is the dotted key of the table.
pub fn read<T: DeserializeOwned>(table: &toml::Table, path: &str) -> Result<T, FlowError> {
    table.clone().try_into().map_err(|e| FlowError::new(path, e.to_string()))
}
