//! The types that a flow may give a column by hand.

use datafusion::arrow::datatypes::DataType;
use serde::{Deserialize, Serialize};

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ColumnType {
    F64,
    I64,
    Bool,
    String,
}

impl ColumnType {
    pub fn named(name: &str) -> Option<Self> {
        Some(match name {
            "f64" => Self::F64,
            "i64" => Self::I64,
            "bool" => Self::Bool,
            "string" => Self::String,
            _ => return None,
        })
    }

    pub fn name(self) -> &'static str {
        match self {
            Self::F64 => "f64",
            Self::I64 => "i64",
            Self::Bool => "bool",
            Self::String => "string",
        }
    }

    pub fn data_type(self) -> DataType {
        match self {
            Self::F64 => DataType::Float64,
            Self::I64 => DataType::Int64,
            Self::Bool => DataType::Boolean,
            Self::String => DataType::Utf8,
        }
    }
}
