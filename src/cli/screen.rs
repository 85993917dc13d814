//! The terminal of a run: the view at the bottom, what is logged above it, keys. stderr all of it; stdout is for results.

use std::io::{self, IsTerminal, Write};
use std::sync::{Arc, Mutex};

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use tracing_subscriber::fmt::MakeWriter;

use super::keys::Keys;
use super::log::{LogFormat, PROGRESS};

/// A handle; all of one program draw on the same terminal.
#[derive(Clone)]
pub struct Screen {
    pub format: LogFormat,
    lines: MultiProgress,
    view: Arc<Mutex<Option<ProgressBar>>>,
    keys: Arc<Mutex<Option<Keys>>>,
}

impl Screen {
    pub fn new(format: LogFormat) -> Self {
        let lines = MultiProgress::with_draw_target(ProgressDrawTarget::stderr());
        Self { format, lines, view: Arc::default(), keys: Arc::default() }
    }

    /// Whether there is a terminal for the view.
    pub fn is_live(&self) -> bool {
        self.format == LogFormat::Text && io::stderr().is_terminal()
    }

    /// Columns and lines that there are for the view.
    pub fn size() -> (usize, usize) {
        let (height, width) = console::Term::stderr().size();
        // The last column would wrap on some terminals; the line below is the cursor's.
        (usize::from(width).saturating_sub(1).max(20), usize::from(height).saturating_sub(1).max(2))
    }

    /// Replaces the view. It is one bar of many lines: bars of a line each are not drawn together.
    pub fn draw(&self, view: &[String]) {
        let fresh = || {
            let style = ProgressStyle::with_template("{msg}").unwrap_or_else(|_| ProgressStyle::default_spinner());
            self.lines.add(ProgressBar::new_spinner().with_style(style))
        };
        let mut bar = self.view.lock().unwrap_or_else(|e| e.into_inner());
        bar.get_or_insert_with(fresh).set_message(view.join("\n"));
    }

    /// Leaves the view as it is, above whatever comes.
    pub fn leave(&self) {
        if let Some(bar) = self.view.lock().unwrap_or_else(|e| e.into_inner()).take() {
            bar.abandon();
        }
        self.close_keys();
    }

    /// A line above the view, or where there is none on stderr.
    pub fn say(&self, line: &str) {
        match self.format {
            // What can't be shown is no reason to stop.
            LogFormat::Text => self.lines.suspend(|| drop(writeln!(io::stderr(), "{line}"))),
            LogFormat::Json => tracing::info!(target: PROGRESS, "{line}"),
        }
    }

    /// Hears keys from now on, where this program has the terminal; answers whether it does.
    pub fn open_keys(&self) -> bool {
        let mut keys = self.keys.lock().unwrap_or_else(|e| e.into_inner());
        *keys = Keys::open();
        keys.is_some()
    }

    /// A key that was pressed meanwhile.
    pub fn key(&self) -> Option<u8> {
        self.keys.lock().unwrap_or_else(|e| e.into_inner()).as_mut()?.pressed()
    }

    /// Gives the terminal back as it was.
    pub fn close_keys(&self) {
        drop(self.keys.lock().unwrap_or_else(|e| e.into_inner()).take());
    }
}

/// Where log lines go: between two drawings of the view.
pub struct LogWriter(Screen);

impl Write for LogWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lines.suspend(|| io::stderr().write(bytes))
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
