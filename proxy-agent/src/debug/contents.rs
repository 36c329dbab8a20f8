//! What the maps hold, read once into plain values: what `dump` and its tests work on.

use std::collections::{BTreeMap, BTreeSet};

use proxy_ebpf::{
    abi::{
        Addr, AffinityKey, AffinityValue, FrontendKey, FrontendValue, Member, MemberWord, Meta,
        Name, Peer, PeerKey, Reason, Service, SetWord, Slot, SocketRecord, Stats,
    },
    lb::Tables,
};

/// One entry of SERVICES that is in use, with what its index means in the other maps.
#[derive(Clone, Debug, PartialEq)]
pub struct Entry {
    /// SERVICES.
    pub service: Service,
    /// NAMES.
    pub name: Name,
    /// STATS.
    pub stats: Stats,
}

impl Entry {
    /// "namespace/name:port".
    pub fn text(&self) -> String {
        text(&self.name)
    }
}

fn text(name: &Name) -> String {
    let len = usize::from(name.len).min(name.text.len());
    String::from_utf8_lossy(&name.text[..len]).into_owned()
}

/// Name of the service port at an index, given what NAMES holds there.
pub fn service_name(index: u32, name: Option<&Name>) -> String {
    name.filter(|name| name.len > 0)
        .map_or_else(|| format!("#{index}"), text)
}

/// The slots of a set; none when the set has moved on.
pub fn slots<T: Tables>(tables: &T, word: SetWord) -> Option<BTreeMap<u32, Slot>> {
    (word.base()..word.base().saturating_add(word.count()))
        .map(|index| {
            let slot = tables.slot(index)?;
            (slot.generation == word.generation()).then_some((index, slot))
        })
        .collect()
}

/// A map's use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MapUse {
    /// Its name.
    pub map: String,
    /// Entries in use; none where that cannot be told.
    pub entries: Option<u64>,
    /// Entries that fit.
    pub capacity: u64,
    /// Bytes of kernel memory.
    pub bytes: u64,
}

/// What the maps hold.
#[derive(Clone, Debug)]
pub struct Contents {
    /// META.
    pub meta: Meta,
    /// FRONTENDS.
    pub frontends: BTreeMap<FrontendKey, FrontendValue>,
    /// VIPS.
    pub vips: BTreeSet<Addr>,
    /// LOCAL_ADDRS.
    pub addresses: BTreeMap<Addr, u32>,
    /// SERVICES, NAMES and STATS by index.
    pub services: BTreeMap<u32, Entry>,
    /// SLOTS that a set word leads to.
    pub slots: BTreeMap<u32, Slot>,
    /// MEMBERS in use.
    pub members: BTreeMap<u32, Member>,
    /// AFFINITY.
    pub affinity: BTreeMap<AffinityKey, AffinityValue>,
    /// SOCKETS.
    pub sockets: Vec<SocketRecord>,
    /// PEERS.
    pub peers: Vec<(PeerKey, Peer)>,
    /// REASONS, summed over the CPUs.
    pub reasons: Vec<(Reason, u64)>,
    /// Entries and capacity of each map.
    pub maps: Vec<MapUse>,
}

impl Contents {
    /// Name of the service port at an index.
    pub fn service_name(&self, index: u32) -> String {
        service_name(index, self.services.get(&index).map(|entry| &entry.name))
    }

    /// The slots of a set, as far as they belong to it.
    pub fn set_slots(&self, word: SetWord) -> impl Iterator<Item = &Slot> {
        let end = word.base().saturating_add(word.count());
        self.slots
            .range(word.base()..end)
            .map(|(_, slot)| slot)
            .filter(move |slot| slot.generation == word.generation())
    }

    /// State bits of the member behind a slot; none when the member is another one by now.
    pub fn member_bits(&self, slot: &Slot) -> u32 {
        self.members
            .get(&slot.member)
            .filter(|member| member.word.generation() == slot.member_generation)
            .map_or(0, |member| member.word.bits())
    }

    /// The member that an affinity entry or a socket remembers, if it is still the same.
    pub fn member_at(&self, index: u32, word_generation: u32) -> Option<&Member> {
        self.members
            .get(&index)
            .filter(|member| member.word.generation() == word_generation)
            .filter(|member| member.word.bits() & MemberWord::SERVING != 0)
    }
}
