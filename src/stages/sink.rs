//! `sink`: the complete input as one file.

use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use datafusion::arrow::datatypes::{DataType, Schema};
use datafusion::arrow::record_batch::RecordBatch;
use futures::future::BoxFuture;
use serde::Deserialize;

use crate::data::table::{self, TableFormat};
use crate::data::{DataError, batch};
use crate::engine::written::{self, ROUND};
use crate::engine::{Runnable, Stage, StageContext, StageError, names};
use crate::flow::kind::{Access, InputKey, ONE_INPUT};
use crate::flow::{CheckContext, FlowError, Form, StageKind, StagePlan, StageSpec};

pub struct SinkKind;

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

    /// 2: rows in JSON lines have all columns, also those that are null.
    fn results(&self) -> u32 {
        2
    }

    fn inputs(&self) -> &'static [InputKey] {
        ONE_INPUT
    }

    fn opens(&self, stage: &StageSpec) -> Vec<(&'static str, Access)> {
        let written = stage.options.get("path").and_then(toml::Value::as_str);
        written.map(|path| ("path", Access::Write(path.into()))).into_iter().collect()
    }

    fn check<'a>(&'a self, cx: CheckContext<'a>) -> BoxFuture<'a, Result<StagePlan, FlowError>> {
        Box::pin(async move { check(&cx) })
    }
}

fn check(cx: &CheckContext<'_>) -> Result<StagePlan, FlowError> {
    let options: Options = cx.options()?;
    refuse_own(cx, &options.path)?;
    let format = TableFormat::of(Path::new(&options.path)).map_err(|e| cx.error("path", e.message))?;
    let schema = cx.inputs.first().and_then(|input| input.schema.as_ref());
    if let Some((column, why)) = schema.and_then(|schema| table::unwritable(format, schema)) {
        let message = format!("column `{column}` can't be written to {}: {why}", options.path);
        return Err(cx.error("input", message).help("leave the column out in a mapper before this stage"));
    }
    if let Some(open) = options.path.replace(ROUND, "").find(['{', '}']) {
        let message = format!("has a brace at character {}; only {ROUND} stands in braces", open + 1);
        return Err(cx.error("path", message).help(format!("write {ROUND} for the number of the round")));
    }
    refuse_written_twice(cx, &options.path)?;
    Ok(StagePlan {
        outputs: Vec::new(),
        waits_for_round: true,
        new_rows: false,
        models: Vec::new(),
        trains: None,
        fingerprint: Form::Unset,
        notes: vec!["waits for the round".to_owned()],
        options: Arc::new(options.path),
    })
}

/// Refuses a file that the run itself writes in its directory.
fn refuse_own(cx: &CheckContext<'_>, path: &str) -> Result<(), FlowError> {
    let taken = rounds(cx, cx.stage).into_iter().find_map(|round| names::own_of(&in_round(path, round)));
    match taken {
        None => Ok(()),
        Some(name) => Err(cx
            .error("path", format!("`{name}` in the run directory is the run's own"))
            .help("give the file or its folder another name")),
    }
}

fn rounds(cx: &CheckContext<'_>, stage: &StageSpec) -> Vec<u32> {
    (1..=cx.flow.rounds).filter(|round| stage.runs_in(*round)).collect()
}

/// Every file is written once: by one sink, in one round.
fn refuse_written_twice(cx: &CheckContext<'_>, path: &str) -> Result<(), FlowError> {
    let own = rounds(cx, cx.stage);
    if own.len() > 1 && !path.contains(ROUND) {
        let (stem, extension) = path.rsplit_once('.').unwrap_or((path, ""));
        return Err(cx
            .error(
                "path",
                format!("{path} would be written {} times, and each round would replace the last", own.len()),
            )
            .help(format!(
                "write path = \"{stem}-{ROUND}.{extension}\", or say with `in_rounds` which round it is of"
            )));
    }
    let before = cx.flow.stages.iter().take_while(|stage| stage.name != cx.stage.name);
    for other in before.filter(|stage| stage.kind == cx.stage.kind) {
        let Some(theirs) = other.options.get("path").and_then(toml::Value::as_str) else { continue };
        let files = |path: &str, rounds: &[u32]| rounds.iter().map(|round| in_round(path, *round)).collect::<Vec<_>>();
        let written = files(theirs, &rounds(cx, other));
        if let Some(file) = files(path, &own).iter().find(|file| written.contains(file)) {
            let message = format!("{} is written by `{}` too", file.display(), other.name);
            return Err(cx.error("path", message).help("give each sink a file of its own"));
        }
    }
    Ok(())
}

/// The file of a round, without detours.
fn in_round(path: &str, round: u32) -> PathBuf {
    let mut plain = PathBuf::new();
    for part in Path::new(&path.replace(ROUND, &round.to_string())).components() {
        match part {
            Component::CurDir => {}
            Component::ParentDir if matches!(plain.components().next_back(), Some(Component::Normal(_))) => {
                plain.pop();
            }
            part => plain.push(part),
        }
    }
    plain
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
    // The stage's own directory is RUN/round-R/STAGE.
    let run = ctx.dir.ancestors().nth(2).unwrap_or(&ctx.dir);
    let path = written::placed(path, run, ctx.round);
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

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::flow::Flow;

    fn refused(rounds: u32, sinks: &[(&str, &str, Option<&[u32]>)]) -> Option<String> {
        let stage = |(name, path, in_rounds): &(&str, &str, Option<&[u32]>)| StageSpec {
            name: (*name).into(),
            kind: "sink".into(),
            inputs: Vec::new(),
            in_rounds: in_rounds.map(<[u32]>::to_vec),
            table: true,
            options: toml::toml! { path = (*path) },
        };
        let stages: Vec<StageSpec> = sinks.iter().map(stage).collect();
        let flow = Flow { rounds, stages: stages.clone(), ..Flow::default() };
        let check = |stage| check(&CheckContext { flow: &flow, stage, inputs: &[], trainers: &BTreeMap::new() }).err();
        stages.iter().find_map(check).map(|error| error.to_string())
    }

    #[test]
    fn every_file_is_written_once() {
        assert_eq!(refused(1, &[("a", "a.jsonl", None), ("b", "b.jsonl", None)]), None);
        assert_eq!(refused(3, &[("a", "a-{round}.jsonl", None), ("b", "a.jsonl", Some(&[2]))]), None);
        assert_eq!(refused(3, &[("a", "a.jsonl", Some(&[1])), ("b", "a-{round}.jsonl", None)]), None);
        let error = refused(2, &[("a", "out/a.jsonl", None)]).unwrap();
        assert!(error.contains("written 2 times") && error.contains("path = \"out/a-{round}.jsonl\""), "{error}");
        for (rounds, a, b, in_rounds) in [
            (1, "a.jsonl", "./a.jsonl", None),
            (1, "x/../a.jsonl", "a.jsonl", None),
            (3, "a-{round}.jsonl", "a-{round}.jsonl", None),
            (3, "a-{round}.jsonl", "a-2.jsonl", Some(&[3][..])),
        ] {
            let error = refused(rounds, &[("first", a, None), ("b", b, in_rounds)]).unwrap();
            assert!(error.contains("stages.b.path") && error.contains("is written by `first` too"), "{error}");
        }
    }

    #[test]
    fn names_of_the_run_are_its_own() {
        for path in [
            "summary.json",
            "metrics.jsonl",
            "./dead_letters.parquet",
            "x/../metrics.jsonl",
            "round-1/x.jsonl",
            "round-{round}/x.jsonl",
            "superseded/x.jsonl",
            "tensorboard/x.parquet",
            "lock",
            "begun",
            "flow.toml",
            "plan.json",
        ] {
            let error = refused(2, &[("a", path, Some(&[2]))]).unwrap();
            assert!(error.contains("stages.a.path") && error.contains("is the run's own"), "{path}: {error}");
        }
        for path in ["rounds.jsonl", "round-x/1.jsonl", "summary.jsonl", "out/metrics.jsonl", "/srv/metrics.jsonl"] {
            assert_eq!(refused(2, &[("a", path, Some(&[2]))]), None, "{path}");
        }
    }
}
