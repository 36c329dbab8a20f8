//! From kube-proxy to the agent and back (docs/migrate.md), with connections and datagrams from everywhere, while endpoints come
//! and go all the time.
//!
//! A pod that is told to end serves on for a grace, and its slice says so. Then it is gone: whoever is still sent there has
//! failed.

mod changes;
mod judge;
mod traffic;

use std::{
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Duration,
};

use anyhow::{Context, ensure};
use proxy_tests::{
    Agent, Node, Pod, Service,
    agent::sum_of,
    kube::{KubeProxy, Mode, Variant},
    let_run,
    load::now_ns,
    scenario::{SOON, TCP, TCP_TARGET, UDP, UDP_TARGET},
    wait_for,
};
use serde_json::{Value, json};

use self::{
    changes::{Changes, nanos},
    judge::{Excuses, Span, ensure_followed, judge},
    traffic::{Established, Seen, Traffic},
};
use crate::cluster::{Cluster, NODE_PORT, VIPS};

/// Of the Service's UDP port.
pub const DNS_NODE_PORT: u16 = 30_053;
/// Longer than a start of either proxy takes, and shorter than the lease.
const GRACE: Duration = Duration::from_secs(3);
const LEASE: Duration = Duration::from_secs(5);
/// From the last heartbeat, on a busy machine.
const SLACK: Duration = Duration::from_secs(2);
/// The same side by side: longer than the agent takes to be sure that kube-proxy is gone.
const GRACE_BESIDE: Duration = Duration::from_secs(10);
const TAKEOVER: &str = "5s";
/// kube-proxy tries every five seconds to get the port that the agent leaves to it.
const TAKEOVER_AT_ITS_PORT: &str = "12s";
const OBSERVING: &str = "another proxy serves this node";
const TAKING_OVER: &str = "taking over";
/// Where the agent answers beside kube-proxy.
const HEALTHZ: &str = "127.0.0.1:10266";
const METRICS: &str = "127.0.0.1:10265";

/// A migration under way.
struct Migration<'a> {
    c: &'a Cluster,
    /// Of the cluster's node; the cluster's own is never started.
    agent: Agent,
    outsider: Pod,
    established: Established,
    grace: Duration,
    variant: Variant,
    excuses: Excuses,
    /// Steps after each of which endpoints were followed for a while.
    steady: Vec<Span>,
}

impl Migration<'_> {
    /// After a step: what was made before lives, and more is made.
    fn step(&mut self, name: &str) -> anyhow::Result<()> {
        self.established.assert_alive(name)?;
        self.established.add(self.c, &self.outsider, name)?;
        let from_ns = now_ns();
        let_run(self.grace + SLACK);
        let until_ns = now_ns();
        self.steady.push(Span { from_ns, until_ns });
        self.established.assert_alive(name)
    }

    /// Nothing that kube-proxy alone makes is left.
    fn wait_without_kube_proxy(&self) -> anyhow::Result<()> {
        wait_for("nothing of kube-proxy is left", SOON, || {
            let rules = self.c.rules(self.variant)?;
            let is_its = |line: &&str| line.contains("KUBE-PROXY-CANARY") || line.contains(" -> ");
            ensure!(!rules.lines().any(|line| is_its(&line)), "{rules}");
            ensure!(!self.c.has_nft_table()?);
            Ok(())
        })
    }

    /// No rule of the agent's translates anything.
    fn ensure_agent_does_not_translate(&self) -> anyhow::Result<()> {
        let rules = self.c.rules(self.variant)?;
        ensure!(!rules.contains("KUBE-SVC-D-"), "{rules}");
        Ok(())
    }

    /// Not one chain that only the agent makes.
    fn ensure_without_agent(&self) -> anyhow::Result<()> {
        let rules = self.c.rules(self.variant)?;
        ensure!(!rules.contains("PROXY-AGENT-"), "{rules}");
        self.ensure_agent_does_not_translate()
    }

    fn wait_log(&self, text: &str, times: usize) -> anyhow::Result<()> {
        wait_for(&format!("line {times} with {text:?}"), SOON, || {
            let log = self.agent.log();
            ensure!(log.matches(text).count() >= times, "{log}");
            Ok(())
        })
    }
}

/// Runs `steps` with changes and traffic all the time, and judges what came of it. kube-proxy serves, by a file in which `own`
/// is what only the agent reads.
fn migrate(
    name: &str,
    mode: Mode,
    own: &Value,
    grace: Duration,
    steps: impl FnOnce(&mut Migration<'_>, KubeProxy) -> anyhow::Result<()>,
) {
    let variant = match mode {
        Mode::Iptables(variant) => variant,
        Mode::Nftables => Variant::Nft,
    };
    Cluster::run(name, variant, &[], |c| {
        let c = &*c;
        let changes = changes(c, grace)?;
        changes.begin()?;
        let kube_proxy = KubeProxy::start_sharing(&c.control, &c.scenario.a, mode, own.clone())?;
        let mut migration = Migration {
            c,
            agent: Agent::new(&c.scenario.a, &c.scenario.manifests, &[])?,
            outsider: c.scenario.topology.outsider()?,
            established: Established::default(),
            grace,
            variant,
            excuses: Excuses::default(),
            steady: Vec::new(),
        };
        let stop = AtomicBool::new(false);
        let (lives, seen) = thread::scope(|scope| {
            let changing = scope.spawn(|| changes.run(&stop));
            let seen = under_traffic(&mut migration, |m| steps(m, kube_proxy));
            stop.store(true, Ordering::Relaxed);
            (changing.join(), seen)
        });
        let lives = lives.unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        let seen = seen?;
        judge(name, &seen, &lives, &migration.excuses)?;
        let mut steady = migration.steady.iter();
        steady.try_for_each(|span| ensure_followed(&seen, &lives, *span))
    });
}

fn under_traffic(
    m: &mut Migration<'_>,
    steps: impl FnOnce(&mut Migration<'_>) -> anyhow::Result<()>,
) -> anyhow::Result<Vec<Seen>> {
    let traffic = Traffic::start(m.c, &m.outsider)?;
    m.established.add(m.c, &m.outsider, "at first")?;
    steps(m)?;
    traffic.stop()
}

/// The Service of a cluster: two endpoints stay, six come and go.
fn changes(c: &Cluster, grace: Duration) -> anyhow::Result<Changes<'_>> {
    let scenario = &c.scenario;
    let vips = VIPS.map(|vip| vip.parse().expect("an address"));
    let service = Service::new("web", &vips)
        .port("http", "TCP", TCP, TCP_TARGET)
        .node_port(NODE_PORT)
        .port("dns", "UDP", UDP, UDP_TARGET)
        .node_port(DNS_NODE_PORT);
    let mut passing = Vec::new();
    for number in 1..=3 {
        for (node, name) in [(&scenario.a, "node-a"), (&scenario.b, "node-b")] {
            let pod = node.pod(&format!("{number}-{name}"))?;
            pod.serve_tcp(TCP_TARGET)?;
            pod.serve_udp(UDP_TARGET)?;
            passing.push((pod, name));
        }
    }
    Ok(Changes {
        control: &c.control,
        service,
        staying: vec![
            (scenario.near.clone(), "node-a"),
            (scenario.far.clone(), "node-b"),
        ],
        passing,
        grace,
    })
}

/// (a): nothing but the image of the DaemonSet is another, there and back.
fn swap(name: &str, mode: Mode, own: &Value) {
    migrate(name, mode, own, GRACE, |m, kube_proxy| {
        let node = m.c.scenario.a.clone();
        m.agent.read_config(kube_proxy.config());
        let from_ns = now_ns();
        kube_proxy.stop()?;
        m.agent.spawn()?;
        m.agent.wait_ready()?;
        let until_ns = now_ns();
        m.excuses.unfollowed.push(Span { from_ns, until_ns });
        m.wait_log("what kube-proxy left is removed", 1)?;
        m.wait_without_kube_proxy()?;
        m.step("under the agent")?;

        let from_ns = now_ns();
        m.agent.stop()?;
        let spawned_ns = now_ns();
        let kube_proxy = KubeProxy::start_sharing(&m.c.control, &node, mode, own.clone())?;
        let until_ns = now_ns();
        m.excuses.unfollowed.push(Span { from_ns, until_ns });
        if mode == Mode::Nftables {
            // It removes the rules of iptables before it has written its table.
            m.excuses.gap = Some(Span {
                from_ns: spawned_ns,
                until_ns,
            });
        }
        if own["mode"] == "ebpf" {
            m.excuses.lease = Some(Span {
                from_ns,
                until_ns: from_ns + nanos(LEASE + SLACK),
            });
            let_run(LEASE + SLACK);
        }
        m.step("under kube-proxy again")?;
        m.ensure_agent_does_not_translate()?;
        kube_proxy.stop()
    });
}

/// (b): the agent beside kube-proxy, then alone; kube-proxy beside the agent, then alone.
fn side_by_side(name: &str, mode: Mode) {
    let own = json!({"mode": "ebpf", "takeoverAfter": TAKEOVER_AT_ITS_PORT});
    migrate(name, mode, &own, GRACE_BESIDE, |m, kube_proxy| {
        let node = m.c.scenario.a.clone();
        let config = kube_proxy.config().to_owned();
        m.agent.read_config(&beside(m.c, &config)?);
        m.agent.spawn()?;
        wait_for("the agent beside kube-proxy is ready", SOON, || {
            let (status, body) = m.agent.place().http_get(healthz(), "/readyz")?;
            ensure!(status == 200, "{body}");
            Ok(())
        })?;
        m.wait_log(OBSERVING, 1)?;
        m.wait_log("sign=\"proxy_mode\"", 1)?;
        wait_for("the agent's metrics tell of kube-proxy", SOON, || {
            let (status, text) = m.agent.place().http_get(METRICS.parse()?, "/metrics")?;
            let observing = sum_of(&text, "proxy_agent_observing", "");
            ensure!((status, observing) == (200, 1.0), "{status}, {observing}");
            Ok(())
        })?;
        m.step("with the agent beside")?;
        m.ensure_without_agent()?;

        kube_proxy.stop()?;
        m.wait_log(TAKING_OVER, 1)?;
        m.wait_without_kube_proxy()?;
        m.agent.text(&["cleanup", "--kube-proxy"])?;
        m.step("under the agent")?;
        m.agent.stop()?;
        // A copy: the file is written anew when kube-proxy comes back, and who reads it ends then.
        let copy = config.with_extension("copy");
        fs::copy(&config, &copy)?;
        m.agent.read_config(&copy);
        m.agent.spawn()?;
        m.agent.wait_ready()?;
        m.established
            .assert_alive("with kube-proxy's configuration")?;

        if mode == Mode::Nftables {
            hold_rules(&node)?;
        }
        let mut kube_proxy = KubeProxy::spawn_sharing(&m.c.control, &node, mode, own.clone())?;
        m.wait_log(OBSERVING, 2)?;
        kube_proxy.wait_synced()?;
        wait_for(
            "our rules are gone beside kube-proxy",
            SOON,
            || match mode {
                Mode::Iptables(_) => m.ensure_agent_does_not_translate(),
                Mode::Nftables => m.ensure_without_agent(),
            },
        )?;
        let refused = m.agent.run(&["cleanup", "--kube-proxy"])?;
        let said = String::from_utf8_lossy(&refused.stderr).into_owned();
        ensure!(
            refused.status.code() == Some(1) && said.contains(OBSERVING),
            "{said}"
        );
        m.step("with kube-proxy beside")?;
        let log = m.agent.log();
        let count = |text| log.matches(text).count();
        ensure!((count(OBSERVING), count(TAKING_OVER)) == (2, 1), "{log}");

        m.agent.stop()?;
        m.agent.text(&["cleanup"])?;
        ensure!(!node.bpf_dir().exists(), "the directory is still there");
        m.ensure_without_agent()?;
        m.excuses.alone = Some(Span {
            from_ns: now_ns(),
            until_ns: u64::MAX,
        });
        m.step("under kube-proxy again")?;
        kube_proxy.stop()
    });
}

fn healthz() -> SocketAddr {
    HEALTHZ.parse().expect("an address")
}

/// As deploy/overlays/migration has it: the ports are kube-proxy's still.
fn beside(c: &Cluster, config: &Path) -> anyhow::Result<PathBuf> {
    let mut config: Value = serde_json::from_str(&fs::read_to_string(config)?)?;
    config["healthzBindAddress"] = HEALTHZ.into();
    config["metricsBindAddress"] = METRICS.into();
    config["proxyAgent"]["takeoverAfter"] = TAKEOVER.into();
    let path = c.scenario.topology.state_dir().join("beside.json");
    fs::write(&path, config.to_string())?;
    Ok(path)
}

/// What is to be done before kube-proxy starts in mode nftables, as the documents say.
fn hold_rules(node: &Node) -> anyhow::Result<()> {
    const WAY: &str = include_str!("../../../docs/back-to-nftables.md");
    let (_, command) = WAY.split_once("```sh\n").context("no command")?;
    let (command, _) = command.split_once("```").context("no end")?;
    node.output("sh", &["-ec", command]).map(drop)
}

fn rules_alone() -> Value {
    json!({"mode": "iptables"})
}

fn both_layers() -> Value {
    json!({"mode": "ebpf", "socketLease": "5s"})
}

#[test]
#[ignore = "needs root"]
fn the_image_is_swapped_iptables_nft() {
    swap("swap-nft", Mode::Iptables(Variant::Nft), &rules_alone());
}

#[test]
#[ignore = "needs root"]
fn the_image_is_swapped_iptables_legacy() {
    let mode = Mode::Iptables(Variant::Legacy);
    swap("swap-legacy", mode, &rules_alone());
}

#[test]
#[ignore = "needs root"]
fn the_image_is_swapped_nftables() {
    swap("swap-nftables", Mode::Nftables, &rules_alone());
}

#[test]
#[ignore = "needs root and eBPF"]
fn the_image_is_swapped_iptables_nft_and_the_socket_layer() {
    swap("sockets-nft", Mode::Iptables(Variant::Nft), &both_layers());
}

#[test]
#[ignore = "needs root and eBPF"]
fn the_image_is_swapped_iptables_legacy_and_the_socket_layer() {
    let mode = Mode::Iptables(Variant::Legacy);
    swap("sockets-legacy", mode, &both_layers());
}

#[test]
#[ignore = "needs root and eBPF"]
fn the_image_is_swapped_nftables_and_the_socket_layer() {
    swap("sockets-nftables", Mode::Nftables, &both_layers());
}

#[test]
#[ignore = "needs root and eBPF"]
fn side_by_side_with_iptables_nft_no_connection_fails() {
    side_by_side("beside-nft", Mode::Iptables(Variant::Nft));
}

#[test]
#[ignore = "needs root and eBPF"]
fn side_by_side_with_iptables_legacy_no_connection_fails() {
    side_by_side("beside-legacy", Mode::Iptables(Variant::Legacy));
}

#[test]
#[ignore = "needs root and eBPF"]
fn side_by_side_with_nftables_no_connection_fails() {
    side_by_side("beside-nftables", Mode::Nftables);
}
