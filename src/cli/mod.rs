//! The verbs of the command line. stdout is for results; progress, logs and errors go to stderr.
//!
//! Exit codes: 0 done, 1 failed, 2 the flow or the arguments are wrong, 130 interrupted and resumable.

mod bench;
mod bench_train;
mod check;
mod doctor;
mod doctor_train;
mod export;
mod generate;
mod inspect;
mod keys;
mod log;
mod out;
mod plan;
mod report;
mod run;
mod runs;
mod screen;
mod top;
mod watch;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};

use flowrun::flow::FlowError;
use flowrun::llm::doctor::Part;

use log::LogFormat;
use screen::Screen;

/// Run self-improvement loops for language models: sample, judge, train, repeat.
#[derive(Parser)]
#[command(name = "flowrun", version, args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
struct Cli {
    #[command(subcommand)]
    verb: Option<Verb>,
    #[command(flatten)]
    run: RunArgs,
    /// How progress and log lines are written to stderr
    #[arg(long, global = true, value_enum, value_name = "FORMAT", default_value = "text")]
    log_format: LogFormat,
}

#[derive(Subcommand)]
enum Verb {
    /// Run a flow, or go on with it where it stopped (the default verb)
    Run(RunArgs),
    /// Validate a flow and print its plan, rows, token ceiling and memory; nothing is loaded
    Check(CheckArgs),
    /// List the runs below a directory: status, rounds, time, size
    Runs(RunsArgs),
    /// Look at a run of another process, as it goes on
    Top(TopArgs),
    /// Write the report of a run, or one page that compares several
    Report(ReportArgs),
    /// Delete what runs have superseded, and leftovers of writes that were cut short
    Gc(GcArgs),
    /// Answer a prompt with the base model and with each round's adapter, side by side
    Generate(GenerateArgs),
    /// Write an adapter, or base and adapter as one model, for other programs
    Export(ExportArgs),
    /// What a model is, and the memory that it needs; its weights are not loaded
    Inspect(InspectArgs),
    /// Measure how fast a model decodes, scores or trains on this machine
    Bench(BenchArgs),
    /// Compare what a device computes with the CPU in float32; fails where it differs
    Doctor(DoctorArgs),
}

/// A flow and what is changed of it on the command line.
#[derive(Args)]
struct FlowArgs {
    /// Flow file; several are overlaid from left to right
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
    /// Set a key of the flow, for example stages.sample.candidates=4 (TOML; may be repeated)
    #[arg(long = "set", value_name = "KEY=VALUE")]
    sets: Vec<String>,
    /// Run every stage on this device: cpu, cpu:N or cuda:N
    #[arg(long, value_name = "DEVICE")]
    device: Option<String>,
    /// Try the flow out: N prompts, one short round, in a directory of its own
    #[arg(long = "try", value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    trial: Option<u32>,
}

#[derive(Args)]
struct RunArgs {
    #[command(flatten)]
    flow: FlowArgs,
    /// Run directory [default: runs/NAME]
    #[arg(long, value_name = "DIR")]
    output: Option<PathBuf>,
    /// Start anew; what the run directory holds moves to its superseded/
    #[arg(long)]
    fresh: bool,
    /// Go on although an edit of the flow makes finished work be computed again
    #[arg(long)]
    recompute: bool,
    /// Ask again for rows that were given up, and say first what that recomputes
    #[arg(long)]
    retry_dead: bool,
    /// Begin a new run directory with what RUN has done of the same plan; RUN stays as it is
    #[arg(long, value_name = "RUN", conflicts_with = "fresh")]
    resume_from: Option<PathBuf>,
    /// Serve Prometheus metrics and the run's status at this address, for example 127.0.0.1:9464
    #[arg(long, value_name = "ADDRESS")]
    metrics_addr: Option<SocketAddr>,
}

#[derive(Args)]
struct CheckArgs {
    #[command(flatten)]
    flow: FlowArgs,
    /// Tell what a run of the flow would reuse of this run directory, and what it would compute again
    #[arg(long, value_name = "RUN")]
    diff: Option<PathBuf>,
    /// With --diff: one JSON object a line
    #[arg(long, requires = "diff")]
    json: bool,
}

#[derive(Args)]
struct RunsArgs {
    #[arg(default_value = "runs", value_name = "DIR")]
    dir: PathBuf,
    /// One JSON object a line
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
struct TopArgs {
    /// Run directory, or address of a run that was given --metrics-addr [default: the run under way in runs/]
    #[arg(value_name = "RUN|ADDRESS")]
    run: Option<String>,
    /// One JSON object, now, on stdout
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
struct ReportArgs {
    #[arg(required = true, value_name = "RUN")]
    runs: Vec<PathBuf>,
    /// Where to write it [default: RUN/report.html; compare.html here for several runs]
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Show it in the browser
    #[arg(long)]
    open: bool,
}

#[derive(Args)]
struct GcArgs {
    #[arg(required = true, value_name = "RUN")]
    runs: Vec<PathBuf>,
    /// Only tell what would be deleted
    #[arg(long)]
    dry_run: bool,
}

#[derive(Args)]
struct GenerateArgs {
    /// Run directory
    run: PathBuf,
    prompt: String,
    #[arg(long, default_value_t = 64)]
    max_new_tokens: usize,
    /// 0 takes the likeliest token at every step
    #[arg(long, default_value_t = 0.0)]
    temperature: f64,
    #[arg(long, value_name = "DEVICE", default_value = "auto")]
    device: String,
}

#[derive(Args)]
struct ExportArgs {
    /// Run directory, or PEFT directory of an adapter
    #[arg(value_name = "SOURCE")]
    source: PathBuf,
    /// New directory, or file with --format gguf
    #[arg(long, value_name = "PATH")]
    out: PathBuf,
    /// Merge the adapter into its base and write the whole model
    #[arg(long)]
    merge: bool,
    #[arg(long, default_value = "safetensors", value_parser = ["safetensors", "gguf"])]
    format: String,
    /// How the merged weights are stored
    #[arg(long, default_value = "bf16", value_parser = ["bf16", "f16", "f32"])]
    dtype: String,
    /// Base of the adapter, in place of the one it names
    #[arg(long, value_name = "MODEL")]
    model: Option<String>,
    /// Round of the run [default: the last]
    #[arg(long, value_name = "N")]
    round: Option<u32>,
}

#[derive(Args)]
struct InspectArgs {
    /// Model source, as in a flow: builtin:smollm2-135m, FILE.gguf, a directory or hf://owner/name
    #[arg(value_name = "MODEL")]
    model: String,
    /// A config.json is enough: no weights and no tokenizer are looked for
    #[arg(long)]
    dummy: bool,
    /// One JSON object in place of a table
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
struct BenchArgs {
    /// What to measure
    #[arg(value_parser = ["generate", "score", "train"])]
    what: String,
    /// Model source, as in a flow
    #[arg(long, default_value = "builtin:smollm2-135m")]
    model: String,
    #[arg(long, default_value = "bf16")]
    dtype: String,
    /// Random weights: the model is a directory with a config.json, and needs no more
    #[arg(long)]
    dummy: bool,
    #[arg(long, value_name = "DEVICE", default_value = "auto")]
    device: String,
    /// Sequences decoded at once, requests scored, or pairs trained
    #[arg(long, default_value_t = 32)]
    concurrency: usize,
    /// Tokens decoded a sequence; tokens of each of two answers scored or trained
    #[arg(long, default_value_t = 48)]
    new_tokens: usize,
    #[arg(long, default_value_t = 32)]
    prompt_tokens: usize,
    /// Tokens that are trained in one pass [default: 1024, and 8192 on a GPU]
    #[arg(long, value_name = "TOKENS")]
    micro_batch_tokens: Option<usize>,
    /// PEFT directory to generate under; prompts take turns at several
    #[arg(long, value_name = "DIR")]
    adapter: Vec<PathBuf>,
    /// Intra-op threads of a CPU device [default: all cores]
    #[arg(long)]
    threads: Option<usize>,
    /// Decode without CUDA graphs
    #[arg(long)]
    eager: bool,
    /// One JSON object in place of a table
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
struct DoctorArgs {
    #[arg(long, value_name = "DEVICE", default_value = "auto")]
    device: String,
    /// Model source, as in a flow
    #[arg(long, default_value = "builtin:smollm2-135m")]
    model: String,
    /// Random weights: the model is a directory with a config.json, and needs no more
    #[arg(long)]
    dummy: bool,
    /// Compare these parts alone: libraries, kernels, flash, graphs, sampling, adapters, scoring, decoding, training
    #[arg(long, value_name = "PART", value_delimiter = ',', num_args = 1..)]
    only: Vec<Part>,
    /// One JSON object in place of a table
    #[arg(long)]
    json: bool,
}

/// Why a verb did not end well.
enum Failure {
    /// Exit code 2.
    Wrong(String),
    /// Exit code 1.
    Failed(String),
    /// Exit code 130.
    Interrupted(String),
}

impl From<FlowError> for Failure {
    fn from(error: FlowError) -> Self {
        Self::Wrong(error.to_string())
    }
}

/// The whole program; its exit code.
/// Bytes of a thread's stack: expressions of queries are evaluated by recursion.
const STACK: usize = 8 << 20;

pub fn main() -> ExitCode {
    let cli = Cli::parse();
    let (format, screen) = (cli.log_format, Screen::new(cli.log_format));
    // Before any other tensor call: libtorch asks for CUDA once.
    flowrun::torch::init();
    let runtime = match tokio::runtime::Builder::new_multi_thread().thread_stack_size(STACK).enable_all().build() {
        Ok(runtime) => runtime,
        Err(e) => return report(Failure::Failed(format!("the async runtime can't start: {e}")), format),
    };
    let result = runtime.block_on(async {
        let log = log::begin(&screen);
        let result = verb(cli, &screen).await;
        log.end().await;
        result
    });
    // Device threads end with their handles; a download that hangs must not hold the exit.
    runtime.shutdown_timeout(std::time::Duration::from_secs(5));
    result.map_or_else(|failure| report(failure, format), |()| ExitCode::SUCCESS)
}

async fn verb(cli: Cli, screen: &Screen) -> Result<(), Failure> {
    match cli.verb {
        None => run::run(cli.run, screen).await,
        Some(Verb::Run(args)) => run::run(args, screen).await,
        Some(Verb::Check(args)) => check::check(args).await,
        Some(Verb::Runs(args)) => runs::runs(&args),
        Some(Verb::Gc(args)) => runs::gc(&args),
        Some(Verb::Top(args)) => top::top(args, screen).await,
        Some(Verb::Report(args)) => report::report(args),
        Some(Verb::Generate(args)) => generate::generate(args).await,
        Some(Verb::Export(args)) => export::export(args).await,
        Some(Verb::Inspect(args)) => inspect::inspect(args).await,
        Some(Verb::Bench(args)) => bench::bench(args).await,
        Some(Verb::Doctor(args)) => doctor::doctor(args).await,
    }
}

fn report(failure: Failure, format: LogFormat) -> ExitCode {
    let (code, message) = match failure {
        Failure::Wrong(message) => (2, message),
        Failure::Failed(message) => (1, message),
        Failure::Interrupted(message) => (130, message),
    };
    match (format, code) {
        // Past the filter: whatever is logged, why the program ends is told.
        (LogFormat::Json, _) => out::complain(&log::last_line(code, &message)),
        (LogFormat::Text, 130) => out::complain(&message),
        (LogFormat::Text, _) => out::complain(&format!("error: {message}")),
    }
    ExitCode::from(code)
}
