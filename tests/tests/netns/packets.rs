//! `--mode iptables`: what arrives as a packet, from pods, from the node and from outside.

use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv6Addr, SocketAddr},
};

use anyhow::{Context, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use proxy_tests::{
    Pod, Scenario, Service,
    peer::Peer,
    scenario::{OFTEN, SOON, TCP, UDP, fails_with, in_family, who_udp},
    wait_for,
};
use serde_json::json;

/// Where the pods say which address they see.
const SOURCES: u16 = 8081;
const NODE_PORT: u16 = 30_081;
const ARGS: [&str; 6] = [
    "--mode",
    "iptables",
    "--cluster-cidr",
    "10.244.0.0/16,fd00:10:244::/48",
    "--iptables-min-sync-period",
    "100ms",
];

/// Runs `body` in both families with an agent in iptables mode and a client outside.
fn each_family(name: &str, body: impl Fn(&mut Scenario, &Pod) -> anyhow::Result<()>) {
    for v6 in [false, true] {
        in_family(name, v6, &ARGS, |s| {
            serve_sources(s)?;
            let outsider = s.topology.outsider()?;
            let (v4, v6) = (s.a.v4(), s.a.v6());
            outsider.ip(&format!(
                "route add 203.0.113.0/24 via {v4}\nroute add 2001:db8::/64 via {v6}\n"
            ))?;
            body(s, &outsider)
        });
    }
}

fn serve_sources(s: &Scenario) -> anyhow::Result<()> {
    for pod in [&s.near, &s.far] {
        let address = (Ipv6Addr::UNSPECIFIED, SOURCES).into();
        pod.peer()?.serve_tcp_sources(address, pod.name())?;
    }
    Ok(())
}

/// A Service at `vip(1)` and `outside(1)`, port 80, whose pods say which address they see; and port 53 for datagrams.
fn seen(s: &Scenario) -> Service {
    Service::new("web", &[s.vip(1)])
        .port("http", "TCP", TCP, SOURCES)
        .node_port(NODE_PORT)
        .port("dns", "UDP", UDP, 5353)
        .load_balancer(s.outside(1), "VIP")
}

/// Waits until the rules hold `text`, in the family of this run, and all that came with it.
fn settle(s: &Scenario, text: &str) -> anyhow::Result<()> {
    let save = if s.v6 {
        "ip6tables-save"
    } else {
        "iptables-save"
    };
    wait_for("the rules are there", SOON, || {
        let rules = s.a.output(save, &[])?;
        ensure!(
            rules.contains(text),
            "no {text} in\n{rules}\n{}",
            s.agent.log()
        );
        Ok(())
    })?;
    // One table is written before the other.
    let pending = "proxy_agent_changes_pending";
    s.agent.wait_metric(pending, "", |pending| pending == 0.0)
}

/// Writes a Service together with one of another address each time, and waits until that one is in the rules.
fn apply(s: &Scenario, service: &Service, number: u8) -> anyhow::Result<()> {
    s.manifests.put(service)?;
    let marker = s.vip(100 + number);
    s.manifests
        .put(&Service::new("marker", &[marker]).port("marker", "TCP", 9, 9))?;
    settle(s, &marker.to_string())
}

/// Which pods answer, and whether they see the client's own address.
fn seen_from(
    client: &Peer,
    to: SocketAddr,
    own: &[IpAddr],
) -> anyhow::Result<(BTreeSet<String>, BTreeSet<bool>)> {
    let (mut pods, mut kept) = (BTreeSet::new(), BTreeSet::new());
    for _ in 0..OFTEN {
        let answer = client.ask_tcp(to).with_context(|| format!("TCP to {to}"))?;
        let (pod, source) = answer.split_once(' ').context("no source")?;
        pods.insert(pod.to_owned());
        kept.insert(own.contains(&source.parse()?));
    }
    Ok((pods, kept))
}

/// One row of the flow matrix: who is reached, and whether masqueraded.
type Flow = (&'static [&'static str], bool);

const BOTH: &[&str] = &["far", "near"];

/// reference: TestInternalExternalMasquerade (pkg/proxy/iptables/proxier_test.go). Clients: a pod, the node, a machine
/// outside; to the ClusterIP, a node port, a load balancer's address.
fn assert_flows(s: &Scenario, outsider: &Pod, expected: [[Flow; 3]; 3]) -> anyhow::Result<()> {
    let node_port = (s.a.address(s.v6), NODE_PORT).into();
    let targets: [SocketAddr; 3] = [
        (s.vip(1), TCP).into(),
        node_port,
        (s.outside(1), TCP).into(),
    ];
    // The node's own addresses are all its own, whichever it chose: what counts is that a pod's or an outsider's is kept.
    let clients = [
        ("pod", s.client.peer()?, vec![s.client.address(s.v6)]),
        ("node", s.a.peer()?, Vec::new()),
        ("outside", outsider.peer()?, vec![outsider.address(s.v6)]),
    ];
    for ((name, client, own), row) in clients.iter().zip(expected) {
        for (to, (pods, is_masqueraded)) in targets.into_iter().zip(row) {
            let wanted: BTreeSet<String> = pods.iter().map(|&pod| pod.to_owned()).collect();
            let (found, kept) = seen_from(client, to, own).with_context(|| (*name).to_owned())?;
            ensure!(found == wanted, "{name} to {to}: {found:?}, not {wanted:?}");
            let kept_wanted = BTreeSet::from([!is_masqueraded]);
            ensure!(
                kept == kept_wanted,
                "{name} to {to}: own address seen {kept:?}"
            );
        }
    }
    Ok(())
}

#[test]
#[ignore = "needs root"]
fn every_client_reaches_every_kind_of_address() {
    each_family("ipt-cluster", |s, outsider| {
        let [near, far] = [&s.near, &s.far].map(|pod| s.endpoint(pod));
        apply(s, &seen(s).endpoint(near).endpoint(far), 1)?;
        // The switch has no way to a ClusterIP: the outsider is told one.
        let (v4, v6) = (s.a.v4(), s.a.v6());
        outsider.ip(&format!(
            "route add 10.96.0.0/16 via {v4}\nroute add fd00:10:96::/64 via {v6}\n"
        ))?;
        assert_flows(
            s,
            outsider,
            [
                [(BOTH, false), (BOTH, true), (BOTH, true)],
                [(BOTH, true), (BOTH, true), (BOTH, true)],
                [(BOTH, true), (BOTH, true), (BOTH, true)],
            ],
        )?;
        let who = who_udp(&s.client.peer()?, (s.vip(1), UDP).into(), OFTEN)?;
        ensure!(who.len() == 2, "{who:?}");
        Ok(())
    });
}

#[test]
#[ignore = "needs root"]
fn external_policy_local_keeps_the_source_address() {
    each_family("ipt-local", |s, outsider| {
        let [near, far] = [&s.near, &s.far].map(|pod| s.endpoint(pod));
        let local = seen(s).spec("externalTrafficPolicy", json!("Local"));
        apply(s, &local.endpoint(near).endpoint(far), 1)?;
        let node_port: SocketAddr = (s.a.address(s.v6), NODE_PORT).into();
        let own = [outsider.address(s.v6)];
        for to in [node_port, (s.outside(1), TCP).into()] {
            let (pods, kept) = seen_from(&outsider.peer()?, to, &own)?;
            ensure!(
                pods == BTreeSet::from(["near".to_owned()]),
                "{to}: {pods:?}"
            );
            ensure!(kept == BTreeSet::from([true]), "{to}: {kept:?}");
            let (pods, kept) = seen_from(&s.client.peer()?, to, &[s.client.address(s.v6)])?;
            ensure!(pods.len() == 2, "{to} from a pod: {pods:?}");
            ensure!(kept == BTreeSet::from([true]), "{to} from a pod: {kept:?}");
        }
        Ok(())
    });
}

#[test]
#[ignore = "needs root"]
fn a_service_without_endpoints_is_rejected_from_everywhere() {
    each_family("ipt-empty", |s, outsider| {
        apply(s, &seen(s), 1)?;
        let refused = |client: &Peer, to: SocketAddr| {
            fails_with(client.ask_tcp(to), libc::ECONNREFUSED).with_context(|| to.to_string())
        };
        for client in [s.client.peer()?, s.a.peer()?] {
            refused(&client, (s.vip(1), TCP).into())?;
        }
        // From the node itself an external address is rejected by nobody, as with kube-proxy: INPUT and FORWARD only.
        refused(&s.client.peer()?, (s.outside(1), TCP).into())?;
        refused(&outsider.peer()?, (s.a.address(s.v6), NODE_PORT).into())?;
        refused(&outsider.peer()?, (s.outside(1), TCP).into())
    });
}

#[test]
#[ignore = "needs root"]
fn without_what_ebpf_needs_mode_auto_takes_iptables_and_says_why() {
    in_family("ipt-auto", false, &[], |s| {
        serve_sources(s)?;
        s.agent.stop()?;
        s.agent.text(&["cleanup"])?;
        s.manifests.put(&seen(s).endpoint(s.endpoint(&s.near)))?;
        let log = s.topology.state_dir().join("auto.log");
        let mut command = s.a.place().command("unshare")?;
        let preparation = "umount -l /sys/fs/bpf\nexec \"$@\"";
        command.args(["--mount", "sh", "-e", "-c", preparation, "sh"]);
        command.arg(proxy_tests::agent::agent_binary()?);
        command
            .args(s.agent.global_args())
            .args(["run", "--manifests"]);
        command
            .arg(s.manifests.dir())
            .stderr(std::fs::File::create(&log)?);
        let mut agent = command.spawn()?;
        let served = settle(s, &s.vip(1).to_string())
            .and_then(|()| Ok(s.client.peer()?.ask_tcp((s.vip(1), TCP).into())?));
        kill(Pid::from_raw(agent.id().try_into()?), Signal::SIGTERM)?;
        agent.wait()?;
        let log = std::fs::read_to_string(log)?;
        served.with_context(|| log.clone())?;
        ensure!(
            log.contains("no socket layer") && log.contains("mount -t bpf"),
            "{log}"
        );
        Ok(())
    });
}

#[test]
#[ignore = "needs root and eBPF"]
fn the_mode_changes_on_a_live_node_and_cleanup_leaves_nothing() {
    in_family("ipt-mode", false, &[], |s| {
        serve_sources(s)?;
        let [near, far] = [&s.near, &s.far].map(|pod| s.endpoint(pod));
        s.apply(&seen(s).endpoint(near).endpoint(far))?;
        let vip: SocketAddr = (s.vip(1), TCP).into();
        let ours = |s: &Scenario| -> anyhow::Result<bool> {
            Ok(s.a.output("iptables-save", &[])?.contains("KUBE-SERVICES"))
        };
        ensure!(ours(s)?);
        s.agent.stop()?;
        let mut packets = proxy_tests::Agent::new(&s.a, &s.manifests, &ARGS)?;
        packets.spawn()?;
        packets.wait_ready()?;
        ensure!(ours(s)?);
        ensure!(!s.a.bpf_dir().join("links/connect4").exists());
        ensure!(s.a.bpf_dir().join("links/getpeername4").exists());
        s.client.peer()?.ask_tcp(vip)?;
        let refused = packets.run(&["cleanup"])?;
        ensure!(refused.status.code() == Some(1), "{refused:?}");
        packets.stop()?;
        s.client.peer()?.ask_tcp(vip).context("without an agent")?;
        s.agent.spawn()?;
        s.agent.wait_ready()?;
        s.client.peer()?.ask_tcp(vip)?;
        ensure!(ours(s)? && s.a.bpf_dir().join("links/connect4").exists());
        s.agent.stop()?;
        packets.spawn()?;
        packets.wait_ready()?;
        packets.stop()?;
        packets.text(&["cleanup"])?;
        ensure!(!ours(s)? && !s.a.bpf_dir().exists());
        Ok(())
    });
}
