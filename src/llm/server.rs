//! The model server: one model on one device, and everything that asks it.
//!
//! A turn is one quantum of the device thread: a scoring pass, the prompts of some requests, or one
//! decode step of all that runs. The scheduler says which; here it is computed.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant};

use metrics::{Counter, Gauge, Histogram};
use tch::{Device, Tensor};

use super::adapters::Shelf;
use super::cache::{self, KvCache, Past, Prefill};
use super::graphs::{Graphs, Step};
use super::prefixes::Prefixes;
use super::request::{Company, GenerateRequest, Generation, LlmError, ScoreRequest, Scores};
use super::sampling::{Drawn, draw, draw_planned, plan};
use super::scheduler::{Limits, Prompt, Reply, Scheduler, Work};
use super::scoring;
use crate::model::{Adapters, Lora, Transformer};
use crate::observe::{Metrics, Trace};
use crate::torch::{DeviceError, Tenant, TorchError, Turn, shim};

/// Decode steps whose duration is remembered.
const STEPS_KEPT: usize = 1024;

/// One model on one device.
pub struct ModelServer {
    model: Transformer,
    track: String,
    trace: Arc<Trace>,
    meters: Meters,
    cache: KvCache,
    graphs: Graphs,
    adapters: Shelf,
    prefixes: Prefixes,
    scheduler: Scheduler,
    /// Whether nobody is left who asks.
    released: bool,
    /// When the latest decode steps began, and their seconds.
    steps: VecDeque<(Instant, f64)>,
}

struct Meters {
    prefill: Counter,
    decode: Counter,
    score: Counter,
    rows: Histogram,
    seconds: Histogram,
    wait: Histogram,
    /// In use, and all there are.
    slots: [Gauge; 2],
    queue: Gauge,
    kv_tokens: Gauge,
    adapters: Gauge,
    memory: Memory,
}

/// Bytes of the device by what they hold. What the driver says is only asked for on a GPU.
struct Memory {
    weights: Gauge,
    kv: Gauge,
    adapters: Gauge,
    /// Its number, and when the driver was asked last.
    device: Option<(usize, [Gauge; 3], Option<Instant>)>,
}

/// Asking the driver takes microseconds, a decode step not many more.
const MEMORY_EVERY: Duration = Duration::from_secs(1);

impl Memory {
    fn new(metrics: &Metrics, device: &str, model: &str, kind: Device) -> Self {
        let bytes = |kind| {
            metrics.gauge("flowrun_device_memory_bytes", &[("device", device), ("model", model), ("kind", kind)])
        };
        let device = match kind {
            Device::Cuda(index) => Some((index, ["allocated", "reserved", "total"].map(bytes), None)),
            _ => None,
        };
        Self { weights: bytes("weights"), kv: bytes("kv"), adapters: bytes("adapters"), device }
    }

    fn ask_driver(&mut self) {
        let Some((index, gauges, asked)) = &mut self.device else { return };
        if asked.is_some_and(|at| at.elapsed() < MEMORY_EVERY) {
            return;
        }
        *asked = Some(Instant::now());
        if let Some(memory) = shim().and_then(|shim| shim.memory(*index).ok()) {
            let figures = [memory.allocated, memory.reserved, memory.total];
            gauges.iter().zip(figures).for_each(|(gauge, bytes)| gauge.set(bytes as f64));
        }
    }
}

impl Meters {
    fn new(metrics: &Metrics, device: &str, model: &str, kind: Device) -> Self {
        let tokens = |phase| {
            metrics.counter("flowrun_llm_tokens_total", &[("device", device), ("model", model), ("phase", phase)])
        };
        let label = [("device", device), ("model", model)];
        Self {
            prefill: tokens("prefill"),
            decode: tokens("decode"),
            score: tokens("score"),
            rows: metrics.histogram("flowrun_llm_batch_rows", &label),
            seconds: metrics.histogram("flowrun_llm_step_seconds", &label),
            wait: metrics.histogram("flowrun_llm_queue_seconds", &label),
            slots: ["flowrun_llm_slots_used", "flowrun_llm_slots"].map(|name| metrics.gauge(name, &label)),
            queue: metrics.gauge("flowrun_llm_queue_requests", &label),
            kv_tokens: metrics.gauge("flowrun_llm_kv_tokens", &label),
            adapters: metrics.gauge("flowrun_llm_adapters", &label),
            memory: Memory::new(metrics, device, model, kind),
        }
    }
}

impl ModelServer {
    /// `name` is the model's and `track` the device's in the trace and in metrics.
    pub fn new(
        model: Transformer,
        name: &str,
        track: &str,
        limits: Limits,
        trace: Arc<Trace>,
        metrics: &Metrics,
    ) -> Self {
        let heads = model.heads();
        let meters = Meters::new(metrics, track, name, model.device());
        let size = model.kind().elt_size_in_bytes() as u64;
        meters.memory.weights.set(model.config.parameters().saturating_mul(size) as f64);
        Self {
            scheduler: Scheduler::new(limits, heads, model.config.max_position_embeddings),
            model,
            track: track.to_owned(),
            trace,
            meters,
            cache: KvCache::new(heads),
            graphs: Graphs::new(heads.device, limits.graphs),
            adapters: Shelf::default(),
            prefixes: Prefixes::default(),
            released: false,
            steps: VecDeque::with_capacity(STEPS_KEPT),
        }
    }

    pub fn transformer(&self) -> &Transformer {
        &self.model
    }

    /// Lets at least `rows` sequences be decoded at once, memory permitting.
    pub fn allow_rows(&mut self, rows: usize) {
        self.scheduler.allow_rows(rows);
    }

    /// Whether decode steps are captured as CUDA graphs, where the device is a GPU.
    pub fn use_graphs(&mut self, wanted: bool) {
        self.graphs = Graphs::new(self.model.device(), wanted);
    }

    /// Decode steps that were graphs, and why the last capture of one failed, if it did.
    pub fn graphs_used(&self) -> (u64, Option<String>) {
        self.graphs.used()
    }

    /// When the latest decode steps began, and their seconds, oldest first.
    pub fn steps(&self) -> Vec<(Instant, f64)> {
        self.steps.iter().copied().collect()
    }

    /// Sequences being decoded.
    pub fn running(&self) -> usize {
        self.scheduler.running.rows().len()
    }

    pub fn submit_generate(&mut self, request: GenerateRequest, reply: Reply<Generation>) {
        self.released = false;
        self.scheduler.submit_generate(request, reply);
    }

    pub fn submit_score(&mut self, request: ScoreRequest, reply: Reply<Scores>) {
        self.released = false;
        self.scheduler.submit_score(request, reply);
    }

    /// One scoring pass.
    fn score(&mut self) {
        let batch = self.scheduler.next_scores();
        let Some(first) = batch.first() else { return };
        let stage = first.request.stage.clone();
        batch.iter().for_each(|s| self.meters.wait.record(s.queued.elapsed()));
        let start = Instant::now();
        let results = self.score_pass(&batch.iter().map(|s| &s.request).collect::<Vec<_>>());
        self.trace.record(&self.track, "score", &stage, start);
        for (scoring, result) in batch.into_iter().zip(results) {
            // The client may have gone.
            let _ = scoring.reply.send(result);
        }
    }

    /// A result a request.
    fn score_pass(&mut self, requests: &[&ScoreRequest]) -> Vec<Result<Scores, LlmError>> {
        let adapter = requests.first().and_then(|r| r.adapter.as_ref());
        let adapter = adapter.map(|id| self.adapters.get(id, &self.model.config, self.model.device())).transpose();
        let (key, lora) = match adapter {
            Ok(found) => found.map_or((0, None), |(key, lora)| (key, Some(lora))),
            Err(error) => return requests.iter().map(|_| Err(error.clone())).collect(),
        };
        // The first stands for all: they share a pass.
        let company = requests.first().map_or(Company::Alone, |r| r.company);
        let apart = |requests: &[&ScoreRequest]| match company {
            Company::Alone => requests.iter().map(|r| scoring::alone(&self.model, r, lora.as_deref())).collect(),
            _ => scoring::apart(&self.model, requests, lora.as_deref()),
        };
        let scored = if company == Company::Any {
            scoring::together(&self.model, &mut self.prefixes, requests, key, lora.as_deref())
        } else {
            let tokens = requests.iter().map(|r| r.tokens()).sum();
            apart(requests).map(|scores| (scores, tokens))
        };
        match scored {
            Ok((scores, computed)) => {
                self.meters.score.increment(computed as u64);
                return scores.into_iter().map(Ok).collect();
            }
            // Each by itself may fit.
            Err(error) if error.is_out_of_memory() => self.prefixes = Prefixes::default(),
            Err(error) => return requests.iter().map(|_| Err(error.clone().into())).collect(),
        }
        let one = |request: &&ScoreRequest| {
            self.meters.score.increment(request.tokens() as u64);
            let scores = apart(&[*request]);
            scores.map(|mut scores| scores.remove(0)).map_err(|e| alone(e, request.tokens()))
        };
        requests.iter().map(one).collect()
    }

    /// Admits requests and computes as much of their prompts as a turn may.
    fn prefill(&mut self) {
        self.admit();
        let mut prompts = std::mem::take(&mut self.scheduler.prompts);
        prompts.retain(|p| p.rows.first().is_some_and(|s| self.scheduler.groups.contains_key(&s.group)));
        let Some(first) = prompts.first().and_then(|p| p.rows.first()) else { return };
        let stage = self.scheduler.groups.get(&first.group).map_or(String::new(), |g| g.request.stage.clone());
        let start = Instant::now();
        let result = self.prefill_pass(&mut prompts);
        self.trace.record(&self.track, "prefill", &stage, start);
        self.scheduler.prompts = prompts;
        match result {
            Ok(()) => self.retire(),
            Err(error) if error.is_out_of_memory() => self.halve(),
            Err(error) => self.fail_all(&error.into()),
        }
    }

    fn admit(&mut self) {
        let budget = self.scheduler.limits().prefill_tokens;
        while self.scheduler.prompts.iter().map(Prompt::left).sum::<usize>() < budget
            && let Some(mut admitted) = self.scheduler.admit()
        {
            let Some(group) = admitted.first().map(|s| s.group) else { continue };
            match self.adapter_of(group) {
                Ok(key) => {
                    admitted.iter_mut().for_each(|s| s.adapter = key);
                    self.scheduler.add_prompts(admitted);
                    if let Err(error) = self.begin(group, key) {
                        self.scheduler.fail(group, error.into());
                    }
                }
                Err(error) => self.scheduler.fail(group, error),
            }
        }
    }

    /// Goes on from what a request's prompts begin with, where that was computed before.
    fn begin(&mut self, group: u64, adapter: u64) -> Result<(), TorchError> {
        let Some(request) = self.scheduler.groups.get(&group).map(|g| &g.request).filter(|r| !r.alone) else {
            return Ok(());
        };
        let of_group = |p: &&mut Prompt| p.done == 0 && p.rows.first().is_some_and(|s| s.group == group);
        for prompt in self.scheduler.prompts.iter_mut().filter(of_group) {
            if let Some(past) = self.prefixes.of(&request.stage, adapter, &prompt.tokens)? {
                prompt.done = past.tokens() as usize;
                prompt.past = Some(past);
            }
        }
        Ok(())
    }

    /// Loads the adapter of a request that begins; its key.
    fn adapter_of(&mut self, group: u64) -> Result<u64, LlmError> {
        let Some(group) = self.scheduler.groups.get_mut(&group) else { return Ok(0) };
        self.meters.wait.record(group.queued.elapsed());
        let Some(id) = &group.request.adapter else { return Ok(0) };
        let (key, lora) = self.adapters.get(id, &self.model.config, self.model.device())?;
        group.adapter = Some(lora);
        Ok(key)
    }

    /// One pass over the prompts' next tokens; those that are complete begin to run.
    fn prefill_pass(&mut self, prompts: &mut Vec<Prompt>) -> Result<(), TorchError> {
        let mut budget = self.scheduler.limits().prefill_tokens;
        let mut counts = Vec::with_capacity(prompts.len());
        for prompt in prompts.iter() {
            let begun = budget < self.scheduler.limits().prefill_tokens;
            let count = if begun && self.scheduler.is_alone(prompt) { 0 } else { prompt.left().min(budget) };
            budget = if self.scheduler.is_alone(prompt) { 0 } else { budget - count };
            counts.push(count);
        }
        let (hidden, pasts) = self.compute(prompts, &counts)?;
        self.meters.prefill.increment(counts.iter().sum::<usize>() as u64);
        let (mut last, mut complete, mut pasts) = (0, Vec::new(), pasts.into_iter());
        let mut unfinished = Vec::new();
        for (mut prompt, count) in prompts.drain(..).zip(counts) {
            if count > 0 {
                prompt.past = pasts.next();
            }
            prompt.done += count;
            last += count as i64;
            if prompt.left() == 0 { complete.push((prompt, last - 1)) } else { unfinished.push(prompt) }
        }
        *prompts = unfinished;
        let started = self.start(&hidden, &mut complete);
        prompts.extend(complete.into_iter().map(|(prompt, _)| prompt));
        started
    }

    /// Hidden states of the next `counts` tokens of each prompt, and what their caches will hold.
    fn compute(&self, prompts: &[Prompt], counts: &[usize]) -> Result<(Tensor, Vec<Past>), TorchError> {
        let device = self.model.device();
        let (mut ids, mut positions, mut groups) = (Vec::new(), Vec::new(), Vec::new());
        let parts = || prompts.iter().zip(counts).filter(|(_, count)| **count > 0);
        for (prompt, &count) in parts() {
            let next = prompt.done..prompt.done + count;
            ids.extend(prompt.tokens[next.clone()].iter().map(|t| i64::from(*t)));
            positions.extend(next.map(|p| p as i64));
            if let Some(sequence) = prompt.rows.first() {
                add_rows(&mut groups, self.scheduler.lora(sequence), count as i64);
            }
        }
        let ids = Tensor::f_from_slice(&ids)?.f_to_device(device)?;
        let positions = Tensor::f_from_slice(&positions)?.f_to_device(device)?;
        let parts = parts().map(|(prompt, &count)| (count, prompt.past.as_ref()));
        let mut attention = Prefill::new(self.cache.heads(), parts)?;
        let hidden = self.model.infer(&ids, &positions, &mut attention, &adapters(&groups))?;
        Ok((hidden, attention.into_pasts()))
    }

    /// Gives the candidates of complete prompts their slots and first tokens. `complete` has each
    /// prompt with the place of its last token in `hidden`; those that have begun are taken out.
    fn start(&mut self, hidden: &Tensor, complete: &mut Vec<(Prompt, i64)>) -> Result<(), TorchError> {
        let live = self.running();
        let rows = live + complete.iter().map(|(p, _)| p.rows.len()).sum::<usize>();
        let new = complete.iter().flat_map(|(p, _)| &p.rows);
        let longest = self.scheduler.running.rows().iter().chain(new).map(|s| s.reach).max().unwrap_or(0);
        let (bytes, padded) = (self.scheduler.limits().cache_bytes, self.graphs.slots(rows));
        let fits = padded * cache::slot_bytes(&self.cache.heads(), longest) <= bytes;
        self.cache.reserve(live, if fits { padded } else { rows }, longest, bytes)?;

        let fresh = || complete.iter().flat_map(|(p, last)| p.rows.iter().map(move |s| (s, *last)));
        let fresh: Vec<_> = fresh().filter(|(s, _)| s.ids.is_empty()).collect();
        let mut drawn = Vec::new();
        if !fresh.is_empty() {
            let last: Vec<i64> = fresh.iter().map(|(_, last)| *last).collect();
            let last = Tensor::f_from_slice(&last)?.f_to_device(hidden.device())?;
            let logits = self.model.infer_logits(&hidden.f_index_select(0, &last)?)?;
            drawn = draw(&logits, &self.scheduler.rows_to_draw(fresh.iter().map(|(s, _)| *s)))?;
        }
        let mut drawn = drawn.into_iter();
        while !complete.is_empty() {
            let (prompt, _) = complete.remove(0);
            let Some(past) = prompt.past else { continue };
            let first = prompt.rows.first().map(|s| (s.group, s.adapter));
            if let Some((group, adapter)) = first
                && let Some(group) = self.scheduler.groups.get(&group).filter(|g| !g.request.alone)
            {
                self.prefixes.learn(&group.request.stage, adapter, &prompt.tokens, &past)?;
            }
            for mut sequence in prompt.rows {
                sequence.cached = prompt.tokens.len();
                if sequence.ids.is_empty()
                    && let Some(drawn) = drawn.next()
                {
                    sequence.push(drawn);
                }
                let (slot, moves) = self.scheduler.running.insert(sequence);
                self.cache.apply(&moves)?;
                self.cache.write(slot, &past)?;
            }
        }
        Ok(())
    }

    /// One token for every running sequence.
    fn decode(&mut self) {
        let start = Instant::now();
        let rows = self.running();
        let stage = self.scheduler.running.rows().first().and_then(|s| self.scheduler.groups.get(&s.group));
        let stage = stage.map_or(String::new(), |g| g.request.stage.clone());
        match self.decode_step() {
            Ok(drawn) => {
                for (sequence, drawn) in self.scheduler.running.rows_mut().iter_mut().zip(drawn) {
                    sequence.cached += 1;
                    sequence.push(drawn);
                }
                self.measure(start, rows);
                self.retire();
            }
            Err(error) if error.is_out_of_memory() => self.halve(),
            Err(error) => self.fail_all(&error.into()),
        }
        self.trace.record(&self.track, "decode", &stage, start);
    }

    fn decode_step(&mut self) -> Result<Vec<Drawn>, TorchError> {
        let running = self.scheduler.running.rows();
        let device = self.model.device();
        let draws = self.scheduler.rows_to_draw(running.iter());
        let plan = plan(device, &draws);
        // All that the step needs of the host goes over at once: a GPU waits for each transfer.
        let mut numbers: Vec<i64> = running.iter().map(|s| s.ids.last().map_or(0, |t| i64::from(*t))).collect();
        numbers.extend(running.iter().map(|s| s.cached as i64));
        numbers.extend(plan.iter().flatten());
        let numbers = Tensor::f_from_slice(&numbers)?.f_view([-1, running.len() as i64])?.f_to_device(device)?;
        let logits = step_logits(&self.model, &self.cache, &mut self.graphs, &self.scheduler, &numbers)?;
        match plan {
            Some(_) => draw_planned(&logits, &draws, &numbers.f_narrow(0, 2, 3)?),
            None => draw(&logits, &draws),
        }
    }

    /// The state after a turn, as gauges.
    fn show(&mut self) {
        let heads = self.cache.heads();
        let slot = cache::slot_bytes(&heads, self.cache.length());
        let (loaded, bytes) = self.adapters.loaded();
        let meters = &mut self.meters;
        meters.queue.set(self.scheduler.queued() as f64);
        let running = self.scheduler.running.rows();
        meters.slots[0].set(running.len() as f64);
        meters.slots[1].set(self.cache.slots() as f64);
        meters.kv_tokens.set(running.iter().map(|s| s.cached).sum::<usize>() as f64);
        meters.adapters.set(loaded as f64);
        meters.memory.kv.set((slot * self.cache.slots()) as f64);
        meters.memory.adapters.set(bytes as f64);
        meters.memory.ask_driver();
    }

    fn measure(&mut self, start: Instant, rows: usize) {
        let seconds = start.elapsed().as_secs_f64();
        self.meters.decode.increment(rows as u64);
        self.meters.rows.record(rows as f64);
        self.meters.seconds.record(seconds);
        if self.steps.len() == STEPS_KEPT {
            self.steps.pop_front();
        }
        self.steps.push_back((start, seconds));
    }

    /// Finished sequences leave.
    fn retire(&mut self) {
        let mut slot = 0;
        while let Some(sequence) = self.scheduler.running.rows().get(slot) {
            let group = sequence.group;
            if sequence.logprob.is_nan() {
                let message = "the model's logits are not numbers; f16 overflows where bf16 and f32 do not";
                self.scheduler.fail(group, LlmError::Model(message.into()));
            }
            let Some(finish) = self.scheduler.finish(slot) else {
                slot += 1;
                continue;
            };
            let Some((sequence, moves)) = self.scheduler.running.remove(slot) else { return };
            self.scheduler.finished(sequence, finish);
            if let Err(error) = self.cache.apply(&moves) {
                return self.fail_all(&error.into());
            }
        }
    }

    /// The device has no memory left.
    pub(super) fn halve(&mut self) {
        self.prefixes = Prefixes::default();
        self.give_back();
        match self.scheduler.halve() {
            Ok(rows) => {
                tracing::warn!(device = self.track, rows, "out of memory: decoding fewer sequences at once");
            }
            Err(group) => {
                let tokens = self.scheduler.groups.get(&group).map_or(0, |g| g.request.prompt.len());
                self.scheduler.fail(group, LlmError::OutOfMemory { tokens });
            }
        }
    }

    /// Nobody is left who asks: gives back the slots and what prompts began with, as soon as nothing is left to
    /// do. They are taken again when somebody does.
    pub fn release(&mut self) {
        self.released = true;
    }

    #[cfg(test)]
    pub(super) fn kept_tokens(&self) -> usize {
        self.prefixes.tokens()
    }

    /// Frees all slots, and with them what a GPU holds ready for more.
    fn give_back(&mut self) {
        self.graphs.clear();
        self.cache.clear();
        if self.model.device().is_cuda()
            && let Some(shim) = shim()
            && let Err(error) = shim.empty_cache()
        {
            tracing::warn!(device = self.track, "memory was not given back: {error}");
        }
    }

    fn fail_all(&mut self, error: &LlmError) {
        self.give_back();
        self.scheduler.fail_all(error);
    }

    fn work(&mut self) -> Turn {
        let work = self.scheduler.next();
        match work {
            Work::Score => self.score(),
            Work::Prefill => self.prefill(),
            Work::Decode => self.decode(),
            Work::Nothing => {
                self.scheduler.rest();
                // A GPU's graphs are worth more than its memory as long as somebody may ask again.
                // Once: a trainer on this device must find its memory as it left it.
                let released = std::mem::take(&mut self.released);
                if released {
                    self.prefixes = Prefixes::default();
                }
                if released || self.model.device() == Device::Cpu {
                    self.give_back();
                }
            }
        }
        self.show();
        if work == Work::Nothing { Turn::Idle } else { Turn::Busy }
    }
}

impl Tenant for ModelServer {
    fn turn(&mut self) -> Turn {
        // Whoever waits is told; the thread and its other tenants go on.
        catch_unwind(AssertUnwindSafe(|| self.work())).unwrap_or_else(|_| {
            self.fail_all(&DeviceError::Panicked(self.track.clone()).into());
            Turn::Idle
        })
    }
}

/// Next-token logits of all that runs, `[rows, vocabulary]` in float32; `numbers` begins with their ids and
/// positions.
fn step_logits(
    model: &Transformer,
    cache: &KvCache,
    graphs: &mut Graphs,
    scheduler: &Scheduler,
    numbers: &Tensor,
) -> Result<Tensor, TorchError> {
    let running = scheduler.running.rows();
    let mut groups = Vec::new();
    for sequence in running {
        add_rows(&mut groups, scheduler.lora(sequence), 1);
    }
    let adapters = adapters(&groups);
    let forward = |longest: usize| {
        let adapters = &adapters;
        move |ids: &Tensor, positions: &Tensor| {
            let mut attention = cache.decode(positions, longest)?;
            model.infer_logits(&model.infer(ids, positions, &mut attention, adapters)?)
        }
    };
    let input = numbers.f_narrow(0, 0, 2)?;
    if let (Some(first), [_]) = (running.first(), groups.as_slice())
        && model.heads().served()
    {
        let adapter = scheduler.groups.get(&first.group).and_then(|g| g.adapter.clone());
        let (slots, version) = (cache.slots(), cache.version());
        let step = Step { input: &input, key: first.adapter, adapter, slots, version };
        if let Some(logits) = graphs.logits(step, forward(cache.length().saturating_sub(1)))? {
            return Ok(logits);
        }
    }
    let longest = running.iter().map(|s| s.cached).max().unwrap_or(0);
    forward(longest)(&input.f_get(0)?, &input.f_get(1)?)
}

/// Adds rows of a pass to those before them where the adapter is the same.
fn add_rows<'a>(groups: &mut Vec<(i64, Option<&'a Lora>)>, lora: Option<&'a Lora>, rows: i64) {
    match groups.last_mut() {
        Some((count, last)) if last.map(std::ptr::from_ref) == lora.map(std::ptr::from_ref) => *count += rows,
        _ => groups.push((rows, lora)),
    }
}

fn adapters<'a>(groups: &'a [(i64, Option<&'a Lora>)]) -> Adapters<'a> {
    match groups {
        [(_, only)] => Adapters::from(*only),
        groups => Adapters::Rows(groups),
    }
}

/// An error of a request that ran by itself.
fn alone(error: TorchError, tokens: usize) -> LlmError {
    if error.is_out_of_memory() { LlmError::OutOfMemory { tokens } } else { error.into() }
}
