//! A node as a machine: containerd and kubelet in namespaces of their own, which make pods out of Pod objects.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, ensure};
use serde_json::{Value, json};

use super::{Component, ControlPlane, client::Request, namespaces::Namespaces, tool};
use crate::{Node, scenario::SOON, wait_for};

/// The images, as `cargo xtask test` makes them.
const IMAGES: &str = "PROXY_IMAGES";
/// Where the programs of the Container Network Interface are.
const CNI: &str = "/usr/lib/cni";
/// Where the machine's programs find the runtime.
const RUNTIME: &str = "/run/containerd/containerd.sock";
/// Address of the cluster's DNS, and its domain.
const DNS: (&str, &str) = ("10.96.0.10", "cluster.local");

/// A node with a container runtime and a kubelet. Its files are the host's, except for /run, bpffs, cgroups and state.
///
/// What it starts ends with the topology.
#[derive(Debug)]
pub struct Machine {
    node: Node,
    // The kubelet goes before what it asks.
    _kubelet: Component,
    _containerd: Component,
    _inside: Namespaces,
}

impl Machine {
    /// Makes the Node object, and starts both; returns when the node is ready.
    ///
    /// # Errors
    /// A program is missing, or does not start.
    pub fn start(control: &ControlPlane, node: &Node) -> anyhow::Result<Self> {
        let dir = node.state_dir().join(format!("machine-{}", node.name()));
        fs::create_dir_all(&dir)?;
        let inside = Namespaces::make(node, &dir)?;
        let containerd = start_containerd(&inside, node, &dir)?;
        import_images(&inside)?;
        register(control, node)?;
        let kubelet = start_kubelet(&inside, control, node, &dir)?;
        let name = format!("node/{}", node.name());
        control.kubectl(&["wait", "--for=condition=Ready", &name, "--timeout=120s"])?;
        Ok(Self {
            node: node.clone(),
            _kubelet: kubelet,
            _containerd: containerd,
            _inside: inside,
        })
    }

    /// The processes of the pod with this unique id.
    ///
    /// # Errors
    /// It has none.
    pub fn processes(&self, uid: &str) -> anyhow::Result<Vec<i32>> {
        let wanted = format!("pod{uid}");
        let mut found = Vec::new();
        let mut folders = vec![(self.node.cgroup(), false)];
        while let Some((folder, is_inside)) = folders.pop() {
            let is_inside = is_inside || folder.ends_with(&wanted);
            if is_inside {
                let processes = fs::read_to_string(folder.join("cgroup.procs"))?;
                found.extend(
                    processes
                        .lines()
                        .filter_map(|line| line.parse::<i32>().ok()),
                );
            }
            let below = fs::read_dir(&folder)?.flatten().map(|entry| entry.path());
            folders.extend(
                below
                    .filter(|path| path.is_dir())
                    .map(|path| (path, is_inside)),
            );
        }
        ensure!(
            !found.is_empty(),
            "{}: no process of pod {uid}",
            self.node.name()
        );
        Ok(found)
    }

    /// The node.
    pub fn node(&self) -> &Node {
        &self.node
    }
}

/// Says which network of pods is this node's, before its kubelet comes.
fn register(control: &ControlPlane, node: &Node) -> anyhow::Result<()> {
    let (name, networks) = (node.name(), pod_networks(node));
    let object = json!({
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": name},
        "spec": {"podCIDR": networks[0], "podCIDRs": networks},
    });
    let path = format!("/api/v1/nodes/{name}");
    control
        .client
        .send(&[Request::apply(&path, object)])
        .map(drop)
}

fn pod_networks(node: &Node) -> [String; 2] {
    let number = node.number();
    [
        format!("10.244.{number}.0/24"),
        format!("fd00:10:244:{number}::/64"),
    ]
}

fn start_containerd(inside: &Namespaces, node: &Node, dir: &Path) -> anyhow::Result<Component> {
    let networks = dir.join("cni");
    fs::create_dir_all(&networks)?;
    fs::write(
        networks.join("10-bridge.conflist"),
        network(node, dir).to_string(),
    )?;
    let (state, networks) = (dir.join("containerd"), networks.display());
    let config = format!(
        r#"version = 2
root = "{}"
state = "/run/containerd"
[grpc]
address = "{RUNTIME}"
[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "registry.k8s.io/pause:3.10"
# Not every root may give processes a better score.
restrict_oom_score_adj = true
[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "{CNI}"
conf_dir = "{networks}"
"#,
        state.display()
    );
    let file = dir.join("containerd.toml");
    fs::write(&file, config)?;
    let mut command = inside.command("containerd")?;
    command.arg("--config").arg(file);
    Component::spawn("containerd", command, &dir.join("containerd.log"))
}

/// Pods on the bridge that the topology made, with addresses that it has not given away.
fn network(node: &Node, dir: &Path) -> Value {
    let [four, six] = pod_networks(node);
    let number = node.number();
    let ranges = json!([
        [{"subnet": four, "rangeStart": format!("10.244.{number}.100")}],
        [{"subnet": six, "rangeStart": format!("fd00:10:244:{number}::100")}],
    ]);
    json!({
        "cniVersion": "0.4.0",
        "name": "pods",
        "plugins": [{
            "type": "bridge",
            "bridge": "cni0",
            "isDefaultGateway": true,
            "hairpinMode": true,
            "mtu": 1430,
            "ipam": {"type": "host-local", "dataDir": dir.join("addresses"), "ranges": ranges},
        }],
    })
}

fn import_images(inside: &Namespaces) -> anyhow::Result<()> {
    let folder = std::env::var_os(IMAGES).context("no PROXY_IMAGES: run cargo xtask test")?;
    let mut files: Vec<PathBuf> = Vec::new();
    for entry in fs::read_dir(folder)? {
        files.push(entry?.path());
    }
    let ctr = |args: &[&str]| -> anyhow::Result<()> {
        let mut command: Command = inside.command("ctr")?;
        command.args(["--address", RUNTIME, "--namespace", "k8s.io"]);
        let output = command.args(args).output()?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "ctr {args:?}: {said}");
        Ok(())
    };
    wait_for("containerd answers", SOON, || ctr(&["version"]))?;
    for file in files {
        ctr(&["images", "import", &file.display().to_string()])?;
    }
    Ok(())
}

fn start_kubelet(
    inside: &Namespaces,
    control: &ControlPlane,
    node: &Node,
    dir: &Path,
) -> anyhow::Result<Component> {
    let file = |name: &str| dir.join(name).display().to_string();
    // Pods that ask the node's own servers find none.
    fs::write(file("resolv.conf"), "")?;
    let config = json!({
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "authentication": {"anonymous": {"enabled": true}, "webhook": {"enabled": false}},
        "authorization": {"mode": "AlwaysAllow"},
        "cgroupDriver": "cgroupfs",
        "clusterDNS": [DNS.0],
        "clusterDomain": DNS.1,
        "containerRuntimeEndpoint": format!("unix://{RUNTIME}"),
        "enforceNodeAllocatable": [],
        "evictionHard": {"nodefs.available": "0%", "imagefs.available": "0%"},
        "failCgroupV1": false,
        "failSwapOn": false,
        "imageGCHighThresholdPercent": 100,
        "podLogsDir": file("logs"),
        "resolvConf": file("resolv.conf"),
        "volumePluginDir": file("volume-plugins"),
    });
    fs::write(file("kubelet.yaml"), config.to_string())?;
    let mut command = inside.command(tool("kubelet")?)?;
    command.arg("--kubeconfig").arg(control.kubeconfig()?);
    command.args(["--config", &file("kubelet.yaml")]);
    command.args(["--root-dir", &file("kubelet")]);
    command.args(["--hostname-override", node.name()]);
    command.args(["--node-ip", &format!("{},{}", node.v4(), node.v6())]);
    Component::spawn("kubelet", command, &dir.join("kubelet.log"))
}
