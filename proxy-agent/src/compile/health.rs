//! What load balancers are told of a Service whose external policy is Local.
//!
//! kube-proxy's `healthCheckNodePort` (pkg/proxy/healthcheck/service_health.go).

use std::{collections::BTreeSet, net::IpAddr};

use super::{
    Problem,
    owners::{Owners, health_check_claims},
};
use crate::{
    model::{Model, Service},
    state::{Family, HealthCheck, ServiceName},
};

/// The port that load balancers ask at, if the Service owns it.
pub(super) fn port(
    owners: &Owners,
    name: &ServiceName,
    service: &Service,
    problems: &mut Vec<Problem>,
) -> Option<u16> {
    for claim in health_check_claims(service) {
        if let Some(owner) = owners.owner(claim).filter(|owner| *owner != name) {
            problems.push(Problem::Taken {
                service: name.clone(),
                claim,
                owner: owner.clone(),
            });
            return None;
        }
    }
    Some(service.health_check_port?.get())
}

/// What the Service called `name` has load balancers told; nothing if none asks.
pub fn check(model: &Model, name: &ServiceName) -> Option<HealthCheck> {
    let service = model.service(name)?;
    let port = service.health_check_port?.get();
    let families = service.families();
    Some(HealthCheck {
        port,
        endpoints: families
            .map(|family| (family, endpoints(model, name, family)))
            .collect(),
    })
}

/// The addresses at which load balancers ask: those that serve node ports, unspecified for all of a family.
pub fn addresses(model: &Model) -> BTreeSet<IpAddr> {
    let mut found = BTreeSet::new();
    for family in [Family::V4, Family::V6] {
        if model.restricts_node_ports(family) {
            let serving = super::node_addresses(model).into_iter();
            let serving = serving.filter(|(_, address)| address.node_ports);
            let of_family = |ip: &IpAddr| Family::of(*ip) == family;
            found.extend(serving.map(|(ip, _)| ip).filter(of_family));
        } else {
            found.insert(family.unspecified());
        }
    }
    found
}

/// Distinct addresses of ready endpoints on this node: those that are terminating get traffic, but no more shall come.
fn endpoints(model: &Model, name: &ServiceName, family: Family) -> usize {
    let slices = model.slices(name);
    let slices = slices.filter(|slice| slice.family == family && !slice.ports.is_empty());
    let endpoints = slices.flat_map(|slice| &slice.endpoints);
    let here = endpoints.filter(|endpoint| endpoint.is_ready() && endpoint.is_on_this_node());
    here.map(|endpoint| endpoint.address)
        .collect::<BTreeSet<IpAddr>>()
        .len()
}
