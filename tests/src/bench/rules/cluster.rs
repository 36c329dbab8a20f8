//! The cluster of the bench: the same objects in files and in an API server, and Services of one endpoint that changes.

use std::{net::SocketAddr, time::Instant};

use anyhow::Result;
use serde_json::json;

use super::super::{
    cluster::{Cluster, PORT, TARGET_PORT, slice_manifest},
    proxies::Proxy,
};
use crate::{Manifests, Node, Pod, Topology, kube::ControlPlane};

const NAMESPACE: &str = "bench";
/// Services of one file.
const IN_A_FILE: u32 = 100;

/// Nodes, servers and objects.
pub(super) struct World {
    cluster: Cluster,
    /// The changing Services lead to one of these; the first one at the beginning.
    pub servers: [Pod; 2],
    pub manifests: Manifests,
    /// Not before it is asked for: the agents need none.
    control: Option<ControlPlane>,
    topology: Topology,
}

impl World {
    pub fn new(services: u32, endpoints: u32) -> Result<Self> {
        let cluster = Cluster {
            services,
            endpoints,
        };
        let mut topology = Topology::new("bench-rules")?;
        let node = topology.node("servers")?;
        let servers = [node.pod("blue")?, node.pod("green")?];
        for pod in &servers {
            pod.serve_tcp(TARGET_PORT)?;
        }
        let manifests = Manifests::new(&topology.state_dir(), "manifests")?;
        let world = Self {
            cluster,
            servers,
            manifests,
            control: None,
            topology,
        };
        for first in (0..services).step_by(IN_A_FILE as usize) {
            let last = services.min(first + IN_A_FILE);
            let list = cluster.full_manifest(first..last, Cluster::endpoint);
            let items = list["items"].as_array().cloned().unwrap_or_default();
            let items: Vec<_> = items
                .into_iter()
                .filter(|item| !cluster.is_changing_slice(item))
                .collect();
            let list = json!({"apiVersion": "v1", "kind": "List", "items": items});
            world
                .manifests
                .write(&format!("services-{first}.json"), &list.to_string())?;
        }
        Ok(world)
    }

    /// A node of its own for a proxy, with a client.
    pub fn node(&mut self, name: &str) -> Result<(Node, Pod)> {
        let node = self.topology.node(name)?;
        let client = node.pod("client")?;
        Ok((node, client))
    }

    /// The API server with all objects; starts it when it is first asked for.
    pub fn control(&mut self) -> Result<&ControlPlane> {
        let control = match self.control.take() {
            Some(control) => control,
            None => self.start_control()?,
        };
        Ok(self.control.insert(control))
    }

    fn start_control(&self) -> Result<ControlPlane> {
        let control = ControlPlane::start(&self.topology)?;
        let services = self.cluster.services;
        println!("the API server takes in {services} Services");
        let list = self.cluster.manifest_with_changing(self.servers[0].v4());
        control.create_all(NAMESPACE, &list)?;
        Ok(control)
    }

    /// Makes a changing Service lead to another server. When the change began, as far as the proxy is concerned: with the file,
    /// or with the API server's answer.
    pub fn lead(&mut self, proxy: Proxy, service: u32, server: usize) -> Result<Instant> {
        let slice = slice_manifest(&name(service), &[self.servers[server].v4()]);
        match proxy {
            Proxy::Ours(_) => {
                let start = Instant::now();
                self.manifests
                    .write(&format!("changing-{service}.json"), &slice.to_string())?;
                Ok(start)
            }
            Proxy::Kube(_) => {
                self.control()?.replace_endpoints(&slice)?;
                Ok(Instant::now())
            }
        }
    }

    /// Numbers of the Services whose endpoint changes.
    pub fn changing(&self) -> Vec<u32> {
        self.cluster.changing()
    }
}

/// Where a Service is found.
pub(super) fn address(service: u32) -> SocketAddr {
    (Cluster::cluster_ip(service), PORT).into()
}

fn name(service: u32) -> String {
    format!("service-{service}")
}
