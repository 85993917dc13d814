//! Text files as bytes, decompressed. Content that is not UTF-8 text is refused if its first bytes show it.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::Path;

use crate::data::DataError;

/// Compression of a file, detected from its first bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Compression {
    Gzip,
    Zstd,
    Bzip2,
    Xz,
}

/// Extensions of compressed files, after that of the text.
pub const EXTENSIONS: [&str; 4] = ["gz", "zst", "bz2", "xz"];

impl Compression {
    fn of(head: &[u8]) -> Option<Self> {
        match head {
            [0x1f, 0x8b, ..] => Some(Self::Gzip),
            [0x28, 0xb5, 0x2f, 0xfd, ..] => Some(Self::Zstd),
            [b'B', b'Z', b'h', ..] => Some(Self::Bzip2),
            [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => Some(Self::Xz),
            _ => None,
        }
    }
}

/// Opens a text file and skips its byte order mark.
///
/// # Errors
/// The file can't be read, or is a Git LFS pointer, Parquet, Arrow, a web page or UTF-16.
pub fn open(path: &Path) -> Result<Box<dyn BufRead + Send>, DataError> {
    let fault = |e: io::Error| fault(path, &e);
    let mut file = BufReader::with_capacity(1 << 16, File::open(path).map_err(fault)?);
    let raw: Box<dyn Read + Send> = match Compression::of(file.fill_buf().map_err(fault)?) {
        None => Box::new(file),
        Some(Compression::Gzip) => Box::new(flate2::bufread::MultiGzDecoder::new(file)),
        Some(Compression::Zstd) => Box::new(zstd::Decoder::with_buffer(file).map_err(fault)?),
        Some(Compression::Bzip2) => Box::new(bzip2::bufread::MultiBzDecoder::new(file)),
        Some(Compression::Xz) => Box::new(lzma_rust2::XzReader::new(file, true)),
    };
    let mut text = BufReader::with_capacity(1 << 16, raw);
    let head = text.fill_buf().map_err(fault)?;
    refuse_head(path, head)?;
    if head.starts_with(&[0xef, 0xbb, 0xbf]) {
        text.consume(3);
    }
    Ok(Box::new(text))
}

/// The error of a read. Damage or an early end of a compressed file is found only here.
pub fn fault(path: &Path, error: &io::Error) -> DataError {
    let message = format!("{}: {error}", path.display());
    match error.kind() {
        io::ErrorKind::UnexpectedEof | io::ErrorKind::InvalidData | io::ErrorKind::InvalidInput => {
            DataError::user(format!("{message}; the compressed file is damaged or incomplete"))
        }
        _ => DataError::external(message),
    }
}

/// Refuses Git LFS pointers, Parquet, Arrow, web pages and UTF-16.
fn refuse_head(path: &Path, head: &[u8]) -> Result<(), DataError> {
    if head.starts_with(b"version https://git-lfs") {
        return Err(pointer(path));
    }
    let format = match head {
        [b'P', b'A', b'R', b'1', ..] => Some(("Parquet", "parquet")),
        [b'A', b'R', b'R', b'O', b'W', b'1', ..] => Some(("Arrow", "arrow")),
        _ => None,
    };
    if let Some((format, extension)) = format {
        let file = path.display();
        return Err(DataError::user(format!("{file}: the file is {format}; give it a name that ends in .{extension}")));
    }
    let begins = head.iter().take(64).map(|byte| byte.to_ascii_lowercase()).collect::<Vec<u8>>();
    if begins.starts_with(b"<!doctype html") || begins.starts_with(b"<html") {
        let file = path.display();
        return Err(DataError::user(format!("{file}: the file is a web page, not data; download the data itself")));
    }
    let utf16 = matches!(head, [0xff, 0xfe, ..] | [0xfe, 0xff, ..] | [0, _, ..]) || matches!(head, [_, 0, ..]);
    if utf16 {
        let file = path.display();
        return Err(DataError::user(format!(
            "{file}: the text is UTF-16; convert it to UTF-8: iconv -f UTF-16 -t UTF-8 {file} > NEW"
        )));
    }
    Ok(())
}

/// Refuses a Git LFS pointer in place of a file of any format.
///
/// # Errors
/// The file is a Git LFS pointer.
pub fn refuse_pointer(path: &Path) -> Result<(), DataError> {
    let mut head = [0; 23];
    let read = File::open(path).and_then(|mut file| file.read(&mut head));
    match read {
        Ok(read) if head[..read].starts_with(b"version https://git-lfs") => Err(pointer(path)),
        _ => Ok(()),
    }
}

fn pointer(path: &Path) -> DataError {
    DataError::user(format!(
        "{}: the file is a Git LFS pointer, not the data; run `git lfs pull` where it was cloned",
        path.display()
    ))
}

/// The error for text that is not UTF-8.
pub fn not_utf8(path: &Path, line: u64) -> DataError {
    let file = path.display();
    DataError::user(format!(
        "{file}:{line}: the text is not UTF-8; if it is Windows-1252, convert it: \
         iconv -f WINDOWS-1252 -t UTF-8 {file} > NEW"
    ))
}
