//! `flowrun report`: a page to look at a run, or at several side by side.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::out::say;
use super::{Failure, ReportArgs};
use flowrun::engine::report;

/// Prints where the page is.
pub fn report(args: ReportArgs) -> Result<(), Failure> {
    let page = match (args.runs.as_slice(), args.out) {
        ([run], None) => report::write_report(run)?,
        (runs, out) => {
            let page = out.unwrap_or_else(|| PathBuf::from("compare.html"));
            report::write_pages(runs, &page)?;
            page
        }
    };
    say!("{}", page.display());
    if args.open { open(&page) } else { Ok(()) }
}

/// With whatever this desktop opens pages with.
fn open(page: &Path) -> Result<(), Failure> {
    let opener = if cfg!(target_os = "macos") { "open" } else { "xdg-open" };
    let quiet =
        Command::new(opener).arg(page).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status();
    match quiet {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => Err(Failure::Failed(format!("{opener} {}: {status}", page.display()))),
        Err(e) => {
            Err(Failure::Failed(format!("{opener} can't be started: {e}\n  help: open {} yourself", page.display())))
        }
    }
}
