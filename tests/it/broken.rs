//! Broken data, flows and models, and the whole message about each. The cases are those of `tests/fixtures/broken`; its
//! README.md says how one is written. `FLOWRUN_GOLDEN=write` writes down what the program says.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use serde::Deserialize;
use serde_json::Value;
use tempfile::TempDir;

use crate::support::{Case, stderr};

/// Cases of one file that run at the same time.
const THREADS: usize = 2;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Cases {
    /// What several cases begin with.
    bases: BTreeMap<String, Broken>,
    case: Vec<Broken>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
struct Broken {
    name: String,
    args: Option<Vec<String>>,
    base: Option<String>,
    change: Vec<(String, String)>,
    flow: String,
    copy: BTreeMap<String, PathBuf>,
    files: BTreeMap<String, String>,
    lines: BTreeMap<String, Vec<(usize, String)>>,
    hex: BTreeMap<String, String>,
    json: BTreeMap<String, BTreeMap<String, Value>>,
    remove: Vec<String>,
    cut: BTreeMap<String, u64>,
    todo: bool,
    told: String,
}

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")
}

fn write(path: &Path, bytes: Vec<u8>) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, bytes).unwrap();
}

/// A file, or the files of a folder without those of its folders.
fn copy(from: &Path, to: &Path) {
    if from.is_file() {
        return write(to, fs::read(from).unwrap());
    }
    let files = fs::read_dir(from).unwrap().map(|entry| entry.unwrap().path()).filter(|path| path.is_file());
    files.for_each(|path| copy(&path, &to.join(path.file_name().unwrap())));
}

impl Broken {
    fn write(&self, case: &Case) {
        self.copy.iter().for_each(|(to, from)| copy(&fixtures().join(from), &case.path(to)));
        self.files.iter().for_each(|(name, text)| write(&case.path(name), text.clone().into_bytes()));
        for (name, lines) in &self.lines {
            let text: String = lines.iter().map(|(times, line)| format!("{line}\n").repeat(*times)).collect();
            write(&case.path(name), text.into_bytes());
        }
        for (name, hex) in &self.hex {
            let digits: Vec<u32> = hex.chars().filter_map(|c| c.to_digit(16)).collect();
            write(&case.path(name), digits.chunks(2).map(|pair| (pair[0] * 16 + pair[1]) as u8).collect());
        }
        for (name, keys) in &self.json {
            let mut value: Value = serde_json::from_str(&fs::read_to_string(case.path(name)).unwrap()).unwrap();
            keys.iter().for_each(|(key, new)| value[key] = new.clone());
            case.write(name, &value.to_string());
        }
        self.remove.iter().for_each(|name| fs::remove_file(case.path(name)).unwrap());
        for (name, length) in &self.cut {
            fs::File::options().write(true).open(case.path(name)).unwrap().set_len(*length).unwrap();
        }
    }

    /// The exit code and all that is written to stderr, without the progress of a run.
    fn run(&self, bases: &BTreeMap<String, Self>) -> (i32, String) {
        let (case, fixtures) = (Case { dir: TempDir::new().unwrap() }, fixtures().display().to_string());
        let base = self.base.as_ref().map(|name| &bases[name]);
        let whole = base.map_or("", |base| &base.flow).to_owned() + &self.flow;
        let flow = self.change.iter().fold(whole, |flow, (from, to)| {
            assert_eq!(flow.matches(from).count(), 1, "{}: {from:?} is to be changed", self.name);
            flow.replace(from, to)
        });
        case.write("flow.toml", &flow.replace("FIXTURES", &fixtures));
        base.into_iter().chain([self]).for_each(|part| part.write(&case));
        let args = self.args.clone().unwrap_or_else(|| vec!["check".to_owned(), "flow.toml".to_owned()]);
        let output = case.command(&args.iter().map(String::as_str).collect::<Vec<_>>()).output().unwrap();
        let told = stderr(&output).replace(case.dir.path().to_str().unwrap(), "DIR").replace(&fixtures, "FIXTURES");
        let told = told.split_inclusive('\n').filter(|line| !line.starts_with("round ")).collect();
        (output.status.code().unwrap_or(-1), told)
    }

    /// What differs from what is written down, or breaks a rule that holds for every message.
    fn fault(&self, (code, told): &(i32, String)) -> Option<String> {
        let fault = match told.lines().filter(|line| line.starts_with("error: ")).count() {
            _ if *code != 2 => format!("ends with {code} in place of 2"),
            errors if errors != 1 || told.contains("panicked") => "is not told in one message".to_owned(),
            _ if *told != self.told => format!("is told in place of\n{}", self.told),
            _ => return None,
        };
        Some(format!("{}\n{told}{fault}", self.name))
    }
}

/// The text of the cases with what was told; `told` is the last key of a case.
fn written(text: &str, results: &BTreeMap<usize, (i32, String)>) -> String {
    let mut parts = text.split("\n[[case]]\n");
    let head = parts.next().unwrap().to_owned();
    parts.zip(results.values()).fold(head, |text, (part, (_, told))| {
        let keys = part.split("\ntold = ").next().unwrap().trim_end();
        assert!(!told.contains("'''"), "{told}");
        format!("{text}\n[[case]]\n{keys}\ntold = '''\n{told}'''\n")
    })
}

fn as_written(file: &str) {
    let path = fixtures().join("broken").join(file);
    let text = fs::read_to_string(&path).unwrap();
    let Cases { bases, case } = toml::from_str(&text).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let rewrite = std::env::var("FLOWRUN_GOLDEN").is_ok_and(|wanted| wanted == "write");
    let (todo, done): (Vec<_>, Vec<_>) = case.iter().partition(|case| case.todo && !rewrite);
    let worker = |next: &AtomicUsize| {
        let taken = std::iter::repeat_with(|| next.fetch_add(1, Ordering::Relaxed));
        taken.map_while(|i| Some((i, done.get(i)?.run(&bases)))).collect::<Vec<_>>()
    };
    let next = AtomicUsize::new(0);
    let results = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..THREADS).map(|_| scope.spawn(|| worker(&next))).collect();
        threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
    });
    if rewrite {
        return fs::write(&path, written(&text, &results)).unwrap();
    }
    let names: Vec<_> = todo.iter().map(|case| case.name.as_str()).collect();
    println!("{file}: {} cases, and still to be put right: {}", done.len(), names.join("; "));
    let faults: Vec<_> = done.iter().zip(results.values()).filter_map(|(case, result)| case.fault(result)).collect();
    assert!(faults.is_empty(), "{}: {}", path.display(), faults.join("\n\n"));
}

#[test]
fn broken_data_is_told_as_written() {
    as_written("data.toml");
}

#[test]
fn broken_flows_are_told_as_written() {
    as_written("flows.toml");
}

#[test]
fn broken_models_are_told_as_written() {
    as_written("models.toml");
}
