//! The Kubernetes API, followed live: Services and EndpointSlices with kube-proxy's selectors, and the own Node.
//!
//! Nothing is stored here but names: objects are parsed into the model's types and dropped. While the API server cannot be
//! reached everything stays as it is; a list that is read again is compared by name with what is known, and only an object
//! that a complete list lacks, or whose deletion was told, is gone.

use std::{io, net::IpAddr, path::PathBuf, thread, time::Duration};

use k8s_openapi::api::{core::v1, discovery::v1 as discovery};
use kube::{
    Api, Client, Config,
    config::{KubeConfigOptions, Kubeconfig},
};
use tokio::{
    sync::{mpsc, watch},
    time::Instant,
};

use self::{
    collect::Collector,
    stream::{Item, Selector},
};
use super::Problem;
use crate::model::{NodeName, Update};

mod collect;
mod stream;

/// Selects what is for this proxy: not another proxy's, and not a headless Service's (pkg/proxy/config, kube-proxy's
/// `NewFilteredSharedInformerFactory`).
const LABELS: &str = "!service.kubernetes.io/service-proxy-name,!service.kubernetes.io/headless";
/// Events on their way; as many make one update.
const EVENTS: usize = 1_024;
/// A Node that is not there when Services and slices are, because its list is refused or late, holds nobody up for longer.
const NODE_PATIENCE: Duration = Duration::from_secs(5);

/// Where the API server is, and who we are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Access {
    /// As this file says; the server may be another one.
    Kubeconfig(PathBuf, Option<String>),
    /// The pod's ServiceAccount, at the server that KUBERNETES_SERVICE_HOST and _PORT name, or at another one.
    InCluster(Option<String>),
}

/// Why the API cannot be followed at all.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The kubeconfig cannot be used.
    #[error("cannot use the kubeconfig {}: {cause}", path.display())]
    Kubeconfig {
        /// The file.
        path: PathBuf,
        /// Why.
        cause: Box<kube::config::KubeconfigError>,
    },
    /// There is no ServiceAccount here.
    #[error("cannot reach the API server as a pod: {0}; give --kubeconfig FILE")]
    InCluster(Box<kube::config::InClusterError>),
    /// `--master` is no address.
    #[error("--master {text}: {cause}; use https://ADDRESS:PORT")]
    Master {
        /// What it says.
        text: String,
        /// Why.
        cause: http::uri::InvalidUri,
    },
    /// Its certificates or credentials cannot be used.
    #[error("cannot set up the connection to the API server at {server}: {cause}")]
    Client {
        /// Its address.
        server: String,
        /// Why.
        cause: Box<kube::Error>,
    },
    /// No thread or no runtime to be had.
    #[error("cannot start following the API server: {0}")]
    Process(io::Error),
}

/// Starts to follow the API server on a thread of its own. The first update is everything that there is. The receiver holds
/// what is wrong with it now; what is new is also logged, once. The thread ends when nobody takes updates any more.
///
/// # Errors
/// It cannot be followed; see [`Error`]. A server that does not answer is waited for.
pub fn start(
    access: &Access,
    here: NodeName,
    updates: mpsc::Sender<Update>,
) -> Result<watch::Receiver<Vec<Problem>>, Error> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(Error::Process)?;
    let (problems, receiver) = watch::channel(Vec::new());
    let (report, opened) = std::sync::mpsc::channel();
    let access = access.clone();
    let work = move || {
        runtime.block_on(async {
            match open(&access).await {
                // Who asked is gone.
                Err(error) => drop(report.send(Err(error))),
                Ok((client, server)) => {
                    drop(report.send(Ok(())));
                    let collector = Collector::new(here, server);
                    follow(client, collector, updates, problems).await;
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
    Ok(receiver)
}

/// Reads who we are and where the server is, by its address if that is no name; sends nothing yet.
async fn open(access: &Access) -> Result<(Client, Option<IpAddr>), Error> {
    let config = config(access).await?;
    let server = config.cluster_url.to_string();
    tracing::info!(server, "following the API server");
    let host = config.cluster_url.host().unwrap_or_default();
    let address = host.trim_matches(['[', ']']).parse().ok();
    let client = Client::try_from(config).map_err(|cause| Error::Client {
        server,
        cause: Box::new(cause),
    })?;
    Ok((client, address))
}

async fn config(access: &Access) -> Result<Config, Error> {
    let (mut config, master) = match access {
        Access::Kubeconfig(path, master) => {
            let failed = |cause| Error::Kubeconfig {
                path: path.clone(),
                cause: Box::new(cause),
            };
            let file = Kubeconfig::read_from(path).map_err(failed)?;
            let options = KubeConfigOptions::default();
            let config = Config::from_custom_kubeconfig(file, &options).await;
            (config.map_err(failed)?, master)
        }
        Access::InCluster(master) => {
            let config = Config::incluster_env();
            let config = config.map_err(|cause| Error::InCluster(Box::new(cause)))?;
            (config, master)
        }
    };
    if config.accept_invalid_certs {
        // Nobody is trusted more than others: without any, the system's would be asked for, which an image need not have.
        config.root_cert.get_or_insert_default();
    }
    if let Some(master) = master {
        config.cluster_url = master.parse().map_err(|cause| Error::Master {
            text: master.clone(),
            cause,
        })?;
    }
    Ok(config)
}

async fn follow(
    client: Client,
    mut collector: Collector,
    updates: mpsc::Sender<Update>,
    problems: watch::Sender<Vec<Problem>>,
) {
    let (sender, mut events) = mpsc::channel(EVENTS);
    let own = Selector::Field(format!("metadata.name={}", collector.here()));
    let labels = || Selector::Label(LABELS.to_owned());
    let services: Api<v1::Service> = Api::all(client.clone());
    let slices: Api<discovery::EndpointSlice> = Api::all(client.clone());
    let nodes: Api<v1::Node> = Api::all(client);
    tokio::spawn(stream::follow(
        services,
        labels(),
        Item::Service,
        sender.clone(),
    ));
    tokio::spawn(stream::follow(
        slices,
        labels(),
        Item::Slice,
        sender.clone(),
    ));
    tokio::spawn(stream::follow(nodes, own, Item::Node, sender));
    let mut node_due = Instant::now() + NODE_PATIENCE;
    let mut batch = Vec::with_capacity(EVENTS);
    loop {
        let waits_for_node = collector.waits_for_node();
        if !waits_for_node {
            node_due = Instant::now() + NODE_PATIENCE;
        }
        tokio::select! {
            count = events.recv_many(&mut batch, EVENTS) => {
                if count == 0 {
                    return;
                }
            }
            () = tokio::time::sleep_until(node_due), if waits_for_node => collector.go_without_node(),
            () = updates.closed() => return,
        }
        for item in batch.drain(..) {
            collector.take(item);
        }
        publish(&collector, &problems);
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
