//! Notes of a check on prompts that are too long, and on tools that the chat template ignores.
//!
//! A prompt that exceeds a trainer's `max_length` is otherwise found when its pairs are tokenised, after its answers
//! were sampled and judged. If a sampler reads a source, the first prompts are tokenised at check.

use std::sync::Arc;

use datafusion::arrow::record_batch::RecordBatch;

use super::trainer::{self, Template};
use super::{answerer, chat, sampler, source, split};
use crate::flow::Plan;
use crate::flow::plan::{PlannedStage, RoundPlan};
use crate::llm::{Models, TextModel};

/// Number of a source's prompts that are tokenised, rounded up to whole batches.
const LOOKED_AT: usize = 1000;

/// The largest number of tokens that a prompt may have, and the reason.
struct Limit {
    tokens: usize,
    of: String,
}

/// Adds notes to the samplers and trainers of the first round.
pub async fn note(plan: &mut Plan, models: &Arc<Models>) {
    let Some(round) = plan.rounds.first() else { return };
    let mut found = Vec::new();
    for (place, stage) in round.stages.iter().enumerate() {
        // Errors are reported by the stage that needs the model or the rows.
        found.extend(of_trainer(round, stage, models).await.map(|note| (place, note)));
        found.extend(of_tools(stage, models).await.map(|note| (place, note)));
        found.extend(of_answers(stage, models).await.map(|note| (place, note)));
        found.extend(of_sampler(round, stage, models).await.map(|note| (place, note)));
    }
    for (place, note) in found {
        if let Some(stage) = plan.rounds.first_mut().and_then(|round| round.stages.get_mut(place)) {
            stage.plan.notes.push(note);
        }
    }
}

/// The note on whether the chat template reads the column `tools`; `None` without this column.
async fn of_tools(stage: &PlannedStage, models: &Models) -> Option<String> {
    let input = stage.inputs.first()?;
    input.input.schema.as_ref()?.column_with_name("tools")?;
    let from = &input.input.from.stage;
    sampler::prompting(&stage.plan)?;
    let text = local(stage, models).await?;
    Some(match text.pretrained().chat().ok()?.reads_tools() {
        true => format!("`tools` of `{from}` goes to the chat template"),
        false => format!("the chat template does not read the tools that `{from}` has"),
    })
}

/// A note if answers may be longer than the context.
async fn of_answers(stage: &PlannedStage, models: &Models) -> Option<String> {
    let most = sampler::max_new_tokens(&stage.plan)?;
    let text = local(stage, models).await?;
    let context = text.pretrained().config.max_position_embeddings;
    if most < context {
        return None;
    }
    Some(format!("max_new_tokens = {most}, and the context of the model, prompt and answer, is {context} tokens"))
}

/// The tokenizer and template of the stage's model; `None` for an endpoint and on errors.
async fn local(stage: &PlannedStage, models: &Models) -> Option<Arc<TextModel>> {
    let model = stage.plan.models.first()?;
    match models.endpoint(&model.model) {
        Ok(None) => models.text(&model.model).await.ok(),
        _ => None,
    }
}

/// A note of prompts that are too long for a sampler's model, or for a trainer of its rows.
async fn of_sampler(round: &RoundPlan, stage: &PlannedStage, models: &Models) -> Option<String> {
    let prompting = sampler::prompting(&stage.plan)?;
    let text = local(stage, models).await?;
    let limit = limit(round, stage, &text, prompting.template);
    let most = limit.tokens;
    if sampler::max_prompt_tokens(&stage.plan).is_some_and(|left_out| left_out <= most) {
        return None;
    }
    let longer = longer(round, stage, text, prompting, limit).await?;
    Some(format!("{longer}: max_prompt_tokens = {most} leaves them out, left(prompt, N) in the source cuts them"))
}

/// A note of prompts that are too long for a trainer which reads a source.
async fn of_trainer(round: &RoundPlan, stage: &PlannedStage, models: &Models) -> Option<String> {
    let (longest, template) = trainer::longest(&stage.plan)?;
    let text = local(stage, models).await?;
    let longest = longest.min(text.pretrained().config.max_position_embeddings);
    let limit =
        Limit { tokens: longest.saturating_sub(1), of: format!("which leaves no answer in max_length = {longest}") };
    let prompting = answerer::Prompting { template, add_bos: None };
    let longer = longer(round, stage, text, prompting, limit).await?;
    Some(format!("{longer}: raise max_length, or leave such rows out in the source"))
}

/// The number of prompts of a stage's source that are longer than the limit, in words.
async fn longer(
    round: &RoundPlan,
    stage: &PlannedStage,
    text: Arc<TextModel>,
    prompting: answerer::Prompting,
    limit: Limit,
) -> Option<String> {
    let prompts = source::first_rows(&source_of(round, stage)?.plan, LOOKED_AT).await?;
    let lengths = tokio::task::spawn_blocking(move || lengths(&text, prompting, &prompts)).await.ok()?;
    let longest = *lengths.iter().max()?;
    let longer = lengths.iter().filter(|tokens| **tokens > limit.tokens).count();
    let Limit { tokens, of } = limit;
    let all = lengths.len();
    (longer > 0)
        .then(|| format!("{longer} of the first {all} prompts have more than {tokens} tokens (up to {longest}), {of}"))
}

/// Number of tokens of each prompt that can be tokenised.
fn lengths(text: &TextModel, prompting: answerer::Prompting, prompts: &[RecordBatch]) -> Vec<usize> {
    let rows = prompts.iter().flat_map(|batch| (0..batch.num_rows()).map(move |row| chat::prompt(batch, row)));
    rows.filter_map(|prompt| answerer::encode(text, prompting, (&prompt.ok()?).into()).ok())
        .map(|ids| ids.len())
        .collect()
}

/// The source whose prompts a stage reads unchanged; `None` if another stage is between them.
fn source_of<'a>(round: &'a RoundPlan, stage: &PlannedStage) -> Option<&'a PlannedStage> {
    let mut name = &stage.inputs.first()?.input.from.stage;
    loop {
        let found = round.stages.iter().find(|planned| planned.spec.name == *name)?;
        if source::is_source(&found.plan) {
            return Some(found);
        }
        if !split::is_split(&found.plan) {
            return None;
        }
        name = &found.inputs.first()?.input.from.stage;
    }
}

/// The smallest limit: the model's context, or `max_length` of a trainer with this template that reads the same source.
fn limit(round: &RoundPlan, stage: &PlannedStage, text: &TextModel, template: Template) -> Limit {
    let context = text.pretrained().config.max_position_embeddings.saturating_sub(1);
    let mut limit = Limit { tokens: context, of: "which leaves no answer in the model's context".into() };
    for planned in round.stages.iter().filter(|planned| planned.source == stage.source) {
        let Some((longest, _)) = trainer::longest(&planned.plan).filter(|(_, own)| *own == template) else { continue };
        if longest.saturating_sub(1) < limit.tokens {
            let name = &planned.spec.name;
            limit = Limit {
                tokens: longest - 1,
                of: format!("which leaves no answer in max_length = {longest} of stages.{name}"),
            };
        }
    }
    limit
}
