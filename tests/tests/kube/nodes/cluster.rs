//! Nodes with containerd and kubelet, and a control plane whose controllers work.

use std::{
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, ensure};
use proxy_tests::{
    Peer, Place, Topology,
    agent::{METRICS, sum_of},
    flannel,
    kube::{ControlPlane, Machine},
    load::{LoadPlan, Talk},
    names,
    peer::Load,
    scenario::POD_NETWORKS,
    topology::SWITCH,
};
use serde_json::{Value, json};

use super::{AGENT, KUBE_PROXY, NODE_PORT, SYSTEM};
use crate::deploy::kubeadms_daemonset;

/// A pod that kubelet has made.
pub struct RealPod {
    pub name: String,
    /// Its node's name.
    pub node: String,
    pub addresses: Vec<IpAddr>,
    /// Among its processes.
    pub peer: Peer,
}

pub struct Nodes {
    // Before the topology in which they run.
    pub machines: Vec<Machine>,
    pub control: ControlPlane,
    pub topology: Topology,
}

impl Nodes {
    pub fn start() -> anyhow::Result<Self> {
        let mut topology = Topology::new("nodes")?;
        let nodes = [topology.node("node-a")?, topology.node("node-b")?];
        let control = ControlPlane::start_with_controllers(&topology)?;
        let mut machines = Vec::new();
        for node in &nodes {
            flannel::make_rules(node)?;
            machines.push(Machine::start(&control, node)?);
        }
        Ok(Self {
            machines,
            control,
            topology,
        })
    }

    /// Where the agent's pod finds what a test may touch: the node's part of cgroup v2.
    pub fn cgroup() -> anyhow::Result<PathBuf> {
        let root = names::cgroup2_root()?;
        Ok(Path::new("/host/cgroup").join(root.strip_prefix("/sys/fs/cgroup")?))
    }

    /// What kubeadm has made before anybody thinks of another proxy (cmd/kubeadm/app/phases/addons/proxy, v1.36).
    pub fn apply_kubeadms_kube_proxy(&self) -> anyhow::Result<()> {
        let cgroup = Self::cgroup()?;
        let account = "/var/run/secrets/kubernetes.io/serviceaccount";
        let config = json!({
            "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
            "kind": "KubeProxyConfiguration",
            "bindAddress": "0.0.0.0",
            "clientConnection": {"kubeconfig": "/var/lib/kube-proxy/kubeconfig.conf"},
            "clusterCIDR": POD_NETWORKS,
            // Nobody may set the limit from inside a network namespace.
            "conntrack": {"maxPerCore": 0},
            "mode": "",
            "proxyAgent": {"cgroup": cgroup},
        });
        let kubeconfig = json!({
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "default", "cluster": {
                "certificate-authority": format!("{account}/ca.crt"),
                "server": format!("https://{SWITCH}:6443"),
            }}],
            "contexts": [{"name": "default", "context": {"cluster": "default", "user": "default"}}],
            "current-context": "default",
            "users": [{"name": "default", "user": {"tokenFile": format!("{account}/token")}}],
        });
        let map = json!({
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {"name": "kube-proxy", "namespace": "kube-system"},
            "data": {"config.conf": config.to_string(), "kubeconfig.conf": kubeconfig.to_string()},
        });
        let who = json!({
            "apiVersion": "v1",
            "kind": "ServiceAccount",
            "metadata": {"name": "kube-proxy", "namespace": "kube-system"},
        });
        let rights = json!({
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "ClusterRoleBinding",
            "metadata": {"name": "kubeadm:node-proxier"},
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "system:node-proxier"},
            "subjects": [{"kind": "ServiceAccount", "name": "kube-proxy", "namespace": "kube-system"}],
        });
        let items = [map, who, rights, kubeadms_daemonset()];
        let list = json!({"apiVersion": "v1", "kind": "List", "items": items});
        self.control.apply_manifests(&list.to_string())?;
        self.wait_rolled_out(SYSTEM, KUBE_PROXY)
    }

    pub fn wait_rolled_out(&self, namespace: &str, what: &str) -> anyhow::Result<()> {
        let args = [namespace, "rollout", "status", what, "--timeout=180s"];
        let said = self.control.kubectl(&args);
        said.map(drop).with_context(|| self.state())
    }

    /// What there is, for messages.
    pub fn state(&self) -> String {
        let show = |args: &[&str]| {
            let said = self.control.kubectl(args);
            said.unwrap_or_else(|error| format!("{error:#}"))
        };
        let pods = show(&["get", "pods", "--all-namespaces", "--output=wide"]);
        let events = show(&["get", "events", "--all-namespaces"]);
        let log = ["logs", AGENT, "--all-containers", "--all-pods", "--tail=40"];
        let log = show(&[&[SYSTEM][..], &log].concat());
        format!("{pods}\n{events}\n{log}")
    }

    /// The pods that carry this label, on the nodes in their order.
    pub fn pods(&self, namespace: &str, label: &str) -> anyhow::Result<Vec<Value>> {
        let args = [
            namespace,
            "get",
            "pods",
            "--output=json",
            "--selector",
            label,
        ];
        let list: Value = serde_json::from_str(&self.control.kubectl(&args)?)?;
        let mut pods = list["items"].as_array().cloned().unwrap_or_default();
        pods.sort_by_key(|pod| pod["spec"]["nodeName"].to_string());
        ensure!(pods.len() == self.machines.len(), "{pods:#?}");
        Ok(pods)
    }

    pub fn processes(&self, pod: &Value) -> anyhow::Result<Vec<i32>> {
        let node = pod["spec"]["nodeName"].as_str();
        let machine = self.machines.iter().find(|m| node == Some(m.node().name()));
        let uid = pod["metadata"]["uid"].as_str().context("a pod has an id")?;
        machine.context("a pod has a node")?.processes(uid)
    }

    /// The same, with a helper among the processes of each.
    pub fn enter(&self, label: &str) -> anyhow::Result<Vec<RealPod>> {
        let mut found = Vec::new();
        for (pod, machine) in self
            .pods("--namespace=default", label)?
            .iter()
            .zip(&self.machines)
        {
            let name = pod["metadata"]["name"].as_str().context("no name")?;
            let process = self.processes(pod)?[0];
            let place = Place {
                netns: PathBuf::from(format!("/proc/{process}/ns/net")),
                ..machine.node().place_in(name)?
            };
            let addresses = pod["status"]["podIPs"].as_array().into_iter().flatten();
            let addresses = addresses.filter_map(|ip| ip["ip"].as_str()?.parse().ok());
            found.push(RealPod {
                name: name.to_owned(),
                node: machine.node().name().to_owned(),
                addresses: addresses.collect(),
                peer: Peer::start(&place)?,
            });
        }
        Ok(found)
    }

    /// What curl prints in the pod, of a connection for each of these addresses.
    pub fn get(&self, pod: &RealPod, what: &[&str]) -> anyhow::Result<String> {
        let curl = ["curl", "--silent", "--show-error", "--max-time", "5"];
        let anew = ["--header", "Connection: close"];
        let args = [&["exec", &pod.name, "--"][..], &curl, &anew, what].concat();
        self.control.kubectl(&args).with_context(|| self.state())
    }

    /// Connections of a node that its socket layer left alone because somebody had asked for it.
    pub fn opted_out(&self, node: &str) -> anyhow::Result<f64> {
        let machine = self.machines.iter().find(|m| m.node().name() == node);
        let place = machine.context("no such node")?.node().place();
        let (_, text) = place.http_get(METRICS, "/metrics")?;
        let labels = "reason=\"opted_out\"";
        Ok(sum_of(&text, "proxy_agent_passed_total", labels))
    }

    /// The Service's addresses.
    pub fn vips(&self, service: &str) -> anyhow::Result<Vec<IpAddr>> {
        let args = ["get", "service", service, "--output=json"];
        let service: Value = serde_json::from_str(&self.control.kubectl(&args)?)?;
        let vips = service["spec"]["clusterIPs"]
            .as_array()
            .into_iter()
            .flatten();
        Ok(vips.filter_map(|vip| vip.as_str()?.parse().ok()).collect())
    }
}

/// Connections all the time: from both nodes' pods, a node, and a machine outside.
pub struct Traffic<'a> {
    pub clients: &'a [RealPod],
    pub nodes: &'a Nodes,
    pub outsider: Peer,
    /// The ClusterIPs of `web`.
    pub vips: Vec<SocketAddr>,
}

impl Traffic<'_> {
    pub fn start(&self) -> anyhow::Result<Vec<(&'static str, Load)>> {
        let node = self.nodes.machines[0].node();
        let at_nodes = self.nodes.machines.iter().flat_map(|machine| {
            let node = machine.node();
            [false, true].map(|v6| SocketAddr::new(node.address(v6), NODE_PORT))
        });
        let at_nodes: Vec<_> = at_nodes.collect();
        let everywhere = [&self.vips[..], &at_nodes].concat();
        let loads = [
            (
                "pod of node-a",
                self.clients[0].peer.clone(),
                everywhere.clone(),
            ),
            (
                "pod of node-b",
                self.clients[1].peer.clone(),
                everywhere.clone(),
            ),
            ("node-a", node.peer()?, everywhere),
            ("outside", self.outsider.clone(), at_nodes),
        ];
        let start = |(name, client, targets): (_, Peer, _)| {
            let plan = LoadPlan {
                pause: Duration::from_millis(2),
                ..LoadPlan::new(Talk::Tcp, targets)
            };
            anyhow::Ok((name, client.start_load(plan)?))
        };
        loads.into_iter().map(start).collect()
    }
}
