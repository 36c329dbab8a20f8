use proxy_ebpf::abi::{Peer, Reason, SOCKET_PEERS, Socket, SocketRecord};
use serde_json::json;

use super::*;
use crate::debug::{
    contents::MapUse,
    fixture::{NOW_NS, POD, addr, contents},
};

#[test]
fn services_have_the_documented_shape() {
    let backend = |address: &str, local: bool, state: &str| json!({"address": address, "port": 8080, "local": local, "state": state});
    assert_eq!(
        serde_json::to_value(services(&contents())).unwrap(),
        json!([{
            "service": "default/web:http",
            "family": "IPv4",
            "protocol": "TCP",
            "frontends": [
                {"address": "0.0.0.0", "port": 30080, "kind": "node-port"},
                {"address": "10.96.0.1", "port": 80, "kind": "cluster-ip"},
            ],
            "backends": [
                backend("10.244.0.2", true, "ready"),
                backend("10.244.1.2", false, "terminating"),
            ],
            "local_backends": [backend("10.244.0.2", true, "ready")],
            "session_affinity_seconds": 60,
            "internal_traffic_policy": "Local",
            "external_traffic_policy": "Cluster",
        }])
    );
}

#[test]
fn a_service_is_one_line_of_the_table() {
    assert_eq!(
        services(&contents())
            .table()
            .lines()
            .nth(1)
            .unwrap()
            .split_whitespace()
            .collect::<Vec<_>>(),
        [
            "default/web:http",
            "TCP",
            "IPv4",
            "0.0.0.0:30080(node-port),10.96.0.1:80(cluster-ip)",
            "10.244.0.2:8080(local),10.244.1.2:8080(terminating)",
            "60s",
            "Local/Cluster",
        ]
    );
}

#[test]
fn backends_show_where_they_are_and_in_which_sets() {
    let mut contents = contents();
    let draining = contents.members.get_mut(&1).unwrap();
    draining.word = MemberWord::new(9, MemberWord::SERVING | MemberWord::TERMINATING);
    let table = backends(&contents).table();
    let rows: Vec<Vec<&str>> = table
        .lines()
        .skip(1)
        .map(|line| {
            line.split("  ")
                .filter(|cell| !cell.is_empty())
                .map(str::trim)
                .collect()
        })
        .collect();
    assert_eq!(
        rows,
        [
            [
                "default/web:http",
                "TCP",
                "10.244.0.2:8080",
                "ready",
                "this node",
                "cluster,local"
            ],
            [
                "default/web:http",
                "TCP",
                "10.244.1.2:8080",
                "terminating",
                "elsewhere",
                "draining"
            ],
        ]
    );
}

#[test]
fn affinity_names_client_and_backend_until_that_is_gone() {
    let mut contents = contents();
    let row =
        |contents: &Contents| serde_json::to_value(affinity(contents, NOW_NS)).unwrap()[0].clone();
    assert_eq!(
        row(&contents),
        json!({
            "service": "default/web:http",
            "client_netns": POD,
            "backend": "10.244.1.2:8080",
            "age_seconds": 20,
            "timeout_seconds": 60,
        })
    );
    contents.members.remove(&1);
    assert_eq!(row(&contents)["backend"], json!(null));
}

#[test]
fn sockets_show_what_they_were_translated_from() {
    let mut contents = contents();
    let mut peers = [Peer::default(); SOCKET_PEERS];
    peers[0] = Peer {
        vip: addr("10.96.0.1"),
        backend: addr("10.244.0.2"),
        vip_port: proxy_ebpf::abi::Be16::new(80),
        backend_port: proxy_ebpf::abi::Be16::new(8080),
        flags: proxy_ebpf::abi::peer_flags::USED | proxy_ebpf::abi::peer_flags::CONNECTED,
        service: 3,
        member: 0,
        generation: 9,
        protocol: 6,
        last_used_ns: NOW_NS - 1_000_000_000,
    };
    let socket = Socket {
        netns_cookie: POD,
        reserved: 0,
        peers,
    };
    contents.sockets.push(SocketRecord { cookie: 77, socket });
    assert_eq!(
        serde_json::to_value(sockets(&contents, NOW_NS)).unwrap(),
        json!([{
            "service": "default/web:http",
            "protocol": "TCP",
            "vip": "10.96.0.1:80",
            "backend": "10.244.0.2:8080",
            "connected": true,
            "serving": true,
            "netns": POD,
            "cookie": 77,
            "idle_seconds": 1,
        }])
    );
}

#[test]
fn maps_and_status_show_what_there_is() {
    let mut contents = contents();
    contents.maps.push(MapUse {
        map: "SOCKETS".into(),
        entries: None,
        capacity: 8,
        bytes: 64,
    });
    contents.reasons.push((Reason::Connected, 4));
    assert_eq!(
        maps(&contents).table(),
        "MAP      ENTRIES  CAPACITY  BYTES\nSOCKETS  ?        8         64\n"
    );
    let status = status(&contents, [("connect4", 17)].into(), NOW_NS);
    assert_eq!(
        serde_json::to_value(&status).unwrap(),
        json!({
            "abi_version": proxy_ebpf::abi::ABI_VERSION,
            "generation": 1,
            "node": "node-a",
            "complete": true,
            "heartbeat_age_seconds": 2,
            "lease_seconds": null,
            "hooks": {"connect4": 17},
            "counters": {"connected": 4},
        })
    );
    assert!(status.table().contains("hook connect4"));
}
