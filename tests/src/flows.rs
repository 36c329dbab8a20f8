//! What becomes of a first packet: kube-proxy's flow matrix, and where this proxy departs from it on purpose.
//!
//! The matrix is that of TestInternalExternalMasquerade (pkg/proxy/iptables/proxier_test.go), with kube-proxy's rules for
//! Services whose policy leaves no endpoint (pkg/proxy/iptables/proxier.go).

use std::fmt;

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

/// A deliberate difference: what it is, and which outcomes it changes.
#[derive(Clone, Copy, Debug)]
pub struct Difference {
    /// What it is about.
    pub what: &'static str,
    /// What kube-proxy does.
    pub kube_proxy: &'static str,
    /// What happens here.
    pub here: &'static str,
    /// The outcome here, of what would have come out without this difference. `None`: not about outcomes of first packets;
    /// tested elsewhere.
    pub changes: Option<fn(Flow, Setting, Outcome) -> Outcome>,
}

/// Whether the socket layer serves the client: no packet to a Service leaves it.
fn by_socket(flow: Flow, setting: Setting) -> bool {
    setting.ebpf
        && match flow.client {
            Client::Pod => !setting.masquerade_all,
            Client::Node => true,
            Client::Outside => false,
        }
}

/// All of them; README prints this table.
pub const DIFFERENCES: &[Difference] = &[
    Difference {
        what: "No usable endpoint, TCP connect or UDP send",
        kube_proxy: "ICMP rejection of the first packet; nothing at all when the node itself connects to an external address",
        here: "ECONNREFUSED from the system call itself",
        changes: Some(|flow, setting, outcome| {
            match by_socket(flow, setting) && flow.kind == Kind::Empty {
                true => Outcome::Refused,
                false => outcome,
            }
        }),
    },
    Difference {
        what: "`internalTrafficPolicy: Local` without a local endpoint",
        kube_proxy: "packets vanish, the client times out",
        here: "ECONNREFUSED",
        changes: Some(|flow, setting, outcome| {
            match by_socket(flow, setting)
                && (flow.kind, flow.target) == (Kind::Elsewhere, Target::ClusterIp)
            {
                true => Outcome::Refused,
                false => outcome,
            }
        }),
    },
    Difference {
        what: "A pod and an external address with `externalTrafficPolicy: Local`, where pods cannot be told from others (no `--cluster-cidr`)",
        kube_proxy: "the pod counts as a client outside: local endpoints only",
        here: "a pod's socket is known as such: all endpoints",
        changes: Some(|flow, setting, outcome| {
            let is_it = by_socket(flow, setting)
                && flow.client == Client::Pod
                && flow.target != Target::ClusterIp;
            match flow.kind {
                Kind::ExternalLocal if is_it => served(Reached::Both, false),
                Kind::Elsewhere if is_it => served(Reached::Far, false),
                _ => outcome,
            }
        }),
    },
    Difference {
        what: "Node ports on 127.0.0.1 and ::1",
        kube_proxy: "IPv4 only, needs `route_localnet`",
        here: "both families over TCP and UDP, only for the node's own processes, no sysctl, whatever `--nodeport-addresses` says (`--mode iptables`: as kube-proxy)",
        changes: Some(|flow, setting, outcome| {
            match setting.ebpf && flow.target == Target::LocalhostNodePort {
                true => match flow.kind {
                    Kind::Empty => Outcome::Refused,
                    Kind::Elsewhere => served(Reached::Far, true),
                    Kind::Cluster | Kind::ExternalLocal | Kind::InternalLocal => {
                        served(Reached::Both, true)
                    }
                },
                false => outcome,
            }
        }),
    },
    Difference {
        what: "Source address when a pod or the node reaches a Service",
        kube_proxy: "masqueraded at node ports, external and load-balancer addresses; also when a pod reaches itself",
        here: "stays visible: nothing is translated on the wire",
        changes: Some(|flow, setting, outcome| match outcome {
            Outcome::Served { by, .. } if by_socket(flow, setting) => served(by, false),
            other => other,
        }),
    },
    Difference {
        what: "`masqueradeAll`",
        kube_proxy: "masquerades what goes to a ClusterIP",
        here: "the same for pods, whose sockets are then left to the packet layer; the node's own processes need none",
        changes: None,
    },
    Difference {
        what: "UDP `connect()` to a Service without endpoints",
        kube_proxy: "succeeds",
        here: "succeeds (resolvers probe addresses that way); nothing is translated",
        changes: None,
    },
    Difference {
        what: "Unknown port of a ClusterIP",
        kube_proxy: "routed on, usually a time-out (iptables mode)",
        here: "ECONNREFUSED (`--mode iptables`: as kube-proxy)",
        changes: None,
    },
    Difference {
        what: "A ClusterIP that is assigned to a local link",
        kube_proxy: "translated all the same, unless NodeLocal DNSCache's own rules prevent it",
        here: "left to whoever has it",
        changes: None,
    },
    Difference {
        what: "Session affinity",
        kube_proxy: "100 clients per endpoint remembered (iptables mode), by address",
        here: "65,536 clients each: by network namespace in the socket layer, by address (ipset) in the packet layer",
        changes: None,
    },
    Difference {
        what: "Invalid packets without a way to tell pods from others",
        kube_proxy: "all dropped, also those of asymmetric routes",
        here: "none dropped",
        changes: None,
    },
    Difference {
        what: "A UDP client of an endpoint that goes away",
        kube_proxy: "stays with it until conntrack is cleaned up",
        here: "in the socket layer unconnected sockets go elsewhere with the next datagram, connected ones get an error and can reconnect; in the packet layer as kube-proxy",
        changes: None,
    },
    Difference {
        what: "A connection that began before there were rules for its Service",
        kube_proxy: "its client's port leads nowhere for two more minutes",
        here: "goes on with its next packet, as a UDP flow does in both",
        changes: None,
    },
    Difference {
        what: "Backends in 127/8, 169.254/16, multicast, or at a ClusterIP",
        kube_proxy: "used",
        here: "refused and reported (CVE-2021-25737)",
        changes: None,
    },
    Difference {
        what: "Two Services claim one address and port",
        kube_proxy: "the last one written wins",
        here: "a ClusterIP beats other claims, then the oldest Service; the loser is reported",
        changes: None,
    },
    Difference {
        what: "`healthCheckNodePort` of a Service with one family, on a node with two",
        kube_proxy: "answered in the Service's family only",
        here: "in both: a load balancer that probes the other one does not see the node as dead",
        changes: None,
    },
    Difference {
        what: "`getpeername()` and the sender of a datagram",
        kube_proxy: "the Service's address (NAT)",
        here: "the same, by hooks",
        changes: None,
    },
];

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

/// The table as README prints it.
pub fn table() -> String {
    let mut text = "| | kube-proxy | here |\n|---|---|---|\n".to_owned();
    for Difference {
        what,
        kube_proxy,
        here,
        ..
    } in DIFFERENCES
    {
        text.push_str(&format!("| {what} | {kube_proxy} | {here} |\n"));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn readme_prints_the_table() {
        let readme = include_str!("../../README.md");
        assert!(readme.contains(&table()), "README.md lacks:\n{}", table());
    }

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
