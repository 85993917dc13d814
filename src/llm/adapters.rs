//! The adapters that are loaded on a device.

use std::collections::VecDeque;
use std::rc::Rc;

use tch::Device;

use super::request::{AdapterId, LlmError};
use crate::model::{Config, Lora};

/// Adapters kept loaded: those of the round before, of this one, and what a trainer starts from.
const KEPT: usize = 4;

/// Adapters by content, the latest used last.
#[derive(Default)]
pub struct Shelf {
    loaded: VecDeque<Loaded>,
    keys: u64,
}

struct Loaded {
    hash: String,
    /// Above 0; never given twice.
    key: u64,
    lora: Rc<Lora>,
    bytes: usize,
}

impl Shelf {
    /// The adapter with its key; read from its directory where it is not here yet. One that is still
    /// in use somewhere lives on when it leaves the shelf.
    ///
    /// # Errors
    /// When the directory holds no adapter of this model.
    pub fn get(&mut self, id: &AdapterId, model: &Config, device: Device) -> Result<(u64, Rc<Lora>), LlmError> {
        let place = self.loaded.iter().position(|l| l.hash == id.hash);
        let loaded = match place.and_then(|i| self.loaded.remove(i)) {
            Some(loaded) => loaded,
            None => {
                let lora = Rc::new(Lora::load(&id.dir, model, device)?);
                self.keys += 1;
                let bytes = lora.bytes();
                Loaded { hash: id.hash.clone(), key: self.keys, lora, bytes }
            }
        };
        let found = (loaded.key, loaded.lora.clone());
        self.loaded.push_back(loaded);
        if self.loaded.len() > KEPT {
            self.loaded.pop_front();
        }
        Ok(found)
    }

    /// How many there are, and their bytes.
    pub fn loaded(&self) -> (usize, usize) {
        (self.loaded.len(), self.loaded.iter().map(|l| l.bytes).sum())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::llm::fixture;

    #[test]
    fn the_latest_used_stay() {
        let model = fixture::model();
        let id = |hash: &str| AdapterId { hash: hash.into(), ..fixture::adapter() };
        let mut shelf = Shelf::default();
        let mut key = |hash: &str| shelf.get(&id(hash), &model.config, Device::Cpu).map(|(key, _)| key).unwrap();
        assert_eq!([key("a"), key("b"), key("c"), key("d"), key("a"), key("e")], [1, 2, 3, 4, 1, 5]);
        assert_eq!([key("a"), key("b")], [1, 6], "b was the one used least lately");
    }
}
