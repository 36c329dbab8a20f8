//! The real tools in network namespaces: each test for both variants.

use std::{fs::File, path::Path, process::Command};

use nix::{
    fcntl::{Flock, FlockArg},
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
};

use super::*;
use crate::{
    backends::{
        Backend as _, Bounds,
        in_namespace::in_namespace,
        iptables::{
            Extent, IptablesBackend, remove,
            rules::Rules,
            tests::{rules, world::service_of},
            watch::Watched,
        },
    },
    state::DesiredState,
};

fn owner() -> Arc<Owner> {
    Arc::new(Owner::take().expect("a namespace of its own"))
}

/// The tools of a variant, untried.
fn host(variant: Variant) -> Host {
    let mut host = Host::find(Some(owner())).expect("iptables");
    host.choice.variant = variant;
    host
}

/// Runs `test` with the tools of each variant in a network namespace of its own.
fn each_variant(test: impl Fn(&mut Host) + Sync) {
    for variant in [Variant::Nft, Variant::Legacy] {
        println!("with iptables-{variant}");
        in_namespace(|| {
            let mut host = host(variant);
            host.features = probe::features(&mut host);
            test(&mut host);
        });
    }
}

/// A backend on these tools.
fn backend(host: &Host) -> IptablesBackend<Host> {
    let rules = Rules {
        features: host.features(),
        service_networks: Some(Vec::new()),
        ..rules()
    };
    IptablesBackend::new(host.clone(), rules)
}

/// Brings the tables to `state`; says whether that took a change.
fn bring<T: Tables>(backend: &mut IptablesBackend<T>, state: &DesiredState) -> bool {
    let found = backend.observe().unwrap();
    let plan = backend.plan(&found, state, Bounds::default());
    backend.apply(&plan, state).unwrap();
    !plan.is_empty()
}

#[test]
#[ignore = "needs root"]
fn the_tools_do_what_a_transaction_says_or_nothing_of_it() {
    each_variant(|host| {
        for family in [Family::V4, Family::V6] {
            let text = "*nat\n:KUBE-SVC-A - [0:0]\n-A KUBE-SVC-A -j RETURN\nCOMMIT\n";
            host.restore(family, Table::Nat, text).unwrap();
            let saved = host.save(family, Table::Nat).unwrap();
            assert!(saved.contains("-A KUBE-SVC-A -j RETURN"), "{saved}");
            let text = "*nat\n:KUBE-SVC-B - [0:0]\n-A KUBE-SVC-B -j KUBE-SVC-NONE\nCOMMIT\n";
            let error = host.restore(family, Table::Nat, text).unwrap_err();
            let RestoreError::Refused { line, message } = &error else {
                panic!("{error}");
            };
            assert!(matches!(line, Some(3 | 4) | None), "{line:?}: {message}");
            assert!(!message.is_empty());
            let saved = host.save(family, Table::Nat).unwrap();
            assert!(!saved.contains("KUBE-SVC-B"), "{saved}");
        }
    });
}

#[test]
#[ignore = "needs root"]
fn address_sets_come_and_go() {
    each_variant(|host| {
        assert!(host.features().ipset, "this kernel has xt_set");
        let set = |name: &str, family| AddressSet {
            name: name.to_owned(),
            family,
            timeout_seconds: 600,
        };
        let sets = BTreeSet::from([set("KUBE-SEP-A", Family::V4), set("KUBE-SEP-B", Family::V6)]);
        host.create_sets(&sets).unwrap();
        assert_eq!(host.sets().unwrap(), sets);
        host.destroy_sets(&sets).unwrap();
        assert_eq!(host.sets().unwrap(), BTreeSet::new());
    });
}

/// Services of every shape and networks of Services, in both families.
fn everything() -> DesiredState {
    let services = (1..=60_u8).flat_map(|id| service_of(id, u64::from(id)));
    DesiredState {
        services: services
            .map(|service| (service.key.clone(), service))
            .collect(),
        service_networks: ["10.96.0.0/12", "fd00:10:96::/112"]
            .map(|network| network.parse().unwrap())
            .into(),
        ..DesiredState::default()
    }
}

#[test]
#[ignore = "needs root"]
fn what_is_written_is_read_back_the_same() {
    each_variant(|host| {
        let mut backend = backend(host);
        for state in [everything(), DesiredState::default()] {
            assert!(bring(&mut backend, &state));
            assert!(backend.left_out().is_empty(), "{:?}", backend.left_out());
            let found = backend.observe().unwrap();
            let plan = backend.plan(&found, &state, Bounds::default());
            assert!(plan.is_empty(), "{plan:?}");
        }
    });
}

#[test]
#[ignore = "needs root"]
fn everything_of_ours_can_be_removed_and_nothing_else() {
    each_variant(|host| {
        let foreign = "*nat\n:FOREIGN - [0:0]\n-A PREROUTING -j FOREIGN\n-A FOREIGN -d 192.0.2.1/32 -j RETURN\nCOMMIT\n";
        host.restore(Family::V4, Table::Nat, foreign).unwrap();
        let before = host.save(Family::V4, Table::Nat).unwrap();
        let mut backend = backend(host);
        let state = everything();
        bring(&mut backend, &state);
        assert!(remove(host.clone(), Extent::Ours).unwrap().entries > 100);
        // kubelet has the guard of 127.0.0.0/8 as well: it stays, as kube-proxy leaves it.
        let left: Vec<String> = backend
            .observe()
            .unwrap()
            .keys()
            .map(ToString::to_string)
            .collect();
        assert!(
            left.iter().all(|key| key.contains("KUBE-FIREWALL")),
            "{left:?}"
        );
        let rules = |text: &str| -> Vec<String> {
            let rules = text.lines().filter(|line| line.starts_with("-A"));
            rules.map(ToOwned::to_owned).collect()
        };
        let after = host.save(Family::V4, Table::Nat).unwrap();
        assert_eq!(rules(&after), rules(&before));
    });
}

#[test]
#[ignore = "needs root"]
fn what_a_kube_proxy_may_use_stays_beside_one() {
    each_variant(|host| {
        let mut backend = backend(host);
        let services = service_of(1, 3).into_iter();
        let state = DesiredState {
            services: services
                .map(|service| (service.key.clone(), service))
                .collect(),
            ..DesiredState::default()
        };
        bring(&mut backend, &state);
        let canary = "*nat\n:KUBE-PROXY-CANARY - [0:0]\nCOMMIT\n";
        host.restore(Family::V4, Table::Nat, canary).unwrap();
        // As it writes the chains that it has too.
        for family in [Family::V4, Family::V6] {
            let own = "*filter\n:KUBE-EXTERNAL-SERVICES - [0:0]\n:KUBE-SERVICES - [0:0]\nCOMMIT\n";
            host.restore(family, Table::Filter, own).unwrap();
        }
        let before = host.save(Family::V4, Table::Nat).unwrap();
        assert!(remove(host.clone(), Extent::Ours).unwrap().entries > 0);
        let rules = |text: &str| text.lines().filter(|line| line.starts_with("-A")).count();
        let after = host.save(Family::V4, Table::Nat).unwrap();
        assert_eq!(rules(&after), rules(&before), "{after}");
        let filter = host.save(Family::V4, Table::Filter).unwrap();
        assert!(!filter.contains("PROXY-AGENT-"), "{filter}");
        assert!(filter.contains("KUBE-FORWARD"), "{filter}");
    });
}

#[test]
#[ignore = "needs root"]
fn a_flush_by_somebody_else_is_news_and_what_we_write_is_not() {
    each_variant(|host| {
        let rules = Rules {
            features: host.features(),
            ..rules()
        };
        let tables = Watched::new(host.clone(), host.variant().is_nft());
        let mut backend = IptablesBackend::new(tables, rules);
        let state = everything();
        bring(&mut backend, &state);
        assert!(!backend.tables_mut().has_changed());
        let text = "*nat\n-A KUBE-SERVICES -j KUBE-SVC-NONE\nCOMMIT\n";
        let refused = backend.tables_mut().restore(Family::V4, Table::Nat, text);
        assert!(refused.is_err() && !backend.tables_mut().has_changed());
        for (table, flush) in [
            (Table::Nat, "*nat\n-F\nCOMMIT\n"),
            (Table::Filter, "*filter\n-F\nCOMMIT\n"),
        ] {
            host.restore(Family::V6, table, flush).unwrap();
            assert!(backend.tables_mut().has_changed(), "{flush}");
            assert!(bring(&mut backend, &state));
            assert!(!backend.tables_mut().has_changed());
        }
    });
}

/// Rules without their counters, and chains.
fn lines(saved: &str, of: &str) -> Vec<String> {
    let lines = saved.lines().filter(|line| line.contains(of));
    lines.map(ToOwned::to_owned).collect()
}

#[test]
#[ignore = "needs root"]
fn ten_thousand_rules_of_others_stay_as_they_are() {
    each_variant(|host| {
        let mut foreign = "*nat\n:FOREIGN - [0:0]\n-A OUTPUT -j FOREIGN\n".to_owned();
        for number in 0..10_000 {
            let (high, low) = (number / 256, number % 256);
            foreign += &format!("-A FOREIGN -d 192.0.{high}.{low}/32 -j RETURN\n");
        }
        foreign += "COMMIT\n";
        host.restore(Family::V4, Table::Nat, &foreign).unwrap();
        let before = lines(&host.save(Family::V4, Table::Nat).unwrap(), "FOREIGN");
        assert_eq!(before.len(), 10_002);
        let mut backend = backend(host);
        for state in [everything(), DesiredState::default()] {
            bring(&mut backend, &state);
            let after = lines(&host.save(Family::V4, Table::Nat).unwrap(), "FOREIGN");
            assert!(after == before, "{} lines are left", after.len());
        }
    });
}

/// Holds the lock of all legacy tools, as those see it that this thread starts: nobody else waits for it.
fn hold_lock() -> Flock<File> {
    const LOCK: &str = "/run/xtables.lock";
    let own = tempfile::NamedTempFile::new().unwrap();
    let open = |path: &str| {
        File::options()
            .write(true)
            .create(true)
            .truncate(false)
            .open(path)
    };
    open(LOCK).unwrap();
    unshare(CloneFlags::CLONE_NEWNS).unwrap();
    let mount = |from: Option<&Path>, to, flags| {
        mount(from, to, None::<&str>, flags, None::<&str>).unwrap();
    };
    mount(None, "/", MsFlags::MS_REC | MsFlags::MS_PRIVATE);
    mount(Some(own.path()), LOCK, MsFlags::MS_BIND);
    let held = Flock::lock(open(LOCK).unwrap(), FlockArg::LockExclusive);
    held.map_err(|(_, errno)| errno).unwrap()
}

#[test]
#[ignore = "needs root"]
fn somebody_who_holds_the_lock_while_an_agent_starts_takes_no_affinity_away() {
    in_namespace(|| {
        let mut host = host(Variant::Legacy);
        let expected = probe::features(&mut host);
        let held = hold_lock();
        let found = probe::features(&mut host);
        drop(held);
        assert!(expected.ipset && expected.recent);
        assert_eq!((found.ipset, found.recent), (true, true));
        // The set of the trial is gone.
        assert_eq!(host.sets().unwrap(), BTreeSet::new());
    });
}

#[test]
#[ignore = "needs root"]
fn the_holder_of_the_lock_is_named() {
    in_namespace(|| {
        let mut host = host(Variant::Legacy);
        let held = hold_lock();
        let text = "*nat\n:KUBE-SVC-A - [0:0]\nCOMMIT\n";
        let error = host.restore(Family::V4, Table::Nat, text).unwrap_err();
        let own = format!("process {}", std::process::id());
        assert!(error.to_string().contains(&own), "{error}");
        drop(held);
        host.restore(Family::V4, Table::Nat, text).unwrap();
    });
}

#[test]
#[ignore = "needs root"]
fn a_network_namespace_has_one_agent_and_any_number_of_readers() {
    in_namespace(|| {
        let first = Host::find(Some(owner())).unwrap();
        let error = Owner::take().unwrap_err().to_string();
        assert!(error.contains("stop it first"), "{error}");
        let mut reader = Host::find(None).unwrap();
        reader.save(Family::V4, Table::Nat).unwrap();
        let text = "*nat\n:KUBE-SVC-A - [0:0]\nCOMMIT\n";
        let error = reader.restore(Family::V4, Table::Nat, text).unwrap_err();
        assert!(error.to_string().contains("owner"), "{error}");
        drop(first);
        Owner::take().map(drop).unwrap();
    });
}

#[test]
#[ignore = "needs root"]
fn what_tools_can_do_is_tried_without_writing_here() {
    in_namespace(|| {
        let owner = owner();
        let reader = Host::for_planning().unwrap();
        // What a trial would have left: nft tables exist once they were written.
        let tables = Command::new("nft").args(["list", "tables"]).output();
        let tables = String::from_utf8(tables.unwrap().stdout).unwrap();
        assert_eq!(tables, "");
        assert_eq!(reader.features(), Host::open(owner).unwrap().features());
    });
}

#[test]
#[ignore = "needs root"]
fn rules_that_another_variant_holds_are_found_in_the_own_namespace() {
    each_variant(|host| {
        let text = "*nat\n:KUBE-SERVICES - [0:0]\n-A KUBE-SERVICES -j RETURN\nCOMMIT\n";
        host.restore(Family::V6, Table::Nat, text).unwrap();
        let (holds, kept) = match host.variant() {
            Variant::Nft => (Variant::Nft, Variant::Legacy),
            other => (other, Variant::Nft),
        };
        host.choice.variant = kept;
        let hint = "*filter\n:KUBE-IPTABLES-HINT - [0:0]\nCOMMIT\n";
        host.restore(Family::V4, Table::Filter, hint).unwrap();
        let choice = variant::choose().unwrap();
        assert_eq!(choice.variant, kept);
        assert_eq!(choice.stale, Some(Stale { kept, holds }));
    });
}
