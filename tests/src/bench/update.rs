//! Bench `update`: one endpoint of 100,000 changes; how long until the kernel knows, and how many of these per second.

use std::{
    net::SocketAddr,
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
use crate::{Agent, Manifests, Node, Pod, Topology, tools::Tools};

const CLUSTER: Cluster = Cluster {
    services: 10_000,
    endpoints: 10,
};
const SINGLE: u32 = 3_000;
const SUSTAINED: Duration = Duration::from_secs(5);
/// Turns of each agent, and changed files of a turn.
const ROUNDS: u32 = 8;
const FILES: u32 = 50;
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

/// A file is renamed into the folder of a running agent; when does a new connection land on the new endpoint? Two agents take
/// turns: one with both layers, whose rules are written all the time then, and one that has no packet layer.
fn from_files(topology: &mut Topology, report: &mut Report) -> Result<()> {
    let mut sides = [
        Followed::start(topology, "alone", false)?,
        Followed::start(topology, "beside", true)?,
    ];
    for _ in 0..ROUNDS {
        for side in &mut sides {
            side.change(FILES)?;
            // Rules that are still to be written would disturb the other one.
            side.agent
                .wait_metric("proxy_agent_changes_pending", "", |pending| pending == 0.0)?;
        }
    }
    let [alone, beside] = sides.map(Followed::took);
    let p50 = |took: &[f64]| percentile(took, 50.0);
    for (layers, took) in [("socket", &alone), ("socket and packet", &beside)] {
        report.row(json!({
            "what": "file written to new connection there (20 ms of it is the wait for quiet)",
            "layers": layers, "changes": took.len(), "p50_ms": p50(took), "p99_ms": percentile(took, 99.0),
        }));
    }
    report.target(Target::at_most(
        "the same, what the packet layer adds to the p50, milliseconds",
        p50(&beside) - p50(&alone),
        0.5,
    ));
    Ok(())
}

/// An agent that follows a folder, and the Service that changes.
struct Followed {
    agent: Agent,
    manifests: Manifests,
    client: Pod,
    /// The endpoint is one of these.
    servers: [Pod; 2],
    /// From a change to the connection that landed; milliseconds.
    took: Vec<f64>,
}

impl Followed {
    /// Without a packet layer its `iptables` does not work.
    fn start(topology: &mut Topology, name: &str, has_packets: bool) -> Result<Self> {
        let node = topology.node(name)?;
        let (client, servers) = (node.pod("client")?, [node.pod("blue")?, node.pod("green")?]);
        for pod in &servers {
            pod.serve_tcp(TARGET_PORT)?;
        }
        let manifests = Manifests::new(&topology.state_dir(), name)?;
        let cluster = CLUSTER.manifest_to(servers[0].v4());
        manifests.write("cluster.json", &cluster.to_string())?;
        let mut agent = Agent::new(&node, &manifests, &[])?;
        if !has_packets {
            let tools = topology.state_dir().join("tools");
            Tools::new(tools, &mut agent)?.put("iptables", "exit 3")?;
        }
        agent.spawn()?;
        agent.wait_ready()?;
        let is_off = agent.metric("proxy_agent_mode_info", "packet=\"off\"")? == 1.0;
        ensure!(is_off != has_packets, "the wrong layers:\n{}", agent.log());
        Ok(Self {
            agent,
            manifests,
            client,
            servers,
            took: Vec::new(),
        })
    }

    fn change(&mut self, times: u32) -> Result<()> {
        let service = SocketAddr::from((Cluster::cluster_ip(0), PORT));
        for _ in 0..times {
            let wanted = &self.servers[(self.took.len() + 1) % 2];
            // Sorts before cluster.json: of two files with one object the first wins.
            let slice = slice_manifest("service-0", &[wanted.v4()]).to_string();
            let start = Instant::now();
            self.manifests.write("a-changed.json", &slice)?;
            while self.client.ask_tcp(service)? != wanted.name() {
                ensure!(start.elapsed() < PATIENCE, "a changed file did not arrive");
            }
            self.took.push(start.elapsed().as_secs_f64() * 1e3);
        }
        Ok(())
    }

    fn took(mut self) -> Vec<f64> {
        self.took.sort_by(f64::total_cmp);
        self.took
    }
}
