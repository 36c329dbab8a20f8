//! A client of the API server that keeps its connections: what a patch and its event take without any proxy.

use std::{
    pin::pin,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use futures_util::StreamExt as _;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::{
    Api, Client, Config, ResourceExt as _,
    api::{ListParams, Patch, PatchParams, WatchEvent, WatchParams},
    config::{KubeConfigOptions, Kubeconfig},
};
use serde_json::{Value, json};
use tokio::{
    runtime::{Builder, Runtime},
    sync::broadcast,
    task::JoinHandle,
    time::timeout,
};

use super::world::NAMESPACE;
use crate::kube::ControlPlane;

/// Of the watch; more never come between two looks at them.
const EVENTS: usize = 1_024;
/// Longest wait for an event that the server has answered for.
const PATIENCE: Duration = Duration::from_secs(10);

/// The client, with a watch of all EndpointSlices as every proxy has one.
pub(super) struct Wire {
    /// Its threads are in the API server's network namespace.
    runtime: Runtime,
    client: Client,
    events: broadcast::Sender<Event>,
}

/// A changed slice was told.
#[derive(Clone, Debug)]
struct Event {
    version: String,
    at: Instant,
}

/// When what of a patch happened.
#[derive(Clone, Copy, Debug)]
pub(super) struct Patched {
    pub sent: Instant,
    /// The API server has it in etcd, and says so.
    pub answered: Instant,
    /// The watch told it.
    pub seen: Instant,
}

/// A patch on its way.
pub(super) struct Pending(JoinHandle<Result<Patched>>);

impl Wire {
    /// Opens the connections, and watches.
    pub fn open(control: &ControlPlane) -> Result<Self> {
        let kubeconfig = control.kubeconfig()?;
        let runtime = control.place().inside(|| {
            let mut builder = Builder::new_multi_thread();
            builder.worker_threads(1).enable_all().build()
        })??;
        let (events, _) = broadcast::channel(EVENTS);
        let told = events.clone();
        let open = async move {
            let options = KubeConfigOptions::default();
            let file = Kubeconfig::read_from(kubeconfig)?;
            let config = Config::from_custom_kubeconfig(file, &options).await?;
            let client = Client::try_from(config)?;
            let slices: Api<EndpointSlice> = Api::namespaced(client.clone(), NAMESPACE);
            let list = slices.list(&ListParams::default().limit(1)).await?;
            let version = list.metadata.resource_version;
            let version = version.context("a list without a version")?;
            tokio::spawn(watch(slices, version, told));
            anyhow::Ok(client)
        };
        let client = runtime.block_on(runtime.spawn(open))??;
        Ok(Self {
            runtime,
            client,
            events,
        })
    }

    /// Sends new endpoints of a slice, and goes on.
    pub fn patch(&self, slice: &Value) -> Pending {
        let slices: Api<EndpointSlice> = Api::namespaced(self.client.clone(), NAMESPACE);
        let name = slice["metadata"]["name"].as_str().unwrap_or_default();
        let name = name.to_owned();
        let patch = Patch::Merge(json!({"endpoints": slice["endpoints"]}));
        let mut events = self.events.subscribe();
        Pending(self.runtime.spawn(async move {
            let sent = Instant::now();
            let made = slices.patch(&name, &PatchParams::default(), &patch).await?;
            let answered = Instant::now();
            let version = made.resource_version().context("no version")?;
            let told = async {
                loop {
                    let event = events.recv().await?;
                    if event.version == version {
                        return anyhow::Ok(event.at);
                    }
                }
            };
            let seen = timeout(PATIENCE, told)
                .await
                .context("the watch does not tell a patch")??;
            Ok(Patched {
                sent,
                answered,
                seen,
            })
        }))
    }

    /// Waits until a patch was answered and told.
    pub fn wait(&self, pending: Pending) -> Result<Patched> {
        self.runtime.block_on(pending.0)?
    }

    /// The same connections, for [`Wire::run`].
    pub fn client(&self) -> Client {
        self.client.clone()
    }

    /// Runs something to its end in the API server's network namespace.
    pub fn run<T: Send + 'static>(
        &self,
        work: impl Future<Output = Result<T>> + Send + 'static,
    ) -> Result<T> {
        self.runtime.block_on(self.runtime.spawn(work))?
    }
}

/// Tells the events of the slices for ever; the server ends a watch every few minutes.
async fn watch(slices: Api<EndpointSlice>, mut version: String, events: broadcast::Sender<Event>) {
    loop {
        let watch = slices.watch(&WatchParams::default(), &version).await;
        // Who waits for an event then says that there is none.
        let Ok(stream) = watch else { return };
        let mut stream = pin!(stream);
        while let Some(Ok(event)) = stream.next().await {
            let at = Instant::now();
            match event {
                WatchEvent::Added(slice)
                | WatchEvent::Modified(slice)
                | WatchEvent::Deleted(slice) => {
                    version = slice.resource_version().unwrap_or_default();
                    let version = version.clone();
                    // An error: nobody waits for one just now.
                    drop(events.send(Event { version, at }));
                }
                WatchEvent::Bookmark(bookmark) => version = bookmark.metadata.resource_version,
                WatchEvent::Error(_) => break,
            }
        }
    }
}
