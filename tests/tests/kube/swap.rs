//! The image is swapped: kube-proxy, the agent, kube-proxy. Connections all the time, and none fails.

use anyhow::ensure;
use proxy_tests::kube::{KubeProxy, Mode, Variant};

use crate::cluster::{Cluster, assert_none_failed};

fn swap(name: &str, before: Mode, after: Mode, variant: Variant) {
    Cluster::run(name, variant, &["--mode", "iptables"], |c| {
        let (near, far) = (c.scenario.near.clone(), c.scenario.far.clone());
        let outsider = c.scenario.topology.outsider()?;
        c.apply(&[&near, &far])?;
        let node = c.scenario.a.clone();
        let kube_proxy = KubeProxy::start(&c.control, &node, before)?;
        c.wait_served_by(&[&near, &far])?;
        let loads = c.load(&outsider)?;

        kube_proxy.stop()?;
        c.scenario.agent.spawn()?;
        c.scenario.agent.wait_ready()?;
        c.apply(&[&far])?;
        c.wait_served_by(&[&far])?;
        c.wait_log("what kube-proxy left is removed")?;
        ensure!(!c.has_nft_table()?, "kube-proxy's table is still there");
        let rules = c.rules(variant)?;
        ensure!(!rules.contains("KUBE-PROXY-CANARY"), "{rules}");

        c.scenario.agent.stop()?;
        let kube_proxy = KubeProxy::start(&c.control, &node, after)?;
        c.apply(&[&near])?;
        c.wait_served_by(&[&near])?;
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
    swap("swap-nft", mode, mode, Variant::Nft);
}

#[test]
#[ignore = "needs root"]
fn from_iptables_legacy_and_back_no_connection_fails() {
    let mode = Mode::Iptables(Variant::Legacy);
    swap("swap-legacy", mode, mode, Variant::Legacy);
}

#[test]
#[ignore = "needs root"]
fn from_nftables_no_connection_fails() {
    let after = Mode::Iptables(Variant::Nft);
    swap("swap-nftables", Mode::Nftables, after, Variant::Nft);
}
