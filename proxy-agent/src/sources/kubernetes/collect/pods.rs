//! Pods of this node that ask for their sockets to be left alone.

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::api::core::v1;
use kube::runtime::watcher::Event;

use super::Known;

/// The annotation by which a pod asks, and its value.
const OFF: (&str, &str) = ("proxy-agent/socket-layer", "off");
/// The id of a static pod: the API server knows it by another one (pkg/kubelet/types/constants.go, `ConfigMirrorAnnotationKey`).
const MIRROR: &str = "kubernetes.io/config.mirror";

/// Those that are known, by "namespace/name".
#[derive(Debug, Default)]
pub struct Pods {
    known: Known<String>,
    ids: BTreeMap<String, String>,
}

impl Pods {
    /// Takes an event.
    pub fn take(&mut self, event: Event<v1::Pod>) {
        match event {
            Event::Apply(pod) | Event::InitApply(pod) => {
                let name = name(&pod);
                self.known.see(&name);
                match id(pod) {
                    Some(id) => {
                        self.known.names.insert(name.clone());
                        self.ids.insert(name, id);
                    }
                    None => self.forget(&name),
                }
            }
            Event::Delete(pod) => self.forget(&name(&pod)),
            Event::Init => self.known.begin(),
            Event::InitDone => {
                for name in self.known.end() {
                    self.forget(&name);
                }
            }
        }
    }

    /// The unique ids of all.
    pub fn ids(&self) -> BTreeSet<String> {
        self.ids.values().cloned().collect()
    }

    fn forget(&mut self, name: &String) {
        self.known.names.remove(name);
        self.ids.remove(name);
    }
}

fn name(pod: &v1::Pod) -> String {
    let part = |of: &Option<String>| of.clone().unwrap_or_default();
    let metadata = &pod.metadata;
    format!("{}/{}", part(&metadata.namespace), part(&metadata.name))
}

/// Its unique id, if it asks.
fn id(pod: v1::Pod) -> Option<String> {
    let mut annotations = pod.metadata.annotations?;
    let asks = annotations.get(OFF.0).is_some_and(|value| value == OFF.1);
    let id = annotations.remove(MIRROR).or(pod.metadata.uid);
    id.filter(|id| asks && !id.is_empty())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn pod(name: &str, annotations: serde_json::Value) -> v1::Pod {
        let metadata = json!({"namespace": "a", "name": name, "uid": format!("id-{name}"), "annotations": annotations});
        serde_json::from_value(json!({"metadata": metadata})).unwrap()
    }

    fn ids(pods: &Pods) -> Vec<String> {
        pods.ids().into_iter().collect()
    }

    #[test]
    fn pods_ask_by_their_annotation_and_may_take_it_back() {
        let off = json!({"proxy-agent/socket-layer": "off"});
        let mut pods = Pods::default();
        pods.take(Event::Init);
        pods.take(Event::InitApply(pod("mesh", off.clone())));
        pods.take(Event::InitApply(pod("web", json!({}))));
        pods.take(Event::InitApply(pod(
            "other",
            json!({"proxy-agent/socket-layer": "on"}),
        )));
        let of_kubelet =
            json!({"proxy-agent/socket-layer": "off", "kubernetes.io/config.mirror": "hash"});
        pods.take(Event::InitApply(pod("static", of_kubelet)));
        pods.take(Event::InitDone);
        assert_eq!(ids(&pods), ["hash", "id-mesh"]);
        pods.take(Event::Apply(pod("mesh", json!({}))));
        pods.take(Event::Apply(pod("web", off)));
        assert_eq!(ids(&pods), ["hash", "id-web"]);
        pods.take(Event::Delete(pod("web", json!({}))));
        assert_eq!(ids(&pods), ["hash"]);
    }

    #[test]
    fn a_list_that_lacks_a_pod_ends_it() {
        let off = json!({"proxy-agent/socket-layer": "off"});
        let mut pods = Pods::default();
        pods.take(Event::Apply(pod("gone", off.clone())));
        pods.take(Event::Init);
        pods.take(Event::InitApply(pod("kept", off)));
        assert_eq!(ids(&pods), ["id-gone", "id-kept"]);
        pods.take(Event::InitDone);
        assert_eq!(ids(&pods), ["id-kept"]);
    }
}
