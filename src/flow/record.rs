//! What a run directory remembers of its plan, and what has changed since.

use std::collections::BTreeMap;
use std::fmt;

use chrono::NaiveDate;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::RoundPlan;

/// The format of run directories: of `plan.json`, of journals and of the keys in both. A directory of an older one is
/// read, and not gone on with.
pub const FORMAT: u32 = 3;

/// Characters of a value that a cause shows.
const SHOWN: usize = 40;

/// The keys that every format of `plan.json` has.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct PlanHead {
    /// Before directories had one number for all of it, they had none.
    #[serde(default)]
    pub format: u32,
    pub flow: String,
    pub version: String,
    rounds: BTreeMap<u32, serde::de::IgnoredAny>,
}

impl PlanHead {
    pub fn rounds(&self) -> usize {
        self.rounds.len()
    }
}

/// A plan as `plan.json` keeps it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PlanRecord {
    pub format: u32,
    pub flow: String,
    pub version: String,
    /// The date for chat templates.
    #[serde(with = "as_text")]
    pub date: Option<NaiveDate>,
    /// By round and stage.
    pub rounds: BTreeMap<u32, BTreeMap<String, StageRecord>>,
}

/// One stage in one round.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StageRecord {
    /// Plan key.
    pub key: String,
    /// The form that the key is the hash of.
    parts: Value,
    /// The round and the stage behind each input, in the order of `parts.inputs`.
    reads: Vec<(u32, String)>,
}

/// A date as `2026-11-28`.
mod as_text {
    use chrono::NaiveDate;
    use serde::de::Error;
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    pub fn serialize<S: Serializer>(date: &Option<NaiveDate>, serializer: S) -> Result<S::Ok, S::Error> {
        date.map(|date| date.to_string()).serialize(serializer)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<NaiveDate>, D::Error> {
        let text = Option::<String>::deserialize(deserializer)?;
        text.map(|text| text.parse().map_err(D::Error::custom)).transpose()
    }
}

/// What becomes of a stage's recorded rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Fate {
    /// All are reused.
    Same,
    /// Those whose input is the same are reused.
    ChangedRows,
    /// None are, unless the adapter they were made with comes out the same again.
    UnlessAdapterEqual,
    /// None are.
    Recompute,
    /// The run has no such stage in this round.
    New,
    /// The flow has no such stage in this round any more.
    Gone,
}

impl fmt::Display for Fate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Same => "same",
            Self::ChangedRows => "recompute rows whose input changed",
            Self::UnlessAdapterEqual => "recompute unless the retrained adapter is equal",
            Self::Recompute => "recompute",
            Self::New => "new",
            Self::Gone => "not in this flow",
        })
    }
}

/// One line of a comparison.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Change {
    pub round: u32,
    pub stage: String,
    pub fate: Fate,
    /// `temperature 1.0 -> 0.5`; empty where nothing changed.
    pub causes: Vec<String>,
}

impl PlanRecord {
    pub fn of(rounds: &[RoundPlan], flow: &str, date: Option<NaiveDate>) -> Self {
        let stages = |round: &RoundPlan| {
            let record = |stage: &super::PlannedStage| StageRecord {
                key: stage.key.clone(),
                // Strings and numbers, which JSON has.
                parts: serde_json::to_value(&stage.parts).unwrap_or_default(),
                reads: stage.inputs.iter().map(|i| (i.round, i.input.from.stage.clone())).collect(),
            };
            round.stages.iter().map(|s| (s.spec.name.clone(), record(s))).collect()
        };
        Self {
            format: FORMAT,
            date,
            flow: flow.into(),
            version: env!("CARGO_PKG_VERSION").into(),
            rounds: rounds.iter().map(|r| (r.round, stages(r))).collect(),
        }
    }

    fn get(&self, round: u32, stage: &str) -> Option<&StageRecord> {
        self.rounds.get(&round)?.get(stage)
    }

    /// What a run of `plan`, whose stages are in topological order, finds of this one, a line a round
    /// and stage.
    pub fn compare(&self, plan: &[RoundPlan]) -> Vec<Change> {
        let new = Self::of(plan, &self.flow, self.date);
        let mut changes: Vec<Change> = Vec::new();
        for round in plan {
            for stage in round.stages.iter().map(|s| s.spec.name.as_str()) {
                let Some(now) = new.get(round.round, stage) else { continue };
                let (fate, causes) = match self.get(round.round, stage) {
                    None => (Fate::New, Vec::new()),
                    Some(before) if before.key == now.key => (Fate::Same, Vec::new()),
                    Some(before) => changed(before, now, &changes),
                };
                changes.push(Change { round: round.round, stage: stage.into(), fate, causes });
            }
        }
        for (round, stages) in &self.rounds {
            let gone = stages.keys().filter(|stage| new.get(*round, stage).is_none());
            changes.extend(gone.map(|stage| Change {
                round: *round,
                stage: stage.clone(),
                fate: Fate::Gone,
                causes: Vec::new(),
            }));
        }
        changes
    }
}

/// How two records of one stage differ; `earlier` has the fates of the stages before it.
fn changed(before: &StageRecord, now: &StageRecord, earlier: &[Change]) -> (Fate, Vec<String>) {
    let (StageRecord { parts: old, .. }, StageRecord { parts: new, reads, .. }) = (before, now);
    let mut own = Vec::new();
    for part in ["kind", "results", "seed", "deterministic", "date", "config", "model", "content"] {
        differences(if matches!(part, "config") { "" } else { part }, &old[part], &new[part], &mut own);
    }
    let wiring = |parts: &Value| -> Vec<Value> {
        let inputs = parts["inputs"].as_array().cloned().unwrap_or_default();
        inputs.iter().map(|input| Value::from(vec![input[0].clone(), input[1].clone()])).collect()
    };
    let producers: Vec<Fate> = reads.iter().filter_map(|(round, stage)| fate_of(earlier, *round, stage)).collect();
    let adapter = old["adapter"] != new["adapter"] || old["trained"] != new["trained"];
    let mut causes = own.clone();
    if old["inputs"] != new["inputs"] {
        let moved = wiring(old) != wiring(new) || producers.iter().all(|fate| *fate == Fate::Same);
        let names = reads.iter().filter(|(round, stage)| moved || fate_of(earlier, *round, stage) != Some(Fate::Same));
        let mut names: Vec<&str> = names.map(|(_, stage)| stage.as_str()).collect();
        names.dedup();
        causes.extend(names.into_iter().map(|stage| format!("rows of {stage}")));
    }
    if adapter {
        causes.push("the adapter before it".into());
    }
    let fate = match (own.is_empty(), adapter) {
        (false, _) => Fate::Recompute,
        (true, true) => Fate::UnlessAdapterEqual,
        // Rows of unknown fate make rows of unknown fate.
        (true, false) if producers.contains(&Fate::UnlessAdapterEqual) => Fate::UnlessAdapterEqual,
        (true, false) => Fate::ChangedRows,
    };
    (fate, causes)
}

fn fate_of(changes: &[Change], round: u32, stage: &str) -> Option<Fate> {
    changes.iter().find(|c| c.round == round && c.stage == stage).map(|c| c.fate)
}

/// The leaves in which two values differ, as `path old -> new`.
fn differences(path: &str, old: &Value, new: &Value, out: &mut Vec<String>) {
    if let (Value::Object(a), Value::Object(b)) = (old, new) {
        let names = a.keys().chain(b.keys().filter(|name| !a.contains_key(*name)));
        for name in names {
            let inner = if path.is_empty() { name.clone() } else { format!("{path}.{name}") };
            differences(&inner, &old[name.as_str()], &new[name.as_str()], out);
        }
    } else if old != new {
        let path = if path.is_empty() { "settings" } else { path };
        out.push(format!("{path} {} -> {}", short(old), short(new)));
    }
}

fn short(value: &Value) -> String {
    let text = match value {
        Value::Null => "unset".to_owned(),
        Value::String(text) => text.replace('\n', " "),
        other => other.to_string(),
    };
    if text.chars().count() <= SHOWN { text } else { format!("{}...", text.chars().take(SHOWN).collect::<String>()) }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::super::fake::{Kinds, SELF_REWARD};
    use super::super::{Flow, Plan};
    use super::*;

    fn plan(text: &str) -> Plan {
        let flow = Flow::from_toml(text, Path::new("."), &[], &Kinds).unwrap();
        futures::executor::block_on(Plan::new(&flow, &Kinds)).unwrap()
    }

    fn compare(from: &str, to: &str) -> Vec<Change> {
        PlanRecord::of(&plan(from).rounds, "f", None).compare(&plan(to).rounds)
    }

    fn fates(changes: &[Change], stage: &str) -> Vec<Fate> {
        changes.iter().filter(|c| c.stage == stage).map(|c| c.fate).collect()
    }

    #[test]
    fn nothing_changed_and_a_round_more() {
        assert!(compare(SELF_REWARD, SELF_REWARD).iter().all(|c| c.fate == Fate::Same));
        let more = compare(SELF_REWARD, &SELF_REWARD.replace("rounds = 3", "rounds = 4"));
        assert_eq!(fates(&more, "judge"), [Fate::Same, Fate::Same, Fate::Same, Fate::New]);
        let fewer = compare(SELF_REWARD, &SELF_REWARD.replace("rounds = 3", "rounds = 2"));
        assert_eq!(fates(&fewer, "judge"), [Fate::Same, Fate::Same, Fate::Gone]);
    }

    #[test]
    fn a_setting_is_named_and_what_follows_depends_on_rows() {
        let changes = compare(SELF_REWARD, &SELF_REWARD.replace("temperature = 1.0", "temperature = 0.5"));
        assert_eq!(fates(&changes, "prompts"), [Fate::Same; 3]);
        let sample = changes.iter().find(|c| c.stage == "sample").unwrap();
        assert_eq!(sample.fate, Fate::Recompute);
        assert!(matches!(sample.causes.as_slice(), [cause] if cause.contains("1.0") && cause.contains("0.5")));
        let judge = changes.iter().find(|c| c.stage == "judge").unwrap();
        assert_eq!((judge.fate, judge.causes.as_slice()), (Fate::ChangedRows, &["rows of sample".to_owned()][..]));
    }

    #[test]
    fn a_trainer_leaves_the_rounds_after_it_to_its_adapter() {
        let changes = compare(SELF_REWARD, &SELF_REWARD.replace("r = 8", "r = 16"));
        assert_eq!(fates(&changes, "align")[0], Fate::Recompute);
        for stage in ["sample", "judge", "prefer"] {
            assert_eq!(fates(&changes, stage), [Fate::Same, Fate::UnlessAdapterEqual, Fate::UnlessAdapterEqual]);
        }
    }

    /// Also of directories that this program does not go on with.
    #[test]
    fn every_format_says_its_flow_and_rounds() {
        let old = r#"{"flow":"f","version":"0.1.0","rounds":{"1":{"a":"key"},"2":{"a":{"key":"k","parts":3}}}}"#;
        let head: PlanHead = serde_json::from_str(old).unwrap();
        assert_eq!((head.format, head.flow.as_str(), head.rounds()), (0, "f", 2));
        let new = PlanRecord::of(&plan(SELF_REWARD).rounds, "f", NaiveDate::from_ymd_opt(2026, 11, 28));
        let text = serde_json::to_string(&new).unwrap();
        let head: PlanHead = serde_json::from_str(&text).unwrap();
        assert_eq!((head.format, head.rounds()), (FORMAT, 3));
        assert_eq!(serde_json::from_str::<PlanRecord>(&text).unwrap(), new);
    }
}
