//! Which cgroups are excluded: `--socket-exclude-cgroup GLOB`, followed live.

use std::{
    collections::BTreeSet,
    fs, io,
    os::{fd::AsFd as _, unix::fs::MetadataExt as _},
    path::{Path, PathBuf},
    thread,
};

use inotify::{Inotify, WatchMask};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// Milliseconds after which cgroups are looked through even without an event.
const RESCAN_MS: u16 = 1000;
/// Room for the events of one reading; what they say does not matter, only that there are some.
const BUFFER_BYTES: usize = 4096;

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

    /// Ids of the cgroups that match; those below them are excluded with them. A cgroup that goes away meanwhile is none.
    pub fn cgroups(&self) -> BTreeSet<u64> {
        self.search_all(&mut |_| {})
    }

    /// Calls `excluded` with the matching cgroups whenever they change, on a thread of its own. Without patterns there is
    /// nothing to follow.
    ///
    /// # Errors
    /// No thread or no inotify instance to be had.
    pub fn follow(self, excluded: impl Fn(BTreeSet<u64>) + Send + 'static) -> io::Result<()> {
        if self.globs.is_empty() {
            return Ok(());
        }
        let inotify = Inotify::init()?;
        let work = move || self.run(inotify, &excluded);
        thread::Builder::new()
            .name("exclusions".to_owned())
            .spawn(work)
            .map(drop)
    }

    fn run(&self, mut inotify: Inotify, excluded: &dyn Fn(BTreeSet<u64>)) {
        let mask = WatchMask::CREATE | WatchMask::DELETE | WatchMask::ONLYDIR;
        let mut last = None;
        let mut buffer = [0; BUFFER_BYTES];
        loop {
            // Watched before it is listed, so that nothing new goes unseen. A watch that cannot be had costs a second.
            let found = self.search_all(&mut |dir| {
                let _ = inotify.watches().add(dir, mask);
            });
            if last.as_ref() != Some(&found) {
                excluded(found.clone());
                last = Some(found);
            }
            let mut fds = [PollFd::new(inotify.as_fd(), PollFlags::POLLIN)];
            if poll(&mut fds, PollTimeout::from(RESCAN_MS)).is_ok_and(|ready| ready > 0) {
                while inotify
                    .read_events(&mut buffer)
                    .is_ok_and(|mut events| events.next().is_some())
                {}
            }
        }
    }

    fn search_all(&self, enter: &mut dyn FnMut(&Path)) -> BTreeSet<u64> {
        let mut found = BTreeSet::new();
        if !self.globs.is_empty() {
            self.search(&self.root, "", enter, &mut found);
        }
        found
    }

    fn search(
        &self,
        dir: &Path,
        relative: &str,
        enter: &mut dyn FnMut(&Path),
        found: &mut BTreeSet<u64>,
    ) {
        enter(dir);
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
                self.search(&entry.path(), &path, enter, found);
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
        let none = Exclusions::new(root.path().to_owned(), &[]);
        assert!(none.cgroups().is_empty());
    }

    #[test]
    fn a_new_cgroup_is_excluded_as_soon_as_it_is_there() {
        let root = tempfile::tempdir().unwrap();
        let (told, tells) = std::sync::mpsc::channel();
        let exclusions = Exclusions::new(root.path().to_owned(), &["pods/*/mesh".to_owned()]);
        exclusions.follow(move |set| drop(told.send(set))).unwrap();
        let deadline = std::time::Duration::from_secs(10);
        assert_eq!(tells.recv_timeout(deadline).unwrap(), BTreeSet::new());
        let late = root.path().join("pods/one/mesh");
        fs::create_dir_all(&late).unwrap();
        let inode = fs::metadata(&late).unwrap().ino();
        assert_eq!(tells.recv_timeout(deadline).unwrap(), [inode].into());
        fs::remove_dir(&late).unwrap();
        assert_eq!(tells.recv_timeout(deadline).unwrap(), BTreeSet::new());
    }
}
