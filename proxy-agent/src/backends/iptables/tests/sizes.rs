//! How many rules there are, and how many of them a packet meets.

use std::net::Ipv4Addr;

use super::*;

/// What the issue allows for a first packet at 50,000 Services.
const WALKED: usize = 100;

fn cluster_ip(number: u32, address: Ipv4Addr, endpoints: u32) -> ServiceState {
    let backends = (0..endpoints).map(|n| {
        let address = Ipv4Addr::from_bits(0x0b00_0000 + number * 16 + n);
        endpoint(address.into(), false)
    });
    ServiceState {
        key: ServicePort {
            service: ServiceName::new("bench", &format!("service-{number}")),
            port: "http".into(),
            protocol: Protocol::Tcp,
            family: Family::V4,
        },
        frontends: vec![Frontend {
            address: address.into(),
            port: 80,
            kind: FrontendKind::ClusterIp,
            on_local_link: false,
        }],
        backends: backends.collect(),
        affinity_seconds: None,
        internal_policy: TrafficPolicy::Cluster,
        external_policy: TrafficPolicy::Cluster,
        source_ranges: Vec::new(),
        admits_node: false,
        health_check_port: None,
    }
}

/// ClusterIPs one after the other, or strewn over 10.96.0.0/12 as the API server hands them out.
fn cluster(services: u32, endpoints: u32, strewn: bool) -> Vec<ServiceState> {
    let address = |number: u32| match strewn {
        // A permutation of 20 bits.
        true => (number.wrapping_mul(0x9_e377) ^ 0x5_1234) & 0xf_ffff,
        false => number,
    };
    let states = (0..services).map(|number| {
        let address = Ipv4Addr::from_bits(0x0a60_0000 + address(number));
        cluster_ip(number, address, endpoints)
    });
    states.collect()
}

fn only_v4() -> Rules {
    Rules {
        families: [Family::V4].into(),
        ..rules()
    }
}

/// Rules that packets meet on their way to the Services, the most of a sample.
fn most_walked(services: &[ServiceState], step: usize) -> usize {
    let backend = holding(only_v4(), &of(&services.iter().collect::<Vec<_>>()));
    let sample = services.iter().step_by(step);
    let walked = sample.flat_map(|service| {
        let frontend = service.frontends[0];
        let to = match frontend.kind {
            FrontendKind::NodePort => IpAddr::from([192, 168, 0, 1]),
            _ => frontend.address,
        };
        let packet = packet([10, 244, 0, 5].into(), Some("cni0"), (to, frontend.port));
        let ends = walk(backend.tables(), &host(), &packet);
        assert!(!service.backends.is_empty() && ends.iter().all(|end| end.to.port() == 8080));
        ends.into_iter().map(|end| end.walked)
    });
    walked.max().unwrap()
}

#[test]
fn a_first_packet_meets_few_rules_at_50_000_services() {
    for (services, strewn) in [(50_000, true), (10_000, false)] {
        let most = most_walked(&cluster(services, 1, strewn), 997);
        assert!(most <= WALKED, "{most} rules, strewn {strewn}");
    }
}

#[test]
fn many_ports_of_one_address_and_many_node_ports_are_trees_too() {
    let mut services = cluster(2_000, 1, false);
    for (number, service) in services.iter_mut().enumerate() {
        service.frontends[0] = Frontend {
            address: [198, 51, 100, 1].into(),
            port: 10_000 + number as u16 * 7,
            kind: FrontendKind::LoadBalancer,
            on_local_link: false,
        };
    }
    assert!(most_walked(&services, 97) <= WALKED);
    for (number, service) in services.iter_mut().enumerate() {
        service.frontends[0] = Frontend {
            address: [0, 0, 0, 0].into(),
            port: 30_000 + number as u16,
            kind: FrontendKind::NodePort,
            on_local_link: false,
        };
    }
    assert!(most_walked(&services, 97) <= WALKED);
}

/// Addresses that share one more digit with each of ten others, and a Service with everything below one of them.
#[test]
fn no_set_of_frontends_needs_more_jumps_than_nf_tables_allows() {
    let mut services = Vec::new();
    for digit in 0..32 {
        for value in 1..11 {
            let address = IpAddr::from(std::net::Ipv6Addr::from_bits(value << (4 * digit)));
            let mut service = cluster_ip(services.len() as u32, [10, 96, 0, 1].into(), 0);
            service.key.family = Family::V6;
            service.affinity_seconds = Some(60);
            service.source_ranges = vec!["fd00::/8".parse().unwrap()];
            let endpoints = (0..if (digit, value) == (20, 1) { 3_000 } else { 1 }).map(|n| {
                endpoint(
                    ip(Family::V6, &format!("10.24.{}.{}", n / 250, n % 250)),
                    true,
                )
            });
            service.backends = endpoints.collect();
            service.frontends[0].address = address;
            service.frontends[0].kind = FrontendKind::LoadBalancer;
            services.push(service);
        }
    }
    // The simulation refuses more.
    let backend = holding(rules(), &of(&services.iter().collect::<Vec<_>>()));
    let to = (services[7].frontends[0].address, 80);
    let source = ip(Family::V6, "10.5.5.5");
    let found = ends(&backend, &packet(source, Some("eth0"), to));
    assert_eq!(found, texts(["[fd00:24::]:8080 m"]));
}

/// The names of the chains below filter's roots begin longest.
#[test]
fn many_ipv6_services_without_endpoints_are_refused_by_trees() {
    let states = (0..300_u32).map(|number| {
        let mut state = cluster_ip(number, [10, 96, 0, 1].into(), 0);
        state.key.family = Family::V6;
        state.frontends[0].address =
            std::net::Ipv6Addr::from_bits(0xfd00_0010_0096 << 80 | u128::from(number)).into();
        state
    });
    let states: Vec<_> = states.collect();
    let backend = holding(rules(), &of(&states.iter().collect::<Vec<_>>()));
    let to = (states[299].frontends[0].address, 80);
    let found = ends(
        &backend,
        &packet(ip(Family::V6, "10.244.0.5"), Some("cni0"), to),
    );
    assert_eq!(found, texts(["rejected"]));
}

#[test]
fn a_packet_of_no_service_meets_a_handful_of_rules() {
    let services = cluster(5_000, 1, true);
    let backend = holding(only_v4(), &of(&services.iter().collect::<Vec<_>>()));
    let packet = packet(
        [10, 244, 0, 5].into(),
        Some("cni0"),
        ([1, 1, 1, 1].into(), 443),
    );
    let [end] = walk(backend.tables(), &host(), &packet).try_into().unwrap();
    assert!(end.walked < 40, "{}", end.walked);
}

#[test]
fn every_endpoint_has_the_same_chance_and_nobody_walks_a_long_ladder() {
    for count in [1, 2, 3, 31, 32, 33, 50, 200, 1_000] {
        let services = [cluster_ip(0, [10, 96, 0, 1].into(), count)];
        let backend = holding(only_v4(), &of(&[&services[0]]));
        let vip = ([10, 96, 0, 1].into(), 80);
        let packet = packet([10, 244, 0, 5].into(), Some("cni0"), vip);
        let ends = walk(backend.tables(), &host(), &packet);
        let reached: BTreeSet<_> = ends.iter().map(|end| end.to).collect();
        assert_eq!(
            (reached.len(), ends.len()),
            (count as usize, count as usize)
        );
        for end in ends {
            let fair = 1.0 / f64::from(count);
            assert!((end.chance - fair).abs() < fair * 1e-4, "{count}: {end:?}");
            assert!(end.walked <= 70, "{count}: {} rules", end.walked);
        }
    }
}

fn rules_of(backend: &IptablesBackend<Simulated>) -> usize {
    let tables = backend.tables().tables.values();
    tables
        .flat_map(|chains| chains.values())
        .map(Vec::len)
        .sum()
}

/// kube-proxy has about four.
#[test]
fn there_are_few_rules_for_each_endpoint() {
    for (services, endpoints) in [(2_000, 10), (200, 50), (50, 100), (5, 1_000)] {
        // The endpoints of a Service lie together here, a thousand of one do not overlap with the next.
        let spread = cluster(services * 64, 0, true);
        let mut states: Vec<_> = spread.into_iter().step_by(64).collect();
        for (number, state) in states.iter_mut().enumerate() {
            let number = number as u32 * 64;
            state.backends = cluster_ip(number, [0, 0, 0, 0].into(), endpoints).backends;
        }
        let backend = holding(only_v4(), &of(&states.iter().collect::<Vec<_>>()));
        let all = f64::from(services * endpoints);
        let each = rules_of(&backend) as f64 / all;
        assert!(
            each <= 1.3,
            "{services} x {endpoints}: {each} rules for an endpoint"
        );
    }
}

#[test]
fn rules_are_parsed_as_they_are_written() {
    let services = cluster(100, 40, true);
    let backend = holding(rules(), &of(&services.iter().collect::<Vec<_>>()));
    for rule in backend
        .tables()
        .tables
        .values()
        .flat_map(|c| c.values().flatten())
    {
        Parsed::new(rule).unwrap();
    }
}
