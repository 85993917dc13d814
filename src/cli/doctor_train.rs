//! `flowrun doctor`: a training step beside the CPU's.

use std::path::PathBuf;

use flowrun::llm::bench::prompt;
use flowrun::llm::doctor::{AS_GOOD, EXACT, MODELS, Part, Report, Scratch, apart};
use flowrun::llm::{Client, LlmError, Models};
use flowrun::model::Lora;
use flowrun::torch::Tenants;
use flowrun::train::{AdamW, Loss, Objective, Pair, Stats, Subject, TrainError, Trainer, pass_tokens};

const TENANT: &str = "doctor";

/// Tokens of the prompts that are trained on, and of each answer.
const LENGTHS: [(usize, usize); 4] = [(24, 9), (40, 17), (7, 33), (24, 2)];

/// The figures and the gradient of a step.
struct Gradient {
    stats: Stats,
    numbers: Vec<f32>,
}

/// Compares the log-probabilities, loss and gradient of four pairs under an adapter with the CPU's in float32.
///
/// # Errors
/// When a model can't be opened, or a device fails.
pub async fn compare(models: &Models, report: &mut Report) -> Result<(), LlmError> {
    let [wide, narrow] = MODELS;
    let reference = models.client(wide, "cpu:0").await?;
    let adapter = Scratch::new(&reference)?;
    let dir = adapter.dir().to_owned();
    let expected = gradient(&reference, dir.clone()).await?;
    let rounded = gradient(&models.client(narrow, "cpu:0").await?, dir.clone()).await?;
    for dtype in MODELS {
        let found = gradient(&models.client(dtype, &report.device).await?, dir.clone()).await?;
        for (name, figure) in [
            ("log-probs", log_probs as fn(&Gradient, &Gradient) -> (f64, f64)),
            ("loss", loss),
            ("gradient, relative", direction),
        ] {
            let bound = if dtype == wide { EXACT } else { AS_GOOD * figure(&rounded, &expected).0 + EXACT };
            report.add(Part::Training, format!("{name}, {dtype}"), figure(&found, &expected), bound);
        }
    }
    Ok(())
}

/// Per answer.
fn log_probs(found: &Gradient, expected: &Gradient) -> (f64, f64) {
    let both = |g: &Gradient| [g.stats.logps_chosen, g.stats.logps_rejected].map(|n| n as f32);
    apart(&both(found), &both(expected))
}

fn loss(found: &Gradient, expected: &Gradient) -> (f64, f64) {
    let off = (found.stats.loss - expected.stats.loss).abs();
    (off, off)
}

/// The difference's length as a share of the gradient's.
fn direction(found: &Gradient, expected: &Gradient) -> (f64, f64) {
    if found.numbers.len() != expected.numbers.len() {
        return (f64::NAN, f64::NAN);
    }
    let square = |n: f32| f64::from(n).powi(2);
    let off: f64 = found.numbers.iter().zip(&expected.numbers).map(|(a, b)| square(a - b)).sum();
    let share = (off / expected.numbers.iter().map(|n| square(*n)).sum::<f64>()).sqrt();
    (share, share)
}

async fn gradient(client: &Client, adapter: PathBuf) -> Result<Gradient, LlmError> {
    let pair = |(row, (before, answer)): (usize, (usize, usize))| Pair {
        row: row as u64,
        ordinal: row as u32,
        prompt: prompt(client, row, before),
        chosen: prompt(client, 3 * row + 1, answer),
        rejected: prompt(client, 3 * row + 2, answer + 3),
        // Of nobody: the loss is then not that of a first step, and its slopes differ from pair to pair.
        reference: [-10.0 * answer as f64, -10.1 * answer as f64],
        label: 1.0,
        weight: 1.0,
        offset: 0.0,
    };
    let micro_batches = vec![LENGTHS.into_iter().enumerate().map(pair).collect::<Vec<_>>()];
    let (model, config) = (client.transformer().await?, client.text().pretrained().config.clone());
    let work = move |tenants: &mut Tenants| -> Result<Gradient, TrainError> {
        let device = tenants.device();
        let lora = Lora::load(&adapter, &config, device)?;
        let terms = vec![(Loss::Sigmoid, 1.0)];
        let objective = Objective { terms, beta: 0.1, label_smoothing: 0.0, gamma: 0.0, ld_alpha: 1.0 };
        let optimizer = AdamW { weight_decay: 0.0, max_grad_norm: 1.0 };
        let mut trainer = Trainer::new(model, Subject::Adapter { lora, frozen: None }, objective, optimizer, false)?;
        trainer.accumulate(&micro_batches, pass_tokens(device))?;
        let part = trainer.take_part()?;
        let stats = part.stats().unwrap_or_default();
        Ok(Gradient { stats, numbers: part.gradient().to_vec() })
    };
    let made = client.device().quantum("train", TENANT, work).await?;
    made.map_err(|e| LlmError::Model(format!("a training step on {}: {e}", client.device().name())))
}
