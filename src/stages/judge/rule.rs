//! `method = "rule"`: a score computed by a DataFusion expression over the row.

use std::collections::HashSet;
use std::sync::Arc;

use datafusion::arrow::datatypes::{DataType, SchemaRef};
use datafusion::arrow::record_batch::RecordBatch;
use datafusion::common::tree_node::{TreeNode, TreeNodeRecursion};
use datafusion::common::{DFSchema, DataFusionError};
use datafusion::datasource::MemTable;
use datafusion::logical_expr::{Expr, ExprSchemable, Operator};

use super::health::Health;
use crate::data::batch::type_name;
use crate::data::{DataError, Query, query};
use crate::engine::{Message, StageContext, StageError};
use crate::stages::rows::{RowError, apply_or_give_up, without};

/// Returns the query that adds the score's columns. True counts 1, false 0; null is no score.
fn sql(rule: &str) -> String {
    format!(
        "SELECT *, CAST(({rule}) AS DOUBLE) AS score, CAST(0 AS DOUBLE) AS score_variance, \
         CAST(1 AS INT UNSIGNED) AS score_samples FROM input"
    )
}

/// Plans the rule for rows with this schema.
///
/// # Errors
/// The expression is wrong; the message is for the user.
pub async fn plan(rule: &str, schema: SchemaRef) -> Result<Query, DataError> {
    // By itself first: beside `*` the message about an aggregate would be one about columns.
    let alone = Query::plan(&format!("SELECT {rule} AS score FROM input"), &[("input", schema.clone())]).await?;
    if !alone.row_wise() || alone.unnests() {
        return Err(DataError::user(
            "is no expression over one row; aggregates, windows and UNNEST belong in a mapper",
        ));
    }
    if let Ok(field) = alone.schema().field_with_name("score") {
        let kind = field.data_type();
        if !kind.is_numeric() && !matches!(kind, DataType::Boolean | DataType::Null) {
            let kind = type_name(kind);
            return Err(DataError::user(format!("gives {kind}; a score is a number, or true for 1 and false for 0")));
        }
    }
    if let Some(mixed) = mixed_comparison(rule, schema.clone()).await? {
        return Err(DataError::user(mixed));
    }
    Query::plan(&sql(rule), &[("input", schema)]).await
}

/// Scores the rows batch by batch. There is no journal, because the same rows give the same scores. If the rule fails
/// on a row, the row becomes a dead letter.
pub async fn run(rule: &str, ctx: &mut StageContext, health: &mut Health) -> Result<(), StageError> {
    let mut planned: Option<Query> = None;
    let mut dead: HashSet<u64> = HashSet::new();
    while let Some(mut message) = ctx.input("input").recv().await? {
        let batch = message.batch.take().filter(|b| b.num_rows() > 0);
        let batch = match batch.map(|batch| without(&batch, &dead)).transpose()? {
            None => None,
            Some(batch) => {
                let query = query_of(rule, &mut planned, &batch).await?;
                Some(apply_or_give_up(ctx, query, "rule", &batch, &mut dead).await?)
            }
        };
        batch.iter().for_each(|b| health.count(b));
        message.completes.retain(|row| !dead.contains(row));
        ctx.output.send("", Message { batch, ..message }).await?;
    }
    Ok(())
}

/// Returns the rows with their scores.
///
/// # Errors
/// `RowError::DeadLetter` if the rule can't be computed for one of the rows.
pub async fn scored(rule: &str, planned: &mut Option<Query>, batch: &RecordBatch) -> Result<RecordBatch, RowError> {
    let query = query_of(rule, planned, batch).await?;
    query.apply(batch).await.map_err(|e| RowError::DeadLetter(format!("the rule can't be computed: {}", e.message)))
}

/// The query of a rule, planned over the first batch.
async fn query_of<'a>(
    rule: &str,
    planned: &'a mut Option<Query>,
    batch: &RecordBatch,
) -> Result<&'a mut Query, StageError> {
    Ok(match planned {
        Some(query) => query,
        None => planned.insert(plan(rule, batch.schema()).await?),
    })
}

/// Returns a message if the rule compares text with a number. DataFusion would convert every text to a number and
/// fail on the first that is not one.
async fn mixed_comparison(rule: &str, schema: SchemaRef) -> Result<Option<String>, DataError> {
    let failed = |e: DataFusionError| DataError::user(e.to_string());
    let session = query::session();
    let table = MemTable::try_new(schema, vec![Vec::new()]).map_err(failed)?;
    session.register_table("input", Arc::new(table)).map_err(failed)?;
    let plan = query::logical_plan(&session, &format!("SELECT {rule} AS score FROM input")).await.map_err(failed)?;
    let Some(columns) = plan.inputs().first().map(|input| input.schema().clone()) else { return Ok(None) };
    let mut mixed = None;
    for expr in plan.expressions() {
        let look = |expr: &Expr| {
            mixed = mixed.take().or_else(|| compared(expr).into_iter().find_map(|(a, b)| mix(a, b, &columns)));
            Ok(if mixed.is_some() { TreeNodeRecursion::Stop } else { TreeNodeRecursion::Continue })
        };
        expr.apply(look).map_err(failed)?;
    }
    Ok(mixed)
}

const COMPARISONS: [Operator; 8] = [
    Operator::Eq,
    Operator::NotEq,
    Operator::Lt,
    Operator::LtEq,
    Operator::Gt,
    Operator::GtEq,
    Operator::IsDistinctFrom,
    Operator::IsNotDistinctFrom,
];

/// Returns the pairs of expressions that `expr` compares.
fn compared(expr: &Expr) -> Vec<(&Expr, &Expr)> {
    match expr {
        Expr::BinaryExpr(both) if COMPARISONS.contains(&both.op) => vec![(&both.left, &both.right)],
        Expr::InList(list) => list.list.iter().map(|item| (list.expr.as_ref(), item)).collect(),
        Expr::Between(range) => vec![(&range.expr, &range.low), (&range.expr, &range.high)],
        _ => Vec::new(),
    }
}

/// Returns a message if one side is text and the other a number. A text literal is allowed: it is converted once,
/// when the rule is planned.
fn mix(one: &Expr, other: &Expr, columns: &DFSchema) -> Option<String> {
    let kind = |expr: &Expr| expr.get_type(columns).ok();
    let is_text = |kind: &DataType| matches!(kind, DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View);
    let (text, number) = match (kind(one)?, kind(other)?) {
        (a, b) if is_text(&a) && b.is_numeric() => (one, other),
        (a, b) if is_text(&b) && a.is_numeric() => (other, one),
        _ => return None,
    };
    if matches!(text, Expr::Literal(..)) {
        return None;
    }
    let shown = |expr: &Expr| expr.human_display().to_string().replace("input.", "");
    let (text, number) = (shown(text), shown(number));
    Some(format!(
        "compares the text {text} with the number {number}; write CAST({number} AS STRING) to compare texts, or \
         TRY_CAST({text} AS DOUBLE) to compare numbers"
    ))
}

#[cfg(test)]
mod tests {
    use datafusion::arrow::array::{ArrayRef, Float64Array, Int64Array, StringArray, UInt64Array};

    use super::*;
    use crate::stages::rows::failures;

    fn batch(answers: &[&str], said: &[&str]) -> RecordBatch {
        let rows: ArrayRef = Arc::new(UInt64Array::from_iter_values(0..answers.len() as u64));
        let numbers: ArrayRef = Arc::new(Int64Array::from_iter_values(0..answers.len() as i64));
        let text = |of: &[&str]| Arc::new(StringArray::from(of.to_vec())) as ArrayRef;
        RecordBatch::try_from_iter([
            ("_row", rows),
            ("n", numbers),
            ("answer", text(answers)),
            ("generation", text(said)),
        ])
        .unwrap()
    }

    /// The rule of docs/judging.md and the shipped flows.
    const RULE: &str = r"regexp_like(generation, '(^|[^\w.,:/^−–-]|\D:)' || regexp_escape(answer) || '\W*$', 'i')";

    #[tokio::test]
    async fn the_documented_rule_takes_answers_as_they_are_written() {
        let table = [
            ("12", "The answer is 12", 1.0),
            ("12", "The answer is **12**.", 1.0),
            ("12", "The answer is 12, or 13", 0.0),
            ("2", "The answer is 12", 0.0),
            ("3.5", "The answer is 3.5", 1.0),
            ("3.5", "The answer is 3x5", 0.0),
            ("5", "The answer is 3.5", 0.0),
            ("3", "The answer is −3", 0.0),
            ("−3", "The answer is −3", 1.0),
            ("2", "The answer is 1/2", 0.0),
            ("1/2", "The answer is 1/2", 1.0),
            ("30", "The answer is 12:30", 0.0),
            ("30", "Answer:30", 1.0),
            ("3", "The answer is 2^3", 0.0),
            ("3", "so x=3", 1.0),
            ("-3", "The answer is -3", 1.0),
            ("3", "The answer is -3", 0.0),
            ("(a+b)", "The answer is (a+b)", 1.0),
            ("(a+b)", "The answer is (aab)", 0.0),
            ("[2,5)", "The answer is [2,5)", 1.0),
            (r"\pi", r"The answer is \pi", 1.0),
            (r"\frac{1}{2}", r"The answer is \frac{1}{2}", 1.0),
            ("$5", "The answer is $5", 1.0),
            ("x^2", "The answer is x^2.", 1.0),
            ("a|b", "b", 0.0),
            ("it's", "It's", 1.0),
        ];
        let (answers, said): (Vec<_>, Vec<_>) = table.iter().map(|(answer, said, _)| (*answer, *said)).unzip();
        let scored = scored(RULE, &mut None, &batch(&answers, &said)).await.unwrap();
        let scores = scored.column_by_name("score").unwrap().as_any().downcast_ref::<Float64Array>().unwrap();
        for (i, (answer, said, wanted)) in table.iter().enumerate() {
            assert_eq!(scores.value(i), *wanted, "{answer} in {said:?}");
        }
    }

    #[tokio::test]
    async fn text_is_not_compared_with_a_number() {
        let refused = |rule: &'static str| async move { plan(rule, batch(&["1"], &["1"]).schema()).await.err() };
        for rule in
            ["trim(generation) = n", "n < generation", "generation IN (1, 2)", "CASE WHEN generation = n THEN 1 END"]
        {
            let message = refused(rule).await.unwrap_or_else(|| panic!("{rule}")).message;
            assert!(message.contains("compares the text") && message.contains("CAST("), "{rule}: {message}");
        }
        let message = refused("trim(generation) = n").await.unwrap().message;
        assert!(message.contains("write CAST(n AS STRING)"), "{message}");
        for rule in [
            "trim(generation) = CAST(n AS STRING)",
            "TRY_CAST(generation AS DOUBLE) = n",
            "n = '1'",
            "generation = '1'",
            "length(generation) > n",
            "generation || n = '11'",
        ] {
            assert!(refused(rule).await.is_none(), "{rule}");
        }
    }

    #[tokio::test]
    async fn the_rows_that_fail_are_told_and_no_others() {
        let (answers, said) = (["1", "x", "3", "["], ["1", "2", "x", "4"]);
        for (rule, wanted) in
            [("CAST(answer AS INT)", &[1, 3][..]), ("1 / (n - 2)", &[2]), ("regexp_like(generation, answer)", &[3])]
        {
            let batch = batch(&answers, &said);
            let mut planned = None;
            assert!(matches!(scored(rule, &mut planned, &batch).await, Err(RowError::DeadLetter(_))), "{rule}");
            let failed = failures(planned.as_mut().unwrap(), &batch).await.unwrap();
            let rows: Vec<u64> = failed.keys().copied().collect();
            assert_eq!(rows, wanted, "{rule}");
            let rest = without(&batch, &failed.into_keys().collect()).unwrap();
            assert_eq!(scored(rule, &mut planned, &rest).await.unwrap().num_rows(), 4 - wanted.len(), "{rule}");
        }
    }
}
