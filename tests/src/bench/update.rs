//! Bench `update`: one endpoint of 100,000 changes; how long until the kernel knows, and how many of these per second.

use std::{
    net::{Ipv4Addr, SocketAddr},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use proxy_agent::{backends::ebpf::view::PinnedMaps, model::Objects};
use proxy_ebpf::lb::{Scope, Tables as _};
use serde_json::json;

use super::{
    cluster::{Cluster, PORT, TARGET_PORT, slice, slice_manifest},
    engine::{self, Engine},
    report::{Report, Target, percentile},
};
use crate::{Agent, Manifests, Node, Topology};

const CLUSTER: Cluster = Cluster {
    services: 10_000,
    endpoints: 10,
};
const SINGLE: u32 = 3_000;
const SUSTAINED: Duration = Duration::from_secs(5);
const FILES: u32 = 100;
const PATIENCE: Duration = Duration::from_secs(10);

/// Runs the bench.
///
/// # Errors
/// The kernel refuses, or a change does not arrive.
pub fn run() -> Result<bool> {
    let mut topology = Topology::new("bench-update")?;
    let mut report = Report::new("update");
    let node = topology.node("node-a")?;
    let engine = Engine::start(&node, engine::model_of(CLUSTER))?;
    let kernel = Kernel::open(&node)?;
    one_by_one(&engine, &kernel, &mut report)?;
    sustained(&engine, &kernel, &mut report)?;
    drop(engine);
    from_files(&mut topology, &mut report)?;
    report.finish()
}

/// What the programs would read.
struct Kernel {
    maps: PinnedMaps,
    indices: Vec<u32>,
}

impl Kernel {
    fn open(node: &Node) -> Result<Self> {
        let maps = PinnedMaps::open(&node.bpf_dir())?;
        let indices = engine::indices(&maps, CLUSTER.services)?;
        Ok(Self { maps, indices })
    }

    fn word(&self, service: u32) -> Result<u64> {
        let index = self
            .indices
            .get(service as usize)
            .context("no such Service")?;
        Ok(self
            .maps
            .set(*index, Scope::Cluster)
            .context("no such entry")?
            .0)
    }

    /// Spins until the set word of `service` is another one; on another core than the layer's thread.
    fn wait_change(&self, service: u32, before: u64, since: Instant) -> Result<Duration> {
        while self.word(service)? == before {
            ensure!(
                since.elapsed() < PATIENCE,
                "a change of service-{service} did not arrive"
            );
            std::hint::spin_loop();
        }
        Ok(since.elapsed())
    }
}

/// The `step`-th version of the slice of `service`: another last endpoint each time.
fn version(service: u32, step: u32) -> Objects {
    let last = Cluster::endpoint(service, 128 + step % 128);
    let addresses = (0..CLUSTER.endpoints - 1)
        .map(|n| Cluster::endpoint(service, n))
        .chain([last]);
    Objects {
        slices: vec![slice(service, addresses)],
        complete: true,
        ..Objects::default()
    }
}

fn one_by_one(engine: &Engine, kernel: &Kernel, report: &mut Report) -> Result<()> {
    let mut took = Vec::new();
    for step in 0..SINGLE {
        let service = step.wrapping_mul(7_919) % CLUSTER.services;
        let change = version(service, step);
        let before = kernel.word(service)?;
        let start = Instant::now();
        engine.change(change);
        took.push(kernel.wait_change(service, before, start)?.as_secs_f64() * 1e3);
    }
    took.sort_by(f64::total_cmp);
    let (p50, p99) = (percentile(&took, 50.0), percentile(&took, 99.0));
    report.row(json!({"what": "event to kernel", "changes": SINGLE, "p50_ms": p50, "p99_ms": p99}));
    report.target(Target::at_most(
        "event to kernel, p99, milliseconds",
        p99,
        1.0,
    ));
    Ok(())
}

/// Changes as fast as they are taken. Each Service in turn, and never more waiting than half of them, so that no change is
/// merged with a later one of its Service.
fn sustained(engine: &Engine, kernel: &Kernel, report: &mut Report) -> Result<()> {
    let start = Instant::now();
    let mut changes = 0;
    let mut last = (0, 0);
    while start.elapsed() < SUSTAINED {
        while engine.pending() > i64::from(CLUSTER.services / 2) {
            std::hint::spin_loop();
        }
        let service = changes % CLUSTER.services;
        last = (service, kernel.word(service)?);
        engine.change(version(service, 1 + changes / CLUSTER.services));
        changes += 1;
    }
    kernel.wait_change(last.0, last.1, Instant::now())?;
    let per_second = f64::from(changes) / start.elapsed().as_secs_f64();
    report.row(json!({"what": "sustained", "changes": changes, "per_second": per_second}));
    report.target(Target::at_least(
        "endpoint changes per second",
        per_second,
        20_000.0,
    ));
    Ok(())
}

/// A file is renamed into the folder of a running agent; when does a new connection land on the new endpoint?
fn from_files(topology: &mut Topology, report: &mut Report) -> Result<()> {
    let node = topology.node("node-b")?;
    let (client, blue, green) = (node.pod("client")?, node.pod("blue")?, node.pod("green")?);
    for pod in [&blue, &green] {
        pod.serve_tcp(TARGET_PORT)?;
    }
    let manifests = Manifests::new(&topology.state_dir(), "update")?;
    manifests.write("cluster.json", &CLUSTER.manifest_to(blue.v4()).to_string())?;
    let write = |backend: Ipv4Addr| {
        // Sorts before cluster.json: of two files with one object the first wins.
        manifests.write(
            "a-changed.json",
            &slice_manifest("service-0", &[backend]).to_string(),
        )
    };
    write(blue.v4())?;
    let agent = Agent::start(&node, &manifests, &[])?;
    let service = SocketAddr::from((Cluster::cluster_ip(0), PORT));
    let mut took = Vec::new();
    for step in 0..FILES {
        let wanted = if step % 2 == 0 { &green } else { &blue };
        let start = Instant::now();
        write(wanted.v4())?;
        while client.ask_tcp(service)? != wanted.name() {
            ensure!(start.elapsed() < PATIENCE, "a changed file did not arrive");
        }
        took.push(start.elapsed().as_secs_f64() * 1e3);
    }
    drop(agent);
    took.sort_by(f64::total_cmp);
    report.row(json!({
        "what": "file written to new connection there (20 ms of it is the wait for quiet)",
        "changes": FILES, "p50_ms": percentile(&took, 50.0), "p99_ms": percentile(&took, 99.0),
    }));
    Ok(())
}
