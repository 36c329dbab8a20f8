//! The Kubernetes API, followed live: Services and EndpointSlices with kube-proxy's selectors, the own Node, and where they are
//! of use ServiceCIDRs.
//!
//! Nothing is stored here but names: objects are parsed into the model's types and dropped. While the API server cannot be
//! reached everything stays as it is; a list that is read again is compared by name with what is known, and only an object
//! that a complete list lacks, or whose deletion was told, is gone.

use std::{collections::BTreeSet, io, thread, time::Duration};

use k8s_openapi::api::{core::v1, discovery::v1 as discovery, networking::v1 as networking};
use kube::{Api, Client};
use tokio::{
    sync::{mpsc, watch},
    time::Instant,
};

pub use self::client::Access;
use self::{
    collect::Collector,
    stream::{Item, Selector},
};
use super::{Followed, Problem, Wanted};
use crate::{
    events::Events,
    metrics::RestClientMetrics,
    model::{NodeName, Update},
};

mod client;
mod collect;
mod events;
mod stream;

/// Selects what is for this proxy: not another proxy's, and not a headless Service's (pkg/proxy/config, kube-proxy's
/// `NewFilteredSharedInformerFactory`).
const LABELS: &str = "!service.kubernetes.io/service-proxy-name,!service.kubernetes.io/headless";
/// As kube-proxy 1.36 asks for Services (cmd/kube-proxy/app/server.go, `Run`).
const NOT_HEADLESS: &str = "spec.clusterIP!=None";
/// Events on their way; as many make one update. Few: their objects are large until they are parsed.
const EVENTS: usize = 64;
/// What is not there when Services and slices are, the Node or ServiceCIDRs, because its list is refused or late, holds nobody
/// up for longer.
const PATIENCE: Duration = Duration::from_secs(5);

/// Why the API cannot be followed at all.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is no client.
    #[error(transparent)]
    Client(#[from] client::Error),
    /// No thread or no runtime to be had.
    #[error("cannot start following the API server: {0}")]
    Process(io::Error),
}

/// Starts to follow the API server on a thread of its own, and what else is `wanted`. The first update is everything that
/// there is. What is wrong with it is also logged, once. The thread ends when nobody takes updates and tells
/// Events any more.
///
/// # Errors
/// It cannot be followed; see [`Error`]. A server that does not answer is waited for.
pub fn start(
    access: &Access,
    here: NodeName,
    updates: mpsc::Sender<Update>,
    wanted: Wanted,
    metrics: &RestClientMetrics,
) -> Result<Followed, Error> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(Error::Process)?;
    let (problems, receiver) = watch::channel(Vec::new());
    let (opting_out, opted_out) = watch::channel(BTreeSet::new());
    let (events, letters) = Events::channel();
    let (report, opened) = std::sync::mpsc::channel();
    let (access, metrics) = (access.clone(), metrics.clone());
    let work = move || {
        runtime.block_on(async {
            match client::open(&access, &metrics).await {
                // Who asked is gone.
                Err(error) => drop(report.send(Err(error))),
                Ok((client, server)) => {
                    drop(report.send(Ok(())));
                    let writer = tokio::spawn(events::write(client.clone(), here.clone(), letters));
                    let collector = Collector::new(here, server, wanted.service_cidrs);
                    let pods = wanted.pods.then_some(opting_out);
                    follow(client, collector, updates, problems, pods).await;
                    // The last Event is told when nobody takes updates any more. It ends with who tells.
                    drop(writer.await);
                }
            }
        });
    };
    thread::Builder::new()
        .name("kubernetes".to_owned())
        .spawn(work)
        .map_err(Error::Process)?;
    let opened = opened.recv();
    opened
        .map_err(|_| Error::Process(io::Error::other("its thread ended early: this is a bug")))??;
    Ok(Followed {
        problems: receiver,
        events,
        opted_out: wanted.pods.then_some(opted_out),
    })
}

async fn follow(
    client: Client,
    mut collector: Collector,
    updates: mpsc::Sender<Update>,
    problems: watch::Sender<Vec<Problem>>,
    opted_out: Option<watch::Sender<BTreeSet<String>>>,
) {
    let (sender, mut events) = mpsc::channel(EVENTS);
    let own = Selector {
        fields: format!("metadata.name={}", collector.here()),
        ..Selector::default()
    };
    let of_slices = Selector {
        labels: LABELS.to_owned(),
        ..Selector::default()
    };
    let of_services = Selector {
        spares: NOT_HEADLESS.to_owned(),
        ..of_slices.clone()
    };
    let services: Api<v1::Service> = Api::all(client.clone());
    let slices: Api<discovery::EndpointSlice> = Api::all(client.clone());
    let nodes: Api<v1::Node> = Api::all(client.clone());
    if opted_out.is_some() {
        let pods: Api<v1::Pod> = Api::all(client.clone());
        let of_node = Selector {
            fields: format!("spec.nodeName={}", collector.here()),
            ..Selector::default()
        };
        tokio::spawn(stream::follow(pods, of_node, Item::Pod, sender.clone()));
    }
    if collector.awaits_service_cidrs() {
        let cidrs: Api<networking::ServiceCIDR> = Api::all(client);
        let of_cidrs = Selector {
            is_optional: true,
            ..Selector::default()
        };
        tokio::spawn(stream::follow(
            cidrs,
            of_cidrs,
            Item::ServiceCidr,
            sender.clone(),
        ));
    }
    tokio::spawn(stream::follow(
        services,
        of_services,
        Item::Service,
        sender.clone(),
    ));
    tokio::spawn(stream::follow(
        slices,
        of_slices,
        Item::Slice,
        sender.clone(),
    ));
    tokio::spawn(stream::follow(nodes, own, Item::Node, sender));
    let mut due = Instant::now() + PATIENCE;
    let mut batch = Vec::with_capacity(EVENTS);
    loop {
        let waits = collector.waits();
        if !waits {
            due = Instant::now() + PATIENCE;
        }
        tokio::select! {
            count = events.recv_many(&mut batch, EVENTS) => {
                if count == 0 {
                    return;
                }
            }
            () = tokio::time::sleep_until(due), if waits => collector.go_on(),
            () = updates.closed() => return,
        }
        for item in batch.drain(..) {
            collector.take(item);
        }
        publish(&collector, &problems);
        if let Some(opted_out) = &opted_out {
            let ids = collector.opted_out();
            opted_out.send_if_modified(|known| std::mem::replace(known, ids.clone()) != ids);
        }
        if let Some(objects) = collector.objects()
            && updates.send(Update::Objects(objects)).await.is_err()
        {
            return;
        }
    }
}

/// Logs what is new among the problems, and shows all.
fn publish(collector: &Collector, problems: &watch::Sender<Vec<Problem>>) {
    problems.send_if_modified(|shown| {
        let found = collector.problems();
        let new = found
            .iter()
            .filter(|problem| shown.binary_search(problem).is_err());
        for problem in new {
            tracing::warn!(%problem, "Kubernetes API");
        }
        let is_new = *shown != found;
        *shown = found;
        is_new
    });
}

#[cfg(test)]
mod tests;
