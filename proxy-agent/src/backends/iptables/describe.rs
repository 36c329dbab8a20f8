//! The rules as text for people: golden files, `dump rules`.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write,
};

use super::{
    Key,
    known::Known,
    names::ChainName,
    rules::Rules,
    tables::{AddressSet, Table},
};
use crate::state::{DesiredState, Family};

/// One table as text.
#[derive(Default)]
struct Described {
    jumps: String,
    chains: BTreeMap<ChainName, String>,
}

/// All sets and rules of a state; a table's jumps, each to the front, before its chains.
pub fn describe(rules: &Rules, state: &DesiredState) -> String {
    let mut sets: BTreeSet<AddressSet> = BTreeSet::new();
    let mut tables: BTreeMap<(Family, Table), Described> = BTreeMap::new();
    // Writing to a string does not fail.
    let mut note = |key, body: &str| match key {
        Key::Set(set) => {
            sets.insert(set);
        }
        Key::Chain(family, table, chain) => {
            let rules = tables.entry((family, table)).or_default();
            let rules = rules.chains.entry(chain).or_default();
            for rule in body.lines() {
                let _ = writeln!(rules, "-A {chain} {rule}");
            }
        }
        Key::Anchor(family, table, anchor) => {
            let jumps = &mut tables.entry((family, table)).or_default().jumps;
            let _ = writeln!(jumps, "-I {} {}", anchor.chain, anchor.rule);
        }
    };
    let mut rules = rules.clone();
    rules.learn(state);
    let mut known = Known::default();
    known.take(&rules, state, None, &mut note);
    known.render_all_shared(&rules, &mut note);
    let mut text = String::new();
    for set in sets {
        let AddressSet {
            name,
            family,
            timeout_seconds,
        } = set;
        let _ = writeln!(text, "set {name} {family} timeout {timeout_seconds}s");
    }
    for ((family, table), Described { jumps, chains }) in tables {
        let _ = writeln!(text, "*{table} {family}");
        text.push_str(&jumps);
        text.extend(chains.into_values());
    }
    text
}
