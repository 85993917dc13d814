//! The machine loses power: whatever was not synced is gone, of files and of directories.
//!
//! A preloaded library records what the program does to its files. A model of a file system that
//! promises no more than POSIX does is fed with the record up to a moment; what it would have kept
//! becomes a directory, and the program goes on from there.

use std::collections::BTreeMap;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::support::{Case, stderr};
use crate::whole::{Found, Random, Recorded, Size, assert_reused, is_done, journals, recorded};

/// How long after its append a row is durable, says the journal.
const DURABLE: Duration = Duration::from_secs(2);

#[test]
fn after_a_power_loss_a_run_ends_as_if_it_never_was() {
    lose_power(3, Size::SHORT);
}

#[test]
#[ignore = "many minutes: make soak"]
fn soak_power_lost_at_any_write() {
    let times = std::env::var("FLOWRUN_POWER_LOSSES").map_or(60, |n| n.parse().expect("a number"));
    lose_power(times, Size { epochs: 4, ..Size::SHORT });
}

/// Records an undisturbed run and lets it end from what moments of it would have left on disk.
fn lose_power(times: usize, size: Size) {
    let mut random = Random::seeded("FLOWRUN_POWER_SEED");
    let whole = size.case();
    let log = Recorder::new().run(&whole);
    let expected = Found::of(&whole.path("runs/tiny"));
    for number in 0..times {
        let cut = log.moment(number, &mut random);
        let disk = Disk::after(&log.records[..cut], whole.path("runs"), &mut random);
        let case = size.case();
        let runs = case.path("runs");
        disk.write_to(&runs);
        let (run, at) = (runs.join("tiny"), log.describe(cut));
        println!("power lost {at}: {}", disk.describe());
        let (before, was_done) = (recorded(&run), is_done(&run));
        log.assert_durable(cut, whole.path("runs"), &before, &at);
        let went_on = case.run(&["flow.toml"]);
        assert!(went_on.status.success(), "{at}: {}", stderr(&went_on));
        if !was_done {
            assert_reused(&run, &before, &at);
        }
        Found::of(&run).assert_equals(&expected, &at);
        assert!(!run.join("superseded/x").exists());
    }
}

/// The library that is preloaded.
struct Recorder {
    dir: tempfile::TempDir,
}

impl Recorder {
    fn new() -> Self {
        let dir = tempfile::TempDir::new().unwrap();
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/power/record.c");
        let mut cc = Command::new("cc");
        cc.args(["-shared", "-fPIC", "-O1", "-Wall", "-o"]).arg(dir.path().join("record.so")).arg(source);
        let built = cc.args(["-ldl", "-lpthread"]).output().unwrap();
        assert!(built.status.success(), "{}", stderr(&built));
        Self { dir }
    }

    /// Runs the flow to its end, and returns what it did to files below `runs`.
    fn run(&self, case: &Case) -> Log {
        let runs = case.path("runs");
        std::fs::create_dir(&runs).unwrap();
        let runs = runs.canonicalize().unwrap();
        let log = self.dir.path().join("log");
        let mut command = case.command(&["flow.toml"]);
        command.env("LD_PRELOAD", self.dir.path().join("record.so"));
        command.env("FLOWRUN_POWER_DIR", &runs).env("FLOWRUN_POWER_LOG", &log);
        let done = command.output().unwrap();
        assert!(done.status.success(), "{}", stderr(&done));
        let log = Log { records: read(&std::fs::read(&log).unwrap()) };
        // A library that misses something would find too little fault.
        let disk = Disk::at_the_end(&log.records, runs.clone());
        let again = case.path("again");
        disk.write_to(&again);
        let same = Command::new("diff").args(["-r"]).args([&runs, &again]).output().unwrap();
        assert!(same.status.success(), "not everything was recorded: {}", String::from_utf8_lossy(&same.stdout));
        log
    }
}

/// One thing that was done; see `tests/power/record.c`.
struct Record {
    kind: u8,
    time: Duration,
    file: u64,
    parent: u64,
    to: u64,
    offset: u64,
    name: String,
    data: Vec<u8>,
}

struct Log {
    records: Vec<Record>,
}

fn read(mut bytes: &[u8]) -> Vec<Record> {
    let mut records = Vec::new();
    while !bytes.is_empty() {
        let (mut kind, mut head) = ([0], [0; 56]);
        bytes.read_exact(&mut kind).unwrap();
        bytes.read_exact(&mut head).unwrap();
        let number = |i: usize| u64::from_le_bytes(head[8 * i..8 * i + 8].try_into().unwrap());
        let (name, rest) = bytes.split_at(number(5) as usize);
        let (data, rest) = rest.split_at(number(6) as usize);
        bytes = rest;
        records.push(Record {
            kind: kind[0],
            time: Duration::from_nanos(number(0)),
            file: number(1),
            parent: number(2),
            to: number(3),
            offset: number(4),
            name: String::from_utf8(name.into()).unwrap(),
            data: data.into(),
        });
    }
    records
}

impl Log {
    /// The number of records before the power is lost: now anywhere in time, now beside a rename, an
    /// fsync or a removal, which are few and where it matters.
    fn moment(&self, number: usize, random: &mut Random) -> usize {
        if number.is_multiple_of(3) {
            let (first, last) = (self.records[0].time, self.records.last().unwrap().time);
            let time = first + (last - first).mul_f64(random.share());
            return self.records.partition_point(|r| r.time < time);
        }
        let steps = |r: &Record| if number % 3 == 1 { r.kind == b'R' } else { b"RUDTE".contains(&r.kind) };
        let edges: Vec<usize> = (0..self.records.len()).filter(|i| steps(&self.records[*i])).collect();
        edges[random.below(edges.len() as u64) as usize] + random.below(2) as usize
    }

    fn describe(&self, cut: usize) -> String {
        let since = |at: Duration| (at - self.records[0].time).as_secs_f64();
        match cut.checked_sub(1).map(|last| &self.records[last]) {
            Some(last) => {
                let (kind, second) =
                    (char::from(last.kind), String::from_utf8_lossy(&last.data[..last.data.len().min(40)]));
                let to = if last.kind == b'R' { format!(" to {second}") } else { String::new() };
                format!("at {:.2} s, record {cut}, after {kind} {}{to}", since(last.time), last.name)
            }
            None => "before anything".into(),
        }
    }

    /// What a journal had two seconds before is there.
    fn assert_durable(&self, cut: usize, runs: PathBuf, found: &Recorded, at: &str) {
        let Some(last) = cut.checked_sub(1).map(|last| self.records[last].time) else { return };
        // An fsync that the machine was slow at is not the program's.
        let slowest = self.syncs().max().unwrap_or_default();
        let then = self.records.partition_point(|r| r.time + DURABLE + slowest < last);
        let earlier = Disk::at_the_end(&self.records[..then], runs);
        let dir = tempfile::TempDir::new().unwrap();
        earlier.write_to(&dir.path().join("runs"));
        let had = recorded(&dir.path().join("runs/tiny"));
        for (.., path) in journals() {
            let lost: Vec<_> = had[&path].iter().filter(|row| !found[&path].contains(row)).collect();
            assert!(lost.is_empty(), "{at}: {} has lost rows two seconds old: {lost:?}", path.display());
        }
    }

    fn syncs(&self) -> impl Iterator<Item = Duration> {
        let began = |r: &Record| self.records.iter().find(|s| s.kind == b'S' && s.offset == r.offset).unwrap().time;
        self.records.iter().filter(|r| r.kind == b'E').map(move |r| r.time - began(r))
    }
}

/// A change of one file or one directory.
#[derive(Clone)]
enum Change {
    Write(u64, Vec<u8>),
    Cut(u64),
    Add(String, u64),
    Take(String),
    /// Within one directory: both names change or none.
    Rename(String, String, u64),
}

/// A file or a directory.
#[derive(Clone, Default)]
struct Node {
    directory: bool,
    bytes: Vec<u8>,
    names: BTreeMap<String, u64>,
}

impl Node {
    fn apply(&mut self, change: &Change) {
        match change {
            Change::Write(at, data) => {
                let end = *at as usize + data.len();
                self.bytes.resize(self.bytes.len().max(end), 0);
                self.bytes[*at as usize..end].copy_from_slice(data);
            }
            Change::Cut(length) => self.bytes.resize(*length as usize, 0),
            Change::Add(name, file) => drop(self.names.insert(name.clone(), *file)),
            Change::Take(name) => drop(self.names.remove(name)),
            Change::Rename(from, to, file) => {
                self.names.remove(from);
                self.names.insert(to.clone(), *file);
            }
        }
    }
}

/// What is certainly on disk, and what was done to it since.
#[derive(Default)]
struct Disk {
    root: u64,
    /// What an inode stands for now: its number is used again after its file.
    stands_for: BTreeMap<u64, u64>,
    durable: BTreeMap<u64, Node>,
    /// With the number of the record.
    since: BTreeMap<u64, Vec<(usize, Change)>>,
}

impl Disk {
    /// What is left when power is lost after these records: all that was synced, and of the rest
    /// nothing, or of each file and directory as much as chance wrote out, in order, the last write torn.
    fn after(records: &[Record], runs: PathBuf, random: &mut Random) -> Self {
        let mut disk = Self::fed(records, runs);
        let lucky = random.below(2) == 1;
        for (file, changes) in std::mem::take(&mut disk.since) {
            let survive = if lucky { random.below(changes.len() as u64 + 1) as usize } else { 0 };
            let node = disk.durable.entry(file).or_default();
            changes[..survive].iter().for_each(|(_, change)| node.apply(change));
            if let Some((_, Change::Write(at, data))) = changes.get(survive).filter(|_| lucky) {
                let part = data[..random.below(data.len() as u64) as usize].to_vec();
                node.apply(&Change::Write(*at, part));
            }
        }
        disk
    }

    /// What the running program sees.
    fn at_the_end(records: &[Record], runs: PathBuf) -> Self {
        let mut disk = Self::fed(records, runs);
        for (file, changes) in std::mem::take(&mut disk.since) {
            let node = disk.durable.entry(file).or_default();
            changes.iter().for_each(|(_, change)| node.apply(change));
        }
        disk
    }

    fn fed(records: &[Record], runs: PathBuf) -> Self {
        let root = std::os::unix::fs::MetadataExt::ino(&std::fs::metadata(runs).unwrap());
        let mut disk = Self { root, ..Self::default() };
        disk.durable.insert(root, Node { directory: true, ..Node::default() });
        let mut began = BTreeMap::new();
        for (number, record) in records.iter().enumerate() {
            match record.kind {
                b'S' => drop(began.insert(record.offset, number)),
                b'E' => disk.sync(disk.known(record.file), began[&record.offset]),
                _ => disk.change(number, record),
            }
        }
        disk
    }

    fn change(&mut self, number: usize, record: &Record) {
        let Record { kind, offset, name, data, .. } = record;
        if b"CD".contains(kind) {
            let new = u64::MAX - number as u64;
            self.stands_for.insert(record.file, new);
            self.durable.insert(new, Node { directory: *kind == b'D', ..Node::default() });
        }
        let [file, parent, to] = [record.file, record.parent, record.to].map(|inode| self.known(inode));
        let mut add = |file: u64, change| self.since.entry(file).or_default().push((number, change));
        match kind {
            b'W' => add(file, Change::Write(*offset, data.clone())),
            b'T' => add(file, Change::Cut(*offset)),
            b'U' => add(parent, Change::Take(name.clone())),
            b'R' => {
                let new = String::from_utf8(data.clone()).unwrap();
                if parent == to {
                    add(parent, Change::Rename(name.clone(), new, file));
                } else {
                    add(to, Change::Add(new, file));
                    add(parent, Change::Take(name.clone()));
                }
            }
            b'C' | b'D' => add(parent, Change::Add(name.clone(), file)),
            other => panic!("a record of kind {other}"),
        }
    }

    fn known(&self, inode: u64) -> u64 {
        self.stands_for.get(&inode).copied().unwrap_or(inode)
    }

    /// What was done to the file before its fsync began is on disk.
    fn sync(&mut self, file: u64, began: usize) {
        let Some(changes) = self.since.get_mut(&file) else { return };
        let node = self.durable.entry(file).or_default();
        let done = changes.partition_point(|(number, _)| *number < began);
        changes.drain(..done).for_each(|(_, change)| node.apply(&change));
    }

    fn write_to(&self, dir: &Path) {
        let mut left = vec![(self.root, dir.to_path_buf())];
        while let Some((file, path)) = left.pop() {
            match self.durable.get(&file).filter(|node| node.directory) {
                Some(node) => {
                    std::fs::create_dir(&path).unwrap();
                    left.extend(node.names.iter().map(|(name, file)| (*file, path.join(name))));
                }
                None => std::fs::write(&path, self.durable.get(&file).map_or(&[][..], |node| &node.bytes)).unwrap(),
            }
        }
    }

    fn describe(&self) -> String {
        let bytes: usize = self.durable.values().map(|node| node.bytes.len()).sum();
        format!("{} files and directories, {bytes} bytes were on disk", self.durable.len())
    }
}
