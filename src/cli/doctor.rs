//! `flowrun doctor`: whether a device computes what it should.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::out::say;
use super::{DoctorArgs, Failure, doctor_train};
use flowrun::flow::{ModelSpec, OtherWeights};
use flowrun::llm::doctor::{self, Part, Report};
use flowrun::llm::{LlmError, Models, Role};
use flowrun::observe::{Metrics, Trace};

pub async fn doctor(args: DoctorArgs) -> Result<(), Failure> {
    let spec = |dtype: &str| ModelSpec {
        // The names are dtypes.
        dtype: dtype.parse().unwrap_or_default(),
        weights: args.dummy.then_some(OtherWeights::Dummy),
        ..ModelSpec::local(&args.model)
    };
    let specs = BTreeMap::from(doctor::MODELS.map(|dtype| (dtype.to_owned(), spec(dtype))));
    let base = std::env::current_dir().unwrap_or_default();
    let models = Models::new(specs, base, Arc::new(Trace::default()), Metrics::default());
    let device = models.place(&args.device, Role::Sampler);
    let parts = if args.only.is_empty() { Part::ALL.to_vec() } else { args.only };
    let report = examine(&models, &device, &parts).await.map_err(|e| Failure::Wrong(e.to_string()))?;
    if args.json {
        say!("{}", serde_json::to_string(&report).unwrap_or_default());
    } else {
        print(&report, &parts);
    }
    let failed = report.findings.iter().filter(|f| !f.passes).count();
    match failed {
        0 => Ok(()),
        n => Err(Failure::Failed(format!("{device} differs from the CPU in {n} of {}", report.findings.len()))),
    }
}

async fn examine(models: &Models, device: &str, parts: &[Part]) -> Result<Report, LlmError> {
    let mut report = doctor::examine(models, device, parts).await?;
    if parts.contains(&Part::Training) {
        doctor_train::compare(models, &mut report).await?;
    }
    Ok(report)
}

fn print(report: &Report, parts: &[Part]) {
    for (name, fact) in &report.facts {
        say!("{}: {name}: {fact}", report.device);
    }
    for (path, why) in &report.off {
        say!("{}: {path} is not used, libtorch's operations stand in: {why}", report.device);
    }
    let width = report.findings.iter().map(|f| f.name.len()).max().unwrap_or(0);
    say!("      {:10} {:width$}      mean   largest     bound", "part", "compared with the CPU in float32");
    for f in &report.findings {
        let verdict = if f.passes { "ok" } else { "FAIL" };
        say!("{verdict:5} {:10} {:width$}  {:8.1e}  {:8.1e}  {:8.1e}", f.part, f.name, f.mean, f.largest, f.bound);
    }
    let compared = |part: &&Part| report.findings.iter().any(|f| f.part == part.name());
    for part in parts.iter().filter(|part| **part != Part::Libraries && !compared(part)) {
        say!("-     {:10} nothing to compare on {}", part.name(), report.device);
    }
}
