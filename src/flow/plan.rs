//! A flow after validation: for every round a typed, acyclic graph of stages.

use std::collections::BTreeMap;

use super::{InputPlan, InputRef, StagePlan, StageSpec};

#[derive(Debug, Clone)]
pub struct RoundPlan {
    /// From 1.
    pub round: u32,
    /// Those that run in this round, each after everything it reads or waits for.
    pub stages: Vec<PlannedStage>,
    /// Readers in this round of each output.
    pub consumers: BTreeMap<InputRef, Vec<Consumer>>,
}

/// One stage in one round.
#[derive(Debug, Clone)]
pub struct PlannedStage {
    pub spec: StageSpec,
    pub inputs: Vec<PlannedInput>,
    pub plan: StagePlan,
    /// The stage without inputs that it descends from; itself if it has none.
    pub source: String,
    /// Plan key: everything known before the run that decides its rows.
    pub key: String,
}

#[derive(Debug, Clone)]
pub struct PlannedInput {
    pub input: InputPlan,
    /// The round whose rows are read.
    pub round: u32,
}

/// A reader of an output.
#[derive(Debug, Clone)]
pub struct Consumer {
    pub stage: String,
    pub key: String,
}
