//! The rules as text for people: golden files, `dump rules`.

use std::{collections::BTreeMap, fmt::Write};

use super::{Key, known::Known, rules::Rules, tables::Table};
use crate::state::{DesiredState, Family};

/// All rules of a state, by table and chain.
pub fn describe(rules: &Rules, state: &DesiredState) -> String {
    let mut found: BTreeMap<Key, String> = BTreeMap::new();
    let mut note = |key, body: &str| {
        found.insert(key, body.to_owned());
    };
    let mut known = Known::default();
    known.take(rules, state, None, &mut note);
    known.render_all_shared(rules, &mut note);
    let mut text = String::new();
    let mut last = None;
    for (key, body) in &found {
        // Writing to a string does not fail.
        let _ = match key {
            Key::Set(set) => writeln!(
                text,
                "set {} {} timeout {}s",
                set.name, set.family, set.timeout_seconds
            ),
            Key::Chain(family, table, chain) => {
                header(&mut text, &mut last, *family, *table);
                body.lines()
                    .try_for_each(|rule| writeln!(text, "-A {chain} {rule}"))
            }
            Key::Anchor(family, table, anchor) => {
                header(&mut text, &mut last, *family, *table);
                writeln!(text, "-I {} {}", anchor.chain, anchor.rule)
            }
        };
    }
    text
}

fn header(text: &mut String, last: &mut Option<(Family, Table)>, family: Family, table: Table) {
    if last.replace((family, table)) != Some((family, table)) {
        let _ = writeln!(text, "*{table} {family}");
    }
}
