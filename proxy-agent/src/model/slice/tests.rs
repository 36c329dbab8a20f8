use serde_json::{Value, json};

use super::*;
use crate::model::Effect;

type Outcome = Result<Option<(Slice, Vec<Problem>)>, Problem>;

/// Parses a slice of `web` on `node-a` with these fields changed.
fn parse(fields: Value) -> Outcome {
    let mut object = json!({
        "metadata": {"name": "web-1", "labels": {"kubernetes.io/service-name": "web"}},
        "addressType": "IPv4",
        "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}],
        "endpoints": []
    });
    for (key, value) in fields.as_object().unwrap() {
        object[key] = value.clone();
    }
    Slice::parse(
        &serde_json::from_value(object).unwrap(),
        &NodeName::new("node-a"),
    )
}

fn endpoints(endpoints: Value) -> (Slice, Vec<Problem>) {
    parse(json!({"endpoints": endpoints})).unwrap().unwrap()
}

#[test]
fn conditions_default_to_ready_and_serving() {
    let (slice, _) = endpoints(json!([
        {"addresses": ["10.0.0.1"]},
        {"addresses": ["10.0.0.2"], "conditions": {"ready": false, "serving": true, "terminating": true}, "nodeName": "node-a"},
        {"addresses": ["10.0.0.3"], "conditions": {"ready": false, "serving": false}, "nodeName": "node-b"},
    ]));
    let address = |text: &str| text.parse().unwrap();
    assert_eq!(slice.endpoints[0], Endpoint::ready(address("10.0.0.1")));
    assert_eq!(
        slice.endpoints[1],
        Endpoint::draining(address("10.0.0.2")).on_this_node()
    );
    let last = slice.endpoints[2];
    assert!(
        !last.is_ready() && !last.is_serving() && !last.is_terminating() && !last.is_on_this_node()
    );
}

#[test]
fn a_bad_endpoint_is_left_out_and_the_others_stay() {
    let (slice, trimmed) = endpoints(json!([
        {"addresses": ["10.0.0.1", "10.0.0.99"]},
        {"addresses": ["10.0.0.300"]},
        {"addresses": ["fd00::1"]},
        {"addresses": []},
    ]));
    assert_eq!(slice.endpoints.len(), 1);
    assert!(
        trimmed
            .iter()
            .all(|problem| problem.effect == Effect::Trimmed)
    );
    let told: Vec<_> = trimmed
        .iter()
        .map(|problem| format!("{}: {}", problem.field, problem.what))
        .collect();
    assert_eq!(
        told,
        [
            "endpoints[1].addresses[0]: \"10.0.0.300\" is not an IP address",
            "endpoints[2].addresses[0]: fd00::1 is not of the slice's addressType IPv4",
            "endpoints[3].addresses[0]: \"\" is not an IP address",
        ]
    );
}

#[test]
fn of_many_bad_endpoints_the_first_are_told_and_the_others_counted() {
    let all = (0..1_000).map(|n| match n % 2 {
        0 => json!({"addresses": [format!("10.0.{}.{}", n / 250, n % 250)]}),
        _ => json!({"addresses": [format!("pod-{n}")]}),
    });
    let (slice, trimmed) = endpoints(all.collect());
    assert_eq!(slice.endpoints.len(), 500);
    assert_eq!(trimmed.len(), TOLD + 1);
    let last = trimmed.last().map(ToString::to_string);
    assert_eq!(
        last.as_deref(),
        Some(
            "EndpointSlice default/web-1: endpoints: 495 more have no possible address; left out, the rest is used"
        )
    );
}

#[test]
fn ports_without_number_are_ignored_and_impossible_ones_refused() {
    let ports =
        |ports: Value| parse(json!({"ports": ports})).map(|slice| slice.unwrap().0.ports.len());
    assert_eq!(
        ports(json!([{"name": "a"}, {"name": "b", "port": 0}, {"name": "c", "port": 1}])),
        Ok(1)
    );
    let field = |result: Result<usize, Problem>| result.unwrap_err().field;
    assert_eq!(
        field(ports(json!([{"name": "a", "port": 65536}]))),
        "ports[0].port"
    );
    assert_eq!(
        field(ports(json!([{"port": 1}, {"name": "", "port": 2}]))),
        "ports[1].name"
    );
    assert_eq!(
        field(ports(json!([{"name": "a".repeat(64), "port": 2}]))),
        "ports[0].name"
    );
}

#[test]
fn a_port_of_an_unknown_protocol_is_left_out() {
    let ports = json!([{"name": "a", "port": 1, "protocol": "QUIC"}, {"name": "b", "port": 1}]);
    let (slice, trimmed) = parse(json!({"ports": ports})).unwrap().unwrap();
    assert_eq!(slice.ports.len(), 1);
    assert_eq!(&*slice.ports[0].name, "b");
    let fields: Vec<&str> = trimmed
        .iter()
        .map(|problem| problem.field.as_str())
        .collect();
    assert_eq!(fields, ["ports[0].protocol"]);
}

#[test]
fn what_is_not_for_this_proxy_is_skipped_silently() {
    let labelled = |label: &str| json!({"metadata": {"name": "web-1", "labels": {"kubernetes.io/service-name": "web", label: ""}}});
    for fields in [
        labelled("service.kubernetes.io/headless"),
        labelled("service.kubernetes.io/service-proxy-name"),
        json!({"metadata": {"name": "web-1"}}),
        json!({"addressType": "FQDN", "endpoints": [{"addresses": ["example.com"]}]}),
    ] {
        assert_eq!(parse(fields), Ok(None));
    }
}

#[test]
fn an_impossible_slice_is_refused_by_field() {
    assert_eq!(
        parse(json!({"addressType": "IPX"})).unwrap_err().field,
        "addressType"
    );
    let labels = json!({"name": "web-1", "labels": {"kubernetes.io/service-name": "not/a/name"}});
    let problem = parse(json!({"metadata": labels})).unwrap_err();
    assert_eq!(problem.field, "metadata.labels[kubernetes.io/service-name]");
    assert_eq!(
        parse(json!({"metadata": {"name": "x".repeat(254)}}))
            .unwrap_err()
            .field,
        "metadata.name"
    );
}

#[test]
fn equal_hints_are_kept_once_and_hints_for_this_node_are_resolved() {
    let hint = |zones: &[&str], node: &str| {
        let zones: Vec<_> = zones.iter().map(|zone| json!({"name": zone})).collect();
        json!({"forZones": zones, "forNodes": [{"name": node}]})
    };
    let (slice, _) = endpoints(json!([
        {"addresses": ["10.0.0.1"], "hints": hint(&["a", "b"], "node-a")},
        {"addresses": ["10.0.0.2"], "hints": hint(&["b", "a"], "node-b")},
        {"addresses": ["10.0.0.3"], "hints": hint(&["a"], "node-b")},
        {"addresses": ["10.0.0.4"], "hints": {"forZones": []}},
    ]));
    assert_eq!(slice.zones.len(), 2);
    assert_eq!(
        slice.endpoints.iter().map(|e| e.zones).collect::<Vec<_>>(),
        [1, 1, 2, 0]
    );
    assert_eq!(
        slice
            .endpoints
            .iter()
            .map(Endpoint::is_hinted_here)
            .collect::<Vec<_>>(),
        [true, false, false, false]
    );
    assert_eq!(
        slice
            .endpoints
            .iter()
            .map(Endpoint::has_node_hints)
            .collect::<Vec<_>>(),
        [true, true, true, false]
    );
}
