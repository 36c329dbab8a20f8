//! Changes lead where a fresh start leads, through faults and restarts.

use proptest::prelude::*;

use super::{
    world::{name, service_of},
    *,
};

/// The desired state, and what a driver of the backend believes is in the kernel.
struct Driver {
    backend: IptablesBackend<Simulated>,
    observed: Option<BTreeMap<Key, u64>>,
    state: DesiredState,
}

impl Driver {
    fn new(tables: Simulated, rules: Rules) -> Self {
        Self {
            backend: IptablesBackend::new(tables, rules),
            observed: None,
            state: DesiredState::default(),
        }
    }

    /// One turn about some Services, or about everything if what is in the kernel is not known.
    fn turn(&mut self, services: &BTreeSet<ServiceName>) -> Result<usize, Error> {
        let (state, scope) = match &self.observed {
            None => {
                self.observed = Some(self.backend.observe()?);
                (self.state.clone(), None)
            }
            Some(_) => {
                let services_of =
                    |(port, _): &(&ServicePort, &ServiceState)| services.contains(&port.service);
                let part = self.state.services.iter().filter(services_of);
                let state = DesiredState {
                    services: part
                        .map(|(port, state)| (port.clone(), state.clone()))
                        .collect(),
                    ..DesiredState::default()
                };
                let addresses = false;
                let part = Part {
                    services,
                    addresses,
                };
                (state, Some(part))
            }
        };
        let observed = self.observed.as_mut().unwrap();
        let bounds = Bounds {
            scope,
            touched: None,
        };
        let plan = self.backend.plan(observed, &state, bounds);
        let changes = plan.len();
        if let Err(error) = self.backend.apply(&plan, &state) {
            self.observed = None;
            return Err(error);
        }
        for key in &plan.deletions {
            observed.remove(key);
        }
        observed.extend(plan.upserts);
        Ok(changes)
    }

    fn set(&mut self, id: u8, seed: Option<u64>) {
        self.state
            .services
            .retain(|port, _| port.service != name(id));
        let states = seed.map(|seed| service_of(id, seed)).unwrap_or_default();
        let states = states.into_iter().map(|state| (state.key.clone(), state));
        self.state.services.extend(states);
    }

    fn assert_like_fresh(&mut self, rules: &Rules) {
        let found = self.backend.observe().unwrap();
        assert_eq!(
            self.observed.as_ref(),
            Some(&found),
            "what is believed is there"
        );
        let fresh = holding(rules.clone(), &self.state);
        let (left, right) = (self.backend.tables(), fresh.tables());
        for (table, chains) in &right.tables {
            assert_eq!(&left.tables[table], chains, "{table:?}");
        }
        assert_eq!(left.sets, right.sets);
        let again = self.backend.plan(&found, &self.state, Bounds::default());
        assert!(again.is_empty(), "a restart changes nothing: {again:?}");
    }
}

fn steps() -> impl Strategy<Value = Vec<(u8, Option<u64>)>> {
    prop::collection::vec((0..60_u8, prop::option::weighted(0.8, any::<u64>())), 1..80)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn changes_lead_where_a_fresh_start_leads(
        steps in steps(),
        batch in 1..12_usize,
        piece in prop::option::of(1..9_usize),
    ) {
        let tables = Simulated { piece, ..Simulated::default() };
        let mut driver = Driver::new(tables, rules());
        driver.turn(&BTreeSet::new()).unwrap();
        for steps in steps.chunks(batch) {
            for (id, seed) in steps {
                driver.set(*id, *seed);
            }
            let touched = steps.iter().map(|(id, _)| name(*id)).collect();
            driver.turn(&touched).unwrap();
        }
        driver.assert_like_fresh(&rules());
    }

    #[test]
    fn faults_and_restarts_lead_nowhere_else(
        steps in steps(),
        seed in any::<u64>(),
        piece in prop::option::of(20..60_usize),
    ) {
        let tables = Simulated { fault_rate: 10, seed, piece, ..Simulated::default() };
        let mut driver = Driver::new(tables, rules());
        for (at, (id, seed)) in steps.iter().enumerate() {
            driver.set(*id, *seed);
            if at % 7 == 0 {
                let tables = std::mem::take(driver.backend.tables_mut());
                let state = std::mem::take(&mut driver.state);
                driver = Driver { state, ..Driver::new(tables, rules()) };
            }
            let touched = BTreeSet::from([name(*id)]);
            while driver.turn(&touched).is_err() {}
        }
        driver.backend.tables_mut().fault_rate = 0;
        driver.assert_like_fresh(&rules());
    }
}

#[test]
fn what_another_configuration_left_is_taken_over() {
    let old = Rules {
        features: Features::default(),
        masquerade_all: true,
        ..rules()
    };
    let mut driver = Driver::new(Simulated::default(), old);
    for id in 0..40 {
        driver.set(id, Some(u64::from(id)));
    }
    driver.turn(&BTreeSet::new()).unwrap();
    let Driver { backend, state, .. } = driver;
    let mut driver = Driver {
        state,
        ..Driver::new(backend.tables().clone(), rules())
    };
    driver.turn(&BTreeSet::new()).unwrap();
    driver.assert_like_fresh(&rules());
}

#[test]
fn other_peoples_rules_stay_and_so_do_chains_that_they_use() {
    let mut driver = Driver::new(Simulated::default(), rules());
    driver.set(1, Some(1));
    driver.turn(&BTreeSet::new()).unwrap();
    let nat = (Family::V4, Table::Nat);
    let before = driver.backend.tables().tables[&nat].clone();
    let used = before
        .keys()
        .find(|name| name.starts_with("KUBE-SVC-"))
        .unwrap()
        .clone();
    let tables = driver.backend.tables_mut();
    let foreign = vec![format!("-d 10.9.9.9/32 -j {used}")];
    let nat_chains = tables.tables.get_mut(&nat).unwrap();
    nat_chains.insert("MINE".to_owned(), foreign.clone());
    nat_chains
        .get_mut("PREROUTING")
        .unwrap()
        .push("-j MINE".to_owned());
    driver.observed = None;
    driver.set(1, None);
    driver.turn(&BTreeSet::new()).unwrap();
    let after = &driver.backend.tables().tables[&nat];
    assert_eq!(after["MINE"], foreign);
    assert_eq!(after["PREROUTING"].last().unwrap(), "-j MINE");
    assert_eq!(after[&used], [""; 0]);
    let mut of_services = after.keys().filter(|name| name.starts_with("KUBE-S"));
    assert!(of_services.all(|name| *name == used || name == "KUBE-SERVICES"));
}

#[test]
fn deleted_rules_come_back_and_nothing_else_is_written() {
    let mut driver = Driver::new(Simulated::default(), rules());
    for id in 0..40 {
        driver.set(id, Some(u64::from(id)));
    }
    driver.turn(&BTreeSet::new()).unwrap();
    let nat = driver
        .backend
        .tables_mut()
        .tables
        .get_mut(&(Family::V4, Table::Nat))
        .unwrap();
    nat.get_mut("PREROUTING").unwrap().clear();
    nat.get_mut("KUBE-MARK-MASQ").unwrap().clear();
    driver.observed = None;
    assert_eq!(driver.turn(&BTreeSet::new()).unwrap(), 2);
    driver.assert_like_fresh(&rules());
}

/// The text of what one turn wrote.
fn written(driver: &mut Driver, id: u8, seed: Option<u64>) -> String {
    driver.backend.tables_mut().log.clear();
    driver.set(id, seed);
    driver.turn(&BTreeSet::from([name(id)])).unwrap();
    let log = driver.backend.tables().log.iter();
    log.map(|(_, _, text)| text.as_str()).collect()
}

#[test]
fn a_change_writes_the_chains_that_it_changes() {
    let mut driver = Driver::new(Simulated::default(), rules());
    for id in 0..200 {
        driver.set(id, Some(2));
    }
    driver.turn(&BTreeSet::new()).unwrap();
    let all: usize = driver
        .backend
        .tables()
        .log
        .iter()
        .map(|(_, _, text)| text.len())
        .sum();
    assert_eq!(written(&mut driver, 7, Some(2)), "");
    let gone = written(&mut driver, 7, None);
    assert!(
        gone.len() * 5 < all,
        "{} of {all} bytes\n{gone}",
        gone.len()
    );
}

#[test]
fn the_networks_of_the_nodes_pods_are_those_of_the_last_whole_state() {
    let rules = Rules {
        local_pods: LocalPods::OfNode(Vec::new()),
        families: [Family::V4].into(),
        ..rules()
    };
    let mut state = of(&[&with_endpoints(service(Family::V4, "web"))]);
    let mut backend = holding(rules.clone(), &state);
    let masqueraded = |backend: &mut IptablesBackend<Simulated>| {
        let text = backend.tables_mut().save(Family::V4, Table::Nat).unwrap();
        let rule = text.lines().find(|line| line.contains("! -s "));
        rule.map(|rule| rule.split(' ').nth(4).unwrap().to_owned())
    };
    // The cluster has not given it any yet.
    assert_eq!(masqueraded(&mut backend), None);
    for network in ["10.244.1.0/24", "10.244.2.0/24"] {
        state.pod_networks = vec![network.parse().unwrap()];
        let observed = backend.observe().unwrap();
        let plan = backend.plan(&observed, &state, Bounds::default());
        backend.apply(&plan, &state).unwrap();
        assert_eq!(masqueraded(&mut backend).as_deref(), Some(network));
        // A Service that changes later keeps to them.
        let part = DesiredState {
            pod_networks: Vec::new(),
            ..state.clone()
        };
        let services = part.services.keys().map(|port| port.service.clone());
        let bounds = Bounds {
            scope: Some(Part {
                services: &services.collect(),
                addresses: false,
            }),
            touched: None,
        };
        let observed = backend.observe().unwrap();
        assert!(backend.plan(&observed, &part, bounds).is_empty());
    }
}

#[test]
fn a_new_address_of_the_node_rewrites_one_chain() {
    let rules = Rules {
        node_ports: NodePorts::Listed([Family::V4].into()),
        families: [Family::V4].into(),
        ..rules()
    };
    let mut state = of(&[&with_endpoints(service(Family::V4, "web"))]);
    let mut backend = holding(rules.clone(), &state);
    let observed = backend.observe().unwrap();
    let node_ports = NodeAddress { node_ports: true };
    state.addresses.insert([192, 168, 0, 1].into(), node_ports);
    let part = DesiredState {
        addresses: state.addresses.clone(),
        ..DesiredState::default()
    };
    let scope = Some(Part {
        services: &BTreeSet::new(),
        addresses: true,
    });
    let bounds = Bounds {
        scope,
        touched: None,
    };
    let plan = backend.plan(&observed, &part, bounds);
    let chain = ChainName::new("KUBE-SERVICES").unwrap();
    let [(Key::Chain(Family::V4, Table::Nat, changed), _)] = plan.upserts.as_slice() else {
        panic!("{plan:?}");
    };
    assert_eq!((*changed, plan.len()), (chain, 1));
    backend.apply(&plan, &part).unwrap();
    assert_eq!(
        backend.tables().tables,
        holding(rules, &state).tables().tables
    );
}

/// The tables that one turn writes, in their order.
fn tables_written(old: &DesiredState, new: &DesiredState) -> Vec<Table> {
    let mut backend = holding(rules(), old);
    backend.tables_mut().log.clear();
    let observed = backend.observe().unwrap();
    let plan = backend.plan(&observed, new, Bounds::default());
    backend.apply(&plan, new).unwrap();
    let log = backend.tables().log.iter();
    log.map(|(_, table, _)| *table).collect()
}

#[test]
fn who_becomes_served_is_translated_first_and_who_is_no_longer_is_refused_first() {
    let state = |a: bool, b: bool| {
        let services = [(a, "10.96.0.1"), (b, "10.96.0.2")].map(|(is_served, vip)| {
            let mut service = service(Family::V4, vip);
            service.frontends.truncate(1);
            service.frontends[0].address = ip(Family::V4, vip);
            match is_served {
                true => with_endpoints(service),
                false => service,
            }
        });
        of(&services.iter().collect::<Vec<_>>())
    };
    let (filter, nat) = (Table::Filter, Table::Nat);
    for (old, new, order) in [
        (state(true, true), state(true, false), [filter, nat]),
        (state(true, false), state(true, true), [nat, filter]),
        (state(true, false), state(false, true), [nat, filter]),
    ] {
        assert_eq!(tables_written(&old, &new), order);
    }
}

#[test]
fn jumps_are_in_kube_proxys_order_behind_known_connections() {
    let backend = holding(rules(), &DesiredState::default());
    let forward = &backend.tables().chains(Family::V4, Table::Filter)["FORWARD"];
    let targets: Vec<_> = forward
        .iter()
        .filter_map(|rule| rule.rsplit(' ').next())
        .collect();
    assert_eq!(
        targets,
        [
            "KUBE-FORWARD",
            "KUBE-PROXY-FIREWALL",
            "KUBE-SERVICES",
            "KUBE-EXTERNAL-SERVICES"
        ]
    );
}

/// Rules that lead to a Service or refuse it.
fn leaf_rules(tables: &Simulated) -> BTreeSet<(Family, Table, String)> {
    let mut found = BTreeSet::new();
    for ((family, table), chains) in &tables.tables {
        let rules = chains.values().flatten();
        let leaves = rules.filter(|rule| rule.contains("--comment \"default/"));
        found.extend(leaves.map(|rule| (*family, *table, rule.clone())));
    }
    found
}

#[test]
fn while_a_source_is_incomplete_nothing_is_taken_away() {
    let mut driver = Driver::new(Simulated::default(), rules());
    for id in 0..50 {
        driver.set(id, Some(u64::from(id)));
    }
    driver.turn(&BTreeSet::new()).unwrap();
    let (full, state) = (driver.backend.tables().clone(), driver.state);
    let key = service(Family::V4, "service-4").key;
    assert!(state.services.contains_key(&key));
    for is_seen in [false, true] {
        // A restart: two Services are described again, one of them otherwise than before; a third is new.
        let mut changed = with_endpoints(service(Family::V4, "service-4"));
        changed.frontends.truncate(1);
        changed.frontends[0].address = [10, 97, 9, 4].into();
        let same = service_of(7, 7);
        let mut new = with_endpoints(service(Family::V4, "new"));
        new.frontends[0].address = [10, 97, 9, 9].into();
        new.frontends.truncate(1);
        let described = [&changed, &new].into_iter().chain(&same);
        let part = of(&described.collect::<Vec<_>>());
        let mut backend = IptablesBackend::new(full.clone(), rules());
        let observed = backend.observe().unwrap();
        let seen: BTreeSet<_> = is_seen.then(|| name(4)).into_iter().collect();
        let bounds = Bounds {
            scope: None,
            touched: Some(Part {
                services: &seen,
                addresses: false,
            }),
        };
        let plan = backend.plan(&observed, &part, bounds);
        assert_eq!(plan.deletions, []);
        backend.apply(&plan, &part).unwrap();

        let (before, after) = (leaf_rules(&full), leaf_rules(backend.tables()));
        let of_changed = |rule: &str| rule.contains("default/service-4:http");
        let lost = before.difference(&after).map(|(_, _, rule)| rule);
        assert!(
            lost.clone().all(|rule| is_seen && of_changed(rule)),
            "{lost:?}"
        );
        let to = |last| {
            let vip = ([10, 97, 9, last].into(), 80);
            packet([10, 244, 0, 5].into(), Some("cni0"), vip)
        };
        let served = texts(["10.244.0.9:8080", "10.244.1.9:8080"]);
        let untouched = texts(["10.97.9.4:80"]);
        assert_eq!(
            ends(&backend, &to(4)),
            if is_seen { served } else { untouched }
        );

        // The rest is described too.
        let observed = backend.observe().unwrap();
        let plan = backend.plan(&observed, &state, Bounds::default());
        backend.apply(&plan, &state).unwrap();
        assert_eq!(backend.tables().tables, full.tables);
    }
}
