//! From kube-proxy to the agent and back on real nodes, as docs/migrate.md says it under (b).

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, ensure};
use proxy_tests::{
    agent::{METRICS, sum_of},
    scenario::{POD_NETWORKS, SOON},
    wait_for,
};

use super::{
    AGENT, KUBE_PROXY, SYSTEM,
    cluster::{Nodes, Traffic},
};
use crate::{cluster::assert_none_failed, deploy::deploy};

/// Metrics of the agent beside kube-proxy: deploy/overlays/migration/config.conf.
const BESIDE: &str = "127.0.0.1:10265";
const LAST_SYNC: &str = "kubeproxy_sync_proxy_rules_last_timestamp_seconds";

/// The agent comes beside kube-proxy, which is stopped then.
pub fn the_agent_comes(nodes: &Nodes, traffic: &Traffic) -> anyhow::Result<()> {
    let loads = traffic.start()?;
    let folder = own_manifests(nodes)?;
    apply(nodes, &folder, "overlays/migration")?;
    nodes.wait_rolled_out(SYSTEM, AGENT)?;
    let observing = |wanted: f64, what: &str| {
        nodes.machines.iter().try_for_each(|machine| {
            wait_for(what, SOON, || {
                let place = machine.node().place();
                let (_, text) = place.http_get(BESIDE.parse()?, "/metrics")?;
                let observing = sum_of(&text, "proxy_agent_observing", "");
                ensure!(observing == wanted, "proxy_agent_observing: {observing}");
                Ok(())
            })
        })
    };
    observing(1.0, "the agent sees kube-proxy")?;
    let away = r#"{"spec":{"template":{"spec":{"nodeSelector":{"no":"node"}}}}}"#;
    let patch = [SYSTEM, "patch", "daemonset", "kube-proxy", "--patch", away];
    nodes.control.kubectl(&patch)?;
    observing(0.0, "the agent takes over")?;
    apply(nodes, &folder, "overlays/kubeadm")?;
    nodes.wait_rolled_out(SYSTEM, AGENT)?;
    clean_up(nodes, &folder, "cleanup/kube-proxy")?;
    assert_none_failed(loads).context("to the agent")
}

/// kube-proxy comes beside the agent, which is deleted then.
pub fn kube_proxy_comes_back(nodes: &Nodes, traffic: &Traffic) -> anyhow::Result<()> {
    let loads = traffic.start()?;
    let folder = own_manifests(nodes)?;
    // Its clean-up is of this release: so is the agent before it.
    apply(nodes, &folder, "overlays/kubeadm")?;
    nodes.wait_rolled_out(SYSTEM, AGENT)?;
    let back = r#"[{"op":"remove","path":"/spec/template/spec/nodeSelector/no"}]"#;
    let patch = [
        "patch",
        "daemonset",
        "kube-proxy",
        "--type=json",
        "--patch",
        back,
    ];
    nodes.control.kubectl(&[&[SYSTEM][..], &patch].concat())?;
    nodes.wait_rolled_out(SYSTEM, KUBE_PROXY)?;
    for machine in &nodes.machines {
        wait_for("kube-proxy has synced", SOON, || {
            let (_, text) = machine.node().place().http_get(METRICS, "/metrics")?;
            let is_ours = text.contains("proxy_agent_");
            let synced = sum_of(&text, LAST_SYNC, "");
            ensure!(
                !is_ours && synced > 0.0,
                "ours: {is_ours}, synced: {synced}"
            );
            Ok(())
        })?;
    }
    let overlay = folder.join("overlays/kubeadm").display().to_string();
    nodes
        .control
        .kubectl(&["delete", "--kustomize", &overlay])?;
    clean_up(nodes, &folder, "cleanup/own")?;
    assert_none_failed(loads).context("back to kube-proxy")
}

/// A copy of the manifests, with this cluster's networks and what a test may touch.
fn own_manifests(nodes: &Nodes) -> anyhow::Result<PathBuf> {
    let folder = nodes.topology.state_dir().join("deploy");
    if !folder.exists() {
        let copied = Command::new("cp")
            .arg("-r")
            .arg(deploy(""))
            .arg(&folder)
            .status()?;
        ensure!(copied.success(), "the manifests cannot be copied");
        let config = folder.join("overlays/migration/config.conf");
        let text = fs::read_to_string(&config)?;
        let text = text.replace("10.244.0.0/16", POD_NETWORKS);
        let cgroup = Nodes::cgroup()?;
        fs::write(config, format!("{text}  cgroup: {}\n", cgroup.display()))?;
    }
    Ok(folder)
}

fn apply(nodes: &Nodes, folder: &Path, what: &str) -> anyhow::Result<()> {
    let folder = folder.join(what).display().to_string();
    nodes
        .control
        .kubectl(&["apply", "--kustomize", &folder])
        .map(drop)
}

fn clean_up(nodes: &Nodes, folder: &Path, what: &str) -> anyhow::Result<()> {
    apply(nodes, folder, what)?;
    nodes.wait_rolled_out(SYSTEM, "daemonset/proxy-cleanup")?;
    let folder = folder.join(what).display().to_string();
    nodes
        .control
        .kubectl(&["delete", "--kustomize", &folder])
        .map(drop)
}
