//! Which cgroups are excluded: `--socket-exclude-cgroup GLOB`, and with `--socket-exclude-pods` those of pods that ask for it,
//! followed live.

use std::{
    collections::BTreeSet,
    fs, io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use inotify::{Inotify, WatchMask};
use tokio::{io::unix::AsyncFd, sync::watch};

/// After this long cgroups are looked through even without an event.
const RESCAN: Duration = Duration::from_secs(1);
/// Room for the events of one reading; what they say does not matter, only that there are some.
const BUFFER_BYTES: usize = 4096;

/// Patterns on paths below the node's cgroup: `*` is anything within one name, `**` anything at all, `?` one character.
#[derive(Clone, Debug)]
pub struct Exclusions {
    root: PathBuf,
    globs: Vec<String>,
    pods: Option<watch::Receiver<BTreeSet<String>>>,
}

impl Exclusions {
    /// Patterns for cgroups below `root`; of `pods`, by their unique ids, all.
    pub fn new(
        root: PathBuf,
        globs: &[String],
        pods: Option<watch::Receiver<BTreeSet<String>>>,
    ) -> Self {
        let globs = globs
            .iter()
            .map(|glob| glob.trim_matches('/').to_owned())
            .collect();
        Self { root, globs, pods }
    }

    /// Ids of the cgroups that match; those below them are excluded with them. A cgroup that goes away meanwhile is none.
    pub fn cgroups(&self) -> BTreeSet<u64> {
        self.search_all(&mut |_| {})
    }

    /// Calls `excluded` with the matching cgroups whenever they change, on a thread of its own. Without patterns and pods there
    /// is nothing to follow.
    ///
    /// # Errors
    /// No thread, no runtime or no inotify instance to be had.
    pub fn follow(self, excluded: impl Fn(BTreeSet<u64>) + Send + 'static) -> io::Result<()> {
        if !self.has_any() {
            return Ok(());
        }
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let inotify = {
            let _inside = runtime.enter();
            // SAFETY: an `Inotify` owns its descriptor, and keeps the same one until it is dropped.
            unsafe { AsyncFd::register(Inotify::init()?) }?
        };
        let work = move || runtime.block_on(self.run(inotify, &excluded));
        thread::Builder::new()
            .name("exclusions".to_owned())
            .spawn(work)
            .map(drop)
    }

    fn has_any(&self) -> bool {
        !self.globs.is_empty() || self.pods.is_some()
    }

    async fn run(mut self, mut inotify: AsyncFd<Inotify>, excluded: &dyn Fn(BTreeSet<u64>)) {
        let mask = WatchMask::CREATE | WatchMask::DELETE | WatchMask::ONLYDIR;
        let mut last = None;
        let mut buffer = [0; BUFFER_BYTES];
        loop {
            // Watched before it is listed, so that nothing new goes unseen. A watch that cannot be had costs a second.
            let mut watches = inotify.get_ref().watches();
            let found = self.search_all(&mut |dir| {
                let _ = watches.add(dir, mask);
            });
            if last.as_ref() != Some(&found) {
                excluded(found.clone());
                last = Some(found);
            }
            tokio::select! {
                ready = inotify.readable_mut() => {
                    let Ok(mut ready) = ready else { continue };
                    while ready
                        .get_inner_mut()
                        .read_events(&mut buffer)
                        .is_ok_and(|mut events| events.next().is_some())
                    {}
                    ready.clear_ready();
                }
                () = changed(&mut self.pods) => {}
                () = tokio::time::sleep(RESCAN) => {}
            }
        }
    }

    fn search_all(&self, enter: &mut dyn FnMut(&Path)) -> BTreeSet<u64> {
        let mut found = BTreeSet::new();
        if self.has_any() {
            let pods = self.pods.as_ref().map(|pods| pods.borrow().clone());
            let names = pods.into_iter().flatten().flat_map(|uid| pod_names(&uid));
            let names: Vec<String> = names.collect();
            self.search(&self.root, "", &names, enter, &mut found);
        }
        found
    }

    fn search(
        &self,
        dir: &Path,
        relative: &str,
        pods: &[String],
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
            let is_excluded = self
                .globs
                .iter()
                .any(|glob| matches(glob.as_bytes(), path.as_bytes()))
                || pods.iter().any(|end| path.ends_with(end));
            if is_excluded {
                // A cgroup's id is its inode number (v5.5, 67c0496e87d1).
                found.insert(metadata.ino());
            } else {
                self.search(&entry.path(), &path, pods, enter, found);
            }
        }
    }
}

/// How the path of a pod's cgroup ends, with either driver (pkg/kubelet/cm/pod_container_manager_linux.go,
/// `GetPodContainerNameDriver`): `…/podUID`, or `…-podU_I_D.slice`.
fn pod_names(uid: &str) -> [String; 2] {
    let of_systemd = uid.replace('-', "_");
    [format!("/pod{uid}"), format!("-pod{of_systemd}.slice")]
}

/// Until there are other pods; for ever, if there are none or nobody tells any more.
async fn changed(pods: &mut Option<watch::Receiver<BTreeSet<String>>>) {
    let is_told = match pods {
        Some(pods) => pods.changed().await.is_ok(),
        None => false,
    };
    if !is_told {
        std::future::pending().await
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
        let exclusions = Exclusions::new(root.path().to_owned(), &["**/mesh/".to_owned()], None);
        assert_eq!(
            exclusions.cgroups(),
            [inode("a/mesh"), inode("b/mesh")].into()
        );
        let none = Exclusions::new(root.path().to_owned(), &[], None);
        assert!(none.cgroups().is_empty());
    }

    #[test]
    fn a_new_cgroup_is_excluded_as_soon_as_it_is_there() {
        let root = tempfile::tempdir().unwrap();
        let (told, tells) = std::sync::mpsc::channel();
        let exclusions = Exclusions::new(root.path().to_owned(), &["pods/*/mesh".to_owned()], None);
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

    #[test]
    fn pods_are_found_by_their_ids_with_either_driver() {
        let root = tempfile::tempdir().unwrap();
        let (told, tells) = std::sync::mpsc::channel();
        let (pods, follows) = watch::channel(BTreeSet::new());
        let exclusions = Exclusions::new(root.path().to_owned(), &[], Some(follows));
        let by_driver = [
            "kubepods/besteffort/pod1-2-3/container",
            "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod4_5.slice",
        ];
        for dir in by_driver {
            fs::create_dir_all(root.path().join(dir)).unwrap();
        }
        exclusions.follow(move |set| drop(told.send(set))).unwrap();
        let deadline = Duration::from_secs(10);
        assert_eq!(tells.recv_timeout(deadline).unwrap(), BTreeSet::new());
        let inode = |dir: &str| fs::metadata(root.path().join(dir)).unwrap().ino();
        let first = inode("kubepods/besteffort/pod1-2-3");
        pods.send_replace(["1-2-3".to_owned()].into());
        assert_eq!(tells.recv_timeout(deadline).unwrap(), [first].into());
        pods.send_replace(["1-2-3", "4-5", "6"].map(str::to_owned).into());
        let both = [first, inode(by_driver[1])];
        assert_eq!(tells.recv_timeout(deadline).unwrap(), both.into());
        // Nobody tells any more: they stay.
        drop(pods);
        fs::create_dir_all(root.path().join("kubepods/pod6")).unwrap();
        let all = [both[0], both[1], inode("kubepods/pod6")];
        assert_eq!(tells.recv_timeout(deadline).unwrap(), all.into());
    }
}
