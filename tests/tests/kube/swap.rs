//! The image is swapped: kube-proxy, the agent, kube-proxy. Connections all the time, and none fails.

use anyhow::{Context, ensure};
use proxy_tests::{
    kube::{KubeProxy, Mode, Variant},
    peer::Socket,
};
use serde_json::{Value, json};

use crate::cluster::{Cluster, assert_none_failed};

/// The agent's own mode: iptables, whatever kube-proxy's is.
fn iptables() -> Value {
    json!({"mode": "iptables"})
}

/// A short lease: its end is part of the way back.
fn ebpf() -> Value {
    json!({"mode": "ebpf", "socketLease": "3s"})
}

/// Asserts that connections which were made before are still answered.
fn all_alive(established: &[(&'static str, Socket)], when: &str) -> anyhow::Result<()> {
    for (client, connection) in established {
        let answer = connection.ask();
        answer.with_context(|| format!("a connection of the {client}, {when}"))?;
    }
    Ok(())
}

/// By one configuration, as if nothing but the image of the DaemonSet changed; `own` is what only the agent reads in it.
fn swap(name: &str, before: Mode, after: Mode, variant: Variant, own: &Value) {
    Cluster::run(name, variant, &[], |c| {
        let (near, far) = (c.scenario.near.clone(), c.scenario.far.clone());
        let outsider = c.scenario.topology.outsider()?;
        c.apply(&[&near, &far])?;
        let node = c.scenario.a.clone();
        let kube_proxy = KubeProxy::start_sharing(&c.control, &node, before, own.clone())?;
        c.wait_served_by(&[&near, &far])?;
        let loads = c.load(&outsider)?;
        let mut established = c.connect(&outsider)?;

        c.scenario.agent.read_config(kube_proxy.config());
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
        let kube_proxy = KubeProxy::start_sharing(&c.control, &node, after, own.clone())?;
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
    swap("swap-nft", mode, mode, Variant::Nft, &iptables());
}

#[test]
#[ignore = "needs root"]
fn from_iptables_legacy_and_back_no_connection_fails() {
    let mode = Mode::Iptables(Variant::Legacy);
    swap("swap-legacy", mode, mode, Variant::Legacy, &iptables());
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
        &iptables(),
    );
}

#[test]
#[ignore = "needs root and eBPF"]
fn from_iptables_nft_to_the_socket_layer_and_back_no_connection_fails() {
    let mode = Mode::Iptables(Variant::Nft);
    swap("sockets-nft", mode, mode, Variant::Nft, &ebpf());
}

#[test]
#[ignore = "needs root and eBPF"]
fn from_iptables_legacy_to_the_socket_layer_and_back_no_connection_fails() {
    let mode = Mode::Iptables(Variant::Legacy);
    swap("sockets-legacy", mode, mode, Variant::Legacy, &ebpf());
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
        &ebpf(),
    );
}

/// kube-proxy removes the rules of iptables before it writes its table; what is done about that is in the documents.
#[test]
#[ignore = "needs root"]
fn back_to_nftables_by_the_documented_way_no_connection_fails() {
    const WAY: &str = include_str!("../../../docs/back-to-nftables.md");
    let variant = Variant::Nft;
    Cluster::run("back-nftables", variant, &["--mode", "iptables"], |c| {
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
