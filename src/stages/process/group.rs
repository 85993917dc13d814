//! A process with all that it has started: one process group.

use std::io;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command};

/// Starts `command` as the leader of a group of its own: a signal of the terminal is for flowrun, which ends
/// the group when it has written down what is finished.
pub fn start(command: &mut Command) -> io::Result<Child> {
    command.process_group(0).spawn()
}

/// Kills the group. The leader must not have been waited for: until then its number is nobody else's.
pub fn kill(leader: &Child) {
    let Ok(group) = libc::pid_t::try_from(leader.id()) else { return };
    // SAFETY: kill takes two numbers and touches no memory. The group is that of a child that has not been
    // waited for, so the number has not been given to another.
    unsafe { libc::kill(-group, libc::SIGKILL) };
}
