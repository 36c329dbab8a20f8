//! Which cgroups are excluded: `--socket-exclude-cgroup GLOB`.

use std::{
    collections::BTreeSet,
    fs,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

/// Patterns on paths below the node's cgroup: `*` is anything within one name, `**` anything at all, `?` one character.
#[derive(Clone, Debug)]
pub struct Exclusions {
    root: PathBuf,
    globs: Vec<String>,
}

impl Exclusions {
    /// Patterns for cgroups below `root`.
    pub fn new(root: PathBuf, globs: &[String]) -> Self {
        let globs = globs
            .iter()
            .map(|glob| glob.trim_matches('/').to_owned())
            .collect();
        Self { root, globs }
    }

    /// Whether there is no pattern.
    pub fn is_empty(&self) -> bool {
        self.globs.is_empty()
    }

    /// Ids of the cgroups that match; those below them are excluded with them. A cgroup that goes away meanwhile is none.
    pub fn cgroups(&self) -> BTreeSet<u64> {
        let mut found = BTreeSet::new();
        if !self.is_empty() {
            self.search(&self.root, "", &mut found);
        }
        found
    }

    fn search(&self, dir: &Path, relative: &str, found: &mut BTreeSet<u64>) {
        let Ok(entries) = fs::read_dir(dir) else {
            return;
        };
        for entry in entries.flatten() {
            let Ok(metadata) = entry.metadata() else {
                continue;
            };
            if !metadata.is_dir() {
                continue;
            }
            let name = entry.file_name();
            let name = name.to_string_lossy();
            let path = if relative.is_empty() {
                name.into_owned()
            } else {
                format!("{relative}/{name}")
            };
            if self
                .globs
                .iter()
                .any(|glob| matches(glob.as_bytes(), path.as_bytes()))
            {
                // A cgroup's id is its inode number (v5.5, 67c0496e87d1).
                found.insert(metadata.ino());
            } else {
                self.search(&entry.path(), &path, found);
            }
        }
    }
}

fn matches(glob: &[u8], text: &[u8]) -> bool {
    match glob {
        [] => text.is_empty(),
        [b'*', b'*', rest @ ..] => (0..=text.len()).any(|at| matches(rest, &text[at..])),
        [b'*', rest @ ..] => {
            let end = text
                .iter()
                .position(|byte| *byte == b'/')
                .unwrap_or(text.len());
            (0..=end).any(|at| matches(rest, &text[at..]))
        }
        [b'?', rest @ ..] => match text {
            [byte, after @ ..] => *byte != b'/' && matches(rest, after),
            [] => false,
        },
        [byte, rest @ ..] => match text {
            [first, after @ ..] => byte == first && matches(rest, after),
            [] => false,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn globs_match_whole_paths() {
        for (glob, path, expected) in [
            ("kubepods/mesh", "kubepods/mesh", true),
            ("kubepods/*", "kubepods/pod1", true),
            ("kubepods/*", "kubepods/pod1/c", false),
            ("**/mesh-*", "kubepods/pod1/mesh-a", true),
            ("pod?", "pod1", true),
            ("pod?", "pod", false),
            ("*", "a/b", false),
        ] {
            assert_eq!(
                matches(glob.as_bytes(), path.as_bytes()),
                expected,
                "{glob} on {path}"
            );
        }
    }

    #[test]
    fn the_topmost_match_excludes_what_is_below_it() {
        let root = tempfile::tempdir().unwrap();
        for dir in ["a/mesh/inner", "b/mesh", "b/other"] {
            fs::create_dir_all(root.path().join(dir)).unwrap();
        }
        let inode = |dir: &str| fs::metadata(root.path().join(dir)).unwrap().ino();
        let exclusions = Exclusions::new(root.path().to_owned(), &["**/mesh/".to_owned()]);
        assert_eq!(
            exclusions.cgroups(),
            [inode("a/mesh"), inode("b/mesh")].into()
        );
        assert!(
            Exclusions::new(root.path().to_owned(), &[])
                .cgroups()
                .is_empty()
        );
    }
}
