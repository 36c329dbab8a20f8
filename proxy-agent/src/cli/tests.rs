use std::time::Duration;

use super::*;

fn parsed(line: &str) -> Result<Cli, clap::Error> {
    parse(
        std::iter::once("proxy-agent")
            .chain(line.split_whitespace())
            .map(OsString::from),
    )
}

#[test]
fn run_is_the_command_when_none_is_given() {
    for line in [
        "--manifests /m",
        "run --manifests /m",
        "--bpf-dir /b --manifests /m",
        "--cgroup=/c --manifests /m",
    ] {
        let Command::Run(run) = parsed(line).unwrap().command else {
            panic!("{line} is not run");
        };
        assert_eq!(run.sources.manifests, Some("/m".into()));
    }
    assert!(matches!(parsed("").unwrap().command, Command::Run(_)));
}

#[test]
fn global_flags_may_stand_on_either_side_of_the_command() {
    for line in ["--bpf-dir /b dump services", "dump services --bpf-dir /b"] {
        let cli = parsed(line).unwrap();
        assert_eq!(cli.global.bpf_dir, PathBuf::from("/b"));
        assert!(matches!(
            cli.command,
            Command::Dump(Dump {
                what: Table::Services,
                ..
            })
        ));
    }
}

#[test]
fn our_mode_wins_over_kube_proxys_word() {
    for (line, mode) in [
        ("", Mode::Auto),
        ("--proxy-mode=", Mode::Auto),
        ("--proxy-mode nftables", Mode::Auto),
        ("--proxy_mode=iptables", Mode::Iptables),
        ("--mode ebpf --proxy-mode iptables", Mode::Ebpf),
        ("--mode ebpf --mode iptables", Mode::Iptables),
    ] {
        let Command::Run(run) = parsed(line).unwrap().command else {
            panic!("{line} is not run");
        };
        assert_eq!(run.layers.mode(), mode, "{line}");
    }
}

#[test]
fn the_flags_are_consistent() {
    Cli::command().debug_assert();
}

#[test]
fn flags_have_the_documented_defaults() {
    let cli = parsed("run").unwrap();
    let Command::Run(run) = cli.command else {
        panic!("not run");
    };
    assert_eq!(cli.global.bpf_dir, PathBuf::from("/sys/fs/bpf/proxy-agent"));
    assert_eq!(run.healthz_bind_address.to_string(), "0.0.0.0:10256");
    assert_eq!(run.metrics_bind_address.to_string(), "127.0.0.1:10249");
    assert_eq!(run.socket_lease, Duration::from_secs(30));
    assert_eq!(run.layers.mode(), Mode::Auto);
}

#[test]
fn the_packet_layer_has_the_flags_of_kube_proxy() {
    let packet = |line: &str| match parsed(line).unwrap().command {
        Command::Run(run) => run.layers.packet,
        other => panic!("{other:?}"),
    };
    let plain = packet("run");
    assert_eq!(plain.iptables_masquerade_bit, 14);
    assert!(!plain.masquerade_all && plain.iptables_localhost_nodeports);
    assert_eq!(plain.detect_local_mode, DetectLocalMode::ClusterCidr);
    assert_eq!(plain.iptables_min_sync_period, Duration::from_secs(1));
    assert_eq!(plain.takeover_after(), Duration::from_secs(45));
    let given = packet(
        "--masquerade-all --cluster-cidr=10.244.0.0/16,fd00:10:244::/56 --iptables-localhost-nodeports=false \
         --detect-local-mode=InterfaceNamePrefix --pod-interface-name-prefix=veth --iptables-min-sync-period=100ms",
    );
    assert!(given.masquerade_all && !given.iptables_localhost_nodeports);
    assert_eq!(given.cluster_cidr.len(), 2);
    assert_eq!(given.iptables_min_sync_period, Duration::from_millis(100));
}

#[test]
fn the_addresses_of_node_ports_concern_every_command_that_reads_sources() {
    let list = "--nodeport-addresses=primary,127.0.0.0/8";
    let Command::Run(run) = parsed(list).unwrap().command else {
        panic!("not run");
    };
    let Command::Plan(plan) = parsed(&format!("plan {list}")).unwrap().command else {
        panic!("not plan");
    };
    for sources in [run.sources, plan.sources] {
        assert_eq!(sources.nodeport_addresses.len(), 2);
    }
}

#[test]
fn wrong_flags_are_refused() {
    for line in [
        "--nonsense",
        "nonsense",
        "--socket-lease 1",
        "--mode x",
        "--proxy-mode ebpf",
        "--masquerade-all=yes",
        "--healthz-bind-address localhost:1",
        "--iptables-masquerade-bit 32",
        "--cluster-cidr 10.244.0.0",
        "--nodeport-addresses main",
        "--detect-local-mode x",
        "--iptables-min-sync-period 1h2",
        "--iptables-min-sync-period 1d",
        "--oom-score-adj 1001",
        "dump",
        "dump x",
    ] {
        let error = parsed(line).unwrap_err();
        assert!(error.use_stderr(), "{line}: {error}");
    }
    assert!(!parsed("--help").unwrap_err().use_stderr());
    for line in [
        "--version",
        "--config /x --version",
        "--version=true -v 2",
        "--version=raw",
    ] {
        let error = parsed(line).unwrap_err();
        assert_eq!(
            error.kind(),
            clap::error::ErrorKind::DisplayVersion,
            "{line}"
        );
    }
}
