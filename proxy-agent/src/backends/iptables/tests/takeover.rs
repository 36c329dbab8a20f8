//! What a kube-proxy left is observed state like any other.

use std::{sync::Arc, time::Duration};

use super::*;

/// In the words of kube-proxy's proxier.go as iptables-save prints them: a Service with two endpoints, of which one remembers
/// a client, and a Service that is gone.
const NAT: &str = r#"
:KUBE-PROXY-CANARY - [0:0]
:KUBE-MARK-MASQ - [0:0]
:KUBE-NODEPORTS - [0:0]
:KUBE-POSTROUTING - [0:0]
:KUBE-SERVICES - [0:0]
:KUBE-EXT-CDGGSHYLG3RE2FKL - [0:0]
:KUBE-SVC-CDGGSHYLG3RE2FKL - [0:0]
:KUBE-SVC-AAAAAAAAAAAAAAAA - [0:0]
:KUBE-SEP-AAAAAAAAAAAAAAAA - [0:0]
:KUBE-SEP-BBBBBBBBBBBBBBBB - [0:0]
-A PREROUTING -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A OUTPUT -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A POSTROUTING -m comment --comment "kubernetes postrouting rules" -j KUBE-POSTROUTING
-A KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000
-A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN
-A KUBE-POSTROUTING -j MARK --set-xmark 0x4000/0x0
-A KUBE-POSTROUTING -m comment --comment "kubernetes service traffic requiring SNAT" -j MASQUERADE --random-fully
-A KUBE-SERVICES -d 10.96.0.1/32 -p tcp -m comment --comment "default/web:http cluster IP" -m tcp --dport 80 -j KUBE-SVC-CDGGSHYLG3RE2FKL
-A KUBE-SERVICES -d 10.96.0.9/32 -p tcp -m comment --comment "default/gone cluster IP" -m tcp --dport 80 -j KUBE-SVC-AAAAAAAAAAAAAAAA
-A KUBE-SERVICES -m comment --comment "kubernetes service nodeports; NOTE: this must be the last rule in this chain" -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS
-A KUBE-NODEPORTS -p tcp -m comment --comment "default/web:http" -m tcp --dport 30080 -j KUBE-EXT-CDGGSHYLG3RE2FKL
-A KUBE-EXT-CDGGSHYLG3RE2FKL -m comment --comment "masquerade traffic for default/web:http external destinations" -j KUBE-MARK-MASQ
-A KUBE-EXT-CDGGSHYLG3RE2FKL -j KUBE-SVC-CDGGSHYLG3RE2FKL
-A KUBE-SVC-CDGGSHYLG3RE2FKL ! -s 10.244.0.0/16 -d 10.96.0.1/32 -p tcp -m comment --comment "default/web:http cluster IP" -m tcp --dport 80 -j KUBE-MARK-MASQ
-A KUBE-SVC-CDGGSHYLG3RE2FKL -m comment --comment "default/web:http -> 10.244.0.9:8080" -m recent --rcheck --seconds 10800 --reap --name KUBE-SEP-AAAAAAAAAAAAAAAA --mask 255.255.255.255 --rsource -j KUBE-SEP-AAAAAAAAAAAAAAAA
-A KUBE-SVC-CDGGSHYLG3RE2FKL -m comment --comment "default/web:http -> 10.244.0.9:8080" -m statistic --mode random --probability 0.50000000000 -j KUBE-SEP-AAAAAAAAAAAAAAAA
-A KUBE-SVC-CDGGSHYLG3RE2FKL -m comment --comment "default/web:http -> 10.244.1.9:8080" -j KUBE-SEP-BBBBBBBBBBBBBBBB
-A KUBE-SVC-AAAAAAAAAAAAAAAA -m comment --comment "default/gone -> 10.244.1.9:8080" -j KUBE-SEP-BBBBBBBBBBBBBBBB
-A KUBE-SEP-AAAAAAAAAAAAAAAA -s 10.244.0.9/32 -m comment --comment "default/web:http" -j KUBE-MARK-MASQ
-A KUBE-SEP-AAAAAAAAAAAAAAAA -p tcp -m comment --comment "default/web:http" -m recent --set --name KUBE-SEP-AAAAAAAAAAAAAAAA --mask 255.255.255.255 --rsource -m tcp -j DNAT --to-destination 10.244.0.9:8080
-A KUBE-SEP-BBBBBBBBBBBBBBBB -p tcp -m comment --comment "default/web:http" -m tcp -j DNAT --to-destination 10.244.1.9:8080
"#;

/// Tables with kube-proxy's nat rules.
fn left_behind() -> Simulated {
    let mut tables = Simulated::default();
    let lines = NAT.trim();
    let text = format!("*nat\n{lines}\nCOMMIT\n");
    tables.restore(Family::V4, Table::Nat, &text).unwrap();
    tables
}

fn web() -> ServiceState {
    with_endpoints(service(Family::V4, "web"))
}

#[test]
fn kube_proxys_rules_become_ours() {
    let state = of(&[&web()]);
    let mut backend = IptablesBackend::new(left_behind(), rules());
    let observed = backend.observe().unwrap();
    let plan = backend.plan(&observed, &state, Bounds::default());
    let written: BTreeSet<_> = plan
        .upserts
        .iter()
        .map(|(key, _)| key.to_string())
        .collect();
    for same in [
        "KUBE-MARK-MASQ",
        "KUBE-POSTROUTING",
        "PREROUTING",
        "nat OUTPUT",
    ] {
        let is_same = |key: &String| key.contains(same) && key.ends_with("IPv4");
        assert!(!written.iter().any(is_same), "{same} is the same already");
    }
    backend.apply(&plan, &state).unwrap();
    let canary = vec![];
    let mut expected = holding(rules(), &state).tables().tables.clone();
    let nat = expected.get_mut(&(Family::V4, Table::Nat)).unwrap();
    nat.insert("KUBE-PROXY-CANARY".to_owned(), canary);
    assert_eq!(backend.tables().tables, expected);
}

#[test]
fn its_services_are_served_until_every_source_has_spoken() {
    let nobody = BTreeSet::new();
    let touched = Part {
        services: &nobody,
        addresses: false,
    };
    let bounds = Bounds {
        scope: None,
        touched: Some(touched),
    };
    let mut backend = IptablesBackend::new(left_behind(), rules());
    let before = ends(&backend, &to_gone());
    let observed = backend.observe().unwrap();
    let plan = backend.plan(&observed, &DesiredState::default(), bounds);
    backend.apply(&plan, &DesiredState::default()).unwrap();
    assert_eq!(ends(&backend, &to_gone()), before);
    assert_eq!(before, texts(["10.244.1.9:8080"]));
}

fn to_gone() -> Packet<'static> {
    let vip = ([10, 96, 0, 9].into(), 80);
    packet([10, 244, 0, 5].into(), Some("cni0"), vip)
}

/// Removes what was found, as far as it is `meant`.
fn clean_up(backend: &mut IptablesBackend<Simulated>, meant: fn(&Key) -> bool) {
    let observed = backend.observe().unwrap();
    let plan = Plan {
        upserts: Vec::new(),
        deletions: observed.into_keys().filter(meant).collect(),
    };
    backend.apply(&plan, &DesiredState::default()).unwrap();
}

#[test]
fn a_clean_up_leaves_what_was_there_before_and_kubelets_guard() {
    let mut service = web();
    service.affinity_seconds = Some(60);
    let mut backend = holding(rules(), &of(&[&service]));
    clean_up(&mut backend, |_| true);
    let guarded = Rules {
        families: [Family::V4].into(),
        ..rules()
    };
    let mut expected = Simulated::default();
    let filter = expected
        .tables
        .get_mut(&(Family::V4, Table::Filter))
        .unwrap();
    for (_, anchor) in base::anchors(&guarded, Family::V4) {
        if format!("{anchor:?}").contains("KUBE-FIREWALL") {
            let rules = filter.entry(anchor.chain.to_owned()).or_default();
            rules.push(anchor.rule.to_owned());
        }
    }
    assert_eq!(backend.tables().tables, expected.tables);
    assert!(backend.tables().sets.is_empty());
}

#[test]
fn beside_a_kube_proxy_a_clean_up_takes_our_helpers_alone() {
    // Ours first, then a kube-proxy that writes its own into the chains with shared names.
    let mut services: Vec<_> = (0..40).flat_map(|id| world::service_of(id, 2)).collect();
    services.retain(|service| service.key.family == Family::V4);
    let mut backend = holding(rules(), &of(&services.iter().collect::<Vec<_>>()));
    let helpers = |backend: &IptablesBackend<Simulated>| {
        let chains = backend
            .tables()
            .tables
            .values()
            .flat_map(|chains| chains.keys());
        let is_helper =
            |name: &&String| name.starts_with("PROXY-AGENT-") || name.starts_with("KUBE-SVC-D-");
        chains.filter(is_helper).count()
    };
    assert!(helpers(&backend) > 2);
    for table in [Table::Nat, Table::Filter] {
        let chains = backend
            .tables_mut()
            .tables
            .get_mut(&(Family::V4, table))
            .unwrap();
        for (name, rules) in chains {
            if name.starts_with("KUBE-") && !name.starts_with("KUBE-SVC-D-") {
                rules.clear();
            }
        }
    }
    let mut others: Vec<_> = backend.tables().tables.clone().into_iter().collect();
    for (_, chains) in &mut others {
        chains.retain(|name, _| {
            let ours = [
                "PROXY-AGENT-",
                "KUBE-SVC-D-",
                "KUBE-SVC-N-",
                "KUBE-SVC-G-",
                "KUBE-SVC-A-",
            ];
            !ours.iter().any(|prefix| name.starts_with(prefix))
        });
    }
    let v6 = backend
        .tables_mut()
        .tables
        .get_mut(&(Family::V6, Table::Filter))
        .unwrap();
    v6.get_mut("KUBE-EXTERNAL-SERVICES").unwrap().clear();
    clean_up(&mut backend, Key::is_ours_alone);
    assert_eq!(helpers(&backend), 0);
    for (table, chains) in others
        .into_iter()
        .filter(|((family, _), _)| *family == Family::V4)
    {
        assert_eq!(backend.tables().tables[&table], chains);
    }
}

#[test]
fn what_cannot_be_replaced_of_a_former_proxys_rules_is_no_sign_of_another_one() {
    let state = of(&[&web()]);
    let mut tables = left_behind();
    let nat = tables.tables.get_mut(&(Family::V4, Table::Nat)).unwrap();
    nat.remove("KUBE-PROXY-CANARY");
    let rivals = Rivals::new(Duration::from_secs(45), Arc::default());
    let mut backend = IptablesBackend::new(tables, rules()).beside(rivals);
    let refused = "-A KUBE-SVC-CDGGSHYLG3RE2FKL -m statistic";
    let round = |backend: &mut IptablesBackend<Simulated>| {
        let observed = backend.observe().unwrap();
        let plan = backend.plan(&observed, &state, Bounds::default());
        backend.apply(&plan, &state).unwrap();
        backend.rivals_cleared();
    };
    backend.tables_mut().refuses = vec![refused.to_owned()];
    round(&mut backend);
    assert_eq!(backend.left_out().len(), 1);
    backend.observe().unwrap();
    assert!(!backend.yields());
    // Once it is replaced, such rules are somebody's again.
    backend.tables_mut().refuses.clear();
    round(&mut backend);
    assert_eq!(backend.left_out().len(), 0);
    let theirs = "*nat\n:KUBE-SVC-AAAAAAAAAAAAAAAA - [0:0]\n\
        -A KUBE-SVC-AAAAAAAAAAAAAAAA -m comment --comment \"default/gone -> 10.244.1.9:8080\" -j RETURN\nCOMMIT\n";
    let tables = backend.tables_mut();
    tables.restore(Family::V4, Table::Nat, theirs).unwrap();
    backend.observe().unwrap();
    assert!(backend.yields());
}
