//! Which indices and slots stand for what, and which of them may be used again.
//!
//! Everything here can be read back from the maps (`observe`): it is an index over them, not a second truth. Members are
//! four bytes each; the rest of them is read through the [`Store`].

use std::collections::{HashMap, HashSet};

use proxy_ebpf::abi::{Addr, FrontendKey, FrontendValue, SetWord, kind};

use super::{
    extents::{Extents, Pool},
    quarantine::{Freed, Quarantine},
    store::{Capacity, Store},
};
use crate::{backends::Error, state::ServicePort};

/// What the maps hold of one service port.
#[derive(Debug)]
pub struct Entry {
    /// Index into SERVICES.
    pub index: u32,
    /// Indices into MEMBERS, sorted by the members' address and port.
    pub members: Box<[u32]>,
    /// Its keys in FRONTENDS; one that another service port took over in the meantime may still be listed.
    pub frontends: Box<[FrontendKey]>,
    /// Its sets, bits and VIPs agree with each other; if not, both sets are written anew.
    pub sound: bool,
    /// The slots that its set words name are its own.
    pub owns_slots: bool,
}

/// An address in VIPS, or one that should be there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Vip {
    /// ClusterIP frontends at this address.
    pub frontends: u32,
    /// It is in the map.
    pub present: bool,
}

/// What was found in the maps and belongs to no service port.
#[derive(Debug, Default)]
pub struct Strays {
    /// Entries of SERVICES in use under no or another's name, or named by a frontend although not in use.
    pub services: Vec<u32>,
    /// Members of no service.
    pub members: Vec<u32>,
    /// Frontends that lead nowhere.
    pub frontends: Vec<(FrontendKey, FrontendValue)>,
    /// Some address in VIPS has no ClusterIP frontend.
    pub vips: bool,
}

impl Strays {
    /// How many there are.
    pub fn len(&self) -> usize {
        self.services.len() + self.members.len() + self.frontends.len() + usize::from(self.vips)
    }
}

/// The index over the maps.
#[derive(Debug, Default)]
pub struct Ids {
    /// By service port.
    pub services: HashMap<ServicePort, Entry>,
    /// All of FRONTENDS.
    pub frontends: HashMap<FrontendKey, FrontendValue>,
    /// All of VIPS, and what is missing there.
    pub vips: HashMap<Addr, Vip>,
    /// All of LOCAL_ADDRS.
    pub addresses: HashSet<Addr>,
    /// Free entries of SERVICES and NAMES.
    pub indices: Pool,
    /// Free entries of MEMBERS.
    pub members: Pool,
    /// Free entries of SLOTS.
    pub slots: Extents,
    /// What has to go.
    pub strays: Strays,
    /// The last generation given to a set.
    pub generation: u32,
    /// What will be free.
    pub quarantine: Quarantine,
    /// The kernel refused more room than what is needed: it is not asked again before the next observation.
    pub stay_small: bool,
}

impl Ids {
    /// Records what FRONTENDS holds for `key` now.
    pub fn set_frontend(&mut self, key: FrontendKey, value: Option<FrontendValue>) {
        let old = match value {
            Some(value) => self.frontends.insert(key, value),
            None => self.frontends.remove(&key),
        };
        let is_cluster_ip = |value: Option<FrontendValue>| {
            u32::from(value.is_some_and(|value| value.kind() == kind::CLUSTER_IP))
        };
        let (before, after) = (is_cluster_ip(old), is_cluster_ip(value));
        if before != after {
            let vip = self.vips.entry(key.addr).or_default();
            vip.frontends = vip.frontends + after - before;
            if *vip == Vip::default() {
                self.vips.remove(&key.addr);
            }
        }
    }

    /// Records whether `addr` is in VIPS now.
    pub fn set_vip(&mut self, addr: Addr, present: bool) {
        let vip = self.vips.entry(addr).or_default();
        vip.present = present;
        if *vip == Vip::default() {
            self.vips.remove(&addr);
        }
    }

    /// The next generation for a set. Zero is for slots that were never written.
    pub fn next_generation(&mut self) -> u32 {
        self.generation = match (self.generation + 1) & SetWord::GENERATION_MASK {
            0 => 1,
            next => next,
        };
        self.generation
    }

    /// Takes back what no reader can hold any more.
    pub fn reclaim(&mut self, store: &mut impl Store) {
        self.quarantine.start_grace(store);
        if self.quarantine.oldest().is_none() {
            return;
        }
        let over = store.grace_over();
        while let Some(freed) = self.quarantine.pop(over) {
            match freed {
                Freed::Service(index) => self.indices.release(index),
                Freed::Member(index) => self.members.release(index),
                Freed::Slots { base, len } => self.slots.release(base, len),
            }
        }
    }

    /// A free entry of SERVICES.
    ///
    /// # Errors
    /// Nothing is free, and the kernel refuses to make room.
    pub fn take_service(&mut self, store: &mut impl Store) -> Result<u32, Error> {
        self.take(store, Map::Services, |ids, have| {
            ids.indices.take(have.services)
        })
    }

    /// A free entry of MEMBERS.
    ///
    /// # Errors
    /// As [`Ids::take_service`].
    pub fn take_member(&mut self, store: &mut impl Store) -> Result<u32, Error> {
        self.take(store, Map::Members, |ids, have| {
            ids.members.take(have.members)
        })
    }

    /// `len` free slots in a row.
    ///
    /// # Errors
    /// As [`Ids::take_service`].
    pub fn take_slots(&mut self, store: &mut impl Store, len: u32) -> Result<u32, Error> {
        self.take(store, Map::Slots(len), |ids, have| {
            ids.slots.take(len, have.slots)
        })
    }

    /// Takes what is free; else waits for what will be; only then grows.
    fn take<S: Store>(
        &mut self,
        store: &mut S,
        map: Map,
        attempt: impl Fn(&mut Self, Capacity) -> Option<u32>,
    ) -> Result<u32, Error> {
        loop {
            let have = store.capacity();
            if let Some(found) = attempt(self, have) {
                return Ok(found);
            }
            self.reclaim(store);
            if let Some(found) = attempt(self, have) {
                return Ok(found);
            }
            match self.quarantine.oldest() {
                Some(oldest) => store.wait_grace(oldest),
                None => store.reserve(&map.doubled(have)?)?,
            }
        }
    }
}

/// Which map ran out of room.
#[derive(Clone, Copy)]
enum Map {
    Services,
    Members,
    Slots(u32),
}

impl Map {
    fn doubled(self, have: Capacity) -> Result<Capacity, Error> {
        let mut need = have;
        let double = |entries: u32| entries.saturating_mul(2).max(64);
        match self {
            Self::Services => need.services = double(have.services),
            Self::Members => need.members = double(have.members),
            Self::Slots(len) => {
                let wanted = double(have.slots).max(have.slots.saturating_add(len));
                need.slots = wanted.min(SetWord::MAX_SLOTS);
                if need.slots == have.slots {
                    return Err(too_many_slots());
                }
            }
        }
        Ok(need)
    }
}

/// A set word cannot name more slots.
pub fn too_many_slots() -> Error {
    Error::Unusable(format!(
        "cannot use more than {} slots of map SLOTS: the cluster has more endpoints than one node can balance over",
        SetWord::MAX_SLOTS
    ))
}

#[cfg(test)]
mod tests {
    use proxy_ebpf::abi::Be16;

    use super::*;

    #[test]
    fn a_vip_is_forgotten_with_its_last_cluster_ip() {
        let addr = Addr::from_v4_word(7);
        let key = |port| FrontendKey::new(addr, Be16::new(port), 6);
        let value = |port, kind| Some(FrontendValue::new(&key(port), 0, kind, 0));
        let mut ids = Ids::default();
        ids.set_frontend(key(1), value(1, kind::CLUSTER_IP));
        ids.set_frontend(key(2), value(2, kind::CLUSTER_IP));
        ids.set_vip(addr, true);
        ids.set_frontend(key(1), value(1, kind::EXTERNAL_IP));
        let one = Vip {
            frontends: 1,
            present: true,
        };
        assert_eq!(ids.vips[&addr], one);
        ids.set_frontend(key(2), None);
        ids.set_vip(addr, false);
        assert!(ids.vips.is_empty());
    }
}
