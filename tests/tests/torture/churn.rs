//! Services whose endpoints and addresses change all the time, with a load on all of them.

use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::ensure;
use proxy_tests::{
    Agent, Endpoint, Manifests, Node, Pod, Service, Topology,
    load::{LoadPlan, LoadReport, Record, Talk},
    marker::Marker,
    peer::Load,
};

use serde_json::{Value, json};

use super::{
    stalls::Watch,
    timeline::{Timeline, Truth},
};

/// Services, each with a ClusterIP of both families.
pub const SERVICES: usize = 32;
/// Servers of each Service, of which some are endpoints at a time.
const SERVERS: usize = 6;
/// Servers of each Service that come or go in each round.
const CHANGES: usize = 3;
/// Services that swap their addresses in each round.
const SWAPS: usize = 4;
const TARGET: u16 = 10_000;

/// A cluster under load.
pub struct Churn {
    /// The agent of the client's node.
    pub agent: Agent,
    /// The client's node.
    pub node: Node,
    manifests: Manifests,
    marker: Marker,
    near: Pod,
    far: Pod,
    client: Pod,
    truth: Truth,
    timeline: Timeline,
    random: Random,
    changes: u64,
    records: PathBuf,
    load: Option<(Load, Watch)>,
    _topology: Topology,
}

/// How much happened.
#[derive(Debug)]
pub struct Outcome {
    /// What the load saw.
    pub report: LoadReport,
    /// Files written.
    pub rounds: usize,
    /// Endpoints that came or went.
    pub changes: u64,
}

impl Churn {
    /// Servers, Services and the agent; no load yet.
    pub fn start(name: &str) -> anyhow::Result<Self> {
        let mut topology = Topology::new(name)?;
        let (a, b) = (topology.node("node-a")?, topology.node("node-b")?);
        let (client, near, far) = (a.pod("client")?, a.pod("near")?, b.pod("far")?);
        for service in 0..SERVICES {
            for server in 0..SERVERS {
                let pod = if server % 2 == 0 { &near } else { &far };
                let address = (Ipv6Addr::UNSPECIFIED, port(service, server)).into();
                pod.peer()?.serve_tcp(address, &identity(service, server))?;
            }
        }
        let manifests = Manifests::new(&topology.state_dir(), "manifests")?;
        manifests.put_node("node-a", "zone-a")?;
        let first: BTreeSet<_> = (0..SERVERS / 2).collect();
        let members = |service| {
            first
                .iter()
                .map(|&server| name_of(service, server))
                .collect()
        };
        let truth = Truth {
            owner: (0..SERVICES)
                .flat_map(|service| [service, service])
                .collect(),
            members: (0..SERVICES).map(members).collect(),
        };
        let mut churn = Self {
            // As the kubelet and its like on a node: before the pods, when there is too little time for all.
            agent: Agent::new(&a, &manifests, &[])?.with_priority(-10),
            node: a,
            manifests,
            marker: Marker::default(),
            near,
            far,
            client,
            truth,
            timeline: Timeline::default(),
            random: Random(0x9e37_79b9_7f4a_7c15),
            changes: 0,
            records: topology.state_dir().join("records"),
            load: None,
            _topology: topology,
        };
        churn.timeline.begin(churn.truth.clone());
        churn.write_all()?;
        churn.agent.spawn()?;
        churn.agent.wait_ready()?;
        Ok(churn)
    }

    /// Starts connects to all addresses, from as many threads as there are cores.
    pub fn start_load(&mut self) -> anyhow::Result<()> {
        let mut plan = LoadPlan::new(Talk::Tcp, (0..SERVICES * 2).map(target).collect());
        plan.threads = std::thread::available_parallelism()?.get();
        plan.record = Some(self.records.clone());
        let watch = Watch::start()?;
        self.load = Some((self.client.peer()?.start_load(plan)?, watch));
        Ok(())
    }

    /// Changes endpoints and addresses for a while; a round takes at least `pause`.
    pub fn churn(&mut self, time: Duration, pause: Duration) -> anyhow::Result<()> {
        let start = Instant::now();
        while start.elapsed() < time {
            let round = Instant::now();
            self.change()?;
            self.timeline.replaced();
            std::thread::sleep(pause.saturating_sub(round.elapsed()));
        }
        Ok(())
    }

    /// One round of changes while the agent may be dead: what was true before stays allowed until [`Churn::caught_up`].
    pub fn change(&mut self) -> anyhow::Result<()> {
        let before = self.truth.members.clone();
        for service in 0..SERVICES {
            for _ in 0..CHANGES {
                let server = self.random.below(SERVERS);
                let members = &mut self.truth.members[service];
                let name = name_of(service, server);
                if members.contains(&name) && members.len() > 2 {
                    members.remove(&name);
                } else {
                    members.insert(name);
                }
            }
        }
        let changed = before.iter().zip(&self.truth.members);
        let changed = changed.map(|(old, new)| old.symmetric_difference(new).count());
        // Each member comes or goes in both families.
        self.changes += 2 * changed.sum::<usize>() as u64;
        for _ in 0..SWAPS {
            let (one, other) = (self.random.below(SERVICES), self.random.below(SERVICES));
            for family in 0..2 {
                self.truth.owner.swap(one * 2 + family, other * 2 + family);
            }
        }
        self.timeline.begin(self.truth.clone());
        self.write_all()
    }

    /// Kills the agent amid its work.
    pub fn kill(&mut self) -> anyhow::Result<()> {
        self.agent.kill9()?;
        self.timeline.frozen();
        Ok(())
    }

    /// The agent is ready: what was true before the last change is over.
    pub fn caught_up(&mut self) {
        self.timeline.replaced();
    }

    /// Waits until the kernel holds everything that was changed.
    pub fn settle(&self) -> anyhow::Result<()> {
        self.marker.settle(&self.agent, &self.manifests)
    }

    /// Adds Services that get no load, in a file of their own.
    pub fn add(&self, name: &str, services: &[Service]) -> anyhow::Result<()> {
        self.write(name, services.iter().flat_map(Service::objects).collect())
    }

    /// Stops the load and judges every answer.
    pub fn finish(&mut self) -> anyhow::Result<Outcome> {
        let Some((load, watch)) = self.load.take() else {
            anyhow::bail!("no load runs");
        };
        let report = load.stop()?;
        self.timeline.excuse(watch.finish()?);
        let records = Record::read_all(&self.records)?;
        let wrong: Vec<_> = records
            .iter()
            .filter(|one| !self.timeline.allows(one))
            .collect();
        let complaints = wrong
            .iter()
            .take(20)
            .map(|one| self.timeline.complaint(one));
        let shown: Vec<String> = complaints.collect();
        ensure!(
            wrong.is_empty() && report.failed == 0,
            "of {} connections {} failed: {:#?}, and {} had a wrong answer: {shown:#?}",
            records.len(),
            report.failed,
            report.failures,
            wrong.len(),
        );
        let rounds = self.timeline.len();
        Ok(Outcome {
            report,
            rounds,
            changes: self.changes,
        })
    }

    /// One file with everything: one change, however many endpoints it moves.
    fn write_all(&self) -> anyhow::Result<()> {
        let services = (0..SERVICES).flat_map(|service| self.service(service).objects());
        self.write("all", services.collect())
    }

    fn write(&self, name: &str, objects: Vec<Value>) -> anyhow::Result<()> {
        let list = json!({"apiVersion": "v1", "kind": "List", "items": objects});
        self.manifests
            .write(&format!("{name}.json"), &list.to_string())
    }

    fn service(&self, service: usize) -> Service {
        let own = |&(_, owner): &(usize, &usize)| *owner == service;
        let targets = self.truth.owner.iter().enumerate().filter(own);
        let vips: Vec<IpAddr> = targets.map(|(index, _)| target(index).ip()).collect();
        let endpoints = (0..SERVERS)
            .filter(|&server| self.truth.members[service].contains(&name_of(service, server)))
            .flat_map(|server| {
                let (pod, node) = if server % 2 == 0 {
                    (&self.near, "node-a")
                } else {
                    (&self.far, "node-b")
                };
                let endpoint =
                    |v6| Endpoint::new(pod.address(v6), node).at_port(port(service, server));
                [endpoint(false), endpoint(true)]
            });
        Service::new(&format!("s{service}"), &vips)
            .port("", "TCP", 80, TARGET)
            .endpoints(endpoints)
    }
}

/// Where a server listens.
fn port(service: usize, server: usize) -> u16 {
    let offset = u16::try_from(service * SERVERS + server).unwrap_or(u16::MAX - TARGET);
    TARGET + offset
}

fn identity(service: usize, server: usize) -> String {
    format!("s{service}-{server}")
}

fn name_of(service: usize, server: usize) -> [u8; 8] {
    Record::identity_of(&identity(service, server))
}

/// The addresses: even ones IPv4, odd ones IPv6.
fn target(index: usize) -> SocketAddr {
    let number = u8::try_from(index / 2 + 1).unwrap_or(u8::MAX);
    let ip: IpAddr = if index.is_multiple_of(2) {
        Ipv4Addr::new(10, 96, 1, number).into()
    } else {
        Ipv6Addr::new(0xfd00, 0x10, 0x96, 1, 0, 0, 0, number.into()).into()
    };
    (ip, 80).into()
}

/// xorshift64: the same run each time.
struct Random(u64);

impl Random {
    fn below(&mut self, end: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 % end as u64).unwrap_or(0)
    }
}
