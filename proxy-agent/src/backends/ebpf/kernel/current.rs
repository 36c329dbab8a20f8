//! The generation that the agent writes.

use std::{collections::BTreeSet, os::fd::OwnedFd};

use proxy_ebpf::abi::{Meta, Stats, meta_flags};

use super::super::{
    dir::Generation,
    maps::{Array, Hash},
    refused::refused,
    tables::{Fds, Tables, handle, hash, opted_out},
};
use crate::backends::Error;

/// Its maps, and what is still to be done about it.
pub struct Current {
    /// Where it is pinned.
    pub generation: Generation,
    /// Every map.
    pub fds: Fds,
    /// Those that the agent writes.
    pub tables: Tables,
    /// Programs are attached to it: growing it moves them at once.
    pub in_use: bool,
    /// STATS of the generation before, to be added when the hooks have moved.
    old_stats: Option<OwnedFd>,
}

impl Current {
    /// Maps the arrays of `fds`.
    ///
    /// # Errors
    /// One is missing or of a wrong shape.
    pub fn new(
        generation: Generation,
        fds: Fds,
        in_use: bool,
        old_stats: Option<OwnedFd>,
    ) -> Result<Self, Error> {
        Ok(Self {
            tables: Tables::new(&fds, true)?,
            generation,
            fds,
            in_use,
            old_stats,
        })
    }

    /// What takes the place of `old`, not in use yet.
    ///
    /// # Errors
    /// One is missing or of a wrong shape.
    pub fn grown_from(old: &Self, generation: Generation, fds: Fds) -> Result<Self, Error> {
        let mut current = Self::new(generation, fds, false, None)?;
        current.old_stats = match &old.old_stats {
            Some(stats) => Some(
                stats
                    .try_clone()
                    .map_err(|error| refused("duplicate", "map STATS", error))?,
            ),
            None if current.tables.stats.len() == old.tables.stats.len() => None,
            None => Some(handle(&old.fds, "STATS")?),
        };
        Ok(current)
    }

    /// Adds the totals of the generation before.
    ///
    /// # Errors
    /// They cannot be read.
    pub fn add_old_stats(&mut self) -> Result<(), Error> {
        let Some(old) = self.old_stats.take() else {
            return Ok(());
        };
        let old = Array::new(old, false).map_err(|error| refused("map", "map STATS", error))?;
        for index in 0..old.len().min(self.tables.stats.len()) {
            let Stats {
                connections,
                datagrams,
                refused,
                reserved: _,
            } = old.read(index);
            let counters = [
                (std::mem::offset_of!(Stats, connections), connections),
                (std::mem::offset_of!(Stats, datagrams), datagrams),
                (std::mem::offset_of!(Stats, refused), refused),
            ];
            for (offset, total) in counters.into_iter().filter(|(_, total)| *total != 0) {
                self.tables.stats.add(index, offset, total);
            }
        }
        Ok(())
    }

    /// Changes META, if `change` makes it say something else.
    pub fn change_meta(&self, change: impl FnOnce(&mut Meta)) {
        let meta = self.tables.meta();
        let mut wanted = meta;
        change(&mut wanted);
        if wanted != meta {
            self.tables.meta.write(0, &wanted);
        }
    }

    /// Makes OPTOUT hold these cgroups and no others, and META say whether there are any.
    ///
    /// # Errors
    /// The kernel refused; part of it may have gone in.
    pub fn write_opt_out(&self, cgroups: &BTreeSet<u64>) -> Result<(), Error> {
        let map: Hash<u64, u32> = hash(&self.fds, "OPTOUT")?;
        let present = opted_out(&self.fds)?;
        let added: Vec<_> = cgroups
            .difference(&present)
            .map(|cgroup| (*cgroup, 1))
            .collect();
        let removed: Vec<_> = present.difference(cgroups).copied().collect();
        map.upsert(&added)?;
        self.change_meta(|meta| {
            meta.flags &= !meta_flags::OPT_OUT;
            if !cgroups.is_empty() {
                meta.flags |= meta_flags::OPT_OUT;
            }
        });
        map.delete(&removed)
    }
}
