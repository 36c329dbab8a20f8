//! Many chains go in and out in pieces, and packets see one step.

use super::*;

const PIECE: usize = 8;

fn web(number: u8) -> ServiceState {
    let mut service = with_endpoints(service(Family::V4, &format!("web-{number}")));
    for frontend in &mut service.frontends {
        match frontend.kind {
            FrontendKind::NodePort => frontend.port = 30_000 + u16::from(number),
            _ => frontend.port = 1_000 + u16::from(number),
        }
    }
    service
}

fn turn(backend: &mut IptablesBackend<Simulated>, services: impl Iterator<Item = u8>) {
    let services: Vec<_> = services.map(web).collect();
    let state = of(&services.iter().collect::<Vec<_>>());
    let observed = backend.observe().unwrap();
    let plan = backend.plan(&observed, &state, Bounds::default());
    backend.apply(&plan, &state).unwrap();
    assert_eq!(*backend.left_out(), BTreeMap::new());
}

/// Which of some Services packets from outside reach at each moment of a turn.
fn served(before: Simulated, log: &[(Family, Table, String)], of: &[u8]) -> Vec<Vec<u8>> {
    let mut backend = IptablesBackend::new(before, rules());
    let moments = log.iter().map(|(family, table, text)| {
        backend.tables_mut().restore(*family, *table, text).unwrap();
        let reached = of.iter().filter(|number| {
            let to = (ip(Family::V4, "198.51.100.1"), 1_000 + u16::from(**number));
            let ends = ends(
                &backend,
                &packet(ip(Family::V4, "172.16.0.1"), Some("eth0"), to),
            );
            ends == texts(["10.244.0.9:8080 m", "10.244.1.9:8080 m"])
        });
        reached.copied().collect()
    });
    moments.collect()
}

fn longest(log: &[(Family, Table, String)], verb: &str) -> usize {
    let chains = log.iter().map(|(_, _, text)| {
        let lines = text.lines().filter_map(|line| line.strip_prefix(verb));
        let names = lines.filter_map(|line| line.split(' ').next());
        names.collect::<BTreeSet<_>>().len()
    });
    chains.max().unwrap()
}

#[test]
fn new_chains_lead_nowhere_until_all_are_there_and_old_ones_go_when_nothing_leads_to_them() {
    let tables = Simulated {
        piece: Some(PIECE),
        ..Simulated::default()
    };
    let mut backend = IptablesBackend::new(tables, rules());
    let all: Vec<u8> = (0..40).collect();
    turn(&mut backend, 0..40);
    let log = std::mem::take(&mut backend.tables_mut().log);
    assert_eq!(longest(&log, "-A "), PIECE);
    let moments = served(Simulated::default(), &log, &all);
    let (last, before) = moments.split_last().unwrap();
    assert_eq!(*last, all);
    assert!(
        before
            .iter()
            .all(|served| served.is_empty() || *served == all)
    );

    let full = backend.tables().clone();
    turn(&mut backend, 0..4);
    let log = std::mem::take(&mut backend.tables_mut().log);
    assert_eq!(longest(&log, "-X "), PIECE);
    for served in served(full.clone(), &log, &all) {
        assert!(served == all || served == [0, 1, 2, 3], "{served:?}");
    }
    let fresh = holding(
        rules(),
        &of(&[0, 1, 2, 3].map(web).iter().collect::<Vec<_>>()),
    );
    assert_eq!(backend.tables().tables, fresh.tables().tables);

    // One Service more is few chains: one transaction for each table.
    turn(&mut backend, 0..5);
    assert_eq!(backend.tables().log.len(), 1);
}

#[test]
fn a_refused_piece_costs_nobody_else_anything() {
    let tables = Simulated {
        piece: Some(PIECE),
        refuses: vec!["-X KUBE-SEP-".to_owned()],
        ..Simulated::default()
    };
    let mut backend = IptablesBackend::new(tables, rules());
    turn(&mut backend, 0..40);
    turn(&mut backend, 0..4);
    let kept = |backend: &IptablesBackend<Simulated>| {
        let chains = backend.tables().chains(Family::V4, Table::Nat).keys();
        chains.filter(|name| name.starts_with("KUBE-SEP-")).count()
    };
    assert_eq!(kept(&backend), 40);
    backend.tables_mut().refuses.clear();
    turn(&mut backend, 0..4);
    assert_eq!(kept(&backend), 4);
}
