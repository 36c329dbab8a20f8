//! A packet's way through the tables of this host.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fs,
    net::IpAddr,
};

use super::{Host, Table, Tables as _, run};
use crate::{
    backends::{
        Error,
        iptables::{
            save::{Line, lines},
            walk::{Packet, Walked, World, walk},
        },
    },
    state::Family,
};

/// One table: rules as text, which only those on a packet's way are read from.
#[derive(Debug, Default)]
struct Index<'a> {
    rules: HashMap<&'a str, Vec<&'a str>>,
    /// Built-in chains that drop what comes to their end.
    drops: BTreeSet<&'a str>,
}

impl<'a> Index<'a> {
    fn new(text: &'a str, table: Table) -> Result<Self, Error> {
        let mut index = Self::default();
        for line in lines(text, table)? {
            match line {
                Line::Chain(name, policy) => {
                    index.rules.entry(name).or_default();
                    if policy == "DROP" {
                        index.drops.insert(name);
                    }
                }
                Line::Rule(chain, rule) => index.rules.entry(chain).or_default().push(rule),
            }
        }
        Ok(index)
    }
}

struct Inside<'a> {
    tables: BTreeMap<Table, Index<'a>>,
    host: &'a Host,
    own: &'a BTreeSet<IpAddr>,
}

impl World for Inside<'_> {
    fn rules(&self, table: Table, chain: &str) -> Option<Vec<&str>> {
        self.tables.get(&table)?.rules.get(chain).cloned()
    }

    fn drops(&self, table: Table, chain: &str) -> bool {
        let index = self.tables.get(&table);
        index.is_some_and(|index| index.drops.contains(chain))
    }

    fn is_own(&self, address: IpAddr) -> bool {
        self.own.contains(&address)
    }

    fn is_in_set(&self, set: &str, client: IpAddr) -> bool {
        let Some(ipset) = &self.host.ipset else {
            return false;
        };
        let client = client.to_string();
        run::run(ipset, &["test", set, &client], "").is_ok_and(|output| output.success)
    }

    fn is_recent(&self, list: &str, client: IpAddr) -> bool {
        // `/proc/net` is that of the process's first thread.
        let list = fs::read_to_string(format!("/proc/thread-self/net/xt_recent/{list}"));
        list.is_ok_and(|list| is_listed(&list, client))
    }
}

/// Whether a list of xt_recent names a client. When it was seen last is told in jiffies since the start, which nothing here
/// can compare: one that is remembered no longer may be listed until the list is used again.
fn is_listed(list: &str, client: IpAddr) -> bool {
    let sources = list.lines().filter_map(|line| {
        let source = line.strip_prefix("src=")?.split(' ').next()?;
        source.parse::<IpAddr>().ok()
    });
    sources.into_iter().any(|source| source == client)
}

impl Host {
    /// Where a packet can come to by the rules that are in force; `own` are the node's addresses.
    ///
    /// # Errors
    /// The tables cannot be read.
    pub fn follow(&mut self, packet: &Packet<'_>, own: &BTreeSet<IpAddr>) -> Result<Walked, Error> {
        let family = Family::of(packet.source);
        let nat = self.save(family, Table::Nat)?;
        let filter = self.save(family, Table::Filter)?;
        let inside = Inside {
            tables: BTreeMap::from([
                (Table::Nat, Index::new(&nat, Table::Nat)?),
                (Table::Filter, Index::new(&filter, Table::Filter)?),
            ]),
            host: self,
            own,
        };
        Ok(walk(&inside, packet))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clients_are_found_in_a_list_of_both_families() {
        let list = "src=10.244.0.5 ttl: 64 last_seen: 4295 oldest_pkt: 1 4295\n\
            src=fd00:0010:0244:0000:0000:0000:0000:0005 ttl: 64 last_seen: 4295 oldest_pkt: 1 4295\n";
        for (client, expected) in [
            ("10.244.0.5", true),
            ("10.244.0.50", false),
            ("fd00:10:244::5", true),
        ] {
            assert_eq!(is_listed(list, client.parse().unwrap()), expected);
        }
    }

    #[test]
    fn chains_are_indexed_with_their_policies() {
        let text = "*filter\n:INPUT ACCEPT [0:0]\n:FORWARD DROP [0:0]\n:EMPTY - [0:0]\n-A INPUT -j EMPTY\n-A INPUT -j DROP\nCOMMIT\n";
        let index = Index::new(text, Table::Filter).unwrap();
        assert_eq!(index.rules["INPUT"], ["-j EMPTY", "-j DROP"]);
        assert!(index.rules["EMPTY"].is_empty() && !index.rules.contains_key("NONE"));
        assert_eq!(index.drops, BTreeSet::from(["FORWARD"]));
    }
}
