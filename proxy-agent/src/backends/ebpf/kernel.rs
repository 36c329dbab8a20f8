//! [`Store`] in the kernel: pinned maps, their generations, and the hooks that use them.

use std::{collections::BTreeSet, path::PathBuf, time::Duration};

use proxy_ebpf::{
    abi::{
        Addr, FrontendKey, FrontendValue, Member, MemberWord, Name, Policy, Service, SetWord, Slot,
        Stats,
    },
    lb::Scope,
};

use super::{
    store::{Capacity, Store},
    tables::Tables,
};
use crate::backends::Error;

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
}

/// A program that this kernel cannot run, and why the agent does without it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LeftOut {
    /// Name of the program.
    pub program: String,
    /// What is missing, and what that costs.
    pub reason: String,
}

/// The kernel's maps and hooks. Holds the lock of its directory while it lives.
pub struct KernelStore {
    tables: Option<Tables>,
    left_out: Vec<LeftOut>,
}

impl KernelStore {
    /// Takes the directory's lock and adopts what is pinned there; see `docs/adr/0003-generation-swap.md`.
    ///
    /// # Errors
    /// Another agent has the directory; something that the programs need is missing; the kernel refuses.
    pub fn open(options: OpenOptions) -> Result<Self, Error> {
        let OpenOptions { bpf_dir, .. } = options;
        Err(Error::Unusable(format!(
            "{} cannot be opened yet",
            bpf_dir.display()
        )))
    }

    /// Vouches for the maps: only after a complete sync, at least every second while a lease is armed.
    pub fn heartbeat(&self) {}

    /// The cgroups whose sockets are left alone, by id.
    ///
    /// # Errors
    /// The kernel refused.
    pub fn set_opt_out(&mut self, _cgroups: &BTreeSet<u64>) -> Result<(), Error> {
        Ok(())
    }

    /// Programs that this kernel cannot run.
    pub fn left_out(&self) -> &[LeftOut] {
        &self.left_out
    }

    /// STATS at `service`.
    pub fn stats(&self, service: u32) -> Stats {
        self.tables().stats.read(service)
    }

    fn tables(&self) -> &Tables {
        self.tables
            .as_ref()
            .expect("capacity() is zero before the first reserve(): no index is valid")
    }
}

impl Store for KernelStore {
    fn capacity(&self) -> Capacity {
        self.tables
            .as_ref()
            .map(Tables::capacity)
            .unwrap_or_default()
    }

    fn reserve(&mut self, _need: &Capacity) -> Result<(), Error> {
        Ok(())
    }

    fn publish(&mut self) -> Result<(), Error> {
        Ok(())
    }

    fn service(&self, index: u32) -> Service {
        self.tables().services.read(index)
    }

    fn name(&self, index: u32) -> Name {
        self.tables().names.read(index)
    }

    fn slot(&self, index: u32) -> Slot {
        self.tables().slots.read(index)
    }

    fn member(&self, index: u32) -> Member {
        self.tables().members.read(index)
    }

    fn write_service(&mut self, index: u32, service: &Service) {
        self.tables().services.write(index, service);
    }

    fn write_name(&mut self, index: u32, name: &Name) {
        self.tables().names.write(index, name);
    }

    fn write_slots(&mut self, base: u32, slots: &[Slot]) {
        let table = &self.tables().slots;
        for (index, slot) in (base..).zip(slots) {
            table.write(index, slot);
        }
    }

    fn write_member(&mut self, index: u32, member: &Member) {
        self.tables().members.write(index, member);
    }

    fn commit_set(&mut self, service: u32, scope: Scope, word: SetWord) {
        let offset = match scope {
            Scope::Cluster => std::mem::offset_of!(Service, cluster),
            Scope::Local => std::mem::offset_of!(Service, local),
        };
        self.tables().services.store_word(service, offset, word.0);
    }

    fn commit_policy(&mut self, service: u32, policy: Policy) {
        let offset = std::mem::offset_of!(Service, policy);
        self.tables().services.store_half(service, offset, policy.0);
    }

    fn commit_member(&mut self, member: u32, word: MemberWord) {
        let offset = std::mem::offset_of!(Member, word);
        self.tables().members.store_word(member, offset, word.0);
    }

    fn frontends(&self) -> Result<Vec<(FrontendKey, FrontendValue)>, Error> {
        self.tables
            .as_ref()
            .map_or(Ok(Vec::new()), |tables| tables.frontends.entries())
    }

    fn vips(&self) -> Result<Vec<Addr>, Error> {
        let entries = self
            .tables
            .as_ref()
            .map_or(Ok(Vec::new()), |tables| tables.vips.entries())?;
        Ok(entries.into_iter().map(|(address, _)| address).collect())
    }

    fn addresses(&self) -> Result<Vec<(Addr, u32)>, Error> {
        self.tables
            .as_ref()
            .map_or(Ok(Vec::new()), |tables| tables.addresses.entries())
    }

    fn upsert_frontends(&mut self, entries: &[(FrontendKey, FrontendValue)]) -> Result<(), Error> {
        self.tables().frontends.upsert(entries)
    }

    fn delete_frontends(&mut self, keys: &[FrontendKey]) -> Result<(), Error> {
        self.tables().frontends.delete(keys)
    }

    fn upsert_vips(&mut self, vips: &[Addr]) -> Result<(), Error> {
        let entries: Vec<(Addr, u32)> = vips.iter().map(|address| (*address, 1)).collect();
        self.tables().vips.upsert(&entries)
    }

    fn delete_vips(&mut self, vips: &[Addr]) -> Result<(), Error> {
        self.tables().vips.delete(vips)
    }

    fn upsert_addresses(&mut self, entries: &[(Addr, u32)]) -> Result<(), Error> {
        self.tables().addresses.upsert(entries)
    }

    fn delete_addresses(&mut self, addresses: &[Addr]) -> Result<(), Error> {
        self.tables().addresses.delete(addresses)
    }

    fn start_grace(&mut self) -> u64 {
        0
    }

    fn grace_over(&self) -> u64 {
        0
    }

    fn wait_grace(&mut self, _number: u64) {}
}
