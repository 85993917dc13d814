//! `kind = "trainer"`: what it reads of a flow and what it refuses before anything is loaded. Its
//! running half is `intake`.

mod inputs;
mod intake;
pub(super) mod pairs;

use std::fmt::Formatter;
use std::sync::Arc;

use futures::future::BoxFuture;
use serde::de::value::MapAccessDeserializer;
use serde::de::{MapAccess, Visitor};
use serde::{Deserialize, Deserializer};

use crate::engine::{Runnable, Stage, StageError};
use crate::flow::device::Devices;
use crate::flow::kind::{Access, ModelUse};
use crate::flow::{AdapterChoice, Canonical, CheckContext, FlowError, Form, InputKey, StageKind, StagePlan, StageSpec};
use crate::llm::Models;
use crate::model::LoraConfig;
use crate::stages::client;
use crate::train::pair::Truncated;
use crate::train::{AdamW, Decay, Evaluations, Loss, Metric, Objective, Order, Schedule, Session};

/// The kind `trainer`.
pub struct TrainerKind {
    pub models: Arc<Models>,
}

/// What the adapter of a round starts from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Start {
    #[default]
    Fresh,
    /// The adapter of the round before; in round 1 `init_adapter`, or a fresh one.
    Continue,
    /// A fresh adapter on top of the one of the round before, which stays as it is; the result is both.
    FreshOnMerged,
}

/// What the log-probabilities of the loss are compared with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reference {
    #[default]
    Base,
    /// The adapter of the round before.
    Previous,
    /// An exponential moving average of the rounds' adapters.
    Ema,
}

/// What is learnt of a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Algorithm {
    /// To prefer `chosen` to `rejected`.
    #[default]
    Dpo,
    /// To write `completion`; its tokens alone are in the loss.
    Sft,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Consume {
    #[default]
    Stream,
    Collect,
}

/// How a prompt becomes tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Template {
    /// By the model's chat template.
    #[default]
    Chat,
    /// As the text that it is.
    None,
}

impl Template {
    /// Refuses `add_bos` beside a chat template, which writes what begins a text itself, and for a model that has no
    /// such token.
    pub fn check_bos(self, cx: &CheckContext<'_>, model: &str, add_bos: Option<bool>) -> Result<(), FlowError> {
        match (self, add_bos) {
            (Self::Chat, Some(_)) => Err(cx
                .error("add_bos", "means nothing beside a chat template, which writes what a text begins with itself")
                .help("leave it out, or set template = \"none\"; chat_template of the model can begin with bos_token")),
            (Self::None, Some(true)) if cx.flow.contents.without_bos.contains(model) => Err(cx
                .error("add_bos", format!("asks for a begin-of-text token, and the tokenizer of `{model}` has none"))
                .help("leave it out, or name the token: bos_token in tokenizer_config.json")),
            _ => Ok(()),
        }
    }
}

/// One value or a list of them.
#[derive(Debug, Clone, Deserialize)]
#[serde(untagged)]
enum OneOrMany {
    One(String),
    Many(Vec<String>),
}

impl OneOrMany {
    fn into_list(self) -> Vec<String> {
        match self {
            Self::One(one) => vec![one],
            Self::Many(many) => many,
        }
    }
}

/// The stage's table.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct Keys {
    model: String,
    learning_rate: f64,
    #[serde(default)]
    algorithm: Algorithm,
    loss: Option<OneOrMany>,
    loss_weights: Option<Vec<f64>>,
    #[serde(default = "tenth")]
    beta: f64,
    #[serde(default)]
    label_smoothing: f64,
    gamma: Option<f64>,
    odds_margin: Option<f64>,
    ld_alpha: Option<f64>,
    #[serde(default)]
    start: Start,
    #[serde(default)]
    reference: Reference,
    ema_alpha: Option<f64>,
    init_adapter: Option<String>,
    #[serde(default)]
    template: Template,
    add_bos: Option<bool>,
    #[serde(default)]
    truncated: Truncated,
    #[serde(default)]
    order: Order,
    #[serde(default)]
    consume: Consume,
    #[serde(default = "one_u64")]
    epochs: u64,
    batch_size: Option<usize>,
    gradient_accumulation_steps: Option<usize>,
    pairs_per_step: Option<usize>,
    #[serde(default)]
    schedule: Decay,
    #[serde(default)]
    warmup_steps: u64,
    #[serde(default)]
    weight_decay: f64,
    #[serde(default = "one")]
    max_grad_norm: f64,
    #[serde(default = "default_length")]
    max_length: usize,
    micro_batch_tokens: Option<usize>,
    #[serde(default)]
    gradient_checkpointing: bool,
    eval_steps: Option<u64>,
    best_metric: Option<Metric>,
    early_stopping_patience: Option<u64>,
    #[serde(default = "default_lora", deserialize_with = "lora")]
    lora: Option<LoraConfig>,
    #[serde(default)]
    device: Devices,
}

/// As TRL's `ref_model_mixup_alpha`.
const EMA_ALPHA: f64 = 0.6;

fn tenth() -> f64 {
    0.1
}
fn one() -> f64 {
    1.0
}
fn one_u64() -> u64 {
    1
}
fn default_length() -> usize {
    1024
}
fn default_lora() -> Option<LoraConfig> {
    Some(LoraConfig::default())
}

/// `lora = { ... }`, or `false` for none. No untagged enum: its errors wouldn't name the key.
fn lora<'de, D: Deserializer<'de>>(from: D) -> Result<Option<LoraConfig>, D::Error> {
    struct TableOrFalse;
    impl<'de> Visitor<'de> for TableOrFalse {
        type Value = Option<LoraConfig>;

        fn expecting(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
            f.write_str("a table, or false")
        }

        fn visit_bool<E>(self, on: bool) -> Result<Self::Value, E> {
            Ok(on.then(LoraConfig::default))
        }

        fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Self::Value, A::Error> {
            LoraConfig::deserialize(MapAccessDeserializer::new(map)).map(Some)
        }
    }
    from.deserialize_any(TableOrFalse)
}

/// The longest prompt and answer together that a planned trainer learns from, and how its prompts become tokens; `None` for
/// other kinds.
pub fn longest(plan: &StagePlan) -> Option<(usize, Template)> {
    plan.options.downcast_ref::<TrainerOptions>().map(|options| (options.max_length, options.template))
}

/// The validated options of a trainer stage.
#[derive(Debug, Clone)]
pub struct TrainerOptions {
    pub algorithm: Algorithm,
    pub objective: Objective,
    pub optimizer: AdamW,
    pub schedule: Schedule,
    pub session: Session,
    /// `None` trains every weight of the model.
    pub lora: Option<LoraConfig>,
    pub start: Start,
    pub reference: Reference,
    /// What a round's adapter counts in the average.
    pub ema_alpha: f64,
    /// As written; relative to the flow.
    pub init_adapter: Option<String>,
    pub template: Template,
    pub add_bos: Option<bool>,
    pub truncated: Truncated,
    pub max_length: usize,
    pub gradient_checkpointing: bool,
    pub evaluation: Evaluations,
    /// What a judge's gap counts in the loss.
    pub odds_margin: Option<f64>,
}

impl StageKind for TrainerKind {
    fn name(&self) -> &'static str {
        "trainer"
    }

    /// 2: an assistant's turn at a prompt's end is gone on with, and answers end as the template ends turns. 3: an answer
    /// that is text has the tokens that it has in the whole conversation; GGUF files have more ends of turns.
    fn results(&self) -> u32 {
        3
    }

    fn takes_plain_text(&self) -> bool {
        true
    }

    fn inputs(&self) -> &'static [InputKey] {
        &[
            InputKey { name: "train", required: true, many: false },
            InputKey { name: "validation", required: false, many: false },
        ]
    }

    fn opens(&self, stage: &crate::flow::StageSpec) -> Vec<(&'static str, Access)> {
        let written = stage.options.get("init_adapter").and_then(toml::Value::as_str);
        written.map(|path| ("init_adapter", Access::Read(path.into()))).into_iter().collect()
    }

    fn check<'a>(&'a self, cx: CheckContext<'a>) -> BoxFuture<'a, Result<StagePlan, FlowError>> {
        Box::pin(async move { plan(&cx) })
    }
}

impl Runnable for TrainerKind {
    fn open(&self, stage: &str, plan: &StagePlan) -> Result<Box<dyn Stage>, StageError> {
        let options = client::options::<TrainerOptions>(plan)?;
        let model = plan.models.first().cloned();
        let model = model.ok_or_else(|| StageError::internal(format!("{stage}: a trainer without a model")))?;
        let fingerprint = plan.fingerprint.clone();
        Ok(Box::new(intake::TrainerStage { models: self.models.clone(), options, model, fingerprint }))
    }
}

fn plan(cx: &CheckContext<'_>) -> Result<StagePlan, FlowError> {
    let keys: Keys = cx.options()?;
    client::refuse_endpoint(cx, &keys.model, "model", "can't be trained")?;
    refuse(cx, &keys)?;
    keys.template.check_bos(cx, &keys.model, keys.add_bos)?;
    let objective = objective(cx, &keys)?;
    let devices = cx.devices(&keys.device)?;
    let session = session(cx, &keys, devices.len())?;
    let trainer = cx.stage.name.clone();
    let compared = keys.algorithm == Algorithm::Dpo && keys.reference != Reference::Base;
    let adapter =
        if !compared && keys.start == Start::Fresh { AdapterChoice::Base } else { AdapterChoice::Previous { trainer } };
    let fingerprint = fingerprint(&keys, &objective, &session);
    let mut notes = vec![steps_note(cx, &session)];
    if keys.learning_rate == 0.0 {
        notes.push("learning_rate = 0: nothing is learned".into());
    }
    notes.extend(inputs::check(cx, keys.algorithm, keys.template, keys.odds_margin.is_some())?);
    let options = TrainerOptions {
        algorithm: keys.algorithm,
        objective,
        session,
        optimizer: AdamW { weight_decay: keys.weight_decay, max_grad_norm: keys.max_grad_norm },
        schedule: Schedule { decay: keys.schedule, learning_rate: keys.learning_rate, warmup_steps: keys.warmup_steps },
        lora: keys.lora,
        start: keys.start,
        reference: keys.reference,
        ema_alpha: keys.ema_alpha.unwrap_or(EMA_ALPHA),
        init_adapter: keys.init_adapter,
        template: keys.template,
        add_bos: keys.add_bos,
        truncated: keys.truncated,
        max_length: keys.max_length,
        gradient_checkpointing: keys.gradient_checkpointing,
        evaluation: Evaluations {
            steps: keys.eval_steps,
            best: keys.best_metric,
            patience: keys.early_stopping_patience,
        },
        odds_margin: keys.odds_margin,
    };
    Ok(StagePlan {
        outputs: Vec::new(),
        waits_for_round: false,
        new_rows: false,
        models: vec![ModelUse { model: keys.model.clone(), devices, adapter, chat: keys.template == Template::Chat }],
        trains: Some(keys.model),
        fingerprint,
        notes,
        options: Arc::new(options),
    })
}

/// Every key by name: one that is in no form has its reason here.
fn fingerprint(keys: &Keys, objective: &Objective, session: &Session) -> Form {
    let Keys {
        model,
        learning_rate,
        algorithm,
        // Both are the objective's terms.
        loss: _,
        loss_weights: _,
        beta,
        label_smoothing,
        gamma,
        odds_margin,
        ld_alpha,
        start,
        reference,
        ema_alpha,
        init_adapter,
        template,
        add_bos,
        truncated,
        order,
        consume,
        epochs,
        // All three are the session's.
        batch_size: _,
        gradient_accumulation_steps: _,
        pairs_per_step: _,
        schedule,
        warmup_steps,
        weight_decay,
        max_grad_norm,
        max_length,
        // How much goes through the model at once, and what is kept of it, changes no figure.
        micro_batch_tokens: _,
        gradient_checkpointing: _,
        eval_steps,
        best_metric,
        early_stopping_patience,
        lora,
        device: _,
    } = keys;
    let term = |(loss, weight): &(Loss, f64)| (loss.name(), *weight).form();
    Form::table([
        ("model", model.form()),
        ("algorithm", algorithm.form()),
        ("learning_rate", learning_rate.form()),
        ("beta", beta.form()),
        ("terms", Form::List(objective.terms.iter().map(term).collect())),
        ("label_smoothing", label_smoothing.form()),
        ("gamma", gamma.form()),
        ("odds_margin", odds_margin.form()),
        ("best_metric", best_metric.form()),
        ("early_stopping_patience", early_stopping_patience.form()),
        // Evaluations that choose nothing are only told.
        ("eval_steps", eval_steps.filter(|_| best_metric.is_some()).form()),
        ("ld_alpha", ld_alpha.form()),
        ("start", start.form()),
        ("reference", reference.form()),
        ("ema_alpha", ema_alpha.form()),
        ("init_adapter", init_adapter.form()),
        ("template", template.form()),
        ("add_bos", add_bos.form()),
        ("truncated", truncated.form()),
        ("order", order.form()),
        ("consume", consume.form()),
        ("epochs", epochs.form()),
        ("batch_size", session.batch_size.form()),
        ("accumulation", session.accumulation.form()),
        ("schedule", schedule.form()),
        ("warmup_steps", warmup_steps.form()),
        ("weight_decay", weight_decay.form()),
        ("max_grad_norm", max_grad_norm.form()),
        ("max_length", max_length.form()),
        ("lora", lora.as_ref().map_or(Form::Flag(false), Canonical::form)),
    ])
}

fn steps_note(cx: &CheckContext<'_>, session: &Session) -> String {
    let (pairs, epochs) = (session.pairs_per_step(), session.epochs);
    let s = if epochs == 1 { "" } else { "s" };
    let rows = cx.inputs.iter().find(|input| input.key == "train").and_then(|input| input.rows);
    let steps = rows.map(|rows| session.steps(usize::try_from(rows.total()).unwrap_or(usize::MAX)));
    let steps = steps.map(|steps| format!(", at most {steps} steps a round")).unwrap_or_default();
    format!("{pairs} pairs a step, {epochs} epoch{s}{steps}")
}

/// What can't be done, or can't be meant.
fn refuse(cx: &CheckContext<'_>, keys: &Keys) -> Result<(), FlowError> {
    let range = |key: &str, good: bool, rule: &str| if good { Ok(()) } else { Err(cx.error(key, rule)) };
    range("learning_rate", keys.learning_rate.is_finite() && keys.learning_rate >= 0.0, "must be 0 or more")?;
    range("beta", keys.beta.is_finite() && keys.beta > 0.0, "must be more than 0")?;
    range("label_smoothing", (0.0..0.5).contains(&keys.label_smoothing), "must be at least 0 and below 0.5")?;
    range("ld_alpha", keys.ld_alpha.is_none_or(|a| (0.0..=1.0).contains(&a)), "is a share, from 0 to 1")?;
    range("gamma", keys.gamma.is_none_or(f64::is_finite), "must be a number")?;
    range("epochs", keys.epochs > 0, "must be 1 or more")?;
    range("weight_decay", keys.weight_decay.is_finite() && keys.weight_decay >= 0.0, "must be 0 or more")?;
    range("max_grad_norm", keys.max_grad_norm.is_finite() && keys.max_grad_norm >= 0.0, "must be 0 (none) or more")?;
    range("max_length", keys.max_length > 1, "must be 2 or more")?;
    range("micro_batch_tokens", keys.micro_batch_tokens != Some(0), "must be 1 or more; a longer pair goes alone")?;
    match &keys.lora {
        Some(lora) => refuse_lora(cx, lora)?,
        None => refuse_whole(cx, keys)?,
    }
    let averages = keys.reference == Reference::Ema;
    range("ema_alpha", keys.ema_alpha.is_none() || averages, "means nothing without reference = \"ema\"")?;
    range("ema_alpha", keys.ema_alpha.is_none_or(|a| a > 0.0 && a <= 1.0), "must be above 0 and at most 1")?;
    range("eval_steps", keys.eval_steps != Some(0), "must be 1 or more")?;
    range("early_stopping_patience", keys.early_stopping_patience != Some(0), "must be 1 or more")?;
    range(
        "early_stopping_patience",
        keys.early_stopping_patience.is_none() || keys.best_metric.is_some(),
        "needs best_metric, which says what is better: \"loss\", \"rewards/margins\" or \"rewards/accuracies\"",
    )?;
    let validated = cx.inputs.iter().any(|input| input.key == "validation");
    let looks = [("eval_steps", keys.eval_steps.is_some()), ("best_metric", keys.best_metric.is_some())];
    for (key, given) in looks {
        range(key, !given || validated, "looks at validation pairs; name them with `validation`")?;
    }
    let sft = keys.algorithm == Algorithm::Sft;
    range(
        "best_metric",
        !sft || matches!(keys.best_metric, None | Some(Metric::Loss)),
        "can be \"loss\" alone with algorithm = \"sft\", which rewards nothing",
    )?;
    let useless = "means nothing to algorithm = \"sft\", which has no rejected answers and no reference";
    range("loss", !(sft && keys.loss.is_some()), useless)?;
    range("label_smoothing", !(sft && keys.label_smoothing > 0.0), useless)?;
    range("reference", !(sft && keys.reference != Reference::Base), useless)?;
    if keys.start == Start::Fresh && keys.reference != Reference::Base && cx.flow.rounds > 1 {
        let message = "a fresh adapter compared with the one of the round before starts far from its reference";
        let help = "start = \"continue\" with reference = \"previous\", or start = \"fresh\" with reference = \"base\"";
        return Err(cx.error("reference", message).help(help));
    }
    if keys.start == Start::Fresh && keys.init_adapter.is_some() {
        let message = "is not used by start = \"fresh\"";
        return Err(cx.error("init_adapter", message).help("start = \"continue\" goes on from it"));
    }
    refuse_other_lora(cx, keys)
}

/// Refuses a `lora` that says something else than the adapter that is gone on with. What can't be read of that is told
/// where the adapter is opened.
fn refuse_other_lora(cx: &CheckContext<'_>, keys: &Keys) -> Result<(), FlowError> {
    let written = cx.stage.options.get("lora").and_then(toml::Value::as_table);
    let (Some(written), Some(lora), Some(dir)) = (written, &keys.lora, &keys.init_adapter) else { return Ok(()) };
    if keys.start != Start::Continue {
        return Ok(());
    }
    let file = cx.flow.base.join(dir).join("adapter_config.json");
    let text = std::fs::read_to_string(file).unwrap_or_default();
    let Ok(config) = serde_json::from_str::<serde_json::Value>(&text) else { return Ok(()) };
    let has_patterns = |key: &str| config[key].as_object().is_some_and(|patterns| !patterns.is_empty());
    if has_patterns("rank_pattern") || has_patterns("alpha_pattern") {
        return Ok(());
    }
    let own = [
        ("r", config["r"].as_f64(), lora.r as f64),
        ("alpha", config["lora_alpha"].as_f64(), lora.alpha),
        ("rslora", Some(f64::from(u8::from(config["use_rslora"] == true))), f64::from(u8::from(lora.rslora))),
    ];
    let other =
        own.into_iter().find(|(key, own, asked)| written.contains_key(*key) && own.is_some_and(|own| own != *asked));
    let Some((key, Some(own), asked)) = other else { return Ok(()) };
    Err(cx
        .error(&format!("lora.{key}"), format!("is {asked}, and the adapter {dir} that is gone on with has {own}"))
        .help("leave `lora` out: the adapter's own is what is trained; start = \"fresh_on_merged\" trains one of another shape on top of it"))
}

fn refuse_lora(cx: &CheckContext<'_>, lora: &LoraConfig) -> Result<(), FlowError> {
    let range = |key: &str, good: bool, rule: &str| if good { Ok(()) } else { Err(cx.error(key, rule)) };
    range("lora.r", lora.r > 0, "must be 1 or more")?;
    range(
        "lora.alpha",
        lora.alpha.is_finite() && lora.alpha > 0.0,
        "must be more than 0: the adapter is multiplied with alpha / r",
    )?;
    range("lora.targets", !lora.targets.is_empty(), "names no projection; leave it out for all")?;
    range("lora.dropout", lora.dropout == 0.0, "dropout is not there yet; leave it out")?;
    if let Some(target) = lora.unknown_target() {
        let known = "q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj (qkv_proj, gate_up_proj in Phi-3)";
        return Err(cx.error("lora.targets", format!("there is no projection {target:?}; there are {known}")));
    }
    Ok(())
}

/// What a model that is trained whole can't be: it leaves no adapter, which is all that goes from round to round.
fn refuse_whole(cx: &CheckContext<'_>, keys: &Keys) -> Result<(), FlowError> {
    let refused = |key: &str, message: &str| {
        let help = "the trained model is the directory RUN/round-1/STAGE/model, which another flow takes as `source`";
        Err(cx.error(key, message).help(help))
    };
    if cx.flow.rounds > 1 {
        return refused("lora", "false trains the whole model, which no later round can go on from; write rounds = 1");
    }
    let name = &cx.stage.name;
    let asks = |stage: &&StageSpec| stage.options.get("adapter").and_then(toml::Value::as_str) == Some(name);
    if let Some(other) = cx.flow.stages.iter().find(asks) {
        let message = format!("`{name}` trains the whole model (lora = false) and leaves no adapter");
        return Err(FlowError::new(format!("stages.{}.adapter", other.name), message));
    }
    if keys.start != Start::Fresh || keys.reference != Reference::Base || keys.init_adapter.is_some() {
        return refused("lora", "false trains the base itself: start, reference and init_adapter mean nothing to it");
    }
    if cx.model(&keys.model)?.weights.is_some() {
        return refused("lora", "false writes the trained model, and dummy weights can't be written");
    }
    if keys.loss.clone().is_some_and(|loss| loss.into_list().iter().any(|name| name == Loss::Kto.name())) {
        return refused("loss", "\"kto\" asks the base while training, and lora = false changes it");
    }
    if keys.gradient_checkpointing {
        return refused("gradient_checkpointing", "is for adapters; lora = false keeps what a pair's pass computed");
    }
    Ok(())
}

fn objective(cx: &CheckContext<'_>, keys: &Keys) -> Result<Objective, FlowError> {
    let default = if keys.algorithm == Algorithm::Sft { Loss::Sft } else { Loss::Sigmoid };
    let names = keys.loss.clone().map_or_else(|| vec![default.name().to_owned()], OneOrMany::into_list);
    let losses = names.iter().map(|name| name.parse::<Loss>()).collect::<Result<Vec<_>, _>>();
    let losses = losses.map_err(|message| cx.error("loss", message))?;
    let weights = keys.loss_weights.clone().unwrap_or_else(|| vec![1.0; losses.len()]);
    if losses.is_empty() {
        return Err(cx.error("loss", "names none; leave it out for \"sigmoid\", the loss of DPO"));
    }
    if weights.len() != losses.len() {
        let message = format!("{} weights for {} losses; give one a loss", weights.len(), losses.len());
        return Err(cx.error("loss_weights", message));
    }
    if keys.label_smoothing > 0.0 && !losses.iter().any(|loss| loss.smooths()) {
        return Err(cx.error("label_smoothing", "means nothing to this loss; use it with \"sigmoid\" or \"robust\""));
    }
    if losses.contains(&Loss::Kto) && keys.batch_size.unwrap_or(1) < 2 {
        let message = "loss = \"kto\" compares with answers to other prompts of the micro-batch; 8 is usual";
        return Err(cx.error("batch_size", message));
    }
    if keys.gamma.is_some() && !losses.iter().any(|loss| loss.has_margin()) {
        return Err(cx.error("gamma", "means nothing to this loss; it is the margin of \"simpo\""));
    }
    if keys.odds_margin.is_some() && !losses.iter().any(|loss| loss.has_offset()) {
        let message = "means nothing to this loss; use it with \"sigmoid\" or \"sigmoid_norm\"";
        return Err(cx.error("odds_margin", message));
    }
    if keys.odds_margin.is_some_and(|scale| !scale.is_finite()) {
        return Err(cx.error("odds_margin", "must be a number"));
    }
    if keys.ld_alpha.is_some() && losses.contains(&Loss::Sft) {
        return Err(cx.error("ld_alpha", "can't be had with \"sft\", which is to learn the whole of an answer"));
    }
    Ok(Objective {
        terms: losses.into_iter().zip(weights).collect(),
        beta: keys.beta,
        label_smoothing: keys.label_smoothing,
        gamma: keys.gamma.unwrap_or(0.5),
        ld_alpha: keys.ld_alpha.unwrap_or(1.0),
    })
}

/// Its micro-batches are those of all devices together.
fn session(cx: &CheckContext<'_>, keys: &Keys, devices: usize) -> Result<Session, FlowError> {
    let batch_size = keys.batch_size.unwrap_or(1);
    if batch_size == 0 {
        return Err(cx.error("batch_size", "must be 1 or more"));
    }
    let accumulation = match (keys.pairs_per_step, keys.gradient_accumulation_steps) {
        (Some(_), Some(_)) => {
            let message = "says the same as gradient_accumulation_steps; give one of them";
            return Err(cx.error("pairs_per_step", message));
        }
        (Some(pairs), None) if pairs % batch_size != 0 => {
            return Err(cx.error("pairs_per_step", format!("{pairs} is no multiple of batch_size = {batch_size}")));
        }
        (Some(pairs), None) => pairs / batch_size,
        (None, steps) => steps.unwrap_or(1) * devices.max(1),
    };
    if accumulation == 0 {
        let key = if keys.pairs_per_step.is_some() { "pairs_per_step" } else { "gradient_accumulation_steps" };
        return Err(cx.error(key, "must be 1 or more"));
    }
    Ok(Session {
        epochs: keys.epochs,
        batch_size,
        accumulation,
        order: keys.order,
        streamed: keys.consume == Consume::Stream,
        seed: cx.flow.seed,
        pass_tokens: keys.micro_batch_tokens,
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::flow::{Flow, StageSpec};

    fn check(table: &str) -> Result<StagePlan, FlowError> {
        let model: crate::flow::ModelSpec = toml::from_str("source = \"builtin:smollm2-135m\"").unwrap();
        let models = BTreeMap::from([("policy".to_owned(), model)]);
        let rounds = if table.contains("lora = false") { 1 } else { 2 };
        let flow = Flow { rounds, models, ..Flow::default() };
        let options = toml::from_str(&format!("model = \"policy\"\nlearning_rate = 1e-3\n{table}")).unwrap();
        let stage = StageSpec {
            name: "align".into(),
            kind: "trainer".into(),
            inputs: Vec::new(),
            in_rounds: None,
            table: true,
            options,
        };
        plan(&CheckContext { flow: &flow, stage: &stage, inputs: &[], trainers: &BTreeMap::new() })
    }

    fn options(table: &str) -> TrainerOptions {
        check(table).unwrap().options.downcast_ref::<TrainerOptions>().unwrap().clone()
    }

    #[test]
    fn defaults_train_dpo_from_the_base() {
        let plan = check("batch_size = 2\ngradient_accumulation_steps = 8").unwrap();
        assert_eq!(plan.notes, ["16 pairs a step, 1 epoch"]);
        assert_eq!(plan.models[0].adapter, AdapterChoice::Base);
        let options = options("");
        assert_eq!(options.objective.terms, [(Loss::Sigmoid, 1.0)]);
        assert!(options.session.streamed);
    }

    #[test]
    fn pairs_a_step_don_t_depend_on_devices() {
        let on = |keys: &str| options(&format!("device = [\"cpu:0\", \"cpu:1\"]\n{keys}")).session.pairs_per_step();
        assert_eq!(on("pairs_per_step = 8"), 8);
        assert_eq!(on("batch_size = 2\ngradient_accumulation_steps = 2"), 8);
    }

    #[test]
    fn sft_learns_completions_alone() {
        let sft = options("algorithm = \"sft\"\nstart = \"continue\"");
        assert_eq!((sft.algorithm, sft.objective.terms), (Algorithm::Sft, vec![(Loss::Sft, 1.0)]));
        let error = check("algorithm = \"ppo\"").unwrap_err().to_string();
        assert!(error.contains("dpo"), "{error}");
    }

    #[test]
    fn a_trainer_that_goes_on_reads_the_adapter_of_the_round_before() {
        for table in ["start = \"continue\"", "start = \"continue\"\nreference = \"previous\""] {
            let adapter = check(table).unwrap().models[0].adapter.clone();
            assert_eq!(adapter, AdapterChoice::Previous { trainer: "align".into() });
        }
    }

    #[test]
    fn what_cannot_be_meant_is_refused_at_its_key() {
        for (table, key, word) in [
            ("loss = \"sigmod\"", "loss", "sigmoid"),
            ("loss = [\"sigmoid\", \"sft\"]\nloss_weights = [1.0]", "loss_weights", "one a loss"),
            ("loss = \"hinge\"\nlabel_smoothing = 0.1", "label_smoothing", "robust"),
            ("reference = \"previous\"", "reference", "round before"),
            ("reference = \"ema\"", "reference", "round before"),
            ("ema_alpha = 0.5", "ema_alpha", "means nothing"),
            ("start = \"continue\"\nreference = \"ema\"\nema_alpha = 0.0", "ema_alpha", "above 0"),
            ("odds_margin = 1.0\nloss = \"ipo\"", "odds_margin", "sigmoid"),
            ("early_stopping_patience = 1", "early_stopping_patience", "best_metric"),
            ("eval_steps = 1", "eval_steps", "validation"),
            ("loss = \"kto\"", "batch_size", "other prompts"),
            ("micro_batch_tokens = 0", "micro_batch_tokens", "1 or more"),
            ("init_adapter = \"a\"", "init_adapter", "not used"),
            ("pairs_per_step = 3\nbatch_size = 2", "pairs_per_step", "multiple"),
            ("pairs_per_step = 4\ngradient_accumulation_steps = 4", "pairs_per_step", "give one"),
            ("beta = 0.0", "beta", "more than 0"),
            ("algorithm = \"sft\"\nloss = \"sigmoid\"", "loss", "means nothing"),
            ("algorithm = \"sft\"\nreference = \"previous\"", "reference", "means nothing"),
            ("gamma = 1.0", "gamma", "simpo"),
            ("ld_alpha = 1.5", "ld_alpha", "share"),
            ("loss = [\"sigmoid\", \"sft\"]\nld_alpha = 0.5", "ld_alpha", "whole"),
            ("batch_size = 0", "batch_size", "1 or more"),
            ("gradient_accumulation_steps = 0", "gradient_accumulation_steps", "1 or more"),
            ("loss = []", "loss", "names none"),
            ("lora = { alpha = 0 }", "lora.alpha", "more than 0"),
            ("lora = { targets = [] }", "lora.targets", "no projection"),
            ("lora = { r = 0, alpha = 1 }", "lora.r", "1 or more"),
            ("lora = { r = 1, alpha = 1, dropout = 0.1 }", "lora.dropout", "not there yet"),
            ("lora = false\nstart = \"continue\"", "lora", "mean nothing"),
            ("lora = false\nloss = \"kto\"\nbatch_size = 2", "loss", "lora = false"),
            ("lora = false\ngradient_checkpointing = true", "gradient_checkpointing", "adapters"),
        ] {
            let error = check(table).unwrap_err();
            assert_eq!(error.key, format!("stages.align.{key}"), "{table}");
            assert!(error.to_string().contains(word), "{error}");
        }
    }
}
