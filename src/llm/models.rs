//! What one run shares of its models: texts, device threads, weights.

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Weak};
use std::time::Instant;

use chrono::NaiveDate;
use tch::{Device, Kind};
use tokio::sync::{Mutex, oneshot};

use super::endpoint::Endpoint;
use super::request::{GenerateRequest, Generation, LlmError, ScoreRequest, Scores};
use super::scheduler::Limits;
use super::server::ModelServer;
use crate::flow::{Canonical, DeviceSpec, Form, HubAnswer, HubLogin, ModelDtype, ModelSpec, OtherWeights, hub};
use crate::model::{ChatMessage, Conversation, ModelError, ModelOptions, Pretrained, Source, Transformer};
use crate::observe::{Metrics, Trace};
use crate::torch::{DeviceThread, cpu, cuda_devices, gpu, limit_memory, memory};

/// Why a stage uses a model; decides where `device = "auto"` puts it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    Sampler,
    /// Works while the sampler does, so it goes to the second device where there is one.
    Judge,
    Trainer,
}

/// The text side of a model: tokenizer, chat template, end of turn. No weights.
pub struct TextModel {
    pretrained: Arc<Pretrained>,
    /// Hash of files, options and dtype: what decides the model's answers.
    pub hash: String,
    pub kind: Kind,
}

impl TextModel {
    /// A conversation up to where the answer begins; an assistant's turn at its end is gone on with.
    pub fn encode_chat<'a>(&self, conversation: impl Into<Conversation<'a>>) -> Result<Vec<u32>, ModelError> {
        self.pretrained.encode_prompt(conversation)
    }

    /// A text that is gone on with, see [`crate::model::Tokenizer::encode_text`].
    pub fn encode_text(&self, text: &str, add_bos: Option<bool>) -> Result<Vec<u32>, ModelError> {
        self.pretrained.tokenizer.encode_text(text, add_bos)
    }

    /// A conversation up to where the answer begins, and each of `answers` as tokens behind it.
    pub fn encode_answers(
        &self,
        messages: &[ChatMessage],
        answers: &[String],
    ) -> Result<(Vec<u32>, Vec<Vec<u32>>), ModelError> {
        let (chat, tokenizer) = (self.pretrained.chat()?, &self.pretrained.tokenizer);
        let opened = chat.opened(tokenizer, messages)?;
        let encode = |answer: &String| chat.encode_answer(tokenizer, messages, &opened, answer);
        let answers = answers.iter().map(encode).collect::<Result<_, _>>()?;
        Ok((opened.into_ids(), answers))
    }

    /// Tokens as text, special ones left out; not stripped.
    pub fn decode(&self, ids: &[u32]) -> Result<String, ModelError> {
        self.pretrained.tokenizer.decode(ids, true)
    }

    /// Tokens that end an answer to a conversation, see [`Pretrained::stop_ids`].
    pub fn stop_ids(&self) -> &[u32] {
        self.pretrained.stop_ids()
    }

    /// Tokens that end a text without chat template.
    pub fn text_stop_ids(&self) -> &[u32] {
        self.pretrained.tokenizer.eos_ids()
    }

    pub fn pretrained(&self) -> &Arc<Pretrained> {
        &self.pretrained
    }
}

/// The models of a run, opened when they are first asked for.
pub struct Models {
    specs: BTreeMap<String, ModelSpec>,
    devices: BTreeMap<String, DeviceSpec>,
    /// Relative sources start here.
    base: PathBuf,
    /// The date for chat templates that ask for it.
    date: Option<NaiveDate>,
    /// Who asks the hub.
    login: HubLogin,
    trace: Arc<Trace>,
    metrics: Metrics,
    cpu_threads: AtomicUsize,
    texts: Mutex<HashMap<String, Arc<TextModel>>>,
    /// Of models that are not here.
    endpoints: std::sync::Mutex<HashMap<String, Arc<Endpoint>>>,
    /// Held while a model loads: one load serves all who wait.
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    threads: HashMap<String, Arc<DeviceThread>>,
    /// Device threads that have a server, by model.
    served: HashMap<String, Vec<Arc<DeviceThread>>>,
    /// What clients hold, by model and device.
    leases: HashMap<(String, String), Weak<Lease>>,
}

impl Models {
    pub fn new(specs: BTreeMap<String, ModelSpec>, base: PathBuf, trace: Arc<Trace>, metrics: Metrics) -> Self {
        Self {
            specs,
            devices: BTreeMap::new(),
            base,
            date: None,
            login: HubLogin::default(),
            trace,
            metrics,
            cpu_threads: AtomicUsize::new(cores()),
            texts: Mutex::default(),
            endpoints: std::sync::Mutex::default(),
            state: Mutex::default(),
        }
    }

    /// What may be taken of devices, by name; of those not named, as [`DeviceSpec::default`] says.
    pub fn with_devices(self, devices: BTreeMap<String, DeviceSpec>) -> Self {
        Self { devices, ..self }
    }

    /// The date for chat templates that ask for it; today without it.
    pub fn with_date(self, date: Option<NaiveDate>) -> Self {
        Self { date, ..self }
    }

    /// Who asks the hub for models; the user without it.
    pub fn with_login(self, login: HubLogin) -> Self {
        Self { login, ..self }
    }

    fn device(&self, name: &str) -> DeviceSpec {
        self.devices.get(name).copied().unwrap_or_default()
    }

    /// No models: for reading flow files, which needs the names of stage kinds only.
    pub fn none() -> Self {
        Self::new(BTreeMap::new(), PathBuf::new(), Arc::default(), Metrics::default())
    }

    /// Shares the cores among the CPU devices that a plan uses.
    pub fn share_cores(&self, cpu_devices: usize) {
        self.set_cpu_threads(cores() / cpu_devices.max(1));
    }

    /// Intra-op threads of CPU devices that are started from now on.
    pub fn set_cpu_threads(&self, threads: usize) {
        self.cpu_threads.store(threads.max(1), Ordering::Relaxed);
    }

    /// The device that `wanted` stands for: itself unless it is `auto`. Sampling and judging overlap
    /// where there are two GPUs, or two cores and no GPU.
    pub fn place(&self, wanted: &str, role: Role) -> String {
        match wanted {
            "auto" => {
                let (kind, devices) = match cuda_devices() {
                    0 => ("cpu", cores()),
                    gpus => ("cuda", gpus),
                };
                let second = role != Role::Sampler && devices > 1;
                format!("{kind}:{}", usize::from(second))
            }
            "cpu" => "cpu:0".to_owned(),
            named => named.to_owned(),
        }
    }

    /// Tokenizer, template and hash of `model`.
    pub async fn text(&self, model: &str) -> Result<Arc<TextModel>, LlmError> {
        let mut texts = self.texts.lock().await;
        if let Some(text) = texts.get(model) {
            return Ok(text.clone());
        }
        let spec = self.spec(model)?;
        if let Some(endpoint) = &spec.endpoint {
            let place = endpoint.shown();
            return Err(LlmError::Model(format!("model {model} is at {place}, and what it is asked needs it here")));
        }
        let (spec, base, date, login) = (spec.clone(), self.base.clone(), self.date, self.login);
        if spec.source.starts_with("hf://") && !hub::is_offline() {
            HubAnswer::ask().await;
        }
        let plan = HubAnswer::current();
        let open = move || HubAnswer::block(plan, || open(&spec, &base, date, login));
        let text = tokio::task::spawn_blocking(open).await.map_err(|e| LlmError::Device(e.to_string()))??;
        Ok(texts.entry(model.to_owned()).or_insert(Arc::new(text)).clone())
    }

    fn spec(&self, model: &str) -> Result<&ModelSpec, LlmError> {
        self.specs.get(model).ok_or_else(|| LlmError::Model(format!("there is no model {model:?}")))
    }

    /// What is known of `model` before it is opened.
    pub fn form(&self, model: &str) -> Form {
        self.specs.get(model).form()
    }

    /// The server that `model` is at; none for a model that is loaded here.
    pub fn endpoint(&self, model: &str) -> Result<Option<Arc<Endpoint>>, LlmError> {
        let spec = self.spec(model)?;
        let Some(endpoint) = &spec.endpoint else { return Ok(None) };
        let mut endpoints = self.endpoints.lock().unwrap_or_else(|e| e.into_inner());
        if let Some(there) = endpoints.get(model) {
            return Ok(Some(there.clone()));
        }
        let system_prompt = spec.system_prompt.as_deref();
        let opened = Arc::new(Endpoint::new(model, endpoint.clone(), system_prompt, self.metrics.clone())?);
        endpoints.insert(model.to_owned(), opened.clone());
        Ok(Some(opened))
    }

    /// A client of `model` on `device`; loads the weights where they are not there yet. Threads of one
    /// physical device share one copy.
    pub async fn client(&self, model: &str, device: &str) -> Result<Client, LlmError> {
        let text = self.text(model).await?;
        let mut state = self.state.lock().await;
        let thread = self.started(&mut state, device)?;
        let served = state.served.entry(model.to_owned()).or_default();
        if !served.iter().any(|t| t.name() == thread.name()) {
            let twin = served.iter().find(|t| t.device() == thread.device()).cloned();
            let weights = match twin {
                Some(twin) => share(&twin, model).await?,
                None => self.load(&thread, text.clone()).await?,
            };
            self.serve(&thread, model, weights).await?;
            served.push(thread.clone());
        }
        let held = (model.to_owned(), device.to_owned());
        let lease = state.leases.get(&held).and_then(Weak::upgrade).unwrap_or_else(|| {
            let lease = Arc::new(Lease { thread: thread.clone(), model: model.to_owned() });
            state.leases.insert(held, Arc::downgrade(&lease));
            lease
        });
        Ok(Client { thread, model: model.to_owned(), text, _lease: lease })
    }

    /// The thread of `device`, for work of one's own.
    pub async fn thread(&self, device: &str) -> Result<Arc<DeviceThread>, LlmError> {
        self.started(&mut *self.state.lock().await, device)
    }

    fn started(&self, state: &mut State, device: &str) -> Result<Arc<DeviceThread>, LlmError> {
        if let Some(thread) = state.threads.get(device) {
            return Ok(thread.clone());
        }
        let threads = self.cpu_threads.load(Ordering::Relaxed);
        tracing::info!(device, threads, "device thread");
        let thread = DeviceThread::spawn(device, parse(device)?, threads, self.trace.clone())
            .map_err(|e| LlmError::Device(format!("{device}: {e}")))?;
        if let Device::Cuda(index) = thread.device() {
            let spec = self.device(device);
            let switches = gpu::Switches { kernels: spec.kernels.unwrap_or(true), flash: spec.flash.unwrap_or(true) };
            // On the device's thread, before all that it is asked for.
            thread.post(move |_| {
                limit_memory(index, spec.memory);
                gpu::switch(index, switches);
            });
        }
        Ok(state.threads.entry(device.to_owned()).or_insert(Arc::new(thread)).clone())
    }

    /// Returns whether the device that `wanted` stands for is on this machine.
    ///
    /// # Errors
    /// Says what is there.
    pub fn check_device(&self, wanted: &str, role: Role) -> Result<(), LlmError> {
        parse(&self.place(wanted, role)).map(|_| ())
    }

    /// Refuses models that don't fit the devices they are for, given as (model, device): weights and the least
    /// that can be decoded with, of all models on one physical device. What can't be opened here, or is not
    /// there, is told where it is needed.
    ///
    /// # Errors
    /// The model that does not fit, and why.
    pub async fn check_room(&self, uses: &[(String, String)]) -> Result<(), (String, String)> {
        let mut taken: BTreeMap<String, (u64, Vec<&str>)> = BTreeMap::new();
        for (model, device) in uses {
            let (Ok(parsed), Ok(text)) = (parse(device), self.text(model).await) else { continue };
            let Some(there) = total_bytes(parsed) else { continue };
            let physical = if parsed == Device::Cpu { "cpu".to_owned() } else { device.clone() };
            let (bytes, models) = taken.entry(physical).or_default();
            // Device threads of one processor share their weights, and each may have a share of its own.
            if !models.contains(&model.as_str()) {
                let (config, size) = (&text.pretrained().config, text.kind.elt_size_in_bytes());
                let weights = config.parameters().saturating_mul(size as u64);
                *bytes = bytes.saturating_add(weights).saturating_add(config.kv_bytes(LEAST_TOKENS, size) as u64);
                models.push(model);
            }
            let share = self.device(device).memory;
            let room = (there as f64 * share) as u64;
            if *bytes > room {
                let others = if models.len() > 1 { " with the others there" } else { "" };
                return Err((
                    model.clone(),
                    format!(
                        "needs {} on {device}{others}, of which {} may be taken ({share} of {}); use a smaller dtype or \
                         model, another device, or more of it: [devices.{device:?}] memory",
                        gib(*bytes),
                        gib(room),
                        gib(there)
                    ),
                ));
            }
        }
        Ok(())
    }

    async fn load(&self, thread: &DeviceThread, text: Arc<TextModel>) -> Result<Transformer, LlmError> {
        let load = move |device| {
            Transformer::load(text.pretrained.config.clone(), &text.pretrained.weights, text.kind, device)
        };
        Ok(thread.quantum("load", "", move |tenants| load(tenants.device())).await??)
    }

    async fn serve(&self, thread: &DeviceThread, model: &str, weights: Transformer) -> Result<(), LlmError> {
        let (name, track) = (model.to_owned(), thread.name().to_owned());
        let (trace, metrics) = (self.trace.clone(), self.metrics.clone());
        let spec = self.device(thread.name());
        let insert = move |tenants: &mut crate::torch::Tenants| {
            let limits = limits(tenants.device(), spec);
            let server = ModelServer::new(weights, &name, &track, limits, trace, &metrics);
            tenants.insert(name, server);
        };
        Ok(thread.call(insert).await?)
    }
}

/// Another handle to the weights that a server on the same physical device holds.
async fn share(thread: &DeviceThread, model: &str) -> Result<Transformer, LlmError> {
    let name = model.to_owned();
    let shared = thread.call(move |t| t.get::<ModelServer>(&name).map(|s| s.transformer().share())).await?;
    shared.ok_or(LlmError::Cancelled)
}

/// Whether an answer on `device`, its prompt computed alone, is the same to the last bit whatever else is
/// asked meanwhile.
pub fn keeps_requests_apart(device: &str) -> bool {
    device.starts_with("cpu") && cpu::keeps_rows_apart()
}

fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

const GIB: u64 = 1 << 30;

/// Tokens of the least KV cache that a model is refused without.
const LEAST_TOKENS: usize = 64;

fn gib(bytes: u64) -> String {
    format!("{:.1} GiB", bytes as f64 / GIB as f64)
}

/// Of a model that is loaded already.
fn limits(device: Device, spec: DeviceSpec) -> Limits {
    match device {
        // There is no out-of-memory error on a CPU: admission is the limit. More rows than these decode
        // no faster here, and the first answers would reach the judge later.
        Device::Cpu => {
            let share = spec.memory.min(0.25) * host_bytes() as f64;
            Limits { rows: 32, prefill_tokens: 512, cache_bytes: (2 * GIB).min(share as u64) as usize, graphs: false }
        }
        _ => {
            let memory = if let Device::Cuda(index) = device { memory(index) } else { None };
            let bytes = memory.map_or(4 * GIB, |m| cache_bytes(m.total, m.allocated, spec.memory));
            Limits { rows: 256, prefill_tokens: 8192, cache_bytes: bytes as usize, graphs: spec.graphs.unwrap_or(true) }
        }
    }
}

/// Bytes of KV cache on a GPU of `total` bytes of which `allocated` hold weights: what is left of its `share`
/// after a tenth, and at least 1 GiB, for the passes themselves.
fn cache_bytes(total: u64, allocated: u64, share: f64) -> u64 {
    let taken = (total as f64 * share) as u64;
    taken.saturating_sub(allocated).saturating_sub((taken / 10).max(GIB))
}

/// Bytes of memory of a device, where it can be asked.
fn total_bytes(device: Device) -> Option<u64> {
    match device {
        Device::Cpu => Some(host_bytes()),
        Device::Cuda(index) => Some(memory(index)?.total),
        _ => None,
    }
}

/// Bytes of memory of the machine, or of the control group that the process is bound to; 8 GiB where neither
/// says.
fn host_bytes() -> u64 {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let kib = |line: &str| line.strip_prefix("MemTotal:")?.trim().strip_suffix("kB")?.trim().parse::<u64>().ok();
    let machine = read("/proc/meminfo").lines().find_map(kib).map_or(8 * GIB, |kib| kib * 1024);
    let group = read("/sys/fs/cgroup/memory.max").trim().parse().unwrap_or(u64::MAX);
    machine.min(group)
}

fn parse(device: &str) -> Result<Device, LlmError> {
    let wrong = || LlmError::Model(format!("there is no device {device:?}; devices are cpu, cpu:N and cuda:N"));
    match device.split_once(':') {
        None if device == "cpu" => Ok(Device::Cpu),
        Some(("cpu", number)) => number.parse::<u32>().map(|_| Device::Cpu).map_err(|_| wrong()),
        Some(("cuda", number)) => {
            let number: usize = number.parse().map_err(|_| wrong())?;
            match cuda_devices() {
                0 => Err(LlmError::Model(format!(
                    "{device} can't be used: no NVIDIA driver was found, or libtorch_cuda is missing \
                     (`FLOWRUN_CUDA=1 make setup` adds it)"
                ))),
                gpus if number >= gpus => {
                    Err(LlmError::Model(format!("there is no {device}; this machine has {gpus}")))
                }
                _ => Ok(Device::Cuda(number)),
            }
        }
        _ => Err(wrong()),
    }
}

fn open(
    spec: &ModelSpec,
    base: &std::path::Path,
    date: Option<NaiveDate>,
    login: HubLogin,
) -> Result<TextModel, LlmError> {
    let kind = match spec.dtype {
        ModelDtype::F32 => Kind::Float,
        ModelDtype::Bf16 => Kind::BFloat16,
        ModelDtype::F16 => Kind::Half,
    };
    let options = ModelOptions {
        system_prompt: spec.system_prompt.clone(),
        chat_template: spec.chat_template.clone(),
        dummy_weights: spec.weights.map(|OtherWeights::Dummy| 0),
        date,
    };
    let pretrained = Pretrained::open_as(login, &Source::parse(&spec.source, base)?, &options)?;
    let start = Instant::now();
    let content = pretrained.content_hash()?;
    tracing::debug!(source = spec.source, seconds = start.elapsed().as_secs_f64(), "model hashed");
    Ok(TextModel { pretrained: Arc::new(pretrained), hash: format!("{}-{}", content.to_hex(), spec.dtype), kind })
}

/// Asks one model on one device. Cheap to clone; dropping a pending request frees what it holds.
#[derive(Clone)]
pub struct Client {
    thread: Arc<DeviceThread>,
    model: String,
    text: Arc<TextModel>,
    _lease: Arc<Lease>,
}

/// What all clients of a model on a device hold together: with the last of them the server gives back the
/// memory that it decodes with.
struct Lease {
    thread: Arc<DeviceThread>,
    model: String,
}

impl Drop for Lease {
    fn drop(&mut self) {
        let model = std::mem::take(&mut self.model);
        self.thread.post(move |tenants| {
            if let Some(server) = tenants.get::<ModelServer>(&model) {
                server.release();
            }
        });
    }
}

impl Client {
    pub async fn generate(&self, request: GenerateRequest) -> Result<Generation, LlmError> {
        self.check_known([&request.prompt])?;
        let (reply, answer) = oneshot::channel();
        self.with_server(move |server| server.submit_generate(request, reply)).await?;
        answer.await.map_err(|_| LlmError::Device(format!("work on {} panicked", self.thread.name())))?
    }

    pub async fn score(&self, request: ScoreRequest) -> Result<Scores, LlmError> {
        self.check_known([&request.prompt].into_iter().chain(&request.answers))?;
        let (reply, answer) = oneshot::channel();
        self.with_server(move |server| server.submit_score(request, reply)).await?;
        answer.await.map_err(|_| LlmError::Device(format!("work on {} panicked", self.thread.name())))?
    }

    fn check_known<'a>(&self, texts: impl IntoIterator<Item = &'a Vec<u32>>) -> Result<(), LlmError> {
        let check = |ids: &Vec<u32>| self.text.pretrained.check_known(ids);
        texts.into_iter().try_for_each(check).map_err(|e| LlmError::Refused(e.to_string()))
    }

    pub fn text(&self) -> &Arc<TextModel> {
        &self.text
    }

    /// The thread that the model is on, for work of one's own between the server's quanta.
    pub fn device(&self) -> &Arc<DeviceThread> {
        &self.thread
    }

    /// Another handle to the model's weights, to be used on [`Client::device`] only.
    pub async fn transformer(&self) -> Result<Transformer, LlmError> {
        share(&self.thread, &self.model).await
    }

    /// Lets at least `rows` sequences be decoded at once, memory permitting.
    pub async fn allow_rows(&self, rows: usize) -> Result<(), LlmError> {
        self.with_server(move |server| server.allow_rows(rows)).await
    }

    /// Whether decode steps are captured as CUDA graphs, where the device is a GPU.
    pub async fn use_graphs(&self, wanted: bool) -> Result<(), LlmError> {
        self.with_server(move |server| server.use_graphs(wanted)).await
    }

    /// Decode steps that were CUDA graphs, and why the last capture of one failed, if it did.
    pub async fn graphs_used(&self) -> Result<(u64, Option<String>), LlmError> {
        self.with_server(|server| server.graphs_used()).await
    }

    /// When the server's latest decode steps began, and their seconds, oldest first.
    pub async fn steps(&self) -> Result<Vec<(Instant, f64)>, LlmError> {
        self.with_server(|server| server.steps()).await
    }

    async fn with_server<R, F>(&self, f: F) -> Result<R, LlmError>
    where
        R: Send + 'static,
        F: FnOnce(&mut ModelServer) -> R + Send + 'static,
    {
        let name = self.model.clone();
        let found = self.thread.call(move |t| t.get::<ModelServer>(&name).map(f)).await?;
        found.ok_or(LlmError::Cancelled)
    }
}

#[cfg(test)]
mod tests {
    use super::super::request::Company;
    use super::*;

    fn models() -> Models {
        let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/tiny-llama");
        let spec = ModelSpec { dtype: ModelDtype::F32, ..ModelSpec::local(source) };
        Models::new([("m".to_owned(), spec)].into(), PathBuf::new(), Arc::default(), Metrics::default())
    }

    /// Tokens that the server keeps of what prompts began with, after a score of its own.
    async fn ask(client: &Client) -> usize {
        let request = |last| ScoreRequest {
            prompt: (0..40).chain([last]).collect(),
            answers: vec![vec![5, 6]],
            adapter: None,
            company: Company::Any,
            stage: "s".into(),
        };
        futures::future::try_join(client.score(request(41)), client.score(request(42))).await.unwrap();
        kept(client).await
    }

    async fn kept(client: &Client) -> usize {
        client.with_server(|server| server.kept_tokens()).await.unwrap()
    }

    #[tokio::test]
    async fn memory_is_given_back_with_the_last_client_and_taken_again() {
        let models = models();
        let client = models.client("m", "cpu:0").await.unwrap();
        let (twin, other) = (client.clone(), models.client("m", "cpu:0").await.unwrap());
        assert!(ask(&client).await >= 40);
        drop((client, twin));
        assert!(kept(&other).await >= 40, "somebody may ask again");
        drop(other);
        let later = models.client("m", "cpu:0").await.unwrap();
        // The server had a turn after one quantum.
        later.device().quantum("test", "", |_| ()).await.unwrap();
        assert_eq!(kept(&later).await, 0);
        assert!(ask(&later).await >= 40);
    }

    #[tokio::test]
    async fn a_token_past_the_embedding_is_the_requests_own_fault() {
        let models = models();
        let client = models.client("m", "cpu:0").await.unwrap();
        let rows = client.text().pretrained().config.vocab_size as u32;
        let request = |prompt: Vec<u32>, answer: u32| ScoreRequest {
            prompt,
            answers: vec![vec![answer]],
            adapter: None,
            company: Company::Any,
            stage: "s".into(),
        };
        for request in [request(vec![1, rows], 5), request(vec![1], rows)] {
            let error = client.score(request).await.unwrap_err();
            assert!(matches!(&error, LlmError::Refused(why) if why.contains("has embeddings of")), "{error}");
        }
        assert!(client.score(request(vec![1], rows - 1)).await.is_ok());
    }

    #[tokio::test]
    async fn models_on_one_device_share_its_room() {
        let spec = |memory| DeviceSpec { memory, ..DeviceSpec::default() };
        let uses = [("m".to_owned(), "cpu:0".to_owned()), ("m".to_owned(), "cpu:1".to_owned())];
        assert_eq!(models().check_room(&uses).await, Ok(()));
        let small = models().with_devices([("cpu:0".to_owned(), spec(1e-9))].into());
        let (model, why) = small.check_room(&uses).await.unwrap_err();
        assert_eq!(model, "m");
        assert!(why.contains("on cpu:0, of which 0.0 GiB may be taken"), "{why}");
    }

    #[test]
    fn a_gpu_keeps_room_for_passes() {
        assert_eq!(cache_bytes(100 * GIB, 10 * GIB, 0.9), 71 * GIB);
        assert_eq!(cache_bytes(8 * GIB, 2 * GIB, 0.5), GIB);
        assert_eq!(cache_bytes(8 * GIB, 7 * GIB, 0.9), 0);
    }
}
