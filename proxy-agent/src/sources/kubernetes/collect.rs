//! From events to changes of the model: which objects are known, and what a complete list lacks. No client, no clock.

use std::{
    collections::{BTreeMap, HashSet},
    hash::Hash,
    net::IpAddr,
    sync::Arc,
};

use k8s_openapi::api::{core::v1, discovery::v1 as discovery};
use kube::runtime::watcher::Event;

use super::stream::{Heard, Item};
use crate::{
    model::{self, Kind, Node, NodeName, Objects, Service, ServiceName, Slice, SliceName},
    sources::Problem,
};

/// The Service by whose address pods reach the API server.
const API_SERVICE: &str = "default/kubernetes";

/// Takes events, and gives what they change.
#[derive(Debug)]
pub struct Collector {
    here: NodeName,
    /// Where the API server is reached, if by an address.
    server: Option<IpAddr>,
    /// That is the Service's address.
    is_circular: bool,
    services: Known<ServiceName>,
    slices: Known<SliceName>,
    node: Known<()>,
    /// Not given out yet.
    objects: Objects,
    /// Something was given out.
    has_begun: bool,
    /// Nobody waits for the Node any longer.
    without_node: bool,
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
    /// One that knows nothing; `server` is where the API server is reached, if that is no name.
    pub fn new(here: NodeName, server: Option<IpAddr>) -> Self {
        Self {
            here,
            server,
            is_circular: false,
            services: Known::default(),
            slices: Known::default(),
            node: Known::default(),
            objects: Objects::default(),
            has_begun: false,
            without_node: false,
            impossible: BTreeMap::new(),
            unheard: BTreeMap::new(),
        }
    }

    /// The node.
    pub fn here(&self) -> &NodeName {
        &self.here
    }

    /// Takes an event.
    pub fn take(&mut self, item: Item) {
        match item {
            Item::Service(heard) => self.hear(Kind::Service, heard, Self::service),
            Item::Slice(heard) => self.hear(Kind::EndpointSlice, heard, Self::slice),
            Item::Node(heard) => self.hear(Kind::Node, heard, Self::node),
        }
    }

    /// What has changed; nothing before there is everything.
    pub fn objects(&mut self) -> Option<Objects> {
        let is_known = self.services.is_synced && self.slices.is_synced;
        if !is_known || self.waits_for_node() {
            return None;
        }
        let was_complete = std::mem::replace(&mut self.objects.complete, self.node.is_synced);
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

    /// Whether only the Node is missing.
    pub fn waits_for_node(&self) -> bool {
        let is_known = self.services.is_synced && self.slices.is_synced;
        is_known && !self.node.is_synced && !self.without_node
    }

    /// Has everything served without the Node; nothing is deleted until that is known.
    pub fn go_without_node(&mut self) {
        self.without_node = true;
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
        let impossible = self.impossible.values().flatten().cloned();
        let mut found: Vec<Problem> = unheard.chain(circular).chain(impossible).collect();
        found.sort();
        found
    }

    fn hear<K>(&mut self, kind: Kind, heard: Heard<K>, take: fn(&mut Self, Event<K>)) {
        match heard {
            Heard::Failed(error) => {
                self.unheard.insert(kind, error);
            }
            Heard::Quiet => {
                self.unheard.remove(&kind);
            }
            Heard::Event(event) => {
                self.unheard.remove(&kind);
                take(self, *event);
            }
        }
    }

    /// Says what is wrong with an object; nothing ends what was said before.
    fn judge(&mut self, kind: Kind, name: &str, wrong: Vec<model::Problem>) {
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
        match event {
            Event::Apply(object) | Event::InitApply(object) => {
                let name = match Service::name(&object) {
                    Ok(name) => name,
                    Err(problem) => {
                        let of = problem.object.clone();
                        return self.judge(Kind::Service, &of, vec![problem]);
                    }
                };
                self.services.see(&name);
                match Service::parse(&object) {
                    Ok(Some(service)) => {
                        self.judge(Kind::Service, name.as_str(), Vec::new());
                        self.services.names.insert(name.clone());
                        if name.as_str() == API_SERVICE {
                            let mut ips = service.cluster_ips.iter();
                            self.is_circular = ips.any(|ip| Some(*ip) == self.server);
                        }
                        let service = Some(Arc::new(service));
                        self.objects.services.push((name, service));
                    }
                    Ok(None) => self.drop_service(&name),
                    // Its last good version stays.
                    Err(problem) => self.judge(Kind::Service, name.as_str(), vec![problem]),
                }
            }
            Event::Delete(object) => {
                if let Ok(name) = Service::name(&object) {
                    self.drop_service(&name);
                }
            }
            Event::Init => self.services.begin(),
            Event::InitDone => {
                for name in self.services.end() {
                    self.drop_service(&name);
                }
            }
        }
    }

    fn drop_service(&mut self, name: &ServiceName) {
        self.judge(Kind::Service, name.as_str(), Vec::new());
        if self.services.names.remove(name) {
            self.objects.services.push((name.clone(), None));
        }
    }

    fn slice(&mut self, event: Event<discovery::EndpointSlice>) {
        match event {
            Event::Apply(object) | Event::InitApply(object) => {
                let name = match Slice::name(&object) {
                    Ok(name) => name,
                    Err(problem) => {
                        let of = problem.object.clone();
                        return self.judge(Kind::EndpointSlice, &of, vec![problem]);
                    }
                };
                self.slices.see(&name);
                match Slice::parse(&object, &self.here) {
                    Ok(Some((slice, trimmed))) => {
                        self.judge(Kind::EndpointSlice, name.as_str(), trimmed);
                        self.slices.names.insert(name.clone());
                        self.objects.slices.push((name, Some(Arc::new(slice))));
                    }
                    Ok(None) => self.drop_slice(&name),
                    Err(problem) => self.judge(Kind::EndpointSlice, name.as_str(), vec![problem]),
                }
            }
            Event::Delete(object) => {
                if let Ok(name) = Slice::name(&object) {
                    self.drop_slice(&name);
                }
            }
            Event::Init => self.slices.begin(),
            Event::InitDone => {
                for name in self.slices.end() {
                    self.drop_slice(&name);
                }
            }
        }
    }

    fn drop_slice(&mut self, name: &SliceName) {
        self.judge(Kind::EndpointSlice, name.as_str(), Vec::new());
        if self.slices.names.remove(name) {
            self.objects.slices.push((name.clone(), None));
        }
    }

    fn node(&mut self, event: Event<v1::Node>) {
        match event {
            Event::Apply(object) | Event::InitApply(object) => {
                // An old server may ignore the selector.
                if Node::name(&object).is_ok_and(|name| name == self.here) {
                    self.node.see(&());
                    self.node.names.insert(());
                    self.objects.node = Some(Some(Arc::new(Node::parse(&object))));
                }
            }
            // A Node that is made again (a machine that was reinstalled) is soon there; until then what was known holds.
            Event::Delete(_) => {}
            Event::Init => self.node.begin(),
            Event::InitDone => {
                self.node.end();
            }
        }
    }
}

#[cfg(test)]
mod tests;
