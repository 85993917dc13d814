//! `flowrun doctor`: whether a device computes what it should.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::{DoctorArgs, Failure};
use flowrun::flow::ModelSpec;
use flowrun::llm::{LlmError, Models, Role, doctor};
use flowrun::observe::{Metrics, Trace};

pub async fn doctor(args: DoctorArgs) -> Result<(), Failure> {
    let spec = |dtype: &str| ModelSpec {
        dtype: dtype.to_owned(),
        weights: args.dummy.then(|| "dummy".to_owned()),
        ..ModelSpec::local(&args.model)
    };
    let specs = BTreeMap::from(doctor::MODELS.map(|dtype| (dtype.to_owned(), spec(dtype))));
    let base = std::env::current_dir().unwrap_or_default();
    let models = Models::new(specs, base, Arc::new(Trace::default()), Metrics::default());
    let device = models.place(&args.device, Role::Sampler);
    let report = doctor::examine(&models, &device).await.map_err(|e: LlmError| Failure::Wrong(e.to_string()))?;
    if args.json {
        println!("{}", serde_json::to_string(&report).unwrap_or_default());
    } else {
        print(&report);
    }
    let failed = report.findings.iter().filter(|f| !f.passes).count();
    match failed {
        0 => Ok(()),
        n => Err(Failure::Failed(format!("{device} differs from the CPU in {n} of {}", report.findings.len()))),
    }
}

fn print(report: &doctor::Report) {
    if let Some(memory) = report.memory {
        let gib = |bytes: u64| bytes as f64 / f64::from(1 << 30);
        println!("{}: {:.1} GiB, {:.1} free", report.device, gib(memory.total), gib(memory.free));
    }
    let width = report.findings.iter().map(|f| f.name.len()).max().unwrap_or(0);
    println!("      {:width$}      mean   largest     bound", "compared with the CPU in float32");
    for f in &report.findings {
        let verdict = if f.passes { "ok" } else { "FAIL" };
        println!("{verdict:5} {:width$}  {:8.1e}  {:8.1e}  {:8.1e}", f.name, f.mean, f.largest, f.bound);
    }
}
