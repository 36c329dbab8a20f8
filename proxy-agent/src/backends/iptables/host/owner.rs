//! One agent keeps the rules of a network namespace.

use std::{fs::File, io};

use nix::fcntl::{Flock, FlockArg};

use crate::backends::Error;

/// The calling thread's network namespace, which is what the rules belong to.
const NAMESPACE: &str = "/proc/thread-self/ns/net";

/// Nobody else changes these rules while this value lives: a lock on the namespace itself, which works in every mount
/// namespace and leaves nothing behind.
#[derive(Debug)]
pub struct Owner {
    _lock: Flock<File>,
}

impl Owner {
    /// Becomes it.
    ///
    /// # Errors
    /// Another agent is it.
    pub fn take() -> Result<Self, Error> {
        let failed = |cause: io::Error| Error::Kernel {
            action: "lock",
            object: format!("network namespace {NAMESPACE}"),
            cause,
            hint: "; a proxy-agent keeps the rules of this network namespace: stop it first",
        };
        let namespace = File::open(NAMESPACE).map_err(failed)?;
        Flock::lock(namespace, FlockArg::LockExclusiveNonblock)
            .map(|lock| Self { _lock: lock })
            .map_err(|(_, errno)| failed(errno.into()))
    }
}
