use std::{ffi::OsString, time::Duration};

use serde_json::{Value, json};

use super::*;
use crate::cli::{self, DetectLocalMode, Global, LogFormat, Mode};

/// What kubeadm v1.36 writes for a cluster of two families, as far as it says something.
const KUBEADM: &str = r#"
apiVersion: kubeproxy.config.k8s.io/v1alpha1
bindAddress: 0.0.0.0
bindAddressHardFail: false
clientConnection:
  acceptContentTypes: ""
  burst: 0
  contentType: ""
  kubeconfig: /var/lib/kube-proxy/kubeconfig.conf
  qps: 0
clusterCIDR: 10.244.0.0/16,fd00:10:244::/56
configSyncPeriod: 0s
conntrack:
  maxPerCore: null
  min: null
  tcpBeLiberal: false
  tcpCloseWaitTimeout: null
  tcpEstablishedTimeout: null
  udpStreamTimeout: 0s
  udpTimeout: 0s
detectLocal:
  bridgeInterface: ""
  interfaceNamePrefix: ""
detectLocalMode: ""
enableProfiling: false
healthzBindAddress: ""
hostnameOverride: ""
iptables:
  localhostNodePorts: null
  masqueradeAll: false
  masqueradeBit: null
  minSyncPeriod: 0s
  syncPeriod: 0s
ipvs:
  excludeCIDRs: null
  minSyncPeriod: 0s
  scheduler: ""
  strictARP: false
  syncPeriod: 0s
  tcpFinTimeout: 0s
  tcpTimeout: 0s
  udpTimeout: 0s
kind: KubeProxyConfiguration
logging:
  flushFrequency: 0
  options:
    json:
      infoBufferSize: "0"
    text:
      infoBufferSize: "0"
  verbosity: 0
metricsBindAddress: ""
mode: ""
nftables:
  masqueradeAll: false
  masqueradeBit: null
  minSyncPeriod: 0s
  syncPeriod: 0s
nodePortAddresses: null
oomScoreAdj: null
portRange: ""
showHiddenMetricsForVersion: ""
winkernel:
  enableDSR: false
  forwardHealthCheckVip: false
  networkName: ""
  rootHnsEndpointName: ""
  sourceVip: ""
"#;

const HEAD: &str = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n";

/// The command line with `FILE` for a file of this content; what is in force, and what has no effect.
fn settled(line: &str, content: &str) -> Result<(Cli, Vec<String>), Error> {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("config.conf");
    fs::write(&file, content).unwrap();
    let line = line.replace("FILE", &file.display().to_string());
    let words = ["proxy-agent"].into_iter().chain(line.split_whitespace());
    settle(cli::parse(words.map(OsString::from)).unwrap())
}

fn run(line: &str, content: &str) -> (Global, Run, Vec<String>) {
    let (cli, notes) = settled(line, content).unwrap();
    let Command::Run(run) = cli.command else {
        panic!("{line} is not run");
    };
    (cli.global, *run, notes)
}

fn with(fields: &str) -> String {
    format!("{HEAD}{fields}")
}

/// The part of an error that says what is wrong.
fn wrong(fields: &str) -> String {
    match settled("--config FILE", &with(fields)) {
        Err(Error::Field { what, .. }) => what,
        other => panic!("{fields:?}: {other:?}"),
    }
}

#[test]
fn the_file_of_kubeadm_means_what_no_flags_mean() {
    let (global, mut run, notes) = run("--config FILE", KUBEADM);
    assert_eq!(notes, [""; 0]);
    let kubeconfig = run.sources.kubeconfig.take();
    assert_eq!(
        kubeconfig,
        Some("/var/lib/kube-proxy/kubeconfig.conf".into())
    );
    let networks = "10.244.0.0/16,fd00:10:244::/56";
    let networks = format!("--cluster-cidr {networks}");
    let (plain_global, plain, _) = self::run(&networks, "");
    assert_eq!(configz(&global, &run), configz(&plain_global, &plain));
    assert_eq!(run.layers.mode(), Mode::Auto);
    assert_eq!(run.layers.packet.takeover_after(), Duration::from_secs(45));
}

#[test]
fn every_field_that_means_something_is_honoured() {
    let (global, run, notes) = run(
        "--config FILE",
        &with(
            r#"
clientConnection: {kubeconfig: /k}
logging: {format: json, verbosity: 4}
hostnameOverride: Node-A
bindAddress: 192.168.0.1
healthzBindAddress: 192.168.0.1
metricsBindAddress: 0.0.0.0:9000
bindAddressHardFail: true
mode: iptables
iptables:
  masqueradeBit: 15
  masqueradeAll: yes
  localhostNodePorts: false
  syncPeriod: 1m
  minSyncPeriod: 100ms
detectLocalMode: BridgeInterface
detectLocal: {bridgeInterface: cni0, interfaceNamePrefix: veth}
clusterCIDR: 10.0.0.0/8
nodePortAddresses: [192.168.0.0/16, "fd00::/8"]
oomScoreAdj: -500
conntrack:
  maxPerCore: 1
  min: 2
  tcpEstablishedTimeout: 3s
  tcpCloseWaitTimeout: 0s
  tcpBeLiberal: true
  udpTimeout: 5s
  udpStreamTimeout: 6s
proxyAgent:
  mode: ebpf
  socketLease: 1m
  socketExcludeCgroups: [mesh/*]
  socketExcludePods: true
  takeoverAfter: 2m
  bpfDir: /bpf
  cgroup: /cgroup
"#,
        ),
    );
    assert_eq!(notes, [""; 0]);
    let expected = json!({"kubeproxy.config.k8s.io": {
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "featureGates": {},
        "clientConnection": {"kubeconfig": "/k", "acceptContentTypes": "", "contentType": "", "qps": 0.0, "burst": 0},
        "logging": {"format": "json", "verbosity": 4},
        "hostnameOverride": "Node-A",
        "bindAddress": "192.168.0.1",
        "healthzBindAddress": "192.168.0.1:10256",
        "metricsBindAddress": "0.0.0.0:9000",
        "bindAddressHardFail": true,
        "enableProfiling": false,
        "showHiddenMetricsForVersion": "",
        "mode": "iptables",
        "iptables": {
            "masqueradeBit": 15, "masqueradeAll": true, "localhostNodePorts": false, "syncPeriod": "1m0s", "minSyncPeriod": "100ms",
        },
        "ipvs": {
            "syncPeriod": "0s", "minSyncPeriod": "0s", "scheduler": "", "excludeCIDRs": [], "strictARP": false,
            "tcpTimeout": "0s", "tcpFinTimeout": "0s", "udpTimeout": "0s",
        },
        "nftables": {"masqueradeBit": null, "masqueradeAll": false, "syncPeriod": "0s", "minSyncPeriod": "0s"},
        "winkernel": {
            "networkName": "", "sourceVip": "", "enableDSR": false, "rootHnsEndpointName": "", "forwardHealthCheckVip": false,
        },
        "detectLocalMode": "BridgeInterface",
        "detectLocal": {"bridgeInterface": "cni0", "interfaceNamePrefix": "veth"},
        "clusterCIDR": "10.0.0.0/8",
        "nodePortAddresses": ["192.168.0.0/16", "fd00::/8"],
        "oomScoreAdj": -500,
        "conntrack": {
            "maxPerCore": 1, "min": 2, "tcpEstablishedTimeout": "3s", "tcpCloseWaitTimeout": "0s", "tcpBeLiberal": true,
            "udpTimeout": "5s", "udpStreamTimeout": "6s",
        },
        "configSyncPeriod": "0s",
        "portRange": "",
        "proxyAgent": {
            "mode": "ebpf", "socketLease": "1m0s", "socketExcludeCgroups": ["mesh/*"], "socketExcludePods": true, "takeoverAfter": "2m0s",
            "bpfDir": "/bpf", "cgroup": "/cgroup",
        },
    }});
    assert_eq!(configz(&global, &run), expected);
    assert_eq!(run.layers.mode(), Mode::Ebpf);
    assert_eq!(global.log_format, LogFormat::Json);
}

#[test]
fn what_is_written_is_read_back_as_the_same() {
    for (line, content) in [
        ("--config FILE", KUBEADM.to_owned()),
        (
            "--config FILE --mode ebpf -v=6",
            with(
                "mode: nftables\nnftables: {masqueradeBit: 3, masqueradeAll: true, minSyncPeriod: 2s, syncPeriod: 3s}",
            ),
        ),
        (
            "--config FILE",
            with(
                "mode: ipvs\nipvs: {minSyncPeriod: 2s, syncPeriod: 3s}\niptables: {masqueradeAll: true}",
            ),
        ),
        (
            "--proxy-mode=iptables --healthz-bind-address [::]:1 --socket-exclude-cgroup a --detect-local-mode NodeCIDR",
            String::new(),
        ),
    ] {
        let (global, before, _) = run(line, &content);
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("written");
        write(&global, &before, &path).unwrap();
        let written = fs::read_to_string(&path).unwrap();
        let (other, after, notes) = run("--config FILE", &written);
        assert_eq!(notes, [""; 0], "{written}");
        assert_eq!(configz(&global, &before), configz(&other, &after));
    }
}

#[test]
fn the_words_of_kube_proxy_choose_the_mode_unless_our_own_does() {
    for (line, fields, mode, node_ports) in [
        ("", "mode: ''", Mode::Auto, 0),
        ("", "mode: ipvs", Mode::Auto, 0),
        ("", "mode: nftables", Mode::Auto, 1),
        (
            "",
            "mode: nftables\nnodePortAddresses: [10.0.0.0/8, 192.168.0.0/16]",
            Mode::Auto,
            2,
        ),
        ("", "mode: iptables", Mode::Iptables, 0),
        (
            "",
            "mode: iptables\nproxyAgent: {mode: ebpf}",
            Mode::Ebpf,
            0,
        ),
        (
            "--mode auto",
            "mode: iptables\nproxyAgent: {mode: ebpf}",
            Mode::Auto,
            0,
        ),
    ] {
        let (_, run, _) = run(&format!("--config FILE {line}"), &with(fields));
        assert_eq!(run.layers.mode(), mode, "{line} {fields}");
        assert_eq!(
            run.sources.nodeport_addresses.len(),
            node_ports,
            "{line} {fields}"
        );
    }
    let (_, run, _) = run("--proxy-mode=nftables", "");
    assert_eq!(run.sources.nodeport_addresses, [NodePortAddress::Primary]);
}

#[test]
fn each_mode_reads_its_own_masquerading_and_periods() {
    let all = "
iptables: {masqueradeBit: 1, masqueradeAll: true, syncPeriod: 10s, minSyncPeriod: 2s}
ipvs: {syncPeriod: 20s, minSyncPeriod: 3s}
nftables: {masqueradeBit: 2, masqueradeAll: false, syncPeriod: 30s, minSyncPeriod: 4s}
";
    for (mode, bit, masquerade_all, period, least) in [
        ("''", 1, true, 10, 2),
        ("ipvs", 1, true, 20, 3),
        ("nftables", 2, false, 30, 4),
    ] {
        let (_, run, _) = run("--config FILE", &with(&format!("mode: {mode}{all}")));
        let packet = run.layers.packet;
        assert_eq!(packet.iptables_masquerade_bit, bit, "{mode}");
        assert_eq!(packet.masquerade_all, masquerade_all, "{mode}");
        assert_eq!(packet.iptables_sync_period.as_secs(), period, "{mode}");
        assert_eq!(packet.iptables_min_sync_period.as_secs(), least, "{mode}");
        assert_eq!(packet.takeover_after().as_secs(), period * 3 / 2, "{mode}");
    }
}

#[test]
fn beside_a_file_only_flags_count_that_are_ours_or_win_in_kube_proxy() {
    let (global, run, notes) = run(
        "--config FILE --hostname-override=\" B \" --master https://m:1 -v 6 --socket_lease=60 --takeover-after 5s --bpf-dir /b \
         --cluster-cidr 10.0.0.0/8 --kubeconfig /other --proxy-mode iptables --healthz-port 0"
            .replace("\" B \"", "B")
            .as_str(),
        &with("hostnameOverride: a\nclientConnection: {kubeconfig: /k}\nproxyAgent: {socketLease: 10s, bpfDir: /x}"),
    );
    assert_eq!(global.node_name.as_deref(), Some("B"));
    assert_eq!(global.bpf_dir, PathBuf::from("/b"));
    assert_eq!(global.verbosity, Some(6));
    assert_eq!(run.sources.master.as_deref(), Some("https://m:1"));
    assert_eq!(run.sources.kubeconfig, Some("/k".into()));
    assert_eq!(run.socket_lease, Duration::from_secs(60));
    assert_eq!(run.layers.packet.takeover_after(), Duration::from_secs(5));
    assert_eq!(run.layers.packet.cluster_cidr, []);
    assert_eq!(run.layers.mode(), Mode::Auto);
    assert_eq!(run.healthz_bind_address.to_string(), "0.0.0.0:10256");
    assert_eq!(
        notes,
        [
            "--cluster-cidr has no effect: --config is given",
            "--healthz-port has no effect: --config is given",
            "--kubeconfig has no effect: --config is given",
            "--proxy-mode has no effect: --config is given",
        ]
    );
    let (_, run, _) = self::run(
        "--manifests /m --config FILE",
        &with("clientConnection: {kubeconfig: /k}"),
    );
    assert_eq!(run.sources.manifests, Some("/m".into()));
    assert_eq!(run.sources.kubeconfig, None);
}

#[test]
fn without_a_file_kube_proxys_flags_count_and_those_without_meaning_are_told() {
    let (_, run, notes) = run(
        "--cluster-cidr=10.244.0.0/16 --detect_local_mode ClusterCIDR --metrics-port 0 --healthz-port=10300 --ipvs-scheduler rr --ipvs-strict-arp \
         --profiling=false --kube-api-qps 50 --masquerade-all=T --masquerade-all=0",
        "",
    );
    assert_eq!(run.metrics_bind_address, Listen(None));
    assert_eq!(
        run.layers.packet.detect_local_mode,
        DetectLocalMode::ClusterCidr
    );
    assert!(!run.layers.packet.masquerade_all);
    let flags: Vec<_> = notes
        .iter()
        .map(|note| note.split(' ').next().unwrap())
        .collect();
    assert_eq!(
        flags,
        [
            "--ipvs-scheduler",
            "--ipvs-strict-arp",
            "--kube-api-qps",
            "--profiling",
            "--healthz-port"
        ]
    );
}

#[test]
fn plan_and_check_read_the_file_too() {
    for command in ["plan", "check"] {
        let (cli, _) = settled(
            &format!("{command} --config FILE"),
            &with("mode: iptables\nhostnameOverride: a\nclusterCIDR: 10.0.0.0/8"),
        )
        .unwrap();
        assert_eq!(cli.global.node_name.as_deref(), Some("a"));
        let layers = match cli.command {
            Command::Plan(plan) => plan.layers,
            Command::Check(check) => check.layers,
            other => panic!("{other:?}"),
        };
        assert_eq!(layers.mode(), Mode::Iptables);
        assert_eq!(layers.packet.cluster_cidr.len(), 1);
    }
}

#[test]
fn an_address_of_ipv6_moves_the_servers_there() {
    let (_, run, _) = run("--config FILE", &with("bindAddress: \"fd00::1\""));
    assert_eq!(run.healthz_bind_address.to_string(), "[::]:10256");
    assert_eq!(run.metrics_bind_address.to_string(), "[::1]:10249");
}

#[test]
fn fields_that_are_unknown_or_there_twice_are_told_by_their_paths() {
    let (_, run, notes) = run(
        "--config FILE",
        &with(
            "iptables: {masqueradeBit: 1, mascaradeAll: true, masqueradeBit: 2}\nudpIdleTimeout: 250ms\n\
             proxyAgent: {moode: ebpf}\nmetricsBindAddress: \"\"\nmetricsBindAddress: 127.0.0.1:1",
        ),
    );
    assert_eq!(run.layers.packet.iptables_masquerade_bit, 2);
    assert_eq!(run.metrics_bind_address.to_string(), "127.0.0.1:1");
    assert_eq!(
        notes,
        [
            "iptables.masqueradeBit is there more than once: the last one counts",
            "metricsBindAddress is there more than once: the last one counts",
            "iptables.mascaradeAll is unknown, and ignored",
            "proxyAgent.moode is unknown, and ignored",
            "udpIdleTimeout is unknown, and ignored",
        ]
    );
}

#[test]
fn fields_without_a_meaning_here_are_told_by_their_paths() {
    let (_, _, notes) = run(
        "--config FILE",
        &with(
            "
featureGates: {A: true}
clientConnection: {acceptContentTypes: a, contentType: b, qps: 5.5, burst: 11}
logging: {flushFrequency: 1s, vmodule: [{filePattern: a, verbosity: 1}], options: {json: {splitStream: true}}}
enableProfiling: true
showHiddenMetricsForVersion: \"1.35\"
ipvs: {scheduler: rr, excludeCIDRs: [10.0.0.0/8], strictARP: true, tcpTimeout: 1s, tcpFinTimeout: 1s, udpTimeout: 1s}
winkernel: {networkName: a}
windowsRunAsService: true
configSyncPeriod: 1m
portRange: 1-2
",
        ),
    );
    let fields: Vec<_> = notes
        .iter()
        .map(|note| note.split(' ').next().unwrap())
        .collect();
    assert_eq!(
        fields,
        [
            "featureGates",
            "clientConnection.acceptContentTypes",
            "clientConnection.contentType",
            "clientConnection.qps",
            "clientConnection.burst",
            "logging.flushFrequency",
            "logging.vmodule",
            "logging.options",
            "enableProfiling",
            "showHiddenMetricsForVersion",
            "ipvs.scheduler",
            "ipvs.excludeCIDRs",
            "ipvs.strictARP",
            "ipvs.tcpTimeout",
            "ipvs.tcpFinTimeout",
            "ipvs.udpTimeout",
            "winkernel",
            "windowsRunAsService",
            "configSyncPeriod",
            "portRange",
        ]
    );
}

#[test]
fn wrong_fields_are_refused_with_their_paths() {
    for (fields, expected) in [
        (
            "iptables: {masqueradeBit: 32}",
            "iptables.masqueradeBit: 32 must be within the range [0, 31]",
        ),
        (
            "iptables: {masqueradeBit: x}",
            "iptables.masqueradeBit: invalid type: string \"x\", expected i64",
        ),
        (
            "iptables: {syncPeriod: 30}",
            "iptables.syncPeriod: expected a duration in quotes or with a unit, like 30s",
        ),
        (
            "iptables: {syncPeriod: -1s}",
            "iptables.syncPeriod: \"-1s\" must not be negative",
        ),
        (
            "conntrack: {min: -1}",
            "conntrack.min: -1 must be within the range [0, 2147483647]",
        ),
        (
            "oomScoreAdj: 1001",
            "oomScoreAdj: 1001 must be within the range [-1000, 1000]",
        ),
        (
            "mode: kernelspace",
            "mode: \"kernelspace\": must be one of \"\", \"iptables\", \"ipvs\", \"nftables\"",
        ),
        (
            "proxyAgent: {mode: best}",
            "proxyAgent.mode: \"best\": must be one of \"auto\", \"ebpf\", \"iptables\"",
        ),
        (
            "proxyAgent: {socketLease: 1s}",
            "proxyAgent.socketLease: \"1s\" must be 3s to 24h: the agent renews it every second",
        ),
        (
            "clusterCIDR: 10.0.0.0/8,x",
            "clusterCIDR: \"10.0.0.0/8,x\": \"x\" is no network like 10.244.0.0/16",
        ),
        (
            "nodePortAddresses: [primary, main]",
            "nodePortAddresses[1]: \"main\" is neither a network like 192.168.0.0/16 nor `primary`",
        ),
        (
            "bindAddress: host",
            "bindAddress: \"host\": invalid IP address syntax",
        ),
        (
            "healthzBindAddress: localhost:1",
            "healthzBindAddress: \"localhost:1\" is no ADDRESS:PORT, like 0.0.0.0:10256 or [::]:10256",
        ),
        (
            "enableProfiling: 3",
            "enableProfiling: expected true or false",
        ),
        (
            "conntrack: []",
            "conntrack: invalid type: sequence, expected fields",
        ),
        (
            "detectLocalMode: BridgeInterface",
            "detectLocal.bridgeInterface: must not be empty with detectLocalMode BridgeInterface",
        ),
        (
            "kind: ConfigMap",
            "kind: it is \"ConfigMap\" and not \"KubeProxyConfiguration\"; is this the file config.conf of the ConfigMap kube-proxy?",
        ),
        (
            "apiVersion: kubeproxy.config.k8s.io/v1alpha2",
            "apiVersion: it is \"kubeproxy.config.k8s.io/v1alpha2\" and not \"kubeproxy.config.k8s.io/v1alpha1\"; is this the file \
             config.conf of the ConfigMap kube-proxy?",
        ),
    ] {
        assert_eq!(wrong(fields), expected);
    }
}

#[test]
fn files_that_are_missing_or_no_yaml_and_periods_that_contradict_are_refused() {
    let text = |line: &str, content: &str| settled(line, content).unwrap_err().to_string();
    let missing = text("--config /nonexistent/file", "");
    assert!(
        missing.starts_with("cannot read the configuration /nonexistent/file: No such file"),
        "{missing}"
    );
    assert!(text("--config FILE", "a: [").contains("is no YAML"));
    assert!(text("--config FILE", "\n").ends_with("cannot be used: it is empty"));
    assert!(text("--config FILE", "[a]").ends_with("cannot be used: it has no fields: [\"a\"]"));
    let expected = "--iptables-sync-period, syncPeriod in the configuration (10s), must be greater than 0, and not less than \
                    --iptables-min-sync-period, minSyncPeriod (20s)";
    let config = with("iptables: {syncPeriod: 10s, minSyncPeriod: 20s}");
    assert_eq!(text("--config FILE", &config), expected);
    assert_eq!(
        text(
            "--iptables-sync-period 10s --iptables-min-sync-period 20s",
            ""
        ),
        expected
    );
}

#[test]
fn json_is_read_as_well() {
    let json: Value = json!({"apiVersion": API_VERSION, "kind": KIND, "mode": "iptables"});
    let (_, run, _) = run("--config FILE", &json.to_string());
    assert_eq!(run.layers.mode(), Mode::Iptables);
}
