//! Builds, connects and joins the tasks of `run`:
//!
//! ```text
//! manifests ─┐
//!            ├─► follow: Model ─► Inbox ─► thread of the socket layer: compile, plan, apply ─► kernel
//! addresses ─┘                                  │
//!                                               └─► SyncStatus ─► self-test, health and metrics servers
//! ```
//!
//! A signal ends it. The programs stay pinned and go on serving.

use std::{
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use serde_json::json;
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::{mpsc, watch},
};

use crate::{
    backends::{
        self,
        ebpf::{
            EbpfBackend,
            kernel::{KernelStore, OpenOptions},
            view::PinnedMaps,
        },
    },
    cli::{Global, Mode, Run},
    health::{self, Health, Metering, SelfTest},
    metrics::{Kernel, Metrics, ModeLabels},
    model::{Model, Update},
    sources::{self, file, node},
    sync::{Inbox, Layer, Scope, SyncStatus},
};

pub mod exclude;
pub mod namespaces;
pub mod place;
pub mod reaper;
pub mod self_test;
mod socket;

use exclude::Exclusions;
use place::{cgroup, node_name};
use reaper::Reaper;
use socket::Tending;

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
    #[error("{0}")]
    Backend(#[from] backends::Error),
    /// A source cannot start.
    #[error("{0}")]
    Manifests(#[from] file::Error),
    /// A source cannot start.
    #[error("{0}")]
    Addresses(#[from] node::Error),
    /// Something that every process needs.
    #[error("cannot start {what}: {source}")]
    Process {
        /// What could not be had.
        what: &'static str,
        /// Why.
        source: std::io::Error,
    },
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
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    runtime
        .map_err(start("the runtime"))?
        .block_on(serve(global, args, manifests))
}

async fn serve(global: &Global, args: &Run, manifests: &Path) -> Result<(), Error> {
    let signals = |kind| {
        signal(kind).map_err(|source| Error::Process {
            what: "signals",
            source,
        })
    };
    let (mut terminate, mut interrupt) = (
        signals(SignalKind::terminate())?,
        signals(SignalKind::interrupt())?,
    );
    let here = node_name(global)?;
    let cgroup = cgroup(global)?;
    tracing::info!(version = env!("CARGO_PKG_VERSION"), node = %here, manifests = %manifests.display(), "starting");

    let store = KernelStore::open(OpenOptions {
        bpf_dir: global.bpf_dir.clone(),
        cgroup: Some(cgroup.clone()),
        node_name: here.to_string(),
        // Armed only while a packet layer serves the node, which would take over: there is none yet.
        lease: None,
        log: args.log_programs,
    })?;
    let metrics = Arc::new(Metrics::default());
    let mode = mode(args.mode, &store, &metrics);
    let model = Arc::new(Mutex::new(Model::new(here.clone())));
    let inbox = Arc::new(Inbox::new(metrics.changes_pending.clone()));
    let backend = EbpfBackend::new(store);
    let layer = Layer::new("socket", backend, Arc::clone(&metrics), Instant::now());
    let status = layer.status();
    let tending = Tending {
        exclusions: Exclusions::new(cgroup.clone(), &args.socket_exclude_cgroup),
        reaper: Reaper::start(global.bpf_dir.join("links")).map_err(start("a thread"))?,
    };
    let thread = socket::start(
        layer,
        tending,
        Arc::clone(&inbox),
        Arc::clone(&model),
        Arc::clone(&metrics),
    );
    let thread = thread.map_err(start("a thread"))?;

    let (updates, received) = mpsc::channel(UPDATES);
    let broken = file::start(manifests, here, updates.clone())?;
    node::start(updates)?;
    let (tested, self_test) = watch::channel(SelfTest::default());
    let health = Health {
        status: status.clone(),
        self_test,
        started: Instant::now(),
    };
    let metering = Metering {
        metrics: Arc::clone(&metrics),
        kernel: kernel_counters(global.bpf_dir.clone()),
        mode,
        config: Arc::new(config(global, args, &cgroup)),
    };
    let result = tokio::select! {
        () = follow(received, &model, &inbox) => Err(Error::Ended("sources")),
        () = until_gone(status.clone()) => Err(Error::Ended("socket layer")),
        () = count_broken(broken, &metrics) => Err(Error::Ended("manifest source")),
        () = test_hooks(status, cgroup, tested) => Err(Error::Ended("self-test")),
        () = health::serve("healthz", args.healthz_bind_address, health::health_router(health)) => Err(Error::Ended("healthz server")),
        () = health::serve("metrics", args.metrics_bind_address, health::metrics_router(metering)) => Err(Error::Ended("metrics server")),
        _ = terminate.recv() => Ok("SIGTERM"),
        _ = interrupt.recv() => Ok("SIGINT"),
    };
    inbox.stop();
    // A thread that panicked has said so; the result below is already an error then.
    let _ = thread.join();
    let signal = result?;
    tracing::info!(signal, "stopped; the programs in the kernel go on serving");
    Ok(())
}

/// Takes updates into the model and tells the layer what they touch.
async fn follow(mut updates: mpsc::Receiver<Update>, model: &Mutex<Model>, inbox: &Inbox) {
    while let Some(update) = updates.recv().await {
        let (dirty, synced, complete) = {
            let mut model = lock(model);
            (model.apply(update), model.is_synced(), model.is_complete())
        };
        inbox.push(Scope::Part(dirty));
        inbox.sources(synced, complete);
    }
}

/// Updates are applied whole or not at all, even by a thread that panics while it reads.
fn lock(model: &Mutex<Model>) -> MutexGuard<'_, Model> {
    model.lock().unwrap_or_else(PoisonError::into_inner)
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

/// Says which layers serve this node, and why.
fn mode(asked: Mode, store: &KernelStore, metrics: &Metrics) -> &'static str {
    let mut reason = match asked {
        Mode::Auto | Mode::Iptables => "chosen: this kernel has what the socket layer needs",
        Mode::Ebpf => "asked for",
    }
    .to_owned();
    for left_out in store.left_out() {
        tracing::warn!(
            program = left_out.program,
            reason = left_out.reason,
            "left out"
        );
        reason.push_str("; without ");
        reason.push_str(&left_out.program);
    }
    tracing::info!(socket = "ebpf", packet = "off", reason, "mode");
    let labels = ModeLabels {
        socket: "ebpf",
        packet: "off",
        reason,
    };
    metrics.mode_info.get_or_create(&labels).set(1);
    "ebpf"
}

/// Reads the counters of the kernel at each scrape. A swap may have moved them: the directory is opened each time.
fn kernel_counters(bpf_dir: PathBuf) -> Arc<dyn Fn() -> Option<Kernel> + Send + Sync> {
    Arc::new(move || {
        let maps = PinnedMaps::open(&bpf_dir).ok()?;
        let summaries = maps.maps().ok()?.into_iter();
        Some(Kernel {
            maps: summaries
                .map(|map| {
                    (
                        map.name,
                        map.entries.map(u64::from),
                        u64::from(map.capacity),
                    )
                })
                .collect(),
            reasons: maps.reasons().ok()?,
        })
    })
}

fn config(global: &Global, args: &Run, cgroup: &Path) -> serde_json::Value {
    json!({
        "bpfDir": global.bpf_dir,
        "cgroup": cgroup,
        "manifests": args.sources.manifests,
        "mode": format!("{:?}", args.mode).to_lowercase(),
        "healthzBindAddress": args.healthz_bind_address,
        "metricsBindAddress": args.metrics_bind_address,
        "socketExcludeCgroup": args.socket_exclude_cgroup,
        "socketLeaseSeconds": args.socket_lease.as_secs(),
    })
}
