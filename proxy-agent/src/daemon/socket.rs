//! The thread on which the socket layer lives, and what it does there beside syncing.

use std::{
    collections::BTreeSet,
    io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread::{self, JoinHandle},
    time::Instant,
};

use tokio::sync::watch;

use super::{exclude::Exclusions, feed::Feed, reaper, self_test, servers};
use crate::{
    backends::ebpf::{
        EbpfBackend,
        kernel::{KernelStore, bind::Bound},
    },
    compile::Compiler,
    metrics::Metrics,
    sync::{Compiled, Layer, Scope, SyncStatus},
};

/// The socket layer at work.
#[derive(Debug)]
pub struct SocketLayer {
    status: watch::Receiver<SyncStatus>,
    thread: JoinHandle<()>,
}

impl SocketLayer {
    /// Starts the thread. `reaper` is asked when UDP backends are gone.
    ///
    /// # Errors
    /// No thread or no inotify instance to be had.
    pub fn start(
        store: KernelStore,
        feed: Feed,
        reaper: reaper::Requests,
        exclusions: Exclusions,
        metrics: &Arc<Metrics>,
    ) -> io::Result<Self> {
        let backend = EbpfBackend::new(store);
        let layer = Layer::new("socket", backend, metrics.layer("socket"), Instant::now());
        let status = layer.status();
        // Those that exist are excluded before the first hook is attached.
        let excluded = Arc::new(Mutex::new(Some(exclusions.cgroups())));
        let mut tending = Tending {
            reaper,
            excluded: Arc::clone(&excluded),
            has_told: false,
            metrics: Arc::clone(metrics),
        };
        let nudged = Arc::clone(&feed.inbox);
        let work = {
            let metrics = Arc::clone(metrics);
            move || work(layer, &mut tending, &feed, &metrics)
        };
        let thread = thread::Builder::new()
            .name("socket-layer".to_owned())
            .spawn(work)?;
        exclusions.follow(move |cgroups| {
            *lock(&excluded) = Some(cgroups);
            nudged.nudge();
        })?;
        Ok(Self { status, thread })
    }

    /// How it is doing; closed when the thread has ended.
    pub fn status(&self) -> watch::Receiver<SyncStatus> {
        self.status.clone()
    }

    /// Waits for the end of the thread, once its feed has stopped.
    pub fn join(self) {
        // A thread that panicked has said so, and its end is reported by the closed status.
        let _ = self.thread.join();
    }
}

fn work(
    layer: Layer<EbpfBackend<KernelStore>>,
    tending: &mut Tending,
    feed: &Feed,
    metrics: &Metrics,
) {
    let mut compiler = Compiler::default();
    let compile = |scope: &Scope| {
        let compiled = compile(&mut compiler, feed, scope);
        let count = compiler.problems().count();
        metrics
            .problems
            .set(i64::try_from(count).unwrap_or(i64::MAX));
        compiled
    };
    layer.run(&feed.inbox, compile, |backend, status| {
        tending.tend(backend, status)
    });
}

/// The set behind the lock is changed whole or not at all, even by a thread that panics.
fn lock<T>(value: &Mutex<T>) -> MutexGuard<'_, T> {
    value.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Compiles what changed and logs each problem once, when it comes up.
fn compile(compiler: &mut Compiler, feed: &Feed, scope: &Scope) -> Compiled {
    let (mut compiled, problems) = feed.compile(compiler, scope);
    for problem in &problems {
        tracing::warn!(service = %problem.service(), error = %problem, "not carried out");
    }
    if scope == &Scope::All {
        self_test::add_canary(&mut compiled.state);
    }
    compiled
}

/// What the kernel needs beside the entries of its maps.
struct Tending {
    reaper: reaper::Requests,
    /// Cgroups to leave alone, when they have changed.
    excluded: Arc<Mutex<Option<BTreeSet<u64>>>>,
    /// The mode has been told.
    has_told: bool,
    metrics: Arc<Metrics>,
}

impl Tending {
    /// Sockets whose members a repair gave other indices.
    fn bind(&mut self, store: &mut KernelStore) {
        match store.bind_sockets() {
            Ok(Bound::Already | Bound::Waiting) => {}
            Ok(Bound::Asked | Bound::Done) => self.reaper.ask(),
            Err(error) => {
                tracing::warn!(
                    error = format!("{error:#}"),
                    "cannot lead UDP sockets to their backends; trying again"
                );
            }
        }
    }

    fn tend(&mut self, backend: &mut EbpfBackend<KernelStore>, status: &SyncStatus) {
        if backend.take_udp_retired() {
            self.reaper.ask();
        }
        let excluded = lock(&self.excluded).take();
        if let Some(cgroups) = excluded
            && let Err(error) = backend.store_mut().set_opt_out(&cgroups)
        {
            tracing::warn!(
                error = format!("{error:#}"),
                "cannot exclude cgroups; trying again"
            );
            // Newer ones count.
            lock(&self.excluded).get_or_insert(cgroups);
        }
        if status.is_synced {
            // The heartbeat vouches for a complete state, so it waits for the first one (docs/ARCHITECTURE.md).
            backend.store().heartbeat();
            self.bind(backend.store_mut());
            if !self.has_told {
                self.has_told = true;
                servers::tell_mode(backend.store().left_out(), &self.metrics);
            }
        }
    }
}
