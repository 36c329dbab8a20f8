//! The maps in memory, with readers that are as slow as the kernel allows: the proof of the update order.
//!
//! After each write the store looks at itself as every program could: at what can be found now, and at what was found
//! since the last grace period that is not over. A violation panics with the invariant's number (docs/ARCHITECTURE.md).
//! Hash operations can be made to fail, and all writes after the n-th to be lost, as when the agent is killed.

use std::{fmt, rc::Rc};

use proxy_ebpf::{
    abi::{
        Addr, FrontendKey, FrontendValue, Member, MemberWord, Name, Policy, Service, SetWord, Slot,
    },
    lb::Scope,
};

use super::{
    in_memory::InMemory,
    render::NO_NAME,
    store::{Capacity, Store},
};
use crate::backends::Error;

mod readers;

use readers::Readers;

/// Looks at the store after each write.
pub type Watcher = Rc<dyn Fn(&Simulated)>;

/// The maps in memory.
#[derive(Clone, Default)]
pub struct Simulated {
    capacity: Capacity,
    /// More memory than this is not to be had.
    limit: Option<Capacity>,
    maps: InMemory,
    names: Vec<Name>,
    readers: Readers,
    checked: bool,
    watcher: Option<Watcher>,
    /// One hash operation in so many fails; 0 = none.
    fault_rate: u64,
    seed: u64,
    /// Writes that still take effect.
    writes_left: Option<u64>,
    writes: u64,
    published: bool,
    started: u64,
    over: u64,
}

impl fmt::Debug for Simulated {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Simulated")
            .field("capacity", &self.capacity)
            .field("writes", &self.writes)
            .finish_non_exhaustive()
    }
}

impl Simulated {
    /// Empty maps that check themselves after each write.
    pub fn checked() -> Self {
        Self {
            checked: true,
            ..Self::default()
        }
    }

    /// Empty maps of this size that never grow.
    pub fn fixed(capacity: Capacity) -> Self {
        let mut store = Self::checked();
        store.resize(&capacity);
        store.limit = Some(capacity);
        store
    }

    /// Checks nothing from now on: what is written next is meant to be wrong.
    pub fn unchecked(&mut self) {
        self.checked = false;
    }

    /// Ends what [`Simulated::fixed`] said.
    pub fn grow_freely(&mut self) {
        self.limit = None;
    }

    /// Grace periods that were started.
    pub fn started(&self) -> u64 {
        self.started
    }

    /// One hash operation in `rate` fails from now on, as drawn from `seed`; 0 = none.
    pub fn inject_faults(&mut self, rate: u64, seed: u64) {
        (self.fault_rate, self.seed) = (rate, seed);
    }

    /// Loses all writes after the next `writes`, as a killed agent would; `None` ends that.
    pub fn crash_after(&mut self, writes: Option<u64>) {
        self.writes_left = writes;
    }

    /// Whether writes were lost.
    pub fn has_crashed(&self) -> bool {
        self.writes_left == Some(0)
    }

    /// Calls `watcher` after each write.
    pub fn watch(&mut self, watcher: Option<Watcher>) {
        self.watcher = watcher;
    }

    /// Writes that took effect so far.
    pub fn writes(&self) -> u64 {
        self.writes
    }

    /// The maps as the programs see them.
    pub fn maps(&self) -> &InMemory {
        &self.maps
    }

    /// Whether the maps were published.
    pub fn is_published(&self) -> bool {
        self.published
    }

    /// Lets all grace periods that were started be over.
    pub fn pass_time(&mut self) {
        self.over = self.started;
        self.readers.forget(self.over);
    }

    fn resize(&mut self, need: &Capacity) {
        let have = &mut self.capacity;
        *have = Capacity {
            services: have.services.max(need.services),
            slots: have.slots.max(need.slots),
            members: have.members.max(need.members),
            frontends: have.frontends.max(need.frontends),
            vips: have.vips.max(need.vips),
            addresses: have.addresses.max(need.addresses),
        };
        let services = have.services as usize;
        self.maps.services.resize(services, Service::default());
        self.names.resize(services, NO_NAME);
        self.maps.slots.resize(have.slots as usize, Slot::default());
        self.maps
            .members
            .resize(have.members as usize, Member::default());
    }

    /// Does one write, unless the agent is dead by now, and looks at the result.
    fn write(&mut self, write: impl FnOnce(&mut Self)) {
        match &mut self.writes_left {
            Some(0) => return,
            Some(left) => *left -= 1,
            None => {}
        }
        write(self);
        self.writes += 1;
        self.look();
        if let Some(watcher) = self.watcher.clone() {
            watcher(self);
        }
    }

    fn look(&mut self) {
        if self.checked {
            self.readers.look(&self.maps, self.started);
        }
    }

    fn fails(&mut self) -> bool {
        self.fault_rate > 0 && self.random().is_multiple_of(self.fault_rate)
    }

    /// xorshift64*: enough for faults.
    fn random(&mut self) -> u64 {
        let mut x = self.seed | 1;
        x ^= x >> 12;
        x ^= x << 25;
        x ^= x >> 27;
        self.seed = x;
        x.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 32
    }

    /// E2BIG, as the kernel says it.
    fn expect_room<T>(
        &self,
        items: &[T],
        known: impl Fn(&Self, &T) -> bool,
        used: impl Fn(&Self) -> (usize, u32),
    ) -> Result<(), Error> {
        let (len, capacity) = used(self);
        let new = items.iter().filter(|item| !known(self, item)).count();
        if len + new <= capacity as usize {
            return Ok(());
        }
        Err(Error::Kernel {
            action: "update",
            object: format!("a map of {capacity} entries"),
            cause: std::io::Error::from_raw_os_error(libc::E2BIG),
            hint: "",
        })
    }

    /// One hash operation per item; those before a fault went in.
    fn each<T>(&mut self, items: &[T], operation: impl Fn(&mut Self, &T)) -> Result<(), Error> {
        for item in items {
            if self.fails() {
                return Err(Error::Injected);
            }
            self.write(|store| operation(store, item));
        }
        Ok(())
    }
}

impl Store for Simulated {
    fn capacity(&self) -> Capacity {
        self.capacity
    }

    fn reserve(&mut self, need: &Capacity) -> Result<(), Error> {
        if self.fails() {
            return Err(Error::Injected);
        }
        if self.limit.is_some() {
            return Err(Error::Kernel {
                action: "create",
                object: "the maps of the next generation".to_owned(),
                cause: std::io::ErrorKind::OutOfMemory.into(),
                hint: "",
            });
        }
        self.resize(need);
        Ok(())
    }

    fn publish(&mut self) -> Result<(), Error> {
        self.published = true;
        Ok(())
    }

    fn service(&self, index: u32) -> Service {
        self.maps.services[index as usize]
    }

    fn name(&self, index: u32) -> Name {
        self.names[index as usize]
    }

    fn slot(&self, index: u32) -> Slot {
        self.maps.slots[index as usize]
    }

    fn member(&self, index: u32) -> Member {
        self.maps.members[index as usize]
    }

    fn write_service(&mut self, index: u32, service: &Service) {
        if self.checked && !self.has_crashed() {
            self.readers
                .expect_service_unread(&self.maps, index, service);
        }
        self.write(|store| store.maps.services[index as usize] = *service);
    }

    fn write_name(&mut self, index: u32, name: &Name) {
        self.write(|store| store.names[index as usize] = *name);
    }

    fn write_slots(&mut self, base: u32, slots: &[Slot]) {
        for (index, slot) in (base as usize..).zip(slots) {
            self.write(|store| store.maps.slots[index] = *slot);
        }
    }

    fn write_member(&mut self, index: u32, member: &Member) {
        if self.checked && !self.has_crashed() {
            self.readers.expect_member_unread(&self.maps, index, member);
        }
        self.write(|store| {
            store.maps.members[index as usize] = *member;
            store.readers.saw_member(index, member.word);
        });
    }

    fn commit_set(&mut self, service: u32, scope: Scope, word: SetWord) {
        self.write(|store| {
            let service = &mut store.maps.services[service as usize];
            match scope {
                Scope::Cluster => service.cluster = word,
                Scope::Local => service.local = word,
            }
        });
    }

    fn commit_policy(&mut self, service: u32, policy: Policy) {
        self.write(|store| store.maps.services[service as usize].policy = policy);
    }

    fn commit_member(&mut self, member: u32, word: MemberWord) {
        self.write(|store| {
            store.maps.members[member as usize].word = word;
            store.readers.saw_member(member, word);
        });
    }

    fn frontends(&self) -> Result<Vec<(FrontendKey, FrontendValue)>, Error> {
        Ok(self.maps.frontends.iter().map(|(k, v)| (*k, *v)).collect())
    }

    fn vips(&self) -> Result<Vec<Addr>, Error> {
        Ok(self.maps.vips.iter().copied().collect())
    }

    fn addresses(&self) -> Result<Vec<(Addr, u32)>, Error> {
        Ok(self.maps.addresses.iter().map(|(k, v)| (*k, *v)).collect())
    }

    fn upsert_frontends(&mut self, entries: &[(FrontendKey, FrontendValue)]) -> Result<(), Error> {
        let known = |store: &Self, (key, _): &_| store.maps.frontends.contains_key(key);
        self.expect_room(entries, known, |store| {
            (store.maps.frontends.len(), store.capacity.frontends)
        })?;
        self.each(entries, |store, (key, value)| {
            store.maps.frontends.insert(*key, *value);
        })
    }

    fn delete_frontends(&mut self, keys: &[FrontendKey]) -> Result<(), Error> {
        self.each(keys, |store, key| {
            store.maps.frontends.remove(key);
        })
    }

    fn upsert_vips(&mut self, vips: &[Addr]) -> Result<(), Error> {
        let known = |store: &Self, addr: &_| store.maps.vips.contains(addr);
        self.expect_room(vips, known, |store| {
            (store.maps.vips.len(), store.capacity.vips)
        })?;
        self.each(vips, |store, addr| {
            store.maps.vips.insert(*addr);
        })
    }

    fn delete_vips(&mut self, vips: &[Addr]) -> Result<(), Error> {
        self.each(vips, |store, addr| {
            store.maps.vips.remove(addr);
        })
    }

    fn upsert_addresses(&mut self, entries: &[(Addr, u32)]) -> Result<(), Error> {
        let known = |store: &Self, (addr, _): &_| store.maps.addresses.contains_key(addr);
        self.expect_room(entries, known, |store| {
            (store.maps.addresses.len(), store.capacity.addresses)
        })?;
        self.each(entries, |store, (addr, flags)| {
            store.maps.addresses.insert(*addr, *flags);
        })
    }

    fn delete_addresses(&mut self, addresses: &[Addr]) -> Result<(), Error> {
        self.each(addresses, |store, addr| {
            store.maps.addresses.remove(addr);
        })
    }

    fn start_grace(&mut self) -> u64 {
        self.started += 1;
        // Whatever can be found now can also be found by a program that this grace period does not wait for.
        self.look();
        self.started
    }

    fn grace_over(&self) -> u64 {
        self.over
    }

    fn wait_grace(&mut self, number: u64) {
        assert!(
            number <= self.started,
            "nobody started grace period {number}"
        );
        self.over = self.over.max(number);
        self.readers.forget(self.over);
    }
}
