//! `flowrun inspect MODEL`: what a model is and what it needs.

use super::out::say;
use super::{Failure, InspectArgs};
use flowrun::model::inspect::{Inspection, Memory};
use flowrun::model::{ModelOptions, Pretrained, Source};

pub async fn inspect(args: InspectArgs) -> Result<(), Failure> {
    let base = std::env::current_dir().unwrap_or_default();
    let open = move || {
        let dummy_weights = args.dummy.then_some(0);
        let options = ModelOptions { dummy_weights, ..ModelOptions::default() };
        Inspection::of(&Pretrained::open(&Source::parse(&args.model, &base)?, &options)?)
    };
    // A model of the hub may have to be downloaded.
    let opened = tokio::task::spawn_blocking(open).await.map_err(|e| Failure::Failed(e.to_string()))?;
    let found = opened.map_err(|e| Failure::Wrong(e.to_string()))?;
    if args.json {
        say!("{}", serde_json::to_string_pretty(&found).unwrap_or_default());
    } else {
        for (name, value) in rows(&found) {
            say!("{name:<18}{value}");
        }
    }
    Ok(())
}

fn rows(i: &Inspection) -> Vec<(&'static str, String)> {
    let m = &i.memory;
    let stored: Vec<_> = i.stored.iter().map(|(kind, count)| format!("{kind} ({count} tensors)")).collect();
    let special: Vec<_> = i.special_tokens.iter().map(|(name, text)| format!("{name} {text:?}")).collect();
    let window = i.sliding_window.map_or(String::new(), |n| format!(", sliding window {n}"));
    let template =
        i.chat_template_bytes.map_or("none: a base model, plain text alone".into(), |n| format!("{n} bytes"));
    let bos = match (i.bos_id, i.adds_bos) {
        (None, _) => "none".to_owned(),
        (Some(id), true) => format!("{id}, put before plain text"),
        (Some(id), false) => format!("{id}, not added to plain text"),
    };
    let mut rows = vec![
        ("model", i.source.clone()),
        ("architecture", i.architecture.clone()),
        (
            "parameters",
            format!("{:.1} million{}", i.parameters as f64 / 1e6, if i.tied_embeddings { ", tied head" } else { "" }),
        ),
        ("layers", format!("{} of {} hidden, {} intermediate", i.layers, i.hidden_size, i.intermediate_size)),
        ("heads", format!("{} query, {} key-value, {} wide", i.heads, i.kv_heads, i.head_dim)),
        ("vocabulary", i.vocab_size.to_string()),
        ("context", format!("{} tokens{window}", i.context)),
        ("stored", format!("{}, {}", size(i.file_bytes), stored.join(", "))),
        ("chat template", template),
        ("special tokens", special.join(", ")),
        ("begin of text", bos),
        ("end of turn", i.end_ids.iter().map(u32::to_string).collect::<Vec<_>>().join(", ")),
    ];
    rows.extend(memory(m));
    if let Some(revision) = &i.revision {
        rows.insert(1, ("revision", revision.clone()));
    }
    rows
}

fn memory(m: &Memory) -> [(&'static str, String); 3] {
    let lora = format!(
        "rank {} on all linear layers: {:.2} million weights, {} with gradient and AdamW",
        m.lora_rank,
        m.lora_parameters as f64 / 1e6,
        size(m.lora_training)
    );
    [
        ("weights", format!("{} in bf16, {} in f32", size(m.weights_bf16), size(m.weights_f32))),
        (
            "KV cache",
            format!(
                "{} a token in bf16, {} for {} tokens",
                size(m.kv_token_bf16),
                size(m.kv_sequence_bf16),
                m.kv_sequence_tokens
            ),
        ),
        ("LoRA", lora),
    ]
}

fn size(bytes: u64) -> String {
    indicatif::BinaryBytes(bytes).to_string()
}
