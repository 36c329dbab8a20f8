//! Connects from outside the node while endpoints change, the agent is killed, and the mode changes.

use std::{
    net::{Ipv6Addr, SocketAddr},
    time::{Duration, Instant},
};

use anyhow::ensure;
use proxy_tests::{
    Agent, Endpoint, Scenario, Service, flannel, let_run,
    load::{LoadPlan, Talk},
    scenario::{TCP, in_mode},
};

/// Servers in each pod; half of all are endpoints at a time.
const SERVERS: u16 = 16;
const TARGET: u16 = 10_000;
const NODE_PORT: u16 = 30_100;
/// Between two writes of both Services: half of the servers come, and the others go.
const PAUSE: Duration = Duration::from_millis(80);
/// What is changed per second at least, endpoints that came or went.
const RATE: u64 = 200;
/// How long each part of a node's life is.
const PART: Duration = Duration::from_secs(3);

struct Outside {
    s: Scenario,
    /// How often the Services were written.
    rounds: u64,
}

impl Outside {
    /// Writes the Services of both families anew: the even or the odd servers are their endpoints.
    fn change(&mut self) -> anyhow::Result<()> {
        let rest = u16::try_from(self.rounds % 2)?;
        for (name, v6) in [("web-4", false), ("web-6", true)] {
            self.s.v6 = v6;
            let port = NODE_PORT + u16::from(v6);
            let endpoints =
                [(&self.s.near, "node-a"), (&self.s.far, "node-b")].map(|(pod, node)| {
                    let ports = (0..SERVERS).filter(move |server| server % 2 == rest);
                    ports.map(move |server| {
                        Endpoint::new(pod.address(v6), node).at_port(TARGET + server)
                    })
                });
            let service = Service::new(name, &[self.s.vip(1)])
                .port("http", "TCP", TCP, TARGET)
                .node_port(port)
                .endpoints(endpoints.into_iter().flatten());
            self.s.manifests.put(&service)?;
        }
        self.rounds += 1;
        Ok(())
    }

    fn churn(&mut self) -> anyhow::Result<()> {
        let start = Instant::now();
        while start.elapsed() < PART {
            self.change()?;
            let_run(PAUSE);
        }
        Ok(())
    }

    /// The agent of this mode takes over from the one that just ended.
    fn start(&self, mode: &str) -> anyhow::Result<Agent> {
        let mut agent =
            Agent::new(&self.s.a, &self.s.manifests, &in_mode(mode))?.with_priority(-10);
        agent.spawn()?;
        agent.wait_ready()?;
        Ok(agent)
    }
}

fn run() -> anyhow::Result<()> {
    let s = Scenario::without_agent("outside", false, &[])?;
    flannel::make_rules(&s.a)?;
    flannel::make_rules(&s.b)?;
    for pod in [&s.near, &s.far] {
        for server in 0..SERVERS {
            let address = (Ipv6Addr::UNSPECIFIED, TARGET + server).into();
            pod.peer()?.serve_tcp(address, pod.name())?;
        }
    }
    let outsider = s.topology.outsider()?;
    let targets: Vec<SocketAddr> = vec![
        (s.a.v4(), NODE_PORT).into(),
        (s.a.v6(), NODE_PORT + 1).into(),
    ];
    let mut outside = Outside { s, rounds: 0 };
    outside.change()?;
    let mut agent = outside.start("ebpf")?;
    let mut plan = LoadPlan::new(Talk::Tcp, targets);
    plan.threads = 2;
    let load = outsider.peer()?.start_load(plan)?;
    let started = Instant::now();
    for mode in ["ebpf", "iptables", "ebpf"] {
        outside.churn()?;
        agent.kill9()?;
        outside.change()?;
        agent.spawn()?;
        outside.churn()?;
        agent.wait_ready()?;
        agent.stop()?;
        agent = outside.start(mode)?;
    }
    outside.churn()?;
    let time = started.elapsed();
    // All servers of two pods come or go, in both families.
    let changes = outside.rounds * 4 * u64::from(SERVERS);
    let report = load.stop()?;
    println!(
        "outside: {} connections, {} failed; {changes} endpoint changes in {time:.0?}",
        report.answered(),
        report.failed
    );
    ensure!(report.failed == 0, "{:?}\n{}", report.failures, agent.log());
    ensure!(report.answers.len() == 2, "{:?}", report.answers);
    let rate = changes / time.as_secs().max(1);
    ensure!(rate >= RATE, "only {rate} endpoint changes per second");
    Ok(())
}

#[test]
#[ignore = "needs root and eBPF; takes half a minute"]
fn no_connection_from_outside_fails_while_agent_and_mode_change() {
    run().unwrap_or_else(|error| panic!("{error:?}"));
}
