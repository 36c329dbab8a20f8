//! A generation of maps is made: from nothing, beside a broken or foreign one, or larger than the one in use.

use std::os::fd::{AsFd, OwnedFd};

use proxy_ebpf::abi::{
    ABI_VERSION, Addr, FrontendKey, FrontendValue, Member, MemberWord, Meta, Plain, meta_flags,
};

use super::{
    super::{
        dir::{BESIDE, Directory, Generation},
        links::Hook,
        load::Object,
        maps::{Array, Hash},
        refused::refused,
        store::{Capacity, UNSEEN},
        sys,
        tables::Fds,
    },
    shapes::{self, Role, entries_of, role},
};
use crate::backends::Error;

/// Which maps of the old generation the new one shares.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Share {
    /// All that have room: the old generation has this agent's ABI and the agent goes on writing both.
    WhatFits,
    /// What the programs write: the old generation stays as it is, for the programs in use, until the hooks move.
    WhatProgramsWrite,
}

/// What a generation is made of.
pub struct Recipe<'a> {
    /// Maps that are pinned and are what they should be.
    pub old: &'a Fds,
    /// Which of them stay in use.
    pub share: Share,
    /// Indices of the old generation mean the same in the new one: its tables are copied.
    pub keep_ids: bool,
    /// Least entries.
    pub need: Capacity,
}

/// Makes generation `number` and pins it; not yet COMPLETE.
///
/// # Errors
/// The kernel refused; nothing of it is left.
pub fn build(
    dir: &Directory,
    object: &Object,
    number: u64,
    recipe: &Recipe<'_>,
) -> Result<(Generation, Fds), Error> {
    let generation = dir.create_generation(ABI_VERSION, number)?;
    match fill(&generation, object, recipe) {
        Ok(fds) => Ok((generation, fds)),
        Err(error) => {
            // The first error is the one to tell; what stays is incomplete and goes at the next start.
            let _ = remove(&generation, object);
            Err(error)
        }
    }
}

fn fill(generation: &Generation, object: &Object, recipe: &Recipe<'_>) -> Result<Fds, Error> {
    let mut fds = Fds::new();
    let sizes = shapes::sizes(&recipe.need);
    // META first: a directory whose META lacks COMPLETE is known as unfinished.
    let order = |name: &&String| (name.as_str() != "META", name.as_str().to_owned());
    let mut names: Vec<&String> = object.maps().keys().collect();
    names.sort_by_key(order);
    for name in names {
        if object.constants(name).is_some() {
            continue;
        }
        let old = recipe.old.get(name);
        let map = match (role(name, &object.maps()[name]), old) {
            (Role::Meta, old) => {
                let lost_ids = !recipe.keep_ids && !recipe.old.is_empty();
                create_meta(object, old, generation.number, lost_ids)?
            }
            (Role::Carried(_), Some(old)) => duplicate(name, old)?,
            (Role::Carried(entries), None) => object.create(name, entries)?,
            (Role::Table, Some(old)) if fits(name, old, recipe)? => duplicate(name, old)?,
            (Role::Table, old) => {
                let old = old.filter(|_| recipe.keep_ids);
                let kept = old.map_or(Ok(0), |old| entries(name, old))?;
                let map = object.create(name, kept.max(entries_of(&sizes, name)))?;
                if let Some(old) = old {
                    copy(name, old, &map)?;
                } else if name == "MEMBERS" && !recipe.keep_ids && !recipe.old.is_empty() {
                    renew_generations(&map)?;
                }
                map
            }
        };
        generation.pin(name, &map)?;
        fds.insert(name.clone(), map);
    }
    Ok(fds)
}

fn fits(name: &str, old: &OwnedFd, recipe: &Recipe<'_>) -> Result<bool, Error> {
    Ok(match recipe.share {
        Share::WhatFits => entries(name, old)? >= entries_of(&recipe.need, name),
        Share::WhatProgramsWrite => false,
    })
}

fn entries(name: &str, map: &OwnedFd) -> Result<u32, Error> {
    let info = sys::map_info(map);
    info.map(|info| info.max_entries)
        .map_err(|error| refused("read", format_args!("map {name}"), error))
}

fn duplicate(name: &str, map: &OwnedFd) -> Result<OwnedFd, Error> {
    map.try_clone()
        .map_err(|error| refused("duplicate", format_args!("map {name}"), error))
}

/// The old heartbeat and lease go on; COMPLETE does not.
fn create_meta(
    object: &Object,
    old: Option<&OwnedFd>,
    number: u64,
    lost_ids: bool,
) -> Result<OwnedFd, Error> {
    let map = object.create("META", 1)?;
    let old: Option<Meta> = match old {
        Some(old) => Some(array("META", old, false)?.read(0)),
        None => None,
    };
    let mut meta = old.unwrap_or_else(|| sys::from_prefix(&[]));
    meta.abi_version = ABI_VERSION;
    meta.flags &= meta_flags::OPT_OUT | meta_flags::UNBOUND;
    if lost_ids {
        meta.flags |= meta_flags::UNBOUND;
    }
    meta.generation = number;
    array("META", &map, true)?.write(0, &meta);
    Ok(map)
}

fn array(name: &str, map: &OwnedFd, writable: bool) -> Result<Array, Error> {
    Array::new(duplicate(name, map)?, writable)
        .map_err(|error| refused("map", format_args!("map {name}"), error))
}

/// Copies what both have room for. STATS is not copied: the old programs count until the hooks move, so its totals are
/// added afterwards.
fn copy(name: &str, old: &OwnedFd, new: &OwnedFd) -> Result<(), Error> {
    match name {
        "FRONTENDS" => copy_hash::<FrontendKey, FrontendValue>(name, old, new),
        "VIPS" | "LOCAL_ADDRS" => copy_hash::<Addr, u32>(name, old, new),
        "STATS" => Ok(()),
        _ => {
            array(name, new, true)?.copy_from(&array(name, old, false)?);
            Ok(())
        }
    }
}

fn copy_hash<K: Plain, V: Plain>(name: &str, old: &OwnedFd, new: &OwnedFd) -> Result<(), Error> {
    let open = |map| {
        Hash::<K, V>::new(duplicate(name, map)?, name)
            .map_err(|error| refused("use", format_args!("map {name}"), error))
    };
    open(new)?.upsert(&open(old)?.entries()?)
}

/// Sockets and affinity entries name members by index and generation. Where the indices were lost, none of the new
/// generations may be one that they know.
fn renew_generations(members: &OwnedFd) -> Result<(), Error> {
    let members = array("MEMBERS", members, true)?;
    let unseen = Member {
        word: MemberWord::new(monotonic_ns() as u32 | 1, 0),
        service: UNSEEN,
        ..Member::default()
    };
    for index in 0..members.len() {
        members.write(index, &unseen);
    }
    Ok(())
}

/// CLOCK_MONOTONIC, which the programs read as `bpf_ktime_get_ns`.
pub fn monotonic_ns() -> u64 {
    let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC)
        .expect("CLOCK_MONOTONIC exists on every Linux");
    now.tv_sec() as u64 * 1_000_000_000 + now.tv_nsec() as u64
}

/// Unpins what is ours in a generation's directory, and removes it.
///
/// # Errors
/// The kernel refused.
pub fn remove(generation: &Generation, object: &Object) -> Result<(), Error> {
    generation.remove(|pin, fd| is_ours(generation, object, pin, fd))
}

/// Whether what is pinned as `pin` was put there by an agent.
fn is_ours(generation: &Generation, object: &Object, pin: &str, fd: &OwnedFd) -> bool {
    let pin = pin.strip_suffix(BESIDE).unwrap_or(pin);
    match sys::kind_of(fd.as_fd()) {
        Ok(sys::Kind::Map) => {
            let Ok(info) = sys::map_info(fd) else {
                return false;
            };
            let same_abi = generation.abi == ABI_VERSION;
            let spec = object
                .maps()
                .iter()
                .find(|(name, _)| generation.pin_path(name).ends_with(pin));
            match spec {
                Some((name, _)) if object.constants(name).is_some() => true,
                Some((name, spec)) => shapes::check(name, spec, &info, same_abi).is_ok(),
                // A map that only the other ABI has.
                None => {
                    !same_abi
                        && sys::name_of(&info.name) == pin.chars().take(15).collect::<String>()
                }
            }
        }
        Ok(sys::Kind::Program) => {
            let is_hook = Hook::ALL.iter().any(|hook| hook.name() == pin);
            is_hook || generation.abi != ABI_VERSION
        }
        Ok(sys::Kind::Link) | Err(_) => false,
    }
}
