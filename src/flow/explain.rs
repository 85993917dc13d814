//! The plan as `flowrun check` prints it.

use std::fmt::Write;

use datafusion::arrow::datatypes::{DataType, Schema};

use super::{AdapterChoice, Plan, PlannedStage, Port, RoundPlan};

impl Plan {
    /// The whole plan as text: models, then each round's stages in the order they start with inputs,
    /// model, device, adapter and the columns of every output. Rounds that look alike are shown once.
    pub fn explain(&self) -> String {
        let mut text = format!("flow {}: {}, seed {}\n", self.flow.name, rounds(self.flow.rounds), self.flow.seed);
        if !self.flow.models.is_empty() {
            text.push_str("\nmodels\n");
        }
        for (name, model) in &self.flow.models {
            push(&mut text, format_args!("  {name}: {model}"));
        }
        for (first, last, body) in self.alike() {
            let title = if first == last { format!("round {first}") } else { format!("rounds {first}-{last}") };
            push(&mut text, format_args!("\n{title}\n{}", body.trim_end()));
        }
        if !self.notes.is_empty() {
            text.push_str("\nnotes\n");
        }
        for note in &self.notes {
            push(&mut text, format_args!("  {note}"));
        }
        self.flow.masks.text(&text)
    }

    /// Runs of rounds with the same text: first, last, text.
    fn alike(&self) -> Vec<(u32, u32, String)> {
        let mut runs: Vec<(u32, u32, String)> = Vec::new();
        for round in &self.rounds {
            let body = self.explain_round(round);
            match runs.last_mut() {
                Some((_, last, same)) if *same == body => *last = round.round,
                _ => runs.push((round.round, round.round, body)),
            }
        }
        runs
    }

    fn explain_round(&self, round: &RoundPlan) -> String {
        let mut text = String::new();
        for stage in &round.stages {
            self.explain_stage(&mut text, round.round, stage);
        }
        text
    }

    fn explain_stage(&self, text: &mut String, round: u32, stage: &PlannedStage) {
        let inputs: Vec<String> = stage
            .inputs
            .iter()
            .map(|input| match input.round {
                read if read == round => input.input.from.to_string(),
                earlier => format!("{} of round {earlier}", input.input.from),
            })
            .collect();
        let from = if inputs.is_empty() { String::new() } else { format!(" <- {}", inputs.join(", ")) };
        let waits = if stage.plan.waits_for_round { "  (waits for the round)" } else { "" };
        push(text, format_args!("  {}: {}{from}{waits}", stage.spec.name, stage.spec.kind));
        if let Some(model) = &stage.plan.trains {
            push(text, format_args!("    trains {model}"));
        }
        for client in &stage.plan.models {
            let endpoint = self.flow.models.get(&client.model).and_then(|model| model.endpoint.as_ref());
            let on = match endpoint {
                Some(endpoint) => format!("at {}", endpoint.shown()),
                None => format!("on {}, {}", client.devices.join(", "), self.adapter(&client.adapter, round)),
            };
            push(text, format_args!("    model {} {on}", client.model));
        }
        for port in &stage.plan.outputs {
            push(text, format_args!("    {}", columns(&stage.spec.name, port)));
        }
        for note in &stage.plan.notes {
            push(text, format_args!("    {note}"));
        }
    }

    fn adapter(&self, choice: &AdapterChoice, round: u32) -> String {
        match choice {
            AdapterChoice::Base => "no adapter".into(),
            AdapterChoice::Previous { trainer } => {
                let trained =
                    self.rounds.iter().take_while(|plan| plan.round < round).any(|plan| plan.stage(trainer).is_some());
                match self.flow.stage(trainer).and_then(|stage| stage.options.get("init_adapter")) {
                    _ if trained => format!("adapter of `{trainer}` from the round before"),
                    Some(init) => format!("adapter {init}"),
                    None => "no adapter yet".into(),
                }
            }
            AdapterChoice::Earlier { trainer, rounds } if *rounds >= round => {
                format!("what `{trainer}` starts from: {rounds} rounds before is before the first")
            }
            AdapterChoice::Earlier { trainer, rounds } => {
                format!("adapter of `{trainer}` from round {}", round - rounds)
            }
            AdapterChoice::Current { trainer } => format!("adapter of `{trainer}` from this round (waits for it)"),
            AdapterChoice::Round { trainer, round } => format!("adapter of `{trainer}` from round {round}"),
        }
    }
}

fn push(text: &mut String, line: std::fmt::Arguments<'_>) {
    // Writing to a string can't fail.
    let _ = writeln!(text, "{line}");
}

fn rounds(count: u32) -> String {
    if count == 1 { "1 round".into() } else { format!("{count} rounds") }
}

fn columns(stage: &str, port: &Port) -> String {
    let label = if port.name.is_empty() { String::new() } else { format!(".{}", port.name) };
    match &port.schema {
        Some(schema) => format!("{stage}{label} -> {}", describe(schema)),
        None => format!("not checked: columns of {stage}{label}"),
    }
}

/// `_row u64, prompt string, ...`
fn describe(schema: &Schema) -> String {
    let fields: Vec<String> =
        schema.fields().iter().map(|field| format!("{} {}", field.name(), type_name(field.data_type()))).collect();
    fields.join(", ")
}

/// Short names for the types that flows are made of, Arrow's own for the rest.
fn type_name(data_type: &DataType) -> String {
    match data_type {
        DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View => "string".into(),
        DataType::Boolean => "bool".into(),
        DataType::UInt8 | DataType::UInt16 | DataType::UInt32 | DataType::UInt64 => {
            format!("{data_type}").replace("UInt", "u")
        }
        DataType::Int8 | DataType::Int16 | DataType::Int32 | DataType::Int64 => {
            format!("{data_type}").replace("Int", "i")
        }
        DataType::Float16 | DataType::Float32 | DataType::Float64 => format!("{data_type}").replace("Float", "f"),
        DataType::List(item) | DataType::LargeList(item) | DataType::ListView(item) => {
            format!("list<{}>", type_name(item.data_type()))
        }
        DataType::Struct(fields) => {
            let fields: Vec<String> =
                fields.iter().map(|field| format!("{} {}", field.name(), type_name(field.data_type()))).collect();
            format!("{{{}}}", fields.join(", "))
        }
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::Arc;

    use datafusion::arrow::datatypes::Field;

    use super::super::fake::{Kinds, SELF_REWARD};
    use super::super::{Flow, Plan};
    use super::*;

    #[test]
    fn rounds_that_look_alike_are_shown_once() {
        let flow = Flow::from_toml(SELF_REWARD, Path::new("."), &[], &Kinds).expect("valid");
        let plan = futures::executor::block_on(Plan::new(&flow, &Kinds)).expect("valid");
        let expected = "\
flow self-reward: 3 rounds, seed 7

models
  policy: hf://TinyLlama/TinyLlama-1.1B-Chat-v1.0 (bf16)

round 1
  prompts: source
    prompts -> _row u64, prompt string
  sample: sampler <- prompts
    model policy on auto, no adapter yet
    sample -> _row u64, prompt string, sample string
  judge: sampler <- sample
    model policy on cpu:1, no adapter yet
    judge -> _row u64, prompt string, sample string, judge string
  prefer: mapper <- judge
    prefer -> _row u64, prompt string, sample string, judge string
  halves: split <- prefer
    halves.train -> _row u64, prompt string, sample string, judge string
    halves.validation -> _row u64, prompt string, sample string, judge string
  align: trainer <- halves.train, halves.validation
    trains policy
    model policy on auto, no adapter

rounds 2-3
  prompts: source
    prompts -> _row u64, prompt string
  sample: sampler <- prompts
    model policy on auto, adapter of `align` from the round before
";
        assert!(plan.explain().starts_with(expected), "{}", plan.explain());
    }

    #[test]
    fn types() {
        let turn = DataType::Struct(vec![Field::new("role", DataType::Utf8, true)].into());
        assert_eq!(type_name(&DataType::List(Arc::new(Field::new_list_field(turn, true)))), "list<{role string}>");
        assert_eq!(type_name(&DataType::UInt32), "u32");
        assert_eq!(type_name(&DataType::Float64), "f64");
        assert_eq!(type_name(&DataType::Int16), "i16");
    }
}
