//! The desired state: what the kernel should do for each service port. The one type between policy and mechanism.
//!
//! `compile` makes it, `backends` render it. Nothing here knows Kubernetes objects or kernel maps.

use std::{
    collections::BTreeMap,
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::Arc,
};

use ipnet::IpNet;

mod node_ports;

pub use node_ports::{NodePortAddress, NodePortAddresses};

/// IPv4 or IPv6.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    /// The family of an address.
    pub fn of(address: IpAddr) -> Self {
        if address.is_ipv4() {
            Self::V4
        } else {
            Self::V6
        }
    }

    /// As the Kubernetes API calls it.
    pub fn name(self) -> &'static str {
        match self {
            Self::V4 => "IPv4",
            Self::V6 => "IPv6",
        }
    }

    /// `0.0.0.0` or `::`.
    pub fn unspecified(self) -> IpAddr {
        match self {
            Self::V4 => Ipv4Addr::UNSPECIFIED.into(),
            Self::V6 => Ipv6Addr::UNSPECIFIED.into(),
        }
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Transport protocol of a service port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// SCTP: the packet layer only.
    Sctp,
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "TCP",
            Self::Udp => "UDP",
            Self::Sctp => "SCTP",
        })
    }
}

/// A Service's "namespace/name".
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ServiceName(Arc<str>);

impl ServiceName {
    /// Joins both parts.
    pub fn new(namespace: &str, name: &str) -> Self {
        Self(format!("{namespace}/{name}").into())
    }

    /// "namespace/name".
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for ServiceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// One port of a Service in one family: what gets an entry of its own in the kernel. Sorts by Service first.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ServicePort {
    /// The Service.
    pub service: ServiceName,
    /// Name of the port, empty if it has none.
    pub port: Arc<str>,
    /// Protocol of the port.
    pub protocol: Protocol,
    /// Family of its frontends and backends.
    pub family: Family,
}

impl fmt::Display for ServicePort {
    /// "namespace/name:port", as kube-proxy writes it: without the colon when the port has no name.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.service.as_str())?;
        if !self.port.is_empty() {
            write!(f, ":{}", self.port)?;
        }
        Ok(())
    }
}

/// What kind of address a frontend has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum FrontendKind {
    /// ClusterIP.
    ClusterIp,
    /// A node port on the node's own addresses.
    NodePort,
    /// An address of the load balancer (`ipMode: VIP`).
    LoadBalancer,
    /// One of `spec.externalIPs`.
    ExternalIp,
}

impl fmt::Display for FrontendKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::ClusterIp => "cluster-ip",
            Self::NodePort => "node-port",
            Self::LoadBalancer => "load-balancer",
            Self::ExternalIp => "external-ip",
        })
    }
}

/// What clients address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Frontend {
    /// The VIP; unspecified for a node port.
    pub address: IpAddr,
    /// Port, host order.
    pub port: u16,
    /// Kind of the address.
    pub kind: FrontendKind,
    /// The address is assigned to a link of this node (NodeLocal DNSCache): the socket layer leaves it alone.
    pub on_local_link: bool,
}

/// Bits of a backend's state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BackendState {
    /// Being deleted: takes new connections only when nothing ready is left.
    pub terminating: bool,
    /// On this node.
    pub on_this_node: bool,
    /// In the set that reaches the whole cluster.
    pub in_cluster: bool,
    /// In the set of this node's endpoints.
    pub in_local: bool,
}

/// Where a frontend sends. In no set: it drains, its flows go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Backend {
    /// The endpoint's address, of the service port's family.
    pub address: IpAddr,
    /// The endpoint's port, host order.
    pub port: u16,
    /// Its state.
    pub state: BackendState,
}

/// `internalTrafficPolicy` or `externalTrafficPolicy`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum TrafficPolicy {
    /// Every usable endpoint.
    #[default]
    Cluster,
    /// Endpoints on this node only.
    Local,
}

impl fmt::Display for TrafficPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Cluster => "Cluster",
            Self::Local => "Local",
        })
    }
}

/// Everything the kernel has to know of one service port.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ServiceState {
    /// Whose state this is.
    pub key: ServicePort,
    /// Sorted, without duplicates, owned by this service port.
    pub frontends: Vec<Frontend>,
    /// Sorted by address and port, without duplicates: every endpoint that serves, in a set or draining.
    pub backends: Vec<Backend>,
    /// ClientIP affinity, seconds.
    pub affinity_seconds: Option<u32>,
    /// Policy of the ClusterIP.
    pub internal_policy: TrafficPolicy,
    /// Policy of the other frontends.
    pub external_policy: TrafficPolicy,
    /// `loadBalancerSourceRanges` of this family, sorted; empty means everybody.
    pub source_ranges: Vec<IpNet>,
    /// The source ranges contain an address of this node, which may send to the load balancer's address then.
    pub admits_node: bool,
    /// TCP port of this node, in both families, at which load balancers ask for endpoints. It is the whole Service's, and
    /// named by one of its service ports.
    pub health_check_port: Option<u16>,
}

/// What a load balancer is told of a Service by this node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HealthCheck {
    /// TCP port of the node at which it asks, host order.
    pub port: u16,
    /// Endpoints on this node that are ready, in each family of the Service, the primary one first; never empty.
    pub endpoints: Vec<(Family, usize)>,
}

impl HealthCheck {
    /// The endpoints that somebody hears of who asks over `family`: those of the primary family where the Service lacks it.
    pub fn endpoints_in(&self, family: Family) -> usize {
        let of_family = self.endpoints.iter().find(|(of, _)| *of == family);
        let found = of_family.or(self.endpoints.first());
        found.map_or(0, |(_, endpoints)| *endpoints)
    }
}

/// An address of this node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct NodeAddress {
    /// Node ports are served on it.
    pub node_ports: bool,
}

/// The desired state of the node, or of the part of it that changed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DesiredState {
    /// By service port.
    pub services: BTreeMap<ServicePort, ServiceState>,
    /// The node's own addresses.
    pub addresses: BTreeMap<IpAddr, NodeAddress>,
    /// The networks of the node's pods, one of a family; only in the state of the whole node.
    pub pod_networks: Vec<IpNet>,
    /// The networks that ClusterIPs are taken from, as far as they are known; sorted, only in the state of the whole node.
    pub service_networks: Vec<IpNet>,
}

impl fmt::Display for Frontend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            address,
            port,
            kind,
            on_local_link,
        } = *self;
        write!(f, "{kind:<13} {}", SocketAddr::new(address, port))?;
        if on_local_link {
            f.write_str(" on-local-link")?;
        }
        Ok(())
    }
}

impl fmt::Display for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            address,
            port,
            state,
        } = *self;
        let BackendState {
            terminating,
            on_this_node,
            in_cluster,
            in_local,
        } = state;
        write!(f, "-> {}", SocketAddr::new(address, port))?;
        for (is_set, word) in [
            (in_cluster, "cluster"),
            (in_local, "local"),
            (on_this_node, "here"),
            (terminating, "terminating"),
        ] {
            if is_set {
                write!(f, " {word}")?;
            }
        }
        Ok(())
    }
}

impl fmt::Display for ServiceState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            key,
            frontends,
            backends,
            affinity_seconds,
            internal_policy,
            external_policy,
            source_ranges,
            admits_node,
            health_check_port,
        } = self;
        write!(f, "{key} {} {}", key.protocol, key.family)?;
        write!(f, " internal={internal_policy} external={external_policy}")?;
        if let Some(seconds) = affinity_seconds {
            write!(f, " affinity={seconds}s")?;
        }
        for range in source_ranges {
            write!(f, " from={range}")?;
        }
        if *admits_node {
            f.write_str(" from-node")?;
        }
        if let Some(port) = health_check_port {
            write!(f, " health-check={port}")?;
        }
        writeln!(f)?;
        for frontend in frontends {
            writeln!(f, "  {frontend}")?;
        }
        for backend in backends {
            writeln!(f, "  {backend}")?;
        }
        Ok(())
    }
}

impl fmt::Display for DesiredState {
    /// A table: each service port with its frontends and backends below it, then the node's addresses.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            services,
            addresses,
            pod_networks,
            service_networks,
        } = self;
        for service in services.values() {
            write!(f, "{service}")?;
        }
        for (address, NodeAddress { node_ports }) in addresses {
            let ports = if *node_ports { " node-ports" } else { "" };
            writeln!(f, "node {address}{ports}")?;
        }
        for network in pod_networks {
            writeln!(f, "pods {network}")?;
        }
        for network in service_networks {
            writeln!(f, "services {network}")?;
        }
        Ok(())
    }
}
