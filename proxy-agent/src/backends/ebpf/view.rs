//! Pinned maps seen from outside: for `dump` and `explain`, with the agent dead or alive. Takes no lock, writes nothing.

use std::path::Path;

use proxy_ebpf::{
    abi::{
        Addr, AffinityKey, AffinityValue, Connection, FrontendKey, FrontendValue, Member, Meta,
        Name, Policy, Reason, Service, SetWord, Slot, Stats,
    },
    lb::{self, Scope},
};

pub use self::pins::{HookSummary, MapSummary, Pins};
use super::{
    maps::{Array, Hash},
    store::Capacity,
    tables::{Tables, array, hash},
};
use crate::backends::Error;

mod pins;

/// The current generation of the maps below a directory, mapped.
pub struct PinnedMaps {
    /// What can be read without.
    pub pins: Pins,
    tables: Tables,
    affinity: Hash<AffinityKey, AffinityValue>,
    connections: Array,
}

impl PinnedMaps {
    /// Opens the current generation below `bpf_dir`.
    ///
    /// # Errors
    /// There is none, or it cannot be read.
    pub fn open(bpf_dir: &Path) -> Result<Self, Error> {
        pins::while_generations_change(|| {
            let pins = Pins::open_once(bpf_dir)?;
            let fds = pins.fds();
            Ok(Self {
                tables: Tables::new(fds, false)?,
                affinity: hash(fds, "AFFINITY")?,
                connections: array(fds, "CONNECTIONS", false)?,
                pins,
            })
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

    /// The entries of CONNECTIONS that sockets have.
    pub fn connections(&self) -> impl Iterator<Item = Connection> {
        (0..self.connections.len())
            .map(|index| self.connections.read::<Connection>(index))
            .filter(pins::is_a_sockets)
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
