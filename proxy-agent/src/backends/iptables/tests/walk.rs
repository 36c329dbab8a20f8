//! A packet's way through the rules, on every branch that chance can take.

use std::{
    collections::BTreeSet,
    fmt,
    net::{IpAddr, SocketAddr},
};

use super::{
    super::tables::Table,
    parsed::{Parsed, Target},
    simulated::Simulated,
};
use crate::state::{Family, Protocol};

/// The first packet of a connection.
#[derive(Clone, Debug)]
pub struct Packet {
    pub source: IpAddr,
    pub destination: SocketAddr,
    pub protocol: Protocol,
    /// None: sent by the node itself.
    pub interface: Option<&'static str>,
}

/// What a host knows beside its rules.
#[derive(Clone, Debug, Default)]
pub struct Host {
    /// Its own addresses.
    pub addresses: BTreeSet<IpAddr>,
    /// Clients by the name of a set or list.
    pub clients: BTreeSet<(String, IpAddr)>,
}

/// What becomes of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fate {
    Passed,
    Dropped,
    Rejected,
}

/// One end that a packet can come to.
#[derive(Clone, Debug)]
pub struct End {
    pub fate: Fate,
    pub to: SocketAddr,
    pub masqueraded: bool,
    pub chance: f64,
    /// Rules that were looked at, in all chains.
    pub walked: usize,
    /// Sets that the client was added to.
    pub remembered: Vec<String>,
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

#[derive(Clone)]
struct Branch {
    to: SocketAddr,
    mark: u32,
    masqueraded: bool,
    chance: f64,
    walked: usize,
    remembered: Vec<String>,
    stop: Option<Stop>,
}

#[derive(Clone, Copy, PartialEq)]
enum Stop {
    /// Back to the chain above.
    Return,
    /// No more rules of this table.
    Done(Fate),
}

struct Walk<'a> {
    tables: &'a Simulated,
    host: &'a Host,
    packet: &'a Packet,
    family: Family,
}

/// All ends, the sum of whose chances is 1.
pub fn walk(tables: &Simulated, host: &Host, packet: &Packet) -> Vec<End> {
    let family = Family::of(packet.source);
    let walk = Walk {
        tables,
        host,
        packet,
        family,
    };
    let start = Branch {
        to: packet.destination,
        mark: 0,
        masqueraded: false,
        chance: 1.0,
        walked: 0,
        remembered: Vec::new(),
        stop: None,
    };
    let from_outside = packet.interface.is_some();
    let first = if from_outside { "PREROUTING" } else { "OUTPUT" };
    let translated = walk.hook(Table::Nat, first, vec![start]);
    let mut ends = Vec::new();
    for branch in translated {
        let is_local = host.addresses.contains(&branch.to.ip()) || branch.to.ip().is_loopback();
        let hook = match (from_outside, is_local) {
            (false, _) => "OUTPUT",
            (true, true) => "INPUT",
            (true, false) => "FORWARD",
        };
        for branch in walk.hook(Table::Filter, hook, vec![branch]) {
            match branch.stop {
                Some(Stop::Done(fate @ (Fate::Dropped | Fate::Rejected))) => {
                    ends.push(branch.end(fate));
                }
                _ => {
                    let out = walk.hook(Table::Nat, "POSTROUTING", vec![branch]);
                    ends.extend(out.into_iter().map(|branch| branch.end(Fate::Passed)));
                }
            }
        }
    }
    ends
}

impl Branch {
    fn end(self, fate: Fate) -> End {
        End {
            fate,
            to: self.to,
            masqueraded: self.masqueraded,
            chance: self.chance,
            walked: self.walked,
            remembered: self.remembered,
        }
    }
}

impl Walk<'_> {
    fn hook(&self, table: Table, chain: &str, mut live: Vec<Branch>) -> Vec<Branch> {
        for branch in &mut live {
            branch.stop = None;
        }
        self.chain(table, chain, live)
    }

    fn chain(&self, table: Table, chain: &str, mut live: Vec<Branch>) -> Vec<Branch> {
        let mut stopped = Vec::new();
        for rule in &self.tables.chains(self.family, table)[chain] {
            let rule = Parsed::new(rule).unwrap();
            let mut next = Vec::new();
            for mut branch in live {
                branch.walked += 1;
                if !self.matches(&rule, &branch) {
                    next.push(branch);
                    continue;
                }
                if let Some(chance) = rule.probability {
                    let mut missed = branch.clone();
                    missed.chance *= 1.0 - chance;
                    next.push(missed);
                    branch.chance *= chance;
                }
                for branch in self.act(table, &rule, branch) {
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

    fn act(&self, table: Table, rule: &Parsed, mut branch: Branch) -> Vec<Branch> {
        match &rule.target {
            Target::None => {}
            Target::Chain(name) => {
                let mut back = self.chain(table, name, vec![branch]);
                for branch in &mut back {
                    branch.stop = branch.stop.filter(|stop| *stop != Stop::Return);
                }
                return back;
            }
            Target::Return => branch.stop = Some(Stop::Return),
            Target::Accept => branch.stop = Some(Stop::Done(Fate::Passed)),
            Target::Drop => branch.stop = Some(Stop::Done(Fate::Dropped)),
            Target::Reject => branch.stop = Some(Stop::Done(Fate::Rejected)),
            Target::Translate(to) => {
                branch.to = *to;
                branch.stop = Some(Stop::Done(Fate::Passed));
            }
            Target::Mark(clear, flip) => branch.mark = branch.mark & !clear ^ flip,
            Target::Masquerade => {
                branch.masqueraded = true;
                branch.stop = Some(Stop::Done(Fate::Passed));
            }
            Target::Remember(set) => branch.remembered.push(set.clone()),
        }
        branch.remembered.extend(rule.sees.clone());
        vec![branch]
    }

    fn matches(&self, rule: &Parsed, branch: &Branch) -> bool {
        let Packet {
            source,
            destination: _,
            protocol,
            interface,
        } = self.packet;
        let is_local =
            |address: IpAddr| self.host.addresses.contains(&address) || address.is_loopback();
        let of_client = |list: &String| {
            let entry = (list.clone(), *source);
            self.host.clients.contains(&entry)
        };
        let through = |pattern: &String| match (interface, pattern.strip_suffix('+')) {
            (Some(interface), Some(prefix)) => interface.starts_with(prefix),
            (Some(interface), None) => interface == pattern,
            (None, _) => false,
        };
        rule.source
            .is_none_or(|(is, net)| net.contains(source) == is)
            && rule
                .destination
                .is_none_or(|(is, net)| net.contains(&branch.to.ip()) == is)
            && rule
                .interface
                .as_ref()
                .is_none_or(|(is, name)| through(name) == *is)
            && rule.protocol.is_none_or(|of| of == *protocol)
            && rule
                .ports
                .is_none_or(|(first, last)| (first..=last).contains(&branch.to.port()))
            && rule.states.as_ref().is_none_or(|(is, states)| {
                let translated = branch.to != self.packet.destination;
                let has = |state: &String| state == "NEW" || state == "DNAT" && translated;
                states.iter().any(has) == *is
            })
            && rule
                .mark
                .is_none_or(|(is, mask)| (branch.mark & mask == mask) == is)
            && (!rule.source_is_local || is_local(*source))
            && (!rule.destination_is_local || is_local(branch.to.ip()))
            && rule.set.as_ref().is_none_or(of_client)
            && rule.seen.as_ref().is_none_or(of_client)
    }
}
