//! Many objects at once: clusters of thousands of Services.

use std::{sync::Mutex, thread};

use anyhow::Context;
use serde_json::{Value, json};

use super::{ControlPlane, client::Request};

/// Connections side by side.
const WRITERS: usize = 4;
/// Requests of one curl.
const BATCH: usize = 400;

impl ControlPlane {
    /// Makes the objects of a Kubernetes `List`, Services and EndpointSlices of one namespace that does not exist yet.
    ///
    /// # Errors
    /// The API server refuses one.
    pub fn create_all(&self, namespace: &str, list: &Value) -> anyhow::Result<()> {
        let object =
            json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace}});
        self.client
            .send(&[Request::create("/api/v1/namespaces", object)])?;
        let items = list["items"].as_array().context("a list without items")?;
        let requests: Vec<_> = items.iter().map(|item| request(namespace, item)).collect();
        let batches = Mutex::new(requests.chunks(BATCH));
        let client = &self.client;
        let write = || {
            let next = || batches.lock().ok()?.next();
            while let Some(batch) = next() {
                client.send(batch)?;
            }
            anyhow::Ok(())
        };
        thread::scope(|scope| {
            let writers: Vec<_> = (0..WRITERS).map(|_| scope.spawn(write)).collect();
            writers.into_iter().try_for_each(|writer| {
                writer
                    .join()
                    .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            })
        })
    }

    /// Replaces the endpoints of an EndpointSlice by those of `slice`.
    ///
    /// # Errors
    /// The API server refuses.
    pub fn replace_endpoints(&self, slice: &Value) -> anyhow::Result<()> {
        let name = |field: &str| slice["metadata"][field].as_str().unwrap_or_default();
        let path = format!("{}/{}", collection(name("namespace"), slice), name("name"));
        let patch = json!({"endpoints": slice["endpoints"]});
        self.client.send(&[Request::merge(&path, patch)]).map(drop)
    }
}

/// The request that makes `item`, which may be as an API server shows it.
fn request(namespace: &str, item: &Value) -> Request {
    let mut object = item.clone();
    if let Some(metadata) = object["metadata"].as_object_mut() {
        // Of an object that exists.
        metadata.remove("resourceVersion");
    }
    Request::create(&collection(namespace, item), object)
}

fn collection(namespace: &str, item: &Value) -> String {
    let (api, kind) = match item["kind"] == "Service" {
        true => ("/api/v1", "services"),
        false => ("/apis/discovery.k8s.io/v1", "endpointslices"),
    };
    format!("{api}/namespaces/{namespace}/{kind}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn objects_go_to_their_collections_without_a_version() {
        let slice =
            json!({"kind": "EndpointSlice", "metadata": {"name": "x", "resourceVersion": "1"}});
        let path = "/apis/discovery.k8s.io/v1/namespaces/n/endpointslices";
        let expected = Request::create(
            path,
            json!({"kind": "EndpointSlice", "metadata": {"name": "x"}}),
        );
        assert_eq!(request("n", &slice), expected);
        assert_eq!(
            collection("n", &json!({"kind": "Service"})),
            "/api/v1/namespaces/n/services"
        );
    }
}
