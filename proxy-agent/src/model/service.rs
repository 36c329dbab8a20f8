//! A Service: what clients address, and the policies of its ports.

use std::{collections::BTreeSet, net::IpAddr, num::NonZeroU16, sync::Arc};

use ipnet::IpNet;
use k8s_openapi::api::core::v1;

use super::{
    excluded,
    problem::{Blame, Kind, Problem, shorten},
    text,
};
use crate::state::{Family, Protocol, ServiceName, TrafficPolicy};

/// `sessionAffinityConfig.clientIP.timeoutSeconds` when it is absent, and the most that the API allows.
const AFFINITY_DEFAULT_SECONDS: i32 = 10_800;
const AFFINITY_MOST_SECONDS: i32 = 86_400;

/// A Service that this proxy serves: it has a ClusterIP and is not another proxy's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Service {
    /// `metadata.creationTimestamp`, seconds since 1970; absent sorts as youngest.
    pub(crate) created: i64,
    /// One or two, of different families.
    pub(crate) cluster_ips: Box<[IpAddr]>,
    pub(crate) external_ips: Box<[IpAddr]>,
    /// `status.loadBalancer.ingress` with an address and `ipMode` VIP.
    pub(crate) load_balancer_ips: Box<[IpAddr]>,
    pub(crate) source_ranges: Box<[IpNet]>,
    pub(crate) internal_policy: TrafficPolicy,
    pub(crate) external_policy: TrafficPolicy,
    /// Where load balancers ask whether this node has endpoints: type LoadBalancer with an external policy of Local only.
    pub(crate) health_check_port: Option<NonZeroU16>,
    pub(crate) affinity_seconds: Option<u32>,
    pub(crate) ports: Box<[Port]>,
}

/// One port of a Service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Port {
    pub(crate) name: Arc<str>,
    pub(crate) protocol: Protocol,
    pub(crate) port: NonZeroU16,
    pub(crate) node_port: Option<NonZeroU16>,
}

impl Port {
    /// A port without node port. `name` is at most 63 bytes.
    pub fn new(name: &str, protocol: Protocol, port: NonZeroU16) -> Self {
        Self {
            name: name.into(),
            protocol,
            port,
            node_port: None,
        }
    }

    /// The same with a node port.
    #[must_use]
    pub fn with_node_port(self, node_port: NonZeroU16) -> Self {
        Self {
            node_port: Some(node_port),
            ..self
        }
    }
}

impl Service {
    /// A Service at `cluster_ips` (one or two, of different families), with every policy at its default.
    pub fn new(cluster_ips: &[IpAddr], ports: Vec<Port>) -> Self {
        Self {
            created: i64::MAX,
            cluster_ips: cluster_ips.into(),
            external_ips: Box::default(),
            load_balancer_ips: Box::default(),
            source_ranges: Box::default(),
            internal_policy: TrafficPolicy::Cluster,
            external_policy: TrafficPolicy::Cluster,
            health_check_port: None,
            affinity_seconds: None,
            ports: ports.into(),
        }
    }

    /// The same with session affinity.
    #[must_use]
    pub fn with_affinity(self, seconds: u32) -> Self {
        Self {
            affinity_seconds: Some(seconds),
            ..self
        }
    }

    /// The name under which `object` is kept.
    ///
    /// # Errors
    /// It is no possible name.
    pub fn name(object: &v1::Service) -> Result<ServiceName, Problem> {
        let name = object.metadata.name.as_deref().unwrap_or_default();
        let namespace = object.metadata.namespace.as_deref().unwrap_or("default");
        let blame = Blame::new(Kind::Service, Some(namespace), name);
        text::label(namespace).map_err(|what| blame.refuse("metadata.namespace", what))?;
        text::label(name).map_err(|what| blame.refuse("metadata.name", what))?;
        Ok(ServiceName::new(namespace, name))
    }

    /// Reads a Service, and says which ports it leaves out; nothing if it is not for this proxy (another proxy's, headless,
    /// ExternalName).
    ///
    /// # Errors
    /// What makes it impossible.
    pub fn parse(object: &v1::Service) -> Result<Option<(Self, Vec<Problem>)>, Problem> {
        let name = Self::name(object)?;
        let (namespace, short) = name.as_str().split_once('/').unwrap_or_default();
        let blame = Blame::new(Kind::Service, Some(namespace), short);
        let Some(spec) = &object.spec else {
            return Err(blame.skip("spec", "is missing"));
        };
        if excluded(&object.metadata) || spec.type_.as_deref() == Some("ExternalName") {
            return Ok(None);
        }
        service_type(spec, &blame)?;
        let Some(cluster_ips) = cluster_ips(spec, &blame)? else {
            return Ok(None);
        };
        let created = object.metadata.creation_timestamp.as_ref();
        let (ports, trimmed) = ports(spec, &blame)?;
        let service = Self {
            created: created.map_or(i64::MAX, |time| time.0.as_second()),
            cluster_ips,
            external_ips: external_ips(spec, &blame)?,
            load_balancer_ips: load_balancer_ips(object, &blame)?,
            source_ranges: source_ranges(spec, &blame)?,
            internal_policy: internal_policy(spec, &blame)?,
            external_policy: external_policy(spec, &blame)?,
            health_check_port: health_check_port(spec, &blame)?,
            affinity_seconds: affinity(spec, &blame)?,
            ports,
        };
        Ok(Some((service, trimmed)))
    }

    /// The families that it has a ClusterIP in: kube-proxy ignores a Service in every other.
    pub(crate) fn families(&self) -> impl Iterator<Item = Family> + '_ {
        self.cluster_ips.iter().map(|ip| Family::of(*ip))
    }
}

fn service_type(spec: &v1::ServiceSpec, blame: &Blame) -> Result<(), Problem> {
    match spec.type_.as_deref() {
        None | Some("ClusterIP" | "NodePort" | "LoadBalancer") => Ok(()),
        Some(other) => Err(blame.refuse(
            "spec.type",
            format!("\"{}\" is not a type of Service", shorten(other)),
        )),
    }
}

/// Nothing when the Service is headless.
fn cluster_ips(spec: &v1::ServiceSpec, blame: &Blame) -> Result<Option<Box<[IpAddr]>>, Problem> {
    let first = spec.cluster_ip.as_deref().unwrap_or_default();
    let listed = spec.cluster_ips.as_deref().unwrap_or_default();
    if first == "None" || listed.first().is_some_and(|ip| ip == "None") {
        return Ok(None);
    }
    if let Some(listed) = listed
        .first()
        .filter(|ip| !first.is_empty() && *ip != first)
    {
        let what = format!(
            "\"{}\" differs from spec.clusterIP \"{}\"",
            shorten(listed),
            shorten(first)
        );
        return Err(blame.refuse("spec.clusterIPs[0]", what));
    }
    let mut found = Vec::with_capacity(2);
    if listed.is_empty() && !first.is_empty() {
        found.push(text::vip(first).map_err(|what| blame.refuse("spec.clusterIP", what))?);
    }
    for (index, ip) in listed.iter().enumerate() {
        let field = || format!("spec.clusterIPs[{index}]");
        let ip = text::vip(ip).map_err(|what| blame.refuse(field(), what))?;
        let family = Family::of(ip);
        if found.iter().any(|other| Family::of(*other) == family) {
            return Err(blame.refuse(field(), format!("{ip} is a second {family} address")));
        }
        found.push(ip);
    }
    if found.is_empty() {
        return Err(blame.skip(
            "spec.clusterIP",
            "is missing; the API server assigns one, in a file it must be written",
        ));
    }
    for (index, (ip, family)) in found
        .iter()
        .zip(spec.ip_families.iter().flatten())
        .enumerate()
    {
        if Family::of(*ip).to_string() != *family {
            let field = format!("spec.ipFamilies[{index}]");
            let what = format!("is \"{}\", but the ClusterIP is {ip}", shorten(family));
            return Err(blame.refuse(field, what));
        }
    }
    Ok(Some(found.into()))
}

fn external_ips(spec: &v1::ServiceSpec, blame: &Blame) -> Result<Box<[IpAddr]>, Problem> {
    let mut found = BTreeSet::new();
    for (index, ip) in spec.external_ips.iter().flatten().enumerate() {
        let field = format!("spec.externalIPs[{index}]");
        found.insert(text::vip(ip).map_err(|what| blame.refuse(field, what))?);
    }
    Ok(found.into_iter().collect())
}

fn load_balancer_ips(object: &v1::Service, blame: &Blame) -> Result<Box<[IpAddr]>, Problem> {
    let status = object
        .status
        .as_ref()
        .and_then(|status| status.load_balancer.as_ref());
    let ingress = status.and_then(|status| status.ingress.as_deref());
    let mut found = BTreeSet::new();
    for (index, ingress) in ingress.unwrap_or_default().iter().enumerate() {
        let field = |name: &str| format!("status.loadBalancer.ingress[{index}].{name}");
        let Some(ip) = ingress.ip.as_deref().filter(|ip| !ip.is_empty()) else {
            continue;
        };
        let ip = text::vip(ip).map_err(|what| blame.refuse(field("ip"), what))?;
        match ingress.ip_mode.as_deref() {
            None | Some("VIP") => {
                found.insert(ip);
            }
            // KEP-1860: the balancer delivers to the node itself, so traffic to its address leaves the node.
            Some("Proxy") => {}
            Some(other) => {
                let what = format!("\"{}\" is neither VIP nor Proxy", shorten(other));
                return Err(blame.refuse(field("ipMode"), what));
            }
        }
    }
    Ok(found.into_iter().collect())
}

fn source_ranges(spec: &v1::ServiceSpec, blame: &Blame) -> Result<Box<[IpNet]>, Problem> {
    let ranges = spec.load_balancer_source_ranges.iter().flatten();
    let mut found = BTreeSet::new();
    for (index, range) in ranges.enumerate() {
        let field = format!("spec.loadBalancerSourceRanges[{index}]");
        found.insert(text::prefix(range).map_err(|what| blame.refuse(field, what))?);
    }
    Ok(found.into_iter().collect())
}

fn policy(text: Option<&str>, field: &str, blame: &Blame) -> Result<TrafficPolicy, Problem> {
    match text {
        None | Some("" | "Cluster") => Ok(TrafficPolicy::Cluster),
        Some("Local") => Ok(TrafficPolicy::Local),
        Some(other) => {
            let what = format!("\"{}\" is neither Cluster nor Local", shorten(other));
            Err(blame.refuse(field, what))
        }
    }
}

fn internal_policy(spec: &v1::ServiceSpec, blame: &Blame) -> Result<TrafficPolicy, Problem> {
    let text = spec.internal_traffic_policy.as_deref();
    policy(text, "spec.internalTrafficPolicy", blame)
}

/// Local only where there is an external frontend by the Service's type (kube-proxy's `ExternalPolicyLocal`).
fn external_policy(spec: &v1::ServiceSpec, blame: &Blame) -> Result<TrafficPolicy, Problem> {
    let text = spec.external_traffic_policy.as_deref();
    let wanted = policy(text, "spec.externalTrafficPolicy", blame)?;
    let external = match spec.type_.as_deref() {
        Some("NodePort" | "LoadBalancer") => true,
        _ => spec
            .external_ips
            .as_ref()
            .is_some_and(|ips| !ips.is_empty()),
    };
    Ok(if external {
        wanted
    } else {
        TrafficPolicy::Cluster
    })
}

/// Nothing where kube-proxy serves none either, whatever the field holds.
fn health_check_port(spec: &v1::ServiceSpec, blame: &Blame) -> Result<Option<NonZeroU16>, Problem> {
    let is_asked = spec.type_.as_deref() == Some("LoadBalancer")
        && external_policy(spec, blame)? == TrafficPolicy::Local;
    match spec.health_check_node_port {
        Some(port) if is_asked && port != 0 => {
            let port = text::port(port);
            let port = port.map_err(|what| blame.refuse("spec.healthCheckNodePort", what))?;
            Ok(Some(port))
        }
        _ => Ok(None),
    }
}

fn affinity(spec: &v1::ServiceSpec, blame: &Blame) -> Result<Option<u32>, Problem> {
    match spec.session_affinity.as_deref() {
        None | Some("" | "None") => return Ok(None),
        Some("ClientIP") => {}
        Some(other) => {
            let what = format!("\"{}\" is neither ClientIP nor None", shorten(other));
            return Err(blame.refuse("spec.sessionAffinity", what));
        }
    }
    let config = spec.session_affinity_config.as_ref();
    let client_ip = config.and_then(|config| config.client_ip.as_ref());
    let seconds = client_ip
        .and_then(|config| config.timeout_seconds)
        .unwrap_or(AFFINITY_DEFAULT_SECONDS);
    match u32::try_from(seconds) {
        Ok(valid) if (1..=AFFINITY_MOST_SECONDS).contains(&seconds) => Ok(Some(valid)),
        _ => Err(blame.refuse(
            "spec.sessionAffinityConfig.clientIP.timeoutSeconds",
            format!("{seconds} is not between 1 and {AFFINITY_MOST_SECONDS}"),
        )),
    }
}

/// A protocol that came after this agent takes no other port with it.
fn ports(spec: &v1::ServiceSpec, blame: &Blame) -> Result<(Box<[Port]>, Vec<Problem>), Problem> {
    let mut found: Vec<Port> = Vec::new();
    let mut trimmed = Vec::new();
    for (index, port) in spec.ports.iter().flatten().enumerate() {
        let blamed = |field: &str, what| blame.refuse(format!("spec.ports[{index}].{field}"), what);
        let name = port.name.as_deref().unwrap_or_default();
        if !name.is_empty() {
            text::label(name).map_err(|what| blamed("name", what))?;
        }
        let protocol = match text::protocol(port.protocol.as_deref()) {
            Ok(protocol) => protocol,
            Err(what) => {
                trimmed.push(blame.trim(format!("spec.ports[{index}].protocol"), what));
                continue;
            }
        };
        let node_port = match port.node_port {
            None | Some(0) => None,
            Some(number) => Some(text::port(number).map_err(|what| blamed("nodePort", what))?),
        };
        let port = Port {
            name: name.into(),
            protocol,
            port: text::port(port.port).map_err(|what| blamed("port", what))?,
            node_port,
        };
        for other in &found {
            if other.name == port.name {
                let what = format!("\"{name}\" is the name of two ports");
                return Err(blamed("name", what));
            }
            if other.protocol == port.protocol && other.port == port.port {
                let what = format!("{}/{protocol} occurs twice", port.port);
                return Err(blamed("port", what));
            }
            if let Some(number) = port.node_port
                && other.protocol == port.protocol
                && other.node_port == Some(number)
            {
                let what = format!("{number}/{protocol} occurs twice");
                return Err(blamed("nodePort", what));
            }
        }
        found.push(port);
    }
    Ok((found.into(), trimmed))
}

#[cfg(test)]
mod tests;
