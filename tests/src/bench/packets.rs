//! Bench `packets`: new connections from outside through node ports, with the agent's rules and with kube-proxy's.
//!
//! Every proxy has a node and a server pod of its own. One more node has no rules, and the client has a route to its pod:
//! that is what the others are a share of. (On a node with rules a direct connection walks them too; in kube-proxy's
//! iptables mode that is the whole list of Services.) Rules outlive who wrote them, so each proxy is stopped when its rules
//! are complete, and short rounds of all sides follow each other in turn.

use std::{
    fs,
    net::Ipv4Addr,
    process::{Child, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use clap::Args;
use serde_json::json;

use super::{
    cluster::{Cluster, NODE_PORT, TARGET_PORT},
    conntrack::Raised,
    output_of,
    proxies::{Proxy, Running},
    report::{Ratio, Report, Target, percentile, ratio},
};
use crate::{
    Manifests, Node, Pod, Topology,
    kube::{ControlPlane, Mode, Variant},
};

pub mod client;

use client::{AT_ONCE, Plan, Rounds, Side};

/// Flows of the whole machine while this runs: some are kept for a while after their connection has ended.
const FLOWS: u32 = 4_000_000;
/// Of one network namespace, seconds. The default of 10 would keep more flows to one pod than a masquerading node has ports.
const TIMEOUT: (&str, &str) = (
    "/proc/sys/net/netfilter/nf_conntrack_tcp_timeout_close",
    "1",
);
/// Longest start of a proxy.
const START: Duration = Duration::from_secs(600);
const NAMESPACE: &str = "bench";
/// The only endpoint of every Service: an address that the server pod of each node has, and that each node routes to its own.
const BACKEND: Ipv4Addr = Ipv4Addr::new(10, 244, 200, 2);
const VARIANTS: [Variant; 2] = [Variant::Nft, Variant::Legacy];
const PROXIES: [Proxy; 5] = [
    Proxy::Ours(Variant::Nft),
    Proxy::Ours(Variant::Legacy),
    Proxy::Kube(Mode::Iptables(Variant::Nft)),
    Proxy::Kube(Mode::Iptables(Variant::Legacy)),
    Proxy::Kube(Mode::Nftables),
];

/// Sizes other than the usual ones, for trying it out.
#[derive(Debug, Args)]
pub struct Options {
    /// Numbers of Services, ascending.
    #[arg(long, hide = true, value_delimiter = ',', default_values_t = [1, 1_000, 10_000])]
    services: Vec<u32>,
    /// Rounds of 20 ms of each side: many and short, because what disturbs a shared machine lasts longer than a round.
    #[arg(long, hide = true, default_value_t = 801)]
    rounds: usize,
}

/// Runs the bench.
///
/// # Errors
/// A part could not be made, or a connection failed.
pub fn run(options: &Options) -> Result<bool> {
    let mut report = Report::new("packets");
    let _raised = Raised::to(FLOWS)?;
    let mut sizes = Vec::new();
    for &services in &options.services {
        let rounds = measure(services, options.rounds)?;
        let direct: Vec<f64> = rounds.iter().map(|sides| sides[0]).collect();
        report.row(json!({"services": services, "side": "direct", "per_second": median(direct)}));
        for (at, proxy) in (1..).zip(PROXIES) {
            report.row(json!({
                "services": services,
                "side": proxy.to_string(),
                "per_second": median(rounds.iter().map(|sides| sides[at]).collect()),
                "share_of_direct": against(&rounds, at, 0),
            }));
        }
        sizes.push((services, rounds));
    }
    if let (Some(small), Some(large)) = (sizes.first(), sizes.last()) {
        for variant in VARIANTS {
            compare(&mut report, variant, small, large);
        }
    }
    report.finish()
}

fn compare(
    report: &mut Report,
    variant: Variant,
    (few, small): &(u32, Rounds),
    (many, large): &(u32, Rounds),
) {
    let ours = Proxy::Ours(variant);
    let at = index(ours);
    let growth = against(large, at, 0).median / against(small, at, 0).median;
    let what = format!("{ours}: share of direct at {many} Services against {few}");
    report.target(Target::at_least(what, growth, 0.97));
    for (mode, limit) in [(Mode::Nftables, 0.98), (Mode::Iptables(variant), 1.5)] {
        let theirs = Proxy::Kube(mode);
        let found = against(large, at, index(theirs));
        report.row(json!({
            "services": many,
            "side": ours.to_string(),
            "against": theirs.to_string(),
            "ratio": found,
        }));
        let what = format!("{ours} against {theirs} at {many} Services");
        report.target(Target::at_least(what, found.median, limit));
    }
}

/// Which side of a round a proxy is; the first one is the direct route.
fn index(proxy: Proxy) -> usize {
    let at = PROXIES.iter().position(|other| *other == proxy);
    1 + at.expect("every proxy that is compared is measured")
}

/// Ratio of two sides of the same rounds.
fn against(rounds: &Rounds, one: usize, other: usize) -> Ratio {
    let pairs = rounds.iter().map(|sides| sides[one] / sides[other]);
    ratio(pairs.collect())
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    percentile(&values, 50.0)
}

/// One size, in a cluster of its own.
fn measure(services: u32, rounds: usize) -> Result<Rounds> {
    let mut topology = Topology::new("bench-packets")?;
    let client = topology.outsider()?;
    let plain = topology.node("plain")?;
    client.ip(&format!("route add {BACKEND}/32 via {}\n", plain.v4()))?;
    let mut servers = vec![Server::start(&plain)?];
    let mut sides = vec![Side {
        address: BACKEND.into(),
        first_port: TARGET_PORT,
        ports: 1,
    }];
    let mut nodes = Vec::new();
    for proxy in PROXIES {
        let node = topology.node(&proxy.node_name())?;
        servers.push(Server::start(&node)?);
        sides.push(Side {
            address: node.v4().into(),
            first_port: NODE_PORT,
            ports: services.try_into()?,
        });
        nodes.push((proxy, node));
    }
    serve(&topology, &nodes, services)?;
    println!(
        "{services} Services: {rounds} rounds of {} sides",
        sides.len()
    );
    let rounds = run_client(&client, &Plan { sides, rounds })?;
    servers.into_iter().try_for_each(Server::stop)?;
    Ok(rounds)
}

/// Lets each proxy write its rules. When this returns, nobody but client and servers has anything to do.
fn serve(topology: &Topology, nodes: &[(Proxy, Node)], services: u32) -> Result<()> {
    let cluster = Cluster {
        services,
        endpoints: 1,
    };
    let list = cluster.node_ports_to(BACKEND);
    let manifests = Manifests::new(&topology.state_dir(), "manifests")?;
    manifests.write("cluster.json", &list.to_string())?;
    let control = ControlPlane::start(topology)?;
    control.create_all(NAMESPACE, &list)?;
    for (proxy, node) in nodes {
        node.place().inside(|| fs::write(TIMEOUT.0, TIMEOUT.1))??;
        let start = Instant::now();
        let mut running = match proxy {
            Proxy::Ours(variant) => Running::ours(node, *variant, &manifests)?,
            Proxy::Kube(mode) => Running::kube(&control, node, *mode)?,
        };
        let took = running
            .wait_complete(start, START)
            .with_context(|| format!("{proxy}, {services} Services"))?;
        running.stop()?;
        println!(
            "{services} Services: rules of {proxy} complete after {:.1} s",
            took.as_secs_f64()
        );
    }
    Ok(())
}

fn run_client(client: &Pod, plan: &Plan) -> Result<Rounds> {
    output_of(client, &["packets-client", &serde_json::to_string(plan)?])
}

/// The server process in a pod of a node.
struct Server(Child);

impl Server {
    fn start(node: &Node) -> Result<Self> {
        let pod = node.pod("server")?;
        pod.ip(&format!("addr add {BACKEND}/32 dev eth0\n"))?;
        node.ip(&format!("route add {BACKEND}/32 dev cni0\n"))?;
        let own = std::env::current_exe().context("cannot find the bench's own binary")?;
        let address = format!("{BACKEND}:{TARGET_PORT}");
        let child = pod
            .place()
            .command(own)?
            .args(["connect-server", &address, &AT_ONCE.to_string()])
            .stdin(Stdio::piped())
            .spawn()
            .context("cannot start a server")?;
        Ok(Self(child))
    }

    fn stop(mut self) -> Result<()> {
        drop(self.0.stdin.take());
        let status = self.0.wait().context("a server did not end")?;
        ensure!(status.success(), "a server ended with {status}");
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sides_are_compared_within_their_rounds() {
        let rounds = vec![vec![100.0, 50.0], vec![10.0, 9.0], vec![200.0, 140.0]];
        assert_eq!(against(&rounds, 1, 0).median, 0.7);
        assert_eq!(index(PROXIES[0]), 1);
    }
}
