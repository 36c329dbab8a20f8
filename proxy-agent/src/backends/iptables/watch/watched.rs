//! Tables that are watched while they are used.

use std::collections::BTreeSet;

use super::Watch;
use crate::{
    backends::{
        Error,
        iptables::{
            host::Host,
            rival::{CANARY, CANARY_TABLES},
            tables::{AddressSet, RestoreError, Table, Tables},
        },
    },
    state::Family,
};

/// Knows when somebody else than this changed the tables.
#[derive(Debug)]
pub struct Watched<T> {
    tables: T,
    is_nft: bool,
    /// None after an error, until it can be opened again.
    watch: Option<Watch>,
    has_told: bool,
}

impl<T: Tables> Watched<T> {
    /// Watches from now on; `is_nft` says which variant of tools `tables` uses.
    pub fn new(tables: T, is_nft: bool) -> Self {
        let mut watched = Self {
            tables,
            is_nft,
            watch: None,
            has_told: false,
        };
        watched.open();
        watched
    }

    /// Whether somebody else may have changed rules of ours since this was asked last: then read the tables. Costs
    /// microseconds, so ask several times a second.
    pub fn has_changed(&mut self) -> bool {
        match &mut self.watch {
            Some(watch) => {
                let changed = watch.has_changed();
                self.keep(changed).unwrap_or(false)
            }
            // Nobody has watched for a while.
            None => self.open(),
        }
    }

    fn open(&mut self) -> bool {
        let opened = Watch::open(self.is_nft);
        self.watch = self.keep(opened);
        let is_open = self.watch.is_some();
        self.has_told &= !is_open;
        is_open
    }

    /// After an error nobody watches: told once.
    fn keep<V>(&mut self, result: Result<V, Error>) -> Option<V> {
        result
            .map_err(|error| {
                self.watch = None;
                if !std::mem::replace(&mut self.has_told, true) {
                    tracing::warn!(
                        error = format!("{error:#}"),
                        "rules that somebody else changes are found by the audit only; trying again"
                    );
                }
            })
            .ok()
    }
}

impl Watched<Host> {
    /// The tools.
    pub fn host(&self) -> &Host {
        &self.tables
    }

    /// As [`Host::try_again`].
    pub fn try_again(&mut self) -> bool {
        self.tables.try_again()
    }

    /// Removes kube-proxy's canary from each table, where it is.
    ///
    /// # Errors
    /// A tool could not be run, or the lock was not to be had; what is left can be removed later.
    pub fn remove_canaries(&mut self) -> Result<(), Error> {
        let unusable = |error: RestoreError| Error::Unusable(error.to_string());
        for family in self.families() {
            for table in CANARY_TABLES {
                // Declared first, so that there is something to remove in any case.
                let text = format!("*{table}\n:{CANARY} - [0:0]\n-X {CANARY}\nCOMMIT\n");
                let done = match table {
                    "nat" => self.restore(family, Table::Nat, &text),
                    "filter" => self.restore(family, Table::Filter, &text),
                    // Nothing of ours is there, so nobody watches it.
                    _ => self.tables.restore_in(family, table, &text),
                };
                done.map_err(unusable)?;
            }
        }
        Ok(())
    }
}

impl<T: Tables> Tables for Watched<T> {
    fn families(&self) -> BTreeSet<Family> {
        self.tables.families()
    }

    fn read(
        &mut self,
        family: Family,
        table: Table,
        each: &mut dyn FnMut(&str),
    ) -> Result<(), Error> {
        self.tables.read(family, table, each)
    }

    fn restore(&mut self, family: Family, table: Table, text: &str) -> Result<(), RestoreError> {
        if let Some(watch) = &mut self.watch {
            let paused = watch.pause();
            self.keep(paused);
        }
        let result = self.tables.restore(family, table, text);
        if let Some(watch) = &mut self.watch {
            let resumed = watch.resume(family, table, result.is_ok());
            self.keep(resumed);
        }
        result
    }

    fn piece(&self) -> Option<usize> {
        self.tables.piece()
    }

    fn sets(&mut self) -> Result<BTreeSet<AddressSet>, Error> {
        self.tables.sets()
    }

    fn create_sets(&mut self, sets: &BTreeSet<AddressSet>) -> Result<(), Error> {
        self.tables.create_sets(sets)
    }

    fn destroy_sets(&mut self, sets: &BTreeSet<AddressSet>) -> Result<(), Error> {
        self.tables.destroy_sets(sets)
    }
}
