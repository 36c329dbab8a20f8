//! Random clusters: whatever happens in whatever order, compiling bit by bit gives what compiling from scratch gives.

use super::*;

/// Addresses that Services fight over, some of which are also endpoints or the node's own.
fn vip() -> impl Strategy<Value = String> {
    (1..6_u8).prop_map(|last| format!("10.96.0.{last}"))
}

fn policy() -> impl Strategy<Value = &'static str> {
    prop_oneof![Just("Cluster"), Just("Local")]
}

fn service() -> impl Strategy<Value = Value> {
    let times = prop_oneof![
        Just(""),
        Just("2026-01-01T00:00:00Z"),
        Just("2026-02-01T00:00:00Z")
    ];
    let ports = vec(
        (80..83_u16, 0..3_u16, prop_oneof![Just("TCP"), Just("UDP")]),
        1..3,
    );
    (vip(), any::<bool>(), vec(vip(), 0..3), vec(vip(), 0..2), policy(), policy(), times, ports).prop_map(
        |(ip, dual, external, balanced, internal_policy, external_policy, created, ports)| {
            let mut found: Vec<Value> = Vec::new();
            for (index, (port, node_port, protocol)) in ports.into_iter().enumerate() {
                // Ports of one Service differ in everything.
                let (port, node_port) = (port + 10 * index as u16, node_port * 30_000 + index as u16 * u16::from(node_port > 0));
                found.push(json!({"name": format!("p{index}"), "port": port, "nodePort": node_port % 60_000, "protocol": protocol}));
            }
            let six = format!("fd00::{}", ip.rsplit('.').next().unwrap());
            let ips = if dual { vec![ip, six] } else { vec![ip] };
            let ingress: Vec<_> = balanced.iter().map(|ip| json!({"ip": ip})).collect();
            json!({
                "metadata": {"name": "x", "creationTimestamp": if created.is_empty() { Value::Null } else { created.into() }},
                "spec": {
                    "type": "LoadBalancer", "clusterIPs": ips, "externalIPs": external, "ports": found,
                    "internalTrafficPolicy": internal_policy, "externalTrafficPolicy": external_policy
                },
                "status": {"loadBalancer": {"ingress": ingress}}
            })
        },
    )
}

fn endpoint() -> impl Strategy<Value = Value> {
    let ip = prop_oneof![
        4 => (0..6_u8).prop_map(|last| format!("10.244.0.{last}")),
        1 => vip(),
        1 => Just("127.0.0.1".to_owned()),
    ];
    let condition = || proptest::option::of(any::<bool>());
    let hint = || proptest::option::of(prop_oneof![Just("x"), Just("y")]);
    let node = proptest::option::of(prop_oneof![Just("node-a"), Just("node-b")]);
    (ip, condition(), condition(), condition(), node, hint(), hint()).prop_map(
        |(ip, ready, serving, terminating, node, zone, for_node)| {
            json!({
                "addresses": [ip], "nodeName": node,
                "conditions": {"ready": ready, "serving": serving, "terminating": terminating},
                "hints": {
                    "forZones": zone.map(|zone| json!([{"name": zone}])),
                    "forNodes": for_node.map(|zone| json!([{"name": format!("node-{}", if zone == "x" { "a" } else { "b" })}])),
                }
            })
        },
    )
}

fn slice() -> impl Strategy<Value = Value> {
    (0..4_u8, vec(endpoint(), 0..5), 1..3_usize).prop_map(|(service, endpoints, ports)| {
        let ports: Vec<_> = (0..ports).map(|p| json!({"name": format!("p{p}"), "port": 8080 + p})).collect();
        json!({
            "metadata": {"name": "x", "labels": {"kubernetes.io/service-name": format!("s{service}")}},
            "addressType": "IPv4", "ports": ports, "endpoints": endpoints
        })
    })
}

/// One object or fact: what it is about, and its new value.
#[derive(Clone, Debug)]
enum Step {
    Service(u8, Option<Value>),
    Slice(u8, Option<Value>),
    Zone(&'static str),
    Addresses(Vec<String>),
}

impl Step {
    fn update(&self) -> Update {
        let object = |value: &Option<Value>| value.clone().unwrap_or(Value::Null);
        match self {
            Self::Service(id, value) => {
                Update::Objects(service_update(&format!("s{id}"), object(value)))
            }
            Self::Slice(id, value) => {
                Update::Objects(slice_update(&format!("e{id}"), object(value)))
            }
            Self::Zone(zone) => Update::Objects(node_update(zone)),
            Self::Addresses(addresses) => {
                Update::Addresses(addresses.iter().map(|ip| ip.parse().unwrap()).collect())
            }
        }
    }

    /// Steps with the same key replace each other.
    fn key(&self) -> (u8, u8) {
        match self {
            Self::Service(id, _) => (0, *id),
            Self::Slice(id, _) => (1, *id),
            Self::Zone(_) => (2, 0),
            Self::Addresses(_) => (3, 0),
        }
    }
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (0..4_u8, proptest::option::weighted(0.8, service())).prop_map(|(id, value)| Step::Service(id, value)),
        4 => (0..6_u8, proptest::option::weighted(0.8, slice())).prop_map(|(id, value)| Step::Slice(id, value)),
        1 => prop_oneof![Just("x"), Just("y"), Just("")].prop_map(Step::Zone),
        1 => vec(vip(), 0..3).prop_map(Step::Addresses),
    ]
}

fn all_problems(follower: &Follower) -> Vec<Problem> {
    follower.compiler.problems().cloned().collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn incremental_equals_fresh_after_every_step(steps in vec(step(), 1..30)) {
        let mut follower = Follower::new();
        for step in &steps {
            follower.apply(step.update());
            prop_assert_eq!(&follower.state, &all(&follower.model));
            let mut fresh = Compiler::default();
            fresh.compile_all(&follower.model);
            prop_assert_eq!(all_problems(&follower), fresh.problems().cloned().collect::<Vec<_>>());
        }
    }

    #[test]
    fn batches_equal_single_steps(steps in vec(step(), 1..30), size in 1..8_usize) {
        let (mut one, mut model, mut compiler) = (Follower::new(), Model::new(NodeName::new(HERE)), Compiler::default());
        let mut state = DesiredState::default();
        for batch in steps.chunks(size) {
            let mut dirty = Dirty::default();
            for step in batch {
                one.apply(step.update());
                dirty.merge(model.apply(step.update()));
            }
            let compiled = compiler.compile(&model, &dirty);
            state.services.retain(|key, _| !compiled.services_in_scope.contains(&key.service));
            state.services.extend(compiled.state.services);
            prop_assert_eq!(&state.services, &one.state.services);
        }
    }

    #[test]
    fn the_order_of_objects_does_not_matter(steps in vec(step(), 1..20), swaps in vec(any::<Index>(), 20)) {
        let mut last: Vec<Step> = Vec::new();
        for step in steps {
            last.retain(|other| other.key() != step.key());
            last.push(step);
        }
        let mut shuffled = last.clone();
        for (at, swap) in swaps.iter().enumerate().take(shuffled.len()) {
            shuffled.swap(at, swap.index(last.len()));
        }
        let state = |steps: &[Step]| {
            let mut follower = Follower::new();
            for step in steps {
                follower.apply(step.update());
            }
            follower.state
        };
        prop_assert_eq!(state(&last), state(&shuffled));
    }

    #[test]
    fn an_update_that_says_nothing_new_touches_nothing(steps in vec(step(), 1..10)) {
        let mut model = Model::new(NodeName::new(HERE));
        for step in &steps {
            model.apply(step.update());
            let again = model.apply(step.update());
            prop_assert!(again.is_empty(), "{:?} {:?}", step, again);
        }
    }

    #[test]
    fn no_frontend_has_two_owners_and_no_backend_occurs_twice(steps in vec(step(), 1..30)) {
        let mut follower = Follower::new();
        for step in &steps {
            follower.apply(step.update());
        }
        let mut owned = BTreeSet::new();
        for (key, service) in &follower.state.services {
            for frontend in &service.frontends {
                prop_assert!(owned.insert((frontend.address, frontend.port, key.protocol)), "{}", frontend);
            }
            prop_assert!(service.frontends.is_sorted());
            prop_assert!(service.backends.is_sorted_by(|a, b| (a.address, a.port) < (b.address, b.port)));
        }
    }
}
