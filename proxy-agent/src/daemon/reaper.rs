//! Ends connected UDP sockets whose backend is gone: `send()` runs no hook, so only an error makes the client connect again.
//!
//! The iterator that may destroy sees only the network namespace of whoever opens it, so all of the node's are entered one
//! after the other: 10 ms for 250 of them (v6.18).

use std::{
    collections::BTreeSet,
    fs, io,
    path::{Path, PathBuf},
    sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, sync_channel},
    thread,
    time::Duration,
};

use super::namespaces;
use crate::backends::ebpf::links::Hook;

/// A socket that chose its backend just before that one went is listed a moment later: look again.
const AGAIN: Duration = Duration::from_millis(40);

/// Asks for dead sockets to be ended.
#[derive(Clone, Debug)]
pub struct Reaper(SyncSender<()>);

impl Reaper {
    /// Starts the thread that ends them, through the pinned iterator in `links`; it ends with the last handle.
    ///
    /// # Errors
    /// There is no thread to be had.
    pub fn start(links: PathBuf) -> io::Result<Self> {
        let (ask, asked) = sync_channel(1);
        let work = move || run(&links, &asked);
        thread::Builder::new()
            .name("reaper".to_owned())
            .spawn(work)?;
        Ok(Self(ask))
    }

    /// UDP backends are gone. Does not wait.
    pub fn ask(&self) {
        match self.0.try_send(()) {
            // Full: the round that is to come will see them.
            Ok(()) | Err(TrySendError::Full(())) => {}
            Err(TrySendError::Disconnected(())) => tracing::error!("the reaper ended early"),
        }
    }
}

fn run(links: &Path, asked: &Receiver<()>) {
    let mut hidden = BTreeSet::new();
    while asked.recv().is_ok() {
        loop {
            reap(links, &mut hidden);
            match asked.recv_timeout(AGAIN) {
                Ok(()) => {}
                Err(RecvTimeoutError::Timeout) => {
                    reap(links, &mut hidden);
                    break;
                }
                Err(RecvTimeoutError::Disconnected) => return,
            }
        }
    }
}

/// One round. `hidden` are the namespaces that could not be entered, each told once.
fn reap(links: &Path, hidden: &mut BTreeSet<PathBuf>) {
    let iterator = links.join(Hook::KillDead.name());
    // Kernels that lack it were told of when the programs were loaded.
    if !iterator.exists() {
        return;
    }
    let namespaces = namespaces::all();
    // Reading the iterator is what ends them.
    let killed = namespaces::visit(&namespaces, || fs::read(&iterator).map(drop));
    for (path, result) in namespaces.into_iter().zip(killed) {
        match result {
            // Gone meanwhile, with its sockets.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) if !hidden.contains(&path) => {
                tracing::warn!(netns = %path.display(), %error, "cannot end UDP sockets of dead backends in a network namespace: it takes CAP_SYS_ADMIN");
                hidden.insert(path);
            }
            Ok(()) | Err(_) => {}
        }
    }
}
