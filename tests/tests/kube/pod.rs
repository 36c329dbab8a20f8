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
    agent::{HEALTHZ, METRICS},
    kube::{KUBE_PROXY, Variant},
    scenario::SOON,
    topology::SWITCH,
    wait_for,
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

/// A program that becomes the agent in its image; the state of the test is mounted where it is outside. It runs in new
/// `namespaces`, and `undo` is what the shell does, before the agent starts, to what the pod has mounted at $R.
fn wrapper(state: &Path, command: &str, namespaces: &str, undo: &str) -> anyhow::Result<PathBuf> {
    let image =
        std::env::var_os("PROXY_ROOTFS").context("no PROXY_ROOTFS: run cargo xtask test")?;
    let image = Path::new(&image).display();
    let capabilities = CAPABILITIES.map(|name| format!(",+{name}")).concat();
    let folder = state.display();
    let script = format!(
        r#"#!/bin/sh
exec unshare {namespaces} sh -e -c '
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
{undo}
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
        c.scenario.agent.use_binary(&wrapper(
            &state,
            "/usr/local/bin/kube-proxy",
            "--mount",
            "",
        )?);
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

/// What the agent does without a mount of its DaemonSet.
struct Missing {
    mount: &'static str,
    undo: &'static str,
    /// The layers that serve, and what names the mount: the reason for them, or the log.
    layers: [&'static str; 2],
    named: &'static str,
}

const MISSING: [Missing; 5] = [
    Missing {
        mount: "bpffs",
        undo: "umount --lazy $R/sys/fs/bpf",
        layers: ["off", "iptables"],
        named: "/sys/fs/bpf",
    },
    // As under a profile of AppArmor.
    Missing {
        mount: "bpffs, to write",
        undo: "mount -o remount,bind,ro $R/sys/fs/bpf",
        layers: ["off", "iptables"],
        named: "/sys/fs/bpf",
    },
    Missing {
        mount: "cgroup",
        undo: "umount --recursive --lazy $R/sys/fs/cgroup",
        layers: ["off", "iptables"],
        named: "cgroup",
    },
    Missing {
        mount: "netns",
        undo: "umount --lazy $R/run/netns; rmdir $R/run/netns",
        layers: ["ebpf", "iptables"],
        named: "/run/netns",
    },
    // The legacy tools do nothing without it: the agent is not ready, and goes on trying.
    Missing {
        mount: "xtables-lock",
        undo: "umount $R/run/xtables.lock; rm $R/run/xtables.lock; mount -o remount,ro $R/run",
        layers: ["ebpf", "iptables"],
        named: "can't open lock file /run/xtables.lock",
    },
];

#[test]
#[ignore = "needs root and eBPF"]
fn a_missing_mount_costs_what_needs_it_and_is_named() {
    let args = ["--iptables-sync-period=1s"];
    Cluster::run("pod-mounts", Variant::Legacy, &args, |c| {
        let near = c.scenario.near.clone();
        let state = c.scenario.topology.state_dir();
        c.apply(&[&near])?;
        for Missing {
            mount,
            undo,
            layers,
            named,
        } in MISSING
        {
            // As in a pod, which sees no processes but its own.
            let namespaces = "--mount --pid --fork --kill-child";
            let undo =
                format!("umount --recursive --lazy $R/proc; mount -t proc proc $R/proc; {undo}");
            let binary = wrapper(&state, "/usr/local/bin/proxy-agent", namespaces, &undo)?;
            c.scenario.agent.use_binary(&binary);
            let before = c.scenario.agent.log().len();
            c.scenario.agent.spawn()?;
            let place = c.scenario.a.place();
            wait_for("the agent has begun", SOON, || {
                let (status, body) = place.http_get(HEALTHZ, "/readyz")?;
                ensure!(status == 200 || body.contains(named), "{mount}: {body}");
                Ok(())
            })?;
            c.wait_served_by(&[&near]).context(mount)?;
            let [socket, packet] = layers;
            let (_, text) = place.http_get(METRICS, "/metrics")?;
            let mode = text
                .lines()
                .find(|line| line.starts_with("proxy_agent_mode_info"));
            let mode = mode.context("no mode")?;
            let served = format!("socket=\"{socket}\",packet=\"{packet}\"");
            ensure!(mode.contains(&served), "{mount}: {mode}");
            let log = c.scenario.agent.log();
            println!("{mount}: {mode}");
            ensure!(log[before..].contains(named), "{mount}: {log}");
            c.scenario.agent.kill9()?;
        }
        Ok(())
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
