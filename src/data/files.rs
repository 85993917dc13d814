//! Which files a data set is: one file, a glob, or a directory laid out like a hub data set.

use std::fmt;
use std::fs::File;
use std::path::{Component, Path, PathBuf};

use regex::Regex;
use serde::Deserialize;

use super::splits::{self, Wanted};
use super::{DataError, text};

/// File formats, in the order of preference where a directory has several.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Format {
    Parquet,
    JsonLines,
    Csv,
    Tsv,
    Arrow,
    /// An array, or whatever stands beside the data: reports and manifests.
    Json,
}

impl Format {
    /// By extension; that of a compression may follow the extension of a text.
    pub fn of(path: &Path) -> Option<Self> {
        let name = path.file_name()?.to_str()?.to_ascii_lowercase();
        let plain = text::bytes::EXTENSIONS.iter().find_map(|end| name.strip_suffix(&format!(".{end}")));
        Some(match (plain.unwrap_or(&name).rsplit_once('.')?.1, plain) {
            ("parquet", None) => Self::Parquet,
            ("arrow", None) => Self::Arrow,
            ("jsonl" | "ndjson", _) => Self::JsonLines,
            ("json", _) => Self::Json,
            ("csv", _) => Self::Csv,
            ("tsv", _) => Self::Tsv,
            _ => return None,
        })
    }

    /// Returns whether files of both are read alike.
    fn reads_as(self, other: Self) -> bool {
        let kind = |format| if format == Self::Json { Self::JsonLines } else { format };
        kind(self) == kind(other)
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Parquet => "Parquet",
            Self::JsonLines | Self::Json => "JSON",
            Self::Csv => "CSV",
            Self::Tsv => "TSV",
            Self::Arrow => "Arrow",
        })
    }
}

pub const FORMATS: &str =
    ".parquet, .arrow, or .jsonl, .json, .csv and .tsv, also with .gz, .zst, .bz2 or .xz after it";

/// The files of a local data set, and those beside them that are not read.
#[derive(Debug, Clone)]
pub struct Local {
    pub files: Vec<PathBuf>,
    pub format: Format,
    pub beside: Vec<String>,
}

/// The files of a local `dataset`, sorted by path, all of one format.
///
/// # Errors
/// Nothing is there, a format isn't known, or [`splits::choose`] has none.
pub fn local(dataset: &str, wanted: Wanted<'_>, base: &Path) -> Result<Local, DataError> {
    let path = base.join(dataset);
    if path.is_dir() {
        return below(&path, wanted).map_err(|e| e.at(path.display()));
    }
    // A file is its own split: a flow written for the hub runs on a local file with one key changed.
    let found = if path.is_file() { vec![path.clone()] } else { glob(dataset, base)? };
    let Some(first) = found.first() else {
        return Err(DataError::user(format!("{dataset}: {}", missing(dataset, base))));
    };
    let format = Format::of(first)
        .ok_or_else(|| DataError::user(format!("{}: the format is not known; use {FORMATS}", first.display())))?;
    match found.iter().find(|file| !Format::of(file).is_some_and(|other| other.reads_as(format))) {
        Some(other) => {
            Err(DataError::user(format!("{dataset}: {} is not {format} like the first file", other.display())))
        }
        None => Ok(Local { files: found, format, beside: Vec::new() }),
    }
}

/// The reason why nothing is at `dataset`, with a suggestion.
fn missing(dataset: &str, base: &Path) -> String {
    if dataset.contains("://") {
        return "addresses are not read; download the file, or name a data set of the hub as hf://OWNER/NAME".into();
    }
    if dataset.contains(['*', '?']) {
        return "no file matches this pattern; paths start at the flow file's folder".into();
    }
    let missing = "no such file or directory; paths start at the flow file's folder";
    let path = Path::new(dataset);
    let is_hub_name = path.components().count() == 2 && path.extension().is_none() && !dataset.starts_with('.');
    if is_hub_name && path.parent().is_some_and(|owner| !base.join(owner).exists()) {
        return format!("{missing}; a data set of the hub is written hf://{dataset}");
    }
    let names = std::fs::read_dir(base.join(path.parent().unwrap_or(path))).into_iter().flatten().flatten();
    let names: Vec<String> = names.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    let wanted = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let near = names.iter().map(|name| (strsim::damerau_levenshtein(name, &wanted), name)).min();
    match near.filter(|(distance, name)| *distance <= 1 + name.len() / 4) {
        Some((_, name)) => format!("{missing}; did you mean {}?", path.with_file_name(name).display()),
        None => missing.into(),
    }
}

/// The files of a folder: what `save_to_disk` of datasets left, or a folder laid out like a data set of the hub.
fn below(path: &Path, wanted: Wanted<'_>) -> Result<Local, DataError> {
    if let Some(folder) = saved_split(path, wanted)? {
        return below(&folder, Wanted::default());
    }
    if let Some(names) = saved_files(path)? {
        let mut names_below = Vec::new();
        walk_to(path, Path::new(""), 0, &mut names_below)?;
        names_below.retain(|name| Format::of(Path::new(name)) == Some(Format::Arrow) && !names.contains(name));
        let files: Vec<PathBuf> = names.into_iter().map(|name| path.join(name)).collect();
        return Ok(Local { files, format: Format::Arrow, beside: names_below });
    }
    let mut names = Vec::new();
    walk(path, Path::new(""), &mut names)?;
    let readme = std::fs::read_to_string(path.join("README.md")).ok();
    let chosen = splits::choose(names, readme.as_deref(), wanted)?;
    let files = chosen.names.into_iter().map(|name| path.join(name)).collect();
    Ok(Local { files, format: chosen.format, beside: chosen.beside })
}

/// The files that `state.json` of a saved data set names; whatever else lies there is a cache.
fn saved_files(path: &Path) -> Result<Option<Vec<String>>, DataError> {
    #[derive(Deserialize)]
    struct State {
        #[serde(rename = "_data_files")]
        data_files: Vec<DataFile>,
    }
    #[derive(Deserialize)]
    struct DataFile {
        filename: String,
    }
    let Ok(text) = std::fs::read(path.join("state.json")) else { return Ok(None) };
    let Ok(state) = serde_json::from_slice::<State>(&text) else { return Ok(None) };
    let names: Vec<String> = state.data_files.into_iter().map(|file| file.filename).collect();
    match names.iter().find(|name| !path.join(name).is_file()) {
        Some(missing) => Err(DataError::user(format!("state.json names {missing}, which is not there"))),
        None => Ok(Some(names).filter(|names| !names.is_empty())),
    }
}

/// The folder of the wanted split in a saved dictionary of data sets.
fn saved_split(path: &Path, wanted: Wanted<'_>) -> Result<Option<PathBuf>, DataError> {
    #[derive(Deserialize)]
    struct Dictionary {
        splits: Vec<String>,
    }
    let Ok(text) = std::fs::read(path.join("dataset_dict.json")) else { return Ok(None) };
    let Ok(Dictionary { splits }) = serde_json::from_slice::<Dictionary>(&text) else { return Ok(None) };
    let names: Vec<&str> = splits.iter().map(String::as_str).collect();
    splits::one_of(wanted.split, &names).map(|split| Some(path.join(split)))
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

/// The expression of a pattern of `*`, `**` and `?`.
pub fn pattern(pattern: &str) -> Result<Regex, DataError> {
    let expression = regex::escape(pattern)
        .replace(r"\*\*/", "(?:.*/)?")
        .replace(r"\*\*", ".*")
        .replace(r"\*", "[^/]*")
        .replace(r"\?", "[^/]");
    Regex::new(&format!("^{expression}$")).map_err(|e| DataError::user(format!("{pattern}: {e}")))
}

/// Files that match a pattern of `*`, `**` and `?`, sorted.
pub fn glob(pattern: &str, base: &Path) -> Result<Vec<PathBuf>, DataError> {
    let Some((fixed, rest)) = parts_of_pattern(pattern) else { return Ok(Vec::new()) };
    let root = base.join(fixed);
    if !root.is_dir() {
        return Ok(Vec::new());
    }
    let matches = self::pattern(rest)?;
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn globs_are_sorted_and_stay_in_their_directory() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["b.jsonl", "a.jsonl", "c.txt", "sub/d.jsonl"] {
            let path = dir.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, "{}").unwrap();
        }
        let names = |pattern: &str| -> Vec<String> {
            let found = local(pattern, Wanted::default(), dir.path()).unwrap().files;
            found.iter().map(|p| p.strip_prefix(dir.path()).unwrap().display().to_string()).collect()
        };
        assert_eq!(names("*.jsonl"), ["a.jsonl", "b.jsonl"]);
        assert_eq!(names("**/*.jsonl"), ["a.jsonl", "b.jsonl", "sub/d.jsonl"]);
        assert_eq!(names("sub/?.jsonl"), ["sub/d.jsonl"]);
        assert!(
            local("nothing.jsonl", Wanted::default(), dir.path())
                .unwrap_err()
                .message
                .starts_with("nothing.jsonl: no such file or directory")
        );
        assert!(local("c.txt", Wanted::default(), dir.path()).unwrap_err().message.contains("the format is not known"));
    }
}
