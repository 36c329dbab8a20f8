//! The flow matrix of kube-proxy's `TestInternalExternalMasquerade`, row by row.

use super::*;

/// From, to, and for the policies Cluster, external Local and internal Local: the endpoints reached (L here, R elsewhere)
/// and whether the source is masqueraded (m).
const MATRIX: [(&str, &str, [&str; 3]); 13] = [
    ("pod", "cluster IP", ["L R", "L R", "L"]),
    ("pod", "node port", ["Lm Rm", "L R", "Lm Rm"]),
    ("pod", "load balancer", ["Lm Rm", "L R", "Lm Rm"]),
    ("pod", "external IP", ["Lm Rm", "L R", "Lm Rm"]),
    ("node", "cluster IP", ["Lm Rm", "Lm Rm", "Lm"]),
    ("node", "node port", ["Lm Rm", "Lm Rm", "Lm Rm"]),
    ("localhost", "node port", ["Lm Rm", "Lm Rm", "Lm Rm"]),
    ("node", "load balancer", ["Lm Rm", "Lm Rm", "Lm Rm"]),
    ("node", "external IP", ["Lm Rm", "Lm Rm", "Lm Rm"]),
    ("external", "cluster IP", ["Lm Rm", "Lm Rm", "Lm"]),
    ("external", "node port", ["Lm Rm", "L", "Lm Rm"]),
    ("external", "load balancer", ["Lm Rm", "L", "Lm Rm"]),
    ("external", "external IP", ["Lm Rm", "L", "Lm Rm"]),
];

/// A cell of the matrix when pods cannot be told from others, or all is masqueraded on the way to a ClusterIP.
fn expected(from: &str, to: &str, column: usize, has_detector: bool, all: bool) -> String {
    let row = MATRIX
        .iter()
        .find(|row| (row.0, row.1) == (from, to))
        .unwrap();
    let cell = row.2[column];
    match to {
        "cluster IP" if all => cell.replace('m', "").replace('L', "Lm").replace('R', "Rm"),
        "cluster IP" if !has_detector => cell.replace('m', ""),
        // Nobody is known to be a pod, so nobody takes the short cut of pods.
        _ if from == "pod" && column == 1 && !has_detector => "L".to_owned(),
        _ => cell.to_owned(),
    }
}

fn policies(column: usize) -> (TrafficPolicy, TrafficPolicy) {
    let local = |is| {
        if is {
            TrafficPolicy::Local
        } else {
            TrafficPolicy::Cluster
        }
    };
    (local(column == 2), local(column == 1))
}

fn flow(family: Family, from: &str, to: &str) -> Packet<'static> {
    let (source, interface) = match from {
        "pod" => ("10.244.0.5", Some("cni0")),
        "node" => ("192.168.0.1", None),
        "localhost" => ("127.0.0.1", None),
        _ => ("192.0.2.7", Some("eth0")),
    };
    let to = match (from, to) {
        (_, "cluster IP") => ("10.96.0.1", 80),
        (_, "load balancer") => ("198.51.100.1", 80),
        (_, "external IP") => ("203.0.113.1", 80),
        ("localhost", _) => ("127.0.0.1", 30080),
        _ => ("192.168.0.1", 30080),
    };
    packet(ip(family, source), interface, (ip(family, to.0), to.1))
}

fn found(backend: &IptablesBackend<Simulated>, packet: &Packet<'_>) -> String {
    let found = ends(backend, packet);
    let family = Family::of(packet.source);
    let cells = found.iter().map(|end| {
        let m = if end.ends_with(" m") { "m" } else { "" };
        for (name, address) in [("L", "10.244.0.9"), ("R", "10.244.1.9")] {
            let address = SocketAddr::from((ip(family, address), 8080)).to_string();
            if end.starts_with(&address) {
                return format!("{name}{m}");
            }
        }
        end.clone()
    });
    let cells: BTreeSet<String> = cells.collect();
    cells.into_iter().collect::<Vec<_>>().join(" ")
}

fn check(family: Family, local_pods: &LocalPods) {
    for has_detector in [true, false] {
        for masquerade_all in [false, true] {
            for column in 0..3 {
                let mut service = with_endpoints(service(family, "web"));
                (service.internal_policy, service.external_policy) = policies(column);
                let local_pods = match has_detector {
                    true => local_pods.clone(),
                    false => LocalPods::Unknown,
                };
                let rules = Rules {
                    local_pods,
                    masquerade_all,
                    ..rules()
                };
                let backend = holding(rules, &of(&[&service]));
                for (from, to, _) in MATRIX {
                    // There is no route_localnet over IPv6.
                    let expected = match (family, from) {
                        (Family::V6, "localhost") => "[::1]:30080".to_owned(),
                        _ => expected(from, to, column, has_detector, masquerade_all),
                    };
                    let packet = flow(family, from, to);
                    assert_eq!(
                        found(&backend, &packet),
                        expected,
                        "{from} to {to}, column {column}, detector {has_detector}, all {masquerade_all}, {family}"
                    );
                }
            }
        }
    }
}

#[test]
fn every_flow_goes_where_kube_proxy_sends_it() {
    for family in [Family::V4, Family::V6] {
        check(family, &rules().local_pods);
    }
}

#[test]
fn pods_are_told_by_their_interface_too() {
    for name in ["cni0", "cni+"] {
        check(Family::V4, &LocalPods::Interface(name.to_owned()));
    }
}

#[test]
fn a_pod_that_reaches_itself_is_masqueraded_and_its_neighbour_is_not() {
    for family in [Family::V4, Family::V6] {
        let backend = holding(rules(), &of(&[&with_endpoints(service(family, "web"))]));
        let own = ip(family, "10.244.0.9");
        let to = (ip(family, "10.96.0.1"), 80);
        let here = found(&backend, &packet(own, Some("cni0"), to));
        assert_eq!(here, "Lm R", "{family}");
        let neighbour = ip(family, "10.244.0.8");
        let other = found(&backend, &packet(neighbour, Some("cni0"), to));
        assert_eq!(other, "L R", "{family}");
    }
}
