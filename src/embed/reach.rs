//! Checks where the paths of a flow lead after links are resolved.

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};

use crate::data::files::{self, resolved};

/// Returns whether everything that `written` can read is at or below one of `roots`: the file; for a folder everything in it;
/// for a pattern everything that it matches.
pub fn reads_within(base: &Path, written: &str, roots: &[PathBuf]) -> bool {
    let mut walk = Walk::within(roots);
    let path = base.join(written);
    if path.exists() {
        return walk.holds(&path);
    }
    let Some((folder, pattern)) = files::parts_of_pattern(written) else { return walk.is_below(&path) };
    let folder = base.join(folder);
    if pattern.split('/').any(|part| part == "..") || !walk.is_below(&folder) {
        return false;
    }
    match pattern.contains("**") {
        true => walk.holds(&folder),
        // What can't be listed can't be read either, and the stage says why.
        false => files::glob(written, base).unwrap_or_default().iter().all(|file| walk.holds(file)),
    }
}

/// Returns whether a file written to `path` would be below one of `roots`.
pub fn writes_within(path: &Path, roots: &[PathBuf]) -> bool {
    Walk::within(roots).is_below(path)
}

/// A walk over everything below a path.
struct Walk {
    /// The allowed directories, with links resolved.
    roots: Vec<PathBuf>,
    /// Targets of links that were already visited; links may form a cycle.
    seen: HashSet<PathBuf>,
}

impl Walk {
    fn within(roots: &[PathBuf]) -> Self {
        Self { roots: roots.iter().filter_map(|root| resolved(root)).collect(), seen: HashSet::new() }
    }

    /// Returns whether the resolved path is at or below one of the roots.
    fn is_below(&self, path: &Path) -> bool {
        resolved(path).is_some_and(|path| self.roots.iter().any(|root| path.starts_with(root)))
    }

    /// Returns whether the path and everything in it are at or below one of the roots.
    fn holds(&mut self, path: &Path) -> bool {
        self.is_below(path) && self.holds_entries(path)
    }

    /// Returns whether everything in the folder is allowed. Only links need a check, because other entries are inside the
    /// folder.
    fn holds_entries(&mut self, path: &Path) -> bool {
        fs::read_dir(path).into_iter().flatten().flatten().all(|entry| match entry.file_type() {
            Ok(kind) if kind.is_symlink() => self.follows(&entry.path()),
            Ok(kind) if kind.is_dir() => self.holds_entries(&entry.path()),
            Ok(_) => true,
            Err(_) => false,
        })
    }

    /// Returns whether the target of a link is allowed. A link without a target is allowed, because nothing can be read
    /// through it.
    fn follows(&mut self, link: &Path) -> bool {
        let Ok(there) = link.canonicalize() else { return true };
        !self.seen.insert(there.clone()) || self.holds(&there)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn paths_are_where_they_lead() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("data");
        for folder in [
            "data/in",
            "data/linked",
            "data/deep/a",
            "data/good",
            "data/round",
            "data/ring/a",
            "data/ring/b",
            "private",
        ] {
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
            ("data/ring/b", "data/ring/a/b"),
            ("data/ring/a", "data/ring/b/a"),
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
            ("ring", true),
            ("ring/a/b/a/b", true),
            ("linked/ok.jsonl", true),
            ("linked/o*", true),
            ("linked", false),
            ("linked/*", false),
            ("linked/l*.jsonl", false),
            ("linked/link.jsonl", false),
            ("deep", false),
            ("deep/*", true),
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
