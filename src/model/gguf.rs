//! GGUF, the one-file format of llama.cpp: metadata, tokenizer and quantised weights.
//!
//! The reader trusts nothing: every length is held against what is left of the file before memory
//! is taken for it, and every tensor's place against the file's end. Weights are dequantised to
//! `f32` a few rows at a time, so a model is never held twice.
//!
//! Format: <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>, versions 2 and 3,
//! little-endian. How elements are stored is told in [`super::quant`].

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{BufReader, Read};
use std::path::Path;

use super::ModelError;
use super::file::WeightFile;
use super::quant::Encoding;

const MAGIC: [u8; 4] = *b"GGUF";
const DEFAULT_ALIGNMENT: u64 = 32;
/// Array entries read from one file: a vocabulary has well below a million, and comes with a type, a
/// score and a merge an entry.
const MAX_ENTRIES: u64 = 1 << 22;
/// The longest string read: chat templates are some kilobytes.
const MAX_STRING: u64 = 1 << 26;
const REMEDY: &str = "the file is damaged or no GGUF file: download it again";

/// A metadata value. Integers and floats are widened: no reader of them cares for the width.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    Unsigned(u64),
    Signed(i64),
    Float(f64),
    Bool(bool),
    Text(String),
    Array(Vec<Value>),
}

/// Metadata entries by key.
#[derive(Debug, Default)]
pub struct Metadata(BTreeMap<String, Value>);

impl Metadata {
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.0.get(key)
    }

    pub fn text(&self, key: &str) -> Option<&str> {
        match self.get(key)? {
            Value::Text(text) => Some(text),
            _ => None,
        }
    }

    /// A non-negative integer of any stored width.
    pub fn unsigned(&self, key: &str) -> Option<u64> {
        match self.get(key)? {
            Value::Unsigned(n) => Some(*n),
            Value::Signed(n) => u64::try_from(*n).ok(),
            _ => None,
        }
    }

    pub fn float(&self, key: &str) -> Option<f64> {
        match self.get(key)? {
            Value::Float(x) => Some(*x),
            Value::Unsigned(n) => Some(*n as f64),
            Value::Signed(n) => Some(*n as f64),
            _ => None,
        }
    }

    pub fn bool(&self, key: &str) -> Option<bool> {
        match self.get(key)? {
            Value::Bool(b) => Some(*b),
            _ => None,
        }
    }

    pub fn array(&self, key: &str) -> Option<&[Value]> {
        match self.get(key)? {
            Value::Array(values) => Some(values),
            _ => None,
        }
    }

    /// The strings of an array; `None` too when an entry is something else.
    pub fn texts(&self, key: &str) -> Option<Vec<&str>> {
        self.array(key)?
            .iter()
            .map(|value| match value {
                Value::Text(text) => Some(text.as_str()),
                _ => None,
            })
            .collect()
    }

    pub fn put(&mut self, key: impl Into<String>, value: impl Into<Value>) {
        self.0.insert(key.into(), value.into());
    }

    /// The number of entries, and all of them as they stand in a file: integers and floats of 32 bits.
    pub fn bytes(&self) -> (u64, Vec<u8>) {
        let mut out = Vec::new();
        for (key, value) in &self.0 {
            text_bytes(key, &mut out);
            out.extend(value.kind().to_le_bytes());
            value.bytes(&mut out);
        }
        (self.0.len() as u64, out)
    }
}

fn text_bytes(text: &str, out: &mut Vec<u8>) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

impl Value {
    /// The id of the type that is written.
    fn kind(&self) -> u32 {
        match self {
            Self::Unsigned(_) => 4,
            Self::Signed(_) => 5,
            Self::Float(_) => 6,
            Self::Bool(_) => 7,
            Self::Text(_) => 8,
            Self::Array(_) => 9,
        }
    }

    fn bytes(&self, out: &mut Vec<u8>) {
        match self {
            Self::Unsigned(n) => out.extend((*n as u32).to_le_bytes()),
            Self::Signed(n) => out.extend((*n as i32).to_le_bytes()),
            Self::Float(x) => out.extend((*x as f32).to_le_bytes()),
            Self::Bool(b) => out.push(u8::from(*b)),
            Self::Text(text) => text_bytes(text, out),
            Self::Array(values) => {
                out.extend(values.first().map_or(8, Self::kind).to_le_bytes());
                out.extend((values.len() as u64).to_le_bytes());
                values.iter().for_each(|value| value.bytes(out));
            }
        }
    }
}

impl From<&str> for Value {
    fn from(text: &str) -> Self {
        Self::Text(text.to_owned())
    }
}

impl From<u32> for Value {
    fn from(n: u32) -> Self {
        Self::Unsigned(n.into())
    }
}

impl From<i32> for Value {
    fn from(n: i32) -> Self {
        Self::Signed(n.into())
    }
}

impl From<f32> for Value {
    fn from(x: f32) -> Self {
        Self::Float(x.into())
    }
}

impl From<bool> for Value {
    fn from(b: bool) -> Self {
        Self::Bool(b)
    }
}

impl<T: Into<Self>> FromIterator<T> for Value {
    fn from_iter<I: IntoIterator<Item = T>>(values: I) -> Self {
        Self::Array(values.into_iter().map(Into::into).collect())
    }
}

/// Where a tensor lies and what it looks like.
#[derive(Debug, Clone, PartialEq)]
pub struct TensorInfo {
    /// Outermost dimension first, as everywhere but in GGUF itself.
    pub shape: Vec<usize>,
    pub encoding: Encoding,
    /// From the start of the file.
    offset: u64,
}

impl TensorInfo {
    /// Elements of a row: the innermost dimension.
    fn width(&self) -> usize {
        self.shape.last().copied().unwrap_or(1)
    }

    /// Rows: the product of all but the innermost dimension.
    pub fn rows(&self) -> usize {
        let outer = self.shape.len().saturating_sub(1);
        self.shape.iter().take(outer).product()
    }

    fn row_bytes(&self) -> usize {
        let (elements, bytes) = self.encoding.block();
        self.width() / elements * bytes
    }

    /// Bytes that the tensor takes in the file.
    pub fn bytes(&self) -> u64 {
        (self.rows() as u64) * (self.row_bytes() as u64)
    }
}

/// An open GGUF file: its metadata in memory, its weights on the disk.
#[derive(Debug)]
pub struct Gguf {
    file: WeightFile,
    header: Header,
}

#[derive(Debug)]
struct Header {
    metadata: Metadata,
    /// Where the metadata ends in the file.
    metadata_end: u64,
    tensors: HashMap<String, TensorInfo>,
}

impl Gguf {
    /// Opens a file and reads its header.
    ///
    /// # Errors
    /// Names the file and what in its header can't be.
    pub fn open(path: &Path) -> Result<Self, ModelError> {
        let file = WeightFile::open(path)?;
        let reader = BufReader::with_capacity(1 << 20, File::open(path).map_err(ModelError::io(path))?);
        let header =
            Header::read(reader, file.len()).map_err(|what| ModelError::file(path, format!("{what}; {REMEDY}")))?;
        Ok(Self { file, header })
    }

    pub fn path(&self) -> &Path {
        self.file.path()
    }

    pub fn metadata(&self) -> &Metadata {
        &self.header.metadata
    }

    /// The number of metadata entries, and all of them as the file has them.
    ///
    /// # Errors
    /// When the file can't be read.
    pub fn raw_metadata(&self) -> Result<(u64, Vec<u8>), ModelError> {
        // After the magic number, the version and two counts.
        let start = 24;
        let mut bytes = vec![0; self.header.metadata_end.saturating_sub(start) as usize];
        self.file.read_at(start, &mut bytes)?;
        Ok((self.header.metadata.0.len() as u64, bytes))
    }

    /// Tensor names as the file has them (`blk.0.attn_q.weight`).
    pub fn tensor_names(&self) -> impl Iterator<Item = &str> {
        self.header.tensors.keys().map(String::as_str)
    }

    pub fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.header.tensors.get(name)
    }

    /// Dequantises rows `first .. first + count` of a tensor and appends them to `out`,
    /// `count * width` values. A tensor of one dimension is one row.
    ///
    /// # Errors
    /// When the tensor doesn't exist, has no such rows, or the file can't be read.
    pub fn read_rows(&self, name: &str, first: usize, count: usize, out: &mut Vec<f32>) -> Result<(), ModelError> {
        let fault = |what: String| ModelError::tensor(self.path(), name, format!("{what}; {REMEDY}"));
        let info = self.tensor(name).ok_or_else(|| fault("is missing".into()))?;
        if first.checked_add(count).is_none_or(|end| end > info.rows()) {
            return Err(fault(format!("has {} rows, asked for {count} from {first}", info.rows())));
        }
        let mut bytes = vec![0; count * info.row_bytes()];
        self.file.read_at(info.offset + (first * info.row_bytes()) as u64, &mut bytes)?;
        // Not `resize`, which writes numbers one by one in an unoptimised build.
        let mut values = vec![0.0; count * info.width()];
        info.encoding.decode(&bytes, &mut values);
        out.append(&mut values);
        Ok(())
    }
}

impl Header {
    fn read(reader: impl Read, len: u64) -> Result<Self, String> {
        let mut input = Input { reader, len, position: 0, entries_left: MAX_ENTRIES };
        if input.bytes::<4>()? != MAGIC {
            return Err("does not begin with GGUF".into());
        }
        let version = input.u32()?;
        if !(2..=3).contains(&version) {
            return Err(format!("has version {version}, and versions 2 and 3 are read"));
        }
        let tensor_count = input.count(24, "tensors")?;
        let metadata_count = input.count(13, "metadata entries")?;
        let mut metadata = Metadata::default();
        for _ in 0..metadata_count {
            let key = input.text()?;
            let kind = input.u32()?;
            let value = input.value(kind, &key)?;
            if metadata.0.insert(key.clone(), value).is_some() {
                return Err(format!("has {key:?} twice"));
            }
        }
        let metadata_end = input.position;
        let mut tensors = HashMap::new();
        for _ in 0..tensor_count {
            let (name, info) = input.tensor_info()?;
            if tensors.insert(name.clone(), info).is_some() {
                return Err(format!("names tensor {name:?} twice"));
            }
        }
        place(&mut tensors, input.position, len, alignment(&metadata)?)?;
        Ok(Self { metadata, metadata_end, tensors })
    }
}

fn alignment(metadata: &Metadata) -> Result<u64, String> {
    match metadata.get("general.alignment") {
        None => Ok(DEFAULT_ALIGNMENT),
        Some(Value::Unsigned(n)) if n.is_power_of_two() && *n <= 1 << 20 => Ok(*n),
        Some(other) => Err(format!("general.alignment is {other:?}, no small power of two")),
    }
}

/// Turns offsets into the data section into offsets into the file, checking that every tensor lies
/// inside the file, aligned, and apart from the others.
fn place(tensors: &mut HashMap<String, TensorInfo>, header_end: u64, len: u64, alignment: u64) -> Result<(), String> {
    let data = header_end.next_multiple_of(alignment);
    let mut spans = Vec::with_capacity(tensors.len());
    for (name, info) in tensors.iter_mut() {
        if !info.offset.is_multiple_of(alignment) {
            return Err(format!("tensor {name:?} is not aligned to {alignment} bytes"));
        }
        let start = data.checked_add(info.offset);
        let end = start.and_then(|start| start.checked_add(info.bytes()));
        let (Some(start), Some(end)) = (start, end) else {
            return Err(format!("tensor {name:?} lies at an impossible offset"));
        };
        if end > len {
            return Err(format!("tensor {name:?} ends at byte {end} of a file of {len} bytes"));
        }
        info.offset = start;
        spans.push((start, end, name.as_str()));
    }
    spans.sort_unstable();
    for pair in spans.windows(2) {
        if let [(_, end, first), (start, _, second)] = pair
            && end > start
        {
            return Err(format!("tensors {first:?} and {second:?} overlap"));
        }
    }
    Ok(())
}

/// The header's bytes in order, with what is left of the file known at every step.
struct Input<R> {
    reader: R,
    len: u64,
    position: u64,
    entries_left: u64,
}

impl<R: Read> Input<R> {
    fn left(&self) -> u64 {
        self.len.saturating_sub(self.position)
    }

    fn fill(&mut self, buffer: &mut [u8]) -> Result<(), String> {
        let cut = || format!("ends inside its header, at byte {}", self.position);
        self.reader.read_exact(buffer).map_err(|_| cut())?;
        self.position += buffer.len() as u64;
        Ok(())
    }

    fn bytes<const N: usize>(&mut self) -> Result<[u8; N], String> {
        let mut bytes = [0; N];
        self.fill(&mut bytes)?;
        Ok(bytes)
    }

    fn u32(&mut self) -> Result<u32, String> {
        self.bytes().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64, String> {
        self.bytes().map(u64::from_le_bytes)
    }

    /// A number of things of at least `size` bytes each, which what is left of the file can hold.
    fn count(&mut self, size: u64, things: &str) -> Result<u64, String> {
        let count = self.u64()?;
        if count > self.left() / size {
            return Err(format!("claims {count} {things}, more than the file can hold"));
        }
        Ok(count)
    }

    fn text(&mut self) -> Result<String, String> {
        let len = self.u64()?;
        if len > self.left().min(MAX_STRING) {
            return Err(format!("claims a string of {len} bytes at byte {}", self.position));
        }
        let mut bytes = vec![0; len as usize];
        self.fill(&mut bytes)?;
        String::from_utf8(bytes).map_err(|_| format!("has a string that is no UTF-8 before byte {}", self.position))
    }

    fn value(&mut self, kind: u32, key: &str) -> Result<Value, String> {
        if kind != 9 {
            return self.scalar(kind, key);
        }
        let kind = self.u32()?;
        let size = scalar_size(kind).ok_or_else(|| unknown(kind, key))?;
        let count = self.count(size, "array entries")?;
        self.entries_left = self
            .entries_left
            .checked_sub(count)
            .ok_or_else(|| format!("has more than {MAX_ENTRIES} array entries, the last in {key}"))?;
        (0..count).map(|_| self.scalar(kind, key)).collect::<Result<_, _>>().map(Value::Array)
    }

    fn scalar(&mut self, kind: u32, key: &str) -> Result<Value, String> {
        Ok(match kind {
            0 => Value::Unsigned(u8::from_le_bytes(self.bytes()?).into()),
            1 => Value::Signed(i8::from_le_bytes(self.bytes()?).into()),
            2 => Value::Unsigned(u16::from_le_bytes(self.bytes()?).into()),
            3 => Value::Signed(i16::from_le_bytes(self.bytes()?).into()),
            4 => Value::Unsigned(self.u32()?.into()),
            5 => Value::Signed(i32::from_le_bytes(self.bytes()?).into()),
            6 => Value::Float(f32::from_le_bytes(self.bytes()?).into()),
            7 => Value::Bool(self.bytes::<1>()? != [0]),
            8 => Value::Text(self.text()?),
            10 => Value::Unsigned(self.u64()?),
            11 => Value::Signed(i64::from_le_bytes(self.bytes()?)),
            12 => Value::Float(f64::from_le_bytes(self.bytes()?)),
            _ => return Err(unknown(kind, key)),
        })
    }

    /// A tensor's name and shape; its offset is still relative to the data section.
    fn tensor_info(&mut self) -> Result<(String, TensorInfo), String> {
        let name = self.text()?;
        let dimensions = self.u32()?;
        if !(1..=4).contains(&dimensions) {
            return Err(format!("tensor {name:?} has {dimensions} dimensions"));
        }
        let mut shape = Vec::with_capacity(4);
        for _ in 0..dimensions {
            shape.push(self.u64()?);
        }
        shape.reverse();
        let kind = self.u32()?;
        let offset = self.u64()?;
        let encoding = Encoding::from_id(kind)
            .ok_or_else(|| format!("tensor {name:?} has type {kind}, and {} are read", Encoding::NAMES))?;
        let info = TensorInfo { shape: checked_shape(&name, &shape, encoding)?, encoding, offset };
        Ok((name, info))
    }
}

fn checked_shape(name: &str, shape: &[u64], encoding: Encoding) -> Result<Vec<usize>, String> {
    let (block, _) = encoding.block();
    // 4 bytes an element is the widest encoding, so bytes can't overflow either.
    let elements = shape.iter().try_fold(4_u64, |product, n| product.checked_mul(*n));
    if elements.is_none_or(|n| n == 0 || n > i64::MAX as u64) {
        return Err(format!("tensor {name:?} has the impossible shape {shape:?}"));
    }
    if let Some(width) = shape.last().filter(|width| !width.is_multiple_of(block as u64)) {
        return Err(format!("tensor {name:?} has rows of {width} elements, no multiple of {block} as its type asks"));
    }
    Ok(shape.iter().map(|n| *n as usize).collect())
}

/// Bytes that an array entry takes at least.
fn scalar_size(kind: u32) -> Option<u64> {
    Some(match kind {
        0 | 1 | 7 => 1,
        2 | 3 => 2,
        4..=6 => 4,
        8 | 10..=12 => 8,
        _ => return None,
    })
}

fn unknown(kind: u32, key: &str) -> String {
    format!("{key} has the unknown value type {kind}")
}

/// Small files for tests: written here, so that each can be wrong in one place.
#[cfg(test)]
pub(super) mod fixture {
    use proptest::prelude::*;
    use proptest::sample::Index;

    use super::*;

    #[derive(Default)]
    pub struct Builder {
        metadata: Metadata,
        /// Name, shape (outermost first), type and bytes.
        tensors: Vec<(String, Vec<u64>, u32, Vec<u8>)>,
    }

    impl Builder {
        pub fn with(mut self, key: &str, value: impl Into<Value>) -> Self {
            self.metadata.put(key, value);
            self
        }

        pub fn text(self, key: &str, value: &str) -> Self {
            self.with(key, value)
        }

        pub fn unsigned(self, key: &str, value: u32) -> Self {
            self.with(key, value)
        }

        pub fn float(self, key: &str, value: f32) -> Self {
            self.with(key, value)
        }

        pub fn bool(self, key: &str, value: bool) -> Self {
            self.with(key, value)
        }

        pub fn texts(self, key: &str, values: &[&str]) -> Self {
            self.with(key, values.iter().copied().collect::<Value>())
        }

        pub fn floats(self, key: &str, values: &[f32]) -> Self {
            self.with(key, values.iter().copied().collect::<Value>())
        }

        pub fn signed(self, key: &str, values: &[i32]) -> Self {
            self.with(key, values.iter().copied().collect::<Value>())
        }

        pub fn raw(mut self, name: &str, shape: &[u64], kind: u32, bytes: Vec<u8>) -> Self {
            self.tensors.push((name.into(), shape.to_vec(), kind, bytes));
            self
        }

        pub fn f32(self, name: &str, shape: &[u64], values: impl IntoIterator<Item = f32>) -> Self {
            self.raw(name, shape, 0, values.into_iter().flat_map(f32::to_le_bytes).collect())
        }

        pub fn bytes(&self) -> Vec<u8> {
            let mut out = b"GGUF".to_vec();
            out.extend(3_u32.to_le_bytes());
            out.extend((self.tensors.len() as u64).to_le_bytes());
            let (count, metadata) = self.metadata.bytes();
            out.extend(count.to_le_bytes());
            out.extend(metadata);
            let mut data = Vec::new();
            for (name, shape, kind, bytes) in &self.tensors {
                text_bytes(name, &mut out);
                out.extend((shape.len() as u32).to_le_bytes());
                out.extend(shape.iter().rev().flat_map(|n| n.to_le_bytes()));
                out.extend(kind.to_le_bytes());
                out.extend((data.len() as u64).to_le_bytes());
                data.extend(bytes);
                data.resize(data.len().next_multiple_of(32), 0);
            }
            out.resize(out.len().next_multiple_of(32), 0);
            [out, data].concat()
        }

        pub fn open(&self) -> (tempfile::TempDir, Gguf) {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("small.gguf");
            std::fs::write(&path, self.bytes()).unwrap();
            let gguf = Gguf::open(&path).unwrap();
            (dir, gguf)
        }
    }

    /// Something that goes wrong with a file between its writer and us.
    #[derive(Debug, Clone)]
    pub enum Damage {
        Byte(Index, u8),
        Number(Index, u64),
        Cut(Index),
    }

    impl Damage {
        pub fn strategy() -> impl Strategy<Value = Vec<Self>> {
            let number = prop_oneof![
                any::<u64>(),
                (0_u32..64, -2_i64..3).prop_map(|(bits, more)| (1_u64 << bits).wrapping_add_signed(more)),
                0_u64..600,
            ];
            let one = prop_oneof![
                6 => any::<(Index, u8)>().prop_map(|(at, byte)| Self::Byte(at, byte)),
                6 => (any::<Index>(), number).prop_map(|(at, number)| Self::Number(at, number)),
                1 => any::<Index>().prop_map(Self::Cut),
            ];
            proptest::collection::vec(one, 1..4)
        }

        /// `header` is where most of the damage goes.
        pub fn all(damages: &[Self], mut bytes: Vec<u8>, header: usize) -> Vec<u8> {
            for damage in damages {
                let room = header.min(bytes.len());
                match damage {
                    Self::Byte(at, byte) => {
                        bytes.iter_mut().skip(at.index(room.max(1))).take(1).for_each(|b| *b = *byte)
                    }
                    Self::Number(at, number) => {
                        let place = bytes.iter_mut().skip(at.index(room.max(1)));
                        place.zip(number.to_le_bytes()).for_each(|(b, byte)| *b = byte);
                    }
                    Self::Cut(at) => bytes.truncate(at.index(bytes.len() + 1)),
                }
            }
            bytes
        }
    }

    /// The header of a Llama of one layer, with a few of its tensors.
    pub fn small() -> Builder {
        let number = |i: u32| i as f32 * 0.5;
        Builder::default()
            .text("general.architecture", "llama")
            .unsigned("llama.block_count", 1)
            .unsigned("llama.context_length", 128)
            .unsigned("llama.embedding_length", 64)
            .unsigned("llama.feed_forward_length", 96)
            .unsigned("llama.attention.head_count", 4)
            .unsigned("llama.attention.head_count_kv", 2)
            .float("llama.attention.layer_norm_rms_epsilon", 1e-5)
            .texts("tokenizer.ggml.tokens", &["a", "b", "ab"])
            .f32("token_embd.weight", &[3, 64], (0..192).map(number))
            .f32("blk.0.attn_q.weight", &[64, 2], (0..128).map(number))
            .raw("output_norm.weight", &[64], 8, [[0, 0x3c].to_vec(), vec![2; 32]].concat().repeat(2))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn rows_are_read_by_number() {
        let (_dir, gguf) = fixture::small().open();
        assert_eq!(gguf.tensor("token_embd.weight").unwrap().shape, [3, 64]);
        let mut rows = Vec::new();
        gguf.read_rows("token_embd.weight", 1, 2, &mut rows).unwrap();
        assert_eq!(rows, (64..192).map(|i| i as f32 * 0.5).collect::<Vec<_>>());
        rows.clear();
        gguf.read_rows("output_norm.weight", 0, 1, &mut rows).unwrap();
        assert_eq!(rows, [2.0; 64]);
        for (name, first, count) in [("token_embd.weight", 2, 2), ("token_embd.weight", usize::MAX, 2), ("none", 0, 1)]
        {
            let message = gguf.read_rows(name, first, count, &mut rows).unwrap_err().to_string();
            assert!(message.contains("small.gguf: tensor ") && message.contains(name), "{message}");
        }
    }

    fn parse(bytes: &[u8]) -> Result<Header, String> {
        Header::read(bytes, bytes.len() as u64)
    }

    #[test]
    fn lying_headers_are_refused() {
        let good = fixture::small().bytes();
        let with = |at: usize, number: u64| {
            let mut bytes = good.clone();
            bytes[at..at + 8].copy_from_slice(&number.to_le_bytes());
            parse(&bytes).unwrap_err()
        };
        assert!(with(8, u64::MAX).contains("tensors, more than the file can hold"));
        assert!(with(16, 1 << 60).contains("metadata entries, more than the file can hold"));
        assert!(with(24, u64::MAX - 3).contains("claims a string of"));
        assert!(parse(b"GGML").unwrap_err().contains("does not begin with GGUF"));
        let longer = fixture::small().f32("blk.0.ffn_norm.weight", &[1 << 40], [1.0]).bytes();
        assert!(parse(&longer).unwrap_err().contains("\"blk.0.ffn_norm.weight\" ends at byte"));
        let huge = fixture::small().f32("x", &[1 << 40, 1 << 40], [1.0]).bytes();
        assert!(parse(&huge).unwrap_err().contains("impossible shape"));
        let overlap = fixture::small().f32("x", &[64], [1.0]).f32("y", &[64], [1.0; 64]).bytes();
        assert!(parse(&overlap).unwrap_err().contains("overlap"));
        let empty = fixture::small().f32("x", &[0, 64], []).bytes();
        assert!(parse(&empty).unwrap_err().contains("tensor \"x\" has the impossible shape [0, 64]"));
        let twice = fixture::small().f32("token_embd.weight", &[1], [1.0]).bytes();
        assert!(parse(&twice).unwrap_err().contains("twice"));
        let ragged = fixture::small().raw("x", &[2, 320], 12, vec![0; 2 * 144]).bytes();
        assert!(parse(&ragged).unwrap_err().contains("tensor \"x\" has rows of 320 elements, no multiple of 256"));
        let unknown = fixture::small().raw("x", &[256], 10, vec![0; 84]).bytes();
        assert!(parse(&unknown).unwrap_err().contains("has type 10, and F32"));
    }

    proptest! {
        /// What is read of a damaged file lies inside of it; a header that is none names the file.
        #[test]
        fn damage_is_an_error_or_harmless(damage in fixture::Damage::strategy()) {
            let good = fixture::small().raw("k", &[1, 256], 14, vec![1; 210]).bytes();
            let header = parse(&good).unwrap().tensors.values().map(|info| info.offset).min().unwrap();
            let bytes = fixture::Damage::all(&damage, good, header as usize);
            let file = tempfile::NamedTempFile::new().unwrap();
            std::fs::write(file.path(), &bytes).unwrap();
            match Gguf::open(file.path()) {
                Ok(gguf) => {
                    let mut values = Vec::new();
                    for name in gguf.tensor_names() {
                        let info = gguf.tensor(name).unwrap();
                        prop_assert!(info.offset + info.bytes() <= bytes.len() as u64);
                        values.clear();
                        prop_assert!(gguf.read_rows(name, 0, info.rows(), &mut values).is_ok());
                        prop_assert_eq!(values.len(), info.shape.iter().product::<usize>());
                    }
                }
                Err(error) => prop_assert!(error.to_string().contains(file.path().to_str().unwrap()), "{}", error),
            }
        }

        #[test]
        fn any_bytes_after_the_magic_are_survived(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = parse(&bytes);
            let _ = parse(&[b"GGUF\x03\0\0\0".as_slice(), &bytes].concat());
            let counts = [b"GGUF\x03\0\0\0".as_slice(), &1_u64.to_le_bytes(), &1_u64.to_le_bytes(), &bytes];
            let _ = parse(&counts.concat());
        }
    }
}
