//! What is pinned already: adopted, carried over, or left alone.

use std::{collections::BTreeMap, os::fd::OwnedFd};

use proxy_ebpf::abi::{ABI_VERSION, Meta, meta_flags};

use super::{
    super::{
        dir::{Directory, Generation},
        load::Object,
        maps::Array,
        store::Capacity,
        sys,
        tables::Fds,
    },
    build::{self, Recipe, Share},
    shapes,
};
use crate::backends::Error;

/// What a directory's newest generation is to this agent.
pub enum Found {
    /// There is none.
    Nothing {
        /// Number of the newest directory, if any is left of a broken one.
        newest: u64,
    },
    /// All its maps are this agent's own: they stay in use.
    Adopted(Generation, Fds),
    /// A new generation, filled from the old one as far as that was possible; no hook uses it yet.
    Swapped {
        /// The new one.
        generation: Generation,
        /// Its maps.
        fds: Fds,
        /// STATS of the old one.
        stats: Option<OwnedFd>,
    },
}

/// One pinned generation.
struct Pinned {
    generation: Generation,
    /// Maps that are what they should be.
    good: Fds,
    /// What is wrong with the others.
    bad: Vec<String>,
    /// META, if it is one.
    meta: Option<Meta>,
}

/// Finds the newest generation and makes it this agent's. Unfinished ones are removed.
///
/// # Errors
/// The kernel could not be read, or refused.
pub fn open(dir: &Directory, object: &Object) -> Result<Found, Error> {
    let mut newest = 0;
    let mut current = None;
    for generation in dir.generations()? {
        newest = newest.max(generation.number);
        let pinned = examine(generation, object);
        match &pinned.meta {
            Some(meta) if meta.flags & meta_flags::COMPLETE == 0 => {
                tracing::info!(directory = %pinned.generation.path.display(), "an unfinished generation is removed");
                build::remove(&pinned.generation, object)?;
            }
            Some(_) => current = Some(pinned),
            // Only a directory whose META is gone or foreign is left to start from.
            None if current.is_none() && !pinned.good.is_empty() => current = Some(pinned),
            None => {}
        }
    }
    match current {
        None => Ok(Found::Nothing { newest }),
        Some(pinned) if pinned.is_ours_whole() => {
            Ok(Found::Adopted(pinned.generation, pinned.good))
        }
        Some(pinned) => swap(dir, object, pinned, newest + 1),
    }
}

fn examine(generation: Generation, object: &Object) -> Pinned {
    let mut bad = Vec::new();
    let mut good = Fds::new();
    for (name, spec) in object.maps() {
        if object.constants(name).is_some() {
            continue;
        }
        let Some(map) = generation.open(name, sys::Kind::Map) else {
            bad.push(format!("{name} is missing or no map"));
            continue;
        };
        let same_abi = generation.abi == ABI_VERSION;
        let verdict = match sys::map_info(&map) {
            Ok(info) => shapes::check(name, spec, &info, same_abi),
            Err(error) => Err(format!("{name} cannot be read: {error}")),
        };
        match verdict {
            Ok(()) => drop(good.insert(name.clone(), map)),
            Err(why) => bad.push(why),
        }
    }
    let meta = good
        .get("META")
        .and_then(|map| Array::new(map.try_clone().ok()?, false).ok());
    let meta: Option<Meta> = meta.map(|meta| meta.read(0));
    if let Some(meta) = meta.filter(|meta| meta.abi_version != generation.abi) {
        bad.push(format!(
            "META says ABI {}, its directory {}",
            meta.abi_version, generation.abi
        ));
    }
    Pinned {
        generation,
        good,
        bad,
        meta,
    }
}

impl Pinned {
    fn is_ours_whole(&self) -> bool {
        self.generation.abi == ABI_VERSION && self.bad.is_empty()
    }

    fn capacity(&self) -> Capacity {
        let entries = |name: &str| {
            let map = self.good.get(name).and_then(|map| sys::map_info(map).ok());
            map.map_or(0, |info| info.max_entries)
        };
        Capacity {
            services: entries("SERVICES"),
            slots: entries("SLOTS"),
            members: entries("MEMBERS"),
            frontends: entries("FRONTENDS"),
            vips: entries("VIPS"),
            addresses: entries("LOCAL_ADDRS"),
        }
    }
}

fn swap(dir: &Directory, object: &Object, pinned: Pinned, number: u64) -> Result<Found, Error> {
    // Without SLOTS the sets lead nowhere until they are written again, but services and members keep their indices.
    let keep_ids = ["SERVICES", "MEMBERS", "NAMES"]
        .iter()
        .all(|name| pinned.good.contains_key(*name));
    if pinned.bad.is_empty() {
        tracing::info!(
            from = pinned.generation.abi,
            to = ABI_VERSION,
            "the maps of another ABI are carried over"
        );
    } else {
        tracing::warn!(
            directory = %pinned.generation.path.display(),
            wrong = pinned.bad.join("; "),
            indices_kept = keep_ids,
            "pinned maps are not what they should be: a new generation is made beside them, they are left alone"
        );
    }
    let recipe = Recipe {
        old: &pinned.good,
        share: Share::WhatProgramsWrite,
        keep_ids,
        need: pinned.capacity(),
    };
    let (generation, fds) = build::build(dir, object, number, &recipe)?;
    let mut good = pinned.good;
    Ok(Found::Swapped {
        generation,
        fds,
        stats: good.remove("STATS").filter(|_| keep_ids),
    })
}

/// The highest generation that is COMPLETE, of whatever ABI, and the maps pinned in it: for reading only.
///
/// # Errors
/// The directory cannot be read, or holds none.
pub fn newest_complete(dir: &Directory) -> Result<(Generation, Fds), Error> {
    let complete = |generation: &Generation| {
        let meta = generation.open("META", sys::Kind::Map)?;
        let meta: Meta = Array::new(meta, false).ok()?.read(0);
        (meta.flags & meta_flags::COMPLETE != 0).then_some(())
    };
    let generations = dir.generations()?;
    let Some(generation) = generations
        .into_iter()
        .rev()
        .find(|it| complete(it).is_some())
    else {
        return Err(Error::Unusable(format!(
            "no complete maps in {}: the agent has not finished its first sync",
            dir.path().display()
        )));
    };
    let names = generation.pins()?;
    let fds: BTreeMap<_, _> = generation.open_maps(names.iter().map(String::as_str));
    Ok((generation, fds))
}
