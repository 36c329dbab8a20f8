use std::{
    collections::{BTreeMap, VecDeque},
    fs,
    net::SocketAddr,
    sync::Mutex,
};

use axum::{
    Router,
    body::Body,
    extract::State,
    http::{StatusCode, Uri},
};
use futures_util::{StreamExt as _, stream};
use serde_json::{Value, json};
use tokio::{net::TcpListener, time::timeout};

use super::*;
use crate::model::Objects;

const PATIENCE: Duration = Duration::from_secs(60);
const SERVICES: &str = "/api/v1/services";
const SLICES: &str = "/apis/discovery.k8s.io/v1/endpointslices";
const NODES: &str = "/api/v1/nodes";

/// What each connection to a collection is told, in turn. Then it hears nothing more.
type Scripts = BTreeMap<&'static str, VecDeque<Vec<Value>>>;

/// What an old server does not know.
const OLD: &str = "spec.clusterIP";

/// An API server that says odd things, which a real one never does, and knows no new fields: its address.
async fn odd_server(scripts: Scripts) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let told: &Mutex<Scripts> = Box::leak(Box::new(Mutex::new(scripts)));
    let answer = |State(told): State<&'static Mutex<Scripts>>, uri: Uri| async move {
        if uri.query().is_some_and(|query| query.contains(OLD)) {
            let status = json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "code": 400, "reason": "BadRequest", "message": "field label not supported"});
            return (StatusCode::BAD_REQUEST, Body::from(status.to_string()));
        }
        let script = {
            let mut scripts = told.lock().unwrap();
            scripts.get_mut(uri.path()).and_then(VecDeque::pop_front)
        };
        let lines = script.unwrap_or_default().into_iter();
        let lines = lines.map(|line| Ok::<_, io::Error>(format!("{line}\n")));
        let lines = stream::iter(lines).chain(stream::pending());
        (StatusCode::OK, Body::from_stream(lines))
    };
    let router = Router::new().fallback(answer).with_state(told);
    tokio::spawn(async move { axum::serve(listener, router).await });
    address
}

fn follow_server(server: SocketAddr) -> (Followed, mpsc::Receiver<Update>) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("kubeconfig");
    let config = json!({
        "clusters": [{"name": "c", "cluster": {"server": format!("http://{server}")}}],
        "users": [{"name": "u", "user": {}}],
        "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
        "current-context": "x",
    });
    fs::write(&path, config.to_string()).unwrap();
    let (sender, updates) = mpsc::channel(1);
    let access = Access::Kubeconfig(path, None);
    let here = NodeName::new("node-a");
    let wanted = Wanted::default();
    let followed = start(&access, here, sender, wanted, &RestClientMetrics::default()).unwrap();
    (followed, updates)
}

fn event(kind: &str, object: &Value) -> Value {
    json!({"type": kind, "object": object})
}

/// The end of a streamed list.
fn listed(api: &str, kind: &str) -> Value {
    let annotations = json!({"k8s.io/initial-events-end": "true"});
    let metadata = json!({"resourceVersion": "100", "annotations": annotations});
    event(
        "BOOKMARK",
        &json!({"apiVersion": api, "kind": kind, "metadata": metadata}),
    )
}

/// One of a later version of the API.
fn service(name: &str, last: u8, port: u16) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": {"namespace": "default", "name": name, "resourceVersion": "7", "owner": {"of": "nobody"}},
        "spec": {
            "clusterIP": format!("10.96.0.{last}"), "clusterIPs": [format!("10.96.0.{last}")],
            "ports": [{"port": port, "priority": "high"}],
            "trafficDistribution": "PreferSamePlanet",
            "gravity": {"direction": "up"},
        },
        "status": {"mood": "good"},
    })
}

fn slice(name: &str, address_type: &str, protocol: &str, addresses: Vec<String>) -> Value {
    let endpoints = addresses.into_iter().map(
        |address| json!({"addresses": [address], "conditions": {"ready": true, "awake": true}}),
    );
    json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
        "metadata": {
            "namespace": "default", "name": name, "resourceVersion": "7",
            "labels": {"kubernetes.io/service-name": "a"},
        },
        "addressType": address_type,
        "endpoints": endpoints.collect::<Vec<_>>(),
        "ports": [{"name": "", "port": 8080, "protocol": protocol}],
    })
}

fn nodes() -> VecDeque<Vec<Value>> {
    let node = json!({
        "apiVersion": "v1", "kind": "Node",
        "metadata": {"name": "node-a", "resourceVersion": "7"},
        "status": {"shape": "round"},
    });
    [vec![event("ADDED", &node), listed("v1", "Node")]].into()
}

async fn next(updates: &mut mpsc::Receiver<Update>) -> Objects {
    let update = timeout(PATIENCE, updates.recv()).await.expect("in time");
    match update {
        Some(Update::Objects(objects)) => objects,
        other => panic!("{other:?}"),
    }
}

/// Services by name, none for those that are gone, as the updates until the last of them says.
async fn services_until(
    updates: &mut mpsc::Receiver<Update>,
    is_last: impl Fn(&BTreeMap<String, bool>) -> bool,
) -> BTreeMap<String, bool> {
    let mut found = BTreeMap::new();
    while !is_last(&found) {
        let objects = next(updates).await;
        let told = objects.services.into_iter();
        found.extend(told.map(|(name, service)| (name.to_string(), service.is_some())));
    }
    found
}

#[tokio::test]
async fn objects_of_a_later_version_are_used_as_far_as_they_are_understood() {
    let many = (0..1_000).map(|n| match n % 2 {
        0 => format!("10.244.{}.{}", n / 250, n % 250),
        _ => format!("pod-{n}"),
    });
    let one = || vec!["10.244.9.1".to_owned()];
    let added = [
        slice("many", "IPv4", "TCP", many.collect()),
        slice("names", "FQDN", "TCP", vec!["pod.example.test".to_owned()]),
        slice("later", "IPv7", "TCP", one()),
        slice("quick", "IPv4", "QUIC", one()),
    ];
    let mut slices: Vec<Value> = added.iter().map(|slice| event("ADDED", slice)).collect();
    slices.push(listed("discovery.k8s.io/v1", "EndpointSlice"));
    let services = vec![
        event("ADDED", &service("a", 10, 80)),
        listed("v1", "Service"),
    ];
    let server = odd_server(
        [
            (SERVICES, [services].into()),
            (SLICES, [slices].into()),
            (NODES, nodes()),
        ]
        .into(),
    );
    let (followed, mut updates) = follow_server(server.await);
    let objects = next(&mut updates).await;
    assert!(objects.complete && objects.node.is_some());
    assert_eq!(objects.services.len(), 1);
    let sizes = objects.slices.iter().map(|(name, slice)| {
        let count = slice.as_ref().map(|slice| slice.endpoints.len());
        (name.as_str(), count)
    });
    let expected = [("default/many", Some(500)), ("default/quick", Some(1))];
    assert_eq!(sizes.collect::<Vec<_>>(), expected);
    let problems = followed.problems.borrow();
    let problems: Vec<String> = problems.iter().map(ToString::to_string).collect();
    for expected in [
        "EndpointSlice default/later: addressType: \"IPv7\" is not IPv4, IPv6 or FQDN",
        "EndpointSlice default/quick: ports[0].protocol: \"QUIC\" is not a protocol",
        "EndpointSlice default/many: endpoints: 495 more",
    ] {
        assert!(
            problems.iter().any(|problem| problem.starts_with(expected)),
            "{problems:#?}"
        );
    }
    assert_eq!(problems.len(), 8, "{problems:#?}");
}

#[tokio::test]
async fn events_that_come_twice_or_out_of_order_and_what_is_no_event_lead_to_the_right_end() {
    let a = |port| service("a", 10, port);
    // Of whoever has waited too long.
    let gone = json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "code": 410, "reason": "Expired", "message": "too old"});
    let first = vec![
        event("ADDED", &a(80)),
        event("ADDED", &a(80)),
        listed("v1", "Service"),
        // Of one that was never added, and of one that was never there.
        event("MODIFIED", &service("b", 11, 80)),
        event("DELETED", &service("c", 12, 80)),
        event("DELETED", &a(80)),
        event("DELETED", &a(80)),
        event("MODIFIED", &a(81)),
        event("SNEEZED", &a(82)),
        event("ERROR", &gone),
    ];
    let second = vec![
        event("ADDED", &service("d", 13, 80)),
        listed("v1", "Service"),
    ];
    let slices = vec![listed("discovery.k8s.io/v1", "EndpointSlice")];
    let server = odd_server(
        [
            (SERVICES, [first, second].into()),
            (SLICES, [slices].into()),
            (NODES, nodes()),
        ]
        .into(),
    );
    let (followed, mut updates) = follow_server(server.await);
    let found = services_until(&mut updates, |found| found.contains_key("default/d")).await;
    let expected = [("a", false), ("b", false), ("d", true)];
    let expected = expected.map(|(name, is_there)| (format!("default/{name}"), is_there));
    assert_eq!(found, BTreeMap::from(expected));
    assert_eq!(*followed.problems.borrow(), []);
}
