//! Kubernetes objects as files, each change of a file one rename.

use std::{
    fs,
    net::IpAddr,
    path::{Path, PathBuf},
};

use anyhow::Context;
use serde_json::{Map, Value, json};

/// A folder of Service, EndpointSlice and Node files.
#[derive(Clone, Debug)]
pub struct Manifests {
    dir: PathBuf,
    staging: PathBuf,
}

/// A Service and its EndpointSlices.
#[derive(Clone, Debug)]
pub struct Service {
    name: String,
    labels: Map<String, Value>,
    spec: Map<String, Value>,
    ingress: Vec<Value>,
    ports: Vec<Value>,
    targets: Vec<Value>,
    endpoints: Vec<Endpoint>,
}

/// One endpoint of a Service.
#[derive(Clone, Debug)]
pub struct Endpoint {
    address: IpAddr,
    port: Option<u16>,
    value: Map<String, Value>,
}

impl Manifests {
    /// An empty folder `name` below `parent`.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn new(parent: &Path, name: &str) -> anyhow::Result<Self> {
        let dir = parent.join(name);
        let staging = parent.join(format!("{name}.staging"));
        for path in [&dir, &staging] {
            fs::create_dir_all(path).with_context(|| format!("cannot make {}", path.display()))?;
        }
        Ok(Self { dir, staging })
    }

    /// The folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Writes a Service's file, or replaces it, at once.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn put(&self, service: &Service) -> anyhow::Result<()> {
        self.write(&format!("{}.yaml", service.name), &service.to_yaml()?)
    }

    /// Removes a Service's file.
    ///
    /// # Errors
    /// There is none.
    pub fn remove(&self, service: &str) -> anyhow::Result<()> {
        let path = self.dir.join(format!("{service}.yaml"));
        fs::remove_file(&path).with_context(|| format!("cannot remove {}", path.display()))
    }

    /// Writes a Node's file.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn put_node(&self, name: &str, zone: &str) -> anyhow::Result<()> {
        let labels = json!({"kubernetes.io/hostname": name, "topology.kubernetes.io/zone": zone});
        let metadata = json!({"name": name, "labels": labels});
        let node = json!({"apiVersion": "v1", "kind": "Node", "metadata": metadata});
        self.write(
            &format!("node-{name}.yaml"),
            &serde_yaml_ng::to_string(&node)?,
        )
    }

    /// Puts a file in place by a rename, so that nobody sees half of it.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn write(&self, file: &str, text: &str) -> anyhow::Result<()> {
        let (staged, path) = (self.staging.join(file), self.dir.join(file));
        fs::write(&staged, text)
            .and_then(|()| fs::rename(&staged, &path))
            .with_context(|| format!("cannot write {}", path.display()))
    }
}

impl Service {
    /// `default/<name>` at these ClusterIPs, the first one's family being the primary one.
    pub fn new(name: &str, cluster_ips: &[IpAddr]) -> Self {
        let family = |ip: &IpAddr| if ip.is_ipv4() { "IPv4" } else { "IPv6" };
        let families: Vec<_> = cluster_ips.iter().map(family).collect();
        let mut spec = Map::new();
        spec.insert("type".into(), "ClusterIP".into());
        spec.insert("clusterIPs".into(), json!(cluster_ips));
        spec.insert("clusterIP".into(), json!(cluster_ips.first()));
        spec.insert("ipFamilies".into(), json!(families));
        Self {
            name: name.to_owned(),
            labels: Map::new(),
            spec,
            ingress: Vec::new(),
            ports: Vec::new(),
            targets: Vec::new(),
            endpoints: Vec::new(),
        }
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Adds a port; endpoints serve it at `target`.
    #[must_use]
    pub fn port(mut self, name: &str, protocol: &str, port: u16, target: u16) -> Self {
        self.ports
            .push(json!({"name": name, "protocol": protocol, "port": port, "targetPort": target}));
        self.targets
            .push(json!({"name": name, "protocol": protocol, "port": target}));
        self
    }

    /// Gives the port that was added last a node port.
    #[must_use]
    pub fn node_port(mut self, port: u16) -> Self {
        if let Some(last) = self.ports.last_mut() {
            last["nodePort"] = port.into();
        }
        self.spec("type", "NodePort")
    }

    /// Sets a field of `spec`.
    #[must_use]
    pub fn spec(mut self, field: &str, value: impl Into<Value>) -> Self {
        self.spec.insert(field.to_owned(), value.into());
        self
    }

    /// Sets a label.
    #[must_use]
    pub fn label(mut self, name: &str, value: &str) -> Self {
        self.labels.insert(name.to_owned(), value.into());
        self
    }

    /// Adds an address of the load balancer.
    #[must_use]
    pub fn load_balancer(mut self, address: IpAddr, ip_mode: &str) -> Self {
        self.ingress.push(json!({"ip": address, "ipMode": ip_mode}));
        self.spec("type", "LoadBalancer")
    }

    /// Affinity by the client's address.
    #[must_use]
    pub fn affinity(self, seconds: u32) -> Self {
        let config = json!({"clientIP": {"timeoutSeconds": seconds}});
        self.spec("sessionAffinity", "ClientIP")
            .spec("sessionAffinityConfig", config)
    }

    /// Adds an endpoint.
    #[must_use]
    pub fn endpoint(mut self, endpoint: Endpoint) -> Self {
        self.endpoints.push(endpoint);
        self
    }

    /// Replaces all endpoints.
    #[must_use]
    pub fn endpoints(mut self, endpoints: impl IntoIterator<Item = Endpoint>) -> Self {
        self.endpoints = endpoints.into_iter().collect();
        self
    }

    /// The Service, and one EndpointSlice for each family and set of ports.
    ///
    /// # Errors
    /// None that is known: all values can be written.
    pub fn to_yaml(&self) -> anyhow::Result<String> {
        let mut text = String::new();
        for object in self.objects() {
            text.push_str("---\n");
            text.push_str(&serde_yaml_ng::to_string(&object)?);
        }
        Ok(text)
    }

    /// The same as values.
    pub fn objects(&self) -> Vec<Value> {
        let mut spec = self.spec.clone();
        spec.insert("ports".into(), self.ports.clone().into());
        let mut service = json!({
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": self.name, "namespace": "default", "labels": self.labels},
            "spec": spec,
        });
        if !self.ingress.is_empty() {
            service["status"] = json!({"loadBalancer": {"ingress": self.ingress}});
        }
        let mut groups: Vec<(bool, Option<u16>)> =
            self.endpoints.iter().map(Endpoint::group).collect();
        groups.sort();
        groups.dedup();
        let slices = groups
            .iter()
            .enumerate()
            .map(|(number, group)| self.slice(number, *group));
        std::iter::once(service).chain(slices).collect()
    }

    fn slice(&self, number: usize, group: (bool, Option<u16>)) -> Value {
        let members = self
            .endpoints
            .iter()
            .filter(|endpoint| endpoint.group() == group);
        let mut labels = self.labels.clone();
        labels.insert(
            "kubernetes.io/service-name".into(),
            self.name.clone().into(),
        );
        let mut ports = self.targets.clone();
        if let Some(port) = group.1 {
            ports
                .iter_mut()
                .for_each(|entry| entry["port"] = port.into());
        }
        json!({
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": {
                "name": format!("{}-{number}", self.name),
                "namespace": "default",
                "labels": labels,
            },
            "addressType": if group.0 { "IPv6" } else { "IPv4" },
            "ports": ports,
            "endpoints": members.map(|endpoint| &endpoint.value).collect::<Vec<_>>(),
        })
    }
}

impl Endpoint {
    /// A ready one on `node`.
    pub fn new(address: IpAddr, node: &str) -> Self {
        let conditions = json!({"ready": true, "serving": true, "terminating": false});
        let mut value = Map::new();
        value.insert("addresses".into(), json!([address]));
        value.insert("nodeName".into(), node.into());
        value.insert("conditions".into(), conditions);
        Self {
            address,
            port: None,
            value,
        }
    }

    /// The node that it is on.
    pub fn node(&self) -> &str {
        self.value
            .get("nodeName")
            .and_then(Value::as_str)
            .unwrap_or_default()
    }

    /// Serves at this port instead of the Service's target.
    #[must_use]
    pub fn at_port(mut self, port: u16) -> Self {
        self.port = Some(port);
        self
    }

    /// Neither ready nor serving.
    #[must_use]
    pub fn not_ready(self) -> Self {
        self.conditions(false, false, false)
    }

    /// Being deleted, but serving.
    #[must_use]
    pub fn terminating(self) -> Self {
        self.conditions(false, true, true)
    }

    /// Sets all conditions.
    #[must_use]
    pub fn conditions(mut self, ready: bool, serving: bool, terminating: bool) -> Self {
        let conditions = json!({"ready": ready, "serving": serving, "terminating": terminating});
        self.value.insert("conditions".into(), conditions);
        self
    }

    /// Meant for clients in this zone.
    #[must_use]
    pub fn for_zone(mut self, zone: &str) -> Self {
        self.value
            .insert("hints".into(), json!({"forZones": [{"name": zone}]}));
        self
    }

    /// Meant for clients on this node.
    #[must_use]
    pub fn for_node(mut self, node: &str) -> Self {
        self.value
            .insert("hints".into(), json!({"forNodes": [{"name": node}]}));
        self
    }

    fn group(&self) -> (bool, Option<u16>) {
        (self.address.is_ipv6(), self.port)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints_of_both_families_go_into_two_slices() {
        let ips = ["10.96.0.1".parse().unwrap(), "fd00::1".parse().unwrap()];
        let service = Service::new("web", &ips)
            .port("http", "TCP", 80, 8080)
            .endpoint(Endpoint::new("fd00::2".parse().unwrap(), "node-a"))
            .endpoint(Endpoint::new("10.244.1.2".parse().unwrap(), "node-a"))
            .endpoint(Endpoint::new("10.244.1.3".parse().unwrap(), "node-a"));
        let objects = service.objects();
        assert_eq!(objects.len(), 3);
        assert_eq!(objects[1]["addressType"], "IPv4");
        assert_eq!(objects[1]["endpoints"][1]["addresses"][0], "10.244.1.3");
        assert_eq!(objects[2]["addressType"], "IPv6");
    }
}
