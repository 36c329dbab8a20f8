//! The single writes that the steps of an apply consist of.

use proxy_ebpf::{
    abi::{Be16, Member, MemberWord, Policy, Service, SetWord, Slot},
    lb::Scope,
};

use super::change::Change;
use crate::backends::ebpf::{
    ids::Ids,
    quarantine::Freed,
    render::{self, NO_NAME},
    store::Store,
};

/// Writes the members that were taken for `change`.
pub fn write_members(store: &mut impl Store, change: &Change) {
    let mut added = change.added.iter().peekable();
    for (member, backend) in change.members.iter().zip(&change.state.backends) {
        if added.next_if_eq(&member).is_none() {
            continue;
        }
        let generation = store.member(*member).word.generation().wrapping_add(1);
        let entry = Member {
            word: MemberWord::new(generation.max(1), render::member_bits(backend.state)),
            service: change.index,
            port: Be16::new(backend.port),
            pad: 0,
            addr: backend.address.into(),
            ..Member::default()
        };
        store.write_member(*member, &entry);
    }
}

/// Writes the slots of one set and says by which word it will be committed.
pub fn write_set<S: Store>(
    ids: &mut Ids,
    store: &mut S,
    change: &mut Change,
    scope: Scope,
    slots: &mut Vec<Slot>,
) {
    slots.clear();
    slots.extend(change.in_set(scope).map(|(index, backend)| Slot {
        addr: backend.address.into(),
        port: Be16::new(backend.port),
        member: index,
        member_generation: store.member(index).word.generation(),
        ..Slot::default()
    }));
    let (base, count) = (change.bases[scope as usize], slots.len() as u32);
    // A reader that is late beyond all measure must not take the new slots for those that it knew.
    let generation = loop {
        let generation = ids.next_generation();
        if (base..base + count).all(|at| store.slot(at).generation != generation) {
            break generation;
        }
    };
    for slot in slots.iter_mut() {
        slot.generation = generation;
    }
    if count > 0 {
        store.write_slots(base, slots);
    }
    change.words[scope as usize] = Some(SetWord::new(base, count, generation));
}

/// Commits a set and frees what it had.
pub fn commit_set<S: Store>(
    ids: &mut Ids,
    store: &mut S,
    change: &Change,
    scope: Scope,
    word: SetWord,
) {
    let service = store.service(change.index);
    let old = match scope {
        Scope::Cluster => service.cluster,
        Scope::Local => service.local,
    };
    store.commit_set(change.index, scope, word);
    if change.owned_slots {
        free_slots(ids, old);
    }
}

/// Commits a policy, if it differs.
pub fn commit_policy(store: &mut impl Store, index: u32, policy: Policy) {
    if store.service(index).policy != policy {
        store.commit_policy(index, policy);
    }
}

/// Frees the slots of a set that nobody finds any more.
pub fn free_slots(ids: &mut Ids, word: SetWord) {
    if word.count() > 0 {
        ids.quarantine.push(Freed::Slots {
            base: word.base(),
            len: word.count(),
        });
    }
}

/// Marks a service as unused. Its set words stay: a reader that found the frontend before it went, or before it moved to another service, may be
/// about to read them.
pub fn mark_unused(ids: &mut Ids, store: &mut impl Store, index: u32) -> Service {
    let service = Service {
        used: 0,
        ..store.service(index)
    };
    store.write_service(index, &service);
    store.write_name(index, &NO_NAME);
    ids.quarantine.push(Freed::Service(index));
    service
}
