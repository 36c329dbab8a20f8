//! The agent's engine without its sources: model, compiler and the eBPF backend on real maps, in this process.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use proxy_agent::{
    backends::{
        Backend as _, Bounds,
        ebpf::{
            EbpfBackend,
            kernel::{KernelStore, Lease, OpenOptions},
            view::PinnedMaps,
        },
    },
    compile::Compiler,
    metrics::{LayerMetrics, Metrics, Voice},
    model::{Model, NodeName, Objects, Update},
    sync::{Compiled, Inbox, Layer, Scope, SyncStatus},
};

use super::cluster::Cluster;
use crate::{Node, wait_for};

/// A model that holds `cluster`.
pub fn model_of(cluster: Cluster) -> Model {
    let mut model = Model::new(NodeName::new("node-a"));
    model.apply(Update::Objects(cluster.objects()));
    model.apply(Update::Addresses([[192, 168, 77, 11].into()].into()));
    model
}

/// The backend of a node.
///
/// # Errors
/// The kernel refuses.
pub fn open(node: &Node) -> Result<EbpfBackend<KernelStore>> {
    let options = OpenOptions {
        bpf_dir: node.bpf_dir(),
        cgroup: Some(node.cgroup()),
        node_name: node.name().to_owned(),
        lease: Lease::Never,
        host_only: false,
        log: false,
    };
    Ok(EbpfBackend::new(
        KernelStore::open(options).context("cannot open the maps")?,
    ))
}

/// How long the parts of a start took.
#[derive(Clone, Copy, Debug)]
pub struct Start {
    /// Opening (and adopting) the maps, reading them, compile, render, plan, apply, hooks attached.
    pub took: Duration,
    /// Entries written.
    pub writes: usize,
}

/// Brings the kernel to what `model` asks for, as a starting agent does.
///
/// # Errors
/// The kernel refuses.
pub fn start(node: &Node, model: &Model) -> Result<Start> {
    let begin = Instant::now();
    let mut backend = open(node)?;
    let observed = backend.observe()?;
    let state = Compiler::default().compile_all(model).state;
    let plan = backend.plan(&observed, &state, Bounds::default());
    backend.apply(&plan, &state)?;
    backend.publish()?;
    Ok(Start {
        took: begin.elapsed(),
        writes: plan.len(),
    })
}

/// A running layer that takes changes.
pub struct Engine {
    model: Arc<Mutex<Model>>,
    metrics: LayerMetrics,
    inbox: Arc<Inbox>,
    thread: Option<JoinHandle<()>>,
}

impl Engine {
    /// Starts the layer on `model` and waits for its first complete sync.
    ///
    /// # Errors
    /// It does not come.
    pub fn start(node: &Node, model: Model) -> Result<Self> {
        let metrics = Metrics::default().layer("socket", Voice::Node);
        let inbox = Arc::new(Inbox::new(metrics.changes_pending.clone()));
        let status = SyncStatus::channel("socket");
        let layer = Layer::new(status, open(node)?, metrics.clone(), Instant::now());
        let status = layer.status();
        let model = Arc::new(Mutex::new(model));
        let thread = thread::spawn({
            let (model, inbox) = (Arc::clone(&model), Arc::clone(&inbox));
            let mut compiler = Compiler::default();
            move || {
                let compile = |scope: &Scope| Compiled::of(&mut compiler, &lock(&model), scope).0;
                layer.run(&inbox, compile, |_, _| false);
            }
        });
        let engine = Self {
            model,
            metrics,
            inbox,
            thread: Some(thread),
        };
        engine.inbox.push(Scope::All);
        engine.inbox.sources(true, true);
        wait_for("the first sync", Duration::from_secs(60), || {
            status.borrow().is_synced.then_some(()).context("not yet")
        })?;
        Ok(engine)
    }

    /// One consistent change, as a source delivers it.
    pub fn change(&self, objects: Objects) {
        let dirty = lock(&self.model).apply(Update::Objects(objects));
        self.inbox.push(Scope::Part(dirty));
    }

    /// Changes that are not in the kernel yet.
    pub fn pending(&self) -> i64 {
        self.metrics.changes_pending.get()
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.inbox.stop();
        if let Some(thread) = self.thread.take() {
            // A layer that panicked has said so.
            drop(thread.join());
        }
    }
}

fn lock(model: &Mutex<Model>) -> MutexGuard<'_, Model> {
    model.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Index of each synthetic Service in the kernel's SERVICES, by its number.
///
/// # Errors
/// The maps cannot be read, or a Service is missing.
pub fn indices(maps: &PinnedMaps, services: u32) -> Result<Vec<u32>> {
    let mut found = vec![None; services as usize];
    for index in 0..maps.capacity().services {
        let Some(name) = maps.name(index) else { break };
        let text = String::from_utf8_lossy(&name.text[..usize::from(name.len)]).into_owned();
        let number = text
            .strip_prefix("bench/service-")
            .and_then(|rest| rest.split(':').next())
            .and_then(|number| number.parse::<usize>().ok());
        if let Some(slot) = number.and_then(|number| found.get_mut(number)) {
            *slot = Some(index);
        }
    }
    found
        .into_iter()
        .collect::<Option<_>>()
        .context("a Service is not in the kernel's maps")
}
