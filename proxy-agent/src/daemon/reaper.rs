//! Ends connected UDP sockets whose backend is gone: `send()` runs no hook, so only an error makes the client connect again.
//!
//! One iterator lists them over all namespaces but may not destroy; the one that may sees only the network namespace of
//! whoever opens it. So the listed namespaces are entered one by one.

use std::{
    collections::BTreeSet,
    fs, io,
    path::{Path, PathBuf},
    sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, sync_channel},
    thread,
    time::Duration,
};

use proxy_ebpf::abi::DeadSocket;

use super::namespaces::{self, Cookies};
use crate::backends::ebpf::{links::Hook, sys};

/// A socket that chose its backend just before that one went is listed a moment later: look again.
const AGAIN: Duration = Duration::from_millis(40);

/// Asks for dead sockets to be ended.
#[derive(Clone, Debug)]
pub struct Reaper(SyncSender<()>);

impl Reaper {
    /// Starts the thread that ends them, through the pinned iterators in `links`; it ends with the last handle.
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
    let mut cookies = Cookies::default();
    let mut hidden = BTreeSet::new();
    while asked.recv().is_ok() {
        loop {
            reap(links, &mut cookies, &mut hidden);
            match asked.recv_timeout(AGAIN) {
                Ok(()) => {}
                Err(RecvTimeoutError::Timeout) => {
                    reap(links, &mut cookies, &mut hidden);
                    break;
                }
                Err(RecvTimeoutError::Disconnected) => return,
            }
        }
    }
}

/// One round. `hidden` are the namespaces that could not be entered, each told once.
fn reap(links: &Path, cookies: &mut Cookies, hidden: &mut BTreeSet<u64>) {
    let dead = match list(links) {
        Ok(dead) => dead,
        // Kernels that lack the iterator were told of when the programs were loaded.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return,
        Err(error) => {
            return tracing::warn!(%error, "cannot list connected UDP sockets of dead backends");
        }
    };
    let namespaces: BTreeSet<u64> = dead.iter().map(|socket| socket.netns_cookie).collect();
    for cookie in namespaces {
        let killed = match cookies.find(cookie) {
            Some(path) => namespaces::inside(&path, || kill(links)),
            None => Err(io::Error::from(io::ErrorKind::NotFound)),
        };
        match killed {
            Ok(()) => tracing::debug!(netns = cookie, "ended UDP sockets of dead backends"),
            Err(error) if hidden.insert(cookie) => {
                tracing::warn!(netns = cookie, %error, "cannot end UDP sockets of dead backends in a network namespace: it takes CAP_SYS_ADMIN and the host's process ids");
            }
            Err(_) => {}
        }
    }
}

fn list(links: &Path) -> io::Result<Vec<DeadSocket>> {
    let bytes = fs::read(links.join(Hook::ListDead.name()))?;
    Ok(bytes
        .chunks_exact(size_of::<DeadSocket>())
        .map(sys::from_prefix)
        .collect())
}

/// Reading the iterator is what ends them, in the namespace of the calling thread.
fn kill(links: &Path) -> io::Result<()> {
    fs::read(links.join(Hook::KillDead.name())).map(drop)
}
