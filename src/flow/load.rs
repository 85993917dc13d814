//! From files and `--set` entries to a [`Flow`].

use std::collections::{BTreeMap, BTreeSet};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use chrono::NaiveDate;
use serde::Deserialize;
use toml::{Table, Value};

use super::device::DeviceSpec;
use super::document::{Document, Places};
use super::hub::HubLogin;
use super::kind::Access;
use super::model::ModelKeys;
use super::names;
use super::spec::RoundOverlay;
use super::{Contents, Flow, FlowError, InputKey, InputRef, KindLookup, Masks, StageSpec};
use super::{env, options};

impl Flow {
    /// Reads flow files, left to right over each other, then `--set` entries (`a.b=VALUE`), then the
    /// environment. `kinds` says which keys of a stage are inputs.
    ///
    /// # Errors
    /// A file that can't be read, malformed TOML, an unknown key, a wrong type, a variable that is
    /// not set: with file and line. What needs the whole graph is left to [`super::Plan`].
    pub fn load(files: &[PathBuf], sets: &[String], kinds: &dyn KindLookup) -> Result<Flow, FlowError> {
        let Some(first) = files.first() else {
            return Err(FlowError::new("", "no flow file is given"));
        };
        let base = first.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let name = first.file_stem().map(|stem| stem.to_string_lossy().into_owned()).unwrap_or_default();
        let mut document = read_file(first)?;
        for file in files.iter().skip(1) {
            document.overlay(read_file(file)?);
        }
        finish(document, sets, base, &name, kinds, &|name| std::env::var(name).ok())
    }

    /// A flow from text, for one that is built in. `base` is where its relative paths start.
    ///
    /// # Errors
    /// As [`Flow::load`]; places name the file `flow.toml`.
    pub fn from_toml(text: &str, base: &Path, sets: &[String], kinds: &dyn KindLookup) -> Result<Flow, FlowError> {
        Self::from_toml_with(text, base, sets, kinds, &|name| std::env::var(name).ok())
    }

    /// As [`Flow::from_toml`], with an environment of the caller's for `${VAR}`.
    ///
    /// # Errors
    /// As [`Flow::from_toml`].
    pub fn from_toml_with(
        text: &str,
        base: &Path,
        sets: &[String],
        kinds: &dyn KindLookup,
        environment: &dyn Fn(&str) -> Option<String>,
    ) -> Result<Flow, FlowError> {
        finish(Document::parse(text, Path::new("flow.toml"))?, sets, base, "flow", kinds, environment)
    }
}

fn read_file(file: &Path) -> Result<Document, FlowError> {
    let unreadable = |message: String| FlowError { place: Some((file.to_owned(), 0)), ..FlowError::new("", message) };
    let bytes = std::fs::read(file).map_err(|error| match error.kind() {
        ErrorKind::NotFound => unreadable("there is no such file".into()).help("name a flow file that exists"),
        ErrorKind::IsADirectory => unreadable("is a folder".into()).help("name the flow file in it"),
        _ => unreadable(format!("can't be read: {error}")),
    })?;
    let text = String::from_utf8(bytes).map_err(|_| unreadable("is not UTF-8 text".into()))?;
    Document::parse(&text, file)
}

fn finish(
    mut document: Document,
    sets: &[String],
    base: &Path,
    default_name: &str,
    kinds: &dyn KindLookup,
    environment: &dyn Fn(&str) -> Option<String>,
) -> Result<Flow, FlowError> {
    for (number, entry) in sets.iter().enumerate() {
        document.overlay(Document::parse_set(entry, number + 1)?);
    }
    if !document.table.contains_key("name") {
        document.table.insert("name".into(), default_name.into());
    }
    let written = document.table.clone();
    let mut masks = Masks::default();
    env::substitute(&mut document.table, &mut masks, environment)
        .and_then(|()| build(&document, base, kinds))
        .inspect(|flow| mask_secrets(flow, kinds, &mut masks))
        .map(|flow| Flow { written: Arc::new(written), masks: Arc::new(masks.clone()), ..flow })
        .map_err(|error| document.places.attach(masks.error(error)))
}

/// A program that is given a secret may show it.
fn mask_secrets(flow: &Flow, kinds: &dyn KindLookup, masks: &mut Masks) {
    for stage in flow.stages.iter().chain(flow.overlays.iter().flat_map(|overlay| &overlay.stages)) {
        let opened = kinds.kind(&stage.kind).map(|kind| kind.opens(stage)).unwrap_or_default();
        for (key, access) in opened {
            if let ("secrets", Access::Variable(name)) = (key, access)
                && let Some(value) = std::env::var_os(&name)
            {
                masks.add(&name, &value.to_string_lossy());
            }
        }
    }
}

/// The keys of a flow file.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct TopLevel {
    name: String,
    #[serde(default = "one")]
    rounds: u32,
    #[serde(default)]
    seed: u64,
    #[serde(default)]
    deterministic: bool,
    #[serde(default = "one_in_twenty")]
    max_dead_letters: f64,
    date: Option<Value>,
    #[serde(default)]
    models: BTreeMap<String, ModelKeys>,
    #[serde(default)]
    devices: BTreeMap<String, DeviceSpec>,
    #[serde(default)]
    stages: BTreeMap<String, Table>,
    #[serde(default)]
    round: BTreeMap<String, RoundTable>,
}

/// `[round.N]`
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RoundTable {
    #[serde(default)]
    stages: BTreeMap<String, Table>,
}

fn one() -> u32 {
    1
}

fn one_in_twenty() -> f64 {
    0.05
}

fn build(document: &Document, base: &Path, kinds: &dyn KindLookup) -> Result<Flow, FlowError> {
    if let Some(Value::Integer(rounds)) = document.table.get("round") {
        let error = FlowError::new("round", "is the table of changes to later rounds");
        return Err(error.help(format!("did you mean rounds = {rounds}?")));
    }
    let top: TopLevel = options::read(&document.table, "")?;
    check_top_level(&top)?;
    let models = top.models.iter().map(|(name, keys)| {
        let spec = keys.clone().checked(&format!("models.{name}"))?;
        Ok((name.clone(), spec))
    });
    let models = models.collect::<Result<_, FlowError>>()?;
    let stages = read_stages(&document.table, kinds)?;
    let overlays = read_overlays(document, &top, kinds)?;
    Ok(Flow {
        name: top.name,
        rounds: top.rounds,
        seed: top.seed,
        deterministic: top.deterministic,
        max_dead_letters: top.max_dead_letters,
        date: top.date.as_ref().map(read_date).transpose()?,
        contents: Contents::default(),
        models,
        devices: DeviceSpec::by_device(top.devices)?,
        stages,
        base: base.to_owned(),
        device_override: None,
        hub: HubLogin::default(),
        places: Arc::new(document.places.clone()),
        overlays: Arc::new(overlays),
        written: Arc::default(),
        masks: Arc::default(),
    })
}

fn check_top_level(top: &TopLevel) -> Result<(), FlowError> {
    // The name becomes a directory.
    let plain = |c: char| c.is_alphanumeric() || matches!(c, '-' | '_' | '.');
    if !top.name.starts_with(char::is_alphanumeric) || !top.name.chars().all(plain) {
        return Err(FlowError::new("name", format!("`{}` can't be the name of a run directory", top.name))
            .help("use letters, digits, `-`, `_` and `.`, beginning with a letter or digit"));
    }
    if top.rounds == 0 {
        return Err(FlowError::new("rounds", "a flow has at least one round"));
    }
    if !(0.0..=1.0).contains(&top.max_dead_letters) {
        return Err(FlowError::new("max_dead_letters", "is a share of the rows, from 0 to 1"));
    }
    if top.stages.is_empty() {
        return Err(FlowError::new("", "the flow has no stage").help("add a table like [stages.prompts]"));
    }
    for (table, name) in
        top.models.keys().map(|name| ("models", name)).chain(top.stages.keys().map(|name| ("stages", name)))
    {
        if !names::is_name(name) {
            return Err(FlowError::new(format!("{table}.{name}"), format!("`{name}` is not a name"))
                .help("names have the letters a to z, digits and `_`, and begin with a letter"));
        }
    }
    Ok(())
}

/// Reads a date, which has one form: the same date is the same text.
fn read_date(value: &Value) -> Result<NaiveDate, FlowError> {
    let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    let date = text.parse::<NaiveDate>().ok().filter(|date| date.to_string() == text);
    date.ok_or_else(|| {
        FlowError::new("date", format!("`{text}` is no date")).help("write it as year, month and day: \"2026-11-28\"")
    })
}

fn read_overlays(document: &Document, top: &TopLevel, kinds: &dyn KindLookup) -> Result<Vec<RoundOverlay>, FlowError> {
    let mut rounds = BTreeSet::new();
    for (name, overlay) in &top.round {
        let key = format!("round.{name}");
        let number = name.parse::<u32>().ok().filter(|number| *number >= 2 && number.to_string() == *name);
        rounds.insert(number.ok_or_else(|| {
            FlowError::new(&key, format!("`{name}` is not the number of a later round"))
                .help("[round.2.stages.NAME] changes a stage from round 2 on; [stages.NAME] holds for round 1")
        })?);
        let known: Vec<&str> = top.stages.keys().map(String::as_str).collect();
        if let Some(unknown) = overlay.stages.keys().find(|stage| !top.stages.contains_key(*stage)) {
            return Err(FlowError::new(format!("{key}.stages.{unknown}"), format!("there is no stage `{unknown}`"))
                .help(names::suggest(unknown, &known)));
        }
    }
    let mut applied = Vec::new();
    let mut overlays = Vec::new();
    for round in rounds {
        applied.push(round);
        let at_round = document.for_round(&applied);
        let stages = read_stages(&at_round.table, kinds).map_err(|error| at_round.places.attach(error))?;
        overlays.push(RoundOverlay { from: round, stages, places: Arc::<Places>::new(at_round.places) });
    }
    Ok(overlays)
}

fn read_stages(table: &Table, kinds: &dyn KindLookup) -> Result<Vec<StageSpec>, FlowError> {
    let Some(stages) = table.get("stages").and_then(Value::as_table) else { return Ok(Vec::new()) };
    let read = |(name, stage): (&String, &Value)| match stage {
        // An overlay or `--set` that misspells a stage makes a new one without a kind.
        Value::Table(stage) if !stage.contains_key("kind") => Err(no_kind(name, stages, kinds)),
        Value::Table(stage) => read_stage(name, stage.clone(), kinds),
        _ => Err(FlowError::new(format!("stages.{name}"), "expected a table")),
    };
    stages.iter().map(read).collect()
}

fn no_kind(name: &str, stages: &Table, kinds: &dyn KindLookup) -> FlowError {
    let others: Vec<&str> = stages.keys().map(String::as_str).filter(|other| *other != name).collect();
    let help = match names::closest(name, &others) {
        Some(guess) => format!("did you mean the stage `{guess}`?"),
        None => format!("the kinds are {}", names::list(&kinds.kind_names())),
    };
    FlowError::new(format!("stages.{name}"), "the stage has no `kind`").help(help)
}

fn read_stage(name: &str, mut table: Table, kinds: &dyn KindLookup) -> Result<StageSpec, FlowError> {
    let path = format!("stages.{name}");
    let known = kinds.kind_names();
    let Some(Value::String(kind)) = table.remove("kind") else {
        return Err(FlowError::new(format!("{path}.kind"), "expected a string"));
    };
    let inputs = kinds.kind(&kind).map(|kind| kind.inputs()).ok_or_else(|| {
        FlowError::new(format!("{path}.kind"), format!("there is no kind `{kind}`")).help(names::suggest(&kind, &known))
    })?;
    let in_rounds = table.remove("in_rounds").map(|value| read_in_rounds(value, &path)).transpose()?;
    let keeps = table.remove("table").map(|value| read_flag(&value, &path, "table")).transpose()?;
    let mut refs = Vec::new();
    for key in inputs {
        match table.remove(key.name) {
            Some(value) => refs.extend(read_input(key, value, &path)?),
            None if key.required => return Err(missing_input(key, &table, &path)),
            None => {}
        }
    }
    Ok(StageSpec { name: name.into(), kind, inputs: refs, in_rounds, table: keeps.unwrap_or(true), options: table })
}

fn read_flag(value: &Value, path: &str, key: &str) -> Result<bool, FlowError> {
    value.as_bool().ok_or_else(|| FlowError::new(format!("{path}.{key}"), "expected true or false"))
}

fn read_in_rounds(value: Value, path: &str) -> Result<Vec<u32>, FlowError> {
    let key = format!("{path}.in_rounds");
    let rounds = value.as_array().map(|list| {
        list.iter()
            .map(|round| round.as_integer().and_then(|round| u32::try_from(round).ok()).filter(|round| *round > 0))
    });
    match rounds.and_then(|rounds| rounds.collect::<Option<Vec<u32>>>()) {
        Some(rounds) if !rounds.is_empty() => Ok(rounds),
        _ => Err(FlowError::new(key, "expected a list of rounds, the first is 1").help("write in_rounds = [1]")),
    }
}

fn read_input(key: &InputKey, value: Value, path: &str) -> Result<Vec<(String, InputRef)>, FlowError> {
    let at = format!("{path}.{}", key.name);
    let named = |value: &Value| {
        let text = value.as_str().ok_or_else(|| FlowError::new(&at, "expected the name of a stage"))?;
        let (stage, port) = text.split_once('.').unwrap_or((text, ""));
        if !names::is_name(stage) || port.contains('.') || (text.contains('.') && port.is_empty()) {
            return Err(
                FlowError::new(&at, format!("`{text}` does not name a stage")).help("write STAGE or STAGE.OUTPUT")
            );
        }
        Ok((key.name.to_owned(), InputRef { stage: stage.into(), port: port.into() }))
    };
    match &value {
        Value::Array(list) if key.many && !list.is_empty() => list.iter().map(named).collect(),
        Value::Array(_) if key.many => Err(FlowError::new(at, "the list of inputs is empty")),
        Value::Array(_) => Err(FlowError::new(at, "takes one stage, not a list")),
        value => Ok(vec![named(value)?]),
    }
}

/// A required input is absent: perhaps it was misspelt.
fn missing_input(key: &InputKey, table: &Table, path: &str) -> FlowError {
    let misspelt = table.keys().find_map(|name| {
        let error = names::unknown_key(path, name, &[key.name]);
        error.help.as_ref().is_some_and(|help| help.starts_with("did you mean")).then_some(error)
    });
    misspelt.unwrap_or_else(|| {
        FlowError::new(format!("{path}.{}", key.name), "this key is required")
            .help(format!("add `{} = \"STAGE\"`, the stage whose rows it reads", key.name))
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::Plan;
    use super::super::fake::{Kinds, SELF_REWARD};
    use super::*;

    fn load(text: &str) -> Result<Flow, FlowError> {
        Flow::from_toml(text, Path::new("."), &[], &Kinds)
    }

    fn message(text: &str) -> String {
        load(text).expect_err("must fail").to_string()
    }

    #[test]
    fn the_recipe_loads() {
        let flow = load(SELF_REWARD).expect("valid");
        assert_eq!((flow.name.as_str(), flow.rounds, flow.seed), ("self-reward", 3, 7));
        let names: Vec<&str> = flow.stages.iter().map(|stage| stage.name.as_str()).collect();
        assert_eq!(names, ["prompts", "sample", "judge", "prefer", "halves", "align"], "file order");
        let align = flow.stage("align").expect("exists");
        assert_eq!(
            align.inputs.iter().map(|(key, from)| format!("{key}={from}")).collect::<Vec<_>>(),
            ["train=halves.train", "validation=halves.validation"]
        );
        assert!(!align.options.contains_key("kind") && !align.options.contains_key("train"));
    }

    #[test]
    fn files_overlay_and_sets_win() {
        let dir = tempfile::tempdir().expect("a directory");
        let (a, b) = (dir.path().join("base.toml"), dir.path().join("over.toml"));
        std::fs::write(&a, SELF_REWARD).expect("written");
        std::fs::write(&b, "seed = 9\n[stages.sample]\ncandidates = 4\ntemperature = 0.7\n").expect("written");
        let sets = ["stages.sample.candidates=5".to_owned(), "rounds=1".to_owned()];
        let flow = Flow::load(&[a.clone(), b.clone()], &sets, &Kinds).expect("valid");
        let sample = &flow.stage("sample").expect("exists").options;
        assert_eq!((flow.seed, flow.rounds), (9, 1));
        assert_eq!(sample["candidates"].as_integer(), Some(5));
        assert_eq!(flow.places.find("stages.sample.temperature"), Some(&(b, 4)));
        assert_eq!(flow.places.find("stages.sample.candidates"), Some(&(PathBuf::from("--set"), 1)));
        assert_eq!(flow.base, dir.path());

        let error = Flow::load(std::slice::from_ref(&a), &["sead=1".to_owned()], &Kinds).expect_err("unknown key");
        assert_eq!(error.to_string(), "--set 1: sead: unknown key\n  help: did you mean `seed`?");
        let error = Flow::load(&[dir.path().join("none.toml")], &[], &Kinds).expect_err("missing");
        assert!(error.to_string().contains("none.toml: there is no such file"), "{error}");
        std::fs::write(&a, b"\xff\xfe").expect("written");
        assert!(Flow::load(&[a], &[], &Kinds).expect_err("bytes").to_string().contains("is not UTF-8"));
    }

    #[test]
    fn mistakes_name_their_place_and_remedy() {
        let source = "[stages.a]\nkind = 'source'\n";
        let cases = [
            (
                "num_rounds = 3\n",
                "flow.toml:1: num_rounds: unknown key\n  help: did you mean `rounds`? That is what `num_rounds` is called here",
            ),
            ("rounds = 'x'\n", "flow.toml:1: rounds: expected a whole number from 0 up, not the string \"x\""),
            ("rounds = 0\n", "flow.toml:1: rounds: a flow has at least one round"),
            ("name = '../x'\n", "flow.toml:1: name: `../x` can't be"),
            (
                "[models.p]\nmodel_name = 'x'\n",
                "flow.toml:2: models.p.model_name: unknown key\n  help: did you mean `source`?",
            ),
            ("[models.p]\ndtype = 'f32'\n", "flow.toml:1: models.p.source: this key is required"),
            ("[models.P]\nsource = 'x'\n", "flow.toml:1: models.P: `P` is not a name"),
            (
                "[devices.gpu0]\nmemory = 0.5\n",
                "flow.toml:1: devices.gpu0: `gpu0` is not a device; they are cpu, cpu:N and cuda:N\n  help: did you mean [devices.\"cuda:0\"]?",
            ),
            (
                "[devices.'cdua:0']\nmemory = 0.5\n",
                "flow.toml:1: devices.cdua:0: `cdua:0` is not a device; they are cpu, cpu:N and cuda:N\n  help: did you mean [devices.\"cuda:0\"]?",
            ),
            ("[devices.auto]\nmemory = 0.5\n", "flow.toml:1: devices.auto: `auto` is not a device of its own"),
            (
                "[devices.'cuda:0']\n\nmemry = 0.5\n",
                "flow.toml:3: devices.cuda:0.memry: unknown key\n  help: did you mean `memory`?",
            ),
            (
                "[devices.'cuda:0']\ngpu_memory_utilization = 0.5\n",
                "flow.toml:2: devices.cuda:0.gpu_memory_utilization: unknown key\n  help: did you mean `memory`?",
            ),
            ("[devices.'cuda:0']\nmemory = 0\n", "flow.toml:2: devices.cuda:0.memory: is a share of"),
            ("[devices.'cuda:0']\nmemory = 1.1\n", "flow.toml:2: devices.cuda:0.memory: is a share of"),
            ("[devices.'cuda:0']\nmemory = nan\n", "flow.toml:2: devices.cuda:0.memory: is a share of"),
            ("[devices.'cuda:0']\nmemory = '8 GiB'\n", "flow.toml:2: devices.cuda:0.memory: expected a number"),
            ("[devices.'cuda:0']\ngraphs = 1\n", "flow.toml:2: devices.cuda:0.graphs: expected true or false"),
            (
                "[devices.cpu]\ngraphs = false\n",
                "flow.toml:2: devices.cpu.graphs: cpu:0 is a CPU, which has no CUDA graphs",
            ),
            ("[devices.cpu]\nflash = true\n", "flow.toml:2: devices.cpu.flash: cpu:0 is a CPU, which has no flash"),
            ("[devices.'cpu:1']\nkernels = false\n", "flow.toml:2: devices.cpu:1.kernels: cpu:1 is a CPU"),
            (
                "[devices.'cuda:0']\nflash_attention = false\n",
                "flow.toml:2: devices.cuda:0.flash_attention: unknown key\n  help: did you mean `flash`?",
            ),
            ("[devices.cpu]\n[devices.'cpu:0']\n", "flow.toml:2: devices.cpu:0: cpu:0 has two tables"),
            ("devices = 0.5\n", "flow.toml:1: devices: expected a table, not the number"),
            (
                "[stages.b]\nkind = 'sorce'\n",
                "flow.toml:2: stages.b.kind: there is no kind `sorce`\n  help: did you mean `source`?",
            ),
            ("[stages.b]\ninput = 'a'\n", "flow.toml:1: stages.b: the stage has no `kind`"),
            (
                "[stages.b]\nkind = 'sampler'\nimput = 'a'\n",
                "flow.toml:3: stages.b.imput: unknown key\n  help: did you mean `input`?",
            ),
            ("[stages.b]\nkind = 'sampler'\n", "flow.toml:1: stages.b.input: this key is required"),
            (
                "[stages.b]\nkind = 'sampler'\ninput = ['a']\n",
                "flow.toml:3: stages.b.input: takes one stage, not a list",
            ),
            (
                "[stages.b]\nkind = 'sampler'\ninput = 'a.b.c'\n",
                "flow.toml:3: stages.b.input: `a.b.c` does not name a stage",
            ),
            (
                "[stages.b]\nkind = 'sampler'\ninput = 'a'\nin_rounds = [0]\n",
                "flow.toml:4: stages.b.in_rounds: expected a list",
            ),
            (
                "[stages.b]\nkind = 'source'\nenv_path = '${FLOWRUN_SURELY_UNSET}'\n",
                "flow.toml:3: stages.b.env_path: the environment variable FLOWRUN_SURELY_UNSET is not set",
            ),
            ("[round.1.stages.a]\nx = 1\n", "flow.toml:1: round.1: `1` is not the number of a later round"),
            ("[round.2.stages.b]\nx = 1\n", "flow.toml:1: round.2.stages.b: there is no stage `b`"),
            ("[round.2]\nmodels = 1\n", "flow.toml:2: round.2.models: unknown key"),
            ("[round.2.stages.a]\n\nkind = 'x'\n", "flow.toml:3: stages.a.kind: there is no kind `x`"),
            ("stages = 3\n", "flow.toml:"),
        ];
        let error = Flow::from_toml(SELF_REWARD, Path::new("."), &["stages.sampl.candidates=3".into()], &Kinds);
        let expected = "--set 1: stages.sampl: the stage has no `kind`\n  help: did you mean the stage `sample`?";
        assert_eq!(error.expect_err("no such stage").to_string(), expected);
        for (text, expected) in cases {
            let text = if text.starts_with("stages =") { text.to_owned() } else { format!("{text}{source}") };
            let message = message(&text);
            assert!(message.starts_with(expected), "{text}\n{message}\n{expected}");
        }
    }

    #[test]
    fn overlays_hold_from_their_round_on() {
        let flow = load(&format!(
            "{SELF_REWARD}\n[round.2.stages.sample]\ntemperature = 0.8\n[round.3.stages.sample]\ncandidates = 8\n"
        ))
        .expect("valid");
        let of = |round: u32, key: &str| {
            flow.for_round(round).stage("sample").and_then(|stage| stage.options.get(key).cloned())
        };
        assert_eq!(of(1, "temperature"), Some(Value::Float(1.0)));
        assert_eq!(of(2, "temperature"), Some(Value::Float(0.8)));
        assert_eq!(of(3, "temperature"), Some(Value::Float(0.8)));
        assert_eq!((of(2, "candidates"), of(9, "candidates")), (Some(Value::Integer(2)), Some(Value::Integer(8))));
        let lines = SELF_REWARD.lines().count();
        assert_eq!(flow.for_round(2).places.find("stages.sample.temperature").map(|place| place.1), Some(lines + 3));
    }

    #[test]
    fn the_written_flow_loads_again_without_its_secrets() {
        let text = format!("{SELF_REWARD}\n[stages.more]\nkind = 'source'\napi_key = 'hunter2'\n");
        let flow = load(&text).expect("valid");
        let written = flow.to_toml();
        assert!(!written.contains("hunter2") && written.contains("***"), "{written}");
        assert_eq!(load(&written).expect("valid").to_toml(), written);
    }

    /// Text that is often close to a flow.
    fn some_text() -> impl Strategy<Value = String> {
        let word = prop_oneof![
            Just("name"),
            Just("rounds"),
            Just("stages"),
            Just("stages.a"),
            Just("models"),
            Just("models.m"),
            Just("round.2.stages.a"),
            Just("kind"),
            Just("input"),
            Just("in_rounds"),
            Just("source"),
            Just("seed"),
            Just("\"source\""),
            Just("\"sampler\""),
            Just("\"a.b\""),
            Just("[1]"),
            Just("{ a = 1 }"),
            Just("3"),
            Just("-1"),
            Just("nan"),
            Just("\"${X\""),
            Just("1979-05-27"),
            Just("\"é\n\""),
            Just("'''\n'''"),
        ];
        let line = prop_oneof![
            word.clone().prop_map(|word| format!("[{word}]")),
            (word.clone(), word).prop_map(|(key, value)| format!("{key} = {value}")),
            any::<String>(),
        ];
        prop::collection::vec(line, 0..12).prop_map(|lines| lines.join("\n"))
    }

    proptest! {
        #[test]
        fn any_text_loads_or_fails_with_a_place(text in some_text(), set in any::<String>()) {
            let planned = load(&text).and_then(|flow| futures::executor::block_on(Plan::new(&flow, &Kinds)));
            if let Err(error) = planned {
                prop_assert!(error.place.is_some(), "{error}");
            }
            let _ = Flow::from_toml(SELF_REWARD, Path::new("."), &[set], &Kinds);
        }

        #[test]
        fn a_flow_over_itself_is_itself(candidates in 1..9i64, temperature in 0.0..2.0f64, rounds in 1..5u32) {
            let text = format!("{SELF_REWARD}\n[round.2.stages.sample]\ncandidates = {candidates}\ntemperature = {temperature}\n");
            let text = text.replace("rounds = 3", &format!("rounds = {rounds}"));
            let dir = tempfile::tempdir().expect("a directory");
            let file = dir.path().join("f.toml");
            std::fs::write(&file, text).expect("written");
            let once = Flow::load(std::slice::from_ref(&file), &[], &Kinds).expect("valid");
            let twice = Flow::load(&[file.clone(), file], &[], &Kinds).expect("valid");
            prop_assert_eq!(once.to_toml(), twice.to_toml());
            prop_assert_eq!(once.for_round(2).stages, twice.for_round(2).stages);
        }
    }
}
