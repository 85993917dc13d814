//! The model server alone: three prompts at once, and how likely a model finds an answer.
//!
//! `cargo run --example generate -- builtin:smollm2-135m "Why is the sky blue?" "Count to five."`

use std::collections::BTreeMap;
use std::error::Error;
use std::sync::Arc;

use flowrun::flow::ModelSpec;
use flowrun::llm::{Company, GenerateRequest, Models, Role, Sampling, ScoreRequest, Stream, stream_key};
use flowrun::model::ChatMessage;
use flowrun::observe::{Metrics, Trace};

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    // Before any other tensor call: libtorch asks for CUDA once.
    flowrun::torch::init();
    let mut arguments = std::env::args().skip(1);
    let source = arguments.next().unwrap_or_else(|| "builtin:smollm2-135m".into());
    let prompts: Vec<String> = arguments.collect();
    let spec: ModelSpec = serde_json::from_value(serde_json::json!({ "source": source }))?;
    let specs = BTreeMap::from([("policy".to_owned(), spec)]);
    let models = Models::new(specs, ".".into(), Arc::<Trace>::default(), Metrics::default());
    let client = models.client("policy", &models.place("auto", Role::Sampler)).await?;
    let text = client.text().clone();

    // Requests that are awaited together are decoded together.
    let requests = prompts.iter().zip(0..).map(|(prompt, row)| -> Result<_, Box<dyn Error>> {
        let request = GenerateRequest {
            prompt: text.encode_chat(&[ChatMessage::new("user", prompt.as_str())])?,
            // Names the random numbers: the same stream gives the same answer in any company.
            streams: vec![Stream { key: stream_key(0, "example", 1), row, index: 0 }],
            sampling: Sampling::greedy(48),
            stop: text.stop_ids().to_vec(),
            stop_strings: None,
            alone: false,
            adapter: None,
            stage: "example".into(),
        };
        Ok(client.generate(request))
    });
    let answers = futures::future::try_join_all(requests.collect::<Result<Vec<_>, _>>()?).await?;
    for (prompt, answer) in prompts.iter().zip(answers) {
        let candidate = &answer.candidates[0];
        println!("> {prompt}\n{}\n", text.decode(&candidate.ids)?.trim());
        let scored = ScoreRequest {
            prompt: text.encode_chat(&[ChatMessage::new("user", prompt.as_str())])?,
            answers: vec![candidate.ids.clone()],
            adapter: None,
            company: Company::Indifferent,
            stage: "example".into(),
        };
        let logprobs = &client.score(scored).await?.logprobs[0];
        println!("  log-probability {:.2} over {} tokens\n", logprobs.iter().sum::<f32>(), logprobs.len());
    }
    Ok(())
}
