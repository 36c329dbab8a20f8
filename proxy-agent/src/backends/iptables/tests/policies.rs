//! What is refused where, who may reach what, and on which addresses.

use super::*;

const CLIENT: &str = "192.0.2.7";

pub(super) fn vip(family: Family) -> (IpAddr, u16) {
    (ip(family, "10.96.0.1"), 80)
}

fn balancer(family: Family) -> (IpAddr, u16) {
    (ip(family, "198.51.100.1"), 80)
}

fn node_port(family: Family) -> (IpAddr, u16) {
    (ip(family, "192.168.0.1"), 30080)
}

pub(super) fn outside(family: Family, to: (IpAddr, u16)) -> Packet<'static> {
    packet(ip(family, CLIENT), Some("eth0"), to)
}

pub(super) fn pod(family: Family, to: (IpAddr, u16)) -> Packet<'static> {
    packet(ip(family, "10.244.0.5"), Some("cni0"), to)
}

pub(super) fn node(family: Family, to: (IpAddr, u16)) -> Packet<'static> {
    packet(ip(family, "192.168.0.1"), None, to)
}

#[test]
fn without_endpoints_every_frontend_is_rejected() {
    for family in [Family::V4, Family::V6] {
        let backend = holding(rules(), &of(&[&service(family, "web")]));
        let external = (ip(family, "203.0.113.1"), 80);
        for packet in [
            pod(family, vip(family)),
            node(family, vip(family)),
            outside(family, vip(family)),
            pod(family, node_port(family)),
            outside(family, node_port(family)),
            pod(family, balancer(family)),
            outside(family, balancer(family)),
            outside(family, external),
        ] {
            assert_eq!(ends(&backend, &packet), texts(["rejected"]), "{packet:?}");
        }
    }
}

#[test]
fn the_port_at_which_load_balancers_ask_is_accepted_in_both_families() {
    let mut web = service(Family::V4, "web");
    web.health_check_port = Some(32_000);
    let accepted = |backend: &mut IptablesBackend<Simulated>, family| {
        let text = backend.tables_mut().save(family, Table::Filter).unwrap();
        text.lines()
            .filter(|line| line.starts_with("-A KUBE-NODEPORTS "))
            .map(str::to_owned)
            .collect::<Vec<_>>()
    };
    let mut backend = holding(rules(), &of(&[&web]));
    for family in [Family::V4, Family::V6] {
        assert_eq!(
            accepted(&mut backend, family),
            [
                "-A KUBE-NODEPORTS -p tcp -m tcp --dport 32000 -m comment --comment \"default/web:http health check node port\" -j ACCEPT"
            ]
        );
    }
    web.health_check_port = None;
    let state = of(&[&web]);
    let observed = backend.observe().unwrap();
    let plan = backend.plan(&observed, &state, Bounds::default());
    backend.apply(&plan, &state).unwrap();
    for family in [Family::V4, Family::V6] {
        assert_eq!(accepted(&mut backend, family), [""; 0]);
    }
}

#[test]
fn without_an_endpoint_here_local_traffic_is_dropped_and_pods_take_the_short_cut() {
    let family = Family::V4;
    let mut service = with_endpoints(service(family, "web"));
    service.backends.remove(0);
    service.external_policy = TrafficPolicy::Local;
    service.internal_policy = TrafficPolicy::Local;
    let backend = holding(rules(), &of(&[&service]));
    assert_eq!(
        ends(&backend, &pod(family, vip(family))),
        texts(["dropped"])
    );
    for to in [balancer(family), node_port(family)] {
        assert_eq!(ends(&backend, &outside(family, to)), texts(["dropped"]));
        assert_eq!(ends(&backend, &pod(family, to)), texts(["10.244.1.9:8080"]));
        assert_eq!(
            ends(&backend, &node(family, to)),
            texts(["10.244.1.9:8080 m"])
        );
    }
}

#[test]
fn a_port_or_protocol_that_no_service_has_is_left_alone() {
    let family = Family::V4;
    let backend = holding(rules(), &of(&[&with_endpoints(service(family, "web"))]));
    let (address, _) = vip(family);
    assert_eq!(
        ends(&backend, &pod(family, (address, 81))),
        texts(["10.96.0.1:81"])
    );
    let udp = Packet {
        protocol: Protocol::Udp,
        ..pod(family, vip(family))
    };
    assert_eq!(ends(&backend, &udp), texts(["10.96.0.1:80"]));
}

#[test]
fn one_port_of_three_protocols_is_three_services() {
    let family = Family::V6;
    let protocols = [Protocol::Tcp, Protocol::Udp, Protocol::Sctp];
    let services = protocols.map(|protocol| {
        let mut service = service(family, "dns");
        service.key.protocol = protocol;
        service.key.port = protocol.to_string().to_lowercase().into();
        let last = protocol as u8;
        service.backends = vec![endpoint(ip(family, &format!("10.244.1.{last}")), false)];
        service
    });
    let [a, b, c] = &services;
    let backend = holding(rules(), &of(&[a, b, c]));
    for protocol in protocols {
        let packet = Packet {
            protocol,
            ..pod(family, vip(family))
        };
        let address = ip(family, &format!("10.244.1.{}", protocol as u8));
        let expected = SocketAddr::from((address, 8080)).to_string();
        assert_eq!(ends(&backend, &packet), texts([&expected]));
    }
}

fn restricted(ranges: &[&str]) -> ServiceState {
    let mut service = with_endpoints(service(Family::V4, "web"));
    service.source_ranges = ranges.iter().map(|range| range.parse().unwrap()).collect();
    service
}

#[test]
fn source_ranges_guard_the_load_balancers_address_alone() {
    let family = Family::V4;
    let service = restricted(&["203.0.113.0/24"]);
    let backend = holding(rules(), &of(&[&service]));
    let served = texts(["10.244.0.9:8080 m", "10.244.1.9:8080 m"]);
    let dropped = texts(["dropped"]);
    let allowed = packet([203, 0, 113, 9].into(), Some("eth0"), balancer(family));
    assert_eq!(ends(&backend, &allowed), served);
    for packet in [
        outside(family, balancer(family)),
        pod(family, balancer(family)),
        node(family, balancer(family)),
    ] {
        assert_eq!(ends(&backend, &packet), dropped);
    }
    assert_eq!(ends(&backend, &outside(family, node_port(family))), served);
    let external = (ip(family, "203.0.113.1"), 80);
    assert_eq!(ends(&backend, &outside(family, external)), served);
    // A VIP that is assigned to the node is dropped in INPUT.
    let mut host = host();
    host.addresses.insert(balancer(family).0);
    let found = walk(backend.tables(), &host, &outside(family, balancer(family)));
    assert_eq!(
        found.iter().map(End::to_string).collect::<BTreeSet<_>>(),
        dropped
    );
}

#[test]
fn a_range_with_the_nodes_address_lets_the_load_balancers_own_address_in() {
    let family = Family::V4;
    let mut admitting = restricted(&["192.168.0.0/24"]);
    admitting.admits_node = true;
    let own = packet(balancer(family).0, None, balancer(family));
    let served = texts(["10.244.0.9:8080 m", "10.244.1.9:8080 m"]);
    let with_node = holding(rules(), &of(&[&admitting]));
    assert_eq!(ends(&with_node, &own), served);
    assert_eq!(ends(&with_node, &node(family, balancer(family))), served);
    let without = holding(rules(), &of(&[&restricted(&["203.0.113.0/24"])]));
    assert_eq!(ends(&without, &own), texts(["dropped"]));
    let everybody = holding(rules(), &of(&[&restricted(&["0.0.0.0/0"])]));
    assert_eq!(ends(&everybody, &outside(family, balancer(family))), served);
}

fn listed(localhost_node_ports: bool, addresses: &[&str]) -> IptablesBackend<Simulated> {
    let mut state = of(&[&with_endpoints(service(Family::V4, "web"))]);
    let node_ports = NodeAddress { node_ports: true };
    let addresses = addresses.iter().map(|ip| (ip.parse().unwrap(), node_ports));
    state.addresses = addresses.collect();
    let rules = Rules {
        node_ports: NodePorts::Listed([Family::V4].into()),
        localhost_node_ports,
        ..rules()
    };
    holding(rules, &state)
}

#[test]
fn node_ports_are_served_where_they_should_be() {
    let family = Family::V4;
    let at = |address: &str| (ip(family, address), 30080);
    let localhost = packet(ip(family, "127.0.0.1"), None, at("127.0.0.1"));
    let served = texts(["10.244.0.9:8080 m", "10.244.1.9:8080 m"]);
    let untouched = |address: &str| texts([&format!("{address}:30080")]);

    let backend = listed(true, &["192.168.0.1"]);
    assert_eq!(ends(&backend, &outside(family, at("192.168.0.1"))), served);
    assert_eq!(
        ends(&backend, &outside(family, at("192.168.0.2"))),
        untouched("192.168.0.2")
    );
    assert_eq!(ends(&backend, &localhost), served);

    let backend = listed(false, &["192.168.0.2"]);
    assert_eq!(
        ends(&backend, &outside(family, at("192.168.0.1"))),
        untouched("192.168.0.1")
    );
    assert_eq!(ends(&backend, &localhost), untouched("127.0.0.1"));

    let rules = Rules {
        localhost_node_ports: false,
        ..rules()
    };
    let backend = holding(rules, &of(&[&with_endpoints(service(family, "web"))]));
    assert_eq!(ends(&backend, &outside(family, at("192.168.0.1"))), served);
    assert_eq!(ends(&backend, &localhost), untouched("127.0.0.1"));
}

/// CVE-2020-8558.
#[test]
fn a_neighbour_never_reaches_the_nodes_loopback() {
    let martian = packet(
        [192, 168, 0, 99].into(),
        Some("eth0"),
        ([127, 0, 0, 1].into(), 10250),
    );
    let backend = holding(rules(), &DesiredState::default());
    assert_eq!(ends(&backend, &martian), texts(["dropped"]));
    let filter = backend.tables().chains(Family::V6, Table::Filter);
    assert!(
        !filter.contains_key("KUBE-FIREWALL"),
        "route_localnet is IPv4's"
    );
}

#[test]
fn kubelets_chain_keeps_what_is_in_it() {
    let mut tables = Simulated::default();
    let filter = tables.tables.get_mut(&(Family::V4, Table::Filter)).unwrap();
    let marked = "-m mark --mark 0x8000/0x8000 -j DROP".to_owned();
    filter.insert("KUBE-FIREWALL".to_owned(), vec![marked.clone()]);
    let mut backend = IptablesBackend::new(tables, rules());
    let observed = backend.observe().unwrap();
    let state = DesiredState::default();
    let plan = backend.plan(&observed, &state, Bounds::default());
    backend.apply(&plan, &state).unwrap();
    let rules = &backend.tables().chains(Family::V4, Table::Filter)["KUBE-FIREWALL"];
    assert_eq!(rules.len(), 2);
    assert!(rules.contains(&marked));
}

#[test]
fn invalid_packets_are_dropped_only_when_they_come_from_pods() {
    let invalid = |rules: Rules| {
        let backend = holding(rules, &DesiredState::default());
        let forward = &backend.tables().chains(Family::V4, Table::Filter)["KUBE-FORWARD"];
        let invalid = forward.iter().filter(|rule| rule.contains("INVALID"));
        invalid.cloned().collect::<Vec<_>>()
    };
    assert_eq!(
        invalid(rules()),
        ["-s 10.244.0.0/16 -m conntrack --ctstate INVALID -j DROP"]
    );
    let bridge = LocalPods::Interface("cni0".to_owned());
    let counted = Features {
        nfacct: true,
        ..rules().features
    };
    assert_eq!(
        invalid(Rules {
            local_pods: bridge,
            features: counted,
            ..rules()
        }),
        [
            "-i cni0 -m conntrack --ctstate INVALID -m nfacct --nfacct-name  ct_state_invalid_dropped_pkts -j DROP"
        ]
    );
    let nobody: [&str; 0] = [];
    let liberal = Rules {
        conntrack_liberal: true,
        ..rules()
    };
    assert_eq!(invalid(liberal), nobody);
    let unknown = Rules {
        local_pods: LocalPods::Unknown,
        ..rules()
    };
    assert_eq!(invalid(unknown), nobody);
}
