//! What a source delivers, and what that touches.

use std::{collections::BTreeSet, net::IpAddr, sync::Arc};

use super::{Node, Service, ServiceCidr, ServiceCidrName, ServiceName, Slice, SliceName};

/// A consistent change of what one source delivers. The first one of each source is everything it has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Update {
    /// Services, EndpointSlices, the own Node and ServiceCIDRs.
    Objects(Objects),
    /// All addresses assigned to this node's links, without loopback.
    Addresses(BTreeSet<IpAddr>),
}

/// Changed API objects; `None` stands for a deleted one.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Objects {
    /// Services.
    pub services: Vec<(ServiceName, Option<Arc<Service>>)>,
    /// EndpointSlices.
    pub slices: Vec<(SliceName, Option<Arc<Slice>>)>,
    /// The own Node, if it changed.
    pub node: Option<Option<Arc<Node>>>,
    /// ServiceCIDRs, from a source that follows them.
    pub service_cidrs: Vec<(ServiceCidrName, Option<Arc<ServiceCidr>>)>,
    /// Everything that exists has been read. Until then nothing may be deleted from the kernel.
    pub complete: bool,
}

impl Objects {
    /// Whether nothing changed.
    pub fn is_empty(&self) -> bool {
        let Self {
            services,
            slices,
            node,
            service_cidrs,
            complete: _,
        } = self;
        services.is_empty() && slices.is_empty() && node.is_none() && service_cidrs.is_empty()
    }
}

/// What an update touched.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Dirty {
    /// Services to compile again; some may be gone.
    pub services: BTreeSet<ServiceName>,
    /// The node's addresses changed.
    pub addresses: bool,
    /// The networks of the node's pods or those of Services changed: every rule may depend on them.
    pub networks: bool,
}

impl Dirty {
    /// Whether nothing was touched.
    pub fn is_empty(&self) -> bool {
        self.services.is_empty() && !self.addresses && !self.networks
    }

    /// Adds what another update touched. `BTreeSet::append` would rebuild the whole set for each of many small ones.
    pub fn merge(&mut self, other: Self) {
        let Self {
            services,
            addresses,
            networks,
        } = other;
        self.services.extend(services);
        self.addresses |= addresses;
        self.networks |= networks;
    }
}
