//! The maps as the programs see them.

use proxy_ebpf::{
    abi::{
        Addr, AffinityKey, AffinityValue, FrontendKey, FrontendValue, Member, Policy, Reason,
        SetWord, Slot,
    },
    lb::{Scope, Tables},
};

use super::Simulated;

impl Tables for Simulated {
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
