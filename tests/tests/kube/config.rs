//! One configuration for kube-proxy and for the agent: each reads what the other writes.

use std::{
    fs,
    path::Path,
    process::{Command, Output},
};

use anyhow::ensure;
use proxy_tests::{
    agent::agent_binary,
    kube::{KubeProxy, Mode, Variant, tool},
};
use serde_json::{Value, json};

use crate::cluster::Cluster;

/// Has the program read one file and write another; what it said.
fn rewrite(program: &Path, from: &Path, to: &Path) -> anyhow::Result<String> {
    let file = |flag: &str, path: &Path| format!("{flag}={}", path.display());
    let output = Command::new(program)
        .args([file("--config", from), file("--write-config-to", to)])
        .output()?;
    let said = said(&output);
    ensure!(output.status.success(), "{}: {said}", program.display());
    Ok(said)
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// What was written, without the sections that this mode does not read: they go back to their defaults.
fn in_force(file: &Path, mode: &str) -> anyhow::Result<Value> {
    let mut value: Value = serde_yaml_ng::from_str(&fs::read_to_string(file)?)?;
    if let Some(fields) = value.as_object_mut() {
        fields.remove(match mode {
            "nftables" => "iptables",
            _ => "nftables",
        });
    }
    Ok(value)
}

#[test]
#[ignore = "needs kube-proxy"]
fn what_kube_proxy_writes_the_agent_reads_and_the_other_way_round() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let path = |name: &str| folder.path().join(name);
    let (kube_proxy, agent) = (tool("kube-proxy")?, agent_binary()?);
    for mode in ["", "iptables", "ipvs", "nftables"] {
        let config = json!({
            "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
            "kind": "KubeProxyConfiguration",
            "mode": mode,
            "ipvs": {"excludeCIDRs": []},
            "bindAddress": "fd00::1",
            "clusterCIDR": "10.244.0.0/16,fd00:10:244::/56",
            "clientConnection": {"kubeconfig": "/k"},
            "iptables": {"masqueradeAll": true, "masqueradeBit": 3, "localhostNodePorts": false},
            "nftables": {"masqueradeAll": true, "minSyncPeriod": "1500ms"},
            "nodePortAddresses": ["10.0.0.0/8"],
            "oomScoreAdj": -1,
            "conntrack": {"udpTimeout": "90s", "maxPerCore": 0},
            "logging": {"format": "json", "verbosity": 4},
        });
        fs::write(path("given"), config.to_string())?;
        rewrite(&kube_proxy, &path("given"), &path("its"))?;
        let notes = rewrite(&agent, &path("its"), &path("ours"))?;
        ensure!(!notes.contains("no effect"), "{notes}");
        let notes = rewrite(&kube_proxy, &path("ours"), &path("its-again"))?;
        // Only our own field is strange to it.
        ensure!(
            notes.matches("unknown field").count() == 1 && notes.contains("proxyAgent"),
            "{notes}"
        );
        let (before, after) = (
            in_force(&path("its"), mode)?,
            in_force(&path("its-again"), mode)?,
        );
        assert_eq!(before, after, "mode {mode:?}");
    }
    Ok(())
}

#[test]
#[ignore = "needs root"]
fn run_cleanup_removes_what_kube_proxy_left_in_any_mode() {
    for (name, mode, variant) in [
        ("clean-nft", Mode::Iptables(Variant::Nft), Variant::Nft),
        (
            "clean-legacy",
            Mode::Iptables(Variant::Legacy),
            Variant::Legacy,
        ),
        ("clean-nftables", Mode::Nftables, Variant::Nft),
    ] {
        Cluster::run(name, variant, &[], |c| {
            let near = c.scenario.near.clone();
            c.apply(&[&near])?;
            let node = c.scenario.a.clone();
            let kube_proxy = KubeProxy::start(&c.control, &node, mode)?;
            c.wait_served_by(&[&near])?;
            let refused = c.scenario.agent.run(&["run", "--cleanup"])?;
            ensure!(
                refused.status.code() == Some(1)
                    && said(&refused).contains("another proxy serves this node"),
                "{refused:?}"
            );
            c.wait_served_by(&[&near])?;
            kube_proxy.kill9()?;
            c.scenario.agent.text(&["run", "--cleanup=true"])?;
            let rules = c.rules(variant)?;
            // Two that are kubelet's too: both proxies leave them.
            let is_kubelets =
                |line: &&str| line.contains("KUBE-IPTABLES-HINT") || line.contains("KUBE-FIREWALL");
            let left = rules.lines().filter(|line| line.contains("KUBE-"));
            let left: Vec<_> = left.filter(|line| !is_kubelets(line)).collect();
            ensure!(left.is_empty(), "{left:#?}");
            ensure!(!c.has_nft_table()?);
            Ok(())
        });
    }
}
