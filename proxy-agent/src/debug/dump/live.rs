//! What clients and programs left in the maps: affinity, sockets, counters; and the maps themselves.

use std::collections::BTreeMap;

use proxy_ebpf::abi::{
    AffinityKey, AffinityValue, Peer, PeerKey, SocketRecord, meta_flags, peer_flags,
};
use serde::Serialize;

use super::{protocol, socket};
use crate::debug::{
    contents::{Contents, MapUse},
    print::{Report, columns},
};

const NS_PER_SECOND: u64 = 1_000_000_000;

/// A client and its backend.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct AffinityRow {
    service: String,
    /// Cookie of the client's network namespace.
    client_netns: u64,
    /// "address:port"; null when that endpoint is gone.
    backend: Option<String>,
    age_seconds: u64,
    timeout_seconds: u32,
}

/// `dump affinity`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct Affinities(pub Vec<AffinityRow>);

/// Which client stays with which backend. `now_ns` is CLOCK_MONOTONIC.
pub fn affinity(contents: &Contents, now_ns: u64) -> Affinities {
    let row = |(key, value): (&AffinityKey, &AffinityValue)| {
        let [low, high, _, _] = key.client.0;
        let member = contents.member_at(value.member, value.generation);
        let member = member.filter(|member| member.service == key.service);
        let entry = contents.services.get(&key.service);
        AffinityRow {
            service: contents.service_name(key.service),
            client_netns: u64::from(high) << 32 | u64::from(low),
            backend: member.map(|member| socket(member.addr.into(), member.port.host())),
            age_seconds: now_ns.saturating_sub(value.last_used_ns) / NS_PER_SECOND,
            timeout_seconds: entry.map_or(0, |entry| entry.service.policy.affinity_seconds()),
        }
    };
    let mut rows: Vec<_> = contents.affinity.iter().map(row).collect();
    rows.sort();
    Affinities(rows)
}

impl Report for Affinities {
    fn table(&self) -> String {
        let rows: Vec<_> = self
            .0
            .iter()
            .map(|row| {
                [
                    row.service.clone(),
                    row.client_netns.to_string(),
                    row.backend.clone().unwrap_or_else(|| "gone".to_owned()),
                    format!("{}s of {}s", row.age_seconds, row.timeout_seconds),
                ]
            })
            .collect();
        columns(["SERVICE", "CLIENT NETNS", "BACKEND", "IDLE"], &rows)
    }
}

/// One translation of a socket.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct SocketRow {
    service: String,
    protocol: String,
    vip: String,
    backend: String,
    /// Made by connect(); otherwise by a datagram.
    connected: bool,
    /// The backend still serves.
    serving: bool,
    /// Cookie of the socket's network namespace; null for what does not fit into the socket's own storage.
    netns: Option<u64>,
    /// The socket's own cookie, as `ss -e` shows it.
    cookie: u64,
    idle_seconds: u64,
}

/// `dump sockets`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct Sockets(pub Vec<SocketRow>);

/// What sockets were translated from. `now_ns` is CLOCK_MONOTONIC.
pub fn sockets(contents: &Contents, now_ns: u64) -> Sockets {
    let row = |cookie: u64, netns: Option<u64>, peer: &Peer| SocketRow {
        service: contents.service_name(peer.service),
        protocol: protocol(peer.protocol as u8),
        vip: socket(peer.vip.into(), peer.vip_port.host()),
        backend: socket(peer.backend.into(), peer.backend_port.host()),
        connected: peer.flags & peer_flags::CONNECTED != 0,
        serving: contents
            .member_at(peer.member, peer.generation)
            .is_some_and(|member| member.service == peer.service),
        netns,
        cookie,
        idle_seconds: now_ns.saturating_sub(peer.last_used_ns) / NS_PER_SECOND,
    };
    let mut rows = Vec::new();
    for SocketRecord { cookie, socket } in &contents.sockets {
        let used = socket
            .peers
            .iter()
            .filter(|peer| peer.flags & peer_flags::USED != 0);
        rows.extend(used.map(|peer| row(*cookie, Some(socket.netns_cookie), peer)));
    }
    // Each overflow entry is there twice: by VIP and by backend.
    let overflow = contents
        .peers
        .iter()
        .filter(|(key, _)| key.by == PeerKey::BY_VIP);
    rows.extend(overflow.map(|(key, peer)| row(key.cookie, None, peer)));
    rows.sort();
    Sockets(rows)
}

impl Report for Sockets {
    fn table(&self) -> String {
        let rows: Vec<_> = self
            .0
            .iter()
            .map(|row| {
                [
                    row.service.clone(),
                    row.protocol.clone(),
                    row.vip.clone(),
                    row.backend.clone(),
                    if row.connected {
                        "connected"
                    } else {
                        "datagrams"
                    }
                    .to_owned(),
                    if row.serving { "serving" } else { "gone" }.to_owned(),
                    row.netns
                        .map_or_else(|| "?".to_owned(), |cookie| cookie.to_string()),
                    format!("{}s", row.idle_seconds),
                ]
            })
            .collect();
        let headings = [
            "SERVICE", "PROTO", "VIP", "BACKEND", "BY", "STATE", "NETNS", "IDLE",
        ];
        columns(headings, &rows)
    }
}

/// `dump maps`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct Maps(pub Vec<MapRow>);

/// A map.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct MapRow {
    map: String,
    /// Null where that cannot be told.
    entries: Option<u64>,
    capacity: u64,
    /// Kernel memory.
    bytes: u64,
}

/// Use and capacity of each map.
pub fn maps(contents: &Contents) -> Maps {
    let row = |used: &MapUse| MapRow {
        map: used.map.clone(),
        entries: used.entries,
        capacity: used.capacity,
        bytes: used.bytes,
    };
    Maps(contents.maps.iter().map(row).collect())
}

impl Report for Maps {
    fn table(&self) -> String {
        let row = |row: &MapRow| {
            let entries = row
                .entries
                .map_or_else(|| "?".to_owned(), |count| count.to_string());
            [
                row.map.clone(),
                entries,
                row.capacity.to_string(),
                row.bytes.to_string(),
            ]
        };
        let rows: Vec<_> = self.0.iter().map(row).collect();
        columns(["MAP", "ENTRIES", "CAPACITY", "BYTES"], &rows)
    }
}

/// `dump status`.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Status {
    /// Version of the maps' layout.
    pub abi_version: u32,
    /// Counts generation swaps.
    pub generation: u64,
    /// Name of the node.
    pub node: String,
    /// The maps hold a complete state and serve.
    pub complete: bool,
    /// Seconds since an agent vouched for the maps; null if none ever did.
    pub heartbeat_age_seconds: Option<u64>,
    /// Age of the heartbeat at which translating stops; null = never.
    pub lease_seconds: Option<u64>,
    /// Attached hooks, and the id of the program on each.
    pub hooks: BTreeMap<&'static str, u32>,
    /// What the programs have counted.
    pub counters: BTreeMap<&'static str, u64>,
}

/// Version, node, heartbeat, counters. `now_ns` is CLOCK_MONOTONIC.
pub fn status(contents: &Contents, hooks: BTreeMap<&'static str, u32>, now_ns: u64) -> Status {
    let meta = contents.meta;
    let end = meta
        .node
        .iter()
        .position(|byte| *byte == 0)
        .unwrap_or(meta.node.len());
    let seconds = |ns: u64| (ns > 0).then_some(ns / NS_PER_SECOND);
    let beat = meta.heartbeat_ns;
    Status {
        abi_version: meta.abi_version,
        generation: meta.generation,
        node: String::from_utf8_lossy(&meta.node[..end]).into_owned(),
        complete: meta.flags & meta_flags::COMPLETE != 0,
        heartbeat_age_seconds: (beat > 0).then(|| now_ns.saturating_sub(beat) / NS_PER_SECOND),
        lease_seconds: seconds(meta.lease_ns),
        hooks,
        counters: contents
            .reasons
            .iter()
            .map(|(reason, count)| (reason.name(), *count))
            .collect(),
    }
}

impl Report for Status {
    fn table(&self) -> String {
        let or_never = |seconds: Option<u64>| {
            seconds.map_or_else(|| "never".to_owned(), |seconds| format!("{seconds}s"))
        };
        let mut rows = vec![
            ["node".to_owned(), self.node.clone()],
            ["abi version".to_owned(), self.abi_version.to_string()],
            ["generation".to_owned(), self.generation.to_string()],
            ["complete".to_owned(), self.complete.to_string()],
            [
                "last heartbeat".to_owned(),
                or_never(self.heartbeat_age_seconds),
            ],
            ["lease ends after".to_owned(), or_never(self.lease_seconds)],
        ];
        for (hook, program) in &self.hooks {
            rows.push([format!("hook {hook}"), format!("program {program}")]);
        }
        let counted = self.counters.iter().filter(|(_, count)| **count > 0);
        rows.extend(counted.map(|(name, count)| [format!("count {name}"), count.to_string()]));
        columns(["WHAT", "VALUE"], &rows)
    }
}
