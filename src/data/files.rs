//! Which files a data set is: one file, a glob, or a directory laid out like a hub data set.

use std::fmt;
use std::fs::File;
use std::io::Read;
use std::path::{Component, Path, PathBuf};

use regex::Regex;

use super::DataError;

/// File formats, in the order of preference where a directory has several.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Format {
    Parquet,
    JsonLines,
    Csv,
    Arrow,
}

impl Format {
    /// By extension. A `.json` file may also be one array of objects.
    pub fn of(path: &Path) -> Option<Self> {
        match path.extension()?.to_str()?.to_ascii_lowercase().as_str() {
            "parquet" => Some(Self::Parquet),
            "jsonl" | "json" | "ndjson" => Some(Self::JsonLines),
            "csv" => Some(Self::Csv),
            "arrow" => Some(Self::Arrow),
            _ => None,
        }
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Parquet => "Parquet",
            Self::JsonLines => "JSON",
            Self::Csv => "CSV",
            Self::Arrow => "Arrow",
        })
    }
}

const FORMATS: &str = ".parquet, .jsonl, .json, .csv or .arrow";

/// Words that name a split in a path, as the hub's own loader reads them.
const SPLITS: [(&str, &[&str]); 3] = [
    ("train", &["train", "training"]),
    ("validation", &["validation", "valid", "val", "dev"]),
    ("test", &["test", "testing", "eval", "evaluation"]),
];

/// Files beside the data in directories of data sets.
const NOT_DATA: [&str; 6] =
    ["dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "config.json", "metadata.json"];

/// The files of a local `dataset`, sorted by path, all of one format.
///
/// Errors where nothing is there, a format isn't known, or the split can't be told.
pub fn local(dataset: &str, split: Option<&str>, base: &Path) -> Result<(Vec<PathBuf>, Format), DataError> {
    let path = base.join(dataset);
    if path.is_dir() {
        let mut names = Vec::new();
        walk(&path, Path::new(""), &mut names)?;
        let (chosen, format) = of_split(names, split).map_err(|e| e.at(path.display()))?;
        return Ok((chosen.into_iter().map(|name| path.join(name)).collect(), format));
    }
    // A file is its own split: a flow written for the hub runs on a local file with one key changed.
    let found = if path.is_file() { vec![path.clone()] } else { glob(dataset, base)? };
    let Some(first) = found.first() else {
        let place = std::path::absolute(&path).unwrap_or(path);
        return Err(DataError::user(format!("{}: no such file or directory", place.display())));
    };
    let format = Format::of(first)
        .ok_or_else(|| DataError::user(format!("{}: the format is not known; use {FORMATS}", first.display())))?;
    match found.iter().find(|f| Format::of(f) != Some(format)) {
        Some(other) => {
            Err(DataError::user(format!("{dataset}: {} is not {format} like the first file", other.display())))
        }
        None => Ok((found, format)),
    }
}

/// Of a data set's file names, those of one split, sorted, all of the best format there.
///
/// Without any name of a split in the paths all files are `train`, as on the hub. `CONFIGURATION/SPLIT`
/// takes only files below that directory.
pub fn of_split(names: Vec<String>, split: Option<&str>) -> Result<(Vec<String>, Format), DataError> {
    let mut data: Vec<(Format, String)> = names
        .into_iter()
        .filter(|n| !n.split('/').any(|part| part.starts_with('.')))
        .filter(|n| !n.rsplit('/').next().is_some_and(|file| NOT_DATA.contains(&file)))
        .filter_map(|n| Some((Format::of(Path::new(&n))?, n)))
        .collect();
    if data.is_empty() {
        return Err(DataError::user(format!("holds no data file; use {FORMATS}")));
    }
    let mut splits: Vec<&str> = data.iter().filter_map(|(_, n)| split_of(n)).collect();
    splits.sort_unstable();
    splits.dedup();
    match split {
        None if splits.len() > 1 => {
            return Err(DataError::user(format!(
                "has the splits {}; choose with split = \"{}\"",
                splits.join(", "),
                splits[0]
            )));
        }
        None => {}
        Some("train") if splits.is_empty() => {}
        Some(wanted) => {
            let (configuration, split) = wanted.split_once('/').map_or((None, wanted), |(c, s)| (Some(c), s));
            data.retain(|(_, n)| configuration.is_none_or(|c| top(n) == Some(c)));
            data.retain(|(_, n)| split_of(n) == Some(canonical(split)) || words(n).any(|w| w == split));
            if data.is_empty() {
                let there = if splits.is_empty() { "train".into() } else { splits.join(", ") };
                return Err(DataError::user(format!("no data file is named for split \"{wanted}\"; there is {there}")));
            }
            one_configuration(&data, split)?;
        }
    }
    data.sort();
    let format = data[0].0;
    Ok((data.into_iter().filter(|(f, _)| *f == format).map(|(_, n)| n).collect(), format))
}

/// Hub data sets keep each of their configurations in a directory; reading two as one would double
/// the rows unseen.
fn one_configuration(data: &[(Format, String)], split: &str) -> Result<(), DataError> {
    let mut there: Vec<&str> = data.iter().filter_map(|(_, n)| top(n)).collect();
    there.sort_unstable();
    there.dedup();
    match there.as_slice() {
        [first, _, ..] => {
            let all = there.join(", ");
            Err(DataError::user(format!("has the configurations {all}; choose with split = \"{first}/{split}\"")))
        }
        _ => Ok(()),
    }
}

/// The outermost directory of a path; none where there is none or it is named for a split alone.
fn top(name: &str) -> Option<&str> {
    let (first, _) = name.split_once('/')?;
    (!SPLITS.iter().any(|(_, words)| words.contains(&first))).then_some(first)
}

fn words(name: &str) -> impl Iterator<Item = &str> {
    name.split(|c: char| !c.is_ascii_alphanumeric())
}

fn canonical(split: &str) -> &str {
    SPLITS.iter().find(|(_, words)| words.contains(&split)).map_or(split, |(name, _)| name)
}

/// The split that a path names; the last word that does counts (`train/test.csv` is a test file).
fn split_of(name: &str) -> Option<&'static str> {
    words(name).filter_map(|w| SPLITS.iter().find(|(_, words)| words.contains(&w))).map(|(name, _)| *name).last()
}

/// Paths of all files below `root`, relative to it, with `/` between parts.
pub fn walk(root: &Path, below: &Path, names: &mut Vec<String>) -> Result<(), DataError> {
    walk_to(root, below, usize::MAX, names)
}

/// As [`walk`], and at most so many folders deep.
fn walk_to(root: &Path, below: &Path, depth: usize, names: &mut Vec<String>) -> Result<(), DataError> {
    let dir = root.join(below);
    let fault = |e: std::io::Error| DataError::user(format!("{}: {e}", dir.display()));
    let mut entries = std::fs::read_dir(&dir).map_err(fault)?.collect::<Result<Vec<_>, _>>().map_err(fault)?;
    entries.sort_by_key(std::fs::DirEntry::file_name);
    for entry in entries {
        let name = below.join(entry.file_name());
        // Entries of the hub's cache are links to blobs, so the link is followed.
        if entry.path().is_dir() {
            if depth > 0 {
                walk_to(root, &name, depth - 1, names)?;
            }
        } else if let Some(text) = name.to_str() {
            names.push(text.to_owned());
        }
    }
    Ok(())
}

/// The folder that a pattern is searched below, and the pattern from there on; none where it is a plain path.
pub fn parts_of_pattern(pattern: &str) -> Option<(&str, &str)> {
    let first = pattern.find(['*', '?'])?;
    Some(pattern.split_at(pattern[..first].rfind('/').map_or(0, |slash| slash + 1)))
}

/// Files that match a pattern of `*`, `**` and `?`, sorted.
pub fn glob(pattern: &str, base: &Path) -> Result<Vec<PathBuf>, DataError> {
    let Some((fixed, rest)) = parts_of_pattern(pattern) else { return Ok(Vec::new()) };
    let root = base.join(fixed);
    if !root.is_dir() {
        return Ok(Vec::new());
    }
    let expression = regex::escape(rest)
        .replace(r"\*\*/", "(?:.*/)?")
        .replace(r"\*\*", ".*")
        .replace(r"\*", "[^/]*")
        .replace(r"\?", "[^/]");
    let matches = Regex::new(&format!("^{expression}$")).map_err(|e| DataError::user(format!("{pattern}: {e}")))?;
    let mut names = Vec::new();
    // A pattern of so many parts matches nothing deeper.
    let depth = if rest.contains("**") { usize::MAX } else { rest.matches('/').count() };
    walk_to(&root, Path::new(""), depth, &mut names)?;
    names.retain(|n| matches.is_match(n));
    names.sort();
    Ok(names.into_iter().map(|n| root.join(n)).collect())
}

/// Returns the resolved path; missing parts at its end are kept as written. Returns `None` if the path goes through a
/// link whose target does not exist.
pub fn resolved(path: &Path) -> Option<PathBuf> {
    let mut real = PathBuf::new();
    for part in std::path::absolute(path).ok()?.components() {
        match part {
            Component::ParentDir => drop(real.pop()),
            part => real.push(part),
        }
        if real.symlink_metadata().is_ok() {
            real = real.canonicalize().ok()?;
        }
    }
    Some(real)
}

/// BLAKE3 over the contents of `files` in order, each preceded by its length; hex.
pub fn content_hash(files: &[PathBuf]) -> Result<String, DataError> {
    let mut hasher = blake3::Hasher::new();
    for path in files {
        let fault = |e: std::io::Error| DataError::external(format!("{}: {e}", path.display()));
        let file = File::open(path).map_err(fault)?;
        hasher.update(&file.metadata().map_err(fault)?.len().to_le_bytes());
        hasher.update_reader(file).map_err(fault)?;
    }
    Ok(hasher.finalize().to_hex().to_string())
}

/// True where the first letter of a JSON file opens an array.
pub fn is_json_array(path: &Path) -> Result<bool, DataError> {
    let fault = |e: std::io::Error| DataError::external(format!("{}: {e}", path.display()));
    for byte in std::io::BufReader::new(File::open(path).map_err(fault)?).bytes() {
        match byte.map_err(fault)? {
            b' ' | b'\t' | b'\r' | b'\n' => {}
            letter => return Ok(letter == b'['),
        }
    }
    Ok(false)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(names: &[&str], split: Option<&str>) -> Result<Vec<String>, String> {
        of_split(names.iter().map(|n| (*n).to_owned()).collect(), split).map(|(n, _)| n).map_err(|e| e.message)
    }

    #[test]
    fn files_of_a_split() {
        let hub =
            ["README.md", "data/train-00001-of-2.parquet", "data/train-00000-of-2.parquet", "data/test-0.parquet"];
        assert_eq!(
            chosen(&hub, Some("train")).unwrap(),
            ["data/train-00000-of-2.parquet", "data/train-00001-of-2.parquet"]
        );
        assert_eq!(chosen(&hub, Some("test")).unwrap(), ["data/test-0.parquet"]);
        assert_eq!(chosen(&["orca_rlhf.jsonl", ".gitattributes"], Some("train")).unwrap(), ["orca_rlhf.jsonl"]);
        assert_eq!(chosen(&["dev.csv", "train.csv"], Some("validation")).unwrap(), ["dev.csv"]);
        assert_eq!(chosen(&["a.csv", "a.parquet"], None).unwrap(), ["a.parquet"]);
        assert_eq!(
            chosen(&["train.csv", "validation.csv"], None).unwrap_err(),
            "has the splits train, validation; choose with split = \"train\""
        );
        assert_eq!(
            chosen(&["train.csv"], Some("test")).unwrap_err(),
            "no data file is named for split \"test\"; there is train"
        );
        assert!(chosen(&["README.md", "dataset_info.json"], None).unwrap_err().starts_with("holds no data file"));
        assert_eq!(
            chosen(&["train_sft/0.parquet", "train_gen/0.parquet"], Some("sft")).unwrap(),
            ["train_sft/0.parquet"]
        );
    }

    #[test]
    fn configurations_are_not_read_as_one() {
        let hub = ["main/train-0.parquet", "main/test-0.parquet", "socratic/train-0.parquet"];
        let expected = "has the configurations main, socratic; choose with split = \"main/train\"";
        assert_eq!(chosen(&hub, Some("train")).unwrap_err(), expected);
        assert_eq!(chosen(&hub, Some("socratic/train")).unwrap(), ["socratic/train-0.parquet"]);
        assert_eq!(chosen(&["train/0.csv", "train/1.csv"], Some("train")).unwrap().len(), 2);
    }

    #[test]
    fn globs_are_sorted_and_stay_in_their_directory() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["b.jsonl", "a.jsonl", "c.txt", "sub/d.jsonl"] {
            let path = dir.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, "{}").unwrap();
        }
        let names = |pattern: &str| -> Vec<String> {
            let found = local(pattern, None, dir.path()).unwrap().0;
            found.iter().map(|p| p.strip_prefix(dir.path()).unwrap().display().to_string()).collect()
        };
        assert_eq!(names("*.jsonl"), ["a.jsonl", "b.jsonl"]);
        assert_eq!(names("**/*.jsonl"), ["a.jsonl", "b.jsonl", "sub/d.jsonl"]);
        assert_eq!(names("sub/?.jsonl"), ["sub/d.jsonl"]);
        assert!(local("nothing.jsonl", None, dir.path()).unwrap_err().message.ends_with("no such file or directory"));
        assert!(local("c.txt", None, dir.path()).unwrap_err().message.contains("the format is not known"));
    }
}
