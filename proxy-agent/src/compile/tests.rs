use std::sync::Arc;

use proptest::{collection::vec, prelude::*, sample::Index};
use serde_json::{Value, json};

use super::*;
use crate::{
    model::{Node, NodeName, Objects, Service, Slice, SliceName, Update},
    state::{NodePortAddresses, TrafficPolicy},
};

mod categorize;
mod random;

const HERE: &str = "node-a";

fn name(short: &str) -> ServiceName {
    ServiceName::new("default", short)
}

/// A change of one Service; `null` deletes it.
fn service_update(short: &str, object: Value) -> Objects {
    let service = (!object.is_null()).then(|| {
        let object = serde_json::from_value(object).unwrap();
        Arc::new(Service::parse(&object).unwrap().unwrap().0)
    });
    Objects {
        services: vec![(name(short), service)],
        complete: true,
        ..Objects::default()
    }
}

fn slice_update(short: &str, object: Value) -> Objects {
    let slice = (!object.is_null()).then(|| {
        let object = serde_json::from_value(object).unwrap();
        Arc::new(
            Slice::parse(&object, &NodeName::new(HERE))
                .unwrap()
                .unwrap()
                .0,
        )
    });
    Objects {
        slices: vec![(SliceName::new("default", short), slice)],
        complete: true,
        ..Objects::default()
    }
}

fn node_update(zone: &str) -> Objects {
    let node = json!({"metadata": {"name": HERE, "labels": {"topology.kubernetes.io/zone": zone}}});
    Objects {
        node: Some(Some(Arc::new(Node::parse(
            &serde_json::from_value(node).unwrap(),
        )))),
        complete: true,
        ..Objects::default()
    }
}

/// A Service called `short` with one port; `spec` adds to it.
fn service_object(short: &str, ip: &str, created: &str, spec: Value) -> Value {
    let mut object = json!({
        "metadata": {"name": short},
        "spec": {"clusterIP": ip, "ports": [{"name": "http", "port": 80}]}
    });
    if !created.is_empty() {
        object["metadata"]["creationTimestamp"] = created.into();
    }
    for (key, value) in spec.as_object().unwrap() {
        object["spec"][key] = value.clone();
    }
    object
}

fn slice_object(short: &str, service: &str, endpoints: Value) -> Value {
    json!({
        "metadata": {"name": short, "labels": {"kubernetes.io/service-name": service}},
        "addressType": "IPv4",
        "ports": [{"name": "http", "port": 8080}],
        "endpoints": endpoints
    })
}

/// A model with a compiler, whose results are gathered as a backend would.
struct Follower {
    model: Model,
    compiler: Compiler,
    state: DesiredState,
}

impl Follower {
    fn new() -> Self {
        Self {
            model: Model::new(NodeName::new(HERE)),
            compiler: Compiler::default(),
            state: DesiredState::default(),
        }
    }

    fn apply(&mut self, update: Update) -> Compiled {
        let dirty = self.model.apply(update);
        let compiled = self.compiler.compile(&self.model, &dirty);
        self.state
            .services
            .retain(|key, _| !compiled.services_in_scope.contains(&key.service));
        self.state.services.extend(compiled.state.services.clone());
        if compiled.addresses_in_scope {
            self.state.addresses = compiled.state.addresses.clone();
        }
        compiled
    }

    fn objects(&mut self, objects: Objects) -> Compiled {
        self.apply(Update::Objects(objects))
    }

    fn addresses(&mut self, addresses: &[&str]) -> Compiled {
        let addresses = addresses.iter().map(|ip| ip.parse().unwrap()).collect();
        self.apply(Update::Addresses(addresses))
    }

    fn service(&mut self, short: &str, object: Value) -> Compiled {
        self.objects(service_update(short, object))
    }

    fn slice(&mut self, short: &str, object: Value) -> Compiled {
        self.objects(slice_update(short, object))
    }

    /// "kind address" of the frontends of a Service.
    fn frontends(&self, short: &str) -> Vec<String> {
        let of = self
            .state
            .services
            .iter()
            .filter(|(key, _)| key.service == name(short));
        let frontends = of.flat_map(|(_, service)| &service.frontends);
        frontends
            .map(|f| {
                format!(
                    "{} {}:{}{}",
                    f.kind,
                    f.address,
                    f.port,
                    if f.on_local_link { " link" } else { "" }
                )
            })
            .collect()
    }

    fn backends(&self, short: &str) -> Vec<String> {
        let of = self
            .state
            .services
            .iter()
            .filter(|(key, _)| key.service == name(short));
        of.flat_map(|(_, service)| &service.backends)
            .map(|b| b.to_string())
            .collect()
    }
}

fn names(compiled: &Compiled) -> Vec<&str> {
    let names = compiled.services_in_scope.iter();
    names
        .map(|name| name.as_str().trim_start_matches("default/"))
        .collect()
}

#[test]
fn a_change_compiles_its_service_only() {
    let mut follower = Follower::new();
    follower.service("a", service_object("a", "10.96.0.1", "", json!({})));
    follower.service("b", service_object("b", "10.96.0.2", "", json!({})));
    let endpoint = json!([{"addresses": ["10.244.0.1"]}]);
    let compiled = follower.slice("a-1", slice_object("a-1", "a", endpoint));
    assert_eq!(names(&compiled), ["a"]);
    assert!(!compiled.addresses_in_scope);
    assert_eq!(follower.backends("a"), ["-> 10.244.0.1:8080 cluster"]);
    let compiled = follower.service("a", Value::Null);
    assert_eq!(
        (names(&compiled), compiled.state.services.len()),
        (vec!["a"], 0)
    );
}

#[test]
fn a_claim_goes_to_the_oldest_and_to_the_next_when_the_owner_leaves() {
    let mut follower = Follower::new();
    let object = |short: &str, ip, created: &str| {
        service_object(short, ip, created, json!({"externalIPs": ["192.0.2.1"]}))
    };
    follower.service(
        "young",
        object("young", "10.96.0.1", "2026-03-01T00:00:00Z"),
    );
    assert_eq!(
        follower.frontends("young"),
        ["cluster-ip 10.96.0.1:80", "external-ip 192.0.2.1:80"]
    );
    let compiled = follower.service("old", object("old", "10.96.0.2", "2026-01-01T00:00:00Z"));
    assert_eq!(names(&compiled), ["old", "young"]);
    let told = compiled
        .problems
        .iter()
        .map(ToString::to_string)
        .collect::<Vec<_>>();
    assert_eq!(
        told,
        [
            "Service default/young does not get 192.0.2.1:80/TCP: Service default/old has it; change one of them"
        ]
    );
    assert_eq!(follower.frontends("young"), ["cluster-ip 10.96.0.1:80"]);
    // Told once.
    let compiled = follower.service(
        "young",
        object("young", "10.96.0.3", "2026-03-01T00:00:00Z"),
    );
    assert_eq!(compiled.problems, []);
    assert_eq!(follower.compiler.problems().count(), 1);
    let compiled = follower.service("old", Value::Null);
    assert_eq!(names(&compiled), ["old", "young"]);
    assert_eq!(
        follower.frontends("young"),
        ["cluster-ip 10.96.0.3:80", "external-ip 192.0.2.1:80"]
    );
    assert_eq!(follower.compiler.problems().count(), 0);
}

#[test]
fn a_cluster_ip_cannot_be_taken_by_an_older_service() {
    let mut follower = Follower::new();
    let thief = json!({"externalIPs": ["10.96.0.10"]});
    follower.service(
        "thief",
        service_object("thief", "10.96.0.1", "2020-01-01T00:00:00Z", thief),
    );
    follower.service(
        "dns",
        service_object("dns", "10.96.0.10", "2026-01-01T00:00:00Z", json!({})),
    );
    assert_eq!(follower.frontends("dns"), ["cluster-ip 10.96.0.10:80"]);
    assert_eq!(follower.frontends("thief"), ["cluster-ip 10.96.0.1:80"]);
}

#[test]
fn a_vip_moves_between_services_in_one_step() {
    let mut follower = Follower::new();
    follower.service("a", service_object("a", "10.96.0.1", "", json!({})));
    let mut both = service_update("a", service_object("a", "10.96.0.2", "", json!({})));
    let moved = service_update("b", service_object("b", "10.96.0.1", "", json!({})));
    both.services.extend(moved.services);
    let compiled = follower.objects(both);
    assert_eq!(compiled.problems, []);
    assert_eq!(follower.frontends("b"), ["cluster-ip 10.96.0.1:80"]);
}

#[test]
fn load_balancers_hear_of_ready_endpoints_on_this_node() {
    let mut follower = Follower::new();
    let spec = json!({
        "type": "LoadBalancer", "externalTrafficPolicy": "Local", "healthCheckNodePort": 32000,
        "ports": [{"name": "http", "port": 80}, {"name": "more", "port": 81}],
    });
    follower.service("a", service_object("a", "10.96.0.1", "", spec));
    let endpoint = |ip: &str, node: &str, ready: bool| {
        let conditions = json!({"ready": ready, "serving": true, "terminating": !ready});
        json!({"addresses": [ip], "nodeName": node, "conditions": conditions})
    };
    let endpoints = json!([
        endpoint("10.244.0.1", HERE, true),
        endpoint("10.244.0.2", HERE, false),
        endpoint("10.244.0.3", "node-b", true),
    ]);
    follower.slice("a-1", slice_object("a-1", "a", endpoints));
    // The same pod once more.
    let again = json!([endpoint("10.244.0.1", HERE, true)]);
    follower.slice("a-2", slice_object("a-2", "a", again));
    let check = health::check(&follower.model, &name("a")).unwrap();
    assert_eq!(
        (check.port, check.endpoints.clone()),
        (32_000, vec![(crate::state::Family::V4, 1)])
    );
    // Whoever asks over IPv6 hears the same.
    assert_eq!(check.endpoints_in(crate::state::Family::V6), 1);
    let states = follower.state.services.values();
    let ports: Vec<_> = states.map(|state| state.health_check_port).collect();
    assert_eq!(ports, [Some(32_000), None]);
    // A node port that somebody older has.
    let older = json!({"type": "NodePort", "ports": [{"port": 80, "nodePort": 32000}]});
    let older = service_object("b", "10.96.0.2", "2020-01-01T00:00:00Z", older);
    let compiled = follower.service("b", older);
    assert_eq!(
        (names(&compiled), compiled.problems.len()),
        (vec!["a", "b"], 1)
    );
    let mut states = follower.state.services.values();
    assert!(states.all(|state| state.health_check_port.is_none()));
    assert_eq!(health::check(&follower.model, &name("b")), None);
}

#[test]
fn an_endpoint_is_refused_while_a_service_has_its_address() {
    let mut follower = Follower::new();
    follower.service("a", service_object("a", "10.96.0.1", "", json!({})));
    let endpoint = json!([{"addresses": ["10.96.0.2"]}]);
    follower.slice("a-1", slice_object("a-1", "a", endpoint));
    assert_eq!(follower.backends("a"), ["-> 10.96.0.2:8080 cluster"]);
    let compiled = follower.service("b", service_object("b", "10.96.0.2", "", json!({})));
    assert_eq!(names(&compiled), ["a", "b"]);
    assert_eq!(compiled.problems.len(), 1);
    assert_eq!(follower.backends("a"), Vec::<String>::new());
    follower.service("b", Value::Null);
    assert_eq!(follower.backends("a"), ["-> 10.96.0.2:8080 cluster"]);
}

#[test]
fn a_cluster_ip_assigned_to_a_link_is_marked_and_unmarked() {
    let mut follower = Follower::new();
    follower.service("dns", service_object("dns", "10.96.0.10", "", json!({})));
    follower.service("web", service_object("web", "10.96.0.11", "", json!({})));
    let compiled = follower.addresses(&["192.168.0.1", "10.96.0.10"]);
    assert_eq!(names(&compiled), ["dns"]);
    assert!(compiled.addresses_in_scope);
    assert_eq!(follower.frontends("dns"), ["cluster-ip 10.96.0.10:80 link"]);
    let compiled = follower.addresses(&["192.168.0.1", "192.168.0.2"]);
    assert_eq!(names(&compiled), ["dns"]);
    assert_eq!(follower.frontends("dns"), ["cluster-ip 10.96.0.10:80"]);
    assert_eq!(follower.state.addresses.len(), 2);
}

#[test]
fn a_source_range_with_an_address_of_the_node_follows_that_address() {
    let mut follower = Follower::new();
    let ranges = json!({"loadBalancerSourceRanges": ["192.168.0.0/24", "fd00::/64"]});
    follower.service("web", service_object("web", "10.96.0.1", "", ranges));
    let admits = |follower: &Follower| {
        let mut states = follower.state.services.values();
        states.next().is_some_and(|state| state.admits_node)
    };
    // A range of another family is none of this one.
    assert_eq!(
        names(&follower.addresses(&["203.0.113.1", "fd00::1"])),
        ["web"]
    );
    assert!(!admits(&follower));
    assert_eq!(names(&follower.addresses(&["192.168.0.1"])), ["web"]);
    assert!(admits(&follower));
    assert_eq!(
        names(&follower.addresses(&["192.168.0.1", "203.0.113.1"])),
        [""; 0]
    );
    follower.addresses(&["203.0.113.1"]);
    assert!(!admits(&follower));
}

#[test]
fn another_zone_touches_services_with_hints_only() {
    let mut follower = Follower::new();
    let hinted =
        |ip: &str, zone: &str| json!({"addresses": [ip], "hints": {"forZones": [{"name": zone}]}});
    for short in ["a", "b"] {
        follower.service(short, service_object(short, "10.96.0.1", "", json!({})));
    }
    let endpoints = json!([hinted("10.244.0.1", "x"), hinted("10.244.0.2", "y")]);
    follower.slice("a-1", slice_object("a-1", "a", endpoints));
    follower.slice(
        "b-1",
        slice_object("b-1", "b", json!([{"addresses": ["10.244.0.3"]}])),
    );
    assert_eq!(names(&follower.objects(node_update("x"))), ["a"]);
    assert_eq!(
        follower.backends("a"),
        ["-> 10.244.0.1:8080 cluster", "-> 10.244.0.2:8080"]
    );
    follower.objects(node_update("y"));
    assert_eq!(
        follower.backends("a"),
        ["-> 10.244.0.1:8080", "-> 10.244.0.2:8080 cluster"]
    );
    let gone = Objects {
        node: Some(None),
        ..Objects::default()
    };
    follower.objects(gone);
    assert_eq!(
        follower.backends("a"),
        ["-> 10.244.0.1:8080 cluster", "-> 10.244.0.2:8080 cluster"]
    );
}

#[test]
fn node_ports_are_served_on_the_addresses_that_are_listed() {
    let entries = ["primary", "203.0.113.0/24"].map(|entry| entry.parse().unwrap());
    let mut follower = Follower::new();
    follower.model =
        Model::new(NodeName::new(HERE)).with_node_ports(NodePortAddresses::new(&entries));
    let serving = |follower: &Follower| -> Vec<String> {
        let addresses = follower.state.addresses.iter();
        let serving = addresses.filter(|(_, address)| address.node_ports);
        serving.map(|(ip, _)| ip.to_string()).collect()
    };
    let all = ["192.168.0.1", "192.168.0.2", "203.0.113.1", "fd00::1"];
    follower.addresses(&all);
    assert_eq!(serving(&follower), ["203.0.113.1"]);
    let node = |ip: &str| {
        let addresses = json!([{"type": "InternalIP", "address": ip}]);
        let node = json!({"metadata": {"name": HERE}, "status": {"addresses": addresses}});
        let node = Node::parse(&serde_json::from_value(node).unwrap());
        Objects {
            node: Some(Some(Arc::new(node))),
            ..Objects::default()
        }
    };
    follower.objects(node("192.168.0.1"));
    assert_eq!(serving(&follower), ["192.168.0.1", "203.0.113.1"]);
    follower.objects(node("fd00::1"));
    assert_eq!(serving(&follower), ["203.0.113.1", "fd00::1"]);
    assert_eq!(
        health::addresses(&follower.model),
        ["203.0.113.1", "fd00::1"]
            .map(|ip| ip.parse().unwrap())
            .into()
    );
}

#[test]
fn node_ports_are_not_served_on_link_local_ipv6_and_loopback_is_no_node_address() {
    let mut follower = Follower::new();
    follower.addresses(&[
        "192.168.0.1",
        "169.254.20.10",
        "fe80::1",
        "fd00::1",
        "127.0.0.1",
        "::1",
    ]);
    let served = follower
        .state
        .addresses
        .iter()
        .map(|(ip, a)| format!("{ip} {}", a.node_ports));
    assert_eq!(
        served.collect::<Vec<_>>(),
        [
            "169.254.20.10 true",
            "192.168.0.1 true",
            "fd00::1 true",
            "fe80::1 false"
        ]
    );
}

#[test]
fn policies_reach_the_state() {
    let mut follower = Follower::new();
    let spec = json!({"type": "NodePort", "internalTrafficPolicy": "Local", "externalTrafficPolicy": "Local"});
    follower.service("a", service_object("a", "10.96.0.1", "", spec));
    let state = follower.state.services.values().next().unwrap();
    assert_eq!(
        (state.internal_policy, state.external_policy),
        (TrafficPolicy::Local, TrafficPolicy::Local)
    );
}

#[test]
fn compiling_everything_tells_of_services_that_are_gone() {
    let mut follower = Follower::new();
    follower.service("a", service_object("a", "10.96.0.1", "", json!({})));
    follower
        .model
        .apply(Update::Objects(service_update("a", Value::Null)));
    let compiled = follower.compiler.compile_all(&follower.model);
    assert_eq!(names(&compiled), ["a"]);
    assert!(compiled.state.services.is_empty() && compiled.addresses_in_scope);
}
