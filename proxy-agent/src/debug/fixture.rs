//! Maps' contents for tests: one Service with two backends, one of them draining, and affinity.

use std::net::IpAddr;

use proxy_ebpf::abi::{
    ABI_VERSION, Addr, AffinityKey, AffinityValue, Be16, FrontendKey, FrontendValue, Member,
    MemberWord, Meta, NAME_LEN, Name, Policy, Service, SetWord, Slot, Stats, TCP, kind, meta_flags,
    node_address_flags,
};

use super::contents::{Contents, Entry};

/// CLOCK_MONOTONIC of the tests.
pub const NOW_NS: u64 = 100_000_000_000;
/// The node's network namespace.
pub const NODE: u64 = 1;
/// A pod's.
pub const POD: u64 = 0x1_0000_0002;

pub fn addr(text: &str) -> Addr {
    text.parse::<IpAddr>().unwrap().into()
}

/// ClusterIP 10.96.0.1:80 and node port 30080 of "default/web:http" lead to 10.244.0.2:8080 (here) and 10.244.1.2:8080
/// (terminating). The pod has used the second one.
pub fn contents() -> Contents {
    let policy = Policy::new(Policy::INTERNAL_LOCAL, 60);
    let slot = |at: &str, member| Slot {
        addr: addr(at),
        port: Be16::new(8080),
        member,
        generation: 5,
        member_generation: 9,
        ..Slot::default()
    };
    let member = |at: &str, bits| Member {
        word: MemberWord::new(9, bits | MemberWord::SERVING | MemberWord::IN_CLUSTER),
        service: 3,
        port: Be16::new(8080),
        addr: addr(at),
        ..Member::default()
    };
    let (here, there) = ("10.244.0.2", "10.244.1.2");
    let service = Service {
        cluster: SetWord::new(10, 2, 5),
        local: SetWord::new(12, 1, 5),
        policy,
        used: 1,
        ..Service::default()
    };
    let frontend = |at: &str, port, kind| {
        let key = FrontendKey::new(addr(at), Be16::new(port), TCP);
        (key, FrontendValue::new(&key, 3, kind, 0))
    };
    let affinity_key = AffinityKey::from_netns(3, POD);
    let affinity = AffinityValue {
        last_used_ns: NOW_NS - 20_000_000_000,
        member: 1,
        generation: 9,
        check: affinity_key.check(),
        ..AffinityValue::default()
    };
    Contents {
        meta: meta(),
        frontends: [
            frontend("10.96.0.1", 80, kind::CLUSTER_IP),
            frontend("0.0.0.0", 30080, kind::NODE_PORT),
        ]
        .into(),
        vips: [addr("10.96.0.1")].into(),
        addresses: [(addr("192.0.2.1"), node_address_flags::NODE_PORTS)].into(),
        services: [(
            3,
            Entry {
                service,
                name: name("default/web:http"),
                stats: Stats::default(),
            },
        )]
        .into(),
        slots: [
            (10, slot(here, 0)),
            (11, slot(there, 1)),
            (12, slot(here, 0)),
        ]
        .into(),
        members: [
            (
                0,
                member(here, MemberWord::ON_THIS_NODE | MemberWord::IN_LOCAL),
            ),
            (1, member(there, MemberWord::TERMINATING)),
        ]
        .into(),
        affinity: [(affinity_key, affinity)].into(),
        sockets: Vec::new(),
        peers: Vec::new(),
        reasons: Vec::new(),
        maps: Vec::new(),
    }
}

fn name(text: &str) -> Name {
    let mut name = Name {
        len: text.len() as u8,
        protocol: TCP,
        family: 4,
        pad: 0,
        text: [0; NAME_LEN],
    };
    name.text[..text.len()].copy_from_slice(text.as_bytes());
    name
}

fn meta() -> Meta {
    let mut node = [0; 64];
    node[..6].copy_from_slice(b"node-a");
    Meta {
        abi_version: ABI_VERSION,
        flags: meta_flags::COMPLETE,
        netns_cookie: NODE,
        heartbeat_ns: NOW_NS - 2_000_000_000,
        lease_ns: 0,
        generation: 1,
        node,
        programs: 0,
        reserved: [0; 18],
    }
}
