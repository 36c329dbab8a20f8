//! Many chains at once, in pieces.
//!
//! `iptables-nft-restore` walks a sorted list of all chains that its input names, once for each line, so its time grows with
//! the square of their number. Therefore many new chains go in ahead of a transaction, when nothing leads to them yet, and
//! many old ones go after it, when nothing does any more. What packets meet still changes in one step.

use std::fmt::{Display, Write as _};

use super::{
    IptablesBackend, Key,
    draft::Draft,
    names::ChainName,
    tables::{RestoreError, Table, Tables},
};
use crate::{backends::Error, state::Family};

impl<T: Tables> IptablesBackend<T> {
    /// Writes the new chains of a draft, if they are many, and takes them out of it. If one of them is refused all stay in the
    /// draft: it finds out whom that has to cost.
    ///
    /// # Errors
    /// The tool could not be run.
    pub(super) fn write_ahead(
        &mut self,
        family: Family,
        table: Table,
        draft: &mut Draft,
    ) -> Result<(), Error> {
        let is_new = |name: &&ChainName| self.absent.contains(&Key::Chain(family, table, **name));
        let new: Vec<ChainName> = draft.chains.keys().filter(is_new).copied().collect();
        let Some(piece) = self.piece(new.len()) else {
            return Ok(());
        };
        if !self.goes_in(family, table, new.iter().rev().map(empty))? {
            return Ok(());
        }
        for names in new.chunks(piece) {
            // Backwards, so that each line finds its chain at the head of the tool's list.
            let chains = names.iter().rev().map(|name| (name, &draft.chains[name]));
            let rules = chains.flat_map(|(name, chain)| {
                let rules = chain.body.lines();
                rules.map(move |rule| format!("-A {name} {rule}"))
            });
            if !self.goes_in(family, table, rules)? {
                return Ok(());
            }
        }
        for name in &new {
            let written = draft.chains.remove(name);
            if let Some(owner) = written.and_then(|chain| chain.owner) {
                self.left_out.remove(&owner);
            }
        }
        Ok(())
    }

    /// Takes the chains that a draft removes out of it, if they are many.
    pub(super) fn left_behind(&self, draft: &mut Draft) -> Vec<ChainName> {
        match self.piece(draft.deletions.len()) {
            Some(_) => std::mem::take(&mut draft.deletions),
            None => Vec::new(),
        }
    }

    /// Removes chains that nothing leads to but each other. False if one of them cannot go.
    ///
    /// # Errors
    /// The tool could not be run.
    pub(super) fn remove_pieces(
        &mut self,
        family: Family,
        table: Table,
        old: &[ChainName],
    ) -> Result<bool, Error> {
        let Some(piece) = self.piece(old.len()) else {
            return Ok(true);
        };
        // All are emptied before one goes, because they lead to each other.
        for line in [empty as fn(&ChainName) -> String, remove] {
            for names in old.chunks(piece) {
                if !self.goes_in(family, table, names.iter().rev().map(line))? {
                    return Ok(false);
                }
            }
        }
        Ok(true)
    }

    /// Chains of a piece, if `count` are more than one.
    pub(super) fn piece(&self, count: usize) -> Option<usize> {
        self.tables.piece().filter(|piece| count > *piece)
    }

    fn goes_in(
        &mut self,
        family: Family,
        table: Table,
        lines: impl Iterator<Item = impl Display>,
    ) -> Result<bool, Error> {
        let mut text = format!("*{table}\n");
        for line in lines {
            // Writing to a string does not fail.
            let _ = writeln!(text, "{line}");
        }
        text.push_str("COMMIT\n");
        match self.tables.restore(family, table, &text) {
            Ok(()) => Ok(true),
            Err(RestoreError::Refused { .. }) => Ok(false),
            Err(RestoreError::Failed(error)) => Err(error),
        }
    }
}

/// The line that makes a chain, or empties it.
fn empty(name: &ChainName) -> String {
    format!(":{name} - [0:0]")
}

fn remove(name: &ChainName) -> String {
    format!("-X {name}")
}
