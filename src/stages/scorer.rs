//! `kind = "scorer"`: how probable a given answer is to a model.
//!
//! The tokens are exactly those that a trainer would learn from the same row, so the numbers can be
//! held against a trainer's own, and against another program's on the same adapter.

use std::sync::Arc;

use datafusion::arrow::array::{ArrayRef, Float32Builder, Float64Array, ListBuilder, UInt64Array};
use datafusion::arrow::datatypes::{DataType, Field, Schema, SchemaRef};
use datafusion::arrow::error::ArrowError;
use datafusion::arrow::record_batch::RecordBatch;
use futures::future::BoxFuture;
use serde::Deserialize;

use super::client::{self, LazyClient};
use super::rows::{RowError, each_row};
use super::trainer::Template;
use super::trainer::pairs::{answers, prompt, tokens};
use crate::canonical_fields;
use crate::engine::{Runnable, Stage, StageContext, StageError, TokenCounter};
use crate::flow::device::Devices;
use crate::flow::kind::{CheckContext, InputKey, ModelUse, ONE_INPUT, Port, StageKind, StagePlan};
use crate::flow::{Canonical, FlowError, Form};
use crate::llm::{AdapterId, Company, Models, Role, ScoreRequest, TextModel};
use crate::train::pair::{Answer, Prompt, Tokens, Truncated};

/// Rows in flight, counted from the oldest unfinished one.
const WINDOW: usize = 32;

/// Columns that scoring adds, in order.
const ADDED: [&str; 3] = ["logprob", "logprob_tokens", "logprobs"];

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Options {
    model: String,
    #[serde(default)]
    device: Devices,
    adapter: Option<String>,
    #[serde(default)]
    template: Template,
    add_bos: Option<bool>,
    #[serde(default = "yes")]
    end: bool,
}

fn yes() -> bool {
    true
}

// The model and its adapter have a place of their own in every key; devices decide no row.
canonical_fields!(Options { template, add_bos, end } without { model, device, adapter });

struct Checked {
    model: ModelUse,
    template: Template,
    add_bos: Option<bool>,
    /// Whether the end token counts.
    end: bool,
}

/// The kind `scorer`.
pub struct ScorerKind {
    pub models: Arc<Models>,
}

impl StageKind for ScorerKind {
    fn name(&self) -> &'static str {
        "scorer"
    }

    /// 2: an assistant's turn at a prompt's end is gone on with, and answers end as the template ends turns. 3: a completion
    /// that is text has the tokens that it has in the whole conversation.
    fn results(&self) -> u32 {
        3
    }

    fn takes_plain_text(&self) -> bool {
        true
    }

    fn inputs(&self) -> &'static [InputKey] {
        ONE_INPUT
    }

    fn check<'a>(&'a self, cx: CheckContext<'a>) -> BoxFuture<'a, Result<StagePlan, FlowError>> {
        Box::pin(async move { check(&cx) })
    }
}

impl Runnable for ScorerKind {
    fn open(&self, _stage: &str, plan: &StagePlan) -> Result<Box<dyn Stage>, StageError> {
        let checked = client::options::<Checked>(plan)?;
        Ok(Box::new(ScorerStage { models: self.models.clone(), checked, fingerprint: plan.fingerprint.clone() }))
    }
}

fn check(cx: &CheckContext<'_>) -> Result<StagePlan, FlowError> {
    let options: Options = cx.options()?;
    options.template.check_bos(cx, &options.model, options.add_bos)?;
    client::refuse_endpoint(cx, &options.model, "model", "gives no log-probs of a text that it is given")?;
    let model = client::model_use(cx, &options.model, &options.device, options.adapter.as_deref())?;
    let model = ModelUse { chat: options.template == Template::Chat, ..model };
    let input = cx.inputs.first();
    let schema = input.and_then(|i| i.schema.as_ref()).map(|s| out_schema(cx, s)).transpose()?;
    Ok(StagePlan {
        outputs: vec![Port { name: String::new(), schema, rows: input.and_then(|i| i.rows) }],
        waits_for_round: false,
        new_rows: false,
        models: vec![model.clone()],
        trains: None,
        fingerprint: options.form(),
        notes: Vec::new(),
        options: Arc::new(Checked { model, template: options.template, add_bos: options.add_bos, end: options.end }),
    })
}

fn out_schema(cx: &CheckContext<'_>, input: &SchemaRef) -> Result<SchemaRef, FlowError> {
    for needed in ["prompt", "completion"] {
        let is_there = |name: &str| input.column_with_name(name).is_some();
        let stands_in = needed == "completion" && is_there("generation");
        if !is_there(needed) && !stands_in {
            let there: Vec<_> =
                input.fields().iter().map(|f| f.name().as_str()).filter(|n| !n.starts_with('_')).collect();
            return Err(cx
                .error("input", format!("has no column {needed:?}; its columns are {}", there.join(", ")))
                .help(
                    "name the columns in a mapper before it: sql = \"SELECT prompt, chosen AS completion FROM input\"",
                ));
        }
    }
    if let Some(taken) = ADDED.iter().find(|name| input.column_with_name(name).is_some()) {
        return Err(cx
            .error("input", format!("already has a column {taken:?}, which the scorer adds"))
            .help("leave it out, or give it another name, in a mapper before the scorer"));
    }
    Ok(scored_schema(input))
}

/// The column with the answer: `completion`, or that of an answer that a data set brings.
fn answer_of(schema: &Schema) -> &'static str {
    if schema.column_with_name("completion").is_some() { "completion" } else { "generation" }
}

fn scored_schema(input: &SchemaRef) -> SchemaRef {
    let mut fields: Vec<Field> = input.fields().iter().map(|f| f.as_ref().clone()).collect();
    fields.extend([
        Field::new("logprob", DataType::Float64, false),
        Field::new("logprob_tokens", DataType::UInt64, false),
        Field::new("logprobs", DataType::new_list(DataType::Float32, true), false),
    ]);
    Arc::new(Schema::new(fields))
}

struct ScorerStage {
    models: Arc<Models>,
    checked: Arc<Checked>,
    fingerprint: Form,
}

impl Stage for ScorerStage {
    fn run<'a>(&'a mut self, ctx: &'a mut StageContext) -> BoxFuture<'a, Result<(), StageError>> {
        Box::pin(async move {
            let adapter = ctx.adapter(&self.checked.model.adapter).await?;
            let text = client::text(&self.models, &self.checked.model).await?;
            ctx.open_journal(&client::content_key(ctx, &self.fingerprint, &text, adapter.as_ref()))?;
            let scorer = Arc::new(Scorer {
                client: LazyClient::new(self.models.clone(), &self.checked.model, Role::Judge),
                text,
                checked: self.checked.clone(),
                adapter: adapter.map(client::adapter_id),
                stage: ctx.stage.clone(),
                tokens: ctx.token_counter(),
            });
            let work = |_, rows| {
                let scorer = scorer.clone();
                async move { scorer.score(rows).await }
            };
            each_row(ctx, WINDOW, work, |_| ()).await
        })
    }
}

/// Everything that scoring one source row needs; shared by the rows in flight.
struct Scorer {
    client: LazyClient,
    text: Arc<TextModel>,
    checked: Arc<Checked>,
    adapter: Option<AdapterId>,
    stage: String,
    tokens: TokenCounter,
}

impl Scorer {
    /// One pass a row: what is computed for it depends on no other row.
    async fn score(&self, rows: RecordBatch) -> Result<Option<RecordBatch>, RowError> {
        let mut scores = Vec::with_capacity(rows.num_rows());
        for Encoded { prompt, completion } in self.encode(&rows)? {
            let read = prompt.len() + completion.len();
            let request = ScoreRequest {
                prompt,
                answers: vec![completion],
                adapter: self.adapter.clone(),
                company: Company::Indifferent,
                stage: self.stage.clone(),
            };
            let scored = self.client.get().await?.score(request).await.map_err(client::row_error)?;
            self.tokens.add(read as u64, 0);
            let logprobs: Vec<f32> = scored.logprobs.into_iter().flatten().collect();
            if !logprobs.iter().all(|p| p.is_finite()) {
                return Err(RowError::DeadLetter("the log-probability is no finite number".into()));
            }
            scores.push(logprobs);
        }
        Ok(Some(to_batch(&rows, &scores)?))
    }

    fn encode(&self, rows: &RecordBatch) -> Result<Vec<Encoded>, RowError> {
        let model = self.text.pretrained();
        let template = (self.checked.template, self.checked.add_bos);
        let tokens = tokens(model, template, Truncated::Keep, model.config.max_position_embeddings)?;
        let completions = answers(rows, answer_of(rows.schema_ref()))?;
        let encode = |(i, completion): (usize, Option<Answer>)| {
            let completion = completion.ok_or_else(|| RowError::DeadLetter("the completion is missing".into()))?;
            encode(&tokens, &prompt(rows, i)?, &completion, self.checked.end)
        };
        completions.into_iter().enumerate().map(encode).collect()
    }
}

/// One row as tokens.
struct Encoded {
    prompt: Vec<u32>,
    completion: Vec<u32>,
}

fn encode(tokens: &Tokens<'_>, prompt: &Prompt, completion: &Answer, end: bool) -> Result<Encoded, RowError> {
    let failed = |e: crate::model::ModelError| RowError::DeadLetter(e.to_string());
    let opened = tokens.open(prompt).map_err(failed)?;
    let mut completion = tokens.answer(prompt, &opened, completion).map_err(failed)?;
    if !end {
        completion.truncate(tokens.without_end(&completion).len());
    }
    Ok(Encoded { prompt: opened.into_ids(), completion })
}

/// The rows with their scores, in [`scored_schema`]'s order.
fn to_batch(rows: &RecordBatch, scores: &[Vec<f32>]) -> Result<RecordBatch, StageError> {
    let mut each = ListBuilder::new(Float32Builder::new());
    for logprobs in scores {
        each.values().append_slice(logprobs);
        each.append(true);
    }
    let sums = scores.iter().map(|logprobs| logprobs.iter().map(|p| f64::from(*p)).sum());
    let mut columns = rows.columns().to_vec();
    columns.extend([
        Arc::new(Float64Array::from_iter_values(sums)) as ArrayRef,
        Arc::new(UInt64Array::from_iter_values(scores.iter().map(|logprobs| logprobs.len() as u64))),
        Arc::new(each.finish()),
    ]);
    RecordBatch::try_new(scored_schema(&rows.schema()), columns)
        .map_err(|e: ArrowError| StageError::internal(format!("scores: {e}")))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::path::Path;

    use datafusion::arrow::array::{AsArray, StringArray};
    use datafusion::arrow::datatypes::{Float32Type, Float64Type, UInt64Type};

    use super::*;
    use crate::flow::RowBound;
    use crate::flow::kind::InputPlan;
    use crate::flow::{AdapterChoice, Flow, InputRef, StageSpec};
    use crate::model::{ModelOptions, Pretrained, Source};

    fn checked(columns: &[&str], table: &str) -> Result<StagePlan, FlowError> {
        let model: crate::flow::ModelSpec = toml::from_str("source = \"builtin:smollm2-135m\"").unwrap();
        let flow = Flow { models: BTreeMap::from([("policy".to_owned(), model)]), ..Flow::default() };
        let options = toml::from_str(&format!("model = \"policy\"\n{table}")).unwrap();
        let stage = StageSpec {
            name: "score".into(),
            kind: "scorer".into(),
            inputs: Vec::new(),
            in_rounds: None,
            table: true,
            options,
        };
        let fields: Vec<Field> = columns.iter().map(|name| Field::new(*name, DataType::Utf8, true)).collect();
        let input = InputPlan {
            key: "input".into(),
            from: InputRef { stage: "rows".into(), port: String::new() },
            schema: Some(Arc::new(Schema::new(fields))),
            rows: Some(RowBound::of_source(5)),
        };
        let trainers = BTreeMap::from([("policy".to_owned(), vec!["align".to_owned()])]);
        check(&CheckContext { flow: &flow, stage: &stage, inputs: &[input], trainers: &trainers })
    }

    #[test]
    fn a_check_says_columns_rows_and_adapter() {
        let plan = checked(&["prompt", "completion"], "adapter = \"align\"").unwrap();
        let port = &plan.outputs[0];
        let names: Vec<_> = port.schema.as_ref().unwrap().fields().iter().map(|f| f.name().clone()).collect();
        assert_eq!(names, ["prompt", "completion", "logprob", "logprob_tokens", "logprobs"]);
        assert_eq!(port.rows, Some(RowBound::of_source(5)));
        assert_eq!(plan.models[0].adapter, AdapterChoice::Current { trainer: "align".into() });
    }

    #[test]
    fn what_decides_the_numbers_is_in_the_fingerprint() {
        let fingerprint = |table: &str| checked(&["prompt", "completion"], table).unwrap().fingerprint;
        let plain = fingerprint("");
        assert_ne!(plain, fingerprint("end = false"));
        assert_ne!(plain, fingerprint("template = \"none\""));
        assert_eq!(plain, fingerprint("device = \"cpu:1\""));
    }

    #[test]
    fn a_check_refuses_what_can_not_be_scored() {
        for (columns, table, key, words) in [
            (&["prompt", "text"][..], "", "input", "no column \"completion\"; its columns are prompt, text"),
            (&["completion"], "", "input", "no column \"prompt\""),
            (&["prompt", "completion", "logprob"], "", "input", "already has a column \"logprob\""),
            (&["prompt", "completion"], "ends = false", "ends", "did you mean `end`?"),
            (&["prompt", "completion"], "template = \"chatml\"", "template", "chat"),
            (&["prompt", "completion"], "adapter = \"allign\"", "adapter", "did you mean `align`?"),
        ] {
            let error = checked(columns, table).unwrap_err();
            assert_eq!(error.key, format!("stages.score.{key}"), "{error}");
            assert!(error.to_string().contains(words), "{error}");
        }
    }

    #[test]
    fn the_end_token_counts_where_the_answer_is_finished() {
        let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tiny-llama");
        let model = Pretrained::open(&Source::Directory(fixture), &ModelOptions::default()).unwrap();
        let tokens = tokens(&model, (Template::Chat, None), Truncated::Keep, 512).unwrap();
        let ids = |answer: &Answer, end| encode(&tokens, &Prompt::Text("hi".into()), answer, end).unwrap();
        let eos = model.tokenizer.eos_ids()[0];
        let text = model.tokenizer.encode("the cat", false).unwrap();
        let ended = [text.clone(), vec![eos]].concat();

        let finished = Answer { text: "the cat".into(), ..Answer::default() };
        assert_eq!(ids(&finished, true).completion, ended);
        assert_eq!(ids(&finished, false).completion, text);
        let cut = Answer { finish_reason: Some("length".into()), ..finished.clone() };
        assert_eq!(ids(&cut, true).completion, text);
        let sampled = Answer { ids: Some(ended.clone()), finish_reason: Some("stop".into()), ..finished.clone() };
        assert_eq!((ids(&sampled, true).completion, ids(&sampled, false).completion), (ended, text));

        let chat = model.encode_chat(&[crate::model::ChatMessage::new("user", "hi")], true).unwrap();
        assert_eq!(ids(&finished, true).prompt, chat);
    }

    #[test]
    fn scores_stand_beside_their_rows() {
        let text: ArrayRef = Arc::new(StringArray::from(vec!["a", "b"]));
        let rows = RecordBatch::try_from_iter([("completion", text)]).unwrap();
        let batch = to_batch(&rows, &[vec![-0.5, -1.5], vec![]]).unwrap();
        assert_eq!(batch["logprob"].as_primitive::<Float64Type>().values(), &[-2.0, 0.0]);
        assert_eq!(batch["logprob_tokens"].as_primitive::<UInt64Type>().values(), &[2, 0]);
        let each = batch["logprobs"].as_list::<i32>();
        assert_eq!(each.value(0).as_primitive::<Float32Type>().values(), &[-0.5, -1.5]);
        assert_eq!(each.value(1).len(), 0);
    }
}
