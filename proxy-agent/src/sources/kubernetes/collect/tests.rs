use proptest::prelude::*;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::*;

mod service_cidrs;

fn read<K: DeserializeOwned>(object: Value) -> K {
    serde_json::from_value(object).unwrap()
}

fn service(name: &str, port: u32) -> v1::Service {
    read(json!({
        "metadata": {"namespace": "default", "name": name},
        "spec": {"clusterIP": "10.96.0.10", "clusterIPs": ["10.96.0.10"], "ports": [{"port": port}]},
    }))
}

fn slice(name: &str, address: &str) -> discovery::EndpointSlice {
    read(json!({
        "metadata": {
            "namespace": "default", "name": name,
            "labels": {"kubernetes.io/service-name": "web"},
        },
        "addressType": "IPv4",
        "endpoints": [{"addresses": [address]}],
        "ports": [{"name": "", "port": 8080}],
    }))
}

fn node(name: &str, zone: &str) -> v1::Node {
    let labels = json!({"topology.kubernetes.io/zone": zone});
    read(json!({"metadata": {"name": name, "labels": labels}}))
}

fn event_of<K>(event: Event<K>) -> Heard<K> {
    Heard::Event(Box::new(event))
}

/// The events of a list.
fn list<K>(item: fn(Heard<K>) -> Item, objects: Vec<K>) -> Vec<Item> {
    let objects = objects.into_iter().map(Event::InitApply);
    let events = [Event::Init].into_iter().chain(objects);
    let events = events.chain([Event::InitDone]);
    events.map(|event| item(event_of(event))).collect()
}

fn collector() -> Collector {
    let server = Server::Address([10, 96, 0, 10].into());
    Collector::new(NodeName::new("node-a"), server, false)
}

fn take(collector: &mut Collector, items: impl IntoIterator<Item = Item>) {
    for item in items {
        collector.take(item);
    }
}

/// One that has read Services "a" and "b", a slice and the Node.
fn full() -> Collector {
    let mut full = collector();
    take(
        &mut full,
        list(Item::Service, vec![service("a", 80), service("b", 80)]),
    );
    take(
        &mut full,
        list(Item::Slice, vec![slice("web-1", "10.244.1.2")]),
    );
    take(&mut full, list(Item::Node, vec![node("node-a", "zone-a")]));
    full.objects().unwrap();
    full
}

/// Services as "name" or "-name" for a deletion, then slices the same.
fn told(objects: &Objects) -> Vec<String> {
    let text = |name: &str, is_there: bool| format!("{}{name}", if is_there { "" } else { "-" });
    let services = objects.services.iter();
    let services = services.map(|(name, of)| text(name.as_str(), of.is_some()));
    let slices = objects.slices.iter();
    let slices = slices.map(|(name, of)| text(name.as_str(), of.is_some()));
    services.chain(slices).collect()
}

fn next(collector: &mut Collector) -> Vec<String> {
    collector
        .objects()
        .map(|objects| told(&objects))
        .unwrap_or_default()
}

#[test]
fn nothing_is_told_before_every_list_is_complete_and_then_everything() {
    let mut collector = collector();
    let services = list(Item::Service, vec![service("a", 80)]);
    let slices = list(Item::Slice, vec![slice("web-1", "10.244.1.2")]);
    let nodes = list(Item::Node, vec![node("node-a", "zone-a")]);
    for item in services.into_iter().chain(slices).chain(nodes) {
        assert_eq!(collector.objects(), None);
        collector.take(item);
    }
    let objects = collector.objects().unwrap();
    assert_eq!(told(&objects), ["default/a", "default/web-1"]);
    assert!(objects.complete);
    let zone = objects.node.unwrap().unwrap().zone.clone();
    assert_eq!(zone.as_deref(), Some("zone-a"));
    assert_eq!(collector.objects(), None);
}

#[test]
fn an_empty_cluster_is_told_once() {
    let mut collector = collector();
    take(&mut collector, list(Item::Service, Vec::new()));
    take(&mut collector, list(Item::Slice, Vec::new()));
    take(&mut collector, list(Item::Node, Vec::new()));
    let objects = collector.objects().unwrap();
    assert!(objects.is_empty() && objects.complete);
    assert_eq!(collector.objects(), None);
}

#[test]
fn without_the_node_all_is_served_and_nothing_deleted() {
    let mut collector = collector();
    take(&mut collector, list(Item::Service, vec![service("a", 80)]));
    take(&mut collector, list(Item::Slice, Vec::new()));
    take(
        &mut collector,
        [Item::Node(Heard::Failed("forbidden".to_owned()))],
    );
    assert!(collector.waits());
    assert_eq!(collector.objects(), None);
    collector.go_on();
    let objects = collector.objects().unwrap();
    assert_eq!(told(&objects), ["default/a"]);
    assert!(!objects.complete);
    let problems = collector.problems();
    assert_eq!(problems[0].to_string(), "Nodes: forbidden");
    // It may be listed now.
    take(
        &mut collector,
        list(Item::Node, vec![node("node-a", "zone-a")]),
    );
    let objects = collector.objects().unwrap();
    assert!(objects.complete && objects.node.is_some());
    assert_eq!(collector.problems(), []);
}

#[test]
fn a_kind_that_is_followed_again_is_no_longer_told_of() {
    let mut collector = full();
    for heard in [event_of(Event::Apply(service("a", 80))), Heard::Quiet] {
        let failed = Heard::Failed("no route".to_owned());
        collector.take(Item::Service(failed));
        let problems = collector.problems();
        assert_eq!(problems.len(), 1);
        assert_eq!(problems[0].to_string(), "Services: no route");
        collector.take(Item::Service(heard));
        assert_eq!(collector.problems(), []);
    }
}

#[test]
fn changes_and_deletions_are_told_in_their_order() {
    let mut collector = full();
    take(
        &mut collector,
        [
            Item::Service(event_of(Event::Apply(service("c", 80)))),
            Item::Service(event_of(Event::Delete(service("a", 80)))),
            // Told twice, and of one that nobody knew.
            Item::Service(event_of(Event::Delete(service("a", 80)))),
            Item::Service(event_of(Event::Delete(service("z", 80)))),
            Item::Service(event_of(Event::Apply(service("a", 81)))),
            Item::Slice(event_of(Event::Delete(slice("web-1", "10.244.1.2")))),
        ],
    );
    assert_eq!(
        next(&mut collector),
        ["default/c", "-default/a", "default/a", "-default/web-1"]
    );
}

#[test]
fn a_list_that_is_read_again_is_compared_and_half_a_list_deletes_nothing() {
    let mut collector = full();
    let mut half = list(Item::Service, vec![service("b", 81)]);
    half.pop();
    take(&mut collector, half);
    assert_eq!(next(&mut collector), ["default/b"]);
    // From the beginning.
    take(
        &mut collector,
        list(Item::Service, vec![service("b", 82), service("c", 80)]),
    );
    assert_eq!(
        next(&mut collector),
        ["default/b", "default/c", "-default/a"]
    );
    take(&mut collector, list(Item::Slice, Vec::new()));
    assert_eq!(next(&mut collector), ["-default/web-1"]);
}

#[test]
fn of_an_impossible_object_the_last_good_version_stays() {
    let mut collector = full();
    let mut bad = service("a", 80);
    bad.spec.as_mut().unwrap().ports.as_mut().unwrap()[0].port = 70_000;
    take(
        &mut collector,
        [Item::Service(event_of(Event::Apply(bad.clone())))],
    );
    assert_eq!(next(&mut collector), [""; 0]);
    let problem = collector.problems()[0].to_string();
    assert!(
        problem.starts_with("Service default/a: spec.ports[0].port: "),
        "{problem}"
    );
    // It is on the list, so it is there.
    take(
        &mut collector,
        list(Item::Service, vec![bad, service("b", 80)]),
    );
    assert_eq!(next(&mut collector), ["default/b"]);
    take(
        &mut collector,
        [Item::Service(event_of(Event::Apply(service("a", 81))))],
    );
    assert_eq!(next(&mut collector), ["default/a"]);
    assert_eq!(collector.problems(), []);
}

#[test]
fn an_api_server_that_is_reached_by_its_service_is_told() {
    let mut collector = full();
    assert_eq!(collector.problems(), []);
    let event = event_of(Event::Apply(service("kubernetes", 443)));
    collector.take(Item::Service(event));
    let problem = collector.problems()[0].to_string();
    assert!(
        problem.contains("give its own address with --master"),
        "{problem}"
    );
    let event = event_of(Event::Delete(service("kubernetes", 443)));
    collector.take(Item::Service(event));
    assert_eq!(collector.problems(), []);
}

#[test]
fn an_api_server_that_is_reached_by_the_name_of_its_service_is_told() {
    let here = NodeName::new("node-a");
    let mut collector = Collector::new(here, Server::ServiceName, false);
    let event = event_of(Event::Delete(service("kubernetes", 443)));
    collector.take(Item::Service(event));
    let problem = collector.problems()[0].to_string();
    assert!(problem.contains("when the node starts anew"), "{problem}");
}

#[test]
fn a_node_that_does_not_appear_is_told_until_it_does() {
    let mut collector = collector();
    assert_eq!(collector.problems(), []);
    take(&mut collector, list(Item::Node, vec![node("node-b", "z")]));
    let problem = collector.problems()[0].to_string();
    assert!(problem.contains("Node node-a"), "{problem}");
    assert!(problem.contains("--hostname-override"), "{problem}");
    let event = event_of(Event::Apply(node("node-a", "z")));
    collector.take(Item::Node(event));
    assert_eq!(collector.problems(), []);
    // What was known of it still holds.
    take(&mut collector, list(Item::Node, vec![]));
    assert_eq!(collector.problems(), []);
}

#[test]
fn an_object_that_becomes_somebody_elses_is_gone() {
    let mut collector = full();
    let mut other = service("a", 80);
    other.spec.as_mut().unwrap().type_ = Some("ExternalName".to_owned());
    take(
        &mut collector,
        [Item::Service(event_of(Event::Apply(other)))],
    );
    assert_eq!(next(&mut collector), ["-default/a"]);
}

#[test]
fn endpoints_that_are_left_out_are_told_and_the_rest_is_used() {
    let mut collector = full();
    let mut half = slice("web-2", "10.244.1.3");
    half.endpoints.push(read(json!({"addresses": ["nowhere"]})));
    take(&mut collector, [Item::Slice(event_of(Event::Apply(half)))]);
    let objects = collector.objects().unwrap();
    assert_eq!(told(&objects), ["default/web-2"]);
    let problem = collector.problems()[0].to_string();
    assert!(
        problem.starts_with("EndpointSlice default/web-2: endpoints[1].addresses[0]: "),
        "{problem}"
    );
    take(
        &mut collector,
        [Item::Slice(event_of(Event::Delete(slice(
            "web-2",
            "10.244.1.3",
        ))))],
    );
    assert_eq!(collector.problems(), []);
}

#[test]
fn a_deleted_node_is_remembered_and_other_nodes_are_nobodys_business() {
    let mut collector = full();
    take(
        &mut collector,
        [
            Item::Node(event_of(Event::Delete(node("node-a", "zone-a")))),
            Item::Node(event_of(Event::Apply(node("node-b", "zone-b")))),
        ],
    );
    assert_eq!(collector.objects(), None);
}

proptest! {
    /// Whatever a watch tells, and however often: what was told last holds, and nobody is told of changes that are none twice.
    #[test]
    fn the_last_that_was_told_of_each_holds(told in prop::collection::vec((0..4u8, prop::option::of(1..4u16), 1..3u8), 0..40)) {
        let mut collector = full();
        let mut expected = BTreeMap::from([("default/a".to_owned(), 80), ("default/b".to_owned(), 80)]);
        let mut found = expected.clone();
        for (number, port, times) in told {
            let name = ["a", "b", "c", "d"][usize::from(number)];
            for _ in 0..times {
                let object = service(name, port.unwrap_or(1).into());
                collector.take(Item::Service(event_of(match port {
                    Some(_) => Event::Apply(object),
                    None => Event::Delete(object),
                })));
            }
            match port {
                Some(port) => drop(expected.insert(format!("default/{name}"), port)),
                None => drop(expected.remove(&format!("default/{name}"))),
            }
            for (name, service) in collector.objects().unwrap_or_default().services {
                match service {
                    Some(service) => drop(found.insert(name.to_string(), service.ports[0].port.get())),
                    None => prop_assert!(found.remove(name.as_str()).is_some(), "{name} is gone twice"),
                }
            }
        }
        prop_assert_eq!(found, expected);
    }
}

#[test]
fn the_service_of_the_api_server_is_known_by_its_names_too() {
    let address = |text: &str| Server::Address(text.parse().unwrap());
    for (host, expected) in [
        ("10.96.0.1", address("10.96.0.1")),
        ("[fd00::1]", address("fd00::1")),
        ("kubernetes.default", Server::ServiceName),
        ("kubernetes.default.svc", Server::ServiceName),
        ("kubernetes.default.svc.cluster.local", Server::ServiceName),
        ("kubernetes.default.example.com", Server::Name),
        ("kubernetes.example.com", Server::Name),
        ("localhost", Server::Name),
    ] {
        assert_eq!(Server::new(host), expected, "{host}");
    }
}
