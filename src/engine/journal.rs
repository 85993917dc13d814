//! The durable rows of a stage: which input rows are finished, and with what result.
//!
//! An append-only file of frames, each `length: u32, crc32c: u32, payload` in little endian; the
//! checksum covers length and payload. The first frame is the header with the content key. Every
//! other holds input rows that were finished together: `count: u32`, then for each of them
//! `row: u64, input hash: u64, output rows: u32`, then all their output rows as an Arrow IPC stream,
//! or nothing where there is none. A row that was given up has a frame of its own with `DEAD` output
//! rows and, in place of the stream, its [`Letter`] as JSON. A frame that is torn or damaged ends the file: what stands before
//! it is what was appended, and the rest is cut off when the file is opened again.
//!
//! An append reaches the page cache at once, so a killed process loses nothing; a thread of the
//! journal's own calls fsync at least every two seconds while there is something to sync, so a
//! machine that stops loses two seconds. No async thread waits for an fsync. In memory is only
//! where each row lies.

use std::collections::{HashMap, VecDeque};
use std::fs::{File, OpenOptions};
use std::io::{self, BufReader, BufWriter, Cursor, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use datafusion::arrow::compute::concat_batches;
use datafusion::arrow::datatypes::{Schema, SchemaRef};
use datafusion::arrow::ipc::reader::StreamReader;
use datafusion::arrow::ipc::writer::StreamWriter;
use datafusion::arrow::record_batch::RecordBatch;

use serde::{Deserialize, Serialize};

use super::row_set::RowSet;
use super::table::{self, TableWriter};
use crate::flow::record::FORMAT;

/// First bytes of a header; the format of run directories and the content key follow, each on a line.
const NAME: &str = "flowrun journal ";
/// The first format whose frames are as they are now.
const READABLE: u32 = 2;
/// The [`Journal::key`] of another format; no content key looks like it.
const OTHER_FORMAT: &str = "another format";
/// Output rows of a row that was given up.
const DEAD: u32 = u32::MAX;
const FRAME_HEAD: usize = 8;
/// Row, input hash, number of output rows.
const ENTRY: usize = 20;
const SYNC_EVERY: Duration = Duration::from_secs(1);
/// Frames that stay decoded: rows come back in about the order they were appended.
const DECODED: usize = 8;
/// Rows that are sorted and written to a table at a time.
const SEAL_ROWS: usize = 8192;

/// An input row that is finished.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Finished {
    pub row: u64,
    /// Of the input it was made from.
    pub input_hash: u64,
    /// How many output rows it gave.
    pub rows: u32,
}

/// Why a row was given up.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Letter {
    /// Its number in the source.
    pub row: u64,
    pub reason: String,
    /// The content it was made from, as JSON.
    pub input: String,
}

/// Where a finished row lies in the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Entry {
    input_hash: u64,
    /// Of the IPC stream of its frame.
    at: u64,
    length: u32,
    /// Its rows in that stream.
    first: u32,
    rows: u32,
    /// The row was given up, and the frame has its letter.
    dead: bool,
}

pub struct Journal {
    file: File,
    path: PathBuf,
    recorded: HashMap<u64, Entry>,
    /// Input hashes of rows that were looked for and are in work.
    asked: HashMap<u64, u64>,
    /// Frames of rows that were given up before any was finished; a stage that can do nothing gives up nothing for good.
    given_up: Vec<u8>,
    /// The stage has finished a row, now or before.
    works: bool,
    /// Rows replayed or appended since the journal was opened: those of the sealed table.
    live: RowSet,
    /// Of the live rows; columns of one name differ at most in whether they may be null.
    schema: Option<SchemaRef>,
    decoded: Decoded,
    syncer: Syncer,
}

impl Journal {
    /// The content key of the journal at `path`; `None` where there is none that can be read.
    pub fn key(path: &Path) -> io::Result<Option<String>> {
        let mut file = match File::open(path) {
            Ok(file) => BufReader::new(file),
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(e),
        };
        Ok(next_frame(&mut file)?.and_then(|head| key_of(&head)))
    }

    /// Opens or creates the journal of `content_key`. A torn tail is cut off; a file without a
    /// readable header, or of another key, begins anew.
    pub fn open(path: &Path, content_key: &str) -> io::Result<Self> {
        let mut file = OpenOptions::new().read(true).append(true).create(true).open(path)?;
        let scan = scan(&mut BufReader::new(file.try_clone()?))?;
        let length = file.metadata()?.len();
        let kept = if scan.key.as_deref() == Some(content_key) { scan.length } else { 0 };
        if kept < length {
            let lost = length - kept;
            tracing::warn!(path = %path.display(), lost, "cut a torn or unreadable tail off a journal");
            file.set_len(kept)?;
        }
        let recorded = if kept == 0 {
            file.write_all(&framed(&header(content_key))?)?;
            HashMap::new()
        } else {
            scan.entries.into_iter().collect()
        };
        let syncer = Syncer::start(file.try_clone()?, path.into())?;
        syncer.dirty();
        let works = !recorded.is_empty();
        let (asked, given_up, live, schema, decoded) = Default::default();
        Ok(Self { file, path: path.into(), recorded, asked, given_up, works, live, schema, decoded, syncer })
    }

    /// Takes what is recorded for this row, where it was made from the same input.
    pub fn take(&mut self, row: u64, input_hash: u64) -> Option<Option<RecordBatch>> {
        let known = self.recorded.remove(&row).filter(|entry| entry.input_hash == input_hash && !entry.dead);
        let Some(entry) = known else {
            self.asked.insert(row, input_hash);
            return None;
        };
        let rows = self
            .decoded
            .rows(&self.file, &entry)
            .and_then(|rows| rows.map_or(Ok(None), |rows| self.learn(&rows.schema()).map(|()| Some(rows))))
            .inspect_err(|error| tracing::warn!(row, %error, "a recorded row can't be read and is computed again"));
        let Ok(rows) = rows else {
            self.asked.insert(row, input_hash);
            return None;
        };
        self.live.insert(row);
        Some(rows)
    }

    /// Takes the letter of this row, where it was given up with the same input.
    pub fn take_dead(&mut self, row: u64, input_hash: u64) -> Option<Letter> {
        let entry = self.recorded.get(&row).copied().filter(|entry| entry.input_hash == input_hash && entry.dead)?;
        let mut bytes = vec![0; entry.length as usize];
        let read = self.file.read_exact_at(&mut bytes, entry.at).map(|()| serde_json::from_slice(&bytes));
        let letter = read.and_then(|letter| letter.map_err(io::Error::from));
        let letter = letter.inspect_err(|error| tracing::warn!(row, %error, "a dead letter can't be read")).ok()?;
        self.recorded.remove(&row);
        self.live.insert(row);
        Some(letter)
    }

    /// Records that a row was given up, once a row is finished or the round is at its end. One that [`Self::take`] was
    /// not asked for is not recorded: nothing says what it was made from.
    pub fn append_dead(&mut self, row: u64, letter: &Letter) -> io::Result<()> {
        let Some(input_hash) = self.asked.remove(&row) else { return Ok(()) };
        self.syncer.check()?;
        let mut payload = heads(&[Finished { row, input_hash, rows: DEAD }]);
        serde_json::to_writer(&mut payload, letter)?;
        self.given_up.extend(framed(&payload)?);
        self.live.insert(row);
        if self.works { self.give_up() } else { Ok(()) }
    }

    fn give_up(&mut self) -> io::Result<()> {
        self.works = true;
        if !self.given_up.is_empty() {
            self.file.write_all(&std::mem::take(&mut self.given_up))?;
            self.syncer.dirty();
        }
        Ok(())
    }

    /// Records a finished row. Durable within two seconds, or when the journal is closed.
    pub fn append(&mut self, row: u64, input_hash: u64, rows: Option<&RecordBatch>) -> io::Result<()> {
        let count = rows.map_or(0, |rows| rows.num_rows() as u32);
        self.append_all(&[Finished { row, input_hash, rows: count }], rows)
    }

    /// Records rows that were finished together; `rows` has their output rows, one's after the other's.
    pub fn append_all(&mut self, finished: &[Finished], rows: Option<&RecordBatch>) -> io::Result<()> {
        self.syncer.check()?;
        let rows = rows.filter(|rows| rows.num_rows() > 0);
        if let Some(rows) = rows {
            self.learn(rows.schema_ref())?;
        }
        self.give_up()?;
        self.file.write_all(&frame(finished, rows)?)?;
        self.live.extend(finished.iter().map(|f| f.row));
        for f in finished {
            self.asked.remove(&f.row);
        }
        self.syncer.dirty();
        Ok(())
    }

    /// Keeps the schema one that all live rows fit into.
    fn learn(&mut self, schema: &SchemaRef) -> io::Result<()> {
        match &self.schema {
            Some(known) if Arc::ptr_eq(known, schema) || known == schema => {}
            Some(known) => {
                let merged = Schema::try_merge([known.as_ref().clone(), schema.as_ref().clone()]);
                self.schema = Some(Arc::new(merged.map_err(io::Error::other)?));
            }
            None => self.schema = Some(schema.clone()),
        }
        Ok(())
    }

    /// Writes the rows of this round, sorted by their keys, to the table `path`; false where there
    /// is no row and so no schema. Blocks: keep it off async threads.
    pub fn seal(&self, path: &Path) -> io::Result<bool> {
        // The last call but for `close`, which syncs it.
        (&self.file).write_all(&self.given_up)?;
        let Some(schema) = &self.schema else { return Ok(false) };
        let file = File::open(&self.path)?;
        let mut entries = scan(&mut BufReader::new(&file))?.entries;
        // Of a row that was recorded twice the later record counts; the sort is stable.
        entries.sort_by_key(|(row, _)| *row);
        let mut last = entries.iter().zip(entries.iter().skip(1).map(|(row, _)| Some(*row)).chain([None]));
        let mut writer = TableWriter::create(path, schema.clone())?;
        let mut decoded = Decoded::default();
        loop {
            let (mut chunk, mut rows) = (Vec::new(), 0);
            for ((row, entry), next) in last.by_ref() {
                if next == Some(*row) || !self.live.contains(*row) {
                    continue;
                }
                let Some(batch) = decoded.rows(&file, entry)? else { continue };
                rows += batch.num_rows();
                chunk.push(batch);
                if rows >= SEAL_ROWS {
                    break;
                }
            }
            if chunk.is_empty() {
                break;
            }
            let whole = concat_batches(schema, &chunk).map_err(io::Error::other)?;
            writer.write(&table::sorted(whole)?)?;
        }
        writer.finish()?;
        Ok(true)
    }

    /// Syncs and closes. Blocks: keep it off async threads.
    pub fn close(self) -> io::Result<()> {
        let Self { file, mut syncer, .. } = self;
        syncer.stop();
        file.sync_data()?;
        syncer.check()
    }
}

/// The streams of the last frames that were read.
#[derive(Default)]
struct Decoded(VecDeque<(u64, RecordBatch)>);

impl Decoded {
    fn rows(&mut self, file: &File, entry: &Entry) -> io::Result<Option<RecordBatch>> {
        if entry.rows == 0 {
            return Ok(None);
        }
        let (first, rows) = (entry.first as usize, entry.rows as usize);
        if let Some((_, batch)) = self.0.iter().find(|(at, _)| *at == entry.at) {
            return Ok(Some(batch.slice(first, rows)));
        }
        let mut bytes = vec![0; entry.length as usize];
        file.read_exact_at(&mut bytes, entry.at)?;
        let mut reader = StreamReader::try_new(Cursor::new(bytes), None).map_err(io::Error::other)?;
        let batch = reader.next().transpose().map_err(io::Error::other)?;
        let batch = batch.filter(|batch| batch.num_rows() >= first + rows);
        let batch = batch.ok_or_else(|| io::Error::other("a frame has fewer rows than it says"))?;
        if self.0.len() == DECODED {
            self.0.pop_front();
        }
        self.0.push_back((entry.at, batch.clone()));
        Ok(Some(batch.slice(first, rows)))
    }
}

/// The rows that the bytes of a journal hold as finished, in the order they were appended.
pub fn finished(bytes: &[u8]) -> Vec<u64> {
    scan(&mut Cursor::new(bytes)).map(|scan| scan.entries.into_iter().map(|(row, _)| row).collect()).unwrap_or_default()
}

/// All rows of a journal that may be written to meanwhile, in the order they were appended.
pub fn rows(path: &Path) -> io::Result<Vec<RecordBatch>> {
    let mut file = BufReader::new(File::open(path)?);
    let mut batches = Vec::new();
    let Some(head) = next_frame(&mut file)? else { return Ok(batches) };
    if !format_of(&head).is_some_and(|format| (READABLE..=FORMAT).contains(&format)) {
        return Ok(batches);
    }
    while let Some(payload) = next_frame(&mut file)? {
        batches.extend(batches_of(&payload)?);
    }
    Ok(batches)
}

/// The rows of the last `most` frames of a journal that may be written to meanwhile, in the order they were appended.
/// The frames before them are passed over, not read.
pub fn last_rows(path: &Path, most: usize) -> io::Result<Vec<RecordBatch>> {
    let file = File::open(path)?;
    let end = file.metadata()?.len();
    let (mut at, mut frames) = (0, VecDeque::new());
    while at + FRAME_HEAD as u64 <= end {
        let mut length = [0; 4];
        // By position: a buffered reader would read all that it passes over.
        file.read_exact_at(&mut length, at)?;
        frames.push_back(at);
        if frames.len() > most {
            frames.pop_front();
        }
        at += FRAME_HEAD as u64 + u64::from(u32::from_le_bytes(length));
    }
    let (mut file, mut batches) = (BufReader::new(file), Vec::new());
    // The first frame of the file is its header.
    for at in frames.into_iter().filter(|at| *at > 0) {
        file.seek(SeekFrom::Start(at))?;
        let Some(payload) = next_frame(&mut file)? else { break };
        batches.extend(batches_of(&payload)?);
    }
    Ok(batches)
}

/// How many rows a journal holds as given up; none where there is no journal.
pub fn dead_rows(path: &Path) -> io::Result<usize> {
    let mut file = match File::open(path) {
        Ok(file) => BufReader::new(file),
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(0),
        Err(e) => return Err(e),
    };
    // Of a row that was recorded twice the later record counts.
    let last: HashMap<u64, bool> = scan(&mut file)?.entries.into_iter().map(|(row, entry)| (row, entry.dead)).collect();
    Ok(last.into_values().filter(|dead| *dead).count())
}

/// Returns whether a journal holds a row that was finished and not given up, or something that can't be read.
pub fn has_finished(path: &Path) -> io::Result<bool> {
    let file = File::open(path)?;
    let length = file.metadata()?.len();
    let read = scan(&mut BufReader::new(file))?;
    Ok(read.length != length || read.entries.iter().any(|(_, entry)| !entry.dead))
}

/// Takes all that was given up out of a journal, which appears whole or stays as it is.
pub fn forget_dead(path: &Path) -> io::Result<()> {
    let mut from = BufReader::new(File::open(path)?);
    let tmp = path.with_extension("tmp");
    let mut to = BufWriter::new(File::create(&tmp)?);
    while let Some(payload) = next_frame(&mut from)? {
        if !is_dead(&payload) {
            to.write_all(&framed(&payload)?)?;
        }
    }
    to.into_inner().map_err(io::IntoInnerError::into_error)?.sync_all()?;
    std::fs::rename(&tmp, path)?;
    table::sync_parent(path)
}

/// A frame of a row that was given up.
fn is_dead(payload: &[u8]) -> bool {
    entries(payload, 0).is_some_and(|entries| matches!(entries.as_slice(), [(_, entry)] if entry.dead))
}

/// The output rows of a frame.
fn batches_of(payload: &[u8]) -> io::Result<Vec<RecordBatch>> {
    if is_dead(payload) {
        return Ok(Vec::new());
    }
    let Some((count, rest)) = payload.split_first_chunk::<4>() else { return Ok(Vec::new()) };
    let heads = (u32::from_le_bytes(*count) as usize).saturating_mul(ENTRY);
    let Some(stream) = rest.get(heads..).filter(|stream| !stream.is_empty()) else { return Ok(Vec::new()) };
    let reader = StreamReader::try_new(Cursor::new(stream), None).map_err(io::Error::other)?;
    reader.map(|batch| batch.map_err(io::Error::other)).collect()
}

/// A journal file as far as it can be trusted.
#[derive(Default)]
struct Scan {
    key: Option<String>,
    /// In the order they were appended.
    entries: Vec<(u64, Entry)>,
    /// Bytes up to the first frame that is torn or damaged.
    length: u64,
}

fn scan(file: &mut impl Read) -> io::Result<Scan> {
    let mut scan = Scan::default();
    let Some(head) = next_frame(file)? else { return Ok(scan) };
    scan.key = key_of(&head);
    if !format_of(&head).is_some_and(|format| (READABLE..=FORMAT).contains(&format)) {
        return Ok(scan);
    }
    scan.length = (FRAME_HEAD + head.len()) as u64;
    while let Some(payload) = next_frame(file)? {
        let Some(entries) = entries(&payload, scan.length + FRAME_HEAD as u64) else { break };
        scan.entries.extend(entries);
        scan.length += (FRAME_HEAD + payload.len()) as u64;
    }
    Ok(scan)
}

fn header(key: &str) -> Vec<u8> {
    format!("{NAME}{FORMAT}\n{key}").into_bytes()
}

fn format_of(head: &[u8]) -> Option<u32> {
    std::str::from_utf8(head).ok()?.strip_prefix(NAME)?.split_once('\n')?.0.parse().ok()
}

fn key_of(head: &[u8]) -> Option<String> {
    if format_of(head)? != FORMAT {
        return Some(OTHER_FORMAT.to_owned());
    }
    std::str::from_utf8(head).ok()?.split_once('\n').map(|(_, key)| key.to_owned())
}

/// The rows of a frame whose payload begins at `at`.
fn entries(payload: &[u8], at: u64) -> Option<Vec<(u64, Entry)>> {
    let (count, rest) = payload.split_first_chunk::<4>()?;
    let count = u32::from_le_bytes(*count) as usize;
    let (heads, stream) = rest.split_at_checked(count.checked_mul(ENTRY)?)?;
    let at = at + (payload.len() - stream.len()) as u64;
    let mut first = 0;
    let entry = |head: &[u8]| {
        let (row, head) = head.split_first_chunk::<8>()?;
        let (hash, rows) = head.split_first_chunk::<8>()?;
        let rows = u32::from_le_bytes(rows.try_into().ok()?);
        let (dead, rows) = if rows == DEAD { (true, 0) } else { (false, rows) };
        let input_hash = u64::from_le_bytes(*hash);
        let entry = Entry { input_hash, at, length: stream.len() as u32, first, rows, dead };
        first = first.checked_add(rows)?;
        Some((u64::from_le_bytes(*row), entry))
    };
    heads.chunks_exact(ENTRY).map(entry).collect()
}

/// The payload of the next frame; none at the end, or where it is torn or damaged.
fn next_frame(file: &mut impl Read) -> io::Result<Option<Vec<u8>>> {
    let mut head = Vec::with_capacity(FRAME_HEAD);
    file.by_ref().take(FRAME_HEAD as u64).read_to_end(&mut head)?;
    let Some((length, sum)) = head.split_first_chunk::<4>() else { return Ok(None) };
    let wanted = u64::from(u32::from_le_bytes(*length));
    let mut payload = Vec::new();
    // A damaged length must not decide how much is allocated.
    file.by_ref().take(wanted).read_to_end(&mut payload)?;
    let found = crc32c::crc32c_append(crc32c::crc32c(length), &payload);
    Ok((payload.len() as u64 == wanted && sum == found.to_le_bytes()).then_some(payload))
}

fn frame(finished: &[Finished], rows: Option<&RecordBatch>) -> io::Result<Vec<u8>> {
    let mut payload = heads(finished);
    if let Some(rows) = rows {
        let mut writer = StreamWriter::try_new(&mut payload, rows.schema_ref()).map_err(io::Error::other)?;
        writer.write(rows).and_then(|()| writer.finish()).map_err(io::Error::other)?;
    }
    framed(&payload)
}

/// The beginning of a payload.
fn heads(finished: &[Finished]) -> Vec<u8> {
    let mut payload = Vec::with_capacity(4 + ENTRY * finished.len());
    payload.extend_from_slice(&(finished.len() as u32).to_le_bytes());
    for f in finished {
        payload.extend_from_slice(&f.row.to_le_bytes());
        payload.extend_from_slice(&f.input_hash.to_le_bytes());
        payload.extend_from_slice(&f.rows.to_le_bytes());
    }
    payload
}

fn framed(payload: &[u8]) -> io::Result<Vec<u8>> {
    let length = u32::try_from(payload.len())
        .map_err(|_| {
            let length = payload.len();
            io::Error::other(format!("the result of one row has {length} bytes; a journal holds 4 GiB a row"))
        })?
        .to_le_bytes();
    let sum = crc32c::crc32c_append(crc32c::crc32c(&length), payload);
    Ok([&length[..], &sum.to_le_bytes(), payload].concat())
}

#[derive(Default)]
struct SyncState {
    dirty: bool,
    stop: bool,
    error: Option<String>,
}

/// The thread that calls fsync.
struct Syncer {
    state: Arc<(Mutex<SyncState>, Condvar)>,
    thread: Option<JoinHandle<()>>,
}

impl Syncer {
    fn start(file: File, path: PathBuf) -> io::Result<Self> {
        let state = Arc::<(Mutex<SyncState>, Condvar)>::default();
        let theirs = state.clone();
        let thread = std::thread::Builder::new()
            .name("journal-sync".into())
            .spawn(move || sync_loop(&file, &path, &theirs.0, &theirs.1))?;
        Ok(Self { state, thread: Some(thread) })
    }

    fn dirty(&self) {
        let mut state = self.state.0.lock().unwrap_or_else(|e| e.into_inner());
        if !std::mem::replace(&mut state.dirty, true) {
            self.state.1.notify_one();
        }
    }

    /// An fsync that failed is an error of the next append: what it covered may be lost.
    fn check(&self) -> io::Result<()> {
        let state = self.state.0.lock().unwrap_or_else(|e| e.into_inner());
        state.error.as_ref().map_or(Ok(()), |e| Err(io::Error::other(e.clone())))
    }

    fn stop(&mut self) {
        self.state.0.lock().unwrap_or_else(|e| e.into_inner()).stop = true;
        self.state.1.notify_one();
        if let Some(thread) = self.thread.take() {
            // The thread has no panic to pass on; its errors are in the state.
            let _ = thread.join();
        }
    }
}

impl Drop for Syncer {
    fn drop(&mut self) {
        self.stop();
    }
}

fn sync_loop(file: &File, path: &Path, state: &Mutex<SyncState>, changed: &Condvar) {
    // A new file needs its directory entry synced too.
    let mut entry_synced = false;
    let mut guard = state.lock().unwrap_or_else(|e| e.into_inner());
    loop {
        guard = changed.wait_while(guard, |s| !s.dirty && !s.stop).unwrap_or_else(|e| e.into_inner());
        if !guard.stop {
            guard = changed.wait_timeout_while(guard, SYNC_EVERY, |s| !s.stop).unwrap_or_else(|e| e.into_inner()).0;
        }
        if guard.dirty {
            guard.dirty = false;
            drop(guard);
            let result = file.sync_data().and_then(|()| if entry_synced { Ok(()) } else { table::sync_parent(path) });
            entry_synced |= result.is_ok();
            guard = state.lock().unwrap_or_else(|e| e.into_inner());
            if let Err(error) = result {
                guard.error.get_or_insert(format!("fsync failed: {error}"));
            }
        } else if guard.stop {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use datafusion::arrow::array::{ArrayRef, StringArray, UInt64Array};
    use proptest::prelude::*;

    use super::*;

    fn rows(row: u64, texts: &[&str]) -> RecordBatch {
        let keys: ArrayRef = Arc::new(UInt64Array::from(vec![row; texts.len()]));
        let text: ArrayRef = Arc::new(StringArray::from(texts.to_vec()));
        RecordBatch::try_from_iter([("_row", keys), ("text", text)]).unwrap()
    }

    fn expected(row: u64) -> Option<RecordBatch> {
        (!row.is_multiple_of(3)).then(|| rows(row, &["one", "two"]))
    }

    fn write(path: &Path, count: u64) {
        let mut journal = Journal::open(path, "key").unwrap();
        for row in 0..count {
            journal.append(row, row * 7, expected(row).as_ref()).unwrap();
        }
        journal.close().unwrap();
    }

    #[test]
    fn what_was_appended_comes_back_for_the_same_input_only() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("journal");
        write(&path, 6);
        let mut journal = Journal::open(&path, "key").unwrap();
        assert_eq!(journal.take(4, 28), Some(expected(4)));
        assert_eq!(journal.take(4, 28), None, "an entry is consumed");
        assert_eq!(journal.take(3, 21), Some(None));
        assert_eq!(journal.take(5, 36), None, "another input");
        journal.append(5, 36, Some(&rows(5, &["new"]))).unwrap();
        drop(journal);
        let mut journal = Journal::open(&path, "key").unwrap();
        assert_eq!(journal.take(5, 36), Some(Some(rows(5, &["new"]))), "the later record wins");
        assert_eq!(Journal::key(&path).unwrap().as_deref(), Some("key"));
        drop(journal);
        assert_eq!(Journal::open(&path, "other").unwrap().take(4, 28), None);
    }

    #[test]
    fn rows_that_finished_together_come_back_one_by_one() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("journal");
        let mut journal = Journal::open(&path, "key").unwrap();
        let whole = datafusion::arrow::compute::concat_batches(
            &rows(0, &[]).schema(),
            &[rows(7, &["a"]), rows(8, &["b", "c"]), rows(6, &["d"])],
        );
        let finished = [(7, 1), (9, 0), (8, 2), (6, 1)].map(|(row, rows)| Finished { row, input_hash: row, rows });
        journal.append_all(&finished, Some(&whole.unwrap())).unwrap();
        drop(journal);
        assert_eq!(super::finished(&std::fs::read(&path).unwrap()), [7, 9, 8, 6]);
        let mut journal = Journal::open(&path, "key").unwrap();
        assert_eq!(journal.take(6, 6), Some(Some(rows(6, &["d"]))));
        assert_eq!(journal.take(8, 8), Some(Some(rows(8, &["b", "c"]))));
        assert_eq!(journal.take(9, 9), Some(None));
        assert_eq!(journal.take(7, 7), Some(Some(rows(7, &["a"]))));
        journal.append(8, 1, Some(&rows(8, &["e"]))).unwrap();
        let table = dir.path().join("rows.parquet");
        assert!(journal.seal(&table).unwrap());
        let read = table::read(&table).unwrap();
        assert_eq!(
            read,
            [concat_batches(&read[0].schema(), &[rows(6, &["d"]), rows(7, &["a"]), rows(8, &["e"])]).unwrap()]
        );
    }

    #[test]
    fn the_last_rows_are_found_without_reading_the_others() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("journal");
        write(&path, 40);
        let all = super::rows(&path).unwrap();
        for most in [1, 7, 39, 1000] {
            let last = last_rows(&path, most).unwrap();
            // Some frames have no rows.
            assert!(last.len() <= most && (most < 7 || !last.is_empty()));
            assert_eq!(last, all[all.len() - last.len()..], "{most}");
        }
        // A journal that is being written to may end anywhere.
        let bytes = std::fs::read(&path).unwrap();
        for cut in [0, 5, 20, bytes.len() / 2, bytes.len() - 3] {
            std::fs::write(&path, &bytes[..cut]).unwrap();
            assert!(last_rows(&path, 3).unwrap().len() <= 3);
        }
    }

    #[test]
    fn a_journal_of_another_format_has_another_key_and_is_read_where_it_can_be() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("journal");
        for (format, readable) in [(1, false), (2, true), (FORMAT + 1, false)] {
            let head = framed(format!("flowrun journal {format}\nkey").as_bytes()).unwrap();
            let row = frame(&[Finished { row: 7, input_hash: 1, rows: 2 }], Some(&rows(7, &["a", "b"]))).unwrap();
            std::fs::write(&path, [head, row].concat()).unwrap();
            assert_eq!(Journal::key(&path).unwrap().as_deref(), Some(OTHER_FORMAT));
            assert_eq!(super::rows(&path).unwrap().len(), usize::from(readable), "format {format}");
            assert_eq!(super::finished(&std::fs::read(&path).unwrap()).len(), usize::from(readable));
            assert_eq!(Journal::open(&path, "key").unwrap().take(7, 1), None, "nor is it gone on with");
        }
    }

    #[test]
    fn a_row_that_was_given_up_stays_so_until_it_is_forgotten() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("journal");
        write(&path, 3);
        let letter = Letter { row: 5, reason: "no verdict".into(), input: "[{}]".into() };
        let mut journal = Journal::open(&path, "key").unwrap();
        assert_eq!(journal.take(5, 35), None);
        journal.append_dead(5, &letter).unwrap();
        journal.append_dead(6, &letter).unwrap();
        journal.close().unwrap();
        assert_eq!(dead_rows(&path).unwrap(), 1, "nobody asked for row 6");
        assert_eq!(super::finished(&std::fs::read(&path).unwrap()), [0, 1, 2, 5]);
        assert_eq!(super::rows(&path).unwrap().len(), 2);
        assert_eq!(last_rows(&path, 2).unwrap().len(), 1);

        let mut journal = Journal::open(&path, "key").unwrap();
        assert_eq!(journal.take_dead(5, 36), None, "another input");
        assert_eq!(journal.take_dead(5, 35).as_ref(), Some(&letter));
        assert_eq!(journal.take_dead(1, 7), None);
        assert_eq!(journal.take(1, 7), Some(expected(1)));
        let table = dir.path().join("rows.parquet");
        assert!(journal.seal(&table).unwrap());
        assert_eq!(table::read(&table).unwrap(), [rows(1, &["one", "two"])]);
        journal.close().unwrap();

        forget_dead(&path).unwrap();
        assert_eq!(dead_rows(&path).unwrap(), 0);
        let mut journal = Journal::open(&path, "key").unwrap();
        assert_eq!((journal.take_dead(5, 35), journal.take(5, 35)), (None, None));
        journal.append(5, 35, Some(&rows(5, &["at last"]))).unwrap();
        journal.close().unwrap();
        assert_eq!(Journal::open(&path, "key").unwrap().take(5, 35), Some(Some(rows(5, &["at last"]))));
    }

    #[test]
    fn the_sealed_table_is_sorted_and_holds_only_rows_of_this_round() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("journal");
        write(&path, 6);
        let mut journal = Journal::open(&path, "key").unwrap();
        journal.append(9, 1, Some(&rows(9, &["nine"]))).unwrap();
        for row in [5, 4, 3] {
            journal.take(row, row * 7).unwrap();
        }
        let table = dir.path().join("rows.parquet");
        assert!(journal.seal(&table).unwrap());
        let read = table::read(&table).unwrap();
        let keys: Vec<u64> = read
            .iter()
            .flat_map(|b| b.column(0).as_any().downcast_ref::<UInt64Array>().unwrap().values().to_vec())
            .collect();
        assert_eq!(keys, [4, 4, 5, 5, 9]);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        /// A file cut at any byte holds a prefix of what was appended.
        #[test]
        fn a_cut_file_is_a_prefix(cut in 0.0f64..1.0) {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("journal");
            write(&path, 8);
            let bytes = std::fs::read(&path).unwrap();
            std::fs::write(&path, &bytes[..(bytes.len() as f64 * cut) as usize]).unwrap();
            let mut journal = Journal::open(&path, "key").unwrap();
            let found: Vec<bool> = (0..8).map(|row| match journal.take(row, row * 7) {
                Some(rows) => { assert_eq!(rows, expected(row)); true }
                None => false,
            }).collect();
            prop_assert!(found.is_sorted_by(|a, b| a >= b), "{:?}", found);
            journal.append(0, 1, None).unwrap();
            drop(journal);
            prop_assert_eq!(Journal::open(&path, "key").unwrap().take(0, 1), Some(None));
        }

        /// A damaged byte anywhere may lose rows; it never changes one.
        #[test]
        fn a_flipped_bit_never_yields_wrong_rows(at in 0.0f64..1.0, bit in 0u8..8) {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("journal");
            write(&path, 8);
            let mut bytes = std::fs::read(&path).unwrap();
            let at = (bytes.len() as f64 * at) as usize;
            bytes[at] ^= 1 << bit;
            std::fs::write(&path, &bytes).unwrap();
            let mut journal = Journal::open(&path, "key").unwrap();
            for row in 0..8 {
                if let Some(rows) = journal.take(row, row * 7) {
                    prop_assert_eq!(rows, expected(row));
                }
            }
        }
    }
}
