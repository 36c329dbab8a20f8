//! How a generation comes into use, and how the next one takes its place.

use proxy_ebpf::abi::{ABI_VERSION, meta_flags};

use super::{
    super::{links, load::Object, probe, store::Capacity, tables::Fds},
    KernelStore,
    build::{self, Recipe, Share},
    current::Current,
    hooks,
    open::Found,
    try_load,
};
use crate::backends::Error;

impl KernelStore {
    /// Takes what was found, and learns whether this kernel runs the programs before anything depends on it.
    pub(super) fn take(&mut self, found: Found, object: &Object) -> Result<(), Error> {
        match found {
            Found::Nothing { newest } => {
                self.newest = newest;
                self.left_out = try_load(object)?;
            }
            Found::Adopted(generation, fds) => {
                self.newest = generation.number;
                let current = Current::new(generation, fds, true, None)?;
                // An agent may have died between the first and the last hook that it moved. Its maps were level then, so
                // the others can follow now, before anything is written.
                if links::all_belong_to(&self.dir.links()?, &current.generation)? {
                    self.left_out = self.left_out_by(object, &current)?;
                    self.current = Some(current);
                } else {
                    tracing::info!(
                        generation = current.generation.number,
                        "a generation swap is completed"
                    );
                    self.current = Some(current);
                    self.move_hooks(object)?;
                }
            }
            Found::Swapped {
                generation,
                fds,
                stats,
            } => {
                self.newest = generation.number;
                self.left_out = try_load(object)?;
                self.current = Some(Current::new(generation, fds, false, stats)?);
            }
        }
        Ok(())
    }

    /// What this kernel cannot run. Loads only the programs in question where the others are attached already.
    fn left_out_by(
        &self,
        object: &Object,
        current: &Current,
    ) -> Result<Vec<super::LeftOut>, Error> {
        let missing = hooks::missing(&self.dir, &current.generation, &self.cgroup, &current.fds)?;
        let known = current.tables.meta().programs == object.digest();
        if known && missing.iter().all(|hook| hook.is_optional()) {
            return hooks::load(object, &current.generation, &current.fds, &missing)
                .map(hooks::left_out);
        }
        try_load(object)
    }

    /// Makes the hooks run this agent's programs on the current generation.
    pub(super) fn move_hooks(&mut self, object: &Object) -> Result<(), Error> {
        let Some(current) = &mut self.current else {
            return Ok(());
        };
        let missing = hooks::missing(&self.dir, &current.generation, &self.cgroup, &current.fds)?;
        let known = current.tables.meta().programs == object.digest();
        if !known || missing.iter().any(|hook| !hook.is_optional()) {
            let all = links::Hook::ALL;
            let ready = hooks::load(object, &current.generation, &current.fds, &all)?;
            self.left_out = hooks::attach(&self.dir, &current.generation, &self.cgroup, ready)?;
            current.change_meta(|meta| meta.programs = object.digest());
        }
        current.in_use = true;
        current.add_old_stats()
    }

    /// Makes room for `need`: a new generation that shares every map that has it already.
    pub(super) fn grow(&mut self, need: &Capacity) -> Result<(), Error> {
        let object = Object::embedded(self.constants)?;
        let nothing = Fds::new();
        self.newest += 1;
        let recipe = Recipe {
            old: self
                .current
                .as_ref()
                .map_or(&nothing, |current| &current.fds),
            share: Share::WhatFits,
            keep_ids: self.current.is_some(),
            need: *need,
        };
        let (generation, fds) = build::build(&self.dir, &object, self.newest, &recipe)?;
        let Some(old) = self.current.take() else {
            let current = Current::new(generation, fds, false, None)?;
            current.write_opt_out(&self.opt_out)?;
            self.current = Some(current);
            return Ok(());
        };
        let grown = Current::grown_from(&old, generation.clone(), fds);
        match grown.and_then(|grown| self.replace(&object, &old, grown)) {
            Ok(()) => build::remove(&old.generation, &object),
            Err(error) if self.current.is_some() => {
                // Some hooks have moved: the others follow with the next publish.
                self.published = false;
                Err(error)
            }
            Err(error) => {
                // Nothing has moved: all is as it was.
                self.current = Some(old);
                build::remove(&generation, &object)?;
                Err(error)
            }
        }
    }

    /// Takes `grown` into use; `self.current` is none if no hook has moved when it fails.
    fn replace(&mut self, object: &Object, old: &Current, grown: Current) -> Result<(), Error> {
        if !old.in_use {
            self.current = Some(grown);
            return Ok(());
        }
        let ready = hooks::load(object, &grown.generation, &grown.fds, &links::Hook::ALL)?;
        self.complete(&grown);
        let current = self.current.insert(grown);
        current.in_use = true;
        self.left_out = hooks::attach(&self.dir, &current.generation, &self.cgroup, ready)?;
        current.change_meta(|meta| meta.programs = object.digest());
        current.add_old_stats()
    }

    /// Says in META whose maps these are, and that they are complete.
    pub(super) fn complete(&self, current: &Current) {
        current.change_meta(|meta| {
            meta.abi_version = ABI_VERSION;
            meta.netns_cookie = probe::own_netns_cookie();
            if let Some(lease_ns) = self.lease.ns() {
                meta.lease_ns = lease_ns;
            }
            meta.generation = current.generation.number;
            meta.node = [0; 64];
            for (to, from) in meta.node.iter_mut().zip(self.node_name.bytes()) {
                *to = from;
            }
            meta.flags |= meta_flags::COMPLETE;
            match self.host_only {
                true => meta.flags |= meta_flags::HOST_ONLY,
                false => meta.flags &= !meta_flags::HOST_ONLY,
            }
        });
    }

    /// Unpins what older generations have left.
    pub(super) fn remove_other_generations(&self, object: &Object) -> Result<(), Error> {
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
