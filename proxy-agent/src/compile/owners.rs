//! Who owns an address and port that several Services claim.
//!
//! A ClusterIP beats every other claim: the API server hands it out, whereas anybody may write it into another Service's
//! `externalIPs` (CVE-2020-8554). Among equals the oldest Service wins, then the first by name.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet, HashMap, hash_map::Entry},
    fmt,
    net::{IpAddr, SocketAddr},
    num::NonZeroU16,
};

use crate::{
    model::{Endpoint, Model, Port, Service},
    state::{Family, FrontendKind, Protocol, ServiceName},
};

/// An address and port that a Service wants to be reached at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Claim {
    /// Unspecified for a node port.
    pub address: IpAddr,
    /// Port.
    pub port: NonZeroU16,
    /// Protocol.
    pub protocol: Protocol,
}

impl fmt::Display for Claim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            address,
            port,
            protocol,
        } = *self;
        if address.is_unspecified() {
            write!(f, "node port {port}/{protocol} ({})", Family::of(address))
        } else {
            write!(f, "{}/{protocol}", SocketAddr::new(address, port.get()))
        }
    }
}

/// A claim of somebody. Sorts by claim, then by right.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Bid {
    claim: Claim,
    is_cluster_ip: Reverse<bool>,
    created: i64,
    service: ServiceName,
}

/// All claims of all Services, and all ClusterIPs.
#[derive(Clone, Debug, Default)]
pub struct Owners {
    bids: BTreeSet<Bid>,
    /// What each Service had at the last update.
    of: HashMap<ServiceName, Holding>,
    /// How many Services have an address as ClusterIP.
    cluster_ips: HashMap<IpAddr, u32>,
}

/// What one Service claims.
#[derive(Clone, Debug, Default)]
struct Holding {
    bids: Vec<Bid>,
    cluster_ips: Box<[IpAddr]>,
}

impl Owners {
    /// The owners of a whole cluster.
    pub fn of(model: &Model) -> Self {
        let mut owners = Self::default();
        for (name, service) in model.services() {
            owners.insert(name, service);
        }
        owners
    }

    /// Who has it.
    pub fn owner(&self, claim: Claim) -> Option<&ServiceName> {
        self.claimants(claim).next()
    }

    /// Whether it is the ClusterIP of a Service.
    pub fn is_cluster_ip(&self, address: IpAddr) -> bool {
        self.cluster_ips.contains_key(&address)
    }

    /// The Services known.
    pub fn services(&self) -> impl Iterator<Item = &ServiceName> {
        self.of.keys()
    }

    /// Brings `changed` up to date, and adds to `scope` every Service that gains or loses something by it.
    pub(super) fn update(
        &mut self,
        model: &Model,
        changed: &BTreeSet<ServiceName>,
        scope: &mut BTreeSet<ServiceName>,
    ) {
        let mut claims = BTreeSet::new();
        let mut addresses = BTreeMap::new();
        for name in changed {
            let before = self.remove(name);
            let after = model
                .service(name)
                .map(|service| self.insert(name, service));
            let after = after.map_or(&[][..], |holding| &holding.bids);
            if before.bids != *after {
                claims.extend(before.bids.iter().chain(after).map(|bid| bid.claim));
            }
            let ips = model
                .service(name)
                .map_or(&[][..], |service| &service.cluster_ips);
            for ip in before.cluster_ips.iter().filter(|ip| !ips.contains(ip)) {
                *addresses.entry(*ip).or_insert(0) -= 1;
            }
            for ip in ips.iter().filter(|ip| !before.cluster_ips.contains(ip)) {
                *addresses.entry(*ip).or_insert(0) += 1;
            }
        }
        for claim in claims {
            scope.extend(self.claimants(claim).cloned());
        }
        let appeared_or_gone = |(ip, change): (IpAddr, i64)| {
            let now = i64::from(self.cluster_ips.get(&ip).copied().unwrap_or(0));
            ((now == 0) != (now - change == 0)).then_some(ip)
        };
        let moved = addresses.into_iter().filter_map(appeared_or_gone);
        let moved: Vec<IpAddr> = moved.filter(|ip| model.may_have_endpoint_at(*ip)).collect();
        add_services_with_endpoint_at(model, &moved, scope);
    }

    fn claimants(&self, claim: Claim) -> impl Iterator<Item = &ServiceName> {
        let first = Bid {
            claim,
            is_cluster_ip: Reverse(true),
            created: i64::MIN,
            service: ServiceName::default(),
        };
        let bids = self.bids.range(first..);
        bids.take_while(move |bid| bid.claim == claim)
            .map(|bid| &bid.service)
    }

    fn insert(&mut self, name: &ServiceName, service: &Service) -> &Holding {
        let bids = claims(service).map(|(claim, is_cluster_ip)| Bid {
            claim,
            is_cluster_ip: Reverse(is_cluster_ip),
            created: service.created,
            service: name.clone(),
        });
        let holding = Holding {
            bids: bids.collect(),
            cluster_ips: service.cluster_ips.clone(),
        };
        self.bids.extend(holding.bids.iter().cloned());
        for ip in &holding.cluster_ips {
            *self.cluster_ips.entry(*ip).or_default() += 1;
        }
        self.of.entry(name.clone()).insert_entry(holding).into_mut()
    }

    fn remove(&mut self, name: &ServiceName) -> Holding {
        let holding = self.of.remove(name).unwrap_or_default();
        for bid in &holding.bids {
            self.bids.remove(bid);
        }
        for ip in &holding.cluster_ips {
            if let Entry::Occupied(mut count) = self.cluster_ips.entry(*ip) {
                *count.get_mut() -= 1;
                if *count.get() == 0 {
                    count.remove();
                }
            }
        }
        holding
    }
}

/// An endpoint at a ClusterIP is refused, so those Services depend on which ClusterIPs there are. `addresses` is sorted.
fn add_services_with_endpoint_at(
    model: &Model,
    addresses: &[IpAddr],
    scope: &mut BTreeSet<ServiceName>,
) {
    if addresses.is_empty() {
        return;
    }
    for (name, slice) in model.all_slices() {
        let is_there = |endpoint: &Endpoint| addresses.binary_search(&endpoint.address).is_ok();
        if slice.endpoints.iter().any(is_there) {
            scope.insert(name.clone());
        }
    }
}

/// Each with whether it is to a ClusterIP.
fn claims(service: &Service) -> impl Iterator<Item = (Claim, bool)> {
    let ports = service.ports.iter();
    let of_ports = ports.flat_map(move |port| {
        let families = service.families();
        families.flat_map(move |family| claims_of(service, port, family))
    });
    let of_ports = of_ports.map(|(claim, kind)| (claim, kind == FrontendKind::ClusterIp));
    of_ports.chain(health_check_claims(service).map(|claim| (claim, false)))
}

/// The port at which load balancers ask is taken from the node ports, in both families whichever the Service has.
pub(super) fn health_check_claims(service: &Service) -> impl Iterator<Item = Claim> {
    let families = [Family::V4, Family::V6].into_iter();
    let port = service.health_check_port;
    families.filter_map(move |family| {
        Some(Claim {
            address: family.unspecified(),
            port: port?,
            protocol: Protocol::Tcp,
        })
    })
}

/// What one port claims in one family, each address once: where a Service names an address as load balancer's and as
/// external, the former counts, because it restricts sources.
pub(super) fn claims_of(
    service: &Service,
    port: &Port,
    family: Family,
) -> Vec<(Claim, FrontendKind)> {
    let mut found: Vec<(Claim, FrontendKind)> = Vec::new();
    let mut add = |address: IpAddr, port: NonZeroU16, protocol, kind| {
        let claim = Claim {
            address,
            port,
            protocol,
        };
        if Family::of(address) == family && found.iter().all(|(other, _)| *other != claim) {
            found.push((claim, kind));
        }
    };
    for (addresses, kind) in [
        (&service.cluster_ips, FrontendKind::ClusterIp),
        (&service.load_balancer_ips, FrontendKind::LoadBalancer),
        (&service.external_ips, FrontendKind::ExternalIp),
    ] {
        for address in addresses {
            add(*address, port.port, port.protocol, kind);
        }
    }
    if let Some(node_port) = port.node_port {
        let every = family.unspecified();
        add(every, node_port, port.protocol, FrontendKind::NodePort);
    }
    found
}
