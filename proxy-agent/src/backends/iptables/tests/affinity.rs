//! Clients that stick to their endpoint.

use super::*;

fn sticky(count: u8) -> ServiceState {
    let mut service = service(Family::V4, "web");
    service.affinity_seconds = Some(10_800);
    let backends = (0..count).map(|n| endpoint([10, 244, 1, n].into(), n == 0));
    service.backends = backends.collect();
    service
}

fn client() -> Packet<'static> {
    let vip = ([10, 96, 0, 1].into(), 80);
    packet([10, 244, 0, 5].into(), Some("cni0"), vip)
}

fn with_ipset(ipset: bool) -> Rules {
    let features = Features {
        ipset,
        ..rules().features
    };
    Rules {
        features,
        ..rules()
    }
}

/// After any first choice, every next connection goes to the same endpoint, on every frontend.
fn check(count: u8, ipset: bool) {
    let backend = holding(with_ipset(ipset), &of(&[&sticky(count)]));
    let first = walk(backend.tables(), &host(), &client());
    assert_eq!(first.len(), usize::from(count));
    for end in first {
        assert!(
            (end.chance - 1.0 / f64::from(count)).abs() < 1e-6,
            "{end:?}"
        );
        let source = client().source;
        let mut host = host();
        let remembered = end.remembered.iter();
        host.clients = remembered.map(|set| (set.clone(), source)).collect();
        let [again] = walk(backend.tables(), &host, &client()).try_into().unwrap();
        assert_eq!(again.to, end.to);
        assert_eq!(again.remembered, end.remembered, "used again, kept longer");
        let mut external = client();
        external.destination = ([198, 51, 100, 1], 80).into();
        let [again] = walk(backend.tables(), &host, &external).try_into().unwrap();
        assert_eq!(again.to, end.to);
    }
}

#[test]
fn a_client_sticks_to_its_endpoint_by_sets() {
    for count in [1, 2, 32, 33, 200] {
        check(count, true);
    }
}

#[test]
fn a_client_sticks_to_its_endpoint_by_xt_recent() {
    for count in [1, 2, 40] {
        check(count, false);
    }
}

#[test]
fn a_host_without_either_serves_without_affinity() {
    let neither = Features {
        recent: false,
        ..with_ipset(false).features
    };
    let rules = Rules {
        features: neither,
        ..rules()
    };
    let backend = holding(rules, &of(&[&sticky(3)]));
    assert_eq!(ends(&backend, &client()).len(), 3);
    assert!(backend.tables().sets.is_empty());
}

#[test]
fn sets_exist_while_something_uses_them_and_change_with_the_timeout() {
    let mut service = sticky(40);
    let mut backend = holding(rules(), &of(&[&service]));
    let sets = &backend.tables().sets;
    assert!(sets.len() > 40, "one for each endpoint, and for each group");
    assert!(sets.iter().all(|set| set.timeout_seconds == 10_800));
    for seconds in [Some(60), None] {
        service.affinity_seconds = seconds;
        let state = of(&[&service]);
        let observed = backend.observe().unwrap();
        let plan = backend.plan(&observed, &state, Bounds::default());
        backend.apply(&plan, &state).unwrap();
        let sets = &backend.tables().sets;
        assert_eq!(sets.is_empty(), seconds.is_none());
        assert!(sets.iter().all(|set| Some(set.timeout_seconds) == seconds));
    }
}

#[test]
fn a_client_of_an_endpoint_that_is_gone_is_drawn_anew() {
    let old = sticky(40);
    let backend = holding(rules(), &of(&[&old]));
    let first = walk(backend.tables(), &host(), &client()).remove(7);
    let mut new = old;
    new.backends.retain(|b| b.address != first.to.ip());
    let backend = holding(rules(), &of(&[&new]));
    let mut host = host();
    host.clients = first
        .remembered
        .iter()
        .map(|set| (set.clone(), client().source))
        .collect();
    let next = walk(backend.tables(), &host, &client());
    assert_eq!(next.len(), 39);
    for end in next {
        assert!((end.chance - 1.0 / 39.0).abs() < 1e-6);
    }
}
