//! Keys, as they are pressed. Signals of the terminal stay what they are: Ctrl-C interrupts.

use std::io;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::getpgrp;
use rustix::termios::{LocalModes, OptionalActions, Termios, isatty, tcgetattr, tcgetpgrp, tcsetattr};

/// While this lives, the terminal hands over keys at once and does not show them.
pub struct Keys {
    before: Termios,
}

impl Keys {
    /// None where stdin is no terminal, or another program has it: a process in the background that changes or reads
    /// its terminal is stopped.
    pub fn open() -> Option<Self> {
        let stdin = io::stdin();
        // With stdout in a pipe, as in `| less`, the keys are the pager's.
        if !isatty(&stdin) || !isatty(io::stdout()) || !in_front() {
            return None;
        }
        let before = tcgetattr(&stdin).ok()?;
        let keys = Self { before };
        keys.listen().then_some(keys)
    }

    fn listen(&self) -> bool {
        let mut mode = self.before.clone();
        mode.local_modes.remove(LocalModes::ICANON | LocalModes::ECHO);
        tcsetattr(io::stdin(), OptionalActions::Now, &mode).is_ok()
    }

    /// A key that was pressed since the last call; none where none was. Does not wait.
    pub fn pressed(&mut self) -> Option<u8> {
        if !in_front() {
            return None;
        }
        let stdin = io::stdin();
        // A shell that had the terminal meanwhile (Ctrl-Z, then `fg`) has set its own mode.
        if tcgetattr(&stdin).is_ok_and(|now| now.local_modes.contains(LocalModes::ICANON)) {
            self.listen();
        }
        let mut ready = [PollFd::new(&stdin, PollFlags::IN)];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        if poll(&mut ready, Some(&now)).ok()? == 0 {
            return None;
        }
        let mut key = [0];
        // Past the buffer of `std`, which would take more than one and hide the rest from `poll`.
        (rustix::io::read(&stdin, &mut key).ok()? == 1).then_some(key[0])
    }
}

impl Drop for Keys {
    fn drop(&mut self) {
        if in_front() {
            // A terminal that is gone needs nothing.
            let _ = tcsetattr(io::stdin(), OptionalActions::Now, &self.before);
        }
    }
}

/// Whether the terminal of stderr is this program's, and not a shell's that it runs in the background of.
pub fn in_front() -> bool {
    tcgetpgrp(io::stderr()).is_ok_and(|group| group == getpgrp())
}
