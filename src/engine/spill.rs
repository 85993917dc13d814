//! Messages that wait on disk because their edge must not block its sender.

use std::fs::{File, OpenOptions};
use std::io::{self, Cursor, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;

use datafusion::arrow::ipc::reader::StreamReader;
use datafusion::arrow::ipc::writer::StreamWriter;

use super::Message;

/// A queue of messages in a file that has no name any more, so that nothing of it outlives the run.
///
/// Each message is `length: u64, watermark: u64, count: u64, count x u64`, then its rows as an
/// Arrow IPC stream, or nothing.
pub struct Spill {
    file: File,
    read: u64,
    written: u64,
    messages: usize,
}

impl Spill {
    pub fn create(dir: &Path, name: &str) -> io::Result<Self> {
        let path = dir.join(format!("{name}.tmp"));
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(true).open(&path)?;
        std::fs::remove_file(&path)?;
        Ok(Self { file, read: 0, written: 0, messages: 0 })
    }

    pub fn messages(&self) -> usize {
        self.messages
    }

    pub fn bytes(&self) -> u64 {
        self.written - self.read
    }

    pub fn push(&mut self, message: &Message) -> io::Result<()> {
        let mut bytes = vec![0; 8];
        bytes.extend_from_slice(&message.watermark.to_le_bytes());
        bytes.extend_from_slice(&(message.completes.len() as u64).to_le_bytes());
        message.completes.iter().for_each(|row| bytes.extend_from_slice(&row.to_le_bytes()));
        if let Some(batch) = &message.batch {
            let mut writer = StreamWriter::try_new(&mut bytes, &batch.schema()).map_err(io::Error::other)?;
            writer.write(batch).and_then(|()| writer.finish()).map_err(io::Error::other)?;
        }
        let length = bytes.len() as u64 - 8;
        bytes[..8].copy_from_slice(&length.to_le_bytes());
        self.file.write_all_at(&bytes, self.written)?;
        self.written += bytes.len() as u64;
        self.messages += 1;
        Ok(())
    }

    /// The oldest message; none where all are read.
    pub fn pop(&mut self) -> io::Result<Option<Message>> {
        if self.messages == 0 {
            return Ok(None);
        }
        let mut length = [0; 8];
        self.file.read_exact_at(&mut length, self.read)?;
        let mut bytes = vec![0; u64::from_le_bytes(length) as usize];
        self.file.read_exact_at(&mut bytes, self.read + 8)?;
        self.read += 8 + bytes.len() as u64;
        self.messages -= 1;
        if self.messages == 0 {
            // What was read gives its room back.
            self.file.set_len(0)?;
            self.file.flush()?;
            (self.read, self.written) = (0, 0);
        }
        decode(&bytes).map(Some)
    }
}

fn decode(bytes: &[u8]) -> io::Result<Message> {
    let torn = || io::Error::other("a spilled message is shorter than it says");
    let mut words = bytes.chunks_exact(8).map_while(|word| word.try_into().ok()).map(u64::from_le_bytes);
    let watermark = words.next().ok_or_else(torn)?;
    let count = words.next().ok_or_else(torn)? as usize;
    let completes: Vec<u64> = words.take(count).collect();
    let rest = bytes.get(16 + 8 * count..).ok_or_else(torn)?;
    let batch = match rest {
        [] => None,
        rest => {
            let mut reader = StreamReader::try_new(Cursor::new(rest), None).map_err(io::Error::other)?;
            reader.next().transpose().map_err(io::Error::other)?
        }
    };
    Ok(Message { batch, completes, watermark })
}
