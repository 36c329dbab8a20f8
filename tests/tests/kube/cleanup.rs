//! `cleanup --kube-proxy` beside the agent cuts nobody's traffic. `cleanup` beside kube-proxy: `migration`.

use std::process::Output;

use anyhow::ensure;
use proxy_tests::kube::{KubeProxy, Mode, Variant};

use crate::cluster::{Cluster, assert_none_failed};

const ARGS: [&str; 2] = ["--mode", "iptables"];
/// What ipvs mode would have left, in part: it does not run on every kernel.
const IPVS: &str = "*filter
:KUBE-IPVS-FILTER - [0:0]
:KUBE-NODE-PORT - [0:0]
-A INPUT -m comment --comment \"kubernetes ipvs access filter\" -j KUBE-IPVS-FILTER
-A KUBE-IPVS-FILTER -m set --match-set KUBE-IPVS-IPS dst -j RETURN
COMMIT
";
/// As a network policy of somebody else.
const FOREIGN: &str = "*filter
:KUBE-ROUTER-INPUT - [0:0]
-A INPUT -j KUBE-ROUTER-INPUT
-A KUBE-ROUTER-INPUT -d 192.0.2.7/32 -j RETURN
COMMIT
";

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Feeds `text` to `iptables-restore --noflush`.
fn restore(c: &Cluster, variant: Variant, text: &str) -> anyhow::Result<()> {
    let file = c.scenario.topology.state_dir().join("rules");
    std::fs::write(&file, text)?;
    let tool = format!("iptables-{}-restore", variant.name());
    let file = file.display().to_string();
    c.scenario
        .a
        .output(&tool, &["--noflush", "-w", "10", &file])?;
    Ok(())
}

#[test]
#[ignore = "needs root"]
fn cleanup_of_kube_proxys_leftovers_cuts_nothing_of_ours() {
    for variant in [Variant::Nft, Variant::Legacy] {
        Cluster::run("leftovers", variant, &ARGS, |c| {
            let (near, far) = (c.scenario.near.clone(), c.scenario.far.clone());
            let outsider = c.scenario.topology.outsider()?;
            c.apply(&[&near, &far])?;
            let node = c.scenario.a.clone();
            // Nothing else serves the node: not to be removed.
            let kube_proxy = KubeProxy::start(&c.control, &node, Mode::Iptables(variant))?;
            c.wait_served_by(&[&near, &far])?;
            kube_proxy.kill9()?;
            let refused = c.scenario.agent.run(&["cleanup", "--kube-proxy"])?;
            ensure!(
                said(&refused).contains("would cut its traffic"),
                "{refused:?}"
            );
            c.wait_served_by(&[&near, &far])?;

            c.scenario.agent.spawn()?;
            c.scenario.agent.wait_ready()?;
            c.wait_log("what kube-proxy left is removed")?;
            let loads = c.load(&outsider)?;
            node.output("ipset", &["create", "KUBE-IPVS-IPS", "hash:ip"])?;
            restore(c, variant, IPVS)?;
            restore(c, variant, FOREIGN)?;
            let done = c.scenario.agent.run(&["cleanup", "--kube-proxy"])?;
            ensure!(done.status.success(), "{done:?}");
            for what in [
                "chain filter KUBE-IPVS-FILTER",
                "chain filter KUBE-NODE-PORT",
                "set KUBE-IPVS-IPS",
            ] {
                ensure!(said(&done).contains(what), "no {what} in {done:?}");
            }
            let rules = c.rules(variant)?;
            ensure!(
                !rules.contains("IPVS") && !rules.contains("KUBE-NODE-PORT"),
                "{rules}"
            );
            ensure!(
                rules.contains("KUBE-ROUTER-INPUT") && rules.contains("PROXY-AGENT-"),
                "{rules}"
            );

            // Without an agent, what it would have taken away itself.
            c.scenario.agent.stop()?;
            node.output("nft", &["add", "table", "ip6", "kube-proxy"])?;
            restore(c, variant, "*mangle\n:KUBE-PROXY-CANARY - [0:0]\nCOMMIT\n")?;
            let done = c.scenario.agent.run(&["cleanup", "--kube-proxy"])?;
            ensure!(done.status.success(), "{done:?}");
            ensure!(!c.has_nft_table()? && !c.rules(variant)?.contains("KUBE-PROXY-CANARY"));
            c.wait_served_by(&[&near, &far])?;
            assert_none_failed(loads)
        });
    }
}
