//! Stage kinds that only know their keys and columns, for tests of loading and planning.

use std::sync::Arc;

use datafusion::arrow::datatypes::{DataType, Field, Schema, SchemaRef};
use futures::future::BoxFuture;
use serde::Deserialize;

use super::kind::ONE_INPUT;
use super::{
    AdapterChoice, Canonical, CheckContext, Devices, FlowError, Form, InputKey, KindLookup, ModelUse, Port, StageKind,
    StagePlan,
};

/// The recipe of self-reward, in the keys that these kinds know.
pub const SELF_REWARD: &str = r#"name = "self-reward"
rounds = 3
seed = 7

[models.policy]
source = "hf://TinyLlama/TinyLlama-1.1B-Chat-v1.0"

[stages.prompts]
kind = "source"
columns = ["prompt"]

[stages.sample]
kind = "sampler"
input = "prompts"
model = "policy"
candidates = 2
temperature = 1.0

[stages.judge]
kind = "sampler"
input = "sample"
model = "policy"
device = "cpu:1"

[stages.prefer]
kind = "mapper"
input = "judge"
sql = "SELECT '${x}' FROM input"

[stages.halves]
kind = "split"
input = "prefer"

[stages.align]
kind = "trainer"
train = "halves.train"
validation = "halves.validation"
model = "policy"
lora = { r = 8 }
"#;

pub struct Kinds;

impl KindLookup for Kinds {
    fn kind(&self, name: &str) -> Option<Arc<dyn StageKind>> {
        self.kind_names()
            .into_iter()
            .find(|known| *known == name)
            .map(|name| Arc::new(Fake(name)) as Arc<dyn StageKind>)
    }

    fn kind_names(&self) -> Vec<&'static str> {
        vec!["source", "sampler", "mapper", "split", "trainer"]
    }
}

struct Fake(&'static str);

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Source {
    columns: Option<Vec<String>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Client {
    model: String,
    #[serde(default)]
    device: Devices,
    adapter: Option<String>,
    #[serde(default)]
    candidates: u32,
    #[serde(default)]
    temperature: f64,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Mapper {
    sql: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Split {}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Trainer {
    model: String,
    #[serde(default)]
    init_adapter: Option<String>,
    #[serde(default)]
    lora: Option<Lora>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Lora {
    r: u32,
}

const TRAINER_INPUTS: &[InputKey] = &[
    InputKey { name: "train", required: true, many: false },
    InputKey { name: "validation", required: false, many: false },
];
const MANY_INPUTS: &[InputKey] = &[InputKey { name: "input", required: true, many: true }];

impl StageKind for Fake {
    fn name(&self) -> &'static str {
        self.0
    }

    fn inputs(&self) -> &'static [InputKey] {
        match self.0 {
            "source" => &[],
            "mapper" => MANY_INPUTS,
            "trainer" => TRAINER_INPUTS,
            _ => ONE_INPUT,
        }
    }

    fn check<'a>(&'a self, cx: CheckContext<'a>) -> BoxFuture<'a, Result<StagePlan, FlowError>> {
        Box::pin(async move {
            let mut plan = self.plan(&cx)?;
            plan.fingerprint = Form::List(vec![plan.fingerprint, cx.inputs.len().form()]);
            Ok(plan)
        })
    }
}

impl Fake {
    fn plan(&self, cx: &CheckContext<'_>) -> Result<StagePlan, FlowError> {
        let passed = cx.inputs.first().and_then(|input| input.schema.clone());
        match self.0 {
            "source" => {
                let columns = cx.options::<Source>()?.columns;
                let fields = columns.as_ref().map(|names| names.iter().fold(row(), |schema, name| with(&schema, name)));
                Ok(plan(vec![port("", fields)], columns.form()))
            }
            "sampler" => {
                let options: Client = cx.options()?;
                let adapter = cx.adapter(options.adapter.as_deref(), &options.model)?;
                let mut plan = plan(
                    vec![port("", passed.map(|schema| with(&schema, &cx.stage.name)))],
                    Form::table([
                        ("candidates", options.candidates.form()),
                        ("temperature", options.temperature.form()),
                    ]),
                );
                let devices = cx.devices(&options.device)?;
                plan.models = vec![ModelUse { model: options.model, devices, adapter, chat: true }];
                Ok(plan)
            }
            "mapper" => {
                let sql = cx.options::<Mapper>()?.sql;
                let mut plan = plan(vec![port("", passed)], sql.form());
                plan.waits_for_round = sql.contains("ORDER BY");
                Ok(plan)
            }
            "split" => {
                let Split {} = cx.options()?;
                Ok(plan(vec![port("train", passed.clone()), port("validation", passed)], Form::Unset))
            }
            _ => {
                let options: Trainer = cx.options()?;
                let fingerprint = Form::List(vec![options.init_adapter.form(), options.lora.map(|lora| lora.r).form()]);
                let mut plan = plan(Vec::new(), fingerprint);
                let uses = ModelUse {
                    model: options.model.clone(),
                    devices: vec!["auto".into()],
                    adapter: AdapterChoice::Base,
                    chat: true,
                };
                plan.models = if cx.flow.models.contains_key(&options.model) { vec![uses] } else { Vec::new() };
                plan.trains = Some(options.model);
                Ok(plan)
            }
        }
    }
}

fn plan(outputs: Vec<Port>, fingerprint: Form) -> StagePlan {
    StagePlan {
        outputs,
        waits_for_round: false,
        new_rows: false,
        models: Vec::new(),
        trains: None,
        fingerprint,
        notes: Vec::new(),
        options: Arc::new(()),
    }
}

fn port(name: &str, schema: Option<SchemaRef>) -> Port {
    Port { name: name.into(), schema, rows: None }
}

fn row() -> SchemaRef {
    Arc::new(Schema::new(vec![Field::new("_row", DataType::UInt64, false)]))
}

fn with(schema: &SchemaRef, name: &str) -> SchemaRef {
    let mut fields: Vec<Field> = schema.fields().iter().map(|field| field.as_ref().clone()).collect();
    fields.push(Field::new(name, DataType::Utf8, false));
    Arc::new(Schema::new(fields))
}
