//! The running half of a stage kind.

use std::collections::BTreeMap;
use std::sync::Arc;

use futures::future::BoxFuture;

use super::{StageContext, StageError};
use crate::flow::{StageKind, StagePlan};

/// One stage in one round. It reads its inputs to their end, sends what it makes and returns;
/// the engine sends the end-of-round mark and seals its journal. An error or a panic is answered
/// by a new `Stage` from [`Runnable::open`] whose context replays the journal.
pub trait Stage: Send {
    fn run<'a>(&'a mut self, ctx: &'a mut StageContext) -> BoxFuture<'a, Result<(), StageError>>;
}

/// A stage kind that can be started.
pub trait Runnable: StageKind {
    /// Cheap; anything slow (a model, a file) is opened in [`Stage::run`].
    fn open(&self, stage: &str, plan: &StagePlan) -> Result<Box<dyn Stage>, StageError>;
}

/// Stage kinds by name. An embedding program adds its own.
#[derive(Clone, Default)]
pub struct StageRegistry {
    kinds: BTreeMap<&'static str, Arc<dyn Runnable>>,
}

impl StageRegistry {
    pub fn register(&mut self, kind: impl Runnable + 'static) {
        self.kinds.insert(kind.name(), Arc::new(kind));
    }

    /// Adds all kinds of another registry; those of the same name are replaced.
    pub fn extend(&mut self, other: &Self) {
        self.kinds.extend(other.kinds.iter().map(|(name, kind)| (*name, kind.clone())));
    }

    pub fn get(&self, name: &str) -> Option<Arc<dyn Runnable>> {
        self.kinds.get(name).cloned()
    }

    pub fn names(&self) -> impl Iterator<Item = &'static str> + '_ {
        self.kinds.keys().copied()
    }
}

impl crate::flow::KindLookup for StageRegistry {
    fn kind(&self, name: &str) -> Option<Arc<dyn StageKind>> {
        let kind: Arc<dyn StageKind> = self.get(name)?;
        Some(kind)
    }

    fn kind_names(&self) -> Vec<&'static str> {
        self.names().collect()
    }
}
