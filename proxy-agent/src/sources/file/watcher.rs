//! What inotify says about a folder of manifests, as the files and folders to read again.

use std::{
    collections::{BTreeMap, BTreeSet},
    ffi::OsStr,
    fs, io,
    os::{fd::AsFd, unix::fs::MetadataExt},
    path::{Path, PathBuf},
    time::Duration,
};

use inotify::{EventMask, Inotify, WatchDescriptor, WatchMask};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::walk;

/// Room for a few hundred events at a time.
const BUFFER_BYTES: usize = 64 << 10;

/// What has to be read again.
#[derive(Debug, Default)]
pub(super) struct Touched {
    pub(super) files: BTreeSet<PathBuf>,
    /// Everything: folders came or went, links moved, or events were lost.
    pub(super) all: bool,
    /// The folder itself was deleted, moved or unmounted; another may stand in its place.
    pub(super) root_left: bool,
}

impl Touched {
    pub(super) fn everything() -> Self {
        Self {
            all: true,
            ..Self::default()
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.files.is_empty() && !self.all
    }
}

/// Watches a folder and all below it.
#[derive(Debug)]
pub(super) struct Watcher {
    inotify: Inotify,
    root: PathBuf,
    folders: BTreeMap<WatchDescriptor, PathBuf>,
    /// Files that somebody has written to and not closed yet.
    writing: BTreeSet<PathBuf>,
}

impl Watcher {
    /// Watches `root`, without the folders below it.
    pub(super) fn new(root: &Path) -> io::Result<Self> {
        let mut watcher = Self {
            inotify: Inotify::init()?,
            root: root.to_owned(),
            folders: BTreeMap::new(),
            writing: BTreeSet::new(),
        };
        watcher.add(root)?;
        Ok(watcher)
    }

    /// Watches one folder; again and again without harm.
    pub(super) fn add(&mut self, folder: &Path) -> io::Result<()> {
        let mask = WatchMask::CLOSE_WRITE
            | WatchMask::MODIFY
            | WatchMask::ATTRIB
            | WatchMask::CREATE
            | WatchMask::MOVE
            | WatchMask::DELETE
            | WatchMask::DELETE_SELF
            | WatchMask::MOVE_SELF
            | WatchMask::ONLYDIR;
        let watch = self.inotify.watches().add(folder, mask)?;
        self.folders.insert(watch, folder.to_owned());
        Ok(())
    }

    /// Files that are half written.
    pub(super) fn writing(&self) -> &BTreeSet<PathBuf> {
        &self.writing
    }

    /// Waits for an event, at most this long.
    pub(super) fn wait(&self, most: Duration) -> bool {
        let mut fds = [PollFd::new(self.inotify.as_fd(), PollFlags::POLLIN)];
        let timeout = PollTimeout::try_from(most).unwrap_or(PollTimeout::MAX);
        poll(&mut fds, timeout).is_ok_and(|ready| ready > 0)
    }

    /// Takes all events that have come.
    pub(super) fn read(&mut self, touched: &mut Touched) -> io::Result<()> {
        let mut buffer = vec![0; BUFFER_BYTES];
        loop {
            let events = match self.inotify.read_events(&mut buffer) {
                Ok(events) => events,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error),
            };
            let events: Vec<_> = events.map(|event| event.to_owned()).collect();
            for event in events {
                self.take(&event.wd, event.mask, event.name.as_deref(), touched);
            }
        }
    }

    fn take(
        &mut self,
        watch: &WatchDescriptor,
        mask: EventMask,
        name: Option<&OsStr>,
        touched: &mut Touched,
    ) {
        if mask.contains(EventMask::Q_OVERFLOW) {
            self.writing.clear();
            touched.all = true;
        }
        let Some(folder) = self.folders.get(watch) else {
            return;
        };
        let Some(name) = name else {
            let left = EventMask::DELETE_SELF
                | EventMask::MOVE_SELF
                | EventMask::UNMOUNT
                | EventMask::IGNORED;
            if mask.intersects(left) {
                touched.all = true;
                touched.root_left |= *folder == self.root;
            }
            if mask.contains(EventMask::IGNORED) {
                self.folders.remove(watch);
            }
            return;
        };
        let path = folder.join(name);
        let moved =
            EventMask::CREATE | EventMask::DELETE | EventMask::MOVED_FROM | EventMask::MOVED_TO;
        if mask.contains(EventMask::ISDIR) {
            touched.all |= mask.intersects(moved) && walk::is_visible(&path);
        } else if walk::format(&path).is_some() {
            self.take_file(path, mask, touched);
        } else {
            // The link `..data` of a ConfigMap volume, or one to a folder.
            let was_folder = self.folders.values().any(|folder| *folder == path);
            let is_link =
                || fs::symlink_metadata(&path).is_ok_and(|metadata| metadata.is_symlink());
            touched.all |= mask.intersects(moved) && (was_folder || is_link());
        }
    }

    fn take_file(&mut self, path: PathBuf, mask: EventMask, touched: &mut Touched) {
        if mask.contains(EventMask::MODIFY) {
            self.writing.insert(path);
        } else if mask.contains(EventMask::CREATE) {
            // A link is complete at once; a file is when it is closed.
            let metadata = fs::symlink_metadata(&path);
            if metadata.is_ok_and(|metadata| metadata.is_symlink() || metadata.nlink() > 1) {
                touched.files.insert(path);
            } else {
                self.writing.insert(path);
            }
        } else if mask.contains(EventMask::ATTRIB) {
            if !self.writing.contains(&path) {
                touched.files.insert(path);
            }
        } else {
            self.writing.remove(&path);
            touched.files.insert(path);
        }
    }
}

#[cfg(test)]
mod tests {
    use tempfile::TempDir;

    use super::*;

    #[test]
    fn lost_events_lead_to_a_reading_of_everything() {
        let dir = TempDir::new().unwrap();
        let mut watcher = Watcher::new(dir.path()).unwrap();
        let [a, b] = ["a.yaml", "b.yaml"].map(|name| dir.path().join(name));
        fs::write(&a, "").unwrap();
        let limit = fs::read_to_string("/proc/sys/fs/inotify/max_queued_events").unwrap();
        // Each renaming back and forth is four events.
        for _ in 0..limit.trim().parse::<u32>().unwrap() / 4 + 1 {
            fs::rename(&a, &b).unwrap();
            fs::rename(&b, &a).unwrap();
        }
        let mut touched = Touched::default();
        watcher.read(&mut touched).unwrap();
        assert!(touched.all && !touched.root_left, "{touched:?}");
        assert!(watcher.writing().is_empty());
    }

    #[test]
    fn files_of_other_names_touch_nothing() {
        let dir = TempDir::new().unwrap();
        let mut watcher = Watcher::new(dir.path()).unwrap();
        for name in ["notes.txt", ".a.yaml.swp", "a.yaml.tmp", ".hidden.yaml"] {
            fs::write(dir.path().join(name), "text").unwrap();
            fs::remove_file(dir.path().join(name)).unwrap();
        }
        let mut touched = Touched::default();
        watcher.read(&mut touched).unwrap();
        assert!(touched.is_empty(), "{touched:?}");
    }
}
