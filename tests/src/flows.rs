//! What becomes of a first packet: kube-proxy's flow matrix, and where this proxy departs from it on purpose.
//!
//! The matrix is that of TestInternalExternalMasquerade (pkg/proxy/iptables/proxier_test.go), with kube-proxy's rules for
//! Services whose policy leaves no endpoint (pkg/proxy/iptables/proxier.go).

mod differences;

use std::fmt;

pub use differences::{DIFFERENCES, Difference, table};

/// Who opens the connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Client {
    /// A pod of the node.
    Pod,
    /// A process of the node itself.
    Node,
    /// A machine outside the cluster.
    Outside,
}

impl Client {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Pod, Self::Node, Self::Outside];
}

/// What it connects to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// The ClusterIP.
    ClusterIp,
    /// A node port on the node's own address.
    NodePort,
    /// A node port on the loopback address; for the node itself only.
    LocalhostNodePort,
    /// An address of the load balancer.
    LoadBalancer,
    /// One of `externalIPs`.
    ExternalIp,
}

impl Target {
    /// All of them.
    pub const ALL: [Self; 5] = [
        Self::ClusterIp,
        Self::NodePort,
        Self::LocalhostNodePort,
        Self::LoadBalancer,
        Self::ExternalIp,
    ];
}

/// The Service's traffic policies, and where its endpoints are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Both policies Cluster; one endpoint on this node, one elsewhere.
    Cluster,
    /// `externalTrafficPolicy: Local`; the same endpoints.
    ExternalLocal,
    /// `internalTrafficPolicy: Local`; the same endpoints.
    InternalLocal,
    /// Both policies Local; the only endpoint is elsewhere.
    Elsewhere,
    /// Both policies Cluster; no endpoint.
    Empty,
}

impl Kind {
    /// All of them.
    pub const ALL: [Self; 5] = [
        Self::Cluster,
        Self::ExternalLocal,
        Self::InternalLocal,
        Self::Elsewhere,
        Self::Empty,
    ];
}

/// How the proxy is told to work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Setting {
    /// The socket layer too; otherwise rules alone.
    pub ebpf: bool,
    /// IPv6.
    pub v6: bool,
    /// It can tell pods from others (`--cluster-cidr`).
    pub detector: bool,
    /// `--masquerade-all`.
    pub masquerade_all: bool,
}

/// One flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flow {
    /// Who.
    pub client: Client,
    /// To what.
    pub target: Target,
    /// Of which Service.
    pub kind: Kind,
}

/// Which endpoints are reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reached {
    /// The one on this node.
    Near,
    /// The one elsewhere.
    Far,
    /// Either.
    Both,
}

impl Reached {
    /// The names of the pods.
    pub fn pods(self) -> &'static [&'static str] {
        match self {
            Self::Near => &["near"],
            Self::Far => &["far"],
            Self::Both => &["far", "near"],
        }
    }
}

/// What becomes of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// An endpoint answers.
    Served {
        /// Which.
        by: Reached,
        /// It sees an address of the node instead of the client's.
        masqueraded: bool,
    },
    /// The client is told at once: ECONNREFUSED.
    Refused,
    /// Nothing is heard.
    Dropped,
    /// Nobody translates it.
    Untouched,
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Served { by, masqueraded } => {
                write!(f, "{}", by.pods().join(" or "))?;
                f.write_str(if *masqueraded { ", masqueraded" } else { "" })
            }
            Self::Refused => f.write_str("refused"),
            Self::Dropped => f.write_str("dropped"),
            Self::Untouched => f.write_str("untouched"),
        }
    }
}

const fn served(by: Reached, masqueraded: bool) -> Outcome {
    Outcome::Served { by, masqueraded }
}

/// Whether there is such a flow.
pub fn exists(flow: Flow) -> bool {
    flow.target != Target::LocalhostNodePort || flow.client == Client::Node
}

/// What kube-proxy in iptables mode does.
pub fn of_kube_proxy(flow: Flow, setting: Setting) -> Outcome {
    let Flow {
        client,
        target,
        kind,
    } = flow;
    if target == Target::LocalhostNodePort && setting.v6 {
        // Not translated, and nobody listens there; but it is an address of the node, and is refused as one.
        return match kind {
            Kind::Elsewhere => Outcome::Dropped,
            _ => Outcome::Refused,
        };
    }
    match target {
        Target::ClusterIp => to_cluster_ip(client, kind, setting),
        Target::NodePort
        | Target::LocalhostNodePort
        | Target::LoadBalancer
        | Target::ExternalIp => to_external(client, target, kind, setting),
    }
}

fn to_cluster_ip(client: Client, kind: Kind, setting: Setting) -> Outcome {
    let masqueraded = setting.masquerade_all || setting.detector && client != Client::Pod;
    match kind {
        Kind::Cluster | Kind::ExternalLocal => served(Reached::Both, masqueraded),
        Kind::InternalLocal => served(Reached::Near, masqueraded),
        Kind::Elsewhere => Outcome::Dropped,
        Kind::Empty => Outcome::Refused,
    }
}

fn to_external(client: Client, target: Target, kind: Kind, setting: Setting) -> Outcome {
    let is_short_circuited = match client {
        Client::Pod => setting.detector,
        Client::Node => true,
        Client::Outside => false,
    };
    match kind {
        Kind::Cluster | Kind::InternalLocal => served(Reached::Both, true),
        Kind::ExternalLocal if is_short_circuited => served(Reached::Both, client == Client::Node),
        Kind::ExternalLocal => served(Reached::Near, false),
        Kind::Elsewhere if is_short_circuited => served(Reached::Far, client == Client::Node),
        Kind::Elsewhere => Outcome::Dropped,
        // Rejected in INPUT and FORWARD: what the node itself sends to an address elsewhere passes neither.
        Kind::Empty if client == Client::Node && target != Target::NodePort => match target {
            Target::LocalhostNodePort => Outcome::Refused,
            _ => Outcome::Untouched,
        },
        Kind::Empty => Outcome::Refused,
    }
}

/// What happens here.
pub fn expected(flow: Flow, setting: Setting) -> Outcome {
    let changes = DIFFERENCES.iter().filter_map(|it| it.changes);
    changes.fold(of_kube_proxy(flow, setting), |outcome, change| {
        change(flow, setting, outcome)
    })
}

/// What happens here to a flow of SCTP: no socket layer, but where that one serves the loopback addresses the rules do not.
pub fn expected_of_sctp(flow: Flow, setting: Setting) -> Outcome {
    let is_loopback = flow.target == Target::LocalhostNodePort && (setting.ebpf || setting.v6);
    match flow.kind {
        Kind::Cluster | Kind::ExternalLocal | Kind::InternalLocal if is_loopback => {
            Outcome::Untouched
        }
        Kind::Elsewhere if is_loopback => Outcome::Dropped,
        _ => of_kube_proxy(flow, setting),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_alone_differ_in_nothing() {
        for client in Client::ALL {
            for (target, kind) in Target::ALL
                .into_iter()
                .flat_map(|it| Kind::ALL.map(|of| (it, of)))
            {
                let flow = Flow {
                    client,
                    target,
                    kind,
                };
                let setting = Setting {
                    ebpf: false,
                    v6: false,
                    detector: true,
                    masquerade_all: false,
                };
                assert_eq!(expected(flow, setting), of_kube_proxy(flow, setting));
            }
        }
    }
}
