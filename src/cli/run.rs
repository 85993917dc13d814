//! `flowrun FILE`: run a flow or go on with it.

use std::collections::BTreeSet;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::{Failure, FlowArgs, RunArgs};
use crate::engine::run::{Outcome, Run, RunConfig, RunError, RunHandle, Summary};
use crate::flow::plan::Plan;
use crate::flow::{Flow, FlowError};
use crate::llm::Models;
use crate::observe::{Progress, Prometheus, Trace};
use crate::stages::{self, Kinds};

/// A flow read, changed as the command line asks, and planned.
pub struct Planned {
    pub flow: Flow,
    pub plan: Plan,
    pub models: Arc<Models>,
    pub kinds: Kinds,
}

pub async fn plan(args: &FlowArgs, prometheus: &Prometheus, trace: Arc<Trace>) -> Result<Planned, Failure> {
    let names = stages::names();
    let mut flow = Flow::load(&args.files, &args.sets, &names)?;
    flow.device_override.clone_from(&args.device);
    if let Some(rows) = args.trial {
        flow.shorten(rows);
    }
    let models = Arc::new(Models::new(flow.models.clone(), flow.base.clone(), trace, prometheus.metrics()));
    let kinds = stages::registry(models.clone());
    let plan = Plan::new(&flow, &kinds).await?;
    Ok(Planned { flow, plan, models, kinds })
}
