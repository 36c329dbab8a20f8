//! What the agent knows of the cluster: API objects, parsed once into types that cannot be wrong.
//!
//! Sources send [`Update`]s; [`Model::apply`] takes them in and says what they touch. An impossible object never gets
//! here: parsing refuses it, and its last good version stays.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    net::IpAddr,
    sync::Arc,
};

use ipnet::IpNet;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

pub use self::{
    node::{Node, NodeName},
    problem::{Effect, Kind, Problem},
    service::{Port, Service},
    service_cidr::{ServiceCidr, ServiceCidrName},
    slice::{Endpoint, EndpointPort, Slice, SliceName},
    update::{Dirty, Objects, Update},
};
pub use crate::state::ServiceName;
use crate::state::{Family, NodePortAddresses};
use service_cidr::ServiceCidrs;

mod node;
mod problem;
mod service;
mod service_cidr;
mod slice;
mod text;
mod update;

/// Labels whose mere presence takes an object away from this proxy (kube-proxy's list and watch selector).
const EXCLUDING_LABELS: [&str; 2] = [
    "service.kubernetes.io/service-proxy-name",
    "service.kubernetes.io/headless",
];

fn excluded(metadata: &ObjectMeta) -> bool {
    metadata.labels.as_ref().is_some_and(|labels| {
        EXCLUDING_LABELS
            .iter()
            .any(|label| labels.contains_key(*label))
    })
}

/// The cluster as this node has to know it.
#[derive(Clone, Debug)]
pub struct Model {
    here: NodeName,
    services: BTreeMap<ServiceName, Arc<Service>>,
    /// By Service; each list sorted by the slice's name.
    slices: BTreeMap<ServiceName, Vec<(SliceName, Arc<Slice>)>>,
    /// The Service under which a slice is filed.
    filed: HashMap<SliceName, ServiceName>,
    /// The /24 and /64 that an endpoint was ever in: a new ClusterIP is nearly never in one of them.
    neighbourhoods: HashSet<u64>,
    node: Arc<Node>,
    /// There has been a Node object.
    has_node: bool,
    service_cidrs: ServiceCidrs,
    addresses: BTreeSet<IpAddr>,
    node_ports: NodePortAddresses,
    /// Stands for that of the Node in its family.
    main_address: Option<IpAddr>,
    has_objects: bool,
    has_addresses: bool,
    complete: bool,
}

impl Model {
    /// An empty cluster seen from the node `here`.
    pub fn new(here: NodeName) -> Self {
        Self {
            here,
            services: BTreeMap::new(),
            slices: BTreeMap::new(),
            filed: HashMap::new(),
            neighbourhoods: HashSet::new(),
            node: Arc::default(),
            has_node: false,
            service_cidrs: ServiceCidrs::default(),
            addresses: BTreeSet::new(),
            node_ports: NodePortAddresses::default(),
            main_address: None,
            has_objects: false,
            has_addresses: false,
            complete: false,
        }
    }

    /// The same, where only these addresses serve node ports.
    #[must_use]
    pub fn with_node_ports(self, node_ports: NodePortAddresses) -> Self {
        Self { node_ports, ..self }
    }

    /// The same, where this is the node's main address of its family, whatever the Node says.
    #[must_use]
    pub fn with_main_address(self, main_address: Option<IpAddr>) -> Self {
        Self {
            main_address,
            ..self
        }
    }

    /// Takes in a change.
    pub fn apply(&mut self, update: Update) -> Dirty {
        match update {
            Update::Objects(objects) => self.apply_objects(objects),
            Update::Addresses(addresses) => self.apply_addresses(addresses),
        }
    }

    /// The Service of a slice that is known.
    pub fn service_of(&self, slice: &SliceName) -> Option<&ServiceName> {
        self.filed.get(slice)
    }

    /// Whether the source of `update` has delivered before; its first update says nothing of what changed.
    pub fn is_news(&self, update: &Update) -> bool {
        match update {
            Update::Objects(_) => self.has_objects,
            Update::Addresses(_) => self.has_addresses,
        }
    }

    /// Whether every source has delivered: before this nothing is written to the kernel.
    pub fn is_synced(&self) -> bool {
        self.has_objects && self.has_addresses
    }

    /// Whether every source has delivered everything: before this nothing is deleted from the kernel.
    pub fn is_complete(&self) -> bool {
        self.is_synced() && self.complete
    }

    /// The node that the agent runs on.
    pub fn node_name(&self) -> &NodeName {
        &self.here
    }

    /// Whether load balancers may send it traffic, for all that its Node says; none while there has been no Node.
    pub fn is_eligible(&self) -> Option<bool> {
        self.has_node.then_some(!self.node.is_leaving)
    }

    /// Its zone.
    pub fn zone(&self) -> Option<&str> {
        self.node.zone.as_deref()
    }

    /// The networks of its pods, one of a family.
    pub fn pod_networks(&self) -> &[IpNet] {
        &self.node.pod_networks
    }

    /// The networks that ClusterIPs are taken from.
    pub fn service_networks(&self) -> BTreeSet<IpNet> {
        self.service_cidrs.networks()
    }

    /// Its addresses.
    pub fn addresses(&self) -> &BTreeSet<IpAddr> {
        &self.addresses
    }

    /// Whether node ports are to be served on some addresses of a family only.
    pub fn restricts_node_ports(&self, family: Family) -> bool {
        self.node_ports.restricts(family)
    }

    /// Whether node ports are to be served on `address`.
    pub fn serves_node_ports(&self, address: IpAddr) -> bool {
        let is_other =
            |ip: &&IpAddr| Some(ip.is_ipv4()) != self.main_address.map(|ip| ip.is_ipv4());
        let of_node = self.node.addresses.iter().filter(is_other);
        let main: Vec<IpAddr> = of_node.copied().chain(self.main_address).collect();
        self.node_ports.contains(address, &main)
    }

    /// Every Service, by name.
    pub fn services(&self) -> impl Iterator<Item = (&ServiceName, &Service)> {
        self.services
            .iter()
            .map(|(name, service)| (name, &**service))
    }

    /// A Service.
    pub fn service(&self, name: &ServiceName) -> Option<&Service> {
        self.services.get(name).map(|service| &**service)
    }

    /// The slices of a Service, by name of the slice.
    pub fn slices<'a>(
        &'a self,
        service: &ServiceName,
    ) -> impl Iterator<Item = &'a Slice> + use<'a> {
        let slices = self.slices.get(service).map_or(&[][..], Vec::as_slice);
        slices.iter().map(|(_, slice)| &**slice)
    }

    /// All slices, with the Service of each.
    pub(crate) fn all_slices(&self) -> impl Iterator<Item = (&ServiceName, &Slice)> {
        self.slices
            .iter()
            .flat_map(|(name, slices)| slices.iter().map(move |(_, slice)| (name, &**slice)))
    }

    /// No means no; yes means that it takes a look at all slices to know.
    pub(crate) fn may_have_endpoint_at(&self, address: IpAddr) -> bool {
        self.neighbourhoods.contains(&neighbourhood(address))
    }

    fn apply_objects(&mut self, objects: Objects) -> Dirty {
        let Objects {
            services,
            slices,
            node,
            service_cidrs,
            complete,
        } = objects;
        let mut dirty = Dirty::default();
        for (name, service) in services {
            let is_new = match service {
                Some(service) => {
                    let before = self.services.insert(name.clone(), Arc::clone(&service));
                    before.as_ref() != Some(&service)
                }
                None => self.services.remove(&name).is_some(),
            };
            if is_new {
                dirty.services.insert(name);
            }
        }
        for (name, slice) in slices {
            self.apply_slice(name, slice, &mut dirty);
        }
        if let Some(node) = node {
            self.has_node |= node.is_some();
            let node = node.unwrap_or_else(|| self.without_node());
            self.apply_node(node, &mut dirty);
        }
        dirty.networks |= self.service_cidrs.apply(service_cidrs);
        self.has_objects = true;
        self.complete = complete;
        dirty
    }

    fn apply_slice(&mut self, name: SliceName, slice: Option<Arc<Slice>>, dirty: &mut Dirty) {
        let filed = self.filed.get(&name).cloned();
        if let Some(service) = filed.as_ref().and_then(|service| self.slices.get(service)) {
            let at = position(service, &name);
            if let (Ok(at), Some(slice)) = (at, &slice)
                && service[at].1 == *slice
            {
                return;
            }
        }
        if let Some(service) = filed {
            self.remove_slice(&service, &name);
            dirty.services.insert(service);
        }
        if let Some(slice) = slice {
            let endpoints = slice.endpoints.iter();
            self.neighbourhoods
                .extend(endpoints.map(|endpoint| neighbourhood(endpoint.address)));
            let service = slice.service.clone();
            let slices = self.slices.entry(service.clone()).or_default();
            if let Err(at) = position(slices, &name) {
                slices.reserve_exact(1);
                slices.insert(at, (name.clone(), slice));
            }
            self.filed.insert(name, service.clone());
            dirty.services.insert(service);
        }
    }

    fn remove_slice(&mut self, service: &ServiceName, name: &SliceName) {
        self.filed.remove(name);
        if let Some(slices) = self.slices.get_mut(service) {
            if let Ok(at) = position(slices, name) {
                slices.remove(at);
            }
            if slices.is_empty() {
                self.slices.remove(service);
            }
        }
    }

    /// The node when its object is deleted: it has its addresses and its pods all the same. kube-proxy keeps those too.
    fn without_node(&self) -> Arc<Node> {
        let mut node = Node::clone(&self.node);
        node.zone = None;
        Arc::new(node)
    }

    /// Changed addresses may serve node ports. A changed zone touches every Service with zone hints, as kube-proxy's full sync on a changed Node does.
    fn apply_node(&mut self, node: Arc<Node>, dirty: &mut Dirty) {
        if self.node == node {
            return;
        }
        dirty.addresses |= self.node.addresses != node.addresses;
        dirty.networks |= self.node.pod_networks != node.pod_networks;
        self.node = node;
        let hinted = self
            .all_slices()
            .filter(|(_, slice)| !slice.zones.is_empty());
        let hinted: Vec<_> = hinted.map(|(name, _)| name.clone()).collect();
        dirty.services.extend(hinted);
    }

    fn apply_addresses(&mut self, addresses: BTreeSet<IpAddr>) -> Dirty {
        let is_first = !std::mem::replace(&mut self.has_addresses, true);
        let changed: BTreeSet<IpAddr> = self
            .addresses
            .symmetric_difference(&addresses)
            .copied()
            .collect();
        self.addresses = addresses;
        let is_in = |range: &IpNet| changed.iter().any(|ip| range.contains(ip));
        let touched = |service: &Service| {
            service.cluster_ips.iter().any(|ip| changed.contains(ip))
                || service.source_ranges.iter().any(is_in)
        };
        Dirty {
            services: self
                .services()
                .filter(|(_, service)| !changed.is_empty() && touched(service))
                .map(|(name, _)| name.clone())
                .collect(),
            addresses: is_first || !changed.is_empty(),
            networks: false,
        }
    }
}

fn neighbourhood(address: IpAddr) -> u64 {
    match address {
        IpAddr::V4(v4) => u64::from(v4.to_bits() >> 8),
        IpAddr::V6(v6) => (v6.to_bits() >> 64) as u64,
    }
}

fn position(slices: &[(SliceName, Arc<Slice>)], name: &SliceName) -> Result<usize, usize> {
    slices.binary_search_by(|(other, _)| other.cmp(name))
}

#[cfg(test)]
mod tests;
