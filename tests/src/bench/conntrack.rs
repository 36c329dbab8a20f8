//! Bench `conntrack`: a node with a million UDP flows, of which one in a hundred leads to an endpoint that goes away.
//!
//! The flows are real: a datagram each through the rules of an agent in iptables mode. Its clean-up is timed by the agent
//! (`proxy_agent_conntrack_cleanup_duration_seconds`); meanwhile another Service changes, and is timed against the same
//! change with nothing to clean up. At the end that Service, of TCP, gets another port: its flows are looked for among all.

use std::{
    fs,
    net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use serde_json::json;

use super::report::{Report, Target, percentile};
use crate::{Agent, Endpoint, Manifests, Node, Service, Topology, wait_for};

const FLOWS: u32 = 1_000_000;
const ENDPOINTS: u8 = 100;
const VIP: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 53);
const PORT: u16 = 53;
/// Ports of one client address.
const CLIENT_PORTS: std::ops::Range<u16> = 10_000..65_000;
/// Of the whole machine; raised while the bench runs.
const MAXIMUM: &str = "/proc/sys/net/netfilter/nf_conntrack_max";
/// Of one network namespace, seconds: no flow shall end by itself meanwhile.
const TIMEOUT: &str = "/proc/sys/net/netfilter/nf_conntrack_udp_timeout";
const PATIENCE: Duration = Duration::from_secs(60);
/// Ports of the Service that changes begin here.
const PORTS: u16 = 9_000;
/// Changes that are timed without a clean-up.
const CHANGES: u16 = 9;

/// Runs the bench.
///
/// # Errors
/// The kernel refuses, or the flows do not go.
pub fn run() -> Result<bool> {
    let mut report = Report::new("conntrack");
    let _raised = Raised::to(FLOWS + FLOWS / 5)?;
    let mut topology = Topology::new("bench-conntrack")?;
    let node = topology.node("node-a")?;
    let manifests = Manifests::new(&topology.state_dir(), "manifests")?;
    manifests.put(&dns(ENDPOINTS))?;
    manifests.put(&other(PORTS, PORTS))?;
    let args = ["--mode", "iptables", "--iptables-min-sync-period", "10ms"];
    let agent = Agent::start(&node, &manifests, &args)?;
    wait_for("the rules are there", PATIENCE, || pending(&agent))?;
    wait_cleanups(&agent, 1.0)?;
    node.place().inside(|| fs::write(TIMEOUT, "600"))??;

    let start = Instant::now();
    let made = make_flows(&node)?;
    report.row(
        json!({"what": "flows made", "flows": made, "seconds": start.elapsed().as_secs_f64()}),
    );
    let mut quiet = Vec::new();
    for change in 1..=CHANGES {
        quiet.push(change_another(&agent, &manifests, PORTS + change)?);
    }
    quiet.sort_by(f64::total_cmp);

    let done = cleanups(&agent)?;
    let spent = spent(&agent)?;
    let start = Instant::now();
    manifests.put(&dns(ENDPOINTS - 1))?;
    // Taken in the middle of it.
    let busy = change_another(&agent, &manifests, PORTS + CHANGES + 1)?;
    let was_busy = cleanups(&agent)? == done;
    wait_cleanups(&agent, done + 1.0)?;
    let total = start.elapsed().as_secs_f64();
    let cleaning = self::spent(&agent)? - spent;
    let deleted = agent.metric("proxy_agent_conntrack_flows_deleted_total", "")?;
    let peak = peak_mb(&agent)?;
    report.row(json!({
        "what": "one endpoint of a hundred removed", "flows": made, "deleted": deleted,
        "cleanup_s": cleaning, "file_to_done_s": total, "agent_peak_mb": peak,
    }));
    manifests.put(&other(PORTS + 1, PORTS))?;
    wait_cleanups(&agent, done + 2.0)?;
    let search = self::spent(&agent)? - spent - cleaning;
    report.row(
        json!({"what": "a port of a TCP Service changed", "flows": made, "cleanup_s": search}),
    );
    let (p50, max) = (percentile(&quiet, 50.0), percentile(&quiet, 100.0));
    report.row(json!({
        "what": "another Service: file to rules", "p50_ms": p50, "max_ms": max,
        "during_the_cleanup_ms": busy, "cleanup_still_ran": was_busy,
    }));
    let share = deleted / f64::from(made);
    ensure!(
        (0.005..0.015).contains(&share),
        "{deleted} of {made} flows were deleted"
    );
    report.target(Target::at_most(
        "clean-up of 1,000,000 flows, seconds",
        cleaning,
        3.0,
    ));
    report.target(Target::at_most("peak memory of the agent, MB", peak, 64.0));
    let delay = "a sync beside it, milliseconds more than the slowest without";
    report.target(Target::at_most(delay, busy - max, 50.0));
    report.finish()
}

/// A DNS Service with this many endpoints. Nobody listens there: the flows are what counts.
fn dns(endpoints: u8) -> Service {
    let addresses = (1..=endpoints).map(|n| IpAddr::from([10, 244, 1, 100 + n]));
    Service::new("dns", &[VIP.into()])
        .port("dns", "UDP", PORT, PORT)
        .endpoints(addresses.map(|address| Endpoint::new(address, "node-a")))
}

/// Nothing waits to be written.
fn pending(agent: &Agent) -> Result<()> {
    let pending = agent.metric("proxy_agent_changes_pending", "")?;
    ensure!(pending == 0.0, "{pending} changes to go");
    Ok(())
}

/// Another Service: its port, and that of its endpoint.
fn other(port: u16, target: u16) -> Service {
    let there = Endpoint::new(Ipv4Addr::new(10, 244, 1, 99).into(), "node-a");
    let vip = Ipv4Addr::new(10, 96, 0, 80);
    Service::new("other", &[vip.into()])
        .port("http", "TCP", port, target)
        .endpoint(there)
}

/// Gives another Service's endpoint another port, which leaves no flow stale: milliseconds until the rules have it.
fn change_another(agent: &Agent, manifests: &Manifests, target: u16) -> Result<f64> {
    let syncs = || agent.metric("proxy_agent_sync_duration_seconds_count", "");
    let before = syncs()?;
    let start = Instant::now();
    manifests.put(&other(PORTS, target))?;
    wait_for("the change is in the rules", PATIENCE, || {
        ensure!(syncs()? > before);
        pending(agent)
    })?;
    Ok(start.elapsed().as_secs_f64() * 1e3)
}

/// Waits until the agent has looked at the flows so many times.
fn wait_cleanups(agent: &Agent, count: f64) -> Result<()> {
    wait_for("the flows are cleaned up", PATIENCE, || {
        let done = cleanups(agent)?;
        ensure!(done >= count, "{done} times");
        Ok(())
    })
}

fn cleanups(agent: &Agent) -> Result<f64> {
    agent.metric("proxy_agent_conntrack_cleanup_duration_seconds_count", "")
}

fn spent(agent: &Agent) -> Result<f64> {
    agent.metric("proxy_agent_conntrack_cleanup_duration_seconds_sum", "")
}

/// One datagram from each of a million client sockets. Says how many flows the kernel then has.
fn make_flows(node: &Node) -> Result<u32> {
    let ports = u32::from(CLIENT_PORTS.end - CLIENT_PORTS.start);
    let clients: Vec<Ipv4Addr> = (1..=FLOWS.div_ceil(ports))
        .map(|n| Ipv4Addr::from(0xc612_0000 + n))
        .collect();
    let addresses: String = clients
        .iter()
        .map(|client| format!("addr add {client}/32 dev lo\n"))
        .collect();
    node.ip(&addresses)?;
    let send = || -> Result<u32> {
        let all = clients
            .iter()
            .flat_map(|client| CLIENT_PORTS.map(move |port| SocketAddr::from((*client, port))));
        for client in all.take(FLOWS as usize) {
            let socket = UdpSocket::bind(client).with_context(|| format!("{client}"))?;
            socket.send_to(b"?", (VIP, PORT))?;
        }
        let count = fs::read_to_string("/proc/sys/net/netfilter/nf_conntrack_count")?;
        Ok(count.trim().parse()?)
    };
    node.place().inside(send)?
}

fn peak_mb(agent: &Agent) -> Result<f64> {
    let status = fs::read_to_string(format!("/proc/{}/status", agent.pid()?))?;
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = peak.and_then(|peak| peak.trim().strip_suffix(" kB"));
    let kib: f64 = kib.context("no peak in the process's status")?.parse()?;
    Ok(kib * 1024.0 / 1e6)
}

/// The machine's limit of flows, raised while this value lives.
#[derive(Debug)]
pub(super) struct Raised(String);

impl Raised {
    /// At least `flows`, until it is dropped.
    pub(super) fn to(flows: u32) -> Result<Self> {
        let before =
            fs::read_to_string(MAXIMUM).with_context(|| format!("cannot read {MAXIMUM}"))?;
        if before.trim().parse::<u32>()? < flows {
            println!(
                "{MAXIMUM} is {flows} while this runs, and {} again afterwards",
                before.trim()
            );
            fs::write(MAXIMUM, flows.to_string())
                .with_context(|| format!("cannot raise {MAXIMUM} to {flows}"))?;
        }
        Ok(Self(before))
    }
}

impl Drop for Raised {
    fn drop(&mut self) {
        if let Err(error) = fs::write(MAXIMUM, &self.0) {
            eprintln!("cannot put {MAXIMUM} back to {}: {error}", self.0.trim());
        }
    }
}
