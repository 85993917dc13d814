//! An edge: a bounded channel of [`Message`]s between one sender and one receiver.
//!
//! Bounded by rows and by bytes, whichever is reached first. A batch larger than the bound passes
//! when the edge is empty, or it could never pass. The end-of-round mark is a flag beside the
//! queue, so it needs no room and can't starve behind data. A sender that goes away without that
//! mark has failed, and the receiver is told so: silence would look like a short round.
//!
//! A graph with joins deadlocks where edges block (one branch of a diamond fills while the join
//! waits for the other), so an edge may also spill: what is over its bound waits in a file.
//!
//! Every poll of a sender or a receiver is one visit to the state under its lock, which either does
//! what is asked or leaves a waker; a wake-up is never lost between the two. The tests try every
//! order of such visits.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use datafusion::arrow::array::{Array, AsArray};
use datafusion::arrow::datatypes::DataType;
use metrics::{Counter, Gauge};
use tokio_util::sync::CancellationToken;

use super::spill::Spill;
use super::{Message, StageError};
use crate::observe::{EdgeStatus, Metrics};

/// How much an edge holds in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limit {
    pub rows: usize,
    pub bytes: usize,
}

impl Default for Limit {
    fn default() -> Self {
        Self { rows: 8192, bytes: 64 << 20 }
    }
}

impl Limit {
    fn holds(self, rows: usize, bytes: usize) -> bool {
        rows <= self.rows && bytes <= self.bytes
    }
}

/// What becomes of a message that an edge has no room for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Full {
    /// Its sender waits.
    Block,
    /// It waits in a file in this directory; the sender never does.
    Spill(PathBuf),
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
    /// What came after everything in `queue`.
    spill: Option<Spill>,
    rows_total: u64,
    blocked: Duration,
    /// When the sender began to wait, while it does.
    blocked_since: Option<Instant>,
    ended: bool,
    sender_gone: bool,
    receiver_gone: bool,
    /// The round is; both sides learn it at their next visit.
    cancelled: bool,
    /// Left by a sender that found no room.
    sender: Option<Waker>,
    /// Left by a receiver that found nothing.
    receiver: Option<Waker>,
}

impl State {
    /// The sender waits no more.
    fn unblock(&mut self) {
        self.blocked += self.blocked_since.take().map_or(Duration::ZERO, |since| since.elapsed());
    }
}

struct Gauges {
    rows: Gauge,
    bytes: Gauge,
    spilled: Gauge,
    sent: Counter,
    sent_bytes: Counter,
}

struct Shared {
    from: String,
    to: String,
    limit: Limit,
    full: Full,
    state: Mutex<State>,
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

    fn spill_failed(&self, error: &std::io::Error) -> StageError {
        StageError::external(format!(
            "rows of `{}` on their way to `{}` can't wait on disk: {error}",
            self.from, self.to
        ))
    }

    /// Queues the message or gives it back. A receiver that went away has read all it wanted (had it
    /// failed, the round would be cancelled), so its messages are dropped.
    fn push(&self, state: &mut State, message: Message) -> Result<Option<Message>, StageError> {
        if state.cancelled {
            return Err(StageError::cancelled());
        }
        if state.receiver_gone {
            return Ok(None);
        }
        let (rows, bytes) = (message.rows(), bytes_of(&message));
        if let (0, Some(last), None) = (rows, state.queue.back_mut(), &state.spill) {
            // Marks alone need no message of their own behind one that is still here.
            last.message.completes.extend(&message.completes);
            last.message.watermark = last.message.watermark.max(message.watermark);
            let more = 8 * message.completes.len();
            last.bytes += more;
            state.bytes += more;
            return Ok(None);
        }
        let spilled = state.spill.as_ref().map_or(0, Spill::messages);
        let fits = spilled == 0 && (state.queue.is_empty() || self.limit.holds(state.rows + rows, state.bytes + bytes));
        match (&self.full, fits) {
            (_, true) => {
                state.bytes += bytes;
                state.queue.push_back(Packet { message, bytes });
            }
            (Full::Block, false) => return Ok(Some(message)),
            (Full::Spill(dir), false) => {
                let spill = match &mut state.spill {
                    Some(spill) => spill,
                    none => none.insert(self.open_spill(dir)?),
                };
                spill.push(&message).map_err(|e| self.spill_failed(&e))?;
                self.gauges.spilled.set(spill.bytes() as f64);
            }
        }
        state.rows += rows;
        state.rows_total += rows as u64;
        self.show(state);
        self.gauges.sent.increment(rows as u64);
        self.gauges.sent_bytes.increment(bytes as u64);
        Ok(None)
    }

    fn open_spill(&self, dir: &std::path::Path) -> Result<Spill, StageError> {
        Spill::create(dir, &format!("{}-{}", self.from, self.to)).map_err(|e| self.spill_failed(&e))
    }

    fn pop(&self, state: &mut State) -> Received {
        if state.cancelled {
            return Received::Failed(StageError::cancelled());
        }
        if state.queue.is_empty()
            && let Some(spill) = &mut state.spill
        {
            match spill.pop() {
                Ok(None) => {}
                Ok(Some(message)) => state.queue.push_back(Packet { message, bytes: 0 }),
                Err(error) => return Received::Failed(self.spill_failed(&error)),
            }
            self.gauges.spilled.set(spill.bytes() as f64);
        }
        if let Some(packet) = state.queue.pop_front() {
            state.rows -= packet.message.rows();
            state.bytes -= packet.bytes;
            self.show(state);
            return Received::Message(packet.message);
        }
        match (state.ended, state.sender_gone) {
            (true, _) => Received::End,
            (false, true) => Received::Broken,
            (false, false) => Received::Empty,
        }
    }
}

/// Makes an edge from output `from` (`STAGE` or `STAGE.PORT`) to stage `to`. Whoever cancels
/// `cancel` also calls [`EdgeMeter::cancel`], which wakes both sides: an edge that watched the token at
/// every wait would spend more on that than on its messages.
pub fn edge(
    from: &str,
    to: &str,
    limit: Limit,
    full: Full,
    metrics: &Metrics,
    cancel: &CancellationToken,
) -> (EdgeSender, EdgeReceiver) {
    let name = format!("{from}->{to}");
    let labels = [("edge", name.as_str())];
    let capacity = if full == Full::Block { limit.rows as f64 } else { f64::INFINITY };
    metrics.gauge("flowrun_edge_capacity_rows", &labels).set(capacity);
    let capacity = if full == Full::Block { limit.bytes as f64 } else { f64::INFINITY };
    metrics.gauge("flowrun_edge_capacity_bytes", &labels).set(capacity);
    let shared = Arc::new(Shared {
        from: from.into(),
        to: to.into(),
        limit,
        full,
        state: Mutex::default(),
        gauges: Gauges {
            rows: metrics.gauge("flowrun_edge_rows", &labels),
            bytes: metrics.gauge("flowrun_edge_bytes", &labels),
            spilled: metrics.gauge("flowrun_edge_spilled_bytes", &labels),
            sent: metrics.counter("flowrun_edge_rows_total", &labels),
            sent_bytes: metrics.counter("flowrun_edge_bytes_total", &labels),
        },
    });
    let wait: Arc<str> = format!("room in front of {to}").into();
    (EdgeSender { shared: shared.clone(), wait }, EdgeReceiver { shared, cancel: cancel.clone() })
}

/// A view on an edge that outlives both of its ends.
#[derive(Clone)]
pub struct EdgeMeter(Arc<Shared>);

impl EdgeMeter {
    /// Both sides fail with `Cancelled` from now on.
    pub fn cancel(&self) {
        let mut state = self.0.lock();
        state.cancelled = true;
        let wakers = [state.sender.take(), state.receiver.take()];
        drop(state);
        wakers.into_iter().for_each(wake);
    }

    pub fn status(&self) -> EdgeStatus {
        let state = self.0.lock();
        let spill = state.spill.as_ref();
        EdgeStatus {
            from: self.0.from.clone(),
            to: self.0.to.clone(),
            messages: (state.queue.len() + spill.map_or(0, Spill::messages)) as u64,
            rows: state.rows as u64,
            bytes: state.bytes as u64,
            spilled_bytes: spill.map_or(0, Spill::bytes),
            capacity_rows: (self.0.full == Full::Block).then_some(self.0.limit.rows as u64),
            capacity_bytes: (self.0.full == Full::Block).then_some(self.0.limit.bytes as u64),
            blocked_seconds: (state.blocked + state.blocked_since.map_or(Duration::ZERO, |since| since.elapsed()))
                .as_secs_f64(),
            rows_total: state.rows_total,
        }
    }
}

pub struct EdgeSender {
    shared: Arc<Shared>,
    /// What a stage says while it waits here.
    wait: Arc<str>,
}

impl EdgeSender {
    pub fn meter(&self) -> EdgeMeter {
        EdgeMeter(self.shared.clone())
    }

    /// What the sending stage waits for where this edge is full.
    pub fn wait(&self) -> Arc<str> {
        self.wait.clone()
    }

    /// Queues the message, or gives it back where there is no room.
    pub fn offer(&mut self, message: Message) -> Result<Option<Message>, StageError> {
        let mut state = self.shared.lock();
        let back = self.shared.push(&mut state, message)?;
        let waker = if back.is_none() { state.receiver.take() } else { None };
        drop(state);
        wake(waker);
        Ok(back)
    }

    fn poll_send(&mut self, cx: &mut Context<'_>, slot: &mut Option<Message>) -> Poll<Result<(), StageError>> {
        let Some(message) = slot.take() else { return Poll::Ready(Ok(())) };
        let mut state = self.shared.lock();
        *slot = self.shared.push(&mut state, message).inspect_err(|_| state.unblock())?;
        if slot.is_some() {
            state.blocked_since.get_or_insert_with(Instant::now);
            state.sender = Some(cx.waker().clone());
            return Poll::Pending;
        }
        state.unblock();
        let waker = state.receiver.take();
        drop(state);
        wake(waker);
        Poll::Ready(Ok(()))
    }

    /// Waits for room.
    ///
    /// # Errors
    /// The round is cancelled, or what should wait on disk can't be written.
    pub async fn send(&mut self, message: Message) -> Result<(), StageError> {
        let Some(message) = self.offer(message)? else {
            return Ok(());
        };
        let mut slot = Some(message);
        poll_fn(|cx| self.poll_send(cx, &mut slot)).await
    }

    /// The end-of-round mark: nothing more will come.
    pub fn end(self) {
        self.shared.lock().ended = true;
    }
}

impl Drop for EdgeSender {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        state.unblock();
        state.sender_gone = true;
        let waker = state.receiver.take();
        drop(state);
        wake(waker);
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
    /// A message that waited on disk can't be read.
    Failed(StageError),
}

pub struct EdgeReceiver {
    shared: Arc<Shared>,
    cancel: CancellationToken,
}

impl EdgeReceiver {
    /// Takes what is there, without waiting.
    pub fn take(&mut self) -> Received {
        self.visit(None)
    }

    /// Takes what is there, or leaves a waker.
    fn visit(&mut self, waker: Option<&Waker>) -> Received {
        let mut state = self.shared.lock();
        let received = self.shared.pop(&mut state);
        if let (Received::Empty, Some(waker)) = (&received, waker) {
            state.receiver = Some(waker.clone());
        }
        let sender = if matches!(received, Received::Message(_)) { state.sender.take() } else { None };
        drop(state);
        wake(sender);
        received
    }

    fn poll_recv(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Message>, StageError>> {
        Poll::Ready(match self.visit(Some(cx.waker())) {
            Received::Message(message) => Ok(Some(message)),
            Received::End => Ok(None),
            Received::Empty => return Poll::Pending,
            Received::Failed(error) => Err(error),
            // Of two stages that are cancelled one goes first.
            Received::Broken if self.cancel.is_cancelled() => Err(StageError::cancelled()),
            Received::Broken => {
                let from = &self.shared.from;
                Err(StageError::internal(format!("`{from}` went away before the end of its round")))
            }
        })
    }

    /// The next message; `None` after the end-of-round mark. Cancel safe: a message is taken
    /// without a wait behind it.
    pub async fn recv(&mut self) -> Result<Option<Message>, StageError> {
        poll_fn(|cx| self.poll_recv(cx)).await
    }
}

impl Drop for EdgeReceiver {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        state.receiver_gone = true;
        state.queue.clear();
        state.spill = None;
        (state.rows, state.bytes) = (0, 0);
        self.shared.show(&state);
        let waker = state.sender.take();
        drop(state);
        wake(waker);
    }
}

fn wake(waker: Option<Waker>) {
    if let Some(waker) = waker {
        waker.wake();
    }
}

/// A message that carries no rows still weighs something, or any number of them would fit.
fn bytes_of(message: &Message) -> usize {
    let rows = message.batch.as_ref().map_or(0, |b| b.columns().iter().map(|c| array_bytes(c.as_ref())).sum());
    64 + 8 * message.completes.len() + rows
}

/// Of the rows themselves: a slice of a large array counts what it shows, not what it keeps alive.
fn array_bytes(array: &dyn Array) -> usize {
    let text = |offsets: &[i32]| offsets.last().zip(offsets.first()).map_or(0, |(to, from)| (to - from) as usize);
    let values = match array.data_type() {
        // The types that every row has, without the copy of an array's description.
        DataType::Utf8 => 4 * array.len() + text(array.as_string::<i32>().value_offsets()),
        DataType::List(_) => {
            let list = array.as_list::<i32>();
            let offsets = list.value_offsets();
            let first = offsets.first().map_or(0, |from| *from as usize);
            4 * array.len() + array_bytes(list.values().slice(first, text(offsets)).as_ref())
        }
        other => match other.primitive_width() {
            Some(width) => width * array.len(),
            None => array.to_data().get_slice_memory_size().unwrap_or_else(|_| array.get_array_memory_size()),
        },
    };
    values + if array.null_count() > 0 { array.len() / 8 } else { 0 }
}

#[cfg(test)]
mod tests {
    use datafusion::arrow::array::{ArrayRef, UInt64Array};
    use datafusion::arrow::record_batch::RecordBatch;
    use proptest::prelude::*;

    use super::*;

    fn message(first: u64, rows: u64) -> Message {
        let column: ArrayRef = Arc::new(UInt64Array::from_iter_values(first..first + rows));
        Message { batch: RecordBatch::try_from_iter([("_row", column)]).ok(), ..Message::default() }
    }

    fn open(limit: Limit) -> (EdgeSender, EdgeReceiver, CancellationToken) {
        let cancel = CancellationToken::new();
        let (tx, rx) = edge("a", "b", limit, Full::Block, &Metrics::default(), &cancel);
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
            let (mut tx, mut rx, _cancel) = open(Limit { rows: cap, bytes });
            let meter = tx.meter();
            let (mut next, mut got) = (0u64, Vec::new());
            for step in steps {
                match step {
                    Some(rows) => {
                        if tx.offer(message(next, rows)).unwrap().is_none() { next += rows }
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
        let (mut tx, mut rx, _cancel) = open(Limit { rows: 2, bytes: 1 << 20 });
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

    #[test]
    fn marks_alone_travel_with_the_message_before_them() {
        let (mut tx, mut rx, _cancel) = open(Limit::default());
        let marks = |row| Message { batch: None, completes: vec![row], watermark: row + 1 };
        for message in [marks(0), message(1, 1), marks(1), marks(2)] {
            assert!(tx.offer(message).unwrap().is_none());
        }
        let Received::Message(first) = rx.take() else { panic!("a message is lost") };
        assert_eq!((first.batch, first.completes, first.watermark), (None, vec![0], 1));
        let Received::Message(second) = rx.take() else { panic!("a message is lost") };
        assert_eq!((rows_of(&second), second.completes, second.watermark), (vec![1], vec![1, 2], 3));
        assert!(matches!(rx.take(), Received::Empty));
    }

    #[tokio::test]
    async fn the_end_needs_no_room() {
        let (mut tx, mut rx, _cancel) = open(Limit { rows: 1, bytes: 1 });
        tx.offer(message(0, 5)).unwrap();
        assert!(tx.offer(message(5, 1)).unwrap().is_some());
        tx.end();
        assert!(rx.recv().await.unwrap().is_some());
        assert!(rx.recv().await.unwrap().is_none());
    }

    #[tokio::test]
    async fn a_sender_that_vanishes_is_an_error_and_cancellation_wakes_both_sides() {
        let (tx, mut rx, _cancel) = open(Limit::default());
        drop(tx);
        assert!(rx.recv().await.unwrap_err().message.contains("`a` went away"));

        let (mut tx, mut rx, cancel) = open(Limit { rows: 1, bytes: 1 << 20 });
        let meter = tx.meter();
        tx.offer(message(0, 1)).unwrap();
        let blocked = tokio::spawn(async move { tx.send(message(1, 1)).await });
        tokio::task::yield_now().await;
        cancel.cancel();
        meter.cancel();
        assert_eq!(blocked.await.unwrap().unwrap_err().domain, crate::engine::Domain::Cancelled);
        assert_eq!(rx.recv().await.unwrap_err().domain, crate::engine::Domain::Cancelled);
    }

    #[tokio::test]
    async fn a_receiver_that_has_enough_does_not_stop_its_sender() {
        let (mut tx, rx, _cancel) = open(Limit { rows: 1, bytes: 1 });
        tx.offer(message(0, 1)).unwrap();
        drop(rx);
        tx.send(message(1, 1)).await.unwrap();
    }

    /// Over its bound an edge that spills keeps order, bounds its memory, and gives all back.
    #[tokio::test]
    async fn what_is_over_the_bound_of_a_spilling_edge_waits_on_disk() {
        let dir = tempfile::tempdir().unwrap();
        let cancel = CancellationToken::new();
        let limit = Limit { rows: 4, bytes: 1 << 20 };
        let full = Full::Spill(dir.path().into());
        let (mut tx, mut rx) = edge("a", "b", limit, full, &Metrics::default(), &cancel);
        let meter = tx.meter();
        let (mut sent, mut rows) = (0, Vec::new());
        for turn in 0..40u64 {
            for _ in 0..turn % 7 {
                tx.send(Message { completes: vec![sent], watermark: sent, ..message(sent, 2) }).await.unwrap();
                sent += 2;
            }
            for _ in 0..turn % 5 {
                let Received::Message(m) = rx.take() else { break };
                assert_eq!((m.completes[0], m.watermark), (rows.len() as u64, rows.len() as u64));
                rows.extend(rows_of(&m));
            }
            let status = meter.status();
            assert_eq!(status.rows, sent - rows.len() as u64);
            assert!(status.bytes < 1000 && (status.rows <= 4 || status.spilled_bytes > 0), "{status:?}");
        }
        tx.send(Message { completes: vec![7], ..Message::default() }).await.unwrap();
        tx.end();
        let mut last = Message::default();
        while let Some(m) = rx.recv().await.unwrap() {
            rows.extend(m.batch.as_ref().map(|_| rows_of(&m)).unwrap_or_default());
            last = m;
        }
        assert_eq!(rows, (0..sent).collect::<Vec<_>>());
        assert_eq!((last.completes, last.batch), (vec![7], None));
        assert_eq!((meter.status().spilled_bytes, std::fs::read_dir(dir.path()).unwrap().count()), (0, 0));
    }

    /// A task of the model below: polled when its waker was woken, like an executor does.
    struct Flag(std::sync::atomic::AtomicBool);

    impl std::task::Wake for Flag {
        fn wake(self: Arc<Self>) {
            self.0.store(true, std::sync::atomic::Ordering::SeqCst);
        }
    }

    /// Runs a sender of `count` messages and a receiver in the order of visits that `choices` says
    /// (wherever both could go on) and returns how many choices there were; what is not said is 0.
    fn schedule(count: u64, cap: usize, choices: &[usize]) -> usize {
        let (tx, mut rx, _cancel) = open(Limit { rows: cap, bytes: 1 << 20 });
        let mut tx = Some(tx);
        let flags = [0, 1].map(|_| Arc::new(Flag(true.into())));
        let wakers: Vec<Waker> = flags.iter().map(|f| f.clone().into()).collect();
        let (mut sent, mut slot, mut got, mut done, mut asked) = (0, None, 0, false, 0);
        while !done {
            let ready: Vec<usize> = (0..2).filter(|t| flags[*t].0.load(std::sync::atomic::Ordering::SeqCst)).collect();
            assert!(!ready.is_empty(), "a lost wake-up: {sent} sent, {got} received under {choices:?}");
            let task = match ready.as_slice() {
                [only] => *only,
                _ => {
                    asked += 1;
                    ready[choices.get(asked - 1).copied().unwrap_or(0)]
                }
            };
            flags[task].0.store(false, std::sync::atomic::Ordering::SeqCst);
            let mut cx = Context::from_waker(&wakers[task]);
            let goes_on = match (task, &mut tx) {
                (0, None) => false,
                (0, open) if sent == count && slot.is_none() => {
                    open.take().unwrap().end();
                    false
                }
                (0, Some(tx)) => {
                    if slot.is_none() {
                        slot = Some(message(sent, 1));
                        sent += 1;
                    }
                    tx.poll_send(&mut cx, &mut slot).is_ready()
                }
                _ => match rx.poll_recv(&mut cx) {
                    Poll::Pending => false,
                    Poll::Ready(Ok(Some(m))) => {
                        assert_eq!(rows_of(&m), [got]);
                        got += 1;
                        true
                    }
                    Poll::Ready(end) => {
                        assert!(end.unwrap().is_none());
                        done = true;
                        false
                    }
                },
            };
            if goes_on {
                flags[task].0.store(true, std::sync::atomic::Ordering::SeqCst);
            }
        }
        assert_eq!(got, count);
        asked
    }

    /// Every order of visits of both sides, as a model checker would try them.
    #[test]
    fn no_order_of_visits_loses_a_message_or_a_wake_up() {
        for (count, cap) in [(3, 1), (4, 2)] {
            let (mut choices, mut tried) = (Vec::new(), 0);
            loop {
                let asked = schedule(count, cap, &choices);
                tried += 1;
                choices.resize(asked, 0);
                while choices.last() == Some(&1) {
                    choices.pop();
                }
                match choices.last_mut() {
                    Some(last) => *last = 1,
                    None => break,
                }
            }
            assert!(tried > 50, "{tried} schedules");
        }
    }
}
