//! [`KernelStore`] as a [`Store`].

use proxy_ebpf::{
    abi::{
        Addr, FrontendKey, FrontendValue, Member, MemberWord, Name, Policy, Service, SetWord, Slot,
    },
    lb::Scope,
};

use super::{
    super::{
        load::Object,
        store::{Capacity, Store},
    },
    KernelStore, shapes,
};
use crate::backends::Error;

impl Store for KernelStore {
    fn capacity(&self) -> Capacity {
        self.current
            .as_ref()
            .map(|current| current.tables.capacity())
            .unwrap_or_default()
    }

    fn reserve(&mut self, need: &Capacity) -> Result<(), Error> {
        if self.current.is_some() && shapes::holds(&self.capacity(), need) {
            return Ok(());
        }
        self.grow(need)
    }

    fn publish(&mut self) -> Result<(), Error> {
        if self.published {
            return Ok(());
        }
        if self.current.is_none() {
            self.grow(&Capacity::default())?;
        }
        let object = Object::embedded(self.constants)?;
        if let Some(current) = &self.current {
            self.complete(current);
        }
        self.move_hooks(&object)?;
        self.remove_other_generations(&object)?;
        self.published = true;
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
        let Some(current) = &self.current else {
            return Ok(Vec::new());
        };
        current.tables.frontends.entries()
    }

    fn vips(&self) -> Result<Vec<Addr>, Error> {
        let Some(current) = &self.current else {
            return Ok(Vec::new());
        };
        current.tables.vip_addresses()
    }

    fn addresses(&self) -> Result<Vec<(Addr, u32)>, Error> {
        let Some(current) = &self.current else {
            return Ok(Vec::new());
        };
        current.tables.addresses.entries()
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
        self.grace.start()
    }

    fn grace_over(&self) -> u64 {
        self.grace.over()
    }

    fn wait_grace(&mut self, number: u64) {
        self.grace.wait(number);
    }
}
