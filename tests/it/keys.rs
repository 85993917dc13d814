//! The key of a row has all that decides it: every key of every kind, changed alone, changes the key of its stage, or stands on
//! a list with its reason. The keys are asked of the kinds themselves, so one that is new has to be put somewhere.

use std::collections::{BTreeMap, BTreeSet};

use flowrun::embed::{Engine, RunOptions};
use flowrun::flow::{Flow, KindLookup};

use crate::every_kind::{OF_PROGRAMS, case};
use crate::support::{Case, stderr};

/// Keys, by the table that has them, that decide no row.
const DECIDE_NOTHING: &[(&str, &[&str], &str)] = &[
    ("", &["name"], "names the directory"),
    ("", &["rounds"], "a round more leaves those before it as they are; shard = \"round\" has its own line"),
    ("", &["max_dead_letters"], "ends a run, and changes no row of it"),
    ("", &["devices", "models", "stages", "round"], "tables, whose keys are looked at"),
    ("devices", &["memory", "kernels", "flash", "graphs"], "where and how fast a row is made"),
    ("models", &["api_key", "headers"], "opens the door to the same model"),
    ("models", &["concurrency", "timeout", "retries", "requests_per_minute"], "how hard a server is knocked at"),
    ("stage", &["kind", "in_rounds"], "another stage: keys are compared by round, stage and kind"),
    ("stage", &["table"], "whether rows are kept as a table too"),
    ("sampler", &["device"], "a device makes no other row"),
    ("scorer", &["device"], "a device makes no other row"),
    ("judge", &["device"], "a device makes no other row"),
    ("judge", &["labelled"], "what the judge is measured on; its verdicts on the rows stay"),
    ("gate", &["device"], "a device makes no other row"),
    ("gate", &["trainer"], "has to name the only one there is; of several the adapter's content tells"),
    ("gate", &["model"], "is the model that is trained; the models' own keys are looked at"),
    ("trainer", &["model"], "is the model that is sampled; the models' own keys are looked at"),
    ("trainer", &["device"], "several devices take more micro-batches a step, and that number is in the key"),
    ("trainer", &["micro_batch_tokens", "gradient_checkpointing"], "how a step is computed, not of what"),
    ("lora", &["dropout"], "is refused but for 0"),
    ("process", &["timeout", "workers", "retries"], "when a program is given up; a row is what it answers"),
    ("process", &["secrets"], "opens a door: the flow says that it decides nothing"),
    ("sink", &["path"], "where the rows go"),
];

/// A change of one key: the table it is of, the stage whose key must change, `key=value`, and what has to be set
/// before and after alike so that it means something.
type Change = (&'static str, &'static str, &'static str, &'static [&'static str]);

/// A source of a data set that can be read in several forms.
const ANSWERS: &str = "stages.answers={ kind = \"source\", dataset = \"forms.jsonl\" }";

const CHANGES: &[Change] = &[
    ("", "sample", "seed=2", &[]),
    ("", "sample", "deterministic=false", &[]),
    (
        "",
        "sample",
        "date=2026-11-28",
        &["date=2026-11-27", "models.policy.chat_template=\"{{ strftime_now('%d') }}{{ messages[0].content }}\""],
    ),
    ("models", "sample", "models.policy.source=\"model\"", &[]),
    ("models", "sample", "models.policy.dtype=bf16", &[]),
    ("models", "sample", "models.policy.system_prompt=short", &[]),
    ("models", "sample", "models.policy.chat_template=\"{{ messages[0].content }}\"", &[]),
    ("models", "sample", "models.policy.weights=dummy", &[]),
    ("models", "written", "models.far.endpoint=\"http://127.0.0.1:8/v1\"", &["stages.written.model=far"]),
    ("models", "written", "models.far.name=other", &["stages.written.model=far"]),
    ("models", "written", "models.far.body={ top_k = 5 }", &["stages.written.model=far"]),
    ("source", "prompts", "stages.prompts.dataset=\"other.jsonl\"", &[]),
    (
        "source",
        "prompts",
        "stages.prompts.split=test",
        &["stages.prompts.dataset=\"parts\"", "stages.prompts.split=train"],
    ),
    (
        "source",
        "prompts",
        "stages.prompts.config=b",
        &["stages.prompts.dataset=\"configs\"", "stages.prompts.config=a"],
    ),
    ("source", "prompts", "stages.prompts.types={ n = \"f64\" }", &[]),
    (
        "source",
        "prompts",
        "stages.prompts.separator=\";\"",
        &["stages.prompts.dataset=\"both.csv\"", "stages.prompts.select={ prompt = \"prompt\", n = \"1\" }"],
    ),
    ("source", "prompts", "stages.prompts.select={ prompt = \"upper(prompt)\", n = \"n\" }", &[]),
    ("source", "queried", "stages.queried.sql=\"SELECT upper(prompt) AS prompt FROM dataset\"", &[]),
    ("source", "prompts", "stages.prompts.take=20", &[]),
    ("source", "answers", "stages.answers.form=preference", &[ANSWERS, "stages.answers.form=messages"]),
    ("source", "answers", "stages.answers.candidates=[\"x\", \"y\"]", &[ANSWERS, "stages.answers.candidates=z"]),
    ("source", "prompts", "stages.prompts.shard={ count = 3 }", &[]),
    ("source", "prompts", "stages.prompts.shard={ count = 2, contiguous = true }", &[]),
    ("source", "prompts", "rounds=3", &["stages.prompts.shard=round"]),
    ("stage", "sample", "stages.sample.input=queried", &[]),
    ("sampler", "sample", "stages.sample.template=none", &[]),
    ("sampler", "sample", "stages.sample.add_bos=true", &["stages.sample.template=none"]),
    ("sampler", "sample", "stages.sample.model=far", &[]),
    ("sampler", "sample", "stages.sample.adapter=base", &[]),
    ("sampler", "sample", "stages.sample.candidates=3", &[]),
    ("sampler", "sample", "stages.sample.max_new_tokens=9", &[]),
    ("sampler", "sample", "stages.sample.temperature=0.5", &[]),
    ("sampler", "sample", "stages.sample.top_p=0.5", &[]),
    ("sampler", "sample", "stages.sample.top_k=5", &[]),
    ("sampler", "sample", "stages.sample.min_p=0.1", &[]),
    ("sampler", "sample", "stages.sample.repetition_penalty=1.1", &[]),
    ("sampler", "sample", "stages.sample.presence_penalty=0.5", &[]),
    ("sampler", "sample", "stages.sample.stop=[\"x\"]", &[]),
    ("sampler", "sample", "stages.sample.stop_token_ids=[3]", &[]),
    ("sampler", "sample", "stages.sample.logprobs=true", &[]),
    ("sampler", "sample", "stages.sample.max_prompt_tokens=99", &[]),
    ("scorer", "likely", "stages.likely.add_bos=true", &["stages.likely.template=none"]),
    ("scorer", "likely", "stages.likely.adapter=base", &[]),
    ("scorer", "likely", "stages.likely.template=none", &[]),
    ("scorer", "likely", "stages.likely.end=false", &[]),
    ("scorer", "likely", "stages.likely.model=twin", &["models.twin={ source = \"model\", dtype = \"f32\" }"]),
    ("judge", "written", "stages.written.model=far", &[]),
    ("judge", "pairwise", "stages.pairwise.adapter=base", &[]),
    ("judge", "pairwise", "stages.pairwise.method=score", &[]),
    ("judge", "pairwise", "stages.pairwise.read=text", &[]),
    ("judge", "pairwise", "stages.pairwise.order=random", &[]),
    ("judge", "pairwise", "stages.pairwise.order=datadreamer", &["stages.pairwise.order=random"]),
    ("judge", "pairwise", "stages.pairwise.prompt=\"{prompt} {first} {second}\"", &[]),
    ("judge", "pairwise", "stages.pairwise.labels=[\"One\", \"Two\"]", &[]),
    ("judge", "pairwise", "stages.pairwise.min_gap=0.5", &[]),
    ("judge", "pairwise", "stages.pairwise.compare=all", &[]),
    ("judge", "pairwise", "stages.pairwise.combine=majority", &[]),
    (
        "judge",
        "pairwise",
        "stages.pairwise.candidates=[\"x\", \"w\"]",
        &[
            ANSWERS,
            "stages.answers.select={ prompt = \"prompt\", x = \"x\", y = \"y\", w = \"w\" }",
            "stages.pairwise.input=answers",
            "stages.pairwise.candidates=[\"x\", \"y\"]",
        ],
    ),
    ("judge", "written", "stages.written.parse=\"(Response .)\"", &[]),
    ("judge", "written", "stages.written.unreadable=coin", &[]),
    ("judge", "written", "stages.written.temperature=0.5", &[]),
    ("judge", "written", "stages.written.top_p=0.5", &[]),
    ("judge", "written", "stages.written.max_new_tokens=9", &[]),
    ("judge", "scored", "stages.scored.scale=[0, 3]", &[]),
    ("judge", "scored", "stages.scored.prompt=\"{prompt} {answer}\"", &[]),
    ("judge", "scored", "stages.scored.parse=\"is ([0-9])\"", &[]),
    ("judge", "scored", "stages.scored.samples=3", &["stages.scored.temperature=0.5"]),
    ("judge", "ruled", "stages.ruled.rule=\"_candidate\"", &[]),
    ("gate", "gate", "stages.gate.against=previous", &[]),
    ("gate", "gate", "stages.gate.judge={ method = \"rule\", rule = \"_candidate\" }", &[]),
    ("gate", "gate", "stages.gate.threshold=0.6", &[]),
    ("gate", "gate", "stages.gate.otherwise=stop", &[]),
    ("gate", "gate", "stages.gate.max_new_tokens=9", &[]),
    ("gate", "gate", "stages.gate.temperature=0.5", &[]),
    ("pairs", "prefer", "stages.prefer.choose=all", &[]),
    ("pairs", "prefer", "stages.prefer.max_pairs=2", &[]),
    ("pairs", "prefer", "stages.prefer.min_gap=0.5", &[]),
    ("pairs", "prefer", "stages.prefer.ties=soft", &[]),
    ("pairs", "prefer", "stages.prefer.labels=soft", &[]),
    ("pairs", "prefer", "stages.prefer.length_control=0.3", &[]),
    ("pairs", "prefer", "stages.prefer.require_stop=true", &[]),
    ("pairs", "prefer", "stages.prefer.near_duplicates=0.9", &[]),
    ("pairs", "prefer", "stages.prefer.consistency=score", &[]),
    (
        "mapper",
        "completed",
        "stages.completed.sql=\"SELECT prompt, chosen, rejected, rejected AS completion FROM input\"",
        &[],
    ),
    ("process", "rewarded", "stages.rewarded.command=[\"sh\", \"other.sh\"]", &[]),
    ("process", "rewarded", "stages.rewarded.columns={ points = \"f64\" }", &[]),
    ("process", "rewarded", "stages.rewarded.format=arrow", &[]),
    ("process", "rewarded", "stages.rewarded.files=[\"other.sh\"]", &[]),
    ("process", "rewarded", "stages.rewarded.env=[\"CARGO_PKG_NAME\"]", &[]),
    ("split", "halves", "stages.halves.outputs={ train = 0.5, validation = 0.5 }", &[]),
    ("split", "halves", "stages.halves.by=position", &[]),
    ("trainer", "align", "stages.align.learning_rate=1e-4", &[]),
    ("trainer", "align", "stages.align.algorithm=sft", &["stages.align.reference=base"]),
    ("trainer", "align", "stages.align.loss=hinge", &[]),
    ("trainer", "align", "stages.align.loss_weights=[0.5]", &[]),
    ("trainer", "align", "stages.align.beta=0.2", &[]),
    ("trainer", "align", "stages.align.label_smoothing=0.1", &[]),
    ("trainer", "align", "stages.align.gamma=0.7", &["stages.align.loss=simpo"]),
    (
        "trainer",
        "align",
        "stages.align.odds_margin=1.0",
        &["stages.completed.sql=\"SELECT prompt, chosen, rejected, gap, chosen AS completion FROM input\""],
    ),
    ("trainer", "align", "stages.align.ld_alpha=0.5", &[]),
    ("trainer", "align", "stages.align.start=fresh_on_merged", &["stages.align.reference=base"]),
    ("trainer", "align", "stages.align.reference=base", &[]),
    ("trainer", "align", "stages.align.ema_alpha=0.3", &["stages.align.reference=ema"]),
    ("trainer", "align", "stages.align.init_adapter=\"adapter\"", &[]),
    ("trainer", "align", "stages.align.template=none", &[]),
    ("trainer", "align", "stages.align.add_bos=true", &["stages.align.template=none"]),
    ("trainer", "align", "stages.align.truncated=drop", &[]),
    ("trainer", "align", "stages.align.order=sequential", &[]),
    ("trainer", "align", "stages.align.consume=collect", &[]),
    ("trainer", "align", "stages.align.epochs=2", &[]),
    ("trainer", "align", "stages.align.batch_size=2", &[]),
    ("trainer", "align", "stages.align.gradient_accumulation_steps=2", &[]),
    ("trainer", "align", "stages.align.pairs_per_step=2", &[]),
    ("trainer", "align", "stages.align.schedule=cosine", &[]),
    ("trainer", "align", "stages.align.warmup_steps=1", &[]),
    ("trainer", "align", "stages.align.weight_decay=0.1", &[]),
    ("trainer", "align", "stages.align.max_grad_norm=0.5", &[]),
    ("trainer", "align", "stages.align.max_length=512", &[]),
    ("trainer", "align", "stages.align.best_metric=loss", &[]),
    ("trainer", "align", "stages.align.eval_steps=5", &["stages.align.best_metric=loss"]),
    ("trainer", "align", "stages.align.early_stopping_patience=1", &["stages.align.best_metric=loss"]),
    ("trainer", "align", "stages.align.lora={ r = 2, alpha = 8 }", &[]),
    ("lora", "align", "stages.align.lora.r=2", &[]),
    ("lora", "align", "stages.align.lora.alpha=4", &[]),
    ("lora", "align", "stages.align.lora.targets=[\"q_proj\"]", &[]),
    ("lora", "align", "stages.align.lora.rslora=true", &[]),
];

/// Changes of keys that decide nothing, one each: it must leave every key as it is.
const CHANGE_NOTHING: &[&str] = &[
    "max_dead_letters=0.5",
    "devices={ cpu = { memory = 0.5 } }",
    "stages.sample.device=\"cpu:1\"",
    "stages.sample.table=false",
    "stages.likely.device=\"cpu:0\"",
    "stages.gate.device=\"cpu:1\"",
    "stages.gate.trainer=align",
    "stages.align.device=\"cpu:0\"",
    "stages.align.micro_batch_tokens=64",
    "stages.align.gradient_checkpointing=true",
    "stages.align.eval_steps=5",
    "stages.rewarded.timeout=5",
    "stages.rewarded.workers=2",
    "stages.rewarded.retries=0",
    "stages.rewarded.secrets=[\"PATH\"]",
    "stages.kept.path=\"elsewhere-{round}.jsonl\"",
    "models.far.api_key=k",
    "models.far.headers={ X-Key = \"k\" }",
    "models.far.timeout=5",
    "models.far.retries=0",
    "models.far.concurrency=2",
    "models.far.requests_per_minute=60",
];

struct Keys {
    case: Case,
    engine: Engine,
}

type Plan = BTreeMap<(u32, String), String>;

impl Keys {
    fn new() -> Self {
        let case = case();
        copy_model(&case);
        Self { case, engine: Engine::new() }
    }

    async fn of(&self, sets: &[&str]) -> Result<Plan, String> {
        let sets: Vec<String> = sets.iter().map(ToString::to_string).collect();
        let flow = Flow::load(&[self.case.path("flow.toml")], &sets, &self.engine).map_err(|e| e.to_string())?;
        let planned = self.engine.planned(&flow, RunOptions::new("")).await;
        planned.map(|planned| planned.plan.keys()).map_err(|e| e.to_string())
    }

    /// The keys that a table has, by what it says of one that it doesn't have.
    async fn known(&self, table: &str) -> BTreeSet<String> {
        let wrong = format!("{table}zzzzzzzzzz=1");
        let message = self.of(&[&wrong]).await.expect_err("an unknown key");
        assert!(message.contains("the keys here are "), "{message}");
        let listed = message.rsplit("the keys here are ").next().unwrap();
        listed.split('`').skip(1).step_by(2).map(str::to_owned).collect()
    }
}

/// The tiny model at another place, with another content.
fn copy_model(case: &Case) {
    std::fs::create_dir(case.path("model")).unwrap();
    for entry in std::fs::read_dir(crate::support::tiny_model()).unwrap().map(Result::unwrap) {
        if entry.file_type().unwrap().is_file() {
            std::fs::copy(entry.path(), case.path("model").join(entry.file_name())).unwrap();
        }
    }
    case.write("model/generation_config.json", "{ \"of\": \"another model\" }");
}

fn name_of(change: &str) -> &str {
    change.split('=').next().unwrap().rsplit('.').next().unwrap()
}

#[tokio::test]
async fn every_key_of_every_kind_is_in_the_key_or_on_a_list() {
    let keys = Keys::new();
    let mut missing = Vec::new();
    let mut looked_at: BTreeSet<&str> = BTreeSet::new();
    for (table, place) in [
        ("", ""),
        ("models", "models.policy."),
        ("devices", "devices.cpu."),
        ("source", "stages.prompts."),
        ("sampler", "stages.sample."),
        ("scorer", "stages.likely."),
        ("judge", "stages.pairwise."),
        ("gate", "stages.gate."),
        ("pairs", "stages.prefer."),
        ("mapper", "stages.completed."),
        ("process", "stages.rewarded."),
        ("split", "stages.halves."),
        ("sink", "stages.kept."),
        ("trainer", "stages.align."),
        ("lora", "stages.align.lora."),
    ] {
        looked_at.insert(table);
        let listed = |key: &str| DECIDE_NOTHING.iter().any(|(of, keys, _)| *of == table && keys.contains(&key));
        let changed = |key: &str| CHANGES.iter().any(|(of, _, change, _)| *of == table && name_of(change) == key);
        let known = keys.known(place).await;
        assert!(!known.is_empty());
        missing
            .extend(known.into_iter().filter(|key| !listed(key) && !changed(key)).map(|key| format!("{table}.{key}")));
    }
    for kind in keys.engine.kind_names() {
        assert!(looked_at.contains(kind) || OF_PROGRAMS.contains(&kind), "the kind {kind} is not looked at");
    }
    assert!(missing.is_empty(), "neither changed nor on the list: {missing:?}");
}

#[tokio::test]
async fn a_key_that_decides_rows_changes_the_key_of_its_stage() {
    let keys = Keys::new();
    let mut faults = Vec::new();
    // Most changes are of the same flow.
    let plain = keys.of(&[]).await;
    for (table, stage, change, before) in CHANGES {
        // The rounds that both have.
        let of_stage = |plan: Plan| {
            let keys = plan.into_iter().filter(|((_, name), _)| name == stage).map(|(_, key)| key);
            keys.take(2).collect::<Vec<_>>()
        };
        let old = if before.is_empty() { plain.clone() } else { keys.of(before).await }.map(of_stage);
        let new = keys.of(&[before, &[*change][..]].concat()).await.map(of_stage);
        match (old, new) {
            (Ok(old), Ok(new)) if old != new => {}
            (Ok(_), Ok(_)) => faults.push(format!("{table}: {change} is in no key")),
            (Err(error), _) | (_, Err(error)) => faults.push(format!("{table}: {change}: {error}")),
        }
    }
    assert!(faults.is_empty(), "{faults:#?}");
}

#[tokio::test]
async fn a_key_that_decides_nothing_leaves_every_key_as_it_is() {
    let keys = Keys::new();
    let plain = keys.of(&[]).await.unwrap();
    for change in CHANGE_NOTHING {
        let new = keys.of(&[change]).await.unwrap_or_else(|e| panic!("{change}: {e}"));
        let changed: Vec<_> = plain.iter().filter(|(id, key)| new.get(*id) != Some(*key)).collect();
        assert!(changed.is_empty(), "{change} changes {changed:?}");
    }
}

/// The stages whose keys a change of the date changes.
#[tokio::test]
async fn a_date_is_in_the_keys_of_those_whose_template_asks() {
    let keys = Keys::new();
    let asks = "models.policy.chat_template=\"{{ strftime_now('%d %b') }}{{ messages[0].content }}\"";
    let twin = "models.twin={ source = \"model\", dtype = \"f32\" }";
    let changed = async |sets: &[&str]| {
        let old = keys.of(&[sets, &["date=2026-11-27"]].concat()).await.unwrap();
        let new = keys.of(&[sets, &["date=\"2026-11-28\""]].concat()).await.unwrap();
        let changed = old.into_iter().filter(|(id, key)| new.get(id) != Some(key)).map(|((_, stage), _)| stage);
        changed.collect::<BTreeSet<String>>()
    };
    assert_eq!(changed(&[]).await, BTreeSet::new(), "no template asks");
    let all = changed(&[asks]).await;
    assert!(
        ["sample", "pairwise", "ruled", "align", "likely", "gate"].iter().all(|stage| all.contains(*stage)),
        "{all:?}"
    );
    assert!(["prompts", "queried", "rewarded"].iter().all(|stage| !all.contains(*stage)), "{all:?}");
    // Of its own input alone: the rows before it are another model's, which is not told the date.
    let plain = [
        asks,
        twin,
        "rounds=1",
        "stages.sample.model=twin",
        "stages.align.template=none",
        "stages.likely.template=none",
    ];
    let some = changed(&plain).await;
    assert_eq!(some, ["gate", "pairwise", "scored", "written"].map(str::to_owned).into());
    for wrong in ["date=tomorrow", "date=2026-02-30", "date=2026-11-28T10:00:00Z", "date=20261128"] {
        let message = keys.of(&[wrong]).await.expect_err(wrong);
        assert!(message.contains("--set 1: date:") && message.contains("is no date"), "{message}");
    }
}

/// Files that are opened are known by their content, wherever they lie, before anything is superseded.
#[test]
fn a_model_with_another_content_is_told_before_its_rows_are_made_again() {
    let case = Case::new(
        8,
        &crate::support::tiny_flow(1, "")
            .replace(&format!("source = {:?}", crate::support::tiny_model()), "source = \"model\""),
    );
    copy_model(&case);
    case.done(&["flow.toml"]);
    case.write("model/generation_config.json", "{ \"of\": \"a third model\" }");
    let refused = case.run(&["flow.toml"]);
    let message = stderr(&refused);
    assert_eq!(refused.status.code(), Some(2), "{message}");
    assert!(message.contains("`sample` changed: content"), "{message}");
    assert!(!case.path("runs/tiny/superseded").exists());
    case.done(&["flow.toml", "--recompute"]);
    assert_eq!(case.summary()["rounds"][0]["stages"]["sample"]["reused_rows"], 0);
}
