//! The plan: a checked, typed graph of stages for every round.
//!
//! Each round is planned in two passes. The kinds check their stages along the data edges, because
//! a stage can only be checked when the columns that reach it are known. Only then is it known
//! which stages wait for an adapter of the same round; those waits join the edges, and the final
//! order (and the search for cycles) is over both.

use std::collections::BTreeMap;

use super::{
    AdapterChoice, Canonical, CheckContext, Flow, FlowError, Form, InputPlan, InputRef, KindLookup, ModelUse, Port,
    StageKind, StagePlan, StageSpec, graph, names,
};

/// Rounds beyond this are a typing error, not a flow.
const MOST_ROUNDS: u32 = 10_000;

/// A flow after validation.
#[derive(Debug, Clone)]
pub struct Plan {
    pub flow: Flow,
    /// Round 1 first.
    pub rounds: Vec<RoundPlan>,
    /// What is odd but allowed, one line each.
    pub notes: Vec<String>,
}

#[derive(Debug, Clone)]
pub struct RoundPlan {
    /// From 1.
    pub round: u32,
    /// Those that run in this round, each after everything it reads or waits for.
    pub stages: Vec<PlannedStage>,
    /// Readers in this round of each output, ports by their full name.
    pub consumers: BTreeMap<InputRef, Vec<Consumer>>,
}

/// One stage in one round.
#[derive(Debug, Clone)]
pub struct PlannedStage {
    /// As it is written in this round, overlays laid on.
    pub spec: StageSpec,
    pub inputs: Vec<PlannedInput>,
    pub plan: StagePlan,
    /// The stage that numbered its rows: the one without inputs, or that made new rows, which it
    /// descends from through its first input; itself if it is one.
    pub source: String,
    /// Plan key: everything known before the run that decides its rows, 64 hex digits.
    pub key: String,
    /// What the key is the hash of.
    pub parts: Form,
}

#[derive(Debug, Clone)]
pub struct PlannedInput {
    pub input: InputPlan,
    /// The round whose rows are read: an earlier one where the producer's `in_rounds` leaves this
    /// round out.
    pub round: u32,
}

/// A reader of an output.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Consumer {
    pub stage: String,
    /// The reader's key: `input`, `train`, ...
    pub key: String,
}

impl Plan {
    /// Checks the whole flow. Nothing is loaded; kinds look at the files they name.
    ///
    /// # Errors
    /// The first mistake, with its place.
    pub async fn new(flow: &Flow, kinds: &dyn KindLookup) -> Result<Plan, FlowError> {
        let mut plan = Plan { flow: flow.clone(), rounds: Vec::new(), notes: Vec::new() };
        if !(1..=MOST_ROUNDS).contains(&flow.rounds) {
            let error = FlowError::new("rounds", format!("has to be between 1 and {MOST_ROUNDS}"));
            return Err(flow.places.attach(error));
        }
        for round in 1..=flow.rounds {
            let view = flow.for_round(round);
            let builder = RoundBuilder { flow: &view, kinds, round, earlier: &plan.rounds, trainers: trainers(&view) };
            let planned = builder.build().await.map_err(|error| view.places.attach(error))?;
            plan.rounds.push(planned);
        }
        plan.check_loop().map_err(|error| flow.places.attach(error))?;
        plan.notes = plan.odd();
        Ok(plan)
    }

    /// The round with this number (from 1).
    pub fn round(&self, round: u32) -> Option<&RoundPlan> {
        self.rounds.get(usize::try_from(round).ok()?.checked_sub(1)?)
    }

    /// Plan keys by round and stage.
    pub fn keys(&self) -> BTreeMap<(u32, String), String> {
        self.stages().map(|(round, stage)| ((round, stage.spec.name.clone()), stage.key.clone())).collect()
    }

    fn stages(&self) -> impl Iterator<Item = (u32, &PlannedStage)> {
        self.rounds.iter().flat_map(|round| round.stages.iter().map(|stage| (round.round, stage)))
    }

    /// More than one round only makes sense where a later round reads what an earlier one trained.
    fn check_loop(&self) -> Result<(), FlowError> {
        for (first, trainer) in self.stages().filter(|(_, stage)| stage.plan.trains.is_some()) {
            let name = &trainer.spec.name;
            let read = self.stages().any(|(round, stage)| {
                round > first && stage.plan.models.iter().any(|model| model.adapter.trainer() == Some(name))
            });
            if first < self.flow.rounds && !read && !self.runs_before(name, first) {
                let message = format!(
                    "{} rounds, but no stage of a later round reads the adapter that `{name}` trains",
                    self.flow.rounds
                );
                return Err(FlowError::new("rounds", message)
                    .help("write rounds = 1, or let a stage use the trained model with adapter = \"previous\""));
            }
        }
        Ok(())
    }

    fn runs_before(&self, stage: &str, round: u32) -> bool {
        self.rounds.iter().take_while(|plan| plan.round < round).any(|plan| plan.stage(stage).is_some())
    }

    fn odd(&self) -> Vec<String> {
        let mut notes = Vec::new();
        let told = self.flow.date.map(|date| format!("it is told {date}"));
        for model in &self.flow.contents.dated {
            let told = told.as_deref().unwrap_or("it is told that of the first start");
            notes.push(format!("the chat template of `{model}` asks for the date; {told}"));
        }
        for model in self.flow.models.keys() {
            let used = self.stages().any(|(_, stage)| {
                stage.plan.trains.as_ref() == Some(model)
                    || stage.plan.models.iter().any(|client| client.model == *model)
            });
            if !used {
                notes.push(format!("no stage uses the model `{model}`"));
            }
        }
        for spec in &self.flow.stages {
            let planned: Vec<&PlannedStage> = self.rounds.iter().filter_map(|round| round.stage(&spec.name)).collect();
            let Some(first) = planned.first() else {
                notes.push(format!("`{}` runs in none of the {} rounds", spec.name, self.flow.rounds));
                continue;
            };
            for port in &first.plan.outputs {
                let output = InputRef { stage: spec.name.clone(), port: port.name.clone() };
                let read = self.stages().any(|(_, stage)| stage.inputs.iter().any(|input| input.input.from == output));
                if !read {
                    notes.push(format!("no stage reads `{output}`"));
                }
            }
        }
        notes
    }
}

impl RoundPlan {
    pub fn stage(&self, name: &str) -> Option<&PlannedStage> {
        self.stages.iter().find(|stage| stage.spec.name == name)
    }
}

/// For every model, the stages that train it.
fn trainers(flow: &Flow) -> BTreeMap<String, Vec<String>> {
    let mut trainers: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for stage in flow.stages.iter().filter(|stage| stage.kind == "trainer") {
        if let Some(model) = stage.options.get("model").and_then(toml::Value::as_str) {
            trainers.entry(model.to_owned()).or_default().push(stage.name.clone());
        }
    }
    trainers
}

struct RoundBuilder<'a> {
    /// The flow as it is in this round.
    flow: &'a Flow,
    kinds: &'a dyn KindLookup,
    round: u32,
    earlier: &'a [RoundPlan],
    trainers: BTreeMap<String, Vec<String>>,
}

impl RoundBuilder<'_> {
    async fn build(&self) -> Result<RoundPlan, FlowError> {
        self.check_names()?;
        let specs: Vec<&StageSpec> = self.flow.stages.iter().filter(|stage| stage.runs_in(self.round)).collect();
        let mut edges = Vec::new();
        for (to, spec) in specs.iter().enumerate() {
            let producers = spec.inputs.iter().filter_map(|(_, from)| position(&specs, &from.stage));
            edges.extend(producers.map(|from| (from, to)));
        }
        let order = graph::order(specs.len(), &edges).map_err(|cycle| self.cycle(&specs, &cycle))?;

        let mut checked: BTreeMap<usize, PlannedStage> = BTreeMap::new();
        for index in order {
            let Some(spec) = specs.get(index) else { continue };
            let stage = self.check(spec, &checked.values().collect::<Vec<_>>()).await?;
            for client in &stage.plan.models {
                let trainer = self.waits_for(&stage, &client.adapter)?;
                edges.extend(trainer.and_then(|trainer| position(&specs, trainer)).map(|from| (from, index)));
            }
            checked.insert(index, stage);
        }
        let order = graph::order(specs.len(), &edges).map_err(|cycle| self.cycle(&specs, &cycle))?;

        let mut stages: Vec<PlannedStage> = Vec::with_capacity(order.len());
        for mut stage in order.into_iter().filter_map(|index| checked.remove(&index)) {
            stage.parts = self.parts(&stage, &stages);
            stage.key = stage.parts.key();
            stages.push(stage);
        }
        Ok(RoundPlan { round: self.round, consumers: consumers(&stages, self.round), stages })
    }

    /// Every input names a stage, also of stages that don't run in this round.
    fn check_names(&self) -> Result<(), FlowError> {
        let known: Vec<&str> = self.flow.stages.iter().map(|stage| stage.name.as_str()).collect();
        for spec in &self.flow.stages {
            for (key, from) in &spec.inputs {
                if !known.contains(&from.stage.as_str()) {
                    return Err(error(spec, key, format!("there is no stage `{}`", from.stage))
                        .help(names::suggest(&from.stage, &known)));
                }
            }
        }
        Ok(())
    }

    /// # Errors
    /// The stage runs in no round of the flow.
    fn runs(&self, stage: &str) -> Result<(), FlowError> {
        let Some(spec) = self.flow.stage(stage) else { return Ok(()) };
        let rounds = self.flow.rounds;
        if (1..=rounds).any(|round| spec.runs_in(round)) {
            return Ok(());
        }
        let last = if rounds == 1 {
            "the flow has one round".to_owned()
        } else {
            format!("the flow has rounds 1 to {rounds}")
        };
        Err(error(spec, "in_rounds", format!("names no round that there is: {last}")))
    }

    async fn check(&self, spec: &StageSpec, checked: &[&PlannedStage]) -> Result<PlannedStage, FlowError> {
        let mut inputs = Vec::with_capacity(spec.inputs.len());
        let mut source = spec.name.clone();
        for (key, from) in &spec.inputs {
            self.runs(&from.stage)?;
            let (producer, round) = self.result_of(&from.stage, checked).ok_or_else(|| {
                error(spec, key, format!("`{}` has not run by round {}", from.stage, self.round))
                    .help("let `in_rounds` of both stages begin with the same round")
            })?;
            if round < self.round && !producer.spec.table {
                let message = format!("round {} reads `{}` again, which has table = false", self.round, from.stage);
                return Err(error(spec, key, message).help("let it keep its table, or run it in this round too"));
            }
            if inputs.is_empty() {
                source.clone_from(&producer.source);
            }
            let port = find_port(producer, from).map_err(|(message, help)| error(spec, key, message).help(help))?;
            let from = InputRef { stage: from.stage.clone(), port: port.name.clone() };
            let input = InputPlan { key: key.clone(), from, schema: port.schema.clone(), rows: port.rows };
            inputs.push(PlannedInput { input, round });
        }
        let plan = match self.same_as_before(spec, &inputs) {
            Some(plan) => plan,
            None => self.ask_kind(spec, &inputs).await?,
        };
        self.check_models(spec, &plan)?;
        if plan.new_rows {
            source.clone_from(&spec.name);
        }
        Ok(PlannedStage { spec: spec.clone(), inputs, plan, source, key: String::new(), parts: Form::Unset })
    }

    /// The latest result of a stage: of this round, or where it doesn't run in it, of an earlier one.
    fn result_of<'b>(&'b self, name: &str, now: &[&'b PlannedStage]) -> Option<(&'b PlannedStage, u32)> {
        let here = now.iter().find(|stage| stage.spec.name == name).map(|stage| (*stage, self.round));
        here.or_else(|| self.earlier.iter().rev().find_map(|plan| Some((plan.stage(name)?, plan.round))))
    }

    /// The check of the round before stands where the kind would see the same.
    fn same_as_before(&self, spec: &StageSpec, inputs: &[PlannedInput]) -> Option<StagePlan> {
        let before = self.earlier.last()?;
        let overlaid = |round| self.flow.overlay(round).map(|overlay| overlay.from);
        let stage = before.stage(&spec.name).filter(|_| overlaid(before.round) == overlaid(self.round))?;
        let same = stage.inputs.len() == inputs.len()
            && stage
                .inputs
                .iter()
                .zip(inputs)
                .all(|(old, new)| old.input.from == new.input.from && old.input.schema == new.input.schema);
        same.then(|| stage.plan.clone())
    }

    async fn ask_kind(&self, spec: &StageSpec, inputs: &[PlannedInput]) -> Result<StagePlan, FlowError> {
        let kind = self.kinds.kind(&spec.kind).ok_or_else(|| {
            error(spec, "kind", format!("there is no kind `{}`", spec.kind))
                .help(names::suggest(&spec.kind, &self.kinds.kind_names()))
        })?;
        let inputs: Vec<InputPlan> = inputs.iter().map(|input| input.input.clone()).collect();
        let context = CheckContext { flow: self.flow, stage: spec, inputs: &inputs, trainers: &self.trainers };
        let plan = kind.check(context).await.map_err(|error| {
            let engine_keys = kind.inputs().iter().map(|key| key.name).chain(["kind", "in_rounds", "table"]);
            also_known(error, spec, &engine_keys.collect::<Vec<_>>())
        })?;
        Ok(StagePlan { fingerprint: self.fingerprint(kind.as_ref(), &plan), ..plan })
    }

    /// The settings that decide a stage's rows beside its inputs, its models and the run: the key of a plan and the one of a
    /// journal both have it.
    fn fingerprint(&self, kind: &dyn StageKind, plan: &StagePlan) -> Form {
        let asks = |client: &ModelUse| client.chat && self.flow.contents.dated.contains(&client.model);
        let date = self.flow.date.filter(|_| plan.models.iter().any(asks));
        Form::table([
            ("kind", kind.name().form()),
            ("results", kind.results().form()),
            ("keys", plan.fingerprint.clone()),
            ("date", date.form()),
        ])
    }

    fn check_models(&self, spec: &StageSpec, plan: &StagePlan) -> Result<(), FlowError> {
        let known: Vec<&str> = self.flow.models.keys().map(String::as_str).collect();
        let named = plan.models.iter().map(|client| &client.model).chain(&plan.trains);
        for model in named {
            if !self.flow.models.contains_key(model) {
                return Err(
                    error(spec, "model", format!("there is no model `{model}`")).help(names::suggest(model, &known))
                );
            }
        }
        let asks_in_vain = |client: &&ModelUse| client.chat && self.flow.contents.plain.contains(&client.model);
        let Some(client) = plan.models.iter().find(asks_in_vain) else { return Ok(()) };
        let model = &client.model;
        let message = format!("the model `{model}` has no chat template, and this stage asks it through one");
        let plain = self.kinds.kind(&spec.kind).is_some_and(|kind| kind.takes_plain_text());
        let or_plain =
            if plain { "; or set template = \"none\" on this stage, for prompts that are plain text" } else { "" };
        Err(error(spec, "model", message).help(format!(
            "set chat_template on `{model}` to the text of a template, best the one that it was trained with{or_plain}"
        )))
    }

    /// The trainer of this round that the stage waits for to have this adapter.
    ///
    /// # Errors
    /// The adapter that it asks for can't exist in this round.
    fn waits_for<'b>(&self, stage: &PlannedStage, adapter: &'b AdapterChoice) -> Result<Option<&'b String>, FlowError> {
        let absent = |trainer: &str, round: u32| {
            error(&stage.spec, "adapter", format!("`{trainer}` does not train in round {round}"))
                .help("ask for a round it trains in, or say with `in_rounds` when this stage runs")
        };
        match adapter {
            AdapterChoice::Base | AdapterChoice::Previous { .. } | AdapterChoice::Earlier { .. } => Ok(None),
            AdapterChoice::Current { trainer } => {
                let trains = |round| self.flow.stage(trainer).is_some_and(|spec| spec.runs_in(round));
                if (1..=self.round).any(trains) { Ok(Some(trainer)) } else { Err(absent(trainer, self.round)) }
            }
            AdapterChoice::Round { trainer, round } if *round > self.round => {
                let message = format!("the adapter of round {round} does not exist in round {}", self.round);
                Err(error(&stage.spec, "adapter", message)
                    .help(format!("`{trainer}` trains it later; say with `in_rounds` when this stage runs")))
            }
            AdapterChoice::Round { trainer, round } => {
                let trained = if *round == self.round {
                    self.flow.stage(trainer).is_some_and(|spec| spec.runs_in(*round))
                } else {
                    self.earlier.iter().any(|plan| plan.round == *round && plan.stage(trainer).is_some())
                };
                if !trained {
                    return Err(absent(trainer, *round));
                }
                Ok((*round == self.round).then_some(trainer))
            }
        }
    }

    /// What the plan key of a stage is the hash of, after all that it reads.
    ///
    /// Round, name and seed are always part of it: they are the counters of every random stream, and
    /// keys are only compared between the same stage and round of two plans.
    fn parts(&self, stage: &PlannedStage, before: &[PlannedStage]) -> Form {
        let before: Vec<&PlannedStage> = before.iter().collect();
        let input = |input: &PlannedInput| {
            let producer = self.result_of(&input.input.from.stage, &before);
            let key = producer.map(|(producer, _)| &producer.key);
            Form::List(vec![input.input.key.form(), input.input.from.port.form(), key.form()])
        };
        let clients = &stage.plan.models;
        let models: Vec<_> = clients.iter().map(|c| &c.model).chain(&stage.plan.trains).collect();
        let model = |name: &String| self.flow.models.get(name).form();
        let content = |name: &&String| self.flow.contents.models.get(*name).form();
        let adapter = |client: &ModelUse| self.adapter_key(&client.adapter, &before).form();
        let of_stage = &stage.plan.fingerprint;
        Form::table([
            ("stage", stage.spec.name.form()),
            ("kind", of_stage.get("kind").clone()),
            ("results", of_stage.get("results").clone()),
            ("date", of_stage.get("date").clone()),
            ("config", of_stage.get("keys").clone()),
            ("round", self.round.form()),
            ("seed", self.flow.seed.form()),
            ("deterministic", self.flow.deterministic.form()),
            ("inputs", Form::List(stage.inputs.iter().map(input).collect())),
            (
                "model",
                match clients.len() {
                    0 | 1 => models.first().map_or(Form::Unset, |name| model(name)),
                    _ => Form::List(clients.iter().map(|client| model(&client.model)).collect()),
                },
            ),
            ("content", Form::List(models.iter().map(content).collect())),
            (
                "adapter",
                match clients.as_slice() {
                    [] => Form::Unset,
                    [client] => adapter(client),
                    several => Form::List(several.iter().map(adapter).collect()),
                },
            ),
            // A trainer may go on from, or refer to, what it trained before.
            ("trained", stage.plan.trains.as_ref().map(|_| self.trained_before(&stage.spec.name)).form()),
        ])
    }

    fn adapter_key(&self, choice: &AdapterChoice, before: &[&PlannedStage]) -> String {
        match choice {
            AdapterChoice::Base => "base".into(),
            AdapterChoice::Previous { trainer } => self.trained_before(trainer),
            AdapterChoice::Earlier { trainer, rounds } => {
                let last = self.round.saturating_sub(*rounds);
                let plans = self.earlier.iter().rev().filter(|plan| plan.round <= last);
                plans
                    .filter_map(|plan| plan.stage(trainer))
                    .next()
                    .map_or_else(|| self.init_key(trainer), |s| s.key.clone())
            }
            AdapterChoice::Current { trainer } => self
                .result_of(trainer, before)
                .map_or_else(|| self.trained_before(trainer), |(stage, _)| stage.key.clone()),
            AdapterChoice::Round { trainer, round } => {
                let earlier =
                    self.earlier.iter().find(|plan| plan.round == *round).and_then(|plan| plan.stage(trainer));
                let stage = earlier.or_else(|| self.result_of(trainer, before).map(|(stage, _)| stage));
                stage.map_or_else(|| "base".into(), |stage| stage.key.clone())
            }
        }
    }

    /// The key of a trainer's last adapter before this round: at first its `init_adapter`, or the base.
    fn trained_before(&self, trainer: &str) -> String {
        match self.result_of(trainer, &[]) {
            Some((stage, round)) => format!("{}{}", stage.key, self.gates_of(trainer, round)),
            None => self.init_key(trainer),
        }
    }

    /// The keys of the gates that decided whether the trainer's adapters up to `round` passed.
    fn gates_of(&self, trainer: &str, round: u32) -> String {
        let current = AdapterChoice::Current { trainer: trainer.to_owned() };
        let gates = self.earlier.iter().filter(|plan| plan.round <= round).flat_map(|plan| &plan.stages);
        let gates = gates.filter(|stage| stage.spec.kind == "gate");
        let deciding = gates.filter(|stage| stage.plan.models.first().is_some_and(|m| m.adapter == current));
        deciding.map(|stage| format!(" {}", stage.key)).collect()
    }

    fn init_key(&self, trainer: &str) -> String {
        let init = self.flow.stage(trainer).and_then(|stage| stage.options.get("init_adapter"));
        let content = self.flow.contents.init_adapters.get(trainer).map_or("", String::as_str);
        init.map_or_else(|| "base".into(), |path| format!("init {path} {content}"))
    }

    fn cycle(&self, specs: &[&StageSpec], cycle: &[usize]) -> FlowError {
        let stages: Vec<&StageSpec> = cycle.iter().filter_map(|index| specs.get(*index).copied()).collect();
        let mut path: Vec<&str> = stages.iter().map(|stage| stage.name.as_str()).collect();
        path.extend(path.first().copied());
        let key = path.first().map_or_else(String::new, |stage| format!("stages.{stage}"));
        let reads = |stage: &StageSpec, from: &str| stage.inputs.iter().any(|(_, input)| input.stage == from);
        let waits: Vec<String> = stages
            .iter()
            .zip(path.iter().skip(1))
            .filter_map(|(from, to)| {
                let to = specs.iter().find(|stage| stage.name == **to)?;
                (!reads(to, &from.name)).then(|| format!("`{}` waits for the adapter of `{}`; ", to.name, from.name))
            })
            .collect();
        FlowError::new(key, format!("the stages form a cycle: {}", path.join(" -> "))).help(format!(
            "{}the loop over rounds is carried by the adapter alone; \"previous\" is that of the round before",
            waits.concat()
        ))
    }
}

/// The stages, by round and name, whose rows may follow from what those of `from` give.
pub fn followers(rounds: &[RoundPlan], from: &[(u32, String)]) -> Vec<(u32, String)> {
    let mut found: Vec<(u32, String)> = Vec::new();
    for plan in rounds {
        for stage in &plan.stages {
            let hit = |round: u32, name: &str| from.iter().chain(&found).any(|(r, n)| *r == round && n == name);
            let reads = stage.inputs.iter().any(|input| hit(input.round, &input.input.from.stage));
            let trained = |choice: &AdapterChoice| {
                let waits = matches!(choice, AdapterChoice::Current { .. } | AdapterChoice::Round { .. });
                let last = if waits { plan.round } else { plan.round.saturating_sub(1) };
                choice.trainer().is_some_and(|trainer| (1..=last).any(|round| hit(round, trainer)))
            };
            if reads || stage.plan.models.iter().any(|client| trained(&client.adapter)) {
                found.push((plan.round, stage.spec.name.clone()));
            }
        }
    }
    found
}

fn position(specs: &[&StageSpec], name: &str) -> Option<usize> {
    specs.iter().position(|spec| spec.name == name)
}

fn error(spec: &StageSpec, key: &str, message: String) -> FlowError {
    FlowError::new(format!("stages.{}.{key}", spec.name), message)
}

/// The output that `from` names; else what is wrong and what to do.
fn find_port<'a>(producer: &'a PlannedStage, from: &InputRef) -> Result<&'a Port, (String, String)> {
    let outputs = &producer.plan.outputs;
    if let Some(port) = outputs.iter().find(|port| port.name == from.port) {
        return Ok(port);
    }
    let full: Vec<String> = outputs
        .iter()
        .map(|port| InputRef { stage: from.stage.clone(), port: port.name.clone() }.to_string())
        .collect();
    let full: Vec<&str> = full.iter().map(String::as_str).collect();
    match outputs.as_slice() {
        [only] if from.port.is_empty() => Ok(only),
        [] => Err((
            format!("`{}` is a {} and has no output", from.stage, producer.spec.kind),
            "read the stage before it".into(),
        )),
        _ if from.port.is_empty() => {
            Err((format!("`{}` has several outputs", from.stage), format!("write one of {}", names::list(&full))))
        }
        _ => Err((format!("`{}` has no output `{}`", from.stage, from.port), names::suggest(&from.to_string(), &full))),
    }
}

/// An unknown key may also be a misspelt key that the engine itself reads.
fn also_known(error: FlowError, spec: &StageSpec, engine_keys: &[&str]) -> FlowError {
    let path = format!("stages.{}", spec.name);
    let name = error.key.strip_prefix(&path).and_then(|rest| rest.strip_prefix('.')).map(str::to_owned);
    let guessed = error.help.as_ref().is_some_and(|help| help.starts_with("did you mean"));
    match name {
        Some(name) if error.message == names::UNKNOWN && !guessed && !name.contains('.') => {
            let better = names::unknown_key(&path, &name, engine_keys);
            let found = better.help.as_ref().is_some_and(|help| help.starts_with("did you mean"));
            if found { better } else { error }
        }
        _ => error,
    }
}

fn consumers(stages: &[PlannedStage], round: u32) -> BTreeMap<InputRef, Vec<Consumer>> {
    let mut consumers: BTreeMap<InputRef, Vec<Consumer>> = BTreeMap::new();
    for stage in stages {
        for port in &stage.plan.outputs {
            consumers.entry(InputRef { stage: stage.spec.name.clone(), port: port.name.clone() }).or_default();
        }
        for input in stage.inputs.iter().filter(|input| input.round == round) {
            let reader = Consumer { stage: stage.spec.name.clone(), key: input.input.key.clone() };
            consumers.entry(input.input.from.clone()).or_default().push(reader);
        }
    }
    consumers
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::super::fake::{Kinds, SELF_REWARD};
    use super::*;

    fn try_plan(text: &str) -> Result<Plan, FlowError> {
        let flow = Flow::from_toml(text, Path::new("."), &[], &Kinds)?;
        futures::executor::block_on(Plan::new(&flow, &Kinds))
    }

    fn plan(text: &str) -> Plan {
        try_plan(text).unwrap_or_else(|error| panic!("{error}"))
    }

    fn message(text: &str) -> String {
        try_plan(text).expect_err("must fail").to_string()
    }

    /// The recipe with lines added to one of its stages.
    fn with(stage: &str, lines: &str) -> String {
        let header = format!("[stages.{stage}]\n");
        SELF_REWARD.replace(&header, &format!("{header}{lines}\n"))
    }

    #[test]
    fn the_recipe() {
        let plan = plan(SELF_REWARD);
        assert_eq!(plan.rounds.len(), 3);
        let round = plan.round(2).expect("exists");
        assert!(round.stages.iter().all(|stage| stage.source == "prompts"));
        let readers = |stage: &str, port: &str| {
            round.consumers.get(&InputRef { stage: stage.into(), port: port.into() }).cloned().unwrap_or_default()
        };
        assert_eq!(readers("halves", "validation"), [Consumer { stage: "align".into(), key: "validation".into() }]);
        assert_eq!(readers("sample", ""), [Consumer { stage: "judge".into(), key: "input".into() }]);
        assert!(plan.notes.is_empty(), "{:?}", plan.notes);
        assert!(plan.round(0).is_none() && plan.round(4).is_none());
    }

    #[test]
    fn mistakes_have_a_place_and_a_remedy() {
        let cases = [
            (
                SELF_REWARD.replace("\"prompts\"", "\"promts\""),
                "stages.sample.input: there is no stage `promts`\n  help: did you mean `prompts`?",
            ),
            (
                SELF_REWARD.replace("halves.train", "halves.trian"),
                "stages.align.train: `halves` has no output `trian`\n  help: did you mean `halves.train`?",
            ),
            (
                SELF_REWARD.replace("halves.train", "halves"),
                "stages.align.train: `halves` has several outputs\n  help: write one of `halves.train` and `halves.validation`",
            ),
            (SELF_REWARD.replace("halves.train", "align"), "stages.align: the stages form a cycle: align -> align"),
            (
                SELF_REWARD.replace("input = \"prompts\"", "input = \"judge\""),
                "stages.sample: the stages form a cycle: sample -> judge -> sample",
            ),
            (
                SELF_REWARD.replace("model = \"policy\"", "model = \"polcy\""),
                "stages.sample.model: there is no model `polcy`\n  help: did you mean `policy`?",
            ),
            (
                with("sample", "candiates = 2"),
                "stages.sample.candiates: unknown key\n  help: did you mean `candidates`?",
            ),
            (
                with("sample", "in_round = [1]"),
                "stages.sample.in_round: unknown key\n  help: did you mean `in_rounds`?",
            ),
            (
                SELF_REWARD.replace("validation =", "validaton ="),
                "stages.align.validaton: unknown key\n  help: did you mean `validation`?",
            ),
            (
                with("align", "num_generations = 2"),
                "stages.align.num_generations: unknown key\n  help: the keys here are",
            ),
            (SELF_REWARD.replace("r = 8", "rr = 8"), "stages.align.lora.rr: unknown key\n  help: did you mean `r`?"),
            (
                with("sample", "adapter = \"align\""),
                "stages.sample: the stages form a cycle: sample -> judge -> prefer -> halves -> align -> sample\n  help: `sample` waits for the adapter of `align`;",
            ),
            (
                with("sample", "adapter = \"round:2\""),
                "stages.sample.adapter: the adapter of round 2 does not exist in round 1",
            ),
            (
                with("sample", "adapter = \"base\"").replace("device", "adapter = \"base\"\ndevice"),
                "rounds: 3 rounds, but no stage of a later round reads the adapter that `align` trains",
            ),
            (with("prompts", "in_rounds = [2]"), "stages.sample.input: `prompts` has not run by round 1"),
            (
                with("judge", "adapter = \"align.previos\""),
                "stages.judge.adapter: no trainer `align.previos` trains `policy`",
            ),
            (SELF_REWARD.replace("rounds = 3", "rounds = 4000000000"), "rounds: has to be between 1 and 10000"),
        ];
        for (text, expected) in cases {
            let message = message(&text);
            let (place, rest) = message.split_once(": ").expect("a place");
            assert!(rest.starts_with(expected), "{message}\nexpected {expected}");
            let line: usize = place.strip_prefix("flow.toml:").and_then(|line| line.parse().ok()).expect("a line");
            let key = rest.split(':').next().and_then(|key| key.rsplit('.').next()).expect("a key");
            assert!(text.lines().nth(line - 1).is_some_and(|line| line.contains(key)), "{message}");
        }
    }

    #[test]
    fn a_device_of_the_command_line_replaces_all() {
        let mut flow = Flow::from_toml(SELF_REWARD, Path::new("."), &[], &Kinds).expect("valid");
        let mut devices = |name: &str| {
            flow.device_override = Some(name.into());
            let plan = futures::executor::block_on(Plan::new(&flow, &Kinds)).map_err(|error| error.to_string())?;
            Ok::<_, String>(
                plan.rounds[0].stage("judge").and_then(|stage| stage.plan.models.first().cloned()).map(|m| m.devices),
            )
        };
        assert_eq!(devices("cpu"), Ok(Some(vec!["cpu:0".to_owned()])));
        assert_eq!(devices("gpu"), Err("--device: `gpu` is not a device; write auto, cpu, cpu:1 or cuda:0".to_owned()));
    }

    #[test]
    fn planning_can_move_between_threads() {
        fn sendable(_: impl Send) {}
        sendable(Plan::new(&Flow::default(), &Kinds));
    }

    #[test]
    fn an_error_in_an_overlay_is_placed_there() {
        let text = format!("{SELF_REWARD}\n[round.2.stages.sample]\ntemprature = 0.8\n");
        let line = text.lines().count();
        assert!(message(&text).starts_with(&format!("flow.toml:{line}: stages.sample.temprature: unknown key")));
    }

    #[test]
    fn a_stage_of_an_earlier_round_is_read_again() {
        let plan = plan(&with("prompts", "in_rounds = [1]"));
        let second = plan.round(2).expect("exists");
        assert!(second.stage("prompts").is_none());
        assert_eq!(second.stage("sample").map(|stage| stage.inputs[0].round), Some(1));
        assert_eq!(second.stage("align").map(|stage| stage.source.as_str()), Some("prompts"));
        assert!(!second.consumers.contains_key(&InputRef { stage: "prompts".into(), port: String::new() }));
    }

    #[test]
    fn who_waits_for_an_adapter_comes_after_its_trainer() {
        let again = "[stages.again]\nkind = 'sampler'\ninput = 'prompts'\nmodel = 'policy'\nadapter = 'align'\n\n";
        let text = SELF_REWARD
            .replace("rounds = 3", "rounds = 1")
            .replace("[stages.prompts]", &format!("{again}[stages.prompts]"));
        let plan = plan(&text);
        let order: Vec<&str> = plan.rounds[0].stages.iter().map(|stage| stage.spec.name.as_str()).collect();
        assert_eq!(order, ["prompts", "sample", "judge", "prefer", "halves", "align", "again"]);
        assert_eq!(plan.notes, ["no stage reads `again`"]);
    }

    #[test]
    fn several_trainers_need_names() {
        let second = "\n[stages.more]\nkind = 'trainer'\ntrain = 'halves.train'\nmodel = 'policy'\n";
        let text = format!("{SELF_REWARD}{second}");
        assert!(message(&text).contains("stages.sample.adapter: `policy` is trained by `align` and `more`"));
    }

    #[test]
    fn keys_change_with_what_decides_the_rows() {
        let keys = plan(SELF_REWARD).keys();
        let changed = |text: &str| -> Vec<(u32, String)> {
            let other = plan(text).keys();
            keys.iter()
                .filter(|(id, key)| other.get(*id).is_some_and(|other| other != *key))
                .map(|(id, _)| id.clone())
                .collect()
        };
        let all: Vec<(u32, String)> = keys.keys().cloned().collect();
        assert_eq!(all.len(), 18);
        assert!(keys.values().all(|key| key.len() == 64));

        assert_eq!(changed(SELF_REWARD), []);
        assert_eq!(changed(&SELF_REWARD.replace("cpu:1", "cuda:0")), [], "devices decide nothing");
        assert_eq!(changed(&format!("{SELF_REWARD}\n[devices.cpu]\nmemory = 0.5\n")), [], "nor does their memory");
        assert_eq!(changed(&SELF_REWARD.replace("rounds = 3", "rounds = 4")), [], "one round more reuses all before");
        assert_eq!(changed(&SELF_REWARD.replace("seed = 7", "seed = 8")), all);

        let prompts = |(_, stage): &&(u32, String)| stage == "prompts";
        let sampler = changed(&SELF_REWARD.replace("temperature = 1.0", "temperature = 0.5"));
        assert_eq!(sampler, all.iter().filter(|id| !prompts(id)).cloned().collect::<Vec<_>>());
        let model = changed(&SELF_REWARD.replace("Chat-v1.0", "Chat-v0.6"));
        assert_eq!(model, sampler);

        let trainer = changed(&SELF_REWARD.replace("r = 8", "r = 16"));
        let expected =
            all.iter().filter(|id| !prompts(id) && (id.0 > 1 || id.1 == "align")).cloned().collect::<Vec<_>>();
        assert_eq!(trainer, expected, "the adapter of round 1 decides what round 2 samples");

        let init = changed(&with("align", "init_adapter = 'a'"));
        assert_eq!(init, sampler, "round 1 begins with it");
        let overlay = changed(&format!("{SELF_REWARD}\n[round.3.stages.sample]\ntemperature = 0.5\n"));
        assert_eq!(overlay, all.iter().filter(|id| !prompts(id) && id.0 == 3).cloned().collect::<Vec<_>>());
    }
}
