//! The rules that a desired state asks for: pure, chain by chain.
//!
//! Follows kube-proxy's iptables mode (pkg/proxy/iptables/proxier.go) in what happens to a packet, and departs from it in
//! shape: a tree leads to a Service ([`tree`]) and to an endpoint ([`choice`]), and most endpoints have one rule.

use std::{collections::BTreeSet, fmt::Write};

use ipnet::IpNet;

use super::{
    Key,
    names::ChainName,
    rule::{Is, Rule},
    tables::Table,
};
use crate::state::{DesiredState, Family};

pub(super) mod base;
mod choice;
pub(super) mod found;
pub(super) mod service;
pub(super) mod tree;

/// What the rules depend on beside the desired state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rules {
    /// Families that have rules.
    pub families: BTreeSet<Family>,
    /// The bit of the packet mark that asks for masquerading, as a mask: kube-proxy's default is 0x4000.
    pub masquerade_mark: u32,
    /// Masquerade whatever goes to a ClusterIP.
    pub masquerade_all: bool,
    /// How a packet from a pod of the cluster is told from others.
    pub local_pods: LocalPods,
    /// Which addresses of the node serve node ports.
    pub node_ports: NodePorts,
    /// Node ports on 127.0.0.0/8 too, which needs `route_localnet`; guarded against packets from outside to that network.
    pub localhost_node_ports: bool,
    /// `nf_conntrack_tcp_be_liberal`: conntrack calls no packet out of its window invalid.
    pub conntrack_liberal: bool,
    /// The networks of Services, as the last whole state has them, if what is sent there to nobody is dropped.
    pub service_networks: Option<Vec<IpNet>>,
    /// What this host's kernel and tools can do.
    pub features: Features,
}

/// How a packet from a pod is recognised (kube-proxy's `detectLocalMode`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LocalPods {
    /// Not at all: nothing counts as coming from a pod, and nothing to a ClusterIP is masqueraded.
    Unknown,
    /// By its source: ClusterCIDR. The first network of a family counts.
    Networks(Vec<IpNet>),
    /// By its source: NodeCIDR. These are the networks of the last whole state.
    OfNode(Vec<IpNet>),
    /// By the interface that it comes from: BridgeInterface, or with a trailing `+` InterfaceNamePrefix. A name that Linux
    /// admits: no white space, fifteen bytes.
    Interface(String),
}

/// Which addresses of the node serve node ports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NodePorts {
    /// All that are local, whatever they are.
    All,
    /// In these families those of the desired state that say so.
    Listed(BTreeSet<Family>),
}

/// What a host can do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Features {
    /// `MASQUERADE --random-fully`.
    pub random_fully: bool,
    /// The `set` match and the `SET` target.
    pub ipset: bool,
    /// The `recent` match: affinity without ipset. With neither there is no affinity.
    pub recent: bool,
    /// The `nfacct` match, with kube-proxy's accounting objects in place.
    pub nfacct: bool,
}

/// Source or interface of a pod's packets.
#[derive(Clone, Copy)]
pub(super) enum Pods<'a> {
    From(IpNet),
    Through(&'a str),
}

impl Rules {
    /// Rules that no Service is served by: enough for finding and removing what is there.
    pub fn any() -> Self {
        Self {
            families: [Family::V4, Family::V6].into(),
            masquerade_mark: 0x4000,
            masquerade_all: false,
            local_pods: LocalPods::Unknown,
            node_ports: NodePorts::All,
            localhost_node_ports: false,
            conntrack_liberal: false,
            service_networks: None,
            features: Features::default(),
        }
    }

    /// Takes note of what only the state of the whole node has.
    pub(super) fn learn(&mut self, state: &DesiredState) {
        if let LocalPods::OfNode(networks) = &mut self.local_pods {
            networks.clone_from(&state.pod_networks);
        }
        if let Some(networks) = &mut self.service_networks {
            networks.clone_from(&state.service_networks);
        }
    }

    pub(super) fn pods(&self, family: Family) -> Option<Pods<'_>> {
        match &self.local_pods {
            LocalPods::Unknown => None,
            LocalPods::Networks(networks) | LocalPods::OfNode(networks) => {
                let mut networks = networks.iter();
                networks
                    .find(|net| Family::of(net.addr()) == family)
                    .map(|net| Pods::From(*net))
            }
            LocalPods::Interface(name) => Some(Pods::Through(name)),
        }
    }
}

impl<'a> Pods<'a> {
    /// Restricts `rule` to packets from pods, or to others.
    pub(super) fn restrict(self, rule: &mut Rule<'a>, not: bool) {
        match self {
            Self::From(value) => rule.source = Some(Is { not, value }),
            Self::Through(value) => rule.interface = Some(Is { not, value }),
        }
    }
}

/// Takes what was rendered: a chain with its rules, one a line; a set or an anchor with none.
pub(super) type Sink<'a> = dyn FnMut(Key, &str) + 'a;

/// The rules of a chain.
#[derive(Debug, Default)]
pub(super) struct Body(String);

impl Body {
    pub(super) fn push(&mut self, rule: &Rule<'_>) {
        // Writing to a string does not fail.
        let _ = write!(self.0, "{rule}");
        // What separates the matches from a target ends a rule that has none.
        self.0.truncate(self.0.trim_end_matches(' ').len());
        self.0.push('\n');
    }

    pub(super) fn send(&self, family: Family, table: Table, name: ChainName, sink: &mut Sink<'_>) {
        sink(Key::Chain(family, table, name), &self.0);
    }
}
