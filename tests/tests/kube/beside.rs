//! Another proxy beside the agent: who has which port, and what becomes of sockets when the agent is gone for good. Traffic
//! through all this: `migration`.

use std::time::Duration;

use anyhow::ensure;
use proxy_tests::{
    kube::{KubeProxy, Mode, Variant},
    load::{LoadPlan, Record, Talk, now_ns},
    scenario::SOON,
    wait_for,
};

use crate::cluster::{Cluster, assert_none_failed};

/// Longer than kube-proxy takes to get the port that the agent leaves to it: it tries every five seconds.
const ARGS: [&str; 4] = ["--mode", "iptables", "--takeover-after", "8s"];
const OBSERVING: &str = "another proxy serves this node";
const TAKING_OVER: &str = "taking over";

#[test]
#[ignore = "needs root"]
fn kube_proxy_starts_beside_us_has_its_port_and_goes() {
    let variant = Variant::Nft;
    Cluster::run("port", variant, &ARGS, |c| {
        let (near, far) = (c.scenario.near.clone(), c.scenario.far.clone());
        let node = c.scenario.a.clone();
        c.apply(&[&near, &far])?;
        c.scenario.agent.spawn()?;
        c.scenario.agent.wait_ready()?;
        c.wait_served_by(&[&near, &far])?;

        // It finds its port taken, and is known by what it does.
        let mut kube_proxy = KubeProxy::spawn(&c.control, &node, Mode::Iptables(variant))?;
        c.wait_log(OBSERVING)?;
        kube_proxy.wait_synced()?;
        c.apply(&[&far])?;
        c.wait_served_by(&[&far])?;
        // Ready all the time.
        c.scenario.agent.wait_ready()?;
        let log = c.scenario.agent.log();
        ensure!(!log.contains(TAKING_OVER), "{log}");

        kube_proxy.kill9()?;
        c.wait_log(TAKING_OVER)?;
        c.apply(&[&near])?;
        c.wait_served_by(&[&near])?;
        c.scenario
            .agent
            .wait_metric("proxy_agent_observing", "", |value| value == 0.0)?;
        let log = c.scenario.agent.log();
        ensure!(log.matches(OBSERVING).count() == 1, "{log}");
        c.scenario.agent.stop()
    });
}

/// The socket layer does not learn what kube-proxy does; without its agent it is believed for the lease only.
#[test]
#[ignore = "needs root and eBPF"]
fn connections_follow_kube_proxy_when_the_agent_beside_it_is_gone_for_good() {
    const LEASE: Duration = Duration::from_secs(3);
    // From the last heartbeat, on a busy machine.
    const SLACK: Duration = Duration::from_secs(2);
    let args = ["--mode", "ebpf", "--socket-lease", "3"];
    Cluster::run("beside-lease", Variant::Nft, &args, |c| {
        let (near, far) = (c.scenario.near.clone(), c.scenario.far.clone());
        let (outsider, node) = (c.scenario.topology.outsider()?, c.scenario.a.clone());
        c.apply(&[&near, &far])?;
        let mode = Mode::Iptables(Variant::Nft);
        let kube_proxy = KubeProxy::start(&c.control, &node, mode)?;
        c.scenario.agent.spawn()?;
        c.wait_log(OBSERVING)?;
        // Where it would say so itself, kube-proxy answers.
        c.wait_log("ready")?;
        let status = |c: &Cluster| c.scenario.agent.json(&["dump", "status"]);
        wait_for("the lease is armed", SOON, || {
            let status = status(c)?;
            ensure!(status["lease_seconds"] == LEASE.as_secs(), "{status}");
            Ok(())
        })?;
        let record = c.scenario.topology.state_dir().join("answers");
        let plan = LoadPlan {
            pause: Duration::from_millis(1),
            record: Some(record.clone()),
            ..LoadPlan::new(Talk::Tcp, c.targets())
        };
        let mut loads = c.load(&outsider)?;
        loads.push(("pod, recorded", c.scenario.client.peer()?.start_load(plan)?));

        c.scenario.agent.kill9()?;
        let gone = now_ns();
        c.apply(&[&near])?;
        wait_for("the lease has run out", SOON, || {
            let status = status(c)?;
            let expired = status["counters"]["lease_expired"].as_u64();
            ensure!(expired.is_some_and(|count| count > 0), "{status}");
            Ok(())
        })?;
        c.wait_served_by(&[&near])?;
        assert_none_failed(loads)?;
        let to_removed = Record::identity_of(far.name());
        let records = Record::read_all(&record)?.into_iter();
        let late = records.filter(|one| one.identity == to_removed && one.start_ns > gone);
        let late: Vec<_> = late
            .map(|one| Duration::from_nanos(one.start_ns - gone))
            .collect();
        let last = late.iter().max().copied().unwrap_or_default();
        println!(
            "{} to the removed endpoint, the last after {last:?}",
            late.len()
        );
        // kube-proxy had followed long before: it was the socket layer that sent them there.
        ensure!(last > LEASE / 2 && last < LEASE + SLACK, "{last:?}");
        kube_proxy.stop()
    });
}
