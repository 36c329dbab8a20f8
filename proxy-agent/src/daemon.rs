//! Builds, connects and joins the tasks of `run`:
//!
//! ```text
//! Kubernetes API or manifests ─┐
//!                              │                ┌─► Inbox ─► thread of the socket layer ─┐
//!                              ├─► Feeds: Model ┤                                        ├─ compile, plan, apply ─► kernel
//!                    addresses ─┘                └─► Inbox ─► thread of the packet layer ─┘
//!                                                                 │
//!                                                                 └─► SyncStatus ─► self-test, health and metrics servers
//! ```
//!
//! A signal ends it. The programs stay pinned and go on serving.

use std::{
    path::{Path, PathBuf},
    process::ExitStatus,
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::{
    signal::unix::{SignalKind, signal},
    sync::{mpsc, oneshot, watch},
};

use crate::{
    backends::{
        self,
        ebpf::{kernel::Left, probe::probe},
    },
    cli::{DetectLocalMode, Global, Mode, Run},
    events::Event,
    health::{self, Health, SelfTest},
    metrics::Metrics,
    model::Update,
    sources::{self, Followed, Origin, Wanted, node},
    sync::SyncStatus,
};

mod config_file;
pub mod exclude;
mod feed;
mod host_settings;
mod layer;
mod mode;
pub mod namespaces;
mod observer;
pub mod packet;
pub mod place;
mod programs_log;
pub mod reaper;
pub mod rival;
pub mod self_test;
mod servers;
mod serving;
pub mod socket;

use feed::Feeds;
use layer::LayerThread;
use place::node_name;
use reaper::Reaper;
use serving::{ForSockets, Serving};

/// Updates on their way from the sources: the file source coalesces, so a few are plenty.
const UPDATES: usize = 64;
/// A failed self-test is repeated after this long.
const TEST_AGAIN: Duration = Duration::from_secs(5);

/// Why the agent cannot run.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Without a source there is nothing to serve.
    #[error(
        "no source of Services: give --kubeconfig FILE for a cluster, or --manifests DIR for files; in a pod of a cluster KUBERNETES_SERVICE_HOST would name its API server"
    )]
    NoSource,
    /// A flag that another one needs is missing.
    #[error("--detect-local-mode {mode:?} needs {flag}")]
    Flag {
        /// The one that is missing.
        flag: &'static str,
        /// The mode that needs it.
        mode: DetectLocalMode,
    },
    /// The packet layer cannot serve this node.
    #[error("this node cannot run the packet layer: {packet} (why that one: {reason})")]
    NoPackets {
        /// What it lacks.
        packet: backends::Error,
        /// Why there is no socket layer instead.
        reason: String,
    },
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
    Source(#[from] sources::Error),
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
    /// A server has no port, and shall not wait for it.
    #[error(transparent)]
    Unbound(#[from] health::Unbound),
    /// The configuration file was written to: a new process reads it.
    #[error("the configuration {} was changed", .0.display())]
    Reconfigured(PathBuf),
    /// Not every setting of the host could be made.
    #[error("{0} settings of the host could not be made")]
    Settings(i64),
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
    let origin = place::origin(&args.sources)?;
    backends::process::keep_little();
    let reaper = match args.layers.mode() {
        Mode::Auto | Mode::Ebpf => Some(Reaper::start(global).map_err(start("the reaper"))?),
        Mode::Iptables => None,
    };
    // aya-log finds the programs' ring buffer by its id, which takes CAP_SYS_ADMIN.
    if !args.log_programs {
        reaper::drop_capabilities()?;
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    runtime
        .map_err(start("the runtime"))?
        .block_on(serve(global, args, &origin, reaper))
}

/// `run --init-only`: makes the settings of the host for an agent that may not.
///
/// # Errors
/// One could not be made.
pub fn initialise(global: &Global, args: &Run) -> Result<(), Error> {
    let mut failed = host_settings::make(&args.host, Path::new("/"));
    let has_rules_alone = || match args.layers.mode() {
        Mode::Iptables => true,
        Mode::Auto => !probe(&global.bpf_dir, global.cgroup.as_deref()).is_usable(),
        Mode::Ebpf => false,
    };
    if packet::wants_route_localnet(&args.sources, &args.layers.packet)
        && has_rules_alone()
        && !packet::route_localnet()
    {
        failed += 1;
    }
    match failed {
        0 => Ok(()),
        _ => Err(Error::Settings(failed)),
    }
}

async fn serve(
    global: &Global,
    args: &Run,
    origin: &Origin,
    reaper: Option<Reaper>,
) -> Result<(), Error> {
    let mut terminate = signal(SignalKind::terminate()).map_err(start("signals"))?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(start("signals"))?;
    let here = node_name(global)?;
    tracing::info!(version = env!("CARGO_PKG_VERSION"), node = %here, source = %origin, "starting");

    let (updates, received) = mpsc::channel(UPDATES);
    let metrics = Arc::new(Metrics::default());
    let Followed {
        problems,
        events,
        opted_out,
    } = origin.start(
        here.clone(),
        updates.clone(),
        Wanted {
            pods: args.socket_exclude_pods,
            service_cidrs: args.layers.drops_unallocated(),
        },
        &metrics.rest_client,
    )?;
    node::start(updates)?;
    let opened = mode::open(global, args, &here)?;
    host_settings::apply(&args.host, Path::new("/"), &metrics);
    let mut feeds = Feeds::new(place::model(here, &args.sources), events.clone());
    let (give_way, gives_way) = watch::channel(false);
    let sockets = ForSockets { reaper, opted_out };
    let serving = Serving::start(
        global, args, opened, sockets, &mut feeds, &metrics, give_way,
    )?;
    let Serving {
        layers,
        sockets,
        former,
    } = serving;
    let statuses = || layers.iter().map(LayerThread::status);
    let (cgroup, reaper_ended) = sockets.unzip();
    let (tested, self_test) = watch::channel(SelfTest::default());
    let (troubled, trouble) = watch::channel(None);
    let health = Health {
        layers: layers.iter().map(LayerThread::watched).collect(),
        self_test,
        trouble,
        eligible: feeds.eligible(),
        needs_no_node: matches!(origin, Origin::Manifests(_)),
        patience: 2 * args.layers.packet.iptables_sync_period,
        started: Instant::now(),
    };
    let health = servers::health(args, health, feeds.checks(), &metrics, &events);
    let metering = servers::metrics(global, args, cgroup.as_deref(), &metrics, gives_way);
    events.tell(Event::Started);

    let result = tokio::select! {
        () = follow(received, &feeds) => Err(Error::Ended("sources")),
        () = until_one_is_gone(statuses().collect()) => Err(Error::Ended("layer")),
        () = count_broken(problems, &troubled, &metrics) => Err(Error::Ended("source of Services")),
        () = after_the_first_syncs(statuses().collect(), cgroup.as_deref(), tested, former) => Err(Error::Ended("self-test")),
        unbound = health => Err(unbound.into()),
        unbound = metering => Err(unbound.into()),
        file = config_file::changed(args.sources.config.as_deref()) => Err(Error::Reconfigured(file)),
        () = until_ended(reaper_ended) => Err(Error::Reaper),
        _ = terminate.recv() => Ok("SIGTERM"),
        _ = interrupt.recv() => Ok("SIGINT"),
    };
    if let Err(Error::Unbound(unbound)) = &result {
        servers::tell_unbound(unbound, &events).await;
    }
    feeds.stop();
    for layer in layers {
        layer.join();
    }
    tracing::info!(signal = result?, "stopped; the kernel goes on serving");
    Ok(())
}

/// Takes updates into the model and tells the layers what they touch.
async fn follow(mut updates: mpsc::Receiver<Update>, feeds: &Feeds) {
    while let Some(update) = updates.recv().await {
        feeds.update(update);
    }
}

async fn until_one_is_gone(statuses: Vec<watch::Receiver<SyncStatus>>) {
    let mut tasks = tokio::task::JoinSet::new();
    for mut status in statuses {
        tasks.spawn(async move { while status.changed().await.is_ok() {} });
    }
    tasks.join_next().await;
}

async fn until_ended(reaper: Option<oneshot::Receiver<std::io::Result<ExitStatus>>>) {
    match reaper {
        // However it ended.
        Some(reaper) => drop(reaper.await),
        None => std::future::pending().await,
    }
}

/// The source logs what is wrong; here it is counted: what is, and what came up. The first of it is for who asks why the node is
/// not ready.
async fn count_broken(
    mut broken: watch::Receiver<Vec<sources::Problem>>,
    troubled: &watch::Sender<Option<String>>,
    metrics: &Metrics,
) {
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
        troubled.send_replace(now.first().map(ToString::to_string));
        before = now;
        if broken.changed().await.is_err() {
            return;
        }
    }
}

/// Once every layer serves everything: what a former mode left goes, and the hooks prove that they translate.
async fn after_the_first_syncs(
    statuses: Vec<watch::Receiver<SyncStatus>>,
    cgroup: Option<&Path>,
    tested: watch::Sender<SelfTest>,
    former: Option<Left>,
) {
    for mut status in statuses {
        if status.wait_for(|status| status.is_synced).await.is_err() {
            // Its end is reported by who waits for it.
            std::future::pending().await
        }
    }
    if let Some(former) = former
        && let Err(error) = former.stop_translating()
    {
        tracing::error!(
            error = format!("{error:#}"),
            "what the former mode left in the kernel stays; `cleanup` removes it"
        );
    }
    if let Some(cgroup) = cgroup {
        test_hooks(cgroup, &tested).await;
    }
    tracing::info!("ready");
    tested.send_replace(SelfTest::Passed);
    std::future::pending().await
}

/// Until the self-test passes.
async fn test_hooks(cgroup: &Path, tested: &watch::Sender<SelfTest>) {
    loop {
        let of = cgroup.to_owned();
        let result = tokio::task::spawn_blocking(move || self_test::run(&of)).await;
        match result.unwrap_or_else(|_| Err("it ended early".to_owned())) {
            Ok(()) => return,
            Err(error) => {
                tracing::error!(error, retry = ?TEST_AGAIN, "the self-test failed");
                tested.send_replace(SelfTest::Failed(error));
            }
        }
        tokio::time::sleep(TEST_AGAIN).await;
    }
}
