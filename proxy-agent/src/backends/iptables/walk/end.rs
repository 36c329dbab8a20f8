//! What becomes of a packet.

use std::{
    fmt,
    net::{IpAddr, SocketAddr},
};

use super::super::{
    rules::tree::{Leaf, LeafKey, Root},
    tables::Table,
};

/// What becomes of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fate {
    /// It goes on.
    Passed,
    /// It vanishes.
    Dropped,
    /// It vanishes, and its sender is told.
    Rejected,
}

/// A rule, or the end of a built-in chain, that decided something.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decision {
    /// Its table.
    pub table: Table,
    /// The chains that lead to it, from the built-in one on.
    pub chains: Vec<String>,
    /// The rule, or "policy DROP".
    pub rule: String,
}

/// One end that a packet can come to.
#[derive(Clone, Debug)]
pub struct End {
    /// What becomes of it.
    pub fate: Fate,
    /// Where it goes.
    pub to: SocketAddr,
    /// With an address of this node as its source.
    pub masqueraded: bool,
    /// How likely this end is.
    pub chance: f64,
    /// Rules that were looked at, in all chains.
    pub walked: usize,
    /// Sets that the client was added to.
    pub remembered: Vec<String>,
    /// What translated it, masqueraded it, refused it.
    pub decisions: Vec<Decision>,
    /// The frontend that it was for.
    pub(in super::super) leaf: Option<(LeafKey, Leaf)>,
}

/// A frontend, as the rules name it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Named {
    /// "namespace/name:port".
    pub service: String,
    /// "cluster-ip", "node-port", "load-balancer", "external-ip"; "external" where the rule tells no more.
    pub kind: &'static str,
    /// Unspecified for a node port.
    pub address: IpAddr,
    /// Its port.
    pub port: u16,
}

impl End {
    /// That of a packet which meets no rule.
    pub fn at(to: SocketAddr) -> Self {
        Self {
            fate: Fate::Passed,
            to,
            masqueraded: false,
            chance: 1.0,
            walked: 0,
            remembered: Vec::new(),
            decisions: Vec::new(),
            leaf: None,
        }
    }

    /// The frontend that it was for; none where no rule names one.
    pub fn frontend(&self) -> Option<Named> {
        let (key, leaf) = self.leaf.as_ref()?;
        let kind = match (leaf.what, key.root) {
            ("cluster IP", _) | (_, Root::ClusterRefused) => "cluster-ip",
            ("loadbalancer IP", _) | (_, Root::Firewall) => "load-balancer",
            ("external IP", _) => "external-ip",
            (_, Root::NodePorts | Root::NodePortsRefused) => "node-port",
            (_, Root::Services | Root::ExternalRefused) => "external",
            // A port of the node's own server.
            (_, Root::HealthChecks) => return None,
        };
        Some(Named {
            service: leaf.owner.to_string(),
            kind,
            address: key.address,
            port: key.port,
        })
    }
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let masqueraded = if self.masqueraded { " m" } else { "" };
        match self.fate {
            Fate::Passed => write!(f, "{}{masqueraded}", self.to),
            Fate::Dropped => f.write_str("dropped"),
            Fate::Rejected => f.write_str("rejected"),
        }
    }
}
