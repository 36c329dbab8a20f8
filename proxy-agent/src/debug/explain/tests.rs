use std::cell::RefCell;

use proxy_ebpf::abi::{FrontendValue, Member, Service, SetWord, Slot, frontend_flags, kind};
use serde_json::json;

use super::*;
use crate::{
    backends::ebpf::in_memory::InMemory,
    debug::{
        contents::Contents,
        fixture::{NODE, NOW_NS, POD, contents},
    },
};

fn host() -> Client {
    Client {
        name: "host".into(),
        on_host: true,
        netns_cookie: Some(NODE),
        from_loopback: false,
        address: None,
        namespace: None,
        is_outside: false,
    }
}

fn pod() -> Client {
    Client {
        name: "pod".into(),
        on_host: false,
        netns_cookie: Some(POD),
        from_loopback: false,
        address: None,
        namespace: None,
        is_outside: false,
    }
}

fn ask(contents: &Contents, client: &Client, destination: &str) -> Explanation {
    let destination = destination.parse().unwrap();
    explain(
        &in_memory(contents),
        |index| contents.service_name(index),
        client,
        destination,
        NOW_NS,
    )
}

/// The maps that these are the contents of.
fn in_memory(contents: &Contents) -> InMemory {
    let mut maps = InMemory {
        frontends: contents.frontends.clone(),
        vips: contents.vips.clone(),
        addresses: contents.addresses.clone(),
        services: vec![Service::default(); 8],
        slots: vec![Slot::default(); 16],
        members: vec![Member::default(); 8],
        affinity: RefCell::new(contents.affinity.clone().into_iter().collect()),
    };
    for (index, entry) in &contents.services {
        maps.services[*index as usize] = entry.service;
    }
    for (index, slot) in &contents.slots {
        maps.slots[*index as usize] = *slot;
    }
    for (index, member) in &contents.members {
        maps.members[*index as usize] = *member;
    }
    maps
}

/// Changes the flags of the ClusterIP's frontend.
fn flag(contents: &mut Contents, flags: u8) {
    let key = FrontendKey::new(
        "10.96.0.1".parse::<std::net::IpAddr>().unwrap().into(),
        Be16::new(80),
        TCP,
    );
    contents
        .frontends
        .insert(key, FrontendValue::new(&key, 3, kind::CLUSTER_IP, flags));
}

#[test]
fn the_answer_has_the_documented_shape() {
    let answer = ask(&contents(), &host(), "10.96.0.1:80/tcp");
    assert_eq!(
        serde_json::to_value(&answer).unwrap(),
        json!({
            "frontend": {
                "service": "default/web:http",
                "address": "10.96.0.1",
                "port": 80,
                "protocol": "TCP",
                "kind": "cluster-ip",
            },
            "layer": "socket",
            "policy": "Local",
            "candidates": [{"address": "10.244.0.2", "port": 8080, "local": true, "state": "ready"}],
            "affinity": {"seconds": 60, "client_netns": NODE, "backend": null, "age_seconds": null},
            "verdict": "translate",
            "reason": "there is one backend",
            "packet": null,
        })
    );
    assert!(
        answer
            .table()
            .contains("10.96.0.1:80/TCP (cluster-ip) of default/web:http")
    );
}

#[test]
fn affinity_decides_for_a_client_that_is_remembered() {
    let answer = ask(&contents(), &pod(), "192.0.2.1:30080/tcp");
    let affinity = answer.affinity.unwrap();
    assert_eq!(affinity.backend.as_deref(), Some("10.244.1.2:8080"));
    assert_eq!(
        answer.reason,
        "session affinity keeps this client at 10.244.1.2:8080"
    );
    assert_eq!(
        (answer.policy, answer.candidates.len()),
        (Some("Cluster"), 2)
    );
}

#[test]
fn node_ports_on_loopback_are_for_the_nodes_own_processes() {
    let maps = contents();
    assert_eq!(ask(&maps, &host(), "127.0.0.1:30080").verdict, "translate");
    let answer = ask(&maps, &pod(), "127.0.0.1:30080");
    assert_eq!(
        (answer.verdict, answer.layer, answer.frontend),
        ("pass", "none", None)
    );
    assert!(
        answer.reason.contains("a pod's own loopback"),
        "{}",
        answer.reason
    );
}

#[test]
fn refusals_say_why() {
    let mut maps = contents();
    let unknown = ask(&maps, &host(), "10.96.0.1:81/tcp");
    assert_eq!(unknown.verdict, "refuse");
    assert_eq!(
        unknown.reason,
        "10.96.0.1 is a ClusterIP, but its Service has no port 81/TCP"
    );
    let service = &mut maps.services.get_mut(&3).unwrap().service;
    service.local = SetWord::default();
    let nowhere = ask(&maps, &host(), "10.96.0.1:80/tcp");
    assert_eq!((nowhere.verdict, nowhere.layer), ("refuse", "socket"));
    assert!(
        nowhere.reason.contains("internalTrafficPolicy is Local"),
        "{}",
        nowhere.reason
    );
}

#[test]
fn what_is_left_alone_says_to_whom() {
    let mut maps = contents();
    flag(&mut maps, frontend_flags::ON_LOCAL_LINK);
    let dns = ask(&maps, &host(), "10.96.0.1:80/tcp");
    assert_eq!((dns.verdict, dns.layer), ("pass", "none"));
    assert!(dns.reason.contains("NodeLocal DNSCache") && dns.frontend.is_some());
    flag(&mut maps, frontend_flags::SOURCE_RANGES);
    let ranges = ask(&maps, &host(), "10.96.0.1:80/tcp");
    assert_eq!((ranges.verdict, ranges.layer), ("pass", "packet"));
    assert_eq!(ask(&maps, &host(), "10.96.0.1:80/sctp").layer, "packet");
    let nothing = ask(&maps, &host(), "203.0.113.9:443");
    assert_eq!(nothing.reason, "no Service has this address and port");
}
