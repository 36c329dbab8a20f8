//! The maps as text for people: golden files, failing tests.

use std::{
    fmt::{self, Write},
    net::{IpAddr, SocketAddr},
};

use proxy_ebpf::abi::{
    Addr, Be16, FrontendKey, FrontendValue, MemberWord, Policy, SCTP, Service, SetWord, TCP, UDP,
    frontend_flags, kind, node_address_flags,
};

use super::{observe::order, render::service_port, store::Store};
use crate::backends::Error;

/// What the maps hold, by name instead of by index; equal for maps that balance alike.
///
/// # Errors
/// The kernel could not be read.
pub fn describe(store: &impl Store) -> Result<String, Error> {
    let mut frontends = store.frontends()?;
    frontends.sort_unstable_by_key(|(key, _)| (IpAddr::from(key.addr), key.port.host(), *key));
    let mut services: Vec<_> = (0..store.capacity().services)
        .map(|index| (index, store.service(index)))
        .filter(|(_, service)| service.used != 0)
        .map(|(index, service)| (name(store, index), index, service))
        .collect();
    services.sort_unstable_by(|a, b| (&a.0, a.1).cmp(&(&b.0, b.1)));
    let mut text = String::new();
    for (name, index, service) in &services {
        let _ = write_service(&mut text, store, name, *index, service, &frontends);
    }
    let lost = frontends
        .iter()
        .filter(|(_, value)| !services.iter().any(|(_, at, _)| *at == value.service()));
    for (key, value) in lost {
        let _ = writeln!(text, "stray frontend {}", frontend(key, *value));
    }
    let mut vips: Vec<IpAddr> = store.vips()?.into_iter().map(Addr::into).collect();
    vips.sort_unstable();
    for vip in vips {
        let _ = writeln!(text, "vip {vip}");
    }
    let mut addresses = store.addresses()?;
    addresses.sort_unstable_by_key(|(addr, _)| IpAddr::from(*addr));
    for (addr, flags) in addresses {
        let ports = match flags & node_address_flags::NODE_PORTS {
            0 => "",
            _ => " node-ports",
        };
        let _ = writeln!(text, "address {}{ports}", IpAddr::from(addr));
    }
    Ok(text)
}

fn name(store: &impl Store, index: u32) -> String {
    match service_port(&store.name(index)) {
        Some(port) => format!("{port}/{} {}", port.protocol, port.family),
        None => "(no name)".to_owned(),
    }
}

fn write_service(
    text: &mut String,
    store: &impl Store,
    name: &str,
    index: u32,
    service: &Service,
    frontends: &[(FrontendKey, FrontendValue)],
) -> fmt::Result {
    write!(text, "service {name}")?;
    if service.policy.affinity_seconds() > 0 {
        write!(text, " affinity={}s", service.policy.affinity_seconds())?;
    }
    for (flag, label) in [
        (Policy::INTERNAL_LOCAL, " internal=Local"),
        (Policy::EXTERNAL_LOCAL, " external=Local"),
    ] {
        if service.policy.flags() & flag != 0 {
            text.write_str(label)?;
        }
    }
    writeln!(text)?;
    for (key, value) in frontends.iter().filter(|(_, v)| v.service() == index) {
        writeln!(text, "  frontend {}", frontend(key, *value))?;
    }
    let mut members: Vec<_> = (0..store.capacity().members)
        .map(|at| store.member(at))
        .filter(|member| member.word.bits() != 0 && member.service == index)
        .collect();
    members.sort_unstable_by_key(order);
    for member in members {
        write!(text, "  member {}", endpoint(member.addr, member.port))?;
        for (bit, label) in [
            (MemberWord::TERMINATING, " terminating"),
            (MemberWord::ON_THIS_NODE, " here"),
            (MemberWord::IN_CLUSTER, " cluster"),
            (MemberWord::IN_LOCAL, " local"),
        ] {
            if member.word.bits() & bit != 0 {
                text.write_str(label)?;
            }
        }
        writeln!(text)?;
    }
    write_set(text, store, "cluster", service.cluster)?;
    write_set(text, store, "local", service.local)
}

fn write_set(text: &mut String, store: &impl Store, label: &str, word: SetWord) -> fmt::Result {
    write!(text, "  {label} set")?;
    let slots = (word.base()..).take(word.count() as usize);
    for at in slots.take_while(|at| *at < store.capacity().slots) {
        let slot = store.slot(at);
        write!(text, " {}", endpoint(slot.addr, slot.port))?;
        if slot.generation != word.generation() {
            text.write_str(" (of another generation)")?;
        }
    }
    writeln!(text)
}

fn frontend(key: &FrontendKey, value: FrontendValue) -> String {
    let protocol = match key.protocol {
        TCP => "TCP".to_owned(),
        UDP => "UDP".to_owned(),
        SCTP => "SCTP".to_owned(),
        other => other.to_string(),
    };
    let kind = match value.kind() {
        kind::CLUSTER_IP => "cluster-ip",
        kind::NODE_PORT => "node-port",
        kind::LOAD_BALANCER => "load-balancer",
        kind::EXTERNAL_IP => "external-ip",
        _ => "of unknown kind",
    };
    let mut text = format!("{}/{protocol} {kind}", endpoint(key.addr, key.port));
    for (flag, label) in [
        (frontend_flags::SOURCE_RANGES, " source-ranges"),
        (frontend_flags::ON_LOCAL_LINK, " on-local-link"),
    ] {
        if value.flags() & flag != 0 {
            text.push_str(label);
        }
    }
    text
}

fn endpoint(addr: Addr, port: Be16) -> SocketAddr {
    SocketAddr::new(addr.into(), port.host())
}
