//! The text of one transaction, and which service port each of its lines is for.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write,
};

use super::{
    names::ChainName,
    rules::{
        base::{Anchor, KUBELET_FIREWALL},
        tree::is_leaf_of,
    },
    tables::Table,
};
use crate::state::ServicePort;

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
    /// Their chains stay as they are; those with true have no rule that leads to them either.
    pub(super) services: BTreeMap<ServicePort, bool>,
    /// No chain is removed: one that stayed may lead there.
    pub(super) deletions: bool,
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

    /// The transaction: chains before rules, deletions last. `present` are the chains of the table, which matter only when
    /// something is left out: a chain that is missing is created empty, so that rules can lead to it.
    pub(super) fn text(
        &self,
        table: Table,
        left_out: &LeftOut,
        present: &BTreeSet<ChainName>,
    ) -> Text {
        let mut text = Text::default();
        text.push(Line::Frame, format_args!("*{table}"));
        let is_written = |chain: &Chain| {
            let owner = chain.owner.as_ref();
            owner.is_none_or(|owner| !left_out.services.contains_key(owner))
        };
        let deletions: &[ChainName] = match left_out.deletions || !left_out.services.is_empty() {
            true => &[],
            false => &self.deletions,
        };
        let declared = self
            .chains
            .iter()
            .filter(|(name, chain)| is_written(chain) || !present.contains(*name));
        for name in declared.map(|(name, _)| name).chain(deletions) {
            text.push(Line::Of(*name), format_args!(":{name} - [0:0]"));
        }
        if self.makes_kubelet_firewall {
            text.push(Line::Frame, format_args!(":{KUBELET_FIREWALL} - [0:0]"));
        }
        let unreached: Vec<&ServicePort> = left_out
            .services
            .iter()
            .filter_map(|(owner, unreached)| unreached.then_some(owner))
            .collect();
        for (name, chain) in self.chains.iter().filter(|(_, chain)| is_written(chain)) {
            let is_kept = |rule: &&str| {
                chain.owner.is_some() || !unreached.iter().any(|owner| is_leaf_of(rule, owner))
            };
            for rule in chain.body.lines().filter(is_kept) {
                text.push(Line::Of(*name), format_args!("-A {name} {rule}"));
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
