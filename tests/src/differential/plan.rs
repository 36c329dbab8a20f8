//! What one random Service is, and what becomes of it over time.

use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

use serde_json::json;

use super::chance::Chance;
use crate::{Endpoint, Pod, Scenario, Service, flows::Target, peer::Transport, scenario::SOURCES};

/// All of them, served or not.
pub(super) const TRANSPORTS: [Transport; 3] = [Transport::Tcp, Transport::Udp, Transport::Sctp];
/// At which all Services listen.
pub(super) const PORT: u16 = 80;
/// Of the external address that several Services may claim.
const SHARED: u8 = 50;

/// Which Services may claim a ClusterIP, each the one this far behind its own number.
const CLAIMANTS: [u8; 2] = [2, 3];
const CLAIMED: u8 = 3;

/// One Service at one time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Plan {
    pub(super) number: u8,
    /// How often it was made: one that was deleted comes back as another.
    pub(super) made: u8,
    /// Which of the ClusterIPs it has.
    pub(super) address: u8,
    /// Which of the node ports.
    pub(super) ports: u8,
    /// In order; true is IPv6.
    pub(super) families: &'static [bool],
    pub(super) transports: &'static [Transport],
    pub(super) has_node_ports: bool,
    /// `ipMode` of the addresses of the load balancer.
    pub(super) balancer: Option<&'static str>,
    pub(super) is_external: bool,
    /// Also at an external address that others may claim.
    pub(super) claims_shared: bool,
    /// Also at the node's own address as an external one.
    pub(super) claims_node: bool,
    /// Also at an address that is a ClusterIP, of another Service if one has it: as its external or its load balancer's one.
    pub(super) claims_cluster_ip: Option<Target>,
    pub(super) ranges: Option<&'static [&'static str]>,
    pub(super) internal_local: bool,
    pub(super) external_local: bool,
    pub(super) is_sticky: bool,
    pub(super) distribution: Option<&'static str>,
    pub(super) endpoints: Vec<PlannedEndpoint>,
}

/// An endpoint of one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct PlannedEndpoint {
    backing: Backing,
    state: State,
    zone: Option<&'static str>,
    for_own_node: bool,
}

/// Which pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Backing {
    Near,
    Far,
    Client,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Ready,
    NotReady,
    Terminating,
}

/// Which hints a Service's endpoints have.
#[derive(Clone, Copy, Debug)]
enum Hints {
    None,
    Zones,
    Nodes,
    Some,
}

impl Plan {
    pub(super) fn new(number: u8, made: u8, address: u8, ports: u8, chance: &mut Chance) -> Self {
        const FAMILIES: [&[bool]; 4] = [&[false], &[true], &[false, true], &[true, false]];
        use Transport::{Sctp, Tcp, Udp};
        const SERVED: [&[Transport]; 5] =
            [&[Tcp], &[Udp], &[Tcp, Udp], &[Tcp, Sctp], &[Tcp, Udp, Sctp]];
        let has_node_ports = chance.one_in(2);
        let is_balanced = has_node_ports && chance.one_in(2);
        let mode = if chance.one_in(5) { "Proxy" } else { "VIP" };
        let mut plan = Self {
            number,
            made,
            address,
            ports,
            families: chance.of(&FAMILIES),
            transports: chance.of(&SERVED),
            has_node_ports,
            balancer: is_balanced.then_some(mode),
            is_external: false,
            claims_shared: false,
            claims_node: false,
            claims_cluster_ip: None,
            ranges: None,
            internal_local: false,
            external_local: false,
            is_sticky: false,
            distribution: None,
            endpoints: Vec::new(),
        };
        plan.decide(chance);
        plan.populate(chance);
        plan
    }

    /// The same Service some time later.
    pub(super) fn changed(&self, chance: &mut Chance) -> Self {
        let mut plan = self.clone();
        if chance.one_in(3) {
            plan.decide(chance);
        }
        if !chance.one_in(4) {
            plan.populate(chance);
        }
        plan
    }

    /// All that the API lets change afterwards.
    fn decide(&mut self, chance: &mut Chance) {
        const RANGES: [&[&str]; 3] = [
            &["10.244.0.0/16", "fd00:10:244::/48"],
            &["192.0.2.0/24", "2001:db8:1::/64"],
            &["0.0.0.0/0", "::/0"],
        ];
        let is_ranged = self.balancer.is_some() && chance.one_in(2);
        self.ranges = is_ranged.then(|| chance.of(&RANGES));
        self.is_external = chance.one_in(2);
        self.claims_shared = self.is_external && chance.one_in(2);
        // One Service at most: of two, nobody else tells which is served there.
        self.claims_node = self.number == 1 && chance.one_in(2);
        // Two at most, each another one: of two claimants of one, nobody else tells which is served there.
        let claims_cluster_ip = CLAIMANTS.contains(&self.number) && chance.one_in(2);
        let target = match self.balancer {
            Some(_) if chance.one_in(2) => Target::LoadBalancer,
            _ => Target::ExternalIp,
        };
        self.claims_cluster_ip = claims_cluster_ip.then_some(target);
        self.internal_local = chance.one_in(3);
        self.external_local = chance.one_in(2);
        self.is_sticky = chance.one_in(4);
        let distributions = ["PreferClose", "PreferSameZone", "PreferSameNode"];
        let is_distributed = chance.one_in(4);
        self.distribution = is_distributed.then(|| chance.of(&distributions));
    }

    /// Endpoints in any state, or none.
    fn populate(&mut self, chance: &mut Chance) {
        let hints = chance.of(&[Hints::None, Hints::Zones, Hints::Nodes, Hints::Some]);
        self.endpoints.clear();
        for backing in [Backing::Near, Backing::Far, Backing::Client] {
            let state = chance.of(&[
                None,
                None,
                Some(State::NotReady),
                Some(State::Terminating),
                Some(State::Ready),
                Some(State::Ready),
            ]);
            let zone = chance.of(&["zone-a", "zone-b", "zone-c"]);
            let (has_zone, has_node) = match hints {
                Hints::None => (false, false),
                Hints::Zones => (true, false),
                Hints::Nodes => (false, true),
                Hints::Some => (chance.one_in(2), chance.one_in(2)),
            };
            self.endpoints.extend(state.map(|state| PlannedEndpoint {
                backing,
                state,
                zone: has_zone.then_some(zone),
                for_own_node: has_node,
            }));
        }
    }

    /// Those with another one are other Services, even of one name.
    pub(super) fn identity(&self) -> (u8, u8) {
        (self.number, self.made)
    }

    pub(super) fn name(&self) -> String {
        format!("web-{}", self.number)
    }

    pub(super) fn vip(&self, v6: bool) -> IpAddr {
        vip(self.address, v6)
    }

    pub(super) fn node_port(&self, transport: Transport) -> u16 {
        let offset = match transport {
            Transport::Tcp => 0,
            Transport::Udp => 1,
            Transport::Sctp => 2,
        };
        30_100 + 4 * u16::from(self.ports) + offset
    }

    /// The external address that it has alone.
    pub(super) fn external(&self, v6: bool) -> Option<IpAddr> {
        self.is_external.then(|| nobodys(v6, 100 + self.number))
    }

    /// The one that others may claim, too.
    pub(super) fn shared(&self, v6: bool) -> Option<IpAddr> {
        self.claims_shared.then(|| nobodys(v6, SHARED))
    }

    /// All external addresses.
    fn externals(&self, v6: bool, s: &Scenario) -> impl Iterator<Item = IpAddr> {
        let node = self.claims_node.then(|| s.a.address(v6));
        let claimed = self.claimed_as(Target::ExternalIp, v6);
        let all = [self.external(v6), self.shared(v6), node, claimed];
        all.into_iter().flatten()
    }

    /// All addresses of the load balancer.
    fn balancers(&self, v6: bool) -> impl Iterator<Item = IpAddr> {
        let claimed = self.claimed_as(Target::LoadBalancer, v6);
        [self.balancer(v6), claimed].into_iter().flatten()
    }

    fn claimed_as(&self, wanted: Target, v6: bool) -> Option<IpAddr> {
        let (_, address, _) = self.claimed(v6).filter(|(target, ..)| *target == wanted)?;
        Some(address)
    }

    /// The ClusterIP that it claims, as what, and whether it is served there if nobody else is. Not its own.
    pub(super) fn claimed(&self, v6: bool) -> Option<(Target, IpAddr, bool)> {
        let target = self.claims_cluster_ip?;
        let address = self.number + CLAIMED;
        let is_frontend = target == Target::ExternalIp || self.balancer == Some("VIP");
        (address != self.address).then(|| (target, vip(address, v6), is_frontend))
    }

    /// In which families and over which transports it is served.
    pub(super) fn served(&self) -> impl Iterator<Item = (bool, Transport)> {
        let families = self.families.iter();
        families.flat_map(|v6| self.transports.iter().map(|transport| (*v6, *transport)))
    }

    /// Where it may be found over these transports.
    pub(super) fn places(
        &self,
        transports: &[Transport],
        s: &Scenario,
    ) -> BTreeSet<(SocketAddr, Transport)> {
        let mut places = BTreeSet::new();
        for &v6 in self.families {
            let addresses = [self.vip(v6)].into_iter().chain(self.balancers(v6));
            let addresses = addresses.chain(self.externals(v6, s));
            let addresses: Vec<IpAddr> = addresses.collect();
            for &transport in transports {
                let at = addresses.iter().map(|&address| (address, PORT));
                let node_port = self.has_node_ports.then(|| self.node_port(transport));
                let at = at.chain(node_port.map(|port| (s.a.address(v6), port)));
                places.extend(at.map(|to| (to.into(), transport)));
            }
        }
        places
    }

    pub(super) fn balancer(&self, v6: bool) -> Option<IpAddr> {
        self.balancer.map(|_| nobodys(v6, 200 + self.number))
    }

    /// The names of the pods that may serve it.
    pub(super) fn candidates<'a>(&self, s: &'a Scenario) -> Vec<&'a str> {
        let serving = self
            .endpoints
            .iter()
            .filter(|it| it.state != State::NotReady);
        serving.map(|it| it.pod(s).name()).collect()
    }

    pub(super) fn service(&self, s: &Scenario) -> Service {
        let families = self.families.iter().copied();
        let vips: Vec<IpAddr> = families.clone().map(|v6| self.vip(v6)).collect();
        let mut service = Service::new(&self.name(), &vips);
        for &transport in self.transports {
            service = service.port(
                &transport.name().to_lowercase(),
                transport.name(),
                PORT,
                SOURCES,
            );
            if self.has_node_ports {
                service = service.node_port(self.node_port(transport));
            }
        }
        for v6 in families.clone() {
            for address in self.balancers(v6) {
                service = service.load_balancer(address, self.balancer.unwrap_or_default());
            }
        }
        let external = families.clone().flat_map(|v6| self.externals(v6, s));
        let external: Vec<IpAddr> = external.collect();
        // What nobody outside reaches has no such policy.
        let external_local = self.external_local && (self.has_node_ports || !external.is_empty());
        if !external.is_empty() {
            service = service.spec("externalIPs", json!(external));
        }
        if let Some(ranges) = self.ranges {
            service = service.spec("loadBalancerSourceRanges", json!(ranges));
        }
        if self.internal_local {
            service = service.spec("internalTrafficPolicy", "Local");
        }
        if external_local {
            service = service.spec("externalTrafficPolicy", "Local");
            if self.balancer.is_some() {
                service = service.spec("healthCheckNodePort", 31_000 + u16::from(self.number));
            }
        }
        if self.is_sticky {
            service = service.affinity(10_800);
        }
        if let Some(distribution) = self.distribution {
            service = service.spec("trafficDistribution", distribution);
        }
        let endpoints = self.endpoints.iter();
        let endpoints = endpoints.flat_map(|it| families.clone().map(|v6| it.endpoint(v6, s)));
        service.endpoints(endpoints)
    }
}

impl PlannedEndpoint {
    /// Ready, and without hints.
    pub(super) fn plain(self) -> Self {
        Self {
            state: State::Ready,
            zone: None,
            for_own_node: false,
            ..self
        }
    }

    fn pod<'a>(&self, s: &'a Scenario) -> &'a Pod {
        match self.backing {
            Backing::Near => &s.near,
            Backing::Far => &s.far,
            Backing::Client => &s.client,
        }
    }

    fn endpoint(&self, v6: bool, s: &Scenario) -> Endpoint {
        let pod = self.pod(s);
        let node = s.endpoint(pod).node().to_owned();
        let endpoint = Endpoint::new(pod.address(v6), &node);
        let mut endpoint = match self.state {
            State::Ready => endpoint,
            State::NotReady => endpoint.not_ready(),
            State::Terminating => endpoint.terminating(),
        };
        if let Some(zone) = self.zone {
            endpoint = endpoint.for_zone(zone);
        }
        if self.for_own_node {
            endpoint = endpoint.for_node(&node);
        }
        endpoint
    }
}

/// One of the ClusterIPs.
pub(super) fn vip(address: u8, v6: bool) -> IpAddr {
    match v6 {
        true => Ipv6Addr::new(0xfd00, 0x10, 0x96, 0, 0, 0, 0, 0x100 + u16::from(address)).into(),
        false => Ipv4Addr::new(10, 96, 1, address).into(),
    }
}

fn nobodys(v6: bool, last: u8) -> IpAddr {
    match v6 {
        true => Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, last.into()).into(),
        false => Ipv4Addr::new(203, 0, 113, last).into(),
    }
}
