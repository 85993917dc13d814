//! SQL over the rows of stages.
//!
//! A query where each row stands alone (projection, filter, unnest) is planned once and run batch
//! by batch as batches arrive; DataFusion's own stream would hold rows back until it has 8,192 of
//! them or the end. Everything else (aggregates, ORDER BY, joins, ...) needs its complete input and
//! is run once. Both run the same physical plan, over tables whose rows are swapped in or, where it
//! is filters and projections alone, step by step.

use std::sync::{Arc, Mutex, PoisonError};

use datafusion::arrow::array::UInt64Array;
use datafusion::arrow::datatypes::{DataType, Schema, SchemaRef};
use datafusion::arrow::record_batch::RecordBatch;
use datafusion::catalog::streaming::StreamingTable;
use datafusion::error::DataFusionError;
use datafusion::execution::TaskContext;
use datafusion::execution::context::SQLOptions;
use datafusion::logical_expr::LogicalPlan;
use datafusion::physical_plan::execution_plan::reset_plan_states;
use datafusion::physical_plan::stream::RecordBatchStreamAdapter;
use datafusion::physical_plan::streaming::PartitionStream;
use datafusion::physical_plan::{ExecutionPlan, SendableRecordBatchStream, collect, displayable};
use datafusion::prelude::{SessionConfig, SessionContext};

use super::batch::{self, Aligner, PART, ROW};
use super::carry::{self, Class};
use super::direct::Direct;
use super::{DataError, depth, error, functions, parts, pool};

/// Every execution leaves its metrics in the plan; a fresh copy is made before they add up.
const RUNS_PER_COPY: u32 = 256;

/// A planned query.
pub struct Query {
    class: Class,
    /// The table whose rows, with their `_row`, the output's rows are; none where they are new ones.
    rows_of: Option<String>,
    /// A row may become several, which `_part` tells apart.
    multiplies: bool,
    tables: Vec<Arc<Table>>,
    /// What the engine's plan gives, in plain types.
    result: SchemaRef,
    /// `result`, with the columns that are added after it.
    schema: SchemaRef,
    logical: LogicalPlan,
    physical: Arc<dyn ExecutionPlan>,
    /// The physical plan where it is row-wise and simple enough.
    direct: Option<Direct>,
    /// Of the last input and the last result: batches of one stage share their schema.
    aligner: Aligner,
    made_aligner: Aligner,
    task: Arc<TaskContext>,
    runs: u32,
}

impl Query {
    /// Plans `sql` over tables of the given names (a stage with one input calls it `input`).
    ///
    /// Errors name the unknown column and those there are, a name given twice, or a column whose
    /// name is the engine's.
    pub async fn plan(sql: &str, inputs: &[(&str, SchemaRef)]) -> Result<Self, DataError> {
        let session = session();
        let mut tables = Vec::with_capacity(inputs.len());
        for (name, schema) in inputs {
            let table =
                Arc::new(Table { name: (*name).into(), schema: batch::plain_schema(schema), rows: Mutex::default() });
            let partitions: Vec<Arc<dyn PartitionStream>> = vec![table.clone()];
            let provider = StreamingTable::try_new(table.schema.clone(), partitions).map_err(|e| fault(&e, inputs))?;
            session.register_table(quoted(name), Arc::new(provider)).map_err(|e| fault(&e, inputs))?;
            tables.push(table);
        }
        let written = logical_plan(&session, sql).await.map_err(|e| fault(&e, inputs))?;
        if let Some(name) = carry::reserved_column(&written) {
            return Err(DataError::user(format!(
                "column `{name}`: names that begin with _ are the engine's; choose another"
            )));
        }
        Self::finish(&session, &written, tables).await.map_err(|e| match e {
            PlanError::Engine(e) => fault(&e, inputs),
            PlanError::Data(e) => e,
        })
    }

    async fn finish(
        session: &SessionContext,
        written: &LogicalPlan,
        tables: Vec<Arc<Table>>,
    ) -> Result<Self, PlanError> {
        let class = carry::classify(written)?;
        let logical = without_doubles(carry::break_ties(&carry::carry(written)?)?)?;
        let result = batch::plain_schema(logical.schema().as_arrow());
        let has_rows = result.field_with_name(ROW).is_ok_and(|f| *f.data_type() == DataType::UInt64);
        let rows_of = if has_rows { carry::rows_of(&logical) } else { None };
        // Numbers of rows that are made anew may be missing in an outer join.
        let result = if rows_of.is_none() { nullable(&result) } else { result };
        if class.row_wise && rows_of.is_none() {
            return Err(DataError::user("the input has no column `_row` of type u64").into());
        }
        let multiplies = rows_of.is_some() && carry::multiplies(&logical)?;
        let schema = match &rows_of {
            Some(_) if multiplies => batch::schema_with(&result, PART, DataType::UInt32),
            Some(_) => result.clone(),
            None => batch::schema_with(&result, ROW, DataType::UInt64),
        };
        let state = session.state();
        let logical = state.optimize(&logical)?;
        let physical = state.query_planner().create_physical_plan(&logical, &state).await?;
        let direct = if class.row_wise { Direct::of(&physical) } else { None };
        let (task, aligner, made_aligner) = (state.task_ctx(), Aligner::default(), Aligner::default());
        Ok(Self {
            class,
            rows_of,
            multiplies,
            tables,
            result,
            schema,
            logical,
            physical,
            direct,
            aligner,
            made_aligner,
            task,
            runs: 0,
        })
    }

    /// True where batches can go through one by one with [`Query::apply`].
    pub fn row_wise(&self) -> bool {
        self.class.row_wise
    }

    /// True where a row may become several.
    pub fn unnests(&self) -> bool {
        self.class.unnests
    }

    /// True where two runs may give different rows (`random()`, `now()`).
    pub fn volatile(&self) -> bool {
        self.class.volatile
    }

    /// The table whose rows the output's rows are; none where [`Query::collect`] numbers them anew.
    pub fn rows_of(&self) -> Option<&str> {
        self.rows_of.as_deref()
    }

    pub fn schema(&self) -> &SchemaRef {
        &self.schema
    }

    /// Both plans, for `check --explain`.
    pub fn explain(&self) -> String {
        let physical = displayable(self.physical.as_ref()).indent(false);
        format!("{}\n{}", self.logical.display_indent(), physical).trim_end().to_owned()
    }

    /// Rows of one batch through a row-wise query.
    ///
    /// `batch` has the columns the query was planned for. Errors where a value can't be computed
    /// (a failed cast), or where the query isn't row-wise.
    pub async fn apply(&mut self, batch: &RecordBatch) -> Result<RecordBatch, DataError> {
        let [table] = self.tables.as_slice() else {
            return Err(DataError::user("a query over several tables can't run batch by batch"));
        };
        let batch = self.aligner.align(batch, &table.schema)?;
        let made = if let Some(direct) = &self.direct {
            let made = direct.apply(&batch).map_err(|e| DataError::from_datafusion(&e, &[]))?;
            self.made_aligner.align(&made, &self.result)?
        } else {
            table.put(vec![batch]);
            match self.execute().await?.as_slice() {
                [one] => batch::align(one, &self.result)?,
                several => batch::concat(&self.result, &self.aligned(several)?)?,
            }
        };
        if self.multiplies { parts::within(&made) } else { Ok(made) }
    }

    /// Runs the query over complete inputs, by table name. A table that isn't given is empty.
    ///
    /// Inputs are put in the order of their keys first, so the result doesn't depend on when rows
    /// arrived. Rows that keep their `_row` come in the order of ORDER BY, or else of their keys;
    /// new rows are numbered in that order, or else after sorting by all columns.
    pub async fn collect(&mut self, inputs: Vec<(&str, Vec<RecordBatch>)>) -> Result<Vec<RecordBatch>, DataError> {
        for (name, batches) in inputs {
            let table = self
                .tables
                .iter()
                .find(|t| t.name == name)
                .ok_or_else(|| DataError::user(format!("the query has no table `{name}`")))?;
            let aligned = batches.iter().map(|b| batch::align(b, &table.schema)).collect::<Result<Vec<_>, _>>()?;
            let whole = batch::concat(&table.schema, &aligned)?;
            table.put(vec![batch::sort_by(&whole, &batch::key_indices(&table.schema))?]);
        }
        let made = self.execute().await?;
        let made = batch::concat(&self.result, &self.aligned(&made)?)?;
        let (keys, all) = (batch::key_indices(&self.result), 0..made.num_columns());
        let ordered = match (self.class.ordered, &self.rows_of) {
            (true, _) => made,
            // Of rows with equal keys, a join gives any one first.
            (false, Some(_)) if self.multiplies => {
                batch::sort_by(&made, &keys.into_iter().chain(all).collect::<Vec<_>>())?
            }
            (false, Some(_)) => batch::sort_by(&made, &keys)?,
            (false, None) => batch::sort_by(&made, &all.collect::<Vec<_>>())?,
        };
        Ok(vec![match &self.rows_of {
            Some(_) if self.multiplies => parts::among(&ordered)?,
            Some(_) => ordered,
            None => {
                let rows = UInt64Array::from_iter_values(0..ordered.num_rows() as u64);
                batch::with_column(&ordered, ROW, Arc::new(rows))?
            }
        }])
    }

    async fn execute(&mut self) -> Result<Vec<RecordBatch>, DataError> {
        if !self.class.row_wise || self.runs >= RUNS_PER_COPY {
            self.physical =
                reset_plan_states(self.physical.clone()).map_err(|e| DataError::from_datafusion(&e, &[]))?;
            self.runs = 0;
        }
        self.runs += 1;
        let made = pool::run(collect(self.physical.clone(), self.task.clone())).await?;
        for table in &self.tables {
            table.put(Vec::new());
        }
        made.map_err(|e| DataError::from_datafusion(&e, &[]))
    }

    fn aligned(&self, batches: &[RecordBatch]) -> Result<Vec<RecordBatch>, DataError> {
        batches.iter().map(|b| batch::align(b, &self.result)).collect()
    }
}

/// The schema with columns that may all be null.
fn nullable(schema: &Schema) -> SchemaRef {
    Arc::new(Schema::new(schema.fields().iter().map(|f| f.as_ref().clone().with_nullable(true)).collect::<Vec<_>>()))
}

/// A session for rows that are numbered: one partition, so their order holds; names as they are
/// written; strings as `Utf8`; the functions that DataFusion lacks.
pub fn session() -> SessionContext {
    let mut config = SessionConfig::new().with_target_partitions(1).with_information_schema(false);
    let options = config.options_mut();
    options.sql_parser.enable_ident_normalization = false;
    options.sql_parser.map_string_types_to_utf8view = false;
    options.execution.parquet.schema_force_view_types = false;
    let session = SessionContext::new_with_config(config);
    session.register_udf(functions::regexp_escape());
    session
}

/// The plan of one SELECT; anything that would change something is refused.
pub async fn logical_plan(session: &SessionContext, sql: &str) -> datafusion::error::Result<LogicalPlan> {
    if let Some(fault) = depth::fault(sql) {
        return Err(DataFusionError::Plan(fault));
    }
    let reading = SQLOptions::new().with_allow_ddl(false).with_allow_dml(false).with_allow_statements(false);
    let plan = session.state().create_logical_plan(sql).await?;
    reading.verify_plan(&plan)?;
    Ok(plan)
}

/// `name` as one part of a table reference, whatever letters it has.
pub fn quoted(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

/// A table whose rows are swapped in before each run.
#[derive(Debug)]
struct Table {
    name: String,
    schema: SchemaRef,
    rows: Mutex<Vec<RecordBatch>>,
}

impl Table {
    fn put(&self, batches: Vec<RecordBatch>) {
        *self.rows.lock().unwrap_or_else(PoisonError::into_inner) = batches;
    }
}

impl PartitionStream for Table {
    fn schema(&self) -> &SchemaRef {
        &self.schema
    }

    fn execute(&self, _: Arc<TaskContext>) -> SendableRecordBatchStream {
        let rows = self.rows.lock().unwrap_or_else(PoisonError::into_inner).clone();
        Box::pin(RecordBatchStreamAdapter::new(self.schema.clone(), futures::stream::iter(rows.into_iter().map(Ok))))
    }
}

enum PlanError {
    Engine(DataFusionError),
    Data(DataError),
}

impl From<DataFusionError> for PlanError {
    fn from(e: DataFusionError) -> Self {
        Self::Engine(e)
    }
}

impl From<DataError> for PlanError {
    fn from(e: DataError) -> Self {
        Self::Data(e)
    }
}

fn fault(e: &DataFusionError, inputs: &[(&str, SchemaRef)]) -> DataError {
    let columns: Vec<String> = inputs.iter().flat_map(|(_, s)| batch::visible(s)).collect();
    if let DataFusionError::Plan(message) = e.find_root()
        && let Some(table) = message.strip_prefix("table '").and_then(|m| m.strip_suffix("' not found"))
    {
        let name = table.rsplit('.').next().unwrap_or(table);
        let tables: Vec<String> = inputs.iter().map(|(n, _)| (*n).to_owned()).collect();
        return DataError::user(error::unknown("table", name, &tables));
    }
    DataError::from_datafusion(e, &columns)
}

/// `SELECT *` over a join has the engine's columns of both sides: those of the first stay. Two
/// columns of the user's with one name are an error.
fn without_doubles(plan: LogicalPlan) -> Result<LogicalPlan, PlanError> {
    let columns = plan.schema().columns();
    let mut kept: Vec<&datafusion::common::Column> = Vec::with_capacity(columns.len());
    for column in &columns {
        match kept.iter().any(|k| k.name == column.name) {
            false => kept.push(column),
            true if column.name.starts_with('_') => {}
            true => {
                let message = format!("two columns are called `{}`; rename one with AS", column.name);
                return Err(DataError::user(message).into());
            }
        }
    }
    if kept.len() == columns.len() {
        return Ok(plan);
    }
    let exprs: Vec<_> = kept.into_iter().cloned().map(datafusion::logical_expr::Expr::Column).collect();
    Ok(datafusion::logical_expr::LogicalPlanBuilder::from(plan).project(exprs)?.build()?)
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use datafusion::arrow::array::{
        ArrayRef, AsArray, Float64Array, ListBuilder, StringArray, StringBuilder, UInt32Array, UInt32Builder,
    };
    use datafusion::arrow::datatypes::{Field, Schema};

    use super::*;

    /// Judged rows: `_row`, `_pair`, prompt, chosen, rejected, their ids, verdict, score, tags.
    fn judged(rows: std::ops::Range<u64>) -> RecordBatch {
        let n = rows.clone().count();
        let text = |name: &str| -> ArrayRef {
            Arc::new(StringArray::from_iter_values(rows.clone().map(|r| format!("{name} {r}"))))
        };
        let ids = || -> ArrayRef {
            let mut b = ListBuilder::new(UInt32Builder::new());
            rows.clone().for_each(|r| b.append_value([Some(r as u32)]));
            Arc::new(b.finish())
        };
        let mut tags = ListBuilder::new(StringBuilder::new());
        rows.clone().for_each(|r| tags.append_value((0..r % 3).map(|t| Some(format!("{r}.{t}")))));
        let verdict = StringArray::from_iter_values(rows.clone().map(|r| if r % 2 == 0 { "a" } else { "tie" }));
        let columns: Vec<(&str, ArrayRef)> = vec![
            ("_row", Arc::new(UInt64Array::from_iter_values(rows.clone()))),
            ("_pair", Arc::new(UInt32Array::from(vec![0; n]))),
            ("prompt", text("prompt")),
            ("chosen", text("chosen")),
            ("rejected", text("rejected")),
            ("chosen_ids", ids()),
            ("rejected_ids", ids()),
            ("chosen_finish_reason", text("stop")),
            ("verdict", Arc::new(verdict)),
            ("score", Arc::new(Float64Array::from_iter_values(rows.clone().map(|r| r as f64 / 2.0)))),
            ("tags", Arc::new(tags.finish())),
        ];
        let fields: Vec<Field> = columns.iter().map(|(n, c)| Field::new(*n, c.data_type().clone(), true)).collect();
        RecordBatch::try_new(Arc::new(Schema::new(fields)), columns.into_iter().map(|(_, c)| c).collect()).unwrap()
    }

    async fn plan(sql: &str) -> Result<Query, DataError> {
        Query::plan(sql, &[("input", judged(0..1).schema())]).await
    }

    fn names(query: &Query) -> Vec<&str> {
        query.schema().fields().iter().map(|f| f.name().as_str()).collect()
    }

    fn rows(batch: &RecordBatch) -> Vec<u64> {
        batch::row_numbers(batch).unwrap().values().to_vec()
    }

    #[tokio::test]
    async fn queries_are_told_apart() {
        let table = [
            ("SELECT prompt FROM input", true),
            ("SELECT upper(prompt) AS p FROM input WHERE score > 1", true),
            ("SELECT prompt FROM (SELECT * FROM input) WHERE verdict <> 'tie'", true),
            ("WITH t AS (SELECT prompt FROM input) SELECT * FROM t", true),
            ("SELECT prompt, unnest(tags) AS tag FROM input", true),
            ("SELECT CASE WHEN score > 1 THEN chosen ELSE rejected END AS best FROM input", true),
            ("SELECT prompt, uuid() AS id FROM input", false),
            ("SELECT prompt, now() AS t FROM input", false),
            ("SELECT prompt FROM input ORDER BY score", false),
            ("SELECT prompt FROM input LIMIT 3", false),
            ("SELECT DISTINCT verdict FROM input", false),
            ("SELECT count(*) AS n FROM input", false),
            ("SELECT verdict, avg(score) AS s FROM input GROUP BY verdict", false),
            ("SELECT prompt, row_number() OVER (ORDER BY score) AS n FROM input", false),
            ("SELECT a.prompt FROM input a JOIN input b ON a._row = b._row", false),
            ("SELECT prompt FROM input WHERE score > (SELECT avg(score) FROM input)", false),
            ("SELECT prompt FROM input UNION ALL SELECT prompt FROM input", false),
        ];
        for (sql, row_wise) in table {
            assert_eq!(plan(sql).await.unwrap_or_else(|e| panic!("{sql}: {e}")).row_wise(), row_wise, "{sql}");
        }
        assert!(plan("SELECT now() AS t FROM input").await.unwrap().volatile());
    }

    #[tokio::test]
    async fn step_by_step_and_as_a_stream_a_query_gives_the_same() {
        for (sql, simple) in [
            ("SELECT prompt FROM input", true),
            ("SELECT upper(prompt) AS p, score * 2 AS s FROM input WHERE score > 1 AND verdict <> 'tie'", true),
            ("SELECT * FROM input WHERE nullif(score, 1.5) > 1", true),
            ("SELECT prompt FROM (SELECT * FROM input WHERE score < 3) WHERE verdict <> 'tie'", true),
            ("SELECT CASE WHEN score > 1 THEN chosen ELSE rejected END AS best FROM input WHERE false", false),
            ("SELECT prompt, unnest(tags) AS tag FROM input", false),
        ] {
            let mut query = plan(sql).await.unwrap();
            assert_eq!(query.direct.is_some(), simple, "{sql}\n{}", query.explain());
            let mut stream = plan(sql).await.unwrap();
            stream.direct = None;
            for rows in [0..9, 3..4, 0..1, 0..0] {
                let batch = judged(rows);
                assert_eq!(query.apply(&batch).await.unwrap(), stream.apply(&batch).await.unwrap(), "{sql}");
            }
        }
    }

    #[tokio::test]
    async fn keys_and_ids_come_along() {
        let table: [(&str, &[&str]); 8] = [
            ("SELECT prompt FROM input", &["prompt", "_row", "_pair"]),
            (
                "SELECT prompt, chosen, rejected FROM input WHERE verdict <> 'tie'",
                &[
                    "prompt",
                    "chosen",
                    "rejected",
                    "_row",
                    "_pair",
                    "chosen_ids",
                    "chosen_finish_reason",
                    "rejected_ids",
                ],
            ),
            (
                "SELECT trim(chosen) AS chosen, rejected FROM input",
                &["chosen", "rejected", "_row", "_pair", "rejected_ids"],
            ),
            ("SELECT rejected AS chosen, chosen AS rejected FROM input", &["chosen", "rejected", "_row", "_pair"]),
            ("SELECT chosen FROM (SELECT upper(chosen) AS chosen FROM input) t", &["chosen", "_row", "_pair"]),
            (
                "SELECT t.chosen FROM (SELECT chosen FROM input) t",
                &["chosen", "_row", "_pair", "chosen_ids", "chosen_finish_reason"],
            ),
            ("SELECT prompt, unnest(tags) AS tag FROM input", &["prompt", "tag", "_row", "_pair", "_part"]),
            (
                "SELECT _row, chosen_ids, chosen FROM input",
                &["_row", "chosen_ids", "chosen", "_pair", "chosen_finish_reason"],
            ),
        ];
        for (sql, expected) in table {
            assert_eq!(names(&plan(sql).await.unwrap()), expected, "{sql}");
        }
    }

    #[tokio::test]
    async fn a_row_wise_query_gives_the_rows_of_each_batch() {
        let mut query = plan("SELECT prompt, chosen FROM input WHERE verdict <> 'tie'").await.unwrap();
        for start in 0..600u64 {
            let made = query.apply(&judged(start..start + 2)).await.unwrap();
            assert_eq!(rows(&made), [start + start % 2]);
            assert_eq!(made.schema_ref(), query.schema());
        }
        assert_eq!(query.apply(&judged(1..2)).await.unwrap().num_rows(), 0);
        assert_eq!(query.apply(&judged(0..0)).await.unwrap().num_rows(), 0);
    }

    #[tokio::test]
    async fn unnest_numbers_its_parts() {
        let mut query = plan("SELECT unnest(tags) AS tag FROM input").await.unwrap();
        let made = query.apply(&judged(0..6)).await.unwrap();
        assert_eq!(rows(&made), [1, 2, 2, 4, 5, 5]);
        let parts = made.column_by_name("_part").unwrap().as_primitive::<datafusion::arrow::datatypes::UInt32Type>();
        assert_eq!(parts.values(), &[0, 0, 1, 0, 0, 1]);
        let sql = "SELECT unnest(string_to_array(tag, '.')) AS t FROM input";
        let mut again = Query::plan(sql, &[("input", query.schema().clone())]).await.unwrap();
        let made = again.apply(&made).await.unwrap();
        assert_eq!(rows(&made), [1, 1, 2, 2, 2, 2, 4, 4, 5, 5, 5, 5]);
        let parts = made.column_by_name("_part").unwrap().as_primitive::<datafusion::arrow::datatypes::UInt32Type>();
        let of_second = 1 << 16;
        let of_both = [0, 1, of_second, of_second + 1];
        assert_eq!(parts.values(), &[&[0, 1][..], &of_both, &[0, 1], &of_both].concat());
    }

    #[tokio::test]
    async fn collected_rows_keep_their_numbers_or_get_new_ones() {
        let shuffled = || vec![judged(4..6), judged(0..2), judged(2..4)];
        for (sql, expected) in [
            ("SELECT prompt FROM input LIMIT 3", vec![0, 1, 2]),
            ("SELECT prompt FROM input ORDER BY score DESC LIMIT 2", vec![5, 4]),
            ("SELECT DISTINCT verdict FROM input", vec![0, 1]),
            ("SELECT verdict, avg(score) AS s FROM input GROUP BY verdict", vec![0, 1]),
            (
                "SELECT a.prompt, b.score FROM input a JOIN input b ON a._row = b._row WHERE a.verdict = 'tie'",
                vec![1, 3, 5],
            ),
            ("SELECT verdict, prompt FROM input ORDER BY verdict DESC", vec![1, 3, 5, 0, 2, 4]),
        ] {
            let mut query = plan(sql).await.unwrap();
            for _ in 0..2 {
                let made = query.collect(vec![("input", shuffled())]).await.unwrap();
                assert_eq!(rows(&made[0]), expected, "{sql}");
                assert_eq!(made[0].schema_ref(), query.schema(), "{sql}");
            }
        }
        assert!(plan("SELECT verdict, avg(score) AS s FROM input GROUP BY verdict").await.unwrap().rows_of().is_none());
        let mut sums = plan("SELECT verdict, avg(score) AS s FROM input GROUP BY verdict").await.unwrap();
        let made = sums.collect(vec![("input", shuffled())]).await.unwrap();
        assert_eq!(made[0].column(0).as_string::<i32>().iter().flatten().collect::<Vec<_>>(), ["a", "tie"]);
    }

    #[tokio::test]
    async fn several_inputs_are_tables_of_their_names() {
        let schema = judged(0..1).schema();
        let sql = "SELECT * FROM strict s JOIN lenient l USING (prompt)";
        let doubled = Query::plan(sql, &[("strict", schema.clone()), ("lenient", schema.clone())]).await.err().unwrap();
        assert_eq!(doubled.message, "two columns are called `chosen`; rename one with AS");
        let sql = "SELECT s.prompt, s.chosen, l.score AS other FROM strict s JOIN lenient l ON s.prompt = l.prompt";
        let mut query = Query::plan(sql, &[("strict", schema.clone()), ("lenient", schema)]).await.unwrap();
        assert_eq!(
            names(&query),
            ["prompt", "chosen", "other", "_row", "_pair", "chosen_ids", "chosen_finish_reason", "_part"]
        );
        let made = query.collect(vec![("strict", vec![judged(0..4)]), ("lenient", vec![judged(2..6)])]).await.unwrap();
        assert_eq!(rows(&made[0]), [2, 3]);
    }

    #[tokio::test]
    async fn rows_are_those_of_the_table_whose_numbers_come_out() {
        let judged = judged(0..4);
        let stats = judged.project(&[0, 8]).unwrap();
        let of = async |sql: &str| {
            let tables = [("stats", stats.schema()), ("judge", judged.schema())];
            Query::plan(sql, &tables).await.unwrap_or_else(|e| panic!("{sql}: {e}")).rows_of().map(str::to_owned)
        };
        for (sql, table) in [
            (
                "SELECT judge.prompt, stats.verdict FROM judge JOIN stats ON judge.verdict = stats.verdict",
                Some("judge"),
            ),
            (
                "SELECT judge.prompt, stats.verdict FROM stats JOIN judge ON judge.verdict = stats.verdict",
                Some("stats"),
            ),
            ("SELECT j.prompt FROM judge j LEFT JOIN stats s USING (verdict)", Some("judge")),
            ("SELECT j.prompt FROM stats s RIGHT JOIN judge j USING (verdict)", None),
            ("SELECT j.prompt FROM stats s FULL JOIN judge j USING (verdict)", None),
            ("SELECT prompt FROM judge CROSS JOIN (SELECT count(*) AS n FROM stats)", Some("judge")),
            ("SELECT t.prompt, n FROM (SELECT count(*) AS n FROM stats) CROSS JOIN judge t", Some("judge")),
            (
                "WITH best AS (SELECT * FROM judge WHERE score > 1) SELECT b.prompt FROM best b JOIN stats s USING (verdict)",
                Some("judge"),
            ),
            ("SELECT prompt FROM judge WHERE verdict IN (SELECT verdict FROM stats)", Some("judge")),
            ("SELECT DISTINCT verdict FROM judge", Some("judge")),
            ("SELECT prompt, row_number() OVER (ORDER BY score) AS n FROM judge LIMIT 2", Some("judge")),
            ("SELECT verdict FROM judge UNION ALL SELECT verdict FROM stats", None),
            ("SELECT _row, verdict FROM judge UNION ALL SELECT _row, verdict FROM stats", None),
            ("WITH m AS (SELECT max(_row) AS _row FROM judge GROUP BY verdict) SELECT * FROM m", None),
        ] {
            assert_eq!(of(sql).await.as_deref(), table, "{sql}");
        }
    }

    #[tokio::test]
    async fn rows_of_outer_joins_are_numbered_anew() {
        let (a, b) = (judged(0..2), judged(1..4));
        for (join, rows) in [("RIGHT", 3), ("FULL", 4)] {
            let sql = format!("SELECT a.prompt AS p, b.score AS s FROM a {join} JOIN b ON a.score = b.score");
            let mut query = Query::plan(&sql, &[("a", a.schema()), ("b", b.schema())]).await.unwrap();
            let made = query.collect(vec![("a", vec![a.clone()]), ("b", vec![b.clone()])]).await.unwrap();
            let numbers: Vec<u64> = batch::row_numbers(&made[0]).unwrap().values().to_vec();
            assert_eq!(numbers, (0..rows).collect::<Vec<_>>(), "{join}");
            assert_eq!(made[0].column_by_name("p").unwrap().null_count(), 2, "{join}");
            assert_eq!(made[0].schema(), *query.schema(), "{join}");
        }
    }

    #[tokio::test]
    async fn rows_that_a_join_multiplies_are_parts() {
        let judged = judged(0..3);
        let twice = batch::concat(&judged.schema(), &[judged.clone(), judged.clone()]).unwrap();
        let sql = "SELECT j.prompt, o.score FROM judge j JOIN other o ON j.score <= o.score";
        let mut query = Query::plan(sql, &[("judge", judged.schema()), ("other", twice.schema())]).await.unwrap();
        let made = query.collect(vec![("judge", vec![judged]), ("other", vec![twice])]).await.unwrap().remove(0);
        let parts = made.column_by_name("_part").unwrap().as_primitive::<datafusion::arrow::datatypes::UInt32Type>();
        assert_eq!(rows(&made), [0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2]);
        assert_eq!(parts.values().to_vec(), [0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 0, 1]);
        assert_eq!(names(&query).last(), Some(&"_part"));
    }

    #[tokio::test]
    async fn mistakes_are_one_sentence() {
        for (sql, expected) in [
            ("SELECT promt FROM input", "there is no column `promt`; did you mean `prompt`? There are: prompt, chosen"),
            ("SELECT prompt FROM inputs", "there is no table `inputs`; did you mean `input`? There are: input"),
            ("SELECT prompt AS _id FROM input", "column `_id`: names that begin with _ are the engine's"),
            (
                "SELECT prompt, chosen AS prompt FROM input",
                "`prompt` could be any of several columns; rename one with AS",
            ),
            ("SELECT prompt FORM input", ""),
            ("DROP TABLE input", ""),
            ("SELECT nosuch(prompt) FROM input", ""),
        ] {
            let message = plan(sql).await.err().unwrap_or_else(|| panic!("{sql} passed")).message;
            assert!(message.contains(expected) && !message.contains('\n') && !message.is_empty(), "{sql}: {message}");
        }
    }

    #[tokio::test]
    async fn one_row_batches_are_cheap() {
        for sql in [
            "SELECT prompt, chosen, rejected FROM input WHERE verdict <> 'tie'",
            "SELECT prompt, unnest(tags) AS t FROM input",
        ] {
            let mut query = plan(sql).await.unwrap();
            let batch = judged(2..3);
            let start = Instant::now();
            for _ in 0..2000 {
                query.apply(&batch).await.unwrap();
            }
            println!("{:.1} us a one-row batch: {sql}", start.elapsed().as_secs_f64() * 1e6 / 2000.0);
        }
    }
}
