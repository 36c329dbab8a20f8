//! How much room a plan needs, and how much to ask for when there is not enough.

use std::collections::HashSet;

use proxy_ebpf::abi::kind;

use super::{
    ids::{Freed, Ids, slots_within_limit},
    store::{Capacity, Store},
    writer::Change,
};
use crate::backends::Error;

/// Grows the maps if `changes` and `addresses` new node addresses do not fit, counting what only waits for a grace period
/// as free.
///
/// # Errors
/// The kernel refuses, or it is more than the maps' indices can name.
pub fn make_room<S: Store>(
    ids: &Ids,
    store: &mut S,
    changes: &[Change],
    addresses: usize,
) -> Result<(), Error> {
    let have = store.capacity();
    let services = changes.iter().filter(|change| change.fresh).count() as u32;
    let members: u32 = changes.iter().map(Change::new_members).sum();
    let slots: u64 = changes.iter().map(Change::new_slots).sum();
    let (frontends, vips) = hash_entries(ids, changes);
    let addresses = (ids.addresses.len() + addresses) as u32;
    let fits = services <= ids.indices.available(have.services)
        && members <= ids.members.available(have.members)
        && slots <= u64::from(ids.slots.available(have.slots))
        && frontends <= have.frontends
        && vips <= have.vips
        && addresses <= have.addresses;
    if fits {
        return Ok(());
    }
    let mut free = Capacity {
        services: ids.indices.available(have.services),
        members: ids.members.available(have.members),
        slots: ids.slots.available(have.slots),
        ..Capacity::default()
    };
    for freed in ids.waiting.iter().map(|(_, freed)| freed).chain(&ids.freed) {
        match freed {
            Freed::Service(_) => free.services += 1,
            Freed::Member(_) => free.members += 1,
            Freed::Slots { len, .. } => free.slots += len,
        }
    }
    let slots_needed = u64::from(have.slots - free.slots) + slots;
    let need = Capacity {
        services: have.services - free.services + services,
        members: have.members - free.members + members,
        slots: u32::try_from(slots_needed).unwrap_or(u32::MAX),
        frontends,
        vips,
        addresses,
    };
    let wanted = with_headroom(&need, &have)?;
    if wanted == have {
        return Ok(());
    }
    store.reserve(&wanted)
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

/// What to ask for: maps that are too small get more than they need, the others stay.
///
/// Slots get the most: each change of a set takes a new range, and the old one waits for a grace period of more than a
/// second, at 20,000 changes a second.
fn with_headroom(need: &Capacity, have: &Capacity) -> Result<Capacity, Error> {
    let grow = |need: u32, have: u32, least: u32| {
        if need <= have {
            have
        } else {
            need.saturating_add(need / 2).max(least)
        }
    };
    let slots = if need.slots <= have.slots {
        have.slots
    } else {
        let more = need
            .slots
            .saturating_mul(3)
            .min(need.slots.saturating_add(1 << 19));
        let wanted = need.slots.saturating_add(more).max(1 << 16);
        slots_within_limit(wanted, need.slots)?
    };
    Ok(Capacity {
        services: grow(need.services, have.services, 1 << 10),
        slots,
        members: grow(need.members, have.members, 1 << 14),
        frontends: grow(need.frontends, have.frontends, 1 << 12),
        vips: grow(need.vips, have.vips, 1 << 10),
        addresses: grow(need.addresses, have.addresses, 1 << 8),
    })
}
