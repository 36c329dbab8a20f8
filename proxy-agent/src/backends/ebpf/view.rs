//! Pinned maps seen from outside: for `dump` and `explain`, with the agent dead or alive. Takes no lock, writes nothing.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use proxy_ebpf::{
    abi::{
        Addr, AffinityKey, AffinityValue, Connection, FrontendKey, FrontendValue, Member, Meta,
        Name, Peer, PeerKey, Policy, Reason, Service, SetWord, Slot, SocketRecord, Stats,
        peer_flags,
    },
    lb::{self, Scope},
};

use super::{
    dir::Directory,
    kernel,
    links::{self, Hook, Place},
    maps::{Array, Hash, per_cpu_totals},
    refused::refused,
    store::Capacity,
    sys,
    tables::{Fds, Tables, array, handle, hash, opted_out},
};
use crate::backends::Error;

/// The current generation of the maps below a directory.
pub struct PinnedMaps {
    links: PathBuf,
    fds: Fds,
    tables: Tables,
    affinity: Hash<AffinityKey, AffinityValue>,
    connections: Array,
}

/// One pinned map.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MapSummary {
    /// Name of the pin.
    pub name: String,
    /// Kernel id.
    pub id: u32,
    /// Type in the kernel's words, lower case: "hash", "array", "lru_hash".
    pub map_type: &'static str,
    /// Bytes of a key.
    pub key_size: u32,
    /// Bytes of a value.
    pub value_size: u32,
    /// Entries in use; `None` where that cannot be told (socket storage).
    pub entries: Option<u32>,
    /// Entries that fit.
    pub capacity: u32,
    /// Bytes of kernel memory.
    pub bytes: u64,
}

/// One pinned hook.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HookSummary {
    /// Name of the hook and of its program: "connect4".
    pub hook: &'static str,
    /// Id of the link.
    pub link: u32,
    /// Id of the program.
    pub program: u32,
    /// Tag of the program: what it does, whatever its maps are.
    pub tag: String,
    /// Id of the cgroup that it is attached to; 0 for iterators.
    pub cgroup: u64,
}

impl PinnedMaps {
    /// Opens the current generation below `bpf_dir`.
    ///
    /// # Errors
    /// There is none, or it cannot be read.
    pub fn open(bpf_dir: &Path) -> Result<Self, Error> {
        // A swap may remove the generation while it is being opened; the next one is complete by then.
        Self::open_once(bpf_dir)
            .or_else(|_| Self::open_once(bpf_dir))
            .or_else(|_| Self::open_once(bpf_dir))
    }

    fn open_once(bpf_dir: &Path) -> Result<Self, Error> {
        let dir = Directory::look(bpf_dir)?;
        let (_, fds) = kernel::newest_complete(&dir)?;
        Ok(Self {
            links: bpf_dir.join("links"),
            tables: Tables::new(&fds, false)?,
            affinity: hash(&fds, "AFFINITY")?,
            connections: array(&fds, "CONNECTIONS", false)?,
            fds,
        })
    }

    /// META.
    pub fn meta(&self) -> Meta {
        self.tables.meta()
    }

    /// Entries that fit.
    pub fn capacity(&self) -> Capacity {
        self.tables.capacity()
    }

    /// SERVICES at `index`, `None` beyond the map's end.
    pub fn service(&self, index: u32) -> Option<Service> {
        (index < self.tables.services.len()).then(|| self.tables.services.read(index))
    }

    /// NAMES at `index`.
    pub fn name(&self, index: u32) -> Option<Name> {
        (index < self.tables.names.len()).then(|| self.tables.names.read(index))
    }

    /// STATS at `index`.
    pub fn stats(&self, index: u32) -> Option<Stats> {
        (index < self.tables.stats.len()).then(|| self.tables.stats.read(index))
    }

    /// All of FRONTENDS.
    ///
    /// # Errors
    /// The kernel could not be read; so below.
    pub fn frontends(&self) -> Result<Vec<(FrontendKey, FrontendValue)>, Error> {
        self.tables.frontends.entries()
    }

    /// All of VIPS.
    ///
    /// # Errors
    /// As above.
    pub fn vips(&self) -> Result<Vec<Addr>, Error> {
        self.tables.vip_addresses()
    }

    /// All of LOCAL_ADDRS.
    ///
    /// # Errors
    /// As above.
    pub fn addresses(&self) -> Result<Vec<(Addr, u32)>, Error> {
        self.tables.addresses.entries()
    }

    /// All of AFFINITY.
    ///
    /// # Errors
    /// As above.
    pub fn affinity_entries(&self) -> Result<Vec<(AffinityKey, AffinityValue)>, Error> {
        self.affinity.entries()
    }

    /// All of PEERS.
    ///
    /// # Errors
    /// As above.
    pub fn peers(&self) -> Result<Vec<(PeerKey, Peer)>, Error> {
        hash(&self.fds, "PEERS")?.entries()
    }

    /// The entries of CONNECTIONS that sockets have.
    pub fn connections(&self) -> impl Iterator<Item = Connection> {
        (0..self.connections.len())
            .map(|index| self.connections.read::<Connection>(index))
            .filter(|entry| entry.owner != 0 && entry.peer.flags & peer_flags::USED != 0)
    }

    /// Every socket with storage of ours in the calling thread's network namespace.
    ///
    /// # Errors
    /// As above, or the kernel refused an iterator over sockets.
    pub fn sockets(&self) -> Result<Vec<SocketRecord>, Error> {
        let mut records = Vec::new();
        for hook in [Hook::ListTcp, Hook::ListUdp] {
            let path = self.links.join(hook.name());
            let bytes = fs::read(&path).map_err(|error| refused("read", path.display(), error))?;
            let found = bytes.chunks_exact(size_of::<SocketRecord>());
            records.extend(found.map(sys::from_prefix::<SocketRecord>));
        }
        Ok(records)
    }

    /// Ids of the cgroups whose sockets are left alone.
    ///
    /// # Errors
    /// As above.
    pub fn opt_out(&self) -> Result<BTreeSet<u64>, Error> {
        opted_out(&self.fds)
    }

    /// REASONS, summed over the CPUs.
    ///
    /// # Errors
    /// As above.
    pub fn reasons(&self) -> Result<Vec<(Reason, u64)>, Error> {
        let totals = per_cpu_totals(&handle(&self.fds, "REASONS")?)
            .map_err(|error| refused("read", "map REASONS", error))?;
        Ok(Reason::ALL.into_iter().zip(totals).collect())
    }

    /// Every pinned map of the generation, by name.
    ///
    /// # Errors
    /// As above.
    pub fn maps(&self) -> Result<Vec<MapSummary>, Error> {
        let mut summaries = Vec::new();
        for (name, map) in &self.fds {
            let failed = |error| refused("read", format_args!("map {name}"), error);
            let info = sys::map_info(map).map_err(failed)?;
            let memory = sys::fd_field(map, "memlock").map_err(failed)?;
            summaries.push(MapSummary {
                name: name.clone(),
                id: info.id,
                map_type: kernel::type_name(info.type_),
                key_size: info.key_size,
                value_size: info.value_size,
                entries: self.entries(name)?,
                capacity: info.max_entries,
                bytes: memory.and_then(|bytes| bytes.parse().ok()).unwrap_or(0),
            });
        }
        Ok(summaries)
    }

    /// Entries in use. Of an array: those that are not all zero, as far as that says something.
    fn entries(&self, name: &str) -> Result<Option<u32>, Error> {
        let count = |used: usize| Some(used as u32);
        let tables = &self.tables;
        Ok(match name {
            "FRONTENDS" => count(tables.frontends.entries()?.len()),
            "VIPS" => count(tables.vips.entries()?.len()),
            "LOCAL_ADDRS" => count(tables.addresses.entries()?.len()),
            "AFFINITY" => count(self.affinity.entries()?.len()),
            "PEERS" => count(self.peers()?.len()),
            "CONNECTIONS" => count(self.connections().count()),
            "OPTOUT" => count(self.opt_out()?.len()),
            "SERVICES" => Some(tables.services.used()),
            "NAMES" => Some(tables.names.used()),
            "SLOTS" => Some(tables.slots.used()),
            "STATS" => Some(tables.stats.used()),
            "META" => Some(tables.meta.used()),
            // A free member keeps its generation.
            "MEMBERS" => count(
                (0..tables.members.len())
                    .filter(|index| tables.members.read::<Member>(*index).word.bits() != 0)
                    .count(),
            ),
            _ => None,
        })
    }

    /// Every pinned hook, in the order in which they are attached.
    ///
    /// # Errors
    /// As above.
    pub fn hooks(&self) -> Result<Vec<HookSummary>, Error> {
        let mut summaries = Vec::new();
        for hook in Hook::ALL {
            let Some((link, info)) = links::pinned_link(&self.links, hook)? else {
                continue;
            };
            let tag = sys::fd_field(&link, "prog_tag")
                .map_err(|error| refused("read", format_args!("hook {}", hook.name()), error))?;
            let cgroup = match hook.place() {
                Place::Cgroup(_) => sys::cgroup_of(&info).0,
                Place::Iterator(_) => 0,
            };
            summaries.push(HookSummary {
                hook: hook.name(),
                link: info.id,
                program: info.prog_id,
                tag: tag.unwrap_or_default(),
                cgroup,
            });
        }
        Ok(summaries)
    }
}

impl lb::Tables for PinnedMaps {
    fn frontend(&self, key: &FrontendKey) -> Option<FrontendValue> {
        self.tables.frontends.find(key).ok().flatten()
    }

    fn is_cluster_ip(&self, addr: &Addr) -> bool {
        self.tables
            .vips
            .find(addr)
            .is_ok_and(|found| found.is_some())
    }

    fn node_address(&self, addr: &Addr) -> Option<u32> {
        self.tables.addresses.find(addr).ok().flatten()
    }

    fn set(&self, service: u32, scope: Scope) -> Option<SetWord> {
        let service = self.service(service)?;
        Some(match scope {
            Scope::Cluster => service.cluster,
            Scope::Local => service.local,
        })
    }

    fn policy(&self, service: u32) -> Option<Policy> {
        self.service(service).map(|service| service.policy)
    }

    fn slot(&self, index: u32) -> Option<Slot> {
        (index < self.tables.slots.len()).then(|| self.tables.slots.read(index))
    }

    fn member(&self, index: u32) -> Option<Member> {
        (index < self.tables.members.len()).then(|| self.tables.members.read(index))
    }

    fn affinity(&self, key: &AffinityKey) -> Option<AffinityValue> {
        self.affinity.find(key).ok().flatten()
    }

    fn remember(&self, _key: &AffinityKey, _value: &AffinityValue) {}

    fn note(&self, _reason: Reason) {}
}
