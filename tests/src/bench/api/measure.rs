//! One proxy that follows the API server, on a node of its own.

use std::{
    net::Ipv4Addr,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Value, json};

use super::{
    super::{
        memory::usage,
        proxies::{Cpu, Running, follower},
    },
    Parts,
    updates::Updates,
    world::{World, address},
};
use crate::{Agent, Node, Pod, kube::Mode, let_run, wait_for};

/// Longest wait for a complete start.
const START: Duration = Duration::from_secs(300);
/// Endpoint changes whose CPU time is measured, and the time between two of them.
const CHANGES: u32 = 1_000;
const BETWEEN: Duration = Duration::from_millis(20);
/// Between two looks at its metrics, which cost it CPU time.
const LOOK: Duration = Duration::from_millis(200);
/// Beside kube-proxy, which has the usual port.
const OTHER_HEALTHZ: &str = "--healthz-bind-address=127.0.0.1:10257";

/// Who is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Side {
    /// The agent with both layers.
    Ours,
    /// The real kube-proxy in mode nftables.
    Kube,
}

impl Side {
    fn name(self) -> &'static str {
        match self {
            Self::Ours => "proxy-agent",
            Self::Kube => "kube-proxy nftables",
        }
    }
}

/// What was found of one.
pub(super) struct Found {
    side: Side,
    pub start: Start,
    /// What the start cost.
    pub start_cpu: Cpu,
    pub restart: Option<Start>,
    pub updates: Option<Updates>,
    pub cost: Option<Cost>,
}

/// How long a start took.
pub(super) struct Start {
    /// Each layer of the agent.
    pub socket: Option<Duration>,
    pub packet: Option<Duration>,
    /// All of it.
    pub complete: Duration,
}

/// Memory, and the CPU time of changes.
pub(super) struct Cost {
    /// What /proc says, after the start and at the end.
    after_start: Value,
    pub at_end: Value,
    pub changes: Cpu,
    /// Of an agent that starts beside this kube-proxy.
    pub observer: Option<Value>,
}

impl World {
    /// Starts a proxy on a new node and measures what is wanted of it.
    pub(super) fn measure(&mut self, side: Side, parts: Parts, rounds: u32) -> Result<Found> {
        println!("{} starts", side.name());
        let node_name = match side {
            Side::Ours => "ours",
            Side::Kube => "kube",
        };
        let (node, client) = self.node(node_name)?;
        let begin = Instant::now();
        let mut running = self.spawn(side, &node)?;
        let start = wait_started(&mut running, begin, 1)?;
        let start_cpu = running.cpu()?;
        let after_start = usage(running.pid()?)?;
        self.ask_all(&client)?;
        let updates = parts.update.then(|| self.update(&client, rounds));
        let updates = updates.transpose()?;
        let cost = parts.memory.then(|| {
            let changes = self.cost_of_changes(side, &running, &client)?;
            let at_end = usage(running.pid()?)?;
            let observer = match side {
                Side::Ours => None,
                Side::Kube => Some(self.observe(&node)?),
            };
            anyhow::Ok(Cost {
                after_start,
                at_end,
                changes,
                observer,
            })
        });
        let cost = cost.transpose()?;
        let restart = match parts.start {
            true => Some(self.restart(running, &node)?),
            false => None,
        };
        Ok(Found {
            side,
            start,
            start_cpu,
            restart,
            updates,
            cost,
        })
    }

    fn spawn(&self, side: Side, node: &Node) -> Result<Running> {
        match side {
            Side::Ours => Running::following(&self.control, node),
            Side::Kube => Running::kube_by_default(&self.control, node, Mode::Nftables),
        }
    }

    /// Ends it in order and starts it again on what it left.
    fn restart(&self, running: Running, node: &Node) -> Result<Start> {
        let (begin, mut running) = match running {
            Running::Ours(mut agent) => {
                agent.stop()?;
                let begin = Instant::now();
                agent.spawn()?;
                (begin, Running::Ours(agent))
            }
            Running::Kube(proxy) => {
                proxy.stop()?;
                (Instant::now(), self.spawn(Side::Kube, node)?)
            }
        };
        wait_started(&mut running, begin, 2)
    }

    /// Every changing Service answers at once: they are spread over all.
    fn ask_all(&self, client: &Pod) -> Result<()> {
        for service in self.cluster.changing() {
            let who = client.ask_tcp(address(service));
            who.with_context(|| format!("service-{service} after a complete start"))?;
        }
        Ok(())
    }

    /// Changes one endpoint of a Service after the other: what that cost until all of it was done.
    fn cost_of_changes(&self, side: Side, running: &Running, client: &Pod) -> Result<Cpu> {
        let changing = self.cluster.changing();
        let others: Vec<u32> = (0..self.cluster.services)
            .filter(|service| !changing.contains(service))
            .collect();
        // Addresses that no endpoint ever had.
        let net = match side {
            Side::Ours => 0x0c00_0000,
            Side::Kube => 0x0d00_0000,
        };
        let before = running.cpu()?;
        let begin = Instant::now();
        for (n, service) in (0..CHANGES).zip(others.iter().cycle()) {
            let slice = self.changed(*service, Ipv4Addr::from(net + n));
            self.wire.wait(self.wire.patch(&slice))?;
            let_run((begin + BETWEEN * n).saturating_duration_since(Instant::now()));
        }
        // What is changed last is done last.
        let last = &mut Updates::default();
        self.change(client, changing[0], None, last)?;
        self.change(client, changing[0], Some(0), last)?;
        if let Running::Ours(agent) = running {
            wait_for("all changes are in the kernel", START, || {
                let pending = agent.metric("proxy_agent_changes_pending", "")?;
                if pending > 0.0 {
                    let_run(LOOK);
                    bail!("{pending} to go");
                }
                Ok(())
            })?;
        }
        Ok(running.cpu()? - before)
    }

    /// What an agent takes whose packet layer observes the kube-proxy of this node.
    fn observe(&self, node: &Node) -> Result<Value> {
        let mut agent = follower(&self.control, node)?;
        agent.add_flag(OTHER_HEALTHZ);
        agent.spawn()?;
        wait_lines(&agent, &["first complete sync", "layer=\"socket\""], 1)?;
        wait_lines(&agent, &["another proxy serves this node"], 1)?;
        wait_lines(&agent, &["INFO ready"], 1)?;
        let usage = usage(agent.pid()?)?;
        agent.stop()?;
        Ok(usage)
    }
}

impl Found {
    /// For the report.
    pub fn rows(&self) -> Vec<Value> {
        let side = self.side.name();
        let mut rows = vec![self.start.row(side, "start")];
        rows.extend(
            self.restart
                .as_ref()
                .map(|start| start.row(side, "restart")),
        );
        rows.extend(self.updates.iter().flat_map(|updates| updates.rows(side)));
        if let Some(cost) = &self.cost {
            rows.push(json!({
                "side": side, "what": "memory", "after_start": cost.after_start, "at_the_end": cost.at_end,
            }));
            for (what, cpu) in [
                ("start", self.start_cpu),
                ("1,000 endpoint changes", cost.changes),
            ] {
                rows.push(json!({"side": side, "what": format!("CPU, {what}"), "own_s": cpu.own_s(), "with_tools": cpu}));
            }
            rows.extend(cost.observer.as_ref().map(|usage| {
                json!({"side": Side::Ours.name(), "what": "memory, beside kube-proxy", "after_start": usage})
            }));
        }
        rows
    }
}

impl Start {
    fn row(&self, side: &str, what: &str) -> Value {
        let mut row =
            json!({"side": side, "what": what, "complete_s": self.complete.as_secs_f64()});
        for (layer, took) in [("socket", self.socket), ("packet", self.packet)] {
            if let Some(took) = took {
                row[format!("{layer}_layer_s")] = took.as_secs_f64().into();
            }
        }
        row
    }
}

/// Waits for the `nth` start of a proxy to be complete; it began at `begin`.
fn wait_started(running: &mut Running, begin: Instant, nth: usize) -> Result<Start> {
    let (mut socket, mut packet) = (None, None);
    if let Running::Ours(agent) = running {
        let layer = |layer: &str| -> Result<Duration> {
            wait_lines(agent, &["first complete sync", layer], nth)?;
            Ok(begin.elapsed())
        };
        socket = Some(layer("layer=\"socket\"")?);
        packet = Some(layer("layer=\"packet\"")?);
    }
    let complete = running.wait_complete(begin, START)?;
    Ok(Start {
        socket,
        packet,
        complete,
    })
}

/// Waits until the log of an agent has so many lines with all of these words.
fn wait_lines(agent: &Agent, words: &[&str], count: usize) -> Result<()> {
    let has_all = |line: &&str| words.iter().all(|word| line.contains(word));
    wait_for(&format!("lines with {words:?}"), START, || {
        let log = agent.log();
        ensure!(log.lines().filter(has_all).count() >= count, "{log}");
        Ok(())
    })
}
