//! The thread on which the socket layer lives, and what it does there beside syncing.

use std::{
    io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread::{self, JoinHandle},
    time::Instant,
};

use tokio::sync::watch;

use super::{exclude::Exclusions, reaper::Reaper, self_test};
use crate::{
    backends::ebpf::{EbpfBackend, kernel::KernelStore},
    compile::Compiler,
    metrics::Metrics,
    model::{Dirty, Model, NodeName, Update},
    sync::{Compiled, Inbox, Layer, Moment, Scope, SyncStatus},
};

/// What the kernel needs beside the entries of its maps.
#[derive(Debug)]
pub struct Tending {
    /// Cgroups to leave alone.
    pub exclusions: Exclusions,
    /// Ends UDP sockets of dead backends.
    pub reaper: Reaper,
}

/// The socket layer at work.
#[derive(Debug)]
pub struct SocketLayer {
    model: Arc<Mutex<Model>>,
    inbox: Arc<Inbox>,
    status: watch::Receiver<SyncStatus>,
    thread: JoinHandle<()>,
}

impl SocketLayer {
    /// Starts the thread.
    ///
    /// # Errors
    /// There is none to be had.
    pub fn start(
        store: KernelStore,
        here: NodeName,
        tending: Tending,
        metrics: &Arc<Metrics>,
    ) -> io::Result<Self> {
        let model = Arc::new(Mutex::new(Model::new(here)));
        let inbox = Arc::new(Inbox::new(metrics.changes_pending.clone()));
        let backend = EbpfBackend::new(store);
        let layer = Layer::new("socket", backend, Arc::clone(metrics), Instant::now());
        let status = layer.status();
        let work = {
            let (model, inbox, metrics) =
                (Arc::clone(&model), Arc::clone(&inbox), Arc::clone(metrics));
            move || work(layer, &tending, &model, &inbox, &metrics)
        };
        let thread = thread::Builder::new()
            .name("socket-layer".to_owned())
            .spawn(work)?;
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
        let (dirty, synced, complete) = {
            let mut model = lock(&self.model);
            (model.apply(update), model.is_synced(), model.is_complete())
        };
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
    tending: &Tending,
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
    layer.run(inbox, compile, |backend, status, moment| {
        tend(backend, status, moment, tending)
    });
}

/// Updates are applied whole or not at all, even by a thread that panics while it reads.
fn lock(model: &Mutex<Model>) -> MutexGuard<'_, Model> {
    model.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Compiles what changed and logs each problem once, when it comes up.
fn compile(compiler: &mut Compiler, model: &Model, scope: &Scope) -> Compiled {
    let compiled = match scope {
        Scope::All => compiler.compile_all(model),
        Scope::Part(dirty) => compiler.compile(model, dirty),
    };
    for problem in &compiled.problems {
        tracing::warn!(service = %problem.service(), error = %problem, "not carried out");
    }
    let mut state = compiled.state;
    let scope = match scope {
        Scope::All => {
            self_test::add_canary(&mut state);
            Scope::All
        }
        Scope::Part(_) => Scope::Part(Dirty {
            services: compiled.services_in_scope,
            addresses: compiled.addresses_in_scope,
        }),
    };
    Compiled { scope, state }
}

fn tend(
    backend: &mut EbpfBackend<KernelStore>,
    status: &SyncStatus,
    moment: Moment,
    tending: &Tending,
) {
    let Tending { exclusions, reaper } = tending;
    match moment {
        Moment::Turn => {
            if backend.take_udp_retired() {
                reaper.ask();
            }
        }
        Moment::Second => {
            // The heartbeat vouches for a complete state, so it waits for the first one (docs/ARCHITECTURE.md).
            if status.is_synced {
                backend.store().heartbeat();
            }
            if !exclusions.is_empty()
                && let Err(error) = backend.store_mut().set_opt_out(&exclusions.cgroups())
            {
                tracing::warn!(error = format!("{error:#}"), "cannot exclude cgroups");
            }
        }
    }
}
