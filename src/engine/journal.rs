//! The durable rows of a stage: which input rows are finished, and with what result.
//!
//! An append-only file of frames, each `length: u32, crc32c: u32, payload` in little endian; the
//! checksum covers length and payload. The first frame is the header with the content key; every
//! other is one finished input row: `row: u64, input hash: u64`, then its output rows as an Arrow
//! IPC stream, or nothing. A frame that is torn or damaged ends the file: what stands before it
//! is what was appended, and the rest is cut off when the file is opened again.
//!
//! An append reaches the page cache at once, so a killed process loses nothing; a thread of the
//! journal's own calls fsync at least every two seconds while there is something to sync, so a
//! machine that stops loses two seconds. No async thread waits for an fsync.

use std::collections::{HashMap, HashSet};
use std::fs::{File, OpenOptions};
use std::io::{self, Cursor, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use datafusion::arrow::ipc::reader::StreamReader;
use datafusion::arrow::ipc::writer::StreamWriter;
use datafusion::arrow::record_batch::RecordBatch;

use super::table;

/// First bytes of a header; the digit is the version of the format.
const MAGIC: &[u8] = b"flowrun journal 1\n";
const FRAME_HEAD: usize = 8;
const ENTRY_HEAD: usize = 16;
const SYNC_EVERY: Duration = Duration::from_secs(1);

/// A finished row as recorded; its rows are decoded when they are asked for.
struct Entry {
    input_hash: u64,
    rows: Vec<u8>,
}

pub struct Journal {
    path: PathBuf,
    file: File,
    recorded: HashMap<u64, Entry>,
    /// Rows replayed or appended since the journal was opened: those of the sealed table.
    live: HashSet<u64>,
    syncer: Syncer,
}

impl Journal {
    /// The content key of the journal at `path`; `None` where there is none that can be read.
    pub fn key(path: &Path) -> io::Result<Option<String>> {
        match std::fs::read(path) {
            Ok(bytes) => Ok(scan(&bytes).key.map(str::to_owned)),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// Opens or creates the journal of `content_key`. A torn tail is cut off; a file without a
    /// readable header, or of another key, begins anew.
    pub fn open(path: &Path, content_key: &str) -> io::Result<Self> {
        let mut file = OpenOptions::new().read(true).append(true).create(true).open(path)?;
        let bytes = std::fs::read(path)?;
        let scan = scan(&bytes);
        let kept = if scan.key == Some(content_key) { scan.length } else { 0 };
        if kept < bytes.len() {
            let lost = bytes.len() - kept;
            tracing::warn!(path = %path.display(), lost, "cut a torn or unreadable tail off a journal");
            file.set_len(kept as u64)?;
        }
        let mut recorded = HashMap::new();
        if kept == 0 {
            file.write_all(&frame(&[&[MAGIC, content_key.as_bytes()].concat()])?)?;
        } else {
            for (row, input_hash, rows) in scan.entries {
                recorded.insert(row, Entry { input_hash, rows: rows.to_vec() });
            }
        }
        let syncer = Syncer::start(file.try_clone()?, path.into())?;
        syncer.dirty();
        Ok(Self { path: path.into(), file, recorded, live: HashSet::new(), syncer })
    }

    /// Takes what is recorded for this row, where it was made from the same input.
    pub fn take(&mut self, row: u64, input_hash: u64) -> Option<Option<RecordBatch>> {
        let entry = self.recorded.remove(&row)?;
        if entry.input_hash != input_hash {
            return None;
        }
        let rows = decode(&entry.rows)
            .inspect_err(|error| tracing::warn!(row, %error, "a recorded row can't be read and is computed again"))
            .ok()?;
        self.live.insert(row);
        Some(rows)
    }

    /// Records a finished row. Durable within two seconds, or when the journal is closed.
    pub fn append(&mut self, row: u64, input_hash: u64, rows: Option<&RecordBatch>) -> io::Result<()> {
        self.syncer.check()?;
        let rows = rows.map_or(Ok(Vec::new()), encode)?;
        let head = [row.to_le_bytes(), input_hash.to_le_bytes()].concat();
        self.file.write_all(&frame(&[&head, &rows])?)?;
        self.live.insert(row);
        self.syncer.dirty();
        Ok(())
    }

    /// Writes the rows of this round, sorted by their keys, to the table `path`; false where there
    /// is no row and so no schema. Blocks: keep it off async threads.
    pub fn seal(&self, path: &Path) -> io::Result<bool> {
        let bytes = std::fs::read(&self.path)?;
        let mut last = HashMap::new();
        for (row, _, rows) in scan(&bytes).entries {
            if self.live.contains(&row) {
                last.insert(row, rows);
            }
        }
        let batches: Vec<RecordBatch> =
            last.into_values().filter_map(|rows| decode(rows).transpose()).collect::<io::Result<_>>()?;
        if batches.is_empty() {
            return Ok(false);
        }
        table::write_sorted(path, &batches)?;
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

/// The rows that the bytes of a journal hold as finished, in the order they were appended.
pub fn finished(bytes: &[u8]) -> Vec<u64> {
    scan(bytes).entries.into_iter().map(|(row, ..)| row).collect()
}

/// A journal file as far as it can be trusted.
struct Scan<'a> {
    key: Option<&'a str>,
    entries: Vec<(u64, u64, &'a [u8])>,
    /// Bytes up to the first frame that is torn or damaged.
    length: usize,
}

fn scan(bytes: &[u8]) -> Scan<'_> {
    let mut scan = Scan { key: None, entries: Vec::new(), length: 0 };
    let Some((head, mut rest)) = next_frame(bytes) else {
        return scan;
    };
    scan.key = head.strip_prefix(MAGIC).and_then(|key| std::str::from_utf8(key).ok());
    if scan.key.is_none() {
        return scan;
    }
    loop {
        scan.length = bytes.len() - rest.len();
        let Some((payload, after)) = next_frame(rest) else {
            return scan;
        };
        let Some((row, (hash, rows))) = split_u64(payload).and_then(|(r, p)| Some((r, split_u64(p)?))) else {
            return scan;
        };
        scan.entries.push((row, hash, rows));
        rest = after;
    }
}

/// The payload of the first frame, and what follows it.
fn next_frame(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let (length, rest) = bytes.split_first_chunk::<4>()?;
    let (sum, rest) = rest.split_first_chunk::<4>()?;
    let (payload, rest) = rest.split_at_checked(u32::from_le_bytes(*length) as usize)?;
    let found = crc32c::crc32c_append(crc32c::crc32c(length), payload);
    (found == u32::from_le_bytes(*sum)).then_some((payload, rest))
}

fn split_u64(bytes: &[u8]) -> Option<(u64, &[u8])> {
    bytes.split_first_chunk::<8>().map(|(head, rest)| (u64::from_le_bytes(*head), rest))
}

fn frame(parts: &[&[u8]]) -> io::Result<Vec<u8>> {
    let length: usize = parts.iter().map(|p| p.len()).sum();
    let head = u32::try_from(length)
        .map_err(|_| {
            io::Error::other(format!("the result of one row has {length} bytes; a journal holds 4 GiB a row"))
        })?
        .to_le_bytes();
    let sum = parts.iter().fold(crc32c::crc32c(&head), |sum, part| crc32c::crc32c_append(sum, part));
    let mut frame = Vec::with_capacity(FRAME_HEAD + length.max(ENTRY_HEAD));
    frame.extend_from_slice(&head);
    frame.extend_from_slice(&sum.to_le_bytes());
    parts.iter().for_each(|part| frame.extend_from_slice(part));
    Ok(frame)
}

fn encode(rows: &RecordBatch) -> io::Result<Vec<u8>> {
    let mut writer = StreamWriter::try_new(Vec::new(), &rows.schema()).map_err(io::Error::other)?;
    writer.write(rows).map_err(io::Error::other)?;
    writer.into_inner().map_err(io::Error::other)
}

fn decode(bytes: &[u8]) -> io::Result<Option<RecordBatch>> {
    if bytes.is_empty() {
        return Ok(None);
    }
    let mut reader = StreamReader::try_new(Cursor::new(bytes), None).map_err(io::Error::other)?;
    reader.next().transpose().map_err(io::Error::other)
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
