//! Safetensors, Hugging Face's format: one file, or shards with an index.
//!
//! Headers are read and checked by the safetensors crate (offsets contiguous, sizes right) and held
//! against each file's length; weights stay on the disk until they are asked for. Pickle files
//! (`.bin`, `.pt`) are never read.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};

use super::ModelError;
use super::file::WeightFile;
use super::tokenizer::read_json;

pub(super) const SINGLE: &str = "model.safetensors";
pub(super) const INDEX: &str = "model.safetensors.index.json";
/// As the safetensors crate's own limit.
const MAX_HEADER: u64 = 100_000_000;
const REMEDY: &str = "the file is damaged: download it again";

/// The open files of a model, and where each tensor lies.
#[derive(Debug)]
pub struct Safetensors {
    shards: Vec<Shard>,
    /// Shard and place of each tensor.
    tensors: BTreeMap<String, (usize, TensorInfo)>,
}

#[derive(Debug)]
struct Shard {
    file: WeightFile,
    data_start: u64,
}

/// The names of the shards that an index lists, sorted.
///
/// # Errors
/// When the index is no JSON with a `weight_map`, or names a file outside of its directory.
pub fn shards_of_index(index: &Path) -> Result<BTreeSet<String>, ModelError> {
    let json = read_json(index)?.unwrap_or_default();
    let map = json.get("weight_map").and_then(|map| map.as_object());
    let map = map.ok_or_else(|| ModelError::file(index, "has no weight_map; download it again"))?;
    let name = |value: &serde_json::Value| {
        let name = value.as_str().filter(|name| name.ends_with(".safetensors") && !name.contains(['/', '\\']));
        name.map(str::to_owned).ok_or_else(|| {
            ModelError::file(index, format!("names the shard {value}; shards are *.safetensors files beside it"))
        })
    };
    if map.is_empty() {
        return Err(ModelError::file(index, "has an empty weight_map; download it again"));
    }
    map.values().map(name).collect()
}

impl Safetensors {
    /// Opens `model.safetensors`, or the shards that `model.safetensors.index.json` lists.
    ///
    /// # Errors
    /// Names the missing or damaged file.
    pub fn open(dir: &Path) -> Result<Self, ModelError> {
        let index = dir.join(INDEX);
        let paths: Vec<PathBuf> = if index.exists() {
            shards_of_index(&index)?.iter().map(|name| dir.join(name)).collect()
        } else if dir.join(SINGLE).exists() {
            vec![dir.join(SINGLE)]
        } else {
            let pickle = dir.join("pytorch_model.bin");
            if pickle.exists() {
                let message = "is a pickle file, which may run any program and is not read; load the model with transformers and \
                               write it again with save_pretrained, which makes a model.safetensors";
                return Err(ModelError::file(pickle, message));
            }
            return Err(ModelError::file(dir, format!("has no weights: neither {SINGLE} nor {INDEX}; download them")));
        };
        if let Some(missing) = paths.iter().find(|path| !path.exists()) {
            return Err(ModelError::file(missing, format!("is missing, and {INDEX} lists it; download it")));
        }
        let mut opened = Self { shards: Vec::new(), tensors: BTreeMap::new() };
        for path in &paths {
            opened.add(path)?;
        }
        Ok(opened)
    }

    fn add(&mut self, path: &Path) -> Result<(), ModelError> {
        let (shard, metadata) = Shard::open(path)?;
        for (name, info) in metadata.tensors() {
            let known = self.tensors.insert(name.clone(), (self.shards.len(), info.clone()));
            if known.is_some() {
                return Err(ModelError::tensor(path, &name, "is in another shard too; download the model again"));
            }
        }
        self.shards.push(shard);
        Ok(())
    }

    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    pub fn paths(&self) -> impl Iterator<Item = &Path> {
        self.shards.iter().map(|shard| shard.file.path())
    }

    /// Shape and stored type.
    pub fn info(&self, name: &str) -> Option<(&[usize], Dtype)> {
        self.tensors.get(name).map(|(_, info)| (info.shape.as_slice(), info.dtype))
    }

    /// The file a tensor lies in.
    pub fn path_of(&self, name: &str) -> Option<&Path> {
        let (shard, _) = self.tensors.get(name)?;
        self.shards.get(*shard).map(|shard| shard.file.path())
    }

    /// Fills `buffer` with a tensor's bytes from `offset` on.
    ///
    /// # Errors
    /// When there is no such tensor, it has fewer bytes, or the file can't be read.
    pub fn read(&self, name: &str, offset: u64, buffer: &mut [u8]) -> Result<(), ModelError> {
        let place = self.tensors.get(name).and_then(|(shard, info)| Some((self.shards.get(*shard)?, info)));
        let (shard, info) = place.ok_or_else(|| ModelError::Setting(format!("no tensor {name} among the weights")))?;
        let (start, end) = (info.data_offsets.0 as u64, info.data_offsets.1 as u64);
        if offset.checked_add(buffer.len() as u64).is_none_or(|last| last > end - start) {
            return Err(ModelError::tensor(
                shard.file.path(),
                name,
                format!("has fewer bytes than asked for; {REMEDY}"),
            ));
        }
        shard.file.read_at(shard.data_start + start + offset, buffer)
    }
}

impl Shard {
    fn open(path: &Path) -> Result<(Self, Metadata), ModelError> {
        let file = WeightFile::open(path)?;
        let fault = |what: String| ModelError::file(path, format!("{what}; {REMEDY}"));
        if file.len() < 8 {
            return Err(fault("is too short for a safetensors file".into()));
        }
        let mut len = [0; 8];
        file.read_at(0, &mut len)?;
        let len = u64::from_le_bytes(len);
        if &len.to_le_bytes() == b"version " {
            let message = "is a Git LFS pointer, not the weights; run `git lfs pull` where it was cloned";
            return Err(ModelError::file(path, message));
        }
        if len > MAX_HEADER.min(file.len() - 8) {
            return Err(fault(format!("claims a header of {len} bytes")));
        }
        let mut header = vec![0; len as usize];
        file.read_at(8, &mut header)?;
        let metadata: Metadata =
            serde_json::from_slice(&header).map_err(|e| fault(format!("has a header that can't be read ({e})")))?;
        let data_start = 8 + len;
        let data = file.len() - data_start;
        if metadata.data_len() as u64 != data {
            let ends_after = |name: &&String| metadata.info(name).is_some_and(|info| info.data_offsets.1 as u64 > data);
            let names = metadata.offset_keys();
            let cut = names.iter().find(ends_after).map(|name| format!(", so tensor {name} is cut off"));
            let (says, cut) = (metadata.data_len(), cut.unwrap_or_default());
            return Err(fault(format!("has {data} bytes of weights where its header says {says}{cut}")));
        }
        Ok((Self { file, data_start }, metadata))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;
    use crate::model::gguf::fixture::Damage;

    fn file_of(header: &[u8], data: usize) -> Vec<u8> {
        [&(header.len() as u64).to_le_bytes(), header, &vec![1; data]].concat()
    }

    /// What opens can be read in whole; what doesn't names the file.
    fn opens_or_names(dir: &Path, file: &str) {
        match Safetensors::open(dir) {
            Ok(files) => {
                for name in files.names() {
                    let info = &files.tensors[name].1;
                    let bytes = info.data_offsets.1 - info.data_offsets.0;
                    let elements: usize = info.shape.iter().product();
                    assert_eq!(elements * info.dtype.bitsize(), bytes * 8, "{name}");
                    files.read(name, 0, &mut vec![0; bytes]).unwrap();
                    files.read(name, 1, &mut vec![0; bytes]).unwrap_err();
                }
            }
            Err(error) => assert!(error.to_string().contains(file), "{error}"),
        }
    }

    /// Numbers at which a check of a shape or an offset may go wrong.
    fn number() -> impl Strategy<Value = u64> {
        prop_oneof![8 => 0_u64..9, 1 => Just(1 << 32), 1 => Just(1 << 62), 1 => Just(u64::MAX)]
    }

    proptest! {
        #[test]
        fn damage_is_an_error_or_harmless(damage in Damage::strategy()) {
            let header = json!({
                "__metadata__": {"format": "pt"},
                "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
                "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
            }).to_string();
            let dir = tempfile::tempdir().unwrap();
            let good = file_of(header.as_bytes(), 32);
            std::fs::write(dir.path().join(SINGLE), Damage::all(&damage, good, 8 + header.len())).unwrap();
            opens_or_names(dir.path(), SINGLE);
        }

        #[test]
        fn headers_that_lie_are_refused(
            tensors in proptest::collection::vec(
                (
                    prop_oneof![Just("F32"), Just("BF16"), Just("U8"), Just("F4"), Just("F128")],
                    proptest::collection::vec(number(), 0..4),
                    (number(), number()),
                ),
                0..4,
            ),
            data in 0_usize..40,
        ) {
            let tensor = |(i, (dtype, shape, offsets))| {
                (format!("t{i}"), json!({"dtype": dtype, "shape": shape, "data_offsets": offsets}))
            };
            let header: serde_json::Map<_, _> = tensors.into_iter().enumerate().map(tensor).collect();
            let dir = tempfile::tempdir().unwrap();
            let header = serde_json::Value::Object(header).to_string();
            std::fs::write(dir.path().join(SINGLE), file_of(header.as_bytes(), data)).unwrap();
            opens_or_names(dir.path(), SINGLE);
        }

        #[test]
        fn any_bytes_are_survived(header in proptest::collection::vec(any::<u8>(), 0..200), framed in any::<bool>()) {
            let dir = tempfile::tempdir().unwrap();
            let bytes = if framed { file_of(&header, 8) } else { header };
            std::fs::write(dir.path().join(SINGLE), bytes).unwrap();
            opens_or_names(dir.path(), SINGLE);
        }

        #[test]
        fn any_index_is_survived(shard in "[a-z./\\\\]{0,6}(\\.safetensors)?", cut in 0_usize..60) {
            let dir = tempfile::tempdir().unwrap();
            let mut index = json!({"weight_map": {"a": shard, "b": "b.safetensors"}}).to_string();
            std::fs::write(dir.path().join("b.safetensors"), file_of(b"{}", 0)).unwrap();
            if cut < 30 {
                index.truncate(cut);
            }
            std::fs::write(dir.path().join(INDEX), index).unwrap();
            let message = Safetensors::open(dir.path()).map(|_| ()).map_err(|e| e.to_string());
            if let Err(message) = message {
                prop_assert!(message.contains(dir.path().to_str().unwrap()), "{}", message);
            }
        }
    }

    #[test]
    fn offsets_that_overlap_or_leave_gaps_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let tensor =
            |shape: &[u64], offsets: [u64; 2]| json!({"dtype": "F32", "shape": shape, "data_offsets": offsets});
        for (a, b, data) in [
            (tensor(&[2], [0, 8]), tensor(&[2], [4, 12]), 12),
            (tensor(&[2], [0, 8]), tensor(&[2], [12, 20]), 20),
            (tensor(&[2], [0, 8]), tensor(&[3], [8, 16]), 16),
            (tensor(&[2], [0, 8]), tensor(&[1 << 62, 4], [8, 16]), 16),
            (tensor(&[2], [0, 8]), tensor(&[2], [16, 8]), 16),
            (tensor(&[2], [0, 8]), tensor(&[2], [8, u64::MAX]), 16),
        ] {
            let header = json!({"a": a, "b": b}).to_string();
            std::fs::write(dir.path().join(SINGLE), file_of(header.as_bytes(), data)).unwrap();
            let message = Safetensors::open(dir.path()).unwrap_err().to_string();
            assert!(message.contains("model.safetensors: has a header that can't be read"), "{message}");
        }
    }
}
