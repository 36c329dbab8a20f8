//! What the rules need from a host: whole tables read and changed, and the address sets that affinity uses.

use std::{
    collections::BTreeSet,
    fmt::{self, Display},
};

use crate::{backends::Error, state::Family};

/// A table that holds rules of ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Table {
    /// Rejects, drops, and what is accepted.
    Filter,
    /// Translations.
    Nat,
}

impl Table {
    /// As the tools call it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Filter => "filter",
            Self::Nat => "nat",
        }
    }
}

impl Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// An ipset of type `hash:ip` whose entries end after `timeout_seconds`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct AddressSet {
    /// At most 31 characters.
    pub name: String,
    /// Family of its entries.
    pub family: Family,
    /// How long an entry lives after it was added last.
    pub timeout_seconds: u32,
}

/// Why a table was not changed.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// The tool refuses a line of the text.
    #[error("iptables-restore refuses {}: {message}", place(*line))]
    Refused {
        /// Counted from 1; none if the tool named none.
        line: Option<usize>,
        /// What the tool says.
        message: String,
    },
    /// It could not be run, or the lock was not to be had.
    #[error(transparent)]
    Failed(#[from] Error),
}

fn place(line: Option<usize>) -> String {
    line.map_or("the rules".to_owned(), |line| format!("line {line}"))
}

/// All the lines that `read` gives.
pub(super) fn whole(
    read: impl FnOnce(&mut dyn FnMut(&str)) -> Result<(), Error>,
) -> Result<String, Error> {
    let mut text = String::new();
    read(&mut |line| {
        text.push_str(line);
        text.push('\n');
    })?;
    Ok(text)
}

impl<T: Tables> Tables for &mut T {
    fn families(&self) -> BTreeSet<Family> {
        (**self).families()
    }

    fn read(
        &mut self,
        family: Family,
        table: Table,
        each: &mut dyn FnMut(&str),
    ) -> Result<(), Error> {
        (**self).read(family, table, each)
    }

    fn restore(&mut self, family: Family, table: Table, text: &str) -> Result<(), RestoreError> {
        (**self).restore(family, table, text)
    }

    fn piece(&self) -> Option<usize> {
        (**self).piece()
    }

    fn sets(&mut self) -> Result<BTreeSet<AddressSet>, Error> {
        (**self).sets()
    }

    fn create_sets(&mut self, sets: &BTreeSet<AddressSet>) -> Result<(), Error> {
        (**self).create_sets(sets)
    }

    fn destroy_sets(&mut self, sets: &BTreeSet<AddressSet>) -> Result<(), Error> {
        (**self).destroy_sets(sets)
    }
}

/// The tables of one network namespace.
pub trait Tables {
    /// The families that have tables.
    fn families(&self) -> BTreeSet<Family>;

    /// Gives each line of `iptables-save -t TABLE` (`ip6tables-save` for IPv6) to `each`.
    ///
    /// # Errors
    /// The tool could not be run, or failed; so below.
    fn read(
        &mut self,
        family: Family,
        table: Table,
        each: &mut dyn FnMut(&str),
    ) -> Result<(), Error>;

    /// All these lines.
    ///
    /// # Errors
    /// As above.
    fn save(&mut self, family: Family, table: Table) -> Result<String, Error> {
        whole(|each| self.read(family, table, each))
    }

    /// Feeds one table's transaction (`*nat` … `COMMIT`) to `iptables-restore --noflush`: all of it goes in, or nothing.
    ///
    /// # Errors
    /// Nothing went in.
    fn restore(&mut self, family: Family, table: Table, text: &str) -> Result<(), RestoreError>;

    /// About so many chains go into a transaction if they can go into several; none if one is always best.
    fn piece(&self) -> Option<usize>;

    /// Our address sets that exist (names that begin with `KUBE-`).
    ///
    /// # Errors
    /// As above.
    fn sets(&mut self) -> Result<BTreeSet<AddressSet>, Error>;

    /// Creates empty sets.
    ///
    /// # Errors
    /// As above.
    fn create_sets(&mut self, sets: &BTreeSet<AddressSet>) -> Result<(), Error>;

    /// Removes sets that no rule uses.
    ///
    /// # Errors
    /// As above.
    fn destroy_sets(&mut self, sets: &BTreeSet<AddressSet>) -> Result<(), Error>;
}
