use serde_json::{Value, json};

use super::*;
use crate::model::Effect;

/// Parses a Service whose `spec` has these fields besides a ClusterIP and a port.
fn parse(spec: Value) -> Result<Option<Service>, Problem> {
    let mut object = json!({
        "metadata": {"name": "web"},
        "spec": {"clusterIP": "10.96.0.1", "ports": [{"port": 80}]}
    });
    for (key, value) in spec.as_object().unwrap() {
        object["spec"][key] = value.clone();
    }
    let parsed = Service::parse(&serde_json::from_value(object).unwrap())?;
    Ok(parsed.map(|(service, trimmed)| {
        assert_eq!(trimmed, []);
        service
    }))
}

fn good(spec: Value) -> Service {
    parse(spec).unwrap().unwrap()
}

/// "field: what" of a refusal.
fn refusal(spec: Value) -> String {
    let problem = parse(spec).unwrap_err();
    assert_eq!(problem.effect, Effect::Refused, "{problem}");
    format!("{}: {}", problem.field, problem.what)
}

#[test]
fn defaults_are_those_of_the_api_server() {
    let service = good(json!({}));
    let cluster_ip = ["10.96.0.1".parse().unwrap()];
    let port = Port::new("", Protocol::Tcp, NonZeroU16::new(80).unwrap());
    assert_eq!(service, Service::new(&cluster_ip, vec![port]));
}

#[test]
fn an_impossible_service_is_refused_by_field() {
    for (spec, expected) in [
        (
            json!({"type": "Funny"}),
            "spec.type: \"Funny\" is not a type of Service",
        ),
        (
            json!({"clusterIP": "10.96.0"}),
            "spec.clusterIP: \"10.96.0\" is not an IP address",
        ),
        (
            json!({"clusterIP": "127.0.0.1"}),
            "spec.clusterIP: 127.0.0.1 cannot be a Service's address: it is unspecified, loopback, multicast or broadcast",
        ),
        (
            json!({"clusterIPs": ["10.96.0.2"]}),
            "spec.clusterIPs[0]: \"10.96.0.2\" differs from spec.clusterIP \"10.96.0.1\"",
        ),
        (
            json!({"clusterIPs": ["10.96.0.1", "10.96.0.2"]}),
            "spec.clusterIPs[1]: 10.96.0.2 is a second IPv4 address",
        ),
        (
            json!({"ipFamilies": ["IPv6"]}),
            "spec.ipFamilies[0]: is \"IPv6\", but the ClusterIP is 10.96.0.1",
        ),
        (
            json!({"ports": [{"port": 0}]}),
            "spec.ports[0].port: 0 is not a port (1-65535)",
        ),
        (
            json!({"ports": [{"port": 65536}]}),
            "spec.ports[0].port: 65536 is not a port (1-65535)",
        ),
        (
            json!({"ports": [{"port": -1}]}),
            "spec.ports[0].port: -1 is not a port (1-65535)",
        ),
        (
            json!({"ports": [{"port": 1, "nodePort": 70000}]}),
            "spec.ports[0].nodePort: 70000 is not a port (1-65535)",
        ),
        (
            json!({"ports": [{"port": 1, "name": "A b"}]}),
            "spec.ports[0].name: \"A b\" is not a DNS name of lower-case letters, digits and '-'",
        ),
        (
            json!({"ports": [{"port": 1, "name": "a"}, {"port": 2, "name": "a"}]}),
            "spec.ports[1].name: \"a\" is the name of two ports",
        ),
        (
            json!({"ports": [{"port": 1, "name": "a"}, {"port": 1, "name": "b"}]}),
            "spec.ports[1].port: 1/TCP occurs twice",
        ),
        (
            json!({"ports": [{"port": 1, "nodePort": 30000, "name": "a"}, {"port": 2, "nodePort": 30000, "name": "b"}]}),
            "spec.ports[1].nodePort: 30000/TCP occurs twice",
        ),
        (
            json!({"externalIPs": ["192.0.2.1", "x"]}),
            "spec.externalIPs[1]: \"x\" is not an IP address",
        ),
        (
            json!({"loadBalancerSourceRanges": ["10.0.0.0/33"]}),
            "spec.loadBalancerSourceRanges[0]: \"10.0.0.0/33\" is not a CIDR",
        ),
        (
            json!({"type": "LoadBalancer", "externalTrafficPolicy": "Local", "healthCheckNodePort": 65536}),
            "spec.healthCheckNodePort: 65536 is not a port (1-65535)",
        ),
        (
            json!({"internalTrafficPolicy": "Near"}),
            "spec.internalTrafficPolicy: \"Near\" is neither Cluster nor Local",
        ),
        (
            json!({"externalTrafficPolicy": "Far"}),
            "spec.externalTrafficPolicy: \"Far\" is neither Cluster nor Local",
        ),
        (
            json!({"sessionAffinity": "Cookie"}),
            "spec.sessionAffinity: \"Cookie\" is neither ClientIP nor None",
        ),
        (
            json!({"sessionAffinity": "ClientIP", "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 86401}}}),
            "spec.sessionAffinityConfig.clientIP.timeoutSeconds: 86401 is not between 1 and 86400",
        ),
    ] {
        assert_eq!(refusal(spec), expected);
    }
}

#[test]
fn load_balancers_ask_only_where_the_policy_is_local() {
    let port = |kind, policy, port: i32| {
        let spec =
            json!({"type": kind, "externalTrafficPolicy": policy, "healthCheckNodePort": port});
        good(spec).health_check_port.map(NonZeroU16::get)
    };
    assert_eq!(port("LoadBalancer", "Local", 32_000), Some(32_000));
    assert_eq!(port("LoadBalancer", "Local", 0), None);
    assert_eq!(port("LoadBalancer", "Cluster", 32_000), None);
    assert_eq!(port("NodePort", "Local", 32_000), None);
}

#[test]
fn the_same_port_number_of_two_protocols_is_fine() {
    let ports = json!([{"port": 53, "name": "a", "nodePort": 30053}, {"port": 53, "name": "b", "protocol": "UDP", "nodePort": 30053}]);
    assert_eq!(good(json!({"ports": ports})).ports.len(), 2);
}

#[test]
fn what_is_not_for_this_proxy_is_skipped_silently() {
    for spec in [
        json!({"clusterIP": "None"}),
        json!({"clusterIP": null, "clusterIPs": ["None"]}),
        json!({"type": "ExternalName", "clusterIP": null, "externalName": "example.com"}),
    ] {
        assert_eq!(parse(spec), Ok(None));
    }
}

#[test]
fn a_service_without_cluster_ip_is_skipped_with_a_word() {
    let problem = parse(json!({"clusterIP": ""})).unwrap_err();
    assert_eq!(
        (problem.effect, problem.field.as_str()),
        (Effect::Skipped, "spec.clusterIP")
    );
}

#[test]
fn names_keep_within_dns() {
    let name = |namespace: &str, name: &str| {
        let object = json!({"metadata": {"name": name, "namespace": namespace}});
        Service::name(&serde_json::from_value(object).unwrap()).map_err(|problem| problem.field)
    };
    assert_eq!(name("ns", "web"), Ok(ServiceName::new("ns", "web")));
    assert!(name(&"n".repeat(63), &"s".repeat(63)).is_ok());
    assert_eq!(name("ns", &"s".repeat(64)), Err("metadata.name".into()));
    assert_eq!(
        name(&"n".repeat(64), "web"),
        Err("metadata.namespace".into())
    );
    for bad in ["", "-a", "a-", "A", "a/b", "a:b", "a.b", "é"] {
        assert!(name("ns", bad).is_err(), "{bad}");
    }
    // The longest name of a service port is what the kernel's map has room for.
    let most = 3 * 63 + 2;
    assert!(most <= proxy_ebpf::abi::NAME_LEN);
}

#[test]
fn the_age_comes_from_the_creation_timestamp() {
    let object = json!({
        "metadata": {"name": "web", "creationTimestamp": "1970-01-01T00:01:00Z"},
        "spec": {"clusterIP": "10.96.0.1"}
    });
    let service = Service::parse(&serde_json::from_value(object).unwrap());
    assert_eq!(service.unwrap().unwrap().0.created, 60);
    assert_eq!(
        good(json!({})).created,
        i64::MAX,
        "without one it is the youngest"
    );
}

#[test]
fn a_port_of_an_unknown_protocol_is_left_out() {
    let object = json!({
        "metadata": {"name": "web"},
        "spec": {"clusterIP": "10.96.0.1", "ports": [
            {"name": "new", "port": 443, "protocol": "QUIC"}, {"name": "old", "port": 443}
        ]}
    });
    let service = Service::parse(&serde_json::from_value(object).unwrap());
    let (service, trimmed) = service.unwrap().unwrap();
    assert_eq!(service.ports.len(), 1);
    assert_eq!(&*service.ports[0].name, "old");
    let trimmed: Vec<String> = trimmed.iter().map(ToString::to_string).collect();
    assert_eq!(
        trimmed,
        [
            "Service default/web: spec.ports[0].protocol: \"QUIC\" is not a protocol (TCP, UDP, SCTP); left out, the rest is used"
        ]
    );
}

#[test]
fn messages_do_not_repeat_huge_or_strange_text() {
    let problem = parse(json!({"clusterIP": "9".repeat(1 << 20)})).unwrap_err();
    assert!(problem.to_string().len() < 300, "{problem}");
    let problem = parse(json!({"clusterIP": "\u{1b}[31m"})).unwrap_err();
    assert!(!problem.to_string().contains('\u{1b}'));
}
