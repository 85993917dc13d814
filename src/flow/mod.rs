//! Flow files: specification, overlays, validation and the plan. Plain data: nothing here loads a
//! model, opens a device or imports a room above.
//!
//! A flow goes through four steps, each a file of its own:
//!
//! 1. [`document`]: TOML texts and `--set` entries become one table, and every key keeps its place;
//! 2. [`mod@env`]: `${VAR}` in paths, URLs, keys and names;
//! 3. [`load`]: the table becomes a [`Flow`], once for each round overlay;
//! 4. [`plan`]: the kinds check their stages, edges get schemas, stages get keys: a [`Plan`].

pub mod device;
pub mod document;
pub mod env;
pub mod error;
pub mod explain;
pub mod fingerprint;
pub mod graph;
pub mod hub;
pub mod hub_answer;
pub mod kind;
pub mod load;
pub mod masks;
pub mod model;
pub mod names;
pub mod options;
pub mod plan;
pub mod record;
pub mod spec;

#[cfg(test)]
mod fake;

pub use device::{DeviceName, DeviceSpec, Devices};
pub use error::FlowError;
pub use fingerprint::{Canonical, Form};
pub use hub::HubLogin;
pub use hub_answer::{HubAnswer, Silence};
pub use kind::{
    AdapterChoice, CheckContext, InputKey, InputPlan, KindLookup, ModelUse, Port, RowBound, StageKind, StagePlan,
};
pub use masks::Masks;
pub use model::{EndpointSpec, ModelDtype, ModelSpec, OtherWeights};
pub use plan::{Consumer, Plan, PlannedInput, PlannedStage, RoundPlan};
pub use record::{Change, Fate, PlanHead, PlanRecord};
pub use spec::{Contents, Flow, InputRef, StageSpec};
