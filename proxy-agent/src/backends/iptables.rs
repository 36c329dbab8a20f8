//! The packet layer on iptables: Services as rules in the tables `nat` and `filter`.
//!
//! [`IptablesBackend`] keeps the rules behind [`Tables`] level with a desired state. What it found there, be it its own or
//! a kube-proxy's, is observed state like any other: the same diff takes it over.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::{self, Display},
};

use crate::{
    backends::{Backend, Bounds, Error},
    plan::{Plan, diff},
    state::{DesiredState, Family, ServicePort},
};

mod apply;
mod bulk;
mod describe;
mod draft;
pub mod held;
pub mod host;
mod known;
pub mod leftovers;
pub mod names;
mod parsed;
mod remove;
pub mod rival;
mod rule;
pub mod rules;
mod save;
mod shared;
pub mod tables;
pub mod walk;
pub mod watch;

pub use describe::describe;
use known::Known;
use names::ChainName;
pub use remove::{Extent, Removed, remove};
use rival::Rivals;
pub use rules::base::{Anchor, UNALLOCATED};
use rules::{
    Rules, base,
    tree::{Leaf, LeafKey},
};
use save::{Reader, digest};
use shared::is_shared;
use tables::{AddressSet, Table, Tables};

/// What a change is about.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Key {
    /// A set of clients.
    Set(AddressSet),
    /// A chain of ours with its rules.
    Chain(Family, Table, ChainName),
    /// A rule of ours in a chain of somebody else.
    Anchor(Family, Table, Anchor),
}

impl Key {
    /// Whether no kube-proxy makes such a thing: what `cleanup` may remove beside one.
    pub fn is_ours_alone(&self) -> bool {
        match self {
            Self::Set(_) => true,
            Self::Chain(_, table, chain) => base::is_ours_alone(*table, *chain),
            Self::Anchor(..) => false,
        }
    }
}

impl Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Set(set) => write!(f, "set {} {}", set.name, set.family),
            Self::Chain(family, table, chain) => write!(f, "chain {table} {chain} {family}"),
            Self::Anchor(family, table, anchor) => {
                write!(f, "rule {table} {} {} {family}", anchor.chain, anchor.rule)
            }
        }
    }
}

/// Whether a set is one of ours.
fn is_own_set(set: &AddressSet) -> bool {
    let mut prefixes = ["KUBE-SEP-", "KUBE-GRP-"].iter();
    prefixes.any(|prefix| set.name.starts_with(prefix))
}

/// What is counted of the rules.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Rules in our chains when they were read last.
    pub held: BTreeMap<(Family, Table), usize>,
    /// Rules that the last apply wrote.
    pub written: BTreeMap<(Family, Table), usize>,
    /// How often iptables-restore failed or refused, in all; the second number for a part of the rules only.
    pub failures: BTreeMap<Family, (u64, u64)>,
}

/// Keeps the rules of a network namespace level with a desired state.
///
/// One entry per chain: the digest of its rules. Their text exists only while a plan is applied.
#[derive(Debug)]
pub struct IptablesBackend<T> {
    tables: T,
    rules: Rules,
    known: Known,
    /// Chains of ours that rules of others use: emptied, never removed.
    referenced: BTreeSet<(Family, Table, ChainName)>,
    has_kubelet_firewall: bool,
    /// What was dispatched when it was observed, while that may have to stay.
    found: Vec<(LeafKey, Leaf)>,
    /// The order of the tables in the next apply.
    filter_first: bool,
    /// Chains of the next apply that were not there when it was planned; noted only where they may be too many for one
    /// transaction.
    absent: BTreeSet<Key>,
    left_out: BTreeMap<ServicePort, String>,
    /// The next apply writes all that is missing, also what was left out.
    retries_left_out: bool,
    counts: Counts,
    /// None while nobody else is looked out for.
    rivals: Option<Rivals>,
    /// What of another proxy was there when it was observed last.
    of_rivals: rival::Found,
}

impl<T: Tables> IptablesBackend<T> {
    /// A backend over tables that may hold anything.
    pub fn new(tables: T, rules: Rules) -> Self {
        Self {
            tables,
            rules,
            known: Known::default(),
            referenced: BTreeSet::new(),
            has_kubelet_firewall: false,
            found: Vec::new(),
            filter_first: true,
            absent: BTreeSet::new(),
            left_out: BTreeMap::new(),
            retries_left_out: false,
            counts: Counts::default(),
            rivals: None,
            of_rivals: rival::Found::default(),
        }
    }

    /// Writes nothing while another proxy serves the node.
    #[must_use]
    pub fn beside(mut self, rivals: Rivals) -> Self {
        self.rivals = Some(rivals);
        self
    }

    /// Who else serves the node, if that is looked out for.
    pub fn rivals(&mut self) -> Option<&mut Rivals> {
        self.rivals.as_mut()
    }

    /// Whether kube-proxy's canaries were there when it was observed last.
    pub fn has_canaries(&self) -> bool {
        self.of_rivals.canary
    }

    /// What another proxy left is removed: what is found from now on, it made again.
    pub fn rivals_cleared(&mut self) {
        self.of_rivals = rival::Found::default();
        if let Some(rivals) = &mut self.rivals {
            rivals.decision().cleared();
        }
    }

    /// The tables.
    pub fn tables(&self) -> &T {
        &self.tables
    }

    /// The tables. Whoever writes rules here has to observe afterwards.
    pub fn tables_mut(&mut self) -> &mut T {
        &mut self.tables
    }

    /// Serves these families from now on. Whoever calls it has everything planned again.
    pub fn serve(&mut self, families: BTreeSet<Family>) {
        self.rules.families = families;
        self.known = Known::default();
    }

    /// What is counted of the rules.
    pub fn counts(&self) -> &Counts {
        &self.counts
    }

    /// Service ports that the tool refuses, with what it said. They are tried again when everything is planned again.
    pub fn left_out(&self) -> &BTreeMap<ServicePort, String> {
        &self.left_out
    }
}

impl<T: Tables> Backend for IptablesBackend<T> {
    type Key = Key;
    type Value = u64;

    fn plan(
        &mut self,
        observed: &BTreeMap<Key, u64>,
        state: &DesiredState,
        bounds: Bounds<'_>,
    ) -> Plan<Key, u64> {
        if bounds.scope.is_none() {
            self.rules.learn(state);
        }
        let mut desired = BTreeMap::new();
        let mut note = |key, body: &str| {
            desired.insert(key, digest(body));
        };
        let change = self.known.take(&self.rules, state, bounds.scope, &mut note);
        // What is served from now on must not meet a moment without either; what no longer is comes second.
        self.filter_first = change.refuses_more && !change.refuses_less;
        let mut plan = match bounds.scope {
            None => {
                let found = std::mem::take(&mut self.found);
                if let Some(touched) = bounds.touched {
                    self.known.keep(&found, touched.services);
                    self.found = found;
                }
                self.known.render_all_shared(&self.rules, &mut note);
                diff(observed, &desired)
            }
            Some(_) => {
                let mut concerned =
                    self.known
                        .render_changed(&self.rules, &change, observed, &mut note);
                concerned.extend(change.before);
                concerned.extend(desired.keys().cloned());
                let held = concerned.into_iter();
                let held = held.filter_map(|key| observed.get(&key).map(|value| (key, *value)));
                diff(&held.collect(), &desired)
            }
        };
        self.spare_referenced(observed, &mut plan);
        if let Some(touched) = bounds.touched {
            let free: BTreeSet<&Key> = self.known.keys_of(touched.services).collect();
            let is_shared = |key: &Key| match key {
                Key::Set(_) => false,
                Key::Anchor(..) => true,
                Key::Chain(_, table, chain) => is_shared(*table, *chain),
            };
            let may_change = |key: &Key| free.contains(key) || is_shared(key);
            plan.deletions.clear();
            plan.upserts
                .retain(|(key, _)| !observed.contains_key(key) || may_change(key));
        }
        let upserts = plan.upserts.iter().map(|(key, _)| key);
        let absent = upserts.filter(|key| !observed.contains_key(key));
        self.absent = match self.piece(plan.upserts.len()) {
            Some(_) => absent.cloned().collect(),
            None => BTreeSet::new(),
        };
        self.retries_left_out = bounds.scope.is_none();
        if self.retries_left_out && plan.is_empty() {
            self.left_out.clear();
        }
        plan
    }

    fn observe(&mut self) -> Result<BTreeMap<Key, u64>, Error> {
        let sets = self.tables.sets()?;
        let sets = sets.into_iter().filter(is_own_set);
        let mut found: BTreeMap<_, _> = sets.map(|set| (Key::Set(set), digest(""))).collect();
        self.referenced.clear();
        self.found.clear();
        let mut of_rivals = rival::Found::default();
        for &family in &self.rules.families {
            for table in [Table::Filter, Table::Nat] {
                let anchors = base::anchors(&self.rules, family);
                let anchors: Vec<_> = anchors.filter(|(of, _)| *of == table).collect();
                let anchors: Vec<_> = anchors.into_iter().map(|(_, anchor)| anchor).collect();
                let mut reader = Reader::new(family, table, &anchors);
                self.tables.read(family, table, &mut |line| {
                    of_rivals.add(line);
                    reader.add(line);
                })?;
                let saved = reader.finish()?;
                if (family, table) == (Family::V4, Table::Filter) {
                    self.has_kubelet_firewall = saved.has_kubelet_firewall;
                }
                self.found.extend(saved.leaves);
                self.counts.held.insert((family, table), saved.rules);
                let chains = saved.chains.into_iter();
                found.extend(chains.map(|(chain, of)| (Key::Chain(family, table, chain), of)));
                let anchors = saved.anchors.into_iter();
                found
                    .extend(anchors.map(|anchor| (Key::Anchor(family, table, anchor), digest(""))));
                let referenced = saved.referenced.into_iter();
                self.referenced
                    .extend(referenced.map(|chain| (family, table, chain)));
            }
        }
        // What the tool refuses to replace is as a former proxy wrote it.
        of_rivals.rules &= self.left_out.is_empty();
        self.of_rivals = of_rivals;
        Ok(found)
    }

    /// A plan that deletes keys which [`Backend::observe`] gave, and has no upserts, is a clean-up.
    ///
    /// One transaction per family and table, in an order that leaves no packet untranslated that the old and the new state
    /// translate (docs/ARCHITECTURE.md).
    fn apply(&mut self, plan: &Plan<Key, u64>, state: &DesiredState) -> Result<(), Error> {
        let before = match self.retries_left_out {
            true => std::mem::take(&mut self.left_out),
            false => BTreeMap::new(),
        };
        let result = apply::apply(self, plan, state);
        if result.is_err() {
            for (owner, message) in before {
                self.left_out.entry(owner).or_insert(message);
            }
        }
        result
    }

    /// Rules are in force once they are in the table.
    fn publish(&mut self) -> Result<(), Error> {
        Ok(())
    }

    fn has_left_out(&self) -> bool {
        !self.left_out.is_empty()
    }

    fn yields(&mut self) -> bool {
        let found = self.of_rivals;
        let stance = self.rivals.as_mut().map(|rivals| rivals.look(found));
        matches!(stance, Some(rival::Stance::Observe(_)))
    }
}

impl<T: Tables> IptablesBackend<T> {
    /// Whether rules of others use it.
    fn is_referenced(&self, key: &Key) -> bool {
        matches!(key, Key::Chain(family, table, chain) if self.referenced.contains(&(*family, *table, *chain)))
    }

    /// A chain that somebody else's rule jumps to cannot go: it is emptied.
    fn spare_referenced(&self, observed: &BTreeMap<Key, u64>, plan: &mut Plan<Key, u64>) {
        let empty = digest("");
        let upserts = &mut plan.upserts;
        plan.deletions.retain(|key| {
            let is_referenced = self.is_referenced(key);
            if is_referenced && observed.get(key) != Some(&empty) {
                upserts.push((key.clone(), empty));
            }
            !is_referenced
        });
    }
}

#[cfg(test)]
mod tests;
