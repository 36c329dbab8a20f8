//! Addresses of ServiceCIDRs that no Service has.

use ipnet::IpNet;

use super::{
    policies::{node, outside, pod, vip},
    *,
};

const FAMILIES: [Family; 2] = [Family::V4, Family::V6];

/// As with kube-proxy's mode nftables.
fn dropping() -> Rules {
    Rules {
        service_networks: Some(Vec::new()),
        ..rules()
    }
}

/// 10.96.0.0/16, and the same in IPv6.
fn networks() -> Vec<IpNet> {
    let networks = ["10.96.0.0/16", "fd00:96::/112"];
    networks.map(|network| network.parse().unwrap()).into()
}

/// A state with these Services and networks.
fn with_networks(services: &[&ServiceState], networks: Vec<IpNet>) -> DesiredState {
    DesiredState {
        service_networks: networks,
        ..of(services)
    }
}

fn bring(backend: &mut IptablesBackend<Simulated>, state: &DesiredState) {
    let observed = backend.observe().unwrap();
    let plan = backend.plan(&observed, state, Bounds::default());
    backend.apply(&plan, state).unwrap();
}

/// What becomes of a packet to this address and port, whoever of three clients sends it.
fn end(backend: &IptablesBackend<Simulated>, family: Family, to: (&str, u16)) -> BTreeSet<String> {
    let to = (ip(family, to.0), to.1);
    let packets = [pod(family, to), node(family, to), outside(family, to)];
    packets
        .iter()
        .flat_map(|packet| ends(backend, packet))
        .collect()
}

#[test]
fn what_no_service_has_is_dropped_and_everything_else_goes_on() {
    for family in FAMILIES {
        let state = with_networks(&[&service(family, "web")], networks());
        let mut backend = holding(dropping(), &state);
        assert_eq!(
            end(&backend, family, ("10.96.0.1", 80)),
            texts(["rejected"])
        );
        let web = with_endpoints(service(family, "web"));
        bring(&mut backend, &with_networks(&[&web], networks()));
        for (to, text) in [
            (("10.96.0.2", 80), "dropped".to_owned()),
            // As the others: it takes no rule for each Service.
            (("10.96.0.1", 81), "dropped".to_owned()),
            (
                ("10.97.0.1", 80),
                format!("{}", SocketAddr::from((ip(family, "10.97.0.1"), 80))),
            ),
            (
                ("192.168.0.1", 80),
                format!("{}", SocketAddr::from((ip(family, "192.168.0.1"), 80))),
            ),
        ] {
            assert_eq!(end(&backend, family, to), [text].into(), "{to:?}");
        }
        let served = ends(&backend, &pod(family, vip(family)));
        let [near, far] = ["10.244.0.9", "10.244.1.9"]
            .map(|address| SocketAddr::from((ip(family, address), 8080)).to_string());
        assert_eq!(served, [near, far].into());
        let sctp = Packet {
            protocol: Protocol::Sctp,
            ..pod(family, vip(family))
        };
        assert_eq!(ends(&backend, &sctp), texts(["dropped"]));
    }
}

/// It may write any address there.
#[test]
fn an_external_address_in_a_network_of_services_is_that_services() {
    for family in FAMILIES {
        let external = "203.0.113.1";
        let address = IpNet::from(ip(family, external));
        let network = address.supernet().unwrap();
        let state = with_networks(&[&service(family, "web")], vec![network]);
        let mut backend = holding(dropping(), &state);
        assert_eq!(end(&backend, family, (external, 80)), texts(["rejected"]));
        assert_eq!(end(&backend, family, (external, 81)), texts(["dropped"]));
        let web = with_endpoints(service(family, "web"));
        bring(&mut backend, &with_networks(&[&web], vec![network]));
        let served = end(&backend, family, (external, 80));
        assert!(served.iter().all(|end| end.contains(":8080")), "{served:?}");
    }
}

#[test]
fn a_service_that_comes_is_served_and_one_that_goes_is_dropped() {
    let family = Family::V4;
    let mut backend = holding(dropping(), &with_networks(&[], networks()));
    let web = with_endpoints(service(family, "web"));
    let names = BTreeSet::from([web.key.service.clone()]);
    let bounds = Bounds {
        scope: Some(Part {
            services: &names,
            addresses: false,
        }),
        touched: None,
    };
    for (services, is_served) in [(&[][..], false), (&[&web], true), (&[], false)] {
        // A part of the state: it does not say which networks there are.
        let part = of(services);
        let observed = backend.observe().unwrap();
        let plan = backend.plan(&observed, &part, bounds);
        backend.apply(&plan, &part).unwrap();
        let found = ends(&backend, &pod(family, vip(family)));
        assert_eq!(found != texts(["dropped"]), is_served, "{found:?}");
    }
}

#[test]
fn networks_that_go_and_another_mode_take_their_rules_with_them() {
    let to = ("10.96.0.2", 80);
    for family in FAMILIES {
        let passed = BTreeSet::from([SocketAddr::from((ip(family, to.0), to.1)).to_string()]);
        let state = with_networks(&[], networks());
        let mut backend = holding(dropping(), &state);
        assert_eq!(end(&backend, family, to), texts(["dropped"]));
        bring(&mut backend, &DesiredState::default());
        assert_eq!(end(&backend, family, to), passed);
        bring(&mut backend, &state);
        // The next agent is told otherwise.
        let tables = backend.tables().clone();
        let mut backend = IptablesBackend::new(tables, rules());
        bring(&mut backend, &state);
        assert_eq!(end(&backend, family, to), passed);
    }
}

#[test]
fn an_address_that_a_link_of_the_node_has_is_that_links() {
    for family in FAMILIES {
        let backend = holding(dropping(), &with_networks(&[], networks()));
        let address = ip(family, "10.96.0.10");
        let mut host = host();
        host.addresses.insert(address);
        let of_node = node(family, (address, 53));
        let ends = walk(backend.tables(), &host, &of_node);
        assert_eq!(
            ends[0].to_string(),
            SocketAddr::from((address, 53)).to_string()
        );
    }
}

#[test]
fn each_network_is_two_rules_behind_what_is_refused() {
    let state = with_networks(&[&service(Family::V4, "web")], networks());
    let mut backend = holding(dropping(), &state);
    let mut rules = |family| -> Vec<String> {
        let text = backend.tables_mut().save(family, Table::Filter).unwrap();
        let rules = text
            .lines()
            .filter(|line| line.starts_with("-A KUBE-SERVICES "));
        rules.map(str::to_owned).collect()
    };
    let of_network = |network: &str| {
        let packets = format!("-A KUBE-SERVICES -d {network} -m addrtype ! --dst-type LOCAL");
        [
            format!("{packets} -j KUBE-EXTERNAL-SERVICES"),
            format!("{packets} -m comment --comment \"{UNALLOCATED}\" -j DROP"),
        ]
    };
    let of_v4 = rules(Family::V4);
    assert!(of_v4[0].contains("has no endpoints"), "{of_v4:?}");
    assert_eq!(of_v4[1..], of_network("10.96.0.0/16"));
    assert_eq!(rules(Family::V6), of_network("fd00:96::/112"));
}
