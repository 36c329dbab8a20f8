//! From events to changes of the model: which objects are known, and what a complete list lacks. No client, no clock.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    fmt::Display,
    hash::Hash,
    net::IpAddr,
    sync::Arc,
};

use k8s_openapi::api::{core::v1, discovery::v1 as discovery, networking::v1 as networking};
use kube::runtime::watcher::Event;

use self::pods::Pods;
use super::stream::{Heard, Item};
use crate::{
    model::{
        self, Kind, Node, NodeName, Objects, Service, ServiceCidr, ServiceCidrName, ServiceName,
        Slice, SliceName,
    },
    sources::Problem,
};

mod pods;

/// The Service by whose address pods reach the API server.
const API_SERVICE: &str = "default/kubernetes";

/// How the API server is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Server {
    /// By an address.
    Address(IpAddr),
    /// By a name of its own.
    Name,
    /// By the name that the cluster's DNS has for its Service.
    ServiceName,
}

impl Server {
    /// `host` is the one of its URL.
    pub fn new(host: &str) -> Self {
        let host = host.trim_matches(['[', ']']);
        let mut labels = host.split('.');
        let of_service = ["kubernetes", "default", "svc"];
        let is_service = of_service.iter().all(|of| labels.next() == Some(of));
        match host.parse() {
            Ok(address) => Self::Address(address),
            Err(_) if is_service || host == "kubernetes.default" => Self::ServiceName,
            Err(_) => Self::Name,
        }
    }
}

/// Takes events, and gives what they change.
#[derive(Debug)]
pub struct Collector {
    here: NodeName,
    server: Server,
    /// The API server is reached by the Service, which this agent makes work.
    is_circular: bool,
    services: Known<ServiceName>,
    slices: Known<SliceName>,
    /// Its list was complete, with or without it.
    is_node_listed: bool,
    /// It has been there.
    has_node: bool,
    service_cidrs: Known<ServiceCidrName>,
    /// They are to be in what is given out first, if they come in time.
    awaits_service_cidrs: bool,
    pods: Pods,
    /// Not given out yet.
    objects: Objects,
    /// Something was given out.
    has_begun: bool,
    /// Nobody waits for the Node and the ServiceCIDRs any longer.
    goes_on: bool,
    /// Impossible objects, by "kind name".
    impossible: BTreeMap<String, Vec<Problem>>,
    /// Why a kind cannot be followed.
    unheard: BTreeMap<Kind, String>,
}

/// The objects of one kind.
#[derive(Debug)]
struct Known<N> {
    names: HashSet<N>,
    /// Those of the list that is being read.
    listed: Option<HashSet<N>>,
    /// A list was complete.
    is_synced: bool,
}

impl<N> Default for Known<N> {
    fn default() -> Self {
        Self {
            names: HashSet::new(),
            listed: None,
            is_synced: false,
        }
    }
}

impl<N: Clone + Eq + Hash> Known<N> {
    /// One that is there.
    fn see(&mut self, name: &N) {
        if let Some(listed) = &mut self.listed {
            listed.insert(name.clone());
        }
    }

    /// A list begins.
    fn begin(&mut self) {
        self.listed = Some(HashSet::new());
    }

    /// The list is complete: those that it lacks are gone.
    fn end(&mut self) -> Vec<N> {
        self.is_synced = true;
        let listed = self.listed.take().unwrap_or_default();
        let gone = self.names.iter().filter(|name| !listed.contains(*name));
        gone.cloned().collect()
    }
}

impl Collector {
    /// One that knows nothing. Without a wish for ServiceCIDRs it hears of none.
    pub fn new(here: NodeName, server: Server, wants_service_cidrs: bool) -> Self {
        Self {
            here,
            server,
            is_circular: server == Server::ServiceName,
            services: Known::default(),
            slices: Known::default(),
            is_node_listed: false,
            has_node: false,
            service_cidrs: Known::default(),
            awaits_service_cidrs: wants_service_cidrs,
            pods: Pods::default(),
            objects: Objects::default(),
            has_begun: false,
            goes_on: false,
            impossible: BTreeMap::new(),
            unheard: BTreeMap::new(),
        }
    }

    /// The node.
    pub fn here(&self) -> &NodeName {
        &self.here
    }

    /// Whether ServiceCIDRs are wanted, and may still come in time.
    pub fn awaits_service_cidrs(&self) -> bool {
        self.awaits_service_cidrs
    }

    /// Takes an event.
    pub fn take(&mut self, item: Item) {
        match item {
            Item::Service(heard) => self.hear(Kind::Service, heard, Self::service),
            Item::Slice(heard) => self.hear(Kind::EndpointSlice, heard, Self::slice),
            Item::Node(heard) => self.hear(Kind::Node, heard, Self::node),
            Item::ServiceCidr(heard) => {
                // Those that are refused, or that there are not, nobody waits for.
                self.awaits_service_cidrs &= matches!(heard, Heard::Event(_) | Heard::Quiet);
                self.hear(Kind::ServiceCidr, heard, Self::service_cidr);
            }
            Item::Pod(heard) => self.hear(Kind::Pod, heard, |own, event| own.pods.take(event)),
        }
    }

    /// What has changed; nothing before there is everything.
    pub fn objects(&mut self) -> Option<Objects> {
        let is_known = self.services.is_synced && self.slices.is_synced;
        if !is_known || self.waits() {
            return None;
        }
        let was_complete = std::mem::replace(&mut self.objects.complete, self.is_node_listed);
        let is_news = !self.has_begun || was_complete != self.objects.complete;
        if self.objects.is_empty() && !is_news {
            return None;
        }
        self.has_begun = true;
        let next = Objects {
            complete: self.objects.complete,
            ..Objects::default()
        };
        Some(std::mem::replace(&mut self.objects, next))
    }

    /// The unique ids of pods that ask for their sockets to be left alone.
    pub fn opted_out(&self) -> BTreeSet<String> {
        self.pods.ids()
    }

    /// Whether only the Node or the ServiceCIDRs are missing.
    pub fn waits(&self) -> bool {
        let is_known = self.services.is_synced && self.slices.is_synced;
        let lacks_more = !self.is_node_listed || self.awaits_service_cidrs;
        is_known && lacks_more && !self.goes_on
    }

    /// Has everything served without them; nothing is deleted until the Node is known.
    pub fn go_on(&mut self) {
        self.goes_on = true;
    }

    /// All that is wrong now, sorted.
    pub fn problems(&self) -> Vec<Problem> {
        let unheard = self.unheard.iter().map(|(kind, error)| Problem {
            place: format!("{kind}s"),
            line: None,
            what: error.clone(),
        });
        let circular = self.is_circular.then(|| Problem {
            place: "API server".to_owned(),
            line: None,
            what: format!(
                "it is reached at the address of the Service {API_SERVICE}, which this agent itself makes work: when the \
                node starts anew there is no way there; give its own address with --master or in the kubeconfig"
            ),
        });
        let lacks_node = self.is_node_listed && !self.has_node;
        let nodeless = lacks_node.then(|| Problem {
            place: format!("Node {}", self.here),
            line: None,
            what: "the API server has none of this name: Services are served, but without the Node's addresses, networks and \
                   zone; is --hostname-override the name that kubelet gave it?"
                .to_owned(),
        });
        let impossible = self.impossible.values().flatten().cloned();
        let all = unheard.chain(circular).chain(nodeless).chain(impossible);
        let mut found: Vec<Problem> = all.collect();
        found.sort();
        found
    }

    fn hear<K>(&mut self, kind: Kind, heard: Heard<K>, take: fn(&mut Self, Event<K>)) {
        match heard {
            Heard::Failed(error) => {
                self.unheard.insert(kind, error);
            }
            Heard::Quiet | Heard::Unserved => {
                self.unheard.remove(&kind);
            }
            Heard::Event(event) => {
                self.unheard.remove(&kind);
                take(self, *event);
            }
        }
    }

    /// Says what is wrong with an object; nothing ends what was said before.
    fn judge(&mut self, kind: Kind, name: &impl Display, wrong: Vec<model::Problem>) {
        let object = format!("{kind} {name}");
        let problems = wrong.into_iter().map(|problem| Problem {
            place: object.clone(),
            line: None,
            what: format!("{}: {}; {}", problem.field, problem.what, problem.effect),
        });
        let problems: Vec<Problem> = problems.collect();
        match problems.is_empty() {
            true => self.impossible.remove(&object),
            false => self.impossible.insert(object, problems),
        };
    }

    fn service(&mut self, event: Event<v1::Service>) {
        let read = |object: &v1::Service, _: &NodeName| Service::parse(object);
        let changes = self.changes(
            event,
            Kind::Service,
            |of| &mut of.services,
            Service::name,
            read,
        );
        let api = changes
            .iter()
            .find(|(name, _)| name.as_str() == API_SERVICE);
        if let Some((_, service)) = api {
            let mut ips = service
                .iter()
                .flat_map(|service| service.cluster_ips.iter());
            self.is_circular = self.server == Server::ServiceName
                || ips.any(|ip| self.server == Server::Address(*ip));
        }
        self.objects.services.extend(changes);
    }

    fn slice(&mut self, event: Event<discovery::EndpointSlice>) {
        let kind = Kind::EndpointSlice;
        let changes = self.changes(event, kind, |of| &mut of.slices, Slice::name, Slice::parse);
        self.objects.slices.extend(changes);
    }

    fn service_cidr(&mut self, event: Event<networking::ServiceCIDR>) {
        let changes = self.changes(
            event,
            Kind::ServiceCidr,
            |of| &mut of.service_cidrs,
            ServiceCidr::name,
            |object, _| ServiceCidr::parse(object).map(Some),
        );
        self.awaits_service_cidrs &= !self.service_cidrs.is_synced;
        self.objects.service_cidrs.extend(changes);
    }

    /// What an event changes of the objects in `known`; `read` gives what is used of one, and what of it is left out.
    fn changes<K, N: Clone + Display + Eq + Hash, V>(
        &mut self,
        event: Event<K>,
        kind: Kind,
        known: fn(&mut Self) -> &mut Known<N>,
        name: fn(&K) -> Result<N, model::Problem>,
        read: impl Fn(&K, &NodeName) -> Result<Option<(V, Vec<model::Problem>)>, model::Problem>,
    ) -> Vec<(N, Option<Arc<V>>)> {
        let gone = match event {
            Event::Apply(object) | Event::InitApply(object) => {
                let name = match name(&object) {
                    Ok(name) => name,
                    Err(problem) => {
                        let of = problem.object.clone();
                        self.judge(kind, &of, vec![problem]);
                        return Vec::new();
                    }
                };
                known(self).see(&name);
                match read(&object, &self.here) {
                    Ok(Some((value, left_out))) => {
                        self.judge(kind, &name, left_out);
                        known(self).names.insert(name.clone());
                        return vec![(name, Some(Arc::new(value)))];
                    }
                    Ok(None) => vec![name],
                    // Its last good version stays.
                    Err(problem) => {
                        self.judge(kind, &name, vec![problem]);
                        return Vec::new();
                    }
                }
            }
            Event::Delete(object) => name(&object).into_iter().collect(),
            Event::Init => {
                known(self).begin();
                Vec::new()
            }
            Event::InitDone => known(self).end(),
        };
        for name in &gone {
            self.judge(kind, name, Vec::new());
        }
        let known = known(self);
        let gone = gone.into_iter().filter(|name| known.names.remove(name));
        gone.map(|name| (name, None)).collect()
    }

    fn node(&mut self, event: Event<v1::Node>) {
        match event {
            Event::Apply(object) | Event::InitApply(object) => {
                // An old server may ignore the selector.
                if Node::name(&object).is_ok_and(|name| name == self.here) {
                    self.has_node = true;
                    self.objects.node = Some(Some(Arc::new(Node::parse(&object))));
                }
            }
            // A Node that is made again (a machine that was reinstalled) is soon there; until then what was known holds.
            Event::Delete(_) | Event::Init => {}
            Event::InitDone => self.is_node_listed = true,
        }
    }
}

#[cfg(test)]
mod tests;
