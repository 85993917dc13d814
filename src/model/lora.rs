//! LoRA adapters (Hu et al. 2021) in PEFT's directory format.
//!
//! Adapter weights are float32 whatever the base's dtype. As in PEFT, a layer computes
//! `base(x) + scale * B(A(x))` with the second term in float32, and the sum is rounded to the
//! base's dtype.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

use super::config::Config;
use super::{ModelError, peft};
use crate::torch::{TorchError, ops, products};

/// The places of a block that an adapter changes; projections of one input are one place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Site {
    Qkv = 0,
    O = 1,
    GateUp = 2,
    Down = 3,
}

/// A projection of a block, under PEFT's name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Target {
    pub name: &'static str,
    site: Site,
    path: &'static str,
}

/// Every linear layer of a block ("all-linear" but the head, as PEFT defines it).
const SPLIT: [Target; 7] = [
    Target { name: "q_proj", site: Site::Qkv, path: "self_attn.q_proj" },
    Target { name: "k_proj", site: Site::Qkv, path: "self_attn.k_proj" },
    Target { name: "v_proj", site: Site::Qkv, path: "self_attn.v_proj" },
    Target { name: "o_proj", site: Site::O, path: "self_attn.o_proj" },
    Target { name: "gate_proj", site: Site::GateUp, path: "mlp.gate_proj" },
    Target { name: "up_proj", site: Site::GateUp, path: "mlp.up_proj" },
    Target { name: "down_proj", site: Site::Down, path: "mlp.down_proj" },
];

/// The same where a model stores them together.
const FUSED: [Target; 4] = [
    Target { name: "qkv_proj", site: Site::Qkv, path: "self_attn.qkv_proj" },
    Target { name: "o_proj", site: Site::O, path: "self_attn.o_proj" },
    Target { name: "gate_up_proj", site: Site::GateUp, path: "mlp.gate_up_proj" },
    Target { name: "down_proj", site: Site::Down, path: "mlp.down_proj" },
];

/// The projections of a model's blocks.
pub fn targets(model: &Config) -> &'static [Target] {
    if model.fused { &FUSED } else { &SPLIT }
}

/// Names of all modules that can be adapted.
pub fn modules(model: &Config) -> impl Iterator<Item = String> {
    (0..model.layers).flat_map(|layer| targets(model).iter().map(move |target| target.module(layer)))
}

impl Target {
    /// `(input, output)` width of the projection.
    fn widths(&self, c: &Config) -> (usize, usize) {
        let (q, kv) = (c.heads * c.head_dim, c.kv_heads * c.head_dim);
        match self.name {
            "q_proj" => (c.hidden_size, q),
            "k_proj" | "v_proj" => (c.hidden_size, kv),
            "o_proj" => (q, c.hidden_size),
            "qkv_proj" => (c.hidden_size, q + 2 * kv),
            "gate_up_proj" => (c.hidden_size, 2 * c.intermediate_size),
            "down_proj" => (c.intermediate_size, c.hidden_size),
            _ => (c.hidden_size, c.intermediate_size),
        }
    }

    fn tensor_name(&self, layer: usize, matrix: &str) -> String {
        format!("base_model.model.{}.lora_{matrix}.weight", self.module(layer))
    }

    fn module(&self, layer: usize) -> String {
        format!("model.layers.{layer}.{}", self.path)
    }
}

/// `lora = { ... }` of a trainer, and the part of PEFT's adapter_config.json that is supported.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LoraConfig {
    /// Rank.
    #[serde(default = "default_rank")]
    pub r: usize,
    #[serde(default = "default_alpha")]
    pub alpha: f64,
    /// Share of an adapter's inputs dropped while training.
    #[serde(default)]
    pub dropout: f64,
    /// Projections by PEFT's name, or the ends of module names; all linear layers of the blocks unless
    /// given.
    #[serde(default = "all_targets")]
    pub targets: Vec<String>,
    /// Rank-stabilised scale `alpha / sqrt(r)` (Kalajdzievski 2023) in place of `alpha / r`.
    #[serde(default)]
    pub rslora: bool,
}

fn default_rank() -> usize {
    8
}

fn default_alpha() -> f64 {
    8.0
}

fn all_targets() -> Vec<String> {
    vec![LoraConfig::ALL.to_owned()]
}

impl Default for LoraConfig {
    fn default() -> Self {
        Self { r: default_rank(), alpha: default_alpha(), dropout: 0.0, targets: all_targets(), rslora: false }
    }
}

impl LoraConfig {
    /// Stands for every linear layer of the blocks.
    pub const ALL: &str = "all-linear";

    pub fn scale(&self) -> f64 {
        if self.rslora { self.alpha / (self.r as f64).sqrt() } else { self.alpha / self.r as f64 }
    }

    /// Weights of such an adapter to `model`.
    pub fn parameters(&self, model: &Config) -> u64 {
        let adapted = (0..model.layers).flat_map(|layer| {
            targets(model).iter().filter(move |target| self.adapts(&target.module(layer))).map(|t| t.widths(model))
        });
        adapted.map(|(input, output)| (self.r * (input + output)) as u64).sum()
    }

    /// Whether a module is adapted, as PEFT matches names.
    pub(super) fn adapts(&self, module: &str) -> bool {
        let hit = |target: &String| {
            module.strip_suffix(target.as_str()).is_some_and(|head| head.is_empty() || head.ends_with('.'))
        };
        self.targets.iter().any(|target| target == Self::ALL || hit(target))
    }

    /// The first target that is a projection of no family.
    pub fn unknown_target(&self) -> Option<&str> {
        let known = |name: &str| name == Self::ALL || SPLIT.iter().chain(&FUSED).any(|target| target.name == name);
        self.targets.iter().map(String::as_str).find(|target| !known(target.rsplit('.').next().unwrap_or(target)))
    }

    /// Every target must be there.
    ///
    /// # Errors
    /// Names the first that is not, and what is.
    pub fn check(&self, model: &Config) -> Result<(), String> {
        let alone = |target: &String| Self { targets: vec![target.clone()], ..self.clone() };
        match self.targets.iter().find(|target| !modules(model).any(|module| alone(target).adapts(&module))) {
            None if self.targets.is_empty() => Err("names no target; leave it out for all linear layers".into()),
            None => Ok(()),
            Some(other) => {
                let names: Vec<_> = targets(model).iter().map(|t| t.name).collect();
                Err(format!("names the target {other}, and this model has {}", names.join(", ")))
            }
        }
    }
}

/// One adapted projection.
struct Pair {
    /// `[r, input]`
    a: Tensor,
    /// `[output, r]`
    b: Tensor,
}

/// An adapter on a device.
pub struct Lora {
    pub config: LoraConfig,
    targets: &'static [Target],
    /// By layer and position in `targets`.
    pairs: Vec<Vec<Option<Pair>>>,
    /// Output width by position in `targets`.
    widths: Vec<i64>,
}

impl Lora {
    /// What its matrices take.
    pub fn bytes(&self) -> usize {
        let of = |t: &Tensor| t.numel() * t.kind().elt_size_in_bytes();
        self.pairs.iter().flatten().flatten().map(|pair| of(&pair.a) + of(&pair.b)).sum()
    }

    /// A fresh adapter as PEFT initialises it: A uniform within `1 / sqrt(input)` (Kaiming with
    /// a = sqrt(5)), B zero, so that it changes nothing yet. Deterministic in `seed`.
    pub fn fresh(config: LoraConfig, model: &Config, seed: u64, device: Device) -> Result<Self, ModelError> {
        config.check(model).map_err(|e| ModelError::Setting(format!("lora {e}")))?;
        tch::manual_seed(seed as i64);
        let r = config.r;
        Self::build(config, model, |_, target| {
            let (input, output) = target.widths(model);
            let bound = 1.0 / (input as f64).sqrt();
            let a = Tensor::f_empty([r as i64, input as i64], (Kind::Float, Device::Cpu))?.f_uniform_(-bound, bound)?;
            let b = Tensor::f_zeros([output as i64, r as i64], (Kind::Float, device))?;
            Ok(Pair { a: a.f_to_device(device)?, b })
        })
    }

    /// Reads a PEFT directory. An adapter of another model is told by the first tensor that is missing, of another
    /// shape, or of no part of this model.
    pub fn load(dir: &Path, model: &Config, device: Device) -> Result<Self, ModelError> {
        let settings = dir.join("adapter_config.json");
        let adapter = peft::read(&settings, model)?;
        let file = dir.join(FILE);
        let bytes = read_file(&file)?;
        let file = AdapterFile::open(&file, &bytes)?;
        let loaded = Self::build(adapter.config.clone(), model, |layer, target| {
            let (input, output) = target.widths(model);
            let (r, over) = adapter.of(&target.module(layer));
            let a = file.read(&target.tensor_name(layer, "A"), [r, input])?;
            let b = file.read(&target.tensor_name(layer, "B"), [output, r])?;
            // Of a smaller rank than the others: the rest is 0, and stays so in training.
            let more = (adapter.config.r - r) as i64;
            let a = a.f_constant_pad_nd([0, 0, 0, more])?;
            let b = b.f_mul_scalar(over)?.f_constant_pad_nd([0, more])?;
            Ok(Pair { a: a.f_to_device(device)?, b: b.f_to_device(device)? })
        })?;
        file.check_all_read(&loaded)?;
        adapter.config.check(model).map_err(|e| ModelError::file(&settings, e))?;
        Ok(loaded)
    }

    fn build(
        config: LoraConfig,
        model: &Config,
        mut pair: impl FnMut(usize, &Target) -> Result<Pair, ModelError>,
    ) -> Result<Self, ModelError> {
        let targets = targets(model);
        let mut pairs = Vec::with_capacity(model.layers);
        for layer in 0..model.layers {
            let adapted = targets
                .iter()
                .map(|target| config.adapts(&target.module(layer)).then(|| pair(layer, target)).transpose());
            pairs.push(adapted.collect::<Result<_, _>>()?);
        }
        let widths = targets.iter().map(|t| t.widths(model).1 as i64).collect();
        Ok(Self { config, targets, pairs, widths })
    }

    /// Every A and B, in a fixed order (layer, projection, A before B), with PEFT's name.
    pub fn named(&self) -> impl Iterator<Item = (String, &Tensor)> {
        self.pairs.iter().enumerate().flat_map(|(layer, row)| {
            row.iter().zip(self.targets).filter_map(move |(pair, target)| Some((pair.as_ref()?, target))).flat_map(
                move |(pair, target)| {
                    [(target.tensor_name(layer, "A"), &pair.a), (target.tensor_name(layer, "B"), &pair.b)]
                },
            )
        })
    }

    /// What the adapter adds to the weight of a module (`model.layers.0.self_attn.q_proj`), `[output, input]`
    /// in float32; nothing where it does not change the module.
    pub fn change(&self, module: &str) -> Result<Option<Tensor>, TorchError> {
        for (layer, row) in self.pairs.iter().enumerate() {
            let mut pairs = row.iter().zip(self.targets).filter(|(_, target)| target.module(layer) == module);
            if let Some((Some(pair), _)) = pairs.next() {
                return Ok(Some(pair.b.f_matmul(&pair.a)?.f_mul_scalar(self.config.scale())?));
            }
        }
        Ok(None)
    }

    /// An adapter of the same shape with other matrices, in the order of [`Lora::named`].
    pub fn with(&self, tensors: impl IntoIterator<Item = Tensor>) -> Self {
        let row = |row: &Vec<Option<Pair>>| {
            let share = |p: &Pair| Pair { a: p.a.shallow_clone(), b: p.b.shallow_clone() };
            row.iter().map(|pair| pair.as_ref().map(share)).collect()
        };
        let pairs = self.pairs.iter().map(row).collect();
        let mut other = Self { config: self.config.clone(), targets: self.targets, pairs, widths: self.widths.clone() };
        other.replace(tensors);
        other
    }

    /// One adapter that changes what `parts` change together, each as much as its weight says: their ranks lie side by
    /// side (their matrices can't be added, only their products), their scales are in B.
    ///
    /// # Errors
    /// When there are no parts, or they belong to different models.
    pub fn concat(parts: &[(&Self, f64)]) -> Result<Self, TorchError> {
        let apart = || TorchError::Operation("adapters of different models can't be one".into());
        let (first, _) = parts.first().ok_or_else(apart)?;
        let same = |lora: &Self| lora.widths == first.widths && lora.pairs.len() == first.pairs.len();
        if !parts.iter().all(|(lora, _)| same(lora)) {
            return Err(apart());
        }
        let rank = parts.iter().map(|(lora, _)| lora.config.r).sum::<usize>();
        let mut targets: Vec<String> = parts.iter().flat_map(|(lora, _)| lora.config.targets.clone()).collect();
        targets.sort();
        targets.dedup();
        let config = LoraConfig { r: rank, alpha: rank as f64, dropout: 0.0, targets, rslora: false };
        let module = |layer: usize, place: usize| -> Result<Option<Pair>, TorchError> {
            let own = |lora: &&Self| lora.pairs[layer][place].is_some();
            let Some(shape) =
                parts.iter().map(|(lora, _)| *lora).find(own).and_then(|l| l.pairs[layer][place].as_ref())
            else {
                return Ok(None);
            };
            let ((_, input), (output, _)) = (shape.a.size2()?, shape.b.size2()?);
            let (mut a, mut b) = (Vec::new(), Vec::new());
            for (lora, weight) in parts {
                let (rank, options) = (lora.config.r as i64, (Kind::Float, shape.a.device()));
                if let Some(pair) = &lora.pairs[layer][place] {
                    a.push(pair.a.shallow_clone());
                    b.push(pair.b.f_mul_scalar(weight * lora.config.scale())?);
                } else {
                    a.push(Tensor::f_zeros([rank, input], options)?);
                    b.push(Tensor::f_zeros([output, rank], options)?);
                }
            }
            Ok(Some(Pair { a: Tensor::f_cat(&a, 0)?, b: Tensor::f_cat(&b, 1)? }))
        };
        let layers = first.pairs.iter().enumerate();
        let layer = |(layer, row): (usize, &Vec<_>)| (0..row.len()).map(|place| module(layer, place)).collect();
        let pairs = layers.map(layer).collect::<Result<_, TorchError>>()?;
        Ok(Self { config, targets: first.targets, pairs, widths: first.widths.clone() })
    }

    /// Replaces every A and B, in the order of [`Lora::named`]. For the trainer, whose parameters
    /// are views of one flat buffer.
    pub fn replace(&mut self, tensors: impl IntoIterator<Item = Tensor>) {
        let mut tensors = tensors.into_iter();
        for pair in self.pairs.iter_mut().flatten().flatten() {
            if let (Some(a), Some(b)) = (tensors.next(), tensors.next()) {
                pair.a = a;
                pair.b = b;
            }
        }
    }

    /// Writes `adapter_config.json` and `adapter_model.safetensors` into `dir`, which must exist.
    /// `base` goes into `base_model_name_or_path`. PEFT, transformers and vLLM load the result.
    pub fn save(&self, dir: &Path, base: &str) -> Result<(), ModelError> {
        let mut bytes = BTreeMap::new();
        for (name, tensor) in self.named() {
            bytes.insert(name, (tensor.size(), raw(tensor)?));
        }
        let views = bytes.iter().map(|(name, (size, data))| {
            let shape = size.iter().map(|n| *n as usize).collect();
            let view = safetensors::tensor::TensorView::new(safetensors::Dtype::F32, shape, data);
            view.map(|v| (name, v)).map_err(|e| ModelError::file(dir, format!("{name} can't be written: {e}")))
        });
        let views = views.collect::<Result<Vec<_>, _>>()?;
        // transformers refuses a file that does not say where it comes from
        let metadata = std::collections::HashMap::from([("format".to_owned(), "pt".to_owned())]);
        let file = dir.join(FILE);
        let data = safetensors::serialize(views, Some(metadata))
            .map_err(|e| ModelError::file(&file, format!("can't be written: {e}")))?;
        std::fs::write(&file, data).map_err(|e| ModelError::file(&file, format!("can't be written: {e}")))?;
        let file = dir.join("adapter_config.json");
        let config = serde_json::to_string_pretty(&peft::json(&self.config, self.targets, base)).unwrap_or_default();
        std::fs::write(&file, config).map_err(|e| ModelError::file(&file, format!("can't be written: {e}")))
    }

    /// The modules of a site with their widths, in the order of the site's outputs.
    fn parts(&self, layer: usize, site: Site) -> Vec<(&Option<Pair>, i64)> {
        let row = self.pairs.get(layer).into_iter().flatten();
        let all = row.zip(self.targets).zip(self.widths.iter().copied());
        all.filter(|((_, t), _)| t.site == site).map(|((p, _), w)| (p, w)).collect()
    }

    /// [`Lora::add`] without gradients, in place where that can be.
    fn add_in_place(&self, layer: usize, site: Site, x: &Tensor, out: &Tensor) -> Result<(), TorchError> {
        let adapted = self.adapted(layer, site);
        let pairs: Vec<_> = adapted.map(|(p, first, _)| ops::LoraPair { a: &p.a, b: &p.b, first }).collect();
        if !pairs.is_empty() && !ops::add_lora(x, &pairs, self.config.scale(), out)? {
            let changed = self.add(layer, site, x, out.shallow_clone())?;
            out.shallow_clone().f_copy_(&changed)?;
        }
        Ok(())
    }

    /// [`Lora::add`] without gradients, in place, so that a row does not depend on the rows beside it.
    pub(super) fn add_apart(&self, layer: usize, site: Site, x: &Tensor, out: &Tensor) -> Result<(), TorchError> {
        for (pair, first, width) in self.adapted(layer, site) {
            let low = products::shrink(x, &pair.a)?;
            let b = pair.b.f_transpose(0, 1)?.f_contiguous()?;
            products::expand(&low, &b, self.config.scale(), &out.f_narrow(1, first, width)?)?;
        }
        Ok(())
    }

    /// Backward of [`Lora::add_apart`] for the gradient `dy` of its result: adds to that of `x`, `dx` in float32, and
    /// to those of the adapter's matrices, which lie in `to`.
    pub(super) fn back(
        &self,
        (layer, site): (usize, Site),
        x: &Tensor,
        dy: &Tensor,
        dx: &Tensor,
        to: Option<&Lora>,
    ) -> Result<(), TorchError> {
        let scale = self.config.scale();
        for (pair, first, width) in self.adapted(layer, site) {
            let dy = dy.f_narrow(1, first, width)?;
            let back = products::shrink(&dy, &pair.b.f_transpose(0, 1)?.f_contiguous()?)?;
            products::expand(&back, &pair.a, scale, dx)?;
            let gradient = to.and_then(|to| to.adapted(layer, site).find(|(_, at, _)| *at == first));
            if let Some((gradient, ..)) = gradient {
                products::add_outer(&back, x, scale, &gradient.a)?;
                let low = products::shrink(x, &pair.a)?;
                let b = Tensor::f_zeros([pair.a.size2()?.0, width], (Kind::Float, x.device()))?;
                products::add_outer(&low, &dy, scale, &b)?;
                let _ = gradient.b.shallow_clone().f_add_(&b.f_transpose(0, 1)?)?;
            }
        }
        Ok(())
    }

    /// The adapted modules of a site, with their first column among the site's outputs and their width.
    fn adapted(&self, layer: usize, site: Site) -> impl Iterator<Item = (&Pair, i64, i64)> {
        self.parts(layer, site)
            .into_iter()
            .scan(0, |next, (pair, width)| {
                *next += width;
                Some((pair, *next - width, width))
            })
            .filter_map(|(pair, first, width)| Some((pair.as_ref()?, first, width)))
    }

    /// `out` plus this adapter's change at a site; `x` is the site's input.
    fn add(&self, layer: usize, site: Site, x: &Tensor, out: Tensor) -> Result<Tensor, TorchError> {
        let parts = self.parts(layer, site);
        if parts.iter().all(|(pair, _)| pair.is_none()) {
            return Ok(out);
        }
        let input = x.f_to_kind(Kind::Float)?.f_mul_scalar(self.config.scale())?;
        let change = |(pair, width): &(&Option<Pair>, i64)| -> Result<Tensor, TorchError> {
            Ok(match pair {
                Some(pair) => input.f_linear(&pair.a, None::<&Tensor>)?.f_linear(&pair.b, None::<&Tensor>)?,
                None => Tensor::f_zeros([x.size()[0], *width], (Kind::Float, x.device()))?,
            })
        };
        let changes = parts.iter().map(change).collect::<Result<Vec<_>, _>>()?;
        let change = if let [only] = changes.as_slice() { only.shallow_clone() } else { Tensor::f_cat(&changes, 1)? };
        let kind = out.kind();
        Ok(change.f_add(&out)?.f_to_kind(kind)?)
    }
}

/// The name of the file with an adapter's matrices.
const FILE: &str = "adapter_model.safetensors";

/// The bytes of an adapter's file.
fn read_file(file: &Path) -> Result<Vec<u8>, ModelError> {
    let pickle = file.with_extension("bin");
    if !file.exists() && pickle.exists() {
        let message = "is a pickle file, which may run any program and is not read; load the adapter with PEFT and write \
                       it again with save_pretrained, which makes an adapter_model.safetensors";
        return Err(ModelError::file(pickle, message));
    }
    std::fs::read(file).map_err(|e| ModelError::file(file, peft::unreadable_adapter(&e)))
}

/// The tensors of an adapter's file.
struct AdapterFile<'a> {
    path: &'a Path,
    tensors: safetensors::SafeTensors<'a>,
}

impl<'a> AdapterFile<'a> {
    fn open(path: &'a Path, bytes: &'a [u8]) -> Result<Self, ModelError> {
        let tensors = safetensors::SafeTensors::deserialize(bytes).map_err(|e| {
            ModelError::file(
                path,
                format!("is not a safetensors file ({e}); the file is damaged: download or copy it again"),
            )
        })?;
        Ok(Self { path, tensors })
    }

    /// A tensor in float32.
    fn read(&self, name: &str, shape: [usize; 2]) -> Result<Tensor, ModelError> {
        let wrong = |message: String| ModelError::file(self.path, message);
        let view = self
            .tensors
            .tensor(name)
            .map_err(|_| wrong(format!("has no tensor {name}; the adapter belongs to another model")))?;
        if view.shape() != shape {
            return Err(wrong(format!(
                "{name} has shape {:?}, and this model and the r of adapter_config.json need {shape:?}; the adapter belongs to \
                 another model, or its two files are not of one adapter",
                view.shape()
            )));
        }
        let kind = match view.dtype() {
            safetensors::Dtype::F32 => Kind::Float,
            safetensors::Dtype::F16 => Kind::Half,
            safetensors::Dtype::BF16 => Kind::BFloat16,
            other => return Err(wrong(format!("{name} has dtype {other:?}; F32, F16 and BF16 are read"))),
        };
        let tensor = Tensor::f_from_data_size(view.data(), &shape.map(|n| n as i64), kind)?;
        Ok(tensor.f_to_kind(Kind::Float)?)
    }

    /// Refuses a file with a tensor that is no part of what was read of it.
    fn check_all_read(&self, lora: &Lora) -> Result<(), ModelError> {
        let read: BTreeSet<String> = lora.named().map(|(name, _)| name).collect();
        let Some(left) = self.tensors.names().into_iter().filter(|name| !read.contains(*name)).min() else {
            return Ok(());
        };
        let layers = lora.pairs.len();
        let layer = left.split("layers.").nth(1).and_then(|rest| rest.split('.').next()?.parse::<usize>().ok());
        let why = match layer {
            Some(layer) if layer >= layers => {
                format!("and this model has {layers} layers; the adapter belongs to a deeper model")
            }
            Some(_) => "and adapter_config.json adapts no such layer; both files have to be of one adapter".into(),
            None => "and of a model only the linear layers of its blocks are adapted here; merge the adapter into its \
                     base with PEFT (merge_and_unload, then save_pretrained) and name the merged model"
                .into(),
        };
        Err(ModelError::file(self.path, format!("has the tensor {left}, {why}")))
    }
}

/// Whether the adapter in `dir` fits the model, as [`Lora::load`] would find out; then its [`content_hash`].
pub fn checked_hash(dir: &Path, model: &Config) -> Result<String, ModelError> {
    Lora::load(dir, model, Device::Cpu)?;
    content_hash(dir)
}

/// Hash of an adapter's content, hex: two with the same hash are the same adapter, wherever they lie.
///
/// # Errors
/// When one of its two files can't be read.
pub fn content_hash(dir: &Path) -> Result<String, ModelError> {
    let mut hasher = blake3::Hasher::new();
    let config = read_file(&dir.join("adapter_config.json"))?;
    for bytes in [without_base(config), read_file(&dir.join(FILE))?] {
        hasher.update(&(bytes.len() as u64).to_le_bytes()).update(&bytes);
    }
    Ok(hasher.finalize().to_hex().to_string())
}

/// A configuration without the name of its base, which depends on where a program was started.
fn without_base(config: Vec<u8>) -> Vec<u8> {
    match serde_json::from_slice::<serde_json::Map<String, serde_json::Value>>(&config) {
        Ok(mut keys) => {
            keys.shift_remove("base_model_name_or_path");
            serde_json::Value::Object(keys).to_string().into_bytes()
        }
        Err(_) => config,
    }
}

/// Looks whether the tensors of an adapter's file are all there.
///
/// # Errors
/// The file can't be read, or it is cut off.
pub fn check_file(dir: &Path) -> Result<(), ModelError> {
    let file = dir.join(FILE);
    let bytes = read_file(&file)?;
    let read = safetensors::SafeTensors::deserialize(&bytes);
    read.map(drop).map_err(|e| ModelError::file(file, format!("is damaged: {e}")))
}

/// Which rows of a pass run under which adapter. Rows of one adapter lie together.
pub enum Adapters<'a> {
    /// The base alone.
    Base,
    All(&'a Lora),
    /// One upon the other: what they change is added up.
    Stack(&'a [&'a Lora]),
    /// `(rows, adapter)` in order; together they cover the pass.
    Rows(&'a [(i64, Option<&'a Lora>)]),
}

impl<'a> From<Option<&'a Lora>> for Adapters<'a> {
    fn from(lora: Option<&'a Lora>) -> Self {
        lora.map_or(Self::Base, Self::All)
    }
}

impl Adapters<'_> {
    /// `out` (`[tokens, output]`, the base's product for `x`) under the adapters of its rows.
    pub fn apply(&self, layer: usize, site: Site, x: &Tensor, out: Tensor) -> Result<Tensor, TorchError> {
        match self {
            Self::Base => Ok(out),
            Self::All(lora) => lora.add(layer, site, x, out),
            Self::Stack(stack) => stack.iter().try_fold(out, |out, lora| lora.add(layer, site, x, out)),
            Self::Rows(groups) => {
                let mut start = 0;
                let mut parts = Vec::with_capacity(groups.len());
                for &(rows, lora) in *groups {
                    let part = out.f_narrow(0, start, rows)?;
                    parts.push(match lora {
                        Some(lora) => lora.add(layer, site, &x.f_narrow(0, start, rows)?, part)?,
                        None => part,
                    });
                    start += rows;
                }
                Ok(Tensor::f_cat(&parts, 0)?)
            }
        }
    }
}

impl Adapters<'_> {
    /// [`Adapters::apply`] without gradients, to `out` itself.
    pub fn apply_in_place(&self, layer: usize, site: Site, x: &Tensor, out: &Tensor) -> Result<(), TorchError> {
        match self {
            Self::Base => Ok(()),
            Self::All(lora) => lora.add_in_place(layer, site, x, out),
            Self::Stack(stack) => stack.iter().try_for_each(|lora| lora.add_in_place(layer, site, x, out)),
            Self::Rows(groups) => {
                let mut start = 0;
                for &(rows, lora) in *groups {
                    if let Some(lora) = lora {
                        lora.add_in_place(layer, site, &x.f_narrow(0, start, rows)?, &out.f_narrow(0, start, rows)?)?;
                    }
                    start += rows;
                }
                Ok(())
            }
        }
    }
}

/// Little-endian bytes of a float32 tensor.
fn raw(tensor: &Tensor) -> Result<Vec<u8>, TorchError> {
    let tensor = tensor.f_detach()?.f_to_device(Device::Cpu)?.f_to_kind(Kind::Float)?.f_contiguous()?;
    let count = tensor.numel();
    let mut bytes = vec![0; count * 4];
    tensor.f_copy_data_u8(&mut bytes, count)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use safetensors::tensor::TensorView;
    use serde_json::{Value as Json, json};

    use super::*;

    fn fixture() -> PathBuf {
        PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tiny-llama")
    }

    fn model() -> Config {
        Config::from_json(&fixture().join("config.json")).unwrap()
    }

    /// A PEFT directory of float32 tensors that are all ones.
    fn written(config: &Json, tensors: &[(String, Vec<usize>)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        let ones: Vec<Vec<u8>> = tensors
            .iter()
            .map(|(_, shape)| std::iter::repeat_n(1_f32.to_le_bytes(), shape.iter().product()).flatten().collect())
            .collect();
        let views = tensors.iter().zip(&ones).map(|((name, shape), data)| {
            (name, TensorView::new(safetensors::Dtype::F32, shape.clone(), data).unwrap())
        });
        let bytes = safetensors::serialize(views.collect::<Vec<_>>(), None).unwrap();
        std::fs::write(dir.path().join(FILE), bytes).unwrap();
        std::fs::write(dir.path().join("adapter_config.json"), config.to_string()).unwrap();
        dir
    }

    fn config(more: &Json) -> Json {
        let mut config = json!({"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]});
        more.as_object().unwrap().iter().for_each(|(key, value)| config[key] = value.clone());
        config
    }

    /// The tensors of an adapter to q_proj.
    fn tensors(rank: impl Fn(usize) -> usize, layers: usize) -> Vec<(String, Vec<usize>)> {
        let model = model();
        let (input, output) = targets(&model)[0].widths(&model);
        let layer = |i: usize| {
            let name = |matrix| targets(&model)[0].tensor_name(i, matrix);
            [(name("A"), vec![rank(i), input]), (name("B"), vec![output, rank(i)])]
        };
        (0..layers).flat_map(layer).collect()
    }

    fn refusal(dir: &Path) -> String {
        Lora::load(dir, &model(), Device::Cpu).err().unwrap().to_string()
    }

    #[test]
    fn a_tensor_that_nobody_reads_is_named() {
        let layers = model().layers;
        let with = |name: &str, shape: &[usize]| {
            [tensors(|_| 2, layers), vec![(format!("base_model.model.{name}"), shape.to_vec())]].concat()
        };
        for (more, tensors, name, why) in [
            (json!({}), with("lm_head.weight", &[7, 3]), "lm_head.weight", "merge the adapter into its base"),
            (json!({}), with("model.embed_tokens.weight", &[7, 3]), "model.embed_tokens.weight", "merge the adapter"),
            (
                json!({"target_modules": "lm_head|.*q_proj"}),
                with("lm_head.lora_A.weight", &[2, 3]),
                "lm_head.lora_A.weight",
                "merge the adapter",
            ),
            (
                json!({"target_modules": ["lm_head", "q_proj"]}),
                with("lm_head.lora_A.weight", &[2, 3]),
                "lm_head.lora_A.weight",
                "merge the adapter",
            ),
            (
                json!({}),
                with("model.layers.0.self_attn.k_proj.lora_A.weight", &[2, 3]),
                "k_proj.lora_A.weight",
                "adapts no such layer",
            ),
            (json!({}), tensors(|_| 2, layers + 1), "q_proj.lora_A.weight", "belongs to a deeper model"),
        ] {
            let dir = written(&config(&more), &tensors);
            let message = refusal(dir.path());
            assert!(message.contains(FILE) && message.contains(name) && message.contains(why), "{message}");
        }
        let good = written(&config(&json!({})), &tensors(|_| 2, layers));
        assert!(Lora::load(good.path(), &model(), Device::Cpu).is_ok());
        let unknown = written(&config(&json!({"target_modules": ["q_proj", "wqkv"]})), &tensors(|_| 2, layers));
        assert!(refusal(unknown.path()).contains("adapter_config.json: names the target wqkv"));
    }

    #[test]
    fn a_pickle_is_named_with_the_remedy() {
        let dir = written(&config(&json!({})), &tensors(|_| 2, model().layers));
        std::fs::rename(dir.path().join(FILE), dir.path().join("adapter_model.bin")).unwrap();
        for message in [refusal(dir.path()), content_hash(dir.path()).unwrap_err().to_string()] {
            assert!(message.contains("adapter_model.bin: is a pickle file") && message.contains("save_pretrained"));
        }
        std::fs::remove_file(dir.path().join("adapter_model.bin")).unwrap();
        assert!(refusal(dir.path()).contains("an adapter is a directory that PEFT wrote"));
    }

    /// Every product of ones is the rank, so what is added to a weight is `alpha` or, with rslora, its root-scaled form.
    #[test]
    fn modules_have_the_rank_and_the_scale_of_their_pattern() {
        let layers = model().layers;
        let own = json!({"rank_pattern": {"layers.0.self_attn.q_proj": 5}, "alpha_pattern": {"layers.0.*": 3}});
        let dir = written(&config(&own), &tensors(|i| if i == 0 { 5 } else { 2 }, layers));
        let lora = Lora::load(dir.path(), &model(), Device::Cpu).unwrap();
        assert_eq!(lora.config.r, 5);
        for (layer, alpha) in [(0, 3.0), (1, 2.0)] {
            let change = lora.change(&format!("model.layers.{layer}.self_attn.q_proj")).unwrap().unwrap();
            let apart = change.f_sub_scalar(alpha).unwrap().abs().max().double_value(&[]);
            assert!(apart < 1e-6, "layer {layer}: {apart}");
        }
        // What is written is read as the same.
        let again = tempfile::tempdir().unwrap();
        lora.save(again.path(), "base").unwrap();
        let again = Lora::load(again.path(), &model(), Device::Cpu).unwrap();
        let of = |lora: &Lora| lora.change("model.layers.0.self_attn.q_proj").unwrap().unwrap();
        assert_eq!((of(&again) - of(&lora)).abs().max().double_value(&[]), 0.0);
    }
}
