//! Carries out a plan in the order that never leaves a reader without an answer.
//!
//! All changes of a plan go through each step together:
//!
//! 1. room: indices, members and slots are taken from what no reader can hold; nothing is written yet
//! 2. new members, names, services and slots, where nothing leads
//! 3. the set words of every set that has a backend, policies, states of members that stay
//! 4. frontends, then the VIPS that they need
//! 5. set words that become empty, and policies that lead to an empty set: not before the frontends that leave such a
//!    service have left
//! 6. node addresses
//! 7. deletions: VIPS first, since an entry there refuses what FRONTENDS does not have
//! 8. dead members get a new generation, dead services are marked unused; their set words stay for whoever still reads
//! 9. a grace period for everything that was freed
//!
//! A fault at any point leaves a dataplane that is correct, at worst stale; what it left over is found by `observe`.

use std::collections::HashMap;

use proxy_ebpf::{
    abi::{Addr, FrontendKey, FrontendValue, MemberWord, Service, SetWord, kind},
    lb::Scope,
};

use super::{
    ids::{Entry, Ids, Strays},
    quarantine::Freed,
    render,
    room::make_room,
    store::Store,
};
use crate::{
    backends::{Error, Key},
    plan::Plan,
    state::{DesiredState, Protocol},
};

mod change;
mod entries;

pub use change::Change;
use change::NEW;
use entries::{commit_policy, commit_set, free_slots, mark_unused, write_members, write_set};

const SCOPES: [Scope; 2] = [Scope::Cluster, Scope::Local];

/// What died in an apply.
#[derive(Clone, Copy, Debug, Default)]
pub struct Retired {
    /// Members of UDP services.
    pub udp: bool,
}

/// Makes the changes of `plan`. `ids` says what `store` holds, before and after; not so after an error.
///
/// # Errors
/// The kernel refused a write or more room.
pub fn apply<S: Store>(
    ids: &mut Ids,
    store: &mut S,
    plan: &Plan<Key, u64>,
    state: &DesiredState,
) -> Result<Retired, Error> {
    ids.reclaim(store);
    let mut writer = Writer {
        ids,
        store,
        changes: Vec::new(),
        deleted: Vec::new(),
        strays: Strays::default(),
        upserted_addresses: Vec::new(),
        deleted_addresses: Vec::new(),
    };
    writer.prepare(plan, state)?;
    writer.take_room()?;
    writer.write_invisible();
    writer.commit_backends();
    writer.upsert_frontends()?;
    writer.commit_emptiness();
    writer.upsert_addresses()?;
    writer.delete()?;
    Ok(writer.retire())
}

struct Writer<'a, S> {
    ids: &'a mut Ids,
    store: &'a mut S,
    changes: Vec<Change<'a>>,
    deleted: Vec<(Protocol, Entry)>,
    strays: Strays,
    upserted_addresses: Vec<(Addr, u32)>,
    deleted_addresses: Vec<Addr>,
}

impl<'a, S: Store> Writer<'a, S> {
    fn prepare(&mut self, plan: &Plan<Key, u64>, state: &'a DesiredState) -> Result<(), Error> {
        for (key, _) in &plan.upserts {
            let bug = || Error::Unusable(format!("the plan wants {key}, the state lacks it"));
            match key {
                Key::Service(port) => {
                    let service = state.services.get(port).ok_or_else(bug)?;
                    let known = self.ids.services.remove_entry(port);
                    self.changes.push(Change::new(self.store, known, service));
                }
                Key::Address(address) => {
                    let entry = state.addresses.get(address).ok_or_else(bug)?;
                    let flags = render::address_flags(*entry);
                    self.upserted_addresses.push(((*address).into(), flags));
                }
                Key::Strays => return Err(bug()),
            }
        }
        for key in &plan.deletions {
            match key {
                Key::Service(port) => {
                    let entry = self.ids.services.remove(port);
                    self.deleted.extend(entry.map(|e| (port.protocol, e)));
                }
                Key::Address(address) => self.deleted_addresses.push((*address).into()),
                Key::Strays => self.strays = std::mem::take(&mut self.ids.strays),
            }
        }
        Ok(())
    }

    fn take_room(&mut self) -> Result<(), Error> {
        let new_addresses = self.upserted_addresses.iter();
        let new_addresses = new_addresses.filter(|(a, _)| !self.ids.addresses.contains(a));
        let addresses = new_addresses.count();
        make_room(self.ids, self.store, &self.changes, addresses)?;
        for change in &mut self.changes {
            if change.index == NEW {
                change.index = self.ids.take_service(self.store)?;
            }
            for member in change.members.iter_mut().filter(|at| **at == NEW) {
                *member = self.ids.take_member(self.store)?;
                change.added.push(*member);
            }
            for scope in SCOPES {
                let count = change.count(scope);
                if count > SetWord::MAX_COUNT {
                    return Err(Error::Unusable(format!(
                        "cannot balance {} over {count} backends: a set holds at most {}; split the Service",
                        change.key,
                        SetWord::MAX_COUNT
                    )));
                }
                if change.is_rewritten(scope) && count > 0 {
                    change.bases[scope as usize] = self.ids.take_slots(self.store, count)?;
                }
            }
        }
        Ok(())
    }

    fn write_invisible(&mut self) {
        let mut slots = Vec::new();
        for change in &mut self.changes {
            if change.fresh {
                let name = render::name(&change.key).unwrap_or(render::NO_NAME);
                self.store.write_name(change.index, &name);
                let empty = SetWord::new(0, 0, self.ids.next_generation());
                let service = Service {
                    cluster: empty,
                    local: empty,
                    policy: change.policy,
                    used: 1,
                    ..Service::default()
                };
                self.store.write_service(change.index, &service);
            }
            write_members(self.store, change);
            for scope in SCOPES {
                if change.is_rewritten(scope) {
                    write_set(self.ids, self.store, change, scope, &mut slots);
                }
            }
        }
    }

    fn commit_backends(&mut self) {
        for change in &self.changes {
            for word in SCOPES.map(|scope| (scope, change.words[scope as usize])) {
                if let (scope, Some(word)) = word
                    && word.count() > 0
                {
                    commit_set(self.ids, self.store, change, scope, word);
                }
            }
            let old = self.store.service(change.index).policy;
            commit_policy(self.store, change.index, change.early_policy(old));
            for (member, word) in &change.states {
                self.store.commit_member(*member, *word);
            }
        }
    }

    fn upsert_frontends(&mut self) -> Result<(), Error> {
        let (mut entries, mut vips) = (Vec::new(), Vec::new());
        for change in &self.changes {
            for frontend in &change.frontends {
                let value = frontend.value(change.index);
                if self.ids.frontends.get(&frontend.key) != Some(&value) {
                    entries.push((frontend.key, value));
                }
                let addr = frontend.key.addr;
                if frontend.kind == kind::CLUSTER_IP
                    && self.ids.vips.get(&addr).is_none_or(|vip| !vip.present)
                {
                    vips.push(addr);
                }
            }
        }
        if !entries.is_empty() {
            self.store.upsert_frontends(&entries)?;
        }
        for (key, value) in entries {
            self.ids.set_frontend(key, Some(value));
        }
        if !vips.is_empty() {
            vips.sort_unstable();
            vips.dedup();
            self.store.upsert_vips(&vips)?;
        }
        for addr in vips {
            self.ids.set_vip(addr, true);
        }
        Ok(())
    }

    fn commit_emptiness(&mut self) {
        for change in &self.changes {
            // The policy first: the set that it led to until now may be one of those that become empty.
            commit_policy(self.store, change.index, change.policy);
            for word in SCOPES.map(|scope| (scope, change.words[scope as usize])) {
                if let (scope, Some(word)) = word
                    && word.count() == 0
                {
                    commit_set(self.ids, self.store, change, scope, word);
                }
            }
        }
    }

    fn upsert_addresses(&mut self) -> Result<(), Error> {
        if !self.upserted_addresses.is_empty() {
            self.store.upsert_addresses(&self.upserted_addresses)?;
        }
        let upserted = self.upserted_addresses.iter();
        self.ids.addresses.extend(upserted.map(|(addr, _)| *addr));
        Ok(())
    }

    fn delete(&mut self) -> Result<(), Error> {
        let frontends = self.dead_frontends();
        let vips = self.dead_vips(&frontends);
        if !vips.is_empty() {
            self.store.delete_vips(&vips)?;
        }
        for addr in vips {
            self.ids.set_vip(addr, false);
        }
        if !frontends.is_empty() {
            self.store.delete_frontends(&frontends)?;
        }
        for key in frontends {
            self.ids.set_frontend(key, None);
        }
        if !self.deleted_addresses.is_empty() {
            self.store.delete_addresses(&self.deleted_addresses)?;
        }
        for addr in &self.deleted_addresses {
            self.ids.addresses.remove(addr);
        }
        Ok(())
    }

    /// Frontends that their owner gave up and that nobody took over.
    fn dead_frontends(&self) -> Vec<FrontendKey> {
        let leads_to = |key: &FrontendKey, index: u32| {
            let value = self.ids.frontends.get(key);
            value.is_some_and(|value| value.service() == index)
        };
        let mut dead = Vec::new();
        for change in &self.changes {
            let wanted = |key: &FrontendKey| {
                let found = change.frontends.binary_search_by_key(key, |f| f.key);
                found.is_ok()
            };
            let given_up = change.old_frontends.iter().filter(|key| !wanted(key));
            dead.extend(given_up.filter(|key| leads_to(key, change.index)));
        }
        for (_, entry) in &self.deleted {
            let given_up = entry.frontends.iter();
            dead.extend(given_up.filter(|key| leads_to(key, entry.index)));
        }
        let unclaimed = |(key, value): &&(FrontendKey, FrontendValue)| {
            self.ids.frontends.get(key) == Some(value)
        };
        dead.extend(
            self.strays
                .frontends
                .iter()
                .filter(unclaimed)
                .map(|(key, _)| *key),
        );
        dead
    }

    /// Entries of VIPS that no frontend needs once `dead` is gone.
    fn dead_vips(&self, dead: &[FrontendKey]) -> Vec<Addr> {
        let mut leaving: HashMap<Addr, u32> = HashMap::new();
        for key in dead {
            let value = self.ids.frontends.get(key);
            let counted = value.is_some_and(|value| value.kind() == kind::CLUSTER_IP);
            *leaving.entry(key.addr).or_default() += u32::from(counted);
        }
        for change in &self.changes {
            for key in &change.old_frontends {
                leaving.entry(key.addr).or_default();
            }
        }
        // One that was replaced is not dead.
        for (key, _) in &self.strays.frontends {
            leaving.entry(key.addr).or_default();
        }
        if self.strays.vips {
            for addr in self.ids.vips.keys() {
                leaving.entry(*addr).or_default();
            }
        }
        let unneeded = |(addr, leaving): &(Addr, u32)| {
            let vip = self.ids.vips.get(addr);
            vip.is_some_and(|vip| vip.present && vip.frontends == *leaving)
        };
        let mut vips: Vec<_> = leaving.into_iter().filter(unneeded).collect();
        vips.sort_unstable();
        vips.into_iter().map(|(addr, _)| addr).collect()
    }

    fn retire(mut self) -> Retired {
        let mut retired = Retired::default();
        let mut retire_members = |ids: &mut Ids, members: &[u32], protocol| {
            retired.udp |= protocol == Protocol::Udp && !members.is_empty();
            for member in members {
                let generation = self.store.member(*member).word.generation();
                let dead = MemberWord::new(generation.wrapping_add(1), 0);
                self.store.commit_member(*member, dead);
                ids.quarantine.push(Freed::Member(*member));
            }
        };
        for change in std::mem::take(&mut self.changes) {
            retire_members(self.ids, &change.removed, change.key.protocol);
            let (key, entry) = change.into_entry();
            self.ids.services.insert(key, entry);
        }
        for (protocol, entry) in &self.deleted {
            retire_members(self.ids, &entry.members, *protocol);
        }
        // Nobody knows what they were; asking once too often costs nothing.
        retire_members(self.ids, &self.strays.members, Protocol::Udp);
        for (_, entry) in &self.deleted {
            let service = mark_unused(self.ids, self.store, entry.index);
            if entry.owns_slots {
                free_slots(self.ids, service.cluster);
                free_slots(self.ids, service.local);
            }
        }
        for index in &self.strays.services {
            mark_unused(self.ids, self.store, *index);
        }
        self.ids.quarantine.start_grace(self.store);
        retired
    }
}
