//! Synthetic clusters of any size: as model objects for benches that start behind the parser, and as manifests.

use std::{
    net::{IpAddr, Ipv4Addr},
    num::NonZeroU16,
    ops::Range,
    sync::Arc,
};

use proxy_agent::{
    model::{Endpoint, EndpointPort, Objects, Port, Service, Slice, SliceName},
    state::{Family, Protocol, ServiceName},
};
use serde_json::{Value, json};

/// Port of every synthetic Service.
pub const PORT: u16 = 80;
/// Port of every synthetic endpoint.
pub const TARGET_PORT: u16 = 8080;
/// Node port of the first Service that has one; the others follow.
pub const NODE_PORT: u16 = 20_000;
/// Services of a cluster whose endpoint changes, see [`Cluster::changing`].
const CHANGING: u32 = 8;

/// `services` Services of one TCP port with `endpoints` ready endpoints each.
#[derive(Clone, Copy, Debug)]
pub struct Cluster {
    /// Number of Services, at most 65,536.
    pub services: u32,
    /// Endpoints of each, at most 256.
    pub endpoints: u32,
}

impl Cluster {
    /// ClusterIP of the `service`-th Service, in 10.96.0.0/12.
    pub fn cluster_ip(service: u32) -> Ipv4Addr {
        Ipv4Addr::from(0x0a60_0000 + 256 + service)
    }

    /// Address of an endpoint, in 11.0.0.0/8.
    pub fn endpoint(service: u32, endpoint: u32) -> Ipv4Addr {
        Ipv4Addr::from(0x0b00_0000 + service * 256 + endpoint)
    }

    /// Name of the `service`-th Service.
    pub fn name(service: u32) -> ServiceName {
        ServiceName::new("bench", &format!("service-{service}"))
    }

    /// All objects, as a source delivers them first.
    pub fn objects(self) -> Objects {
        let mut objects = Objects {
            node: Some(None),
            complete: true,
            ..Objects::default()
        };
        for service in 0..self.services {
            let port = Port::new("http", Protocol::Tcp, nonzero(PORT));
            let parsed = Service::new(&[IpAddr::V4(Self::cluster_ip(service))], vec![port]);
            objects
                .services
                .push((Self::name(service), Some(Arc::new(parsed))));
            let endpoints = (0..self.endpoints).map(|n| Self::endpoint(service, n));
            objects.slices.push(slice(service, endpoints));
        }
        objects
    }

    /// Some of the Services, each object as an API server writes it, as one Kubernetes `List`; `endpoint` says where the
    /// n-th endpoint of a Service is.
    pub fn full_manifest(
        self,
        services: Range<u32>,
        endpoint: impl Fn(u32, u32) -> Ipv4Addr,
    ) -> Value {
        let mut items = Vec::new();
        for service in services {
            let name = format!("service-{service}");
            let labels = json!({"app.kubernetes.io/name": name});
            let cluster_ip = Self::cluster_ip(service);
            items.push(json!({
                "apiVersion": "v1", "kind": "Service",
                "metadata": {
                    "namespace": "bench", "name": name, "uid": uid(service), "resourceVersion": "1",
                    "creationTimestamp": "2025-01-01T00:00:00Z", "labels": labels,
                },
                "spec": {
                    "clusterIP": cluster_ip, "clusterIPs": [cluster_ip], "type": "ClusterIP", "selector": labels,
                    "ipFamilies": ["IPv4"], "ipFamilyPolicy": "SingleStack", "internalTrafficPolicy": "Cluster",
                    "sessionAffinity": "None",
                    "ports": [{"name": "http", "port": PORT, "protocol": "TCP", "targetPort": TARGET_PORT}],
                },
                "status": {"loadBalancer": {}},
            }));
            let addresses: Vec<_> = (0..self.endpoints).map(|n| endpoint(service, n)).collect();
            let mut slice = slice_manifest(&name, &addresses);
            for (n, entry) in slice["endpoints"]
                .as_array_mut()
                .into_iter()
                .flatten()
                .enumerate()
            {
                entry["conditions"] = json!({"ready": true, "serving": true, "terminating": false});
                entry["nodeName"] = json!(format!("node-{}", (service as usize + n) % 1000));
                entry["zone"] = json!("zone-b");
                entry["targetRef"] = json!({
                    "kind": "Pod", "namespace": "bench", "name": format!("{name}-{n}"), "uid": uid(service),
                });
            }
            items.push(slice);
        }
        json!({"apiVersion": "v1", "kind": "List", "items": items})
    }

    /// Services whose endpoint a bench changes; they have just one, so that every new connection shows it. Spread over all.
    pub fn changing(self) -> Vec<u32> {
        let count = CHANGING.min(self.services);
        (0..count).map(|n| n * (self.services / count)).collect()
    }

    /// Whether `item` is the slice of a Service whose endpoint changes.
    pub fn is_changing_slice(self, item: &Value) -> bool {
        let changing = self.changing();
        item["kind"] == "EndpointSlice"
            && changing
                .iter()
                .any(|service| item["metadata"]["name"] == format!("service-{service}-1"))
    }

    /// [`Cluster::full_manifest`] of everything; the Services whose endpoint changes lead to `server`.
    pub fn manifest_with_changing(self, server: Ipv4Addr) -> Value {
        let mut list = self.full_manifest(0..self.services, Self::endpoint);
        let items = list["items"].as_array_mut().into_iter().flatten();
        for item in items.filter(|item| self.is_changing_slice(item)) {
            item["endpoints"] = json!([{"addresses": [server]}]);
        }
        list
    }

    /// As many Services as one Kubernetes `List` in JSON; the only endpoint of each is `backend`.
    pub fn manifest_to(self, backend: Ipv4Addr) -> Value {
        let mut items = Vec::new();
        for service in 0..self.services {
            let name = format!("service-{service}");
            items.push(json!({
                "apiVersion": "v1", "kind": "Service",
                "metadata": {"namespace": "bench", "name": name},
                "spec": {
                    "clusterIP": Self::cluster_ip(service), "clusterIPs": [Self::cluster_ip(service)],
                    "ports": [{"name": "http", "port": PORT, "protocol": "TCP"}],
                },
            }));
            items.push(slice_manifest(&name, &[backend]));
        }
        json!({"apiVersion": "v1", "kind": "List", "items": items})
    }

    /// As [`Cluster::manifest_to`], with a node port for each Service, [`NODE_PORT`] and the following ones.
    pub fn node_ports_to(self, backend: Ipv4Addr) -> Value {
        let mut list = self.manifest_to(backend);
        let items = list["items"].as_array_mut().into_iter().flatten();
        let services = items.filter(|item| item["kind"] == "Service");
        for (port, service) in (NODE_PORT..).zip(services) {
            service["spec"]["type"] = "NodePort".into();
            service["spec"]["ports"][0]["nodePort"] = port.into();
        }
        list
    }
}

/// The one slice of a Service.
pub fn slice(
    service: u32,
    endpoints: impl Iterator<Item = Ipv4Addr>,
) -> (SliceName, Option<Arc<Slice>>) {
    let port = EndpointPort::new("http", Protocol::Tcp, nonzero(TARGET_PORT));
    let endpoints = endpoints
        .map(|address| Endpoint::ready(IpAddr::V4(address)))
        .collect();
    let slice = Slice::new(Cluster::name(service), Family::V4, vec![port], endpoints);
    (
        SliceName::new("bench", &format!("service-{service}-1")),
        Some(Arc::new(slice)),
    )
}

/// The slice of the Service `name` as a manifest.
pub fn slice_manifest(name: &str, addresses: &[Ipv4Addr]) -> Value {
    let endpoints: Vec<_> = addresses
        .iter()
        .map(|ip| json!({"addresses": [ip]}))
        .collect();
    json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
        "metadata": {
            "namespace": "bench", "name": format!("{name}-1"),
            "labels": {"kubernetes.io/service-name": name},
        },
        "addressType": "IPv4",
        "ports": [{"name": "http", "port": TARGET_PORT, "protocol": "TCP"}],
        "endpoints": endpoints,
    })
}

fn uid(number: u32) -> String {
    format!("00000000-0000-4000-8000-{number:012}")
}

fn nonzero(port: u16) -> NonZeroU16 {
    NonZeroU16::new(port).expect("the ports above are not 0")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_of_a_cluster_are_distinct() {
        assert_ne!(Cluster::cluster_ip(0), Cluster::cluster_ip(1));
        assert_eq!(Cluster::endpoint(1, 0), Ipv4Addr::new(11, 0, 1, 0));
        let objects = Cluster {
            services: 3,
            endpoints: 2,
        }
        .objects();
        assert_eq!((objects.services.len(), objects.slices.len()), (3, 3));
    }

    #[test]
    fn every_service_has_a_node_port_of_its_own() {
        let cluster = Cluster {
            services: 2,
            endpoints: 1,
        };
        let list = cluster.node_ports_to(Ipv4Addr::LOCALHOST);
        let ports = |item: usize| &list["items"][item]["spec"]["ports"][0]["nodePort"];
        assert_eq!((ports(0), ports(2)), (&json!(20_000), &json!(20_001)));
        assert_eq!(list["items"][2]["spec"]["type"], "NodePort");
        assert_eq!(list["items"][3]["kind"], "EndpointSlice");
    }
}
