//! Where this proxy departs from kube-proxy on purpose: one table, which README prints, and by which the flow matrix and the
//! differential test say what to expect here.

use super::{Client, Flow, Kind, Outcome, Reached, Setting, Target, served};
use crate::differential::{Answer, Met};

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
    /// What is to be answered here to a random question, where this would have been without the difference. `None`: no such
    /// question shows it.
    pub answers: Option<fn(&Met<'_>, Answer) -> Answer>,
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
        what: "Two Services claim one address and port",
        kube_proxy: "the last one written wins",
        here: "a ClusterIP beats other claims, then the oldest Service; the loser is reported",
        changes: None,
        answers: Some(|met, answer| met.undisputed().unwrap_or(answer)),
    },
    Difference {
        what: "kube-proxy's mode nftables: an unknown port of a ClusterIP, and an external address outside the ServiceCIDRs, without endpoints, from the node itself",
        kube_proxy: "rejected, unlike in its mode iptables",
        here: "rules drop the one, as all that no Service has in the ServiceCIDRs, and let the other go as in its mode iptables",
        changes: None,
        answers: Some(|met, answer| match met.is_rejected_by_nftables_alone() {
            true => Answer::Silent,
            false => answer,
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
        answers: Some(|met, answer| met.at_node_port_of_address().unwrap_or(answer)),
    },
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
        answers: Some(|met, answer| match answer {
            Answer::Silent if met.asks_frontend_by_socket() && !met.is_to_cluster_ip() => {
                Answer::Refused
            }
            other => other,
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
        answers: Some(|met, answer| match answer {
            Answer::Silent if met.asks_frontend_by_socket() && met.is_to_cluster_ip() => {
                Answer::Refused
            }
            other => other,
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
        answers: None,
    },
    Difference {
        what: "Source address when a pod or the node reaches a Service",
        kube_proxy: "masqueraded at node ports, external and load-balancer addresses; also when a pod reaches itself",
        here: "stays visible: nothing is translated on the wire",
        changes: Some(|flow, setting, outcome| match outcome {
            Outcome::Served { by, .. } if by_socket(flow, setting) => served(by, false),
            other => other,
        }),
        answers: Some(|met, answer| match answer {
            Answer::Served { by, .. } if met.by_socket() => Answer::Served {
                by,
                sees: met.own_addresses(),
            },
            other => other,
        }),
    },
    Difference {
        what: "`masqueradeAll`",
        kube_proxy: "masquerades what goes to a ClusterIP",
        here: "the same for pods, whose sockets are then left to the packet layer; the node's own processes need none",
        changes: None,
        answers: None,
    },
    Difference {
        what: "UDP `connect()` to a Service without endpoints",
        kube_proxy: "succeeds",
        here: "succeeds (resolvers probe addresses that way); nothing is translated",
        changes: None,
        answers: None,
    },
    Difference {
        what: "Unknown port of a ClusterIP",
        kube_proxy: "routed on, usually a time-out (iptables mode)",
        here: "ECONNREFUSED (`--mode iptables`: as kube-proxy)",
        changes: None,
        answers: Some(
            |met, answer| match met.by_socket() && met.is_to_unknown_port() {
                true => Answer::Refused,
                false => answer,
            },
        ),
    },
    Difference {
        what: "A ClusterIP that is assigned to a local link",
        kube_proxy: "translated all the same, unless NodeLocal DNSCache's own rules prevent it",
        here: "left to whoever has it",
        changes: None,
        answers: None,
    },
    Difference {
        what: "Session affinity",
        kube_proxy: "100 clients per endpoint remembered (iptables mode), by address",
        here: "65,536 clients each: by network namespace in the socket layer, by address (ipset) in the packet layer",
        changes: None,
        answers: None,
    },
    Difference {
        what: "Invalid packets without a way to tell pods from others",
        kube_proxy: "all dropped, also those of asymmetric routes",
        here: "none dropped",
        changes: None,
        answers: None,
    },
    Difference {
        what: "A UDP client of an endpoint that goes away",
        kube_proxy: "stays with it until conntrack is cleaned up",
        here: "in the socket layer unconnected sockets go elsewhere with the next datagram, connected ones get an error and can reconnect; in the packet layer as kube-proxy",
        changes: None,
        answers: None,
    },
    Difference {
        what: "A connection that began before there were rules for its Service",
        kube_proxy: "its client's port leads nowhere for two more minutes",
        here: "goes on with its next packet, as a UDP flow does in both",
        changes: None,
        answers: None,
    },
    Difference {
        what: "Backends in 127/8, 169.254/16, multicast, or at a ClusterIP",
        kube_proxy: "used",
        here: "refused and reported (CVE-2021-25737)",
        changes: None,
        answers: None,
    },
    Difference {
        what: "`healthCheckNodePort` of a Service with one family, on a node with two",
        kube_proxy: "answered in the Service's family only",
        here: "in both: a load balancer that probes the other one does not see the node as dead",
        changes: None,
        answers: None,
    },
    Difference {
        what: "`getpeername()` and the sender of a datagram",
        kube_proxy: "the Service's address (NAT)",
        here: "the same, by hooks",
        changes: None,
        answers: None,
    },
];

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
        let readme = include_str!("../../../README.md");
        assert!(readme.contains(&table()), "README.md lacks:\n{}", table());
    }
}
