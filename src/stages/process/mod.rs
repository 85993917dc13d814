//! `kind = "process"`: columns that a program of the user's computes, in any language.
//!
//! | file | noun |
//! |---|---|
//! | `wire` | rows on their way to the program and back: JSON lines or Arrow |
//! | `worker` | one process, with the rows that it has not answered |
//! | `workers` | the processes of a stage: which gets a row, and what becomes of one that was not answered |
//! | `environment` | what the program sees of ours |
//! | `group` | a process with all that it has started |

mod environment;
mod group;
mod wire;
mod worker;
mod workers;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use datafusion::arrow::array::ArrayRef;
use datafusion::arrow::datatypes::{Field, Schema, SchemaRef};
use datafusion::arrow::record_batch::RecordBatch;
use futures::future::{BoxFuture, try_join_all};
use serde::Deserialize;

use self::environment::Environment;
use self::wire::Cell;
pub use self::wire::{Column, Format};
use self::workers::Workers;
use super::client;
use super::rows::{RowError, each_row};
use crate::data::ColumnType;
use crate::engine::{Runnable, Stage, StageContext, StageError};
use crate::flow::kind::{Access, CheckContext, InputKey, ONE_INPUT, Port, StageKind, StagePlan};
use crate::flow::{Canonical, FlowError, Form, StageSpec};

/// Source rows in flight, counted from the oldest unfinished one: some for each process, so that none waits.
const WINDOW: usize = 16;
/// A longer timeout is a typing error.
const LONGEST_TIMEOUT: f64 = 86_400.0;
/// More processes than this are a typing error.
const MOST_WORKERS: usize = 1024;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Options {
    command: Vec<String>,
    #[serde(default)]
    format: Format,
    /// By name, in the order of the file.
    columns: toml::Table,
    #[serde(default = "minute")]
    timeout: f64,
    #[serde(default = "one")]
    workers: usize,
    #[serde(default)]
    files: Vec<String>,
    /// Variables that the program sees, and whose values decide its rows.
    #[serde(default)]
    env: Vec<String>,
    /// Variables that the program sees, and whose values decide nothing.
    #[serde(default)]
    secrets: Vec<String>,
    #[serde(default = "two")]
    retries: u32,
}

fn minute() -> f64 {
    60.0
}

fn one() -> usize {
    1
}

fn two() -> u32 {
    2
}

/// What is started, checked.
pub struct Checked {
    /// An absolute path.
    program: PathBuf,
    arguments: Vec<String>,
    /// The flow file's folder, which the program starts in.
    folder: PathBuf,
    environment: Environment,
    format: Format,
    columns: Vec<Column>,
    timeout: Duration,
    workers: usize,
    retries: u32,
}

/// The kind `process`.
pub struct ProcessKind;

impl StageKind for ProcessKind {
    fn name(&self) -> &'static str {
        "process"
    }

    fn inputs(&self) -> &'static [InputKey] {
        ONE_INPUT
    }

    fn opens(&self, stage: &StageSpec) -> Vec<(&'static str, Access)> {
        let texts = |key: &str| stage.options.get(key).and_then(toml::Value::as_array).into_iter().flatten();
        let text = |value: &toml::Value| value.as_str().map(str::to_owned);
        let command = texts("command").next().and_then(text).map(|program| ("command", Access::Command(program)));
        let arguments = texts("command").skip(1).filter_map(text).map(|word| ("command", Access::Argument(word)));
        let files = texts("files").filter_map(text).map(|file| ("files", Access::Read(file)));
        let variables =
            ["env", "secrets"].into_iter().flat_map(|key| texts(key).filter_map(text).map(move |v| (key, v)));
        let variables = variables.map(|(key, name)| (key, Access::Variable(name)));
        command.into_iter().chain(arguments).chain(files).chain(variables).collect()
    }

    fn check<'a>(&'a self, cx: CheckContext<'a>) -> BoxFuture<'a, Result<StagePlan, FlowError>> {
        Box::pin(async move { check(&cx) })
    }
}

impl Runnable for ProcessKind {
    fn open(&self, _stage: &str, plan: &StagePlan) -> Result<Box<dyn Stage>, StageError> {
        let checked = client::options::<Checked>(plan)?;
        Ok(Box::new(ProcessStage { checked, fingerprint: plan.fingerprint.clone() }))
    }
}

fn check(cx: &CheckContext<'_>) -> Result<StagePlan, FlowError> {
    let options: Options = cx.options()?;
    if !(options.timeout > 0.0 && options.timeout <= LONGEST_TIMEOUT) {
        return Err(cx.error("timeout", "is in seconds, above 0 and at most a day"));
    }
    if !(1..=MOST_WORKERS).contains(&options.workers) {
        return Err(cx.error("workers", format!("is the number of processes, from 1 to {MOST_WORKERS}")));
    }
    let columns = columns(cx, &options.columns)?;
    let base = absolute(&cx.flow.base);
    let Some((program, arguments)) = options.command.split_first() else {
        return Err(cx.error("command", "is empty").help("write command = [\"python3\", \"reward.py\"]"));
    };
    let program = program_path(cx, &base, program)?;
    let files = hashes(cx, &base, &program, &options)?;
    let environment = environment(cx, &options)?;
    let input = cx.inputs.first();
    let schema = input.and_then(|i| i.schema.as_ref()).map(|s| out_schema(cx, s, &columns)).transpose()?;
    Ok(StagePlan {
        outputs: vec![Port { name: String::new(), schema, rows: input.and_then(|i| i.rows) }],
        waits_for_round: false,
        new_rows: false,
        models: Vec::new(),
        trains: None,
        fingerprint: Form::table([
            ("command", options.command.form()),
            ("format", options.format.form()),
            ("columns", columns.form()),
            ("files", files.form()),
            ("env", environment.form(&options.env)),
        ]),
        notes: vec![format!("runs {}", options.command.join(" "))],
        options: Arc::new(Checked {
            program,
            arguments: arguments.to_vec(),
            folder: base,
            environment,
            format: options.format,
            columns,
            timeout: Duration::from_secs_f64(options.timeout),
            workers: options.workers,
            retries: options.retries,
        }),
    })
}

fn environment(cx: &CheckContext<'_>, options: &Options) -> Result<Environment, FlowError> {
    for (key, names) in [("env", &options.env), ("secrets", &options.secrets)] {
        if let Some(fault) = names.iter().find_map(|name| environment::fault(name)) {
            return Err(cx.error(key, fault).help(format!("write {key} = [\"NAME\"]")));
        }
    }
    if let Some(name) = options.secrets.iter().find(|name| options.env.contains(name)) {
        let message = format!("`{name}` is in `env` too, where its value decides rows");
        return Err(cx.error("secrets", message).help("take it out of one of them"));
    }
    if let Some(name) = options.secrets.iter().find(|name| std::env::var_os(name).is_none()) {
        return Err(cx.error("secrets", format!("the environment variable {name} is not set")));
    }
    Ok(Environment::read(&options.env, &options.secrets))
}

fn columns(cx: &CheckContext<'_>, written: &toml::Table) -> Result<Vec<Column>, FlowError> {
    if written.is_empty() {
        return Err(cx.error("columns", "is empty").help("name what the program adds: columns = { score = \"f64\" }"));
    }
    let column = |(name, value): (&String, &toml::Value)| {
        let key = format!("columns.{name}");
        if name.is_empty() || name.starts_with('_') || name == wire::ERROR {
            return Err(cx
                .error(&key, format!("`{name}` can't be the name of a column that a program adds"))
                .help("names that begin with `_` are the engine's, and `error` gives a row up"));
        }
        let kind = value.as_str().and_then(ColumnType::named);
        let kind = kind.ok_or_else(|| cx.error(&key, "is not a type").help("they are f64, i64, bool and string"))?;
        Ok(Column { name: name.clone(), kind })
    };
    written.iter().map(column).collect()
}

/// The file that is started: a path from the flow file's folder, or what `PATH` finds.
fn program_path(cx: &CheckContext<'_>, base: &Path, written: &str) -> Result<PathBuf, FlowError> {
    if written.is_empty() {
        return Err(cx.error("command", "names no program").help("write command = [\"python3\", \"reward.py\"]"));
    }
    if written.contains('/') {
        let path = base.join(written);
        if path.is_file() && !is_program(&path) {
            let message = format!("{} may not be run", path.display());
            let help =
                format!("run chmod +x {}, or name the interpreter first: [\"python3\", \"{written}\"]", path.display());
            return Err(cx.error("command", message).help(help));
        }
        return path.is_file().then_some(path.clone()).ok_or_else(|| {
            cx.error("command", format!("there is no file {}", path.display()))
                .help("a path starts at the flow file's folder; a name without `/` is searched for in PATH")
        });
    }
    let folders = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&folders).map(|folder| folder.join(written)).find(|path| is_program(path));
    found.map(|path| absolute(&path)).ok_or_else(|| {
        cx.error("command", format!("no folder of PATH has a program `{written}`"))
            .help("install it, or write its path with a `/`, from the flow file's folder")
    })
}

fn is_program(path: &Path) -> bool {
    path.is_file() && rustix::fs::access(path, rustix::fs::Access::EXEC_OK).is_ok()
}

/// The content of the program, of `files` and of everything in the command that is a file, by its name there.
fn hashes(
    cx: &CheckContext<'_>,
    base: &Path,
    program: &Path,
    options: &Options,
) -> Result<Vec<(String, String)>, FlowError> {
    let hashed = |key: &str, name: &String, path: &Path| {
        let hash = hash(path).map_err(|e| match e.kind() {
            std::io::ErrorKind::NotFound => cx
                .error(key, format!("there is no file {}", path.display()))
                .help("paths start at the flow file's folder"),
            _ => cx.error(key, format!("{} can't be read: {e}", path.display())),
        });
        hash.map(|hash| (name.clone(), hash))
    };
    let of = |key: &str, name: &String| hashed(key, name, &base.join(name));
    let own = options.command.iter().take(1).map(|name| hashed("command", name, program));
    let arguments = options.command.iter().skip(1).filter(|name| base.join(name).is_file());
    let arguments = arguments.map(|name| of("command", name));
    own.chain(arguments).chain(options.files.iter().map(|name| of("files", name))).collect()
}

fn hash(path: &Path) -> std::io::Result<String> {
    let mut hasher = blake3::Hasher::new();
    hasher.update_reader(std::fs::File::open(path)?)?;
    Ok(hasher.finalize().to_hex().to_string())
}

fn absolute(path: &Path) -> PathBuf {
    std::path::absolute(path).unwrap_or_else(|_| path.to_owned())
}

fn out_schema(cx: &CheckContext<'_>, input: &SchemaRef, columns: &[Column]) -> Result<SchemaRef, FlowError> {
    if let Some(taken) = columns.iter().find(|c| input.column_with_name(&c.name).is_some()) {
        return Err(cx
            .error(&format!("columns.{}", taken.name), format!("the input already has a column {:?}", taken.name))
            .help("give the new one another name, or leave the old one out in a mapper before this stage"));
    }
    Ok(with_columns(input, columns))
}

/// The program may say null for any of its columns.
fn with_columns(input: &SchemaRef, columns: &[Column]) -> SchemaRef {
    let mut fields: Vec<Field> = input.fields().iter().map(|f| f.as_ref().clone()).collect();
    fields.extend(columns.iter().map(|c| Field::new(&c.name, c.kind.data_type(), true)));
    Arc::new(Schema::new(fields))
}

struct ProcessStage {
    checked: Arc<Checked>,
    fingerprint: Form,
}

impl Stage for ProcessStage {
    fn run<'a>(&'a mut self, ctx: &'a mut StageContext) -> BoxFuture<'a, Result<(), StageError>> {
        Box::pin(async move {
            ctx.open_journal(&content_key(ctx, &self.fingerprint))?;
            let workers = Arc::new(Workers::new(self.checked.clone(), &ctx.stage));
            let columns = &self.checked.columns;
            let work = |_, rows: RecordBatch| {
                let workers = workers.clone();
                async move {
                    let asked = (0..rows.num_rows()).map(|i| workers.answer(rows.slice(i, 1)));
                    let cells = try_join_all(asked).await?;
                    Ok::<_, RowError>(Some(to_batch(&rows, columns, &cells)?))
                }
            };
            each_row(ctx, WINDOW * self.checked.workers, work, |_| ()).await?;
            workers.finish().await;
            Ok(())
        })
    }
}

/// A program draws from no stream of the engine's, so the seed is not its affair.
fn content_key(ctx: &StageContext, fingerprint: &Form) -> String {
    let parts = [("fingerprint", fingerprint.clone()), ("stage", ctx.stage.form()), ("round", ctx.round.form())];
    Form::table(parts).key()
}

/// The input's rows, each with the cells of its answer.
fn to_batch(rows: &RecordBatch, columns: &[Column], cells: &[Vec<Cell>]) -> Result<RecordBatch, StageError> {
    let column = |(index, column): (usize, &Column)| -> ArrayRef { column.kind.array(cells, index) };
    let added = columns.iter().enumerate().map(column);
    let all = rows.columns().iter().cloned().chain(added).collect();
    RecordBatch::try_new(with_columns(&rows.schema(), columns), all)
        .map_err(|e| StageError::internal(format!("answers of a program: {e}")))
}
