//! Single changes, and what they write.

use std::net::IpAddr;

use proxy_ebpf::abi::{
    Be16, FrontendKey, FrontendValue, Member, MemberWord, Name, Service, SetWord,
};

use super::{world::service, *};
use crate::{
    backends::ebpf::store::Store,
    state::{Protocol, ServiceState},
};

fn of(services: &[&ServiceState]) -> DesiredState {
    DesiredState {
        services: services
            .iter()
            .map(|state| (state.key.clone(), (*state).clone()))
            .collect(),
        ..DesiredState::default()
    }
}

fn step(backend: &mut EbpfBackend<Simulated>, old: &DesiredState, new: &DesiredState) -> u64 {
    let plan = diff(&backend.render(old), &backend.render(new));
    let writes = backend.store().writes();
    backend.store_mut().watch(Some(never_astray(old, new)));
    backend.apply(&plan, new).unwrap();
    backend.store_mut().watch(None);
    backend.store().writes() - writes
}

fn sets(backend: &EbpfBackend<Simulated>) -> Vec<SetWord> {
    let services = (0..backend.store().capacity().services).map(|i| backend.store().service(i));
    services.flat_map(|s| [s.cluster, s.local]).collect()
}

#[test]
fn a_change_of_a_members_state_is_one_word() {
    let old = service("web", Protocol::Tcp, "10.96.0.1", &[1, 2]);
    let mut new = old.clone();
    new.backends[0].state.terminating = true;
    let mut backend = fresh(&of(&[&old]));
    let before = sets(&backend);
    assert_eq!(step(&mut backend, &of(&[&old]), &of(&[&new])), 1);
    assert_eq!(sets(&backend), before);
}

#[test]
fn a_new_endpoint_is_its_member_the_slots_and_one_set_word() {
    let old = service("web", Protocol::Tcp, "10.96.0.1", &[1, 2]);
    let new = service("web", Protocol::Tcp, "10.96.0.1", &[1, 2, 3]);
    let mut backend = fresh(&of(&[&old]));
    assert_eq!(step(&mut backend, &of(&[&old]), &of(&[&new])), 1 + 3 + 1);
}

#[test]
fn a_vip_that_moves_is_replaced_once_and_never_deleted() {
    let a = service("a", Protocol::Tcp, "10.96.0.1", &[1]);
    let b = service("b", Protocol::Tcp, "10.96.0.2", &[2]);
    let mut heir = b.clone();
    heir.frontends.insert(0, a.frontends[0]);
    let (old, new) = (of(&[&a, &b]), of(&[&heir]));
    let mut backend = fresh(&old);
    // The frontend, the dead member, and twice the dead service: unused, and without a name.
    assert_eq!(step(&mut backend, &old, &new), 4);
    assert_equal(&mut backend, &new);
}

#[test]
fn two_services_swap_their_vips_under_their_clients() {
    let a = service("a", Protocol::Tcp, "10.96.0.1", &[1]);
    let b = service("b", Protocol::Tcp, "10.96.0.2", &[2]);
    let (mut new_a, mut new_b) = (a.clone(), b.clone());
    std::mem::swap(&mut new_a.frontends, &mut new_b.frontends);
    let (old, new) = (of(&[&a, &b]), of(&[&new_a, &new_b]));
    let mut backend = fresh(&old);
    assert_eq!(step(&mut backend, &old, &new), 2);
    assert_equal(&mut backend, &new);
}

#[test]
fn only_dead_udp_members_call_for_the_socket_killer() {
    for (protocol, calls) in [(Protocol::Tcp, false), (Protocol::Udp, true)] {
        let old = service("dns", protocol, "10.96.0.10", &[1, 2]);
        let mut draining = old.clone();
        draining.backends[0].state.in_cluster = false;
        let new = service("dns", protocol, "10.96.0.10", &[2]);
        let mut backend = fresh(&of(&[&old]));
        assert!(
            backend.take_udp_retired(),
            "an agent before us may have been killed"
        );
        step(&mut backend, &of(&[&old]), &of(&[&draining]));
        assert!(!backend.take_udp_retired());
        step(&mut backend, &of(&[&draining]), &of(&[&new]));
        assert_eq!(backend.take_udp_retired(), calls);
        assert!(!backend.take_udp_retired());
    }
}

#[test]
fn a_member_keeps_index_and_generation_while_it_serves() {
    let old = service("web", Protocol::Tcp, "10.96.0.1", &[1, 5]);
    let new = service("web", Protocol::Tcp, "10.96.0.1", &[0, 2, 5, 7]);
    let find = |backend: &EbpfBackend<Simulated>| {
        let address = IpAddr::from([10, 244, 0, 5]).into();
        let mut members = (0..).map(|index| (index, backend.store().member(index)));
        let (index, member) = members.find(|(_, m)| m.addr == address).unwrap();
        (index, member.word)
    };
    let mut backend = fresh(&of(&[&old]));
    let before = find(&backend);
    step(&mut backend, &of(&[&old]), &of(&[&new]));
    assert_eq!(find(&backend), before);
}

#[test]
fn maps_that_are_full_grow_under_their_clients() {
    let mut backend = EbpfBackend::new(Simulated::checked());
    let mut old = DesiredState::default();
    for count in 1..30_u8 {
        let hosts: Vec<_> = (0..count).collect();
        let name = format!("web-{count}");
        let grown = service("web", Protocol::Tcp, "10.96.0.1", &hosts);
        let more = service(&name, Protocol::Tcp, &format!("10.96.1.{count}"), &hosts);
        let mut new = old.clone();
        new.services.extend(of(&[&grown, &more]).services);
        step(&mut backend, &old, &new);
        old = new;
    }
    assert!(backend.store().capacity().slots > 400);
    assert_eq!(backend.observe().unwrap(), backend.render(&old));
}

#[test]
fn without_memory_to_grow_a_plan_that_does_not_fit_is_refused_and_clients_are_served() {
    let old = service("web", Protocol::Tcp, "10.96.0.1", &[1, 2]);
    let hosts: Vec<_> = (0..100).collect();
    let new = of(&[&service("web", Protocol::Tcp, "10.96.0.1", &hosts)]);
    let mut backend = fresh(&of(&[&old]));
    let plan = diff(&backend.observe().unwrap(), &backend.render(&new));
    let writes = backend.store().writes();
    let error = backend.apply(&plan, &new).unwrap_err();
    assert!(
        error
            .to_string()
            .contains("the maps of the next generation"),
        "{error}"
    );
    assert_eq!(backend.store().writes(), writes);
    assert_equal(&mut backend, &of(&[&old]));
}

#[test]
fn strays_are_removed_and_the_rest_is_left_alone() {
    let web = service("web", Protocol::Tcp, "10.96.0.1", &[1, 2]);
    let state = of(&[&web]);
    let mut store = fresh(&state).into_store();
    let before = describe(&store).unwrap();
    store.unchecked();
    let stray = |port| FrontendKey::new(IpAddr::from([10, 96, 9, 9]).into(), Be16::new(port), 6);
    for (port, index) in [(1, 5), (2, 1 << 30), (3, 0)] {
        let foreign = stray(port + 10);
        let value = FrontendValue::new(&foreign, index, 1, 0);
        store.upsert_frontends(&[(stray(port), value)]).unwrap();
    }
    store.upsert_vips(&[stray(1).addr]).unwrap();
    let nameless = Service {
        cluster: SetWord::new(1, 2, 3),
        used: 1,
        ..Service::default()
    };
    store.write_service(7, &nameless);
    let orphan = Member {
        word: MemberWord::new(9, MemberWord::SERVING),
        service: 6,
        ..Member::default()
    };
    store.write_member(40, &orphan);
    let mut backend = converge(EbpfBackend::new(store), &state);
    assert_eq!(backend.observe().unwrap(), backend.render(&state));
    assert_eq!(describe(backend.store()).unwrap(), before);
    assert_eq!(backend.store().member(40).word, MemberWord::new(10, 0));
}

#[test]
fn a_service_under_anothers_name_is_removed() {
    let web = service("web", Protocol::Tcp, "10.96.0.1", &[1, 2]);
    let shop = service("shop", Protocol::Tcp, "10.96.0.2", &[3]);
    let state = of(&[&web, &shop]);
    let mut store = fresh(&state).into_store();
    store.unchecked();
    let names: [Name; 2] = [store.name(0), store.name(1)];
    store.write_name(1, &names[0]);
    let backend = converge(EbpfBackend::new(store), &state);
    assert_equal_maps(&backend, &state);
}

fn assert_equal_maps(backend: &EbpfBackend<Simulated>, state: &DesiredState) {
    let expected = describe(fresh(state).store()).unwrap();
    assert_eq!(describe(backend.store()).unwrap(), expected);
}
