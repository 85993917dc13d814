//! Who works next: admission, turns and the way back to the queue. No tensor is computed here.

use std::collections::{HashMap, VecDeque};
use std::rc::Rc;
use std::time::Instant;

use tokio::sync::oneshot;

use super::cache::{self, Past};
use super::request::{
    Candidate, Company, Finish, GenerateRequest, Generation, LlmError, Sampling, ScoreRequest, Scores,
};
use super::sampling::Row;
use super::sequence::{Running, Sequence};
use crate::model::Lora;
use crate::model::attention::Heads;

/// Scoring passes between two decode steps, so that neither client starves.
const SCORES_PER_STEP: usize = 2;

/// Shared passes that may go ahead of an older request that runs alone: verdicts make the pairs whose
/// references a trainer asks for, so they go first, and the trainer still moves.
const SHARED_AHEAD: usize = 4;

pub type Reply<T> = oneshot::Sender<Result<T, LlmError>>;

/// What a server may take of its device.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Sequences decoded at once.
    pub rows: usize,
    /// Prompt tokens computed in one turn.
    pub prefill_tokens: usize,
    /// Bytes of KV cache.
    pub cache_bytes: usize,
    /// Whether a GPU's decode steps are captured as graphs.
    pub graphs: bool,
}

/// What a turn is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Work {
    Score,
    Prefill,
    Decode,
    Nothing,
}

/// A request that has not been answered yet.
pub struct Group {
    pub request: GenerateRequest,
    reply: Reply<Generation>,
    candidates: Vec<Option<Candidate>>,
    pub queued: Instant,
    pub adapter: Option<Rc<Lora>>,
}

/// A scoring request that has not been answered yet.
pub struct Scoring {
    pub request: ScoreRequest,
    pub reply: Reply<Scores>,
    pub queued: Instant,
}

/// Tokens to compute before candidates can be decoded: a prompt, or a prompt and what one candidate
/// had when it was sent back.
pub struct Prompt {
    pub rows: Vec<Sequence>,
    pub tokens: Vec<u32>,
    pub done: usize,
    pub past: Option<Past>,
}

impl Prompt {
    pub fn left(&self) -> usize {
        self.tokens.len() - self.done
    }
}

pub struct Scheduler {
    limits: Limits,
    heads: Heads,
    context: usize,
    /// Below `limits.rows` after the device ran out of memory.
    rows: usize,
    score: VecDeque<Scoring>,
    /// Candidates of one request wait together.
    waiting: VecDeque<Vec<Sequence>>,
    pub prompts: Vec<Prompt>,
    pub running: Running,
    pub groups: HashMap<u64, Group>,
    next_group: u64,
    scored: usize,
    /// Shared passes since a request ran alone.
    shared: usize,
    prefilled: bool,
}

impl Scheduler {
    pub fn new(limits: Limits, heads: Heads, context: usize) -> Self {
        Self {
            limits,
            heads,
            context,
            rows: limits.rows,
            score: VecDeque::new(),
            waiting: VecDeque::new(),
            prompts: Vec::new(),
            running: Running::default(),
            groups: HashMap::new(),
            next_group: 0,
            scored: 0,
            shared: 0,
            prefilled: false,
        }
    }

    /// Lets at least `rows` sequences run at once.
    pub fn allow_rows(&mut self, rows: usize) {
        self.limits.rows = self.limits.rows.max(rows);
        self.rows = self.limits.rows;
    }

    pub fn limits(&self) -> Limits {
        self.limits
    }

    /// Requests that have not begun.
    pub fn queued(&self) -> usize {
        self.waiting.len() + self.score.len()
    }

    /// Queues a request. One that can never run is answered at once.
    pub fn submit_generate(&mut self, request: GenerateRequest, reply: Reply<Generation>) {
        let (tokens, limit) = (request.prompt.len(), self.context);
        let reach = limit.min(tokens + request.sampling.max_new_tokens);
        let refused = if tokens == 0 {
            Some(Err(LlmError::Empty))
        } else if tokens >= limit {
            Some(Err(LlmError::TooLong { tokens, limit }))
        } else if cache::slot_bytes(&self.heads, reach) > self.limits.cache_bytes {
            Some(Err(LlmError::OutOfMemory { tokens: reach }))
        } else if request.streams.is_empty() {
            Some(Ok(Generation { prompt_tokens: tokens, candidates: Vec::new() }))
        } else {
            None
        };
        if let Some(answer) = refused {
            let _ = reply.send(answer);
            return;
        }
        let group = self.next_group;
        self.next_group += 1;
        let count = request.streams.len();
        let sequence = |candidate| Sequence::new(group, candidate, reach).keeping(&request);
        self.waiting.push_back((0..count).map(sequence).collect());
        let candidates = vec![None; count];
        self.groups.insert(group, Group { request, reply, candidates, queued: Instant::now(), adapter: None });
    }

    pub fn submit_score(&mut self, request: ScoreRequest, reply: Reply<Scores>) {
        let limit = self.context;
        let longest = request.prompt.len() + request.answers.iter().map(Vec::len).max().unwrap_or(0);
        if request.prompt.is_empty() {
            let _ = reply.send(Err(LlmError::Empty));
        } else if longest > limit {
            let _ = reply.send(Err(LlmError::TooLong { tokens: longest, limit }));
        } else {
            self.score.push_back(Scoring { request, reply, queued: Instant::now() });
        }
    }

    /// The next turn. Scoring goes first, then prompts, then a decode step; as long as there is work
    /// of each kind, all three have their turns.
    pub fn next(&mut self) -> Work {
        let decode = !self.running.rows().is_empty();
        let prefill = (!self.prefilled || !decode) && (!self.prompts.is_empty() || self.admissible() > 0);
        if !self.score.is_empty() && (self.scored < SCORES_PER_STEP || !(prefill || decode)) {
            self.scored += 1;
            return Work::Score;
        }
        self.prefilled = prefill;
        if prefill {
            return Work::Prefill;
        }
        self.scored = 0;
        if decode { Work::Decode } else { Work::Nothing }
    }

    /// Requests for one scoring pass: the next, and those that may share a pass with it.
    pub fn next_scores(&mut self) -> Vec<Scoring> {
        self.score.retain(|s| !s.reply.is_closed());
        let ahead =
            self.score.iter().position(|s| s.request.company == Company::Any).filter(|_| self.shared < SHARED_AHEAD);
        let Some(first) = self.score.remove(ahead.unwrap_or(0)) else { return Vec::new() };
        self.shared = if first.request.company == Company::Any { self.shared + 1 } else { 0 };
        let mut budget = self.limits.prefill_tokens.saturating_sub(first.request.tokens());
        let mut batch = vec![first];
        let mut place = 0;
        while let Some(next) = self.score.get(place)
            && budget > 0
        {
            let tokens = next.request.tokens();
            if tokens <= budget && batch.iter().all(|s| s.request.shares_with(&next.request)) {
                budget -= tokens;
                batch.extend(self.score.remove(place));
            } else {
                place += 1;
            }
        }
        batch
    }

    /// Sequences that have, or are about to have, a slot.
    fn admitted(&self) -> impl Iterator<Item = &Sequence> {
        self.running.rows().iter().chain(self.prompts.iter().flat_map(|p| &p.rows))
    }

    /// How many candidates of the request at the head of the queue can begin now. Those of one
    /// request begin together, because they share the prompt's pass, unless they never could.
    fn admissible(&self) -> usize {
        let Some((head, first)) = self.waiting.front().and_then(|head| Some((head, head.first()?))) else { return 0 };
        let taken = self.admitted().count();
        let longest = self.admitted().map(|s| s.reach).max().unwrap_or(0).max(first.reach);
        let slots = self.limits.cache_bytes / cache::slot_bytes(&self.heads, longest).max(1);
        let room = self.rows.min(slots).saturating_sub(taken);
        match taken {
            0 => head.len().min(room.max(1)),
            _ if head.len() <= room => head.len(),
            _ => 0,
        }
    }

    /// Takes from the head of the queue what can begin now.
    pub fn admit(&mut self) -> Option<Vec<Sequence>> {
        loop {
            let group = self.waiting.front()?.first().map(|s| s.group);
            if group.and_then(|g| self.groups.get(&g)).is_some_and(|g| !g.reply.is_closed()) {
                break;
            }
            self.waiting.pop_front();
            self.groups.remove(&group.unwrap_or(u64::MAX));
        }
        let count = self.admissible();
        let head = self.waiting.front_mut()?;
        match count {
            0 => None,
            n if n < head.len() => Some(head.drain(..n).collect()),
            _ => self.waiting.pop_front(),
        }
    }

    /// Prompts of what was admitted: one for all that are fresh, one each for those that were sent back.
    pub fn add_prompts(&mut self, admitted: Vec<Sequence>) {
        let Some(group) = admitted.first().and_then(|s| self.groups.get(&s.group)) else { return };
        let prompt = &group.request.prompt;
        let (fresh, sent_back): (Vec<_>, Vec<_>) = admitted.into_iter().partition(|s| s.ids.is_empty());
        let mut new = Vec::new();
        if !fresh.is_empty() {
            new.push(Prompt { rows: fresh, tokens: prompt.clone(), done: 0, past: None });
        }
        for sequence in sent_back {
            // Its last token goes into the cache with its next decode step.
            let known = sequence.ids.len() - 1;
            let tokens = prompt.iter().chain(&sequence.ids[..known]).copied().collect();
            new.push(Prompt { rows: vec![sequence], tokens, done: 0, past: None });
        }
        self.prompts.extend(new);
        self.prompts.sort_by_key(|p| p.rows.first().map_or(0, |s| s.adapter));
    }

    /// Half as many sequences from now on; all that have begun go back to the head of the queue, with
    /// what they have. Returns how many may run now, or the one request that can't run even alone.
    pub fn halve(&mut self) -> Result<usize, u64> {
        let mut back = self.running.take();
        back.extend(self.prompts.drain(..).flat_map(|p| p.rows));
        if let [only] = back.as_slice() {
            return Err(only.group);
        }
        self.rows = (back.len() / 2).max(1);
        back.sort_by_key(|s| (s.group, s.candidate));
        for mut sequence in back.into_iter().rev() {
            sequence.cached = 0;
            match self.waiting.front_mut() {
                Some(head) if head.first().is_some_and(|s| s.group == sequence.group) => head.insert(0, sequence),
                _ => self.waiting.push_front(vec![sequence]),
            }
        }
        Ok(self.rows)
    }

    /// Nothing is left to do: what an earlier load could not hold a later one may.
    pub fn rest(&mut self) {
        self.rows = self.limits.rows;
        self.groups.clear();
    }

    /// Whether a prompt is computed in passes of its own.
    pub fn is_alone(&self, prompt: &Prompt) -> bool {
        let group = prompt.rows.first().and_then(|s| self.groups.get(&s.group));
        group.is_some_and(|group| group.request.alone)
    }

    pub fn lora(&self, sequence: &Sequence) -> Option<&Lora> {
        self.groups.get(&sequence.group)?.adapter.as_deref()
    }

    /// How the next token of each sequence is drawn.
    pub fn rows_to_draw<'a>(&'a self, sequences: impl Iterator<Item = &'a Sequence>) -> Vec<Row<'a>> {
        let row = |s: &'a Sequence| {
            let request = &self.groups.get(&s.group)?.request;
            let stream = request.streams.get(s.candidate)?;
            let uniform = stream.uniform(s.ids.len() as u32);
            Some(Row { sampling: &request.sampling, uniform, seen: s.seen.as_ref() })
        };
        // A sequence without a request is about to leave.
        sequences.map(|s| row(s).unwrap_or(Row { sampling: &Sampling::GREEDY, uniform: 0.0, seen: None })).collect()
    }

    /// Why the running sequence of a slot is at its end. One that nobody waits for any more is. To be
    /// asked once a token: text is looked at as it comes.
    pub fn finish(&mut self, slot: usize) -> Option<Finish> {
        let sequence = self.running.rows_mut().get_mut(slot)?;
        let Some(group) = self.groups.get(&sequence.group).filter(|g| !g.reply.is_closed()) else {
            return Some(Finish::Length);
        };
        let sampling = &group.request.sampling;
        let last = sequence.ids.last()?;
        if !sampling.ignore_eos && group.request.stop.contains(last) {
            Some(Finish::Stop)
        } else if let Some(cut) =
            group.request.stop_strings.as_ref().and_then(|s| s.find(&sequence.ids, &mut sequence.tail))
        {
            sequence.cut(cut);
            Some(Finish::Stop)
        } else if sequence.ids.len() >= sampling.max_new_tokens {
            Some(Finish::Length)
        } else if sequence.cached >= self.context {
            Some(Finish::Context)
        } else {
            None
        }
    }

    /// Files a candidate; answers the request with its last one.
    pub fn finished(&mut self, sequence: Sequence, finish: Finish) {
        let Some(group) = self.groups.get_mut(&sequence.group) else { return };
        if let Some(place) = group.candidates.get_mut(sequence.candidate) {
            let logprobs = sequence.logprobs.filter(|_| group.request.sampling.logprobs).unwrap_or_default();
            let Sequence { ids, text_end, logprob, .. } = sequence;
            *place = Some(Candidate { ids, finish, text_end, logprob, logprobs });
        }
        if group.candidates.iter().all(Option::is_some)
            && let Some(group) = self.groups.remove(&sequence.group)
        {
            let candidates = group.candidates.into_iter().flatten().collect();
            let prompt_tokens = group.request.prompt.len();
            // The client may have gone.
            let _ = group.reply.send(Ok(Generation { prompt_tokens, candidates }));
        }
    }

    /// Answers a request with an error. Its sequences end at their next step.
    pub fn fail(&mut self, group: u64, error: LlmError) {
        if let Some(group) = self.groups.remove(&group) {
            let _ = group.reply.send(Err(error));
        }
        self.waiting.retain(|rows| rows.first().is_none_or(|s| s.group != group));
        self.prompts.retain(|prompt| prompt.rows.first().is_none_or(|s| s.group != group));
    }

    /// Answers everything with an error.
    pub fn fail_all(&mut self, error: &LlmError) {
        self.running.take();
        self.prompts.clear();
        self.waiting.clear();
        for (_, group) in self.groups.drain() {
            let _ = group.reply.send(Err(error.clone()));
        }
        for scoring in self.score.drain(..) {
            let _ = scoring.reply.send(Err(error.clone()));
        }
    }
}
