//! From a destination to a Service, in a number of rules that hardly depends on the number of Services.
//!
//! A chain with few frontends has a rule for each. One with many has a rule for each of up to four parts of its prefix (two
//! bits of the address, then the protocol, then two bits of the port), which lead to a chain for that part. Bits that all
//! frontends share are skipped. All of it is a function of the set of frontends, so a change writes the chains from the
//! root to what changed, whatever happened before.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use ipnet::IpNet;

use super::{
    super::{
        names::{ChainName, protocol},
        rule::{Is, Rule, Target, is},
        tables::Table,
    },
    Body, Sink, base,
};
use crate::state::{Family, Protocol, ServicePort};

/// As many frontends have a rule each.
const LEAVES: usize = 8;
/// Bits that each level of the tree tells apart; below the last one, all frontends have a rule each.
///
/// By two bits at a time a packet meets the fewest rules. The last level is there for sets that forked often further up
/// (addresses of several networks), and takes four.
const STEPS: [u32; DEPTH] = [2, 2, 2, 2, 2, 2, 4];

/// Levels of a tree, at most.
///
/// nf_tables refuses more than 15 jumps in a row (`NFT_JUMP_STACK_SIZE`; seen with iptables-nft 1.8.9). The longest way is
/// KUBE-SERVICES, seven levels, KUBE-FW, KUBE-EXT, KUBE-SVC, three levels of groups, KUBE-SEP.
pub(in super::super) const DEPTH: usize = 7;

/// A chain that dispatches by destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(in super::super) enum Root {
    /// nat KUBE-SERVICES: addresses of Services to their chains.
    Services,
    /// nat KUBE-NODEPORTS: node ports to their chains.
    NodePorts,
    /// filter KUBE-SERVICES: ClusterIPs that nothing serves, then addresses of ServiceCIDRs that no Service has. Seen in FORWARD and OUTPUT.
    ClusterRefused,
    /// filter KUBE-EXTERNAL-SERVICES: other addresses that nothing serves. Seen in INPUT and FORWARD.
    ExternalRefused,
    /// Below it: node ports that nothing serves.
    NodePortsRefused,
    /// filter KUBE-NODEPORTS: node ports at which load balancers ask for endpoints. Seen in INPUT.
    HealthChecks,
    /// filter KUBE-PROXY-FIREWALL: what source ranges kept from being translated. Seen in all three.
    Firewall,
}

impl Root {
    pub(in super::super) const ALL: [Self; 7] = [
        Self::Services,
        Self::NodePorts,
        Self::ClusterRefused,
        Self::ExternalRefused,
        Self::NodePortsRefused,
        Self::HealthChecks,
        Self::Firewall,
    ];

    pub(in super::super) const fn table(self) -> Table {
        match self {
            Self::Services | Self::NodePorts => Table::Nat,
            Self::ClusterRefused
            | Self::ExternalRefused
            | Self::NodePortsRefused
            | Self::HealthChecks
            | Self::Firewall => Table::Filter,
        }
    }

    pub(in super::super) const fn chain(self) -> ChainName {
        match self {
            Self::Services | Self::ClusterRefused => base::SERVICES,
            Self::NodePorts | Self::HealthChecks => base::NODE_PORTS,
            Self::ExternalRefused => base::EXTERNAL_SERVICES,
            Self::NodePortsRefused => ChainName::fixed("PROXY-AGENT-P"),
            Self::Firewall => base::PROXY_FIREWALL,
        }
    }

    /// How the names of the chains below begin. kube-proxy removes those in nat when it takes over, and never looks at ours
    /// in filter: they lead to no chain of its.
    pub(in super::super) const fn prefix(self) -> &'static str {
        match self {
            Self::Services => "KUBE-SVC-D-",
            Self::NodePorts => "KUBE-SVC-N-",
            Self::ClusterRefused => "PROXY-AGENT-C-",
            Self::ExternalRefused => "PROXY-AGENT-E-",
            Self::NodePortsRefused => "PROXY-AGENT-P-",
            Self::HealthChecks => "PROXY-AGENT-H-",
            Self::Firewall => "PROXY-AGENT-F-",
        }
    }

    /// The root of a chain that dispatches, whose rules for node ports name no address.
    pub(in super::super) fn of(table: Table, chain: ChainName, of_node_port: bool) -> Option<Self> {
        let roots = Self::ALL.into_iter();
        let mut roots = roots.filter(|root| root.table() == table);
        match roots.find(|root| root.chain() == chain || root.is_above(chain)) {
            // kube-proxy has both in one chain.
            Some(Self::ExternalRefused) if of_node_port => Some(Self::NodePortsRefused),
            root => root,
        }
    }

    /// Whether a chain is below it in the tree.
    pub(in super::super) fn is_above(self, chain: ChainName) -> bool {
        chain.as_str().starts_with(self.prefix())
    }
}

/// Where a packet goes to, as far as a root tells it apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(in super::super) struct LeafKey {
    pub(in super::super) family: Family,
    pub(in super::super) root: Root,
    /// Unspecified for node ports.
    pub(in super::super) address: IpAddr,
    pub(in super::super) protocol: Protocol,
    pub(in super::super) port: u16,
}

/// What a rule of a leaf does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in super::super) enum Verdict {
    Chain(ChainName),
    Accept,
    Reject,
    Drop,
}

impl Verdict {
    /// Whether the packet goes nowhere.
    pub(in super::super) fn refuses(self) -> bool {
        match self {
            Self::Chain(_) | Self::Accept => false,
            Self::Reject | Self::Drop => true,
        }
    }
}

/// The rule for one frontend.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in super::super) struct Leaf {
    pub(in super::super) verdict: Verdict,
    pub(in super::super) owner: ServicePort,
    /// For the comment, after the owner.
    pub(in super::super) what: &'static str,
}

/// All frontends of all roots.
pub(in super::super) type Leaves = BTreeMap<LeafKey, Leaf>;

/// Part of a tree that a rule leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part {
    Network(IpNet),
    Protocol(IpAddr, Protocol),
    Ports(IpAddr, Protocol, u16, u16),
}

impl Part {
    /// The part of a split that `key` is in. All keys of one chain are split by the same bit or field.
    fn of(key: &LeafKey, split: Split) -> Self {
        match split {
            Split::Address(length) => {
                let net = IpNet::new(key.address, length as u8).expect("no longer than an address");
                Self::Network(net.trunc())
            }
            Split::Protocol => Self::Protocol(key.address, key.protocol),
            Split::Port(length) => {
                let rest = u16::MAX.checked_shr(length).unwrap_or(0);
                let first = key.port & !rest;
                Self::Ports(key.address, key.protocol, first, first | rest)
            }
        }
    }

    fn covers(&self, key: &LeafKey) -> bool {
        match *self {
            Self::Network(net) => net.contains(&key.address),
            Self::Protocol(address, protocol) => (address, protocol) == (key.address, key.protocol),
            Self::Ports(address, protocol, first, last) => {
                (address, protocol) == (key.address, key.protocol)
                    && (first..=last).contains(&key.port)
            }
        }
    }

    /// The network as its first digits and its length, the address and the first letter of the protocol, then the ports as
    /// their first digits and the number of bits.
    fn identity(&self) -> String {
        let digits = |address: IpAddr| match address {
            IpAddr::V4(v4) => format!("{:08X}", v4.to_bits()),
            IpAddr::V6(v6) => format!("{:032X}", v6.to_bits()),
        };
        let of = |address: IpAddr, of: Protocol| {
            let mut text = String::new();
            // Node ports are told apart by protocol and port alone.
            if !address.is_unspecified() {
                text = digits(address);
            }
            text + &protocol(of)[..1].to_uppercase()
        };
        let start = |mut digits: String, bits: u32| {
            digits.truncate(bits.div_ceil(4) as usize);
            format!("{digits}-{bits}")
        };
        match *self {
            Self::Network(net) => start(digits(net.addr()), net.prefix_len().into()),
            Self::Protocol(address, protocol) => of(address, protocol),
            Self::Ports(address, protocol, first, last) => {
                let bits = (first ^ last).leading_zeros();
                of(address, protocol) + &start(format!("{first:04X}"), bits)
            }
        }
    }

    /// The rule that leads to it.
    fn rule(&self, family: Family, chain: ChainName) -> Rule<'static> {
        let rule = Rule::new(family, Target::Jump(chain));
        match *self {
            Self::Network(net) => Rule {
                destination: is(net),
                ..rule
            },
            Self::Protocol(address, protocol) => Rule {
                destination: destination(address),
                protocol: Some(protocol),
                ..rule
            },
            Self::Ports(address, protocol, first, last) => Rule {
                destination: destination(address),
                protocol: Some(protocol),
                ports: Some((first, last)),
                ..rule
            },
        }
    }
}

fn destination(address: IpAddr) -> Option<Is<IpNet>> {
    is(IpNet::from(address)).filter(|_| !address.is_unspecified())
}

/// What the parts of a chain differ in.
#[derive(Clone, Copy)]
enum Split {
    /// So many leading bits of the address.
    Address(u32),
    Protocol,
    /// So many leading bits of the port.
    Port(u32),
}

impl Split {
    /// By the first `step` bits in which two destinations differ: the least and the greatest of a chain.
    fn between(first: &LeafKey, last: &LeafKey, step: u32) -> Self {
        let (shared, length) = match (first.address, last.address) {
            (IpAddr::V4(a), IpAddr::V4(b)) => ((a.to_bits() ^ b.to_bits()).leading_zeros(), 32),
            (IpAddr::V6(a), IpAddr::V6(b)) => ((a.to_bits() ^ b.to_bits()).leading_zeros(), 128),
            (IpAddr::V4(_), IpAddr::V6(_)) | (IpAddr::V6(_), IpAddr::V4(_)) => (0, 128),
        };
        // On a grid, so that most changes of the least and the greatest move nothing.
        let next = |shared: u32, length: u32| (shared / 2 * 2 + step).min(length);
        if first.address != last.address {
            Self::Address(next(shared, length))
        } else if first.protocol != last.protocol {
            Self::Protocol
        } else {
            Self::Port(next((first.port ^ last.port).leading_zeros(), u16::BITS))
        }
    }
}

/// Says whether a chain has to be rendered: by its name, and by what leads to it.
pub(in super::super) type Wanted<'a> = dyn Fn(ChainName, &dyn Fn(&LeafKey) -> bool) -> bool + 'a;

/// One tree.
pub(in super::super) struct Tree<'a> {
    pub(in super::super) family: Family,
    pub(in super::super) root: Root,
    pub(in super::super) wanted: &'a Wanted<'a>,
}

impl Tree<'_> {
    /// Renders the wanted chains but the root's, whose rules it returns, and adds the names of all to `names`.
    pub(in super::super) fn render(
        &self,
        leaves: &Leaves,
        names: &mut BTreeSet<ChainName>,
        sink: &mut Sink<'_>,
    ) -> Body {
        let Self { family, root, .. } = *self;
        let of_root = |(key, _): &(&LeafKey, &Leaf)| (key.family, key.root) == (family, root);
        let least = LeafKey {
            family,
            root,
            address: IpAddr::from([0, 0, 0, 0]),
            protocol: Protocol::Tcp,
            port: 0,
        };
        let found: Vec<_> = leaves.range(least..).take_while(of_root).collect();
        let mut body = Body::default();
        self.fill(&found, 0, Some(&mut body), names, sink);
        body
    }

    /// `body` is none where nobody wants the chain.
    fn fill(
        &self,
        leaves: &[(&LeafKey, &Leaf)],
        depth: usize,
        mut body: Option<&mut Body>,
        names: &mut BTreeSet<ChainName>,
        sink: &mut Sink<'_>,
    ) {
        let (Some((first, _)), Some((last, _))) = (leaves.first(), leaves.last()) else {
            return;
        };
        if leaves.len() <= LEAVES || depth == DEPTH {
            for (key, leaf) in leaves {
                push_leaf(body.as_deref_mut(), key, leaf);
            }
            return;
        }
        let split = Split::between(first, last, STEPS[depth]);
        for leaves in leaves.chunk_by(|(a, _), (b, _)| Part::of(a, split) == Part::of(b, split)) {
            let (key, leaf) = leaves[0];
            if leaves.len() == 1 {
                push_leaf(body.as_deref_mut(), key, leaf);
                continue;
            }
            let part = Part::of(key, split);
            let name = ChainName::helper(self.root.prefix(), &part.identity());
            names.insert(name);
            if let Some(body) = body.as_deref_mut() {
                body.push(&part.rule(self.family, name));
            }
            let mut below = (self.wanted)(name, &|key| part.covers(key)).then(Body::default);
            self.fill(leaves, depth + 1, below.as_mut(), names, sink);
            if let Some(below) = below {
                below.send(self.family, self.root.table(), name, sink);
            }
        }
    }
}

fn push_leaf(body: Option<&mut Body>, key: &LeafKey, leaf: &Leaf) {
    let Some(body) = body else {
        return;
    };
    let target = match leaf.verdict {
        Verdict::Chain(chain) => Target::Jump(chain),
        Verdict::Accept => Target::Accept,
        Verdict::Reject => Target::Reject,
        Verdict::Drop => Target::Drop,
    };
    body.push(&Rule {
        destination: destination(key.address),
        protocol: Some(key.protocol),
        comment: Some(format_args!("{} {}", leaf.owner, leaf.what)),
        ports: Some((key.port, key.port)),
        ..Rule::new(key.family, target)
    });
}
