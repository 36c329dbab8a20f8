use std::{collections::BTreeSet, num::NonZeroU16, sync::Arc};

use proptest::prelude::*;

use super::*;
use crate::{
    backends::{Key, memory::Memory},
    compile::Compiler,
    metrics::{Metrics, Voice},
    model::{Model, NodeName, Objects, Port, Service, Update},
    state::{
        DesiredState, Family, NodeAddress, Protocol, ServiceName, ServicePort, ServiceState,
        TrafficPolicy,
    },
};

/// What the sources say: affinity by Service, and whether the node has an address.
#[derive(Clone, Debug, Default)]
struct World {
    services: BTreeMap<ServiceName, u32>,
    has_address: bool,
}

impl World {
    fn compile(&self, scope: &Scope) -> Compiled {
        let is_in = |name: &ServiceName| match scope {
            Scope::All => true,
            Scope::Part(dirty) => dirty.services.contains(name),
        };
        let with_addresses = match scope {
            Scope::All => true,
            Scope::Part(dirty) => dirty.addresses,
        };
        let services = self
            .services
            .iter()
            .filter(|(name, _)| is_in(name))
            .map(state)
            .collect();
        let addresses = (self.has_address && with_addresses)
            .then_some(([10, 0, 0, 1].into(), NodeAddress { node_ports: true }))
            .into_iter()
            .collect();
        Compiled {
            scope: scope.clone(),
            state: DesiredState {
                services,
                addresses,
                ..DesiredState::default()
            },
        }
    }

    fn rendered(&self) -> BTreeMap<Key, u64> {
        Memory::default().render(&self.compile(&Scope::All).state)
    }
}

fn state((name, affinity): (&ServiceName, &u32)) -> (ServicePort, ServiceState) {
    let key = ServicePort {
        service: name.clone(),
        port: "http".into(),
        protocol: Protocol::Tcp,
        family: Family::V4,
    };
    let state = ServiceState {
        key: key.clone(),
        frontends: Vec::new(),
        backends: Vec::new(),
        affinity_seconds: Some(*affinity),
        internal_policy: TrafficPolicy::Cluster,
        external_policy: TrafficPolicy::Cluster,
        source_ranges: Vec::new(),
        admits_node: false,
        health_check_port: None,
    };
    (key, state)
}

fn name(name: &str) -> ServiceName {
    ServiceName::new("default", name)
}

fn world(services: &[(&str, u32)]) -> World {
    let services = services
        .iter()
        .map(|(service, value)| (name(service), *value))
        .collect();
    World {
        services,
        has_address: false,
    }
}

fn part(services: &[&str]) -> Scope {
    Scope::Part(Dirty {
        services: services.iter().map(|service| name(service)).collect(),
        ..Dirty::default()
    })
}

fn turn(scope: Scope, complete: bool) -> Turn {
    let touched = match &scope {
        Scope::All => Dirty::default(),
        Scope::Part(dirty) => dirty.clone(),
    };
    Turn {
        scope,
        changes: 1,
        touched,
        synced: true,
        complete,
        nudged: false,
        stop: false,
    }
}

struct Bench {
    layer: Layer<Memory>,
    now: Instant,
}

impl Bench {
    fn new(held: &World) -> Self {
        let mut memory = Memory::default();
        memory.entries = held.rendered();
        Self::over(memory)
    }

    fn over(memory: Memory) -> Self {
        let now = Instant::now();
        let layer = Layer::new(
            SyncStatus::channel("test"),
            memory,
            Metrics::default().layer("test", Voice::Own),
            now,
        );
        Self { layer, now }
    }

    fn turn(&mut self, world: &World, turn: Turn) -> Due {
        self.layer
            .turn(self.now, turn, &mut |scope| world.compile(scope))
    }

    fn memory(&mut self) -> &mut Memory {
        &mut self.layer.backend
    }

    fn entries(&self) -> &BTreeMap<Key, u64> {
        &self.layer.backend.entries
    }

    fn status(&self) -> SyncStatus {
        self.layer.status().borrow().clone()
    }
}

#[test]
fn nothing_is_written_before_the_first_snapshot() {
    let old = world(&[("a", 1)]);
    let mut bench = Bench::new(&old);
    bench.turn(
        &world(&[]),
        Turn {
            scope: Scope::All,
            changes: 1,
            ..Turn::default()
        },
    );
    assert_eq!(*bench.entries(), old.rendered());
    assert_eq!(bench.memory().writes, 0);
    assert!(!bench.status().is_synced);
}

#[test]
fn the_first_sync_brings_the_kernel_level_and_attaches_even_without_changes() {
    let same = world(&[("a", 1)]);
    let mut bench = Bench::new(&same);
    bench.turn(&same, turn(Scope::All, true));
    assert_eq!(bench.memory().writes, 1, "published, nothing else");
    let status = bench.status();
    assert!(status.is_synced && status.generation == 0 && status.entries == 1);
    bench.turn(&same, turn(part(&["a"]), true));
    assert_eq!(bench.memory().writes, 1, "nothing changed");
}

#[test]
fn an_incomplete_source_deletes_nothing_and_changes_only_what_was_seen_to_change() {
    let mut bench = Bench::new(&world(&[("gone", 1), ("kept", 1), ("seen", 1)]));
    let partial = world(&[("kept", 2), ("seen", 2), ("new", 2)]);
    bench.turn(&partial, turn(Scope::All, false));
    assert_eq!(
        *bench.entries(),
        world(&[("gone", 1), ("kept", 1), ("seen", 1), ("new", 2)]).rendered()
    );
    assert!(!bench.status().is_synced);
    bench.turn(&partial, turn(part(&["seen"]), false));
    bench.turn(&partial, turn(Scope::All, false));
    assert_eq!(
        *bench.entries(),
        world(&[("gone", 1), ("kept", 1), ("seen", 2), ("new", 2)]).rendered()
    );
    bench.turn(&partial, turn(Scope::All, true));
    assert_eq!(*bench.entries(), partial.rendered());
    assert!(bench.status().is_synced);
}

#[test]
fn while_somebody_else_serves_nothing_is_written_and_then_everything() {
    let (theirs, ours) = (world(&[("a", 1)]), world(&[("a", 2), ("b", 2)]));
    let mut bench = Bench::new(&theirs);
    bench.memory().yields = true;
    bench.turn(&ours, turn(Scope::All, false));
    assert!(!bench.status().is_synced);
    bench.turn(&ours, turn(part(&["b"]), true));
    let status = bench.status();
    assert!(status.is_synced && !status.is_serving, "{status:?}");
    assert_eq!(bench.memory().writes, 0);
    bench.memory().yields = false;
    bench.turn(&ours, turn(Scope::default(), true));
    assert_eq!(*bench.entries(), ours.rendered());
    assert!(bench.status().is_serving);
}

#[test]
fn what_an_audit_finds_of_somebody_else_is_not_repaired() {
    let ours = world(&[("a", 1)]);
    let mut bench = Bench::new(&ours);
    bench.turn(&ours, turn(Scope::All, true));
    let writes = bench.memory().writes;
    let theirs = world(&[("a", 3)]).rendered();
    bench.memory().entries.clone_from(&theirs);
    bench.memory().yields_once_read = true;
    bench.now += AUDIT_EVERY;
    bench.turn(&ours, turn(Scope::default(), true));
    assert_eq!((bench.memory().writes, bench.entries()), (writes, &theirs));
    assert!(!bench.status().is_serving);
    assert_eq!(bench.layer.metrics.drift_repairs.get(), 0);
}

#[test]
fn an_error_is_retried_later_and_later_until_it_is_over() {
    let wanted = world(&[("a", 1), ("b", 1)]);
    let mut bench = Bench::new(&world(&[]));
    bench.memory().fail_next(3);
    let mut waits = Vec::new();
    let mut next = turn(Scope::All, true);
    while bench.status().last_success.is_none() {
        let due = bench.turn(&wanted, next);
        waits.push(due.until - bench.now);
        bench.now = due.until;
        next = Turn {
            changes: 0,
            ..turn(Scope::default(), true)
        };
    }
    assert_eq!(waits[..3], [10, 20, 40].map(Duration::from_millis));
    assert_eq!(*bench.entries(), wanted.rendered());
    assert_eq!(bench.layer.metrics.sync_errors.get(), 3);
}

#[test]
fn the_audit_repairs_what_somebody_else_changed() {
    let wanted = world(&[("a", 1), ("b", 1)]);
    let mut bench = Bench::new(&wanted);
    let due = bench.turn(&wanted, turn(Scope::All, true));
    bench.memory().entries.pop_first();
    bench.now = due.until;
    bench.turn(
        &wanted,
        Turn {
            changes: 0,
            ..turn(Scope::default(), true)
        },
    );
    assert_eq!(*bench.entries(), wanted.rendered());
    assert_eq!(bench.layer.metrics.drift_repairs.get(), 1);
}

#[test]
fn what_the_kernel_refuses_is_tried_again_soon_then_seldom_and_is_nobodys_drift() {
    let audit = || Turn {
        changes: 0,
        ..turn(part(&[]), true)
    };
    let wanted = world(&[("a", 1), ("b", 1)]);
    let mut bench = Bench::new(&world(&[]));
    bench.memory().refused = world(&[("b", 1)]).rendered().into_keys().collect();
    let mut due = bench.turn(&wanted, turn(Scope::All, true));
    assert_eq!(*bench.entries(), world(&[("a", 1)]).rendered());
    let mut waits = Vec::new();
    for _ in 0..3 {
        waits.push((due.until - bench.now).as_millis());
        bench.now = due.until;
        due = bench.turn(&wanted, audit());
    }
    assert_eq!(waits, [10, 20, 40]);
    bench.memory().refused.clear();
    bench.now = due.until;
    due = bench.turn(&wanted, audit());
    assert_eq!(*bench.entries(), wanted.rendered());
    assert_eq!(due.until - bench.now, AUDIT_EVERY);
    assert_eq!(bench.layer.metrics.drift_repairs.get(), 0);
}

#[test]
fn the_pause_between_two_changes_begins_when_the_first_is_done() {
    const PACE: Duration = Duration::from_secs(1);
    const WORK: Duration = Duration::from_secs(10);
    let world = world(&[("a", 1)]);
    let mut bench = Bench::new(&World::default());
    bench.layer.pace = PACE;
    let done = bench.now;
    bench.now -= WORK;
    let due = bench.turn(&world, turn(Scope::All, true));
    assert!(due.not_before >= Some(done + PACE));
    let due = bench.turn(&world, turn(part(&["a"]), true));
    assert_eq!(due.not_before, None, "nothing was changed");
}

#[test]
fn what_somebody_else_changed_is_repaired_before_the_next_audit_is_due() {
    let wanted = world(&[("a", 1), ("b", 1)]);
    let mut bench = Bench::new(&wanted);
    let due = bench.turn(&wanted, turn(Scope::All, true));
    bench.memory().entries.pop_first();
    assert!(due.until > bench.now);
    let due = bench.layer.hasten(bench.now, due);
    assert_eq!(due.until, bench.now);
    let due = bench.turn(&wanted, turn(Scope::default(), true));
    assert_eq!(*bench.entries(), wanted.rendered());
    assert!(due.until > bench.now);
}

#[test]
fn a_disturbance_shortens_no_wait_after_an_error() {
    let wanted = world(&[("a", 1)]);
    let mut bench = Bench::new(&World::default());
    bench.memory().fail_next(1);
    let due = bench.turn(&wanted, turn(Scope::All, true));
    assert_eq!(bench.layer.hasten(bench.now, due), due);
}

#[derive(Clone, Debug)]
enum Step {
    Set(u8, u32),
    Remove(u8),
    Address(bool),
    Restart,
}

fn steps() -> impl Strategy<Value = Vec<(Step, bool)>> {
    let step = prop_oneof![
        6 => (0_u8..12, 0_u32..4).prop_map(|(service, value)| Step::Set(service, value)),
        3 => (0_u8..12).prop_map(Step::Remove),
        1 => any::<bool>().prop_map(Step::Address),
        1 => Just(Step::Restart),
    ];
    // Each step, and whether the layer gets a turn after it.
    prop::collection::vec((step, any::<bool>()), 1..60)
}

proptest! {
    /// Ten percent of all writes fail, the agent restarts now and then, and batches end where they will.
    #[test]
    fn the_kernel_always_ends_at_what_is_desired(
        steps in steps(),
        seed in any::<u64>(),
    ) {
        let mut world = World::default();
        let mut bench = Bench::over(Memory::faulty(seed));
        let mut scope = Scope::All;
        for (step, takes_turn) in steps {
            let service = |id: u8| name(&id.to_string());
            match step {
                Step::Set(id, value) => {
                    world.services.insert(service(id), value);
                    scope.merge(part(&[&id.to_string()]));
                }
                Step::Remove(id) => {
                    world.services.remove(&service(id));
                    scope.merge(part(&[&id.to_string()]));
                }
                Step::Address(has) => {
                    world.has_address = has;
                    scope.merge(Scope::Part(Dirty { addresses: true, ..Dirty::default() }));
                }
                Step::Restart => {
                    bench = Bench::over(std::mem::take(bench.memory()));
                    scope = Scope::All;
                }
            }
            if takes_turn {
                let due = bench.turn(&world, turn(std::mem::take(&mut scope), true));
                bench.now = due.not_before.unwrap_or(bench.now);
            }
        }
        bench.turn(&world, turn(scope, true));
        for _ in 0..400 {
            if bench.layer.failures == 0 {
                break;
            }
            bench.turn(&world, turn(Scope::default(), true));
        }
        prop_assert_eq!(bench.entries(), &world.rendered());
    }
}

#[test]
fn a_part_is_widened_to_the_services_that_it_touches() {
    let claim = |service: &str, is_there: bool| {
        let port = Port::new("http", Protocol::Tcp, NonZeroU16::new(80).unwrap());
        let object = Service::new(&[[10, 96, 0, 1].into()], vec![port]);
        let object = is_there.then(|| Arc::new(object));
        Update::Objects(Objects {
            services: vec![(name(service), object)],
            complete: true,
            ..Objects::default()
        })
    };
    let mut model = Model::new(NodeName::new("node-a"));
    let mut compiler = Compiler::default();
    model.apply(claim("one", true));
    model.apply(claim("other", true));
    let (all, problems) = Compiled::of(&mut compiler, &model, &Scope::All);
    assert_eq!(all.scope, Scope::All);
    assert_eq!(all.state.services.len(), 2);
    let [problem] = problems.as_slice() else {
        panic!("one of them does not get the address: {problems:?}");
    };
    let (loser, owner) = match problem.service() == &name("one") {
        true => ("one", "other"),
        false => ("other", "one"),
    };
    let asked = Scope::Part(model.apply(claim(owner, false)));
    let (part, problems) = Compiled::of(&mut compiler, &model, &asked);
    let both = Scope::Part(Dirty {
        services: BTreeSet::from([name("one"), name("other")]),
        ..Dirty::default()
    });
    assert_eq!((part.scope, problems), (both, Vec::new()));
    let got: Vec<_> = part.state.services.keys().map(|key| &key.service).collect();
    assert_eq!(got, [&name(loser)]);
}
