//! The thread on which the socket layer lives, and what it does there beside syncing.

use std::{
    collections::BTreeSet,
    io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread::{self, JoinHandle},
    time::Instant,
};

use tokio::sync::watch;

use super::{exclude::Exclusions, reaper, self_test, servers};
use crate::{
    backends::ebpf::{
        EbpfBackend,
        kernel::{KernelStore, bind::Bound},
    },
    compile::Compiler,
    metrics::Metrics,
    model::{Model, NodeName, Update},
    sync::{Compiled, Inbox, Layer, Scope, SyncStatus},
};

/// The socket layer at work.
#[derive(Debug)]
pub struct SocketLayer {
    model: Arc<Mutex<Model>>,
    inbox: Arc<Inbox>,
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
        here: NodeName,
        reaper: reaper::Requests,
        exclusions: Exclusions,
        metrics: &Arc<Metrics>,
    ) -> io::Result<Self> {
        let model = Arc::new(Mutex::new(Model::new(here)));
        let inbox = Arc::new(Inbox::new(metrics.changes_pending.clone()));
        let backend = EbpfBackend::new(store);
        let layer = Layer::new("socket", backend, Arc::clone(metrics), Instant::now());
        let status = layer.status();
        // Those that exist are excluded before the first hook is attached.
        let excluded = Arc::new(Mutex::new(Some(exclusions.cgroups())));
        let mut tending = Tending {
            reaper,
            excluded: Arc::clone(&excluded),
            has_told: false,
            metrics: Arc::clone(metrics),
        };
        let work = {
            let (model, inbox, metrics) =
                (Arc::clone(&model), Arc::clone(&inbox), Arc::clone(metrics));
            move || work(layer, &mut tending, &model, &inbox, &metrics)
        };
        let thread = thread::Builder::new()
            .name("socket-layer".to_owned())
            .spawn(work)?;
        let nudged = Arc::clone(&inbox);
        exclusions.follow(move |cgroups| {
            *lock(&excluded) = Some(cgroups);
            nudged.nudge();
        })?;
        Ok(Self {
            model,
            inbox,
            status,
            thread,
        })
    }

    /// How it is doing; closed when the thread has ended.
    pub fn status(&self) -> watch::Receiver<SyncStatus> {
        self.status.clone()
    }

    /// Takes in an update.
    pub fn update(&self, update: Update) {
        let (is_news, dirty, synced, complete) = {
            let mut model = lock(&self.model);
            (
                model.is_news(&update),
                model.apply(update),
                model.is_synced(),
                model.is_complete(),
            )
        };
        if is_news {
            self.inbox.touch(&dirty);
        }
        self.inbox.push(Scope::Part(dirty));
        self.inbox.sources(synced, complete);
    }

    /// Waits for the end of what the thread is doing, and of the thread.
    pub fn stop(self) {
        self.inbox.stop();
        // A thread that panicked has said so, and its end is reported by the closed status.
        let _ = self.thread.join();
    }
}

fn work(
    layer: Layer<EbpfBackend<KernelStore>>,
    tending: &mut Tending,
    model: &Mutex<Model>,
    inbox: &Inbox,
    metrics: &Metrics,
) {
    let mut compiler = Compiler::default();
    let compile = |scope: &Scope| {
        let compiled = compile(&mut compiler, &lock(model), scope);
        let count = compiler.problems().count();
        metrics
            .problems
            .set(i64::try_from(count).unwrap_or(i64::MAX));
        compiled
    };
    layer.run(inbox, compile, |backend, status| {
        tending.tend(backend, status)
    });
}

/// Both values behind a lock here are changed whole or not at all, even by a thread that panics.
fn lock<T>(value: &Mutex<T>) -> MutexGuard<'_, T> {
    value.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Compiles what changed and logs each problem once, when it comes up.
fn compile(compiler: &mut Compiler, model: &Model, scope: &Scope) -> Compiled {
    let (mut compiled, problems) = Compiled::of(compiler, model, scope);
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
