//! What the tables hold of ours, word by word: for `dump rules`.

use std::collections::{BTreeMap, BTreeSet};

use super::{
    is_own_set,
    names::ChainName,
    rules::{Rules, base},
    save::{Line, lines, ours, target},
    tables::{AddressSet, Table, Tables},
};
use crate::{backends::Error, state::Family};

/// What the tables of a network namespace hold of ours.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Held {
    /// Sets of clients.
    pub sets: BTreeSet<AddressSet>,
    /// Tables that hold anything.
    pub tables: BTreeMap<(Family, Table), HeldTable>,
}

/// What one table holds of ours. A rule is what `iptables-save` prints after the name of its chain.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HeldTable {
    /// Rules in chains of others: the chain, and the rule.
    pub jumps: Vec<(String, String)>,
    /// Our chains, those with kube-proxy's names among them.
    pub chains: BTreeMap<ChainName, Vec<String>>,
}

/// Reads the tables of all families.
///
/// # Errors
/// They cannot be read.
pub fn held<T: Tables>(tables: &mut T) -> Result<Held, Error> {
    let mut sets = tables.sets()?;
    sets.retain(is_own_set);
    let mut held = Held {
        sets,
        tables: BTreeMap::new(),
    };
    for family in tables.families() {
        for table in [Table::Filter, Table::Nat] {
            let of_table = read(&tables.save(family, table)?, family, table)?;
            if of_table != HeldTable::default() {
                held.tables.insert((family, table), of_table);
            }
        }
    }
    Ok(held)
}

fn read(text: &str, family: Family, table: Table) -> Result<HeldTable, Error> {
    let rules = Rules {
        localhost_node_ports: true,
        ..Rules::any()
    };
    let is_anchor = |chain: &str, rule: &str| {
        base::anchors(&rules, family)
            .any(|(of, anchor)| of == table && (anchor.chain, anchor.rule) == (chain, rule))
    };
    let leads_to_ours = |rule| target(rule).is_some_and(|target| ours(table, target).is_some());
    let mut held = HeldTable::default();
    for line in lines(text, table)? {
        match line {
            Line::Chain(name, _) => {
                if let Some(name) = ours(table, name) {
                    held.chains.entry(name).or_default();
                }
            }
            Line::Rule(chain, rule) => match ours(table, chain) {
                Some(name) => held.chains.entry(name).or_default().push(rule.to_owned()),
                None if leads_to_ours(rule) || is_anchor(chain, rule) => {
                    held.jumps.push((chain.to_owned(), rule.to_owned()));
                }
                None => {}
            },
        }
    }
    Ok(held)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chains_and_jumps_of_ours_are_held_and_rules_of_others_are_not() {
        let text = "*filter\n:INPUT ACCEPT [0:0]\n:KUBE-FIREWALL - [0:0]\n:KUBE-FORWARD - [0:0]\n:KUBE-NODEPORTS - [0:0]\n\
            :FOREIGN - [0:0]\n-A INPUT -j FOREIGN\n-A INPUT -j KUBE-FIREWALL\n-A INPUT -g KUBE-FORWARD\n\
            -A KUBE-FORWARD -j ACCEPT\n-A FOREIGN -j ACCEPT\nCOMMIT\n";
        let jump = |chain: &str, rule: &str| (chain.to_owned(), rule.to_owned());
        let chain = |name| ChainName::new(name).unwrap();
        let expected = |jumps| HeldTable {
            jumps,
            chains: BTreeMap::from([
                (chain("KUBE-FORWARD"), vec!["-j ACCEPT".to_owned()]),
                (chain("KUBE-NODEPORTS"), Vec::new()),
            ]),
        };
        let to_forward = jump("INPUT", "-g KUBE-FORWARD");
        assert_eq!(
            read(text, Family::V4, Table::Filter).unwrap(),
            expected(vec![jump("INPUT", "-j KUBE-FIREWALL"), to_forward.clone()])
        );
        // The guard is of IPv4.
        assert_eq!(
            read(text, Family::V6, Table::Filter).unwrap(),
            expected(vec![to_forward])
        );
        assert_eq!(
            read("", Family::V4, Table::Nat).unwrap(),
            HeldTable::default()
        );
    }
}
