//! Small clusters in which everything that can collide does.

use std::net::IpAddr;

use proptest::prelude::*;

use crate::state::{
    Backend, BackendState, DesiredState, Family, Frontend, FrontendKind, NodeAddress, Protocol,
    ServiceName, ServicePort, ServiceState, TrafficPolicy,
};

/// Service ports 0 to 2 share their protocol and family, so that frontends can move between them.
const PORTS: [(&str, &str, Protocol, Family); 5] = [
    ("web", "http", Protocol::Tcp, Family::V4),
    ("web", "https", Protocol::Tcp, Family::V4),
    ("shop", "", Protocol::Tcp, Family::V4),
    ("dns", "dns", Protocol::Udp, Family::V4),
    ("web", "http", Protocol::Tcp, Family::V6),
];

/// The node's own address.
pub const NODE: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(192, 168, 0, 1));

fn service_port(index: usize) -> ServicePort {
    let (name, port, protocol, family) = PORTS[index];
    ServicePort {
        service: ServiceName::new("default", name),
        port: port.into(),
        protocol,
        family,
    }
}

fn address(family: Family, net: u8, host: u8) -> IpAddr {
    match family {
        Family::V4 => IpAddr::from([10, net, 0, host]),
        Family::V6 => IpAddr::from([0xfd00, net.into(), 0, 0, 0, 0, 0, host.into()]),
    }
}

/// The frontends that service ports 0 to 2 fight over.
fn contested() -> [Frontend; 6] {
    let v4 = |host, port, kind| Frontend {
        address: address(Family::V4, 96, host),
        port,
        kind,
        on_local_link: false,
    };
    [
        v4(1, 80, FrontendKind::ClusterIp),
        v4(1, 81, FrontendKind::ClusterIp),
        v4(2, 80, FrontendKind::ClusterIp),
        v4(3, 80, FrontendKind::LoadBalancer),
        v4(4, 80, FrontendKind::ExternalIp),
        Frontend {
            address: IpAddr::from([0, 0, 0, 0]),
            port: 30080,
            kind: FrontendKind::NodePort,
            on_local_link: false,
        },
    ]
}

fn backends(family: Family) -> impl Strategy<Value = Vec<Backend>> {
    let state = (any::<bool>(), any::<bool>(), 0..4_u8).prop_map(|(terminating, here, sets)| {
        BackendState {
            terminating,
            on_this_node: here,
            in_cluster: sets != 0,
            in_local: here && sets > 1,
        }
    });
    prop::collection::vec(prop::option::of(state), 5).prop_map(move |states| {
        let present = (1..)
            .zip(states)
            .filter_map(|(host, state)| Some((host, state?)));
        present
            .map(|(host, state)| Backend {
                address: address(family, 244, host),
                port: 8080,
                state,
            })
            .collect()
    })
}

fn policy() -> impl Strategy<Value = TrafficPolicy> {
    prop_oneof![3 => Just(TrafficPolicy::Cluster), 1 => Just(TrafficPolicy::Local)]
}

fn any_service(index: usize) -> impl Strategy<Value = ServiceState> {
    let key = service_port(index);
    let own = Frontend {
        address: address(key.family, 97, index as u8),
        port: 53,
        kind: FrontendKind::ClusterIp,
        on_local_link: false,
    };
    let affinity = prop::option::weighted(0.3, 1..20_000_u32);
    let rest = (affinity, policy(), policy(), any::<bool>(), any::<bool>());
    (backends(key.family), rest).prop_map(move |(backends, rest)| {
        let (affinity_seconds, internal_policy, external_policy, has_own, restricted) = rest;
        let everybody_at_home = || "10.0.0.0/8".parse().unwrap();
        ServiceState {
            key: key.clone(),
            frontends: has_own.then_some(own).into_iter().collect(),
            backends,
            affinity_seconds,
            internal_policy,
            external_policy,
            source_ranges: restricted.then(everybody_at_home).into_iter().collect(),
            admits_node: false,
            health_check_port: None,
        }
    })
}

/// `name` at `vip`:80, with endpoints at 10.244.0.`hosts` that the whole cluster may use.
pub fn service(name: &str, protocol: Protocol, vip: &str, hosts: &[u8]) -> ServiceState {
    let frontend = Frontend {
        address: vip.parse().unwrap(),
        port: 80,
        kind: FrontendKind::ClusterIp,
        on_local_link: false,
    };
    let backend = |host: &u8| Backend {
        address: address(Family::V4, 244, *host),
        port: 8080,
        state: BackendState {
            in_cluster: true,
            ..BackendState::default()
        },
    };
    ServiceState {
        key: ServicePort {
            service: ServiceName::new("default", name),
            port: "".into(),
            protocol,
            family: Family::V4,
        },
        frontends: vec![frontend],
        backends: hosts.iter().map(backend).collect(),
        affinity_seconds: None,
        internal_policy: TrafficPolicy::Cluster,
        external_policy: TrafficPolicy::Cluster,
        source_ranges: vec![],
        admits_node: false,
        health_check_port: None,
    }
}

/// Any state: each contested frontend belongs to one service port at most.
pub fn state() -> impl Strategy<Value = DesiredState> {
    let services: Vec<_> = (0..PORTS.len())
        .map(|index| prop::option::weighted(0.8, any_service(index)))
        .collect();
    let owners = prop::collection::vec((0..4_usize, prop::bool::weighted(0.1)), 6);
    (services, owners, any::<bool>()).prop_map(|(services, owners, second_address)| {
        let mut state = DesiredState::default();
        for service in services.into_iter().flatten() {
            state.services.insert(service.key.clone(), service);
        }
        for (mut frontend, (owner, on_local_link)) in contested().into_iter().zip(owners) {
            frontend.on_local_link = on_local_link;
            if let Some(service) = state.services.get_mut(&service_port(owner))
                && owner < 3
            {
                service.frontends.push(frontend);
                service.frontends.sort();
            }
        }
        let node_ports = NodeAddress { node_ports: true };
        state.addresses.insert(NODE, node_ports);
        if second_address {
            let address = IpAddr::from([192, 168, 0, 2]);
            state
                .addresses
                .insert(address, NodeAddress { node_ports: false });
        }
        state
    })
}
