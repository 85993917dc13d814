//! `method = "rule"`: a score that can be computed, as a DataFusion expression over the row.

use datafusion::arrow::datatypes::SchemaRef;
use datafusion::arrow::record_batch::RecordBatch;

use super::health::Health;
use crate::data::{DataError, Query};
use crate::engine::{Message, StageContext, StageError};

/// The query that adds the columns of a score. What is true counts 1; null is no score.
fn sql(rule: &str) -> String {
    format!(
        "SELECT *, CAST(({rule}) AS DOUBLE) AS score, CAST(0 AS DOUBLE) AS score_variance, \
         CAST(1 AS INT UNSIGNED) AS score_samples FROM input"
    )
}

/// Plans the rule over rows of these columns.
///
/// # Errors
/// The expression's own fault: a message for the user.
pub async fn plan(rule: &str, schema: SchemaRef) -> Result<Query, DataError> {
    // By itself first: beside `*` the message about an aggregate would be one about columns.
    let alone = Query::plan(&format!("SELECT {rule} AS score FROM input"), &[("input", schema.clone())]).await?;
    if !alone.row_wise() || alone.unnests() {
        return Err(DataError::user(
            "is no expression over one row; aggregates, windows and UNNEST belong in a mapper",
        ));
    }
    Query::plan(&sql(rule), &[("input", schema)]).await
}

/// Scores batch by batch. Nothing is recorded: the same rows give the same scores.
pub async fn run(rule: &str, ctx: &mut StageContext, health: &mut Health) -> Result<(), StageError> {
    let mut planned: Option<Query> = None;
    while let Some(message) = ctx.input("input").recv().await? {
        let batch = match message.batch.filter(|b| b.num_rows() > 0) {
            None => None,
            Some(batch) => Some(scored(rule, &mut planned, &batch).await?),
        };
        batch.iter().for_each(|b| health.count(b));
        ctx.output.send("", Message { batch, ..message }).await?;
    }
    Ok(())
}

pub async fn scored(rule: &str, planned: &mut Option<Query>, batch: &RecordBatch) -> Result<RecordBatch, StageError> {
    let query = match planned {
        Some(query) => query,
        None => planned.insert(plan(rule, batch.schema()).await?),
    };
    Ok(query.apply(batch).await?)
}
