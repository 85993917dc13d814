//! The processes of a stage.
//!
//! A row goes to the process with the fewest in flight. When a process ends, nobody knows which of its rows was the
//! cause, so each of them is asked again by itself, in a process that has nothing else to do: the others are
//! answered there, and the cause is found.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use datafusion::arrow::record_batch::RecordBatch;

use super::Checked;
use super::wire::{self, Cell};
use super::worker::{Failure, Worker};
use crate::engine::StageError;
use crate::stages::rows::RowError;

/// How long a process may take to end after its last row.
const PATIENCE: Duration = Duration::from_secs(5);

pub struct Workers {
    checked: Arc<Checked>,
    stage: String,
    next_key: AtomicU64,
    /// Those that are running, or have ended and not been replaced.
    shared: Mutex<Vec<Arc<Worker>>>,
    /// Rows that were in flight when a process ended are asked here, one at a time.
    lone: tokio::sync::Mutex<()>,
    lone_worker: Mutex<Vec<Arc<Worker>>>,
    /// Whether any row was answered.
    works: AtomicBool,
    /// Rows that ended every process they were asked in.
    given_up: AtomicU64,
}

impl Workers {
    /// Starts nothing before the first row.
    pub fn new(checked: Arc<Checked>, stage: &str) -> Self {
        Self {
            checked,
            stage: stage.to_owned(),
            next_key: AtomicU64::new(0),
            shared: Mutex::default(),
            lone: tokio::sync::Mutex::default(),
            lone_worker: Mutex::default(),
            works: AtomicBool::new(false),
            given_up: AtomicU64::new(0),
        }
    }

    /// The cells of one row.
    ///
    /// # Errors
    /// A row that has none; a program that can't be started, or that is no good: it ended with one row and with
    /// another by itself, and has answered none.
    pub async fn answer(&self, row: RecordBatch) -> Result<Vec<Cell>, RowError> {
        match self.ask(row).await? {
            Ok(cells) => {
                self.works.store(true, Ordering::Relaxed);
                Ok(cells)
            }
            Err(Failure::Row(reason)) => {
                self.works.store(true, Ordering::Relaxed);
                Err(RowError::DeadLetter(reason))
            }
            Err(Failure::Process(reason)) => {
                let before = self.given_up.fetch_add(1, Ordering::Relaxed);
                // Without retries the rows that were in flight are given up together.
                if before > 0 && self.checked.retries > 0 && !self.works.load(Ordering::Relaxed) {
                    return Err(StageError::user(format!("no row was answered: {reason}")).into());
                }
                Err(RowError::DeadLetter(reason))
            }
        }
    }

    async fn ask(&self, row: RecordBatch) -> Result<Result<Vec<Cell>, Failure>, StageError> {
        let key = self.next_key.fetch_add(1, Ordering::Relaxed);
        let row = wire::keyed(&row, key).map_err(StageError::internal)?;
        let worker = self.worker(&self.shared, self.checked.workers)?;
        let mut failure = match worker.ask(key, row.clone()).await {
            Ok(cells) => return Ok(Ok(cells)),
            Err(failure) => failure,
        };
        for _ in 0..self.checked.retries {
            if let Failure::Row(_) = failure {
                break;
            }
            let _alone = self.lone.lock().await;
            let worker = self.worker(&self.lone_worker, 1)?;
            failure = match worker.ask(key, row.clone()).await {
                Ok(cells) => return Ok(Ok(cells)),
                Err(failure) => failure,
            };
        }
        Ok(Err(failure))
    }

    /// The process of `workers` with the fewest rows in flight; another is started where all are busy and there may
    /// be more.
    fn worker(&self, workers: &Mutex<Vec<Arc<Worker>>>, most: usize) -> Result<Arc<Worker>, StageError> {
        let mut workers = locked(workers);
        workers.retain(|worker| worker.in_flight().is_some());
        let idlest = workers.iter().min_by_key(|worker| worker.in_flight());
        match idlest.filter(|worker| workers.len() >= most || worker.in_flight() == Some(0)) {
            Some(worker) => Ok(worker.clone()),
            None => {
                let worker = Worker::start(&self.checked, &self.stage)?;
                workers.push(worker.clone());
                Ok(worker)
            }
        }
    }

    /// Lets the processes end by themselves: they see the end of their input.
    pub async fn finish(&self) {
        let all: Vec<_> = [&self.shared, &self.lone_worker].iter().flat_map(|w| locked(w).clone()).collect();
        all.iter().for_each(|worker| worker.close());
        futures::future::join_all(all.iter().map(|worker| worker.ended(PATIENCE))).await;
    }
}

/// A stage that is stopped leaves nothing running.
impl Drop for Workers {
    fn drop(&mut self) {
        for workers in [&self.shared, &self.lone_worker] {
            locked(workers).iter().for_each(|worker| worker.kill());
        }
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}
