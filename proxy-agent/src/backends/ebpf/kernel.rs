//! [`Store`] in the kernel: pinned maps, their generations, and the hooks that use them.

use std::{
    collections::BTreeSet,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    time::Duration,
};

use proxy_ebpf::abi::{ABI_VERSION, Meta, Stats, meta_flags};

use self::{
    build::{Recipe, Share},
    grace::Grace,
    open::Found,
};
use super::{
    dir::{Directory, Generation},
    links::{self, Cgroup},
    load::{Constants, LeftOut, Object},
    maps::{Array, Hash},
    probe,
    refused::refused,
    store::Capacity,
    tables::{Fds, Tables, handle, hash},
};
use crate::backends::Error;

mod as_store;
mod build;
mod grace;
mod hooks;
mod open;
mod shapes;

pub use open::current;
pub use shapes::type_name;

/// Where and as whom the maps are kept.
#[derive(Clone, Debug)]
pub struct OpenOptions {
    /// Directory of the pins, on a bpffs.
    pub bpf_dir: PathBuf,
    /// Root of the cgroup v2 hierarchy whose sockets are served; found when absent.
    pub cgroup: Option<PathBuf>,
    /// Name of this node, for META.
    pub node_name: String,
    /// After how long without a heartbeat connect and sendmsg stop translating; `None` = never: no packet layer serves
    /// the node.
    pub lease: Option<Duration>,
    /// Debug lines of the programs, through aya-log.
    pub log: bool,
}

/// The kernel's maps and hooks. Holds the lock of its directory while it lives.
pub struct KernelStore {
    dir: Directory,
    cgroup: Cgroup,
    constants: Constants,
    node_name: String,
    lease: Option<Duration>,
    current: Option<Current>,
    /// Number of the newest generation that was ever made.
    newest: u64,
    /// The hooks use the current generation, and older ones are gone.
    published: bool,
    left_out: Vec<LeftOut>,
    opt_out: BTreeSet<u64>,
    grace: Grace,
}

/// The generation that the agent writes.
struct Current {
    generation: Generation,
    fds: Fds,
    tables: Tables,
    /// Programs are attached to it: growing it moves them at once.
    in_use: bool,
    /// STATS of the generation before, to be added when the hooks have moved.
    old_stats: Option<OwnedFd>,
}

impl Current {
    fn new(
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

    /// Adds the totals of the generation before.
    fn add_old_stats(&mut self) -> Result<(), Error> {
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
}

impl KernelStore {
    /// Takes the directory's lock and adopts what is pinned there; see `docs/adr/0003-generation-swap.md`.
    ///
    /// # Errors
    /// Another agent has the directory; something that the programs need is missing; the kernel refuses.
    pub fn open(options: OpenOptions) -> Result<Self, Error> {
        let OpenOptions {
            bpf_dir,
            cgroup,
            node_name,
            lease,
            log,
        } = options;
        let constants = Constants {
            can_refuse: probe::has_set_retval(),
            log,
        };
        let object = Object::embedded(constants)?;
        let cgroup = Cgroup::open(&cgroup.map_or_else(probe::cgroup_root, Ok)?)?;
        let dir = Directory::lock(&bpf_dir)?;
        let found = open::open(&dir, &object)?;
        let grace = Grace::new()?;
        let mut store = Self {
            dir,
            cgroup,
            constants,
            node_name,
            lease,
            current: None,
            newest: 0,
            published: false,
            left_out: Vec::new(),
            opt_out: BTreeSet::new(),
            grace,
        };
        match found {
            Found::Nothing { newest } => store.newest = newest,
            Found::Adopted(generation, fds) => {
                store.newest = generation.number;
                store.current = Some(Current::new(generation, fds, true, None)?);
                store.complete_a_swap(&object)?;
            }
            Found::Swapped {
                generation,
                fds,
                stats,
            } => {
                store.newest = generation.number;
                store.current = Some(Current::new(generation, fds, false, stats)?);
            }
        }
        store.opt_out = store.opted_out()?;
        Ok(store)
    }

    /// An agent may have died between the first and the last hook that it moved. Its maps were level then, so the others
    /// can follow now, before anything is written.
    fn complete_a_swap(&mut self, object: &Object) -> Result<(), Error> {
        let Some(current) = &self.current else {
            return Ok(());
        };
        if links::all_belong_to(&self.dir.links()?, &current.generation)? {
            return Ok(());
        }
        tracing::info!(
            generation = current.generation.number,
            "a generation swap is completed"
        );
        self.move_hooks(object)
    }

    fn move_hooks(&mut self, object: &Object) -> Result<(), Error> {
        let Some(current) = &mut self.current else {
            return Ok(());
        };
        let ready = hooks::load(object, &current.generation, &current.fds)?;
        self.left_out = hooks::attach(&self.dir, &current.generation, &self.cgroup, ready)?;
        current.in_use = true;
        current.add_old_stats()
    }

    /// Makes room for `need`: a new generation, shared with the one before as far as `share` says.
    fn grow(&mut self, need: &Capacity) -> Result<(), Error> {
        let object = Object::embedded(self.constants)?;
        let nothing = Fds::new();
        let number = self.newest + 1;
        let recipe = Recipe {
            old: self
                .current
                .as_ref()
                .map_or(&nothing, |current| &current.fds),
            share: Share::WhatFits,
            keep_ids: self.current.is_some(),
            need: *need,
        };
        let (generation, fds) = build::build(&self.dir, &object, number, &recipe)?;
        self.newest = number;
        let Some(old) = self.current.take() else {
            self.current = Some(Current::new(generation, fds, false, None)?);
            return self.write_opt_out();
        };
        let grown = self.adopt_grown(&object, &old, generation.clone(), fds);
        match grown {
            Ok(()) => build::remove(&old.generation, &object),
            Err(error) if self.current.is_some() => Err(error),
            Err(error) => {
                // Nothing has moved: all is as it was.
                self.current = Some(old);
                build::remove(&generation, &object)?;
                Err(error)
            }
        }
    }

    /// Takes a larger generation into use; `self.current` is none if no hook has moved when it fails.
    fn adopt_grown(
        &mut self,
        object: &Object,
        old: &Current,
        generation: Generation,
        fds: Fds,
    ) -> Result<(), Error> {
        let shares_stats = old.tables.stats.len() == stats_len(&fds)?;
        let old_stats = match &old.old_stats {
            Some(stats) => Some(
                stats
                    .try_clone()
                    .map_err(|error| refused("duplicate", "map STATS", error))?,
            ),
            None if shares_stats => None,
            None => Some(handle(&old.fds, "STATS")?),
        };
        let mut current = Current::new(generation, fds, false, old_stats)?;
        if !old.in_use {
            self.current = Some(current);
            return Ok(());
        }
        let ready = hooks::load(object, &current.generation, &current.fds)?;
        self.stamp(&current, true);
        current.in_use = true;
        let current = self.current.insert(current);
        self.left_out = hooks::attach(&self.dir, &current.generation, &self.cgroup, ready)?;
        current.add_old_stats()
    }

    /// Writes META, if it says something else.
    fn stamp(&self, current: &Current, complete: bool) {
        let meta = current.tables.meta();
        let mut wanted = meta;
        wanted.abi_version = ABI_VERSION;
        wanted.netns_cookie = probe::own_netns_cookie();
        wanted.lease_ns = self.lease.map_or(0, |lease| lease.as_nanos() as u64);
        wanted.generation = current.generation.number;
        wanted.node = [0; 64];
        for (to, from) in wanted.node.iter_mut().zip(self.node_name.bytes()) {
            *to = from;
        }
        if complete {
            wanted.flags |= meta_flags::COMPLETE;
        }
        if wanted != meta {
            current.tables.meta.write(0, &wanted);
        }
    }

    /// Vouches for the maps: only after a complete sync, at least every second while a lease is armed.
    pub fn heartbeat(&self) {
        if let Some(current) = &self.current {
            let offset = std::mem::offset_of!(Meta, heartbeat_ns);
            current
                .tables
                .meta
                .store_word(0, offset, build::monotonic_ns());
        }
    }

    /// The cgroups whose sockets are left alone, by id; at most 4,096.
    ///
    /// # Errors
    /// The kernel refused.
    pub fn set_opt_out(&mut self, cgroups: &BTreeSet<u64>) -> Result<(), Error> {
        if self.opt_out != *cgroups {
            self.opt_out.clone_from(cgroups);
            self.write_opt_out()?;
        }
        Ok(())
    }

    fn opted_out(&self) -> Result<BTreeSet<u64>, Error> {
        let Some(current) = &self.current else {
            return Ok(BTreeSet::new());
        };
        let map: Hash<u64, u32> = hash(&current.fds, "OPTOUT")?;
        Ok(map
            .entries()?
            .into_iter()
            .map(|(cgroup, _)| cgroup)
            .collect())
    }

    fn write_opt_out(&self) -> Result<(), Error> {
        let Some(current) = &self.current else {
            return Ok(());
        };
        let map: Hash<u64, u32> = hash(&current.fds, "OPTOUT")?;
        let present = self.opted_out()?;
        let added: Vec<_> = self
            .opt_out
            .difference(&present)
            .map(|cgroup| (*cgroup, 1))
            .collect();
        let removed: Vec<_> = present.difference(&self.opt_out).copied().collect();
        let mut meta = current.tables.meta();
        meta.flags &= !meta_flags::OPT_OUT;
        if !self.opt_out.is_empty() {
            meta.flags |= meta_flags::OPT_OUT;
        }
        map.upsert(&added)?;
        if meta.flags != current.tables.meta().flags {
            current.tables.meta.write(0, &meta);
        }
        map.delete(&removed)
    }

    /// Programs that this kernel cannot run; known after the first publish.
    pub fn left_out(&self) -> &[LeftOut] {
        &self.left_out
    }

    /// Number of the generation in use; 0 before the first.
    pub fn generation(&self) -> u64 {
        self.current
            .as_ref()
            .map_or(0, |current| current.generation.number)
    }

    /// The cgroup that is served.
    pub fn cgroup(&self) -> &Path {
        self.cgroup.path()
    }

    /// STATS at `service`.
    pub fn stats(&self, service: u32) -> Stats {
        self.tables().stats.read(service)
    }

    fn tables(&self) -> &Tables {
        let current = self.current.as_ref();
        &current
            .expect("capacity() is zero before the first reserve(): no index is valid")
            .tables
    }

    fn remove_other_generations(&self, object: &Object) -> Result<(), Error> {
        let Some(current) = &self.current else {
            return Ok(());
        };
        for generation in self.dir.generations()? {
            if generation != current.generation {
                build::remove(&generation, object)?;
            }
        }
        Ok(())
    }
}

fn stats_len(fds: &Fds) -> Result<u32, Error> {
    let info = super::sys::map_info(handle(fds, "STATS")?);
    info.map(|info| info.max_entries)
        .map_err(|error| refused("read", "map STATS", error))
}

/// Removes every hook, pin and directory of an agent that is not running; does nothing where there is none.
///
/// # Errors
/// An agent runs; the kernel refused.
pub fn cleanup(bpf_dir: &Path) -> Result<(), Error> {
    if !bpf_dir.exists() {
        return Ok(());
    }
    let constants = Constants {
        can_refuse: false,
        log: false,
    };
    let object = Object::embedded(constants)?;
    let dir = Directory::lock(bpf_dir)?;
    links::detach_all(&dir.links()?)?;
    for generation in dir.generations()? {
        build::remove(&generation, &object)?;
    }
    std::fs::remove_dir(bpf_dir).map_err(|error| refused("remove", bpf_dir.display(), error))
}

/// Loads the programs onto small maps and drops all of it: what this kernel cannot run.
///
/// # Errors
/// The kernel refuses a program that the socket layer needs.
pub fn try_load(constants: Constants) -> Result<Vec<LeftOut>, Error> {
    let object = Object::embedded(constants)?;
    let mut maps = Fds::new();
    for (name, spec) in object.maps() {
        let map = match object.constants(name) {
            Some(bytes) => object.create_constants(name, bytes)?,
            None => object.create(name, shapes::smallest(name, spec))?,
        };
        maps.insert(name.clone(), map);
    }
    Ok(object.load(&maps)?.left_out)
}

#[cfg(test)]
mod tests;
