//! The tables of `dump`, made from the maps' contents.

use std::{collections::HashMap, net::IpAddr};

use proxy_ebpf::abi::{
    FrontendKey, FrontendValue, Member, MemberWord, Policy, SCTP, SetWord, Slot, TCP, UDP, kind,
};
use serde::Serialize;

use super::{
    contents::{Contents, Entry},
    print::{Report, columns},
};
use crate::{
    daemon::self_test::is_canary,
    state::{Family, FrontendKind, Protocol, TrafficPolicy},
};

mod live;

pub use live::{affinity, maps, sockets, status};

/// One service port of one family.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ServiceRow {
    /// "namespace/name:port".
    pub service: String,
    /// "IPv4" or "IPv6".
    pub family: String,
    /// "TCP", "UDP" or "SCTP".
    pub protocol: String,
    /// What clients address.
    pub frontends: Vec<FrontendRow>,
    /// The set of the whole cluster.
    pub backends: Vec<BackendRow>,
    /// The set of this node.
    pub local_backends: Vec<BackendRow>,
    /// ClientIP affinity.
    pub session_affinity_seconds: Option<u32>,
    /// "Cluster" or "Local".
    pub internal_traffic_policy: String,
    /// "Cluster" or "Local".
    pub external_traffic_policy: String,
}

/// A frontend.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct FrontendRow {
    /// The VIP; `0.0.0.0` or `::` of a node port.
    pub address: IpAddr,
    /// Its port.
    pub port: u16,
    /// "cluster-ip", "node-port", "load-balancer" or "external-ip".
    pub kind: String,
}

/// A backend.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct BackendRow {
    /// The endpoint's address.
    pub address: IpAddr,
    /// Its port.
    pub port: u16,
    /// On this node.
    pub local: bool,
    /// "ready" or "terminating".
    pub state: &'static str,
}

/// `dump services`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct Services(pub Vec<ServiceRow>);

/// What the maps say of each service port, by name.
pub fn services(contents: &Contents) -> Services {
    let mut frontends: HashMap<u32, Vec<FrontendRow>> = HashMap::new();
    for (key, value) in &contents.frontends {
        frontends
            .entry(value.service())
            .or_default()
            .push(frontend_row(key, *value));
    }
    let mut rows: Vec<_> = contents
        .services
        .iter()
        .filter(|(_, entry)| !is_canary(&entry.text()))
        .map(|(index, entry)| {
            let mut frontends = frontends.remove(index).unwrap_or_default();
            frontends.sort();
            service_row(contents, entry, frontends)
        })
        .collect();
    rows.sort_by(|a, b| {
        (&a.service, &a.protocol, &a.family).cmp(&(&b.service, &b.protocol, &b.family))
    });
    Services(rows)
}

fn service_row(contents: &Contents, entry: &Entry, frontends: Vec<FrontendRow>) -> ServiceRow {
    let policy = entry.service.policy;
    let traffic = |bit| match policy.flags() & bit {
        0 => TrafficPolicy::Cluster.to_string(),
        _ => TrafficPolicy::Local.to_string(),
    };
    let seconds = policy.affinity_seconds();
    ServiceRow {
        service: entry.text(),
        family: family(entry),
        protocol: protocol(entry.name.protocol),
        frontends,
        backends: backends_of(contents, entry.service.cluster),
        local_backends: backends_of(contents, entry.service.local),
        session_affinity_seconds: (seconds > 0).then_some(seconds),
        internal_traffic_policy: traffic(Policy::INTERNAL_LOCAL),
        external_traffic_policy: traffic(Policy::EXTERNAL_LOCAL),
    }
}

/// The backends of a set, sorted.
pub fn backends_of(contents: &Contents, word: SetWord) -> Vec<BackendRow> {
    let row = |slot: &Slot| {
        backend_row(
            slot.addr.into(),
            slot.port.host(),
            contents.member_bits(slot),
        )
    };
    let mut rows: Vec<_> = contents.set_slots(word).map(row).collect();
    rows.sort();
    rows
}

fn frontend_row(key: &FrontendKey, value: FrontendValue) -> FrontendRow {
    FrontendRow {
        address: key.addr.into(),
        port: key.port.host(),
        kind: kind_name(value.kind()),
    }
}

pub(super) fn backend_row(address: IpAddr, port: u16, bits: u32) -> BackendRow {
    let state = if bits & MemberWord::TERMINATING == 0 {
        "ready"
    } else {
        "terminating"
    };
    BackendRow {
        address,
        port,
        local: bits & MemberWord::ON_THIS_NODE != 0,
        state,
    }
}

/// Name of a [`kind`].
pub fn kind_name(value: u8) -> String {
    match value {
        kind::CLUSTER_IP => FrontendKind::ClusterIp.to_string(),
        kind::NODE_PORT => FrontendKind::NodePort.to_string(),
        kind::LOAD_BALANCER => FrontendKind::LoadBalancer.to_string(),
        kind::EXTERNAL_IP => FrontendKind::ExternalIp.to_string(),
        other => format!("unknown ({other})"),
    }
}

/// Name of an IP protocol.
pub fn protocol(number: u8) -> String {
    match number {
        TCP => Protocol::Tcp.to_string(),
        UDP => Protocol::Udp.to_string(),
        SCTP => Protocol::Sctp.to_string(),
        other => other.to_string(),
    }
}

fn family(entry: &Entry) -> String {
    if entry.name.family == 6 {
        Family::V6
    } else {
        Family::V4
    }
    .to_string()
}

impl Report for Services {
    fn table(&self) -> String {
        let lines = |items: Vec<String>| {
            if items.is_empty() {
                "-".to_owned()
            } else {
                items.join(",")
            }
        };
        let rows: Vec<_> = self
            .0
            .iter()
            .map(|row| {
                let frontend =
                    |f: &FrontendRow| format!("{}({})", socket(f.address, f.port), f.kind);
                let affinity = row.session_affinity_seconds;
                [
                    row.service.clone(),
                    row.protocol.clone(),
                    row.family.clone(),
                    lines(row.frontends.iter().map(frontend).collect()),
                    lines(row.backends.iter().map(BackendRow::to_string).collect()),
                    affinity.map_or_else(|| "-".to_owned(), |seconds| format!("{seconds}s")),
                    format!(
                        "{}/{}",
                        row.internal_traffic_policy, row.external_traffic_policy
                    ),
                ]
            })
            .collect();
        let headings = [
            "SERVICE",
            "PROTO",
            "FAMILY",
            "FRONTENDS",
            "BACKENDS",
            "AFFINITY",
            "INTERNAL/EXTERNAL",
        ];
        columns(headings, &rows)
    }
}

impl std::fmt::Display for BackendRow {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&socket(self.address, self.port))?;
        if self.local {
            f.write_str("(local)")?;
        }
        if self.state != "ready" {
            write!(f, "({})", self.state)?;
        }
        Ok(())
    }
}

/// "address:port", IPv6 in brackets.
pub fn socket(address: IpAddr, port: u16) -> String {
    std::net::SocketAddr::new(address, port).to_string()
}

/// One endpoint of one service port.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct MemberRow {
    service: String,
    family: String,
    protocol: String,
    address: IpAddr,
    port: u16,
    local: bool,
    state: &'static str,
    /// In the set that reaches the whole cluster; in neither set it drains.
    in_cluster_set: bool,
    in_local_set: bool,
}

/// `dump backends`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct Backends(pub Vec<MemberRow>);

/// Every member that serves.
pub fn backends(contents: &Contents) -> Backends {
    let row = |member: &Member| {
        let entry = contents.services.get(&member.service)?;
        if is_canary(&entry.text()) {
            return None;
        }
        let bits = member.word.bits();
        let BackendRow {
            address,
            port,
            local,
            state,
        } = backend_row(member.addr.into(), member.port.host(), bits);
        Some(MemberRow {
            service: entry.text(),
            family: family(entry),
            protocol: protocol(entry.name.protocol),
            address,
            port,
            local,
            state,
            in_cluster_set: bits & MemberWord::IN_CLUSTER != 0,
            in_local_set: bits & MemberWord::IN_LOCAL != 0,
        })
    };
    let mut rows: Vec<_> = contents.members.values().filter_map(row).collect();
    rows.sort();
    Backends(rows)
}

impl Report for Backends {
    fn table(&self) -> String {
        let rows: Vec<_> = self
            .0
            .iter()
            .map(|row| {
                let sets = match (row.in_cluster_set, row.in_local_set) {
                    (true, true) => "cluster,local",
                    (true, false) => "cluster",
                    (false, true) => "local",
                    (false, false) => "draining",
                };
                let place = if row.local { "this node" } else { "elsewhere" };
                [
                    row.service.clone(),
                    row.protocol.clone(),
                    socket(row.address, row.port),
                    row.state.to_owned(),
                    place.to_owned(),
                    sets.to_owned(),
                ]
            })
            .collect();
        columns(
            ["SERVICE", "PROTO", "BACKEND", "STATE", "WHERE", "SETS"],
            &rows,
        )
    }
}

#[cfg(test)]
mod tests;
