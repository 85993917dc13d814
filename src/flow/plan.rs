//! A flow after validation: for every round a typed, acyclic graph of stages.

use std::collections::BTreeMap;

use super::{InputPlan, StagePlan};

#[derive(Debug, Clone)]
pub struct Plan {
    pub rounds: Vec<RoundPlan>,
}

#[derive(Debug, Clone)]
pub struct RoundPlan {
    /// From 1.
    pub round: u32,
    /// In topological order.
    pub stages: Vec<PlannedStage>,
}

#[derive(Debug, Clone)]
pub struct PlannedStage {
    pub name: String,
    pub kind: String,
    pub inputs: Vec<InputPlan>,
    pub plan: StagePlan,
    /// Port to the stages that read it, with the key under which they do.
    pub consumers: BTreeMap<String, Vec<(String, String)>>,
    /// The source whose rows this stage's rows descend from, where there is one.
    pub source: Option<String>,
    /// Plan key: canonical configuration and the plan keys of the inputs.
    pub key: String,
}
