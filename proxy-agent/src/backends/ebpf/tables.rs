//! The maps of one generation that the agent reads and writes, as typed tables.

use std::{
    collections::{BTreeMap, BTreeSet},
    os::fd::OwnedFd,
};

use proxy_ebpf::abi::{Addr, FrontendKey, FrontendValue, Meta};

use super::{
    maps::{Array, Hash},
    refused::refused,
    store::Capacity,
};
use crate::backends::Error;

/// Maps by name.
pub type Fds = BTreeMap<String, OwnedFd>;

/// The typed maps; see `docs/abi.md`.
pub struct Tables {
    /// SERVICES.
    pub services: Array,
    /// SLOTS.
    pub slots: Array,
    /// MEMBERS.
    pub members: Array,
    /// NAMES.
    pub names: Array,
    /// META.
    pub meta: Array,
    /// STATS.
    pub stats: Array,
    /// FRONTENDS.
    pub frontends: Hash<FrontendKey, FrontendValue>,
    /// VIPS.
    pub vips: Hash<Addr, u32>,
    /// LOCAL_ADDRS.
    pub addresses: Hash<Addr, u32>,
    /// Entries that fit the hashes.
    hash_capacity: (u32, u32, u32),
}

impl Tables {
    /// Takes their own handles to the maps in `fds`.
    ///
    /// # Errors
    /// One is missing or of a wrong shape.
    pub fn new(fds: &Fds, writable: bool) -> Result<Self, Error> {
        let array = |name| array(fds, name, writable);
        Ok(Self {
            services: array("SERVICES")?,
            slots: array("SLOTS")?,
            members: array("MEMBERS")?,
            names: array("NAMES")?,
            meta: array("META")?,
            stats: array("STATS")?,
            frontends: hash(fds, "FRONTENDS")?,
            vips: hash(fds, "VIPS")?,
            addresses: hash(fds, "LOCAL_ADDRS")?,
            hash_capacity: (
                entries(fds, "FRONTENDS")?,
                entries(fds, "VIPS")?,
                entries(fds, "LOCAL_ADDRS")?,
            ),
        })
    }

    /// Entries that fit.
    pub fn capacity(&self) -> Capacity {
        let (frontends, vips, addresses) = self.hash_capacity;
        Capacity {
            services: self
                .services
                .len()
                .min(self.names.len())
                .min(self.stats.len()),
            slots: self.slots.len(),
            members: self.members.len(),
            frontends,
            vips,
            addresses,
        }
    }

    /// META.
    pub fn meta(&self) -> Meta {
        self.meta.read(0)
    }

    /// All of VIPS: its keys, the values say nothing.
    ///
    /// # Errors
    /// The kernel could not be read.
    pub fn vip_addresses(&self) -> Result<Vec<Addr>, Error> {
        let entries = self.vips.entries()?;
        Ok(entries.into_iter().map(|(address, _)| address).collect())
    }
}

/// A handle of its own to the map called `name`.
///
/// # Errors
/// There is none.
pub fn handle(fds: &Fds, name: &str) -> Result<OwnedFd, Error> {
    let missing = || {
        Error::Unusable(format!(
            "map {name} is missing; run the agent once to repair it"
        ))
    };
    let fd = fds.get(name).ok_or_else(missing)?;
    fd.try_clone()
        .map_err(|error| refused("duplicate", format_args!("map {name}"), error))
}

/// The array called `name`, mapped.
///
/// # Errors
/// It is missing or cannot be mapped.
pub fn array(fds: &Fds, name: &str, writable: bool) -> Result<Array, Error> {
    let wrong = |error| refused("map", format_args!("map {name}"), error);
    Array::new(handle(fds, name)?, writable).map_err(wrong)
}

/// The hash called `name`.
///
/// # Errors
/// It is missing or of a wrong shape.
pub fn hash<K, V>(fds: &Fds, name: &str) -> Result<Hash<K, V>, Error>
where
    K: proxy_ebpf::abi::Plain,
    V: proxy_ebpf::abi::Plain,
{
    let wrong = |error| refused("use", format_args!("map {name}"), error);
    Hash::new(handle(fds, name)?, name).map_err(wrong)
}

/// Keys of OPTOUT: ids of the cgroups whose sockets are left alone.
///
/// # Errors
/// It is missing or cannot be read.
pub fn opted_out(fds: &Fds) -> Result<BTreeSet<u64>, Error> {
    let entries: Vec<(u64, u32)> = hash(fds, "OPTOUT")?.entries()?;
    Ok(entries.into_iter().map(|(cgroup, _)| cgroup).collect())
}

fn entries(fds: &Fds, name: &str) -> Result<u32, Error> {
    let info = super::sys::map_info(handle(fds, name)?);
    info.map(|info| info.max_entries)
        .map_err(|error| refused("read", format_args!("map {name}"), error))
}
