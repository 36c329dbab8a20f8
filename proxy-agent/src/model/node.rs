//! The node that the agent runs on.

use std::{fmt, net::IpAddr, sync::Arc};

use ipnet::IpNet;
use k8s_openapi::api::core::v1;

use super::{
    problem::{Blame, Kind, Problem},
    text,
};

/// The cluster autoscaler's taint (autoscaler, utils/taints/taints.go).
const TO_BE_DELETED: &str = "ToBeDeletedByClusterAutoscaler";
const ZONE_LABEL: &str = "topology.kubernetes.io/zone";

/// A Node's name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeName(Arc<str>);

impl NodeName {
    /// The node called `name`.
    pub fn new(name: &str) -> Self {
        Self(name.into())
    }

    /// As text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for NodeName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What the proxy needs of its Node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Node {
    /// The zone label, if it is there and not empty.
    pub zone: Option<Arc<str>>,
    /// The main address in each family that it has one in: the first internal one, else the first external one.
    pub addresses: Box<[IpAddr]>,
    /// Whether it is about to go: deleted, or marked so by the cluster autoscaler (KEP-3836).
    pub is_leaving: bool,
    /// The network of its pods in each family that has one: the first of `spec.podCIDRs`.
    pub pod_networks: Box<[IpNet]>,
}

impl Node {
    /// The name of `object`.
    ///
    /// # Errors
    /// It is no possible name.
    pub fn name(object: &v1::Node) -> Result<NodeName, Problem> {
        let name = object.metadata.name.as_deref().unwrap_or_default();
        let blame = Blame::new(Kind::Node, None, name);
        text::subdomain(name).map_err(|what| blame.refuse("metadata.name", what))?;
        Ok(NodeName::new(name))
    }

    /// Reads a Node.
    pub fn parse(object: &v1::Node) -> Self {
        let labels = object.metadata.labels.as_ref();
        let zone = labels.and_then(|labels| labels.get(ZONE_LABEL));
        Self {
            zone: zone
                .filter(|zone| !zone.is_empty())
                .map(|zone| zone.as_str().into()),
            addresses: addresses(object),
            is_leaving: is_leaving(object),
            pod_networks: pod_networks(object),
        }
    }
}

/// kube-proxy's `NodeEligible` (pkg/proxy/healthcheck/proxy_health.go).
fn is_leaving(object: &v1::Node) -> bool {
    let spec = object.spec.as_ref();
    let taints = spec
        .and_then(|spec| spec.taints.as_deref())
        .unwrap_or_default();
    let is_marked = taints.iter().any(|taint| taint.key == TO_BE_DELETED);
    is_marked || object.metadata.deletion_timestamp.is_some()
}

/// As kube-proxy chooses them (component-helpers/node/util/ips.go). What is no address is passed over: kubelet writes them.
fn addresses(object: &v1::Node) -> Box<[IpAddr]> {
    let status = object.status.as_ref();
    let listed = status.and_then(|status| status.addresses.as_deref());
    let of_kind = |kind: &'static str| {
        let listed = listed.unwrap_or_default().iter();
        let listed = listed.filter(move |address| address.type_ == kind);
        listed.filter_map(|address| address.address.parse::<IpAddr>().ok())
    };
    let mut found: Vec<IpAddr> = Vec::with_capacity(2);
    for ip in of_kind("InternalIP").chain(of_kind("ExternalIP")) {
        if found.iter().all(|other| other.is_ipv4() != ip.is_ipv4()) {
            found.push(ip);
        }
    }
    found.into()
}

/// What is no network is passed over: the cluster's controllers write them.
fn pod_networks(object: &v1::Node) -> Box<[IpNet]> {
    let spec = object.spec.as_ref();
    let listed = spec.and_then(|spec| spec.pod_cidrs.as_deref());
    // An old API server fills in this one alone.
    let single = spec.and_then(|spec| spec.pod_cidr.as_ref());
    let mut found: Vec<IpNet> = Vec::with_capacity(2);
    for text in listed.unwrap_or_default().iter().chain(single) {
        let Ok(network) = text.parse::<IpNet>() else {
            continue;
        };
        let is_v4 = |network: &IpNet| network.addr().is_ipv4();
        if found.iter().all(|other| is_v4(other) != is_v4(&network)) {
            found.push(network.trunc());
        }
    }
    found.into()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_main_address_of_each_family_is_internal_if_there_is_one() {
        let parsed = |addresses| {
            let node = json!({"metadata": {"name": "node-a"}, "status": {"addresses": addresses}});
            Node::parse(&serde_json::from_value(node).unwrap()).addresses
        };
        let address = |kind: &str, address: &str| json!({"type": kind, "address": address});
        let found = parsed(json!([
            address("Hostname", "node-a"),
            address("ExternalIP", "203.0.113.1"),
            address("ExternalIP", "2001:db8::1"),
            address("InternalIP", "192.168.0.1"),
            address("InternalIP", "192.168.0.2"),
        ]));
        let expected: [IpAddr; 2] = ["192.168.0.1", "2001:db8::1"].map(|ip| ip.parse().unwrap());
        assert_eq!(*found, expected);
        assert!(parsed(json!([])).is_empty());
    }

    #[test]
    fn a_node_that_is_deleted_or_marked_for_it_is_leaving() {
        let parsed = |node| Node::parse(&serde_json::from_value(node).unwrap()).is_leaving;
        let taint = |key: &str| {
            let taint = json!({"key": key, "effect": "NoSchedule"});
            json!({"metadata": {"name": "a"}, "spec": {"taints": [taint]}})
        };
        assert!(parsed(taint("ToBeDeletedByClusterAutoscaler")));
        assert!(!parsed(taint("node.kubernetes.io/unschedulable")));
        let time = "2026-01-01T00:00:00Z";
        assert!(parsed(
            json!({"metadata": {"name": "a", "deletionTimestamp": time}})
        ));
        assert!(!parsed(json!({"metadata": {"name": "a"}})));
    }

    #[test]
    fn the_first_pod_network_of_each_family_counts() {
        let parsed = |spec| {
            let node = json!({"metadata": {"name": "node-a"}, "spec": spec});
            Node::parse(&serde_json::from_value(node).unwrap()).pod_networks
        };
        let networks = ["10.244.1.0/24", "fd00:10:244:1::/64"];
        let expected: [IpNet; 2] = networks.map(|network| network.parse().unwrap());
        let listed = ["10.244.1.0/24", "10.9.0.0/24", "fd00:10:244:1::/64"];
        let spec = json!({"podCIDR": "10.244.1.0/24", "podCIDRs": listed});
        assert_eq!(*parsed(spec), expected);
        assert_eq!(*parsed(json!({"podCIDR": "10.244.1.0/24"})), expected[..1]);
        assert!(parsed(json!({})).is_empty());
    }
}
