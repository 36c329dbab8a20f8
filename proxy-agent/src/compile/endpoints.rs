//! Which endpoints take traffic, as seen from this node.
//!
//! kube-proxy's `CategorizeEndpoints` (pkg/proxy/topology.go): KEP-1669 (terminating endpoints), KEP-2086 (internal traffic
//! policy), KEP-2433 and KEP-3015 (topology hints).

use std::net::IpAddr;

use super::{Problem, Reason, owners::Owners};
use crate::{
    model::{Endpoint, Model, Port, Service, Slice},
    state::{Backend, BackendState, Family, ServicePort, TrafficPolicy},
};

/// An endpoint of one service port, with its hints resolved for this node.
#[derive(Clone, Copy)]
struct Candidate {
    address: IpAddr,
    port: u16,
    endpoint: Endpoint,
    is_hinted_to_zone: bool,
}

/// Everything of one port in one family that serves, sorted.
pub(super) fn backends(
    model: &Model,
    owners: &Owners,
    service: &Service,
    port: &Port,
    key: &ServicePort,
    problems: &mut Vec<Problem>,
) -> Vec<Backend> {
    let mut candidates = candidates(model, port, key);
    candidates.retain(|candidate| {
        let reason = forbidden(candidate.address, owners);
        problems.extend(reason.map(|reason| Problem::Forbidden {
            service: key.service.clone(),
            address: candidate.address,
            reason,
        }));
        reason.is_none()
    });
    categorize(&candidates, Scopes::of(service, port, key.family))
}

/// Endpoints of all slices, each `address:port` once: of several the one that is not terminating, for the pod network may
/// give the address of a dying pod to a new one.
fn candidates(model: &Model, port: &Port, key: &ServicePort) -> Vec<Candidate> {
    let mut found = Vec::new();
    let slices = model.slices(&key.service);
    for slice in slices.filter(|slice| slice.family == key.family) {
        let served = slice.ports.iter();
        let mut served = served.filter(|p| p.name == port.name && p.protocol == port.protocol);
        let Some(served) = served.next() else {
            continue;
        };
        let zones = zones_here(model, slice);
        found.extend(slice.endpoints.iter().map(|endpoint| Candidate {
            address: endpoint.address,
            port: served.port.get(),
            endpoint: *endpoint,
            is_hinted_to_zone: zones.get(usize::from(endpoint.zones)) == Some(&true),
        }));
    }
    // Stable: equals keep the order of their slices' names.
    found.sort_by_key(|candidate| {
        let Candidate {
            address,
            port,
            endpoint,
            ..
        } = candidate;
        let worse = [
            endpoint.is_terminating(),
            !endpoint.is_ready(),
            !endpoint.is_serving(),
        ];
        (*address, *port, worse)
    });
    found.dedup_by_key(|candidate| (candidate.address, candidate.port));
    found
}

/// By [`Endpoint::zones`]: whether those hints name this node's zone.
fn zones_here(model: &Model, slice: &Slice) -> Vec<bool> {
    let named = |zones: &[_]| {
        model.zone().is_some_and(|here| {
            zones
                .iter()
                .any(|zone: &std::sync::Arc<str>| **zone == *here)
        })
    };
    let unhinted = std::iter::once(false);
    unhinted
        .chain(slice.zones.iter().map(|zones| named(zones)))
        .collect()
}

fn forbidden(address: IpAddr, owners: &Owners) -> Option<Reason> {
    let (is_link_local, is_broadcast) = match address {
        IpAddr::V4(v4) => (v4.is_link_local(), v4.is_broadcast()),
        IpAddr::V6(v6) => (v6.is_unicast_link_local(), false),
    };
    if address.is_unspecified() {
        Some(Reason::Unspecified)
    } else if address.is_loopback() {
        Some(Reason::Loopback)
    } else if is_link_local {
        Some(Reason::LinkLocal)
    } else if address.is_multicast() || is_broadcast {
        Some(Reason::Multicast)
    } else if owners.is_cluster_ip(address) {
        Some(Reason::ClusterIp)
    } else {
        None
    }
}

/// Which sets of endpoints a service port uses.
#[derive(Clone, Copy)]
struct Scopes {
    cluster: bool,
    local: bool,
}

impl Scopes {
    fn of(service: &Service, port: &Port, family: Family) -> Self {
        let mut addresses = service
            .load_balancer_ips
            .iter()
            .chain(&service.external_ips);
        let is_external = port.node_port.is_some() || addresses.any(|ip| Family::of(*ip) == family);
        let is_local = |policy| policy == TrafficPolicy::Local;
        Self {
            // With an external policy of Local too: traffic from this node and its pods takes the short cut.
            cluster: !is_local(service.internal_policy) || is_external,
            local: is_local(service.internal_policy)
                || (is_local(service.external_policy) && is_external),
        }
    }
}

/// How hints restrict the cluster's endpoints.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Topology {
    Everywhere,
    SameZone,
    SameNode,
}

impl Topology {
    /// Hints count only if every ready endpoint has them and one is meant for us; the node's come before the zone's.
    fn of(candidates: &[Candidate]) -> Self {
        let ready = || {
            candidates
                .iter()
                .filter(|candidate| candidate.endpoint.is_ready())
        };
        if ready().all(|c| c.endpoint.has_node_hints())
            && ready().any(|c| c.endpoint.is_hinted_here())
        {
            Self::SameNode
        } else if ready().all(|c| c.endpoint.zones != 0) && ready().any(|c| c.is_hinted_to_zone) {
            Self::SameZone
        } else {
            Self::Everywhere
        }
    }

    fn admits(self, candidate: &Candidate) -> bool {
        match self {
            Self::Everywhere => true,
            Self::SameZone => candidate.is_hinted_to_zone,
            Self::SameNode => candidate.endpoint.is_hinted_here(),
        }
    }
}

fn categorize(candidates: &[Candidate], scopes: Scopes) -> Vec<Backend> {
    let topology = Topology::of(candidates);
    let is_draining = |c: &Candidate| c.endpoint.is_serving() && c.endpoint.is_terminating();
    let in_cluster = |c: &Candidate| c.endpoint.is_ready() && topology.admits(c);
    let in_local = |c: &Candidate| c.endpoint.is_ready() && c.endpoint.is_on_this_node();
    // Terminating endpoints count only where nothing ready is left; each set decides for itself.
    let cluster_drains = !candidates.iter().any(in_cluster);
    let local_drains = !candidates.iter().any(in_local);
    let backend = |c: &Candidate| Backend {
        address: c.address,
        port: c.port,
        state: BackendState {
            terminating: c.endpoint.is_terminating(),
            on_this_node: c.endpoint.is_on_this_node(),
            in_cluster: scopes.cluster && (in_cluster(c) || cluster_drains && is_draining(c)),
            in_local: scopes.local
                && (in_local(c) || local_drains && is_draining(c) && c.endpoint.is_on_this_node()),
        },
    };
    let serves = |c: &&Candidate| c.endpoint.is_serving() || c.endpoint.is_ready();
    candidates.iter().filter(serves).map(backend).collect()
}
