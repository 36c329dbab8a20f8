//! The image is swapped: kube-proxy, the agent, kube-proxy. Connections all the time, and none fails.

use anyhow::{Context, ensure};
use proxy_tests::{
    kube::{KubeProxy, Mode, Variant},
    peer::Socket,
};

use crate::cluster::{Cluster, assert_none_failed};

const IPTABLES: &[&str] = &["--mode", "iptables"];
/// A short lease: its end is part of the way back.
const EBPF: &[&str] = &["--mode", "ebpf", "--socket-lease", "3"];

/// Asserts that connections which were made before are still answered.
fn all_alive(established: &[(&'static str, Socket)], when: &str) -> anyhow::Result<()> {
    for (client, connection) in established {
        let answer = connection.ask();
        answer.with_context(|| format!("a connection of the {client}, {when}"))?;
    }
    Ok(())
}

fn swap(name: &str, before: Mode, after: Mode, variant: Variant, args: &[&str]) {
    Cluster::run(name, variant, args, |c| {
        let (near, far) = (c.scenario.near.clone(), c.scenario.far.clone());
        let outsider = c.scenario.topology.outsider()?;
        c.apply(&[&near, &far])?;
        let node = c.scenario.a.clone();
        let kube_proxy = KubeProxy::start(&c.control, &node, before)?;
        c.wait_served_by(&[&near, &far])?;
        let loads = c.load(&outsider)?;
        let mut established = c.connect(&outsider)?;

        kube_proxy.stop()?;
        c.scenario.agent.spawn()?;
        c.scenario.agent.wait_ready()?;
        c.apply(&[&far])?;
        c.wait_served_by(&[&far])?;
        c.wait_log("what kube-proxy left is removed")?;
        ensure!(!c.has_nft_table()?, "kube-proxy's table is still there");
        let rules = c.rules(variant)?;
        ensure!(!rules.contains("KUBE-PROXY-CANARY"), "{rules}");
        all_alive(&established, "under the agent")?;
        established.extend(c.connect(&outsider)?);

        c.scenario.agent.stop()?;
        let kube_proxy = KubeProxy::start(&c.control, &node, after)?;
        c.apply(&[&near])?;
        c.wait_served_by(&[&near])?;
        all_alive(&established, "under kube-proxy again")?;
        assert_none_failed(loads)?;
        let rules = c.rules(variant)?;
        ensure!(!rules.contains("KUBE-SVC-D-"), "ours are left in\n{rules}");
        kube_proxy.stop()
    });
}

#[test]
#[ignore = "needs root"]
fn from_iptables_nft_and_back_no_connection_fails() {
    let mode = Mode::Iptables(Variant::Nft);
    swap("swap-nft", mode, mode, Variant::Nft, IPTABLES);
}

#[test]
#[ignore = "needs root"]
fn from_iptables_legacy_and_back_no_connection_fails() {
    let mode = Mode::Iptables(Variant::Legacy);
    swap("swap-legacy", mode, mode, Variant::Legacy, IPTABLES);
}

#[test]
#[ignore = "needs root"]
fn from_nftables_no_connection_fails() {
    let after = Mode::Iptables(Variant::Nft);
    swap(
        "swap-nftables",
        Mode::Nftables,
        after,
        Variant::Nft,
        IPTABLES,
    );
}

#[test]
#[ignore = "needs root and eBPF"]
fn from_iptables_nft_to_the_socket_layer_and_back_no_connection_fails() {
    let mode = Mode::Iptables(Variant::Nft);
    swap("sockets-nft", mode, mode, Variant::Nft, EBPF);
}

#[test]
#[ignore = "needs root and eBPF"]
fn from_iptables_legacy_to_the_socket_layer_and_back_no_connection_fails() {
    let mode = Mode::Iptables(Variant::Legacy);
    swap("sockets-legacy", mode, mode, Variant::Legacy, EBPF);
}

#[test]
#[ignore = "needs root and eBPF"]
fn from_nftables_to_the_socket_layer_and_back_to_iptables_no_connection_fails() {
    let after = Mode::Iptables(Variant::Nft);
    swap(
        "sockets-nftables",
        Mode::Nftables,
        after,
        Variant::Nft,
        EBPF,
    );
}

/// kube-proxy removes the rules of iptables before it writes its table; what is done about that is in the documents.
#[test]
#[ignore = "needs root"]
fn back_to_nftables_by_the_documented_way_no_connection_fails() {
    const WAY: &str = include_str!("../../../docs/back-to-nftables.md");
    let variant = Variant::Nft;
    Cluster::run("back-nftables", variant, IPTABLES, |c| {
        let (near, far) = (c.scenario.near.clone(), c.scenario.far.clone());
        let outsider = c.scenario.topology.outsider()?;
        let node = c.scenario.a.clone();
        c.apply(&[&far])?;
        c.scenario.agent.spawn()?;
        c.scenario.agent.wait_ready()?;
        c.wait_served_by(&[&far])?;
        let loads = c.load(&outsider)?;
        let established = c.connect(&outsider)?;

        c.scenario.agent.stop()?;
        let (_, command) = WAY.split_once("```sh\n").context("no command")?;
        let (command, _) = command.split_once("```").context("no end")?;
        node.output("sh", &["-ec", command])?;
        let kube_proxy = KubeProxy::start(&c.control, &node, Mode::Nftables)?;
        c.apply(&[&near])?;
        c.wait_served_by(&[&near])?;
        all_alive(&established, "under kube-proxy")?;
        c.scenario.agent.text(&["cleanup"])?;
        let rules = c.rules(variant)?;
        for ours in ["KUBE-SVC-", "KUBE-SERVICES", "PROXY-AGENT-"] {
            ensure!(!rules.contains(ours), "{ours} in\n{rules}");
        }
        c.wait_served_by(&[&near])?;
        all_alive(&established, "after the clean-up")?;
        assert_none_failed(loads)?;
        kube_proxy.stop()
    });
}
