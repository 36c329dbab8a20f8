//! How a desired state looks in the maps' own terms, and the digest that stands for it. Pure.
//!
//! The digest of a service port is computed here from its [`ServiceState`] and in `observe` from the maps: equal digests
//! mean that nothing has to be written.

use std::{
    hash::{DefaultHasher, Hash, Hasher},
    sync::Arc,
};

use proxy_ebpf::abi::{
    Addr, Be16, FrontendKey, FrontendValue, MemberWord, NAME_LEN, Name, Policy, SCTP, TCP, UDP,
    frontend_flags, kind, node_address_flags,
};

use crate::state::{
    BackendState, Family, Frontend, FrontendKind, NodeAddress, Protocol, ServiceName, ServicePort,
    ServiceState, TrafficPolicy,
};

/// The API's limit of `sessionAffinityConfig.clientIP.timeoutSeconds`.
const MAX_AFFINITY_SECONDS: u32 = 86_400;

/// A frontend in the maps' terms, without the index of its service.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MapFrontend {
    /// What clients address.
    pub key: FrontendKey,
    /// One of [`kind`].
    pub kind: u8,
    /// Bits of [`frontend_flags`].
    pub flags: u8,
}

impl MapFrontend {
    /// The value that leads to the service at `index`.
    pub fn value(&self, index: u32) -> FrontendValue {
        FrontendValue::new(&self.key, index, self.kind, self.flags)
    }
}

/// The frontends of a service port, one per key: an address that is both a load balancer's and an external one counts as
/// the first of the two.
pub fn frontends(state: &ServiceState) -> Vec<MapFrontend> {
    let mut found: Vec<_> = state
        .frontends
        .iter()
        .map(|frontend| map_frontend(state, frontend))
        .collect();
    found.sort_by_key(|frontend| (frontend.key, frontend.kind));
    found.dedup_by_key(|frontend| frontend.key);
    found
}

fn map_frontend(state: &ServiceState, frontend: &Frontend) -> MapFrontend {
    let mut flags = 0;
    if frontend.kind == FrontendKind::LoadBalancer && !state.source_ranges.is_empty() {
        flags |= frontend_flags::SOURCE_RANGES;
    }
    if frontend.on_local_link {
        flags |= frontend_flags::ON_LOCAL_LINK;
    }
    MapFrontend {
        key: FrontendKey::new(
            frontend.address.into(),
            Be16::new(frontend.port),
            protocol_number(state.key.protocol),
        ),
        kind: match frontend.kind {
            FrontendKind::ClusterIp => kind::CLUSTER_IP,
            FrontendKind::NodePort => kind::NODE_PORT,
            FrontendKind::LoadBalancer => kind::LOAD_BALANCER,
            FrontendKind::ExternalIp => kind::EXTERNAL_IP,
        },
        flags,
    }
}

/// The policy word of a service port.
pub fn policy(state: &ServiceState) -> Policy {
    let mut flags = 0;
    if state.internal_policy == TrafficPolicy::Local {
        flags |= Policy::INTERNAL_LOCAL;
    }
    if state.external_policy == TrafficPolicy::Local {
        flags |= Policy::EXTERNAL_LOCAL;
    }
    let seconds = state.affinity_seconds.unwrap_or(0);
    Policy::new(flags, seconds.min(MAX_AFFINITY_SECONDS))
}

/// The state bits of a member.
pub fn member_bits(state: BackendState) -> u32 {
    let BackendState {
        terminating,
        on_this_node,
        in_cluster,
        in_local,
    } = state;
    let bit = |set: bool, bit: u32| if set { bit } else { 0 };
    MemberWord::SERVING
        | bit(terminating, MemberWord::TERMINATING)
        | bit(on_this_node, MemberWord::ON_THIS_NODE)
        | bit(in_cluster, MemberWord::IN_CLUSTER)
        | bit(in_local, MemberWord::IN_LOCAL)
}

/// The value of LOCAL_ADDRS.
pub fn address_flags(address: NodeAddress) -> u32 {
    let NodeAddress { node_ports } = address;
    if node_ports {
        node_address_flags::NODE_PORTS
    } else {
        0
    }
}

/// IP protocol number.
pub fn protocol_number(protocol: Protocol) -> u8 {
    match protocol {
        Protocol::Tcp => TCP,
        Protocol::Udp => UDP,
        Protocol::Sctp => SCTP,
    }
}

/// A free entry of NAMES.
pub const NO_NAME: Name = Name {
    len: 0,
    protocol: 0,
    family: 0,
    pad: 0,
    text: [0; NAME_LEN],
};

/// The entry of NAMES for a service port; `None` where it could not be read back: longer than the API allows, or with
/// separators inside a name. The model refuses such objects.
pub fn name(key: &ServicePort) -> Option<Name> {
    let text = key.to_string();
    if text.len() > NAME_LEN {
        return None;
    }
    let mut name = Name {
        len: u8::try_from(text.len()).ok()?,
        protocol: protocol_number(key.protocol),
        family: match key.family {
            Family::V4 => 4,
            Family::V6 => 6,
        },
        ..NO_NAME
    };
    name.text[..text.len()].copy_from_slice(text.as_bytes());
    (service_port(&name).as_ref() == Some(key)).then_some(name)
}

/// The service port that an entry of NAMES is about; `None` where it holds no such name.
pub fn service_port(name: &Name) -> Option<ServicePort> {
    let text = std::str::from_utf8(name.text.get(..usize::from(name.len))?).ok()?;
    let (service, port) = text.split_once(':').unwrap_or((text, ""));
    let (namespace, service) = service.split_once('/')?;
    if namespace.is_empty() || service.is_empty() || service.contains('/') {
        return None;
    }
    Some(ServicePort {
        service: ServiceName::new(namespace, service),
        port: Arc::from(port),
        protocol: match name.protocol {
            TCP => Protocol::Tcp,
            UDP => Protocol::Udp,
            SCTP => Protocol::Sctp,
            _ => return None,
        },
        family: match name.family {
            4 => Family::V4,
            6 => Family::V6,
            _ => return None,
        },
    })
}

/// What a service port's entries amount to, in whatever order they are told.
///
/// A sum of hashes with fixed keys: the maps keep members in another order than the state, and nobody chooses Services in
/// order to collide with his own.
#[derive(Clone, Copy, Debug)]
pub struct Digest(u64);

impl Digest {
    /// Nothing but a policy.
    pub fn new(policy: Policy) -> Self {
        Self(hash(&(0_u8, policy.0)))
    }

    /// Counts a frontend in.
    pub fn frontend(&mut self, frontend: &MapFrontend) {
        let MapFrontend { key, kind, flags } = frontend;
        self.add(hash(&(1_u8, key, kind, flags)));
    }

    /// Counts a member in.
    pub fn member(&mut self, addr: &Addr, port: Be16, bits: u32) {
        self.add(hash(&(2_u8, bits, port, addr.0)));
    }

    /// Makes this differ from the digest of every state: the entries contradict each other and have to be written anew.
    pub fn broken(&mut self) {
        self.add(hash(&3_u8));
    }

    /// The digest.
    pub fn finish(self) -> u64 {
        self.0
    }

    fn add(&mut self, part: u64) {
        self.0 = self.0.wrapping_add(part);
    }
}

fn hash(value: &impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    value.hash(&mut hasher);
    hasher.finish()
}

/// The digest of a desired service port.
pub fn digest(state: &ServiceState) -> u64 {
    let mut digest = Digest::new(policy(state));
    for frontend in frontends(state) {
        digest.frontend(&frontend);
    }
    for backend in &state.backends {
        digest.member(
            &backend.address.into(),
            Be16::new(backend.port),
            member_bits(backend.state),
        );
    }
    digest.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(service: ServiceName, port: &str) -> ServicePort {
        ServicePort {
            service,
            port: port.into(),
            protocol: Protocol::Udp,
            family: Family::V6,
        }
    }

    #[test]
    fn names_survive_the_way_into_the_map_and_back() {
        for port in ["", "dns"] {
            let key = key(ServiceName::new("kube-system", "kube-dns"), port);
            assert_eq!(service_port(&name(&key).unwrap()), Some(key));
        }
    }

    #[test]
    fn names_that_could_not_be_read_back_are_not_written() {
        for (namespace, service, port) in [
            ("a", "b:c", ""),
            ("a", "b/c", ""),
            ("", "b", ""),
            ("a", &"x".repeat(NAME_LEN), ""),
        ] {
            assert_eq!(name(&key(ServiceName::new(namespace, service), port)), None);
        }
    }

    #[test]
    fn garbage_in_the_map_is_no_name() {
        let mut name = name(&key(ServiceName::new("a", "b"), "c")).unwrap();
        for (len, protocol, family) in [(255, 17, 6), (0, 17, 6), (5, 1, 6), (5, 17, 0)] {
            (name.len, name.protocol, name.family) = (len, protocol, family);
            assert_eq!(service_port(&name), None);
        }
        (name.len, name.protocol, name.family) = (5, 17, 6);
        name.text[0] = 0xff;
        assert_eq!(service_port(&name), None);
    }
}
