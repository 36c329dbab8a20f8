//! Reads the maps back: what they hold per service port, and which of their entries are free.
//!
//! Nothing that is read is trusted: an index out of bounds, a name that is none, sets that overlap or do not say what
//! the members say end as an entry that differs from every desired one, or as a stray. Nothing is written here.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    net::IpAddr,
};

use proxy_ebpf::{
    abi::{FrontendKey, FrontendValue, Member, MemberWord, Service, SetWord, kind},
    lb::Scope,
};

use super::{
    extents::{Extents, Pool},
    ids::{Entry, Ids},
    quarantine::Freed,
    render::{Digest, MapFrontend, service_port},
    store::{Capacity, Store, UNSEEN},
};
use crate::{
    backends::{Error, Key},
    state::ServicePort,
};

/// What the maps hold.
pub struct Observed {
    /// Digests by key.
    pub entries: BTreeMap<Key, u64>,
    /// The index over the maps.
    pub ids: Ids,
}

/// Reads everything. `previous` is the index as it was, if it was right: what it calls free is free at once; everything
/// else that nothing leads to waits for a grace period, since readers may still hold it.
///
/// # Errors
/// The kernel could not be read.
pub fn observe(store: &impl Store, previous: Option<&Ids>) -> Result<Observed, Error> {
    let mut reading = Reading::new(store);
    reading.services();
    reading.frontends()?;
    reading.vips()?;
    reading.members(previous);
    let ranges = reading.owned_slots();
    reading.slots(ranges, previous);
    reading.indices(previous);
    reading.finish()
}

/// A service port as it is being read.
struct Draft {
    key: ServicePort,
    service: Service,
    members: Vec<u32>,
    frontends: Vec<(FrontendKey, FrontendValue)>,
    sound: bool,
    owns_slots: bool,
}

struct Reading<'a, S> {
    store: &'a S,
    have: Capacity,
    drafts: HashMap<u32, Draft>,
    ids: Ids,
}

impl<'a, S: Store> Reading<'a, S> {
    fn new(store: &'a S) -> Self {
        Self {
            store,
            have: store.capacity(),
            drafts: HashMap::new(),
            ids: Ids::default(),
        }
    }

    fn services(&mut self) {
        let mut seen = HashSet::new();
        for index in 0..self.have.services {
            let service = self.store.service(index);
            for word in [service.cluster, service.local] {
                self.ids.generation = self.ids.generation.max(word.generation());
            }
            if service.used == 0 {
                continue;
            }
            match service_port(&self.store.name(index)) {
                Some(key) if service.used == 1 && seen.insert(key.clone()) => {
                    let draft = Draft {
                        key,
                        service,
                        members: Vec::new(),
                        frontends: Vec::new(),
                        sound: true,
                        owns_slots: true,
                    };
                    self.drafts.insert(index, draft);
                }
                Some(_) | None => self.ids.strays.services.push(index),
            }
        }
    }

    fn frontends(&mut self) -> Result<(), Error> {
        for (key, value) in self.store.frontends()? {
            self.ids.set_frontend(key, Some(value));
            let known = (kind::CLUSTER_IP..=kind::EXTERNAL_IP).contains(&value.kind());
            match self.drafts.get_mut(&value.service()) {
                Some(draft) if known && key.pad == 0 && value.belongs_to(&key) => {
                    draft.frontends.push((key, value));
                }
                Some(_) => self.ids.strays.frontends.push((key, value)),
                None => {
                    self.ids.strays.frontends.push((key, value));
                    self.ids.strays.services.push(value.service());
                }
            }
        }
        let services = &mut self.ids.strays.services;
        services.retain(|index| *index < self.have.services);
        services.sort_unstable();
        services.dedup();
        Ok(())
    }

    fn vips(&mut self) -> Result<(), Error> {
        for addr in self.store.vips()? {
            self.ids.set_vip(addr, true);
        }
        self.ids.strays.vips = self.ids.vips.values().any(|vip| vip.frontends == 0);
        for draft in self.drafts.values_mut() {
            draft.sound &= draft.frontends.iter().all(|(key, value)| {
                value.kind() != kind::CLUSTER_IP
                    || self.ids.vips.get(&key.addr).is_some_and(|vip| vip.present)
            });
        }
        Ok(())
    }

    fn members(&mut self, previous: Option<&Ids>) {
        let was_free = previous.map(|ids| ids.members.free_map(self.have.members));
        let mut free = Vec::new();
        for index in 0..self.have.members {
            let member = self.store.member(index);
            if member.word.bits() == 0 {
                let at_once = member.word.generation() == 0
                    || member.service == UNSEEN
                    || is_set(&was_free, index);
                if at_once {
                    free.push(index);
                } else {
                    self.ids.quarantine.push(Freed::Member(index));
                }
                continue;
            }
            match self.drafts.get_mut(&member.service) {
                Some(draft) => draft.members.push(index),
                None => self.ids.strays.members.push(index),
            }
        }
        self.ids.members = pool(free, self.have.members);
    }

    /// Which slots the set words name, those of strays included, sorted. Where two sets share a slot, neither may give
    /// it back.
    fn owned_slots(&mut self) -> Vec<(u32, u32)> {
        let mut ranges = Vec::new();
        for (index, draft) in &mut self.drafts {
            for word in [draft.service.cluster, draft.service.local] {
                if word.count() == 0 {
                    continue;
                }
                if ends_within(word, self.have.slots) {
                    ranges.push((word.base(), word.count(), *index));
                } else {
                    (draft.sound, draft.owns_slots) = (false, false);
                }
            }
        }
        for index in &self.ids.strays.services {
            let service = self.store.service(*index);
            let words = [service.cluster, service.local];
            let named = words
                .into_iter()
                .filter(|word| word.count() > 0 && ends_within(*word, self.have.slots));
            ranges.extend(named.map(|word| (word.base(), word.count(), *index)));
        }
        ranges.sort_unstable();
        let (mut end, mut last) = (0, None);
        for (base, count, index) in &ranges {
            if *base < end {
                for shared in [Some(*index), last].into_iter().flatten() {
                    if let Some(draft) = self.drafts.get_mut(&shared) {
                        (draft.sound, draft.owns_slots) = (false, false);
                    }
                }
            }
            if base + count > end {
                (end, last) = (base + count, Some(*index));
            }
        }
        ranges
            .into_iter()
            .map(|(base, count, _)| (base, count))
            .collect()
    }

    /// Whatever no set word names is free, or will be.
    fn slots(&mut self, owned: Vec<(u32, u32)>, previous: Option<&Ids>) {
        let was_free = previous.map(|ids| ids.slots.free_map(self.have.slots));
        let mut slots = Extents::start_at(self.have.slots);
        let mut at = 0;
        for (base, count) in owned.into_iter().chain([(self.have.slots, 0)]) {
            while at < base {
                let at_once =
                    |index: u32| self.store.slot(index).generation == 0 || is_set(&was_free, index);
                let kind = at_once(at);
                let end = (at + 1..base).find(|index| at_once(*index) != kind);
                let len = end.unwrap_or(base) - at;
                if kind {
                    slots.release(at, len);
                } else {
                    self.ids.quarantine.push(Freed::Slots { base: at, len });
                }
                at += len;
            }
            at = at.max(base + count);
        }
        self.ids.slots = slots;
    }

    fn indices(&mut self, previous: Option<&Ids>) {
        let was_free = previous.map(|ids| ids.indices.free_map(self.have.services));
        let mut free = Vec::new();
        for index in 0..self.have.services {
            if self.drafts.contains_key(&index)
                || self.ids.strays.services.binary_search(&index).is_ok()
            {
                continue;
            }
            let at_once =
                self.store.service(index) == Service::default() || is_set(&was_free, index);
            if at_once {
                free.push(index);
            } else {
                self.ids.quarantine.push(Freed::Service(index));
            }
        }
        self.ids.indices = pool(free, self.have.services);
    }

    fn finish(mut self) -> Result<Observed, Error> {
        let mut entries = BTreeMap::new();
        let mut members = Vec::new();
        self.ids.services.reserve(self.drafts.len());
        for (index, mut draft) in self.drafts {
            members.clear();
            members.extend(draft.members.iter().map(|at| (*at, self.store.member(*at))));
            members.sort_by_key(|(at, member)| (order(member), *at));
            draft.sound &= sets_agree(self.store, &draft, &members);
            entries.insert(Key::Service(draft.key.clone()), digest(&draft, &members));
            let entry = Entry {
                index,
                members: members.iter().map(|(at, _)| *at).collect(),
                frontends: draft.frontends.iter().map(|(key, _)| *key).collect(),
                sound: draft.sound,
                owns_slots: draft.owns_slots,
            };
            self.ids.services.insert(draft.key, entry);
        }
        for (addr, flags) in self.store.addresses()? {
            self.ids.addresses.insert(addr);
            entries.insert(Key::Address(addr.into()), u64::from(flags));
        }
        if self.ids.strays.len() > 0 {
            entries.insert(Key::Strays, self.ids.strays.len() as u64);
        }
        Ok(Observed {
            entries,
            ids: self.ids,
        })
    }
}

/// How a service port's members are sorted: as its state's backends.
pub fn order(member: &Member) -> (IpAddr, u16) {
    (member.addr.into(), member.port.host())
}

fn ends_within(word: SetWord, slots: u32) -> bool {
    word.base()
        .checked_add(word.count())
        .is_some_and(|end| end <= slots)
}

fn digest(draft: &Draft, members: &[(u32, Member)]) -> u64 {
    let mut digest = Digest::new(draft.service.policy);
    for (key, value) in &draft.frontends {
        digest.frontend(&MapFrontend {
            key: *key,
            kind: value.kind(),
            flags: value.flags(),
        });
    }
    for (_, member) in members {
        digest.member(&member.addr, member.port, member.word.bits());
    }
    if !draft.sound {
        digest.broken();
    }
    digest.finish()
}

/// Whether both sets hold exactly the members whose bits say so, in order.
fn sets_agree(store: &impl Store, draft: &Draft, members: &[(u32, Member)]) -> bool {
    draft.owns_slots
        && [Scope::Cluster, Scope::Local].into_iter().all(|scope| {
            let (word, bit) = match scope {
                Scope::Cluster => (draft.service.cluster, MemberWord::IN_CLUSTER),
                Scope::Local => (draft.service.local, MemberWord::IN_LOCAL),
            };
            let mut slots = (word.base()..).take(word.count() as usize);
            let listed = members
                .iter()
                .filter(|(_, member)| member.word.bits() & bit != 0)
                .all(|(index, member)| {
                    slots.next().is_some_and(|at| {
                        let slot = store.slot(at);
                        slot.generation == word.generation()
                            && slot.member == *index
                            && slot.member_generation == member.word.generation()
                            && (slot.addr, slot.port) == (member.addr, member.port)
                    })
                });
            listed && slots.next().is_none()
        })
}

fn is_set(map: &Option<Vec<bool>>, index: u32) -> bool {
    map.as_ref()
        .and_then(|map| map.get(index as usize))
        .is_some_and(|free| *free)
}

/// A pool of `free`, which ascends, and of everything from its last gap on.
fn pool(mut free: Vec<u32>, capacity: u32) -> Pool {
    let mut next = capacity;
    while free.last().is_some_and(|last| last + 1 == next) {
        free.pop();
        next -= 1;
    }
    let mut pool = Pool::start_at(next);
    // The lowest is taken first.
    free.into_iter().rev().for_each(|index| pool.release(index));
    pool
}
