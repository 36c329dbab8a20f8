//! The shipped binary on a folder of manifests with 10,000 Services and 100,000 endpoints, 100 Services in a file.

use std::{
    fs,
    net::Ipv4Addr,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use proxy_agent::backends::ebpf::view::PinnedMaps;
use proxy_ebpf::lb::{Scope, Tables as _};
use serde_json::{Value, json};

use super::{MB, resident};
use crate::{
    Agent, Manifests, Node, Topology,
    agent::{HEALTHZ, METRICS},
    bench::{
        cluster::Cluster,
        engine,
        report::{Report, Target},
    },
    wait_for,
};

const CLUSTER: Cluster = Cluster {
    services: 10_000,
    endpoints: 10,
};
const IN_A_FILE: u32 = 100;

/// How the folder is written.
#[derive(Clone, Copy)]
enum Format {
    /// A `List` in each file.
    Json,
    /// The same.
    Yaml,
}

/// Adds two rows for each format: after the first complete sync, and after every Service changed.
pub fn rows(report: &mut Report) -> Result<()> {
    for (format, name) in [(Format::Json, "json"), (Format::Yaml, "yaml")] {
        let mut topology = Topology::new("bench-memory-agent")?;
        let node = topology.node("node-a")?;
        let manifests = Manifests::new(&topology.state_dir(), "manifests")?;
        write(&manifests, format, Cluster::endpoint)?;
        let mut agent = Agent::new(&node, &manifests, &[])?;
        let start = Instant::now();
        agent.spawn()?;
        agent.wait_ready()?;
        let ready = start.elapsed();
        let row = |agent: &Agent, moment| -> Result<Value> {
            let mut row = usage(agent.pid()?)?;
            row["what"] = json!(format!("the whole agent, {name}, {moment}"));
            row["services"] = json!(CLUSTER.services);
            row["endpoints"] = json!(CLUSTER.services * CLUSTER.endpoints);
            row["files"] = json!(CLUSTER.services / IN_A_FILE);
            row["slowest_answer_ms"] = json!(answers(&node)?.as_secs_f64() * 1e3);
            Ok(row)
        };
        let mut first = row(&agent, "after its first complete sync")?;
        first["ready_s"] = json!(ready.as_secs_f64());
        report.row(first);

        let before = words(&node)?;
        write(&manifests, format, |service, n| match n {
            0 => Ipv4Addr::from(0x0c00_0000 + service),
            n => Cluster::endpoint(service, n),
        })?;
        wait_for(
            "all changes are in the kernel",
            Duration::from_secs(60),
            || {
                let now = words(&node)?;
                let left = now
                    .iter()
                    .zip(&before)
                    .filter(|(now, before)| now == before);
                match left.count() {
                    0 => Ok(()),
                    left => anyhow::bail!("{left} to go"),
                }
            },
        )?;
        let last = row(&agent, "after each Service changed once")?;
        let resident = last["resident_mb"].as_f64().context("no number")?;
        report.row(last);
        report.target(Target::at_most(
            format!("resident, the whole agent with both layers, {name}, MB"),
            resident,
            100.0,
        ));
        agent.stop()?;
    }
    Ok(())
}

fn write(
    manifests: &Manifests,
    format: Format,
    endpoint: impl Fn(u32, u32) -> Ipv4Addr,
) -> Result<()> {
    for file in 0..CLUSTER.services / IN_A_FILE {
        let services = file * IN_A_FILE..(file + 1) * IN_A_FILE;
        let list = CLUSTER.full_manifest(services, &endpoint);
        match format {
            Format::Json => manifests.write(&format!("{file}.json"), &list.to_string())?,
            Format::Yaml => {
                manifests.write(&format!("{file}.yaml"), &serde_yaml_ng::to_string(&list)?)?;
            }
        }
    }
    Ok(())
}

/// The set word of every Service, as the programs read it.
fn words(node: &Node) -> Result<Vec<u64>> {
    let maps = PinnedMaps::open(&node.bpf_dir())?;
    let indices = engine::indices(&maps, CLUSTER.services)?;
    let word = |index| maps.set(index, Scope::Cluster).map(|word| word.0);
    let words: Option<_> = indices.into_iter().map(word).collect();
    words.context("no such entry")
}

/// What /proc says of a process, in MB; the peak has the mappings of BPF maps in it.
pub fn usage(pid: u32) -> Result<Value> {
    let process = format!("/proc/{pid}");
    let status = fs::read_to_string(format!("{process}/status"))?;
    let field = |name: &str| -> Result<f64> {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        let kib = line.and_then(|rest| rest.trim_start_matches(':').trim().strip_suffix(" kB"));
        let kib: f64 = kib
            .with_context(|| format!("no {name} in {status}"))?
            .parse()?;
        Ok(kib * 1024.0 / MB)
    };
    let usage = resident(&fs::read_to_string(format!("{process}/smaps"))?);
    Ok(json!({
        "peak_mb": field("VmHWM")?,
        "anonymous_mb": field("RssAnon")?,
        "resident_mb": usage.resident as f64 / MB,
        "mapped_mb": usage.mapped as f64 / MB,
    }))
}

/// The slowest answer of both servers.
fn answers(node: &Node) -> Result<Duration> {
    let mut slowest = Duration::ZERO;
    for (server, path) in [
        (HEALTHZ, "/readyz"),
        (HEALTHZ, "/livez"),
        (HEALTHZ, "/healthz"),
        (METRICS, "/metrics"),
        (METRICS, "/proxyMode"),
        (METRICS, "/configz"),
    ] {
        let start = Instant::now();
        let (status, body) = node.place().http_get(server, path)?;
        ensure!(status == 200, "{path}: {status} {body}");
        slowest = slowest.max(start.elapsed());
    }
    Ok(slowest)
}
