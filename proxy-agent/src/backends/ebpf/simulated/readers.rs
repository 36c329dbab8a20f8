//! Model readers: everything that a program may have read and still hold.
//!
//! A reading is forgotten when a grace period is over that was started after the reading could last be made.

use std::collections::{BTreeMap, HashMap};

use proxy_ebpf::abi::{Member, MemberWord, Service, SetWord, Slot};

use crate::backends::ebpf::in_memory::InMemory;

/// What programs may hold.
#[derive(Clone, Default)]
pub struct Readers {
    /// Services found by a frontend, with the number of grace periods started when that was last possible.
    services: BTreeMap<u32, u64>,
    /// Set words found in those services, with the slots that they led to.
    sets: HashMap<SetWord, Held>,
    /// The last generation under which a member served.
    generations: HashMap<u32, u32>,
}

#[derive(Clone)]
struct Held {
    slots: Vec<Slot>,
    last_seen: u64,
}

impl Readers {
    /// Reads everything that can be found, and compares what is held with what it was.
    pub fn look(&mut self, maps: &InMemory, started: u64) {
        for (key, value) in &maps.frontends {
            let service = maps.services.get(value.service() as usize);
            let initialised = service.is_some_and(|service| service.used == 1);
            assert!(
                initialised && value.belongs_to(key),
                "I1: frontend {key:?} leads to service {}, which is not initialised",
                value.service()
            );
            self.services.insert(value.service(), started);
        }
        for addr in &maps.vips {
            assert!(
                maps.frontends.keys().any(|key| key.addr == *addr),
                "VIPS holds {addr:?}, which no frontend has: it may belong to somebody else"
            );
        }
        for (index, service_seen) in &self.services {
            let service = maps.services[*index as usize];
            for word in [service.cluster, service.local] {
                let held = self.sets.entry(word).or_insert_with(|| Held {
                    slots: slots(maps, word),
                    last_seen: *service_seen,
                });
                held.last_seen = held.last_seen.max(*service_seen);
            }
        }
        for (word, held) in &self.sets {
            assert_eq!(
                slots(maps, *word),
                held.slots,
                "I2: slots of a set that a reader may hold have changed"
            );
            assert!(
                held.slots.iter().all(|s| s.generation == word.generation()),
                "I2: a set word leads to slots of another generation"
            );
        }
    }

    /// Remembers under which generation a member serves.
    pub fn saw_member(&mut self, index: u32, word: MemberWord) {
        if word.bits() != 0 {
            self.generations.insert(index, word.generation());
        }
    }

    /// Grace periods up to `over` are over.
    pub fn forget(&mut self, over: u64) {
        self.services.retain(|_, last_seen| *last_seen >= over);
        self.sets.retain(|_, held| held.last_seen >= over);
    }

    /// I1 and I3: a service may be written only while nobody can read it, except to mark it unused.
    pub fn expect_service_unread(&self, maps: &InMemory, index: u32, service: &Service) {
        let frontends = maps.frontends.values();
        assert!(
            frontends.clone().all(|value| value.service() != index),
            "I3: service {index} is written while a frontend leads to it"
        );
        let now = maps.services[index as usize];
        let only_marked = Service { used: 0, ..now } == *service;
        assert!(
            only_marked || !self.services.contains_key(&index),
            "I4: service {index} is reused while a reader may hold it"
        );
    }

    /// I4: a member may be written only while it is free and no slot that somebody holds leads to it.
    pub fn expect_member_unread(&self, maps: &InMemory, index: u32, member: &Member) {
        assert_eq!(
            maps.members[index as usize].word.bits(),
            0,
            "I4: member {index} is written while it serves"
        );
        let held = self.sets.values().flat_map(|held| &held.slots);
        assert!(
            held.clone().all(|slot| slot.member != index),
            "I4: member {index} is reused while a reader may hold it"
        );
        assert_ne!(
            self.generations.get(&index),
            Some(&member.word.generation()),
            "I4: member {index} is reused under its old generation"
        );
    }
}

fn slots(maps: &InMemory, word: SetWord) -> Vec<Slot> {
    let range = word.base() as usize..(word.base() + word.count()) as usize;
    maps.slots[range].to_vec()
}

#[cfg(test)]
mod tests {
    use proxy_ebpf::{
        abi::{Addr, Be16, FrontendKey, FrontendValue, kind},
        lb::Scope,
    };

    use super::*;
    use crate::backends::ebpf::{
        simulated::Simulated,
        store::{Capacity, Store},
    };

    /// A frontend, its service, and a set of slot 0 and member 0.
    fn serving() -> Simulated {
        let mut store = Simulated::checked();
        let room = Capacity {
            services: 2,
            slots: 4,
            members: 4,
            frontends: 2,
            vips: 2,
            addresses: 2,
        };
        store.reserve(&room).unwrap();
        let member = Member {
            word: MemberWord::new(1, MemberWord::SERVING),
            ..Member::default()
        };
        store.write_member(0, &member);
        store.write_slots(0, &[slot(1)]);
        let service = Service {
            cluster: SetWord::new(0, 1, 1),
            used: 1,
            ..Service::default()
        };
        store.write_service(0, &service);
        store.upsert_frontends(&[frontend(0)]).unwrap();
        store
    }

    fn slot(generation: u32) -> Slot {
        Slot {
            generation,
            ..Slot::default()
        }
    }

    fn frontend(service: u32) -> (FrontendKey, FrontendValue) {
        let key = FrontendKey::new(Default::default(), Be16::new(80), 6);
        let value = FrontendValue::new(&key, service, kind::CLUSTER_IP, 0);
        (key, value)
    }

    fn empty(store: &mut Simulated) {
        store.commit_set(0, Scope::Cluster, SetWord::new(0, 0, 2));
    }

    #[test]
    #[should_panic(expected = "I1")]
    fn a_frontend_of_an_unused_service_is_noticed() {
        let _ = serving().upsert_frontends(&[frontend(1)]);
    }

    #[test]
    #[should_panic(expected = "I2")]
    fn a_slot_that_changes_under_a_late_reader_is_noticed() {
        let mut store = serving();
        empty(&mut store);
        store.write_slots(0, &[slot(2)]);
    }

    #[test]
    fn a_slot_may_change_after_the_grace_period() {
        let mut store = serving();
        empty(&mut store);
        let number = store.start_grace();
        store.wait_grace(number);
        store.write_slots(0, &[slot(2)]);
    }

    #[test]
    #[should_panic(expected = "I2")]
    fn a_grace_period_that_began_too_early_is_noticed() {
        let mut store = serving();
        let number = store.start_grace();
        empty(&mut store);
        store.wait_grace(number);
        store.write_slots(0, &[slot(2)]);
    }

    #[test]
    #[should_panic(expected = "I3")]
    fn a_service_that_is_reclaimed_before_its_frontend_is_noticed() {
        serving().write_service(0, &Service::default());
    }

    #[test]
    #[should_panic(expected = "I4: service")]
    fn a_service_that_is_reused_at_once_is_noticed() {
        let mut store = serving();
        store.delete_frontends(&[frontend(0).0]).unwrap();
        store.write_service(0, &Service::default());
    }

    #[test]
    #[should_panic(expected = "I4: member")]
    fn a_member_that_is_reused_at_once_is_noticed() {
        let mut store = serving();
        empty(&mut store);
        store.commit_member(0, MemberWord::new(2, 0));
        store.write_member(0, &Member::default());
    }

    #[test]
    #[should_panic(expected = "VIPS")]
    fn a_vip_without_a_frontend_is_noticed() {
        let _ = serving().upsert_vips(&[Addr::from_v4_word(9)]);
    }
}
