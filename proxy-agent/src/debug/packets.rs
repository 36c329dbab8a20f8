//! What the rules make of a client's packets: the part of `explain` for the packet layer.

use std::{
    collections::BTreeSet,
    fmt::Write as _,
    net::{IpAddr, SocketAddr},
};

use serde::Serialize;

use super::{Error, client::Client, explain::Found, routes::route_to};
use crate::{
    backends::{
        iptables::{
            UNALLOCATED,
            host::Host,
            walk::{Decision, End, Fate, Packet, Walked},
        },
        own_addresses,
    },
    cli::Destination,
    daemon::namespaces,
    state::Family,
};

/// As many rules of others are printed for people; JSON has all.
const FOREIGN_SHOWN: usize = 8;

/// What becomes of the first packet of a connection.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Followed {
    /// Source address that was taken.
    pub source: IpAddr,
    /// What it comes in through; null for the node itself, and where no route tells.
    pub interface: Option<String>,
    /// All that chance leaves open.
    pub outcomes: Vec<Outcome>,
    /// Rules of somebody else on the way that this program cannot read; taken for rules that do not match.
    pub foreign: Vec<String>,
    /// What the rules call the destination; a field of the whole answer.
    #[serde(skip)]
    pub frontend: Option<Found>,
}

/// One thing that can become of it.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Outcome {
    /// "translate", "pass", "drop" or "refuse".
    pub verdict: &'static str,
    /// "address:port" that it goes to; null where it goes nowhere.
    pub to: Option<String>,
    /// From 0 to 1.
    pub chance: f64,
    /// Its source becomes an address of the node.
    pub masqueraded: bool,
    /// The client will be remembered at this endpoint (session affinity).
    pub remembered: bool,
    /// How many rules it meets.
    pub rules: usize,
    /// What decided: table, chains from the built-in one on, rule.
    pub decisions: Vec<Step>,
}

/// A rule that decided something.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Step {
    table: String,
    chains: Vec<String>,
    rule: String,
}

/// Follows a packet of `client` through the tables of the calling thread's network namespace.
///
/// # Errors
/// The client has no address of that family; the tables cannot be read.
pub fn follow(client: &Client, destination: Destination) -> Result<Followed, Error> {
    let to = destination.address;
    let own: BTreeSet<IpAddr> = addresses().collect();
    let source = source(client, to.ip(), &own)?;
    // What comes from an address comes in where the way to it goes out.
    let interface = (!client.on_host).then(|| route_to(source)?.interface);
    let packet = Packet {
        source,
        destination: to,
        protocol: destination.protocol,
        interface: interface
            .as_ref()
            .map(|found| found.as_deref().unwrap_or_default()),
    };
    let walked = Host::find(None)?.follow(&packet, &own)?;
    let protocol = destination.protocol.to_string();
    Ok(followed(walked, source, interface.flatten(), to, protocol))
}

fn addresses() -> impl Iterator<Item = IpAddr> {
    own_addresses().into_iter().flatten()
}

/// The address that packets of a client come from.
fn source(client: &Client, to: IpAddr, own: &BTreeSet<IpAddr>) -> Result<IpAddr, Error> {
    let family = Family::of(to);
    let is_global = |address: &IpAddr| match address {
        IpAddr::V4(v4) => !v4.is_loopback() && !v4.is_link_local(),
        IpAddr::V6(v6) => !v6.is_loopback() && !v6.is_unicast_link_local(),
    };
    let usable = |address: &IpAddr| Family::of(*address) == family && is_global(address);
    let found = match (client.address, &client.namespace) {
        (Some(address), _) => Some(address).filter(|address| Family::of(*address) == family),
        (None, Some(path)) => {
            let inside = namespaces::inside(path, || Ok(addresses().find(usable)));
            inside.ok().flatten()
        }
        (None, None) if client.on_host && to.is_loopback() => Some(to),
        (None, None) if client.on_host => route_to(to)
            .and_then(|route| route.source)
            .or_else(|| own.iter().copied().find(usable)),
        (None, None) => None,
    };
    found.ok_or_else(|| {
        let name = &client.name;
        Error::Client(format!(
            "{name} has no {family} address to reach {to} from: give one that it has"
        ))
    })
}

fn followed(
    Walked { mut ends, foreign }: Walked,
    source: IpAddr,
    interface: Option<String>,
    to: SocketAddr,
    protocol: String,
) -> Followed {
    ends.retain(|end| end.chance > 0.0);
    let named = ends.iter().find_map(End::frontend);
    let frontend = named.map(|named| Found {
        service: named.service,
        address: named.address,
        port: named.port,
        protocol,
        kind: named.kind.to_owned(),
    });
    let mut outcomes: Vec<Outcome> = Vec::new();
    for end in ends {
        let one = outcome(end, to);
        let same = |known: &&mut Outcome| {
            (
                known.verdict,
                &known.to,
                known.masqueraded,
                &known.decisions,
            ) == (one.verdict, &one.to, one.masqueraded, &one.decisions)
        };
        match outcomes.iter_mut().find(same) {
            Some(known) => known.chance += one.chance,
            None => outcomes.push(one),
        }
    }
    let foreign = foreign.into_iter();
    Followed {
        source,
        interface,
        outcomes,
        foreign: foreign
            .map(|(table, chain, rule)| format!("{table}: -A {chain} {rule}"))
            .collect(),
        frontend,
    }
}

fn outcome(end: End, to: SocketAddr) -> Outcome {
    let verdict = match end.fate {
        Fate::Dropped => "drop",
        Fate::Rejected => "refuse",
        Fate::Passed if end.to == to => "pass",
        Fate::Passed => "translate",
    };
    let step = |Decision {
                    table,
                    chains,
                    rule,
                }| Step {
        table: table.to_string(),
        chains,
        rule,
    };
    Outcome {
        verdict,
        to: (end.fate == Fate::Passed).then(|| end.to.to_string()),
        chance: end.chance,
        masqueraded: end.masqueraded,
        remembered: !end.remembered.is_empty(),
        rules: end.walked,
        decisions: end.decisions.into_iter().map(step).collect(),
    }
}

impl Followed {
    /// That of all outcomes, or "mixed".
    pub fn verdict(&self) -> &'static str {
        let mut verdicts = self.outcomes.iter().map(|outcome| outcome.verdict);
        let first = verdicts.next().unwrap_or("pass");
        match verdicts.all(|verdict| verdict == first) {
            true => first,
            false => "mixed",
        }
    }

    /// In a sentence.
    pub fn reason(&self) -> String {
        match (self.verdict(), self.outcomes.len()) {
            ("translate", 1) => "the rules leave one backend".to_owned(),
            ("translate", count) => {
                format!("the rules draw one of {count} backends for each connection")
            }
            ("pass", _) => "no rule translates or refuses its packets".to_owned(),
            ("drop", _) if self.is_unallocated() => {
                format!("a rule drops its packets: {UNALLOCATED}")
            }
            ("drop", _) => "a rule drops its packets".to_owned(),
            ("refuse", _) => "a rule rejects its packets".to_owned(),
            (_, count) => format!("the rules draw one of {count} outcomes for each connection"),
        }
    }

    fn is_unallocated(&self) -> bool {
        let mut decisions = self.outcomes.iter().flat_map(|outcome| &outcome.decisions);
        decisions.any(|step| step.rule.contains(UNALLOCATED))
    }

    /// As a person wants it: lines below those of the whole answer.
    pub fn table(&self) -> String {
        let through = self.interface.as_deref().unwrap_or("-");
        let mut text = format!("packet      from {} through {through}", self.source);
        // Writing to a string does not fail.
        for outcome in &self.outcomes {
            let percent = 100.0 * outcome.chance;
            let to = outcome.to.as_deref().unwrap_or_default();
            let and = |is, what| if is { what } else { "" };
            let _ = write!(
                text,
                "\n{percent:>9.3}%  {} {to}{}{}",
                outcome.verdict,
                and(outcome.masqueraded, ", masqueraded"),
                and(outcome.remembered, ", remembered"),
            );
            for Step {
                table,
                chains,
                rule,
            } in &outcome.decisions
            {
                let _ = write!(text, "\n{:>12}{table}: {}: {rule}", "", chains.join(" > "));
            }
        }
        for foreign in self.foreign.iter().take(FOREIGN_SHOWN) {
            let _ = write!(text, "\na rule of somebody else: {foreign}");
        }
        if let Some(more @ 1..) = self.foreign.len().checked_sub(FOREIGN_SHOWN) {
            let _ = write!(
                text,
                "\n{more} more rules of somebody else; -o json has them"
            );
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::backends::iptables::tables::Table;

    fn end(to: &str, chance: f64) -> End {
        let mut end = End::at(to.parse().unwrap());
        end.masqueraded = true;
        end.chance = chance;
        end.walked = 9;
        end.decisions.push(Decision {
            table: Table::Nat,
            chains: vec!["PREROUTING".to_owned(), "KUBE-SERVICES".to_owned()],
            rule: format!("-p tcp -j DNAT --to-destination {to}"),
        });
        end
    }

    fn answer(ends: Vec<End>) -> Followed {
        let foreign = BTreeSet::from([(
            Table::Nat,
            "PREROUTING".to_owned(),
            "-m odd -j RETURN".to_owned(),
        )]);
        let (source, to) = ([192, 0, 2, 7].into(), "10.96.0.1:80".parse().unwrap());
        let through = Some("eth0".to_owned());
        followed(
            Walked { ends, foreign },
            source,
            through,
            to,
            "TCP".to_owned(),
        )
    }

    #[test]
    fn the_answer_has_the_documented_shape() {
        let answer = answer(vec![
            end("10.244.0.9:8080", 0.25),
            end("10.244.0.9:8080", 0.75),
            end("10.244.0.9:8080", 0.0),
        ]);
        assert_eq!(
            serde_json::to_value(&answer).unwrap(),
            json!({
                "source": "192.0.2.7",
                "interface": "eth0",
                "outcomes": [{
                    "verdict": "translate",
                    "to": "10.244.0.9:8080",
                    "chance": 1.0,
                    "masqueraded": true,
                    "remembered": false,
                    "rules": 9,
                    "decisions": [{
                        "table": "nat",
                        "chains": ["PREROUTING", "KUBE-SERVICES"],
                        "rule": "-p tcp -j DNAT --to-destination 10.244.0.9:8080",
                    }],
                }],
                "foreign": ["nat: -A PREROUTING -m odd -j RETURN"],
            })
        );
        assert_eq!(answer.reason(), "the rules leave one backend");
        assert_eq!(
            answer.table(),
            "packet      from 192.0.2.7 through eth0\n  100.000%  translate 10.244.0.9:8080, masqueraded\n            \
             nat: PREROUTING > KUBE-SERVICES: -p tcp -j DNAT --to-destination 10.244.0.9:8080\n\
             a rule of somebody else: nat: -A PREROUTING -m odd -j RETURN"
        );
    }

    #[test]
    fn a_drop_of_what_no_service_has_says_why() {
        let mut dropped = end("10.96.0.1:80", 1.0);
        dropped.fate = Fate::Dropped;
        let plain = answer(vec![dropped.clone()]);
        assert_eq!(plain.reason(), "a rule drops its packets");
        let rule = &mut dropped.decisions[0].rule;
        *rule = format!("-d 10.96.0.0/16 -m comment --comment \"{UNALLOCATED}\" -j DROP");
        assert_eq!(
            answer(vec![dropped]).reason(),
            "a rule drops its packets: a ServiceCIDR has this address, and no Service has it at this port"
        );
    }

    #[test]
    fn outcomes_that_differ_are_mixed() {
        let passed = end("10.96.0.1:80", 0.5);
        let mut dropped = passed.clone();
        dropped.fate = Fate::Dropped;
        assert_eq!(answer(vec![dropped.clone()]).verdict(), "drop");
        assert_eq!(answer(vec![passed.clone()]).verdict(), "pass");
        assert_eq!(answer(vec![dropped, passed]).verdict(), "mixed");
        assert_eq!(answer(Vec::new()).verdict(), "pass");
    }
}
