//! Decode steps as CUDA graphs: a step of a small model is hundreds of launches, each of which costs the host
//! more than it costs the GPU.

use std::collections::HashMap;
use std::rc::Rc;

use tch::{Device, Kind, Tensor};

use crate::model::Lora;
use crate::torch::{Graph, GraphPool, TorchError, shim};

/// Steps of one kind that are computed as they are before the next is captured: capturing costs some steps.
const SEEN_BEFORE: usize = 3;

/// Steps that are computed as they are after a capture failed, before the next is tried: four times as many after
/// each failure in a row.
const RETRY_AFTER: usize = 256;
const RETRY_AT_LAST: usize = 65_536;

/// The graphs of one server, by padded rows and adapter key.
pub struct Graphs {
    device: usize,
    /// `None` where steps are not captured.
    pool: Option<GraphPool>,
    captured: HashMap<(usize, u64), Captured>,
    seen: HashMap<(usize, u64), usize>,
    /// Of the cache whose addresses the graphs hold.
    version: u64,
    pause: Pause,
    /// Steps that were graphs.
    replayed: u64,
    /// Why the last capture failed, if it did.
    failed: Option<String>,
}

/// When a capture is tried again.
struct Pause {
    steps_left: usize,
    next: usize,
}

impl Default for Pause {
    fn default() -> Self {
        Self { steps_left: 0, next: RETRY_AFTER }
    }
}

impl Pause {
    /// True where this step is one of the pause.
    fn goes_on(&mut self) -> bool {
        let goes_on = self.steps_left > 0;
        self.steps_left = self.steps_left.saturating_sub(1);
        goes_on
    }

    /// A capture failed; returns the steps of the pause.
    fn begin(&mut self) -> usize {
        self.steps_left = self.next;
        self.next = (4 * self.next).min(RETRY_AT_LAST);
        self.steps_left
    }
}

struct Captured {
    graph: Graph,
    /// `[2, padded rows]`, i64: ids and positions.
    input: Tensor,
    /// `[padded rows, vocabulary]`, float32.
    logits: Tensor,
    /// The graph holds addresses of its matrices.
    _adapter: Option<Rc<Lora>>,
}

/// A decode step whose rows all run under one adapter.
pub struct Step<'a> {
    /// `[2, rows]`, i64, on the GPU: ids and positions.
    pub input: &'a Tensor,
    /// The adapter's key, 0 for the base.
    pub key: u64,
    pub adapter: Option<Rc<Lora>>,
    /// Slots that the cache has, and which cache it is.
    pub slots: usize,
    pub version: u64,
}

fn pool(device: usize) -> Option<GraphPool> {
    shim().and_then(|shim| GraphPool::new(shim, device).ok())
}

/// The rows of the graph that serves a step of `rows`.
pub fn padded(rows: usize) -> usize {
    if rows <= 8 { rows.next_power_of_two() } else { rows.next_multiple_of(if rows <= 64 { 8 } else { 32 }) }
}

impl Graphs {
    /// Captures steps on a GPU where it is `wanted` and can be done.
    pub fn new(device: Device, wanted: bool) -> Self {
        let (device, pool) = match device {
            Device::Cuda(index) if wanted => (index, pool(index)),
            _ => (0, None),
        };
        Self {
            device,
            pool,
            captured: HashMap::new(),
            seen: HashMap::new(),
            version: 0,
            pause: Pause::default(),
            replayed: 0,
            failed: None,
        }
    }

    /// Steps that were graphs, and why the last capture failed, if it did.
    pub fn used(&self) -> (u64, Option<String>) {
        (self.replayed, self.failed.clone())
    }

    /// Slots to have for `rows`, so that a graph serves them.
    pub fn slots(&self, rows: usize) -> usize {
        if self.pool.is_some() { padded(rows) } else { rows }
    }

    /// Forgets all graphs, and what they hold.
    pub fn clear(&mut self) {
        self.captured.clear();
        self.seen.clear();
    }

    /// Logits of the step, `[rows, vocabulary]` in float32; `None` where it is to be computed as it is.
    /// `forward` makes logits of ids and positions, both `[rows]`, and is captured where it was not yet.
    ///
    /// What comes back is overwritten by the next step.
    pub fn logits(
        &mut self,
        step: Step<'_>,
        forward: impl FnMut(&Tensor, &Tensor) -> Result<Tensor, TorchError>,
    ) -> Result<Option<Tensor>, TorchError> {
        let rows = step.input.size2()?.1;
        let key = (padded(rows as usize), step.key);
        if self.pool.is_none() || key.0 > step.slots || self.pause.goes_on() {
            return Ok(None);
        }
        if self.version != step.version {
            self.clear();
            self.version = step.version;
        }
        if !self.captured.contains_key(&key) {
            let seen = self.seen.entry(key).or_default();
            *seen += 1;
            if *seen <= SEEN_BEFORE {
                return Ok(None);
            }
            match self.capture(key.0 as i64, &step, forward) {
                Ok(captured) => {
                    self.pause = Pause::default();
                    self.captured.insert(key, captured)
                }
                Err(error) => {
                    self.capture_failed(&error);
                    return Ok(None);
                }
            };
        }
        let Some(captured) = self.captured.get(&key) else { return Ok(None) };
        captured.input.f_narrow(1, 0, rows)?.f_copy_(step.input)?;
        captured.graph.replay()?;
        self.replayed += 1;
        Ok(Some(captured.logits.f_narrow(0, 0, rows)?))
    }

    /// Goes on without graphs for some steps, then with a pool of its own.
    fn capture_failed(&mut self, error: &TorchError) {
        self.clear();
        self.pool = pool(self.device);
        let (device, steps) = (format!("cuda:{}", self.device), self.pause.begin());
        tracing::warn!(device, steps, "no CUDA graph could be captured, the next steps go without: {error}");
        self.failed = Some(error.to_string());
    }

    /// A graph of `rows` rows. Those that pad the step write to slots that nobody uses; the others have the
    /// step's own numbers from the start, because their slots are in use.
    fn capture(
        &self,
        rows: i64,
        step: &Step<'_>,
        mut forward: impl FnMut(&Tensor, &Tensor) -> Result<Tensor, TorchError>,
    ) -> Result<Captured, TorchError> {
        let pool = self.pool.as_ref().ok_or_else(|| TorchError::Operation("graphs are switched off".into()))?;
        let input = Tensor::f_zeros([2, rows], (Kind::Int64, Device::Cuda(self.device)))?;
        input.f_narrow(1, 0, step.input.size2()?.1)?.f_copy_(step.input)?;
        let (ids, positions) = (input.f_get(0)?, input.f_get(1)?);
        let (graph, logits) = pool.capture(|| forward(&ids, &positions))?;
        Ok(Captured { graph, input, logits, _adapter: step.adapter.clone() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_capture_that_failed_is_tried_again_later() {
        let mut pause = Pause::default();
        assert!(!pause.goes_on());
        for steps in [256, 1024, 4096, 16_384, 65_536, 65_536] {
            assert_eq!(pause.begin(), steps);
            assert!((0..steps).all(|_| pause.goes_on()) && !pause.goes_on());
        }
    }

    #[test]
    fn few_graphs_serve_all_steps() {
        for rows in 1..=256 {
            assert!(padded(rows) >= rows && padded(padded(rows)) == padded(rows));
            assert!(padded(rows) <= 2 * rows);
        }
        let sizes: std::collections::BTreeSet<_> = (1..=256).map(padded).collect();
        assert_eq!(sizes.len(), 17, "{sizes:?}");
    }
}
