//! One service port of a plan: what stays, what comes, what goes.

use std::cmp::Ordering;

use proxy_ebpf::{
    abi::{FrontendKey, MemberWord, Policy, SetWord},
    lb::Scope,
};

use crate::{
    backends::ebpf::{
        ids::Entry,
        observe::order,
        render::{self, MapFrontend},
        store::Store,
    },
    state::{Backend, ServicePort, ServiceState},
};

/// An index that is not known yet.
pub const NEW: u32 = u32::MAX;

/// One service port of a plan.
pub struct Change<'a> {
    /// Which.
    pub key: ServicePort,
    /// What it shall be.
    pub state: &'a ServiceState,
    /// The maps do not have it yet.
    pub fresh: bool,
    /// Index into SERVICES.
    pub index: u32,
    /// Indices into MEMBERS, one per backend of the state.
    pub members: Vec<u32>,
    /// Those of them that were taken for this change.
    pub added: Vec<u32>,
    /// Indices of members that are gone.
    pub removed: Vec<u32>,
    /// New words of members that stay, where they differ.
    pub states: Vec<(u32, MemberWord)>,
    /// First slot by scope, where a set with backends is rewritten.
    pub bases: [u32; 2],
    /// New set words by scope, where a set is rewritten.
    pub words: [Option<SetWord>; 2],
    /// Sorted by key.
    pub frontends: Vec<MapFrontend>,
    /// Keys that it had.
    pub old_frontends: Box<[FrontendKey]>,
    /// The policy word.
    pub policy: Policy,
    /// The slots that its set words name now are its own.
    pub owned_slots: bool,
    /// Bits of the sets that have to be rewritten.
    touched: u32,
}

impl<'a> Change<'a> {
    /// Compares the maps' entry, if there is one, with the state.
    pub fn new(
        store: &impl Store,
        known: Option<(ServicePort, Entry)>,
        state: &'a ServiceState,
    ) -> Self {
        let fresh = known.is_none();
        let (key, entry) = known.unwrap_or_else(|| {
            let entry = Entry {
                index: NEW,
                members: Box::default(),
                frontends: Box::default(),
                sound: true,
                owns_slots: true,
            };
            (state.key.clone(), entry)
        });
        let both = MemberWord::IN_CLUSTER | MemberWord::IN_LOCAL;
        let mut change = Self {
            key,
            state,
            fresh,
            index: entry.index,
            members: Vec::with_capacity(state.backends.len()),
            added: Vec::new(),
            removed: Vec::new(),
            states: Vec::new(),
            bases: [0; 2],
            words: [None; 2],
            frontends: render::frontends(state),
            old_frontends: entry.frontends,
            policy: render::policy(state),
            owned_slots: entry.owns_slots,
            touched: if entry.sound { 0 } else { both },
        };
        change.merge(store, &entry.members);
        change
    }

    /// Walks members and backends, both sorted by address and port.
    fn merge(&mut self, store: &impl Store, members: &[u32]) {
        let mut old = members
            .iter()
            .map(|index| (*index, store.member(*index)))
            .peekable();
        for backend in &self.state.backends {
            let bits = render::member_bits(backend.state);
            let at = (backend.address, backend.port);
            while let Some((index, gone)) =
                old.next_if(|(_, member)| order(member).cmp(&at) == Ordering::Less)
            {
                self.removed.push(index);
                self.touched |= gone.word.bits();
            }
            match old.next_if(|(_, member)| order(member) == at) {
                Some((index, member)) => {
                    self.members.push(index);
                    self.touched |= member.word.bits() ^ bits;
                    if member.word.bits() != bits {
                        let word = MemberWord::new(member.word.generation(), bits);
                        self.states.push((index, word));
                    }
                }
                None => {
                    self.members.push(NEW);
                    self.touched |= bits;
                }
            }
        }
        for (index, gone) in old {
            self.removed.push(index);
            self.touched |= gone.word.bits();
        }
    }

    /// Whether the set of `scope` has to be written anew.
    pub fn is_rewritten(&self, scope: Scope) -> bool {
        self.touched & bit(scope) != 0
    }

    /// Backends of the set, with the indices of their members.
    pub fn in_set(&self, scope: Scope) -> impl Iterator<Item = (u32, &'a Backend)> {
        let backends = self.members.iter().copied().zip(&self.state.backends);
        backends.filter(move |(_, backend)| render::member_bits(backend.state) & bit(scope) != 0)
    }

    /// How many backends the set has.
    pub fn count(&self, scope: Scope) -> u32 {
        self.in_set(scope).count() as u32
    }

    /// The policy to use as long as frontends may still leave: as it shall be, but where that would lead to a set
    /// without backends, as it was.
    pub fn early_policy(&self, old: Policy) -> Policy {
        let choose = |flag: u32| {
            let scope = match self.policy.flags() & flag {
                0 => Scope::Cluster,
                _ => Scope::Local,
            };
            let policy = if self.count(scope) > 0 {
                self.policy
            } else {
                old
            };
            policy.flags() & flag
        };
        let flags = choose(Policy::INTERNAL_LOCAL) | choose(Policy::EXTERNAL_LOCAL);
        Policy::new(flags, self.policy.affinity_seconds())
    }

    /// How many members have to be made.
    pub fn new_members(&self) -> u32 {
        self.members.iter().filter(|index| **index == NEW).count() as u32
    }

    /// How many slots have to be taken.
    pub fn new_slots(&self) -> u64 {
        [Scope::Cluster, Scope::Local]
            .into_iter()
            .filter(|scope| self.is_rewritten(*scope))
            .map(|scope| u64::from(self.count(scope)))
            .sum()
    }

    /// What the maps hold of it when all is done.
    pub fn into_entry(self) -> (ServicePort, Entry) {
        let entry = Entry {
            index: self.index,
            members: self.members.into(),
            frontends: self.frontends.iter().map(|frontend| frontend.key).collect(),
            sound: true,
            owns_slots: true,
        };
        (self.key, entry)
    }
}

fn bit(scope: Scope) -> u32 {
    match scope {
        Scope::Cluster => MemberWord::IN_CLUSTER,
        Scope::Local => MemberWord::IN_LOCAL,
    }
}
