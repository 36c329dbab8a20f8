//! What `run` would do, without doing it: its backends over a copy of the maps, and over rules that are only read.

use std::collections::{BTreeMap, BTreeSet};

use proxy_ebpf::lb::Tables as _;

use super::{
    Error,
    desired::Desired,
    plan::{Change, changes},
};
use crate::{
    backends::{
        self, Backend, Bounds, Part,
        ebpf::{EbpfBackend, simulated::Simulated, store::Store as _, view::PinnedMaps},
        iptables::{IptablesBackend, host::Host, rules::Rules, tables::Tables as _},
    },
    cli::{Layers, Mode, Sources},
    daemon::{
        packet::{Place, has_route_localnet, rules},
        self_test::add_canary,
    },
    state::DesiredState,
};

/// What would change in one layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rehearsal {
    /// "socket" or "packet".
    pub layer: &'static str,
    /// In the order in which it would be done.
    pub changes: Vec<Change>,
}

/// Compares pinned maps with what the sources ask for; no maps means that there are none yet.
///
/// # Errors
/// The maps could not be read.
pub fn sockets(maps: Option<&PinnedMaps>, desired: &Desired) -> Result<Rehearsal, Error> {
    let copy = match maps {
        Some(maps) => copy(maps)?,
        None => Simulated::default(),
    };
    let mut state = desired.state.clone();
    add_canary(&mut state);
    let backend = EbpfBackend::new(copy);
    Ok(rehearse("socket", backend, &state, desired.is_complete)?)
}

/// Compares the rules of this node with what the sources ask for. Writes nothing.
///
/// # Errors
/// A flag is missing; the rules could not be read.
pub fn packets(
    sources: &Sources,
    layers: &Layers,
    has_sockets: bool,
    desired: &Desired,
) -> Result<Rehearsal, Error> {
    let place = match has_sockets {
        true => Place::BesideSockets,
        false => Place::Alone,
    };
    let host = Host::for_planning()?;
    let rules = Rules {
        families: host.families(),
        features: host.features(),
        ..rules(sources, layers, place, has_route_localnet)?
    };
    let backend = IptablesBackend::new(host, rules);
    let state = &desired.state;
    Ok(rehearse("packet", backend, state, desired.is_complete)?)
}

/// Whether `run` would have a socket layer; `is_usable` says whether the node can have one.
pub fn has_sockets(mode: Mode, is_usable: impl FnOnce() -> bool) -> bool {
    match mode {
        Mode::Ebpf => true,
        Mode::Iptables => false,
        Mode::Auto => is_usable(),
    }
}

fn rehearse<B: Backend>(
    layer: &'static str,
    mut backend: B,
    state: &DesiredState,
    is_complete: bool,
) -> Result<Rehearsal, backends::Error> {
    let observed: BTreeMap<B::Key, B::Value> = backend.observe()?;
    let nothing = BTreeSet::new();
    let bounds = Bounds {
        scope: None,
        // As `run` does when it starts while a source lacks something.
        touched: (!is_complete).then_some(Part {
            services: &nothing,
            addresses: false,
        }),
    };
    let plan = backend.plan(&observed, state, bounds);
    let changes = changes(layer, &plan, &observed);
    Ok(Rehearsal { layer, changes })
}

fn copy(maps: &PinnedMaps) -> Result<Simulated, backends::Error> {
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
