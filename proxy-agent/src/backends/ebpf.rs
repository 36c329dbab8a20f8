//! The socket layer: Services as eBPF maps, translated at connect() and sendmsg().
//!
//! [`EbpfBackend`] keeps the maps behind a [`Store`] level with a desired state. What it remembers is an index over the
//! maps; `observe` builds it from them, so a restart is an observation.

use std::collections::BTreeMap;

use crate::{
    backends::{Backend, Bounds, Error, Key},
    plan::Plan,
    state::DesiredState,
};

mod describe;
pub mod dir;
mod extents;
mod ids;
pub mod in_memory;
pub mod kernel;
pub mod kfuncs;
pub mod links;
pub mod load;
pub mod maps;
mod observe;
pub mod probe;
mod quarantine;
pub mod refused;
pub mod render;
mod room;
pub mod simulated;
pub mod store;
pub mod sys;
pub mod tables;
pub mod view;
mod writer;

pub use describe::describe;
use ids::Ids;
use store::Store;

/// Keeps the maps of the socket layer level with a desired state.
///
/// One entry per service port: the digest of its frontends, members, sets and policies.
#[derive(Debug)]
pub struct EbpfBackend<S> {
    store: S,
    ids: Ids,
    /// `ids` says what the maps hold. Not so before the first observation and after an apply that stopped half-way.
    known: bool,
    udp_retired: bool,
}

impl<S: Store> EbpfBackend<S> {
    /// A backend over maps that may hold anything.
    pub fn new(store: S) -> Self {
        Self {
            store,
            ids: Ids::default(),
            known: false,
            // Those of an agent that was killed before it could look for their sockets.
            udp_retired: true,
        }
    }

    /// The maps.
    pub fn store(&self) -> &S {
        &self.store
    }

    /// The maps. Whoever writes entries here has to observe afterwards.
    pub fn store_mut(&mut self) -> &mut S {
        &mut self.store
    }

    /// The maps without the backend.
    pub fn into_store(self) -> S {
        self.store
    }

    /// The entries that `state` asks for. Leaves out service ports whose names do not fit into the map: the model refuses
    /// them.
    pub fn render(&self, state: &DesiredState) -> BTreeMap<Key, u64> {
        let services = state
            .services
            .iter()
            .filter(|(key, _)| render::name(key).is_some())
            .map(|(key, service)| (Key::Service(key.clone()), render::digest(service)));
        let addresses = state.addresses.iter().map(|(address, entry)| {
            let flags = render::address_flags(*entry);
            (Key::Address(*address), u64::from(flags))
        });
        services.chain(addresses).collect()
    }

    /// Whether UDP members died since this was asked last, or may have before the start: sockets connected to them have to be found and destroyed.
    pub fn take_udp_retired(&mut self) -> bool {
        std::mem::take(&mut self.udp_retired)
    }
}

impl<S: Store> Backend for EbpfBackend<S> {
    type Key = Key;
    type Value = u64;

    fn plan(
        &mut self,
        observed: &BTreeMap<Key, u64>,
        state: &DesiredState,
        bounds: Bounds<'_>,
    ) -> Plan<Key, u64> {
        Key::plan(observed, &self.render(state), bounds)
    }

    /// Writes nothing.
    fn observe(&mut self) -> Result<BTreeMap<Key, u64>, Error> {
        let previous = self.known.then_some(&self.ids);
        let observed = observe::observe(&self.store, previous)?;
        self.ids = observed.ids;
        self.known = true;
        Ok(observed.entries)
    }

    /// All changes of the plan go through each step of the update order together (docs/ARCHITECTURE.md).
    fn apply(&mut self, plan: &Plan<Key, u64>, state: &DesiredState) -> Result<(), Error> {
        if !self.known {
            self.observe()?;
        }
        self.known = false;
        let retired = writer::apply(&mut self.ids, &mut self.store, plan, state)?;
        self.known = true;
        self.udp_retired |= retired.udp;
        Ok(())
    }

    fn publish(&mut self) -> Result<(), Error> {
        self.store.publish()
    }
}

#[cfg(test)]
mod tests;
