//! Carrying out a plan, and what happens when the tool refuses a line.

use std::collections::{BTreeMap, BTreeSet};

use super::{
    IptablesBackend, Key,
    draft::{Chain, Dispatched, Draft, LeftOut, Line, Text},
    names::ChainName,
    rules::{
        base::{self, Anchor, KUBELET_FIREWALL},
        found, service,
        tree::Wanted,
    },
    shared::is_shared,
    tables::{AddressSet, RestoreError, Table, Tables},
};
use crate::{
    backends::Error,
    plan::Plan,
    state::{DesiredState, Family, ServicePort},
};

/// Transactions that are tried before a table is given up.
const ATTEMPTS: u32 = 100;

/// See [`crate::backends::Backend::apply`].
pub(super) fn apply<T: Tables>(
    backend: &mut IptablesBackend<T>,
    plan: &Plan<Key, u64>,
    state: &DesiredState,
) -> Result<(), Error> {
    backend.counts.written.clear();
    let new = sets(plan.upserts.iter().map(|(key, _)| key));
    if !new.is_empty() {
        backend.tables.create_sets(&new)?;
    }
    let order = match backend.filter_first {
        true => [Table::Filter, Table::Nat],
        false => [Table::Nat, Table::Filter],
    };
    for table in order {
        for family in backend.rules.families.clone() {
            let draft = backend.draft(family, table, plan, state);
            if !draft.is_empty() {
                backend.carry_out(family, table, draft)?;
            }
        }
    }
    let old = sets(plan.deletions.iter());
    if !old.is_empty() {
        backend.tables.destroy_sets(&old)?;
    }
    Ok(())
}

fn sets<'a>(keys: impl Iterator<Item = &'a Key>) -> BTreeSet<AddressSet> {
    let sets = keys.filter_map(|key| match key {
        Key::Set(set) => Some(set.clone()),
        Key::Chain(..) | Key::Anchor(..) => None,
    });
    sets.collect()
}

impl<T: Tables> IptablesBackend<T> {
    fn carry_out(&mut self, family: Family, table: Table, mut draft: Draft) -> Result<(), Error> {
        self.write_ahead(family, table, &mut draft)?;
        let old = self.left_behind(&mut draft);
        let is_complete = Attempt::new(self, family, table, draft).carry_out()?;
        // Otherwise a chain that stayed may lead there.
        if is_complete && !self.remove_pieces(family, table, &old)? {
            let draft = Draft {
                deletions: old,
                ..Draft::default()
            };
            Attempt::new(self, family, table, draft).carry_out()?;
        }
        Ok(())
    }

    /// What a plan does to one table.
    fn draft(
        &self,
        family: Family,
        table: Table,
        plan: &Plan<Key, u64>,
        state: &DesiredState,
    ) -> Draft {
        let chain = |key: &Key| match key {
            Key::Chain(f, t, chain) if (*f, *t) == (family, table) => Some(*chain),
            Key::Set(_) | Key::Chain(..) | Key::Anchor(..) => None,
        };
        let wanted = plan.upserts.iter().filter_map(|(key, _)| chain(key));
        let anchor = |key: &Key| match key {
            Key::Anchor(f, t, anchor) if (*f, *t) == (family, table) => Some(*anchor),
            Key::Set(_) | Key::Chain(..) | Key::Anchor(..) => None,
        };
        let missing = plan.upserts.iter().filter_map(|(key, _)| anchor(key));
        let missing: BTreeSet<Anchor> = missing.collect();
        // kubelet has the guard and the jumps to it as well.
        let is_jump = |anchor: &Anchor| {
            let guard = KUBELET_FIREWALL.as_str();
            anchor.chain != guard && !anchor.rule.ends_with(guard)
        };
        let lifted = plan.deletions.iter().filter_map(anchor);
        let anchors = base::anchors(&self.rules, family);
        let anchors = anchors.filter(|(of, anchor)| *of == table && missing.contains(anchor));
        let mut names = missing.iter().map(|anchor| anchor.chain);
        let guards = names.any(|name| name == KUBELET_FIREWALL.as_str());
        Draft {
            chains: self.chains(family, table, &wanted.collect(), state),
            anchors: anchors.map(|(_, anchor)| anchor).collect(),
            deletions: plan.deletions.iter().filter_map(chain).collect(),
            lifted: lifted.filter(is_jump).collect(),
            makes_kubelet_firewall: guards && !self.has_kubelet_firewall,
        }
    }

    /// Renders some chains of a table; empty are those that nobody asks for any more.
    fn chains(
        &self,
        family: Family,
        table: Table,
        wanted: &BTreeSet<ChainName>,
        state: &DesiredState,
    ) -> BTreeMap<ChainName, Chain> {
        let empty = wanted.iter().map(|name| (*name, Chain::default()));
        let mut chains: BTreeMap<ChainName, Chain> = empty.collect();
        let mut add = |key, body: &str, owner: Option<&ServicePort>| match key {
            Key::Chain(f, t, name) if (f, t) == (family, table) && wanted.contains(&name) => {
                let body = body.to_owned();
                let owner = owner.cloned();
                chains.insert(name, Chain { body, owner });
            }
            Key::Set(_) | Key::Chain(..) | Key::Anchor(..) => {}
        };
        if wanted.iter().any(|chain| is_shared(table, *chain)) {
            let is_wanted: &Wanted<'_> = &|chain, _| wanted.contains(&chain);
            let mut add = |key, body: &str| add(key, body, None);
            self.known
                .render_shared(&self.rules, family, table, is_wanted, &mut add);
        }
        if table == Table::Nat && !wanted.is_empty() {
            let services = state.services.iter();
            for (port, service) in services.filter(|(port, _)| port.family == family) {
                let mut add = |key, body: &str| add(key, body, Some(port));
                service::render(&self.rules, service, &mut add);
            }
        }
        chains
    }
}

/// A transaction that is tried until it goes in.
struct Attempt<'a, T> {
    backend: &'a mut IptablesBackend<T>,
    family: Family,
    table: Table,
    draft: Draft,
    left_out: LeftOut,
    /// As it was before; read when something is refused.
    dispatched: Dispatched,
    attempts: u32,
    /// What the tool said last.
    message: String,
}

impl<'a, T: Tables> Attempt<'a, T> {
    fn new(
        backend: &'a mut IptablesBackend<T>,
        family: Family,
        table: Table,
        draft: Draft,
    ) -> Self {
        Self {
            backend,
            family,
            table,
            draft,
            left_out: LeftOut::default(),
            dispatched: Dispatched::default(),
            attempts: 0,
            message: String::new(),
        }
    }

    /// False if something was left out.
    fn carry_out(mut self) -> Result<bool, Error> {
        let mut said = BTreeMap::new();
        loop {
            let text = self.text(&self.left_out);
            let Some(line) = self.restore(&text)? else {
                break;
            };
            let message = self.message.clone();
            if self.attempts == 1 {
                let text = self.backend.tables.save(self.family, self.table)?;
                self.dispatched = Dispatched::read(&text, self.family, self.table)?;
            }
            let found = line.and_then(|line| text.line(line));
            let is_news = found.is_some_and(|(line, rule)| self.leave_out(&line.clone(), rule));
            if !is_news {
                self.bisect()?;
            }
            for owner in &self.left_out.services {
                said.entry(owner.clone()).or_insert_with(|| message.clone());
            }
        }
        let draft = &self.draft;
        if draft.makes_kubelet_firewall {
            self.backend.has_kubelet_firewall = true;
        }
        let owners = draft.chains.values();
        for owner in owners.filter_map(|chain| chain.owner.as_ref()) {
            self.backend.left_out.remove(owner);
        }
        self.backend.left_out.extend(said);
        Ok(self.left_out.services.is_empty())
    }

    fn text(&self, left_out: &LeftOut) -> Text {
        let Self { family, table, .. } = *self;
        self.draft.text(family, table, left_out, &self.dispatched)
    }

    /// None if it went in, else the line that was refused, if one was named.
    fn restore(&mut self, text: &Text) -> Result<Option<Option<usize>>, Error> {
        self.attempts += 1;
        let backend = &mut *self.backend;
        let result = backend.tables.restore(self.family, self.table, &text.text);
        let counts = &mut backend.counts;
        if result.is_err() {
            let (all, partial) = counts.failures.entry(self.family).or_default();
            *all += 1;
            // Everything is planned again to bring in what was left out.
            *partial += u64::from(!backend.retries_left_out);
        }
        match result {
            Ok(()) => {
                let rules = text.text.lines().filter(|line| line.starts_with("-A "));
                let written = counts.written.entry((self.family, self.table)).or_default();
                *written = rules.count();
                Ok(None)
            }
            Err(RestoreError::Failed(error)) => Err(error),
            Err(RestoreError::Refused { line, message }) => {
                if self.attempts > ATTEMPTS {
                    return Err(self.refused(&message));
                }
                self.message = message;
                Ok(Some(line))
            }
        }
    }

    fn refused(&self, message: &str) -> Error {
        let (table, family) = (self.table, self.family);
        Error::Unusable(format!(
            "cannot write table {table} of {family}: iptables-restore refuses what no Service is to blame for: {message}"
        ))
    }

    /// Leaves out what a refused line is for; false if that is nobody, or was left out before.
    fn leave_out(&mut self, line: &Line, rule: &str) -> bool {
        let owner = match line {
            Line::Frame => None,
            Line::Deletion => {
                return !std::mem::replace(&mut self.left_out.deletions, true);
            }
            Line::Of(chain) => match self.draft.chains.get(chain) {
                Some(Chain { owner: None, .. }) => {
                    let leaf = found::leaf(self.family, self.table, *chain, rule);
                    leaf.map(|(_, leaf)| leaf.owner)
                }
                chain => chain.and_then(|chain| chain.owner.clone()),
            },
        };
        owner.is_some_and(|owner| self.left_out.services.insert(owner))
    }

    /// Finds out by trying which service ports have to be left out.
    fn bisect(&mut self) -> Result<(), Error> {
        let Self { family, table, .. } = *self;
        let mut suspects = self.draft.owners(family, table, &self.dispatched);
        suspects.retain(|owner| !self.left_out.services.contains(owner));
        let suspects: Vec<_> = suspects.into_iter().collect();
        let mut base = self.left_out.clone();
        base.deletions = true;
        if self.goes_in(&base, &[])? {
            self.left_out = base;
            return Ok(());
        }
        if suspects.is_empty() || !self.goes_in(&base, &suspects)? {
            return Err(self.refused(&self.message.clone()));
        }
        self.left_out = self.culprits(base, &suspects)?;
        Ok(())
    }

    /// Without `left_out` and all suspects it goes in, without `left_out` alone it does not: which suspects have to go?
    fn culprits(
        &mut self,
        mut left_out: LeftOut,
        suspects: &[ServicePort],
    ) -> Result<LeftOut, Error> {
        if let [culprit] = suspects {
            left_out.services.insert(culprit.clone());
            return Ok(left_out);
        }
        let (first, second) = suspects.split_at(suspects.len() / 2);
        if !self.goes_in(&left_out, second)? {
            let mut without = left_out.clone();
            without.services.extend(second.iter().cloned());
            let found = self.culprits(without, first)?.services.into_iter();
            let found = found.filter(|owner| !second.contains(owner));
            left_out.services.extend(found);
            if self.goes_in(&left_out, &[])? {
                return Ok(left_out);
            }
        }
        self.culprits(left_out, second)
    }

    fn goes_in(&mut self, left_out: &LeftOut, and: &[ServicePort]) -> Result<bool, Error> {
        let mut left_out = left_out.clone();
        left_out.services.extend(and.iter().cloned());
        let text = self.text(&left_out);
        Ok(self.restore(&text)?.is_none())
    }
}
