//! Where the paths of a flow lead, links resolved.

use std::fs;
use std::path::{Component, Path, PathBuf};

use crate::data::files;

/// Whether all that opening `written` may read lies at or below one of `roots`: the path itself, everything in it where
/// it is a folder, everything that it matches where it is a pattern.
pub fn reads_within(base: &Path, written: &str, roots: &[PathBuf]) -> bool {
    let roots: Vec<PathBuf> = roots.iter().filter_map(|root| resolved(root)).collect();
    let path = base.join(written);
    if path.exists() {
        return holds(&path, &roots);
    }
    let Some((folder, pattern)) = files::parts_of_pattern(written) else { return below(&path, &roots) };
    let folder = base.join(folder);
    if pattern.split('/').any(|part| part == "..") || !below(&folder, &roots) {
        return false;
    }
    match pattern.contains("**") {
        true => holds(&folder, &roots),
        // What can't be listed can't be read either, and the stage says why.
        false => files::glob(written, base).unwrap_or_default().iter().all(|file| holds(file, &roots)),
    }
}

/// Whether a file written at `path` would lie below one of `roots`.
pub fn writes_within(path: &Path, roots: &[PathBuf]) -> bool {
    let roots: Vec<PathBuf> = roots.iter().filter_map(|root| resolved(root)).collect();
    below(path, &roots)
}

/// Whether the path leads to or below one of `roots`, which are resolved.
fn below(path: &Path, roots: &[PathBuf]) -> bool {
    resolved(path).is_some_and(|path| roots.iter().any(|root| path.starts_with(root)))
}

/// The same of what is there, and of all that is in it. What is no link lies where its folder does.
fn holds(path: &Path, roots: &[PathBuf]) -> bool {
    below(path, roots) && fs::read_dir(path).into_iter().flatten().flatten().all(|entry| inside(&entry, roots))
}

fn inside(entry: &fs::DirEntry, roots: &[PathBuf]) -> bool {
    match entry.file_type() {
        Ok(kind) if kind.is_symlink() => leads_within(&entry.path(), roots),
        Ok(kind) if kind.is_dir() => {
            fs::read_dir(entry.path()).into_iter().flatten().flatten().all(|inner| inside(&inner, roots))
        }
        Ok(_) => true,
        Err(_) => false,
    }
}

/// A link into a root leads to what is read in its own right; one back to a folder that it is in ends there.
fn leads_within(link: &Path, roots: &[PathBuf]) -> bool {
    let Ok(there) = link.canonicalize() else { return true };
    let returns = link.parent().and_then(|folder| folder.canonicalize().ok()).is_some_and(|f| f.starts_with(&there));
    roots.iter().any(|root| there.starts_with(root)) && (returns || holds(&there, roots))
}

/// The path as the system would find it, once what is not there yet is made. None where it goes through a link to what
/// is not there: that would lead wherever the link says.
fn resolved(path: &Path) -> Option<PathBuf> {
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

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn paths_are_where_they_lead() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("data");
        for folder in ["data/in", "data/linked", "data/deep/a", "data/good", "data/round", "private"] {
            fs::create_dir_all(dir.path().join(folder)).unwrap();
        }
        for file in ["data/in/a.jsonl", "secret.jsonl", "private/b.jsonl", "data/b.jsonl", "data/linked/ok.jsonl"] {
            fs::write(dir.path().join(file), "{}").unwrap();
        }
        for (to, link) in [
            ("", "data/out"),
            ("secret.jsonl", "data/linked/link.jsonl"),
            ("secret.jsonl", "data/deep/a/link.jsonl"),
            ("private", "data/[x]"),
            ("data/in/a.jsonl", "data/good/a.jsonl"),
            ("data/in", "data/good/in"),
            ("data/round", "data/round/again"),
            ("later.jsonl", "data/new.jsonl"),
        ] {
            symlink(dir.path().join(to), dir.path().join(link)).unwrap();
        }
        let roots = [root.clone()];
        for (path, allowed) in [
            ("in/a.jsonl", true),
            ("in/new.jsonl", true),
            ("in/*.jsonl", true),
            ("in/../in/a.jsonl", true),
            ("*.jsonl", false),
            ("b*.jsonl", true),
            ("in", true),
            ("good", true),
            ("good/**", true),
            ("round", true),
            ("round/*", true),
            ("linked/ok.jsonl", true),
            ("linked/o*", true),
            ("linked", false),
            ("linked/*", false),
            ("linked/l*.jsonl", false),
            ("linked/link.jsonl", false),
            ("deep", false),
            ("deep/*", false),
            ("deep/**/*.jsonl", false),
            ("deep/*/*.jsonl", false),
            ("**", false),
            (".", false),
            ("[x]/b.jsonl", false),
            ("[x]/*", false),
            ("new.jsonl", false),
            ("../secret.jsonl", false),
            ("in/../../secret.jsonl", false),
            ("out/secret.jsonl", false),
            ("out/*", false),
            ("o*/secret.jsonl", false),
            ("out/pri*/*", false),
            ("in/*/../../../secret.jsonl", false),
            ("new/../../secret.jsonl", false),
            ("/etc/passwd", false),
        ] {
            assert_eq!(reads_within(&root, path, &roots), allowed, "{path}");
        }
        assert!(!reads_within(dir.path(), "data2", &roots));
    }
}
