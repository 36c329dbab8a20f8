//! The chains that every node has, and the rules that lead to them.

use std::{collections::BTreeSet, net::IpAddr};

use super::{
    super::{
        Key,
        names::{ChainName, INVALID_DROPPED, LOCALHOST_ACCEPTED},
        rule::{Is, Match, Rule, Target, host, is, is_not},
        tables::Table,
    },
    Body, NodePorts, Rules, Sink,
    tree::Root,
};
use crate::state::Family;

pub(in super::super) const SERVICES: ChainName = ChainName::fixed("KUBE-SERVICES");
pub(in super::super) const NODE_PORTS: ChainName = ChainName::fixed("KUBE-NODEPORTS");
pub(in super::super) const EXTERNAL_SERVICES: ChainName =
    ChainName::fixed("KUBE-EXTERNAL-SERVICES");
pub(in super::super) const PROXY_FIREWALL: ChainName = ChainName::fixed("KUBE-PROXY-FIREWALL");
const FORWARD: ChainName = ChainName::fixed("KUBE-FORWARD");
const POSTROUTING: ChainName = ChainName::fixed("KUBE-POSTROUTING");
const MARK_MASQ: ChainName = ChainName::fixed("KUBE-MARK-MASQ");
/// kubelet's too.
pub(in super::super) const KUBELET_FIREWALL: ChainName = ChainName::fixed("KUBE-FIREWALL");

/// Why a packet to an address of a ServiceCIDR is dropped: the comment of the rule.
pub const UNALLOCATED: &str = "a ServiceCIDR has this address, and no Service has it at this port";

/// The chains that every node has.
const OF_NAT: [ChainName; 4] = [SERVICES, NODE_PORTS, POSTROUTING, MARK_MASQ];
const OF_FILTER: [ChainName; 6] = [
    SERVICES,
    EXTERNAL_SERVICES,
    NODE_PORTS,
    FORWARD,
    PROXY_FIREWALL,
    Root::NodePortsRefused.chain(),
];

/// Whether a chain is one that every node has.
pub(in super::super) fn is_base(table: Table, chain: ChainName) -> bool {
    match table {
        Table::Nat => OF_NAT.contains(&chain),
        Table::Filter => OF_FILTER.contains(&chain),
    }
}

/// Whether a chain is ours, whoever made it: kube-proxy's names count.
pub(in super::super) fn is_ours(table: Table, chain: ChainName) -> bool {
    let prefixes: &[&str] = match table {
        Table::Nat => &[
            "KUBE-SVC-",
            "KUBE-SVL-",
            "KUBE-EXT-",
            "KUBE-FW-",
            "KUBE-SEP-",
            "KUBE-XLB-",
        ],
        Table::Filter => &["PROXY-AGENT-"],
    };
    let mut prefixes = prefixes.iter();
    is_base(table, chain) || prefixes.any(|prefix| chain.as_str().starts_with(prefix))
}

/// Whether a chain is ours and no kube-proxy's.
pub(in super::super) fn is_ours_alone(table: Table, chain: ChainName) -> bool {
    let of_groups = ["KUBE-SVC-G-", "KUBE-SVC-A-"];
    let is_group = of_groups
        .iter()
        .any(|prefix| chain.as_str().starts_with(prefix));
    let is_root = chain == Root::NodePortsRefused.chain();
    is_group || is_root || !is_base(table, chain) && Root::of(table, chain, false).is_some()
}

/// A rule of ours in a chain that is not: made sure of, never more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Anchor {
    /// The chain.
    pub chain: &'static str,
    /// The rule as `iptables-save` prints it, without `-A` and the chain.
    pub rule: &'static str,
}

const fn anchor(table: Table, chain: &'static str, rule: &'static str) -> (Table, Anchor) {
    (table, Anchor { chain, rule })
}

/// Word by word kube-proxy's (`iptablesJumpChains`): it finds ours, and we find those it left. In its order but for
/// KUBE-FORWARD, which most forwarded packets come no further than.
const JUMPS: [(Table, Anchor); 12] = [
    anchor(
        Table::Filter,
        "INPUT",
        r#"-m conntrack --ctstate NEW -m comment --comment "kubernetes externally-visible service portals" -j KUBE-EXTERNAL-SERVICES"#,
    ),
    anchor(
        Table::Filter,
        "FORWARD",
        r#"-m conntrack --ctstate NEW -m comment --comment "kubernetes externally-visible service portals" -j KUBE-EXTERNAL-SERVICES"#,
    ),
    anchor(
        Table::Filter,
        "INPUT",
        r#"-m comment --comment "kubernetes health check service ports" -j KUBE-NODEPORTS"#,
    ),
    anchor(
        Table::Filter,
        "FORWARD",
        r#"-m conntrack --ctstate NEW -m comment --comment "kubernetes service portals" -j KUBE-SERVICES"#,
    ),
    anchor(
        Table::Filter,
        "OUTPUT",
        r#"-m conntrack --ctstate NEW -m comment --comment "kubernetes service portals" -j KUBE-SERVICES"#,
    ),
    anchor(
        Table::Filter,
        "INPUT",
        r#"-m conntrack --ctstate NEW -m comment --comment "kubernetes load balancer firewall" -j KUBE-PROXY-FIREWALL"#,
    ),
    anchor(
        Table::Filter,
        "OUTPUT",
        r#"-m conntrack --ctstate NEW -m comment --comment "kubernetes load balancer firewall" -j KUBE-PROXY-FIREWALL"#,
    ),
    anchor(
        Table::Filter,
        "FORWARD",
        r#"-m conntrack --ctstate NEW -m comment --comment "kubernetes load balancer firewall" -j KUBE-PROXY-FIREWALL"#,
    ),
    anchor(
        Table::Filter,
        "FORWARD",
        r#"-m comment --comment "kubernetes forwarding rules" -j KUBE-FORWARD"#,
    ),
    anchor(
        Table::Nat,
        "OUTPUT",
        r#"-m comment --comment "kubernetes service portals" -j KUBE-SERVICES"#,
    ),
    anchor(
        Table::Nat,
        "PREROUTING",
        r#"-m comment --comment "kubernetes service portals" -j KUBE-SERVICES"#,
    ),
    anchor(
        Table::Nat,
        "POSTROUTING",
        r#"-m comment --comment "kubernetes postrouting rules" -j KUBE-POSTROUTING"#,
    ),
];

/// With `route_localnet` a neighbour could reach 127.0.0.1 of the node (CVE-2020-8558, kubernetes#90259). kubelet has the
/// same rule in the same chain.
const MARTIAN_GUARD: [(Table, Anchor); 3] = [
    anchor(Table::Filter, "INPUT", "-j KUBE-FIREWALL"),
    anchor(Table::Filter, "OUTPUT", "-j KUBE-FIREWALL"),
    anchor(
        Table::Filter,
        "KUBE-FIREWALL",
        r#"! -s 127.0.0.0/8 -d 127.0.0.0/8 -m comment --comment "block incoming localnet connections" -m conntrack ! --ctstate RELATED,ESTABLISHED,DNAT -j DROP"#,
    ),
];

/// The anchors of a family, in the order in which they are put in front of a chain.
pub(in super::super) fn anchors(
    rules: &Rules,
    family: Family,
) -> impl Iterator<Item = (Table, Anchor)> {
    let guarded = family == Family::V4 && rules.localhost_node_ports;
    let guard = MARTIAN_GUARD.into_iter().filter(move |_| guarded);
    JUMPS.into_iter().chain(guard)
}

/// The chains whose rules no Service changes, and the anchors.
pub(in super::super) fn render(rules: &Rules, family: Family, table: Table, sink: &mut Sink<'_>) {
    match table {
        Table::Filter => {
            forward(rules, family).send(family, table, FORWARD, sink);
        }
        Table::Nat => {
            postrouting(rules, family).send(family, table, POSTROUTING, sink);
            // No rule of ours leads there. Others do: the portmap plugin can be told to (`externalSetMarkChain`).
            let mut mark = Body::default();
            mark.push(&Rule::new(family, Target::SetMark(rules.masquerade_mark)));
            mark.send(family, table, MARK_MASQ, sink);
        }
    }
    for (_, anchor) in anchors(rules, family).filter(|(of, _)| *of == table) {
        sink(Key::Anchor(family, table, anchor), "");
    }
}

fn forward(rules: &Rules, family: Family) -> Body {
    let mut body = Body::default();
    // With a policy of DROP in FORWARD, what was masqueraded passes, and so does what follows: by far the most packets, and
    // so the first rule.
    body.push(&Rule {
        matches: &[Match::State(Is {
            not: false,
            value: "RELATED,ESTABLISHED",
        })],
        ..Rule::new(family, Target::Accept)
    });
    // A pod's answer that conntrack calls invalid is not translated back: the client would see the pod's address and reset
    // the connection (kubernetes#74839). Only from pods, since asymmetric routes make others invalid (#94861).
    if let Some(pods) = rules.pods(family).filter(|_| !rules.conntrack_liberal) {
        let invalid = Match::State(Is {
            not: false,
            value: "INVALID",
        });
        let counted = [invalid, Match::Account(INVALID_DROPPED)];
        let mut rule = Rule {
            matches: &counted[..1 + usize::from(rules.features.nfacct)],
            ..Rule::new(family, Target::Drop)
        };
        pods.restrict(&mut rule, false);
        body.push(&rule);
    }
    body.push(&Rule {
        comment: Some(format_args!("kubernetes forwarding rules")),
        matches: &[Match::Mark(Is {
            not: false,
            value: rules.masquerade_mark,
        })],
        ..Rule::new(family, Target::Accept)
    });
    body
}

fn postrouting(rules: &Rules, family: Family) -> Body {
    let mark = rules.masquerade_mark;
    let mut body = Body::default();
    if family == Family::V4 && rules.localhost_node_ports && rules.features.nfacct {
        // Translated, and sent to loopback: only node ports are.
        let loopback = Match::TranslatedFrom("127.0.0.0/8");
        body.push(&Rule {
            matches: &[loopback, Match::Account(LOCALHOST_ACCEPTED)],
            ..Rule::new(family, Target::None)
        });
    }
    body.push(&Rule {
        matches: &[Match::Mark(Is {
            not: true,
            value: mark,
        })],
        ..Rule::new(family, Target::Return)
    });
    // A packet that comes by again (IPsec, a tunnel) is not masqueraded again.
    body.push(&Rule::new(family, Target::FlipMark(mark)));
    body.push(&Rule {
        comment: Some(format_args!("kubernetes service traffic requiring SNAT")),
        ..Rule::new(
            family,
            Target::Masquerade {
                random: rules.features.random_fully,
            },
        )
    });
    body
}

/// Appends what follows the tree in the chain of a root.
pub(in super::super) fn finish(
    rules: &Rules,
    family: Family,
    root: Root,
    addresses: &BTreeSet<IpAddr>,
    body: &mut Body,
) {
    match root {
        Root::Services => to_node_ports(rules, family, addresses, body),
        Root::ExternalRefused => body.push(&Rule {
            matches: &[Match::DestinationIsLocal],
            ..Rule::new(family, Target::Jump(Root::NodePortsRefused.chain()))
        }),
        Root::ClusterRefused => unallocated(rules, family, body),
        Root::NodePorts | Root::NodePortsRefused | Root::HealthChecks | Root::Firewall => {}
    }
}

/// Behind all that is refused, also at external addresses, and so about nobody's addresses and unknown ports: a client's SYN is lost, and the next one
/// reaches the Service that has come meanwhile. An address that a link of this node has (NodeLocal DNSCache) is that link's.
fn unallocated(rules: &Rules, family: Family, body: &mut Body) {
    let networks = rules.service_networks.iter().flatten();
    for network in networks.filter(|network| Family::of(network.addr()) == family) {
        let of_network = |target| Rule {
            destination: is(*network),
            matches: &[Match::DestinationIsElsewhere],
            ..Rule::new(family, target)
        };
        // A Service may write any address into its externalIPs, and FORWARD comes here first.
        body.push(&of_network(Target::Jump(EXTERNAL_SERVICES)));
        body.push(&Rule {
            comment: Some(format_args!("{UNALLOCATED}")),
            ..of_network(Target::Drop)
        });
    }
}

/// Node ports come last: an address that is a Service's and the node's is the Service's.
fn to_node_ports(rules: &Rules, family: Family, addresses: &BTreeSet<IpAddr>, body: &mut Body) {
    let jump = Rule {
        comment: Some(format_args!(
            "kubernetes service nodeports; NOTE: this must be the last rule in this chain"
        )),
        ..Rule::new(family, Target::Jump(NODE_PORTS))
    };
    match &rules.node_ports {
        NodePorts::Listed(families) if families.contains(&family) => {
            let loopback = IpAddr::from([127, 0, 0, 1]);
            let served = family == Family::V4 && rules.localhost_node_ports;
            let of_family = addresses
                .iter()
                .copied()
                .filter(|ip| Family::of(*ip) == family);
            for address in of_family.chain(served.then_some(loopback)) {
                body.push(&Rule {
                    destination: is(host(address)),
                    ..jump
                });
            }
        }
        NodePorts::All | NodePorts::Listed(_) => {
            let loopback = match family {
                Family::V4 => "127.0.0.0/8",
                Family::V6 => "::1/128",
            };
            // Over IPv6 there is no route_localnet.
            let served = family == Family::V4 && rules.localhost_node_ports;
            let loopback = loopback.parse().ok().filter(|_| !served);
            body.push(&Rule {
                destination: loopback.and_then(is_not),
                matches: &[Match::DestinationIsLocal],
                ..jump
            });
        }
    }
}
