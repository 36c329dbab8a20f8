//! etcd and the API server, at the address of the topology's switch.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::PathBuf,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use anyhow::Context;
use jiff::Timestamp;
use serde_json::{Value, json};

use super::{
    Component,
    access::Authority,
    client::{Client, Request, TOKEN},
};
use crate::{Node, Place, Service, Topology, topology::SWITCH, wait_for};

/// Token of a user who has the role `system:node-proxier`, and nothing else.
pub const KUBE_PROXY: &str = "kube-proxy";
/// Token of a user without rights.
pub const NOBODY: &str = "nobody";
/// The networks that ClusterIPs are taken from.
pub const SERVICE_NETWORKS: [&str; 2] = ["10.96.0.0/12", "fd00:10:96::/112"];
/// A start takes three seconds on a quiet machine.
const START: Duration = Duration::from_secs(120);
const TRIGGER_TIME: &str = "endpoints.kubernetes.io/last-change-trigger-time";
const SLICES: &str = "/apis/discovery.k8s.io/v1/namespaces/default/endpointslices";
const EVENTS: &str = "/apis/events.k8s.io/v1/namespaces/default/events";
const SERVICES: &str = "/api/v1/namespaces/default/services";
const SERVICE_CIDRS: &str = "/apis/networking.k8s.io/v1/servicecidrs";

/// A control plane without controllers: what is applied stays as it is.
///
/// ClusterIPs are of [`SERVICE_NETWORKS`], of which 10.96.0.1 belongs to `default/kubernetes`; node ports are 20000 to 32767.
#[derive(Debug)]
pub struct ControlPlane {
    pub(super) client: Client,
    pub(super) dir: PathBuf,
    pub(super) authority: Authority,
    /// The EndpointSlices of each Service that was applied.
    slices: Mutex<BTreeMap<String, BTreeSet<String>>>,
    /// Arguments of every API server that is started.
    flags: &'static [&'static str],
    // Who asks the API server goes before it, and that before what it asks.
    pub(super) controllers: Vec<Component>,
    // None while it is stopped.
    api: Option<Component>,
    _etcd: Component,
}

impl ControlPlane {
    /// One that is ready.
    ///
    /// # Errors
    /// The components are missing, or do not start.
    pub fn start(topology: &Topology) -> anyhow::Result<Self> {
        // Nobody makes the accounts that this asks for.
        Self::start_api_with(topology, &["--disable-admission-plugins", "ServiceAccount"])
    }

    pub(super) fn start_api_with(
        topology: &Topology,
        flags: &'static [&'static str],
    ) -> anyhow::Result<Self> {
        let place = topology.switch_place()?;
        let dir = topology.state_dir().join("control-plane");
        fs::create_dir_all(&dir)?;
        let authority = Authority::new(&dir)?;
        fs::write(
            dir.join("tokens"),
            format!(
                "{TOKEN},admin,1,system:masters\n{KUBE_PROXY},system:kube-proxy,2\n{NOBODY},nobody,3\n"
            ),
        )?;
        let file = |name: &str| dir.join(name).display().to_string();
        let etcd = Component::start("etcd", &place, &dir.join("etcd.log"), |command| {
            command
                .args(["--data-dir", &file("etcd"), "--unsafe-no-fsync"])
                .args([
                    "--listen-client-urls",
                    ETCD,
                    "--advertise-client-urls",
                    ETCD,
                ])
                .args(["--listen-peer-urls", "http://127.0.0.1:2380"])
                .args(["--quota-backend-bytes", "8589934592"]);
        })?;
        let mut control = Self {
            client: Client {
                place,
                server: format!("https://{SWITCH}:6443"),
            },
            dir,
            authority,
            slices: Mutex::default(),
            flags,
            controllers: Vec::new(),
            api: None,
            _etcd: etcd,
        };
        control.start_api(&[])?;
        Ok(control)
    }

    /// Starts the API server with these arguments more, and waits until it is ready.
    ///
    /// # Errors
    /// It does not start.
    pub fn start_api(&mut self, more: &[&str]) -> anyhow::Result<()> {
        let file = |name: &str| self.dir.join(name).display().to_string();
        let log = self.dir.join("kube-apiserver.log");
        let api = Component::start("kube-apiserver", &self.client.place, &log, |command| {
            command
                .args(["--etcd-servers", ETCD, "--cert-dir", &file("certs")])
                .args(["--secure-port", "6443", "--bind-address", SWITCH])
                .args(["--advertise-address", SWITCH])
                .args(["--service-account-key-file", &file("sa.pub")])
                .args(["--service-account-signing-key-file", &file("sa.key")])
                .args(["--service-account-issuer", "https://kubernetes.default"])
                .args(["--token-auth-file", &file("tokens")])
                .args(["--client-ca-file", &file("ca.crt")])
                .args(["--authorization-mode", "RBAC"])
                .args(["--service-cluster-ip-range", &SERVICE_NETWORKS.join(",")])
                .args(["--service-node-port-range", "20000-32767"])
                // As kubeadm has it.
                .arg("--allow-privileged")
                // Their names are known to nobody.
                .args(["--kubelet-preferred-address-types", "InternalIP"])
                .args(["--max-requests-inflight", "3000"])
                .args(["--max-mutating-requests-inflight", "2000"])
                .args(self.flags)
                .args(more);
        })?;
        self.api = Some(api);
        self.wait_ready()
    }

    /// Kills the API server.
    pub fn stop_api(&mut self) {
        drop(self.api.take());
    }

    fn wait_ready(&mut self) -> anyhow::Result<()> {
        let ready = [
            Request::get("/readyz"),
            Request::get("/api/v1/namespaces/default"),
            Request::get(&format!("{SERVICES}/kubernetes")),
        ];
        wait_for("the API server is ready", START, || {
            // One that ended is told once, after the deadline of nobody.
            match self.api.as_mut().map_or(Ok(()), Component::ensure_alive) {
                Ok(()) => self.client.send(&ready).map(Ok),
                Err(ended) => Ok(Err(ended)),
            }
        })
        .and_then(|answered| answered)
        .with_context(|| {
            self.api
                .as_ref()
                .map(Component::last_words)
                .unwrap_or_default()
        })?;
        Ok(())
    }

    /// Brings a Service and its EndpointSlices to this state.
    ///
    /// # Errors
    /// The API server refuses.
    pub fn apply(&self, service: &Service) -> anyhow::Result<()> {
        self.apply_all(std::slice::from_ref(service))
    }

    /// As [`ControlPlane::apply`], for many.
    ///
    /// # Errors
    /// The API server refuses one; those before it are there.
    pub fn apply_all(&self, services: &[Service]) -> anyhow::Result<()> {
        let mut requests = Vec::new();
        for service in services {
            let mut names = BTreeSet::new();
            for mut object in service.objects() {
                let name = object["metadata"]["name"].as_str().unwrap_or_default();
                let name = name.to_owned();
                if object["kind"] == "Service" {
                    requests.extend(service_requests(&name, object));
                } else {
                    // As its controller would: it happened now.
                    let now = Timestamp::now().to_string();
                    object["metadata"]["annotations"] = json!({TRIGGER_TIME: now});
                    requests.push(Request::apply(&format!("{SLICES}/{name}"), object));
                    names.insert(name);
                }
            }
            let before = self
                .slices()
                .insert(service.name().to_owned(), names.clone());
            let gone = before.unwrap_or_default();
            requests.extend(
                gone.difference(&names)
                    .map(|name| Request::delete(&format!("{SLICES}/{name}"))),
            );
        }
        self.client.send(&requests).map(drop)
    }

    /// Deletes a Service and its EndpointSlices.
    ///
    /// # Errors
    /// The API server refuses.
    pub fn delete(&self, service: &str) -> anyhow::Result<()> {
        let slices = self.slices().remove(service);
        let slices = slices.unwrap_or_default();
        let slices = slices
            .iter()
            .map(|name| Request::delete(&format!("{SLICES}/{name}")));
        let service = Request::delete(&format!("{SERVICES}/{service}"));
        let requests: Vec<Request> = slices.chain([service]).collect();
        self.client.send(&requests).map(drop)
    }

    /// Makes a ServiceCIDR.
    ///
    /// # Errors
    /// The API server refuses.
    pub fn apply_service_cidr(&self, name: &str, cidrs: &[&str]) -> anyhow::Result<()> {
        let object = json!({
            "apiVersion": "networking.k8s.io/v1",
            "kind": "ServiceCIDR",
            "metadata": {"name": name},
            "spec": {"cidrs": cidrs},
        });
        let request = Request::apply(&format!("{SERVICE_CIDRS}/{name}"), object);
        self.client.send(&[request]).map(drop)
    }

    /// Deletes a ServiceCIDR.
    ///
    /// # Errors
    /// The API server refuses.
    pub fn delete_service_cidr(&self, name: &str) -> anyhow::Result<()> {
        let request = Request::delete(&format!("{SERVICE_CIDRS}/{name}"));
        self.client.send(&[request]).map(drop)
    }

    /// The Events of the namespace `default`: also those about Nodes, which have none.
    ///
    /// # Errors
    /// The API server refuses.
    pub fn events(&self) -> anyhow::Result<Vec<Value>> {
        let list = self.client.send(&[Request::get(EVENTS)])?;
        let mut list: Value = serde_json::from_str(&list)?;
        let items = list["items"]
            .as_array_mut()
            .context("a list without items")?;
        Ok(std::mem::take(items))
    }

    fn slices(&self) -> MutexGuard<'_, BTreeMap<String, BTreeSet<String>>> {
        self.slices.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes the Node object that a kube-proxy on `node` looks for.
    ///
    /// # Errors
    /// The API server refuses.
    pub fn apply_node(&self, node: &Node) -> anyhow::Result<()> {
        let name = node.name();
        let object = json!({
            "apiVersion": "v1",
            "kind": "Node",
            "metadata": {"name": name, "labels": {
                "kubernetes.io/hostname": name,
                // As in the files: node-a is in zone-a.
                "topology.kubernetes.io/zone": name.replace("node", "zone"),
            }},
        });
        let addresses = [
            json!({"type": "InternalIP", "address": node.v4()}),
            json!({"type": "InternalIP", "address": node.v6()}),
        ];
        // Not applied: addresses are a map by type there, and both have the same.
        let status = json!({"status": {"addresses": addresses}});
        let path = format!("/api/v1/nodes/{name}");
        let requests = [
            Request::apply(&path, object),
            Request::merge(&format!("{path}/status"), status),
        ];
        self.client.send(&requests).map(drop)
    }

    /// Marks a Node as the cluster autoscaler does before it takes the machine away, or takes the mark back.
    ///
    /// # Errors
    /// The API server refuses.
    pub fn mark_node(&self, node: &Node, is_leaving: bool) -> anyhow::Result<()> {
        let taint = json!({"key": "ToBeDeletedByClusterAutoscaler", "effect": "NoSchedule"});
        let taints = if is_leaving { vec![taint] } else { Vec::new() };
        let patch = json!({"spec": {"taints": taints}});
        let request = Request::merge(&format!("/api/v1/nodes/{}", node.name()), patch);
        self.client.send(&[request]).map(drop)
    }

    /// Where it runs.
    pub fn place(&self) -> &Place {
        &self.client.place
    }
}

const ETCD: &str = "http://127.0.0.1:2379";

/// A Service's status is another resource.
fn service_requests(name: &str, mut object: Value) -> Vec<Request> {
    let path = format!("{SERVICES}/{name}");
    if object["spec"]["clusterIPs"]
        .as_array()
        .is_some_and(|ips| ips.len() > 1)
    {
        object["spec"]["ipFamilyPolicy"] = "RequireDualStack".into();
    }
    let status = object
        .as_object_mut()
        .and_then(|fields| fields.remove("status"));
    let mut requests = vec![Request::apply(&path, object.clone())];
    if let Some(status) = status {
        let object = json!({
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": name, "namespace": "default"},
            "status": status,
        });
        requests.push(Request::apply(&format!("{path}/status"), object));
    }
    requests
}
