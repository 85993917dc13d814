//! SQL functions that DataFusion lacks, in every query of a flow.

use std::sync::Arc;

use datafusion::arrow::array::{ArrayRef, StringArray};
use datafusion::arrow::datatypes::DataType;
use datafusion::common::cast::as_string_array;
use datafusion::error::DataFusionError;
use datafusion::logical_expr::{ColumnarValue, ScalarUDF, Volatility, create_udf};

/// `regexp_escape(TEXT)`: a pattern that matches the text and nothing else; of null, null.
pub fn regexp_escape() -> ScalarUDF {
    let escape = |arguments: &[ColumnarValue]| -> Result<ColumnarValue, DataFusionError> {
        let arrays = ColumnarValue::values_to_arrays(arguments)?;
        let texts = as_string_array(&arrays[0])?;
        let escaped: StringArray = texts.iter().map(|text| text.map(regex::escape)).collect();
        Ok(ColumnarValue::Array(Arc::new(escaped) as ArrayRef))
    };
    create_udf("regexp_escape", vec![DataType::Utf8], DataType::Utf8, Volatility::Immutable, Arc::new(escape))
}

#[cfg(test)]
mod tests {
    use datafusion::arrow::array::{AsArray, UInt64Array};
    use datafusion::arrow::record_batch::RecordBatch;

    use super::*;
    use crate::data::Query;

    #[tokio::test]
    async fn an_escaped_text_matches_itself_in_any_query() {
        let texts = ["3.5", "a-b", r"\pi", "(x", "$5 #1", "é*", ""];
        let rows: ArrayRef = Arc::new(UInt64Array::from_iter_values(0..texts.len() as u64 + 1));
        let column: StringArray = texts.iter().copied().map(Some).chain([None]).collect();
        let batch = RecordBatch::try_from_iter([("_row", rows), ("text", Arc::new(column) as ArrayRef)]).unwrap();
        let sql = "SELECT regexp_like(text, '^' || regexp_escape(text) || '$') AS same, \
                   regexp_escape('3.5') AS written FROM input";
        let mut query = Query::plan(sql, &[("input", batch.schema())]).await.unwrap();
        assert!(query.row_wise() && !query.volatile());
        let made = query.apply(&batch).await.unwrap();
        let same: Vec<_> = made.column_by_name("same").unwrap().as_boolean().iter().collect();
        assert_eq!(same, [vec![Some(true); texts.len()], vec![None]].concat());
        assert_eq!(made.column_by_name("written").unwrap().as_string::<i32>().value(0), r"3\.5");
    }
}
