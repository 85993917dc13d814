//! Which of a data set's files a configuration and a split name, as the hub's own loader finds them.
//!
//! The README's `configs` decide first; then names such as `train_prefs-00000-of-00002.parquet`; then words such as
//! `train` and `dev` in the paths. Nothing is read together that was not asked for.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::LazyLock;

use regex::Regex;
use serde::Deserialize;

use super::DataError;
use super::files::{FORMATS, Format, pattern};

/// The configuration and the split that are asked for.
#[derive(Debug, Clone, Copy, Default)]
pub struct Wanted<'a> {
    pub config: Option<&'a str>,
    pub split: Option<&'a str>,
}

/// The files of one split, sorted, all of one format.
#[derive(Debug, Clone, PartialEq)]
pub struct Chosen {
    pub names: Vec<String>,
    pub format: Format,
    /// Files of a data format that are not read.
    pub beside: Vec<String>,
}

/// Words that name a split in a path, as the hub's own loader reads them.
const SPLITS: [(&str, &[&str]); 3] = [
    ("train", &["train", "training"]),
    ("validation", &["validation", "valid", "val", "dev"]),
    ("test", &["test", "testing", "eval", "evaluation"]),
];

/// Files beside the data in directories of data sets.
const NOT_DATA: [&str; 6] =
    ["dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "config.json", "metadata.json"];

/// Chooses among the names of a data set's files, which are relative to its folder.
///
/// # Errors
/// There is no data file; there are several configurations or splits and none is asked for; the one asked for is not
/// there. The message lists those that are.
pub fn choose(names: Vec<String>, readme: Option<&str>, wanted: Wanted<'_>) -> Result<Chosen, DataError> {
    let hidden = |name: &String| name.split('/').any(|part| part.starts_with('.') || part.starts_with("__"));
    let is_data = |name: &String| {
        let file = name.rsplit('/').next().unwrap_or_default();
        !hidden(name) && !NOT_DATA.contains(&file) && Format::of(Path::new(name)).is_some()
    };
    let data: Vec<String> = names.into_iter().filter(is_data).collect();
    if data.is_empty() {
        return Err(DataError::user(format!("holds no data file; use {FORMATS}")));
    }
    // `CONFIGURATION/SPLIT` is both in one.
    let wanted = match wanted.split.and_then(|split| split.split_once('/')) {
        Some((config, split)) if wanted.config.is_none() => Wanted { config: Some(config), split: Some(split) },
        _ => wanted,
    };
    let chosen = match readme.map(configs).unwrap_or_default().as_slice() {
        [] => by_names(&data, wanted)?,
        configs => by_readme(&data, configs, wanted)?,
    };
    of_one_format(chosen, &data)
}

fn of_one_format(mut chosen: Vec<String>, data: &[String]) -> Result<Chosen, DataError> {
    let format = |name: &String| Format::of(Path::new(name));
    let Some(best) = chosen.iter().filter_map(format).min() else {
        return Err(DataError::user("holds no data file of that name"));
    };
    chosen.retain(|name| format(name) == Some(best));
    chosen.sort();
    chosen.dedup();
    let beside = data.iter().filter(|name| !chosen.contains(name)).cloned().collect();
    Ok(Chosen { names: chosen, format: best, beside })
}

/// A configuration in a README.
#[derive(Debug, Clone, Deserialize)]
struct Config {
    config_name: Option<String>,
    #[serde(default)]
    default: bool,
    data_dir: Option<String>,
    data_files: Option<DataFiles>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(untagged)]
enum DataFiles {
    /// All of it is `train`.
    Paths(OneOrMany),
    Splits(Vec<SplitFiles>),
    BySplit(BTreeMap<String, OneOrMany>),
}

#[derive(Debug, Clone, Deserialize)]
struct SplitFiles {
    split: String,
    path: OneOrMany,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(untagged)]
enum OneOrMany {
    One(String),
    Many(Vec<String>),
}

impl OneOrMany {
    fn each(&self) -> &[String] {
        match self {
            Self::One(one) => std::slice::from_ref(one),
            Self::Many(many) => many,
        }
    }
}

/// The configurations at the head of a README; none where it has no head that can be read.
fn configs(readme: &str) -> Vec<Config> {
    #[derive(Deserialize)]
    struct Head {
        #[serde(default)]
        configs: Vec<Config>,
    }
    let text = readme.trim_start_matches('\u{feff}').replace("\r\n", "\n");
    let head = text.strip_prefix("---\n").and_then(|rest| rest.split("\n---").next());
    let head = head.and_then(|head| serde_yaml_ng::from_str::<Head>(head).ok());
    head.map(|head| head.configs).unwrap_or_default()
}

impl Config {
    fn name(&self) -> &str {
        self.config_name.as_deref().unwrap_or("default")
    }

    /// Its splits with the patterns of their files; none where it names a folder alone.
    fn splits(&self) -> Option<Vec<(String, Vec<String>)>> {
        let below = |path: &String| match &self.data_dir {
            Some(dir) => format!("{}/{path}", dir.trim_end_matches('/')),
            None => path.clone(),
        };
        let below = |paths: &OneOrMany| paths.each().iter().map(below).collect::<Vec<_>>();
        Some(match self.data_files.as_ref()? {
            DataFiles::Paths(paths) => vec![("train".to_owned(), below(paths))],
            DataFiles::Splits(splits) => splits.iter().map(|s| (s.split.clone(), below(&s.path))).collect(),
            DataFiles::BySplit(splits) => splits.iter().map(|(name, paths)| (name.clone(), below(paths))).collect(),
        })
    }
}

fn by_readme(data: &[String], configs: &[Config], wanted: Wanted<'_>) -> Result<Vec<String>, DataError> {
    let names: Vec<&str> = configs.iter().map(Config::name).collect();
    let config = match (wanted.config, configs) {
        (Some(name), _) => configs.iter().find(|config| config.name() == name),
        (None, [only]) => Some(only),
        (None, _) => configs.iter().find(|config| config.default).or(configs.iter().find(|c| c.name() == "default")),
    };
    let config = config.ok_or_else(|| not_one_of("config", wanted.config, &names))?;
    let Some(splits) = config.splits() else {
        let dir = config.data_dir.as_deref().unwrap_or_default().trim_matches('/');
        let below: Vec<String> = data.iter().filter(|name| dir.is_empty() || is_below(name, dir)).cloned().collect();
        return by_names(&below, Wanted { config: None, ..wanted });
    };
    let names: Vec<&str> = splits.iter().map(|(name, _)| name.as_str()).collect();
    let split = one_of(wanted.split, &names)?;
    let paths: Vec<&String> = splits.iter().filter(|(name, _)| name == split).flat_map(|(_, paths)| paths).collect();
    let mut chosen = Vec::new();
    for path in &paths {
        let path = path.trim_start_matches("./");
        let matches = pattern(path)?;
        chosen.extend(data.iter().filter(|name| matches.is_match(name) || is_below(name, path)).cloned());
    }
    if chosen.is_empty() {
        let paths = paths.iter().map(|path| path.as_str()).collect::<Vec<_>>().join(", ");
        return Err(DataError::user(format!(
            "the README gives the split {split} the files {paths}, which are not there"
        )));
    }
    Ok(chosen)
}

fn is_below(name: &str, dir: &str) -> bool {
    name.strip_prefix(dir.trim_end_matches('/')).is_some_and(|rest| rest.starts_with('/'))
}

/// `NAME-00000-of-00002.parquet`, with the folders before it.
#[allow(clippy::expect_used, reason = "the expression is a constant, and a test compiles it")]
static SHARD: LazyLock<Regex> =
    LazyLock::new(|| Regex::new(r"^(?:(.*)/)?([^/]+?)-\d{5}-of-\d{5}[^/]*$").expect("an expression"));

/// The folders and the name before `-00000-of-`; none for `data-...`, which `save_to_disk` calls the files of any split.
fn shard_of(name: &str) -> Option<(&str, &str)> {
    let found = SHARD.captures(name)?;
    let split = found.get(2)?.as_str();
    (split != "data").then(|| (found.get(1).map_or("", |folders| folders.as_str()), split))
}

fn by_names(data: &[String], wanted: Wanted<'_>) -> Result<Vec<String>, DataError> {
    let in_config = |name: &&String| wanted.config.is_none_or(|config| top(name) == Some(config));
    let tops = |names: &mut dyn Iterator<Item = &String>| -> Vec<String> {
        let mut tops: Vec<String> = names.filter_map(|name| top(name)).map(str::to_owned).collect();
        tops.sort();
        tops.dedup();
        tops
    };
    let data: Vec<&String> = match wanted.config {
        None => data.iter().collect(),
        Some(config) => {
            let kept: Vec<&String> = data.iter().filter(in_config).collect();
            if kept.is_empty() {
                let there = tops(&mut data.iter());
                return Err(not_one_of("config", Some(config), &there.iter().map(String::as_str).collect::<Vec<_>>()));
            }
            kept
        }
    };
    let shards: Vec<(&String, &str)> = data.iter().filter_map(|name| Some((*name, shard_of(name)?.1))).collect();
    let named: Vec<(&String, Option<&str>)> = match shards.is_empty() {
        true => data.iter().map(|name| (*name, split_of(name))).collect(),
        false => shards.into_iter().map(|(name, split)| (name, Some(split))).collect(),
    };
    let mut splits: Vec<&str> = named.iter().filter_map(|(_, split)| *split).collect();
    splits.sort_unstable();
    splits.dedup();
    let chosen: Vec<&String> = match wanted.split {
        None if splits.len() > 1 => return Err(not_one_of("split", None, &splits)),
        None => named.iter().map(|(name, _)| *name).collect(),
        Some("train") if splits.is_empty() => named.iter().map(|(name, _)| *name).collect(),
        Some(wanted) => {
            let is_it = |name: &str, split: Option<&str>| {
                split.is_some_and(|split| split == wanted || canonical(split) == Some(wanted))
                    || split.is_some_and(|split| canonical(split).is_some() && canonical(split) == canonical(wanted))
                    || (split.is_none_or(|split| canonical(split).is_some()) && words(name).any(|word| word == wanted))
            };
            let chosen: Vec<_> =
                named.iter().filter(|(name, split)| is_it(name, *split)).map(|(name, _)| *name).collect();
            if chosen.is_empty() {
                let there = if splits.is_empty() { vec!["train"] } else { splits };
                return Err(not_one_of("split", Some(wanted), &there));
            }
            chosen
        }
    };
    let configs = tops(&mut chosen.iter().copied());
    if configs.len() > 1 {
        return Err(not_one_of("config", None, &configs.iter().map(String::as_str).collect::<Vec<_>>()));
    }
    Ok(chosen.into_iter().cloned().collect())
}

/// The wanted split, or the only one.
///
/// # Errors
/// There are several and none is wanted, or the wanted one is not there.
pub fn one_of<'a>(wanted: Option<&str>, there: &[&'a str]) -> Result<&'a str, DataError> {
    let found = match (wanted, there) {
        (Some(wanted), _) => there.iter().find(|name| **name == wanted),
        (None, [only]) => Some(only),
        _ => None,
    };
    found.copied().ok_or_else(|| not_one_of("split", wanted, there))
}

/// `has the splits a, b; choose one with split = "a"`
fn not_one_of(key: &str, wanted: Option<&str>, there: &[&str]) -> DataError {
    let what = if key == "config" { "configuration" } else { key };
    let list = there.join(", ");
    DataError::user(match (wanted, there) {
        (Some(wanted), []) => format!("has no {what} {wanted:?}, and no other"),
        (Some(wanted), _) => {
            let known: Vec<String> = there.iter().map(|name| (*name).to_owned()).collect();
            super::error::unknown(what, wanted, &known)
        }
        (None, there) => {
            let first = there.first().copied().unwrap_or_default();
            format!("has the {what}s {list}; choose one with {key} = \"{first}\"")
        }
    })
}

/// The outermost directory of a path; none where there is none, it is `data`, or it is named for a split alone.
fn top(name: &str) -> Option<&str> {
    let (first, _) = name.split_once('/')?;
    let is_split = SPLITS.iter().any(|(_, words)| words.contains(&first));
    (!is_split && first != "data").then_some(first)
}

fn words(name: &str) -> impl Iterator<Item = &str> {
    name.split(|c: char| !c.is_ascii_alphanumeric())
}

fn canonical(split: &str) -> Option<&'static str> {
    SPLITS.iter().find(|(_, words)| words.contains(&split)).map(|(name, _)| *name)
}

/// The split that a path names; the last word that does counts (`train/test.csv` is a test file).
fn split_of(name: &str) -> Option<&'static str> {
    words(name).filter_map(canonical).last()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(names: &[&str], readme: Option<&str>, config: Option<&str>, split: Option<&str>) -> Result<Chosen, String> {
        let names = names.iter().map(|n| (*n).to_owned()).collect();
        choose(names, readme, Wanted { config, split }).map_err(|e| e.message)
    }

    fn chosen(names: &[&str], split: Option<&str>) -> Result<Vec<String>, String> {
        of(names, None, None, split).map(|chosen| chosen.names)
    }

    #[test]
    fn files_of_a_split() {
        let hub = [
            "README.md",
            "data/train-00001-of-00002.parquet",
            "data/train-00000-of-00002.parquet",
            "data/test-0.parquet",
        ];
        assert_eq!(
            chosen(&hub, Some("train")).unwrap(),
            ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"]
        );
        assert_eq!(chosen(&["data/train-0.csv", "data/test-0.csv"], Some("test")).unwrap(), ["data/test-0.csv"]);
        assert_eq!(chosen(&["orca_rlhf.jsonl", ".gitattributes"], Some("train")).unwrap(), ["orca_rlhf.jsonl"]);
        assert_eq!(chosen(&["dev.csv", "train.csv"], Some("validation")).unwrap(), ["dev.csv"]);
        assert_eq!(chosen(&["a.csv", "a.parquet"], None).unwrap(), ["a.parquet"]);
        assert_eq!(chosen(&["data/val-00000-of-00001.parquet"], Some("validation")).unwrap().len(), 1);
        assert_eq!(
            chosen(&["train.csv", "validation.csv"], None).unwrap_err(),
            "has the splits train, validation; choose one with split = \"train\""
        );
        assert_eq!(chosen(&["train.csv"], Some("test")).unwrap_err(), "there is no split `test`. There are: train");
        assert!(chosen(&["README.md", "dataset_info.json"], None).unwrap_err().starts_with("holds no data file"));
        assert_eq!(
            chosen(&["train_sft/0.parquet", "train_gen/0.parquet"], Some("sft")).unwrap(),
            ["train_sft/0.parquet"]
        );
        assert_eq!(
            chosen(&["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"], Some("train")).unwrap().len(),
            2
        );
    }

    #[test]
    fn names_before_the_shards_number_are_splits() {
        let six = ["gen", "prefs", "sft"].map(|kind| ["train", "test"].map(|split| format!("{split}_{kind}")));
        let six: Vec<String> = six.concat();
        let files: Vec<String> = six.iter().map(|name| format!("data/{name}-00000-of-00001.parquet")).collect();
        let files: Vec<&str> = files.iter().map(String::as_str).collect();
        assert_eq!(chosen(&files, Some("train_prefs")).unwrap(), ["data/train_prefs-00000-of-00001.parquet"]);
        for wanted in [None, Some("train"), Some("prefs")] {
            let message = chosen(&files, wanted).unwrap_err();
            assert!(six.iter().all(|name| message.contains(name.as_str())), "{wanted:?}: {message}");
        }
        let readme = format!(
            "---\nlicense: mit\nconfigs:\n- config_name: default\n  data_files:\n{}---\n# Set\n",
            six.iter().map(|name| format!("  - split: {name}\n    path: data/{name}-*\n")).collect::<String>()
        );
        let told = of(&files, Some(&readme), None, Some("train_prefs")).unwrap();
        assert_eq!(told.names, ["data/train_prefs-00000-of-00001.parquet"]);
        assert_eq!(told.beside.len(), 5);
        for wanted in [None, Some("train"), Some("prefs")] {
            let message = of(&files, Some(&readme), None, wanted).unwrap_err();
            assert!(six.iter().all(|name| message.contains(name.as_str())), "{wanted:?}: {message}");
        }
    }

    #[test]
    fn configurations_are_not_read_as_one() {
        let hub = ["main/train-0.parquet", "main/test-0.parquet", "socratic/train-0.parquet"];
        let expected = "has the configurations main, socratic; choose one with config = \"main\"";
        assert_eq!(chosen(&hub, Some("train")).unwrap_err(), expected);
        assert_eq!(chosen(&hub, Some("socratic/train")).unwrap(), ["socratic/train-0.parquet"]);
        assert_eq!(of(&hub, None, Some("socratic"), None).unwrap().names, ["socratic/train-0.parquet"]);
        assert!(of(&hub, None, Some("other"), None).unwrap_err().contains("main, socratic"));
        assert_eq!(chosen(&["train/0.csv", "train/1.csv"], Some("train")).unwrap().len(), 2);
        let readme = "---\nconfigs:\n- config_name: a\n  data_files: a.jsonl\n- config_name: b\n  default: true\n  \
                      data_files:\n    train: [b/*.jsonl]\n    test: b.jsonl\n- config_name: c\n  data_dir: deep\n---\n";
        let files = ["a.jsonl", "b.jsonl", "b/0.jsonl", "b/1.jsonl", "deep/train.csv", "deep/test.csv"];
        let of = |config, split| of(&files, Some(readme), config, split).map(|chosen| chosen.names);
        assert_eq!(of(Some("a"), None).unwrap(), ["a.jsonl"]);
        assert_eq!(of(None, Some("train")).unwrap(), ["b/0.jsonl", "b/1.jsonl"]);
        assert_eq!(of(Some("c"), Some("test")).unwrap(), ["deep/test.csv"]);
        assert!(of(Some("d"), None).unwrap_err().contains("a, b, c"));
        assert!(of(None, None).unwrap_err().contains("test, train"));
    }

    #[test]
    fn reports_beside_the_data_are_not_read() {
        let told = of(&["train.jsonl", "filter_report.json"], None, None, None).unwrap();
        assert_eq!((told.names, told.beside), (vec!["train.jsonl".to_owned()], vec!["filter_report.json".to_owned()]));
    }
}
