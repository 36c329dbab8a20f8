//! An EndpointSlice: endpoints of one Service in one family, 20 bytes each.

use std::{collections::BTreeMap, fmt, net::IpAddr, num::NonZeroU16, sync::Arc, time::SystemTime};

use jiff::Timestamp;
use k8s_openapi::api::discovery::v1;

use super::{
    NodeName, excluded,
    problem::{Blame, Kind, Problem, shorten},
    text,
};
use crate::state::{Family, Protocol, ServiceName};

/// When the change happened that led to this state of a slice (core/v1, `EndpointsLastChangeTriggerTime`).
const TRIGGER_TIME: &str = "endpoints.kubernetes.io/last-change-trigger-time";
/// Bad endpoints of one slice, which may have a thousand, that are told of each by itself.
const TOLD: usize = 5;
const SERVICE_NAME_LABEL: &str = "kubernetes.io/service-name";

/// An EndpointSlice's "namespace/name".
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SliceName(Arc<str>);

impl SliceName {
    /// Joins both parts.
    pub fn new(namespace: &str, name: &str) -> Self {
        Self(format!("{namespace}/{name}").into())
    }

    /// "namespace/name".
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for SliceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Endpoints of a Service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Slice {
    pub(crate) service: ServiceName,
    pub(crate) family: Family,
    pub(crate) ports: Box<[EndpointPort]>,
    pub(crate) endpoints: Box<[Endpoint]>,
    /// Distinct `hints.forZones`, by [`Endpoint::zones`] minus one.
    pub(crate) zones: Box<[Zones]>,
    /// When what changed it happened, as its controller says.
    pub(crate) triggered: Option<SystemTime>,
}

/// Zones that an endpoint should be used from.
pub(crate) type Zones = Box<[Arc<str>]>;

/// A port that each endpoint of the slice serves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EndpointPort {
    pub(crate) name: Arc<str>,
    pub(crate) protocol: Protocol,
    pub(crate) port: NonZeroU16,
}

impl EndpointPort {
    /// The port that the Service's port of this name and protocol leads to.
    pub fn new(name: &str, protocol: Protocol, port: NonZeroU16) -> Self {
        Self {
            name: name.into(),
            protocol,
            port,
        }
    }
}

/// One endpoint. 20 bytes: a cluster's 250,000 are 5 MB.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Endpoint {
    pub(crate) address: IpAddr,
    bits: u8,
    /// 0 without zone hints, else one more than the index into [`Slice::zones`].
    pub(crate) zones: u16,
}

const _: () = assert!(size_of::<Endpoint>() == 20);

const READY: u8 = 1;
const SERVING: u8 = 2;
const TERMINATING: u8 = 4;
const ON_THIS_NODE: u8 = 8;
const NODE_HINTS: u8 = 16;
const HINTED_HERE: u8 = 32;

impl Endpoint {
    /// A ready endpoint on another node.
    pub fn ready(address: IpAddr) -> Self {
        Self {
            address,
            bits: READY | SERVING,
            zones: 0,
        }
    }

    /// A terminating endpoint that still serves.
    pub fn draining(address: IpAddr) -> Self {
        Self {
            bits: SERVING | TERMINATING,
            ..Self::ready(address)
        }
    }

    /// The same on this node.
    #[must_use]
    pub fn on_this_node(self) -> Self {
        Self {
            bits: self.bits | ON_THIS_NODE,
            ..self
        }
    }

    pub(crate) fn is_ready(&self) -> bool {
        self.bits & READY != 0
    }

    pub(crate) fn is_serving(&self) -> bool {
        self.bits & SERVING != 0
    }

    pub(crate) fn is_terminating(&self) -> bool {
        self.bits & TERMINATING != 0
    }

    pub(crate) fn is_on_this_node(&self) -> bool {
        self.bits & ON_THIS_NODE != 0
    }

    /// `hints.forNodes` is not empty.
    pub(crate) fn has_node_hints(&self) -> bool {
        self.bits & NODE_HINTS != 0
    }

    /// `hints.forNodes` names this node.
    pub(crate) fn is_hinted_here(&self) -> bool {
        self.bits & HINTED_HERE != 0
    }
}

/// What is no time is passed over: it is only counted.
fn triggered(object: &v1::EndpointSlice) -> Option<SystemTime> {
    let annotations = object.metadata.annotations.as_ref()?;
    let time: Timestamp = annotations.get(TRIGGER_TIME)?.parse().ok()?;
    Some(time.into())
}

impl Slice {
    /// A slice of endpoints without zone hints.
    ///
    /// # Panics
    /// An endpoint is not of `family`.
    pub fn new(
        service: ServiceName,
        family: Family,
        ports: Vec<EndpointPort>,
        endpoints: Vec<Endpoint>,
    ) -> Self {
        assert!(
            endpoints
                .iter()
                .all(|endpoint| Family::of(endpoint.address) == family),
            "endpoints of a slice have its family"
        );
        Self {
            service,
            family,
            ports: ports.into(),
            endpoints: endpoints.into(),
            zones: Box::default(),
            triggered: None,
        }
    }

    /// The name under which `object` is kept.
    ///
    /// # Errors
    /// It is no possible name.
    pub fn name(object: &v1::EndpointSlice) -> Result<SliceName, Problem> {
        let name = object.metadata.name.as_deref().unwrap_or_default();
        let namespace = object.metadata.namespace.as_deref().unwrap_or("default");
        let blame = Blame::new(Kind::EndpointSlice, Some(namespace), name);
        text::label(namespace).map_err(|what| blame.refuse("metadata.namespace", what))?;
        text::subdomain(name).map_err(|what| blame.refuse("metadata.name", what))?;
        Ok(SliceName::new(namespace, name))
    }

    /// Reads a slice as seen from `here`, and says which ports and endpoints it leaves out, of many the first; nothing if it is not for this
    /// proxy (another proxy's, of a headless Service, of no Service, FQDN).
    ///
    /// # Errors
    /// What makes it impossible.
    pub fn parse(
        object: &v1::EndpointSlice,
        here: &NodeName,
    ) -> Result<Option<(Self, Vec<Problem>)>, Problem> {
        let name = Self::name(object)?;
        let (namespace, short) = name.as_str().split_once('/').unwrap_or_default();
        let blame = Blame::new(Kind::EndpointSlice, Some(namespace), short);
        let labels = object.metadata.labels.as_ref();
        let service = labels.and_then(|labels| labels.get(SERVICE_NAME_LABEL));
        let Some(service) = service.filter(|name| !name.is_empty() && !excluded(&object.metadata))
        else {
            return Ok(None);
        };
        text::label(service)
            .map_err(|what| blame.refuse(format!("metadata.labels[{SERVICE_NAME_LABEL}]"), what))?;
        let family = match object.address_type.as_str() {
            "IPv4" => Family::V4,
            "IPv6" => Family::V6,
            "FQDN" => return Ok(None),
            other => {
                let what = format!("\"{}\" is not IPv4, IPv6 or FQDN", shorten(other));
                return Err(blame.refuse("addressType", what));
            }
        };
        let (ports, mut trimmed) = ports(object, &blame)?;
        let mut slice = Self {
            service: ServiceName::new(namespace, service),
            family,
            ports,
            endpoints: Box::default(),
            zones: Box::default(),
            triggered: triggered(object),
        };
        trimmed.extend(slice.read_endpoints(&object.endpoints, here, &blame)?);
        Ok(Some((slice, trimmed)))
    }

    fn read_endpoints(
        &mut self,
        objects: &[v1::Endpoint],
        here: &NodeName,
        blame: &Blame,
    ) -> Result<Vec<Problem>, Problem> {
        let mut trimmed = Vec::new();
        let mut endpoints = Vec::with_capacity(objects.len());
        let mut zones = ZoneTable::default();
        for (index, object) in objects.iter().enumerate() {
            match endpoint_address(object, self.family) {
                Ok(address) => endpoints.push(Endpoint {
                    address,
                    bits: bits(object, here),
                    zones: zones.index(object).map_err(|what| {
                        blame.refuse(format!("endpoints[{index}].hints.forZones"), what)
                    })?,
                }),
                Err(what) => {
                    trimmed.push(blame.trim(format!("endpoints[{index}].addresses[0]"), what));
                }
            }
        }
        let more = trimmed.len().saturating_sub(TOLD);
        if more > 0 {
            trimmed.truncate(TOLD);
            trimmed.push(blame.trim("endpoints", format!("{more} more have no possible address")));
        }
        self.endpoints = endpoints.into();
        self.zones = zones.table.into();
        Ok(trimmed)
    }
}

/// Only the first address counts (as in kube-proxy; the API says that consumers need not support more).
fn endpoint_address(object: &v1::Endpoint, family: Family) -> Result<IpAddr, String> {
    let text = object.addresses.first().map_or("", String::as_str);
    let address = text::address(text)?;
    if Family::of(address) == family {
        Ok(address)
    } else {
        Err(format!(
            "{address} is not of the slice's addressType {family}"
        ))
    }
}

fn bits(object: &v1::Endpoint, here: &NodeName) -> u8 {
    let bit = |bit: u8, is_set: bool| if is_set { bit } else { 0 };
    let conditions = object.conditions.as_ref();
    let condition = |value: Option<Option<bool>>, default| value.flatten().unwrap_or(default);
    let for_nodes = object
        .hints
        .as_ref()
        .and_then(|hints| hints.for_nodes.as_deref());
    let for_nodes = for_nodes.unwrap_or_default();
    bit(READY, condition(conditions.map(|c| c.ready), true))
        | bit(SERVING, condition(conditions.map(|c| c.serving), true))
        | bit(
            TERMINATING,
            condition(conditions.map(|c| c.terminating), false),
        )
        | bit(
            ON_THIS_NODE,
            object.node_name.as_deref() == Some(here.as_str()),
        )
        | bit(NODE_HINTS, !for_nodes.is_empty())
        | bit(
            HINTED_HERE,
            for_nodes.iter().any(|node| node.name == here.as_str()),
        )
}

/// Numbers the distinct zone hints of a slice.
#[derive(Default)]
struct ZoneTable {
    table: Vec<Zones>,
    indices: BTreeMap<Vec<String>, u16>,
}

impl ZoneTable {
    fn index(&mut self, object: &v1::Endpoint) -> Result<u16, String> {
        let hints = object
            .hints
            .as_ref()
            .and_then(|hints| hints.for_zones.as_deref());
        let mut names: Vec<String> = hints
            .unwrap_or_default()
            .iter()
            .map(|zone| zone.name.clone())
            .collect();
        if names.is_empty() {
            return Ok(0);
        }
        names.sort();
        if let Some(index) = self.indices.get(&names) {
            return Ok(*index);
        }
        self.table
            .push(names.iter().map(|name| name.as_str().into()).collect());
        let index = u16::try_from(self.table.len())
            .map_err(|_| format!("more than {} different hints in one slice", u16::MAX))?;
        self.indices.insert(names, index);
        Ok(index)
    }
}

/// A protocol that came after this agent takes no other port with it.
fn ports(
    object: &v1::EndpointSlice,
    blame: &Blame,
) -> Result<(Box<[EndpointPort]>, Vec<Problem>), Problem> {
    let mut found: Vec<EndpointPort> = Vec::new();
    let mut trimmed = Vec::new();
    for (index, port) in object.ports.iter().flatten().enumerate() {
        let blamed = |field: &str, what| blame.refuse(format!("ports[{index}].{field}"), what);
        // The API server turns a missing name into "".
        let name = port.name.as_deref().unwrap_or_default();
        if !name.is_empty() {
            text::label(name).map_err(|what| blamed("name", what))?;
        }
        let protocol = match text::protocol(port.protocol.as_deref()) {
            Ok(protocol) => protocol,
            Err(what) => {
                trimmed.push(blame.trim(format!("ports[{index}].protocol"), what));
                continue;
            }
        };
        if found.iter().any(|other| &*other.name == name) {
            return Err(blamed(
                "name",
                format!("\"{name}\" is the name of two ports"),
            ));
        }
        // No number means "all ports" in the API and nothing to kube-proxy.
        if let Some(number) = port.port.filter(|number| *number != 0) {
            found.push(EndpointPort {
                name: name.into(),
                protocol,
                port: text::port(number).map_err(|what| blamed("port", what))?,
            });
        }
    }
    Ok((found.into(), trimmed))
}

#[cfg(test)]
mod tests;
