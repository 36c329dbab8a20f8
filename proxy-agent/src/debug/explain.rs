//! Where a connection would go and why: the decision that the kernel takes, taken over the same maps.

use std::net::IpAddr;

use proxy_ebpf::{
    abi::{
        Addr, AffinityKey, AffinityValue, Be16, FrontendKey, FrontendValue, Policy, Reason, SCTP,
        TCP, UDP, node_address_flags,
    },
    lb::{self, Backend, Hit, Request, Scope, Tables, Verdict},
};
use serde::Serialize;

use super::{
    client::Client,
    contents::slots,
    dump::{BackendRow, backend_row, kind_name, protocol, socket},
    packets::Followed,
    print::Report,
};
use crate::{cli::Destination, state::Protocol};

const NS_PER_SECOND: u64 = 1_000_000_000;

/// The answer of `explain`.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Explanation {
    /// What is addressed; null when it is nothing of a Service.
    pub frontend: Option<Found>,
    /// Who decides: "socket", "packet" or "none".
    pub layer: &'static str,
    /// Traffic policy in force: "Cluster" or "Local".
    pub policy: Option<&'static str>,
    /// Backends that the policy leaves.
    pub candidates: Vec<BackendRow>,
    /// The Service's session affinity and what it says of this client.
    pub affinity: Option<Affinity>,
    /// "translate", "refuse" or "pass"; of rules also "drop", and "mixed" when chance decides between these.
    pub verdict: &'static str,
    /// Why, in a sentence.
    pub reason: String,
    /// What the rules make of its packets; null unless they decide.
    pub packet: Option<Followed>,
}

impl Explanation {
    /// A connection that the socket layer leaves to the packet layer.
    pub fn left(reason: impl Into<String>) -> Self {
        Self {
            frontend: None,
            layer: "packet",
            policy: None,
            candidates: Vec::new(),
            affinity: None,
            verdict: "pass",
            reason: reason.into(),
            packet: None,
        }
    }

    /// Adds to the reason.
    #[must_use]
    pub fn but(mut self, what: &str) -> Self {
        self.reason.push_str("; ");
        self.reason.push_str(what);
        self
    }

    /// Adds what the rules make of it.
    #[must_use]
    pub fn with(mut self, followed: Followed) -> Self {
        self.verdict = followed.verdict();
        self = self.but(&followed.reason());
        self.frontend = self.frontend.or_else(|| followed.frontend.clone());
        self.packet = Some(followed);
        self
    }
}

/// A frontend that was found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Found {
    /// "namespace/name:port".
    pub service: String,
    /// Unspecified for a node port.
    pub address: IpAddr,
    /// Its port.
    pub port: u16,
    /// "TCP", "UDP" or "SCTP".
    pub protocol: String,
    /// As in [`super::dump::FrontendRow`].
    pub kind: String,
}

/// Session affinity of a client.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Affinity {
    seconds: u32,
    /// Cookie of the client's network namespace.
    client_netns: Option<u64>,
    /// Where this client stays; null when it may go anywhere.
    backend: Option<String>,
    /// Since its last connection.
    age_seconds: Option<u64>,
}

/// What the kernel would do with a connection of `client` at `now_ns` (CLOCK_MONOTONIC), and why. `service_name` names an
/// index of SERVICES.
pub fn explain<T: Tables>(
    tables: &T,
    service_name: impl Fn(u32) -> String,
    client: &Client,
    destination: Destination,
    now_ns: u64,
) -> Explanation {
    let request = Request {
        addr: Addr::from(destination.address.ip()),
        port: Be16::new(destination.address.port()),
        protocol: number(destination.protocol),
        on_host: client.on_host,
        from_loopback: client.from_loopback,
        // Zero is no namespace's cookie: nothing is remembered for it.
        netns_cookie: client.netns_cookie.unwrap_or(0),
        now_ns,
        random: 0,
    };
    let frontend = addressed(tables, &request).map(|(key, value)| Found {
        service: service_name(value.service()),
        address: key.addr.into(),
        port: key.port.host(),
        protocol: protocol(key.protocol),
        kind: kind_name(value.kind()),
    });
    match lb::find(tables, &request) {
        Err(verdict) => Explanation {
            frontend,
            layer: layer(verdict),
            policy: None,
            candidates: Vec::new(),
            affinity: None,
            verdict: word(verdict),
            reason: why_not(verdict, destination, client),
            packet: None,
        },
        Ok(hit) => choose(tables, hit, &request, client, frontend),
    }
}

fn choose<T: Tables>(
    tables: &T,
    hit: Hit,
    request: &Request,
    client: &Client,
    frontend: Option<Found>,
) -> Explanation {
    let policy = tables.policy(hit.service).unwrap_or_default();
    let scope = lb::scope(hit.kind, policy);
    let candidates = candidates(tables, hit.service, scope);
    // Before the choice, which some tables remember.
    let remembered = client
        .netns_cookie
        .and_then(|cookie| tables.affinity(&AffinityKey::from_netns(hit.service, cookie)));
    let verdict = lb::choose(tables, hit, request);
    let affinity = affinity(policy, client, remembered, request.now_ns, verdict);
    let stays = affinity
        .as_ref()
        .and_then(|affinity| affinity.backend.clone());
    let reason = match (verdict, stays) {
        (Verdict::Translate(_), Some(backend)) => {
            format!("session affinity keeps this client at {backend}")
        }
        (Verdict::Translate(_), None) if candidates.len() == 1 => "there is one backend".to_owned(),
        (Verdict::Translate(_), None) => {
            format!(
                "one of {} backends, at random for each connection",
                candidates.len()
            )
        }
        (Verdict::Refuse(_), _) if scope == Scope::Local => {
            "no usable endpoint on this node, and internalTrafficPolicy is Local".to_owned()
        }
        (Verdict::Refuse(_), _) => "the Service has no usable endpoint".to_owned(),
        (Verdict::Pass(reason), _) => format!("left as it is: {}", sentence(reason)),
    };
    Explanation {
        frontend,
        layer: layer(verdict),
        policy: Some(match scope {
            Scope::Cluster => "Cluster",
            Scope::Local => "Local",
        }),
        candidates,
        affinity,
        verdict: word(verdict),
        reason,
        packet: None,
    }
}

/// The frontend that the destination names, whatever becomes of it.
fn addressed<T: Tables>(tables: &T, request: &Request) -> Option<(FrontendKey, FrontendValue)> {
    let look = |addr| {
        let key = FrontendKey::new(addr, request.port, request.protocol);
        tables.frontend(&key).map(|value| (key, value))
    };
    look(request.addr).or_else(|| {
        let serves = |flags: u32| flags & node_address_flags::NODE_PORTS != 0;
        let is_node = tables.node_address(&request.addr).is_some_and(serves)
            || request.addr.is_loopback() && request.on_host;
        is_node.then(|| look(request.addr.unspecified())).flatten()
    })
}

fn candidates<T: Tables>(tables: &T, service: u32, scope: Scope) -> Vec<BackendRow> {
    // As often as the programs do, while the set changes under us.
    let slots = (0..lb::ATTEMPTS).find_map(|_| slots(tables, tables.set(service, scope)?));
    let mut rows: Vec<_> = slots
        .unwrap_or_default()
        .values()
        .map(|slot| {
            let bits = tables
                .member(slot.member)
                .filter(|member| member.word.generation() == slot.member_generation)
                .map_or(0, |member| member.word.bits());
            backend_row(slot.addr.into(), slot.port.host(), bits)
        })
        .collect();
    rows.sort();
    rows
}

fn affinity(
    policy: Policy,
    client: &Client,
    remembered: Option<AffinityValue>,
    now_ns: u64,
    verdict: Verdict,
) -> Option<Affinity> {
    let seconds = policy.affinity_seconds();
    if seconds == 0 {
        return None;
    }
    let age = remembered.map(|value| now_ns.saturating_sub(value.last_used_ns));
    let backend = match (verdict, remembered) {
        (
            Verdict::Translate(Backend {
                member,
                generation,
                addr,
                port,
                ..
            }),
            Some(value),
        ) if value.member == member
            && value.generation == generation
            && age <= Some(u64::from(seconds) * NS_PER_SECOND) =>
        {
            Some(socket(addr.into(), port.host()))
        }
        _ => None,
    };
    Some(Affinity {
        seconds,
        client_netns: client.netns_cookie,
        backend,
        age_seconds: age.map(|age| age / NS_PER_SECOND),
    })
}

fn number(protocol: Protocol) -> u8 {
    match protocol {
        Protocol::Tcp => TCP,
        Protocol::Udp => UDP,
        Protocol::Sctp => SCTP,
    }
}

fn word(verdict: Verdict) -> &'static str {
    match verdict {
        Verdict::Translate(_) => "translate",
        Verdict::Refuse(_) => "refuse",
        Verdict::Pass(_) => "pass",
    }
}

/// Who has the last word on a connection.
fn layer(verdict: Verdict) -> &'static str {
    match verdict {
        Verdict::Translate(_) | Verdict::Refuse(_) => "socket",
        Verdict::Pass(Reason::SourceRanges | Reason::OtherProtocol) => "packet",
        Verdict::Pass(_) => "none",
    }
}

fn why_not(verdict: Verdict, destination: Destination, client: &Client) -> String {
    let address = destination.address.ip();
    match verdict {
        Verdict::Refuse(_) => {
            format!(
                "{address} is a ClusterIP, but its Service has no port {}/{}",
                destination.address.port(),
                destination.protocol
            )
        }
        Verdict::Pass(Reason::ForeignLoopback) if !client.on_host && address.is_loopback() => {
            "a pod's own loopback is its own; node ports on loopback are for the node's processes"
                .to_owned()
        }
        Verdict::Pass(reason) => sentence(reason).to_owned(),
        Verdict::Translate(_) => String::new(),
    }
}

fn sentence(reason: Reason) -> &'static str {
    match reason {
        Reason::NotAService => "no Service has this address and port",
        Reason::OtherProtocol => "the socket layer serves TCP and UDP; SCTP is the packet layer's",
        Reason::SourceRanges => {
            "the Service restricts client addresses (loadBalancerSourceRanges): the packet layer decides, it knows the client's"
        }
        Reason::OnLocalLink => {
            "this ClusterIP is assigned to a link of this node (NodeLocal DNSCache): connections to it stay here"
        }
        Reason::ForeignLoopback => {
            "the client's socket is bound to a loopback address, which reaches nothing outside its namespace"
        }
        Reason::BrokenMap => {
            "the maps lack an entry that must be there; `proxy-agent check` says more"
        }
        Reason::Contended => "the backends changed while they were read; try again",
        Reason::Connected
        | Reason::Sent
        | Reason::ReplyTranslated
        | Reason::PeerNameTranslated
        | Reason::OptedOut
        | Reason::LeaseExpired
        | Reason::NoEndpoints
        | Reason::UnknownPort
        | Reason::UdpConnectPassed
        | Reason::NoStorage
        | Reason::Recycled
        | Reason::PeerOverflow
        | Reason::SocketDestroyed
        | Reason::ReplyUntouched
        | Reason::AffinityHit
        | Reason::EntryTaken
        | Reason::Closed
        | Reason::CloseUntouched
        | Reason::PodSocket => reason.name(),
    }
}

impl Report for Explanation {
    fn table(&self) -> String {
        let frontend = self.frontend.as_ref().map_or_else(
            || "none".to_owned(),
            |f| {
                format!(
                    "{}/{} ({}) of {}",
                    socket(f.address, f.port),
                    f.protocol,
                    f.kind,
                    f.service
                )
            },
        );
        let mut lines = vec![
            format!("frontend    {frontend}"),
            format!("layer       {}", self.layer),
            format!("policy      {}", self.policy.unwrap_or("-")),
        ];
        for (index, candidate) in self.candidates.iter().enumerate() {
            let heading = if index == 0 { "candidates" } else { "" };
            lines.push(format!("{heading:<11} {candidate}"));
        }
        if let Some(affinity) = &self.affinity {
            let stays = affinity
                .backend
                .as_deref()
                .unwrap_or("no backend remembered");
            lines.push(format!("affinity    {}s, {stays}", affinity.seconds));
        }
        lines.push(format!("verdict     {}", self.verdict));
        lines.push(format!("reason      {}", self.reason));
        if let Some(packet) = &self.packet {
            lines.push(packet.table());
        }
        lines.join("\n")
    }
}

#[cfg(test)]
mod tests;
