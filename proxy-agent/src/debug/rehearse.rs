//! What `run` would do, without doing it: its backend over a copy of the maps.

use std::collections::BTreeMap;

use crate::{
    backends::{
        Backend as _, Bounds, Error, Key,
        ebpf::{EbpfBackend, simulated::Simulated, store::Store as _, view::PinnedMaps},
    },
    plan::Plan,
    state::DesiredState,
};
use proxy_ebpf::lb::Tables as _;

/// What the maps hold, and what would change.
pub struct Rehearsal {
    /// Digests of what the maps hold.
    pub observed: BTreeMap<Key, u64>,
    /// What would change.
    pub plan: Plan<Key, u64>,
}

/// Compares a complete desired state with pinned maps; none means that there are none yet.
///
/// # Errors
/// The maps could not be read.
pub fn rehearse(maps: Option<&PinnedMaps>, state: &DesiredState) -> Result<Rehearsal, Error> {
    let copy = match maps {
        Some(maps) => copy(maps)?,
        None => Simulated::default(),
    };
    let mut backend = EbpfBackend::new(copy);
    let observed = backend.observe()?;
    let plan = backend.plan(&observed, state, Bounds::default());
    Ok(Rehearsal { observed, plan })
}

fn copy(maps: &PinnedMaps) -> Result<Simulated, Error> {
    let mut copy = Simulated::default();
    let capacity = maps.capacity();
    copy.reserve(&capacity)?;
    for index in 0..capacity.services {
        if let (Some(service), Some(name)) = (maps.service(index), maps.name(index)) {
            copy.write_service(index, &service);
            copy.write_name(index, &name);
        }
    }
    for index in 0..capacity.slots {
        if let Some(slot) = maps.slot(index) {
            copy.write_slots(index, &[slot]);
        }
    }
    for index in 0..capacity.members {
        if let Some(member) = maps.member(index) {
            copy.write_member(index, &member);
        }
    }
    copy.upsert_frontends(&maps.frontends()?)?;
    copy.upsert_vips(&maps.vips()?)?;
    copy.upsert_addresses(&maps.addresses()?)?;
    Ok(copy)
}
