use clients::never_astray;
use proptest::prelude::*;

use super::{simulated::Simulated, store::Capacity, *};
use crate::plan::diff;

mod clients;
mod garbage;
mod single;
mod speed;
mod world;

/// What a driver of a backend does: observes, plans, applies; again after an error, as a new process after a crash.
fn converge(mut backend: EbpfBackend<Simulated>, state: &DesiredState) -> EbpfBackend<Simulated> {
    let mut last = Ok(());
    for _ in 0..300 {
        let observed = backend.observe().unwrap();
        let plan = diff(&observed, &backend.render(state));
        if !plan.is_empty() {
            last = backend.apply(&plan, state);
        }
        let done = plan.is_empty() || last.is_ok();
        if backend.store().has_crashed() {
            let mut store = backend.into_store();
            store.crash_after(None);
            backend = EbpfBackend::new(store);
        } else if done {
            return backend;
        }
    }
    panic!("does not converge: {last:?}");
}

/// Maps that just hold the largest state twice, and never more: much has to wait for grace periods. With 20 sets of up
/// to 5 slots, 200 slots have a gap of 5 however they are strewn.
fn small() -> Simulated {
    Simulated::fixed(Capacity {
        services: 10,
        slots: 200,
        members: 50,
        frontends: 16,
        vips: 8,
        addresses: 2,
    })
}

fn maps() -> impl Strategy<Value = Simulated> {
    prop_oneof![4 => Just(small()), 1 => Just(Simulated::checked())]
}

fn fresh(state: &DesiredState) -> EbpfBackend<Simulated> {
    converge(EbpfBackend::new(small()), state)
}

fn assert_equal(backend: &mut EbpfBackend<Simulated>, state: &DesiredState) {
    let expected = describe(fresh(state).store()).unwrap();
    assert_eq!(describe(backend.store()).unwrap(), expected);
    let desired = backend.render(state);
    assert_eq!(backend.observe().unwrap(), desired);
    let writes = backend.store().writes();
    let after = converge(EbpfBackend::new(backend.store().clone()), state);
    assert_eq!(after.store().writes(), writes, "a restart writes nothing");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn what_was_applied_is_observed(state in world::state()) {
        assert_equal(&mut fresh(&state), &state);
    }

    #[test]
    fn changes_lead_where_a_fresh_start_leads(states in prop::collection::vec(world::state(), 1..8), store in maps()) {
        let mut backend = EbpfBackend::new(store);
        let mut observed = backend.observe().unwrap();
        for state in &states {
            let desired = backend.render(state);
            backend.apply(&diff(&observed, &desired), state).unwrap();
            observed = desired;
        }
        assert_equal(&mut backend, states.last().unwrap());
    }

    #[test]
    fn faults_and_crashes_lead_nowhere_else(
        steps in prop::collection::vec((world::state(), prop::option::of(0..60_u64), any::<u64>()), 1..6),
        store in maps(),
    ) {
        let mut backend = EbpfBackend::new(store);
        let mut old = DesiredState::default();
        for (state, crash, seed) in steps {
            let store = backend.store_mut();
            store.inject_faults(10, seed);
            store.crash_after(crash);
            store.watch(Some(never_astray(&old, &state)));
            backend = converge(backend, &state);
            let store = backend.store_mut();
            store.inject_faults(0, 0);
            store.crash_after(None);
            store.watch(None);
            if seed % 2 == 0 {
                store.pass_time();
            }
            assert_equal(&mut backend, &state);
            old = state;
        }
    }
}

proptest! {
    // Each case restarts once per write.
    #![proptest_config(ProptestConfig { cases: 8, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_crash_leaves_something_that_a_restart_completes(old in world::state(), new in world::state()) {
        let before = fresh(&old).into_store();
        let count = |store: Simulated| converge(EbpfBackend::new(store), &new).store().writes();
        let writes = count(before.clone()) - before.writes();
        for crash in 0..writes {
            let mut store = before.clone();
            store.crash_after(Some(crash));
            store.watch(Some(never_astray(&old, &new)));
            let mut backend = converge(EbpfBackend::new(store), &new);
            backend.store_mut().watch(None);
            prop_assert_eq!(backend.observe().unwrap(), backend.render(&new));
        }
    }
}
