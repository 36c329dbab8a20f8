//! `dump rules`: what the kernel holds of the packet layer.

use std::fmt::Write as _;

use serde::Serialize;

use super::print::Report;
use crate::backends::{
    Error,
    iptables::{
        held::{Held, held},
        host::{Choice, Host},
    },
};

/// `dump rules`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Rules {
    /// The variant of iptables: "nft" or "legacy".
    variant: String,
    /// Why that one was read.
    why: String,
    /// Version of its tools.
    version: String,
    /// Sets of clients that stick to endpoints.
    sets: Vec<Set>,
    /// Tables with rules of ours.
    tables: Vec<Table>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
struct Set {
    name: String,
    family: String,
    timeout_seconds: u32,
}

/// One table of one family.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
struct Table {
    table: String,
    family: String,
    /// Rules in chains of others.
    jumps: Vec<Jump>,
    chains: Vec<Chain>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
struct Jump {
    chain: String,
    rule: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
struct Chain {
    chain: String,
    rules: Vec<String>,
}

/// Reads the tables of the calling thread's network namespace; an agent may run beside it.
///
/// # Errors
/// No tools, or they fail.
pub fn read() -> Result<Rules, Error> {
    let mut host = Host::find(None)?;
    let held = held(&mut host)?;
    Ok(rules(host.choice(), held))
}

fn rules(choice: &Choice, Held { sets, tables }: Held) -> Rules {
    let sets = sets.into_iter().map(|set| Set {
        name: set.name,
        family: set.family.to_string(),
        timeout_seconds: set.timeout_seconds,
    });
    let tables = tables.into_iter().map(|((family, table), held)| {
        let jumps = held.jumps.into_iter();
        let chains = held.chains.into_iter();
        Table {
            table: table.to_string(),
            family: family.to_string(),
            jumps: jumps.map(|(chain, rule)| Jump { chain, rule }).collect(),
            chains: chains
                .map(|(name, rules)| Chain {
                    chain: name.to_string(),
                    rules,
                })
                .collect(),
        }
    });
    Rules {
        variant: choice.variant.to_string(),
        why: choice.why.clone(),
        version: choice.version.clone(),
        sets: sets.collect(),
        tables: tables.collect(),
    }
}

impl Report for Rules {
    fn table(&self) -> String {
        let Self {
            variant,
            why,
            version,
            sets,
            tables,
        } = self;
        let mut text = format!("# iptables {version}, {variant}: {why}\n");
        if sets.is_empty() && tables.is_empty() {
            text.push_str("# no rules of Services\n");
        }
        // Writing to a string does not fail.
        for set in sets {
            let (name, family, seconds) = (&set.name, &set.family, set.timeout_seconds);
            let _ = writeln!(text, "set {name} {family} timeout {seconds}s");
        }
        for of in tables {
            let _ = writeln!(text, "*{} {}", of.table, of.family);
            for Jump { chain, rule } in &of.jumps {
                let _ = writeln!(text, "-A {chain} {rule}");
            }
            for Chain { chain, rules } in &of.chains {
                if rules.is_empty() {
                    let _ = writeln!(text, ":{chain}");
                }
                for rule in rules {
                    let _ = writeln!(text, "-A {chain} {rule}");
                }
            }
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use serde_json::json;

    use super::*;
    use crate::{
        backends::iptables::{
            held::HeldTable,
            host::Variant,
            names::ChainName,
            tables::{self, AddressSet},
        },
        state::Family,
    };

    fn choice() -> Choice {
        Choice {
            variant: Variant::Nft,
            why: "kubelet's chains are there".to_owned(),
            version: "1.8.9".to_owned(),
            stale: None,
        }
    }

    #[test]
    fn rules_have_the_documented_shape() {
        let set = AddressSet {
            name: "KUBE-SEP-X-600".to_owned(),
            family: Family::V6,
            timeout_seconds: 600,
        };
        let chain = |name| ChainName::new(name).unwrap();
        let nat = HeldTable {
            jumps: vec![("OUTPUT".to_owned(), "-j KUBE-SERVICES".to_owned())],
            chains: BTreeMap::from([
                (chain("KUBE-SERVICES"), vec!["-j KUBE-NODEPORTS".to_owned()]),
                (chain("KUBE-NODEPORTS"), Vec::new()),
            ]),
        };
        let rules = rules(
            &choice(),
            Held {
                sets: BTreeSet::from([set]),
                tables: BTreeMap::from([((Family::V6, tables::Table::Nat), nat)]),
            },
        );
        assert_eq!(
            serde_json::to_value(&rules).unwrap(),
            json!({
                "variant": "nft",
                "why": "kubelet's chains are there",
                "version": "1.8.9",
                "sets": [{"name": "KUBE-SEP-X-600", "family": "IPv6", "timeout_seconds": 600}],
                "tables": [{
                    "table": "nat",
                    "family": "IPv6",
                    "jumps": [{"chain": "OUTPUT", "rule": "-j KUBE-SERVICES"}],
                    "chains": [
                        {"chain": "KUBE-NODEPORTS", "rules": []},
                        {"chain": "KUBE-SERVICES", "rules": ["-j KUBE-NODEPORTS"]},
                    ],
                }],
            })
        );
        assert_eq!(
            rules.table(),
            "# iptables 1.8.9, nft: kubelet's chains are there\nset KUBE-SEP-X-600 IPv6 timeout 600s\n*nat IPv6\n\
            -A OUTPUT -j KUBE-SERVICES\n:KUBE-NODEPORTS\n-A KUBE-SERVICES -j KUBE-NODEPORTS\n"
        );
    }

    #[test]
    fn a_node_without_rules_says_so() {
        let none = rules(&choice(), Held::default()).table();
        assert!(none.ends_with("# no rules of Services\n"), "{none}");
    }
}
