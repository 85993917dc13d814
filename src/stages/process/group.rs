//! A process with all that it has started: one process group.

use std::io;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command};

use rustix::process::{Pid, Signal, kill_process_group};

/// Starts `command` as the leader of a group of its own: a signal of the terminal is for flowrun, which ends
/// the group when it has written down what is finished.
pub fn start(command: &mut Command) -> io::Result<Child> {
    command.process_group(0).spawn()
}

/// Kills the group. The leader must not have been waited for: until then its number is nobody else's.
pub fn kill(leader: &Child) {
    // A group that is gone already is as dead as one that is killed.
    let _ = kill_process_group(Pid::from_child(leader), Signal::KILL);
}
