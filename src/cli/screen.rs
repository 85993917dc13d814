//! The terminal of a run: the view at the bottom, what is logged above it, keys. stderr all of it; stdout is for results.

use std::io::{self, IsTerminal, Write};
use std::sync::{Arc, Mutex, MutexGuard};

use console::Term;
use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle, TermLike};
use tracing_subscriber::fmt::MakeWriter;

use super::keys::{self, Keys};
use super::log::{LogFormat, PROGRESS};
use flowrun::flow::Masks;
use flowrun::observe::text::printable;

/// A handle; all of one program draw on the same terminal.
#[derive(Clone)]
pub struct Screen {
    pub format: LogFormat,
    /// There is a terminal, and it can move its cursor.
    live: bool,
    lines: MultiProgress,
    view: Arc<Mutex<Option<ProgressBar>>>,
    keys: Arc<Mutex<Option<Keys>>>,
    /// Values that no line shows.
    masks: Arc<Mutex<Arc<Masks>>>,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}

impl Screen {
    pub fn new(format: LogFormat) -> Self {
        let dumb = std::env::var("TERM").is_ok_and(|term| term == "dumb" || term.is_empty());
        let live = format == LogFormat::Text && io::stderr().is_terminal() && !dumb;
        let target = if live {
            ProgressDrawTarget::term_like(Box::new(Lasting(Term::buffered_stderr())))
        } else {
            ProgressDrawTarget::hidden()
        };
        let lines = MultiProgress::with_draw_target(target);
        Self { format, live, lines, view: Arc::default(), keys: Arc::default(), masks: Arc::default() }
    }

    /// Whether a view can be shown: a job in the background would draw over its shell.
    pub fn is_live(&self) -> bool {
        self.live && keys::in_front()
    }

    /// Columns and lines that there are for the view.
    pub fn size() -> (usize, usize) {
        let (height, width) = Term::stderr().size();
        // The last column would wrap on some terminals; the line below is the cursor's.
        (usize::from(width).saturating_sub(1).max(20), usize::from(height).saturating_sub(1).max(2))
    }

    /// Replaces the view. It is one bar of many lines: bars of a line each are not drawn together.
    pub fn draw(&self, view: &[String]) {
        if !keys::in_front() {
            return;
        }
        let fresh = || {
            let style = ProgressStyle::with_template("{msg}").unwrap_or_else(|_| ProgressStyle::default_spinner());
            self.lines.add(ProgressBar::new_spinner().with_style(style))
        };
        locked(&self.view).get_or_insert_with(fresh).set_message(view.join("\n"));
    }

    /// Leaves the view as it is, above whatever comes, and gives the terminal back as it was.
    pub fn leave(&self) {
        if let Some(bar) = locked(&self.view).take() {
            bar.abandon();
        }
        self.close_keys();
    }

    /// Values of the environment that no line shows from now on.
    pub fn mask(&self, masks: Arc<Masks>) {
        *locked(&self.masks) = masks;
    }

    /// A line above the view, or where there is none on stderr.
    pub fn say(&self, line: &str) {
        let line = printable(&locked(&self.masks).text(line));
        match self.format {
            // What can't be shown is no reason to stop.
            LogFormat::Text => self.lines.suspend(|| drop(writeln!(io::stderr(), "{line}"))),
            LogFormat::Json => tracing::info!(target: PROGRESS, "{line}"),
        }
    }

    /// Hears keys, where this program has the terminal; answers whether it does.
    pub fn open_keys(&self) -> bool {
        let mut keys = locked(&self.keys);
        if keys.is_none() {
            *keys = Keys::open();
        }
        keys.is_some()
    }

    /// A key that was pressed meanwhile.
    pub fn key(&self) -> Option<u8> {
        locked(&self.keys).as_mut()?.pressed()
    }

    pub fn close_keys(&self) {
        drop(locked(&self.keys).take());
    }
}

/// A terminal that may go away while the run goes on: nobody is told of what can't be drawn. indicatif panics where a
/// terminal fails.
#[derive(Debug)]
struct Lasting(Term);

impl TermLike for Lasting {
    fn width(&self) -> u16 {
        self.0.size().1
    }

    fn height(&self) -> u16 {
        self.0.size().0
    }

    fn move_cursor_up(&self, n: usize) -> io::Result<()> {
        self.0.move_cursor_up(n).or(Ok(()))
    }

    fn move_cursor_down(&self, n: usize) -> io::Result<()> {
        self.0.move_cursor_down(n).or(Ok(()))
    }

    fn move_cursor_right(&self, n: usize) -> io::Result<()> {
        self.0.move_cursor_right(n).or(Ok(()))
    }

    fn move_cursor_left(&self, n: usize) -> io::Result<()> {
        self.0.move_cursor_left(n).or(Ok(()))
    }

    fn write_line(&self, text: &str) -> io::Result<()> {
        self.0.write_line(text).or(Ok(()))
    }

    fn write_str(&self, text: &str) -> io::Result<()> {
        self.0.write_str(text).or(Ok(()))
    }

    fn clear_line(&self) -> io::Result<()> {
        self.0.clear_line().or(Ok(()))
    }

    fn flush(&self) -> io::Result<()> {
        self.0.flush().or(Ok(()))
    }
}

/// Where log lines go: between two drawings of the view.
pub struct LogWriter(Screen);

impl Write for LogWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        // The subscriber writes whole lines, without control characters but for its own colours.
        let line = locked(&self.0.masks).text(&String::from_utf8_lossy(bytes));
        self.0.lines.suspend(|| io::stderr().write_all(line.as_bytes())).map(|()| bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().flush()
    }
}

impl<'a> MakeWriter<'a> for Screen {
    type Writer = LogWriter;

    fn make_writer(&'a self) -> LogWriter {
        LogWriter(self.clone())
    }
}
