//! The mechanisms that carry out a desired state, behind three verbs.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Display,
};

use crate::{
    plan::Plan,
    state::{DesiredState, ServiceName},
};

pub mod ebpf;
pub mod memory;

/// Something that forwards traffic as a [`DesiredState`] says.
///
/// One entry per service port or node address, whose value is a digest of everything below it: at 250,000 endpoints a map
/// of single kernel entries would cost more memory than the whole agent may use (docs/adr/0001).
pub trait Backend {
    /// What a change is about. Sorts so that upserts go in ascending order.
    type Key: Ord + Clone + Display;
    /// Digest of what the kernel holds, or should hold, for a key.
    type Value: Eq + Clone + Display;

    /// The entries that `state` asks for. Pure.
    fn render(&self, state: &DesiredState) -> BTreeMap<Self::Key, Self::Value>;

    /// Those of `observed` that belong to `services`, or are node addresses if `addresses`: what a partial render is
    /// compared with.
    fn in_scope(
        &self,
        observed: &BTreeMap<Self::Key, Self::Value>,
        services: &BTreeSet<ServiceName>,
        addresses: bool,
    ) -> BTreeMap<Self::Key, Self::Value>;

    /// What the kernel holds. Read at start, in the periodic audit, and after a failed apply.
    ///
    /// # Errors
    /// The kernel could not be read.
    fn observe(&mut self) -> Result<BTreeMap<Self::Key, Self::Value>, Error>;

    /// Makes the changes of `plan`; `state` holds every key that it upserts.
    ///
    /// # Errors
    /// What stopped it. Part of the plan may have gone in, each part safe by itself: observe, then plan again.
    fn apply(
        &mut self,
        plan: &Plan<Self::Key, Self::Value>,
        state: &DesiredState,
    ) -> Result<(), Error>;

    /// Puts what was applied in force: called after the first apply that went in whole since the start or an error, even
    /// one of an empty plan.
    ///
    /// # Errors
    /// What stopped it; it is called again after the next apply.
    fn publish(&mut self) -> Result<(), Error>;
}

/// Why a backend could not read or change the kernel's state.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A system call failed.
    #[error("cannot {action} {object}: {source}{hint}")]
    Kernel {
        /// The verb: "update", "create", "attach".
        action: &'static str,
        /// What it was done to: "map FRONTENDS", "hook connect4 on /sys/fs/cgroup".
        object: String,
        /// What the kernel said.
        source: std::io::Error,
        /// What to do about it, with its leading separator; may be empty.
        hint: &'static str,
    },
    /// The kernel refused a program.
    #[error("the kernel refuses program {program}: {reason}; last lines of the verifier:\n{log}")]
    Verifier {
        /// Name of the program.
        program: String,
        /// The errno in words.
        reason: String,
        /// Tail of the verifier's log.
        log: String,
    },
    /// Anything that makes this backend unusable as it is; the text says what to do.
    #[error("{0}")]
    Unusable(String),
    /// A write failed on purpose (memory backend).
    #[error("injected fault")]
    Injected,
}
