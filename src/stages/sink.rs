//! `sink`: the complete input as one file.

use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use datafusion::arrow::datatypes::{DataType, Schema};
use datafusion::arrow::record_batch::RecordBatch;
use futures::future::BoxFuture;
use serde::Deserialize;

use crate::data::table::{self, TableFormat};
use crate::data::{DataError, batch};
use crate::engine::{Runnable, Stage, StageContext, StageError};
use crate::flow::kind::{Access, InputKey, ONE_INPUT};
use crate::flow::{CheckContext, FlowError, Form, StageKind, StagePlan};

pub struct SinkKind;

/// What stands for the number of the round in a path.
const ROUND: &str = "{round}";

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Options {
    /// `.parquet` or `.jsonl`; relative to the run directory.
    path: String,
}

impl StageKind for SinkKind {
    fn name(&self) -> &'static str {
        "sink"
    }

    fn inputs(&self) -> &'static [InputKey] {
        ONE_INPUT
    }

    fn opens(&self, stage: &crate::flow::StageSpec) -> Vec<(&'static str, Access)> {
        let written = stage.options.get("path").and_then(toml::Value::as_str).map(Path::new);
        let leaves =
            |path: &&Path| !path.components().all(|part| matches!(part, Component::Normal(_) | Component::CurDir));
        let out = written.filter(leaves).map(|path| ("path", Access::Write(path.to_string_lossy().into_owned())));
        out.into_iter().collect()
    }

    fn check<'a>(&'a self, cx: CheckContext<'a>) -> BoxFuture<'a, Result<StagePlan, FlowError>> {
        Box::pin(async move { check(&cx) })
    }
}

fn check(cx: &CheckContext<'_>) -> Result<StagePlan, FlowError> {
    let options: Options = cx.options()?;
    TableFormat::of(Path::new(&options.path)).map_err(|e| cx.error("path", e.message))?;
    let rounds = cx.stage.in_rounds.as_ref().map_or(cx.flow.rounds as usize, Vec::len);
    let mut notes = vec!["waits for the round".to_owned()];
    if rounds > 1 && !options.path.contains(ROUND) {
        notes.push(format!("each round replaces {}; {ROUND} in the path keeps them all", options.path));
    }
    Ok(StagePlan {
        outputs: Vec::new(),
        waits_for_round: true,
        new_rows: false,
        models: Vec::new(),
        trains: None,
        fingerprint: Form::Unset,
        notes,
        options: Arc::new(options.path),
    })
}

impl Runnable for SinkKind {
    fn open(&self, stage: &str, plan: &StagePlan) -> Result<Box<dyn Stage>, StageError> {
        let path = plan.options.clone().downcast::<String>();
        let path = path.map_err(|_| StageError::internal(format!("{stage}: opened with another kind's options")))?;
        Ok(Box::new(SinkStage { path }))
    }
}

struct SinkStage {
    path: Arc<String>,
}

impl Stage for SinkStage {
    fn run<'a>(&'a mut self, ctx: &'a mut StageContext) -> BoxFuture<'a, Result<(), StageError>> {
        Box::pin(run(&self.path, ctx))
    }
}

async fn run(path: &str, ctx: &mut StageContext) -> Result<(), StageError> {
    let mut batches = Vec::new();
    let input = ctx.input("input");
    while let Some(message) = input.recv().await? {
        batches.extend(message.batch.filter(|b| b.num_rows() > 0));
    }
    let schema = batches.first().map(RecordBatch::schema).or_else(|| input.schema.clone());
    let schema = schema.unwrap_or_else(|| batch::schema_with(&Schema::empty(), batch::ROW, DataType::UInt64));
    let path = placed(path, &ctx.dir, ctx.round);
    // Writing syncs to disk, which would hold up the other stages of this thread.
    let written = tokio::task::spawn_blocking(move || -> Result<(), DataError> {
        let aligned = batches.iter().map(|b| batch::align(b, &schema)).collect::<Result<Vec<_>, _>>()?;
        let whole = batch::concat(&schema, &aligned)?;
        let sorted = batch::sort_by(&whole, &batch::key_indices(&schema))?;
        table::write(&path, &schema, &[sorted])
    });
    written.await.map_err(|e| StageError::internal(e.to_string()))??;
    Ok(())
}

/// `stage_dir` is `RUN/round-R/STAGE`; a relative path starts at `RUN`.
fn placed(path: &str, stage_dir: &Path, round: u32) -> PathBuf {
    let run = stage_dir.ancestors().nth(2).unwrap_or(stage_dir);
    run.join(path.replace(ROUND, &round.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_start_at_the_run_directory() {
        let stage = Path::new("/runs/x/round-2/out");
        assert_eq!(placed("pairs-{round}.jsonl", stage, 2), Path::new("/runs/x/pairs-2.jsonl"));
        assert_eq!(placed("/tmp/all.parquet", stage, 2), Path::new("/tmp/all.parquet"));
    }
}
