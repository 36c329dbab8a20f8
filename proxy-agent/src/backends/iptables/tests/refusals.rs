//! A line that the tool refuses costs the Service that it is for, and no other.

use super::*;

fn web(number: u8) -> ServiceState {
    let mut service = service(Family::V4, &format!("web-{number}"));
    service.frontends.truncate(1);
    service.frontends[0].address = [10, 96, 0, number].into();
    service.backends = vec![endpoint([10, 244, 1, number].into(), false)];
    service
}

fn client(number: u8) -> Packet<'static> {
    let vip = ([10, 96, 0, number].into(), 80);
    packet([10, 244, 0, 5].into(), Some("cni0"), vip)
}

fn served(backend: &IptablesBackend<Simulated>, number: u8) -> bool {
    let to = format!("10.244.1.{number}:8080");
    ends(backend, &client(number)) == texts([&to])
}

/// Applies `services` over tables that refuse some words.
fn apply(
    backend: &mut IptablesBackend<Simulated>,
    services: &[ServiceState],
    refuses: &[&str],
    names_lines: bool,
) -> Result<(), Error> {
    let tables = backend.tables_mut();
    tables.refuses = refuses.iter().map(|word| (*word).to_owned()).collect();
    tables.names_lines = names_lines;
    let state = of(&services.iter().collect::<Vec<_>>());
    let observed = backend.observe().unwrap();
    let plan = backend.plan(&observed, &state, Bounds::default());
    backend.apply(&plan, &state)
}

fn names(backend: &IptablesBackend<Simulated>) -> Vec<String> {
    backend.left_out().keys().map(ToString::to_string).collect()
}

#[test]
fn the_others_go_in_whether_or_not_the_line_is_named() {
    let services: Vec<_> = (0..60).map(web).collect();
    for (names_lines, piece) in [
        (true, None),
        (false, None),
        (true, Some(8)),
        (false, Some(8)),
    ] {
        // An endpoint's rule of one, a frontend's of another.
        let refuses = ["10.244.1.7:8080", "-d 10.96.0.41/32 -p tcp"];
        let tables = Simulated {
            piece,
            ..Simulated::default()
        };
        let mut backend = IptablesBackend::new(tables, rules());
        apply(&mut backend, &services, &refuses, names_lines).unwrap();
        assert_eq!(
            names(&backend),
            ["default/web-41:http", "default/web-7:http"]
        );
        for number in 0..60 {
            assert_eq!(
                served(&backend, number),
                ![7, 41].contains(&number),
                "{number}"
            );
        }
        // The tool was changed: everything is planned again, and they go in.
        apply(&mut backend, &services, &[], names_lines).unwrap();
        assert_eq!(names(&backend), [""; 0]);
        assert!(served(&backend, 7) && served(&backend, 41));
    }
}

#[test]
fn a_service_whose_change_is_refused_is_served_as_before() {
    let mut services: Vec<_> = (0..20).map(web).collect();
    let mut backend = holding(rules(), &of(&services.iter().collect::<Vec<_>>()));
    services[3]
        .backends
        .push(endpoint([10, 244, 9, 9].into(), false));
    services[4].backends[0].address = [10, 244, 1, 44].into();
    apply(&mut backend, &services, &["10.244.9.9:8080"], true).unwrap();
    assert_eq!(names(&backend), ["default/web-3:http"]);
    assert!(served(&backend, 3));
    assert_eq!(ends(&backend, &client(4)), texts(["10.244.1.44:8080"]));
}

#[test]
fn while_the_culprit_is_looked_for_everybody_else_is_served() {
    let mut services: Vec<_> = (0..20).map(web).collect();
    let mut backend = holding(rules(), &of(&services.iter().collect::<Vec<_>>()));
    // Others change as well, their chains or what leads to them.
    services[3].backends[0].address = [10, 244, 9, 9].into();
    services[4].backends[0].address = [10, 244, 1, 44].into();
    services[5].internal_policy = TrafficPolicy::Local;
    services[5].backends[0] = endpoint([10, 244, 1, 5].into(), true);
    services.extend((20..24).map(web));
    let mut tables = backend.tables().clone();
    tables.log.clear();
    *backend.tables_mut() = tables.clone();
    apply(&mut backend, &services, &["10.244.9.9:8080"], false).unwrap();
    assert_eq!(names(&backend), ["default/web-3:http"]);

    let log = std::mem::take(&mut backend.tables_mut().log);
    assert!(log.len() > 3, "{log:?}");
    for (family, table, text) in log {
        tables.restore(family, table, &text).unwrap();
        *backend.tables_mut() = tables.clone();
        for number in 0..20 {
            let is_changed = number == 4 && !served(&backend, number);
            let to = match is_changed {
                true => "10.244.1.44:8080".to_owned(),
                false => format!("10.244.1.{number}:8080"),
            };
            assert_eq!(ends(&backend, &client(number)), texts([&to]), "{text}");
        }
    }
    assert!((20..24).all(|number| served(&backend, number)));
    assert!(!served(&backend, 4));
}

#[test]
fn a_chain_that_cannot_be_removed_costs_nobody_anything() {
    for names_lines in [true, false] {
        let mut services: Vec<_> = (0..20).map(web).collect();
        let mut backend = holding(rules(), &of(&services.iter().collect::<Vec<_>>()));
        services.pop();
        services[4].backends[0].address = [10, 244, 1, 44].into();
        apply(&mut backend, &services, &["-X KUBE-SVC-"], names_lines).unwrap();
        assert_eq!(names(&backend), [""; 0]);
        assert_eq!(ends(&backend, &client(4)), texts(["10.244.1.44:8080"]));
        let chains = |backend: &IptablesBackend<Simulated>| {
            backend.tables().chains(Family::V4, Table::Nat).len()
        };
        let before = chains(&backend);
        apply(&mut backend, &services, &[], names_lines).unwrap();
        assert_eq!(chains(&backend), before - 1);
    }
}

#[test]
fn a_refusal_that_no_service_is_to_blame_for_is_an_error() {
    for names_lines in [true, false] {
        let mut backend = IptablesBackend::new(Simulated::default(), rules());
        let services = [web(1), web(2)];
        let result = apply(&mut backend, &services, &["MASQUERADE"], names_lines);
        let message = result.unwrap_err().to_string();
        assert!(message.contains("no Service is to blame"), "{message}");
        assert!(message.contains("does not like MASQUERADE"), "{message}");
    }
}

#[test]
fn what_is_left_out_is_remembered_while_nothing_can_be_written() {
    let services: Vec<_> = (0..8).map(web).collect();
    let mut backend = IptablesBackend::new(Simulated::default(), rules());
    apply(&mut backend, &services, &["10.244.1.7:8080"], true).unwrap();
    backend.tables_mut().fault_rate = 1;
    apply(&mut backend, &services, &[], true).unwrap_err();
    assert_eq!(names(&backend), ["default/web-7:http"]);
    backend.tables_mut().fault_rate = 0;
    apply(&mut backend, &services, &[], true).unwrap();
    assert_eq!(names(&backend), [""; 0]);
    assert!(served(&backend, 7));
}

#[test]
fn a_service_that_is_gone_is_no_longer_left_out() {
    let mut services: Vec<_> = (0..8).map(web).collect();
    let mut backend = IptablesBackend::new(Simulated::default(), rules());
    let refuses = ["10.244.1.7:8080"];
    apply(&mut backend, &services, &refuses, true).unwrap();
    services.pop();
    apply(&mut backend, &services, &refuses, true).unwrap();
    assert_eq!(names(&backend), [""; 0]);
}
