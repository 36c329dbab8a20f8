//! The agent as its pod runs it: from the image, which is read-only, with the rights of the DaemonSet and no others, and an
//! API server that it has to find by name.

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{Child, Stdio},
};

use anyhow::{Context, ensure};
use proxy_tests::{
    Node,
    kube::{KUBE_PROXY, Variant},
    topology::SWITCH,
};
use serde_json::json;

use crate::cluster::{Cluster, assert_none_failed};

const NAME: &str = "api.example.test";
/// Those of deploy/base/daemonset.yaml.
pub const CAPABILITIES: [&str; 6] = [
    "bpf",
    "net_admin",
    "net_raw",
    "perfmon",
    "sys_admin",
    "sys_ptrace",
];

/// The DNS server of a node.
struct Dns(Child);

impl Dns {
    /// Knows the API server.
    fn start(node: &Node) -> anyhow::Result<Self> {
        let mut command = node.place().dns_server()?;
        command.args(["--listen-address=127.0.0.1", "--bind-interfaces"]);
        command.arg(format!("--address=/{NAME}/{SWITCH}"));
        command.stdin(Stdio::null()).stderr(Stdio::null());
        Ok(Self(command.spawn().context("cannot start dnsmasq")?))
    }
}

impl Drop for Dns {
    fn drop(&mut self) {
        // Gone already: nothing to do.
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

/// A program that becomes the agent in its image; the state of the test is mounted where it is outside.
fn wrapper(state: &Path, command: &str) -> anyhow::Result<PathBuf> {
    let image =
        std::env::var_os("PROXY_ROOTFS").context("no PROXY_ROOTFS: run cargo xtask test")?;
    let image = Path::new(&image).display();
    let capabilities = CAPABILITIES.map(|name| format!(",+{name}")).concat();
    let folder = state.display();
    let script = format!(
        r#"#!/bin/sh
exec unshare --mount sh -e -c '
R={image}
mount --bind $R $R
mount -t tmpfs none $R/tmp
mount -t tmpfs none $R/etc
mount -t tmpfs none $R/run
mkdir -p $R{folder} $R/run/netns
echo nameserver 127.0.0.1 > $R/etc/resolv.conf
touch $R/run/xtables.lock
mount --bind {folder} $R{folder}
mount --rbind /run/netns $R/run/netns
mount --bind /run/xtables.lock $R/run/xtables.lock
mount --rbind /proc $R/proc
mount --rbind /sys $R/sys
mount --rbind /dev $R/dev
mount -o remount,bind,ro $R
exec setpriv --no-new-privs --bounding-set=-all,+sys_chroot{capabilities} chroot $R {command} "$@"
' sh "$@"
"#
    );
    let path = state.join("in-its-image");
    fs::write(&path, script)?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
    Ok(path)
}

fn serves_from_its_image(mode: &str) {
    let name = format!("pod-{mode}");
    Cluster::run(&name, Variant::Nft, &[], |c| {
        let (near, far) = (c.scenario.near.clone(), c.scenario.far.clone());
        let node = c.scenario.a.clone();
        let outsider = c.scenario.topology.outsider()?;
        let state = c.scenario.topology.state_dir();
        c.control.apply_node(&node)?;
        c.apply(&[&near])?;
        let _dns = Dns::start(&node)?;
        // One that proves who it is, and one that need not: there are no authorities in the image.
        let kubeconfig = match mode {
            "ebpf" => c
                .control
                .kubeconfig_at(KUBE_PROXY, &format!("https://{NAME}:6443"))?,
            _ => c.control.kubeconfig_of(KUBE_PROXY)?,
        };
        let config = json!({
            "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
            "kind": "KubeProxyConfiguration",
            "clusterCIDR": "10.244.0.0/16,fd00:10:244::/48",
            "clientConnection": {"kubeconfig": kubeconfig},
            "iptables": {"minSyncPeriod": "100ms"},
            "conntrack": {"maxPerCore": 0},
            "proxyAgent": {"mode": mode, "bpfDir": node.bpf_dir(), "cgroup": node.cgroup()},
        });
        let path = state.join("config.conf");
        fs::write(&path, config.to_string())?;
        c.scenario.agent.read_config(&path);
        c.scenario
            .agent
            .use_binary(&wrapper(&state, "/usr/local/bin/kube-proxy")?);
        c.scenario.agent.spawn()?;
        c.scenario.agent.wait_ready()?;
        c.wait_served_by(&[&near])?;
        let loads = c.load(&outsider)?;
        c.apply(&[&far])?;
        c.wait_served_by(&[&far])?;
        c.scenario.agent.kill9()?;
        c.scenario.agent.spawn()?;
        c.scenario.agent.wait_ready()?;
        c.apply(&[&near, &far])?;
        c.wait_served_by(&[&near, &far])?;
        assert_none_failed(loads)?;
        // Nothing was beyond its rights.
        let log = c.scenario.agent.log();
        let troubles = log
            .lines()
            .filter(|line| line.contains("ERROR") || line.contains("Operation not permitted"));
        let troubles: Vec<_> = troubles.collect();
        ensure!(troubles.is_empty(), "{troubles:#?}");
        c.scenario.agent.stop()
    });
}

#[test]
#[ignore = "needs root and eBPF"]
fn the_socket_layer_serves_from_its_image_with_the_rights_of_its_pod() {
    serves_from_its_image("ebpf");
}

#[test]
#[ignore = "needs root"]
fn rules_alone_serve_from_the_image_with_the_rights_of_the_pod() {
    serves_from_its_image("iptables");
}
