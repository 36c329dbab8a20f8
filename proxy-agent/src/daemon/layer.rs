//! A layer's thread, as the rest of the agent holds it.

use std::{
    io,
    sync::Arc,
    thread::{self, JoinHandle},
};

use tokio::sync::watch;

use crate::{
    health::Watched,
    sync::{Inbox, SyncStatus},
};

/// A layer at work.
#[derive(Debug)]
pub struct LayerThread {
    status: watch::Receiver<SyncStatus>,
    inbox: Arc<Inbox>,
    thread: JoinHandle<()>,
}

impl LayerThread {
    /// Starts `work` on a thread of its own; `status` is what it publishes, `inbox` where its changes come from.
    ///
    /// # Errors
    /// No thread to be had.
    pub fn start(
        name: &str,
        status: watch::Receiver<SyncStatus>,
        inbox: Arc<Inbox>,
        work: impl FnOnce() + Send + 'static,
    ) -> io::Result<Self> {
        let thread = thread::Builder::new().name(name.to_owned()).spawn(work)?;
        Ok(Self {
            status,
            inbox,
            thread,
        })
    }

    /// How it is doing; closed when the thread has ended.
    pub fn status(&self) -> watch::Receiver<SyncStatus> {
        self.status.clone()
    }

    /// What its health is judged by.
    pub fn watched(&self) -> Watched {
        Watched {
            status: self.status.clone(),
            inbox: Arc::clone(&self.inbox),
        }
    }

    /// Waits for the end of the thread, once its feed has stopped.
    pub fn join(self) {
        // A thread that panicked has said so, and its end is reported by the closed status.
        let _ = self.thread.join();
    }
}
