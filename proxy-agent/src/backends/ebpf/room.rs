//! How much room a plan needs, and how much to ask for when there is not enough.

use std::collections::HashSet;

use proxy_ebpf::abi::{SetWord, kind};

use super::{
    ids::{Ids, too_many_slots},
    store::{Capacity, Store},
    writer::Change,
};
use crate::backends::Error;

/// Grows the maps if `changes` and `addresses` new node addresses do not fit, or leave too little beside them.
///
/// # Errors
/// The kernel refuses, or it is more than the maps' indices can name.
pub fn make_room<S: Store>(
    ids: &mut Ids,
    store: &mut S,
    changes: &[Change],
    addresses: usize,
) -> Result<(), Error> {
    let have = store.capacity();
    let need = needed(ids, &have, changes, addresses)?;
    let fits = covers(&have, &need);
    let comfortable = Capacity {
        slots: need.slots.saturating_mul(2),
        members: need.members.saturating_add(need.members / 4),
        ..need
    };
    if fits && (ids.stay_small || covers(&have, &comfortable)) {
        return Ok(());
    }
    match store.reserve(&with_headroom(&need, &have)) {
        Err(_) if fits => {
            ids.stay_small = true;
            Ok(())
        }
        result => result,
    }
}

fn covers(have: &Capacity, need: &Capacity) -> bool {
    let Capacity {
        services,
        slots,
        members,
        frontends,
        vips,
        addresses,
    } = *need;
    services <= have.services
        && slots.min(SetWord::MAX_SLOTS) <= have.slots
        && members <= have.members
        && frontends <= have.frontends
        && vips <= have.vips
        && addresses <= have.addresses
}

/// Entries in use when all new ones are there and nothing is deleted; what waits for a grace period counts as free.
fn needed(
    ids: &Ids,
    have: &Capacity,
    changes: &[Change],
    addresses: usize,
) -> Result<Capacity, Error> {
    let waiting = ids.quarantine.size();
    let used = |have: u32, available: u32, waiting: u32| have - available - waiting;
    let services = changes.iter().filter(|change| change.fresh).count() as u32;
    let members: u32 = changes.iter().map(Change::new_members).sum();
    let slots: u64 = changes.iter().map(Change::new_slots).sum();
    let used_slots = used(have.slots, ids.slots.available(have.slots), waiting.slots);
    let slots = u64::from(used_slots) + slots;
    if slots > u64::from(SetWord::MAX_SLOTS) {
        return Err(too_many_slots());
    }
    let (frontends, vips) = hash_entries(ids, changes);
    let free_services = ids.indices.available(have.services);
    let free_members = ids.members.available(have.members);
    Ok(Capacity {
        services: used(have.services, free_services, waiting.services) + services,
        slots: slots as u32,
        members: used(have.members, free_members, waiting.members) + members,
        frontends,
        vips,
        addresses: (ids.addresses.len() + addresses) as u32,
    })
}

/// Entries of FRONTENDS and VIPS before anything is deleted.
fn hash_entries(ids: &Ids, changes: &[Change]) -> (u32, u32) {
    let (mut frontends, mut vips) = (HashSet::new(), HashSet::new());
    for frontend in changes.iter().flat_map(|change| &change.frontends) {
        if !ids.frontends.contains_key(&frontend.key) {
            frontends.insert(frontend.key);
        }
        if frontend.kind == kind::CLUSTER_IP && !ids.vips.contains_key(&frontend.key.addr) {
            vips.insert(frontend.key.addr);
        }
    }
    (
        (ids.frontends.len() + frontends.len()) as u32,
        (ids.vips.len() + vips.len()) as u32,
    )
}

/// What to ask for: no map shrinks, and all have half as much again for what comes next.
///
/// Slots get the most: each change of a set takes a new range, and the old one waits for more than a second, at 20,000
/// changes a second.
fn with_headroom(need: &Capacity, have: &Capacity) -> Capacity {
    let grow = |need: u32, have: u32| need.saturating_add(need / 2).max(have);
    let slots = need.slots.saturating_mul(4).max(have.slots);
    Capacity {
        services: grow(need.services, have.services),
        slots: slots.min(SetWord::MAX_SLOTS),
        members: grow(need.members, have.members),
        frontends: grow(need.frontends, have.frontends),
        vips: grow(need.vips, have.vips),
        addresses: grow(need.addresses, have.addresses),
    }
}
