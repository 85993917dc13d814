//! `flowrun bench generate|score|train`: tokens a second on this machine.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use super::out::say;
use super::{BenchArgs, Failure, bench_train};
use flowrun::flow::{FlowError, ModelSpec, OtherWeights};
use flowrun::llm::{AdapterId, LlmError, Models, Role, bench as measure};
use flowrun::model::{ModelError, lora::content_hash};
use flowrun::observe::{Metrics, Trace};

pub async fn bench(args: BenchArgs) -> Result<(), Failure> {
    let weights = args.dummy.then_some(OtherWeights::Dummy);
    let dtype = args.dtype.parse().map_err(|e: FlowError| Failure::from(FlowError { key: "--dtype".into(), ..e }))?;
    let spec = ModelSpec { dtype, weights, ..ModelSpec::local(args.model) };
    let specs = BTreeMap::from([("model".to_owned(), spec)]);
    let base = std::env::current_dir().unwrap_or_default();
    let models = Models::new(specs, base, Arc::new(Trace::default()), Metrics::default());
    if let Some(threads) = args.threads {
        models.set_cpu_threads(threads);
    }
    let device = models.place(&args.device, Role::Sampler);
    let wrong = |e: LlmError| Failure::Wrong(e.to_string());
    let client = models.client("model", &device).await.map_err(wrong)?;
    if args.eager {
        client.use_graphs(false).await.map_err(wrong)?;
    }
    let id = |dir: PathBuf| Ok(AdapterId { hash: content_hash(&dir)?, dir });
    let adapters = args.adapter.into_iter().map(id).collect::<Result<Vec<_>, ModelError>>()?;
    let (concurrency, new, prompt) = (args.concurrency, args.new_tokens, args.prompt_tokens);
    if args.what == "train" {
        let report = bench_train::train(&client, concurrency, prompt, new, args.micro_batch_tokens).await?;
        print(&report, args.json, |r| {
            format!(
                "{} pairs of {} + 2 x {} tokens on {device}\n  {:>10.2} pairs/s, reference included ({:.1} s of {:.1} s)\n  \
                 {:>10.0} trained tokens/s, {:.0} % of the matrix rate ({:.0} GFLOP/s)\n  {:>10.2} GiB at most",
                r.pairs,
                r.prompt_tokens,
                r.answer_tokens,
                r.pairs_per_second,
                r.reference_seconds,
                r.reference_seconds + r.train_seconds,
                r.train_tokens_per_second,
                r.train_arithmetic_share * 100.0,
                r.ceilings.gigaflops,
                r.peak_rss_bytes as f64 / f64::from(1 << 30)
            )
        });
    } else if args.what == "score" {
        let report = measure::score(&client, concurrency, prompt, new).await.map_err(wrong)?;
        print(&report, args.json, |r| {
            format!(
                "{} prompts of {} tokens with two answers of {} on {device}\n  {:>10.1} requests/s\n  {:>10.0} tokens/s\n  \
                 {:>10.0} % of the matrix rate, {:.0} GFLOP/s",
                r.requests,
                r.prompt_tokens,
                r.answer_tokens,
                r.requests_per_second,
                r.tokens_per_second,
                r.arithmetic_share * 100.0,
                r.ceilings.gigaflops
            )
        });
    } else {
        let report = measure::generate(&client, concurrency, new, prompt, &adapters).await.map_err(wrong)?;
        print(&report, args.json, |r| {
            format!(
                "{} sequences of {} + {} tokens on {device}\n  {:>10.0} tokens/s, prefill counted\n  \
                 {:>10.0} prompt tokens/s in prefill, {:.0} % of the matrix rate\n  \
                 {:>10.1} ms a decode step (median; p90 {:.1}, p99 {:.1}), {:.0} tokens/s\n  \
                 {:>10.0} % of the bandwidth ({:.1} GB/s), {:.0} % of the matrix rate ({:.0} GFLOP/s) in it\n  \
                 {:>10.1} % of the time between steps",
                r.concurrency,
                r.prompt_tokens,
                r.new_tokens,
                r.tokens_per_second,
                r.prefill_tokens_per_second,
                r.prefill_arithmetic_share * 100.0,
                r.step_ms_p50,
                r.step_ms_p90,
                r.step_ms_p99,
                r.decode_tokens_per_second,
                r.decode_bandwidth_share * 100.0,
                r.ceilings.gigabytes_per_second,
                r.decode_arithmetic_share * 100.0,
                r.ceilings.gigaflops,
                r.between_steps_share * 100.0
            )
        });
    }
    Ok(())
}

fn print<R: serde::Serialize>(report: &R, json: bool, table: impl Fn(&R) -> String) {
    if json {
        say!("{}", serde_json::to_string(report).unwrap_or_default());
    } else {
        say!("{}", table(report));
    }
}
