//! The agent is gone for good: for how long the hooks are believed.

use std::{fs, time::Duration};

use anyhow::ensure;
use proxy_tests::{
    Agent, Scenario, let_run,
    scenario::{SOON, each_family_with, in_family, reaches},
    tools::Tools,
    wait_for,
};

const LEASE: [&str; 2] = ["--socket-lease", "3"];
/// Longer than that.
const GONE: Duration = Duration::from_secs(5);

/// Seconds; none while it is not armed.
fn lease(s: &Scenario) -> anyhow::Result<Option<u64>> {
    Ok(s.agent.json(&["dump", "status"])?["lease_seconds"].as_u64())
}

/// How often the hooks left a socket alone because of it.
fn expired(s: &Scenario) -> anyhow::Result<u64> {
    let status = s.agent.json(&["dump", "status"])?;
    let counter = &status["counters"]["lease_expired"];
    Ok(counter.as_u64().unwrap_or(0))
}

fn wait_armed(s: &Scenario) -> anyhow::Result<()> {
    wait_for("the lease is armed", SOON, || {
        ensure!(lease(s)? == Some(3));
        Ok(())
    })
}

#[test]
#[ignore = "needs root and eBPF"]
fn connections_follow_another_proxy_when_the_agent_is_gone_for_good() {
    each_family_with("lease-other", &LEASE, |s| {
        let web = s.service("web", 1);
        s.apply(&web.clone().endpoint(s.endpoint(&s.near)))?;
        s.settle_packets()?;
        wait_armed(s)?;
        s.agent.kill9()?;
        // It knows nothing of the hooks: they are pinned elsewhere.
        let elsewhere =
            s.a.bpf_dir()
                .with_file_name("elsewhere")
                .display()
                .to_string();
        let args = ["--mode", "iptables", "--bpf-dir", &elsewhere];
        s.manifests.put(&web.endpoint(s.endpoint(&s.far)))?;
        let _other = Agent::start(&s.a, &s.manifests, &args)?;
        let_run(GONE);
        reaches(&s.client.peer()?, s.vip(1), &["far"])?;
        reaches(&s.a.peer()?, s.vip(1), &["far"])?;
        ensure!(expired(s)? > 0);
        Ok(())
    });
}

#[test]
#[ignore = "needs root and eBPF"]
fn an_agent_that_returns_vouches_only_for_what_its_sources_say() {
    in_family("lease-return", false, &LEASE, |s| {
        s.apply(&s.service("web", 1).endpoint(s.endpoint(&s.near)))?;
        s.settle_packets()?;
        wait_armed(s)?;
        s.agent.kill9()?;
        let_run(GONE);
        s.manifests.write("broken.yaml", "kind: [\n")?;
        s.agent.spawn()?;
        s.agent.wait_log("WARN manifests")?;
        let before = expired(s)?;
        reaches(&s.client.peer()?, s.vip(1), &["near"])?;
        ensure!(expired(s)? > before && lease(s)? == Some(3));
        s.manifests.write("broken.yaml", "")?;
        s.agent.wait_ready()?;
        let before = expired(s)?;
        reaches(&s.client.peer()?, s.vip(1), &["near"])?;
        ensure!(expired(s)? == before);
        Ok(())
    });
}

#[test]
#[ignore = "needs root and eBPF"]
fn without_a_packet_layer_the_lease_is_not_armed_and_the_node_is_served() {
    in_family("lease-none", false, &LEASE, |s| {
        s.apply(&s.service("web", 1).endpoint(s.endpoint(&s.near)))?;
        s.settle_packets()?;
        wait_armed(s)?;
        s.agent.stop()?;
        let no_program = s.topology.state_dir().join("no-program");
        fs::write(&no_program, "")?;
        let tools = Tools::new(s.topology.state_dir().join("tools"), &mut s.agent)?;
        tools.show(&no_program, "/usr/sbin/iptables", &mut s.agent)?;
        s.agent.spawn()?;
        s.agent.wait_ready()?;
        s.agent.wait_log("iptables is not in PATH")?;
        ensure!(lease(s)?.is_none());
        let off = s.agent.metric("proxy_agent_mode_info", "packet=\"off\"")?;
        ensure!(off == 1.0);
        s.agent.kill9()?;
        let_run(GONE);
        let before = expired(s)?;
        reaches(&s.client.peer()?, s.vip(1), &["near"])?;
        ensure!(expired(s)? == before);
        Ok(())
    });
}
