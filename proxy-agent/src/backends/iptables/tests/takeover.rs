//! What a kube-proxy left is observed state like any other.

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

fn to_gone() -> Packet {
    let vip = ([10, 96, 0, 9].into(), 80);
    packet([10, 244, 0, 5].into(), Some("cni0"), vip)
}
