//! The model card of an adapter or a model: where it comes from and what it was measured at.

use std::fmt::Write;

use serde_json::Value;

use super::{Outcome, Stats};

/// What a card says beside the outcome.
#[derive(Debug, Clone, Default)]
pub struct About {
    /// The base as the flow names it.
    pub base: String,
    pub flow: String,
    pub stage: String,
    pub round: u32,
    /// Content of the adapter that training went on from.
    pub start: Option<String>,
    /// The trainer's keys.
    pub keys: Value,
}

/// `README.md` of an adapter's or a model's directory, in the hub's format.
pub fn card(about: &About, outcome: &Outcome) -> String {
    let whole = about.keys["lora"] == false;
    let (kind, fresh) = match whole {
        true => ("library_name: transformers\ntags:\n", "the base"),
        false => ("library_name: peft\ntags:\n- lora\n", "a fresh adapter"),
    };
    let mut text = format!(
        "---\nbase_model: {}\n{kind}- flowrun\n---\n\n# {}, round {}\n\n",
        Value::from(about.base.as_str()),
        about.flow,
        about.round
    );
    let start = about.start.as_deref().map_or(fresh.to_owned(), |hash| format!("adapter `{hash}`"));
    let mut line = |what: &str, value: &dyn std::fmt::Display| {
        // Writing to a string can't fail.
        let _ = writeln!(text, "| {what} | {value} |");
    };
    line("", &"");
    line("---", &"---");
    line("stage", &about.stage);
    line("started from", &start);
    line("pairs", &outcome.pairs);
    line("validation pairs", &outcome.validation_pairs);
    line("optimizer steps", &format!("{}, {} of them skipped", outcome.steps, outcome.skipped));
    for (when, stats) in
        [("first step", outcome.first), ("last step", outcome.last), ("validation", outcome.evaluation)]
    {
        match stats {
            // Without a rejected answer there is no margin.
            Some(Stats { loss, .. }) if about.keys["algorithm"] == "sft" => line(when, &format!("loss {loss:.4}")),
            Some(Stats { loss, margins, accuracies, .. }) => {
                line(when, &format!("loss {loss:.4}, margin {margins:.4}, accuracy {accuracies:.4}"));
            }
            None => {}
        }
    }
    line("content", &format!("`{}`", outcome.adapter));
    line("flowrun", &env!("CARGO_PKG_VERSION"));
    text += "\n## Settings\n\n| key | value |\n| --- | --- |\n";
    for (key, value) in about.keys.as_object().into_iter().flatten().filter(|(_, value)| !value.is_null()) {
        let _ = writeln!(text, "| {key} | `{value}` |");
    }
    text
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_card_says_base_settings_and_figures() {
        let stats = Stats { loss: 0.5, margins: 0.25, accuracies: 0.75, ..Stats::default() };
        let outcome = Outcome {
            steps: 7,
            skipped: 1,
            pairs: 50,
            validation_pairs: 6,
            first: None,
            last: None,
            stopped_early: false,
            evaluation: Some(stats),
            adapter: "abc".into(),
        };
        let keys = json!({ "learning_rate": 1e-3, "gamma": null });
        let about = About { base: "hf://o/n".into(), flow: "f".into(), round: 2, keys, ..About::default() };
        let text = card(&about, &outcome);
        assert!(text.starts_with("---\nbase_model: \"hf://o/n\"\nlibrary_name: peft\n"), "{text}");
        for said in
            ["# f, round 2", "a fresh adapter", "loss 0.5000, margin 0.2500", "| learning_rate | `0.001` |", "`abc`"]
        {
            assert!(text.contains(said), "{said}: {text}");
        }
        assert!(!text.contains("gamma") && !text.contains("first step"), "{text}");
    }
}
