//! Bench `packets`: new connections from outside through node ports, with the agent's rules and with kube-proxy's.
//!
//! Every proxy has a node and a server pod of its own. One more node has no rules, and the client has a route to its pod:
//! that is what the others are a share of. (On a node with rules a direct connection walks them too; in kube-proxy's
//! iptables mode that is the whole list of Services.) Rules outlive who wrote them, so each proxy is stopped when its rules
//! are complete, and short rounds of all sides follow each other in turn.
//!
//! Each of kube-proxy's modes is compared in a cluster of its own: a packet that walks 10,000 rules leaves none of anybody
//! else's in the caches, so a third proxy would be measured with the rules of the second one.

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
    output_of, own_binary,
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
/// Who shares a cluster: ours with each mode of kube-proxy that it is compared with.
const GROUPS: [&[Proxy]; 3] = [
    &[
        Proxy::Ours(Variant::Nft),
        Proxy::Ours(Variant::Legacy),
        Proxy::Kube(Mode::Nftables),
    ],
    &[
        Proxy::Ours(Variant::Nft),
        Proxy::Kube(Mode::Iptables(Variant::Nft)),
    ],
    &[
        Proxy::Ours(Variant::Legacy),
        Proxy::Kube(Mode::Iptables(Variant::Legacy)),
    ],
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
    let mut found = Vec::new();
    for &services in &options.services {
        for proxies in GROUPS {
            let rounds = measure(services, proxies, options.rounds)?;
            let group = Group {
                services,
                proxies,
                rounds,
            };
            group.tell(&mut report);
            found.push(group);
        }
    }
    for variant in VARIANTS {
        compare(&mut report, variant, &found);
    }
    report.finish()
}

/// What was measured in one cluster.
struct Group {
    services: u32,
    proxies: &'static [Proxy],
    rounds: Rounds,
}

impl Group {
    /// Which side of a round a proxy is; the first one is the direct route. None if it was not there.
    fn index(&self, proxy: Proxy) -> Option<usize> {
        let mut proxies = self.proxies.iter();
        proxies.position(|other| *other == proxy).map(|at| 1 + at)
    }

    /// A proxy against another one, or against the direct route.
    fn against(&self, one: Proxy, other: Option<Proxy>) -> Option<Ratio> {
        let one = self.index(one)?;
        let other = match other {
            Some(other) => self.index(other)?,
            None => 0,
        };
        Some(against(&self.rounds, one, other))
    }

    fn tell(&self, report: &mut Report) {
        let services = self.services;
        let per_second = |at: usize| median(self.rounds.iter().map(|sides| sides[at]).collect());
        report.row(json!({"services": services, "side": "direct", "per_second": per_second(0)}));
        for (at, proxy) in (1..).zip(self.proxies) {
            report.row(json!({
                "services": services,
                "side": proxy.to_string(),
                "per_second": per_second(at),
                "share_of_direct": against(&self.rounds, at, 0),
            }));
        }
    }
}

/// Ours with many Services against ours with few, and against kube-proxy.
fn compare(report: &mut Report, variant: Variant, found: &[Group]) {
    let ours = Proxy::Ours(variant);
    let share = |group: &Group| Some((group.services, group.against(ours, None)?.median));
    let shares: Vec<_> = found.iter().filter_map(share).collect();
    let many = shares.last().map(|(services, _)| *services);
    // Of one size, the first group: that of the same proxies.
    let large = shares.iter().find(|(services, _)| Some(*services) == many);
    if let (Some((few, small)), Some((many, large))) = (shares.first(), large) {
        let what = format!("{ours}: share of direct at {many} Services against {few}");
        report.target(Target::at_least(what, large / small, 0.97));
    }
    for (mode, limit) in [(Mode::Nftables, 0.98), (Mode::Iptables(variant), 1.5)] {
        let theirs = Proxy::Kube(mode);
        let mut groups = found.iter().rev();
        let last = groups.find_map(|group| Some((group, group.against(ours, Some(theirs))?)));
        if let Some((group, found)) = last {
            let many = group.services;
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
fn measure(services: u32, proxies: &[Proxy], rounds: usize) -> Result<Rounds> {
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
    for &proxy in proxies {
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
    let command = client.place().command(own_binary()?)?;
    output_of(command, &["packets-client", &serde_json::to_string(plan)?])
}

/// The server process in a pod of a node.
struct Server(Child);

impl Server {
    fn start(node: &Node) -> Result<Self> {
        let pod = node.pod("server")?;
        pod.ip(&format!("addr add {BACKEND}/32 dev eth0\n"))?;
        node.ip(&format!("route add {BACKEND}/32 dev cni0\n"))?;
        let address = format!("{BACKEND}:{TARGET_PORT}");
        let child = pod
            .place()
            .command(own_binary()?)?
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
        let group = Group {
            services: 1,
            proxies: GROUPS[1],
            rounds: vec![
                vec![100.0, 50.0, 100.0],
                vec![10.0, 9.0, 10.0],
                vec![200.0, 140.0, 100.0],
            ],
        };
        let [ours, theirs] = *GROUPS[1] else {
            panic!("two proxies share it");
        };
        assert_eq!(group.against(ours, None).unwrap().median, 0.7);
        assert_eq!(group.against(ours, Some(theirs)).unwrap().median, 0.9);
        assert!(group.against(Proxy::Kube(Mode::Nftables), None).is_none());
    }
}
