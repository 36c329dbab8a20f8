use std::{collections::BTreeMap, os::unix::fs::symlink};

use tempfile::TempDir;

use super::*;
use crate::{
    backends::in_namespace::in_namespace,
    cli::{Command, parse},
};

fn settings(flags: &str) -> HostSettings {
    let args = ["proxy-agent", "run"].into_iter();
    let args = args.chain(flags.split_whitespace()).map(Into::into);
    match parse(args).unwrap().command {
        Command::Run(run) => run.host,
        other => panic!("{other:?}"),
    }
}

/// A host with two CPUs and what a kernel begins with.
fn host() -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    for (file, text) in [
        ("proc/self/oom_score_adj", "0\n"),
        ("sys/devices/system/cpu/online", "0-5,7\n"),
        ("sys/module/nf_conntrack/parameters/hashsize", "16384\n"),
        ("proc/sys/net/netfilter/nf_conntrack_max", "65536\n"),
        (
            "proc/sys/net/netfilter/nf_conntrack_tcp_timeout_established",
            "432000\n",
        ),
        (
            "proc/sys/net/netfilter/nf_conntrack_tcp_timeout_close_wait",
            "60\n",
        ),
        ("proc/sys/net/netfilter/nf_conntrack_tcp_be_liberal", "0\n"),
        ("proc/sys/net/netfilter/nf_conntrack_udp_timeout", "30\n"),
        (
            "proc/sys/net/netfilter/nf_conntrack_udp_timeout_stream",
            "120\n",
        ),
    ] {
        let path = dir.path().join(file);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }
    dir
}

/// By the last part of the name.
fn values(root: &Path) -> BTreeMap<String, String> {
    let mut found = BTreeMap::new();
    let netfilter = fs::read_dir(root.join(NETFILTER)).unwrap();
    let netfilter = netfilter.map(|entry| entry.unwrap().path());
    let others = [HASH_SIZE, OOM_SCORE].map(|file| root.join(file));
    for path in netfilter.chain(others) {
        let name = path.file_name().unwrap().to_str().unwrap();
        let name = name.trim_start_matches("nf_conntrack_").to_owned();
        let text = fs::read_to_string(&path).unwrap();
        found.insert(name, text.trim().to_owned());
    }
    found
}

fn expected(values: &[(&str, &str)]) -> BTreeMap<String, String> {
    let owned = |(name, value): &(&str, &str)| ((*name).to_owned(), (*value).to_owned());
    values.iter().map(owned).collect()
}

#[test]
fn the_defaults_are_those_of_kube_proxy_and_nothing_is_lowered() {
    let (host, metrics) = (host(), Metrics::default());
    apply(&settings(""), host.path(), &metrics);
    let made = expected(&[
        ("hashsize", "57344"),
        ("max", "229376"),
        ("oom_score_adj", "-999"),
        ("tcp_be_liberal", "0"),
        ("tcp_timeout_close_wait", "3600"),
        ("tcp_timeout_established", "432000"),
        ("udp_timeout", "30"),
        ("udp_timeout_stream", "120"),
    ]);
    assert_eq!(values(host.path()), made);
    assert_eq!(metrics.host_settings_failed.get(), 0);
}

#[test]
fn every_flag_has_its_setting() {
    let (host, metrics) = (host(), Metrics::default());
    let flags = "--conntrack-max-per-core=1000 --conntrack-min=500000 --conntrack-tcp-timeout-established=240h0m0s \
        --conntrack-tcp-timeout-close-wait=2m30s --conntrack-tcp-be-liberal --conntrack-udp-timeout=40s \
        --conntrack-udp-timeout-stream=4m --oom-score-adj=-5";
    apply(&settings(flags), host.path(), &metrics);
    let made = expected(&[
        ("hashsize", "125000"),
        ("max", "500000"),
        ("oom_score_adj", "-5"),
        ("tcp_be_liberal", "1"),
        ("tcp_timeout_close_wait", "150"),
        ("tcp_timeout_established", "864000"),
        ("udp_timeout", "40"),
        ("udp_timeout_stream", "240"),
    ]);
    assert_eq!(values(host.path()), made);
}

#[test]
fn who_does_not_set_the_limit_leaves_the_hash_table_alone() {
    let host = host();
    let limit = host.path().join(sysctl("nf_conntrack_max"));
    let flags = settings("--conntrack-max-per-core=0");
    apply(&flags, host.path(), &Metrics::default());
    assert_eq!(values(host.path())["max"], "65536");
    fs::write(limit, "4000000").unwrap();
    apply(&settings(""), host.path(), &Metrics::default());
    let found = values(host.path());
    assert_eq!((&*found["max"], &*found["hashsize"]), ("4000000", "16384"));
}

#[test]
fn what_cannot_be_written_is_counted_and_the_rest_is_made() {
    let (host, metrics) = (host(), Metrics::default());
    // It holds no number, and nobody may write it.
    for file in [HASH_SIZE, "proc/sys/net/netfilter/nf_conntrack_udp_timeout"] {
        let path = host.path().join(file);
        fs::remove_file(&path).unwrap();
        symlink("/proc/sys/kernel/osrelease", path).unwrap();
    }
    let flags = settings("--conntrack-udp-timeout=40s");
    apply(&flags, host.path(), &metrics);
    assert_eq!(metrics.host_settings_failed.get(), 2);
    assert_eq!(values(host.path())["tcp_timeout_close_wait"], "3600");
}

#[test]
fn without_connection_tracking_nothing_of_it_fails() {
    let (host, metrics) = (host(), Metrics::default());
    fs::remove_dir_all(host.path().join(NETFILTER)).unwrap();
    apply(&settings(""), host.path(), &metrics);
    assert_eq!(metrics.host_settings_failed.get(), 0);
}

#[test]
fn processors_are_counted_as_the_kernel_lists_them() {
    for (list, expected) in [("0", 1), ("0-1", 2), ("0-3,5,8-9", 7), ("", 0)] {
        assert_eq!(count(list), expected, "{list:?}");
    }
}

/// Its own timeouts can be set there; the limit, which is the machine's, cannot, and so the hash table is not touched.
#[test]
#[ignore = "needs root"]
fn a_network_namespace_has_its_own_timeouts_and_not_its_own_limit() {
    let hash_size = fs::read_to_string(format!("/{HASH_SIZE}")).unwrap();
    let (failed, close_wait) = in_namespace(|| {
        let mut host = HostFiles {
            root: Path::new("/"),
            failed: 0,
        };
        host.conntrack(&settings("--conntrack-min=2000000000"));
        let close_wait = sysctl("nf_conntrack_tcp_timeout_close_wait");
        (host.failed, read_number(&host.root.join(close_wait)))
    });
    assert_eq!((failed, close_wait.unwrap()), (1, 3_600));
    let after = fs::read_to_string(format!("/{HASH_SIZE}")).unwrap();
    assert_eq!(after, hash_size);
}

#[test]
fn a_limit_that_an_administrator_took_away_stays_away() {
    let (host, metrics) = (host(), Metrics::default());
    let limit = host.path().join("proc/sys/net/netfilter/nf_conntrack_max");
    fs::write(&limit, "0\n").unwrap();
    apply(&settings(""), host.path(), &metrics);
    let made = values(host.path());
    assert_eq!(
        (made["max"].as_str(), made["hashsize"].as_str()),
        ("0", "16384")
    );
}

#[test]
fn a_pod_that_kubelet_protects_needs_no_right_to_protect_itself() {
    let expected = [
        ("-997\n", true),
        ("-1000\n", true),
        ("-996\n", false),
        ("0\n", false),
        ("", false),
    ];
    for (found, is_protected) in expected {
        assert_eq!(is_protected_by_kubelet(found), is_protected, "{found:?}");
    }
}
