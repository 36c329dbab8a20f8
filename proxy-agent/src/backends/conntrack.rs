//! Flows that the kernel goes on with as they began, and that lead nowhere.
//!
//! It translates the packets of a flow as it did the first one. A client of a UDP Service that keeps its port would talk to
//! a dead endpoint for as long as it sends. So such flows are forgotten, and their next packet makes a new choice. TCP
//! and SCTP notice by themselves, and must be able to end in good order. As kube-proxy does it (pkg/proxy/conntrack), with
//! these differences: a Service without any endpoint counts too (kubernetes#139628), and a node port only on addresses of
//! this node.
//!
//! A flow that began while there were no rules for its Service stays untranslated when there are: what the client sends
//! from that port is lost for two more minutes, and before Linux 6.2 (e15d4cdf27cb) for as long as it tries. kube-proxy leaves
//! those of TCP and SCTP; here they are forgotten as long as nobody has answered.

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
    /// Flows that were looked at.
    pub seen: u64,
    /// Flows that were forgotten.
    pub deleted: ByFamily,
    /// Stale flows that the kernel keeps, because a network card has taken them over.
    pub kept: u64,
}

/// A number for each family.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ByFamily {
    v4: u64,
    v6: u64,
}

impl ByFamily {
    /// That of one.
    pub fn of(self, family: Family) -> u64 {
        match family {
            Family::V4 => self.v4,
            Family::V6 => self.v6,
        }
    }

    /// Both together.
    pub fn sum(self) -> u64 {
        self.v4 + self.v6
    }

    fn count(&mut self, family: Family) {
        *match family {
            Family::V4 => &mut self.v4,
            Family::V6 => &mut self.v6,
        } += 1;
    }
}

/// Looks once at each flow of the calling thread's network namespace that can be stale, and deletes those of the Services in
/// `answers` that are. Time grows with the flows, memory does not.
///
/// # Errors
/// The kernel does not list or delete flows. Those deleted so far are gone.
pub fn clean(answers: &Answers) -> Result<Cleaned, Error> {
    let mut total = Cleaned::default();
    for (family, protocol) in answers.kinds() {
        table::clean(answers, family, protocol, &mut total).map_err(failed)?;
    }
    Ok(total)
}

fn failed(cause: io::Error) -> Error {
    Error::Kernel {
        action: "clean up",
        object: "the kernel's flows".to_owned(),
        cause,
        hint: "",
    }
}

/// Cleans on a thread of its own, so that nobody waits for it.
#[derive(Debug)]
pub struct Cleaner {
    /// Takes what has changed.
    thread: Sender<Changed>,
    /// Service ports as they were noted last, without backends.
    known: Changed,
    /// Noted since the flows were looked at.
    waiting: Changed,
}

/// Service ports as they are now.
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

    /// Takes in what will be served: all of it, also where there may have been no rules, or what is about `services`.
    pub fn note(&mut self, services: Option<&BTreeSet<ServiceName>>, state: &DesiredState) {
        let is_meant = |port: &ServicePort| services.is_none_or(|of| of.contains(&port.service));
        let is_gone = |port: &ServicePort| is_meant(port) && !state.services.contains_key(port);
        // Nobody serves their addresses now.
        let gone = self.known.extract_if(.., |port, _| is_gone(port));
        self.waiting
            .extend(gone.filter(|(port, _)| port.protocol == Protocol::Udp));
        if services.is_none() {
            return self.note_all(state);
        }
        let meant = state.services.iter().filter(|(port, _)| is_meant(port));
        for (port, service) in meant {
            let before = self.known.insert(port.clone(), without_backends(service));
            let had_rules = before.is_some_and(|before| before.frontends == service.frontends);
            if port.protocol == Protocol::Udp || !had_rules {
                self.waiting.insert(port.clone(), what_matters(service));
            }
        }
    }

    /// Maps that are collected whole take half the memory of those that grow.
    fn note_all(&mut self, state: &DesiredState) {
        let all = state.services.iter();
        let known = all
            .clone()
            .map(|(port, service)| (port.clone(), without_backends(service)));
        self.known = known.collect();
        let earlier = std::mem::take(&mut self.waiting);
        self.waiting = all
            .map(|(port, service)| (port.clone(), what_matters(service)))
            .collect();
        for (port, service) in earlier {
            self.waiting.entry(port).or_insert(service);
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

/// Who serves does not matter for TCP and SCTP.
fn what_matters(service: &ServiceState) -> ServiceState {
    match service.key.protocol {
        Protocol::Udp => service.clone(),
        Protocol::Tcp | Protocol::Sctp => without_backends(service),
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
