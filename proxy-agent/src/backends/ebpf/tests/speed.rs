//! What the control side alone costs, over maps in memory; the benches measure it with the kernel's.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr},
    time::Duration,
};

use nix::time::{ClockId, clock_gettime};

use super::*;
use crate::state::{
    Backend as Endpoint, BackendState, Family, Frontend, FrontendKind, Protocol, ServiceName,
    ServicePort, ServiceState, TrafficPolicy,
};

/// What this thread has used of a CPU: other work on the machine does not count.
fn used() -> Duration {
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID)
        .unwrap()
        .into()
}

fn service(number: u32, endpoints: u32) -> ServiceState {
    let local = |n: u32| n.is_multiple_of(10);
    ServiceState {
        key: ServicePort {
            service: ServiceName::new("bench", &format!("service-{number}")),
            port: "http".into(),
            protocol: Protocol::Tcp,
            family: Family::V4,
        },
        frontends: vec![Frontend {
            address: Ipv4Addr::from_bits(0x0a60_0000 + number).into(),
            port: 80,
            kind: FrontendKind::ClusterIp,
            on_local_link: false,
        }],
        backends: (0..endpoints)
            .map(|n| Endpoint {
                address: IpAddr::from(Ipv4Addr::from_bits(0x0b00_0000 + number * 256 + n)),
                port: 8080,
                state: BackendState {
                    terminating: false,
                    on_this_node: local(n),
                    in_cluster: true,
                    in_local: local(n),
                },
            })
            .collect(),
        affinity_seconds: None,
        internal_policy: TrafficPolicy::Cluster,
        external_policy: TrafficPolicy::Cluster,
        source_ranges: vec![],
        admits_node: false,
        health_check_port: None,
    }
}

fn cluster(services: u32, endpoints: u32) -> DesiredState {
    let states = (0..services).map(|number| service(number, endpoints));
    DesiredState {
        services: states.map(|state| (state.key.clone(), state)).collect(),
        ..DesiredState::default()
    }
}

/// Resident bytes of this process.
fn resident() -> usize {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    let pages: usize = statm.split(' ').nth(1).unwrap().parse().unwrap();
    pages * 4096
}

#[test]
#[ignore = "a measurement: cargo test --release -- --ignored --nocapture speed"]
fn speed_of_a_start_and_of_single_changes() {
    let state = cluster(5_000, 50);
    let mut backend = EbpfBackend::new(Simulated::default());
    let nothing = backend.observe().unwrap();
    let start = used();
    let desired = backend.render(&state);
    let rendered = used() - start;
    let plan = diff(&nothing, &desired);
    let start = used();
    backend.apply(&plan, &state).unwrap();
    let applied = used() - start;
    let start = used();
    let mut again = EbpfBackend::new(backend.into_store());
    let before = resident();
    assert!(again.observe().unwrap() == desired);
    println!(
        "5,000 x 50 from nothing: render {rendered:?}, apply {applied:?}; restart: observe {:?}, {} bytes per endpoint",
        used() - start,
        resident().saturating_sub(before) / 250_000,
    );
    drop((again, state, desired, plan));

    let mut state = cluster(10_000, 10);
    let mut backend = EbpfBackend::new(Simulated::default());
    let desired = backend.render(&state);
    backend
        .apply(&diff(&BTreeMap::new(), &desired), &state)
        .unwrap();
    let keys: Vec<_> = state.services.keys().cloned().collect();
    let rounds = 100_000;
    let start = used();
    for round in 0..rounds {
        let key = &keys[round * 7 % keys.len()];
        let mut service = state.services[key].clone();
        match service.backends.len() {
            10 => drop(service.backends.remove(round % 10)),
            _ => service.backends = super::speed::service(0, 10).backends,
        }
        let one = DesiredState {
            services: BTreeMap::from([(key.clone(), service)]),
            ..DesiredState::default()
        };
        let plan = diff(&BTreeMap::new(), &backend.render(&one));
        backend.apply(&plan, &one).unwrap();
        state.services.extend(one.services);
        if round % 20_000 == 0 {
            backend.store_mut().pass_time();
        }
    }
    println!("one endpoint of 10: {:?}", (used() - start) / rounds as u32);
}
