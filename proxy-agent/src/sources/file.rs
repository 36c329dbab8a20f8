//! A folder of ordinary Kubernetes manifests, followed live.
//!
//! Files end in `.yaml`, `.yml` or `.json`. One close after writing, one rename, or one swap of a ConfigMap volume's link is
//! one consistent change. Without the folder itself everything stays as it is until the folder is back.

use std::{
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use tokio::sync::{mpsc, watch};

pub use self::manifests::Manifests;
use self::watcher::{Touched, Watcher};
use super::Problem;
use crate::model::{NodeName, Objects, Update};

mod content;
mod locate;
mod manifests;
mod object;
mod walk;
mod watcher;

/// A burst of changes is over when nothing came for this long,
const QUIET: Duration = Duration::from_millis(20);
/// or after this long.
const BURST: Duration = Duration::from_millis(200);
/// How often the thread looks whether it is still needed.
const IDLE: Duration = Duration::from_secs(5);
/// How often a vanished folder is looked for.
const ABSENT: Duration = Duration::from_millis(250);

/// Why a folder cannot be followed at all.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The folder is not there or may not be read.
    #[error("cannot read the manifests in {}: {cause}; give --manifests an existing folder", path.display())]
    Folder {
        /// The folder.
        path: PathBuf,
        /// What the kernel said.
        cause: io::Error,
    },
    /// The kernel gives no inotify instance, watch or thread.
    #[error("cannot watch the manifests in {}: {cause}; see fs.inotify.max_user_instances and fs.inotify.max_user_watches", path.display())]
    Watch {
        /// The folder.
        path: PathBuf,
        /// What the kernel said.
        cause: io::Error,
    },
}

/// Starts to follow `root` on a thread of its own. The first update is everything in it. The receiver holds what is wrong
/// with it now; what is new is also logged, once. The thread ends when nobody takes updates any more.
///
/// # Errors
/// The folder cannot be followed; see [`Error`].
pub fn start(
    root: &Path,
    here: NodeName,
    updates: mpsc::Sender<Update>,
) -> Result<watch::Receiver<Vec<Problem>>, Error> {
    let path = || root.to_owned();
    fs::read_dir(root).map_err(|cause| Error::Folder {
        path: path(),
        cause,
    })?;
    let refused = |cause| Error::Watch {
        path: path(),
        cause,
    };
    let watcher = Watcher::new(root).map_err(refused)?;
    let (problems, receiver) = watch::channel(Vec::new());
    let follower = Follower {
        root: root.to_owned(),
        manifests: Manifests::new(root, here),
        identity: None,
        is_complete: None,
        updates,
        problems,
    };
    let run = move || follower.run(watcher);
    thread::Builder::new()
        .name("manifests".into())
        .spawn(run)
        .map_err(refused)?;
    Ok(receiver)
}

struct Follower {
    root: PathBuf,
    manifests: Manifests,
    /// Device and inode of the folder that was read last.
    identity: Option<(u64, u64)>,
    /// What the last update said; nothing before the first one.
    is_complete: Option<bool>,
    updates: mpsc::Sender<Update>,
    problems: watch::Sender<Vec<Problem>>,
}

/// How a reading ended.
enum Reading {
    Done(Objects),
    /// The folder is not there, or an empty one stands in its place.
    Absent(Problem),
}

impl Follower {
    fn run(mut self, mut watcher: Watcher) {
        let mut touched = Touched::everything();
        while !self.updates.is_closed() {
            match self.read(&mut watcher, &touched) {
                Reading::Done(objects) => {
                    self.publish(None);
                    let is_news = self.is_complete != Some(objects.complete) || !objects.is_empty();
                    self.is_complete = Some(objects.complete);
                    if is_news
                        && self
                            .updates
                            .blocking_send(Update::Objects(objects))
                            .is_err()
                    {
                        return;
                    }
                    touched = self.collect(&mut watcher);
                }
                Reading::Absent(problem) => {
                    self.publish(Some(problem));
                    thread::sleep(ABSENT);
                    // What comes back is another folder, even where it has the same inode number.
                    touched = Touched {
                        root_left: true,
                        ..Touched::everything()
                    };
                    take(&mut watcher, &mut touched);
                }
            }
        }
    }

    /// Waits for changes, then for the end of their burst. Nothing touched: nobody takes updates any more.
    fn collect(&self, watcher: &mut Watcher) -> Touched {
        let mut touched = Touched::default();
        while touched.is_empty() && !self.updates.is_closed() {
            if watcher.wait(IDLE) {
                take(watcher, &mut touched);
            }
        }
        let end = Instant::now() + BURST;
        while Instant::now() < end
            && watcher.wait(QUIET.min(end.saturating_duration_since(Instant::now())))
        {
            take(watcher, &mut touched);
        }
        touched
    }

    fn read(&mut self, watcher: &mut Watcher, touched: &Touched) -> Reading {
        let identity = fs::metadata(&self.root).map(|metadata| (metadata.dev(), metadata.ino()));
        let identity = match identity {
            Ok(identity) => identity,
            Err(error) => return Reading::Absent(self.absent(&error.to_string())),
        };
        let is_another = touched.root_left || self.identity.is_some_and(|known| known != identity);
        if is_another && self.manifests.files() > 0 && is_empty(&self.root, watcher) {
            return Reading::Absent(self.absent("an empty folder stands in its place"));
        }
        if !touched.all && !is_another {
            return Reading::Done(self.manifests.reload(&touched.files));
        }
        let writing = watcher.writing().clone();
        let mut unwatched = None;
        let scanned = self.manifests.scan(&writing, &mut |folder| {
            if let Err(error) = watcher.add(folder) {
                unwatched = Some((folder.to_owned(), error));
            }
        });
        if let Some((path, error)) = unwatched {
            tracing::warn!(path = %path.display(), %error, "cannot watch a folder of manifests: its changes go unseen");
        }
        match scanned {
            Ok(objects) => {
                self.identity = Some(identity);
                Reading::Done(objects)
            }
            Err(error) => Reading::Absent(self.absent(&error.to_string())),
        }
    }

    fn absent(&self, why: &str) -> Problem {
        Problem {
            place: self.root.display().to_string(),
            line: None,
            what: format!(
                "cannot read the folder of manifests: {why}; everything in use stays as it is until the folder is back"
            ),
        }
    }

    /// Logs what is new among the problems, and shows all.
    fn publish(&self, absent: Option<Problem>) {
        let mut found = self.manifests.problems();
        found.extend(absent);
        found.sort();
        for problem in &found {
            if self.problems.borrow().binary_search(problem).is_err() {
                tracing::warn!(%problem, "manifests");
            }
        }
        self.problems.send_if_modified(|shown| {
            let is_new = *shown != found;
            *shown = found;
            is_new
        });
    }
}

/// Whether there is no manifest below `folder`. Watches it, so that the first ones are not read half written.
fn is_empty(folder: &Path, watcher: &mut Watcher) -> bool {
    let mut enter = |folder: &Path| {
        if let Err(error) = watcher.add(folder) {
            tracing::debug!(path = %folder.display(), %error, "cannot watch a folder of manifests");
        }
    };
    walk::walk(folder, &mut enter).is_ok_and(|found| found.files.is_empty())
}

/// Takes the events that have come.
fn take(watcher: &mut Watcher, touched: &mut Touched) {
    if let Err(error) = watcher.read(touched) {
        tracing::error!(%error, "cannot read inotify: reading all manifests again");
        touched.all = true;
    }
}

#[cfg(test)]
mod tests;
