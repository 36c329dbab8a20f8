//! Clients that connect after each write of an apply, and some that are in the middle of it since an earlier write.

use std::{
    cell::{Cell, RefCell},
    collections::{BTreeMap, BTreeSet},
    rc::Rc,
};

use proxy_ebpf::{
    abi::{
        Addr, AffinityKey, AffinityValue, Be16, FrontendKey, FrontendValue, Member, MemberWord,
        Policy, Reason, SetWord, Slot,
    },
    lb::{self, Hit, Request, Scope, Tables, Verdict},
};

use super::world;
use crate::{
    backends::ebpf::{in_memory::InMemory, render, simulated::Watcher, store::Store},
    state::{DesiredState, ServiceState},
};

type Endpoint = (Addr, Be16);

/// Clients that are kept in the middle of it: those of the last dozen writes.
const MOST_LATE: usize = 64;

/// What a client may see at one frontend on the way from one state to another.
struct Expectation {
    /// It had endpoints before, and has some after.
    must_serve: bool,
    /// Endpoints of the services that own the frontend before or after.
    legal: BTreeSet<Endpoint>,
}

/// What a client has read so far.
#[derive(Clone, Copy)]
struct Progress {
    hit: Hit,
    policy: Policy,
    set: SetWord,
}

/// Connects to everything that either state serves: nobody is refused who was served before and is served after, and
/// nobody reaches an endpoint of neither state.
pub fn never_astray(old: &DesiredState, new: &DesiredState) -> Watcher {
    let expected = expectations(old, new);
    let late: RefCell<Vec<(u64, FrontendKey, Progress)>> = RefCell::default();
    Rc::new(move |store| {
        let maps = store.maps();
        let mut late = late.borrow_mut();
        late.retain(|(started, _, _)| *started >= store.grace_over());
        let surplus = late.len().saturating_sub(MOST_LATE);
        late.drain(..surplus);
        for (_, key, progress) in &*late {
            let expected = &expected[key];
            for read in 1..4 {
                let tables = Late::new(maps, *progress, read);
                let request = request(key, 3 << 30);
                expected.check(key, lb::choose(&tables, progress.hit, &request));
            }
        }
        for (key, expected) in &expected {
            for random in [0, 1 << 30, 2 << 30, 3 << 30, u32::MAX] {
                let request = request(key, random);
                let verdict = match lb::find(maps, &request) {
                    Ok(hit) => lb::choose(maps, hit, &request),
                    Err(verdict) => verdict,
                };
                expected.check(key, verdict);
            }
            if let Ok(hit) = lb::find(maps, &request(key, 0)) {
                late.push((store.started(), *key, read(maps, hit)));
            }
        }
    })
}

fn read(maps: &InMemory, hit: Hit) -> Progress {
    let policy = maps.policy(hit.service).unwrap();
    Progress {
        hit,
        policy,
        set: maps.set(hit.service, lb::scope(hit.kind, policy)).unwrap(),
    }
}

impl Expectation {
    fn check(&self, key: &FrontendKey, verdict: Verdict) {
        match verdict {
            Verdict::Translate(backend) => assert!(
                self.legal.contains(&(backend.addr, backend.port)),
                "{key:?} reaches {backend:?}"
            ),
            Verdict::Pass(reason) | Verdict::Refuse(reason) => {
                assert!(!self.must_serve, "{key:?}: {reason:?}");
            }
        }
    }
}

fn expectations(old: &DesiredState, new: &DesiredState) -> BTreeMap<FrontendKey, Expectation> {
    let states = [old, new];
    let services = states.iter().flat_map(|state| state.services.values());
    let keys: BTreeSet<_> = services
        .flat_map(render::frontends)
        .map(|f| f.key)
        .collect();
    let expectation = |key: FrontendKey| {
        let owners = states.map(|state| {
            let mut services = state.services.values();
            services.find_map(|service| {
                let mut found = render::frontends(service).into_iter();
                found.find(|f| f.key == key).map(|f| (service, f))
            })
        });
        // Whoever has a flag, before or after, is somebody else's to serve.
        if owners.iter().flatten().any(|(_, f)| f.flags != 0) {
            return None;
        }
        let serves = |owner: &Option<(&ServiceState, render::MapFrontend)>| {
            owner.is_some_and(|(service, frontend)| {
                let scope = lb::scope(frontend.kind, render::policy(service));
                endpoints(service, scope).next().is_some()
            })
        };
        let names = owners.iter().flatten().map(|(service, _)| &service.key);
        let involved = names.flat_map(|name| states.map(|state| state.services.get(name)));
        let legal = involved.flatten().flat_map(|service| {
            [Scope::Cluster, Scope::Local]
                .into_iter()
                .flat_map(|scope| endpoints(service, scope))
        });
        let expectation = Expectation {
            must_serve: owners.iter().all(serves),
            legal: legal.collect(),
        };
        Some((key, expectation))
    };
    keys.into_iter().filter_map(expectation).collect()
}

fn endpoints(service: &ServiceState, scope: Scope) -> impl Iterator<Item = Endpoint> {
    let bit = match scope {
        Scope::Cluster => MemberWord::IN_CLUSTER,
        Scope::Local => MemberWord::IN_LOCAL,
    };
    let backends = service.backends.iter();
    let in_set = backends.filter(move |backend| render::member_bits(backend.state) & bit != 0);
    in_set.map(|backend| (backend.address.into(), Be16::new(backend.port)))
}

fn request(key: &FrontendKey, random: u32) -> Request {
    let addr = if key.addr.is_unspecified() {
        world::NODE.into()
    } else {
        key.addr
    };
    Request {
        addr,
        port: key.port,
        protocol: key.protocol,
        on_host: false,
        from_loopback: false,
        netns_cookie: 1,
        now_ns: 1,
        random,
    }
}

/// The maps for a client that read some words before.
struct Late<'a> {
    now: &'a InMemory,
    policy: Cell<Option<Policy>>,
    set: Cell<Option<SetWord>>,
}

impl<'a> Late<'a> {
    /// `read` counts what it has: the frontend, the policy, the set word.
    fn new(now: &'a InMemory, progress: Progress, read: u32) -> Self {
        Self {
            now,
            policy: Cell::new(Some(progress.policy).filter(|_| read > 1)),
            set: Cell::new(Some(progress.set).filter(|_| read > 2)),
        }
    }
}

impl Tables for Late<'_> {
    fn frontend(&self, key: &FrontendKey) -> Option<FrontendValue> {
        self.now.frontend(key)
    }

    fn is_cluster_ip(&self, addr: &Addr) -> bool {
        self.now.is_cluster_ip(addr)
    }

    fn node_address(&self, addr: &Addr) -> Option<u32> {
        self.now.node_address(addr)
    }

    fn set(&self, service: u32, scope: Scope) -> Option<SetWord> {
        self.set.take().or_else(|| self.now.set(service, scope))
    }

    fn policy(&self, service: u32) -> Option<Policy> {
        self.policy.take().or_else(|| self.now.policy(service))
    }

    fn slot(&self, index: u32) -> Option<Slot> {
        self.now.slot(index)
    }

    fn member(&self, index: u32) -> Option<Member> {
        self.now.member(index)
    }

    fn affinity(&self, _: &AffinityKey) -> Option<AffinityValue> {
        None
    }

    fn remember(&self, _: &AffinityKey, _: &AffinityValue) {}

    fn note(&self, _: Reason) {}
}
