//! One process of a stage, with the rows that it has not answered.
//!
//! Three threads serve it, because its pipes block: one writes rows, one reads answers, one reads what it says on
//! standard error. Whatever ends it, rows without an answer are told why.

use std::collections::{HashMap, VecDeque};
use std::io::{self, BufReader};
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, ChildStderr, ChildStdin, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;
use std::time::{Duration, Instant};

use datafusion::arrow::record_batch::RecordBatch;
use tokio::sync::oneshot;

use super::wire::{Answer, Cell, RowWriter, next_line, read_answers};
use super::{Checked, group};
use crate::engine::StageError;
use crate::observe::shortened;

/// Bytes of a line on standard error; a longer one comes in parts.
const LONGEST_WORD: u64 = 4096;
/// Lines on standard error that are told with a failure.
const LAST_WORDS: usize = 3;
/// How long a process that closed its output has to end by itself, so that its own exit status is seen.
const TO_EXIT: Duration = Duration::from_millis(100);
/// How long its last words are waited for; what it started outside of its group may keep the pipe open.
const TO_SPEAK: Duration = Duration::from_millis(500);

/// Why a row has no cells.
#[derive(Debug, Clone, PartialEq)]
pub enum Failure {
    /// The program gives it up, or answered something that is no answer.
    Row(String),
    /// The process ended first.
    Process(String),
}

pub struct Worker {
    stage: String,
    timeout: Duration,
    state: Mutex<State>,
    /// None once it is being ended: whoever took it waits for it.
    leader: Mutex<Option<Child>>,
    /// Rows to be written; none once no more will come.
    rows: Mutex<Option<Sender<RecordBatch>>>,
    words: Mutex<VecDeque<String>>,
    /// Hangs up when standard error is at its end.
    spoke: Mutex<Receiver<()>>,
}

struct State {
    asked: HashMap<u64, oneshot::Sender<Result<Vec<Cell>, Failure>>>,
    /// The last answer, or the first row after idleness.
    sign_of_life: Instant,
    /// Why there will be no more answers, once that is so.
    over: Option<String>,
}

impl Worker {
    /// Starts the program.
    ///
    /// # Errors
    /// A program that can't be started.
    pub fn start(checked: &Arc<Checked>, stage: &str) -> Result<Arc<Self>, StageError> {
        let mut command = Command::new(&checked.program);
        command.args(&checked.arguments).current_dir(&checked.folder);
        checked.environment.give_to(&mut command);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let program = checked.program.display();
        let mut child = group::start(&mut command).map_err(|e| match e.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::PermissionDenied => StageError::user(format!(
                "the program {program} can't be started: {e}; install it, make it executable, or write its path"
            )),
            _ => StageError::external(format!("the program {program} can't be started: {e}")),
        })?;
        tracing::debug!(stage, %program, process = child.id(), "started");
        let pipes = (child.stdin.take(), child.stdout.take(), child.stderr.take());
        let (Some(stdin), Some(stdout), Some(stderr)) = pipes else {
            return Err(StageError::internal("a process without pipes"));
        };
        let (rows, to_write) = channel();
        let (speaks, spoke) = channel();
        let worker = Arc::new(Self {
            stage: stage.to_owned(),
            timeout: checked.timeout,
            state: Mutex::new(State { asked: HashMap::new(), sign_of_life: Instant::now(), over: None }),
            leader: Mutex::new(Some(child)),
            rows: Mutex::new(Some(rows)),
            words: Mutex::default(),
            spoke: Mutex::new(spoke),
        });
        let threads = worker.serve(checked.clone(), (stdin, stdout, stderr), to_write, speaks);
        threads.map_err(|e| {
            worker.end("was not served");
            StageError::external(format!("no thread for {program}: {e}"))
        })?;
        Ok(worker)
    }

    fn serve(
        self: &Arc<Self>,
        checked: Arc<Checked>,
        (stdin, stdout, stderr): (ChildStdin, ChildStdout, ChildStderr),
        to_write: Receiver<RecordBatch>,
        speaks: Sender<()>,
    ) -> io::Result<()> {
        let thread = |what: &str| thread::Builder::new().name(format!("{} {what}", self.stage));
        let (worker, format) = (self.clone(), checked.format);
        thread("errors").spawn(move || worker.listen(stderr, speaks))?;
        let worker = self.clone();
        thread("rows").spawn(move || worker.write(RowWriter::new(stdin, format), &to_write))?;
        let worker = self.clone();
        thread("answers").spawn(move || {
            let read = read_answers(stdout, format, &checked.columns, |answer| worker.answered(answer));
            worker.end(&read.err().unwrap_or_default());
        })?;
        Ok(())
    }

    fn write(&self, mut to: RowWriter<ChildStdin>, rows: &Receiver<RecordBatch>) {
        let mut written = Ok(());
        while let (Ok(()), Ok(row)) = (&written, rows.recv()) {
            written = to.write(&row);
        }
        match written.and_then(|()| to.finish()) {
            // Of a process that is gone its output tells.
            Err(e) if e.kind() != io::ErrorKind::BrokenPipe => self.end(&format!("can't be sent a row: {e}")),
            _ => {}
        }
    }

    fn listen(&self, stderr: ChildStderr, _speaks: Sender<()>) {
        let mut stderr = BufReader::new(stderr);
        while let Ok(Some(line)) = next_line(&mut stderr, LONGEST_WORD) {
            let line = shortened(&String::from_utf8_lossy(&line));
            if line.is_empty() {
                continue;
            }
            tracing::info!(stage = self.stage, "{line}");
            let mut words = locked(&self.words);
            words.push_back(line);
            if words.len() > LAST_WORDS {
                words.pop_front();
            }
        }
    }

    fn answered(&self, (key, answer): Answer) -> Result<(), String> {
        let mut state = locked(&self.state);
        state.sign_of_life = Instant::now();
        let asked = state.asked.remove(&key).ok_or_else(|| format!("answered a row {key} that it was not asked"))?;
        // Whoever asked may have gone.
        let _ = asked.send(answer.map_err(Failure::Row));
        Ok(())
    }

    /// Rows that wait for an answer; none where there will be none.
    pub fn in_flight(&self) -> Option<usize> {
        let state = locked(&self.state);
        state.over.is_none().then_some(state.asked.len())
    }

    /// The cells of one row, sent with its key.
    pub async fn ask(self: &Arc<Self>, key: u64, row: RecordBatch) -> Result<Vec<Cell>, Failure> {
        let mut answer = self.expect(key)?;
        if let Some(rows) = locked(&self.rows).as_ref() {
            // A thread that writes no more has told, or is about to, why.
            let _ = rows.send(row);
        }
        loop {
            let deadline = locked(&self.state).sign_of_life + self.timeout;
            tokio::select! {
                biased;
                answer = &mut answer => {
                    return answer.unwrap_or_else(|_| Err(Failure::Process("the program is gone".into())));
                }
                () = tokio::time::sleep_until(deadline.into()) => self.time_is_up().await,
            }
        }
    }

    fn expect(&self, key: u64) -> Result<oneshot::Receiver<Result<Vec<Cell>, Failure>>, Failure> {
        let (asked, answer) = oneshot::channel();
        let mut state = locked(&self.state);
        if let Some(why) = &state.over {
            return Err(Failure::Process(why.clone()));
        }
        if state.asked.is_empty() {
            state.sign_of_life = Instant::now();
        }
        state.asked.insert(key, asked);
        Ok(answer)
    }

    /// Ends it, unless another row was answered meanwhile.
    async fn time_is_up(self: &Arc<Self>) {
        if locked(&self.state).sign_of_life + self.timeout > Instant::now() {
            return;
        }
        let why = format!("gave no answer for {} s", self.timeout.as_secs_f64());
        self.end_elsewhere(why).await;
    }

    async fn end_elsewhere(self: &Arc<Self>, why: String) {
        let worker = self.clone();
        if let Err(error) = tokio::task::spawn_blocking(move || worker.end(&why)).await {
            tracing::warn!(stage = self.stage, %error, "a process was not ended");
        }
    }

    /// Ends the process and all that it started, and tells the rows in flight. `fault` is what it did, empty where it
    /// closed its output. Blocks.
    fn end(&self, fault: &str) {
        let Some(mut child) = locked(&self.leader).take() else { return };
        if fault.is_empty() {
            thread::sleep(TO_EXIT);
        }
        group::kill(&child);
        let status = child.wait();
        // Its last words are all there, or the pipe is held open by something else.
        let _ = locked(&self.spoke).recv_timeout(TO_SPEAK);
        let unanswered = {
            let mut state = locked(&self.state);
            let why = self.obituary(fault, status, state.asked.len());
            state.over = Some(why.clone());
            state.asked.drain().map(|(_, asked)| (asked, why.clone())).collect::<Vec<_>>()
        };
        for (asked, why) in unanswered {
            let _ = asked.send(Err(Failure::Process(why)));
        }
    }

    fn obituary(&self, fault: &str, status: io::Result<ExitStatus>, unanswered: usize) -> String {
        let mut why = match (fault, &status) {
            ("", Ok(status)) => format!("the program ended ({status})"),
            ("", Err(e)) => format!("the program ended ({e})"),
            (fault, _) => format!("the program {fault}, and was ended"),
        };
        let words = locked(&self.words).iter().cloned().collect::<Vec<_>>().join(" | ");
        if !words.is_empty() {
            why += &format!("; its last words: {words}");
        }
        // Ended by us, with nothing left to do.
        let by_us = |status: &ExitStatus| fault.is_empty() && status.signal() == Some(libc::SIGKILL);
        if unanswered > 0 || !status.is_ok_and(|status| status.success() || by_us(&status)) {
            tracing::warn!(stage = self.stage, unanswered, "{why}");
        }
        why
    }

    /// No more rows will come.
    pub fn close(&self) {
        locked(&self.rows).take();
    }

    /// Waits until it has ended by itself; after `patience` it is ended.
    pub async fn ended(self: &Arc<Self>, patience: Duration) {
        let until = Instant::now() + patience;
        while self.in_flight().is_some() && Instant::now() < until {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        if self.in_flight().is_some() {
            self.end_elsewhere("did not end when its input did".into()).await;
        }
    }

    /// Kills it and all that it started; whoever reads its answers buries it.
    pub fn kill(&self) {
        if let Some(child) = locked(&self.leader).as_ref() {
            group::kill(child);
        }
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}
