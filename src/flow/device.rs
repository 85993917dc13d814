//! Names of devices as a flow writes them. Plain words: what a machine really has is decided where
//! a device is opened.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use serde::Deserialize;
use serde::de::{self, Deserializer, SeqAccess, Visitor};

use super::{FlowError, names};

/// `auto`, `cpu`, `cpu:N` or `cuda:N`. `cpu` is `cpu:0`; each number is a device thread of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum DeviceName {
    Auto,
    Cpu(u32),
    Cuda(u32),
}

impl FromStr for DeviceName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("`{text}` is not a device; write auto, cpu, cpu:1 or cuda:0");
        match text.split_once(':') {
            None if text == "auto" => Ok(Self::Auto),
            None if text == "cpu" => Ok(Self::Cpu(0)),
            Some((kind, number)) if number.bytes().all(|digit| digit.is_ascii_digit()) => {
                let number = number.parse().map_err(|_| wrong())?;
                match kind {
                    "cpu" => Ok(Self::Cpu(number)),
                    "cuda" => Ok(Self::Cuda(number)),
                    _ => Err(wrong()),
                }
            }
            _ => Err(wrong()),
        }
    }
}

impl fmt::Display for DeviceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Cpu(number) => write!(f, "cpu:{number}"),
            Self::Cuda(number) => write!(f, "cuda:{number}"),
        }
    }
}

/// `[devices."NAME"]`: what a run may take of a device.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeviceSpec {
    /// Share of the device's memory, above 0 and at most 1.
    #[serde(default = "nearly_all")]
    pub memory: f64,
    /// Whether a GPU's own kernels are used; where not, libtorch's operations stand in. Not for a CPU, as those below.
    #[serde(default)]
    pub kernels: Option<bool>,
    /// Whether flash attention is used; where not, libtorch's attention with masks stands in.
    #[serde(default)]
    pub flash: Option<bool>,
    /// Whether decode steps are captured as CUDA graphs.
    #[serde(default)]
    pub graphs: Option<bool>,
}

fn nearly_all() -> f64 {
    0.9
}

impl Default for DeviceSpec {
    fn default() -> Self {
        Self { memory: nearly_all(), kernels: None, flash: None, graphs: None }
    }
}

impl DeviceSpec {
    /// The tables of a flow by [`DeviceName`] as it is displayed: `cpu` is `cpu:0`.
    ///
    /// # Errors
    /// What is no device, a device twice, a share that is none, what a CPU does not have.
    pub fn by_device(written: BTreeMap<String, Self>) -> Result<BTreeMap<String, Self>, FlowError> {
        let mut devices = BTreeMap::new();
        for (text, spec) in written {
            let key = format!("devices.{text}");
            let name = spec.check(&key, &text)?;
            if devices.insert(name.to_string(), spec).is_some() {
                return Err(FlowError::new(key, format!("{name} has two tables")).help("`cpu` is `cpu:0`; keep one"));
            }
        }
        Ok(devices)
    }

    fn check(&self, key: &str, text: &str) -> Result<DeviceName, FlowError> {
        let name = match text.parse() {
            Ok(DeviceName::Auto) => {
                return Err(FlowError::new(key, "`auto` is not a device of its own")
                    .help("name the devices that it may stand for: cpu:0, cpu:1, cuda:0, cuda:1"));
            }
            Ok(name) => name,
            Err(_) => {
                let guess = names::closest(&text.replacen("gpu", "cuda", 1), &["cpu:0", "cuda:0"]);
                return Err(FlowError::new(key, format!("`{text}` is not a device; they are cpu, cpu:N and cuda:N"))
                    .help(format!("did you mean [devices.\"{}\"]?", guess.unwrap_or("cuda:0"))));
            }
        };
        if !(self.memory > 0.0 && self.memory <= 1.0) {
            let message = "is a share of the device's memory, above 0 and at most 1";
            return Err(FlowError::new(format!("{key}.memory"), message));
        }
        for (written, of_gpu, what) in [
            (self.kernels, "kernels", "CUDA kernels"),
            (self.flash, "flash", "flash attention"),
            (self.graphs, "graphs", "CUDA graphs"),
        ] {
            if written.is_some() && matches!(name, DeviceName::Cpu(_)) {
                let message = format!("{name} is a CPU, which has no {what}");
                return Err(FlowError::new(format!("{key}.{of_gpu}"), message).help("leave it out"));
            }
        }
        Ok(name)
    }
}

/// The value of a `device` key: one name or a list of different names; `auto` stands alone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Devices(Vec<DeviceName>);

impl Devices {
    /// # Errors
    /// No name, a name twice, or `auto` among others.
    pub fn new(names: Vec<DeviceName>) -> Result<Self, String> {
        let mut seen = Vec::new();
        for name in &names {
            if seen.contains(name) {
                return Err(format!("{name} is named twice"));
            }
            seen.push(*name);
        }
        match names.as_slice() {
            [] => Err("the list of devices is empty".into()),
            [_, _, ..] if seen.contains(&DeviceName::Auto) => Err("`auto` can't be one of several devices".into()),
            _ => Ok(Self(names)),
        }
    }

    /// At least one.
    pub fn names(&self) -> &[DeviceName] {
        &self.0
    }
}

impl Default for Devices {
    fn default() -> Self {
        Self(vec![DeviceName::Auto])
    }
}

impl<'de> Deserialize<'de> for Devices {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(DevicesVisitor)
    }
}

struct DevicesVisitor;

impl<'de> Visitor<'de> for DevicesVisitor {
    type Value = Devices;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the name of a device or a list of them")
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<Devices, E> {
        text.parse().map(|name| Devices(vec![name])).map_err(E::custom)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Devices, A::Error> {
        let mut names = Vec::new();
        while let Some(text) = list.next_element::<String>()? {
            names.push(text.parse().map_err(de::Error::custom)?);
        }
        Devices::new(names).map_err(de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;

    #[test]
    fn names() {
        for (text, name) in [
            ("auto", DeviceName::Auto),
            ("cpu", DeviceName::Cpu(0)),
            ("cpu:1", DeviceName::Cpu(1)),
            ("cuda:0", DeviceName::Cuda(0)),
        ] {
            assert_eq!(text.parse(), Ok(name));
            assert_eq!(name.to_string().parse(), Ok(name));
        }
        for bad in ["", "cuda", "gpu", "cuda:", "cuda:-1", "cuda:+1", "cpu:99999999999", "tpu:0", "auto:0", "cpu:0:1"] {
            let error = bad.parse::<DeviceName>().expect_err(bad);
            assert!(error.contains(&format!("`{bad}`")), "{error}");
        }
    }

    #[derive(Debug, Deserialize)]
    struct Options {
        #[serde(default)]
        device: Devices,
    }

    #[test]
    fn lists() {
        let read = |text: &str| {
            let table = toml::from_str(text).expect("valid TOML");
            super::super::options::read::<Options>(&table, "stages.s")
                .map(|options| options.device.0)
                .map_err(|e| e.to_string())
        };
        assert_eq!(read(""), Ok(vec![DeviceName::Auto]));
        assert_eq!(read("device = 'cpu:1'"), Ok(vec![DeviceName::Cpu(1)]));
        assert_eq!(read("device = ['cuda:0', 'cuda:1']"), Ok(vec![DeviceName::Cuda(0), DeviceName::Cuda(1)]));
        for bad in
            ["device = []", "device = ['cpu', 'cpu:0']", "device = ['auto', 'cpu']", "device = 1", "device = 'x'"]
        {
            let error = read(bad).expect_err(bad);
            assert!(error.starts_with("stages.s.device"), "{error}");
        }
    }
}
