//! The thread on which the socket layer lives, and what it does there beside syncing.

use std::{
    collections::BTreeSet,
    io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use tokio::sync::watch;

use super::{exclude::Exclusions, feed::Feed, layer::LayerThread, reaper, self_test, servers};
use crate::{
    backends::ebpf::{
        EbpfBackend,
        kernel::{KernelStore, Lease, bind::Bound},
        load::LeftOut,
    },
    compile::Compiler,
    metrics::{LayerMetrics, Metrics},
    sync::{Layer, Scope, SyncStatus},
};

/// How this layer stands to the other one.
#[derive(Debug)]
pub struct Terms {
    /// Why these layers and nothing better.
    pub reason: String,
    /// Without an agent for this long, the packet layer gets everything.
    pub lease: Duration,
    /// How the packet layer is doing; none where there is none.
    pub packets: Option<watch::Receiver<SyncStatus>>,
}

/// Starts the thread. `reaper` is asked when UDP backends are gone.
///
/// # Errors
/// No thread or no inotify instance to be had.
pub fn start(
    store: KernelStore,
    feed: Feed,
    reaper: reaper::Requests,
    exclusions: Exclusions,
    terms: Terms,
    counts: LayerMetrics,
    metrics: &Arc<Metrics>,
) -> io::Result<LayerThread> {
    let backend = EbpfBackend::new(store);
    let status = SyncStatus::channel("socket");
    let layer = Layer::new(status, backend, counts, Instant::now());
    let status = layer.status();
    // Those that exist are excluded before the first hook is attached.
    let excluded = Arc::new(Mutex::new(Some(exclusions.cgroups())));
    let mut tending = Tending {
        reaper,
        excluded: Arc::clone(&excluded),
        terms,
        is_armed: false,
        has_told: false,
        metrics: Arc::clone(metrics),
    };
    let (nudged, inbox) = (Arc::clone(&feed.inbox), Arc::clone(&feed.inbox));
    let metrics = Arc::clone(metrics);
    let work = move || work(layer, &mut tending, &feed, &metrics);
    let thread = LayerThread::start("socket-layer", status, inbox, work)?;
    exclusions.follow(move |cgroups| {
        *lock(&excluded) = Some(cgroups);
        nudged.nudge();
    })?;
    Ok(thread)
}

fn work(
    layer: Layer<EbpfBackend<KernelStore>>,
    tending: &mut Tending,
    feed: &Feed,
    metrics: &Metrics,
) {
    let mut compiler = Compiler::default();
    let compile = |scope: &Scope| {
        let mut compiled = feed.compile(&mut compiler, scope, metrics);
        if scope == &Scope::All {
            self_test::add_canary(&mut compiled.state);
        }
        compiled
    };
    layer.run(&feed.inbox, compile, |backend, status| {
        tending.tend(backend, status);
        feed.tend(status);
        false
    });
}

/// The set behind the lock is changed whole or not at all, even by a thread that panics.
fn lock<T>(value: &Mutex<T>) -> MutexGuard<'_, T> {
    value.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What the kernel needs beside the entries of its maps.
struct Tending {
    reaper: reaper::Requests,
    /// Cgroups to leave alone, when they have changed.
    excluded: Arc<Mutex<Option<BTreeSet<u64>>>>,
    terms: Terms,
    /// The lease is the one of `terms`.
    is_armed: bool,
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

    /// The lease, once the packet layer serves everything that it would take over.
    fn arm(&mut self, store: &mut KernelStore) {
        let packets = self.terms.packets.as_ref();
        if !self.is_armed && packets.is_some_and(|status| status.borrow().is_synced) {
            store.set_lease(Lease::After(self.terms.lease));
            self.is_armed = true;
        }
    }

    fn tell_mode(&self, left_out: &[LeftOut]) {
        let mut reason = self.terms.reason.clone();
        for LeftOut {
            program,
            reason: why,
        } in left_out
        {
            tracing::warn!(program, reason = why, "left out");
            reason.push_str("; without ");
            reason.push_str(program);
        }
        let packet = match self.terms.packets {
            Some(_) => "iptables",
            None => "off",
        };
        servers::tell_mode("ebpf", packet, reason, &self.metrics);
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
            self.arm(backend.store_mut());
            if !self.has_told {
                self.has_told = true;
                self.tell_mode(backend.store().left_out());
            }
        }
    }
}
