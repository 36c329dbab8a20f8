//! What the backend has to remember of all service ports to write a chain that serves many of them.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use super::{
    Key,
    rules::{
        Rules, Sink, service,
        tree::{Leaf, LeafKey, Leaves},
    },
};
use crate::{
    backends::Part,
    state::{DesiredState, Family, Protocol, ServiceName, ServicePort},
};

/// What was asked for last.
#[derive(Debug, Default)]
pub(super) struct Known {
    services: BTreeMap<ServicePort, Held>,
    pub(super) leaves: Leaves,
    /// Those that serve node ports.
    pub(super) addresses: BTreeSet<IpAddr>,
}

/// What one service port has.
#[derive(Debug, Default)]
struct Held {
    keys: Box<[Key]>,
    leaves: Box<[LeafKey]>,
}

/// What became different.
#[derive(Debug, Default)]
pub(super) struct Change {
    /// What the service ports had before.
    pub(super) before: BTreeSet<Key>,
    /// Frontends that are new, gone, or dispatched otherwise.
    pub(super) leaves: BTreeSet<LeafKey>,
    /// Addresses that serve node ports came or went.
    pub(super) addresses: bool,
    /// A frontend is refused that was not.
    pub(super) refuses_more: bool,
    /// A frontend is no longer refused.
    pub(super) refuses_less: bool,
}

impl Known {
    /// Takes `state`, complete for `scope`, renders its chains into `sink`, and says what changed.
    pub(super) fn take(
        &mut self,
        rules: &Rules,
        state: &DesiredState,
        scope: Option<Part<'_>>,
        sink: &mut Sink<'_>,
    ) -> Change {
        let mut change = Change::default();
        let mut old = Leaves::new();
        match scope {
            None => {
                self.services.clear();
                old = std::mem::take(&mut self.leaves);
            }
            Some(part) => {
                for name in part.services {
                    for port in self.ports(name) {
                        let held = self.services.remove(&port).unwrap_or_default();
                        change.before.extend(held.keys);
                        let leaves = held.leaves.iter();
                        old.extend(leaves.filter_map(|key| self.leaves.remove_entry(key)));
                    }
                }
            }
        }
        let new = self.render(rules, state, sink);
        change.compare(&old, &new);
        self.leaves.extend(new);
        if scope.is_none_or(|part| part.addresses) {
            let served = state.addresses.iter().filter(|(_, entry)| entry.node_ports);
            let addresses = served.map(|(address, _)| *address).collect();
            change.addresses = self.addresses != addresses;
            self.addresses = addresses;
        }
        change
    }

    /// Keeps what was found for service ports that were not described, or not seen to change.
    pub(super) fn keep(&mut self, found: &[(LeafKey, Leaf)], touched: &BTreeSet<ServiceName>) {
        let mut kept: BTreeMap<&ServicePort, Vec<&(LeafKey, Leaf)>> = BTreeMap::new();
        for entry in found {
            let owner = &entry.1.owner;
            if !(touched.contains(&owner.service) && self.services.contains_key(owner)) {
                kept.entry(owner).or_default().push(entry);
            }
        }
        for (owner, entries) in kept {
            let held = self.services.entry(owner.clone()).or_default();
            for key in &held.leaves {
                self.leaves.remove(key);
            }
            held.leaves = entries.iter().map(|(key, _)| *key).collect();
            for (key, leaf) in entries {
                self.leaves.entry(*key).or_insert_with(|| leaf.clone());
            }
        }
    }

    fn render(&mut self, rules: &Rules, state: &DesiredState, sink: &mut Sink<'_>) -> Leaves {
        let mut found = Leaves::new();
        let services = state.services.iter();
        for (port, service) in services.filter(|(port, _)| rules.families.contains(&port.family)) {
            let mut keys = Vec::new();
            let leaves = service::render(rules, service, &mut |key, body| {
                keys.push(key.clone());
                sink(key, body);
            });
            let held = Held {
                keys: keys.into(),
                leaves: leaves.iter().map(|(key, _)| *key).collect(),
            };
            self.services.insert(port.clone(), held);
            found.extend(leaves);
        }
        found
    }

    /// The service ports of a Service.
    fn ports(&self, name: &ServiceName) -> Vec<ServicePort> {
        let first = ServicePort {
            service: name.clone(),
            port: "".into(),
            protocol: Protocol::Tcp,
            family: Family::V4,
        };
        let ports = self.services.range(first..).map(|(port, _)| port);
        ports
            .take_while(|port| port.service == *name)
            .cloned()
            .collect()
    }

    /// What the service ports of some Services have.
    pub(super) fn keys_of<'a>(
        &'a self,
        names: &'a BTreeSet<ServiceName>,
    ) -> impl Iterator<Item = &'a Key> {
        let ports = names.iter().flat_map(|name| self.ports(name));
        let held = ports.filter_map(|port| self.services.get(&port));
        held.flat_map(|held| held.keys.iter())
    }
}

impl Change {
    fn compare(&mut self, old: &Leaves, new: &Leaves) {
        let differ = |a: &Leaves, b: &Leaves| -> BTreeSet<LeafKey> {
            let differs = |(key, leaf): &(&LeafKey, &Leaf)| b.get(*key) != Some(*leaf);
            a.iter().filter(differs).map(|(key, _)| *key).collect()
        };
        self.leaves = differ(old, new);
        self.leaves.extend(differ(new, old));
        let refused = |leaves: &Leaves, key: &LeafKey| {
            leaves.get(key).is_some_and(|leaf| leaf.verdict.refuses())
        };
        let mut changed = self.leaves.iter();
        self.refuses_more = changed.any(|key| refused(new, key) && !refused(old, key));
        let mut changed = self.leaves.iter();
        self.refuses_less = changed.any(|key| refused(old, key) && !refused(new, key));
    }
}
