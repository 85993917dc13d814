//! Continuous batching: requests are admitted and retired at every step.
//!
//! A turn of the server is one quantum of its device thread: a scoring pass, a few prompts, or one
//! decode step of everything that runs. Running sequence `i` owns slot `i` of the KV cache; when one
//! retires, the last takes its place, so a step always works on a dense batch.

use std::collections::{HashMap, VecDeque};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

use metrics::{Counter, Gauge, Histogram};
use tch::{Kind, Tensor};
use tokio::sync::oneshot;

use super::cache::{KvCache, bucket, bytes_per_token};
use super::request::{
    AdapterId, Candidate, Finish, GenerateRequest, Generation, LlmError, Sampling, ScoreRequest, Scores,
};
use super::sampling::draw;
use crate::model::attention::Tree;
use crate::model::{Adapters, Lora, Transformer};
use crate::observe::{Metrics, Trace};
use crate::torch::{Tenant, TorchError, Turn};

/// Prompt tokens computed between two decode steps.
const PREFILL_BUDGET: usize = 512;
/// Scoring passes between two decode steps, so that neither client starves.
const SCORES_PER_STEP: usize = 2;
/// Decode steps whose duration is remembered.
const STEPS_KEPT: usize = 1024;
/// Adapters kept loaded.
const ADAPTERS: usize = 4;

type Reply<T> = oneshot::Sender<Result<T, LlmError>>;

/// What a server may take of its device.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Sequences decoded at once.
    pub rows: usize,
    /// Bytes of KV cache.
    pub cache_bytes: usize,
}

/// One model on one device.
pub struct ModelServer {
    model: Transformer,
    track: String,
    trace: Arc<Trace>,
    meters: Meters,
    limits: Limits,
    cache: KvCache,
    adapters: VecDeque<(String, Rc<Lora>)>,
    generate: VecDeque<(GenerateRequest, Reply<Generation>, Instant)>,
    score: VecDeque<(ScoreRequest, Reply<Scores>, Instant)>,
    running: Vec<Sequence>,
    groups: HashMap<u64, Group>,
    next_group: u64,
    scored: usize,
    /// Seconds of the latest decode steps.
    steps: VecDeque<f64>,
}

/// A request whose candidates are running.
struct Group {
    reply: Reply<Generation>,
    request: GenerateRequest,
    candidates: Vec<Option<Candidate>>,
}

/// One candidate, in the slot of its place among the running.
struct Sequence {
    group: u64,
    candidate: usize,
    ids: Vec<u32>,
    logprob: f64,
    /// Tokens in the cache; the last of `ids` is not among them yet.
    cached: usize,
    adapter: Option<Rc<Lora>>,
}

struct Meters {
    prefill: Counter,
    decode: Counter,
    score: Counter,
    rows: Histogram,
    seconds: Histogram,
    wait: Histogram,
    slots: Gauge,
    queue: Gauge,
}

impl Meters {
    fn new(metrics: &Metrics, device: &str) -> Self {
        let tokens = |phase| metrics.counter("flowrun_llm_tokens_total", &[("device", device), ("phase", phase)]);
        let label = [("device", device)];
        Self {
            prefill: tokens("prefill"),
            decode: tokens("decode"),
            score: tokens("score"),
            rows: metrics.histogram("flowrun_llm_batch_rows", &label),
            seconds: metrics.histogram("flowrun_llm_step_seconds", &label),
            wait: metrics.histogram("flowrun_llm_queue_seconds", &label),
            slots: metrics.gauge("flowrun_llm_slots_used", &label),
            queue: metrics.gauge("flowrun_llm_queue_requests", &label),
        }
    }
}

impl ModelServer {
    /// `track` is the device's name in the trace and in metrics.
    pub fn new(model: Transformer, track: &str, limits: Limits, trace: Arc<Trace>, metrics: &Metrics) -> Self {
        let cache = KvCache::new(&model.config, model.kind(), model.device());
        Self {
            model,
            track: track.to_owned(),
            trace,
            meters: Meters::new(metrics, track),
            limits,
            cache,
            adapters: VecDeque::new(),
            generate: VecDeque::new(),
            score: VecDeque::new(),
            running: Vec::new(),
            groups: HashMap::new(),
            next_group: 0,
            scored: 0,
            steps: VecDeque::with_capacity(STEPS_KEPT),
        }
    }

    pub fn transformer(&self) -> &Transformer {
        &self.model
    }

    /// Seconds of the latest decode steps, oldest first.
    pub fn step_seconds(&self) -> Vec<f64> {
        self.steps.iter().copied().collect()
    }

    pub fn submit_generate(&mut self, request: GenerateRequest, reply: Reply<Generation>) {
        self.generate.push_back((request, reply, Instant::now()));
    }

    pub fn submit_score(&mut self, request: ScoreRequest, reply: Reply<Scores>) {
        self.score.push_back((request, reply, Instant::now()));
    }

    fn adapter(&mut self, id: Option<&AdapterId>) -> Result<Option<Rc<Lora>>, LlmError> {
        let Some(id) = id else { return Ok(None) };
        if let Some((_, lora)) = self.adapters.iter().find(|(hash, _)| *hash == id.hash) {
            return Ok(Some(lora.clone()));
        }
        let lora = Rc::new(Lora::load(&id.dir, &self.model.config, self.model.device())?);
        if self.adapters.len() == ADAPTERS {
            self.adapters.pop_front();
        }
        self.adapters.push_back((id.hash.clone(), lora.clone()));
        Ok(Some(lora))
    }

    /// One scoring pass.
    fn score_next(&mut self) {
        let Some((request, reply, queued)) = self.score.pop_front() else { return };
        if reply.is_closed() {
            return;
        }
        self.meters.wait.record(queued.elapsed());
        let start = Instant::now();
        let result = self.score(&request);
        self.trace.record(&self.track, "score", &request.stage, start);
        // The client may have gone.
        let _ = reply.send(result);
    }

    fn score(&mut self, request: &ScoreRequest) -> Result<Scores, LlmError> {
        let limit = self.model.config.max_position_embeddings;
        let longest = request.prompt.len() + request.answers.iter().map(Vec::len).max().unwrap_or(0);
        if request.prompt.is_empty() {
            return Err(LlmError::Empty);
        }
        if longest > limit {
            return Err(LlmError::TooLong { tokens: longest, limit });
        }
        let adapter = self.adapter(request.adapter.as_ref())?;
        let answers: Vec<&[u32]> = request.answers.iter().map(Vec::as_slice).collect();
        let tokens = request.prompt.len() + answers.iter().map(|a| a.len()).sum::<usize>();
        self.meters.score.increment(tokens as u64);
        let logprobs = answer_logprobs(&self.model, &request.prompt, &answers, adapter.as_deref());
        let mut logprobs = logprobs.map_err(|e| out_of_memory(e, tokens))?.into_iter();
        let of = |answer: &Vec<u32>| logprobs.by_ref().take(answer.len()).collect();
        Ok(Scores { logprobs: request.answers.iter().map(of).collect() })
    }

    /// Prompts from the queue into slots, while budget, rows and memory last.
    fn admit(&mut self) {
        let mut budget = PREFILL_BUDGET;
        while let Some((request, reply, _)) = self.generate.front() {
            let (tokens, rows) = (request.prompt.len(), request.streams.len());
            if reply.is_closed() || rows == 0 {
                self.generate.pop_front();
                continue;
            }
            if let Err(error) = self.fits(request) {
                if let Some((_, reply, _)) = self.generate.pop_front() {
                    let _ = reply.send(Err(error));
                }
                continue;
            }
            if !self.running.is_empty() && (tokens > budget || !self.has_room(request)) {
                return;
            }
            budget = budget.saturating_sub(tokens);
            let Some((request, reply, queued)) = self.generate.pop_front() else { return };
            self.meters.wait.record(queued.elapsed());
            self.start(request, reply);
        }
    }

    /// Whether the request can run at all.
    fn fits(&self, request: &GenerateRequest) -> Result<(), LlmError> {
        let limit = self.model.config.max_position_embeddings;
        let tokens = request.prompt.len();
        if tokens == 0 {
            return Err(LlmError::Empty);
        }
        if tokens >= limit {
            return Err(LlmError::TooLong { tokens, limit });
        }
        if self.cache_bytes(request.streams.len(), self.reach(request)) > self.limits.cache_bytes {
            return Err(LlmError::OutOfMemory { tokens: self.reach(request) });
        }
        Ok(())
    }

    /// Tokens of a candidate at its longest.
    fn reach(&self, request: &GenerateRequest) -> usize {
        (request.prompt.len() + request.sampling.max_new_tokens).min(self.model.config.max_position_embeddings)
    }

    fn cache_bytes(&self, rows: usize, tokens: usize) -> usize {
        rows * bucket(tokens) as usize * bytes_per_token(&self.model.config, self.model.kind())
    }

    /// Whether it fits beside what runs. Slots are as long as the longest admitted sequence.
    fn has_room(&self, request: &GenerateRequest) -> bool {
        let rows = self.running.len() + request.streams.len();
        let running = self.groups.values().map(|g| self.reach(&g.request));
        let longest = running.chain([self.reach(request)]).max().unwrap_or(0);
        rows <= self.limits.rows && self.cache_bytes(rows, longest) <= self.limits.cache_bytes
    }

    /// Computes a prompt once and starts its candidates.
    fn start(&mut self, request: GenerateRequest, reply: Reply<Generation>) {
        let start = Instant::now();
        let first = self.prefill(&request);
        self.trace.record(&self.track, "prefill", &request.stage, start);
        match first {
            Ok((logits, adapter)) => self.first_tokens(request, reply, &logits, adapter),
            Err(LlmError::OutOfMemory { .. }) if !self.running.is_empty() => {
                self.generate.push_front((request, reply, Instant::now()));
                self.shrink();
            }
            Err(error) => {
                let _ = reply.send(Err(error));
            }
        }
    }

    fn prefill(&mut self, request: &GenerateRequest) -> Result<(Tensor, Option<Rc<Lora>>), LlmError> {
        let adapter = self.adapter(request.adapter.as_ref())?;
        let (tokens, rows) = (request.prompt.len(), request.streams.len());
        let reach = self.reach(request);
        let running = self.running.len();
        let mut pass = || -> Result<Tensor, TorchError> {
            let device = self.model.device();
            self.cache.reserve(running + rows, reach)?;
            let ids: Vec<i64> = request.prompt.iter().map(|t| i64::from(*t)).collect();
            let ids = Tensor::f_from_slice(&ids)?.f_to_device(device)?;
            let positions = Tensor::f_arange(tokens as i64, (Kind::Int64, device))?;
            let mut attention = self.cache.prefill(running, rows, tokens)?;
            let hidden = self.model.hidden(&ids, &positions, &mut attention, &adapter.as_deref().into())?;
            // Every candidate draws its first token from the same logits.
            self.model.logits(&hidden.f_narrow(0, tokens as i64 - 1, 1)?)
        };
        let logits = pass().map_err(|e| out_of_memory(e, reach))?;
        self.meters.prefill.increment(tokens as u64);
        Ok((logits, adapter))
    }

    fn first_tokens(
        &mut self,
        request: GenerateRequest,
        reply: Reply<Generation>,
        logits: &Tensor,
        adapter: Option<Rc<Lora>>,
    ) {
        let rows: Vec<_> = request.streams.iter().map(|s| (&request.sampling, s.uniform(0))).collect();
        let drawn = logits.f_expand([rows.len() as i64, -1], false).map_err(TorchError::from);
        let drawn = match drawn.and_then(|logits| draw(&logits, &rows)) {
            Ok(drawn) => drawn,
            Err(error) => {
                let _ = reply.send(Err(error.into()));
                return;
            }
        };
        let group = self.next_group;
        self.next_group += 1;
        for (candidate, drawn) in drawn.iter().enumerate() {
            self.running.push(Sequence {
                group,
                candidate,
                ids: vec![drawn.token],
                logprob: f64::from(drawn.logprob),
                cached: request.prompt.len(),
                adapter: adapter.clone(),
            });
        }
        let candidates = vec![None; request.streams.len()];
        self.groups.insert(group, Group { reply, request, candidates });
        self.retire();
    }

    /// One token for every running sequence.
    fn decode(&mut self) {
        let start = Instant::now();
        let rows = self.running.len();
        match self.decode_step() {
            Ok(()) => {}
            Err(error) if error.is_out_of_memory() && rows > 1 => self.shrink(),
            Err(error) => self.fail(&error),
        }
        self.meters.decode.increment(rows as u64);
        self.meters.rows.record(rows as f64);
        self.meters.seconds.record(start.elapsed());
        if self.steps.len() == STEPS_KEPT {
            self.steps.pop_front();
        }
        self.steps.push_back(start.elapsed().as_secs_f64());
        let stage = self.groups.values().next().map_or(String::new(), |g| g.request.stage.clone());
        self.trace.record(&self.track, "decode", &stage, start);
        self.retire();
    }

    fn decode_step(&mut self) -> Result<(), TorchError> {
        let device = self.model.device();
        let last: Vec<i64> = self.running.iter().map(|s| s.ids.last().map_or(0, |t| i64::from(*t))).collect();
        let positions: Vec<i64> = self.running.iter().map(|s| s.cached as i64).collect();
        let groups = adapter_groups(&self.running);
        let adapters = match groups.as_slice() {
            [(_, only)] => Adapters::from(*only),
            groups => Adapters::Rows(groups),
        };
        let ids = Tensor::f_from_slice(&last)?.f_to_device(device)?;
        let mut attention = self.cache.decode(&positions)?;
        let positions = attention.positions.shallow_clone();
        let hidden = self.model.hidden(&ids, &positions, &mut attention, &adapters)?;
        let logits = self.model.logits(&hidden)?;
        let rows: Vec<(&Sampling, f32)> = self.running.iter().map(|s| draw_of(&self.groups, s)).collect();
        let drawn = draw(&logits, &rows)?;
        for (sequence, drawn) in self.running.iter_mut().zip(drawn) {
            sequence.cached += 1;
            sequence.ids.push(drawn.token);
            sequence.logprob += f64::from(drawn.logprob);
        }
        Ok(())
    }

    /// Finished sequences leave; the last one takes a free slot.
    fn retire(&mut self) {
        let limit = self.model.config.max_position_embeddings;
        let mut slot = 0;
        while slot < self.running.len() {
            let sequence = &self.running[slot];
            let finish = match self.groups.get(&sequence.group) {
                Some(group) if !group.reply.is_closed() => finish(sequence, &group.request, limit),
                // Nobody waits for it any more.
                _ => Some(Finish::Length),
            };
            let Some(finish) = finish else {
                slot += 1;
                continue;
            };
            let sequence = self.running.swap_remove(slot);
            if let Some(moved) = self.running.get(slot) {
                let (from, tokens) = (self.running.len(), moved.cached);
                if let Err(error) = self.cache.move_slot(from, slot, tokens) {
                    self.fail(&error);
                }
            }
            self.finished(sequence, finish);
        }
        self.meters.slots.set(self.running.len() as f64);
    }

    fn finished(&mut self, sequence: Sequence, finish: Finish) {
        let Some(group) = self.groups.get_mut(&sequence.group) else { return };
        let candidate = Candidate { ids: sequence.ids, finish, logprob: sequence.logprob };
        if let Some(place) = group.candidates.get_mut(sequence.candidate) {
            *place = Some(candidate);
        }
        if group.candidates.iter().any(Option::is_none) {
            return;
        }
        if let Some(group) = self.groups.remove(&sequence.group) {
            let candidates = group.candidates.into_iter().flatten().collect();
            let _ = group.reply.send(Ok(Generation { prompt_tokens: group.request.prompt.len(), candidates }));
        }
    }

    /// Half of the sequences go back to the queue. Their random numbers are named by place, so what
    /// they had is drawn again.
    fn shrink(&mut self) {
        self.limits.rows = (self.running.len() / 2).max(1);
        tracing::warn!(device = self.track, rows = self.limits.rows, "out of memory: decoding fewer sequences at once");
        self.running.clear();
        self.cache.clear();
        let mut groups: Vec<_> = self.groups.drain().collect();
        groups.sort_by_key(|(id, _)| std::cmp::Reverse(*id));
        for (_, group) in groups {
            self.generate.push_front((group.request, group.reply, Instant::now()));
        }
    }

    /// Everything that runs is told of an error that is nobody's own.
    fn fail(&mut self, error: &TorchError) {
        self.running.clear();
        for (_, group) in self.groups.drain() {
            let _ = group.reply.send(Err(error.clone().into()));
        }
    }
}

impl Tenant for ModelServer {
    fn turn(&mut self) -> Turn {
        self.meters.queue.set((self.generate.len() + self.score.len()) as f64);
        // Scoring goes before new rows, but not for ever.
        if !self.score.is_empty()
            && (self.scored < SCORES_PER_STEP || self.running.is_empty() && self.generate.is_empty())
        {
            self.scored += 1;
            self.score_next();
        } else {
            self.scored = 0;
            self.admit();
            if !self.running.is_empty() {
                self.decode();
            }
        }
        if !self.running.is_empty() || !self.generate.is_empty() || !self.score.is_empty() {
            return Turn::Busy;
        }
        self.cache.clear();
        Turn::Idle
    }
}

/// Neighbours under the same adapter, as one group each.
fn adapter_groups(running: &[Sequence]) -> Vec<(i64, Option<&Lora>)> {
    let mut groups: Vec<(i64, Option<&Lora>)> = Vec::new();
    for sequence in running {
        let adapter = sequence.adapter.as_deref();
        match groups.last_mut() {
            Some((rows, last)) if last.map(std::ptr::from_ref) == adapter.map(std::ptr::from_ref) => *rows += 1,
            _ => groups.push((1, adapter)),
        }
    }
    groups
}

fn draw_of<'a>(groups: &'a HashMap<u64, Group>, sequence: &Sequence) -> (&'a Sampling, f32) {
    let request = &groups[&sequence.group].request;
    (&request.sampling, request.streams[sequence.candidate].uniform(sequence.ids.len() as u32))
}

fn finish(sequence: &Sequence, request: &GenerateRequest, context: usize) -> Option<Finish> {
    let sampling = &request.sampling;
    let stopped = sequence.ids.last().is_some_and(|last| request.stop.contains(last));
    if stopped && !sampling.ignore_eos {
        Some(Finish::Stop)
    } else if sequence.ids.len() >= sampling.max_new_tokens {
        Some(Finish::Length)
    } else if sequence.cached >= context {
        Some(Finish::Context)
    } else {
        None
    }
}

fn out_of_memory(error: TorchError, tokens: usize) -> LlmError {
    if error.is_out_of_memory() { LlmError::OutOfMemory { tokens } } else { error.into() }
}

/// Log-probs of every answer token, all answers in a row, float32.
fn answer_logprobs(
    model: &Transformer,
    prompt: &[u32],
    answers: &[&[u32]],
    adapter: Option<&Lora>,
) -> Result<Vec<f32>, TorchError> {
    let group = (model.config.heads / model.config.kv_heads) as i64;
    let mut tree = Tree::new(prompt, answers, group, model.kind(), model.device())?;
    let (ids, positions) = (tree.ids.shallow_clone(), tree.positions.shallow_clone());
    let hidden = model.hidden(&ids, &positions, &mut tree, &adapter.into())?;
    let count = tree.targets.size1()?;
    let mut out = vec![0.0; count as usize];
    let mut start = 0;
    while start < count {
        let length = Transformer::HEAD_ROWS.min(count - start);
        let rows = hidden.f_index_select(0, &tree.predictors.f_narrow(0, start, length)?)?;
        let picked = model.log_probs(&rows, &tree.targets.f_narrow(0, start, length)?)?;
        picked.f_copy_data(&mut out[start as usize..(start + length) as usize], length as usize)?;
        start += length;
    }
    Ok(out)
}
