//! Builds, connects and joins the tasks of `run`:
//!
//! ```text
//! manifests ─┐
//!            ├─► Feeds: Model ─► Inbox ─► thread of the socket layer: compile, plan, apply ─► kernel
//! addresses ─┘                                 │
//!                                              └─► SyncStatus ─► self-test, health and metrics servers
//! ```
//!
//! A signal ends it. The programs stay pinned and go on serving.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use tokio::{
    signal::unix::{SignalKind, signal},
    sync::{mpsc, watch},
};

use crate::{
    backends::{
        self,
        ebpf::{
            kernel::{KernelStore, OpenOptions},
            probe::probe,
        },
    },
    cli::{Global, Mode, Run},
    health::SelfTest,
    metrics::Metrics,
    model::{NodeName, Update},
    sources::{self, file, node},
    sync::SyncStatus,
};

pub mod exclude;
mod feed;
pub mod namespaces;
pub mod place;
mod programs_log;
pub mod reaper;
pub mod self_test;
mod servers;
pub mod socket;

use exclude::Exclusions;
use feed::Feeds;
use place::{cgroup, node_name};
use reaper::Reaper;
use socket::SocketLayer;

/// Updates on their way from the sources: the file source coalesces, so a few are plenty.
const UPDATES: usize = 64;
/// A failed self-test is repeated after this long.
const TEST_AGAIN: Duration = Duration::from_secs(5);

/// Why the agent cannot run.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Without a source there is nothing to serve.
    #[error(
        "no source of Services: give --manifests DIR (the Kubernetes API as a source is not built yet)"
    )]
    NoSource,
    /// A mode of a later release.
    #[error("--mode iptables is not built yet: it comes with the next release; use --mode ebpf")]
    NoIptables,
    /// The host name is unreadable or no node name.
    #[error("cannot tell the name of this node: {0}; give --node-name NAME")]
    NodeName(String),
    /// The socket layer cannot serve this node.
    #[error(transparent)]
    Backend(#[from] backends::Error),
    /// Something that the socket layer needs is missing.
    #[error("this node cannot run the socket layer: {0}")]
    Unfit(String),
    /// A source cannot start.
    #[error(transparent)]
    Manifests(#[from] file::Error),
    /// A source cannot start.
    #[error(transparent)]
    Addresses(#[from] node::Error),
    /// Something that every process needs.
    #[error("cannot start {what}")]
    Process {
        /// What could not be had.
        what: &'static str,
        /// Why.
        source: std::io::Error,
    },
    /// The capabilities of this process cannot be changed.
    #[error("cannot drop the capabilities that only the reaper needs: {0}")]
    Capabilities(#[from] caps::errors::CapsError),
    /// Its process was ended by somebody.
    #[error(
        "the process that ends UDP sockets of removed backends is gone, and only a new agent can start another; the programs in the kernel go on serving"
    )]
    Reaper,
    /// A bug.
    #[error("the {0} ended early: this is a bug; the programs in the kernel go on serving")]
    Ended(&'static str),
}

fn start(what: &'static str) -> impl FnOnce(std::io::Error) -> Error {
    move |source| Error::Process { what, source }
}

/// `run`: serves the node until a signal comes.
///
/// # Errors
/// The agent cannot run here.
pub fn run(global: &Global, args: &Run) -> Result<(), Error> {
    let manifests = args.sources.manifests.as_deref().ok_or(Error::NoSource)?;
    match args.mode {
        Mode::Auto | Mode::Ebpf => {}
        Mode::Iptables => return Err(Error::NoIptables),
    }
    let reaper = Reaper::start(global).map_err(start("the reaper"))?;
    // aya-log finds the programs' ring buffer by its id, which takes CAP_SYS_ADMIN.
    if !args.log_programs {
        reaper::drop_capabilities()?;
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    runtime
        .map_err(start("the runtime"))?
        .block_on(serve(global, args, manifests, reaper))
}

async fn serve(global: &Global, args: &Run, manifests: &Path, reaper: Reaper) -> Result<(), Error> {
    let mut terminate = signal(SignalKind::terminate()).map_err(start("signals"))?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(start("signals"))?;
    let here = node_name(global)?;
    let cgroup = cgroup(global)?;
    tracing::info!(version = env!("CARGO_PKG_VERSION"), node = %here, manifests = %manifests.display(), "starting");

    let (updates, received) = mpsc::channel(UPDATES);
    let broken = file::start(manifests, here.clone(), updates.clone())?;
    node::start(updates)?;
    let store = open(global, args, &cgroup, &here)?;
    if args.log_programs {
        programs_log::start(global.bpf_dir.join("links")).map_err(start("a thread"))?;
    }
    let metrics = Arc::new(Metrics::default());
    let exclusions = Exclusions::new(cgroup.clone(), &args.socket_exclude_cgroup);
    let (reaper, reaper_ended) = reaper.split().map_err(start("the reaper"))?;
    let mut feeds = Feeds::new(here);
    let feed = feeds.add(metrics.layer("socket").changes_pending);
    let layer = SocketLayer::start(store, feed, reaper, exclusions, &metrics);
    let layer = layer.map_err(start("the socket layer"))?;
    let (tested, self_test) = watch::channel(SelfTest::default());
    let health = servers::health(args, layer.status(), self_test);
    let metering = servers::metrics(global, args, &cgroup, &metrics);

    let result = tokio::select! {
        () = follow(received, &feeds) => Err(Error::Ended("sources")),
        () = until_gone(layer.status()) => Err(Error::Ended("socket layer")),
        () = count_broken(broken, &metrics) => Err(Error::Ended("manifest source")),
        () = test_hooks(layer.status(), cgroup, tested) => Err(Error::Ended("self-test")),
        () = health => Err(Error::Ended("healthz server")),
        () = metering => Err(Error::Ended("metrics server")),
        _ = reaper_ended => Err(Error::Reaper),
        _ = terminate.recv() => Ok("SIGTERM"),
        _ = interrupt.recv() => Ok("SIGINT"),
    };
    feeds.stop();
    layer.join();
    tracing::info!(
        signal = result?,
        "stopped; the programs in the kernel go on serving"
    );
    Ok(())
}

/// Opens the kernel's maps, or says all that this node lacks for them.
fn open(global: &Global, args: &Run, cgroup: &Path, here: &NodeName) -> Result<KernelStore, Error> {
    let options = OpenOptions {
        bpf_dir: global.bpf_dir.clone(),
        cgroup: Some(cgroup.to_owned()),
        node_name: here.to_string(),
        // Armed only while a packet layer serves the node, which would take over: there is none yet.
        lease: None,
        log: args.log_programs,
    };
    KernelStore::open(options).map_err(|error| {
        let missing = probe(&global.bpf_dir, Some(cgroup)).missing.into_iter();
        let required: Vec<String> = missing
            .filter(|missing| missing.is_required)
            .map(|missing| missing.text)
            .collect();
        if required.is_empty() {
            Error::Backend(error)
        } else {
            Error::Unfit(required.join("; "))
        }
    })
}

/// Takes updates into the model and tells the layers what they touch.
async fn follow(mut updates: mpsc::Receiver<Update>, feeds: &Feeds) {
    while let Some(update) = updates.recv().await {
        feeds.update(update);
    }
}

async fn until_gone(mut status: watch::Receiver<SyncStatus>) {
    while status.changed().await.is_ok() {}
}

/// The source logs what is wrong; here it is counted: what is, and what came up.
async fn count_broken(mut broken: watch::Receiver<Vec<sources::Problem>>, metrics: &Metrics) {
    let mut before = Vec::new();
    loop {
        let now = broken.borrow_and_update().clone();
        let new = now
            .iter()
            .filter(|problem| !before.contains(*problem))
            .count();
        metrics.source_errors.inc_by(new as u64);
        metrics
            .source_problems
            .set(i64::try_from(now.len()).unwrap_or(i64::MAX));
        before = now;
        if broken.changed().await.is_err() {
            return;
        }
    }
}

/// Proves once that the hooks translate, as soon as they should.
async fn test_hooks(
    mut status: watch::Receiver<SyncStatus>,
    cgroup: PathBuf,
    tested: watch::Sender<SelfTest>,
) {
    if status.wait_for(|status| status.is_synced).await.is_ok() {
        loop {
            let cgroup = cgroup.clone();
            let result = tokio::task::spawn_blocking(move || self_test::run(&cgroup)).await;
            match result.unwrap_or_else(|_| Err("it ended early".to_owned())) {
                Ok(()) => break,
                Err(error) => {
                    tracing::error!(error, retry = ?TEST_AGAIN, "the self-test failed");
                    tested.send_replace(SelfTest::Failed(error));
                }
            }
            tokio::time::sleep(TEST_AGAIN).await;
        }
        tracing::info!("ready");
        tested.send_replace(SelfTest::Passed);
    }
    std::future::pending().await
}
