//! The process as the kernel sees it.

/// A line of `/proc/self/status` in bytes, `VmRSS:` (resident now) or `VmHWM:` (at most so far); 0 where there is
/// none.
pub fn memory(line: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let kib = status.lines().find_map(|l| l.strip_prefix(line)?.split_whitespace().next()?.parse::<u64>().ok());
    kib.unwrap_or(0) * 1024
}

/// Processor time of all threads so far, in seconds; 0 where it can't be told.
pub fn cpu_seconds() -> f64 {
    // Fields 14 and 15 of the line, in ticks; the second field may hold anything but ends with the last bracket.
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let after = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
    let ticks: u64 = after.split_whitespace().skip(11).take(2).filter_map(|f| f.parse::<u64>().ok()).sum();
    ticks as f64 / rustix::param::clock_ticks_per_second() as f64
}

/// When the process began, in seconds since 1970.
pub fn start_time() -> f64 {
    let made = std::fs::metadata("/proc/self").and_then(|m| m.modified()).ok();
    let since = made.and_then(|t| t.duration_since(std::time::UNIX_EPOCH).ok());
    since.map_or(0.0, |d| d.as_secs_f64())
}

pub fn threads() -> usize {
    entries("/proc/self/task")
}

/// Files and sockets.
pub fn open_files() -> usize {
    entries("/proc/self/fd")
}

fn entries(path: &str) -> usize {
    std::fs::read_dir(path).map_or(0, Iterator::count)
}

/// Bytes that this user may still write where `path` is.
pub fn disk_free(path: &std::path::Path) -> Option<u64> {
    let disk = rustix::fs::statvfs(path).ok()?;
    Some(disk.f_bavail.saturating_mul(disk.f_frsize))
}
