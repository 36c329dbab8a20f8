//! A packet's way through the rules, on every branch that chance can take: for `explain`.
//!
//! Pure: rules, addresses and clients come from a [`World`]. A rule that it cannot read belongs to somebody else; it is told
//! and taken for one that does not match. The tables raw and mangle are not looked at.

use std::{
    cell::RefCell,
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
};

use super::{
    names::ChainName,
    parsed::{Parsed, Target},
    rules::found,
    tables::Table,
};
use crate::state::{Family, Protocol};

mod end;

pub use end::{Decision, End, Fate, Named};

/// Chains in a row, at most: the kernel follows sixteen.
const DEEPEST: usize = 32;

/// The first packet of a connection.
#[derive(Clone, Debug)]
pub struct Packet<'a> {
    /// Where it comes from.
    pub source: IpAddr,
    /// Where it is addressed to.
    pub destination: SocketAddr,
    /// Its protocol.
    pub protocol: Protocol,
    /// What it comes in through, empty if that is not known; none: sent by the node itself.
    pub interface: Option<&'a str>,
}

/// What decides, beside the packet.
pub trait World {
    /// The rules of a chain in their order, as `iptables-save` prints them after its name; none if there is no such chain.
    fn rules(&self, table: Table, chain: &str) -> Option<Vec<&str>>;
    /// Whether packets are dropped at the end of a chain that is built in.
    fn drops(&self, table: Table, chain: &str) -> bool;
    /// Whether an address is the node's. Those of loopback are without asking.
    fn is_own(&self, address: IpAddr) -> bool;
    /// Whether an ipset holds a client.
    fn is_in_set(&self, set: &str, client: IpAddr) -> bool;
    /// Whether a list of xt_recent holds a client.
    fn is_recent(&self, list: &str, client: IpAddr) -> bool;
}

/// All that can become of a packet.
#[derive(Clone, Debug)]
pub struct Walked {
    /// The sum of their chances is 1.
    pub ends: Vec<End>,
    /// Rules on the way that could not be read: table, chain, rule.
    pub foreign: BTreeSet<(Table, String, String)>,
}

#[derive(Clone)]
struct Branch {
    end: End,
    mark: u32,
    stop: Option<Stop>,
}

#[derive(Clone, Copy, PartialEq)]
enum Stop {
    /// Back to the chain above.
    Return,
    /// No more rules of this table.
    Done(Fate),
}

/// The chains that lead to a rule.
struct Way<'a> {
    table: Table,
    chain: &'a str,
    above: Option<&'a Way<'a>>,
    depth: usize,
}

impl Way<'_> {
    fn decision(&self, rule: &str) -> Decision {
        let mut chains = Vec::new();
        let mut way = Some(self);
        while let Some(Way { chain, above, .. }) = way {
            chains.push((*chain).to_owned());
            way = *above;
        }
        chains.reverse();
        Decision {
            table: self.table,
            chains,
            rule: rule.to_owned(),
        }
    }
}

struct Walk<'a, W> {
    world: &'a W,
    packet: &'a Packet<'a>,
    foreign: RefCell<BTreeSet<(Table, String, String)>>,
}

/// Where a packet can come to.
pub fn walk<W: World>(world: &W, packet: &Packet<'_>) -> Walked {
    let walk = Walk {
        world,
        packet,
        foreign: RefCell::default(),
    };
    let start = Branch {
        end: End::at(packet.destination),
        mark: 0,
        stop: None,
    };
    let is_sent_here = packet.interface.is_none();
    let first = if is_sent_here { "OUTPUT" } else { "PREROUTING" };
    let translated = walk.hook(Table::Nat, first, vec![start]);
    let (to_here, onward): (Vec<_>, Vec<_>) = translated
        .into_iter()
        .partition(|branch| walk.is_local(branch.end.to.ip()));
    let mut live = Vec::new();
    for (branches, hooks) in [
        (
            to_here,
            if is_sent_here {
                &["OUTPUT", "INPUT"][..]
            } else {
                &["INPUT"]
            },
        ),
        (
            onward,
            if is_sent_here {
                &["OUTPUT"]
            } else {
                &["FORWARD"]
            },
        ),
    ] {
        live.extend(hooks.iter().fold(branches, |branches, hook| {
            walk.hook(Table::Filter, hook, branches)
        }));
    }
    let ends = walk.hook(Table::Nat, "POSTROUTING", live);
    Walked {
        ends: ends.into_iter().map(|branch| branch.end).collect(),
        foreign: walk.foreign.into_inner(),
    }
}

impl<W: World> Walk<'_, W> {
    fn is_local(&self, address: IpAddr) -> bool {
        address.is_loopback() || self.world.is_own(address)
    }

    /// Takes those that are still on their way through a built-in chain.
    fn hook(&self, table: Table, chain: &str, branches: Vec<Branch>) -> Vec<Branch> {
        let is_passing = |branch: &Branch| branch.end.fate == Fate::Passed;
        let (mut live, mut over): (Vec<_>, Vec<_>) = branches.into_iter().partition(is_passing);
        if live.is_empty() {
            return over;
        }
        for branch in &mut live {
            branch.stop = None;
        }
        let way = Way {
            table,
            chain,
            above: None,
            depth: 0,
        };
        for mut branch in self.chain(&way, live) {
            let is_over = matches!(branch.stop, Some(Stop::Done(_)));
            if let Some(Stop::Done(fate)) = branch.stop {
                branch.end.fate = fate;
            }
            if !is_over && self.world.drops(table, chain) {
                branch.end.fate = Fate::Dropped;
                branch.end.decisions.push(way.decision("policy DROP"));
            }
            over.push(branch);
        }
        over
    }

    fn chain(&self, way: &Way<'_>, mut live: Vec<Branch>) -> Vec<Branch> {
        let mut stopped = Vec::new();
        for text in self.world.rules(way.table, way.chain).unwrap_or_default() {
            if live.is_empty() {
                break;
            }
            let Ok(rule) = Parsed::new(text) else {
                self.tell(way, text);
                continue;
            };
            let mut next = Vec::new();
            for mut branch in live {
                branch.end.walked += 1;
                if !self.matches(&rule, &branch) {
                    next.push(branch);
                    continue;
                }
                if let Some(chance) = rule.probability {
                    let mut missed = branch.clone();
                    missed.end.chance *= 1.0 - chance;
                    next.push(missed);
                    branch.end.chance *= chance;
                }
                for branch in self.act(way, &rule, text, branch) {
                    match branch.stop {
                        None => next.push(branch),
                        Some(_) => stopped.push(branch),
                    }
                }
            }
            live = next;
        }
        live.extend(stopped);
        live
    }

    fn tell(&self, way: &Way<'_>, rule: &str) {
        let rule = (way.table, way.chain.to_owned(), rule.to_owned());
        self.foreign.borrow_mut().insert(rule);
    }

    fn act(&self, way: &Way<'_>, rule: &Parsed, text: &str, mut branch: Branch) -> Vec<Branch> {
        let decide = |branch: &mut Branch, fate| {
            branch.end.decisions.push(way.decision(text));
            branch.stop = Some(Stop::Done(fate));
        };
        match &rule.target {
            Target::None => {}
            Target::Chain(name) => return self.enter(way, name, text, branch),
            Target::Return => branch.stop = Some(Stop::Return),
            Target::Accept => branch.stop = Some(Stop::Done(Fate::Passed)),
            Target::Drop | Target::Reject => {
                self.note_leaf(way, text, &mut branch);
                let is_drop = rule.target == Target::Drop;
                decide(
                    &mut branch,
                    if is_drop {
                        Fate::Dropped
                    } else {
                        Fate::Rejected
                    },
                );
            }
            Target::Translate(to) => {
                branch.end.to = *to;
                decide(&mut branch, Fate::Passed);
            }
            Target::Mark(clear, flip) => branch.mark = branch.mark & !clear ^ flip,
            Target::Masquerade => {
                branch.end.masqueraded = true;
                decide(&mut branch, Fate::Passed);
            }
            Target::Remember(set) => branch.end.remembered.push(set.clone()),
        }
        branch.end.remembered.extend(rule.sees.clone());
        vec![branch]
    }

    fn enter(&self, way: &Way<'_>, chain: &str, text: &str, mut branch: Branch) -> Vec<Branch> {
        let is_chain = self.world.rules(way.table, chain).is_some();
        if !is_chain || way.depth >= DEEPEST {
            self.tell(way, text);
            return vec![branch];
        }
        self.note_leaf(way, text, &mut branch);
        let below = Way {
            table: way.table,
            chain,
            above: Some(way),
            depth: way.depth + 1,
        };
        let mut back = self.chain(&below, vec![branch]);
        for branch in &mut back {
            branch.stop = branch.stop.filter(|stop| *stop != Stop::Return);
        }
        back
    }

    fn note_leaf(&self, way: &Way<'_>, text: &str, branch: &mut Branch) {
        let family = Family::of(self.packet.source);
        let chain = ChainName::new(way.chain);
        let leaf = chain.and_then(|chain| found::leaf(family, way.table, chain, text));
        branch.end.leaf = leaf.or(branch.end.leaf.take());
    }

    fn matches(&self, rule: &Parsed, branch: &Branch) -> bool {
        let Packet {
            source,
            destination: _,
            protocol,
            interface,
        } = self.packet;
        let to = branch.end.to;
        let through = |pattern: &String| match (interface, pattern.strip_suffix('+')) {
            (Some(interface), Some(prefix)) => interface.starts_with(prefix),
            (Some(interface), None) => interface == pattern,
            (None, _) => false,
        };
        rule.source
            .is_none_or(|(is, net)| net.contains(source) == is)
            && rule
                .destination
                .is_none_or(|(is, net)| net.contains(&to.ip()) == is)
            && rule
                .first_destination
                .is_none_or(|(is, net)| net.contains(&self.packet.destination.ip()) == is)
            && rule
                .interface
                .as_ref()
                .is_none_or(|(is, name)| through(name) == *is)
            && rule.protocol.is_none_or(|of| of == *protocol)
            && rule
                .ports
                .is_none_or(|(first, last)| (first..=last).contains(&to.port()))
            && rule.states.as_ref().is_none_or(|(is, states)| {
                let translated = to != self.packet.destination;
                let has = |state: &String| state == "NEW" || state == "DNAT" && translated;
                states.iter().any(has) == *is
            })
            && rule
                .mark
                .is_none_or(|(is, mask)| (branch.mark & mask == mask) == is)
            && (!rule.source_is_local || self.is_local(*source))
            && rule
                .destination_is_local
                .is_none_or(|is| self.is_local(to.ip()) == is)
            && rule
                .set
                .as_ref()
                .is_none_or(|set| self.world.is_in_set(set, *source))
            && rule
                .seen
                .as_ref()
                .is_none_or(|list| self.world.is_recent(list, *source))
    }
}
