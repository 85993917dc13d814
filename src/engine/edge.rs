//! An edge: a bounded channel of [`Message`]s between one sender and one receiver.
//!
//! Bounded by rows and by bytes, whichever is reached first. A batch larger than the bound passes
//! when the edge is empty, or it could never pass. The end-of-round mark is a flag beside the
//! queue, so it needs no room and can't starve behind data. A sender that goes away without that
//! mark has failed, and the receiver is told so: silence would look like a short round.
//!
//! A graph with joins deadlocks on bounded edges (one branch of a diamond fills while the join
//! waits for the other), so an edge may also be without a bound; it is counted all the same.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use datafusion::arrow::array::Array;
use datafusion::arrow::record_batch::RecordBatch;
use metrics::{Counter, Gauge};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use super::{Message, StageError};
use crate::observe::{EdgeStatus, Metrics};

/// How much an edge holds before its sender waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limit {
    pub rows: usize,
    pub bytes: usize,
}

impl Default for Limit {
    fn default() -> Self {
        Self { rows: 1024, bytes: 64 << 20 }
    }
}

impl Limit {
    fn holds(self, rows: usize, bytes: usize) -> bool {
        rows <= self.rows && bytes <= self.bytes
    }
}

struct Packet {
    message: Message,
    bytes: usize,
}

#[derive(Default)]
struct State {
    queue: VecDeque<Packet>,
    rows: usize,
    bytes: usize,
    rows_total: u64,
    blocked: Duration,
    ended: bool,
    sender_gone: bool,
    receiver_gone: bool,
}

struct Gauges {
    rows: Gauge,
    bytes: Gauge,
    /// A gauge because counters of this façade are whole numbers and these are seconds.
    blocked: Gauge,
    sent: Counter,
}

struct Shared {
    from: String,
    to: String,
    limit: Option<Limit>,
    state: Mutex<State>,
    /// Wakes the sender: something left the queue, or the receiver went away.
    room: Notify,
    /// Wakes the receiver: something came, or the sender ended or went away.
    items: Notify,
    gauges: Gauges,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn show(&self, state: &State) {
        self.gauges.rows.set(state.rows as f64);
        self.gauges.bytes.set(state.bytes as f64);
    }
}

/// Makes an edge from output `from` (`STAGE` or `STAGE.PORT`) to stage `to`.
/// Without a limit it never blocks. Cancelling `cancel` wakes both sides.
pub fn edge(
    from: &str,
    to: &str,
    limit: Option<Limit>,
    metrics: &Metrics,
    cancel: &CancellationToken,
) -> (EdgeSender, EdgeReceiver) {
    let name = format!("{from}->{to}");
    let labels = [("edge", name.as_str())];
    let capacity = limit.map_or(f64::INFINITY, |l| l.rows as f64);
    metrics.gauge("flowrun_edge_capacity_rows", &labels).set(capacity);
    let shared = Arc::new(Shared {
        from: from.into(),
        to: to.into(),
        limit,
        state: Mutex::default(),
        room: Notify::new(),
        items: Notify::new(),
        gauges: Gauges {
            rows: metrics.gauge("flowrun_edge_rows", &labels),
            bytes: metrics.gauge("flowrun_edge_bytes", &labels),
            blocked: metrics.gauge("flowrun_edge_blocked_seconds_total", &labels),
            sent: metrics.counter("flowrun_edge_rows_total", &labels),
        },
    });
    (EdgeSender { shared: shared.clone(), cancel: cancel.clone() }, EdgeReceiver { shared, cancel: cancel.clone() })
}

/// A view on an edge that outlives both of its ends.
#[derive(Clone)]
pub struct EdgeMeter(Arc<Shared>);

impl EdgeMeter {
    pub fn status(&self) -> EdgeStatus {
        let state = self.0.lock();
        EdgeStatus {
            from: self.0.from.clone(),
            to: self.0.to.clone(),
            messages: state.queue.len() as u64,
            rows: state.rows as u64,
            bytes: state.bytes as u64,
            capacity_rows: self.0.limit.map(|l| l.rows as u64),
            blocked_seconds: state.blocked.as_secs_f64(),
            rows_total: state.rows_total,
        }
    }
}

pub struct EdgeSender {
    shared: Arc<Shared>,
    cancel: CancellationToken,
}

impl EdgeSender {
    pub fn meter(&self) -> EdgeMeter {
        EdgeMeter(self.shared.clone())
    }

    pub fn to(&self) -> &str {
        &self.shared.to
    }

    /// Queues the message, or gives it back where there is no room. A receiver that went away has
    /// read all it wanted (had it failed, the round would be cancelled), so its messages are dropped.
    pub fn offer(&mut self, message: Message) -> Result<(), Message> {
        let (rows, bytes) = (message.rows(), bytes_of(&message));
        let mut state = self.shared.lock();
        if state.receiver_gone {
            return Ok(());
        }
        let fits = self.shared.limit.is_none_or(|l| l.holds(state.rows + rows, state.bytes + bytes));
        if !fits && !state.queue.is_empty() {
            return Err(message);
        }
        state.rows += rows;
        state.bytes += bytes;
        state.rows_total += rows as u64;
        state.queue.push_back(Packet { message, bytes });
        self.shared.show(&state);
        drop(state);
        self.shared.gauges.sent.increment(rows as u64);
        self.shared.items.notify_one();
        Ok(())
    }

    /// Waits for room. Fails only when the round is cancelled.
    pub async fn send(&mut self, message: Message) -> Result<(), StageError> {
        let Err(mut message) = self.offer(message) else {
            return Ok(());
        };
        let since = Instant::now();
        let result = loop {
            tokio::select! {
                biased;
                () = self.cancel.cancelled() => break Err(StageError::cancelled()),
                () = self.shared.room.notified() => {}
            }
            match self.offer(message) {
                Ok(()) => break Ok(()),
                Err(back) => message = back,
            }
        };
        let blocked = since.elapsed();
        self.shared.lock().blocked += blocked;
        self.shared.gauges.blocked.increment(blocked.as_secs_f64());
        result
    }

    /// The end-of-round mark: nothing more will come.
    pub fn end(self) {
        self.shared.lock().ended = true;
    }
}

impl Drop for EdgeSender {
    fn drop(&mut self) {
        self.shared.lock().sender_gone = true;
        self.shared.items.notify_one();
    }
}

/// What a receiver finds when it looks.
#[derive(Debug)]
pub enum Received {
    Message(Message),
    /// The end-of-round mark, behind everything that was sent.
    End,
    /// Nothing yet.
    Empty,
    /// The sender went away without its mark.
    Broken,
}

pub struct EdgeReceiver {
    shared: Arc<Shared>,
    cancel: CancellationToken,
}

impl EdgeReceiver {
    /// Takes what is there, without waiting.
    pub fn take(&mut self) -> Received {
        let mut state = self.shared.lock();
        if let Some(packet) = state.queue.pop_front() {
            state.rows -= packet.message.rows();
            state.bytes -= packet.bytes;
            self.shared.show(&state);
            drop(state);
            self.shared.room.notify_one();
            return Received::Message(packet.message);
        }
        match (state.ended, state.sender_gone) {
            (true, _) => Received::End,
            (false, true) => Received::Broken,
            (false, false) => Received::Empty,
        }
    }

    /// The next message; `None` after the end-of-round mark. Cancel safe: a message is taken
    /// without a wait behind it.
    pub async fn recv(&mut self) -> Result<Option<Message>, StageError> {
        loop {
            if self.cancel.is_cancelled() {
                return Err(StageError::cancelled());
            }
            match self.take() {
                Received::Message(message) => return Ok(Some(message)),
                Received::End => return Ok(None),
                Received::Broken => {
                    let from = &self.shared.from;
                    return Err(StageError::internal(format!("`{from}` went away before the end of its round")));
                }
                Received::Empty => {}
            }
            tokio::select! {
                biased;
                () = self.cancel.cancelled() => return Err(StageError::cancelled()),
                () = self.shared.items.notified() => {}
            }
        }
    }
}

impl Drop for EdgeReceiver {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        state.receiver_gone = true;
        state.queue.clear();
        (state.rows, state.bytes) = (0, 0);
        self.shared.show(&state);
        drop(state);
        self.shared.room.notify_one();
    }
}

/// A message that carries no rows still weighs something, or any number of them would fit.
fn bytes_of(message: &Message) -> usize {
    64 + 8 * message.completes.len() + message.batch.as_ref().map_or(0, batch_bytes)
}

/// Of the rows themselves: a slice of a large batch counts what it shows, not what it keeps alive.
fn batch_bytes(batch: &RecordBatch) -> usize {
    let size = |array: &Arc<dyn Array>| {
        array.to_data().get_slice_memory_size().unwrap_or_else(|_| array.get_array_memory_size())
    };
    batch.columns().iter().map(size).sum()
}

#[cfg(test)]
mod tests {
    use datafusion::arrow::array::{ArrayRef, UInt64Array};
    use proptest::prelude::*;

    use super::*;

    fn message(first: u64, rows: u64) -> Message {
        let column: ArrayRef = Arc::new(UInt64Array::from_iter_values(first..first + rows));
        Message { batch: RecordBatch::try_from_iter([("_row", column)]).ok(), ..Message::default() }
    }

    fn open(limit: Option<Limit>) -> (EdgeSender, EdgeReceiver, CancellationToken) {
        let cancel = CancellationToken::new();
        let (tx, rx) = edge("a", "b", limit, &Metrics::default(), &cancel);
        (tx, rx, cancel)
    }

    fn rows_of(message: &Message) -> Vec<u64> {
        let batch = message.batch.as_ref().unwrap();
        batch.column(0).as_any().downcast_ref::<UInt64Array>().unwrap().values().to_vec()
    }

    proptest! {
        /// Any interleaving: nothing lost, nothing twice, order kept, bounds kept.
        #[test]
        fn is_a_bounded_queue(steps in prop::collection::vec(prop::option::of(0u64..9), 1..200), cap in 1usize..12, bytes in 60usize..900) {
            let (mut tx, mut rx, _cancel) = open(Some(Limit { rows: cap, bytes }));
            let meter = tx.meter();
            let (mut next, mut got) = (0u64, Vec::new());
            for step in steps {
                match step {
                    Some(rows) => {
                        if tx.offer(message(next, rows)).is_ok() { next += rows }
                    }
                    None => if let Received::Message(m) = rx.take() { got.extend(rows_of(&m)) },
                }
                let status = meter.status();
                prop_assert!(status.messages <= 1 || (status.rows as usize <= cap && status.bytes as usize <= bytes));
                prop_assert_eq!(status.rows, next - got.len() as u64);
            }
            tx.end();
            while let Received::Message(m) = rx.take() { got.extend(rows_of(&m)) }
            prop_assert!(matches!(rx.take(), Received::End));
            prop_assert_eq!(got, (0..next).collect::<Vec<_>>());
            prop_assert_eq!(meter.status().bytes, 0);
        }
    }

    #[tokio::test]
    async fn a_blocked_sender_goes_on_when_there_is_room_and_its_wait_is_counted() {
        let (mut tx, mut rx, _cancel) = open(Some(Limit { rows: 2, bytes: 1 << 20 }));
        let meter = tx.meter();
        let sender = tokio::spawn(async move {
            for row in 0..100 {
                tx.send(message(row * 3, 3)).await.unwrap();
            }
            tx.end();
        });
        tokio::time::sleep(Duration::from_millis(20)).await;
        let mut rows = Vec::new();
        while let Some(m) = rx.recv().await.unwrap() {
            rows.extend(rows_of(&m));
        }
        sender.await.unwrap();
        assert_eq!(rows, (0..300).collect::<Vec<_>>());
        assert!(meter.status().blocked_seconds >= 0.01);
    }

    #[tokio::test]
    async fn the_end_needs_no_room() {
        let (mut tx, mut rx, _cancel) = open(Some(Limit { rows: 1, bytes: 1 }));
        tx.offer(message(0, 5)).unwrap();
        assert!(tx.offer(message(5, 1)).is_err());
        tx.end();
        assert!(rx.recv().await.unwrap().is_some());
        assert!(rx.recv().await.unwrap().is_none());
    }

    #[tokio::test]
    async fn a_sender_that_vanishes_is_an_error_and_cancellation_wakes_both_sides() {
        let (tx, mut rx, _cancel) = open(None);
        drop(tx);
        assert!(rx.recv().await.unwrap_err().message.contains("`a` went away"));

        let (mut tx, mut rx, cancel) = open(Some(Limit { rows: 1, bytes: 1 << 20 }));
        tx.offer(message(0, 1)).unwrap();
        let blocked = tokio::spawn(async move { tx.send(message(1, 1)).await });
        tokio::task::yield_now().await;
        cancel.cancel();
        assert_eq!(blocked.await.unwrap().unwrap_err().domain, crate::engine::Domain::Cancelled);
        assert_eq!(rx.recv().await.unwrap_err().domain, crate::engine::Domain::Cancelled);
    }

    #[tokio::test]
    async fn a_receiver_that_has_enough_does_not_stop_its_sender() {
        let (mut tx, rx, _cancel) = open(Some(Limit { rows: 1, bytes: 1 }));
        tx.offer(message(0, 1)).unwrap();
        drop(rx);
        tx.send(message(1, 1)).await.unwrap();
    }
}
