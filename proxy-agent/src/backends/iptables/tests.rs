use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
};

use host::{Host, walk};
use simulated::Simulated;

use super::{
    parsed::Parsed,
    rules::*,
    tables::{Table, Tables as _},
    walk::{End, Packet},
    *,
};
use crate::{
    backends::Part,
    state::{
        Backend as Endpoint, BackendState, Frontend, FrontendKind, NodeAddress, Protocol,
        ServiceName, ServiceState, TrafficPolicy,
    },
};

mod affinity;
mod bulk;
mod changes;
mod host;
mod matrix;
mod policies;
mod refusals;
mod simulated;
mod sizes;
mod takeover;
mod unallocated;
pub(super) mod world;

/// kube-proxy's defaults, with the pod networks known.
pub(super) fn rules() -> Rules {
    Rules {
        families: [Family::V4, Family::V6].into(),
        masquerade_mark: 0x4000,
        masquerade_all: false,
        local_pods: LocalPods::Networks(vec![
            "10.244.0.0/16".parse().unwrap(),
            "fd00:244::/32".parse().unwrap(),
        ]),
        node_ports: NodePorts::All,
        localhost_node_ports: true,
        conntrack_liberal: false,
        service_networks: None,
        features: Features {
            random_fully: true,
            ipset: true,
            recent: true,
            nfacct: false,
        },
    }
}

/// `v4`, or the same in IPv6: 10.96.0.1 is fd00:96::1.
fn ip(family: Family, v4: &str) -> IpAddr {
    let address: std::net::Ipv4Addr = v4.parse().unwrap();
    let [first, net, high, low] = address.octets();
    match family {
        Family::V4 => address.into(),
        Family::V6 if address.is_loopback() => IpAddr::from([0, 0, 0, 0, 0, 0, 0, 1]),
        Family::V6 if address.is_unspecified() => IpAddr::from([0_u16; 8]),
        Family::V6 if first == 10 => {
            let net = u16::from_str_radix(&net.to_string(), 16).unwrap();
            IpAddr::from([0xfd00, net, 0, 0, 0, 0, high.into(), low.into()])
        }
        Family::V6 => {
            let net = u16::from(first) << 8 | u16::from(net);
            IpAddr::from([0xfd01, net, 0, 0, 0, 0, high.into(), low.into()])
        }
    }
}

fn endpoint(address: IpAddr, is_here: bool) -> Endpoint {
    Endpoint {
        address,
        port: 8080,
        state: BackendState {
            terminating: false,
            on_this_node: is_here,
            in_cluster: true,
            in_local: is_here,
        },
    }
}

/// A Service with a frontend of every kind and no endpoint.
fn service(family: Family, name: &str) -> ServiceState {
    let frontend = |address, port, kind| Frontend {
        address: ip(family, address),
        port,
        kind,
        on_local_link: false,
    };
    ServiceState {
        key: ServicePort {
            service: ServiceName::new("default", name),
            port: "http".into(),
            protocol: Protocol::Tcp,
            family,
        },
        frontends: vec![
            frontend("10.96.0.1", 80, FrontendKind::ClusterIp),
            frontend("0.0.0.0", 30080, FrontendKind::NodePort),
            frontend("198.51.100.1", 80, FrontendKind::LoadBalancer),
            frontend("203.0.113.1", 80, FrontendKind::ExternalIp),
        ],
        backends: Vec::new(),
        affinity_seconds: None,
        internal_policy: TrafficPolicy::Cluster,
        external_policy: TrafficPolicy::Cluster,
        source_ranges: Vec::new(),
        admits_node: false,
        health_check_port: None,
    }
}

/// One endpoint on this node, and one elsewhere.
fn with_endpoints(mut service: ServiceState) -> ServiceState {
    let family = service.key.family;
    service.backends = vec![
        endpoint(ip(family, "10.244.0.9"), true),
        endpoint(ip(family, "10.244.1.9"), false),
    ];
    service
}

fn of(services: &[&ServiceState]) -> DesiredState {
    let services = services.iter();
    DesiredState {
        services: services
            .map(|state| (state.key.clone(), (*state).clone()))
            .collect(),
        ..DesiredState::default()
    }
}

/// A backend that holds `state`.
fn holding(rules: Rules, state: &DesiredState) -> IptablesBackend<Simulated> {
    let mut backend = IptablesBackend::new(Simulated::default(), rules);
    let observed = backend.observe().unwrap();
    let plan = backend.plan(&observed, state, Bounds::default());
    backend.apply(&plan, state).unwrap();
    assert_eq!(*backend.left_out(), BTreeMap::new());
    backend
}

/// The node whose rules are tested.
fn host() -> Host {
    let addresses = [Family::V4, Family::V6].map(|family| ip(family, "192.168.0.1"));
    Host {
        addresses: addresses.into(),
        ..Host::default()
    }
}

fn packet(source: IpAddr, interface: Option<&'static str>, to: (IpAddr, u16)) -> Packet<'static> {
    Packet {
        source,
        destination: to.into(),
        protocol: Protocol::Tcp,
        interface,
    }
}

/// Where a packet can end, in words, without chances.
fn ends(backend: &IptablesBackend<Simulated>, packet: &Packet<'_>) -> BTreeSet<String> {
    let ends = walk(backend.tables(), &host(), packet);
    ends.iter().map(End::to_string).collect()
}

fn texts<const N: usize>(texts: [&str; N]) -> BTreeSet<String> {
    texts.map(str::to_owned).into()
}
