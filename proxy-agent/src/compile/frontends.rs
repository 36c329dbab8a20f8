//! The addresses that a service port is reached at: those of its claims that it owns.

use super::{
    Problem,
    owners::{Owners, claims_of},
};
use crate::{
    model::{Model, Port, Service},
    state::{Frontend, FrontendKind, ServicePort},
};

/// Sorted frontends of one port in one family.
pub(super) fn frontends(
    model: &Model,
    owners: &Owners,
    service: &Service,
    port: &Port,
    key: &ServicePort,
    problems: &mut Vec<Problem>,
) -> Vec<Frontend> {
    let mut found = Vec::new();
    for (claim, kind) in claims_of(service, port, key.family) {
        match owners.owner(claim) {
            Some(owner) if *owner != key.service => problems.push(Problem::Taken {
                service: key.service.clone(),
                claim,
                owner: owner.clone(),
            }),
            Some(_) | None => found.push(Frontend {
                address: claim.address,
                port: claim.port.get(),
                kind,
                on_local_link: kind == FrontendKind::ClusterIp
                    && model.addresses().contains(&claim.address),
            }),
        }
    }
    found.sort_unstable();
    found
}
