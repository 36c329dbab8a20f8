//! The text of one transaction, and which service port each of its lines is for.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write,
};

use super::{
    names::ChainName,
    rules::{
        base::{Anchor, KUBELET_FIREWALL},
        found,
        tree::LeafKey,
    },
    save::{self, lines, ours},
    tables::Table,
};
use crate::{
    backends::Error,
    state::{Family, ServicePort},
};

/// What a table gets.
#[derive(Debug, Default)]
pub(super) struct Draft {
    /// By name, with their rules.
    pub(super) chains: BTreeMap<ChainName, Chain>,
    pub(super) anchors: Vec<Anchor>,
    pub(super) deletions: Vec<ChainName>,
    /// Those to take away.
    pub(super) lifted: Vec<Anchor>,
    /// kubelet's chain is missing.
    pub(super) makes_kubelet_firewall: bool,
}

/// A chain to write.
#[derive(Debug, Default)]
pub(super) struct Chain {
    pub(super) body: String,
    /// None for a chain of many Services.
    pub(super) owner: Option<ServicePort>,
}

/// What is not written of a draft.
#[derive(Clone, Debug, Default)]
pub(super) struct LeftOut {
    /// Their chains, and the rules that lead there, stay as they are.
    pub(super) services: BTreeSet<ServicePort>,
    /// No chain is removed: one that stayed may lead there.
    pub(super) deletions: bool,
}

/// The rules of a table that lead to Services: by what they match, for whom they are. A kube-proxy may have two for one
/// frontend.
#[derive(Debug, Default)]
pub(super) struct Dispatched(BTreeMap<LeafKey, Vec<(ServicePort, String)>>);

impl Dispatched {
    /// Reads them from what `iptables-save` says.
    ///
    /// # Errors
    /// The text ends in the middle.
    pub(super) fn read(text: &str, family: Family, table: Table) -> Result<Self, Error> {
        let mut dispatched = Self::default();
        for line in lines(text, table)? {
            if let save::Line::Rule(chain, rule) = line
                && let Some(chain) = ours(table, chain)
                && let Some((key, leaf)) = found::leaf(family, table, chain, rule)
            {
                let rules = dispatched.0.entry(key).or_default();
                rules.push((leaf.owner, rule.to_owned()));
            }
        }
        Ok(dispatched)
    }

    /// Those that match the same, for `owner`.
    fn rules<'a>(&'a self, key: &LeafKey, owner: &'a ServicePort) -> impl Iterator<Item = &'a str> {
        let rules = self.0.get(key).into_iter().flatten();
        let of_owner = rules.filter(move |(of, _)| of == owner);
        of_owner.map(|(_, rule)| rule.as_str())
    }
}

/// What a line of the text is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Line {
    /// A rule of a chain, or its declaration.
    Of(ChainName),
    /// Removes a chain.
    Deletion,
    /// Whatever every transaction has.
    Frame,
}

impl Draft {
    pub(super) fn is_empty(&self) -> bool {
        let Self {
            chains,
            anchors,
            deletions,
            lifted,
            makes_kubelet_firewall: _,
        } = self;
        chains.is_empty() && anchors.is_empty() && deletions.is_empty() && lifted.is_empty()
    }

    /// Service ports of which it writes something that the table does not hold.
    pub(super) fn owners(
        &self,
        family: Family,
        table: Table,
        dispatched: &Dispatched,
    ) -> BTreeSet<ServicePort> {
        let mut owners = BTreeSet::new();
        for (name, chain) in &self.chains {
            if let Some(owner) = &chain.owner {
                owners.insert(owner.clone());
                continue;
            }
            for rule in chain.body.lines() {
                if let Some((key, leaf)) = found::leaf(family, table, *name, rule)
                    && !dispatched.rules(&key, &leaf.owner).any(|of| of == rule)
                {
                    owners.insert(leaf.owner);
                }
            }
        }
        owners
    }

    /// The transaction: chains before rules, deletions last. `dispatched` matters only when something is left out.
    pub(super) fn text(
        &self,
        family: Family,
        table: Table,
        left_out: &LeftOut,
        dispatched: &Dispatched,
    ) -> Text {
        let mut text = Text::default();
        text.push(Line::Frame, format_args!("*{table}"));
        let is_written = |chain: &Chain| {
            let owner = chain.owner.as_ref();
            owner.is_none_or(|owner| !left_out.services.contains(owner))
        };
        let deletions: &[ChainName] = match left_out.deletions || !left_out.services.is_empty() {
            true => &[],
            false => &self.deletions,
        };
        let written = self.chains.iter().filter(|(_, chain)| is_written(chain));
        for name in written.clone().map(|(name, _)| name).chain(deletions) {
            text.push(Line::Of(*name), format_args!(":{name} - [0:0]"));
        }
        if self.makes_kubelet_firewall {
            text.push(Line::Frame, format_args!(":{KUBELET_FIREWALL} - [0:0]"));
        }
        let leaf_left_out = |name, rule: &str| {
            if left_out.services.is_empty() {
                return None;
            }
            let leaf = found::leaf(family, table, name, rule);
            leaf.filter(|(_, leaf)| left_out.services.contains(&leaf.owner))
        };
        for (name, chain) in written {
            for rule in chain.body.lines() {
                let mut push = |rule| text.push(Line::Of(*name), format_args!("-A {name} {rule}"));
                match leaf_left_out(*name, rule) {
                    Some((key, leaf)) => dispatched.rules(&key, &leaf.owner).for_each(push),
                    None => push(rule),
                }
            }
        }
        for Anchor { chain, rule } in &self.anchors {
            text.push(Line::Frame, format_args!("-I {chain} {rule}"));
        }
        for Anchor { chain, rule } in &self.lifted {
            text.push(Line::Frame, format_args!("-D {chain} {rule}"));
        }
        for name in deletions {
            text.push(Line::Deletion, format_args!("-X {name}"));
        }
        text.push(Line::Frame, format_args!("COMMIT"));
        text
    }
}

/// Lines, and what each is about.
#[derive(Debug, Default)]
pub(super) struct Text {
    pub(super) text: String,
    /// The number of the first of several lines about the same, from 1.
    starts: Vec<(usize, Line)>,
    lines: usize,
}

impl Text {
    fn push(&mut self, about: Line, line: std::fmt::Arguments<'_>) {
        self.lines += 1;
        if self.starts.last().is_none_or(|(_, last)| *last != about) {
            self.starts.push((self.lines, about));
        }
        // Writing to a string does not fail.
        let _ = writeln!(self.text, "{line}");
    }

    /// A line, counted from 1, and what it is about.
    pub(super) fn line(&self, number: usize) -> Option<(&Line, &str)> {
        let line = self.text.lines().nth(number.checked_sub(1)?)?;
        let at = self.starts.partition_point(|(start, _)| *start <= number);
        Some((&self.starts[at.checked_sub(1)?].1, line))
    }
}
