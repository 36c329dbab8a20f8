//! The cluster of the benches: a loaded API server, servers behind Services whose endpoint changes, and nodes for proxies.

use std::{
    net::{Ipv4Addr, SocketAddr},
    time::Instant,
};

use anyhow::Result;
use serde_json::Value;

use super::{
    super::cluster::{Cluster, PORT, TARGET_PORT, slice_manifest},
    wire::Wire,
};
use crate::{Node, Pod, Topology, kube::ControlPlane};

pub(super) const NAMESPACE: &str = "bench";

/// Nodes, servers and objects.
pub(super) struct World {
    pub cluster: Cluster,
    /// The changing Services lead to one of these, or to none.
    pub servers: [Pod; 2],
    pub wire: Wire,
    pub control: ControlPlane,
    topology: Topology,
}

impl World {
    /// One whose API server has everything.
    pub fn new(cluster: Cluster) -> Result<Self> {
        let mut topology = Topology::new("bench-api")?;
        let node = topology.node("servers")?;
        let servers = [node.pod("blue")?, node.pod("green")?];
        for pod in &servers {
            pod.serve_tcp(TARGET_PORT)?;
        }
        let control = ControlPlane::start(&topology)?;
        let Cluster {
            services,
            endpoints,
        } = cluster;
        println!(
            "the API server takes in {services} Services x {} endpoints",
            services * endpoints
        );
        let start = Instant::now();
        control.create_all(NAMESPACE, &cluster.manifest_with_changing(servers[0].v4()))?;
        println!("that took {:.0} s", start.elapsed().as_secs_f64());
        let wire = Wire::open(&control)?;
        Ok(Self {
            cluster,
            servers,
            wire,
            control,
            topology,
        })
    }

    /// A node of its own for a proxy, with a client.
    pub fn node(&mut self, name: &str) -> Result<(Node, Pod)> {
        let node = self.topology.node(name)?;
        let client = node.pod("client")?;
        Ok((node, client))
    }

    /// The slice of a changing Service that leads to this server, or to none.
    pub fn leading_to(&self, service: u32, server: Option<usize>) -> Value {
        let addresses: Vec<_> = server
            .map(|server| self.servers[server].v4())
            .into_iter()
            .collect();
        slice_manifest(&format!("service-{service}"), &addresses)
    }

    /// The slice of a Service with another first endpoint than it had.
    pub fn changed(&self, service: u32, first: Ipv4Addr) -> Value {
        let endpoint = |service, n| match n {
            0 => first,
            n => Cluster::endpoint(service, n),
        };
        let mut list = self.cluster.full_manifest(service..service + 1, endpoint);
        list["items"][1].take()
    }
}

/// Where a Service is found.
pub(super) fn address(service: u32) -> SocketAddr {
    (Cluster::cluster_ip(service), PORT).into()
}
