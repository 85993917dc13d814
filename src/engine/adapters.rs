//! Which adapter a client of a model gets: the one value that crosses from round to round.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Mutex;

use tokio::sync::watch;

use super::context::AdapterRef;

/// What one trainer has published so far.
#[derive(Debug, Clone, Default)]
struct Shelf {
    /// By round; 0 is the adapter it starts from.
    adapters: BTreeMap<u32, AdapterRef>,
    /// Up to this round nothing more will be published: a round in which the trainer doesn't run
    /// keeps the adapter before.
    settled: u32,
    /// Rounds whose adapter a gate let not pass: later rounds go on without it.
    rejected: BTreeSet<u32>,
}

impl Shelf {
    /// `None` while round `round` may still publish.
    fn answer(&self, round: u32) -> Option<Option<AdapterRef>> {
        match self.adapters.get(&round) {
            Some(adapter) => Some(Some(adapter.clone())),
            None if self.settled >= round => Some(self.adapters.range(..=round).next_back().map(|(_, a)| a.clone())),
            None => None,
        }
    }

    /// As [`Self::answer`], without those that were rejected.
    fn accepted(&self, round: u32) -> Option<Option<AdapterRef>> {
        self.answer(round)?;
        let good = |(round, _): &(&u32, &AdapterRef)| !self.rejected.contains(round);
        Some(self.adapters.range(..=round).rev().find(good).map(|(_, adapter)| adapter.clone()))
    }
}

/// The adapters of every trainer of a run.
#[derive(Default)]
pub struct AdapterBook {
    shelves: Mutex<HashMap<String, watch::Sender<Shelf>>>,
}

impl AdapterBook {
    fn with<T>(&self, trainer: &str, act: impl FnOnce(&watch::Sender<Shelf>) -> T) -> T {
        let mut shelves = self.shelves.lock().unwrap_or_else(|e| e.into_inner());
        act(shelves.entry(trainer.into()).or_default())
    }

    /// Publishes the adapter of `round`; clients that wait for it go on.
    pub fn publish(&self, trainer: &str, round: u32, adapter: AdapterRef) {
        self.with(trainer, |shelf| shelf.send_modify(|s| drop(s.adapters.insert(round, adapter))));
    }

    /// Says that `trainer` publishes nothing more up to `round`.
    pub fn settle(&self, trainer: &str, round: u32) {
        self.with(trainer, |shelf| shelf.send_modify(|s| s.settled = s.settled.max(round)));
    }

    /// The trainer's adapter of `round`, or its last one where it didn't run then; `None` is the
    /// base. Waits until the round has published or is over.
    pub async fn get(&self, trainer: &str, round: u32) -> Option<AdapterRef> {
        self.wait(trainer, |shelf| shelf.answer(round)).await
    }

    /// As [`Self::get`], but for adapters that a gate rejected: the last one before them.
    pub async fn accepted(&self, trainer: &str, round: u32) -> Option<AdapterRef> {
        self.wait(trainer, |shelf| shelf.accepted(round)).await
    }

    /// Later rounds go on from the adapter before that of `round`.
    pub fn reject(&self, trainer: &str, round: u32) {
        self.with(trainer, |shelf| {
            shelf.send_modify(|s| {
                s.rejected.insert(round);
            });
        });
    }

    async fn wait(&self, trainer: &str, answer: impl Fn(&Shelf) -> Option<Option<AdapterRef>>) -> Option<AdapterRef> {
        let mut shelf = self.with(trainer, watch::Sender::subscribe);
        // The sender lives in the book, so the wait can't fail while `self` is borrowed.
        let found = shelf.wait_for(|s| answer(s).is_some()).await.ok()?;
        answer(&found).flatten()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::Duration;

    use super::*;

    fn adapter(round: u32) -> AdapterRef {
        AdapterRef { dir: format!("a{round}").into(), hash: format!("h{round}"), round }
    }

    #[tokio::test]
    async fn rounds_keep_the_last_adapter_and_clients_wait_for_the_current_one() {
        let book = Arc::new(AdapterBook::default());
        assert_eq!(book.get("align", 0).await, None, "nothing before round 1 is the base");
        let waiting = tokio::spawn({
            let book = book.clone();
            async move { book.get("align", 1).await }
        });
        tokio::time::sleep(Duration::from_millis(5)).await;
        assert!(!waiting.is_finished());
        book.publish("align", 1, adapter(1));
        assert_eq!(waiting.await.unwrap(), Some(adapter(1)));
        book.settle("align", 3);
        assert_eq!(book.get("align", 3).await, Some(adapter(1)));
        book.publish("align", 0, adapter(0));
        assert_eq!(book.get("align", 0).await, Some(adapter(0)));
        book.publish("align", 2, adapter(2));
        book.reject("align", 2);
        assert_eq!(book.get("align", 2).await, Some(adapter(2)), "who measures it still sees it");
        assert_eq!(book.accepted("align", 3).await, Some(adapter(1)));
        book.reject("align", 1);
        assert_eq!(book.accepted("align", 2).await, Some(adapter(0)), "back to what training starts from");
    }
}
