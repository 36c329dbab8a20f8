//! The cases of kube-proxy's TestCategorizeEndpoints (pkg/proxy/topology_test.go): one port, endpoints in a line each.

use super::*;

/// What a Service must have for its port.
#[derive(Clone, Copy)]
enum Policies {
    Neither,
    External,
    /// Local, but nothing to reach it from outside.
    ExternalUnused,
    Internal,
    InternalAndReachable,
    Both,
}

/// Compiles endpoints given as "address [flags]" and gives back "cluster | local | none" by last byte. Flags: `here`,
/// `unready`, `terminating` (serving), `dead` (terminating, not serving), `zone=a,b`, `node=x`.
fn categorize(zone: &str, policies: Policies, endpoints: &[&str]) -> String {
    let spec = match policies {
        Policies::Neither => json!({}),
        Policies::External => {
            json!({"type": "NodePort", "externalTrafficPolicy": "Local", "ports": [{"name": "http", "port": 80, "nodePort": 30_080}]})
        }
        Policies::ExternalUnused => {
            json!({"type": "LoadBalancer", "externalTrafficPolicy": "Local"})
        }
        Policies::Internal => json!({"internalTrafficPolicy": "Local"}),
        Policies::InternalAndReachable => {
            json!({"internalTrafficPolicy": "Local", "externalIPs": ["192.0.2.1"]})
        }
        Policies::Both => {
            json!({"internalTrafficPolicy": "Local", "externalTrafficPolicy": "Local", "externalIPs": ["192.0.2.1"]})
        }
    };
    let mut follower = Follower::new();
    follower.objects(node_update(zone));
    follower.service("s", service_object("s", "10.96.0.1", "", spec));
    let endpoints: Vec<Value> = endpoints.iter().map(|line| endpoint(line)).collect();
    follower.slice("s-1", slice_object("s-1", "s", endpoints.into()));
    let mut sets = [Vec::new(), Vec::new(), Vec::new()];
    for backend in &follower.state.services.values().next().unwrap().backends {
        let last = backend
            .address
            .to_string()
            .rsplit('.')
            .next()
            .unwrap()
            .to_owned();
        let state = backend.state;
        for (set, is_in) in sets.iter_mut().zip([
            state.in_cluster,
            state.in_local,
            !state.in_cluster && !state.in_local,
        ]) {
            if is_in {
                set.push(last.clone());
            }
        }
    }
    sets.map(|set| set.join(" ")).join(" | ")
}

fn endpoint(line: &str) -> Value {
    let mut words = line.split(' ');
    let mut object =
        json!({"addresses": [format!("10.1.2.{}", words.next().unwrap())], "hints": {}});
    for word in words {
        match word.split_once('=') {
            Some(("zone", zones)) => {
                object["hints"]["forZones"] =
                    zones.split(',').map(|zone| json!({"name": zone})).collect();
            }
            Some(("node", node)) => object["hints"]["forNodes"] = json!([{"name": node}]),
            _ => match word {
                "here" => object["nodeName"] = HERE.into(),
                "unready" => object["conditions"] = json!({"ready": false, "serving": false}),
                "terminating" => {
                    object["conditions"] =
                        json!({"ready": false, "serving": true, "terminating": true})
                }
                "dead" => {
                    object["conditions"] =
                        json!({"ready": false, "serving": false, "terminating": true})
                }
                other => panic!("{other}"),
            },
        }
    }
    object
}

use Policies::*;

#[test]
fn hints_are_followed_when_every_ready_endpoint_has_them_and_one_is_for_us() {
    assert_eq!(
        categorize(
            "a",
            Neither,
            &["3 zone=a", "4 zone=b", "5 zone=c", "6 zone=a"]
        ),
        "3 6 |  | 4 5"
    );
    assert_eq!(
        categorize(
            "a",
            Neither,
            &["3 zone=a", "4 zone=a,b", "5 zone=b,c", "6 zone=c"]
        ),
        "3 4 |  | 5 6",
        "multiple hints per endpoint"
    );
    assert_eq!(
        categorize("a", Neither, &["3 zone=a", "4 zone=b", "5", "6 zone=a"]),
        "3 4 5 6 |  | ",
        "a missing hint"
    );
    assert_eq!(
        categorize(
            "a",
            Neither,
            &["3 zone=a", "4 zone=b", "5 unready", "6 zone=a"]
        ),
        "3 6 |  | 4",
        "unready ones need none"
    );
    assert_eq!(
        categorize("", Neither, &["3 zone=a", "4 zone=b"]),
        "3 4 |  | ",
        "no zone"
    );
    assert_eq!(
        categorize("d", Neither, &["3 zone=a", "4 zone=b"]),
        "3 4 |  | ",
        "another zone"
    );
    assert_eq!(
        categorize("a", Neither, &["3 zone=a unready", "4 zone=b"]),
        "4 |  | ",
        "only unready ones in our zone"
    );
}

#[test]
fn hints_for_the_node_come_before_those_for_the_zone() {
    assert_eq!(
        categorize(
            "a",
            Neither,
            &["3 zone=a node=node-a", "4 zone=a node=node-b"]
        ),
        "3 |  | 4"
    );
    assert_eq!(
        categorize(
            "a",
            Neither,
            &["3 zone=a node=node-c", "4 zone=b node=node-b"]
        ),
        "3 |  | 4",
        "none for us: the zone's"
    );
    assert_eq!(
        categorize("a", Neither, &["3 zone=a node=node-a", "4 zone=a"]),
        "3 4 |  | ",
        "one without: the zone's"
    );
    assert_eq!(
        categorize("", Neither, &["3 node=node-a", "4 node=node-b"]),
        "3 |  | 4",
        "a zone is not needed"
    );
}

#[test]
fn topology_does_not_touch_the_local_set() {
    assert_eq!(
        categorize(
            "a",
            External,
            &["3 zone=a", "4 here zone=b", "5 zone=c", "6 here zone=a"]
        ),
        "3 6 | 4 6 | 5"
    );
    assert_eq!(
        categorize("a", External, &["3 zone=a", "4 here zone=b"]),
        "3 | 4 | ",
        "topology and locality in conflict"
    );
}

#[test]
fn the_local_policies_use_what_they_need() {
    let endpoints = ["3", "4 here", "5"];
    assert_eq!(categorize("", Neither, &endpoints), "3 4 5 |  | ");
    assert_eq!(categorize("", External, &endpoints), "3 4 5 | 4 | ");
    assert_eq!(categorize("", ExternalUnused, &endpoints), "3 4 5 |  | ");
    assert_eq!(categorize("", Internal, &endpoints), " | 4 | 3 5");
    assert_eq!(
        categorize("", InternalAndReachable, &endpoints),
        "3 4 5 | 4 | "
    );
    assert_eq!(categorize("", Both, &endpoints), "3 4 5 | 4 | ");
    assert_eq!(categorize("", Internal, &[]), " |  | ");
    assert_eq!(
        categorize("", Internal, &["3", "4"]),
        " |  | 3 4",
        "all elsewhere"
    );
    assert_eq!(
        categorize("", Internal, &["3 here", "4 here"]),
        " | 3 4 | ",
        "all here"
    );
}

#[test]
fn terminating_endpoints_are_used_only_where_nothing_is_ready() {
    assert_eq!(
        categorize("", Neither, &["3", "4 terminating", "5 dead"]),
        "3 |  | 4"
    );
    assert_eq!(
        categorize("", Neither, &["3 unready", "4 terminating", "5 dead"]),
        "4 |  | "
    );
    assert_eq!(categorize("", Neither, &["3 dead", "4 dead"]), " |  | ");
    assert_eq!(
        categorize("", External, &["3", "4 here terminating"]),
        "3 | 4 | ",
        "the local set falls back by itself"
    );
    assert_eq!(
        categorize(
            "",
            External,
            &["3 here", "4 here terminating", "5 terminating"]
        ),
        "3 | 3 | 4 5"
    );
    assert_eq!(
        categorize("", External, &["3 terminating", "4 here terminating"]),
        "3 4 | 4 | "
    );
    assert_eq!(
        categorize("", Internal, &["3 terminating", "4 here unready"]),
        " |  | 3"
    );
    assert_eq!(
        categorize(
            "a",
            Neither,
            &["3 terminating zone=a", "4 terminating zone=b"]
        ),
        "3 4 |  | ",
        "topology is ignored"
    );
}
