//! Flows of UDP Services that lead to an endpoint which no longer serves.
//!
//! The kernel translates the packets of a flow as it did the first one, for as long as they come; a client that keeps its
//! port would talk to a dead endpoint for ever. So such flows are forgotten, and their next packet makes a new choice. TCP
//! and SCTP notice by themselves, and must be able to end in good order. As kube-proxy does it (pkg/proxy/conntrack), with
//! these differences: a Service without any endpoint counts too (kubernetes#139628), and a node port only on addresses of
//! this node.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    sync::mpsc::{self, Receiver, RecvTimeoutError, Sender},
    thread,
    time::{Duration, Instant},
};

use crate::{
    backends::{Error, own_addresses},
    state::{DesiredState, Family, Protocol, ServiceName, ServicePort, ServiceState},
};

mod answers;
mod table;

pub use answers::Answers;

/// From one look at the flows to the next: there may be a million of them.
const PACE: Duration = Duration::from_secs(1);

/// What was done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cleaned {
    /// UDP flows that were looked at.
    pub seen: u64,
    /// Flows that were forgotten.
    pub deleted: u64,
    /// Stale flows that the kernel keeps, because a network card has taken them over.
    pub kept: u64,
}

/// Looks at each UDP flow of the calling thread's network namespace once, and deletes those whose Service in `answers` has no
/// endpoint that serves where they lead to. Time grows with the flows, memory does not.
///
/// # Errors
/// The kernel does not list or delete flows. Those deleted so far are gone.
pub fn clean(answers: &Answers) -> Result<Cleaned, Error> {
    let mut total = Cleaned::default();
    for family in [Family::V4, Family::V6] {
        if answers.has(family) {
            table::clean(answers, family, &mut total).map_err(failed)?;
        }
    }
    Ok(total)
}

fn failed(cause: io::Error) -> Error {
    Error::Kernel {
        action: "clean up",
        object: "the kernel's UDP flows".to_owned(),
        cause,
        hint: "",
    }
}

/// Cleans on a thread of its own, so that nobody waits for it.
#[derive(Debug)]
pub struct Cleaner {
    /// Takes what has changed.
    thread: Sender<Changed>,
    /// UDP service ports as they were noted last, without backends.
    known: Changed,
    /// Noted since the flows were looked at.
    waiting: Changed,
}

/// UDP service ports as they are now.
type Changed = BTreeMap<ServicePort, ServiceState>;

impl Cleaner {
    /// Starts the thread, which ends when the cleaner is dropped; `tell` is given what each look did, and how long it took.
    ///
    /// # Errors
    /// No thread to be had.
    pub fn start(
        tell: impl FnMut(Result<Cleaned, Error>, Duration) + Send + 'static,
    ) -> io::Result<Self> {
        let (sender, receiver) = mpsc::channel();
        let work = move || run(&receiver, tell);
        thread::Builder::new()
            .name("conntrack".to_owned())
            .spawn(work)?;
        Ok(Self {
            thread: sender,
            known: Changed::new(),
            waiting: Changed::new(),
        })
    }

    /// Takes in what will be served: all of it, or what is about `services`.
    pub fn note(&mut self, services: Option<&BTreeSet<ServiceName>>, state: &DesiredState) {
        let is_meant = |port: &ServicePort| services.is_none_or(|of| of.contains(&port.service));
        let is_gone = |port: &ServicePort| is_meant(port) && !state.services.contains_key(port);
        // Nobody serves their addresses now.
        let gone = self.known.extract_if(.., |port, _| is_gone(port));
        self.waiting.extend(gone);
        let udp = state.services.iter();
        let udp = udp.filter(|(port, _)| port.protocol == Protocol::Udp && is_meant(port));
        for (port, service) in udp {
            self.known.insert(port.clone(), without_backends(service));
            self.waiting.insert(port.clone(), service.clone());
        }
    }

    /// Has the flows of what was noted looked at. Call it once new flows go where that says.
    pub fn clean(&mut self) {
        if !self.waiting.is_empty() {
            // The thread ends after this sender.
            let _ = self.thread.send(std::mem::take(&mut self.waiting));
        }
    }
}

fn without_backends(service: &ServiceState) -> ServiceState {
    ServiceState {
        key: service.key.clone(),
        frontends: service.frontends.clone(),
        backends: Vec::new(),
        source_ranges: Vec::new(),
        ..*service
    }
}

/// Takes together what has come meanwhile, and tries again what failed.
fn run(changes: &Receiver<Changed>, mut tell: impl FnMut(Result<Cleaned, Error>, Duration)) {
    let mut waiting = Changed::new();
    loop {
        let changed = match waiting.is_empty() {
            true => changes.recv().map_err(|_| RecvTimeoutError::Disconnected),
            false => changes.recv_timeout(PACE),
        };
        match changed {
            Ok(changed) => waiting.extend(changed),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return,
        }
        waiting.extend(changes.try_iter().flatten());
        let start = Instant::now();
        let cleaned = own_addresses()
            .map_err(failed)
            .and_then(|own| clean(&Answers::of(waiting.values(), own)));
        if cleaned.is_ok() {
            waiting.clear();
        }
        tell(cleaned, start.elapsed());
        thread::sleep(PACE);
    }
}

#[cfg(test)]
mod tests;
