//! Whether the stages of a run stand still.

use std::sync::atomic::{AtomicBool, Ordering::SeqCst};

use tokio::sync::Notify;

/// Asked before every message, so asking is one load.
#[derive(Debug, Default)]
pub struct Pause {
    on: AtomicBool,
    ended: Notify,
}

impl Pause {
    pub fn is_on(&self) -> bool {
        self.on.load(SeqCst)
    }

    pub fn set(&self, on: bool) {
        self.on.store(on, SeqCst);
        if !on {
            self.ended.notify_waiters();
        }
    }

    /// Waits for the end of a pause.
    pub async fn over(&self) {
        loop {
            // Made before the look, so that an end in between is not missed.
            let ended = self.ended.notified();
            if !self.is_on() {
                return;
            }
            ended.await;
        }
    }
}
