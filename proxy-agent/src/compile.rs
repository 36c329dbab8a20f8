//! From the model to the desired state, one Service at a time.
//!
//! Pure, total and deterministic: the same cluster gives the same state, whatever the order in which its objects came.
//! The only thing that one Service has to know of the others is who owns an address and port ([`owners`]).

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    net::IpAddr,
};

use ipnet::IpNet;

use self::owners::{Claim, Owners};
use crate::{
    model::{Dirty, Model},
    state::{DesiredState, Family, NodeAddress, ServiceName, ServicePort, ServiceState},
};

mod endpoints;
mod frontends;
pub mod health;
pub mod owners;

/// Something of a Service that is not carried out, and why.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Problem {
    /// Another Service has the address and port.
    Taken {
        /// Who does not get it.
        service: ServiceName,
        /// What it claimed.
        claim: Claim,
        /// Who has it.
        owner: ServiceName,
    },
    /// An endpoint at an address that nothing may be sent to (CVE-2021-25737).
    Forbidden {
        /// Whose endpoint it is.
        service: ServiceName,
        /// Its address.
        address: IpAddr,
        /// Why it is refused.
        reason: Reason,
    },
}

impl Problem {
    /// The Service that it is about.
    pub fn service(&self) -> &ServiceName {
        match self {
            Self::Taken { service, .. } | Self::Forbidden { service, .. } => service,
        }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Taken {
                service,
                claim,
                owner,
            } => write!(
                f,
                "Service {service} does not get {claim}: Service {owner} has it; change one of them"
            ),
            Self::Forbidden {
                service,
                address,
                reason,
            } => write!(
                f,
                "Service {service} does not use its endpoint {address}: it is {reason}"
            ),
        }
    }
}

/// Why nothing may be sent to an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Reason {
    /// `0.0.0.0` or `::`.
    Unspecified,
    /// 127.0.0.0/8 or `::1`.
    Loopback,
    /// 169.254.0.0/16 or fe80::/10.
    LinkLocal,
    /// Multicast or broadcast.
    Multicast,
    /// The ClusterIP of a Service.
    ClusterIp,
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Unspecified => "the unspecified address",
            Self::Loopback => "a loopback address",
            Self::LinkLocal => "a link-local address",
            Self::Multicast => "a multicast or broadcast address",
            Self::ClusterIp => "the ClusterIP of a Service",
        })
    }
}

/// What [`service`] makes of one Service.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// One per port and family.
    pub states: Vec<ServiceState>,
    /// Sorted.
    pub problems: Vec<Problem>,
}

/// The state of one Service; empty if there is no such Service.
pub fn service(model: &Model, owners: &Owners, name: &ServiceName) -> Outcome {
    let mut outcome = Outcome::default();
    let Some(service) = model.service(name) else {
        return outcome;
    };
    let mut health_check_port = health::port(owners, name, service, &mut outcome.problems);
    for port in &service.ports {
        for family in service.families() {
            let key = ServicePort {
                service: name.clone(),
                port: port.name.clone(),
                protocol: port.protocol,
                family,
            };
            let found =
                frontends::frontends(model, owners, service, port, &key, &mut outcome.problems);
            let backends =
                endpoints::backends(model, owners, service, port, &key, &mut outcome.problems);
            let ranges = service.source_ranges.iter();
            let ranges = ranges.filter(|range| Family::of(range.addr()) == family);
            let ranges: Vec<IpNet> = ranges.copied().collect();
            outcome.states.push(ServiceState {
                frontends: found,
                backends,
                affinity_seconds: service.affinity_seconds,
                internal_policy: service.internal_policy,
                external_policy: service.external_policy,
                admits_node: admits_node(model, &ranges),
                source_ranges: ranges,
                health_check_port: health_check_port.take(),
                key,
            });
        }
    }
    outcome.problems.sort();
    outcome.problems.dedup();
    outcome
}

/// The state of the whole cluster from scratch.
pub fn all(model: &Model) -> DesiredState {
    Compiler::default().compile_all(model).state
}

/// What changed in the desired state.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Compiled {
    /// The Services that `state` is complete for; those without an entry there are gone.
    pub services_in_scope: BTreeSet<ServiceName>,
    /// Whether `state` has the node's addresses.
    pub addresses_in_scope: bool,
    /// Only what is in scope.
    pub state: DesiredState,
    /// Problems that were not there before.
    pub problems: Vec<Problem>,
}

/// Compiles what changed. Remembers who claims what, and the problems.
#[derive(Clone, Debug, Default)]
pub struct Compiler {
    owners: Owners,
    problems: BTreeMap<ServiceName, Vec<Problem>>,
}

impl Compiler {
    /// Compiles what `dirty` touches, and the Services that gain or lose a frontend by it.
    pub fn compile(&mut self, model: &Model, dirty: &Dirty) -> Compiled {
        let mut scope = dirty.services.clone();
        self.owners.update(model, &dirty.services, &mut scope);
        self.compile_scope(model, scope, dirty.addresses)
    }

    /// Compiles everything.
    pub fn compile_all(&mut self, model: &Model) -> Compiled {
        let mut scope: BTreeSet<ServiceName> =
            model.services().map(|(name, _)| name.clone()).collect();
        let gone = self
            .owners
            .services()
            .filter(|name| model.service(name).is_none());
        let gone: Vec<ServiceName> = gone.cloned().collect();
        scope.extend(gone);
        self.owners = Owners::of(model);
        let mut compiled = self.compile_scope(model, scope, true);
        compiled.state.pod_networks = model.pod_networks().to_vec();
        compiled.state.service_networks = model.service_networks().into_iter().collect();
        compiled
    }

    /// All problems that there are.
    pub fn problems(&self) -> impl Iterator<Item = &Problem> {
        self.problems.values().flatten()
    }

    fn compile_scope(
        &mut self,
        model: &Model,
        scope: BTreeSet<ServiceName>,
        addresses: bool,
    ) -> Compiled {
        let mut state = DesiredState::default();
        let mut services = Vec::new();
        let mut new_problems = Vec::new();
        for name in &scope {
            let Outcome { states, problems } = service(model, &self.owners, name);
            let states = states.into_iter();
            services.extend(states.map(|service| (service.key.clone(), service)));
            let before = if problems.is_empty() {
                self.problems.remove(name)
            } else {
                self.problems.insert(name.clone(), problems.clone())
            };
            let before = before.unwrap_or_default();
            new_problems.extend(
                problems
                    .into_iter()
                    .filter(|problem| !before.contains(problem)),
            );
        }
        // A map that is collected whole takes half the memory of one that grows.
        state.services = services.into_iter().collect();
        if addresses {
            state.addresses = node_addresses(model);
        }
        Compiled {
            services_in_scope: scope,
            addresses_in_scope: addresses,
            state,
            problems: new_problems,
        }
    }
}

/// Whether the node itself may send from one of its addresses.
fn admits_node(model: &Model, ranges: &[IpNet]) -> bool {
    let is_own = |ip: &&IpAddr| match ip {
        IpAddr::V4(v4) => !v4.is_loopback() && !v4.is_link_local(),
        IpAddr::V6(v6) => !v6.is_loopback() && !v6.is_unicast_link_local(),
    };
    let mut own = model.addresses().iter().filter(is_own);
    own.any(|ip| ranges.iter().any(|range| range.contains(ip)))
}

/// Node ports are served on the addresses that are to serve them, but on no link-local IPv6 one: a reply to one of those needs the link, which a
/// translated connection no longer names.
fn node_addresses(model: &Model) -> BTreeMap<IpAddr, NodeAddress> {
    let serves = |ip: &IpAddr| match ip {
        IpAddr::V4(_) => true,
        IpAddr::V6(v6) => !v6.is_unicast_link_local(),
    };
    let addresses = model.addresses().iter().filter(|ip| !ip.is_loopback());
    addresses
        .map(|ip| {
            let node_ports = serves(ip) && model.serves_node_ports(*ip);
            (*ip, NodeAddress { node_ports })
        })
        .collect()
}

#[cfg(test)]
mod tests;
