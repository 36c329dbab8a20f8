//! Tables in memory that are as strict as the tools, and a little more: a transaction goes in whole or not at all.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use super::super::{
    parsed::{Parsed, Target},
    tables::{AddressSet, RestoreError, Table, Tables},
};
use crate::{backends::Error, state::Family};

/// One table: built-in chains too.
pub type Chains = BTreeMap<String, Vec<String>>;

/// The tables of a host.
#[derive(Clone, Debug)]
pub struct Simulated {
    pub tables: BTreeMap<(Family, Table), Chains>,
    pub sets: BTreeSet<AddressSet>,
    /// Lines with one of these are refused.
    pub refuses: Vec<String>,
    /// A refusal names the line.
    pub names_lines: bool,
    /// One change in so many fails; 0 = none.
    pub fault_rate: u64,
    pub seed: u64,
    /// See [`Tables::piece`].
    pub piece: Option<usize>,
    /// What went in.
    pub log: Vec<(Family, Table, String)>,
}

impl Default for Simulated {
    fn default() -> Self {
        let chains = |names: &[&str]| -> Chains {
            names
                .iter()
                .map(|name| ((*name).to_owned(), Vec::new()))
                .collect()
        };
        let mut tables = BTreeMap::new();
        for family in [Family::V4, Family::V6] {
            let filter = chains(&["INPUT", "FORWARD", "OUTPUT"]);
            tables.insert((family, Table::Filter), filter);
            let nat = chains(&["PREROUTING", "INPUT", "OUTPUT", "POSTROUTING"]);
            tables.insert((family, Table::Nat), nat);
        }
        Self {
            tables,
            sets: BTreeSet::new(),
            refuses: Vec::new(),
            names_lines: true,
            fault_rate: 0,
            seed: 0,
            piece: None,
            log: Vec::new(),
        }
    }
}

/// The addresses of a rule.
fn addresses(rule: &Parsed) -> impl Iterator<Item = IpAddr> {
    let nets = [rule.source, rule.destination].into_iter().flatten();
    let to = match rule.target {
        Target::Translate(to) => Some(to.ip()),
        _ => None,
    };
    nets.map(|(_, net)| net.addr()).chain(to)
}

fn is_builtin(chain: &str) -> bool {
    ["INPUT", "FORWARD", "OUTPUT", "PREROUTING", "POSTROUTING"].contains(&chain)
}

impl Simulated {
    pub fn chains(&self, family: Family, table: Table) -> &Chains {
        &self.tables[&(family, table)]
    }

    fn fault(&mut self) -> Result<(), Error> {
        // splitmix64: enough for faults.
        self.seed = self.seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.seed ^ (self.seed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        match self.fault_rate > 0 && (mixed >> 32).is_multiple_of(self.fault_rate) {
            true => Err(Error::Injected),
            false => Ok(()),
        }
    }

    fn has_set(&self, name: &str, family: Family) -> bool {
        let first = AddressSet {
            name: name.to_owned(),
            family,
            timeout_seconds: 0,
        };
        let found = self.sets.range(first..).next();
        found.is_some_and(|set| (set.name.as_str(), set.family) == (name, family))
    }
}

/// A transaction half-way.
struct Transaction<'a> {
    tables: &'a Simulated,
    family: Family,
    chains: Chains,
    declared: BTreeSet<String>,
    /// Chains that rules lead to; known from the first removal on, after which no rule may follow.
    used: Option<BTreeSet<String>>,
}

impl Transaction<'_> {
    fn line(&mut self, line: &str) -> Result<(), String> {
        let mut refused = self.tables.refuses.iter();
        if let Some(refused) = refused.find(|word| line.contains(*word)) {
            return Err(format!("does not like {refused}"));
        }
        if let Some(rest) = line.strip_prefix(':') {
            return self.declare(rest.strip_suffix(" - [0:0]").ok_or("odd declaration")?);
        }
        let mut words = line.splitn(3, ' ');
        let (verb, name) = (words.next(), words.next().ok_or("no chain")?);
        match (verb, words.next()) {
            (Some("-A"), Some(rule)) => self.add(name, rule, false),
            (Some("-I"), Some(rule)) => self.add(name, rule, true),
            (Some("-D"), Some(rule)) => self.take_away(name, rule),
            (Some("-X"), None) => self.remove(name),
            _ => Err("odd line".to_owned()),
        }
    }

    fn declare(&mut self, name: &str) -> Result<(), String> {
        if is_builtin(name) || name.len() > 28 {
            return Err(format!("cannot declare {name}"));
        }
        if !self.declared.insert(name.to_owned()) {
            return Err(format!("{name} is declared twice"));
        }
        self.chains.insert(name.to_owned(), Vec::new());
        Ok(())
    }

    fn add(&mut self, name: &str, rule: &str, in_front: bool) -> Result<(), String> {
        let parsed = Parsed::new(rule)?;
        if addresses(&parsed).any(|address| Family::of(address) != self.family) {
            return Err("an address of the other family".to_owned());
        }
        if let Target::Chain(to) = &parsed.target
            && !self.chains.contains_key(to)
        {
            return Err(format!("there is no chain {to}"));
        }
        let added = match &parsed.target {
            Target::Remember(set) => Some(set),
            _ => None,
        };
        for set in parsed.set.iter().chain(added) {
            if !self.tables.has_set(set, self.family) {
                return Err(format!("there is no set {set}"));
            }
        }
        let rules = self.chains.get_mut(name);
        let rules = rules.ok_or(format!("there is no chain {name}"))?;
        let at = if in_front { 0 } else { rules.len() };
        rules.insert(at, rule.to_owned());
        match self.used {
            None => Ok(()),
            Some(_) => Err("a rule after a removal".to_owned()),
        }
    }

    fn take_away(&mut self, name: &str, rule: &str) -> Result<(), String> {
        let rules = self.chains.get_mut(name).ok_or("no such chain")?;
        let at = rules.iter().position(|known| known == rule);
        rules.remove(at.ok_or("no such rule")?);
        Ok(())
    }

    /// As nf_tables: no more than 15 jumps in a row.
    fn commit(&self) -> Result<(), String> {
        let mut depths = BTreeMap::new();
        let builtin = self.chains.keys().filter(|name| is_builtin(name));
        match builtin.map(|name| self.depth(name, &mut depths)).max() {
            Some(16..) => Err("too many links".to_owned()),
            _ => Ok(()),
        }
    }

    /// Jumps in a row, at most, from a chain on.
    fn depth<'a>(&'a self, chain: &'a str, depths: &mut BTreeMap<&'a str, usize>) -> usize {
        if let Some(depth) = depths.get(chain) {
            return *depth;
        }
        let rules = self.chains.get(chain).into_iter().flatten();
        let jumps = rules.filter_map(|rule| rule.rsplit_once("-j "));
        let targets = jumps.map(|(_, target)| target);
        let below = targets.filter(|target| self.chains.contains_key(*target));
        let depth = below
            .map(|target| 1 + self.depth(target, depths))
            .max()
            .unwrap_or(0);
        depths.insert(chain, depth);
        depth
    }

    fn remove(&mut self, name: &str) -> Result<(), String> {
        let used = self.used.get_or_insert_with(|| {
            let rules = self.chains.values().flatten();
            let jumps = rules.filter_map(|rule| rule.rsplit_once("-j "));
            jumps.map(|(_, target)| target.to_owned()).collect()
        });
        if used.contains(name) {
            return Err(format!("{name} is in use"));
        }
        match self.chains.remove(name) {
            Some(rules) if rules.is_empty() && !is_builtin(name) => Ok(()),
            _ => Err(format!("{name} is built in, missing or not empty")),
        }
    }
}

impl Tables for Simulated {
    fn families(&self) -> BTreeSet<Family> {
        [Family::V4, Family::V6].into()
    }

    fn read(
        &mut self,
        family: Family,
        table: Table,
        each: &mut dyn FnMut(&str),
    ) -> Result<(), Error> {
        each("# Generated by a test");
        each(&format!("*{table}"));
        let chains = self.chains(family, table);
        for name in chains.keys() {
            let policy = if is_builtin(name) { "ACCEPT" } else { "-" };
            each(&format!(":{name} {policy} [0:0]"));
        }
        for (name, rules) in chains {
            for rule in rules {
                each(&format!("-A {name} {rule}"));
            }
        }
        each("COMMIT");
        Ok(())
    }

    fn restore(&mut self, family: Family, table: Table, text: &str) -> Result<(), RestoreError> {
        self.fault()?;
        let mut transaction = Transaction {
            tables: self,
            family,
            chains: self.tables[&(family, table)].clone(),
            declared: BTreeSet::new(),
            used: None,
        };
        let lines = text.lines().count();
        for (at, line) in text.lines().enumerate() {
            let frame = match (at, at + 1 == lines) {
                (0, _) => Some(format!("*{table}")),
                (_, true) => Some("COMMIT".to_owned()),
                (_, false) => None,
            };
            let result = match frame {
                Some(frame) if frame == line && line == "COMMIT" => transaction.commit(),
                Some(frame) if frame == line => Ok(()),
                Some(frame) => Err(format!("{line} instead of {frame}")),
                None => transaction.line(line),
            };
            if let Err(message) = result {
                return Err(RestoreError::Refused {
                    line: self.names_lines.then_some(at + 1),
                    message: format!("{line}: {message}"),
                });
            }
        }
        let chains = transaction.chains;
        self.tables.insert((family, table), chains);
        self.log.push((family, table, text.to_owned()));
        Ok(())
    }

    fn piece(&self) -> Option<usize> {
        self.piece
    }

    fn sets(&mut self) -> Result<BTreeSet<AddressSet>, Error> {
        Ok(self.sets.clone())
    }

    fn create_sets(&mut self, sets: &BTreeSet<AddressSet>) -> Result<(), Error> {
        self.fault()?;
        for set in sets {
            let taken = [Family::V4, Family::V6].map(|family| self.has_set(&set.name, family));
            assert!(taken == [false; 2] && set.name.len() <= 31, "{set:?}");
            self.sets.insert(set.clone());
        }
        Ok(())
    }

    fn destroy_sets(&mut self, sets: &BTreeSet<AddressSet>) -> Result<(), Error> {
        self.fault()?;
        let chains = self.tables.values().flat_map(Chains::values);
        let words = chains.flatten().flat_map(|rule| rule.split(' '));
        let used: BTreeSet<&str> = words.collect();
        let is_free = |set: &AddressSet| !used.contains(set.name.as_str());
        assert!(sets.iter().all(is_free) && sets.is_subset(&self.sets));
        self.sets.retain(|set| !sets.contains(set));
        Ok(())
    }
}
