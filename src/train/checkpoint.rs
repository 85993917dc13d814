//! Training on disk: adapters to be used, checkpoints to go on from.
//!
//! Both appear whole or not at all: they are written beside their place, synced and renamed.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

use super::error::TrainError;
use super::stats::Stats;
use super::trainer::Trainer;
use crate::model::export::{Change, Export};
use crate::model::{Lora, Pretrained};
use crate::torch::GradGuard;

const STATE: &str = "state.safetensors";
const PROGRESS: &str = "progress";
/// The parameters that were evaluated best.
const BEST: &str = "best";

/// How far training had come: what a resumed run compares and goes on from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Progress {
    /// Hash of configuration, base, start and reference: what makes two runs the same.
    pub key: String,
    /// From 0.
    pub epoch: u64,
    /// Pairs of this epoch that are in the adapter.
    pub pairs: u64,
    /// [`super::Pair::chain`] over the pairs consumed so far in the first epoch, hex.
    pub chain: String,
    /// Steps made, skipped ones included.
    pub steps: u64,
    /// Updates made by the optimizer.
    pub updates: u64,
    pub skipped: u64,
    /// Figures of the first step, so that a resumed run still tells them.
    pub first: Option<Stats>,
    /// Of the last evaluation.
    #[serde(default)]
    pub evaluation: Option<Stats>,
    /// The step it was made after.
    #[serde(default)]
    pub evaluated: Option<u64>,
    /// The best evaluation so far, where the best adapter is kept, and how many came after it.
    #[serde(default)]
    pub best: Option<Stats>,
    #[serde(default)]
    pub since_best: u64,
    /// Steps and evaluations that were told.
    #[serde(default)]
    pub told: u64,
}

impl Trainer {
    /// Writes the adapter in PEFT's format to `dir`, which is replaced. `base` names the model it
    /// belongs to.
    pub fn save_adapter(&self, dir: &Path, base: &str) -> Result<(), TrainError> {
        let _no_grad = GradGuard::set(false);
        let result = self.result()?;
        replace(dir, |tmp| Ok(result.save(tmp, base)?))
    }

    /// Writes the whole model as a Hugging Face directory, in its dtype, to `dir`, which is replaced. `base` is what it
    /// was before: it has the texts.
    pub fn save_model(&self, dir: &Path, base: &Pretrained) -> Result<(), TrainError> {
        let _no_grad = GradGuard::set(false);
        let weights: BTreeMap<String, Tensor> = self.model.stored()?.into_iter().collect();
        let export = Export { base, change: Some(Change::Weights(&weights)), kind: self.model.kind() };
        replace(dir, |tmp| Ok(export.directory(tmp)?))
    }

    /// Writes the average of the result, which counts `alpha`, and of the adapter in `average`, to `dir`, which is
    /// replaced; the result alone where there is no average yet.
    pub fn save_average(&self, dir: &Path, average: Option<&Path>, alpha: f64, base: &str) -> Result<(), TrainError> {
        let _no_grad = GradGuard::set(false);
        let result = self.result()?;
        let load = |dir: &Path| Lora::load(dir, &self.model.config, self.model.device());
        let mixed = match average.map(load).transpose()? {
            Some(before) => Lora::concat(&[(&before, 1.0 - alpha), (&result, alpha)])?,
            None => result,
        };
        replace(dir, |tmp| Ok(mixed.save(tmp, base)?))
    }

    /// Writes parameters, optimizer and `progress` to `dir`, which is replaced. Between two steps.
    pub fn save_checkpoint(&self, dir: &Path, progress: &Progress) -> Result<(), TrainError> {
        let _no_grad = GradGuard::set(false);
        let mut tensors = vec![
            ("parameters", bytes(&self.flat.parameters)?),
            ("first_moment", bytes(&self.flat.first_moment)?),
            ("second_moment", bytes(&self.flat.second_moment)?),
        ];
        if let Some(best) = &self.best {
            tensors.push((BEST, bytes(best)?));
        }
        replace(dir, |tmp| {
            let file = tmp.join(STATE);
            let error = |e: &dyn std::fmt::Display| TrainError::file(&file, format!("can't be written: {e}"));
            let view = |(name, data)| {
                let count = <[u8]>::len(data) / 4;
                TensorView::new(Dtype::F32, vec![count], data).map(|view| (name, view))
            };
            let views = tensors.iter().map(|(name, data)| view((*name, data)));
            let views = views.collect::<Result<Vec<_>, _>>().map_err(|e| error(&e))?;
            let text = serde_json::to_string(progress).map_err(|e| error(&e))?;
            let metadata = HashMap::from([(PROGRESS.to_owned(), text)]);
            let data = safetensors::serialize(views, Some(metadata)).map_err(|e| error(&e))?;
            std::fs::write(&file, data).map_err(|e| error(&e))
        })
    }

    /// Goes on from a checkpoint written by a trainer of the same shape.
    ///
    /// # Errors
    /// A file that is damaged or belongs to another adapter; the trainer is then as before.
    pub fn load_checkpoint(&mut self, dir: &Path) -> Result<Progress, TrainError> {
        let _no_grad = GradGuard::set(false);
        let file = dir.join(STATE);
        let broken = |e: &dyn std::fmt::Display| {
            TrainError::file(&file, format!("is no checkpoint of this run ({e}); delete it to train from the start"))
        };
        let data = std::fs::read(&file).map_err(|e| broken(&e))?;
        let progress = progress_of(&data).map_err(|e| broken(&e))?;
        let state = SafeTensors::deserialize(&data).map_err(|e| broken(&e))?;
        let count = self.flat.parameters.numel();
        let read = |name: &str| -> Result<Tensor, TrainError> {
            let view = state.tensor(name).map_err(|e| broken(&e))?;
            if view.dtype() != Dtype::F32 || view.shape() != [count] {
                return Err(broken(&format!("{name} has {:?} numbers, the adapter {count}", view.shape())));
            }
            Ok(Tensor::f_from_data_size(view.data(), &[count as i64], Kind::Float)?)
        };
        let best = state.tensor(BEST).is_ok().then(|| read(BEST)).transpose()?;
        let [parameters, first, second] = [read("parameters")?, read("first_moment")?, read("second_moment")?];
        // into the same storage: the leaves are views of it
        self.flat.parameters.f_copy_(&parameters)?;
        self.flat.first_moment.f_copy_(&first)?;
        self.flat.second_moment.f_copy_(&second)?;
        self.refresh()?;
        self.best = best.map(|best| best.f_to_device(self.model.device())).transpose()?;
        self.flat.steps = progress.updates;
        self.skipped = progress.skipped;
        Ok(progress)
    }

    /// Progress in numbers that the trainer itself knows.
    pub fn counters(&self) -> (u64, u64) {
        (self.flat.steps, self.skipped)
    }
}

/// What a checkpoint says of itself; `None` where there is none.
pub fn progress(dir: &Path) -> Result<Option<Progress>, TrainError> {
    let file = dir.join(STATE);
    match std::fs::read(&file) {
        Ok(data) => progress_of(&data).map(Some).map_err(|e| TrainError::file(&file, e)),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(TrainError::file(&file, format!("can't be read: {e}"))),
    }
}

fn progress_of(data: &[u8]) -> Result<Progress, String> {
    let (_, header) = SafeTensors::read_metadata(data).map_err(|e| e.to_string())?;
    let text = header.metadata().as_ref().and_then(|m| m.get(PROGRESS)).ok_or("no progress in its header")?;
    serde_json::from_str(text).map_err(|e| e.to_string())
}

/// Lets `write` fill a directory beside `dir`, then puts it in its place.
fn replace(dir: &Path, write: impl FnOnce(&Path) -> Result<(), TrainError>) -> Result<(), TrainError> {
    let (tmp, old) = (beside(dir, "new.tmp"), beside(dir, "old.tmp"));
    let error = |e: std::io::Error| TrainError::file(dir, format!("can't be written: {e}"));
    let clear = |path: &Path| match std::fs::remove_dir_all(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(error(e)),
        _ => Ok(()),
    };
    clear(&tmp)?;
    std::fs::create_dir_all(&tmp).map_err(error)?;
    write(&tmp)?;
    for entry in std::fs::read_dir(&tmp).map_err(error)? {
        sync(&entry.map_err(error)?.path()).map_err(error)?;
    }
    // Files that are on disk are not yet in their directory.
    sync(&tmp).map_err(error)?;
    clear(&old)?;
    // A directory can't be renamed over a full one. Killed between the two renames, `recover` of
    // the next run puts the old one back.
    if dir.exists() {
        std::fs::rename(dir, &old).map_err(error)?;
    }
    std::fs::rename(&tmp, dir).map_err(error)?;
    if let Some(parent) = dir.parent() {
        sync(parent).map_err(error)?;
    }
    clear(&old)
}

/// Writes a small file, whole or not at all and durable, over what was there.
pub fn put(path: &Path, bytes: &[u8]) -> Result<(), TrainError> {
    let tmp = beside(path, "tmp");
    let written = File::create(&tmp).and_then(|mut file| file.write_all(bytes).and_then(|()| file.sync_all()));
    let parent = path.parent().unwrap_or(path);
    let placed = written.and_then(|()| std::fs::rename(&tmp, path)).and_then(|()| sync(parent));
    placed.map_err(|e| TrainError::file(path, format!("can't be written: {e}")))
}

/// A file's content, or a directory's entries, to disk.
fn sync(path: &Path) -> std::io::Result<()> {
    File::open(path)?.sync_all()
}

/// Puts back a directory that a kill caught between two names.
pub fn recover(dir: &Path) -> std::io::Result<()> {
    let old = beside(dir, "old.tmp");
    if !dir.exists() && old.exists() { std::fs::rename(old, dir) } else { Ok(()) }
}

fn beside(dir: &Path, suffix: &str) -> PathBuf {
    let name = dir.file_name().unwrap_or_default().to_string_lossy();
    dir.with_file_name(format!(".{name}.{suffix}"))
}

fn bytes(tensor: &Tensor) -> Result<Vec<u8>, TrainError> {
    let tensor = tensor.f_to_device(Device::Cpu)?.f_contiguous()?;
    let count = tensor.numel();
    let mut bytes = vec![0; count * 4];
    tensor.f_copy_data_u8(&mut bytes, count)?;
    Ok(bytes)
}
