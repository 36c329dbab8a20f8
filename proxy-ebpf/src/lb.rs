//! The balancing decision of the socket layer: what a client addresses, and the maps, give a verdict.
//!
//! Runs in the kernel, in unit tests, as the oracle of the tests and in `proxy-agent explain`, each over its own
//! [`Tables`]. Reads no clock and draws no random number: both are arguments.

use crate::abi::{
    Addr, AffinityKey, AffinityValue, Be16, FrontendKey, FrontendValue, Member, MemberWord, Policy,
    Reason, SetWord, Slot, TCP, UDP, frontend_flags, kind, node_address_flags,
};

/// Fresh readings of a set word before giving up.
pub const ATTEMPTS: u32 = 4;

const NS_PER_SECOND: u64 = 1_000_000_000;

/// Read access to the maps, and the affinity entry of one client.
///
/// Words (`FrontendValue`, `SetWord`, `Policy`, `MemberWord`) are read with one load each.
pub trait Tables {
    /// FRONTENDS.
    fn frontend(&self, key: &FrontendKey) -> Option<FrontendValue>;
    /// VIPS: is this the ClusterIP of a Service?
    fn is_cluster_ip(&self, addr: &Addr) -> bool;
    /// LOCAL_ADDRS: [`node_address_flags`], if the address is the node's own.
    fn node_address(&self, addr: &Addr) -> Option<u32>;
    /// SERVICES: one of the two set words.
    fn set(&self, service: u32, scope: Scope) -> Option<SetWord>;
    /// SERVICES: the policy word.
    fn policy(&self, service: u32) -> Option<Policy>;
    /// SLOTS.
    fn slot(&self, index: u32) -> Option<Slot>;
    /// MEMBERS; the word is read before the rest.
    fn member(&self, index: u32) -> Option<Member>;
    /// AFFINITY.
    fn affinity(&self, key: &AffinityKey) -> Option<AffinityValue>;
    /// Writes AFFINITY; best effort.
    fn remember(&self, key: &AffinityKey, value: &AffinityValue);
    /// Counts something that did not end the program.
    fn note(&self, reason: Reason);
}

/// Which backends of a Service.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// Those of the whole cluster.
    Cluster,
    /// Those on this node.
    Local,
}

/// What a client wants, in the terms of the maps.
#[derive(Clone, Copy, Debug)]
pub struct Request {
    /// Destination as the application gave it.
    pub addr: Addr,
    /// Its port.
    pub port: Be16,
    /// IP protocol number.
    pub protocol: u8,
    /// The socket lives in the node's own network namespace.
    pub on_host: bool,
    /// The socket is bound to a loopback address.
    pub from_loopback: bool,
    /// The client's network namespace; the affinity key.
    pub netns_cookie: u64,
    /// CLOCK_MONOTONIC.
    pub now_ns: u64,
    /// Any 32 random bits.
    pub random: u32,
}

/// A frontend that serves a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hit {
    /// Index into SERVICES.
    pub service: u32,
    /// One of [`kind`].
    pub kind: u8,
}

/// The chosen backend.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Backend {
    /// Its address.
    pub addr: Addr,
    /// Its port.
    pub port: Be16,
    /// Index into SERVICES.
    pub service: u32,
    /// Index into MEMBERS.
    pub member: u32,
    /// The member's generation at the choice.
    pub generation: u32,
}

/// What happens to a connection or datagram.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Left as it is.
    Pass(Reason),
    /// ECONNREFUSED.
    Refuse(Reason),
    /// Goes to the backend.
    Translate(Backend),
}

/// Finds the frontend that `request` addresses.
///
/// # Errors
/// The verdict, where none serves it.
#[inline(always)]
pub fn find<T: Tables>(tables: &T, request: &Request) -> Result<Hit, Verdict> {
    if request.protocol != TCP && request.protocol != UDP {
        return Err(Verdict::Pass(Reason::OtherProtocol));
    }
    let value = match find_address(tables, request) {
        Some(value) => value,
        None => find_node_port(tables, request)?,
    };
    if value.flags() & frontend_flags::ON_LOCAL_LINK != 0 {
        return Err(Verdict::Pass(Reason::OnLocalLink));
    }
    if value.flags() & frontend_flags::SOURCE_RANGES != 0 {
        return Err(Verdict::Pass(Reason::SourceRanges));
    }
    // A source of 127/8 cannot reach a backend outside the namespace.
    if request.from_loopback {
        return Err(Verdict::Pass(Reason::ForeignLoopback));
    }
    Ok(Hit {
        service: value.service(),
        kind: value.kind(),
    })
}

/// The service that has a frontend at an address which was translated once: by its own name, or as a node's address.
#[inline(always)]
pub fn service_at<T: Tables>(tables: &T, addr: Addr, port: Be16, protocol: u8) -> Option<u32> {
    let exact = lookup(tables, &FrontendKey::new(addr, port, protocol));
    let value = match exact {
        Some(value) => Some(value),
        None => lookup(
            tables,
            &FrontendKey::new(addr.unspecified(), port, protocol),
        ),
    };
    value.map(FrontendValue::service)
}

#[inline(always)]
fn find_address<T: Tables>(tables: &T, request: &Request) -> Option<FrontendValue> {
    // Node ports are filed under it; to a client it means its own loopback.
    if request.addr.is_unspecified() {
        return None;
    }
    let key = FrontendKey::new(request.addr, request.port, request.protocol);
    lookup(tables, &key)
}

#[inline(always)]
fn find_node_port<T: Tables>(tables: &T, request: &Request) -> Result<FrontendValue, Verdict> {
    if request.addr.is_loopback() || request.addr.is_unspecified() {
        // A pod's own loopback is its own.
        if !request.on_host {
            return Err(Verdict::Pass(Reason::ForeignLoopback));
        }
    } else {
        match tables.node_address(&request.addr) {
            Some(flags) if flags & node_address_flags::NODE_PORTS != 0 => {}
            Some(_) => return Err(Verdict::Pass(Reason::NotAService)),
            None if tables.is_cluster_ip(&request.addr) => {
                return Err(Verdict::Refuse(Reason::UnknownPort));
            }
            None => return Err(Verdict::Pass(Reason::NotAService)),
        }
    }
    let key = FrontendKey::new(request.addr.unspecified(), request.port, request.protocol);
    lookup(tables, &key).ok_or(Verdict::Pass(Reason::NotAService))
}

/// One lookup, repeated once when the element was recycled under us (DESIGN I6).
#[inline(always)]
fn lookup<T: Tables>(tables: &T, key: &FrontendKey) -> Option<FrontendValue> {
    let value = tables.frontend(key)?;
    if value.belongs_to(key) {
        return Some(value);
    }
    tables.note(Reason::Recycled);
    tables.frontend(key).filter(|value| value.belongs_to(key))
}

/// Which set a connection from this node's sockets uses.
///
/// External kinds use the cluster set whatever the external policy says: traffic from the node is "internal", kube-proxy's
/// short-circuit.
#[inline(always)]
pub const fn scope(frontend_kind: u8, policy: Policy) -> Scope {
    if frontend_kind == kind::CLUSTER_IP && policy.flags() & Policy::INTERNAL_LOCAL != 0 {
        Scope::Local
    } else {
        Scope::Cluster
    }
}

/// Chooses the backend for a frontend that was found.
///
/// A service that has none is looked up once more before the client is refused: its frontend may have moved to another
/// service, or its policy to the other set, between our reading of that and of a set that was emptied right after it.
#[inline(always)]
pub fn choose<T: Tables>(tables: &T, hit: Hit, request: &Request) -> Verdict {
    match choose_once(tables, hit, request) {
        Verdict::Refuse(Reason::NoEndpoints) => match find(tables, request) {
            Ok(hit) => choose_once(tables, hit, request),
            Err(verdict) => verdict,
        },
        verdict => verdict,
    }
}

#[inline(always)]
fn choose_once<T: Tables>(tables: &T, hit: Hit, request: &Request) -> Verdict {
    let Some(policy) = tables.policy(hit.service) else {
        return Verdict::Pass(Reason::BrokenMap);
    };
    let scope = scope(hit.kind, policy);
    let seconds = policy.affinity_seconds();
    let key = AffinityKey::from_netns(hit.service, request.netns_cookie);
    let known = match seconds {
        0 => None,
        _ => remembered(tables, &key, scope, seconds, request.now_ns),
    };
    let (backend, slot) = match known {
        Some(found) => {
            tables.note(Reason::AffinityHit);
            found
        }
        None => match pick(tables, hit.service, scope, request.random) {
            Ok(picked) => picked,
            Err(verdict) => return verdict,
        },
    };
    if seconds != 0 {
        let value = AffinityValue {
            last_used_ns: request.now_ns,
            member: backend.member,
            generation: backend.generation,
            slot,
            check: key.check(),
            pad: 0,
            reserved: 0,
        };
        tables.remember(&key, &value);
    }
    Verdict::Translate(backend)
}

/// The backend that this client used last, if it is recent and still in the set.
#[inline(always)]
fn remembered<T: Tables>(
    tables: &T,
    key: &AffinityKey,
    scope: Scope,
    seconds: u32,
    now_ns: u64,
) -> Option<(Backend, u32)> {
    let value = tables.affinity(key)?;
    let age_ns = now_ns.saturating_sub(value.last_used_ns);
    if value.check != key.check() || age_ns > seconds as u64 * NS_PER_SECOND {
        return None;
    }
    let member = tables.member(value.member)?;
    let in_set = match scope {
        Scope::Cluster => MemberWord::IN_CLUSTER,
        Scope::Local => MemberWord::IN_LOCAL,
    };
    if member.service != key.service
        || member.word.generation() != value.generation
        || member.word.bits() & in_set == 0
    {
        return None;
    }
    let backend = Backend {
        addr: member.addr,
        port: member.port,
        service: key.service,
        member: value.member,
        generation: value.generation,
    };
    Some((backend, value.slot))
}

/// Whether a choice of this member made earlier still stands: it still serves, draining included.
#[inline(always)]
pub const fn still_serves(member: &Member, service: u32, generation: u32) -> bool {
    member.service == service
        && member.word.generation() == generation
        && member.word.bits() & MemberWord::SERVING != 0
}

/// One backend of the set at random, and its slot.
#[inline(always)]
fn pick<T: Tables>(
    tables: &T,
    service: u32,
    scope: Scope,
    random: u32,
) -> Result<(Backend, u32), Verdict> {
    for _ in 0..ATTEMPTS {
        let Some(word) = tables.set(service, scope) else {
            return Err(Verdict::Pass(Reason::BrokenMap));
        };
        if word.count() == 0 {
            return Err(Verdict::Refuse(Reason::NoEndpoints));
        }
        let index = word.base() + ((random as u64 * word.count() as u64) >> 32) as u32;
        let Some(slot) = tables.slot(index) else {
            return Err(Verdict::Pass(Reason::BrokenMap));
        };
        if slot.generation == word.generation() {
            let backend = Backend {
                addr: slot.addr,
                port: slot.port,
                service,
                member: slot.member,
                generation: slot.member_generation,
            };
            return Ok((backend, index));
        }
    }
    Err(Verdict::Pass(Reason::Contended))
}

#[cfg(test)]
pub(crate) mod tests;
