//! Chains that serve many Services.

use std::collections::{BTreeMap, BTreeSet};

use super::{
    Key,
    known::{Change, Known},
    names::ChainName,
    rules::{
        Rules, Sink, base,
        tree::{LeafKey, Root, Tree, Wanted},
    },
    tables::Table,
};
use crate::state::Family;

/// Whether a chain serves no single Service.
pub(super) fn is_shared(table: Table, chain: ChainName) -> bool {
    base::is_base(table, chain) || Root::of(table, chain, false).is_some()
}

impl Known {
    /// Renders what belongs to no single Service: the anchors, and those chains that are `wanted`.
    pub(super) fn render_shared(
        &self,
        rules: &Rules,
        family: Family,
        table: Table,
        wanted: &Wanted<'_>,
        sink: &mut Sink<'_>,
    ) {
        base::render(rules, family, table, sink);
        for root in Root::ALL.into_iter().filter(|root| root.table() == table) {
            self.render_root(rules, family, root, wanted, sink);
        }
    }

    /// As above, all of all tables.
    pub(super) fn render_all_shared(&self, rules: &Rules, sink: &mut Sink<'_>) {
        for &family in &rules.families {
            for table in [Table::Filter, Table::Nat] {
                self.render_shared(rules, family, table, &|_, _| true, sink);
            }
        }
    }

    /// Renders a root and the wanted chains below it; returns the names of all below it.
    fn render_root(
        &self,
        rules: &Rules,
        family: Family,
        root: Root,
        wanted: &Wanted<'_>,
        sink: &mut Sink<'_>,
    ) -> BTreeSet<ChainName> {
        let mut names = BTreeSet::new();
        let tree = Tree {
            family,
            root,
            wanted,
        };
        let mut body = tree.render(&self.leaves, &mut names, sink);
        base::finish(rules, family, root, &self.addresses, &mut body);
        body.send(family, root.table(), root.chain(), sink);
        names
    }

    /// Renders the shared chains that a change touches; returns those observed that lead nowhere any more.
    pub(super) fn render_changed(
        &self,
        rules: &Rules,
        change: &Change,
        observed: &BTreeMap<Key, u64>,
        sink: &mut Sink<'_>,
    ) -> BTreeSet<Key> {
        let mut stale = BTreeSet::new();
        for &family in &rules.families {
            for root in Root::ALL {
                let mut leaves = change.leaves.iter();
                let of_root = |key: &LeafKey| (key.family, key.root) == (family, root);
                let is_changed = leaves.any(of_root) || change.addresses && root == Root::Services;
                if !is_changed {
                    continue;
                }
                let key = |chain| Key::Chain(family, root.table(), chain);
                let changed = || change.leaves.iter().filter(|leaf| of_root(leaf));
                let wanted: &Wanted<'_> = &|chain, leads_to| {
                    !observed.contains_key(&key(chain)) || changed().any(leads_to)
                };
                let names = self.render_root(rules, family, root, wanted, sink);
                let first = key(ChainName::fixed(root.prefix()));
                let below = observed.range(first..).map(|(key, _)| key);
                let below = below.take_while(
                    |key| matches!(key, Key::Chain(_, _, chain) if root.is_above(*chain)),
                );
                let is_stale =
                    |key: &&Key| matches!(key, Key::Chain(_, _, chain) if !names.contains(chain));
                stale.extend(below.filter(is_stale).cloned());
            }
        }
        stale
    }
}
