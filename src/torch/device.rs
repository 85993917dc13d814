//! One OS thread a device.
//!
//! The thread owns every tensor on its device. Its work is cut into quanta: a decode step, a
//! prefill chunk, a scoring batch, a training micro-batch. Between two quanta it takes what has
//! been sent to it, so a trainer and a sampler on one device both move.

use std::any::Any;
use std::collections::{BTreeMap, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Receiver, RecvError, Sender, TryRecvError, channel};
use std::thread::JoinHandle;
use std::time::Instant;

use std::sync::Arc;
use tch::Device;
use tokio::sync::oneshot;

use super::GradGuard;
use crate::observe::Trace;

/// What a tenant has left after a quantum.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Turn {
    /// More to do: call again after the others had their turn.
    Busy,
    /// Nothing to do until something is submitted.
    Idle,
}

/// Something that lives on a device thread and works in quanta.
pub trait Tenant: Any {
    /// One quantum.
    fn turn(&mut self) -> Turn;
}

/// The tenants of a device thread, by name.
pub struct Tenants {
    device: Device,
    by_name: BTreeMap<String, Box<dyn Tenant>>,
}

impl Tenants {
    pub fn device(&self) -> Device {
        self.device
    }

    /// The tenant `name`, if it is there and of type `T`.
    pub fn get<T: Tenant>(&mut self, name: &str) -> Option<&mut T> {
        let tenant: &mut dyn Any = self.by_name.get_mut(name)?.as_mut();
        tenant.downcast_mut()
    }

    pub fn insert(&mut self, name: impl Into<String>, tenant: impl Tenant) {
        self.by_name.insert(name.into(), Box::new(tenant));
    }

    pub fn remove(&mut self, name: &str) {
        self.by_name.remove(name);
    }
}

/// The device thread can't answer.
#[derive(Debug, Clone, thiserror::Error)]
pub enum DeviceError {
    #[error("the thread of {0} has ended")]
    Gone(String),
    #[error("work on {0} panicked; the log has the place")]
    Panicked(String),
}

type Job = Box<dyn FnOnce(&mut Tenants) + Send>;

enum Command {
    /// Quick: submits work, asks for a figure. All that wait are taken before the next quantum.
    Call(Job),
    /// A quantum of its own, such as a training micro-batch.
    Quantum(Job),
}

/// Handle to a device thread. The thread ends when the handle is dropped, after the running quantum.
pub struct DeviceThread {
    name: String,
    device: Device,
    commands: Option<Sender<Command>>,
    trace: Arc<Trace>,
    thread: Option<JoinHandle<()>>,
}

impl DeviceThread {
    /// Starts the thread of `device`. `name` is how flows and traces call it (`cpu:1` and `cpu:0`
    /// are different threads on one [`Device::Cpu`]); `threads` are libtorch's intra-op workers.
    pub fn spawn(name: &str, device: Device, threads: usize, trace: Arc<Trace>) -> std::io::Result<Self> {
        super::init();
        let (commands, inbox) = channel();
        let thread = std::thread::Builder::new().name(name.to_owned()).spawn(move || {
            // Intra-op threads are counted per calling thread and must be set before any operation.
            tch::set_num_threads(i32::try_from(threads).unwrap_or(1).max(1));
            let _no_grad = GradGuard::set(false);
            serve(&inbox, Tenants { device, by_name: BTreeMap::new() });
        })?;
        Ok(Self { name: name.to_owned(), device, commands: Some(commands), trace, thread: Some(thread) })
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn device(&self) -> Device {
        self.device
    }

    /// Runs `f` on the thread before its next quantum. `f` is to be quick.
    pub async fn call<R, F>(&self, f: F) -> Result<R, DeviceError>
    where
        R: Send + 'static,
        F: FnOnce(&mut Tenants) -> R + Send + 'static,
    {
        let (reply, answer) = oneshot::channel();
        self.send(Command::Call(Box::new(move |tenants| {
            // A caller that went away needs no answer.
            let _ = reply.send(f(tenants));
        })))?;
        answer.await.map_err(|_| DeviceError::Panicked(self.name.clone()))
    }

    /// Runs `f` on the thread before its next quantum; nobody waits for it, and a thread that has ended needs
    /// none of it.
    pub fn post<F: FnOnce(&mut Tenants) + Send + 'static>(&self, f: F) {
        let _ = self.send(Command::Call(Box::new(f)));
    }

    /// Runs `f` on the thread as a quantum; it is recorded in the trace as `name` for `stage`.
    pub async fn quantum<R, F>(&self, name: &'static str, stage: &str, f: F) -> Result<R, DeviceError>
    where
        R: Send + 'static,
        F: FnOnce(&mut Tenants) -> R + Send + 'static,
    {
        let (reply, answer) = oneshot::channel();
        let (trace, track, stage) = (self.trace.clone(), self.name.clone(), stage.to_owned());
        self.send(Command::Quantum(Box::new(move |tenants| {
            let start = Instant::now();
            let result = f(tenants);
            trace.record(&track, name, &stage, start);
            let _ = reply.send(result);
        })))?;
        answer.await.map_err(|_| DeviceError::Panicked(self.name.clone()))
    }

    fn send(&self, command: Command) -> Result<(), DeviceError> {
        let gone = || DeviceError::Gone(self.name.clone());
        self.commands.as_ref().ok_or_else(gone)?.send(command).map_err(|_| gone())
    }
}

impl Drop for DeviceThread {
    fn drop(&mut self) {
        self.commands = None;
        if let Some(thread) = self.thread.take()
            && thread.thread().id() != std::thread::current().id()
        {
            let _ = thread.join();
        }
    }
}

/// Turns of the tenants between two quanta, while a tenant is busy: what others wait for (samples,
/// verdicts, references) goes before what waits for them, and a trainer still moves.
const TURNS_PER_QUANTUM: usize = 8;

fn serve(inbox: &Receiver<Command>, mut tenants: Tenants) {
    let mut quanta = VecDeque::new();
    let mut busy = false;
    let mut turns = 0;
    loop {
        if take_commands(inbox, &mut tenants, &mut quanta, busy).is_err() {
            return;
        }
        if (!busy || turns >= TURNS_PER_QUANTUM)
            && let Some(quantum) = quanta.pop_front()
        {
            turns = 0;
            run(quantum, &mut tenants);
        }
        turns += 1;
        busy = false;
        tenants.by_name.retain(|_, tenant| match catch_unwind(AssertUnwindSafe(|| tenant.turn())) {
            Ok(turn) => {
                busy |= turn == Turn::Busy;
                true
            }
            // Whoever waits for it is told by its reply channels, which are dropped with it.
            Err(_) => false,
        });
    }
}

/// Runs all calls that wait and queues the quanta. Blocks only when there is nothing else to do.
fn take_commands(
    inbox: &Receiver<Command>,
    tenants: &mut Tenants,
    quanta: &mut VecDeque<Job>,
    busy: bool,
) -> Result<(), RecvError> {
    let mut wait = !busy && quanta.is_empty();
    loop {
        let command = if wait {
            inbox.recv()?
        } else {
            match inbox.try_recv() {
                Ok(command) => command,
                Err(TryRecvError::Empty) => return Ok(()),
                Err(TryRecvError::Disconnected) => return Err(RecvError),
            }
        };
        wait = false;
        match command {
            Command::Call(job) => run(job, tenants),
            Command::Quantum(job) => quanta.push_back(job),
        }
    }
}

/// A panic is the job's: its reply channel is dropped, its caller told, the thread lives on.
fn run(job: Job, tenants: &mut Tenants) {
    let _ = catch_unwind(AssertUnwindSafe(|| job(tenants)));
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Count {
        left: u32,
        done: u32,
    }

    impl Tenant for Count {
        fn turn(&mut self) -> Turn {
            if self.left == 0 {
                return Turn::Idle;
            }
            self.left -= 1;
            self.done += 1;
            if self.left > 0 { Turn::Busy } else { Turn::Idle }
        }
    }

    fn thread() -> DeviceThread {
        DeviceThread::spawn("cpu:0", Device::Cpu, 1, Arc::default()).unwrap()
    }

    #[tokio::test]
    async fn a_tenant_and_quanta_take_turns() {
        let device = thread();
        device.call(|t| t.insert("count", Count { left: 1_000, done: 0 })).await.unwrap();
        let mut seen = Vec::new();
        for _ in 0..3 {
            seen.push(device.quantum("q", "s", |t| t.get::<Count>("count").map(|c| c.done)).await.unwrap());
        }
        assert!(seen[0] < seen[2] || seen[2] == Some(1_000), "the tenant stood still: {seen:?}");
    }

    #[tokio::test]
    async fn a_panic_is_told_and_survived() {
        let device = thread();
        let told = device.quantum("q", "s", |_| -> u32 { panic!("inside") }).await;
        assert!(matches!(told, Err(DeviceError::Panicked(_))));
        assert_eq!(device.call(|_| 7).await.unwrap(), 7);
    }
}
