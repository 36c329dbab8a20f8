//! Maps that somebody else wrote into: whatever they hold, they are put right, and nothing panics.

use proptest::prelude::*;
use proxy_ebpf::abi::{
    Addr, Be16, FrontendKey, FrontendValue, Member, MemberWord, Name, Policy, Service, SetWord,
    Slot, kind,
};

use super::*;
use crate::{
    backends::ebpf::store::Store,
    state::{FrontendKind, Protocol},
};

/// One write into any of the maps, of anything.
#[derive(Clone, Debug)]
enum Scribble {
    Service(u32, [u64; 2], u32, u32),
    Name(u32, u8, u8, u8),
    Slot(u32, u32, u32, u32),
    Member(u32, u64, u32),
    Frontend(u8, u64),
    Vip(u8),
    Swap(u32, u32),
}

fn number() -> impl Strategy<Value = u32> {
    prop_oneof![0..12_u32, any::<u32>()]
}

fn word() -> impl Strategy<Value = u64> {
    let plausible = (0..150_u32, 0..8_u32, 0..40_u32);
    prop_oneof![
        3 => plausible.prop_map(|(base, count, generation)| SetWord::new(base, count, generation).0),
        1 => any::<u64>(),
    ]
}

fn scribble() -> impl Strategy<Value = Scribble> {
    let index = 0..10_u32;
    let member_word =
        (0..4_u32, 0..32_u32).prop_map(|(generation, bits)| MemberWord::new(generation, bits).0);
    prop_oneof![
        (index.clone(), [word(), word()], any::<u32>(), 0..3_u32)
            .prop_map(|(at, words, policy, used)| Scribble::Service(at, words, policy, used)),
        (index.clone(), any::<u8>(), any::<u8>(), any::<u8>())
            .prop_map(|(at, len, protocol, byte)| Scribble::Name(at, len, protocol, byte)),
        (0..150_u32, number(), number(), number())
            .prop_map(|(at, member, g, mg)| Scribble::Slot(at, member, g, mg)),
        (0..50_u32, prop_oneof![member_word, any::<u64>()], number())
            .prop_map(|(at, word, service)| Scribble::Member(at, word, service)),
        (0..4_u8, any::<u64>()).prop_map(|(at, value)| Scribble::Frontend(at, value)),
        (0..4_u8).prop_map(Scribble::Vip),
        (index.clone(), index).prop_map(|(a, b)| Scribble::Swap(a, b)),
    ]
}

fn vip(last: u8) -> Addr {
    std::net::IpAddr::from([10, 96, 0, last]).into()
}

fn write(store: &mut Simulated, scribble: &Scribble) {
    match *scribble {
        Scribble::Service(at, [cluster, local], policy, used) => {
            let service = Service {
                cluster: SetWord(cluster),
                local: SetWord(local),
                policy: Policy(policy),
                used,
                ..Service::default()
            };
            store.write_service(at, &service);
        }
        Scribble::Name(at, len, protocol, byte) => {
            let mut name: Name = store.name(at);
            (name.len, name.protocol, name.text[1]) = (len, protocol, byte);
            store.write_name(at, &name);
        }
        Scribble::Slot(at, member, generation, member_generation) => {
            let slot = Slot {
                member,
                generation,
                member_generation,
                ..store.slot(at)
            };
            store.write_slots(at, &[slot]);
        }
        Scribble::Member(at, word, service) => {
            let member = Member {
                word: MemberWord(word),
                service,
                ..store.member(at)
            };
            store.write_member(at, &member);
        }
        Scribble::Frontend(at, value) => {
            let key = FrontendKey::new(vip(at), Be16::new(80), 6);
            let entry = (key, FrontendValue(value));
            // A full map takes no more, from nobody.
            let _ = store.upsert_frontends(&[entry]);
        }
        Scribble::Vip(at) => drop(store.upsert_vips(&[vip(at)])),
        Scribble::Swap(a, b) => {
            let (name_a, name_b) = (store.name(a), store.name(b));
            store.write_name(a, &name_b);
            store.write_name(b, &name_a);
        }
    }
}

/// A stray ClusterIP in the place of a frontend of another kind: what makes it a ClusterIP goes when it is replaced.
#[test]
fn a_replaced_stray_takes_its_vip_along() {
    let mut web = world::service("web", Protocol::Tcp, "10.96.0.1", &[1]);
    for frontend in &mut web.frontends {
        frontend.kind = FrontendKind::LoadBalancer;
    }
    let state = DesiredState {
        services: [(web.key.clone(), web)].into(),
        ..DesiredState::default()
    };
    let mut store = small();
    store.unchecked();
    let of_nobody = 77 << 32 | u64::from(kind::CLUSTER_IP) << 24;
    for scribble in [Scribble::Frontend(1, of_nobody), Scribble::Vip(1)] {
        write(&mut store, &scribble);
    }
    let backend = converge(EbpfBackend::new(store), &state);
    let expected = describe(fresh(&state).store()).unwrap();
    assert_eq!(describe(backend.store()).unwrap(), expected);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn whatever_the_maps_hold_is_put_right(
        old in world::state(),
        new in world::state(),
        scribbles in prop::collection::vec(scribble(), 1..12),
    ) {
        let mut store = fresh(&old).into_store();
        store.unchecked();
        store.grow_freely();
        for scribble in &scribbles {
            write(&mut store, scribble);
        }
        let mut backend = converge(EbpfBackend::new(store), &new);
        prop_assert_eq!(describe(backend.store()).unwrap(), describe(fresh(&new).store()).unwrap());
        prop_assert_eq!(backend.observe().unwrap(), backend.render(&new));
    }
}
