//! The mechanisms that carry out a desired state, behind three verbs.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::{self, Display},
    io,
    net::IpAddr,
    sync::Arc,
};

use crate::{
    plan::{Plan, diff},
    state::{DesiredState, Family, Protocol, ServiceName, ServicePort},
};

pub mod conntrack;
pub mod ebpf;
#[cfg(test)]
pub mod in_namespace;
pub mod iptables;
pub mod memory;
pub mod nfnetlink;
pub mod process;

/// Something that forwards traffic as a [`DesiredState`] says.
///
/// What the kernel holds is a map of digests, each of much: at 250,000 endpoints a map of single kernel entries would cost
/// more memory than the whole agent may use (docs/adr/0001).
pub trait Backend {
    /// What a change is about. Sorts so that upserts go in ascending order.
    type Key: Ord + Clone + Display;
    /// Digest of what the kernel holds, or should hold, for a key.
    type Value: Eq + Clone + Display;

    /// What turns `observed` into what `state` asks for, within `bounds`. No I/O; a backend may note what it is asked for.
    fn plan(
        &mut self,
        observed: &BTreeMap<Self::Key, Self::Value>,
        state: &DesiredState,
        bounds: Bounds<'_>,
    ) -> Plan<Self::Key, Self::Value>;

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

    /// Whether the last plan left something out that the kernel refused, without an error: the rest is in force.
    fn has_left_out(&self) -> bool {
        false
    }

    /// Whether somebody else keeps what this backend would write: then it is given nothing to do. Asked often, and after
    /// [`Backend::observe`], before anything is written.
    fn yields(&mut self) -> bool {
        false
    }
}

/// A part of the desired state.
#[derive(Clone, Copy, Debug)]
pub struct Part<'a> {
    /// All service ports of these.
    pub services: &'a BTreeSet<ServiceName>,
    /// The node's addresses.
    pub addresses: bool,
}

/// What a plan is about, and what it has to leave alone. The default is everything, and nothing.
#[derive(Clone, Copy, Debug, Default)]
pub struct Bounds<'a> {
    /// What the state is complete for; none means everything.
    pub scope: Option<Part<'a>>,
    /// Set while a source lacks something that it should hold: nothing is deleted, and of what was found in the kernel only
    /// this part, which was seen to change, is written.
    pub touched: Option<Part<'a>>,
}

/// What a change is about, for backends that keep one digest per service port.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Key {
    /// A service port with everything below it.
    Service(ServicePort),
    /// An address of this node.
    Address(IpAddr),
    /// What was found in the kernel and belongs to nothing. Never desired, so every plan deletes it.
    Strays,
}

impl Key {
    /// What turns `observed` into `desired` within `bounds`. Strays are in every scope.
    pub fn plan<V: Eq + Clone>(
        observed: &BTreeMap<Self, V>,
        desired: &BTreeMap<Self, V>,
        bounds: Bounds<'_>,
    ) -> Plan<Self, V> {
        let mut plan = match bounds.scope {
            None => diff(observed, desired),
            Some(part) => diff(&Self::in_part(observed, part), desired),
        };
        if let Some(touched) = bounds.touched {
            let free = Self::in_part(observed, touched);
            plan.deletions.clear();
            plan.upserts
                .retain(|(key, _)| free.contains_key(key) || !observed.contains_key(key));
        }
        plan
    }

    fn in_part<V: Clone>(observed: &BTreeMap<Self, V>, part: Part<'_>) -> BTreeMap<Self, V> {
        let mut found = BTreeMap::new();
        let copy = |(key, value): (&Self, &V)| (key.clone(), value.clone());
        for name in part.services {
            let first = ServicePort {
                service: name.clone(),
                port: Arc::from(""),
                protocol: Protocol::Tcp,
                family: Family::V4,
            };
            let of_service =
                |key: &Self| matches!(key, Self::Service(port) if port.service == *name);
            let range = observed.range(Self::Service(first)..);
            found.extend(range.take_while(|(key, _)| of_service(key)).map(copy));
        }
        let rest = observed.iter().rev();
        let rest = rest.take_while(|(key, _)| !matches!(key, Self::Service(_)));
        found.extend(
            rest.filter(|(key, _)| part.addresses || matches!(key, Self::Strays))
                .map(copy),
        );
        found
    }
}

impl Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Service(port) => {
                write!(f, "service {port}/{} {}", port.protocol, port.family)
            }
            Self::Address(address) => write!(f, "address {address}"),
            Self::Strays => f.write_str("entries of no service"),
        }
    }
}

/// All addresses of the links in the calling thread's network namespace, as they are now.
///
/// # Errors
/// The kernel does not list them.
pub fn own_addresses() -> io::Result<impl Iterator<Item = IpAddr>> {
    let interfaces = nix::ifaddrs::getifaddrs()?;
    Ok(interfaces.filter_map(|interface| {
        let address = interface.address?;
        let v4 = address.as_sockaddr_in().map(|v4| IpAddr::V4(v4.ip()));
        v4.or_else(|| address.as_sockaddr_in6().map(|v6| IpAddr::V6(v6.ip())))
    }))
}

/// Why a backend could not read or change the kernel's state.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A system call failed.
    #[error("cannot {action} {object}: {cause}{hint}")]
    Kernel {
        /// The verb: "update", "create", "attach".
        action: &'static str,
        /// What it was done to: "map FRONTENDS", "hook connect4 on /sys/fs/cgroup".
        object: String,
        /// What the kernel said.
        cause: io::Error,
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
