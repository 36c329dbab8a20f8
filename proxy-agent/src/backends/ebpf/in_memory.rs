//! The maps in memory, as the programs see them: under the simulated kernel, and wherever a decision is taken over a copy.

use std::{
    cell::RefCell,
    collections::{BTreeMap, BTreeSet, HashMap},
};

use proxy_ebpf::{
    abi::{
        Addr, AffinityKey, AffinityValue, FrontendKey, FrontendValue, Member, Policy, Reason,
        Service, SetWord, Slot,
    },
    lb::{Scope, Tables},
};

/// What the balancing decision reads. Arrays end where they end: what lies behind does not exist.
#[derive(Clone, Default)]
pub struct InMemory {
    /// FRONTENDS.
    pub frontends: BTreeMap<FrontendKey, FrontendValue>,
    /// VIPS.
    pub vips: BTreeSet<Addr>,
    /// LOCAL_ADDRS.
    pub addresses: BTreeMap<Addr, u32>,
    /// SERVICES.
    pub services: Vec<Service>,
    /// SLOTS.
    pub slots: Vec<Slot>,
    /// MEMBERS.
    pub members: Vec<Member>,
    /// AFFINITY.
    pub affinity: RefCell<HashMap<AffinityKey, AffinityValue>>,
}

impl Tables for InMemory {
    fn frontend(&self, key: &FrontendKey) -> Option<FrontendValue> {
        self.frontends.get(key).copied()
    }

    fn is_cluster_ip(&self, addr: &Addr) -> bool {
        self.vips.contains(addr)
    }

    fn node_address(&self, addr: &Addr) -> Option<u32> {
        self.addresses.get(addr).copied()
    }

    fn set(&self, service: u32, scope: Scope) -> Option<SetWord> {
        let service = self.services.get(service as usize)?;
        Some(match scope {
            Scope::Cluster => service.cluster,
            Scope::Local => service.local,
        })
    }

    fn policy(&self, service: u32) -> Option<Policy> {
        Some(self.services.get(service as usize)?.policy)
    }

    fn slot(&self, index: u32) -> Option<Slot> {
        self.slots.get(index as usize).copied()
    }

    fn member(&self, index: u32) -> Option<Member> {
        self.members.get(index as usize).copied()
    }

    fn affinity(&self, key: &AffinityKey) -> Option<AffinityValue> {
        self.affinity.borrow().get(key).copied()
    }

    fn remember(&self, key: &AffinityKey, value: &AffinityValue) {
        self.affinity.borrow_mut().insert(*key, *value);
    }

    fn note(&self, _: Reason) {}
}
