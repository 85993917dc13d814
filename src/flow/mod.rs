//! Flow files: specification, overlays, validation and the plan. Plain data: nothing here loads a
//! model, opens a device or imports a room above.

pub mod error;
pub mod kind;
pub mod options;
pub mod plan;
pub mod spec;

pub use error::FlowError;
pub use kind::{AdapterChoice, CheckContext, InputKey, InputPlan, ModelUse, Port, StageKind, StagePlan};
pub use plan::{Consumer, PlannedInput, PlannedStage, RoundPlan};
pub use spec::{Flow, InputRef, ModelSpec, StageSpec};
